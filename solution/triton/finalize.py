"""Finalize: each token's output is the weighted sum of its experts' rows, in the order of its top-8 slots."""

import torch
import triton
import triton.language as tl

from .contract import TOP_K
from .launch import launch, pdl_wait
from .tuning import Config
from .workspace import Workspace


def finalize(workspace: Workspace, output: torch.Tensor, config: Config) -> None:
    """output[t] = sum over k of topk_weights[t, k] * expert_rows[token_rows[t, k]], in float32, rounded once.

    Args:
        workspace: its topk_weights, token_rows and expert_rows.
        output: [T, H] bfloat16. Every element is written, but for tokens without a row where the config's GEMM1 has
            written their zeros.
        config: what expert_rows is made of.
    """
    num_tokens, hidden_size = output.shape
    ws = workspace.pointers
    # Few tokens: many programs, so that none waits long. Many: one a token, as many at once as fit. That takes 86 us at
    # T = 14107, without the register bound 92, with a program a block 121 (H100, 2026-11-23).
    few = num_tokens <= 256
    block_h = 512 if few else 1024
    launch(
        output.device, _finalize_kernel, (num_tokens, -(-hidden_size // block_h) if few else 1),
        ws.expert_rows, ws.topk_weights, ws.token_rows, output,
        IS_BFLOAT16=config.expert_rows_dtype == torch.bfloat16, HAS_ZEROS=config.kernels == "hopper", BRANCH=not few,
        H=hidden_size, TOP_K=TOP_K, BLOCK_H=block_h, num_warps=4, max_registers=None if few else 40,
    )


@triton.jit
def _finalize_kernel(
    expert_rows_ptr: "*fp32",  # [R, H]; bfloat16 if IS_BFLOAT16
    topk_weights_ptr: "*fp32",  # [T, TOP_K]
    token_rows_ptr: "*i32",  # [T, TOP_K], -1 = none
    output_ptr: "*bf16",  # out [T, H]
    IS_BFLOAT16: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    BRANCH: tl.constexpr,
    H: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (T, programs): a program takes every programs-th block of BLOCK_H values of one token.

    BRANCH: jump over the slots without a row, for throughput; otherwise all loads are under way at once.
    """
    if IS_BFLOAT16 and expert_rows_ptr.dtype.element_ty == tl.float32:  # an address: the annotation gives its type
        expert_rows_ptr = expert_rows_ptr.to(tl.pointer_type(tl.bfloat16), bitcast=True)
    token = tl.program_id(0).to(tl.int64)
    # Routing is complete before the wait, since every program of the predecessor waited before its trigger. Past L1,
    # where lines of an earlier call may be.
    rows = ()
    weights = ()
    has_row = False
    for k in tl.static_range(TOP_K):
        rows += (tl.load(token_rows_ptr + token * TOP_K + k, cache_modifier=".cg"),)
        weights += (tl.load(topk_weights_ptr + token * TOP_K + k, cache_modifier=".cg"),)
        has_row |= rows[k] >= 0
    pdl_wait(PDL)
    if has_row or not HAS_ZEROS:
        for first in range(tl.program_id(1) * BLOCK_H, H, tl.num_programs(1) * BLOCK_H):
            offs_h = first + tl.arange(0, BLOCK_H)
            mask_h = offs_h < H
            acc = tl.zeros((BLOCK_H,), tl.float32)
            for k in tl.static_range(TOP_K):
                row_ptr = expert_rows_ptr + rows[k].to(tl.int64) * H
                if BRANCH:
                    if rows[k] >= 0:
                        acc += weights[k] * tl.load(row_ptr + offs_h, mask=mask_h, other=0.0).to(tl.float32)
                else:
                    value = tl.load(row_ptr + offs_h, mask=mask_h & (rows[k] >= 0), other=0.0)
                    acc += tl.where(rows[k] >= 0, weights[k], 0.0) * value.to(tl.float32)
            tl.store(output_ptr + token * H + offs_h, acc.to(tl.bfloat16), mask=mask_h)
