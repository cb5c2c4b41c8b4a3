"""The few external files: where they are, which hash they have, how to fetch them. Nothing else downloads, but a Hub id that you type in place of a folder.

    vgg, alex, squeeze   trunks of the perceptual loss LPIPS, torchvision's ImageNet weights
    inception            the network that FID means, pytorch-fid's port of the 2015 TensorFlow file
    squeezenet           SqueezeNet v1.0 (LPIPS' squeeze is v1.1), a small judge of real photographs; nobody offers it ready made: put it there by hand

    find(name)   -> its path, hash checked; FileNotFoundError says what is missing and what to type
    fetch(name)  downloads it: `python eval.py fetch vgg`; an interrupted download goes on where it stopped
    heads(name)  -> path of LPIPS' linear heads: nothing to fetch, the pip package lpips brings them; hash checked too
They live in $VTP_WEIGHTS, or in ~/.cache/vtp_min; what torch.hub has downloaded before is found too.

Of each download only the first 8 digits of its sha256 are published, in its name (the custom of torch.hub); the rest is known to nobody here,
so that is what is checked: enough against a damaged file, not against a forged one.
"""
import errno
import hashlib
import importlib.util
import os
import shutil
import urllib.error
import urllib.request
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path

import torch
from tqdm import tqdm

FILES = {      # name: (about how many MB, address)
    "vgg":       (553, "https://download.pytorch.org/models/vgg16-397923af.pth"),
    "alex":      (244, "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"),
    "squeeze":   (5,   "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth"),
    "inception": (96,  "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"),
}

BY_HAND = {    # name: (file, sha256, what it is)
    "squeezenet": ("squeezenet_v10.npz", "1e67ccb770ea9a2c04a079d716c114a252a3df3c003a68c1595a685acda27b51",
                   "ImageNet weights of SqueezeNet v1.0, decoded from compressed_SqueezeNet.net of https://github.com/songhan/SqueezeNet-Deep-Compression "
                   "(BSD 2-clause) into float16 arrays LAYER.weight (O, I, kH, kW) and LAYER.bias, 0.8 MB"),
}

HEADS = {      # sha256 of lpips 0.1.4's weights/v0.1. The vgg one has MD5 d507d7349b931f0638a25a48a722f98a: the file that VTP's own evaluation asks for
    "vgg":     "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
    "alex":    "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
    "squeeze": "4a5350f23600cb79923ce65bb07cbf57dca461329894153e05a1346bd531cf76",
}


def folder():
    return Path(os.environ.get("VTP_WEIGHTS") or "~/.cache/vtp_min").expanduser()


def entry(name):
    """-> file name, sha256 or its beginning, megabytes, address ("" for a file that comes by hand)"""
    if name in BY_HAND:
        file, digest, _ = BY_HAND[name]
        return file, digest, 1, ""
    if name not in FILES:
        raise ValueError(f"no external file is called '{name}'; there are: {', '.join([*FILES, *BY_HAND])}")
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
                cure = f"`python eval.py fetch {name}` replaces it" if address else "copy it anew"
                raise ValueError(f"{path} is damaged: its sha256 begins {found[:8]}, not {digest[:8]}; {cure}")
            return path
    if not address:
        raise FileNotFoundError(f"{file} is missing, and no address offers it ready made, so it cannot be fetched: it holds {BY_HAND[name][2]}. "
                                f"Put that file, sha256 {digest}, into {folder()}")
    raise FileNotFoundError(f"{file} is missing (about {size} MB, from {address}); type `python eval.py fetch {name}`, "
                            f"or put the file into {folder()}")


@lru_cache
def sha256(path, changed):
    """Of a file, as hex; `changed`, its time of change, makes a new file be read anew."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def heads(name):
    """-> Path of LPIPS' linear heads in the installed package. ValueError if they are others, FileNotFoundError without the package."""
    package = importlib.util.find_spec("lpips")
    if not package:
        raise FileNotFoundError("the package lpips, which brings LPIPS' heads, is missing; type `pip install lpips`")
    path = Path(package.origin).parent / "weights" / "v0.1" / f"{name}.pth"
    if not path.exists() or sha256(path, path.stat().st_mtime_ns) != HEADS[name]:
        raise ValueError(f"{path} is not the file of lpips 0.1.4; type `pip install --force-reinstall lpips==0.1.4`")
    return path


def fetch(name):
    """Download into our folder -> Path. Rank 0 does the work, other ranks get None. SystemExit says what to do when network or disk fails."""
    if os.environ.get("RANK", "0") != "0":
        return None
    file, digest, size, address = entry(name)
    try:
        return find(name)
    except (FileNotFoundError, ValueError) as problem:                   # missing or damaged: what we are here for
        if not address:
            raise SystemExit(str(problem)) from None
        print(f"{file}, about {size} MB, goes to {folder()}", flush=True)
    part = folder() / (file + ".part")
    elsewhere = "or name another folder: export VTP_WEIGHTS=FOLDER"
    try:
        folder().mkdir(parents=True, exist_ok=True)
        part.open("ab").close()
    except OSError as problem:
        raise SystemExit(f"{folder()} cannot be written ({problem}); make it writable, {elsewhere}") from None
    free = shutil.disk_usage(folder()).free + part.stat().st_size
    if free < size * 1e6:
        raise SystemExit(f"{file} needs about {size} MB, and the disk of {folder()} has {free / 1e6:.0f} MB left; free some, {elsewhere}")
    try:
        download(address, part)
    except (OSError, HTTPException) as problem:                          # no network, refused, timed out, broken off
        if getattr(problem, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise SystemExit(f"the disk of {folder()} is full ({problem}); what came is kept. Free some and type the same command, {elsewhere}") from None
        rows = "\n".join("  {3}\n    about {2} MB, sha256 begins {1}".format(*entry(n)) for n in FILES)
        proxy = ", ".join(f"{k}: {v.rpartition('@')[2]}" for k, v in urllib.request.getproxies().items() if k in ("http", "https"))    # no password is shown
        asked = f"asked through the proxy {proxy}" if proxy else "no proxy is set; if you sit behind one, export https_proxy"
        raise SystemExit(f"{file} did not arrive ({problem}; {asked}). The same command goes on where it stopped. Without a network, download on another "
                         f"machine and put into {folder()}, under the same names:\n{rows}\n"
                         "LPIPS' heads need no download: they come with the pip package lpips.") from None
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
