"""Stage 2 of VTP: the tokenizer stands still, and its decoder learns to paint what a discriminator takes for real.   VTP Sec. 3.2

    loss = L1 + LPIPS + w_gan * a * gan          a = |slope of L1 + LPIPS| / |slope of gan| at the decoder's last layer: VQGAN's adaptive weight
                                                 L1 of pixels in [0, 1]: RAE's units

A GAN and a ViT get on badly (large gradients, Sec. 3.2), hence the second stage: the latents stay what they are, to the bit, so a DiT trained
on them needs no retraining. The paper publishes nothing else of it. PatchGAN, hinge losses and adaptive weight are those of VQGAN
(Esser et al. 2021) and LDM (Rombach et al. 2022); optimizer, learning rate, EMA, the units of L1
and the start of the discriminator are those of RAE (Zheng et al. 2025), where a ViT decodes too.

    VQGAN  CompVis/taming-transformers  configs/imagenet_vqgan.yaml
                                        taming/modules/losses/vqperceptual.py
    LDM    CompVis/latent-diffusion     configs/autoencoder/autoencoder_kl_*.yaml
                                        ldm/modules/losses/contperceptual.py, ldm/modules/ema.py
    RAE    bytetriper/RAE               configs/stage1/training/DINOv2-B_decXL.yaml
                                        src/train_stage1.py

    python train.py --stage 2 --init runs/vtp        leaves runs/vtp-gan, a run like any other (vtp_min/run.py)

    Discriminator, hinge_*, adaptive_weight    the discriminator and what it says
    pixel_losses                               L1 + LPIPS in the units of the source
    fit                                        trains whatever of a model asks for gradients, by these losses; baselines.py trains by it too
    train, flags                               stage 2: what stands still, what is taken over from stage 1

B images on this process    H, W their sides    h, w the discriminator's grid of answers
"""
import json
from math import inf
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from .dist import rank, say, stop, total, world
from .losses import Perceptual, to_fp32
from .model import SMALL, VTPModel
from .run import STOPPED, Run, autocast, machine, move_to, tf32_of
from .schedules import warmup_cosine
from .views import PAINT, STD, lots, normalize

DEFAULTS = {   # flag: (nano, larger, where the second comes from). nano's are ours, for a CPU. L1 and LPIPS weigh 1 and 1, as in stage 1 (RAE too)
    "steps": (600, 40_000, "RAE: 16 epochs of ImageNet, in batches of 512"),
    "batch": (64, 512, "RAE"),
    "lr": (2e-4, 2e-4, "RAE; after warm-up a cosine to 2e-5"),
    "clip_grad": (None, None, "no clipping: RAE"),
    "w_gan": (0.5, 0.5, "LDM; VQGAN 0.8, RAE 0.75"),
    "ema_decoder": (0.99, 0.9978, "RAE; LDM and VQGAN have none in their autoencoders"),
}
BETAS = (0.9, 0.95)              # AdamW of the decoder, without weight decay: RAE
BETAS_DISC = (0.5, 0.9)          # of the discriminator: VQGAN
LR_FLOOR = 2e-5                  # learning rate at the end of the cosine: RAE
WARMUP = 1 / 16                  # share of the run: RAE's one epoch of 16
GAN_START = 1 / 2                # share of the run without the GAN loss: RAE's epochs 0 to 8 of 16
HEAD_START = 1 / 8               # share before it in which the discriminator learns: RAE's 6 to 8
FLOOR, TOP = 1e-4, 1e4           # adaptive weight: added to the gan's slope, and the most it may be: VQGAN
OWN = ("init", "w_gan", "gan_start", "ema_decoder")
SHARED = ("out", "fresh", "data", "val_data", "image", "steps", "batch", "perceptual", "lr", "warmup", "clip_grad", "seed", "workers", "device",
          "precision", "max_bad", "log_every", "save_every", "stage")


# ---------------------------------------------------------------- the discriminator
class Discriminator(nn.Module):
    """Real or painted? An answer for each of many overlapping squares: img (B, 3, H, W) -> logits (B, 1, h, w), above 0 for real

    VQGAN's PatchGAN (pix2pix's, 64 channels), but with GroupNorm (ours) in place of batch norm, so that an answer depends on one picture alone:
    the same for any number of processes, for small batches, for real and painted ones judged together. `layers` 3 (VQGAN) judges squares of
    70 px, 2 those of 34 px.
    """
    def __init__(self, layers=3, channels=64):
        super().__init__()
        widths = [channels * min(2 ** n, 8) for n in range(layers + 1)]
        net = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for n in range(1, layers + 1):
            net += [nn.Conv2d(widths[n - 1], widths[n], 4, stride=2 if n < layers else 1, padding=1, bias=False), nn.GroupNorm(32, widths[n]), nn.LeakyReLU(0.2)]
        self.net = nn.Sequential(*net, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for m in self.net:
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(m.weight, std=0.02)                                     # VQGAN

    def forward(self, img):
        return self.net(img)


def discriminator_for(side):
    """VQGAN's three layers; below 128 px two (ours), so that a judged square stays a part of the picture"""
    layers = 3 if side >= 128 else 2
    if side // 2 ** layers < 3:
        raise ValueError(f"--image {side} is too small for the discriminator: wanted {3 * 2 ** layers} px or more, or --w-gan 0")
    return Discriminator(layers)


def hinge_d(real, fake):
    """Real above 1, painted below -1; beyond that nothing is gained. An answer of 0 to everything costs 1.   VQGAN, with its factor 1/2"""
    return (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean()) / 2


def hinge_g(fake):
    """The decoder wants its pictures taken for real."""
    return -fake.mean()


def adaptive_weight(rec, gan):
    """Slopes of both losses at the decoder's last layer -> the factor that makes the second as large as the first.   VQGAN Eq. 7

    A rank's slope is that of its own rows; the mean over ranks is that of the batch, so all ranks find one process's weight.
    """
    rec, gan = ((total(slope.clone()) / world()).norm() for slope in (rec, gan))
    return (rec / (gan + FLOOR)).clamp(0, TOP)


# ---------------------------------------------------------------- the training
def pixel_losses(pixels, target, perceptual, data_range):
    """L1 and LPIPS, each with weight 1, between ImageNet-normalised images -> two scalars

    pixels, target  (B, 3, H, W)
    data_range  range of the pixels in the source: 1 for [0, 1] (RAE), 2 for [-1, 1] (LDM, VA-VAE).
                Stage 1 takes L1 of ImageNet-normalised pixels, which is about 4.4 times
                this value for range 1 and 2.2 times for range 2.
    """
    pixels = to_fp32(pixels)
    target = to_fp32(target)
    error = data_range * STD.to(pixels) * (pixels - target)
    l1 = error.abs().mean()
    return l1, perceptual(pixels, target) if perceptual else l1.new_zeros(())


def ema_decay(step, decay):
    """EMA warm-up: a lower decay during the first steps, 2/11, 3/12, ...   LDM's LitEma

    LitEma increments its counter before it averages, so the first decay is 2/11, not 1/10.
    """
    updates = step + 1
    return min(decay, (1 + updates) / (10 + updates))


class Painter(nn.Module):
    """What DistributedDataParallel wraps: paint as the forward of a module"""
    def __init__(self, model, paint):
        super().__init__()
        self.model, self.paint = model, paint

    def forward(self, img):
        return self.paint(self.model, img)


def fit(args, model, paint, device, precision, last, open_steps, batches, data_range=1):
    """Train what of `model` asks for gradients on L1 + LPIPS + GAN -> the exit status: 0, or STOPPED when a signal ended it early

    args    out, fresh, data, seed, image, patch, steps, batch, lr, warmup, clip_grad, w_gan, gan_start, ema_decoder, perceptual, workers, max_bad, log_every, save_every
    model   on its device, in the mode it shall stay in; model.save_pretrained(folder) is called with the EMA in place of what was trained
    paint   (model, img (B, 3, H, W) ImageNet-normalised) -> pixels, the same; {name: further terms of the loss (), already weighted}
            What it draws with torch follows from seed, step and rank: a resumed run draws the same
    last    the parameter nearest to the pixels: where the adaptive weight compares slopes
    open_steps  data.clean_steps: args -> the training data, step by step
    batches     data.batches
    data_range  units of L1, see pixel_losses
    """
    settings = vars(args) | {"precision": precision, "machine": str(device)}
    warmup, ahead = (max(round(args.steps * share), 1) for share in (WARMUP, HEAD_START))      # not settings: --steps may change when a run goes on
    warmup = warmup if args.warmup is None else args.warmup
    listens = args.gan_start                                      # the decoder listens from this step on
    if listens is None:
        listens = round(args.steps * GAN_START)
    judges = max(listens - ahead, 0)                              # the discriminator learns from this

    torch.manual_seed(args.seed)
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
    ema = {k: p.detach().clone() for k, p in trained.items()}
    disc = discriminator_for(args.image).to(device) if args.w_gan else None
    perceptual = Perceptual(args.perceptual).to(device) if args.perceptual != "none" else None
    fused = device.type != "mps"
    opt = torch.optim.AdamW(trained.values(), args.lr, BETAS, weight_decay=0.0, fused=fused)
    opt_disc = torch.optim.AdamW(disc.parameters(), args.lr, BETAS_DISC, weight_decay=0.0, fused=fused) if disc else None
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    data = open_steps(args)
    parts = {"model": model, "opt": opt, "scaler": scaler} | ({"disc": disc, "opt_disc": opt_disc} if disc else {})
    run = Run(args.out, settings, args.fresh)
    if run.state:
        for name, part in parts.items():
            part.load_state_dict(run.state[name])
        for k, e in ema.items():
            e.copy_(run.state["ema"][k])
        run.state = None                                                                # free its memory
    introduce(args, trained, disc, data.source, listens, data_range, device, precision)
    painter, judge = Painter(model, paint), disc
    if world() > 1:
        ids = [device] if device.type == "cuda" else None
        painter = DistributedDataParallel(painter, ids, broadcast_buffers=False)
        judge = DistributedDataParallel(disc, ids, broadcast_buffers=False) if disc else None

    def keep():
        return {name: part.state_dict() for name, part in parts.items()} | {"ema": ema}

    def swap():
        for p, e in zip(trained.values(), ema.values()):
            p.data, e.data = e.data, p.data

    def export(step):
        swap()
        model.save_pretrained(args.out)
        swap()

    def slope(loss, x):
        return torch.autograd.grad(scaler.scale(loss), x, retain_graph=True)[0] / scaler.get_scale()

    warned = set()
    for step, batch in run.walk(args, data.rows, batches(data, run.first, args.steps, args.workers), device, precision, keep, export):
        lr = warmup_cosine(step, args.lr, warmup, args.steps, LR_FLOOR)
        opt.param_groups[0]["lr"] = lr
        opt.zero_grad()
        if disc:
            own_step = max(step - judges, 0)                      # its schedule counts its own: RAE
            lr_disc = warmup_cosine(own_step, args.lr, warmup, args.steps, LR_FLOOR)
            opt_disc.param_groups[0]["lr"] = lr_disc
            opt_disc.zero_grad()
        img = normalize(move_to(batch["image"], device)).to(torch.get_default_dtype())
        torch.manual_seed(int(lots(PAINT, args.seed, step, rank()).integers(2 ** 63)))
        judged, heard = disc and step >= judges, disc and step >= listens

        # ================================================================ the method
        with run.counting():
            with autocast(device, precision):
                pixels, terms = painter(img)
            pixels = to_fp32(pixels)                                                    # (B, 3, H, W)
            l1, lpips = pixel_losses(pixels, img, perceptual, data_range)
            pull, more = slope(l1 + lpips, pixels), sum(terms.values())                 # a loss at the pixels: its slope there is all that goes on to the decoder
            loss, terms, gauges = l1 + lpips + more, {"l1": l1, **({"lpips": lpips} if perceptual else {}), **terms}, {}
            if heard:                                                                   # the decoder's side of the game
                with autocast(device, precision):
                    gan = hinge_g(to_fp32(disc(pixels)))
                push = slope(gan, pixels)
                a = adaptive_weight(*(slope((pixels * s).sum(), last) for s in (pull, push)))
                pull, loss = pull + args.w_gan * a * push, loss + args.w_gan * a * gan
                terms, gauges = terms | {"gan": gan}, {"adaptive": a}
            scaler.scale((pixels * pull).sum() + more).backward()
            if judged:                                                                  # the discriminator's side, on the same pictures
                with autocast(device, precision):
                    real, fake = to_fp32(judge(torch.cat([img, pixels.detach()]))).chunk(2)    # (B, 1, h, w) each
                terms["disc"] = hinge_d(real, fake)
                scaler.scale(terms["disc"]).backward()
                gauges |= {"d_real": real.mean(), "d_fake": fake.mean(), "right": ((real > 0).float().mean() + (fake < 0).float().mean()) / 2}
        scaler.unscale_(opt)
        norm = clip_grad_norm_(trained.values(), args.clip_grad or inf)       # None, 0: no clipping
        norm_disc = norm.new_zeros(())
        if judged:
            scaler.unscale_(opt_disc)
            norm_disc = clip_grad_norm_(disc.parameters(), inf)
        if run.sound(loss + terms.get("disc", 0), norm + norm_disc):                    # both take their step, or neither
            scaler.step(opt)
            if judged:
                scaler.step(opt_disc)
            follow(ema, trained, ema_decay(step, args.ema_decoder))
        scaler.update()
        # ================================================================

        if run.due:
            values = run.means(loss=loss, **terms, **gauges) | {"perceptual": args.perceptual}
            values |= {"warning": warning} if heard and (warning := advice(values["right"], step, warned)) else {}
            run.note(**values, lr=lr, grad_norm=norm.item(), **({"grad_norm_disc": norm_disc.item()} if judged else {}))
    say(f"Next: python eval.py recon {args.out}")
    stop()
    return STOPPED if run.leaving else 0


@torch.no_grad()
def follow(ema, trained, m):
    """ema <- m ema + (1 - m) trained"""
    for e, p in zip(ema.values(), trained.values()):
        e.lerp_(p, 1 - m)


def advice(right, step, warned):
    """Warn if the discriminator always or never wins, and name the flags that may help -> the kind, for the log

    right  the share of patches that it classifies correctly. Each kind is printed once.
    """
    found = {}
    if right > 0.98:
        found["discriminator always right"] = (
            f"the discriminator classifies {right:.0%} of the patches correctly (50% is guessing), "
            f"so its gradient tells the decoder little. Try a larger --w-gan, --gan-start 0 "
            f"(no head start) or a larger --batch.")
    if right < 0.52:
        found["discriminator guesses"] = (
            f"the discriminator classifies {right:.0%} of the patches correctly, not clearly more "
            f"often than by guessing (50%): either reconstructions look real, or it has learned nothing and its "
            f"gradient is noise. If images look worse than before, try a smaller --w-gan, "
            f"a larger --batch or a longer run.")
    for kind in found.keys() - warned:
        say(f"\nwarning, step {step + 1}: {found[kind]}")
        warned.add(kind)
    return ", ".join(found)


def introduce(args, trained, disc, source, listens, data_range, device, precision):
    def count(parameters):
        return f"{sum(p.numel() for p in parameters) / 1e6:.2f}M"
    units = {1: "[0, 1]", 2: "[-1, 1]"}[data_range]
    say(f"losses       L1 1 of pixels in {units}, LPIPS {1 if args.perceptual != 'none' else 'none (--perceptual none: L1 alone keeps the shapes)'}, "
        f"gan {f'{args.w_gan:g} x adaptive, heard from step {listens + 1} on' if disc else 'none (--w-gan 0)'}   EMA {args.ema_decoder:g}")
    say(f"model        {count(trained.values())} parameters are trained" + (f", the discriminator has {count(disc.parameters())}" if disc else ""))
    say(f"data         {source.spec}, {args.image} px   batch {args.batch} over {world()} process(es)")
    say(f"machine      {device}, {precision}{tf32_of(device)}, {torch.get_num_threads()} threads")


# ---------------------------------------------------------------- stage 2
def paint(model, img):
    with torch.no_grad():
        z = model.get_reconstruction_latents(img)
    return model.get_latents_decoded_images(z), {}


def train(args, open_steps, batches):
    """Stage 2 -> the exit status. All but the pixel decoder stands still; the run folder holds the whole model again."""
    device, precision = machine(args)
    model = VTPModel.from_pretrained(args.init).to(device)
    if not model.config.train_reconstruction:
        raise ValueError(f"{args.init} was trained without a decoder (--w-rec 0): there is nothing to fine-tune")
    take_over(args, model.config)
    model.config.image_size = args.image
    model.requires_grad_(False)
    model.pixel_decoder.requires_grad_(True)
    last = model.pixel_decoder.proj_out.weight
    return fit(args, model, paint, device, precision, last, open_steps, batches)


def take_over(args, config):
    """What was not typed: data and seed from stage 1's run.json, picture side and patch from its model, the rest from DEFAULTS. Said aloud."""
    path = Path(args.init, "run.json")
    told = json.loads(path.read_text()) if path.exists() else {}
    if not (args.data or told.get("data")):
        raise ValueError(f"{args.init} does not say what it was trained on; give --data")
    if args.data is None:
        args.data, args.val_data = told["data"], args.val_data or told.get("val_data")
    args.seed = told.get("seed", 0) if args.seed is None else args.seed
    args.image, args.patch = args.image or config.image_size, config.vision_patch_size
    for name, (nano, larger, _) in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, nano if told.get("size") in SMALL else larger)
    say(f"stage 2      of {args.init}: its trunk, bottleneck and text tower stand still; {args.data}, seed {args.seed}, {args.image} px, patch {args.patch}; goes to {args.out}")


def spelled(names):
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def refuse_nonsense(typed):
    """{flag: value} as typed -> ValueError for a value out of range"""
    for name in ("image", "patch", "latent_dim", "steps", "batch", "log_every", "save_every"):
        if typed.get(name, 1) < 1:
            raise ValueError(f"{spelled([name])} {typed[name]}: wanted 1 or more")
    most = {"w_gan": inf, "gan_start": inf, "clip_grad": inf, "ema_decoder": 1, "max_bad": 1}
    for name, top in most.items():
        if not 0 <= typed.get(name, 0) <= top:
            raise ValueError(f"{spelled([name])} {typed[name]}: wanted 0 or more" + ", and at most 1" * (top == 1))


def flags(args, typed):
    """train.py's flags, and {name: value} of those that were typed -> the flags of stage 2. Those left open are None, for `take_over`."""
    if not args.init:
        raise ValueError("--stage 2 goes on from a run of stage 1, or from released weights: name its folder with --init RUN")
    if idle := typed.keys() - {*OWN, *SHARED}:
        raise ValueError(f"stage 2 trains the decoder alone and has no use for {spelled(sorted(idle))}; it knows {spelled(OWN + SHARED)}")
    refuse_nonsense(typed)
    kept = {name: getattr(args, name) for name in OWN + SHARED} | dict.fromkeys(("data", "image", "seed", *DEFAULTS)) | typed
    kept["out"] = typed.get("out", args.init.rstrip("/") + "-gan")
    if Path(kept["out"]).resolve() == Path(args.init).resolve():
        raise ValueError(f"--out {kept['out']} is the run of stage 1 itself; take another folder: the two are worth comparing")
    return type(args)(**kept)
