"""The lines of study/gpu.py: one function each, in the order in which they are measured.

A function takes a gpu_tools.Machine and returns a Found. Its docstring says what is measured, what
the limit is, and what the limit follows from.
"""
import json
import shutil
import tempfile
import time
from collections import namedtuple
from contextlib import contextmanager
from functools import partial
from math import ceil, isfinite
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import torch
from torch.profiler import ProfilerActivity, profile

from gpu_tools import (Machine, PythonReads, Training, apart, command, counted, flags,
                       golden_losses, golden_models, largest, largest_error, measured_peak,
                       seconds_a_step, timed)
import dit
import train
from data import open_data, prefetch
from speed import write_jpegs
from vtp_min.device import autocast, peak_flops, set_tf32
from vtp_min.extras import fast
from vtp_min.optim import update_ema

Found = namedtuple("Found", "value limit state numbers")
LINES = {}                              # {name: function}, filled by the decorator `line`
NO_LIMIT = "none on a CPU"              # of lines that measure speed
SEND = "Send the message of this line, and the JSON file."


class NotRun(Exception):
    """Raised by a line that this machine cannot measure; the text says why"""


def line(seconds, fail, slow=""):
    """Decorator: add a function of a Machine to LINES.

    seconds     time limit; all limits together are 30 minutes
    fail, slow  the sentence of the table that says what to do
    """
    def add(function):
        function.seconds, function.advice = seconds, {"fail": fail, "slow": slow}
        LINES[function.__name__] = function
        return function
    return add


def verdict(ok, fast_enough=True):
    if not ok:
        return "fail"
    return "pass" if fast_enough else "slow"


def batch_of_S(m, most=64):
    """-> a batch for size S: a multiple of 16 that fits; pico's on a CPU"""
    if m.small:
        return 8
    batch = min(most, m.images_that_fit("S")) // 16 * 16
    if batch == 0:
        raise NotRun("16 images of S do not fit into the free memory")
    return batch


# ---------------------------------------------------------------- 1. the numbers are right
@line(60, fail="Another PyTorch or driver may help; until this passes, no number of this device "
               "can be compared with those of docs/.")
def golden(m):
    """Outputs of the reference code (tests/golden), computed on this device

    Tokenizer, student, DiT and losses. Limits of the difference, relative to the largest magnitude:
    fp32 1e-4, ten times what the tests allow on a CPU, for another order of sums; tf32 1e-2 and
    bf16 5e-2, about ten times the rounding of their 10 and 7 bits. Losses and their gradients 1e-4:
    they are computed in float32, with autocast too.
    """
    limits = {"fp32": 1e-4, "bf16": 5e-2}
    if m.device.type == "cuda":
        limits["tf32"] = 1e-2
    errors = {}
    for precision in limits:
        set_tf32(m.device, precision == "tf32")
        amp = autocast(m.device, "bf16" if precision == "bf16" else "fp32")
        with amp, torch.no_grad():
            errors[precision] = largest_error(golden_models(m.device))
        errors[f"losses in {precision}"] = largest_error(golden_losses(m.device, amp))
    limits |= {name: 1e-4 for name in errors if name not in limits}
    return Found(", ".join(f"{name} {x:.1e}" for name, x in errors.items()),
                 ", ".join(f"{name} {x:g}" for name, x in limits.items()),
                 verdict(all(errors[name] <= limits[name] for name in limits)), errors)


@line(120, fail="Do not train on several devices; NCCL_DEBUG=INFO torchrun --nproc-per-node 2 "
                "train.py shows where the processes differ or wait.")
def processes(m):
    """Three steps of train.py on two devices, against one

    On a CPU: two processes. Limit: the weights of student and teacher differ by at most 1e-8. The
    steps are in float64, so only the order of sums differs; tests/test_many.py allows 1e-9 on CPUs.
    """
    if not m.small and torch.cuda.device_count() < 2:
        raise NotRun("one device")
    tiny = ["train.py", "--device", m.device.type, "--precision", "fp64", "--steps", 3,
            "--log-every", 1, "--workers", 0, *flags(Machine(torch.device("cpu"), None), "", 8)]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    with tempfile.TemporaryDirectory() as folder:
        one, two = Path(folder, "one"), Path(folder, "two")
        command([*tiny, "--out", one])
        command([*launch, *tiny, "--out", two])
        a, b = (torch.load(run / "last.pt", map_location="cpu") for run in (one, two))
    error = largest((x - b[part][name]).abs().max().item() for part in ("student", "teacher")
                    for name, x in a[part].items())
    backend = "gloo" if m.small else "nccl"
    return Found(f"{error:.1e} ({backend})", "1e-8", verdict(error <= 1e-8), {"apart": error})


@line(120, fail="Try another PyTorch or driver; until this passes, this device does not train the "
                "same model as a CPU.")
def against_cpu(m):
    """Two training steps in fp32, against the same steps on a CPU

    Here in the textbook forms without TF32, on the CPU in the forms of extras/fast.py. Limit:
    losses and gradient norms to 1e-3. The second step also compares the weights that the first one
    made.
    """
    set_tf32(m.device, False)
    flag_list = flags(m, "S", 8)
    here = Training(m.device, "fp32", flag_list)
    batches = here.batches(2)
    rows = here.steps(batches)
    restore = fast.install()
    try:
        reference = Training(torch.device("cpu"), "fp32", flag_list).steps(batches)
    finally:
        restore()
    error = apart(rows, reference)
    return Found(f"{error:.1e}", "1e-3", verdict(error <= 1e-3), {"apart": error})


@line(120, fail="Use a precision that passes, with the flag --precision of train.py.")
def precisions(m):
    """20 steps in fp32, bf16 and fp16 with the gradient scaler

    Limits: in bf16 no step is skipped, and the mean loss of the last five is within 5 % of that of
    fp32; in fp16 the scaler skips none of the last ten steps. (It starts at 65536 and halves its
    scale at each overflow, so it skips some of the first.)
    """
    batch = 4 if m.small else batch_of_S(m, 32)
    end, skipped, numbers = {}, {}, {}
    for precision in ("fp32", "bf16", "fp16"):
        training = Training(m.device, precision, flags(m, "S", batch))
        batches = training.batches(2)
        training.steps(batches * 5)
        early = training.skipped
        rows = training.steps(batches * 5)
        skipped[precision] = early, training.skipped - early
        end[precision] = mean(row["loss"] for row in rows[-5:])
        numbers[precision] = {"loss": end[precision], "skipped": training.skipped,
                              "scale": training.scaler.get_scale()}
    error = abs(end["bf16"] / end["fp32"] - 1)
    ok = skipped["bf16"] == (0, 0) and skipped["fp16"][1] == 0 and error <= 0.05
    ok = ok and all(map(isfinite, end.values()))
    value = (f"bf16 {error:.1%} from fp32; fp16 skips {sum(skipped['fp16'])}, scale "
             f"{numbers['fp16']['scale']:g}")
    return Found(value, "5 %; none of the last 10", verdict(ok), numbers)


# ---------------------------------------------------------------- 2. as fast as planned
@contextmanager
def compiler_of(m):
    """Inside it, torch.compile has the backend of the line `forms`."""
    compiler = torch.compile
    if m.small:
        torch.compile = partial(torch.compile, backend="eager")
    try:
        yield
    finally:
        torch.compile = compiler


@line(240, fail="Train without the flag whose losses differ.",
      slow="Leave --compile off on this machine: it costs time.")
def forms(m):
    """--recompute, --micro and --compile, against none of them: losses and speed

    Two steps of S; --micro takes half of the batch. Limits: losses and gradient norms to 1e-4 in
    fp32, 3e-2 in bf16 and fp16 (the forms round at other places); --compile must not be slower. On
    a CPU, --compile captures the graphs but does not compile C++, which takes minutes.
    """
    batch = batch_of_S(m)
    variants = {"none": [], "--recompute": ["--recompute"], "--micro": ["--micro", batch // 2],
                "--compile": ["--compile"]}
    limit = 1e-4 if m.precision == "fp32" else 3e-2
    found, seconds = {}, {}
    for name, more in variants.items():
        with compiler_of(m):
            training = Training(m.device, m.precision, [*flags(m, "S", batch), *map(str, more)])
        batches = training.batches(1)
        found[name] = training.steps(batches * 2)
        seconds[name] = seconds_a_step(training, batches, 2 if m.small else 8)
        del training
    numbers = {name: {"apart": apart(rows, found["none"]), "seconds": seconds[name],
                      "speed": seconds["none"] / seconds[name]} for name, rows in found.items()}
    value = ", ".join(f"{name} {x['apart']:.0e}, {x['speed']:.2f}x" for name, x in numbers.items()
                      if name != "none")
    ok = all(x["apart"] <= limit for x in numbers.values())
    fast_enough = m.small or numbers["--compile"]["speed"] >= 1
    limits = f"{limit:g}" if m.small else f"{limit:g}; --compile 1x"
    return Found(value, limits, verdict(ok, fast_enough), numbers)


@line(180, fail=SEND,
      slow="Multiply the hours of docs/scale.md (Planning) by 0.4 / this share; try --compile.")
def mfu(m):
    """Speed of a step of nano, S, B and L at 256 px, as a share of the matrix peak

    The FLOPs of a step, counted by extras/cost.py, per second; divided by the speed of a large
    matrix product that is measured here, not that of a data sheet. Limit: 40 % for the largest
    size, the guess on which the hours of docs/scale.md rest.
    """
    peak = peak_flops(m.device, m.precision, 0.3 if m.small else 1)
    numbers = {"peak_tflops": peak / 1e12}
    for size in ("pico",) if m.small else ("nano", "S", "B", "L"):
        batch = 8 if m.small else m.images_that_fit(size)
        while batch:                                             # 0: the table does not name it
            try:
                numbers[size] = speed_of(m, size, batch, peak)
                break
            except torch.OutOfMemoryError:
                batch = batch // 16 * 8
    sizes = [name for name in numbers if name != "peak_tflops"]
    if not sizes:
        raise NotRun("no size fits into the free memory")
    value = f"{m.precision} {peak / 1e12:.3g} TFLOP/s; " + ", ".join(
        f"{size} {numbers[size]['share']:.0%}" for size in sizes)
    fast_enough = m.small or numbers[sizes[-1]]["share"] >= 0.4
    return Found(value, NO_LIMIT if m.small else "40 %", verdict(True, fast_enough), numbers)


def speed_of(m, size, batch, peak):
    """-> {batch, images_per_s, share of the peak}"""
    training = Training(m.device, m.precision, flags(m, size, batch))
    batches = training.batches(1)
    flops = train.count_flops(training.args, training.model, batches[0])
    seconds = seconds_a_step(training, batches, 4 if m.small else 8)
    return {"batch": batch, "images_per_s": batch / seconds, "share": flops / seconds / peak}


@line(120, fail=SEND,
      slow="Divide the memory of this machine by the ratio before you read the table of What fits "
           "in docs/scale.md.")
def peak_memory(m):
    """Peak memory of a step of S, B and L at 256 px, against the count of train.py

    S with two batch sizes, B and L if they fit. The count is vtp_min/extras/plan.py, which is also
    that of docs/scale.md; its reserve of 1.5 GB is left out. On a CPU, the bytes of live tensors
    of pico without CLIP (its text tower would be most of the memory). Limits of the ratio: 0.8 to
    1.25.
    """
    cases = [("pico", 8), ("pico", 16)]
    no_clip = ["--w-clip", "0"] if m.small else []
    if not m.small:
        largest = {size: m.images_that_fit(size) for size in ("S", "B", "L")}
        cases = [("S", largest["S"] // 32 * 8), *largest.items()]
    found = {}
    for size, batch in cases:
        if batch == 0:
            continue
        flag_list = [*flags(m, size, batch), *no_clip]
        peak, expected = measured_peak(m, flag_list), counted(m, flag_list)
        found[f"{size}, {batch} images"] = {"gb": peak / 1e9, "counted_gb": expected / 1e9,
                                            "ratio": peak / expected}
    if not found:
        raise NotRun("no size fits into the free memory")
    value = "; ".join(f"{name}: {x['gb']:.3g} GB, {x['ratio']:.2f}" for name, x in found.items())
    ok = all(0.8 <= x["ratio"] <= 1.25 for x in found.values())
    return Found(value, "0.8 to 1.25", verdict(True, ok), found)


@line(60, fail=SEND,
      slow="Each of these leaves the device idle; send the JSON file, which names their places.")
def synchronisations(m):
    """How often Python waits for the device in a training step

    Counted are the operators that make it wait, by their place in the code; on CUDA also the calls
    of cudaStreamSynchronize, which include those inside PyTorch, and the kernel launches. Limit:
    one, that of Run.agree, which asks if losses and gradients are finite (on a CPU its .tolist()
    is not an operator); fp16 has a second one, that of the gradient scaler.
    """
    training = Training(m.device, m.precision, flags(m, "S", 8))
    batches = training.batches(1)
    training.steps(batches * 2)
    training.timed = False                                       # the clock would synchronise
    with PythonReads() as reads:
        training.run(batches)
    count, numbers = reads.places.total(), {"places": reads.places}
    if m.device.type == "cuda":
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            training.run(batches)
        calls = {event.key: event.count for event in profiler.key_averages()}
        for name in ("cudaStreamSynchronize", "cudaMemcpyAsync", "cudaLaunchKernel"):
            numbers[name] = calls.get(name, 0)
        count = max(count, numbers["cudaStreamSynchronize"])
    value = ", ".join([f"{count} a step"] + [f"{name} {n}" for name, n in numbers.items()
                                             if name != "places"])
    limit = 2 if m.precision == "fp16" else 1
    return Found(value, f"{limit}", verdict(True, count <= limit), numbers)


@line(60, fail=SEND,
      slow="Give --workers the number in brackets, or the number of cores for each process if that "
           "is less.")
def loader(m):
    """Images per second of the loader, against those of a step of S

    The loader reads JPEGs of 384 px (smooth random images) with the default --workers. Limit: it is
    at least as fast as the step, else the device waits for data.
    """
    batch = batch_of_S(m)
    training = Training(m.device, m.precision, flags(m, "S", batch))
    demand = batch / seconds_a_step(training, training.batches(1), 2 if m.small else 8)
    workers = training.args.workers
    with tempfile.TemporaryDirectory() as folder:
        write_jpegs(Path(folder), 48 if m.small else 384)
        training.data.source = open_data(folder, "val", whole=True)
        warm_up, n = workers + 1, 4 if m.small else 8 + 4 * workers
        times = []
        for _ in prefetch(training.data, 0, warm_up + n, workers):
            times.append(time.perf_counter())
    supply = n * batch / (times[-1] - times[-1 - n])
    needed = ceil(demand / supply * max(workers, 1))
    value = (f"{workers} workers {supply:.0f} images/s, step {demand:.0f} images/s "
             f"({needed} workers needed)")
    return Found(value, NO_LIMIT if m.small else "supply above demand",
                 verdict(True, m.small or supply >= demand),
                 {"workers": workers, "supply": supply, "demand": demand, "needed": needed})


@line(120, fail="Train the DiT in fp32 (flag --precision); send the message of this line.")
def diffusion(m):
    """Training step and sampling of DiT B and XL on latents of 16 x 16 x 64

    32 latents; sampling without guidance, 5 Euler steps are timed for 249. Limit: the losses are
    finite. Speeds have none yet: no GPU has been measured.
    """
    precision = "bf16" if m.precision == "bf16" else "fp32"      # as dit.precision_of
    side, channels, n = (4, 64, 4) if m.small else (16, 64, 32)
    peak = peak_flops(m.device, precision)
    found = {}
    for size in ("pico",) if m.small else ("B", "XL"):
        torch.manual_seed(0)
        model = dit.LightningDiT(input_size=side, in_channels=channels, **dit.SIZES[size])
        model.to(m.device)
        flops = 3 * n * dit.count_flops(model)
        weights = [p for p in model.parameters() if p.requires_grad]
        average = [p.detach().clone() for p in weights]
        optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=m.device.type != "mps")
        x1, x0 = torch.randn(2, n, channels, side, side, device=m.device)
        t, y = torch.rand(n, device=m.device), torch.randint(1000, (n,), device=m.device)

        def step():
            optimizer.zero_grad()
            with autocast(m.device, precision):
                mse, cos = dit.flow_loss(model, x1, x0, t, y)
            loss = mse.mean() + cos.mean()
            loss.backward()
            optimizer.step()
            update_ema(average, weights, 0.999)
            return loss

        def sample():
            no_guidance = SimpleNamespace(cfg=1.0, cfg_start=0.0, cfg_channels="3")
            velocity = dit.velocity_fn(model, y, 1000, no_guidance)
            with autocast(m.device, precision):
                return dit.euler(velocity, x0, torch.linspace(0, 1, 6, device=m.device))

        set_tf32(m.device, False)                                # as dit.train
        seconds = timed(m, step)
        set_tf32(m.device, True)                                 # as dit.sample
        sampling = timed(m, sample) / 5 * 249
        found[size] = {"loss": step().item(), "step_images_per_s": n / seconds,
                       "share": flops / seconds / peak, "sampled_images_per_s": n / sampling}
    value = ", ".join(f"{size}: step {x['step_images_per_s']:.3g} images/s ({x['share']:.0%} of "
                      f"peak), sampling {x['sampled_images_per_s']:.3g} images/s"
                      for size, x in found.items())
    return Found(value, "finite", verdict(all(isfinite(x["loss"]) for x in found.values())), found)


# ---------------------------------------------------------------- 3. the whole
def whole_commands(m):
    """-> command lines: tokenizer, its evaluation, latents, DiT, samples, their evaluation"""
    tokenizer = ("--size S --image 64 --patch 8 --batch 256 --batch-ssl 64 --batch-rec 64 "
                 "--steps 1000 --save-every 250")
    n_latents, limit = 10000, 1000
    diffusion_model = "--size B --batch 256 --steps 2000 --save-every 500"
    samples = "--per-class 50 --points 50 --cfg 5 --set cfg_channels=all"
    if m.small:
        tokenizer = ("--size pico --image 16 --patch 8 --batch 8 --batch-ssl 4 --batch-rec 4 "
                     "--steps 2")
        n_latents, limit = 16, 16
        diffusion_model = "--size pico --batch 8 --steps 2"
        samples = "--n 2 --points 3"
    device = "--device", m.device

    def words(text):
        return [*text.split(), *device]

    yield ["train.py", "--out", m.run, "--data", "shapes:objects=1,size=0.75-0.9",
           *words(f"--perceptual none {tokenizer}")]
    if not m.small:
        yield ["eval.py", "zeroshot", m.run, *words(f"--limit {limit}")]
    yield ["eval.py", "recon", m.run, *words(f"--limit {limit} --perceptual none")]
    yield ["dit.py", "latents", m.run, *words(f"--n {n_latents} --fresh")]
    yield ["dit.py", "train", m.run / "latents", "--out", m.run / "dit", *words(diffusion_model)]
    yield ["dit.py", "sample", m.run / "dit", *words(f"{samples} --fresh")]
    if not m.small:
        yield ["eval.py", "fid", m.run / "dit/samples", "--run", m.run,
               *words(f"--features classifier --few --limit {limit} --train-limit 3000 "
                      f"--set judge_steps=200")]


@line(600, fail="Run the command that is named here by hand; it continues in the same folder.")
def whole(m):
    """Ten minutes: tokenizer S, its evaluation, DiT B and its samples

    The commands of a user, on the built-in shapes at 64 px. Limit: every command ends in time, and
    zero-shot accuracy is above twice chance, which is 10 %. (nano reaches 98 % at 36 px in three
    minutes of two CPU cores: docs/scale.md, "The demo".)
    """
    if (m.run / "dit/samples").exists():                         # of an earlier, complete run
        shutil.rmtree(m.run)
    start = time.perf_counter()
    for words in whole_commands(m):
        command(words)
    minutes = (time.perf_counter() - start) / 60
    rows = [json.loads(text) for text in (m.run / "metrics.jsonl").read_text().splitlines()]
    metrics = {row["name"]: row["value"] for row in rows}
    names = "zero-shot top1", "PSNR", "FD-classifier", "samples recognised"
    value = f"{minutes:.1f} min" + "".join(f", {name} {metrics[name]:.4g}" for name in names
                                           if name in metrics)
    ok = m.small or metrics["zero-shot top1"] >= 0.2
    limit = "every command ends" if m.small else "zero-shot top1 0.2"
    return Found(value, limit, verdict(ok), metrics)
