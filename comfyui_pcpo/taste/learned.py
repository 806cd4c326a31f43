"""A learned taste: fitted to comparisons, measured by cross-validation, stored in a file, used as a reward."""

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from comfyui_pcpo.durable import safetensors_parts, write_durably
from comfyui_pcpo.json_text import parse_json
from comfyui_pcpo.reward.base import Reward, RewardError, RewardSettings
from comfyui_pcpo.taste.bradley_terry import Span, Utility, fit_utility
from comfyui_pcpo.taste.comparisons import LEAST_VOTES, Comparisons, mean_per_vote, standard_error
from comfyui_pcpo.taste.encoders import COLOR_STATISTICS, ENCODERS, Encoder, load_encoder
from comfyui_pcpo.taste.votes import VoteError

RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
DEFAULT_RIDGE = 10.0  # where no agreement can be measured
FOLDS = 5
SAME_PROBE = 0.98  # least cosine of two probes of the same encoder in different precisions
FORMAT = "pcpo-taste-1"


@dataclass(frozen=True)
class TasteReport:
    """What cross-validation found."""

    votes: int
    comparisons: int
    agreement: float  # share of held-out comparisons that the taste orders as the votes do; NaN: none could be held out
    error: float  # its standard error over votes
    agreement_doubled: float  # expected with twice the votes
    ridge: float

    def sentence(self) -> str:
        """The report in words."""
        if math.isnan(self.agreement):
            return f"{self.votes} votes: too many share images to hold some out and measure the agreement."
        agreement, error = 100 * self.agreement, 100 * self.error
        found = f"{self.votes} votes: agrees with {agreement:.0f} +- {error:.0f} % of held-out votes."
        if self.agreement_doubled - self.agreement < 0.01:
            return f"{found} More votes are not expected to raise this."
        return f"{found} {self.votes} more are expected to raise this to {100 * self.agreement_doubled:.0f} %."


@dataclass(frozen=True)
class Taste:
    """r(x) = <weight, x> + bias on an encoder's features, mean 0 and standard deviation 1 on the images compared."""

    encoder: str
    weight: Tensor  # (D,)
    bias: float
    probe: Tensor  # (D,) see Encoder.probe
    report: TasteReport

    def __call__(self, features: Tensor) -> Tensor:
        """Utility of features, (B, D) -> (B,)."""
        return features.float() @ self.weight + self.bias

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"format": FORMAT, "encoder": self.encoder, "report": json.dumps(asdict(self.report))}
        tensors = {
            "weight": self.weight.contiguous(),
            "bias": torch.tensor(self.bias),
            "probe": self.probe.contiguous(),
        }
        write_durably(path, *safetensors_parts(tensors, metadata))


def load_taste(path: Path) -> Taste:
    """Read a taste's file. Raises VoteError for any other file."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise VoteError(f"{path} is not a taste. Give a file that `taste train` or Train Taste has written.")
            weight, bias, probe = (file.get_tensor(name) for name in ("weight", "bias", "probe"))
            report, encoder = TasteReport(**parse_json(metadata["report"])), metadata["encoder"]
        if weight.ndim != 1 or weight.shape != probe.shape or bias.numel() != 1:
            raise ValueError(f"its weight has shape {tuple(weight.shape)}, its probe {tuple(probe.shape)}")
        if not all(tensor.isfinite().all() for tensor in (weight, bias, probe)):
            raise ValueError("it has NaN or infinite values")
    except VoteError:
        raise
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise VoteError(f"{path} cannot be read as a taste ({error}). Train it again with `taste train`.") from None
    return Taste(encoder, weight, float(bias), probe, report)


@dataclass(frozen=True)
class Scaled:
    """Features with mean 0 and equal spread, (N, D) float64, and how they were scaled.

    The network's features count together as much as the colour statistics do together.
    """

    values: Tensor
    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Scaled":
        """Scale features, (N, D)."""
        wide = features.double()
        mean, std = wide.mean(0), wide.std(0, correction=0)
        std = std.masked_fill(std < 1e-6, 1.0)
        network = wide.shape[1] - COLOR_STATISTICS
        std[:network] *= math.sqrt(max(network, 1))
        std[network:] *= math.sqrt(COLOR_STATISTICS)
        return cls((wide - mean) / std, mean, std)

    def apply(self, features: Tensor) -> Tensor:
        """Other features in the same scale, (..., D) -> (..., D)."""
        return (features.double() - self.mean) / self.std

    def differences(self, pairs: Comparisons) -> Tensor:
        """The better minus the worse image of C comparisons, -> (C, D)."""
        return self.values[pairs.better] - self.values[pairs.worse]


@dataclass(frozen=True)
class Learned:
    """A fit with its uncertainty, of which only `taste` is saved."""

    taste: Taste
    scaled: Scaled
    utility: Utility

    def information(self, features: Tensor) -> float:
        """Expected information of a vote on a group, (G, D)."""
        return self.utility.information(self.scaled.apply(features))

    def expected_scores(self, features: Tensor) -> Tensor:
        """Expected score of each image of a group, (G, D) -> (G,)."""
        return self.utility.expected_scores(self.scaled.apply(features))


def learn(features: Tensor, pairs: Comparisons, encoder: Encoder) -> Learned:
    """Fit a taste to comparisons of N images with features (N, D). Raises VoteError for too few votes."""
    if pairs.votes < LEAST_VOTES:
        raise VoteError(
            f"Got {pairs.votes} votes that prefer one image to another, but a taste needs at least {LEAST_VOTES} "
            "(about 40 are a good start). Add votes."
        )
    if not features.isfinite().all():
        raise VoteError("The image features contain NaN or infinity. Use another image encoder, or float32.")
    scaled = Scaled.of(features)
    if not scaled.differences(pairs).any():
        raise VoteError("The images that are compared have equal features, so there is nothing to learn from them.")
    report = cross_validate(scaled, pairs)
    utility = fit_utility(scaled.differences(pairs), pairs.weight, report.ridge)
    values = utility(scaled.values)
    mean, std = values.mean(), values.std(correction=0).clamp(min=1e-12)
    weight = utility.weight / scaled.std / std
    bias = -float(weight @ scaled.mean + mean / std)
    return Learned(Taste(encoder.name, weight.float(), bias, encoder.probe(), report), scaled, utility)


def cross_validate(scaled: Scaled, pairs: Comparisons) -> TasteReport:
    """The ridge that predicts held-out comparisons best, and how well.

    What doubling the votes would do is extrapolated from half of them: errors are assumed to fall by the same factor.
    """
    held_out, right = hold_out(scaled, pairs)
    if not held_out.votes:
        return TasteReport(pairs.votes, len(pairs.better), math.nan, math.nan, math.nan, DEFAULT_RIDGE)
    agreements = {ridge: float(mean_per_vote(found, held_out).mean()) for ridge, found in right.items()}
    ridge = max(agreements, key=lambda one: agreements[one])
    agreement, error = agreements[ridge], standard_error(right[ridge], held_out)
    some, halved = hold_out(scaled, pairs, (ridge,), every=2)
    wrong = 1 - float(mean_per_vote(halved[ridge], some).mean()) if some.votes else 0.0
    shrinks = min(1.0, (1 - agreement) / max(wrong, 1e-9)) if some.votes else 1.0
    return TasteReport(pairs.votes, len(pairs.better), agreement, error, 1 - (1 - agreement) * shrinks, ridge)


def image_folds(pairs: Comparisons) -> Tensor:
    """The fold of each image (N,), dealt out in random order with a fixed seed; -1 for an image of no comparison.

    An image has the fold of the vote that names it first, of the votes' first comparisons before their second ones: so
    votes that share no image stay whole, and of those that do, each keeps some comparisons.
    """
    numbers, vote = pairs.vote.unique(return_inverse=True)
    dealt = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(0)).tolist()
    seen, order = Counter(), []
    for comparison, number in enumerate(vote.tolist()):
        order.append((seen[number], dealt[number], comparison))
        seen[number] += 1
    images = torch.stack([pairs.better, pairs.worse], 1)
    folds = [-1] * (int(images.max()) + 1)
    for _, place, comparison in sorted(order):
        for image in images[comparison].tolist():
            if folds[image] < 0:
                folds[image] = place % FOLDS
    return torch.tensor(folds)


def hold_out(
    scaled: Scaled, pairs: Comparisons, ridges: tuple[float, ...] = RIDGES, every: int = 1
) -> tuple[Comparisons, dict[float, Tensor]]:
    """The comparisons that can be held out, and for each ridge whether the others predict them (M,); ties of the fit
    count half.

    Images are held out, since an image that is learned from gives away its other comparisons; comparisons of a held-out
    image with another one are left out. `every` second, third, ... of the other votes is learned from.
    """
    difference, folds = scaled.differences(pairs), image_folds(pairs)
    better, worse = folds[pairs.better], folds[pairs.worse]
    held_out = torch.zeros(len(better), dtype=torch.bool)
    right = {ridge: torch.zeros(len(better), dtype=torch.float64) for ridge in ridges}
    for fold in range(FOLDS):
        out = (better == fold) & (worse == fold)
        learned = (better != fold) & (worse != fold) & (pairs.vote % every == 0)
        if not (learned.any() and out.any()):
            continue
        span = Span.of(difference[learned])
        held_out |= out
        for ridge in ridges:
            right[ridge][out] = (difference[out] @ span.fit(pairs.weight[learned], ridge)).sign() / 2 + 0.5
    return pairs.select(held_out), {ridge: found[held_out] for ridge, found in right.items()}


class TasteReward(Reward):
    """The utility of a learned taste; named after its file."""

    name = "taste"
    needs_prompt = False
    typical_range = (-3.0, 3.0)

    def __init__(
        self,
        taste: Taste,
        settings: RewardSettings | None = None,
        encoder: Encoder | None = None,
        name: str = "taste",
    ):
        super().__init__(settings)
        self.taste, self.given, self.encoder = taste, encoder, encoder
        self.name = name  # type: ignore[misc]  several tastes can be combined
        self.learned = [float(f"{w:.3g}") for w in taste.weight.tolist()]

    def build(self) -> nn.Module | None:
        self.encoder = self.given or encoder_of(self.taste, replace(self.settings, device="cpu"))
        return self.encoder.network

    def unload(self) -> None:
        super().unload()
        self.encoder = self.given

    def score_batch(self, images: Tensor, prompts: list[str]) -> Tensor:
        assert self.encoder is not None  # `score` has loaded it
        return self.taste(self.encoder(images))


def encoder_of(taste: Taste, settings: RewardSettings) -> Encoder:
    """The encoder that a taste was learned on. Raises RewardError where it is another version, or a host's."""
    if taste.encoder not in ENCODERS:
        raise RewardError(
            f"The taste was learned on the image features of {taste.encoder}, which cannot be loaded here. Use it with "
            f"Load Taste in ComfyUI, or train it again on the same votes with --encoder {' or '.join(ENCODERS)}."
        )
    encoder = load_encoder(taste.encoder, settings)
    check_encoder(taste, encoder)
    return encoder


def check_encoder(taste: Taste, encoder: Encoder) -> None:
    """Raise RewardError unless the encoder is the one that the taste was learned on."""
    probe = encoder.probe()
    same = probe.shape == taste.probe.shape and torch.cosine_similarity(probe, taste.probe, 0) > SAME_PROBE
    if not same and taste.encoder == encoder.name:
        raise RewardError(
            f"The taste was learned on another version of {encoder.name}, whose image features differ. Train it again "
            "on the same votes."
        )
    if not same:
        raise RewardError(
            f"The taste was learned on the image features of {taste.encoder}, and {encoder.name} has others. "
            f"Use {taste.encoder}, or train the taste again on {encoder.name}."
        )


def taste_reward(path: Path, settings: RewardSettings | None = None) -> TasteReward:
    """The reward in a taste's file, under the file's name."""
    return TasteReward(load_taste(path), settings, name=path.stem)
