"""Worker processes that compute batches, also where shared memory is small.

PyTorch passes tensors between processes in /dev/shm. Docker's default size is 64 MB. If a batch
does not fit, a thread of the worker fails, and the main process would wait for the batch without
end. Here the worker requests the memory itself; if it gets none, it sends the batch through a pipe,
which is slower. extras/slices.py divides training batches, so that less memory is needed.
"""
import os
import pickle
import signal
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import partial
from multiprocessing import Lock

import torch
from torch.utils.data import DataLoader

from .. import augment
from ..dist import print0

MAX_WORKERS = 32    # of a process, by default (ours)
MAX_WITHOUT_CUDA = 4    # a CPU or MPS uses up batches slowly, and each worker takes memory (ours)
MAX_WAIT = 0.2      # a larger share of time spent waiting for data is reported (ours)
ADVICE = ("set --workers 0, or give the container more shared memory, for example docker run "
          "--shm-size=8g")


def cores_per_process():
    """-> number of CPU cores for each process of this machine"""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):       # Slurm and taskset can restrict a process
        cores = len(os.sched_getaffinity(0))
    return cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def default_workers():
    """-> one worker for each core of this process, less one for the process itself, at most
    MAX_WORKERS, or MAX_WITHOUT_CUDA; 0 with up to 4 cores, which the process needs itself"""
    cores = cores_per_process()
    most = MAX_WORKERS if torch.cuda.is_available() else MAX_WITHOUT_CUDA
    return min(cores - 1, most) if cores > 4 else 0


def wait_warning(workers):
    """-> warn(share), a function to call with data_wait of each line of the log: the share of the
    time that was spent waiting for data. The second time that it exceeds MAX_WAIT, it prints what
    to do, once. (The first time, the workers may just have been started.)"""
    exceeded = []

    def warn(share):
        if share <= MAX_WAIT:
            return
        exceeded.append(share)
        if len(exceeded) != 2:
            return
        wanted = max(cores_per_process() - 1, 1)
        advice = (f"all {wanted + 1} cores of this process are in use: store the images at a "
                  f"smaller size, or take fewer crops (--set locals=...)")
        if workers < wanted:
            advice = f"try --workers {wanted}"
        print0(f"\nnote: {share:.0%} of the time is spent waiting for data (data_wait in "
               f"log.jsonl), with --workers {workers}; {advice}")

    return warn


def map_in_processes(function, items, workers):
    """data.map_in_workers for workers > 0. ValueError if a worker process ends."""
    try:
        # The queues of a DataLoader have 3 locks per worker and 8 more. They are in shared memory,
        # too, and a DataLoader without them would also print a traceback.
        [Lock() for _ in range(3 * workers + 8)]
        # With batch_size=None, DataLoader calls collate_fn on single items, in the worker. Without
        # a generator of its own it would draw a seed from torch's global generator.
        loader = iter(DataLoader(items, batch_size=None, collate_fn=partial(compute, function),
                                 num_workers=workers, generator=torch.Generator(),
                                 worker_init_fn=partial(init_worker, augment.ssl_views)))
    except OSError as error:
        raise ValueError(f"worker processes cannot be started ({error}); {ADVICE}") from error
    return receive(loader)


def init_worker(ssl_views, worker):
    """Set up a worker process. It ignores signals that are sent to the whole process group,
    because the main process handles them and may need another batch to finish its step.

    ssl_views  the function that the main process uses      worker  number of the worker, not used
    """
    # a spawned worker imports the plain form anew and has not run extras.fast.install()
    augment.ssl_views = ssl_views
    # Ctrl-C, job schedulers, a closed terminal
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))    # exit after 30 seconds
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))


class Pickled(bytes):
    """A result that did not fit into shared memory"""


def compute(function, item):
    """In the worker: function(item), its tensors moved to shared memory, or pickled"""
    result = function(item)
    try:
        for tensor in tensors_of(result):
            if tensor.numel():
                tensor.share_memory_()
    except RuntimeError:                                      # no space left on device
        return Pickled(pickle.dumps(result))
    return result


def tensors_of(value):
    """Yield the tensors that are sent with a value: a tensor, dict, list, tuple or dataclass"""
    if torch.is_tensor(value):
        yield value
    elif is_dataclass(value):
        yield from tensors_of(value.__getstate__())           # data.Batch sends some as arrays
    elif isinstance(value, dict):
        yield from tensors_of([*value.values()])
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_of(part)


@contextmanager
def clear_errors():
    """with clear_errors(): an error of a worker becomes a ValueError with one sentence"""
    try:
        yield
    except ValueError as error:                # above the last line is the worker's traceback
        sentence = str(error).strip().splitlines()[-1]
        raise ValueError(sentence.removeprefix("ValueError: ")) from error
    except RuntimeError as error:
        # PyTorch's message for a worker that was killed; other errors come from the function
        if "DataLoader worker (pid" not in str(error):
            raise
        raise ValueError(f"a worker process ended ({str(error).splitlines()[0]}); it was "
                         f"killed, or memory is full: {ADVICE}") from error


def receive(loader):
    """In the main process: yield the results of the workers"""
    noted = False
    while True:
        with clear_errors():
            result = next(loader, None)
        if result is None:                     # the functions of data.py return no None
            return
        if isinstance(result, Pickled):
            if not noted:
                print0(f"note: shared memory (/dev/shm) is too small for batches of "
                       f"{len(result) / 1e6:.0f} MB, so they pass through a pipe, which is slower; "
                       f"{ADVICE}")
                noted = True
            result = pickle.loads(result)
        yield result
