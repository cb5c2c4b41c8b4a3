"""Data loading: images with captions, and how they become batches.

    sources       open_data(spec) -> Shapes (built in) | Folder (class folders) | Shards (tar files)
    training      TrainBatches(...)[step] -> Batch: this process's part of one training step
    evaluation    eval_batches(source): every image once, in order
    python data.py --data SPEC    writes a contact sheet of images, crops, masks and captions

A batch depends only on the seed, the step number and the batch sizes. It does not depend on the
number of processes, on the data workers or on earlier steps, so a run can resume at any step.
VTP Sec. 3.6 samples the images for self-supervision and reconstruction at random from the batch;
here they are every k-th row of it, because the order of the rows is already random.
Unreadable images are reported, counted and replaced. Nothing in a data set is ever executed.

b images of this process for CLIP and reconstruction    Br of them are reconstructed
Bs images of this process for self-supervision          V local crops per image
N patches of a global crop    M masked patches in all global crops of this process
T tokens of the longest caption
"""
import argparse
import os
import textwrap
import time
from dataclasses import dataclass, field, replace
from functools import partial
from math import lcm
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

from vtp_min import augment, shapes
from vtp_min.augment import ASSETS, EVAL_CROPS, VIEWS
from vtp_min.device import move_to
from vtp_min.dist import printable, rank, rank_slice, world_size
from vtp_min.rng import Stream, make_rng, permutation

# A stored permutation of this length takes 16 MB per worker and epoch. The paper's 277M samples
# would take 2.2 GB, so longer permutations are computed one index at a time.
MAX_STORED_PERMUTATION = 2 ** 21
# Crops are computed in groups of about this size; then the images that they came from are freed.
VIEWS_AT_ONCE = 128


# ---------------------------------------------------------------- sources
def open_data(spec=None, split="train", seed=0, side=64, whole=False):
    """Open the data set named by --data -> a source. ValueError if it cannot be used.

    spec    None, 'shapes' or 'shapes:objects=1-3,size=0.3-0.6'   built-in images (shapes.draw)
            a folder with train/ and val/, or with class folders  captions from class names
            'pairs-{000000..000003}.tar', a glob, or one tar      KEY.jpg with KEY.txt or KEY.json
    split   'train' or 'val'
    seed    seed of the training shapes; other sources ignore it
    side    side of the shapes in pixels; other sources ignore it
    whole   True if spec was given for this split only (--val-data). A data set without train/ and
            val/ folders is then used completely.

    Every source has these members:
    len(source)             number of images; for an endless source, the number per epoch
    load(index, rng)        -> PIL RGB image, caption, label (-1 if unknown). rng is a numpy
                            Generator that chooses the caption template. Any exception means that
                            the image cannot be read.
    name(index)             printable name of an image for messages
    spec                    the string given to --data
    endless                 True if load accepts every index from 0 on
    classes                 class names in the order of the labels, or None
    templates               captions in which {} stands for the class name, or None
    """
    spec = str(spec or "shapes")
    if split not in ("train", "val"):
        raise ValueError(f"split is {split!r}, but it must be 'train' or 'val'")
    if spec.partition(":")[0] == "shapes":
        return Shapes(spec, split, seed, side)
    from vtp_min.extras.class_folders import refuse_address
    refuse_address(spec)
    is_pattern = any(c in spec for c in "{*?[")
    # a folder may also be called x.tar or x[1]
    if (is_pattern or spec.endswith(".tar")) and not os.path.isdir(spec):
        from vtp_min.extras.shards import Shards
        return Shards(spec, split, whole, map_in_workers)
    return Folder(spec, split, whole)


class Shapes:
    """The built-in images. Validation uses data set 0 and training uses data set seed + 1, so the
    two have no image in common.

    Training images are drawn 15 % larger than `side`. clip_view crops to no less than 0.9 of each
    side, so it never enlarges an image, and training images are as sharp as validation images.
    """
    def __init__(self, spec, split, seed, side):
        self.spec, self.endless = spec, split == "train"
        self.draw_seed = seed + 1 if self.endless else 0
        self.side = round(1.15 * side) if self.endless else side
        self.settings = {}
        options = spec.partition(":")[2]                 # "objects=1-3,label=kind+color"
        for item in filter(None, options.split(",")):
            name, _, value = (part.strip() for part in item.partition("="))
            try:
                if name in ("label", "captions"):
                    self.settings[name] = value.replace("colour", "color")
                    continue
                low, _, high = value.partition("-")      # "objects=1" means 1 to 1
                number = {"objects": int, "size": float}[name]
                self.settings[name] = number(low), number(high or low)
            except (KeyError, ValueError):
                raise ValueError(f"{spec!r}: {item!r} is not a valid setting; shapes has objects, "
                                 f"size, label and captions, for example shapes:objects=1-3,"
                                 f"size=0.3-0.6,label=kind+color,captions=both") from None
        self.load(0)                   # a setting out of range raises here, not during training
        label = self.settings.get("label", "kind")
        self.classes = shapes.CLASSES[label]
        # In {} stands the class name: "a red {}", or if it contains the color, "a striped {}".
        words = shapes.COLORS if label == "kind" else ["large", "striped", "dotted", "checkered"]
        self.templates = [shapes.noun_phrase(word, "{}") for word in words]

    def __len__(self):
        # endless data needs a length, too: eval_batches on training images reads this many
        return 50_000 if self.endless else 10_000

    def load(self, index, rng=None):
        image, caption, label = shapes.draw(index, self.side, self.draw_seed, **self.settings)
        return Image.fromarray(image), caption, label

    def name(self, index):
        return f"image {index} of {self.spec}"


class Folder:
    """Class folders: DIR/train/CLASS/x.jpg and DIR/val/CLASS/y.jpg, or DIR/CLASS/x.jpg.

    The classes are the folders with images in train/, for both splits; without train/, those in
    DIR. A label is the position of the class folder in sorted order. The name of a class is taken
    from DIR/classnames.txt (lines of folder<TAB>name). Without an entry there, it is OpenCLIP's
    name if the folder is a WordNet id of ImageNet, else the name of the folder with spaces for
    underscores. Files and folders whose names begin with a dot are ignored.
    """
    endless = False

    def __init__(self, spec, split, whole):
        from vtp_min.extras.class_folders import find_images
        self.spec = spec
        self.root, files, labels, self.classes = find_images(spec, split, whole)
        # Forked workers share the memory of an array. A list of strings would be copied into each
        # worker over time, because reading a Python object changes its reference count.
        self.files, self.labels = np.array(files), np.array(labels)
        self.templates = (ASSETS / "imagenet_templates.txt").read_text("utf-8").splitlines()

    def __len__(self):
        return len(self.files)

    def path(self, index):
        return self.root / os.fsdecode(self.files[index])

    def load(self, index, rng):
        from vtp_min.extras.images import read_image
        if not self.path(index).is_file():                            # opening a pipe would block
            raise FileNotFoundError("not a file, or a broken link")
        label = int(self.labels[index])
        template = self.templates[rng.integers(len(self.templates))]
        return read_image(self.path(index)), template.format(self.classes[label]), label

    def name(self, index):
        return printable(self.path(index))


# ---------------------------------------------------------------- training batches
@dataclass
class Batch:
    """This process's part of one training step. Fields of an objective that is off are None.

    Row numbers count the rows of the global batch, over all processes.
    """
    captions: list                      # b strings
    bad: list                           # names of unreadable samples, which have been replaced
    image: torch.Tensor = None          # (b, 3, H, W) uint8, for CLIP and reconstruction
    rows_image: torch.Tensor = None     # (b,) row numbers of these images
    text: torch.Tensor = None           # (b, T) token ids
    rec: torch.Tensor = None            # (Br,) positions among the b images, ascending
    crops: torch.Tensor = None          # (2, Bs, 3, H, W) uint8, two global crops of each image
    locals: torch.Tensor = None         # (V, Bs, 3, h, w) uint8, V local crops of each image
    rows_ssl: torch.Tensor = None       # (Bs,) row numbers of the images that were cropped
    n_crops: int = 0                    # 2 Bs; ibot_loss divides by it
    mask: torch.Tensor = None           # (2, Bs, N) bool, True: the student gets the mask token
    mask_index: torch.Tensor = None     # (M,) positions of the masked patches in mask.flatten()
    mask_weight: torch.Tensor = None    # (M,) 1 / number of masked patches of the same crop
    keep: dict = field(default_factory=dict)      # see TrainBatches.stochastic_depth

    def to(self, device):
        """Copy the tensors to a device -> Batch. Images are ImageNet-normalised and become
        floating point; rows_image and rows_ssl stay on the CPU."""
        moved = {"keep": map_rows(self.keep, lambda rows: move_to(rows, device))}
        for name, value in vars(self).items():
            if torch.is_tensor(value) and not name.startswith("rows"):
                moved[name] = move_to(value, device)
        # after the copy: uint8 takes a quarter of the bandwidth of float32
        for name in ("image", "crops", "locals"):
            if name in moved:
                moved[name] = augment.normalize(moved[name]).to(torch.get_default_dtype())
        return replace(self, **moved)

    # A worker process sends each tensor through a shared-memory file of its own. `keep` of size L
    # has 144 small ones (24 blocks, 2 branches, 3 forward passes), so they are sent as numpy
    # arrays, which are part of the message.
    def __getstate__(self):
        return vars(self) | {"keep": map_rows(self.keep, torch.Tensor.numpy)}

    def __setstate__(self, state):
        vars(self).update(state)
        self.keep = map_rows(self.keep, torch.from_numpy)


def map_rows(keep, function):
    """Apply a function to all index tensors in Batch.keep -> dict of the same structure"""
    def convert(pairs):
        return tuple((function(rows), scale) for rows, scale in pairs)

    out = dict(keep)
    for name, blocks in keep.items():
        if blocks:                                       # None at rate 0
            out[name] = [convert(pairs) for pairs in blocks]
    return out


@dataclass
class TrainBatches:
    """TrainBatches(...)[step] -> Batch. ValueError if the sizes do not fit together.

    Only rows that an active objective uses are loaded. Each row has its own random numbers, so
    turning one objective off does not change the data of the others.
    """
    source: Any
    tokenizer: Any                      # list of strings -> (n, 77) ids, 0 is padding; or None
    seed: int
    batch: int                          # B = B_clip, over all processes
    batch_ssl: int                      # B_ssl, over all processes
    batch_rec: int                      # B_rec, over all processes
    clip: bool                          # True: the objective is on
    ssl: bool
    rec: bool
    image: int                          # H = W
    local_image: int                    # h = w
    n_local: int                        # V
    patch: int                          # side of a patch
    rank: int = 0                       # number of this process, 0 .. world_size - 1
    world_size: int = 1
    drop_clip: float = 0.0              # stochastic depth: share of images that skip a branch
    drop_rec: float = 0.0
    drop_ssl: float = 0.0
    depth: int = 0                      # number of blocks of the trunk

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
        # a subset takes every (B / size)-th row, and all processes have equally many rows of it
        unit = lcm(self.world_size, *subsets.values())
        check_multiple("--batch", self.batch, unit, f"as required by {' and '.join(reasons)}")

    @property
    def images_per_step(self):
        """Number of images that one step reads, over all processes"""
        sizes = [(self.batch, self.clip), (self.batch_ssl, self.ssl), (self.batch_rec, self.rec)]
        rows = set()                                     # a row of two subsets is loaded once
        for size, is_on in sizes:
            if is_on:
                rows |= set(range(0, self.batch, self.batch // size))
        return len(rows)

    def rank_rows(self, size):
        """Row numbers of a subset of `size` images that belong to this process: every (B / size)-th
        row of its part of the batch -> range"""
        first = self.rank * self.batch // self.world_size
        last = (self.rank + 1) * self.batch // self.world_size
        return range(first, last, self.batch // size)

    def __getitem__(self, step):
        rec_rows = self.rank_rows(self.batch_rec) if self.rec else range(0)
        ssl_rows = self.rank_rows(self.batch_ssl) if self.ssl else range(0)
        # CLIP and reconstruction share one view; without CLIP only B_rec images need it
        image_rows = self.rank_rows(self.batch) if self.clip else rec_rows
        out = Batch(captions=[], bad=[], keep=self.stochastic_depth(step))
        images, views = self.load_rows(step, image_rows, ssl_rows, out)
        if image_rows:
            out.image = torch.from_numpy(np.stack(images))            # (b, 3, H, W)
            out.rows_image = torch.tensor(image_rows)
        if self.clip:
            text = self.tokenizer(out.captions)                       # (b, 77)
            # the text tower is causal and is read at the end token, so it needs no padding
            # beyond the longest caption
            longest = int((text != 0).any(0).nonzero().max()) + 1
            out.text = text[:, :longest]                              # (b, T)
        if self.rec:
            # (Br,) positions of the reconstructed images in out.image
            out.rec = torch.tensor([image_rows.index(row) for row in rec_rows])
        if self.ssl:
            self.add_views(step, ssl_rows, views, out)
        return out

    def load_rows(self, step, image_rows, ssl_rows, out):
        """-> clip_view of each image row, a list; global crop 1, global crop 2 and V local crops
        of each ssl row, one list. Captions and unreadable names are appended to `out`."""
        images, views, jobs = [], [], []
        for row in sorted({*image_rows, *ssl_rows}):
            image, caption = self.load_sample(step, row, out.bad)
            image = np.array(image)                                   # converted once for all views
            if row in image_rows:
                rng = make_rng(Stream.CLIP_VIEW, self.seed, step, row)
                images.append(augment.clip_view(rng, image, self.image))
                out.captions.append(caption)
            if row in ssl_rows:
                # one generator for all crops of a row: ssl_views draws in the order of the jobs
                rng = make_rng(Stream.CROPS, self.seed, step, row)
                jobs.append((rng, image, self.image, VIEWS["global 1"]))
                jobs.append((rng, image, self.image, VIEWS["global 2"]))
                jobs += [(rng, image, self.local_image, VIEWS["local"])] * self.n_local
            if len(jobs) >= VIEWS_AT_ONCE:
                views += augment.ssl_views(jobs)
                jobs = []                                             # frees the images
        return images, views + augment.ssl_views(jobs)

    def add_views(self, step, ssl_rows, views, out):
        """Add the crops and their masks to `out`.   VTP Sec. 3.3"""
        Bs, V, side = len(ssl_rows), self.n_local, self.local_image
        out.rows_ssl, out.n_crops = torch.tensor(ssl_rows), 2 * Bs
        # views is ordered by image, a batch by crop: all first crops, then all second crops
        crops = views[0::2 + V] + views[1::2 + V]
        out.crops = torch.from_numpy(np.stack(crops)).unflatten(0, (2, Bs))
        out.locals = torch.empty(V, Bs, 3, side, side, dtype=torch.uint8)
        for v in range(V):
            out.locals[v] = torch.from_numpy(np.stack(views[2 + v::2 + V]))

        indices = self.crop_indices(ssl_rows, self.batch_ssl, 2)
        grid = self.image // self.patch                               # patches per side
        mask = augment.batch_masks(self.seed, step, 2 * self.batch_ssl, grid, grid, indices)
        out.mask = torch.from_numpy(mask).unflatten(0, (2, Bs))       # (2, Bs, N)
        out.mask_index, out.mask_weight = augment.mask_index_and_weight(out.mask)

    def crop_indices(self, rows, size, crops=1):
        """-> (crops * len(rows),) array: positions of the crops of these rows among all crops of
        the global batch

        size   number of images of the subset, over all processes      crops  per image
        The order is that of DINOv2: the first crops of all images, then the second crops, ...
        """
        image_indices = np.array(rows) // (self.batch // size)        # positions in the subset
        return (image_indices + size * np.arange(crops)[:, None]).ravel()

    def stochastic_depth(self, step):
        """-> {name: kept rows of each block (augment.kept_rows), or None at rate 0}

        image  for the forward pass of Batch.image, which serves CLIP, reconstruction or both
        rec    only if reconstruction has another rate than CLIP; it then has its own forward pass
        ssl    for the global crops      local  for the local crops
        """
        def draw(rate, size, objective, crops=1):
            rows = self.crop_indices(self.rank_rows(size), size, crops)
            key = self.seed, step, objective
            return augment.kept_rows(rate, self.depth, rows, crops * size, *key)

        # 0 to 3 number the forward passes, so that each has its own random numbers
        keep = dict.fromkeys(("image", "ssl", "local"))
        if self.clip:
            keep["image"] = draw(self.drop_clip, self.batch, 0)
            if self.rec and self.drop_rec != self.drop_clip:
                keep["rec"] = draw(self.drop_rec, self.batch_rec, 1)
        elif self.rec:
            keep["image"] = draw(self.drop_rec, self.batch_rec, 0)
        if self.ssl:
            keep["ssl"] = draw(self.drop_ssl, self.batch_ssl, 2, crops=2)
            keep["local"] = draw(self.drop_ssl, self.batch_ssl, 3, crops=self.n_local)
        return keep

    def load_sample(self, step, row, bad):
        """-> image, caption. If the sample is unreadable, its name is appended to `bad` and a
        random other sample replaces it."""
        position = step * self.batch + row                            # since the start of training
        if self.source.endless:
            index = position
        else:
            epoch, k = divmod(position, len(self.source))
            index = epoch_index(self.seed, epoch, len(self.source), k)
        # a hundred failures in a row mean that the data set is gone, not that files are damaged
        for attempt in range(100):
            try:
                rng = make_rng(Stream.SAMPLE, self.seed, step, row)
                image, caption, _ = self.source.load(index, rng)
                return image, caption
            except MemoryError:                                       # not a fault of the sample
                raise
            except Exception as error:                                # decoders raise many types
                bad.append(unreadable_message(self.source, index, error))
            # the replacement does not depend on the number of processes or workers
            rng = make_rng(Stream.REPLACEMENT, self.seed, step, row, attempt)
            index = int(rng.integers(len(self.source)))
        raise ValueError(f"100 samples in a row could not be read; the last one was {bad[-1]}. "
                         f"Check that {self.source.spec} still exists")


def unreadable_message(source, index, error):
    """-> the name of a sample and why it cannot be read, one line for logs"""
    return printable(f"{source.name(index)} ({type(error).__name__}: {error})")


def epoch_index(seed, epoch, n, k):
    """-> index of the k-th of n samples in the random order of this epoch"""
    if n > MAX_STORED_PERMUTATION:
        from vtp_min.extras.shards import feistel_permutation
        return feistel_permutation(seed, epoch, n, k)
    return int(permutation(seed, epoch, n)[k])


def check_multiple(flag, n, unit, reason):
    """ValueError unless n is a positive multiple of unit. The message names the nearest one."""
    if n % unit or n < unit:
        raise ValueError(f"{flag} {n} is not a multiple of {unit}, {reason}; try {flag} "
                         f"{round_to_multiple(n, unit)}")


def round_to_multiple(n, unit):
    """-> the positive multiple of unit that is closest to n"""
    return max(1, round(n / unit)) * unit


def clean_batches(args):
    """TrainBatches that hold only clip_view and no captions, for stage 2 and the baselines"""
    source = open_data(args.data, "train", args.seed, side=args.image)
    return TrainBatches(
        source, None, args.seed, batch=args.batch, batch_ssl=args.batch, batch_rec=args.batch,
        clip=False, ssl=False, rec=True, image=args.image, local_image=args.image, n_local=0,
        patch=args.patch, rank=rank(), world_size=world_size())


# ---------------------------------------------------------------- worker processes
def prefetch(batches, start, stop, workers=0):
    """Iterator over batches[start], ..., batches[stop - 1]. Worker processes compute them ahead of
    time; with workers=0 this process computes each one when it is requested."""
    if workers and isinstance(batches, TrainBatches):
        from vtp_min.extras.slices import prefetch_in_slices
        return prefetch_in_slices(batches, start, stop, workers)
    return map_in_workers(batches.__getitem__, range(start, stop), workers)


def map_in_workers(function, items, workers):
    """map(function, items), in order, on `workers` processes with one torch thread each.

    The random state of the caller does not change.
    """
    if workers == 0:
        return map(function, items)
    from vtp_min.extras.workers import map_in_processes
    return map_in_processes(function, items, workers)


# ---------------------------------------------------------------- evaluation batches
def eval_batches(source, side, batch, limit=None, crop="adm", workers=0, seed=0):
    """This process's part of all images, each image once, in the order of the source.

    limit   number of images over all processes, or None for all; the chosen images are evenly
            spaced, so that all classes occur although the source is sorted by class
    crop    a key of augment.EVAL_CROPS
    Yields images (b, 3, side, side) uint8, labels (b,), captions. Unreadable images are reported
    and skipped, which makes their batch smaller. ValueError if more than half are unreadable.
    """
    if crop not in EVAL_CROPS or batch < 1 or (limit is not None and limit < 1):
        raise ValueError(f"found crop={crop!r}, batch={batch}, limit={limit}; crop must be one of "
                         f"{', '.join(EVAL_CROPS)}, batch and limit must be 1 or more")
    n = min(limit or len(source), len(source))
    indices = [k * len(source) // n for k in rank_slice(n)]
    chunks = [indices[k:k + batch] for k in range(0, len(indices), batch)]
    on_rank = f" on rank {rank()}" if world_size() > 1 else ""
    n_unreadable = 0
    load = partial(load_eval_batch, source, side, EVAL_CROPS[crop], seed)
    for images, labels, captions, bad in map_in_workers(load, chunks, workers):
        for name in bad:
            print(f"skipped{on_rank}: {name}", flush=True)
        n_unreadable += len(bad)
        # a result on less than half of the images would be misleading
        if 2 * n_unreadable > len(indices):
            raise ValueError(f"more than half of the {len(indices)} images of {source.spec}"
                             f"{on_rank} could not be read; the last one was {bad[-1]}")
        if captions:                                     # else the whole batch was unreadable
            yield images, labels, captions
    if n_unreadable:
        print(f"{n_unreadable} of {len(indices)} images of {printable(source.spec)}{on_rank} could "
              f"not be read and were skipped", flush=True)


def load_eval_batch(source, side, crop, seed, indices):
    """-> images (b, 3, side, side) uint8 or None, labels (b,), captions, unreadable names"""
    images, labels, captions, bad = [], [], [], []
    for index in indices:
        try:
            image, caption, label = source.load(index, make_rng(Stream.EVAL, seed, index))
        except MemoryError:                              # not a fault of the image
            raise
        except Exception as error:
            bad.append(unreadable_message(source, index, error))
        else:
            images.append(augment.to_chw(crop(image, side)))
            labels.append(label)
            captions.append(caption)
    images = torch.from_numpy(np.stack(images)) if images else None
    return images, torch.tensor(labels), captions, bad


# ---------------------------------------------------------------- contact sheet
def image_sheet(batch, patch, zoom):
    """A Batch -> PIL image with one row per sample: clip_view, both global crops with the masked
    patches in gray, the local crops, and the caption below them."""
    b, _, side, _ = batch.image.shape
    grid, caption_height = side // patch, 32 // zoom              # before zooming
    masked = batch.mask.view(2, b, 1, grid, grid)
    masked = masked.repeat_interleave(patch, -1).repeat_interleave(patch, -2)     # (2, b, 1, H, W)
    tiles = [batch.image, *torch.where(masked, 128, batch.crops), *batch.locals]
    # a white border of 2 pixels; local crops are filled up to the height of the others
    tiles = [F.pad(tile, [2, 2, 2, side + 2 - tile.shape[-1]], value=255) for tile in tiles]
    rows = F.pad(torch.cat(tiles, -1), [0, 0, 0, caption_height], value=255)
    sheet = torch.cat([*rows], -2).repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)
    sheet = Image.fromarray(sheet.permute(1, 2, 0).numpy())
    draw = ImageDraw.Draw(sheet)
    for row, caption in enumerate(batch.captions):
        y = ((row + 1) * (side + 4 + caption_height) - caption_height) * zoom
        # about 6 pixels per letter
        draw.text((2 * zoom, y), textwrap.fill(caption, sheet.width // 6, max_lines=2), "black")
    return sheet


def show(args):
    """Print the contents and the reading speed of a source, and write the contact sheet"""
    source = open_data(args.data, args.split, args.seed, args.image, whole=True)
    batches = TrainBatches(
        source, None, args.seed, args.rows, args.rows, args.rows, clip=False, ssl=True, rec=True,
        image=args.image, local_image=args.local_image, n_local=args.locals, patch=args.patch)
    size = "endless" if source.endless else f"{len(source):,} samples"
    print(f"{printable(source.spec)}, {args.split}: {size}")
    if source.classes:
        ellipsis = ", ..." if len(source.classes) > 12 else ""
        print(f"{len(source.classes)} classes: {', '.join(source.classes[:12])}{ellipsis}")

    n_steps, bad = max(1, 64 // args.rows), []
    start = time.perf_counter()
    for batch in tqdm(prefetch(batches, 1, 1 + n_steps), "timing", total=n_steps):
        bad += batch.bad
    n_samples = n_steps * args.rows
    ms = 1000 * (time.perf_counter() - start) / n_samples
    if bad:
        # a file that was drawn twice is printed once
        print(f"{len(bad)} of {n_samples + len(bad)} samples could not be read and were replaced:",
              *dict.fromkeys(bad), sep="\n    ")
    print(f"{ms:.1f} ms per sample in one process, for reading, clip_view, 2 global crops of "
          f"{args.image} pixels and {args.locals} local crops of {args.local_image} pixels")

    batch = batches[0]
    print("captions:", *(printable(c)[:200] for c in batch.captions), sep="\n    ")
    # small images are enlarged to a side of about 160 pixels
    image_sheet(batch, args.patch, zoom=max(1, 160 // args.image)).save(args.out)
    print(f"wrote {args.out}: clip_view, global crops 1 and 2 with the masked patches in gray, "
          f"local crops")


def main():
    p = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Print the size, the captions and the reading speed of a data set, and write a "
                    "contact sheet of the views, crops and masks that training uses. Tar files are "
                    "indexed once; the indices are kept in $VTP_CACHE or ~/.cache/vtp_min, and "
                    "nothing is written beside the tar files.")
    p.add_argument("--data", default="shapes",
                   help="shapes, shapes:objects=1,size=0.6-0.9, a folder (DIR/train/CLASS/x.jpg or "
                        "DIR/CLASS/x.jpg), or tar files of image-caption pairs, in quotes: "
                        "'pairs-{000000..000003}.tar', 'pairs-*.tar'")
    p.add_argument("--split", choices=["train", "val"], default="train", help="part of --data")
    p.add_argument("--image", type=int, default=36,
                   help="side of clip_view and the global crops in pixels; the released models "
                        "have 256")
    p.add_argument("--local-image", type=int, default=18,
                   help="side of the local crops in pixels; DINOv2 has 96 with global crops of 224")
    p.add_argument("--locals", type=int, default=2,
                   help="number of local crops per image; DINOv2 has 8")
    p.add_argument("--patch", type=int, default=9,
                   help="side of a patch in pixels; masks hide whole patches; the paper has 16")
    p.add_argument("--rows", type=int, default=8, help="number of samples on the sheet")
    p.add_argument("--seed", type=int, default=0,
                   help="seed of the order of the samples, the crops and the masks")
    p.add_argument("--out", default="sheet.png", help="file for the contact sheet")
    args = p.parse_args()
    from vtp_min.extras.flag_ranges import check_numbers
    from vtp_min.extras.output import protect_output
    protect_output()
    try:
        check_numbers(args)
        show(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"data.py: {error}")


if __name__ == "__main__":
    main()
