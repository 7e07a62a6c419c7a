"""Both grouped GEMMs, streaming and tiled, and the intermediate's formats, at a reduced geometry."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from solution.triton.contract import INTERPRETED
from solution.triton.fused_gemms import fused_gemms
from solution.triton.gemm1_swiglu import gemm1_swiglu
from solution.triton.gemm2 import gemm2
from solution.triton.intermediate import store_channel_group, to_float8
from solution.triton.tuning import Config
from solution.triton.workspace import Workspace
from tests import cases, reference
from tests.cases import CONFIGS, DISTRIBUTIONS, H, I, config_id

pytestmark = pytest.mark.usefixtures("poisoned_empty")
every_config = pytest.mark.parametrize("config", CONFIGS, ids=config_id)


@pytest.fixture(scope="module")
def weights(device):
    return cases.weights(H, I, device)


def workspace_of(ids: torch.Tensor, config: Config, device: torch.device) -> Workspace:
    """Lists with the tiles last to first: run in that order, a tile that writes past its end spoils the next one's."""
    ws = cases.workspace(ids, torch.ones(ids.shape), H, I, config, device)
    num_tiles = int(ws.num_tiles)
    if config.kernels != "hopper":  # which takes them in any order, and whose tiles have room behind them
        for tiles in (ws.tile_experts, ws.tile_starts, ws.tile_ends):
            tiles[:num_tiles] = tiles[:num_tiles].flip(0)
    return ws


def experts_of(ids: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The local expert of every row."""
    return ids[ids >= 0].sort().values.to(device)


def run_gemm1(
    ids: torch.Tensor, config: Config, weights: dict[str, torch.Tensor], activations: dict[str, torch.Tensor]
) -> Workspace:
    """The workspace after a call on fresh lists."""
    ws = workspace_of(ids, config, weights["gemm1_weights"].device)
    output = torch.empty(len(ids), H, dtype=torch.bfloat16, device=weights["gemm1_weights"].device)
    gemm1_swiglu(
        **activations, weights=weights["gemm1_weights"], weights_scale=weights["gemm1_weights_scale"], workspace=ws,
        config=config, output=output,
    )
    remote = (ids < 0).all(1).to(output.device)
    assert (output[remote] == 0).all() if config.kernels == "hopper" else output[remote].isnan().all()
    assert output[~remote].isnan().all()
    return ws


def run_gemm2(ids: torch.Tensor, config: Config, weights: dict[str, torch.Tensor]) -> Workspace:
    """The workspace after a call on fresh lists and a random intermediate."""
    ws = workspace_of(ids, config, weights["gemm2_weights"].device)
    cases.fill_intermediate(ws)
    gemm2(weights["gemm2_weights"], weights["gemm2_weights_scale"], ws, config)
    return ws


@every_config
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_gemm1(device, weights, config, name):
    """Every row is silu(gate) * up of its own token, expert and scales, at every fill of a tile."""
    ids = cases.distributions(config.block_m)[name]
    activations = cases.activations(len(ids), H, device)
    ws = run_gemm1(ids, config, weights, activations)
    experts, rows = experts_of(ids, device), reference.used_rows(ws)
    expected = reference.gemm1_swiglu(
        **activations, weights=weights["gemm1_weights"], weights_scale=weights["gemm1_weights_scale"],
        row_tokens=ws.row_tokens[rows], experts=experts, dtype=config.intermediate_dtype,
    )
    assert ws.intermediate.dtype == config.intermediate_dtype
    actual = reference.dequantised(ws.intermediate[rows], ws.intermediate_scale.T[rows], 1)
    reference.assert_within(actual, expected)


@every_config
def test_gemm1_of_zeros(device, weights, config):
    """Rows of zeros have no largest value to scale by: they stay zero, with a finite scale."""
    ids = cases.assigned({0: 2, 9: 1}, 2)
    activations = cases.activations(len(ids), H, device)
    activations["hidden_states"].view(torch.uint8).zero_()
    ws = run_gemm1(ids, config, weights, activations)
    rows = reference.used_rows(ws)
    assert len(rows) == 3
    assert (ws.intermediate[rows].float() == 0).all() and ws.intermediate_scale[:, rows].isfinite().all()


@every_config
def test_gemm1_same_bits_every_time(device, weights, config):
    """Two calls on the same lists agree to the bit, whichever program arrives last at a channel group."""
    ids = cases.distributions(config.block_m)["tile boundaries"]
    activations = cases.activations(len(ids), H, device)
    first, second = (run_gemm1(ids, config, weights, activations) for _ in range(2))
    rows = reference.used_rows(first)
    values = [cases.signature(ws.intermediate[rows]) for ws in (first, second)]
    scales = [cases.signature(ws.intermediate_scale[:, rows]) for ws in (first, second)]
    assert torch.equal(*values) and torch.equal(*scales)


@every_config
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_gemm2(device, weights, config, name):
    """Every row is the down projection by its own expert, and unused rows' NaN stay where they are."""
    ids = cases.distributions(config.block_m)[name]
    ws = run_gemm2(ids, config, weights)
    experts, rows = experts_of(ids, device), reference.used_rows(ws)
    expected = reference.gemm2(
        ws.intermediate[rows], ws.intermediate_scale[:, rows], weights["gemm2_weights"],
        weights["gemm2_weights_scale"], experts, config.expert_rows_dtype,
    )
    reference.assert_within(ws.expert_rows[rows], expected)


@every_config
def test_gemm2_same_bits_every_time(weights, config):
    """Two calls agree to the bit."""
    ids = cases.distributions(config.block_m)["tile boundaries"]
    first, second = (run_gemm2(ids, config, weights) for _ in range(2))
    rows = [cases.signature(ws.expert_rows[reference.used_rows(ws)]) for ws in (first, second)]
    assert torch.equal(*rows)


@pytest.mark.parametrize("config", [config for config in CONFIGS if config.fusion], ids=config_id)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_fused_gemms(device, weights, config, name):
    """One grid for both gives the bits of one after the other, and hands out every piece of work once."""
    ids = cases.distributions(config.block_m)[name]
    activations = cases.activations(len(ids), H, device)
    separate = run_gemm1(ids, config, weights, activations)
    gemm2(weights["gemm2_weights"], weights["gemm2_weights_scale"], separate, config)
    fused = workspace_of(ids, config, device)
    fused_gemms(**activations, **weights, workspace=fused, config=config)
    num_rows = int((ids >= 0).sum())
    rows = [cases.signature(ws.expert_rows[:num_rows]) for ws in (fused, separate)]
    assert torch.equal(*rows)
    assert int(fused.ticket) == int(fused.num_tiles) * (I // config.gemm1.block_n + H // config.gemm2.block_n)


@triton.jit
def _store_group_kernel(x_ptr, values_ptr, scale_ptr, R, I: tl.constexpr, BLOCK_M: tl.constexpr,
                        EMULATE: tl.constexpr):
    """Grid (I / 128,): stores x [R, I] float32 by channel groups."""
    rows = tl.arange(0, BLOCK_M)
    mask = rows < R
    x = tl.load(x_ptr + rows[:, None] * I + (tl.program_id(0) * 128 + tl.arange(0, 128))[None, :], mask=mask[:, None])
    store_channel_group(values_ptr, scale_ptr, x, rows, mask, tl.program_id(0), R, I, EMULATE)


@pytest.mark.parametrize("dtype", reference.LARGEST)
def test_channel_groups(device, dtype):
    """Each row's group is scaled by its own largest magnitude, from 1e-20 to 1e20, and absent rows are not written."""
    generator = torch.Generator().manual_seed(12)
    num_rows, size = 9, 384
    x = torch.randn(num_rows, size, generator=generator)
    x *= torch.logspace(-20, 20, num_rows)[:, None] * torch.tensor([1.0, 1e-6, 100.0]).repeat_interleave(128)
    values = torch.full((num_rows + 3, size), 3.0).to(device, dtype)
    scale = torch.full((3, num_rows), float("nan"), device=device)
    _store_group_kernel[(3,)](x.to(device), values, scale, num_rows, size, 16, INTERPRETED)

    assert (values[num_rows:].float() == 3).all()
    largest = values[:num_rows].float().abs().view(num_rows, 3, 128).amax(2)
    assert (largest == reference.LARGEST[dtype]).all()
    relative, absolute = reference.HALF_ULP[dtype]
    group_scale = x.double().abs().view(num_rows, 3, 128).amax(2).repeat_interleave(128, 1) / reference.LARGEST[dtype]
    bound = (relative + 2**-21) * x.double().abs() + absolute * group_scale
    actual = reference.dequantised(values[:num_rows].cpu(), scale.T.cpu(), 1)
    reference.assert_within(actual, reference.Expected(x.double(), bound))


@triton.jit
def _to_float8_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr, EMULATE: tl.constexpr):
    """Grid (elements / BLOCK,)."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, to_float8(tl.load(x_ptr + offs), EMULATE))


@pytest.mark.parametrize("emulate", [True] if INTERPRETED else [True, False])
def test_to_float8(device, emulate):
    """Every float32 whose upper half is any within +-448, on a tie, beside it and far from it, rounds as in torch."""
    upper = np.arange(2**16, dtype=np.uint32) << 16
    bits = np.concatenate([upper | lower for lower in (0, 1, 0x8000, 0xFFFF)])
    x = torch.from_numpy(bits.view(np.float32))
    x = x[(x.abs() <= 448) | x.isnan()]
    block = 1024
    padded = torch.cat([x, torch.zeros(-len(x) % block)]).to(device)
    out = torch.empty(len(padded), dtype=torch.float8_e4m3fn, device=device)
    _to_float8_kernel[(len(padded) // block,)](padded, out, block, emulate)
    actual, expected = out.cpu()[: len(x)], x.to(torch.float8_e4m3fn)
    assert torch.equal(actual.float().isnan(), x.isnan())
    wrong = (cases.signature(actual) != cases.signature(expected)) & ~x.isnan()
    assert not wrong.any(), f"{int(wrong.sum())} wrong, first {x[wrong][:5].tolist()} as {actual[wrong][:5].tolist()}"
    assert len(x) > 2**17
