"""Assemble the image at the top of the README from a run of `make demo` and its report.

    python study/picture.py runs/demo study/demo/picture.png

Left: validation images, their reconstructions, and the principal components of patch features and
latents. Right: samples of the DiT, one row per class.
"""
import sys
from pathlib import Path

from PIL import Image

WIDTH = 760                                      # of the left column, in pixels
GAP = 20                                         # between the columns


def resized(image, width=None, height=None):
    """Resize to a width or to a height; the aspect ratio is kept."""
    scale = width / image.width if width else height / image.height
    size = width or round(image.width * scale), height or round(image.height * scale)
    return image.resize(size, Image.LANCZOS)


def main(run, out):
    run = Path(run)
    left = []
    for name in ("reconstructions", "features"):
        image = Image.open(run / "report" / f"{name}.png").convert("RGB")
        left.append(resized(image, width=WIDTH))
    height = sum(image.height for image in left)
    samples = Image.open(run / "dit" / "samples" / "grid.png").convert("RGB")
    right = resized(samples, height=height)
    page = Image.new("RGB", (WIDTH + GAP + right.width, height), "white")
    page.paste(left[0], (0, 0))
    page.paste(left[1], (0, left[0].height))
    page.paste(right, (WIDTH + GAP, 0))
    page.save(out, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
