"""The sets of images that a Frechet distance compares, read as they are needed.

    open_samples(path)     -> ImageFolder, NpzImages, or SavedStats: an npz of statistics
    Crops                  real images of a data source
    save_statistics(...)   writes an npz that SavedStats, pytorch-fid and ADM's evaluator read

Each set has .n images (0: unknown), .name, .size (W, H) or None, words for protocols, and
.statistics(net, kind, features, batch, device) -> mean (F,), covariance (F, F), where
net  uint8 (b, 3, H, W) -> (b, F)      kind, features  of net: its --features, and in words
"""
import json
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..config import atomic_write
from ..dist import rank, rank_slice
from ..fid import statistics

# number of features, which tells whose statistics a file holds
WIDTHS = {"inception": 2048, "squeezenet": 512}


def open_samples(path, jpeg=False):
    """A folder of images (or one with samples.npz), an npz with arr_0, or an npz with mu and sigma
    -> ImageFolder, NpzImages or SavedStats

    jpeg  accept JPEG files. ValueError for a file of which no distance can be computed.
    The first two also have .labels (n,) or None, and .batches(size).
    """
    path = Path(path)
    if (path / "samples.npz").exists():
        path = path / "samples.npz"
    if path.suffix != ".npz":
        return ImageFolder(path, jpeg)
    if not path.exists():
        raise ValueError(f"there is no {path}; wanted a folder of images, or an npz with arr_0, "
                         f"or with mu and sigma")
    try:
        names = np.load(path).files
    except (OSError, ValueError, zipfile.BadZipFile) as problem:
        raise ValueError(f"{path} is no npz ({problem})") from None
    if {"mu", "sigma"} <= set(names):
        # ADM's reference files also hold some images; the statistics are of the whole set
        return SavedStats(path)
    if "arr_0" not in names:
        raise ValueError(f"{path} holds {', '.join(names) or 'nothing'}; wanted arr_0, uint8 "
                         f"(n, H, W, 3), as dit.py sample writes it, or mu and sigma")
    return NpzImages(path)


def check_sample_count(n, few):
    """few  accept any number"""
    if n < 2048 and not few:
        raise ValueError(f"{n} samples: below 2048 a Frechet distance is mostly bias; make more, "
                         f"or add --few to measure it anyway (the protocol says so)")


def small_sample_note(n):
    """For protocols.   n  0 if unknown"""
    return f", ONLY {n} SAMPLES" if 0 < n < 2048 else ""


class ImageSet:
    size = labels = None

    def origin(self):
        """The protocol that dit.py sample wrote beside its images, else their path"""
        path = self.folder / "labels.json"
        if path.exists():
            return json.loads(path.read_text())["protocol"]
        return self.name

    def as_samples(self):
        number = self.n or "an unstated number of"
        return f"{number} samples{small_sample_note(self.n)}, {self.origin()}"

    def as_reference(self):
        number = self.n or "an unstated number of"
        return f"{number} pictures of {self.name}{small_sample_note(self.n)}"

    def statistics(self, net, kind, features, batch, device):
        return statistics(net(x.to(device)) for x in self.batches(batch))


class Crops(ImageSet):
    """ADM crops of a data source, evenly spread

    split   in words      loader  (source, limit) -> batches (images, ...)
    """

    def __init__(self, source, split, side, limit, loader):
        self.source, self.loader = source, loader
        self.n, self.size = min(limit, len(source)), (side, side)
        self.name = f"{self.n} {split} pictures of {source.spec}, ADM crop {side} px"

    def origin(self):
        return self.name

    def as_reference(self):
        return self.name

    def batches(self, size):
        for images, *_ in self.loader(self.source, self.n):
            yield images


class ImageFolder(ImageSet):
    """The images directly in one folder, sorted by name, as pytorch-fid reads them"""
    SUFFIXES = (".bmp", ".jpg", ".jpeg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

    def __init__(self, path, jpeg):
        self.folder, self.files = path, []
        if path.is_dir():
            self.files = sorted(f for f in path.iterdir() if f.suffix.lower() in self.SUFFIXES)
        if not self.files:
            raise ValueError(f"{path} holds no samples.npz and no images "
                             f"({' '.join(self.SUFFIXES)}); make some with: "
                             f"python dit.py sample RUN_DIT --out {path}")
        sizes, n_jpeg = {}, 0
        for file in self.files:                            # headers only
            size, kind = read(file, lambda image: (image.size, image.format))
            sizes.setdefault(size, file.name)
            n_jpeg += kind in ("JPEG", "MPO")
        if len(sizes) > 1:
            found = [f"{w}x{h} ({name})" for (w, h), name in sizes.items()]
            raise ValueError(f"{path} holds images of {len(sizes)} sizes: {', '.join(found[:3])}, "
                             f"...; a distance needs one. Photographs are cropped by --data, "
                             f"samples are not")
        if n_jpeg and not jpeg:
            raise ValueError(f"{n_jpeg} of {len(self.files)} images in {path} are JPEG, whose "
                             f"compression changes the distance; save samples as PNG, or type "
                             f"--set jpeg=true to measure JPEG")
        self.n, (self.size,) = len(self.files), sizes
        self.name = str(path)
        if n_jpeg:
            self.name += f", {n_jpeg} of them JPEG"

    def batches(self, size):
        """-> uint8 (b, 3, H, W), b <= size, of this process's slice"""
        files = [self.files[k] for k in rank_slice(self.n)]
        for k in range(0, len(files), size):
            images = [read(file, lambda image: np.array(image.convert("RGB")))
                      for file in files[k:k + size]]
            yield torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def read(file, function):
    """function of the open PIL image"""
    try:
        with Image.open(file) as image:
            return function(image)
    except (OSError, SyntaxError) as problem:
        raise ValueError(f"{file} cannot be read as an image ({problem}); leaving it out would "
                         f"change the distance") from None


class NpzImages(ImageSet):
    """arr_0, uint8 (n, H, W, 3), of an npz, read batch by batch"""

    def __init__(self, path):
        self.path, self.folder, self.name = path, path.parent, str(path)
        with zipfile.ZipFile(path) as z, z.open("arr_0.npy") as f:
            self.shape, dtype = self._read_header(f)
        shape = self.shape
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or not shape[0]:
            raise ValueError(f"{path}: arr_0 is {dtype} {shape}; wanted uint8 (n, H, W, 3)")
        self.n, self.size = shape[0], (shape[2], shape[1])
        with np.load(path) as found:
            for name in ("arr_1", "labels"):               # ADM's, dit.py's
                if name in found:
                    self.labels = torch.from_numpy(found[name]).long()

    def _read_header(self, f):
        """-> shape, dtype; f stands at the first number"""
        version = np.lib.format.read_magic(f)
        if version == (1, 0):
            header = np.lib.format.read_array_header_1_0(f)
        else:
            header = np.lib.format.read_array_header_2_0(f)
        shape, fortran_order, dtype = header
        if fortran_order:
            raise ValueError(f"{self.path}: arr_0 is stored column by column; "
                             f"save np.ascontiguousarray(arr_0)")
        return shape, dtype

    def batches(self, size):
        """-> uint8 (b, 3, H, W), b <= size, of this process's slice"""
        rows, n_bytes = rank_slice(self.n), int(np.prod(self.shape[1:]))
        with zipfile.ZipFile(self.path) as z, z.open("arr_0.npy") as f:
            self._read_header(f)
            f.seek(rows.start * n_bytes, 1)
            for k in range(rows.start, rows.stop, size):
                n = min(size, rows.stop - k)
                found = bytearray(f.read(n * n_bytes))
                if len(found) < n * n_bytes:
                    raise ValueError(f"{self.path} ends after image {k + len(found) // n_bytes} "
                                     f"of {self.n}; write it again")
                images = torch.frombuffer(found, dtype=torch.uint8).view(n, *self.shape[1:])
                yield images.permute(0, 3, 1, 2)


class SavedStats(ImageSet):
    """mu (F,) and sigma (F, F) of an npz, as in ADM's reference files and pytorch-fid's.

    .n images (0: unknown) and .features in words, if the file says so. F tells which network's
    features they are: 2048 of Inception, 512 of SqueezeNet.
    """
    size = None

    def __init__(self, path):
        self.folder, self.name = path.parent, f"{path}, saved statistics"
        with np.load(path) as found:
            self.mu = torch.from_numpy(np.asarray(found["mu"], np.float64))
            self.sigma = torch.from_numpy(np.asarray(found["sigma"], np.float64))
            self.n = int(found["n"]) if "n" in found else 0
            self.features = str(found["features"]) if "features" in found else ""
            if "what" in found:
                self.name += f" of {found['what']}"
        F = self.mu.numel()
        if self.mu.shape != (F,) or self.sigma.shape != (F, F):
            raise ValueError(f"{path}: mu is {tuple(self.mu.shape)} and sigma "
                             f"{tuple(self.sigma.shape)}; wanted (F,) and (F, F), F = 2048 for FID")
        finite = self.mu.isfinite().all() and self.sigma.isfinite().all()
        if not finite or not torch.allclose(self.sigma, self.sigma.T, rtol=1e-4, atol=1e-8):
            raise ValueError(f"{path}: sigma is no covariance (not symmetric), or a value is not "
                             f"finite")

    def origin(self):
        return self.name

    def statistics(self, net, kind, features, batch=None, device=None):
        """kind  of the network, inception or squeezenet      features  in words, for a file that
        says which it holds -> mu, cov. ValueError if the statistics are of other features."""
        if len(self.mu) != WIDTHS[kind]:
            raise ValueError(f"{self.name}: {len(self.mu)} numbers, but features of {kind} are "
                             f"{WIDTHS[kind]}: these are statistics of something else")
        if self.features and features and self.features != features:
            raise ValueError(f"{self.name}: statistics of {self.features}; wanted: {features}")
        if "halved" in features and not self.features:
            raise ValueError(f"{self.name} do not say that the images were halved; save them anew "
                             f"with --set halve=true and --set save_real=FILE or save_stats=FILE")
        return self.mu, self.sigma


def save_statistics(path, moments, images, features):
    """Write an npz; rank 0 does.   moments  mean, covariance of these images, an ImageSet
    features  in words"""
    mu, cov = moments

    def write(part):
        with open(part, "wb") as f:
            np.savez(f, mu=mu.numpy(), sigma=cov.numpy(), n=images.n, what=images.origin(),
                     features=features)
    if rank() == 0:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        atomic_write(Path(path), write)
