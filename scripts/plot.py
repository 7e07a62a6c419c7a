"""Draw a results file: each workload's time as a multiple of the floor. Writes an SVG beside the JSON.

python -m scripts.plot [RESULTS.json]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt  # noqa: E402 - after the backend is chosen

from scripts.ceilings import H, I  # noqa: E402
from scripts.readme import RESULTS  # noqa: E402
from scripts.report import Record, read_records  # noqa: E402

INK = "#7a7f87"  # readable on white and on black: the background stays transparent
MEMORY_BOUND, COMPUTE_BOUND = "#3b82c4", "#d9822b"


def draw(results: dict, path: Path) -> None:
    """Write the figure of a results file (the form that `make run` writes) to path, as SVG."""
    records = [record for record in read_records(results) if record.time_over_floor is not None]
    if not records:
        raise ValueError("results: expected measured workloads, found none")
    style = {"text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": INK,
             "font.size": 9, "svg.hashsalt": "results", "svg.fonttype": "none"}
    with plt.rc_context(style):
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
        axes.set_title(f"{results['gpu']}, cold L2; dashed: the floor", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)


def _compute_us(record: Record, results: dict) -> float:
    """The floor's term for the tensor cores: 6 H I FLOPs a row at the measured rate."""
    return record.rows * 6 * H * I / results["ceilings"]["fp8_flops_per_s"] * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS, metavar="RESULTS.json")
    path = parser.parse_args().results
    draw(json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".svg"))


if __name__ == "__main__":
    main()
