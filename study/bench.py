"""Measure speed and memory of our code against an independent implementation.

    python study/bench.py joint        only the training step: nano, S and B at 64 px
    python study/bench.py              everything -> study/bench.json

Three forms of the same computation are compared:

yardstick    study/yardstick.py, written like the published implementations
plain        the textbook forms of the core (--set fast=0)
fast         the forms of extras/fast.py, the default on a CPU

All forms have equal weights and equal batches, and run alternately in one process; the results are
medians over rounds. Ratios can be compared between machines; images per second hold only for the
machine that is stored with them. No other program should run on the machine during the measurement.
Linux only, because memory is read from /proc.
"""
import copy
import ctypes
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "study")]
import dit                                                                 # noqa: E402
import train                                                               # noqa: E402
import yardstick                                                           # noqa: E402
from data import TrainBatches, eval_batches, open_data, prefetch           # noqa: E402
from tokenizer import get_tokenizer                                        # noqa: E402
from vtp_min import losses, shapes                                         # noqa: E402
from vtp_min.augment import normalize                                      # noqa: E402
from vtp_min.device import autocast, choose_precision, peak_flops          # noqa: E402
from vtp_min.extras import fast, latents                                   # noqa: E402
from vtp_min.extras.cost import step_flops                                 # noqa: E402
from vtp_min.extras.plan import count                                      # noqa: E402
from vtp_min.fid import Inception                                          # noqa: E402
from vtp_min.model import (SMALL, DINOHead, Student, Teacher, VTPConfig,   # noqa: E402
                           VTPModel)
from vtp_min.optim import param_groups, update_ema                         # noqa: E402

CPU = torch.device("cpu")
FORMS = "yardstick", "plain", "fast"
TEMP, EMA = 0.07, 0.994                         # teacher temperature, teacher momentum
WEIGHTS = Namespace(w_clip=1.0, w_ssl=1.0, w_rec=0.1, w_koleo=0.1, clip_loss="clip")
BETAS, EPS = (0.9, 0.98), 1e-6                  # train.py's AdamW
# bytes; glibc raises its threshold to this value by itself in a program that frees large blocks
GLIBC_THRESHOLD = 2 ** 25
# images per step for CLIP; a quarter of them for self-distillation, an eighth for reconstruction
BATCH = {"nano": 64, "S": 32, "B": 32}
HEADS = {"small": (256, 256, 64), "large": (65536, 2048, 256)}      # DINO: K, hidden, bottleneck


@contextmanager
def use_form(form):
    """Context manager: inside it, the functions of the core are those of this form."""
    undo = fast.install(dit=dit) if form in ("fast", "compiled") else None
    try:
        yield
    finally:
        if undo:
            undo()


# ---------------------------------------------------------------- timing
def measure_alternately(calls, rounds):
    """Time each function once per round.

    calls  {name: function of the number of the round} -> {name: list of seconds, one per round}
    The first round is a warm-up and is not included.
    """
    seconds = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call(number)
            seconds[name].append(time.perf_counter() - start)
    return {name: times[1:] for name, times in seconds.items()}


def ratio(seconds, baseline, form):
    """-> time of `baseline` divided by that of `form`: [median, lowest, highest] over the rounds"""
    each = sorted(a / b for a, b in zip(seconds[baseline], seconds[form]))
    return [median(each), each[0], each[-1]]


def ratios(seconds):
    """-> {"FORM over yardstick": ratio} for every other form"""
    others = [form for form in seconds if form != "yardstick"]
    return {f"{form} over yardstick": ratio(seconds, "yardstick", form) for form in others}


def rates(seconds, n):
    """-> {form: images per second}, if a round processes n images"""
    return {form: n / median(times) for form, times in seconds.items()}


# ---------------------------------------------------------------- the training step
class Joint:
    """A student with its teacher and optimizer; step(batch) is one training step in one form

    All objects of the same size and shape have equal weights.
    """

    def __init__(self, size, precision, form, side=64, patch=8, depth=None):
        torch.manual_seed(0)
        self.head_sizes = HEADS["small" if size in SMALL else "large"]
        config = VTPConfig.of_size(size, side, patch, 64, True, True, False)
        config.vision_depth = config.decoder_depth = depth or config.vision_depth
        model = VTPModel(config)
        self.student = Student(model, DINOHead(model.feature_dim, *self.head_sizes))
        self.teacher = Teacher(self.student)
        self.targets = losses.TeacherTargets("sinkhorn", self.head_sizes[0], CPU)
        self.size, self.precision, self.form = size, precision, form
        groups = param_groups(self.student, 1.0, 1.0)
        if form == "yardstick":
            yardstick.rearrange(self.student)
            yardstick.rearrange(self.teacher)
            self.optimizer = yardstick.adamw(groups, BETAS, EPS)
        else:
            self.optimizer = torch.optim.AdamW(groups, betas=BETAS, eps=EPS, fused=True)
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-4
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)

    def step(self, batch):
        """One update -> {name of a loss: number}"""
        # For large sizes, train.py makes glibc return freed memory to the system at once.
        returns_memory = self.form in ("fast", "compiled") and self.size not in SMALL
        fast.set_malloc_threshold(2 ** 20 if returns_memory else GLIBC_THRESHOLD)
        self.optimizer.zero_grad()
        with use_form(self.form):
            if self.form == "yardstick":
                terms = self.yardstick_gradients(batch)
            else:
                terms = self.our_gradients(batch)
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), 3.0)
            self.optimizer.step()
            if self.form == "yardstick":
                yardstick.update_teacher(self.teacher, self.student, EMA)
            else:
                self.teacher.update(self.student, EMA)
        return {name: term.item() for name, term in terms.items()}

    def our_gradients(self, batch):
        """Two backward passes, as in train.py -> {name: loss}"""
        amp = autocast(CPU, self.precision)
        terms, _ = train.compute_gradients(batch, TEMP, WEIGHTS, self.student, self.teacher, None,
                                           self.targets, amp, self.scaler, CPU)
        return terms

    def yardstick_gradients(self, batch):
        """One backward pass of the sum of all losses -> {name: loss}"""
        batch = batch.to(CPU)
        with autocast(CPU, self.precision):
            targets = yardstick.teacher_targets(self.teacher, batch, TEMP)
            terms = yardstick.losses(yardstick.forward(self.student, batch), targets, batch)
        loss = losses.total_loss(terms, WEIGHTS)
        loss.backward()
        return {"loss": loss} | terms

    def flops(self, batch):
        config = self.student.model.config
        return step_flops(config, batch, 1.0, 1.0, 0.1, self.head_sizes)


def train_batches(size, batch, side=64, patch=8, source="shapes"):
    """Batches for all three objectives, with 8 local crops of the default side of train.py"""
    local = max(round(side * 96 / 224 / patch), 1) * patch
    return TrainBatches(
        open_data(source, "train", 0, side=side), get_tokenizer("ViT-B-32", 77), seed=0,
        batch=batch, batch_ssl=max(batch // 4, 1), batch_rec=max(batch // 8, 1), clip=True,
        ssl=True, rec=True, image=side, local_image=local, n_local=8, patch=patch)


def first_batches(n, size, batch, side=64, patch=8):
    """-> list of n batches"""
    batches = train_batches(size, batch, side, patch)
    return [batches[i] for i in range(n)]


JOINT_CASES = [("nano", "fp32"), ("nano", "bf16"), ("S", "fp32"), ("S", "bf16"), ("B", "bf16")]


def joint(rounds, cases=JOINT_CASES):
    """The training step at 64 px, patch size 8: of 8 images, 2 for DINO + iBOT, 1 reconstructed"""
    for size, precision in cases:
        n_rounds = rounds if size == "nano" else max(rounds // 3, 3)
        yield joint_row(size, precision, n_rounds)


def joint_row(size, precision, rounds):
    """-> row of bench.json for one size and precision"""
    forms = [*FORMS]
    if precision != "fp32":
        forms.append("compiled")
    if size == "B":                                  # two models of size B need more than 20 GB
        forms = ["fast"]
    n = BATCH[size]
    batches = first_batches(4, size, n)
    joints = {form: Joint(size, precision, form) for form in forms}
    flops = joints["fast"].flops(batches[0])
    if "compiled" in forms:
        compile_and_warm_up(joints["compiled"], batches)
    step_losses = {form: [] for form in forms}

    def step(form):
        return lambda number: step_losses[form].append(joints[form].step(batches[number % 4]))

    seconds = measure_alternately({form: step(form) for form in forms}, rounds)
    joints.clear()
    ctypes.CDLL(None).malloc_trim(0)                 # return freed memory, which B needs after S
    peak = peak_flops(CPU, precision, 1)
    row = {"what": f"joint step, {size}, {precision}", "unit": "images/s", **rates(seconds, n),
           "share_of_peak": flops / median(seconds["fast"]) / peak, "gflops": flops / 1e9,
           "peak_gflops": peak / 1e9,
           "protocol": f"batch {n}, 8 local crops, cached batches, {rounds} rounds"}
    row |= {f"{form}_memory": memory_of(form, size, precision)
            for form in forms if form != "compiled"}
    if "yardstick" in forms:
        row |= ratios(seconds)
        reference = step_losses["yardstick"][0]
        ours = step_losses["fast"][0]
        differences = [abs(reference[name] / x - 1) for name, x in ours.items()]
        row["first_step_losses_apart"] = max(differences)
    return row


def compile_and_warm_up(joint, batches):
    """Compile the blocks as train.py --compile does, and run steps on all shapes of batches."""
    args = Namespace(compile=True, recompute=False)
    with use_form("fast"):
        train.wrap_blocks(args, joint.student, joint.teacher)
    for batch in batches:
        joint.step(batch)


# ---------------------------------------------------------------- memory
def memory_of(form, size, precision):
    """Peak memory of three steps in a new process

    -> {"gb": increase during the steps: activations, gradients, AdamW's moments and copies,
        "before_gb": memory before the first step: weights and libraries}
    """
    command = [sys.executable, __file__, "--memory", form, size, precision]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def print_memory(form, size, precision):
    """Runs in the process of memory_of: measure and print the result as JSON."""
    batches = first_batches(2, size, BATCH[size])
    step = Joint(size, precision, form).step
    before = memory_status("VmRSS")
    for number in range(3):
        step(batches[number % 2])
    print(json.dumps({"gb": memory_status("VmHWM") - before, "before_gb": before}))


def memory_status(field):
    """-> field of /proc/self/status in GB

    (The maximum in the resource module, ru_maxrss, would include that of the parent process.)
    """
    text = Path("/proc/self/status").read_text()
    return int(re.search(field + r":\s+(\d+)", text)[1]) / 1e6


# ---------------------------------------------------------------- data
def write_jpegs(folder, n, side, classes):
    """Write n built-in images into class folders."""
    for i in range(n):
        path = Path(folder) / str(i % classes) / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(shapes.draw(i, side)[0]).save(path, quality=90)


def data(rounds):
    """DINOv2's ten views of 288 px JPEGs on one thread: 2 of 224 px and 8 of 96 px"""
    threads = torch.get_num_threads()
    n = 8                                            # images per round
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_jpegs(folder, 64, 288, classes=1)
        paths = sorted(Path(folder, "0").iterdir())
        source = open_data(folder, "val", whole=True)
        batches = TrainBatches(source, None, seed=0, batch=n, batch_ssl=n, batch_rec=n, clip=False,
                               ssl=True, rec=False, image=224, local_image=96, n_local=8, patch=16)

        def torchvision(floats):
            def call(number):
                for i in range(n):
                    path = paths[(number * n + i) % len(paths)]
                    yardstick.views(path, 224, 96, 8, floats)
            return call

        def ours(form):
            def call(number):
                with use_form(form):
                    batches[number]                  # computes the views of this batch
            return call

        seconds = measure_alternately({"yardstick": torchvision(True),
                                       "yardstick in uint8": torchvision(False),
                                       "plain": ours("plain"), "fast": ours("fast")}, rounds)
    torch.set_num_threads(threads)
    yield {"what": "views, 1 thread", "unit": "images/s", **rates(seconds, n), **ratios(seconds),
           "protocol": f"10 views of 288 px JPEGs of built-in images, {rounds} rounds of {n}"}


def fed(rounds):
    """The step of nano with data: prepared before, between the steps, or by a worker process"""
    precision = choose_precision(CPU)
    with tempfile.TemporaryDirectory() as folder:
        write_jpegs(f"{folder}/train", 512, 64, classes=8)
        for source, name in (("shapes", "drawn"), (folder, "JPEGs")):
            yield from fed_rows(source, name, precision, rounds)


def fed_rows(source, name, precision, rounds):
    """Yield two rows for one data source: data prepared between the steps, or by a worker."""
    n = BATCH["nano"]
    step = Joint("nano", precision, "fast").step
    batches = train_batches("nano", n, source=source)
    made_before = [batches[i] for i in range(4)]
    worker = prefetch(batches, 0, rounds + 1, 1)

    def in_between(number):
        with use_form("fast"):
            batch = batches[number]
        step(batch)

    seconds = measure_alternately({"made before": lambda number: step(made_before[number % 4]),
                                   "by a worker": lambda number: step(next(worker)),
                                   "in between": in_between}, rounds)
    for method in ("in between", "by a worker"):
        yield {"what": f"step with data {name} {method}", "unit": "images/s",
               "fast": n / median(seconds[method]),
               "made_before": n / median(seconds["made before"]),
               "over made before": ratio(seconds, "made before", method),
               "protocol": f"nano, 64 px, patch 8, 8 local crops, {precision}; {rounds} rounds"}


# ---------------------------------------------------------------- diffusion
CLASSES, CHANNELS = 10, 64


class Diffusion:
    """A DiT and its training latents on disk; step(number) is one training step in one form"""

    def __init__(self, size, side, batch, precision, form, folder):
        torch.manual_seed(0)
        self.model = dit.LightningDiT(input_size=side, patch_size=1, in_channels=CHANNELS,
                                      num_classes=CLASSES, **dit.SIZES[size])
        for p in self.model.parameters():
            if p.requires_grad and p.ndim > 1 and not p.any():
                # not zero, as after some training: every part contributes to the loss
                torch.nn.init.normal_(p, std=0.02)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.precision, self.form = precision, form
        weights = [p for p in self.model.parameters() if p.requires_grad]
        implementation = {"foreach": False} if form == "yardstick" else {"fused": True}
        self.optimizer = torch.optim.AdamW(weights, lr=1e-4, betas=(0.9, 0.95), weight_decay=0,
                                           **implementation)
        if not latents.shards(folder):
            z, z_flip = torch.randn(2, 512, CHANNELS, side, side)
            latents.write_shard(folder / "latents_rank00_shard000.safetensors", z.clone(),
                                z_flip.clone(), torch.randint(CLASSES, (512,)), "cpu")
        self.data = latents.Latents(folder)
        self.stats = {"mean": torch.zeros(1, CHANNELS, 1, 1), "std": torch.ones(1, CHANNELS, 1, 1)}
        self.batches = latents.LatentBatches(self.data, self.stats, 0, batch, 0.1, CLASSES)

    def step(self, number):
        batch = self.batches[number]
        x1, x0, y = batch["x1"], batch["x0"], batch["y"]
        t = dit.lognorm_time(batch["z"], -0.5, 1.25)
        self.optimizer.zero_grad()
        if self.form == "yardstick":
            # Read latents one by one to include the time that this takes. The result is not used,
            # because all forms train on the same latents and random numbers.
            for i in range(len(y)):
                yardstick.read_latent(self.data.paths[0], i, False, self.stats)
            with autocast(CPU, self.precision):
                loss = yardstick.flow_loss(self.model, x1, x0, t, y)
        else:
            with use_form(self.form), autocast(CPU, self.precision):
                mse, cos = dit.flow_loss(self.model, x1, x0, t, y)
                loss = mse.mean() + cos.mean()
        loss.backward()
        self.optimizer.step()
        if self.form == "yardstick":
            yardstick.update_ema(self.ema, self.model, 0.99)
        else:
            update_ema(self.ema.parameters(), self.model.parameters(), 0.99)
        return loss.item()


def diffusion(rounds):
    """The step of the DiT, and Euler sampling without guidance, in the default precision"""
    for size, side, batch, n in (("nano", 4, 64, 50), ("nano", 8, 64, 50), ("B", 4, 32, 50),
                                 ("B", 16, 4, 4)):
        n_rounds = rounds if size == "nano" else max(rounds // 3, 3)
        yield from diffusion_rows(size, side, batch, n, n_rounds)


def diffusion_rows(size, side, batch, n, rounds, points=6):
    """Yield two rows: the training step, and sampling.

    side   side of the latent grid: side * side tokens
    batch  latents per training step
    n      images that are sampled at a time, in points - 1 Euler steps
    """
    precision = choose_precision(CPU)
    x, y = torch.randn(n, CHANNELS, side, side), torch.arange(n) % CLASSES
    no_guidance = Namespace(cfg=1.0, cfg_start=0.0, cfg_channels="3")
    grid = dit.time_grid(points, 0.075)
    with tempfile.TemporaryDirectory() as folder:
        runs = {form: Diffusion(size, side, batch, precision, form, Path(folder))
                for form in FORMS}
        step_losses = {form: [] for form in FORMS}

        def sample(number):
            with use_form("fast"), torch.no_grad(), autocast(CPU, precision):
                velocity = dit.velocity_fn(runs["fast"].model, y, CLASSES, no_guidance)
                dit.euler(velocity, x, grid)

        def step(form):
            return lambda number: step_losses[form].append(runs[form].step(number))

        calls = {form: step(form) for form in FORMS} | {"sample": sample}
        seconds = measure_alternately(calls, rounds)
    sampling = median(seconds.pop("sample"))
    peak = peak_flops(CPU, precision, 1)
    flops = dit.count_flops(runs["fast"].model)
    share = 3 * batch * flops / median(seconds["fast"]) / peak
    case = f"{size}, {side * side} tokens, {precision}"
    yield {"what": f"DiT step, {case}", "unit": "images/s", **rates(seconds, batch),
           **ratios(seconds), "share_of_peak": share,
           "first_step_losses_apart": abs(step_losses["fast"][0]
                                          / step_losses["yardstick"][0] - 1),
           "protocol": f"batch {batch}, {rounds} rounds"}
    yield {"what": f"sampling, {case}", "unit": "images/s of 249 steps",
           "fast": n / (sampling / (points - 1) * 249),
           "share_of_peak": (points - 1) * n * flops / sampling / peak,
           "share_of_training": share,
           "protocol": f"{n} images at once, guidance off, {points - 1} steps timed, x 249/"
                       f"{points - 1}, without decoding; {rounds} rounds"}


def encoding(rounds):
    """Latents of images and of their mirror images in fp32; includes drawing the images"""
    config = VTPConfig.of_size("nano", 64, 8, CHANNELS, clip=False)
    tokenizer = VTPModel(config).eval()
    n = 200                                          # images per round
    source = open_data("shapes", seed=0, side=64)

    def call(form):
        def encode(number):
            with use_form(form), torch.no_grad():
                for images, _, _ in eval_batches(source, 64, 50, limit=n, crop="adm"):
                    latents.encode(tokenizer, normalize(images), "fp32", None)
        return encode

    seconds = measure_alternately({"plain": call("plain"), "fast": call("fast")}, rounds)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tokenizer.get_reconstruction_latents(torch.zeros(1, 3, 64, 64))
    flops = 2 * n * counter.get_total_flops()
    yield {"what": "latents, nano, 64 px, fp32", "unit": "images/s", **rates(seconds, n),
           "share_of_peak": flops / median(seconds["fast"]) / peak_flops(CPU, "fp32", 1),
           "protocol": f"patch 8, batch 50, built-in images and their mirror images, including "
                       f"the time to draw them; {rounds} rounds of {n}"}


# ---------------------------------------------------------------- FID
@torch.no_grad()
def fid(rounds, n=32):
    """Inception's features of 64 px images, which it enlarges to 299 px"""
    torch.manual_seed(0)
    ours = Inception()
    rounds = max(rounds // 2, 3)
    for name, x in ours.state_dict().items():        # with these weights, features stay of order 1
        if name.endswith("conv.weight"):
            torch.nn.init.kaiming_normal_(x, nonlinearity="relu")
    images = torch.randint(256, (n, 3, 64, 64), dtype=torch.uint8)
    reference = yardstick.inception(ours)
    calls = {"yardstick": lambda number: reference(images), "plain": lambda number: ours(images)}
    seconds = measure_alternately(calls, rounds)
    a, b = reference(images), ours(images)
    yield {"what": "Inception features, fp32", "unit": "images/s", **rates(seconds, n),
           **ratios(seconds), "features_apart": ((a - b).abs().max() / a.abs().max()).item(),
           "protocol": f"batch {n}, random weights, {rounds} rounds"}


# ---------------------------------------------------------------- growth of the cost
# {quantity: [(value, changed arguments of step_cost)]}
AXES = {"batch": [(n, {"batch": n}) for n in (8, 16, 32, 64, 128)],
        "side in pixels": [(n, {"batch": 16, "side": n}) for n in (32, 64, 128, 192)],
        "depth": [(n, {"depth": n}) for n in (2, 4, 8, 16)],
        "width": [(96, {"size": "pico"}), (192, {"size": "nano"}), (384, {"size": "micro"})]}


def growth(rounds):
    """Time of a training step against batch, side, depth, width and number of processes"""
    rounds = max(rounds // 3, 3)
    for axis, points in AXES.items():
        yield from growth_rows(axis, points, rounds)
    for processes in (1, 2):
        yield processes_row(processes)


def growth_rows(axis, points, rounds):
    """Yield one row per value. Its exponent is the slope from the previous value in a plot with two
    logarithmic axes."""
    precision = choose_precision(CPU)
    previous = None                                  # value, seconds, GFLOPs
    for value, settings in points:
        seconds, gflops = step_cost(rounds, precision, **settings)
        row = {"what": f"{axis} {value}", "unit": "seconds a step", "seconds": seconds,
               "gflops": gflops, "protocol": f"{settings}, else nano, 64 px, batch 32; "
                                             f"{precision}, {rounds} rounds"}
        if previous:
            distance = math.log(value / previous[0])
            row["exponent"] = math.log(seconds / previous[1]) / distance
            row["exponent_of_flops"] = math.log(gflops / previous[2]) / distance
        yield row
        previous = value, seconds, gflops


def step_cost(rounds, precision, size="nano", batch=32, side=64, depth=None):
    """-> seconds and GFLOPs of a training step"""
    joint = Joint(size, precision, "fast", side, 8, depth=depth)
    batches = first_batches(2, size, batch, side)
    calls = {"step": lambda number: joint.step(batches[number % 2])}
    seconds = measure_alternately(calls, rounds)["step"]
    return median(seconds), joint.flops(batches[0]) / 1e9


def processes_row(processes):
    """-> row for train.py with this number of processes, each of one thread"""
    launch = []
    if processes > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                  str(processes)]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *launch, str(ROOT / "train.py"), "--out", f"{folder}/run",
                   "--perceptual", "none", "--steps", "40", "--device", "cpu"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, env=environment, capture_output=True, check=True)
        lines = Path(folder, "run/log.jsonl").read_text().splitlines()[2:]
    rate = median(json.loads(line)["images_per_s"] for line in lines)
    return {"what": f"{processes} processes of one thread", "unit": "images/s", "fast": rate,
            "protocol": "train.py, nano's defaults, 40 steps, the last three lines of the log"}


def plan(rounds):
    """FLOPs and GPU-hours of the paper's runs of S, B and L; counted, not measured"""
    for size in ("S", "B", "L"):
        row = {"what": f"plan {size}", "unit": ""}
        for suffix, flags in (("", []), ("_micro_recompute", ["--micro", "64", "--recompute"])):
            args = train.arguments(["--size", size, *flags])
            sample = 8 * count(train, args, 8, "bf16").flops / args.batch
            total = 1.1e9 * sample                      # 1.1 billion images
            row |= {f"gflops_a_sample{suffix}": sample / 1e9,
                    f"flops_of_1_1_billion{suffix}": total,
                    f"a100_hours{suffix}": total / (0.4 * 312e12) / 3600,
                    f"h100_hours{suffix}": total / (0.4 * 989e12) / 3600}
        yield row | {"protocol": "train.py --size S, B, L in 8 processes, without and with --micro "
                                 "64 --recompute: a step executed on tensors without values, with "
                                 "stochastic depth and LPIPS; 256 px, patch 16, 8 local crops of "
                                 "112, captions of 32 tokens; at 40 % (a guess) of the bf16 peaks, "
                                 "312 and 989 TFLOP/s; Table 2 trains three times as long"}


BENCHES = {f.__name__: f for f in (joint, data, fed, diffusion, encoding, fid, growth, plan)}


# ---------------------------------------------------------------- command line
def machine():
    """-> description of this machine"""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return (f"{torch.get_num_threads()} threads of {model[1] if model else platform.machine()}, "
            f"torch {torch.__version__.split('+')[0]}")


def rounded(value):
    """Round the numbers in nested dicts and lists to four significant digits."""
    if isinstance(value, dict):
        return {name: rounded(x) for name, x in value.items()}
    if isinstance(value, list):
        return [rounded(x) for x in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main():
    lines = [f"    {name:10s} {bench.__doc__}" for name, bench in BENCHES.items()]
    p = ArgumentParser(description=__doc__ + "\n" + "\n".join(lines),
                       formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("names", nargs="*", metavar="benchmark",
                   help="some of the benchmarks above; default: all")
    p.add_argument("--rounds", type=int, default=15,
                   help="measured rounds; slow benchmarks use a third (default: %(default)s)")
    p.add_argument("--out", type=Path, default=ROOT / "study/bench.json",
                   help="JSON file for the results; existing rows of the same name are replaced")
    args = p.parse_args()
    unknown = set(args.names) - BENCHES.keys()
    if unknown:
        p.error(f"unknown benchmark {', '.join(sorted(unknown))}; wanted some of "
                f"{', '.join(BENCHES)}")
    if not Path("/proc/self/status").exists():
        p.error("this system has no /proc, from which memory is read; run it on Linux")
    previous = json.loads(args.out.read_text()) if args.out.exists() else []
    rows = {row["what"]: row for row in previous}
    for name in args.names or BENCHES:
        for row in BENCHES[name](args.rounds):
            row = rounded(row) | {"bench": name, "machine": machine()}
            rows[row["what"]] = row
            print(json.dumps(row), flush=True)
            args.out.write_text(json.dumps(list(rows.values()), indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        print_memory(*sys.argv[2:])
    else:
        main()
