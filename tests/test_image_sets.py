"""The sets of images that a Frechet distance compares."""
import numpy as np
import pytest
import torch
from PIL import Image

from test_fid import chw, gaussian
from vtp_min.extras.image_sets import open_samples, save_statistics
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


def test_saved_statistics_are_read_back_with_their_number_of_images(tmp_path):
    mu, cov = statistics([gaussian(50, 6, 6, seed=1)])
    np.savez(tmp_path / "s.npz", arr_0=noise(50))
    save_statistics(tmp_path / "stats.npz", (mu, cov), open_samples(tmp_path / "s.npz"), "six")
    found = open_samples(tmp_path / "stats.npz")
    assert torch.equal(found.mu, mu) and torch.equal(found.sigma, cov)
    assert found.n == 50 and found.features == "six"
    assert found.name.endswith(f"saved statistics of {tmp_path / 's.npz'}")
    with pytest.raises(ValueError, match="6 numbers, but features of squeezenet have 512"):
        found.statistics(None, "squeezenet", "")
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
    ({"mu": np.array([np.nan, 0]), "sigma": np.eye(2)}, "not finite")])
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
    with pytest.raises(ValueError, match="000.png cannot be read as an image"):
        open_samples(broken)
    np.savez(tmp_path / "short.npz", arr_0=noise())
    (tmp_path / "short.npz").write_bytes((tmp_path / "short.npz").read_bytes()[:300])
    with pytest.raises(ValueError, match="is not an npz file"):
        open_samples(tmp_path / "short.npz")
