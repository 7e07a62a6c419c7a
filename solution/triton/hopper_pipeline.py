"""What Hopper's two warp-specialised GEMMs share: the roles of a program's warps, and how they pass work on.

A *unit* is up to 128 rows of one expert times 256 rows of its weights. One program an SM works through units in four
roles. The *producer*, one warp, draws units from a counter, announces them, and copies each K block's weights into a
stage of a ring. The *row loader* copies the rows and their scales into the same stage. Two *consumers* of four warps
own 64 rows each: while one promotes a product into its float32 accumulators, the tensor cores work for the other. In
plain Triton products and promotions take turns.

Barriers, and the arrivals that complete a phase:

    ready[stage]      2   producer and row loader: their copies into the stage have landed
    empty[stage]      2   consumers: each has read it
    announced[slot]   1   producer: the slot holds the next unit
    seen[slot]        3   row loader and consumers: each has read it

Each role counts K blocks (`step`) and units (`turn`) for itself, all in the same order, so a stage and the phase to
wait for follow from the count. Who waits for something to be filled starts with phase 0; who waits for room starts with
phase 1, which a fresh barrier lets pass. Nobody waits for another program. Within one, the loaders wait for consumers
that are at most a ring behind, and everybody for units that the producer announces without waiting for more than that.
"""

# Without `from __future__ import annotations`: an aggregate's annotations must be types.

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import _aggregate as aggregate

BLOCK_K = gl.constexpr(128)  # K of a stage, and of a scale
LINEAR = gl.constexpr(gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0]))
PRODUCT = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32]))
PRODUCT_ROWS = gl.constexpr(gl.SliceLayout(1, PRODUCT.value))

# Of tensor descriptors, on the host: blocks of 64 rows, 128 weight rows, one row of scales.
FLOAT8_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
BFLOAT16_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
SCALE_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)


def weight_descriptors(weights: torch.Tensor, scale: torch.Tensor) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Of weights [E, N, K] float8_e4m3fn, 128 rows x 128; of scale [E, N / 128, K / 128] float32, a whole row.

    The row is padded: a block in shared memory has a power of two of elements and a multiple of 128 bytes.
    """
    k_blocks = scale.shape[2]
    return (
        TensorDescriptor.from_tensor(weights.view(-1, weights.shape[2]), [128, 128], FLOAT8_LAYOUT),
        TensorDescriptor.from_tensor(scale.view(-1, k_blocks), [1, max(32, 1 << (k_blocks - 1).bit_length())],
                                     SCALE_LAYOUT),
    )


@gluon.jit
def pack_unit(first_row, column, num_rows):
    """An int32 that is not negative: first_row / 64 in 18 bits, column in 5, num_rows (1..128) in 8."""
    return ((first_row // 64) << 13) | (column << 8) | num_rows


@gluon.jit
def unpack_unit(unit):
    return (unit >> 13) * 64, (unit >> 8) & 31, unit & 255


@aggregate
class Announcements:
    """Units on their way from the producer to the other roles, through two slots in turn; -1 ends."""

    slots: gl.shared_memory_descriptor  # [2, 1] int32
    announced: gl.shared_memory_descriptor
    seen: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, slots, announced, seen):
        self.slots = slots
        self.announced = announced
        self.seen = seen

    @gluon.jit
    def put(self, turn, unit):
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        mbarrier.wait(self.seen.index(turn % 2), (turn // 2 & 1) ^ 1)
        self.slots.index(turn % 2).store(gl.full([1], 0, gl.int32, layout) + unit)
        gl.thread_barrier()
        mbarrier.arrive(self.announced.index(turn % 2), count=1)

    @gluon.jit
    def get(self, turn):
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        mbarrier.wait(self.announced.index(turn % 2), turn // 2 & 1)
        unit = gl.max(self.slots.index(turn % 2).load(layout), 0)
        gl.thread_barrier()
        mbarrier.arrive(self.seen.index(turn % 2), count=1)
        return unit


@gluon.jit
def new_announcements():
    slots = gl.allocate_shared_memory(gl.int32, [2, 1], LINEAR)
    announced = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    seen = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(2):
        mbarrier.init(announced.index(slot), count=1)
        mbarrier.init(seen.index(slot), count=3)
    return Announcements(slots, announced, seen)


@aggregate
class Ring:
    """Stages of shared memory from the loaders to the consumers."""

    x: gl.shared_memory_descriptor  # [stages, 128, 128] float8_e4m3fn: rows
    w: gl.shared_memory_descriptor  # [stages, 256, 128] float8_e4m3fn: weight rows, in two waves of 128
    x_scale: gl.shared_memory_descriptor  # [stages, 1, 128] float32: the rows' scales
    w_scale: gl.shared_memory_descriptor  # [4, 1, width] float32: both waves' scales of a unit, of two units in turn
    ready: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    STAGES: gl.constexpr
    K_BLOCKS: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, x, w, x_scale, w_scale, ready, empty, STAGES, K_BLOCKS):
        self.x = x
        self.w = w
        self.x_scale = x_scale
        self.w_scale = w_scale
        self.ready = ready
        self.empty = empty
        self.STAGES = gl.constexpr(STAGES)
        self.K_BLOCKS = gl.constexpr(K_BLOCKS)

    @gluon.jit
    def wait_empty(self, step):
        """Wait until the stage of this step may be written, and return it."""
        stage = step % self.STAGES
        mbarrier.wait(self.empty.index(stage), (step // self.STAGES & 1) ^ 1)
        return stage

    @gluon.jit
    def wait_ready(self, step):
        """Wait until the stage of this step is filled, and return it."""
        stage = step % self.STAGES
        mbarrier.wait(self.ready.index(stage), step // self.STAGES & 1)
        return stage

    @gluon.jit
    def multiply(self, PART: gl.constexpr, step, turn):
        """The unit's products with rows 64 * PART.., promoted: one [64, 128] float32 for each wave of weight rows."""
        WIDTH: gl.constexpr = self.w_scale.shape[2]
        w_scale = self.w_scale._reinterpret(gl.float32, [4 * WIDTH, 1], LINEAR)
        first_scale = turn % 2 * (2 * WIDTH)
        acc0 = gl.zeros([64, 128], gl.float32, PRODUCT)
        acc1 = gl.zeros([64, 128], gl.float32, PRODUCT)
        product = gl.zeros([64, 128], gl.float32, PRODUCT)  # one for both waves: registers do not suffice for two
        for k in range(self.K_BLOCKS):
            stage = self.wait_ready(step + k)
            x = self.x.index(stage).slice(PART * 64, 64, dim=0)
            w = self.w.index(stage)
            product = warpgroup_mma(x, w.slice(0, 128, dim=0).permute((1, 0)), product, use_acc=False, is_async=True)
            x_scale = self.x_scale.index(stage)._reinterpret(gl.float32, [2, 64], LINEAR).index(PART).load(PRODUCT_ROWS)
            scale0 = x_scale * w_scale.index(first_scale + k).load(PRODUCT_ROWS)
            scale1 = x_scale * w_scale.index(first_scale + WIDTH + k).load(PRODUCT_ROWS)
            product = warpgroup_mma_wait(0, deps=(product,))
            acc0 += product * gl.expand_dims(scale0, 1)
            # Nothing is in flight. This keeps the promotion before the next product; LLVM would sink it below, copy the
            # product, and spill.
            acc0 = warpgroup_mma_wait(0, deps=(acc0,))
            product = warpgroup_mma(x, w.slice(128, 128, dim=0).permute((1, 0)), product, use_acc=False, is_async=True)
            product = warpgroup_mma_wait(0, deps=(product,))
            mbarrier.arrive(self.empty.index(stage), count=1)
            acc1 += product * gl.expand_dims(scale1, 1)
        return acc0, acc1

    @gluon.jit
    def skip(self, step):
        """Give back a unit's stages unread."""
        for k in range(self.K_BLOCKS):
            mbarrier.arrive(self.empty.index(self.wait_ready(step + k)), count=1)


@gluon.jit
def new_ring(w_desc, w_scale_desc, STAGES: gl.constexpr, K_BLOCKS: gl.constexpr):
    gl.static_assert(STAGES <= K_BLOCKS, "a ring that reaches into the unit after next overwrites w_scale in use")
    x = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 128, BLOCK_K], w_desc.layout)
    w = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 256, BLOCK_K], w_desc.layout)
    x_scale = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 128], w_scale_desc.layout)
    w_scale = gl.allocate_shared_memory(gl.float32, [4, 1, w_scale_desc.block_shape[1]], w_scale_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=2)
        mbarrier.init(empty.index(stage), count=2)
    return Ring(x, w, x_scale, w_scale, ready, empty, STAGES, K_BLOCKS)


@gluon.jit
def produce(ring, announcements, w_desc, w_scale_desc, first_tiles_ptr, tile_experts_ptr, tile_starts_ptr,
            tile_ends_ptr, num_tiles_ptr, ticket_ptr, BATCH: gl.constexpr, EXPERT_ROWS: gl.constexpr,
            COLUMN_ROWS: gl.constexpr, WAVE_ROWS: gl.constexpr):
    """The producer. Column c of expert e starts at weight row e * EXPERT_ROWS + c * COLUMN_ROWS, its second wave
    WAVE_ROWS further.

    Up to GROUP tiles of one expert go through a column before the next column, so that they read its weights at the
    same time and all but one find them in L2. Against tile by tile GEMM1 takes 5 to 16% less time; 2, 8 and 16 are
    within 1% of 4; groups that ignore the experts' borders gain nothing (H100, T = 4096 to 14107, 2026-11-23).

    The weights of BATCH K blocks are requested together, row by row neighbours in memory: see `tuning`.
    """
    gl.static_assert(BATCH <= ring.STAGES and ring.K_BLOCKS % BATCH == 0, "whole batches, each within the ring")
    COLUMNS: gl.constexpr = EXPERT_ROWS // 256
    GROUP: gl.constexpr = 4
    W_BYTES: gl.constexpr = 256 * BLOCK_K
    W_SCALE_BYTES: gl.constexpr = 2 * 4 * ring.w_scale.shape[2]
    num_units = gl.load(num_tiles_ptr) * COLUMNS
    index = gl.program_id(0)
    step = 0
    turn = 0
    while index < num_units:
        # An expert's units have the numbers that they would have tile by tile, so this finds the expert.
        expert = gl.load(tile_experts_ptr + index // COLUMNS)
        first_tile = gl.load(first_tiles_ptr + expert)
        last_tile = gl.load(first_tiles_ptr + expert + 1)
        first_tile += (index - first_tile * COLUMNS) // (GROUP * COLUMNS) * GROUP
        group = gl.minimum(last_tile - first_tile, GROUP)
        tile = first_tile + (index - first_tile * COLUMNS) % group
        column = (index - first_tile * COLUMNS) // group
        index = gl.num_programs(0) + gl.atomic_add(ticket_ptr, 1, sem="relaxed")  # arrives while this unit is loaded
        first_row = gl.load(tile_starts_ptr + tile)
        announcements.put(turn, pack_unit(first_row, column, gl.load(tile_ends_ptr + tile) - first_row))
        row0 = expert * EXPERT_ROWS + column * COLUMN_ROWS
        slot = turn % 2 * 2
        for k in range(0, ring.K_BLOCKS, BATCH):
            for i in gl.static_range(BATCH):
                ready = ring.ready.index(ring.wait_empty(step + k + i))
                mbarrier.expect(ready, W_BYTES + W_SCALE_BYTES, pred=k + i == 0)
                mbarrier.expect(ready, W_BYTES, pred=k + i != 0)
            for wave in gl.static_range(2):
                row = row0 + wave * WAVE_ROWS
                for i in gl.static_range(BATCH):
                    stage = (step + k + i) % ring.STAGES
                    w = ring.w.index(stage).slice(wave * 128, 128, dim=0)
                    tma.async_copy_global_to_shared(w_desc, [row, (k + i) * BLOCK_K], ring.ready.index(stage), w)
                tma.async_copy_global_to_shared(w_scale_desc, [row // 128, 0], ring.ready.index(step % ring.STAGES),
                                                ring.w_scale.index(slot + wave), pred=k == 0)
        step += ring.K_BLOCKS
        turn += 1
    announcements.put(turn, -1)


@gluon.jit
def consume(PART: gl.constexpr, ring, announcements, sink):
    """A consumer: multiply rows 64 * PART.. of every unit that has them and give the result to sink.store."""
    step = 0
    turn = 0
    unit = announcements.get(turn)
    while unit >= 0:
        first_row, column, num_rows = unpack_unit(unit)
        if num_rows > PART * 64:
            acc0, acc1 = ring.multiply(PART, step, turn)
            tma.store_wait(0)  # this consumer's previous result may still be on its way out of its buffer
            gl.thread_barrier()
            sink.store(PART, first_row + PART * 64, column, acc0, acc1)
        else:
            ring.skip(step)
        step += ring.K_BLOCKS
        turn += 1
        unit = announcements.get(turn)
    tma.store_wait(0)
