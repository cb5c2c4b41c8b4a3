"""Read and write files that may be damaged, may belong to another program, or lie on a network.

A copy can break off, a disk can be full, a power failure can leave zeros in a file, and Git LFS
stores a short text in place of a file. Each function then raises a ValueError that names the file,
states the reason and says what to do. The lines of a log do not depend on each other: damaged ones
are left out and counted.

    reading            a block whose errors name the file that it reads
    read_json          a JSON file
    read_names         class names
    read_settings      the settings of a run of train.py
    read_json_lines    a JSON Lines file, such as log.jsonl and metrics.jsonl
    check_writable     a folder, before anything is computed for it
    flush_to_disk      a file, before it is renamed
    wait_until         a condition that another machine fulfils, such as a file it writes
"""
import errno
import json
import os
import re
import tempfile
import time
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from ..dist import print0, printable

GIT_LFS = b"version https://git-lfs"           # first bytes of a Git LFS pointer
# Time to wait for what another machine has written. A client of NFS may use an old listing of a
# folder for 60 seconds, and a server keeps the locks of a crashed client for 90 (Linux's defaults).
SECONDS_TO_WAIT = 100


@contextmanager
def reading(path, remedy):
    """with reading(path, remedy): any error inside becomes a ValueError that names the path

    remedy  what the user can do, the second half of a sentence
    A check inside the block may raise ValueError with a reason such as 'it has no labels'.
    """
    try:
        yield
    except MemoryError:                        # not a fault of the file
        raise
    except Exception as problem:               # libraries raise errors of many types
        message = f"{printable(path)} cannot be read ({reason(path, problem)}); {remedy}"
        raise ValueError(message) from problem


def reason(path, problem):
    """-> why a file cannot be read: what its first bytes show, or else the error of the library"""
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as error:
        return error.strerror
    if not head:
        return "the file is empty"
    if head.startswith(GIT_LFS):
        return "it is a Git LFS pointer: git lfs pull downloads the file itself"
    if not head.strip(b"\0"):
        return "it begins with zeros, as after a power failure or a full disk"
    if isinstance(problem, KeyError):
        return f"{problem} is missing"
    # the first sentence; PyTorch's messages continue with advice
    text = re.split(r"\n|\. ", str(problem).strip())[0]
    return printable(text[:300]) or type(problem).__name__


def read_json(path, remedy, keys=(), kind=dict):
    """-> the value in a JSON file. ValueError if it is not of this type or lacks one of the keys"""
    with reading(path, remedy):
        found = json.loads(Path(path).read_text("utf-8"))
        if not isinstance(found, kind):
            raise ValueError(f"it holds a {type(found).__name__}, not a {kind.__name__}")
        missing = [key for key in keys if key not in found]
        if missing:
            raise ValueError(f"it lacks {', '.join(missing)}")
    return found


def read_names(path, remedy):
    """-> the list of strings in a JSON file, such as classes.json. ValueError for other contents"""
    names = read_json(path, remedy, kind=list)
    with reading(path, remedy):
        if not all(isinstance(name, str) for name in names):
            raise ValueError("it holds other values than names")
    return names


def read_settings(run):
    """-> the settings in RUN/run.json; {} without this file, as for released weights"""
    path = Path(run or "", "run.json")
    if not run or not path.exists():
        return {}
    return read_json(path, "restore it, or delete it and give the data with --data and --val-data")


def read_json_lines(path, is_valid):
    """-> list of the lines of a JSON Lines file, as dicts; [] if the file does not exist

    is_valid  function dict -> bool. What is not a valid JSON object is left out, and the number of
              such lines is printed.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = [line for line in path.read_text("utf-8", "replace").split("\n") if line.strip()]
    results = [objects_in(line, is_valid) for line in lines]
    damaged = sum(not objects for objects, _ in results)
    if damaged:
        print0(f"{printable(path)}: {damaged} of {len(lines)} lines are damaged and are left out")
    partial = sum(not is_whole for objects, is_whole in results if objects)
    if partial:
        print0(f"{printable(path)}: {partial} of {len(lines)} lines also hold a part of another "
               f"one, which is left out")
    return [found for objects, _ in results for found in objects]


def objects_in(line, is_valid):
    """-> list of the valid JSON objects in a line, and True if nothing else is in it except zeros

    On a full disk or after a power failure, zeros or a part of another line may precede an object.
    """
    found, rest, end = [], "", 0
    for start in (match.start() for match in re.finditer(r"\{", line)):
        if start < end:                        # within the object before
            continue
        try:
            value, stop = json.JSONDecoder().raw_decode(line, start)
        except (ValueError, RecursionError):
            continue
        if is_valid(value):
            found.append(value)
            rest += line[end:start]
            end = stop
    return found, not (rest + line[end:]).strip("\0 \r")


def check_writable(folder, remedy):
    """Create the folder if it does not exist. ValueError if no file can be created in it"""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{printable(folder)} cannot be written ({error.strerror}); "
                         f"{remedy}") from error


def flush_to_disk(path):
    """Return when the contents of the file are on the disk; on file systems that cannot do this,
    print a note"""
    with open(path, "rb+") as file:
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            note_once(f"note: the file system of {printable(Path(path).parent)} has no fsync "
                      f"({error.strerror}), so a power failure can damage a file just written")


@cache
def note_once(text):
    print0(text)


def wait_until(condition):
    """Call condition() once a second until it is true -> True; False after SECONDS_TO_WAIT"""
    deadline = time.monotonic() + SECONDS_TO_WAIT
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(1)
    return True
