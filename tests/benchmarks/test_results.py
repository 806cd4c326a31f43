"""The published results are those of the archived runs, down to the last printed digit."""

import re
import shutil
from pathlib import Path

import pytest

from benchmarks.report.pages import BEGIN, END, NOTHING_MEASURED, REPORTED, write_report
from benchmarks.study.studies import STUDIES

pytestmark = pytest.mark.slow

DOCS = Path(__file__).resolve().parents[2] / "docs"
ARCHIVES = sorted((DOCS.parent / "benchmarks" / "results").glob("*.tar.xz"))
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]\d+)?")
MEASURED = re.compile(r"-?\b\d+\.\d+\b|\b\d+ %|\b\d+ of \d+\b")  # results as they are printed in a sentence
CELL = re.compile(r"(?<=\| )\d+(?= )")
ARXIV = re.compile(r"arxiv\.org/abs/\d{4}\.\d{5}")
DECIMAL = r"-?\d+\.\d+"
INTERVAL = re.compile(rf"{DECIMAL} \[{DECIMAL}, {DECIMAL}\]")
PAIR = re.compile(rf"({DECIMAL}) (?:against|to) ({DECIMAL})")
LIMITS = {"95 %", "10 %"}  # of intervals, of diversity


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The report of the archived runs, around the published handwritten text."""
    out, folder = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("docs")
    for archive in ARCHIVES:
        shutil.unpack_archive(archive, out)
    shutil.copy(DOCS / "results.md", folder)
    write_report({name: STUDIES[name] for name in REPORTED}, out, folder)
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


def unfounded(handwritten: str, tables: str) -> list[str]:
    """Results that a text states and no table has: numbers, a mean with its interval, and two that it compares."""
    per_cent = "\n".join(line for line in tables.splitlines() if ", % |" in line)  # rows whose title has the unit
    printed = set(MEASURED.findall(tables)) | {f"{number} %" for number in CELL.findall(per_cent)} | LIMITS
    text, lines = " ".join(ARXIV.sub("", handwritten).split()), number_lines(tables)
    numbers = [number for number in MEASURED.findall(text) if number not in printed]
    intervals = [found for found in INTERVAL.findall(text) if f"| {found} |" not in tables]
    pairs = [match[0] for match in PAIR.finditer(text) if not any({match[1], match[2]} <= line for line in lines)]
    return numbers + intervals + pairs


def number_lines(tables: str) -> list[set[str]]:
    """The numbers of each row and of each column of all tables, a cell's first one."""
    found = []
    for table in re.split(r"\n(?!\|)", tables):
        rows = [[re.match(DECIMAL, cell.strip()) for cell in line.split("|")] for line in table.splitlines()]
        width = max(map(len, rows), default=0)
        columns = [[row[place] if place < len(row) else None for row in rows] for place in range(width)]
        found += [{number[0] for number in line if number} for line in (*rows, *columns)]
    return found


def test_a_unit_is_one_in_the_last_printed_digit():
    assert [unit(text) for text in ("0.37", "-12", "1.92e-02")] == pytest.approx([0.01, 1, 1e-4])


def test_a_stated_result_that_no_table_has_is_found():
    assert unfounded("It gains 0.37 [0.21,\n0.40] in 3 of 5 runs, 95 % intervals", "| 0.37 [0.20, 0.40] |") == [
        "0.21",
        "3 of 5",
        "0.37 [0.21, 0.40]",
    ]
    table = "| 0.37 [0.20, 0.40] | 0.11 |\n| 0.21 [0.11, 0.30] | 0.40 |"
    assert unfounded("0.37 [0.11, 0.30], 0.37 against 0.21, 0.40 to 0.21, 0.37 against 0.40", table) == [
        "0.37 [0.11, 0.30]",
        "0.37 against 0.40",
    ]
    assert unfounded("from 62 % to 43 %", "| correct, % | 62 | 42 [30, 55] |\n| seeds | 43 |") == ["43 %"]


def test_every_archive_is_that_of_a_reported_study():
    assert {archive.name.removesuffix(".tar.xz") for archive in ARCHIVES} <= set(REPORTED)


def test_the_published_pages_are_those_of_the_archived_runs(made):
    pages = sorted(path.name for path in (made / "results").iterdir())
    assert pages == sorted(path.name for path in (DOCS / "results").iterdir())
    for page in (Path("results.md"), *(Path("results") / name for name in pages)):
        ours, published = ((folder / page).read_text(encoding="utf-8") for folder in (made, DOCS))
        assert not differing(ours, published), page


def test_every_figure_of_the_report_is_published_and_no_other(made):
    figures, published = ({path.name for path in (folder / "images" / "results").glob("*")} for folder in (made, DOCS))
    assert figures == published


def test_every_result_in_the_handwritten_text_is_in_a_published_table():
    text = (DOCS / "results.md").read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    generated, _, after = rest.partition(END)
    tables = generated + "".join(path.read_text(encoding="utf-8") for path in (DOCS / "results").iterdir())
    assert not unfounded(before + after, tables)
    protocol = (DOCS / "results" / "README.md").read_text(encoding="utf-8")
    assert (NOTHING_MEASURED in generated) == ("Commits of the reported runs: none." in protocol)
