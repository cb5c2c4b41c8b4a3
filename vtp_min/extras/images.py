"""Read an image file of any kind as an upright RGB image with 8 bits per channel.

This covers CMYK, 16 bits per channel, palettes, transparency, EXIF orientation, TIFF files whose
zeros are white, and animations. Damaged files, decompression bombs and pixels without a defined
white raise an exception that states the reason.
"""
import os
import warnings
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageChops, TiffImagePlugin, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")       # found by content, not by suffix
SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")

EXIF_ORIENTATION = 0x0112                                     # number of the EXIF tag
# value of the tag -> operation that makes the image upright
UPRIGHT = {2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM,
           5: Image.TRANSPOSE, 6: Image.ROTATE_270, 7: Image.TRANSVERSE, 8: Image.ROTATE_90}
# TIFF tags
BITS, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339
WHITE_IS_ZERO = 0                                             # value of PHOTOMETRIC
SIGNED, FLOAT = 2, 3                                          # values of SAMPLE_FORMAT
# Pillow opens this kind of TIFF in one byte order only: 16 bits of gray, zeros are white
TiffImagePlugin.OPEN_INFO.setdefault((b"MM", WHITE_IS_ZERO, (1,), 1, (16,), ()),
                                     ("I;16B", "I;16B"))


def is_image(name):
    """True if a file of this name is read as an image. Hidden files are not: macOS writes a file
    ._x.png, which holds no image, beside x.png."""
    name = os.path.basename(name)
    return not name.startswith(".") and name.rpartition(".")[2].lower() in SUFFIXES


def read_image(file, formats=FORMATS):
    """Path or open file -> PIL RGB image. For an animation, this is the first frame.

    Color profiles are not applied. Any exception if the file cannot be read: ValueError for other
    formats, DecompressionBombError above 179 million pixels (half a gigabyte in RGB), or Pillow's
    exceptions for damaged files.
    """
    with open_image(file, formats) as image:
        image.load()
        return as_rgb(image)


def read_header(file, formats=FORMATS):
    """-> size (W, H) of the image that read_image returns, and format. No pixels are decoded;
    exceptions as in read_image."""
    with open_image(file, formats) as image:
        size = image.size
        # operations 5 to 8 exchange rows and columns; Pillow's size of a TIFF is already upright
        if image.format != "TIFF" and upright(image) in [UPRIGHT[n] for n in (5, 6, 7, 8)]:
            size = size[::-1]
        return size, image.format


@contextmanager
def open_image(file, formats):
    """Open a file, and check its format and the type of its pixels -> PIL image, not decoded"""
    with warnings.catch_warnings(action="ignore"):            # about size, EXIF and palettes
        try:
            image = Image.open(file, formats=formats)
        except UnidentifiedImageError:
            raise ValueError(f"is not an image of type {', '.join(formats)}, or is of a kind that "
                             f"Pillow cannot read") from None
        with image:
            tags = getattr(image, "tag_v2", {})               # only TIFF files have them
            is_pgm = image.format == "PPM" and image.mode == "I"           # 0..65535
            if image.mode in ("I", "F") and not is_pgm:
                raise ValueError("its pixels have 32 bits, but the file does not define the value "
                                 "of white")
            if {SIGNED, FLOAT} & {*tags.get(SAMPLE_FORMAT, ())}:
                raise ValueError("its pixels are signed or floating-point numbers, but the file "
                                 "does not define the value of white")
            yield image


def upright(image):
    """-> operation that makes a PIL image upright, None if it is"""
    try:
        return UPRIGHT.get(image.getexif().get(EXIF_ORIENTATION))
    except Exception:                          # damaged EXIF; the pixels may still be readable
        return None


def as_rgb(image):
    """PIL image in any mode -> upright PIL RGB image; transparent parts are blended with white"""
    # Pillow inverts every CMYK JPEG, but only those with Adobe's marker are stored inverted
    inverted = image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info
    tags = getattr(image, "tag_v2", {})                       # transposed images have none
    operation = upright(image)
    if operation is not None:
        image = image.transpose(operation)
    if inverted:
        image = ImageChops.invert(image)                      # undo Pillow's inversion
    if image.mode.startswith("I"):
        return gray_from_16_bits(image, tags)
    if image.mode == "La":                                    # gray multiplied by alpha
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def gray_from_16_bits(image, tags):
    """Grayscale with 9 to 16 bits -> PIL RGB image

    tags  of a TIFF file, {} for other formats. A PNG may define one gray level as transparent.
    """
    gray = np.asarray(image)
    transparent = gray == image.info.get("transparency")
    white = 2 ** tags.get(BITS, (16,))[0] - 1
    levels = (gray / (white / 255)).round()                   # 65535 becomes 255
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        levels = 255 - levels                  # Pillow inverts up to 8 bits, but not 16
    levels = np.where(transparent, 255, levels)
    return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
