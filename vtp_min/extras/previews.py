"""Samples at several steps of the training of a DiT, to see how they develop.

    RUN/previews/step-000100.png     a row of square images, one for each of at most 10 classes

The EMA weights generate them, always from the same noise, and the tokenizer decodes them. dit.py
train writes them and eval.py report shows them. A training with previews draws the same random
numbers and has the same weights, in every bit, as one without.

n images    S side of an image in pixels    C, H, W latent
"""
import os
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..augment import denormalize
from ..config import atomic_write
from ..dist import print0, printable, rank
from ..rng import Stream, make_rng
from .files import reading

FIRST_STEP = 50           # ours; the others follow from it
MAX_CLASSES = 10


def is_preview_step(done, steps):
    """True for 50, 100, 200, 400, ... completed steps, and for the last of all `steps`

    Apart from the last one they do not depend on --steps, so that a prolonged run has the same.
    """
    doublings, rest = divmod(done, FIRST_STEP)
    return done == steps or (rest == 0 and doublings.bit_count() == 1)


def preview_classes(n_classes):
    """-> the classes that are shown: at most MAX_CLASSES, evenly spaced"""
    n = min(n_classes, MAX_CLASSES)
    return [i * n_classes // n for i in range(n)]


class Previews:
    """Writes the previews of a run.

    run       Run of the training      data  Latents of the training, which name their tokenizer
    args      previews (bool), steps, seed
    generate  function: noise (n, C, H, W), classes (n,) -> normalised latents (n, C, H, W)
    load_tokenizer  the function of dit.py

    The tokenizer is loaded again for each preview, so that it needs no memory in between.
    """

    def __init__(self, run, data, args, generate, load_tokenizer):
        self.run, self.data, self.args = run, data, args
        self.generate, self.load_tokenizer = generate, load_tokenizer
        self.tokenizer = os.path.normpath(data.folder / data.about["tokenizer"])
        # if it is missing, Latents.check has said so
        has_tokenizer = Path(self.tokenizer, "config.json").exists()
        self.enabled = args.previews and has_tokenizer and rank() == 0
        if run.step == 0 and rank() == 0:          # those of an earlier run, replaced by --fresh
            for path in preview_files(run.folder).values():
                path.unlink()

    def after_step(self, done):
        """Write a preview if this is its step. Nothing that fails here ends the training.

        done  number of completed steps
        """
        if not self.enabled or not is_preview_step(done, self.args.steps):
            return
        start = time.perf_counter()
        try:
            # a new model draws its initial weights from PyTorch's global generator
            with torch.random.fork_rng(devices=[]):
                self._write(done)
        except Exception as problem:               # also a full disk, or no memory left on a GPU
            self.enabled = False
            reason = printable(str(problem).split("\n")[0][:200])
            print0(f"\nnote: the training goes on without previews, because that of step {done} "
                   f"failed ({type(problem).__name__}: {reason})")
        self.run.interval_start += time.perf_counter() - start       # not training time

    @torch.no_grad()
    def _write(self, done):
        stats, about = self.data.stats, self.data.about
        classes = preview_classes(len(self.data.classes))
        rngs = [make_rng(Stream.SAMPLING, self.args.seed, j) for j in range(len(classes))]
        noise = [rng.standard_normal(self.data.shape, dtype=np.float32) for rng in rngs]
        z = self.generate(torch.from_numpy(np.stack(noise)), torch.tensor(classes)).float()
        tokenizer, encoder = self.load_tokenizer(self.tokenizer, z.device)
        if encoder != about["encoder"]:
            raise ValueError(f"{self.tokenizer} has been trained on and does not fit the latents")
        z = z * stats["std"].to(z) + stats["mean"].to(z)
        images = denormalize(tokenizer.get_latents_decoded_images(z))            # (n, 3, S, S)
        images = (255 * images).clamp(0, 255).to(torch.uint8)
        row = images.permute(2, 0, 3, 1).flatten(1, 2)                           # (S, n S, 3)
        path = preview_path(self.run.folder, done)
        path.parent.mkdir(exist_ok=True)
        image = Image.fromarray(row.cpu().numpy())
        atomic_write(path, lambda part: image.save(part, "PNG"))


# ---------------------------------------------------------------- the files
def preview_path(run, done):
    return Path(run, "previews", f"step-{done:06d}.png")


def preview_files(run):
    """-> {number of completed steps: path}, in the order of the steps"""
    found = {}
    for path in Path(run, "previews").glob("step-*.png"):
        number = path.stem.removeprefix("step-")
        if number.isdecimal():
            found[int(number)] = path
    return dict(sorted(found.items()))


def read_preview(path):
    """-> the images of a preview, (n, 3, S, S) in [0, 1]. ValueError if it cannot be read"""
    with reading(path, "delete it"):
        pixels = np.array(Image.open(path).convert("RGB"))
        side, width, _ = pixels.shape
        if width % side:
            raise ValueError(f"it has {width} x {side} pixels and is not a row of square images")
    row = torch.from_numpy(pixels) / 255                                         # (S, n S, 3)
    return row.unflatten(1, (-1, side)).permute(1, 3, 0, 2)
