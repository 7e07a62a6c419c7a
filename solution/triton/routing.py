"""Routing: DeepSeek-V3's group-limited top-8, and on the device the lists that the GEMMs walk.

A *row* is a pair (token, local expert). Rows are sorted by local expert, then by token, with a gap before an expert
where its first row has to be aligned; a *tile* is up to BLOCK_M neighbouring rows of one expert. Both are built without
a host synchronisation: one launch routes the tokens, one counts the rows of each block of tokens by expert, one turns
the counts into positions. A single block counts for itself.
"""

import torch
import triton
import triton.language as tl

from .contract import NUM_EXPERTS, NUM_GROUPS, NUM_LOCAL_EXPERTS, TOP_GROUPS, TOP_K
from .launch import launch, pdl_trigger, pdl_wait
from .tuning import Config
from .workspace import Workspace, token_block


def route(
    routing_logits: torch.Tensor,
    routing_bias: torch.Tensor,
    local_expert_offset: int,
    routed_scaling_factor: float,
    workspace: Workspace,
    config: Config,
) -> None:
    """Select each token's experts and fill the workspace's lists.

    Args:
        routing_logits: [T, 256] float32, T >= 1.
        routing_bias: [256] bfloat16, added for the selection only.
        local_expert_offset: global id of local expert 0; any integer.
        routed_scaling_factor: multiplies the normalised weights.
        workspace: allocated for T tokens and this config.
        config: how many rows a tile has, and where an expert's first one may be.
    """
    num_tokens = routing_logits.shape[0]
    device = routing_logits.device
    ws = workspace.pointers
    block_t = token_block(num_tokens)
    num_blocks = -(-num_tokens // block_t)
    # Offsets beyond these leave no expert local either, and they fit the kernel's int32.
    offset = max(-NUM_LOCAL_EXPERTS, min(int(local_expert_offset), NUM_EXPERTS))
    launch(
        device, _top_k_kernel, (num_tokens, 1),
        routing_logits, routing_bias, ws.topk_ids, ws.topk_weights, ws.expert_masks, offset,
        float(routed_scaling_factor),
        E=NUM_LOCAL_EXPERTS, TOP_K=TOP_K, EXPERTS=NUM_EXPERTS, GROUPS=NUM_GROUPS, TOP_GROUPS=TOP_GROUPS, num_warps=1,
    )
    if num_blocks > 1:
        launch(device, _count_kernel, (num_blocks, 1), ws.expert_masks, ws.block_counts, num_tokens,
               E=NUM_LOCAL_EXPERTS, BLOCK_T=block_t, num_warps=8)
    launch(
        device, _lists_kernel, (num_blocks, 1),
        ws.topk_ids, ws.expert_masks, ws.block_counts, ws.token_rows, ws.row_tokens, ws.first_tiles, ws.tile_experts,
        ws.tile_starts, ws.tile_ends, ws.num_tiles, ws.ticket, workspace.layout.num_counters, num_tokens, num_blocks,
        E=NUM_LOCAL_EXPERTS, TOP_K=TOP_K, BLOCK_M=config.block_m, ALIGNMENT=config.row_alignment, BLOCK_T=block_t,
        ONE_BLOCK=num_blocks == 1, num_warps=8,
    )


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _sortable(x):
    """int32 that orders as the float32 x does; NaN above all. INT32_MIN stays free for 'not a candidate'."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit(do_not_specialize=["local_expert_offset"])
def _top_k_kernel(
    logits_ptr: "*fp32",  # [T, EXPERTS]
    bias_ptr: "*bf16",  # [EXPERTS]
    topk_ids_ptr: "*i32",  # out [T, TOP_K]: local expert, -1 where it is not local
    topk_weights_ptr: "*fp32",  # out [T, TOP_K]
    expert_masks_ptr: "*i32",  # out [T]: bit e is set where the token has a row with local expert e
    local_expert_offset,
    routed_scaling_factor,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (T,), one warp each: reductions across warps took 48 us longer at T = 14107 (H100, 2026-11-22)."""
    pdl_trigger(PDL)
    pdl_wait(PDL)
    token = tl.program_id(0)
    offs_e = tl.arange(0, EXPERTS)
    logits_ptr += token * EXPERTS
    biased = _sigmoid(tl.load(logits_ptr + offs_e)) + tl.load(bias_ptr + offs_e).to(tl.float32)

    # A group's score is the sum of its two best experts; keep the groups that fewer than TOP_GROUPS groups beat.
    grouped = tl.reshape(biased, (GROUPS, EXPERTS // GROUPS))
    best, best_at = tl.max(grouped, axis=1, return_indices=True)
    is_best = tl.arange(0, EXPERTS // GROUPS)[None, :] == best_at[:, None]
    score = best + tl.max(tl.where(is_best, float("-inf"), grouped), axis=1)
    offs_g = tl.arange(0, GROUPS)
    rival = tl.reshape(score, (1, GROUPS))
    score = tl.reshape(score, (GROUPS, 1))
    beats = (rival > score) | ((rival == score) & (offs_g[None, :] < offs_g[:, None]))
    keep = tl.sum(beats.to(tl.int32), axis=1) < TOP_GROUPS
    # As one bit a group, so that the keys stay spread over all lanes, 8 in each and not 32: together with the two
    # reductions below and the masks, routing takes 31 us at T = 14107 instead of 60 (H100, 2026-11-22).
    kept = tl.sum(tl.where(keep, 1 << offs_g, 0), axis=0)
    keys = tl.where((kept >> (offs_e // (EXPERTS // GROUPS))) & 1 > 0, _sortable(biased), -(2**31))

    offs_k = tl.arange(0, TOP_K)
    ids = tl.zeros((TOP_K,), tl.int32)
    for k in tl.static_range(TOP_K):
        # The lowest index among equals, by two integer reductions, each of them one instruction of the warp.
        winner = tl.min(tl.where(keys == tl.max(keys, axis=0), offs_e, EXPERTS), axis=0)
        ids = tl.where(offs_k == k, winner, ids)
        keys = tl.where(offs_e == winner, -(2**31), keys)

    weights = _sigmoid(tl.load(logits_ptr + ids))
    weights = weights / (tl.sum(weights, axis=0) + 1e-20) * routed_scaling_factor
    local = ids - local_expert_offset
    local = tl.where((local >= 0) & (local < E), local, -1)
    tl.store(topk_ids_ptr + token * TOP_K + offs_k, local)
    tl.store(topk_weights_ptr + token * TOP_K + offs_k, weights)
    tl.store(expert_masks_ptr + token, tl.sum(tl.where(local >= 0, 1 << local, 0), axis=0))


@triton.jit
def _is_row(expert_masks_ptr, offs_t, T, E: tl.constexpr):
    """[BLOCK_T, E] int32: 1 where the token has a row with the local expert."""
    masks = tl.load(expert_masks_ptr + offs_t, mask=offs_t < T, other=0)
    return (masks[:, None] >> tl.arange(0, E)[None, :]) & 1


@triton.jit(do_not_specialize=["T"])
def _count_kernel(
    expert_masks_ptr: "*i32",  # [T]
    block_counts_ptr: "*i32",  # out [blocks, E]: rows of each local expert among the block's tokens
    T,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (cdiv(T, BLOCK_T),)."""
    pdl_trigger(PDL)
    pdl_wait(PDL)
    pid = tl.program_id(0)
    is_row = _is_row(expert_masks_ptr, pid * BLOCK_T + tl.arange(0, BLOCK_T), T, E)
    tl.store(block_counts_ptr + pid * E + tl.arange(0, E), tl.sum(is_row, axis=0))


@triton.jit(do_not_specialize=["num_counters", "T", "num_blocks"])
def _lists_kernel(
    topk_ids_ptr: "*i32",  # [T, TOP_K]
    expert_masks_ptr: "*i32",  # [T]
    block_counts_ptr: "*i32",  # [num_blocks, E]
    token_rows_ptr: "*i32",  # out [T, TOP_K]
    row_tokens_ptr: "*i32",  # out [R]
    first_tiles_ptr: "*i32",  # out [E + 1]
    tile_experts_ptr: "*i32",  # out [tiles]
    tile_starts_ptr: "*i32",  # out [tiles]
    tile_ends_ptr: "*i32",  # out [tiles]
    num_tiles_ptr: "*i32",  # out [1]
    counters_ptr: "*i32",  # out [num_counters], zeros: what the GEMMs count with
    num_counters,
    T,
    num_blocks,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (num_blocks,): a program places BLOCK_T tokens' rows and writes every num_blocks-th tile of an expert."""
    pdl_trigger(PDL)
    pdl_wait(PDL)
    pid = tl.program_id(0)
    offs_e = tl.arange(0, E)
    offs_t = pid * BLOCK_T + tl.arange(0, BLOCK_T)
    is_row = _is_row(expert_masks_ptr, offs_t, T, E)
    total = tl.zeros((E,), tl.int32)
    before = tl.zeros((E,), tl.int32)  # rows of each expert in earlier blocks
    if ONE_BLOCK:
        total = tl.sum(is_row, axis=0)
    else:
        BLOCKS: tl.constexpr = 64
        for first in range(0, num_blocks, BLOCKS):
            offs_b = first + tl.arange(0, BLOCKS)
            counts = tl.load(block_counts_ptr + offs_b[:, None] * E + offs_e[None, :],
                             mask=(offs_b < num_blocks)[:, None], other=0)
            total += tl.sum(counts, axis=0)
            before += tl.sum(tl.where((offs_b < pid)[:, None], counts, 0), axis=0)
    aligned = (total + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    starts = tl.cumsum(aligned, axis=0) - aligned

    rows = (starts + before)[None, :] + tl.cumsum(is_row, axis=0) - is_row
    tl.store(row_tokens_ptr + rows, tl.broadcast_to(offs_t[:, None], (BLOCK_T, E)), mask=is_row > 0)
    offs_slot = offs_t[:, None] * TOP_K + tl.arange(0, TOP_K)[None, :]
    local = tl.load(topk_ids_ptr + offs_slot, mask=(offs_t < T)[:, None], other=-1)
    token_rows = tl.where(local >= 0, tl.gather(rows, tl.maximum(local, 0), axis=1), -1)
    tl.store(token_rows_ptr + offs_slot, token_rows, mask=(offs_t < T)[:, None])

    tiles = (total + BLOCK_M - 1) // BLOCK_M
    first_tiles = tl.cumsum(tiles, axis=0) - tiles
    num_tiles = tl.sum(tiles, axis=0)
    for i in range(pid, tl.max(tiles, axis=0), num_blocks):
        tile_start = starts + i * BLOCK_M
        tl.store(tile_experts_ptr + first_tiles + i, offs_e, mask=i < tiles)
        tl.store(tile_starts_ptr + first_tiles + i, tile_start, mask=i < tiles)
        tl.store(tile_ends_ptr + first_tiles + i, tl.minimum(tile_start + BLOCK_M, starts + total), mask=i < tiles)
    if pid == 0:
        tl.store(num_tiles_ptr, num_tiles)
        tl.store(first_tiles_ptr + offs_e, first_tiles)
        tl.store(first_tiles_ptr + E, num_tiles)
    CHUNK: tl.constexpr = 512
    for first in range(pid * CHUNK, num_counters, num_blocks * CHUNK):
        offs = first + tl.arange(0, CHUNK)
        tl.store(counters_ptr + offs, tl.zeros((CHUNK,), tl.int32), mask=offs < num_counters)
