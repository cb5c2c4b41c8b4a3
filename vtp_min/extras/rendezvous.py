"""How the processes of torchrun meet, also after a restart, and what is said if one is missing.

    fresh_store           a key-value store for torch.distributed without the keys of earlier
                          attempts
    restarted             did torchrun or Slurm start this program again?
    raise_on_all          an error of one process ends all of them
    explain_lost_process  a sentence below the error of a process that has lost another one
"""
import os
import sys
import time
from datetime import timedelta
from socket import gethostname
from uuid import uuid4

import torch.distributed as dist

# Time that a process waits for the others, at the start and in each exchange (ours). The defaults
# of PyTorch are 30 minutes for gloo and 10 for NCCL. While rank 0 saves, the others wait, too.
TIMEOUT = timedelta(minutes=30)
SECONDS_TO_NOTE = 60       # after this time rank 0 prints which processes it still waits for
# parts of the messages of gloo and of the store
LATE = "Timed out waiting", "wait timeout after"
ENDED = "Connection closed by peer", "Connection reset by peer", "Broken pipe"
attempts = None            # how often torchrun has started the processes; None without torchrun


# ---------------------------------------------------------------- meeting
def fresh_store(store, rank, world_size):
    """Wait for all ranks -> the store with a prefix for its keys that no earlier attempt has used

    torchrun keeps its store when it starts the processes again. With the old keys, a process could
    read the address of one that no longer exists. ValueError on rank 0 if a rank does not come
    within TIMEOUT.
    """
    global attempts
    prefix, attempts = agree_on_prefix(store, rank, world_size)
    return dist.PrefixStore(prefix, store)


def agree_on_prefix(store, rank, world_size):
    """-> prefix; how often torchrun has started the processes, this start included. Equal on all
    ranks.

    TORCHELASTIC_RESTART_COUNT cannot be the prefix: each machine counts only its own restarts, and
    a machine whose processes were healthy does not count at all.

    Here each process draws a name. It shows the name to rank 0, which answers with its own name,
    the prefix. The processes of earlier attempts have ended, so only the new rank 0 can answer.
    """
    name = uuid4().hex
    if rank == 0:
        attempts = max(store.add("attempts", 1), 1 + restarts_on_this_machine())
        store.set(f"{name} attempts", str(attempts))
        meet_all(store, name, world_size)
        return name, attempts
    store.set(f"name of rank {rank}", name)
    prefix = store.get(f"answer to {name}").decode()          # waits until the key exists
    store.set(f"{prefix} has met rank {rank}", "")
    return prefix, int(store.get(f"{prefix} attempts"))


def restarts_on_this_machine():
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def meet_all(store, name, world_size):
    """Rank 0, with this name: answer all other ranks. ValueError if one does not come."""
    start = time.monotonic()
    noted = False
    missing = range(1, world_size)
    while True:
        for rank in missing:
            # The name can be that of an earlier attempt. So rank 0 answers until the rank has read
            # the answer.
            if store.check([f"name of rank {rank}"]):
                other = store.get(f"name of rank {rank}").decode()
                store.set(f"answer to {other}", name)
        missing = [rank for rank in missing if not store.check([f"{name} has met rank {rank}"])]
        if not missing:
            return
        seconds = time.monotonic() - start
        ranks = ", ".join(map(str, missing))
        if seconds > SECONDS_TO_NOTE and not noted:
            print(f"rank 0 waits for rank {ranks}", flush=True)
            noted = True
        if seconds > TIMEOUT.total_seconds():
            raise ValueError(f"{len(missing)} of {world_size} processes did not start within "
                             f"{TIMEOUT} (rank {ranks}); look for their errors, or for a machine "
                             f"that does not answer")
        time.sleep(0.05)


def restarted():
    """True if torchrun has started its processes again, or Slurm its job; equal on all ranks"""
    by_torchrun = attempts > 1 if attempts else restarts_on_this_machine() > 0
    return by_torchrun or os.environ.get("SLURM_RESTART_COUNT", "0") != "0"


# ---------------------------------------------------------------- ending together
def raise_on_all(problem):
    """ValueError on all ranks if one of them has a problem (str), else None. Without this, the
    other ranks would wait for that one until their time limit."""
    if not dist.is_initialized():
        problems = [problem]
    else:
        problems = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
    for text in problems:
        if text:
            raise ValueError(text)


def explain_lost_process():
    """From now on, print a sentence below the traceback of an error that another process has
    caused: gloo names neither the process nor what to do. (NCCL ends the process itself.)"""
    show = sys.excepthook

    def show_and_explain(kind, error, traceback):
        show(kind, error, traceback)
        here = f"rank {dist.get_rank()} on {gethostname()}" if dist.is_initialized() else "this one"
        if any(text in str(error) for text in LATE):
            print(f"{here}: another process did not answer for {TIMEOUT}, so it hangs or its "
                  f"machine is unreachable; run the same command again to continue from the last "
                  f"checkpoint", file=sys.stderr, flush=True)
        elif any(text in str(error) for text in ENDED):
            print(f"{here}: another process has ended; its own error says why, here or in the "
                  f"output of its machine", file=sys.stderr, flush=True)
    sys.excepthook = show_and_explain
