"""Go on from the weights of a run: is it better than a training from scratch, and what is lost?

    python study/finetune.py --all DIR/imagenet64 --ten DIR/imagenet64-10 --cifar DIR/cifar10-5k \\
        --jobs 2

The first training sees the classes of --all that are not in --ten: of imagenet64 90 of 100. Its run
is continued on other images, with `train.py --init`: on the classes of --ten, and on CIFAR-10.

    unchanged     the first training, measured on the new images without any step on them
    scratch       the new images alone, from random weights, with nano's rate of 5e-4
    init          from the weights of the first training, with the default rate of --init
    init-fast     the same, with 5e-4

The last three take the same number of steps. The numbers are those of the new images (linear probe,
zero-shot, PSNR), and for init and init-fast also the zero-shot accuracy on the first images, which
shows what the weights have lost there.

A cell is one training (none for unchanged) with its measurements; its commands can also be typed by
hand. A finished cell is one line of OUT/results.jsonl. After an interruption, the same command
continues and skips finished cells. Cells of a seed that need the first training wait for it. The
command prints a table of the finished cells, also with --list.
"""
import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from vtp_min.config import atomic_write                                    # noqa: E402
from vtp_min.device import choose_precision                                # noqa: E402

# nano's defaults, with the image, patch and batch of the photographs of study.py
SHAPE = "--size nano --image 32 --patch 8"
RECIPE = "--batch 64 --batch-ssl 32 --batch-rec 64 --perceptual none"
# {kind: flags of train.py; None: no training}
KINDS = {"scratch": SHAPE, "init": "--init FIRST", "init-fast": "--init FIRST --lr 5e-4",
         "unchanged": None}
TARGETS = {"ten": "TEN", "cifar": "CIFAR"}
SEEDS = 0, 1, 2

stop_requested = threading.Event()
results_lock = threading.Lock()


@dataclass(frozen=True)
class Cell:
    kind: str                         # "first", or a key of KINDS
    target: str                       # "ninety", or a key of TARGETS
    seed: int

    @property
    def name(self):
        return f"{self.kind}-{self.target}-seed{self.seed}"


def all_cells():
    """The first trainings come first, because others wait for them."""
    cells = [Cell("first", "ninety", seed) for seed in SEEDS]
    return cells + [Cell(kind, target, seed) for seed in SEEDS for target in TARGETS
                    for kind in KINDS]


def stages(cell, args):
    """-> {stage: command} of a cell, in the order in which they run

    RUN is the folder of the cell, FIRST the run of the first training with the same seed, and
    NINETY, TEN and CIFAR are folders of images.
    """
    common = f"{RECIPE} --seed {cell.seed} --precision {args.precision}"
    limit = f"--limit {args.limit}"
    if cell.kind == "first":
        data, steps, flags = "NINETY", args.first_steps, SHAPE
    else:
        data, steps, flags = TARGETS[cell.target], args.steps, KINDS[cell.kind]
    run = "FIRST" if cell.kind == "unchanged" else "RUN/tokenizer"
    commands = {
        "train": f"train.py {flags} --data {data} --out {run} --steps {steps} {common}",
        "probe": f"eval.py probe {run} --out RUN --data {data} {limit} --train-limit {args.probe}",
        "zeroshot": f"eval.py zeroshot {run} --out RUN --data {data} {limit}",
        "recon": f"eval.py recon {run} --out RUN --data {data} {limit} --perceptual none",
    }
    if cell.kind == "unchanged":
        del commands["train"]
    if cell.kind.startswith("init"):
        commands["zeroshot-first"] = f"eval.py zeroshot {run} --out RUN/first --data NINETY {limit}"
    return commands


# ---------------------------------------------------------------- execution
def run_cell(cell, args):
    """Run the stages of a cell that are not finished, then write its line to results.jsonl."""
    folder = args.work / cell.name
    (folder / "first").mkdir(parents=True, exist_ok=True)
    done = (read_lines(folder / "done.json") or [{}])[0]       # {stage: [seconds, CPU seconds]}
    for stage, command in stages(cell, args).items():
        if stage in done:
            continue
        print(f"{time.strftime('%H:%M')} {cell.name}: {stage}", flush=True)
        start = time.time()
        status, cpu = run_command(command, cell, folder, args)
        if stop_requested.is_set():
            raise RuntimeError("stopped")
        if status:
            output = (folder / "out.txt").read_text()[-1500:]
            raise RuntimeError(f"{stage} failed (exit status {status}): python {command}\n{output}")
        done[stage] = [round(time.time() - start, 1), round(cpu, 1)]
        atomic_write(folder / "done.json", lambda path: path.write_text(json.dumps(done)))
    save_result(cell, folder, done, args)


def run_command(command, cell, folder, args):
    """Run one command in a process of its own -> exit status, CPU time in seconds"""
    paths = {"RUN": folder, "FIRST": first_run(cell, args), "NINETY": args.work / "ninety",
             "TEN": args.ten, "CIFAR": args.cifar}
    words = [replace_path(word, paths) for word in shlex.split(command)]
    with open(folder / "out.txt", "a") as out:
        # in a new session, so that Ctrl-C in the terminal does not interrupt the command directly
        process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=out, stderr=out,
                                   start_new_session=True,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"})
        # os.wait4 also returns the CPU time; its first value is 0 while the process is running
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            if stop_requested.wait(0.5):                       # on SIGTERM, train.py saves
                os.kill(process.pid, signal.SIGTERM)
                time.sleep(1)
    _, status, usage = ended
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_utime + usage.ru_stime


def replace_path(word, paths):
    name, slash, rest = word.partition("/")
    return f"{paths[name]}{slash}{rest}" if name in paths else word


def first_run(cell, args):
    return args.work / Cell("first", "ninety", cell.seed).name / "tokenizer"


def save_result(cell, folder, done, args):
    """Append the line of a finished cell, and delete its large files. Of a first training the
    weights stay, because other cells start from them."""
    metrics = read_lines(folder / "metrics.jsonl")
    first = read_lines(folder / "first" / "metrics.jsonl")
    log = read_lines(folder / "tokenizer" / "log.jsonl")
    line = {"cell": cell.name, "kind": cell.kind, "target": cell.target, "seed": cell.seed,
            "constants": args.constants, "machine": args.machine,
            "metrics": {m["name"]: m["value"] for m in metrics},
            "first_data": {m["name"]: m["value"] for m in first},
            "log": [log[0], log[-1]] if log else [],
            "seconds": {stage: seconds for stage, (seconds, _) in done.items()},
            "cpu_seconds": {stage: cpu for stage, (_, cpu) in done.items()},
            "protocol": {m["name"]: shorten(m["protocol"], args) for m in [*first, *metrics]},
            "commands": {stage: f"python {command}" for stage, command in
                         stages(cell, args).items()}}
    with results_lock, open(args.out / "results.jsonl", "a") as f:
        f.write(json.dumps(line) + "\n")
    for name in ("last.pt", "previous.pt"):
        (folder / "tokenizer" / name).unlink(missing_ok=True)
    if cell.kind != "first":
        shutil.rmtree(folder)


def shorten(protocol, args):
    """Replace the paths of this machine by names."""
    for path, name in ((args.work, "WORK"), (args.ten, "TEN"), (args.cifar, "CIFAR")):
        protocol = protocol.replace(str(path), name)
    return protocol


def read_lines(path):
    """JSON Lines file -> list; [] if the file does not exist"""
    return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []


# ---------------------------------------------------------------- all cells
def link_ninety(args):
    """Create a data folder with links to the classes of --all that are not in --ten."""
    ten = {path.name for path in Path(args.ten, "train").iterdir()}
    for split in ("train", "val"):
        folder = args.work / "ninety" / split
        folder.mkdir(parents=True, exist_ok=True)
        for source in Path(args.all, split).iterdir():
            link = folder / source.name
            if source.is_dir() and source.name not in ten and not link.exists():
                link.symlink_to(source)


def print_table(args):
    rows = read_lines(args.out / "results.jsonl")
    print("\n".join(table(rows)), flush=True)


def table(rows):
    """Lines of results.jsonl -> lines of a Markdown table: mean and range over the seeds"""
    lines = ["| images | weights | PSNR | probe of latents | probe of features | zero-shot | "
             "zero-shot on the first images |", "|---|---|---|---|---|---|---|"]
    for target in ("ninety", *TARGETS):
        for kind in ("first", "unchanged", "scratch", "init", "init-fast"):
            found = [row for row in rows if (row["kind"], row["target"]) == (kind, target)]
            if not found:
                continue
            cells = [mean_and_range([row["metrics"]["PSNR"] for row in found])]
            for name in ("linear probe latent", "linear probe full", "zero-shot top1"):
                cells.append(mean_and_range([100 * row["metrics"][name] for row in found]))
            first = [100 * row["first_data"]["zero-shot top1"] for row in found
                     if row["first_data"]]
            cells.append(mean_and_range(first) if first else "")
            lines.append(f"| {target} | {kind} | {' | '.join(cells)} |")
    return lines


def mean_and_range(values):
    return f"{sum(values) / len(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def complete(args):
    """Check the paths, and add out, work, precision, constants and machine to args."""
    for flag in ("all", "ten", "cifar"):
        folder = Path(getattr(args, flag)).resolve()
        if not ((folder / "train").is_dir() and (folder / "val").is_dir()):
            raise ValueError(f"--{flag} {folder} has no folders train/ and val/; wanted class "
                             f"folders DIR/train/CLASS/x.jpg and DIR/val/CLASS/y.jpg")
        setattr(args, flag, folder)
    args.out = Path(args.out).resolve()
    args.work = ROOT / "runs" / "finetune" / "-".join(args.out.parts[-2:])
    args.precision = args.precision or choose_precision(torch.device("cpu"))
    args.machine = f"cpu {torch.backends.cpu.get_cpu_capability()}"
    args.constants = {"shape": SHAPE, "recipe": RECIPE, "first_steps": args.first_steps,
                      "steps": args.steps, "limit": args.limit, "probe": args.probe,
                      "precision": args.precision}
    rows = read_lines(args.out / "results.jsonl")
    others = [row["cell"] for row in rows if row["constants"] != args.constants]
    if others:
        raise ValueError(f"{args.out}/results.jsonl has cells with other constants "
                         f"({', '.join(others)}); use another --out")
    return {row["cell"]: row for row in rows}


def main(args):
    rows = complete(args)
    cells = [cell for cell in all_cells() if fnmatch(cell.name, args.only)]
    left = [cell for cell in cells if cell.name not in rows]
    for cell in cells:
        state = "left"
        if cell.name in rows:
            state = f"finished in {sum(rows[cell.name]['seconds'].values()) / 60:.0f} min"
        print(f"{cell.name:28s} {state}")
    print(f"{len(left)} of {len(cells)} cells left", flush=True)
    print_table(args)
    if args.list:
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    link_ninety(args)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stop_requested.set())

    # {seed: set when its first training has ended}
    ended = {seed: threading.Event() for seed in SEEDS}
    for seed in SEEDS:
        if Cell("first", "ninety", seed) not in left:
            ended[seed].set()
    unfinished = list(left)

    def run_one(cell):
        try:
            if cell.kind not in ("first", "scratch"):
                ended[cell.seed].wait()
                if not (first_run(cell, args) / "model.safetensors").exists():
                    raise RuntimeError(f"{first_run(cell, args)} has no weights; run the cell "
                                       f"first-ninety-seed{cell.seed} (delete its line in "
                                       f"results.jsonl if its weights were deleted)")
            if not stop_requested.is_set():
                run_cell(cell, args)
                unfinished.remove(cell)
                print(f"{time.strftime('%H:%M')} {cell.name}: done; {len(unfinished)} cells left",
                      flush=True)
        except Exception as problem:              # concerns only this cell; the others continue
            print(f"{cell.name}: {problem}", flush=True)
        finally:
            if cell.kind == "first":
                ended[cell.seed].set()

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(run_one, left))
    if unfinished:
        print(f"{len(unfinished)} cells are not finished; the same command continues")
        return 1
    print_table(args)
    print(f"all results are in {args.out / 'results.jsonl'}")
    return 0


def parser():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--all", required=True, help="imagenet64: train/ and val/ with class folders")
    p.add_argument("--ten", required=True, help="imagenet64-10: some of the classes of --all")
    p.add_argument("--cifar", required=True, help="cifar10-5k: class folders")
    p.add_argument("--jobs", type=int, default=1,
                   help="number of cells that run at the same time, with one thread each")
    p.add_argument("--only", default="*", metavar="GLOB", help="only cells whose name matches")
    p.add_argument("--list", action="store_true", help="print the cells and their state, and exit")
    p.add_argument("--first-steps", type=int, default=1000,
                   help="steps of the first training (default %(default)s)")
    p.add_argument("--steps", type=int, default=200,
                   help="steps on the new images (default %(default)s)")
    p.add_argument("--limit", type=int, default=1000,
                   help="validation images of each measure (default %(default)s)")
    p.add_argument("--probe", type=int, default=5000,
                   help="training images of the probes (default %(default)s)")
    p.add_argument("--precision", choices=["fp32", "bf16"],
                   help="of the trainings (default: bf16 if the hardware multiplies it, else fp32)")
    p.add_argument("--out", default=ROOT / "study" / "finetune",
                   help="folder of results.jsonl (default study/finetune)")
    return p


if __name__ == "__main__":
    try:
        status = main(parser().parse_args())
    except (ValueError, OSError) as problem:
        raise SystemExit(f"finetune.py: {problem}") from None
    raise SystemExit(status)
