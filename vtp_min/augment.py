"""Views of an image for each objective, iBOT masks and stochastic depth.

    views             clip_view (CLIP, reconstruction)      ssl_view (DINOv2's global, local crops)
    evaluation        adm_crop, resize_square, center_crop
    pixels            normalize, denormalize                uint8 <-> ImageNet-normalised floats
    masks             batch_masks: patches that are masked for the student (iBOT)   VTP Sec. 3.3
    stochastic depth  kept_rows: images for which a residual branch is computed     DINOv2

A view gets a random generator that the caller has made for one (seed, step, row). Masks and
stochastic depth are drawn from (seed, step). An image is a PIL RGB image or its uint8 array
(H, W, 3); a view is a uint8 array (3, side, side).
"""
from math import exp, log, sqrt
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from .device import move_to
from .rng import Stream, make_rng

ASSETS = Path(__file__).parent / "assets"         # vocabulary, class names, prompt templates

# ImageNet's mean and standard deviation, as in VTP's released code (OpenCLIP has its own)
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

CLIP_AREA = 0.9, 1.0                              # OpenCLIP's RandomResizedCrop

# DINOv2's recipe. The probabilities of blur are those that DINOv2 actually applies: its code
# says 1.0, 0.1 and 0.5, but it passes 1 - p to a torchvision class that expects p, so they act as
# 0.0, 0.9 and 0.5. The released DINOv2 and DINOv3 checkpoints were trained in this way.
#            area of the crop, probability of blur, of solarize
VIEWS = {
    "global 1": ((0.32, 1.00), 0.0, 0.0),
    "global 2": ((0.32, 1.00), 0.9, 0.2),
    "local":    ((0.05, 0.32), 0.5, 0.0),
}


# ---------------------------------------------------------------- views for training
def clip_view(rng, image, side):
    """Crop of nearly the whole image -> (3, side, side) uint8.   OpenCLIP

    CLIP and reconstruction share this view. It is not flipped, because a caption may say left or
    right, and its colors are not changed, because a caption may name a color.
    """
    return random_crop(rng, image, side, CLIP_AREA)


def ssl_views(jobs):
    """jobs  list of (rng, image, side, an entry of VIEWS) -> list of views

    extras/fast_views.py computes the same views faster.
    """
    return [ssl_view(rng, image, side, *recipe) for rng, image, side, recipe in jobs]


def ssl_view(rng, image, side, area, p_blur, p_solarize):
    """One global or local crop -> (3, side, side) uint8.   DINOv2: order of operations, numbers

    area  (smallest, largest) fraction of the image's area    p_blur, p_solarize  probabilities
    Local crops are cut from the original image, not from a global crop.
    """
    x = random_crop(rng, image, side, area)
    if rng.random() < 0.5:
        x = x[..., ::-1]                                          # horizontal flip
    x = x.astype(np.float32)                                      # rounded only once, at the end
    if rng.random() < 0.8:
        for i in rng.permutation(4):                              # color jitter, in random order
            operation, low, high = COLOR_JITTER[i]
            x = operation(x, np.float32(rng.uniform(low, high)))
    if rng.random() < 0.2:
        x = grayscale(x)
    if rng.random() < p_blur:
        # an array of one number, because NumPy 1 computes with a single float32 in float64
        x = gaussian_blur(x, np.float32([rng.uniform(0.1, 2.0)]))
    if rng.random() < p_solarize:
        x = solarize(x)
    return x.round().astype(np.uint8)


def random_crop(rng, image, side, area, aspect=(3 / 4, 4 / 3)):
    """torchvision's RandomResizedCrop, bicubic -> (3, side, side) uint8

    area    (smallest, largest) fraction of the image's area, drawn uniformly
    aspect  (smallest, largest) width / height, drawn log-uniformly
    If ten draws do not fit into the image, the crop is the largest centered one whose aspect ratio
    lies in the range.
    """
    image = np.asarray(image)
    height, width, _ = image.shape
    for _ in range(10):
        crop_area = width * height * rng.uniform(*area)
        # log-uniform: a ratio and its inverse are equally likely
        ratio = exp(rng.uniform(log(aspect[0]), log(aspect[1])))
        w, h = round(sqrt(crop_area * ratio)), round(sqrt(crop_area / ratio))
        if 0 < w <= width and 0 < h <= height:
            x, y = rng.integers(width - w + 1), rng.integers(height - h + 1)
            break
    else:
        w, h = min(width, round(height * aspect[1])), min(height, round(width / aspect[0]))
        x, y = (width - w) // 2, (height - h) // 2
    crop = torch.from_numpy(image[y:y + h, x:x + w].copy()).permute(2, 0, 1)[None]    # (1, 3, h, w)
    # equal to Pillow's bicubic resize up to rounding, and 3.5 times as fast
    return interpolate(crop, (side, side), mode="bicubic", antialias=True)[0].numpy()


# ---------------------------------------------------------------- color operations
# torchvision's operations on float images. x is (3, s, s) float32 in 0..255. It may also be
# (3, n, s, s), n images at once with one amount each, (n, 1, 1): extras/fast_views.py uses this.

def luma(x):
    """-> (s, s) gray levels"""
    return 0.299 * x[0] + 0.587 * x[1] + 0.114 * x[2]             # ITU-R BT.601


def blend(a, b, weight):
    """a at weight 0, b at weight 1; a weight above 1 extrapolates, so the result is clipped"""
    return np.clip(a + (b - a) * weight, 0, 255)


def brightness(x, factor):
    """Factor 0 gives black, factor 1 the image"""
    return np.minimum(x * factor, 255)


def contrast(x, factor):
    """Factor 0 gives the image's mean gray level, factor 1 the image"""
    return blend(luma(x).mean((-2, -1), keepdims=True), x, factor)


def saturation(x, factor):
    """Factor 0 gives a gray image, factor 1 the image"""
    return blend(luma(x), x, factor)


def hue(x, shift):
    """Rotate the hue by `shift`, where 1 is the full circle. Value and saturation (HSV) stay.

    The circle is measured in sextants of 60 degrees: red is at 0, green at 2, blue at 4. A channel
    has its maximum where the hue is at most 1 away from it and its minimum where the hue is at
    least 2 away; in between it is linear.
    """
    red, green, blue = x
    low = np.minimum(np.minimum(red, green), blue)
    chroma = np.maximum(np.maximum(red, green), blue) - low
    # With channels scaled to minimum 0 and maximum 1, the distance of the hue from red is
    # 1 - red + green + blue. It lies on the side of green if green > blue, else on that of blue.
    from_red = 1 + (green + blue - red - low) / np.maximum(chroma, 1e-6)    # gray has chroma 0
    angle = np.copysign(from_red, green - blue) + 6 * shift
    out = np.empty_like(x)
    for channel, position in enumerate((0, 2, 4)):
        distance = angle - position
        distance -= 6 * np.rint(distance / 6)                     # the shorter way, in -3..3
        out[channel] = low + chroma * np.clip(2 - abs(distance), 0, 1)
    return out


def grayscale(x):
    """-> three equal channels of gray levels"""
    return np.stack([luma(x)] * 3)


def gaussian_blur(x, sigma):
    """Gaussian blur with a kernel of 9x9 pixels and reflected borders.   DINOv2

    DINOv2 has this kernel size at every crop size, so crops smaller than its 224 and 96 pixels
    lose more detail.
    """
    weights = [np.exp(-0.5 * np.square(i / sigma)) for i in range(5)]     # of pixels at distance i
    total = 2 * sum(weights) - 1                                  # weights[0] is 1 and occurs once
    size = x.shape[-1]
    # the kernel is a product of two 1-d kernels: blur along y, transpose, and do the same again
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
    """Invert the pixels that are at least `threshold` after rounding"""
    return np.where(x < threshold - 0.5, x, 255 - x)


COLOR_JITTER = [                                                  # operation, range of its amount
    (brightness, 0.6, 1.4),                                       # DINOv2
    (contrast, 0.6, 1.4),
    (saturation, 0.8, 1.2),
    (hue, -0.1, 0.1),
]


# ---------------------------------------------------------------- views for evaluation
# PIL image -> PIL image (size, size)

def adm_crop(image, size):
    """ADM's center crop, used for FID: halve with a box filter while both sides are at least twice
    `size`, resize the shorter side to `size` (bicubic), cut out the center."""
    width, height = image.size
    longest = 32 * min(width, height)
    if max(width, height) > longest:
        # An image of 3000x4 would be enlarged to 192000x256. Only its center is needed, so the ends
        # are cut off first.
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
    """The whole image, bilinear, without keeping the aspect ratio: VTP's zero-shot evaluation"""
    return image.resize((size, size), Image.BILINEAR)


def center_crop(image, size):
    """Center crop of 7/8 of the shorter side (224 of 256), bicubic: linear probes of VTP, DINOv2"""
    shorter_side = round(size * 8 / 7)
    width, height = [shorter_side * side // min(image.size) for side in image.size]
    image = image.resize((width, height), Image.BICUBIC)
    x, y = round((width - size) / 2), round((height - size) / 2)      # rounds as torchvision does
    return image.crop((x, y, x + size, y + size))


EVAL_CROPS = {"adm": adm_crop, "squash": resize_square, "centre": center_crop}


# ---------------------------------------------------------------- pixels
def to_chw(image):
    """PIL RGB image -> (3, H, W) uint8 array"""
    return np.asarray(image).transpose(2, 0, 1)


def normalize(x):
    """uint8 (..., 3, H, W) -> float32 of the same shape: (x / 255 - mean) / std of ImageNet"""
    return (x.float() / 255 - move_to(MEAN, x.device)) / move_to(STD, x.device)


def denormalize(x):
    """Normalised (..., 3, H, W) -> the same shape with values in [0, 1], not clamped"""
    return x * move_to(STD, x.device) + move_to(MEAN, x.device)


# ---------------------------------------------------------------- masks for iBOT
# The student gets a mask token in place of a masked patch. There it must predict the output of the
# teacher, which gets the same crop without a mask. Whole blocks are masked, because a single patch
# could be guessed from its neighbours.

def block_mask(rng, grid_h, grid_w, target):
    """Random rectangles of patches -> (grid_h, grid_w) bool with `target` True or a few fewer.

    DINOv2's generator: a rectangle has at least 4 patches, at most half of the grid, and an aspect
    ratio between 0.3 and 1 / 0.3. The mask is finished when it reaches `target`, or when ten
    rectangles in a row do not fit.
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
                new = h * w - block.sum()                         # rectangles may overlap
                if 0 < new <= missing:                            # never exceeds the target
                    block[:] = True
                    missing -= new
                    break
        else:
            return mask
    return mask


def batch_masks(seed, step, crops, grid_h, grid_w, rows=None, ratio=(0.1, 0.5), prob=0.5):
    """Masks of one step -> (len(rows), grid_h * grid_w) bool array.   DINOv2

    crops  number of global crops of the global batch, 2 B_ssl: all first crops, then all second
    rows   the crops to draw, those of this process, or None for all
    A fraction `prob` of the crops is masked. Their mask ratios are spread evenly over `ratio`: the
    range is cut into as many intervals as there are masked crops, and each interval gives one.
    """
    # numbers of masked patches: one draw for the global batch, the same on all processes
    rng = make_rng(Stream.MASK_RATIO, seed, step)
    n = int(crops * prob)
    low, high = ratio
    ratios = low + (high - low) * (np.arange(n) + rng.random(n)) / max(n, 1)      # n may be 0
    targets = [int(grid_h * grid_w * r) for r in ratios] + [0] * (crops - n)
    # shuffled over all crops, so both crops of an image, one or none may be masked
    targets = rng.permutation(targets)
    masks = []
    for row in range(crops) if rows is None else rows:
        # positions of the masked patches: each crop has its own random numbers
        rng = make_rng(Stream.MASK_BLOCKS, seed, step, row)
        masks.append(block_mask(rng, grid_h, grid_w, int(targets[row])).ravel())
    return np.stack(masks)


def mask_index_and_weight(mask):
    """mask (2, Bs, N) or (2Bs, N) bool -> index (M,) int64, weight (M,) float32

    index   positions of the masked patches in mask.flatten()
    weight  1 / number of masked patches of the same crop, so that ibot_loss averages over the
            patches of a crop and all masked crops count equally
    """
    mask = mask.flatten(0, -2)                                    # (2Bs, N)
    weight = 1 / mask.sum(-1, keepdim=True).clamp(min=1).float()  # (2Bs, 1)  unmasked crops: 1 / 1
    return mask.flatten().nonzero().flatten(), weight.expand_as(mask)[mask]


# ---------------------------------------------------------------- stochastic depth
def kept_rows(rate, depth, rows, total, *key):
    """The images for which each residual branch is computed.   DINOv2

    A fixed number of images, the fraction `rate` of the global batch, skips the branch, which is
    not computed for them. (Standard stochastic depth decides for each image independently, and
    computes the branch for all images before it sets some results to zero.)

    rows   the images of this process, numbered within the `total` images of the global batch
    key    (seed, step, objective); the kept images do not depend on the number of processes
    -> None at rate 0; else, for each of `depth` blocks, two pairs (attention, feed-forward) of the
       positions of the kept images in `rows` and the factor by which the branch is multiplied
    """
    if rate == 0:
        return None
    n_kept = max(int(total * (1 - rate)), 1)
    rows = np.asarray(rows)

    def draw(block, branch):
        kept = np.zeros(total, bool)
        kept[make_rng(Stream.DROP, *key, block, branch).permutation(total)[:n_kept]] = True
        # total / n_kept preserves the mean of the branch over the batch
        return torch.from_numpy(kept[rows].nonzero()[0]), total / n_kept

    return [(draw(block, 0), draw(block, 1)) for block in range(depth)]
