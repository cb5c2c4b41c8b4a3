"""A run is a folder with its settings, its log and its checkpoints. The same command continues it.

    run.json        the settings                    metrics.jsonl   measured numbers, one per line
    log.jsonl       logged steps, one per line      last.pt, previous.pt   two newest checkpoints

    run = Run(args.out, settings, args.fresh)       opens the folder; run.step is the next step
    run.restore(state)                              state {name: object with state_dict()}
    run.start(args, images_per_step, device, precision, export)
    batches = run.watch(batches)                    measures the time spent waiting for data
    for step in range(run.step, args.steps):
        ...
        finite, stop = run.agree(losses, grad_norm) equal on all ranks
        ...
        run.after_step(step, losses, diagnostics, grad_norm, lr, state)     logs and saves
        if stop:
            break
    return run.finish()                             exit status

All ranks call these methods and read the folder; only rank 0 writes to it.
"""
import json
import math
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
from tqdm import tqdm

from .config import atomic_write
from .device import peak_flops, peak_memory
from .dist import all_reduce_mean, all_reduce_sum, barrier, print0, rank, under_torchrun

# settings that may change when a run is continued: speed, memory, files, number of steps
MUTABLE_FLAGS = {"steps", "workers", "device", "log_every", "save_every", "micro", "recompute",
                 "compile", "max_bad", "out", "fresh", "val_data", "machine", "fast", "free_memory",
                 "previews", "memory_check", "grad_dtype"}
# fields of a log line that depend on the speed of the machine, so they differ between equal runs
TIMING = {"images_per_s", "gflops", "share_of_peak", "data_wait"}
EXIT_RESUME = 75       # exit status after a signal: EX_TEMPFAIL in sysexits.h, "try again later"
# Skipped steps in a row that end a run (ours). With fp16, up to 16 in a row are normal: the loss
# scale starts at 2^16 and is halved after each skipped step.
MAX_BAD_STEPS = 25


class Run:
    def __init__(self, folder, settings, fresh=False, files=None):
        """Open the folder of a run; create it if it does not exist.

        settings  dict of flags, stored in run.json
        fresh     delete the run that the folder contains
        files     {setting that is a path: what it names}; the same files may have another path when
                  the run is continued
        self.step is the next step: 0, or the number of steps completed in the checkpoint. Raises
        ValueError if the folder contains a run with other settings or other weights, if none of
        its checkpoints can be read, or if another process uses it.
        """
        from .extras import checkpoints, rendezvous, run_folder
        self.folder = Path(folder)
        # as JSON returns them (tuples become lists), to compare them with those of the checkpoint
        self.settings = json.loads(json.dumps(settings))
        self.stop_requested = False        # this process has received a signal
        self.stopping = False              # some process has received one, so all stop
        self.last_is_damaged = False       # last.pt cannot be read, so previous.pt must be kept
        self.unreadable = 0                # unreadable samples on this rank
        self.reported = set()              # their names
        self.skipped = 0                   # steps without an update
        self.bad_steps = 0                 # steps without an update since the last update
        self.files = run_folder.fingerprints(files)
        # torchrun and Slurm repeat a command with its flags; --fresh must not delete its run then
        fresh = fresh and not rendezvous.restarted()
        run_folder.open_on_all(self.folder, self.settings, fresh, self.files)
        self.checkpoint = None             # its tensors are mapped from the file, not in memory
        if not fresh:
            self.checkpoint, self.last_is_damaged = checkpoints.load_newest(self.folder)
        self.step = 0
        if self.checkpoint:
            run_folder.check_settings(self.folder, self.checkpoint, self.settings, self.files,
                                      MUTABLE_FLAGS)
            self._resume()
        if rank() == 0:
            run_folder.prepare(self.folder, self.settings, self.step)

    # ------------------------------------------------------------ opening
    def _resume(self):
        """Take the counters of the checkpoint."""
        self.step = self.checkpoint["step"]
        self.skipped = self.checkpoint["skipped"]
        # the saved count is a sum over ranks, so only one rank may start from it
        self.unreadable = self.checkpoint.get("bad", 0) if rank() == 0 else 0
        print0(f"{self.folder} holds a checkpoint of step {self.step}: training continues from it "
               f"(--fresh starts over)")

    def restore(self, state):
        """Load the checkpoint, if there is one, into state {name: object with load_state_dict()}"""
        if self.checkpoint:
            from .extras import checkpoints
            checkpoints.restore(self.checkpoint, state)
        self.checkpoint = None                                # closes the file

    def start(self, args, images_per_step, device, precision, export, flops=0, check=None):
        """Prepare the loop. Call this once, directly before it.

        args     steps, log_every, save_every; max_bad if samples can be unreadable
        images_per_step  over all processes
        export   function of the step; writes the weights in the format that other programs read
        flops    FLOPs of a step on this process, or 0 if unknown
        check    (step, {name: logged value}) -> a warning for the log, or ""
        """
        self.args, self.images_per_step, self.device = args, images_per_step, device
        self.export, self.flops, self.check = export, flops, check
        from .extras.workers import wait_warning
        self.warn_of_wait = wait_warning(getattr(args, "workers", 0))
        # FLOP/s of a matrix product, measured before the loop: the reference of share_of_peak
        self.peak = peak_flops(device, precision) if flops else None
        self._catch_signals()
        if rank() == 0 and self.step >= args.steps:
            # The run is complete, but a signal or a full disk may have prevented its export.
            export(self.step)
        self.bar = ProgressBar(total=args.steps, initial=self.step, desc=Path(sys.argv[0]).stem,
                               unit="step", disable=rank() > 0, dynamic_ncols=True)
        self._reset_timer()

    def _reset_timer(self):
        """Begin a new interval, over which the speed is averaged."""
        self.interval_start = time.perf_counter()
        self.wait_seconds = 0.0
        self.interval_steps = 0

    # ------------------------------------------------------------ in the loop
    def watch(self, batches):
        """Yield the batches; measure the waiting time and report unreadable samples, batch.bad."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.wait_seconds += time.perf_counter() - start
            if batch is None:
                return
            for name in getattr(batch, "bad", ()):            # batches of latents have no `bad`
                self._report_unreadable(name)
            yield batch

    def _report_unreadable(self, name):
        """Count a sample. Its name is printed once, by the rank that tried to read it."""
        self.unreadable += 1
        if name not in self.reported:
            print(f"skipped {name}: another sample takes its place", file=sys.stderr, flush=True)
            self.reported.add(name)

    def agree(self, losses, grad_norm):
        """losses {name: ()}, grad_norm () -> finite (bool), stop (bool), equal on all ranks

        finite  every loss and the gradient norm are finite on every rank, so the optimizer may
                take its step. Both are checked, because an infinite L1 can have finite gradients.
        stop    some process received a signal: leave the loop after this step
        Raises ValueError after MAX_BAD_STEPS steps in a row that were not finite.
        """
        # to(grad_norm): in its dtype and on its device
        values = torch.stack([x.detach().to(grad_norm) for x in (*losses.values(), grad_norm)])
        # If each rank decided by itself, one could skip a step that the others take, and the copies
        # of the weights would differ. One all_reduce for both flags; tolist waits for the device.
        flags = [~values.isfinite().all(), values.new_full((), self.stop_requested).bool()]
        not_finite, stop = all_reduce_sum(torch.stack(flags).float()).tolist()
        self.stopping = stop > 0
        if not_finite == 0:
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

        step         number of the step, from 0; files count completed steps, from 1
        losses, diagnostics  {name: () tensor, which is averaged over ranks, or another value}
        grad_norm, lr        () tensor and float, for the log
        state        {name: object with state_dict()}, for the checkpoint
        """
        args = self.args
        done = step + 1                                       # completed steps
        self.interval_steps += 1
        # the first and the last step are always logged, the last one is always saved
        log = done % args.log_every == 0 or done in (1, args.steps)
        save = done % args.save_every == 0 or done == args.steps or self.stopping
        # on all ranks, because it sums over ranks; only in these steps, because it takes time
        unreadable = self._count_unreadable(done) if log or save else 0
        if log:
            values = average_over_ranks(losses | diagnostics)
            warning = self.check(step, values) if self.check else ""
            if warning:
                values["warning"] = warning
            self._log_step(done, values | {"lr": lr, "grad_norm": grad_norm.item()}, unreadable)
        self.bar.update()
        if save and rank() == 0:
            # the checkpoint first: if the export fails, the next start can repeat it
            self.save(done, state, unreadable)
            self.export(done)
        if log or save:
            self._reset_timer()                               # saving is not training time

    def _count_unreadable(self, done):
        """-> number of unreadable samples on all ranks. Raises ValueError if there are too many."""
        count = int(all_reduce_sum(torch.tensor(self.unreadable, device=self.device)))
        # another sample replaced each unreadable one, so these are additional to the images used
        total = count + done * self.images_per_step
        # up to 10 are always allowed: at the start of a run they can be a large fraction
        if count > 10 and count > self.args.max_bad * total:
            raise ValueError(f"{count} of {total} samples could not be read, more than the "
                             f"fraction max_bad = {self.args.max_bad:g}; check the files named "
                             f"above (python data.py --data ... shows them too), or allow more "
                             f"with --set max_bad=FRACTION")
        return count

    def _log_step(self, done, values, unreadable):
        seconds = (time.perf_counter() - self.interval_start) / self.interval_steps
        self.bar.set_postfix_str(postfix(values))
        if hasattr(self.args, "max_bad"):
            values["bad"] = unreadable                        # samples, since step 0
        if self.skipped:
            values["skipped"] = self.skipped
        values["images_per_s"] = self.images_per_step / seconds
        if self.flops:
            values["gflops"] = self.flops / 1e9
            # model FLOPs utilisation, relative to the measured speed of a matrix product
            values["share_of_peak"] = self.flops / seconds / self.peak
        values["data_wait"] = self.wait_seconds / self.interval_steps / seconds
        self.warn_of_wait(values["data_wait"])
        self.log(done, **values)

    def log(self, step, **values):
        """Append a line to log.jsonl. Tensors become numbers; inf and nan become strings."""
        if rank() > 0:
            return
        line = {"step": step} | {name: to_json(value) for name, value in values.items()}
        try:
            from .extras.run_folder import append_line
            append_line(self.folder / "log.jsonl", line)
        except OSError as error:
            raise ValueError(f"{self.folder}/log.jsonl cannot be written ({error}); the last "
                             f"checkpoint is complete: free some space and run the same command "
                             f"again") from error

    def save(self, step, state, unreadable=0):
        """Write last.pt; the old last.pt becomes previous.pt. step: number of completed steps"""
        if rank() > 0:
            return
        checkpoint = {name: part.state_dict() for name, part in state.items()}
        checkpoint |= {"step": step, "settings": self.settings, "skipped": self.skipped,
                       "bad": unreadable}
        if self.files:
            checkpoint["files"] = self.files
        # a damaged last.pt must not replace a previous.pt that can be read
        keep = None if self.last_is_damaged else self.folder / "previous.pt"
        atomic_write(self.folder / "last.pt", lambda path: torch.save(checkpoint, path), keep=keep)
        self.last_is_damaged = False

    def finish(self):
        """-> exit status: 0, or EXIT_RESUME if a signal ended the run before its last step"""
        self.bar.close()
        barrier()                  # rank 0 may still be saving; a cluster may end a job early
        end = "done"
        if self.stopping:
            end = (f"stopped by a signal and saved; the same command continues "
                   f"(exit status {EXIT_RESUME})")
        print0(f"{self.folder}: {end}. Peak memory {peak_memory(self.device):.2f} GB.")
        return EXIT_RESUME if self.stopping else 0

    # ------------------------------------------------------------ signals
    def _catch_signals(self):
        """After SIGTERM, SIGINT (Ctrl-C), SIGUSR1 or SIGHUP, the loop finishes its step, saves and
        stops.

        A cluster such as Slurm can send SIGTERM or SIGUSR1 before the time limit of a job. SIGHUP
        is sent when a terminal is closed; nohup ignores it.

        A second Ctrl-C stops immediately, except under torchrun: there, a worker may receive one
        Ctrl-C twice, from the terminal and from torchrun. torchrun kills workers that are still
        running after 30 seconds.
        """
        # A handler only sets a flag, because a signal can arrive at any instruction. `agree` reads
        # the flag, so that all ranks stop after the same step.
        def request_stop(number, frame):
            self.stop_requested = True

        def interrupt(number, frame):
            self.stop_requested = True
            hint = ""
            if under_torchrun():
                signal.signal(signal.SIGINT, request_stop)
            else:
                signal.signal(signal.SIGINT, signal.default_int_handler)      # KeyboardInterrupt
                hint = "; press Ctrl-C again to stop immediately"
            # print raises RuntimeError if the signal has interrupted another print
            with suppress(RuntimeError):
                print0(f"\nstopping after this step{hint}")

        signal.signal(signal.SIGTERM, request_stop)
        signal.signal(signal.SIGUSR1, request_stop)
        signal.signal(signal.SIGINT, interrupt)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:         # else under nohup
            signal.signal(signal.SIGHUP, request_stop)


def average_over_ranks(values):
    """{name: () tensor, or another value} -> the same dict; tensors become means over ranks, float

    Other values must be equal on all ranks: they are returned as they are.
    """
    tensors = {name: x for name, x in values.items() if torch.is_tensor(x)}
    # one all_reduce for all names
    means = all_reduce_mean(torch.stack([x.detach().float() for x in tensors.values()])).tolist()
    return values | dict(zip(tensors, means))


def postfix(values):
    """The first six numbers as text, for the progress bar"""
    numbers = [f"{name} {x:.3f}" for name, x in values.items() if isinstance(x, float)]
    return " ".join(numbers[:6])


def to_json(value):
    """Value for a line of JSON: floats with six significant digits; tensors become numbers.

    inf and nan become the strings 'inf' and 'nan', because JSON has no such numbers.
    """
    if torch.is_tensor(value):
        value = value.item()
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else str(value)


def record_metric(folder, name, value, protocol, **more):
    """Print a measured number with its protocol, and append it to metrics.jsonl in `folder`.

    more  further fields of the line, for example the step
    """
    print0(f"{name:28s} {value:10.4g}   {protocol}")
    if rank() > 0:
        return
    # released weights can be named by a Hub id, for which there is no folder
    if not Path(folder).is_dir():
        print0(f"(not saved: {folder} is not a folder)")
        return
    line = {"name": name, "value": to_json(value), "protocol": protocol, **more}
    from .extras import model_card
    from .extras.run_folder import append_line
    try:
        append_line(Path(folder) / "metrics.jsonl", line)
        model_card.update(folder)
    except OSError as error:                                  # the other numbers are printed, too
        print0(f"(not saved: {folder}/metrics.jsonl cannot be written, {error.strerror}; "
               f"--out names another folder)")


class ProgressBar(tqdm):
    """tqdm that prints, after one second of measurement, how long the rest takes on this machine.

    At least three items are measured. The first item is excluded, because it includes the warm-up
    of the libraries. Nothing is printed if less than MIN_SECONDS remain.
    """
    MIN_SECONDS = 5.0
    estimate_printed = False
    measurement_start = None                   # (time, number of items), after the first item

    def __iter__(self):
        # tqdm's own loop does not call update for each item
        for item in self.iterable:
            yield item
            self.update()
        self.close()

    def update(self, n=1):
        now = time.perf_counter()
        super().update(n)
        if self.disable or self.total is None or self.estimate_printed:
            return
        if self.measurement_start is None:
            self.measurement_start = now, self.n
            return
        start, first = self.measurement_start
        if now - start < 1 or self.n - first < 3:             # too short to be accurate
            return
        self.estimate_printed = True
        seconds_left = (now - start) / (self.n - first) * (self.total - self.n)
        if seconds_left > self.MIN_SECONDS:
            duration = self.format_interval(seconds_left)
            measured = f"measured over {self.n - first} of {self.total}"
            self.write(f"{self.desc}: about {duration} left on this machine, {measured}",
                       file=sys.stdout)


# ---------------------------------------------------------------- --set name=value
def parse_settings(pairs, defaults):
    """["ema=0.99", ...] -> {"ema": 0.99, ...}, values in the type of their default

    defaults  {name: value}. Raises ValueError for an unknown name, and for a value of another type
              than the default. If the default is None, any value is accepted.
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
            # Numbers, true, false and null are read as JSON, also in Python's spelling (True,
            # None). Any other text remains a string.
            with suppress(ValueError):
                value = json.loads(text.lower().replace("none", "null"))
        if type(default) is float and type(value) is int:
            value = float(value)                              # ema=1 means 1.0
        if type(default) is bool and value in (0, 1):
            value = bool(value)                               # light_decoder=1 means true
        if default is not None and type(value) is not type(default):
            raise ValueError(f"--set {pair}: wanted a value of the type of the default, {default}")
        found[name] = value
    return found
