"""Tile shapes by regime: a table of frozen rows and a pure selector."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """How one GEMM kernel cuts its work."""

    block_n: int  # output columns of a program (GEMM1: channels, each an up and a gate row of W)
    num_warps: int
    num_stages: int
    unroll: int = 1  # K blocks of 128 in an iteration (streaming kernels)
    programs_per_sm: int = 1  # resident programs (tiled kernels, which are persistent)


@dataclass(frozen=True)
class Regime:
    """Everything that depends on the number of tokens."""

    max_tokens: int  # the regime's last T
    block_m: int  # rows of a tile, in both GEMMs
    streaming: bool  # weights on the M side and a float16 intermediate; otherwise rows, and float8
    gemm1: Tile
    gemm2: Tile

    @property
    def intermediate_dtype(self) -> torch.dtype:
        return torch.float16 if self.streaming else torch.float8_e4m3fn


REGIMES = (
    Regime(128, 16, True, Tile(32, 4, 3, unroll=2), Tile(64, 4, 3, unroll=2)),
    Regime(512, 32, True, Tile(64, 4, 3), Tile(128, 4, 3)),
    Regime(2048, 64, True, Tile(64, 8, 4), Tile(128, 8, 4)),
    Regime(65_536, 128, False, Tile(128, 8, 4), Tile(128, 8, 4)),
)


def select_regime(num_tokens: int) -> Regime:
    """Return the first regime that reaches num_tokens."""
    return next(regime for regime in REGIMES if num_tokens <= regime.max_tokens)
