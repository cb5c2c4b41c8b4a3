"""The vision transformer: pixels -> tokens.   VTP Sec. 3.1; architecture of DINOv3 ([26] there)

    patch embedding, class token -> depth x (attention, feed-forward) -> norm
    img (B, 3, h*P, w*P) -> class token (B, D), patches (B, N, D)

The file reads top-down: norms, position embedding (RoPE), attention, feed-forward (SwiGLU), block
with stochastic depth, trunk. The pixel decoder is built from the same blocks. Attribute names are
the official ones, so that the released weights load. On a CPU, extras/fast.py replaces rms_norm,
rotate, attention and SwiGLU.forward by faster forms at run time (--set fast=0: it does not).

B images    N = h*w patches    D width    H heads of c = D/H channels    d latent channels
"""
import torch
import torch.nn.functional as F
from torch import nn

from .device import to_fp32


# ---------------------------------------------------------------- norms
def rms_norm(x, weight, eps):
    """x (..., D) / rms(x) * weight (D,). The quotient is computed in float32 and cast back to the
    type of x before it is multiplied by the weight (released code)."""
    y = to_fp32(x)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return y.to(x.dtype) * weight


class RMSNorm(nn.Module):
    def __init__(self, D, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


def layer_norm(eps):
    return lambda D: nn.LayerNorm(D, eps=eps)


NORMS = {"rmsnorm": RMSNorm, "layernorm": layer_norm(1e-6), "layernormbf16": layer_norm(1e-5)}


# ---------------------------------------------------------------- position embedding
class RoPE(nn.Module):
    """Axial rotary position embedding: pairs of channels are rotated by an angle proportional to y
    (the first c/4 pairs) or to x (the others).

    Coordinates run over (-1, 1) for any grid, so a local crop of 7x7 patches spans the same angles
    as a global one. dtype bfloat16 rounds after every operation, as in the training of the
    released models; float32 is ours.
    """
    def __init__(self, c, dtype=torch.float32):
        super().__init__()
        if c % 4:
            raise ValueError(f"a head has {c} channels, but axial RoPE needs a multiple of 4; "
                             f"change the width or the number of heads")
        self.c, self.dtype = c, dtype
        # stored in bfloat16 in every official file
        self.register_buffer("periods", self.compute_periods(torch.bfloat16))

    def compute_periods(self, dtype, device=None):
        """(c/4,) wavelengths, from 1 up to 100 half-grids"""
        exponent = 2 * torch.arange(self.c // 4, device=device, dtype=dtype) / (self.c // 2)
        return 100 ** exponent

    def forward(self, h, w, prefix=0):
        """-> sin, cos (prefix + h*w, c). The first `prefix` rows, for tokens without a position
        such as the class token, have angle 0."""
        device, dtype = self.periods.device, self.dtype
        periods = self.periods
        if dtype != torch.bfloat16:
            periods = self.compute_periods(dtype, device)
        y = (torch.arange(h, device=device, dtype=dtype) + 0.5) / h            # in (0, 1)
        x = (torch.arange(w, device=device, dtype=dtype) + 0.5) / w
        # rows of the image vary slowest, as in the flattened patches
        grid = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1)            # (h, w, 2)
        grid = 2 * grid.flatten(0, 1) - 1                                      # (N, 2) in (-1, 1)
        angle = 2 * torch.pi * grid[:, :, None] / periods                      # (N, 2, c/4)
        angle = angle.flatten(1).tile(2)                                       # (N, c): y, x, y, x
        angle = F.pad(angle, (0, 0, prefix, 0))                                # (prefix + N, c)
        return angle.sin(), angle.cos()


def rotate(x, sin, cos):
    """Rotate each pair (a, b) = channels (i, i + c/2) of x: (a cos - b sin, b cos + a sin)

    x (B, H, N, c); sin, cos (N, c). Computed in the precision of the tables.
    """
    dtype = sin.dtype
    if dtype == torch.float32:
        dtype = torch.promote_types(dtype, x.dtype)                            # float64 stays
    y = x.to(dtype)
    a, b = y.chunk(2, dim=-1)
    rotated = y * cos + torch.cat([-b, a], dim=-1) * sin
    return rotated.to(x.dtype)


# ---------------------------------------------------------------- attention
def attention(q, k, v, causal=False):
    """softmax(q k' / sqrt(c)) v, each (B, H, N, c). causal: a token sees no later ones."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


class Attention(nn.Module):
    """Multi-head self-attention. QKNorm bounds its logits, for stability (VTP Sec. 4.1)."""
    def __init__(self, D, heads, qk_norm):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(D, 3 * D)
        self.proj = nn.Linear(D, D)
        self.q_norm = RMSNorm(D // heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D // heads) if qk_norm else nn.Identity()

    def forward(self, x, rope):
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                   # each (B, H, N, c)
        q = rotate(self.q_norm(q), *rope)
        k = rotate(self.k_norm(k), *rope)
        # under autocast v is bfloat16, while QKNorm's weight has made q and k float32
        x = attention(q.to(v.dtype), k.to(v.dtype), v)                         # (B, H, N, c)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


# ---------------------------------------------------------------- feed-forward
class SwiGLU(nn.Module):
    """w3( silu(w1 x) * w2 x ). The hidden width is 2/3 of an MLP's, rounded up to a multiple of
    `align`, so that it has about as many parameters."""
    def __init__(self, D, ratio, align):
        super().__init__()
        hidden = int(int(D * ratio) * 2 / 3)     # three matrices in place of two
        hidden = (hidden + align - 1) // align * align
        self.w1 = nn.Linear(D, hidden)
        self.w2 = nn.Linear(D, hidden)
        self.w3 = nn.Linear(hidden, D)

    def forward(self, x):
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class Mlp(nn.Module):
    def __init__(self, D, ratio):
        super().__init__()
        self.fc1 = nn.Linear(D, int(D * ratio))
        self.fc2 = nn.Linear(int(D * ratio), D)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


def swiglu(align):
    return lambda D, ratio: SwiGLU(D, ratio, align)


FFNS = {"mlp": Mlp, "swiglu": swiglu(8), "swiglu32": swiglu(32), "swiglu64": swiglu(64),
        "swiglu128": swiglu(128)}


# ---------------------------------------------------------------- block
class LayerScale(nn.Module):
    def __init__(self, D, init):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((D,), float(init)))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))"""
    def __init__(self, D, heads, ratio, ffn, norm, qk_norm, layer_scale):
        super().__init__()
        self.norm1 = NORMS[norm](D)
        self.attn = Attention(D, heads, qk_norm)
        self.ls1 = LayerScale(D, layer_scale) if layer_scale else nn.Identity()
        self.norm2 = NORMS[norm](D)
        self.mlp = FFNS[ffn](D, ratio)
        self.ls2 = LayerScale(D, layer_scale) if layer_scale else nn.Identity()

    # A branch is everything that is added to the residual stream at once, so that stochastic
    # depth can leave it out.
    def attention_branch(self, x, rope):
        return self.ls1(self.attn(self.norm1(x), rope))

    def mlp_branch(self, x):
        return self.ls2(self.mlp(self.norm2(x)))

    def forward(self, x, rope, keep=(None, None)):
        """x (B, N, D) -> the same. keep: for each branch (rows, scale), or None for all rows"""
        x = residual(x, self.attention_branch, keep[0], rope)
        return residual(x, self.mlp_branch, keep[1])


def residual(x, branch, keep, *more):
    """x + branch(x, *more). With stochastic depth, the branch is computed for the kept rows of the
    batch only, and scaled so that its expectation is unchanged (DINOv2).

    keep  (rows (n,), scale), or None for all rows; drawn by augment.kept_rows
    """
    if keep is None:
        return x + branch(x, *more)
    rows, scale = keep
    # index_add adds row i of the branch to row rows[i] of x; the other rows stay as they are
    return x.index_add(0, rows, branch(x[rows], *more).to(x.dtype), alpha=scale)


# ---------------------------------------------------------------- trunk
class PatchEmbed(nn.Module):
    def __init__(self, D, patch):
        super().__init__()
        self.proj = nn.Conv2d(3, D, patch, patch)

    def forward(self, img):
        return self.proj(img)                                                  # (B, D, h, w)


class VisionTransformer(nn.Module):
    """img (B, 3, h*P, w*P) -> class token (B, D), patches (B, N, D)"""
    def __init__(self, D, depth, heads, patch, ratio=4.0, ffn="swiglu", norm="rmsnorm",
                 qk_norm=True, layer_scale=None, latent_dim=64, rope_dtype=torch.float32):
        super().__init__()
        self.patch_embed = PatchEmbed(D, patch)
        self.cls_token = nn.Parameter(torch.empty(1, 1, D))
        self.mask_token = nn.Parameter(torch.empty(1, D))
        self.rope_embed = RoPE(D // heads, rope_dtype)
        blocks = [Block(D, heads, ratio, ffn, norm, qk_norm, layer_scale) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = NORMS[norm](D)
        # The bottleneck: D -> d, without bias, after the final norm. Its output is all that the
        # decoder and the DiT see. d = D has no bottleneck (released code).
        self.feature_bottleneck = nn.Identity()
        if latent_dim not in (None, D):
            self.feature_bottleneck = nn.Linear(D, latent_dim, bias=False)
        self.apply(init_linear)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.zeros_(self.mask_token)

    def layers(self, img, mask=None, keep=None):
        """Yields the tokens (B, 1+N, D) after each block, before the final norm.

        mask  (B, N) bool, True: the embedding of the patch is replaced by the mask token (iBOT)
        keep  for each block, what its two branches keep (stochastic depth); None: everything
        """
        x = self.patch_embed(img)                                              # (B, D, h, w)
        h, w = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)                                       # (B, N, D)
        if mask is not None:
            x = torch.where(mask[..., None], self.mask_token, x)
        # Under autocast the patches are bfloat16 and the class token is float32. torch.cat returns
        # float32, so the residual stream stays float32.
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)       # (B, 1+N, D)
        rope = self.rope_embed(h, w, prefix=1)
        for i, block in enumerate(self.blocks):
            x = block(x, rope, keep[i]) if keep else block(x, rope)
            yield x

    def forward(self, img, mask=None, keep=None):
        """-> class token (B, D), patches (B, N, D), after the final norm, before the bottleneck"""
        for x in self.layers(img, mask, keep):
            pass                                                               # keep the last only
        x = self.norm(x)
        return x[:, 0], x[:, 1:]


def init_linear(m):
    """Truncated normal 0.02 and zero bias (released code). Convolutions keep PyTorch's default."""
    if isinstance(m, nn.Linear):
        nn.init.trunc_normal_(m.weight, std=0.02)
        if m.bias is not None:
            nn.init.zeros_(m.bias)
