"""Write the recorded results into README.md, between the two `results` markers.

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

README = ROOT / "README.md"
RESULTS = ROOT / "results" / "nvidia-h100-80gb-hbm3.json"
_SECTION = re.compile(r"(<!-- results: begin -->\n).*(<!-- results: end -->)", re.DOTALL)


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
