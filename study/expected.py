"""Expected duration of each stage of `make demo` on this machine, from one measured second of
training steps.

    python study/expected.py           one line per stage
    python study/expected.py --step    the measured time alone, for study/demo/times.json

study/demo/times.json holds the time of such a step and of every stage on the machine that it names.
Expected time here = recorded time x (step time here / recorded step time).
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
    """Median time of a reconstruction step of the nano model: forward and backward, no optimizer

    Measured over about one second, and at least two steps after the first.
    """
    torch.manual_seed(0)
    model = VTPModel(VTPConfig.of_size("nano", 36, 9, 64, clip=False))
    images = torch.randn(batch, 3, 36, 36)
    times = []
    while len(times) < 3 or sum(times[1:]) < seconds:          # the first step warms up
        start = time.perf_counter()
        model.zero_grad()
        with autocast(images.device, precision):
            latents = model.get_reconstruction_latents(images)
            pixels = model.get_latents_decoded_images(latents)
        (pixels.float() - images).abs().mean().backward()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[len(times[1:]) // 2]


def minutes(seconds):
    """93 -> '1 min 33 s'"""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    return f"{seconds // 60} min {seconds % 60} s"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", action="store_true",
                        help="print the time of a step in seconds, and exit")
    args = parser.parse_args()
    precision = choose_precision(torch.device("cpu"))
    fast.install()                                  # as train.py does on a CPU
    measured = step_seconds(precision)
    if args.step:
        print(f"{measured:.4f} {precision}")
        return
    known = json.loads((ROOT / "study/demo/times.json").read_text())
    ratio = measured / known["step_seconds"]
    for stage, seconds in known["stages"].items():
        print(f"{stage}: expected to take about {minutes(seconds * ratio)} on this machine")
    total = sum(known["stages"].values())
    print(f"all stages: expected to take about {minutes(total * ratio)} on this machine, in "
          f"{precision} (a training step takes {ratio:.2f} times as long as on {known['machine']})")


if __name__ == "__main__":
    main()
