"""Training batches from worker processes, in slices: one worker computes a part of a batch.

    prefetch_in_slices    data.prefetch for training batches and worker processes
    SlicedBatches         slice i of all slices of a training, in order
    join                  slices -> the batch of a step, equal in every bit to a batch that is
                          computed at once

With --size L, 256 px and 8 processes, the batch of one process has 758 MB. If one worker computed
it alone, every worker would hold a whole batch in shared memory, and the first step would wait for
a single core. So a batch is cut into n slices. The content of a batch does not depend on the number
of processes: slice k of process r is what process r * n + k of n times as many processes would
compute.
"""
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import torch

from ..augment import mask_index_and_weight
from ..dist import print0
from .workers import clear_errors, map_in_processes

# The largest slice, if the batch can be divided. 64 images of L, with the crops of 16 of them, take
# 24 MB and a quarter of a second of a core (ours).
MAX_IMAGES = 64
# the dimension of each tensor of a batch that counts images; the others are treated in `join`
IMAGE_DIM = {"image": 0, "rows_image": 0, "crops": 1, "locals": 1, "rows_ssl": 0, "mask": 1}


def prefetch_in_slices(batches, start, stop, workers):
    """data.prefetch for workers > 0. While the caller uses a batch, a thread joins the next one."""
    n = number_of_slices(batches)
    sliced = SlicedBatches(batches, n)
    check_shared_memory(batches, n, workers)
    slices = map_in_processes(sliced.__getitem__, range(start * n, stop * n), workers)
    if n == 1:
        return slices
    return one_ahead(slices, n, stop - start)


def number_of_slices(batches):
    """-> smallest number of equal slices of at most MAX_IMAGES images, if the sizes allow it

    Each slice needs equally many rows of each subset, so n divides their numbers on this process.
    """
    sizes = [(batches.batch, batches.clip), (batches.batch_ssl, batches.ssl),
             (batches.batch_rec, batches.rec)]
    rows = [size // batches.world_size for size, is_on in sizes if is_on]
    images = batches.images_per_step // batches.world_size
    largest = gcd(*rows)
    divisors = [n for n in range(1, largest + 1) if largest % n == 0]
    return next((n for n in divisors if images <= n * MAX_IMAGES), largest)


@dataclass
class SlicedBatches:
    """SlicedBatches(...)[i] -> slice i % n of step i // n, a Batch"""
    batches: Any                        # data.TrainBatches
    n: int

    def __getitem__(self, i):
        step, k = divmod(i, self.n)
        if self.n == 1:
            return self.batches[step]
        own, total = self.batches.rank * self.n + k, self.batches.world_size * self.n
        # depth 0: a slice draws no stochastic depth; the first slice has that of the whole batch
        part = replace(self.batches, rank=own, world_size=total, depth=0)[step]
        if k == 0:
            part.keep = self.batches.stochastic_depth(step)
        return part


def join(slices, n):
    """An iterator over slices, of which the next n are read -> Batch

    Each slice is copied when it arrives, so that its shared memory is free again.
    """
    for k in range(n):
        part = next(slices)
        if k == 0:
            out = replace(part, captions=[], bad=[], n_crops=0)
            texts, rec = [], []
            for name, dim in IMAGE_DIM.items():
                x = getattr(part, name)
                if x is not None:
                    shape = list(x.shape)
                    shape[dim] *= n
                    setattr(out, name, x.new_empty(shape))
        for name, dim in IMAGE_DIM.items():
            x = getattr(part, name)
            if x is not None:
                length = x.shape[dim]
                getattr(out, name).narrow(dim, k * length, length).copy_(x)
        out.captions += part.captions
        out.bad += part.bad
        out.n_crops += part.n_crops
        texts.append(part.text)
        if part.rec is not None:
            # positions among the images of the whole batch
            rec.append(part.rec + k * len(part.image))
    if out.text is not None:
        out.text = pad_and_join(texts)
    if rec:
        out.rec = torch.cat(rec)
    if out.mask is not None:
        out.mask_index, out.mask_weight = mask_index_and_weight(out.mask)
    return out


def pad_and_join(texts):
    """list of (b, T), T may differ -> (n b, longest T); 0 is padding"""
    longest = max(text.shape[1] for text in texts)
    padded = [torch.nn.functional.pad(text, (0, longest - text.shape[1])) for text in texts]
    return torch.cat(padded)


def one_ahead(slices, n, steps):
    """Yield the joined batches of `steps` steps. Two batches are in memory: the one that the caller
    uses, and the next one, which a thread joins meanwhile."""
    stopped = threading.Event()

    def until_stopped():
        for part in slices:
            if stopped.is_set():               # the caller needs no further batch
                return
            yield part

    source = until_stopped()
    with ThreadPoolExecutor(1) as thread:
        try:
            following = thread.submit(join, source, n)
            for step in range(steps):
                with clear_errors():
                    batch = following.result()
                if step + 1 < steps:
                    following = thread.submit(join, source, n)
                yield batch
        finally:
            stopped.set()


# ---------------------------------------------------------------- shared memory
def check_shared_memory(batches, n, workers):
    """Print a note if the slices that wait may not fit into the machine's free shared memory."""
    if not os.path.isdir("/dev/shm"):          # macOS has no such folder
        return
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    needed = processes * shared_memory(batches, n, workers) / 1e9
    free = shutil.disk_usage("/dev/shm").free / 1e9
    if needed > free:
        print0(f"note: {workers} workers for each of {processes} processes need {needed:.2g} GB of "
               f"shared memory (/dev/shm), but {free:.2g} GB are free. What does not fit passes "
               f"through a pipe, which is slower: give the container more, for example docker run "
               f"--shm-size={max(1, round(1.5 * needed))}g, or take fewer --workers")


def shared_memory(batches, n, workers):
    """-> bytes of the slices of one process that are in shared memory at the same time"""
    images = batches.batch if batches.clip else batches.rec * batches.batch_rec
    crops = batches.ssl * batches.batch_ssl                    # 0 if the objective is off
    pixels = images * batches.image ** 2
    pixels += crops * (2 * batches.image ** 2 + batches.n_local * batches.local_image ** 2)
    of_a_slice = 3 * pixels // batches.world_size // n
    # a DataLoader asks each worker for two slices in advance; one more is being joined
    return of_a_slice * (2 * workers + 1)
