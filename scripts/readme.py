"""Write the recorded results into README.md: those of `make run` between the two `results` markers, those of
`make sweep`, if there are any, between the two `sweep` markers.

python -m scripts.readme [--check]
"""

from __future__ import annotations

import argparse
import json
import re
import sys

from scripts.accuracy import TIERS
from scripts.pack import ROOT
from scripts.report import DECODE_TOKENS, PASSED, geometric_mean, read_records
from scripts.sweep_report import Sweep, host_table, point_table, read_sweep, stage_table

README = ROOT / "README.md"
RESULTS = ROOT / "results" / "nvidia-h100-80gb-hbm3.json"
SWEEP = RESULTS.with_name(f"{RESULTS.stem}-sweep.json")
_SWEEP_INTRODUCTION = """## Sweep

`make sweep`: how the span goes with T, the number of active experts and the spread of the rows over them, and where
it goes. The *span* divides into each kernel's own time and *gaps* in which nothing runs; a kernel that starts while
its predecessor drains only waits, which is *hidden*. A GEMM's rates are the active experts' weights, once, and the
rows' FLOPs over its own time, with their share of the ceilings. Workloads with a published T are those of the table
above, others are drawn with every expert equally likely."""


def results_section(results: dict) -> str:
    """The markdown of one results file: a line on the run, then a row a workload and the geometric means."""
    ceilings, versions, records = results["ceilings"], results["versions"], read_records(results)
    passed = sum(record.status == PASSED for record in records)
    lines = [
        f"{passed} of {len(records)} workloads PASSED in `flashinfer-bench run` {versions['flashinfer-bench']} on "
        f"one {results['gpu']} (torch {versions['torch']}, triton {versions['triton']}), tier `{results['tier']}`. "
        f"Ceilings measured in the same run: {ceilings['read_bytes_per_s'] / 1e12:.2f} TB/s read, "
        f"{ceilings['fp8_flops_per_s'] / 1e12:.0f} TFLOP/s fp8.",
        "",
        f"| T | rows | active experts | latency (us) | time / floor | speedup over reference | matched: "
        f"{' | '.join(TIERS)} |",
        "|--:" * (6 + len(TIERS)) + "|",
    ]
    for r in records:
        matched = " | ".join(f"{r.matched[tier]:.4f}" for tier in TIERS)
        lines.append(f"| {r.T} | {r.rows} | {r.active_experts} | {r.latency_us:.0f} | {r.time_over_floor:.2f} "
                     f"| {r.speedup:.1f} | {matched} |")
    decode = [record for record in records if record.T <= DECODE_TOKENS]
    for name, group in ((f"geometric mean, T <= {DECODE_TOKENS}", decode), ("geometric mean, all", records)):
        latency, ratio, speedup = (
            geometric_mean([getattr(record, value) for record in group])
            for value in ("latency_us", "time_over_floor", "speedup")
        )
        lines.append(f"| {name} | | | {latency:.0f} | {ratio:.2f} | {speedup:.1f} | | | |")
    return "\n".join(lines) + "\n"


def sweep_section(sweep: Sweep) -> str:
    """The markdown of one sweep: its picture, where the microseconds go, spreads, host time, and what it misses."""
    ceilings = sweep.ceilings
    blocks = [
        _SWEEP_INTRODUCTION,
        f"![time over T and over active experts](results/{SWEEP.stem}.svg)",
        f"One {sweep.gpu}, driver {sweep.driver}, torch {sweep.versions['torch']}, triton {sweep.versions['triton']}; "
        f"ceilings of the same run: {ceilings.read_bytes_per_s / 1e12:.2f} TB/s read, "
        f"{ceilings.fp8_flops_per_s / 1e12:.0f} TFLOP/s fp8.",
    ]
    if sweep.stages:
        blocks.append(_markdown(stage_table(sweep)))
    if sweep.spreads:
        blocks.append(_markdown(point_table(sweep.spreads)))
    if sweep.host:
        blocks.append(_markdown(host_table(sweep.host)))
    misses = [f"- {miss.text}" for miss in sweep.misses()]
    blocks.append("\n".join(["Misses:", "", *misses]) if misses else "No misses.")
    return "\n\n".join(blocks) + "\n"


def _markdown(table: list[list[str]]) -> str:
    """A markdown table of a header and its rows."""
    header, *rows = (f"| {' | '.join(row)} |" for row in table)
    return "\n".join([header, "|--:" * len(table[0]) + "|", *rows])


def render_readme(text: str, results: dict, sweep: Sweep | None) -> str:
    """README's text with both sections replaced, that of no sweep by nothing.

    Raises ValueError when the markers are not there.
    """
    text = _replace_section(text, "results", results_section(results))
    return _replace_section(text, "sweep", sweep_section(sweep) if sweep else "")


def _replace_section(text: str, name: str, section: str) -> str:
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    replaced, count = re.subn(f"(?<={begin}\n).*(?={end})", lambda _: section, text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"README.md: expected '{begin}' before '{end}', found none")
    return replaced


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 when README.md is stale; write nothing")
    arguments = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    sweep = read_sweep(SWEEP) if SWEEP.exists() else None
    current = render_readme(text, json.loads(RESULTS.read_text(encoding="utf-8")), sweep)
    if arguments.check:
        if current != text:
            print(f"README.md: its results are not those of {RESULTS.relative_to(ROOT)} and {SWEEP.relative_to(ROOT)}",
                  file=sys.stderr)
        return int(current != text)
    README.write_text(current, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
