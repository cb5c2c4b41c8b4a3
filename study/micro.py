"""Peak memory of one step of nano (built-in shapes, 48 px, bf16, the paper's proportions) against the batch, --micro and --recompute.

    python study/micro.py        a few minutes -> study/micro.txt
"""
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOW = {"all at once": [], "--micro 64": ["--micro", "64"], "--micro 64 --recompute": ["--micro", "64", "--recompute"]}


def main():
    lines = []
    for batch in (64, 512, 4096):
        for name, flags in HOW.items():
            command = [sys.executable, ROOT / "train.py", "--out", ROOT / "runs/micro", "--fresh", "--steps", 1, "--batch", batch, "--batch-ssl", batch // 4,
                       "--batch-rec", batch // 8, "--perceptual", "none", "--precision", "bf16", *flags]
            said = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout
            lines.append(f"batch {batch:4d} / {batch // 4:4d} / {batch // 8:3d}   {name:24s} {re.search('Peak memory ([0-9.]+) GB', said)[1]} GB")
            print(lines[-1], flush=True)
    (ROOT / "study/micro.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
