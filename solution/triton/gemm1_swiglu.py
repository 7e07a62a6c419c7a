"""GEMM1 and SwiGLU: gather a tile's tokens, multiply by the up and gate weights, activate, scale and store.

up = A @ W[:I].T, gate = A @ W[I:].T, intermediate = silu(gate) * up. Every 128-wide block of K is one float8 product,
promoted into the float32 accumulator with the token's scale times the weight block's.

Two kernels for two regimes. *Streaming*: few rows an expert, bound by reading the weights; the weights are the M side
of the product, so that 16 rows fill a tensor-core instruction. *Tiled*: many rows, bound by the tensor cores; the rows
are the M side, so that a promotion needs one scale a row.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .contract import INTERPRETED
from .intermediate import store_channel_group, swiglu
from .launch import launch, pdl_wait
from .tuning import Config
from .workspace import Workspace


def gemm1_swiglu(
    hidden_states: torch.Tensor,
    hidden_states_scale: torch.Tensor,
    weights: torch.Tensor,
    weights_scale: torch.Tensor,
    workspace: Workspace,
    config: Config,
    output: torch.Tensor,
) -> None:
    """Compute the workspace's intermediate, silu(gate) * up for every row.

    Args:
        hidden_states: [T, H] float8_e4m3fn.
        hidden_states_scale: [H / 128, T] float32.
        weights: [E, 2 I, H] float8_e4m3fn, the up rows before the gate rows.
        weights_scale: [E, 2 I / 128, H / 128] float32.
        workspace: lists whose tiles have config.block_m rows.
        config: tile shapes and the intermediate's format.
        output: [T, H] bfloat16; the Hopper kernels write the rows of tokens without a local expert.
    """
    if config.kernels == "hopper":
        from .hopper_gemm1 import hopper_gemm1  # here, since Gluon's API differs between Triton versions

        hopper_gemm1(hidden_states, hidden_states_scale, weights, weights_scale, workspace, config, output)
        return
    num_tokens, hidden_size = hidden_states.shape
    intermediate_size = weights.shape[1] // 2
    device = hidden_states.device
    ws, tile = workspace.pointers, config.gemm1
    num_units = workspace.max_tiles * (intermediate_size // tile.block_n)
    rest = (weights_scale, ws.row_tokens, ws.tile_experts, ws.tile_starts, ws.tile_ends, ws.num_tiles,
            ws.intermediate, ws.intermediate_scale, num_tokens, workspace.max_rows)
    constants = dict(
        H=hidden_size, I=intermediate_size, BLOCK_M=config.block_m, BLOCK_N=tile.block_n, NUM_STAGES=tile.num_stages,
        EMULATE_FP8=INTERPRETED,
    )
    if config.streaming:
        launch(device, _streaming_kernel, (num_units, 1), hidden_states, hidden_states_scale, weights, *rest,
               ws.parts, ws.arrivals, **constants, UNROLL=tile.unroll, num_warps=tile.num_warps)
    else:
        w_desc = TensorDescriptor.from_tensor(weights.view(-1, hidden_size), [tile.block_n, 128])
        launch(device, _tiled_kernel, (min(num_units, config.num_sms), 1), hidden_states, hidden_states_scale, w_desc,
               *rest, **constants, num_warps=tile.num_warps)


@triton.jit(do_not_specialize=["T", "R"])
def _streaming_kernel(
    x_ptr: "*fp8e4nv",  # [T, H]
    x_scale_ptr: "*fp32",  # [H / 128, T]
    w_ptr: "*fp8e4nv",  # [E, 2 I, H]
    w_scale_ptr: "*fp32",  # [E, 2 I / 128, H / 128]
    row_tokens_ptr: "*i32",  # [R]
    tile_experts_ptr: "*i32",  # [tiles]
    tile_starts_ptr: "*i32",  # [tiles]
    tile_ends_ptr: "*i32",  # [tiles]
    num_tiles_ptr: "*i32",  # [1]
    c_ptr: "*fp16",  # out [R, I]
    c_scale_ptr: "*fp32",  # out [I / 128, R]
    T,
    R,
    parts_ptr: "*fp32",  # scratch [R, I]
    arrivals_ptr: "*i32",  # [tiles, I / 128], zeros at the start
    H: tl.constexpr,
    I: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    EMULATE_FP8: tl.constexpr,
    UNROLL: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (tiles * I / BLOCK_N,): a program owns BLOCK_M rows x BLOCK_N channels."""
    pdl_wait(PDL)
    N_TILES: tl.constexpr = I // BLOCK_N
    tile = tl.program_id(0) // N_TILES
    if tile >= tl.load(num_tiles_ptr):
        return
    gemm1_streaming_tile(
        tile, tl.program_id(0) % N_TILES, x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, row_tokens_ptr, tile_experts_ptr,
        tile_starts_ptr, tile_ends_ptr, c_ptr, c_scale_ptr, T, R, parts_ptr, arrivals_ptr,
        H, I, BLOCK_M, BLOCK_N, NUM_STAGES, EMULATE_FP8, UNROLL,
    )


@triton.jit
def gemm1_streaming_tile(
    tile, pid_n, x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, row_tokens_ptr, tile_experts_ptr,
    tile_starts_ptr, tile_ends_ptr, c_ptr, c_scale_ptr, T, R, parts_ptr, arrivals_ptr,
    H: tl.constexpr, I: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
    EMULATE_FP8: tl.constexpr, UNROLL: tl.constexpr,
):
    """Channels pid_n * BLOCK_N.. of one tile; arguments as in `_streaming_kernel`.

    The channels' up and gate rows of W alternate in one operand of 2 BLOCK_N rows and share tensor-core instructions.
    Returns whether this call was the one that stored the channels' group.
    """
    K_BLOCKS: tl.constexpr = H // 128
    GROUPS: tl.constexpr = I // 128
    expert = tl.load(tile_experts_ptr + tile)
    rows = tl.load(tile_starts_ptr + tile) + tl.arange(0, BLOCK_M)
    mask_m = rows < tl.load(tile_ends_ptr + tile)
    tokens = tl.load(row_tokens_ptr + rows, mask=mask_m, other=0)

    offs_w = tl.arange(0, 2 * BLOCK_N)
    is_gate = offs_w % 2
    offs_k = tl.arange(0, 128)
    w_ptrs = w_ptr + alternating_rows(expert, pid_n, I, BLOCK_N)[:, None] * H + offs_k[None, :]
    x_ptrs = x_ptr + tokens[:, None] * H + offs_k[None, :]
    x_scale_ptrs = x_scale_ptr + tokens
    up_scale_ptr = w_scale_ptr + (expert * (2 * I // 128) + pid_n * BLOCK_N // 128) * K_BLOCKS
    gate_scale_ptr = up_scale_ptr + I // 128 * K_BLOCKS

    acc = tl.zeros((2 * BLOCK_N, BLOCK_M), tl.float32)
    for i in tl.range(0, K_BLOCKS // UNROLL, num_stages=NUM_STAGES):
        for j in tl.static_range(UNROLL):
            k = i * UNROLL + j
            w = tl.load(w_ptrs + k * 128)
            x = tl.load(x_ptrs + k * 128, mask=mask_m[:, None], other=0.0)
            x_scale = tl.load(x_scale_ptrs + k * T, mask=mask_m, other=0.0)
            w_scale = tl.where(is_gate == 0, tl.load(up_scale_ptr + k), tl.load(gate_scale_ptr + k))
            acc += tl.dot(w, x.T) * (w_scale[:, None] * x_scale[None, :])

    up, gate = tl.split(tl.reshape(acc.T, (BLOCK_M, BLOCK_N, 2)))
    out = swiglu(up, gate)
    group = pid_n * BLOCK_N // 128
    # A scale covers 128 channels, a program less: the one that arrives last finds all parts and stores them. Which one
    # that is does not change the values. The barriers order the whole program's stores before its arrival.
    offs_row = rows[:, None].to(tl.int64) * I
    tl.store(parts_ptr + offs_row + (pid_n * BLOCK_N + tl.arange(0, BLOCK_N))[None, :], out, mask=mask_m[:, None])
    tl.debug_barrier()
    arrived = tl.atomic_add(arrivals_ptr + tile * GROUPS + group, 1, sem="acq_rel", scope="gpu")
    is_last = arrived == 128 // BLOCK_N - 1
    if is_last:
        whole = tl.load(parts_ptr + offs_row + (group * 128 + offs_k)[None, :], mask=mask_m[:, None], other=0.0,
                        cache_modifier=".cg")
        store_channel_group(c_ptr, c_scale_ptr, whole, rows, mask_m, group, R, I, EMULATE_FP8)
    return is_last


@triton.jit
def alternating_rows(expert, pid_n, I: tl.constexpr, BLOCK_N: tl.constexpr):
    """[2 BLOCK_N] rows of W [E * 2 I, H]: a tile's channels, up and gate in turn."""
    offs_w = tl.arange(0, 2 * BLOCK_N)
    return expert * 2 * I + pid_n * BLOCK_N + offs_w // 2 + offs_w % 2 * I


@triton.jit(do_not_specialize=["T", "R"])
def _tiled_kernel(
    x_ptr: "*fp8e4nv",  # [T, H]
    x_scale_ptr: "*fp32",  # [H / 128, T]
    w_desc,  # [E * 2 I, H] float8_e4m3fn, block [BLOCK_N, 128]
    w_scale_ptr: "*fp32",  # [E, 2 I / 128, H / 128]
    row_tokens_ptr: "*i32",  # [R]
    tile_experts_ptr: "*i32",  # [tiles]
    tile_starts_ptr: "*i32",  # [tiles]
    tile_ends_ptr: "*i32",  # [tiles]
    num_tiles_ptr: "*i32",  # [1]
    c_ptr: "*fp8e4nv",  # out [R, I]
    c_scale_ptr: "*fp32",  # out [I / 128, R]
    T,
    R,
    H: tl.constexpr,
    I: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    EMULATE_FP8: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (programs,), persistent: a program takes every programs-th unit of BLOCK_M rows x BLOCK_N = 128 channels."""
    tl.static_assert(BLOCK_N == 128, "a program stores whole channel groups")
    pdl_wait(PDL)
    N_TILES: tl.constexpr = I // BLOCK_N
    K_BLOCKS: tl.constexpr = H // 128
    num_units = tl.load(num_tiles_ptr) * N_TILES
    offs_k = tl.arange(0, 128)
    for unit in range(tl.program_id(0), num_units, tl.num_programs(0)):
        tile = unit // N_TILES
        pid_n = unit % N_TILES
        expert = tl.load(tile_experts_ptr + tile)
        rows = tl.load(tile_starts_ptr + tile) + tl.arange(0, BLOCK_M)
        mask_m = rows < tl.load(tile_ends_ptr + tile)
        tokens = tl.load(row_tokens_ptr + rows, mask=mask_m, other=0)  # absent rows read token 0: valid, never stored

        up_row = expert * 2 * I + pid_n * BLOCK_N
        x_ptrs = x_ptr + tokens[:, None] * H + offs_k[None, :]
        x_scale_ptrs = x_scale_ptr + tokens
        up_scale_ptr = w_scale_ptr + (expert * (2 * I // 128) + pid_n) * K_BLOCKS
        gate_scale_ptr = up_scale_ptr + I // 128 * K_BLOCKS

        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, K_BLOCKS, num_stages=NUM_STAGES):
            x = tl.load(x_ptrs + k * 128)
            w_up = w_desc.load([up_row, k * 128])
            w_gate = w_desc.load([up_row + I, k * 128])
            x_scale = tl.load(x_scale_ptrs + k * T)
            up += tl.dot(x, w_up.T) * (x_scale * tl.load(up_scale_ptr + k))[:, None]
            gate += tl.dot(x, w_gate.T) * (x_scale * tl.load(gate_scale_ptr + k))[:, None]
        # Read again: rows and mask kept through the K loop cost registers that the accumulators need (sm_90 spills).
        rows = tl.load(tile_starts_ptr + tile, volatile=True) + tl.arange(0, BLOCK_M)
        mask_m = rows < tl.load(tile_ends_ptr + tile, volatile=True)
        store_channel_group(c_ptr, c_scale_ptr, swiglu(up, gate), rows, mask_m, pid_n, R, I, EMULATE_FP8)
