"""--init of stage 1: the training starts from the weights of a run, or from released weights.

    fill_in      the flags that follow from the weights; defaults for fine-tuning
    new_config   the config of the weights, with the changes that the flags ask for
    initialise   weights -> model; prints what is loaded, what is new and what is left out

    python train.py --init WEIGHTS --data DIR --out RUN

A part is initialised at random, as in a training from scratch, if the weights lack it or if
--latent-dim changes its shape. The DINO head is always new. Released weights have none, and the
prototypes of a run belong to the images of that run. The teacher starts as a copy of the student.

A resumed run reads its own checkpoint, and no longer needs the folder in --init.
"""
from dataclasses import replace
from pathlib import Path

from ..config import from_hub, read_config
from ..dist import print0
from ..model import SIZES, SMALL, VTPConfig, VTPModel
from ..run import parse_settings
from .run_folder import has_checkpoint

# Peak learning rate for fine-tuning. OpenCLIP's README fine-tunes CoCa L/14 with 1e-5, and FLYP
# (Goyal et al. 2023) fine-tunes CLIP B/16 with 1e-5. DINOv3 adapts its 7B model to higher
# resolution with 1.25e-5 (dinov3_vit7b16_high_res_adapt.yaml). pico, nano and micro have narrower
# layers and much shorter runs, so they need a larger rate: a fifth of the rate from scratch (ours).
LR = {"large": (1e-5, "OpenCLIP and FLYP fine-tune CLIP with it"),
      "small": (1e-4, "ours, a fifth of the rate from scratch")}
# The warm-up stays at a tenth of --steps: MAE's fine-tuning of L and H has 5 of 50 epochs. The
# recipe's layer_decay stays at 1, because OpenCLIP and FLYP have none when the losses are those of
# the pre-training. The 0.65 to 0.75 of MAE are for a new classifier, with a rate of 1e-3 and more.
WARMUP_SOURCE = "a tenth of --steps, as in MAE's fine-tuning"

# {part of the model: beginning of the names of its tensors}. Of several, the first one counts.
PARTS = {"bottleneck": "trunk.feature_bottleneck", "trunk": "trunk.",
         "input projection of the decoder": "pixel_decoder.proj_in",
         "pixel decoder": "pixel_decoder.", "image projection of CLIP": "visual_proj",
         "text tower": ""}                                    # with CLIP's logit scale


# ---------------------------------------------------------------- flags and config
def fill_in(args):
    """Set the flags and settings that follow from the weights in args.init. ValueError for a flag
    that contradicts them."""
    if Path(args.out).resolve() == Path(args.init).resolve():
        raise ValueError(f"--out {args.out} is the folder in --init, whose weights would be "
                         f"overwritten; give another folder with --out")
    config = read(args)
    check_trunk(args, config)
    args.size = name_of(config)
    args.patch = config.vision_patch_size
    if args.image is None:
        args.image = config.image_size
    if args.latent_dim is None:
        args.latent_dim = latent_dim_of(config)
    if args.lr is None:
        args.lr, _ = default_lr(args)
    fill_in_settings(args, config)
    check_text(args, config)
    check_decoder(args, config)


def read(args):
    """-> VTPConfig of the weights; of a resumed run, its own"""
    folder = args.init
    if is_resumed(args) and Path(args.out, "config.json").exists():
        folder = args.out
    elif not Path(folder, "config.json").exists():
        folder = from_hub(folder)
    path = Path(folder, "config.json")
    settings = read_config(path)
    try:
        return VTPConfig(**settings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def is_resumed(args):
    return has_checkpoint(args.out) and not args.fresh


def trunk_of(config):
    return config.vision_embed_dim, config.vision_depth, config.vision_num_heads


def name_of(config):
    """-> key of SIZES with this trunk, or for another trunk 'WIDTHxDEPTH'"""
    for name, size in SIZES.items():
        if (size["D"], size["depth"], size["heads"]) == trunk_of(config):
            return name
    return f"{config.vision_embed_dim}x{config.vision_depth}"


def latent_dim_of(config):
    """Channels of a latent: without a bottleneck those of the trunk"""
    return config.vision_feature_bottleneck or config.vision_embed_dim


def default_lr(args):
    """-> learning rate, its source"""
    return LR["small" if args.size in SMALL else "large"]


def check_trunk(args, config):
    """The trunk cannot be converted into one of another width, depth or patch size."""
    D, depth, heads = trunk_of(config)
    found = name_of(config)
    if args.size not in (None, found):
        raise ValueError(f"--size {args.size}: the trunk of {args.init} is {found} (width {D}, "
                         f"{depth} blocks, {heads} heads) and keeps its size; leave --size out, "
                         f"or leave --init out to train {args.size} from scratch")
    patch = config.vision_patch_size
    if args.patch not in (None, patch):
        raise ValueError(f"--patch {args.patch}: the patches of {args.init} have {patch} pixels, "
                         f"which its weights fix; leave --patch out (a larger --image gives more "
                         f"latents), or leave --init out to train from scratch")


def fill_in_settings(args, config):
    """Settings of the recipe that follow from the weights cannot have another value."""
    values = {"heads_after_bottleneck": not config.vision_bottleneck_ae_only}
    if config.train_clip:
        values["clip_loss"] = "clip" if config.init_logit_bias is None else "siglip"
    for pair in args.set:
        name = pair.partition("=")[0]
        same = name in values and parse_settings([pair], values)[name] == values[name]
        if name in (*values, "decoder", "light_decoder") and not same:
            raise ValueError(f"--set {pair}: with --init this follows from the weights in "
                             f"{args.init}; leave --set {name} out")
    args.set = [f"{name}={value}" for name, value in values.items()] + args.set


def check_text(args, config):
    """The text tower must fit our tokenizer and the training loop."""
    if not args.w_clip:
        return
    c = config
    problem = None
    if (c.text_context_length, c.text_vocab_size) != (77, 49408):
        problem = (f"reads {c.text_context_length} tokens of a vocabulary of {c.text_vocab_size}, "
                   f"but our tokenizer makes up to 77 of 49408")
    elif c.text_pool_type == "none" or c.nonscalar_logit_scale:
        problem = ("has text_pool_type none or nonscalar_logit_scale, which the training does not "
                   "support")
    if problem:
        raise ValueError(f"the text tower of {args.init} {problem}; type --w-clip 0 to leave it "
                         f"out")


def check_decoder(args, config):
    """The decoder must return images of the size of its input."""
    c = config
    if args.w_rec and c.train_reconstruction and c.decoder_upscale != c.vision_patch_size:
        raise ValueError(f"the decoder of {args.init} makes {c.decoder_upscale} pixels per latent "
                         f"and side, but its patches have {c.vision_patch_size}, so it cannot "
                         f"reconstruct its input; type --w-rec 0 to leave it out")


def new_config(args):
    """-> VTPConfig of the model to be trained"""
    config = read(args)
    changes = {"image_size": args.image, "train_clip": args.w_clip > 0,
               "train_reconstruction": args.w_rec > 0}
    if args.latent_dim != latent_dim_of(config):
        changes["vision_feature_bottleneck"] = args.latent_dim
    if not config.train_reconstruction:                       # a new decoder fits the patches
        changes["decoder_upscale"] = config.vision_patch_size
    return replace(config, **changes)


# ---------------------------------------------------------------- weights
def initialise(model, head, args):
    """Copy the weights in args.init into the model, except parts that are new or left out.

    model  VTPModel with new weights, built from new_config      head  DINOHead with new weights,
                                                                 or None
    """
    if is_resumed(args):
        return
    source = VTPModel.from_pretrained(args.init)              # strict: refuses damaged files
    theirs, ours = source.state_dict(), model.state_dict()
    new_parts = {part_of(name) for name, x in ours.items()
                 if name not in theirs or theirs[name].shape != x.shape}
    # a whole part is new or none of it: the old bias would not fit new weights
    new = {name: x for name, x in ours.items() if part_of(name) in new_parts}
    loaded = {name: theirs[name] for name in ours if name not in new}
    left_out = {name: x for name, x in theirs.items() if name not in ours}
    model.load_state_dict(loaded, strict=False)
    report(args, source.config, head, loaded, new, left_out)


def part_of(name):
    return next(part for part, start in PARTS.items() if name.startswith(start))


def report(args, config, head, loaded, new, left_out):
    """Print what was decided.   loaded, new, left_out: {name of a tensor: tensor}"""
    print0(f"init         The weights of {args.init} (trunk {args.size}, patch {args.patch}) are "
           f"loaded: {describe(loaded)}.")
    if new:
        print0(f"new          Initialised at random, because {why_new(args, config)}: "
               f"{describe(new)}.")
    if left_out:
        print0(f"left out     Not trained and not saved, because {why_left_out(args, config)}: "
               f"{describe(left_out)}.")
    if head is not None:
        number = sum(p.numel() for p in head.parameters())
        print0(f"new          The DINO head ({number:,} parameters) is initialised at random: "
               f"released weights have none, and the prototypes of a run belong to its own images. "
               f"The teacher starts as a copy of the student.")
    if args.image != config.image_size:
        print0(f"image        Images have {args.image} px, and the weights are for "
               f"{config.image_size} px. RoPE works for any size.")
    lr, source = default_lr(args)
    origin = f"the default with --init: {source}"
    if args.lr != lr:
        origin = f"the default with --init is {lr:g}"
    warmup = ""
    if args.warmup == max(args.steps // 10, 1):
        warmup = f" ({WARMUP_SOURCE})"
    print0(f"lr           The learning rate is {args.lr:g} ({origin}). The warm-up ends with step "
           f"{args.warmup}{warmup}.")


def describe(tensors):
    """{name: tensor} -> 'bottleneck (1,024 parameters), ...'"""
    numbers = {}
    for name, x in tensors.items():
        if not name.endswith("periods"):                      # constants of RoPE
            numbers[part_of(name)] = numbers.get(part_of(name), 0) + x.numel()
    return ", ".join(f"{part} ({numbers[part]:,} parameters)" for part in PARTS if part in numbers)


def why_new(args, config):
    found = []
    if args.latent_dim != latent_dim_of(config):
        found.append(f"--latent-dim is {args.latent_dim} and the weights have "
                     f"{latent_dim_of(config)} latent channels")
    if args.w_clip and not config.train_clip:
        found.append(f"--w-clip is {args.w_clip:g} and the weights have no text tower")
    if args.w_rec and not config.train_reconstruction:
        found.append(f"--w-rec is {args.w_rec:g} and the weights have no decoder")
    return ", and ".join(found)


def why_left_out(args, config):
    found = []
    if config.train_clip and not args.w_clip:
        found.append("--w-clip is 0")
    if config.train_reconstruction and not args.w_rec:
        found.append("--w-rec is 0")
    if args.latent_dim == config.vision_embed_dim != latent_dim_of(config):
        found.append("--latent-dim is the width of the trunk, which needs no bottleneck")
    return " and ".join(found)
