"""LPIPS as a loss: a distance between images, with frozen weights, on inputs of the right scale."""
import pytest
import torch
import torchvision
from torch import nn

from vtp_min.extras import perceptual
from vtp_min.extras.perceptual import Perceptual


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
    white = (torch.ones(1, 3, 32, 32) - lpips.mean) / lpips.std
    black = -lpips.mean / lpips.std * torch.ones(1, 3, 32, 32)
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
