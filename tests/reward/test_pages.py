"""Every reward has its page in docs/rewards, and the page holds what a user must know before training on it."""

from pathlib import Path

import pytest

from comfyui_pcpo.reward import REWARDS

PAGES = Path(__file__).resolve().parents[2] / "docs" / "rewards"
PARTS = (
    *("| Typical range |", "| Files |", "| Licence |", "| GPU memory (fp16) |"),
    *("**How it gets hacked.**", "**Held-out reward that shows it.**"),
)


@pytest.mark.parametrize("name", REWARDS)
def test_a_reward_has_a_whole_page_that_the_list_links_to(name):
    page = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {name}: ")
    assert [part for part in PARTS if part not in page] == []
    assert f"[{name}]({name}.md)" in (PAGES / "README.md").read_text(encoding="utf-8")
    for file in REWARDS[name].files:
        assert file.filename in page and file.hub_id in page


def test_no_page_is_about_a_reward_that_is_not_there():
    assert {path.stem for path in PAGES.glob("*.md")} == {*REWARDS, "README"}
