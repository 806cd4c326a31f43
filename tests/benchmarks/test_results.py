"""The published results are those of the archived runs, down to the last printed digit."""

import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks.report.collect import collect
from benchmarks.report.evaluations_page import evaluations_page
from benchmarks.report.model_note import with_model_note
from benchmarks.report.pages import BEGIN, END, write_report
from benchmarks.study.studies import STUDIES

pytestmark = pytest.mark.slow

DOCS = Path(__file__).resolve().parents[2] / "docs"
ARCHIVES = DOCS.parent / "benchmarks" / "results"
EVALUATIONS = "model-evaluations.md"  # the only page of the study `evaluations`; the others are those of `medium`
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]\d+)?")
MEASURED = re.compile(r"-?\b\d\.\d\d+\b|\b\d+ %|\b\d+ of 30\b")  # results as they are printed in a sentence


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The archived runs."""
    return unpacked("medium", tmp_path_factory)


def unpacked(study, tmp_path_factory):
    folder = tmp_path_factory.mktemp(study)
    shutil.unpack_archive(ARCHIVES / f"{study}.tar.xz", folder)
    return folder / study


@pytest.fixture(scope="module")
def made(runs, tmp_path_factory):
    """The report of the archived runs, around the published handwritten text."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copy(DOCS / "results.md", folder)
    write_report("medium", STUDIES["medium"], runs, folder)
    other = collect(STUDIES["evaluations"], unpacked("evaluations", tmp_path_factory))
    page = with_model_note(evaluations_page(other), other)
    (folder / "results" / EVALUATIONS).write_text(page + "\n", encoding="utf-8")
    return folder


def unit(printed: str) -> float:
    """One in the last digit of a printed number: 0.01 of 0.37, 1e-4 of 1.92e-02."""
    digits, _, power = printed.partition("e")
    return 10.0 ** (int(power or 0) - len(digits.partition(".")[2]))


def differing(ours: str, published: str) -> list[tuple[str, str]]:
    """Numbers that differ by more than a unit of their last printed digit, which another order of summation allows."""
    assert NUMBER.sub("#", ours) == NUMBER.sub("#", published)
    pairs = zip(NUMBER.findall(ours), NUMBER.findall(published), strict=True)
    return [(mine, printed) for mine, printed in pairs if abs(float(mine) - float(printed)) > 1.01 * unit(printed)]


def test_a_unit_is_one_in_the_last_printed_digit():
    assert [unit(text) for text in ("0.37", "-12", "1.92e-02")] == pytest.approx([0.01, 1, 1e-4])


def test_the_published_pages_are_those_of_the_archived_runs(made):
    pages = sorted(path.name for path in (made / "results").iterdir())
    assert pages == sorted(path.name for path in (DOCS / "results").iterdir())
    numbers = 0
    for page in (Path("results.md"), *(Path("results") / name for name in pages)):
        ours, published = ((folder / page).read_text(encoding="utf-8") for folder in (made, DOCS))
        assert not differing(ours, published), page
        numbers += len(NUMBER.findall(published))
    assert numbers > 500


def test_the_published_figures_are_those_of_the_report(made):
    figures = {path.name for path in (made / "images" / "results").iterdir()}
    assert figures == {path.name for path in (DOCS / "images" / "results").iterdir()}


def test_every_result_in_the_handwritten_text_is_in_a_published_table():
    text = (DOCS / "results.md").read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    generated, _, after = rest.partition(END)
    tables = generated + "".join(path.read_text(encoding="utf-8") for path in (DOCS / "results").iterdir())
    printed = set(MEASURED.findall(tables))
    stated = MEASURED.findall(before.replace("\n", " ").replace("  ", " ")) + MEASURED.findall(after)
    assert len(stated) > 20
    assert not [number for number in stated if number not in printed and number != "95 %"]


def test_the_runs_whose_advantage_setting_had_no_effect_are_counted(runs):
    advantages = [json.loads(file.read_text())["config"]["advantage"] for file in runs.rglob("result.json")]
    batch = sum(advantage["spread"] == "batch" for advantage in advantages)
    window = sum(advantage["kind"] == "window" for advantage in advantages)
    text = (DOCS / "results.md").read_text(encoding="utf-8")
    assert f"{batch} runs with" in text and f"{window} runs with" in text
