"""Scratch memory of one call: what the stages hand to each other on the device.

One allocation, made before the first launch so that the launches follow each other closely, and as large as T tokens
can need, since only the device knows how many rows there are. Nothing in it outlives the call; what is kept from call
to call is the layout, which depends on T and the config alone.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from .contract import INTERPRETED, NUM_LOCAL_EXPERTS, SCALE_BLOCK, TOP_K
from .tuning import Config

_WORD = 4  # bytes; fields start at multiples of 4 words, which is the alignment that the kernels are compiled for


class Field(NamedTuple):
    """One array of the workspace."""

    offset: int  # bytes from the start
    shape: tuple[int, ...]
    dtype: torch.dtype


class Pointers(NamedTuple):
    """Where the workspace's arrays lie, as kernels take them: addresses; in the interpreter tensors.

    R bounds the rows, M the tiles; E = 32 local experts, G = I / 128 channel groups.
    """

    # Routing's lists, int32 but for the weights
    topk_ids: int  # [T, 8]: a token's experts, best first, as local expert; -1 where it is not local
    topk_weights: int  # [T, 8] float32: their scaled weights
    expert_masks: int  # [T]: bit e is set where the token has a row with local expert e
    token_rows: int  # [T, 8]: their rows; -1 where the expert is not local
    row_tokens: int  # [R]: row -> token
    block_counts: int  # [token blocks, E]: rows of each local expert among a block's tokens
    first_tiles: int  # [E + 1]: local expert -> its first tile; the last is the number of tiles
    tile_experts: int  # [M]: tile -> local expert
    tile_starts: int  # [M]: first row of the tile
    tile_ends: int  # [M]: one past its last row
    num_tiles: int  # [1]: tiles in use
    # Counters of the GEMMs, int32, which routing sets to zero
    ticket: int  # [1]: work handed out by the fused GEMMs or by GEMM1
    gemm2_ticket: int  # [1]: by GEMM2
    arrivals: int  # [M, G]: GEMM1's programs done with each of a tile's channel groups (streaming only)
    stored: int  # [M]: channel groups of the tile whose intermediate is complete (streaming only)
    # The rows' values
    parts: int  # [R, I] float32: GEMM1's result before scaling (streaming only)
    intermediate: int  # [R, I] float16 or float8_e4m3fn: intermediate * scale is silu(gate) * up
    intermediate_scale: int  # [G, R] float32
    expert_rows: int  # [R, H] float32 or bfloat16: GEMM2's result


class Layout(NamedTuple):
    """What a workspace holds where."""

    fields: dict[str, Field]  # in Pointers' order
    offsets: tuple[int, ...]  # the fields', bytes
    num_words: int
    num_counters: int  # int32s from `ticket` to `parts`


class Workspace:
    """One call's scratch memory. Each field of `Pointers` is an attribute too: a view, made when it is asked for."""

    def __init__(self, memory: torch.Tensor, layout: Layout) -> None:
        self.memory = memory
        self.layout = layout
        if INTERPRETED:
            self.pointers = Pointers(*(getattr(self, name) for name in layout.fields))
        else:
            base = memory.data_ptr()
            self.pointers = Pointers(*[base + offset for offset in layout.offsets])

    def __getattr__(self, name: str) -> torch.Tensor:
        try:
            offset, shape, dtype = self.layout.fields[name]
        except KeyError:
            raise AttributeError(f"Workspace has no field {name!r}") from None
        first = offset // _WORD
        words = self.memory[first : first + math.prod(shape) * dtype.itemsize // _WORD]
        return words.view(dtype).view(shape)

    @property
    def max_rows(self) -> int:
        return self.layout.fields["row_tokens"].shape[0]

    @property
    def max_tiles(self) -> int:
        return self.layout.fields["tile_experts"].shape[0]


def max_tiles(num_tokens: int, block_m: int) -> int:
    """Tiles that T tokens can need at most, a multiple of 4: no tile is empty, and an expert wastes less than one."""
    rows = num_tokens * TOP_K
    return min(rows, -(-(rows // block_m + NUM_LOCAL_EXPERTS) // 4) * 4)


def max_rows(num_tokens: int, alignment: int) -> int:
    """Rows that T tokens can need at most, with each expert's first one aligned."""
    rows = num_tokens * TOP_K
    return (rows + min(rows, NUM_LOCAL_EXPERTS) * (alignment - 1)) // alignment * alignment


def token_block(num_tokens: int) -> int:
    """Tokens of a block in routing's lists."""
    return 64 if num_tokens <= 64 else 128


@functools.lru_cache(maxsize=1024)  # 23 us to make
def plan(num_tokens: int, hidden_size: int, intermediate_size: int, config: Config) -> Layout:
    """Lay out the workspace of 1 <= T tokens."""
    rows = max_rows(num_tokens, config.row_alignment)
    tiles = max_tiles(num_tokens, config.block_m)
    groups = intermediate_size // SCALE_BLOCK
    counted_tiles = tiles if config.streaming else 0
    int32, float32 = torch.int32, torch.float32
    arrays = Pointers(
        topk_ids=((num_tokens, TOP_K), int32),
        topk_weights=((num_tokens, TOP_K), float32),
        expert_masks=((num_tokens,), int32),
        token_rows=((num_tokens, TOP_K), int32),
        row_tokens=((rows,), int32),
        block_counts=((-(-num_tokens // token_block(num_tokens)), NUM_LOCAL_EXPERTS), int32),
        first_tiles=((NUM_LOCAL_EXPERTS + 1,), int32),
        tile_experts=((tiles,), int32),
        tile_starts=((tiles,), int32),
        tile_ends=((tiles,), int32),
        num_tiles=((1,), int32),
        ticket=((1,), int32),
        gemm2_ticket=((1,), int32),
        arrivals=((counted_tiles, groups), int32),
        stored=((counted_tiles,), int32),
        parts=((rows if config.streaming else 0, intermediate_size), float32),
        intermediate=((rows, intermediate_size), config.intermediate_dtype),
        intermediate_scale=((groups, rows), float32),
        expert_rows=((rows, hidden_size), config.expert_rows_dtype),
    )
    fields, word = {}, 0
    for name, (shape, dtype) in arrays._asdict().items():
        fields[name] = Field(word * _WORD, shape, dtype)
        word += -(-math.prod(shape) * dtype.itemsize // (4 * _WORD)) * 4
    num_counters = (fields["parts"].offset - fields["ticket"].offset) // _WORD
    return Layout(fields, tuple(field.offset for field in fields.values()), word, num_counters)


def allocate(num_tokens: int, hidden_size: int, intermediate_size: int, config: Config,
             device: torch.device) -> Workspace:
    """Allocate for 1 <= T tokens."""
    layout = plan(num_tokens, hidden_size, intermediate_size, config)
    return Workspace(torch.empty(layout.num_words, dtype=torch.float32, device=device), layout)
