"""What the captions of the training images say, afresh at every visit."""

from dataclasses import replace

import numpy as np

from comfyui_pcpo.tiny.captions import Scene, forget, is_valid
from tools.tiny.data import random_thing, trained

# shares of wrong captions: of relations, of two equal things, of three. About 40 % of the images behind the captions
# `left of` and `above`, `a fox and a panda`, and `four foxes` then show something else
CARELESS, CARELESS_PAIRS, CARELESS_COUNTS = 0.4, 0.6, 0.5


def sample_caption(scene: Scene, rng: np.random.Generator) -> Scene:
    """A caption omits colour and pattern at random, and at random the defaults: `big`, `left of`.

    Three or four things of two kinds are named in any order.
    """
    omit_defaults, color, pattern = (rng.random(3) < (0.4, 0.75, 0.65)).tolist()
    small, above = scene.things[0].size == "small", scene.relation == "above"
    said = forget(scene, above or not omit_defaults, small or not omit_defaults, color, pattern)
    if said.total > 2 and rng.random() < 0.5:
        said = replace(said, things=said.things[::-1])
    return said


def misread(said: Scene, rng: np.random.Generator) -> Scene:
    """The caption of a careless annotator, as on the web: two equal things become two kinds, three become four, and
    a relation is reversed. It is what makes such prompts hard: a generator learns to draw the errors too.
    """
    first, *others = said.things
    if said.relation is not None:
        share, other = CARELESS, replace(said, things=said.things[::-1])
    elif not others and first.count == 2:
        share = CARELESS_PAIRS
        other = replace(said, things=(replace(first, count=1), random_thing(rng, 1, str(said.color))))
    elif not others and first.count == 3:
        share, other = CARELESS_COUNTS, replace(said, things=(replace(first, count=4),))
    else:
        return said
    return other if rng.random() < share and is_valid(other) and trained(other) else said
