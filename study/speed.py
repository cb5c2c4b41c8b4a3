"""Two versions of this repository beside each other: speed and memory, in fresh processes that take
turns: old, new, plain, old, new, plain, ... -> study/speed.json, study/speed.txt

    git archive COMMIT | tar -x -C OLD
    python study/speed.py OLD .                         everything, 5 rounds: more than an hour
    python study/speed.py OLD . nano views --rounds 3   two of the measurements

plain is the new version without extras/fast.py. Medians over rounds, with the lowest and highest.
Nothing else may run on the machine meanwhile. The measurements:

    nano        joint step of nano with its default batch, 36 px, built-in shapes
    nano2       the same on two processes of one thread each
    S           joint step of S at 256 px, patch 16, a small batch
    dit-nano    training step of the DiT on random latents of 4 x 4
    dit-B       the same for the DiT of the paper's ablations
    views       crops and masks of JPEGs, one thread: 36 px with 2 local crops, 224 px with 8
    inception   features of 64 px images

A joint step has two rows: images per second of the log, and the same without the time that the
step waited for its data.
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

# flags whose spelling differs between the versions: (old, new)
SPELLING = {"locals": ("--locals {}", "--set locals={}")}
VARIANTS = "old", "new", "plain"


# ---------------------------------------------------------------- training commands
def train_flags(args, name):
    """-> the command line of train.py, and flags of SPELLING with their values"""
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
    steps, batch = (args.dit_steps, 64) if size == "nano" else (args.dit_b_steps, 32)
    return (f"dit.py train {latents} --fresh --size {size} --batch {batch} --steps {steps} "
            f"--device cpu --log-every {max(steps // 12, 1)} --save-every 100000")


def spell(variant, settings):
    """{name: value} -> words of the command line of this version"""
    column = 0 if variant == "old" else 1
    words = [SPELLING[name][column].format(value) for name, value in settings.items()]
    if variant == "plain":
        words.append("--set fast=0")
    return " ".join(words)


def run_training(tree, flags, processes=1):
    """One run in a folder of its own -> medians of the later lines of its log, and its memory"""
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
    # the first third warms up: caches, the allocator, the FLOP counter of older versions
    later = [line for line in lines if line["step"] > lines[-1]["step"] / 3]
    rates = [line["images_per_s"] for line in later]
    alone = [line["images_per_s"] / (1 - line["data_wait"]) for line in later]
    memory = re.search(r"Peak memory ([0-9.]+) GB", done.stdout)
    return {"images_per_s": median(rates), "without_data": median(alone), "gb": float(memory[1])}


def write_random_latents(folder, n=512, channels=64, side=4, classes=10):
    """A folder as `dit.py latents` writes it, of normal numbers"""
    rng = torch.Generator().manual_seed(0)
    latents, mirrored = torch.randn(2, n, channels, side, side, generator=rng)
    tensors = {"latents": latents.clone(), "latents_flip": mirrored.clone(),
               "labels": torch.arange(n) % classes}
    save_file(tensors, folder / "latents_rank00_shard000.safetensors")
    stats = {"mean": torch.zeros(1, channels, 1, 1), "std": torch.ones(1, channels, 1, 1)}
    torch.save(stats, folder / "latents_stats.pt")
    (folder / "classes.json").write_text(json.dumps([str(i) for i in range(classes)]))
    about = {"tokenizer": "..", "encoder": "0", "data": "random", "split": "train", "image": 64,
             "precision": "fp32", "posterior": "deterministic", "shape": [channels, side, side]}
    (folder / "latents.json").write_text(json.dumps(about))


# ---------------------------------------------------------------- parts, in a process of their own
def write_jpegs(folder, side, n=64):
    """Smooth random images as class folders"""
    rng = np.random.default_rng(0)
    for i in range(n):
        coarse = Image.fromarray(rng.integers(256, size=(9, 9, 3), dtype=np.uint8))
        path = folder / "val" / str(i % 4) / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse.resize((side, side), Image.BICUBIC).save(path, quality=90)


def time_views(folder, image, local_image, n_local, patch, batch, seconds):
    """-> images per second of the training batches, without text"""
    import data
    batches_class = getattr(data, "TrainBatches", None) or data.Steps       # the new, the old name
    source = data.open_data(str(folder), "val", whole=True)
    batches = batches_class(source, None, seed=0, batch=batch, batch_ssl=batch, batch_rec=batch,
                            clip=False, ssl=True, rec=True, image=image, local_image=local_image,
                            n_local=n_local, patch=patch)
    return batch / median_seconds(lambda step: batches[step], seconds)


def time_inception(batch, seconds):
    from vtp_min.fid import Inception
    torch.manual_seed(0)
    model = Inception()
    for name, x in model.state_dict().items():     # weights through which a signal survives
        if name.endswith("conv.weight"):
            torch.nn.init.kaiming_normal_(x, nonlinearity="relu")
    images = torch.randint(256, (batch, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        return batch / median_seconds(lambda step: model(images), seconds)


def median_seconds(call, seconds):
    """call(step) for about this long, at least three times after the first -> median duration"""
    times = []
    while len(times) < 4 or sum(times[1:]) < seconds:
        start = time.perf_counter()
        call(len(times))
        times.append(time.perf_counter() - start)
    return median(times[1:])


def part(name, variant, seconds):
    """The process of one part, in the folder of the version: print {row: images per second}"""
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
    command = [sys.executable, __file__, "--part", name, variant, str(seconds)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed in {tree}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


# ---------------------------------------------------------------- the measurements
def measure(args, name, variant, precision, latents):
    """One process -> {row: number}"""
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
    if name.startswith("dit"):                     # its data are a table of random numbers
        del rows[f"{name} {precision}, images/s without data"]
    return rows


def take_turns(args, name, precision, latents):
    """-> {row: {variant: [number of each round]}}"""
    rows = {}
    for number in range(args.rounds):
        for variant in VARIANTS:
            for row, value in measure(args, name, variant, precision, latents).items():
                rows.setdefault(row, {v: [] for v in VARIANTS})[variant].append(value)
            print(f"{time.strftime('%H:%M:%S')} {name} {precision}: round {number + 1} of "
                  f"{args.rounds}, {variant}", flush=True)
    return rows


def ratios(samples, variant):
    """To the old version: of the medians, then the lowest and highest of a round"""
    each = [x / y for x, y in zip(samples[variant], samples["old"])]
    return median(samples[variant]) / median(samples["old"]), min(each), max(each)


def table(rows):
    """{row: {variant: numbers}} -> lines: medians, and their ranges in brackets"""
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
    p.add_argument("what", nargs="*", help=f"some of {', '.join(MEASUREMENTS)}; default: all")
    p.add_argument("--rounds", type=int, default=5, help="processes of each version")
    p.add_argument("--nano-steps", type=int, default=120, help="length of a run of nano")
    p.add_argument("--s-steps", type=int, default=9, help="length of a run of S")
    p.add_argument("--s-batch", type=int, default=4, help="images per step of S, for all losses")
    p.add_argument("--s-locals", type=int, default=8, help="local crops per image of S")
    p.add_argument("--dit-steps", type=int, default=240, help="length of a run of dit-nano")
    p.add_argument("--dit-b-steps", type=int, default=24, help="length of a run of dit-B")
    p.add_argument("--seconds", type=float, default=10, help="length of views and inception")
    p.add_argument("--precision", action="append", choices=["fp32", "bf16"],
                   help="repeatable; default: fp32, and bf16 if the hardware multiplies it")
    p.add_argument("--out", type=Path, default=ROOT / "study/speed.json",
                   help="rows of the same name are replaced; the table goes beside it, as .txt")
    args = p.parse_args()
    unknown = set(args.what) - set(MEASUREMENTS)
    if unknown:
        p.error(f"{', '.join(sorted(unknown))}: wanted some of {', '.join(MEASUREMENTS)}")
    if args.rounds < 1:
        p.error(f"--rounds {args.rounds}: wanted 1 or more")
    return args


def main():
    args = parse()
    sys.path.insert(0, str(ROOT))
    from vtp_min.device import multiplies_bf16
    precisions = args.precision or ["fp32"]
    if not args.precision and multiplies_bf16(torch.device("cpu")):
        precisions.append("bf16")
    known = json.loads(args.out.read_text()) if args.out.exists() else {"rows": {}}
    with tempfile.TemporaryDirectory() as latents:
        write_random_latents(Path(latents))
        for name in args.what or MEASUREMENTS:
            # views have no matrix products, and Inception runs in float32 only
            for precision in ["fp32"] if name in ("views", "inception") else precisions:
                known["rows"] |= take_turns(args, name, precision, latents)
                known["machine"] = machine()
                text = "\n".join([known["machine"], *table(known["rows"])]) + "\n"
                args.out.write_text(json.dumps(known, indent=1) + "\n")
                args.out.with_suffix(".txt").write_text(text)
    print(text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        part(sys.argv[2], sys.argv[3], float(sys.argv[4]))
    else:
        main()
