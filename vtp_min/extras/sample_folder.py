"""The folder of generated images that `dit.py sample` writes and `eval.py fid` reads.

    png/000000.png ...    the images
    samples.npz           the same images as one array, for ADM's evaluator, and their labels
    labels.json           how the images were generated, class names, labels
    grid.png              a contact sheet with one row per class
"""
import json
import zipfile

import numpy as np
from PIL import Image

from ..config import atomic_write
from ..dist import barrier, print0, rank
from .files import check_writable, read_json, reading, wait_until
from .grid import image_grid


def prepare_folder(out, fresh):
    """Create the folder. ValueError if it holds samples, which `fresh` deletes."""
    images = [path for path in (out / "png").glob("*.png") if is_ours(path)]
    files = [out / name for name in ("samples.npz", "labels.json", "grid.png")]
    files = [path for path in files if path.exists()]
    if images or files:
        found = ", ".join([f"{len(images)} images", *(path.name for path in files)])
        if not fresh:
            raise ValueError(f"{out} already holds samples ({found}); keep them and give another "
                             f"folder with --out, or replace them with --fresh")
        print0(f"{out}: the samples of an earlier run are deleted ({found})")
    barrier()                                      # all ranks have listed the old files by now
    if rank() == 0:
        check_writable(out / "png", "give another folder with --out")
        # samples.npz first: without it, no other command takes the old samples for the new ones
        for path in [*files, *images]:
            path.unlink()
    barrier()


def is_ours(path):
    """True for a name that image_path makes; other images belong to the user"""
    return path.stem.isdecimal() and len(path.stem) >= 6


def image_path(out, j):
    return out / "png" / f"{j:06d}.png"


def write_images(out, indices, images):
    """Write PNG files. indices: numbers of the images; images: uint8 (b, H, W, 3)"""
    for j, image in zip(indices, images):
        Image.fromarray(image).save(image_path(out, j))


def read_image(out, j):
    """-> image j, uint8 (H, W, 3)"""
    return np.asarray(Image.open(image_path(out, j)))


def write_summary(out, protocol, names, labels):
    """Write all other files. Called on rank 0 after all images are written.

    protocol  how the images were generated, a string      names   list of all class names
    labels    class of each image, a list of integers
    """
    def missing():
        return [j for j in range(len(labels)) if not image_path(out, j).exists()]
    if not wait_until(lambda: not missing()):
        raise ValueError(f"{out} lacks {len(missing())} of the {len(labels)} images that the "
                         f"processes wrote; give an --out on a disk that all machines share")
    text = json.dumps({"protocol": protocol, "classes": names, "labels": labels}) + "\n"
    # before samples.npz, which is thus never without its protocol
    atomic_write(out / "labels.json", lambda path: path.write_text(text))
    atomic_write(out / "samples.npz", lambda path: write_npz(path, out, labels))
    class_grid(out, labels, names).save(out / "grid.png")


def read_summary(out):
    """-> the contents of labels.json, as write_summary wrote it. ValueError if they are of another
    kind"""
    remedy = "move it to another folder, or generate the samples again: dit.py sample --fresh"
    path = out / "labels.json"
    found = read_json(path, remedy, keys=("protocol", "classes", "labels"))
    with reading(path, remedy):
        classes, labels = found["classes"], found["labels"]
        if not all(isinstance(name, str) for name in [found["protocol"], *classes]):
            raise ValueError("its protocol or a class name is not a text")
        unknown = [y for y in labels if not isinstance(y, int) or not 0 <= y < len(classes)]
        if unknown:
            raise ValueError(f"it names {len(classes)} classes, but has the label {unknown[0]}")
    return found


def write_npz(path, out, labels):
    """Write an npz file with arr_0, uint8 (n, H, W, 3), the name that ADM's evaluator expects, and
    labels (n,)

    The array is written image by image, because 50,000 images of 256 px would need 10 GB of memory.
    """
    shape = (len(labels), *read_image(out, 0).shape)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as f:
            np.lib.format.write_array_header_1_0(f, header)
            for j in range(len(labels)):
                f.write(read_image(out, j).tobytes())
        with archive.open("labels.npy", "w") as f:
            np.lib.format.write_array(f, np.array(labels))


def class_grid(out, labels, names, rows=16, columns=10):
    """-> PIL.Image with the first `columns` images of each of the first `rows` classes"""
    classes = sorted(set(labels))[:rows]
    images = []
    for c in classes:
        indices = [j for j, label in enumerate(labels) if label == c]
        images.append([read_image(out, j) for j in indices[:columns]])
    return image_grid(images, [names[c] for c in classes])
