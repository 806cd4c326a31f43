"""The published tables are those of the archived runs: nothing below the line in docs/results.md was typed by hand."""

import re
import shutil
from pathlib import Path

import pytest

from benchmarks.report.report import LINE, report
from benchmarks.study.methods import FORMS

ROOT = Path(__file__).resolve().parents[2]
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]\d+)?")


def unit(printed: str) -> float:
    """One in the last digit of a printed number: 0.01 of 0.37, 1e-4 of 1.92e-02."""
    digits, _, power = printed.partition("e")
    return 10.0 ** (int(power or 0) - len(digits.partition(".")[2]))


def test_a_unit_is_one_in_the_last_printed_digit():
    assert [unit(text) for text in ("0.37", "-12", "1.92e-02")] == pytest.approx([0.01, 1, 1e-4])


def test_the_published_tables_are_those_of_the_archived_runs(tmp_path):
    """Up to one unit of a number's last printed digit, which sums in another order may change."""
    shutil.unpack_archive(ROOT / "benchmarks" / "results" / "medium.tar.xz", tmp_path)
    (tmp_path / "docs").mkdir()
    made = report("medium", FORMS["medium"], tmp_path / "medium", tmp_path / "docs", tmp_path / "docs/images/results")
    ours = made.read_text(encoding="utf-8").split(LINE)[1]
    published = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").split(LINE)[1]
    assert NUMBER.sub("#", ours) == NUMBER.sub("#", published)
    pairs = list(zip(NUMBER.findall(ours), NUMBER.findall(published), strict=True))
    assert len(pairs) > 500
    far = [(mine, printed) for mine, printed in pairs if abs(float(mine) - float(printed)) > 1.01 * unit(printed)]
    assert not far
    pictures = {path.name for path in (tmp_path / "docs/images/results").iterdir()}
    assert pictures == {path.name for path in (ROOT / "docs/images/results").iterdir()}
