"""External weights: their addresses, their hashes, and the one command that downloads them.

    vgg, alex, squeeze   ImageNet trunks of the perceptual loss LPIPS, from torchvision
    inception            the network of the FID: pytorch-fid's port of the 2015 TensorFlow file
    squeezenet           SqueezeNet v1.0, for a Frechet distance without Inception (LPIPS' squeeze
                         is v1.1). No address offers this file, so it cannot be downloaded.

    find(name)   -> its path, hash checked; FileNotFoundError names the command that downloads it
    fetch(name)  downloads it: python eval.py fetch vgg
    heads(name)  -> path of LPIPS' linear heads, which are part of the pip package lpips

Files lie in $VTP_WEIGHTS, or else in ~/.cache/vtp_min; torch.hub's folder is searched too. Nothing
else downloads, except a Hub id that is given in place of a model's folder.

Of a download only the first 8 digits of its sha256 are published: torch.hub's file names end with
them. They reveal a damaged file, but not a forged one.
"""
import hashlib
import importlib.util
import os
import socket
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path

import torch

from ..dist import barrier, rank

TORCH = "https://download.pytorch.org/models"
GITHUB = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights"
FILES = {      # name: (megabytes, address); the address ends with the start of the file's sha256
    "vgg":       (553, f"{TORCH}/vgg16-397923af.pth"),
    "alex":      (244, f"{TORCH}/alexnet-owt-7be5be79.pth"),
    "squeeze":   (5, f"{TORCH}/squeezenet1_1-b8a52dc0.pth"),
    "inception": (96, f"{GITHUB}/pt_inception-2015-12-05-6726825d.pth"),
}

BY_HAND = {    # name: (file, sha256, description)
    "squeezenet": (
        "squeezenet_v10.npz",
        "1e67ccb770ea9a2c04a079d716c114a252a3df3c003a68c1595a685acda27b51",
        "ImageNet weights of SqueezeNet v1.0, decoded from compressed_SqueezeNet.net of "
        "https://github.com/songhan/SqueezeNet-Deep-Compression (BSD 2-clause) into float16 arrays "
        "LAYER.weight (O, I, kH, kW) and LAYER.bias, 0.8 MB"),
}

# sha256 of the files in weights/v0.1 of lpips 0.1.4. The MD5 of vgg is that of the file which VTP's
# own evaluation uses: d507d7349b931f0638a25a48a722f98a
HEADS = {
    "vgg":     "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
    "alex":    "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
    "squeeze": "4a5350f23600cb79923ce65bb07cbf57dca461329894153e05a1346bd531cf76",
}


def folder():
    return Path(os.environ.get("VTP_WEIGHTS") or "~/.cache/vtp_min").expanduser()


def entry(name):
    """-> file name, its sha256 or the first 8 digits of it"""
    if name in BY_HAND:
        return BY_HAND[name][:2]
    if name not in FILES:
        known = ", ".join([*FILES, *BY_HAND])
        raise ValueError(f"no external file is called '{name}'; there are: {known}")
    file = FILES[name][1].rsplit("/", 1)[1]
    return file, Path(file).stem.rsplit("-", 1)[1]


def find(name):
    """-> Path of the file in our folder or in torch.hub's. ValueError if it is damaged."""
    file, digest = entry(name)
    for path in (folder() / file, Path(torch.hub.get_dir()) / "checkpoints" / file):
        if not path.exists():
            continue
        found = sha256(path, path.stat().st_mtime_ns)
        if not found.startswith(digest):
            repair = "copy it again" if name in BY_HAND else f"type `python eval.py fetch {name}`"
            raise ValueError(f"{path} is damaged: its sha256 begins with {found[:8]}, not with "
                             f"{digest[:8]}; {repair}")
        return path
    if name in BY_HAND:
        raise FileNotFoundError(f"{file} is missing, and it cannot be downloaded, because no "
                                f"address offers it. It holds {BY_HAND[name][2]}. Put this file, "
                                f"sha256 {digest}, into {folder()}")
    size, address = FILES[name]
    raise FileNotFoundError(f"{file} is missing (about {size} MB, from {address}); type "
                            f"`python eval.py fetch {name}`, or put the file into {folder()}")


@lru_cache
def sha256(path, changed):
    """Of a file, in hex. `changed`, its time of change, is part of the cache's key."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def heads(name):
    """-> Path of LPIPS' linear heads in the installed package lpips. ValueError if they differ."""
    package = importlib.util.find_spec("lpips")
    if not package:
        raise FileNotFoundError("the package lpips, which contains LPIPS' heads, is missing; type "
                                "`pip install lpips`")
    path = Path(package.origin).parent / "weights" / "v0.1" / f"{name}.pth"
    if not path.exists() or sha256(path, path.stat().st_mtime_ns) != HEADS[name]:
        raise ValueError(f"{path} is not the file of lpips 0.1.4; type "
                         f"`pip install --force-reinstall lpips==0.1.4`")
    return path


def fetch(name):
    """Download a file that is missing or damaged -> its Path. Rank 0 downloads, the others wait."""
    if rank() == 0:
        try:
            find(name)
        except (FileNotFoundError, ValueError) as problem:
            if name in BY_HAND:
                raise SystemExit(str(problem)) from None
            download(name)
    barrier()
    return find(name)


def download(name):
    """SystemExit, with the addresses of all files, if the file cannot be downloaded or written"""
    file, digest = entry(name)
    size, address = FILES[name]
    print(f"{file}, about {size} MB, is downloaded into {folder()}", flush=True)
    socket.setdefaulttimeout(30)               # torch.hub sets none: it could wait forever
    try:
        folder().mkdir(parents=True, exist_ok=True)
        # writes a temporary file, and renames it once its hash is right (else: RuntimeError)
        torch.hub.download_url_to_file(address, str(folder() / file), hash_prefix=digest)
    except (OSError, HTTPException, RuntimeError) as problem:
        files = "\n".join(f"  {address}\n    about {size} MB" for size, address in FILES.values())
        raise SystemExit(
            f"{file} could not be downloaded into {folder()} ({problem}); no part of it is kept. "
            f"Another folder: export VTP_WEIGHTS=FOLDER. A proxy: export https_proxy=ADDRESS. "
            f"Without a network, download the files on another machine and put them into "
            f"{folder()}, under the same names; each name ends with the start of the file's "
            f"sha256:\n{files}\n"
            f"LPIPS' heads need no download: the pip package lpips contains them.") from None
