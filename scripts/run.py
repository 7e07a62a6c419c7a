"""The main job: benchmark the solution with flashinfer-bench, measure it, print one table.

    python -m scripts.run [--tier profile|contest|strict]

With a CUDA GPU: the 19 published workloads, or those of the data set that FIB_DATASET_PATH names, go through
`flashinfer-bench run`; then the GPU's ceilings, each workload's kernels and its accuracy are measured and
results/<gpu>.json is written. Without one: a few small workloads go through flashinfer-bench's evaluator with the
kernels in Triton's interpreter, which checks correctness and not speed.

Exit status: 0 when every workload passed, 1 when one did not or the job failed, 2 for bad arguments.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from flashinfer_bench.compile import BuilderRegistry
from flashinfer_bench.data import Evaluation, EvaluationStatus, Solution, Trace, TraceSet, Workload
from rich.console import Console
from rich.progress import track

from scripts.accuracy import TIERS, Outcome, Tolerance, assess
from scripts.dataset import assemble, register
from scripts.pack import DEFINITION_NAME, ROOT, pack
from scripts.report import PASSED, Record, commit_to_record, exit_status, render, write_results
from scripts.workloads import PUBLISHED, PublishedWorkload, small_workloads

if TYPE_CHECKING:
    from scripts.ceilings import Ceilings

# Without a GPU, TRITON_INTERPRET has to be set before triton is imported. Nothing above does that; ceilings and span
# do and are imported where they are used.

SCRATCH = ROOT / "build" / "dataset"
DEVICE = "cuda:0"
MEASURABLE = {EvaluationStatus.PASSED.value, EvaluationStatus.INCORRECT_NUMERICAL.value}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    console = Console(width=None if sys.stdout.isatty() else 140, markup=False)
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ["TRITON_INTERPRET"] = "1"
        console.print("No CUDA GPU: the kernels run in Triton's interpreter. This checks correctness, not speed.")
        # numpy speaks of what a GPU does silently: sigmoid and SiLU rely on exp's overflow to inf.
        warnings.filterwarnings("ignore", "overflow encountered", RuntimeWarning)
        if arguments.dataset:
            console.print(f"{arguments.dataset} is left alone: its workloads need a GPU.")
    try:
        solution = pack()
        data = prepare_data(solution, arguments.dataset if on_gpu else None, PUBLISHED if on_gpu else small_workloads())
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if on_gpu:
        return benchmark(solution, data, arguments, console)
    return interpret(solution, data, arguments.tier, console)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments, with TIER and FIB_DATASET_PATH from the environment as defaults. Exits with 2 for bad values."""
    parser = argparse.ArgumentParser(prog="python -m scripts.run", description="Benchmark and measure the solution.")
    parser.add_argument(
        "--tier",
        default=os.environ.get("TIER") or "profile",
        metavar="|".join(TIERS),
        help="tolerance to pass at (default: $TIER or profile)",
    )
    parser.add_argument(
        "--dataset",
        default=os.environ.get("FIB_DATASET_PATH") or None,
        metavar="DIR",
        help="flashinfer-bench data set to register in and to take the workloads from "
        "(default: $FIB_DATASET_PATH, or one assembled here); needs a GPU",
    )
    parser.add_argument(
        "--timeout", type=int, default=300, metavar="S", help="flashinfer-bench's limit for one workload (default: 300)"
    )
    parser.add_argument(
        "--isolated", action="store_true", help="let flashinfer-bench use its isolated runner, as the contest does"
    )
    parser.add_argument(
        "--results-dir", type=Path, default=ROOT / "results", metavar="DIR", help="where results go (default: results)"
    )
    parser.add_argument("--commit", help="commit to note in the results (default: that of the checkout)")
    arguments = parser.parse_args(argv)
    if arguments.tier not in TIERS:
        parser.error(f"tier (--tier or TIER): expected one of {', '.join(TIERS)}, got {arguments.tier!r}")
    if arguments.timeout <= 0:
        parser.error(f"--timeout: expected a positive number of seconds, got {arguments.timeout}")
    if arguments.dataset is not None:
        arguments.dataset = Path(arguments.dataset).expanduser()
        if not arguments.dataset.is_dir():
            parser.error(f"data set (--dataset or FIB_DATASET_PATH): expected a folder, got {arguments.dataset}")
    return arguments


def prepare_data(solution: Solution, dataset: Path | None, workloads: Sequence[PublishedWorkload]) -> TraceSet:
    """A data set without traces of `solution`: the given one with `solution` registered, or one with `workloads`.

    Raises OSError or ValueError when it cannot be read or written, or holds no workload for our definition.
    """
    if dataset:
        register(dataset, solution)
        forget_traces(dataset, solution)
    data = TraceSet.from_path(str(dataset or assemble(SCRATCH, solution, workloads)))
    if not data.workloads.get(DEFINITION_NAME):
        raise ValueError(f"{data.root}: expected workloads for {DEFINITION_NAME}, found none")
    return data


def interpret(solution: Solution, data: TraceSet, tier: str, console: Console) -> int:
    """Check the solution on the CPU, with flashinfer-bench's evaluator. Returns the exit status."""
    records = []
    for workload in own_workloads(data):
        start = time.monotonic()
        with console.status(f"T={workload.axes['seq_len']}: reference, then interpreted kernels (minutes)"):
            record = check(data, solution, workload, TIERS[tier])
        console.print(f"T={record.T}: {record.status} in {time.monotonic() - start:.0f} s")
        records.append(record)
    console.print(render(records, f"{solution.name}, interpreted, tier {tier}"))
    return exit_status(records)


def check(data: TraceSet, solution: Solution, workload: Workload, tolerance: Tolerance) -> Record:
    """flashinfer-bench's verdict on one call on the CPU, and the accuracy."""
    outcome = assess(data.definitions[DEFINITION_NAME], solution, workload, data.root, "cpu", tolerance)
    return with_accuracy(new_record(workload, outcome.status.value), outcome)


def benchmark(solution: Solution, data: TraceSet, arguments: argparse.Namespace, console: Console) -> int:
    """Run flashinfer-bench on the GPU, measure, print, write results. Returns the exit status."""
    from scripts.ceilings import measure_ceilings

    workloads, tolerance = own_workloads(data), TIERS[arguments.tier]
    console.print(f"{solution.name}: {len(workloads)} workloads of {data.root} at tier {arguments.tier}")
    run_flashinfer_bench(data.root, solution, tolerance, arguments.timeout, arguments.isolated)
    traces = own_traces(data.root, solution)
    records = [judge(workload, traces) for workload in workloads]
    for workload, record in zip(workloads, records):
        if record.status != PASSED:
            console.print(f"T={record.T} {record.uuid}: {failure(workload, traces)}", style="red")

    ceilings = measure_ceilings(DEVICE)
    console.print(
        f"ceilings: read {ceilings.read_bytes_per_s / 1e12:.2f} TB/s, fp8 {ceilings.fp8_flops_per_s / 1e12:.0f} TFLOP/s"
    )
    records = [
        measure(record, data, solution, workload, tolerance, ceilings)
        for workload, record in track(list(zip(workloads, records)), "measuring", console=console)
    ]
    gpu = torch.cuda.get_device_name(DEVICE)
    console.print(render(records, f"{solution.name} on {gpu}, tier {arguments.tier}"))
    commit = commit_to_record(arguments.commit, ROOT, console)
    path = write_results(arguments.results_dir, gpu, arguments.tier, commit, ceilings, records)
    passed = sum(record.status == PASSED for record in records)
    console.print(f"{passed}/{len(records)} PASSED; results in {path}")
    return exit_status(records)


def own_workloads(data: TraceSet) -> list[Workload]:
    return [trace.workload for trace in data.workloads[DEFINITION_NAME]]


def own_traces(root: Path, solution: Solution) -> list[Trace]:
    traces = TraceSet.from_path(str(root)).traces.get(DEFINITION_NAME, [])
    return [trace for trace in traces if trace.solution == solution.name]


def forget_traces(root: Path, solution: Solution) -> None:
    """Remove earlier traces of `solution` for our definition from the data set; every other line stays as it is."""
    for path in sorted((root / "traces").rglob("*.jsonl")):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if not _is_own(line, solution)]
        if len(kept) < len(lines):
            scratch = path.with_suffix(".jsonl.new")
            scratch.write_text("".join(kept), encoding="utf-8")
            scratch.replace(path)


def _is_own(line: str, solution: Solution) -> bool:
    if not line.strip():
        return False
    trace = Trace.model_validate_json(line)
    return trace.definition == DEFINITION_NAME and trace.solution == solution.name


def run_flashinfer_bench(root: Path, solution: Solution, tolerance: Tolerance, timeout: int, isolated: bool) -> None:
    """Run the real `flashinfer-bench run`, its progress going to the terminal. It exits with 0 when a solution fails:
    the verdict is in the traces. subprocess.CalledProcessError when the benchmark itself broke."""
    command = [flashinfer_bench_cli(), "run", "--local", str(root)]
    command += ["--definitions", DEFINITION_NAME, "--solutions", solution.name]
    command += ["--rtol", str(tolerance.rtol), "--atol", str(tolerance.atol)]
    command += ["--required-matched-ratio", str(tolerance.required_matched_ratio), "--timeout", str(timeout)]
    command += ["--use-isolated-runner"] if isolated else []
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def flashinfer_bench_cli() -> str:
    """Path of the flashinfer-bench command: beside this interpreter, else on PATH; FileNotFoundError if neither."""
    name = "flashinfer-bench"
    path = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if path is None:
        raise FileNotFoundError(f"{name}: expected the command beside {sys.executable} or on PATH, found neither")
    return path


def judge(workload: Workload, traces: Sequence[Trace]) -> Record:
    """What flashinfer-bench's traces of our solution say of `workload`: it takes exactly one PASSED trace to pass."""
    evaluations = _evaluations(workload, traces)
    if len(evaluations) != 1:
        return new_record(workload, f"{len(evaluations)} TRACES")
    record = new_record(workload, evaluations[0].status.value)
    performance = evaluations[0].performance
    if performance is None:
        return record
    return replace(
        record,
        benchmark_latency_ms=performance.latency_ms,
        reference_latency_ms=performance.reference_latency_ms or None,
    )


def failure(workload: Workload, traces: Sequence[Trace]) -> str:
    """Why `workload` did not pass, in one line: number of traces, errors, or the end of the evaluation's log."""
    evaluations = _evaluations(workload, traces)
    if len(evaluations) != 1:
        return f"expected one trace, found {len(evaluations)}"
    evaluation = evaluations[0]
    if evaluation.correctness:
        errors = evaluation.correctness
        matched = (errors.extra or {}).get("matched_ratio", "none, output has NaN or Inf")
        return f"{evaluation.status.value}: matched ratio {matched}, largest absolute error {errors.max_absolute_error}"
    log = evaluation.log.strip().splitlines() or ["no log"]
    return f"{evaluation.status.value}: {log[-1]}"


def _evaluations(workload: Workload, traces: Sequence[Trace]) -> list[Evaluation]:
    return [trace.evaluation for trace in traces if trace.workload.uuid == workload.uuid and trace.evaluation]


def new_record(workload: Workload, status: str) -> Record:
    offset = workload.inputs["local_expert_offset"].value
    return Record(uuid=workload.uuid, T=workload.axes["seq_len"], offset=offset, status=status)


def with_accuracy(record: Record, outcome: Outcome) -> Record:
    """`record` with the rows and active experts that the workload's router tensors give, and the matched shares."""
    from scripts.ceilings import local_rows

    rows, active_experts = local_rows(*outcome.inputs[:2], record.offset)
    return replace(record, rows=rows, active_experts=active_experts, matched=outcome.matched)


def measure(
    record: Record, data: TraceSet, solution: Solution, workload: Workload, tolerance: Tolerance, ceilings: Ceilings
) -> Record:
    """`record` with accuracy, kernel span and floor. A solution that raised or hung in the benchmark is left alone.

    A workload that passed there and fails here, on other random inputs, gets the status that it has here.
    """
    from scripts.ceilings import floor_us
    from scripts.span import measure_span

    if record.status not in MEASURABLE:
        return record
    definition = data.definitions[DEFINITION_NAME]
    outcome = assess(definition, solution, workload, data.root, DEVICE, tolerance)
    if record.status == PASSED:
        record = replace(record, status=outcome.status.value)
    record = with_accuracy(record, outcome)
    if outcome.output is None:
        return record
    runnable = BuilderRegistry.get_instance().build(definition, solution)
    span = measure_span(lambda: runnable(*outcome.inputs, outcome.output))
    return replace(
        record,
        latency_us=span.median_us,
        latency_us_range=(span.min_us, span.max_us),
        floor_us=floor_us(record.T, record.rows, record.active_experts, ceilings),
    )


if __name__ == "__main__":
    sys.exit(main())
