"""Make the embedded models: draw, then train text encoder, readers, decoder and the two generators, then measure.

    python -m tools.tiny text  --work build/tiny
    python -m tools.tiny align --work build/tiny --minutes 15      (and the others, in any order)
    python -m tools.tiny card  --work build/tiny

Each stage runs for the given wall-clock minutes with a cosine learning rate and writes its model into `models/`.
"""

import argparse
import copy
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from comfyui_pcpo.tiny.align import AlignConfig, AlignImageEncoder, save_config
from comfyui_pcpo.tiny.captions import COLORS, OBJECTS, PATTERNS, SIZES, caption
from comfyui_pcpo.tiny.pipelines import MODELS
from comfyui_pcpo.tiny.polish import PolishNet
from tools.tiny.card import write_card
from tools.tiny.codec import LinearCodec, decoder_loss, fit_linear, make_autoencoder
from tools.tiny.data import UNSAID, Pictures, compatible, draw_pictures, labels, say
from tools.tiny.draw import SHEET, draw_sheet
from tools.tiny.generators import SD15, eps_loss, flow_loss, make_eps, make_flow
from tools.tiny.spoil import spoiled
from tools.tiny.text import WIDTH, make_text_encoder, make_tokenizer

logger = logging.getLogger("make")


def pictures(args: argparse.Namespace) -> Pictures:
    """The drawn pictures, kept in the work folder between stages."""
    path = args.work / f"pictures-{args.pictures}.pt"
    if not path.exists():
        args.work.mkdir(parents=True, exist_ok=True)
        logger.info("drawing %d pictures", args.pictures)
        drawn = draw_pictures(args.pictures, seed=0)
        torch.save({"pixels": drawn.pixels, "scenes": drawn.scenes}, path)
    saved = torch.load(path, weights_only=False)  # our own file, made two lines above
    return Pictures(saved["pixels"], saved["scenes"])


def linear_codec(args: argparse.Namespace, drawn: Pictures) -> LinearCodec:
    path = args.work / "linear.pt"
    if not path.exists():
        codec = fit_linear(drawn.images(torch.arange(min(4000, len(drawn.scenes)))))
        torch.save([codec.mean, codec.down, codec.up], path)
    return LinearCodec(*torch.load(path))


def text_parts(shared: Path) -> tuple[CLIPTokenizer, CLIPTextModelWithProjection]:
    tokenizer = CLIPTokenizer.from_pretrained(shared / "tokenizer")
    encoder = CLIPTextModelWithProjection.from_pretrained(shared / "text_encoder", torch_dtype=torch.float32)
    return tokenizer, encoder.eval().requires_grad_(False)


def tokens(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def fit(
    model: nn.Module, loss: Callable[[], Tensor], args: argparse.Namespace, save: Callable[[nn.Module], None]
) -> None:
    """AdamW with a cosine learning rate over `minutes`; what is saved is the running average of the weights."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01)
    average = copy.deepcopy(model)
    start, spoken, smooth = time.time(), 0.0, 0.0
    step, done = 0, 0.0
    while done < 1:
        done = (time.time() - start) / (60 * args.minutes)
        warm = min(1.0, (step + 1) / 100)
        optimizer.param_groups[0]["lr"] = args.lr * warm * (0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * min(done, 1))))
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(0.998, (step + 1) / (step + 20))
        with torch.no_grad():
            for kept, new in zip(average.parameters(), model.parameters(), strict=True):
                kept.lerp_(new, 1 - decay)
        step += 1
        smooth = value.item() if step == 1 else 0.98 * smooth + 0.02 * value.item()
        if done - spoken > 0.04 or done >= 1:
            spoken = done
            logger.info(
                "%5.1f %%  step %d  loss %.4f  %.2f s/step", 100 * done, step, smooth, (time.time() - start) / step
            )
            save(average)


def indices(count: int, batch: int) -> Iterator[Tensor]:
    while True:
        yield from torch.randperm(count).split(batch)


def make_text(args: argparse.Namespace) -> None:
    """The text encoder learns to say, from its pooled embedding, everything that a caption says or leaves unsaid."""
    drawn, rng = pictures(args), np.random.default_rng(1)
    tokenizer = make_tokenizer(args.models / "shared" / "tokenizer")
    encoder = make_text_encoder(tokenizer)
    sizes = {"total": 3, "size": len(SIZES) + 1, "color": len(COLORS) + 1, "pattern": len(PATTERNS) + 1}
    heads = nn.ModuleDict({name: nn.Linear(WIDTH, n) for name, n in {"objects": len(OBJECTS), **sizes}.items()})
    both = nn.ModuleList([encoder, heads])
    batches = indices(len(drawn.scenes), args.batch)

    def loss() -> Tensor:
        said = [say(drawn.scenes[i], rng) for i in next(batches).tolist()]
        target = labels(said)
        pooled = F.normalize(encoder(tokens(tokenizer, [caption(s) for s in said])).text_embeds, dim=-1) * WIDTH**0.5
        total = 20 * F.binary_cross_entropy_with_logits(heads["objects"](pooled), target["objects"])
        for name in sizes:
            total = total + F.cross_entropy(heads[name](pooled), target[name] - (UNSAID if name != "total" else 0))
        return total

    def save(average: nn.Module) -> None:
        copy.deepcopy(average[0]).half().save_pretrained(args.models / "shared" / "text_encoder")  # type: ignore[index]

    fit(both, loss, args, save)


def make_align(args: argparse.Namespace) -> None:
    """Picture against caption (every fitting caption in the batch counts) and reading heads."""
    drawn, rng = pictures(args), np.random.default_rng(2)
    codec = linear_codec(args, drawn)
    tokenizer, text = text_parts(args.models / "shared")
    model = AlignImageEncoder(AlignConfig())
    batches = indices(len(drawn.scenes), args.batch)

    def loss() -> Tensor:
        index = next(batches)
        scenes = [drawn.scenes[i] for i in index.tolist()]
        said = [say(scene, rng) for scene in scenes]
        images = drawn.images(index)
        blurred = codec.decode(codec.encode(images))  # what generated pictures look like
        mix = torch.rand(len(images), 1, 1, 1)
        images = images + mix * (blurred - images) + 0.1 * torch.rand(1) * torch.randn_like(images)
        features = model.encode(images)
        true, spoken = labels(scenes), labels(said)
        words = F.normalize(text(tokens(tokenizer, [caption(s) for s in said])).text_embeds, dim=-1)
        logits = model.embed(features) @ words.T * model.logit_scale.exp().clamp(max=30)
        fits = compatible(true, spoken).float()
        total = -(fits / fits.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()
        total = total - (fits / fits.sum(0) * logits.log_softmax(0)).sum(0).mean()
        read = model.read(features)
        total = total + 10 * F.binary_cross_entropy_with_logits(read["objects"], true["objects"])
        for name in ("total", "color", "pattern"):
            total = total + 0.5 * F.cross_entropy(read[name], true[name])
        return total

    folder = args.models / "emoji-align"
    folder.mkdir(parents=True, exist_ok=True)

    def save(average: nn.Module) -> None:
        save_config(model.config, folder)
        save_file(
            {key: value.half().contiguous() for key, value in average.state_dict().items()},
            folder / "model.safetensors",
        )

    fit(model, loss, args, save)


def make_polish(args: argparse.Namespace) -> None:
    """A small network learns to say how far a drawing was spoiled."""
    drawn = pictures(args)
    codec, model = linear_codec(args, drawn), PolishNet()
    batches = indices(len(drawn.scenes), args.batch)
    folder = args.models / "emoji-polish"
    folder.mkdir(parents=True, exist_ok=True)

    def loss() -> Tensor:
        copies, clean = spoiled(drawn.images(next(batches)), codec)
        return F.mse_loss(model(copies), clean)

    def save(average: nn.Module) -> None:
        state = {key: value.half().contiguous() for key, value in average.state_dict().items()}
        save_file(state, folder / "model.safetensors")

    fit(model, loss, args, save)


def make_decoder(args: argparse.Namespace) -> None:
    """The decoder learns pictures from linear latents, the encoder learns the linear latents from pictures."""
    drawn = pictures(args)
    codec = linear_codec(args, drawn)
    vae: Any = (
        AutoencoderTiny.from_pretrained(args.models / "shared" / "vae").float() if args.go_on else make_autoencoder()
    )
    batches = indices(len(drawn.scenes), args.batch)

    def loss() -> Tensor:
        images = drawn.images(next(batches))
        latents = codec.encode(images)
        noisy = latents + 0.1 * torch.rand(len(images), 1, 1, 1) * torch.randn_like(latents)
        half = len(images) // 2
        return decoder_loss(vae, noisy, images) + F.mse_loss(vae.encode(images[:half]).latents, latents[:half])

    def save(average: nn.Module) -> None:
        copy.deepcopy(average).half().save_pretrained(args.models / "shared" / "vae")  # type: ignore[operator]

    fit(vae, loss, args, save)


def make_generator(args: argparse.Namespace) -> None:
    drawn, rng = pictures(args), np.random.default_rng(3)
    codec = linear_codec(args, drawn)
    latents = torch.cat([codec.encode(drawn.images(i)) for i in torch.arange(len(drawn.scenes)).split(1000)])
    tokenizer, text = text_parts(args.models / "shared")
    flow = args.stage == "flow"
    model: Any
    objective: Any
    model, objective = (make_flow(), flow_loss(text)) if flow else (make_eps(), eps_loss(text))
    folder = args.models / f"emoji-{args.stage}"
    if args.go_on:
        model = type(model).from_pretrained(folder / ("transformer" if flow else "unet")).float()
    batches = indices(len(latents), args.batch)

    def loss() -> Tensor:
        index = next(batches)
        words = [caption(say(drawn.scenes[i], rng)) if rng.random() > 0.1 else "" for i in index.tolist()]
        return objective(model, latents[index], tokens(tokenizer, words))

    def save(average: nn.Module) -> None:
        copy.deepcopy(average).half().save_pretrained(folder / ("transformer" if flow else "unet"))  # type: ignore[operator]

    if flow:
        FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    else:
        DDIMScheduler(**SD15, steps_offset=1, set_alpha_to_one=False, clip_sample=False).save_pretrained(
            folder / "scheduler"
        )
    fit(model, loss, args, save)


def make_glyphs(args: argparse.Namespace) -> None:
    """The sheet of glyphs that the pictures are drawn from; only needed again for other objects."""
    if args.font is None:
        raise SystemExit("--font is missing: the glyphs are drawn from Noto Color Emoji. Give its .ttf file.")
    draw_sheet(args.font).save(SHEET, optimize=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.tiny", description=__doc__)
    parser.add_argument("stage", choices=("glyphs", "text", "align", "polish", "decoder", "flow", "eps", "card"))
    parser.add_argument("--work", type=Path, required=True, help="folder for the drawn pictures")
    parser.add_argument("--models", type=Path, default=MODELS, help="folder for the models")
    parser.add_argument("--font", type=Path, help="glyphs: Noto Color Emoji with colour bitmaps")
    parser.add_argument("--images", type=Path, default=Path("docs/images"), help="card: folder for its pictures")
    parser.add_argument("--every", type=int, default=1, help="card: measure every n-th held-out prompt")
    parser.add_argument("--pictures", type=int, default=50_000)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--go-on", action="store_true", help="start from the saved decoder or generator")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    stages = {
        "glyphs": make_glyphs,
        "text": make_text,
        "align": make_align,
        "polish": make_polish,
        "decoder": make_decoder,
        "card": write_card,
    }
    stages.get(args.stage, make_generator)(args)


if __name__ == "__main__":
    main()
