"""Compare speed and memory of two versions of this repository -> study/speed.json, study/speed.txt

    git archive COMMIT | tar -x -C OLD
    python study/speed.py OLD .                         everything, 5 rounds: more than an hour
    python study/speed.py OLD . nano views --rounds 3   two of the measurements

There are three variants: "old", "new", and "plain", which is the new version without
extras/fast.py. They run alternately (old, new, plain, old, ...), each time in a new process. The
results are medians over the rounds, with the lowest and the highest value. No other program should
run on the machine during the measurement. The measurements are:

    nano        training step of nano with its default batch, built-in shapes of 36 px
    nano2       the same with two processes of one thread each
    S           training step of S at 256 px, patch size 16, with a small batch
    dit-nano    training step of a small DiT on random latents of 4 x 4
    dit-B       the same for the DiT of the paper's ablations
    views       crops and masks of JPEGs, one thread: 36 px with 2 local crops, 224 px with 8
    inception   features of 64 px images

A training step of nano or S has two rows: the images per second in the log, and the same without
the time that the step waited for data.
"""
import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]

# {setting: (old, new)}: settings that the two versions spell differently on the command line
SPELLING = {"locals": ("--locals {}", "--set locals={}")}
VARIANTS = "old", "new", "plain"


# ---------------------------------------------------------------- training commands
def train_flags(args, name):
    """-> command line of train.py, and a dict with the values of the settings in SPELLING"""
    shared = "train.py --fresh --perceptual none --device cpu --workers 0 --save-every 100000"
    if name == "S":
        flags = (f"{shared} --size S --image 256 --patch 16 --batch {args.s_batch} "
                 f"--batch-ssl {args.s_batch} --batch-rec {args.s_batch} "
                 f"--steps {args.s_steps} --log-every 1")
        return flags, {"locals": args.s_locals}
    flags = (f"{shared} --size nano --image 36 --patch 9 --batch 48 --batch-ssl 16 --batch-rec 48 "
             f"--steps {args.nano_steps} --log-every {max(args.nano_steps // 12, 1)}")
    return flags, {"locals": 2}


def dit_flags(args, size, latents):
    """-> command line of dit.py train"""
    steps, batch = (args.dit_steps, 64) if size == "nano" else (args.dit_b_steps, 32)
    return (f"dit.py train {latents} --fresh --size {size} --batch {batch} --steps {steps} "
            f"--device cpu --log-every {max(steps // 12, 1)} --save-every 100000")


def spell(variant, settings):
    """settings {name: value} -> the part of the command line that depends on the variant"""
    column = 0 if variant == "old" else 1
    words = [SPELLING[name][column].format(value) for name, value in settings.items()]
    if variant == "plain":
        words.append("--set fast=0")
    return " ".join(words)


def run_training(tree, flags, processes=1):
    """Run one training in a temporary folder.

    tree  folder of a version      flags  command line      processes  number of processes
    -> medians over the later lines of its log, and its peak memory in GB
    """
    launch = []
    environment = dict(os.environ)
    if processes > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                  str(processes)]
        environment["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *launch, *flags.split(), "--out", f"{folder}/run"]
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed in {tree}:\n{done.stderr[-2000:]}")
        text = Path(folder, "run/log.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    # the first third is a warm-up: caches, the allocator, the FLOP counter of older versions
    later = [line for line in lines if line["step"] > lines[-1]["step"] / 3]
    rates = [line["images_per_s"] for line in later]
    rates_without_data = [line["images_per_s"] / (1 - line["data_wait"]) for line in later]
    memory = re.search(r"Peak memory ([0-9.]+) GB", done.stdout)
    return {"images_per_s": median(rates), "without_data": median(rates_without_data),
            "gb": float(memory[1])}


def write_random_latents(folder, n=512, channels=64, side=4, classes=10):
    """Write a folder as `dit.py latents` does, with normally distributed latents."""
    rng = torch.Generator().manual_seed(0)
    latents, latents_flip = torch.randn(2, n, channels, side, side, generator=rng)
    tensors = {"latents": latents.clone(), "latents_flip": latents_flip.clone(),
               "labels": torch.arange(n) % classes}
    save_file(tensors, folder / "latents_rank00_shard000.safetensors")
    stats = {"mean": torch.zeros(1, channels, 1, 1), "std": torch.ones(1, channels, 1, 1)}
    torch.save(stats, folder / "latents_stats.pt")
    (folder / "classes.json").write_text(json.dumps([str(i) for i in range(classes)]))
    about = {"tokenizer": "..", "encoder": "0", "data": "random", "split": "train", "image": 64,
             "precision": "fp32", "posterior": "deterministic", "shape": [channels, side, side]}
    (folder / "latents.json").write_text(json.dumps(about))


# ---------------------------------------------------------------- measurements without training
def write_jpegs(folder, side, n=64):
    """Write n smooth random images into four class folders."""
    rng = np.random.default_rng(0)
    for i in range(n):
        coarse = Image.fromarray(rng.integers(256, size=(9, 9, 3), dtype=np.uint8))
        path = folder / "val" / str(i % 4) / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse.resize((side, side), Image.BICUBIC).save(path, quality=90)


def time_views(folder, image, local_image, n_local, patch, batch, seconds):
    """-> images per second of the training batches, without captions"""
    import data
    # older versions call this class Steps
    batches_class = getattr(data, "TrainBatches", None) or data.Steps
    source = data.open_data(str(folder), "val", whole=True)
    batches = batches_class(source, None, seed=0, batch=batch, batch_ssl=batch, batch_rec=batch,
                            clip=False, ssl=True, rec=True, image=image, local_image=local_image,
                            n_local=n_local, patch=patch)
    return batch / median_seconds(lambda step: batches[step], seconds)


def time_inception(batch, seconds):
    """-> images per second of Inception's features, with random weights"""
    from vtp_min.fid import Inception
    torch.manual_seed(0)
    model = Inception()
    for name, x in model.state_dict().items():     # with these weights, features stay of order 1
        if name.endswith("conv.weight"):
            torch.nn.init.kaiming_normal_(x, nonlinearity="relu")
    images = torch.randint(256, (batch, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        return batch / median_seconds(lambda step: model(images), seconds)


def median_seconds(call, seconds):
    """Time call(step) for step = 0, 1, 2, ... -> median duration in seconds

    The first call is a warm-up. The others take about `seconds` in total; there are at least three.
    """
    times = []
    while len(times) < 4 or sum(times[1:]) < seconds:
        start = time.perf_counter()
        call(len(times))
        times.append(time.perf_counter() - start)
    return median(times[1:])


def print_part(name, variant, seconds):
    """Measure "views" or "inception" and print {row: images per second} as JSON. Runs in a process
    of its own, in the folder of the version."""
    sys.path.insert(0, os.getcwd())
    if variant == "new":
        from vtp_min.extras import fast
        fast.install()
    if name == "inception":
        found = {"": time_inception(16, seconds)}
    else:
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            write_jpegs(Path(folder) / "small", 48)
            write_jpegs(Path(folder) / "large", 288)
            found = {"36 px": time_views(f"{folder}/small", 36, 18, 2, 9, 16, seconds),
                     "224 px": time_views(f"{folder}/large", 224, 96, 8, 16, 8, seconds)}
    print(json.dumps(found))


def run_part(tree, name, variant, seconds):
    """Start the process of print_part -> {row: images per second}"""
    command = [sys.executable, __file__, "--part", name, variant, str(seconds)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed in {tree}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


# ---------------------------------------------------------------- the measurements
def measure(args, name, variant, precision, latents):
    """Measure one variant once -> {row: number}"""
    tree = args.old if variant == "old" else args.new
    if name in ("views", "inception"):
        found = run_part(tree, name, variant, args.seconds)
        return {f"{name} {row}, images/s".replace(" ,", ","): x for row, x in found.items()}
    if name.startswith("dit"):
        flags, settings = dit_flags(args, name.removeprefix("dit-"), latents), {}
    else:
        flags, settings = train_flags(args, name)
    flags = f"{flags} --precision {precision} {spell(variant, settings)}"
    found = run_training(tree, flags, processes=2 if name == "nano2" else 1)
    rows = {f"{name} {precision}, images/s": found["images_per_s"],
            f"{name} {precision}, images/s without data": found["without_data"],
            f"{name} {precision}, GB": found["gb"]}
    if name.startswith("dit"):                     # random latents in memory: no wait for data
        del rows[f"{name} {precision}, images/s without data"]
    return rows


def measure_alternately(args, name, precision, latents):
    """Measure all variants in each round -> {row: {variant: list of numbers, one per round}}"""
    rows = {}
    for number in range(args.rounds):
        for variant in VARIANTS:
            for row, value in measure(args, name, variant, precision, latents).items():
                rows.setdefault(row, {v: [] for v in VARIANTS})[variant].append(value)
            print(f"{time.strftime('%H:%M:%S')} {name} {precision}: round {number + 1} of "
                  f"{args.rounds}, {variant}", flush=True)
    return rows


def ratios(samples, variant):
    """-> ratio of a variant to the old version: ratio of the medians, lowest and highest ratio"""
    each = [x / y for x, y in zip(samples[variant], samples["old"])]
    return median(samples[variant]) / median(samples["old"]), min(each), max(each)


def table(rows):
    """rows {row: {variant: numbers}} -> lines of text: medians, with ranges in brackets"""
    head = [f"{name:>26}" for name in (*VARIANTS, "new / old", "plain / old")]
    yield f"{'':40}" + "".join(head)
    for row, samples in rows.items():
        cells = []
        for variant in VARIANTS:
            x = samples[variant]
            cells.append(f"{median(x):.4g} [{min(x):.4g}, {max(x):.4g}]")
        for variant in ("new", "plain"):
            cells.append("{:.3f} [{:.3f}, {:.3f}]".format(*ratios(samples, variant)))
        yield f"{row:40}" + "".join(f"{cell:>26}" for cell in cells)


def machine():
    """-> description of this machine"""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return (f"{torch.get_num_threads()} threads of {model[1] if model else platform.machine()}, "
            f"torch {torch.__version__.split('+')[0]}")


MEASUREMENTS = ["nano", "nano2", "S", "dit-nano", "dit-B", "views", "inception"]


def parse():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("old", type=lambda name: Path(name).resolve(), help="folder of the old version")
    p.add_argument("new", type=lambda name: Path(name).resolve(), help="folder of the new version")
    p.add_argument("names", nargs="*", metavar="measurement",
                   help=f"some of {', '.join(MEASUREMENTS)}; default: all")
    p.add_argument("--rounds", type=int, default=5,
                   help="number of times that each variant is measured (default: %(default)s)")
    p.add_argument("--nano-steps", type=int, default=120,
                   help="training steps of nano and nano2 (default: %(default)s)")
    p.add_argument("--s-steps", type=int, default=9,
                   help="training steps of S (default: %(default)s)")
    p.add_argument("--s-batch", type=int, default=4,
                   help="images per step of S, for all losses (default: %(default)s)")
    p.add_argument("--s-locals", type=int, default=8,
                   help="local crops per image of S (default: %(default)s)")
    p.add_argument("--dit-steps", type=int, default=240,
                   help="training steps of dit-nano (default: %(default)s)")
    p.add_argument("--dit-b-steps", type=int, default=24,
                   help="training steps of dit-B (default: %(default)s)")
    p.add_argument("--seconds", type=float, default=10,
                   help="duration of one measurement of views or inception (default: %(default)s)")
    p.add_argument("--precision", action="append", choices=["fp32", "bf16"],
                   help="repeatable; default: fp32, and bf16 if the CPU has bf16 instructions")
    p.add_argument("--out", type=Path, default=ROOT / "study/speed.json",
                   help="JSON file for the results; existing rows of the same name are replaced. "
                        "The table is written next to it with the suffix .txt")
    args = p.parse_args()
    unknown = set(args.names) - set(MEASUREMENTS)
    if unknown:
        p.error(f"unknown measurement {', '.join(sorted(unknown))}; wanted some of "
                f"{', '.join(MEASUREMENTS)}")
    if args.rounds < 1:
        p.error(f"--rounds {args.rounds}; wanted 1 or more")
    return args


def main():
    args = parse()
    sys.path.insert(0, str(ROOT))
    from vtp_min.device import multiplies_bf16
    precisions = args.precision or ["fp32"]
    if not args.precision and multiplies_bf16(torch.device("cpu")):
        precisions.append("bf16")
    results = json.loads(args.out.read_text()) if args.out.exists() else {"rows": {}}
    with tempfile.TemporaryDirectory() as latents:
        write_random_latents(Path(latents))
        for name in args.names or MEASUREMENTS:
            # views have no matrix products, and Inception runs in float32 only
            for precision in ["fp32"] if name in ("views", "inception") else precisions:
                results["rows"] |= measure_alternately(args, name, precision, latents)
                results["machine"] = machine()
                text = "\n".join([results["machine"], *table(results["rows"])]) + "\n"
                args.out.write_text(json.dumps(results, indent=1) + "\n")
                args.out.with_suffix(".txt").write_text(text)
    print(text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        print_part(sys.argv[2], sys.argv[3], float(sys.argv[4]))
    else:
        main()
