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
        kind      name of the network: 'inception', 'efficientnet' or 'classifier'
        features  description of the features; compared with that of saved statistics
        batch     images per batch

b images of a batch    H, W sides in pixels    F features
"""
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from ..config import atomic_write
from ..dist import print0, rank, rank_slice
from ..fid import statistics
from .files import reading
from .images import FORMATS, read_header, read_image
from .sample_folder import read_summary

# {network: F}; F shows which network the statistics in a file belong to
WIDTHS = {"inception": 2048, "efficientnet": 1280}
WANTED = ("a folder of images, an npz with arr_0 (images), or an npz with mu and sigma "
          "(statistics)")
# arrays of an npz besides arr_0, the images: statistics and labels
ARRAYS = ("mu", "sigma", "n", "features", "what", "labels", "arr_1")


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
    if path.is_dir() or (not path.exists() and path.suffix != ".npz"):
        return ImageFolder(path, jpeg)
    if not path.exists():
        raise ValueError(f"{path} does not exist; wanted {WANTED}")
    if path.suffix.lower() != ".npz":
        raise ValueError(f"{path} is a file, but not an npz; wanted {WANTED}")
    with reading(path, f"copy it again, or write it again; wanted {WANTED}"):
        with np.load(path) as file:
            names = file.files
            arrays = {name: file[name] for name in ARRAYS if name in names}
    if {"mu", "sigma"} <= set(names):
        # ADM's reference files contain a few images too, but the statistics are of the whole set
        return SavedStats(path, arrays)
    if "arr_0" not in names:
        raise ValueError(f"{path} contains {', '.join(names) or 'no arrays'}; wanted arr_0, uint8 "
                         f"(n, H, W, 3), as dit.py sample writes it, or mu and sigma")
    return NpzImages(path, arrays)


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
    """Base class: descriptions, and the statistics of a set with .batches

    .protocol, .classes   how `dit.py sample` generated the images, and its class names; or None
    """
    size = labels = protocol = classes = None

    def origin(self):
        """-> how the images were generated, if this is known; else the name"""
        return self.protocol or self.name

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

    def as_reference(self):
        return self.name

    def batches(self, size):
        for images, *_ in self.loader(self.source, self.n):
            yield images


class ImageFolder(ImageSet):
    """The images in one folder, without its subfolders, sorted by name, as in pytorch-fid. Pixels
    are those that training reads; hidden files, such as macOS's ._x.png, are not images."""
    SUFFIXES = (".bmp", ".jpg", ".jpeg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
    FORMATS = (*FORMATS, "PPM")                            # PPM: .pgm and .ppm

    def __init__(self, path, jpeg):
        self.files = sorted(f for f in path.glob("[!.]*") if f.suffix.lower() in self.SUFFIXES)
        if not self.files:
            raise ValueError(f"{path} contains no samples.npz and no images "
                             f"({' '.join(self.SUFFIXES)}); to generate samples, type: "
                             f"python dit.py sample RUN_DIT --out {path}")
        sizes = {}                                         # {(W, H): name of the first such file}
        n_jpeg = 0
        for file in self.files:                            # reads only the headers
            size, kind = self.read(read_header, file)
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

    def read(self, function, file):
        """-> function(file), which is read_header or read_image"""
        with reading(file, "replace or delete it: a skipped image would change the distance"):
            return function(file, self.FORMATS)

    def batches(self, size):
        """Yield the images of this rank: uint8 (b, 3, H, W), b <= size."""
        files = [self.files[k] for k in rank_slice(self.n)]
        for k in range(0, len(files), size):
            images = [np.array(self.read(read_image, file)) for file in files[k:k + size]]
            yield torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


class NpzImages(ImageSet):
    """The array arr_0 of an npz file, uint8 (n, H, W, 3), read batch by batch"""

    def __init__(self, path, arrays):
        """arrays  {name: array} of the file, without arr_0"""
        self.path, self.name = path, str(path)
        with self._open() as f:
            self.shape, dtype = self._read_header(f)
        shape = self.shape
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
            raise ValueError(f"{path}: arr_0 is {dtype} {shape}; wanted uint8 (n, H, W, 3)")
        self.n, self.size = shape[0], (shape[2], shape[1])
        for name in ("arr_1", "labels"):                   # ADM's name, dit.py's name
            if name in arrays:
                self.labels = self._check_labels(name, arrays[name])
        if path.name == "samples.npz" and (path.parent / "labels.json").exists():
            summary = read_summary(path.parent)
            self.protocol, self.classes = summary["protocol"], summary["classes"]

    def _check_labels(self, name, labels):
        """-> LongTensor (n,), or None and a message if the array is not one label per image"""
        if labels.shape == (self.n,) and labels.dtype.kind in "biuf" and (labels % 1 == 0).all():
            return torch.from_numpy(labels.astype(np.int64))
        print0(f"{self.path}: {name} is left out. It is {labels.dtype} {labels.shape}; as labels "
               f"of the images, {self.n} whole numbers are wanted")
        return None

    @contextmanager
    def _open(self):
        """-> open file at the start of arr_0, which is not loaded as a whole"""
        with reading(self.path, "copy it again, or write it again"):
            with zipfile.ZipFile(self.path) as z, z.open("arr_0.npy") as f:
                yield f

    def _read_header(self, f):
        """-> shape, dtype of the array; afterwards, f is positioned at its first number"""
        version = np.lib.format.read_magic(f)
        if version == (1, 0):
            header = np.lib.format.read_array_header_1_0(f)
        else:
            header = np.lib.format.read_array_header_2_0(f)
        shape, fortran_order, dtype = header
        if fortran_order:
            raise ValueError("arr_0 is stored column by column (Fortran order), not image by "
                             "image; save np.ascontiguousarray(arr_0)")
        return shape, dtype

    def batches(self, size):
        """Yield the images of this rank: uint8 (b, 3, H, W), b <= size."""
        rows = rank_slice(self.n)
        n_bytes = int(np.prod(self.shape[1:]))             # of one image
        with self._open() as f:
            self._read_header(f)
            f.seek(rows.start * n_bytes, 1)                # relative to the first number
            for k in range(rows.start, rows.stop, size):
                n = min(size, rows.stop - k)
                data = bytearray(f.read(n * n_bytes))
                if len(data) < n * n_bytes:
                    raise ValueError(f"it ends after image {k + len(data) // n_bytes} of "
                                     f"{self.n}")
                images = torch.frombuffer(data, dtype=torch.uint8).view(n, *self.shape[1:])
                yield images.permute(0, 3, 1, 2)


class SavedStats(ImageSet):
    """Mean mu (F,) and covariance sigma (F, F) of an npz file, as in ADM's and pytorch-fid's files

    .n         number of images; 0 if the file does not state it
    .features  description of the features; '' if the file does not state it
    """
    size = None

    def __init__(self, path, arrays):
        """arrays  {name: array} of the file"""
        self.name = f"{path}, saved statistics"
        with reading(path, "wanted numbers: mu (F,), sigma (F, F) and n, the number of images"):
            self.mu = torch.from_numpy(np.asarray(arrays["mu"], np.float64))
            self.sigma = torch.from_numpy(np.asarray(arrays["sigma"], np.float64))
            self.n = int(arrays.get("n", 0))
        self.features = str(arrays.get("features", ""))
        if "what" in arrays:                               # save_statistics: origin of the images
            self.name += f" of {arrays['what']}"
        F = self.mu.numel()
        if self.mu.shape != (F,) or self.sigma.shape != (F, F):
            raise ValueError(f"{path}: mu is {tuple(self.mu.shape)} and sigma "
                             f"{tuple(self.sigma.shape)}; wanted (F,) and (F, F), F = 2048 for FID")
        finite = self.mu.isfinite().all() and self.sigma.isfinite().all()
        symmetric = torch.allclose(self.sigma, self.sigma.T, rtol=1e-4, atol=1e-8)
        if not finite or not symmetric or (self.sigma.diag() < 0).any():
            raise ValueError(f"{path}: sigma is not symmetric with a diagonal of at least 0, as a "
                             f"covariance must be, or a value is not finite; write the file again")

    def statistics(self, net, kind, features, batch=None, device=None):
        """-> mu, sigma; see the head of this file

        kind  'inception' or 'efficientnet'
        ValueError if the statistics belong to other features.
        """
        if len(self.mu) != WIDTHS[kind]:
            raise ValueError(f"{self.name}: {len(self.mu)} numbers, but features of {kind} have "
                             f"{WIDTHS[kind]}: these statistics belong to another network")
        if self.features and features and self.features != features:
            raise ValueError(f"{self.name}: statistics of {self.features}; wanted: {features}")
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
