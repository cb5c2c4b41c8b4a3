"""Write a copy of a tokenizer whose pixel decoder has new random weights; the rest stays.

    python study/new_decoder.py RUN --out FOLDER --seed 0

`train.py --stage 2 --init FOLDER --w-gan 0` then trains the new decoder on the frozen latents. The
fewer its steps, the worse are its reconstructions, while the latents stay the same in every bit.
study.py matches the reconstructions of two tokenizers in this way.
"""
import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from vtp_min import VTPModel                                               # noqa: E402


def parser():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", help="run of train.py, or folder of weights")
    p.add_argument("--out", required=True, help="new folder of weights")
    p.add_argument("--seed", type=int, default=0, help="of the random weights")
    return p


def main(args):
    if Path(args.out).resolve() == Path(args.run).resolve():
        raise ValueError(f"--out {args.out} is the run itself, whose decoder would be lost; give "
                         f"another folder")
    model = VTPModel.from_pretrained(args.run)
    if not model.config.train_reconstruction:
        raise ValueError(f"{args.run} has no decoder (it was trained with --w-rec 0)")
    torch.manual_seed(args.seed)
    untrained = VTPModel(model.config).pixel_decoder
    model.pixel_decoder.load_state_dict(untrained.state_dict())
    model.save_pretrained(args.out)


if __name__ == "__main__":
    try:
        main(parser().parse_args())
    except (ValueError, OSError) as problem:
        raise SystemExit(f"new_decoder.py: {problem}") from None
