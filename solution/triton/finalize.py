"""Finalize: each token's output is the weighted sum of its experts' rows, in the order of its top-8 slots."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .contract import TOP_K
from .launch import launch, pdl_wait
from .workspace import Workspace

ROWS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


def finalize(workspace: Workspace, output: torch.Tensor) -> None:
    """output[t] = sum over k of topk_weights[t, k] * expert_rows[token_rows[t, k]], in float32, rounded once.

    Args:
        workspace: its topk_weights, token_rows and expert_rows; a token with no local row gets zeros.
        output: [T, H] bfloat16, every element is written.
    """
    num_tokens, hidden_size = output.shape
    block_h = 512 if num_tokens <= 256 else 2048  # few tokens: more programs; many: 20% faster (H100, 2026-11-22)
    launch(
        output.device, _finalize_kernel, (num_tokens, -(-hidden_size // block_h)),
        workspace.expert_rows, workspace.topk_weights, workspace.token_rows, output,
        ROWS=ROWS[workspace.expert_rows.dtype], H=hidden_size, TOP_K=TOP_K, BLOCK_H=block_h, num_warps=4,
    )


@triton.jit
def _finalize_kernel(
    expert_rows_ptr,  # [R, H] float32 or bfloat16
    topk_weights_ptr,  # [T, TOP_K] float32
    token_rows_ptr,  # [T, TOP_K] int32, -1 = none
    output_ptr,  # out [T, H] bfloat16
    ROWS: tl.constexpr,
    H: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (T, cdiv(H, BLOCK_H)): a program owns BLOCK_H values of one token."""
    tl.static_assert(expert_rows_ptr.dtype.element_ty == ROWS, "launches are told apart by constants, not by pointers")
    pdl_wait(PDL)
    token = tl.program_id(0).to(tl.int64)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    acc = tl.zeros((BLOCK_H,), tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(token_rows_ptr + token * TOP_K + k)
        weight = tl.load(topk_weights_ptr + token * TOP_K + k)
        value = tl.load(expert_rows_ptr + row.to(tl.int64) * H + offs_h, mask=mask_h & (row >= 0), other=0.0)
        acc += tl.where(row >= 0, weight, 0.0) * value.to(tl.float32)
    tl.store(output_ptr + token * H + offs_h, acc.to(tl.bfloat16), mask=mask_h)
