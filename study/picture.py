"""The README's picture, from one run of `make demo`.

    python study/picture.py runs/demo study/demo/picture.png

Left: validation images, their reconstructions, and PCA of patch features and latents. Right:
samples of the DiT, one row per class.
"""
import sys
from pathlib import Path

from PIL import Image

WIDTH, GAP = 760, 20                             # of the left column; between the columns


def resized(image, width=None, height=None):
    """One side is given; the aspect ratio stays"""
    scale = width / image.width if width else height / image.height
    size = width or round(image.width * scale), height or round(image.height * scale)
    return image.resize(size, Image.LANCZOS)


def main(run, out):
    run, left = Path(run), []
    for name in ("reconstructions", "features"):
        image = Image.open(run / "report" / f"{name}.png").convert("RGB")
        left.append(resized(image, width=WIDTH))
    height = sum(image.height for image in left)
    samples = Image.open(run / "dit" / "samples" / "grid.png").convert("RGB")
    right = resized(samples, height=height)
    sheet = Image.new("RGB", (WIDTH + GAP + right.width, height), "white")
    sheet.paste(left[0], (0, 0))
    sheet.paste(left[1], (0, left[0].height))
    sheet.paste(right, (WIDTH + GAP, 0))
    sheet.save(out, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
