"""FID (Frechet inception distance), and PSNR and SSIM of reconstructions.

    Inception, load_inception    images -> features (B, 2048), as pytorch-fid computes them
    Moments, statistics          features -> mean (F,), covariance (F, F)
    frechet_distance             two means and covariances -> distance     Heusel et al. 2017, Eq. 6
    psnr, ssim                   two batches of images -> one value per pair of images

FID compares two sets of images: it fits a Gaussian to the Inception features of each set and
computes the distance between the two Gaussians. rFID compares reconstructions with their originals,
gFID compares generated with real images (VTP Sec. 4.1, 4.2). With other features (extras/judges.py)
the distance has another name, and its values are comparable only with each other.

B images of a batch    n images of a set    F width of a feature, 2048 for Inception
"""
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.models.inception import (BasicConv2d, Inception3, InceptionA, InceptionB,
                                          InceptionC, InceptionD, InceptionE)

from .dist import all_reduce_sum, is_distributed


# ---------------------------------------------------------------- Inception-v3 as FID uses it
# FID values are comparable only if the network is exactly the one that was published with
# TensorFlow in 2015. It differs from torchvision's Inception-v3 in the pooling layers.

# divides by the number of pixels inside the image; the pooling in torchvision's blocks divides by 9
avg_pool = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)


class Conv(BasicConv2d):
    """Convolution, batch norm with fixed statistics, ReLU"""

    def forward(self, x):
        conv, bn = self.conv, self.bn
        # with fixed statistics batch norm is linear, so it can be folded into the weights of the
        # convolution, which is 1.09 times as fast on a CPU
        weight, bias = fuse_conv_bn_weights(conv.weight, None, bn.running_mean, bn.running_var,
                                            bn.eps, bn.weight, bn.bias)
        return F.relu(F.conv2d(x, weight, bias, conv.stride, conv.padding), inplace=True)


class BlockA(InceptionA):
    """torchvision's block with another pooling.   x (B, C, 35, 35) -> list of four branches, which
    InceptionA.forward concatenates along the channels"""

    def _forward(self, x):
        branch1x1 = self.branch1x1(x)
        branch5x5 = self.branch5x5_2(self.branch5x5_1(x))
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        branch_pool = self.branch_pool(avg_pool(x))        # the only line that differs
        return [branch1x1, branch5x5, branch3x3dbl, branch_pool]


class BlockC(InceptionC):
    """torchvision's block with another pooling.   x (B, 768, 17, 17) -> list of four branches"""

    def _forward(self, x):
        branch1x1 = self.branch1x1(x)
        branch7x7 = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        branch7x7dbl = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        branch7x7dbl = self.branch7x7dbl_5(self.branch7x7dbl_4(branch7x7dbl))
        branch_pool = self.branch_pool(avg_pool(x))        # the only line that differs
        return [branch1x1, branch7x7, branch7x7dbl, branch_pool]


class BlockE(InceptionE):
    """torchvision's block with self.pool, which Inception sets.   x (B, C, 8, 8) -> list of six
    branches"""

    def _forward(self, x):
        branch1x1 = self.branch1x1(x)
        h = self.branch3x3_1(x)
        branch3x3 = [self.branch3x3_2a(h), self.branch3x3_2b(h)]
        h = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branch3x3dbl = [self.branch3x3dbl_3a(h), self.branch3x3dbl_3b(h)]
        branch_pool = self.branch_pool(self.pool(x))
        return [branch1x1, *branch3x3, *branch3x3dbl, branch_pool]


class Inception(Inception3):
    """The network of FID: torchvision's Inception-v3 with the changes of pytorch-fid, frozen.

    uint8 (B, 3, H, W) of any size -> (B, 2048) float32, the global average pool. The state-dict
    keys are those of pytorch-fid's checkpoint, including the classifier `fc`, which is not used.
    """

    def __init__(self):
        blocks = [BlockA, InceptionB, BlockC, InceptionD, BlockE]
        blocks = [partial(block, conv_block=Conv) for block in blocks]
        # 1008 outputs, as in the network of 2015; None: no auxiliary classifier
        super().__init__(num_classes=1008, aux_logits=False, init_weights=False,
                         inception_blocks=[Conv, *blocks, None])
        self.Mixed_7b.pool = avg_pool
        # the maximum is an error of the network of 2015; FID keeps it
        self.Mixed_7c.pool = nn.MaxPool2d(3, stride=1, padding=1)
        self.eval().requires_grad_(False)
        self.to(memory_format=torch.channels_last)         # 1.6 times as fast on a CPU

    def forward(self, img):
        if img.dtype != torch.uint8:
            raise ValueError(f"found images of {img.dtype}, but Inception needs uint8 in 0..255; "
                             f"for x in [0, 1] give (x * 255).clamp(0, 255).byte()")
        return in_chunks(self.features, img)

    def features(self, img):
        """uint8 (B, 3, H, W) -> (B, 2048)"""
        # as pytorch-fid: without antialiasing, and without keeping the aspect ratio
        x = F.interpolate(img.float() / 255, (299, 299), mode="bilinear")
        x = 2 * x - 1                                      # the network was trained on [-1, 1]
        for name, layer in self.named_children():          # in the order of the forward pass
            x = layer(x)
            if name == "avgpool":                          # only dropout and fc follow
                return x.flatten(1)


def in_chunks(net, img):
    """net(img). A CPU processes 16 images at a time, so that the activations stay in its cache."""
    size = 16 if img.device.type == "cpu" else len(img)
    return torch.cat([net(x) for x in img.split(size)])


def load_inception(device="cpu"):
    """-> Inception() with the weights of FID, on the device

    FileNotFoundError if the weights have not been downloaded; the message says how to fetch them.
    ValueError if the file holds other weights.
    """
    from .extras.weights import find
    model, path = Inception(), find("inception")
    weights = torch.load(path, map_location="cpu", weights_only=True)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    # batch norm counts its training batches; published files may lack the counters
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise ValueError(f"{path} does not hold the weights of FID's Inception: {len(missing)} "
                         f"keys are missing {missing[:3]} and {len(unexpected)} are unknown "
                         f"{unexpected[:3]}; delete it and type: python eval.py fetch inception")
    return model.to(device)


# ---------------------------------------------------------------- the distance
class Moments:
    """Mean and covariance of features that come in batches.

    The sums are float64, so the result does not depend on the batch size or on the number of
    processes beyond the rounding of float64.
    """

    def __init__(self):
        self.n, self.sum, self.outer_sum = 0, 0, 0         # outer_sum: sum of x x^T

    @torch.no_grad()
    def add(self, x):
        """Add the features x (B, F)."""
        self.device = x.device
        x = x.cpu().double()                               # MPS devices have no float64
        self.n += len(x)
        self.sum = self.sum + x.sum(0)
        self.outer_sum = self.outer_sum + x.T @ x          # (F, F)

    def result(self):
        """-> mu (F,), cov (F, F) with divisor n - 1, float64 on the CPU, over all processes

        ValueError if this process has no images, or if all processes together have fewer than 2.
        """
        if not self.n:
            raise ValueError("found no images on this process, but a covariance needs at least 2 "
                             "images, and at least 1 on each process; give more images")
        sums = torch.tensor(self.n), self.sum, self.outer_sum
        if is_distributed():
            # copies, so that result() can be called again; on the device, as NCCL requires
            sums = [all_reduce_sum(x.to(self.device, copy=True)).cpu() for x in sums]
        n, total, outer_total = sums
        if n < 2:
            raise ValueError(f"found {int(n)} image, but a covariance needs at least 2; give more "
                             f"images")
        return total / n, (outer_total - total.outer(total) / n) / (n - 1)


def statistics(features):
    """features  iterable of (B, F), with at least 2 rows in total -> mu (F,), cov (F, F)"""
    moments = Moments()
    for x in features:
        moments.add(x)
    return moments.result()


def frechet_distance(mu1, cov1, mu2, cov2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two Gaussians.   Heusel et al. 2017, Eq. 6

    mu (F,), cov S (F, F), tensors or numpy arrays -> float, computed in float64

    If S = R R^T, then tr (S1 S2)^(1/2) is the sum of the singular values of R1^T R2. The square
    root of the product S1 S2, which has numerical problems with fewer samples than dimensions, is
    not needed. With so few samples the result is still exact, but as an estimate it has a large
    bias.
    """
    mu1, cov1, mu2, cov2 = [torch.as_tensor(x).cpu().double() for x in (mu1, cov1, mu2, cov2)]
    trace_of_root = torch.linalg.svdvals(square_root(cov1).T @ square_root(cov2)).sum()
    distance = (mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * trace_of_root
    return max(distance.item(), 0.0)                       # rounding can make it negative


def square_root(cov):
    """Covariance (F, F) -> R (F, r) with R R^T = cov, where r is the numerical rank of cov"""
    values, vectors = torch.linalg.eigh(cov)
    # smaller eigenvalues are rounding noise; a negative one has no square root
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()


# ---------------------------------------------------------------- reconstruction and original
MAX_PSNR = 100       # dB. A larger PSNR counts as this in a mean, so that it is never inf


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of each pair of images.

    a, b (B, 3, H, W) in [0, 1] -> (B,). Equal images give inf. The released code computes it on
    255 a and 255 b with peak value 255, which gives the same number.
    """
    # 10 log10(peak^2 / MSE) with peak 1
    return -10 * (a.float() - b.float()).square().mean((1, 2, 3)).log10()


def ssim(a, b):
    """Structural similarity of each pair of images, the mean over pixels and channels.

    a, b (B, 3, H, W) in [0, 1], H and W above 5 -> (B,), at most 1.   Wang et al. 2004, Eq. 13

    As torchmetrics' StructuralSimilarityIndexMeasure(data_range=1): Gaussian window of 11 x 11
    pixels, sigma 1.5, reflected borders.
    """
    gaussian = torch.exp(-torch.arange(-5., 6, device=a.device) ** 2 / (2 * 1.5 ** 2))    # (11,)
    window = (gaussian.outer(gaussian) / gaussian.sum() ** 2).expand(a.shape[1], 1, 11, 11)

    def local_mean(x):
        return F.conv2d(F.pad(x, (5, 5, 5, 5), mode="reflect"), window, groups=x.shape[1])

    a, b = a.float(), b.float()
    mean_a, mean_b = local_mean(a), local_mean(b)
    # clamped: rounding can make the variance of a flat region negative
    var_a = (local_mean(a * a) - mean_a ** 2).clamp(min=0)
    var_b = (local_mean(b * b) - mean_b ** 2).clamp(min=0)
    cov = local_mean(a * b) - mean_a * mean_b
    c1, c2 = 0.01 ** 2, 0.03 ** 2                          # constants of Wang et al.
    luminance = (2 * mean_a * mean_b + c1) / (mean_a ** 2 + mean_b ** 2 + c1)
    structure = (2 * cov + c2) / (var_a + var_b + c2)
    return (luminance * structure).mean((1, 2, 3))
