"""Estimate how long each stage of `make demo` takes on this machine.

    python study/expected.py           print one line per stage
    python study/expected.py --step    print only the measured step time, for study/demo/times.json

A small training step is timed for about one second. study/demo/times.json contains the time of the
same step and of every stage on one machine, which it names. The estimate is
recorded time of the stage x (step time here / recorded step time).
"""
import argparse
import json
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from vtp_min import VTPConfig, VTPModel                                    # noqa: E402
from vtp_min.device import autocast, choose_precision                      # noqa: E402
from vtp_min.extras import fast                                            # noqa: E402


def step_seconds(precision, seconds=1.0, batch=48):
    """-> median duration in seconds of a reconstruction step of nano, without the optimizer

    precision  'fp32' or 'bf16'
    seconds    length of the measurement; at least two steps after the first are measured
    batch      images per step, 36 x 36 pixels
    """
    torch.manual_seed(0)
    model = VTPModel(VTPConfig.of_size("nano", 36, 9, 64, clip=False))
    images = torch.randn(batch, 3, 36, 36)
    times = []
    while len(times) < 3 or sum(times[1:]) < seconds:          # the first step is a warm-up
        start = time.perf_counter()
        model.zero_grad()
        with autocast(images.device, precision):
            latents = model.get_reconstruction_latents(images)
            pixels = model.get_latents_decoded_images(latents)
        (pixels.float() - images).abs().mean().backward()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[len(times[1:]) // 2]


def minutes(seconds):
    """Duration as text: 93 -> '1 min 33 s'"""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    return f"{seconds // 60} min {seconds % 60} s"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", action="store_true",
                        help="print only the measured step time in seconds and the precision")
    args = parser.parse_args()
    precision = choose_precision(torch.device("cpu"))
    fast.install()                                  # the demo uses the fast forms on a CPU
    measured = step_seconds(precision)
    if args.step:
        print(f"{measured:.4f} {precision}")
        return
    recorded = json.loads((ROOT / "study/demo/times.json").read_text())
    ratio = measured / recorded["step_seconds"]
    for stage, seconds in recorded["stages"].items():
        print(f"{stage}: expected to take about {minutes(seconds * ratio)} on this machine")
    total = sum(recorded["stages"].values())
    print(f"all stages: expected to take about {minutes(total * ratio)} on this machine, in "
          f"{precision} (a training step takes {ratio:.2f} times as long as on "
          f"{recorded['machine']})")


if __name__ == "__main__":
    main()
