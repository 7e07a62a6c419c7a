"""GEMM2 for many rows on Hopper: warp-specialised (see hopper_pipeline.py), bfloat16 result."""

# Without `from __future__ import annotations`: an aggregate's annotations must be types.

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import _aggregate as aggregate

from .hopper_pipeline import (BFLOAT16_LAYOUT, BLOCK_K, FLOAT8_LAYOUT, SCALE_LAYOUT, consume, new_announcements,
                              new_ring, produce, unpack_unit, weight_descriptors)
from .launch import launch, pdl_wait
from .tuning import Config
from .workspace import Workspace

# Registers a thread. 12 warps start with 168; then the consumers (4 + 4 warps) take 232, the two loaders (1 + 1,
# counted as 4) what is left.
MAX_REGISTERS = 168
CONSUMER_REGISTERS = gl.constexpr(232)
LOADER_REGISTERS = gl.constexpr(40)


def hopper_gemm2(weights: torch.Tensor, weights_scale: torch.Tensor, workspace: Workspace, config: Config) -> None:
    """Compute the workspace's bfloat16 expert_rows; arguments as of `gemm2.gemm2`, tiles of 128 rows that start at
    multiples of 64."""
    _, hidden_size, intermediate_size = weights.shape
    ws = workspace.pointers
    x_desc = TensorDescriptor.from_tensor(workspace.intermediate, [64, 128], FLOAT8_LAYOUT)
    x_scale_desc = TensorDescriptor.from_tensor(workspace.intermediate_scale, [1, 128], SCALE_LAYOUT)
    out_desc = TensorDescriptor.from_tensor(workspace.expert_rows, [64, 128], BFLOAT16_LAYOUT)
    num_units = workspace.max_tiles * (hidden_size // 256)
    launch(
        weights.device, _gemm2_kernel, (min(num_units, config.num_sms), 1),
        x_desc, x_scale_desc, *weight_descriptors(weights, weights_scale), ws.first_tiles, ws.tile_experts,
        ws.tile_starts, ws.tile_ends, ws.num_tiles, ws.gemm2_ticket, out_desc,
        H=hidden_size, I=intermediate_size, STAGES=config.gemm2.num_stages, BATCH=config.gemm2.unroll,
        num_warps=config.gemm2.num_warps, max_registers=MAX_REGISTERS,
    )


@gluon.jit
def _gemm2_kernel(
    x_desc,  # [R, I] float8_e4m3fn, block [64, 128]
    x_scale_desc,  # [I / 128, R] float32, block [1, 128]
    w_desc,  # [E * H, I] float8_e4m3fn, block [128, 128]
    w_scale_desc,  # [E * H / 128, I / 128] float32, block [1, at least I / 128]
    first_tiles_ptr: "*i32",  # [E + 1]
    tile_experts_ptr: "*i32",  # [tiles]
    tile_starts_ptr: "*i32",  # [tiles]
    tile_ends_ptr: "*i32",  # [tiles]
    num_tiles_ptr: "*i32",  # [1]
    ticket_ptr: "*i32",  # [1], zero at the start
    out_desc,  # out [R, H] bfloat16, block [64, 128]
    H: gl.constexpr,
    I: gl.constexpr,
    STAGES: gl.constexpr,
    BATCH: gl.constexpr,
    PDL: gl.constexpr,
):
    """Grid (programs,), one an SM. A unit's columns are 256 of the result's."""
    ring = new_ring(w_desc, w_scale_desc, STAGES, I // BLOCK_K)
    announcements = new_announcements()
    staging = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 128], out_desc.layout)
    sink = ExpertRows(staging, out_desc)
    pdl_wait(PDL)
    gl.warp_specialize([
        (consume, (gl.constexpr(0), ring, announcements, sink)),
        (consume, (gl.constexpr(1), ring, announcements, sink)),
        (_load_rows, (ring, announcements, x_desc, x_scale_desc)),
        (produce, (ring, announcements, w_desc, w_scale_desc, first_tiles_ptr, tile_experts_ptr, tile_starts_ptr,
                   tile_ends_ptr, num_tiles_ptr, ticket_ptr, gl.constexpr(BATCH), gl.constexpr(H), gl.constexpr(256),
                   gl.constexpr(128))),
    ], worker_num_warps=[4, 1, 1], worker_num_regs=[CONSUMER_REGISTERS, LOADER_REGISTERS, LOADER_REGISTERS])


@gluon.jit
def _load_rows(ring, announcements, x_desc, x_scale_desc):
    """The row loader: one warp. Of a unit with at most 64 rows it loads only those that the first consumer reads."""
    HALF_BYTES: gl.constexpr = 64 * BLOCK_K
    SCALE_BYTES: gl.constexpr = 4 * 128
    step = 0
    turn = 0
    unit = announcements.get(turn)
    while unit >= 0:
        first_row, _, num_rows = unpack_unit(unit)
        both = num_rows > 64
        for k in range(ring.K_BLOCKS):
            stage = ring.wait_empty(step + k)
            ready = ring.ready.index(stage)
            x = ring.x.index(stage)
            mbarrier.expect(ready, 2 * HALF_BYTES + SCALE_BYTES, pred=both)
            mbarrier.expect(ready, HALF_BYTES + SCALE_BYTES, pred=num_rows <= 64)
            tma.async_copy_global_to_shared(x_desc, [first_row, k * BLOCK_K], ready, x.slice(0, 64, dim=0))
            tma.async_copy_global_to_shared(x_desc, [first_row + 64, k * BLOCK_K], ready, x.slice(64, 64, dim=0),
                                            pred=both)
            tma.async_copy_global_to_shared(x_scale_desc, [k, first_row], ready, ring.x_scale.index(stage))
        step += ring.K_BLOCKS
        turn += 1
        unit = announcements.get(turn)


@aggregate
class ExpertRows:
    """The down projection's rows in bfloat16."""

    staging: gl.shared_memory_descriptor  # [2, 64, 128] bfloat16, one a consumer
    out_desc: tma.tensor_descriptor

    @gluon.constexpr_function
    def __init__(self, staging, out_desc):
        self.staging = staging
        self.out_desc = out_desc

    @gluon.jit
    def store(self, PART: gl.constexpr, first_row, column, left, right):
        staging = self.staging.index(PART)
        staging.store(left.to(gl.bfloat16))
        fence_async_shared()
        tma.async_copy_shared_to_global(self.out_desc, [first_row, column * 256], staging)
        tma.store_wait(0)  # shared memory has room for one half
        gl.thread_barrier()
        staging.store(right.to(gl.bfloat16))
        fence_async_shared()
        tma.async_copy_shared_to_global(self.out_desc, [first_row, column * 256 + 128], staging)
