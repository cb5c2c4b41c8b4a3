"""A run is a folder: what was asked, how it went, and all that going on needs. Serves every training loop alike.

    run.json        the settings it was started with            metrics.jsonl   one measured number a line, with its protocol
    log.jsonl       one logged step a line                      last.pt, previous.pt   the two newest checkpoints

    run = Run(folder, settings, fresh)                          run.state: what the last checkpoint held, or None
    for step, batch in run.walk(args, rows, batches, device, precision, keep):
        ... loss, backward ...
        if run.sound(loss, norm): ... optimizer ...             the same answer on every rank; False: a step is skipped
        if run.due: run.note(**run.means(loss=loss, ...), ...)  what the log says of this step
Rank 0 writes; every rank reads. Checkpoints are written aside and renamed, so that a kill leaves the old one whole.
"""
import ctypes
import json
import math
import os
import resource
import signal
import sys
import time
import zipfile
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from .dist import highest, rank, say, start, total, under_torchrun, world

FREE = {"steps", "workers", "device", "log_every", "save_every", "micro", "recompute", "compile", "max_bad", "out", "fresh", "val_data", "machine"}   # may change when a run goes on
TIMING = {"seconds", "images_per_s", "gflops", "share_of_peak", "data_wait"}        # may differ between equal runs; gflops: of the first step since the start
STOPPED = 75       # exit status of a run that a signal stopped, saved and ready to go on: sysexits' EX_TEMPFAIL, "try again"
SKIPS = 25         # so many unusable steps in a row end a run (ours; the scaler of fp16 may need 16 to find its place)

# The FLOP counter takes some operators apart, which rounds differently: the first step after resuming would not be the step it is elsewhere
AS_IT_IS = {torch.ops.aten.silu_backward: lambda *shapes, out_shape=None: 0}


class Run:
    def __init__(self, folder, settings, fresh=False):
        """folder  the run's folder, made if needed      settings  plain dict of flags      fresh  forget what is there

        self.state is None for a new run, else the dict that `save` was last given (tensors on CPU).
        Raises ValueError when the folder holds a run with other settings.
        """
        self.folder, self.settings = Path(folder), json.loads(json.dumps(settings))
        self.stopping = self.leaving = False                              # this process was signalled; any was, so all leave
        self.damaged = False                                              # last.pt is, and must not take the place of previous.pt
        self.due, self.values, self.flops, self.flops_known = False, {}, 0, False      # flops: of matrix products, a step
        self.bad, self.skipped, self.in_a_row, self.named = 0, 0, 0, set()      # unreadable samples on this rank; unusable steps; names said
        fresh = fresh and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"       # torchrun restarts with the flags it had
        if fresh and rank() == 0:
            for name in ("last.pt", "previous.pt", "log.jsonl", "metrics.jsonl", "run.json", "config.json", "model.safetensors"):
                (self.folder / name).unlink(missing_ok=True)
        self.state = None if fresh else self._newest()
        if self.state:
            self._refuse_other_settings(self.state["settings"])
            say(f"{self.folder} holds a checkpoint of step {self.state['step']}: training goes on from there (--fresh starts over)")
            self.skipped, self.bad = self.state.get("skipped", 0), self.state.get("bad", 0) if rank() == 0 else 0
        self.first = self.state["step"] if self.state else 0              # steps taken so far = number of the next one
        if rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for scrap in self.folder.glob("*.part"):                      # what a kill left half written
                scrap.unlink()
            write_aside(self.folder / "run.json", lambda path: path.write_text(json.dumps(self.settings, indent=2) + "\n"))
            self._drop_lines_beyond(self.first)

    # ------------------------------------------------------------ checkpoints
    def _newest(self):
        for name in ("last.pt", "previous.pt"):
            path = self.folder / name
            if path.exists():
                try:
                    with zipfile.ZipFile(path) as checked:                # torch.load does not look at checksums
                        if checked.testzip():
                            raise ValueError("a checksum is wrong")
                    return torch.load(path, map_location="cpu", weights_only=True)
                except Exception as problem:
                    say(f"{path} is damaged ({type(problem).__name__}: {problem}); trying the one before")
                    self.damaged = True
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
            state = {"step": step, "settings": self.settings, "skipped": self.skipped, **state}
            write_aside(self.folder / "last.pt", lambda path: torch.save(state, path), keep=None if self.damaged else self.folder / "previous.pt")
            self.damaged = False

    # ------------------------------------------------------------ the walk through the steps
    def walk(self, args, rows, batches, device, precision, keep, export=lambda step: None):
        """Yields (step, batch) from self.first to args.steps - 1; between two steps it logs, saves and listens to signals.

        args     steps, log_every, save_every; max_bad where batches name unreadable samples in batch["bad"]
        rows     pictures a step reads, over all processes
        keep     () -> dict of state dicts for the checkpoint      export  (step) -> None, writes the weights that others read
        """
        self.finish_on_signals()
        peak = matmul_peak(device, precision)
        low, high = -highest(torch.tensor(-float(self.first), device=device)), highest(torch.tensor(float(self.first), device=device))
        if low != high:
            raise ValueError(f"processes found checkpoints of different steps in {self.folder}, from {low:.0f} to {high:.0f}: --out must lie in a folder that all machines share")
        if rank() == 0 and 0 < self.first >= args.steps:
            export(self.first)                                            # the run had ended, but perhaps not written this
        bar = ProgressBar(total=args.steps, initial=self.first, desc=Path(sys.argv[0]).stem, unit="step", disable=rank() > 0, dynamic_ncols=True)
        clock = asked = time.perf_counter()
        waited, taken = 0.0, 0                                            # seconds for data, steps: since the last line of the log
        for step, batch in zip(range(self.first, args.steps), batches):
            waited, done, taken = waited + time.perf_counter() - asked, step + 1, taken + 1
            self._report_bad(batch.get("bad", []))
            self.due = done % args.log_every == 0 or done in (1, args.steps)
            yield step, batch
            self.flops_known = True
            save = done % args.save_every == 0 or done == args.steps or self.leaving
            if self.due or save:
                bad = int(total(torch.tensor(self.bad, device=device)))
                if "bad" in batch and bad > 10 and bad > args.max_bad * (bad + done * rows):
                    raise ValueError(f"{bad} of {bad + done * rows} samples could not be read, more than --max-bad {args.max_bad:g}; look at the files "
                                     f"named above (python data.py --data ... shows them too), or allow more with --max-bad")
            if self.due:
                seconds = (time.perf_counter() - clock) / taken           # of a step, on average since the last line
                share = {"gflops": self.flops / 1e9, "share_of_peak": self.flops / seconds / peak} if self.flops else {}
                self.log(done, **self.values, **({"bad": bad} if "bad" in batch else {}), **({"skipped": self.skipped} if self.skipped else {}),
                          images_per_s=rows / seconds, **share, data_wait=waited / taken / seconds)
                bar.set_postfix_str(" ".join(f"{k} {v:.3f}" for k, v in list(self.values.items())[:6] if isinstance(v, float)))
            bar.update()
            if save and rank() == 0:
                self.save(done, keep() | {"bad": bad})
                export(done)
            if self.leaving:
                break
            if self.due or save:
                clock, waited, taken = time.perf_counter(), 0.0, 0
            asked = time.perf_counter()
        bar.close()
        say(f"{self.folder}: {f'stopped on a signal, saved; the same command goes on (exit status {STOPPED})' if self.leaving else 'done'}. "
            f"Peak memory {peak_memory(device):.2f} GB.")

    def sound(self, loss, norm):
        """Can this step be taken? False, on every rank, if loss or gradient norm of any rank is not finite: the step is skipped and counted.

        Ranks ask in the same step, so they also agree here on leaving after a signal. Raises ValueError after SKIPS such steps in a row.
        """
        flags = torch.stack([~(loss.detach().isfinite() & norm.isfinite()), torch.tensor(self.stopping, device=loss.device)]).float()
        broken, self.leaving = total(flags).bool().tolist()
        self.in_a_row = self.in_a_row + 1 if broken else 0
        self.skipped += broken
        if broken:
            say(f"\na step is skipped: loss {loss.item():.4g}, gradient norm {norm.item():.4g} (on this rank; {self.in_a_row} in a row, {self.skipped} in all)")
        if self.in_a_row == SKIPS:
            raise ValueError(f"{SKIPS} steps in a row had a loss or gradient that is not finite; earlier checkpoints are kept: try a smaller --lr, "
                             f"a longer --warmup, or --precision fp32")
        return not broken

    def means(self, **tensors):
        """Tensors () of each rank -> their means over ranks, as numbers; all ranks must ask"""
        means = total(torch.stack([x.detach().float() for x in tensors.values()])) / world()
        return dict(zip(tensors, means.tolist()))

    def note(self, **values):
        """What this step's line of the log says"""
        self.values = values

    @contextmanager
    def counting(self, times=1):
        """Around a part of the first step: the operations of its matrix products, `times` over, are added to what a step costs.

        3 around a forward pass that a backward pass follows, whose products are twice as many: cheaper than to follow them (the counter
        keeps what it sees), and what --recompute does again is not counted.
        """
        if self.flops_known:
            yield
        else:
            with FlopCounterMode(display=False, custom_mapping=AS_IT_IS) as counter:
                yield
            self.flops += times * counter.get_total_flops()

    def _report_bad(self, names):
        """Name each unreadable sample once, on the rank that met it"""
        for name in names:
            if name not in self.named:
                print(f"skipped {name}: another sample takes its place", file=sys.stderr, flush=True)
            self.named.add(name)
            self.bad += 1

    def log(self, step, **values):
        """One line of log.jsonl; tensors become numbers, and a number that is not finite becomes its name."""
        if rank() == 0:
            try:
                with open(self.folder / "log.jsonl", "a") as f:
                    f.write(json.dumps({"step": step} | {k: plain(v) for k, v in values.items()}) + "\n")
            except OSError as problem:
                raise ValueError(f"{self.folder}/log.jsonl cannot be written ({problem}); the last checkpoint is whole: make room, and type the same command again") from problem

    def finish_on_signals(self):
        """After SIGTERM, SIGINT (Ctrl-C) or SIGUSR1 the loop finishes its step, saves and exits.

        A second Ctrl-C stops at once, except under torchrun: there a worker may receive one Ctrl-C
        twice, from the terminal and from torchrun. torchrun kills workers that are still running
        after 30 seconds.
        """
        def finish(number, frame):
            self.stopping = True

        def interrupt(number, frame):
            self.stopping = True
            if under_torchrun():
                signal.signal(signal.SIGINT, finish)
                again = ""
            else:
                signal.signal(signal.SIGINT, signal.default_int_handler)  # raises KeyboardInterrupt
                again = "; press Ctrl-C again to end at once"
            with suppress(RuntimeError):                    # if the signal interrupted a print
                say(f"\nstopping after this step{again}")

        for s in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(s, finish)
        signal.signal(signal.SIGINT, interrupt)


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
            self.write(f"{self.desc}: about {about} left on this machine, {measured}", file=sys.stdout)


def plain(v):
    v = v.item() if torch.is_tensor(v) else v
    return float(f"{v:.6g}") if isinstance(v, float) and math.isfinite(v) else str(v) if isinstance(v, float) else v


def metric(folder, name, value, protocol, **more):
    """Print a measured number with its protocol and append it to metrics.jsonl."""
    say(f"{name:28s} {value:10.4g}   {protocol}")
    if rank() == 0 and not Path(folder).is_dir():
        say(f"(not kept: {folder} is no folder)")
    elif rank() == 0:
        with open(Path(folder) / "metrics.jsonl", "a") as f:
            f.write(json.dumps({"name": name, "value": plain(value), "protocol": protocol, **more}) + "\n")


def write_aside(path, write, keep=None):
    """write(temporary path), flush to disk, rename: the file is either the old one or the new one, never half. keep: a name for the old one"""
    aside = path.with_name(path.name + ".part")
    try:
        write(aside)
        with open(aside, "rb+") as f:
            os.fsync(f.fileno())
    except Exception as problem:                                          # torch and safetensors have errors of their own for a full disk
        aside.unlink(missing_ok=True)
        raise ValueError(f"{path} could not be written ({problem}); what stood there before is whole. If the disk is full, make room: "
                         f"the same command goes on from the last checkpoint") from problem
    if keep and path.exists():
        os.replace(path, keep)
    os.replace(aside, path)


# ---------------------------------------------------------------- the machine
def machine(args):
    """--device, --precision -> the torch.device of this process, the precision's name. fp64 becomes torch's default type."""
    device = start(args.device)
    set_tf32(device, True)
    precision = args.precision or choose_precision(device)
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("--precision fp16 is for GPUs; on a CPU take bf16 or fp32")
    if args.precision:
        warn_if_emulated(device, precision)
    torch.set_default_dtype(torch.float64 if precision == "fp64" else torch.float32)
    return device, precision


def set_tf32(device, on):
    """Whether float32 matrix products on CUDA may round their inputs to TF32 (10 mantissa bits
    instead of 23).

    On for training, as in DINOv2 and OpenCLIP, for encoding latents, as in VTP, and for sampling,
    as in LightningDiT. Off, PyTorch's default, for training the DiT, as in LightningDiT, and for
    evaluation, as in VTP. The forward pass of the losses never uses TF32 (full_precision in
    losses.py). Convolutions always may: this is PyTorch's default for them.
    """
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = on


def tf32_of(device):
    """For printed lines and protocols: ", tf32 on" or ", tf32 off" on CUDA, else nothing"""
    if device.type != "cuda":
        return ""
    return f", tf32 {'on' if torch.backends.cuda.matmul.allow_tf32 else 'off'}"


def move_to(x, device):
    """Copy x to the device, asynchronously only on CUDA.

    On MPS an asynchronous copy may not be complete when x is read.
    """
    return x.to(device, non_blocking=device.type == "cuda")


def give_back_memory(above=2 ** 20):
    """Freed tensors above 1 MB (or that many bytes) go back to the system at once, instead of lying in glibc's heap in pieces: an S step of 32 pictures needs 3.1 GB, not 3.7.
    A small model would gain no memory and lose a fifth of its speed: pages that are given back are cleared before they come again."""
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(-3, above)                              # M_MMAP_THRESHOLD


def choose_precision(device):
    """bf16 where the hardware multiplies it, else fp16 on GPUs, else fp32 -> its name"""
    if multiplies_bf16(device):
        return "bf16"
    return "fp16" if device.type == "cuda" else "fp32"


def multiplies_bf16(device):
    """True if this device is known to multiply bfloat16 in hardware: CUDA that reports it, or an
    x86 CPU with AVX512-BF16 or AMX. Other devices give False.

    ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA (formerly DNNL_MAX_CPU_ISA) can disable these
    instructions. torch.cpu.get_capabilities() ignores them, so they are checked separately.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    hardware = torch.cpu.get_capabilities()
    present = bool(hardware.get("avx512_bf16") or hardware.get("amx_bf16"))
    pytorch_may = torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX", "AVX2")
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "ALL"
    onednn_may = limit.upper().startswith(ISA_WITH_BF16)
    return present and pytorch_may and onednn_may


def warn_if_emulated(device, precision):
    """Print a warning, with the measured slowdown, if bf16 is only emulated on this device.

    MPS is left out: whether a Mac emulates bf16 is not known here.
    """
    if precision != "bf16" or multiplies_bf16(device) or device.type == "mps":
        return
    ratio = matmul_peak(device, "fp32") / matmul_peak(device, "bf16")
    say(f"note         --precision bf16 is only emulated by this {device.type}: a matrix product takes {ratio:.1f} times "
        f"as long as in fp32 (measured now). The default here is {choose_precision(device)}.")


# values of ONEDNN_MAX_CPU_ISA with which oneDNN still multiplies bfloat16
ISA_WITH_BF16 = ("ALL", "DEFAULT", "AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX10")

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device, precision):
    """A context for the forward pass: 'fp32' and 'fp64' do nothing, 'bf16' and 'fp16' cast matrix products."""
    if precision in ("fp32", "fp64"):
        return nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


def matmul_peak(device, precision, seconds=0.3):
    """The machine's own ceiling: FLOP/s of one large matrix product in this precision, measured now."""
    n = 1024 if device.type == "cpu" else 8192
    a = torch.randn(n, n, device=device, dtype=DTYPES[precision])
    wait = torch.cuda.synchronize if device.type == "cuda" else torch.mps.synchronize if device.type == "mps" else lambda: None
    a @ a
    wait()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        a @ a
        wait()
        count += 1
    return 2 * n ** 3 * count / (time.perf_counter() - start)


def peak_memory(device):
    """GB, of this process"""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)      # bytes on macOS, else KiB
