"""What the lines of study/gpu.py share: the loop of train.py without a run folder, peak memory,
commands, and outputs of the reference code on a device."""
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import cache, partial
from math import floor
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "study"), str(ROOT / "tests")]
import dit                                                                 # noqa: E402
import train                                                               # noqa: E402
from vtp_min import VTPModel, losses                                       # noqa: E402
from vtp_min.augment import mask_index_and_weight                          # noqa: E402
from vtp_min.device import autocast, choose_precision, synchronize         # noqa: E402
from vtp_min.extras import gradcache, plan                                 # noqa: E402
from vtp_min.model import Student, Teacher                                 # noqa: E402
from vtp_min.optim import param_groups                                     # noqa: E402
from vtp_min.run import Run                                                # noqa: E402

GOLDEN = ROOT / "tests/golden"


# ---------------------------------------------------------------- the machine
@dataclass
class Machine:
    device: torch.device
    run: Path               # run folder of the line `whole`

    @property
    def small(self):
        return self.device.type == "cpu"

    @property
    def precision(self):
        """The precision that train.py chooses here"""
        return choose_precision(self.device)

    def images_that_fit(self, size, most=128):
        """-> a multiple of 8 images for a step at 256 px that fits by the count; 0: not even 8"""
        free = {"cuda": lambda: torch.cuda.mem_get_info(self.device)[0],
                "mps": torch.mps.recommended_max_memory}[self.device.type]()
        eight, sixteen = (counted(self, flags(self, size, n)) for n in (8, 16))
        # 0.8: the count may be too low by a quarter, see the line peak_memory
        more = (0.8 * free - eight - plan.RESERVED) / (sixteen - eight)
        return min(most, 8 * max(0, 1 + floor(more)))


def counted(m, flag_list):
    """-> bytes that train.py says a step with these flags needs, without its reserve"""
    return counted_bytes(m.precision, *flag_list)


@cache                                                           # some seconds for size L
def counted_bytes(precision, *flag_list):
    cost = plan.count(train, train.arguments(flag_list), 1, precision)
    return cost.memory - plan.RESERVED


def flags(m, size, batch):
    """-> flags of train.py: 256 px, patch size 16, the paper's proportions of the batches; on a
    CPU, tiny images"""
    if m.small:
        return (f"--size pico --image 32 --patch 8 --batch {batch} --batch-ssl {batch // 2} "
                f"--batch-rec {batch // 2} --perceptual none --set locals=1 "
                f"--set prototypes=64").split()
    return (f"--size {size} --image 256 --patch 16 --batch {batch} --batch-ssl {batch // 4} "
            f"--batch-rec {batch // 8} --perceptual none --set locals=8").split()


# ---------------------------------------------------------------- the training loop
class Training:
    """The model, optimizer and loop of train.py for some of its flags, without a run folder

    `steps` calls train.train, so the measured loop is that of the product. This object stands in
    for its argument `run`.
    """
    agree = Run.agree

    def __init__(self, device, precision, flags):
        self.args = args = train.arguments([*flags])
        args.warmup = 1
        self.step, self.stop_requested, self.bad_steps, self.skipped = 0, False, 0, 0
        self.device, self.timed = device, True
        torch.manual_seed(0)
        self.model, head = train.build_model(args)
        student = Student(self.model, head).to(device)
        teacher = Teacher(student)
        targets = losses.TeacherTargets(args.teacher, args.prototypes, device)
        optimizer = torch.optim.AdamW(param_groups(student), betas=(args.beta1, args.beta2),
                                      eps=args.eps, fused=device.type != "mps")
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        gradients = gradcache.compute_gradients_cached if args.micro else train.compute_gradients
        gradients = partial(gradients, args=args, student=student, teacher=teacher, lpips=None,
                            targets=targets, amp=autocast(device, precision), scaler=self.scaler,
                            device=device)
        train.wrap_blocks(args, student, teacher)
        self.parts = gradients, student, teacher, targets, optimizer, self.scaler
        self.data = train.train_batches(args, depth=len(self.model.trunk.blocks))

    def batches(self, n):
        return [self.data[i] for i in range(n)]

    def steps(self, batches):
        """One training step for each batch -> list of {loss, grad_norm, ..., seconds: number}"""
        synchronize(self.device)
        self.run(batches)
        return [{name: float(x) for name, x in row.items()} for row in self.rows]

    def run(self, batches):
        self.args.steps = self.step + len(batches)
        self.rows = []
        self.start = time.perf_counter()
        train.train(self.args, self, iter(batches), *self.parts, state=None)

    def after_step(self, step, terms, diagnostics, grad_norm, lr, state):
        if self.timed:
            synchronize(self.device)
        now = time.perf_counter()
        self.rows.append(terms | {"grad_norm": grad_norm, "seconds": now - self.start})
        self.step, self.start = step + 1, now


def seconds_a_step(training, batches, n=8):
    """-> median time of a step; the first two are a warm-up"""
    rows = training.steps([batches[i % len(batches)] for i in range(n + 2)])
    return median(row["seconds"] for row in rows[2:])


def apart(rows, reference):
    """-> largest relative difference of the losses and gradient norms of two trainings; of values
    below 0.1, such as KoLeo near its zero, the difference divided by 0.1"""
    found = []
    for row, wanted in zip(rows, reference, strict=True):
        for name in wanted.keys() - {"seconds"}:
            found.append(abs(row[name] - wanted[name]) / max(abs(wanted[name]), 0.1))
    return largest(found)


def largest(values):
    """-> the largest value; nan if there is one, which Python's max may pass over"""
    return float(np.max([*values]))


def timed(m, call, n=5):
    """-> median seconds of a call; the first two are a warm-up"""
    seconds = []
    for _ in range(n + 2):
        synchronize(m.device)
        start = time.perf_counter()
        call()
        synchronize(m.device)
        seconds.append(time.perf_counter() - start)
    return median(seconds[2:])


# ---------------------------------------------------------------- reads, memory
class PythonReads(TorchDispatchMode):
    """Inside this context, `places` counts the operators for which Python waits for the device

    These are .item(), float(), if, nonzero, indexing with a mask, and blocking copies between
    devices (.tolist() is one). A place is a file and line of this repository.
    """
    READS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero,
             torch.ops.aten.masked_select)
    INDEXING = torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_
    COPIES = torch.ops.aten._to_copy, torch.ops.aten.copy_

    def __init__(self):
        super().__init__()
        self.places = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        operator = function.overloadpacket
        waits = operator in self.READS or operator in self.INDEXING and has_mask(args[1])
        if operator in self.COPIES:
            # _to_copy(x) -> out, or copy_(out, x)
            source = args[0] if operator == torch.ops.aten._to_copy else args[1]
            moves = out.device.type != source.device.type
            waits = moves and not kwargs.get("non_blocking") and True not in args[2:]
        if waits:
            self.places[self.place()] += 1
        return out

    def place(self):
        frame = sys._getframe(1)
        while frame.f_back and not is_ours(frame.f_code.co_filename):
            frame = frame.f_back
        return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def has_mask(indices):
    return any(torch.is_tensor(x) and x.dtype == torch.bool for x in indices)


def is_ours(path):
    """True for a file of this repository except this one; False for libraries"""
    return path.startswith(str(ROOT)) and "site-packages" not in path and path != __file__


def measured_peak(m, flag_list):
    """-> bytes of tensors at the peak of two steps, with the weights"""
    if m.device.type == "cuda":
        before = torch.cuda.memory_allocated(m.device)
        torch.cuda.reset_peak_memory_stats(m.device)
        training = Training(m.device, m.precision, flag_list)
        training.steps(training.batches(1) * 2)
        return torch.cuda.max_memory_allocated(m.device) - before
    with plan.Meter() as meter:
        training = Training(m.device, m.precision, flag_list)
        training.steps(training.batches(1) * 2)
    return meter.peak


# ---------------------------------------------------------------- commands
def command(argv):
    """Run a Python script of this repository. RuntimeError if it fails.

    If the time of the line is over or the user presses Ctrl-C, it gets SIGTERM, so that a training
    saves a checkpoint.
    """
    process = subprocess.Popen([sys.executable, *map(str, argv)], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               start_new_session=True)
    try:
        output, _ = process.communicate()
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        raise
    if process.returncode:
        end = output.strip().splitlines()[-1:]
        raise RuntimeError(f"{' '.join(map(str, argv))} ended with {process.returncode}: {end}")


# ---------------------------------------------------------------- outputs of the reference code
def stored(name, device):
    """Arrays of the reference code -> {name: tensor on the device}; float64 becomes float32"""
    found = {}
    for key, x in np.load(GOLDEN / f"{name}.npz").items():
        if x.dtype.kind == "U":                                  # text
            continue
        x = torch.from_numpy(x)
        found[key] = (x.float() if x.is_floating_point() else x).to(device)
    return found


def golden_models(device):
    """Yield (our outputs, stored outputs) of the tokenizer, the student and the DiT"""
    io = stored("vtp_p8/io", device)
    model = VTPModel.from_pretrained(GOLDEN / "vtp_p8", "float32").to(device)
    feature = model.get_last_layer_feature(io["image"])
    yield feature["patch_tokens"], io["rope_fp32.last.patch_tokens"]
    yield model.get_reconstruction_latents(io["image"]), io["rope_fp32.latents"]
    decoded = model.get_latents_decoded_images(io["rope_fp32.latents"])
    yield decoded, io["rope_fp32.decoded"]

    from test_model import ssl_student
    io = stored("vtp_ssl/io", device)
    student = ssl_student(GOLDEN / "vtp_ssl", "float32")[0].to(device)
    crops, mask = (io[name].unflatten(0, (2, -1)) for name in ("global_crops", "masks"))
    index, _ = mask_index_and_weight(mask)
    logits, patch_logits, _ = student.views(crops, io["local_crops"].unflatten(0, (4, -1)), mask,
                                            index, {"ssl": None, "local": None})
    name = "rope_fp32.student.student_{}_after_head"
    yield logits[:2].flatten(0, 1), io[name.format("global_cls_tokens")]
    yield logits[2:].flatten(0, 1), io[name.format("local_cls_tokens")]
    yield patch_logits, io[name.format("global_masked_patch_tokens")]
    yield student.model.get_clip_text_feature(io["clip.text"]), io["clip.text_features"]

    io = stored("dit", device)
    model = dit.LightningDiT(input_size=8, in_channels=16, hidden_size=64, depth=3, num_heads=2,
                             num_classes=10)
    weights = {k.removeprefix("weights/"): x for k, x in io.items() if k.startswith("weights/")}
    model.load_state_dict(weights)
    model.to(device)
    yield model(io["fwd/x"], io["fwd/t"], io["fwd/y"]), io["fwd/out"]


def golden_losses(device, amp):
    """Yield (loss or gradient, stored value) of CLIP, SigLIP, DINO, iBOT and KoLeo; the losses are
    computed inside the context amp, the gradients outside, as in train.py"""
    def leaf(x):
        return x.clone().requires_grad_()

    def gradient(loss, x):
        return torch.autograd.grad(loss, [x])[0]

    g = stored("clip_single", device)
    scale, bias = g["scale0/logit_scale_log"].exp(), g["scale0/logit_bias"]
    for kind in ("clip", "siglip"):
        img, txt = leaf(g["raw_image"]), leaf(g["raw_text"])
        unit = F.normalize(img, dim=-1), F.normalize(txt, dim=-1)
        with amp:
            loss = losses.contrastive_loss(kind, *unit, scale, bias)
        yield loss, g[f"f64/scale0/{kind}/loss"]
        yield gradient(loss, img), g[f"f64/scale0/{kind}/grad_raw_image"]

    g = stored("dino_cls_loss", device)
    student = leaf(torch.cat([g["step0/student_global"], g["step0/student_local"]]))
    with amp:
        teacher = losses.sinkhorn(g["step0/teacher_logits"], g["teacher_temps"][0].item())
        loss = losses.dino_loss(student, teacher)
    yield teacher, g["f64/sinkhorn/step0/teacher_probs"]
    yield loss, g["f64/sinkhorn/step0/loss_total"]
    yield gradient(loss, student)[:2], g["f64/sinkhorn/step0/grad_student_global"]

    g = stored("ibot_patch_loss", device)
    student = leaf(g["step0/student_logits_masked"])
    with amp:
        teacher = losses.sinkhorn(g["step0/teacher_logits_masked"], g["teacher_temps"][0].item())
        loss = losses.ibot_loss(student, teacher, g["step0/masks_weight"], len(g["step0/masks"]))
    yield loss, g["f64/sinkhorn/step0/loss"]
    yield gradient(loss, student), g["f64/sinkhorn/step0/grad_student"]

    g = stored("koleo", device)
    x = leaf(g["case0/x"])
    with amp:
        loss = losses.koleo_loss(x)
    yield loss, g["case0/f64/loss"]
    yield gradient(loss, x), g["case0/f64/grad"]


def largest_error(pairs):
    """pairs of (ours, stored) -> largest difference, relative to the largest stored magnitude"""
    return largest(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
