"""The published tables are those of the archived runs: nothing below the line in docs/results.md was typed by hand."""

import re
import shutil
from pathlib import Path

import pytest

from benchmarks.contenders import FORMS
from benchmarks.report import LINE, report

ROOT = Path(__file__).resolve().parents[1]
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]\d+)?")


def test_the_published_tables_are_those_of_the_archived_runs(tmp_path):
    """Up to the last digit of a rounded number, which sums in another order may change."""
    shutil.unpack_archive(ROOT / "benchmarks" / "results" / "medium.tar.xz", tmp_path)
    (tmp_path / "docs").mkdir()
    made = report("medium", FORMS["medium"], tmp_path / "medium", tmp_path / "docs", tmp_path / "docs/images/results")
    ours = made.read_text(encoding="utf-8").split(LINE)[1]
    published = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").split(LINE)[1]
    assert NUMBER.sub("#", ours) == NUMBER.sub("#", published)
    numbers = [[float(n) for n in NUMBER.findall(text)] for text in (ours, published)]
    assert len(numbers[0]) > 500
    assert numbers[0] == pytest.approx(numbers[1], rel=0.02, abs=0.011)
    pictures = {path.name for path in (tmp_path / "docs/images/results").iterdir()}
    assert pictures == {path.name for path in (ROOT / "docs/images/results").iterdir()}
