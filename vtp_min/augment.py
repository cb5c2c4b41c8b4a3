"""Views of an image for each objective, and what else is drawn for a step.

    views             clip_view (CLIP, reconstruction)      ssl_view (DINOv2's global, local crops)
    evaluation        adm_crop, resize_square, center_crop
    pixels            normalize, denormalize                uint8 <-> what the networks see
    masks             batch_masks: the patches that iBOT hides from the student
    stochastic depth  kept_rows: the images for which a residual branch is computed

Random numbers come from a generator that the caller has made for one (seed, step, row). An image
is a PIL RGB image or its uint8 array (H, W, 3); a view is a uint8 array (3, side, side).
"""
from math import exp, log, sqrt
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from .rng import Stream, make_rng

ASSETS = Path(__file__).parent / "assets"         # vocabulary, class names, prompt templates

# ImageNet's mean and standard deviation, as in VTP's released code (OpenCLIP has its own)
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

CLIP_AREA = 0.9, 1.0                              # OpenCLIP's RandomResizedCrop

# DINOv2's recipe, with the blur as it is executed there: its wrapper hands 1 - p to a torchvision
# class that expects p, so the probabilities 1.0, 0.1 and 0.5 of its code act as 0.0, 0.9 and 0.5.
# The released checkpoints, DINOv3's too, were trained that way.
#            area of the crop, probability of blur, of solarize
VIEWS = {
    "global 1": ((0.32, 1.00), 0.0, 0.0),
    "global 2": ((0.32, 1.00), 0.9, 0.2),
    "local":    ((0.05, 0.32), 0.5, 0.0),
}


# ---------------------------------------------------------------- views for training
def clip_view(rng, image, side):
    """Nearly the whole image, for CLIP and reconstruction -> (3, side, side) uint8.   OpenCLIP

    Not flipped, because captions say left and right, and not changed in color.
    """
    return random_crop(rng, image, side, CLIP_AREA)


def ssl_views(jobs):
    """jobs  list of (rng, image, side, an entry of VIEWS) -> list of views.

    extras/fast_views.py has a faster form with the same result.
    """
    return [ssl_view(rng, image, side, *recipe) for rng, image, side, recipe in jobs]


def ssl_view(rng, image, side, area, p_blur, p_solarize):
    """One global or local crop -> (3, side, side) uint8.   DINOv2's order and numbers

    area  (least, greatest) share of the image's area      p_blur, p_solarize  probabilities
    Local crops are cut from the whole image, not from a global crop.
    """
    x = random_crop(rng, image, side, area)
    if rng.random() < 0.5:
        x = x[..., ::-1]                                          # horizontal flip
    x = x.astype(np.float32)                                      # rounded once, at the end
    if rng.random() < 0.8:
        for i in rng.permutation(4):
            operation, low, high = COLOR_JITTER[i]
            x = operation(x, np.float32(rng.uniform(low, high)))
    if rng.random() < 0.2:
        x = grayscale(x)
    if rng.random() < p_blur:
        x = gaussian_blur(x, np.float32(rng.uniform(0.1, 2.0)))
    if rng.random() < p_solarize:
        x = solarize(x)
    return x.round().astype(np.uint8)


def random_crop(rng, image, side, area, aspect=(3 / 4, 4 / 3)):
    """torchvision's RandomResizedCrop, bicubic -> (3, side, side) uint8

    The crop has a uniform share of the image's area and a log-uniform aspect ratio. If ten draws do
    not fit into the image, the largest centered crop within the range of aspect ratios is taken.
    """
    image = np.asarray(image)
    height, width, _ = image.shape
    for _ in range(10):
        size = width * height * rng.uniform(*area)
        ratio = exp(rng.uniform(log(aspect[0]), log(aspect[1])))
        w, h = round(sqrt(size * ratio)), round(sqrt(size / ratio))
        if 0 < w <= width and 0 < h <= height:
            x, y = rng.integers(width - w + 1), rng.integers(height - h + 1)
            break
    else:
        w, h = min(width, round(height * aspect[1])), min(height, round(width / aspect[0]))
        x, y = (width - w) // 2, (height - h) // 2
    crop = torch.from_numpy(image[y:y + h, x:x + w].copy()).permute(2, 0, 1)[None]    # (1, 3, h, w)
    # as Pillow's bicubic up to rounding, and 3.5 times as fast
    return interpolate(crop, (side, side), mode="bicubic", antialias=True)[0].numpy()


# ---------------------------------------------------------------- color operations
# As torchvision computes them on floats. x is (3, s, s) float32 in 0..255. It may also be
# (3, n, s, s), many images at once, with one amount per image (n, 1, 1): extras/fast_views.py.

def luma(x):
    """-> (s, s) gray levels"""
    return 0.299 * x[0] + 0.587 * x[1] + 0.114 * x[2]


def mix(a, b, weight):
    return np.clip(a + (b - a) * weight, 0, 255)


def brightness(x, factor):
    return np.minimum(x * factor, 255)


def contrast(x, factor):
    """factor 0 gives the image's mean gray level"""
    return mix(luma(x).mean((-2, -1), keepdims=True), x, factor)


def saturation(x, factor):
    """factor 0 gives a gray image"""
    return mix(luma(x), x, factor)


def hue(x, turn):
    """Rotate the hue by `turn`, where 1 is the whole circle. HSV's value and saturation stay.

    The color circle has six parts of 60 degrees; red lies at 0, green at 2, blue at 4. A channel is
    at its maximum within 1 of its place, at its minimum beyond 2, and linear in between.
    """
    red, green, blue = x
    low = np.minimum(np.minimum(red, green), blue)
    chroma = np.maximum(np.maximum(red, green), blue) - low
    # scaled to minimum 0 and maximum 1, a color lies 1 - red + green + blue from red, towards green
    # if green > blue, else towards blue
    distance = 1 + (green + blue - red - low) / np.maximum(chroma, 1e-6)
    angle = np.copysign(distance, green - blue) + 6 * turn
    out = np.empty_like(x)
    for channel, place in enumerate((0, 2, 4)):
        away = angle - place
        away -= 6 * np.rint(away / 6)                             # in -3..3
        out[channel] = low + chroma * np.clip(2 - abs(away), 0, 1)
    return out


def grayscale(x):
    return np.stack([luma(x)] * 3)


def gaussian_blur(x, sigma):
    """Kernel of 9x9 pixels, one axis after the other; edges are reflected.

    DINOv2 has 9 at every crop size, so a crop smaller than its 224 or 96 loses more detail.
    """
    weights = [np.exp(-0.5 * np.square(i / sigma)) for i in range(5)]     # the center, one side
    total = 2 * sum(weights) - 1
    size = x.shape[-1]
    for _ in range(2):
        padding = [(0, 0)] * (x.ndim - 2) + [(4, 4), (0, 0)]
        padded = np.pad(x, padding, mode="reflect")               # (3, s+8, s)
        x = weights[0] / total * padded[..., 4:-4, :]
        for i in range(1, 5):
            above = padded[..., 4 - i:4 - i + size, :]
            below = padded[..., 4 + i:4 + i + size, :]
            x += weights[i] / total * (above + below)
        x = x.swapaxes(-2, -1)
    return x


def solarize(x, threshold=128):
    """Invert what is, after rounding, at least `threshold`"""
    return np.where(x < threshold - 0.5, x, 255 - x)


COLOR_JITTER = [                                                  # DINOv2's ranges
    (brightness, 0.6, 1.4),
    (contrast, 0.6, 1.4),
    (saturation, 0.8, 1.2),
    (hue, -0.1, 0.1),
]


# ---------------------------------------------------------------- views for evaluation
# PIL image -> PIL image (size, size)

def adm_crop(image, size):
    """ADM's center crop, used for FID: halve with a box filter while both sides stay at least
    `size`, resize the shorter side to `size` (bicubic), cut the middle."""
    width, height = image.size
    longest = 32 * min(width, height)
    if max(width, height) > longest:
        # 3000x4 would be enlarged to 192000x256: only the middle part of it is resized
        x, y = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
        image = image.crop((x, y, x + min(width, longest), y + min(height, longest)))
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), Image.BICUBIC)
    x, y = (width - size) // 2, (height - size) // 2
    return image.crop((x, y, x + size, y + size))


def resize_square(image, size):
    """The whole image, bilinear, aspect ratio not kept: VTP's zero-shot evaluation"""
    return image.resize((size, size), Image.BILINEAR)


def center_crop(image, size):
    """The middle 7/8 of the shorter side (224 of 256), bicubic: the linear probes of VTP, DINOv2"""
    short = round(size * 8 / 7)
    width, height = [short * side // min(image.size) for side in image.size]
    image = image.resize((width, height), Image.BICUBIC)
    x, y = round((width - size) / 2), round((height - size) / 2)
    return image.crop((x, y, x + size, y + size))


EVAL_CROPS = {"adm": adm_crop, "squash": resize_square, "centre": center_crop}


# ---------------------------------------------------------------- pixels
def to_chw(image):
    """PIL RGB -> (3, H, W) uint8 array"""
    return np.asarray(image).transpose(2, 0, 1)


def normalize(x):
    """uint8 (..., 3, H, W) -> float32, ImageNet's mean becomes 0 and its standard deviation 1"""
    return (x.float() / 255 - MEAN.to(x.device)) / STD.to(x.device)


def denormalize(x):
    """The inverse of normalize, but on the scale [0, 1]; not clamped"""
    return x * STD.to(x.device) + MEAN.to(x.device)


# ---------------------------------------------------------------- masks for iBOT
def block_mask(rng, grid_h, grid_w, target):
    """Random rectangles of patches -> (grid_h, grid_w) bool, `target` True or a little fewer.

    DINOv2's generator: a rectangle has at least 4 patches, at most half of the grid, and an aspect
    ratio of 0.3 to 1/0.3. It ends when ten draws in a row do not fit.
    """
    mask = np.zeros((grid_h, grid_w), bool)
    missing = target
    while missing > 0:
        for _ in range(10):
            largest = min(missing, grid_h // 2 * grid_w)
            area = 4 + (largest - 4) * rng.random()
            aspect = exp(rng.uniform(log(0.3), -log(0.3)))
            h, w = round(sqrt(area * aspect)), round(sqrt(area / aspect))
            if h < grid_h and w < grid_w:
                y, x = rng.integers(grid_h - h + 1), rng.integers(grid_w - w + 1)
                block = mask[y:y + h, x:x + w]                    # a view: writing changes mask
                new = h * w - block.sum()
                if 0 < new <= missing:
                    block[:] = True
                    missing -= new
                    break
        else:
            return mask
    return mask


def batch_masks(seed, step, crops, grid_h, grid_w, rows=None, ratio=(0.1, 0.5), prob=0.5):
    """Masks of one step -> (len(rows), grid_h * grid_w) bool array.   DINOv2

    crops  2 B_ssl of the global batch: all first crops, then all second ones
    rows   the crops to draw, those of this process; None: all
    A share `prob` of the crops is masked, by ratios that are spread evenly over `ratio`. The ratios
    are drawn for the global batch, the positions from (seed, step, crop).
    """
    rng = make_rng(Stream.MASK_RATIO, seed, step)
    n = int(crops * prob)
    low, high = ratio
    ratios = low + (high - low) * (np.arange(n) + rng.random(n)) / max(n, 1)      # one in each n-th
    targets = [int(grid_h * grid_w * r) for r in ratios] + [0] * (crops - n)
    targets = rng.permutation(targets)
    masks = []
    for row in range(crops) if rows is None else rows:
        rng = make_rng(Stream.MASK_BLOCKS, seed, step, row)
        masks.append(block_mask(rng, grid_h, grid_w, int(targets[row])).ravel())
    return np.stack(masks)


def mask_index_and_weight(mask):
    """mask (2, Bs, N) or (2Bs, N) bool -> index (M,) int64, weight (M,) float32

    index   positions of the masked patches in mask.flatten()
    weight  1 / masked patches of the same crop: each masked crop has weight 1 in ibot_loss
    """
    mask = mask.flatten(0, -2)                                    # (2Bs, N)
    weight = 1 / mask.sum(-1, keepdim=True).clamp(min=1).float()
    return mask.flatten().nonzero().flatten(), weight.expand_as(mask)[mask]


# ---------------------------------------------------------------- stochastic depth
def kept_rows(rate, depth, rows, total, *key):
    """The images for which each residual branch is computed; a share `rate` is dropped.   DINOv2

    rows   this process's images, numbered within the `total` of the global batch
    key    (seed, step, objective): any number of processes keeps the same images
    -> None at rate 0; else, for each of `depth` blocks, two pairs (attention, feed-forward) of
       positions of the kept images in `rows`, and the factor that preserves the branch's mean
    """
    if rate == 0:
        return None
    keep = max(int(total * (1 - rate)), 1)
    rows = np.asarray(rows)

    def draw(block, branch):
        kept = np.zeros(total, bool)
        kept[make_rng(Stream.DROP, *key, block, branch).permutation(total)[:keep]] = True
        return torch.from_numpy(kept[rows].nonzero()[0]), total / keep

    return [(draw(block, 0), draw(block, 1)) for block in range(depth)]
