"""The scripts of docs/data.md for small data sets make class folders that data.py reads."""
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import open_data

PAGE = (Path(__file__).parents[1] / "docs/data.md").read_text()
SECTION = PAGE.partition("\n## Small data sets\n")[2]
CLASSES = ["airplane", "automobile", "bird"]


class TinyCIFAR10:
    """Stands in for torchvision's CIFAR10: 7 training images and 3 test images of three classes"""
    classes = CLASSES

    def __init__(self, root, train=True, download=False):
        self.train = train

    def __getitem__(self, i):
        if i >= (7 if self.train else 3):
            raise IndexError
        pixels = np.full((32, 32, 3), 10 * i + self.train, dtype=np.uint8)
        return Image.fromarray(pixels), i % 3


def code(language, word):
    """-> the one block of the section in this language that contains the word"""
    blocks = re.findall(rf"```{language}\n(.*?)```", SECTION, re.S)
    [block] = [block for block in blocks if word in block]
    return block


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """The folder that the script writes"""
    monkeypatch.setattr("torchvision.datasets.CIFAR10", TinyCIFAR10)
    monkeypatch.chdir(tmp_path)
    exec(code("python", "CIFAR10"), {})
    return tmp_path / "cifar10"


def test_the_cifar10_script_writes_all_images_with_their_classes(cifar10):
    for split, n in (("train", 7), ("val", 3)):
        data = open_data(str(cifar10), split, 32)
        assert data.classes == CLASSES and len(data) == n
        labels = [data.load(i, np.random.default_rng(0))[2] for i in range(n)]
        assert labels == sorted(i % 3 for i in range(n))
    pixels = np.asarray(Image.open(cifar10 / "train/bird/00005.png"))
    assert pixels.shape == (32, 32, 3) and (pixels == 51).all()


def test_the_imagenet100_loop_links_the_listed_classes_of_both_splits(cifar10, tmp_path):
    cifar10.rename(tmp_path / "IMAGENET")
    (tmp_path / "imagenet100.txt").write_text("bird\nairplane\n")
    loop = code("sh", "imagenet100.txt").partition("python data.py")[0]
    subprocess.run(["bash", "-eu", "-c", loop], check=True)
    assert os.path.islink(tmp_path / "imagenet100/train/bird")
    for split, n in (("train", 5), ("val", 2)):
        data = open_data("imagenet100", split, 32)
        assert data.classes == ["airplane", "bird"] and len(data) == n
