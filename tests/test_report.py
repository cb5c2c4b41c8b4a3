"""The report: its computations are correct, and its page is one file for every kind of run."""
import json
import re
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from data import Shapes, eval_batches, open_data
from tokenizer import get_tokenizer
from vtp_min import VTPConfig, VTPModel, vit
from vtp_min.extras import commands, report
from vtp_min.extras.report import (alternating_order, class_attention, figure, format_number,
                                   image_saver, metrics_table, nearest_neighbours, pca_rgb,
                                   previews, resize, samples)
from vtp_min.extras.previews import preview_path

write_report = partial(report.write_report, open_data=open_data, eval_batches=eval_batches,
                       get_tokenizer=get_tokenizer)
# weights of clip, ssl, rec
MIXES = {"CLIP + SSL + AE": (1, 1, 0.1), "CLIP + AE": (1, 0, 0.1), "SSL + AE": (0, 1, 0.1),
         "AE": (0, 0, 0.1), "CLIP": (1, 0, 0)}


def make_model(clip=1, ssl=0, rec=0.1):
    torch.manual_seed(0)
    config = VTPConfig.of_size("nano", image=16, patch=8, latent_dim=4, clip=clip > 0, rec=rec > 0)
    config.vision_depth = config.decoder_depth = config.text_depth = 2
    config.text_vocab_size = 49408 if clip else 8
    return VTPModel(config).eval()


def make_run(folder, clip=1, ssl=1, rec=0.1, data="shapes", val_data=None, **more):
    """A run folder as train.py writes it, with an untrained model"""
    make_model(clip, ssl, rec).save_pretrained(folder)
    settings = dict(w_clip=clip, w_ssl=ssl, w_rec=rec, data=data, val_data=val_data, size="nano",
                    batch=16, batch_ssl=8, batch_rec=8, steps=40, lr=1e-3, seed=0,
                    machine="cpu, fp32", prototypes=1024, perceptual="none", clip_loss="clip",
                    clip_grad=3.0)
    log = []
    for step in range(1, 9):
        line = {"step": step, "loss": 9 - step / 9, "grad_norm": 3.0, "lr": 1e-3,
                "perceptual": "none", "images_per_s": 50.0}
        if clip:
            line["clip"] = 2.7
        if ssl:
            line |= {"dino": "nan", "ibot": 3.4, "teacher_entropy": 6.0, "feature_std": 0.9}
        log.append(line)
    (folder / "run.json").write_text(json.dumps(settings | more))
    write_lines(folder / "log.jsonl", log)
    return folder


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


# ---- attention

def test_the_attention_of_the_class_token_is_that_of_the_last_block(monkeypatch):
    """If the values are one-hot vectors, the output of attention is its weights."""
    model, img, found = make_model(), torch.randn(3, 3, 16, 24), []
    attention = vit.attention

    def spy(q, k, v, causal=False):
        one_hot = torch.eye(k.shape[2]).expand(*k.shape[:2], -1, -1)
        found.append(attention(q, k, one_hot))
        return attention(q, k, v, causal)

    monkeypatch.setattr(vit, "attention", spy)
    with torch.no_grad():
        model.trunk(img)
        weights = class_attention(model.trunk, img)
    last = found[model.config.vision_depth - 1]                     # (3, H, 1+N, 1+N)
    assert weights.shape == (3, 3, 1 + 2 * 3)
    assert torch.allclose(weights, last[:, :, 0], atol=1e-6)
    assert torch.allclose(weights.sum(-1), torch.ones(3, 3), atol=1e-6)


# ---- principal components, neighbours

def test_three_components_explain_three_dimensional_features_and_colours_are_in_0_to_1():
    x = torch.randn(2, 4, 5, 3) @ torch.randn(3, 20) + 7
    rgb, explained = pca_rgb(x)
    assert rgb.shape == (2, 3, 4, 5) and rgb.min() == 0 and rgb.max() == 1
    assert explained == pytest.approx(1)


def test_red_is_the_first_component_and_colours_are_invariant_to_shift_and_scale():
    ramp = torch.linspace(-1, 1, 16).view(1, 4, 4, 1)
    x = torch.cat([10 * ramp, ramp.roll(5, 1), ramp.roll(3, 2)], -1)
    red = pca_rgb(x)[0][0, 0].flatten()
    assert (red.diff() >= 0).all()
    assert torch.allclose(pca_rgb(3 * x + 2)[0], pca_rgb(x)[0], atol=1e-5)


def test_equal_features_have_finite_colours():
    rgb, explained = pca_rgb(torch.ones(2, 3, 3, 8))
    assert rgb.isfinite().all() and explained == 0


def test_nearest_neighbours_are_other_images_in_the_order_of_their_distance():
    x = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    assert nearest_neighbours(x, k=2).tolist() == [[1, 2], [0, 2], [1, 0], [2, 1]]
    assert nearest_neighbours(torch.zeros(3, 2), k=5).shape == (3, 2)


def test_classes_alternate_in_the_order_of_the_images():
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    order = alternating_order(labels, seed=0)
    assert sorted(order) == list(range(6))
    assert sorted(labels[order[:3]].tolist()) == [0, 1, 2]          # one of each class first
    assert sorted(labels[order[3:5]].tolist()) == [0, 2]


# ---- figures

def test_small_images_are_enlarged_without_interpolation_and_large_ones_are_reduced():
    x = torch.rand(1, 3, 5, 5)
    large = resize(x, 13)
    assert large.shape[-1] == 10 and torch.equal(large[..., ::2, 1::2], x)
    assert resize(x, 3).shape[-1] == 3


def test_a_figure_escapes_its_texts_and_saves_its_image_as_a_file(tmp_path):
    rows = {"<b>cat</b>": torch.rand(2, 3, 8, 8), "dog & hen": torch.rand(1, 3, 8, 8)}
    page = figure(image_saver(tmp_path), "rows", rows, "a < b")
    assert "<b>" not in page and "&lt;b&gt;cat" in page
    assert "dog &amp; hen" in page and "a &lt; b" in page
    assert Image.open(tmp_path / "rows.png").size == (2 * (128 + 2), 2 * (128 + 2))


# ---- numbers

def test_the_latest_value_of_each_metric_is_shown_and_texts_are_escaped(tmp_path):
    assert "There are no metrics yet" in metrics_table(tmp_path, tmp_path / "dit")
    write_lines(tmp_path / "metrics.jsonl", [
        {"name": "FID", "value": 9.0, "protocol": "old"},
        {"name": "<i>", "value": "nan", "protocol": "p"},
        {"name": "FID", "value": 8.12345, "protocol": "new"}])
    table = metrics_table(tmp_path, tmp_path / "dit")
    assert "old" not in table and "8.123" in table and "new" in table and "<i>" not in table
    numbers = [format_number(v) for v in (0.123456, 21.34567, 1234.56, 123456.7)]
    assert numbers == ["0.1235", "21.35", "1235", "123,457"]


# ---- the page

@pytest.mark.parametrize("mix", MIXES)
def test_every_combination_of_objectives_has_a_self_contained_page(tmp_path, mix, monkeypatch):
    monkeypatch.setattr(report, "GALLERY", 12)
    clip, ssl, rec = MIXES[mix]
    page = write_report(make_run(tmp_path, clip, ssl, rec)).read_text("utf-8")
    assert f"<h1>{mix}, size nano</h1>" in page and "$" not in page
    assert not re.search(r"https?:|<script|<link|@import|url\(", page)
    sources = re.findall(r'src="(.{22})', page)
    assert set(sources) == {"data:image/png;base64,"}
    assert len(sources) == len(list((tmp_path / "report").glob("*.png")))
    assert ("--w-clip 0" in page) == (not clip) and ("--w-rec 0" in page) == (not rec)
    assert ("No loss reads the class token" in page) == (mix == "AE")


def test_images_without_classes_are_matched_to_captions_which_are_escaped(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "GALLERY", 12)
    init, load = Shapes.__init__, Shapes.load

    def without_classes(self, *args):
        init(self, *args)
        self.classes = None

    def strange_captions(self, index, rng=None):
        return load(self, index)[0], f"<script>{index}</script> $title {{}}", -1

    monkeypatch.setattr(Shapes, "__init__", without_classes)
    monkeypatch.setattr(Shapes, "load", strange_captions)
    page = write_report(make_run(tmp_path)).read_text("utf-8")
    assert "<script" not in page and "&lt;script&gt;" in page and "$title {}" in page
    assert "the 12 captions" in page and "green frame" not in page


def test_the_choice_of_images_depends_on_the_seed_only(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "GALLERY", 12)
    make_run(tmp_path)
    first, again, other = (write_report(tmp_path, seed=s).read_text("utf-8") for s in (0, 0, 1))
    assert first == again != other


def test_samples_of_the_diffusion_transformer_are_grouped_by_class(tmp_path):
    (tmp_path / "samples" / "png").mkdir(parents=True)
    for j, label in enumerate([1, 0, 1]):
        pixels = np.full((16, 16, 3), 200 * label + j, np.uint8)
        Image.fromarray(pixels).save(tmp_path / "samples" / "png" / f"{j:06d}.png")
    info = {"protocol": "3 samples", "classes": ["cat", "<dog>"], "labels": [1, 0, 1]}
    (tmp_path / "samples" / "labels.json").write_text(json.dumps(info))
    page = samples(image_saver(tmp_path), tmp_path)
    shown = np.asarray(Image.open(tmp_path / "samples.png"))[64::130, 64::130, 0]
    # 255: white, because there is no second cat
    assert shown.tolist() == [[1, 255], [200, 202]]
    assert page.index("cat") < page.index("&lt;dog&gt;") and "3 samples" in page
    assert "no samples" in samples(image_saver(tmp_path), tmp_path / "elsewhere")


def write_preview(dit, step, values, side=16):
    """A preview of uniform images with these grey values"""
    pixels = np.concatenate([np.full((side, side, 3), value, np.uint8) for value in values], 1)
    preview_path(dit, step).parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(preview_path(dit, step))


def test_previews_are_shown_in_the_order_of_their_steps_with_one_row_per_class(tmp_path):
    assert "without --set previews=0" in previews(image_saver(tmp_path), tmp_path)
    (tmp_path / "classes.json").write_text('["cat", "<dog>"]')
    for step in (100, 50, 1600, 200):
        write_preview(tmp_path, step, (step // 50, 100 + step // 50))
    page = previews(image_saver(tmp_path), tmp_path)
    shown = np.asarray(Image.open(tmp_path / "previews.png"))[48::98, 48::98, 0]
    assert shown.tolist() == [[1, 2, 4, 32], [101, 102, 104, 132]]
    assert page.index("cat") < page.index("&lt;dog&gt;") and "step 1600" in page
    for k in range(20):
        write_preview(tmp_path, 3200 + k, (0, 0))
    page = previews(image_saver(tmp_path), tmp_path)                # eight columns at most
    assert page.count("<span>step") == 8 and "step 50<" in page and "step 3219<" in page


@pytest.mark.parametrize("kind, told", [
    ("damaged", "step-000100.png cannot be read .*; delete it"),
    ("not a row", "not a row of square images"), ("two sizes", "cannot be shown"),
    ("no classes", "classes.json cannot be read")])
def test_previews_that_cannot_be_read_are_replaced_by_the_reason(tmp_path, kind, told):
    (tmp_path / "classes.json").write_text('["cat"]')
    write_preview(tmp_path, 50, [1])
    write_preview(tmp_path, 100, [1], side=8 if kind == "two sizes" else 16)
    if kind == "damaged":
        preview_path(tmp_path, 100).write_bytes(b"")
    if kind == "not a row":
        Image.new("RGB", (17, 16)).save(preview_path(tmp_path, 100))
    if kind == "no classes":
        (tmp_path / "classes.json").unlink()
    page = previews(image_saver(tmp_path), tmp_path)
    assert "The previews cannot be shown" in page and re.search(told, page)


def test_samples_that_cannot_be_read_are_replaced_by_the_reason(tmp_path):
    folder = tmp_path / "samples"
    (folder / "png").mkdir(parents=True)
    info = {"protocol": "2 samples", "classes": ["cat"], "labels": [0, 0]}
    for text, told in ((json.dumps(info), "000000.png cannot be read"),
                       (json.dumps(info)[:20], "labels.json cannot be read"),
                       ("[]", "it holds a list"),
                       (json.dumps(info | {"labels": [0, 7]}), "the label 7"),
                       (json.dumps(info | {"classes": [0]}), "a class name is not a text"),
                       ('{"labels": [["000000.png", 3]]}', "it lacks protocol")):
        (folder / "labels.json").write_text(text)
        page = samples(image_saver(tmp_path), tmp_path)
        assert "The samples cannot be shown" in page and told in page
    (folder / "labels.json").write_text(json.dumps(info))
    for j, side in ((0, 16), (1, 8)):
        Image.new("RGB", (side, side)).save(folder / "png" / f"{j:06d}.png")
    assert "The samples cannot be shown" in samples(image_saver(tmp_path), tmp_path)


def test_numbers_that_are_not_finite_and_damaged_lines_do_not_prevent_a_report(
        tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "GALLERY", 12)
    make_run(tmp_path)
    write_lines(tmp_path / "metrics.jsonl", [
        {"name": "PSNR", "value": "inf", "protocol": "exact"},
        {"name": "FID", "value": float("nan"), "protocol": "written by another program"},
        {"name": "SSIM", "value": None, "protocol": "p"}, {"name": "LPIPS"}])
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"name": "kNN full", "value": 0.' + b'{"name": "kNN latent", "value": 0.5, '
                   b'"protocol": "k 20"}\n' + bytes(99) + b"\n")
    with open(tmp_path / "log.jsonl", "ab") as file:
        file.write(bytes(300) + b'{"step": 9, "clip": "inf", "rec": "-inf", "dino": null, '
                   b'"images_per_s": "inf"}\n{"step": 10, "clip": 1e999, "x": [1]}\n'
                   b'{"step": 11, "cl')
    page = write_report(tmp_path).read_text("utf-8")
    for part in ("<td>inf<td>exact", "<td>nan<td>written", "kNN latent<td>0.5", "10 of 40",
                 "50 images per second"):
        assert part in page
    assert "SSIM" not in page and "LPIPS" not in page and "kNN full" not in page
    said = capsys.readouterr().out
    assert "metrics.jsonl: 3 of 6 lines are damaged" in said
    assert "log.jsonl: 1 of 11 lines are damaged" in said


def test_the_command_prints_numbers_that_are_not_finite(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "GALLERY", 12)
    write_lines(make_run(tmp_path) / "metrics.jsonl", [
        {"name": "PSNR", "value": "inf", "protocol": "exact"}, {"name": "x", "value": "many"}])
    args = commands.arguments(["report", str(tmp_path)])
    commands.report(args, "cpu", open_data, eval_batches, get_tokenizer)
    said = capsys.readouterr().out
    assert re.search(r"PSNR +inf   exact", said) and "wrote" in said and "many" not in said


def test_a_model_whose_features_are_not_finite_has_a_page_with_its_curves(tmp_path):
    make_run(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if name.startswith("trunk.blocks.0") and "qkv" in name)
    weights[name].fill_(float("nan"))
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    page = write_report(tmp_path).read_text("utf-8")
    assert page.count("features of this model are not finite") == 5
    assert (tmp_path / "report" / "curves.png").exists()


def test_a_log_without_a_readable_line_and_a_run_json_of_another_version_have_a_page(
        tmp_path, monkeypatch):
    monkeypatch.setattr(report, "GALLERY", 12)
    make_run(tmp_path)
    (tmp_path / "log.jsonl").write_bytes(bytes(500))
    (tmp_path / "run.json").write_text('{"data": "shapes", "w_clip": 1}')
    page = write_report(tmp_path).read_text("utf-8")
    assert "no log.jsonl with readable lines" in page and "0 of unknown" in page
    (tmp_path / "run.json").write_text('{"data": "sha')
    with pytest.raises(ValueError, match="run.json cannot be read .*; restore it, or delete it"):
        write_report(tmp_path)


def test_exact_reconstructions_have_a_finite_mean_psnr(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "GALLERY", 12)
    monkeypatch.setattr(report, "psnr", lambda a, b: torch.full((len(a),), float("inf")))
    page = write_report(make_run(tmp_path)).read_text("utf-8")
    assert "images: 100.0 dB (exact images count as 100)" in page


def test_a_folder_without_weights_or_images_is_rejected_with_the_command_to_type(tmp_path):
    with pytest.raises(ValueError, match="train.py --out"):
        write_report(tmp_path)
    make_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="--val-data"):
        write_report(tmp_path)
