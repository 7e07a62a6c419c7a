"""GEMM1 and SwiGLU for many rows on Hopper: warp-specialised (see hopper_pipeline.py), float8 result.

Memory is not busy while the tensor cores are, so the row loader also writes the output rows of the tokens that have no
local expert: zeros, half of the output and more.
"""

# Without `from __future__ import annotations`: an aggregate's annotations must be types.

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import _aggregate as aggregate

from .hopper_pipeline import (BLOCK_K, FLOAT8_LAYOUT, LINEAR, PRODUCT_ROWS, consume, new_announcements, new_ring,
                              produce, unpack_unit, weight_descriptors)
from .launch import launch, pdl_wait
from .tuning import Config
from .workspace import Workspace

# Registers a thread. 16 warps start with 128; then the consumers (4 + 4 warps) take 216, the row loader (4) and the
# producer (1, but counted as 4) what is left.
MAX_REGISTERS = 128
CONSUMER_REGISTERS = gl.constexpr(216)
ROW_LOADER_REGISTERS = gl.constexpr(56)
PRODUCER_REGISTERS = gl.constexpr(24)


def hopper_gemm1(
    hidden_states: torch.Tensor,
    hidden_states_scale: torch.Tensor,
    weights: torch.Tensor,
    weights_scale: torch.Tensor,
    workspace: Workspace,
    config: Config,
    output: torch.Tensor,
) -> None:
    """Compute the workspace's float8 intermediate, and write output's rows [T, H] bfloat16 of tokens without a row.

    Arguments as of `gemm1_swiglu.gemm1_swiglu`; tiles of 128 rows, each expert's first row at a multiple of 64.
    """
    num_tokens, hidden_size = hidden_states.shape
    intermediate_size = weights.shape[1] // 2
    ws = workspace.pointers
    out_desc = TensorDescriptor.from_tensor(workspace.intermediate, [64, 128], FLOAT8_LAYOUT)
    num_units = workspace.max_tiles * (intermediate_size // 128)
    launch(
        hidden_states.device, _gemm1_kernel, (min(num_units, config.num_sms), 1),
        hidden_states, hidden_states_scale, *weight_descriptors(weights, weights_scale), ws.row_tokens, ws.first_tiles,
        ws.tile_experts, ws.tile_starts, ws.tile_ends, ws.num_tiles, ws.ticket, out_desc, ws.intermediate_scale,
        ws.expert_masks, output, num_tokens, workspace.max_rows,
        H=hidden_size, I=intermediate_size, STAGES=config.gemm1.num_stages, BATCH=config.gemm1.unroll,
        num_warps=config.gemm1.num_warps, max_registers=MAX_REGISTERS,
    )


@gluon.jit(do_not_specialize=["T", "R"])
def _gemm1_kernel(
    x_ptr: "*fp8e4nv",  # [T, H]
    x_scale_ptr: "*fp32",  # [H / 128, T]
    w_desc,  # [E * 2 I, H] float8_e4m3fn, block [128, 128]
    w_scale_desc,  # [E * 2 I / 128, H / 128] float32, block [1, at least H / 128]
    row_tokens_ptr: "*i32",  # [R]
    first_tiles_ptr: "*i32",  # [E + 1]
    tile_experts_ptr: "*i32",  # [tiles]
    tile_starts_ptr: "*i32",  # [tiles]
    tile_ends_ptr: "*i32",  # [tiles]
    num_tiles_ptr: "*i32",  # [1]
    ticket_ptr: "*i32",  # [1], zero at the start
    out_desc,  # out [R, I] float8_e4m3fn, block [64, 128]
    out_scale_ptr: "*fp32",  # out [I / 128, R]
    expert_masks_ptr: "*i32",  # [T]
    zeros_ptr: "*bf16",  # out [T, H]: the rows of tokens whose mask is 0
    T,
    R,
    H: gl.constexpr,
    I: gl.constexpr,
    STAGES: gl.constexpr,
    BATCH: gl.constexpr,
    PDL: gl.constexpr,
):
    """Grid (programs,), one an SM. A unit's columns are 128 channels: their up rows, then their gate rows."""
    ring = new_ring(w_desc, w_scale_desc, STAGES, H // BLOCK_K)
    announcements = new_announcements()
    staging = gl.allocate_shared_memory(gl.float8e4nv, [2, 64, 128], out_desc.layout)
    sink = Intermediate(staging, out_desc, out_scale_ptr, R)
    pdl_wait(PDL)
    gl.warp_specialize([
        (consume, (gl.constexpr(0), ring, announcements, sink)),
        (consume, (gl.constexpr(1), ring, announcements, sink)),
        (_gather_rows, (ring, announcements, x_ptr, x_scale_ptr, row_tokens_ptr, expert_masks_ptr, zeros_ptr, T,
                        gl.constexpr(H))),
        (produce, (ring, announcements, w_desc, w_scale_desc, first_tiles_ptr, tile_experts_ptr, tile_starts_ptr,
                   tile_ends_ptr, num_tiles_ptr, ticket_ptr, gl.constexpr(BATCH), gl.constexpr(2 * I),
                   gl.constexpr(128), gl.constexpr(I))),
    ], worker_num_warps=[4, 4, 1], worker_num_regs=[CONSUMER_REGISTERS, ROW_LOADER_REGISTERS, PRODUCER_REGISTERS])


@gluon.jit
def _gather_rows(ring, announcements, x_ptr, x_scale_ptr, row_tokens_ptr, expert_masks_ptr, zeros_ptr, T,
                 H: gl.constexpr):
    """The row loader: four warps, since cp.async is issued by the thread and not by the copy engine.

    A stage is reported LAG steps after its copies were issued, so that a wait for them finds them complete. The fence
    lets the tensor cores see what cp.async wrote; in the consumers it would cost a barrier every K block. Every fourth
    step looks at one token, in turn with the other programs, and writes its zeros if it has no row.
    """
    LAG: gl.constexpr = 2
    gl.static_assert(LAG < ring.STAGES, "the row loader would wait for stages that it has not reported")
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    offs_m = gl.arange(0, 128, layout=gl.SliceLayout(1, layout))
    offs_s = gl.arange(0, 128, layout=flat)
    offs_k = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, layout))
    step = 0
    turn = 0
    token = gl.program_id(0)
    expert_mask = gl.load(expert_masks_ptr + token, mask=token < T, other=1)
    unit = announcements.get(turn)
    while unit >= 0:
        first_row, _, num_rows = unpack_unit(unit)
        mask_m = offs_m < num_rows
        mask_s = offs_s < num_rows
        tokens = gl.load(row_tokens_ptr + first_row + offs_m, mask=mask_m, other=0)
        x_ptrs = x_ptr + gl.expand_dims(tokens * H, 1) + gl.expand_dims(offs_k, 0)
        x_scale_ptrs = x_scale_ptr + gl.load(row_tokens_ptr + first_row + offs_s, mask=mask_s, other=0)
        for k in range(ring.K_BLOCKS):
            stage = ring.wait_empty(step)
            x_scale = ring.x_scale.index(stage)._reinterpret(gl.float32, [128], LINEAR)
            async_copy.async_copy_global_to_shared(ring.x.index(stage), x_ptrs + k * BLOCK_K,
                                                   mask=gl.expand_dims(mask_m, 1))
            async_copy.async_copy_global_to_shared(x_scale, x_scale_ptrs + k * T, mask=mask_s)
            async_copy.commit_group()
            async_copy.wait_group(LAG)
            fence_async_shared()
            gl.thread_barrier()
            mbarrier.arrive(ring.ready.index((step + ring.STAGES - LAG) % ring.STAGES), count=1, pred=step >= LAG)
            step += 1
            if step % 4 == 0:
                token, expert_mask = _zero_and_advance(token, expert_mask, expert_masks_ptr, zeros_ptr, T, H)
        turn += 1
        unit = announcements.get(turn)
    async_copy.wait_group(0)
    fence_async_shared()
    gl.thread_barrier()
    for i in gl.static_range(LAG):
        mbarrier.arrive(ring.ready.index((step + ring.STAGES - LAG + i) % ring.STAGES), count=1, pred=step > 0)
    while token < T:
        token, expert_mask = _zero_and_advance(token, expert_mask, expert_masks_ptr, zeros_ptr, T, H)


@gluon.jit
def _zero_and_advance(token, expert_mask, expert_masks_ptr, zeros_ptr, T, H: gl.constexpr):
    """Write the token's row of zeros if its mask is 0; return the program's next token and its mask, already on its
    way when it is asked for."""
    CHUNK: gl.constexpr = 1024
    gl.static_assert(H % CHUNK == 0, "whole chunks")
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])
    if expert_mask == 0:
        for first in gl.static_range(0, H, CHUNK):
            zeros = gl.full([CHUNK], 0, gl.bfloat16, layout)
            gl.store(zeros_ptr + token * H + first + gl.arange(0, CHUNK, layout=layout), zeros)
    token += gl.num_programs(0)
    return token, gl.load(expert_masks_ptr + token, mask=token < T, other=1)


@aggregate
class Intermediate:
    """silu(gate) * up in float8, with one float32 scale per row and 128 channels, as `intermediate` defines it."""

    staging: gl.shared_memory_descriptor  # [2, 64, 128] float8_e4m3fn, one a consumer
    out_desc: tma.tensor_descriptor
    out_scale_ptr: gl.tensor
    R: gl.tensor

    @gluon.constexpr_function
    def __init__(self, staging, out_desc, out_scale_ptr, R):
        self.staging = staging
        self.out_desc = out_desc
        self.out_scale_ptr = out_scale_ptr
        self.R = R

    @gluon.jit
    def store(self, PART: gl.constexpr, first_row, column, up, gate):
        out = _swiglu(up, gate)
        largest = gl.maximum(gl.max(gl.abs(out), 1), 1e-30)
        values = (out * gl.expand_dims(448.0 * _reciprocal(largest), 1)).to(gl.float8e4nv)
        rows = first_row + gl.arange(0, 64, layout=PRODUCT_ROWS)
        gl.store(self.out_scale_ptr + column * self.R + rows, largest * (1.0 / 448.0))
        staging = self.staging.index(PART)
        staging.store(values)
        fence_async_shared()
        tma.async_copy_shared_to_global(self.out_desc, [first_row, column * 128], staging)


@gluon.jit
def _swiglu(up, gate):
    """silu(gate) * up by the hardware's exp2 and reciprocal, within 2^-21 relative; division and exp spill here."""
    return gl.inline_asm_elementwise(
        """{
        .reg .f32 t;
        mul.ftz.f32 t, $2, 0fBFB8AA3B;  // -log2(e)
        ex2.approx.ftz.f32 t, t;
        add.ftz.f32 t, t, 0f3F800000;
        rcp.approx.ftz.f32 t, t;
        mul.ftz.f32 t, t, $2;
        mul.ftz.f32 $0, t, $1;
        }""",
        "=f,f,f", [up, gate], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _reciprocal(x):
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)
