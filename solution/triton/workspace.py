"""Scratch memory of one call: what the stages hand to each other on the device.

It is allocated before the first launch, so that the launches follow each other closely, and it is as large as T tokens
can need, since only the device knows how many rows there are. Nothing in it outlives the call.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .contract import NUM_LOCAL_EXPERTS, SCALE_BLOCK, TOP_K
from .tuning import Config


class Workspace(NamedTuple):
    """R bounds the rows, M the tiles; E = 32 local experts, G = I / 128 channel groups."""

    # Routing's lists, int32 but for the weights
    topk_ids: torch.Tensor  # [T, 8]: a token's experts, best first, as local expert; -1 where it is not local
    topk_weights: torch.Tensor  # [T, 8] float32: their scaled weights
    token_rows: torch.Tensor  # [T, 8]: their rows; -1 where the expert is not local
    row_tokens: torch.Tensor  # [R]: row -> token
    block_counts: torch.Tensor  # [token blocks, E]: rows of each local expert among a block's tokens
    first_tiles: torch.Tensor  # [E + 1]: local expert -> its first tile; the last is the number of tiles
    tile_experts: torch.Tensor  # [M]: tile -> local expert
    tile_starts: torch.Tensor  # [M]: first row of the tile
    tile_ends: torch.Tensor  # [M]: one past its last row
    num_tiles: torch.Tensor  # [1]: tiles in use
    arrivals: torch.Tensor  # [M, G + 1]: GEMM1's programs done with each of a tile's channel groups; groups stored
    tickets: torch.Tensor  # [2]: work handed out by the fused GEMMs, or by GEMM1 and by GEMM2
    # The rows' values
    parts: torch.Tensor  # [R, I] float32: GEMM1's result before scaling (streaming only)
    intermediate: torch.Tensor  # [R, I] float16 or float8_e4m3fn: intermediate * scale is silu(gate) * up
    intermediate_scale: torch.Tensor  # [G, R] float32
    expert_rows: torch.Tensor  # [R, H] float32 or bfloat16: GEMM2's result

    @property
    def max_rows(self) -> int:
        return self.row_tokens.shape[0]

    @property
    def max_tiles(self) -> int:
        return self.tile_experts.shape[0]


def max_tiles(num_tokens: int, block_m: int) -> int:
    """Tiles that T tokens can need at most, a multiple of 4: no tile is empty, and an expert wastes less than one."""
    max_rows = num_tokens * TOP_K
    return min(max_rows, -(-(max_rows // block_m + NUM_LOCAL_EXPERTS) // 4) * 4)


def max_rows(num_tokens: int, alignment: int) -> int:
    """Rows that T tokens can need at most, with each expert's first one aligned."""
    rows = num_tokens * TOP_K
    return (rows + min(rows, NUM_LOCAL_EXPERTS) * (alignment - 1)) // alignment * alignment


def token_block(num_tokens: int) -> int:
    """Tokens of a block in routing's lists."""
    return 64 if num_tokens <= 64 else 128


def allocate(num_tokens: int, hidden_size: int, intermediate_size: int, config: Config,
             device: torch.device) -> Workspace:
    """Allocate for 1 <= T tokens. Every buffer starts at a multiple of 16 bytes: all sizes are multiples of 4 words."""
    slots = num_tokens * TOP_K
    rows = max_rows(num_tokens, config.row_alignment)
    tiles = max_tiles(num_tokens, config.block_m)
    blocks = -(-num_tokens // token_block(num_tokens))
    groups = intermediate_size // SCALE_BLOCK
    lists = torch.empty(3 * slots + rows + blocks * NUM_LOCAL_EXPERTS + (groups + 4) * tiles + 44, dtype=torch.int32,
                        device=device)
    (topk_ids, topk_weights, token_rows, row_tokens, block_counts, first_tiles, tile_experts, tile_starts, tile_ends,
     arrivals, num_tiles, tickets) = lists.split(
        [slots, slots, slots, rows, blocks * NUM_LOCAL_EXPERTS, 36, tiles, tiles, tiles, (groups + 1) * tiles, 4, 4])
    dtype, expert_rows_dtype = config.intermediate_dtype, config.expert_rows_dtype
    sizes = [rows * intermediate_size if config.streaming else 0, rows * intermediate_size * dtype.itemsize // 4,
             groups * rows,
             rows * hidden_size * expert_rows_dtype.itemsize // 4]
    parts, intermediate, intermediate_scale, expert_rows = torch.empty(
        sum(sizes), dtype=torch.float32, device=device).split(sizes)
    return Workspace(
        topk_ids=topk_ids.view(num_tokens, TOP_K),
        topk_weights=topk_weights.view(torch.float32).view(num_tokens, TOP_K),
        token_rows=token_rows.view(num_tokens, TOP_K),
        row_tokens=row_tokens,
        block_counts=block_counts.view(blocks, NUM_LOCAL_EXPERTS),
        first_tiles=first_tiles[: NUM_LOCAL_EXPERTS + 1],
        tile_experts=tile_experts,
        tile_starts=tile_starts,
        tile_ends=tile_ends,
        num_tiles=num_tiles[:1],
        arrivals=arrivals.view(tiles, groups + 1),
        tickets=tickets[:2],
        parts=parts.view(-1, intermediate_size),
        intermediate=intermediate.view(dtype).view(rows, intermediate_size),
        intermediate_scale=intermediate_scale.view(groups, rows),
        expert_rows=expert_rows.view(expert_rows_dtype).view(rows, hidden_size),
    )
