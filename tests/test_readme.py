"""The README's figures are those of the recorded run."""

from __future__ import annotations

import json

import pytest

from scripts.readme import README, RESULTS, render_readme


def test_results_are_current():
    """A figure edited by hand, or results checked in without `python -m scripts.readme`."""
    text = README.read_text(encoding="utf-8")
    assert render_readme(text, json.loads(RESULTS.read_text(encoding="utf-8"))) == text


def test_missing_markers():
    """Without its markers the section would silently stay as it is."""
    with pytest.raises(ValueError, match="expected '<!-- results: begin -->'"):
        render_readme("# no section", json.loads(RESULTS.read_text(encoding="utf-8")))
