"""LightningDiT: a diffusion transformer on the latents of a frozen tokenizer, trained by flow
matching.   VTP Sec. 4.1, Yao et al. 2025

    python dit.py latents RUN                       images -> latents of the tokenizer in RUN
    python dit.py train RUN/latents --out RUN_DIT   latents -> diffusion transformer
    python dit.py sample RUN_DIT --n 50             noise -> latents -> images
    torchrun --nproc-per-node 8 -- dit.py ...       the same on several processes (without the --,
                                                    torchrun would read --n as its own flag)

xt = t x1 + (1 - t) x0 is a point on the straight line from noise x0 (t = 0) to data x1 (t = 1),
which is a normalised latent. The model learns the velocity of this point, v = x1 - x0, from xt, t
and the class. Sampling starts at noise and integrates the velocity from t = 0 to t = 1.

B batch    C latent channels    H = W latent side    p patch side    N = (H/p)^2 tokens    D width
h = D/heads, channels of a head    y class    c condition (B, D)
"""
import copy
import hashlib
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
from vtp_min.device import (autocast, move_to, multiplies_bf16, peak_flops, set_tf32, tf32_of,
                            warn_if_emulated)
from vtp_min.dist import (average_gradients, barrier, broadcast_parameters, cleanup,
                          init_distributed, print0, rank, world_size)
from vtp_min.flags import parse_subcommands
from vtp_min.model import load_model
from vtp_min.optim import update_ema
from vtp_min.rng import Stream, make_rng
from vtp_min.run import ProgressBar, Run

SIZES = {"pico": dict(hidden_size=192, depth=4, num_heads=3),      # pico and nano: ours, for CPUs
         "nano": dict(hidden_size=192, depth=6, num_heads=3),
         "B": dict(hidden_size=768, depth=12, num_heads=12),       # LightningDiT-B/1: VTP Sec. 4.1
         "L": dict(hidden_size=1024, depth=24, num_heads=16),      # DiT-L with patch side 1
         "XL": dict(hidden_size=1152, depth=28, num_heads=16),     # LightningDiT-XL/1: VTP configs
         "1p0B": dict(hidden_size=1536, depth=24, num_heads=24)}   # LightningDiT-1p0B/1


# ---------------------------------------------------------------- position embeddings
def grid_positions(side):
    """-> row and column of each token in a grid of side x side tokens, (N, 1) each"""
    # "ij": the column varies fastest, as in the flattened grid of patches
    row, col = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return row.reshape(-1, 1), col.reshape(-1, 1)


def sincos_table(D, side):
    """Fixed absolute position embedding (1, N, D): the first half of the channels encodes the
    column, the second half the row.   DiT"""
    # (D/4,) angular frequencies, from 1 down to almost 1/10000
    freq = 10000 ** -(torch.arange(D // 4, dtype=torch.float64) / (D // 4))
    row, col = grid_positions(side)
    # each part (N, D/4)
    parts = [(col * freq).sin(), (col * freq).cos(), (row * freq).sin(), (row * freq).cos()]
    return torch.cat(parts, dim=1).float()[None]


class RotaryEmbedding(nn.Module):
    """Axial rotary position embedding: each pair of channels is rotated by an angle proportional
    to the row (first half of the channels of a head) or to the column (second half).

    Positions are integers and a pair consists of neighbouring channels, unlike in vit.py.
    """

    def __init__(self, h, side):
        super().__init__()
        # (h/4,), one frequency for each pair of one axis
        freq = 10000 ** -(torch.arange(0, h // 2, 2, dtype=torch.float64) / (h // 2))
        row, col = grid_positions(side)
        angle = torch.cat([row * freq, col * freq], dim=1)             # (N, h/2)
        angle = angle.repeat_interleave(2, dim=1)                      # (N, h), equal within a pair
        # buffers, because LightningDiT's weight files contain them under these names
        self.register_buffer("freqs_cos", angle.cos().float())
        self.register_buffer("freqs_sin", angle.sin().float())

    def forward(self, x):
        return rotate(x, self.freqs_cos, self.freqs_sin)


# On a CPU, extras/fast_dit.py replaces rotate, modulate and add_gated by faster forms.
def rotate(x, cos, sin):
    """Rotate each channel pair (a, b) by its angle: (a cos - b sin, b cos + a sin)

    x (B, heads, N, h); cos, sin (N, h). The tables are float32, so bfloat16 is rotated in float32.
    """
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)                         # (B, heads, N, h/2)
    quarter_turn = torch.stack([-b, a], dim=-1).flatten(-2)            # (B, heads, N, h)
    return x * cos + quarter_turn * sin


def timestep_embedding(t):
    """t (B,) in [0, 1] -> 128 cosines, then 128 sines (B, 256). In DiT t goes up to 1000 instead;
    LightningDiT does not scale it."""
    freq = torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
    angle = t[:, None] * freq                                          # (B, 128)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


# ---------------------------------------------------------------- the transformer
class Attention(nn.Module):
    """Multi-head self-attention. QKNorm is off in the published configs of LightningDiT and VTP."""

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
        # under autocast the rotation returns float32, while attention needs q, k, v of one type
        q = rope(self.q_norm(q)).type_as(v)
        k = rope(self.k_norm(k)).type_as(v)
        x = vit.attention(q, k, v)                                     # (B, heads, N, h)
        return self.proj(x.transpose(1, 2).flatten(2))                 # (B, N, D)


class SwiGLU(nn.Module):
    """w3( silu(gate) * value ). One matrix w12 computes gate and value, as in LightningDiT."""

    def __init__(self, D, hidden):
        super().__init__()
        self.w12 = nn.Linear(D, 2 * hidden)
        self.w3 = nn.Linear(hidden, D)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)                     # (B, N, hidden) each
        return self.w3(F.silu(gate) * value)


def modulate(x, shift, scale):
    """x (B, N, D); shift and scale (B, D) are computed from the condition"""
    # 1 + scale, so that the zero initialisation leaves x unchanged
    return x * (1 + scale[:, None]) + shift[:, None]


def add_gated(x, gate, branch):
    """x, branch (B, N, D); gate (B, D) is computed from the condition"""
    return x + gate[:, None] * branch


def adaln(D, n):
    """Condition c (B, D) -> n vectors of D numbers per sample, (B, n D)"""
    return nn.Sequential(nn.SiLU(), nn.Linear(D, n * D))


class Block(nn.Module):
    """Attention, then feed-forward. Shift, scale and gate of both are computed from the condition
    (adaLN-Zero), which contains the time and the class.   DiT Fig. 3"""

    def __init__(self, D, heads, mlp_ratio, qk_norm, norm):
        super().__init__()
        # LightningDiT's RMSNorm has a learned weight in addition to the scale of adaLN
        self.norm1 = norm(D)
        self.norm2 = norm(D)
        self.attn = Attention(D, heads, qk_norm)
        # SwiGLU has three matrices instead of two: 2/3 of the width, about equal parameters
        self.mlp = SwiGLU(D, int(2 / 3 * mlp_ratio * D))
        self.adaLN_modulation = adaln(D, 6)

    def forward(self, x, c, rope):
        # six vectors (B, D): the same for all tokens of a sample
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        branch = self.attn(modulate(self.norm1(x), shift1, scale1), rope)
        x = add_gated(x, gate1, branch)
        branch = self.mlp(modulate(self.norm2(x), shift2, scale2))
        return add_gated(x, gate2, branch)


class FinalLayer(nn.Module):
    """Tokens (B, N, D) and condition -> p p C numbers per token, the velocity of its patch"""

    def __init__(self, D, outputs, norm):
        super().__init__()
        self.norm_final = norm(D)
        self.linear = nn.Linear(D, outputs)
        self.adaLN_modulation = adaln(D, 2)

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class LightningDiT(nn.Module):
    """Velocity v(xt, t, y): DiT (Peebles & Xie 2023) with rotary embedding, RMSNorm and SwiGLU.

    Field names, state-dict keys and initialisation are those of LightningDiT, so that its weights
    can be loaded. With class_dropout_prob > 0 the label table has one more row, which means "no
    class" and is needed for guidance. The model drops no labels: the training batches do.
    """

    def __init__(self, input_size=16, patch_size=1, in_channels=64, hidden_size=768, depth=12,
                 num_heads=12, mlp_ratio=4.0, class_dropout_prob=0.1, num_classes=1000,
                 learn_sigma=False, use_qknorm=False, use_swiglu=True, use_rope=True,
                 use_rmsnorm=True, wo_shift=False, use_checkpoint=False):
        super().__init__()
        if learn_sigma or wo_shift or not use_swiglu:
            raise ValueError(f"learn_sigma={learn_sigma}, wo_shift={wo_shift}, use_swiglu="
                             f"{use_swiglu}: only False, False, True are supported, as in VTP")
        if hidden_size % (4 * num_heads) or input_size % patch_size:
            raise ValueError(f"hidden_size {hidden_size} must be a multiple of 4 * num_heads = "
                             f"{4 * num_heads}, input_size {input_size} of patch_size {patch_size}")
        self.input_size = input_size
        self.patch_size = patch_size
        self.use_checkpoint = use_checkpoint
        D = hidden_size
        side = input_size // patch_size                    # of the grid of tokens
        norm = partial(vit.RMSNorm, eps=1e-6)
        if not use_rmsnorm:                # as in LightningDiT, without a learned weight
            norm = partial(nn.LayerNorm, eps=1e-6, elementwise_affine=False)
        patchify = nn.Conv2d(in_channels, D, patch_size, patch_size)
        mlp = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        n_labels = num_classes + 1 if class_dropout_prob > 0 else num_classes
        labels = nn.Embedding(n_labels, D)
        blocks = [Block(D, num_heads, mlp_ratio, use_qknorm, norm) for _ in range(depth)]
        # a parameter without gradient, as in LightningDiT: weight files and parameter counts
        # include it
        self.pos_embed = nn.Parameter(sincos_table(D, side), requires_grad=False)
        # the dictionaries give the official keys, such as x_embedder.proj.weight
        self.x_embedder = nn.ModuleDict({"proj": patchify})
        self.t_embedder = nn.ModuleDict({"mlp": mlp})
        self.y_embedder = nn.ModuleDict({"embedding_table": labels})
        self.feat_rope = RotaryEmbedding(D // num_heads, side) if use_rope else nn.Identity()
        self.blocks = nn.ModuleList(blocks)
        self.final_layer = FinalLayer(D, patch_size ** 2 * in_channels, norm)
        self.init_weights()

    def init_weights(self):
        """Xavier for linear layers; normal with std 0.02 for the embeddings of time and class; zero
        for adaLN and the last layer. So each block starts as the identity, and an untrained model
        returns 0."""
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Conv2d)):
                # flatten(1): the patch embedding is initialised like a linear layer on a patch
                nn.init.xavier_uniform_(m.weight.flatten(1))
                nn.init.zeros_(m.bias)
        mlp = self.t_embedder["mlp"]
        for m in (self.y_embedder["embedding_table"], mlp[0], mlp[2]):
            nn.init.normal_(m.weight, std=0.02)
        for m in (*self.blocks, self.final_layer):
            nn.init.zeros_(m.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, x, t, y):
        """x (B, C, H, W), t (B,) in [0, 1], y (B,) in 0..num_classes -> velocity (B, C, H, W)

        y = num_classes means "no class".
        """
        p = self.patch_size
        side = self.input_size // p
        x = self.x_embedder["proj"](x).flatten(2).transpose(1, 2)      # (B, N, D)
        x = x.contiguous() + self.pos_embed            # contiguous saves 7 % of a nano step
        c = self.t_embedder["mlp"](timestep_embedding(t))              # (B, D)
        c = c + self.y_embedder["embedding_table"](y)
        for block in self.blocks:
            if self.use_checkpoint and self.training:
                # store only the block's input, and compute its activations again in the backward
                # pass: less memory, more time
                x = checkpoint(block, x, c, self.feat_rope, use_reentrant=False)
            else:
                x = block(x, c, self.feat_rope)
        x = self.final_layer(x, c)                                     # (B, N, p p C)
        x = x.unflatten(1, (side, side)).unflatten(3, (p, p, -1))      # (B, row, col, p, q, C)
        x = x.permute(0, 5, 1, 3, 2, 4)                                # (B, C, row, p, col, q)
        return x.flatten(4).flatten(2, 3)                              # (B, C, H, W)

    def forward_with_cfg(self, x, t, y, cfg_scale, cfg_interval=None, cfg_interval_start=None,
                         channels=3):
        """Classifier-free guidance: u + cfg_scale (c - u), where c is the velocity for the class
        and u the velocity for "no class". With cfg_interval: c alone while t < cfg_interval_start.

        x, t, y   (2B, ...): y holds B classes, then B times "no class"; only the first half of x
                  is used -> (2B, C, H, W)
        channels  number of guided channels, None for all. LightningDiT guides the first 3, for any
                  number of channels.
        """
        x = x.chunk(2)[0]
        both = self(torch.cat([x, x]), t, y)                           # (2B, C, H, W)
        cond, uncond = both[:, :channels].chunk(2)                     # (B, channels, H, W) each
        guided = uncond + cfg_scale * (cond - uncond)
        if cfg_interval:
            early = t.chunk(2)[0] < cfg_interval_start
            guided = torch.where(early[:, None, None, None], cond, guided)
        # both halves get the guided channels; the other channels stay as predicted
        guided = torch.cat([guided, guided])
        return torch.cat([guided, both[:, guided.shape[1]:]], dim=1)


# ---------------------------------------------------------------- flow matching
def lognorm_time(z, mu, sigma):
    """Logit-normal time: z ~ N(0, 1) -> t = sigmoid(mu + sigma z). With a negative mu most times
    are below 0.5, closer to noise than to data."""
    return torch.sigmoid(mu + sigma * torch.as_tensor(z))


def flow_loss(model, x1, x0, t, y):
    """x1 data, x0 noise (B, C, H, W), t, y (B,) -> mse (B,), cos (B,). LightningDiT trains on
    their sum.

    mse  squared error of the velocity, averaged over C, H, W
    cos  1 - cosine similarity of the C channels at a position, averaged over positions

    An untrained model returns 0, where the cosine is undefined. PyTorch gives a gradient of 1e8
    there, which would stay in Adam's second moment and slow down the last layer for some 600 steps.
    Here the gradient is 0, and the value of the loss is LightningDiT's.
    """
    s = t[:, None, None, None]             # (B, 1, 1, 1)
    xt = s * x1 + (1 - s) * x0
    v = x1 - x0                            # the derivative of xt by t
    pred = model(xt, t, y).to(x1.dtype)    # the loss is float32 (float64 in tests)
    cosine = F.cosine_similarity(pred, v, dim=1)                       # (B, H, W)
    cosine = torch.where(pred.any(1), cosine, 0)                       # no gradient where pred is 0
    mse = (pred - v).square().mean((1, 2, 3))
    return mse, 1 - cosine.mean((1, 2))


def time_grid(points, shift):
    """-> times (points,), increasing from 0 to 1. A shift in (0, 1) moves them towards noise (0);
    with a shift of 0 or 1 they are equidistant."""
    t = torch.linspace(0, 1, points)
    if shift > 0:
        t = shift * t / (1 + (shift - 1) * t)
    return t


@torch.no_grad()
def euler(velocity, x, grid):
    """Integrate dx/dt = velocity(x, t), t (B,), from grid[0] to grid[-1] by Euler steps.

    x (B, C, H, W) at grid[0] -> x at grid[-1]
    """
    for t, dt in zip(grid[:-1], grid.diff()):
        x = x + dt * velocity(x, t.expand(len(x)))
    return x


def draft(model, noise, y, precision):
    """Noise (b, C, H, W), classes y (b,) -> latents, by 20 Euler steps without guidance"""
    like = model.pos_embed                                 # it has the model's dtype and device
    x, y = noise.to(like), y.to(like.device)
    grid = time_grid(21, shift=0.075).to(x)

    def velocity(x, t):
        return model(x, t, y).to(x)

    with autocast(like.device, precision):
        return euler(velocity, x, grid)


@torch.no_grad()
def count_flops(model):
    """FLOPs of the matrix products of one forward pass, for one latent"""
    like, side = model.pos_embed, model.input_size         # `like` has the right dtype and device
    x = like.new_zeros(1, model.x_embedder["proj"].in_channels, side, side)
    y = torch.zeros(1, dtype=torch.long, device=like.device)
    with FlopCounterMode(display=False) as counter:
        model(x, like.new_zeros(1), y)
    return counter.get_total_flops()


# ---------------------------------------------------------------- command: latents
def precision_of(args, device):
    """--precision; if it is not given, bf16 (as in LightningDiT) on hardware that multiplies it,
    else fp32"""
    if args.precision:
        warn_if_emulated(device, args.precision)
        return args.precision
    return "bf16" if multiplies_bf16(device) else "fp32"


def load_tokenizer(folder, device):
    """-> frozen tokenizer, fingerprint of its encoder (16 hexadecimal digits)

    `sample` compares fingerprints: the latents of one encoder need a decoder that was trained with
    this encoder.
    """
    tokenizer = load_model(folder).to(device).eval().requires_grad_(False)
    digest = hashlib.sha256()
    for name, x in sorted(tokenizer.state_dict().items()):
        # trunk: VTP, including its bottleneck; encoder: the baselines. The decoder is left out,
        # because stage 2 changes it and the same latents still fit.
        if name.startswith(("trunk.", "encoder.")):
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
    """Decay of the EMA of the weights after this step: `fixed`, or if that is None (1+s)/(10+s),
    at most 0.9999 (ours). This averages over about the last ninth of the steps, so that short runs
    do not keep their initial weights."""
    if fixed is not None:
        return fixed
    return min(0.9999, (1 + step) / (10 + step))


def check_train_args(args):
    """ValueError for values that training cannot use"""
    if min(args.batch, args.steps, args.log_every, args.save_every) < 1:
        raise ValueError(f"--batch {args.batch} --steps {args.steps} --log-every {args.log_every} "
                         f"--save-every {args.save_every}: each must be 1 or more")
    if args.batch % world_size():
        raise ValueError(f"--batch {args.batch} cannot be divided equally among {world_size()} "
                         f"processes; try --batch {round_to_multiple(args.batch, world_size())}")
    if not 0 <= args.label_drop <= 1:
        raise ValueError(f"--set label_drop={args.label_drop}: must be a number from 0 to 1")
    # the default is None, so parse_settings accepts any type
    is_decay = isinstance(args.ema, (int, float)) and 0 <= args.ema < 1
    if args.ema is not None and not is_decay:
        raise ValueError(f"--set ema={args.ema}: must be none or a number, 0 <= ema < 1")


def train(args, device):
    """Flow matching: the model learns the velocity on straight lines from noise to latents.

    VTP's released configs: --size XL --precision bf16 --set ema=0.9999 and the defaults; for its L
    tokenizer also --set lognorm_mu=-0.75 --set lognorm_sigma=1.
    """
    from vtp_min.extras.latents import LatentBatches, Latents
    from vtp_min.extras.previews import Previews
    set_tf32(device, False)                               # as LightningDiT's train.py
    data = Latents(args.latents)
    data.check(load_tokenizer)
    check_train_args(args)
    stats, about, classes = data.stats, data.about, data.classes
    precision = precision_of(args, device)
    dtype = torch.float64 if precision == "fp64" else torch.float32    # of the weights
    C, side, _ = data.shape

    # ---- the model and the moving average (EMA) of its weights, which generates the images
    torch.manual_seed(args.seed)
    # patch_size 1: the encoder has already reduced each image patch to one latent
    fields = dict(input_size=side, patch_size=1, in_channels=C, num_classes=len(classes),
                  class_dropout_prob=args.label_drop, **SIZES[args.size])
    model = LightningDiT(**fields).to(device, dtype)
    model.use_checkpoint = args.recompute                 # not in `fields`: it changes no weight
    broadcast_parameters(model)
    ema = copy.deepcopy(model)
    weights = [p for p in model.parameters() if p.requires_grad]       # all but pos_embed
    ema_weights = [p for p in ema.parameters() if p.requires_grad]
    ema.requires_grad_(False)
    # fused: a third of the time of a loop over the weights on a CPU
    optimizer = torch.optim.AdamW(weights, lr=args.lr, betas=(0.9, 0.95), weight_decay=0,
                                  fused=device.type != "mps")

    # ---- the run folder
    # run.json describes the latents instead of giving their path: the folder of the latents may
    # move between two starts, but a run cannot continue on other latents.
    source = (f"{len(data)} of {C}x{side}x{side} from {about['data']} ({about['split']}) by "
              f"encoder {about['encoder']}, {about.get('precision', 'fp32')}")
    machine = f"{device}, {precision}{tf32_of(device)}"
    settings = vars(args) | {"latents": source, "machine": machine}
    run = Run(args.out, settings, args.fresh, {"latents": data})
    state = {"model": model, "ema": ema, "opt": optimizer}
    run.restore(state)
    millions = sum(p.numel() for p in weights) / 1e6
    print0(f"LightningDiT-{args.size}: {millions:.1f} M parameters, {side * side} tokens of {C} "
           f"channels, {len(data)} latents of {len(classes)} classes; steps {run.step} to "
           f"{args.steps} at {args.batch} ({args.steps * args.batch / len(data):.1f} epochs); "
           f"{machine}")
    # relative to --out, so that both folders can be moved together
    tokenizer = os.path.relpath(data.folder / about["tokenizer"], args.out)
    config = dict(model=fields, tokenizer=tokenizer, encoder=about["encoder"])
    # the backward pass costs twice the forward pass
    flops = 3 * count_flops(model) * args.batch // world_size()
    run.start(args, args.batch, device, precision,
              lambda step: export(run.folder, config, ema, data, step), flops)
    batches = LatentBatches(data, stats, args.seed, args.batch, args.label_drop, len(classes))
    batches = run.watch(prefetch(batches, run.step, args.steps, args.workers))
    previews = Previews(run, data, args, partial(draft, ema, precision=precision), load_tokenizer)

    for step in range(run.step, args.steps):
        # linear warm-up, in which the first step already changes the weights; then constant
        lr = args.lr * min(1, (step + 1) / max(1, args.warmup))
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        batch = next(batches)
        x1 = move_to(batch["x1"], device).to(dtype)       # (B, C, H, W) normalised latents
        x0 = move_to(batch["x0"], device).to(dtype)       # (B, C, H, W) noise
        y = move_to(batch["y"], device)                   # (B,) classes, some are "no class"
        # the batch brings z, so that t too depends only on seed, step and row
        t = lognorm_time(move_to(batch["z"], device).to(dtype), args.lognorm_mu, args.lognorm_sigma)
        with autocast(device, precision):
            mse, cos = flow_loss(model, x1, x0, t, y)
        mse, cos = mse.mean(), cos.mean()
        loss = mse + cos                                  # weights 1 and 1: LightningDiT
        loss.backward()                                   # outside autocast, as PyTorch recommends
        average_gradients(model)                          # mean over processes
        grad_norm = torch.stack([p.grad.norm() for p in weights]).norm()     # logged, not clipped
        losses = {"loss": loss, "mse": mse, "cos": cos}
        finite, stop = run.agree(losses, grad_norm)       # equal on all processes
        if finite:                                        # else neither weights nor EMA change
            optimizer.step()
            update_ema(ema_weights, weights, ema_decay(step, args.ema))
        previews.after_step(step + 1)                     # changes no weight and no random draw
        run.after_step(step, losses, {}, grad_norm, lr, state)
        if stop:
            break
    status = run.finish()
    if status == 0:
        print0(f"Next: python dit.py sample {args.out}")
    return status


def export(folder, config, ema, data, step):
    """Write everything that `sample` reads, so that it needs neither the checkpoint nor the folder
    of the latents"""
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
    """-> EMA model, config (a dict), mean and std of the latents, class names, training step"""
    from vtp_min.extras.latents import read_export
    folder = Path(folder)
    config, stats, class_names = read_export(folder)
    model = LightningDiT(**config["model"])
    load_weights(model, folder / "model.safetensors")
    with safe_open(folder / "model.safetensors", "pt") as f:
        step = (f.metadata() or {}).get("step", "unknown")
    return model.to(device).eval(), config, stats, class_names, step


def check_sample_args(args, config, class_names):
    """-> list of the classes to generate, number of images. ValueError for values that sampling
    cannot use."""
    given = [str(c) for c in range(len(class_names))]
    if args.classes is not None:
        given = args.classes.split(",")
    unknown = [c for c in given if not c.strip().isdecimal() or int(c) >= len(class_names)]
    if unknown:
        shown = ", ".join(class_names[:10])
        if len(class_names) > 10:
            shown += ", ..."
        raise ValueError(f"--classes {','.join(unknown)}: the classes of this model are 0 .. "
                         f"{len(class_names) - 1} ({shown})")
    classes = [int(c) for c in given]
    n = args.n if args.per_class is None else args.per_class * len(classes)
    if n < 1 or args.batch < 1 or args.points < 2 or args.shift < 0:
        raise ValueError(f"{n} samples, --batch {args.batch}, --points {args.points}, "
                         f"--set shift={args.shift}: must be at least 1, 1, 2 and 0")
    if args.labels not in ("balanced", "random") or str(args.cfg_channels) not in CFG_CHANNELS:
        raise ValueError(f"--set labels={args.labels} --set cfg_channels={args.cfg_channels}: "
                         f"labels must be balanced or random, and cfg_channels 3 or all")
    if args.cfg != 1 and config["model"]["class_dropout_prob"] == 0:
        raise ValueError(f"--cfg {args.cfg} needs a model that was also trained on \"no class\", "
                         f"but this one was trained with --set label_drop=0; use --cfg 1")
    return classes, n


def use_cfg(t, args):
    """Whether the Euler step that starts at time t is guided"""
    return args.cfg != 1 and t >= args.cfg_start           # a scale of 1 changes nothing


def velocity_fn(model, y, null_label, args):
    """-> function velocity(x, t) for the classes y (B,), with the guidance that args request

    null_label  the label that means "no class"
    """
    pair = torch.cat([y, torch.full_like(y, null_label)])              # (2B,)
    channels = CFG_CHANNELS[str(args.cfg_channels)]

    def velocity(x, t):
        # t is the same for the whole batch. Before cfg_start the half without class is not
        # computed: 1.6 times as fast with LightningDiT's cfg_start of 0.125.
        if not use_cfg(t[0], args):
            return model(x, t, y).float()
        both = model.forward_with_cfg(torch.cat([x, x]), torch.cat([t, t]), pair, args.cfg,
                                      channels=channels)
        return both[:len(x)].float()
    return velocity


def sampling_flops(model, grid, args):
    """FLOPs of the DiT for one image: one forward pass per Euler step, two if the step is guided"""
    passes = [2 if use_cfg(t, args) else 1 for t in grid[:-1]]
    return count_flops(model) * sum(passes)


def label_and_rng(j, classes, args):
    """-> class of sample j, and the generator of its noise. They depend on (seed, j) alone."""
    rng = make_rng(Stream.SAMPLING, args.seed, j)
    if args.labels == "random":
        return classes[rng.integers(len(classes))], rng
    return classes[j % len(classes)], rng


def initial_noise(indices, classes, shape, args, device):
    """Indices of b samples -> noise x (b, C, H, W), classes y (b,)"""
    labels, noise = [], []
    for j in indices:
        label, rng = label_and_rng(j, classes, args)
        labels.append(label)
        noise.append(torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)))
    return torch.stack(noise).to(device), torch.tensor(labels, device=device)


@torch.no_grad()
def sample(args, device):
    """Noise -> latents by Euler steps -> images by the tokenizer's decoder.

    Sample j depends on (seed, j) alone, not on batch size or processes. VTP's released configs:
    --n 50000 --set labels=random and the defaults.
    """
    from vtp_min.extras.sample_folder import prepare_folder, write_images, write_summary
    set_tf32(device, True)                                # as LightningDiT's inference.py
    args.precision = precision_of(args, device)
    model, config, stats, class_names, step = load_dit(args.run, device)
    classes, n = check_sample_args(args, config, class_names)
    decoder_run = args.tokenizer or os.path.normpath(Path(args.run) / config["tokenizer"])
    tokenizer, encoder = load_tokenizer(decoder_run, device)
    if encoder != config["encoder"]:
        raise ValueError(f"the encoder of {decoder_run} (fingerprint {encoder}) did not make the "
                         f"latents of this model (fingerprint {config['encoder']}); give the right "
                         f"folder with --tokenizer, or encode and train again")
    out = Path(args.out or Path(args.run) / "samples")
    prepare_folder(out, args.fresh)

    mean, std = stats["mean"].to(device), stats["std"].to(device)      # (1, C, 1, 1)
    shape = (config["model"]["in_channels"], model.input_size, model.input_size)
    grid = time_grid(args.points, args.shift).to(device)
    own_samples = range(rank(), n, world_size())          # rank r: r, r + world_size, ...
    flops = sampling_flops(model, grid, args) * len(own_samples)
    peak = peak_flops(device, args.precision)
    bar = ProgressBar(total=len(own_samples), desc="sample", unit="image", disable=rank() > 0)
    start = time.perf_counter()
    for k in range(0, len(own_samples), args.batch):
        indices = own_samples[k:k + args.batch]
        x, y = initial_noise(indices, classes, shape, args, device)
        with autocast(device, args.precision):            # around all steps: weights are cast once
            z = euler(velocity_fn(model, y, len(class_names), args), x, grid)
        # the DiT was trained on normalised latents; the decoder, in fp32, needs the original scale
        images = denormalize(tokenizer.get_latents_decoded_images(z * std + mean))
        images = (255 * images).clamp(0, 255).to(torch.uint8)          # truncated, as in VTP
        write_images(out, indices, images.permute(0, 2, 3, 1).cpu().numpy())
        bar.update(len(indices))
    bar.close()
    seconds = time.perf_counter() - start
    barrier()                                             # until all processes have written
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
    write_summary(out, protocol, class_names, [int(label) for label in labels])
    print0(f"{protocol}\n{n / seconds:.3g} images/s at {flops / seconds / peak:.1%} of the "
           f"{args.precision} matrix-product peak measured here (FLOPs of the DiT; the time "
           f"includes decoding and writing)\n"
           f"-> {out}: grid.png, png/000000.png ..., samples.npz, labels.json")


# ---------------------------------------------------------------- flags
COMMANDS = {"latents": latents, "train": train, "sample": sample}
FLAGS = [  # commands, flag, type or list of choices, default, meaning and source
    ("latents", "run", str, None, "folder of the tokenizer: config.json, model.safetensors"),
    ("train", "latents", str, None, "folder that `dit.py latents` wrote"),
    ("sample", "run", str, None, "folder that `dit.py train` wrote; its EMA weights are used"),
    ("latents", "--out", str, None, "folder of the latents (default: RUN/latents)"),
    ("train", "--out", str, None, "run folder; if it holds a checkpoint, training continues"),
    ("sample", "--out", str, None, "folder of the images (default: RUN/samples)"),
    ("latents train sample", "--fresh", bool, False, "start over: replace what --out holds"),
    ("latents", "--data", str, None, "images (default: those the tokenizer was trained on)"),
    ("latents", "--split", str, "train", "train or val; LightningDiT: train"),
    ("latents", "--n", int, None, "at most this many images (default: all; 50000 of the shapes)"),
    ("latents", "--image", int, None, "side in pixels (default: that of the tokenizer)"),
    ("train", "--size", [*SIZES], "B", "B: VTP Sec. 4.1; XL: VTP's configs; pico, nano: for CPUs"),
    ("train", "--steps", int, 100_000, "VTP: 100000, which are 80 epochs of ImageNet at batch "
     "1024; ours: 1000 for pico, a few thousand for nano"),
    ("train", "--batch", int, 1024, "latents per step over ALL processes; LightningDiT: 1024; "
     "ours, for a CPU: 64"),
    ("latents sample", "--batch", int, 50, "images per batch on each process; VTP: 50"),
    ("train", "--lr", float, 2e-4, "learning rate of AdamW, constant; betas 0.9, 0.95, no weight "
     "decay, no clipping: LightningDiT; ours, with --warmup 50: 1e-3 for nano, 8e-3 for pico"),
    ("train", "--warmup", int, 0, "steps of linear warm-up; LightningDiT: 0"),
    ("train", "--save-every", int, 1000, "steps between checkpoints; VTP: 20000"),
    ("train", "--log-every", int, 50, "steps between lines of log.jsonl"),
    ("train", "--recompute", bool, False, "activation checkpointing: a third more work, much less "
     "memory"),
    ("sample", "--tokenizer", str, None, "folder of the decoder, such as a stage-2 run (default: "
     "the tokenizer that made the latents)"),
    ("sample", "--n", int, 50, "number of images; VTP: FID of 10000 or 50000"),
    ("sample", "--per-class", int, None, "number of images per class, instead of --n"),
    ("sample", "--classes", str, None, "class numbers, such as 0,3,7 (default: all)"),
    ("sample", "--points", int, 250, "time points, one more than Euler steps; LightningDiT, VTP: "
     "250; for a draft: 50"),
    ("sample", "--cfg", float, 1.0, "guidance scale; VTP: 1, which is off; LightningDiT: 6.7"),
    ("latents train", "--workers", int, 0, "processes that read data; a GPU needs 4 to 8"),
    ("latents sample", "--precision", ["fp32", "bf16"], None, "of the matrix products of encoder "
     "or DiT; latents are stored and decoded in fp32 (default: bf16 if the hardware multiplies "
     "it, else fp32; images of a trained nano differed by at most 2 of 255)"),
    ("train", "--precision", ["fp32", "bf16", "fp64"], None, "of matrix products; weights stay in "
     "fp32 (default: bf16 as in LightningDiT if the hardware multiplies it, else fp32). fp64 is "
     "for tests and holds for the weights too"),
    ("latents train sample", "--seed", int, 0, "seed of all random numbers; VTP: 0"),
    ("latents train sample", "--device", str, None, "cpu, cuda or mps (default: best available)")]
SETTINGS = [  # commands, name, default, meaning and source: for --set name=value
    ("train", "lognorm_mu", -0.5, "time: VTP -0.5, for its L tokenizer -0.75; LightningDiT 0"),
    ("train", "lognorm_sigma", 1.25, "time: VTP 1.25, for its L tokenizer 1.0; LightningDiT 1"),
    ("train", "label_drop", 0.1, "fraction of samples without their class, for guidance: DiT"),
    ("train", "ema", None, "decay of the EMA: LightningDiT 0.9999; None: rises to it (ours)"),
    ("train", "previews", True, "samples at steps 50, 100, 200, 400, ... and the last one (ours)"),
    ("sample", "labels", "balanced", "classes in turn (ours); random: LightningDiT, VTP"),
    ("sample", "shift", 0.075, "time points closer to noise: VTP 0.075, LightningDiT 0.3, off 0"),
    ("sample", "cfg_start", 0.0, "no guidance before this t: VTP 0, LightningDiT 0.125"),
    ("sample", "cfg_channels", "3", "guided channels: LightningDiT 3; textbook: all"),
    ("latents train sample", "fast", True, "on CPUs, faster forms from extras/fast.py")]


def parse(argv=None):
    """argv (default: the command line) -> Namespace of the command, its flags and its settings"""
    args = parse_subcommands(argv, __doc__, COMMANDS, FLAGS, SETTINGS)
    if args.command == "train" and args.out is None:
        raise SystemExit("dit.py train: --out is missing; give a folder for the run")
    return args


def main(argv=None):
    args = parse(argv)
    restore_plain_forms = None
    try:
        device = init_distributed(args.device)
        if device.type == "cpu" and args.fast:
            # the faster forms are optimised for CPUs and give the same numbers up to rounding
            from vtp_min.extras import fast
            restore_plain_forms = fast.install(dit=sys.modules[__name__])
        status = COMMANDS[args.command](args, device)
    except (ValueError, OSError) as problem:              # a message for the user, no traceback
        raise SystemExit(f"dit.py {args.command}: {problem}") from problem
    finally:
        if restore_plain_forms:
            restore_plain_forms()
        cleanup()
    if status:                                   # EXIT_RESUME: a signal ended the training early
        raise SystemExit(status)


if __name__ == "__main__":
    main()
