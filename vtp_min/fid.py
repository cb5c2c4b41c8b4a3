"""How far pictures are from pictures, four ways: FID, its offline stand-in, PSNR and SSIM.

Inception, load_inception        images -> features (B, 2048): FID's own network, as pytorch-fid runs it
statistics, frechet_distance     features -> mean, covariance -> distance                              Heusel et al. 2017, Eq. 6
Judge, train_judge               a small classifier of the data at hand: features for "FD-classifier", logits for "was the asked class drawn?"
psnr, ssim                       each image against its own original

FID is FID only on Inception's features; the same distance on a judge's features is called FD-classifier and compares only with itself.
"""
import re

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import trange

from .dist import rank
from .weights import find


# ---- Inception-v3 as FID means it -------------------------------------------------------------------------------------
# A stage is "width@kernel" (keeps the grid) or "width@kernel/stride" (no padding); "p+q" runs both and concatenates.
# A Mixed layer runs its branches side by side: named stages one after another, or a pool followed by its stages.

def A(pool): return {"1x1": "64@1", "5x5": "48@1 64@5", "3x3dbl": "64@1 96@3 96@3", "avg": f"{pool}@1"}
def C(w): return {"1x1": "192@1", "7x7": f"{w}@1 {w}@1x7 192@7x1", "7x7dbl": f"{w}@1 {w}@7x1 {w}@1x7 {w}@7x1 192@1x7", "avg": "192@1"}
def E(pool): return {"1x1": "320@1", "3x3": "384@1 384@1x3+384@3x1", "3x3dbl": "448@1 384@3 384@1x3+384@3x1", pool: "192@1"}


POOLS = {"avg": lambda: nn.AvgPool2d(3, 1, 1, count_include_pad=False), "max": lambda: nn.MaxPool2d(3, 1, 1), "max/2": lambda: nn.MaxPool2d(3, 2)}
LAYERS = {                                                                # keys: the checkpoint's                         side: 299
    "Conv2d_1a_3x3": "32@3/2", "Conv2d_2a_3x3": "32@3/1", "Conv2d_2b_3x3": "64@3", "pool1": "max/2",                     # -> 73
    "Conv2d_3b_1x1": "80@1", "Conv2d_4a_3x3": "192@3/1", "pool2": "max/2",                                               # -> 35
    "Mixed_5b": A(32), "Mixed_5c": A(64), "Mixed_5d": A(64),
    "Mixed_6a": {"3x3": "384@3/2", "3x3dbl": "64@1 96@3 96@3/2", "max/2": ""},                                           # -> 17
    "Mixed_6b": C(128), "Mixed_6c": C(160), "Mixed_6d": C(160), "Mixed_6e": C(192),
    "Mixed_7a": {"3x3": "192@1 320@3/2", "7x7x3": "192@1 192@1x7 192@7x1 192@3/2", "max/2": ""},                         # -> 8
    "Mixed_7b": E("avg"), "Mixed_7c": E("max")}                           # max: a slip of the 2015 network that FID keeps


class Conv(nn.Module):
    """Convolution, batch norm, ReLU.   channels in, "width@kernel/stride"; .width channels out"""

    def __init__(self, channels, spec):
        super().__init__()
        width, kernel, stride = re.fullmatch(r"(\d+)@([\dx]+)/?(\d?)", spec).groups()
        kernel = [int(k) for k in (kernel if "x" in kernel else f"{kernel}x{kernel}").split("x")]
        self.width = int(width)
        self.conv = nn.Conv2d(channels, self.width, kernel, int(stride or 1), 0 if stride else [k // 2 for k in kernel], bias=False)
        self.bn = nn.BatchNorm2d(self.width, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches side by side, their ends concatenated.   channels in, {branch: "stage stage ..."}; .width channels out"""

    def __init__(self, channels, branches):
        super().__init__()
        self.chains, self.width = [], 0                                   # a chain: names of modules, stage by stage, two where it forks
        for branch, stages in branches.items():
            chain, width, stages = [], channels, stages.split()
            if branch in POOLS:
                self.add_module("pool", POOLS[branch]())
                chain, branch = [["pool"]], "_pool"
            for i, stage in enumerate(stages, 1):
                number = f"_{i}" if len(stages) > 1 else ""               # a lone stage bears no number
                fork = dict(zip("ab", stage.split("+"))) if "+" in stage else {"": stage}
                convs = {f"branch{branch}{number}{letter}": Conv(width, spec) for letter, spec in fork.items()}
                for name, conv in convs.items():
                    self.add_module(name, conv)
                chain.append(list(convs))
                width = sum(conv.width for conv in convs.values())
            self.chains.append(chain)
            self.width += width

    def forward(self, x):
        return torch.cat([self.walk(chain, x) for chain in self.chains], 1)

    def walk(self, chain, x):
        for names in chain:
            x = torch.cat([getattr(self, name)(x) for name in names], 1)
        return x


class Inception(nn.Module):
    """The network whose features FID compares, frozen and in eval mode; state-dict keys of pytorch-fid's checkpoint.

    uint8 (B, 3, H, W), any side  ->  (B, 2048) float32, the global average pool.   The classifier `fc` is in the file, not in use.
    """

    def __init__(self):
        super().__init__()
        width = 3
        for name, spec in LAYERS.items():
            layer = Mixed(width, spec) if isinstance(spec, dict) else POOLS[spec]() if spec in POOLS else Conv(width, spec)
            width = getattr(layer, "width", width)                        # a pool keeps it
            self.add_module(name, layer)
        self.fc = nn.Linear(width, 1008)
        self.eval().requires_grad_(False)

    def forward(self, img):
        if img.dtype != torch.uint8:
            raise ValueError(f"Inception reads uint8 images 0..255, got {img.dtype}; for x in [0, 1] give (x * 255).clamp(0, 255).byte()")
        x = F.interpolate(img.float() / 255, (299, 299), mode="bilinear")                # neither antialiased nor keeping the aspect:
        x = 2 * x - 1                                                                    # the published protocol
        for name in LAYERS:
            x = getattr(self, name)(x)
        return x.mean((2, 3))


def load_inception(device="cpu"):
    """Inception() with FID's weights, on this device. FileNotFoundError says how to fetch them, ValueError what is wrong with them."""
    model, path = Inception(), find("inception")
    missing, unexpected = model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=False)
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]        # counters that inference never reads
    if missing or unexpected:
        raise ValueError(f"{path} is not FID's Inception: it lacks {missing[:3]} ({len(missing)} in all) and "
                         f"has unknown {unexpected[:3]} ({len(unexpected)} in all)")
    return model.to(device)


# ---- the distance ------------------------------------------------------------------------------------------------------

@torch.no_grad()
def statistics(features):
    """Mean and covariance (n - 1) of all rows, summed in float64, so that the batch size does not matter.

    features  an iterable of (B, F) batches, at least 2 rows in all  ->  mu (F,), cov (F, F), float64 on CPU
    """
    n, s, ss = 0, 0, 0
    for x in features:
        x = x.cpu().double()                                              # (B, F)
        n, s, ss = n + len(x), s + x.sum(0), ss + x.T @ x
    if n < 2:
        raise ValueError(f"a covariance needs at least 2 images, got {n}")
    return s / n, (ss - s.outer(s) / n) / (n - 1)


def root(cov):
    """Covariance (F, F) -> R (F, r) with R R^T = cov and r its numerical rank: n samples leave at most n - 1 directions."""
    size, direction = torch.linalg.eigh(cov)
    kept = size > size[-1] * len(size) * torch.finfo(size.dtype).eps      # what lies below is rounding, and its root would not be small
    return direction[:, kept] * size[kept].sqrt()


def frechet_distance(mu1, cov1, mu2, cov2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) between two Gaussians, in float64.   Heusel et al. 2017, Eq. 6

    mu (F,), cov (F, F), tensors or numpy arrays  ->  float. With S = R R^T, tr (S1 S2)^(1/2) is the sum of the singular values of R1^T R2:
    real whatever the ranks, so fewer samples than dimensions are no trouble here (for the meaning of the number they are).
    """
    mu1, cov1, mu2, cov2 = (torch.as_tensor(x).cpu().double() for x in (mu1, cov1, mu2, cov2))
    overlap = torch.linalg.svdvals(root(cov1).T @ root(cov2)).sum()
    return max(((mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * overlap).item(), 0.0)


# ---- the offline stand-in: a judge that knows the data's own classes ---------------------------------------------------

class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


def layer(channels, width, stride=1):
    return nn.Sequential(nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())


class Judge(nn.Module):
    """A small residual network that names the class of a picture.   uint8 (B, 3, S, S), S from 32 to 96 or so

    -> features (B, 256), the global average pool, for FD-classifier;  logits (B, n_classes)
    """

    def __init__(self, n_classes):
        super().__init__()
        self.body = nn.Sequential(layer(3, 32, 2), layer(32, 64, 2),                               # (B, 64, S/4, S/4)
                                  layer(64, 128, 2), Residual(layer(128, 128), layer(128, 128)),    # (B, 128, S/8, S/8)
                                  layer(128, 256, 2))                                             # (B, 256, S/16, S/16)
        self.head = nn.Linear(256, n_classes)

    def forward(self, img):
        features = self.body(img.float() / 127.5 - 1).mean((2, 3))
        return features, self.head(features)


def disturb(x, mirror):
    """Another look at each picture: zoom and shift, mirror, contrast and brightness, a grey square in the way.   x (B, 3, S, S) in 0..255"""
    B, S = len(x), x.shape[-1]

    def draw(low, high, *shape): return low + (high - low) * torch.rand(B, *shape)

    zoom = draw(0.6, 1).sqrt()                                            # 0.6 to 1 of the area
    theta = x.new_zeros(B, 2, 3)
    theta[:, 0, 0] = zoom * (draw(-1, 1).sign() if mirror else 1)
    theta[:, 1, 1] = zoom
    theta[:, :, 2] = draw(-1, 1, 2) * (1.1 - zoom)[:, None]                # at most 5 % of the side beyond the border, which mirrors
    x = F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), padding_mode="reflection", align_corners=False)
    x = 127.5 + (x - 127.5) * draw(0.8, 1.2, 1, 1, 1) + 127.5 * draw(-0.2, 0.2, 1, 1, 1)
    near = (torch.arange(S) / S - draw(0, 1, 2, 1)).abs() < 0.15               # (B, 2, S) rows, columns: 0.3 S
    return x.masked_fill((near[:, 0, :, None] & near[:, 1, None, :])[:, None], 127.5)


@torch.enable_grad()
def train_judge(images, labels, n_classes, val_images, val_labels, steps=2400, batch=64, lr=3e-3, mirror=True,
                seed=0, device="cpu", precision="fp32", progress=True):
    """Train a Judge on the real pictures of a data set -> (judge in eval mode, its accuracy on the validation pictures).

    images uint8 (n, 3, S, S), labels (n,), in memory        mirror  off where left and right mean something        precision  "fp32" or "bf16"
    All numbers are ours: AdamW with a one-cycle learning rate, weight decay 0.05, label smoothing 0.1. Same seed and precision, same judge.
    """
    device = torch.device(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge(n_classes).to(device)
        opt = torch.optim.AdamW(judge.parameters(), lr, weight_decay=0.05)
        rate = torch.optim.lr_scheduler.OneCycleLR(opt, lr, steps, pct_start=0.2)
        order = torch.cat([torch.randperm(len(images)) for _ in range(steps * batch // len(images) + 1)])       # epoch after epoch
        for step in trange(steps, desc="judge", disable=not progress or rank() > 0):
            rows = order[step * batch:][:batch]
            x = disturb(images[rows].float(), mirror).to(device)          # drawn on the CPU: the same for every device
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                _, logits = judge(x)
            loss = F.cross_entropy(logits.float(), labels[rows].to(device), label_smoothing=0.1)
            opt.zero_grad()
            loss.backward()
            opt.step()
            rate.step()
    judge.eval().requires_grad_(False)
    right = sum((judge(x.to(device))[1].argmax(1).cpu() == y).sum().item() for x, y in zip(val_images.split(256), val_labels.split(256)))
    return judge, right / len(val_images)


# ---- one image against its original ------------------------------------------------------------------------------------

def psnr(a, b):
    """Peak signal-to-noise ratio of each image, in dB, unquantised.   a, b (B, 3, H, W) in [0, 1] -> (B,); equal images give inf

    The official protocol computes it on 255 a and 255 b with peak 255: the same number.
    """
    return -10 * (a.float() - b.float()).square().mean((1, 2, 3)).log10()


def ssim(a, b):
    """Structural similarity of each image, averaged over pixels and channels.   a, b (B, 3, H, W) in [0, 1], sides above 5 -> (B,)

    Wang et al. 2004, Eq. 13, as torchmetrics' StructuralSimilarityIndexMeasure(data_range=1): Gaussian window 11 x 11, sigma 1.5, reflected borders.
    """
    line = torch.exp(-torch.arange(-5., 6, device=a.device) ** 2 / (2 * 1.5 ** 2))
    window = (line.outer(line) / line.sum() ** 2).expand(a.shape[1], 1, 11, 11)

    def blur(x): return F.conv2d(F.pad(x, (5, 5, 5, 5), mode="reflect"), window, groups=x.shape[1])

    a, b = a.float(), b.float()
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = (blur(a * a) - mean_a ** 2).clamp(min=0), (blur(b * b) - mean_b ** 2).clamp(min=0)
    cov = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    return ((2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a ** 2 + mean_b ** 2 + c1) * (var_a + var_b + c2))).mean((1, 2, 3))
