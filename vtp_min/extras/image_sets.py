"""The sets of images that a Frechet distance compares. Images are read in batches, when needed.

    ImageFolder       the images in a folder
    NpzImages         the images in an npz file, as `dit.py sample` writes it
    SavedStats        the mean and covariance in an npz file, without images
    Crops             real images of a data source
    open_samples      path -> one of the first three
    save_statistics   writes an npz that SavedStats, pytorch-fid and ADM's evaluator can read

Every set has these attributes and methods:
    .n                number of images; 0: unknown
    .size             (W, H) in pixels; None for SavedStats
    .name             description for messages and protocols
    .as_samples(), .as_reference()   descriptions of the two sides of a distance
    .statistics(net, kind, features, batch, device) -> mean (F,), covariance (F, F)
        net       function uint8 (b, 3, H, W) -> (b, F)
        kind      name of the network: 'inception', 'squeezenet' or 'classifier'
        features  description of the features; compared with that of saved statistics
        batch     images per batch

b images of a batch    H, W sides in pixels    F features
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

# {network: F}; F shows which network the statistics in a file belong to
WIDTHS = {"inception": 2048, "squeezenet": 512}


def open_samples(path, jpeg=False):
    """-> ImageFolder, NpzImages or SavedStats

    path  a folder of images, a folder with samples.npz, an npz with arr_0 (images), or an npz with
          mu and sigma (statistics)
    jpeg  True: accept JPEG files
    ImageFolder and NpzImages also have .labels (n,) or None, and .batches(size).
    ValueError if no distance can be computed from the path.
    """
    path = Path(path)
    if (path / "samples.npz").exists():
        path = path / "samples.npz"
    if path.suffix != ".npz":
        return ImageFolder(path, jpeg)
    if not path.exists():
        raise ValueError(f"{path} does not exist; wanted a folder of images, an npz with arr_0, or "
                         f"an npz with mu and sigma")
    try:
        names = np.load(path).files
    except (OSError, ValueError, zipfile.BadZipFile) as problem:
        raise ValueError(f"{path} is not an npz file ({problem})") from None
    if {"mu", "sigma"} <= set(names):
        # ADM's reference files contain a few images too, but the statistics are of the whole set
        return SavedStats(path)
    if "arr_0" not in names:
        raise ValueError(f"{path} contains {', '.join(names) or 'no arrays'}; wanted arr_0, uint8 "
                         f"(n, H, W, 3), as dit.py sample writes it, or mu and sigma")
    return NpzImages(path)


def check_sample_count(n, few):
    """ValueError for fewer than 2048 images, unless `few` is True

    The estimate of a Frechet distance is biased upwards for few images. With fewer images than
    Inception has features, 2048, the covariance matrix is not even of full rank.
    """
    if n < 2048 and not few:
        raise ValueError(f"{n} samples: below 2048 a Frechet distance is mostly bias; generate "
                         f"more, or add --few to compute it anyway (the protocol will state this)")


def small_sample_note(n):
    """-> warning for protocols, '' if there are enough images or n is 0 (unknown)"""
    return f", ONLY {n} SAMPLES" if 0 < n < 2048 else ""


class ImageSet:
    """Base class: descriptions, and the statistics of a set with .batches"""
    size = labels = None

    def origin(self):
        """-> the protocol in the labels.json of `dit.py sample`; without that file, the name"""
        path = self.folder / "labels.json"
        if path.exists():
            return json.loads(path.read_text())["protocol"]
        return self.name

    def as_samples(self):
        number = self.n or "an unstated number of"
        return f"{number} samples{small_sample_note(self.n)}, {self.origin()}"

    def as_reference(self):
        number = self.n or "an unstated number of"
        return f"{number} images of {self.name}{small_sample_note(self.n)}"

    def statistics(self, net, kind, features, batch, device):
        return statistics(net(x.to(device)) for x in self.batches(batch))


class Crops(ImageSet):
    """ADM center crops of real images, evenly spaced in a data source

    split   'training' or 'validation', for the description
    side    side of the crops in pixels
    limit   maximum number of images
    loader  function (source, limit) -> batches (images uint8 (b, 3, side, side), ...) of this rank
    """

    def __init__(self, source, split, side, limit, loader):
        self.source, self.loader = source, loader
        self.n, self.size = min(limit, len(source)), (side, side)
        self.name = f"{self.n} {split} images of {source.spec}, ADM crop {side} px"

    def origin(self):
        return self.name

    def as_reference(self):
        return self.name

    def batches(self, size):
        for images, *_ in self.loader(self.source, self.n):
            yield images


class ImageFolder(ImageSet):
    """The images in one folder, without its subfolders, sorted by name, as in pytorch-fid"""
    SUFFIXES = (".bmp", ".jpg", ".jpeg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

    def __init__(self, path, jpeg):
        self.folder, self.files = path, []
        if path.is_dir():
            self.files = sorted(f for f in path.iterdir() if f.suffix.lower() in self.SUFFIXES)
        if not self.files:
            raise ValueError(f"{path} contains no samples.npz and no images "
                             f"({' '.join(self.SUFFIXES)}); to generate samples, type: "
                             f"python dit.py sample RUN_DIT --out {path}")
        sizes = {}                                         # {(W, H): name of the first such file}
        n_jpeg = 0
        for file in self.files:                            # reads only the headers
            size, kind = read(file, lambda image: (image.size, image.format))
            sizes.setdefault(size, file.name)
            n_jpeg += kind in ("JPEG", "MPO")
        if len(sizes) > 1:
            found = [f"{w}x{h} ({name})" for (w, h), name in sizes.items()]
            raise ValueError(f"{path} contains images of {len(sizes)} sizes: "
                             f"{', '.join(found[:3])}, ...; wanted one size. Samples are not "
                             f"cropped; to crop photographs, pass them with --data")
        if n_jpeg and not jpeg:
            raise ValueError(f"{n_jpeg} of {len(self.files)} images in {path} are JPEG, whose "
                             f"compression changes the distance; save samples as PNG, or add "
                             f"--set jpeg=true to measure JPEG files")
        self.n, (self.size,) = len(self.files), sizes
        self.name = str(path)
        if n_jpeg:
            self.name += f", {n_jpeg} of them JPEG"

    def batches(self, size):
        """Yield the images of this rank: uint8 (b, 3, H, W), b <= size."""
        files = [self.files[k] for k in rank_slice(self.n)]
        for k in range(0, len(files), size):
            images = [read(file, lambda image: np.array(image.convert("RGB")))
                      for file in files[k:k + size]]
            yield torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def read(file, function):
    """-> function(image), where image is the opened PIL image. ValueError if it cannot be read."""
    try:
        with Image.open(file) as image:
            return function(image)
    except (OSError, SyntaxError) as problem:
        raise ValueError(f"{file} cannot be read as an image ({problem}). It is not skipped, "
                         f"because that would change the distance; replace or delete it") from None


class NpzImages(ImageSet):
    """The array arr_0 of an npz file, uint8 (n, H, W, 3), read batch by batch"""

    def __init__(self, path):
        self.path, self.folder, self.name = path, path.parent, str(path)
        with zipfile.ZipFile(path) as z, z.open("arr_0.npy") as f:
            self.shape, dtype = self._read_header(f)
        shape = self.shape
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or not shape[0]:
            raise ValueError(f"{path}: arr_0 is {dtype} {shape}; wanted uint8 (n, H, W, 3)")
        self.n, self.size = shape[0], (shape[2], shape[1])
        with np.load(path) as arrays:
            for name in ("arr_1", "labels"):               # ADM's name, dit.py's name
                if name in arrays:
                    self.labels = torch.from_numpy(arrays[name]).long()

    def _read_header(self, f):
        """-> shape, dtype of the array; afterwards, f is positioned at its first number"""
        version = np.lib.format.read_magic(f)
        if version == (1, 0):
            header = np.lib.format.read_array_header_1_0(f)
        else:
            header = np.lib.format.read_array_header_2_0(f)
        shape, fortran_order, dtype = header
        if fortran_order:
            raise ValueError(f"{self.path}: arr_0 is stored column by column (Fortran order) and "
                             f"cannot be read image by image; save np.ascontiguousarray(arr_0)")
        return shape, dtype

    def batches(self, size):
        """Yield the images of this rank: uint8 (b, 3, H, W), b <= size."""
        rows = rank_slice(self.n)
        n_bytes = int(np.prod(self.shape[1:]))             # of one image
        with zipfile.ZipFile(self.path) as z, z.open("arr_0.npy") as f:
            self._read_header(f)
            f.seek(rows.start * n_bytes, 1)                # relative to the first number
            for k in range(rows.start, rows.stop, size):
                n = min(size, rows.stop - k)
                data = bytearray(f.read(n * n_bytes))
                if len(data) < n * n_bytes:
                    raise ValueError(f"{self.path} is incomplete: it ends after image "
                                     f"{k + len(data) // n_bytes} of {self.n}; write it again")
                images = torch.frombuffer(data, dtype=torch.uint8).view(n, *self.shape[1:])
                yield images.permute(0, 3, 1, 2)


class SavedStats(ImageSet):
    """Mean mu (F,) and covariance sigma (F, F) of an npz file, as in ADM's and pytorch-fid's files

    .n         number of images; 0 if the file does not state it
    .features  description of the features; '' if the file does not state it
    """
    size = None

    def __init__(self, path):
        self.folder, self.name = path.parent, f"{path}, saved statistics"
        with np.load(path) as arrays:
            self.mu = torch.from_numpy(np.asarray(arrays["mu"], np.float64))
            self.sigma = torch.from_numpy(np.asarray(arrays["sigma"], np.float64))
            self.n = int(arrays["n"]) if "n" in arrays else 0
            self.features = str(arrays["features"]) if "features" in arrays else ""
            if "what" in arrays:                           # save_statistics: origin of the images
                self.name += f" of {arrays['what']}"
        F = self.mu.numel()
        if self.mu.shape != (F,) or self.sigma.shape != (F, F):
            raise ValueError(f"{path}: mu is {tuple(self.mu.shape)} and sigma "
                             f"{tuple(self.sigma.shape)}; wanted (F,) and (F, F), F = 2048 for FID")
        finite = self.mu.isfinite().all() and self.sigma.isfinite().all()
        if not finite or not torch.allclose(self.sigma, self.sigma.T, rtol=1e-4, atol=1e-8):
            raise ValueError(f"{path}: sigma is not symmetric, as a covariance must be, or a value "
                             f"is not finite; write the file again")

    def origin(self):
        return self.name

    def statistics(self, net, kind, features, batch=None, device=None):
        """-> mu, sigma; see the head of this file

        kind  'inception' or 'squeezenet'
        ValueError if the statistics belong to other features.
        """
        if len(self.mu) != WIDTHS[kind]:
            raise ValueError(f"{self.name}: {len(self.mu)} numbers, but features of {kind} have "
                             f"{WIDTHS[kind]}: these statistics belong to another network")
        if self.features and features and self.features != features:
            raise ValueError(f"{self.name}: statistics of {self.features}; wanted: {features}")
        if "halved" in features and not self.features:
            raise ValueError(f"{self.name} do not state that the images were halved; save them "
                             f"again with --set halve=true and --set save_real=FILE or "
                             f"save_stats=FILE")
        return self.mu, self.sigma


def save_statistics(path, moments, images, features):
    """Write the statistics to an npz file, on rank 0.

    moments   mean (F,) and covariance (F, F) of the features
    images    the ImageSet that they were computed from
    features  description of the features
    """
    mu, cov = moments

    def write(part):
        with open(part, "wb") as f:
            np.savez(f, mu=mu.numpy(), sigma=cov.numpy(), n=images.n, what=images.origin(),
                     features=features)
    if rank() == 0:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        atomic_write(Path(path), write)
