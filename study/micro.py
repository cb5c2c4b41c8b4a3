"""Peak memory, and seconds of a step, of nano (built-in shapes, 48 px, the precision of the machine, the paper's proportions) against the batch, --micro and --recompute.

    python study/micro.py        several minutes -> study/micro.txt
"""
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT, RUN = Path(__file__).parents[1], Path(__file__).parents[1] / "runs/micro"
RUNS = {64: [""], 512: ["", "--micro 16", "--micro 64", "--micro 256", "--micro 64 --recompute"], 4096: ["", "--micro 64", "--micro 64 --recompute"]}


def measure(batch, how):
    """Two steps -> GB at the peak, seconds of the second without its wait for data"""
    words = (f"train.py --out {RUN} --fresh --steps 2 --log-every 1 --save-every 9 --batch {batch} --batch-ssl {batch // 4} --batch-rec {batch // 8} "
             f"--image 48 --patch 12 --perceptual none {how}").split()
    said = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    last = json.loads((RUN / "log.jsonl").read_text().splitlines()[-1])
    return float(re.search("Peak memory ([0-9.]+) GB", said)[1]), batch / last["images_per_s"] * (1 - last["data_wait"])


def main():
    lines = []
    for batch, how in ((batch, how) for batch, ways in RUNS.items() for how in ways):
        memory, seconds = measure(batch, how)
        lines.append(f"batch {batch:4d} / {batch // 4:4d} / {batch // 8:3d}   {how or 'all at once':24s} {memory:5.2f} GB {seconds:7.2f} s")
        print(lines[-1], flush=True)
    (ROOT / "study/micro.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
