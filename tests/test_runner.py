"""`make run`: what it counts as passed, what it measures, what it writes. Processes and the GPU are the only fakes."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from flashinfer_bench.data import (
    AxisConst,
    AxisVar,
    BuildSpec,
    Correctness,
    Definition,
    Environment,
    Evaluation,
    EvaluationStatus,
    Performance,
    RandomInput,
    ScalarInput,
    Solution,
    SourceFile,
    TensorSpec,
    Trace,
    TraceSet,
    Workload,
    save_json_file,
)
from rich.console import Console

from scripts import ceilings, report, run, span
from scripts.accuracy import TIERS, Tolerance, assess, matched_ratios
from scripts.pack import DEFINITION_NAME, ROOT
from scripts.span import Activity
from scripts.workloads import PUBLISHED, router_tensors, small_workloads

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

GPU = "NVIDIA H100 80GB HBM3"
HIDDEN_SIZE = 64
BODIES = {
    "right": "output.copy_(hidden_states.float() * routed_scaling_factor)",
    "wrong": "output.copy_(hidden_states.float() * routed_scaling_factor * 2)",
    "raising": "raise RuntimeError('no such kernel')",
}
ARGUMENTS = "routing_logits, routing_bias, hidden_states, local_expert_offset, routed_scaling_factor"


def make_definition() -> Definition:
    """A definition of our name, so that flashinfer-bench picks the same evaluator, with next to nothing to compute."""
    return Definition(
        name=DEFINITION_NAME,
        op_type="moe",
        axes={
            "seq_len": AxisVar(),
            "num_experts": AxisConst(value=256),
            "hidden_size": AxisConst(value=HIDDEN_SIZE),
        },
        inputs={
            "routing_logits": TensorSpec(shape=["seq_len", "num_experts"], dtype="float32"),
            "routing_bias": TensorSpec(shape=["num_experts"], dtype="bfloat16"),
            "hidden_states": TensorSpec(shape=["seq_len", "hidden_size"], dtype="float8_e4m3fn"),
            "local_expert_offset": TensorSpec(shape=None, dtype="int32"),
            "routed_scaling_factor": TensorSpec(shape=None, dtype="float32"),
        },
        outputs={"output": TensorSpec(shape=["seq_len", "hidden_size"], dtype="bfloat16")},
        reference=f"import torch\n\n\ndef run({ARGUMENTS}):\n"
        "    return (hidden_states.float() * routed_scaling_factor).bfloat16()\n",
    )


def make_solution(body: str, name: str = "ours") -> Solution:
    return Solution(
        name=name,
        definition=DEFINITION_NAME,
        author="us",
        spec=BuildSpec(language="python", target_hardware=["cuda"], entry_point="main.py::run"),
        sources=[SourceFile(path="main.py", content=f"def run({ARGUMENTS}, output):\n    {BODIES[body]}\n")],
    )


def make_workload(uuid: str, T: int) -> Workload:
    inputs = {name: RandomInput() for name in ("routing_logits", "routing_bias", "hidden_states")}
    inputs |= {"local_expert_offset": ScalarInput(value=32), "routed_scaling_factor": ScalarInput(value=2.5)}
    return Workload(axes={"seq_len": T}, inputs=inputs, uuid=uuid)


def make_evaluation(status: str = "PASSED", log: str = "") -> Evaluation:
    judged = status in ("PASSED", "INCORRECT_NUMERICAL")
    return Evaluation(
        status=EvaluationStatus(status),
        environment=Environment(hardware=GPU),
        timestamp="2026-01-01",
        log=log,
        correctness=Correctness(max_absolute_error=2.0, extra={"matched_ratio": 0.5}) if judged else None,
        performance=Performance(latency_ms=0.5, reference_latency_ms=20.0) if status == "PASSED" else None,
    )


def make_trace(workload: Workload, status: str = "PASSED", solution: str = "ours", log: str = "") -> Trace:
    evaluation = make_evaluation(status, log)
    return Trace(definition=DEFINITION_NAME, workload=workload, solution=solution, evaluation=evaluation)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TraceSet:
    """A data set on disk with the small definition and two workloads, T = 1 and 100."""
    monkeypatch.setenv("FIB_CACHE_PATH", str(tmp_path / "cache"))
    monkeypatch.delenv("TIER", raising=False)
    monkeypatch.delenv("FIB_DATASET_PATH", raising=False)
    root = tmp_path / "data"
    definition = make_definition()
    save_json_file(definition, root / "definitions" / "moe" / f"{definition.name}.json")
    data = TraceSet(root=root, definitions={definition.name: definition})
    workloads = [make_workload("small", 1), make_workload("large", 100)]
    data.add_workload_traces([Trace(definition=definition.name, workload=workload) for workload in workloads])
    return data


@pytest.fixture
def console() -> Console:
    return Console(width=140, record=True, markup=False)


# The verdict


@pytest.mark.parametrize(
    ("statuses", "verdict"),
    [
        ([], "0 TRACES"),
        (["PASSED"], "PASSED"),
        (["PASSED", "PASSED"], "2 TRACES"),
        (["INCORRECT_NUMERICAL"], "INCORRECT_NUMERICAL"),
        (["TIMEOUT"], "TIMEOUT"),
        (["RUNTIME_ERROR", "PASSED"], "2 TRACES"),
    ],
)
def test_exactly_one_passed_trace_passes(statuses: list[str], verdict: str) -> None:
    """A workload without a trace, with a failed one or with two must not count as passed."""
    workload, other = make_workload("this", 7), make_workload("other", 8)
    traces = [make_trace(other), *(make_trace(workload, status) for status in statuses)]
    record = run.judge(workload, traces)
    assert record.status == verdict
    assert report.exit_status([run.judge(other, traces), record]) == (0 if verdict == "PASSED" else 1)


def test_no_workload_is_no_success() -> None:
    """An empty run must not exit with 0."""
    assert report.exit_status([]) == 1


@pytest.mark.parametrize(
    ("traces", "expected"),
    [
        ([], "expected one trace, found 0"),
        ([("INCORRECT_NUMERICAL", "")], "INCORRECT_NUMERICAL: matched ratio 0.5, largest absolute error 2.0"),
        ([("RUNTIME_ERROR", "Traceback\nValueError: bad tile\n")], "RUNTIME_ERROR: ValueError: bad tile"),
        ([("TIMEOUT", "")], "TIMEOUT: no log"),
    ],
)
def test_failure_says_why(traces: list[tuple[str, str]], expected: str) -> None:
    """The line printed for a failed workload names the cause."""
    workload = make_workload("this", 7)
    assert run.failure(workload, [make_trace(workload, status, log=log) for status, log in traces]) == expected


def test_only_our_own_traces_are_forgotten(data: TraceSet) -> None:
    """Starting without our traces must leave every other line of a foreign data set byte for byte."""
    workload = make_workload("small", 1)
    foreign = data.root / "traces" / "moe" / "foreign.jsonl"
    foreign.parent.mkdir(parents=True)
    theirs = make_trace(workload, solution="theirs").model_dump_json(indent=None).replace(":", " : ", 1) + "\n\n"
    foreign.write_text(theirs)
    mixed = foreign.with_name("mixed.jsonl")
    mixed.write_text(make_trace(workload).model_dump_json() + "\n" + theirs + make_trace(workload).model_dump_json())
    run.forget_traces(data.root, make_solution("right"))
    assert foreign.read_text() == theirs and mixed.read_text() == theirs
    assert sorted(path.name for path in foreign.parent.iterdir()) == ["foreign.jsonl", "mixed.jsonl"]


# The whole job, with the benchmark's process and the GPU replaced


@pytest.fixture
def no_gpu_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: GPU)
    monkeypatch.setattr(ceilings, "measure_ceilings", lambda device: ceilings.Ceilings(3e12, 1.5e15))
    monkeypatch.setattr(span, "measure_span", lambda call: [call(), span.Span(100.0, 90.0, 120.0)][1])


def fake_benchmark(monkeypatch: pytest.MonkeyPatch, statuses: dict[str, list[str]]) -> list[list[str]]:
    """Replace the `flashinfer-bench` process by one that leaves traces of these statuses; return its command lines."""
    commands = []

    def run_process(command: list[str], **_: object) -> None:
        commands.append(command)
        data = TraceSet.from_path(command[command.index("--local") + 1])
        workloads = {workload.uuid: workload for workload in run.own_workloads(data)}
        data.add_traces([make_trace(workloads[uuid], status) for uuid in statuses for status in statuses[uuid]])

    monkeypatch.setattr(run, "flashinfer_bench_cli", lambda: "flashinfer-bench")
    monkeypatch.setattr(run, "subprocess", SimpleNamespace(run=run_process, DEVNULL=subprocess.DEVNULL))
    return commands


def run_benchmark(data: TraceSet, console: Console, body: str, *options: str) -> int:
    arguments = run.parse_arguments(["--results-dir", str(data.root / "results"), "--commit", "abc", *options])
    return run.benchmark(make_solution(body), data, arguments, console)


def test_all_passed_gives_results(
    data: TraceSet, console: Console, monkeypatch: pytest.MonkeyPatch, no_gpu_needed: None
) -> None:
    """The results file has the documented fields and consistent numbers, and the job exits with 0."""
    commands = fake_benchmark(monkeypatch, {"small": ["PASSED"], "large": ["PASSED"]})
    assert run_benchmark(data, console, "right", "--tier", "contest", "--timeout", "77") == 0
    assert len(commands) == 1
    options = dict(zip(commands[0][2::2], commands[0][3::2]))
    assert commands[0][:2] == ["flashinfer-bench", "run"] and options == {
        "--local": str(data.root),
        "--definitions": DEFINITION_NAME,
        "--solutions": "ours",
        "--rtol": "0.3",
        "--atol": "1.0",
        "--required-matched-ratio": "0.9",
        "--timeout": "77",
    }
    results = json.loads((data.root / "results" / "nvidia-h100-80gb-hbm3-contest.json").read_text())
    assert set(results) == {"gpu", "tier", "versions", "commit", "ceilings", "workloads"}
    assert (results["gpu"], results["tier"], results["commit"]) == (GPU, "contest", "abc")
    assert {"python", "flashinfer-bench", "torch", "triton"} <= set(results["versions"])
    assert results["ceilings"] == {"read_bytes_per_s": 3e12, "fp8_flops_per_s": 1.5e15}
    assert [record["uuid"] for record in results["workloads"]] == ["small", "large"]
    for record in results["workloads"]:
        assert set(record) == {
            "uuid", "T", "offset", "rows", "active_experts", "status", "benchmark_latency_ms", "reference_latency_ms",
            "latency_us", "latency_us_range", "floor_us", "time_over_floor", "matched",
        }  # fmt: skip
        assert record["status"] == "PASSED" and record["benchmark_latency_ms"] == 0.5 and record["offset"] == 32
        assert record["time_over_floor"] == pytest.approx(100.0 / record["floor_us"])
        assert record["matched"] == {"profile": 1.0, "contest": 1.0, "strict": 1.0}
    assert "2/2 PASSED" in console.export_text()


def test_missing_trace_fails_the_job(
    data: TraceSet, console: Console, monkeypatch: pytest.MonkeyPatch, no_gpu_needed: None
) -> None:
    """One workload that flashinfer-bench skipped makes exit status 1, is named, and is not measured."""
    fake_benchmark(monkeypatch, {"small": ["PASSED"]})
    assert run_benchmark(data, console, "right") == 1
    assert "T=100 large: expected one trace, found 0" in console.export_text()
    results = json.loads((data.root / "results" / "nvidia-h100-80gb-hbm3.json").read_text())
    small, large = results["workloads"]
    assert small["status"] == "PASSED" and large["status"] == "0 TRACES"
    assert large["latency_us"] is None and large["time_over_floor"] is None and large["matched"] is None


def test_failing_where_the_benchmark_passed_fails_the_job(
    data: TraceSet, console: Console, monkeypatch: pytest.MonkeyPatch, no_gpu_needed: None
) -> None:
    """A wrong output in our own measurement is not covered up by PASSED traces."""
    fake_benchmark(monkeypatch, {"small": ["PASSED"], "large": ["PASSED"]})
    assert run_benchmark(data, console, "wrong") == 1
    assert "0/2 PASSED" in console.export_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the command would succeed")
def test_command_line_is_flashinfer_benchs(data: TraceSet) -> None:
    """The real command accepts our options (else it exits with 2), and its failure is not swallowed."""
    with pytest.raises(subprocess.CalledProcessError) as error:
        run.run_flashinfer_bench(data.root, make_solution("right"), TIERS["strict"], timeout=5, isolated=False)
    assert error.value.returncode == 1


def test_missing_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without flashinfer-bench the message says what was looked for and where."""
    monkeypatch.setattr(run.shutil, "which", lambda name, path=None: None)
    with pytest.raises(FileNotFoundError, match="flashinfer-bench: expected the command beside"):
        run.flashinfer_bench_cli()


@pytest.mark.parametrize(("body", "status", "code"), [
    ("right", "PASSED", 0), ("wrong", "INCORRECT_NUMERICAL", 1), ("raising", "RUNTIME_ERROR", 1),
])  # fmt: skip
def test_without_gpu(data: TraceSet, console: Console, body: str, status: str, code: int) -> None:
    """flashinfer-bench's evaluator on the CPU tells right from wrong, and the exit status follows."""
    assert run.interpret(make_solution(body), data, "profile", console) == code
    text = console.export_text()
    assert text.count(status) == 4  # a progress line and a table row each


# Arguments and the choice of data


@pytest.mark.parametrize(("variable", "value", "message"), [
    ("TIER", "loose", "expected one of profile, contest, strict, got 'loose'"),
    ("FIB_DATASET_PATH", "/no/such/folder", "expected a folder, got /no/such/folder"),
])  # fmt: skip
def test_bad_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, variable: str, value: str, message: str
) -> None:
    """A misspelt TIER or data set ends the job with 2 and says what was expected."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit) as error:
        run.main([])
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_tier_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """TIER=strict chooses the tier, an option overrides it, an empty one means profile."""
    monkeypatch.delenv("FIB_DATASET_PATH", raising=False)
    monkeypatch.setenv("TIER", "strict")
    assert run.parse_arguments([]).tier == "strict"
    assert run.parse_arguments(["--tier", "contest"]).tier == "contest"
    monkeypatch.setenv("TIER", "")
    assert run.parse_arguments([]).tier == "profile"


def test_given_data_set_is_used(data: TraceSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """With FIB_DATASET_PATH its workloads are used, our solution is registered, others' traces stay, ours go."""
    workload = make_workload("small", 1)
    data.add_traces([make_trace(workload), make_trace(workload, solution="theirs")])
    monkeypatch.setenv("FIB_DATASET_PATH", str(data.root))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(run, "pack", lambda: make_solution("right"))
    monkeypatch.setattr(run, "assemble", lambda *_: pytest.fail("assembled a data set although one was given"))
    seen = []
    monkeypatch.setattr(run, "benchmark", lambda solution, data, arguments, console: seen.append(data) or 0)
    assert run.main([]) == 0
    assert [workload.uuid for workload in run.own_workloads(seen[0])] == ["small", "large"]
    assert [trace.solution for trace in seen[0].traces[DEFINITION_NAME]] == ["theirs"]
    assert seen[0].get_solution("ours") == make_solution("right")


def test_data_set_without_our_workloads_is_refused(
    data: TraceSet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A data set that holds no workload for our definition is an error, not an empty success."""
    shutil.rmtree(data.root / "workloads")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(run, "pack", lambda: make_solution("right"))
    assert run.main(["--dataset", str(data.root)]) == 1
    assert "expected workloads for" in capsys.readouterr().err


def test_without_gpu_small_workloads_are_assembled(
    data: TraceSet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Without a GPU the interpreter is on, a given data set stays untouched, and the output says what is checked."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(run, "pack", lambda: make_solution("right"))
    assembled = []
    monkeypatch.setattr(run, "assemble", lambda root, solution, chosen: assembled.append(chosen) or data.root)
    monkeypatch.setattr(run, "register", lambda *_: pytest.fail("registered in a data set that is not used"))
    assert run.main(["--dataset", str(data.root)]) == 0
    assert assembled == [small_workloads()] and run.os.environ["TRITON_INTERPRET"] == "1"
    assert "correctness, not speed" in capsys.readouterr().out


def test_runner_leaves_triton_to_be_imported_later() -> None:
    """TRITON_INTERPRET takes effect only if importing the runner and the packer does not import triton."""
    code = "import sys; from scripts import run; run.TraceSet; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# Accuracy


def test_matched_ratios() -> None:
    """An element matches by its absolute or its relative error; NaN and Inf match nothing at any tier."""
    reference = torch.tensor([[0.0, 100.0, 100.0, 1e6]])
    output = torch.tensor([[0.05, 100.5, 125.0, 1.5e6]])
    assert matched_ratios(output, reference) == {"profile": 0.5, "contest": 0.75, "strict": 0.25}
    for bad in (math.nan, math.inf):
        output[0, 0] = bad
        assert set(matched_ratios(output, reference).values()) == {0.0}


def test_assess_is_seeded(data: TraceSet) -> None:
    """The same workload gives the same inputs each time, so that accuracy can be compared between runs."""
    workload = run.own_workloads(data)[1]
    tolerance = Tolerance(rtol=0.01, atol=0.01, required_matched_ratio=1.0)
    first, second = (
        assess(data.definitions[DEFINITION_NAME], make_solution("right"), workload, data.root, "cpu", tolerance)
        for _ in range(2)
    )
    assert torch.equal(first.inputs[0], second.inputs[0]) and torch.equal(first.output, second.output)


# Ceilings and floor


def test_floor() -> None:
    """Floors agree with numbers worked out by hand: 44.04 MB + scales an expert, 88.08 MFLOP a row."""
    h100 = ceilings.Ceilings(read_bytes_per_s=3.07e12, fp8_flops_per_s=1.48e15)
    expert = 3 * 7168 * 2048 + 4 * (32 * 56 + 56 * 16)
    token = 7168 + 56 * 4 + 256 * 4 + 7168 * 2
    assert ceilings.bytes_moved(num_tokens=3, active_experts=2) == 2 * expert + 3 * token
    assert ceilings.floor_us(1, 1, 1, h100) == pytest.approx(14.4, abs=0.1)
    assert ceilings.floor_us(80, 151, 32, h100) == pytest.approx((32 * expert + 80 * token) / 3.07e6)
    assert ceilings.floor_us(11948, 10838, 32, h100) == pytest.approx(10838 * 88.080384e6 / 1.48e9)


@pytest.mark.parametrize("workload", [PUBLISHED[0], PUBLISHED[7], PUBLISHED[16], *small_workloads()], ids=str)
def test_local_rows(workload: object) -> None:
    """Rows and active experts counted from the router tensors are those that the tensors were made for."""
    counted = ceilings.local_rows(**router_tensors(workload), offset=workload.local_expert_offset)
    assert counted == (workload.num_rows, workload.active_experts)


@pytest.mark.parametrize(
    ("offset", "counted"), [(0, (24, 8)), (4, (12, 4)), (-28, (12, 4)), (8, (0, 0)), (-64, (0, 0))]
)
def test_local_rows_of_ties(offset: int, counted: tuple[int, int]) -> None:
    """With all scores equal the experts 0 to 7 are chosen, and only those within this rank count."""
    assert ceilings.local_rows(torch.zeros(3, 256), torch.zeros(256, dtype=torch.bfloat16), offset) == counted


def test_read_kernel_reads_everything() -> None:
    """The bandwidth kernel really reads its buffer: its tile sums are those of torch."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(3, 1024, device=device)
    sums = torch.full((3,), math.nan, device=device)
    ceilings.sum_tiles_kernel[(3,)](x, sums, BLOCK=1024)
    torch.testing.assert_close(sums, x.sum(dim=1), rtol=1e-4, atol=1e-3)


# Kernel spans

SPIN = "at::cuda::spin_kernel(long)"


def test_span_covers_overlapping_kernels() -> None:
    """A call's span runs from its first start to its last end, without flush and spin, in whatever order they come."""
    activities = [
        Activity("fill", 0.0, 90.0), Activity(SPIN, 90.0, 2090.0),
        Activity("gemm1", 2091.0, 2150.0), Activity("Memset", 2092.0, 2093.0), Activity("gemm2", 2140.0, 2145.0),
        Activity(SPIN, 2151.0, 2152.0),
        Activity("fill", 2152.0, 2242.0), Activity(SPIN, 2242.0, 4242.0),
        Activity("gemm1", 4243.0, 4253.0), Activity(SPIN, 4254.0, 4255.0),
    ]  # fmt: skip
    first, second = span.split_calls(activities[::-1], repeats=2)
    assert (first.span_us, first.spin_us, second.span_us, second.spin_us) == (59.0, 2000.0, 10.0, 2000.0)
    assert [activity.name for activity in first.activities] == ["gemm1", "Memset", "gemm2"]


def test_lost_records_are_an_error() -> None:
    """A profile without kernels, or with some lost, raises instead of giving a wrong time."""
    with pytest.raises(RuntimeError, match="expected 2 spin kernels in the profile, found 0"):
        span.split_calls([Activity("gemm1", 0.0, 1.0)], repeats=1)
    with pytest.raises(RuntimeError, match="the call launched nothing"):
        span.split_calls([Activity(SPIN, 0.0, 1.0), Activity(SPIN, 2.0, 3.0)], repeats=1)


def test_calls_that_were_not_queued_are_dropped() -> None:
    """A call launched too late measures Python; a few are dropped, and most of them being late is an error."""
    calls = [span.Call((Activity("gemm1", 7.0, 7.0 + span_us),), 2000.0) for span_us in (10.0, 20.0, 500.0)]
    assert span.summarize(span.queued_calls(calls, [300.0, 300.0, 5000.0])) == span.Span(15.0, 10.0, 20.0)
    with pytest.raises(RuntimeError, match="the call waits for the GPU"):
        span.queued_calls(calls, [300.0, 5000.0, 5000.0])


@needs_gpu
def test_span_of_a_real_call() -> None:
    """On a GPU the profiler delivers: reading 1 GiB takes no less than HBM allows, and a waiting call is refused."""
    x = torch.ones(2**28, device="cuda")
    measured = span.measure_span(x.sum)
    assert 2**30 / 20e12 * 1e6 < measured.min_us <= measured.median_us <= measured.max_us
    with pytest.raises(RuntimeError, match="the call waits for the GPU"):
        span.measure_span(lambda: x.sum().item())


@needs_gpu
def test_ceilings_of_a_real_gpu() -> None:
    """Both ceilings are those of a data-centre GPU, in bytes/s and FLOP/s."""
    measured = ceilings.measure_ceilings()
    assert 1e12 < measured.read_bytes_per_s < 20e12 and 0.5e15 < measured.fp8_flops_per_s < 20e15


# The table


def test_table(console: Console) -> None:
    """Rows come ordered by T, missing values as dashes, and a mean is only given over complete values."""
    done = report.Record(
        "b", 7, 0, "PASSED", 18, 12, 0.5, 20.0, 200.0, (190.0, 210.0), 160.0, dict.fromkeys(TIERS, 0.875)
    )
    faster = report.Record("a", 1, 0, "PASSED", 5, 5, 0.25, 20.0, 90.0, (80.0, 95.0), 72.0, dict.fromkeys(TIERS, 1.0))
    console.print(report.render([report.Record("c", 901, 0, "TIMEOUT"), done, faster], "title"))
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in console.export_text().splitlines()]
    rows = [row for row in cells if row and row != [""] * len(row)]
    assert [row[0] for row in rows[:3]] == ["1", "7", "901"]
    assert rows[1][1:] == ["18", "12", "PASSED", "200.0", "190-210", "0.500", "40.0", "1.25", *["0.8750"] * 3]
    assert rows[2][1:] == ["-", "-", "TIMEOUT", *["-"] * 8]
    assert rows[3][3:9] == ["geomean T <= 80", f"{math.sqrt(200 * 90):.1f}", "", "", "56.6", "1.25"]
    assert rows[4][3:9] == ["geomean all", "-", "", "", "-", "-"]


def test_commit_of_no_checkout_is_unknown(tmp_path: Path) -> None:
    """Outside a git checkout the results do not invent a commit."""
    assert report.git_commit(tmp_path) is None


# The Makefile


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_ready_interpreter_makes_no_environment() -> None:
    """`make run PY=...` runs with that interpreter and installs nothing."""
    command = ["make", "--dry-run", "run", "PY=some-python", "ARGS=--tier strict"]
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of `make test`
    printed = subprocess.run(command, cwd=ROOT, env=outside, capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == ["some-python -m scripts.run --tier strict"]
