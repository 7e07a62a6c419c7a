"""Write the recorded results into README.md, between the two `results` markers.

python -m scripts.readme [--check]
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys

from scripts.pack import ROOT
from scripts.report import DECODE_TOKENS

README = ROOT / "README.md"
RESULTS = ROOT / "results" / "nvidia-h100-80gb-hbm3.json"
_SECTION = re.compile(r"(<!-- results: begin -->\n).*(<!-- results: end -->)", re.DOTALL)


def results_section(results: dict) -> str:
    """The markdown of one results file: a line on the run, then a row a workload and the geometric means."""
    ceilings, versions = results["ceilings"], results["versions"]
    workloads = results["workloads"]
    passed = sum(workload["status"] == "PASSED" for workload in workloads)
    lines = [
        f"{passed} of {len(workloads)} workloads PASSED in `flashinfer-bench run` {versions['flashinfer-bench']} on "
        f"one {results['gpu']} (torch {versions['torch']}, triton {versions['triton']}), tier `{results['tier']}`. "
        f"Ceilings measured in the same run: {ceilings['read_bytes_per_s'] / 1e12:.2f} TB/s read, "
        f"{ceilings['fp8_flops_per_s'] / 1e12:.0f} TFLOP/s fp8.",
        "",
        "| T | rows | active experts | latency (us) | time / floor | speedup over reference "
        "| matched: profile | contest | strict |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for w in workloads:
        matched = " | ".join(f"{w['matched'][tier]:.4f}" for tier in ("profile", "contest", "strict"))
        lines.append(f"| {w['T']} | {w['rows']} | {w['active_experts']} | {w['latency_us']:.0f} "
                     f"| {w['time_over_floor']:.2f} | {_speedup(w):.1f} | {matched} |")
    decode = [w for w in workloads if w["T"] <= DECODE_TOKENS]
    for name, group in ((f"geometric mean, T <= {DECODE_TOKENS}", decode), ("geometric mean, all", workloads)):
        means = [statistics.geometric_mean(values) for values in (
            [w["latency_us"] for w in group], [w["time_over_floor"] for w in group], [_speedup(w) for w in group])]
        lines.append(f"| {name} | | | {means[0]:.0f} | {means[1]:.2f} | {means[2]:.1f} | | | |")
    return "\n".join(lines) + "\n"


def _speedup(workload: dict) -> float:
    return workload["reference_latency_ms"] / workload["benchmark_latency_ms"]


def render_readme(text: str, results: dict) -> str:
    """README's text with the section replaced. Raises ValueError when the markers are not there."""
    if not _SECTION.search(text):
        raise ValueError("README.md: expected '<!-- results: begin -->' before '<!-- results: end -->', found none")
    return _SECTION.sub(lambda match: match[1] + results_section(results) + match[2], text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 when README.md is stale; write nothing")
    arguments = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    current = render_readme(text, json.loads(RESULTS.read_text(encoding="utf-8")))
    if arguments.check:
        if current != text:
            print("README.md: its results are not those of " + str(RESULTS.relative_to(ROOT)), file=sys.stderr)
        return int(current != text)
    README.write_text(current, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
