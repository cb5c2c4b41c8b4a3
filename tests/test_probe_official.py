"""The linear probe of the released code: many linear heads trained by SGD on augmented crops."""
import numpy as np
import pytest
import torch
import torchvision.transforms as T
from PIL import Image
from torch.nn import functional as F

from test_probes import clouds
from vtp_min import VTPConfig, VTPModel
from vtp_min.augment import center_crop
from vtp_min.extras.probe_official import (RATES, Subset, augmented_batch, official_features,
                                           sgd_probe)
from vtp_min.probes import probe_features


def jittered(iterations, kinds, n=24, n_classes=3, seed=0):
    """Gaussian clouds with new noise in each iteration; each kind of features is the first `width`
    columns"""
    for t in range(iterations):
        x, y = clouds(n, n_classes, 8, 0.3, seed + t)
        yield {kind: x[:, :width] for kind, width in kinds.items()}, y


def test_heads_trained_together_equal_heads_trained_one_by_one_with_torchs_sgd():
    kinds, rates, iterations = {"a": 8, "b": 5}, (0.5, 20.0), 7
    test, y = clouds(60, seed=99, spread=0.5)
    features = {kind: test[:, :width] for kind, width in kinds.items()}
    found = sgd_probe(jittered(iterations, kinds), iterations, 3, {"val": (features, y)},
                      every=iterations, rates=rates)["val"]
    rng = torch.Generator().manual_seed(0)
    for kind, width in kinds.items():
        start = (0.01 * torch.randn(width + 1, 6, generator=rng)).view(width + 1, 2, 3)
        for r, rate in enumerate(rates):
            head = torch.nn.Linear(width, 3)
            with torch.no_grad():
                head.weight.copy_(start[:-1, r].T)
                head.bias.zero_()
            opt = torch.optim.SGD(head.parameters(), rate * 24 / 256, momentum=0.9, weight_decay=0)
            decay = torch.optim.lr_scheduler.CosineAnnealingLR(opt, iterations)
            for x, labels in jittered(iterations, kinds):
                opt.zero_grad()
                F.cross_entropy(head(x[kind]), labels).backward()
                opt.step()
                decay.step()
            correct = head(test[:, :width]).argmax(1) == y
            assert found[kind][0, r] == correct.double().mean()


def test_heads_learn_to_classify_clouds_and_there_are_thirteen_rates():
    x, y = clouds(90, seed=5, spread=0.3)
    sets = {"val": ({"all": x}, y)}
    found = sgd_probe(jittered(40, {"all": 8}), 40, 3, sets, every=20)["val"]["all"]
    assert found.shape == (2, 13) and found.max() > 0.9
    assert RATES[:4] == (1e-5, 2e-5, 5e-5, 1e-4) and RATES[-2:] == (0.05, 0.1)


class Squares:
    """A data source of 7 images: image k is a ramp from 0 to 30 k with label k; image 3 cannot be
    read"""
    spec = "squares"

    def __len__(self):
        return 7

    def name(self, index):
        return f"square {index}"

    def load(self, index, rng=None):
        if index == 3:
            raise OSError("damaged")
        line = np.linspace(0, 30 * index, 20).astype(np.uint8)
        return Image.fromarray(np.tile(line[None, :, None], (24, 1, 3))), "", int(index)


def test_two_processes_get_the_rows_of_one_and_an_epoch_contains_every_image(capsys):
    whole = [augmented_batch(Squares(), 8, 7, 0, range(7), step) for step in range(2)]
    for images, labels in whole:
        assert images.shape == (7, 3, 8, 8) and images.dtype == torch.uint8
        assert {0, 1, 2, 4, 5, 6} <= set(labels.tolist())
    assert "skipped square 3 (damaged)" in capsys.readouterr().out
    halves = [augmented_batch(Squares(), 8, 7, 0, rows, 0) for rows in (range(3), range(3, 7))]
    for both, one in zip(zip(*halves), whole[0]):
        assert torch.equal(torch.cat(both), one)
    assert not torch.equal(whole[0][1], whole[1][1])
    other_seed = augmented_batch(Squares(), 8, 7, 1, range(7), 0)
    assert not torch.equal(other_seed[0], whole[0][0])
    subset = Subset(Squares(), np.array([5, 2]))
    assert len(subset) == 2 and subset.load(1)[2] == 2
    assert subset.name(0) == "square 5" and subset.spec == "squares"


@pytest.mark.parametrize("size", [(60, 40), (33, 47), (28, 90), (32, 32)])
def test_the_center_crop_is_torchvision_s_resize_256_and_center_crop_224_at_any_scale(size):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    theirs = T.CenterCrop(28)(T.Resize(32, interpolation=T.InterpolationMode.BICUBIC)(image))
    assert np.array_equal(np.asarray(center_crop(image, 28)), np.asarray(theirs))


def test_features_are_the_layers_of_the_released_code_and_the_mean_latent():
    torch.manual_seed(0)
    model = VTPModel(VTPConfig.of_size("nano", image=24, patch=12)).eval()
    x = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        found, ours = official_features(model, x), probe_features(model, x)
        layers = model.get_intermediate_layers_feature(x, 4, return_class_token=True)
        last = model.get_last_layer_feature(x)
        latent = model.get_reconstruction_latents(x).mean((2, 3))
    n1 = torch.cat([last["cls_token"], last["patch_tokens"].mean(1)], 1)
    assert found["n4"].shape == (2, 5 * 192) and found["n1"].shape == (2, 2 * 192)
    assert torch.allclose(found["n1"], n1, atol=1e-6) and torch.allclose(ours["full"], n1)
    assert torch.allclose(found["n4"][:, :192], layers[0][1])
    assert torch.allclose(found["n4"][:, -192:], layers[3][0].mean(1))
    assert torch.allclose(found["latent"], latent, atol=1e-6)
    assert torch.allclose(ours["latent"], latent, atol=1e-6)
