"""Measure peak memory and step time of nano for several settings of --batch, --micro, --recompute.

    python study/micro.py        several minutes -> study/micro.txt

Built-in shapes of 48 px, the default precision of the machine, and the paper's proportions: batches
of 8 : 2 : 1 for CLIP, self-distillation and reconstruction.
"""
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUN = ROOT / "runs/micro"
RUNS = {64: [""],                                # {batch: lists of additional flags}
        512: ["", "--micro 16", "--micro 64", "--micro 256", "--micro 64 --recompute"],
        4096: ["", "--micro 64", "--micro 64 --recompute"]}


def measure(batch, flags):
    """Run two steps -> peak memory in GB, seconds of the second step without the time that it
    waited for data"""
    command = (f"train.py --out {RUN} --fresh --steps 2 --log-every 1 --save-every 9 "
               f"--batch {batch} --batch-ssl {batch // 4} --batch-rec {batch // 8} --image 48 "
               f"--patch 12 --perceptual none {flags}")
    done = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True,
                          check=True, cwd=ROOT)
    memory = float(re.search("Peak memory ([0-9.]+) GB", done.stdout)[1])
    last = json.loads((RUN / "log.jsonl").read_text().splitlines()[-1])
    return memory, batch / last["images_per_s"] * (1 - last["data_wait"])


def main():
    lines = []
    for batch, variants in RUNS.items():
        for flags in variants:
            memory, seconds = measure(batch, flags)
            lines.append(f"batch {batch:4d} / {batch // 4:4d} / {batch // 8:3d}   "
                         f"{flags or 'no micro-batches':24s} {memory:5.2f} GB {seconds:7.2f} s")
            print(lines[-1], flush=True)
    (ROOT / "study/micro.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
