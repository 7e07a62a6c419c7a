"""The result of a sweep: what was measured, where it misses what it has to show, and the tables of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from rich.table import Table

from scripts.ceilings import Ceilings, flops, weight_bytes
from scripts.report import DECODE_TOKENS
from scripts.stages import MATRICES, OTHER, STAGES, KernelTime

PREFILL_TOKENS = 128  # from here on the span is compared with the floor
STEP_TOKENS = 256  # up to here a step has to be a new expert's weights
MAX_OVER_FLOOR = 1.75
MAX_OVER_NEXT = 1.05
MAX_OVER_NEIGHBOURS = 1.05
WEIGHTS_OVER_FLOOR = 1.25  # what a new expert's weights may cost, as a multiple of their floor
MAX_STEP = 0.05
MAX_OVER_EQUAL = 1.1
MAX_BESIDE_GEMMS_US = 10.0


@dataclass(frozen=True)
class Point:
    """One measured workload: median and (min, max) of the kernels' span on a cold L2, in microseconds."""

    T: int
    spread: str  # how its rows are divided among the experts
    rows: int  # (token, local expert) pairs
    active_experts: int
    latency_us: float
    latency_us_range: tuple[float, float]
    floor_us: float

    @property
    def time_over_floor(self) -> float:
        return self.latency_us / self.floor_us


@dataclass(frozen=True)
class Breakdown:
    """Where the microseconds of one workload's span go."""

    T: int
    rows: int
    active_experts: int
    kernels: list[KernelTime]

    @property
    def span_us(self) -> float:
        return sum(kernel.own_us + kernel.gap_us for kernel in self.kernels)

    @property
    def overlap_us(self) -> float:
        """What the kernels' early starts hide, in sum."""
        return sum(kernel.overlap_us for kernel in self.kernels)

    @property
    def beside_gemms_us(self) -> float:
        """The part of the span in which no GEMM streams weights: other kernels' own time, and the gaps."""
        return sum(kernel.gap_us + (0 if kernel.stage in MATRICES else kernel.own_us) for kernel in self.kernels)

    def own_us(self, stage: str, kernel: str | None = None) -> float:
        """Own time of a stage's kernels, or of those of one name."""
        return sum(row.own_us for row in self.kernels if row.stage == stage and kernel in (None, row.kernel))


@dataclass(frozen=True)
class Miss:
    """A measurement that is not as it has to be."""

    text: str  # what it is and what it may be at most
    measured: Point | Breakdown


@dataclass(frozen=True)
class HostTime:
    """Median microseconds that one call of `run()` takes the host."""

    T: int
    idle_us: float  # from an idle GPU
    queued_us: float  # in a row of calls, the GPU being behind


@dataclass(frozen=True)
class Sweep:
    """One run of the sweep. A part that was not measured, or not to its end, holds what there is."""

    gpu: str
    driver: str | None
    versions: dict[str, str]
    commit: str | None
    ceilings: Ceilings
    repeats: int  # calls of a point
    tokens: list[Point] = field(default_factory=list)
    experts: list[Point] = field(default_factory=list)
    spreads: list[Point] = field(default_factory=list)
    stages: list[Breakdown] = field(default_factory=list)
    host: list[HostTime] = field(default_factory=list)

    def misses(self) -> list[Miss]:
        """Where the sweep misses what it has to show."""
        return [
            *token_misses(self.tokens),
            *expert_misses(self.experts),
            *spread_misses(self.spreads),
            *stage_misses(self.stages),
        ]


def read_sweep(path: Path) -> Sweep:
    """Read what `scripts.report.write_json` made of `dataclasses.asdict` of a sweep."""
    data = json.loads(path.read_text(encoding="utf-8"))
    data["ceilings"] = Ceilings(**data["ceilings"])
    for part in ("tokens", "experts", "spreads"):
        data[part] = [Point(**point | {"latency_us_range": tuple(point["latency_us_range"])}) for point in data[part]]
    data["stages"] = [
        Breakdown(**entry | {"kernels": [KernelTime(**kernel) for kernel in entry["kernels"]]})
        for entry in data["stages"]
    ]
    data["host"] = [HostTime(**entry) for entry in data["host"]]
    return Sweep(**data)


def token_misses(points: Sequence[Point]) -> list[Miss]:
    """Of a sweep over T, ascending: a T slower than a larger one, a step of its own, a span far above the floor."""
    misses = []
    for point, following in pairwise(points):
        if point.latency_us > MAX_OVER_NEXT * following.latency_us:
            misses.append(Miss(f"T = {point.T}: {point.latency_us / following.latency_us:.2f} x T = {following.T} "
                               f"(at most {MAX_OVER_NEXT})", point))
        weights_us = WEIGHTS_OVER_FLOOR * (following.floor_us - point.floor_us)
        step_us = following.latency_us - point.latency_us - weights_us
        if following.T <= STEP_TOKENS and step_us > MAX_STEP * point.latency_us:
            misses.append(Miss(f"T = {following.T}: {step_us:.0f} us more than T = {point.T} and "
                               f"{WEIGHTS_OVER_FLOOR} x the floor's step (at most {MAX_STEP:.0%} of "
                               f"{point.latency_us:.0f})", following))
    misses += [Miss(f"T = {point.T}: {point.time_over_floor:.2f} x floor (at most {MAX_OVER_FLOOR})", point)
               for point in points if point.T >= PREFILL_TOKENS and point.time_over_floor > MAX_OVER_FLOOR]
    return misses


def expert_misses(points: Sequence[Point]) -> list[Miss]:
    """Of a sweep over 1, 2, 3, ... active experts: a span above the line between its neighbours."""
    misses = []
    for left, point, right in zip(points, points[1:], points[2:]):
        line_us = (left.latency_us + right.latency_us) / 2
        if point.latency_us > MAX_OVER_NEIGHBOURS * line_us:
            misses.append(Miss(f"{point.active_experts} active experts: {point.latency_us / line_us:.2f} x the line "
                               f"between {left.active_experts} and {right.active_experts} "
                               f"(at most {MAX_OVER_NEIGHBOURS})", point))
    return misses


def spread_misses(points: Sequence[Point]) -> list[Miss]:
    """Of spreads at several T: a time over the floor well above that of equal groups at the same T."""
    equal = {point.T: point.time_over_floor for point in points if point.spread == "equal"}
    return [Miss(f"T = {point.T}, {point.spread}: {point.time_over_floor:.2f} x floor, equal groups "
                 f"{equal[point.T]:.2f} (at most {MAX_OVER_EQUAL} x that)", point)
            for point in points
            if point.T in equal and point.time_over_floor > MAX_OVER_EQUAL * equal[point.T]]


def stage_misses(breakdowns: Sequence[Breakdown]) -> list[Miss]:
    """Of decode steps: more microseconds beside the GEMMs than allowed."""
    return [Miss(f"T = {entry.T}: routing, finalize and gaps take {entry.beside_gemms_us:.1f} us "
                 f"(at most {MAX_BESIDE_GEMMS_US:.0f})", entry)
            for entry in breakdowns
            if entry.T <= DECODE_TOKENS and entry.beside_gemms_us > MAX_BESIDE_GEMMS_US]


def stage_table(sweep: Sweep) -> list[list[str]]:
    """Header and rows: each kernel's own microseconds at every T, gaps, span, and the GEMMs' rates."""
    entries = sweep.stages
    order = [(kernel, stage) for kernel, stages in STAGES.items() for stage in dict.fromkeys(stages)]
    order += dict.fromkeys((row.kernel, OTHER) for entry in entries for row in entry.kernels if row.stage == OTHER)
    found = {(row.kernel, row.stage) for entry in entries for row in entry.kernels}
    table = [["us", *(f"T = {entry.T}" for entry in entries)]]
    for kernel, stage in order:
        if (kernel, stage) in found:
            table.append([f"{stage}: `{kernel}`", *(_us(entry.own_us(stage, kernel)) for entry in entries)])
    table.append(["gaps", *(_us(sum(row.gap_us for row in entry.kernels)) for entry in entries)])
    table.append(["span", *(f"{entry.span_us:.1f}" for entry in entries)])
    table.append(["all but the GEMMs", *(f"{entry.beside_gemms_us:.1f}" for entry in entries)])
    table.append(["hidden by early starts", *(f"{entry.overlap_us:.1f}" for entry in entries)])
    for stage, matrices in MATRICES.items():
        if all(entry.own_us(stage) == 0 for entry in entries):
            continue
        read = [(weight_bytes(entry.active_experts, matrices), entry.own_us(stage)) for entry in entries]
        done = [(flops(entry.rows, matrices), entry.own_us(stage)) for entry in entries]
        table.append([f"{stage}: weights, TB/s", *(_rate(*cell, sweep.ceilings.read_bytes_per_s, 2) for cell in read)])
        table.append([f"{stage}: TFLOP/s", *(_rate(*cell, sweep.ceilings.fp8_flops_per_s, 0) for cell in done)])
    return table


def point_table(points: Sequence[Point]) -> list[list[str]]:
    """Header and a row a point."""
    table = [["T", "rows", "active experts", "spread", "latency (us)", "min-max", "floor (us)", "time / floor"]]
    for point in points:
        low, high = point.latency_us_range
        table.append([f"{point.T}", f"{point.rows}", f"{point.active_experts}", point.spread, f"{point.latency_us:.1f}",
                      f"{low:.0f}-{high:.0f}", f"{point.floor_us:.1f}", f"{point.time_over_floor:.2f}"])
    return table


def host_table(times: Sequence[HostTime]) -> list[list[str]]:
    """Header and a row a T."""
    return [["T", "host, GPU idle (us)", "host, GPU behind (us)"],
            *([f"{time.T}", f"{time.idle_us:.0f}", f"{time.queued_us:.0f}"] for time in times)]


def render_table(rows: Sequence[Sequence[str]], title: str) -> Table:
    """A header and its rows for the terminal."""
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name, justify="left" if name in ("us", "spread") else "right", no_wrap=True)
    for row in rows[1:]:
        table.add_row(*row)
    return table


def _us(value: float) -> str:
    return f"{value:.1f}" if value else ""


def _rate(amount: int, time_us: float, ceiling: float, digits: int) -> str:
    """amount (bytes, FLOPs) over time in 10^12 a second, and its share of the ceiling (per second)."""
    if not time_us:
        return ""
    rate = amount / time_us * 1e6
    return f"{rate / 1e12:.{digits}f} ({rate / ceiling:.0%})"
