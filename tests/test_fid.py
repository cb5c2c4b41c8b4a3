"""The network and the distance of FID, PSNR and SSIM."""
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from vtp_min.fid import Inception, frechet_distance, load_inception, psnr, ssim, statistics

GOLDEN = np.load(Path(__file__).parent / "golden" / "fid.npz")


def drawn_inception():
    """Inception with random weights that any implementation can reproduce: the crc32 of each key
    seeds its generator. The scale keeps activations from vanishing with depth."""
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
def inception():
    return drawn_inception()


def chw(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def gaussian(rows, dim, rank, seed):
    """-> (rows, dim) matrix of the given rank"""
    a = torch.randn(rows, rank, generator=torch.Generator().manual_seed(seed)).double()
    b = torch.randn(rank, dim, generator=torch.Generator().manual_seed(seed + 1)).double()
    return a @ b


# ---- Inception

def test_inception_has_the_566_keys_and_shapes_of_the_published_checkpoint(inception):
    keys = sorted(inception.state_dict().items())
    lines = "\n".join(f"{key} {list(x.shape)}" for key, x in keys)
    assert len(keys) == 566 and zlib.crc32(lines.encode()) == 2082931000


def test_inception_gives_the_features_of_pytorch_fid(inception):
    found = inception(chw(GOLDEN["images"]))
    assert found.dtype == torch.float32 and abs(found.numpy() - GOLDEN["pool"]).max() < 1e-5


def test_inception_gives_the_features_of_pytorch_fid_at_every_size(inception):
    if "VTP_GOLDEN" not in os.environ:
        pytest.skip("VTP_GOLDEN does not name the folder of the full golden sets")
    full = np.load(Path(os.environ["VTP_GOLDEN"]) / "fid_inception_features.npz")
    for size in ("64x64", "256x256", "299x299", "400x320"):
        found = inception(chw(full[f"{size}/images_uint8_nhwc"])).numpy()
        assert abs(found - full[f"{size}/pool3_2048_f64"]).max() < 1e-5


def test_shrinking_by_three_reads_only_every_third_pixel_because_fid_does_not_antialias(inception):
    rng = torch.Generator().manual_seed(0)
    small = torch.randint(256, (1, 3, 299, 299), dtype=torch.uint8, generator=rng)
    large = torch.zeros(1, 3, 897, 897, dtype=torch.uint8)
    large[..., 1::3, 1::3] = small
    assert torch.allclose(inception(large), inception(small), atol=1e-5)


def test_inception_raises_unless_images_are_uint8(inception):
    with pytest.raises(ValueError, match="uint8"):
        inception(torch.rand(1, 3, 64, 64))


def test_inception_is_frozen(inception):
    assert not inception.training and not any(p.requires_grad for p in inception.parameters())


def test_load_inception_accepts_missing_counters_and_no_other_missing_key(
        inception, tmp_path, monkeypatch):
    monkeypatch.setattr("vtp_min.extras.weights.find", lambda name: tmp_path / f"{name}.pth")
    weights = {key: x for key, x in inception.state_dict().items()
               if not key.endswith("num_batches_tracked")}
    torch.save(weights, tmp_path / "inception.pth")
    assert torch.equal(load_inception().fc.weight, weights["fc.weight"])
    del weights["fc.bias"]
    torch.save(weights, tmp_path / "inception.pth")
    with pytest.raises(ValueError, match="fc.bias"):
        load_inception()


# ---- the distance

def test_statistics_equal_numpys_and_do_not_depend_on_the_batch_size():
    x = torch.from_numpy(GOLDEN["dim8/x1"])
    for size in (1, 7, 500):
        mu, cov = statistics(x.split(size))
        assert np.allclose(mu, GOLDEN["dim8/mu1"], rtol=1e-12)
        assert np.allclose(cov, GOLDEN["dim8/sigma1"], rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match="at least 2"):
        statistics([x[:1]])


def test_frechet_distance_equals_that_of_pytorch_fid():
    given = [GOLDEN[f"dim8/{name}"] for name in ("mu1", "sigma1", "mu2", "sigma2")]
    assert np.isclose(frechet_distance(*given), GOLDEN["dim8/distance"], rtol=1e-10)


def test_frechet_distance_of_a_shifted_gaussian_is_the_squared_shift():
    mu, cov = statistics([gaussian(200, 16, 16, seed=0)])
    shift = torch.arange(16.) / 10
    found = frechet_distance(mu, cov, mu + shift, cov)
    assert np.isclose(found, shift.square().sum(), rtol=1e-6)


def test_frechet_distance_of_commuting_gaussians_compares_standard_deviations():
    a, b = torch.tensor([4., 1, 0, 9]), torch.tensor([1., 0, 2, 16])
    zero = torch.zeros(4)
    found = frechet_distance(zero, a.diag(), zero, b.diag())
    assert np.isclose(found, (a.sqrt() - b.sqrt()).square().sum(), rtol=1e-6)


def test_frechet_distance_is_exact_and_symmetric_with_fewer_samples_than_dimensions():
    x, y = gaussian(20, 300, 300, seed=2), gaussian(30, 300, 300, seed=4)
    X, Y = statistics([x]), statistics([y])
    # the exact value, computed without covariances
    products = (x - x.mean(0)) @ (y - y.mean(0)).T
    overlap = torch.linalg.svdvals(products).sum() / (19 * 29) ** 0.5
    exact = (X[0] - Y[0]).square().sum() + X[1].trace() + Y[1].trace() - 2 * overlap
    assert np.isclose(frechet_distance(*X, *Y), exact, rtol=1e-9)
    assert np.isclose(frechet_distance(*Y, *X), exact, rtol=1e-9)
    assert frechet_distance(*X, *X) < 1e-9 * X[1].trace()


def test_frechet_distance_to_a_point_is_the_trace():
    mu, cov = statistics([gaussian(50, 5, 5, seed=6)])
    assert np.isclose(frechet_distance(mu, cov, mu, torch.zeros(5, 5)), cov.trace())


# ---- PSNR and SSIM

def pair():
    r = torch.arange(2 * 3 * 24 * 20).reshape(2, 3, 24, 20)
    return r * 37 % 101 / 100, (r * 37 % 101 + r * 13 % 7) / 107


def test_psnr_of_a_constant_offset_is_known():
    a = torch.full((3, 3, 8, 8), 0.25)
    offset = torch.tensor([0.1, 0.01, 0.5])[:, None, None, None]
    assert torch.allclose(psnr(a, a + offset), torch.tensor([20., 40, 6.0206]), atol=1e-4)
    assert psnr(a, a).isinf().all()


def test_psnr_equals_the_protocols_psnr_on_values_up_to_255():
    a, b = pair()
    mse = F.mse_loss(255 * a, 255 * b, reduction="none").mean((1, 2, 3))
    assert torch.allclose(psnr(a, b), 10 * (255 ** 2 / mse).log10())


def test_ssim_of_an_image_with_itself_is_one_and_the_measure_is_symmetric():
    a, b = pair()
    assert torch.allclose(ssim(a, a), torch.ones(2))
    assert torch.allclose(ssim(a, b), ssim(b, a)) and (ssim(a, b) < 1).all()


def test_ssim_equals_that_of_torchmetrics():
    expected = torch.tensor([0.9954416, 0.9954490])                     # torchmetrics 1.9.0
    assert torch.allclose(ssim(*pair()), expected, atol=1e-6)


def test_ssim_of_two_flat_images_compares_their_means():
    a, b = torch.full((1, 3, 16, 16), 0.2), torch.full((1, 3, 16, 16), 0.6)
    exact = (2 * 0.2 * 0.6 + 1e-4) / (0.2 ** 2 + 0.6 ** 2 + 1e-4)
    assert torch.allclose(ssim(a, b), torch.tensor(exact), atol=1e-3)
