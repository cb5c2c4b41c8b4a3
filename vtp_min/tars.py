"""Which bytes of which tar are a picture and its words. A tar is walked once; what is found is kept as a small file, its index.

    expand      'pairs-{000..012}.tar' -> names of tars
    indexed     a tar -> its index, read or made: 20 bytes a pair, so that any pair can be read by itself (data.py's Shards)
"""
import glob
import hashlib
import json
import os
import re
import tarfile
import tempfile
import uuid
from pathlib import Path

import numpy as np

from .dist import say
from .views import ENDINGS, shown

LAYOUT = 1                           # of an index: raise it when index_tar finds something else than before, and all tars are walked again


def expand(pattern):
    """'pairs-{000..012}.tar' or a glob -> the tars it names, in order; those of a range whether they exist or not."""
    span = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if span:
        low, high = span.groups()
        return [tar for n in range(int(low), int(high) + 1)
                for tar in expand(pattern[:span.start()] + str(n).zfill(len(low)) + pattern[span.end():])]
    return [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern), key=os.fsencode) or [pattern]


def index_folder():
    """-> the folder for indices; a temporary one, which says so, where neither $VTP_CACHE nor the home folder can be written"""
    folder = Path(os.environ.get("VTP_CACHE") or "~/.cache/vtp_min").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as problem:
        say(f"{shown(folder)} cannot be written ({problem.strerror}): tars are walked anew in each run; set VTP_CACHE=DIR to a folder that can")
        folder = Path(tempfile.mkdtemp(prefix="vtp_min-"))
    return folder


def indexed(kept, tar):
    """One tar's index, found in the folder `kept` or made there now -> dict: tar, and either why it is broken, or
    index (the file), start (where its rows begin), samples, lost (how many are left out), first (of them), end (its flaw, or ''), new"""
    try:
        stat = os.stat(tar)
        key = hashlib.sha256(os.fsencode(f"{LAYOUT} {os.path.abspath(tar)} {stat.st_size} {stat.st_mtime_ns}")).hexdigest()
        file = kept / f"{key[:24]}.index"
        new = not file.exists()
        if new:
            rows, lost, end = index_tar(tar)
    except Exception as problem:                                          # a damaged header makes tarfile raise whatever it likes
        return {"tar": tar, "broken": f"({getattr(problem, 'strerror', None) or problem})"}
    if new:
        head = json.dumps({"tar": os.path.abspath(tar), "samples": len(rows), "lost": len(lost), "first": lost[0] if lost else "", "end": end})
        aside = kept / f"{uuid.uuid4().hex}.aside"                        # ranks may meet at one tar: each writes its own, the last one stays
        try:
            aside.write_bytes(head.encode() + b"\n" + rows.tobytes())
        except OSError as problem:
            raise ValueError(f"the index of {tar} cannot be written into {kept} ({problem}); make room, or name another folder with $VTP_CACHE") from problem
        aside.replace(file)
    with open(file, "rb") as f:
        return json.loads(f.readline()) | {"tar": tar, "index": str(file), "start": f.tell(), "new": new}


def index_tar(path):
    """Walk one tar -> rows uint32 (n, 5) as Shards.place reads them, offsets in blocks of 512; samples left out and why; its end's flaw or ''.

    As in WebDataset a key ends at the first dot of a file's name. Names only tell what belongs together: nothing is unpacked, so ../ leads
    nowhere. Links and sparse files are no files here; of two files of one name the first counts.
    """
    samples, lost, end, size = {}, [], "", os.path.getsize(path)
    with open(path, "rb") as f:
        if f.read(2) == b"\x1f\x8b":
            raise ValueError("is gzip-compressed: gunzip it, places in it cannot be looked up")
    with tarfile.open(path, "r:", encoding="utf-8") as tar:
        try:
            for member in tar:
                folder, slash, name = member.name.rpartition("/")
                key, _, extension = name.partition(".")
                if member.size < 0 or member.isreg() and member.size > size - member.offset_data:
                    raise ValueError(f"{member.name} is cut off")
                if member.isreg() and not member.issparse() and key and 0 < member.size < 2 ** 32:
                    files = samples.setdefault(folder + slash + key, {})
                    if extension.lower() in files:
                        lost.append(f"{member.name} comes twice")
                    files.setdefault(extension.lower(), (member.offset_data // 512, member.size))
            tar.fileobj.seek(tar.offset)
            tail = tar.fileobj.read(2 ** 20)                              # a block of zeros, and nothing but zeros to fill up
            if tail[:512] != bytes(512) or tail.strip(b"\0"):
                raise ValueError("something follows the end mark" if tail[:512] == bytes(512) else "no end mark")
        except Exception as problem:
            end = f"(breaks off: {problem}; what stands before serves)"
    rows = []
    for key, files in samples.items():
        image, words = next((files[e] for e in ENDINGS if e in files), None), files.get("txt") or files.get("json")
        if image and words:
            rows.append((*image, *words, "txt" in files))
        else:
            lost.append(f"{key} lacks its {'caption' if image else 'picture'}")
    return np.array(rows, np.uint32).reshape(-1, 5), lost, end or "(holds no pairs)" * (not rows)
