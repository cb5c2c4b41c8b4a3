"""One process or many: helpers over torch.distributed that do nothing on a single process.

Start with plain python (one process) or with torchrun (many).
"""
import os
import sys

import torch
import torch.distributed as dist


def is_distributed():
    return dist.is_available() and dist.is_initialized()


def rank():
    return dist.get_rank() if is_distributed() else 0


def world_size():
    return dist.get_world_size() if is_distributed() else 1


def under_torchrun():
    return "TORCHELASTIC_RUN_ID" in os.environ


def print0(*words):
    """print, on rank 0 only"""
    if rank() == 0:
        print(*words, flush=True)


def printable(text):
    """A name as one line for terminals and logs. Line breaks, control and undecodable characters
    are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def init_distributed(device=None):
    """Join the process group of torchrun if there is one -> the torch.device of this process.

    device  'cpu', 'cuda', 'mps', or None for the best one present. ValueError if it is absent.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")     # a terminal with LANG=C lacks letters
    device = choose_device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        store, number, n = next(dist.rendezvous("env://"))
        # torchrun keeps one store through its restarts. Without a prefix for each restart, a new
        # process may connect to the address of a dead one.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=n)
    return device


def choose_device(name=None):
    """'cpu', 'cuda', 'mps', or None for the best one present -> torch.device of this process"""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name is None:
        name = next((kind for kind in present if present[kind]), "cpu")
    device = torch.device(name)
    if not present.get(device.type, True):
        raise ValueError(f"--device {name}, but this machine (or this build of PyTorch) has none; "
                         f"try --device cpu")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return device


def cleanup():
    """Leave the process group"""
    if is_distributed():
        dist.destroy_process_group()


def barrier():
    """Wait until all ranks are here"""
    if is_distributed():
        dist.barrier()


# ---------------------------------------------------------------- data of a rank
def rank_slice(n):
    """Rows of this rank among n: contiguous, in rank order -> range"""
    return range(rank() * n // world_size(), (rank() + 1) * n // world_size())


# ---------------------------------------------------------------- without gradient
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
    """(n, ...) of each rank, where n may differ -> the rows of all ranks, in rank order"""
    if not is_distributed():
        return x
    counts = [torch.empty(1, dtype=torch.long, device=x.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(x)], device=x.device))
    longest = int(max(counts))
    parts = [x.new_empty(longest, *x.shape[1:]) for _ in counts]
    dist.all_gather(parts, torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])]))
    return torch.cat([part[:n] for part, n in zip(parts, counts)])


# ---------------------------------------------------------------- with gradient
class Gather(torch.autograd.Function):
    """The rows of all ranks, in rank order.

    The backward pass sums the gradients that all ranks have for this rank's rows. Each rank returns
    the loss of its own rows, and gradients are averaged over ranks (average_gradients), so the
    result is the gradient of one process that holds the whole batch.
    """

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(world_size())[rank()]


def gather(x):
    """(B, ...) of each rank -> (world_size * B, ...) on every rank, with gradient"""
    return Gather.apply(x) if is_distributed() else x


# ---------------------------------------------------------------- data parallelism
@torch.no_grad()
def broadcast_parameters(module):
    """All ranks take the parameters and buffers of rank 0"""
    if is_distributed():
        for x in module.state_dict().values():
            dist.broadcast(x, 0)


@torch.no_grad()
def average_gradients(module, bucket_size=2 ** 24):
    """Replace each gradient by its mean over ranks. Nothing happens on a single process.

    Gradients are copied into flat buffers of up to `bucket_size` numbers, so that there are few
    all_reduce calls. A gradient that is None stays None: AdamW would decay the weight if it
    became zero. Which ones are None depends only on the flags, so it is equal on all ranks.
    """
    if not is_distributed():
        return
    bucket, size = [], 0
    for p in module.parameters():
        if p.grad is None:
            continue
        if size + p.numel() > bucket_size:
            average_bucket(bucket)
            bucket, size = [], 0
        bucket.append(p.grad)
        size += p.numel()
    average_bucket(bucket)


def average_bucket(grads):
    """grads  tensors of one dtype; each becomes its mean over ranks"""
    if not grads:
        return
    flat = all_reduce_mean(torch.cat([g.flatten() for g in grads]))
    means = flat.split([g.numel() for g in grads])
    torch._foreach_copy_(grads, [mean.view_as(g) for mean, g in zip(means, grads)])
