"""The README's figures are those of the recorded run, and its picture can be drawn."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from scripts.plot import MISS, draw, draw_sweep
from scripts.readme import README, RESULTS, SWEEP, render_readme
from scripts.sweep_report import Sweep, read_sweep
from scripts.workloads import SPREADS
from solution.triton import contract, tuning
from solution.triton.workspace import allocate
from tests.test_sweep import CEILINGS, a_sweep, point


def test_results_are_current():
    """A figure edited by hand, or results checked in without `python -m scripts.readme`."""
    text = README.read_text(encoding="utf-8")
    sweep = read_sweep(SWEEP) if SWEEP.exists() else None
    assert render_readme(text, json.loads(RESULTS.read_text(encoding="utf-8")), sweep) == text


@pytest.mark.parametrize("section", ["results", "sweep"])
def test_missing_markers(section):
    """Without its markers a section would silently stay as it is."""
    text = README.read_text(encoding="utf-8").replace(f"<!-- {section}: begin -->", "")
    with pytest.raises(ValueError, match=f"expected '<!-- {section}: begin -->'"):
        render_readme(text, json.loads(RESULTS.read_text(encoding="utf-8")), None)


def test_sweep_in_the_readme():
    """Every part of a sweep and every miss is written; a sweep that is not there leaves an empty section."""
    text, results = README.read_text(encoding="utf-8"), json.loads(RESULTS.read_text(encoding="utf-8"))
    good = a_sweep()
    rendered = render_readme(text, results, good)
    assert "| us | T = 16 |\n|--:|--:|\n| routing: `_top_k_kernel` | 3.0 |" in rendered and "No misses." in rendered
    assert all(f"| {spread} | 900.0 |" in rendered for spread in SPREADS) and "| 7 | 150 | 90 |" in rendered
    bad = replace(good, tokens=[*good.tokens, point(384, 1.0)])
    assert "- T = 256: 160.00 x T = 384 (at most 1.05)" in render_readme(text, results, bad)
    assert render_readme(rendered, results, None) == render_readme(text, results, None)


@pytest.mark.parametrize("T", [1, 80, 256, 257, 14_107, 16_384, contract.MAX_TOKENS])
def test_scratch_memory(T):
    """The README's formula, and its figures, are what a call on Hopper allocates."""
    H, I = contract.HIDDEN_SIZE, contract.INTERMEDIATE_SIZE  # noqa: E741 - named as in the README
    text = README.read_text(encoding="utf-8")
    config = tuning.select_config(T, 132, (9, 0))
    R, size = (8 * T, 4 * H + 6 * I) if config.streaming else (8 * T + 2016, 2 * H + I)
    assert "R (4 H + 6 I + I / 32 + 16) bytes up to T = 256" in text and "R (2 H + I + I / 32 + 16) above" in text
    assert "R = 8 T" in text and "2016 more above T = 256" in text
    allocated = allocate(T, H, I, config, torch.device("meta")).memory.nbytes
    assert allocated == pytest.approx(R * (size + I / 32 + 16), rel=0.02)
    if T in (256, 16_384):
        assert f"{allocated / 1e9:.2f} GB at {'T = 256' if T == 256 else '16,384'}" in text


def test_picture(tmp_path):
    """Every measured workload has its bar, labelled with its multiple of the floor."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    draw(results, tmp_path / "picture.svg")
    picture = (tmp_path / "picture.svg").read_text(encoding="utf-8")
    for workload in results["workloads"]:
        assert f">{workload['time_over_floor']:.2f}<" in picture and f">{workload['T']}<" in picture


def test_picture_of_nothing(tmp_path):
    """A run in which nothing could be measured has no picture."""
    with pytest.raises(ValueError, match="expected measured workloads, found none"):
        draw({"gpu": "X", "workloads": []}, tmp_path / "picture.svg")


def test_sweep_picture(tmp_path):
    """Both axes have their points, and one beyond a limit is marked."""
    good = a_sweep()
    draw_sweep(good, tmp_path / "good.svg")
    draw_sweep(replace(good, tokens=[*good.tokens, point(384, 900.0)]), tmp_path / "bad.svg")
    good_picture, bad_picture = ((tmp_path / name).read_text(encoding="utf-8") for name in ("good.svg", "bad.svg"))
    assert "active experts" in good_picture and "time / floor" in good_picture
    assert MISS not in good_picture and MISS in bad_picture


def test_sweep_picture_of_nothing(tmp_path):
    """A sweep without points over T has no picture."""
    with pytest.raises(ValueError, match="expected points over T and over active experts, found 0 and 0"):
        draw_sweep(Sweep("X", None, {}, None, CEILINGS, 1), tmp_path / "picture.svg")
