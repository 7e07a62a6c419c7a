"""Finalize: each token's output is the weighted sum of its experts' rows, in the order of its top-8 slots."""

import torch
import triton
import triton.language as tl

from .contract import TOP_K
from .launch import launch, pdl_wait
from .workspace import Workspace


def finalize(workspace: Workspace, output: torch.Tensor) -> None:
    """output[t] = sum over k of topk_weights[t, k] * expert_rows[token_rows[t, k]], in float32, rounded once.

    Args:
        workspace: its topk_weights, token_rows and expert_rows; a token with no local row gets zeros.
        output: [T, H] bfloat16, every element is written.
    """
    num_tokens, hidden_size = output.shape
    ws = workspace.pointers
    block_h = 512 if num_tokens <= 256 else 2048  # few tokens: more programs; many: 20% faster (H100, 2026-11-22)
    launch(
        output.device, _finalize_kernel, (num_tokens, -(-hidden_size // block_h)),
        ws.expert_rows, ws.topk_weights, ws.token_rows, output,
        H=hidden_size, TOP_K=TOP_K, BLOCK_H=block_h, num_warps=4,
    )


@triton.jit
def _finalize_kernel(
    expert_rows_ptr: "*fp32",  # [R, H]
    topk_weights_ptr: "*fp32",  # [T, TOP_K]
    token_rows_ptr: "*i32",  # [T, TOP_K], -1 = none
    output_ptr: "*bf16",  # out [T, H]
    H: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (T, cdiv(H, BLOCK_H)): a program owns BLOCK_H values of one token."""
    token = tl.program_id(0).to(tl.int64)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    # Routing is complete before the wait: this kernel can start only when every program of its predecessor has waited.
    rows = ()
    weights = ()
    for k in tl.static_range(TOP_K):
        rows += (tl.load(token_rows_ptr + token * TOP_K + k),)
        weights += (tl.load(topk_weights_ptr + token * TOP_K + k),)
    pdl_wait(PDL)
    acc = tl.zeros((BLOCK_H,), tl.float32)
    for k in tl.static_range(TOP_K):
        value = tl.load(expert_rows_ptr + rows[k].to(tl.int64) * H + offs_h, mask=mask_h & (rows[k] >= 0), other=0.0)
        acc += tl.where(rows[k] >= 0, weights[k], 0.0) * value
    tl.store(output_ptr + token * H + offs_h, acc.to(tl.bfloat16), mask=mask_h)
