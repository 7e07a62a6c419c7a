"""Draw results: each workload's time as a multiple of the floor, and the sweep. Writes an SVG beside each JSON.

python -m scripts.plot [--results RESULTS.json] [--sweep SWEEP.json]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt  # noqa: E402 - after the backend is chosen

from scripts.ceilings import flops  # noqa: E402
from scripts.readme import RESULTS, SWEEP  # noqa: E402
from scripts.report import Record, read_records  # noqa: E402
from scripts.sweep_report import (  # noqa: E402
    MAX_OVER_FLOOR,
    PREFILL_TOKENS,
    Miss,
    Point,
    Sweep,
    expert_misses,
    read_sweep,
    token_misses,
)

INK = "#7a7f87"  # readable on white and on black: the background stays transparent
MEMORY_BOUND, COMPUTE_BOUND = "#3b82c4", "#d9822b"
MISS = "#d64545"
STYLE = {"text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": INK,
         "font.size": 9, "axes.titlesize": 9, "svg.hashsalt": "results", "svg.fonttype": "none"}
LINE = {"color": MEMORY_BOUND, "linewidth": 1.2, "marker": ".", "markersize": 4}
FLOOR = {"color": INK, "linewidth": 1, "linestyle": "--"}


def draw(results: dict, path: Path) -> None:
    """Write the figure of a results file (the form that `make run` writes) to path, as SVG."""
    records = [record for record in read_records(results) if record.time_over_floor is not None]
    if not records:
        raise ValueError("results: expected measured workloads, found none")
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(9, 3.2), layout="constrained")
        ratios = [record.time_over_floor for record in records]
        colors = [MEMORY_BOUND if _compute_us(record, results) < 0.999 * record.floor_us else COMPUTE_BOUND
                  for record in records]
        bars = axes.bar(range(len(records)), ratios, color=colors, width=0.7)
        axes.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], color=INK, fontsize=7, padding=2)
        axes.axhline(1, color=INK, linewidth=1, linestyle="--")
        axes.set_xticks(range(len(records)), [f"{record.T}\n{record.latency_us:.0f}" for record in records])
        axes.set_xlabel("T (tokens), and latency in us; blue: bound by memory, orange: by the tensor cores")
        axes.set_ylabel("time / floor")
        axes.set_title(f"{results['gpu']}, cold L2; dashed: the floor")
        axes.spines[["top", "right"]].set_visible(False)
        _save(figure, path)


def draw_sweep(sweep: Sweep, path: Path) -> None:
    """Write the figure of a sweep to path, as SVG: above time / floor over T, below latency over T and experts."""
    tokens, experts = sweep.tokens, sweep.experts
    if not (tokens and experts):
        raise ValueError("sweep: expected points over T and over active experts, found "
                         f"{len(tokens)} and {len(experts)}")
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(9, 6), layout="constrained")
        grid = figure.add_gridspec(2, 2)
        ratios, latencies, quanta = figure.add_subplot(grid[0, :]), *(figure.add_subplot(grid[1, i]) for i in range(2))
        T = [point.T for point in tokens]
        ratios.plot(T, [point.time_over_floor for point in tokens], **LINE)
        ratios.axhline(1, **FLOOR)
        ratios.hlines(MAX_OVER_FLOOR, PREFILL_TOKENS, T[-1], color=INK, linewidth=1, linestyle=":")
        ratios.set_ylim(bottom=0.9)
        ratios.set(ylabel="time / floor",
                   title=f"{sweep.gpu}, cold L2; dashed: the floor, dotted: the limit from T = {PREFILL_TOKENS} on, "
                         "red: missed")
        latencies.plot(T, [point.latency_us for point in tokens], **LINE)
        latencies.plot(T, [point.floor_us for point in tokens], **FLOOR)
        latencies.set(yscale="log", ylabel="latency (us)")
        latencies.yaxis.set_major_formatter("{x:.0f}")
        _mark(ratios, tokens, token_misses(tokens), "T", "time_over_floor")
        _mark(latencies, tokens, token_misses(tokens), "T", "latency_us")
        for axes in (ratios, latencies):
            axes.set_xscale("log", base=2)
            axes.set_xlabel("T (tokens)")
            axes.set_xticks([4**i for i in range(8)])
            axes.xaxis.set_major_formatter("{x:.0f}")
        active = [point.active_experts for point in experts]
        quanta.plot(active, [point.latency_us for point in experts], **LINE)
        quanta.plot(active, [point.floor_us for point in experts], **FLOOR)
        quanta.set(xlabel=f"active experts (T = {experts[0].T})", ylabel="latency (us)", ylim=0)
        _mark(quanta, experts, expert_misses(experts), "active_experts", "latency_us")
        for axes in (ratios, latencies, quanta):
            axes.spines[["top", "right"]].set_visible(False)
        _save(figure, path)


def _mark(axes: plt.Axes, points: Sequence[Point], misses: Sequence[Miss], x: str, y: str) -> None:
    """Mark the points that miss something."""
    missed = [point for point in points if any(miss.measured == point for miss in misses)]
    if missed:
        axes.plot([getattr(point, x) for point in missed], [getattr(point, y) for point in missed], "o", color=MISS,
                  markersize=5)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)


def _compute_us(record: Record, results: dict) -> float:
    """The floor's term for the tensor cores."""
    return flops(record.rows) / results["ceilings"]["fp8_flops_per_s"] * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="RESULTS.json", help="what `make run` wrote")
    parser.add_argument("--sweep", type=Path, default=SWEEP, metavar="SWEEP.json",
                        help="what `make sweep` wrote; left out where it is not there")
    arguments = parser.parse_args()
    draw(json.loads(arguments.results.read_text(encoding="utf-8")), arguments.results.with_suffix(".svg"))
    if arguments.sweep.exists():
        draw_sweep(read_sweep(arguments.sweep), arguments.sweep.with_suffix(".svg"))


if __name__ == "__main__":
    main()
