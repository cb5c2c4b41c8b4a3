"""The perceptual loss LPIPS between an image and its reconstruction.   VTP Sec. 3.2, its [35]"""
import torch
from torch import nn

from ..device import full_precision
from .weights import find


class Perceptual(nn.Module):
    """LPIPS of the package lpips: distance of two images in the features of a frozen network.

    net  'vgg', 'alex' or 'squeeze'. FileNotFoundError, with the command that downloads the file, if
         the network's weights are missing.
    random_trunk=True takes random weights: enough for tests, useless as a metric.
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
        import lpips                          # imports slowly, and is needed only here
        # pnet_rand: without it the package would download the network
        self.lpips = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        if path:
            self.load_trunk(path)
        self.requires_grad_(False)            # the package leaves the heads trainable
        self.train(False)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

    def load_trunk(self, path):
        """path of torchvision's weights. LPIPS cuts the network into slices: 'slice1.0.weight' is
        torchvision's 'features.0.weight'."""
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        trunk = {}
        for name in self.lpips.net.state_dict():
            trunk[name] = tensors["features." + name.split(".", 1)[1]]
        self.lpips.net.load_state_dict(trunk)

    def train(self, mode=True):
        return super().train(False)           # the heads contain Dropout: never in train mode

    @full_precision()
    def forward(self, pixels, target):
        """Both (B, 3, H, W), ImageNet-normalised, sides of at least 32 -> () mean over the batch"""
        height, width = pixels.shape[-2:]
        if min(height, width) < 32:
            raise ValueError(f"images of {width}x{height} pixels are too small for LPIPS; take 32 "
                             f"pixels or more, or --perceptual none")
        return self.lpips(self.to_lpips(pixels), self.to_lpips(target)).mean()

    def to_lpips(self, x):
        """ImageNet-normalised -> the range [-1, 1], in the dtype of the weights"""
        x = x * self.std + self.mean          # [0, 1]
        return (2 * x - 1).to(self.mean.dtype)
