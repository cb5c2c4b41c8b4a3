"""From a file to what the networks see: read it, cut views out of it, hide patches of them.

    reading    read_image, read_caption: any bytes -> pixels and words as they were meant, or an exception that says why not
    views      clean_view (OpenCLIP) . ssl_view: global and local crops (DINOv2's recipe) . adm_crop, squash (evaluation)      PIL in, uint8 out
               ssl_view in two halves: ssl_crop, view by view; recolour, many views at once
    pixels     normalize, denormalize                                      uint8 <-> floats as the networks see them
    masks      block_mask, batch_masks, mask_indices_and_weights           which patches of a global crop the student has to guess: iBOT, as in DINOv2

Whatever is random comes from `lots`: a generator keyed by its purpose, the seed, the step and the row, and by nothing else.
"""
import json
import warnings
from math import exp, log, sqrt
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops, UnidentifiedImageError
from torch.nn.functional import interpolate

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")                   # what is a picture, whatever the file is called
ASSETS = Path(__file__).parent / "assets"                                 # vocabulary, class names, prompt templates
ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")     # what is looked at as one, in any case
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)                  # ImageNet's, as in VTP's released code (OpenCLIP's differ)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
ORDER, SAMPLE, SPARE, CLEAN, CROPS, TARGETS, BLOCKS, EVAL, STATS, DRAW, NOISE, PAINT, POSTERIOR = range(13)      # purposes: of data.py, latents.py, gan.py, dit.py


def lots(purpose, *key):
    """The numpy Generator to draw lots from: equal keys, equal numbers, in any process."""
    return np.random.default_rng([purpose, *key])


# ---- reading

def is_picture(name):
    """Whether a file of this name is read as an image"""
    return name.rpartition(".")[2].lower() in ENDINGS


UPRIGHT = {2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM, 5: Image.TRANSPOSE, 6: Image.ROTATE_270,
           7: Image.TRANSVERSE, 8: Image.ROTATE_90}                       # EXIF orientation


def read_image(file):
    """Path or open file -> PIL RGB: the first frame, upright, 16 bits brought to 8, transparent on white. Colour profiles are not applied.

    Its bytes decide what it is, not its name. Beyond 179 million pixels, where Pillow suspects a bomb (half a gigabyte), it is not decoded.
    """
    with warnings.catch_warnings(action="ignore"):                        # of bombs of half that size, EXIF, palettes: it reads or it raises
        try:
            image = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError:
            raise ValueError(f"no {', '.join(FORMATS)}") from None
        with image:
            image.load()
            return as_rgb(image)


def as_rgb(image):
    """PIL, as its file has it -> PIL RGB"""
    if image.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits, and nothing says which number is white")
    plain_cmyk = image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info       # Pillow takes every CMYK JPEG for Adobe's,
    try:                                                                                             # which are inverted; without its mark none is
        turn = UPRIGHT.get(image.getexif().get(0x0112))
    except Exception:                                                     # damaged EXIF: the picture itself may be sound
        turn = None
    if turn is not None:
        image = image.transpose(turn)
    if plain_cmyk:
        image = ImageChops.invert(image)
    if image.mode.startswith("I;16"):                                     # one grey of a PNG may stand for transparent
        grey = np.asarray(image)
        return Image.fromarray(np.where(grey == image.info.get("transparency"), 255, (grey / 257).round()).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_caption(raw, plain=True):
    """The bytes of KEY.txt, or (not plain) of KEY.json with a "caption" -> string of 1 to 2000 letters; the tokenizer keeps 77 ids at most.

    What is not UTF-8 becomes U+FFFD. Without words there is no pair: an empty caption raises ValueError.
    """
    text = raw.decode("utf-8-sig", "replace")
    if not plain:
        found = json.loads(text)
        text = found.get("caption") if isinstance(found, dict) else None
        if not isinstance(text, str):
            raise ValueError('its JSON has no "caption" that is a string')
    text = text.replace("\0", " ").encode("utf-8", "replace").decode().strip()[:2000]        # "\ud800" in JSON is half a letter: now "?"
    if not text:
        raise ValueError("its caption is empty")
    return text


def shown(text):
    """A name as one line that any terminal and log can take: line breaks, control characters and undecodable bytes are spelled out."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


# ---- views: PIL or its array (H, W, 3) in, uint8 (3, s, s) out. All are cut from the whole picture; local crops do not come out of the global ones.

CLEAN_AREA = 0.9, 1.0                # OpenCLIP's training transform: no flip (words have left and right), no colour changes
#            area        blur  solarise
VIEWS = {"global 1": ((0.32, 1.00), 0.0, 0.0),         # DINOv2's recipe, with the blur as it is EXECUTED there: its wrapper hands 1 - p to a
         "global 2": ((0.32, 1.00), 0.9, 0.2),         # torchvision class that wants p, so the rates its code names (1.0, 0.1, 0.5) run as
         "local":    ((0.05, 0.32), 0.5, 0.0)}         # 0.0, 0.9, 0.5. The released checkpoints, DINOv3's too, were trained that way.


def clean_view(rng, image, side):
    """-> (3, side, side) uint8: nearly the whole picture, for the captions and the decoder"""
    return random_crop(rng, image, side, CLEAN_AREA)


def ssl_view(rng, image, side, area, blur, solarise):
    """-> (3, side, side) uint8: crop, flip, colours, grey, blur, solarise, in DINOv2's order and with its numbers"""
    view, changes = ssl_crop(rng, image, side, area, blur, solarise)
    return recolour(view[None].copy(), [changes])[0]


def ssl_crop(rng, image, side, area, blur, solarise):
    """The crop, flipped or not (3, side, side) uint8, and what is still to happen to its colours: seven (function, amount) or None, in order"""
    view = random_crop(rng, image, side, area)
    if rng.random() < 0.5:
        view = view[..., ::-1]
    jitter = [None] * 4
    if rng.random() < 0.8:
        jitter = [(change, rng.uniform(*span)) for change, span in (JITTER[i] for i in rng.permutation(4))]
    return view, [*jitter,
                  (grey, 1) if rng.random() < 0.2 else None,
                  (gaussian_blur, rng.uniform(0.1, 2.0)) if rng.random() < blur else None,
                  (solarize, 128) if rng.random() < solarise else None]


def random_crop(rng, image, side, area, aspect=(3 / 4, 4 / 3)):
    """torchvision's RandomResizedCrop, bicubic: a share `area` of the picture, log-uniform aspect, ten tries, else the middle.

    image  PIL RGB, or its array (H, W, 3) if many views are cut from it      -> (3, side, side) uint8
    """
    image = np.asarray(image)
    h, w, _ = image.shape
    for _ in range(10):
        size, ratio = w * h * rng.uniform(*area), exp(rng.uniform(log(aspect[0]), log(aspect[1])))
        cw, ch = round(sqrt(size * ratio)), round(sqrt(size / ratio))
        if 0 < cw <= w and 0 < ch <= h:
            x, y = rng.integers(w - cw + 1), rng.integers(h - ch + 1)
            break
    else:
        cw, ch = min(w, round(h * aspect[1])), min(h, round(w / aspect[0]))
        x, y = (w - cw) // 2, (h - ch) // 2
    crop = torch.from_numpy(image[y:y + ch, x:x + cw].copy()).permute(2, 0, 1)[None]
    return interpolate(crop, (side, side), mode="bicubic", antialias=True)[0].numpy()         # Pillow's but for rounding, 3.5 x as fast


def recolour(views, changes):
    """The rest of many views at once, in place.   views (n, 3, s, s) uint8     changes  n lists of ssl_crop's

    Each comes out as it would alone. At once, because numpy takes about as long for one small crop as for ten: 128 crops of 24 pixels 6 x as fast.
    """
    most = max(1, 2 ** 18 // views[0].size) if len(views) else 1          # a megabyte of floats: what a core's own cache holds
    for k in range(0, len(views), most):
        x = views[k:k + most].astype(np.float32)                          # (n, 3, s, s) in 0..255, rounded once, at the end
        for place in zip(*changes[k:k + most]):                           # the first change of each view, the second, ...
            for change in {p[0] for p in place if p}:
                rows = [i for i, p in enumerate(place) if p and p[0] is change]
                x[rows] = change(x[rows], np.array([place[i][1] for i in rows], np.float32)[:, None, None, None])
        views[k:k + most] = x.round()
    return views


# ---- changes of colour, as torchvision computes them on floats: x (n, 3, s, s) float32 in 0..255, amount (n, 1, 1, 1), one a view  ->  like x

def luma(x): return 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]
def mix(a, b, share): return np.clip(a + (b - a) * share, 0, 255)
def brightness(x, factor): return np.minimum(x * factor, 255)
def contrast(x, factor): return mix(luma(x).reshape(len(x), -1).mean(1)[:, None, None, None], x, factor)
def saturation(x, factor): return mix(luma(x), x, factor)
def grey(x, _): return luma(x)
def solarize(x, threshold): return np.where(x < threshold - 0.5, x, 255 - x)                  # what rounds to the threshold is inverted too


def hue(x, turn):
    """By `turn` of a whole turn around the hexagon of hues: the largest and the smallest channel keep their values, their roles move on.

    Scaled to a largest of 1 and a smallest of 0, a colour lies 1 - r + g + b sixths of a turn from red, on green's side if g > b; and a channel
    is 2 - the sixths between its own place and the colour, within 0..1. It is HSV without its cases, and at 224 pixels 3 x as fast as PIL's.
    """
    r, g, b = x[:, 0], x[:, 1], x[:, 2]
    low = np.minimum(np.minimum(r, g), b)
    chroma = np.maximum(np.maximum(r, g), b) - low
    angle = np.copysign(1 + (g + b - r - low) / np.maximum(chroma, 1e-6), g - b) + 6 * turn[:, 0]
    out = np.empty_like(x)
    for channel, place in enumerate((0, 2, 4)):                           # red, green, blue
        away = angle - place
        away -= 6 * np.rint(away / 6)
        out[:, channel] = low + chroma * np.clip(2 - abs(away), 0, 1)
    return out


def gaussian_blur(x, sigma):
    """torchvision's 9x9 kernel, one axis after the other, edges reflected.

    9 is DINOv2's at every crop size, 96 as well as 224; on smaller crops than its own the same blur takes away more.
    """
    s, k = x.shape[-1], np.exp(-0.5 * (np.arange(5, dtype=np.float32) / sigma) ** 2)          # (n, 1, 1, 5): the middle and one side
    k = np.moveaxis(k / (2 * k.sum(-1, keepdims=True) - 1), -1, 0)[..., None]                 # (5, n, 1, 1, 1)
    for _ in range(2):
        p = np.pad(x, [(0, 0), (0, 0), (4, 4), (0, 0)], mode="reflect")
        x = k[0] * p[:, :, 4:-4]
        for i in range(1, 5):
            x += k[i] * (p[:, :, 4 - i:4 - i + s] + p[:, :, 4 + i:4 + i + s])
        x = x.swapaxes(2, 3)
    return x


JITTER = [(brightness, (0.6, 1.4)), (contrast, (0.6, 1.4)), (saturation, (0.8, 1.2)), (hue, (-0.1, 0.1))]       # DINOv2's


# ---- views for evaluation: PIL in, PIL out

def adm_crop(image, size):
    """ADM's centre crop, on which FID is measured: halve by box, bicubic to the shorter side, cut the middle.  PIL -> PIL (size, size)"""
    w, h = image.size
    if max(w, h) > 32 * min(w, h):                                        # of a ribbon only its middle: 3000x4 would be enlarged to 192000x256
        keep = 32 * min(w, h)
        image = image.crop(((w - keep) // 2, 0, (w + keep) // 2, h) if w > h else (0, (h - keep) // 2, w, (h + keep) // 2))
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    x, y = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((x, y, x + size, y + size))


def squash(image, size):
    """The whole picture made square, bilinear: what VTP's zero-shot evaluation looks at."""
    return image.resize((size, size), Image.BILINEAR)


def centre_crop(image, size):
    """The middle 7/8 of the shorter side: 224 of 256, bicubic, as linear probes look at ImageNet (VTP's and DINOv2's)"""
    short = round(size * 8 / 7)
    image = image.resize([short * side // min(image.size) for side in image.size], Image.BICUBIC)
    x, y = (round((side - size) / 2) for side in image.size)
    return image.crop((x, y, x + size, y + size))


CUTS = {"adm": adm_crop, "squash": squash, "centre": centre_crop}


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
