"""The tables of tile shapes and their selector, for every GPU generation, on any machine."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from solution.triton import contract, tuning
from solution.triton.tuning import TABLES, select_config

ROWS = [(major, row) for major, table in TABLES.items() for row in table]
IDS = [f"{major}-T{row.max_tokens}" for major, row in ROWS]


def test_a_table_for_every_supported_gpu():
    """What the contract accepts the selector must know."""
    assert TABLES.keys() == contract.SUPPORTED_GPUS.keys()


@pytest.mark.parametrize("major", TABLES)
def test_rows_ascend_to_the_largest_number_of_tokens(major):
    """The selector takes the first row that reaches T, and there is one for every T."""
    limits = [row.max_tokens for row in TABLES[major]]
    assert limits == sorted(set(limits)) and limits[0] >= 1 and limits[-1] == contract.MAX_TOKENS


@pytest.mark.parametrize("major", TABLES)
def test_selector_at_every_boundary(major):
    """A row serves its last T and the T after the row before it; nothing but the SM count is filled in."""
    first = 1
    for row in TABLES[major]:
        for num_tokens in (first, row.max_tokens):
            for minor in (0, 3):
                assert select_config(num_tokens, 77, (major, minor)) == replace(row, num_sms=77)
        first = row.max_tokens + 1


@pytest.mark.parametrize("major, row", ROWS, ids=IDS)
def test_tiles_divide_the_geometry(major, row):
    """The kernels have no remainder loops over columns or K blocks, and no tile straddles two weight scales."""
    for tile, columns in ((row.gemm1, contract.INTERMEDIATE_SIZE), (row.gemm2, contract.HIDDEN_SIZE)):
        assert columns % tile.block_n == 0
        assert contract.SCALE_BLOCK % tile.block_n == 0 or row.kernels == "hopper"
        assert tile.num_warps in (4, 8) and tile.num_stages >= 1
    assert contract.HIDDEN_SIZE // contract.SCALE_BLOCK % row.gemm1.unroll == 0
    assert contract.INTERMEDIATE_SIZE // contract.SCALE_BLOCK % row.gemm2.unroll == 0
    assert row.block_m.bit_count() == 1 and row.block_m >= 16


@pytest.mark.parametrize("major, row", ROWS, ids=IDS)
def test_intermediate_format(major, row):
    """float16 in the streaming regime, where it passes `strict`; float8 where the tensor cores bound GEMM2."""
    assert row.intermediate_dtype == (torch.float16 if row.streaming else torch.float8_e4m3fn)


def test_streaming_comes_first():
    """Decode is to pass `strict`."""
    for major in TABLES:
        assert all(select_config(num_tokens, 1, (major, 0)).streaming for num_tokens in (1, 80, 256))


def test_rows_are_frozen():
    """A row changed at run time would change every later call."""
    with pytest.raises(FrozenInstanceError):
        tuning.TABLES[9][0].block_m = 32
    with pytest.raises(FrozenInstanceError):
        tuning.TABLES[9][0].gemm1.block_n = 32
