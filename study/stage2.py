"""Compare the reconstructions of several decoders: an image, and a measure of sharpness.

    python study/stage2.py OUT.png RUN RUN ...

All runs reconstruct the same validation images. OUT.png shows each original, followed by its
reconstruction by each run. The sharpness is recorded in metrics.jsonl of each run; it is the mean
absolute difference of adjacent pixels, divided by that of the originals (ours). It is 1 if the
reconstructions are as sharp as the originals. Noise increases it too, so look at the image as well.
"""
import json
import sys
from pathlib import Path

import torch
from PIL import Image
from torch.nn.functional import pad

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import eval_batches, open_data
from vtp_min import VTPModel
from vtp_min.augment import denormalize, normalize
from vtp_min.run import record_metric

ROWS, COLUMNS = 6, 3                             # of OUT.png: 18 images
ZOOM = 2                                         # each pixel is shown as 2 x 2 pixels
BATCH = 100                                      # images at a time


def mean_difference(x):
    """x (B, 3, H, W) -> scalar: mean absolute difference of adjacent pixels"""
    right = x.diff(dim=-1).abs().mean()
    below = x.diff(dim=-2).abs().mean()
    return (right + below) / 2


@torch.no_grad()
def reconstruct(run, images):
    """images uint8 (n, 3, S, S) -> reconstructions by the run, float, same shape, in [0, 1]"""
    model = VTPModel.from_pretrained(run)
    parts = []
    for batch in images.split(BATCH):
        z = model.get_reconstruction_latents(normalize(batch))
        parts.append(denormalize(model.get_latents_decoded_images(z)).clamp(0, 1))
    return torch.cat(parts)


def side_by_side(versions):
    """-> PIL.Image: ROWS x COLUMNS images, evenly spaced among the n; each in all its versions

    versions  list of tensors (n, 3, S, S) in [0, 1]: the originals, then the reconstructions
    """
    shown = torch.linspace(0, len(versions[0]) - 1, ROWS * COLUMNS).long()
    strips = torch.cat([x[shown] for x in versions], -1)      # (18, 3, S, versions * S)
    strips = pad(strips, (2, 6, 2, 2), value=1.0)             # white margins
    rows = [torch.cat([*row], -1) for row in strips.split(COLUMNS)]
    page = torch.cat(rows, -2)                                # (3, height, width)
    page = (page * 255).round().byte().permute(1, 2, 0).numpy()
    height, width, _ = page.shape
    return Image.fromarray(page).resize((ZOOM * width, ZOOM * height), Image.NEAREST)


def main(out, *runs):
    settings = json.loads(Path(runs[0], "run.json").read_text())
    val, side = settings["val_data"], settings["image"]
    source = open_data(val or settings["data"], "val", settings["seed"], side, whole=bool(val))
    images = torch.cat([x for x, _, _ in eval_batches(source, side, BATCH, limit=500)])
    originals = images / 255
    versions = [originals]
    for run in runs:
        x = reconstruct(run, images)
        sharpness = mean_difference(x) / mean_difference(originals)
        record_metric(run, "sharpness", sharpness.item(),
                      f"mean absolute difference of adjacent pixels of {len(images)} "
                      f"reconstructions of {source.spec} val, divided by that of the originals; "
                      f"ADM crop {side} px, fp32")
        versions.append(x)
    side_by_side(versions).save(out, optimize=True)
    print(f"wrote {out}; from left to right: original, {', '.join(runs)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
