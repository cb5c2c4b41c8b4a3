"""How far pictures are from pictures, five ways: FID, two stand-ins for it, PSNR and SSIM.

open_samples                     a folder of pictures, an npz of pictures, or saved statistics, read as they are needed
Inception, load_inception        images -> features (B, 2048): FID's own network, as pytorch-fid runs it
Moments, frechet_distance        features -> mean, covariance -> distance                              Heusel et al. 2017, Eq. 6
SqueezeNet, load_squeezenet      images -> features (B, 512): a small network that knows ImageNet's 1000 classes, for "FD-squeezenet (no FID)"
Judge, train_judge               a small classifier of the data at hand: features for "FD-classifier", logits for "was the asked class drawn?"
psnr, ssim                       each image against its own original

FID is FID only on Inception's features; the same distance on other features bears their name and compares only with itself.
"""
import re
import zipfile
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from .dist import on, rank, say, total, wait, world
from .run import ProgressBar, write_aside
from .weights import find


# ---- what is compared: pictures, or the statistics of pictures ---------------------------------------------------------

def open_samples(path, jpeg=False):
    """A folder of pictures (or one that holds samples.npz), an npz with arr_0, an npz with mu and sigma  ->  Pictures, Array or Saved

    Each has len, .folder, and .what: a name for the protocol; Pictures and Array have .size (W, H), .labels ((n,) or None) and
    batches(size) -> uint8 (b, 3, H, W) of this process's share. Nothing is held in memory. Raises ValueError for what a distance cannot be taken of.
    """
    path = Path(path)
    path = path / "samples.npz" if (path / "samples.npz").exists() else path
    if path.suffix != ".npz":
        return Pictures(path, jpeg)
    if not path.exists():
        raise ValueError(f"there is no {path}; wanted a folder of pictures, or an npz with arr_0, or with mu and sigma")
    try:
        names = np.load(path).files
    except (OSError, ValueError, zipfile.BadZipFile) as problem:
        raise ValueError(f"{path} is no npz ({problem})") from None
    if {"mu", "sigma"} <= set(names):                                     # ADM's reference files hold some pictures too: the statistics are of all
        return Saved(path)
    if "arr_0" not in names:
        raise ValueError(f"{path} holds {', '.join(names) or 'nothing'}; wanted arr_0, uint8 (n, H, W, 3), as dit.py sample writes it, or mu and sigma")
    return Array(path)


def share(n):
    """first, last + 1 of this process's rows of n"""
    return rank() * n // world(), (rank() + 1) * n // world()


class Pictures:
    """The pictures in one folder, not below it, sorted by name: as pytorch-fid reads them"""
    labels = None
    KINDS = ".bmp .jpg .jpeg .pgm .png .ppm .tif .tiff .webp".split()

    def __init__(self, path, jpeg):
        self.folder = path
        self.files = sorted(f for f in path.iterdir() if f.suffix.lower() in self.KINDS) if path.is_dir() else []
        if not self.files:
            raise ValueError(f"{path} holds no samples.npz and no pictures ({' '.join(self.KINDS)}); make some with: python dit.py sample RUN_DIT --out {path}")
        sizes, lossy = {}, 0
        for f in self.files:                                              # headers only
            size, kind = look(f, lambda image: (image.size, image.format))
            sizes.setdefault(size, f.name)
            lossy += kind in ("JPEG", "MPO")
        if len(sizes) > 1:
            found = ", ".join(f"{w}x{h} ({name})" for (w, h), name in list(sizes.items())[:3])
            raise ValueError(f"{path} holds pictures of {len(sizes)} sizes: {found}, ...; a distance needs one. Photographs are cut by --data, samples are not")
        if lossy and not jpeg:
            raise ValueError(f"{lossy} of {len(self.files)} pictures in {path} are JPEG, and its compression moves the distance; save samples as PNG, "
                             "or type --jpeg if JPEG is what you mean to measure")
        self.size, = sizes
        self.what = f"{path}{f', {lossy} of them JPEG' if lossy else ''}"

    def __len__(self):
        return len(self.files)

    def batches(self, size):
        first, last = share(len(self))
        for k in range(first, last, size):
            images = [look(f, lambda image: np.array(image.convert("RGB"))) for f in self.files[k:min(k + size, last)]]
            yield torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def look(file, use):
    try:
        with Image.open(file) as image:
            return use(image)
    except (OSError, SyntaxError) as problem:
        raise ValueError(f"{file} cannot be read as a picture ({problem}); a distance over the others would be another number") from None


class Array:
    """arr_0, uint8 (n, H, W, 3), of an npz, read piece after piece"""

    def __init__(self, path):
        self.path, self.folder, self.what = path, path.parent, str(path)
        with zipfile.ZipFile(path) as z, z.open("arr_0.npy") as f:
            self.shape, self.dtype = self.header(f)
        if self.dtype != np.uint8 or len(self.shape) != 4 or self.shape[3] != 3 or not self.shape[0]:
            raise ValueError(f"{path}: arr_0 is {self.dtype} {self.shape}; wanted uint8 (n, H, W, 3)")
        self.size = self.shape[2], self.shape[1]
        with np.load(path) as found:
            name = next((k for k in ("labels", "arr_1") if k in found), None)              # dit.py's, ADM's
            self.labels = torch.from_numpy(found[name]).long() if name else None

    def header(self, f):
        version = np.lib.format.read_magic(f)
        shape, by_columns, dtype = (np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0)(f)
        if by_columns:
            raise ValueError(f"{self.path}: arr_0 is stored column by column; save np.ascontiguousarray(arr_0)")
        return shape, dtype

    def __len__(self):
        return self.shape[0]

    def batches(self, size):
        (first, last), each = share(len(self)), int(np.prod(self.shape[1:]))
        with zipfile.ZipFile(self.path) as z, z.open("arr_0.npy") as f:
            self.header(f)
            f.seek(first * each, 1)
            for k in range(first, last, size):
                n = min(size, last - k)
                found = bytearray(f.read(n * each))
                if len(found) < n * each:
                    raise ValueError(f"{self.path} ends after picture {k + len(found) // each} of {len(self)}; write it again")
                yield torch.frombuffer(found, dtype=torch.uint8).view(n, *self.shape[1:]).permute(0, 3, 1, 2)


class Saved:
    """Statistics of an npz: mu (F,) and sigma (F, F), as in ADM's reference files and pytorch-fid's; .n pictures and .features in words, if it says so

    F tells whose features they are: Inception's 2048, SqueezeNet's 512.
    """
    WIDTHS = {"inception": 2048, "squeezenet": 512}

    def __init__(self, path):
        self.folder = path.parent
        with np.load(path) as found:
            self.mu, self.sigma = (torch.from_numpy(np.asarray(found[k], np.float64)) for k in ("mu", "sigma"))
            self.n = int(found["n"]) if "n" in found else 0
            self.features = str(found["features"]) if "features" in found else ""
            self.what = f"{path}, saved statistics{' of ' + str(found['what']) if 'what' in found else ''}"
        F = len(self.mu) if self.mu.ndim == 1 else None
        if self.mu.shape != (F,) or self.sigma.shape != (F, F):
            raise ValueError(f"{path}: mu is {tuple(self.mu.shape)} and sigma {tuple(self.sigma.shape)}; wanted (F,) and (F, F), F = 2048 for FID")
        if not (self.mu.isfinite().all() and self.sigma.isfinite().all() and torch.allclose(self.sigma, self.sigma.T, rtol=1e-4, atol=1e-8)):
            raise ValueError(f"{path}: sigma is no covariance (not symmetric), or a value is not finite")

    def __len__(self):
        """0: the file does not say"""
        return self.n

    def moments(self, kind, features=""):
        """kind of features: inception or squeezenet; features in words, if they must be what the file says"""
        if len(self.mu) != self.WIDTHS[kind]:
            raise ValueError(f"{self.what}: {len(self.mu)} numbers, but features of {kind} are {self.WIDTHS[kind]}: these are statistics of something else")
        if self.features and features and self.features != features:
            raise ValueError(f"{self.what}: statistics of {self.features}; wanted: {features}")
        return self.mu, self.sigma


def save_statistics(path, mu, sigma, n, what, features=""):
    """An npz that pytorch-fid, ADM's evaluator and open_samples understand; rank 0 writes.   what  the pictures, for a protocol; features in words"""
    def write(aside):
        with open(aside, "wb") as f:
            np.savez(f, mu=mu.numpy(), sigma=sigma.numpy(), n=n, what=what, features=features)
    if rank() == 0:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_aside(Path(path), write)


def by_pieces(net, img):
    """net(img), on a CPU 16 pictures at a time: layers in its cache, memory that does not grow with the batch (Inception 1.06 x as fast as 50 at once)"""
    return torch.cat([net(x) for x in img.split(16 if img.device.type == "cpu" else len(img))])


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
        scale = self.bn.weight / (self.bn.running_var + self.bn.eps).sqrt()              # the frozen norm as part of the convolution: 1.09 x as fast
        weight, bias = self.conv.weight * scale[:, None, None, None], self.bn.bias - self.bn.running_mean * scale
        return F.conv2d(x, weight, bias, self.conv.stride, self.conv.padding).relu_()


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
            ends = [getattr(self, name)(x) for name in names]
            x = torch.cat(ends, 1) if len(ends) > 1 else ends[0]
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
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)          # on a CPU 1.6 x as fast as NCHW

    def forward(self, img):
        if img.dtype != torch.uint8:
            raise ValueError(f"Inception reads uint8 images 0..255, got {img.dtype}; for x in [0, 1] give (x * 255).clamp(0, 255).byte()")
        return by_pieces(self.pool, img)

    def pool(self, img):
        """-> (B, 2048), all at once"""
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


# ---- SqueezeNet v1.0: a judge of real photographs in 0.8 MB -------------------------------------------------------------

class SqueezeNet(nn.Module):
    """Trained on ImageNet's 1000 classes, frozen and in eval mode.   Iandola et al. 2016, Table 1; layer names of the published prototxt

    uint8 (B, 3, H, W), any side  ->  (B, 512) float32, the global average of fire9's output
    """
    PROTOCOL = "512-d average of fire9 of SqueezeNet v1.0, pictures squashed to 227 px (bilinear, antialiased)"
    SQUEEZE = {2: 16, 3: 16, 4: 32, 5: 32, 6: 48, 7: 48, 8: 64, 9: 64}        # fire module: channels it squeezes to; 1x1 and 3x3 expand to 4 times that, each

    def __init__(self):
        super().__init__()
        self.conv1, width = nn.Conv2d(3, 96, 7, 2), 96
        for n, s in self.SQUEEZE.items():
            self.add_module(f"fire{n}/conv1x1_1", nn.Conv2d(width, s, 1))
            self.add_module(f"fire{n}/conv1x1_2", nn.Conv2d(s, 4 * s, 1))
            self.add_module(f"fire{n}/conv3x3_2", nn.Conv2d(s, 4 * s, 3, padding=1))
            width = 8 * s
        self.conv10 = nn.Conv2d(width, 1000, 1, padding=1)
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)          # with by_pieces 2.8 x as fast on a CPU

    def grid(self, img):
        """-> (B, 512, 13, 13)"""
        x = F.interpolate(img.float(), (227, 227), mode="bilinear", antialias=True)      # as PIL resizes, but for its rounding
        x = x.flip(1) - x.new_tensor([104, 117, 123])[:, None, None]                     # Caffe's: BGR in 0..255 minus the mean
        x = F.max_pool2d(self.conv1(x).relu_(), 3, 2, ceil_mode=True)
        for n in self.SQUEEZE:
            squeeze, one, three = (self.get_submodule(f"fire{n}/conv{k}") for k in ("1x1_1", "1x1_2", "3x3_2"))
            x = squeeze(x).relu_()
            x = torch.cat([one(x), three(x)], 1).relu_()
            x = F.max_pool2d(x, 3, 2, ceil_mode=True) if n in (4, 8) else x
        return x

    def forward(self, img):
        return by_pieces(lambda x: self.grid(x).mean((2, 3)), img)

    def logits(self, img):
        """-> (B, 1000), classes in the order of their WordNet ids"""
        return F.relu(self.conv10(self.grid(img))).mean((2, 3))


def load_squeezenet(device="cpu"):
    """SqueezeNet() with its ImageNet weights, on this device. FileNotFoundError says where they come from: nothing can fetch them"""
    model = SqueezeNet()
    with np.load(find("squeezenet")) as found:
        model.load_state_dict({k: torch.from_numpy(x) for k, x in found.items()})        # float16 in the file, float32 here
    return model.to(device)


# ---- the distance ------------------------------------------------------------------------------------------------------

class Moments:
    """Running mean and covariance (n - 1) of features, summed in float64: neither the batch size nor the number of processes matters."""

    def __init__(self):
        self.n, self.sum, self.products = 0, 0, 0

    @torch.no_grad()
    def add(self, x):
        """x (B, F)"""
        self.device, x = x.device, x.cpu().double()
        self.n, self.sum, self.products = self.n + len(x), self.sum + x.sum(0), self.products + x.T @ x

    def result(self):
        """-> mu (F,), cov (F, F), float64 on CPU, of the rows of all processes: each must have added some"""
        if not self.n:
            raise ValueError("a covariance needs at least 2 images, and one on each process; here there is none")
        n, s, ss = torch.tensor(self.n), self.sum, self.products
        if on():
            n, s, ss = (total(x.to(self.device)).cpu() for x in (n, s, ss))
        if n < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {int(n)}")
        return s / n, (ss - s.outer(s) / n) / (n - 1)


def statistics(features):
    """An iterable of (B, F) batches, at least 2 rows in all  ->  mu (F,), cov (F, F)"""
    moments = Moments()
    for x in features:
        moments.add(x)
    return moments.result()


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


# ---- the other stand-in: a judge that knows the data's own classes ---------------------------------------------------

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
        for step in ProgressBar(range(steps), desc="judge", unit="step", disable=not progress or rank() > 0):
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


def kept_judge(path, about, n_classes, pictures, steps, device):
    """The judge that lies at `path`; if there is none, or one about something else, rank 0 trains it  ->  judge, its accuracy

    about  {str: str} what it depends on      pictures  a function -> images, labels, val_images, val_labels, called by every process
    """
    def kept():
        with safetensors.safe_open(path, "pt") as f:
            return dict(f.metadata())

    about = about | {"steps": str(steps)}
    if not path.exists() or {k: kept().get(k) for k in about} != about:
        say(f"training the judge, a classifier of the real pictures, to be kept in {path}")
        x, y, val_x, val_y = pictures()
        if rank() == 0:
            judge, accuracy = train_judge(x, y, n_classes, val_x, val_y, steps=steps, device=device)
            path.parent.mkdir(parents=True, exist_ok=True)
            tensors = {k: v.contiguous() for k, v in judge.state_dict().items()}
            write_aside(path, lambda aside: safetensors.torch.save_file(tensors, aside, about | {"accuracy": str(accuracy)}))
        wait()
    judge = Judge(n_classes)
    judge.load_state_dict(safetensors.torch.load_file(path))
    return judge.to(device).eval().requires_grad_(False), float(kept()["accuracy"])


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
