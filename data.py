"""Where images and captions come from, and how they become batches. How a file is read and what is cut out of it: vtp_min/views.py.

    sources    open_data(spec) -> Shapes (built in, endless) | Folder (class folders) | Shards (tars of image-caption pairs)
    batches    Steps(...)[step] -> this rank's share of one step        eval_batches(source) -> every picture once, in order

Whatever is random comes from a generator keyed by its purpose, the seed, the step and the row: a batch follows from the seed,
the step and the batch sizes alone, not from workers, ranks or what was trained before. B_ssl and B_rec are every k-th row of the
batch, which is shuffled: VTP Sec. 3.6 draws them at random. (At the paper's sizes every painted row is also a self-supervised one.)

Nothing is executed or unpacked, and nothing is lost in silence: what cannot be read is left out, named and counted, and more than half of
it stops the program.                `python data.py --data SPEC` draws a sheet of what training sees, and walks the tars once for all runs.
"""
import argparse
import io
import os
import signal
import sys
import textwrap
import time
from dataclasses import dataclass
from functools import lru_cache, partial
from math import lcm
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader
from tqdm import tqdm

from vtp_min import shapes
from vtp_min.dist import rank, say, world
from vtp_min.tars import expand, index_folder, indexed
from vtp_min.views import (ASSETS, CLEAN, CROPS, CUTS, ENDINGS, EVAL, ORDER, SAMPLE, SPARE, VIEWS, batch_masks, clean_view, is_picture, lots, pixels, read_caption,
                           read_image, recolour, shown, ssl_crop)


# ---- sources. Each has len, spec, endless, classes (names in label order, or None), name(index), and load(index, rng) -> image, caption,
# ---- label: a PIL RGB image, a string, an int (-1: unknown). rng only chooses the words. What cannot be read raises.

def open_data(spec=None, split="train", seed=0, side=64, whole=False):
    """What the user typed after --data -> a source.

    spec    None, 'shapes' or 'shapes:objects=1-3,size=0.3-0.6'     the built-in pictures; settings as in vtp_min.shapes.draw
            a folder with train/ and val/, or of class folders      captions: class names in OpenAI's 80 templates
            'pairs-{000000..000003}.tar', a glob, or one tar        WebDataset / img2dataset: KEY.jpg and KEY.txt (or KEY.json)
    split   'train' or 'val'       seed  of the endless shapes      side  in pixels; only shapes care
    whole   the spec was named for this very split (as --val-data): what has no splits of its own serves entirely
    Raises ValueError when there is nothing to open.
    """
    spec = str(spec or "shapes")
    if split not in ("train", "val"):
        raise ValueError(f"split is {split!r}, but a source has 'train' and 'val'")
    if spec.partition(":")[0] == "shapes":
        return Shapes(spec, split, seed, side)
    if not os.path.isdir(spec) and (spec.endswith(".tar") or any(c in spec for c in "{*?[")):
        return Shards(spec, split, whole)
    return Folder(spec, split, whole)


class Shapes:
    """The built-in pictures. Validation is set 0 for everyone, training is set seed + 1: they never meet.

    Training pictures are drawn 15 % larger than `side`, validation pictures at `side`: the clean view keeps at least 0.9 of each
    side, so it is always shrunk, never enlarged, and as sharp as what validation shows.
    """
    classes = list(shapes.KINDS)
    templates = [f"{'an' if colour == 'orange' else 'a'} {colour} {{}}" for colour in shapes.COLOURS]      # for zero-shot prompts

    def __init__(self, spec, split, seed, side):
        self.spec, self.endless = spec, split == "train"
        self.set, self.side = (seed + 1, round(1.15 * side)) if self.endless else (0, side)
        self.settings = {}
        for item in filter(None, spec.partition(":")[2].split(",")):
            name, _, value = item.partition("=")
            low, _, high = value.partition("-")
            try:
                number = {"objects": int, "size": float}[name.strip()]
                self.settings[name.strip()] = number(low), number(high or low)
            except (KeyError, ValueError):
                raise ValueError(f"{spec!r}: no setting {item!r}; shapes has objects and size, for example "
                                 f"shapes:objects=1-3,size=0.3-0.6") from None
        self.load(0)                                                      # settings that cannot be drawn are refused here

    def __len__(self):
        """Validation: 10,000. Training has no end (any index from 0 on); whoever needs one, dit.py's latents say, calls 50,000 an epoch."""
        return 50_000 if self.endless else 10_000

    def load(self, index, rng=None):
        image, caption, label = shapes.draw(index, self.side, self.set, **self.settings)
        return Image.fromarray(image), caption, label

    def name(self, index):
        return f"picture {index} of {self.spec}"


class Folder:
    """Pictures in class folders: DIR/train/CLASS/x.jpg and DIR/val/CLASS/y.jpg, or DIR/CLASS/x.jpg; folders within a class belong to it.

    A class is numbered by its folder's rank. It is called what DIR/classnames.txt says (folder<TAB>name), else, if the folder is a
    WordNet id of ImageNet, by OpenCLIP's name for it, else by the folder itself with underscores turned to spaces.
    Names that begin with a dot (.DS_Store, ._x.jpg) are never looked at.
    """
    endless = False

    def __init__(self, spec, split, whole):
        self.spec, root, wanted = spec, Path(spec), "wanted DIR/train/CLASS/x.jpg and DIR/val/CLASS/y.jpg, or DIR/CLASS/x.jpg"
        if not root.is_dir():
            raise ValueError(f"no folder {spec}; {wanted} (a tar is named *.tar; without --data the built-in shapes serve)")
        parts = [root / s for s in ("train", "val") if (root / s).is_dir()]
        if parts and root / split not in parts or not parts and split == "val" and not whole:
            raise ValueError(f"{spec} has no {split}/ folder; " + ("name another folder with --val-data" if split == "val" else
                             f"to train on its val/ all the same, type --data {root / 'val'}"))
        self.root = root / split if parts else root
        folders = sorted({e.name for part in parts or [root] for e in os.scandir(part) if e.is_dir() and e.name[0] != "."}, key=os.fsencode)
        files, labels, aside = [], [], [e.name for e in os.scandir(self.root) if not e.is_dir() and is_picture(e.name)]
        for label, folder in enumerate(folders):
            for file in files_below(self.root, folder):
                if is_picture(file):
                    files.append(os.fsencode(file))
                    labels.append(label)
                else:
                    aside.append(file)
        if not files:
            raise ValueError(f"{self.root} holds no class folders with pictures ({' '.join(ENDINGS)}); {wanted}")
        self.files, self.labels = np.array(files), np.array(labels)       # arrays are lean when forked
        if aside:
            say(f"{shown(self.root)}: {len(aside)} files are left out, for their ending or for lying in no class folder ({shown(aside[0])}, ...)")
        if empty := sorted({*range(len(folders))} - {*labels}):
            say(f"{shown(self.root)}: {len(empty)} of {len(folders)} classes have no picture here ({shown(folders[empty[0]])}, ...)")
        names = dict(zip(*((ASSETS / f"imagenet_{x}.txt").read_text("utf-8").splitlines() for x in ("wnids", "classnames")), strict=True))
        for path in (root.parent / "classnames.txt", root / "classnames.txt"):                # DIR/val may be named without its DIR
            if path.exists():
                names |= dict(line.split("\t", 1) for line in path.read_text("utf-8-sig", "replace").splitlines() if "\t" in line)
        folders = [os.fsencode(f).decode("utf-8", "replace") for f in folders]                # the same words in any locale
        self.classes = [names.get(f, f.replace("_", " ")) for f in folders]
        self.templates = (ASSETS / "imagenet_templates.txt").read_text("utf-8").splitlines()

    def __len__(self):
        return len(self.files)

    def load(self, index, rng):
        label, file = int(self.labels[index]), self.root / os.fsdecode(self.files[index])
        if not file.is_file():
            raise FileNotFoundError("a link that leads nowhere, or no file")                  # a pipe would be waited for
        return read_image(file), self.templates[rng.integers(len(self.templates))].format(self.classes[label]), label

    def name(self, index):
        return shown(self.root / os.fsdecode(self.files[index]))


def files_below(root, folder):
    """-> names, seen from root, of the files in its `folder` and in the folders within, in order; links to folders are not followed"""
    for here, folders, files in os.walk(os.path.join(root, folder)):
        folders[:] = sorted((f for f in folders if f[0] != "."), key=os.fsencode)
        here = os.path.relpath(here, root)
        yield from (f"{here}/{f}" for f in sorted(files, key=os.fsencode) if f[0] != ".")


class Shards:
    """Image-caption pairs in tars. Their headers are walked once in a lifetime; then any sample is three reads at known places.

    What the walk finds is kept in $VTP_CACHE, or ~/.cache/vtp_min: a file of 20 bytes a pair for each tar, to be deleted whenever you like
    (a tar of another size or date is walked again). Memory holds a line a tar, not a line a sample: VTP's 277M pairs are 27,700 lines.
    Ranks begin the walk at different places and take over what others have finished. A file is opened for each read: two system calls more
    than keeping it open, and nothing to close, to fork or to send to a worker.
    """
    endless, classes = False, None

    def __init__(self, spec, split, whole):
        if split == "val" and not whole:
            raise ValueError(f"{spec} has no validation split; name one with --val-data (other shards, a folder, or shapes)")
        self.spec, tars, kept = spec, expand(spec), index_folder()
        first = rank() * len(tars) // world()
        tars, many = tars[first:] + tars[:first], len(tars) >= 8
        workers = many * max(1, min(32, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        found = list(tqdm(in_workers(partial(indexed, kept), tars, workers), "indexing tars", len(tars), disable=not many or rank() > 0))
        found = found[len(tars) - first:] + found[:len(tars) - first]     # in the pattern's order again
        good = [x for x in found if "broken" not in x]
        bad = [f"{shown(x['tar'])} {shown(x.get('broken') or x['end'])}" for x in found if "broken" in x or x["end"]]
        some = ", ".join(bad[:10]) + ", ..." * (len(bad) > 10)
        if 2 * len(good) < len(found) or not found:
            raise ValueError(f"{len(found) - len(good)} of the {len(found)} tars that {spec} names cannot be read: {some}; "
                             f"wanted a tar, a glob in quotes, or a range such as 'pairs-{{000000..000003}}.tar'")
        if bad:
            say(f"{shown(spec)}: {len(bad)} of {len(found)} tars are damaged or missing: {some}")
        self.tars = [(x["tar"], x["index"], x["start"]) for x in good]
        self.ends = np.cumsum([x["samples"] for x in good])               # (tars,) pairs up to and including each
        lost = sum(x["lost"] for x in good)
        example = next((f"{shown(x['tar'])}:{shown(x['first'])}" for x in good if x["lost"]), "")
        if not self.ends[-1]:
            raise ValueError(f"{spec} holds no pairs: wanted KEY.jpg (or {' '.join(ENDINGS[1:])}) with KEY.txt, or KEY.json with a \"caption\""
                             + f" ({example})" * bool(lost))
        if lost:
            say(f"{shown(spec)}: {lost} of {lost + self.ends[-1]} samples are left out ({example}, ...)")
        if new := sum(x["new"] for x in good):
            say(f"{shown(spec)}: walked {new} of {len(found)} tars; later runs find them indexed in {shown(kept)}")

    def __len__(self):
        return int(self.ends[-1])

    def place(self, index):
        """-> tar, and of this pair: picture at, its size, words at, their size, 1 if they are plain and 0 if JSON"""
        k = int(np.searchsorted(self.ends, index, "right"))
        tar, file, start = self.tars[k]
        row = index - (int(self.ends[k - 1]) if k else 0)
        image_at, image_size, words_at, words_size, plain = map(int, np.fromfile(file, np.uint32, 5, offset=start + 20 * row))
        return tar, 512 * image_at, image_size, 512 * words_at, words_size, plain

    def load(self, index, rng=None):
        tar, image_at, image_size, words_at, words_size, plain = self.place(index)
        with open(tar, "rb") as f:
            f.seek(image_at)
            image = read_image(io.BytesIO(f.read(image_size)))
            f.seek(words_at)
            return image, read_caption(f.read(words_size), plain), -1

    def name(self, index):
        """The picture's name stands in its header, the 512 bytes before it (the first 100 letters of a longer one)."""
        try:
            tar, image_at, *_ = self.place(index)
            with open(tar, "rb") as f:
                f.seek(image_at - 512)
                return shown(f"{tar}:{f.read(100).split(bytes(1))[0].decode('utf-8', 'replace')}")
        except Exception:                                                 # the tar has gone, and this is only about its name
            return shown(f"sample {index} of {self.spec}")


# ---- batches

@dataclass
class Steps:
    """steps[s] -> this rank's share of step s. Raises ValueError for sizes that do not fit together.

    image     uint8 (b, 3, H, W)      clean views of the rows that clip or rec use           rows_image  (b,) their places in the batch
    text      int64 (b, T)            their captions, T as long as the longest               captions    list of b strings
    rec       int64 (Br,)             which of `image` are decoded
    crops     uint8 (2, Bs, 3, H, W)  global crops     locals  uint8 (V, Bs, 3, h, w)        rows_ssl    (Bs,) their places in the batch
    mask      bool (2, Bs, N)         what the student does not see                          bad         names of what could not be read
    `image` and captions come with clip or rec, `text` with clip, `rec` with rec, the last two lines with ssl. Rows that no active loss
    uses are not loaded, and each row's lots have their own key: turning a loss off changes nothing for the others.
    """
    source: Any
    tokenizer: Any                 # list of strings -> (n, 77) ids, 0 pads; None without clip
    seed: int
    batch: int                     # B = B_clip, over all ranks
    batch_ssl: int
    batch_rec: int
    clip: bool
    ssl: bool
    rec: bool
    image: int                     # H = W
    local_image: int               # h = w
    n_local: int                   # V
    patch: int
    rank: int = 0
    world: int = 1

    def __post_init__(self):
        for side, flag in [(self.image, "--image")] + [(self.local_image, "--local-image")] * bool(self.ssl and self.n_local):
            if side % self.patch or side < self.patch:
                raise ValueError(f"{flag} {side} is no multiple of the patch, {self.patch}; try {flag} {nearest(side, self.patch)}")
        if self.batch < 2:
            raise ValueError(f"--batch {self.batch}: contrast needs at least two pictures; try --batch {nearest(2, self.world)}")
        subsets = [(n, flag) for n, flag, on in ((self.batch_ssl, "--batch-ssl", self.ssl), (self.batch_rec, "--batch-rec", self.rec)) if on]
        for n, flag in subsets:
            if n % self.world or n < self.world:
                raise ValueError(f"{flag} {n} cannot be shared equally by {self.world} processes; try {flag} {nearest(n, self.world)}")
        unit = lcm(self.world, *(n for n, _ in subsets))
        if self.batch % unit:
            why = " and ".join([f"{flag} {n}" for n, flag in subsets] + [f"{self.world} processes"] * (self.world > 1))
            raise ValueError(f"--batch {self.batch} is no multiple of {unit}, as {why} ask for; try --batch {nearest(self.batch, unit)}")

    @property
    def rows(self):
        """How many pictures a step reads, over all ranks"""
        used = [count for count, on in ((self.batch, self.clip), (self.batch_ssl, self.ssl), (self.batch_rec, self.rec)) if on]
        return len({row for count in used for row in range(0, self.batch, self.batch // count)})

    def share(self, count):
        """Places in the batch of this rank's rows of a subset of `count`: evenly spread, every (B / count)-th."""
        return range(self.rank * self.batch // self.world, (self.rank + 1) * self.batch // self.world, self.batch // count)

    def __getitem__(self, step):
        in_rec, in_ssl = self.share(self.batch_rec) if self.rec else range(0), self.share(self.batch_ssl) if self.ssl else range(0)
        in_image = self.share(self.batch) if self.clip else in_rec
        image = np.empty((len(in_image), 3, self.image, self.image), np.uint8)
        crops = np.empty((2, len(in_ssl), 3, self.image, self.image), np.uint8)
        small = np.empty((self.n_local, len(in_ssl), 3, self.local_image, self.local_image), np.uint8)
        captions, bad = [], []
        changes = np.empty((2 + self.n_local, len(in_ssl)), object)       # lists: what is still to happen to each crop's colours
        for row in sorted({*in_image, *in_ssl}):
            picture, caption = self.sample(step, row, bad)
            picture = np.array(picture)                                   # one conversion for all its views
            if row in in_image:
                image[in_image.index(row)] = clean_view(lots(CLEAN, self.seed, step, row), picture, self.image)
                captions.append(caption)
            if row in in_ssl:
                rng, j = lots(CROPS, self.seed, step, row), in_ssl.index(row)
                crops[0, j], changes[0, j] = ssl_crop(rng, picture, self.image, *VIEWS["global 1"])
                crops[1, j], changes[1, j] = ssl_crop(rng, picture, self.image, *VIEWS["global 2"])
                for v in range(self.n_local):
                    small[v, j], changes[2 + v, j] = ssl_crop(rng, picture, self.local_image, *VIEWS["local"])
        recolour(crops.reshape(-1, *crops.shape[2:]), changes[:2].ravel())
        recolour(small.reshape(-1, *small.shape[2:]), changes[2:].ravel())
        out = {"captions": captions, "bad": bad}
        if in_image:
            out |= {"image": torch.from_numpy(image), "rows_image": torch.tensor(in_image)}
        if self.clip:
            text = self.tokenizer(captions)
            out["text"] = text[:, :int((text != 0).any(0).nonzero().max()) + 1]         # a causal tower needs no padding beyond the longest; its work shrinks in proportion
        if self.rec:
            out["rec"] = torch.tensor([in_image.index(row) for row in in_rec])
        if self.ssl:
            first, side = self.rank * len(in_ssl), self.image // self.patch
            rows = [g * self.batch_ssl + first + j for g in range(2) for j in range(len(in_ssl))]
            mask = batch_masks(self.seed, step, 2 * self.batch_ssl, side, side, rows)
            out |= {"crops": torch.from_numpy(crops), "locals": torch.from_numpy(small), "rows_ssl": torch.tensor(in_ssl),
                    "mask": torch.from_numpy(mask).view(2, len(in_ssl), -1)}
        return out

    def sample(self, step, row, bad):
        """-> picture, caption. What cannot be read joins `bad` and is replaced by one drawn from (seed, step, row, attempt)."""
        place = step * self.batch + row
        epoch, k = (0, place) if self.source.endless else divmod(place, len(self.source))
        index = k if self.source.endless else shuffled(self.seed, epoch, len(self.source), k)
        for attempt in range(100):
            try:
                return self.source.load(index, lots(SAMPLE, self.seed, step, row))[:2]
            except MemoryError:                                           # not the sample's fault
                raise
            except Exception as problem:                                  # a damaged file makes decoders raise whatever they like
                bad.append(shown(f"{self.source.name(index)} ({type(problem).__name__}: {problem})"))
                index = int(lots(SPARE, self.seed, step, row, attempt).integers(len(self.source)))
        raise ValueError(f"a hundred samples in a row could not be read, last {bad[-1]}; is {self.source.spec} still there?")


def clean_steps(args):
    """Steps of clean views without captions: what stage 2 and the baselines train on"""
    source = open_data(args.data, "train", args.seed, side=args.image)
    return Steps(source, None, seed=args.seed, batch=args.batch, batch_ssl=args.batch, batch_rec=args.batch,
                 clip=False, ssl=False, rec=True, image=args.image, local_image=args.image, n_local=0,
                 patch=args.patch, rank=rank(), world=world())


LISTED = 2 ** 21                     # ImageNet is below: 16 MB a worker and epoch. VTP's 277M samples would be 2.2 GB


def shuffled(seed, epoch, n, k):
    """The k-th sample of an epoch over n, each once: place k of a drawn permutation; of one that is computed, not stored, for large n."""
    return int(permutation(seed, epoch, n)[k]) if n <= LISTED else scrambled(seed, epoch, n, k)


@lru_cache(maxsize=2)
def permutation(seed, epoch, n):
    return lots(ORDER, seed, epoch).permutation(n)


def scrambled(seed, epoch, n, k):
    """A keyed bijection of range(n) at k: six Feistel rounds on 2h bits, 4^h >= n, walked until the number is below n.

    A round (a, b) -> (b, a ^ f(b)) can be undone whatever f is, so no number comes twice; f is splitmix64's finish. Not so good on a few bits:
    small n are listed.
    """
    h, full = ((n - 1).bit_length() + 1) // 2, 2 ** 64 - 1
    while True:
        a, b = k >> h, k & (1 << h) - 1
        for key in round_keys(seed, epoch):
            f = (b ^ key) * 0xBF58476D1CE4E5B9 & full
            f = (f ^ f >> 27) * 0x94D049BB133111EB & full
            a, b = b, a ^ (f ^ f >> 31) & (1 << h) - 1
        k = a << h | b
        if k < n:
            return k


@lru_cache(maxsize=2)
def round_keys(seed, epoch):
    return [int(x) for x in lots(ORDER, seed, epoch).integers(2 ** 63, size=6)]


def nearest(n, unit):
    """The positive multiple of `unit` closest to n."""
    return max(1, round(n / unit)) * unit


def batches(steps, start, stop, workers=0):
    """Steps `start` to `stop` - 1, in order, the same for any number of workers."""
    return in_workers(steps.__getitem__, range(start, stop), workers)


def in_workers(work, items, workers):
    """map(work, items), in order, by `workers` processes of one torch thread each; the caller's random state is not touched."""
    return iter(DataLoader(items, batch_size=None, collate_fn=work, num_workers=workers, worker_init_fn=outlive_signals,
                           generator=torch.Generator()))


def outlive_signals(worker):
    """Signals to the whole process group are the main process's to answer: it may need a batch to finish its step. Workers leave 30 s later."""
    for s in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(s, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))


def my_share(n):
    """Places of this rank's rows of n: contiguous, in rank order, so that dist.collect joins them in the source's order."""
    return range(rank() * n // world(), (rank() + 1) * n // world())


def eval_batches(source, side, batch, limit=None, crop="adm", workers=0, seed=0):
    """This rank's share of all pictures, each once, in order -> (images uint8 (b, 3, side, side), labels (b,), captions), batch after batch.

    limit  take that many over all ranks, evenly spread, so that each class is seen          crop  'adm' (centre) or 'squash'
    The share is my_share(min(limit, len(source))). What cannot be read is left out, named and counted by the rank that met it; its batch is
    smaller for it. Once more than half of a share has gone the number would mean nothing: ValueError.
    """
    if crop not in CUTS or batch < 1 or limit is not None and limit < 1:
        raise ValueError(f"crop={crop!r}, batch={batch}, limit={limit}: wanted 'adm' or 'squash', a batch and a limit of 1 or more")
    n, lost, here = min(limit or len(source), len(source)), 0, f" on rank {rank()}" if world() > 1 else ""
    indices = [k * len(source) // n for k in my_share(n)]
    work = partial(eval_batch, source, side, CUTS[crop], seed)
    for images, labels, captions, bad in in_workers(work, [indices[k:k + batch] for k in range(0, len(indices), batch)], workers):
        for name in bad:
            print(f"left out{here}: {name}", flush=True)
        lost += len(bad)
        if 2 * lost > len(indices):
            raise ValueError(f"more than half of the {len(indices)} pictures of {source.spec}{here} could not be read, last {bad[-1]}")
        if captions:
            yield images, labels, captions
    if lost:
        print(f"{lost} of {len(indices)} pictures of {shown(source.spec)}{here} could not be read and are left out", flush=True)


def eval_batch(source, side, cut, seed, indices):
    images, labels, captions, bad = [], [], [], []
    for index in indices:
        try:
            picture, caption, label = source.load(index, lots(EVAL, seed, index))
        except MemoryError:
            raise
        except Exception as problem:
            bad.append(shown(f"{source.name(index)} ({type(problem).__name__}: {problem})"))
        else:
            images.append(pixels(cut(picture, side)))
            labels.append(label)
            captions.append(caption)
    return torch.from_numpy(np.stack(images)) if images else None, torch.tensor(labels), captions, bad


# ---- look at it

def sheet(out, patch, zoom):
    """One batch of Steps -> PIL picture, a row per sample: clean view, both global crops with masked patches grey, local crops; the caption."""
    b, _, side, _ = out["image"].shape
    grid, line = side // patch, 32 // zoom
    hidden = out["mask"].view(2, b, 1, grid, grid).repeat_interleave(patch, -1).repeat_interleave(patch, -2)
    tiles = [out["image"], *torch.where(hidden, 128, out["crops"]), *out["locals"]]
    rows = torch.cat([F.pad(t, [2, 2, 2, side + 2 - t.shape[-1]], value=255) for t in tiles], -1)       # (b, 3, side + 4, wide)
    page = torch.cat([*F.pad(rows, [0, 0, 0, line], value=255)], -2).repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)
    page = Image.fromarray(page.permute(1, 2, 0).numpy())
    pen = ImageDraw.Draw(page)
    for row, caption in enumerate(out["captions"]):
        y = ((row + 1) * (side + 4 + line) - line) * zoom
        pen.text((2 * zoom, y), textwrap.fill(caption, page.width // 6, max_lines=2), "black")
    return page


def look(args):
    source = open_data(args.data, args.split, args.seed, args.image, whole=True)
    steps = Steps(source, None, args.seed, args.rows, args.rows, args.rows, clip=False, ssl=True, rec=True, image=args.image,
                  local_image=args.local_image, n_local=args.locals, patch=args.patch)
    print(f"{shown(source.spec)}, {args.split}: " + ("endless" if source.endless else f"{len(source):,} samples"))
    if source.classes:
        print(f"{len(source.classes)} classes: {', '.join(source.classes[:12])}{', ...' if len(source.classes) > 12 else ''}")
    start, count = time.perf_counter(), max(1, 64 // args.rows)
    bad = [name for out in tqdm(batches(steps, 1, 1 + count), "timing", total=count) for name in out["bad"]]
    ms = 1000 * (time.perf_counter() - start) / (count * args.rows)
    if bad:
        print(f"of {count * args.rows + len(bad)} samples {len(bad)} could not be read, others took their place:", *dict.fromkeys(bad), sep="\n    ")
    print(f"{ms:.1f} ms a sample in one process: reading, a clean view, 2 global crops of {args.image}, {args.locals} local ones of {args.local_image}")
    out = steps[0]
    print("captions of the sheet:", *(shown(c)[:200] for c in out["captions"]), sep="\n    ")
    sheet(out, args.patch, zoom=max(1, 160 // args.image)).save(args.out)
    print(f"wrote {args.out}: clean view, global crops 1 and 2 with what is masked in grey, local crops")


def main():
    p = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                description="Look at a data set as training sees it: counts, captions, speed, and a sheet of views, crops and masks. "
                                            "Tars are walked once and indexed in $VTP_CACHE or ~/.cache/vtp_min; nothing is written beside them.")
    p.add_argument("--data", default="shapes", help="shapes, shapes:objects=1,size=0.6-0.9, a folder (DIR/train/CLASS/x.jpg or DIR/CLASS/x.jpg), "
                                                    "or tars of pairs, in quotes: 'pairs-{000000..000003}.tar', 'pairs-*.tar'")
    p.add_argument("--split", choices=["train", "val"], default="train", help="which part of --data")
    p.add_argument("--image", type=int, default=36, help="side of the clean view and the global crops; nano trains at 36, the released models at 256")
    p.add_argument("--local-image", type=int, default=18, help="side of the local crops; DINOv2 takes 96 to a global 224")
    p.add_argument("--locals", type=int, default=2, help="local crops a picture; DINOv2 takes 8")
    p.add_argument("--patch", type=int, default=9, help="side of a patch, masks hide whole ones; nano 9, the paper 16")
    p.add_argument("--rows", type=int, default=8, help="samples on the sheet")
    p.add_argument("--seed", type=int, default=0, help="another seed: another order, other crops and masks")
    p.add_argument("--out", default="sheet.png", help="the sheet")
    args = p.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")                     # LANG=C: letters it lacks are spelled out
    try:
        look(args)
    except ValueError as problem:
        raise SystemExit(f"data.py: {problem}")


if __name__ == "__main__":
    main()
