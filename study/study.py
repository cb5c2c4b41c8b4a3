"""Test the paper's findings at a small scale, on two CPU cores.   VTP Sec. 4, Fig. 4 to 7

Many small tokenizers are trained, and the same small DiT is trained on the latents of each.

    python study/study.py --quick --jobs 2 --out runs/quick    questions 1 to 3 in part, on the
                                                               built-in shapes; about 20 minutes
    python study/study.py --data IMAGENET64 --jobs 2           all questions, on photographs at
                                                               32 px; --list shows cells and times
    python study/figures.py                                    study/results.jsonl -> figures and
                                                               tables of study/README.md

A cell is one tokenizer with all of its measurements. It is identified by its objective, training
steps, size, decoder, number of training images, DiT steps and seed. `stages` returns the commands
of a cell, which can also be typed by hand: commands of train.py, eval.py and dit.py. A finished
cell is one line of results.jsonl and a shortened training log in logs/; its large files are
deleted. After an interruption, the same command continues and skips finished cells.
"""
import argparse
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from vtp_min.config import atomic_write                                    # noqa: E402
from vtp_min.extras import weights                                         # noqa: E402

# VTP Sec. 4.3: the loss weights of CLIP and self-distillation are 0 or 1, and w_rec is 0.1
OBJECTIVES = {"AE": "--w-clip 0 --w-ssl 0", "CLIP+AE": "--w-ssl 0", "SSL+AE": "--w-clip 0",
              "ALL": ""}

# ---------------------------------------------------------------- constants of all cells
IMAGE_FLAGS = "--image 32 --patch 8 --latent-dim 64"
BATCH_FLAGS = "--batch 64 --batch-ssl 32 --batch-rec 64"
RECIPE_FLAGS = ("--lr 5e-4 --set ema=0.98 --set locals=2 --set prototypes=256 "
                "--set head_hidden=256 --set head_bottleneck=64 --set teacher_temp=0.04 "
                "--set drop_ssl=0")
ADAM_FLAGS = "--batch 64 --lr 1e-3"
# {name: (value, value with --quick, meaning and source)}; the names are stored in results.jsonl
CONSTANTS = {
    "picture": (IMAGE_FLAGS, IMAGE_FLAGS, "ours: 16 latents; a latent has a third as many numbers "
                                          "as its patch, and is narrower than the DiT"),
    "batch": (BATCH_FLAGS, BATCH_FLAGS, "ours; AE and ALL have the same images per step"),
    "recipe": (RECIPE_FLAGS, RECIPE_FLAGS, "nano's defaults; given explicitly, because larger "
                                           "sizes have other defaults"),
    "base": (300, 250, "steps of the shortest training; others are 3 and 10 times as long (ours)"),
    "decoder": (1600, 800, "additional steps of each decoder on its frozen latents (ours)"),
    "adam": (ADAM_FLAGS, ADAM_FLAGS, "for decoder and DiT: the default of stage 2; also good for "
                                     "a DiT in our trials"),
    "latents": (50_000, 10_000, "number of latents; photographs: the whole training set"),
    "dit": (4000, 2000, "steps of the DiT; with fewer, samples are blobs (ours)"),
    "samples": (2500, 2100, "number of samples; with fewer, a distance is mostly bias (ours). The "
                            "same number of validation images, evenly spaced, is used for "
                            "reconstruction, probes and zero-shot"),
    "probe": (10_000, 5000, "training images for the probes and for the statistics that samples "
                            "are compared with; the default of eval.py"),
    "judged": (20_000, 5000, "training images for the classifier and for FD-classifier (ours)"),
    "judge": (2400, 600, "training steps of the classifier; the default of eval.py"),
}
# {name in commands: file with the statistics of real images}; the first cell writes them
STATISTICS = {"REAL": "real.npz", "HALF": "half.npz"}
# rough durations of one step of nano on one core, in seconds
SECONDS = {"AE": 0.12, "CLIP+AE": 0.17, "SSL+AE": 0.21, "ALL": 0.25, "DiT": 0.085}
# and of all stages after the training of the tokenizer: (in full, with --quick)
OTHER_SECONDS = 840, 330


@dataclass(frozen=True)
class Cell:
    """One tokenizer and its measurements; the fields are stored in results.jsonl."""
    questions: str                    # numbers of the questions in study/README.md that it serves
    objective: str
    steps: int                        # training steps of the tokenizer
    size: str = "nano"                # of the trunk; pico, nano and micro have equal text towers
    decoder: str = ""                 # size of the decoder; "": the same as the trunk
    pictures: int = 0                 # number of training images; 0: all
    dit: int = 0                      # training steps of the DiT; 0: those of CONSTANTS
    seed: int = 0

    @property
    def name(self):
        """The objective and the steps, then the fields that differ from their defaults"""
        size = "" if self.size == "nano" else self.size
        special = {"": size, "decoder_": self.decoder, "n": self.pictures, "dit": self.dit,
                   "seed": self.seed}
        parts = [f"{word}{value}" for word, value in special.items() if value]
        return "-".join([self.objective, str(self.steps), *parts])


def cells(quick):
    """-> list of all cells, the most informative ones first"""
    S = CONSTANTS["base"][quick]
    if quick:
        return [Cell("1", "AE", 3 * S), Cell("3", "ALL", S), Cell("123", "AE", S),
                Cell("2", "CLIP+AE", S), Cell("2", "SSL+AE", S)]
    found = []
    for steps in (3 * S, 10 * S, S):
        for objective in ("AE", "ALL", "CLIP+AE", "SSL+AE"):
            found.append(Cell("1234", objective, steps))
    for objective in OBJECTIVES:                                      # longer training of the DiT
        found.append(Cell("23", objective, 10 * S, dit=3 * CONSTANTS["dit"][quick]))
    for n in (100, 1000, 10_000):
        for objective in ("AE", "ALL"):
            found.append(Cell("6", objective, 3 * S, pictures=n))
    for size in ("pico", "micro"):
        for objective in ("AE", "ALL"):
            found.append(Cell("5", objective, 3 * S, size=size, decoder="nano"))
    for size in ("pico", "micro"):
        found.append(Cell("5", "ALL", 3 * S, decoder=size))
    for seed in (1, 2):
        for objective in OBJECTIVES:
            found.append(Cell("1234", objective, 3 * S, seed=seed))
    for objective in ("AE", "ALL"):
        found.append(Cell("1234", objective, 10 * S, seed=1))
    return found


# ---------------------------------------------------------------- the commands of a cell
def stages(cell, data, quick, existing=(), also=""):
    """-> {stage: command}, in the order of the protocol in study/README.md

    existing  names in STATISTICS whose files exist already
    also      additional flags for the training of the tokenizer
    In a command, DATA is replaced by the data folder, RUN by the folder of the cell, and REAL and
    HALF by the files of STATISTICS.
    """
    t = {name: values[quick] for name, values in CONSTANTS.items()}
    shapes = data.startswith("shapes")
    tokenizer_data = "RUN/pictures" if cell.pictures else "DATA"
    decoder = f"--set decoder={cell.decoder}" if cell.decoder else ""
    measure = f"--data DATA --out RUN --limit {t['samples']}"
    classifier = (f"--features classifier --train-limit {t['judged']} "
                  f"--set judge_steps={t['judge']}")
    recon_features = classifier if shapes else "--features squeezenet"
    reference = {}                                        # {name in STATISTICS: flags}
    for name in STATISTICS:
        if name in existing:
            reference[name] = f"--out RUN --reference {name}"
        else:                                             # this command writes the file
            reference[name] = f"{measure} --train-limit {t['probe']} --set save_real={name}"

    commands = {
        "tokenizer": f"train.py --out RUN/tokenizer --data {tokenizer_data} --size {cell.size} "
                     f"{decoder} {t['picture']} {t['batch']} {t['recipe']} "
                     f"{OBJECTIVES[cell.objective]} --perceptual none --steps {cell.steps} "
                     f"--seed {cell.seed} {also}",
        "decoder": f"train.py --stage 2 --init RUN/tokenizer --out RUN/decoder --data DATA "
                   f"--w-gan 0 --perceptual none {t['adam']} --set ema_decoder=0.99 "
                   f"--steps {t['decoder']}",
        "probe": f"eval.py probe RUN/tokenizer {measure} --train-limit {t['probe']}",
        "zeroshot": f"eval.py zeroshot RUN/tokenizer {measure}",
        "recon": f"eval.py recon RUN/decoder --perceptual none {measure} {recon_features}",
        "latents": f"dit.py latents RUN/tokenizer --data DATA --n {t['latents']} "
                   f"--out RUN/latents --fresh",
        "dit": f"dit.py train RUN/latents --out RUN/dit --size nano "
               f"--steps {cell.dit or t['dit']} {t['adam']} --warmup 50 --seed 0",
        "sample": f"dit.py sample RUN/dit --tokenizer RUN/decoder --out RUN/samples "
                  f"--n {t['samples']} --points 50 --seed 0 --fresh",
        "fid": f"eval.py fid RUN/samples --features squeezenet {reference['REAL']}",
        "halved": f"eval.py fid RUN/samples --features squeezenet --set halve=true "
                  f"{reference['HALF']}",
        "judge": f"eval.py fid RUN/samples {measure} {classifier}",
    }
    omitted = []
    if cell.objective not in ("CLIP+AE", "ALL"):          # trained without captions
        omitted.append("zeroshot")
    if shapes:                                            # SqueezeNet was trained on photographs
        omitted += ["fid", "halved"]
    return {stage: " ".join(command.split()) for stage, command in commands.items()
            if stage not in omitted}


# ---------------------------------------------------------------- execution of a cell
stop_requested = threading.Event()
shared_output_lock = threading.Lock()       # held while a command writes a file for all cells


def run_cell(cell, args):
    """Run the stages of a cell that are not finished, then write its line to results.jsonl."""
    folder = args.work / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        # The commands inherit the lock, so a command keeps it even if this process is killed.
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"skipped, because another study.py, or a command that it started, "
                               f"is using {folder}") from None
        # another study.py may have finished the cell since this one started
        if cell.name in {r["cell"] for r in finished_rows(args)}:
            return
        if cell.pictures:
            link_images(args.data, folder / "pictures", cell.pictures)
        # {stage: result of run_command}
        done = (read_lines(folder / "done.json") or [{}])[0]
        for stage, command in stages(cell, args.data, args.quick).items():
            if done.get(stage, {}).get("exit") == 0:
                continue
            file = shared_output(command, args)
            writes_shared_file = file and not file.exists()
            with shared_output_lock if writes_shared_file else nullcontext():
                done[stage] = run_stage(cell, stage, args, folder, lock, done.get(stage, {}))
            atomic_write(folder / "done.json", lambda path: path.write_text(json.dumps(done)))
            if done[stage]["exit"]:
                raise RuntimeError(failure(stage, done[stage], folder))
        save_results(cell, folder, done, args)


def shared_output(command, args):
    """-> the file of this command that all cells share: statistics of real images, or the
    classifier; None if there is none. The first cell writes it, and the others read it."""
    for name, file in STATISTICS.items():
        if name in re.split("[ =]", command):
            return args.work / file
    return args.judge if "classifier" in command else None


def run_stage(cell, stage, args, folder, lock, before):
    """Run the command of one stage, with the shared files that exist -> result of run_command"""
    existing = [name for name, file in STATISTICS.items() if (args.work / file).exists()]
    command = stages(cell, args.data, args.quick, existing, args.also)[stage]
    own = folder / "judge.safetensors"
    if args.judge.exists() and not own.exists():
        os.link(args.judge, own)
    result = run_command(cell, stage, command, args, folder, lock, before)
    if own.exists() and not args.judge.exists():
        os.link(own, args.judge)                          # a link is atomic, a copy is not
    return result


def run_command(cell, stage, command, args, folder, lock, before):
    """Run one command in a process of its own.

    before  result of the same command before an interruption, or {}; its times are added
    -> {"command": text, "exit": exit status, "seconds": duration, "cpu": CPU time in seconds}
    """
    # one write with its newline, because cells run at the same time
    print(f"{time.strftime('%H:%M')} {cell.name}: {stage}\n", end="", flush=True)
    paths = {"DATA": args.data, "RUN": os.path.relpath(folder, ROOT)}
    for name, file in STATISTICS.items():
        paths[name] = os.path.relpath(args.work / file, ROOT)

    def path_of(match):
        return match[1] + paths[match[2]]

    pattern = rf"^((?:\w+=)?)({'|'.join(paths)})\b"       # RUN/dit, or save_real=REAL
    words = [re.sub(pattern, path_of, word) for word in shlex.split(command)]
    with open(folder / "out.txt", "a") as out:
        start = time.time()
        # in a new session, so that Ctrl-C in the terminal does not interrupt the command directly
        process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=out, stderr=out,
                                   pass_fds=[lock.fileno()], start_new_session=True,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"})
        # os.wait4 also returns the CPU time; its first value is 0 while the process is running
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            if stop_requested.wait(0.5):                  # on SIGTERM, train.py and dit.py save
                os.kill(process.pid, signal.SIGTERM)
                time.sleep(1)
    _, status, usage = ended
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.time() - start + before.get("seconds", 0)
    cpu = usage.ru_utime + usage.ru_stime + before.get("cpu", 0)
    return {"command": f"python {command}", "exit": process.returncode,
            "seconds": round(seconds, 1), "cpu": round(cpu, 1)}


def failure(stage, result, folder):
    """-> error message for a stage whose exit status is not 0"""
    if stop_requested.is_set():
        return "stopped"
    output = (folder / "out.txt").read_text()[-1500:]
    return f"{stage} failed (exit status {result['exit']}): {result['command']}\n{output}"


def link_images(data, out, n):
    """Create a data folder with links to n training images, evenly spaced among the files of all
    classes, and to the complete val/ and classnames.txt."""
    files = sorted(p.relative_to(data) for p in Path(data, "train").glob("*/*"))
    chosen = [files[k * len(files) // n] for k in range(n)]
    for path in [*chosen, Path("val"), Path("classnames.txt")]:
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        if not (out / path).exists() and Path(data, path).exists():
            (out / path).symlink_to(Path(data, path).resolve())


def save_results(cell, folder, done, args):
    """Write the line of a finished cell to results.jsonl and its shortened log to logs/, and delete
    its large files. An image of its samples is kept in logs/ if they are not photographs."""
    # the last metric of each name
    measured = {m["name"]: m for m in read_lines(folder / "metrics.jsonl")}
    logs = {stage: read_lines(folder / stage / "log.jsonl")
            for stage in ("tokenizer", "decoder", "dit")}
    line = {"cell": cell.name, **asdict(cell), "data": args.data_name, "quick": args.quick,
            "constants": args.constants,
            "metrics": {name: m["value"] for name, m in measured.items()},
            "gflops_a_step": {stage: log[0].get("gflops") for stage, log in logs.items()}}
    for name, key in (("seconds", "seconds"), ("cpu_seconds", "cpu"), ("commands", "command")):
        line[name] = {stage: result[key] for stage, result in done.items()}
    line["protocol"] = {name: m["protocol"].replace(args.data, "DATA")
                        for name, m in measured.items()}

    (args.out / "logs").mkdir(exist_ok=True)
    log_name = f"{args.prefix}-{cell.name}"
    text = "".join(json.dumps(x) + "\n" for x in shorten_logs(logs))
    (args.out / "logs" / f"{log_name}.jsonl").write_text(text)
    grid = folder / "samples" / "grid.png"
    shutil.copy(grid, folder)
    if args.data.startswith("shapes"):
        shutil.copy(grid, args.out / "logs" / f"{log_name}.png")
    with open(args.out / "results.jsonl", "a") as f:
        f.write(json.dumps(line) + "\n")
    for large in ("tokenizer", "decoder", "latents", "dit", "samples", "pictures"):
        shutil.rmtree(folder / large, ignore_errors=True)
    for name in ("judge.safetensors", "done.json", "metrics.jsonl"):
        (folder / name).unlink(missing_ok=True)


def shorten_logs(logs):
    """logs {stage: lines of its log} -> at most 20, 5 and 12 lines of them, evenly spaced"""
    for (stage, log), n in zip(logs.items(), (20, 5, 12)):
        for k in range(min(n, len(log))):
            yield {"stage": stage} | log[k * (len(log) - 1) // max(n - 1, 1)]


def read_lines(path):
    """JSON Lines file -> list; [] if the file does not exist"""
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError:
        raise ValueError(f"{path} has an incomplete line (was the disk full?); delete that line, "
                         f"and start again to repeat its cell") from None


# ---------------------------------------------------------------- all cells
def finished_rows(args):
    """-> rows of results.jsonl with the same data and the same --quick"""
    key = args.data_name, args.quick
    return [r for r in read_lines(args.out / "results.jsonl") if (r["data"], r["quick"]) == key]


def normalize_flags(constants):
    """Older results have --head-hidden 256 instead of --set head_hidden=256; make both equal.

    constants {name: value} or None -> {name: text}
    """
    def normalize(text):
        return str(text).replace("--set ", "--").replace("=", " ").replace("_", "-")
    return {name: normalize(value) for name, value in (constants or {}).items()}


def check_results(args):
    """ValueError if results.jsonl has cells with other images, constants or --also, because such
    results must not be compared"""
    wanted = normalize_flags(args.constants)
    others = [r["cell"] for r in finished_rows(args)
              if normalize_flags(r.get("constants")) != wanted]
    if others:
        raise ValueError(f"{args.out / 'results.jsonl'} has cells with other images, constants or "
                         f"--also ({', '.join(others)}; see their 'constants'); use another --out")


def check_work_folder(args):
    """ValueError if unfinished cells in the work folder have other images, constants or --also"""
    settings = {"data": args.data} | args.constants
    path = args.work / "about.json"
    if (read_lines(path) or [settings])[0] != settings:
        raise ValueError(f"{args.work} was started with other images, constants or --also (see its "
                         f"about.json); use another --out")
    path.write_text(json.dumps(settings))


def set_folders(args):
    """Add derived values to args -> True for photographs, False for the built-in shapes

    data_name          name of the data in results.jsonl
    prefix             name of the data in file names
    out                absolute path
    work               folder of the cells
    judge              file of the classifier, which all cells share
    training_pictures  number of training images; 0 for shapes, which are unlimited
    constants          values of CONSTANTS, training_pictures and --also, as stored in results.jsonl
    """
    photographs = args.data.partition(":")[0] != "shapes"
    if photographs:
        if not (Path(args.data, "train").is_dir() and Path(args.data, "val").is_dir()):
            raise ValueError(f"{args.data} has no folders train/ and val/; wanted class folders, "
                             f"such as ImageNet at 64 px: DIR/train/CLASS/x.jpg and "
                             f"DIR/val/CLASS/y.jpg")
        args.data = str(Path(args.data).resolve())
    args.data_name = Path(args.data).name if photographs else args.data
    args.prefix = args.data_name.partition(":")[0] + ("-quick" if args.quick else "")
    args.out = Path(args.out).resolve()
    name = "-".join(Path(os.path.relpath(args.out, ROOT)).parts)
    args.work = ROOT / "runs" / name / args.prefix
    args.judge = args.work / "judge.safetensors"
    args.training_pictures = sum(1 for _ in Path(args.data, "train").glob("*/*"))
    args.constants = {"training_pictures": args.training_pictures, "also": args.also}
    args.constants |= {name: str(values[args.quick]) for name, values in CONSTANTS.items()}
    return photographs


def selected_cells(args):
    """-> list of the cells that --only selects and for which there are enough training images"""
    found = [c for c in cells(args.quick) if fnmatch(c.name, args.only)]
    if not found:
        names = ", ".join(c.name for c in cells(args.quick))
        raise ValueError(f"--only {args.only!r} matches no cell; the cells are: {names}")
    possible = []
    for c in found:
        if c.pictures < max(args.training_pictures, 1):
            possible.append(c)
        else:
            print(f"{c.name:28s} questions {c.questions:5s}omitted: the training set has only "
                  f"{args.training_pictures} images")
    return possible


def expected_minutes(cell, quick):
    """-> rough duration of a cell on one core"""
    additional_dit_steps = max(cell.dit - CONSTANTS["dit"][quick], 0)
    seconds = cell.steps * SECONDS[cell.objective] + SECONDS["DiT"] * additional_dit_steps
    return (seconds + OTHER_SECONDS[quick]) / 60


def print_list(selected, left, args):
    """Print the state of each selected cell and the time for those that are left."""
    rows = {r["cell"]: r for r in finished_rows(args)}
    for c in selected:
        state = f"about {expected_minutes(c, args.quick):3.0f} min"
        if c not in left:
            missing = [stage for stage in stages(c, args.data, args.quick)
                       if stage not in rows[c.name]["commands"]]
            state = "finished"
            if missing:
                state += f" without {', '.join(missing)}; to repeat it, delete its line"
        print(f"{c.name:28s} questions {c.questions:5s}{state}")
    hours = sum(expected_minutes(c, args.quick) for c in left) / 60 / args.jobs
    print(f"{len(left)} cells left, about {hours:.1f} h with --jobs {args.jobs}", flush=True)


def main(args):
    photographs = set_folders(args)
    selected = selected_cells(args)
    check_results(args)
    done = {r["cell"] for r in finished_rows(args)}
    left = [c for c in selected if c.name not in done]
    print_list(selected, left, args)
    if args.list:
        return
    if photographs:
        weights.find("squeezenet")                # if it is missing, fail before the training
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    check_work_folder(args)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stop_requested.set())

    def run_one(cell):
        try:
            if not stop_requested.is_set():
                run_cell(cell, args)
                left.remove(cell)
                print(f"{time.strftime('%H:%M')} {cell.name}: done; {len(left)} cells left",
                      flush=True)
        except Exception as problem:              # concerns only this cell; the others continue
            text = problem if isinstance(problem, RuntimeError) else repr(problem)
            print(f"{cell.name}: {text}", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(run_one, list(left)))
    if left:
        print(f"{len(left)} cells are not finished: {', '.join(c.name for c in left)}; start the "
              f"same command again to continue")
    else:
        print(f"all results are in {args.out / 'results.jsonl'}")
    raise SystemExit(bool(left))


def parser():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true",
                   help="questions 1 to 3 only, with fewer and smaller cells")
    p.add_argument("--data", default="shapes:objects=1,size=0.6-0.9",
                   help="folder with train/ and val/, which contain class folders; default: the "
                        "built-in shapes")
    p.add_argument("--only", default="*", metavar="GLOB",
                   help="only cells whose name matches, for example 'ALL-*'")
    p.add_argument("--jobs", type=int, default=1,
                   help="number of cells that run at the same time, with one thread each. Use the "
                        "number of cores, because small models gain little from a second thread")
    p.add_argument("--list", action="store_true",
                   help="print the cells, their state and the expected time, and exit")
    p.add_argument("--also", default="", metavar="FLAGS",
                   help="additional flags of train.py for every tokenizer, for example "
                        "--also='--set heads_after_bottleneck=true'; needs another --out")
    p.add_argument("--out", default=str(ROOT / "study"),
                   help="folder of results.jsonl and logs/. Cells that are finished in one folder "
                        "are repeated in another one")
    return p


if __name__ == "__main__":
    try:
        main(parser().parse_args())
    except (ValueError, OSError) as problem:
        raise SystemExit(f"study.py: {problem}") from None
