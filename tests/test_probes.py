"""Zero-shot, linear and nearest-neighbour probes on features with a known accuracy."""
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from vtp_min.probes import knn, linear_probe, logistic_regression, zero_shot, zero_shot_classifier

ARRAYS = np.load(Path(__file__).parent / "golden" / "zero_shot.npz")
GOLDEN = {key: torch.from_numpy(x) for key, x in ARRAYS.items()}


def clouds(n, n_classes=3, dim=8, spread=0.1, seed=0):
    """Features (n, dim) and labels (n,): class c is a cloud around the unit vector of axis c"""
    rng = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % n_classes
    return F.one_hot(y, dim).float() + spread * torch.randn(n, dim, generator=rng), y


def noise(n, dim=8, n_classes=4, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=rng), torch.randint(n_classes, (n,), generator=rng)


# ---- zero-shot

def test_the_zero_shot_classifier_and_its_accuracy_equal_those_of_open_clip():
    C, n_templates, _ = GOLDEN["text"].shape
    table = {f"{t} {c}": GOLDEN["text"][c, t] for c in range(C) for t in range(n_templates)}
    names, templates = [str(c) for c in range(C)], [f"{t} {{}}" for t in range(n_templates)]
    W = zero_shot_classifier(lambda texts: torch.stack([table[t] for t in texts]), names, templates)
    assert torch.allclose(W, GOLDEN["classifier"], atol=1e-6)
    logits = 100 * F.normalize(GOLDEN["image"], dim=-1) @ W
    assert torch.allclose(logits, GOLDEN["logits"], atol=1e-4)
    found = zero_shot(GOLDEN["image"], W, GOLDEN["target"])
    assert found == {"top1": GOLDEN["top1"].item(), "top5": GOLDEN["top5"].item()}


def test_zero_shot_is_perfect_if_each_image_is_parallel_to_its_caption():
    W = torch.eye(6)
    images = W * torch.arange(1, 7)[:, None]
    assert zero_shot(images, W, torch.arange(6)) == {"top1": 1, "top5": 1}
    assert zero_shot(-images, W, torch.arange(6)) == {"top1": 0, "top5": 0}


def test_top5_of_four_classes_is_not_reported_because_it_is_always_right():
    assert zero_shot(torch.eye(4), torch.eye(4), torch.arange(4)) == {"top1": 1}


def test_zero_shot_classification_with_one_class_is_refused():
    with pytest.raises(ValueError, match="only one class"):
        zero_shot(torch.eye(4)[:, :3], torch.ones(3, 1), torch.zeros(4, dtype=torch.long))


# ---- linear probe

def test_the_linear_probe_is_perfect_on_separable_clouds():
    assert linear_probe(*clouds(300), *clouds(90, seed=1), n_classes=3)["accuracy"] == 1


def test_the_linear_probe_is_at_chance_on_random_labels():
    found = linear_probe(*noise(400), *noise(2000, seed=1), n_classes=4)
    assert abs(found["accuracy"] - 1 / 4) < 4 * (0.25 * 0.75 / 2000) ** 0.5 + 0.01


def test_the_linear_probe_does_not_depend_on_the_scale_of_features_and_is_deterministic():
    train, test = clouds(200, spread=0.5), clouds(200, spread=0.5, seed=1)
    units = torch.logspace(-3, 3, 8)
    one, again = (linear_probe(*train, *test, n_classes=3) for _ in range(2))
    scaled = linear_probe(train[0] * units + 1, train[1], test[0] * units + 1, test[1], 3)
    assert one == again and one["accuracy"] > 0.7
    assert abs(one["accuracy"] - scaled["accuracy"]) <= 0.01


def test_the_linear_probe_does_not_choose_its_penalty_on_the_test_set():
    train, (x, y) = clouds(200, spread=0.5), clouds(200, spread=0.5, seed=1)
    right = linear_probe(*train, x, y, n_classes=3)
    wrong = linear_probe(*train, x, (y + 1) % 3, n_classes=3)
    assert (right["l2"], right["held_out"]) == (wrong["l2"], wrong["held_out"])


def test_the_gradient_is_zero_at_the_solution_of_logistic_regression():
    x, y = noise(200)
    W = logistic_regression(x, y, 4, l2=0.01).requires_grad_()
    (F.cross_entropy(x @ W[:-1] + W[-1], y) + 0.005 * W[:-1].square().sum()).backward()
    assert W.grad.abs().max() < 1e-4


def test_the_linear_probe_raises_for_too_few_images():
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
    # cosines 1, 1/2, 1/2 to the test image
    train = torch.tensor([[1., 0], [0.5, 0.75 ** 0.5], [0.5, 0.75 ** 0.5]])
    y, x = torch.tensor([0, 1, 1]), torch.tensor([[1., 0]])
    assert knn(train, y, x, y[:1], 2, k=3, temperature=0.07) == 1       # e^(1/2T) > 2
    assert knn(train, y, x, y[:1], 2, k=3, temperature=2.0) == 0        # e^(1/2T) < 2


def test_knn_does_not_depend_on_chunks_and_raises_for_more_neighbours_than_images():
    train, test = clouds(60, spread=0.6), clouds(50, spread=0.6, seed=1)
    whole = knn(*train, *test, n_classes=3, k=5)
    assert knn(*train, *test, n_classes=3, k=5, chunk=7) == whole
    with pytest.raises(ValueError, match="smaller k"):
        knn(*train, *test, n_classes=3, k=61)
