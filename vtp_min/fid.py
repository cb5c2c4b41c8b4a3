"""FID, and the measures of a reconstruction against its original.

    Inception, load_inception    images -> features (B, 2048), as pytorch-fid computes them
    Moments, statistics          features -> mean (F,), covariance (F, F)
    frechet_distance             two means and covariances -> distance     Heusel et al. 2017, Eq. 6
    psnr, ssim                   each image against its original

FID is this distance on Inception's features. On other features (extras/judges.py) it has another
name, and its values are comparable only with each other.
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
# divides by the number of pixels inside the image, where torchvision's blocks divide by 9
avg_pool = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)


class Conv(BasicConv2d):
    """Convolution, batch norm with fixed statistics, ReLU.

    The batch norm is folded into the weights of the convolution: 1.09 times as fast on a CPU.
    """

    def forward(self, x):
        conv, bn = self.conv, self.bn
        weight, bias = fuse_conv_bn_weights(conv.weight, None, bn.running_mean, bn.running_var,
                                            bn.eps, bn.weight, bn.bias)
        return F.relu(F.conv2d(x, weight, bias, conv.stride, conv.padding), inplace=True)


class BlockA(InceptionA):
    """(B, C, 35, 35) -> four branches, to be concatenated; torchvision's, but for the pooling"""

    def _forward(self, x):
        branch1x1 = self.branch1x1(x)
        branch5x5 = self.branch5x5_2(self.branch5x5_1(x))
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        branch_pool = self.branch_pool(avg_pool(x))
        return [branch1x1, branch5x5, branch3x3dbl, branch_pool]


class BlockC(InceptionC):
    """(B, 768, 17, 17) -> four branches, to be concatenated; torchvision's, but for the pooling"""

    def _forward(self, x):
        branch1x1 = self.branch1x1(x)
        branch7x7 = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        branch7x7dbl = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        branch7x7dbl = self.branch7x7dbl_5(self.branch7x7dbl_4(branch7x7dbl))
        branch_pool = self.branch_pool(avg_pool(x))
        return [branch1x1, branch7x7, branch7x7dbl, branch_pool]


class BlockE(InceptionE):
    """(B, C, 8, 8) -> branches, to be concatenated; torchvision's, but for .pool, set below"""

    def _forward(self, x):
        branch1x1 = self.branch1x1(x)
        h = self.branch3x3_1(x)
        branch3x3 = [self.branch3x3_2a(h), self.branch3x3_2b(h)]
        h = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branch3x3dbl = [self.branch3x3dbl_3a(h), self.branch3x3dbl_3b(h)]
        branch_pool = self.branch_pool(self.pool(x))
        return [branch1x1, *branch3x3, *branch3x3dbl, branch_pool]


class Inception(Inception3):
    """The network of FID: torchvision's Inception-v3 with pytorch-fid's changes, frozen.

    uint8 (B, 3, H, W), any side -> (B, 2048) float32, the global average pool. The state-dict keys
    are those of pytorch-fid's checkpoint, which includes the unused classifier `fc`.
    """

    def __init__(self):
        blocks = [BlockA, InceptionB, BlockC, InceptionD, BlockE]
        blocks = [partial(block, conv_block=Conv) for block in blocks]
        super().__init__(num_classes=1008, aux_logits=False, init_weights=False,
                         inception_blocks=[Conv, *blocks, None])
        self.Mixed_7b.pool = avg_pool
        # maximum: an error of the 2015 network, which FID keeps
        self.Mixed_7c.pool = nn.MaxPool2d(3, stride=1, padding=1)
        self.eval().requires_grad_(False)
        self.to(memory_format=torch.channels_last)         # on a CPU 1.6 times as fast

    def forward(self, img):
        if img.dtype != torch.uint8:
            raise ValueError(f"Inception reads uint8 images 0..255, got {img.dtype}; "
                             f"for x in [0, 1] give (x * 255).clamp(0, 255).byte()")
        return in_chunks(self.features, img)

    def features(self, img):
        """uint8 (B, 3, H, W) -> (B, 2048)"""
        # pytorch-fid's resize: without antialiasing, and without keeping the aspect ratio
        x = F.interpolate(img.float() / 255, (299, 299), mode="bilinear")
        x = 2 * x - 1
        for name, layer in self.named_children():
            x = layer(x)
            if name == "avgpool":          # dropout and fc follow
                return x.flatten(1)


def in_chunks(net, img):
    """net(img), on a CPU 16 images at a time, so that the activations stay in its cache"""
    size = 16 if img.device.type == "cpu" else len(img)
    return torch.cat([net(x) for x in img.split(size)])


def load_inception(device="cpu"):
    """Inception() with FID's weights, on this device.

    FileNotFoundError says how to fetch them, ValueError what is wrong with them.
    """
    from .extras.weights import find
    model, path = Inception(), find("inception")
    weights = torch.load(path, map_location="cpu", weights_only=True)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    # the counters of batch norm are not used in evaluation
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise ValueError(f"{path} is not FID's Inception: {len(missing)} keys are missing "
                         f"{missing[:3]}, and {len(unexpected)} are unknown {unexpected[:3]}")
    return model.to(device)


# ---------------------------------------------------------------- the distance
class Moments:
    """Mean and covariance (n - 1) of features that come in batches.

    Summed in float64, so that neither the batch size nor the number of processes matters.
    """

    def __init__(self):
        self.n, self.sum, self.products = 0, 0, 0

    @torch.no_grad()
    def add(self, x):
        """x  (B, F)"""
        self.device = x.device
        x = x.cpu().double()
        self.n += len(x)
        self.sum = self.sum + x.sum(0)
        self.products = self.products + x.T @ x

    def result(self):
        """-> mu (F,), cov (F, F), float64 on the CPU, over the rows of all processes.

        ValueError if this process has added none, or all together fewer than two.
        """
        if not self.n:
            raise ValueError("a covariance needs at least 2 images, and one on each process; "
                             "here there is none")
        n, s, ss = torch.tensor(self.n), self.sum, self.products
        if is_distributed():
            n, s, ss = [all_reduce_sum(x.to(self.device, copy=True)).cpu() for x in (n, s, ss)]
        if n < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {int(n)}")
        return s / n, (ss - s.outer(s) / n) / (n - 1)


def statistics(features):
    """features  iterable of (B, F), at least 2 rows in all -> mu (F,), cov (F, F)"""
    moments = Moments()
    for x in features:
        moments.add(x)
    return moments.result()


def frechet_distance(mu1, cov1, mu2, cov2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two Gaussians.   Heusel et al. 2017, Eq. 6

    mu (F,), cov (F, F), tensors or numpy arrays -> float, computed in float64.
    With S = R R^T, tr (S1 S2)^(1/2) is the sum of the singular values of R1^T R2. This is real for
    all ranks, so fewer samples than dimensions cause no numerical problem (but a large bias).
    """
    mu1, cov1, mu2, cov2 = [torch.as_tensor(x).cpu().double() for x in (mu1, cov1, mu2, cov2)]
    overlap = torch.linalg.svdvals(square_root(cov1).T @ square_root(cov2)).sum()
    distance = (mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * overlap
    return max(distance.item(), 0.0)                       # rounding can make it negative


def square_root(cov):
    """Covariance (F, F) -> R (F, r) with R R^T = cov, where r is the numerical rank of cov"""
    values, vectors = torch.linalg.eigh(cov)
    # smaller eigenvalues are rounding noise
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()


# ---------------------------------------------------------------- one image against its original
def psnr(a, b):
    """Peak signal-to-noise ratio of each image in dB.   a, b (B, 3, H, W) in [0, 1] -> (B,)

    Equal images give inf. The released code computes it on 255 a and 255 b with peak 255, which
    gives the same number.
    """
    return -10 * (a.float() - b.float()).square().mean((1, 2, 3)).log10()


def ssim(a, b):
    """Structural similarity of each image, averaged over pixels and channels.

    a, b (B, 3, H, W) in [0, 1], H and W above 5 -> (B,).   Wang et al. 2004, Eq. 13, as
    torchmetrics' StructuralSimilarityIndexMeasure(data_range=1): Gaussian window 11 x 11,
    sigma 1.5, reflected borders.
    """
    line = torch.exp(-torch.arange(-5., 6, device=a.device) ** 2 / (2 * 1.5 ** 2))
    window = (line.outer(line) / line.sum() ** 2).expand(a.shape[1], 1, 11, 11)

    def blur(x):
        return F.conv2d(F.pad(x, (5, 5, 5, 5), mode="reflect"), window, groups=x.shape[1])

    a, b = a.float(), b.float()
    mean_a, mean_b = blur(a), blur(b)
    var_a = (blur(a * a) - mean_a ** 2).clamp(min=0)
    var_b = (blur(b * b) - mean_b ** 2).clamp(min=0)
    cov = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01 ** 2, 0.03 ** 2                          # Wang et al.'s constants
    luminance = (2 * mean_a * mean_b + c1) / (mean_a ** 2 + mean_b ** 2 + c1)
    structure = (2 * cov + c2) / (var_a + var_b + c2)
    return (luminance * structure).mean((1, 2, 3))
