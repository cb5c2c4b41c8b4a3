"""What stage 2 changes: sharpness as a number, and a picture.   python study/stage2.py OUT.png RUN RUN ...

All runs paint the same validation pictures; the picture shows the original, then what each made of it. Sharpness: mean difference of neighbouring
pixels, as a share of that of the originals (ours). 1 is as crisp as they are; noise raises it too, so look at the picture. Goes to the runs' metrics.jsonl.
"""
import json
import sys
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import eval_batches, open_data
from vtp_min import VTPModel
from vtp_min.run import metric
from vtp_min.views import denormalize, normalize

ROWS, COLUMNS, ZOOM = 6, 3, 2


def edges(x):
    """img (B, 3, H, W) -> mean |difference| of neighbours, right and below ()"""
    return (x.diff(dim=-1).abs().mean() + x.diff(dim=-2).abs().mean()) / 2


@torch.no_grad()
def paint(run, images):
    """uint8 (n, 3, S, S) -> what the run makes of them, 0..1"""
    model = VTPModel.from_pretrained(run)
    return torch.cat([denormalize(model.get_latents_decoded_images(model.get_reconstruction_latents(normalize(part)))).clamp(0, 1) for part in images.split(100)])


def main(out, *runs):
    settings = json.loads(Path(runs[0], "run.json").read_text())
    val, side = settings["val_data"], settings["image"]
    source = open_data(val or settings["data"], "val", settings["seed"], side, whole=bool(val))
    images = torch.cat([x for x, _, _ in eval_batches(source, side, 100, limit=500)])
    real, painted = images / 255, [paint(run, images) for run in runs]
    for run, x in zip(runs, painted):
        metric(run, "sharpness", (edges(x) / edges(real)).item(),
               f"mean |difference| of neighbouring pixels of {len(images)} reconstructions of {source.spec} val, over that of the originals; ADM crop {side} px, fp32")
    shown = torch.linspace(0, len(images) - 1, ROWS * COLUMNS).long()
    tiles = torch.stack([real[shown], *(x[shown] for x in painted)], 1)                # (n, 1 + runs, 3, S, S)
    strips = torch.nn.functional.pad(torch.cat([*tiles.unbind(1)], -1), (2, 6, 2, 2), value=1.0)
    page = torch.cat([torch.cat([*row], -1) for row in strips.split(COLUMNS)], -2)
    Image.fromarray((page * 255).round().byte().permute(1, 2, 0).numpy()).resize((ZOOM * page.shape[2], ZOOM * page.shape[1]), Image.NEAREST).save(out, optimize=True)
    print(f"wrote {out}: original, {', '.join(runs)}")


main(*sys.argv[1:])
