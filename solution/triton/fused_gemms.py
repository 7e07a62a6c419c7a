"""Both GEMMs in one grid, for decode: GEMM2's tiles fill the multiprocessors that GEMM1's last tiles leave idle.

Work is numbered: first every tile of GEMM1, then every tile of GEMM2. A program takes the next number from an atomic
counter, the *ticket*. A GEMM2 program waits until its rows' intermediate is complete.

Why this cannot deadlock: a number is taken by a program that is running, never by one that is still to be scheduled.
Whatever a GEMM2 program waits for has a smaller number, so it is done or in the hands of a running GEMM1 program, and
those wait for nobody. That needs no particular order of starting programs and no number of them to be resident at once;
a kernel that occupies part of the GPU only delays.
"""

import torch
import triton
import triton.language as tl

from .contract import INTERPRETED
from .gemm1_swiglu import alternating_rows, gemm1_streaming_tile
from .gemm2 import gemm2_streaming_tile
from .launch import launch, pdl_wait
from .tuning import Config
from .workspace import Workspace


def fused_gemms(
    hidden_states: torch.Tensor,
    hidden_states_scale: torch.Tensor,
    gemm1_weights: torch.Tensor,
    gemm1_weights_scale: torch.Tensor,
    gemm2_weights: torch.Tensor,
    gemm2_weights_scale: torch.Tensor,
    workspace: Workspace,
    config: Config,
) -> None:
    """Compute the workspace's expert_rows as `gemm1_swiglu` and `gemm2` with a streaming config do.

    Arguments as there. The result has the same bits: both run the same tiles.
    """
    num_tokens, hidden_size = hidden_states.shape
    intermediate_size = gemm2_weights.shape[2]
    device = hidden_states.device
    ws, gemm1, gemm2 = workspace.pointers, config.gemm1, config.gemm2
    num_units = workspace.max_tiles * (intermediate_size // gemm1.block_n + hidden_size // gemm2.block_n)
    launch(
        device, _fused_kernel, (num_units, 1),
        hidden_states, hidden_states_scale, gemm1_weights, gemm1_weights_scale, gemm2_weights, gemm2_weights_scale,
        ws.row_tokens, ws.tile_experts, ws.tile_starts, ws.tile_ends, ws.num_tiles,
        ws.intermediate, ws.intermediate_scale, ws.expert_rows, num_tokens, workspace.max_rows,
        ws.parts, ws.arrivals, ws.stored, ws.ticket,
        H=hidden_size, I=intermediate_size, BLOCK_M=config.block_m,
        BLOCK_N1=gemm1.block_n, NUM_STAGES1=gemm1.num_stages, UNROLL1=gemm1.unroll,
        BLOCK_N2=gemm2.block_n, NUM_STAGES2=gemm2.num_stages, UNROLL2=gemm2.unroll,
        PREFETCH=0 if INTERPRETED else config.fusion.prefetch, EMULATE_FP8=INTERPRETED,
        num_warps=gemm1.num_warps, max_registers=config.fusion.max_registers,
    )


@triton.jit(do_not_specialize=["T", "R"])
def _fused_kernel(
    x_ptr: "*fp8e4nv",  # [T, H]
    x_scale_ptr: "*fp32",  # [H / 128, T]
    w1_ptr: "*fp8e4nv",  # [E, 2 I, H]
    w1_scale_ptr: "*fp32",  # [E, 2 I / 128, H / 128]
    w2_ptr: "*fp8e4nv",  # [E, H, I]
    w2_scale_ptr: "*fp32",  # [E, H / 128, I / 128]
    row_tokens_ptr: "*i32",  # [R]
    tile_experts_ptr: "*i32",  # [tiles]
    tile_starts_ptr: "*i32",  # [tiles]
    tile_ends_ptr: "*i32",  # [tiles]
    num_tiles_ptr: "*i32",  # [1]
    c_ptr: "*fp16",  # scratch [R, I]
    c_scale_ptr: "*fp32",  # scratch [I / 128, R]
    out_ptr: "*fp32",  # out [R, H]
    T,
    R,
    parts_ptr: "*fp32",  # scratch [R, I]
    arrivals_ptr: "*i32",  # [tiles, I / 128], zeros at the start
    stored_ptr: "*i32",  # [tiles], zeros at the start
    ticket_ptr: "*i32",  # [1], zero at the start
    H: tl.constexpr,
    I: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N1: tl.constexpr,
    NUM_STAGES1: tl.constexpr,
    UNROLL1: tl.constexpr,
    BLOCK_N2: tl.constexpr,
    NUM_STAGES2: tl.constexpr,
    UNROLL2: tl.constexpr,
    PREFETCH: tl.constexpr,
    EMULATE_FP8: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (tiles * (I / BLOCK_N1 + H / BLOCK_N2),): as many programs as there is work take a ticket, others leave."""
    N1: tl.constexpr = I // BLOCK_N1
    N2: tl.constexpr = H // BLOCK_N2
    GROUPS: tl.constexpr = I // 128
    pid = tl.program_id(0)
    if PREFETCH > 0:
        # Routing is still running. A guess, that the first tiles are those of the first experts, costs nothing.
        if pid < 8 * N1:
            rows = alternating_rows(pid // N1, pid % N1, I, BLOCK_N1)
            _prefetch_l2(w1_ptr + rows[:, None] * H + tl.arange(0, PREFETCH)[None, :] * 128)
    pdl_wait(PDL)
    num_gemm1 = tl.load(num_tiles_ptr) * N1
    if pid >= num_gemm1 + tl.load(num_tiles_ptr) * N2:
        return
    ticket = tl.atomic_add(ticket_ptr, 1, sem="relaxed", scope="gpu")
    if ticket < num_gemm1:
        tile = ticket // N1
        is_last = gemm1_streaming_tile(
            tile, ticket % N1, x_ptr, x_scale_ptr, w1_ptr, w1_scale_ptr, row_tokens_ptr, tile_experts_ptr,
            tile_starts_ptr, tile_ends_ptr, c_ptr, c_scale_ptr, T, R, parts_ptr, arrivals_ptr,
            H, I, BLOCK_M, BLOCK_N1, NUM_STAGES1, EMULATE_FP8, UNROLL1,
        )
        if is_last:
            tl.debug_barrier()
            tl.atomic_add(stored_ptr + tile, 1, sem="release", scope="gpu")
    else:
        ticket -= num_gemm1
        tile = ticket // N2
        while tl.atomic_add(stored_ptr + tile, 0, sem="acquire", scope="gpu") < GROUPS:
            pass
        gemm2_streaming_tile(
            tile, ticket % N2, c_ptr, c_scale_ptr, w2_ptr, w2_scale_ptr, tile_experts_ptr, tile_starts_ptr,
            tile_ends_ptr, out_ptr, R, H, I, BLOCK_M, BLOCK_N2, NUM_STAGES2, UNROLL2,
        )


@triton.jit
def _prefetch_l2(ptrs):
    """Bring the 128-byte lines at ptrs into L2."""
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [ptrs.to(tl.int64, bitcast=True)],
                              dtype=tl.int32, is_pure=False, pack=1)
