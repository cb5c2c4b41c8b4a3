"""LightningDiT: flow matching on the latents of a frozen tokenizer.   VTP Sec. 4.1, Yao et al. 2025

    python dit.py latents RUN                       images -> latents of the tokenizer in RUN
    python dit.py train RUN/latents --out RUN_DIT   latents -> diffusion transformer
    python dit.py sample RUN_DIT --n 50             noise -> latents -> images
    torchrun --nproc-per-node 8 -- dit.py ...       the same on several processes (without the --,
                                                    torchrun would read --n as its own flag)

xt = t x1 + (1 - t) x0 moves on a straight line from noise x0 (t = 0) to data x1 (t = 1), which is
a normalised latent. The model learns the velocity v = x1 - x0; sampling integrates it from 0 to 1.

B batch    C latent channels    H = W latent side    p patch side    N = (H/p)^2 tokens    D width
h = D/heads, channels of a head    y class    c condition (B, D)
"""
import argparse
import copy
import hashlib
import inspect
import json
import math
import os
import shutil
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from data import eval_batches, open_data, prefetch, round_to_multiple
from vtp_min import vit
from vtp_min.augment import denormalize
from vtp_min.config import atomic_write, load_weights
from vtp_min.device import (autocast, multiplies_bf16, peak_flops, set_tf32, tf32_of,
                            warn_if_emulated)
from vtp_min.dist import (average_gradients, barrier, broadcast_parameters, cleanup,
                          init_distributed, print0, rank, world_size)
from vtp_min.model import load_model
from vtp_min.optim import update_ema
from vtp_min.rng import Stream, make_rng
from vtp_min.run import ProgressBar, Run, parse_settings

SIZES = {"pico": dict(hidden_size=192, depth=4, num_heads=3),      # pico and nano: ours, for CPUs
         "nano": dict(hidden_size=192, depth=6, num_heads=3),
         "B": dict(hidden_size=768, depth=12, num_heads=12),       # LightningDiT-B/1: VTP Sec. 4.1
         "L": dict(hidden_size=1024, depth=24, num_heads=16),      # DiT-L with patch side 1
         "XL": dict(hidden_size=1152, depth=28, num_heads=16),     # LightningDiT-XL/1: VTP configs
         "1p0B": dict(hidden_size=1536, depth=24, num_heads=24)}   # LightningDiT-1p0B/1


# ---------------------------------------------------------------- position embeddings
def grid_positions(side):
    """-> row and column of each token, (N, 1) each"""
    row, col = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return row.reshape(-1, 1), col.reshape(-1, 1)


def sincos_table(D, side):
    """Fixed position embedding (1, N, D): first half the column, second half the row.   DiT"""
    freq = 10000 ** -(torch.arange(D // 4, dtype=torch.float64) / (D // 4))
    row, col = grid_positions(side)
    parts = [(col * freq).sin(), (col * freq).cos(), (row * freq).sin(), (row * freq).cos()]
    return torch.cat(parts, dim=1).float()[None]


class RotaryEmbedding(nn.Module):
    """Axial rotary embedding: the angle is proportional to the row in the first half of a head's
    channels, to the column in the second. Pairs are neighbouring channels, unlike in vit.py."""

    def __init__(self, h, side):
        super().__init__()
        freq = 10000 ** -(torch.arange(0, h // 2, 2, dtype=torch.float64) / (h // 2))
        row, col = grid_positions(side)
        angle = torch.cat([row * freq, col * freq], dim=1)             # (N, h/2)
        angle = angle.repeat_interleave(2, dim=1)                      # (N, h), equal in a pair
        self.register_buffer("freqs_cos", angle.cos().float())
        self.register_buffer("freqs_sin", angle.sin().float())

    def forward(self, x):
        return rotate(x, self.freqs_cos, self.freqs_sin)


def rotate(x, cos, sin):
    """Rotate each channel pair (a, b) by its angle: (a cos - b sin, b cos + a sin)

    x (B, heads, N, h); cos, sin (N, h). The tables are float32, so bfloat16 is rotated in float32.
    """
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)                         # (B, heads, N, h/2)
    return x * cos + torch.stack([-b, a], dim=-1).flatten(-2) * sin


def timestep_embedding(t):
    """t (B,) in [0, 1] -> 128 cosines and 128 sines (B, 256). DiT's t goes up to 1000 instead."""
    freq = torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
    angle = t[:, None] * freq                                          # (B, 128)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


# ---------------------------------------------------------------- the transformer
class Attention(nn.Module):
    def __init__(self, D, heads, qk_norm):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(D, 3 * D)
        self.q_norm = vit.RMSNorm(D // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = vit.RMSNorm(D // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.proj = nn.Linear(D, D)

    def forward(self, x, rope):
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))           # (B, N, 3, heads, h)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                           # each (B, heads, N, h)
        q = rope(self.q_norm(q)).type_as(v)
        k = rope(self.k_norm(k)).type_as(v)
        x = vit.attention(q, k, v)                                     # (B, heads, N, h)
        return self.proj(x.transpose(1, 2).flatten(2))                 # (B, N, D)


class SwiGLU(nn.Module):
    def __init__(self, D, hidden):
        super().__init__()
        self.w12 = nn.Linear(D, 2 * hidden)
        self.w3 = nn.Linear(hidden, D)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


def modulate(x, shift, scale):
    """x (B, N, D); shift and scale (B, D) are computed from the condition"""
    return x * (1 + scale[:, None]) + shift[:, None]


def add_gated(x, gate, branch):
    """x, branch (B, N, D); gate (B, D) is computed from the condition"""
    return x + gate[:, None] * branch


def adaln(D, n):
    """The condition c (B, D) -> n vectors for each sample (B, n D)"""
    return nn.Sequential(nn.SiLU(), nn.Linear(D, n * D))


class Block(nn.Module):
    """Attention, then feed-forward. The condition scales and shifts their inputs and gates their
    outputs (adaLN-Zero).   DiT Fig. 3"""

    def __init__(self, D, heads, mlp_ratio, qk_norm, norm):
        super().__init__()
        self.norm1 = norm(D)
        self.norm2 = norm(D)
        self.attn = Attention(D, heads, qk_norm)
        self.mlp = SwiGLU(D, int(2 / 3 * mlp_ratio * D))
        self.adaLN_modulation = adaln(D, 6)

    def forward(self, x, c, rope):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        branch = self.attn(modulate(self.norm1(x), shift1, scale1), rope)
        x = add_gated(x, gate1, branch)
        branch = self.mlp(modulate(self.norm2(x), shift2, scale2))
        return add_gated(x, gate2, branch)


class FinalLayer(nn.Module):
    def __init__(self, D, outputs, norm):
        super().__init__()
        self.norm_final = norm(D)
        self.linear = nn.Linear(D, outputs)
        self.adaLN_modulation = adaln(D, 2)

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class LightningDiT(nn.Module):
    """Velocity field v(xt, t, y): DiT (Peebles & Xie 2023) with rotary embedding, RMSNorm, SwiGLU.

    Field names, state-dict keys and initialisation are LightningDiT's, so its weights load. The
    last row of the label table means "no class". The training batches, not the model, drop labels.
    """

    def __init__(self, input_size=16, patch_size=1, in_channels=64, hidden_size=768, depth=12,
                 num_heads=12, mlp_ratio=4.0, class_dropout_prob=0.1, num_classes=1000,
                 learn_sigma=False, use_qknorm=False, use_swiglu=True, use_rope=True,
                 use_rmsnorm=True, wo_shift=False, use_checkpoint=False):
        super().__init__()
        if learn_sigma or wo_shift or not use_swiglu:
            raise ValueError(f"found learn_sigma={learn_sigma}, wo_shift={wo_shift}, use_swiglu="
                             f"{use_swiglu}; wanted False, False, True, as in VTP")
        if hidden_size % (4 * num_heads) or input_size % patch_size:
            raise ValueError(f"hidden_size {hidden_size} must be a multiple of 4 * num_heads = "
                             f"{4 * num_heads}, input_size {input_size} of patch_size {patch_size}")
        self.input_size = input_size
        self.patch_size = patch_size
        self.use_checkpoint = use_checkpoint
        D, side = hidden_size, input_size // patch_size
        norm = partial(vit.RMSNorm, eps=1e-6)
        if not use_rmsnorm:
            norm = partial(nn.LayerNorm, eps=1e-6, elementwise_affine=False)
        patchify = nn.Conv2d(in_channels, D, patch_size, patch_size)
        mlp = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        labels = nn.Embedding(num_classes + (class_dropout_prob > 0), D)
        blocks = [Block(D, num_heads, mlp_ratio, use_qknorm, norm) for _ in range(depth)]
        self.pos_embed = nn.Parameter(sincos_table(D, side), requires_grad=False)
        self.x_embedder = nn.ModuleDict({"proj": patchify})
        self.t_embedder = nn.ModuleDict({"mlp": mlp})
        self.y_embedder = nn.ModuleDict({"embedding_table": labels})
        self.feat_rope = RotaryEmbedding(D // num_heads, side) if use_rope else nn.Identity()
        self.blocks = nn.ModuleList(blocks)
        self.final_layer = FinalLayer(D, patch_size ** 2 * in_channels, norm)
        self.init_weights()

    def init_weights(self):
        """Xavier, but normal 0.02 for the conditions and zero for gates and the last layer: an
        untrained model returns 0"""
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(m.weight.flatten(1))
                nn.init.zeros_(m.bias)
        mlp = self.t_embedder["mlp"]
        for m in (self.y_embedder["embedding_table"], mlp[0], mlp[2]):
            nn.init.normal_(m.weight, std=0.02)
        for m in (*self.blocks, self.final_layer):
            nn.init.zeros_(m.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, x, t, y):
        """x (B, C, H, W), t (B,) in [0, 1], y (B,) in 0..num_classes -> velocity (B, C, H, W)"""
        p, side = self.patch_size, self.input_size // self.patch_size
        x = self.x_embedder["proj"](x).flatten(2).transpose(1, 2)      # (B, N, D)
        x = x.contiguous() + self.pos_embed            # contiguous saves 7 % of a nano step
        c = self.t_embedder["mlp"](timestep_embedding(t))              # (B, D)
        c = c + self.y_embedder["embedding_table"](y)
        for block in self.blocks:
            if self.use_checkpoint and self.training:
                x = checkpoint(block, x, c, self.feat_rope, use_reentrant=False)
            else:
                x = block(x, c, self.feat_rope)
        x = self.final_layer(x, c)                                     # (B, N, p p C)
        x = x.unflatten(1, (side, side)).unflatten(3, (p, p, -1))      # (B, row, col, p, q, C)
        x = x.permute(0, 5, 1, 3, 2, 4)                                # (B, C, row, p, col, q)
        return x.flatten(4).flatten(2, 3)                              # (B, C, H, W)

    def forward_with_cfg(self, x, t, y, cfg_scale, cfg_interval=None, cfg_interval_start=None,
                         channels=3):
        """Classifier-free guidance: u + cfg_scale (c - u), where u is the velocity of "no class".
        With cfg_interval, c alone while t < cfg_interval_start.

        x, t, y   (2B, ...): y holds B classes, then B times "no class"; only the first half of x
                  is read -> (2B, C, H, W)
        channels  how many are guided: the first 3 in LightningDiT, whatever C is; None: all
        """
        x = x.chunk(2)[0]
        both = self(torch.cat([x, x]), t, y)
        cond, uncond = both[:, :channels].chunk(2)
        guided = uncond + cfg_scale * (cond - uncond)
        if cfg_interval:
            early = t.chunk(2)[0] < cfg_interval_start
            guided = torch.where(early[:, None, None, None], cond, guided)
        return torch.cat([torch.cat([guided, guided]), both[:, guided.shape[1]:]], dim=1)


# ---------------------------------------------------------------- flow matching
def lognorm_time(z, mu, sigma):
    """Logit-normal time: z ~ N(0, 1) -> t = sigmoid(mu + sigma z). A negative mu favours noise."""
    return torch.sigmoid(mu + sigma * torch.as_tensor(z))


def flow_loss(model, x1, x0, t, y):
    """x1 data, x0 noise (B, C, H, W), t, y (B,) -> mse, cos, each (B,), summed by LightningDiT

    mse  squared error of the velocity
    cos  1 - cosine along the channels, averaged over positions

    An untrained model returns 0, where the cosine is undefined. PyTorch's gradient is 1e8 there;
    Adam's second moment would remember it and slow down the last layer for some 600 steps. Here
    the gradient is 0, and the value is LightningDiT's.
    """
    s = t[:, None, None, None]
    xt = s * x1 + (1 - s) * x0
    v = x1 - x0
    pred = model(xt, t, y).to(x1.dtype)
    cosine = F.cosine_similarity(pred, v, dim=1)                       # (B, H, W)
    cosine = torch.where(pred.any(1), cosine, 0)
    mse = (pred - v).square().mean((1, 2, 3))
    return mse, 1 - cosine.mean((1, 2))


def time_grid(points, shift):
    """0 = t[0] < ... < t[points-1] = 1. A shift in (0, 1) moves the points towards noise; with 0
    or 1 they are equidistant."""
    t = torch.linspace(0, 1, points)
    return shift * t / (1 + (shift - 1) * t) if shift > 0 else t


@torch.no_grad()
def euler(velocity, x, grid):
    """Integrate velocity(x, t), t (B,), from grid[0] to grid[-1]: x (B, C, H, W) -> the same"""
    for t, dt in zip(grid[:-1], grid.diff()):
        x = x + dt * velocity(x, t.expand(len(x)))
    return x


@torch.no_grad()
def count_flops(model):
    """FLOPs of the matrix products of one forward pass, for one latent"""
    p, side = model.pos_embed, model.input_size
    x = p.new_zeros(1, model.x_embedder["proj"].in_channels, side, side)
    with FlopCounterMode(display=False) as counter:
        model(x, p.new_zeros(1), torch.zeros(1, dtype=torch.long, device=p.device))
    return counter.get_total_flops()


# ---------------------------------------------------------------- command: latents
def precision_of(args, device):
    """--precision; by default bf16, as in LightningDiT, if the hardware multiplies it, else fp32"""
    if args.precision:
        warn_if_emulated(device, args.precision)
        return args.precision
    return "bf16" if multiplies_bf16(device) else "fp32"


def load_tokenizer(folder, device):
    """-> the frozen tokenizer, and a fingerprint of its encoder, by which `sample` refuses the
    decoder of another one"""
    tokenizer = load_model(folder).to(device).eval().requires_grad_(False)
    digest = hashlib.sha256()
    for name, x in sorted(tokenizer.state_dict().items()):
        if name.startswith(("trunk.", "encoder.")):       # VTP with its bottleneck; the baselines
            data = x.cpu().contiguous().flatten().view(torch.uint8).numpy()
            digest.update(name.encode() + data.tobytes())
    return tokenizer, digest.hexdigest()[:16]


def latents(args, device):
    """Encode images and their mirror images once, with the frozen tokenizer."""
    from vtp_min.extras.latents import encode_folder
    set_tf32(device, True)                                # as VTP's extract_features_vtp.py
    args.precision = precision_of(args, device)
    encode_folder(args, device, load_tokenizer, open_data, eval_batches)


# ---------------------------------------------------------------- command: train
def ema_decay(step, fixed):
    """`fixed`, or if that is None about the last ninth of the steps (ours): (1+s)/(10+s), at most
    0.9999"""
    return min(0.9999, (1 + step) / (10 + step)) if fixed is None else fixed


def check_train_args(args):
    if min(args.batch, args.steps, args.log_every, args.save_every) < 1:
        raise ValueError(f"--batch {args.batch} --steps {args.steps} --log-every {args.log_every} "
                         f"--save-every {args.save_every}: wanted 1 or more")
    if args.batch % world_size():
        raise ValueError(f"--batch {args.batch} cannot be shared equally by {world_size()} "
                         f"processes; try --batch {round_to_multiple(args.batch, world_size())}")
    if not 0 <= args.label_drop <= 1:
        raise ValueError(f"--set label_drop={args.label_drop}: wanted a number from 0 to 1")
    if args.ema is not None and not (isinstance(args.ema, (int, float)) and 0 <= args.ema < 1):
        raise ValueError(f"--set ema={args.ema}: wanted none, or a decay of at least 0 and below 1")


def train(args, device):
    """Flow matching: the model learns the velocity on straight lines from noise to latents.

    VTP's released configs: --size XL --precision bf16 --set ema=0.9999 and the defaults; for its L
    tokenizer also --set lognorm_mu=-0.75 --set lognorm_sigma=1.
    """
    from vtp_min.extras.latents import LatentBatches, Latents
    set_tf32(device, False)                               # as LightningDiT's train.py
    data = Latents(args.latents)
    data.check()
    check_train_args(args)
    stats, about, classes = data.stats, data.about, data.classes
    precision = precision_of(args, device)
    dtype = torch.float64 if precision == "fp64" else torch.float32    # of the weights
    C, side, _ = data.shape

    # ---- the model and its moving average
    torch.manual_seed(args.seed)
    fields = dict(input_size=side, patch_size=1, in_channels=C, num_classes=len(classes),
                  class_dropout_prob=args.label_drop, **SIZES[args.size])
    model = LightningDiT(**fields).to(device, dtype)
    model.use_checkpoint = args.recompute
    broadcast_parameters(model)
    ema = copy.deepcopy(model)
    weights = [p for p in model.parameters() if p.requires_grad]       # all but pos_embed
    ema_weights = [p for p in ema.parameters() if p.requires_grad]
    ema.requires_grad_(False)
    optimizer = torch.optim.AdamW(weights, lr=args.lr, betas=(0.9, 0.95), weight_decay=0,
                                  fused=device.type != "mps")

    # ---- the run folder; the latents may be moved between two starts
    latents = (f"{len(data)} of {C}x{side}x{side} from {about['data']} ({about['split']}) by "
               f"encoder {about['encoder']}, {about.get('precision', 'fp32')}")
    machine = f"{device}, {precision}{tf32_of(device)}"
    run = Run(args.out, vars(args) | {"latents": latents, "machine": machine}, args.fresh)
    state = {"model": model, "ema": ema, "opt": optimizer}
    run.restore(state)
    millions = sum(p.numel() for p in weights) / 1e6
    print0(f"LightningDiT-{args.size}: {millions:.1f} M parameters, {side * side} tokens of {C} "
           f"channels, {len(data)} latents of {len(classes)} classes; steps {run.step} to "
           f"{args.steps} at {args.batch} ({args.steps * args.batch / len(data):.1f} epochs); "
           f"{machine}")
    tokenizer = os.path.relpath(data.folder / about["tokenizer"], args.out)
    config = dict(model=fields, tokenizer=tokenizer, encoder=about["encoder"])
    flops = 3 * count_flops(model) * args.batch // world_size()        # backward: twice forward
    run.start(args, args.batch, device, precision,
              lambda step: export(run.folder, config, ema, data, step), flops)
    batches = LatentBatches(data, stats, args.seed, args.batch, args.label_drop, len(classes))
    batches = run.watch(prefetch(batches, run.step, args.steps, args.workers))

    for step in range(run.step, args.steps):
        lr = args.lr * min(1, (step + 1) / max(1, args.warmup))
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        batch = next(batches)
        x1, x0, z = (batch[name].to(device, dtype) for name in ("x1", "x0", "z"))
        t = lognorm_time(z, args.lognorm_mu, args.lognorm_sigma)
        with autocast(device, precision):
            mse, cos = flow_loss(model, x1, x0, t, batch["y"].to(device))
        mse, cos = mse.mean(), cos.mean()
        loss = mse + cos
        loss.backward()
        average_gradients(model)
        grad_norm = nn.utils.get_total_norm([p.grad for p in weights])   # logged, not clipped
        losses = {"loss": loss, "mse": mse, "cos": cos}
        finite, stop = run.agree(losses, grad_norm)
        if finite:
            optimizer.step()
            update_ema(ema_weights, weights, ema_decay(step, args.ema))
        run.after_step(step, losses, {}, grad_norm, lr, state)
        if stop:
            break
    status = run.finish()
    if status == 0:
        print0(f"Next: python dit.py sample {args.out}")
    return status


def export(folder, config, ema, data, step):
    """Write all that `sample` reads"""
    text = json.dumps(config, indent=2) + "\n"
    metadata = {"step": str(step)}
    atomic_write(folder / "config.json", lambda path: path.write_text(text))
    atomic_write(folder / "model.safetensors",
                 lambda path: save_file(ema.state_dict(), path, metadata))
    for name in ("latents_stats.pt", "classes.json"):
        atomic_write(folder / name, lambda path: shutil.copyfile(data.file(name), path))


# ---------------------------------------------------------------- command: sample
CFG_CHANNELS = {"3": 3, "all": None}         # --set cfg_channels -> channels of forward_with_cfg


def load_dit(folder, device):
    """-> EMA model, config (a dict), statistics of the latents, class names, training step"""
    folder = Path(folder)
    files = ("config.json", "model.safetensors", "latents_stats.pt", "classes.json")
    missing = [name for name in files if not (folder / name).exists()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}; wanted the folder of: "
                                f"python dit.py train LATENTS --out {folder}")
    config = json.loads((folder / "config.json").read_text())
    model = LightningDiT(**config["model"])
    load_weights(model, folder / "model.safetensors")
    with safe_open(folder / "model.safetensors", "pt") as f:
        step = (f.metadata() or {}).get("step", "unknown")
    stats = torch.load(folder / "latents_stats.pt", weights_only=True)
    names = json.loads((folder / "classes.json").read_text())
    return model.to(device).eval(), config, stats, names, step


def check_sample_args(args, config, names):
    """-> the classes to draw from, number of images"""
    classes = list(range(len(names)))
    if args.classes:
        classes = [int(c) for c in args.classes.split(",")]
    bad = [str(c) for c in classes if not 0 <= c < len(names)]
    if bad:
        known = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        raise ValueError(f"--classes {','.join(bad)}: this model knows 0 .. {len(names) - 1} "
                         f"({known})")
    n = args.n if args.per_class is None else args.per_class * len(classes)
    if n < 1 or args.batch < 1 or args.points < 2 or args.shift < 0:
        raise ValueError(f"{n} samples, --batch {args.batch}, --points {args.points}, "
                         f"--set shift={args.shift}: wanted at least 1, 1, 2 and 0")
    if args.labels not in ("balanced", "random") or str(args.cfg_channels) not in CFG_CHANNELS:
        raise ValueError(f"--set labels={args.labels} --set cfg_channels={args.cfg_channels}: "
                         f"wanted balanced or random, and 3 or all")
    if args.cfg != 1 and config["model"]["class_dropout_prob"] == 0:
        raise ValueError(f"--cfg {args.cfg} needs a model that has learned \"no class\" too, but "
                         f"this one was trained with label_drop 0; use --cfg 1")
    return classes, n


def use_cfg(t, args):
    """True if a step from time t is guided"""
    return args.cfg != 1 and t >= args.cfg_start


def velocity_fn(model, y, null, args):
    """-> velocity(x, t) towards the classes y (B,); null is the label "no class" """
    pair = torch.cat([y, torch.full_like(y, null)])
    channels = CFG_CHANNELS[str(args.cfg_channels)]

    def velocity(x, t):
        # t is the same for the whole batch. Skipping the second half before cfg_start is 1.6 times
        # as fast with LightningDiT's 0.125.
        if not use_cfg(t[0], args):
            return model(x, t, y).float()
        both = model.forward_with_cfg(torch.cat([x, x]), torch.cat([t, t]), pair, args.cfg,
                                      channels=channels)
        return both[:len(x)].float()
    return velocity


def sampling_flops(model, grid, args):
    """FLOPs of the DiT for one image: one forward pass per step, two if the step is guided"""
    passes = [2 if use_cfg(t, args) else 1 for t in grid[:-1]]
    return count_flops(model) * sum(passes)


def label_and_rng(j, classes, args):
    """-> class of sample j, and the generator of its noise: they depend on (seed, j) alone"""
    rng = make_rng(Stream.SAMPLING, args.seed, j)
    if args.labels == "random":
        return classes[rng.integers(len(classes))], rng
    return classes[j % len(classes)], rng


def initial_noise(indices, classes, shape, args, device):
    """Numbers of b samples -> x (b, C, H, W), y (b,)"""
    labels, noise = [], []
    for j in indices:
        label, rng = label_and_rng(j, classes, args)
        labels.append(label)
        noise.append(torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)))
    return torch.stack(noise).to(device), torch.tensor(labels, device=device)


@torch.no_grad()
def sample(args, device):
    """Noise -> latents by Euler steps -> images by the tokenizer's decoder.

    Sample j depends on (seed, j) alone, not on batch or processes. VTP's released configs:
    --n 50000 --set labels=random and the defaults.
    """
    from vtp_min.extras.sample_folder import prepare_folder, write_images, write_summary
    set_tf32(device, True)                                # as LightningDiT's inference.py
    args.precision = precision_of(args, device)
    model, config, stats, names, step = load_dit(args.run, device)
    classes, n = check_sample_args(args, config, names)
    decoder_run = args.tokenizer or os.path.normpath(Path(args.run) / config["tokenizer"])
    tokenizer, encoder = load_tokenizer(decoder_run, device)
    if encoder != config["encoder"]:
        raise ValueError(f"the latents were made by another encoder than that of {decoder_run} "
                         f"(fingerprint {config['encoder']}, here {encoder}); name the right one "
                         f"with --tokenizer, or encode and train again")
    out = Path(args.out or Path(args.run) / "samples")
    prepare_folder(out)

    mean, std = stats["mean"].to(device), stats["std"].to(device)
    side = model.input_size
    shape = (config["model"]["in_channels"], side, side)
    grid = time_grid(args.points, args.shift).to(device)
    mine = range(rank(), n, world_size())
    flops = sampling_flops(model, grid, args) * len(mine)
    peak = peak_flops(device, args.precision)
    bar = ProgressBar(total=len(mine), desc="sample", unit="image", disable=rank() > 0)
    start = time.perf_counter()
    for k in range(0, len(mine), args.batch):
        indices = mine[k:k + args.batch]
        x, y = initial_noise(indices, classes, shape, args, device)
        with autocast(device, args.precision):            # around all steps: weights are cast once
            z = euler(velocity_fn(model, y, len(names), args), x, grid)
        images = denormalize(tokenizer.get_latents_decoded_images(z * std + mean))
        images = (255 * images).clamp(0, 255).to(torch.uint8)          # truncated, as in VTP
        write_images(out, indices, images.permute(0, 2, 3, 1).cpu().numpy())
        bar.update(len(indices))
    bar.close()
    seconds = time.perf_counter() - start
    barrier()
    if rank() > 0:
        return

    guidance = "off"
    if args.cfg != 1:
        guidance = f"{args.cfg} from t {args.cfg_start} on {args.cfg_channels} channels"
    protocol = (f"{n} samples of {args.run}: EMA weights of step {step}, Euler with "
                f"{args.points - 1} steps, shift {args.shift}, guidance {guidance}, labels "
                f"{args.labels} over {len(classes)} classes, seed {args.seed}, "
                f"{args.precision}{tf32_of(device)}, decoded by {decoder_run} in fp32, 8 bit by "
                f"truncation")
    labels = [label_and_rng(j, classes, args)[0] for j in range(n)]
    write_summary(out, protocol, names, [int(label) for label in labels])
    print0(f"{protocol}\n{n / seconds:.3g} images/s at {flops / seconds / peak:.1%} of the "
           f"{args.precision} matrix-product peak measured here (FLOPs of the DiT; the time "
           f"includes decoding and writing)\n"
           f"-> {out}: grid.png, png/000000.png ..., samples.npz, labels.json")


# ---------------------------------------------------------------- flags
COMMANDS = {"latents": latents, "train": train, "sample": sample}
FLAGS = [  # commands, flag, type or choices, default, meaning and source
    ("latents", "run", str, None, "folder of the tokenizer: config.json, model.safetensors"),
    ("train", "latents", str, None, "folder that `dit.py latents` wrote"),
    ("sample", "run", str, None, "folder that `dit.py train` wrote; its EMA weights are used"),
    ("latents", "--out", str, None, "folder of the latents (default: RUN/latents)"),
    ("train", "--out", str, None, "folder of the run; a checkpoint in it is continued"),
    ("sample", "--out", str, None, "folder of the images (default: RUN/samples)"),
    ("latents train", "--fresh", bool, False, "start over in --out"),
    ("latents", "--data", str, None, "images (default: those the tokenizer was trained on)"),
    ("latents", "--split", str, "train", "train or val; LightningDiT: train"),
    ("latents", "--n", int, None, "at most this many (default: all; of the endless shapes 50000)"),
    ("latents", "--image", int, None, "side in pixels (default: the tokenizer's)"),
    ("train", "--size", [*SIZES], "B", "B: VTP Sec. 4.1, XL: VTP's configs, pico, nano: for CPUs"),
    ("train", "--steps", int, 100_000, "VTP: 100000, which are 80 epochs of ImageNet at batch "
     "1024; ours: a thousand for pico, a few thousand for nano"),
    ("train", "--batch", int, 1024, "latents per step over ALL processes; LightningDiT: 1024; "
     "ours, for a CPU: 64"),
    ("latents sample", "--batch", int, 50, "images at a time on each process; VTP: 50"),
    ("train", "--lr", float, 2e-4, "of AdamW, constant, betas 0.9, 0.95, no weight decay or "
     "clipping: LightningDiT; ours, with --warmup 50: 1e-3 for nano, 8e-3 for pico"),
    ("train", "--warmup", int, 0, "steps of linear warm-up; LightningDiT: 0"),
    ("train", "--save-every", int, 1000, "steps between checkpoints; VTP: 20000"),
    ("train", "--log-every", int, 50, "steps between lines of log.jsonl"),
    ("train", "--recompute", bool, False, "activation checkpointing: a third more work, much less "
     "memory"),
    ("sample", "--tokenizer", str, None, "folder of the decoder, such as a stage-2 run (default: "
     "the tokenizer of the latents)"),
    ("sample", "--n", int, 50, "number of images; VTP: FID of 10000 or 50000"),
    ("sample", "--per-class", int, None, "number of images of each class, instead of --n"),
    ("sample", "--classes", str, None, "numbers such as 0,3,7 (default: all)"),
    ("sample", "--points", int, 250, "time points, one more than Euler steps; LightningDiT, VTP: "
     "250; for a draft: 50"),
    ("sample", "--cfg", float, 1.0, "guidance scale; VTP: 1, which is off; LightningDiT: 6.7"),
    ("latents train", "--workers", int, 0, "processes that read data; a GPU needs 4 to 8"),
    ("latents sample", "--precision", ["fp32", "bf16"], None, "of the matrix products of encoder "
     "or DiT; latents are stored and decoded in fp32 (default: bf16 if the hardware multiplies "
     "it, else fp32; images of a trained nano differed by at most 2 of 255)"),
    ("train", "--precision", ["fp32", "bf16", "fp64"], None, "of matrix products; weights stay in "
     "fp32 (default: bf16 as in LightningDiT if the hardware multiplies it, else fp32); fp64, "
     "for tests: weights too"),
    ("latents train sample", "--seed", int, 0, "of all random numbers; VTP: 0"),
    ("latents train sample", "--device", str, None, "cpu, cuda or mps (default: the best present)")]
SETTINGS = [  # commands, name, default, meaning and source: for --set name=value
    ("train", "lognorm_mu", -0.5, "time: VTP -0.5, for its L tokenizer -0.75; LightningDiT 0"),
    ("train", "lognorm_sigma", 1.25, "time: VTP 1.25, for its L tokenizer 1.0; LightningDiT 1"),
    ("train", "label_drop", 0.1, "fraction of samples without their class, for guidance: DiT"),
    ("train", "ema", None, "decay of the EMA: LightningDiT 0.9999; None: see ema_decay, ours"),
    ("sample", "labels", "balanced", "classes in turn (ours); random: LightningDiT, VTP"),
    ("sample", "shift", 0.075, "time points nearer to noise: VTP 0.075, LightningDiT 0.3, off 0"),
    ("sample", "cfg_start", 0.0, "no guidance before this t: VTP 0, LightningDiT 0.125"),
    ("sample", "cfg_channels", "3", "guided channels: LightningDiT 3; all: the textbook"),
    ("latents train sample", "fast", True, "on CPUs, faster forms from extras/fast.py")]


def add_flag(parser, flag, kind, default, text):
    if kind is bool:
        parser.add_argument(flag, action="store_true", help=text)
        return
    if default is not None:
        text += f" (default {default})"
    values = {"choices": kind} if isinstance(kind, list) else {"type": kind}
    parser.add_argument(flag, default=default, help=text, **values)


def parse(argv=None):
    """-> Namespace: flags, and the settings of the command"""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in COMMANDS.items():
        about = inspect.getdoc(function)
        lines = [f"  {key:14} {default!s:9} {text}"
                 for users, key, default, text in SETTINGS if name in users]
        p = commands.add_parser(name, help=about.split("\n")[0], description=about,
                                epilog="\n".join(["settings for --set:", *lines]),
                                formatter_class=plain)
        for users, *row in FLAGS:
            if name in users:
                add_flag(p, *row)
        p.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                       help="change a setting of the table below; repeatable")
    args = parser.parse_args(argv)
    if args.command == "train" and args.out is None:
        parser.error("train needs --out, the folder of the run")
    if args.seed < 0:
        parser.error(f"--seed {args.seed}: wanted 0 or more")
    settings = {key: default for users, key, default, _ in SETTINGS if args.command in users}
    try:
        settings |= parse_settings(args.set, settings)
    except ValueError as problem:
        parser.error(str(problem))
    del args.set
    return argparse.Namespace(**vars(args) | settings)


def main(argv=None):
    args = parse(argv)
    restore_plain_forms = None
    try:
        device = init_distributed(args.device)
        if device.type == "cpu" and args.fast:
            from vtp_min.extras import fast
            restore_plain_forms = fast.install(dit=sys.modules[__name__])
        status = COMMANDS[args.command](args, device)
    except (ValueError, OSError) as problem:                       # sentences for the user
        raise SystemExit(f"dit.py {args.command}: {problem}") from problem
    finally:
        if restore_plain_forms:
            restore_plain_forms()
        cleanup()
    if status:                                   # EXIT_RESUME: a signal ended the training early
        raise SystemExit(status)


if __name__ == "__main__":
    main()
