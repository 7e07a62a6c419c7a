"""run(), the whole operation: at a reduced geometry in every regime, and at the real one."""

from __future__ import annotations

import inspect
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from scripts.accuracy import TIERS, matched_ratios
from scripts.pack import load_definition
from solution.triton import contract, main, tuning
from solution.triton.contract import INTERPRETED
from solution.triton.main import run
from tests import cases, reference
from tests.cases import H, I

pytestmark = pytest.mark.usefixtures("poisoned_empty")
needs_gpu = pytest.mark.skipif(INTERPRETED, reason="needs a GPU")

FACTOR = 2.5
MAJOR = 10 if INTERPRETED else torch.cuda.get_device_capability()[0]
# The first and last T of every regime; in the interpreter not the ones that take minutes.
BOUNDARIES = [T for row in tuning.TABLES[MAJOR] for T in (row.max_tokens, row.max_tokens + 1)][:-1]
TOKENS = [1, 2, *(T for T in BOUNDARIES if T <= (300 if INTERPRETED else contract.MAX_TOKENS))]


@pytest.fixture
def reduced(monkeypatch):
    """run() at the reduced geometry: sizes come from the tensors, and the contract's table says which are right."""
    monkeypatch.setattr(contract, "TENSORS", cases.reduced_tensors())
    monkeypatch.setattr(contract, "_expected", contract._expected.__wrapped__)  # the cache knows the real table


@pytest.fixture(scope="module")
def reduced_weights(device):
    return cases.weights(H, I, device)


def with_config(monkeypatch: pytest.MonkeyPatch, config: tuning.Config) -> None:
    """run() in this regime, whatever T."""
    monkeypatch.setattr(main, "select_config", lambda num_tokens, num_sms, capability: replace(config, num_sms=num_sms))


def arguments(num_tokens: int, weights: dict[str, torch.Tensor], offset: int = 32) -> dict[str, object]:
    """run's arguments but output, in its order."""
    hidden_size, device = weights["gemm1_weights"].shape[2], weights["gemm1_weights"].device
    return {
        **cases.router(num_tokens, device),
        **cases.activations(num_tokens, hidden_size, device),
        **weights,
        "local_expert_offset": offset,
        "routed_scaling_factor": FACTOR,
    }


def call(inputs: dict[str, object]) -> torch.Tensor:
    """run's result, in an output that held NaN."""
    output = torch.empty(inputs["hidden_states"].shape, dtype=torch.bfloat16, device=inputs["hidden_states"].device)
    assert output.isnan().all()
    run(**inputs, output=output)
    return output


def check(output: torch.Tensor, expected: torch.Tensor, streaming: bool) -> None:
    """Each token's error against its float64 result, both as Euclidean norms.

    Rounding errors of the intermediate have either sign, so through GEMM2 they stay, relative to the norm, what they
    are in it: at most 2^-4 in float8, 2^-11 in float16. The last rounding adds 2^-8 (2^-7 where it cuts off), the
    products on a GPU less than that.
    """
    assert output.isfinite().all()
    has_rows = (expected != 0).any(1)
    assert (output[~has_rows] == 0).all()
    error = (output.double() - expected).norm(dim=1)[has_rows] / expected.norm(dim=1)[has_rows]
    bound = 2**-6 if streaming else 2**-4
    assert (error <= bound).all(), f"token {int(error.argmax())}: relative error {float(error.max()):.2g} > {bound:.2g}"


def streaming_at(num_tokens: int) -> bool:
    return tuning.select_config(num_tokens, 1, (MAJOR, 0)).streaming


def test_signature_is_the_definition_s():
    """flashinfer-bench passes the definition's inputs and then its output, by position."""
    definition = load_definition()
    assert list(inspect.signature(run).parameters) == [*definition.inputs, *definition.outputs]


@pytest.mark.parametrize("num_tokens", TOKENS)
def test_regimes(reduced, reduced_weights, num_tokens):
    """The first and last T of a regime, against float64; NaN in output and scratch beforehand."""
    inputs = arguments(num_tokens, reduced_weights)
    experts, _ = reference.route(inputs["routing_logits"], inputs["routing_bias"], FACTOR)
    inputs["local_expert_offset"] = int(experts[0, 0])  # token 0 has a row at least
    expected = reference.moe(**inputs)
    assert expected[0].any()
    check(call(inputs), expected, streaming_at(num_tokens))


@pytest.mark.parametrize("config", cases.CONFIGS, ids=cases.config_id)
def test_configs(reduced, reduced_weights, monkeypatch, config):
    """Every row of the tables through all stages, on few tokens."""
    with_config(monkeypatch, config)
    inputs = arguments(20, reduced_weights)
    check(call(inputs), reference.moe(**inputs), config.streaming)


@pytest.mark.parametrize("offset", [0, 17, 224, 250, -8, 256, 2**40, -(2**40), np.int32(96)])
def test_offsets(reduced, reduced_weights, offset):
    """Local experts outside 0..255 get no token, and an offset that leaves none inside gives zeros."""
    inputs = arguments(10, reduced_weights, offset)
    expected = reference.moe(**inputs)
    assert expected.any() == (-32 < offset < 256)
    check(call(inputs), expected, streaming=True)


@pytest.mark.parametrize("factor", [0, 1, -0.75, np.float32(16)])
def test_factors(reduced, reduced_weights, factor):
    """The factor may be any number, of any numeric type."""
    inputs = arguments(4, reduced_weights) | {"routed_scaling_factor": factor}
    check(call(inputs), reference.moe(**inputs | {"routed_scaling_factor": float(factor)}), streaming=True)


@pytest.mark.parametrize("config", [cases.STREAMING, cases.TILED], ids=cases.config_id)
def test_one_hot_expert(reduced, reduced_weights, monkeypatch, config):
    """Every token on one local expert and nowhere else on this rank: several tiles of one expert, 31 empty ones."""
    with_config(monkeypatch, config)
    num_tokens = config.block_m + 3
    inputs = arguments(num_tokens, reduced_weights, offset=40)
    inputs["routing_logits"][:, 40] = 6
    inputs["routing_bias"][41:72] = -4
    inputs["routing_bias"][40] = 2
    expected = reference.moe(**inputs)
    assert (expected != 0).any(1).all()
    check(call(inputs), expected, config.streaming)


def test_no_tokens(reduced, reduced_weights):
    """T = 0 is a legal call that does nothing."""
    inputs = arguments(1, reduced_weights)
    for name in ("routing_logits", "hidden_states"):
        inputs[name] = inputs[name][:0]
    inputs["hidden_states_scale"] = inputs["hidden_states_scale"][:, :0].contiguous()
    assert call(inputs).shape == (0, H)


@pytest.mark.parametrize("config", [cases.STREAMING, cases.TILED], ids=cases.config_id)
def test_inputs_stay_and_bits_repeat(reduced, reduced_weights, monkeypatch, config):
    """A second call, on other addresses, gives the same bits, and no input has changed by then."""
    with_config(monkeypatch, config)
    inputs = arguments(9, reduced_weights)
    copies = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    first, second = call(inputs), call(copies)
    assert torch.equal(cases.signature(first), cases.signature(second))
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(cases.signature(value), cases.signature(copies[name])), name


def test_token_does_not_depend_on_its_neighbours(reduced, reduced_weights):
    """A NaN in one token's inputs reaches no other token, and a token alone has the bits that it has in company."""
    inputs = arguments(12, reduced_weights)
    alone = call(inputs)
    inputs["hidden_states_scale"][1, 4] = float("nan")
    inputs["routing_logits"][7, ::2] = float("nan")
    output = call(inputs)
    others = [t for t in range(12) if t not in (4, 7)]
    assert torch.equal(cases.signature(output[others]), cases.signature(alone[others]))


def full_geometry_arguments(num_tokens: int, full_weights: dict[str, torch.Tensor]) -> dict[str, object]:
    """Of the local experts, 32 to 63, only 46 and 63 are ever chosen, which keeps the interpreter under a minute."""
    inputs = arguments(num_tokens, full_weights)
    inputs["routing_logits"][:, 32:64] = -9
    inputs["routing_logits"][:, [46, 63]] = 5
    return inputs


@pytest.mark.parametrize("config", [cases.STREAMING, cases.TILED], ids=cases.config_id)
def test_full_geometry(full_weights, monkeypatch, config):
    """Both regimes at H = 7168, I = 2048, against the definition's own reference, at the tiers they are meant for."""
    with_config(monkeypatch, config)
    inputs = full_geometry_arguments(2, full_weights)
    namespace: dict[str, object] = {}
    exec(load_definition().reference, namespace)
    expected = namespace["run"](*inputs.values())
    output = call(inputs)
    assert (expected != 0).any(1).all()
    check(output, expected.double(), config.streaming)
    tier = "strict" if config.streaming else "profile"
    assert matched_ratios(output, expected)[tier] >= TIERS[tier].required_matched_ratio


@needs_gpu
@pytest.mark.parametrize("num_tokens", [1, 7, 80, 901, 14_107])
def test_full_geometry_by_size(full_weights, num_tokens):
    """Sizes of the published workloads, all 32 experts, against float64."""
    inputs = arguments(num_tokens, full_weights)
    check(call(inputs), reference.moe(**inputs), streaming_at(num_tokens))


@needs_gpu
def test_most_rows_there_can_be(full_weights, monkeypatch):
    """T = 65536, all 8 experts of every token local: offsets of rows pass 2^31 in scratch and output."""
    num_tokens = contract.MAX_TOKENS
    inputs = arguments(num_tokens, full_weights)
    inputs["routing_bias"][32:64] = 4
    output = call(inputs)
    assert output.isfinite().all()
    # The first, the last and some in between; a token's result does not depend on its neighbours.
    sample = torch.tensor([0, 1, 37_449, 37_450, 40_000, num_tokens - 2, num_tokens - 1], device=output.device)
    for name in ("routing_logits", "hidden_states"):
        inputs[name] = inputs[name][sample]
    inputs["hidden_states_scale"] = inputs["hidden_states_scale"][:, sample].contiguous()
    check(output[sample], reference.moe(**inputs), streaming=False)


@needs_gpu
@pytest.mark.parametrize("config", [cases.STREAMING, cases.TILED], ids=cases.config_id)
def test_another_stream(reduced, reduced_weights, monkeypatch, config):
    """The caller's current stream is used: what is queued before the call is waited for, without a synchronisation."""
    with_config(monkeypatch, config)
    inputs = arguments(40, reduced_weights)
    expected = call(inputs)
    hidden_states, output = inputs["hidden_states"], torch.empty_like(expected)
    inputs["hidden_states"] = torch.zeros_like(hidden_states)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # some 30 ms
        inputs["hidden_states"].copy_(hidden_states)
        run(**inputs, output=output)
    assert not stream.query(), "run() waited for the GPU"
    stream.synchronize()
    assert torch.equal(cases.signature(output), cases.signature(expected))


@needs_gpu
@pytest.mark.parametrize("config", [cases.STREAMING, cases.TILED], ids=cases.config_id)
def test_cuda_graph(reduced, reduced_weights, monkeypatch, config):
    """A captured call replays on new contents of the same tensors."""
    with_config(monkeypatch, config)
    inputs = arguments(40, reduced_weights)
    output = call(inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(**inputs, output=output)
    inputs["routing_logits"].copy_(inputs["routing_logits"].flip(0))
    inputs["hidden_states_scale"].neg_()
    output.fill_(float("nan"))
    graph.replay()
    assert torch.equal(cases.signature(output), cases.signature(call(inputs)))


@triton.jit
def _hold_kernel(released_ptr, started_ptr, values_ptr, BLOCK: tl.constexpr, LIMIT_NS: tl.constexpr):
    """Grid (programs,): keep 64 registers a thread from everyone else until released, or until the time is up."""
    values = tl.load(values_ptr + tl.arange(0, BLOCK))
    start = globaltimer()
    tl.atomic_add(started_ptr, 1)
    while (tl.load(released_ptr, volatile=True) == 0) & (globaltimer() - start < LIMIT_NS):
        pass
    tl.store(values_ptr + tl.arange(0, BLOCK), values)


@needs_gpu
def test_beside_a_kernel_that_holds_half_of_the_gpu(reduced, reduced_weights, device):
    """The fused GEMMs' programs wait for each other, yet need not all be resident: they finish while others hold on."""
    inputs = arguments(40, reduced_weights)
    expected = call(inputs)
    output = torch.empty_like(expected)
    num_programs = torch.cuda.get_device_properties(device).multi_processor_count // 2
    released = torch.zeros(1, dtype=torch.int32, pin_memory=True)
    started = torch.zeros(1, dtype=torch.int32, device=device)
    values = torch.zeros(32_768, device=device)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        _hold_kernel[(num_programs,)](released, started, values, len(values), 20 * 10**9, num_warps=16)
    try:
        while int(started) < num_programs:
            pass
        run(**inputs, output=output)
        finished = torch.cuda.Event()
        finished.record()
        deadline = time.monotonic() + 10
        while not finished.query() and time.monotonic() < deadline:
            pass
        assert finished.query(), "run() waits for an SM that another kernel holds"
    finally:
        released.fill_(1)
        torch.cuda.synchronize()
    assert torch.equal(cases.signature(output), cases.signature(expected))


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("config", [cases.STREAMING, cases.TILED], ids=cases.config_id)
def test_device_that_is_not_current(reduced, reduced_weights, monkeypatch, config):
    """Tensors on the second GPU, the first one current: same bits there, and it stays current."""
    with_config(monkeypatch, config)
    inputs = arguments(40, reduced_weights)
    elsewhere = {
        name: value.to("cuda:1") if isinstance(value, torch.Tensor) else value for name, value in inputs.items()
    }
    assert torch.equal(cases.signature(call(elsewhere).to("cuda:0")), cases.signature(call(inputs)))
    assert torch.cuda.current_device() == 0
