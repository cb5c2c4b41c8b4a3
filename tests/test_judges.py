"""The networks that replace Inception: SqueezeNet and a classifier trained on the user's data."""
import json
import os
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from test_fid import GOLDEN, chw
from test_image_sets import noise
from vtp_min.augment import ASSETS
from vtp_min.extras.image_sets import open_samples
from vtp_min.extras.judges import (Classifier, SqueezeNet, check_fid_args, check_labels,
                                   load_or_train_classifier, load_squeezenet, train_classifier)
from vtp_min.extras.weights import find


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


def test_squeezenet_has_the_published_number_of_parameters_and_512_features():
    net = random_squeezenet()
    # Iandola et al. 2016, Table 1, plus the biases
    assert sum(p.numel() for p in net.parameters()) == 1_248_424
    img = torch.randint(256, (3, 3, 40, 70), dtype=torch.uint8)
    assert net.grid(img).shape == (3, 512, 13, 13) and net(img).shape == (3, 512)
    assert net.logits(img).shape == (3, 1000) and not net.training


def test_features_of_an_image_do_not_depend_on_the_rest_of_the_batch():
    net, img = random_squeezenet(), torch.randint(256, (5, 3, 64, 64), dtype=torch.uint8)
    assert torch.allclose(net(img), torch.cat([net(x) for x in img.split(1)]), rtol=1e-5, atol=1e-6)


def test_the_input_of_squeezenet_is_bgr_minus_caffes_mean():
    net = random_squeezenet()
    mean = torch.tensor([123, 117, 104], dtype=torch.uint8)             # red, green, blue
    mean = mean[:, None, None].expand(1, 3, 8, 8)
    seen = []
    net.conv1.register_forward_pre_hook(lambda layer, x: seen.append(x[0]))
    net(mean), net(mean + torch.tensor([0, 0, 9], dtype=torch.uint8)[:, None, None])
    assert seen[0].shape == (1, 3, 227, 227) and seen[0].abs().max() < 1e-4
    assert torch.allclose(seen[1].mean((0, 2, 3)), torch.tensor([9., 0, 0]), atol=1e-4)


def test_squeezenet_resizes_images_as_pil_does():
    net, seen = random_squeezenet(), []
    net.conv1.register_forward_pre_hook(lambda layer, x: seen.append(x[0]))
    img = noise(1, 300)[0]
    net(torch.from_numpy(img).permute(2, 0, 1)[None])
    pil = np.array(Image.fromarray(img).resize((227, 227), Image.BILINEAR))
    pil = torch.from_numpy(pil).permute(2, 0, 1).flip(0)
    pil = pil - torch.tensor([104., 117, 123])[:, None, None]
    assert (seen[0][0] - pil).abs().max() < 1.01                        # PIL rounds twice


def test_load_squeezenet_accepts_half_precision_and_needs_every_layer(tmp_path, monkeypatch):
    monkeypatch.setattr("vtp_min.extras.judges.find", lambda name: tmp_path / f"{name}.npz")
    weights = {k: v.numpy().astype(np.float16) for k, v in random_squeezenet().state_dict().items()}
    np.savez(tmp_path / "squeezenet.npz", **weights)
    loaded = load_squeezenet().conv10.weight
    assert torch.equal(loaded, torch.from_numpy(weights["conv10.weight"]).float())
    del weights["conv10.bias"]
    np.savez(tmp_path / "squeezenet.npz", **weights)
    with pytest.raises(RuntimeError, match="conv10.bias"):
        load_squeezenet()


def test_the_features_of_the_real_squeezenet_are_the_recorded_ones(squeezenet):
    x = squeezenet(chw(GOLDEN["images"][:1]))
    known = torch.tensor([0.0812554, 2.204534, 41.73498, 0])
    assert torch.allclose(x[0, :4], known, rtol=1e-4, atol=1e-5)


def test_the_real_squeezenet_classifies_photographs(squeezenet):
    """VTP_PHOTOS: a folder of ImageNet images, one folder per class, named by WordNet id"""
    if "VTP_PHOTOS" not in os.environ:
        pytest.skip("VTP_PHOTOS is not set to a folder of ImageNet images")
    files = sorted(Path(os.environ["VTP_PHOTOS"]).glob("n*/*"))
    ids = (ASSETS / "imagenet_wnids.txt").read_text().split()
    n_correct = 0
    for file in files:
        with Image.open(file) as image:
            logits = squeezenet.logits(chw(np.array(image.convert("RGB"))[None]))
        n_correct += logits.argmax().item() == ids.index(file.parent.name)
    # 59.5 % of 200 images were correct; chance is 0.1 %
    assert n_correct / len(files) > 0.5


# ---- the classifier

def stripes(n, seed):
    """Two classes: horizontal and vertical stripes, with noise"""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    wave = (torch.arange(32) // 4 % 2 * 120.)
    vertical = labels.bool()[:, None, None, None]
    images = torch.where(vertical, wave[None, None, None, :], wave[None, None, :, None])
    return (images + torch.rand(n, 3, 32, 32, generator=rng) * 100).to(torch.uint8), labels


def test_the_classifier_learns_to_distinguish_horizontal_and_vertical_stripes():
    model, accuracy = train_classifier(*stripes(64, 0), 2, *stripes(40, 1), steps=30, batch=16,
                                       progress=False)
    assert accuracy == 1
    images, labels = stripes(4, 2)
    features, logits = model(images)
    assert features.shape == (4, 256) and logits.shape == (4, 2) and not model.training
    assert torch.equal(features, model.features(images))
    assert torch.equal(labels, model.predict(images))


def trained(seed):
    return train_classifier(*stripes(16, 0), 2, *stripes(4, 1), steps=3, batch=8, seed=seed,
                            progress=False)[0]


def test_the_same_seed_trains_the_same_classifier_and_keeps_the_callers_random_state():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two, other = trained(0), trained(0), trained(1)
    assert torch.equal(one.head.weight, two.head.weight)
    assert not torch.equal(one.head.weight, other.head.weight)
    assert torch.equal(before, torch.get_rng_state())


def test_a_classifier_accepts_images_of_32_to_96_pixels():
    model = Classifier(3).eval()
    for side in (32, 48, 96):
        images = torch.zeros(1, 3, side, side, dtype=torch.uint8)
        assert model(images)[0].shape == (1, 256)


def test_a_stored_classifier_is_trained_once_and_again_for_other_images(tmp_path):
    calls = []

    def images():
        calls.append(1)
        return *stripes(16, 0), *stripes(8, 1)

    def classifier_of(data):
        return load_or_train_classifier(tmp_path / "judge.safetensors", {"data": data}, 2, images,
                                        2, "cpu")
    first, accuracy = classifier_of("stripes")
    again, same = classifier_of("stripes")
    assert len(calls) == 1 and accuracy == same
    assert torch.equal(first.head.weight, again.head.weight)
    classifier_of("bars")
    assert len(calls) == 2


@pytest.mark.parametrize("content", [
    b"", bytes(100), b"half", b"version https://git-lfs.github.com/spec/v1\n", None])
def test_a_damaged_or_foreign_classifier_is_trained_again_with_a_message(
        tmp_path, capsys, content):
    path = tmp_path / "judge.safetensors"

    def classifier():
        images = [*stripes(16, 0), *stripes(8, 1)]
        return load_or_train_classifier(path, {"data": "stripes"}, 2, lambda: images, 2, "cpu")
    first, _ = classifier()
    if content is None:                                    # of another program: no metadata
        save_file({"x": torch.zeros(3)}, path)
    else:
        path.write_bytes(path.read_bytes()[:500] if content == b"half" else content)
    capsys.readouterr()
    again, _ = classifier()
    said = capsys.readouterr().out
    assert "training the classifier" in said
    assert content is None or "judge.safetensors cannot be read" in said
    assert torch.equal(first.head.weight, again.head.weight)


# ---- the arguments of eval.py fid

def fid_args(**changes):
    return Namespace(**{"few": True, "run": "RUN", "data": None, "save_stats": None,
                        "save_real": None, "features": "classifier"} | changes)


def samples_with(tmp_path, labels, name="x.npz"):
    np.savez(tmp_path / name, arr_0=noise(4), labels=labels)
    return open_samples(tmp_path / name)


@pytest.mark.parametrize("labels, kept", [
    ([0, 1, 2, 0], True), ([0, 1, 2, 3], False), ([-1, 0, 0, 0], False), ([999] * 4, False)])
def test_labels_that_are_no_classes_are_left_out_before_the_computation(
        tmp_path, capsys, labels, kept):
    train = Namespace(classes=["a", "b", "c"], spec="DATA")
    samples = samples_with(tmp_path, labels)
    check_labels(fid_args(features="squeezenet"), samples, train)      # reads no labels
    assert samples.labels is not None
    check_labels(fid_args(), samples, train)
    assert (samples.labels is not None) == kept
    assert ("not those of the 3 classes of DATA" in capsys.readouterr().out) != kept


def test_labels_of_classes_with_other_names_are_left_out(tmp_path, capsys):
    summary = {"protocol": "Euler", "classes": ["a", "x"], "labels": [0, 1, 0, 1]}
    (tmp_path / "labels.json").write_text(json.dumps(summary))
    for classes in (["a", "x"], ["a", "b"]):
        samples = samples_with(tmp_path, [0, 1, 0, 1], "samples.npz")
        check_labels(fid_args(), samples, Namespace(classes=classes, spec="DATA"))
        assert (samples.labels is not None) == (classes == ["a", "x"])
    assert "names other classes" in capsys.readouterr().out


@pytest.mark.parametrize("value, told", [
    ("stats", "ends in .npz"), (5, "ends in .npz"), ("x.npz", "is not overwritten"),
    ("x.npz/y.npz", "cannot be written")])
@pytest.mark.parametrize("name", ["save_stats", "save_real"])
def test_a_file_for_statistics_is_checked_before_the_computation(tmp_path, name, value, told):
    samples = samples_with(tmp_path, [0] * 4)
    path = value if value == 5 else str(tmp_path / value)
    with pytest.raises(ValueError, match=told) as error:
        check_fid_args(fid_args(**{name: path}), samples, None)
    assert f"--set {name}" in str(error.value)
    check_fid_args(fid_args(**{name: str(tmp_path / "new" / "y.npz")}), samples, None)
