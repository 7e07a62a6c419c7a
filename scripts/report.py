"""The result of a run: one table for the terminal, one JSON file for the repository."""

from __future__ import annotations

import dataclasses
import json
import platform
import re
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from flashinfer_bench.data import EvaluationStatus
from flashinfer_bench.utils import env_snapshot
from rich.console import Console
from rich.table import Table

from scripts.accuracy import TIERS

PASSED = EvaluationStatus.PASSED.value
DECODE_TOKENS = 80  # up to here the published workloads are decode steps, from 901 on prefill


@dataclass(frozen=True)
class Record:
    """One workload's result. What was not measured is None.

    status: flashinfer-bench's, or what is wrong with the number of traces.
    benchmark_latency_ms, reference_latency_ms: as flashinfer-bench reports them, launch gaps included.
    latency_us, latency_us_range: median and (min, max) of the kernels' span on a cold L2.
    matched: tier -> share (0 to 1) of matched output elements.
    """

    uuid: str
    T: int
    offset: int
    status: str
    rows: int | None = None
    active_experts: int | None = None
    benchmark_latency_ms: float | None = None
    reference_latency_ms: float | None = None
    latency_us: float | None = None
    latency_us_range: tuple[float, float] | None = None
    floor_us: float | None = None
    matched: dict[str, float] | None = None

    @property
    def time_over_floor(self) -> float | None:
        return self.latency_us / self.floor_us if self.latency_us and self.floor_us else None

    @property
    def speedup(self) -> float | None:
        """Reference time over solution time, both flashinfer-bench's."""
        timed = self.benchmark_latency_ms and self.reference_latency_ms
        return self.reference_latency_ms / self.benchmark_latency_ms if timed else None


def exit_status(records: Sequence[Record]) -> int:
    """0 when there are records and every one passed, else 1."""
    return 0 if records and all(record.status == PASSED for record in records) else 1


def geometric_mean(values: Sequence[float | None]) -> float | None:
    """Geometric mean, or None when there is no value or one is missing: a mean over the rest would flatter."""
    return statistics.geometric_mean(values) if values and None not in values else None


def render(records: Sequence[Record], title: str) -> Table:
    """One line a workload, ordered by T, then the geometric means; columns that nobody filled are left out."""
    ordered = sorted(records, key=lambda record: record.T)
    columns: list[tuple[str, Callable[[Record], object], str]] = [
        ("T", lambda r: r.T, "{}"),
        ("rows", lambda r: r.rows, "{}"),
        ("active\nexperts", lambda r: r.active_experts, "{}"),
        ("status", lambda r: r.status, "{}"),
        ("latency\nus", lambda r: r.latency_us, "{:.1f}"),
        ("min-max\nus", lambda r: r.latency_us_range, "{0[0]:.0f}-{0[1]:.0f}"),
        ("benchmark\nms", lambda r: r.benchmark_latency_ms, "{:.3f}"),
        ("speedup over\nreference", lambda r: r.speedup, "{:.1f}"),
        ("time /\nfloor", lambda r: r.time_over_floor, "{:.2f}"),
        *((f"matched\n{tier}", lambda r, tier=tier: r.matched and r.matched[tier], "{:.4f}") for tier in TIERS),
    ]
    columns = [column for column in columns if any(column[1](record) is not None for record in ordered)]
    table = Table(title=title)
    for header, _, _ in columns:
        table.add_column(header, justify="left" if header == "status" else "right", no_wrap=True)
    for record in ordered:
        table.add_row(*(_cell(value(record), form) for _, value, form in columns))

    averaged = {"latency\nus", "speedup over\nreference", "time /\nfloor"}
    decode = [record for record in ordered if record.T <= DECODE_TOKENS]
    for label, chosen in ((f"geomean T <= {DECODE_TOKENS}", decode), ("geomean all", ordered)):
        means = {
            header: _cell(geometric_mean([value(record) for record in chosen]), form)
            for header, value, form in columns
            if header in averaged
        }
        if means:
            table.add_section()
            table.add_row(*(label if header == "status" else means.get(header, "") for header, _, _ in columns))
    return table


def _cell(value: object, form: str) -> str:
    return "-" if value is None else form.format(value)


def write_results(
    folder: Path, gpu: str, tier: str, commit: str | None, ceilings: object, records: Sequence[Record]
) -> Path:
    """Write <folder>/<gpu>.json, or <folder>/<gpu>-<tier>.json for another tier than profile; return its path.

    Times are in the unit their name ends with; ceilings (scripts.ceilings.Ceilings) in bytes/s and FLOP/s.
    """
    results = {
        "gpu": gpu,
        "tier": tier,
        "versions": versions(),
        "commit": commit,
        "ceilings": dataclasses.asdict(ceilings),
        "workloads": [
            {**dataclasses.asdict(record), "time_over_floor": record.time_over_floor}
            for record in sorted(records, key=lambda record: record.T)
        ],
    }
    path = results_path(folder, gpu, "" if tier == "profile" else tier)
    write_json(path, results)
    return path


def results_path(folder: Path, gpu: str, kind: str = "") -> Path:
    """<folder>/<gpu>.json, or <folder>/<gpu>-<kind>.json."""
    slug = re.sub("[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return folder / (f"{slug}-{kind}.json" if kind else f"{slug}.json")


def write_json(path: Path, results: dict) -> None:
    """Write results to path, whole or not at all; ValueError for a NaN or an Inf."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".json.new")
    scratch.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
    scratch.replace(path)


def read_records(results: dict) -> list[Record]:
    """The records of a results file that `write_results` wrote."""
    names = {field.name for field in dataclasses.fields(Record)}
    return [Record(**{name: workload[name] for name in names}) for workload in results["workloads"]]


def versions() -> dict[str, str]:
    """Versions of what decides a result: Python, flashinfer-bench, torch, triton and, where there is one, CUDA."""
    return {
        "python": platform.python_version(),
        "flashinfer-bench": version("flashinfer-bench"),
        **env_snapshot("cpu").libs,
    }


def commit_to_record(given: str | None, root: Path, console: Console) -> str | None:
    """The commit given on the command line, else the checkout's; without either, None and a warning."""
    commit = given or git_commit(root)
    if commit is None:
        console.print("no git checkout and no --commit: the results do not name their commit", style="yellow")
    return commit


def git_commit(root: Path) -> str | None:
    """Commit of the checkout at `root`, with "-dirty" after it when tracked files differ; None outside a checkout."""
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(describe, check=True, capture_output=True, text=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
