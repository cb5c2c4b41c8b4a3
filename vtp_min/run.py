"""A run is a folder: its settings, its log, and checkpoints from which the same command continues.

    run.json        the settings                    metrics.jsonl   measured numbers, one a line
    log.jsonl       logged steps, one a line        last.pt, previous.pt   two newest checkpoints

    run = Run(args.out, settings, args.fresh)       opens the folder; run.step is the next step
    run.restore(state)                              state {name: what has state_dict()}
    run.start(args, images_per_step, device, precision, export)
    batches = run.watch(batches)                    measures the time spent waiting for data
    for step in range(run.step, args.steps):
        ...
        finite, stop = run.agree(losses, grad_norm) the same answer on all ranks
        ...
        run.after_step(step, losses, diagnostics, grad_norm, lr, state)     logs and saves
        if stop:
            break
    return run.finish()                             exit status

Rank 0 writes; every rank reads.
"""
import json
import math
import os
import signal
import sys
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import torch
from tqdm import tqdm

from .config import atomic_write
from .device import peak_flops, peak_memory
from .dist import (all_reduce_max, all_reduce_mean, all_reduce_sum, print0, rank,
                   under_torchrun)

# settings that may change when a run continues
MUTABLE_FLAGS = {"steps", "workers", "device", "log_every", "save_every", "micro", "recompute",
                 "compile", "max_bad", "out", "fresh", "val_data", "machine", "fast"}
# fields of a log line that may differ between equal runs
TIMING = {"images_per_s", "gflops", "share_of_peak", "data_wait"}
FILES = ("last.pt", "previous.pt", "log.jsonl", "metrics.jsonl", "run.json", "config.json",
         "model.safetensors")
EXIT_RESUME = 75       # exit status after a signal: EX_TEMPFAIL of sysexits, "try again"
MAX_BAD_STEPS = 25     # this many skipped steps in a row end a run (ours; fp16 scaling may need 16)


class Run:
    def __init__(self, folder, settings, fresh=False):
        """Open the folder, which is made if needed.

        settings  dict of flags, stored in run.json      fresh  delete the run that is there
        self.step is the next step: 0, or where the checkpoint stopped. ValueError if the folder
        holds a run with other settings, or no readable checkpoint.
        """
        self.folder, self.settings = Path(folder), json.loads(json.dumps(settings))
        self.stop_requested = False        # this process received a signal
        self.stopping = False              # some process received one: all stop
        self.last_is_damaged = False       # last.pt is unreadable: previous.pt must be kept
        self.unreadable = 0                # unreadable samples on this rank
        self.reported = set()              # their names
        self.skipped = 0                   # steps without an update
        self.bad_steps = 0                 # of these, the last ones in a row
        # torchrun restarts a process with the same flags: --fresh holds for the first start only
        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        if fresh and not restarted:
            self._delete_files()
            self.checkpoint = None
        else:
            self.checkpoint = self._newest_checkpoint()
        self.step = 0
        if self.checkpoint:
            self._continue()
        if rank() == 0:
            self._prepare_folder()

    # ------------------------------------------------------------ opening
    def _delete_files(self):
        if rank() == 0:
            for name in FILES:
                (self.folder / name).unlink(missing_ok=True)

    def _newest_checkpoint(self):
        found = [path for path in (self.folder / "last.pt", self.folder / "previous.pt")
                 if path.exists()]
        for path in found:
            try:
                with zipfile.ZipFile(path) as archive:        # torch.load ignores checksums
                    if archive.testzip():
                        raise ValueError("a checksum is wrong")
                return torch.load(path, map_location="cpu", weights_only=True)
            except Exception as problem:
                print0(f"{path} is damaged ({type(problem).__name__}: {problem}) and ignored")
                self.last_is_damaged = True
        if found:
            raise ValueError(f"no checkpoint in {self.folder} can be read; restore a readable "
                             f"last.pt, take another --out, or start over with --fresh")
        return None

    def _continue(self):
        old, new = self.checkpoint["settings"], self.settings
        differ = []
        for name in sorted(old.keys() | new.keys()):
            if name not in MUTABLE_FLAGS and old.get(name) != new.get(name):
                differ.append(f"{name}: was {old.get(name)!r}, now {new.get(name)!r}")
        if differ:
            raise ValueError(f"{self.folder} was trained with other settings ({'; '.join(differ)});"
                             f" use the old ones, another --out, or --fresh to start over")
        self.step = self.checkpoint["step"]
        self.skipped = self.checkpoint["skipped"]
        self.unreadable = self.checkpoint.get("bad", 0) if rank() == 0 else 0
        print0(f"{self.folder} holds a checkpoint of step {self.step}: training continues there "
               f"(--fresh starts over)")

    def _prepare_folder(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        for unfinished in self.folder.glob("*.part"):         # left by a killed process
            unfinished.unlink()
        text = json.dumps(self.settings, indent=2) + "\n"
        atomic_write(self.folder / "run.json", lambda path: path.write_text(text))
        log = self.folder / "log.jsonl"
        if log.exists():                                      # drop lines after the checkpoint
            lines = [line for line in log.read_text().splitlines() if line.endswith("}")]
            kept = [line + "\n" for line in lines if json.loads(line)["step"] <= self.step]
            atomic_write(log, lambda path: path.write_text("".join(kept)))

    def restore(self, state):
        """state  {name: object with load_state_dict}; loads the checkpoint, if there is one"""
        if self.checkpoint:
            for name, part in state.items():
                part.load_state_dict(self.checkpoint[name])
        self.checkpoint = None                                # free its memory

    def start(self, args, images_per_step, device, precision, export, flops=0, check=None):
        """To be called once, before the loop.

        args     steps, log_every, save_every; max_bad if samples can be unreadable
        images_per_step  over all processes
        export   step -> None; writes the weights that other programs read
        flops    FLOPs of a step on this process, or 0 if unknown
        check    (step, {name: logged value}) -> a warning for the log, or ""
        """
        self.args, self.images_per_step, self.device = args, images_per_step, device
        self.export, self.flops, self.check = export, flops, check
        self.peak = peak_flops(device, precision) if flops else None
        self._check_equal_steps()
        self._catch_signals()
        if rank() == 0 and self.step >= args.steps:
            export(self.step)              # the run was complete, but perhaps stopped before this
        self.bar = ProgressBar(total=args.steps, initial=self.step, desc=Path(sys.argv[0]).stem,
                               unit="step", disable=rank() > 0, dynamic_ncols=True)
        self._reset_clock()

    def _check_equal_steps(self):
        ends = torch.tensor([self.step, -self.step], dtype=torch.float32, device=self.device)
        last, first = all_reduce_max(ends).tolist()
        if last != -first:
            raise ValueError(f"processes found checkpoints of different steps in {self.folder}, "
                             f"from {-first:.0f} to {last:.0f}: --out must lie in a folder that "
                             f"all machines share")

    def _reset_clock(self):
        self.clock, self.waited, self.steps_since = time.perf_counter(), 0.0, 0

    # ------------------------------------------------------------ in the loop
    def watch(self, batches):
        """Yield the batches; measure the waiting time and report unreadable samples, batch.bad"""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            for name in getattr(batch, "bad", ()):
                self._report_unreadable(name)
            yield batch

    def _report_unreadable(self, name):
        """Each name is printed once, by the rank that met it"""
        self.unreadable += 1
        if name not in self.reported:
            print(f"skipped {name}: another sample takes its place", file=sys.stderr, flush=True)
            self.reported.add(name)

    def agree(self, losses, grad_norm):
        """losses {name: ()}, grad_norm () -> finite, stop: equal on all ranks

        finite  every loss and the gradient norm are finite on every rank: take the step. An
                infinite L1 can have finite gradients, so both are looked at.
        stop    some process received a signal: leave the loop after this step
        ValueError after MAX_BAD_STEPS steps in a row that were not finite.
        """
        values = torch.stack([x.detach().to(grad_norm) for x in (*losses.values(), grad_norm)])
        flags = [~values.isfinite().all(), torch.tensor(self.stop_requested, device=values.device)]
        broken, stop = all_reduce_sum(torch.stack(flags).float()).tolist()
        self.stopping = stop > 0
        if broken == 0:
            self.bad_steps = 0
            return True, self.stopping
        self.bad_steps += 1
        self.skipped += 1
        found = ", ".join(f"{name} {x.item():.4g}" for name, x in losses.items())
        print0(f"\nstep skipped: {found}, gradient norm {grad_norm.item():.4g} (on this rank; "
               f"{self.bad_steps} in a row, {self.skipped} in all)")
        if self.bad_steps == MAX_BAD_STEPS:
            raise ValueError(f"{MAX_BAD_STEPS} steps in a row had a loss or gradient that is not "
                             f"finite; earlier checkpoints are kept: try a smaller --lr, a longer "
                             f"--warmup, or --precision fp32")
        return False, self.stopping

    def after_step(self, step, losses, diagnostics, grad_norm, lr, state):
        """Log every args.log_every steps, save every args.save_every steps. All ranks call this.

        losses, diagnostics  {name: () tensor, averaged over ranks; other values stay}
        state    {name: object with state_dict}, for the checkpoint
        """
        args, done = self.args, step + 1
        self.steps_since += 1
        log = done % args.log_every == 0 or done in (1, args.steps)
        save = done % args.save_every == 0 or done == args.steps or self.stopping
        unreadable = self._count_unreadable(done) if log or save else 0
        if log:
            values = all_rank_means(losses | diagnostics)
            warning = self.check(step, values) if self.check else ""
            if warning:
                values["warning"] = warning
            self._log_step(done, values | {"lr": lr, "grad_norm": grad_norm.item()}, unreadable)
        self.bar.update()
        if save and rank() == 0:
            self.save(done, state, unreadable)
            self.export(done)
        if log or save:
            self._reset_clock()

    def _count_unreadable(self, done):
        """-> unreadable samples on all ranks; ValueError if there are too many"""
        count = int(all_reduce_sum(torch.tensor(self.unreadable, device=self.device)))
        total = count + done * self.images_per_step
        if count > 10 and count > self.args.max_bad * total:
            raise ValueError(f"{count} of {total} samples could not be read, more than max_bad "
                             f"{self.args.max_bad:g}; look at the files named above (python "
                             f"data.py --data ... shows them too), or allow more with "
                             f"--set max_bad=SHARE")
        return count

    def _log_step(self, done, values, unreadable):
        seconds = (time.perf_counter() - self.clock) / self.steps_since
        self.bar.set_postfix_str(postfix(values))
        if hasattr(self.args, "max_bad"):
            values["bad"] = unreadable
        if self.skipped:
            values["skipped"] = self.skipped
        values["images_per_s"] = self.images_per_step / seconds
        if self.flops:
            values["gflops"] = self.flops / 1e9
            values["share_of_peak"] = self.flops / seconds / self.peak
        values["data_wait"] = self.waited / self.steps_since / seconds
        self.log(done, **values)

    def log(self, step, **values):
        """Append a line to log.jsonl. Tensors become numbers; inf and nan become strings."""
        if rank() > 0:
            return
        line = {"step": step} | {name: to_json(value) for name, value in values.items()}
        try:
            with open(self.folder / "log.jsonl", "a") as f:
                f.write(json.dumps(line) + "\n")
        except OSError as problem:
            raise ValueError(f"{self.folder}/log.jsonl cannot be written ({problem}); the last "
                             f"checkpoint is complete: free some space, and type the same command "
                             f"again") from problem

    def save(self, step, state, unreadable=0):
        """Keep the two newest checkpoints: last.pt becomes previous.pt, then the new one last.pt"""
        if rank() > 0:
            return
        checkpoint = {name: part.state_dict() for name, part in state.items()}
        checkpoint |= {"step": step, "settings": self.settings, "skipped": self.skipped,
                       "bad": unreadable}
        keep = None if self.last_is_damaged else self.folder / "previous.pt"
        atomic_write(self.folder / "last.pt", lambda path: torch.save(checkpoint, path), keep=keep)
        self.last_is_damaged = False

    def finish(self):
        """-> the exit status: 0, or EXIT_RESUME if a signal ended the run early"""
        self.bar.close()
        end = "done"
        if self.stopping:
            end = (f"stopped by a signal and saved; the same command continues "
                   f"(exit status {EXIT_RESUME})")
        print0(f"{self.folder}: {end}. Peak memory {peak_memory(self.device):.2f} GB.")
        return EXIT_RESUME if self.stopping else 0

    # ------------------------------------------------------------ signals
    def _catch_signals(self):
        """After SIGTERM, SIGINT (Ctrl-C) or SIGUSR1 the loop finishes its step, saves and stops.

        A second Ctrl-C stops at once, except under torchrun: there a worker may receive one Ctrl-C
        twice, from the terminal and from torchrun. torchrun kills workers that are still running
        after 30 seconds.
        """
        def request_stop(number, frame):
            self.stop_requested = True

        def interrupt(number, frame):
            self.stop_requested = True
            again = ""
            if under_torchrun():
                signal.signal(signal.SIGINT, request_stop)
            else:
                signal.signal(signal.SIGINT, signal.default_int_handler)      # KeyboardInterrupt
                again = "; press Ctrl-C again to end at once"
            with suppress(RuntimeError):                      # if the signal interrupted a print
                print0(f"\nstopping after this step{again}")

        signal.signal(signal.SIGTERM, request_stop)
        signal.signal(signal.SIGUSR1, request_stop)
        signal.signal(signal.SIGINT, interrupt)


def all_rank_means(values):
    """{name: () tensor, or another value} -> the same, tensors as numbers averaged over ranks"""
    tensors = {name: x for name, x in values.items() if torch.is_tensor(x)}
    means = all_reduce_mean(torch.stack([x.detach().float() for x in tensors.values()])).tolist()
    return values | dict(zip(tensors, means))


def postfix(values):
    """The first six numbers, for the progress bar"""
    numbers = [f"{name} {x:.3f}" for name, x in values.items() if isinstance(x, float)]
    return " ".join(numbers[:6])


def to_json(value):
    """A float with six digits; inf and nan as strings, which JSON lacks"""
    if torch.is_tensor(value):
        value = value.item()
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else str(value)


def record_metric(folder, name, value, protocol, **more):
    """Print a measured number with its protocol, and append it to metrics.jsonl"""
    print0(f"{name:28s} {value:10.4g}   {protocol}")
    if rank() > 0:
        return
    if not Path(folder).is_dir():
        print0(f"(not kept: {folder} is no folder)")
        return
    line = {"name": name, "value": to_json(value), "protocol": protocol, **more}
    with open(Path(folder) / "metrics.jsonl", "a") as f:
        f.write(json.dumps(line) + "\n")


class ProgressBar(tqdm):
    """tqdm that prints, after one measured second, how long the rest will take on this machine.

    At least three items are measured. The first one is not: it includes the warm-up of the
    libraries. Work of less than SHORT seconds is not announced.
    """
    SHORT = 5.0

    def __iter__(self):
        for item in self.iterable:
            yield item
            self.update()
        self.close()

    def update(self, n=1):
        now = time.perf_counter()
        super().update(n)
        if self.disable or self.total is None or getattr(self, "announced", False):
            return
        if not hasattr(self, "measured_from"):
            self.measured_from = now, self.n
            return
        start, first = self.measured_from
        if now - start < 1 or self.n - first < 3:
            return
        self.announced = True
        rest = (now - start) / (self.n - first) * (self.total - self.n)
        if rest > self.SHORT:
            about = self.format_interval(rest)
            measured = f"measured over {self.n - first} of {self.total}"
            self.write(f"{self.desc}: about {about} left on this machine, {measured}",
                       file=sys.stdout)


# ---------------------------------------------------------------- --set name=value
def parse_settings(pairs, defaults):
    """["ema=0.99", ...] -> {"ema": 0.99, ...}

    defaults  {name: value}. ValueError for an unknown name, or a value of another type than the
    default; a default of None accepts any value.
    """
    found = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or name not in defaults:
            raise ValueError(f"--set {pair}: wanted name=value, where name is one of "
                             f"{', '.join(defaults)}")
        default = defaults[name]
        value = text
        if not isinstance(default, str):
            with suppress(ValueError):                       # what is no JSON stays a string
                value = json.loads(text.lower().replace("none", "null"))
        if type(default) is float and type(value) is int:
            value = float(value)
        if type(default) is bool and value in (0, 1):
            value = bool(value)
        if default is not None and type(value) is not type(default):
            raise ValueError(f"--set {pair}: wanted a value like the default, {default}")
        found[name] = value
    return found
