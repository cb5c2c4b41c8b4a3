"""data.py, augment.py and shards.py: sources, views, masks, stochastic depth and batches."""
import io
import json
import math
import multiprocessing
import os
import pickle
import signal
import tarfile
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from PIL import Image

import data
from data import TrainBatches, eval_batches, open_data, prefetch
from vtp_min import augment, dist
from vtp_min.augment import (VIEWS, adm_crop, batch_masks, block_mask, denormalize, kept_rows,
                             mask_index_and_weight, normalize, random_crop, ssl_view)
from vtp_min.extras import fast_views, shards, weights
from vtp_min.extras.images import read_image
from vtp_min.extras.shards import feistel_permutation
from vtp_min.rng import permutation

GOLDEN = np.load(Path(__file__).parent / "golden" / "data.npz")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Store the indices of tar files in a temporary folder."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("VTP_CACHE", str(folder))
    return folder


def tokenize(captions):
    """A tokenizer with one id per character, padded with 0 to 77 ids"""
    rows = torch.zeros(len(captions), 77, dtype=torch.long)
    for row, caption in zip(rows, captions):
        ids = torch.tensor([ord(c) for c in caption[:77]])
        row[:len(ids)] = ids
    return rows


def noise(side=40, seed=0, width=None):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (side, width or side, 3), dtype=np.uint8))


def folder(root, classes=("n01443537", "red_fox"), n=6):
    for split in ("train", "val"):
        for k, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                suffix = "JPEG" if i % 2 else "png"
                noise(40, 100 * k + i).save(root / split / name / f"{i}.{suffix}")
    return root


def tar_of(path, members):
    """members  {file name: bytes}"""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def train_batches(source=None, **changes):
    settings = dict(tokenizer=tokenize, seed=3, batch=8, batch_ssl=4, batch_rec=2, clip=True,
                    ssl=True, rec=True, image=32, local_image=16, n_local=3, patch=8)
    return TrainBatches(source or open_data("shapes", side=32), **settings | changes)


def assert_same(a, b):
    for name in (f.name for f in fields(a)):
        x, y = getattr(a, name), getattr(b, name)
        assert torch.equal(x, y) if torch.is_tensor(x) else str(x) == str(y), name


# ---------------------------------------------------------------- sources
def test_training_and_validation_shapes_differ_and_every_seed_has_the_same_validation():
    train, val = open_data("shapes", side=32), open_data("shapes", "val", side=32)
    other = open_data("shapes", "val", seed=7, side=32)
    assert train.endless and not val.endless and len(val) == 10_000
    assert train.load(0)[1] != val.load(0)[1] and val.load(5)[1] == other.load(5)[1]
    assert train.load(10 ** 9)[0].size == (37, 37) and val.load(0)[0].size == (32, 32)
    assert val.classes[val.load(0)[2]] in val.load(0)[1]


def test_shapes_accept_their_settings_and_raise_for_others():
    single = open_data("shapes:objects=1,size=0.6-0.8", side=32)
    assert single.settings == {"objects": (1, 1), "size": (0.6, 0.8)}
    named = open_data("shapes:label=kind+colour,captions=both", "val", side=32)
    image, caption, label = named.load(3)
    assert len(named.classes) == 80 and named.classes[label] in caption
    assert named.templates[1].format(named.classes[0]) == "a striped red circle"
    for wrong in ("colour=red", "objects=many", "objects=9", "size=0.6-0.2", "label=hue"):
        with pytest.raises(ValueError):
            open_data(f"shapes:{wrong}")


def test_a_class_name_comes_from_classnames_txt_else_from_imagenet_else_from_the_folder(tmp_path):
    root = folder(tmp_path, ("n01440764", "n01443537", "red_fox"))
    (root / "classnames.txt").write_text("n01440764\ta fish I named\n")
    source = open_data(root)
    assert source.classes == ["a fish I named", "goldfish", "red fox"] and len(source) == 18
    image, caption, label = source.load(17, np.random.default_rng(0))
    assert image.mode == "RGB" and "red fox" in caption and label == 2
    assert source.name(17).endswith("red_fox/5.JPEG")
    assert open_data(root / "val", "val", whole=True).classes == source.classes


def test_labels_agree_between_splits_even_if_a_class_is_missing_in_one(tmp_path):
    root = folder(tmp_path, ("ant", "bee"))
    for file in (root / "val" / "ant").iterdir():
        file.unlink()
    (root / "val" / "ant").rmdir()
    assert open_data(root, "val").load(0, np.random.default_rng(0))[2] == 1


def test_a_folder_without_the_requested_split_raises_an_error_that_says_what_to_type(tmp_path):
    folder(tmp_path)
    with pytest.raises(ValueError, match="--val-data"):
        open_data(tmp_path / "train", "val")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no class folders with images"):
        open_data(tmp_path / "empty")
    with pytest.raises(ValueError, match="no folder"):
        open_data(tmp_path / "nowhere")
    (tmp_path / "only" / "val").mkdir(parents=True)
    with pytest.raises(ValueError, match="--data .*only/val"):
        open_data(tmp_path / "only")


# ---------------------------------------------------------------- folders with a wrong layout
def images(root, *names):
    """Write one image per name, such as train/cat/0.png"""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        noise(8).save(root / name)
    return root


def contents(source):
    """-> [(file, name of its class)]"""
    names = [source.files[i].decode() for i in range(len(source))]
    return [(name, source.classes[label]) for name, label in zip(names, source.labels)]


def test_validation_images_in_no_class_of_train_are_refused(tmp_path, capsys):
    names = [f"train/{wnid}/images/{i}.png" for wnid in ("n01443537", "n01629819") for i in (0, 1)]
    images(tmp_path, *names, "val/images/0.png", "val/images/1.png", "test/images/0.png")
    (tmp_path / "val" / "val_annotations.txt").write_text("0.png\tn01443537\n")
    assert open_data(tmp_path).classes == ["goldfish", "fire salamander"]
    assert "1 folders of val/ are not classes of train/" in capsys.readouterr().out
    for whole in (False, True):
        with pytest.raises(ValueError, match=r"no class folder of .*val \(images\) is one of"):
            open_data(tmp_path, "val", whole=whole)


def test_numbered_validation_folders_are_refused_beside_named_ones_in_train(tmp_path):
    images(tmp_path, "train/cat/0.png", "train/dog/0.png", "val/0/0.png", "val/1/0.png")
    with pytest.raises(ValueError, match="no class folder of .*val"):
        open_data(tmp_path, "val")


def test_validation_images_in_further_folders_are_left_out_and_counted(tmp_path, capsys):
    images(tmp_path, "train/cat/0.png", "train/dog/0.png", "val/dog/0.png", "val/Cat/0.png",
           "val/ant/0.png", "val/ant/1.png")
    source = open_data(tmp_path, "val")
    assert contents(source) == [("dog/0.png", "dog")] and source.classes == ["cat", "dog"]
    out = capsys.readouterr().out
    assert "3 images are left out" in out and "Cat/0.png" in out
    assert "1 of 2 classes have no image here (cat)" in out


@pytest.mark.parametrize("names, command", [
    (("training/cat/0.png", "validation/cat/0.png", "test/cat/0.png"),
     "--data .*training --val-data .*validation"),
    (("Training/cat/0.png", "Testing/cat/0.png"), "--data .*Training --val-data .*Testing"),
    (("seg_train/cat/0.png", "seg_test/cat/0.png"), "--data .*seg_train --val-data .*seg_test"),
    (("train2017/0.png", "val2017/0.png"), "look like splits"),
    (("TrainingSet/cat/0.png",), "look like splits"),
    (("cat/train/0.png", "cat/test/0.png", "dog/train/0.png"), "class folder cat contains"),
    (("imagenet/train/cat/0.png", "imagenet/val/cat/0.png"), "--data .*imagenet"),
    (("images/train/0.png", "images/val/0.png", "labels/0.png"), "class folder images contains")])
def test_splits_under_other_names_are_not_taken_for_classes(tmp_path, names, command):
    with pytest.raises(ValueError, match=command):
        open_data(images(tmp_path, *names))


def test_a_missing_split_names_the_folder_that_may_be_it(tmp_path):
    images(tmp_path, "train/cat/0.png", "valid/cat/0.png")
    assert len(open_data(tmp_path)) == 1
    with pytest.raises(ValueError, match="no val/ folder; the folder valid looks like one"):
        open_data(tmp_path, "val")


def test_classes_whose_names_contain_train_or_test_are_classes(tmp_path):
    images(tmp_path, "bullet_train/0.png", "crash_test/0.png", "Train/0.png", "invalid/0.png")
    assert open_data(tmp_path).classes == ["Train", "bullet train", "crash test", "invalid"]


@pytest.mark.parametrize("inner", ["", "lot1/"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_class_called_train_or_val_is_refused_with_the_reason(tmp_path, inner, split):
    images(tmp_path, *(f"{name}/{inner}{i}.png" for name in ("bus", "car", split) for i in (0, 1)))
    for asked in ("train", "val"):
        with pytest.raises(ValueError, match=rf"\(bus, car\)\. A folder called {split} is taken"):
            open_data(tmp_path, asked, whole=True)


def test_folders_with_images_beside_the_splits_are_named(tmp_path, capsys):
    images(tmp_path, "train/cat/0.png", "val/cat/0.png", "raw/0.png", "docs/figure/0.png")
    assert len(open_data(tmp_path)) == 1
    assert "2 folders with images are beside train and val and are not used (docs, raw)" in (
        capsys.readouterr().out)


def test_a_class_called_train_within_train_is_a_class(tmp_path):
    images(tmp_path, "train/bus/0.png", "train/train/0.png", "val/train/0.png")
    assert open_data(tmp_path).classes == open_data(tmp_path, "val").classes == ["bus", "train"]


def test_linked_folders_within_a_class_are_read_once_and_circles_are_named(tmp_path, capsys):
    images(tmp_path, "store/more/b.png", "store/more/deep/c.png", "data/dog/a.png",
           "data/dog/own/d.png", "data/cat/a.png")
    dog = tmp_path / "data" / "dog"
    (dog / "linked").symlink_to(tmp_path / "store" / "more")
    (dog / "own" / "linked").symlink_to(tmp_path / "store" / "more")     # the same images again
    (dog / "circle").symlink_to(dog)
    (dog / "up").symlink_to(tmp_path / "data")
    (tmp_path / "store" / "more" / "deep" / "back").symlink_to(tmp_path / "store")
    (dog / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "data" / "ant").symlink_to(tmp_path / "unmounted")
    source = open_data(tmp_path / "data")
    assert [name for name, _ in contents(source)] == [
        "cat/a.png", "dog/a.png", "dog/linked/b.png", "dog/linked/deep/c.png", "dog/own/d.png"]
    out = capsys.readouterr().out
    assert "4 links are not followed" in out and "dog/circle, dog/up" in out
    assert "2 links lead nowhere (ant, dog/gone)" in out


def test_a_data_set_whose_linked_folders_are_gone_is_refused_with_their_names(tmp_path):
    (tmp_path / "train").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).symlink_to(tmp_path / "unmounted" / name)
    with pytest.raises(ValueError, match=r"2 links lead nowhere \(cat, dog\)"):
        open_data(tmp_path)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch, capsys):
    images(tmp_path, "cat/0.png", "dog/0.png", "dog/private/1.png")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("private"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)
    monkeypatch.setattr(os, "scandir", refuse)
    assert len(open_data(tmp_path)) == 2
    assert "1 folders cannot be read (dog/private)" in capsys.readouterr().out


def test_numbered_folders_of_images_with_captions_are_refused(tmp_path):
    names = [f"{shard}/{shard}{i}" for shard in ("00000", "00001") for i in range(3)]
    images(tmp_path, *(f"{name}.png" for name in names))
    for k, suffix in enumerate(("txt", "json")):
        (tmp_path / f"{names[k]}.{suffix}").write_text("a yellow cab")
    with pytest.raises(ValueError, match=r"2 images have a text .* tars only.*00000\.tar"):
        open_data(tmp_path)


def test_captions_beside_images_in_named_folders_are_counted(tmp_path, capsys):
    images(tmp_path, "cat/0.png", "cat/1.png", "dog/0.png")
    for name in ("cat/0.txt", "cat/1.json", "cat/notes.txt"):
        (tmp_path / name).write_text("text")
    assert len(open_data(tmp_path)) == 3
    assert "2 images have a text of the same name beside them" in capsys.readouterr().out


@pytest.mark.parametrize("junk", ["__MACOSX/cat/._0.png", "lost+found", "@eaDir/cat/thumb.png",
                                  "$RECYCLE.BIN/0.png", "cat/@eaDir/0.png", "nothing"])
def test_folders_of_the_system_and_folders_without_images_are_no_classes(tmp_path, junk, capsys):
    images(tmp_path, "cat/0.png", "dog/0.png")
    if junk.endswith(".png"):
        images(tmp_path, junk)
    else:
        (tmp_path / junk).mkdir()
    source = open_data(tmp_path)
    assert source.classes == ["cat", "dog"] and len(source) == 2
    assert junk.split("/")[0] in capsys.readouterr().out


def test_names_in_two_unicode_forms_are_one_class(tmp_path, capsys):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    images(tmp_path, f"train/{decomposed}/0.png", "train/tea/0.png", f"val/{composed}/0.png",
           "val/tea/0.png")
    (tmp_path / "classnames.txt").write_text(f"{composed}\ta cup of coffee\n", "utf-8")
    for split in ("train", "val"):
        source = open_data(tmp_path, split)
        assert source.classes == ["a cup of coffee", "tea"] and list(source.labels) == [0, 1]
    images(tmp_path, f"val/{decomposed}/1.png")
    assert list(open_data(tmp_path, "val").labels) == [0, 0, 1]
    assert "in another Unicode form" in capsys.readouterr().out


def test_a_single_class_is_named_and_its_folders_are_suggested(tmp_path, capsys):
    open_data(images(tmp_path, "faces/ann/0.png", "faces/bob/0.png"))
    out = capsys.readouterr().out
    assert "only one class, faces" in out and f"--data {tmp_path / 'faces'}" in out


@pytest.mark.parametrize("text", [
    "c0 tench, Tinca tinca\nc1 goldfish\n", "c0,tench\nc1,goldfish\n", "tench\tc0\n", "",
    "0\ttench\n1\tgoldfish\n", "version https://git-lfs.github.com/spec/v1\nsize 9\n", "c0\t\n"])
def test_a_classnames_txt_that_names_no_class_is_refused(tmp_path, text):
    images(tmp_path, "c0/0.png", "c1/0.png")
    (tmp_path / "classnames.txt").write_text(text)
    with pytest.raises(ValueError, match="classnames.txt.*wanted lines of folder, TAB, name"):
        open_data(tmp_path)


def test_lines_of_classnames_txt_without_a_tab_are_counted(tmp_path, capsys):
    images(tmp_path, "c0/0.png", "c1/0.png")
    (tmp_path / "classnames.txt").write_text("c0\ttench\nc1 goldfish\n")
    assert open_data(tmp_path).classes == ["tench", "c1"]
    assert "1 of 2 lines have no TAB" in capsys.readouterr().out


# ---------------------------------------------------------------- tars
def test_shards_give_each_image_its_own_caption_and_count_what_is_incomplete(tmp_path, capsys):
    images = [noise(20, i) for i in range(5)]
    members = {}
    for i in range(3):
        members |= {f"{i}.png": png(images[i]), f"{i}.txt": f"number {i}\n".encode()}
    tar_of(tmp_path / "x-00.tar", members)
    tar_of(tmp_path / "x-01.tar", {
        "a/3.json": json.dumps({"caption": "number 3"}).encode(), "a/3.png": png(images[3]),
        "4.png": png(images[4]), "5.txt": b"lonely"})
    source = open_data(str(tmp_path / "x-{00..01}.tar"))
    assert len(source) == 4 and source.classes is None
    assert "2 of 6 samples are skipped" in capsys.readouterr().out
    for i in range(4):
        image, caption, label = source.load(i)
        assert caption == f"number {i}" and label == -1 and np.array_equal(image, images[i])
    assert len(open_data(str(tmp_path / "x-*.tar"))) == 4
    assert source.name(3).endswith("x-01.tar:a/3.png")


def test_patterns_without_a_file_and_files_that_are_not_tars_raise(tmp_path):
    tar_of(tmp_path / "x-0.tar", {"1.png": png(noise()), "1.txt": b"one"})
    for spec, reason in (("y-*.tar", "No such file"), ("x-{1..2}.tar", "x-1.tar"),
                         ("z.tar", "z.tar")):
        with pytest.raises(ValueError, match=reason):
            open_data(str(tmp_path / spec))
    (tmp_path / "bad.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(ValueError, match="cannot be read"):
        open_data(str(tmp_path / "bad.tar"))
    with pytest.raises(ValueError, match="holds no pairs"):
        open_data(tar_of(tmp_path / "w.tar", {"1.png": png(noise())}))
    with pytest.raises(ValueError, match="--val-data"):
        open_data(str(tmp_path / "x-0.tar"), "val")
    assert len(open_data(str(tmp_path / "x-0.tar"), "val", whole=True)) == 1


def test_every_color_mode_becomes_rgb_and_transparency_becomes_white(tmp_path):
    def read(image, name="x.png"):
        image.save(tmp_path / name)
        return read_image(tmp_path / name).getpixel((0, 0))
    assert read(Image.new("L", (4, 4), 77)) == (77, 77, 77)
    assert read(Image.new("RGBA", (4, 4), (0, 0, 0, 0))) == (255, 255, 255)
    assert read(Image.new("RGBA", (4, 4), (255, 0, 0, 128))) == (255, 127, 127)
    palette = Image.new("RGB", (4, 4), (9, 8, 7)).convert("P", palette=Image.ADAPTIVE)
    assert read(palette) == (9, 8, 7)
    assert read(Image.fromarray(np.full((4, 4), 128 * 257, np.uint16))) == (128, 128, 128)
    assert min(read(Image.new("CMYK", (4, 4), (0, 0, 0, 0)), "x.jpg")) > 250


def test_an_image_stored_sideways_is_turned_upright(tmp_path):
    image, exif = noise(8, width=12), Image.Exif()
    exif[0x0112] = 6                                              # stored rotated by 90 degrees
    image.save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "x.png"), image.transpose(Image.ROTATE_270))


def test_a_tar_is_indexed_once_and_again_only_when_it_has_changed(
        tmp_path, cache, monkeypatch, capsys):
    tar = tar_of(tmp_path / "x.tar", {"1.png": png(noise()), "1.txt": b"one"})
    indexed, index_tar = [], shards.index_tar

    def counted(path):
        indexed.append(path)
        return index_tar(path)
    monkeypatch.setattr(shards, "index_tar", counted)
    assert open_data(tar).load(0)[1] == open_data(tar).load(0)[1] == "one" and indexed == [tar]
    assert capsys.readouterr().out.count("indexed 1 of 1 tars") == 1
    assert [f.suffix for f in cache.iterdir()] == [".index"]
    tar_of(tmp_path / "x.tar", {"1.png": png(noise()), "1.txt": b"uno",
                                "2.png": png(noise()), "2.txt": b"due"})
    assert [open_data(tar).load(i)[1] for i in range(2)] == ["uno", "due"] and len(indexed) == 2
    assert sorted(f.name for f in tmp_path.iterdir()) == ["x.tar"]    # nothing else is written


@pytest.mark.parametrize("damage", [
    lambda content: b"", lambda content: content[:30], lambda content: content[:-20],
    lambda content: content[:-40] + bytes(40), lambda content: bytes(len(content)),
    lambda content: b"version https://git-lfs.github.com/spec/v1\n", lambda content: b"[1]\n",
    lambda content: b'{"samples": "many"}\n' + content])
def test_a_damaged_index_is_made_again(tmp_path, cache, damage):
    tar = tar_of(tmp_path / "x.tar", {f"{i}.{suffix}": content for i in range(8)
                                      for suffix, content in (("png", png(noise(8, i))),
                                                              ("txt", f"number {i}".encode()))})
    assert len(open_data(tar)) == 8
    file, = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    source = open_data(tar)
    assert [source.load(i)[1] for i in range(8)] == [f"number {i}" for i in range(8)]
    assert file.read_bytes() == whole and [*cache.iterdir()] == [file]


def test_names_with_dots_are_pairs_and_further_parts_of_a_sample_are_not_missed(tmp_path, capsys):
    members = {}
    for key in ("frame.0001", "frame.0002", "a.b/v1.2 x", "plain"):
        members |= {f"{key}.png": png(noise(8)), f"{key}.txt": key.encode()}
    source = open_data(tar_of(tmp_path / "x.tar", members | {"plain.seg.png": png(noise(8))}))
    assert [source.load(i)[1] for i in range(4)] == ["frame.0001", "frame.0002", "a.b/v1.2 x",
                                                     "plain"]
    assert "skipped" not in capsys.readouterr().out
    lonely = {f"IMG.{i}.png": png(noise(8)) for i in range(30)}
    assert len(open_data(tar_of(tmp_path / "y.tar", members | lonely))) == 4
    assert "30 of 34 samples are skipped" in capsys.readouterr().out
    with pytest.raises(ValueError, match="IMG.0 has no caption.*up to its last dot"):
        open_data(tar_of(tmp_path / "z.tar", lonely | {"IMG.txt": b"one for all"}))


@pytest.mark.parametrize("folder", ["~/cache", "~nobody-has-this-name/cache", ""])
def test_without_a_home_the_index_is_kept_in_a_temporary_folder(
        tmp_path, monkeypatch, folder, capsys):
    monkeypatch.setenv("VTP_CACHE", folder)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])       # KeyError, as for unknown users
    tar = tar_of(tmp_path / "x.tar", {"1.png": png(noise()), "1.txt": b"one"})
    assert len(open_data(tar)) == 1
    assert "set VTP_CACHE=DIR" in capsys.readouterr().out
    monkeypatch.setenv("VTP_WEIGHTS", folder)
    with pytest.raises(FileNotFoundError, match="vgg16-397923af.pth is missing"):
        weights.find("vgg")


def test_ranks_start_to_index_at_different_tars_and_all_find_the_same(tmp_path, monkeypatch):
    for n in range(9):                                # from 8 tars on, workers index them
        members = {}
        for i in range(n + 1):
            members |= {f"{i}.png": png(noise(8, i)), f"{i}.txt": f"{n} {i}".encode()}
        tar_of(tmp_path / f"x-{n}.tar", members)
    wanted = [f"{n} {i}" for n in range(9) for i in range(n + 1)]
    monkeypatch.setattr(shards, "world_size", lambda: 3)
    for r in range(3):
        monkeypatch.setattr(shards, "rank", lambda: r)
        source = open_data(str(tmp_path / "x-{0..8}.tar"))
        assert [source.load(i)[1] for i in range(len(source))] == wanted


# ---------------------------------------------------------------- views
def test_adm_crop_is_exact():
    for c in (0, 2):
        crop = adm_crop(Image.fromarray(GOLDEN[f"crop{c}.in"]), int(GOLDEN[f"crop{c}.size"]))
        assert np.array_equal(crop, GOLDEN[f"crop{c}.out"])


@pytest.mark.skipif("VTP_GOLDEN" not in os.environ,
                    reason="set VTP_GOLDEN to the folder with units.npz to check every stored crop")
def test_adm_crop_is_exact_on_the_full_set():
    units = np.load(Path(os.environ["VTP_GOLDEN"]) / "units.npz")
    for c in range(4):
        crop = adm_crop(Image.fromarray(units[f"crop{c}.in"]), int(units[f"crop{c}.size"]))
        assert np.array_equal(crop, units[f"crop{c}.out"])


def test_random_crops_have_the_documented_area_and_aspect_and_reach_every_corner(monkeypatch):
    y, x = np.mgrid[:300, :400]                                   # each pixel encodes its position
    atlas = np.stack([x % 256, y % 256, x // 256 + 2 * (y // 256)], -1).astype(np.uint8)
    corners, rng = [], np.random.default_rng(0)

    def keep_corners(crop, *_, **__):
        corners.append(crop[0, :, [0, -1], [0, -1]].int())        # first and last pixel
        return crop
    monkeypatch.setattr(augment, "interpolate", keep_corners)
    for _ in range(2000):
        random_crop(rng, atlas, 32, (0.05, 0.32))
    r, g, b = torch.stack(corners, 1).numpy()                     # (2000, 2) each
    (x0, x1), (y0, y1) = (r + 256 * (b % 2)).T, (g + 256 * (b // 2)).T
    w, h = x1 + 1 - x0, y1 + 1 - y0
    share, aspect = w * h / (400 * 300), w / h
    assert share.min() > 0.048 and share.max() < 0.325 and abs(share.mean() - 0.185) < 0.01
    assert aspect.min() > 0.73 and aspect.max() < 1.37 and abs(np.log(aspect).mean()) < 0.01
    assert x0.min() < 5 and y0.min() < 5 and x1.max() > 394 and y1.max() > 294


@pytest.mark.parametrize("side", [24, 64, 150])
def test_a_crop_is_pillows_bicubic_to_the_rounding_of_its_two_passes(side, monkeypatch):
    image = noise(70, width=90).point(lambda v: 80 + v * 3 // 8)
    crops, interpolate = [], torch.nn.functional.interpolate

    def keep_crop(crop, *args, **kw):
        crops.append(crop[0].permute(1, 2, 0).numpy())
        return interpolate(crop, *args, **kw)
    monkeypatch.setattr(augment, "interpolate", keep_crop)
    for i in range(20):
        ours = random_crop(np.random.default_rng(i), image, side, (0.05, 1))
        theirs = Image.fromarray(crops[i]).resize((side, side), Image.BICUBIC)
        difference = np.abs(ours - np.asarray(theirs).transpose(2, 0, 1).astype(int))
        assert difference.max() <= 2 and difference.mean() < 0.5


def make_images():
    """-> (6, 3, 20, 20) float32: a gray image, one with 8 saturated colors, 4 with random colors"""
    x = np.random.default_rng(1).integers(0, 256, (6, 3, 20, 20)).astype(np.float32)
    x[0], x[1] = x[0, :1], np.where(x[1] > 100, 255, 0)
    return x


IMAGES = make_images()

TORCHVISION = {                                                   # for x in [0, 1]
    augment.brightness: F.adjust_brightness, augment.contrast: F.adjust_contrast,
    augment.saturation: F.adjust_saturation, augment.hue: F.adjust_hue,
    augment.gaussian_blur: lambda x, sigma: F.gaussian_blur(x, [9, 9], [sigma, sigma])}


@pytest.mark.parametrize("operation, amounts", [
    (augment.brightness, [0.6, 0.8, 1, 1.1, 1.3, 1.4]),
    (augment.contrast, [0.6, 0.8, 1, 1.1, 1.3, 1.4]),
    (augment.saturation, [0.8, 0.9, 1, 1.1, 1.2, 0]),
    (augment.hue, [-0.1, 0.1, 0.05, 0.5, -0.3, 0]),
    (augment.gaussian_blur, [0.1, 0.4, 0.7, 1, 1.5, 2])])
def test_a_color_operation_equals_torchvisions_for_any_amount(operation, amounts):
    for x, amount in zip(IMAGES, amounts):
        wanted = 255 * TORCHVISION[operation](torch.from_numpy(x) / 255, amount).numpy()
        # of 255 levels; torchvision's weight for red is 0.2989, ours is 0.299
        assert np.abs(operation(x, np.float32(amount)) - wanted).max() < 0.05


def test_grayscale_and_solarize_equal_torchvisions():
    for x in IMAGES:
        gray = 255 * F.rgb_to_grayscale(torch.from_numpy(x) / 255, 3).numpy()
        solar = 255 * F.solarize(torch.from_numpy(x) / 255, 128 / 255).numpy()
        assert np.abs(augment.grayscale(x) - gray).max() < 0.05
        assert np.abs(augment.solarize(x) - solar).max() < 0.05


def test_a_view_is_torchvisions_recipe_with_one_rounding_at_the_end():
    for i in range(60):
        ours = ssl_view(np.random.default_rng(i), noise(40, i), 24, (0.32, 1), 0.5, 0.2)
        rng = np.random.default_rng(i)
        x = torch.from_numpy(random_crop(rng, noise(40, i), 24, (0.32, 1))) / 255
        if rng.random() < 0.5:
            x = x.flip(-1)
        for operation, amount in filter(None, fast_views.draw_operations(rng, 0.5, 0.2)):
            if operation is fast_views.grayscale:
                x = F.rgb_to_grayscale(x, 3)
            elif operation is fast_views.solarize:
                x = F.solarize(x, 127.5 / 255)
            else:
                x = TORCHVISION[operation](x, amount)
        difference = np.abs(ours - 255 * x.numpy())
        # half a level; solarize may invert a pixel near its threshold in one of the two only
        assert (difference > 0.6).mean() < 0.002


def test_a_third_of_the_hue_circle_permutes_the_channels_and_grays_have_no_hue():
    for x in IMAGES:
        assert np.abs(augment.hue(x, np.float32(1 / 3)) - x[[2, 0, 1]]).max() < 1e-3
    assert np.abs(augment.hue(IMAGES[0], np.float32(0.1)) - IMAGES[0]).max() == 0


def view_jobs(sides):
    jobs = []
    for i, side in enumerate(sides):
        recipe = VIEWS[["local", "global 1", "global 2"][i % 3]]
        jobs.append((np.random.default_rng(i), np.asarray(noise(40, i)), side, recipe))
    return jobs


@pytest.mark.parametrize("sides", [[24], [24] * 40, [24, 24, 12, 24, 12] * 5, [90] * 23, []])
def test_the_fast_views_equal_the_plain_ones_in_every_bit(sides):
    plain, fast = augment.ssl_views(view_jobs(sides)), fast_views.ssl_views(view_jobs(sides))
    assert len(plain) == len(fast) == len(sides)
    for a, b in zip(plain, fast):
        assert a.dtype == b.dtype == np.uint8 and np.array_equal(a, b)


def test_views_of_one_image_draw_from_one_generator_in_order():
    def jobs():
        rng, image = np.random.default_rng(0), np.asarray(noise())
        return [(rng, image, side, VIEWS["local"]) for side in (16, 8, 16)]
    rng = np.random.default_rng(0)
    wanted = [ssl_view(rng, noise(), side, *VIEWS["local"]) for side in (16, 8, 16)]
    for views in (augment.ssl_views(jobs()), fast_views.ssl_views(jobs())):
        assert all(np.array_equal(a, b) for a, b in zip(views, wanted, strict=True))


@pytest.mark.parametrize("name", VIEWS)
def test_operations_occur_as_often_as_the_recipe_says_and_global_1_is_never_blurred(name):
    _, p_blur, p_solarize = VIEWS[name]
    draws = [fast_views.draw_operations(np.random.default_rng(i), p_blur, p_solarize)
             for i in range(400)]
    for place, p in ((0, 0.8), (3, 0.8), (4, 0.2), (5, p_blur), (6, p_solarize)):
        found = np.mean([draw[place] is not None for draw in draws])
        assert abs(found - p) <= 4 * math.sqrt(p * (1 - p) / 400), place
    for operation, low, high in augment.COLOR_JITTER:
        places, amounts = [], []
        for draw in draws:
            for place in range(4):
                if draw[place] and draw[place][0] is operation:
                    places.append(place)
                    amounts.append(draw[place][1])
        assert min(amounts) >= low and max(amounts) <= high
        assert abs(np.mean(places) - 1.5) < 0.3                   # the order is random


def test_normalize_and_denormalize_are_inverse():
    x = torch.randint(0, 256, (2, 5, 3, 4, 4), dtype=torch.uint8)
    assert torch.allclose(denormalize(normalize(x)) * 255, x.float(), atol=1e-4)
    mean = (augment.MEAN * 255).round().to(torch.uint8).expand(3, 2, 2)
    assert normalize(mean).abs().max() < 0.01


# ---------------------------------------------------------------- masks
@pytest.mark.parametrize("case", ["masks", "fixed"])
def test_mask_index_and_weight_are_dinov2s(case):
    mask = torch.from_numpy(GOLDEN[f"{case}.collated_masks"])
    index, weight = mask_index_and_weight(mask)
    assert np.array_equal(index, GOLDEN[f"{case}.mask_indices_list"])
    assert np.array_equal(weight, GOLDEN[f"{case}.masks_weight"])


def test_every_masked_crop_has_weight_one():
    mask = torch.from_numpy(batch_masks(0, 0, 16, 8, 8))
    assert math.isclose(mask_index_and_weight(mask)[1].sum(), 8, rel_tol=1e-6)


@pytest.mark.parametrize("grid, target, mean, exact", [
    (14, 19, 18.896, 0.896), (14, 98, 97.922, 0.925), (16, 76, 75.937, 0.939)])
def test_block_masks_reach_their_target_as_often_as_those_of_dinov2(grid, target, mean, exact):
    counts = [block_mask(np.random.default_rng(i), grid, grid, target).sum() for i in range(600)]
    counts = np.array(counts)
    assert counts.max() == target and counts.min() >= target - 6
    assert abs(counts.mean() - mean) < 0.06                       # four standard errors
    assert abs((counts == target).mean() - exact) < 0.05


def test_half_of_the_crops_are_masked_by_evenly_spread_ratios():
    ratios = batch_masks(0, 5, 64, 16, 16).mean(1)
    masked = np.sort(ratios[ratios > 0])
    assert len(masked) == 32
    assert np.abs(masked - np.linspace(0.1, 0.5, 65)[1::2]).max() < 0.03
    assert (ratios[:32] > 0).sum() not in (0, 32)                 # both groups of crops have masks


def test_a_rank_draws_its_own_rows_of_the_global_batchs_masks():
    whole = batch_masks(1, 2, 12, 6, 6)
    assert np.array_equal(whole[[3, 9]], batch_masks(1, 2, 12, 6, 6, rows=[3, 9]))


def test_small_grids_are_masked_too():
    assert block_mask(np.random.default_rng(0), 4, 4, 8).sum() > 0
    assert not block_mask(np.random.default_rng(0), 4, 4, 0).any()


# ---------------------------------------------------------------- stochastic depth
def test_kept_rows_of_two_processes_are_those_of_one():
    rows = np.arange(12)
    whole = kept_rows(0.3, 3, rows, 12, 5, 9, 1)
    halves = [kept_rows(0.3, 3, rows[r::2], 12, 5, 9, 1) for r in range(2)]
    for block in range(3):
        for branch in range(2):
            wanted, scale = whole[block][branch]
            assert len(wanted) == 8 and scale == 12 / 8
            found = []
            for r in range(2):
                positions, same_scale = halves[r][block][branch]
                assert same_scale == scale
                found += rows[r::2][positions.numpy()].tolist()
            assert sorted(found) == wanted.tolist()


def test_every_rate_keeps_at_least_one_row_and_rate_0_needs_no_draw():
    (positions, scale), _ = kept_rows(0.99, 1, range(10), 10, 0, 0, 0)[0]
    assert len(positions) == 1 and scale == 10
    assert kept_rows(0.0, 4, range(10), 10, 0, 0, 0) is None


DROP = dict(drop_clip=0.5, drop_rec=0.5, drop_ssl=0.5, depth=2)


def kept_numbers(batches, step):
    """{name: for each branch, the kept rows' numbers in the global batch}"""
    keep, found = batches[step].keep, {}
    image_rows = np.array(batches.rank_rows(batches.batch))
    rec_rows = np.array(batches.rank_rows(batches.batch_rec))
    ssl_rows = np.array(batches.rank_rows(batches.batch_ssl)) // 2
    numbers = {"image": image_rows, "rec": rec_rows,
               "ssl": np.concatenate([ssl_rows + 4 * g for g in range(2)]),
               "local": np.concatenate([ssl_rows + 4 * v for v in range(3)])}
    for name, blocks in keep.items():
        kept = [rows.numpy() for pairs in blocks for rows, _ in pairs]
        found[name] = [numbers[name][rows].tolist() for rows in kept]
    return found


def test_stochastic_depth_is_drawn_over_the_global_batch_for_each_objective():
    changes = DROP | {"drop_rec": 0.3}
    whole = kept_numbers(train_batches(**changes), 5)
    halves = [kept_numbers(train_batches(**changes, rank=r, world_size=2), 5) for r in range(2)]
    assert whole.keys() == {"image", "rec", "ssl", "local"}
    for name, branches in whole.items():
        for k, numbers in enumerate(branches):
            assert sorted(halves[0][name][k] + halves[1][name][k]) == sorted(numbers), name
    for name, kept in (("image", 4), ("rec", 1), ("ssl", 4), ("local", 6)):
        assert {len(numbers) for numbers in whole[name]} == {kept}, name
    drawn = [tuple(numbers) for numbers in whole["image"] + whole["ssl"]]
    assert len(set(drawn)) > 4                                    # objectives draw independently
    assert kept_numbers(train_batches(**changes), 6) != whole     # and so do steps


def test_reconstruction_draws_kept_rows_only_if_its_rate_differs_from_that_of_clip():
    assert "rec" not in train_batches(**DROP)[0].keep
    assert train_batches(**DROP | {"drop_rec": 0.0})[0].keep["rec"] is None
    alone = train_batches(**DROP, clip=False, ssl=False)[0].keep
    assert len(alone["image"]) == 2 and alone["ssl"] is None and "rec" not in alone
    none = train_batches()[0].keep
    assert none == dict.fromkeys(("image", "ssl", "local"))


# ---------------------------------------------------------------- batches
def test_a_batch_has_the_documented_shapes():
    out = train_batches()[0]
    assert out.image.shape == (8, 3, 32, 32) and out.image.dtype == torch.uint8
    assert out.crops.shape == (2, 4, 3, 32, 32) and out.locals.shape == (3, 4, 3, 16, 16)
    assert out.mask.shape == (2, 4, 16) and out.mask.dtype == torch.bool and out.n_crops == 8
    assert out.rec.tolist() == [0, 4] and out.rows_image.tolist() == list(range(8))
    assert out.rows_ssl.tolist() == [0, 2, 4, 6] and out.bad == []
    assert out.text.shape == (8, min(77, max(map(len, out.captions))))


def test_mask_index_and_weight_of_a_batch_belong_to_its_mask():
    for step in range(3):
        out = train_batches()[step]
        masked = torch.zeros(2 * 4 * 16, dtype=torch.bool)
        masked[out.mask_index] = True
        assert torch.equal(masked.view(2, 4, 16), out.mask)
        per_crop = torch.zeros(8).index_add(0, out.mask_index // 16, out.mask_weight)
        assert torch.allclose(per_crop, out.mask.flatten(0, 1).any(1).float())


def test_to_device_normalises_images_and_leaves_row_numbers_on_the_cpu():
    out = train_batches(**DROP)[0]
    moved = out.to(torch.device("cpu"))
    assert torch.equal(moved.image, normalize(out.image)) and moved.locals.dtype == torch.float32
    assert torch.equal(moved.mask, out.mask) and moved.captions == out.captions
    assert str(moved.keep) == str(out.keep)
    meta = out.to(torch.device("meta"))
    assert meta.crops.is_meta and meta.mask_index.is_meta and not meta.rows_ssl.is_meta
    (rows, scale), _ = meta.keep["ssl"][1]
    assert rows.is_meta and scale == 2
    torch.set_default_dtype(torch.float64)
    try:
        assert out.to(torch.device("cpu")).crops.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_batches_of_two_ranks_together_equal_the_batch_of_one_process():
    whole, halves = train_batches()[4], [train_batches(rank=r, world_size=2)[4] for r in range(2)]
    axes = dict(image=0, rows_image=0, crops=1, locals=1, mask=1, rows_ssl=0)
    for name, axis in axes.items():
        parts = [getattr(half, name) for half in halves]
        assert torch.equal(getattr(whole, name), torch.cat(parts, axis)), name
    assert whole.captions == halves[0].captions + halves[1].captions
    # rows 0 and 4 of the global batch, as positions on each rank
    assert [half.rec.tolist() for half in halves] == [[0], [0]]


def test_workers_change_nothing_and_the_callers_random_state_is_untouched():
    before = torch.get_rng_state()
    without = list(prefetch(train_batches(**DROP), 2, 5))
    with_workers = list(prefetch(train_batches(**DROP), 2, 5, workers=2))
    assert len(without) == len(with_workers) == 3
    assert torch.equal(before, torch.get_rng_state())
    for a, b in zip(without, with_workers):
        assert_same(a, b)
    assert not torch.equal(without[0].image, without[1].image)


def test_a_pickled_batch_is_the_same_batch():
    out = train_batches(**DROP)[0]
    copy = pickle.loads(pickle.dumps(out))
    assert_same(out, copy)
    assert torch.is_tensor(out.keep["ssl"][0][0][0]) and torch.is_tensor(copy.keep["ssl"][0][0][0])


def test_workers_use_the_form_of_ssl_views_that_is_installed(monkeypatch):
    def white_views(jobs):
        return [np.full((3, side, side), 255, np.uint8) for _, _, side, _ in jobs]
    monkeypatch.setattr(augment, "ssl_views", white_views)
    out, = prefetch(train_batches(), 0, 1, workers=1)
    assert (out.crops == 255).all() and (out.locals == 255).all()


def test_views_computed_in_groups_are_all_there(monkeypatch):
    whole = train_batches()[2]
    monkeypatch.setattr(data, "VIEWS_AT_ONCE", 7)                 # two images of 5 views
    assert_same(train_batches()[2], whole)


def test_a_worker_that_receives_signals_still_loads_the_remaining_batches():
    stream = prefetch(train_batches(), 0, 12, workers=1)
    first, (worker,) = next(stream), multiprocessing.active_children()
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        os.kill(worker.pid, number)
    assert len(list(stream)) == 11 and first.bad == []


def test_turning_a_loss_off_changes_nothing_for_the_others_and_loads_only_what_is_used():
    full = train_batches()[1]
    rec = train_batches(clip=False, ssl=False)[1]
    ssl = train_batches(clip=False, rec=False)[1]
    assert torch.equal(rec.image, full.image[full.rec])
    assert rec.rec.tolist() == [0, 1] and rec.rows_image.tolist() == [0, 4]
    assert torch.equal(ssl.crops, full.crops) and torch.equal(ssl.mask, full.mask)
    assert rec.text is None and rec.crops is None and rec.mask_index is None
    assert ssl.image is None and ssl.rec is None


def test_images_per_step_counts_each_image_once():
    assert train_batches().images_per_step == 8
    assert train_batches(clip=False).images_per_step == 4         # rec's rows are among ssl's
    assert train_batches(clip=False, ssl=False).images_per_step == 2


class Recorder:
    """A source that records which of its images are loaded"""
    endless, spec = False, ""

    def __init__(self, source):
        self.source, self.seen = source, []

    def __len__(self):
        return len(self.source)

    def load(self, index, rng):
        self.seen.append(index)
        return self.source.load(index, rng)


def test_an_epoch_contains_every_image_once(tmp_path):
    source = Recorder(open_data(folder(tmp_path)))
    batches = train_batches(source, ssl=False, batch=4)
    for step in range(6):
        batches[step]
    first, second = source.seen[:12], source.seen[12:]
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second and second != list(range(12))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 64, 65, 1000, 4097])
def test_a_computed_order_is_a_permutation_and_another_one_in_each_epoch(n):
    first, second = ([feistel_permutation(3, e, n, k) for k in range(n)] for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(n))
    assert n < 16 or first != second


def test_each_seed_and_each_epoch_has_a_different_computed_order():
    first = set()
    for seed in range(20):
        first |= {feistel_permutation(seed, epoch, 10 ** 9, 7) for epoch in range(20)}
    # two of 400 random numbers below a billion are equal with probability 1 / 12,000
    assert len(first) >= 399


def test_a_computed_order_is_as_random_as_a_stored_one():
    n, m = 3 * data.MAX_STORED_PERMUTATION, 4000
    for stride in (1, n // m):                                    # near and far positions
        x = np.array([data.epoch_index(5, 2, n, stride * k) for k in range(m)])
        y = np.array([data.epoch_index(5, 3, n, stride * k) for k in range(m)])
        limit = 4 / math.sqrt(m)       # four standard errors of independent numbers' correlation
        k = np.arange(m)
        for a, b in ((x, k), (x[1:], x[:-1]), (x % 2, k % 2), (x, y)):
            assert abs(np.corrcoef(a, b)[0, 1]) < limit
        counts = np.bincount(x * 20 // n, minlength=20)
        chi_square = ((counts - m / 20) ** 2 / (m / 20)).sum()
        assert chi_square < 50         # 19 degrees of freedom: above 50 once in 7,000 draws
        assert len(set(x.tolist())) == m and len(set((x % 7).tolist())) == 7


def test_small_sources_have_a_stored_order_and_large_ones_a_computed_one():
    assert [data.epoch_index(1, 0, 10, k) for k in range(10)] == permutation(1, 0, 10).tolist()
    n = 277_000_000
    assert data.epoch_index(1, 0, n, 5) == feistel_permutation(1, 0, n, 5) < n


def test_a_damaged_image_is_reported_and_all_ranks_replace_it_by_the_same_one(tmp_path):
    root = folder(tmp_path)
    damaged = root / "train" / "red_fox" / "3.JPEG"
    damaged.write_bytes(damaged.read_bytes()[:300])
    whole = [train_batches(open_data(root))[step] for step in range(3)]
    names = [name for out in whole for name in out.bad]
    assert names and all(name.startswith(str(damaged)) for name in names)
    assert all(len(out.image) == 8 for out in whole)
    parts = [train_batches(open_data(root), rank=r, world_size=2)[0].image for r in range(2)]
    assert torch.equal(whole[0].image, torch.cat(parts))


def test_a_source_that_no_longer_exists_stops_training_with_an_error(tmp_path):
    source = open_data(folder(tmp_path))
    source.root = tmp_path / "gone"
    with pytest.raises(ValueError, match="100 samples in a row"):
        train_batches(source)[0]


@pytest.mark.parametrize("changes, advice", [
    (dict(image=36), "--image 32"), (dict(local_image=12), "--local-image 16"),
    (dict(batch=1), "--batch 2"), (dict(batch=10), "--batch 8"),
    (dict(batch_ssl=3, batch=9, world_size=2), "--batch-ssl 4"),
    (dict(batch_rec=16), "--batch 16"),
    (dict(batch=6, batch_ssl=4, batch_rec=4, world_size=4), "--batch 8")])
def test_sizes_that_do_not_fit_raise_an_error_that_names_the_nearest_valid_size(changes, advice):
    with pytest.raises(ValueError, match=f"try {advice}$"):
        train_batches(**changes)


# ---------------------------------------------------------------- evaluation
def test_evaluation_reads_every_image_once_in_order_and_with_a_limit_still_every_class(
        tmp_path, capsys):
    source = open_data(folder(tmp_path, ("ant", "bee", "cow")), "val")
    labels = torch.cat([labels for _, labels, _ in eval_batches(source, 16, 4)])
    assert labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    (images, labels, captions), = eval_batches(source, 16, 4, limit=3, crop="squash")
    assert images.shape == (3, 3, 16, 16) and images.dtype == torch.uint8
    assert labels.tolist() == [0, 1, 2] and "cow" in captions[2]
    (tmp_path / "val" / "bee" / "2.png").write_bytes(b"not an image")
    without = [images for images, _, _ in eval_batches(source, 16, 4)]
    with_worker = [images for images, _, _ in eval_batches(source, 16, 4, workers=1)]
    assert sum(map(len, without)) == 17
    assert all(torch.equal(a, b) for a, b in zip(without, with_worker, strict=True))
    assert "1 of 18 images" in capsys.readouterr().out


def test_ranks_divide_an_evaluation_in_order_and_each_counts_its_unreadable_images(
        tmp_path, monkeypatch, capsys):
    source = open_data(folder(tmp_path, ("ant", "bee", "cow")), "val")
    whole = torch.cat([images for images, _, _ in eval_batches(source, 16, 4)])
    (tmp_path / "val" / "cow" / "5.JPEG").write_bytes(b"")
    parts = []
    for r in range(4):
        for module in (data, dist):
            monkeypatch.setattr(module, "world_size", lambda: 4)
            monkeypatch.setattr(module, "rank", lambda: r)
        parts += [images for images, _, _ in eval_batches(source, 16, 4)]
        assert len(data.rank_slice(18)) in (4, 5)
    assert torch.equal(torch.cat(parts), whole[:17])
    out = capsys.readouterr().out
    assert "1 of 5 images" in out and "on rank 3" in out


def test_an_evaluation_with_more_than_half_of_the_images_unreadable_raises(tmp_path):
    source = open_data(folder(tmp_path), "val")
    for file in (tmp_path / "val" / "red_fox").iterdir():
        file.write_bytes(b"gone")
    assert sum(len(images) for images, _, _ in eval_batches(source, 16, 4)) == 6      # half
    (tmp_path / "val" / "n01443537" / "0.png").write_bytes(b"gone")
    with pytest.raises(ValueError, match="more than half of the 12 images"):
        list(eval_batches(source, 16, 4))


# ---------------------------------------------------------------- contact sheet
def test_the_contact_sheet_has_a_row_per_sample(tmp_path, monkeypatch, capsys):
    words = "data.py --rows 2 --image 32 --local-image 16 --patch 8 --out".split()
    monkeypatch.setattr("sys.argv", [*words, str(tmp_path / "sheet.png")])
    data.main()
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.width > sheet.height and "ms per sample" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["data.py", "--data", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="no folder"):
        data.main()
