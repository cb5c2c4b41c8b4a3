"""The perceptual loss LPIPS between an image and its reconstruction.   VTP Sec. 3.2, reference [35]

LPIPS is a distance of two images in the feature space of a frozen ImageNet network. The networks
are external weights (weights.py); `--perceptual none` trains without them.
"""
import torch
from torch import nn

from ..device import full_precision
from .weights import find


class Perceptual(nn.Module):
    """LPIPS as implemented by the package lpips, for ImageNet-normalised images

    net           network of the features: 'vgg', 'alex' or 'squeeze'
    random_trunk  True: random weights instead of ImageNet weights, for tests
    FileNotFoundError, with the command that downloads the file, if the weights are missing.
    """

    def __init__(self, net, random_trunk=False):
        super().__init__()
        path = None
        if not random_trunk:
            try:
                path = find(net)
            except FileNotFoundError as problem:
                raise FileNotFoundError(f"{problem}; or train without LPIPS: --perceptual none"
                                        ) from None
        import lpips                          # here, because the import is slow
        # pnet_rand=True: otherwise the package would download the network itself
        self.lpips = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        if path:
            self.load_trunk(path)
        self.requires_grad_(False)            # in the package, the linear heads are trainable
        self.train(False)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

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

    @full_precision()
    def forward(self, pixels, target):
        """Mean LPIPS distance over the batch

        pixels, target  (B, 3, H, W), ImageNet-normalised, H and W at least 32 -> scalar
        Computed in float32, also inside autocast.
        """
        height, width = pixels.shape[-2:]
        if min(height, width) < 32:
            raise ValueError(f"images of {width}x{height} pixels are too small for LPIPS; use 32 "
                             f"pixels or more, or --perceptual none")
        return self.lpips(self.to_lpips(pixels), self.to_lpips(target)).mean()

    def to_lpips(self, x):
        """ImageNet-normalised -> the range [-1, 1] that LPIPS expects, in the weights' dtype"""
        x = x * self.std + self.mean          # [0, 1]
        return (2 * x - 1).to(self.mean.dtype)
