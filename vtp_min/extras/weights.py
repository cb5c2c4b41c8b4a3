"""External weights: addresses, hashes, and the function that downloads them.

    vgg, alex, squeeze   ImageNet networks of the perceptual loss LPIPS, from torchvision
    inception            the network of the FID: pytorch-fid's port of the 2015 TensorFlow file

    find(name)   -> path of a file whose hash is correct; if the file is missing, the
                 FileNotFoundError names the command that downloads it
    fetch(name)  download the file, as `python eval.py fetch vgg` does
    heads(name)  -> path of the linear heads of LPIPS, which the pip package lpips contains

Files are stored in $VTP_WEIGHTS, by default ~/.cache/vtp_min; torch.hub's folder is searched too.
The rest of the code downloads nothing, except when a Hub id is given in place of a model folder.

Only the first 8 hexadecimal digits of each download's SHA-256 are published: torch.hub appends them
to the file names. They are enough to detect a damaged file, but not a deliberately modified one.
"""
import hashlib
import importlib.util
import os
import socket
import tempfile
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path

import torch

from ..dist import barrier, rank

TORCH = "https://download.pytorch.org/models"
GITHUB = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights"
FILES = {      # name: (megabytes, address); the file name ends with the start of its SHA-256
    "vgg":       (553, f"{TORCH}/vgg16-397923af.pth"),
    "alex":      (244, f"{TORCH}/alexnet-owt-7be5be79.pth"),
    "squeeze":   (5, f"{TORCH}/squeezenet1_1-b8a52dc0.pth"),
    "inception": (96, f"{GITHUB}/pt_inception-2015-12-05-6726825d.pth"),
}

# SHA-256 of the files in weights/v0.1 of lpips 0.1.4. The MD5 of the vgg file is
# d507d7349b931f0638a25a48a722f98a, as in the evaluation code of VTP.
HEADS = {
    "vgg":     "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
    "alex":    "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
    "squeeze": "4a5350f23600cb79923ce65bb07cbf57dca461329894153e05a1346bd531cf76",
}


def folder():
    """-> Path of the folder for downloaded files; without a home folder, a temporary folder"""
    try:
        return Path(os.environ.get("VTP_WEIGHTS") or "~/.cache/vtp_min").expanduser()
    except RuntimeError:                       # no HOME, and no entry in /etc/passwd
        return Path(tempfile.gettempdir(), f"vtp_min-{os.getuid()}")


def entry(name):
    """-> file name, and the first 8 digits of its SHA-256. ValueError for an unknown name."""
    if name not in FILES:
        raise ValueError(f"'{name}' is not the name of an external file; the names are: "
                         f"{', '.join(FILES)}")
    file = FILES[name][1].rsplit("/", 1)[1]
    return file, Path(file).stem.rsplit("-", 1)[1]


def find(name):
    """-> Path of the file in `folder()` or in torch.hub's folder

    FileNotFoundError if it is in neither of them; ValueError if its hash is wrong.
    """
    file, digest = entry(name)
    for path in (folder() / file, Path(torch.hub.get_dir()) / "checkpoints" / file):
        if not path.exists():
            continue
        found = sha256(path, path.stat().st_mtime_ns)
        if not found.startswith(digest):
            raise ValueError(f"{path} is damaged: its SHA-256 begins with {found[:8]}, not with "
                             f"{digest}; type `python eval.py fetch {name}`")
        return path
    size, address = FILES[name]
    raise FileNotFoundError(f"{file} is missing (about {size} MB, from {address}); type "
                            f"`python eval.py fetch {name}`, or put the file into {folder()}")


@lru_cache
def sha256(path, changed):
    """-> SHA-256 of a file, as hexadecimal digits

    changed  modification time of the file. It is only a key of the cache: a file that was replaced
             is hashed again.
    """
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def heads(name):
    """-> Path of the linear heads of LPIPS in the installed package lpips

    name  'vgg', 'alex' or 'squeeze'
    FileNotFoundError without the package; ValueError if the file is not that of lpips 0.1.4.
    """
    package = importlib.util.find_spec("lpips")
    if not package:
        raise FileNotFoundError("the package lpips, which contains the linear heads of LPIPS, is "
                                "not installed; type `pip install lpips`")
    path = Path(package.origin).parent / "weights" / "v0.1" / f"{name}.pth"
    return check_package_file(path, HEADS[name], "lpips==0.1.4")


def check_package_file(path, digest, package):
    """-> path, a file of an installed package. ValueError if its SHA-256 is another one"""
    if not path.exists() or sha256(path, path.stat().st_mtime_ns) != digest:
        raise ValueError(f"{path} is not the file of {package}; type "
                         f"`pip install --force-reinstall {package}`")
    return path


def fetch(name):
    """Download the file if it is missing or damaged -> its Path

    Every rank calls this function; rank 0 downloads, and the others wait.
    """
    if rank() == 0:
        try:
            find(name)
        except (FileNotFoundError, ValueError):
            download(name)
    barrier()
    return find(name)


def download(name):
    """Download the file into `folder()`.

    SystemExit, with the addresses of all files, if it cannot be downloaded or written.
    """
    file, digest = entry(name)
    size, address = FILES[name]
    print(f"downloading {file}, about {size} MB, into {folder()}", flush=True)
    socket.setdefaulttimeout(30)               # torch.hub sets no timeout and could wait forever
    try:
        folder().mkdir(parents=True, exist_ok=True)
        # writes a temporary file and renames it after the hash check; a wrong hash: RuntimeError
        torch.hub.download_url_to_file(address, str(folder() / file), hash_prefix=digest)
    except (OSError, HTTPException, RuntimeError) as problem:
        files = "\n".join(f"  {address}\n    about {size} MB" for size, address in FILES.values())
        raise SystemExit(
            f"{file} could not be downloaded into {folder()} ({problem}); the incomplete file was "
            f"deleted. To use another folder, type `export VTP_WEIGHTS=FOLDER`; to use a proxy, "
            f"`export https_proxy=ADDRESS`. Without a network, download the files on another "
            f"machine and put them into {folder()} under the same names; each name ends with the "
            f"start of the file's SHA-256:\n{files}\n"
            f"The linear heads of LPIPS need no download: the pip package lpips contains them."
        ) from None
