"""Images and captions, and how they become batches.

    sources       open_data(spec) -> Shapes (built in) | Folder (class folders) | Shards (tars)
    training      TrainBatches(...)[step] -> Batch: this process's share of one step
    evaluation    eval_batches(source): every image once, in order
    python data.py --data SPEC    a contact sheet of images, crops, masks and captions

The step number is the only state: a batch follows from the seed, the step and the batch sizes, not
from workers, processes or earlier steps. VTP Sec. 3.6 draws the images for self-supervision and
reconstruction at random; here they are every k-th row of a batch that is in random order.
Unreadable images are reported, counted and replaced. Nothing that a data set holds is executed.
"""
import argparse
import os
import signal
import sys
import textwrap
import time
from dataclasses import dataclass, field, replace
from functools import partial
from math import lcm
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader
from tqdm import tqdm

from vtp_min import augment, shapes
from vtp_min.augment import ASSETS, EVAL_CROPS, VIEWS
from vtp_min.device import move_to
from vtp_min.dist import print0, printable, rank, rank_slice, world_size
from vtp_min.rng import Stream, make_rng, permutation

MAX_STORED_PERMUTATION = 2 ** 21       # 16 MB per worker and epoch; VTP's 277M would be 2.2 GB
VIEWS_AT_ONCE = 128                    # then the images that they were cut from are freed


# ---------------------------------------------------------------- sources
def open_data(spec=None, split="train", seed=0, side=64, whole=False):
    """What the user typed after --data -> a source. ValueError if there is nothing to open.

    spec    None, 'shapes' or 'shapes:objects=1-3,size=0.3-0.6'   built-in images (shapes.draw)
            a folder with train/ and val/, or of class folders    captions from class names
            'pairs-{000000..000003}.tar', a glob, or one tar      KEY.jpg with KEY.txt or KEY.json
    split   'train' or 'val'
    seed    of the training shapes          side  of the shapes, in pixels
    whole   spec was named for this split alone (--val-data): without splits, all of it is used

    A source has
    len                     number of images, per epoch if it is endless
    load(index, rng)        -> PIL RGB image, caption, label (-1: unknown); any exception if it
                            cannot be read. rng, a numpy Generator, chooses words of the caption
    name(index)             for messages, printable
    spec, endless           what the user typed; whether any index from 0 on can be loaded
    classes, templates      names in the order of the labels, prompts with {} for a name; or None
    """
    spec = str(spec or "shapes")
    if split not in ("train", "val"):
        raise ValueError(f"split is {split!r}, but a source has 'train' and 'val'")
    if spec.partition(":")[0] == "shapes":
        return Shapes(spec, split, seed, side)
    is_pattern = any(c in spec for c in "{*?[")
    if (is_pattern or spec.endswith(".tar")) and not os.path.isdir(spec):
        from vtp_min.extras.shards import Shards
        return Shards(spec, split, whole, map_in_workers)
    return Folder(spec, split, whole)


class Shapes:
    """The built-in images. Validation is set 0, training is set seed + 1: they differ.

    Training images are drawn 15 % larger than `side`: clip_view keeps at least 0.9 of each side, so
    it never enlarges, and its images are as sharp as those of validation, drawn at `side`.
    """
    classes = list(shapes.KINDS)
    templates = [shapes.noun_phrase(color, "{}") for color in shapes.COLORS]      # "a red {}"

    def __init__(self, spec, split, seed, side):
        self.spec, self.endless = spec, split == "train"
        self.set = seed + 1 if self.endless else 0
        self.side = round(1.15 * side) if self.endless else side
        self.settings = {}
        for item in filter(None, spec.partition(":")[2].split(",")):
            name, _, value = item.partition("=")
            low, _, high = value.partition("-")
            try:
                number = {"objects": int, "size": float}[name.strip()]
                self.settings[name.strip()] = number(low), number(high or low)
            except (KeyError, ValueError):
                raise ValueError(f"{spec!r}: no setting {item!r}; shapes has objects and size, "
                                 f"for example shapes:objects=1-3,size=0.3-0.6") from None
        self.load(0)                   # raises for settings that cannot be drawn

    def __len__(self):
        return 50_000 if self.endless else 10_000

    def load(self, index, rng=None):
        image, caption, label = shapes.draw(index, self.side, self.set, **self.settings)
        return Image.fromarray(image), caption, label

    def name(self, index):
        return f"image {index} of {self.spec}"


class Folder:
    """Class folders: DIR/train/CLASS/x.jpg and DIR/val/CLASS/y.jpg, or DIR/CLASS/x.jpg.

    Labels number the class folders in sorted order. A class is named by DIR/classnames.txt (lines
    of folder<TAB>name), else, if the folder is a WordNet id of ImageNet, as in OpenCLIP, else by
    its folder. Names that begin with a dot are ignored.
    """
    endless = False
    WANTED = "wanted DIR/train/CLASS/x.jpg and DIR/val/CLASS/y.jpg, or DIR/CLASS/x.jpg"

    def __init__(self, spec, split, whole):
        from vtp_min.extras.images import SUFFIXES, is_image
        self.spec = spec
        base = Path(spec)
        self.root = self.split_folder(base, split, whole)
        # of both splits, so that labels agree even if a class is missing in one
        parts = [self.root] if self.root == base else [base / "train", base / "val"]
        folders = set()
        for part in filter(Path.is_dir, parts):
            folders |= {e.name for e in os.scandir(part) if e.is_dir() and e.name[0] != "."}
        folders = sorted(folders, key=os.fsencode)

        files, labels = [], []
        ignored = [e.name for e in os.scandir(self.root) if not e.is_dir() and is_image(e.name)]
        for label, folder in enumerate(folders):
            for file in files_below(self.root, folder):
                if is_image(file):
                    files.append(os.fsencode(file))
                    labels.append(label)
                else:
                    ignored.append(file)
        if not files:
            raise ValueError(f"{self.root} holds no class folders with images "
                             f"({' '.join(SUFFIXES)}); {self.WANTED}")
        self.files, self.labels = np.array(files), np.array(labels)   # shared with forked workers

        if ignored:
            print0(f"{printable(self.root)}: {len(ignored)} files are ignored because of their "
                   f"suffix or because they are in no class folder ({printable(ignored[0])}, ...)")
        empty = sorted(set(range(len(folders))) - set(labels))
        if empty:
            print0(f"{printable(self.root)}: {len(empty)} of {len(folders)} classes have no image "
                   f"here ({printable(folders[empty[0]])}, ...)")
        self.classes = class_names(base, folders)
        self.templates = (ASSETS / "imagenet_templates.txt").read_text("utf-8").splitlines()

    def split_folder(self, base, split, whole):
        """-> the folder with the class folders of this split"""
        if not base.is_dir():
            raise ValueError(f"no folder {self.spec}; {self.WANTED} (a tar is named *.tar; without "
                             f"--data the built-in shapes are used)")
        if (base / split).is_dir():
            return base / split
        if split == "train" and (base / "val").is_dir():
            raise ValueError(f"{self.spec} has no train/ folder; to train on its val/, type --data "
                             f"{base / 'val'}")
        if split == "val" and ((base / "train").is_dir() or not whole):
            raise ValueError(f"{self.spec} has no val/ folder; name another folder with --val-data")
        return base

    def __len__(self):
        return len(self.files)

    def path(self, index):
        return self.root / os.fsdecode(self.files[index])

    def load(self, index, rng):
        from vtp_min.extras.images import read_image
        if not self.path(index).is_file():
            raise FileNotFoundError("not a file, or a broken link")   # opening a pipe would block
        label = int(self.labels[index])
        template = self.templates[rng.integers(len(self.templates))]
        return read_image(self.path(index)), template.format(self.classes[label]), label

    def name(self, index):
        return printable(self.path(index))


def files_below(root, folder):
    """Paths, relative to root, of the files in root/folder and its subfolders, sorted. Links to
    folders are not followed."""
    for here, folders, files in os.walk(os.path.join(root, folder)):
        folders[:] = sorted((f for f in folders if f[0] != "."), key=os.fsencode)
        here = os.path.relpath(here, root)
        for file in sorted(files, key=os.fsencode):
            if file[0] != ".":
                yield f"{here}/{file}"


def class_names(base, folders):
    """Names of the classes in these folders, see Folder"""
    wnids = (ASSETS / "imagenet_wnids.txt").read_text("utf-8").splitlines()
    imagenet = (ASSETS / "imagenet_classnames.txt").read_text("utf-8").splitlines()
    names = dict(zip(wnids, imagenet, strict=True))
    for path in (base.parent / "classnames.txt", base / "classnames.txt"):    # base may be DIR/val
        if path.exists():
            lines = path.read_text("utf-8-sig", "replace").splitlines()
            names |= dict(line.split("\t", 1) for line in lines if "\t" in line)
    # decoded in the same way in any locale
    folders = [os.fsencode(folder).decode("utf-8", "replace") for folder in folders]
    return [names.get(folder, folder.replace("_", " ")) for folder in folders]


# ---------------------------------------------------------------- training batches
@dataclass
class Batch:
    """This process's share of one step. Parts of an objective that is off are None.

    b images for CLIP and reconstruction, Br of them reconstructed; Bs images for self-supervision,
    with 2 global and V local crops each; N patches of a global crop, M masked ones in all crops.
    """
    captions: list                      # b strings
    bad: list                           # names of unreadable samples, which others replaced
    image: torch.Tensor = None          # (b, 3, H, W) uint8
    rows_image: torch.Tensor = None     # (b,) their rows in the global batch
    text: torch.Tensor = None           # (b, T) ids; T is the length of the longest caption
    rec: torch.Tensor = None            # (Br,) which of the b images are reconstructed
    crops: torch.Tensor = None          # (2, Bs, 3, H, W) uint8
    locals: torch.Tensor = None         # (V, Bs, 3, h, w) uint8
    rows_ssl: torch.Tensor = None       # (Bs,) their rows in the global batch
    n_crops: int = 0                    # 2 Bs
    mask: torch.Tensor = None           # (2, Bs, N) bool, True: hidden from the student
    mask_index: torch.Tensor = None     # (M,) positions of the masked patches in mask.flatten()
    mask_weight: torch.Tensor = None    # (M,) 1 / masked patches of the same crop
    keep: dict = field(default_factory=dict)      # see TrainBatches.stochastic_depth

    def to(self, device):
        """-> the Batch on a device; pixels become ImageNet-normalised floats, rows_* stay"""
        moved = {"keep": map_rows(self.keep, lambda rows: move_to(rows, device))}
        for name, value in vars(self).items():
            if torch.is_tensor(value) and not name.startswith("rows"):
                moved[name] = move_to(value, device)
        for name in ("image", "crops", "locals"):
            if name in moved:
                moved[name] = augment.normalize(moved[name]).to(torch.get_default_dtype())
        return replace(self, **moved)

    # A worker process sends each tensor through a shared file of its own. L has 144 small ones in
    # `keep`, so these are sent as arrays.
    def __getstate__(self):
        return vars(self) | {"keep": map_rows(self.keep, torch.Tensor.numpy)}

    def __setstate__(self, state):
        vars(self).update(state)
        self.keep = map_rows(self.keep, torch.from_numpy)


def map_rows(keep, function):
    """Apply a function to all rows of Batch.keep"""
    def convert(pairs):
        return tuple((function(rows), scale) for rows, scale in pairs)

    out = dict(keep)
    for name, blocks in keep.items():
        if blocks:
            out[name] = [convert(pairs) for pairs in blocks]
    return out


@dataclass
class TrainBatches:
    """TrainBatches(...)[step] -> Batch. ValueError for sizes that do not fit together.

    Only rows that an active objective uses are loaded. Each row has its own random numbers, so
    turning an objective off changes nothing for the others.
    """
    source: Any
    tokenizer: Any                      # list of strings -> (n, 77) ids, 0 pads; None without clip
    seed: int
    batch: int                          # B = B_clip, over all processes
    batch_ssl: int
    batch_rec: int
    clip: bool                          # which objectives are on
    ssl: bool
    rec: bool
    image: int                          # H = W
    local_image: int                    # h = w
    n_local: int                        # V
    patch: int
    rank: int = 0
    world_size: int = 1
    drop_clip: float = 0.0              # rates of stochastic depth
    drop_rec: float = 0.0
    drop_ssl: float = 0.0
    depth: int = 0                      # blocks of the trunk

    def __post_init__(self):
        check_multiple("--image", self.image, self.patch, "the side of a patch")
        if self.ssl and self.n_local:
            check_multiple("--local-image", self.local_image, self.patch, "the side of a patch")
        if self.batch < 2:
            raise ValueError(f"--batch {self.batch}: contrastive losses need at least two images; "
                             f"try --batch {round_to_multiple(2, self.world_size)}")
        subsets = {}
        if self.ssl:
            subsets["--batch-ssl"] = self.batch_ssl
        if self.rec:
            subsets["--batch-rec"] = self.batch_rec
        for flag, n in subsets.items():
            check_multiple(flag, n, self.world_size, "the number of processes")
        reasons = [f"{flag} {n}" for flag, n in subsets.items()]
        if self.world_size > 1:
            reasons.append(f"{self.world_size} processes")
        unit = lcm(self.world_size, *subsets.values())
        check_multiple("--batch", self.batch, unit, f"as {' and '.join(reasons)} require")

    @property
    def images_per_step(self):
        """Images that one step reads, over all processes"""
        sizes = [(self.batch, self.clip), (self.batch_ssl, self.ssl), (self.batch_rec, self.rec)]
        rows = set()
        for size, is_on in sizes:
            if is_on:
                rows |= set(range(0, self.batch, self.batch // size))
        return len(rows)

    def rank_rows(self, size):
        """This process's rows of a subset of the batch: every (B / size)-th -> range"""
        first = self.rank * self.batch // self.world_size
        last = (self.rank + 1) * self.batch // self.world_size
        return range(first, last, self.batch // size)

    def __getitem__(self, step):
        rec_rows = self.rank_rows(self.batch_rec) if self.rec else range(0)
        ssl_rows = self.rank_rows(self.batch_ssl) if self.ssl else range(0)
        image_rows = self.rank_rows(self.batch) if self.clip else rec_rows
        out = Batch(captions=[], bad=[], keep=self.stochastic_depth(step))
        images, views = self.load_rows(step, image_rows, ssl_rows, out)
        if image_rows:
            out.image = torch.from_numpy(np.stack(images))
            out.rows_image = torch.tensor(image_rows)
        if self.clip:
            text = self.tokenizer(out.captions)
            # a causal tower needs no padding beyond the longest caption
            longest = int((text != 0).any(0).nonzero().max()) + 1
            out.text = text[:, :longest]
        if self.rec:
            out.rec = torch.tensor([image_rows.index(row) for row in rec_rows])
        if self.ssl:
            self.add_views(step, ssl_rows, views, out)
        return out

    def load_rows(self, step, image_rows, ssl_rows, out):
        """-> clip_view of each image row; of each ssl row two global crops, then V local ones"""
        images, views, jobs = [], [], []
        for row in sorted({*image_rows, *ssl_rows}):
            image, caption = self.load_sample(step, row, out.bad)
            image = np.array(image)                                   # once for all views
            if row in image_rows:
                rng = make_rng(Stream.CLIP_VIEW, self.seed, step, row)
                images.append(augment.clip_view(rng, image, self.image))
                out.captions.append(caption)
            if row in ssl_rows:
                rng = make_rng(Stream.CROPS, self.seed, step, row)
                jobs.append((rng, image, self.image, VIEWS["global 1"]))
                jobs.append((rng, image, self.image, VIEWS["global 2"]))
                jobs += [(rng, image, self.local_image, VIEWS["local"])] * self.n_local
            if len(jobs) >= VIEWS_AT_ONCE:
                views += augment.ssl_views(jobs)
                jobs = []
        return images, views + augment.ssl_views(jobs)

    def add_views(self, step, ssl_rows, views, out):
        Bs, V, side = len(ssl_rows), self.n_local, self.local_image
        out.rows_ssl, out.n_crops = torch.tensor(ssl_rows), 2 * Bs
        crops = views[0::2 + V] + views[1::2 + V]
        out.crops = torch.from_numpy(np.stack(crops)).unflatten(0, (2, Bs))
        out.locals = torch.empty(V, Bs, 3, side, side, dtype=torch.uint8)
        for v in range(V):
            out.locals[v] = torch.from_numpy(np.stack(views[2 + v::2 + V]))

        numbers = self.crop_numbers(ssl_rows, self.batch_ssl, 2)
        grid = self.image // self.patch
        mask = augment.batch_masks(self.seed, step, 2 * self.batch_ssl, grid, grid, numbers)
        out.mask = torch.from_numpy(mask).unflatten(0, (2, Bs))
        out.mask_index, out.mask_weight = augment.mask_index_and_weight(out.mask)

    def crop_numbers(self, rows, size, crops=1):
        """Numbers of these rows' crops within a subset of `size` rows: all first crops, then all
        second ones, ... -> (crops * rows,) array"""
        numbers = np.array(rows) // (self.batch // size)
        return (numbers + size * np.arange(crops)[:, None]).ravel()

    def stochastic_depth(self, step):
        """-> {name: augment.kept_rows, or None at rate 0}

        clip   for the forward pass of Batch.image, whatever it serves
        rec    only if reconstruction has another rate than CLIP, and so a forward pass of its own
        ssl, local    for global and local crops
        """
        def draw(rate, size, objective, crops=1):
            rows = self.crop_numbers(self.rank_rows(size), size, crops)
            key = self.seed, step, objective
            return augment.kept_rows(rate, self.depth, rows, crops * size, *key)

        keep = dict.fromkeys(("clip", "ssl", "local"))
        if self.clip:
            keep["clip"] = draw(self.drop_clip, self.batch, 0)
            if self.rec and self.drop_rec != self.drop_clip:
                keep["rec"] = draw(self.drop_rec, self.batch_rec, 1)
        elif self.rec:
            keep["clip"] = draw(self.drop_rec, self.batch_rec, 0)
        if self.ssl:
            keep["ssl"] = draw(self.drop_ssl, self.batch_ssl, 2, crops=2)
            keep["local"] = draw(self.drop_ssl, self.batch_ssl, 3, crops=self.n_local)
        return keep

    def load_sample(self, step, row, bad):
        """-> image, caption. An unreadable sample joins `bad`; a random one replaces it."""
        place = step * self.batch + row
        if self.source.endless:
            index = place
        else:
            epoch, k = divmod(place, len(self.source))
            index = epoch_index(self.seed, epoch, len(self.source), k)
        for attempt in range(100):
            try:
                rng = make_rng(Stream.SAMPLE, self.seed, step, row)
                image, caption, _ = self.source.load(index, rng)
                return image, caption
            except MemoryError:                                       # not the sample's fault
                raise
            except Exception as problem:                              # decoders raise anything
                bad.append(unreadable(self.source, index, problem))
            rng = make_rng(Stream.REPLACEMENT, self.seed, step, row, attempt)
            index = int(rng.integers(len(self.source)))
        raise ValueError(f"100 samples in a row could not be read, the last one is {bad[-1]}; does "
                         f"{self.source.spec} still exist?")


def unreadable(source, index, problem):
    """-> one line for logs"""
    return printable(f"{source.name(index)} ({type(problem).__name__}: {problem})")


def epoch_index(seed, epoch, n, k):
    """The k-th of n samples in the order of this epoch"""
    if n > MAX_STORED_PERMUTATION:
        from vtp_min.extras.shards import feistel_permutation
        return feistel_permutation(seed, epoch, n, k)
    return int(permutation(seed, epoch, n)[k])


def check_multiple(flag, n, unit, reason):
    if n % unit or n < unit:
        raise ValueError(f"{flag} {n} is no multiple of {unit}, {reason}; try {flag} "
                         f"{round_to_multiple(n, unit)}")


def round_to_multiple(n, unit):
    """The positive multiple of `unit` that is closest to n"""
    return max(1, round(n / unit)) * unit


def clean_batches(args):
    """TrainBatches of clip_view without captions, for stage 2 and the baselines"""
    source = open_data(args.data, "train", args.seed, side=args.image)
    return TrainBatches(
        source, None, args.seed, batch=args.batch, batch_ssl=args.batch, batch_rec=args.batch,
        clip=False, ssl=False, rec=True, image=args.image, local_image=args.image, n_local=0,
        patch=args.patch, rank=rank(), world_size=world_size())


# ---------------------------------------------------------------- worker processes
def prefetch(batches, start, stop, workers=0):
    """batches[start], ..., batches[stop - 1], computed ahead by worker processes -> iterator"""
    return map_in_workers(batches.__getitem__, range(start, stop), workers)


def map_in_workers(function, items, workers):
    """map(function, items), in order, on `workers` processes of one torch thread each.

    The random state of the caller is not changed.
    """
    start_worker = partial(init_worker, augment.ssl_views)
    return iter(DataLoader(items, batch_size=None, collate_fn=function, num_workers=workers,
                           worker_init_fn=start_worker, generator=torch.Generator()))


def init_worker(ssl_views, worker):
    """Workers ignore signals to the process group: the main process answers them, and may need
    another batch to finish its step. After SIGTERM they live for 30 seconds."""
    augment.ssl_views = ssl_views              # a spawned worker has not run fast.install()
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))


# ---------------------------------------------------------------- evaluation batches
def eval_batches(source, side, batch, limit=None, crop="adm", workers=0, seed=0):
    """This process's share of all images, each once, in the source's order.

    limit   over all processes; the images are evenly spaced, so that each class occurs
    crop    a key of augment.EVAL_CROPS
    Yields images (b, 3, side, side) uint8, labels (b,), captions. Unreadable images are reported
    and skipped: their batch is smaller. ValueError if they are more than half of a share.
    """
    if crop not in EVAL_CROPS or batch < 1 or (limit is not None and limit < 1):
        raise ValueError(f"crop={crop!r}, batch={batch}, limit={limit}: wanted a crop of "
                         f"{', '.join(EVAL_CROPS)}, a batch and a limit of 1 or more")
    n = min(limit or len(source), len(source))
    indices = [k * len(source) // n for k in rank_slice(n)]
    chunks = [indices[k:k + batch] for k in range(0, len(indices), batch)]
    where = f" on rank {rank()}" if world_size() > 1 else ""
    lost = 0
    load = partial(eval_batch, source, side, EVAL_CROPS[crop], seed)
    for images, labels, captions, bad in map_in_workers(load, chunks, workers):
        for name in bad:
            print(f"skipped{where}: {name}", flush=True)
        lost += len(bad)
        if 2 * lost > len(indices):
            raise ValueError(f"more than half of the {len(indices)} images of {source.spec}{where} "
                             f"could not be read, the last one is {bad[-1]}")
        if captions:
            yield images, labels, captions
    if lost:
        print(f"{lost} of {len(indices)} images of {printable(source.spec)}{where} could not be "
              f"read and are skipped", flush=True)


def eval_batch(source, side, crop, seed, indices):
    """-> images (b, 3, side, side) uint8 or None, labels (b,), captions, unreadable names"""
    images, labels, captions, bad = [], [], [], []
    for index in indices:
        try:
            image, caption, label = source.load(index, make_rng(Stream.EVAL, seed, index))
        except MemoryError:
            raise
        except Exception as problem:
            bad.append(unreadable(source, index, problem))
        else:
            images.append(augment.to_chw(crop(image, side)))
            labels.append(label)
            captions.append(caption)
    images = torch.from_numpy(np.stack(images)) if images else None
    return images, torch.tensor(labels), captions, bad


# ---------------------------------------------------------------- contact sheet
def image_sheet(batch, patch, zoom):
    """A Batch -> PIL image. A row per sample: clip_view, both global crops with masked patches in
    gray, the local crops; below them the caption."""
    b, _, side, _ = batch.image.shape
    grid, line = side // patch, 32 // zoom                        # line: height of a caption
    masked = batch.mask.view(2, b, 1, grid, grid)
    masked = masked.repeat_interleave(patch, -1).repeat_interleave(patch, -2)     # (2, b, 1, H, W)
    tiles = [batch.image, *torch.where(masked, 128, batch.crops), *batch.locals]
    tiles = [F.pad(tile, [2, 2, 2, side + 2 - tile.shape[-1]], value=255) for tile in tiles]
    rows = F.pad(torch.cat(tiles, -1), [0, 0, 0, line], value=255)
    sheet = torch.cat([*rows], -2).repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)
    sheet = Image.fromarray(sheet.permute(1, 2, 0).numpy())
    draw = ImageDraw.Draw(sheet)
    for row, caption in enumerate(batch.captions):
        y = ((row + 1) * (side + 4 + line) - line) * zoom
        draw.text((2 * zoom, y), textwrap.fill(caption, sheet.width // 6, max_lines=2), "black")
    return sheet


def show(args):
    """Print what a source holds and how fast it is read; write the contact sheet"""
    source = open_data(args.data, args.split, args.seed, args.image, whole=True)
    batches = TrainBatches(
        source, None, args.seed, args.rows, args.rows, args.rows, clip=False, ssl=True, rec=True,
        image=args.image, local_image=args.local_image, n_local=args.locals, patch=args.patch)
    size = "endless" if source.endless else f"{len(source):,} samples"
    print(f"{printable(source.spec)}, {args.split}: {size}")
    if source.classes:
        more = ", ..." if len(source.classes) > 12 else ""
        print(f"{len(source.classes)} classes: {', '.join(source.classes[:12])}{more}")

    n_steps, bad = max(1, 64 // args.rows), []
    start = time.perf_counter()
    for batch in tqdm(prefetch(batches, 1, 1 + n_steps), "timing", total=n_steps):
        bad += batch.bad
    n_samples = n_steps * args.rows
    ms = 1000 * (time.perf_counter() - start) / n_samples
    if bad:
        print(f"{len(bad)} of {n_samples + len(bad)} samples could not be read and were replaced:",
              *dict.fromkeys(bad), sep="\n    ")
    print(f"{ms:.1f} ms a sample in one process: reading, clip_view, 2 global crops of "
          f"{args.image}, {args.locals} local crops of {args.local_image}")

    batch = batches[0]
    print("captions:", *(printable(c)[:200] for c in batch.captions), sep="\n    ")
    image_sheet(batch, args.patch, zoom=max(1, 160 // args.image)).save(args.out)
    print(f"wrote {args.out}: clip_view, global crops 1 and 2 with masked patches in gray, "
          f"local crops")


def main():
    p = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Show a data set as training sees it: size, captions, speed, and a contact "
                    "sheet of views, crops and masks. Tars are indexed once, in $VTP_CACHE or "
                    "~/.cache/vtp_min; nothing is written beside them.")
    p.add_argument("--data", default="shapes",
                   help="shapes, shapes:objects=1,size=0.6-0.9, a folder (DIR/train/CLASS/x.jpg or "
                        "DIR/CLASS/x.jpg), or tars of image-caption pairs, in quotes: "
                        "'pairs-{000000..000003}.tar', 'pairs-*.tar'")
    p.add_argument("--split", choices=["train", "val"], default="train", help="part of --data")
    p.add_argument("--image", type=int, default=36,
                   help="side of clip_view and the global crops; the released models have 256")
    p.add_argument("--local-image", type=int, default=18,
                   help="side of the local crops; DINOv2 has 96 with global crops of 224")
    p.add_argument("--locals", type=int, default=2, help="local crops per image; DINOv2 has 8")
    p.add_argument("--patch", type=int, default=9,
                   help="side of a patch, the unit of masks; the paper has 16")
    p.add_argument("--rows", type=int, default=8, help="samples on the sheet")
    p.add_argument("--seed", type=int, default=0, help="of order, crops and masks")
    p.add_argument("--out", default="sheet.png", help="file of the contact sheet")
    args = p.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")     # a terminal with LANG=C lacks letters
    try:
        show(args)
    except ValueError as problem:
        raise SystemExit(f"data.py: {problem}")


if __name__ == "__main__":
    main()
