"""The contract: what the definition says, and what its reference computes."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from flashinfer_bench.compile import BuilderRegistry

from scripts.pack import ROOT, load_definition

H, I, E, BLOCK = 7168, 2048, 32, 128
SCALING = 2.5


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """run() of the reference, built as the benchmark builds it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIB_CACHE_PATH", str(tmp_path_factory.mktemp("cache")))
        yield BuilderRegistry.get_instance().build_reference(load_definition())


@pytest.fixture(scope="module")
def weights():
    """Both weight tensors and their scales; experts are overlapping windows of one buffer: all differ, in 45 MB."""
    generator = torch.Generator().manual_seed(1)

    def windows(rows: int, columns: int) -> torch.Tensor:
        buffer = torch.randn(rows + E - 1, columns, generator=generator).clamp_(-2, 2).to(torch.float8_e4m3fn)
        return buffer.as_strided((E, rows, columns), (columns, columns, 1))

    return (
        windows(2 * I, H),
        torch.randn(E, 2 * I // BLOCK, H // BLOCK, generator=generator),
        windows(H, I),
        torch.randn(E, H // BLOCK, I // BLOCK, generator=generator),
    )


def hidden(T: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    states = torch.randn(T, H, generator=generator).clamp_(-2, 2).to(torch.float8_e4m3fn)
    return states, torch.randn(H // BLOCK, T, generator=generator)


def exact_route(logits: torch.Tensor, bias: torch.Tensor) -> list[dict[int, float]]:
    """Each token's {expert: weight}, by Python floats and sorting, straight from the definition's text."""
    routes = []
    for row in logits.tolist():
        s = [1 / (1 + math.exp(-x)) for x in row]
        sb = [x + b for x, b in zip(s, bias.tolist())]
        groups = [range(32 * g, 32 * g + 32) for g in range(8)]
        best = sorted(groups, key=lambda group: (-sum(sorted((sb[e] for e in group))[-2:]), group[0]))[:4]
        chosen = sorted((e for group in best for e in group), key=lambda e: (-sb[e], e))[:8]
        total = sum(s[e] for e in chosen) + 1e-20
        routes.append({e: s[e] / total * SCALING for e in chosen})
    return routes


def scaled_product(quantized: torch.Tensor, scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """quantized [R, C] with scale [R / 128, C / 128] times x [C], by 128-wide partial sums in float64."""
    rows, columns = quantized.shape
    partial = torch.einsum("rbc,bc->rb", quantized.double().view(rows, -1, BLOCK), x.view(-1, BLOCK))
    return (partial * scale.double().repeat_interleave(BLOCK, 0)).sum(1)


def exact_output(logits, bias, states, states_scale, w13, w13_scale, w2, w2_scale, offset, scaling) -> torch.Tensor:
    """The output [T, H] in float64, one (token, expert) pair at a time."""
    output = torch.zeros(logits.shape[0], H, dtype=torch.float64)
    for t, route in enumerate(exact_route(logits, bias)):
        x = states[t].double() * states_scale[:, t].double().repeat_interleave(BLOCK)
        for expert, weight in route.items():
            e = expert - offset
            if 0 <= e < E:
                g = scaled_product(w13[e], w13_scale[e], x)
                up, gate = g[:I], g[I:]
                output[t] += weight * scaled_product(w2[e], w2_scale[e], gate * torch.sigmoid(gate) * up)
    return output


def assert_rounded_once(output: torch.Tensor, exact: torch.Tensor) -> None:
    """Float32 sums of up to 7168 terms, then one rounding to bfloat16: at most 2^-8 of the value."""
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.double(), exact, rtol=2**-8, atol=2e-6 * exact.abs().max().item())


def test_contract_is_the_published_one():
    """A solution is called by position with these shapes and dtypes; a slip here breaks every other data set."""
    definition = load_definition()
    assert definition.name == "moe_fp8_block_scale_ds_routing_topk8_ng8_kg4_e32_h7168_i2048"
    assert definition.op_type == "moe"
    assert definition.var_axes == ["seq_len"]
    assert definition.const_axes == {
        "num_experts": 256,
        "num_local_experts": 32,
        "hidden_size": 7168,
        "intermediate_size": 2048,
        "gemm1_out_size": 4096,
        "num_hidden_blocks": 56,
        "num_intermediate_blocks": 16,
        "num_gemm1_out_blocks": 32,
    }
    shapes = definition.get_input_shapes({"seq_len": 5})
    dtypes = [spec.dtype.value for spec in definition.inputs.values()]
    assert list(zip(definition.inputs, shapes, dtypes)) == [
        ("routing_logits", [5, 256], "float32"),
        ("routing_bias", [256], "bfloat16"),
        ("hidden_states", [5, 7168], "float8_e4m3fn"),
        ("hidden_states_scale", [56, 5], "float32"),
        ("gemm1_weights", [32, 4096, 7168], "float8_e4m3fn"),
        ("gemm1_weights_scale", [32, 32, 56], "float32"),
        ("gemm2_weights", [32, 7168, 2048], "float8_e4m3fn"),
        ("gemm2_weights_scale", [32, 56, 16], "float32"),
        ("local_expert_offset", None, "int32"),
        ("routed_scaling_factor", None, "float32"),
    ]
    assert definition.get_output_shapes({"seq_len": 5}) == [[5, 7168]]
    assert [(name, spec.dtype.value) for name, spec in definition.outputs.items()] == [("output", "bfloat16")]
    assert definition.tags == [
        "status:verified",
        "model:deepseek-v3",
        "model:deepseek-r1",
        "quantization:float8_e4m3fn",
        "fi_api:flashinfer.fused_moe.trtllm_fp8_block_scale_moe",
        "ep:8",
    ]


@pytest.mark.parametrize("offset", [0, 17, 224, 250, -8])
def test_reference_agrees_with_float64(reference, weights, offset):
    """The oracle of all other tests: edges of the rank's window, wrapped ones too, a remote token, bias."""
    generator = torch.Generator().manual_seed(100 + offset)
    logits = torch.randn(3, 256, generator=generator)
    first, last = max(offset, 0), min(offset + E, 256) - 1
    edges = {first - 1, first, last, last + 1, offset % 256, (offset + E - 1) % 256}
    wanted = [e for e in sorted(edges) if 0 <= e < 256]
    logits[0, wanted] += 6
    logits[1, first : last + 1] = -20
    bias = torch.randn(256, generator=generator).mul(0.2).to(torch.bfloat16)
    bias[wanted] = 0.5
    bias[first : last + 1] = torch.minimum(bias[first : last + 1], bias.new_tensor(0.5))
    inputs = (logits, bias, *hidden(3), *weights, offset, SCALING)

    output = reference(*inputs)

    exact = exact_output(*inputs)
    assert_rounded_once(output, exact)
    assert exact[0].abs().max() > 1e3
    assert not output[1].any()


def test_routing_is_exact_with_ties():
    """Ties go to the lower index, among groups and among experts: logits and bias of few values tie in every row."""
    namespace: dict = {}
    exec(load_definition().reference, namespace)
    generator = torch.Generator().manual_seed(3)
    for levels in (1, 2, 5):
        logits = torch.randint(levels, (300, 256), generator=generator).float()
        bias = torch.randint(levels, (256,), generator=generator).mul(0.25).to(torch.bfloat16)
        experts, weights = namespace["route"](logits, bias, SCALING)
        expected = exact_route(logits, bias)
        assert experts.tolist() == [list(route) for route in expected]
        torch.testing.assert_close(weights.double(), torch.tensor([list(r.values()) for r in expected]).double())


def test_tied_token_reaches_the_output(reference, weights):
    """All logits equal: experts 0..7, each with an eighth of the factor; a rank that holds none of them gives zeros."""
    inputs = (torch.zeros(1, 256), torch.zeros(256, dtype=torch.bfloat16), *hidden(1), *weights)
    assert_rounded_once(reference(*inputs, -30, SCALING), exact_output(*inputs, -30, SCALING))
    assert not reference(*inputs, 8, SCALING).any()


def test_no_tokens(reference, weights):
    """T = 0 is a legal call."""
    output = reference(torch.zeros(0, 256), torch.zeros(256, dtype=torch.bfloat16), *hidden(0), *weights, 0, SCALING)
    assert output.shape == (0, H) and output.dtype == torch.bfloat16


@pytest.mark.parametrize("allowed", ["highest", "high", "medium"])
def test_products_are_full_float32(reference, weights, monkeypatch, allowed):
    """TF32 in the reference would be an error of 1e-3 in the oracle; the process's own setting must survive."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    silu, seen = torch.nn.functional.silu, []

    def recording_silu(x):
        seen.append([backend.fp32_precision for backend in backends])
        return silu(x)

    monkeypatch.setattr(torch.nn.functional, "silu", recording_silu)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(allowed)
    try:
        reference(torch.zeros(1, 256), torch.zeros(256, dtype=torch.bfloat16), *hidden(1), *weights, 0, SCALING)
        assert torch.get_float32_matmul_precision() == allowed
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == [["ieee", "ieee"]] * 8


PEAK_MEMORY = """
from flashinfer_bench.bench.utils import gen_inputs
from flashinfer_bench.data import RandomInput, SafetensorsInput, ScalarInput, Workload
from scripts.pack import load_definition
from scripts.workloads import PublishedWorkload, router_tensors

definition = load_definition()
tensors = router_tensors(PublishedWorkload("00000000-0000-0000-0000-000000000002", 2, 32, 6, 10))
inputs = {name: RandomInput() for name in definition.inputs}
inputs |= {name: SafetensorsInput(path="unused", tensor_key=name) for name in tensors}
inputs |= {"local_expert_offset": ScalarInput(value=32), "routed_scaling_factor": ScalarInput(value=2.5)}
workload = Workload(axes={"seq_len": 2}, inputs=inputs, uuid="peak")
arguments = gen_inputs(definition, workload, device="cpu", safe_tensors=tensors)
namespace = {}
exec(definition.reference, namespace)
assert namespace["run"](*arguments).float().abs().max() > 1e3
print(*(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_fits_a_small_machine():
    """T = 2 with all inputs on a CPU stays under 6 GB: weights are dequantised one expert at a time."""
    command = [sys.executable, "-c", PEAK_MEMORY]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    assert int(finished.stdout) * 1024 < 6e9
