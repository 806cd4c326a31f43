"""The base place: what it refuses, what it rounds, what it calls failed; and several rewards at once."""

import sys

import pytest
import torch

from comfyui_pcpo.reward import REWARDS, Reward, RewardError, RewardSettings, Scores, load_reward
from comfyui_pcpo.reward.combine import combine, require_combinable

torch.set_num_threads(1)


class First(Reward):
    """The first red pixel, with a note."""

    name = "first"

    def score_batch(self, images, prompts):
        assert images.dtype == torch.uint8 and images.shape[-1] == 3
        return Scores(images[:, 0, 0, 0], {"note": [f"{prompt}!" for prompt in prompts]})


class Given(Reward):
    """Reads its scores off the prompts."""

    name = "given"

    def score_batch(self, images, prompts):
        return torch.tensor([float(prompt) for prompt in prompts])


def images(*values):
    return torch.tensor(values)[:, None, None, None].expand(-1, 4, 4, 3).clone()


def test_images_are_clamped_rounded_and_lose_their_alpha():
    batch = torch.cat([images(-1.0, 0.5, 0.4999 / 255, 2.0), torch.zeros(4, 4, 4, 1)], -1)
    assert First().score(batch, ["a"] * 4).tolist() == [0, 128, 0, 255]


def test_scores_do_not_depend_on_images_at_once():
    batch, prompts = images(*[n / 255 for n in range(7)]), [str(n) for n in range(7)]
    scores = First(RewardSettings(images_at_once=3)).measure(batch, prompts)
    assert scores.values.tolist() == list(range(7))
    assert scores.extras["note"] == [f"{n}!" for n in range(7)]


def test_failed_scores_are_nan_never_zero():
    scores = Given().score(images(0.0, 0.0, 0.0, 0.5), ["nan", "inf", "-inf", "3"])
    assert scores.isnan().tolist() == [True, True, True, False]
    broken = images(0.5, 0.5)
    broken[0, 1, 1, 1] = float("nan")
    assert First().score(broken, ["", ""]).isnan().tolist() == [True, False]


class Network(Reward):
    """Has a weight, 4 bytes."""

    name = "network"

    def build(self):
        return torch.nn.Linear(1, 1, bias=False)

    def score_batch(self, images, prompts):
        return self.model(images.float().flatten(1)[:, :1])[:, 0]


def test_weights_that_were_made_or_moved_in_inference_mode_can_be_used_outside():
    """A host may score in inference mode first; what is moved there in it raises on every later use outside."""
    reward = Network()
    with torch.inference_mode():
        reward.score(images(0.5), ["a"])
    assert not reward.model.weight.is_inference()
    with torch.inference_mode():
        reward.to("meta")
    assert reward.model.weight.is_meta and not reward.model.weight.is_inference()


def test_a_host_is_asked_for_room_before_a_network_moves_to_a_gpu():
    asked = []
    reward = Network(RewardSettings(device="meta", make_room=asked.append)).load()
    assert asked == [4]
    assert reward.to("meta") and asked == [4]  # it is there already
    Network(RewardSettings(make_room=asked.append)).load()  # on the CPU
    assert asked == [4]


class Full(torch.nn.Linear):
    """A network for which the device has no room."""

    def to(self, device):
        raise torch.OutOfMemoryError("no room")


def test_a_device_without_room_names_the_reward_that_moves_there():
    reward = Network().load()
    reward.model = Full(1, 1)
    with pytest.raises(torch.OutOfMemoryError, match=r"^reward network: no room$"):
        reward.to("meta")


def test_a_network_that_did_not_reach_its_device_is_loaded_anew():
    class Late(Network):
        networks = iter((Full(1, 1), torch.nn.Linear(1, 1)))

        def build(self):
            return next(self.networks)

    reward = Late(RewardSettings(device="meta"))
    with pytest.raises(torch.OutOfMemoryError):
        reward.load()
    assert reward.model is None
    assert reward.load().model.weight.is_meta


def test_a_build_that_returns_no_network_is_refused():
    class Pair(Network):
        def build(self):
            return torch.nn.Linear(1, 1), "processor"

    with pytest.raises(RewardError, match=r"reward network: build returned a tuple. Return one torch.nn.Module"):
        Pair().load()


@pytest.mark.parametrize("extras", [None, {"note": ["one"]}, {"note": "ab"}])
def test_extras_are_one_entry_per_image(extras):
    class Noted(Given):
        def score_batch(self, images, prompts):
            return Scores(torch.zeros(2), extras)

    with pytest.raises(RewardError, match="extras that are not lists of 2 entries"):
        Noted().measure(images(0.0, 0.0), ["", ""])


def test_a_batch_without_an_extra_has_empty_entries():
    class Some(Given):
        def score_batch(self, images, prompts):
            return Scores(torch.zeros(1), {"note": prompts} if prompts[0] else {})

    measured = Some(RewardSettings(images_at_once=1)).measure(images(0.0, 0.0, 0.0), ["", "b", ""])
    assert measured.extras == {"note": ["", "b", ""]}


def test_a_class_without_a_file_and_an_error_with_two_arguments_are_attributed(monkeypatch):
    class Odd(RewardError):
        def __init__(self, what, why):
            super().__init__(f"{what} {why}")

    class Typed(Given):
        def score_batch(self, images, prompts):
            raise Odd("too", "dark") if prompts[0] else KeyError("x")

    Typed.__module__ = "__main__"
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    with pytest.raises(RewardError, match=r"reward given raised KeyError: 'x' \(test_base.py, line \d+\)"):
        Typed().score(images(0.0), [""])
    with pytest.raises(RewardError, match=r"^reward given: too dark$"):
        Typed().score(images(0.0), ["a"])


def test_a_host_can_stop_the_scoring_between_two_batches():
    calls = []

    def tick():
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        First(RewardSettings(images_at_once=1, tick=tick)).score(images(0.0, 0.0, 0.0, 0.0), ["a"] * 4)


def test_no_images_have_no_scores():
    assert First().score(torch.zeros(0, 4, 4, 3), []).shape == (0,)


@pytest.mark.parametrize(
    ("images", "prompts", "said"),
    [
        (torch.zeros(2, 3, 8, 8), ["", ""], "Put channels last"),
        (torch.zeros(8, 8, 3), [""], "Put channels last"),
        (torch.zeros(1, 0, 8, 3), [""], "Put channels last"),
        (torch.zeros(1, 8, 8, 3, dtype=torch.uint8), [""], "Divide"),
        (torch.zeros(2, 8, 8, 3), [""], "2 images and 1 prompts"),
        (torch.zeros(2, 8, 8, 3), "ab", "Give a list"),
    ],
)
def test_a_malformed_batch_is_refused(images, prompts, said):
    with pytest.raises(RewardError, match=said):
        First().score(images, prompts)


def test_a_reward_with_too_few_scores_is_refused():
    class Short(Given):
        def score_batch(self, images, prompts):
            return torch.zeros(1)

    with pytest.raises(RewardError, match=r"shape \(1,\) for 2 images"):
        Short().score(images(0.0, 0.0), ["", ""])
    with pytest.raises(RewardError, match="raised NotImplementedError: Reward does not define score_batch"):
        Reward().score(images(0.0), [""])


def test_settings_refuse_what_would_cost_accuracy():
    with pytest.raises(RewardError, match="bfloat16"):
        RewardSettings(dtype=torch.bfloat16)
    with pytest.raises(RewardError, match="images_at_once is 0"):
        RewardSettings(images_at_once=0)


@pytest.mark.slow
def test_an_unloaded_reward_loads_itself_again():
    reward = load_reward("alignment").to("cpu")
    batch, prompts = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(0)), ["a fox", "two pigs"]
    before = reward.score(batch, prompts)
    loaded = reward.model
    assert reward.load().model is loaded
    reward.to("cpu").unload()
    assert reward.model is None
    assert torch.equal(reward.score(batch, prompts), before)


def test_alignment_is_a_cosine_and_takes_any_size():
    reward = load_reward("alignment")
    batch = torch.rand(3, 100, 80, 3, generator=torch.Generator().manual_seed(0))
    scores = reward.score(batch, ["a fox", "", "word " * 1000])
    assert scores.isfinite().all() and (scores.abs() <= 1).all()
    assert torch.allclose(reward.score(batch[1:2], [""]), scores[1:2], atol=1e-5)


def test_every_reward_states_what_it_is():
    for name, cls in REWARDS.items():
        low, high = cls.typical_range
        assert cls.name == name and low < high and isinstance(cls.needs_prompt, bool) and cls.__doc__
        assert all(file.bytes > 0 and file.licence and file.hub_id and file.filename for file in cls.files)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(RewardError, match="alignment"):
        load_reward("nonsense")


def test_combined_scores_are_the_weighted_sum():
    first, second = torch.tensor([1.0, 2.0]), torch.tensor([10.0, torch.nan])
    scores = combine([first, second], [2.0, -3.0])
    assert torch.equal(scores.components[0], first) and scores.components[1, 0] == 10
    assert scores.total[0] == 2 * 1 - 3 * 10 and scores.total[1].isnan()


def test_a_reward_of_weight_zero_is_measured_and_cannot_spoil_the_total():
    scores = combine([torch.tensor([1.0]), torch.tensor([torch.nan])], [1.0, 0.0])
    assert scores.total.tolist() == [1] and scores.components[1].isnan().all()


@pytest.mark.parametrize(
    ("names", "weights", "said"),
    [(["first"], [1.0, 2.0], "1 rewards and 2 weights"), ([], [], "0 rewards"), (["a", "a"], [1.0, 2.0], "be unique")],
)
def test_combinations_that_mean_nothing_are_refused(names, weights, said):
    with pytest.raises(RewardError, match=said):
        require_combinable(names, weights)


def test_a_misspelt_name_gets_the_nearest():
    with pytest.raises(RewardError, match=r"'colorfullness' is not a known reward\. Did you mean colorfulness\?"):
        load_reward("colorfullness")
