"""Test the paper's finding at a small scale: does a tokenizer that also learns to understand images
make the diffusion transformer (DiT) learn faster and better?   VTP Sec. 4 and 5, Fig. 5, 6, 9

    python study/study.py race --jobs 2                  built-in shapes, 80 classes: samples of
                                                         the DiT after 250, 500, ... 4000 steps
    python study/study.py race --quick --jobs 2          its two most important cells
    python study/study.py matched --data DIR --jobs 2    photographs, decoders of equal quality
    python study/study.py wide --data DIR --jobs 2       photographs, latents of 16 to 48 numbers
    python study/study.py race --gpu                     for one GPU: 64 px, larger models
    python study/figures.py                              figures and tables of study/README.md

study/protocol.md states each question, and the rule that decides it, as written before the runs.

A cell is one tokenizer with all of its measurements. `stages` returns its commands, which can also
be typed by hand: commands of train.py, eval.py and dit.py. A finished cell is one line of
OUT/results.jsonl and a shortened training log in OUT/logs; its large files are deleted. After an
interruption, the same command continues and skips finished cells.
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

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from vtp_min.config import atomic_write                                    # noqa: E402
from vtp_min.device import choose_precision                                # noqa: E402
from vtp_min.extras import efficientnet, weights                           # noqa: E402

# VTP Sec. 4.3: the loss weights of CLIP and self-distillation are 0 or 1, and w_rec is 0.1
OBJECTIVES = {"AE": "--w-clip 0 --w-ssl 0", "CLIP+AE": "--w-ssl 0", "SSL+AE": "--w-clip 0",
              "ALL": ""}
SHAPES = "shapes:objects=1,size=0.6-0.9,label=kind+color"

# ---------------------------------------------------------------- constants of all cells
SETTINGS = ("--lr 5e-4 --set ema=0.98 --set locals=2 --set prototypes=256 --set head_hidden=256 "
            "--set head_bottleneck=64 --set teacher_temp=0.04 --set drop_ssl=0")
RECIPE = f"--batch 64 --batch-ssl 32 --batch-rec 64 {SETTINGS}"
DIT_RECIPE = "--size nano --batch 64 --lr 1e-3 --warmup 50"
GPU_RECIPE = "--batch 512 --batch-ssl 256 --batch-rec 512"
GPU_DIT_RECIPE = "--size B --batch 256"
# {name: (value, value with --gpu, meaning and source)}; values are stored in results.jsonl
CONSTANTS = {
    "size": ("nano", "S", "of the tokenizer (ours)"),
    "recipe": (RECIPE, GPU_RECIPE, "nano's defaults, given explicitly; S: its own defaults, with "
                                   "a batch for one GPU (ours)"),
    "dit_recipe": (DIT_RECIPE, GPU_DIT_RECIPE, "ours, as in `dit.py train --help`; for a GPU "
                                               "LightningDiT's, with a batch for one GPU (ours)"),
    "samples": (2080, 10_000, "number of samples: 26 of each of 80 classes, and more than the 2048 "
                              "that eval.py wants for a distance (ours)"),
    "points": (50, 250, "time points of the sampler: a draft; LightningDiT"),
    "probe": (10_000, 50_000, "training images of the probes"),
}

@dataclass(frozen=True)
class Cell:
    """One tokenizer and its measurements; the fields are stored in results.jsonl."""
    objective: str
    seed: int = 0                     # of tokenizer, DiT and sampler
    captions: str = "both"            # race: captions of the shapes, see shapes.draw
    width: int = 0                    # wide: numbers per latent

    @property
    def name(self):
        """The objective, then the fields that differ from their defaults"""
        parts = [self.objective]
        if self.captions != "both":
            parts.append(self.captions)
        if self.width:
            parts.append(f"d{self.width}")
        if self.seed:
            parts.append(f"seed{self.seed}")
        return "-".join(parts)


# ---------------------------------------------------------------- the race
RACE = {   # as CONSTANTS
    "race": ("--image 32 --patch 8 --latent-dim 48", "--image 64 --patch 16 --latent-dim 64",
             "ours: 16 latents of 48 numbers, a quarter as many numbers as the pixels"),
    "steps": (700, 5000, "of the tokenizer: those of a trial that showed an effect; GPU: ours"),
    "latents": (20_000, 50_000, "number of encoded images; each also mirrored (ours)"),
    "judge": ("--train-limit 10000 --set judge_steps=1200", "--train-limit 50000",
              "training of the classifier that judges shapes (ours)"),
    "dit_steps": ("250 500 1000 2000 4000", "5000 10000 20000 40000",
                  "steps of the DiT at which samples are judged (ours)"),
}


def race_cells(quick):
    """-> list of cells, the most important ones first"""
    if quick:
        return [Cell("AE"), Cell("CLIP+AE")]
    cells = [Cell(objective, seed) for seed in (0, 1) for objective in OBJECTIVES]
    return cells[:4] + [Cell("CLIP+AE", 0, "neither"), Cell("CLIP+AE", 0, "shuffled")] + cells[4:]


def race_stages(cell, t, also):
    """-> {stage: command}   t {name: value of this constant}, also: further flags of train.py

    In a command, RUN is replaced by the folder of the cell, and DATA by the data set.
    """
    measure = f"--data DATA --out RUN --limit {t['samples']}"
    classifier = f"--features classifier {t['judge']}"
    commands = {
        "tokenizer": f"train.py --out RUN/tokenizer --data DATA,captions={cell.captions} "
                     f"--size {t['size']} {t['race']} {t['recipe']} {OBJECTIVES[cell.objective]} "
                     f"--perceptual none --steps {t['steps']} --seed {cell.seed} "
                     f"--precision {t['precision']} {also}",
        "probe": f"eval.py probe RUN/tokenizer {measure} --train-limit {t['probe']}",
        "zeroshot": f"eval.py zeroshot RUN/tokenizer {measure}",
        "recon": f"eval.py recon RUN/tokenizer --perceptual none {measure} {classifier}",
        "latents": f"dit.py latents RUN/tokenizer --data DATA --n {t['latents']} "
                   f"--precision {t['precision']} --out RUN/latents --fresh",
    }
    if cell.objective not in ("CLIP+AE", "ALL"):          # trained without captions
        del commands["zeroshot"]
    for steps in t["dit_steps"].split():                  # one training that is continued
        out = f"RUN/at-{steps}"
        commands |= {
            f"dit-{steps}": f"dit.py train RUN/latents --out RUN/dit {t['dit_recipe']} "
                            f"--steps {steps} --precision {t['precision']} --seed {cell.seed}",
            f"sample-{steps}": f"dit.py sample RUN/dit --out RUN/samples --n {t['samples']} "
                               f"--points {t['points']} --precision {t['precision']} "
                               f"--seed {cell.seed} --fresh",
            f"judge-{steps}": f"eval.py fid RUN/samples --run RUN/tokenizer --data DATA "
                              f"--out {out} --limit {t['samples']} {classifier}",
        }
    return commands


# ---------------------------------------------------------------- photographs
PHOTOGRAPHS = {   # as CONSTANTS, for both parts with photographs
    "steps": (1500, 20_000, "of the tokenizer (ours)"),
    "dit_steps": (3000, 40_000, "of the DiT (ours)"),
    "classifier": ("--train-limit 20000", "--train-limit 50000",
                   "training of the small classifier, the second judge (ours)"),
}
MATCHED = PHOTOGRAPHS | {
    "image": ("--image 32 --patch 8 --latent-dim 64", "--image 64 --patch 16 --latent-dim 64",
              "as in the first study: 16 latents; a latent is narrower than the DiT"),
    "new_decoder_steps": ("150 300 600", "1000 2500 6000",
                          "AE: trainings of a new decoder, of which the shorter ones are worse "
                          "(ours)"),
    "more_decoder_steps": (1200, 10_000, "ALL: further steps of its own decoder (ours)"),
    "decoder_recipe": ("--batch 64 --lr 1e-3 --set ema_decoder=0.99", "--batch 256",
                       "ours; GPU: the default rate of stage 2"),
    "few_dit_steps": (1500, 10_000, "of the DiT on 10 classes (ours)"),
}
WIDE = PHOTOGRAPHS | {
    "image": ("--image 32 --patch 4", "--image 64 --patch 8", "ours: 64 latents"),
    # 64 latents take about four times as long as 16: half the batch, and fewer steps (ours)
    "recipe": (f"--batch 32 --batch-ssl 16 --batch-rec 32 {SETTINGS}", GPU_RECIPE,
               "nano: as above with half the batch; S: as above (ours)"),
    "steps": (600, 20_000, "of the tokenizer"),
    "dit_steps": (1200, 10_000, "of the DiT, on 10 classes"),
}
# 10 of the 100 classes of imagenet64: goldfish, jellyfish, king penguin, monarch, African elephant,
# lighthouse, computer keyboard, school bus, pizza, alp
TEN = ("n01443537", "n01910747", "n02056570", "n02279972", "n02504458", "n02814860", "n03085013",
       "n04146614", "n07873807", "n09193705")


def tokenizer_command(cell, t, also, image):
    """The training on photographs. The perceptual loss is on, as LPIPS in the paper."""
    return (f"train.py --out RUN/tokenizer --data DATA --size {t['size']} {image} {t['recipe']} "
            f"{OBJECTIVES[cell.objective]} --perceptual efficientnet --steps {t['steps']} "
            f"--seed {cell.seed} --precision {t['precision']} {also}")


def generation_stages(cell, t, data, steps, decoders):
    """-> {stage: command}: latents, one DiT, and samples that each decoder decodes

    data      DATA or TEN
    decoders  {suffix of stages and folders: folder of a decoder}
    """
    seeded = f"--precision {t['precision']} --seed {cell.seed}"
    here = f"RUN/{data.lower()}"
    commands = {
        f"latents-{data}": f"dit.py latents RUN/tokenizer --data {data} "
                           f"--precision {t['precision']} --out {here}/latents --fresh",
        f"dit-{data}": f"dit.py train {here}/latents --out {here}/dit {t['dit_recipe']} "
                       f"--steps {steps} {seeded}",
    }
    pairs = " ".join(f"--decoder {decoder} {here}/at-{suffix}/samples"
                     for suffix, decoder in decoders.items())
    commands[f"sample-{data}"] = (f"study/sample_decoders.py {here}/dit {pairs} --n {t['samples']} "
                                  f"--points {t['points']} {seeded} --fresh")
    for suffix in decoders:
        out = f"{here}/at-{suffix}"
        measure = f"--run RUN/tokenizer --data {data} --out {out} --limit {t['samples']}"
        commands |= {
            # the first cell stores the statistics of the real images: see run_stage
            f"fid-{data}-{suffix}": f"eval.py fid {out}/samples {measure} --features efficientnet "
                                    f"--train-limit {t['probe']} --reference REAL-{data}",
            f"judge-{data}-{suffix}": f"eval.py fid {out}/samples {measure} --features classifier "
                                      f"{t['classifier']}",
        }
        if "inception" in t["features"]:
            commands[f"inception-{data}-{suffix}"] = (
                f"eval.py fid {out}/samples {measure} --features inception "
                f"--train-limit {t['probe']}")
    return commands


def photograph_measures(t, tokenizer, decoders):
    """-> {stage: command}: probe of the latents; reconstructions of each decoder"""
    measure = f"--data DATA --limit {t['samples']}"
    commands = {"probe": f"eval.py probe {tokenizer} {measure} --out RUN "
                         f"--train-limit {t['probe']}"}
    for suffix, decoder in decoders.items():
        commands[f"recon-{suffix}"] = (f"eval.py recon {decoder} --perceptual none {measure} "
                                       f"--out RUN/data/at-{suffix} --features efficientnet")
    return commands


# ---------------------------------------------------------------- matched reconstruction
def matched_cells(quick):
    return [Cell(objective, seed) for seed in range(1 if quick else 2)
            for objective in ("AE", "ALL")]


def matched_stages(cell, t, also):
    """-> {stage: command}, as race_stages. All decoders of a cell decode the samples of one DiT,
    because the latents stay the same in every bit.

    AE   its own decoder, and new decoders on the frozen latents. The shorter they are trained, the
         worse are their reconstructions, so that the quality of ALL's lies between two of them.
    ALL  its own decoder, and the same one after further training on the frozen latents
    """
    stage2 = (f"--w-gan 0 --perceptual efficientnet {t['decoder_recipe']} --data DATA "
              f"--seed {cell.seed} --precision {t['precision']}")
    commands = {"tokenizer": tokenizer_command(cell, t, also, t["image"])}
    decoders = {"own": "RUN/tokenizer"}
    if cell.objective == "AE":
        commands["untrained"] = (f"study/new_decoder.py RUN/tokenizer --out RUN/untrained "
                                 f"--seed {cell.seed}")
        for steps in t["new_decoder_steps"].split():
            decoders[f"new_{steps}"] = f"RUN/new_{steps}"
            commands[f"new_{steps}"] = (f"train.py --stage 2 --init RUN/untrained "
                                        f"--out RUN/new_{steps} {stage2} --steps {steps}")
    else:
        decoders["more"] = "RUN/more"
        commands["more"] = (f"train.py --stage 2 --init RUN/tokenizer --out RUN/more {stage2} "
                            f"--steps {t['more_decoder_steps']}")
    return (commands | photograph_measures(t, "RUN/tokenizer", decoders)
            | generation_stages(cell, t, "DATA", t["dit_steps"], decoders)
            | generation_stages(cell, t, "TEN", t["few_dit_steps"], decoders))


# ---------------------------------------------------------------- wide latents
def wide_cells(quick):
    cells = [Cell(objective, seed, width=width) for seed in (0, 1) for width in (48, 16, 32)
             for objective in ("AE", "ALL")]
    return cells[:2] if quick else cells


def wide_stages(cell, t, also):
    """-> {stage: command}, as race_stages"""
    decoders = {"own": "RUN/tokenizer"}
    image = f"{t['image']} --latent-dim {cell.width}"
    return ({"tokenizer": tokenizer_command(cell, t, also, image)}
            | photograph_measures(t, "RUN/tokenizer", decoders)
            | generation_stages(cell, t, "TEN", t["dit_steps"], decoders))


# part: (its constants, function -> cells, function -> commands)
PARTS = {"race": (RACE, race_cells, race_stages),
         "matched": (MATCHED, matched_cells, matched_stages),
         "wide": (WIDE, wide_cells, wide_stages)}


def constants_of(args):
    """-> {name: value} of the constants of this part and scale; all become part of a result"""
    table = CONSTANTS | PARTS[args.part][0]
    found = {name: values[args.gpu] for name, values in table.items()}
    found["precision"] = args.precision
    if args.part != "race":
        found["features"] = "efficientnet"
        if args.gpu and has_inception():
            found["features"] += " inception"              # then FID is measured, too
    return found


def has_inception():
    """True if Inception's weights were fetched: python eval.py fetch inception"""
    try:
        return bool(weights.find("inception"))
    except FileNotFoundError:
        print("FID is not measured, because Inception's weights are missing; to measure it, type "
              "`python eval.py fetch inception` first")
        return False


def stages(cell, args):
    """-> {stage: command} of a cell, in the order in which they run"""
    commands = PARTS[args.part][2](cell, args.constants, args.also)
    return {stage: " ".join(command.split()) for stage, command in commands.items()}


# ---------------------------------------------------------------- execution of a cell
stop_requested = threading.Event()
shared_file_lock = threading.Lock()         # held while a command writes a file for all cells


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
        # {stage: result of run_command}
        done = (read_lines(folder / "done.json") or [{}])[0]
        for stage, command in stages(cell, args).items():
            if done.get(stage, {}).get("exit") == 0:
                continue
            file = shared_file(command, args)
            with shared_file_lock if file and not file.exists() else nullcontext():
                done[stage] = run_stage(cell, stage, command, args, folder, lock,
                                        done.get(stage, {}))
            atomic_write(folder / "done.json", lambda path: path.write_text(json.dumps(done)))
            if done[stage]["exit"]:
                raise RuntimeError(failure(stage, done[stage], folder))
        save_results(cell, folder, done, args)


def shared_file(command, args):
    """-> the file of this command that all cells share, or None: the classifier, or the statistics
    of the real images. The first cell writes it."""
    data = "TEN" if " --data TEN" in command else "DATA"
    if "--features classifier" in command:
        return args.work / f"judge-{data}.safetensors"
    return args.work / f"REAL-{data}.npz" if f"REAL-{data}" in command else None


def run_stage(cell, stage, command, args, folder, lock, before):
    """Run the command of one stage -> result of run_command"""
    shared = shared_file(command, args)
    if "REAL" in command and not shared.exists():
        # no reference yet: this command computes the statistics, and stores them
        command = command.replace("--reference REAL", "--set save_real=REAL")
    own = None                                            # the classifier in the folder --out
    if "--features classifier" in command:
        out = re.search(r"--out RUN(\S*)", command)[1]
        own = folder / out.lstrip("/") / "judge.safetensors"
        own.parent.mkdir(parents=True, exist_ok=True)
        if shared.exists() and not own.exists():
            os.link(shared, own)
    result = run_command(cell, stage, command, args, folder, lock, before)
    if own and own.exists() and not shared.exists():
        os.link(own, shared)                              # a link is atomic, a copy is not
    return result


def run_command(cell, stage, command, args, folder, lock, before):
    """Run one command in a process of its own.

    before  result of the same command before an interruption, or {}; its times are added
    -> {"command": text, "exit": exit status, "seconds": duration, "cpu": CPU time in seconds}
    """
    # one write with its newline, because cells run at the same time
    print(f"{time.strftime('%H:%M')} {cell.name}: {stage}\n", end="", flush=True)
    paths = {"DATA": args.data, "RUN": os.path.relpath(folder, ROOT),
             "TEN": os.path.relpath(args.work / "ten", ROOT)}
    for data in ("DATA", "TEN"):
        paths[f"REAL-{data}"] = os.path.relpath(args.work / f"REAL-{data}.npz", ROOT)

    def path_of(match):
        return match[1] + paths[match[2]]

    pattern = r"^((?:save_real=)?)(REAL-DATA|REAL-TEN|DATA|TEN|RUN)\b"
    words = [re.sub(pattern, path_of, word) for word in shlex.split(command)]
    threads = {} if args.gpu else {"OMP_NUM_THREADS": "1"}    # small models gain little from two
    with open(folder / "out.txt", "a") as out:
        start = time.time()
        # in a new session, so that Ctrl-C in the terminal does not interrupt the command directly
        process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=out, stderr=out,
                                   pass_fds=[lock.fileno()], start_new_session=True,
                                   env=os.environ | threads)
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


def read_metrics(path):
    """metrics.jsonl -> {name: its last line}"""
    return {m["name"]: m for m in read_lines(path)}


def save_results(cell, folder, done, args):
    """Write the line of a finished cell to results.jsonl and its shortened logs to logs/, and
    delete its large files. An image of samples is kept in logs/ if they are not photographs.

    metrics  {name: value} of the tokenizer
    curve    {key: {name: value}} of the folders at-*. The key of RUN/at-250, samples of a DiT after
             250 steps, is 250; that of RUN/ten/at-own is ten-own
    """
    measured = read_metrics(folder / "metrics.jsonl")
    curve, protocol = {}, {}
    for path in sorted(folder.glob("**/at-*/metrics.jsonl")):
        found = read_metrics(path)
        key = "-".join(path.parent.relative_to(folder).parts).replace("at-", "")
        curve[key] = {name: m["value"] for name, m in found.items()}
        protocol |= found
    logs = {path.parent.relative_to(folder).as_posix(): read_lines(path)
            for path in sorted(folder.glob("**/log.jsonl"))}
    line = {"cell": cell.name, "part": args.part, **asdict(cell), "data": args.data_name,
            "gpu": args.gpu, "machine": args.machine, "constants": args.constants,
            "metrics": {name: m["value"] for name, m in measured.items()}, "curve": curve,
            "gflops_a_step": {stage: log[0].get("gflops") for stage, log in logs.items()}}
    for name, key in (("seconds", "seconds"), ("cpu_seconds", "cpu"), ("commands", "command")):
        line[name] = {stage: result[key] for stage, result in done.items()}
    line["protocol"] = {name: m["protocol"].replace(args.data, "DATA")
                        for name, m in (protocol | measured).items()}

    (args.out / "logs").mkdir(exist_ok=True)
    text = "".join(json.dumps(x) + "\n" for x in shorten_logs(logs))
    (args.out / "logs" / f"{cell.name}.jsonl").write_text(text)
    for grid in folder.glob("**/samples/grid.png"):
        name = "-".join(grid.parent.relative_to(folder).parts)      # data-at-own-samples
        shutil.copy(grid, folder / f"{name}.png")
        if args.data.startswith("shapes"):
            # 64 colours: a third of the size
            Image.open(grid).quantize(64).save(args.out / "logs" / f"{cell.name}.png")
    with open(args.out / "results.jsonl", "a") as f:
        f.write(json.dumps(line) + "\n")
    for large in (*folder.glob("*/"), folder / "done.json", folder / "metrics.jsonl"):
        shutil.rmtree(large) if large.is_dir() else large.unlink(missing_ok=True)


def link_classes(data, out, classes):
    """Create a data folder with links to these classes of another one."""
    for split in ("train", "val"):
        (out / split).mkdir(parents=True, exist_ok=True)
        for name in classes:
            if not Path(data, split, name).is_dir():
                raise ValueError(f"{data} has no class {split}/{name}, which is one of the 10 "
                                 f"classes of this part; wanted imagenet64 or ImageNet itself")
            if not (out / split / name).exists():
                (out / split / name).symlink_to(Path(data, split, name).resolve())


def shorten_logs(logs):
    """logs {stage: lines of its log} -> at most 20 lines of each, evenly spaced"""
    for stage, log in logs.items():
        n = min(20, len(log))
        for k in range(n):
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
    """-> rows of results.jsonl with the same data"""
    return [r for r in read_lines(args.out / "results.jsonl") if r["data"] == args.data_name]


def check_results(args):
    """ValueError if results.jsonl, or an unfinished cell in the work folder, has other constants or
    --also, because such results must not be compared"""
    others = [r["cell"] for r in finished_rows(args) if r["constants"] != args.constants]
    if others:
        raise ValueError(f"{args.out / 'results.jsonl'} has cells with other images, constants, "
                         f"precision or --also ({', '.join(others)}; see their 'constants'); use "
                         f"another --out")
    path = args.work / "about.json"
    settings = {"data": args.data} | args.constants
    if (read_lines(path) or [settings])[0] != settings:
        raise ValueError(f"{args.work} was started with other images, constants, precision or "
                         f"--also (see its about.json); use another --out")
    if not args.list:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings))


def complete(args):
    """Check args, and add derived values:

    data_name   name of the data in results.jsonl
    out, work   absolute paths: folder of the results, folder of the cells
    constants   the values of CONSTANTS and of the part, --also, the number of training images
    machine     name of the precision's hardware: all cells of a seed should have the same
    """
    if args.part == "race" and args.data is None:
        args.data = SHAPES
    if args.data is None:
        raise ValueError(f"{args.part} needs photographs: give --data DIR with class folders "
                         f"DIR/train/CLASS/x.jpg and DIR/val/CLASS/y.jpg")
    photographs = not args.data.startswith("shapes")
    if photographs:
        if not (Path(args.data, "train").is_dir() and Path(args.data, "val").is_dir()):
            raise ValueError(f"{args.data} has no folders train/ and val/; wanted class folders, "
                             f"such as ImageNet at 64 px: DIR/train/CLASS/x.jpg and "
                             f"DIR/val/CLASS/y.jpg")
        args.data = str(Path(args.data).resolve())
    args.data_name = Path(args.data).name if photographs else args.data
    if args.out is None:
        args.out = ROOT / ("runs" if args.quick or args.gpu else "study") / args.part
        if args.quick or args.gpu:
            args.out = args.out.with_name(args.part + args.quick * "-quick" + args.gpu * "-gpu")
    args.out = Path(args.out).resolve()
    name = "-".join(Path(os.path.relpath(args.out, ROOT)).parts)
    args.work = ROOT / "runs" / "study" / name / args.data_name.partition(":")[0]
    device = torch.device("cuda" if args.gpu else "cpu")
    args.precision = args.precision or choose_precision(device)
    capability = torch.backends.cpu.get_cpu_capability()
    args.machine = torch.cuda.get_device_name() if args.gpu else f"cpu {capability}"
    images = sum(1 for _ in Path(args.data, "train").glob("*/*"))
    args.constants = {"training_images": images, "also": args.also}
    args.constants |= {name: str(value) for name, value in constants_of(args).items()}


def selected_cells(args):
    """-> list of the cells that --only selects"""
    cells = PARTS[args.part][1](args.quick)
    found = [c for c in cells if fnmatch(c.name, args.only)]
    if not found:
        raise ValueError(f"--only {args.only!r} matches no cell; the cells are: "
                         f"{', '.join(c.name for c in cells)}")
    return found


def print_list(selected, left, args):
    """Print the state of each selected cell."""
    rows = {r["cell"]: r for r in finished_rows(args)}
    for c in selected:
        state = "left"
        if c not in left:
            seconds = sum(rows[c.name]["seconds"].values())
            missing = [stage for stage in stages(c, args) if stage not in rows[c.name]["commands"]]
            state = f"finished in {seconds / 60:.0f} min"
            if missing:
                state += f" without {', '.join(missing)}; to repeat it, delete its line"
        print(f"{c.name:28s} {state}")
    print(f"{len(left)} of {len(selected)} cells left", flush=True)


def main(args):
    complete(args)
    selected = selected_cells(args)
    check_results(args)
    done = {r["cell"] for r in finished_rows(args)}
    left = [c for c in selected if c.name not in done]
    print_list(selected, left, args)
    if args.list:
        return
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part != "race":
        efficientnet.load_network()             # if it is not installed, fail before the training
        link_classes(args.data, args.work / "ten", TEN)
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
    p.add_argument("part", choices=list(PARTS), help="the question; see study/protocol.md")
    p.add_argument("--quick", action="store_true", help="only the cells that matter most, one seed")
    p.add_argument("--gpu", action="store_true",
                   help="the scale of one GPU and one evening: 64 px, tokenizer S, DiT B")
    p.add_argument("--data", help="photographs: a folder with train/ and val/, which contain class "
                                  "folders. race: default the built-in shapes")
    p.add_argument("--only", default="*", metavar="GLOB",
                   help="only cells whose name matches, for example 'ALL*'")
    p.add_argument("--jobs", type=int, default=1,
                   help="number of cells that run at the same time, with one thread each. Use the "
                        "number of cores, because small models gain little from a second thread")
    p.add_argument("--precision", choices=["fp32", "bf16"],
                   help="of tokenizer and DiT (default: bf16 if the hardware multiplies it, else "
                        "fp32). Results of two precisions are not mixed")
    p.add_argument("--list", action="store_true", help="print the cells and their state, and exit")
    p.add_argument("--also", default="", metavar="FLAGS",
                   help="additional flags of train.py for every tokenizer, for example "
                        "--also='--set heads_after_bottleneck=true'; needs another --out")
    p.add_argument("--out",
                   help="folder of results.jsonl and logs/ (default: study/PART, or with --quick "
                        "or --gpu runs/PART-...). Cells that are finished in one folder are "
                        "repeated in another one")
    return p


if __name__ == "__main__":
    try:
        main(parser().parse_args())
    except (ValueError, OSError) as problem:
        raise SystemExit(f"study.py: {problem}") from None
