"""Evaluate a run: print numbers with their protocols, and append them to metrics.jsonl.

    python eval.py zeroshot RUN       accuracy of class names as captions
    python eval.py probe RUN          accuracy of linear probes and kNN, on latents and full width
    python eval.py recon RUN          PSNR, SSIM, LPIPS, rFID of reconstructions
    python eval.py fid SAMPLES        Frechet distance of generated images to real ones

    python eval.py check WEIGHTS      try released weights, or a run, on a few images of yours
    python eval.py cost               parameters and GFLOPs of any size and part
    python eval.py report RUN         one page with curves, images and all numbers
    python eval.py fetch              download external weights (VGG for LPIPS, Inception for FID)

The last four are in vtp_min/extras/commands.py. `python eval.py COMMAND --help` lists the flags.
RUN is a folder of train.py, or released weights. Data and image size default to those of the run.
With torchrun the processes share the images: the numbers are those of one process up to rounding.
"""
import argparse
import inspect
import json
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch

from data import eval_batches, map_in_workers, open_data
from tokenizer import get_tokenizer
from vtp_min.augment import denormalize, normalize
from vtp_min.device import autocast, set_tf32, tf32_of, warn_if_emulated
from vtp_min.dist import all_gather_ragged, cleanup, init_distributed, print0, rank, world_size
from vtp_min.fid import Moments, frechet_distance, psnr, ssim
from vtp_min.model import load_model
from vtp_min.probes import (knn, linear_probe, probe_features, text_encoder, zero_shot,
                            zero_shot_classifier)
from vtp_min.run import ProgressBar, parse_settings, record_metric


# ---------------------------------------------------------------- model and images
def settings_of(run):
    """The flags of the training run; {} for released weights"""
    path = Path(run or ".", "run.json")
    return json.loads(path.read_text()) if run and path.exists() else {}


def open_source(args, settings, split, side):
    """The images of --data or --val-data, else of the run's own"""
    data = args.data or settings.get("data")
    val_data = args.val_data or settings.get("val_data")
    seed = settings.get("seed", 0)
    if split == "val" and val_data:
        return open_data(val_data, "val", seed, side, whole=True)
    if not data:
        raise ValueError(f"{args.run} does not say what it was trained on; give --data")
    return open_data(data, split, seed, side)


def open_labelled(args, settings, split, side):
    source = open_source(args, settings, split, side)
    if not source.classes:
        raise ValueError(f"{source.spec} has no class labels; give --val-data (and --data for a "
                         f"probe) a folder of class folders")
    return source


def eval_loader(args, side, source, limit, crop="adm"):
    """-> batches (images uint8, labels, captions) of this process's slice, with a progress bar"""
    n = min(limit or len(source), len(source))
    if n < world_size():
        raise ValueError(f"{n} images of {source.spec} for {world_size()} processes: each needs "
                         f"one; start fewer")
    batches = eval_batches(source, side, args.batch, limit, crop, args.workers)
    n_batches = -(-n // (args.batch * world_size()))
    return ProgressBar(batches, "reading", total=n_batches, leave=False, disable=rank() > 0)


@torch.no_grad()
def encode(args, model, device, source, side, limit, crop, features):
    """-> {name: (n, F)} of features(model, images), and "labels": (n,), over all processes, in the
    order of the source"""
    found = defaultdict(list)
    for images, labels, _ in eval_loader(args, side, source, limit, crop):
        with autocast(device, args.precision):
            batch = features(model, normalize(images.to(device)))
        for name, x in batch.items():
            found[name].append(x.float())
        found["labels"].append(labels.to(device))
    return {name: all_gather_ragged(torch.cat(x)) for name, x in found.items()}


# ---------------------------------------------------------------- zeroshot, probe
@torch.no_grad()
def zeroshot(args, device):
    """Zero-shot classification, top-1 and top-5, with the released code's protocol: prompt
    templates, images resized to a square, logits 100 x cosine"""
    model, settings = load_model(args.run).to(device), settings_of(args.run)
    if not model.config.train_clip:
        raise ValueError(f"{args.run} was trained without captions (--w-clip 0): it has no text "
                         f"tower")
    side = model.config.image_size
    source = open_labelled(args, settings, "val", side)
    names, templates = source.classes, source.templates
    with autocast(device, args.precision):
        encode_text = text_encoder(model, device, get_tokenizer)
        classifier = zero_shot_classifier(encode_text, names, templates)                # (E, C)
    x = encode(args, model, device, source, side, args.limit, "squash", probe_features)
    C, distinct = len(names), ""
    if len(set(names)) < C:                  # ImageNet: missile and sunglasses are there twice
        distinct = f" ({len(set(names))} distinct names)"
    protocol = (f"{len(x['labels'])} pictures of {source.spec} val, {C} classes{distinct} x "
                f"{len(templates)} templates, squashed to {side} px, "
                f"{args.precision}{tf32_of(device)}, chance {1 / C:.3f}")
    for k, value in zero_shot(x["clip"], classifier, x["labels"]).items():
        record_metric(args.out, f"zero-shot {k}", value, protocol)


def probe(args, device):
    """Linear probe and kNN on frozen features: latents (the paper's figures) and full width; its
    headline 85.7 is on class tokens of several layers (--protocol official)"""
    model, settings = load_model(args.run).to(device), settings_of(args.run)
    side = model.config.image_size
    train = open_labelled(args, settings, "train", side)
    val = open_labelled(args, settings, "val", side)
    if train.classes != val.classes:
        raise ValueError(f"{train.spec} and {val.spec} differ in their classes "
                         f"({len(train.classes)} and {len(val.classes)}); a probe needs the same")
    features_of = partial(encode, args, model, device)
    if args.protocol == "official":
        from vtp_min.extras.probe_official import run_probe
        return run_probe(args, model, train, val, device, features_of, map_in_workers)
    a = features_of(train, side, args.train_limit or 10_000, "adm", probe_features)
    b = features_of(val, side, args.limit, "adm", probe_features)
    C = len(val.classes)
    for kind, words in (("latent", "mean of the {}-d patch latents"),
                        ("full", "class token ++ mean patch, last layer, {}-d")):
        if kind not in a:                                  # a baseline has only latents
            continue
        data = a[kind], a["labels"], b[kind], b["labels"], C
        protocol = (f"{words.format(a[kind].shape[1])}; {len(a['labels'])} train, "
                    f"{len(b['labels'])} val pictures of {val.spec}, ADM crop {side} px, "
                    f"{args.precision}{tf32_of(device)}, chance {1 / C:.3f}")
        found = linear_probe(*data, seed=args.seed)
        record_metric(args.out, f"linear probe {kind}", found["accuracy"],
                      f"{protocol}; logistic regression by L-BFGS, L2 {found['l2']:g} chosen on a "
                      f"tenth of train (seed {args.seed})")
        record_metric(args.out, f"kNN {kind}", knn(*data), f"{protocol}; k 20, temperature 0.07")


# ---------------------------------------------------------------- recon
@torch.no_grad()
def recon(args, device):
    """Reconstructions of validation images: PSNR, SSIM, LPIPS of each image, and rFID: the Frechet
    distance of all reconstructions to the ADM crops"""
    model, settings = load_model(args.run).to(device), settings_of(args.run)
    if not model.config.train_reconstruction:
        raise ValueError(f"{args.run} was trained without a decoder (--w-rec 0)")
    side = model.config.image_size
    source = open_source(args, settings, "val", side)
    lpips = load_lpips(args, side, device)
    n = min(args.limit, len(source))
    net, name, words = rfid_features(args, settings, n, side, device)
    real, generated, values = Moments(), Moments(), defaultdict(list)
    for images, _, _ in eval_loader(args, side, source, args.limit):
        target, output = reconstruct(args, model, images.to(device))     # (B, 3, S, S) in [0, 1]
        values["PSNR"].append(psnr(target, output))
        values["SSIM"].append(ssim(target, output))
        if lpips:
            values["LPIPS"].append(lpips.lpips(2 * target - 1, 2 * output - 1).flatten())
        if net:
            # Truncated to uint8, as the released code does for its PNGs. After the round trip
            # through floats, a fifth of the values of the originals become 1 lower.
            real.add(net((255 * target).byte()))
            generated.add(net((255 * output).byte()))
    values = {key: all_gather_ragged(torch.cat(x)).cpu().double() for key, x in values.items()}
    how = "encoder and decoder fp32 (official: encoder bf16)"
    if args.precision == "bf16":
        how = "encoder bf16, decoder fp32 (official)"
    if hasattr(model, "sample_latents"):
        how += ", latents are the mean of the posterior (LDM and VA-VAE evaluate a sample)"
    protocol = (f"{len(values['PSNR'])} pictures of {source.spec} val, ADM crop {side} px, "
                f"{how}{tf32_of(device)}")
    for key, x in values.items():
        version = f", {args.perceptual}, v0.1" if key == "LPIPS" else ""
        record_metric(args.out, key, x.mean().item(), f"{protocol}, mean over pictures{version}")
    if not lpips:
        print0("LPIPS is not measured (--perceptual none)")
    if net:
        distance = frechet_distance(*generated.result(), *real.result())
        record_metric(args.out, name, distance, f"{protocol}; {words}")


def reconstruct(args, model, images):
    """uint8 (B, 3, S, S) -> the images and their reconstructions, floats in [0, 1]"""
    target = normalize(images)
    with autocast(images.device, args.precision):
        z = model.get_reconstruction_latents(target)                     # (B, d, h, w)
    output = model.get_latents_decoded_images(z.float())
    if output.shape != target.shape:
        raise ValueError(f"{args.run} decodes {target.shape[-1]} px to {output.shape[-1]} px (the "
                         f"official decoder always makes 16 per latent), so there is no original "
                         f"to compare with; eval.py check shows them")
    return denormalize(target).clamp(0, 1), denormalize(output).clamp(0, 1)


def load_lpips(args, side, device):
    if args.perceptual == "none":
        return None
    from vtp_min.extras import weights
    from vtp_min.extras.perceptual import Perceptual
    weights.heads(args.perceptual)                         # checks that they are the published ones
    lpips = Perceptual(args.perceptual).to(device)         # fails if its weights are missing
    if side < 32:
        raise ValueError(f"images of {side} px are too small for LPIPS; take 32 or more, or "
                         f"--perceptual none")
    return lpips


def rfid_features(args, settings, n, side, device):
    """As feature_net. Without --features: None if there are too few images, or no Inception"""
    from vtp_min.extras.image_sets import check_sample_count, small_sample_note
    try:
        check_sample_count(n, args.few)
        net, name, words = feature_net(args, args.features or "inception", settings, side, device)
    except (ValueError, FileNotFoundError) as problem:
        if args.features:
            raise
        print0(f"rFID is not measured: {problem}")
        return None, None, None
    note = small_sample_note(n)
    return net, f"r{name}", f"reconstructions against those crops themselves{note}; {words}"


# ---------------------------------------------------------------- fid
def feature_net(args, kind, settings, side, device):
    """What a Frechet distance compares.   kind  of --features

    -> function uint8 (B, 3, H, W) -> (B, F), name of the distance, features in words
    """
    from vtp_min.extras import judges

    def get_classifier():
        train = open_labelled(args, settings, "train", side)
        val = open_labelled(args, settings, "val", side)
        loader = partial(eval_loader, args, side)
        return judges.classifier_of(args, train, val, side, device, loader)

    return judges.feature_net(kind, args.halve, side, device, get_classifier)


@torch.no_grad()
def fid(args, device):
    """FID of samples against real images: the run's training set, or --reference. Without
    Inception's weights: --features classifier or squeezenet, whose distance is not called FID"""
    from vtp_min.extras import image_sets, judges
    samples, settings = image_sets.open_samples(args.samples, args.jpeg), settings_of(args.run)
    real = image_sets.open_samples(args.reference, jpeg=True) if args.reference else None
    judges.check_fid_args(args, samples, real)
    side = samples.size[0] if samples.size else settings.get("image") or 256
    loader = partial(eval_loader, args, side)
    if not real and (args.run or args.data):
        train = open_source(args, settings, "train", side)
        val = open_source(args, settings, "val", side)
        real = image_sets.Crops(train, "training", side, args.train_limit, loader)
    net, name, words = feature_net(args, args.features, settings, side, device)

    def moments(images):
        """-> mean, covariance of the features"""
        return images.statistics(net, args.features, words, args.batch, device)

    real_moments = moments(real) if real else None
    sample_moments = moments(samples)
    if args.save_stats:
        image_sets.save_statistics(args.save_stats, sample_moments, samples, words)
        print0(f"mean and covariance of {samples.name} are in {args.save_stats}")
    if not real:
        return
    protocol = f"against {real.as_reference()}; {words}"
    record_metric(args.out, name, frechet_distance(*sample_moments, *real_moments),
                  f"{samples.as_samples()}; {protocol}")
    if args.reference:
        return
    # validation images in place of the samples: what a perfect generator would get
    held = image_sets.Crops(val, "validation", side, samples.n or 10_000, loader)
    record_metric(args.out, f"{name} of real", frechet_distance(*moments(held), *real_moments),
                  f"{held.n} validation pictures in place of the samples"
                  f"{image_sets.small_sample_note(held.n)}: what a perfect generator would get; "
                  f"{protocol}")
    if args.features == "classifier":
        judges.record_recognition(args, samples, train, val, side, device, loader)
    if args.save_real:                       # last: if the file exists, all of the above is done
        image_sets.save_statistics(args.save_real, real_moments, real, words)


# ---------------------------------------------------------------- command line
COMMANDS = {"zeroshot": zeroshot, "probe": probe, "recon": recon, "fid": fid}
EXTRA_COMMANDS = ("check", "cost", "report", "fetch")
ALL = "zeroshot probe recon fid"
FEATURES = ["inception", "squeezenet", "classifier"]
FLAGS = [  # commands, flag, type or choices, default, help
    ("zeroshot probe recon", "run", str, None, "folder of train.py, or released weights"),
    ("fid", "samples", str, None, "folder of dit.py sample, a folder of images, an npz with arr_0 "
     "uint8 (n, H, W, 3), or an npz of statistics (mu, sigma)"),
    ("fid", "--run", str, None, "run of the tokenizer, whose data is the real images"),
    ("fid", "--reference", str, None, "real images instead: a folder, an npz of images, or ADM's "
     "npz with mu and sigma (the paper's gFID)"),
    (ALL, "--data", str, None, "shapes, a folder of class folders, or tars (default: the run's)"),
    (ALL, "--val-data", str, None, "validation images, if --data has no val/"),
    (ALL, "--out", str, None, "folder of metrics.jsonl (default: the run)"),
    ("zeroshot probe recon", "--limit", int, 50_000, "validation images, evenly spread"),
    ("fid", "--limit", int, 10_000, "validation images for the accuracy of the classifier"),
    ("probe", "--train-limit", int, None, "training images, evenly spread (default 10000; all "
     "with --protocol official)"),
    ("recon fid", "--train-limit", int, 10_000, "training images, evenly spread"),
    (ALL, "--batch", int, 100, "images per process at once; changes no number"),
    (ALL, "--workers", int, 0, "processes that read images; changes no number"),
    (ALL, "--device", str, None, "cpu, cuda or mps (default: the best one present)"),
    ("zeroshot probe recon", "--precision", ["fp32", "bf16"], "fp32", "of the encoder. The "
     "released code: zero-shot fp32 (its script bf16), probe bf16, reconstruction bf16"),
    ("probe", "--protocol", ["lbfgs", "official"], "lbfgs", "lbfgs: logistic regression on one "
     "centre crop per image, and kNN (ours; minutes). official: the released code's SGD on "
     "augmented crops, 13 rates x {last layer, last 4}, and on latents"),
    ("probe", "--seed", int, 0, "of the held-out choice, the heads and the augmentation"),
    ("recon", "--perceptual", ["vgg", "alex", "squeeze", "none"], "vgg", "network of LPIPS"),
    ("recon", "--features", FEATURES, None, "as in eval.py fid (default: inception; without its "
     "weights, or below 2048 images, no rFID)"),
    ("fid", "--features", FEATURES, "inception", "only inception gives FID. squeezenet: a small "
     "ImageNet network, whose file you must have (eval.py fetch squeezenet says where from). "
     "classifier: trained here on the real images"),
    ("recon fid", "--few", bool, False, "accept fewer than 2048 images; the protocol says so"),
]
SETTINGS = [  # commands, name, default, meaning and source: for --set name=value
    ("probe", "epochs", 10, "official: the released code's"),
    ("probe", "epoch_length", 1250, "official: iterations, whatever the data; released code"),
    ("probe", "train_batch", 1024, "official: over all processes; released code: 128 x 8 GPUs"),
    ("recon fid", "halve", False, "images at half their side; not with classifier (ours)"),
    ("recon fid", "judge_steps", 2400, "training steps of --features classifier (ours)"),
    ("fid", "jpeg", False, "accept samples in JPEG files"),
    ("fid", "save_stats", None, "npz to write: mean and covariance of the samples"),
    ("fid", "save_real", None, "npz to write: those of the training images, for --reference"),
    (ALL, "fast", True, "on CPUs, faster forms from extras/fast.py")]


def arguments():
    """-> Namespace: flags, and the settings of the command"""
    if sys.argv[1:] and sys.argv[1] in EXTRA_COMMANDS:
        from vtp_min.extras import commands
        return commands.arguments(sys.argv[1:])
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, function in COMMANDS.items():
        lines = [f"  {key:14} {default!s:9} {text}"
                 for users, key, default, text in SETTINGS if name in users.split()]
        p = subparsers.add_parser(name, description=inspect.getdoc(function),
                                  epilog="\n".join(["settings for --set:", *lines]),
                                  formatter_class=plain)
        for users, *row in FLAGS:
            if name in users.split():
                add_flag(p, *row)
        p.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                       help="change a setting of the table below; repeatable")
    args = parser.parse_args()
    settings = {key: default for users, key, default, _ in SETTINGS
                if args.command in users.split()}
    try:
        settings |= parse_settings(args.set, settings)
    except ValueError as problem:
        parser.error(str(problem))
    return argparse.Namespace(**vars(args) | settings)


def add_flag(parser, flag, kind, default, text):
    if kind is bool:
        parser.add_argument(flag, action="store_true", help=text)
        return
    if default is not None:
        text += f" (default {default})"
    values = {"choices": kind} if isinstance(kind, list) else {"type": kind}
    parser.add_argument(flag, default=default, help=text, **values)


def output_folder(args):
    """Where numbers are kept: --out, else the run's folder, else the folder of the samples"""
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        return args.out
    home = Path(args.run or args.samples)
    if home.is_dir():
        return str(home)
    return str(home.parent) if args.command == "fid" else "."


def main():
    args = arguments()
    restore_plain_forms = None
    try:
        device = init_distributed(args.device)
        set_tf32(device, False)              # PyTorch's default, which VTP's evaluation keeps
        if device.type == "cpu" and getattr(args, "fast", True):
            from vtp_min.extras import fast
            restore_plain_forms = fast.install()
        if args.command in EXTRA_COMMANDS:
            from vtp_min.extras import commands
            return commands.run(args, device, open_data, eval_batches, get_tokenizer)
        warn_if_emulated(device, getattr(args, "precision", "fp32"))
        args.out = output_folder(args)
        COMMANDS[args.command](args, device)
    except (ValueError, OSError) as problem:
        raise SystemExit(f"eval.py {args.command}: {problem}") from None
    finally:
        if restore_plain_forms:
            restore_plain_forms()
        cleanup()


if __name__ == "__main__":
    main()
