"""Parameters and FLOPs of each part, beside the paper's and the released code's.   VTP Table 1

parts, official, tensors   parameters of a model, of the released code at the same widths and
                           depths, and tensors in a model's file; `describe` prints them
flops, costs               FLOPs of one image in matrix products and convolutions; `table` prints
                           them, `paper_says` compares them with Table 1
step_flops                 FLOPs of one training step, for the share of the machine's peak

A model on the meta device computes nothing: meta tensors have a shape, but no values. L takes a
second.
"""
from dataclasses import replace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..model import DINOHead, Student, Teacher, VTPModel, rec_patches

# {part: {(width, depth): millions of parameters}}, counted by running the released code at patch
# 16, d 64, SwiGLU, RMSNorm in the trunk, LayerNorm in the decoder, no QKNorm. The sizes of the
# released checkpoints are known only from their config.json files: beyond L's width of 1024, these
# sizes are the usual ones, not known ones.
OFFICIAL = {
    "trunk": {(384, 12): 21.612, (768, 12): 85.690, (1024, 24): 303.543},
    "decoder": {(384, 12): 21.621, (768, 12): 85.709, (1024, 24): 303.591, (1024, 4): 51.31},
    "text transformer": {(512, 12): 37.83, (768, 12): 85.05, (1024, 24): 302.3},
    "text tower": {(512, 12): 63.43, (768, 12): 123.65, (1024, 24): 354.0},
}
# Tensors in the released L's file, as stated by a public port of the released L checkpoint.
# VTPConfig's defaults give the same numbers at L's widths and depths: SwiGLU, no QKNorm,
# RMSNorm in the trunk, LayerNorm in the decoder, 12 layers in the text tower.
RELEASED_L = {"trunk": 295, "decoder": 343, "text and CLIP": 151, "all": 789}
# {(width, depth) of trunk and decoder: (millions of parameters, GFLOPs) of both}
TABLE_1 = {(768, 12): (171.2, 87.7), (1024, 24): (607.2, 311.1)}


# ---------------------------------------------------------------- parameters
def count(*modules):
    """Parameters of modules, or numbers in tensors"""
    n = 0
    for m in modules:
        parameters = [m] if torch.is_tensor(m) else m.parameters()
        n += sum(p.numel() for p in parameters)
    return n


def parts(model):
    """-> {part: parameters}. The trunk includes the bottleneck; the text tower includes its
    embeddings, last norm and projection."""
    if not hasattr(model, "trunk"):                           # a baseline
        return {"encoder": count(model.encoder), "decoder": count(model.decoder)}
    n = {"trunk": count(model.trunk)}
    if model.config.train_reconstruction:
        n["decoder"] = count(model.pixel_decoder)
        n["trunk + decoder"] = n["trunk"] + n["decoder"]
    if model.config.train_clip:
        names = ("token_embedding", "positional_embedding", "ln_final", "text_projection")
        others = [getattr(model, name) for name in names if hasattr(model, name)]
        n["text transformer"] = count(model.text_transformer)
        n["text tower"] = count(model.text_transformer, *others)
        n["image projection"] = count(model.visual_proj)
    return n


def tensors(model):
    """-> {part: tensors in model.safetensors}. They include the RoPE periods, which are buffers.

    "text and CLIP" is the text tower, the image projection, and the logit scale and bias.
    """
    names = list(model.state_dict())
    n = {"trunk": sum(name.startswith("trunk.") for name in names),
         "decoder": sum(name.startswith("pixel_decoder.") for name in names)}
    n["text and CLIP"] = len(names) - n["trunk"] - n["decoder"]
    n["all"] = len(names)
    return n


def official(config):
    """-> {part: millions}, for the parts whose width and depth the released code was counted at"""
    text = config.text_embed_dim, config.text_depth
    sizes = {"trunk": (config.vision_embed_dim, config.vision_depth),
             "decoder": (config.decoder_embed_dim, config.decoder_depth),
             "text transformer": text,
             "text tower": text}
    n = {}
    for part, size in sizes.items():
        if size in OFFICIAL[part]:
            n[part] = OFFICIAL[part][size]
    if "trunk" in n and "decoder" in n:
        n["trunk + decoder"] = n["trunk"] + n["decoder"]
    return n


def describe(model):
    """-> lines: parameters beside those of the released code, then the configuration

    For a trunk of L's width and depth, also tensors beside those of the released L.
    """
    c = model.config
    is_vtp = hasattr(model, "trunk")
    theirs = official(c) if is_vtp else {}
    yield f"{'M parameters':20s}{'here':>12s}{'released code, same width and depth':>40s}"
    for part, n in parts(model).items():
        known = f"{theirs[part]:.3f}" if part in theirs else "none to compare with"
        yield f"{part:20s}{n / 1e6:12.3f}{known:>40s}"
    if not is_vtp:
        yield str(c)
        return
    if (c.vision_embed_dim, c.vision_depth) == (1024, 24):
        yield f"{'tensors':20s}{'here':>12s}{'a public port of the released L':>40s}"
        for part, n in tensors(model).items():
            yield f"{part:20s}{n:12d}{RELEASED_L[part]:40d}"
    yield (f"trunk {c.vision_embed_dim} x {c.vision_depth}, {c.vision_num_heads} heads, patch "
           f"{c.vision_patch_size}, {c.vision_ffn_layer}, {c.vision_norm_layer}, QKNorm "
           f"{'on' if c.vision_use_qk_norm else 'off'}, latents {c.vision_feature_bottleneck}-d, "
           f"RoPE {c.rope_dtype}, for images of {c.image_size} px")
    if c.train_reconstruction:
        yield (f"decoder {c.decoder_embed_dim} x {c.decoder_depth}, {c.decoder_num_heads} heads, "
               f"{c.decoder_ffn_layer}, {c.decoder_norm_layer}, {c.decoder_upscale} px per latent")
    else:
        yield "no decoder: the model cannot reconstruct images"
    if c.train_clip:
        yield (f"text {c.text_embed_dim} x {c.text_depth}, {c.text_num_heads} heads, "
               f"{c.text_context_length} tokens of {c.text_vocab_size}; CLIP reads the "
               f"{c.vision_clip_feat} feature")
    else:
        yield "no CLIP: the model cannot classify images by text"


# ---------------------------------------------------------------- FLOPs of one image
@torch.no_grad()
def flops(forward):
    """-> FLOPs of forward() without, and with, the two products inside attention (queries by keys,
    weights by values)"""
    # MATH: attention written as batched matrix products, which nothing else here uses
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        forward()
    total = counter.get_total_flops()
    in_attention = counter.get_flop_counts()["Global"].get(torch.ops.aten.bmm, 0)
    return total - in_attention, total


@torch.no_grad()
def costs(model, side, head=None):
    """Rows (part, parameters, FLOPs, FLOPs with the products inside attention)

    of one image of side x side pixels, one caption of full length, and one class token in `head`
    """
    c = model.config
    n = parts(model)
    device = next(model.parameters()).device
    img = torch.empty(1, 3, side, side, device=device)
    latents = []                               # filled while the encoder is counted
    work = flops(lambda: latents.append(model.get_reconstruction_latents(img)))
    weights = n["trunk"] if hasattr(model, "trunk") else n["encoder"]
    encoder = ("encoder", weights, *work)
    rows = [encoder]
    if c.train_reconstruction:
        work = flops(lambda: model.get_latents_decoded_images(*latents))
        decoder = ("decoder", n["decoder"], *work)
        sums = [a + b for a, b in zip(encoder[1:], decoder[1:])]
        rows += [decoder, ("encoder + decoder", *sums)]
    if c.train_clip:
        text = torch.zeros(1, c.text_context_length, dtype=torch.long, device=device)
        work = flops(lambda: model.get_clip_text_feature(text, normalize=False))
        rows.append(("text tower", n["text tower"], *work))
    if head:
        token = torch.empty(1, model.feature_dim, device=device)
        rows.append(("DINO head", count(head), *flops(lambda: head(token))))
    return rows


COUNTED = """Forward pass of one image; text: one caption of full length; DINO head: one class \
token. A multiply-add is
2 FLOPs. Matrix products and convolutions are counted; norms, activations, softmax and RoPE are \
not. The first
column of GFLOPs excludes the two products inside attention, like the paper's Table 1."""


def table(rows):
    """Rows of `costs` -> lines"""
    yield f"{'':20s}{'M parameters':>14s}{'GFLOPs':>12s}{'with attention products':>26s}"
    for part, n, work, with_attention in rows:
        yield f"{part:20s}{n / 1e6:14.2f}{work / 1e9:12.2f}{with_attention / 1e9:26.2f}"


def on_meta(kind, config):
    """-> kind(config), with shapes but without values"""
    with torch.device("meta"):
        return kind(config)


def head_on_meta(model, sizes):
    """sizes  (prototypes, hidden, bottleneck), or None for no head"""
    if not sizes:
        return None
    with torch.device("meta"):
        return DINOHead(model.feature_dim, *sizes)


def paper_says(model, side, rows):
    """-> lines that compare `rows` with the row of Table 1 for this configuration; [] if there is
    none"""
    c = model.config
    found = {part: (n / 1e6, work / 1e9) for part, n, work, _ in rows}.get("encoder + decoder")
    if found is None:
        return []
    here = f"here {found[0]:.2f}M, {found[1]:.2f}"
    if not hasattr(model, "trunk"):
        if (side, c.vision_patch_size, c.widths[0]) != (256, 16, 128):
            return []
        return [f"paper, Table 1: its CNN has 70.3M parameters and 389.4 GFLOPs; {here}"]
    size = c.vision_embed_dim, c.vision_depth
    is_symmetric = size == (c.decoder_embed_dim, c.decoder_depth)
    if size not in TABLE_1 or not is_symmetric or (side, c.vision_patch_size) != (256, 16):
        return []
    parameters, gflops = TABLE_1[size]
    both = f"paper, Table 1: {parameters}M parameters, {gflops} GFLOPs; {here}"
    if size == (768, 12):
        return [f"{both}: 0.1% more in both. No choice of feed-forward, norms, QKNorm, LayerScale,",
                "biases, or d from 16 to 256, has been found that gives both of the paper's "
                "numbers."]
    layernorm = replace(c, vision_norm_layer="layernorm", train_clip=False)
    n = parts(on_meta(VTPModel, layernorm))["trunk + decoder"]
    return [f"{both}. With LayerNorm in the trunk in place of RMSNorm, the released code's",
            f"default, it has {n / 1e6:.2f}M, which rounds to the paper's number."]


# ---------------------------------------------------------------- FLOPs of a training step
def step_flops(config, batch, w_clip, w_ssl, w_rec, head=None):
    """FLOPs of the matrix products and convolutions of one training step on this process

    batch  data.Batch; only its shapes matter
    head   (prototypes, hidden, bottleneck) of the DINO head, or None

    The backward pass of a matrix product has two, so the student's forward passes count three
    times. Not counted: the losses, LPIPS, and what --recompute or --micro compute again.
    """
    model = on_meta(VTPModel, config)
    student = Student(model, head_on_meta(model, head))
    batch = batch.to(torch.device("meta"))
    total = 0
    if w_ssl:
        teacher = Teacher(student)
        total += flops(lambda: teacher(batch.crops, batch.mask_index))[1]
        total += 3 * flops(lambda: student.views(
            batch.crops, batch.locals, batch.mask, batch.mask_index, batch.keep))[1]
    if w_clip or w_rec:
        total += 3 * flops(lambda: clip_and_rec(student, batch, w_clip, w_rec))[1]
    return total


def clip_and_rec(student, batch, w_clip, w_rec):
    """The forward passes of part 2 of train.py's compute_gradients"""
    cls, patches = student.encode(batch.image, batch.keep["clip"])
    if w_clip:
        student.embed_image(cls, patches)
        student.embed_text(batch.text)
    if w_rec:
        student.decode(rec_patches(batch, patches, student))
