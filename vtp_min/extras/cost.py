"""Parameter and FLOP counts, compared with the paper and with the released code.   VTP Table 1

parameters_by_part     parameters of each part of a model
released_parameters    the same for the released code at the same widths and depths
tensors_by_part        tensors in a model's file; `describe` prints these three
flops, costs           FLOPs of one image in matrix products and convolutions; `table` prints them,
                       `compare_with_table_1` compares them with Table 1
step_flops             FLOPs of one training step; train.py logs them as a fraction of the hardware
                       peak (model FLOPs utilization, MFU)

Models are built on the meta device: their tensors have shapes but no values, so counting computes
nothing. Size L takes about a second.
"""
from dataclasses import replace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..model import DINOHead, Student, Teacher, VTPModel

# {part: {(width, depth): millions of parameters}}, counted by running the released code with patch
# size 16, d = 64, SwiGLU, RMSNorm in the trunk, LayerNorm in the decoder, no QKNorm. Of the widths
# and depths of the released checkpoints, which only their config.json files state, we know L's
# width of 1024; the others are the usual ViT sizes.
RELEASED_PARAMETERS = {
    "trunk": {(384, 12): 21.612, (768, 12): 85.690, (1024, 24): 303.543},
    "decoder": {(384, 12): 21.621, (768, 12): 85.709, (1024, 24): 303.591, (1024, 4): 51.31},
    "text transformer": {(512, 12): 37.83, (768, 12): 85.05, (1024, 24): 302.3},
    "text tower": {(512, 12): 63.43, (768, 12): 123.65, (1024, 24): 354.0},
}
# Number of tensors in the released L's file, as stated by a public port of that checkpoint.
# VTPConfig's defaults give the same numbers at L's widths and depths: SwiGLU, no QKNorm, RMSNorm in
# the trunk, LayerNorm in the decoder, 12 layers in the text tower.
RELEASED_L_TENSORS = {"trunk": 295, "decoder": 343, "text and CLIP": 151, "all": 789}
# {(width, depth) of trunk and decoder: (millions of parameters, GFLOPs) of both together}
TABLE_1 = {(768, 12): (171.2, 87.7), (1024, 24): (607.2, 311.1)}


# ---------------------------------------------------------------- parameters
def count(*modules):
    """Total number of parameters. Each argument is a module or a tensor."""
    n = 0
    for module in modules:
        parameters = [module] if torch.is_tensor(module) else module.parameters()
        n += sum(p.numel() for p in parameters)
    return n


def parameters_by_part(model):
    """-> {part: number of parameters}

    The trunk includes the bottleneck. The text tower includes its embeddings, final norm and
    projection; the text transformer consists only of its blocks.
    """
    if not hasattr(model, "trunk"):                           # a baseline: a CNN
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


def tensors_by_part(model):
    """-> {part: number of tensors in model.safetensors}

    The RoPE periods are buffers, but the official files contain them, so they are counted.
    "text and CLIP" is the text tower, the image projection, and the logit scale and bias.
    """
    names = list(model.state_dict())
    n = {"trunk": sum(name.startswith("trunk.") for name in names),
         "decoder": sum(name.startswith("pixel_decoder.") for name in names)}
    n["text and CLIP"] = len(names) - n["trunk"] - n["decoder"]
    n["all"] = len(names)
    return n


def released_parameters(config):
    """-> {part: millions of parameters of the released code}

    Contains only the parts whose width and depth are in RELEASED_PARAMETERS.
    """
    text = config.text_embed_dim, config.text_depth
    sizes = {"trunk": (config.vision_embed_dim, config.vision_depth),
             "decoder": (config.decoder_embed_dim, config.decoder_depth),
             "text transformer": text,
             "text tower": text}
    n = {}
    for part, size in sizes.items():
        if size in RELEASED_PARAMETERS[part]:
            n[part] = RELEASED_PARAMETERS[part][size]
    if "trunk" in n and "decoder" in n:
        n["trunk + decoder"] = n["trunk"] + n["decoder"]
    return n


def describe(model):
    """Yield lines of text: parameters next to those of the released code, then the configuration.

    For a trunk of L's width and depth, also tensors next to those of the released L.
    """
    c = model.config
    is_vtp = hasattr(model, "trunk")
    released = released_parameters(c) if is_vtp else {}
    yield f"{'M parameters':20s}{'here':>12s}{'released code, same width and depth':>40s}"
    for part, n in parameters_by_part(model).items():
        reference = f"{released[part]:.3f}" if part in released else "none to compare with"
        yield f"{part:20s}{n / 1e6:12.3f}{reference:>40s}"
    if not is_vtp:
        yield str(c)
        return
    if (c.vision_embed_dim, c.vision_depth) == (1024, 24):
        yield f"{'tensors':20s}{'here':>12s}{'a public port of the released L':>40s}"
        for part, n in tensors_by_part(model).items():
            yield f"{part:20s}{n:12d}{RELEASED_L_TENSORS[part]:40d}"
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
    """-> (FLOPs without the two matrix products inside attention, FLOPs with them)

    forward  function without arguments; its matrix products and convolutions are counted
    The two products are queries times keys and attention weights times values. The paper's Table 1
    does not count them.
    """
    # The MATH backend computes attention with bmm. Nothing else in these models calls bmm, so its
    # count is that of the two products.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        forward()
    total = counter.get_total_flops()
    in_attention = counter.get_flop_counts()["Global"].get(torch.ops.aten.bmm, 0)
    return total - in_attention, total


@torch.no_grad()
def costs(model, side, head=None):
    """Cost of one forward pass -> list of rows (part, parameters, FLOPs, FLOPs with attention)

    side  side of the image in pixels
    head  DINOHead, or None
    The encoder and the decoder process one image, the text tower one caption of full length, and
    the DINO head one class token. "FLOPs with attention" adds the two products inside attention.
    """
    c = model.config
    n = parameters_by_part(model)
    device = next(model.parameters()).device
    img = torch.empty(1, 3, side, side, device=device)
    latents = []                               # the counted call stores the decoder's input here
    encoder_flops = flops(lambda: latents.append(model.get_reconstruction_latents(img)))
    encoder_parameters = n["trunk"] if hasattr(model, "trunk") else n["encoder"]
    encoder = ("encoder", encoder_parameters, *encoder_flops)
    rows = [encoder]
    if c.train_reconstruction:
        decoder_flops = flops(lambda: model.get_latents_decoded_images(*latents))
        decoder = ("decoder", n["decoder"], *decoder_flops)
        sums = [a + b for a, b in zip(encoder[1:], decoder[1:])]
        rows += [decoder, ("encoder + decoder", *sums)]
    if c.train_clip:
        text = torch.zeros(1, c.text_context_length, dtype=torch.long, device=device)
        text_flops = flops(lambda: model.get_clip_text_feature(text, normalize=False))
        rows.append(("text tower", n["text tower"], *text_flops))
    if head:
        token = torch.empty(1, model.feature_dim, device=device)
        rows.append(("DINO head", count(head), *flops(lambda: head(token))))
    return rows


COUNTING_RULES = """\
Cost of one forward pass: one image; for the text tower, one caption of full length; for the DINO
head, one class token. Matrix products and convolutions are counted, with 2 FLOPs per multiply-add;
norms, activations, softmax and RoPE are not. The first column of GFLOPs excludes the two matrix
products inside attention, as the paper's Table 1 does."""


def table(rows):
    """Yield the rows of `costs` as lines of text."""
    yield f"{'':20s}{'M parameters':>14s}{'GFLOPs':>12s}{'with attention products':>26s}"
    for part, n, n_flops, with_attention in rows:
        yield f"{part:20s}{n / 1e6:14.2f}{n_flops / 1e9:12.2f}{with_attention / 1e9:26.2f}"


def on_meta(model_class, config):
    """-> model_class(config) on the meta device: tensors have shapes but no values"""
    with torch.device("meta"):
        return model_class(config)


def head_on_meta(model, sizes):
    """-> DINOHead for this model on the meta device, or None

    sizes  (prototypes, hidden, bottleneck), or None for no head
    """
    if not sizes:
        return None
    with torch.device("meta"):
        return DINOHead(model.feature_dim, *sizes)


def compare_with_table_1(model, side, rows):
    """-> lines of text that compare the rows of `costs` with the paper's Table 1

    [] if Table 1 has no row for this configuration.
    """
    c = model.config
    counts = {part: (n / 1e6, n_flops / 1e9) for part, n, n_flops, _ in rows}
    if "encoder + decoder" not in counts:
        return []
    here = "here {:.2f}M, {:.2f}".format(*counts["encoder + decoder"])
    if not hasattr(model, "trunk"):
        if (side, c.vision_patch_size, c.widths[0]) != (256, 16, 128):
            return []
        return [f"paper, Table 1: the CNN has 70.3M parameters and 389.4 GFLOPs; {here}"]
    size = c.vision_embed_dim, c.vision_depth
    is_symmetric = size == (c.decoder_embed_dim, c.decoder_depth)
    if size not in TABLE_1 or not is_symmetric or (side, c.vision_patch_size) != (256, 16):
        return []
    parameters, gflops = TABLE_1[size]
    comparison = f"paper, Table 1: {parameters}M parameters, {gflops} GFLOPs; {here}"
    if size == (768, 12):
        return [f"{comparison}: 0.1% more in both.",
                "We found no choice of feed-forward layer, norms, QKNorm, LayerScale, biases and d "
                "(16 to 256)",
                "that gives both numbers of the paper."]
    layernorm = replace(c, vision_norm_layer="layernorm", train_clip=False)
    n = parameters_by_part(on_meta(VTPModel, layernorm))["trunk + decoder"]
    return [f"{comparison}.",
            f"With LayerNorm in the trunk instead of RMSNorm, which is the default of the released "
            f"configuration, it has {n / 1e6:.2f}M,",
            "which rounds to the number in the paper."]


# ---------------------------------------------------------------- FLOPs of a training step
def step_flops(config, batch, w_clip, w_ssl, w_rec, head=None):
    """FLOPs of the matrix products and convolutions of one training step on this process

    batch                 data.Batch; only its shapes matter
    w_clip, w_ssl, w_rec  loss weights; an objective of weight 0 is not computed
    head                  (prototypes, hidden, bottleneck) of the DINO head, or None

    The backward pass of a matrix product consists of two matrix products of the same size (the
    gradients of its two inputs), so each forward pass of the student counts three times. The
    teacher has no backward pass. Not counted: the losses, LPIPS, and the forward passes that
    --recompute and --micro repeat.
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
    """The forward passes for CLIP and reconstruction, as in train.py's compute_gradients"""
    cls, patches = student.encode(batch.image, batch.keep["image"])
    if w_clip:
        student.embed_image(cls, patches)
        student.embed_text(batch.text)
    if w_rec:
        student.decode(student.rec_patches(batch, patches))
