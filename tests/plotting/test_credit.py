"""Claims about the credit plot: weights per step, infinite ones, and steps that are not trained."""

import math

import numpy as np
import pytest

from comfyui_pcpo.plotting.credit import CREDIT_PANEL_SIZE, credit_panels, credit_weights
from comfyui_pcpo.plotting.panels import panel_figure


def test_credit_draws_an_infinite_native_weight_and_marks_untrained_steps():
    steps = [0.1, 0.5, math.inf], [0.3, 0.3, 0.0], [0.5, 0.2, 0.0], [0, 1]
    weights, factors, _ = credit_panels(*steps)
    native, target = weights.lines
    assert native.y == [0.1, 0.5, math.inf] and math.isnan(target.y[2])
    np.testing.assert_allclose(factors.lines[0].y, [3.0, 0.6, math.nan])
    assert all(panel.shade == [(1.5, 2.5)] for panel in credit_panels(*steps)) and weights.note == "grey: not trained"
    arrows = [line for line in panel_figure([weights]).axes[0].lines if line.get_marker() == "^"]
    assert [x for line in arrows for x in line.get_xdata()] == [2]  # type: ignore[union-attr]
    assert credit_weights(*steps).size == (3 * CREDIT_PANEL_SIZE[0], CREDIT_PANEL_SIZE[1])


def test_nothing_is_grey_where_every_step_is_trained():
    panels = credit_panels([0.1, 0.5, 0.6], [0.3, 0.3, 0.3], [0.5, 0.2, 0.1], [0, 1, 2])
    assert not any(panel.shade or panel.note for panel in panels)


def test_weights_that_differ_much_have_a_logarithmic_axis():
    assert not credit_panels([0.1, 1.0], [1.0, 1.0], [1.0, 1.0], [0, 1])[0].log_y
    assert credit_panels([0.01, 1.0], [1.0, 1.0], [1.0, 1.0], [0, 1])[0].log_y


def test_credit_of_unequal_lengths_is_refused():
    with pytest.raises(ValueError, match="have 2, 1, 2 steps"):
        credit_weights([1.0, 1.0], [1.0], [1.0, 1.0], [0])
