"""The README's picture: what one run of `make demo` leaves.   python study/picture.py runs/demo study/demo/picture.png

Left: validation pictures, their reconstructions, what patches and latents see (PCA). Right: samples of the DiT, a row a class.
"""
import sys
from pathlib import Path

from PIL import Image

run, out = Path(sys.argv[1]), sys.argv[2]
left = [Image.open(run / "report" / f"{name}.png").convert("RGB") for name in ("reconstructions", "features")]
right = Image.open(run / "dit" / "samples" / "grid.png").convert("RGB")
width = 760
left = [x.resize((width, round(x.height * width / x.width)), Image.LANCZOS) for x in left]
height = sum(x.height for x in left)
right = right.resize((round(right.width * height / right.height), height), Image.LANCZOS)
sheet = Image.new("RGB", (width + 20 + right.width, height), "white")
for x, y in zip(left, (0, left[0].height)):
    sheet.paste(x, (0, y))
sheet.paste(right, (width + 20, 0))
sheet.save(out, optimize=True)
