"""The paper's comparisons: three other ways to a latent space.   VTP Table 1, Fig. 8, Fig. 9

    ldm      a convolutional autoencoder, pixels alone                                        LDM (Rombach et al. 2022), [25] in the paper
    vavae    the same, its latents drawn towards the patch features of a frozen encoder       VA-VAE (Yao et al. 2025), [33]
    rae      the frozen encoder itself: its patch features are the latents, a decoder learns  RAE (Zheng et al. 2025), [36]

    python train.py --baseline ldm
    python train.py --baseline vavae --encoder RUN        RUN: a run of train.py, or released weights; rae likewise
L1 + LPIPS + GAN, optimizer, EMA and run folder are those of stage 2 (gan.py); evaluation and DiT read a baseline's run as any other: see `load`.
That is one recipe for all three, mostly RAE's, so that they compare. LDM and VA-VAE themselves have
Adam with betas 0.5 and 0.9 at a constant learning rate, no EMA, and the GAN from step 50001 and 5001 on;
none of the three clips gradients. L1 stays in the units of each: pixels in [0, 1] for RAE, else in [-1, 1].
The paper's VA-VAE and RAE stand on DINOv2; ours on any VTPModel, so Fig. 8 and 9 are re-enacted, not repeated. What LDM, VA-VAE and RAE draw (noise) depends on the rank:
a resumed run draws the same, another number of processes does not.
Their papers publish more settings than VTP does; each constant names its source:

    LDM     CompVis/latent-diffusion  configs/autoencoder/autoencoder_kl_*.yaml
                                      ldm/modules/losses/contperceptual.py
    VA-VAE  hustvl/LightningDiT       vavae/configs/f16d32_vfdinov2.yaml
                                      vavae/ldm/modules/losses/contperceptual.py
    RAE     bytetriper/RAE            configs/stage1/training/DINOv2-B_decXL.yaml, src/stage1/rae.py

B images    d latent channels    D width of the frozen encoder    h, w latent grid    N = h*w
"""
import json
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from . import gan
from .dist import say, total, world
from .losses import Perceptual, to_fp32
from .model import SIZES, SMALL, VTPConfig, VTPModel, load_weights
from .run import machine, write_aside

KL = 1e-6                    # weight of the KL term: LDM
DATA_RANGE = 2               # L1 of pixels in [-1, 1]: LDM, VA-VAE; see gan.pixel_losses
MARGINS = 0.5, 0.25          # m1 of the cosine loss, m2 of the matrix loss: VA-VAE
W_ALIGN = 0.1                # weight of both together: VA-VAE's w_hyper
TAU = 0.8                    # largest noise on the latents that RAE's decoder sees: RAE
ATTENTION = 16               # levels downsampled by this or more have attention: LDM at 256 px,
                             # on 16 px at f16, on 16 and 8 at f32, on none at f4 and f8
WIDTHS = dict.fromkeys(SMALL, 32)        # channels at full resolution: nano's is ours; S, B and L all mean the paper's one CNN, LDM's 128
MULTIPLES = {4: [1, 2, 4], 8: [1, 2, 4, 4], 16: [1, 1, 2, 2, 4], 32: [1, 1, 2, 2, 4, 4]}     # patch: what the width is multiplied by, level by level: LDM
DEFAULTS = gan.DEFAULTS | {  # flag: (nano, larger, where the second comes from): stage 2's (mostly RAE's) for all three, so that they compare
    "image": (64, 256, "paper Sec. 4.2; with --encoder the encoder's own"),
    "patch": (16, 16, "paper: f16; with --encoder the encoder's own"),
    "latent_dim": (64, 64, "paper: d64; RAE has the encoder's width"),
}
FLAGS = ("baseline", "encoder", "size", "patch", "latent_dim", "light_decoder", "w_gan", "gan_start", "ema_decoder", *(name for name in gan.SHARED if name != "stage"))


# ---------------------------------------------------------------- LDM's autoencoder: convolutions, and attention where the grid is small
def norm(c):
    return nn.GroupNorm(32, c, eps=1e-6)


class ResBlock(nn.Module):
    """x + two convolutions, each of norm and SiLU of what came before"""
    def __init__(self, a, b):
        super().__init__()
        self.branch = nn.Sequential(norm(a), nn.SiLU(), nn.Conv2d(a, b, 3, padding=1), norm(b), nn.SiLU(), nn.Conv2d(b, b, 3, padding=1))
        self.skip = nn.Conv2d(a, b, 1) if a != b else nn.Identity()

    def forward(self, x):
        return self.skip(x) + self.branch(x)


class Attention(nn.Module):
    """x + one head of attention between all places"""
    def __init__(self, c):
        super().__init__()
        self.norm, self.qkv, self.proj = norm(c), nn.Conv2d(c, 3 * c, 1), nn.Conv2d(c, c, 1)

    def forward(self, x):
        q, k, v = (y.flatten(2).transpose(1, 2) for y in self.qkv(self.norm(x)).chunk(3, 1))       # each (B, N, c)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return x + self.proj(y.unflatten(2, x.shape[-2:]))


def halve(c):
    return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(c, c, 3, stride=2))                 # padded right and below only


def double(c):
    return nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(c, c, 3, padding=1))


def middle(c):
    return [ResBlock(c, c), Attention(c), ResBlock(c, c)]


def level(i, a, b, depth):
    """Level i, downsampled by 2**i: `depth` blocks from a to b channels, with attention after each
    if the grid is small"""
    layers = []
    for k in range(depth):
        layers.append(ResBlock(b if k else a, b))
        if 2 ** i >= ATTENTION:
            layers.append(Attention(b))
    return layers


def conv_encoder(widths, depth, out):
    """img (B, 3, H, W) -> (B, out, h, w)      widths  the channels of each level, finest first"""
    layers, last = [nn.Conv2d(3, widths[0], 3, padding=1)], len(widths) - 1
    for i, c in enumerate(widths):
        layers += level(i, widths[max(i - 1, 0)], c, depth) + ([halve(c)] if i < last else [])
    return nn.Sequential(*layers, *middle(c), norm(c), nn.SiLU(), nn.Conv2d(c, out, 3, padding=1), nn.Conv2d(out, out, 1))


def conv_decoder(widths, depth, latent_dim):
    """z (B, d, h, w) -> pixels (B, 3, H, W); a block more in each level than the encoder has"""
    c, last = widths[-1], len(widths) - 1
    layers = [nn.Conv2d(latent_dim, latent_dim, 1), nn.Conv2d(latent_dim, c, 3, padding=1), *middle(c)]
    for i in reversed(range(len(widths))):
        layers += level(i, widths[min(i + 1, last)], widths[i], depth + 1) + ([double(widths[i])] if i else [])
    return nn.Sequential(*layers, norm(widths[0]), nn.SiLU(), nn.Conv2d(widths[0], 3, 3, padding=1))


@dataclass
class LDMConfig:
    """config.json of 'ldm' and 'vavae'. The defaults are Table 1's CNN: 70.29M parameters, 389.43 GFLOPs at 256 px (attention's products not counted)

    The table (70.3M, 389.4) settles the KL moments (69.99M without) and the attention (65.04M in the middle alone), not LDM's two 1x1 convolutions
    beside the latents (70.27M, 389.42 without).
    """
    image_size: int = 256
    latent_dim: int = 64
    widths: list = field(default_factory=lambda: [128, 128, 256, 256, 512])      # of each level, finest first: four halvings, f16
    depth: int = 2                                                               # residual blocks a level, and one more in the decoder
    encoder_width: int | None = None                                             # D of VA-VAE's frozen encoder; null: plain LDM
    train_clip, train_reconstruction = False, True                               # what eval.py and dit.py ask of any model's config

    @property
    def vision_patch_size(self):
        return 2 ** (len(self.widths) - 1)

    @classmethod
    def of_size(cls, size, image, patch, latent_dim, encoder_width=None):
        if patch not in MULTIPLES:
            raise ValueError(f"--patch {patch}: a convolutional autoencoder halves the picture again and again; wanted one of {', '.join(map(str, MULTIPLES))}, with an --image that it divides")
        return cls(image, latent_dim, [WIDTHS.get(size, 128) * m for m in MULTIPLES[patch]], 2, encoder_width)


class LDM(nn.Module):
    """The convolutional autoencoder. An image becomes a Gaussian at every place: training and the
    latents for a DiT take samples, evaluation takes the mean."""

    def __init__(self, config):
        super().__init__()
        c, d = config, config.latent_dim
        self.config = config
        self.encoder, self.decoder = conv_encoder(c.widths, c.depth, 2 * d), conv_decoder(c.widths, c.depth, d)
        if c.encoder_width:
            self.project = nn.Conv2d(d, c.encoder_width, 1, bias=False)          # VA-VAE: latents in the encoder's terms; training alone reads it

    def moments(self, img):
        """-> mean, log-variance of the latents, each (B, d, h, w)"""
        mean, logvar = to_fp32(self.encoder(img)).chunk(2, 1)
        return mean, logvar.clamp(-30, 20)                                       # LDM

    def get_reconstruction_latents(self, image):
        """image (B, 3, H, W), ImageNet-normalised -> latents (B, d, h, w)"""
        return self.moments(image)[0]

    def sample_latents(self, image, rngs):
        """image (B, 3, H, W), rngs: a numpy Generator for each -> samples of the latents (B, d, h, w)

        A DiT learns from samples, not from means: LDM, and LightningDiT's extract_features.py.
        """
        mean, logvar = self.moments(image)
        noise = [rng.standard_normal(mean.shape[1:], dtype="float32") for rng in rngs]
        return drawn(mean, logvar, torch.from_numpy(np.stack(noise)).to(mean))

    def get_latents_decoded_images(self, latents):
        """latents (B, d, h, w) -> images (B, 3, H, W), ImageNet-normalised, not clamped"""
        return self.decoder(latents)

    def save_pretrained(self, folder):
        """config.json + model.safetensors, each written aside and renamed"""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"model_type": "vavae" if self.config.encoder_width else "ldm", **asdict(self.config)}, indent=2)
        tensors = {k: v.contiguous() for k, v in self.state_dict().items()}
        write_aside(folder / "config.json", lambda path: path.write_text(text + "\n"))
        write_aside(folder / "model.safetensors", lambda path: safetensors.torch.save_file(tensors, path, {"format": "pt"}))


def load(folder):
    """A run of train.py, whatever it trained, or released weights -> its model: an LDM, or a VTPModel (RAE is one)"""
    path = Path(folder, "config.json")
    try:
        found = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as problem:
        raise ValueError(f"{path} is no JSON ({problem}); copy it again, or train anew") from None
    kind = found.get("model_type", "vtp") if isinstance(found, dict) else f"a {type(found).__name__}"
    if kind == "vtp":
        return VTPModel.from_pretrained(folder)
    if kind not in ("ldm", "vavae"):
        raise ValueError(f"{path} says model_type {kind!r}, wanted one of vtp, ldm, vavae")
    try:
        model = LDM(LDMConfig(**{k: v for k, v in found.items() if k != "model_type"}))
    except (TypeError, ValueError, IndexError, RuntimeError) as problem:
        raise ValueError(f"{path} describes no autoencoder that can be built ({problem}); copy it again, or train anew") from None
    load_weights(model, Path(folder, "model.safetensors"))
    return model.eval()


# ---------------------------------------------------------------- what each of them paints, and what it is told besides L1 + LPIPS
def drawn(mean, logvar, noise=None):
    """A sample of the Gaussians; noise from N(0, 1), by default torch's next"""
    noise = torch.randn_like(mean) if noise is None else noise
    return mean + (logvar / 2).exp() * noise


def kl_loss(mean, logvar):
    """How far the Gaussians lie from N(0, 1): nats of one picture, summed over its latents"""
    return (mean ** 2 + logvar.exp() - 1 - logvar).sum() / 2 / len(mean)


def paint_ldm(model, img):
    """img (B, 3, H, W) -> pixels, {'kl'}

    LDM sums its losses over the 3HW values of an image and we take their mean, so KL is divided by 3HW.
    """
    mean, logvar = model.moments(img)
    return model.get_latents_decoded_images(drawn(mean, logvar)), {"kl": KL * kl_loss(mean, logvar) / img[0].numel()}


def mcos_loss(z, f, margin=MARGINS[0]):
    """Each latent points where the encoder's feature of its place points, up to a margin.   VA-VAE, marginal cosine similarity

    z (B, D, h, w) projected latents      f (B, D, h, w) features
    """
    return F.relu(1 - margin - F.cosine_similarity(z, f)).mean()


def mdms_loss(z, f, margin=MARGINS[1]):
    """Two places are as alike in the latents as in the features, up to a margin.   VA-VAE, marginal distance matrix similarity

    z (B, D, h, w) projected latents      f (B, D, h, w) features
    Only angles within each are compared.
    """
    a, b = (F.normalize(x.flatten(2), dim=1) for x in (z, f))
    return F.relu((a.transpose(1, 2) @ a - b.transpose(1, 2) @ b).abs() - margin).mean()           # of (B, N, N)


def features(encoder, img, h, w):
    """The frozen encoder's patches on the latents' grid (B, D, h, w): it is shown the picture at the size that gives it"""
    p = encoder.config.vision_patch_size
    if img.shape[-2:] != (h * p, w * p):
        img = F.interpolate(img, (h * p, w * p), mode="bicubic", antialias=True)                   # ours
    with torch.no_grad():
        return to_fp32(encoder.trunk(img)[1].transpose(1, 2).unflatten(2, (h, w)))


def as_strong_as(rec, other, at):
    """|slope of rec| / |slope of other| at the parameter `at`, over the whole batch: what makes the two pull alike.   VA-VAE's w_adaptive, after VQGAN"""
    a, b = (total(torch.autograd.grad(x, at, retain_graph=True)[0]).norm() / world() for x in (rec, other))
    return (a / (b + 1e-4)).clamp(0, 1e8)                                     # 1e-4, 1e8: VA-VAE


def paint_vavae(encoder, perceptual, model, img):
    """img (B, 3, H, W) -> pixels, {'kl', 'align'}

    Both losses of `align` read the projected latents, as in VA-VAE's code.
    """
    mean, logvar = model.moments(img)
    z = drawn(mean, logvar)
    pixels = model.get_latents_decoded_images(z)
    f = features(encoder, img, *z.shape[-2:])
    with torch.autocast(img.device.type, enabled=False):                      # losses and gradients in float32
        projected = model.project(z)                                          # (B, D, h, w)
        align = mcos_loss(projected, f) + mdms_loss(projected, f)
        rec = sum(gan.pixel_losses(pixels, img, perceptual, DATA_RANGE))
        strength = as_strong_as(rec, align, model.encoder[-2].weight)         # its last 3x3 convolution
    return pixels, {"kl": KL * kl_loss(mean, logvar) / img[0].numel(), "align": W_ALIGN * strength * align}


def paint_rae(model, img):
    """img (B, 3, H, W) -> pixels, {}      The decoder sees latents with noise of a size drawn per picture, so that it forgives a DiT its errors.   RAE

    Sizes are uniform up to TAU (RAE's code; its paper has |N(0, TAU^2)|), in units of the features before the last norm's gain:
    RAE drops that gain, here the encoder stays as it is.
    """
    with torch.no_grad():
        z = model.get_reconstruction_latents(img)
        size = TAU * torch.rand(len(z), 1, 1, 1, device=z.device)
        z = z + size * model.trunk.norm.weight[:, None, None] * torch.randn_like(z)
    return model.get_latents_decoded_images(z), {}


def rae(encoder, size, image, light_decoder=False):
    """The encoder's trunk, frozen and without a bottleneck, under a new decoder: a VTPModel, saved in the official layout"""
    c = VTPConfig.of_size(size, image, encoder.config.vision_patch_size, None, clip=False, light_decoder=light_decoder)
    theirs = {k: v for k, v in asdict(encoder.config).items() if k.startswith("vision") or k == "rope_dtype"}
    model = VTPModel(replace(c, **theirs | {"vision_feature_bottleneck": None, "vision_bottleneck_ae_only": True}))
    model.trunk.load_state_dict({k: v for k, v in encoder.trunk.state_dict().items() if not k.startswith("feature_bottleneck")})
    model.trunk.requires_grad_(False)
    return model


# ---------------------------------------------------------------- the command
def train(args, open_steps, batches):
    """--baseline -> the exit status of its training"""
    device, precision = machine(args)
    encoder = VTPModel.from_pretrained(args.encoder).to(device).requires_grad_(False) if args.encoder else None
    take_over(args, encoder)
    torch.manual_seed(args.seed)
    if args.baseline == "rae":
        model, paint = rae(encoder, args.size, args.image, args.light_decoder), paint_rae
        last = model.pixel_decoder.proj_out.weight
        data_range = 1                                                        # pixels in [0, 1]: RAE
    else:
        model = LDM(LDMConfig.of_size(args.size, args.image, args.patch, args.latent_dim, encoder and encoder.config.vision_embed_dim))
        perceptual = Perceptual(args.perceptual).to(device) if encoder and args.perceptual != "none" else None
        paint = partial(paint_vavae, encoder, perceptual) if encoder else paint_ldm
        last = model.decoder[-1].weight
        data_range = DATA_RANGE
    say(f"baseline     {args.baseline}{f', frozen encoder {args.encoder}' if encoder else ''}; latents {args.latent_dim} x {args.image // args.patch} x {args.image // args.patch}")
    return gan.fit(args, model.to(device), paint, device, precision, last, open_steps, batches, data_range)


def take_over(args, encoder):
    """What was not typed: picture side and patch from the encoder where there is one, the rest from DEFAULTS"""
    c = encoder and encoder.config
    args.image, args.patch = args.image or c and c.image_size, args.patch or c and c.vision_patch_size
    args.latent_dim = c.vision_embed_dim if args.baseline == "rae" else args.latent_dim
    for name, (nano, larger, _) in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, nano if args.size in SMALL else larger)
    if args.image % args.patch:
        raise ValueError(f"--image {args.image} is no multiple of the patch, {args.patch}; try --image {max(args.image // args.patch, 1) * args.patch}")


def flags(args, typed):
    """train.py's flags, and {name: value} of those that were typed -> the flags of a baseline. Those left open are None, for `take_over`."""
    if (args.baseline == "ldm") == bool(args.encoder):
        raise ValueError("--baseline ldm learns from pixels alone: leave --encoder out" if args.encoder else
                         f"--baseline {args.baseline} needs a frozen encoder: --encoder RUN, a run of train.py or released weights")
    known = [name for name in FLAGS if name not in ({"patch", "latent_dim"} if args.baseline == "rae" else {"light_decoder"})]      # RAE's are the encoder's
    if idle := typed.keys() - {*known}:
        raise ValueError(f"--baseline {args.baseline} has no use for {gan.spelled(sorted(idle))}; it knows {gan.spelled(known)}")
    gan.refuse_nonsense(typed)
    if args.size not in SIZES:
        raise ValueError(f"--size {args.size} is unknown; choose one of {', '.join(SIZES)}")
    return type(args)(**{name: getattr(args, name) for name in (*FLAGS, "stage")} | dict.fromkeys(DEFAULTS) | typed)
