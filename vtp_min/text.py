"""The text transformer: caption ids -> one vector.   VTP Sec. 3.4; the architecture is OpenCLIP's

Causal, read at the end token: what stands behind it cannot be seen from there, so a caption needs no padding beyond
the longest one of its batch. The token and position tables lie on VTPModel, where the official key names want them.

B captions    T tokens    W width    H heads
"""
import torch
import torch.nn.functional as F
from torch import nn

from .vit import LayerScale, attend


class CausalAttention(nn.Module):
    """Self-attention in the key layout of torch's MultiheadAttention

    No mask lies in memory. (The official tower keeps one as a buffer that no file holds: transformers 5 leaves it uninitialised on loading.)
    """
    def __init__(self, W, heads, causal):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * W, W))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * W))
        self.out_proj = nn.Linear(W, W)

    def forward(self, x):
        B, T, W = x.shape
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = attend(q, k, v, self.causal)
        return self.out_proj(x.transpose(1, 2).reshape(B, T, W))


class TextMlp(nn.Module):
    def __init__(self, W, ratio, quick_gelu):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(W, int(W * ratio)), nn.Linear(int(W * ratio), W)
        self.act = quick_gelu_ if quick_gelu else F.gelu

    def forward(self, x):
        return self.c_proj(self.act(self.c_fc(x)))


def quick_gelu_(x):
    return x * torch.sigmoid(1.702 * x)


class TextBlock(nn.Module):
    def __init__(self, W, heads, ratio, causal, quick_gelu, layer_scale):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(W), CausalAttention(W, heads, causal)
        self.ln_2, self.mlp = nn.LayerNorm(W), TextMlp(W, ratio, quick_gelu)
        # ours start at the config's value; the official text LayerScale starts as whatever lay in memory
        self.ls_1, self.ls_2 = (LayerScale(W, layer_scale) if layer_scale else nn.Identity() for _ in range(2))

    def forward(self, x):
        x = x + self.ls_1(self.attn(self.ln_1(x)))
        return x + self.ls_2(self.mlp(self.ln_2(x)))


class TextTransformer(nn.Module):
    """x (B, T, W) embedded tokens -> the same shape, each token having read those before it"""
    def __init__(self, W, depth, heads, ratio=4.0, causal=True, quick_gelu=False, layer_scale=None):
        super().__init__()
        self.resblocks = nn.ModuleList(TextBlock(W, heads, ratio, causal, quick_gelu, layer_scale) for _ in range(depth))
        for block in self.resblocks:                                 # CLIP's, as the released training code (the HF class overwrites it with 0.02)
            nn.init.normal_(block.attn.in_proj_weight, std=W ** -0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=W ** -0.5 * (2 * depth) ** -0.5)
            nn.init.zeros_(block.attn.out_proj.bias)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * W) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=W ** -0.5 * (2 * depth) ** -0.5)

    def forward(self, x):
        for block in self.resblocks:
            x = block(x)
        return x


POOLS = "argmax", "first", "last", "none"


def pool(x, text, how):
    """(B, T, W) -> (B, W): the token that has read the whole caption.

    'argmax'          the end token, which has the largest id of all (the first one, if the text holds several)
    'first', 'last'   by position: 'last' wants texts of the full context length, since padding is read too
    'none'            all tokens, (B, T, W)
    """
    if how == "none":
        return x
    at = {"argmax": text.argmax(-1), "first": torch.zeros_like(text[:, 0]), "last": torch.full_like(text[:, 0], text.shape[1] - 1)}
    return x[torch.arange(len(x), device=x.device), at[how]]
