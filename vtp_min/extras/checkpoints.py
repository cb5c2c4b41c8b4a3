"""Read the checkpoint with which a run continues, once, and without a copy of it in memory.

    load_newest    the newest checkpoint of a run folder that can be read
    restore        load it into the objects of the run

A checkpoint of --size L has 10 GB, and every process needs it. Its tensors are mapped from the
file: a page of the file is read when it is used, the processes of a machine share it, and the
system can free it at any time.
"""
import zipfile
from contextlib import suppress
from pathlib import Path
from socket import gethostname

import torch
from torch import distributed

from ..dist import is_distributed, print0, rank, world_size
from .files import reason, wait_until
from .rendezvous import raise_on_all


def load_newest(folder):
    """-> checkpoint, or None if the folder contains none; True if last.pt is damaged

    Rank 0 verifies the files, and the other ranks take the file that it has chosen. A damaged file
    is reported. ValueError if no checkpoint can be read. All ranks call this function.
    """
    if is_distributed():
        wait_for_newest(Path(folder))
    choice = [None]
    if rank() == 0 or not is_distributed():
        choice = [choose(Path(folder))]
    if is_distributed():
        distributed.broadcast_object_list(choice, 0)
    path, step, damaged = choice[0]
    if path is None and damaged:
        # Starting at step 0 would overwrite the files, and the user may be able to restore one.
        raise ValueError(f"no checkpoint in {folder} can be read; restore a readable last.pt, use "
                         f"another --out, or start over with --fresh")
    if path is None:
        return None, False
    return load(path, step), bool(damaged)


def choose(folder):
    """-> path of the newest checkpoint that can be read, its step; or None, None; number of damaged
    files"""
    damaged = 0
    for path in (folder / "last.pt", folder / "previous.pt"):
        if not path.exists():
            continue
        try:
            return path, verify(path), damaged
        except Exception as error:                 # damaged files cause errors of many types
            print0(f"{path} is damaged ({reason(path, error)}) and is ignored")
            damaged += 1
    return None, None, damaged


def verify(path):
    """-> step of a checkpoint. Raises an exception if the file is damaged, or is not the checkpoint
    of a run."""
    # A .pt file is a zip archive. torch.load does not verify its checksums. Here the file is read
    # once, in small parts, and is then in the system's cache.
    with zipfile.ZipFile(path) as archive:
        if archive.testzip():
            raise ValueError("a checksum is wrong")
    checkpoint = map_file(path)
    if not {"step", "settings", "skipped"} <= checkpoint.keys():
        raise ValueError("it is not the checkpoint of a run")
    return checkpoint["step"]


def load(path, step):
    """-> the checkpoint at `path`. ValueError, on all ranks, if one finds another step there"""
    checkpoint = map_file(path)
    problem = None
    if checkpoint["step"] != step:
        problem = (f"{path}: rank 0 found a checkpoint of step {step}, but rank {rank()} on "
                   f"{gethostname()} one of step {checkpoint['step']}; try the same command again")
    raise_on_all(problem)
    return checkpoint


def wait_for_newest(folder):
    """Wait until this rank sees the newest checkpoint that any rank sees.

    An NFS client can answer from an old listing of the folder, in which last.pt does not exist or
    is an older file. ValueError, on all ranks, if this lasts longer than SECONDS_TO_WAIT, for
    example because each machine has a folder of this name.
    """
    steps = [None] * world_size()
    distributed.all_gather_object(steps, newest_step(folder))
    newest = max(steps)
    problem = None
    if not wait_until(lambda: newest_step(folder) >= newest):
        seen = newest_step(folder)
        found = f"one of step {seen}" if seen >= 0 else "none"
        problem = (f"{folder}: another process found a checkpoint of step {newest}, but rank "
                   f"{rank()} on {gethostname()} found {found}; --out must be a folder that all "
                   f"machines share")
    raise_on_all(problem)


def newest_step(folder):
    """-> step of the newest checkpoint that this process sees, or -1. It is not verified."""
    steps = [-1]
    for name in ("last.pt", "previous.pt"):
        with suppress(Exception):                  # damaged files cause errors of many types
            steps.append(map_file(folder / name)["step"])
    return max(steps)


def map_file(path):
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def restore(checkpoint, state):
    """Load a checkpoint into state {name: object with load_state_dict()}.

    Modules copy the values. An optimizer on the CPU keeps the tensors that it is given, so each is
    copied here; otherwise the file would stay open, and its disk space in use, until the run ends.
    """
    for name, part in state.items():
        part.load_state_dict(checkpoint[name])
        if isinstance(part, torch.optim.Optimizer):
            for values in part.state.values():
                for key, x in values.items():
                    if torch.is_tensor(x) and x.device.type == "cpu":
                        values[key] = x.clone()
