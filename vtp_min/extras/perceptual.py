"""Perceptual losses between an image and its reconstruction, chosen by --perceptual.   VTP Sec. 3.2

    vgg, alex, squeeze   LPIPS, the loss of the paper (reference [35]): a distance of two images in
                         the feature space of a frozen ImageNet network. The networks are external
                         weights (weights.py).
    efficientnet         ours, not LPIPS: the form of LPIPS on EfficientNet-Lite0, whose weights
                         pip can install (efficientnet.py)
    none                 no perceptual loss: L1 alone

Both losses are modules with the same members:
    forward(pixels, target)   ImageNet-normalised images -> the loss (): mean distance over the
                              batch, for efficientnet times WEIGHT
    distances(a, b)           images in [0, 1] -> the distance of each pair (B,)
    metric, protocol          name and description of the number that eval.py recon records

B images    H, W sides in pixels    C channels of a feature map
"""
import torch
from torch import nn
from torch.nn import functional as F

from ..augment import denormalize
from ..device import full_precision
from .efficientnet import EfficientNetLite0
from .files import read_settings
from .weights import find, heads

CHOICES = ["vgg", "alex", "squeeze", "efficientnet", "none"]        # of --perceptual
HELP = ("vgg, alex, squeeze: network of LPIPS, fetched by eval.py fetch; none: L1 only; "
        "efficientnet: a perceptual loss of ours on EfficientNet-Lite0, not LPIPS (pip install -r "
        "requirements-study.txt)")
OURS = "perceptual (EfficientNet-Lite0, ours, not LPIPS)"


def build(kind):
    """kind  a choice of --perceptual except 'none' -> the loss, frozen"""
    return EfficientNetPerceptual() if kind == "efficientnet" else Perceptual(kind)


def describe(kind):
    """-> a choice of --perceptual in words"""
    if kind == "none":
        return "no perceptual loss (--perceptual none)"
    return OURS if kind == "efficientnet" else f"LPIPS ({kind})"


def check_side(height, width):
    if min(height, width) < 32:
        raise ValueError(f"images of {width}x{height} pixels are too small for a perceptual loss; "
                         f"use 32 pixels or more, or --perceptual none")


class PerceptualLoss(nn.Module):
    """Base class; a subclass has `distances`"""

    @full_precision()
    def forward(self, pixels, target):
        """Mean distance over the batch. Computed in float32, also inside autocast.

        pixels, target  (B, 3, H, W), ImageNet-normalised, H and W at least 32 -> scalar
        """
        check_side(*pixels.shape[-2:])
        dtype = torch.get_default_dtype()      # of the weights; pixels can be bf16 under autocast
        return self.distances(denormalize(pixels).to(dtype), denormalize(target).to(dtype)).mean()


# ---------------------------------------------------------------- LPIPS
class Perceptual(PerceptualLoss):
    """LPIPS as implemented by the package lpips

    net           network of the features: 'vgg', 'alex' or 'squeeze'
    random_trunk  True: random weights instead of ImageNet weights, for tests
    FileNotFoundError, with the command that downloads the file, if the weights are missing.
    """
    metric = "LPIPS"

    def __init__(self, net, random_trunk=False):
        super().__init__()
        self.protocol = f"{net}, v0.1"
        path = None
        if not random_trunk:
            try:
                path = find(net)
            except FileNotFoundError as problem:
                raise FileNotFoundError(f"{problem}; or use L1 alone: --perceptual none; or a loss "
                                        f"that is not LPIPS, but that pip can install: "
                                        f"--perceptual efficientnet") from None
        import lpips                          # here, because the import is slow
        # pnet_rand=True: otherwise the package would download the network itself
        self.lpips = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        if path:
            heads(net)                        # checks that the linear heads are the published ones
            self.load_trunk(path)
        self.requires_grad_(False)            # in the package, the linear heads are trainable
        self.train(False)

    def load_trunk(self, path):
        """Load the ImageNet weights of torchvision's network.

        LPIPS divides the network into slices: its 'slice1.0.weight' is torchvision's
        'features.0.weight'.
        """
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        trunk = {}
        for name in self.lpips.net.state_dict():
            trunk[name] = tensors["features." + name.split(".", 1)[1]]
        self.lpips.net.load_state_dict(trunk)

    def train(self, mode=True):
        # Always in eval mode: the heads contain Dropout, and the parent module may call .train().
        return super().train(False)

    def distances(self, a, b):
        """a, b  (B, 3, H, W) in [0, 1] -> LPIPS of each pair, (B,)"""
        return self.lpips(2 * a - 1, 2 * b - 1).flatten(1).mean(1)      # it expects [-1, 1]


# ---------------------------------------------------------------- ours, on EfficientNet-Lite0
class EfficientNetPerceptual(PerceptualLoss):
    """The form of LPIPS on the resolutions of EfficientNet-Lite0. All choices are ours: LPIPS has
    other networks, and weights that were fitted to judgements of people.

    Resolutions below 8 x 8 are left out: two of five are used for 32 px, all for 256 px. As a loss,
    the distance has the weight 0.1. With all five resolutions and weight 1, its gradient with
    respect to the reconstructions of a trained model is 54 times as long as that of L1, at an angle
    with a cosine of 0.12 (32 px), so L1 has hardly any effect, and short trainings become worse by
    every measure. study/protocol.md has the numbers. Other sizes of images were not tried.
    FileNotFoundError, with the command that installs the network, if it is missing.
    """
    metric = "perceptual distance (EfficientNet, not LPIPS)"
    WEIGHT = 0.1
    SMALLEST = 8
    protocol = f"{OURS}, resolutions of {SMALLEST} x {SMALLEST} or more"

    def __init__(self):
        super().__init__()
        self.net = EfficientNetLite0()

    def forward(self, pixels, target):
        """As in PerceptualLoss, times WEIGHT"""
        return self.WEIGHT * super().forward(pixels, target)

    def distances(self, a, b):
        """a, b  (B, 3, H, W) in [0, 1] -> the distance of each pair, (B,)"""
        return feature_distance(self.net.stages(a, self.SMALLEST),
                                self.net.stages(b, self.SMALLEST))


def feature_distance(a, b):
    """LPIPS with all weights 1: of unit vectors, the squared difference, averaged over positions
    and summed over stages.   Zhang et al. 2018, Eq. 1

    a, b  features of two batches of images: lists of (B, C, h, w), one for each stage -> (B,)
    """
    total = 0
    for x, y in zip(a, b, strict=True):
        x = F.normalize(x, dim=1)                          # (B, C, h, w), length 1 at each position
        y = F.normalize(y, dim=1)
        total = total + (x - y).square().sum(1).mean((1, 2))
    return total


# ---------------------------------------------------------------- what a run was trained with
def uses_efficientnet(settings):
    """True if EfficientNet's features trained the decoder of a run, or the run that it began from.
    Then EfficientNet is not an independent judge of its images.   settings  those of run.json"""
    own = settings.get("perceptual") == "efficientnet" and settings.get("w_rec", 1) > 0
    return own or settings.get("perceptual_of_init") == "efficientnet"


def inherited(args):
    """-> the entry perceptual_of_init of run.json, {} if the run in --init or --encoder was trained
    without EfficientNet. So the fact stays known if that run is moved or deleted."""
    folders = [getattr(args, "init", None), getattr(args, "encoder", None)]
    known = not args.fresh and "perceptual_of_init" in read_settings(args.out)
    if known or any(uses_efficientnet(read_settings(folder)) for folder in folders):
        return {"perceptual_of_init": "efficientnet"}
    return {}
