"""The sweep: how a span is divided, what counts as a miss, which workloads are measured, and what is kept of them."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from scripts import stages, sweep
from scripts.ceilings import Ceilings, floor_us, local_rows
from scripts.pack import ROOT
from scripts.span import Activity, Call
from scripts.stages import KernelTime, kernel_times
from scripts.sweep_report import (
    Breakdown,
    HostTime,
    Miss,
    Point,
    Sweep,
    expert_misses,
    read_sweep,
    spread_misses,
    stage_misses,
    stage_table,
    token_misses,
)
from scripts.workloads import NUM_LOCAL_EXPERTS, SPREADS, SWEEP_OFFSET, drawn_router, spread_router, spread_rows
from solution.triton import contract
from solution.triton.tuning import TABLES

GPU = "NVIDIA H100 80GB HBM3"
CEILINGS = Ceilings(read_bytes_per_s=3e12, fp8_flops_per_s=1.5e15)


def planted(*kernels: tuple[str, float, float]) -> Call:
    return Call(tuple(Activity(*kernel) for kernel in kernels), spin_us=2000.0)


def point(T: int, latency_us: float, floor: float = 100.0, active_experts: int = 8, spread: str = "drawn") -> Point:
    return Point(T, spread, 2 * T, active_experts, latency_us, (latency_us - 1, latency_us + 1), floor)


def a_sweep() -> Sweep:
    """A small sweep of every part that misses nothing."""
    call = planted(("_top_k_kernel", 0.0, 3.0), ("_fused_kernel", 2.0, 93.0), ("_finalize_kernel", 94.0, 98.0))
    return Sweep(
        GPU, "580.0", {"torch": "2.11.0", "triton": "3.6.0"}, "abc", CEILINGS, repeats=20,
        tokens=[point(1, 100.0, 85.0), point(128, 150.0, 130.0), point(256, 160.0, 135.0)],
        experts=[point(32, 30.0 + 15 * n, 15.0 * n, n, "equal") for n in range(1, 4)],
        spreads=[point(8192, 900.0, 500.0, 32, spread) for spread in SPREADS],
        stages=[Breakdown(16, 67, 20, kernel_times([call]))],
        host=[HostTime(7, 150.0, 90.0)],
    )  # fmt: skip


# Stages


def test_rows_add_up_to_the_span() -> None:
    """An early start is hidden, a late one is a gap, and a kernel inside another one has no time of its own."""
    call = planted(
        ("_top_k_kernel", 10.0, 15.0), ("_lists_kernel", 13.0, 18.0), ("Memset", 14.0, 16.0),
        ("_fused_kernel", 20.0, 70.0), ("_finalize_kernel", 65.0, 74.0),
    )  # fmt: skip
    rows = kernel_times([call])
    assert rows == [
        KernelTime("_top_k_kernel", "routing", duration_us=5.0, own_us=5.0, gap_us=0.0),
        KernelTime("_lists_kernel", "routing", duration_us=5.0, own_us=3.0, gap_us=0.0),
        KernelTime("Memset", "other", duration_us=2.0, own_us=0.0, gap_us=0.0),
        KernelTime("_fused_kernel", "GEMM1 + GEMM2", duration_us=50.0, own_us=50.0, gap_us=2.0),
        KernelTime("_finalize_kernel", "finalize", duration_us=9.0, own_us=4.0, gap_us=0.0),
    ]
    entry = Breakdown(16, 67, 20, rows)
    assert entry.span_us == call.span_us == 64.0
    assert entry.overlap_us == 2.0 + 2.0 + 5.0
    assert entry.beside_gemms_us == 64.0 - 50.0


def test_launches_of_one_name() -> None:
    """Two kernels of one name are told apart by their order, and one too many is not counted as a known stage."""
    rows = kernel_times([planted(*(("_tiled_kernel", float(i), i + 1.0) for i in range(3)))])
    assert [row.stage for row in rows] == ["GEMM1", "GEMM2", "other"]


def test_outlying_calls_do_not_count() -> None:
    """The rows are means over the middle half of the calls."""
    calls = [planted(("_fused_kernel", 0.0, end)) for end in (50.0, 10.0, 12.0, 1.0)]
    assert kernel_times(calls)[0].own_us == 11.0


def test_calls_that_differ_are_an_error() -> None:
    """Rows of different kernels must not be averaged."""
    with pytest.raises(RuntimeError, match="expected the same kernels in every call, found 2 sequences"):
        kernel_times([planted(("_fused_kernel", 0.0, 1.0)), planted(("_tiled_kernel", 0.0, 1.0))])


def test_every_kernel_has_its_stage() -> None:
    """A kernel that is added or renamed without its row in the table would appear as 'other'."""
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "solution" / "triton").glob("*.py")]
    launched = [name for source in sources for name in re.findall(r"\blaunch\(\s*[\w.]+,\s*(\w+),", source)]
    assert set(stages.STAGES) == set(launched)
    assert all(len(kernel_stages) >= launched.count(name) for name, kernel_stages in stages.STAGES.items())
    assert {stage for kernel_stages in stages.STAGES.values() for stage in kernel_stages} >= set(stages.MATRICES)


def test_stage_table() -> None:
    """Rates are the active experts' weights and the rows' FLOPs over the GEMM's own time, beside their ceilings."""
    (header, *rows) = stage_table(a_sweep())
    cells = {name: cell for name, cell in rows}
    assert header == ["us", "T = 16"]
    assert cells["routing: `_top_k_kernel`"] == "3.0" and cells["GEMM1 + GEMM2: `_fused_kernel`"] == "90.0"
    assert (cells["gaps"], cells["span"], cells["all but the GEMMs"], cells["hidden by early starts"]) == (
        "1.0", "98.0", "8.0", "1.0",
    )  # fmt: skip
    read = 20 * (3 * 7168 * 2048 + 4 * (32 * 56 + 56 * 16)) / 90e-6
    assert cells["GEMM1 + GEMM2: weights, TB/s"] == f"{read / 1e12:.2f} ({read / 3e12:.0%})"
    done = 67 * 6 * 7168 * 2048 / 90e-6
    assert cells["GEMM1 + GEMM2: TFLOP/s"] == f"{done / 1e12:.0f} ({done / 1.5e15:.0%})"


# Misses


def test_a_good_sweep_misses_nothing() -> None:
    """Without a cliff there is nothing to report."""
    assert a_sweep().misses() == []


@pytest.mark.parametrize(
    ("points", "missed"),
    [
        ([point(384, 106.0), point(512, 100.0)], ["T = 384: 1.06 x T = 512 (at most 1.05)"]),
        ([point(384, 105.0), point(512, 100.0)], []),
        ([point(7, 100.0, 50.0), point(8, 111.0, 54.0)],
         ["T = 8: 6 us more than T = 7 and 1.25 x the floor's step (at most 5% of 100)"]),
        ([point(7, 100.0, 50.0), point(8, 122.0, 64.0)], []),
        ([point(384, 100.0), point(512, 170.0)], []),
        ([point(127, 180.0, 100.0)], []),
        ([point(128, 176.0, 100.0)], ["T = 128: 1.76 x floor (at most 1.75)"]),
        ([], []),
    ],
)  # fmt: skip
def test_misses_over_tokens(points: list[Point], missed: list[str]) -> None:
    """A cliff, a step that no new expert explains, and a span far above the floor are found; borders are not."""
    assert [miss.text for miss in token_misses(points)] == missed


def test_misses_over_experts() -> None:
    """A point above the line between its neighbours is found and its neighbours are not blamed."""
    points = [point(32, 20.0 + 10 * n, active_experts=n) for n in (1, 2, 3, 4, 5)]
    assert expert_misses(points) == [] and expert_misses(points[:1]) == []
    points[2] = replace(points[2], latency_us=53.0)
    (miss,) = expert_misses(points)
    assert miss == Miss("3 active experts: 1.06 x the line between 2 and 4 (at most 1.05)", points[2])


def test_misses_over_spreads() -> None:
    """A spread is compared with equal groups of the same T only."""
    points = [point(8192, 200.0, spread="equal"), point(8192, 230.0, spread="Zipf"), point(99, 900.0, spread="Zipf")]
    (miss,) = spread_misses(points)
    assert miss == Miss("T = 8192, Zipf: 2.30 x floor, equal groups 2.00 (at most 1.1 x that)", points[1])


def test_misses_beside_the_gemms() -> None:
    """Decode steps may take ten microseconds outside their GEMMs."""
    call = planted(("_top_k_kernel", 0.0, 7.0), ("_fused_kernel", 7.0, 90.0), ("_finalize_kernel", 92.0, 94.0))
    rows = kernel_times([call])
    step, prefill = Breakdown(80, 151, 32, rows), Breakdown(901, 743, 32, rows)
    (miss,) = stage_misses([step, prefill])
    assert miss == Miss("T = 80: routing, finalize and gaps take 11.0 us (at most 10)", step)


# Workloads


def test_drawn_tokens_are_the_first_of_more() -> None:
    """From one T to the next nothing changes but what the new tokens add; an eighth of the pairs is local."""
    few, many = drawn_router(5), drawn_router(4096)
    assert torch.equal(few["routing_logits"], many["routing_logits"][:5])
    assert local_rows(**drawn_router(1), offset=SWEEP_OFFSET)[0] > 0
    rows, active_experts = local_rows(**many, offset=SWEEP_OFFSET)
    assert rows == pytest.approx(4096, rel=0.05) and active_experts == NUM_LOCAL_EXPERTS


@pytest.mark.parametrize("spread", SPREADS)
def test_spread_is_as_asked(spread: str) -> None:
    """Each local expert gets exactly its rows; one hot expert has half of them."""
    asked = spread_rows(SPREADS[spread], 1000)
    assert sum(asked) == 1000 and min(asked) > 0
    router = spread_router(asked, 1000)
    experts = router["routing_logits"].topk(8).indices.sort().values
    assert (experts[:, 1:] > experts[:, :-1]).all()
    counts = torch.bincount(experts.flatten(), minlength=256)[SWEEP_OFFSET : SWEEP_OFFSET + NUM_LOCAL_EXPERTS]
    assert sorted(counts.tolist()) == sorted(asked)
    assert local_rows(**router, offset=SWEEP_OFFSET) == (1000, NUM_LOCAL_EXPERTS)
    assert (max(asked) == 500) == (spread == "one hot expert")


@pytest.mark.parametrize("active_experts", [1, 5, 32])
def test_few_active_experts(active_experts: int) -> None:
    """The sweep over experts activates as many as it says."""
    router = spread_router([2] * active_experts, 32)
    assert local_rows(**router, offset=SWEEP_OFFSET) == (2 * active_experts, active_experts)


@pytest.mark.parametrize("rows", [[5], [4] * 32 + [1], [4] * 32 + [0]])
def test_impossible_spreads_are_refused(rows: list[int]) -> None:
    """Four tokens cannot give an expert five rows, nor 33 experts any."""
    with pytest.raises(ValueError, match="rows_per_expert: expected at most 32 experts with at most T = 4 rows"):
        spread_router(rows, 4)


def test_the_most_rows_that_tokens_can_have() -> None:
    """Eight rows a token, the limit, are still exact."""
    assert local_rows(**spread_router([4] * 8, 4), offset=SWEEP_OFFSET) == (32, 8)


def test_the_sweep_is_fine_enough() -> None:
    """Every decode size to 16, steps of a third or a half from 128 on, and the first T of every tuning regime."""
    assert list(range(1, 17)) == sweep.TOKENS[:16] and sweep.TOKENS[-1] == sweep.MAX_TOKENS
    assert max(after / before for before, after in pairwise(sweep.TOKENS[15:])) <= 1.5
    assert {row.max_tokens + 1 for row in TABLES[9][:-1]} <= set(sweep.TOKENS)


def test_inputs_are_as_the_contract_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """`run()` is called with the benchmark's inputs, cut to the workload's T."""
    seen = []
    monkeypatch.setattr(sweep, "run", lambda **arguments: seen.append(contract.check_arguments(arguments)))
    bench = sweep.Bench(sweep.make_inputs(8, "meta"), CEILINGS, repeats=1)
    for T in (1, 5, 8):
        bench.call(drawn_router(T), offset=SWEEP_OFFSET)()
    assert seen == [1, 5, 8]


# The command, with the GPU replaced


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A GPU whose every call runs the same three kernels; returns the T of every call of `run()`."""
    called = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: GPU)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(sweep, "DEVICE", "cpu")
    monkeypatch.setattr(sweep, "TOKENS", (1, 3, 8))
    monkeypatch.setattr(sweep, "STAGE_TOKENS", (1, 4))
    monkeypatch.setattr(sweep, "SPREAD_TOKENS", (64,))
    monkeypatch.setattr(sweep, "HOST_TOKENS", (7, 64))
    monkeypatch.setattr(sweep, "measure_ceilings", lambda device: CEILINGS)
    monkeypatch.setattr(sweep, "driver_version", lambda: "580.0")
    monkeypatch.setattr(sweep, "make_inputs", lambda num_tokens, device: {
        "hidden_states": torch.zeros(1024, 16), "hidden_states_scale": torch.arange(2048.0).view(2, 1024),
    })  # fmt: skip

    def fake_run(routing_logits, hidden_states, hidden_states_scale, output, local_expert_offset, **_: object) -> None:
        T = len(routing_logits)
        assert hidden_states.shape == output.shape == (T, 16) and output.dtype == torch.bfloat16
        assert torch.equal(hidden_states_scale, torch.stack([torch.arange(T), 1024 + torch.arange(T)]).float())
        called.append(T)

    def fake_record(call, repeats: int) -> list[Call]:
        call()
        kernels = ("_top_k_kernel", 0.0, 3.0), ("_fused_kernel", 2.0, 90.0), ("_finalize_kernel", 95.0, 99.0)
        return [planted(*kernels)] * repeats

    monkeypatch.setattr(sweep, "run", fake_run)
    monkeypatch.setattr(sweep, "record_calls", fake_record)
    monkeypatch.setattr("scripts.span.record_calls", fake_record)
    return called


def test_the_whole_sweep(fake_gpu: list[int], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Every part is measured and can be read back, and --check fails where the sweep misses something."""
    options = ["--out", str(tmp_path), "--commit", "abc", "--repeats", "4"]
    assert sweep.main(options) == 0
    result = read_sweep(tmp_path / "nvidia-h100-80gb-hbm3-sweep.json")
    assert (result.gpu, result.driver, result.commit) == (GPU, "580.0", "abc")
    assert (result.ceilings, result.repeats) == (CEILINGS, 4)
    assert [p.T for p in result.tokens] == [1, 3, 8] and {p.spread for p in result.tokens} == {"drawn"}
    assert [p.active_experts for p in result.experts] == list(range(1, 33))
    assert [(p.T, p.spread) for p in result.spreads] == [(64, spread) for spread in SPREADS]
    assert [(entry.T, entry.span_us) for entry in result.stages] == [(1, 99.0), (4, 99.0)]
    assert (result.stages[0].rows, result.stages[0].active_experts) == (5, 5)  # the published workload
    assert [time.T for time in result.host] == [7, 64]
    first = result.tokens[0]
    assert first.latency_us == 99.0 and first.latency_us_range == (99.0, 99.0)
    assert first.floor_us == floor_us(1, first.rows, first.active_experts, CEILINGS)
    printed = capsys.readouterr().out
    assert "where the microseconds go" in printed and "- T = 1: routing, finalize and gaps take 12.0 us" in printed


def test_only_one_part(fake_gpu: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part alone is measured alone; --check decides by what was measured."""
    options = ["--out", str(tmp_path), "--commit", "abc", "--repeats", "1", "--only", "stages"]
    assert sweep.main([*options, "--check"]) == 1  # 12 us beside the GEMMs
    assert sweep.main(options) == 0
    result = read_sweep(tmp_path / "nvidia-h100-80gb-hbm3-sweep.json")
    assert result.stages and not (result.tokens or result.experts or result.spreads or result.host)
    assert fake_gpu == [1, 4] * 2
    monkeypatch.setattr(sweep, "STAGE_TOKENS", (901,))
    assert sweep.main([*options, "--check"]) == 0


def test_interrupted_sweep_keeps_what_it_measured(
    fake_gpu: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file holds every point before the interruption, which is not swallowed."""
    measure_span = sweep.measure_span

    def interrupted(call, repeats: int):
        if len(fake_gpu) == 2:
            raise KeyboardInterrupt
        return measure_span(call, repeats)

    monkeypatch.setattr(sweep, "measure_span", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep.main(["--out", str(tmp_path), "--repeats", "1", "--only", "tokens", "experts"])
    result = read_sweep(tmp_path / "nvidia-h100-80gb-hbm3-sweep.json")
    assert [p.T for p in result.tokens] == [1, 3] and result.experts == []
    assert [path.name for path in tmp_path.iterdir()] == ["nvidia-h100-80gb-hbm3-sweep.json"]


def test_driver_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The version is what nvidia-smi prints first, and unknown where there is none."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sweep.driver_version() is None
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 580.1\necho 580.1\n")
    command.chmod(0o755)
    assert sweep.driver_version() == "580.1"


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the sweep would run")
def test_without_gpu(capsys: pytest.CaptureFixture) -> None:
    """Without a GPU the command says so and fails."""
    assert sweep.main([]) == 1
    assert capsys.readouterr().err == "error: the sweep measures a CUDA GPU, and none was found\n"


@pytest.mark.parametrize(("options", "message"), [
    (["--only", "everything"], "invalid choice: 'everything'"), (["--repeats", "0"], "expected a positive number"),
])  # fmt: skip
def test_bad_arguments_are_refused(options: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    """A misspelt part, or nothing to repeat, ends the command with 2."""
    with pytest.raises(SystemExit) as error:
        sweep.main(options)
    assert error.value.code == 2 and message in capsys.readouterr().err
