"""LightningDiT: the transformer that knows, at every point between noise and latent, which way the data lies.   Yao et al. 2025

    xt (B, C, H, W), t (B,), y (B,) --> v (B, C, H, W)        velocity at the noisy latent xt, time t, class y

It is DiT (Peebles & Xie 2023) with rotary positions, RMSNorm and SwiGLU. Reads top-down: where a token stands (table and rotary), what
looks at what (attention), what is thought about it (SwiGLU), how the condition steers a block (adaLN-Zero), the whole, guidance.
Field names, state-dict keys and initialisation are LightningDiT's, so that its weights load. VTP Sec. 4.1 measures its tokenizers with B.

B batch    C latent channels    H = W latent side    p patch    N = (H/p)^2 tokens    D width    h = D/heads    c condition (B, D)
"""
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .vit import RMSNorm, attend

SIZES = {"pico": dict(hidden_size=192, depth=4, num_heads=3),         # pico and nano are ours, for a CPU
         "nano": dict(hidden_size=192, depth=6, num_heads=3),
         "B":    dict(hidden_size=768, depth=12, num_heads=12),       # LightningDiT-B/1, the paper's yardstick (Sec. 4.1)
         "L":    dict(hidden_size=1024, depth=24, num_heads=16),      # DiT-L with patch 1
         "XL":   dict(hidden_size=1152, depth=28, num_heads=16),      # LightningDiT-XL/1, of VTP's released configs
         "1p0B": dict(hidden_size=1536, depth=24, num_heads=24)}      # LightningDiT-1p0B/1


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
        """x (B, heads, N, h): (a, b) -> (a cos - b sin, b cos + a sin) in each pair, which is (a + bi) times (cos + i sin)"""
        turn = torch.complex(self.freqs_cos[:, ::2], self.freqs_sin[:, ::2])                          # (N, h/2)
        pairs = torch.view_as_complex(x.to(self.freqs_cos.dtype).unflatten(-1, (-1, 2)))              # 12 % of a nano step, against real products
        return torch.view_as_real(pairs * turn).flatten(-2)


class Attention(nn.Module):
    def __init__(self, width, heads, qknorm):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = (RMSNorm(width // heads, eps=1e-6) if qknorm else nn.Identity() for _ in "qk")
        self.proj = nn.Linear(width, width)

    def forward(self, x, rope):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)     # 3 x (B, heads, N, h)
        out = attend(rope(self.q_norm(q)).type_as(v), rope(self.k_norm(k)).type_as(v), v)
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
    angle = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
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
        p, side, recompute = self.patch_size, self.input_size // self.patch_size, self.use_checkpoint and self.training
        x = self.x_embedder["proj"](x).flatten(2).transpose(1, 2).contiguous()             # channels side by side: 7 % of a nano step
        x = x + self.pos_embed                                                             # (B, N, D)
        c = self.t_embedder["mlp"](waves(t)) + self.y_embedder["embedding_table"](y)       # (B, D)
        for block in self.blocks:
            x = block(x, c, self.feat_rope) if not recompute else checkpoint(block, x, c, self.feat_rope, use_reentrant=False)
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
