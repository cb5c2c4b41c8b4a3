"""Generation: a LightningDiT learns to turn noise into the tokenizer's latents. The proof of the pudding of VTP Sec. 4.

    python dit.py latents RUN                       images -> latents of the frozen tokenizer in RUN, and their mean and std
    python dit.py train RUN/latents --out RUN_DIT   latents -> diffusion transformer (flow matching)
    python dit.py sample RUN_DIT --n 50             noise -> latents -> pictures
    torchrun --nproc-per-node 8 -- dit.py ...       the same on many processes (-- keeps torchrun from taking --n for its own)

Symbols: x0 noise, x1 data (normalised latent), xt = t x1 + (1-t) x0, so t = 0 is noise and t = 1 is data; y class; c condition.
B batch, C latent channels, H = W latent side, N = (H/p)^2 tokens, D width, h = D/heads.
Follows LightningDiT (Yao et al. 2025), which is DiT (Peebles & Xie 2023) with RoPE, RMSNorm, SwiGLU, velocity and cosine losses.
"""
import argparse
import bisect
import copy
import hashlib
import json
import math
import os
import shutil
import time
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import denormalize, eval_batches, normalize, open_data
from vtp_min.dist import rank, say, start, stop, total, world
from vtp_min.model import VTPModel
from vtp_min.run import Run, autocast, write_aside
from vtp_min.vit import RMSNorm

SIZES = {"nano": dict(hidden_size=192, depth=6, num_heads=3),         # ours, for a CPU
         "B":    dict(hidden_size=768, depth=12, num_heads=12),       # LightningDiT-B/1, the paper's yardstick
         "L":    dict(hidden_size=1024, depth=24, num_heads=16),      # DiT-L with patch 1
         "XL":   dict(hidden_size=1152, depth=28, num_heads=16),      # LightningDiT-XL/1
         "1p0B": dict(hidden_size=1536, depth=24, num_heads=24)}      # LightningDiT-1p0B/1


# ------------------------------------------------------------------------------------------------ parts of the model

def sincos_table(width, side):
    """Fixed position table (1, side^2, width): first half the column, second half the row; each [sin..., cos...].   DiT"""
    freq = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, col = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    half = lambda pos: torch.cat([f(pos.flatten()[:, None] * freq) for f in (torch.sin, torch.cos)], dim=1)
    return torch.cat([half(col), half(row)], dim=1).float()[None]


class Rotary(nn.Module):
    """Turns neighbouring pairs of q and k by an angle that grows with the row (first half of h) and the column (second)."""

    def __init__(self, head_dim, side):
        super().__init__()
        freq = 10000 ** -(torch.arange(0, head_dim // 2, 2, dtype=torch.float64) / (head_dim // 2))
        row, col = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        angle = torch.cat([row.flatten()[:, None] * freq, col.flatten()[:, None] * freq], dim=1)      # (N, h/2)
        angle = angle.repeat_interleave(2, dim=1)                                                     # (N, h), equal in a pair
        self.register_buffer("freqs_cos", angle.cos().float())
        self.register_buffer("freqs_sin", angle.sin().float())

    def forward(self, x):
        """x (B, heads, N, h): (a, b) -> (a cos - b sin, b cos + a sin) in each pair"""
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return (x * self.freqs_cos + torch.stack([-b, a], dim=-1).flatten(-2) * self.freqs_sin).type_as(x)


class Attention(nn.Module):
    def __init__(self, width, heads, qknorm):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = (RMSNorm(width // heads, eps=1e-6) if qknorm else nn.Identity() for _ in "qk")
        self.proj = nn.Linear(width, width)

    def forward(self, x, rope):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)     # 3 x (B, heads, N, h)
        out = F.scaled_dot_product_attention(rope(self.q_norm(q)), rope(self.k_norm(k)), v)
        return self.proj(out.transpose(1, 2).flatten(2))                                    # (B, N, D)


class SwiGLU(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


def modulate(x, shift, scale):
    """x (B, N, D) is scaled and shifted by what the condition asks for: shift, scale (B, D)"""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


def adaln(width, outputs):
    return nn.Sequential(nn.SiLU(), nn.Linear(width, outputs * width))


class Block(nn.Module):
    """Attention, then MLP; the condition c scales and shifts what enters them and gates what leaves (adaLN-Zero).   DiT Fig. 3"""

    def __init__(self, width, heads, mlp_ratio, qknorm, norm):
        super().__init__()
        self.norm1, self.norm2 = norm(width), norm(width)
        self.attn = Attention(width, heads, qknorm)
        self.mlp = SwiGLU(width, int(2 / 3 * mlp_ratio * width))
        self.adaLN_modulation = adaln(width, 6)

    def forward(self, x, c, rope):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = torch.addcmul(x, gate1[:, None], self.attn(modulate(self.norm1(x), shift1, scale1), rope))
        return torch.addcmul(x, gate2[:, None], self.mlp(modulate(self.norm2(x), shift2, scale2)))


class FinalLayer(nn.Module):
    def __init__(self, width, outputs, norm):
        super().__init__()
        self.norm_final = norm(width)
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = adaln(width, 2)

    def forward(self, x, c):
        return self.linear(modulate(self.norm_final(x), *self.adaLN_modulation(c).chunk(2, dim=1)))


def waves(t):
    """t (B,) in [0, 1], as it is (DiT counts to 1000, LightningDiT does not) -> its 128 cosines and 128 sines (B, 256)"""
    angle = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class LightningDiT(nn.Module):
    """Velocity field v(xt, t, y). Field names, state-dict keys and initialisation are LightningDiT's.

    The last row of the label table means "no class". The training loop, which knows the step, drops labels to it; forward is a pure function.
    """

    def __init__(self, input_size=16, patch_size=1, in_channels=64, hidden_size=768, depth=12, num_heads=12, mlp_ratio=4.0,
                 class_dropout_prob=0.1, num_classes=1000, learn_sigma=False, use_qknorm=False, use_swiglu=True, use_rope=True,
                 use_rmsnorm=True, wo_shift=False, use_checkpoint=False):
        super().__init__()
        if learn_sigma or wo_shift or not use_swiglu:
            raise ValueError(f"found learn_sigma={learn_sigma}, wo_shift={wo_shift}, use_swiglu={use_swiglu}; wanted False, False, True (VTP's)")
        if hidden_size % (4 * num_heads) or input_size % patch_size:
            raise ValueError(f"hidden_size {hidden_size} must be a multiple of 4 * num_heads = {4 * num_heads}, "
                             f"and input_size {input_size} one of patch_size {patch_size}")
        side = input_size // patch_size
        norm = partial(RMSNorm, eps=1e-6) if use_rmsnorm else partial(nn.LayerNorm, eps=1e-6, elementwise_affine=False)
        self.input_size, self.patch_size, self.use_checkpoint = input_size, patch_size, use_checkpoint
        self.pos_embed = nn.Parameter(sincos_table(hidden_size, side), requires_grad=False)
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(in_channels, hidden_size, patch_size, patch_size)})
        self.t_embedder = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + (class_dropout_prob > 0), hidden_size)})
        self.feat_rope = Rotary(hidden_size // num_heads, side) if use_rope else nn.Identity()
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio, use_qknorm, norm) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size ** 2 * in_channels, norm)
        self.init_weights()

    def init_weights(self):
        """Xavier everywhere, normal 0.02 for conditions, zero for gates and the last layer: an untrained model outputs 0."""
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(m.weight.flatten(1))
                nn.init.zeros_(m.bias)
        for m in (self.y_embedder["embedding_table"], *self.t_embedder["mlp"][::2]):
            nn.init.normal_(m.weight, std=0.02)
        for linear in [self.final_layer.linear] + [m.adaLN_modulation[1] for m in (*self.blocks, self.final_layer)]:
            nn.init.zeros_(linear.weight)

    def forward(self, x, t, y):
        """x (B, C, H, W), t (B,) in [0, 1], y (B,) in 0..num_classes -> velocity (B, C, H, W)"""
        p, side = self.patch_size, self.input_size // self.patch_size
        through = partial(checkpoint, use_reentrant=False) if self.use_checkpoint and self.training else lambda f, *inputs: f(*inputs)
        x = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed         # (B, N, D)
        c = self.t_embedder["mlp"](waves(t)) + self.y_embedder["embedding_table"](y)       # (B, D)
        for block in self.blocks:
            x = through(block, x, c, self.feat_rope)
        x = self.final_layer(x, c)                                                         # (B, N, p p C)
        x = x.unflatten(1, (side, side)).unflatten(3, (p, p, -1))                          # (B, row, col, p, q, C)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)                        # (B, C, H, W)

    def forward_with_cfg(self, x, t, y, cfg_scale, cfg_interval=None, cfg_interval_start=None, channels=3):
        """Classifier-free guidance u + scale (c - u), and c alone before cfg_interval_start if cfg_interval is on.

        x, t, y  (2B, ...): y holds B classes, then B times "no class"; x of the first half serves both -> (2B, C, H, W)
        channels  how many are guided: LightningDiT guides the first 3 of whatever C; None guides all
        """
        both = self(torch.cat([x.chunk(2)[0]] * 2), t, y)
        cond, null = both[:, :channels].chunk(2)
        guided = null + cfg_scale * (cond - null)
        if cfg_interval:
            early = t.chunk(2)[0] < cfg_interval_start
            guided = torch.where(early[:, None, None, None], cond, guided)
        return torch.cat([torch.cat([guided] * 2), both[:, guided.shape[1]:]], dim=1)


# ------------------------------------------------------------------------------------------------ flow matching

def lognorm_time(z, mu, sigma):
    """Logit-normal time: z ~ N(0, 1) -> t = sigmoid(mu + sigma z) in (0, 1). Negative mu favours small t, the noisy side."""
    return torch.sigmoid(mu + sigma * torch.as_tensor(z))


def flow_loss(model, x1, x0, t, y):
    """How well does v(xt, t, y) point from noise to data?   x1 data, x0 noise (B, C, H, W), t, y (B,) -> mse, cos, each (B,)

    mse  squared error of the velocity        cos  1 - cosine along channels, mean over positions; LightningDiT adds both with weight 1
    """
    s = t[:, None, None, None]
    v = x1 - x0
    pred = model(s * x1 + (1 - s) * x0, t, y).float()
    return (pred - v).square().mean((1, 2, 3)), 1 - F.cosine_similarity(pred, v, dim=1).mean((1, 2))


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


# ------------------------------------------------------------------------------------------------ latents on disk

def draws(*key):
    """A generator that depends on nothing but these numbers: (seed, 0, epoch) order, (seed, 1, step, i) training, (seed, 2, j) sampling."""
    return np.random.default_rng(key)


@lru_cache(2)
def shuffled(n, seed, epoch):
    return draws(seed, 0, epoch).permutation(n)


class Latents:
    """The shards `latents_rank*_shard*.safetensors` of a folder as one list of (C, H, W) latents with labels."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.files = [safe_open(path, "pt") for path in sorted(self.folder.glob("latents_rank*_shard*.safetensors"))]
        if not self.files:
            raise SystemExit(f"{folder} holds no latents_rank*_shard*.safetensors; make them with: python dit.py latents RUN --out {folder}")
        labels = [f.get_tensor("labels") for f in self.files]
        self.labels = torch.cat(labels)
        self.ends = np.cumsum([len(part) for part in labels]).tolist()
        self.shape = tuple(self.files[0].get_slice("latents").get_shape()[1:])

    def __len__(self):
        return len(self.labels)

    def read(self, i, flip=False):
        """Latent i, or that of the mirrored image -> (C, H, W); only these bytes are read"""
        shard = bisect.bisect(self.ends, i)
        row = int(i) - (self.ends[shard - 1] if shard else 0)
        return self.files[shard].get_slice("latents_flip" if flip else "latents")[row:row + 1][0]

    def beside(self, name):
        """Path of a file that stands beside the shards, or a sentence"""
        if not (self.folder / name).exists():
            raise SystemExit(f"{self.folder / name} is missing; python dit.py latents RUN writes it beside the shards")
        return self.folder / name


def latent_stats(latents, seed):
    """Mean and unbiased std of each channel over batch and space of up to 10000 random latents, not mirrored -> dict of (1, C, 1, 1)"""
    chosen = np.sort(draws(seed, 0, 0).permutation(len(latents))[:10000])
    s = torch.zeros(2, latents.shape[0], dtype=torch.float64)
    for i in chosen:
        z = latents.read(i).double()
        s += torch.stack([z.sum((1, 2)), z.square().sum((1, 2))])
    n = len(chosen) * latents.shape[1] * latents.shape[2]
    mean = s[0] / n
    std = ((s[1] - n * mean ** 2).clamp(min=0) / (n - 1)).sqrt()
    return {"mean": mean.float()[None, :, None, None], "std": std.float()[None, :, None, None]}


class Batches:
    """Step number -> this rank's rows of that step's batch: x1, x0 (b, C, H, W), t, y (b,). The step number is the only state."""

    def __init__(self, latents, stats, args, null):
        self.latents, self.stats, self.args, self.null = latents, stats, args, null

    def __getitem__(self, step):
        a, n, here = self.args, len(self.latents), self.args.batch // world()
        rows = [self.sample(step, i, *divmod(step * a.batch + i, n)) for i in range(rank() * here, (rank() + 1) * here)]
        x1, x0, z, y = (torch.stack(column) for column in zip(*rows))
        return (x1 - self.stats["mean"]) / self.stats["std"], x0, lognorm_time(z, a.lognorm_mu, a.lognorm_sigma), y

    def sample(self, step, i, epoch, position):
        """Sample i of a step: each latent once an epoch, mirrored half of the time; its class is hidden with probability 0.1."""
        a, index = self.args, shuffled(len(self.latents), self.args.seed, epoch)[position]
        rng = draws(a.seed, 1, step, i)
        flip, drop, z = rng.random() < 0.5, rng.random() < a.label_drop, rng.standard_normal(dtype=np.float32)
        x0 = torch.from_numpy(rng.standard_normal(self.latents.shape, dtype=np.float32))
        y = torch.tensor(self.null) if drop else self.latents.labels[index]
        return self.latents.read(index, flip), x0, torch.tensor(z), y


# ------------------------------------------------------------------------------------------------ command: latents

def load_tokenizer(folder, device):
    """The frozen tokenizer, and a fingerprint of its encoder: latents mean nothing to the decoder of another one."""
    vtp = VTPModel.from_pretrained(folder).to(device).eval().requires_grad_(False)
    digest = hashlib.sha256()
    for p in vtp.trunk.parameters():
        digest.update(p.cpu().numpy().tobytes())
    return vtp, digest.hexdigest()[:16]


@torch.no_grad()
def latents(args):
    here = start(args.device)
    out = Path(args.out or Path(args.run) / "latents")
    old = sorted(out.glob("latents_rank*_shard*.safetensors"))
    if old and not args.fresh:
        raise SystemExit(f"{out} holds latents already ({len(old)} files); train on them (python dit.py train {out}), or encode anew with --fresh")
    if args.batch < 1 or (args.n is not None and args.n < 1):
        raise SystemExit(f"--batch {args.batch} --n {args.n}: both must be at least 1")
    vtp, encoder = load_tokenizer(args.run, here)
    trained = Path(args.run) / "run.json"
    if not trained.exists() and args.data is None:
        raise SystemExit(f"{args.run} has no run.json that would name its images; say which with --data")
    flags = json.loads(trained.read_text()) if trained.exists() else {}
    spec, side = args.data or flags.get("data"), args.image or flags.get("image") or vtp.config.image_size
    source = open_data(spec, split=args.split, seed=flags.get("seed", 0), side=side)
    if source.classes is None:
        raise SystemExit(f"{spec} has no classes, but LightningDiT is conditioned on them; use a folder of class folders, or the built-in shapes")
    n = min(args.n or len(source), len(source))
    wait()                                                                       # all ranks have looked before rank 0 clears
    if rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        for path in old:
            path.unlink()
    wait()
    held, shard = [], 0
    for k, (img, labels, _) in enumerate(tqdm(eval_batches(source, side, args.batch, limit=n, crop="adm", workers=args.workers),
                                              total=-(-n // args.batch), desc="latents", unit="batch", disable=rank() > 0)):
        if k % world() == rank():
            x = normalize(img.to(here))
            z, z_flip = vtp.get_reconstruction_latents(x), vtp.get_reconstruction_latents(x.flip(-1))
            held.append((z.float().cpu(), z_flip.float().cpu(), labels))
            if len(held) == max(1, 10000 // args.batch):
                shard, held = write_shard(out, shard, held, here), []
    if held:
        write_shard(out, shard, held, here)
    wait()
    if rank() == 0:
        done = Latents(out)
        stats = latent_stats(done, args.seed)
        torch.save(stats, out / "latents_stats.pt")
        (out / "classes.json").write_text(json.dumps(list(source.classes)) + "\n")
        about = dict(tokenizer=os.path.relpath(args.run, out), encoder=encoder, data=spec, split=args.split, image=side, shape=done.shape)
        (out / "latents.json").write_text(json.dumps(about, indent=2) + "\n")
        mean, std = stats["mean"], stats["std"]
        say(f"{len(done)} images, {len(source.classes)} classes, {side} px, ADM centre crop, fp32 -> {out}: latents {done.shape}, mirrored too\n"
            f"mean {mean.min():.3f} .. {mean.max():.3f}, std {std.min():.3f} .. {std.max():.3f} over channels")


def write_shard(out, shard, held, device):
    """Latents, mirrored latents and labels of the batches held -> one file in the reference's layout -> the next shard's number"""
    z, z_flip, labels = (torch.cat(column).contiguous() for column in zip(*held))
    save_file({"latents": z, "latents_flip": z_flip, "labels": labels.long()}, out / f"latents_rank{rank():02d}_shard{shard:03d}.safetensors",
              metadata={"total_size": str(len(z)), "dtype": str(z.dtype), "device": str(device)})
    return shard + 1


def wait():
    """Every rank stands here until all do."""
    if world() > 1:
        torch.distributed.barrier()


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
    data = Latents(args.latents)
    stats = torch.load(data.beside("latents_stats.pt"), weights_only=True)
    classes, about = (json.loads(data.beside(name).read_text()) for name in ("classes.json", "latents.json"))
    C, H, W = data.shape
    if H != W:
        raise SystemExit(f"latents are {H}x{W}, but LightningDiT wants a square")
    if args.batch % world() or min(args.batch, args.steps, args.log_every, args.save_every) < 1:
        raise SystemExit(f"--batch {args.batch} must be a multiple of {world()} processes; --batch, --steps, --log-every, --save-every at least 1")
    if not 0 <= args.label_drop <= 1 or args.ema is not None and not 0 <= args.ema < 1:
        raise SystemExit(f"--label-drop {args.label_drop} --ema {args.ema}: wanted a share between 0 and 1, and a decay from 0 up to but not 1")
    if data.labels.min() < 0 or data.labels.max() >= len(classes):
        raise SystemExit(f"labels run from {data.labels.min()} to {data.labels.max()}, but classes.json names {len(classes)} classes")
    if stats["mean"].shape != (1, C, 1, 1):
        raise SystemExit(f"latents have {C} channels, but latents_stats.pt is of shape {tuple(stats['mean'].shape)}; encode anew with --fresh")

    run = Run(args.out, vars(args) | {"encoder": about["encoder"]}, args.fresh)
    torch.manual_seed(args.seed)
    fields = dict(input_size=H, patch_size=1, in_channels=C, num_classes=len(classes), class_dropout_prob=args.label_drop, **SIZES[args.size])
    model = LightningDiT(**fields).to(here)
    ema = copy.deepcopy(model).requires_grad_(False)
    weights = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(weights, lr=args.lr, betas=(0.9, 0.95), weight_decay=0, fused=here.type != "mps")
    parts = {"model": model, "ema": ema, "opt": opt}
    first = run.state["step"] if run.state else 0
    for name, part in parts.items() if run.state else ():
        part.load_state_dict(run.state[name])
    config = dict(model=fields, tokenizer=os.path.relpath(data.folder / about["tokenizer"], args.out), encoder=about["encoder"], multiplier=1.0)
    say(f"LightningDiT-{args.size}: {sum(p.numel() for p in weights) / 1e6:.1f} M parameters, {H * W} tokens of {C} channels, {len(data)} latents of "
        f"{len(classes)} classes; steps {first} to {args.steps} at {args.batch} ({args.steps * args.batch / len(data):.1f} epochs)")

    def keep(step):
        """A checkpoint to go on from, and beside it all that `sample` needs."""
        run.save(step, {name: part.state_dict() for name, part in parts.items()})
        if rank() == 0:
            write_aside(run.folder / "config.json", lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))
            write_aside(run.folder / "model.safetensors", lambda path: save_file(ema.state_dict(), path, metadata={"step": str(step)}))
            for name in ("latents_stats.pt", "classes.json"):
                shutil.copyfile(data.folder / name, run.folder / name)

    net = DistributedDataParallel(model, device_ids=[here.index] if here.type == "cuda" else None) if world() > 1 else model
    batches = DataLoader(Batches(data, stats, args, null=len(classes)), sampler=range(first, args.steps), batch_size=None, num_workers=args.workers,
                         multiprocessing_context="fork" if args.workers else None, pin_memory=here.type == "cuda")
    bar = tqdm(batches, initial=first, total=args.steps, desc="dit", unit="step", disable=rank() > 0, dynamic_ncols=True)
    run.finish_on_signals()
    clock, seen = time.perf_counter(), 0
    for step, batch in enumerate(bar, start=first):
        x1, x0, t, y = (part.to(here, non_blocking=True) for part in batch)
        with autocast(here, args.precision):
            mse, cos = flow_loss(net, x1, x0, t, y)                              # point from noise to data
        loss = (mse + cos).mean()
        opt.param_groups[0]["lr"] = args.lr * min(1, (step + 1) / max(1, args.warmup))
        opt.zero_grad()
        loss.backward()
        opt.step()
        ema_(ema, model, ema_decay(step, args.ema))
        step, seen = step + 1, seen + args.batch
        stopping = run.stop_requested(here)
        log, save = step % args.log_every == 0 or step == args.steps, step % args.save_every == 0 or step == args.steps or stopping
        if log or save:
            mean = total(torch.stack([mse.mean(), cos.mean()]).detach()) / world()
            if not mean.isfinite().all():
                raise SystemExit(f"the loss is {mean.sum():.3g} at step {step}; earlier checkpoints are kept: try a smaller --lr, or --warmup")
        if log:
            run.log(step, loss=mean.sum(), mse=mean[0], cos=mean[1], grad_norm=torch.nn.utils.get_total_norm([p.grad for p in weights]),
                    lr=opt.param_groups[0]["lr"], images_per_s=seen / (time.perf_counter() - clock))
            bar.set_postfix(mse=f"{mean[0]:.3f}", cos=f"{mean[1]:.3f}")
            clock, seen = time.perf_counter(), 0
        if save:
            keep(step)
        if stopping:
            break
    say(f"{args.out}: {'stopped on a signal, saved; the same command goes on' if run.stopping else f'done; now python dit.py sample {args.out}'}")


# ------------------------------------------------------------------------------------------------ command: sample

def load_dit(folder, device):
    """A folder that `train` wrote -> the EMA model, its config (a dict), statistics, class names, and step"""
    folder = Path(folder)
    missing = [name for name in ("config.json", "model.safetensors", "latents_stats.pt", "classes.json") if not (folder / name).exists()]
    if missing:
        raise SystemExit(f"{folder} lacks {', '.join(missing)}; wanted the folder of: python dit.py train LATENTS --out {folder}")
    config = json.loads((folder / "config.json").read_text())
    model = LightningDiT(**config["model"])
    model.load_state_dict(load_file(folder / "model.safetensors"))
    with safe_open(folder / "model.safetensors", "pt") as f:
        step = (f.metadata() or {}).get("step", "unknown")
    stats = torch.load(folder / "latents_stats.pt", weights_only=True)
    return model.to(device).eval(), config, stats, json.loads((folder / "classes.json").read_text()), step


@torch.no_grad()
def sample(args):
    here = start(args.device)
    model, config, stats, names, step = load_dit(args.run, here)
    wanted = [int(c) for c in args.classes.split(",")] if args.classes else list(range(len(names)))
    bad = [c for c in wanted if not 0 <= c < len(names)]
    if bad:
        known = ", ".join(names[:10] + ["..."] * (len(names) > 10))
        raise SystemExit(f"--classes {','.join(map(str, bad))}: this model knows 0 .. {len(names) - 1} ({known})")
    n = args.per_class * len(wanted) if args.per_class is not None else args.n
    if n < 1 or args.batch < 1 or args.points < 2 or args.shift < 0:
        raise SystemExit(f"{n} samples, --batch {args.batch}, --points {args.points}, --shift {args.shift}: wanted at least 1, 1, 2 and 0")
    if args.cfg != 1 and config["model"]["class_dropout_prob"] == 0:
        raise SystemExit(f"--cfg {args.cfg} needs a model that also knows no class, but this one was trained with --label-drop 0; use --cfg 1")
    tokenizer = args.tokenizer or os.path.normpath(Path(args.run) / config["tokenizer"])
    vtp, encoder = load_tokenizer(tokenizer, here)
    if encoder != config["encoder"]:
        raise SystemExit(f"the latents were made by another encoder than that of {tokenizer} (fingerprint {config['encoder']}, here {encoder}); "
                         f"name the right one with --tokenizer, or encode and train anew")
    out, channels = Path(args.out or Path(args.run) / "samples"), None if args.cfg_channels == "all" else int(args.cfg_channels)
    if rank() == 0:
        (out / "png").mkdir(parents=True, exist_ok=True)
        for path in (out / "png").glob("[0-9]*.png"):
            path.unlink()
    wait()
    generators = [draws(args.seed, 2, j) for j in range(n)]
    labels = [wanted[g.integers(len(wanted))] if args.labels == "random" else wanted[j % len(wanted)] for j, g in enumerate(generators)]
    C, side = config["model"]["in_channels"], config["model"]["input_size"]
    mean, std, grid = stats["mean"].to(here), stats["std"].to(here), time_grid(args.points, args.shift).to(here)
    mine = range(rank(), n, world())
    bar = tqdm(total=len(mine), desc="sample", unit="image", disable=rank() > 0)
    for k in range(0, len(mine), args.batch):
        js = mine[k:k + args.batch]
        x = torch.stack([torch.from_numpy(generators[j].standard_normal((C, side, side), dtype=np.float32)) for j in js]).to(here)
        y = torch.tensor([labels[j] for j in js], device=here)

        def velocity(x, t):
            with autocast(here, args.precision):
                if args.cfg == 1:
                    return model(x, t, y).float()
                pair = torch.cat([y, torch.full_like(y, len(names))])
                both = model.forward_with_cfg(torch.cat([x, x]), torch.cat([t, t]), pair, args.cfg, args.cfg_start > 0, args.cfg_start, channels)
                return both[:len(x)].float()

        z = euler(velocity, x, grid) * std / config["multiplier"] + mean
        pixels = (denormalize(vtp.get_latents_decoded_images(z)) * 255).clamp(0, 255).to(torch.uint8)      # truncated, as VTP does
        for j, img in zip(js, pixels.permute(0, 2, 3, 1).cpu().numpy()):
            Image.fromarray(img).save(out / "png" / f"{j:06d}.png")
        bar.update(len(js))
    bar.close()
    wait()
    if rank() == 0:
        protocol = (f"{n} samples of {args.run}: EMA weights of step {step}, Euler with {args.points - 1} steps, shift {args.shift}, guidance "
                    + ("off" if args.cfg == 1 else f"{args.cfg} from t {args.cfg_start} on {args.cfg_channels} channels")
                    + f", labels {args.labels} over {len(wanted)} classes, seed {args.seed}, {args.precision}, "
                    + f"decoded by {tokenizer} in fp32, 8 bit by truncation")
        images = np.stack([np.asarray(Image.open(out / "png" / f"{j:06d}.png")) for j in range(n)])
        np.savez(out / "samples.npz", arr_0=images, labels=np.array(labels))
        (out / "labels.json").write_text(json.dumps({"protocol": protocol, "classes": names, "labels": labels}) + "\n")
        class_grid(images, labels, names).save(out / "grid.png")
        say(f"{protocol}\n-> {out}: grid.png, png/000000.png ..., samples.npz, labels.json")


def class_grid(images, labels, names, rows=16, columns=10, margin=110):
    """images (n, H, W, 3) uint8 -> one picture: a row a class, its name at the left"""
    shown = sorted(set(labels))[:rows]
    picks = [[j for j, label in enumerate(labels) if label == c][:columns] for c in shown]
    H, W = images.shape[1:3]
    sheet = Image.new("RGB", (margin + max(map(len, picks)) * (W + 2), len(shown) * (H + 2)), "white")
    draw = ImageDraw.Draw(sheet)
    for r, (c, row) in enumerate(zip(shown, picks)):
        draw.text((4, r * (H + 2) + H // 2 - 6), names[c][:17], fill="black")
        for k, j in enumerate(row):
            sheet.paste(Image.fromarray(images[j]), (margin + k * (W + 2), r * (H + 2)))
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
    p.add_argument("--batch", type=int, default=50, help="images at once (VTP: 50); a shard holds 10000 images")
    p.add_argument("--out", help="folder of the shards; default RUN/latents")
    p.add_argument("--seed", type=int, default=0, help="chooses the 10000 latents that mean and std are measured on")
    p.add_argument("--workers", type=int, default=0, help="processes that read images; 0 reads in this one, 8 feed a GPU")
    p.add_argument("--device", help="cpu, cuda, mps; default: the best one present")
    p.add_argument("--fresh", action="store_true", help="encode anew over the shards that are there")

    p = add("train", "Flow matching on latents: straight lines from noise to data, and a transformer that learns their direction.")
    p.add_argument("latents", help="folder that `dit.py latents` wrote")
    p.add_argument("--out", required=True, help="folder of this run; if it holds a checkpoint, training goes on from it")
    p.add_argument("--size", choices=SIZES, default="B", help="B is the paper's yardstick (Sec. 4.1), XL LightningDiT's; nano is ours, for a CPU")
    p.add_argument("--steps", type=int, default=100_000, help="VTP: 100000 = 80 epochs of ImageNet at batch 1024; nano: a few thousand")
    p.add_argument("--batch", type=int, default=1024, help="latents per step over ALL processes (LightningDiT: 1024); 64 suits a CPU")
    p.add_argument("--lr", type=float, default=2e-4, help="AdamW, constant, betas 0.9, 0.95, no weight decay or clipping (LightningDiT); nano: 2e-3 (ours)")
    p.add_argument("--warmup", type=int, default=0, help="steps of linear warm-up (LightningDiT: 0)")
    p.add_argument("--lognorm-mu", type=float, default=-0.5, help="time draw: VTP -0.5 for its S and B tokenizers, -0.75 for L; LightningDiT 0")
    p.add_argument("--lognorm-sigma", type=float, default=1.25, help="time draw: VTP 1.25 for S and B, 1.0 for L; LightningDiT 1")
    p.add_argument("--label-drop", type=float, default=0.1, help="share of samples whose class is hidden, for guidance (DiT: 0.1)")
    p.add_argument("--ema", type=float, help="decay of the averaged weights (LightningDiT: 0.9999); default, ours: min(0.9999, (1+step)/(10+step))")
    p.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of matrix products; weights stay fp32 (LightningDiT: bf16)")
    p.add_argument("--seed", type=int, default=0, help="with the step number it decides everything (VTP: 0)")
    p.add_argument("--save-every", type=int, default=1000, help="steps between checkpoints (VTP: 20000)")
    p.add_argument("--log-every", type=int, default=50, help="steps between lines of log.jsonl")
    p.add_argument("--workers", type=int, default=0, help="processes that read latents; 0 reads in this one, 4 feed a GPU")
    p.add_argument("--device", help="cpu, cuda, mps; default: the best one present")
    p.add_argument("--fresh", action="store_true", help="start over in --out")

    p = add("sample", "Noise -> latents by Euler steps -> pictures by the tokenizer's decoder. Sample j depends on (seed, j) only.")
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
    p.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the DiT's matrix products; decoding is fp32")
    p.add_argument("--out", help="folder of the pictures; default RUN_DIT/samples")
    p.add_argument("--device", help="cpu, cuda, mps; default: the best one present")

    args = top.parse_args(argv)
    if args.seed < 0:
        top.error(f"--seed {args.seed}: wanted 0 or more")
    return args


def main(argv=None):
    args = parse(argv)
    try:
        {"latents": latents, "train": train, "sample": sample}[args.command](args)
    except (ValueError, FileNotFoundError) as problem:                           # our rooms' sentences to the user
        raise SystemExit(f"dit.py {args.command}: {problem}") from problem
    finally:
        stop()


if __name__ == "__main__":
    main()
