"""Make the embedded models, one stage at a time.

    python -m tools.tiny codec --work build/tiny --minutes 30      (and the other stages)

Each stage trains for the given wall-clock minutes, writes its model every few minutes, and continues with --resume.
"""

import argparse
import logging
from pathlib import Path

import torch

from comfyui_pcpo.tiny.pipelines import MODELS
from tools.tiny.card import write_card
from tools.tiny.draw import SHEET, draw_sheet
from tools.tiny.fit import StageSettings
from tools.tiny.folders import Folders
from tools.tiny.train_align import train_align
from tools.tiny.train_codec import train_codec, train_decoder
from tools.tiny.train_generator import train_eps, train_flow
from tools.tiny.train_polish import train_polish
from tools.tiny.train_text import train_text


def make_glyphs(font: Path | None) -> None:
    """The sheet of glyphs that the images are drawn from; only needed again for other objects."""
    if font is None:
        raise SystemExit("--font is missing: the glyphs are drawn from Noto Color Emoji. Give its .ttf file.")
    draw_sheet(font).save(SHEET, optimize=True)


STAGES = {
    "codec": train_codec,
    "decoder": train_decoder,
    "text": train_text,
    "flow": train_flow,
    "align": train_align,
    "eps": train_eps,
    "polish": train_polish,
    "card": write_card,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.tiny", description=__doc__)
    parser.add_argument("stage", choices=("glyphs", *STAGES))
    parser.add_argument("--work", type=Path, required=True, help="folder for drawings and training states")
    parser.add_argument("--models", type=Path, default=MODELS, help="folder for the models")
    parser.add_argument("--font", type=Path, help="glyphs: Noto Color Emoji with colour bitmaps")
    parser.add_argument("--minutes", type=float, default=StageSettings.minutes)
    parser.add_argument("--batch", type=int, default=StageSettings.batch)
    parser.add_argument("--lr", type=float, default=StageSettings.lr)
    parser.add_argument("--images", type=int, default=StageSettings.images, help="drawings to train on")
    parser.add_argument("--resume", action="store_true", help="continue from the saved training state")
    parser.add_argument("--float32", action="store_true", help="no bfloat16 autocast")
    parser.add_argument("--muon", action="store_true", help="Muon for the matrices of transformer blocks")
    parser.add_argument("--compile", action="store_true", help="torch.compile: a minute to start, then faster steps")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(arguments)
    if args.stage == "glyphs":
        return make_glyphs(args.font)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.work.mkdir(parents=True, exist_ok=True)
    half = not args.float32
    settings = StageSettings(
        args.work,
        args.minutes,
        args.batch,
        args.lr,
        args.images,
        args.resume,
        half=half,
        muon=args.muon,
        compiled=args.compile,
    )
    STAGES[args.stage](settings, Folders(args.models))


if __name__ == "__main__":
    main()
