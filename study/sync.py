"""Count the operators of a training step for which the host would wait for a GPU. No GPU is needed.

    python study/sync.py                   one line for each kind of step
    python study/sync.py --list            also the functions that wait or copy
    python study/sync.py --tree OLD        another version of this repository
    python study/sync.py --kernels S       operators of a step of this size, by name
    python study/sync.py --split           seconds in which --micro splits a batch of size L

train.py, stage 2 and dit.py run as they are, for a step without its log line, on PyTorch's `meta`
device: its tensors have a shape but no data, and like those of a GPU they are not on the CPU. A
TorchDispatchMode sees every operator, also those of the backward pass and of the optimizer. The
host waits for an operator if

    it returns a number to Python                      item(), tolist(), bool(tensor), cpu()
    the shape of its result depends on values          nonzero, boolean index, unique, bincount
    it copies from the CPU to the device, unless this is asynchronous (device.move_to). PyTorch 2.14
    does not show torch.tensor(values, device=...) to a mode; 2.15 does.

This list is ours. Waits inside a CUDA kernel's own code or in NCCL are not visible here. --kernels
runs on the CPU in bf16 and counts operators that compute; one of them is about one kernel on a GPU.
"""
import argparse
import contextlib
import functools
import importlib
import inspect
import io
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

META = torch.device("meta")
# 2.5.1 ends with a segmentation fault in this mode; the next version that was tried is 2.14
OLD_TORCH = torch.torch_version.TorchVersion(torch.__version__) < "2.6"
TREE = Path(__file__).resolve().parents[1]
SHAPE_FROM_VALUES = {"nonzero", "masked_select", "_unique", "_unique2", "unique_dim",
                     "unique_consecutive", "bincount", "equal", "is_nonzero"}
# they have no form for meta tensors; on CUDA they do not wait
NOT_ON_META = {"_amp_foreach_non_finite_check_and_unscale_", "_amp_update_scale_", "_fused_adamw_"}
NO_KERNEL = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach",
             "_unsafe_view", "lift_fresh", "_local_scalar_dense", "promote_types",
             "profiler::_record_function_enter_new", "profiler::_record_function_exit"}
PICO = ("--size pico --set drop_ssl=0.3 --set drop_clip=0.2 --set drop_rec=0.1 --batch 16 "
        "--batch-ssl 8 --batch-rec 8 --perceptual vgg").split()
KINDS = {   # name: script, flags, precision, fast forms
    "plain": ("train", [], "fp32", False),
    "fast forms": ("train", [], "fp32", True),
    "fp16 with scaler": ("train", [], "fp16", False),
    "--micro 8 (2 parts)": ("train", ["--micro", "8"], "fp32", False),
    "--micro 4 (4 parts)": ("train", ["--micro", "4"], "fp32", False),
    "--micro 8, centering": ("train", "--micro 8 --set teacher=centering".split(), "fp32", False),
    "centering, siglip": ("train", "--set teacher=centering --set clip_loss=siglip".split(),
                          "fp32", False),
    "--recompute": ("train", ["--recompute"], "fp32", False),
    "stage 2": ("gan", [], "fp32", False),
    "stage 2, fp16": ("gan", [], "fp16", False),
    "dit.py train": ("dit", [], "fp32", False),
}


def on_meta(x):
    return torch.is_tensor(x) and x.device == META


class Recorder(TorchDispatchMode):
    """found: Counter of (reason, function); kernels: Counter of operators; both of the last step"""

    def __init__(self, tree, warmup):
        super().__init__()
        self.tree, self.warmup = tree, warmup              # warmup: steps that are not counted
        self.found, self.kernels = Counter(), Counter()

    def batches(self, data, start, stop, workers):
        """In place of data.prefetch"""
        return (data[step] for step in range(self.warmup + 1))

    def watch(self, batches):
        """In place of Run.watch, which gives the batches to the loop"""
        for batch in batches:
            self.found.clear()
            self.kernels.clear()
            with self:
                yield batch

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        is_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and name not in NO_KERNEL:
            self.kernels[name] += 1
        if name in NOT_ON_META and any(map(on_meta, torch.utils._pytree.tree_leaves(args))):
            return args[0] if func._schema.returns else None
        reason = self.reason(name, args, kwargs)
        if reason:
            self.found[reason, self.function()] += 1
        if reason == "number to Python":                 # a value that a real step could have
            x = args[0]
            return 0 if name == "_local_scalar_dense" else torch.zeros(x.shape, dtype=x.dtype)
        return func(*args, **kwargs)

    def reason(self, name, args, kwargs):
        """-> why the host would wait, "asynchronous copy" to the device, or None"""
        x = args[0] if args else None
        is_copy = name == "_to_copy" and kwargs.get("device") not in (None, x.device)
        if is_copy:
            if on_meta(x):
                return "number to Python"
            return "asynchronous copy" if kwargs.get("non_blocking") else "copy to the device"
        if not on_meta(x):
            return None
        if name == "_local_scalar_dense":
            return "number to Python"
        if name == "lift_fresh":
            return "copy to the device"                  # torch.tensor(values, device=...)
        if name == "copy_" and not on_meta(args[1]):
            return "copy to the device"
        if name in SHAPE_FROM_VALUES:
            return name
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            return name
        if name.startswith("index") and isinstance(args[1], (list, tuple)):
            if any(torch.is_tensor(i) and i.dtype == torch.bool for i in args[1]):
                return "boolean index"
        return None

    def function(self):
        """-> file and function that called the operator, or the backward pass with it"""
        frame = sys._getframe(2)
        while frame:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(self.tree) and not {".venv", "study"} & {*path.parts}:
                return f"{path.relative_to(self.tree)}, {frame.f_code.co_name}"
            frame = frame.f_back
        return "elsewhere"


# ---------------------------------------------------------------- running the programs
def run(script, flags=(), precision="fp32", use_fast=False, device=META):
    """A step of train.py ("train"), of its stage 2 ("gan") or of dit.py ("dit") -> Recorder"""
    names = "train", "dit", "vtp_min.extras.gan", "vtp_min.extras.perceptual", "vtp_min.extras.fast"
    train, dit, gan, perceptual, fast = map(importlib.import_module, names)
    # the gradient scaler of fp16 and the optimizer create their tensors in the first step
    warmup = 1 if precision == "fp16" or device != META else 0
    recorder = Recorder(Path(train.__file__).parent, warmup)
    lpips = random_lpips(perceptual)
    replaced = {
        train: dict(setup_device=lambda _: (device, precision), prefetch=recorder.batches),
        gan: dict(setup=lambda _: (device, precision), build=lambda _: lpips,
                  VTPModel=SimpleNamespace(from_pretrained=tiny_model)),
        dit: dict(prefetch=recorder.batches),
        perceptual: dict(build=lambda _: lpips),
        importlib.import_module("vtp_min.extras.latents"): dict(
            Latents=Latents, LatentBatches=lambda *_: [latents_batch()] * 2),
        importlib.import_module("vtp_min.extras.previews"): dict(Previews=mock.Mock()),
    }
    with contextlib.ExitStack() as stack:
        for module, attributes in replaced.items():
            stack.enter_context(mock.patch.multiple(module, **attributes))
        if device == META:                                       # has neither autocast nor fused
            for module in (train, gan, dit):
                stack.enter_context(mock.patch.object(module, "autocast", no_context))
            stack.enter_context(mock.patch("torch.optim.adam._device_dtype_check_for_fused"))
        stack.enter_context(mock.patch.multiple(
            "vtp_min.run.Run", watch=lambda _, batches: recorder.watch(batches),
            start=mock.DEFAULT, after_step=mock.DEFAULT))
        if use_fast:
            stack.callback(fast.install())
        out = stack.enter_context(tempfile.TemporaryDirectory())
        for redirect in (contextlib.redirect_stdout, contextlib.redirect_stderr):
            stack.enter_context(redirect(io.StringIO()))
        stack.enter_context(contextlib.suppress(StopIteration))  # there is no further batch
        flags = ["--out", f"{out}/run", "--workers", "0", *flags]
        if script == "train":
            train.main(train.arguments([*PICO, *flags]))
        elif script == "gan":
            stage_2 = "--stage 2 --init none --data shapes --batch 4 --set gan_start=0".split()
            gan.main([*stage_2, *flags], train.clean_batches, recorder.batches)
        else:
            dit.train(dit.parse(["train", "none", "--size", "pico", *flags]), device)
    return recorder


@functools.cache
def random_lpips(perceptual):
    """LPIPS with random weights needs no file"""
    with warnings.catch_warnings(action="ignore"):               # of the package lpips
        return perceptual.Perceptual("vgg", random_trunk=True)


def no_context(device, precision):
    return contextlib.nullcontext()


def tiny_model(folder):
    """In place of the model of --init"""
    from vtp_min.model import VTPConfig, VTPModel
    return VTPModel(VTPConfig.of_size("pico", 36, 9, 64))


class Latents(list):
    """In place of the latents of a folder"""
    stats, shape, classes, folder = {}, (16, 4, 4), ["a", "b"], Path(".")
    labels = torch.zeros(0)
    about = {"tokenizer": "", "encoder": "", "data": "", "split": ""}

    def check(self, load_tokenizer):
        """They fit to any tokenizer"""


def latents_batch():
    x1, x0 = torch.randn(2, 4, 16, 4, 4)
    return dict(x1=x1, x0=x0, z=torch.randn(4), y=torch.zeros(4, dtype=torch.long))


def print_kind(name, recorder, with_functions):
    found = recorder.found
    copies = {key: n for key, n in found.items() if key[0] == "asynchronous copy"}
    waits = {key: n for key, n in found.items() if key not in copies}
    print(f"{name:24} {sum(waits.values()):6} {sum(copies.values()):8}")
    for (reason, function), n in sorted(found.items()) if with_functions else ():
        print(f"    {n:4} x {reason:20} {function}")


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--list", action="store_true")
    p.add_argument("--tree", type=Path, default=TREE)
    p.add_argument("--kernels", metavar="SIZE")
    p.add_argument("--split", action="store_true")
    args = p.parse_args()
    if OLD_TORCH:
        raise SystemExit(f"sync.py: PyTorch {torch.__version__} crashes when operators are counted in "
                         f"this way; install a newer one")
    sys.path.insert(0, str(args.tree.resolve()))
    if args.split:
        print_split_time()
        return
    if args.kernels:
        print_kernels(args.kernels)
        return
    print(f"{'step':24} {'waits':>6} {'copies':>8}    a copy is asynchronous, the host goes on")
    for name, kind in KINDS.items():
        print_kind(name, run(*kind), args.list)


def print_kernels(size):
    """With the stochastic depth of S, B, L. The batch does not change the number."""
    flags = ("--batch 4 --batch-ssl 2 --batch-rec 2 --image 64 --patch 16 --set drop_clip=0 "
             f"--set drop_rec=0 --size {size}").split()
    for forms in ("fast=0", "fast=1"):
        counts = run("train", [*flags, "--set", forms], "bf16", device=torch.device("cpu")).kernels
        print(f"{size}, bf16, --set {forms}: {sum(counts.values())} operators that compute")
        print(", ".join(f"{n} {name}" for name, n in counts.most_common(20)))


def print_split_time(n=32, size=512, depth=24):
    """One of 8 processes of README's command for L: 2048 images, 512 of them with 2 + 8 crops, in
    micro-batches of 64. The images have one pixel, because they are only sliced."""
    from data import Batch
    from vtp_min.augment import kept_rows, mask_index_and_weight
    from vtp_min.extras.gradcache import split_batch
    keep = {"image": None, "ssl": kept_rows(0.3, depth, range(2 * size), 2 * size, 0, 0, 2),
            "local": kept_rows(0.3, depth, range(8 * size), 8 * size, 0, 0, 3)}
    mask = torch.rand(2, size, 256, generator=torch.Generator().manual_seed(0)) < 0.15
    index, weight = mask_index_and_weight(mask)
    pixels = torch.zeros(8, 4 * size, 3, 1, 1, dtype=torch.uint8)
    batch = Batch([], [], image=pixels[0], text=torch.zeros(4 * size, 77, dtype=torch.long),
                  rec=torch.arange(0, 4 * size, 8), crops=pixels[:2, :size],
                  locals=pixels[:, :size], mask=mask, mask_index=index, mask_weight=weight,
                  n_crops=2 * size, keep=keep)
    device = [META] if "device" in inspect.signature(split_batch).parameters else []
    seconds = []
    for _ in range(5):
        start = time.process_time()
        split_batch(batch, n, *device)
        seconds.append(time.process_time() - start)
    print(f"CPU seconds to split a batch of size L into {n} micro-batches: "
          f"{statistics.median(seconds):.3f}, median of 5 [{min(seconds):.3f}, {max(seconds):.3f}]")


if __name__ == "__main__":
    main()
