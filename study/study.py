"""The paper's findings on two CPU cores (VTP Sec. 4, Fig. 4 to 7): many small tokenizers, and the
same small DiT on the latents of each.

    python study/study.py --quick --jobs 2 --out runs/quick    questions 1 to 3 in part, on the
                                                               built-in shapes; about 20 minutes
    python study/study.py --data IMAGENET64 --jobs 2           all questions on photographs, read at
                                                               32 px; --list shows cells and times
    python study/figures.py                                    study/results.jsonl -> figures and
                                                               tables of study/README.md

A cell is one tokenizer with everything that is measured of it: (objective, steps, size, decoder,
pictures, DiT, seed). `stages` lists the commands of a cell; they are the project's own, and each
can be typed by hand. A finished cell is one line of results.jsonl; a shortened training log goes to
logs/. After an interruption the same command continues, finished cells are skipped, and large files
are deleted when their cell is finished.
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

# paper Sec. 4.3: weights are 0 or 1, and w_rec 0.1
OBJECTIVES = {"AE": "--w-clip 0 --w-ssl 0", "CLIP+AE": "--w-ssl 0", "SSL+AE": "--w-clip 0",
              "ALL": ""}

# ---------------------------------------------------------------- what all cells have in common
PICTURE = "--image 32 --patch 8 --latent-dim 64"
BATCH = "--batch 64 --batch-ssl 32 --batch-rec 64"
RECIPE = ("--lr 5e-4 --set ema=0.98 --set locals=2 --set prototypes=256 --set head_hidden=256 "
          "--set head_bottleneck=64 --set teacher_temp=0.04 --set drop_ssl=0")
ADAM = "--batch 64 --lr 1e-3"
TABLE = {   # name: (in full, with --quick, source)
    "picture": (PICTURE, PICTURE, "ours: 16 latents, each with a third of the numbers of its patch "
                                  "and narrower than the DiT"),
    "batch": (BATCH, BATCH, "ours; AE has the same images per step as ALL"),
    "recipe": (RECIPE, RECIPE, "nano's defaults, typed because larger sizes have others"),
    "base": (300, 250, "ours: the shortest training; the others are 3 and 10 times as long"),
    "decoder": (1600, 800, "ours: further steps of every decoder on its frozen latents"),
    "adam": (ADAM, ADAM, "of decoder and DiT: stage 2's default, and tried on a DiT (ours)"),
    "latents": (50_000, 10_000, "photographs: all of the training set"),
    "dit": (4000, 2000, "ours: steps; fewer leave blobs"),
    "samples": (2500, 2100, "ours; fewer make a distance mostly bias. As many validation images, "
                            "evenly spread, are reconstructed, and judge probes and zero-shot"),
    "probe": (10_000, 5000, "training images for the probes, and for the statistics that samples "
                            "are compared with; eval.py's default"),
    "judged": (20_000, 5000, "training images of the classifier, and for FD-classifier (ours)"),
    "judge": (2400, 600, "training steps of that classifier; eval.py's default"),
}
STATISTICS = {"REAL": "real.npz", "HALF": "half.npz"}   # of real images; made by the first cell
# first estimates for nano on one core: of a step, and of all other stages (in full, with --quick)
SECONDS = {"AE": 0.12, "CLIP+AE": 0.17, "SSL+AE": 0.21, "ALL": 0.25, "DiT": 0.085}
OTHER_SECONDS = 840, 330


@dataclass(frozen=True)
class Cell:
    questions: str                    # of study/README.md, 1 to 6
    objective: str
    steps: int
    size: str = "nano"                # of the trunk; pico, nano and micro have one text tower
    decoder: str = ""                 # "": symmetric, as large as the trunk
    pictures: int = 0                 # of the training set; 0: all of them
    dit: int = 0                      # steps of the DiT; 0: those of TABLE
    seed: int = 0

    @property
    def name(self):
        """The objective and the steps, then whatever differs from the defaults above"""
        size = "" if self.size == "nano" else self.size
        special = {"": size, "decoder_": self.decoder, "n": self.pictures, "dit": self.dit,
                   "seed": self.seed}
        parts = [f"{word}{value}" for word, value in special.items() if value]
        return "-".join([self.objective, str(self.steps), *parts])


def cells(quick):
    """All cells, the most informative ones first"""
    S = TABLE["base"][quick]
    if quick:
        return [Cell("1", "AE", 3 * S), Cell("3", "ALL", S), Cell("123", "AE", S),
                Cell("2", "CLIP+AE", S), Cell("2", "SSL+AE", S)]
    found = []
    for steps in (3 * S, 10 * S, S):
        for objective in ("AE", "ALL", "CLIP+AE", "SSL+AE"):
            found.append(Cell("1234", objective, steps))
    for objective in OBJECTIVES:                                      # a longer DiT
        found.append(Cell("23", objective, 10 * S, dit=3 * TABLE["dit"][quick]))
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


# ---------------------------------------------------------------- a cell, command by command
def stages(cell, data, quick, known=(), also=""):
    """-> {stage: command}, in the order of the protocol in study/README.md

    In the commands DATA stands for the images, RUN for the cell's folder, REAL and HALF for files
    of STATISTICS. known: those of them that exist. also: further flags of the tokenizer
    """
    t = {name: values[quick] for name, values in TABLE.items()}
    shapes = data.startswith("shapes")
    pictures = "RUN/pictures" if cell.pictures else "DATA"
    decoder = f"--set decoder={cell.decoder}" if cell.decoder else ""
    measure = f"--data DATA --out RUN --limit {t['samples']}"
    judged = (f"--features classifier --train-limit {t['judged']} "
              f"--set judge_steps={t['judge']}")
    recon_features = judged if shapes else "--features squeezenet"
    reference = {}
    for place in STATISTICS:
        made_here = f"{measure} --train-limit {t['probe']} --set save_real={place}"
        reference[place] = f"--out RUN --reference {place}" if place in known else made_here

    commands = {
        "tokenizer": f"train.py --out RUN/tokenizer --data {pictures} --size {cell.size} {decoder} "
                     f"{t['picture']} {t['batch']} {t['recipe']} {OBJECTIVES[cell.objective]} "
                     f"--perceptual none --steps {cell.steps} --seed {cell.seed} {also}",
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
                  f"--n {t['samples']} --points 50 --seed 0",
        "fid": f"eval.py fid RUN/samples --features squeezenet {reference['REAL']}",
        "halved": f"eval.py fid RUN/samples --features squeezenet --set halve=true "
                  f"{reference['HALF']}",
        "judge": f"eval.py fid RUN/samples {measure} {judged}",
    }
    left_out = []
    if cell.objective not in ("CLIP+AE", "ALL"):          # trained without text
        left_out.append("zeroshot")
    if shapes:                                            # SqueezeNet knows photographs
        left_out += ["fid", "halved"]
    return {stage: " ".join(command.split()) for stage, command in commands.items()
            if stage not in left_out}


# ---------------------------------------------------------------- work on a cell
stop_requested = threading.Event()
shared_file = threading.Lock()              # held while a file for all cells is made


def work(cell, args):
    """Run the stages of a cell that are not finished; its line goes to results.jsonl"""
    folder = args.work / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        # the commands hold the lock too: one that outlives its driver continues alone
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"another driver, or a command of one, is working on it ({folder}); "
                               f"skipped") from None
        if cell.name in {r["cell"] for r in finished(args)}:     # by another driver, meanwhile
            return
        if cell.pictures:
            link_pictures(args.data, folder / "pictures", cell.pictures)
        # {stage: its command, exit status, seconds of all its parts}
        done = (lines(folder / "done.json") or [{}])[0]
        for stage, command in stages(cell, args.data, args.quick).items():
            if done.get(stage, {}).get("exit") == 0:
                continue
            file = made_for_all_cells(command, args)
            with shared_file if file and not file.exists() else nullcontext():
                done[stage] = run_stage(cell, stage, args, folder, lock, done.get(stage, {}))
            atomic_write(folder / "done.json", lambda path: path.write_text(json.dumps(done)))
            if done[stage]["exit"]:
                raise RuntimeError(failure(stage, done[stage], folder))
        keep_results(cell, folder, done, args)


def made_for_all_cells(command, args):
    """The file that this command makes or reads, like those of other cells: statistics of real
    images or the classifier; or None"""
    for place, name in STATISTICS.items():
        if place in re.split("[ =]", command):
            return args.work / name
    return args.judge if "classifier" in command else None


def run_stage(cell, stage, args, folder, lock, before):
    """Run one command with the files of all cells that exist -> see run_command"""
    known = [place for place, name in STATISTICS.items() if (args.work / name).exists()]
    command = stages(cell, args.data, args.quick, known, args.also)[stage]
    own = folder / "judge.safetensors"
    if args.judge.exists() and not own.exists():
        os.link(args.judge, own)
    result = run_command(cell, stage, command, args, folder, lock, before)
    if own.exists() and not args.judge.exists():
        os.link(own, args.judge)                          # complete at once
    return result


def run_command(cell, stage, command, args, folder, lock, before):
    """One command in a process of its own -> {"command", "exit", "seconds", "cpu"}

    before  the same of its parts before an interruption; their times are added
    """
    # printed in one piece, because cells run side by side
    print(f"{time.strftime('%H:%M')} {cell.name}: {stage}\n", end="", flush=True)
    places = {"DATA": args.data, "RUN": os.path.relpath(folder, ROOT)}
    for place, name in STATISTICS.items():
        places[place] = os.path.relpath(args.work / name, ROOT)

    def path_of(match):
        return match[1] + places[match[2]]

    pattern = rf"^((?:\w+=)?)({'|'.join(places)})\b"      # RUN/dit, or save_real=REAL
    words = [re.sub(pattern, path_of, word) for word in shlex.split(command)]
    with open(folder / "out.txt", "a") as out:
        start = time.time()
        process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=out, stderr=out,
                                   pass_fds=[lock.fileno()], start_new_session=True,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"})
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            if stop_requested.wait(0.5):                  # train.py and dit.py save, then stop
                os.kill(process.pid, signal.SIGTERM)
                time.sleep(1)
    _, status, usage = ended
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.time() - start + before.get("seconds", 0)
    cpu = usage.ru_utime + usage.ru_stime + before.get("cpu", 0)
    return {"command": f"python {command}", "exit": process.returncode,
            "seconds": round(seconds, 1), "cpu": round(cpu, 1)}


def failure(stage, result, folder):
    if stop_requested.is_set():
        return "stopped"
    output = (folder / "out.txt").read_text()[-1500:]
    return f"{stage} failed (exit status {result['exit']}): {result['command']}\n{output}"


def link_pictures(data, out, n):
    """n training images, evenly spread over the files of all classes, as links. val/ and the class
    names are those of all."""
    files = sorted(p.relative_to(data) for p in Path(data, "train").glob("*/*"))
    chosen = [files[k * len(files) // n] for k in range(n)]
    for path in [*chosen, Path("val"), Path("classnames.txt")]:
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        if not (out / path).exists() and Path(data, path).exists():
            (out / path).symlink_to(Path(data, path).resolve())


def keep_results(cell, folder, done, args):
    """The line and the shortened log of a finished cell, and its samples unless they show
    photographs. Everything else is deleted."""
    measured = {m["name"]: m for m in lines(folder / "metrics.jsonl")}      # the newest of a name
    logs = {stage: lines(folder / stage / "log.jsonl")
            for stage in ("tokenizer", "decoder", "dit")}
    line = {"cell": cell.name, **asdict(cell), "data": args.shown, "quick": args.quick,
            "constants": args.constants,
            "metrics": {name: m["value"] for name, m in measured.items()},
            "gflops_a_step": {stage: log[0].get("gflops") for stage, log in logs.items()}}
    for name, key in (("seconds", "seconds"), ("cpu_seconds", "cpu"), ("commands", "command")):
        line[name] = {stage: result[key] for stage, result in done.items()}
    line["protocol"] = {name: m["protocol"].replace(args.data, "DATA")
                        for name, m in measured.items()}

    (args.out / "logs").mkdir(exist_ok=True)
    log_name = f"{args.prefix}-{cell.name}"
    text = "".join(json.dumps(x) + "\n" for x in shortened(logs))
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


def shortened(logs):
    """{stage: lines of its log} -> at most 20, 5 and 12 lines of each, evenly spread"""
    for (stage, log), n in zip(logs.items(), (20, 5, 12)):
        for k in range(min(n, len(log))):
            yield {"stage": stage} | log[k * (len(log) - 1) // max(n - 1, 1)]


def lines(path):
    """A file of JSON lines -> list; [] if there is no file"""
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError:
        raise ValueError(f"{path} has an incomplete line (a full disk?); delete that line, and its "
                         f"cell is measured again") from None


# ---------------------------------------------------------------- all cells
def finished(args):
    key = args.shown, args.quick
    return [r for r in lines(args.out / "results.jsonl") if (r["data"], r["quick"]) == key]


def spelled_alike(constants):
    """Older results have --head-hidden 256 in place of --set head_hidden=256 -> without such
    differences"""
    def alike(text):
        return str(text).replace("--set ", "--").replace("=", " ").replace("_", "-")
    return {name: alike(value) for name, value in (constants or {}).items()}


def check_results(args):
    """ValueError if results.jsonl holds cells of other images, constants or --also"""
    wanted = spelled_alike(args.constants)
    others = [r["cell"] for r in finished(args) if spelled_alike(r.get("constants")) != wanted]
    if others:
        raise ValueError(f"{args.out / 'results.jsonl'} has cells of other images, constants or "
                         f"--also ({', '.join(others)}: see their 'constants'); take another --out")


def check_work_folder(args):
    about = {"data": args.data} | args.constants
    path = args.work / "about.json"
    if (lines(path) or [about])[0] != about:
        raise ValueError(f"{args.work} was begun with other images, constants or --also (see its "
                         f"about.json); take another --out")
    path.write_text(json.dumps(about))


def set_folders(args):
    """Adds to args: shown and prefix, names of the data; out; work, the folder of the cells; judge,
    the classifier for all cells; constants"""
    photographs = args.data.partition(":")[0] != "shapes"
    if photographs:
        if not (Path(args.data, "train").is_dir() and Path(args.data, "val").is_dir()):
            raise ValueError(f"{args.data} holds no train/ and val/; wanted class folders such as "
                             f"ImageNet at 64 px: DIR/train/CLASS/x.jpg, DIR/val/CLASS/y.jpg")
        args.data = str(Path(args.data).resolve())
    args.shown = Path(args.data).name if photographs else args.data
    args.prefix = args.shown.partition(":")[0] + ("-quick" if args.quick else "")
    args.out = Path(args.out).resolve()
    name = "-".join(Path(os.path.relpath(args.out, ROOT)).parts)
    args.work = ROOT / "runs" / name / args.prefix
    args.judge = args.work / "judge.safetensors"
    # of shapes 0: they are endless, so there is no fraction of them
    args.training_pictures = sum(1 for _ in Path(args.data, "train").glob("*/*"))
    args.constants = {"training_pictures": args.training_pictures, "also": args.also}
    args.constants |= {name: str(values[args.quick]) for name, values in TABLE.items()}
    return photographs


def wanted_cells(args):
    found = [c for c in cells(args.quick) if fnmatch(c.name, args.only)]
    if not found:
        known = ", ".join(c.name for c in cells(args.quick))
        raise ValueError(f"--only {args.only!r} fits no cell; there are: {known}")
    possible = []
    for c in found:
        if c.pictures < max(args.training_pictures, 1):
            possible.append(c)
        else:
            print(f"{c.name:28s} questions {c.questions:5s}left out: there are "
                  f"{args.training_pictures} pictures")
    return possible


def expected_minutes(cell, quick):
    longer_dit = max(cell.dit - TABLE["dit"][quick], 0)
    seconds = cell.steps * SECONDS[cell.objective] + SECONDS["DiT"] * longer_dit
    return (seconds + OTHER_SECONDS[quick]) / 60


def print_list(wanted, left, args):
    rows = {r["cell"]: r for r in finished(args)}
    for c in wanted:
        state = f"about {expected_minutes(c, args.quick):3.0f} min"
        if c not in left:
            lacks = [stage for stage in stages(c, args.data, args.quick)
                     if stage not in rows[c.name]["commands"]]
            state = "finished"
            if lacks:
                state += f" without {', '.join(lacks)}; delete its line to have it measured"
        print(f"{c.name:28s} questions {c.questions:5s}{state}")
    hours = sum(expected_minutes(c, args.quick) for c in left) / 60 / args.jobs
    print(f"{len(left)} cells left, about {hours:.1f} h with --jobs {args.jobs}", flush=True)


def main(args):
    photographs = set_folders(args)
    wanted = wanted_cells(args)
    check_results(args)
    done = {r["cell"] for r in finished(args)}
    left = [c for c in wanted if c.name not in done]
    print_list(wanted, left, args)
    if args.list:
        return
    if photographs:
        weights.find("squeezenet")                # raises, and says where the file belongs
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    check_work_folder(args)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stop_requested.set())

    def one(cell):
        try:
            if not stop_requested.is_set():
                work(cell, args)
                left.remove(cell)
                print(f"{time.strftime('%H:%M')} {cell.name}: done; {len(left)} cells left",
                      flush=True)
        except Exception as problem:              # of this cell; the others continue
            text = problem if isinstance(problem, RuntimeError) else repr(problem)
            print(f"{cell.name}: {text}", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(one, list(left)))
    if left:
        print(f"{len(left)} cells are not finished: {', '.join(c.name for c in left)}; the same "
              f"command continues")
    else:
        print(f"all results are in {args.out / 'results.jsonl'}")
    raise SystemExit(bool(left))


def parser():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true",
                   help="questions 1 to 3 on the built-in shapes: few and small cells")
    p.add_argument("--data", default="shapes:objects=1,size=0.6-0.9",
                   help="folder with train/ and val/ of class folders; default: built-in shapes")
    p.add_argument("--only", default="*", metavar="GLOB",
                   help="only cells whose name fits, such as 'ALL-*'")
    p.add_argument("--jobs", type=int, default=1,
                   help="cells at once, of one thread each: as many as there are cores, because "
                        "small models gain little from a second thread")
    p.add_argument("--list", action="store_true",
                   help="print the cells, what is left and the expected time, and exit")
    p.add_argument("--also", default="", metavar="FLAGS",
                   help="further flags of train.py for every tokenizer, for example "
                        "--also='--set heads_after_bottleneck=true'; take another --out")
    p.add_argument("--out", default=str(ROOT / "study"),
                   help="folder of results.jsonl and logs/; another one repeats what is finished")
    return p


if __name__ == "__main__":
    try:
        main(parser().parse_args())
    except (ValueError, OSError) as problem:
        raise SystemExit(f"study.py: {problem}") from None
