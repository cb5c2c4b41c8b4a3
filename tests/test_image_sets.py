"""The sets of images that a Frechet distance compares."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

from test_fid import chw, gaussian
from vtp_min.extras.image_sets import open_samples, save_statistics
from vtp_min.extras.images import read_image
from vtp_min.fid import frechet_distance, statistics


def noise(n=5, side=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def saved(folder, images, suffix="png", **settings):
    folder.mkdir(exist_ok=True)
    for k, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{k:03d}.{suffix}", **settings)
    return folder


def read(samples, size):
    return torch.cat(list(samples.batches(size)))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_folder_and_an_npz_give_the_same_images_in_batches_of_any_size(tmp_path, save):
    images = noise()
    save(tmp_path / "s.npz", arr_0=images, labels=np.arange(5))
    a, b = open_samples(saved(tmp_path / "png", images)), open_samples(tmp_path / "s.npz")
    assert a.n == b.n == 5 and a.size == b.size == (8, 8)
    assert a.labels is None and b.labels.tolist() == [0, 1, 2, 3, 4]
    for size in (1, 2, 9):
        assert torch.equal(read(a, size), chw(images)) and torch.equal(read(b, size), chw(images))


def test_two_processes_together_read_every_image_once(tmp_path, monkeypatch):
    images, halves = noise(), []
    np.savez(tmp_path / "s.npz", arr_0=images)
    for r in range(2):
        monkeypatch.setattr("vtp_min.dist.rank", lambda: r)
        monkeypatch.setattr("vtp_min.dist.world_size", lambda: 2)
        halves += [read(open_samples(tmp_path / "s.npz"), 2)]
    assert [len(h) for h in halves] == [2, 3] and torch.equal(torch.cat(halves), chw(images))


def test_a_folder_is_read_in_the_order_of_names_without_its_subfolders(tmp_path):
    images = noise(2)
    Image.fromarray(images[0]).save(tmp_path / "b.png")
    Image.fromarray(images[1]).save(tmp_path / "a.bmp")
    saved(tmp_path / "below", images)
    assert torch.equal(read(open_samples(tmp_path), 2), chw(images[::-1].copy()))


def test_samples_are_read_as_training_reads_images(tmp_path):
    """8 and 16 bits, CMYK, a palette with transparency, a rotated file and hidden files"""
    gray = noise()[..., 0]
    eight = saved(tmp_path / "8", gray)
    sixteen = saved(tmp_path / "16", gray.astype(np.uint16) * 257)
    pgm = saved(tmp_path / "pgm", gray.astype(np.uint16) * 257, "pgm")
    wanted = torch.from_numpy(gray)[:, None].expand(-1, 3, -1, -1)
    (sixteen / "._000.png").write_bytes(b"resource fork")          # as macOS writes it
    for folder in (eight, sixteen, pgm):
        assert open_samples(folder).n == 5 and torch.equal(read(open_samples(folder), 2), wanted)

    other = tmp_path / "other"
    other.mkdir()
    clear = Image.new("RGBA", (8, 6), (255, 0, 0, 0))
    clear.save(other / "clear.png")
    Image.new("CMYK", (8, 6), (0, 255, 255, 0)).save(other / "red.tif")
    turn = Image.Exif()
    turn[0x0112] = 6
    Image.new("RGB", (6, 8), (0, 0, 255)).save(other / "turned.png", exif=turn)
    samples = open_samples(other)
    assert samples.size == (8, 6)
    for image, file in zip(read(samples, 2), sorted(other.iterdir())):
        assert np.array_equal(image.permute(1, 2, 0), read_image(file))
    assert read(samples, 3)[:, :, 0, 0].tolist() == [[255, 255, 255], [255, 0, 0], [0, 0, 255]]


@pytest.mark.parametrize("image", [Image.new("F", (4, 4), 0.5), Image.new("I", (4, 4), 70000)])
def test_samples_without_a_defined_white_are_refused_by_name_before_the_computation(
        tmp_path, image):
    image.save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match="x.tif cannot be read .*replace or delete it"):
        open_samples(tmp_path)


def test_saved_statistics_are_read_back_with_their_number_of_images(tmp_path):
    mu, cov = statistics([gaussian(50, 6, 6, seed=1)])
    np.savez(tmp_path / "s.npz", arr_0=noise(50))
    save_statistics(tmp_path / "stats.npz", (mu, cov), open_samples(tmp_path / "s.npz"), "six")
    found = open_samples(tmp_path / "stats.npz")
    assert torch.equal(found.mu, mu) and torch.equal(found.sigma, cov)
    assert found.n == 50 and found.features == "six"
    assert found.name.endswith(f"saved statistics of {tmp_path / 's.npz'}")
    with pytest.raises(ValueError, match="6 numbers, but features of efficientnet have 1280"):
        found.statistics(None, "efficientnet", "")
    # like ADM's reference files: float32, with a few images, without their total number
    np.savez(tmp_path / "adm.npz", mu=mu.numpy().astype(np.float32),
             sigma=cov.numpy().astype(np.float32), arr_0=noise())
    adm = open_samples(tmp_path / "adm.npz")
    assert adm.n == 0 and frechet_distance(found.mu, found.sigma, adm.mu, adm.sigma) < 1e-4


@pytest.mark.parametrize("arrays, message", [
    ({"arr_0": noise().astype(np.float32)}, "float32 .*wanted uint8"),
    ({"arr_0": noise()[..., :1]}, r"wanted uint8 \(n, H, W, 3\)"),
    ({"arr_0": np.asfortranarray(noise())}, "column by column"),
    ({"images": noise()}, "contains images; wanted arr_0"),
    ({"mu": np.zeros(4), "sigma": np.zeros((4, 5))}, r"wanted \(F,\) and \(F, F\)"),
    ({"mu": np.zeros(2), "sigma": np.array([[1., 2], [0, 1]])}, "not symmetric"),
    ({"mu": np.array([np.nan, 0]), "sigma": np.eye(2)}, "not finite"),
    ({"mu": np.zeros(2), "sigma": -np.eye(2)}, "a diagonal of at least 0"),
    ({"mu": np.zeros(2), "sigma": np.eye(2), "n": np.ones(3)}, "x.npz cannot be read"),
    ({"mu": np.array(["a"]), "sigma": np.eye(1)}, "wanted numbers: mu"),
    ({"arr_0": noise()[:, :0]}, r"wanted uint8 \(n, H, W, 3\)")])
def test_an_npz_without_samples_is_rejected_with_an_explanation(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        open_samples(tmp_path / "x.npz")


def test_mixed_sizes_jpeg_damaged_and_missing_files_are_rejected_with_an_explanation(tmp_path):
    with pytest.raises(ValueError, match="contains no samples.npz and no images"):
        open_samples(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        open_samples(tmp_path / "x.npz")
    mixed = saved(tmp_path / "mixed", noise(2))
    Image.fromarray(noise(1, 9)[0]).save(mixed / "z.png")
    with pytest.raises(ValueError, match="2 sizes: 8x8 .000.png., 9x9 .z.png."):
        open_samples(mixed)
    lossy = saved(tmp_path / "lossy", noise(2), "jpg")
    with pytest.raises(ValueError, match="2 of 2 images .* are JPEG.*--set jpeg"):
        open_samples(lossy)
    assert "2 of them JPEG" in open_samples(lossy, jpeg=True).name
    broken = saved(tmp_path / "broken", noise(2))
    (broken / "000.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match="000.png cannot be read .* a skipped image would change"):
        open_samples(broken)
    (tmp_path / "x.npy").write_bytes(b"")
    with pytest.raises(ValueError, match="x.npy is a file, but not an npz; wanted a folder"):
        open_samples(tmp_path / "x.npy")


def damaged(whole):
    """{name: bytes} of damaged forms of an npz file, and of files that only have its name"""
    middle = len(whole) // 2
    return {"empty": b"", "short": whole[:300], "half": whole[:middle], "zeros": bytes(5000),
            "pointer": b"version https://git-lfs.github.com/spec/v1\n", "page": b"<html></html>",
            "middle": whole[:middle] + bytes(40) + whole[middle + 40:]}


@pytest.mark.parametrize("kind", damaged(b""))
@pytest.mark.parametrize("arrays", [
    {"arr_0": noise(20)}, {"mu": np.ones(40), "sigma": np.ones((40, 40))}],
    ids=["images", "statistics"])
def test_a_damaged_npz_is_named_with_what_to_do(tmp_path, arrays, kind):
    np.savez(tmp_path / "x.npz", **arrays)
    whole = (tmp_path / "x.npz").read_bytes()
    (tmp_path / "x.npz").write_bytes(damaged(whole)[kind])
    with pytest.raises(ValueError, match="x.npz cannot be read .*; copy it again, or write it"):
        read(open_samples(tmp_path / "x.npz"), 3)


def test_an_array_file_named_npz_and_a_pickle_are_refused(tmp_path):
    with open(tmp_path / "x.npz", "wb") as file:
        np.save(file, noise())
    np.savez(tmp_path / "y.npz", arr_0=noise(), labels=np.array([{}] * 5, object))
    for name in ("x.npz", "y.npz"):
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            open_samples(tmp_path / name)


@pytest.mark.parametrize("labels", [
    np.zeros(4, int), np.eye(5), np.zeros((5, 1)), np.arange(5) + 0.5, np.full(5, np.nan),
    np.array(["cat"] * 5)], ids=str)
@pytest.mark.parametrize("name", ["labels", "arr_1"])
def test_an_array_that_is_not_one_label_per_image_is_left_out_with_a_message(
        tmp_path, capsys, name, labels):
    np.savez(tmp_path / "x.npz", arr_0=noise(), **{name: labels})
    assert open_samples(tmp_path / "x.npz").labels is None
    assert f"{name} is left out" in capsys.readouterr().out


def test_whole_numbers_of_any_type_are_labels(tmp_path):
    for kind in (np.int32, np.uint8, np.float32, bool):
        np.savez(tmp_path / "x.npz", arr_0=noise(), labels=np.array([0, 1, 1, 0, 1], kind))
        assert open_samples(tmp_path / "x.npz").labels.tolist() == [0, 1, 1, 0, 1]


def test_the_protocol_of_samples_is_that_of_their_own_labels_json(tmp_path):
    for name in ("samples", "other"):
        np.savez(tmp_path / f"{name}.npz", arr_0=noise())
    summary = {"protocol": "Euler", "classes": ["cat"], "labels": [0] * 5}
    (tmp_path / "labels.json").write_text(json.dumps(summary))
    assert open_samples(tmp_path).origin() == "Euler"
    assert open_samples(tmp_path / "other.npz").origin() == str(tmp_path / "other.npz")
    for text in ("", '{"proto', "[1]", '{"labels": [["a.png", 3]]}'):
        (tmp_path / "labels.json").write_text(text)
        with pytest.raises(ValueError, match="labels.json cannot be read .*; move it"):
            open_samples(tmp_path)
