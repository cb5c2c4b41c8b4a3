"""A run folder is used by one run at a time, overwrites no files of others, and goes on with the
same data under another path.

    open_on_all     the next function, on rank 0; do all machines see the same data?
    claim           lock the folder, refuse to overwrite weights, delete the old run for --fresh
    prepare         write run.json, and cut the log back to the checkpoint
    has_checkpoint  does the folder hold a run that can be continued?
    check_settings  compare the settings of a checkpoint with those of this run
    fingerprints    describe the files that settings name, to recognise them after a move
    append_line     add a line to a JSON Lines file; a full disk leaves no half of it
"""
import errno
import fcntl
import hashlib
import json
import os
import socket
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

from ..config import atomic_write
from ..dist import is_distributed, print0, printable, rank
from .files import SECONDS_TO_WAIT, read_json, read_json_lines, wait_until
from .rendezvous import raise_on_all

# files that --fresh deletes; other files in the folder belong to the user
FILES = ("last.pt", "previous.pt", "log.jsonl", "metrics.jsonl", "run.json", "config.json",
         "model.safetensors")
FILES_OF_DIT = ("latents_stats.pt", "classes.json")           # in addition
# settings that only stage 2, the baselines, or the DiT have
OF_ONE_PROGRAM = "stage", "baseline", "latents"
SIZES_COMPARED = 1000       # files whose sizes are part of a fingerprint, evenly spaced


# ---------------------------------------------------------------- the folder
def open_on_all(folder, settings, fresh, files):
    """Claim the folder, and check that all ranks see the same data. All ranks call this function.

    files  fingerprints of the data that this process sees. Each machine can have a copy of the data
           under the same path, and one of the copies can be incomplete.
    ValueError, on all ranks, if one of them has a reason.
    """
    if not is_distributed():
        claim(folder, settings, fresh)
        return
    problem = None
    if rank() == 0:
        try:
            claim(folder, settings, fresh)
        except ValueError as error:
            problem = str(error)
    of_rank_0 = [files]
    dist.broadcast_object_list(of_rank_0)
    if of_rank_0 != [files]:
        problem = (f"rank {rank()} on {socket.gethostname()} sees other files than rank 0: "
                   f"{files}, and rank 0 {of_rank_0[0]}; all machines must see the same ones")
    raise_on_all(problem)


def claim(folder, settings, fresh):
    """Reserve the folder for this process until it ends. Called on rank 0.

    fresh  delete the run that the folder contains
    ValueError if another process uses the folder, if it cannot be written, or if the run would
    overwrite files of another program.
    """
    check_owner(folder, settings, fresh)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock(folder)
        if fresh:
            for name in FILES:
                (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror}); give another folder with "
                         f"--out") from error


def check_owner(folder, settings, fresh):
    """ValueError if the folder contains weights that this run would overwrite or delete"""
    here = [name for name in ("last.pt", "previous.pt", "config.json", "model.safetensors")
            if (folder / name).exists()]
    is_run = (folder / "run.json").exists()
    if not here or (here[0].endswith(".pt") and not fresh):
        return                             # with a checkpoint, its settings are compared later
    if not is_run:
        raise ValueError(f"{folder} holds {', '.join(here)}, but no run.json, so these files are "
                         f"not of a run and must not be overwritten; give another folder with "
                         f"--out")
    if not fresh:
        raise ValueError(f"{folder} holds {', '.join(here)} of a run, but no checkpoint to "
                         f"continue from; give another --out, or delete this run with --fresh")
    old = settings
    with suppress(ValueError):                                # a damaged run.json
        old = read_json(folder / "run.json", "")
    if any((name in old) != (name in settings) for name in OF_ONE_PROGRAM):
        raise ValueError(f"{folder} holds a run of another command, which --fresh would delete; "
                         f"give another folder with --out")


def has_checkpoint(folder):
    return any(Path(folder, name).exists() for name in ("last.pt", "previous.pt"))


def lock(folder):
    """Lock the file .lock until this process ends, also if it is killed. Worker processes do not
    inherit the lock. ValueError if another process has it.

    A server of network files keeps the locks of a machine that has crashed for a while (NFS on
    Linux: 90 seconds). So this function waits if the process that has the lock is on another
    machine: a cluster may have started the job of that machine again on this one.
    """
    file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    if not try_to_lock(file, folder):
        owner = os.pread(file, 200, 0).decode(errors="replace") or "another process"
        is_remote = " on " in owner and not owner.endswith(f" on {socket.gethostname()}")
        if is_remote:
            print0(f"{folder} is in use by {owner}; waiting {SECONDS_TO_WAIT} seconds for its end")
        if not (is_remote and wait_until(lambda: try_to_lock(file, folder))):
            raise ValueError(f"{folder} is in use by {owner}; wait until it ends, or give another "
                             f"--out (several processes of one run are started by torchrun)")
    with suppress(OSError):                # a full disk: the lock holds without a name in the file
        os.fchmod(file, 0o666)             # other users of a shared folder may lock it later
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)


def try_to_lock(file, folder):
    """-> False if another process has locked the open file; True on file systems without locks"""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        print0(f"note: {folder} cannot be locked ({error.strerror}), so a second run in this "
               f"folder would not be noticed")
    return True


def prepare(folder, settings, step):
    """Write run.json, and remove the log lines of steps after the checkpoint, because they are
    trained again. Called on rank 0.   step: number of completed steps"""
    # temporary files of atomic_write, if a process was killed while it was writing
    for name in FILES + FILES_OF_DIT:
        (folder / f"{name}.part").unlink(missing_ok=True)
    text = json.dumps(settings, indent=2) + "\n"
    atomic_write(folder / "run.json", lambda path: path.write_text(text))
    log = folder / "log.jsonl"
    if not log.exists():
        return
    lines = read_json_lines(log, lambda line: isinstance(line.get("step"), int))
    before = log.read_bytes()
    if before != to_text(lines).encode():
        damaged = folder / "log.jsonl.damaged"
        atomic_write(damaged, lambda path: path.write_bytes(before))
        print0(f"the log as it was is kept in {printable(damaged)}")
    kept = to_text([line for line in lines if line["step"] <= step])
    atomic_write(log, lambda path: path.write_text(kept))


def to_text(lines):
    return "".join(json.dumps(line) + "\n" for line in lines)


def append_line(path, values):
    """Append a dict as one line of JSON. If this raises OSError, the file is as before."""
    text = (json.dumps(values) + "\n").encode()
    with open(path, "ab+", buffering=0) as f:
        size = f.seek(0, os.SEEK_END)
        if size:
            f.seek(size - 1)
            if f.read(1) != b"\n":                            # an earlier line has no end
                text = b"\n" + text
        try:
            while text:                                       # a full disk may take a part first
                text = text[f.write(text):]
        except OSError:
            with suppress(OSError):
                f.truncate(size)
            raise


# ---------------------------------------------------------------- settings
def check_settings(folder, checkpoint, settings, files, mutable):
    """ValueError if the checkpoint was trained with other settings.

    checkpoint  with "settings" and, except in old ones, "files"
    files       fingerprints of this run. A setting may have another path if its files are the same.
    mutable     names of settings that may change
    """
    old, new = checkpoint["settings"], settings
    old_files = checkpoint.get("files", {})
    changes = []
    for name in sorted(old.keys() | new.keys()):
        was, now = old_files.get(name), files.get(name)
        if old.get(name) == new.get(name) or is_same_path(old.get(name), new.get(name)):
            if was and was != now:
                print0(f"note: the files of {name} {new[name]!r} have changed since the last "
                       f"checkpoint: they were {was}, and now are {now}")
        elif name in mutable:
            continue
        elif was and was == now:
            print0(f"{name} is now {new[name]!r}; it was {old[name]!r}. The files are the same "
                   f"({now}).")
        else:
            differences = f" ({was}, now {now})" if was and now else ""
            changes.append(f"{name}: was {old.get(name)!r}, now {new.get(name)!r}{differences}")
    if changes:
        raise ValueError(f"{folder} was trained with other settings "
                         f"({'; '.join(changes)}); use the old settings or another --out, or "
                         f"start over with --fresh")


def is_same_path(old, new):
    """True for two strings that name the same place, such as x and ./x"""
    if not (isinstance(old, str) and isinstance(new, str)):
        return False
    return os.path.realpath(old) == os.path.realpath(new)


def fingerprints(files):
    """{name of a setting: source of data.py, latents, folder with model.safetensors, or None}
    -> {name: description that is equal for equal files}, without built-in data and Hub ids"""
    found = {name: fingerprint(value) for name, value in (files or {}).items()}
    return {name: text for name, text in found.items() if text}


def fingerprint(files):
    """-> number of files and a hash of their names and sizes. None if there are no files.

    Of a data set, up to SIZES_COMPARED files are measured: to measure all 1.3 million of ImageNet
    would take minutes on a network drive.
    """
    if isinstance(files, (str, Path)):
        path = Path(files, "model.safetensors")
        if not path.exists():
            return None
        with open(path, "rb") as f:
            return f"weights {hashlib.file_digest(f, 'sha256').hexdigest()[:12]}"
    digest = hashlib.sha256()
    if hasattr(files, "tars"):                                # extras.shards.Shards
        paths = files.tars
        names = [Path(path).name for path in paths]
        digest.update(repr((names, list(files.ends))).encode())
    elif hasattr(files, "files"):                             # data.Folder
        chosen = range(0, len(files), max(1, len(files) // SIZES_COMPARED))
        paths = [files.path(index) for index in chosen]
        digest.update(files.files.tobytes() + files.labels.tobytes())
        digest.update(repr(files.classes).encode())
    elif hasattr(files, "stats"):                             # extras.latents.Latents
        paths = []                         # the contents are compared, so sizes need not be
        for tensor in (files.labels, *files.stats.values()):
            digest.update(tensor.numpy().tobytes())
    else:
        return None
    digest.update(repr([size_of(path) for path in paths]).encode())
    return f"{len(files)} samples {digest.hexdigest()[:12]}"


def size_of(path):
    with suppress(OSError):
        return os.stat(path).st_size
    return -1                                                 # a broken link
