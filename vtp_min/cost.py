"""What a model costs: parameters and arithmetic of each part, beside the paper's and the released code's.   VTP Table 1

parts, official      parameters of a model; those of the released code at the same widths and depths; `describe` puts them side by side
tensors              tensors in a model's file; `describe` compares them with the released L's
flops, costs         multiply-adds of one image, 2 each, in matrix products and convolutions; `table` shows them
paper_says           Table 1's row, and what is known about the difference

Give a model on the meta device and nothing is computed: meta tensors have shapes and no values, so L is counted in a second.
"""
from dataclasses import replace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .model import DINOHead, VTPModel

# Millions, counted by running the released code at patch 16, d 64, SwiGLU, trunk RMSNorm, decoder LayerNorm, no QKNorm.   {part: {(width, depth): M}}
# Which sizes the released checkpoints really have, only their config.json says: beyond L's width of 1024 these are the usual sizes, not known ones.
OFFICIAL = {"trunk": {(384, 12): 21.612, (768, 12): 85.690, (1024, 24): 303.543},
            "decoder": {(384, 12): 21.621, (768, 12): 85.709, (1024, 24): 303.591, (1024, 4): 51.31},
            "text transformer": {(512, 12): 37.83, (768, 12): 85.05, (1024, 24): 302.3},
            "text tower": {(512, 12): 63.43, (768, 12): 123.65, (1024, 24): 354.0}}
# Tensors in the released L's file, as stated by a public port of the released L checkpoint.
# VTPConfig's defaults give the same numbers at L's widths and depths: SwiGLU, no QKNorm,
# RMSNorm in the trunk, LayerNorm in the decoder, 12 layers in the text tower.
RELEASED_L = {"trunk": 295, "decoder": 343, "text and CLIP": 151, "all": 789}
TABLE_1 = {(768, 12): (171.2, 87.7), (1024, 24): (607.2, 311.1)}                  # trunk's width, depth: M parameters, GFLOPs of encoder + decoder


def count(*modules):
    return sum(p.numel() for m in modules for p in ([m] if torch.is_tensor(m) else m.parameters()))


def parts(model):
    """-> {part: parameters}. The trunk includes the bottleneck, the text tower its embeddings, last norm and projection."""
    if not hasattr(model, "trunk"):                                       # a baseline
        return {"encoder": count(model.encoder), "decoder": count(model.decoder)}
    n = {"trunk": count(model.trunk)}
    if model.config.train_reconstruction:
        n["decoder"] = count(model.pixel_decoder)
        n["trunk + decoder"] = n["trunk"] + n["decoder"]
    if model.config.train_clip:
        tower = [getattr(model, name) for name in ("token_embedding", "positional_embedding", "ln_final", "text_projection") if hasattr(model, name)]
        n |= {"text transformer": count(model.text_transformer), "text tower": count(model.text_transformer, *tower), "image projection": count(model.visual_proj)}
    return n


def tensors(model):
    """-> {part: tensors in model.safetensors}. They include the RoPE periods, which are buffers.

    "text and CLIP" is the text tower, the image projection, and the logit scale and bias.
    """
    names = list(model.state_dict())
    n = {"trunk": sum(name.startswith("trunk.") for name in names),
         "decoder": sum(name.startswith("pixel_decoder.") for name in names)}
    return n | {"text and CLIP": len(names) - sum(n.values()), "all": len(names)}


def official(config):
    """-> {part: millions}, for the parts whose width and depth the released code was counted at"""
    c = config
    sizes = {"trunk": (c.vision_embed_dim, c.vision_depth), "decoder": (c.decoder_embed_dim, c.decoder_depth)} | dict.fromkeys(
        ("text transformer", "text tower"), (c.text_embed_dim, c.text_depth))
    n = {part: OFFICIAL[part][size] for part, size in sizes.items() if size in OFFICIAL[part]}
    return n | ({"trunk + decoder": n["trunk"] + n["decoder"]} if {"trunk", "decoder"} <= n.keys() else {})


def describe(model):
    """-> lines: parameters beside the released code's, then the configuration

    For a trunk of L's width and depth, also tensors beside those of the released L.
    """
    c, theirs = model.config, official(model.config) if hasattr(model, "trunk") else {}
    yield f"{'M parameters':20s}{'here':>12s}{'released code, same width and depth':>40s}"
    for part, n in parts(model).items():
        yield f"{part:20s}{n / 1e6:12.3f}" + (f"{theirs[part]:40.3f}" if part in theirs else f"{'none to compare with':>40s}")
    if not hasattr(model, "trunk"):
        yield str(c)
        return
    if (c.vision_embed_dim, c.vision_depth) == (1024, 24):
        yield f"{'tensors':20s}{'here':>12s}{'a public port of the released L':>40s}"
        for part, n in tensors(model).items():
            yield f"{part:20s}{n:12d}{RELEASED_L[part]:40d}"
    yield (f"trunk {c.vision_embed_dim} x {c.vision_depth}, {c.vision_num_heads} heads, patch {c.vision_patch_size}, {c.vision_ffn_layer}, {c.vision_norm_layer}, "
           f"QKNorm {'on' if c.vision_use_qk_norm else 'off'}, latents {c.vision_feature_bottleneck}-d, RoPE {c.rope_dtype}, for pictures of {c.image_size} px")
    yield (f"decoder {c.decoder_embed_dim} x {c.decoder_depth}, {c.decoder_num_heads} heads, {c.decoder_ffn_layer}, {c.decoder_norm_layer}, "
           f"{c.decoder_upscale} px a latent" if c.train_reconstruction else "no decoder: nothing can be painted")
    yield (f"text {c.text_embed_dim} x {c.text_depth}, {c.text_num_heads} heads, {c.text_context_length} tokens of {c.text_vocab_size}; "
           f"CLIP reads the {c.vision_clip_feat} feature" if c.train_clip else "no CLIP: nothing can be named")


@torch.no_grad()
def flops(forward):
    """-> FLOPs of forward() without and with the two products inside attention (queries by keys, weights by values)"""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):          # MATH: attention written out as batched products
        forward()
    total = counter.get_total_flops()
    return total - counter.get_flop_counts()["Global"].get(torch.ops.aten.bmm, 0), total


def costs(model, side, head=None):
    """Rows (part, parameters, FLOPs, FLOPs with attention) of one image of side x side and one caption of full length; head: one class token"""
    c, n, device = model.config, parts(model), next(model.parameters()).device
    img, z = torch.empty(1, 3, side, side, device=device), []
    rows = [("encoder", n.get("trunk") or n["encoder"], *flops(lambda: z.append(model.get_reconstruction_latents(img))))]
    if c.train_reconstruction:
        rows.append(("decoder", n["decoder"], *flops(lambda: model.get_latents_decoded_images(*z))))
        rows.append(("encoder + decoder", *(a + b for a, b in zip(rows[0][1:], rows[1][1:]))))
    if c.train_clip:
        text = torch.zeros(1, c.text_context_length, dtype=torch.long, device=device)
        work = flops(lambda: model.get_clip_text_feature(text, normalize=False))
        rows.append(("text tower", n["text tower"], *work))
    if head:
        rows.append(("DINO head", count(head), *flops(lambda: head(torch.empty(1, model.feature_dim, device=device)))))
    return rows


COUNTED = """Forward, one picture; text: one caption of full length; DINO head: one class token. 2 FLOPs a multiply-add of matrix products and
convolutions; norms, activations, softmax and RoPE are not counted. The first column of GFLOPs leaves out the two products inside attention:
that is how the paper's Table 1 counts."""


def table(rows):
    """Rows of `costs` -> lines"""
    yield f"{'':20s}{'M parameters':>14s}{'GFLOPs':>12s}{'with attention products':>26s}"
    for part, n, work, whole in rows:
        yield f"{part:20s}{n / 1e6:14.2f}{work / 1e9:12.2f}{whole / 1e9:26.2f}"


def on_meta(kind, config):
    """-> kind(config) with shapes only"""
    with torch.device("meta"):
        return kind(config)


def head_on_meta(model, sizes):
    """sizes  (prototypes, hidden, bottleneck) or None"""
    with torch.device("meta"):
        return DINOHead(model.feature_dim, *sizes) if sizes else None


def paper_says(model, side, rows):
    """-> a sentence beside the row of Table 1 that this configuration is, or nothing"""
    c, found = model.config, {name: (n / 1e6, work / 1e9) for name, n, work, _ in rows}.get("encoder + decoder")
    if not hasattr(model, "trunk"):
        at = (256, 16, 128) == (side, c.vision_patch_size, c.widths[0])
        return ["paper, Table 1: its CNN has 70.3M parameters and 389.4 GFLOPs; here {:.2f}M, {:.2f}".format(*found)] if at else []
    size = c.vision_embed_dim, c.vision_depth
    if not found or size not in TABLE_1 or size != (c.decoder_embed_dim, c.decoder_depth) or (side, c.vision_patch_size) != (256, 16):
        return []
    said = "paper, Table 1: {:.1f}M parameters, {:.1f} GFLOPs; here {:.2f}M, {:.2f}".format(*TABLE_1[size], *found)
    if size == (768, 12):
        return [f"{said}: 0.1% more in both. No choice of feed-forward, norms, QKNorm, LayerScale, biases, or d from 16 to 256, has been found",
                "that gives the paper's two numbers together."]
    other = costs(on_meta(VTPModel, replace(c, vision_norm_layer="layernorm", train_clip=False)), side)[2][1] / 1e6
    return [f"{said}. With LayerNorm in the trunk in place of RMSNorm, the released code's", f"default, it has {other:.2f}M, which rounds to the paper's number."]
