"""The vision transformer: pixels -> tokens.   VTP Sec. 3.1, 4.1

    patch embedding, class token -> depth x (attention, feed-forward) -> norm
    img (B, 3, h*P, w*P) -> class token (B, D), patches (B, N, D)

The architecture follows DINOv3 (reference [26] of VTP): axial RoPE, SwiGLU. VTP adds QKNorm; its
released models have RMSNorm, and neither register tokens nor LayerScale.

The file begins with the small parts: norms, position embedding (RoPE), attention, feed-forward
(SwiGLU), block with stochastic depth; the trunk comes last. The pixel decoder is built from the
same blocks. Attribute names are the official ones, so that the released weights load.

On a CPU, train.py replaces rms_norm, rotate, attention and SwiGLU.forward with the faster forms of
extras/fast.py, which are equal up to rounding (--set fast=0 switches this off).

B images    P patch side in pixels    N = h*w patches    L tokens, usually 1 + N    D width
H heads of c = D/H channels    d latent channels
"""
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from .device import to_fp32


# ---------------------------------------------------------------- norms
def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight, over the channels.   x (..., D), weight (D,)

    The quotient is computed in float32 and cast back to the type of x before it is multiplied by
    the weight (released code).
    """
    x32 = to_fp32(x)
    x_hat = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return x_hat.to(x.dtype) * weight


class RMSNorm(nn.Module):
    def __init__(self, D, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


# the official names; the two layer norms differ only in eps, despite their names
NORMS = {"rmsnorm": RMSNorm, "layernorm": partial(nn.LayerNorm, eps=1e-6),
         "layernormbf16": partial(nn.LayerNorm, eps=1e-5)}


# ---------------------------------------------------------------- position embedding
class RoPE(nn.Module):
    """Axial rotary position embedding (DINOv3). Channels i and i + c/2 of a query or key are a
    pair, which is rotated by an angle: proportional to y for the first c/4 pairs, to x for the
    others, each pair with its own period.

    Coordinates run over (-1, 1) for any grid, so a local crop with fewer patches spans about the
    same angles as a global crop. (DINOv3 also shifts and scales them at random in training.)
    dtype is the precision of the angles. The released models were trained with bfloat16, which
    rounds after every operation; ours are trained with float32.
    """
    def __init__(self, c, dtype=torch.float32):
        super().__init__()
        if c % 4:
            raise ValueError(f"a head has {c} channels, but axial RoPE needs a multiple of 4; "
                             f"change the width or the number of heads")
        self.c, self.dtype = c, dtype
        # The buffer exists because official files contain it, in bfloat16. With dtype float32,
        # forward() computes exact periods instead.
        self.register_buffer("periods", self.compute_periods(torch.bfloat16))

    def compute_periods(self, dtype, device=None):
        """(c/4,) periods from 1 to 100^(1 - 4/c), which is 75 for c = 64, on a scale where the side
        of the image is 2. The base 100 is DINOv3's."""
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

    x (B, H, L, c); sin, cos (L, c). Computed in the precision of sin and cos.
    """
    dtype = sin.dtype
    if dtype == torch.float32:
        dtype = torch.promote_types(dtype, x.dtype)                            # float64 for float64
    ab = x.to(dtype)
    a, b = ab.chunk(2, dim=-1)
    rotated = ab * cos + torch.cat([-b, a], dim=-1) * sin
    return rotated.to(x.dtype)


# ---------------------------------------------------------------- attention
def attention(q, k, v, causal=False):
    """softmax(q k^T / sqrt(c)) v, each (B, H, L, c). causal (text): no token sees a later one."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


class Attention(nn.Module):
    """Multi-head self-attention. QKNorm, an RMSNorm of each query and key, bounds the attention
    logits, for stability (VTP Sec. 4.1)."""
    def __init__(self, D, heads, qk_norm):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(D, 3 * D)
        self.proj = nn.Linear(D, D)
        self.q_norm = RMSNorm(D // heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D // heads) if qk_norm else nn.Identity()

    def forward(self, x, rope):
        """x (B, L, D), rope: sin and cos (L, c) -> (B, L, D)"""
        B, L, D = x.shape
        qkv = self.qkv(x).view(B, L, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                   # each (B, H, L, c)
        q = rotate(self.q_norm(q), *rope)
        k = rotate(self.k_norm(k), *rope)
        # Under autocast v has 16 bits, but q and k are float32: QKNorm multiplies by its float32
        # weight.
        x = attention(q.to(v.dtype), k.to(v.dtype), v)                         # (B, H, L, c)
        return self.proj(x.transpose(1, 2).reshape(B, L, D))


# ---------------------------------------------------------------- feed-forward
class SwiGLU(nn.Module):
    """w3(silu(w1 x) * (w2 x)). It has three matrices, where an MLP has two. So its hidden width is
    2/3 of an MLP's, for the same number of parameters, rounded up to a multiple of `align`."""
    def __init__(self, D, ratio, align):
        super().__init__()
        hidden = int(int(D * ratio) * 2 / 3)
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


# the official names
FFNS = {"mlp": Mlp, "swiglu": partial(SwiGLU, align=8), "swiglu32": partial(SwiGLU, align=32),
        "swiglu64": partial(SwiGLU, align=64), "swiglu128": partial(SwiGLU, align=128)}


# ---------------------------------------------------------------- block
class LayerScale(nn.Module):
    """Multiplies each channel of a branch by a learned factor, small at first (CaiT)"""
    def __init__(self, D, init):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((D,), float(init)))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). With layer_scale, LayerScale follows each."""
    def __init__(self, D, heads, ratio, ffn, norm, qk_norm, layer_scale):
        super().__init__()
        self.norm1 = NORMS[norm](D)
        self.attn = Attention(D, heads, qk_norm)
        self.ls1 = LayerScale(D, layer_scale) if layer_scale else nn.Identity()
        self.norm2 = NORMS[norm](D)
        self.mlp = FFNS[ffn](D, ratio)
        self.ls2 = LayerScale(D, layer_scale) if layer_scale else nn.Identity()

    # The two residual branches. Stochastic depth skips one for some images.
    def attention_branch(self, x, rope):
        return self.ls1(self.attn(self.norm1(x), rope))

    def mlp_branch(self, x):
        return self.ls2(self.mlp(self.norm2(x)))

    def forward(self, x, rope, keep=(None, None)):
        """x (B, L, D) -> the same shape. keep: one entry per branch, see residual"""
        x = residual(x, self.attention_branch, keep[0], rope)
        return residual(x, self.mlp_branch, keep[1])


def residual(x, branch, keep, *args):
    """x + branch(x, *args). With stochastic depth, the branch is computed for some images of the
    batch only, and scaled so that its expectation is unchanged (DINOv2).

    keep  (indices (n,) of the images, scale), drawn by augment.kept_rows; None: all images
    """
    if keep is None:
        return x + branch(x, *args)
    rows, scale = keep
    # x.index_select(0, rows) is x[rows]; its backward pass needs no sorting of the rows. index_add
    # adds image i of the branch to image rows[i] of x; the other images stay unchanged.
    return x.index_add(0, rows, branch(x.index_select(0, rows), *args).to(x.dtype), alpha=scale)


# ---------------------------------------------------------------- trunk
class PatchEmbed(nn.Module):
    """The same linear map for every patch, written as a convolution (ViT)"""
    def __init__(self, D, patch):
        super().__init__()
        self.proj = nn.Conv2d(3, D, patch, patch)

    def forward(self, img):
        return self.proj(img)                                                  # (B, D, h, w)


class VisionTransformer(nn.Module):
    """The trunk: img (B, 3, h*P, w*P) -> class token (B, D), patches (B, N, D)"""
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
        # decoder and the diffusion transformer see. forward() does not apply it, because CLIP and
        # DINO read the full width by default. With d = D there is none (released code).
        self.feature_bottleneck = nn.Identity()
        if latent_dim not in (None, D):
            self.feature_bottleneck = nn.Linear(D, latent_dim, bias=False)
        self.apply(init_linear)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.zeros_(self.mask_token)                                        # as in DINOv2

    def forward(self, img, mask=None, keep=None):
        """-> class token (B, D), patches (B, N, D), after the final norm, before the bottleneck

        mask  (B, N) bool, True: the embedding of the patch is replaced by the mask token (iBOT)
        keep  stochastic depth, one entry per block, see Block.forward; None: no stochastic depth
        """
        x, rope = self.embed(img, mask)
        for i, block in enumerate(self.blocks):
            x = block(x, rope, keep[i]) if keep else block(x, rope)
        x = self.norm(x)
        return x[:, 0], x[:, 1:]

    def embed(self, img, mask=None):
        """-> tokens before the first block (B, 1+N, D), rope"""
        x = self.patch_embed(img)                                              # (B, D, h, w)
        h, w = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)                                       # (B, N, D)
        if mask is not None:
            x = torch.where(mask[..., None], self.mask_token, x)
        # Under autocast the patches have 16 bits (without a mask), the class token is float32.
        # torch.cat returns float32, and so do all blocks after it.
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)       # (B, 1+N, D)
        return x, self.rope_embed(h, w, prefix=1)

    def layers(self, img, mask=None):
        """Yields the tokens (B, 1+N, D) after each block, before the final norm"""
        x, rope = self.embed(img, mask)
        for block in self.blocks:
            x = block(x, rope)
            yield x


def init_linear(m):
    """Normal with standard deviation 0.02, zero bias (released code). trunc_normal_ cuts at +-2,
    which is 100 standard deviations. Other layers keep PyTorch's default initialisation."""
    if isinstance(m, nn.Linear):
        nn.init.trunc_normal_(m.weight, std=0.02)
        if m.bias is not None:
            nn.init.zeros_(m.bias)
