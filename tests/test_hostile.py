"""Whatever lies in a folder or a tar: right pixels and words where there are any, else left out, named and counted. All files are made here."""
import io
import os
import struct
import subprocess
import sys
import tarfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import Steps, eval_batches, open_data
from vtp_min.views import adm_crop, clean_view, lots, read_caption, read_image, shown, squash, ssl_view

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
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width, height, depth, colour, rows, extra=b""):
    """A PNG by hand.   colour  0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA     rows  bytes, each row led by its filter 0"""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


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
    return [(f"{i:04d}.{e}", c) for i in range(start, start + n) for e, c in (("png", encoded(noise(8, i))), ("txt", f"number {i}".encode()))]


# ---- right pixels

@pytest.mark.parametrize("grey", [0, 1, 128, 129, 200, 255])
def test_sixteen_bits_of_grey_become_eight(grey):
    row = b"\0" + struct.pack(">H", 257 * grey) * 3
    assert (decoded(png(3, 1, 16, 0, row)) == grey).all()
    assert (decoded(encoded(Image.fromarray(np.full((2, 2), 257 * grey, np.uint16)), "TIFF")) == grey).all()


def test_sixteen_bits_of_colour_and_alpha_become_eight():
    assert abs(decoded(png(1, 1, 16, 2, b"\0" + struct.pack(">HHH", 65535, 32896, 257))) - [255, 128, 1]).max() <= 1
    assert abs(decoded(png(1, 1, 16, 6, b"\0" + struct.pack(">HHHH", 65535, 0, 0, 32896))) - [255, 127, 127]).max() <= 1
    assert abs(decoded(png(1, 1, 16, 4, b"\0" + struct.pack(">HH", 0, 32896))) - 127).max() <= 1


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_grey_that_a_png_calls_transparent_is_white_and_its_neighbours_stay(depth):
    low = 1 if depth < 16 else 257
    bits = "".join(f"{v:0{depth}b}" for v in (0, low)).ljust(32, "0")
    row = b"\0" + int(bits, 2).to_bytes(4, "big")[:max(1, 2 * depth // 8)]
    found = decoded(png(2, 1, depth, 0, row, chunk(b"tRNS", struct.pack(">H", 0))))[0, :, 0]
    assert found.tolist() == [255, {1: 255, 2: 85, 4: 17, 8: 1, 16: 1}[depth]]


def test_a_colour_that_a_png_calls_transparent_is_white_in_8_and_16_bits():
    for depth, code, top in ((8, "B", 1), (16, "H", 257)):
        row = b"\0" + struct.pack(f">6{code}", 0, 9 * top, 200 * top, 1 * top, 2 * top, 3 * top)
        found = decoded(png(2, 1, depth, 2, row, chunk(b"tRNS", struct.pack(">HHH", 0, 9 * top, 200 * top))))
        assert found.tolist() == [[[255, 255, 255], [1, 2, 3]]], depth


def test_palettes_with_and_without_transparency():
    palette = chunk(b"PLTE", bytes([10, 20, 30, 200, 100, 50]))
    assert decoded(png(2, 1, 8, 3, b"\0\0\1", palette)).tolist() == [[[10, 20, 30], [200, 100, 50]]]
    assert decoded(png(2, 1, 8, 3, b"\0\0\1", palette + chunk(b"tRNS", bytes([0])))).tolist() == [[[255, 255, 255], [200, 100, 50]]]
    assert abs(decoded(png(1, 1, 8, 3, b"\0\0", palette + chunk(b"tRNS", bytes([128])))) - [132, 137, 142]).max() <= 1


@pytest.mark.parametrize("mode, colour, wanted", [
    ("1", 1, (255,) * 3), ("1", 0, (0,) * 3), ("L", 7, (7,) * 3), ("LA", (0, 0), (255,) * 3), ("LA", (100, 255), (100,) * 3),
    ("RGBA", (1, 2, 3, 255), (1, 2, 3)), ("RGBA", (0, 0, 0, 0), (255,) * 3), ("RGBA", (255, 0, 0, 128), (255, 127, 127))])
def test_every_mode_becomes_rgb_on_white(mode, colour, wanted):
    assert (decoded(encoded(Image.new(mode, (5, 4), colour))) == wanted).all()


@pytest.mark.parametrize("ink, wanted", [((0, 0, 0, 0), (255, 255, 255)), ((0, 255, 255, 0), (255, 0, 0)), ((255, 0, 255, 0), (0, 255, 0)),
                                         ((0, 0, 0, 255), (0, 0, 0))])
def test_cmyk_is_not_inverted_with_adobes_mark_nor_without(ink, wanted):
    adobe = encoded(Image.new("CMYK", (16, 16), ink), "JPEG", quality=100)                    # stored inverted, as Adobe does, and marked so
    assert abs(decoded(adobe) - wanted).max() <= 2
    plain = encoded(Image.new("CMYK", (16, 16), tuple(255 - x for x in ink)), "JPEG", quality=100)      # stored: ink itself
    at = plain.index(b"\xff\xee")
    plain = plain[:at] + plain[at + 2 + int.from_bytes(plain[at + 2:at + 4], "big"):]
    assert abs(decoded(plain) - wanted).max() <= 2
    assert abs(decoded(encoded(Image.new("CMYK", (4, 4), ink), "TIFF")) - wanted).max() <= 2


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_seen(kind):
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "lime", "blue")]
    moving = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {}))
    assert (decoded(moving) == (255, 0, 0)).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_pictures_held_any_way_are_upright(kind, turn):
    upright = Image.new("RGB", (24, 16), "white")
    upright.paste("red", (0, 0, 12, 8))                                   # one red corner, top left
    back = {1: (), 2: (0,), 3: (3,), 4: (1,), 5: (5,), 6: (2,), 7: (6,), 8: (4,)}[turn]       # Pillow's number of the inverse
    stored, exif = upright, Image.Exif()
    for b in back:
        stored = stored.transpose(Image.Transpose(b))
    exif[0x0112] = turn
    how = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    found = decoded(encoded(stored, kind, exif=exif, **how))
    assert found.shape == (16, 24, 3) and abs(found[2, 2] - [255, 0, 0]).max() < 9 and found[13, 2].min() > 245 and found[2, 21].min() > 245


def test_damaged_exif_costs_the_rotation_not_the_picture():
    for exif in (b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0" + b"MM\0*\0\0\0\x08\xff\xff" + bytes(9)):
        assert (decoded(encoded(Image.new("RGB", (16, 16), "red"), "JPEG", exif=exif))[:, :, 0] > 250).all()


def test_what_a_file_holds_decides_not_what_it_is_called(tmp_path):
    for name, kind in (("a.jpg", "PNG"), ("b.png", "JPEG"), ("c.bmp", "WEBP"), ("d.JPEG", "GIF"), ("e.webp", "BMP")):
        (tmp_path / name).write_bytes(encoded(Image.new("RGB", (16, 16), "red"), kind))
        assert abs(np.asarray(read_image(tmp_path / name)).astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("width, height", [(1, 1), (3000, 4), (4, 3000), (1, 50000), (2, 1)])
def test_the_smallest_and_the_longest_can_be_cut(width, height):
    image = read_image(io.BytesIO(encoded(Image.new("RGB", (width, height), "red"))))
    views = [clean_view(lots(0, 1), image, 32), ssl_view(lots(0, 2), image, 16, (0.05, 0.32), 0, 0), adm_crop(image, 32), squash(image, 32)]
    assert [np.asarray(v).size for v in views] == [3072, 768, 3072, 3072] and np.asarray(views[2]).reshape(-1, 3).tolist() == [[255, 0, 0]] * 1024


def test_of_a_ribbon_the_middle_is_cut_before_it_is_enlarged():
    ribbon = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 400, 3), dtype=np.uint8))
    whole = ribbon.resize((3200, 32), Image.BICUBIC).crop((1584, 0, 1616, 32))
    assert abs(np.asarray(adm_crop(ribbon, 32)).astype(int) - np.asarray(whole)).max() <= 1
    assert adm_crop(Image.new("RGB", (2_000_000, 1)), 256).size == (256, 256)                 # enlarged whole, it would take 400 GB


def test_a_large_photograph_is_read_without_a_word_and_a_bomb_is_not_decoded():
    with warnings.catch_warnings(action="error"):
        assert read_image(io.BytesIO(encoded(Image.new("1", (10000, 9500))))).size == (10000, 9500)      # Pillow would warn from 89 million
        with pytest.raises(Image.DecompressionBombError):
            read_image(io.BytesIO(png(50000, 50000, 8, 0, b"")))          # there is nothing to decode: the header alone is refused


# ---- what is no picture

def broken():
    """{name: bytes} of files that hold no usable picture"""
    files = {f"half.{kind.lower()}": encoded(noise(), kind) for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")}
    files = {name: content[:len(content) // 2] for name, content in files.items()}
    body = bytearray(encoded(noise()))
    body[len(body) // 2:len(body) // 2 + 40] = bytes(40)
    return files | {"corrupt.png": bytes(body), "empty.jpg": b"", "text.jpg": b"no picture", "page.png": b"<!DOCTYPE html><html></html>",
                    "zeros.png": bytes(5000), "bomb.png": png(50000, 50000, 8, 0, b""), "none wide.png": png(0, 5, 8, 0, b"\0"), "head.jpg": b"\xff\xd8\xff",
                    "float.tiff": encoded(Image.new("F", (4, 4), 0.5), "TIFF"), "long.tif": encoded(Image.new("I", (4, 4), 70000), "TIFF"),
                    "script.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "portable.jpg": b"P6 1 1 255\n\1\2\3", "drawing.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>", "print.jpg": b"%PDF-1.4\n%%EOF", "two\nlines.png": b"", "caf\u00e9 \u6f22.png": b""}


@pytest.mark.parametrize("name", broken())
def test_no_picture_raises_the_same_sentence_each_time_and_warns_of_nothing(name):
    said = set()
    with warnings.catch_warnings(action="error"):
        for _ in range(2):
            with pytest.raises(Exception) as problem:
                read_image(io.BytesIO(broken()[name]))
            said.add(str(problem.value))
    assert len(said) == 1 and "0x" not in said.pop()                      # no address in memory: it is to be named once


@pytest.fixture
def zoo(tmp_path):
    """Twelve classes of 4 sound pictures, and everything else there is"""
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
    (tmp_path / "kind 3" / "notes.txt").write_text("left aside")
    (tmp_path / "stray.png").write_bytes(b"")
    os.mkfifo(tmp_path / "kind 5" / "pipe.png")
    for hidden in ("kind 4/._0.jpg", "kind 4/.DS_Store", ".cache"):
        (tmp_path / hidden).write_bytes(b"\0")
    (tmp_path / ".git").mkdir()
    (tmp_path / "nobody").mkdir()
    (tmp_path / "caf\u00e9_au_lait").mkdir()
    noise().save(tmp_path / "caf\u00e9_au_lait" / "0.png")
    return tmp_path


LOST = len(broken()) + 3             # and the undecodable name, the link, the pipe


def test_a_folder_of_everything_gives_the_sound_pictures_and_names_and_counts_the_rest(zoo, capsys):
    source = open_data(zoo, "val", whole=True)
    said = capsys.readouterr().out
    assert "2 files are left out" in said and "stray.png" in said and "1 of 14 classes have no picture here (nobody" in said
    assert len(source) == 48 + 1 + 1 + LOST and "caf\u00e9 au lait" in source.classes and ".git" not in source.classes
    assert sum(len(x) for x, _, _ in eval_batches(source, 16, 16, workers=1)) == 50
    said = capsys.readouterr().out
    names = [line for line in said.splitlines() if line.startswith("left out: ")]
    assert len(names) == LOST == len(set(names)) and f"{LOST} of {50 + LOST} pictures" in said
    for name in ("half.jpeg", "corrupt.png", "link.png", "bomb.png", r"two\nlines.png", r"bytes \udcff\udcfe.jpg", "caf\u00e9 \u6f22.png"):
        assert sum(name in line for line in names) == 1, name


def test_training_replaces_each_by_a_sound_one_on_every_rank_alike(zoo):
    def steps(rank=0, world=1):
        return Steps(open_data(zoo), None, 0, 8, 4, 8, clip=False, ssl=True, rec=True, image=16, local_image=8, n_local=1, patch=8, rank=rank, world=world)
    whole, left, right = steps(), steps(0, 2), steps(1, 2)
    bad = set()
    for s in range(10):
        a, b, c = whole[s], left[s], right[s]
        assert torch.equal(a["image"], torch.cat([b["image"], c["image"]])) and sorted(a["bad"]) == sorted(b["bad"] + c["bad"])
        bad |= set(a["bad"])
    assert 15 <= len(bad) <= LOST and all("\n" not in name for name in bad)                   # 80 draws of 72: nearly all are met, each by one name


def test_want_of_memory_and_ctrl_c_are_not_the_samples_fault(zoo, monkeypatch):
    steps = Steps(open_data(zoo), None, 0, 8, 4, 8, clip=False, ssl=False, rec=True, image=16, local_image=8, n_local=1, patch=8)
    for problem in (MemoryError, KeyboardInterrupt):
        def load(self, index, rng): raise problem
        monkeypatch.setattr(data.Folder, "load", load)
        with pytest.raises(problem):
            steps[0]
        with pytest.raises(problem):
            list(eval_batches(steps.source, 16, 4))


@pytest.mark.parametrize("language", [{"LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"LANG": "C", "PYTHONIOENCODING": "utf-8:strict"}])
def test_the_sheet_is_drawn_of_such_a_folder_in_any_language(zoo, tmp_path, language):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHON"))} | language
    run = subprocess.run([sys.executable, str(ROOT / "data.py"), "--data", str(zoo), "--out", str(tmp_path / "sheet.png"), "--image", "24", "--local-image", "12", "--patch", "12"],
                         capture_output=True, env=env, cwd=ROOT)
    assert run.returncode == 0 and b"Traceback" not in run.stderr and b"Warning" not in run.stderr, run.stderr.decode(errors="replace")
    assert b"caf\\xe9 au lait" in run.stdout or "caf\u00e9 au lait".encode() in run.stdout         # the class, and so its captions, is the same in any locale
    assert b"could not be read" in run.stdout and (tmp_path / "sheet.png").exists()


# ---- tars

def test_a_tar_that_breaks_in_a_member_gives_what_stands_before(tmp_path, capsys):
    whole = Path(tar_of(tmp_path / "x.tar", pairs(5))).read_bytes()
    header = 1024 * 2 * 4                                                 # where 0004.png begins: each member is one header and one block
    for cut, flaw in ((header + 512 + 30, "0004.png is cut off"), (header + 100, "breaks off"), (header, "breaks off")):
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        source = open_data(str(tmp_path / "cut.tar"))
        said = capsys.readouterr().out
        assert [source.load(i)[1] for i in range(len(source))] == [f"number {i}" for i in range(4)]
        assert "1 of 1 tars are damaged" in said and flaw in said and "cut.tar" in said
    (tmp_path / "cut.tar").write_bytes(whole + whole)
    assert len(open_data(str(tmp_path / "cut.tar"))) == 5 and "something follows" in capsys.readouterr().out
    (tmp_path / "cut.tar").write_bytes(whole[:header] + b"\xaa" * 512 + whole[header + 512:])           # a header overwritten: tarfile stops without a word
    assert len(open_data(str(tmp_path / "cut.tar"))) == 4 and "breaks off" in capsys.readouterr().out


@pytest.mark.parametrize("kind", [b"0", b"Z"])
def test_a_size_below_zero_does_not_send_the_walk_in_circles(tmp_path, kind, capsys):
    body = bytearray(Path(tar_of(tmp_path / "x.tar", pairs(2))).read_bytes())
    at = 2 * 1024                                                         # the header of 0001.png
    body[at + 124:at + 136] = b"\xff" * 10 + b"\xfa\x00"                  # -1536 in GNU's base 256: the next header would be 0000.txt, again and again
    body[at + 156:at + 157] = kind
    body[at + 148:at + 156] = b" " * 8
    body[at + 148:at + 156] = b"%06o\0 " % sum(body[at:at + 512])
    (tmp_path / "x.tar").write_bytes(body)
    assert len(open_data(str(tmp_path / "x.tar"))) == 1 and "damaged" in capsys.readouterr().out


def test_bad_tars_among_good_ones_are_named_counted_and_left_out(tmp_path, capsys):
    for n in (0, 1, 2, 4, 5, 6):
        tar_of(tmp_path / f"x-{n}.tar", pairs(2, 2 * n))
    (tmp_path / "x-1.tar").write_bytes(b"")
    (tmp_path / "x-5.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    source = open_data(str(tmp_path / "x-{0..6}.tar"))
    said = capsys.readouterr().out
    assert len(source) == 8 and "3 of 7 tars" in said and all(name in said for name in ("x-1.tar", "x-3.tar", "x-5.tar", "gunzip it"))
    with pytest.raises(ValueError, match="6 of the 9 tars .* cannot be read"):
        open_data(str(tmp_path / "x-{1..9}.tar"))


@pytest.mark.parametrize("content, reason", [(b"", "empty"), (bytes(10240), "holds no pairs"), (b"\x1f\x8b" + bytes(999), "gunzip"), (b"<html>" * 300, "header")])
def test_a_tar_that_is_none_says_why(tmp_path, content, reason):
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        open_data(str(tmp_path / "x.tar"))


def test_samples_that_lack_something_come_twice_or_are_links_are_left_out_and_counted(tmp_path, capsys):
    image = encoded(noise(8))
    tar = tar_of(tmp_path / "x.tar", [("a.png", image), ("a.txt", b"a"), ("a.png", encoded(noise(9))), ("lonely.png", image), ("void.txt", b"void"),
                                      ("void.png", b""), ("mute.txt", b""), ("mute.png", image), ("._b.png", b"\0"), ("._b.txt", b"\0"),
                                      ("c.TXT", b"c"), ("c.JPG", image)],
                 links=[("link.png", "/etc/passwd"), ("link.txt", "a.txt")])
    source = open_data(tar)
    assert "4 of 6 samples are left out" in capsys.readouterr().out                           # a's second picture, lonely, void, mute; a link is no file
    assert [source.load(i)[1] for i in range(len(source))] == ["a", "c"] and source.load(0)[0].size == (8, 8)


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_names_of_any_length_and_letters_are_read_in_place_and_nothing_is_written(tmp_path, format):
    names = ["x" * 300, "../../evil", "/tmp/absolute-vtp", "caf\u00e9 \u6f22", "a b/c d"]
    image = encoded(noise(8))
    tar = tar_of(tmp_path / "x.tar", [(f"{n}.{e}", c) for n in names for e, c in (("png", image), ("txt", n.encode()))], format=format)
    source = open_data(tar)
    assert [source.load(i)[1] for i in range(5)] == names and os.listdir(tmp_path) == ["x.tar"] and not Path("/tmp/absolute-vtp.png").exists()
    assert all(source.name(i).startswith(f"{tar}:") for i in range(5)) and source.name(4).endswith("a b/c d.png")


@pytest.mark.parametrize("raw, plain, wanted", [
    (b" a dog \r\n", True, "a dog"), ("\ufeffa caf\u00e9".encode(), True, "a caf\u00e9"), (b"caf\xe9", True, "caf\ufffd"), (b"a\0b", True, "a b"),
    (b"x" * 100_000, True, "x" * 2000), (b'{"caption": "a dog"}', False, "a dog"), (b'{"caption": "half \\ud800 a letter"}', False, "half ? a letter"),
    (b"", True, None), (b" \n", True, None), (b"{", False, None), (b"[]", False, None), (b"null", False, None), (b'{"text": "x"}', False, None),
    (b'{"caption": null}', False, None), (b'{"caption": ["a"]}', False, None), (b'{"caption": 7}', False, None), (b'{"caption": ""}', False, None),
    (b"[" * 100_000, False, None)])
def test_captions_are_words_or_the_pair_is_left_out(raw, plain, wanted):
    if wanted is None:
        with pytest.raises(Exception):
            read_caption(raw, plain)
    else:
        assert read_caption(raw, plain) == wanted


def test_a_pair_without_a_readable_caption_is_replaced_and_named_by_its_member(tmp_path):
    image = encoded(noise(16))
    tar = tar_of(tmp_path / "x.tar", [(f"{n}.{e}", c) for n, words in (("good", b'{"caption": "fine"}'), ("bad", b"{"), ("none", b"{}"))
                                      for e, c in (("png", image), ("json", words))])
    steps = Steps(open_data(tar), lambda texts: torch.ones(len(texts), 77, dtype=torch.long), 0, 6, 6, 6, clip=True, ssl=False, rec=False,
                  image=16, local_image=8, n_local=0, patch=8)
    out = steps[0]
    assert out["captions"] == ["fine"] * 6 and {name.split(" (")[0] for name in out["bad"]} == {f"{tar}:bad.png", f"{tar}:none.png"}


def test_an_index_that_cannot_be_kept_is_made_anew_and_says_so(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("VTP_CACHE", str(tmp_path / "file" / "below"))
    assert len(open_data(tar_of(tmp_path / "x.tar", pairs(2)))) == 2 and "set VTP_CACHE=DIR" in capsys.readouterr().out


def test_names_become_one_printable_line():
    assert shown("a\nb\t\x1b[31m\udcff caf\u00e9") == r"a\nb\t\x1b[31m\udcff caf" + "\u00e9"
