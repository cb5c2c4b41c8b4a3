"""The paper's findings on two CPU cores (VTP Sec. 4, Fig. 4 to 7): many small tokenizers, the same small DiT on the latents of each.

    python study/study.py --quick --jobs 2 --out runs/quick        questions 1 to 3 on the built-in shapes, 20 minutes, no data needed
    python study/study.py --data IMAGENET64 --jobs 2               all questions on photographs of 64 px; --list says which cells, how long
    python study/figures.py                                        study/results.jsonl -> the figures and tables of study/README.md

A cell is one tokenizer with all that is measured of it: (objective, steps, size, decoder, pictures, seed). `stages` lists the commands of a cell;
they are the project's own, and each can be typed by hand. A finished cell is one line of results.jsonl, and its training log, thinned, in logs/.
The same command goes on where it stopped, whatever stopped it; what is finished is skipped; what is large is deleted when a cell is finished.
"""
import argparse
import fcntl
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
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from vtp_min import weights
OBJECTIVES = {"AE": "--w-clip 0 --w-ssl 0", "CLIP+AE": "--w-ssl 0", "SSL+AE": "--w-clip 0", "ALL": ""}       # paper Sec. 4.3: weights are 0 or 1, and w_rec 0.1

# ---------------------------------------------------------------- what is the same for all cells.   name: (photographs, --quick, source)
TABLE = {
    "picture":  ("--image 32 --patch 8 --latent-dim 64",) * 2 + ("ours: 16 latents, each a third of its patch's numbers and narrower than the DiT",),
    "batch":    ("--batch 64 --batch-ssl 32 --batch-rec 64",) * 2 + ("nano's defaults; AE has the same pictures a step as ALL",),
    "recipe":   ("--lr 5e-4 --ema 0.98 --locals 2 --prototypes 256 --head-hidden 256 --head-bottleneck 64 --teacher-temp 0.04 --drop-ssl 0",) * 2
                + ("nano's defaults, typed since larger sizes have others",),
    "base":     (300, 250, "ours: the shortest training; the others are 3 and 10 times as long"),
    "decoder":  (1600, 800, "ours: further steps of every decoder on its frozen latents"),
    "latents":  (50_000, 10_000, "photographs: all of the training set"),
    "dit":      (4000, 2000, "ours: steps; fewer leave blobs"),
    "samples":  (2500, 2100, "ours; below 2048 a distance is mostly bias; also the pictures of val that probes and zero-shot are judged on"),
    "recon":    (2500, 2100, "pictures of val that are painted again, evenly spread over it (ours)"),
    "probe":    (10_000, 5000, "pictures of the training set that probes learn from, and that samples are compared with; eval.py's default"),
    "judged":   (20_000, 5000, "pictures that the classifier learns from, and that FD-classifier compares with (ours)"),
    "judge":    (2400, 600, "steps of that classifier; eval.py's default"),
}
SECONDS = [({"AE": 0.20, "CLIP+AE": 0.28, "SSL+AE": 0.35, "ALL": 0.42}, 1300),              # of a step, and of all other stages, on one core of ours:
           ({"AE": 0.12, "CLIP+AE": 0.17, "SSL+AE": 0.21, "ALL": 0.25}, 350)]               # a first estimate of what is left, no more


@dataclass(frozen=True)
class Cell:
    questions: str                    # of study/README.md, 1 to 6
    objective: str
    steps: int
    size: str = "nano"                # of trunk and text tower
    decoder: str = ""                 # "": symmetric, as large as the trunk
    pictures: int = 0                 # of the training set; 0: all of them
    seed: int = 0

    @property
    def name(self):
        more = (self.size * (self.size != "nano"), f"decoder_{self.decoder}" * bool(self.decoder), f"n{self.pictures}" * bool(self.pictures), f"seed{self.seed}" * bool(self.seed))
        return "-".join([self.objective, str(self.steps), *filter(None, more)])


def cells(quick):
    """All cells, the most telling ones first"""
    S = TABLE["base"][quick]
    if quick:
        return [Cell("1", "AE", 3 * S), Cell("3", "ALL", S), Cell("123", "AE", S), Cell("2", "CLIP+AE", S), Cell("2", "SSL+AE", S)]
    core = [Cell("1234", objective, steps) for steps in (3 * S, 10 * S, S) for objective in ("AE", "ALL", "CLIP+AE", "SSL+AE")]
    seeds = [Cell("123", objective, 3 * S, seed=seed) for seed in (1, 2) for objective in OBJECTIVES]
    data = [Cell("6", objective, 3 * S, pictures=n) for n in (100, 1000, 10_000) for objective in ("AE", "ALL")]
    sizes = [Cell("5", objective, 3 * S, size=size) for size in ("pico", "micro") for objective in ("AE", "ALL")]
    decoders = [Cell("5", "ALL", 3 * S, decoder=size) for size in ("pico", "micro")]
    return core + seeds + data + sizes + decoders


# ---------------------------------------------------------------- a cell, command by command
def stages(cell, run, real, data, quick):
    """-> {stage: command}. DATA stands for the pictures, run/pictures links to some of them; real: statistics of the real pictures, once they are there"""
    t = {name: values[quick] for name, values in TABLE.items()}
    shapes = data.startswith("shapes")
    own = f"{run}/pictures" if cell.pictures else "DATA"
    measure = f"--data DATA --out {run} --limit {t['samples']}"
    judged = f"--features classifier --train-limit {t['judged']} --judge-steps {t['judge']}"
    compared = f"--out {run} --reference {real}" if (ROOT / real).exists() else f"{measure} --train-limit {t['probe']} --save-real {real}"
    do = {
        # 1  the tokenizer: all objectives or some of them
        "tokenizer": f"train.py --out {run}/tokenizer --data {own} --size {cell.size} {f'--decoder {cell.decoder} ' * bool(cell.decoder)}{t['picture']} {t['batch']} {t['recipe']} "
                     f"{OBJECTIVES[cell.objective]} --perceptual none --steps {cell.steps} --seed {cell.seed}",
        # 2  equal decoding: a joint run's decoder lags (w_rec 0.1), so each learns on, on frozen latents and all pictures, without a GAN
        "decoder": f"train.py --stage 2 --init {run}/tokenizer --out {run}/decoder --data DATA --w-gan 0 --perceptual none --batch 64 --lr 1e-3 --ema-decoder 0.99 --steps {t['decoder']}",
        # 3  what the tokenizer knows, and what it keeps
        "probe": f"eval.py probe {run}/tokenizer {measure} --train-limit {t['probe']}",
        "zeroshot": f"eval.py zeroshot {run}/tokenizer {measure}",
        "recon": f"eval.py recon {run}/decoder --perceptual none --data DATA --out {run} --limit {t['recon']} {judged if shapes else '--features squeezenet'}",
        # 4  the same DiT for all: standardised latents of all pictures, same steps, same draws, same sampler, no guidance
        "latents": f"dit.py latents {run}/tokenizer --data DATA --n {t['latents']} --out {run}/latents",
        "dit": f"dit.py train {run}/latents --out {run}/dit --size nano --steps {t['dit']} --batch 64 --lr 1e-3 --warmup 50 --precision bf16 --seed 0",
        "sample": f"dit.py sample {run}/dit --tokenizer {run}/decoder --out {run}/samples --n {t['samples']} --points 50 --precision bf16 --seed 0",
        # 5  samples against real pictures
        "fid": f"eval.py fid {run}/samples --features squeezenet {compared}",
        "judge": f"eval.py fid {run}/samples {measure} {judged}",
    }
    if cell.objective not in ("CLIP+AE", "ALL"):
        del do["zeroshot"]                                                      # it knows no words
    if shapes:
        del do["fid"]                                                           # SqueezeNet knows photographs
    return {stage: " ".join(command.split()) for stage, command in do.items()}


# ---------------------------------------------------------------- the work on a cell: stages that have ended are not done again
class Stopped(Exception):
    """A signal, or a command that failed"""


running, judging, stopping = set(), threading.Lock(), threading.Event()


def work(cell, args):
    """Do what is left of a cell; its line goes to results.jsonl"""
    folder = args.work / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:                                    # the commands hold it too: one that outlives its driver goes on alone
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Stopped(f"{cell.name}: another driver, or a command of one, is at work on it ({folder}); left alone") from None
        if cell.pictures:
            link_pictures(args.data, folder / "pictures", cell.pictures)
        done = (lines(folder / "done.json") or [{}])[0]
        commands = stages(cell, *(os.path.relpath(path, ROOT) for path in (folder, args.work / "real.npz")), args.data, args.quick)
        commands["tokenizer"] += f" {args.also}" * bool(args.also)
        for stage, command in commands.items():
            if stage in done:
                continue
            judged = "--features classifier" in command                         # one judge for all cells: who measures first trains it, the others wait
            with judging if judged and not args.judge.exists() else nullcontext():
                if judged and args.judge.exists():
                    shutil.copy(args.judge, folder / "judge.safetensors")
                done[stage] = {"command": f"python {command}"} | run(cell, stage, command, args, folder, lock)
                if judged and not args.judge.exists():
                    shutil.copy(folder / "judge.safetensors", args.judge)
            (folder / "done.json").write_text(json.dumps(done))
        keep(cell, folder, done, args)


def run(cell, stage, command, args, folder, lock):
    """One command as a process of its own -> seconds it took, and seconds of a core that it had; of a resumed one those of its last part"""
    if stage == "latents":
        shutil.rmtree(folder / "latents", ignore_errors=True)                   # whole ones would be refused: dit.py overwrites nothing unasked
    print(f"{time.strftime('%H:%M')} {cell.name}: {stage}", flush=True)
    with open(folder / "out.txt", "a") as out:
        start = time.time()
        process = subprocess.Popen([sys.executable, *shlex.split(command.replace("DATA", shlex.quote(args.data)))], cwd=ROOT, stdout=out, stderr=out, pass_fds=[lock.fileno()],
                                   start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        running.add(process)
        if stopping.is_set():
            process.terminate()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        running.discard(process)
    if process.returncode:
        raise Stopped("" if stopping.is_set() else f"{cell.name}: {stage} failed (exit status {process.returncode}): {command}\n{(folder / 'out.txt').read_text()[-1500:]}")
    return {"seconds": round(time.time() - start, 1), "cpu": round(used.ru_utime + used.ru_stime, 1)}


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
    line = {"cell": cell.name, **asdict(cell), "data": args.shown, "quick": args.quick,
            "metrics": {name: m["value"] for name, m in measured.items()},
            "gflops_a_step": {stage: log[0].get("gflops") for stage, log in logs.items()},
            "seconds": {stage: d["seconds"] for stage, d in done.items()}, "cpu_seconds": {stage: d["cpu"] for stage, d in done.items()},
            "torch": torch.__version__,
            "commands": {stage: d["command"] for stage, d in done.items()},
            "protocol": {name: m["protocol"].replace(args.data, "DATA") for name, m in measured.items()}}
    (args.out / "logs").mkdir(exist_ok=True)
    thin = [{"stage": stage} | log[k * (len(log) - 1) // max(n - 1, 1)] for (stage, log), n in zip(logs.items(), (20, 5, 12)) for k in range(min(n, len(log)))]
    (args.out / "logs" / f"{args.prefix}{cell.name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in thin))
    if args.data.startswith("shapes"):
        (args.out / "pictures").mkdir(exist_ok=True)
        shutil.copy(folder / "samples" / "grid.png", args.out / "pictures" / f"{args.prefix}{cell.name}.png")
    shutil.copy(folder / "samples" / "grid.png", folder)
    with open(args.out / "results.jsonl", "a") as f:
        f.write(json.dumps(line) + "\n")
    for large in ("tokenizer", "decoder", "latents", "dit", "samples", "pictures"):
        shutil.rmtree(folder / large, ignore_errors=True)
    (folder / "judge.safetensors").unlink(missing_ok=True)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ---------------------------------------------------------------- the whole
def estimate(cell, finished, quick):
    """Seconds of a cell: what it took on our machine, times how much slower or faster the finished ones were here"""
    step, rest = SECONDS[quick]
    here = [sum(r["seconds"].values()) / (r["steps"] * step[r["objective"]] + rest) for r in finished if r["size"] == "nano"]
    return (cell.steps * step[cell.objective] + rest) * (sum(here) / len(here) if here else 1)


def time_left(cells, times, jobs):
    minutes = sum(times[c] for c in cells) / jobs // 60
    return f"{len(cells)} cells left, about {minutes // 60:.0f}:{minutes % 60:02.0f} h with --jobs {jobs}"


def stop(number, frame):
    """train.py and dit.py finish their step, save and leave; the same command goes on from there"""
    stopping.set()
    for process in list(running):
        process.terminate()


def main(args):
    args.data = args.data or "shapes:objects=1,size=0.6-0.9"
    photographs = not args.data.startswith("shapes")
    if photographs:
        if not (Path(args.data, "train").is_dir() and Path(args.data, "val").is_dir()):
            raise ValueError(f"{args.data} holds no train/ and val/; wanted class folders such as ImageNet at 64 px: DIR/train/CLASS/x.jpg, DIR/val/CLASS/y.jpg")
        args.data = str(Path(args.data).resolve())
    args.shown = Path(args.data).name if photographs else args.data
    args.prefix = (args.shown if photographs else "shapes") + "-" + "quick-" * args.quick
    args.out = Path(args.out).resolve()
    args.work = ROOT / "runs" / args.out.name / args.prefix.strip("-")
    args.judge = args.work / "judge.safetensors"
    finished = [r for r in lines(args.out / "results.jsonl") if (r["data"], r["quick"]) == (args.shown, args.quick)]
    wanted = [c for c in cells(args.quick) if fnmatch(c.name, args.only) and (photographs or not c.pictures)]         # shapes have no end: no share of them
    left = [c for c in wanted if c.name not in {r["cell"] for r in finished}]
    times = {c: estimate(c, finished, args.quick) for c in wanted}
    for c in wanted:
        print(f"{c.name:28s} questions {c.questions:5s}" + (f"about {times[c] / 60:3.0f} min" if c in left else "finished"))
    print(time_left(left, times, args.jobs), flush=True)
    if args.list:
        return
    args.out.mkdir(parents=True, exist_ok=True)
    if photographs:
        weights.find("squeezenet")                                              # raises, and says where the file belongs
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, stop)

    def one(cell):
        try:
            if not stopping.is_set():
                work(cell, args)
                left.remove(cell)
                print(f"{time.strftime('%H:%M')} {cell.name}: done; {time_left(left, times, args.jobs)}", flush=True)
        except Stopped as problem:
            print(problem, flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(one, list(left)))
    print(f"all is in {args.out / 'results.jsonl'}" if not left else f"{len(left)} cells are not finished: {', '.join(c.name for c in left)}; the same command goes on")
    raise SystemExit(bool(left))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="questions 1 to 3 on the built-in shapes: small cells, few of them")
    p.add_argument("--data", help="folder with train/ and val/ of class folders; default: the built-in shapes")
    p.add_argument("--only", default="*", metavar="GLOB", help="only cells whose name fits, as 'ALL-*'")
    p.add_argument("--jobs", type=int, default=1, help="cells at once, of one thread each: as many as there are cores. Small models gain little from a second thread")
    p.add_argument("--list", action="store_true", help="say what there is, what is left, how long it takes, and end")
    p.add_argument("--also", default="", metavar="FLAGS", help="further flags of train.py for every tokenizer, as --also=--heads-after-bottleneck; take another --out")
    p.add_argument("--out", default=str(ROOT / "study"), help="folder of results.jsonl and logs/; another one repeats what is finished here")
    try:
        main(p.parse_args())
    except (ValueError, OSError) as problem:
        raise SystemExit(f"study.py: {problem}") from None
