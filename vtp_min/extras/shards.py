"""Image-caption pairs in tars, as WebDataset and img2dataset write them, and large permutations.

    Shards                the source of data.py: any pair is read by itself, at its place in a tar
    index_tar             a tar -> the places of its pairs, kept in a cache: 20 bytes a pair
    feistel_permutation   the order of an epoch of hundreds of millions of samples, not stored

Nothing is unpacked or executed.
"""
import glob
import hashlib
import io
import json
import os
import re
import tarfile
import tempfile
import uuid
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..dist import print0, printable, rank, world_size
from ..rng import Stream, make_rng
from .images import SUFFIXES, read_image

LAYOUT = 1          # of an index file; a higher number makes all tars to be indexed again
BLOCK = 512         # tars consist of blocks: a header, then a file filled up with zeros
GZIP = b"\x1f\x8b"


class Shards:
    """Image-caption pairs in tars. Interface: data.Source.

    Each tar is indexed once; its index file lies in $VTP_CACHE or ~/.cache/vtp_min and may be
    deleted at any time. A tar of another size or date is indexed again. Memory holds one entry per
    tar, not per pair: 27,700 for VTP's 277M pairs. A tar is opened for each read, which costs two
    system calls; no open file has to be sent to a worker process.
    """
    endless, classes = False, None

    def __init__(self, spec, split, whole, map_in_workers):
        """map_in_workers  data.map_in_workers"""
        if split == "val" and not whole:
            raise ValueError(f"{spec} has no validation split; name one with --val-data (other "
                             f"shards, a folder, or shapes)")
        self.spec, cache = spec, cache_folder()
        found = index_all(expand(spec), cache, map_in_workers)
        good = [x for x in found if "broken" not in x]
        flawed = [x for x in found if "broken" in x or x["end"]]
        flaws = [f"{printable(x['tar'])} {printable(x.get('broken') or x['end'])}" for x in flawed]
        flaws = ", ".join(flaws[:10] + ["..."] if len(flaws) > 10 else flaws)
        if 2 * len(good) < len(found) or not found:
            raise ValueError(
                f"{len(found) - len(good)} of the {len(found)} tars that {spec} names cannot be "
                f"read: {flaws}; wanted a tar, a glob in quotes, or a range such as "
                f"'pairs-{{000000..000003}}.tar'")
        if flawed:
            print0(f"{printable(spec)}: {len(flawed)} of {len(found)} tars are damaged or missing: "
                   f"{flaws}")
        self.tars = [(x["tar"], x["index"], x["start"]) for x in good]
        self.ends = np.cumsum([x["samples"] for x in good])   # (tars,) pairs up to the end of each
        self._report(good, len(found), cache)

    def _report(self, good, n_tars, cache):
        lost = sum(x["lost"] for x in good)
        examples = [f"{printable(x['tar'])}:{printable(x['first'])}" for x in good if x["lost"]]
        if len(self) == 0:
            example = f" ({examples[0]})" if examples else ""
            raise ValueError(f"{self.spec} holds no pairs: wanted KEY.jpg (or "
                             f"{' '.join(SUFFIXES[1:])}) with KEY.txt, or KEY.json with a "
                             f"\"caption\"{example}")
        if lost:
            print0(f"{printable(self.spec)}: {lost} of {lost + len(self)} samples are skipped "
                   f"({examples[0]}, ...)")
        new = sum(x["new"] for x in good)
        if new:
            print0(f"{printable(self.spec)}: indexed {new} of {n_tars} tars; later runs find the "
                   f"indices in {printable(cache)}")

    def __len__(self):
        return int(self.ends[-1])

    def place(self, index):
        """-> tar, offset and size of the image, offset and size of the caption, and 1 if the
        caption is plain text or 0 if it is JSON"""
        k = int(np.searchsorted(self.ends, index, "right"))
        tar, file, start = self.tars[k]
        row = index - int(self.ends[k - 1]) if k else index
        entry = np.fromfile(file, np.uint32, 5, offset=start + 20 * row)
        image_block, image_size, text_block, text_size, plain = map(int, entry)
        return tar, BLOCK * image_block, image_size, BLOCK * text_block, text_size, plain

    def load(self, index, rng=None):
        tar, image_at, image_size, text_at, text_size, plain = self.place(index)
        with open(tar, "rb") as f:
            f.seek(image_at)
            image = read_image(io.BytesIO(f.read(image_size)))
            f.seek(text_at)
            return image, read_caption(f.read(text_size), plain), -1

    def name(self, index):
        """Tar and file name. The file name is read from the header before the image, which holds
        the first 100 bytes of it."""
        try:
            tar, image_at, *_ = self.place(index)
            with open(tar, "rb") as f:
                f.seek(image_at - BLOCK)
                file = f.read(100).split(b"\0")[0].decode("utf-8", "replace")
            return printable(f"{tar}:{file}")
        except Exception:                                     # the tar has gone
            return printable(f"sample {index} of {self.spec}")


def read_caption(raw, plain=True):
    """The bytes of KEY.txt (plain) or of KEY.json with a "caption" -> string of 1 to 2000
    characters; the tokenizer keeps at most 77 ids.

    What is not UTF-8 becomes U+FFFD. ValueError if the caption is empty.
    """
    text = raw.decode("utf-8-sig", "replace")
    if not plain:
        found = json.loads(text)
        text = found.get("caption") if isinstance(found, dict) else None
        if not isinstance(text, str):
            raise ValueError('its JSON has no "caption" that is a string')
    text = text.replace("\0", " ")
    text = text.encode("utf-8", "replace").decode()           # a lone surrogate becomes "?"
    text = text.strip()[:2000]
    if not text:
        raise ValueError("its caption is empty")
    return text


# ---------------------------------------------------------------- the index
def expand(pattern):
    """'pairs-{000..012}.tar' or a glob -> names of tars, in order; a range's need not exist"""
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
    """-> the folder for index files; a temporary one if it cannot be written"""
    folder = Path(os.environ.get("VTP_CACHE") or "~/.cache/vtp_min").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as problem:
        print0(f"{printable(folder)} cannot be written ({problem.strerror}): tars are indexed "
               f"again in each run; set VTP_CACHE=DIR to a folder that can be written")
        folder = Path(tempfile.mkdtemp(prefix="vtp_min-"))
    return folder


def index_all(tars, cache, map_in_workers):
    """-> load_index of each tar, in order. Each rank starts at another tar and uses the index files
    that other ranks have written."""
    first = rank() * len(tars) // world_size()
    rotated = tars[first:] + tars[:first]
    workers = 0
    if len(tars) >= 8:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = max(1, min(32, (os.cpu_count() or 1) // processes))
    found = map_in_workers(partial(load_index, cache), rotated, workers)
    hide = workers == 0 or rank() > 0
    found = list(tqdm(found, "indexing tars", len(tars), disable=hide))
    return found[len(tars) - first:] + found[:len(tars) - first]


def load_index(cache, tar):
    """The index of a tar, read from the cache or made now -> dict

    tar, and either
    broken   why the tar cannot be read
    or
    index    the index file        start  where its rows begin        samples  their number
    lost     number of samples without an image or a caption          first    the first of them
    end      how the tar is damaged, or ""                            new      whether made now
    """
    try:
        stat = os.stat(tar)
        key = f"{LAYOUT} {os.path.abspath(tar)} {stat.st_size} {stat.st_mtime_ns}"
        file = cache / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:24]}.index"
        new = not file.exists()
        if new:
            rows, lost, end = index_tar(tar)
    except Exception as problem:                              # tarfile raises anything
        return {"tar": tar, "broken": f"({getattr(problem, 'strerror', None) or problem})"}
    if new:
        write_index(file, tar, rows, lost, end)
    with open(file, "rb") as f:
        head = json.loads(f.readline())
        return head | {"tar": tar, "index": str(file), "start": f.tell(), "new": new}


def write_index(file, tar, rows, lost, end):
    """A line of JSON, then the rows. Ranks may index one tar at the same time: each writes a file
    of its own, the last one stays."""
    head = {"tar": os.path.abspath(tar), "samples": len(rows), "lost": len(lost),
            "first": lost[0] if lost else "", "end": end}
    part = file.with_name(f"{uuid.uuid4().hex}.part")
    try:
        part.write_bytes(json.dumps(head).encode() + b"\n" + rows.tobytes())
    except OSError as problem:
        raise ValueError(f"the index of {tar} cannot be written into {file.parent} ({problem}); "
                         f"free some space, or name another folder with $VTP_CACHE") from problem
    part.replace(file)


def index_tar(path):
    """Read the headers of a tar.

    -> rows  (n, 5) uint32: see Shards.place; offsets count blocks
       lost  why a sample is skipped, for each
       end   how the tar is damaged, or ""
    """
    with open(path, "rb") as f:
        if f.read(2) == GZIP:
            raise ValueError("is gzip-compressed, which allows no random access: gunzip it")
    samples, lost, end = {}, [], ""
    with tarfile.open(path, "r:", encoding="utf-8") as tar:
        try:
            for member in tar:
                add_member(member, os.path.getsize(path), samples, lost)
            check_end(tar)
        except Exception as problem:
            end = f"(ends early: {problem}; the samples before that are used)"
    rows = []
    for key, files in samples.items():
        image = next((files[suffix] for suffix in SUFFIXES if suffix in files), None)
        text = files.get("txt") or files.get("json")
        if image and text:
            rows.append((*image, *text, "txt" in files))
        else:
            lost.append(f"{key} lacks its {'caption' if image else 'image'}")
    if not rows and not end:
        end = "(holds no pairs)"
    return np.array(rows, np.uint32).reshape(-1, 5), lost, end


def add_member(member, tar_size, samples, lost):
    """Enter a file of a tar into samples {key: {suffix: (block, size)}}.

    As in WebDataset a key ends at the first dot of the file's name; its folder belongs to it. Of
    two files of one name the first counts. Links and sparse files are ignored.
    """
    folder, slash, name = member.name.rpartition("/")
    key, _, suffix = name.partition(".")
    suffix = suffix.lower()
    # a negative size would lead back to a header that was already read
    if member.size < 0 or (member.isreg() and member.size > tar_size - member.offset_data):
        raise ValueError(f"{member.name} is cut off")
    if not member.isreg() or member.issparse() or not key or not 0 < member.size < 2 ** 32:
        return
    files = samples.setdefault(folder + slash + key, {})
    if suffix in files:
        lost.append(f"{member.name} occurs twice")
    else:
        files[suffix] = member.offset_data // BLOCK, member.size


def check_end(tar):
    """ValueError if the tar does not end with zeros: tarfile stops silently at a damaged header"""
    tar.fileobj.seek(tar.offset)
    tail = tar.fileobj.read(2 ** 20)
    if tail[:BLOCK] != bytes(BLOCK):
        raise ValueError("no end mark")
    if tail.strip(b"\0"):
        raise ValueError("something follows the end mark")


# ---------------------------------------------------------------- large permutations
def feistel_permutation(seed, epoch, n, k):
    """The k-th number of a permutation of range(n), computed without storing it.

    Six Feistel rounds (a, b) -> (b, a ^ f(b)) on 2h bits, with 4^h >= n, repeated until the number
    is below n. A round can be inverted whatever f is, so no number occurs twice. f is the last part
    of splitmix64. It mixes few bits less well, so small n have a stored permutation.
    """
    h = ((n - 1).bit_length() + 1) // 2
    low_bits, all_bits = 2 ** h - 1, 2 ** 64 - 1
    while True:
        a, b = k >> h, k & low_bits
        for key in round_keys(seed, epoch):
            f = (b ^ key) * 0xBF58476D1CE4E5B9 & all_bits
            f = (f ^ f >> 27) * 0x94D049BB133111EB & all_bits
            f = f ^ f >> 31
            a, b = b, a ^ f & low_bits
        k = a << h | b
        if k < n:
            return k


@lru_cache(maxsize=2)
def round_keys(seed, epoch):
    return [int(x) for x in make_rng(Stream.ORDER, seed, epoch).integers(2 ** 63, size=6)]
