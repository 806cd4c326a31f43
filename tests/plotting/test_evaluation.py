"""Claims about the plot of an evaluation: differences in words and colours, drawn whatever the numbers are."""

import math

import numpy as np
import pytest

from comfyui_pcpo.plotting.evaluation import Slope, difference_text, slope_chart, slope_color, slope_figure
from comfyui_pcpo.plotting.style import BETTER, MUTED, WORSE

RISING = ([1.0, 1.1, 0.9], [2.0, 2.2, 1.9])


@pytest.mark.parametrize(
    ("before", "after", "lower", "wanted"),
    [
        (*RISING, False, BETTER),
        (*RISING, True, WORSE),
        (*reversed(RISING), False, WORSE),
        (*reversed(RISING), True, BETTER),
        ([1.0, 2.0], [2.0, 1.5], False, MUTED),
        ([1.0], [2.0], False, MUTED),
    ],
)
def test_only_what_is_hardly_chance_has_a_colour_and_it_knows_what_is_better(before, after, lower, wanted):
    assert slope_color(Slope("x", "", before, after, lower)) == wanted


def test_the_difference_is_written_with_as_much_as_is_known():
    assert difference_text(Slope("x", "", [1.0], [1.5])) == "+0.5"
    assert difference_text(Slope("x", "", [1.0, 2.0], [2.0, 3.2])) == "+1.10 \u00b1 0.10, p = 0.058"
    assert difference_text(Slope("x", "", *RISING)).endswith("p = 0.001")
    assert difference_text(Slope("x", "", [math.nan], [1.0])) == "no value"
    assert difference_text(Slope("x", "", [0.0, 0.0, 0.0], [500.0, 600.0, 540.0])).startswith("+547 \u00b1 29, ")


def test_every_metric_has_its_panel_whatever_its_numbers_are():
    odd = [Slope("same", "", [1.0], [1.0]), Slope("zero", "", [0.0], [0.0]), Slope("none", "", [math.nan], [math.nan])]
    rising = Slope("x", "trained", *RISING)
    one, many = slope_chart([rising]), slope_chart([rising, *odd, *odd])
    assert one.size == (330, 270) and many.size == (4 * 330, 2 * 260 + 10)
    with pytest.raises(ValueError, match="No metrics"):
        slope_chart([])


def test_a_panel_has_a_line_for_each_seed_and_their_mean():
    (axes,) = slope_figure([Slope("x", "trained", [*RISING[0], math.nan], [*RISING[1], 1.0])]).axes
    lines = np.array([line.get_ydata() for line in axes.lines])
    np.testing.assert_allclose(lines, [[1.0, 2.0], [1.1, 2.2], [0.9, 1.9], [1.0, 6.1 / 3]])
    assert [text.get_text() for text in axes.texts] == ["x", "trained", difference_text(Slope("x", "", *RISING))]
