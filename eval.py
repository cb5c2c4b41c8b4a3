"""What a run has learned, as numbers: one subcommand a number or table, each printed with its protocol and kept in metrics.jsonl.

    python eval.py zeroshot RUN       words: is the right class name the closest caption?
    python eval.py probe RUN          meaning: linear probes and kNN, on the latents and at full width
    python eval.py recon RUN          fidelity: PSNR, SSIM, LPIPS, rFID of reconstructions
    python eval.py fid SAMPLES        generation: Frechet distance of samples to real pictures
    python eval.py check WEIGHTS      released weights, or a run: what is in there, and what it makes of a few pictures of yours
    python eval.py cost               parameters and GFLOPs of any size and part
    python eval.py report RUN         one page with everything, to look at
    python eval.py fetch              the external weights (VGG for LPIPS, Inception for FID)
RUN is a folder of train.py, or released weights. Data and picture size default to what the run was trained on. With torchrun the processes
share the pictures: the numbers are those of one process, but for rounding in the last digit.
"""
import argparse
import json
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data import eval_batches, in_workers, open_data
from tokenizer import get_tokenizer
from vtp_min import weights
from vtp_min.baselines import LDM, LDMConfig, load as load_model
from vtp_min.check import try_out
from vtp_min.cost import COUNTED, costs, describe, head_on_meta, on_meta, paper_says, table
from vtp_min.dist import collect, rank, say, start, stop, total, wait, world
from vtp_min.fid import (Moments, Saved, SqueezeNet, frechet_distance, kept_judge, load_inception, load_squeezenet, open_samples, psnr, save_statistics, share, ssim,
                         statistics)
from vtp_min.losses import Perceptual
from vtp_min.model import SIZES, SMALL, VTPConfig, VTPModel
from vtp_min.probes import RATES, Part, augmented, knn, last_layer, last_layers, linear_probe, sgd_probe, text_encoder, zero_shot, zero_shot_classifier
from vtp_min.report import write_report
from vtp_min.run import ProgressBar, autocast, metric, set_tf32, tf32_of, warn_if_emulated
from vtp_min.views import denormalize, normalize


# ---------------------------------------------------------------- what to evaluate, on what
def load(args, device):
    """RUN -> its model, and the flags it was trained with ({} for released weights). `recon` and the latent probes ask no more of a model than
    get_reconstruction_latents, get_latents_decoded_images and its config: the paper's baselines have no trunk, no words"""
    return load_model(args.run).to(device), settings_of(args.run)


def settings_of(run):
    path = Path(run or ".", "run.json")
    return json.loads(path.read_text()) if run and path.exists() else {}


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


def reading(source, side, args, limit, crop):
    """eval_batches of this process's share, with a bar"""
    n = min(limit or len(source), len(source))
    if n < world():
        raise ValueError(f"{n} pictures of {source.spec} for {world()} processes: each needs one; start fewer")
    return ProgressBar(eval_batches(source, side, args.batch, limit, crop, args.workers), "reading", total=-(-n // (args.batch * world())), leave=False, disable=rank() > 0)


@torch.no_grad()
def encode(model, source, side, device, args, limit, crop, features):
    """-> {name: (n, F)} of features(model, images), and 'labels' (n,), over the pictures of all processes, in the source's order"""
    out = defaultdict(list)
    for images, labels, _ in reading(source, side, args, limit, crop):
        with autocast(device, args.precision):
            found = features(model, normalize(images.to(device)))
        for name, x in found.items():
            out[name].append(x.float())
        out["labels"].append(labels.to(device))
    return {name: collect(torch.cat(x)) for name, x in out.items()}


# ---------------------------------------------------------------- zeroshot
@torch.no_grad()
def zeroshot(args, device):
    """Class names through prompt templates against pictures squashed to a square, logits 100 x cosine: the released code's protocol, top-1 and top-5"""
    model, settings = load(args, device)
    if not model.config.train_clip:
        raise ValueError(f"{args.run} was trained without captions (--w-clip 0): there is no text tower to ask")
    side = model.config.image_size
    source = with_classes(pictures(args, settings, "val", side))
    with autocast(device, args.precision):
        W = zero_shot_classifier(text_encoder(model, device, get_tokenizer), source.classes, source.templates)
    x = encode(model, source, side, device, args, args.limit, "squash", last_layer)
    C, distinct = len(source.classes), len(set(source.classes))                      # ImageNet's 1000 names are 998: missile and sunglasses are there twice
    protocol = (f"{len(x['labels'])} pictures of {source.spec} val, {C} classes{f' ({distinct} distinct names)' if distinct < C else ''} x {len(source.templates)} "
                f"templates, squashed to {side} px, {args.precision}{tf32_of(device)}, chance {1 / C:.3f}")
    for k, value in zero_shot(x["clip"], W, x["labels"]).items():
        metric(args.out, f"zero-shot {k}", value, protocol)


# ---------------------------------------------------------------- probe
def probe(args, device):
    """Linear probe and kNN on frozen features, latents and full width. The paper's figures probe the 64-d latents, its headline 85.7 class tokens of several
    layers (--protocol official)"""
    model, settings = load(args, device)
    side = model.config.image_size
    train, val = with_classes(pictures(args, settings, "train", side)), with_classes(pictures(args, settings, "val", side))
    if train.classes != val.classes:
        raise ValueError(f"{train.spec} and {val.spec} differ in their classes ({len(train.classes)} and {len(val.classes)}); a probe needs the same ones")
    (probe_released if args.protocol == "official" else probe_cached)(args, model, train, val, device)


def probe_cached(args, model, train, val, device):
    side, C = model.config.image_size, len(val.classes)
    a, b = (encode(model, s, side, device, args, n, "adm", last_layer) for s, n in ((train, args.train_limit or 10_000), (val, args.limit)))
    for kind, what in (("latent", "mean of the {}-d patch latents"), ("full", "class token ++ mean patch, last layer, {}-d")):
        if kind in a:
            data = (f"{what.format(a[kind].shape[1])}; {len(a['labels'])} train, {len(b['labels'])} val pictures of {val.spec}, "
                    f"ADM crop {side} px, {args.precision}{tf32_of(device)}, chance {1 / C:.3f}")
            found = linear_probe(a[kind], a["labels"], b[kind], b["labels"], C, seed=args.seed)
            metric(args.out, f"linear probe {kind}", found["accuracy"],
                   f"{data}; logistic regression by L-BFGS, L2 {found['l2']:g} chosen on a tenth of train (seed {args.seed})")
            metric(args.out, f"kNN {kind}", knn(a[kind], a["labels"], b[kind], b["labels"], C), f"{data}; k 20, temperature 0.07")


def probe_released(args, model, train, val, device):
    """13 rates x {last 1, last 4 layers} by SGD on augmented crops, and the same on latents. The released code takes the best of all on the validation set
    itself: an optimistic number, given here beside the one whose rate, layers and epoch a held-out part of train chose."""
    c, C, B = model.config, len(val.classes), args.train_batch
    side = max(round(c.image_size * 224 / 256 / c.vision_patch_size), 1) * c.vision_patch_size
    n = min(args.train_limit or len(train), len(train))
    indices = [k * len(train) // n for k in range(n)]
    every = max(n // 10_000, 10)                                                     # a tenth is held out; of ImageNet, 10,000
    held_out, kept = indices[::every], np.delete(indices, np.s_[::every])
    T = args.epochs * args.epoch_length
    if B < world() or len(held_out) < world() or not len(kept) or T < 1:
        raise ValueError(f"{args.epochs} epochs of {args.epoch_length} x {B} over {n} training pictures are too few for {world()} processes")
    sets = {"val": encode(model, val, side, device, args, args.limit, "centre", last_layers),
            "held-out": encode(model, Part(train, held_out), side, device, args, None, "centre", last_layers)}
    sets = {name: (x, x.pop("labels")) for name, x in sets.items()}
    rows = range(rank() * B // world(), (rank() + 1) * B // world())
    work = partial(augmented, Part(train, kept), side, B, args.seed, rows)

    def batches():
        for images, labels in ProgressBar(in_workers(work, range(T), args.workers), "probe", T, leave=False, disable=rank() > 0):
            with torch.no_grad(), autocast(device, args.precision):
                x = last_layers(model, normalize(images.to(device)))
            yield {k: collect(v.float()) for k, v in x.items()}, collect(labels.to(device))

    found = sgd_probe(batches(), T, C, sets, args.epoch_length, seed=args.seed)
    data = (f"{len(kept)} train (RandomResizedCrop {side} bicubic + flip), {len(held_out)} held out, {len(sets['val'][1])} val pictures of {val.spec} "
            f"(centre {side} of {round(side * 8 / 7)} px), SGD, {args.epochs} epochs of {args.epoch_length} x {B}, 13 rates, {args.precision}{tf32_of(device)} trunk, "
            f"seed {args.seed}, chance {1 / C:.3f}")
    layers = sorted(found["val"].keys() - {"latent"})
    for name, kinds, what in (("official", layers, f"class tokens of the last {' or '.join(k[1:] for k in layers)} layers ++ mean patch, full width"),
                              ("latent official", ["latent"], f"mean of the {sets['val'][0]['latent'].shape[1]}-d patch latents (the figures' features)")):
        if not kinds:                                                                # a baseline has latents alone
            continue
        scores, held = (torch.stack([found[s][k] for k in kinds]) for s in ("val", "held-out"))                   # (kinds, epochs, 13)
        best = np.unravel_index(int(held.argmax()), held.shape)
        metric(args.out, f"linear probe {name}", scores.max().item(), f"{what}; best of {scores.numel()} on the validation set ITSELF, as the released code; {data}")
        metric(args.out, f"linear probe {name}, held-out choice", scores[best].item(),
               f"{what}; {kinds[best[0]]}, epoch {best[1] + 1}, rate {RATES[best[2]]:g} x {B}/256 chosen on the held-out pictures; {data}")


# ---------------------------------------------------------------- recon
@torch.no_grad()
def recon(args, device):
    """Validation pictures there and back: PSNR, SSIM, LPIPS of each picture, and rFID: the Frechet distance of all reconstructions to the ADM crops themselves"""
    model, settings = load(args, device)
    if not model.config.train_reconstruction:
        raise ValueError(f"{args.run} was trained without a decoder (--w-rec 0): nothing comes back")
    side = model.config.image_size
    source = pictures(args, settings, "val", side)
    n = min(args.limit, len(source))
    lpips = features = None
    if args.perceptual != "none":
        weights.heads(args.perceptual)                                               # the published ones?
        lpips = Perceptual(args.perceptual).to(device)
        if side < 32:
            raise ValueError(f"pictures of {side} px are too small for LPIPS; take 32 or more, or --perceptual none")
    try:
        enough(n, args)
        features, name, seen = comparing(args.features or "inception", args, settings, side, device)
    except (ValueError, FileNotFoundError) as problem:
        if args.features:                                                            # asked for by name
            raise
        say(f"rFID is not measured: {problem}")
    real, fake, values = Moments(), Moments(), defaultdict(list)
    for images, _, _ in reading(source, side, args, args.limit, "adm"):
        target = normalize(images.to(device))
        with autocast(device, args.precision):
            z = model.get_reconstruction_latents(target)
        back = model.get_latents_decoded_images(z.float())
        if back.shape != target.shape:
            raise ValueError(f"{args.run} paints {back.shape[-1]} px from {side} px (the official decoder always makes 16 of a latent): no pixel has its own to be "
                             "compared with; eval.py check shows them")
        a, b = (denormalize(x).clamp(0, 1) for x in (target, back))
        values["PSNR"].append(psnr(a, b))
        values["SSIM"].append(ssim(a, b))
        if lpips:
            values["LPIPS"].append(lpips.lpips(2 * a - 1, 2 * b - 1).flatten())
        if features:
            for moments, x in ((real, a), (fake, b)):
                moments.add(features((255 * x).byte()))                              # cut off, as the released code's PNGs: a fifth of the references' values lose 1
    values = {k: collect(torch.cat(v)) for k, v in values.items()}
    how = "encoder bf16, decoder fp32 (official)" if args.precision == "bf16" else "encoder and decoder fp32 (official: encoder bf16)"
    if hasattr(model, "sample_latents"):
        how += ", latents are the mean of the posterior (LDM and VA-VAE evaluate a sample)"
    protocol = f"{len(values['PSNR'])} pictures of {source.spec} val, ADM crop {side} px, {how}{tf32_of(device)}"
    for k, v in values.items():
        metric(args.out, k, v.cpu().double().mean().item(), f"{protocol}, mean over pictures{f', {args.perceptual}, v0.1' if k == 'LPIPS' else ''}")
    if not lpips:
        say("LPIPS is not measured (--perceptual none)")
    if features:
        metric(args.out, f"r{name}", frechet_distance(*fake.result(), *real.result()), f"{protocol}; reconstructions against those crops themselves{few(n)}; {seen}")


# ---------------------------------------------------------------- fid
def enough(n, args):
    if n < 2048 and not args.few:
        raise ValueError(f"{n} samples: below 2048 a Frechet distance is mostly bias; make more, or --few to have it all the same (the name says so)")


def few(n):
    return f", ONLY {n} SAMPLES" if 0 < n < 2048 else ""


def comparing(kind, args, settings, side, device):
    """-> what a distance compares, a function uint8 (B, 3, H, W) -> (B, F); the distance's name; its features in words"""
    if kind == "classifier":
        if args.halve:
            raise ValueError("--halve goes with --features squeezenet or inception: the classifier has learned pictures of full size")
        judge, _ = judge_of(args, settings, side, device)
        return lambda x: judge(x)[0], "FD-classifier", "256-d features of the classifier trained on the real pictures"
    if kind == "squeezenet":
        features, name, seen = load_squeezenet(device), "FD-squeezenet (no FID)", SqueezeNet.PROTOCOL
    else:
        try:
            features, name, seen = load_inception(device), "FID", "pytorch-fid's Inception"
        except FileNotFoundError as problem:
            raise FileNotFoundError(f"{problem}; or take --features classifier (or squeezenet, with its file), whose distance is no FID") from None
    if not args.halve:
        return features, name, seen
    return lambda x: features(halved(x)), f"FD-{kind}, halved (no FID)", f"{seen}; of pictures halved to {side // 2} px"


def halved(x):
    """uint8 (B, 3, H, W), even sides -> (B, 3, H/2, W/2), each the mean of 2x2 pixels"""
    if x.shape[-1] % 2 or x.shape[-2] % 2:
        raise ValueError(f"--halve: pictures of {x.shape[-1]}x{x.shape[-2]} have no half; leave it out")
    return torch.nn.functional.avg_pool2d(x.float(), 2).round().byte()


def judge_of(args, settings, side, device):
    """A classifier of the real pictures, kept in RUN/judge.safetensors -> judge, its accuracy"""
    train, val = (with_classes(pictures(args, settings, split, side)) for split in ("train", "val"))
    about = {"data": train.spec, "val": val.spec, "classes": str(len(train.classes)), "side": str(side), "train": str(args.train_limit)}
    real = lambda: (*real_pictures(train, side, args, args.train_limit, device), *real_pictures(val, side, args, args.limit, device))
    return kept_judge(Path(args.out, "judge.safetensors"), about, len(train.classes), real, args.judge_steps, device)


def real_pictures(source, side, args, limit, device):
    """-> uint8 (n, 3, S, S), labels (n,), of all processes, in memory"""
    found = [(x, y) for x, y, _ in reading(source, side, args, limit, "adm")]
    return tuple(collect(torch.cat(x).to(device)).cpu() for x in zip(*found))


@torch.no_grad()
def fid(args, device):
    """Samples against real pictures: the run's training set, or --reference. Without Inception's weights: --features classifier or squeezenet, never called FID"""
    samples, settings = open_samples(args.samples, args.jpeg), settings_of(args.run)
    reference = open_samples(args.reference, jpeg=True) if args.reference else None
    by_data, saved, n = not reference and (args.run or args.data), isinstance(samples, Saved), len(samples)
    if n or not saved:
        enough(n, args)
    if reference and len(reference):
        enough(len(reference), args)
    if not (by_data or reference or args.save_stats):
        raise ValueError("against which real pictures? Give --run RUN or --data, or --reference; --save-stats FILE alone keeps the samples' statistics")
    if args.features == "classifier" and (saved or not by_data):
        raise ValueError("--features classifier learns from the run's own pictures: give pictures as SAMPLES, --run, and no --reference")
    if args.save_real and not by_data:
        raise ValueError("--save-real keeps the statistics of the training pictures: give --run or --data, and no --reference")
    side = (settings.get("image") or 256) if saved else samples.size[0]
    if by_data and not saved and samples.size != (side, side):
        raise ValueError(f"{samples.what}: {samples.size[0]}x{samples.size[1]}; real pictures are cut to squares, so samples must be square")
    train, val = (pictures(args, settings, split, side) for split in ("train", "val")) if by_data else (None, None)
    features, name, seen = comparing(args.features, args, settings, side, device)

    def moments(source):
        if args.halve and isinstance(source, Saved) and not source.features:
            raise ValueError(f"{source.what} do not say that the pictures were halved; save them anew with --halve --save-real or --save-stats")
        return source.moments(args.features, seen) if isinstance(source, Saved) else statistics(features(x.to(device)) for x in source.batches(args.batch))

    def real(source, limit):
        return statistics(features(x.to(device)) for x, _, _ in reading(source, side, args, limit, "adm"))

    stated = moments(reference) if reference else None                                  # first: statistics of something else are refused before the samples are seen
    found = moments(samples)
    if args.save_stats:
        save_statistics(args.save_stats, *found, n, how(samples), seen)
        say(f"mean and covariance of {samples.what} are in {args.save_stats}")
    what = f"{n or 'an unstated number of'} samples{few(n)}, {how(samples)}"
    if reference:
        metric(args.out, name, frechet_distance(*found, *stated),
               f"{what}; against {len(reference) or 'an unstated number of'} pictures of {reference.what}{few(len(reference))}; {seen}")
    if not by_data:
        return
    if args.features == "classifier":
        judge, accuracy = judge_of(args, settings, side, device)
        metric(args.out, "classifier accuracy", accuracy,
               f"the judge, on real pictures of {val.spec} val, {len(train.classes)} classes, {side} px, {args.judge_steps} steps")
        if samples.labels is not None:
            asked = samples.labels[slice(*share(n))].split(args.batch)
            right = sum((judge(x.to(device))[1].argmax(1).cpu() == y).sum() for x, y in zip(samples.batches(args.batch), asked))
            metric(args.out, "samples recognised", total(right.to(device)).item() / n,
                   f"share of {n} class-conditional samples of {args.samples} that the judge takes for the asked class; "
                   f"chance {1 / len(train.classes):.3f}, real pictures {accuracy:.3f}; {how(samples)}")
    against, held = real(train, args.train_limit), min(n or 10_000, len(val))
    protocol = f"{min(args.train_limit, len(train))} training pictures of {train.spec}, ADM crop {side} px"
    metric(args.out, name, frechet_distance(*found, *against), f"{what}; against {protocol}; {seen}")
    metric(args.out, f"{name} of real", frechet_distance(*real(val, held), *against),
           f"{held} validation pictures in place of the samples{few(held)}: what a perfect generator would get; against {protocol}; {seen}")
    if args.save_real:                                                                  # last: where it lies, all of the above is measured
        save_statistics(args.save_real, *against, min(args.train_limit, len(train)), protocol, seen)


def how(samples):
    """The protocol that dit.py sample wrote beside its pictures, else where they are"""
    path = samples.folder / "labels.json"
    return json.loads(path.read_text())["protocol"] if path.exists() else samples.what


# ---------------------------------------------------------------- check, cost
def check(args, device):
    """Released weights or a run: parameters beside the official ones, then a few pictures encoded, painted again and named"""
    model, _ = load(args, device)
    say("\n".join([str(args.run), *describe(model)]))
    try_out(model, args.images, args.names, args.image or model.config.image_size, args.out, device, open_data, get_tokenizer)


def cost(args, device):
    """Parameters and GFLOPs of each part, counted and not run: of a run, of --size, or of all sizes"""
    if args.run:
        (model, settings), head = load(args, "cpu"), None
        if settings.get("w_ssl"):
            head = [settings[k] for k in ("prototypes", "head_hidden", "head_bottleneck")]
        chosen = {args.run: (model.to("meta"), head_on_meta(model, head))}
    else:
        chosen = {}
        for size in [args.size] if args.size else [*SIZES, "ldm"]:                   # nano: train.py's picture and head; else the paper's picture, DINOv2's head
            picture, head = (dict(image=36, patch=9), (256, 256, 64)) if size in SMALL else ({}, (65536, 2048, 256))
            if size == "ldm":
                model, head = on_meta(LDM, LDMConfig(latent_dim=args.latent_dim)), None
            else:
                model = on_meta(VTPModel, VTPConfig.of_size(size, latent_dim=args.latent_dim, light_decoder=args.light_decoder, **picture))
            chosen[size] = model, head_on_meta(model, head)
    say(COUNTED)
    for name, (model, head) in chosen.items():
        side, patch = args.image or model.config.image_size, model.config.vision_patch_size
        if side % patch:
            raise ValueError(f"--image {side} is no multiple of the patch, {patch}; try --image {max(side // patch, 1) * patch}")
        rows = costs(model, side, head)
        say("\n".join(["", f"{name}: {side} px, patch {patch}", *table(rows), *paper_says(model, side, rows)]))
        for part, n, work, whole in rows if args.out else []:
            metric(args.out, f"GFLOPs {part}", work / 1e9, f"{name}, {side} px, forward, 2 a multiply-add, attention products not counted",
                   parameters=n, with_attention=whole / 1e9)


# ---------------------------------------------------------------- report, fetch
def report(args, device):
    """RUN/report.html: curves, reconstructions, feature maps, attention, answers, neighbours, samples, numbers"""
    path = write_report(args.run, open_data, eval_batches, get_tokenizer, args.data, args.val_data, device, args.dit, args.seed)
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
        weights.fetch(name)
        wait()                                                                       # the other processes, for rank 0
        say(name, weights.find(name), *(["heads", weights.heads(name)] if name in weights.HEADS else []))


class Advice(argparse.ArgumentDefaultsHelpFormatter):
    """Names a default where there is one"""
    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def arguments():
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)

    def command(run, alone=False):
        p = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__, formatter_class=Advice)
        p.set_defaults(go=run, alone=alone, run=None, out=None)
        p.add_argument("--device", help="cpu, cuda, mps; default: the best one present")
        return p

    def of_run(p, wanted="folder of train.py, or released weights: config.json and model.safetensors"):
        p.add_argument("run", help=wanted)

    def data(p):
        p.add_argument("--data", help="shapes, a folder of class folders, or tars; default: what the run was trained on")
        p.add_argument("--val-data", help="validation pictures, when --data has no val/ of its own")

    def measuring(p, limit, train_limit=None):
        data(p)
        p.add_argument("--out", help="folder whose metrics.jsonl keeps the numbers; default: the run's")
        p.add_argument("--limit", type=int, default=limit, help="validation pictures, evenly spread over the set; more are steadier")
        if train_limit:
            p.add_argument("--train-limit", type=int, default=train_limit, help="training pictures, evenly spread over the set")
        p.add_argument("--batch", type=int, default=100, help="pictures at once on each process; changes no number")
        p.add_argument("--workers", type=int, default=0, help="processes that read pictures; changes no number")

    def precise(p, official):
        p.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help=f"of the encoder; {official}")

    def distance(p, features, advice):
        p.add_argument("--features", choices=["inception", "squeezenet", "classifier"], default=features,
                       help="when Inception's weights are not at hand, and with a distance that is no FID: squeezenet, a small network of ImageNet's classes, whose "
                            f"file you must have (eval.py fetch squeezenet says where from); classifier, one trained here on the real labelled pictures{advice}")
        p.add_argument("--few", action="store_true", help="measure on fewer than 2048 pictures, and say so")
        p.add_argument("--halve", action="store_true", help="look at the pictures at half their side, with squeezenet or inception: what a decoder blurs weighs less there, "
                                                            "what is painted weighs more (ours; no FID)")
        p.add_argument("--judge-steps", type=int, default=2400, help="training steps of the classifier (ours)")

    p = command(zeroshot)
    of_run(p)
    measuring(p, 50_000)
    precise(p, "the released code's default is fp32, its script takes bf16")
    p = command(probe)
    of_run(p)
    measuring(p, 50_000)
    p.add_argument("--train-limit", type=int, help="training pictures, evenly spread over the set; default: 10,000, all of them under --protocol official")
    p.add_argument("--protocol", choices=["lbfgs", "official"], default="lbfgs",
                   help="lbfgs: one centre crop a picture, logistic regression to its optimum, L2 chosen on a tenth of train, and kNN (ours; minutes). "
                        "official: the released code's SGD on augmented crops, 13 rates x {last layer, last 4}, and the same on latents "
                        "(an epoch costs --epoch-length x --train-batch encodings)")
    p.add_argument("--epochs", type=int, default=10, help="official: the released code's 10")
    p.add_argument("--epoch-length", type=int, default=1250, help="official: iterations of an epoch; the released code's 1250, whatever the data")
    p.add_argument("--train-batch", type=int, default=1024, help="official: pictures of an iteration over ALL processes; the released code has 128 a GPU, "
                                                                 "so 1024 is 8 GPUs; it scales the rates, by batch / 256")
    p.add_argument("--seed", type=int, default=0, help="of the held-out choice, the heads' start and the augmentation")
    precise(p, "the released code's linear probe runs the trunk in bf16")
    p = command(recon)
    of_run(p)
    measuring(p, 50_000, 10_000)
    p.add_argument("--perceptual", choices=["vgg", "alex", "squeeze", "none"], default="vgg", help="LPIPS net; none leaves LPIPS out, aloud")
    precise(p, "the released code encodes in bf16 and decodes in fp32")
    distance(p, None, ". Default: inception if its weights are there and the pictures are 2048 or more; else rFID is left out, aloud")
    p = command(fid)
    p.add_argument("samples", help="folder of dit.py sample, a folder of pictures, an npz with arr_0 (n, H, W, 3) uint8, or an npz of statistics (mu, sigma)")
    p.add_argument("--run", help="the tokenizer's run: says which pictures are real, and keeps the numbers")
    p.add_argument("--reference", help="what is real instead: a folder, an npz of pictures, or ADM's reference npz with mu and sigma (the paper's gFID)")
    p.add_argument("--save-stats", metavar="FILE", help="keep mean and covariance of SAMPLES as an npz that can stand for them later, also as --reference")
    p.add_argument("--save-real", metavar="FILE", help="keep mean and covariance of the training pictures as an npz, to be the --reference of further samples")
    p.add_argument("--jpeg", action="store_true", help="SAMPLES are JPEG and meant to be")
    distance(p, "inception", "")
    measuring(p, 10_000, 10_000)
    p = command(check, alone=True)
    of_run(p, "official folder (config.json, model.safetensors), Hub id, or a folder of train.py")
    p.add_argument("--images", nargs="+", help="pictures of yours, or folders of them; without: eight built-in shapes")
    p.add_argument("--names", nargs="+", help="what they might show: a dog, a cat, ...; default: ImageNet's 1000 classes")
    p.add_argument("--image", type=int, help="side they are cut to; default: the model's")
    p.add_argument("--out", default="check", help="folder for check.png and metrics.jsonl")
    p = command(cost, alone=True)
    p.add_argument("run", nargs="?", help="count this run; without, --size")
    p.add_argument("--size", choices=[*SIZES, "ldm"], help="count a size of train.py, or Table 1's CNN; default: all")
    p.add_argument("--image", type=int, help="side of the picture; default: the model's, 256 for S, B, L")
    p.add_argument("--latent-dim", type=int, default=64, help="d, channels of a latent; the paper also tries 256")
    p.add_argument("--light-decoder", action="store_true", help="the paper's decoder for fast experiments: 4 ViT-L layers (Sec. 4.1)")
    p.add_argument("--out", help="folder whose metrics.jsonl keeps the numbers; default: the run's, none for a size")
    p = command(report, alone=True)
    of_run(p, "folder of train.py")
    p.add_argument("--dit", help="folder of dit.py train; default RUN/dit, if there")
    p.add_argument("--seed", type=int, default=0, help="chooses the pictures that are shown")
    data(p)
    p = command(fetch)
    p.add_argument("names", nargs="*", help=f"of {', '.join([*weights.FILES, *weights.BY_HAND])}; default: all that can be downloaded")
    return top.parse_args()


def main():
    args = arguments()
    try:
        device = start(args.device)
        set_tf32(device, False)                                                      # PyTorch's default, which VTP's evaluation scripts keep
        warn_if_emulated(device, getattr(args, "precision", "fp32"))
        if args.alone:                                                               # nothing to share: rank 0 goes on as one process
            first = rank() == 0
            stop()
            if not first:
                return
        if args.out:
            Path(args.out).mkdir(parents=True, exist_ok=True)
        home = args.run or getattr(args, "samples", None)
        args.out = args.out or (str(home if Path(home).is_dir() else Path(home).parent if args.command == "fid" else ".") if home else None)
        args.go(args, device)
    except (ValueError, OSError) as problem:
        raise SystemExit(f"eval.py {args.command}: {problem}") from None
    finally:
        stop()


if __name__ == "__main__":
    main()
