"""Device and precision of a run.

    setup_device       --device, --precision -> torch.device, name of the precision
    autocast           the forward pass in bf16 or fp16
    full_precision     the losses in float32, whatever surrounds them
"""
import os
import resource
import sys
import time
from contextlib import contextmanager, nullcontext

import torch

from .dist import init_distributed, print0

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16,
          "fp16": torch.float16}

# values of ONEDNN_MAX_CPU_ISA with which oneDNN still multiplies bfloat16
ISA_WITH_BF16 = ("ALL", "DEFAULT", "AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX",
                 "AVX10")


def setup_device(args):
    """args.device, args.precision (None: choose) -> torch.device of this process, precision

    fp64 becomes PyTorch's default type.
    """
    device = init_distributed(args.device)
    set_tf32(device, True)
    precision = args.precision or choose_precision(device)
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("--precision fp16 is for GPUs; on a CPU take bf16 or fp32")
    if args.precision:
        warn_if_emulated(device, precision)
    torch.set_default_dtype(torch.float64 if precision == "fp64" else torch.float32)
    return device, precision


def move_to(x, device):
    """Copy x to the device, asynchronously only on CUDA.

    On MPS an asynchronous copy may not be complete when x is read.
    """
    return x.to(device, non_blocking=device.type == "cuda")


# ---------------------------------------------------------------- precision
def autocast(device, precision):
    """A context for the forward pass. 'bf16' and 'fp16' cast the inputs of matrix products."""
    if precision in ("fp32", "fp64"):
        return nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


def to_fp32(x):
    """bfloat16 and float16 become float32; float32 and float64 stay."""
    return x if x.dtype == torch.float64 else x.float()


@contextmanager
def full_precision():
    """A decorator for losses: neither autocast nor TF32 rounds the inputs of their matrix products.

    KoLeo needs it most: with 512 features at distance 0.1 from a common direction, a bfloat16
    product finds the wrong nearest neighbour for 99 % of them. DINOv2 disables autocast there too.
    This covers the forward pass. The backward pass follows the settings in force when backward()
    is called: call it outside autocast, as PyTorch recommends.
    """
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    off = [torch.autocast(device, enabled=False) for device in ("cpu", "cuda", "mps")]
    try:
        with off[0], off[1], off[2]:
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32


def set_tf32(device, on):
    """Whether float32 matrix products on CUDA may round their inputs to TF32 (10 mantissa bits
    instead of 23).

    On for training, as in DINOv2 and OpenCLIP, for encoding latents, as in VTP, and for sampling,
    as in LightningDiT. Off, PyTorch's default, for training the DiT, as in LightningDiT, and for
    evaluation, as in VTP. The forward pass of the losses never uses TF32 (full_precision above).
    Convolutions always may: this is PyTorch's default for them.
    """
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = on


def tf32_of(device):
    """For printed lines and protocols: ", tf32 on" or ", tf32 off" on CUDA, else nothing"""
    if device.type != "cuda":
        return ""
    return f", tf32 {'on' if torch.backends.cuda.matmul.allow_tf32 else 'off'}"


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
    ratio = peak_flops(device, "fp32") / peak_flops(device, "bf16")
    print0(f"note         --precision bf16 is only emulated by this {device.type}: a matrix "
           f"product takes {ratio:.1f} times as long as in fp32 (measured now). The default here "
           f"is {choose_precision(device)}.")


# ---------------------------------------------------------------- what the machine can do
def peak_flops(device, precision, seconds=0.3):
    """FLOP/s of one large matrix product in this precision, measured now"""
    n = 1024 if device.type == "cpu" else 8192
    a = torch.randn(n, n, device=device, dtype=DTYPES[precision])
    a @ a
    synchronize(device)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        a @ a
        synchronize(device)
        count += 1
    return 2 * n ** 3 * count / (time.perf_counter() - start)


def synchronize(device):
    """Wait until the device has finished its work"""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory(device):
    """Largest memory of this process so far, in GB"""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1e9 if sys.platform == "darwin" else 1e6           # bytes on macOS, else KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
