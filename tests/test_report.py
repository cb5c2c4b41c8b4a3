"""The report's pictures are what they say they are, and its page needs nothing but itself, whatever the run has learned."""
import json
import re
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from data import eval_batches, open_data
from tokenizer import get_tokenizer
from vtp_min import VTPConfig, VTPModel, report, vit
from vtp_min.report import album, class_attention, fit, nearest, numbers, pca_rgb, rounded, samples, sheet

write_report = partial(report.write_report, open_data=open_data, eval_batches=eval_batches, get_tokenizer=get_tokenizer)
MIXES = {"CLIP + SSL + AE": (1, 1, 0.1), "CLIP + AE": (1, 0, 0.1), "SSL + AE": (0, 1, 0.1), "AE": (0, 0, 0.1), "CLIP": (1, 0, 0)}


def make_model(clip=1, ssl=0, rec=0.1):
    torch.manual_seed(0)
    config = VTPConfig.of_size("nano", image=16, patch=8, latent_dim=4, clip=clip > 0, rec=rec > 0)
    config.vision_depth = config.decoder_depth = config.text_depth = 2
    config.text_vocab_size = 49408 if clip else 8
    return VTPModel(config).eval()


def make_run(folder, clip=1, ssl=1, rec=0.1, data="shapes", val_data=None, **more):
    """A run folder as train.py leaves it, but untrained"""
    make_model(clip, ssl, rec).save_pretrained(folder)
    settings = dict(w_clip=clip, w_ssl=ssl, w_rec=rec, data=data, val_data=val_data, size="nano", batch=16, batch_ssl=8, batch_rec=8, steps=40, lr=1e-3, seed=0,
                    machine="cpu, fp32", prototypes=1024, perceptual="none", clip_loss="clip", clip_grad=3.0) | more
    log = [{"step": s, "loss": 9 - s / 9, "grad_norm": 3.0, "lr": 1e-3, "perceptual": "none", "images_per_s": 50.0}
           | ({"clip": 2.7} if clip else {}) | ({"dino": "nan", "ibot": 3.4, "teacher_entropy": 6.0, "spread": 0.9} if ssl else {}) for s in range(1, 9)]
    (folder / "run.json").write_text(json.dumps(settings))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    return folder


# ---- attention

def test_the_class_tokens_attention_is_what_the_last_block_itself_computes(monkeypatch):
    """Attention to values that are one-hot gives back its own weights."""
    model, img, met = make_model(), torch.randn(3, 3, 16, 24), []
    sdpa = F.scaled_dot_product_attention

    def spy(q, k, v, is_causal):
        met.append(sdpa(q, k, torch.eye(k.shape[2]).expand(*k.shape[:2], -1, -1)))
        return sdpa(q, k, v)
    monkeypatch.setattr(vit, "F", SimpleNamespace(scaled_dot_product_attention=spy, pad=F.pad, silu=F.silu))
    with torch.no_grad():
        model.trunk(img)
        found = class_attention(model.trunk, img)
    assert found.shape == (3, 3, 1 + 2 * 3)
    assert torch.allclose(found, met[model.config.vision_depth - 1][:, :, 0], atol=1e-6)
    assert torch.allclose(found.sum(-1), torch.ones(3, 3), atol=1e-6)


# ---- principal components, neighbours

def test_three_colours_carry_everything_of_three_dimensional_features_and_stay_between_0_and_1():
    x = torch.randn(2, 4, 5, 3) @ torch.randn(3, 20) + 7
    rgb, share = pca_rgb(x)
    assert rgb.shape == (2, 3, 4, 5) and rgb.min() == 0 and rgb.max() == 1 and share == pytest.approx(1)


def test_colours_follow_the_strongest_direction_and_do_not_care_about_shift_scale_or_sign_of_the_rest():
    ramp = torch.linspace(-1, 1, 16).view(1, 4, 4, 1)
    x = torch.cat([10 * ramp, ramp.roll(5, 1), ramp.roll(3, 2)], -1)
    red = pca_rgb(x)[0][0, 0].flatten()
    assert (red.diff() >= 0).all()
    assert torch.allclose(pca_rgb(3 * x + 2)[0], pca_rgb(x)[0], atol=1e-5)


def test_features_that_are_all_alike_have_colours_too():
    rgb, share = pca_rgb(torch.ones(2, 3, 3, 8))
    assert rgb.isfinite().all() and share == 0


def test_the_nearest_are_others_in_the_order_of_their_distance():
    assert nearest(torch.tensor([[0.0], [1.0], [3.0], [7.0]]), k=2).tolist() == [[1, 2], [0, 2], [1, 0], [2, 1]]
    assert nearest(torch.zeros(3, 2), k=5).shape == (3, 2)


# ---- pictures

def test_small_pictures_grow_in_flat_squares_and_large_ones_shrink():
    x = torch.rand(1, 3, 5, 5)
    grown = fit(x, 13)
    assert grown.shape[-1] == 10 and torch.equal(grown[..., ::2, 1::2], x)
    assert fit(x, 3).shape[-1] == 3


def test_a_sheet_escapes_its_words_and_keeps_its_picture_as_a_file(tmp_path):
    page = sheet(album(tmp_path), "rows", {"<b>cat</b>": torch.rand(2, 3, 8, 8), "dog & hen": torch.rand(1, 3, 8, 8)}, "a < b")
    assert "<b>" not in page and "&lt;b&gt;cat" in page and "dog &amp; hen" in page and "a &lt; b" in page
    assert Image.open(tmp_path / "rows.png").size == (2 * (128 + 6), 2 * (128 + 6))


# ---- numbers

def test_of_equal_names_the_latest_number_counts_and_words_are_escaped():
    table = numbers([{"name": "FID", "value": 9.0, "protocol": "old"}, {"name": "<i>", "value": "nan", "protocol": "p"}, {"name": "FID", "value": 8.12345, "protocol": "new"}])
    assert "old" not in table and "8.123" in table and "new" in table and "<i>" not in table
    assert [rounded(v) for v in (0.123456, 21.34567, 1234.56, 123456.7)] == ["0.1235", "21.35", "1235", "123,457"]


# ---- the page

@pytest.mark.parametrize("mix", MIXES)
def test_every_mix_of_objectives_gets_a_page_that_needs_nothing_but_itself(tmp_path, mix, monkeypatch):
    monkeypatch.setattr("vtp_min.report.GALLERY", 12)
    clip, ssl, rec = MIXES[mix]
    page = write_report(make_run(tmp_path, clip, ssl, rec)).read_text("utf-8")
    assert f"<h1>{mix}, size nano</h1>" in page and "$" not in page
    assert not re.search(r"https?:|<script|<link|@import|url\(", page)
    sources = re.findall(r'src="(.{22})', page)
    assert set(sources) == {"data:image/png;base64,"} and len(sources) == len(list((tmp_path / "report").glob("*.png")))
    assert ("--w-clip 0" in page) == (not clip) and ("--w-rec 0" in page) == (not rec)
    assert ("No loss reads the class token" in page) == (mix == "AE")


def test_pictures_without_classes_are_asked_for_their_captions_and_strange_captions_do_no_harm(tmp_path, monkeypatch):
    monkeypatch.setattr("vtp_min.report.GALLERY", 12)
    from data import Shapes
    load = Shapes.load
    monkeypatch.setattr(Shapes, "classes", None)
    monkeypatch.setattr(Shapes, "load", lambda self, index, rng=None: (load(self, index)[0], f"<script>{index}</script> $title {{}}", -1))
    page = write_report(make_run(tmp_path)).read_text("utf-8")
    assert "<script" not in page and "&lt;script&gt;" in page and "$title {}" in page and "the 12 captions" in page and "Framed" not in page


def test_the_seed_chooses_the_pictures_and_nothing_else_does(tmp_path, monkeypatch):
    monkeypatch.setattr("vtp_min.report.GALLERY", 12)
    make_run(tmp_path)
    first, again, other = (write_report(tmp_path, seed=seed).read_text("utf-8") for seed in (0, 0, 1))
    assert first == again != other


def test_samples_of_the_diffusion_transformer_stand_in_rows_of_their_class(tmp_path):
    (tmp_path / "samples" / "png").mkdir(parents=True)
    for j, label in enumerate([1, 0, 1]):
        Image.fromarray(np.full((16, 16, 3), 200 * label + j, np.uint8)).save(tmp_path / "samples" / "png" / f"{j:06d}.png")
    (tmp_path / "samples" / "labels.json").write_text(json.dumps({"protocol": "3 samples", "classes": ["cat", "<dog>"], "labels": [1, 0, 1]}))
    page = samples(album(tmp_path), tmp_path)
    shown = np.asarray(Image.open(tmp_path / "samples.png"))[3 + 64::134, 3 + 64::134, 0]
    assert shown.tolist() == [[1, 255], [200, 202]] and page.index("cat") < page.index("&lt;dog&gt;") and "3 samples" in page
    assert "No samples" in samples(album(tmp_path), tmp_path / "elsewhere")


def test_a_folder_without_weights_or_without_pictures_is_told_what_to_type(tmp_path):
    with pytest.raises(ValueError, match="train.py --out"):
        write_report(tmp_path)
    make_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="--val-data"):
        write_report(tmp_path)
