"""The few external files: where they are, which hash they have, how to fetch them. Nothing else in this project downloads.

    vgg, alex, squeeze   trunks of the perceptual loss LPIPS, torchvision's ImageNet weights (the heads come with the package lpips)
    inception            the network that FID means, pytorch-fid's port of the 2015 TensorFlow file

    find(name)   -> its path, hash checked; FileNotFoundError says what is missing and what to type
    fetch(name)  downloads it: `python eval.py fetch vgg`; an interrupted download goes on where it stopped
They live in $VTP_WEIGHTS, or in ~/.cache/vtp_min; what torch.hub has downloaded before is found too.
"""
import hashlib
import os
import urllib.error
import urllib.request
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path

import torch
from tqdm import tqdm

FILES = {      # name: (about how many MB, address). A file's name ends in the first 8 digits of its sha256: the custom of torch.hub
    "vgg":       (553, "https://download.pytorch.org/models/vgg16-397923af.pth"),
    "alex":      (244, "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"),
    "squeeze":   (5,   "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth"),
    "inception": (96,  "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"),
}


def folder():
    return Path(os.environ.get("VTP_WEIGHTS") or "~/.cache/vtp_min").expanduser()


def entry(name):
    """-> file name, sha256 prefix, megabytes, address"""
    if name not in FILES:
        raise ValueError(f"no external file is called '{name}'; there are: {', '.join(FILES)}")
    size, address = FILES[name]
    file = address.rsplit("/", 1)[1]
    return file, Path(file).stem.rsplit("-", 1)[1], size, address


def find(name):
    """-> Path of the file, in our folder or torch.hub's, after its hash was checked (once a process; half a gigabyte takes a second)."""
    file, digest, size, address = entry(name)
    for path in (folder() / file, Path(torch.hub.get_dir()) / "checkpoints" / file):
        if path.exists():
            found = sha256(path, path.stat().st_mtime_ns)
            if not found.startswith(digest):
                raise ValueError(f"{path} is damaged: its sha256 begins {found[:8]}, not {digest}; `python eval.py fetch {name}` replaces it")
            return path
    raise FileNotFoundError(f"{file} is missing (about {size} MB, from {address}); type `python eval.py fetch {name}`, "
                            f"or put the file into {folder()}")


@lru_cache
def sha256(path, changed):
    """Of a file, as hex; `changed`, its time of change, makes a new file be read anew."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def fetch(name):
    """Download into our folder -> Path. Rank 0 does the work, other ranks get None. SystemExit says what to do when the network fails."""
    if os.environ.get("RANK", "0") != "0":
        return None
    file, digest, size, address = entry(name)
    try:
        return find(name)
    except (FileNotFoundError, ValueError):                              # missing or damaged: what we are here for
        print(f"{file}, about {size} MB, goes to {folder()}", flush=True)
    part = folder() / (file + ".part")
    folder().mkdir(parents=True, exist_ok=True)
    try:
        download(address, part)
    except (OSError, HTTPException) as problem:                          # no network, refused, timed out, broken off
        rows = "\n".join("  {3}\n    about {2} MB, sha256 begins {1}".format(*entry(n)) for n in FILES)
        raise SystemExit(f"{file} did not arrive ({problem}). The same command goes on where it stopped. Without a network, download on "
                         f"another machine and put into {folder()}, under the same names:\n{rows}")
    found = sha256(part, part.stat().st_mtime_ns)
    if not found.startswith(digest):
        part.unlink()
        raise SystemExit(f"what {address} sent has sha256 {found[:8]}..., not {digest}...; it was thrown away, fetch it again")
    os.replace(part, folder() / file)                                    # under its own name only when whole and checked
    return folder() / file


def download(address, part):
    """Append to `part` what it still lacks. OSError when the connection fails or ends early; `part` keeps what came."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(address, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as problem:
        if have and problem.code == 416:                                 # nothing lies beyond what we have: it is whole
            return
        raise
    with answer:
        have = have if answer.status == 206 else 0                       # 206: the rest; anything else: the whole file again
        total = have + int(answer.headers["Content-Length"] or 0)
        with open(part, "ab" if have else "wb") as out, tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=part.stem) as bar:
            while block := answer.read(1 << 20):
                bar.update(out.write(block))
    if part.stat().st_size < total:
        raise OSError(f"the connection ended after {part.stat().st_size} of {total} bytes")
