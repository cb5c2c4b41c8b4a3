"""Device and precision of a run.

    setup_device       --device and --precision -> torch.device, name of the precision
    autocast           context for the forward pass: matrix products in bf16 or fp16
    full_precision     decorator for the losses: float32, also under autocast
    peak_flops         speed of matrix products on this device, measured

Precisions have the names fp64, fp32, bf16 and fp16.
"""
import os
import resource
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from .dist import init_distributed, print0

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16,
          "fp16": torch.float16}

# values of ONEDNN_MAX_CPU_ISA that still allow oneDNN to use bfloat16 instructions
ISA_WITH_BF16 = ("ALL", "DEFAULT", "AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX",
                 "AVX10")


def setup_device(args):
    """args.device, args.precision (None: choose the best) -> torch.device, name of the precision

    Joins the process group, allows TF32, and sets PyTorch's default dtype: float64 for fp64, else
    float32. ValueError for fp16 on a CPU.
    """
    device = init_distributed(args.device)
    set_tf32(device, True)                    # as in DINOv2 and OpenCLIP
    precision = args.precision or choose_precision(device)
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("--precision fp16 works on GPUs only; on a CPU, use bf16 or fp32")
    if args.precision:
        # choose_precision never chooses an emulated type, so only the user's choice is checked
        warn_if_emulated(device, precision)
    # the default type of parameters and of new tensors; bf16 and fp16 are applied by autocast
    torch.set_default_dtype(torch.float64 if precision == "fp64" else torch.float32)
    return device, precision


def move_to(x, device):
    """Copy x to the device; on CUDA, the host does not wait for the copy.

    CUDA copies asynchronously only from pinned memory. On MPS, and on the CPU after a copy from a
    GPU, x could be read before an asynchronous copy is complete.
    """
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.contiguous().pin_memory()
    return x.to(device, non_blocking=device.type not in ("mps", "cpu"))


# ---------------------------------------------------------------- precision
def autocast(device, precision):
    """Context for the forward pass. With bf16 and fp16, matrix products are in that precision.

    The parameters and the optimizer stay in float32: the inputs of each product are converted.
    """
    if precision in ("fp32", "fp64"):
        return nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


def to_fp32(x):
    """Convert bfloat16 and float16 to float32. float32 and float64 are returned as they are."""
    # float64 stays, so that losses can be compared with float64 references
    return x if x.dtype == torch.float64 else x.float()


@contextmanager
def full_precision():
    """Decorator for losses: matrix products in their forward pass use neither autocast nor TF32.

    KoLeo needs it most: for 512 features at distance 0.1 from a common direction, a bfloat16
    product finds the wrong nearest neighbour for 99 % of them. DINOv2 disables autocast there too.

    The backward pass follows the settings at the time of backward(). PyTorch recommends to call
    backward() outside autocast.
    """
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        # The device of the loss is not known here, so autocast is disabled for all three types.
        with (torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False),
              torch.autocast("mps", enabled=False)):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32


def set_tf32(device, on):
    """Allow or forbid TF32 on CUDA: float32 matrix products round their inputs to 10 mantissa bits
    instead of 23, which makes them faster.

    True for training (as DINOv2 and OpenCLIP), for encoding latents (as VTP) and for sampling (as
    LightningDiT). False, which is PyTorch's default, for training the DiT (as LightningDiT) and for
    evaluation (as VTP). The forward pass of the losses never uses TF32, see full_precision.
    Convolutions may always use it, which is PyTorch's default.
    """
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = on


def tf32_of(device):
    """Suffix for printed lines and protocols: ", tf32 on" or ", tf32 off" on CUDA, otherwise "" """
    if device.type != "cuda":
        return ""
    return f", tf32 {'on' if torch.backends.cuda.matmul.allow_tf32 else 'off'}"


def choose_precision(device):
    """-> "bf16" if the hardware supports it, else "fp16" on CUDA, else "fp32" """
    if multiplies_bf16(device):
        return "bf16"
    # older GPUs multiply fp16 in hardware, but not bf16
    return "fp16" if device.type == "cuda" else "fp32"


def multiplies_bf16(device):
    """True if the device is known to multiply bfloat16 in hardware.

    These are CUDA devices that report it, and x86 CPUs with AVX512-BF16 or AMX. On other devices
    PyTorch emulates bfloat16, which is slower than float32, or we do not know.
    """
    if device.type == "cuda":
        # with the default, True, the answer for emulated bf16 would also be True
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    flags = cpu_flags()
    in_hardware = "avx512_bf16" in flags or "amx_bf16" in flags
    # Environment variables can disable these instructions, which does not change the flags:
    # ATEN_CPU_CAPABILITY for PyTorch, ONEDNN_MAX_CPU_ISA (formerly DNNL_MAX_CPU_ISA) for oneDNN.
    in_pytorch = torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX", "AVX2")
    isa = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "ALL"
    in_onednn = isa.upper().startswith(ISA_WITH_BF16)
    return in_hardware and in_pytorch and in_onednn


def cpu_flags():
    """Words of /proc/cpuinfo -> list of str; empty on other systems than Linux

    On x86 they contain the names of the CPU's instruction sets. torch.cpu.get_capabilities() has
    the same information, but only in newer versions of PyTorch.
    """
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.read_text().split() if cpuinfo.exists() else []


def warn_if_emulated(device, precision):
    """Print a warning, with the measured slowdown, if bf16 is only emulated on this device.

    There is no warning on MPS: we do not know whether a Mac emulates bf16.
    """
    if precision != "bf16" or multiplies_bf16(device) or device.type == "mps":
        return
    ratio = peak_flops(device, "fp32") / peak_flops(device, "bf16")
    print0(f"note         --precision bf16 is only emulated on this {device.type}: a matrix "
           f"product takes {ratio:.1f} times as long as in fp32 (measured now). The default here "
           f"is {choose_precision(device)}.")


# ---------------------------------------------------------------- speed and memory
def peak_flops(device, precision, seconds=0.3):
    """Speed of one large matrix product in this precision, measured for `seconds` -> FLOP/s"""
    # large enough that the time is spent in multiplications, small enough to repeat on a CPU
    n = 1024 if device.type == "cpu" else 8192
    a = torch.randn(n, n, device=device, dtype=DTYPES[precision])
    a @ a                                                     # warm-up, not measured
    synchronize(device)
    start = time.perf_counter()
    count = 0
    while time.perf_counter() - start < seconds:
        a @ a
        synchronize(device)                                   # GPU operations are asynchronous
        count += 1
    # n^2 entries of n multiplications and n additions each
    return 2 * n ** 3 * count / (time.perf_counter() - start)


def synchronize(device):
    """Wait until the device has finished its operations."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory(device):
    """Peak memory of this process in GB: CUDA memory of its tensors, otherwise resident memory"""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024            # bytes on macOS, else KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
