"""Tile shapes by regime: a table of frozen rows for each GPU generation and a pure selector."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Literal

import torch


@dataclass(frozen=True)
class Tile:
    """How one GEMM kernel cuts its work."""

    block_n: int  # output columns of a program (GEMM1: channels, each an up and a gate row of W)
    num_warps: int
    num_stages: int
    unroll: int = 1  # K blocks of 128 in an iteration (streaming), or requested from memory together (Hopper)


@dataclass(frozen=True)
class Fusion:
    """What the fused GEMMs need beyond the two tiles."""

    max_registers: int  # a thread: decides how many programs share a multiprocessor
    prefetch: int  # 128-byte lines of a weight row to bring into L2 while routing runs


@dataclass(frozen=True)
class Config:
    """Everything that depends on the number of tokens and on the GPU."""

    max_tokens: int  # the regime's last T
    block_m: int  # rows of a tile, in both GEMMs
    kernels: Literal["streaming", "tiled", "hopper"]  # weights on the M side; rows; rows, warp-specialised
    gemm1: Tile
    gemm2: Tile
    fusion: Fusion | None = None  # both GEMMs in one grid (streaming only)
    num_sms: int = 1

    @property
    def streaming(self) -> bool:
        return self.kernels == "streaming"

    @property
    def row_alignment(self) -> int:
        """Each expert's first row is a multiple of this: the Hopper kernels store whole boxes of 64 rows."""
        return 64 if self.kernels == "hopper" else 1

    @property
    def intermediate_dtype(self) -> torch.dtype:
        return torch.float16 if self.streaming else torch.float8_e4m3fn

    @property
    def expert_rows_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.kernels == "hopper" else torch.float32


# Keyed by the major compute capability. Hopper's rows were measured on an H100 80GB HBM3, 2026-11-22 and -23:
# - Fused GEMMs gain 3.5% on average at T <= 80, the prefetch 2 us of it, at 128 registers, so that four programs share
#   a multiprocessor: three are 2% slower at T >= 16, but 8% faster at T = 15 (9 experts); 96 registers are 10% slower.
# - The Hopper kernels pass the fused ones between T = 192 (518 and 511 us) and 320 (519, 534). Streaming kernels of 32
#   rows in two launches, which also keep float16 and `strict`, take 541 us there, 603 at T = 901 (529).
# - The weights of two K blocks requested together take GEMM1 from 347 to 329 us at T = 901, 449 to 388 at 4096, 635 to
#   629 at 14107: DRAM answers neighbours faster. GEMM2 181 to 174, 204 to 197, but 301 to 307: so not above T = 6144.
# - In plain Triton (tiled) GEMM1 takes 777 us at T = 14107, on Hopper's kernels 629; GEMM2 522 and 301.
TABLES = {
    9: (
        Config(256, 16, "streaming", Tile(32, 4, 2, unroll=2), Tile(64, 4, 2, unroll=2), Fusion(128, 4)),
        Config(6144, 128, "hopper", Tile(128, 4, 4, unroll=2), Tile(256, 4, 4, unroll=2)),
        Config(65_536, 128, "hopper", Tile(128, 4, 4, unroll=2), Tile(256, 4, 4)),
    ),
    # Not measured: what plain Triton does best on Hopper, with a tiled GEMM1 that does not spill there. The interpreter
    # runs these.
    10: (
        Config(256, 16, "streaming", Tile(32, 4, 2, unroll=2), Tile(64, 4, 2, unroll=2), Fusion(128, 4)),
        Config(1024, 32, "streaming", Tile(32, 4, 2, unroll=2), Tile(128, 4, 3)),
        Config(65_536, 64, "tiled", Tile(128, 8, 4), Tile(128, 4, 6)),
    ),
}


@functools.lru_cache(maxsize=1024)  # dataclasses.replace takes microseconds
def select_config(num_tokens: int, num_sms: int, capability: tuple[int, int]) -> Config:
    """Return the first row of the GPU's table that reaches num_tokens, with the GPU's SM count filled in."""
    row = next(row for row in TABLES[capability[0]] if num_tokens <= row.max_tokens)
    return replace(row, num_sms=num_sms)
