"""The text transformer: token ids of a caption -> one vector.   VTP Sec. 3.4

The architecture is OpenCLIP's: a causal transformer, whose output at the end token represents the
caption. In a causal transformer, later tokens do not influence earlier ones. The padding after the
end token therefore has no effect, and captions are padded only to the longest one of the batch.

The token and position embeddings are in VTPModel, because the official parameter names are
token_embedding and positional_embedding, without a prefix.

B captions    T tokens    W width    H heads of c = W/H channels
"""
import torch
import torch.nn.functional as F
from torch import nn

from . import vit


class CausalAttention(nn.Module):
    """Self-attention with the parameter names of torch.nn.MultiheadAttention.   x (B, T, W)

    The mask is not a buffer: vit.attention makes it from `causal`. (In the official model it is a
    buffer that the files do not contain, and transformers 5 leaves it uninitialised on loading.)
    """
    def __init__(self, W, heads, causal):
        super().__init__()
        self.heads, self.causal = heads, causal
        # the projections to q, k and v in one matrix; TextTransformer initialises it
        self.in_proj_weight = nn.Parameter(torch.empty(3 * W, W))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * W))
        self.out_proj = nn.Linear(W, W)

    def forward(self, x):
        B, T, W = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)              # (B, T, 3W)
        q, k, v = qkv.view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)     # each (B, H, T, c)
        x = vit.attention(q, k, v, self.causal)                                # (B, H, T, c)
        return self.out_proj(x.transpose(1, 2).reshape(B, T, W))


def quick_gelu(x):
    """The approximation of GELU in OpenAI's CLIP, for config.json with text_quick_gelu"""
    return x * torch.sigmoid(1.702 * x)


class TextMlp(nn.Module):
    """x (B, T, W) -> the same shape"""
    def __init__(self, W, ratio, use_quick_gelu):
        super().__init__()
        self.c_fc = nn.Linear(W, int(W * ratio))
        self.c_proj = nn.Linear(int(W * ratio), W)
        self.act = quick_gelu if use_quick_gelu else F.gelu

    def forward(self, x):
        return self.c_proj(self.act(self.c_fc(x)))


class TextBlock(nn.Module):
    """x (B, T, W) -> the same shape: x + attention(norm(x)), then x + mlp(norm(x))

    Attribute names are the official ones, so that released weights load.
    """
    def __init__(self, W, heads, ratio, causal, use_quick_gelu, layer_scale):
        super().__init__()
        self.ln_1 = nn.LayerNorm(W)
        self.attn = CausalAttention(W, heads, causal)
        self.ln_2 = nn.LayerNorm(W)
        self.mlp = TextMlp(W, ratio, use_quick_gelu)
        # LayerScale starts at the value of the config (the official code never initialises it)
        self.ls_1 = vit.LayerScale(W, layer_scale) if layer_scale else nn.Identity()
        self.ls_2 = vit.LayerScale(W, layer_scale) if layer_scale else nn.Identity()

    def forward(self, x):
        x = x + self.ls_1(self.attn(self.ln_1(x)))
        return x + self.ls_2(self.mlp(self.ln_2(x)))


class TextTransformer(nn.Module):
    """Embedded tokens (B, T, W) -> the same shape. VTPModel applies the final norm and the pooling.

    The paper's size is W = 768, depth = 12 (Sec. 4.1).
    """
    def __init__(self, W, depth, heads, ratio=4.0, causal=True, use_quick_gelu=False,
                 layer_scale=None):
        super().__init__()
        blocks = [TextBlock(W, heads, ratio, causal, use_quick_gelu, layer_scale)
                  for _ in range(depth)]
        self.resblocks = nn.ModuleList(blocks)
        # CLIP's initialisation, as in the released training code. (The Hugging Face class of the
        # release overwrites it with a standard deviation of 0.02.) The two layers whose output is
        # added to x start smaller by sqrt(2 * depth), because 2 * depth such outputs are summed.
        # The biases of c_fc and c_proj keep PyTorch's default.
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


POOL_TYPES = "argmax", "first", "last", "none"         # text_pool_type of config.json


def pool(x, text, pool_type):
    """Select the token that represents the caption: x (B, T, W), text (B, T) ids -> (B, W)

    'argmax'   the end token: it has the largest id. If there are several, the first one.
    'first'    the first token
    'last'     the last token, which is padding unless each text fills the context length
    'none'     no selection: all tokens (B, T, W)
    """
    if pool_type == "none":
        return x
    if pool_type == "first":
        return x[:, 0]
    if pool_type == "last":
        return x[:, text.shape[1] - 1]
    # argmax returns the first of equal values, so the position is that of the first end token
    return x[torch.arange(len(x), device=x.device), text.argmax(-1)]
