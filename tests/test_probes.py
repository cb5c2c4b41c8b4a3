"""Zero-shot, linear and nearest-neighbour probes on features whose accuracy is known beforehand."""
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms as T
from PIL import Image
from torch.nn import functional as F

from vtp_min import VTPConfig, VTPModel
from vtp_min.probes import RATES, Part, augmented, fit, knn, last_layer, last_layers, linear_probe, sgd_probe, zero_shot, zero_shot_classifier
from vtp_min.views import centre_crop

GOLDEN = {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parent / "golden" / "zero_shot.npz").items()}


def clouds(n, n_classes=3, dim=8, spread=0.1, seed=0):
    """Classes as well separated clouds around the coordinate axes."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % n_classes
    return F.one_hot(y, dim).float() + spread * torch.randn(n, dim, generator=draw), y


def noise(n, dim=8, n_classes=4, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=draw), torch.randint(n_classes, (n,), generator=draw)


# ---- zero-shot

def test_the_zero_shot_classifier_and_its_accuracy_are_open_clips():
    C, n_templates, _ = GOLDEN["text"].shape
    table = {f"{t} {c}": GOLDEN["text"][c, t] for c in range(C) for t in range(n_templates)}
    W = zero_shot_classifier(lambda texts: torch.stack([table[t] for t in texts]), [str(c) for c in range(C)], [f"{t} {{}}" for t in range(n_templates)])
    assert torch.allclose(W, GOLDEN["classifier"], atol=1e-6)
    assert torch.allclose(100 * F.normalize(GOLDEN["image"], dim=-1) @ W, GOLDEN["logits"], atol=1e-4)
    found = zero_shot(GOLDEN["image"], W, GOLDEN["target"])
    assert found == {"top1": GOLDEN["top1"].item(), "top5": GOLDEN["top5"].item()}


def test_zero_shot_is_right_when_each_image_is_its_caption_whatever_the_lengths():
    W = torch.eye(6)
    images = W * torch.arange(1, 7)[:, None]
    assert zero_shot(images, W, torch.arange(6)) == {"top1": 1, "top5": 1}
    assert zero_shot(-images, W, torch.arange(6)) == {"top1": 0, "top5": 0}


def test_top5_of_four_classes_is_not_reported_because_it_is_always_right():
    assert zero_shot(torch.eye(4), torch.eye(4), torch.arange(4)) == {"top1": 1}


# ---- linear probe

def test_the_linear_probe_is_perfect_on_separable_clouds():
    assert linear_probe(*clouds(300), *clouds(90, seed=1), n_classes=3)["accuracy"] == 1


def test_the_linear_probe_is_at_chance_on_random_labels():
    found = linear_probe(*noise(400), *noise(2000, seed=1), n_classes=4)
    assert abs(found["accuracy"] - 1 / 4) < 4 * (0.25 * 0.75 / 2000) ** 0.5 + 0.01


def test_the_linear_probe_does_not_care_about_the_features_units_and_is_the_same_every_time():
    train, test = clouds(200, spread=0.5), clouds(200, spread=0.5, seed=1)
    units = torch.logspace(-3, 3, 8)
    one, again = (linear_probe(*train, *test, n_classes=3) for _ in range(2))
    scaled = linear_probe(train[0] * units + 1, train[1], test[0] * units + 1, test[1], n_classes=3)
    assert one == again and one["accuracy"] > 0.7
    assert abs(one["accuracy"] - scaled["accuracy"]) <= 0.01


def test_the_linear_probe_never_chooses_by_the_test_set():
    train, (x, y) = clouds(200, spread=0.5), clouds(200, spread=0.5, seed=1)
    right, wrong = linear_probe(*train, x, y, n_classes=3), linear_probe(*train, x, (y + 1) % 3, n_classes=3)
    assert (right["l2"], right["held_out"]) == (wrong["l2"], wrong["held_out"])


def test_the_fit_is_a_minimum_where_the_gradient_vanishes():
    x, y = noise(200)
    W = fit(x, y, 4, l2=0.01).requires_grad_()
    (F.cross_entropy(x @ W[:-1] + W[-1], y) + 0.005 * W[:-1].square().sum()).backward()
    assert W.grad.abs().max() < 1e-4


def test_the_linear_probe_refuses_a_handful_of_images():
    with pytest.raises(ValueError, match="at least 20"):
        linear_probe(*clouds(9), *clouds(9), n_classes=3)


# ---- kNN

def test_the_nearest_neighbour_of_a_training_image_is_itself():
    x, y = noise(100)
    assert knn(x, y, x, y, n_classes=4, k=1) == 1


def test_knn_with_equal_votes_is_the_majority_class():
    x, y = torch.ones(10, 4), torch.tensor([0] * 3 + [1] * 7)
    assert knn(x, y, x, y, n_classes=2, k=10) == 0.7


def test_near_neighbours_outvote_many_far_ones_only_at_low_temperature():
    train = torch.tensor([[1., 0], [0.5, 0.75 ** 0.5], [0.5, 0.75 ** 0.5]])                          # cosines 1, 1/2, 1/2 to the test image
    y, x = torch.tensor([0, 1, 1]), torch.tensor([[1., 0]])
    assert knn(train, y, x, y[:1], 2, k=3, temperature=0.07) == 1                                   # e^(1/2T) > 2
    assert knn(train, y, x, y[:1], 2, k=3, temperature=2.0) == 0                                    # e^(1/2T) < 2


def test_knn_does_not_depend_on_chunks_and_refuses_more_neighbours_than_images():
    train, test = clouds(60, spread=0.6), clouds(50, spread=0.6, seed=1)
    assert knn(*train, *test, n_classes=3, k=5, chunk=7) == knn(*train, *test, n_classes=3, k=5)
    with pytest.raises(ValueError, match="smaller k"):
        knn(*train, *test, n_classes=3, k=61)


# ---- many linear heads by SGD

def jittered(iterations, kinds, n=24, n_classes=3, seed=0):
    """The same clouds, jittered anew each iteration, seen through feature sets of several widths"""
    for t in range(iterations):
        x, y = clouds(n, n_classes, 8, 0.3, seed + t)
        yield {kind: x[:, :width] for kind, width in kinds.items()}, y


def test_heads_trained_together_are_those_that_torchs_sgd_trains_alone():
    kinds, rates, iterations = {"a": 8, "b": 5}, (0.5, 20.0), 7
    test, y = clouds(60, seed=99, spread=0.5)
    found = sgd_probe(jittered(iterations, kinds), iterations, 3, {"val": ({k: test[:, :w] for k, w in kinds.items()}, y)}, every=iterations, rates=rates)["val"]
    draw = torch.Generator().manual_seed(0)
    for kind, width in kinds.items():
        start = (0.01 * torch.randn(width + 1, 6, generator=draw)).view(width + 1, 2, 3)
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
            assert found[kind][0, r] == (head(test[:, :width]).argmax(1) == y).double().mean()


def test_heads_learn_clouds_and_the_released_code_has_thirteen_rates():
    x, y = clouds(90, seed=5, spread=0.3)
    found = sgd_probe(jittered(40, {"all": 8}), 40, 3, {"val": ({"all": x}, y)}, every=20)["val"]["all"]
    assert found.shape == (2, 13) and found.max() > 0.9 and RATES[:4] == (1e-5, 2e-5, 5e-5, 1e-4) and RATES[-2:] == (0.05, 0.1)


class Squares:
    """Pictures 0 to 6, picture k of colour 30 k and label k; picture 3 cannot be read"""
    spec = "squares"
    def __len__(self): return 7
    def name(self, index): return f"square {index}"
    def load(self, index, rng=None):
        if index == 3:
            raise OSError("damaged")
        return Image.fromarray(np.tile(np.linspace(0, 30 * index, 20).astype(np.uint8)[None, :, None], (24, 1, 3))), "", int(index)


def test_rows_of_two_processes_are_the_rows_of_one_and_an_epoch_shows_every_picture(capsys):
    whole = [augmented(Squares(), 8, 7, 0, range(7), step) for step in range(2)]
    for images, labels in whole:
        assert images.shape == (7, 3, 8, 8) and images.dtype == torch.uint8 and {0, 1, 2, 4, 5, 6} <= set(labels.tolist())
    assert "skipped square 3 (damaged)" in capsys.readouterr().out
    halves = [augmented(Squares(), 8, 7, 0, rows, 0) for rows in (range(3), range(3, 7))]
    assert all(torch.equal(torch.cat(both), one) for both, one in zip(zip(*halves), whole[0]))
    assert not torch.equal(whole[0][1], whole[1][1]) and not torch.equal(augmented(Squares(), 8, 7, 1, range(7), 0)[0], whole[0][0])
    part = Part(Squares(), np.array([5, 2]))
    assert len(part) == 2 and part.load(1)[2] == 2 and part.name(0) == "square 5" and part.spec == "squares"


@pytest.mark.parametrize("size", [(60, 40), (33, 47), (28, 90), (32, 32)])
def test_the_centre_crop_is_torchvision_s_resize_256_and_centre_crop_224_at_any_scale(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    theirs = T.CenterCrop(28)(T.Resize(32, interpolation=T.InterpolationMode.BICUBIC)(image))
    assert np.array_equal(np.asarray(centre_crop(image, 28)), np.asarray(theirs))


def test_probed_layers_are_the_released_code_s_and_the_latent_is_the_mean_of_the_grid():
    torch.manual_seed(0)
    model, x = VTPModel(VTPConfig.of_size("nano", image=24, patch=12)).eval(), torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        found, layers = last_layers(model, x), model.get_intermediate_layers_feature(x, 4, return_class_token=True)
        last = model.get_last_layer_feature(x)
        assert found["n4"].shape == (2, 5 * 192) and found["n1"].shape == (2, 2 * 192)
        assert torch.allclose(found["n1"], torch.cat([last["cls_token"], last["patch_tokens"].mean(1)], 1), atol=1e-6)
        assert torch.allclose(found["n4"][:, :192], layers[0][1]) and torch.allclose(found["n4"][:, -192:], layers[3][0].mean(1))
        assert torch.allclose(found["latent"], model.get_reconstruction_latents(x).mean((2, 3)), atol=1e-6)
        assert torch.allclose(last_layer(model, x)["latent"], found["latent"], atol=1e-6) and torch.allclose(last_layer(model, x)["full"], found["n1"])
