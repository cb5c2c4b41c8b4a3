"""The paper's findings on two CPU cores (VTP Sec. 4, Fig. 4 to 7): many small tokenizers, the same small DiT on the latents of each.

    python study/study.py --quick --jobs 2 --out runs/quick        questions 1 to 3 in part, on the built-in shapes, 20 minutes, no data needed
    python study/study.py --data IMAGENET64 --jobs 2               all questions on photographs, read at 32 px; --list says which cells, how long
    python study/figures.py                                        study/results.jsonl -> the figures and tables of study/README.md

A cell is one tokenizer with all that is measured of it: (objective, steps, size, decoder, pictures, DiT, seed). `stages` lists the commands of a cell;
they are the project's own, and each can be typed by hand. A finished cell is one line of results.jsonl, and its training log, thinned, in logs/.
The same command goes on where it stopped, whatever stopped it; what is finished is skipped; what is large is deleted when a cell is finished.
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
from vtp_min import weights
from vtp_min.run import write_aside

OBJECTIVES = {"AE": "--w-clip 0 --w-ssl 0", "CLIP+AE": "--w-ssl 0", "SSL+AE": "--w-clip 0", "ALL": ""}       # paper Sec. 4.3: weights are 0 or 1, and w_rec 0.1

# ---------------------------------------------------------------- what is the same for all cells.   name: (in full, with --quick, source)
TABLE = {
    "picture":  ("--image 32 --patch 8 --latent-dim 64",) * 2 + ("ours: 16 latents, each a third of its patch's numbers and narrower than the DiT",),
    "batch":    ("--batch 64 --batch-ssl 32 --batch-rec 64",) * 2 + ("nano's defaults; AE has the same pictures a step as ALL",),
    "recipe":   ("--lr 5e-4 --ema 0.98 --locals 2 --prototypes 256 --head-hidden 256 --head-bottleneck 64 --teacher-temp 0.04 --drop-ssl 0",) * 2
                + ("nano's defaults, typed since larger sizes have others",),
    "base":     (300, 250, "ours: the shortest training; the others are 3 and 10 times as long"),
    "decoder":  (1600, 800, "ours: further steps of every decoder on its frozen latents"),
    "adam":     ("--batch 64 --lr 1e-3",) * 2 + ("of decoder and DiT: stage 2's default, and tried on the demo's DiT (ours)",),
    "latents":  (50_000, 10_000, "photographs: all of the training set"),
    "dit":      (4000, 2000, "ours: steps; fewer leave blobs"),
    "samples":  (2500, 2100, "ours; fewer make a distance mostly bias. As many pictures of val, evenly spread, are painted again and judge probes and zero-shot"),
    "probe":    (10_000, 5000, "pictures of the training set that probes learn from, and that samples are compared with; eval.py's default"),
    "judged":   (20_000, 5000, "pictures that the classifier learns from, and that FD-classifier compares with (ours)"),
    "judge":    (2400, 600, "steps of that classifier; eval.py's default"),
}
STATISTICS = {"REAL": "real.npz", "HALF": "half.npz"}        # of the real pictures; the first cell makes them
SECONDS, REST = {"AE": 0.12, "CLIP+AE": 0.17, "SSL+AE": 0.21, "ALL": 0.25, "DiT": 0.085}, (840, 330)      # of a step, and of all other stages, on one core of ours: a first estimate, for nano


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
        special = {"": self.size.replace("nano", ""), "decoder_": self.decoder, "n": self.pictures, "dit": self.dit, "seed": self.seed}       # what nano, seed 0 and so on are not
        return "-".join([self.objective, str(self.steps), *(f"{word}{value}" for word, value in special.items() if value)])


def cells(quick):
    """All cells, the most telling ones first"""
    S = TABLE["base"][quick]
    if quick:
        return [Cell("1", "AE", 3 * S), Cell("3", "ALL", S), Cell("123", "AE", S), Cell("2", "CLIP+AE", S), Cell("2", "SSL+AE", S)]
    core = [Cell("1234", objective, steps) for steps in (3 * S, 10 * S, S) for objective in ("AE", "ALL", "CLIP+AE", "SSL+AE")]
    long = [Cell("23", objective, 10 * S, dit=3 * TABLE["dit"][quick]) for objective in OBJECTIVES]
    seeds = [Cell("1234", objective, steps, seed=seed) for steps, seed in ((3 * S, 1), (3 * S, 2), (10 * S, 1)) for objective in (OBJECTIVES if steps == 3 * S else ("AE", "ALL"))]
    data = [Cell("6", objective, 3 * S, pictures=n) for n in (100, 1000, 10_000) for objective in ("AE", "ALL")]
    sizes = [Cell("5", objective, 3 * S, size=size, decoder="nano") for size in ("pico", "micro") for objective in ("AE", "ALL")]
    decoders = [Cell("5", "ALL", 3 * S, decoder=size) for size in ("pico", "micro")]
    return core + long + data + sizes + decoders + seeds


# ---------------------------------------------------------------- a cell, command by command
def stages(cell, data, quick, known=(), also=""):
    """-> {stage: command}, in the order of README's protocol. DATA stands for the pictures, RUN for the cell's folder, REAL and HALF for statistics of the real pictures, if known"""
    t, shapes = {name: values[quick] for name, values in TABLE.items()}, data.startswith("shapes")
    measure = f"--data DATA --out RUN --limit {t['samples']}"
    judged = f"--features classifier --train-limit {t['judged']} --judge-steps {t['judge']}"
    compared = {place: f"--out RUN --reference {place}" if place in known else f"{measure} --train-limit {t['probe']} --save-real {place}" for place in STATISTICS}
    do = {
        "tokenizer": f"train.py --out RUN/tokenizer --data {'RUN/pictures' if cell.pictures else 'DATA'} --size {cell.size} {f'--decoder {cell.decoder}' * bool(cell.decoder)} "
                     f"{t['picture']} {t['batch']} {t['recipe']} {OBJECTIVES[cell.objective]} --perceptual none --steps {cell.steps} --seed {cell.seed} {also}",
        "decoder": f"train.py --stage 2 --init RUN/tokenizer --out RUN/decoder --data DATA --w-gan 0 --perceptual none {t['adam']} --ema-decoder 0.99 --steps {t['decoder']}",
        "probe": f"eval.py probe RUN/tokenizer {measure} --train-limit {t['probe']}",
        "zeroshot": f"eval.py zeroshot RUN/tokenizer {measure}",
        "recon": f"eval.py recon RUN/decoder --perceptual none {measure} {judged if shapes else '--features squeezenet'}",
        "latents": f"dit.py latents RUN/tokenizer --data DATA --n {t['latents']} --out RUN/latents --fresh",
        "dit": f"dit.py train RUN/latents --out RUN/dit --size nano --steps {cell.dit or t['dit']} {t['adam']} --warmup 50 --seed 0",
        "sample": f"dit.py sample RUN/dit --tokenizer RUN/decoder --out RUN/samples --n {t['samples']} --points 50 --seed 0",
        "fid": f"eval.py fid RUN/samples --features squeezenet {compared['REAL']}",
        "halved": f"eval.py fid RUN/samples --features squeezenet --halve {compared['HALF']}",
        "judge": f"eval.py fid RUN/samples {measure} {judged}",
    }
    senseless = ["zeroshot"] * (cell.objective not in ("CLIP+AE", "ALL")) + ["fid", "halved"] * shapes            # knows no words; SqueezeNet knows photographs
    return {stage: " ".join(command.split()) for stage, command in do.items() if stage not in senseless}


# ---------------------------------------------------------------- the work on a cell: stages that have ended are not done again
stopping, judging = threading.Event(), threading.Lock()


def work(cell, args):
    """Do what is left of a cell; its line goes to results.jsonl"""
    folder = args.work / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:                                    # the commands hold it too: one that outlives its driver goes on alone
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"another driver, or a command of one, is at work on it ({folder}); left alone") from None
        if cell.name in {r["cell"] for r in finished(args)}:                    # by another driver, since this one looked
            return
        if cell.pictures:
            link_pictures(args.data, folder / "pictures", cell.pictures)
        done = (lines(folder / "done.json") or [{}])[0]                         # {stage: its command, exit status, seconds of all its parts}
        for stage, command in [x for x in stages(cell, args.data, args.quick).items() if done.get(x[0], {}).get("exit") != 0]:
            file = common(command, args)
            with judging if file and not file.exists() else nullcontext():      # who comes first makes it, the others wait
                known = [p for p, name in STATISTICS.items() if (args.work / name).exists()]
                command = stages(cell, args.data, args.quick, known, args.also)[stage]
                if args.judge.exists() and not (folder / "judge.safetensors").exists():
                    os.link(args.judge, folder / "judge.safetensors")
                done[stage] = run(cell, stage, command, args, folder, lock, done.get(stage, {}))
                if (folder / "judge.safetensors").exists() and not args.judge.exists():
                    os.link(folder / "judge.safetensors", args.judge)           # whole at once
            write_aside(folder / "done.json", lambda path: path.write_text(json.dumps(done)))
            if done[stage]["exit"]:
                raise RuntimeError("stopped" if stopping.is_set() else f"{stage} failed (exit status {done[stage]['exit']}): {command}\n{(folder / 'out.txt').read_text()[-1500:]}")
        keep(cell, folder, done, args)


def common(command, args):
    """The file that a command shares with those of all other cells: statistics of real pictures, the classifier, or None"""
    place = next((p for p in STATISTICS if p in command.split()), None)
    return args.work / STATISTICS[place] if place else args.judge if "classifier" in command else None


def run(cell, stage, command, args, folder, lock, before):
    """One command as a process of its own -> what done.json keeps of it: seconds it took and seconds of a core it had, with those of its parts `before` a stop"""
    print(f"{time.strftime('%H:%M')} {cell.name}: {stage}\n", end="", flush=True)                        # in one piece: cells run side by side
    places = {"DATA": args.data, "RUN": os.path.relpath(folder, ROOT)} | {place: os.path.relpath(args.work / name, ROOT) for place, name in STATISTICS.items()}
    words = [re.sub(rf"^({'|'.join(places)})\b", lambda found: places[found[0]], word) for word in shlex.split(command)]
    with open(folder / "out.txt", "a") as out:
        start = time.time()
        process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=out, stderr=out, pass_fds=[lock.fileno()], start_new_session=True,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"})
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            if stopping.wait(0.5):                                              # train.py and dit.py finish their step, save and leave
                os.kill(process.pid, signal.SIGTERM)
                time.sleep(1)
    process.returncode = os.waitstatus_to_exitcode(ended[1])
    spent = {"seconds": time.time() - start, "cpu": ended[2].ru_utime + ended[2].ru_stime}
    return {"command": f"python {command}", "exit": process.returncode} | {name: round(value + before.get(name, 0), 1) for name, value in spent.items()}


def link_pictures(data, out, n):
    """n training pictures, evenly spread over the classes' files, as links; val/ and the class names are those of all"""
    files = sorted(p.relative_to(data) for p in Path(data, "train").glob("*/*"))
    for path in [files[k * len(files) // n] for k in range(n)] + [Path("val"), Path("classnames.txt")]:
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        if not (out / path).exists() and Path(data, path).exists():
            (out / path).symlink_to(Path(data, path).resolve())


def keep(cell, folder, done, args):
    """A finished cell: its line, its thinned log, a picture if no photograph is in it. The rest goes"""
    measured = {m["name"]: m for m in lines(folder / "metrics.jsonl")}          # the newest of each name
    logs = {stage: lines(folder / stage / "log.jsonl") for stage in ("tokenizer", "decoder", "dit")}
    line = {"cell": cell.name, **asdict(cell), "data": args.shown, "quick": args.quick, "constants": args.constants,
            "metrics": {name: m["value"] for name, m in measured.items()},
            "gflops_a_step": {stage: log[0].get("gflops") for stage, log in logs.items()},
            **{name: {stage: d[key] for stage, d in done.items()} for name, key in (("seconds", "seconds"), ("cpu_seconds", "cpu"), ("commands", "command"))},
            "protocol": {name: m["protocol"].replace(args.data, "DATA") for name, m in measured.items()}}
    thin = [{"stage": stage} | log[k * (len(log) - 1) // max(n - 1, 1)] for (stage, log), n in zip(logs.items(), (20, 5, 12)) for k in range(min(n, len(log)))]
    (args.out / "logs").mkdir(exist_ok=True)
    (args.out / "logs" / f"{args.prefix}-{cell.name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in thin))
    for place in [folder] + [args.out / "logs" / f"{args.prefix}-{cell.name}.png"] * args.data.startswith("shapes"):
        shutil.copy(folder / "samples" / "grid.png", place)
    with open(args.out / "results.jsonl", "a") as f:
        f.write(json.dumps(line) + "\n")
    for large in ("tokenizer", "decoder", "latents", "dit", "samples", "pictures"):
        shutil.rmtree(folder / large, ignore_errors=True)
    for name in ("judge.safetensors", "done.json", "metrics.jsonl"):
        (folder / name).unlink(missing_ok=True)


def lines(path):
    try:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    except ValueError:
        raise ValueError(f"{path} has a line that is not whole (a full disk?); delete that line, and what it told is measured again") from None


# ---------------------------------------------------------------- the whole
def finished(args):
    return [r for r in lines(args.out / "results.jsonl") if (r["data"], r["quick"]) == (args.shown, args.quick)]


def main(args):
    photographs = args.data.partition(":")[0] != "shapes"
    if photographs:
        if not (Path(args.data, "train").is_dir() and Path(args.data, "val").is_dir()):
            raise ValueError(f"{args.data} holds no train/ and val/; wanted class folders such as ImageNet at 64 px: DIR/train/CLASS/x.jpg, DIR/val/CLASS/y.jpg")
        args.data = str(Path(args.data).resolve())
    args.shown = Path(args.data).name if photographs else args.data
    args.prefix = args.shown.partition(":")[0] + "-quick" * args.quick
    args.out = Path(args.out).resolve()
    args.work = ROOT / "runs" / "-".join(Path(os.path.relpath(args.out, ROOT)).parts) / args.prefix
    args.judge = args.work / "judge.safetensors"
    there = sum(1 for _ in Path(args.data, "train").glob("*/*"))                                                       # of shapes 0: they have no end, and no share
    wanted = [c for c in cells(args.quick) if fnmatch(c.name, args.only)]
    if not wanted:
        raise ValueError(f"--only {args.only!r} fits no cell; there are: {', '.join(c.name for c in cells(args.quick))}")
    for c in [c for c in wanted if c.pictures >= max(there, 1)]:
        print(f"{c.name:28s} questions {c.questions:5s}left out: there are {there} pictures to take from")
        wanted.remove(c)
    args.constants = {"training_pictures": there, "also": args.also} | {name: str(values[args.quick]) for name, values in TABLE.items()}
    if others := [r["cell"] for r in finished(args) if r.get("constants") != args.constants]:
        raise ValueError(f"{args.out / 'results.jsonl'} has cells of other pictures, constants or --also ({', '.join(others)}: their 'constants' say which); take another --out")
    minutes = {c: (c.steps * SECONDS[c.objective] + REST[args.quick] + SECONDS["DiT"] * max(c.dit - TABLE["dit"][args.quick], 0)) / 60 for c in wanted}
    rows = {r["cell"]: r for r in finished(args)}
    left = [c for c in wanted if c.name not in rows]
    for c in wanted:
        lacks = [stage for stage in stages(c, args.data, args.quick) if c not in left and stage not in rows[c.name]["commands"]]
        print(f"{c.name:28s} questions {c.questions:5s}" + (f"about {minutes[c]:3.0f} min" if c in left else "finished" + f" without {', '.join(lacks)}; delete its line to have it measured" * bool(lacks)))
    print(f"{len(left)} cells left, about {sum(minutes[c] for c in left) / 60 / args.jobs:.1f} h with --jobs {args.jobs}", flush=True)
    if args.list:
        return
    if photographs:
        weights.find("squeezenet")                                              # raises, and says where the file belongs
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    about = {"data": args.data} | args.constants
    if (lines(args.work / "about.json") or [about])[0] != about:
        raise ValueError(f"{args.work} was begun with other pictures, constants or --also (its about.json says which); take another --out")
    (args.work / "about.json").write_text(json.dumps(about))
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, lambda number, frame: stopping.set())

    def one(cell):
        try:
            if not stopping.is_set():
                work(cell, args)
                left.remove(cell)
                print(f"{time.strftime('%H:%M')} {cell.name}: done; {len(left)} cells left", flush=True)
        except Exception as problem:                                            # one cell's; the others go on
            print(f"{cell.name}: {problem if isinstance(problem, RuntimeError) else repr(problem)}", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(one, list(left)))
    print(f"all is in {args.out / 'results.jsonl'}" if not left else f"{len(left)} cells are not finished: {', '.join(c.name for c in left)}; the same command goes on")
    raise SystemExit(bool(left))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="questions 1 to 3 on the built-in shapes: small cells, few of them")
    p.add_argument("--data", default="shapes:objects=1,size=0.6-0.9", help="folder with train/ and val/ of class folders; default: the built-in shapes")
    p.add_argument("--only", default="*", metavar="GLOB", help="only cells whose name fits, as 'ALL-*'")
    p.add_argument("--jobs", type=int, default=1, help="cells at once, of one thread each: as many as there are cores. Small models gain little from a second thread")
    p.add_argument("--list", action="store_true", help="say what there is, what is left, how long it takes, and end")
    p.add_argument("--also", default="", metavar="FLAGS", help="further flags of train.py for every tokenizer, as --also=--heads-after-bottleneck; take another --out")
    p.add_argument("--out", default=str(ROOT / "study"), help="folder of results.jsonl and logs/; another one repeats what is finished here")
    try:
        main(p.parse_args())
    except (ValueError, OSError) as problem:
        raise SystemExit(f"study.py: {problem}") from None
