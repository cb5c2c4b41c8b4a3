"""The tokenizers that the paper compares VTP with.   VTP Table 1, Fig. 8, Fig. 9

    ldm      a convolutional autoencoder, trained for reconstruction only
             LDM (Rombach et al. 2022), [25] in the paper
    vavae    the same autoencoder; its latents are aligned with patch features of a frozen encoder
             VA-VAE (Yao et al. 2025), [33]
    rae      a decoder for the patch features of a frozen encoder, which are the latents
             RAE (Zheng et al. 2025), [36]

    python train.py --baseline ldm
    python train.py --baseline vavae --encoder RUN
    python train.py --baseline rae --encoder RUN      RUN: a run of train.py, or released weights

All three are trained with L1 + LPIPS + GAN by the training loop of stage 2 (gan.py). The run folder
has the same layout, so eval.py and dit.py can read it (model.load_model).

The three baselines share one recipe, mostly RAE's, so that they can be compared. The originals
differ: LDM and VA-VAE use Adam with betas 0.5 and 0.9, a constant learning rate and no EMA, and
their GAN loss starts at step 50001 and 5001. None of the three clips gradients. L1 is computed in
the pixel range of each original: [0, 1] for RAE, [-1, 1] for the others. In the paper, the frozen
encoder of VA-VAE and RAE is DINOv2. Here it is a VTPModel, so Fig. 8 and 9 are imitated, not
reproduced. Training noise depends on the rank: a resumed run draws the same noise, but a run with
another number of processes draws different noise.

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
from .perceptual import build

KL = 1e-6                    # weight of the KL loss: LDM
DATA_RANGE = 2               # L1 of pixels in [-1, 1]: LDM, VA-VAE; see gan.pixel_losses
MARGIN_COS = 0.5             # margin of the cosine loss: VA-VAE, m1
MARGIN_MATRIX = 0.25         # margin of the distance matrix loss: VA-VAE, m2
W_ALIGN = 0.1                # weight of both together: VA-VAE's w_hyper
TAU = 0.8                    # largest standard deviation of the noise on the latents: RAE
ATTENTION = 16               # smallest downsampling factor at which a level has attention. For an
                             # image of 256 px this is where LDM has it: on the 16x16 grid of f16,
                             # on the 16x16 and 8x8 grids of f32, on no grid of f4 and f8
WIDTH = 128                  # channels at full resolution: LDM. S, B and L all select this CNN
WIDTH_SMALL = 32             # the same for pico, nano and micro: ours
MULTIPLES = {                # {patch size: channels of each level, in units of WIDTH}: LDM
    4: [1, 2, 4],
    8: [1, 2, 4, 4],
    16: [1, 1, 2, 2, 4],
    32: [1, 1, 2, 2, 4, 4],
}
# name: (our default for pico, nano and micro; default for S, B and L; source of the second)
FLAG_DEFAULTS = gan.FLAG_DEFAULTS | {
    "image": (64, 256, "paper Sec. 4.2; with --encoder: that of the encoder"),
    "patch": (16, 16, "paper: f16; with --encoder: that of the encoder"),
    "latent_dim": (64, 64, "paper: d64; rae: width of the encoder"),
}
RECIPE = gan.RECIPE | {
    "light_decoder": (False, False, "paper Sec. 4.1; rae: 4 ViT-L layers, for fast experiments"),
}


# ---------------------------------------------------------------- LDM's convolutional autoencoder
def group_norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResBlock(nn.Module):
    """Residual block of two convolutions, each after a norm and SiLU

    (B, in_channels, h, w) -> (B, out_channels, h, w)
    """
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.branch = nn.Sequential(
            group_norm(in_channels), nn.SiLU(), nn.Conv2d(in_channels, out_channels, 3, padding=1),
            group_norm(out_channels), nn.SiLU(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity()
        if in_channels != out_channels:
            self.skip = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x):
        return self.skip(x) + self.branch(x)


class AttnBlock(nn.Module):
    """Residual self-attention over the N = h*w positions, with one head

    (B, c, h, w) -> the same shape
    """
    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).flatten(2).mT.chunk(3, 2)    # (B, N, c) each
        y = F.scaled_dot_product_attention(q, k, v).mT                # (B, c, N)
        return x + self.proj(y.unflatten(2, x.shape[-2:]))


def downsample(channels):
    """(B, c, h, w) -> (B, c, h/2, w/2). LDM pads only at the right and at the bottom."""
    return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))


def upsample(channels):
    """(B, c, h, w) -> (B, c, 2h, 2w)"""
    return nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"),
                         nn.Conv2d(channels, channels, 3, padding=1))


def middle(channels):
    """Layers at the lowest resolution, next to the latents. They always have attention."""
    return [ResBlock(channels, channels), AttnBlock(channels), ResBlock(channels, channels)]


def level(i, in_channels, out_channels, depth):
    """Layers of level i, whose grid is downsampled by 2**i: `depth` residual blocks, each followed
    by attention if the factor is at least ATTENTION"""
    layers = []
    for _ in range(depth):
        layers.append(ResBlock(in_channels, out_channels))
        if 2 ** i >= ATTENTION:
            layers.append(AttnBlock(out_channels))
        in_channels = out_channels
    return layers


def conv_encoder(widths, depth, out_channels):
    """Encoder: img (B, 3, H, W) -> (B, out_channels, h, w)

    widths  channels of each level, from full resolution to the lowest      depth  see level()
    """
    layers = [nn.Conv2d(3, widths[0], 3, padding=1)]
    in_channels = widths[0]
    for i, width in enumerate(widths):
        layers += level(i, in_channels, width, depth)
        if i < len(widths) - 1:
            layers.append(downsample(width))
        in_channels = width
    layers += middle(width)
    layers += [group_norm(width), nn.SiLU(), nn.Conv2d(width, out_channels, 3, padding=1)]
    layers.append(nn.Conv2d(out_channels, out_channels, 1))           # LDM has this extra 1x1
    return nn.Sequential(*layers)


def conv_decoder(widths, depth, latent_dim):
    """Decoder: z (B, d, h, w) -> pixels (B, 3, H, W). Each level has depth + 1 residual blocks."""
    width = widths[-1]
    layers = [nn.Conv2d(latent_dim, latent_dim, 1),                   # LDM has this extra 1x1
              nn.Conv2d(latent_dim, width, 3, padding=1)]
    layers += middle(width)
    in_channels = width
    for i in reversed(range(len(widths))):
        layers += level(i, in_channels, widths[i], depth + 1)
        if i > 0:
            layers.append(upsample(widths[i]))
        in_channels = widths[i]
    layers += [group_norm(in_channels), nn.SiLU(), nn.Conv2d(in_channels, 3, 3, padding=1)]
    return nn.Sequential(*layers)


@dataclass
class LDMConfig:
    """config.json of ldm and vavae. The defaults are the CNN of Table 1: 70.29M parameters and
    389.43 GFLOPs at 256 px (without the matrix products of attention).

    The paper gives only the totals, 70.3M and 389.4 GFLOPs. They show that the encoder also has
    outputs for the log-variance (69.99M without them) and that its levels have attention (65.04M
    with attention in the middle only). They leave open whether it has LDM's two 1x1 convolutions
    next to the latents (70.27M and 389.42 GFLOPs without them).
    """
    image_size: int = 256
    latent_dim: int = 64
    # channels of each level, full resolution first; five levels halve the grid four times: f16
    widths: list = field(default_factory=lambda: [128, 128, 256, 256, 512])
    depth: int = 2                        # residual blocks per level; the decoder has one more
    encoder_width: int | None = None      # D of VA-VAE's frozen encoder; null: LDM

    # without type annotations, so these are not fields of the dataclass and not in config.json;
    # eval.py and dit.py read them from the config of any model
    train_clip = False
    train_reconstruction = True

    @property
    def vision_patch_size(self):
        """Downsampling factor of the encoder, under the name that VTPConfig uses"""
        return 2 ** (len(self.widths) - 1)

    @classmethod
    def of_size(cls, size, image, patch, latent_dim, encoder_width=None):
        """-> LDMConfig. size: a key of SIZES. image, patch: sides in pixels.

        ValueError for a patch that is not in MULTIPLES.
        """
        if patch not in MULTIPLES:
            known = ", ".join(map(str, MULTIPLES))
            raise ValueError(f"--patch {patch}: the convolutional autoencoder halves the image "
                             f"several times, so --patch must be one of {known}")
        width = WIDTH_SMALL if size in SMALL else WIDTH
        widths = [width * factor for factor in MULTIPLES[patch]]
        return cls(image, latent_dim, widths, 2, encoder_width)


class LDM(nn.Module):
    """The convolutional autoencoder of ldm and vavae

    The encoder outputs a Gaussian for each position. Training and the latents of a DiT use samples
    of it; evaluation uses its mean.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        d = config.latent_dim
        self.encoder = conv_encoder(config.widths, config.depth, 2 * d)
        self.decoder = conv_decoder(config.widths, config.depth, d)
        if config.encoder_width:
            # VA-VAE: maps latents to the width of the frozen encoder; used by its losses only
            self.project = nn.Conv2d(d, config.encoder_width, 1, bias=False)

    def moments(self, img):
        """img (B, 3, H, W) -> mean and log-variance of the latents, each (B, d, h, w)"""
        mean, logvar = to_fp32(self.encoder(img)).chunk(2, 1)
        return mean, logvar.clamp(-30, 20)                            # LDM: exp stays finite

    def get_reconstruction_latents(self, image):
        """image (B, 3, H, W), ImageNet-normalised -> mean of the latents (B, d, h, w)"""
        mean, logvar = self.moments(image)
        return mean

    def sample_latents(self, image, rngs):
        """image (B, 3, H, W) -> samples of the latents (B, d, h, w)

        rngs  B numpy Generators, one for each image

        A DiT is trained on samples, not on means, as in LDM and in LightningDiT's
        extract_features.py.
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


def load_ldm(folder, config):
    """Load a run of ldm or vavae -> LDM in eval mode

    config  its config.json as a dict

    ValueError or FileNotFoundError if the model cannot be built or its weights cannot be read.
    """
    settings = {name: value for name, value in config.items() if name != "model_type"}
    try:
        model = LDM(LDMConfig(**settings))
    except (TypeError, ValueError, IndexError, RuntimeError) as problem:
        path = Path(folder, "config.json")
        raise ValueError(f"{path} is damaged: no autoencoder can be built from it ({problem}); "
                         f"copy the file again, or train again") from None
    load_weights(model, Path(folder, "model.safetensors"))
    return model.eval()


# ---------------------------------------------------------------- LDM
def reparameterize(mean, logvar, noise=None):
    """Mean and log-variance of Gaussians -> a sample of each, of the same shape

    noise  standard normal numbers of that shape; None: drawn from torch's global generator
    """
    if noise is None:
        noise = torch.randn_like(mean)
    return mean + (logvar / 2).exp() * noise


def kl_loss(mean, logvar):
    """KL divergence of the Gaussians from N(0, 1) -> (), in nats per image: the sum over all
    latents of an image"""
    return (mean ** 2 + logvar.exp() - 1 - logvar).sum() / 2 / len(mean)


def kl_term(mean, logvar, img):
    """The weighted KL loss. LDM sums L1 over the 3HW values of an image, while we average it. So we
    also divide the KL loss by 3HW, which keeps the ratio of both losses."""
    return KL * kl_loss(mean, logvar) / img[0].numel()


def reconstruct_ldm(model, img):
    """img (B, 3, H, W) -> pixels (B, 3, H, W), {'kl': ()}; for gan.train_with_gan"""
    mean, logvar = model.moments(img)
    pixels = model.get_latents_decoded_images(reparameterize(mean, logvar))
    return pixels, {"kl": kl_term(mean, logvar, img)}


# ---------------------------------------------------------------- VA-VAE
def mcos_loss(z, f, margin=MARGIN_COS):
    """Marginal cosine similarity loss: at each position, latent and feature should have a cosine
    similarity of at least 1 - margin.   VA-VAE

    z (B, D, h, w) projected latents      f (B, D, h, w) features of the frozen encoder
    """
    return F.relu(1 - margin - F.cosine_similarity(z, f)).mean()


def mdms_loss(z, f, margin=MARGIN_MATRIX):
    """Marginal distance matrix similarity loss: the cosine similarity of two positions should be
    the same in the latents and in the features, up to margin.   VA-VAE

    z (B, D, h, w) projected latents      f (B, D', h, w) features of the frozen encoder
    """
    z = F.normalize(z.flatten(2), dim=1)                              # (B, D, N)
    f = F.normalize(f.flatten(2), dim=1)                              # (B, D', N)
    difference = z.transpose(1, 2) @ z - f.transpose(1, 2) @ f        # (B, N, N)
    return F.relu(difference.abs() - margin).mean()


@torch.no_grad()
def encoder_features(encoder, img, h, w):
    """Patch features of the frozen encoder on the latent grid: img (B, 3, H, W) -> (B, D, h, w)

    The image is resized to h*p x w*p, where p is the patch size of the encoder.
    """
    p = encoder.config.vision_patch_size
    if img.shape[-2:] != (h * p, w * p):
        img = F.interpolate(img, (h * p, w * p), mode="bicubic", antialias=True)      # ours
    cls, patches = encoder.trunk(img)                                 # patches (B, N, D)
    return to_fp32(patches.transpose(1, 2).unflatten(2, (h, w)))


def reconstruct_vavae(encoder, perceptual, model, img):
    """img (B, 3, H, W) -> pixels (B, 3, H, W), {'kl': (), 'align': ()}; for gan.train_with_gan

    Both alignment losses are computed from the projected latents, as in VA-VAE's code. An adaptive
    weight gives their gradient the norm of the gradient of L1 + LPIPS, then W_ALIGN scales it.
    """
    mean, logvar = model.moments(img)
    z = reparameterize(mean, logvar)                                  # (B, d, h, w)
    pixels = model.get_latents_decoded_images(z)
    f = encoder_features(encoder, img, *z.shape[-2:])                 # (B, D, h, w)
    with torch.autocast(img.device.type, enabled=False):              # losses in float32
        projected = model.project(z)                                  # (B, D, h, w)
        align = mcos_loss(projected, f) + mdms_loss(projected, f)
        l1, lpips = gan.pixel_losses(pixels, img, perceptual, DATA_RANGE)
        last_conv = model.encoder[-2].weight                          # last 3x3 convolution
        # VA-VAE's w_adaptive, with the upper limit of its code
        weight = gan.adaptive_weight(l1 + lpips, align, last_conv, largest=1e8)
    return pixels, {"kl": kl_term(mean, logvar, img), "align": W_ALIGN * weight * align}


# ---------------------------------------------------------------- RAE
def reconstruct_rae(model, img):
    """img (B, 3, H, W) -> pixels (B, 3, H, W), no further losses; for gan.train_with_gan

    The decoder is trained on noisy latents, so that it tolerates the errors of a DiT. The standard
    deviation of the noise is drawn for each image: uniform in [0, TAU) as in RAE's code (its paper
    has |N(0, TAU^2)|). RAE removes the gain of the encoder's last norm. We keep the encoder
    unchanged and multiply the noise by that gain instead.
    """
    with torch.no_grad():
        z = model.get_reconstruction_latents(img)                     # (B, D, h, w)
        std = TAU * torch.rand(len(z), 1, 1, 1, device=z.device)
        gain = model.trunk.norm.weight[:, None, None]                 # (D, 1, 1)
        z = z + std * gain * torch.randn_like(z)
    return model.get_latents_decoded_images(z), {}


def build_rae(encoder, size, image, light_decoder=False):
    """-> VTPModel with the frozen trunk of `encoder`, no bottleneck and a new decoder

    size, light_decoder  of the decoder      image  side in pixels
    """
    patch = encoder.config.vision_patch_size
    config = VTPConfig.of_size(size, image, patch, None, clip=False, light_decoder=light_decoder)
    copied = {"rope_dtype": encoder.config.rope_dtype}
    for name, value in asdict(encoder.config).items():
        if name.startswith("vision"):
            copied[name] = value
    # no bottleneck: the latents are the features of full width D
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
        data_range = 1                                                # L1 of [0, 1] pixels: RAE
    else:
        width = encoder.config.vision_embed_dim if encoder else None
        model = LDM(LDMConfig.of_size(args.size, args.image, args.patch, args.latent_dim, width))
        reconstruct = reconstruct_ldm
        if encoder:
            perceptual = None
            if args.perceptual != "none":
                perceptual = build(args.perceptual).to(device)
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
    """Fill in the flags that were not given: image size and patch size from the encoder if there is
    one, all others from the tables. ValueError if the image has no whole number of patches."""
    if encoder:
        args.image = args.image or encoder.config.image_size
        args.patch = args.patch or encoder.config.vision_patch_size
    if args.baseline == "rae":
        args.latent_dim = encoder.config.vision_embed_dim
    gan.fill_defaults(args, args.size, FLAG_DEFAULTS | RECIPE)
    gan.check_image(args)


def parse_arguments(argv):
    """argv, without the name of the program -> Namespace. None: not given; inherit_settings fills
    it in. ValueError for flags or values that do not fit the baseline."""
    p = gan.new_parser("train.py --baseline", __doc__, RECIPE)
    p.add_argument("--baseline", choices=["ldm", "vavae", "rae"],
                   help="the tokenizer to train, see above")
    p.add_argument("--encoder", metavar="RUN",
                   help="vavae, rae: the frozen encoder, a run of train.py or released weights")
    p.add_argument("--out", help="run folder; if it holds a checkpoint, training continues "
                                 "(default runs/BASELINE)")
    p.add_argument("--data", default="shapes", help="as in stage 1 (default %(default)s)")
    p.add_argument("--seed", type=int, default=0,
                   help="an equal seed gives an equal run (default %(default)s)")
    p.add_argument("--size", default="nano", choices=[*SIZES],
                   help="ldm, vavae: width of the CNN; rae: size of the decoder "
                        "(default %(default)s)")
    gan.add_sized_flag(p, FLAG_DEFAULTS, "--image", int, "side of the images in pixels")
    gan.add_sized_flag(p, FLAG_DEFAULTS, "--patch", int,
                       "downsampling factor: pixels per latent, along each side")
    gan.add_sized_flag(p, FLAG_DEFAULTS, "--latent-dim", int, "d, channels of a latent")
    gan.add_common_flags(p, FLAG_DEFAULTS)
    args = p.parse_args(argv)
    args.out = args.out or f"runs/{args.baseline}"
    gan.read_settings(args, RECIPE)
    check_arguments(args)
    gan.check_values(args)
    return args


def check_arguments(args):
    """ValueError for a flag that this baseline does not have, or for a missing --encoder"""
    if args.baseline == "ldm" and args.encoder:
        raise ValueError("--baseline ldm has no frozen encoder; leave --encoder out")
    if args.baseline != "ldm" and not args.encoder:
        raise ValueError(f"--baseline {args.baseline} needs a frozen encoder: --encoder RUN, "
                         f"a run of train.py or released weights")
    if args.baseline == "rae" and (args.patch or args.latent_dim):
        raise ValueError("--baseline rae takes --patch and --latent-dim from the encoder; "
                         "leave both out")
    if args.baseline != "rae" and args.light_decoder is not None:
        raise ValueError(f"--baseline {args.baseline} has a convolutional decoder; leave "
                         f"--set light_decoder out")
