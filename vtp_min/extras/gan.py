"""Stage 2 of VTP: fine-tune the pixel decoder with a GAN; the encoder is frozen.   VTP Sec. 3.2

    loss = L1 + LPIPS + w_gan * weight * gan
    weight = |gradient of L1 + LPIPS| / |gradient of gan|, both at the decoder's last layer: VQGAN

A GAN loss makes the training of a ViT unstable (large gradient norms, Sec. 3.2), so it is used only
in this second stage. The latents stay the same in every bit, so a DiT that was trained on the
latents of stage 1 can be used with the new decoder.

The paper publishes no further details. The PatchGAN discriminator, the hinge losses and the
adaptive weight are those of VQGAN (Esser et al. 2021) and LDM (Rombach et al. 2022). The optimizer,
the learning rate, the EMA, the pixel range of L1 and the start of the discriminator are those of
RAE (Zheng et al. 2025), whose decoder is also a ViT.

    VQGAN  CompVis/taming-transformers  configs/imagenet_vqgan.yaml
                                        taming/modules/losses/vqperceptual.py
    LDM    CompVis/latent-diffusion     configs/autoencoder/autoencoder_kl_*.yaml
                                        ldm/modules/losses/contperceptual.py, ldm/modules/ema.py
    RAE    bytetriper/RAE               configs/stage1/training/DINOv2-B_decXL.yaml
                                        src/train_stage1.py

    python train.py --stage 2 --init runs/vtp        writes the run folder runs/vtp-gan

Data, seed, image size and patch size are taken from the run in --init. Flags can change the data,
the seed and the image size.

B images on this process    H, W image size    h, w grid of the discriminator's logits
d latent channels
"""
import argparse
from math import inf
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from ..augment import STD
from ..device import autocast, move_to, setup_device, tf32_of, to_fp32
from ..dist import (all_reduce_mean, average_gradients, broadcast_parameters, print0, rank,
                    world_size)
from ..model import SMALL, VTPModel
from ..optim import update_ema, warmup_cosine
from ..rng import Stream, make_rng
from ..run import Run, parse_settings
from .files import read_settings as settings_of_run
from .flag_ranges import check_numbers
from .perceptual import CHOICES, HELP, build, describe, inherited
from .workers import default_workers

# name: (our default for pico, nano and micro; default for S, B and L; source of the second)
FLAG_DEFAULTS = {
    "steps": (600, 40_000, "RAE: 16 epochs of ImageNet in batches of 512"),
    "batch": (64, 512, "RAE"),
    "lr": (2e-4, 2e-4, "RAE: a warm-up, then a cosine to 2e-5"),
    "w_gan": (0.5, 0.5, "LDM (VQGAN 0.8, RAE 0.75)"),
}
RECIPE = {   # the rest of the recipe: --set name=value. Last column: source; meaning
    "clip_grad": (0.0, 0.0, "RAE: no clipping; maximum gradient norm, 0 disables clipping"),
    "gan_start": (None, None, "RAE: half of the run; first step with the GAN loss"),
    "ema_decoder": (0.99, 0.9978, "RAE (LDM, VQGAN: no EMA); EMA decay; the average is saved"),
    "max_bad": (0.1, 0.1, "ours; training stops above this fraction of unreadable samples"),
    "fast": (1, 1, "ours; 0: textbook forms instead of extras/fast.py"),
}
BETAS = (0.9, 0.95)              # of the decoder's AdamW, which has no weight decay: RAE
BETAS_DISC = (0.5, 0.9)          # of the discriminator's AdamW: VQGAN
LR_END = 2e-5                    # learning rate at the end of the cosine: RAE
WARMUP = 1 / 16                  # fraction of the run: RAE, 1 epoch of 16
GAN_START = 1 / 2                # fraction of the run without the GAN loss: RAE, 8 epochs of 16
DISC_LEAD = 1 / 8                # fraction of the run in which the discriminator already learns but
                                 # the decoder has no GAN loss yet: RAE, 2 epochs of 16


# ---------------------------------------------------------------- the discriminator
class Discriminator(nn.Module):
    """PatchGAN: one logit for each of many overlapping patches of the image.   pix2pix, VQGAN

    img (B, 3, H, W), ImageNet-normalised -> logits (B, 1, h, w), trained to be positive for real
    images and negative for reconstructions.

    The convolutions give each logit a receptive field of 70x70 pixels with three layers (VQGAN) and
    of 34x34 pixels with two. We replace VQGAN's batch norm by GroupNorm, so that a logit depends on
    one image only. It is then the same for any number of processes, and real and reconstructed
    images can share a batch.
    """
    def __init__(self, layers=3, channels=64):
        super().__init__()
        net = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        out_channels = channels
        for n in range(1, layers + 1):
            in_channels = out_channels
            out_channels = channels * min(2 ** n, 8)
            stride = 2 if n < layers else 1
            # no bias: GroupNorm subtracts the mean and adds a bias of its own
            net += [nn.Conv2d(in_channels, out_channels, 4, stride, padding=1, bias=False),
                    nn.GroupNorm(32, out_channels), nn.LeakyReLU(0.2)]
        net.append(nn.Conv2d(out_channels, 1, 4, padding=1))
        self.net = nn.Sequential(*net)
        for module in self.net:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)      # VQGAN

    def forward(self, img):
        return self.net(img)


def build_discriminator(side):
    """Discriminator for images of side x side pixels. ValueError if they are too small.

    Three layers as in VQGAN. Below 128 pixels two layers (ours), so that the receptive field of a
    logit stays smaller than the image.
    """
    layers = 3 if side >= 128 else 2
    smallest = 3 * 2 ** layers
    if side < smallest:
        raise ValueError(f"--image {side} is too small for the discriminator; use at least "
                         f"{smallest} pixels, or train without a GAN: --w-gan 0")
    return Discriminator(layers)


# ---------------------------------------------------------------- the losses
def hinge_d_loss(real, fake):
    """Hinge loss of the discriminator.   VQGAN, with its factor 1/2

    real, fake  logits of real and of reconstructed images, any shape

    The loss is 0 if all real >= 1 and all fake <= -1. It is 1 if all logits are 0.
    """
    return (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean()) / 2


def hinge_g_loss(fake):
    """GAN loss of the decoder: minus the mean logit of its reconstructions.   VQGAN"""
    return -fake.mean()


def adaptive_weight(rec, other, parameter, scale=1.0, eps=1e-4, largest=1e4):
    """|gradient of rec| / |gradient of other| at one parameter -> () constant.   VQGAN Eq. 7

    With this weight the gradients of both losses have the same norm at the parameter.

    rec, other    losses (), each the mean over the images of this process. The gradients are
                  averaged over processes, so the weight is that of the whole batch.
    scale         loss scale of fp16: both losses are multiplied by it and the gradients divided,
                  so that the gradients do not underflow
    eps, largest  added to the denominator; upper limit of the weight. The defaults are VQGAN's.
    """
    norms = []
    for loss in (rec, other):
        grad = torch.autograd.grad(scale * loss, parameter, retain_graph=True)[0] / scale
        norms.append(all_reduce_mean(grad).norm())
    return (norms[0] / (norms[1] + eps)).clamp(0, largest)


def pixel_losses(pixels, target, perceptual, data_range):
    """L1 and LPIPS -> two losses (). Both have weight 1, as in stage 1 and in RAE. --perceptual
    efficientnet, which is not LPIPS, contains its own weight (perceptual.py).

    pixels, target  (B, 3, H, W), ImageNet-normalised
    perceptual      a loss of extras.perceptual, or None, which gives an LPIPS of 0
    data_range      width of the pixel range of L1: 1 for pixels in [0, 1] (RAE), 2 for pixels in
                    [-1, 1] (LDM, VA-VAE). Stage 1 takes L1 of ImageNet-normalised pixels. That is
                    about 4.4 times the value for range 1, and 2.2 times the value for range 2.
    """
    pixels = to_fp32(pixels)
    target = to_fp32(target)
    # multiplication by STD undoes the normalisation; the mean cancels in the difference
    error = data_range * move_to(STD, pixels.device).to(pixels) * (pixels - target)
    l1 = error.abs().mean()
    lpips = perceptual(pixels, target) if perceptual else l1.new_zeros(())
    return l1, lpips


# ---------------------------------------------------------------- the moving average
def ema_decay(step, decay):
    """EMA warm-up: a lower decay during the first steps, 2/11, 3/12, ...   LDM's LitEma

    Without it the average would stay close to the initial weights for a long time.
    """
    updates = step + 1           # LitEma counts a step before it averages: 2/11 first, not 1/10
    return min(decay, (1 + updates) / (10 + updates))


class EMA:
    """Exponential moving average of parameters, which are given as {name: parameter}"""
    def __init__(self, parameters):
        self.parameters = parameters
        self.average = {name: p.detach().clone() for name, p in parameters.items()}

    def update(self, decay):
        update_ema(self.average.values(), self.parameters.values(), decay)

    def swap(self):
        """Exchange the values of the parameters and of their averages"""
        for p, average in zip(self.parameters.values(), self.average.values()):
            p.data, average.data = average.data, p.data

    def state_dict(self):
        return self.average

    def load_state_dict(self, state):
        for name, average in self.average.items():
            average.copy_(state[name])


# ---------------------------------------------------------------- one step
def decoder_gradients(img, model, reconstruct, disc, last_layer, args, pixel_loss, amp, scaler):
    """Losses of the decoder; gradients are added to its parameters.   VTP Sec. 3.2, VQGAN

    img          (B, 3, H, W), ImageNet-normalised
    reconstruct  see train_with_gan
    disc         the discriminator, or None before the GAN loss starts
    last_layer   the parameter at which the adaptive weight compares gradients
    pixel_loss   (pixels, target) -> L1, LPIPS
    -> pixels (B, 3, H, W), losses {name: ()}, diagnostics {name: ()}
    """
    with amp:
        pixels, terms = reconstruct(model, img)
    pixels = to_fp32(pixels)                                  # under autocast they may be bf16
    l1, lpips = pixel_loss(pixels, img)
    rec = l1 + lpips
    loss = rec + sum(terms.values())
    losses, diagnostics = {"l1": l1}, {}
    if args.perceptual != "none":
        # in the log, efficientnet is not called LPIPS
        losses["efficientnet" if args.perceptual == "efficientnet" else "lpips"] = lpips
    losses |= terms

    if disc is not None:
        # this loss trains the decoder only, but its gradient passes through the discriminator
        disc.requires_grad_(False)
        with amp:
            logits = disc(pixels)                             # (B, 1, h, w)
        disc.requires_grad_(True)
        g = hinge_g_loss(to_fp32(logits))
        # the loss scale as a tensor; scaler.get_scale() would make the host wait for the GPU
        weight = adaptive_weight(rec, g, last_layer, scaler.scale(torch.ones_like(rec)))
        loss = loss + args.w_gan * weight * g
        losses["gan"] = g
        diagnostics["adaptive"] = weight

    scaler.scale(loss).backward()
    return pixels, {"loss": loss} | losses, diagnostics


def discriminator_gradients(img, pixels, disc, amp, scaler):
    """Loss of the discriminator; gradients are added to its parameters.   VQGAN

    img, pixels  (B, 3, H, W), the images and their reconstructions
    -> loss (), diagnostics {name: ()}; `right` is the fraction of logits with the right sign
    """
    with amp:                                                 # detach: no gradient for the decoder
        logits = disc(torch.cat([img, pixels.detach()]))      # (2B, 1, h, w)
    real, fake = to_fp32(logits).chunk(2)
    loss = hinge_d_loss(real, fake)
    scaler.scale(loss).backward()
    right = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
    return loss, {"d_real": real.mean(), "d_fake": fake.mean(), "right": right}


def discriminator_warnings():
    """-> check(step, logged values), which returns a short warning for the log, or ""

    check() reads `right`, the fraction of patches that the discriminator classifies correctly. It
    starts when the decoder has the GAN loss. The first warning of each kind is printed with an
    explanation. The thresholds are ours.
    """
    explained = set()

    def check(step, values):
        if "gan" not in values:
            return ""
        right = values["right"]
        if right > 0.98:
            kind = "discriminator always right"
            advice = ("Its gradient then contains little information for the decoder. Try a "
                      "larger --w-gan, a larger --batch, or --set gan_start=0 (decoder and "
                      "discriminator start together).")
        elif right < 0.52:
            kind = "discriminator guesses"
            advice = ("Either the reconstructions cannot be told from real images, or the "
                      "discriminator has learned nothing and its gradient is noise. If images "
                      "look worse than before stage 2, try a smaller --w-gan, a larger --batch or "
                      "a longer run.")
        else:
            return ""
        if kind not in explained:
            explained.add(kind)
            print0(f"\nwarning, step {step + 1}: the discriminator classifies {right:.0%} of the "
                   f"patches correctly (chance is 50%). {advice}")
        return kind

    return check


# ---------------------------------------------------------------- training
def train_with_gan(args, model, reconstruct, last_layer, device, precision, clean_batches, prefetch,
                   data_range=1):
    """Train all parameters of the model that require gradients, with L1 + LPIPS + GAN
    -> exit status

    args         out, fresh, data, seed, image, patch, steps, batch, lr, warmup, clip_grad, w_gan,
                 gan_start, ema_decoder, perceptual, workers, max_bad, log_every, save_every
    model        on its device; its train or eval mode is not changed. model.save_pretrained(folder)
                 is called while the trained parameters hold their moving average.
    reconstruct  (model, img) -> pixels, further losses. img and pixels are (B, 3, H, W),
                 ImageNet-normalised; the losses are {name: ()}, already multiplied by their
                 weights. Random numbers of torch depend only on seed, step and rank (seed_noise).
    last_layer   the weight of the layer that computes the pixels, for the adaptive weight
    clean_batches, prefetch  the functions of data.py
    data_range   pixel range of L1, see pixel_losses
    """
    settings = vars(args) | {"precision": precision, "machine": str(device)} | inherited(args)
    warmup, gan_start, disc_start = schedule_of(args)

    # ---- models, optimizers, data
    torch.manual_seed(args.seed)
    broadcast_parameters(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ema = EMA(trained)
    fused = device.type != "mps"               # one kernel for all parameters; not used on MPS
    optimizer = torch.optim.AdamW(trained.values(), args.lr, BETAS, weight_decay=0.0, fused=fused)
    # fp16 gradients underflow unless the loss is scaled up; bf16 and fp32 need no scaling
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    amp = autocast(device, precision)
    state = {"model": model, "optimizer": optimizer, "scaler": scaler, "ema": ema}
    disc = None
    if args.w_gan:
        disc = build_discriminator(args.image).to(device)
        broadcast_parameters(disc)
        optimizer_disc = torch.optim.AdamW(disc.parameters(), args.lr, BETAS_DISC,
                                           weight_decay=0.0, fused=fused)
        state |= {"disc": disc, "optimizer_disc": optimizer_disc}
    perceptual = None
    if args.perceptual != "none":
        perceptual = build(args.perceptual).to(device)
    data = clean_batches(args)

    def pixel_loss(pixels, target):
        return pixel_losses(pixels, target, perceptual, data_range)

    def export(step):
        ema.swap()
        model.save_pretrained(args.out)
        ema.swap()

    # ---- the run folder: new, or continued from a checkpoint
    files = {"data": data.source}
    for name in ("init", "encoder"):                          # folders with weights
        files[name] = getattr(args, name, None)
    run = Run(args.out, settings, args.fresh, files)
    run.restore(state)
    print_summary(args, trained, disc, data, gan_start, data_range, device, precision)
    run.start(args, data.images_per_step, device, precision, export, check=discriminator_warnings())
    batches = run.watch(prefetch(data, run.step, args.steps, args.workers))

    for step in range(run.step, args.steps):
        lr = warmup_cosine(step, args.lr, warmup, args.steps, LR_END)
        optimizer.param_groups[0]["lr"] = lr                  # all parameters are in one group
        optimizer.zero_grad()
        img = next(batches).to(device).image                  # (B, 3, H, W)
        seed_noise(args.seed, step)

        # 1. Losses and gradients of the decoder
        use_gan = disc is not None and step >= gan_start
        pixels, losses, diagnostics = decoder_gradients(
            img, model, reconstruct, disc if use_gan else None, last_layer, args, pixel_loss, amp,
            scaler)
        average_gradients(model)                              # over processes
        scaler.unscale_(optimizer)                            # before clipping: the true gradients
        grad_norm = clip_grad_norm_(trained.values(), args.clip_grad or inf)      # 0: no clipping
        total_norm = grad_norm

        # 2. Loss and gradients of the discriminator, on the same images
        train_disc = disc is not None and step >= disc_start
        if train_disc:
            disc_step = step - disc_start                     # RAE: its schedule begins here
            lr_disc = warmup_cosine(disc_step, args.lr, warmup, args.steps, LR_END)
            optimizer_disc.param_groups[0]["lr"] = lr_disc
            optimizer_disc.zero_grad()
            losses["disc"], disc_diagnostics = discriminator_gradients(
                img, pixels, disc, amp, scaler)
            average_gradients(disc)
            scaler.unscale_(optimizer_disc)
            grad_norm_disc = clip_grad_norm_(disc.parameters(), inf)      # measured, not clipped
            diagnostics |= disc_diagnostics | {"grad_norm_disc": grad_norm_disc}
            total_norm = grad_norm + grad_norm_disc           # not finite if one is not

        # 3. Update both, or neither if a loss or a gradient is not finite
        finite, stop = run.agree(losses, total_norm)
        if finite:
            scaler.step(optimizer)
            if train_disc:
                scaler.step(optimizer_disc)
            ema.update(ema_decay(step, args.ema_decoder))
        scaler.update()
        diagnostics["perceptual"] = args.perceptual
        run.after_step(step, losses, diagnostics, grad_norm, lr, state)
        if stop:
            break
    status = run.finish()
    if status == 0:
        print0(f"Next: python eval.py recon {args.out}")
    return status


def schedule_of(args):
    """-> steps of warm-up, first step with the GAN loss, first step of the discriminator

    These numbers are not stored in run.json. They depend on --steps, which may change when a run
    is continued.
    """
    warmup, gan_start = args.warmup, args.gan_start
    if warmup is None:
        warmup = max(round(args.steps * WARMUP), 1)
    if gan_start is None:
        gan_start = round(args.steps * GAN_START)
    lead = max(round(args.steps * DISC_LEAD), 1)
    return warmup, gan_start, max(gan_start - lead, 0)


def seed_noise(seed, step):
    """Seed torch from (seed, step, rank), so that a resumed run draws the same noise"""
    rng = make_rng(Stream.DECODER, seed, step, rank())
    torch.manual_seed(int(rng.integers(2 ** 63)))


def print_summary(args, trained, disc, data, gan_start, data_range, device, precision):
    pixel_range = {1: "[0, 1]", 2: "[-1, 1]"}[data_range]
    gan = "no GAN (--w-gan 0)"
    parameters = f"{millions(trained.values())} trained parameters"
    if disc is not None:
        gan = f"GAN {args.w_gan:g} x adaptive weight, starting at step {gan_start + 1}"
        parameters += f", discriminator {millions(disc.parameters())}"
    print0(f"losses       L1 of pixels in {pixel_range}, {describe(args.perceptual)}, {gan}   EMA "
           f"{args.ema_decoder:g}")
    print0(f"model        {parameters}")
    print0(f"data         {data.source.spec}, {args.image} px   batch {args.batch} over "
           f"{world_size()} process(es)")
    print0(f"machine      {device}, {precision}{tf32_of(device)}, "
           f"{torch.get_num_threads()} threads")


def millions(parameters):
    return f"{sum(p.numel() for p in parameters) / 1e6:.2f}M"


# ---------------------------------------------------------------- stage 2
def reconstruct(model, img):
    """img (B, 3, H, W) -> pixels (B, 3, H, W), no further losses. The encoder is frozen."""
    with torch.no_grad():
        z = model.get_reconstruction_latents(img)             # (B, d, h, w)
    return model.get_latents_decoded_images(z), {}


def main(argv, clean_batches, prefetch):
    """python train.py --stage 2 -> exit status. The run folder contains the whole model, so it can
    be used like a run of stage 1."""
    args = parse_arguments(argv)
    device, precision = setup(args)
    model = VTPModel.from_pretrained(args.init).to(device)
    if not model.config.train_reconstruction:
        raise ValueError(f"{args.init} was trained without a decoder (--w-rec 0), but stage 2 "
                         f"fine-tunes the decoder; give a run with --w-rec above 0 as --init")
    inherit_settings(args, model.config)
    model.config.image_size = args.image                      # saved in config.json
    model.requires_grad_(False)
    model.pixel_decoder.requires_grad_(True)
    last_layer = model.pixel_decoder.proj_out.weight
    return train_with_gan(args, model, reconstruct, last_layer, device, precision,
                          clean_batches, prefetch)


def setup(args):
    """-> device, precision. On a CPU, extras/fast.py is installed unless --set fast=0."""
    device, precision = setup_device(args)
    if args.fast != 0 and device.type == "cpu":
        from . import fast
        fast.install()
    return device, precision


def inherit_settings(args, config):
    """Fill in the flags that were not given: data and seed from run.json of stage 1, image size
    and patch size from its model, all others from the tables.

    config  VTPConfig of the model in --init. ValueError if the data are unknown.
    """
    stage1 = settings_of_run(args.init)
    if args.data is None:
        args.data = stage1.get("data")
        args.val_data = args.val_data or stage1.get("val_data")
    if not args.data:
        raise ValueError(f"{args.init} has no run.json that names its training data; give --data")
    if args.seed is None:
        args.seed = stage1.get("seed", 0)
    args.image = args.image or config.image_size
    args.patch = config.vision_patch_size
    check_image(args)
    fill_defaults(args, stage1.get("size"), FLAG_DEFAULTS | RECIPE)
    print0(f"stage 2      decoder of {args.init}; trunk, bottleneck and text tower are frozen; "
           f"{args.data}, seed {args.seed}, {args.image} px, patch {args.patch}; "
           f"writes to {args.out}")


def parse_arguments(argv):
    """argv, without the name of the program -> Namespace. None: not given; inherit_settings fills
    it in. ValueError for values that are out of range."""
    p = new_parser("train.py --stage 2", __doc__, RECIPE)
    p.add_argument("--stage", type=int, choices=[2], help="2: this program")
    p.add_argument("--init", metavar="RUN",
                   help="run of stage 1, or released weights, whose decoder is fine-tuned")
    p.add_argument("--out", help="run folder; if it holds a checkpoint, training continues "
                                 "(default INIT-gan)")
    p.add_argument("--data", help="as in stage 1 (default: that of --init)")
    p.add_argument("--image", type=int,
                   help="side of the images in pixels (default: that of --init)")
    p.add_argument("--seed", type=int,
                   help="an equal seed gives an equal run (default: that of --init)")
    add_common_flags(p, FLAG_DEFAULTS)
    args = p.parse_args(argv)
    if not args.init:
        raise ValueError("--stage 2 starts from a run of stage 1 or from released weights; "
                         "name the folder with --init RUN")
    args.out = args.out or args.init.rstrip("/") + "-gan"
    if Path(args.out).resolve() == Path(args.init).resolve():
        raise ValueError(f"--out {args.out} is the run of stage 1 itself; choose another folder, "
                         f"so that both runs are kept")
    read_settings(args, RECIPE)
    check_values(args)
    return args


# ---------------------------------------------------------------- flags, shared with baselines.py
def new_parser(prog, description, recipe):
    """-> ArgumentParser whose help ends with the table of --set

    recipe  {name: (default for pico to micro, default for S to L, source of the second; meaning)}
    """
    lines = ["The rest of the recipe. Change a value with --set name=value:", "",
             f"  {'name':<14} {'nano (ours)':<12} {'S, B, L':<8} source for S, B, L; meaning"]
    for name, (small, large, source) in recipe.items():
        lines.append(f"  {name:<14} {small!s:<12} {large!s:<8} {source}")
    return argparse.ArgumentParser(prog=prog, description=description, epilog="\n".join(lines),
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def add_common_flags(p, defaults):
    """Flags that stage 2 and the baselines have in common. Flags in `defaults` are None until
    fill_defaults is called, because their default depends on the size of the model."""
    add_sized_flag(p, defaults, "--steps", int, "length of the run")
    add_sized_flag(p, defaults, "--batch", int, "images per step over all processes")
    add_sized_flag(p, defaults, "--lr", float, "peak learning rate")
    add_sized_flag(p, defaults, "--w-gan", float,
                   "weight of the GAN loss, multiplied by the adaptive weight; 0: no GAN")
    p.add_argument("--warmup", type=int,
                   help="steps of linear warm-up (default 1/16 of the run: RAE)")
    p.add_argument("--perceptual", choices=CHOICES, default="vgg",
                   help=f"{HELP} (default vgg)")
    p.add_argument("--val-data", help="validation data for eval.py, if --data has no val/ folder")
    p.add_argument("--fresh", action="store_true", help="start over in --out")
    p.add_argument("--workers", type=int, default=default_workers(),
                   help="processes that prepare data (default %(default)s)")
    p.add_argument("--device", help="cpu, cuda or mps (default: the best one present)")
    p.add_argument("--precision", choices=["fp32", "bf16", "fp16", "fp64"],
                   help="default: chosen for the device and printed; fp64 is for tests")
    p.add_argument("--log-every", type=int, default=10,
                   help="steps between lines of log.jsonl (default %(default)s)")
    p.add_argument("--save-every", type=int, default=500,
                   help="steps between checkpoints (default %(default)s)")
    p.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                   help="change a value of the table below; repeatable")


def add_sized_flag(p, defaults, flag, kind, text):
    """Add a flag whose help shows both defaults, for large and for small models"""
    small, large, source = defaults[flag.strip("-").replace("-", "_")]
    default = f"default {large:g}, {source}"
    if small != large:
        default += f"; pico, nano, micro {small:g}, ours"
    p.add_argument(flag, type=kind, help=f"{text} ({default})")


def read_settings(args, recipe):
    """Replace args.set, a list of "name=value", by one attribute per name of the recipe. None: not
    given. ValueError for an unknown name or a value of the wrong type."""
    types = {name: large for name, (_, large, _) in recipe.items()}
    found = parse_settings(args.set, types)
    for name in recipe:
        setattr(args, name, found.get(name))
    del args.set


def fill_defaults(args, size, defaults):
    """Set each attribute of args that is None to its default for this model size"""
    for name, (small, large, _) in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, small if size in SMALL else large)


def check_image(args):
    """ValueError if the image cannot be cut into whole patches"""
    if args.image % args.patch:
        nearest = max(args.image // args.patch, 1) * args.patch
        raise ValueError(f"--image {args.image} is not a multiple of the patch size "
                         f"{args.patch}; try --image {nearest}")


def check_values(args):
    """ValueError if a value that was given is out of range"""
    for name in ("image", "patch", "latent_dim", "steps", "batch", "log_every", "save_every"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be 1 or more")
    if args.w_gan is not None and not args.w_gan >= 0:
        raise ValueError(f"--w-gan {args.w_gan}: must be 0 or more")
    if args.clip_grad is not None and not args.clip_grad >= 0:
        raise ValueError(f"--set clip_grad={args.clip_grad}: must be 0 or more")
    if args.gan_start is not None and (type(args.gan_start) is not int or args.gan_start < 0):
        raise ValueError(f"--set gan_start={args.gan_start}: must be the number of a step, "
                         f"0 or more")
    for name in ("ema_decoder", "max_bad"):
        value = getattr(args, name)
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"--set {name}={value}: must be a number from 0 to 1")
    check_numbers(args, RECIPE)                               # the rest: seed, workers, lr, ...
