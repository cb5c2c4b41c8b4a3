"""The text transformer: token ids of a caption -> one vector.   VTP Sec. 3.4

The architecture is OpenCLIP's. The transformer is causal and read at the end token. Tokens behind
it have no influence, so captions are padded only to the longest one of the batch. The embedding
tables belong to VTPModel, where the official key names want them.

B captions    T tokens    W width    H heads
"""
import torch
import torch.nn.functional as F
from torch import nn

from . import vit


class CausalAttention(nn.Module):
    """Self-attention with the parameter names of torch's MultiheadAttention

    There is no buffer for the mask. (The official model has one that no file holds: transformers 5
    leaves it uninitialised on loading.)
    """
    def __init__(self, W, heads, causal):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * W, W))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * W))
        self.out_proj = nn.Linear(W, W)

    def forward(self, x):
        B, T, W = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)     # each (B, H, T, c)
        x = vit.attention(q, k, v, self.causal)
        return self.out_proj(x.transpose(1, 2).reshape(B, T, W))


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


class TextMlp(nn.Module):
    def __init__(self, W, ratio, use_quick_gelu):
        super().__init__()
        self.c_fc = nn.Linear(W, int(W * ratio))
        self.c_proj = nn.Linear(int(W * ratio), W)
        self.act = quick_gelu if use_quick_gelu else F.gelu

    def forward(self, x):
        return self.c_proj(self.act(self.c_fc(x)))


class TextBlock(nn.Module):
    def __init__(self, W, heads, ratio, causal, use_quick_gelu, layer_scale):
        super().__init__()
        self.ln_1 = nn.LayerNorm(W)
        self.attn = CausalAttention(W, heads, causal)
        self.ln_2 = nn.LayerNorm(W)
        self.mlp = TextMlp(W, ratio, use_quick_gelu)
        # ours start at the value of the config; the official ones start as uninitialised memory
        self.ls_1 = vit.LayerScale(W, layer_scale) if layer_scale else nn.Identity()
        self.ls_2 = vit.LayerScale(W, layer_scale) if layer_scale else nn.Identity()

    def forward(self, x):
        x = x + self.ls_1(self.attn(self.ln_1(x)))
        return x + self.ls_2(self.mlp(self.ln_2(x)))


class TextTransformer(nn.Module):
    """x (B, T, W) embedded tokens -> the same shape"""
    def __init__(self, W, depth, heads, ratio=4.0, causal=True, use_quick_gelu=False,
                 layer_scale=None):
        super().__init__()
        blocks = [TextBlock(W, heads, ratio, causal, use_quick_gelu, layer_scale)
                  for _ in range(depth)]
        self.resblocks = nn.ModuleList(blocks)
        # CLIP's initialisation, as in the released training code (its HF class overwrites it
        # with 0.02)
        for block in self.resblocks:
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
    """The token that represents the caption: x (B, T, W), text (B, T) -> (B, W)

    'argmax'          the end token, which has the largest id (the first one, if there are several)
    'first', 'last'   by position; 'last' needs texts of the full context length: it reads padding
    'none'            all tokens, (B, T, W)
    """
    if how == "none":
        return x
    if how == "first":
        return x[:, 0]
    if how == "last":
        return x[:, text.shape[1] - 1]
    return x[torch.arange(len(x), device=x.device), text.argmax(-1)]
