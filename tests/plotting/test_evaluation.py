"""The picture of an evaluation: what it says of a difference, and that it is drawn whatever the numbers are."""

import math

import pytest
from comfyui_pcpo.plotting.canvas import DOWN, MUTED, UP

from comfyui_pcpo.plotting.evaluation import Slope, color, difference_text, draw

RISING = ([1.0, 1.1, 0.9], [2.0, 2.2, 1.9])


@pytest.mark.parametrize(
    ("before", "after", "lower", "wanted"),
    [
        (*RISING, False, UP),
        (*RISING, True, DOWN),
        (*reversed(RISING), False, DOWN),
        (*reversed(RISING), True, UP),
        ([1.0, 2.0], [2.0, 1.5], False, MUTED),
        ([1.0], [2.0], False, MUTED),
    ],
)
def test_only_what_is_hardly_chance_has_a_colour_and_it_knows_what_is_better(before, after, lower, wanted):
    assert color(Slope("x", "", before, after, lower)) == wanted


def test_the_difference_is_told_with_as_much_as_is_known():
    assert difference_text(Slope("x", "", [1.0], [1.5])) == "+0.5"
    assert difference_text(Slope("x", "", [1.0, 2.0], [2.0, 3.2])) == "+1.10 \u00b1 0.10, p = 0.058"
    assert difference_text(Slope("x", "", *RISING)).endswith("p = 0.001")
    assert difference_text(Slope("x", "", [math.nan], [1.0])) == "no value"
    assert difference_text(Slope("x", "", [0.0, 0.0, 0.0], [500.0, 600.0, 540.0])).startswith("+547 \u00b1 29, ")


def test_every_metric_has_its_panel_whatever_its_numbers_are():
    odd = [Slope("same", "", [1.0], [1.0]), Slope("zero", "", [0.0], [0.0]), Slope("none", "", [math.nan], [math.nan])]
    one, many = draw([Slope("x", "trained", *RISING)]), draw([Slope("x", "trained", *RISING), *odd, *odd])
    assert one.size == (280, 270) and many.size == (4 * 280, 2 * 260 + 10)
    colors = one.getcolors(1 << 20)
    assert colors is not None and len(colors) > 20
    with pytest.raises(ValueError, match="0 metrics"):
        draw([])
