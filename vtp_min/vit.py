"""The vision transformer: pixels -> tokens.   VTP Sec. 3.1; its architecture is that of DINOv3 ([26] in the paper)

    patchify -> [class token, patches] -> depth x (attention + feed-forward) -> norm -> class token (B, D), patches (B, N, D)

Reads top-down: norms, where a patch stands (RoPE), what looks at what (attention), what is thought about it (SwiGLU),
a block, which samples a block skips (stochastic depth), the trunk. The pixel decoder is built from the same blocks.
Attribute names are the official ones, so that the released weights load.

B images    N = h*w patches    D width    H heads of c = D/H channels    d latent channels
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


# ---------------------------------------------------------------- norms
class RMSNorm(nn.Module):
    """x / rms(x) * weight, the quotient taken in float32 and cast back before the weight (released code)"""
    def __init__(self, D, eps=1e-5):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(D)), eps

    def forward(self, x):
        return Normed.apply(x, self.weight, self.eps)


class Normed(torch.autograd.Function):
    """n w with n = x / rms(x). By hand, as torch would keep every step: dx = (g w - n mean(g w n)) / rms, dw = sum(g n). 2.6 x as fast"""
    @staticmethod
    def forward(ctx, x, w, eps):
        wide = x.double() if x.dtype == torch.float64 else x.float()
        shrink = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        n = (wide * shrink).to(x.dtype)
        ctx.save_for_backward(n, shrink, w)
        return n * w

    @staticmethod
    def backward(ctx, g):
        n, shrink, w = ctx.saved_tensors
        gn = g * n
        along = (gn @ w)[..., None] / n.shape[-1]                                   # mean(g w n): the share along n, which a longer x does not change
        return ((g * w).addcmul_(n, along, value=-1).mul_(shrink).to(n.dtype)), gn.flatten(0, -2).sum(0), None


NORMS = {"rmsnorm": RMSNorm,                                         # eps 1e-5
         "layernorm": lambda D: nn.LayerNorm(D, eps=1e-6),
         "layernormbf16": lambda D: nn.LayerNorm(D, eps=1e-5)}


# ---------------------------------------------------------------- where a patch stands
class RoPE(nn.Module):
    """Axial rotary position embedding: pairs of channels turn by an angle that grows with y, or with x.

    Coordinates run over (-1, 1) whatever the grid, so a local crop of 6x6 patches spans the same angles as a global one.
    dtype bfloat16 rounds after every operation, as the released models were trained; float32 is exact and ours.
    """
    def __init__(self, c, dtype=torch.float32):
        super().__init__()
        if c % 4:
            raise ValueError(f"a head is {c} channels wide, but axial RoPE needs a multiple of 4; change the width or the heads")
        self.c, self.dtype = c, dtype
        self.register_buffer("periods", self.periods_in(torch.bfloat16))       # bfloat16 in every official file

    def periods_in(self, dtype, device=None):
        """(c/4,) wavelengths from 1 up to 100 half-grids"""
        return 100 ** (2 * torch.arange(self.c // 4, device=device, dtype=dtype) / (self.c // 2))

    def forward(self, h, w, prefix=0):
        """-> sin, cos (prefix + h*w, c). The prefix rows (a class token stands nowhere) have angle zero: they are not turned."""
        device, dtype = self.periods.device, self.dtype
        periods = self.periods.to(dtype) if dtype == torch.bfloat16 else self.periods_in(dtype, device)
        y, x = ((torch.arange(n, device=device, dtype=dtype) + 0.5) / n for n in (h, w))           # patch centres in (0, 1)
        grid = 2 * torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flatten(0, 1) - 1           # (N, 2) in (-1, 1)
        angle = (2 * torch.pi * grid[:, :, None] / periods).flatten(1).tile(2)                      # (N, c): y, x, y, x
        angle = F.pad(angle, (0, 0, prefix, 0))
        return angle.sin(), angle.cos()


def rotate(x, sin, cos):
    """Turn each pair (a, b) = channels (i, i + c/2) of x (B, H, N, c) by its angle, in the precision of the tables: a cos - b sin, b cos + a sin."""
    dtype = torch.promote_types(sin.dtype, x.dtype) if sin.dtype == torch.float32 else sin.dtype
    half = sin.shape[-1] // 2
    turned = x.to(dtype) * cos
    turned += x.to(dtype).roll(half, -1).mul_(torch.cat([-sin[..., :half], sin[..., half:]], -1))        # (b, a)
    return turned.to(x.dtype)


# ---------------------------------------------------------------- what looks at what
def attend(q, k, v, causal=False):
    """softmax(q k' / sqrt c) v, each (B, H, N, c). causal: a token sees itself and those before it"""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)                        # written out: 6 x faster in bfloat16 than torch's kernel for CPUs
    if causal:
        logits = logits.masked_fill(torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return logits.softmax(-1, dtype=v.dtype) @ v


class Attention(nn.Module):
    """Multi-head self-attention; QKNorm [13 in the paper] bounds its logits: stability (VTP Sec. 4.1)"""
    def __init__(self, D, heads, qk_norm):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.q_norm, self.k_norm = (RMSNorm(D // heads) if qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x, rope):
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)      # each (B, H, N, c); B may be 0
        q, k = rotate(self.q_norm(q), *rope), rotate(self.k_norm(k), *rope)
        x = attend(q.to(v.dtype), k.to(v.dtype), v)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


# ---------------------------------------------------------------- what is thought about it
class SwiGLU(nn.Module):
    """w3( silu(w1 x) * w2 x ). Two thirds of the usual hidden width, rounded up: as many parameters as a plain MLP."""
    def __init__(self, D, ratio, align):
        super().__init__()
        hidden = -(-int(int(D * ratio) * 2 / 3) // align) * align
        self.w1, self.w2, self.w3 = nn.Linear(D, hidden), nn.Linear(D, hidden), nn.Linear(hidden, D)

    def forward(self, x):
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))                       # cast once, not for w1 and again for w2
        return self.w3(Gated.apply(self.w1(x), self.w2(x)))


class Gated(torch.autograd.Function):
    """silu(a) b, which keeps a and b alone: a tenth of a block's memory less"""
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return F.silu(a) * b

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        return torch.ops.aten.silu_backward(g * b, a), g * F.silu(a)


class Mlp(nn.Module):
    def __init__(self, D, ratio):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D, int(D * ratio)), nn.Linear(int(D * ratio), D)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


FFNS = {"mlp": Mlp,
        "swiglu": lambda D, ratio: SwiGLU(D, ratio, 8),
        "swiglu32": lambda D, ratio: SwiGLU(D, ratio, 32),
        "swiglu64": lambda D, ratio: SwiGLU(D, ratio, 64),
        "swiglu128": lambda D, ratio: SwiGLU(D, ratio, 128)}


# ---------------------------------------------------------------- a block
class LayerScale(nn.Module):
    def __init__(self, D, init):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((D,), float(init)))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """x + attention(norm x), then x + feed-forward(norm x)"""
    def __init__(self, D, heads, ratio, ffn, norm, qk_norm, layer_scale):
        super().__init__()
        self.norm1, self.attn = NORMS[norm](D), Attention(D, heads, qk_norm)
        self.norm2, self.mlp = NORMS[norm](D), FFNS[ffn](D, ratio)
        self.ls1, self.ls2 = (LayerScale(D, layer_scale) if layer_scale else nn.Identity() for _ in range(2))

    def forward(self, x, rope, kept=(None, None), read=None):
        """x (B, N, D) -> the same

        kept  for each branch (rows that it is computed for, scale), or None: all      read  (B, N) bool -> these tokens alone, one after another (R, D)
        """
        first, second = kept
        x = residual(x, lambda x: self.ls1(self.attn(self.norm1(x), rope)), first)
        if read is not None:
            x = x[read]                                                                 # (R, D)
            if second:                                                                  # samples -> places of their tokens in this list
                second = torch.isin(read.nonzero()[:, 0], second[0].to(x.device)).nonzero()[:, 0], second[1]
        return residual(x, lambda x: self.ls2(self.mlp(self.norm2(x))), second)


def residual(x, branch, kept):
    """x + branch(x); with stochastic depth the branch runs on the kept rows only, scaled up so that its mean stays."""
    if kept is None:
        return x + branch(x)
    rows, scale = kept[0].to(x.device), kept[1]
    return x.index_add(0, rows, branch(x[rows]).to(x.dtype), alpha=scale)


class StochasticDepth:
    """Which samples a residual branch is computed for: a fixed share of the whole batch (DINOv2), drawn anew per branch.

    The draw follows from `key` = (seed, step, objective), block and branch alone and is made over the GLOBAL batch: any
    number of processes or micro-batches, and any recomputation, keeps the same samples.
    rate  share dropped      rows  the numbers of this process's samples among the `total` of the global batch
    """
    def __init__(self, rate, rows, total, *key):
        self.keep, self.rows, self.total, self.key = max(int(total * (1 - rate)), 1), np.asarray(rows), total, key

    def __call__(self, block):
        """-> for attention and feed-forward of this block: (rows of this process's batch, scale)"""
        return [self.draw(block, branch) for branch in range(2)]

    def draw(self, block, branch):
        kept = np.zeros(self.total, bool)
        kept[np.random.default_rng((*self.key, block, branch)).permutation(self.total)[:self.keep]] = True
        return torch.from_numpy(kept[self.rows].nonzero()[0]), self.total / self.keep


# ---------------------------------------------------------------- the trunk
class PatchEmbed(nn.Module):
    def __init__(self, D, patch):
        super().__init__()
        self.proj = nn.Conv2d(3, D, patch, patch)

    def forward(self, img):
        return self.proj(img)                            # (B, D, h, w)


class VisionTransformer(nn.Module):
    """img (B, 3, h*P, w*P) -> class token (B, D), patches (B, h*w, D)"""
    def __init__(self, D, depth, heads, patch, ratio=4.0, ffn="swiglu", norm="rmsnorm", qk_norm=True, layer_scale=None,
                 latent_dim=64, rope_dtype=torch.float32):
        super().__init__()
        self.patch_embed = PatchEmbed(D, patch)
        self.cls_token = nn.Parameter(torch.empty(1, 1, D))
        self.mask_token = nn.Parameter(torch.empty(1, D))
        self.rope_embed = RoPE(D // heads, rope_dtype)
        self.blocks = nn.ModuleList(Block(D, heads, ratio, ffn, norm, qk_norm, layer_scale) for _ in range(depth))
        self.norm = NORMS[norm](D)
        # all that the decoder, and later the DiT, ever see: D -> d, no bias, after the final norm. d = D needs none (released code)
        self.feature_bottleneck = nn.Linear(D, latent_dim, bias=False) if latent_dim not in (None, D) else nn.Identity()
        self.apply(init_linear)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.zeros_(self.mask_token)

    def layers(self, img, mask=None, drop=None, read=None):
        """Yields the tokens (B, 1+N, D) after every block, before the final norm; after the last one (R, D) if `read`.

        mask  (B, N) True = the patch is hidden (iBOT): its embedding is replaced by a learned token
        drop  a StochasticDepth, or any function of a block's number that gives what its two branches keep
        read  (B, 1+N) bool: of the last block's tokens only these
        """
        x = self.patch_embed(img)                                                       # (B, D, h, w)
        h, w = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)                                                # (B, N, D)
        if mask is not None:
            x = torch.where(mask[..., None], self.mask_token, x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)                    # (B, 1+N, D)   float32 under autocast too
        rope = self.rope_embed(h, w, prefix=1)
        for i, block in enumerate(self.blocks):
            x = block(x, rope, drop(i) if drop else (None, None), read if block is self.blocks[-1] else None)
            yield x

    def forward(self, img, mask=None, drop=None, read=None):
        """-> class token (B, D), patches (B, N, D), after the final norm and before the bottleneck

        read  (B, N) bool -> these patches alone, in order (R, D). Training reads few: the last feed-forward, which thinks about each token by
              itself, and the norm are spared the others. A tenth of a nano step at 64 px; less the deeper a trunk is.
        """
        asked = None if read is None else F.pad(read, (1, 0), value=True)               # (B, 1+N)   class tokens always
        for x in self.layers(img, mask, drop, asked):                                   # the last one; a list would hold them all
            pass
        x = self.norm(x)
        if read is None:
            return x[:, 0], x[:, 1:]
        place = asked.nonzero()[:, 1]                                                   # (B+R,)
        return x[place == 0], x[place > 0]


def init_linear(m):
    """trunc-normal 0.02, zero bias (released code); convolutions keep torch's default"""
    if isinstance(m, nn.Linear):
        nn.init.trunc_normal_(m.weight, std=0.02)
        if m.bias is not None:
            nn.init.zeros_(m.bias)
