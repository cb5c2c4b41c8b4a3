"""Generation: a LightningDiT learns to turn noise into the tokenizer's latents. The proof of the pudding of VTP Sec. 4.

    python dit.py latents RUN                       images -> latents of the frozen tokenizer in RUN, and their mean and std
    python dit.py train RUN/latents --out RUN_DIT   latents -> diffusion transformer (flow matching)
    python dit.py sample RUN_DIT --n 50             noise -> latents -> pictures
    torchrun --nproc-per-node 8 -- dit.py ...       the same on many processes (-- keeps torchrun from taking --n for its own)

Symbols: x0 noise, x1 data (normalised latent), xt = t x1 + (1-t) x0, so t = 0 is noise and t = 1 is data; v velocity; y class.
B batch, C latent channels, H = W latent side. The transformer stands in vtp_min/lightning.py, the folder of latents in vtp_min/latents.py.
Follows LightningDiT (Yao et al. 2025); the values of VTP's released configs stand in --help beside ours.
"""
import argparse
import copy
import hashlib
import json
import os
import shutil
import time
import zipfile
from functools import partial
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from data import batches, eval_batches, my_share, nearest, open_data
from vtp_min import baselines
from vtp_min.dist import rank, say, start, stop, wait, world
from vtp_min.latents import Latents, Steps, latent_stats, shards, write_shard
from vtp_min.lightning import SIZES, LightningDiT
from vtp_min.run import (STOPPED, ProgressBar, Run, autocast, matmul_peak,
                         multiplies_bf16, set_tf32, tf32_of, warn_if_emulated, write_aside)
from vtp_min.views import NOISE, POSTERIOR, denormalize, lots, normalize

ENCODER = "trunk.", "encoder."                # what stands between picture and latent: VTP's (bottleneck included), then the baselines'


# ------------------------------------------------------------------------------------------------ flow matching

def lognorm_time(z, mu, sigma):
    """Logit-normal time: z ~ N(0, 1) -> t = sigmoid(mu + sigma z) in (0, 1). Negative mu favours small t, the noisy side."""
    return torch.sigmoid(mu + sigma * torch.as_tensor(z))


def flow_loss(model, x1, x0, t, y):
    """How well does v(xt, t, y) point from noise to data?   x1 data, x0 noise (B, C, H, W), t, y (B,) -> mse, cos, each (B,)

    mse  squared error of the velocity        cos  1 - cosine along channels, mean over positions; LightningDiT adds both with weight 1
    An untrained model answers exactly 0, which has no direction. torch's gradient of the cosine is 1e8 there, and Adam's second moment would
    remember it and hold the last layer nearly still for some 600 steps; ours is 0 there, and the values are LightningDiT's.
    """
    s = t[:, None, None, None]
    v = x1 - x0
    pred = model(s * x1 + (1 - s) * x0, t, y).to(x1.dtype)
    cos = torch.where(pred.any(1), F.cosine_similarity(pred, v, dim=1), 0)
    return (pred - v).square().mean((1, 2, 3)), 1 - cos.mean((1, 2))


def time_grid(points, shift):
    """0 = t[0] < ... < t[points-1] = 1, so points - 1 steps. shift in (0, 1) crowds the points near noise; 0 and 1 leave them even."""
    t = torch.linspace(0, 1, points)
    return shift * t / (1 + (shift - 1) * t) if shift > 0 else t


@torch.no_grad()
def euler(velocity, x, grid):
    """Walk from noise to data along the field: x (B, C, H, W) at grid[0] -> the same at grid[-1]. velocity(x, t) with t (B,)"""
    for t, dt in zip(grid[:-1], grid.diff()):
        x = x + dt * velocity(x, t.expand(len(x)))
    return x


def precision_of(args, device):
    """--precision, or what this machine multiplies in hardware: bf16 (LightningDiT trains in it), else fp32"""
    if args.precision:
        warn_if_emulated(device, args.precision)
        return args.precision
    return "bf16" if multiplies_bf16(device) else "fp32"


# ------------------------------------------------------------------------------------------------ command: latents

def load_tokenizer(folder, device):
    """The frozen tokenizer, and a fingerprint of its encoder: latents mean nothing to the decoder of another one.

    All that this file asks of a tokenizer: get_reconstruction_latents, get_latents_decoded_images, config.image_size, and the names in ENCODER;
    of a KL autoencoder (baselines.LDM) also sample_latents.
    """
    tokenizer = baselines.load(folder).to(device).eval().requires_grad_(False)
    digest = hashlib.sha256()
    for name, x in sorted(tokenizer.state_dict().items()):
        if name.startswith(ENCODER):
            digest.update(name.encode() + x.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return tokenizer, digest.hexdigest()[:16]


@torch.no_grad()
def latents(args):
    here = start(args.device)
    set_tf32(here, True)                                                         # as VTP's extract_features_vtp.py
    out = Path(args.out or Path(args.run) / "latents")
    old, ended = shards(out), (out / "latents_stats.pt").exists()
    if old and ended and not args.fresh:
        raise ValueError(f"{out} holds latents already ({len(old)} files); train on them (python dit.py train {out}), or encode anew with --fresh")
    if args.batch < 1 or (args.n is not None and args.n < 1):
        raise ValueError(f"--batch {args.batch} --n {args.n}: both must be at least 1")
    precision = precision_of(args, here)
    tokenizer, encoder = load_tokenizer(args.run, here)
    trained = Path(args.run) / "run.json"
    if not trained.exists() and args.data is None:
        raise FileNotFoundError(f"{args.run} has no run.json that would name its images; say which with --data")
    flags = json.loads(trained.read_text()) if trained.exists() else {}
    spec, side = args.data or flags.get("data"), args.image or flags.get("image") or tokenizer.config.image_size
    source = open_data(spec, split=args.split, seed=flags.get("seed", 0), side=side)
    if source.classes is None:
        raise ValueError(f"{spec} has no classes, but LightningDiT is conditioned on them; use a folder of class folders, or the built-in shapes")
    n = min(args.n or len(source), len(source))
    wait()                                                                       # all ranks have looked before rank 0 clears
    if old and not ended:
        say(f"{out} holds {len(old)} files of an encoding that did not end (no latents_stats.pt): all is encoded anew")
    if rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        for path in [out / "latents_stats.pt", *out.glob("latents_rank*")]:      # the first stands for "whole": it goes first and comes last
            path.unlink(missing_ok=True)
    wait()
    mine = ProgressBar(eval_batches(source, side, args.batch, limit=n, crop="adm", workers=args.workers),        # this rank's share, a run of neighbours
                total=-(-n // (args.batch * world())), desc="latents", unit="batch", disable=rank() > 0)
    draws = draws_of(args.seed, my_share(n).start)
    encoded = (encode(tokenizer, normalize(img.to(here)), labels, precision, draws) for img, labels, _ in mine)
    for number, held in enumerate(iter(lambda: list(islice(encoded, max(1, 10000 // args.batch))), [])):  # as VTP shares them out
        write_shard(out / f"latents_rank{rank():02d}_shard{number:03d}.safetensors", *(torch.cat(column).contiguous() for column in zip(*held)), here)
    wait()
    if rank() == 0:
        done = Latents(out)
        stats = latent_stats(done, args.seed)
        posterior = f"sampled with seed {args.seed}" if is_kl(tokenizer) else "deterministic"
        (out / "classes.json").write_text(json.dumps(list(source.classes)) + "\n")
        about = dict(tokenizer=os.path.relpath(args.run, out), encoder=encoder, data=spec, split=args.split, image=side, shape=done.shape, precision=precision,
                     posterior=posterior)
        (out / "latents.json").write_text(json.dumps(about, indent=2) + "\n")
        write_aside(out / "latents_stats.pt", lambda path: torch.save(stats, path))
        mean, std = stats["mean"], stats["std"]
        say(f"{len(done)} images, {len(source.classes)} classes, {side} px, ADM centre crop, {precision}{tf32_of(here)} -> {out}: latents {done.shape}, mirrored too, {posterior}\n"
            f"mean {mean.min():.3f} .. {mean.max():.3f}, std {std.min():.3f} .. {std.max():.3f} over channels")


def is_kl(tokenizer):
    """Is it a KL autoencoder? Its encoder gives a Gaussian, and a DiT learns from samples of it.

    LightningDiT's extract_features.py stores samples too, not means.
    """
    return hasattr(tokenizer, "sample_latents")


def draws_of(seed, first):
    """Random generators, one for each image of this rank in order; the first has index `first`"""
    return (lots(POSTERIOR, seed, index) for index in count(first))


def encode(tokenizer, img, labels, precision, draws):
    """img (b, 3, H, W) -> its latents, those of its mirror image (b, C, h, w), both stored in float32, and labels (b,)

    draws  random generators. A KL autoencoder takes the next b, one per image: its sample is drawn
           first, then that of the mirror image.
    """
    encode_images = tokenizer.get_reconstruction_latents
    if is_kl(tokenizer):
        encode_images = partial(tokenizer.sample_latents, rngs=list(islice(draws, len(img))))
    with autocast(img.device, precision):
        z = encode_images(img)
        z_flip = encode_images(img.flip(-1))
    return z.float().cpu(), z_flip.float().cpu(), labels


# ------------------------------------------------------------------------------------------------ command: train

def ema_(average, model, decay):
    """average <- decay average + (1 - decay) model, in place"""
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def ema_decay(step, fixed):
    """A fixed decay, as the reference has (0.9999), or (1+s)/(10+s) up to 0.9999: about the last ninth of the run, however long it is."""
    return fixed if fixed is not None else min(0.9999, (1 + step) / (10 + step))


def train(args):
    here = start(args.device)
    set_tf32(here, False)                                                        # as LightningDiT's train.py
    data = Latents(args.latents)
    stats = torch.load(data.beside("latents_stats.pt"), weights_only=True)
    classes, about = (json.loads(data.beside(name).read_text()) for name in ("classes.json", "latents.json"))
    refuse(args, data, stats, classes)
    precision = precision_of(args, here)
    wide = torch.float64 if precision == "fp64" else torch.float32              # of the weights

    # ---- the model and its moving average
    torch.manual_seed(args.seed)
    C, side, _ = data.shape
    fields = dict(input_size=side, patch_size=1, in_channels=C, num_classes=len(classes), class_dropout_prob=args.label_drop, **SIZES[args.size])
    model = LightningDiT(**fields).to(here, wide)
    model.use_checkpoint = args.recompute
    ema = copy.deepcopy(model).requires_grad_(False)
    weights = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(weights, lr=args.lr, betas=(0.9, 0.95), weight_decay=0, fused=here.type != "mps")

    # ---- the run, new or gone on with
    known = f"{len(data)} of {C}x{side}x{side} from {about['data']} ({about['split']}) by encoder {about['encoder']}, {about.get('precision', 'fp32')}"        # wherever they lie
    run = Run(args.out, vars(args) | {"latents": known, "machine": f"{here}, {precision}{tf32_of(here)}"}, args.fresh)
    parts = {"model": model, "ema": ema, "opt": opt}
    for name, part in parts.items() if run.state else ():
        part.load_state_dict(run.state[name])
    run.state = None                                                            # free its memory
    config = dict(model=fields, tokenizer=os.path.relpath(data.folder / about["tokenizer"], args.out), encoder=about["encoder"], multiplier=1.0)
    say(f"LightningDiT-{args.size}: {sum(p.numel() for p in weights) / 1e6:.1f} M parameters, {side * side} tokens of {C} channels, {len(data)} latents of "
        f"{len(classes)} classes; steps {run.first} to {args.steps} at {args.batch} ({args.steps * args.batch / len(data):.1f} epochs); {here}, {precision}{tf32_of(here)}")

    def keep():
        return {name: part.state_dict() for name, part in parts.items()}

    def export(step):
        """All that `sample` needs"""
        write_aside(run.folder / "config.json", lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))
        write_aside(run.folder / "model.safetensors", lambda path: save_file(ema.state_dict(), path, metadata={"step": str(step)}))
        for name in ("latents_stats.pt", "classes.json"):
            write_aside(run.folder / name, lambda path: shutil.copyfile(data.folder / name, path))

    net = DistributedDataParallel(model, [here] if here.type == "cuda" else None, broadcast_buffers=False) if world() > 1 else model
    steps = Steps(data, stats, args.seed, args.batch, args.label_drop, len(classes), rank(), world())
    for step, batch in run.walk(args, args.batch, batches(steps, run.first, args.steps, args.workers), here, precision, keep, export):
        x1, x0, z = (batch[name].to(here, wide) for name in ("x1", "x0", "z"))
        t = lognorm_time(z, args.lognorm_mu, args.lognorm_sigma)
        opt.param_groups[0]["lr"] = args.lr * min(1, (step + 1) / max(1, args.warmup))
        opt.zero_grad()
        with autocast(here, precision), run.counting(times=3):
            mse, cos = (term.mean() for term in flow_loss(net, x1, x0, t, batch["y"].to(here)))          # point from noise to data
        (mse + cos).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in weights])         # looked at, not clipped (LightningDiT)
        if run.sound(mse + cos, norm):
            opt.step()
            ema_(ema, model, ema_decay(step, args.ema))
        if run.due:
            run.note(**run.means(loss=mse + cos, mse=mse, cos=cos), grad_norm=norm.item(), lr=opt.param_groups[0]["lr"])
    if run.leaving:
        return STOPPED
    say(f"Next: python dit.py sample {args.out}")


def refuse(args, data, stats, classes):
    """What cannot work, before any compute is spent"""
    C, H, W = data.shape
    if H != W:
        raise ValueError(f"latents are {H}x{W}, but LightningDiT wants a square")
    if stats["mean"].shape != (1, C, 1, 1):
        raise ValueError(f"latents have {C} channels, but latents_stats.pt is of shape {tuple(stats['mean'].shape)}; encode anew with --fresh")
    if data.labels.min() < 0 or data.labels.max() >= len(classes):
        raise ValueError(f"labels run from {data.labels.min()} to {data.labels.max()}, but classes.json names {len(classes)} classes")
    if min(args.batch, args.steps, args.log_every, args.save_every) < 1:
        raise ValueError(f"--batch {args.batch} --steps {args.steps} --log-every {args.log_every} --save-every {args.save_every}: wanted 1 or more")
    if args.batch % world():
        raise ValueError(f"--batch {args.batch} cannot be shared equally by {world()} processes; try --batch {nearest(args.batch, world())}")
    if not 0 <= args.label_drop <= 1 or args.ema is not None and not 0 <= args.ema < 1:
        raise ValueError(f"--label-drop {args.label_drop} --ema {args.ema}: wanted a share between 0 and 1, and a decay from 0 up to but not 1")


# ------------------------------------------------------------------------------------------------ command: sample

def load_dit(folder, device):
    """A folder that `train` wrote -> the EMA model, its config (a dict), statistics, class names, and step"""
    folder = Path(folder)
    missing = [name for name in ("config.json", "model.safetensors", "latents_stats.pt", "classes.json") if not (folder / name).exists()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}; wanted the folder of: python dit.py train LATENTS --out {folder}")
    config = json.loads((folder / "config.json").read_text())
    model = LightningDiT(**config["model"])
    model.load_state_dict(load_file(folder / "model.safetensors"))
    with safe_open(folder / "model.safetensors", "pt") as f:
        step = (f.metadata() or {}).get("step", "unknown")
    stats = torch.load(folder / "latents_stats.pt", weights_only=True)
    return model.to(device).eval(), config, stats, json.loads((folder / "classes.json").read_text()), step


def asked(args, config, names):
    """The flags -> the classes to paint, and how many pictures; or a sentence"""
    wanted = [int(c) for c in args.classes.split(",")] if args.classes else list(range(len(names)))
    bad = [c for c in wanted if not 0 <= c < len(names)]
    if bad:
        known = ", ".join(names[:10] + ["..."] * (len(names) > 10))
        raise ValueError(f"--classes {','.join(map(str, bad))}: this model knows 0 .. {len(names) - 1} ({known})")
    n = args.per_class * len(wanted) if args.per_class is not None else args.n
    if n < 1 or args.batch < 1 or args.points < 2 or args.shift < 0:
        raise ValueError(f"{n} samples, --batch {args.batch}, --points {args.points}, --shift {args.shift}: wanted at least 1, 1, 2 and 0")
    if args.cfg != 1 and config["model"]["class_dropout_prob"] == 0:
        raise ValueError(f"--cfg {args.cfg} needs a model that also knows no class, but this one was trained with --label-drop 0; use --cfg 1")
    return wanted, n


def guided(t, args):
    """Does a step from time t look at "no class" too?"""
    return args.cfg != 1 and t >= args.cfg_start


def field(model, y, null, args):
    """velocity(x, t) (B, C, H, W) towards the classes y (B,), guided as the flags say"""
    channels = None if args.cfg_channels == "all" else int(args.cfg_channels)
    pair = torch.cat([y, torch.full_like(y, null)])

    def velocity(x, t):
        if not guided(t[0], args):                     # all of a batch stand at one time: 1.6 times as fast with LightningDiT's start of 0.125
            return model(x, t, y).float()
        return model.forward_with_cfg(torch.cat([x, x]), torch.cat([t, t]), pair, args.cfg, channels=channels)[:len(x)].float()
    return velocity


def operations(model, config, grid, args):
    """Of the DiT's matrix products for one picture: a pass for each step, two where it is guided"""
    C, side, t = config["model"]["in_channels"], config["model"]["input_size"], grid[:1]
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, C, side, side, device=t.device), t, torch.zeros(1, dtype=torch.long, device=t.device))
    return counter.get_total_flops() * sum(1 + bool(guided(t, args)) for t in grid[:-1])


@torch.no_grad()
def sample(args):
    here = start(args.device)
    set_tf32(here, True)                                                         # as LightningDiT's inference.py
    args.precision = precision_of(args, here)
    model, config, stats, names, step = load_dit(args.run, here)
    wanted, n = asked(args, config, names)
    painter = args.tokenizer or os.path.normpath(Path(args.run) / config["tokenizer"])
    tokenizer, encoder = load_tokenizer(painter, here)
    if encoder != config["encoder"]:
        raise ValueError(f"the latents were made by another encoder than that of {painter} (fingerprint {config['encoder']}, here {encoder}); "
                         f"name the right one with --tokenizer, or encode and train anew")
    out = Path(args.out or Path(args.run) / "samples")
    if rank() == 0:
        (out / "png").mkdir(parents=True, exist_ok=True)
        for path in (out / "png").glob("[0-9]*.png"):
            path.unlink()
    wait()
    C, side = config["model"]["in_channels"], config["model"]["input_size"]
    mean, std, grid = stats["mean"].to(here), stats["std"].to(here), time_grid(args.points, args.shift).to(here)
    mine = range(rank(), n, world())
    peak, flops, began = matmul_peak(here, args.precision), operations(model, config, grid, args), time.perf_counter()
    bar = ProgressBar(total=len(mine), desc="sample", unit="image", disable=rank() > 0)
    for k in range(0, len(mine), args.batch):
        js = mine[k:k + args.batch]
        y, drawn = zip(*(class_of(j, wanted, args) for j in js))
        x = torch.stack([torch.from_numpy(lot.standard_normal((C, side, side), dtype=np.float32)) for lot in drawn]).to(here)
        with autocast(here, args.precision):                                     # around all steps, so that weights are cast once: 4 % at nano
            z = euler(field(model, torch.tensor(y, device=here), len(names), args), x, grid) * std / config["multiplier"] + mean
        pixels = (denormalize(tokenizer.get_latents_decoded_images(z)) * 255).clamp(0, 255).to(torch.uint8)      # truncated, as VTP does
        for j, img in zip(js, pixels.permute(0, 2, 3, 1).cpu().numpy()):
            Image.fromarray(img).save(out / "png" / f"{j:06d}.png")
        bar.update(len(js))
    bar.close()
    seconds = time.perf_counter() - began
    wait()
    if rank() == 0:
        protocol = (f"{n} samples of {args.run}: EMA weights of step {step}, Euler with {args.points - 1} steps, shift {args.shift}, guidance "
                    + ("off" if args.cfg == 1 else f"{args.cfg} from t {args.cfg_start} on {args.cfg_channels} channels")
                    + f", labels {args.labels} over {len(wanted)} classes, seed {args.seed}, {args.precision}{tf32_of(here)}, "
                    + f"decoded by {painter} in fp32, 8 bit by truncation")
        labels = [class_of(j, wanted, args)[0] for j in range(n)]
        picture = lambda j: np.asarray(Image.open(out / "png" / f"{j:06d}.png"))
        write_aside(out / "samples.npz", lambda path: write_npz(path, picture, labels))
        (out / "labels.json").write_text(json.dumps({"protocol": protocol, "classes": names, "labels": labels}) + "\n")
        class_grid(picture, labels, names).save(out / "grid.png")
        say(f"{protocol}\n{n / seconds:.3g} images/s at {flops * len(mine) / seconds / peak:.1%} of the {args.precision} matmul peak measured here "
            f"(of the DiT's products; decoding and files are in the time)\n-> {out}: grid.png, png/000000.png ..., samples.npz, labels.json")


def class_of(j, wanted, args):
    """Sample j -> its class, and the generator of its noise: they depend on (seed, j) only, not on batches or processes"""
    lot = lots(NOISE, args.seed, j)
    return wanted[lot.integers(len(wanted))] if args.labels == "random" else wanted[j % len(wanted)], lot


def write_npz(path, picture, labels):
    """arr_0 uint8 (n, H, W, 3), as ADM's evaluator reads it, and labels (n,); one picture at a time: 50000 of 256 px are 10 GB"""
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as f:
            shape = (len(labels), *picture(0).shape)
            np.lib.format.write_array_header_1_0(f, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for j in range(len(labels)):
                f.write(picture(j).tobytes())
        with archive.open("labels.npy", "w") as f:
            np.lib.format.write_array(f, np.array(labels))


def class_grid(picture, labels, names, rows=16, columns=10, margin=110):
    """picture(j) (H, W, 3) uint8 -> one picture: a row a class, its name at the left"""
    shown = sorted(set(labels))[:rows]
    picks = [[j for j, label in enumerate(labels) if label == c][:columns] for c in shown]
    H, W, _ = picture(0).shape
    sheet = Image.new("RGB", (margin + max(map(len, picks)) * (W + 2), len(shown) * (H + 2)), "white")
    draw = ImageDraw.Draw(sheet)
    for r, (c, row) in enumerate(zip(shown, picks)):
        draw.text((4, r * (H + 2) + H // 2 - 6), names[c][:17], fill="black")
        for k, j in enumerate(row):
            sheet.paste(Image.fromarray(picture(j)), (margin + k * (W + 2), r * (H + 2)))
    return sheet


# ------------------------------------------------------------------------------------------------ flags

class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def parse(argv=None):
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)
    add = lambda name, text: commands.add_parser(name, help=text, description=text, formatter_class=Defaults)

    p = add("latents", "Encode images once with the frozen tokenizer, mirrored copies too: the DiT never sees a pixel.")
    p.add_argument("run", help="folder of the tokenizer: config.json, model.safetensors")
    p.add_argument("--data", help="images to encode; default: those the tokenizer was trained on (run.json)")
    p.add_argument("--split", default="train", help="which part of them; generation is trained on train (LightningDiT)")
    p.add_argument("--n", type=int, help="at most so many images, evenly spread; default: all (of the endless shapes 50000)")
    p.add_argument("--image", type=int, help="side in pixels; default: the tokenizer's")
    p.add_argument("--batch", type=int, default=50, help="images at once on each process (VTP: 50); a shard holds 10000 images")
    p.add_argument("--out", help="folder of the shards; default RUN/latents")
    p.add_argument("--seed", type=int, default=0, help="chooses the 10000 latents that mean and std are measured on, and the samples of a KL autoencoder's latents")
    p.add_argument("--workers", type=int, default=0, help="processes that read images, for each process; 0 reads in this one, 8 feed a GPU")
    p.add_argument("--precision", choices=["fp32", "bf16"], help="of the encoder's matrix products; latents are stored in fp32 (VTP's script: fp32 throughout). "
                   "Default: bf16 where the hardware multiplies it, else fp32")
    p.add_argument("--device", help="cpu, cuda, mps; default: the best one present")
    p.add_argument("--fresh", action="store_true", help="encode anew over the shards that are there")

    p = add("train", "Flow matching on latents: straight lines from noise to data, and a transformer that learns their direction. VTP's released configs: "
                     "--size XL --ema 0.9999 --precision bf16 and the defaults, but for its L tokenizer --lognorm-mu -0.75 --lognorm-sigma 1.")
    p.add_argument("latents", help="folder that `dit.py latents` wrote")
    p.add_argument("--out", required=True, help="folder of this run; if it holds a checkpoint, training goes on from it")
    p.add_argument("--size", choices=SIZES, default="B", help="B is the paper's yardstick (Sec. 4.1), XL that of VTP's configs; pico and nano are ours, for a CPU")
    p.add_argument("--steps", type=int, default=100_000, help="VTP: 100000 = 80 epochs of ImageNet at batch 1024; ours: a thousand for pico, a few thousand for nano")
    p.add_argument("--batch", type=int, default=1024, help="latents per step over ALL processes (LightningDiT: 1024); 64 suits a CPU")
    p.add_argument("--lr", type=float, default=2e-4, help="AdamW, constant, betas 0.9, 0.95, no weight decay or clipping (LightningDiT); ours, with "
                   "--warmup 50: 1e-3 for a few thousand steps of nano, 8e-3 for a thousand of pico")
    p.add_argument("--warmup", type=int, default=0, help="steps of linear warm-up (LightningDiT: 0)")
    p.add_argument("--lognorm-mu", type=float, default=-0.5, help="time draw: VTP -0.5 for its S and B tokenizers, -0.75 for L; LightningDiT 0")
    p.add_argument("--lognorm-sigma", type=float, default=1.25, help="time draw: VTP 1.25 for S and B, 1.0 for L; LightningDiT 1")
    p.add_argument("--label-drop", type=float, default=0.1, help="share of samples whose class is hidden, for guidance (DiT: 0.1)")
    p.add_argument("--ema", type=float, help="decay of the averaged weights (LightningDiT: 0.9999); default, ours: min(0.9999, (1+step)/(10+step))")
    p.add_argument("--precision", choices=["fp32", "bf16", "fp64"], help="of matrix products; weights stay fp32. Default: bf16 (LightningDiT) where the hardware "
                   "has it, else fp32. fp64, weights too: for proofs, slow")
    p.add_argument("--recompute", action="store_true", help="activation checkpointing: blocks compute themselves again for the backward pass, "
                   "a third more work for much less memory")
    p.add_argument("--seed", type=int, default=0, help="with the step number it decides everything (VTP: 0)")
    p.add_argument("--save-every", type=int, default=1000, help="steps between checkpoints (VTP: 20000)")
    p.add_argument("--log-every", type=int, default=50, help="steps between lines of log.jsonl")
    p.add_argument("--workers", type=int, default=0, help="processes that read latents, for each process; 0 reads in this one, 4 feed a GPU")
    p.add_argument("--device", help="cpu, cuda, mps; default: the best one present")
    p.add_argument("--fresh", action="store_true", help="start over in --out")

    p = add("sample", "Noise -> latents by Euler steps -> pictures by the tokenizer's decoder. Sample j depends on (seed, j) only, not on batch or processes. "
                      "VTP's released configs: --n 50000 --labels random and the defaults.")
    p.add_argument("run", help="folder that `dit.py train` wrote; its EMA weights are used")
    p.add_argument("--tokenizer", help="folder whose decoder paints; default: that of the latents; a stage-2 one of the same encoder fits too")
    p.add_argument("--n", type=int, default=50, help="how many pictures; VTP measures FID on 10000 or 50000")
    p.add_argument("--per-class", type=int, help="so many of each class, instead of --n")
    p.add_argument("--classes", help="numbers like 0,3,7; default: all")
    p.add_argument("--labels", choices=["balanced", "random"], default="balanced", help="classes in turn (ours), or drawn (LightningDiT, VTP)")
    p.add_argument("--points", type=int, default=250, help="points in time, one more than Euler's steps (LightningDiT, VTP: 250); 50 drafts")
    p.add_argument("--shift", type=float, default=0.075, help="crowds the points near noise: VTP 0.075, LightningDiT 0.3, none 0")
    p.add_argument("--cfg", type=float, default=1.0, help="guidance scale: VTP 1.0 = off; LightningDiT 6.7 on 3 channels")
    p.add_argument("--cfg-start", type=float, default=0.0, help="no guidance before this t: VTP 0, LightningDiT 0.125")
    p.add_argument("--cfg-channels", default="3", choices=["3", "all"], help="LightningDiT guides only the first 3; all is the textbook way")
    p.add_argument("--seed", type=int, default=0, help="of noise and random labels")
    p.add_argument("--batch", type=int, default=50, help="pictures at once on this process; changes speed and memory only")
    p.add_argument("--precision", choices=["fp32", "bf16"], help="of the DiT's matrix products; decoding is fp32. "
                   "Default: bf16 where the hardware multiplies it, else fp32; no pixel of a trained nano differed by more than 2 of 255 (50 points, guidance 3)")
    p.add_argument("--out", help="folder of the pictures; default RUN_DIT/samples")
    p.add_argument("--device", help="cpu, cuda, mps; default: the best one present")

    args = top.parse_args(argv)
    if args.seed < 0:
        top.error(f"--seed {args.seed}: wanted 0 or more")
    return args


def main(argv=None):
    args = parse(argv)
    try:
        status = {"latents": latents, "train": train, "sample": sample}[args.command](args)
    except (ValueError, OSError) as problem:                           # our rooms' sentences to the user
        raise SystemExit(f"dit.py {args.command}: {problem}") from problem
    finally:
        stop()
    if status:                                                                   # STOPPED: a signal ended training early
        raise SystemExit(status)


if __name__ == "__main__":
    main()
