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
from ..dist import barrier, rank
from .grid import image_grid


def prepare_folder(out):
    """Create the folder and delete images that are already there"""
    if rank() == 0:
        (out / "png").mkdir(parents=True, exist_ok=True)
        for path in (out / "png").glob("[0-9]*.png"):
            path.unlink()
    barrier()


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
    atomic_write(out / "samples.npz", lambda path: write_npz(path, out, labels))
    summary = {"protocol": protocol, "classes": names, "labels": labels}
    (out / "labels.json").write_text(json.dumps(summary) + "\n")
    class_grid(out, labels, names).save(out / "grid.png")


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
