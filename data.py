"""Where images and captions come from, and what is cut out of them.

    sources    open_data(spec) -> Shapes (built in, endless) | Folder (class folders) | Shards (tars of image-caption pairs)
    views      one clean view for words and pixels; 2 global and V local crops for self-distillation          DINOv2's recipe
    masks      which patches of a global crop the student has to guess                                        iBOT, as in DINOv2
    batches    Steps(...)[step] -> this rank's share of one step        eval_batches(source) -> every picture once, in order

Whatever is random comes from a generator keyed by its purpose, the seed, the step and the row: a batch follows from the seed,
the step and the batch sizes alone, not from workers, ranks or what was trained before. B_ssl and B_rec are every k-th row of the
batch: VTP Sec. 3.6 draws them at random, and so are these, since the batch is shuffled.        `python data.py --data SPEC` draws a sheet of what training sees.
"""
import argparse
import glob
import io
import json
import os
import re
import signal
import tarfile
import textwrap
import time
from dataclasses import dataclass
from functools import lru_cache, partial
from math import exp, lcm, log, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.transforms.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import DataLoader
from tqdm import tqdm

from vtp_min import shapes
from vtp_min.dist import rank, say

ASSETS = Path(__file__).parent / "vtp_min" / "assets"
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")                       # any case
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)                  # ImageNet's, as in VTP's released code (OpenCLIP's differ)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
ORDER, SAMPLE, SPARE, CLEAN, CROPS, TARGETS, BLOCKS, EVAL = range(8)      # purposes


def lots(purpose, *key):
    """The numpy Generator to draw lots from: equal keys, equal numbers, in any process."""
    return np.random.default_rng([purpose, *key])


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
    if spec.endswith(".tar") or any(c in spec for c in "{*?["):
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
    """Pictures in class folders: DIR/train/CLASS/x.jpg and DIR/val/CLASS/y.jpg, or DIR/CLASS/x.jpg.

    A class is numbered by its folder's rank. It is called what DIR/classnames.txt says (folder<TAB>name), else, if the folder is a
    WordNet id of ImageNet, by OpenCLIP's name for it, else by the folder itself with underscores turned to spaces.
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
        folders = sorted({e.name for part in parts or [root] for e in os.scandir(part) if e.is_dir()})
        found = [(f"{f}/{x}", label) for label, f in enumerate(folders) if (self.root / f).is_dir()
                 for x in sorted(os.listdir(self.root / f)) if x.lower().endswith(IMAGES)]
        if not found:
            raise ValueError(f"{self.root} holds no class folders with pictures ({' '.join(IMAGES)}); {wanted}")
        self.files, self.labels = np.array([os.fsencode(f) for f, _ in found]), np.array([label for _, label in found])   # lean when forked
        names = dict(zip(*((ASSETS / f"imagenet_{x}.txt").read_text().splitlines() for x in ("wnids", "classnames")), strict=True))
        for path in (root.parent / "classnames.txt", root / "classnames.txt"):                # DIR/val may be named without its DIR
            if path.exists():
                names |= dict(line.split("\t", 1) for line in path.read_text("utf-8").splitlines() if "\t" in line)
        self.classes = [names.get(f, f.replace("_", " ")) for f in folders]
        self.templates = (ASSETS / "imagenet_templates.txt").read_text().splitlines()

    def __len__(self):
        return len(self.files)

    def load(self, index, rng):
        label = int(self.labels[index])
        return read_image(self.name(index)), self.templates[rng.integers(len(self.templates))].format(self.classes[label]), label

    def name(self, index):
        return str(self.root / os.fsdecode(self.files[index]))


class Shards:
    """Image-caption pairs in tars. The headers are walked once, at opening; then any sample is two reads at known places.

    A file is opened for each read: two system calls more than keeping it open, and nothing to close, to fork or to send to a worker.
    """
    endless, classes = False, None

    def __init__(self, spec, split, whole):
        if split == "val" and not whole:
            raise ValueError(f"{spec} has no validation split; name one with --val-data (other shards, a folder, or shapes)")
        self.spec, self.tars = spec, expand(spec)
        rows, keys, lacking = [], [], []
        for n, tar in enumerate(tqdm(self.tars, "indexing shards", disable=len(self.tars) < 8 or rank() > 0)):
            for key, files in index_tar(tar).items():
                image = next((files[e] for e in ("jpg", "jpeg", "png", "webp") if e in files), None)
                words = files.get("txt") or files.get("json")
                if image and words:
                    rows.append((n, *image, *words, "txt" in files))
                    keys.append(key)
                else:
                    lacking.append(f"{tar}:{key}")
        if not rows:
            raise ValueError(f"{spec} holds no pairs: wanted KEY.jpg (jpeg, png, webp) with KEY.txt, or KEY.json with a \"caption\"")
        if lacking:
            say(f"{spec}: {len(lacking)} of {len(rows) + len(lacking)} samples lack their picture or caption and are left out ({lacking[0]}, ...)")
        self.rows, self.keys = np.array(rows), np.array([os.fsencode(k) for k in keys])      # (n, 6): tar, picture at, size, words at, size, plain

    def __len__(self):
        return len(self.rows)

    def load(self, index, rng=None):
        tar, image_at, image_size, words_at, words_size, plain = map(int, self.rows[index])
        with open(self.tars[tar], "rb") as f:
            f.seek(image_at)
            image = read_image(io.BytesIO(f.read(image_size)))
            f.seek(words_at)
            words = f.read(words_size).decode("utf-8")
        return image, (words if plain else json.loads(words)["caption"]).strip(), -1

    def name(self, index):
        return f"{self.tars[self.rows[index, 0]]}:{os.fsdecode(self.keys[index])}"


def expand(pattern):
    """'pairs-{000..012}.tar' or a glob -> the tars it names, sorted. Raises ValueError if one, or all, are missing."""
    span = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if span:
        low, high = span.groups()
        return [tar for n in range(int(low), int(high) + 1)
                for tar in expand(pattern[:span.start()] + str(n).zfill(len(low)) + pattern[span.end():])]
    found = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern))
    if not found:
        raise ValueError(f"nothing is called {pattern}; wanted a tar, a glob in quotes, or a range such as 'pairs-{{000000..000003}}.tar'")
    return found


def index_tar(path):
    """-> {key: {extension: (offset, size)}}; as in WebDataset the key ends at the first dot of a file's name"""
    samples = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, slash, name = member.name.rpartition("/")
                key, _, extension = name.partition(".")
                if member.isfile() and key:
                    samples.setdefault(folder + slash + key, {})[extension.lower()] = member.offset_data, member.size
    except tarfile.TarError as problem:
        raise ValueError(f"{path} cannot be read as an uncompressed tar ({problem}); gunzip it, or fetch it again") from None
    return samples


def read_image(file):
    """Path or open file -> PIL RGB, upright (EXIF), 16 bits brought to 8, what is transparent shown on white."""
    with Image.open(file) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


# ---- views: PIL in, uint8 out. All are cut from the whole picture; local crops do not come out of the global ones.

CLEAN_AREA = 0.9, 1.0                # OpenCLIP's training transform: no flip (words have left and right), no colour changes
#            area        blur  solarise
VIEWS = {"global 1": ((0.32, 1.00), 0.0, 0.0),         # DINOv2's recipe, with the blur as it is EXECUTED there: its wrapper hands 1 - p to a
         "global 2": ((0.32, 1.00), 0.9, 0.2),         # torchvision class that wants p, so the rates its code names (1.0, 0.1, 0.5) run as
         "local":    ((0.05, 0.32), 0.5, 0.0)}         # 0.0, 0.9, 0.5. The released checkpoints, DINOv3's too, were trained that way.

JITTER = {F.adjust_brightness: (0.6, 1.4), F.adjust_contrast: (0.6, 1.4), F.adjust_saturation: (0.8, 1.2), F.adjust_hue: (-0.1, 0.1)}


def clean_view(rng, image, side):
    """-> (3, side, side) uint8: nearly the whole picture, for the captions and the decoder"""
    return pixels(random_crop(rng, image, side, CLEAN_AREA))


def ssl_view(rng, image, side, area, blur, solarise):
    """-> (3, side, side) uint8: crop, flip, colours, grey, blur, solarise, in DINOv2's order and with its numbers"""
    image = random_crop(rng, image, side, area)
    if rng.random() < 0.5:
        image = F.hflip(image)
    if rng.random() < 0.8:
        for change in rng.permutation(list(JITTER)):
            image = change(image, rng.uniform(*JITTER[change]))
    if rng.random() < 0.2:
        image = F.to_grayscale(image, 3)
    if rng.random() < blur:
        image = Image.fromarray(gaussian_blur(np.asarray(image), rng.uniform(0.1, 2.0)))
    if rng.random() < solarise:
        image = F.solarize(image, 128)
    return pixels(image)


def random_crop(rng, image, side, area, aspect=(3 / 4, 4 / 3)):
    """torchvision's RandomResizedCrop, bicubic: a share `area` of the picture, log-uniform aspect, ten tries, else the middle."""
    w, h = image.size
    for _ in range(10):
        size, ratio = w * h * rng.uniform(*area), exp(rng.uniform(log(aspect[0]), log(aspect[1])))
        cw, ch = round(sqrt(size * ratio)), round(sqrt(size / ratio))
        if 0 < cw <= w and 0 < ch <= h:
            x, y = rng.integers(w - cw + 1), rng.integers(h - ch + 1)
            break
    else:
        cw, ch = min(w, round(h * aspect[1])), min(h, round(w / aspect[0]))
        x, y = (w - cw) // 2, (h - ch) // 2
    return image.crop((x, y, x + cw, y + ch)).resize((side, side), Image.BICUBIC)


def gaussian_blur(image, sigma):
    """(H, W, 3) uint8 -> the same, blurred by torchvision's 9x9 kernel, one axis after the other: three times its speed at 64 pixels.

    9 is DINOv2's at every crop size, 96 as well as 224; on smaller crops than its own the same blur takes away more.
    """
    h, w = image.shape[:2]
    k = np.exp(-0.5 * (np.arange(-4, 5, dtype=np.float32) / sigma) ** 2)
    k /= k.sum()
    x = np.pad(image.astype(np.float32), ((4, 4), (4, 4), (0, 0)), mode="reflect")
    x = sum(k[i] * x[i:i + h] for i in range(9))
    x = sum(k[i] * x[:, i:i + w] for i in range(9))
    return x.round().clip(0, 255).astype(np.uint8)


def adm_crop(image, size):
    """ADM's centre crop, on which FID is measured: halve by box, bicubic to the shorter side, cut the middle.  PIL -> PIL (size, size)"""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    x, y = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((x, y, x + size, y + size))


def squash(image, size):
    """The whole picture made square, bilinear: what VTP's zero-shot evaluation looks at."""
    return image.resize((size, size), Image.BILINEAR)


CUTS = {"adm": adm_crop, "squash": squash}


def pixels(image):
    """PIL RGB -> (3, H, W) uint8 array"""
    return np.asarray(image).transpose(2, 0, 1)


def normalize(x):
    """uint8 (..., 3, H, W) -> float32 with ImageNet's mean 0 and deviation 1 per channel"""
    return (x.float() / 255 - MEAN.to(x.device)) / STD.to(x.device)


def denormalize(x):
    """The way back, to floats on the scale [0, 1]; not clamped."""
    return x * STD.to(x.device) + MEAN.to(x.device)


# ---- masks

def block_mask(rng, grid_h, grid_w, target):
    """Rectangles thrown onto the patch grid until `target` patches are covered, or a little fewer, never more.  -> (grid_h, grid_w) bool

    DINOv2's generator: at least 4 patches a block and at most half the grid, aspect 0.3 to 1/0.3, smaller than the grid both ways.
    """
    mask, wanted = np.zeros((grid_h, grid_w), bool), target
    while wanted > 0:
        for _ in range(10):
            most = min(wanted, grid_h // 2 * grid_w)
            area, aspect = 4 + (most - 4) * rng.random(), exp(rng.uniform(log(0.3), -log(0.3)))
            h, w = round(sqrt(area * aspect)), round(sqrt(area / aspect))
            if h < grid_h and w < grid_w:
                y, x = rng.integers(grid_h - h + 1), rng.integers(grid_w - w + 1)
                block = mask[y:y + h, x:x + w]
                new = h * w - block.sum()
                if 0 < new <= wanted:
                    block[:] = True
                    wanted -= new
                    break
        else:
            return mask
    return mask


def batch_masks(seed, step, crops, grid_h, grid_w, rows=None, ratio=(0.1, 0.5), prob=0.5):
    """iBOT masks of one step -> (len(rows), grid_h * grid_w) bool numpy array.

    crops  2 B_ssl of the whole batch: all first crops, then all second      rows  the crops to draw; None: all of them
    ratio, prob  a share `prob` of the crops is masked by ratios spread evenly over `ratio`, the rest not at all.  DINOv2
    How much each crop is masked is drawn for the whole batch, where depends on (seed, step, crop): a rank draws its own rows only.
    """
    rng, n = lots(TARGETS, seed, step), int(crops * prob)
    low, high = ratio
    shares = low + (high - low) * (np.arange(n) + rng.random(n)) / max(n, 1)                  # one draw in each of n equal strata
    targets = rng.permutation([int(grid_h * grid_w * s) for s in shares] + [0] * (crops - n))
    rows = range(crops) if rows is None else rows
    return np.stack([block_mask(lots(BLOCKS, seed, step, c), grid_h, grid_w, int(targets[c])).ravel() for c in rows])


def mask_indices_and_weights(mask):
    """mask (2Bs, N) or (2, Bs, N) bool -> indices (M,) of the masked patches in the flattened mask; weight (M,) = 1 / masked patches of
    the same crop, so that every masked crop weighs 1 in ibot_loss however much of it is hidden."""
    mask = mask.flatten(0, -2)
    weight = 1 / mask.sum(-1, keepdim=True).clamp(min=1).float()
    return mask.flatten().nonzero().flatten(), weight.expand_as(mask)[mask]


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
        for row in sorted({*in_image, *in_ssl}):
            picture, caption = self.sample(step, row, bad)
            if row in in_image:
                image[in_image.index(row)] = clean_view(lots(CLEAN, self.seed, step, row), picture, self.image)
                captions.append(caption)
            if row in in_ssl:
                rng, j = lots(CROPS, self.seed, step, row), in_ssl.index(row)
                crops[0, j] = ssl_view(rng, picture, self.image, *VIEWS["global 1"])
                crops[1, j] = ssl_view(rng, picture, self.image, *VIEWS["global 2"])
                for v in range(self.n_local):
                    small[v, j] = ssl_view(rng, picture, self.local_image, *VIEWS["local"])
        out = {"captions": captions, "bad": bad}
        if in_image:
            out |= {"image": torch.from_numpy(image), "rows_image": torch.tensor(in_image)}
        if self.clip:
            text = self.tokenizer(captions)
            out["text"] = text[:, :int((text != 0).any(0).nonzero().max()) + 1]         # a causal tower needs no padding beyond the longest
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
        index = k if self.source.endless else int(shuffled(self.seed, epoch, len(self.source))[k])
        for attempt in range(10):
            try:
                return self.source.load(index, lots(SAMPLE, self.seed, step, row))[:2]
            except Exception as problem:                                  # a damaged file makes decoders raise whatever they like
                bad.append(f"{self.source.name(index)} ({type(problem).__name__}: {problem})")
                index = int(lots(SPARE, self.seed, step, row, attempt).integers(len(self.source)))
        raise ValueError(f"ten samples in a row could not be read, last {bad[-1]}; is {self.source.spec} still there?")


@lru_cache(maxsize=2)
def shuffled(seed, epoch, n):
    """The order in which an epoch walks a finite source: every sample once."""
    return lots(ORDER, seed, epoch).permutation(n)


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


def eval_batches(source, side, batch, limit=None, crop="adm", workers=0, seed=0):
    """Every picture once, in the source's order -> (images uint8 (b, 3, side, side), labels (b,), captions), batch after batch.

    limit  take that many, evenly spread, so that each class is seen          crop  'adm' (centre) or 'squash'
    What cannot be read is left out, named and counted; its batch is smaller for it.
    """
    if crop not in CUTS or batch < 1 or limit is not None and limit < 1:
        raise ValueError(f"crop={crop!r}, batch={batch}, limit={limit}: wanted 'adm' or 'squash', a batch and a limit of 1 or more")
    n, lost = min(limit or len(source), len(source)), 0
    indices = [k * len(source) // n for k in range(n)]
    work = partial(eval_batch, source, side, CUTS[crop], seed)
    for images, labels, captions, bad in in_workers(work, [indices[k:k + batch] for k in range(0, n, batch)], workers):
        for name in bad:
            say("left out:", name)
        lost += len(bad)
        if captions:
            yield images, labels, captions
    if lost:
        say(f"{lost} of {n} pictures of {source.spec} could not be read and are left out")


def eval_batch(source, side, cut, seed, indices):
    images, labels, captions, bad = [], [], [], []
    for index in indices:
        try:
            picture, caption, label = source.load(index, lots(EVAL, seed, index))
        except Exception as problem:
            bad.append(f"{source.name(index)} ({type(problem).__name__}: {problem})")
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
    rows = torch.cat([F.pad(t, [2, 2, 2, side + 2 - t.shape[-1]], fill=255) for t in tiles], -1)       # (b, 3, side + 4, wide)
    page = torch.cat([*F.pad(rows, [0, 0, 0, line], fill=255)], -2).repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)
    page = F.to_pil_image(page)
    pen = ImageDraw.Draw(page)
    for row, caption in enumerate(out["captions"]):
        y = ((row + 1) * (side + 4 + line) - line) * zoom
        pen.text((2 * zoom, y), textwrap.fill(caption, page.width // 6, max_lines=2), "black")
    return page


def main():
    p = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                description="Look at a data set as training sees it: counts, captions, speed, and a sheet of views, crops and masks.")
    p.add_argument("--data", default="shapes", help="shapes, shapes:objects=1,size=0.6-0.9, a folder (DIR/train/CLASS/x.jpg or DIR/CLASS/x.jpg), "
                                                    "or tars of pairs, in quotes: 'pairs-{000000..000003}.tar', 'pairs-*.tar'")
    p.add_argument("--split", choices=["train", "val"], default="train", help="which part of --data")
    p.add_argument("--image", type=int, default=48, help="side of the clean view and the global crops; nano trains at 48, the released models at 256")
    p.add_argument("--local-image", type=int, default=24, help="side of the local crops; DINOv2 takes 96 to a global 224")
    p.add_argument("--locals", type=int, default=2, help="local crops a picture; DINOv2 takes 8")
    p.add_argument("--patch", type=int, default=12, help="side of a patch, masks hide whole ones; nano 12, the paper 16")
    p.add_argument("--rows", type=int, default=8, help="samples on the sheet")
    p.add_argument("--seed", type=int, default=0, help="another seed: another order, other crops and masks")
    p.add_argument("--out", default="sheet.png", help="the sheet")
    args = p.parse_args()
    try:
        source = open_data(args.data, args.split, args.seed, args.image, whole=True)
        steps = Steps(source, None, args.seed, args.rows, args.rows, args.rows, clip=False, ssl=True, rec=True, image=args.image,
                      local_image=args.local_image, n_local=args.locals, patch=args.patch)
    except ValueError as problem:
        raise SystemExit(f"data.py: {problem}")
    print(f"{source.spec}, {args.split}: " + ("endless" if source.endless else f"{len(source):,} samples"))
    if source.classes:
        print(f"{len(source.classes)} classes: {', '.join(source.classes[:12])}{', ...' if len(source.classes) > 12 else ''}")
    start, count = time.perf_counter(), max(1, 64 // args.rows)
    for out in tqdm(batches(steps, 1, 1 + count), "timing", total=count):
        for name in out["bad"]:
            print("replaced:", name)
    ms = 1000 * (time.perf_counter() - start) / (count * args.rows)
    print(f"{ms:.1f} ms a sample in one process: reading, a clean view, 2 global crops of {args.image}, {args.locals} local ones of {args.local_image}")
    out = steps[0]
    print("captions of the sheet:", *out["captions"], sep="\n    ")
    sheet(out, args.patch, zoom=max(1, 160 // args.image)).save(args.out)
    print(f"wrote {args.out}: clean view, global crops 1 and 2 with what is masked in grey, local crops")


if __name__ == "__main__":
    main()
