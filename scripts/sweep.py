"""The sweep: how `run()` does over T, active experts and spreads of the rows, and where its microseconds go.

    python -m scripts.sweep [--only tokens experts spreads stages host] [--check]

Needs a CUDA GPU; takes a minute or two. Every point is the kernels' span on a cold L2 (scripts/span.py) with the floor
from ceilings measured in the same run. results/<gpu>-sweep.json is written after every point, so that an interrupted
run keeps what it measured; it holds the parts of one run and replaces an earlier one.

Exit status: 0; 1 without a GPU, or with --check when the sweep misses what it has to show; 2 for bad arguments.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from flashinfer_bench.bench.utils import gen_inputs
from flashinfer_bench.data import RandomInput, ScalarInput, Workload
from rich.console import Console
from rich.progress import track

from scripts.ceilings import Ceilings, floor_us, local_rows, measure_ceilings
from scripts.pack import ROOT, load_definition
from scripts.report import commit_to_record, results_path, versions, write_json
from scripts.span import measure_span, record_calls
from scripts.stages import kernel_times
from scripts.sweep_report import (
    Breakdown,
    HostTime,
    Point,
    Sweep,
    host_table,
    point_table,
    render_table,
    stage_table,
)
from scripts.workloads import (
    NUM_LOCAL_EXPERTS,
    PUBLISHED,
    ROUTED_SCALING_FACTOR,
    SPREADS,
    SWEEP_OFFSET,
    drawn_router,
    router_tensors,
    spread_router,
    spread_rows,
)
from solution.triton.main import run
from solution.triton.tuning import TABLES

DEVICE = "cuda:0"
MAX_TOKENS = 32_768
REGIME_STARTS = {row.max_tokens + 1 for rows in TABLES.values() for row in rows if row.max_tokens < MAX_TOKENS}
TOKENS = sorted({
    *range(1, 17), *range(24, 129, 8), 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12_288,
    16_384, 24_576, MAX_TOKENS,
} | REGIME_STARTS)  # fmt: skip
EXPERTS_TOKENS, ROWS_PER_EXPERT = 32, 2
SPREAD_TOKENS = (8192, 14_107)  # with as many rows: an eighth of the pairs is local
STAGE_TOKENS = (1, 16, 80, 901, 4096, 8192, 14_107)
HOST_TOKENS = (7, 1024)
HOST_CALLS = 100  # few enough that the host never waits for room in the stream's queue


@dataclass(frozen=True)
class Bench:
    """Inputs for up to MAX_TOKENS tokens, made once, and how to measure with them."""

    inputs: dict[str, object]  # the definition's, by name
    ceilings: Ceilings
    repeats: int

    def call(self, router: dict[str, torch.Tensor], offset: int) -> Callable[[], None]:
        """A call of `run()` with these router tensors and as many of the tokens."""
        router = {name: tensor.to(self.inputs["hidden_states"].device) for name, tensor in router.items()}
        num_tokens = len(router["routing_logits"])
        hidden_states = self.inputs["hidden_states"][:num_tokens]
        arguments = self.inputs | router | {
            "hidden_states": hidden_states,
            "hidden_states_scale": self.inputs["hidden_states_scale"][:, :num_tokens].contiguous(),
            "local_expert_offset": offset,
            "output": torch.empty_like(hidden_states, dtype=torch.bfloat16),
        }
        return lambda: run(**arguments)

    def point(self, spread: str, make_router: Callable[..., dict[str, torch.Tensor]], *arguments: object) -> Point:
        """The span of a call at SWEEP_OFFSET with the router tensors make_router(*arguments)."""
        router = make_router(*arguments)
        num_tokens = len(router["routing_logits"])
        rows, active_experts = local_rows(**router, offset=SWEEP_OFFSET)
        span = measure_span(self.call(router, SWEEP_OFFSET), self.repeats)
        floor = floor_us(num_tokens, rows, active_experts, self.ceilings)
        return Point(num_tokens, spread, rows, active_experts, span.median_us, (span.min_us, span.max_us), floor)

    def breakdown(self, num_tokens: int) -> Breakdown:
        """Where the microseconds of the published workload with T tokens go, or of a drawn one."""
        published = {workload.num_tokens: workload for workload in PUBLISHED}.get(num_tokens)
        router = router_tensors(published) if published else drawn_router(num_tokens)
        offset = published.local_expert_offset if published else SWEEP_OFFSET
        calls = record_calls(self.call(router, offset), self.repeats)
        return Breakdown(num_tokens, *local_rows(**router, offset=offset), kernel_times(calls))

    def host_time(self, num_tokens: int) -> HostTime:
        """Host time of a call from an idle GPU, and of one after the other."""
        call = self.call(drawn_router(num_tokens), SWEEP_OFFSET)
        call()
        idle_us, queued_us = [], []
        for _ in range(HOST_CALLS):
            torch.cuda.synchronize()
            idle_us.append(_host_us(call))
        torch.cuda.synchronize()
        for _ in range(HOST_CALLS):
            queued_us.append(_host_us(call))
        torch.cuda.synchronize()
        return HostTime(num_tokens, statistics.median(idle_us), statistics.median(queued_us))


def _host_us(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e6


def make_inputs(num_tokens: int, device: str) -> dict[str, object]:
    """flashinfer-bench's random inputs by name: float8 and scales from N(0, 1). 1.4 GB of weights, 12 KB a token."""
    definition = load_definition()
    inputs = {name: RandomInput() for name in definition.inputs}
    inputs["local_expert_offset"] = ScalarInput(value=SWEEP_OFFSET)
    inputs["routed_scaling_factor"] = ScalarInput(value=ROUTED_SCALING_FACTOR)
    torch.manual_seed(0)
    workload = Workload(axes={"seq_len": num_tokens}, inputs=inputs, uuid="sweep")
    return dict(zip(definition.inputs, gen_inputs(definition, workload, device)))


# Part of the results -> its measurements, in the order of measuring: host time comes first, before any profiler was on.
PARTS: dict[str, Callable[[Bench], list[Callable[[], object]]]] = {
    "host": lambda bench: [partial(bench.host_time, T) for T in HOST_TOKENS],
    "tokens": lambda bench: [partial(bench.point, "drawn", drawn_router, T) for T in TOKENS],
    "experts": lambda bench: [
        partial(bench.point, "equal", spread_router, [ROWS_PER_EXPERT] * active_experts, EXPERTS_TOKENS)
        for active_experts in range(1, NUM_LOCAL_EXPERTS + 1)
    ],
    "spreads": lambda bench: [
        partial(bench.point, spread, spread_router, spread_rows(weights, T), T)
        for T in SPREAD_TOKENS
        for spread, weights in SPREADS.items()
    ],
    "stages": lambda bench: [partial(bench.breakdown, T) for T in STAGE_TOKENS],
}


def measure(bench: Bench, sweep: Sweep, parts: Collection[str], path: Path, console: Console) -> None:
    """Measure the parts into `sweep`, writing it to `path` after every point."""
    for part, measurements in PARTS.items():
        if part not in parts:
            continue
        for measurement in track(measurements(bench), part, console=console):
            getattr(sweep, part).append(measurement())
            write_json(path, dataclasses.asdict(sweep))


def report(sweep: Sweep, console: Console) -> None:
    """Print the tables of what was measured, then what the sweep misses."""
    for part in ("tokens", "experts", "spreads"):
        if getattr(sweep, part):
            console.print(render_table(point_table(getattr(sweep, part)), part))
    if sweep.stages:
        console.print(render_table(stage_table(sweep), "where the microseconds go"))
    if sweep.host:
        console.print(render_table(host_table(sweep.host), "host time of one call"))
    misses = sweep.misses()
    console.print(f"misses: {len(misses)}")
    for miss in misses:
        console.print(f"- {miss.text}", style="red")


def driver_version() -> str | None:
    """Version of the GPU's driver; None where nvidia-smi is not installed or fails."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, check=True, capture_output=True, text=True).stdout.split()[0]
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.sweep", description="Sweep T, experts and spreads.")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
                        help=f"measure these parts alone, of {', '.join(PARTS)}; the file holds no others then")
    parser.add_argument("--out", type=Path, default=ROOT / "results", metavar="DIR",
                        help="where the results go (default: results)")
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="calls of a point (default: 20)")
    parser.add_argument("--check", action="store_true", help="exit with 1 when the sweep misses what it has to show")
    parser.add_argument("--commit", help="commit to note in the results (default: that of the checkout)")
    arguments = parser.parse_args(argv)
    if arguments.repeats <= 0:
        parser.error(f"--repeats: expected a positive number of calls, got {arguments.repeats}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if not torch.cuda.is_available():
        print("error: the sweep measures a CUDA GPU, and none was found", file=sys.stderr)
        return 1
    console = Console(width=None if sys.stdout.isatty() else 140, markup=False)
    commit = commit_to_record(arguments.commit, ROOT, console)
    gpu = torch.cuda.get_device_name(DEVICE)
    ceilings = measure_ceilings(DEVICE)
    sweep = Sweep(gpu, driver_version(), versions(), commit, ceilings, arguments.repeats)
    path = results_path(arguments.out, gpu, "sweep")
    bench = Bench(make_inputs(MAX_TOKENS, DEVICE), ceilings, arguments.repeats)
    measure(bench, sweep, arguments.only, path, console)
    report(sweep, console)
    console.print(f"results in {path}")
    return int(arguments.check and bool(sweep.misses()))


if __name__ == "__main__":
    sys.exit(main())
