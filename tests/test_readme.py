"""The README's figures are those of the recorded run, and its picture can be drawn."""

from __future__ import annotations

import json

import pytest

from scripts.plot import draw
from scripts.readme import README, RESULTS, render_readme


def test_results_are_current():
    """A figure edited by hand, or results checked in without `python -m scripts.readme`."""
    text = README.read_text(encoding="utf-8")
    assert render_readme(text, json.loads(RESULTS.read_text(encoding="utf-8"))) == text


def test_missing_markers():
    """Without its markers the section would silently stay as it is."""
    with pytest.raises(ValueError, match="expected '<!-- results: begin -->'"):
        render_readme("# no section", json.loads(RESULTS.read_text(encoding="utf-8")))


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
