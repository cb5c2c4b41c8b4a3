"""Read any image file as its author meant it, or raise an exception that says why not.

CMYK, 16 bits per channel, palettes, transparency, EXIF orientation, animations, damaged files and
decompression bombs.
"""
import warnings

import numpy as np
from PIL import Image, ImageChops, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")       # decided by a file's bytes
SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")

EXIF_ORIENTATION = 0x0112
UPRIGHT = {2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM,
           5: Image.TRANSPOSE, 6: Image.ROTATE_270, 7: Image.TRANSVERSE, 8: Image.ROTATE_90}


def is_image(name):
    """Whether a file of this name is read as an image"""
    return name.rpartition(".")[2].lower() in SUFFIXES


def read_image(file):
    """Path or open file -> PIL RGB image. Of an animation it is the first frame.

    Color profiles are not applied. Above 179 million pixels (half a gigabyte) Pillow suspects a
    decompression bomb and raises.
    """
    with warnings.catch_warnings(action="ignore"):            # of large images, EXIF, palettes
        try:
            image = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError:
            raise ValueError(f"is not one of {', '.join(FORMATS)}") from None
        with image:
            image.load()
            return as_rgb(image)


def as_rgb(image):
    """PIL image in any mode -> upright PIL RGB image, transparent parts on white"""
    if image.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits, and the file does not say which value is white")
    # Pillow inverts every CMYK JPEG, which is right only for those that Adobe has marked
    inverted = image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info
    try:
        turn = UPRIGHT.get(image.getexif().get(EXIF_ORIENTATION))
    except Exception:                                         # damaged EXIF: the image may be sound
        turn = None
    if turn is not None:
        image = image.transpose(turn)
    if inverted:
        image = ImageChops.invert(image)
    if image.mode.startswith("I;16"):
        return gray_from_16_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def gray_from_16_bits(image):
    """16-bit grayscale -> PIL RGB image. In a PNG one gray level may stand for transparent."""
    gray = np.asarray(image)
    transparent = gray == image.info.get("transparency")
    levels = np.where(transparent, 255, (gray / 257).round())
    return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
