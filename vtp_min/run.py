"""A run is a folder: what was asked, how it went, and all that going on needs. Serves train.py and dit.py alike.

    run.json        the settings it was started with            metrics.jsonl   one measured number a line, with its protocol
    log.jsonl       one logged step a line                      last.pt, previous.pt   the two newest checkpoints
Rank 0 writes; every rank reads. Checkpoints are written aside and renamed, so that a kill leaves the old one whole.
"""
import json
import math
import os
import signal
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from .dist import rank, say, total, world

FREE = {"steps", "workers", "device", "log_every", "save_every", "out", "fresh", "val_data", "machine"}   # may change when a run goes on
TIMING = {"seconds", "images_per_s", "share_of_peak", "data_wait"}                                        # may differ between equal runs


class Run:
    def __init__(self, folder, settings, fresh=False):
        """folder  the run's folder, made if needed      settings  plain dict of flags      fresh  forget what is there

        self.state is None for a new run, else the dict that `save` was last given (tensors on CPU).
        Raises ValueError when the folder holds a run with other settings.
        """
        self.folder, self.settings = Path(folder), json.loads(json.dumps(settings))
        self.stopping = False
        if fresh and rank() == 0:
            for name in ("last.pt", "previous.pt", "log.jsonl", "metrics.jsonl", "run.json", "config.json", "model.safetensors"):
                (self.folder / name).unlink(missing_ok=True)
        self.state = None if fresh else self._newest()
        if self.state:
            self._refuse_other_settings(self.state["settings"])
            say(f"{self.folder} holds a checkpoint of step {self.state['step']}: training goes on from there (--fresh starts over)")
        if rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_aside(self.folder / "run.json", lambda path: path.write_text(json.dumps(self.settings, indent=2) + "\n"))
            self._drop_lines_beyond(self.state["step"] if self.state else 0)

    def _newest(self):
        for name in ("last.pt", "previous.pt"):
            path = self.folder / name
            if path.exists():
                try:
                    return torch.load(path, map_location="cpu", weights_only=True)
                except Exception as problem:
                    say(f"{path} is damaged ({type(problem).__name__}: {problem}); trying the one before")
        if (self.folder / "last.pt").exists() or (self.folder / "previous.pt").exists():
            raise ValueError(f"no checkpoint in {self.folder} can be read; bring back a whole last.pt, take another --out, or start over with --fresh")

    def _refuse_other_settings(self, old):
        differ = [k for k in sorted(old.keys() | self.settings.keys()) if k not in FREE and old.get(k) != self.settings.get(k)]
        if differ:
            rows = "; ".join(f"{k}: was {old.get(k)!r}, now {self.settings.get(k)!r}" for k in differ)
            raise ValueError(f"{self.folder} was trained with other settings ({rows}); "
                             f"use the old ones, another --out, or --fresh to start over")

    def _drop_lines_beyond(self, step):
        """The log keeps only what the checkpoint knows: a resumed log equals an undisturbed one."""
        path = self.folder / "log.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= step]
            write_aside(path, lambda aside: aside.write_text("".join(line + "\n" for line in kept)))

    def save(self, step, state):
        """Keep the two newest: last.pt becomes previous.pt, then the new one takes its name."""
        if rank() == 0:
            def write(path):
                torch.save({"step": step, "settings": self.settings, **state}, path)
                if (self.folder / "last.pt").exists():
                    os.replace(self.folder / "last.pt", self.folder / "previous.pt")
            write_aside(self.folder / "last.pt", write)

    def log(self, step, **values):
        """One line of log.jsonl; tensors become numbers, and a number that is not finite becomes its name."""
        if rank() == 0:
            with open(self.folder / "log.jsonl", "a") as f:
                f.write(json.dumps({"step": step} | {k: plain(v) for k, v in values.items()}) + "\n")

    def stop_requested(self, device):
        """Has any rank been signalled? All ranks ask in the same step, so all leave together."""
        return bool(total(torch.tensor(float(self.stopping), device=device))) if world() > 1 else self.stopping

    def finish_on_signals(self):
        """SIGTERM, SIGINT and SIGUSR1 are remembered: the loop finishes its step, saves, and leaves."""
        def handler(number, frame):
            self.stopping = True
        for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(s, handler)


def plain(v):
    v = v.item() if torch.is_tensor(v) else v
    return float(f"{v:.6g}") if isinstance(v, float) and math.isfinite(v) else str(v) if isinstance(v, float) else v


def metric(folder, name, value, protocol, **more):
    """Print a measured number with its protocol and append it to metrics.jsonl."""
    say(f"{name:28s} {value:10.4g}   {protocol}")
    if rank() == 0:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with open(Path(folder) / "metrics.jsonl", "a") as f:
            f.write(json.dumps({"name": name, "value": plain(value), "protocol": protocol, **more}) + "\n")


def write_aside(path, write):
    """write(temporary path), flush to disk, rename: the file is either the old one or the new one, never half."""
    aside = path.with_name(path.name + ".part")
    write(aside)
    with open(aside, "rb+") as f:
        os.fsync(f.fileno())
    os.replace(aside, path)


def choose_precision(device):
    """bf16 where the hardware multiplies it, else fp16 on GPUs, else fp32 -> its name

    A CPU has bf16 with AVX512-BF16 or AMX.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu":
        can = torch.cpu.get_capabilities()
        return "bf16" if can.get("avx512_bf16") or can.get("amx_bf16") else "fp32"
    return "fp32"


def autocast(device, precision):
    """A context for the forward pass: 'fp32' does nothing, 'bf16' and 'fp16' cast matrix products."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


def matmul_peak(device, precision, seconds=0.3):
    """The machine's own ceiling: FLOP/s of one large matrix product in this precision, measured now."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    n = 1024 if device.type == "cpu" else 8192
    a = torch.randn(n, n, device=device, dtype=dtype)
    wait = torch.cuda.synchronize if device.type == "cuda" else torch.mps.synchronize if device.type == "mps" else lambda: None
    a @ a
    wait()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        a @ a
        wait()
        count += 1
    return 2 * n ** 3 * count / (time.perf_counter() - start)
