"""What stage 2 changes: the sharpness of reconstructions, and an image.

    python study/stage2.py OUT.png RUN RUN ...

All runs reconstruct the same validation images; OUT.png shows the original, then the reconstruction
of each run. Sharpness: mean |difference| of neighbouring pixels, divided by that of the originals
(ours). It is 1 if reconstructions are as sharp as the originals; noise raises it too, so look at
the image. It goes to metrics.jsonl of the runs.
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

ROWS, COLUMNS, ZOOM = 6, 3, 2
BATCH = 100


def edges(x):
    """img (B, 3, H, W) -> () mean |difference| of neighbours, to the right and below"""
    right = x.diff(dim=-1).abs().mean()
    below = x.diff(dim=-2).abs().mean()
    return (right + below) / 2


@torch.no_grad()
def reconstruct(run, images):
    """uint8 (n, 3, S, S) -> the run's reconstructions, same shape, in [0, 1]"""
    model = VTPModel.from_pretrained(run)
    parts = []
    for batch in images.split(BATCH):
        z = model.get_reconstruction_latents(normalize(batch))
        parts.append(denormalize(model.get_latents_decoded_images(z)).clamp(0, 1))
    return torch.cat(parts)


def side_by_side(versions):
    """versions  list of (n, 3, S, S) in [0, 1], the same images in each

    -> PIL.Image: ROWS x COLUMNS images, evenly spaced among the n, each in all its versions
    """
    shown = torch.linspace(0, len(versions[0]) - 1, ROWS * COLUMNS).long()
    strips = torch.cat([x[shown] for x in versions], -1)      # (18, 3, S, versions * S)
    strips = pad(strips, (2, 6, 2, 2), value=1.0)
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
        record_metric(run, "sharpness", (edges(x) / edges(originals)).item(),
                      f"mean |difference| of neighbouring pixels of {len(images)} reconstructions "
                      f"of {source.spec} val, over that of the originals; ADM crop {side} px, fp32")
        versions.append(x)
    side_by_side(versions).save(out, optimize=True)
    print(f"wrote {out}: original, {', '.join(runs)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
