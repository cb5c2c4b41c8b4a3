"""Many processes, or one: a few helpers over torch.distributed that vanish on a laptop.

A model never asks which rank it is on; data is told (rank, world); a loss may `gather` or `total`;
a script may `start`, `stop` and `say`. Launch with plain python (one process) or torchrun (many).
"""
import os
import sys

import torch
import torch.distributed as dist


def on(): return dist.is_available() and dist.is_initialized()
def rank(): return dist.get_rank() if on() else 0
def world(): return dist.get_world_size() if on() else 1
def under_torchrun(): return "TORCHELASTIC_RUN_ID" in os.environ
def say(*words): print(*words, flush=True) if rank() == 0 else None


def start(device=None):
    """Join torchrun's process group if there is one -> the torch.device of this process.

    device  'cpu', 'cuda', 'mps' or None (the best one present)
    """
    if hasattr(sys.stdout, "reconfigure"):                    # names and captions in letters that the terminal lacks (LANG=C) are spelled out
        sys.stdout.reconfigure(errors="backslashreplace")
    name = device or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    here = torch.device(name)
    if here.type == "cuda" and not torch.cuda.is_available() or here.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"--device {name}, but this machine (or this build of PyTorch) has none; try --device cpu")
    if here.type == "cuda":
        here = torch.device("cuda", here.index if here.index is not None else int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(here)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        store, number, n = next(dist.rendezvous("env://"))    # torchrun keeps one store through its restarts: without a prefix of its own, a
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)       # new process may call on the address of a dead one
        dist.init_process_group("nccl" if here.type == "cuda" else "gloo", store=store, rank=number, world_size=n)
    return here


def stop():
    if on():
        dist.destroy_process_group()


def wait():
    """Every rank stands here until all do."""
    if on():
        dist.barrier()


class Gather(torch.autograd.Function):
    """Every rank's rows, in rank order. Backward sums what all ranks asked of my rows: with DDP's average on
    top, each rank's encoder receives exactly the gradient that one process would compute on the whole batch."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(world())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(world())[rank()]


def gather(x):
    """(B, ...) of each rank -> (world * B, ...) on every rank, with gradient"""
    return Gather.apply(x) if on() else x


def total(x):
    """Sum of x over ranks, in place, without gradient. x keeps its shape."""
    if on():
        dist.all_reduce(x)
    return x


def highest(x):
    """Maximum of x () over ranks, in place, without gradient"""
    if on():
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


@torch.no_grad()
def collect(x):
    """(n, ...) of each rank, n may differ -> the rows of all ranks in rank order, on every rank, without gradient"""
    if not on():
        return x
    counts = [torch.empty(1, dtype=torch.long, device=x.device) for _ in range(world())]
    dist.all_gather(counts, torch.tensor([len(x)], device=x.device))
    most = int(max(counts))
    parts = [x.new_empty(most, *x.shape[1:]) for _ in counts]
    dist.all_gather(parts, torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])]))
    return torch.cat([part[:n] for part, n in zip(parts, counts)])
