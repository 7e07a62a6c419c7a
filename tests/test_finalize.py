"""Finalize against plain torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from solution.triton.contract import SCALE_BLOCK
from solution.triton.finalize import finalize
from solution.triton.tuning import Config
from tests import cases, reference

pytestmark = pytest.mark.usefixtures("poisoned_empty")

# Parts of blocks of columns and whole ones, up to the real size.
HIDDEN_SIZES = [128, 1152, 7168]


# The formats of expert_rows, and rows side by side or with gaps.
CONFIGS = [cases.STREAMING, replace(cases.STREAMING, kernels="hopper")]


def finalized(ids: torch.Tensor, hidden_size: int, device: torch.device, config: Config = CONFIGS[0]):
    """finalize's output for the rows of local ids, with its inputs; unused rows hold NaN."""
    generator = torch.Generator().manual_seed(11)
    weights = torch.rand(ids.shape, generator=generator)
    ws = cases.workspace(ids, weights, hidden_size, SCALE_BLOCK, config, device)
    rows = reference.used_rows(ws)
    ws.expert_rows.fill_(float("nan"))
    ws.expert_rows[rows] = (torch.randn(len(rows), hidden_size, generator=generator) * 1e5).to(ws.expert_rows)
    output = torch.empty(len(ids), hidden_size, dtype=torch.bfloat16, device=device)
    finalize(ws, output, config)
    return output, ws


@pytest.mark.parametrize("hidden_size", HIDDEN_SIZES)
@pytest.mark.parametrize("name", cases.DISTRIBUTIONS)
@pytest.mark.parametrize("config", CONFIGS, ids=cases.config_id)
def test_weighted_sum(device, config, name, hidden_size):
    """Every element is the sum of exactly the token's rows, whatever was in output and in unused rows."""
    output, ws = finalized(cases.distributions(16)[name], hidden_size, device, config)
    if config.kernels == "hopper":  # whose GEMM1 has written the zeros
        remote = (ws.token_rows < 0).all(1)
        assert output[remote].isnan().all(), "written twice"
        output[remote] = 0
    reference.assert_within(output, reference.finalize(ws.expert_rows, ws.topk_weights, ws.token_rows))


def test_token_without_a_local_expert_is_zero(device):
    """Exact zeros, though its weights are not zero and row 0 is another token's."""
    output, ws = finalized(cases.assigned({2: 1}, 4), HIDDEN_SIZES[0], device)
    local = (ws.token_rows >= 0).any(1)
    assert local.sum() == 1
    assert (output[~local] == 0).all() and (output[local] != 0).any()


def test_sum_is_in_the_order_of_the_slots(device):
    """Large terms that cancel leave the same last bits every time only in a fixed order."""
    ids = torch.arange(8)[None, :]
    ws = cases.workspace(ids, torch.ones(1, 8), 128, SCALE_BLOCK, cases.STREAMING, device)
    terms = torch.tensor([2.0**24, 1.0, 1.0, -(2.0**24), 1.0, 2.0**25, 4.0, -(2.0**25)])
    output = torch.empty(1, 128, dtype=torch.bfloat16, device=device)
    ws.expert_rows.copy_(terms[:, None].repeat(1, 128))
    finalize(ws, output, cases.STREAMING)
    expected = torch.zeros(())
    for term in terms:
        expected = expected + term
    assert (output.float().cpu() == expected).all()


def test_same_bits_every_time(device):
    """Two calls agree to the bit."""
    ids = cases.distributions(16)["many experts"]
    first, second = (finalized(ids, HIDDEN_SIZES[2], device)[0] for _ in range(2))
    assert torch.equal(cases.signature(first), cases.signature(second))
