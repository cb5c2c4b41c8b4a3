"""What a run has learned, as numbers: one subcommand a number or table, each printed with its protocol and kept in metrics.jsonl.

    python eval.py zeroshot RUN       words: is the right class name the closest caption?
    python eval.py probe RUN          meaning: linear probe and kNN, on the latents and at full width
    python eval.py recon RUN          fidelity: PSNR, SSIM, LPIPS of reconstructions
    python eval.py fid SAMPLES        generation: Frechet distance of samples to real pictures
    python eval.py report RUN         one page with everything, to look at
    python eval.py fetch              the external weights (VGG for LPIPS, Inception for FID)
RUN is a folder of train.py, or released weights. Data and picture size default to what the run was trained on.
"""
import argparse
import json
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from tqdm import tqdm

from data import denormalize, eval_batches, normalize, open_data
from tokenizer import get_tokenizer
from vtp_min import weights
from vtp_min.dist import say, start, stop
from vtp_min.fid import Judge, frechet_distance, load_inception, psnr, ssim, statistics, train_judge
from vtp_min.losses import Perceptual
from vtp_min.model import VTPModel
from vtp_min.probes import knn, linear_probe, zero_shot, zero_shot_classifier
from vtp_min.report import write_report
from vtp_min.run import metric


# ---------------------------------------------------------------- what to evaluate, on what
def load(args, device):
    """RUN -> its model, and the flags it was trained with ({} for released weights)"""
    model = VTPModel.from_pretrained(args.run).to(device)
    return model, settings_of(args.run)


def settings_of(run):
    path = Path(run, "run.json")
    return json.loads(path.read_text()) if path.exists() else {}


def pictures(args, settings, split, side):
    """The source that --data / --val-data name, else the run's own"""
    data, val = args.data or settings.get("data"), args.val_data or settings.get("val_data")
    if split == "val" and val:
        return open_data(val, "val", settings.get("seed", 0), side, whole=True)
    if not data:
        raise ValueError(f"{args.run} does not say what it was trained on; give --data")
    return open_data(data, split, settings.get("seed", 0), side)


def with_classes(source):
    if not source.classes:
        raise ValueError(f"{source.spec} has no class labels; give --val-data (and --data for a probe) a folder of class folders")
    return source


@torch.no_grad()
def encode(model, source, side, device, args, limit, crop):
    """-> labels (n,) and, each (n, .), 'latent' mean latent, 'full' class token ++ mean patch, 'clip' CLIP feature if there is one"""
    out = {"latent": [], "full": [], "clip": [], "labels": []}
    for images, labels, _ in tqdm(eval_batches(source, side, args.batch, limit, crop, args.workers), "encode", leave=False):
        cls, patches = model.trunk(normalize(images.to(device)))
        out["full"].append(torch.cat([cls, patches.mean(1)], 1))
        out["latent"].append(model.trunk.feature_bottleneck(patches).mean(1))
        out["clip"] += [model.project(cls, patches)] if model.config.train_clip else []
        out["labels"].append(labels.to(device))
    return {k: torch.cat(v) for k, v in out.items() if v}


# ---------------------------------------------------------------- zeroshot
@torch.no_grad()
def zeroshot(args, device):
    """Class names through prompt templates against pictures squashed to a square: the official protocol (fp32)"""
    model, settings = load(args, device)
    if not model.config.train_clip:
        raise ValueError(f"{args.run} was trained without captions (--w-clip 0): there is no text tower to ask")
    side = model.config.image_size
    source = with_classes(pictures(args, settings, "val", side))
    tokenize = get_tokenizer("ViT-B-32", model.config.text_context_length)
    W = zero_shot_classifier(lambda texts: model.get_clip_text_feature(tokenize(texts).to(device)), source.classes, source.templates)
    x = encode(model, source, side, device, args, args.limit, "squash")
    protocol = (f"{len(x['labels'])} pictures of {source.spec} val, {len(source.classes)} classes x {len(source.templates)} templates, "
                f"squashed to {side} px, fp32, chance {1 / len(source.classes):.3f}")
    for k, value in zero_shot(x["clip"], W, x["labels"]).items():
        metric(args.run, f"zero-shot {k}", value, protocol)


# ---------------------------------------------------------------- probe
def probe(args, device):
    """Linear probe and kNN on frozen features. The paper's figures probe the latents, its headline number wider features"""
    model, settings = load(args, device)
    side = model.config.image_size
    train, val = with_classes(pictures(args, settings, "train", side)), with_classes(pictures(args, settings, "val", side))
    if train.classes != val.classes:
        raise ValueError(f"{train.spec} and {val.spec} differ in their classes ({len(train.classes)} and {len(val.classes)}); a probe needs the same ones")
    a, b = (encode(model, s, side, device, args, n, "adm") for s, n in ((train, args.train_limit), (val, args.limit)))
    C = len(val.classes)
    for kind, what in (("latent", f"mean of the {model.config.vision_feature_bottleneck}-d patch latents"),
                       ("full", f"class token ++ mean patch, last layer, {a['full'].shape[1]}-d")):
        data = f"{what}; {len(a['labels'])} train, {len(b['labels'])} val pictures of {val.spec}, ADM crop {side} px, fp32, chance {1 / C:.3f}"
        found = linear_probe(a[kind], a["labels"], b[kind], b["labels"], C)
        metric(args.run, f"linear probe {kind}", found["accuracy"], f"{data}; logistic regression, L2 {found['l2']:g} chosen on a tenth of train")
        metric(args.run, f"kNN {kind}", knn(a[kind], a["labels"], b[kind], b["labels"], C), f"{data}; k 20, temperature 0.07")


# ---------------------------------------------------------------- recon
@torch.no_grad()
def recon(args, device):
    """Validation pictures there and back: PSNR and SSIM per picture, on [0, 1], clamped, not rounded"""
    model, settings = load(args, device)
    if not model.config.train_reconstruction:
        raise ValueError(f"{args.run} was trained without a decoder (--w-rec 0): nothing comes back")
    side = model.config.image_size
    source = pictures(args, settings, "val", side)
    lpips = Perceptual(args.perceptual).to(device) if args.perceptual != "none" else None
    values = {"PSNR": [], "SSIM": []} | ({"LPIPS": []} if lpips else {})
    for images, _, _ in tqdm(eval_batches(source, side, args.batch, args.limit, "adm", args.workers), "recon", leave=False):
        target = normalize(images.to(device))
        back = model.get_latents_decoded_images(model.get_reconstruction_latents(target))
        a, b = (denormalize(x).clamp(0, 1) for x in (target, back))
        values["PSNR"].append(psnr(a, b))
        values["SSIM"].append(ssim(a, b))
        if lpips:
            values["LPIPS"].append(lpips(normalize(a * 255), normalize(b * 255))[None].expand(len(a)))      # clamped first, back to its scale
    values = {k: torch.cat(v) for k, v in values.items()}
    protocol = f"{len(values['PSNR'])} pictures of {source.spec} val, ADM crop {side} px, encoder and decoder fp32, mean over pictures"
    for k, v in values.items():
        metric(args.run, k, v.cpu().double().mean().item(), protocol + (f", {args.perceptual}" if k == "LPIPS" else ""))
    if not lpips:
        say("LPIPS is not measured (--perceptual none)")


# ---------------------------------------------------------------- fid
def read_samples(path):
    """samples.npz (arr_0 (n, H, W, 3) uint8, labels) of dit.py or ADM, a folder that holds one, or a folder of pictures
    -> uint8 (n, 3, H, W), labels (n,) or None"""
    path = Path(path)
    path = path / "samples.npz" if (path / "samples.npz").exists() else path
    if path.suffix == ".npz":
        with np.load(path) as found:
            if "arr_0" not in found:
                raise ValueError(f"{path} holds {', '.join(found)}; wanted arr_0, uint8 (n, H, W, 3), as dit.py sample writes it")
            images, labels = found["arr_0"], torch.from_numpy(found["labels"]).long() if "labels" in found else None
    else:
        files = sorted(f for f in path.glob("*") if f.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".bmp"))
        if not files:
            raise ValueError(f"{path} holds no samples.npz and no pictures; make some with: python dit.py sample RUN_DIT --out {path}")
        loaded = [np.asarray(Image.open(f).convert("RGB")) for f in files]
        if len({x.shape for x in loaded}) > 1:
            raise ValueError(f"{path} holds pictures of several sizes ({', '.join(sorted({f'{x.shape[1]}x{x.shape[0]}' for x in loaded})[:4])}); a distance needs one")
        images, labels = np.stack(loaded), None
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels


def real_pictures(source, side, args, limit):
    """-> uint8 (n, 3, S, S), labels (n,), in memory"""
    found = list(eval_batches(source, side, args.batch, limit, "adm", args.workers))
    return torch.cat([x for x, _, _ in found]), torch.cat([y for _, y, _ in found])


def judge_of(args, train, val, side, device):
    """A classifier of the real pictures, trained once and kept in RUN/judge.safetensors -> judge, its accuracy, and its settings"""
    path, C = Path(args.run, "judge.safetensors"), len(train.classes)
    wanted = {"data": train.spec, "val": val.spec, "classes": str(C), "side": str(side), "train": str(args.train_limit), "steps": str(args.judge_steps)}
    if path.exists():
        with safetensors.safe_open(path, "pt") as f:
            kept = dict(f.metadata())
        if {k: kept.get(k) for k in wanted} == wanted:
            judge = Judge(C)
            judge.load_state_dict(safetensors.torch.load_file(path))
            return judge.to(device).eval(), float(kept["accuracy"])
        say(f"{path} was trained on something else ({kept}); training it anew")
    x, y = real_pictures(train, side, args, args.train_limit)
    vx, vy = real_pictures(val, side, args, args.limit)
    judge, accuracy = train_judge(x, y, C, vx, vy, steps=args.judge_steps, device=device)
    safetensors.torch.save_file({k: v.contiguous() for k, v in judge.state_dict().items()}, path, wanted | {"accuracy": str(accuracy)})
    return judge, accuracy


@torch.no_grad()
def fid(args, device):
    """Samples against real pictures of the training set. Without Inception's weights: --features classifier, never called FID"""
    images, labels = read_samples(args.samples)
    if len(images) < 2048 and not args.few:
        raise ValueError(f"{len(images)} samples: below 2048 a Frechet distance is mostly bias; make more, or --few to have it all the same (the name says so)")
    settings, side = settings_of(args.run), images.shape[-1]
    train, val = pictures(args, settings, "train", side), pictures(args, settings, "val", side)
    few = f", ONLY {len(images)} SAMPLES" if len(images) < 2048 else ""
    if args.features == "inception":
        net, name = load_inception(device), "FID"
        features = lambda x: torch.cat([net(part.to(device)) for part in x.split(args.batch)])
    else:
        judge, accuracy = judge_of(args, with_classes(train), with_classes(val), side, device)
        features, name = lambda x: torch.cat([judge(part.to(device))[0] for part in x.split(args.batch)]), "FD-classifier"
        metric(args.run, "classifier accuracy", accuracy, f"the judge, on real pictures of {val.spec} val, {len(train.classes)} classes, {side} px, {args.judge_steps} steps")
        if labels is not None:
            found = torch.cat([judge(part.to(device))[1].argmax(1).cpu() for part in images.split(args.batch)])
            metric(args.run, "samples recognised", (found == labels).double().mean().item(),
                   f"share of {len(images)} class-conditional samples of {args.samples} that the judge takes for the asked class; "
                   f"chance {1 / len(train.classes):.3f}, real pictures {accuracy:.3f}; {how(args.samples)}")
    real, _ = real_pictures(train, side, args, args.train_limit)
    reference = statistics([features(real)])
    protocol = f"{len(images)} samples against {len(real)} training pictures of {train.spec}, ADM crop {side} px{few}; {how(args.samples)}"
    metric(args.run, name, frechet_distance(*statistics([features(images)]), *reference), protocol)
    held, _ = real_pictures(val, side, args, len(images))
    metric(args.run, f"{name} of real", frechet_distance(*statistics([features(held)]), *reference),
           f"{len(held)} validation pictures in place of the samples: what a perfect generator would get")


def how(samples):
    """The protocol that dit.py sample wrote beside its pictures"""
    path = Path(samples, "labels.json")
    return json.loads(path.read_text())["protocol"] if path.exists() else f"samples of {samples}"


# ---------------------------------------------------------------- report, fetch
def report(args, device):
    """RUN/report.html: curves, reconstructions, feature maps, attention, answers, neighbours, samples, numbers"""
    path = write_report(args.run, args.data, args.val_data, device, args.dit, args.seed)
    for m in latest_metrics(args.run).values():
        say(f"{m['name']:28s} {m['value']:10.4g}   {m['protocol']}")
    say(f"wrote {path}")


def latest_metrics(run):
    """metrics.jsonl -> {name: its newest line}"""
    path = Path(run, "metrics.jsonl")
    return {m["name"]: m for m in map(json.loads, path.read_text().splitlines())} if path.exists() else {}


def fetch(args, device):
    """Bring external weights into the cache folder, with their hashes checked; offline, say where they are and where they go"""
    for name in args.names or weights.FILES:
        say(name, weights.fetch(name))


def arguments():
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)

    def command(run):
        p = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        p.set_defaults(go=run)
        p.add_argument("--device", help="cpu, cuda, mps; default: the best one present")
        return p

    def common(p):
        p.add_argument("--data", help="default: what the run was trained on")
        p.add_argument("--val-data", help="validation pictures, when --data has no val/ of its own")

    def reading(p, limit, train_limit=None):
        common(p)
        p.add_argument("--limit", type=int, default=limit, help="validation pictures, evenly spread over the set; more are steadier")
        if train_limit:
            p.add_argument("--train-limit", type=int, default=train_limit, help="training pictures, evenly spread over the set")
        p.add_argument("--batch", type=int, default=100, help="pictures at once; changes no number")
        p.add_argument("--workers", type=int, default=0, help="processes that read pictures")

    for run, limit, train_limit in ((zeroshot, 50_000, None), (probe, 50_000, 10_000), (recon, 50_000, None)):
        p = command(run)
        p.add_argument("run", help="folder with config.json and model.safetensors")
        reading(p, limit, train_limit)
        if run is recon:
            p.add_argument("--perceptual", choices=["vgg", "alex", "squeeze", "none"], default="vgg", help="LPIPS net; none leaves LPIPS out, aloud")
    p = command(fid)
    p.add_argument("samples", help="folder of dit.py sample, an npz with arr_0, or a folder of pictures")
    p.add_argument("--run", required=True, help="the tokenizer's run: says which pictures are real, and keeps the numbers")
    p.add_argument("--features", choices=["inception", "classifier"], default="inception", help="classifier: a small network trained here on the real labelled pictures; its distance is no FID")
    p.add_argument("--few", action="store_true", help="measure on fewer than 2048 samples, and say so")
    p.add_argument("--judge-steps", type=int, default=2400, help="training steps of the classifier (ours)")
    reading(p, 10_000, 10_000)
    p = command(report)
    p.add_argument("run", help="folder of train.py")
    p.add_argument("--dit", help="folder of dit.py train; default RUN/dit, if there")
    p.add_argument("--seed", type=int, default=0, help="chooses the pictures that are shown")
    common(p)
    p = command(fetch)
    p.add_argument("names", nargs="*", help=f"of {', '.join(weights.FILES)}; default: all")
    return top.parse_args()


def main():
    args = arguments()
    try:
        args.go(args, start(args.device))
    except (ValueError, FileNotFoundError) as problem:
        raise SystemExit(f"eval.py {args.command}: {problem}") from None
    finally:
        stop()


if __name__ == "__main__":
    main()
