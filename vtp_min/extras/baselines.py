"""The tokenizers that the paper compares with.   VTP Table 1, Fig. 8, Fig. 9

    ldm      a convolutional autoencoder, trained on pixels only
             LDM (Rombach et al. 2022), [25] in the paper
    vavae    the same, its latents aligned with the patch features of a frozen encoder
             VA-VAE (Yao et al. 2025), [33]
    rae      a decoder for the patch features of a frozen encoder, which are the latents
             RAE (Zheng et al. 2025), [36]

    python train.py --baseline ldm
    python train.py --baseline vavae --encoder RUN
    python train.py --baseline rae --encoder RUN      RUN: a run of train.py, or released weights

L1 + LPIPS + GAN, optimizer, EMA and run folder are those of stage 2 (gan.py); eval.py and dit.py
read the run like any other (model.load_model). All three have one recipe, mostly RAE's, so that
they can be compared. LDM and VA-VAE themselves have Adam with betas 0.5 and 0.9, a constant
learning rate, no EMA, and the GAN from step 50001 and 5001 on; none of the three clips gradients.
L1 has the units of each source: pixels in [0, 1] for RAE, else in [-1, 1]. The paper's VA-VAE and
RAE use DINOv2, ours any VTPModel, so Fig. 8 and 9 are imitated, not repeated. The random noise in
training depends on the rank: a resumed run has the same noise, another number of processes has not.

    LDM     CompVis/latent-diffusion  configs/autoencoder/autoencoder_kl_*.yaml
                                      ldm/modules/losses/contperceptual.py
    VA-VAE  hustvl/LightningDiT       vavae/configs/f16d32_vfdinov2.yaml
                                      vavae/ldm/modules/losses/contperceptual.py
    RAE     bytetriper/RAE            configs/stage1/training/DINOv2-B_decXL.yaml, src/stage1/rae.py

B images    d latent channels    D width of the frozen encoder    h, w latent grid    N = h*w
"""
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..config import load_weights, write_model
from ..device import to_fp32
from ..dist import print0
from ..model import SIZES, SMALL, VTPConfig, VTPModel
from . import gan
from .perceptual import Perceptual

KL = 1e-6                    # weight of the KL term: LDM
DATA_RANGE = 2               # L1 of pixels in [-1, 1]: LDM, VA-VAE; see gan.pixel_losses
MARGIN_COS = 0.5             # margin of the cosine loss: VA-VAE, m1
MARGIN_MATRIX = 0.25         # margin of the matrix loss: VA-VAE, m2
W_ALIGN = 0.1                # weight of both together: VA-VAE's w_hyper
TAU = 0.8                    # largest noise on the latents that the decoder sees: RAE
ATTENTION = 16               # levels downsampled by this or more have attention: LDM at 256 px,
                             # on 16 px at f16, on 16 and 8 at f32, on none at f4 and f8
WIDTH = 128                  # channels at full resolution: LDM. S, B and L all mean this one CNN
WIDTH_SMALL = 32             # the same for pico, nano, micro: ours
MULTIPLES = {                # patch: factors of the width, level by level: LDM
    4: [1, 2, 4],
    8: [1, 2, 4, 4],
    16: [1, 1, 2, 2, 4],
    32: [1, 1, 2, 2, 4, 4],
}
# as in gan.py; all three have the values of stage 2, mostly RAE's
FLAG_DEFAULTS = gan.FLAG_DEFAULTS | {
    "image": (64, 256, "paper Sec. 4.2; with --encoder that of the encoder"),
    "patch": (16, 16, "paper: f16; with --encoder that of the encoder"),
    "latent_dim": (64, 64, "paper: d64; rae: width of the encoder"),
}
RECIPE = gan.RECIPE | {
    "light_decoder": (False, False, "paper Sec. 4.1; rae: 4 ViT-L layers, for fast experiments"),
}


# ---------------------------------------------------------------- LDM's convolutional autoencoder
def group_norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResBlock(nn.Module):
    """x + two convolutions, each after norm and SiLU.  (B, before, h, w) -> (B, width, h, w)"""
    def __init__(self, before, width):
        super().__init__()
        self.branch = nn.Sequential(
            group_norm(before), nn.SiLU(), nn.Conv2d(before, width, 3, padding=1),
            group_norm(width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
        self.skip = nn.Identity()
        if before != width:
            self.skip = nn.Conv2d(before, width, 1)

    def forward(self, x):
        return self.skip(x) + self.branch(x)


class AttnBlock(nn.Module):
    """x + attention over the N positions, with one head"""
    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).flatten(2).mT.chunk(3, 2)     # (B, N, c) each
        y = F.scaled_dot_product_attention(q, k, v).mT                # (B, c, N)
        return x + self.proj(y.unflatten(2, x.shape[-2:]))


def downsample(channels):
    """Half the grid. LDM pads on the right and below only."""
    return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))


def upsample(channels):
    """Twice the grid"""
    return nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"),
                         nn.Conv2d(channels, channels, 3, padding=1))


def middle(channels):
    return [ResBlock(channels, channels), AttnBlock(channels), ResBlock(channels, channels)]


def level(i, before, width, depth):
    """Level i, downsampled by 2**i: `depth` blocks from `before` to `width` channels, each with
    attention if the grid is small"""
    layers = []
    for _ in range(depth):
        layers.append(ResBlock(before, width))
        if 2 ** i >= ATTENTION:
            layers.append(AttnBlock(width))
        before = width
    return layers


def conv_encoder(widths, depth, out):
    """img (B, 3, H, W) -> (B, out, h, w)      widths  channels of each level, finest first"""
    layers = [nn.Conv2d(3, widths[0], 3, padding=1)]
    before = widths[0]
    for i, width in enumerate(widths):
        layers += level(i, before, width, depth)
        if i < len(widths) - 1:
            layers.append(downsample(width))
        before = width
    layers += middle(width)
    layers += [group_norm(width), nn.SiLU(), nn.Conv2d(width, out, 3, padding=1)]
    layers.append(nn.Conv2d(out, out, 1))
    return nn.Sequential(*layers)


def conv_decoder(widths, depth, latent_dim):
    """z (B, d, h, w) -> pixels (B, 3, H, W). Each level has a block more than in the encoder."""
    before = widths[-1]
    layers = [nn.Conv2d(latent_dim, latent_dim, 1), nn.Conv2d(latent_dim, before, 3, padding=1)]
    layers += middle(before)
    for i in reversed(range(len(widths))):
        layers += level(i, before, widths[i], depth + 1)
        if i > 0:
            layers.append(upsample(widths[i]))
        before = widths[i]
    layers += [group_norm(before), nn.SiLU(), nn.Conv2d(before, 3, 3, padding=1)]
    return nn.Sequential(*layers)


@dataclass
class LDMConfig:
    """config.json of ldm and vavae. The defaults are Table 1's CNN: 70.29M parameters and 389.43
    GFLOPs at 256 px (without the matrix products of attention).

    The table's values, 70.3M and 389.4, determine the KL moments (69.99M without them) and the
    attention (65.04M with only that of the middle), but not LDM's two 1x1 convolutions beside the
    latents (70.27M, 389.42 without them).
    """
    image_size: int = 256
    latent_dim: int = 64
    # channels of each level, finest first; five levels halve the grid four times: f16
    widths: list = field(default_factory=lambda: [128, 128, 256, 256, 512])
    depth: int = 2                        # residual blocks per level; one more in the decoder
    encoder_width: int | None = None      # D of VA-VAE's frozen encoder; null: LDM

    # class attributes, not fields: eval.py and dit.py read them from any model's config
    train_clip = False
    train_reconstruction = True

    @property
    def vision_patch_size(self):
        return 2 ** (len(self.widths) - 1)

    @classmethod
    def of_size(cls, size, image, patch, latent_dim, encoder_width=None):
        if patch not in MULTIPLES:
            known = ", ".join(map(str, MULTIPLES))
            raise ValueError(f"--patch {patch}: a convolutional autoencoder halves the image "
                             f"several times; wanted one of {known}, and a multiple as --image")
        width = WIDTH_SMALL if size in SMALL else WIDTH
        widths = [width * factor for factor in MULTIPLES[patch]]
        return cls(image, latent_dim, widths, 2, encoder_width)


class LDM(nn.Module):
    """The convolutional autoencoder of ldm and vavae. The encoder gives a Gaussian per position:
    training and the latents of a DiT take samples, evaluation takes the mean."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        d = config.latent_dim
        self.encoder = conv_encoder(config.widths, config.depth, 2 * d)
        self.decoder = conv_decoder(config.widths, config.depth, d)
        if config.encoder_width:
            # VA-VAE: from the latents to the features of the frozen encoder, for its losses only
            self.project = nn.Conv2d(d, config.encoder_width, 1, bias=False)

    def moments(self, img):
        """-> mean, log-variance of the latents, each (B, d, h, w)"""
        mean, logvar = to_fp32(self.encoder(img)).chunk(2, 1)
        return mean, logvar.clamp(-30, 20)                            # LDM

    def get_reconstruction_latents(self, image):
        """image (B, 3, H, W), ImageNet-normalised -> latents (B, d, h, w)"""
        mean, logvar = self.moments(image)
        return mean

    def sample_latents(self, image, rngs):
        """image (B, 3, H, W), rngs: B numpy Generators -> samples of the latents (B, d, h, w)

        A DiT is trained on samples, not on means: LDM, and LightningDiT's extract_features.py.
        """
        mean, logvar = self.moments(image)
        noise = [rng.standard_normal(mean.shape[1:], dtype="float32") for rng in rngs]
        return reparameterize(mean, logvar, torch.from_numpy(np.stack(noise)).to(mean))

    def get_latents_decoded_images(self, latents):
        """latents (B, d, h, w) -> images (B, 3, H, W), ImageNet-normalised, not clamped"""
        return self.decoder(latents)

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors"""
        kind = "vavae" if self.config.encoder_width else "ldm"
        write_model(folder, {"model_type": kind} | asdict(self.config), self.state_dict())


def load_ldm(folder, found):
    """folder of a run of ldm or vavae, found: its config.json as a dict -> LDM in eval mode

    ValueError or FileNotFoundError if the model cannot be built or its weights cannot be read.
    """
    settings = {name: value for name, value in found.items() if name != "model_type"}
    try:
        model = LDM(LDMConfig(**settings))
    except (TypeError, ValueError, IndexError, RuntimeError) as problem:
        path = Path(folder, "config.json")
        raise ValueError(f"{path} describes no autoencoder that can be built ({problem}); "
                         f"copy it again, or train anew") from None
    load_weights(model, Path(folder, "model.safetensors"))
    return model.eval()


# ---------------------------------------------------------------- LDM
def reparameterize(mean, logvar, noise=None):
    """A sample of the Gaussians. noise from N(0, 1); None: drawn with torch"""
    if noise is None:
        noise = torch.randn_like(mean)
    return mean + (logvar / 2).exp() * noise


def kl_loss(mean, logvar):
    """KL divergence of the Gaussians from N(0, 1), in nats per image: a sum over its latents"""
    return (mean ** 2 + logvar.exp() - 1 - logvar).sum() / 2 / len(mean)


def kl_term(mean, logvar, img):
    """LDM sums its losses over the 3HW values of an image. We take their mean, so KL is divided by
    3HW."""
    return KL * kl_loss(mean, logvar) / img[0].numel()


def reconstruct_ldm(model, img):
    """img (B, 3, H, W) -> pixels (B, 3, H, W), {'kl': ()}"""
    mean, logvar = model.moments(img)
    pixels = model.get_latents_decoded_images(reparameterize(mean, logvar))
    return pixels, {"kl": kl_term(mean, logvar, img)}


# ---------------------------------------------------------------- VA-VAE
def mcos_loss(z, f, margin=MARGIN_COS):
    """Marginal cosine similarity: each latent points in the direction of its feature.   VA-VAE

    z (B, D, h, w) projected latents      f (B, D, h, w) features
    """
    return F.relu(1 - margin - F.cosine_similarity(z, f)).mean()


def mdms_loss(z, f, margin=MARGIN_MATRIX):
    """Marginal distance matrix similarity: two positions have the same cosine similarity in the
    latents as in the features.   VA-VAE

    z (B, D, h, w) projected latents      f (B, D, h, w) features, perhaps of another D
    """
    z = F.normalize(z.flatten(2), dim=1)                              # (B, D, N)
    f = F.normalize(f.flatten(2), dim=1)
    difference = z.transpose(1, 2) @ z - f.transpose(1, 2) @ f        # (B, N, N)
    return F.relu(difference.abs() - margin).mean()


@torch.no_grad()
def encoder_features(encoder, img, h, w):
    """Patch features of the frozen encoder on the grid of the latents, (B, D, h, w)

    The image is resized to h*p x w*p, where p is the encoder's patch size.
    """
    p = encoder.config.vision_patch_size
    if img.shape[-2:] != (h * p, w * p):
        img = F.interpolate(img, (h * p, w * p), mode="bicubic", antialias=True)      # ours
    cls, patches = encoder.trunk(img)                                 # patches (B, N, D)
    return to_fp32(patches.transpose(1, 2).unflatten(2, (h, w)))


def reconstruct_vavae(encoder, perceptual, model, img):
    """img (B, 3, H, W) -> pixels (B, 3, H, W), {'kl': (), 'align': ()}

    Both alignment losses read the projected latents, as in VA-VAE's code.
    """
    mean, logvar = model.moments(img)
    z = reparameterize(mean, logvar)                                  # (B, d, h, w)
    pixels = model.get_latents_decoded_images(z)
    f = encoder_features(encoder, img, *z.shape[-2:])                 # (B, D, h, w)
    with torch.autocast(img.device.type, enabled=False):              # losses in float32
        projected = model.project(z)                                  # (B, D, h, w)
        align = mcos_loss(projected, f) + mdms_loss(projected, f)
        l1, lpips = gan.pixel_losses(pixels, img, perceptual, DATA_RANGE)
        last_conv = model.encoder[-2].weight                          # the encoder's last 3x3 one
        # VA-VAE's w_adaptive, with its upper limit
        weight = gan.adaptive_weight(l1 + lpips, align, last_conv, largest=1e8)
    return pixels, {"kl": kl_term(mean, logvar, img), "align": W_ALIGN * weight * align}


# ---------------------------------------------------------------- RAE
def reconstruct_rae(model, img):
    """img (B, 3, H, W) -> pixels (B, 3, H, W), no further losses

    The decoder is trained on noisy latents, so that it tolerates the errors of a DiT. The noise
    level of each image is uniform up to TAU (RAE's code; its paper has |N(0, TAU^2)|), relative to
    the features before the gain of the last norm: RAE removes that gain, here the encoder stays as
    it is.
    """
    with torch.no_grad():
        z = model.get_reconstruction_latents(img)                     # (B, D, h, w)
        level = TAU * torch.rand(len(z), 1, 1, 1, device=z.device)
        gain = model.trunk.norm.weight[:, None, None]                 # (D, 1, 1)
        z = z + level * gain * torch.randn_like(z)
    return model.get_latents_decoded_images(z), {}


def build_rae(encoder, size, image, light_decoder=False):
    """The encoder's trunk, frozen and without a bottleneck, and a new decoder -> VTPModel"""
    patch = encoder.config.vision_patch_size
    config = VTPConfig.of_size(size, image, patch, None, clip=False, light_decoder=light_decoder)
    copied = {"rope_dtype": encoder.config.rope_dtype}
    for name, value in asdict(encoder.config).items():
        if name.startswith("vision"):
            copied[name] = value
    copied |= {"vision_feature_bottleneck": None, "vision_bottleneck_ae_only": True}
    model = VTPModel(replace(config, **copied))
    weights = {}
    for name, value in encoder.trunk.state_dict().items():
        if not name.startswith("feature_bottleneck"):
            weights[name] = value
    model.trunk.load_state_dict(weights)
    model.trunk.requires_grad_(False)
    return model


# ---------------------------------------------------------------- the command
def main(argv, clean_batches, prefetch):
    """python train.py --baseline ... -> exit status"""
    args = parse_arguments(argv)
    device, precision = gan.setup(args)
    encoder = None
    if args.encoder:
        encoder = VTPModel.from_pretrained(args.encoder).to(device).requires_grad_(False)
    inherit_settings(args, encoder)
    torch.manual_seed(args.seed)
    if args.baseline == "rae":
        model = build_rae(encoder, args.size, args.image, args.light_decoder)
        reconstruct = reconstruct_rae
        last_layer = model.pixel_decoder.proj_out
        data_range = 1                                                # pixels in [0, 1]: RAE
    else:
        width = encoder.config.vision_embed_dim if encoder else None
        model = LDM(LDMConfig.of_size(args.size, args.image, args.patch, args.latent_dim, width))
        reconstruct = reconstruct_ldm
        if encoder:
            perceptual = None
            if args.perceptual != "none":
                perceptual = Perceptual(args.perceptual).to(device)
            reconstruct = partial(reconstruct_vavae, encoder, perceptual)
        last_layer = model.decoder[-1]
        data_range = DATA_RANGE
    grid = args.image // args.patch
    frozen = f", frozen encoder {args.encoder}" if encoder else ""
    print0(f"baseline     {args.baseline}{frozen}; latents {args.latent_dim} x {grid} x {grid}")
    model.to(device)
    return gan.train_with_gan(args, model, reconstruct, last_layer.weight, device, precision,
                              clean_batches, prefetch, data_range)


def inherit_settings(args, encoder):
    """Flags that were not given: image size and patch from the encoder if there is one, the rest
    from the tables"""
    if encoder:
        args.image = args.image or encoder.config.image_size
        args.patch = args.patch or encoder.config.vision_patch_size
    if args.baseline == "rae":
        args.latent_dim = encoder.config.vision_embed_dim
    gan.fill_defaults(args, args.size, FLAG_DEFAULTS | RECIPE)
    gan.check_image(args)


def parse_arguments(argv):
    """argv without the program's name -> Namespace. Flags to be inherited are None."""
    p = gan.new_parser("train.py --baseline", __doc__, RECIPE)
    p.add_argument("--baseline", choices=["ldm", "vavae", "rae"], help="see above")
    p.add_argument("--encoder", metavar="RUN",
                   help="vavae, rae: the frozen encoder, a run or released weights")
    p.add_argument("--out", help="run folder; a checkpoint there is continued "
                                 "(default runs/BASELINE)")
    p.add_argument("--data", default="shapes", help="as in stage 1 (default %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="same seed, same run (default %(default)s)")
    p.add_argument("--size", default="nano", choices=[*SIZES],
                   help="width of the CNN, or size of rae's decoder (default %(default)s)")
    gan.add_sized_flag(p, FLAG_DEFAULTS, "--image", int, "side of the images")
    gan.add_sized_flag(p, FLAG_DEFAULTS, "--patch", int, "side of a latent, in pixels")
    gan.add_sized_flag(p, FLAG_DEFAULTS, "--latent-dim", int, "d, channels of a latent")
    gan.add_common_flags(p, FLAG_DEFAULTS)
    args = p.parse_args(argv)
    args.out = args.out or f"runs/{args.baseline}"
    gan.read_settings(args, RECIPE)
    check_arguments(args)
    gan.check_values(args)
    return args


def check_arguments(args):
    """ValueError for flags that this baseline does not have"""
    if args.baseline == "ldm" and args.encoder:
        raise ValueError("--baseline ldm is trained on pixels only: leave --encoder out")
    if args.baseline != "ldm" and not args.encoder:
        raise ValueError(f"--baseline {args.baseline} needs a frozen encoder: --encoder RUN, "
                         f"a run of train.py or released weights")
    if args.baseline == "rae" and (args.patch or args.latent_dim):
        raise ValueError("--baseline rae has no use for --patch and --latent-dim: "
                         "both are those of the encoder")
    if args.baseline != "rae" and args.light_decoder is not None:
        raise ValueError(f"--baseline {args.baseline} has no use for --set light_decoder: "
                         f"its decoder is convolutional")
