"""Data parallelism with one process or many.

Helpers over torch.distributed. On a single process they return their input or do nothing, so other
files call them in both cases. `python train.py` starts one process, `torchrun` starts many.
"""
import os
import re

import torch
import torch.distributed as dist


def is_distributed():
    return dist.is_available() and dist.is_initialized()


def rank():
    """Number of this process, from 0 to world_size() - 1"""
    return dist.get_rank() if is_distributed() else 0


def world_size():
    """Number of processes"""
    return dist.get_world_size() if is_distributed() else 1


def under_torchrun():
    return "TORCHELASTIC_RUN_ID" in os.environ


def print0(*values):
    """Print on rank 0 only."""
    if rank() == 0:
        print(*values, flush=True)            # without flush, output to a file or pipe is delayed


def printable(text):
    """A file name, or any text, as one line for terminals and logs -> str

    Line breaks, control characters and undecodable bytes are escaped as in a Python string.
    """
    # ascii() returns the escaped character between quotes: [1:-1] removes the quotes
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def init_distributed(device=None):
    """Join the process group of torchrun if there is one -> torch.device of this process

    device  'cpu', 'cuda', 'mps', or None for the best available one. ValueError if the device is
            not available.
    """
    from .extras.output import protect_output
    protect_output()                          # a closed pipe or terminal ends no training
    device = choose_device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)         # NCCL needs a different GPU for each process
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from .extras import rendezvous
        store, own_rank, n_ranks = next(dist.rendezvous("env://"))
        rendezvous.explain_lost_process()
        store = rendezvous.fresh_store(store, own_rank, n_ranks)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=own_rank, world_size=n_ranks,
                                timeout=rendezvous.TIMEOUT)
    return device


def choose_device(name=None):
    """'cpu', 'cuda', 'mps', or None for the best available one -> torch.device of this process"""
    # in order of preference
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name is None:
        name = next((kind for kind in available if available[kind]), "cpu")
    if not re.fullmatch(r"(cpu|cuda|mps)(:\d+)?", name):
        raise ValueError(f"--device {name}: wanted cpu, cuda or mps")
    device = torch.device(name)
    n_devices = max(1, torch.cuda.device_count())
    # True: cpu is always available
    if not available.get(device.type, True) or (device.index or 0) >= n_devices:
        raise ValueError(f"--device {name} is not available on this machine or in this build of "
                         f"PyTorch; try --device cpu")
    if device.type == "cuda" and device.index is None:
        # torchrun numbers the processes of one machine by LOCAL_RANK: process i takes GPU i
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return device


def cleanup():
    """Leave the process group."""
    if is_distributed():
        dist.destroy_process_group()


def barrier():
    """Wait until all ranks have called this function."""
    if is_distributed():
        dist.barrier()


# ---------------------------------------------------------------- data of a rank
def rank_slice(n):
    """Rows of this rank among n rows -> range

    Slices are contiguous, in rank order, and differ in length by at most 1.
    """
    return range(rank() * n // world_size(), (rank() + 1) * n // world_size())


# ---------------------------------------------------------------- without gradient
# These three change x in place and return it. All ranks must call them in the same order.
def all_reduce_sum(x):
    """Sum of x over ranks, in place"""
    if is_distributed():
        dist.all_reduce(x)
    return x


def all_reduce_max(x):
    """Maximum of x over ranks, in place"""
    if is_distributed():
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


def all_reduce_mean(x):
    """Mean of x over ranks, in place"""
    return all_reduce_sum(x).div_(world_size()) if is_distributed() else x


@torch.no_grad()
def all_gather_ragged(x):
    """x (n, ...), where n may differ between ranks -> the rows of all ranks, in rank order"""
    if not is_distributed():
        return x
    counts = [torch.empty(1, dtype=torch.long, device=x.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(x)], device=x.device))
    # all_gather needs equal shapes, so each rank pads to the longest and the padding is cut below
    longest = int(max(counts))
    parts = [x.new_empty(longest, *x.shape[1:]) for _ in counts]
    dist.all_gather(parts, torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])]))
    return torch.cat([part[:n] for part, n in zip(parts, counts)])


# ---------------------------------------------------------------- with gradient
class Gather(torch.autograd.Function):
    """Concatenate the rows of all ranks, with a gradient for the rows of this rank.

    Each rank computes the loss of its own rows against the rows of all ranks. A row therefore has a
    gradient on every rank, and the backward pass sums them. average_gradients then divides by the
    number of ranks. The result is the gradient of one process that holds the whole batch, as with
    OpenCLIP's --local-loss --gather-with-grad.
    """

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())                # it requires contiguous tensors
        return torch.cat(parts)                               # (world_size * B, ...)

    @staticmethod
    def backward(ctx, grad):
        # autograd may pass this tensor to other functions too, and all_reduce writes in place
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)                                 # (world_size * B, ...)
        return grad.chunk(world_size())[rank()]               # (B, ...)


def gather(x):
    """x (B, ...), B equal on all ranks -> (world_size * B, ...) on every rank, with gradient"""
    return Gather.apply(x) if is_distributed() else x


# ---------------------------------------------------------------- data parallelism
@torch.no_grad()
def broadcast_parameters(module):
    """Copy the parameters and buffers of rank 0 to all ranks."""
    if is_distributed():
        # state_dict contains the parameters and buffers themselves, not copies
        for x in module.state_dict().values():
            dist.broadcast(x, 0)


@torch.no_grad()
def average_gradients(module, bucket_size=2 ** 24, dtype="fp32"):
    """Replace each gradient by its mean over ranks.

    Gradients are copied into flat buffers of up to `bucket_size` numbers, because few large
    all_reduce calls are faster than many small ones. A tensor larger than that is a bucket alone.

    dtype  "bf16": gradients are rounded to bfloat16, sent and added in it. This halves the bytes,
           and each rounding has a relative error of up to 2^-8. "fp32": gradients are sent as
           they are.
    """
    if not is_distributed():
        return
    bucket = []
    size = 0                                                  # numbers in the bucket
    for p in module.parameters():
        # A gradient of None stays None. As zeros, it would make AdamW apply weight decay. The flags
        # alone decide which gradients are None, so the buckets are equal on all ranks.
        if p.grad is None:
            continue
        if size + p.numel() > bucket_size:
            average_bucket(bucket, dtype)
            bucket = []
            size = 0
        bucket.append(p.grad)
        size += p.numel()
    average_bucket(bucket, dtype)


def average_bucket(grads, dtype):
    """Replace each gradient by its mean over ranks. grads: list of tensors of one dtype"""
    if not grads:                             # if the first tensor is larger than a bucket
        return
    flat = torch.cat([g.flatten() for g in grads])
    if dtype == "bf16":
        flat = all_reduce_sum(flat.bfloat16()).to(flat.dtype) / world_size()
    else:
        flat = all_reduce_mean(flat)
    means = flat.split([g.numel() for g in grads])
    torch._foreach_copy_(grads, [mean.view_as(g) for mean, g in zip(means, grads)])
