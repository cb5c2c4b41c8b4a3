"""Compare reconstructions after equal training with L1 alone and with --perceptual efficientnet.

    python study/perceptual.py                  built-in shapes -> study/perceptual/
    python study/perceptual.py --data DIR       photographs as class folders DIR/train, DIR/val
    python study/perceptual.py --smallest 1 --weight 0.02      another form of the loss: resolutions
                                                from 1 x 1 on instead of 8 x 8, weight 0.02
    python study/perceptual.py --gradients      only the gradients of each resolution, at the
                                                reconstructions of a run that was trained with L1
    python study/perceptual.py --cost           only the cost of the loss in a training step

Two tokenizers (AE: reconstruction alone) of equal seed and steps differ in --perceptual only. Their
reconstructions of validation images are measured:

PSNR, SSIM   by eval.py recon
distance     of the features at all five resolutions, whatever resolutions the loss uses
sharpness    mean absolute difference of neighbouring pixels of the reconstructions, divided by that
             of the images: 1 is as sharp as the images, less is blurred (ours)
rFD          Frechet distance by the classifier that is trained on the data. EfficientNet is no
             independent judge of the second tokenizer, which was trained with its features.

Results are added to study/perceptual/results.jsonl, and an image of reconstructions of shapes is
written there. Reconstructions of photographs stay in runs/, because photographs may not be
published.
"""
import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median

import torch
from PIL import Image
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "study")]
import bench                                                               # noqa: E402
import train                                                               # noqa: E402
from data import TrainBatches, eval_batches, open_data                     # noqa: E402
from study import RECIPE                                                   # noqa: E402
from tokenizer import get_tokenizer                                        # noqa: E402
from vtp_min.augment import denormalize, normalize                         # noqa: E402
from vtp_min.device import autocast, choose_precision                      # noqa: E402
from vtp_min.extras import perceptual                                      # noqa: E402
from vtp_min.extras.efficientnet import EfficientNetLite0                  # noqa: E402
from vtp_min.extras.perceptual import EfficientNetPerceptual as Loss       # noqa: E402
from vtp_min.extras.perceptual import feature_distance                     # noqa: E402
from vtp_min.model import load_model                                       # noqa: E402

SHAPES = "shapes:objects=1,size=0.6-0.9"
STEPS = 800                                      # of each tokenizer (ours)
N = 2080                                         # validation images
SHOWN = 8                                        # images in the figure


def sharpness(images):
    """(B, 3, H, W) -> mean absolute difference of neighbouring pixels, a number"""
    across = (images[..., 1:] - images[..., :-1]).abs().mean()
    down = (images[..., 1:, :] - images[..., :-1, :]).abs().mean()
    return (across + down).item() / 2


@torch.no_grad()
def reconstructions(run, source, n):
    """-> validation images and their reconstructions, both (n, 3, H, W) in [0, 1]"""
    model = load_model(run)
    images = torch.cat([x for x, *_ in eval_batches(source, model.config.image_size, 100, n)])
    target = normalize(images)
    outputs = [model.get_latents_decoded_images(model.get_reconstruction_latents(x))
               for x in target.split(100)]
    return denormalize(target), denormalize(torch.cat(outputs)).clamp(0, 1)


# runs a command line of train.py with another form of the loss
WITH_FORM = """import sys
from vtp_min.extras.perceptual import EfficientNetPerceptual
EfficientNetPerceptual.WEIGHT, EfficientNetPerceptual.SMALLEST = {weight}, {smallest}
import train
sys.exit(train.command(sys.argv[1:]))"""


def command(*words):
    """Run one of our scripts; its output goes to the terminal"""
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True)


def compare(data, work, out, steps, weight, smallest):
    """Train both tokenizers, if runs/ does not hold them already -> list of two rows"""
    source = open_data(data, "val", side=32)
    form = {"weight": weight, "smallest": smallest}
    usual = (weight, smallest) == (Loss.WEIGHT, Loss.SMALLEST)
    rows, shown = [], []
    for kind in ("none", "efficientnet"):
        run = work / (kind if usual or kind == "none" else f"{kind}-{weight:g}-{smallest}")
        script = ["train.py"] if usual else ["-c", WITH_FORM.format(**form)]
        command(*script, "--out", run, "--data", data, "--size", "nano", "--image", 32,
                "--patch", 8, "--latent-dim", 64, *RECIPE.split(), "--w-clip", 0, "--w-ssl", 0,
                "--perceptual", kind, "--steps", steps, "--seed", 0)
        command("eval.py", "recon", run, "--limit", N, "--perceptual", "none",
                "--features", "classifier", "--train-limit", 10_000)
        lines = (run / "metrics.jsonl").read_text().splitlines()
        metrics = {m["name"]: m["value"] for m in map(json.loads, lines)}
        images, outputs = reconstructions(run, source, 500)
        metrics["sharpness"] = sharpness(outputs) / sharpness(images)
        metrics["distance"] = five_resolutions(images, outputs)
        rows.append({"what": "reconstruction", "data": data if data.startswith("shapes")
                     else Path(data).name, "perceptual": kind, "steps": steps, "images": N,
                     "precision": choose_precision(torch.device("cpu")), "metrics": metrics}
                    | (form if kind == "efficientnet" else {}))
        shown = shown or [images[:SHOWN]]
        shown.append(outputs[:SHOWN])
    folder = out if data.startswith("shapes") and usual else work
    save_grid(shown, folder / "reconstructions.png")
    return rows


@torch.no_grad()
def five_resolutions(images, outputs):
    """(B, 3, H, W) in [0, 1], twice -> mean distance with the features of all resolutions"""
    net = EfficientNetLite0()
    return feature_distance(net.stages(images), net.stages(outputs)).mean().item()


def gradients(data, work, n=200):
    """-> row: the gradient of the distance at each resolution, compared with that of L1, both with
    respect to the reconstructions of the run that compare() trained with L1 alone

    length  of the gradient, divided by that of L1
    cosine  of the angle between both
    """
    images, outputs = reconstructions(work / "none", open_data(data, "val", side=32), n)
    target, pixels = normalize(255 * images), normalize(255 * outputs).requires_grad_()
    l1, = torch.autograd.grad((pixels - target).abs().mean(), pixels)
    net, found = EfficientNetLite0(), []
    for k in range(5):
        pair = (net.stages(denormalize(x))[k:k + 1] for x in (pixels, target))
        gradient, = torch.autograd.grad(feature_distance(*pair).mean(), pixels)
        found.append(gradient)
    found.append(sum(found))
    return {"what": "gradients", "data": data, "images": n,
            "resolutions": ["16 x 16", "8 x 8", "4 x 4", "2 x 2", "1 x 1", "sum"],
            "length": [round((g.norm() / l1.norm()).item(), 2) for g in found],
            "cosine": [round(F.cosine_similarity(g.flatten(), l1.flatten(), 0).item(), 3)
                       for g in found]}


def save_grid(shown, path, scale=4):
    """shown  list of (n, 3, H, W): rows of images from top to bottom, enlarged `scale` times"""
    rows = [torch.cat(list(images), -1) for images in shown]
    grid = (torch.cat(rows, -2) * 255).byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(grid)
    image.resize((scale * image.width, scale * image.height), Image.NEAREST).save(path)
    print(f"-> {path}: images, L1 alone, with the perceptual loss")


def cost(rounds=12):
    """-> row: seconds of a joint training step of nano without and with the loss, alternately"""
    precision = choose_precision(torch.device("cpu"))
    joint = bench.Joint("nano", precision, "fast", 36, 9)
    data = TrainBatches(open_data("shapes", side=36), get_tokenizer("ViT-B-32", 77), seed=0,
                        batch=48, batch_ssl=16, batch_rec=48, clip=True, ssl=True, rec=True,
                        image=36, local_image=18, n_local=2, patch=9)
    batches = [data[0], data[1]]
    loss = perceptual.build("efficientnet")

    def step(net):
        def call(number):
            batch = batches[number % 2]
            joint.optimizer.zero_grad()
            with bench.use_form("fast"):
                train.compute_gradients(batch, bench.TEMP, bench.WEIGHTS, joint.student,
                                        joint.teacher, net, joint.targets,
                                        autocast(bench.CPU, precision), joint.scaler, bench.CPU)
        return call

    seconds = bench.measure_alternately({"none": step(None), "efficientnet": step(loss)}, rounds)
    found = {kind: median(values) for kind, values in seconds.items()}
    return {"what": "cost", "protocol": "gradients of a step of nano's defaults: 36 px, 48 images, "
            "16 for DINO and iBOT, 48 reconstructed; alternately in one process",
            "precision": precision, "threads": torch.get_num_threads(), "rounds": rounds,
            "seconds": found, "ratio": found["efficientnet"] / found["none"]}


def main(args):
    work = ROOT / "runs" / "perceptual" / Path(args.data.partition(":")[0]).name
    out = ROOT / "study" / "perceptual"
    for folder in (work, out):
        folder.mkdir(parents=True, exist_ok=True)
    if args.cost:
        rows = [cost()]
    elif args.gradients:
        rows = [gradients(args.data, work)]
    else:
        rows = compare(args.data, work, out, args.steps, args.weight, args.smallest)
    with open(out / "results.jsonl", "a") as f:
        for row in rows:
            print(json.dumps(row))
            f.write(json.dumps(row) + "\n")


def parser():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", default=SHAPES, help="as train.py --data (default %(default)s)")
    p.add_argument("--steps", type=int, default=STEPS, help="default %(default)s")
    p.add_argument("--weight", type=float, default=Loss.WEIGHT,
                   help="of the perceptual loss (default %(default)s, that of train.py)")
    p.add_argument("--smallest", type=int, default=Loss.SMALLEST,
                   help="side of the smallest features that the loss uses (default %(default)s, "
                        "that of train.py)")
    p.add_argument("--gradients", action="store_true", help="only the gradients")
    p.add_argument("--cost", action="store_true", help="only the cost in a training step")
    return p


if __name__ == "__main__":
    main(parser().parse_args())
