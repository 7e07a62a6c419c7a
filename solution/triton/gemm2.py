"""GEMM2: the down projection of every row, C @ W.T, in float32.

Streaming and tiled kernels as in gemm1_swiglu.py. The streaming kernel takes the float16 intermediate and turns the
weights into float16 in registers, which is exact.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import launch, pdl_wait
from .tuning import Config
from .workspace import Workspace


def gemm2(weights: torch.Tensor, weights_scale: torch.Tensor, workspace: Workspace, config: Config) -> None:
    """Compute the workspace's expert_rows from its intermediate; rows past the last tile stay as they are.

    Args:
        weights: [E, H, I] float8_e4m3fn.
        weights_scale: [E, H / 128, I / 128] float32.
        workspace: lists whose tiles have config.block_m rows, intermediate in config.intermediate_dtype.
        config: tile shapes.
    """
    if config.kernels == "hopper":
        from .hopper_gemm2 import hopper_gemm2  # here, since Gluon's API differs between Triton versions

        hopper_gemm2(weights, weights_scale, workspace, config)
        return
    _, hidden_size, intermediate_size = weights.shape
    device = weights.device
    ws, tile = workspace.pointers, config.gemm2
    num_units = workspace.max_tiles * (hidden_size // tile.block_n)
    rest = (weights_scale, ws.tile_experts, ws.tile_starts, ws.tile_ends, ws.num_tiles, ws.expert_rows,
            workspace.max_rows)
    constants = dict(
        H=hidden_size, I=intermediate_size, BLOCK_M=config.block_m, BLOCK_N=tile.block_n, NUM_STAGES=tile.num_stages
    )
    if config.streaming:
        launch(device, _streaming_kernel, (num_units, 1), ws.intermediate, ws.intermediate_scale, weights, *rest,
               **constants, UNROLL=tile.unroll, num_warps=tile.num_warps)
    else:
        c_desc = TensorDescriptor.from_tensor(workspace.intermediate, [config.block_m, 128])
        w_desc = TensorDescriptor.from_tensor(weights.view(-1, intermediate_size), [tile.block_n, 128])
        launch(device, _tiled_kernel, (min(num_units, config.num_sms), 1), c_desc, ws.intermediate_scale, w_desc,
               *rest, **constants, num_warps=tile.num_warps)


@triton.jit(do_not_specialize=["R"])
def _streaming_kernel(
    c_ptr: "*fp16",  # [R, I]
    c_scale_ptr: "*fp32",  # [I / 128, R]
    w_ptr: "*fp8e4nv",  # [E, H, I]
    w_scale_ptr: "*fp32",  # [E, H / 128, I / 128]
    tile_experts_ptr: "*i32",  # [tiles]
    tile_starts_ptr: "*i32",  # [tiles]
    tile_ends_ptr: "*i32",  # [tiles]
    num_tiles_ptr: "*i32",  # [1]
    out_ptr: "*fp32",  # out [R, H]
    R,
    H: tl.constexpr,
    I: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (tiles * H / BLOCK_N,): a program owns BLOCK_M rows x BLOCK_N columns."""
    pdl_wait(PDL)
    N_TILES: tl.constexpr = H // BLOCK_N
    tile = tl.program_id(0) // N_TILES
    if tile >= tl.load(num_tiles_ptr):
        return
    gemm2_streaming_tile(
        tile, tl.program_id(0) % N_TILES, c_ptr, c_scale_ptr, w_ptr, w_scale_ptr, tile_experts_ptr, tile_starts_ptr,
        tile_ends_ptr, out_ptr, R, H, I, BLOCK_M, BLOCK_N, NUM_STAGES, UNROLL,
    )


@triton.jit
def gemm2_streaming_tile(
    tile, pid_n, c_ptr, c_scale_ptr, w_ptr, w_scale_ptr, tile_experts_ptr, tile_starts_ptr, tile_ends_ptr, out_ptr, R,
    H: tl.constexpr, I: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Columns pid_n * BLOCK_N.. of one tile; arguments as in `_streaming_kernel`."""
    K_BLOCKS: tl.constexpr = I // 128
    expert = tl.load(tile_experts_ptr + tile)
    rows = tl.load(tile_starts_ptr + tile) + tl.arange(0, BLOCK_M)
    mask_m = rows < tl.load(tile_ends_ptr + tile)

    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, 128)
    w_ptrs = w_ptr + (expert * H + offs_n)[:, None] * I + offs_k[None, :]
    c_ptrs = c_ptr + rows[:, None].to(tl.int64) * I + offs_k[None, :]
    c_scale_ptrs = c_scale_ptr + rows
    w_scale_ptrs = w_scale_ptr + (expert * (H // 128) + pid_n * BLOCK_N // 128) * K_BLOCKS

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for i in tl.range(0, K_BLOCKS // UNROLL, num_stages=NUM_STAGES):
        for j in tl.static_range(UNROLL):
            k = i * UNROLL + j
            w = tl.load(w_ptrs + k * 128)
            c = tl.load(c_ptrs + k * 128, mask=mask_m[:, None], other=0.0)
            c_scale = tl.load(c_scale_ptrs + k * R, mask=mask_m, other=0.0)
            acc += tl.dot(w.to(tl.float16), c.T) * (c_scale * tl.load(w_scale_ptrs + k))[None, :]
    tl.store(out_ptr + rows[:, None].to(tl.int64) * H + offs_n[None, :], acc.T, mask=mask_m[:, None])


@triton.jit(do_not_specialize=["R"])
def _tiled_kernel(
    c_desc,  # [R, I] float8_e4m3fn, block [BLOCK_M, 128]
    c_scale_ptr: "*fp32",  # [I / 128, R]
    w_desc,  # [E * H, I] float8_e4m3fn, block [BLOCK_N, 128]
    w_scale_ptr: "*fp32",  # [E, H / 128, I / 128]
    tile_experts_ptr: "*i32",  # [tiles]
    tile_starts_ptr: "*i32",  # [tiles]
    tile_ends_ptr: "*i32",  # [tiles]
    num_tiles_ptr: "*i32",  # [1]
    out_ptr: "*fp32",  # out [R, H]
    R,
    H: tl.constexpr,
    I: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (programs,), persistent: a program takes every programs-th unit of BLOCK_M rows x BLOCK_N columns."""
    pdl_wait(PDL)
    N_TILES: tl.constexpr = H // BLOCK_N
    K_BLOCKS: tl.constexpr = I // 128
    num_units = tl.load(num_tiles_ptr) * N_TILES
    for unit in range(tl.program_id(0), num_units, tl.num_programs(0)):
        tile = unit // N_TILES
        pid_n = unit % N_TILES
        expert = tl.load(tile_experts_ptr + tile)
        first_row = tl.load(tile_starts_ptr + tile)
        rows = first_row + tl.arange(0, BLOCK_M)
        mask_m = rows < tl.load(tile_ends_ptr + tile)
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        c_scale_ptrs = c_scale_ptr + tl.minimum(rows, R - 1)  # absent rows: the next expert's, never stored
        w_scale_ptrs = w_scale_ptr + (expert * (H // 128) + pid_n * BLOCK_N // 128) * K_BLOCKS

        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, K_BLOCKS, num_stages=NUM_STAGES):
            c = c_desc.load([first_row, k * 128])
            w = w_desc.load([expert * H + pid_n * BLOCK_N, k * 128])
            c_scale = tl.load(c_scale_ptrs + k * R)
            acc += tl.dot(c, w.T) * (c_scale * tl.load(w_scale_ptrs + k))[:, None]
        tl.store(out_ptr + rows[:, None].to(tl.int64) * H + offs_n[None, :], acc, mask=mask_m[:, None])
