"""FID's network and distance, the judge that stands in for it offline, PSNR and SSIM."""
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from data import ASSETS
from vtp_min.fid import (Inception, Judge, SqueezeNet, frechet_distance, kept_judge, load_inception, load_squeezenet, open_samples, psnr, save_statistics, ssim,
                         statistics, train_judge)
from vtp_min.weights import find

GOLDEN = np.load(Path(__file__).parent / "golden" / "fid.npz")


def drawn_inception():
    """Inception with weights that any implementation can draw: each key seeds a generator by its own crc32, scaled so that the signal survives."""
    model, drawn = Inception(), {}
    for key, x in model.state_dict().items():
        n = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(tuple(x.shape))
        if key.endswith("num_batches_tracked"):
            n = np.zeros(())
        elif key.endswith("bn.weight"):
            n = 1 + 0.1 * n
        elif key.endswith("running_var"):
            n = 1 + 0.1 * abs(n)
        elif key.endswith(("bias", "running_mean")):
            n = 0.1 * n
        else:
            n = n * np.sqrt(2 / np.prod(n.shape[1:]))
        drawn[key] = torch.from_numpy(np.asarray(n)).to(x.dtype)
    model.load_state_dict(drawn)
    return model


@pytest.fixture(scope="module")
def inception(): return drawn_inception()


def chw(images): return torch.from_numpy(images).permute(0, 3, 1, 2)
def gaussian(rows, dim, rank, seed): return torch.randn(rows, rank, generator=torch.Generator().manual_seed(seed)).double() @ \
    torch.randn(rank, dim, generator=torch.Generator().manual_seed(seed + 1)).double()


# ---- Inception

def test_inception_has_the_566_keys_and_shapes_of_the_published_checkpoint(inception):
    lines = "\n".join(f"{key} {list(x.shape)}" for key, x in sorted(inception.state_dict().items()))
    assert len(inception.state_dict()) == 566 and zlib.crc32(lines.encode()) == 2082931000


def test_inception_gives_the_features_of_pytorch_fid(inception):
    assert abs(inception(chw(GOLDEN["images"])).numpy() - GOLDEN["pool"]).max() < 1e-5


def test_inception_gives_the_features_of_pytorch_fid_at_every_size(inception):
    if "VTP_GOLDEN" not in os.environ:
        pytest.skip("VTP_GOLDEN does not name the folder of the full golden sets")
    full = np.load(Path(os.environ["VTP_GOLDEN"]) / "fid_inception_features.npz")
    for size in ("64x64", "256x256", "299x299", "400x320"):
        assert abs(inception(chw(full[f"{size}/images_uint8_nhwc"])).numpy() - full[f"{size}/pool3_2048_f64"]).max() < 1e-5


def test_shrinking_by_three_sees_only_every_third_pixel_because_fid_does_not_antialias(inception):
    small = torch.randint(256, (1, 3, 299, 299), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    large = torch.zeros(1, 3, 897, 897, dtype=torch.uint8)
    large[..., 1::3, 1::3] = small
    assert torch.allclose(inception(large), inception(small), atol=1e-5)


def test_inception_asks_for_uint8(inception):
    with pytest.raises(ValueError, match="uint8"):
        inception(torch.rand(1, 3, 64, 64))


def test_load_inception_forgives_missing_counters_and_nothing_else(inception, tmp_path, monkeypatch):
    monkeypatch.setattr("vtp_min.fid.find", lambda name: tmp_path / f"{name}.pth")
    weights = {k: v for k, v in inception.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(weights, tmp_path / "inception.pth")
    assert torch.equal(load_inception().fc.weight, weights["fc.weight"])
    torch.save({k: v for k, v in weights.items() if k != "fc.bias"}, tmp_path / "inception.pth")
    with pytest.raises(ValueError, match="fc.bias"):
        load_inception()


# ---- SqueezeNet

@pytest.fixture
def squeezenet():
    try:
        find("squeezenet")
    except FileNotFoundError as problem:
        pytest.skip(str(problem))
    return load_squeezenet()


def random_squeezenet():
    torch.manual_seed(0)
    return SqueezeNet()


def test_squeezenet_has_the_published_count_of_parameters_and_512_features_of_any_picture():
    net = random_squeezenet()
    assert sum(p.numel() for p in net.parameters()) == 1_248_424                     # Iandola et al. 2016, Table 1, and its biases
    img = torch.randint(256, (3, 3, 40, 70), dtype=torch.uint8)
    assert net.grid(img).shape == (3, 512, 13, 13) and net(img).shape == (3, 512) and net.logits(img).shape == (3, 1000) and not net.training


def test_features_of_a_picture_do_not_depend_on_its_neighbours():
    net, img = random_squeezenet(), torch.randint(256, (5, 3, 64, 64), dtype=torch.uint8)
    assert torch.allclose(net(img), torch.cat([net(x) for x in img.split(1)]), rtol=1e-5, atol=1e-6)


def test_squeezenet_sees_blue_first_around_caffes_mean():
    net = random_squeezenet()
    mean = torch.tensor([123, 117, 104], dtype=torch.uint8)[:, None, None].expand(1, 3, 8, 8)      # red, green, blue
    seen = []
    net.conv1.register_forward_pre_hook(lambda layer, x: seen.append(x[0]))
    net(mean), net(mean + torch.tensor([0, 0, 9], dtype=torch.uint8)[:, None, None])
    assert seen[0].shape == (1, 3, 227, 227) and seen[0].abs().max() < 1e-4 and torch.allclose(seen[1].mean((0, 2, 3)), torch.tensor([9., 0, 0]), atol=1e-4)


def test_squeezenet_shrinks_pictures_as_pil_does():
    net, seen = random_squeezenet(), []
    net.conv1.register_forward_pre_hook(lambda layer, x: seen.append(x[0]))
    img = noise(1, 300)[0]
    net(torch.from_numpy(img).permute(2, 0, 1)[None])
    pil = torch.from_numpy(np.array(Image.fromarray(img).resize((227, 227), Image.BILINEAR))).permute(2, 0, 1).flip(0) - torch.tensor([104., 117, 123])[:, None, None]
    assert (seen[0][0] - pil).abs().max() < 1.01                                     # PIL rounds twice


def test_load_squeezenet_takes_half_precision_and_every_layer(tmp_path, monkeypatch):
    monkeypatch.setattr("vtp_min.fid.find", lambda name: tmp_path / f"{name}.npz")
    weights = {k: v.numpy().astype(np.float16) for k, v in random_squeezenet().state_dict().items()}
    np.savez(tmp_path / "squeezenet.npz", **weights)
    assert torch.equal(load_squeezenet().conv10.weight, torch.from_numpy(weights["conv10.weight"]).float())
    np.savez(tmp_path / "squeezenet.npz", **{k: v for k, v in weights.items() if k != "conv10.bias"})
    with pytest.raises(RuntimeError, match="conv10.bias"):
        load_squeezenet()


def test_the_real_squeezenet_gives_the_features_it_gave(squeezenet):
    x = squeezenet(chw(GOLDEN["images"][:1]))
    assert torch.allclose(x[0, :4], torch.tensor([0.0812554, 2.204534, 41.73498, 0]), rtol=1e-4, atol=1e-5)


def test_the_real_squeezenet_names_photographs(squeezenet):
    """VTP_PHOTOS: a folder of ImageNet pictures, a folder a class, named by WordNet id"""
    if "VTP_PHOTOS" not in os.environ:
        pytest.skip("VTP_PHOTOS names no folder of ImageNet pictures")
    files, ids = sorted(Path(os.environ["VTP_PHOTOS"]).glob("n*/*")), (ASSETS / "imagenet_wnids.txt").read_text().split()
    right = 0
    for file in files:
        with Image.open(file) as image:
            right += squeezenet.logits(chw(np.array(image.convert("RGB"))[None])).argmax().item() == ids.index(file.parent.name)
    assert right / len(files) > 0.5                                                  # 59.5 % of 200 were right; chance is 0.1 %


# ---- the distance

def test_statistics_are_numpys_and_do_not_depend_on_the_batch_size():
    x = torch.from_numpy(GOLDEN["dim8/x1"])
    for size in (1, 7, 500):
        mu, cov = statistics(x.split(size))
        assert np.allclose(mu, GOLDEN["dim8/mu1"], rtol=1e-12) and np.allclose(cov, GOLDEN["dim8/sigma1"], rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match="at least 2"):
        statistics([x[:1]])


def test_frechet_distance_is_that_of_pytorch_fid():
    given = [GOLDEN[f"dim8/{name}"] for name in ("mu1", "sigma1", "mu2", "sigma2")]
    assert np.isclose(frechet_distance(*given), GOLDEN["dim8/distance"], rtol=1e-10)


def test_frechet_distance_of_a_shifted_gaussian_is_the_squared_shift():
    mu, cov = statistics([gaussian(200, 16, 16, seed=0)])
    shift = torch.arange(16.) / 10
    assert np.isclose(frechet_distance(mu, cov, mu + shift, cov), shift.square().sum(), rtol=1e-6)


def test_frechet_distance_of_commuting_gaussians_compares_standard_deviations():
    a, b = torch.tensor([4., 1, 0, 9]), torch.tensor([1., 0, 2, 16])
    zero = torch.zeros(4)
    assert np.isclose(frechet_distance(zero, a.diag(), zero, b.diag()), (a.sqrt() - b.sqrt()).square().sum(), rtol=1e-6)


def test_frechet_distance_is_exact_symmetric_and_zero_on_itself_with_fewer_samples_than_dimensions():
    x, y = gaussian(20, 300, 300, seed=2), gaussian(30, 300, 300, seed=4)
    X, Y = statistics([x]), statistics([y])
    overlap = torch.linalg.svdvals((x - x.mean(0)) @ (y - y.mean(0)).T).sum() / (19 * 29) ** 0.5     # never forms a covariance
    exact = (X[0] - Y[0]).square().sum() + X[1].trace() + Y[1].trace() - 2 * overlap
    assert np.isclose(frechet_distance(*X, *Y), exact, rtol=1e-9)
    assert np.isclose(frechet_distance(*Y, *X), exact, rtol=1e-9)
    assert frechet_distance(*X, *X) < 1e-9 * X[1].trace()


def test_frechet_distance_to_a_point_is_the_trace():
    mu, cov = statistics([gaussian(50, 5, 5, seed=6)])
    assert np.isclose(frechet_distance(mu, cov, mu, torch.zeros(5, 5)), cov.trace())


# ---- the judge

def stripes(n, seed):
    """Two classes: horizontal and vertical stripes, in noise."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    wave = (torch.arange(32) // 4 % 2 * 120.)
    images = torch.where(labels.bool()[:, None, None, None], wave[None, None, None, :], wave[None, None, :, None])
    return (images + torch.rand(n, 3, 32, 32, generator=draw) * 100).to(torch.uint8), labels


def test_the_judge_learns_to_tell_stripes_from_bars():
    judge, accuracy = train_judge(*stripes(64, 0), 2, *stripes(40, 1), steps=30, batch=16, progress=False)
    assert accuracy == 1
    features, logits = judge(stripes(4, 2)[0])
    assert features.shape == (4, 256) and logits.shape == (4, 2) and not judge.training


def test_the_same_seed_trains_the_same_judge_and_leaves_the_callers_random_numbers_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two, other = (train_judge(*stripes(16, 0), 2, *stripes(4, 1), steps=3, batch=8, seed=seed, progress=False)[0] for seed in (0, 0, 1))
    assert torch.equal(one.head.weight, two.head.weight) and not torch.equal(one.head.weight, other.head.weight)
    assert torch.equal(before, torch.get_rng_state())


def test_a_judge_reads_any_side_from_32_to_96():
    judge = Judge(3).eval()
    for side in (32, 48, 96):
        assert judge(torch.zeros(1, 3, side, side, dtype=torch.uint8))[0].shape == (1, 256)


# ---- PSNR and SSIM

def pair():
    r = torch.arange(2 * 3 * 24 * 20).reshape(2, 3, 24, 20)
    return r * 37 % 101 / 100, (r * 37 % 101 + r * 13 % 7) / 107


def test_psnr_of_a_constant_offset_is_known():
    a = torch.full((3, 3, 8, 8), 0.25)
    assert torch.allclose(psnr(a, a + torch.tensor([0.1, 0.01, 0.5])[:, None, None, None]), torch.tensor([20., 40, 6.0206]), atol=1e-4)
    assert psnr(a, a).isinf().all()


def test_psnr_is_the_protocols_on_255_values():
    a, b = pair()
    assert torch.allclose(psnr(a, b), 10 * (255 ** 2 / F.mse_loss(255 * a, 255 * b, reduction="none").mean((1, 2, 3))).log10())


def test_ssim_of_an_image_with_itself_is_one_and_the_measure_is_symmetric():
    a, b = pair()
    assert torch.allclose(ssim(a, a), torch.ones(2)) and torch.allclose(ssim(a, b), ssim(b, a)) and (ssim(a, b) < 1).all()


def test_ssim_is_that_of_torchmetrics():
    assert torch.allclose(ssim(*pair()), torch.tensor([0.9954416, 0.9954490]), atol=1e-6)          # torchmetrics 1.9.0


def test_ssim_of_two_flat_images_compares_their_means():
    a, b = torch.full((1, 3, 16, 16), 0.2), torch.full((1, 3, 16, 16), 0.6)
    assert torch.allclose(ssim(a, b), torch.tensor((2 * 0.2 * 0.6 + 1e-4) / (0.2 ** 2 + 0.6 ** 2 + 1e-4)), atol=1e-3)


# ---- what is compared

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
def test_a_folder_and_an_npz_give_the_same_pictures_in_any_batches(tmp_path, save):
    images = noise()
    save(tmp_path / "s.npz", arr_0=images, labels=np.arange(5))
    a, b = open_samples(saved(tmp_path / "png", images)), open_samples(tmp_path / "s.npz")
    assert len(a) == len(b) == 5 and a.size == b.size == (8, 8) and a.labels is None and b.labels.tolist() == [0, 1, 2, 3, 4]
    for size in (1, 2, 9):
        assert torch.equal(read(a, size), chw(images)) and torch.equal(read(b, size), chw(images))


def test_two_processes_read_halves_that_make_the_whole(tmp_path, monkeypatch):
    images, halves = noise(), []
    np.savez(tmp_path / "s.npz", arr_0=images)
    for r in range(2):
        monkeypatch.setattr("vtp_min.fid.rank", lambda: r)
        monkeypatch.setattr("vtp_min.fid.world", lambda: 2)
        halves += [read(open_samples(tmp_path / "s.npz"), 2)]
    assert [len(h) for h in halves] == [2, 3] and torch.equal(torch.cat(halves), chw(images))


def test_a_folder_is_read_in_the_order_of_names_and_not_below_itself(tmp_path):
    images = noise(2)
    Image.fromarray(images[0]).save(tmp_path / "b.png")
    Image.fromarray(images[1]).save(tmp_path / "a.bmp")
    saved(tmp_path / "below", images)
    assert torch.equal(read(open_samples(tmp_path), 2), chw(images[::-1].copy()))


def test_statistics_come_back_as_they_were_saved_and_say_how_many(tmp_path):
    mu, cov = statistics([gaussian(50, 6, 6, seed=1)])
    save_statistics(tmp_path / "stats.npz", mu, cov, 50, "fifty of them")
    found = open_samples(tmp_path / "stats.npz")
    assert torch.equal(found.mu, mu) and torch.equal(found.sigma, cov) and len(found) == 50
    assert found.what.endswith("saved statistics of fifty of them")
    with pytest.raises(ValueError, match="6 numbers, but features of squeezenet are 512"):
        found.moments("squeezenet")
    np.savez(tmp_path / "adm.npz", mu=mu.numpy().astype(np.float32), sigma=cov.numpy().astype(np.float32), arr_0=noise())       # as ADM's reference files
    assert len(open_samples(tmp_path / "adm.npz")) == 0 and frechet_distance(found.mu, found.sigma, *(getattr(open_samples(tmp_path / "adm.npz"), k) for k in ("mu", "sigma"))) < 1e-4


@pytest.mark.parametrize("held, told", [
    ({"arr_0": noise().astype(np.float32)}, "float32 .*wanted uint8"),
    ({"arr_0": noise()[..., :1]}, r"wanted uint8 \(n, H, W, 3\)"),
    ({"arr_0": np.asfortranarray(noise())}, "column by column"),
    ({"images": noise()}, "holds images; wanted arr_0"),
    ({"mu": np.zeros(4), "sigma": np.zeros((4, 5))}, r"wanted \(F,\) and \(F, F\)"),
    ({"mu": np.zeros(2), "sigma": np.array([[1., 2], [0, 1]])}, "no covariance"),
    ({"mu": np.array([np.nan, 0]), "sigma": np.eye(2)}, "not finite")])
def test_an_npz_that_is_no_samples_is_refused_in_a_sentence(tmp_path, held, told):
    np.savez(tmp_path / "x.npz", **held)
    with pytest.raises(ValueError, match=told):
        open_samples(tmp_path / "x.npz")


def test_mixed_sizes_jpeg_damage_and_nothing_are_refused_in_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="holds no samples.npz and no pictures"):
        open_samples(tmp_path)
    with pytest.raises(ValueError, match="there is no"):
        open_samples(tmp_path / "x.npz")
    mixed = saved(tmp_path / "mixed", noise(2))
    Image.fromarray(noise(1, 9)[0]).save(mixed / "z.png")
    with pytest.raises(ValueError, match="2 sizes: 8x8 .000.png., 9x9 .z.png."):
        open_samples(mixed)
    lossy = saved(tmp_path / "lossy", noise(2), "jpg")
    with pytest.raises(ValueError, match="2 of 2 pictures .* are JPEG.*--jpeg"):
        open_samples(lossy)
    assert "2 of them JPEG" in open_samples(lossy, jpeg=True).what
    broken = saved(tmp_path / "broken", noise(2))
    (broken / "000.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="000.png cannot be read as a picture"):
        open_samples(broken)
    np.savez(tmp_path / "short.npz", arr_0=noise())
    (tmp_path / "short.npz").write_bytes((tmp_path / "short.npz").read_bytes()[:300])
    with pytest.raises(ValueError, match="is no npz"):
        open_samples(tmp_path / "short.npz")


def test_a_kept_judge_is_trained_once_and_anew_for_other_pictures(tmp_path):
    asked = []
    def pictures():
        asked.append(1)
        return *stripes(16, 0), *stripes(8, 1)
    first, accuracy = kept_judge(tmp_path / "judge.safetensors", {"data": "stripes"}, 2, pictures, 2, "cpu")
    again, same = kept_judge(tmp_path / "judge.safetensors", {"data": "stripes"}, 2, pictures, 2, "cpu")
    assert len(asked) == 1 and accuracy == same and torch.equal(first.head.weight, again.head.weight)
    kept_judge(tmp_path / "judge.safetensors", {"data": "bars"}, 2, pictures, 2, "cpu")
    assert len(asked) == 2
