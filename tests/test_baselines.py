"""The paper's comparisons: the convolutional autoencoder is Table 1's, VA-VAE's losses are what they say, RAE's encoder never moves."""
import json
import re
import runpy
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import train
from vtp_min import VTPConfig, VTPModel, baselines, gan
from vtp_min.baselines import (KL, LDM, MARGINS, W_ALIGN, LDMConfig, as_strong_as, drawn, features, kl_loss, load, mcos_loss, mdms_loss, paint_ldm,
                               paint_rae, paint_vavae, rae)
from vtp_min.views import lots, normalize
from vtp_min.cost import count, flops

ROOT = Path(__file__).parents[1]
SMALL = "--image 16 --batch 4 --w-gan 0 --perceptual none --steps 2 --precision fp32 --device cpu --workers 0 --log-every 1".split()

TINY = LDMConfig(image_size=16, latent_dim=4, widths=[32, 32, 64], depth=1)          # f4
VTP = VTPConfig(image_size=16, train_clip=False, vision_patch_size=4, vision_embed_dim=16, vision_depth=1, vision_num_heads=2, vision_feature_bottleneck=4,
                decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2, decoder_upscale=4, rope_dtype="float32")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------- LDM
def test_the_convolutional_autoencoder_is_that_of_table_1():
    with torch.device("meta"):
        model, img = LDM(LDMConfig()), torch.empty(1, 3, 256, 256)
        work, with_attention = flops(lambda: model.get_latents_decoded_images(model.get_reconstruction_latents(img)))
    assert f"{count(model) / 1e6:.1f}" == "70.3" and f"{work / 1e9:.1f}" == "389.4"   # paper: 70.3M, 389.4G, in the convention that gives its ViT-L 311.1G
    assert f"{count(model) / 1e6:.3f}" == "70.294" and f"{work / 1e9:.2f}" == "389.43" and f"{with_attention / 1e9:.2f}" == "390.37"


def test_eval_cost_prints_that_row(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eval.py", "cost", "--size", "ldm", "--device", "cpu"])
    runpy.run_path(str(ROOT / "eval.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert "encoder + decoder            70.29      389.43" in said and "its CNN has 70.3M parameters and 389.4 GFLOPs" in said


def test_a_size_is_a_width_and_a_patch_is_a_number_of_halvings():
    paper = LDMConfig.of_size("L", 256, 16, 64)
    assert paper == LDMConfig() and paper.vision_patch_size == 16
    assert LDMConfig.of_size("nano", 48, 8, 64).widths == [32, 64, 128, 128]
    with pytest.raises(ValueError, match="--patch 12"):
        LDMConfig.of_size("nano", 48, 12, 64)


@pytest.mark.parametrize("patch, encoder, decoder", [(4, {64: 1}, {64: 1}), (8, {32: 1}, {32: 1}), (16, {16: 3}, {16: 4}), (32, {16: 2, 8: 3}, {8: 4, 16: 3})])
def test_attention_stands_where_ldm_has_it(patch, encoder, decoder):
    """{side of the grid: attentions there}: one in the middle always; one after each block of 16 and 8 px, which f4 and f8 do not reach"""
    with torch.device("meta"):
        model = LDM(LDMConfig.of_size("nano", 256, patch, 4))
    for net, expected, side, factor in ((model.encoder, encoder, 256, 0.5), (model.decoder, decoder, 256 // patch, 2)):
        found = {}
        for layer in net:
            if isinstance(layer, nn.Sequential):                                          # halves or doubles the grid
                side = int(side * factor)
            if isinstance(layer, baselines.Attention):
                found[side] = found.get(side, 0) + 1
        assert found == expected


@pytest.mark.parametrize("side", [(16, 16), (8, 24)])
def test_shapes_there_and_back(side):
    model, img = LDM(TINY), torch.randn(2, 3, *side)
    z = model.get_reconstruction_latents(img)
    assert z.shape == (2, 4, side[0] // 4, side[1] // 4) and model.get_latents_decoded_images(z).shape == img.shape


def test_kl_is_that_of_torch_and_zero_for_a_standard_normal():
    mean, logvar = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    theirs = torch.distributions.kl_divergence(torch.distributions.Normal(mean, (logvar / 2).exp()), torch.distributions.Normal(0.0, 1.0)).sum() / 3
    assert torch.isclose(kl_loss(mean, logvar), theirs) and kl_loss(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)) == 0


def test_draws_have_the_mean_and_the_spread_they_are_told():
    z = drawn(torch.full((20000,), 2.0), torch.full((20000,), 9.0).log())
    assert abs(z.mean() - 2) < 0.1 and abs(z.std() - 3) < 0.1
    mean = torch.randn(10)
    assert torch.equal(drawn(mean, torch.full((10,), -torch.inf)), mean)


def test_training_draws_its_latents_and_evaluation_takes_the_mean():
    model, img = LDM(TINY), torch.randn(2, 3, 16, 16)
    a, b = paint_ldm(model, img)[0], paint_ldm(model, img)[0]
    assert not torch.equal(a, b)
    assert torch.equal(model.get_reconstruction_latents(img), model.moments(img)[0])
    kl = paint_ldm(model, img)[1]["kl"]
    assert torch.isclose(kl, KL * kl_loss(*model.moments(img)) / (3 * 16 * 16))


def test_latents_of_a_dit_are_samples_that_depend_on_the_generators_alone():
    model, img = LDM(TINY), torch.randn(2, 3, 16, 16)
    mean, logvar = model.moments(img)
    z = model.sample_latents(img, [lots(12, 0, index) for index in (5, 6)])
    noise = torch.stack([torch.from_numpy(lots(12, 0, index).standard_normal((4, 4, 4), dtype="float32")) for index in (5, 6)])
    assert torch.equal(z, mean + (logvar / 2).exp() * noise)
    alone = model.sample_latents(img[1:], [lots(12, 0, 6)])
    assert torch.allclose(z[1:], alone, atol=1e-5)


# ---------------------------------------------------------------- to disk and back
@pytest.mark.parametrize("width", [None, 16])
def test_disk_changes_no_bit(tmp_path, width):
    model, img = LDM(replace(TINY, encoder_width=width)).eval(), torch.randn(1, 3, 16, 16)
    model.save_pretrained(tmp_path)
    back = load(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == ("vavae" if width else "ldm")
    assert back.config == model.config and all(torch.equal(v, back.state_dict()[k]) for k, v in model.state_dict().items())
    assert torch.equal(back.get_reconstruction_latents(img), model.get_reconstruction_latents(img))


def test_load_knows_vtp_too_and_names_what_it_cannot_read(tmp_path):
    VTPModel(VTP).save_pretrained(tmp_path / "vtp")
    assert isinstance(load(tmp_path / "vtp"), VTPModel)
    LDM(TINY).save_pretrained(tmp_path / "ldm")
    path = tmp_path / "ldm" / "config.json"
    text = path.read_text()
    for change, complaint in [(text.replace('"ldm"', '"vqgan"'), "vqgan.*wanted one of vtp, ldm, vavae"), (text[:-9], "is no JSON"), ("[1]", "a list"),
                              (text.replace('"depth"', '"deep"'), "can be built .*deep"), (text.replace('"latent_dim": 4', '"latent_dim": 5'), "does not fit"),
                              (text.replace('"depth": 1', '"depth": "one"'), "can be built"), (text.replace("32", "33"), "can be built")]:
        path.write_text(change)
        with pytest.raises(ValueError, match=complaint):
            load(tmp_path / "ldm")
    path.write_text(text)
    (tmp_path / "ldm" / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="is damaged"):
        load(tmp_path / "ldm")
    with pytest.raises(FileNotFoundError, match="holds no config.json"):
        load(tmp_path / "nothing")


# ---------------------------------------------------------------- VA-VAE
def test_aligned_latents_lose_nothing():
    f = torch.randn(2, 8, 4, 4)
    turn = torch.linalg.qr(torch.randn(8, 8))[0]
    assert mcos_loss(3 * f, f, margin=0) < 1e-6 and mdms_loss(torch.einsum("ij,bjhw->bihw", turn, 3 * f), f, margin=0) < 1e-6     # angles do not change by turning
    assert mcos_loss(f, f) == 0 and mdms_loss(f, f) == 0


def test_what_the_margins_forgive():
    f, other = torch.zeros(1, 2, 1, 2), torch.zeros(1, 2, 1, 2)
    f[0, 0] = 1                                                       # two places, one direction
    other[0, 0, 0, 0] = other[0, 1, 0, 1] = 1                         # two places, at right angles
    m1, m2 = MARGINS
    assert torch.isclose(mcos_loss(-f, f), torch.tensor(2 - m1))      # the opposite direction: cosine -1
    assert torch.isclose(mcos_loss(other, f), torch.tensor((1 - m1) / 2))
    assert torch.isclose(mdms_loss(other, f), torch.tensor((1 - m2) / 2))          # of four pairs two disagree, by 1
    z = torch.zeros(1, 2, 1, 2)
    z[0, 0], z[0, 1, 0, 1] = 1, 0.5                                   # cosine 0.894: both margins forgive it
    assert mcos_loss(z, f) == 0 and mdms_loss(z, f) == 0


def test_matrix_loss_compares_widths_that_differ_one_by_one():
    z, f = torch.randn(2, 3, 2, 2), torch.randn(2, 8, 2, 2)
    slow = [F.relu((F.cosine_similarity(z[b].flatten(1)[:, i], z[b].flatten(1)[:, j], dim=0) - F.cosine_similarity(f[b].flatten(1)[:, i], f[b].flatten(1)[:, j], dim=0)).abs() - 0.25)
            for b in range(2) for i in range(4) for j in range(4)]
    assert torch.isclose(mdms_loss(z, f), torch.stack(slow).mean())


def test_both_losses_pull_alike_at_the_encoders_last_layer():
    at = nn.Parameter(torch.randn(5))
    a, b = 7 * at.square().sum(), 0.01 * (at ** 3).sum()
    assert torch.isclose(torch.autograd.grad(as_strong_as(a, b, at) * b, at, retain_graph=True)[0].norm(), torch.autograd.grad(a, at)[0].norm(), rtol=1e-2)


def test_features_are_the_encoders_patches_whatever_its_patch():
    encoder, img = VTPModel(VTP).eval(), torch.randn(1, 3, 16, 16)
    f = features(encoder, img, 4, 4)
    assert torch.equal(f, encoder.get_intermediate_layers_feature(img, 1, reshape=True)[0]) and not f.requires_grad
    assert features(encoder, img, 2, 2).shape == (1, 16, 2, 2)        # latents half as fine: it is shown half the picture's side


def test_alignment_teaches_the_encoder_and_its_projection_but_not_the_decoder_or_the_teacher():
    frozen, model, img = VTPModel(VTP).eval(), LDM(replace(TINY, encoder_width=16)), torch.randn(2, 3, 16, 16)
    pixels, extra = paint_vavae(frozen, None, model, img)
    assert pixels.shape == img.shape and set(extra) == {"kl", "align"} and extra["align"] > 0
    assert W_ALIGN == 0.1
    extra["align"].backward()
    moved = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved == {"encoder", "project"} and all(p.grad is None for p in frozen.parameters())


def test_both_losses_read_the_projected_latents(monkeypatch):
    frozen, model, img = VTPModel(VTP).eval(), LDM(replace(TINY, encoder_width=16)), torch.randn(2, 3, 16, 16)
    read = {}
    for name in ("mcos_loss", "mdms_loss"):
        def kept(z, f, name=name, loss=getattr(baselines, name)):
            read[name] = z
            return loss(z, f)
        monkeypatch.setattr(baselines, name, kept)
    torch.manual_seed(1)
    paint_vavae(frozen, None, model, img)
    torch.manual_seed(1)
    projected = model.project(drawn(*model.moments(img)))
    assert torch.equal(read["mcos_loss"], projected) and torch.equal(read["mdms_loss"], projected)


def test_alignment_is_balanced_with_l1_in_ldm_s_units(monkeypatch):
    frozen, model = VTPModel(VTP).eval(), LDM(replace(TINY, encoder_width=16))
    seen, img = [], normalize(255 * torch.rand(2, 3, 16, 16))

    def kept(rec, other, at):
        seen.append(rec)
        return as_strong_as(rec, other, at)
    monkeypatch.setattr(baselines, "as_strong_as", kept)
    pixels, _ = paint_vavae(frozen, None, model, img)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    assert torch.isclose(seen[0], (2 * std * (pixels - img)).abs().mean())


# ---------------------------------------------------------------- RAE
def test_rae_is_the_encoder_itself_under_another_decoder(tmp_path):
    frozen = VTPModel(VTP).eval()
    model = rae(frozen, "nano", 16).eval()
    img = torch.randn(2, 3, 16, 16)
    z = model.get_reconstruction_latents(img)
    assert z.shape == (2, 16, 4, 4) and torch.equal(z, frozen.get_intermediate_layers_feature(img, 1, reshape=True)[0])
    assert model.get_latents_decoded_images(z).shape == img.shape
    model.save_pretrained(tmp_path)
    assert torch.equal(VTPModel.from_pretrained(tmp_path).get_reconstruction_latents(img), z)


def test_rae_trains_its_decoder_alone_on_noisy_latents():
    model, img = rae(VTPModel(VTP), "nano", 16), torch.randn(2, 3, 16, 16)
    pixels, extra = paint_rae(model, img)
    assert extra == {} and not torch.equal(pixels, paint_rae(model, img)[0])
    pixels.sum().backward()
    got = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert got == {"pixel_decoder"}


# ---------------------------------------------------------------- the command
def command(out, *flags):
    """python train.py, within this process -> what its log says"""
    before, argv = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}, sys.argv
    sys.argv = ["train.py", "--out", str(out), *SMALL, *map(str, flags)]
    try:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.argv = argv
        for s, handler in before.items():
            signal.signal(s, handler)
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def run(tmp_path):
    VTPModel(VTP).save_pretrained(tmp_path / "vtp")
    return tmp_path / "vtp"


@pytest.mark.parametrize("kind, terms", [("ldm", {"l1", "kl"}), ("vavae", {"l1", "kl", "align"}), ("rae", {"l1"})])
def test_each_trains_with_the_same_command_and_resuming_is_the_same_run(tmp_path, run, kind, terms):
    more = {"ldm": ["--patch", 4, "--latent-dim", 4], "vavae": ["--encoder", run, "--latent-dim", 4], "rae": ["--encoder", run]}[kind] + ["--baseline", kind]
    whole = command(tmp_path / "whole", *more, "--steps", 3, "--save-every", 2, "--warmup", 1, "--ema-decoder", 0)
    assert all(terms <= line.keys() and abs(line["loss"] - sum(line[k] for k in terms)) < 1e-4 for line in whole) and len(whole) == 3
    (tmp_path / "halves").mkdir()
    for old, new in (("previous.pt", "last.pt"), ("log.jsonl", "log.jsonl"), ("run.json", "run.json")):       # a kill after step 2's checkpoint
        shutil.copy(tmp_path / "whole" / old, tmp_path / "halves" / new)
    command(tmp_path / "halves", *more, "--steps", 3, "--save-every", 2, "--warmup", 1, "--ema-decoder", 0)
    a, b = load(tmp_path / "whole"), load(tmp_path / "halves")
    assert all(torch.equal(x, b.state_dict()[k]) for k, x in a.state_dict().items())
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["model_type"] == {"rae": "vtp"}.get(kind, kind)
    if kind == "rae":
        frozen = VTPModel.from_pretrained(run).trunk.state_dict()
        assert all(torch.equal(x, frozen[k]) for k, x in a.trunk.state_dict().items())


@pytest.mark.parametrize("kind, data_range", [("ldm", 2), ("vavae", 2), ("rae", 1)])
def test_l1_is_in_the_units_of_the_baseline_s_source(tmp_path, run, monkeypatch, kind, data_range):
    more = {"ldm": ["--patch", 4, "--latent-dim", 4], "vavae": ["--encoder", run, "--latent-dim", 4], "rae": ["--encoder", run]}[kind]
    seen = {}

    def painted(paint):
        def kept(model, img):
            pixels, terms = paint(model, img)
            seen["error"] = (pixels - img).detach()
            return pixels, terms
        return kept
    fit = gan.fit
    monkeypatch.setattr(gan, "fit", lambda args, model, paint, *rest: fit(args, model, painted(paint), *rest))
    line = command(tmp_path / "out", *more, "--baseline", kind, "--steps", 1)[0]
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    assert line["l1"] == pytest.approx((data_range * std * seen["error"]).abs().mean().item(), rel=1e-5)


def test_a_baseline_learns_eight_pictures_by_heart():
    torch.manual_seed(0)
    img, model = torch.rand(8, 3, 16, 16), LDM(replace(TINY, latent_dim=16))
    opt = torch.optim.Adam(model.parameters(), 2e-3)
    losses = []
    for _ in range(60):
        pixels, extra = paint_ldm(model, img)
        losses.append((pixels - img).abs().mean())
        opt.zero_grad()
        (losses[-1] + extra["kl"]).backward()
        opt.step()
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("more, complaint", [("--baseline rae", "needs a frozen encoder: --encoder RUN"), ("--baseline ldm --encoder RUN", "leave --encoder out"),
                                             ("--baseline ldm --w-clip 1", "no use for --w-clip"), ("--baseline ldm --stage 2", "no use for --stage"),
                                             ("--baseline rae --encoder RUN --patch 8", "no use for --patch"), ("--baseline vavae --encoder RUN --light-decoder", "no use for --light-decoder"),
                                             ("--baseline ldm --patch 12 --image 24", "halves the picture again"), ("--baseline ldm --image 18", "no multiple of the patch")])
def test_what_cannot_be_is_refused(tmp_path, run, more, complaint):
    with pytest.raises(SystemExit, match=re.escape(complaint)):
        command(tmp_path / "out", *more.replace("RUN", str(run)).split())
    assert not (tmp_path / "out").exists()


def test_an_encoder_without_a_baseline_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--encoder", "RUN"])
    with pytest.raises(SystemExit):
        train.arguments()
    assert "for --baseline vavae or rae" in capsys.readouterr().err


def test_eval_reads_it_as_any_run_and_refuses_what_it_has_not(tmp_path, monkeypatch, capsys):
    LDM(TINY).save_pretrained(tmp_path)
    (tmp_path / "run.json").write_text('{"data": "shapes"}')

    def ask(*words):
        monkeypatch.setattr(sys, "argv", ["eval.py", *words, str(tmp_path), "--device", "cpu"])
        runpy.run_path(str(ROOT / "eval.py"), run_name="__main__")
        return [json.loads(line)["name"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]

    assert {"PSNR", "SSIM"} <= set(ask("recon", "--perceptual", "none", "--limit", "4"))
    assert {"linear probe latent", "kNN latent"} <= set(found := ask("probe", "--limit", "20", "--train-limit", "40")) and not any("full" in name for name in found)
    with pytest.raises(SystemExit, match="without captions"):
        ask("zeroshot")
