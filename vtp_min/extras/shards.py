"""Image-caption pairs in tar files, as WebDataset and img2dataset write them; large permutations.

    Shards                a source of data.py with random access: each pair is read from its offset
    OpenTars              reads parts of tars, which stay open
    open_index            the offsets of the pairs of all tars, in one file, 20 bytes per pair
    index_tar             a tar -> the offsets of its pairs
    feistel_permutation   the order of hundreds of millions of samples, computed without an array

Tars are never extracted, and nothing in them is executed.
"""
import glob
import hashlib
import io
import json
import os
import re
import resource
import tarfile
import tempfile
import uuid
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..dist import barrier, print0, printable, rank, world_size
from ..rng import Stream, make_rng
from .images import SUFFIXES, read_image

MAX_OPEN_TARS = 32768    # of a process, and at most half of the files that it may open
LAYOUT = 2          # version of the index files; after an increase all tars are indexed again
HEAD = "samples", "lost", "first", "end"       # see load_index
BLOCK = 512         # bytes. A tar has, for each file, one header block and then the content, padded
                    # with zeros to whole blocks
GZIP = b"\x1f\x8b"  # first bytes of a gzip file


class Shards:
    """Image-caption pairs in tars. The interface of a source is described in data.open_data.

    Each tar is indexed once. The index files are written to $VTP_CACHE or ~/.cache/vtp_min. They
    may be deleted when no process uses them. A tar whose size or modification time has changed is
    indexed again. The index of all tars is one file, mapped into memory: all processes of a machine
    share its pages. It has 5.5 GB for VTP's 277M pairs. Beside it, memory holds one entry per tar,
    27,700 for VTP. Each process opens a tar once and keeps it open.
    """
    endless, classes = False, None

    def __init__(self, spec, split, whole, map_in_workers):
        """spec, split, whole  see data.open_data      map_in_workers  the function of data.py

        ValueError if more than half of the tars cannot be read, or if they contain no pairs.
        """
        if split == "val" and not whole:
            raise ValueError(f"{spec} has no validation split; name validation data with "
                             f"--val-data (other tars, a folder, or shapes)")
        self.spec, cache = spec, cache_folder()
        entries, self.index_file, self.start = open_index(expand(spec), cache, map_in_workers)
        readable = [x for x in entries if "error" not in x]
        damaged = [x for x in entries if "error" in x or x["end"]]
        details = [f"{printable(x['tar'])} {printable(x.get('error') or x['end'])}"
                   for x in damaged]
        if len(details) > 10:
            details = details[:10] + ["..."]
        details = ", ".join(details)
        if 2 * len(readable) < len(entries) or not entries:
            raise ValueError(
                f"{len(entries) - len(readable)} of the {len(entries)} tars that {spec} names "
                f"cannot be read: {details}; give a tar, a glob pattern in quotes, or a range "
                f"such as 'pairs-{{000000..000003}}.tar'")
        if damaged:
            print0(f"{printable(spec)}: {len(damaged)} of {len(entries)} tars are damaged or "
                   f"missing: {details}")
        self.tars = [x["tar"] for x in readable]
        # (tars,) number of pairs in the tars up to and including this one
        self.ends = np.cumsum([x["samples"] for x in readable])
        self._report(readable, len(entries), cache)
        self.rows, self.open_tars = None, OpenTars()

    def __getstate__(self):
        # A worker that is spawned maps the index anew. NumPy would send all of its rows.
        return vars(self) | {"rows": None}

    def _report(self, readable, n_tars, cache):
        """Print how many samples are skipped and how many tars were indexed"""
        skipped = sum(x["lost"] for x in readable)
        examples = [f"{printable(x['tar'])}:{printable(x['first'])}" for x in readable if x["lost"]]
        if len(self) == 0:
            example = f" ({examples[0]})" if examples else ""
            raise ValueError(f"{self.spec} holds no pairs of an image KEY.jpg (or "
                             f"{' '.join(SUFFIXES[1:])}) and a caption in KEY.txt, or in KEY.json "
                             f"as \"caption\"{example}. KEY is the name up to its last dot, and "
                             f"must be the same for both; check the file names in the tars")
        if skipped:
            print0(f"{printable(self.spec)}: {skipped} of {skipped + len(self)} samples are "
                   f"skipped ({examples[0]}, ...)")
        new = sum(x["new"] for x in readable)
        if new:
            print0(f"{printable(self.spec)}: indexed {new} of {n_tars} tars; the index files are "
                   f"in {printable(cache)}")

    def __len__(self):
        return int(self.ends[-1])

    def locate(self, index):
        """-> tar, offset and size of the image, offset and size of the caption (in bytes), and 1
        if the caption is plain text or 0 if it is JSON"""
        if self.rows is None:
            self.rows = np.memmap(self.index_file, np.uint32, "r", self.start, (len(self), 5))
        k = int(np.searchsorted(self.ends, index, "right"))           # number of the tar
        # offsets are stored in blocks, so that uint32 is enough for tars of up to 2 TiB
        image_block, image_size, text_block, text_size, plain = map(int, self.rows[index])
        return self.tars[k], BLOCK * image_block, image_size, BLOCK * text_block, text_size, plain

    def load(self, index, rng=None):
        """-> PIL RGB image, caption, -1 (no class). rng is not used."""
        tar, image_at, image_size, text_at, text_size, plain = self.locate(index)
        image = read_image(io.BytesIO(self.open_tars.read(tar, image_at, image_size)))
        return image, read_caption(self.open_tars.read(tar, text_at, text_size), plain), -1

    def name(self, index):
        """-> tar and file name, for messages. The file name is read from the header of the image,
        which stores its first 100 bytes."""
        try:
            tar, image_at, *_ = self.locate(index)
            file = self.open_tars.read(tar, image_at - BLOCK, 100).split(b"\0")[0]
            return printable(f"{tar}:{file.decode('utf-8', 'replace')}")
        except Exception:                                     # the tar was deleted or replaced
            return printable(f"sample {index} of {self.spec}")


class OpenTars:
    """Read parts of tars. A tar stays open for the next read. If too many are open, the one that
    was not read for the longest time is closed. Every process has its own open files."""

    def __init__(self):
        self.files, self.limit = {}, None      # {tar: file descriptor}, least recently read first

    def read(self, tar, offset, size):
        """-> size bytes from offset on; fewer if the file ends before"""
        file = self.files.pop(tar, None)
        if file is None:
            self.limit = self.limit or open_file_limit()
            if len(self.files) >= self.limit:
                os.close(self.files.pop(next(iter(self.files))))
            file = os.open(tar, os.O_RDONLY)
        try:
            # pread has no current position, which forked processes would share
            content = os.pread(file, size, offset)
        except OSError:                        # the file may have been replaced on a file server
            os.close(file)
            raise
        self.files[tar] = file
        return content

    def __getstate__(self):
        return {"files": {}, "limit": None}    # file descriptors are valid in this process only

    def __del__(self):
        for file in self.files.values():
            os.close(file)


def open_file_limit():
    """-> number of tars that this process may keep open. Its soft limit for open files, often 1024,
    is raised to the hard limit (ulimit -Hn) if that helps; half of them are left to others."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * MAX_OPEN_TARS if hard == resource.RLIM_INFINITY else min(hard, 2 * MAX_OPEN_TARS)
    if wanted > soft:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
        except (ValueError, OSError):          # macOS has another limit, which is lower
            pass
    return min(soft // 2, MAX_OPEN_TARS)


def read_caption(raw, plain=True):
    """The bytes of KEY.txt (plain) or of KEY.json with a "caption" -> string of 1 to 2000
    characters. More are not needed: the tokenizer keeps at most 77 ids.

    Bytes that are not UTF-8 become U+FFFD. ValueError if there is no caption or if it is empty.
    """
    text = raw.decode("utf-8-sig", "replace")
    if not plain:
        found = json.loads(text)
        text = found.get("caption") if isinstance(found, dict) else None
        if not isinstance(text, str):
            raise ValueError('its JSON has no string "caption"')
    text = text.replace("\0", " ")
    # JSON can contain half of a surrogate pair, which cannot be encoded: it becomes "?"
    text = text.encode("utf-8", "replace").decode()
    text = text.strip()[:2000]
    if not text:
        raise ValueError("its caption is empty")
    return text


# ---------------------------------------------------------------- the index
def expand(pattern):
    """'pairs-{000..012}.tar', a glob pattern or a file name -> list of tars, in order

    Each name of a range is returned, and so is a pattern without a match, even if there is no such
    file. load_index then reports that it cannot be read.
    """
    span = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if span:
        low, high = span.groups()
        tars = []
        for n in range(int(low), int(high) + 1):
            number = str(n).zfill(len(low))
            tars += expand(pattern[:span.start()] + number + pattern[span.end():])
        return tars
    if os.path.exists(pattern):
        return [pattern]
    return sorted(glob.glob(pattern), key=os.fsencode) or [pattern]


def cache_folder():
    """-> the folder for index files; a temporary folder if it is not writable"""
    folder = os.environ.get("VTP_CACHE") or "~/.cache/vtp_min"
    try:
        path = Path(folder).expanduser()
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except (OSError, RuntimeError) as problem:             # RuntimeError: there is no home folder
        path = Path(tempfile.mkdtemp(prefix="vtp_min-"))
        reason = getattr(problem, "strerror", "there is no home folder")
        print0(f"{printable(folder)} is not writable ({reason}), so each run indexes the tars "
               f"again; set VTP_CACHE=DIR to a writable folder")
    return path


def open_index(tars, cache, map_in_workers):
    """-> entry of each tar (as load_index), and the file with the rows of all readable tars, in
    order, and the offset of the first row

    If there is only one tar, this is its index file. For more tars their index files are joined
    once; a later start opens the joined file only.
    """
    found = read_joined(tars, cache)
    entries = None if found else index_all(tars, cache, map_in_workers)
    # One process writes the joined file. If the cache is a folder of each machine, one process of
    # each machine does, and if it is a temporary folder, each process.
    for is_my_turn in (rank() == 0, int(os.environ.get("LOCAL_RANK", 0)) == 0, True):
        if is_my_turn and not found:
            found = join_indices(entries, cache)
        barrier()
    return found


def read_joined(tars, cache):
    """-> as open_index, or None if the file is missing or damaged, or a tar is missing"""
    try:
        names = [index_name(tar) for tar in tars]
    except OSError:
        return None
    file = joined_file(names, cache)
    head = read_index(file)
    if head is None or len(head.get("tars", ())) != len(tars):
        return None
    entries = [x | {"tar": tar, "new": False} for x, tar in zip(head["tars"], tars)]
    return entries, file, head["start"]


def join_indices(entries, cache):
    """Write the joined file, unless another process has done so -> as open_index"""
    readable = [x for x in entries if "error" not in x]
    if len(readable) < 2:
        file, start = (readable[0]["index"], readable[0]["start"]) if readable else (None, 0)
        return entries, file, start
    file = joined_file([Path(x["index"]).name for x in readable], cache)
    head = read_index(file)
    if head is None:
        head = {"samples": sum(x["samples"] for x in readable), "lost": 0, "first": "", "end": "",
                "tars": [{name: x[name] for name in HEAD} for x in readable]}
        rows = (Path(x["index"]).read_bytes()[x["start"]:] for x in readable)
        head = write_index(file, head, rows)
    return entries, file, head["start"]


def joined_file(names, cache):
    """names  of the index files of single tars, in order"""
    key = hashlib.sha256("\n".join(names).encode()).hexdigest()[:24]
    return cache / f"{key}.joined"


def index_name(tar):
    """-> name of the index file of a tar. OSError if there is no such tar."""
    stat = os.stat(tar)
    key = f"{LAYOUT} {os.path.abspath(tar)} {stat.st_size} {stat.st_mtime_ns}"
    return f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:24]}.index"


def index_all(tars, cache, map_in_workers):
    """-> load_index(cache, tar) of each tar, in order

    Each rank starts at a different tar and reads the index files that other ranks have written in
    the meantime, so the ranks share the work.
    """
    first = rank() * len(tars) // world_size()
    rotated = tars[first:] + tars[:first]
    workers = 0
    if len(tars) >= 8:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = max(1, min(32, (os.cpu_count() or 1) // processes))
    entries = map_in_workers(partial(load_index, cache), rotated, workers)
    hide = workers == 0 or rank() > 0
    entries = list(tqdm(entries, "indexing tars", len(tars), disable=hide))
    return entries[len(tars) - first:] + entries[:len(tars) - first]      # undo the rotation


def load_index(cache, tar):
    """Read the index of a tar from the cache, or create it -> dict. A damaged index is replaced.

    tar      file name of the tar
    error    why the tar cannot be read; the other entries are then absent
    index    file name of the index        start  offset of its rows, in bytes
    samples  number of rows                lost   number of samples that are skipped
    first    the first skipped sample      end    how the tar is damaged, or ""
    new      True if the index was created now
    """
    try:
        file = cache / index_name(tar)
        head = read_index(file)
        if head is None:
            rows, lost, end = index_tar(tar)
    except Exception as problem:              # damaged tars make tarfile raise many kinds of errors
        return {"tar": tar, "error": f"({getattr(problem, 'strerror', None) or problem})"}
    new = head is None
    if new:
        head = {"tar": os.path.abspath(tar), "samples": len(rows), "lost": len(lost),
                "first": lost[0] if lost else "", "end": end}
        head = write_index(file, head, [rows.tobytes()])
    return head | {"tar": tar, "index": str(file), "new": new}


def read_index(file):
    """-> the first line of an index file as a dict, and "start", the offset of the rows. None if
    the file is missing or damaged: cut off, filled with zeros, or not an index"""
    try:
        with open(file, "rb") as f:
            head = json.loads(f.readline(2 ** 28))
            start = f.tell()
            rows = np.fromfile(f, np.uint32, 5)
            size = f.seek(0, os.SEEK_END)
            if rows.size:
                f.seek(-20, os.SEEK_END)
                rows = np.concatenate([rows, np.fromfile(f, np.uint32, 5)])
        # each row has the sizes of an image and of a caption; only the first and the last are read
        is_whole = size == start + 20 * head["samples"] and rows.reshape(-1, 5)[:, [1, 3]].all()
        known = {name: head[name] for name in HEAD}
        known |= {"start": start, "tars": head.get("tars", ())}
        return known if is_whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_index(file, head, rows):
    """Write an index file: a line of JSON, then the rows as raw uint32 -> head, and "start", the
    offset of the rows

    head  dict for the first line      rows  iterable of bytes

    Ranks may index the same tar at the same time. Each one writes a temporary file of its own and
    renames it. The contents are equal, so it does not matter which file stays.
    """
    line = json.dumps(head).encode() + b"\n"
    part = file.with_name(f"{uuid.uuid4().hex}.part")
    try:
        with open(part, "wb") as f:
            f.write(line)
            f.writelines(rows)
    except OSError as problem:
        with suppress(OSError):
            part.unlink()
        raise ValueError(f"the index of the tars cannot be written to {file.parent} ({problem}); "
                         f"free some disk space, or set VTP_CACHE=DIR to another "
                         f"folder") from problem
    part.replace(file)
    return head | {"start": len(line)}


def index_tar(path):
    """Read the headers of a tar

    -> rows  (n, 5) uint32, see Shards.locate; offsets are in blocks
       lost  for each skipped sample, a sentence that says why
       end   how the tar is damaged, or ""
    """
    with open(path, "rb") as f:
        if f.read(2) == GZIP:
            raise ValueError("is compressed with gzip, which allows no random access; gunzip it")
    samples, lost, end = {}, [], ""
    with tarfile.open(path, "r:", encoding="utf-8") as tar:
        try:
            for member in tar:
                add_member(member, os.path.getsize(path), samples, lost)
            check_end(tar)
        except Exception as problem:
            end = f"(ends early: {problem}; the samples before this point are used)"
    rows, complete, incomplete = [], set(), {}
    for key, files in samples.items():
        image = next((files[suffix] for suffix in SUFFIXES if suffix in files), None)
        text = files.get("txt") or files.get("json")
        if image and text:
            rows.append((*image, *text, "txt" in files))
            complete.add(key)
        else:
            incomplete[key] = "caption" if image else "image"
    for key, part in incomplete.items():
        folder, slash, name = key.rpartition("/")
        # x.seg.png beside x.jpg and x.txt belongs to sample x (WebDataset) and is not missed
        if folder + slash + name.partition(".")[0] not in complete:
            lost.append(f"{key} has no {part}")
    if not rows and not end:
        end = "(holds no pairs)"
    return np.array(rows, np.uint32).reshape(-1, 5), lost, end


def add_member(member, tar_size, samples, lost):
    """Add one file of a tar to samples, {key: {suffix: (block, size)}}

    The key is the path without the suffix. WebDataset's key ends at the first dot of the file name:
    both give the same pairs, but only here, frame.0001.jpg and frame.0001.txt are one, too. If a
    file name occurs twice, the first file is used. Links, sparse files, empty files and names that
    begin with a dot are ignored.
    """
    folder, slash, name = member.name.rpartition("/")
    key, suffix = os.path.splitext(name)
    suffix = suffix[1:].lower()
    # with a negative size, tarfile would return to a header that it has already read
    if member.size < 0 or (member.isreg() and member.size > tar_size - member.offset_data):
        raise ValueError(f"{member.name} is cut off")
    if not member.isreg() or member.issparse() or not 0 < member.size < 2 ** 32:
        return
    if name[:1] in ("", "."):
        return
    files = samples.setdefault(folder + slash + key, {})
    if suffix in files:
        lost.append(f"{member.name} occurs twice")
    else:
        files[suffix] = member.offset_data // BLOCK, member.size


def check_end(tar):
    """ValueError if the tar does not end with blocks of zeros. tarfile itself raises no error: it
    takes a damaged header for the end of the tar."""
    tar.fileobj.seek(tar.offset)
    tail = tar.fileobj.read(2 ** 20)
    if tail[:BLOCK] != bytes(BLOCK):
        raise ValueError("there is no end-of-archive block of zeros")
    if tail.strip(b"\0"):
        raise ValueError("there are data after the end-of-archive block")


# ---------------------------------------------------------------- large permutations
def feistel_permutation(seed, epoch, n, k):
    """The k-th number of a random permutation of range(n), computed without storing the permutation

    k is split into two halves of h bits each, where 4^h >= n. Six Feistel rounds
    (a, b) -> (b, a ^ f(b)) permute range(4^h), because a round can be inverted for any f. They are
    repeated until the number is below n, which gives a permutation of range(n).

    f is the last part of the generator splitmix64. It mixes well only if h is large, so data.py
    uses this function only for large n.
    """
    h = ((n - 1).bit_length() + 1) // 2
    low_bits, all_bits = 2 ** h - 1, 2 ** 64 - 1
    while True:
        a, b = k >> h, k & low_bits
        for key in round_keys(seed, epoch):
            f = ((b ^ key) * 0xBF58476D1CE4E5B9) & all_bits
            f = ((f ^ (f >> 27)) * 0x94D049BB133111EB) & all_bits
            f = f ^ (f >> 31)
            a, b = b, a ^ (f & low_bits)
        k = (a << h) | b
        if k < n:
            return k


@lru_cache(maxsize=2)
def round_keys(seed, epoch):
    """-> six random integers, one for each Feistel round"""
    return [int(x) for x in make_rng(Stream.ORDER, seed, epoch).integers(2 ** 63, size=6)]
