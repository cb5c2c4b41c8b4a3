"""Damaged, unusual and hostile files in folders and tars: a readable image has the right pixels and
caption, any other file is skipped, reported and counted. All files are made by these tests."""
import io
import json
import multiprocessing
import multiprocessing.synchronize
import os
import re
import signal
import struct
import subprocess
import sys
import tarfile
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

import data
import dit
from data import TrainBatches, eval_batches, open_data, prefetch
from vtp_min import VTPConfig, VTPModel
from vtp_min.augment import adm_crop, clip_view, resize_square, ssl_view
from vtp_min.dist import printable
from vtp_min.extras.images import is_image, read_header, read_image
from vtp_min.extras.latents import write_shard, write_stats
from vtp_min.extras.shards import read_caption

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("VTP_CACHE", str(tmp_path_factory.mktemp("cache")))


def encoded(image, kind="PNG", **how):
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def decoded(content):
    return np.asarray(read_image(io.BytesIO(content))).astype(int)


def noise(side=32, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))


def chunk(name, content):
    size, checksum = len(content), zlib.crc32(name + content)
    return struct.pack(">I", size) + name + content + struct.pack(">I", checksum)


def png(width, height, depth, color, rows, extra=b""):
    """A PNG, written chunk by chunk because Pillow cannot write all of these kinds -> bytes

    color  0 gray, 2 RGB, 3 palette, 4 gray and alpha, 6 RGBA
    rows   bytes; each row begins with the number of its filter, 0
    """
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + head + extra + body + chunk(b"IEND", b"")


def tar_of(path, members, links=(), format=tarfile.PAX_FORMAT):
    """members  [(name, bytes)]     links  [(name, target)]"""
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for name, target in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
    return str(path)


def pairs(n, start=0):
    members = []
    for i in range(start, start + n):
        members.append((f"{i:04d}.png", encoded(noise(8, i))))
        members.append((f"{i:04d}.txt", f"number {i}".encode()))
    return members


# ---------------------------------------------------------------- right pixels

@pytest.mark.parametrize("gray", [0, 1, 128, 129, 200, 255])
def test_16_bit_gray_becomes_8_bit(gray):
    row = b"\0" + struct.pack(">H", 257 * gray) * 3
    assert (decoded(png(3, 1, 16, 0, row)) == gray).all()
    tiff = encoded(Image.fromarray(np.full((2, 2), 257 * gray, np.uint16)), "TIFF")
    assert (decoded(tiff) == gray).all()


def test_16_bit_color_and_alpha_become_8_bit():
    rgb = png(1, 1, 16, 2, b"\0" + struct.pack(">HHH", 65535, 32896, 257))
    rgba = png(1, 1, 16, 6, b"\0" + struct.pack(">HHHH", 65535, 0, 0, 32896))
    gray_alpha = png(1, 1, 16, 4, b"\0" + struct.pack(">HH", 0, 32896))
    assert abs(decoded(rgb) - [255, 128, 1]).max() <= 1
    assert abs(decoded(rgba) - [255, 127, 127]).max() <= 1
    assert abs(decoded(gray_alpha) - 127).max() <= 1


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_gray_level_marked_as_transparent_becomes_white_and_others_stay(depth):
    low = 1 if depth < 16 else 257
    bits = "".join(f"{v:0{depth}b}" for v in (0, low)).ljust(32, "0")
    row = b"\0" + int(bits, 2).to_bytes(4, "big")[:max(1, 2 * depth // 8)]
    found = decoded(png(2, 1, depth, 0, row, chunk(b"tRNS", struct.pack(">H", 0))))[0, :, 0]
    assert found.tolist() == [255, {1: 255, 2: 85, 4: 17, 8: 1, 16: 1}[depth]]


def test_a_color_marked_as_transparent_becomes_white_in_8_and_16_bits():
    for depth, code, unit in ((8, "B", 1), (16, "H", 257)):
        transparent, other = (0, 9 * unit, 200 * unit), (1 * unit, 2 * unit, 3 * unit)
        row = b"\0" + struct.pack(f">6{code}", *transparent, *other)
        mark = chunk(b"tRNS", struct.pack(">HHH", *transparent))
        found = decoded(png(2, 1, depth, 2, row, mark))
        assert found.tolist() == [[[255, 255, 255], [1, 2, 3]]], depth


def test_palettes_with_and_without_transparency():
    palette = chunk(b"PLTE", bytes([10, 20, 30, 200, 100, 50]))
    first_is_clear = palette + chunk(b"tRNS", bytes([0]))
    first_is_half_clear = palette + chunk(b"tRNS", bytes([128]))
    opaque = decoded(png(2, 1, 8, 3, b"\0\0\1", palette))
    clear = decoded(png(2, 1, 8, 3, b"\0\0\1", first_is_clear))
    half_clear = decoded(png(1, 1, 8, 3, b"\0\0", first_is_half_clear))
    assert opaque.tolist() == [[[10, 20, 30], [200, 100, 50]]]
    assert clear.tolist() == [[[255, 255, 255], [200, 100, 50]]]
    assert abs(half_clear - [132, 137, 142]).max() <= 1


@pytest.mark.parametrize("mode, color, wanted", [
    ("1", 1, (255, 255, 255)), ("1", 0, (0, 0, 0)), ("L", 7, (7, 7, 7)),
    ("LA", (0, 0), (255, 255, 255)), ("LA", (100, 255), (100, 100, 100)),
    ("RGBA", (1, 2, 3, 255), (1, 2, 3)), ("RGBA", (0, 0, 0, 0), (255, 255, 255)),
    ("RGBA", (255, 0, 0, 128), (255, 127, 127))])
def test_every_mode_becomes_rgb_on_white(mode, color, wanted):
    assert (decoded(encoded(Image.new(mode, (5, 4), color))) == wanted).all()


@pytest.mark.parametrize("ink, wanted", [
    ((0, 0, 0, 0), (255, 255, 255)), ((0, 255, 255, 0), (255, 0, 0)),
    ((255, 0, 255, 0), (0, 255, 0)), ((0, 0, 0, 255), (0, 0, 0))])
def test_cmyk_is_not_inverted_with_or_without_adobes_marker(ink, wanted):
    # Pillow stores it inverted and marked, as Adobe does
    adobe = encoded(Image.new("CMYK", (16, 16), ink), "JPEG", quality=100)
    assert abs(decoded(adobe) - wanted).max() <= 2
    inverse = tuple(255 - x for x in ink)
    plain = encoded(Image.new("CMYK", (16, 16), inverse), "JPEG", quality=100)
    mark = plain.index(b"\xff\xee")
    size = 2 + int.from_bytes(plain[mark + 2:mark + 4], "big")
    plain = plain[:mark] + plain[mark + size:]                    # not inverted, and not marked
    assert abs(decoded(plain) - wanted).max() <= 2
    assert abs(decoded(encoded(Image.new("CMYK", (4, 4), ink), "TIFF")) - wanted).max() <= 2


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(kind):
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "lime", "blue")]
    how = {"lossless": True} if kind == "WEBP" else {}
    animation = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **how)
    assert (decoded(animation) == (255, 0, 0)).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_images_stored_in_any_orientation_are_upright(kind, turn):
    upright = Image.new("RGB", (24, 16), "white")
    upright.paste("red", (0, 0, 12, 8))                           # one red corner, top left
    # Pillow's number of the inverse
    inverse = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[turn]
    stored, exif = upright, Image.Exif()
    if inverse is not None:
        stored = stored.transpose(Image.Transpose(inverse))
    exif[0x0112] = turn
    how = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    found = decoded(encoded(stored, kind, exif=exif, **how))
    assert found.shape == (16, 24, 3)
    assert abs(found[2, 2] - [255, 0, 0]).max() < 9
    assert found[13, 2].min() > 245 and found[2, 21].min() > 245


def test_an_image_with_damaged_exif_is_read_without_rotation():
    for exif in (b"nonsense", b"II*\0\xff\xff\xff\x7f", b"MM\0*\0\0\0\x08\xff\xff" + bytes(9)):
        image = encoded(Image.new("RGB", (16, 16), "red"), "JPEG", exif=b"Exif\0\0" + exif)
        assert (decoded(image)[:, :, 0] > 250).all()


def test_the_format_is_detected_from_the_content_not_from_the_name(tmp_path):
    for name, kind in (("a.jpg", "PNG"), ("b.png", "JPEG"), ("c.bmp", "WEBP"), ("d.JPEG", "GIF"),
                       ("e.webp", "BMP")):
        (tmp_path / name).write_bytes(encoded(Image.new("RGB", (16, 16), "red"), kind))
        assert abs(np.asarray(read_image(tmp_path / name)).astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("width, height", [(1, 1), (3000, 4), (4, 3000), (1, 50000), (2, 1)])
def test_very_small_and_very_long_images_can_be_cropped(width, height):
    image = read_image(io.BytesIO(encoded(Image.new("RGB", (width, height), "red"))))
    rng = np.random.default_rng(0)
    assert clip_view(rng, image, 32).shape == (3, 32, 32)
    assert ssl_view(rng, image, 16, (0.05, 0.32), 0, 0).shape == (3, 16, 16)
    assert resize_square(image, 32).size == (32, 32)
    crop = np.asarray(adm_crop(image, 32))
    assert crop.shape == (32, 32, 3) and (crop == [255, 0, 0]).all()


def test_a_very_wide_image_is_cropped_before_it_is_enlarged():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 400, 3), dtype=np.uint8)
    for wide in (pixels, pixels.transpose(1, 0, 2)):
        image = Image.fromarray(np.ascontiguousarray(wide))
        whole = image.resize([8 * side for side in image.size], Image.BICUBIC)
        x, y = (whole.width - 32) // 2, (whole.height - 32) // 2
        whole = whole.crop((x, y, x + 32, y + 32))
        difference = np.asarray(adm_crop(image, 32)).astype(int) - np.asarray(whole)
        assert abs(difference).max() <= 1
    # the whole image would take 400 GB after enlarging
    assert adm_crop(Image.new("RGB", (2_000_000, 1)), 256).size == (256, 256)


def test_a_large_image_is_read_without_a_warning_and_a_decompression_bomb_raises():
    large = encoded(Image.new("1", (10000, 9500)))                # Pillow warns from 89 million on
    with warnings.catch_warnings(action="error"):
        assert read_image(io.BytesIO(large)).size == (10000, 9500)
        with pytest.raises(Image.DecompressionBombError):         # because of its header
            read_image(io.BytesIO(png(50000, 50000, 8, 0, b"")))


# ---------------------------------------------------------------- TIFF

def tiff(bits, content, photometric, order="<", sample_format=1, side=4, extra=()):
    """A gray TIFF without compression -> bytes

    photometric  0: zeros are white, 1: zeros are black      order  byte order, < or >
    extra        further tags of type SHORT with one value: (tag, value)
    """
    short, long = 3, 4
    tags = [(256, short, side), (257, short, side), (258, short, bits), (259, short, 1),
            (262, short, photometric), (273, long, 8), (277, short, 1), (278, short, side),
            (279, long, len(content)), (339, short, sample_format)]
    tags += [(tag, short, value) for tag, value in extra]
    directory = struct.pack(order + "H", len(tags))
    for tag, kind, value in sorted(tags):
        number = struct.pack(order + "I", value)
        if kind == short:
            number = struct.pack(order + "HH", value, 0)
        directory += struct.pack(order + "HHI", tag, kind, 1) + number
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8 + len(content))
    return head + content + directory + bytes(4)


@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("bits, order", [
    (1, "<"), (4, ">"), (8, "<"), (8, ">"), (16, "<"), (16, ">")])
@pytest.mark.parametrize("turn", [1, 6])
def test_tiff_files_in_which_zeros_are_white_are_inverted_for_every_number_of_bits(
        bits, order, photometric, turn):
    n_bytes = max(4 * bits // 8, 1) * 4                       # rows begin at whole bytes
    for value, byte in ((1, 255), (0, 0)):
        content = tiff(bits, bytes([byte] * n_bytes), photometric, order, extra=[(274, turn)])
        wanted = 255 * (value if photometric else 1 - value)
        assert (decoded(content) == wanted).all()


@pytest.mark.parametrize("gray, wanted", [(4095, 255), (0, 0), (2048, 128)])
def test_white_has_12_bits_in_a_12_bit_tiff(gray, wanted):
    pair = bytes([gray >> 4, (gray & 15) << 4 | gray >> 8, gray & 255])     # two pixels
    assert (decoded(tiff(12, pair * 8, 1)) == wanted).all()


@pytest.mark.parametrize("bits, sample_format", [(8, 2), (16, 2), (32, 2), (32, 3), (32, 1)])
def test_signed_and_floating_point_pixels_and_those_of_32_bits_are_refused(bits, sample_format):
    content = tiff(bits, bytes(bits // 8 * 16), 1, sample_format=sample_format)
    with pytest.raises(ValueError, match="does not define the value of white"):
        read_image(io.BytesIO(content))


@pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13,
                    reason="Pillow 13 reads such a file, earlier versions refuse it")
def test_gray_multiplied_by_alpha_in_a_tiff_is_blended_with_white():
    content = encoded(Image.new("LA", (4, 4), (50, 128)), "TIFF")
    # the tag ExtraSamples: 2 means alpha, 1 means alpha that the gray level is multiplied by
    plain, multiplied = (struct.pack("<HHIHH", 338, 3, 1, value, 0) for value in (2, 1))
    assert content.count(plain) == 1
    assert abs(decoded(content.replace(plain, multiplied)) - (50 + 255 - 128)).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_the_header_states_the_size_of_the_upright_image(kind, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    how = {"exif": exif} if kind not in ("GIF", "BMP") else {}       # they have no EXIF
    content = encoded(noise(32).crop((0, 0, 20, 10)), kind, **how)
    size, format = read_header(io.BytesIO(content))
    assert size == read_image(io.BytesIO(content)).size and format == kind


def test_hidden_files_are_not_images():
    names = ["x.png", "a/b.JPG", "a.b/x.tif", "._x.png", "a/._x.png", ".x.jpg", "x.txt"]
    assert [is_image(name) for name in names] == [True] * 3 + [False] * 4


# ---------------------------------------------------------------- files without a usable image

def broken():
    """{name: bytes} of files that hold no usable image"""
    files = {}
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"):
        content = encoded(noise(), kind)
        files[f"half.{kind.lower()}"] = content[:len(content) // 2]
    body = bytearray(encoded(noise()))
    body[len(body) // 2:len(body) // 2 + 40] = bytes(40)
    return files | {
        "corrupt.png": bytes(body), "empty.jpg": b"", "text.jpg": b"no image",
        "page.png": b"<!DOCTYPE html><html></html>", "zeros.png": bytes(5000),
        "bomb.png": png(50000, 50000, 8, 0, b""), "none wide.png": png(0, 5, 8, 0, b"\0"),
        "head.jpg": b"\xff\xd8\xff", "float.tiff": encoded(Image.new("F", (4, 4), 0.5), "TIFF"),
        "long.tif": encoded(Image.new("I", (4, 4), 70000), "TIFF"),
        "script.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        "portable.jpg": b"P6 1 1 255\n\1\2\3",
        "drawing.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "print.jpg": b"%PDF-1.4\n%%EOF", "two\nlines.png": b"", "caf\u00e9 \u6f22.png": b""}


@pytest.mark.parametrize("name", broken())
def test_a_file_without_an_image_raises_the_same_error_each_time_without_warnings(name):
    messages = set()
    with warnings.catch_warnings(action="error"):
        for _ in range(2):
            with pytest.raises(Exception) as problem:
                read_image(io.BytesIO(broken()[name]))
            messages.add(str(problem.value))
    # each file is reported once, so its message must not contain a memory address
    assert len(messages) == 1
    assert "0x" not in messages.pop()


@pytest.fixture
def zoo(tmp_path):
    """Twelve classes of 4 readable images, and files of many other kinds"""
    for c in range(12):
        (tmp_path / f"kind {c}").mkdir()
        for i in range(4):
            noise(20, 10 * c + i).save(tmp_path / f"kind {c}" / f"{i} \u00fc.png")
    for n, (name, content) in enumerate(broken().items()):
        (tmp_path / f"kind {n % 12}" / name).write_bytes(content)
    (tmp_path / "kind 0" / os.fsdecode(b"bytes \xff\xfe.jpg")).write_bytes(b"")
    (tmp_path / "kind 1" / "link.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "kind 2" / "folder.jpg").mkdir()
    noise().save(tmp_path / "kind 2" / "folder.jpg" / "inner.png")
    (tmp_path / "kind 3" / "notes.txt").write_text("ignored")
    (tmp_path / "stray.png").write_bytes(b"")
    os.mkfifo(tmp_path / "kind 5" / "pipe.png")
    for hidden in ("kind 4/._0.jpg", "kind 4/.DS_Store", ".cache"):
        (tmp_path / hidden).write_bytes(b"\0")
    (tmp_path / ".git").mkdir()
    (tmp_path / "nobody").mkdir()
    (tmp_path / "caf\u00e9_au_lait").mkdir()
    noise().save(tmp_path / "caf\u00e9_au_lait" / "0.png")
    return tmp_path


LOST = len(broken()) + 3             # and the undecodable name, the broken link, the pipe


def test_a_folder_of_many_kinds_of_files_gives_its_images_and_reports_the_others(zoo, capsys):
    source = open_data(zoo, "val", whole=True)
    out = capsys.readouterr().out
    assert "2 files are ignored" in out and "stray.png" in out
    assert "1 folders have no image and are not classes (nobody" in out
    assert len(source) == 48 + 1 + 1 + LOST
    assert "caf\u00e9 au lait" in source.classes and ".git" not in source.classes
    assert sum(len(x) for x, _, _ in eval_batches(source, 16, 16, workers=1)) == 50
    out = capsys.readouterr().out
    names = [line for line in out.splitlines() if line.startswith("skipped: ")]
    assert len(names) == LOST == len(set(names)) and f"{LOST} of {50 + LOST} images" in out
    for name in ("half.jpeg", "corrupt.png", "link.png", "bomb.png", r"two\nlines.png",
                 r"bytes \udcff\udcfe.jpg", "caf\u00e9 \u6f22.png"):
        assert sum(name in line for line in names) == 1, name


def small_batches(source, rank=0, world_size=1, **changes):
    settings = dict(clip=False, ssl=True, rec=True, image=16, local_image=8, n_local=1, patch=8)
    return TrainBatches(source, None, 0, 8, 4, 8, **settings | changes, rank=rank,
                        world_size=world_size)


def test_training_replaces_unreadable_images_by_the_same_ones_for_any_number_of_ranks(zoo):
    whole = small_batches(open_data(zoo))
    left, right = (small_batches(open_data(zoo), r, 2) for r in range(2))
    bad = set()
    for s in range(10):
        a, b, c = whole[s], left[s], right[s]
        assert torch.equal(a.image, torch.cat([b.image, c.image]))
        assert sorted(a.bad) == sorted(b.bad + c.bad)
        bad |= set(a.bad)
    assert 15 <= len(bad) <= LOST      # 80 draws from 72 files: most are drawn, each has one name
    assert all("\n" not in name for name in bad)


@pytest.mark.parametrize("problem", [MemoryError, KeyboardInterrupt])
def test_memory_errors_and_ctrl_c_do_not_count_as_unreadable_samples(zoo, monkeypatch, problem):
    batches = small_batches(open_data(zoo), ssl=False)

    def load(self, index, rng):
        raise problem
    monkeypatch.setattr(data.Folder, "load", load)
    with pytest.raises(problem):
        batches[0]
    with pytest.raises(problem):
        list(eval_batches(batches.source, 16, 4))


@pytest.mark.parametrize("language", [
    {"LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"LANG": "C", "PYTHONIOENCODING": "utf-8:strict"}])
def test_the_contact_sheet_of_such_a_folder_is_written_in_any_locale(zoo, tmp_path, language):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHON"))}
    words = [sys.executable, str(ROOT / "data.py"), "--data", str(zoo), "--out",
             str(tmp_path / "sheet.png"), "--image", "24", "--local-image", "12", "--patch", "12"]
    run = subprocess.run(words, capture_output=True, env=env | language, cwd=ROOT)
    assert run.returncode == 0, run.stderr.decode(errors="replace")
    assert b"Traceback" not in run.stderr and b"Warning" not in run.stderr
    # the class name, and therefore the captions, are the same in any locale
    assert b"caf\\xe9 au lait" in run.stdout or "caf\u00e9 au lait".encode() in run.stdout
    assert b"could not be read" in run.stdout and (tmp_path / "sheet.png").exists()


# ---------------------------------------------------------------- tars

def test_a_tar_that_ends_early_gives_the_samples_before_that(tmp_path, capsys):
    whole = Path(tar_of(tmp_path / "x.tar", pairs(5))).read_bytes()
    tar = tmp_path / "cut.tar"
    # offset of 0004.png: each member before it is a header and a block, 1024 bytes
    header = 1024 * 2 * 4
    for cut, flaw in ((header + 512 + 30, "0004.png is cut off"), (header + 100, "ends early"),
                      (header, "ends early")):
        tar.write_bytes(whole[:cut])
        source = open_data(str(tar))
        out = capsys.readouterr().out
        captions = [source.load(i)[1] for i in range(len(source))]
        assert captions == [f"number {i}" for i in range(4)]
        assert "1 of 1 tars are damaged" in out and flaw in out and "cut.tar" in out
    tar.write_bytes(whole + whole)
    assert len(open_data(str(tar))) == 5
    assert "data after the end-of-archive block" in capsys.readouterr().out
    # tarfile stops silently at an overwritten header
    tar.write_bytes(whole[:header] + b"\xaa" * 512 + whole[header + 512:])
    assert len(open_data(str(tar))) == 4 and "ends early" in capsys.readouterr().out


@pytest.mark.parametrize("kind", [b"0", b"Z"])
def test_a_negative_size_does_not_cause_an_endless_loop(tmp_path, kind, capsys):
    body = bytearray(Path(tar_of(tmp_path / "x.tar", pairs(2))).read_bytes())
    at = 2 * 1024                                                 # the header of 0001.png
    # -1536 in GNU's base 256: the next header would be that of 0000.txt, and so on without end
    body[at + 124:at + 136] = b"\xff" * 10 + b"\xfa\x00"
    body[at + 156:at + 157] = kind
    body[at + 148:at + 156] = b" " * 8
    body[at + 148:at + 156] = b"%06o\0 " % sum(body[at:at + 512])
    (tmp_path / "x.tar").write_bytes(body)
    assert len(open_data(str(tmp_path / "x.tar"))) == 1 and "damaged" in capsys.readouterr().out


def test_unreadable_tars_among_readable_ones_are_reported_counted_and_skipped(tmp_path, capsys):
    for n in (0, 1, 2, 4, 5, 6):
        tar_of(tmp_path / f"x-{n}.tar", pairs(2, 2 * n))
    (tmp_path / "x-1.tar").write_bytes(b"")
    (tmp_path / "x-5.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    source = open_data(str(tmp_path / "x-{0..6}.tar"))
    out = capsys.readouterr().out
    assert len(source) == 8 and "3 of 7 tars" in out
    assert all(name in out for name in ("x-1.tar", "x-3.tar", "x-5.tar", "gunzip it"))
    with pytest.raises(ValueError, match="6 of the 9 tars .* cannot be read"):
        open_data(str(tmp_path / "x-{1..9}.tar"))


@pytest.mark.parametrize("content, reason", [
    (b"", "empty"), (bytes(10240), "holds no pairs"), (b"\x1f\x8b" + bytes(999), "gunzip"),
    (b"<html>" * 300, "header")])
def test_a_file_that_is_not_a_tar_raises_with_the_reason(tmp_path, content, reason):
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        open_data(str(tmp_path / "x.tar"))


def test_incomplete_samples_duplicates_and_links_are_skipped_and_counted(tmp_path, capsys):
    image = encoded(noise(8))
    tar = tar_of(tmp_path / "x.tar", [
        ("a.png", image), ("a.txt", b"a"), ("a.png", encoded(noise(9))), ("lonely.png", image),
        ("void.txt", b"void"), ("void.png", b""), ("mute.txt", b""), ("mute.png", image),
        ("._b.png", b"\0"), ("._b.txt", b"\0"), ("c.TXT", b"c"), ("c.JPG", image)],
        links=[("link.png", "/etc/passwd"), ("link.txt", "a.txt")])
    source = open_data(tar)
    # skipped: the second image of a, lonely, void, mute; links are not counted
    assert "4 of 6 samples are skipped" in capsys.readouterr().out
    assert [source.load(i)[1] for i in range(len(source))] == ["a", "c"]
    assert source.load(0)[0].size == (8, 8)


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_names_of_any_length_and_any_characters_are_read_and_nothing_is_unpacked(tmp_path, format):
    names = ["x" * 300, "../../evil", "/tmp/absolute-vtp", "caf\u00e9 \u6f22", "a b/c d"]
    members = []
    for name in names:
        members += [(f"{name}.png", encoded(noise(8))), (f"{name}.txt", name.encode())]
    tar = tar_of(tmp_path / "x.tar", members, format=format)
    source = open_data(tar)
    assert [source.load(i)[1] for i in range(5)] == names
    assert os.listdir(tmp_path) == ["x.tar"] and not Path("/tmp/absolute-vtp.png").exists()
    assert all(source.name(i).startswith(f"{tar}:") for i in range(5))
    assert source.name(4).endswith("a b/c d.png")


@pytest.mark.parametrize("raw, plain, wanted", [
    (b" a dog \r\n", True, "a dog"), ("\ufeffa caf\u00e9".encode(), True, "a caf\u00e9"),
    (b"caf\xe9", True, "caf\ufffd"), (b"a\0b", True, "a b"),
    (b"x" * 100_000, True, "x" * 2000), (b'{"caption": "a dog"}', False, "a dog"),
    (b'{"caption": "half \\ud800 a letter"}', False, "half ? a letter")])
def test_captions_are_cleaned(raw, plain, wanted):
    assert read_caption(raw, plain) == wanted


@pytest.mark.parametrize("raw, plain", [
    (b"", True), (b" \n", True), (b"{", False), (b"[]", False), (b"null", False),
    (b'{"text": "x"}', False), (b'{"caption": null}', False), (b'{"caption": ["a"]}', False),
    (b'{"caption": 7}', False), (b'{"caption": ""}', False), (b"[" * 100_000, False)])
def test_a_file_without_a_caption_raises(raw, plain):
    with pytest.raises(Exception):
        read_caption(raw, plain)


def test_a_pair_without_a_readable_caption_is_replaced_and_reported_by_its_member_name(tmp_path):
    members = []
    for name, caption in (("good", b'{"caption": "fine"}'), ("bad", b"{"), ("none", b"{}")):
        members += [(f"{name}.png", encoded(noise(16))), (f"{name}.json", caption)]
    tar = tar_of(tmp_path / "x.tar", members)

    def tokenize(texts):
        return torch.ones(len(texts), 77, dtype=torch.long)
    batches = TrainBatches(open_data(tar), tokenize, 0, 6, 6, 6, clip=True, ssl=False, rec=False,
                           image=16, local_image=8, n_local=0, patch=8)
    out = batches[0]
    assert out.captions == ["fine"] * 6
    names = {name.split(" (")[0] for name in out.bad}
    assert names == {f"{tar}:bad.png", f"{tar}:none.png"}


def test_an_index_that_cannot_be_stored_is_made_again_with_a_message(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("VTP_CACHE", str(tmp_path / "file" / "below"))
    assert len(open_data(tar_of(tmp_path / "x.tar", pairs(2)))) == 2
    assert "set VTP_CACHE=DIR" in capsys.readouterr().out


def test_printable_gives_one_line_without_control_characters():
    name = "a\nb\t\x1b[31m\udcff caf\u00e9"
    assert printable(name) == r"a\nb\t\x1b[31m\udcff caf" + "\u00e9"


# ---------------------------------------------------------------- workers without shared memory
@pytest.fixture
def at_most_60_seconds():
    """A worker that fails silently would make a test wait without end."""
    def stop(number, frame):
        raise TimeoutError("the workers have sent no batch")
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def no_space(*_):
    raise RuntimeError("unable to write to file </torch_1>: No space left on device (28)")


def same_batches(a, b):
    for x, y in zip(a, b, strict=True):
        assert x.captions == y.captions
        assert torch.equal(x.image, y.image) and torch.equal(x.crops, y.crops)


def test_batches_that_do_not_fit_into_shared_memory_come_through_a_pipe_with_a_note(
        monkeypatch, capsys, at_most_60_seconds):
    wanted = list(prefetch(small_batches(open_data("shapes")), 0, 3))
    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", no_space)
    same_batches(wanted, list(prefetch(small_batches(open_data("shapes")), 0, 3, workers=2)))
    printed = capsys.readouterr().out
    assert printed.count("shared memory (/dev/shm) is too small") == 1
    assert "--workers 0" in printed and "--shm-size" in printed


def test_evaluation_works_too_if_only_some_tensors_fit_into_shared_memory(
        monkeypatch, at_most_60_seconds):
    source = open_data("shapes", "val", side=16)
    wanted = list(eval_batches(source, 16, 4, limit=12))
    share = torch.UntypedStorage._share_fd_cpu_

    def share_small_ones(storage, *args):
        return no_space() if storage.nbytes() > 100 else share(storage, *args)
    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", share_small_ones)
    found = list(eval_batches(source, 16, 4, limit=12, workers=2))
    for a, b in zip(wanted, found, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2] == b[2]


def test_workers_that_cannot_be_started_for_lack_of_shared_memory_are_explained(monkeypatch):
    def no_lock(*_, **__):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(multiprocessing.synchronize.Lock, "__init__", no_lock)
    with pytest.raises(ValueError, match="worker processes cannot be started .*--workers 0"):
        prefetch(small_batches(open_data("shapes")), 0, 3, workers=2)


def test_an_error_of_a_worker_has_the_message_that_it_has_without_workers(tmp_path):
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "0.png").write_bytes(b"")
    messages = []
    for workers in (0, 1):
        with pytest.raises(ValueError) as error:
            list(prefetch(small_batches(open_data(tmp_path)), 0, 3, workers))
        messages.append(str(error.value))
    assert messages[0] == messages[1] and messages[0].startswith("100 samples in a row")


KILL_A_WORKER = """
import multiprocessing, os, signal
from data import map_in_workers
stream = map_in_workers(abs, list(range(10 ** 6)), workers=1)
next(stream)
worker, = multiprocessing.active_children()
os.kill(worker.pid, signal.SIGKILL)
try:
    list(stream)
except ValueError as error:
    print(error)
"""


def test_a_worker_that_is_killed_ends_the_run_with_a_sentence():
    # in a process of its own: PyTorch reports the death of a worker by a signal to its parent
    done = subprocess.run([sys.executable, "-c", KILL_A_WORKER], cwd=ROOT, capture_output=True,
                          text=True, timeout=120)
    assert re.search("a worker process ended .*--workers 0", done.stdout), done.stderr


# ---------------------------------------------------------------- a terminal that is gone
def tokenizer(folder):
    """The files of a small trained tokenizer"""
    torch.manual_seed(0)
    config = VTPConfig.of_size("pico", image=16, patch=8, latent_dim=8, clip=False)
    VTPModel(config).save_pretrained(folder)
    (folder / "run.json").write_text(json.dumps({"data": "shapes", "seed": 0, "size": "pico"}))
    return folder


def train_command(folder):
    return (f"train.py --size pico --image 16 --patch 8 --batch 8 --w-clip 0 --w-ssl 0 "
            f"--batch-rec 8 --perceptual none --out {folder}/out")


def stage2_command(folder):
    return (f"train.py --stage 2 --init {tokenizer(folder)} --batch 4 --perceptual none "
            f"--w-gan 0 --out {folder}/out")


def dit_command(folder):
    tokenizer(folder)
    latents = folder / "latents"
    latents.mkdir()
    z = torch.randn(8, 8, 2, 2)
    write_shard(latents / "latents_rank00_shard000.safetensors", z, -z, torch.arange(8) % 2, "cpu")
    _, encoder = dit.load_tokenizer(folder, "cpu")
    about = {"tokenizer": "..", "encoder": encoder, "data": "shapes", "split": "train"}
    write_stats(latents, ["a", "b"], about, seed=0)
    return f"dit.py train {latents} --size pico --batch 4 --out {folder}/out"


@pytest.mark.parametrize("command", [train_command, stage2_command, dit_command])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=["tee", "terminal"])
def test_a_training_whose_output_nobody_reads_finishes_its_step_and_saves(tmp_path, command,
                                                                          number):
    """`2>&1 | tee log` and Ctrl-C, which ends tee too; a terminal that is closed"""
    words = command(tmp_path).split() + "--steps 100000 --log-every 1 --device cpu".split()
    run = subprocess.Popen([sys.executable, *words, "--workers", "0"], cwd=ROOT,
                           env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT)
    log = tmp_path / "out" / "log.jsonl"
    while run.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.05)
    run.stdout.close()
    run.send_signal(number)
    assert run.wait(60) == 75
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert torch.load(tmp_path / "out" / "last.pt")["step"] == steps[-1]


def test_a_training_goes_on_when_the_reader_of_its_output_ends_before_it_starts(tmp_path):
    """As in `| head -1`"""
    words = train_command(tmp_path).split() + "--steps 3 --device cpu --workers 0".split()
    reader, writer = os.pipe()
    os.close(reader)
    run = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE,
                         text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    os.close(writer)
    assert run.returncode == 0, run.stderr
    assert "can no longer be written" in run.stderr and "Exception" not in run.stderr
    assert torch.load(tmp_path / "out" / "last.pt")["step"] == 3
