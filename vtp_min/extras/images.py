"""Read an image file of any kind as an upright RGB image with 8 bits per channel.

This covers CMYK, 16 bits per channel, palettes, transparency, EXIF orientation and animations.
Damaged files and decompression bombs raise an exception that states the reason.
"""
import warnings

import numpy as np
from PIL import Image, ImageChops, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")       # found by content, not by suffix
SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")

EXIF_ORIENTATION = 0x0112                                     # number of the EXIF tag
# value of the tag -> operation that makes the image upright
UPRIGHT = {2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM,
           5: Image.TRANSPOSE, 6: Image.ROTATE_270, 7: Image.TRANSVERSE, 8: Image.ROTATE_90}


def is_image(name):
    """True if a file of this name is read as an image"""
    return name.rpartition(".")[2].lower() in SUFFIXES


def read_image(file):
    """Path or open file -> PIL RGB image. For an animation, this is the first frame.

    Color profiles are not applied. Any exception if the file cannot be read: ValueError for other
    formats, DecompressionBombError above 179 million pixels (half a gigabyte in RGB), or Pillow's
    exceptions for damaged files.
    """
    with warnings.catch_warnings(action="ignore"):            # about size, EXIF and palettes
        try:
            image = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError:
            raise ValueError(f"is not an image of type {', '.join(FORMATS)}") from None
        with image:
            image.load()
            return as_rgb(image)


def as_rgb(image):
    """PIL image in any mode -> upright PIL RGB image; transparent parts are blended with white"""
    if image.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits, but the file does not define the value of white")
    # Pillow inverts every CMYK JPEG, but only those with Adobe's marker are stored inverted
    inverted = image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info
    try:
        operation = UPRIGHT.get(image.getexif().get(EXIF_ORIENTATION))
    except Exception:                          # damaged EXIF; the pixels may still be readable
        operation = None
    if operation is not None:
        image = image.transpose(operation)
    if inverted:
        image = ImageChops.invert(image)                      # undo Pillow's inversion
    if image.mode.startswith("I;16"):
        return gray_from_16_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def gray_from_16_bits(image):
    """16-bit grayscale -> PIL RGB image. A PNG may define one gray level as transparent."""
    gray = np.asarray(image)
    transparent = gray == image.info.get("transparency")
    levels = np.where(transparent, 255, (gray / 257).round())             # 65535 becomes 255
    return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
