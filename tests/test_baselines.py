"""The paper's baselines: the convolutional autoencoder of Table 1, the losses of VA-VAE, the frozen
encoder of RAE, and the command that trains them."""
import json
import re
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import train
from vtp_min import VTPConfig, VTPModel
from vtp_min.augment import STD, normalize
from vtp_min.extras import baselines, gan
from vtp_min.extras.baselines import (KL, LDM, MARGIN_COS, MARGIN_MATRIX, W_ALIGN, AttnBlock,
                                      LDMConfig, build_rae, encoder_features, kl_loss, mcos_loss,
                                      mdms_loss, reconstruct_ldm, reconstruct_rae,
                                      reconstruct_vavae, reparameterize)
from vtp_min.extras.cost import count, flops
from vtp_min.model import load_model
from vtp_min.rng import Stream, make_rng

ROOT = Path(__file__).parents[1]
SMALL = ("--image 16 --batch 4 --w-gan 0 --perceptual none --steps 2 --precision fp32 --device cpu "
         "--workers 0 --log-every 1").split()

TINY = LDMConfig(image_size=16, latent_dim=4, widths=[32, 32, 64], depth=1)          # f4
VTP = VTPConfig(image_size=16, train_clip=False, vision_patch_size=4, vision_embed_dim=16,
                vision_depth=1, vision_num_heads=2, vision_feature_bottleneck=4,
                decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2, decoder_upscale=4,
                rope_dtype="float32")


# ---------------------------------------------------------------- LDM
def test_the_convolutional_autoencoder_is_that_of_table_1():
    with torch.device("meta"):
        model, img = LDM(LDMConfig()), torch.empty(1, 3, 256, 256)
        work, with_attention = flops(
            lambda: model.get_latents_decoded_images(model.get_reconstruction_latents(img)))
    # paper: 70.3M and 389.4G; by the same way of counting its ViT-L has 311.1G
    assert f"{count(model) / 1e6:.1f}" == "70.3" and f"{work / 1e9:.1f}" == "389.4"
    assert f"{count(model) / 1e6:.3f}" == "70.294" and f"{work / 1e9:.2f}" == "389.43"
    assert f"{with_attention / 1e9:.2f}" == "390.37"


def test_eval_cost_prints_the_row_of_table_1(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eval.py", "cost", "--size", "ldm", "--device", "cpu"])
    runpy.run_path(str(ROOT / "eval.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "encoder + decoder            70.29      389.43" in printed
    assert "the CNN has 70.3M parameters and 389.4 GFLOPs" in printed


def test_size_selects_the_width_and_patch_the_number_of_levels():
    paper = LDMConfig.of_size("L", 256, 16, 64)
    assert paper == LDMConfig() and paper.vision_patch_size == 16
    assert LDMConfig.of_size("nano", 48, 8, 64).widths == [32, 64, 128, 128]
    with pytest.raises(ValueError, match="--patch 12"):
        LDMConfig.of_size("nano", 48, 12, 64)


@pytest.mark.parametrize("patch, encoder, decoder", [
    (4, {64: 1}, {64: 1}), (8, {32: 1}, {32: 1}),
    (16, {16: 3}, {16: 4}), (32, {16: 2, 8: 3}, {8: 4, 16: 3})])
def test_attention_is_at_the_same_grid_sizes_as_in_ldm(patch, encoder, decoder):
    """{side of the grid: number of attention blocks}. There is always one in the middle. Residual
    blocks on 16x16 and 8x8 grids are followed by one; f4 and f8 have no such grids."""
    with torch.device("meta"):
        model = LDM(LDMConfig.of_size("nano", 256, patch, 4))
    for net, expected, side, factor in ((model.encoder, encoder, 256, 0.5),
                                        (model.decoder, decoder, 256 // patch, 2)):
        found = {}
        for layer in net:
            if isinstance(layer, nn.Sequential):                      # downsample or upsample
                side = int(side * factor)
            if isinstance(layer, AttnBlock):
                found[side] = found.get(side, 0) + 1
        assert found == expected


@pytest.mark.parametrize("side", [(16, 16), (8, 24)])
def test_shapes_of_latents_and_decoded_images(side):
    model, img = LDM(TINY), torch.randn(2, 3, *side)
    z = model.get_reconstruction_latents(img)
    assert z.shape == (2, 4, side[0] // 4, side[1] // 4)
    assert model.get_latents_decoded_images(z).shape == img.shape


def test_kl_loss_agrees_with_torch_and_is_zero_for_a_standard_normal():
    mean, logvar = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    ours, standard = (torch.distributions.Normal(mean, (logvar / 2).exp()),
                      torch.distributions.Normal(0.0, 1.0))
    theirs = torch.distributions.kl_divergence(ours, standard).sum() / 3
    assert torch.isclose(kl_loss(mean, logvar), theirs)
    assert kl_loss(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)) == 0


def test_samples_have_the_given_mean_and_standard_deviation():
    z = reparameterize(torch.full((20000,), 2.0), torch.full((20000,), 9.0).log())
    assert abs(z.mean() - 2) < 0.1 and abs(z.std() - 3) < 0.1
    mean = torch.randn(10)
    assert torch.equal(reparameterize(mean, torch.full((10,), -torch.inf)), mean)


def test_training_uses_samples_of_the_latents_and_evaluation_their_mean():
    model, img = LDM(TINY), torch.randn(2, 3, 16, 16)
    a, b = reconstruct_ldm(model, img)[0], reconstruct_ldm(model, img)[0]
    assert not torch.equal(a, b)
    assert torch.equal(model.get_reconstruction_latents(img), model.moments(img)[0])
    kl = reconstruct_ldm(model, img)[1]["kl"]
    assert torch.isclose(kl, KL * kl_loss(*model.moments(img)) / (3 * 16 * 16))


def test_latents_of_a_dit_are_samples_that_depend_only_on_the_generators():
    def rngs(*indices):
        return [make_rng(Stream.POSTERIOR, 0, index) for index in indices]
    model, img = LDM(TINY), torch.randn(2, 3, 16, 16)
    mean, logvar = model.moments(img)
    z = model.sample_latents(img, rngs(5, 6))
    noise = torch.stack([torch.from_numpy(rng.standard_normal((4, 4, 4), dtype="float32"))
                         for rng in rngs(5, 6)])
    assert torch.equal(z, mean + (logvar / 2).exp() * noise)
    assert torch.allclose(z[1:], model.sample_latents(img[1:], rngs(6)), atol=1e-5)


# ---------------------------------------------------------------- files
@pytest.mark.parametrize("width", [None, 16])
def test_a_saved_and_loaded_model_is_equal_in_every_bit(tmp_path, width):
    model, img = LDM(replace(TINY, encoder_width=width)).eval(), torch.randn(1, 3, 16, 16)
    model.save_pretrained(tmp_path)
    back = load_model(tmp_path)
    kind = json.loads((tmp_path / "config.json").read_text())["model_type"]
    assert kind == ("vavae" if width else "ldm")
    assert back.config == model.config and not back.training
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in model.state_dict().items())
    assert torch.equal(back.get_reconstruction_latents(img), model.get_reconstruction_latents(img))


def test_load_model_loads_vtp_too_and_explains_why_it_cannot_load_a_folder(tmp_path):
    VTPModel(VTP).save_pretrained(tmp_path / "vtp")
    assert isinstance(load_model(tmp_path / "vtp"), VTPModel)
    LDM(TINY).save_pretrained(tmp_path / "ldm")
    path = tmp_path / "ldm" / "config.json"
    text = path.read_text()
    for change, complaint in [(text.replace('"ldm"', '"vqgan"'), "vqgan.*wanted"),
                              (text[:-9], "cannot be read"), ("[1]", "a list"),
                              (text.replace('"depth"', '"deep"'), "can be built .*deep"),
                              (text.replace('"latent_dim": 4', '"latent_dim": 5'), "not match"),
                              (text.replace('"depth": 1', '"depth": "one"'), "can be built"),
                              (text.replace("32", "33"), "can be built")]:
        path.write_text(change)
        with pytest.raises(ValueError, match=complaint):
            load_model(tmp_path / "ldm")
    path.write_text(text)
    (tmp_path / "ldm" / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="cannot be read"):
        load_model(tmp_path / "ldm")
    (tmp_path / "ldm" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="is missing"):
        load_model(tmp_path / "ldm")
    with pytest.raises(FileNotFoundError, match="holds no config.json"):
        load_model(tmp_path / "nothing")


# ---------------------------------------------------------------- VA-VAE
def test_both_losses_are_zero_for_aligned_latents():
    f = torch.randn(2, 8, 4, 4)
    rotation = torch.linalg.qr(torch.randn(8, 8))[0]
    rotated = torch.einsum("ij,bjhw->bihw", rotation, 3 * f)          # keeps all angles
    assert mcos_loss(3 * f, f, margin=0) < 1e-6 and mdms_loss(rotated, f, margin=0) < 1e-6
    assert mcos_loss(f, f) == 0 and mdms_loss(f, f) == 0


def test_differences_below_the_margins_cost_nothing():
    f, other = torch.zeros(1, 2, 1, 2), torch.zeros(1, 2, 1, 2)
    f[0, 0] = 1                                     # two positions with the same direction
    other[0, 0, 0, 0] = other[0, 1, 0, 1] = 1       # two positions with orthogonal directions
    m1, m2 = MARGIN_COS, MARGIN_MATRIX
    assert torch.isclose(mcos_loss(-f, f), torch.tensor(2 - m1))      # cosine -1
    assert torch.isclose(mcos_loss(other, f), torch.tensor((1 - m1) / 2))
    # the cosines of two of the four pairs differ, by 1
    assert torch.isclose(mdms_loss(other, f), torch.tensor((1 - m2) / 2))
    z = torch.zeros(1, 2, 1, 2)
    z[0, 0], z[0, 1, 0, 1] = 1, 0.5                 # cosine 0.894, within both margins
    assert mcos_loss(z, f) == 0 and mdms_loss(z, f) == 0


def test_the_matrix_loss_accepts_latents_and_features_of_different_widths():
    z, f = torch.randn(2, 3, 2, 2), torch.randn(2, 8, 2, 2)

    def cosine(x, i, j):
        return F.cosine_similarity(x.flatten(1)[:, i], x.flatten(1)[:, j], dim=0)
    pairs = [(b, i, j) for b in range(2) for i in range(4) for j in range(4)]
    slow = [F.relu((cosine(z[b], i, j) - cosine(f[b], i, j)).abs() - 0.25) for b, i, j in pairs]
    assert torch.isclose(mdms_loss(z, f), torch.stack(slow).mean())


def test_the_weighted_alignment_has_the_gradient_norm_of_l1_at_the_encoders_last_layer():
    frozen, model = VTPModel(VTP).eval(), LDM(replace(TINY, encoder_width=16))
    img = normalize(255 * torch.rand(2, 3, 16, 16))
    pixels, terms = reconstruct_vavae(frozen, None, model, img)
    last = model.encoder[-2].weight
    assert last.shape[-1] == 3
    l1, _ = gan.pixel_losses(pixels, img, None, 2)
    rec = torch.autograd.grad(l1, last, retain_graph=True)[0].norm()
    align = torch.autograd.grad(terms["align"], last)[0].norm()
    assert torch.isclose(align, W_ALIGN * rec, rtol=1e-2)


def test_features_are_the_patch_tokens_of_the_encoder_for_any_grid():
    encoder, img = VTPModel(VTP).eval(), torch.randn(1, 3, 16, 16)
    f = encoder_features(encoder, img, 4, 4)
    expected = encoder.get_intermediate_layers_feature(img, 1, reshape=True)[0]
    assert torch.equal(f, expected) and not f.requires_grad
    # for a coarser latent grid the encoder sees a smaller image
    assert encoder_features(encoder, img, 2, 2).shape == (1, 16, 2, 2)


def test_alignment_trains_the_encoder_and_the_projection_only():
    frozen, model = VTPModel(VTP).eval(), LDM(replace(TINY, encoder_width=16))
    img = torch.randn(2, 3, 16, 16)
    pixels, terms = reconstruct_vavae(frozen, None, model, img)
    assert pixels.shape == img.shape and set(terms) == {"kl", "align"} and terms["align"] > 0
    assert W_ALIGN == 0.1
    terms["align"].backward()
    moved = {name.split(".")[0] for name, p in model.named_parameters()
             if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved == {"encoder", "project"}
    assert all(p.grad is None for p in frozen.parameters())


def test_both_losses_use_the_projected_latents(monkeypatch):
    frozen, model = VTPModel(VTP).eval(), LDM(replace(TINY, encoder_width=16))
    img = torch.randn(2, 3, 16, 16)
    read = {}
    for name in ("mcos_loss", "mdms_loss"):
        def kept(z, f, name=name, loss=getattr(baselines, name)):
            read[name] = z
            return loss(z, f)
        monkeypatch.setattr(baselines, name, kept)
    torch.manual_seed(1)
    reconstruct_vavae(frozen, None, model, img)
    torch.manual_seed(1)
    projected = model.project(reparameterize(*model.moments(img)))
    assert torch.equal(read["mcos_loss"], projected)
    assert torch.equal(read["mdms_loss"], projected)


def test_the_adaptive_weight_of_alignment_uses_l1_of_pixels_in_minus_1_to_1(monkeypatch):
    frozen, model = VTPModel(VTP).eval(), LDM(replace(TINY, encoder_width=16))
    seen, img = {}, normalize(255 * torch.rand(2, 3, 16, 16))
    adaptive_weight = gan.adaptive_weight

    def kept(rec, other, parameter, **limits):
        seen["rec"], seen["limits"] = rec, limits
        return adaptive_weight(rec, other, parameter, **limits)
    monkeypatch.setattr(gan, "adaptive_weight", kept)
    pixels, _ = reconstruct_vavae(frozen, None, model, img)
    assert torch.isclose(seen["rec"], (2 * STD * (pixels - img)).abs().mean())
    assert seen["limits"] == {"largest": 1e8}


# ---------------------------------------------------------------- RAE
def test_rae_has_the_features_of_the_encoder_and_another_decoder(tmp_path):
    frozen = VTPModel(VTP).eval()
    model = build_rae(frozen, "nano", 16).eval()
    img = torch.randn(2, 3, 16, 16)
    z = model.get_reconstruction_latents(img)
    assert z.shape == (2, 16, 4, 4)
    assert torch.equal(z, frozen.get_intermediate_layers_feature(img, 1, reshape=True)[0])
    assert model.get_latents_decoded_images(z).shape == img.shape
    model.save_pretrained(tmp_path)
    assert torch.equal(VTPModel.from_pretrained(tmp_path).get_reconstruction_latents(img), z)
    light = build_rae(frozen, "nano", 16, light_decoder=True).config
    assert (light.decoder_embed_dim, light.decoder_depth) == (1024, 4)


def test_rae_trains_only_the_decoder_on_noisy_latents():
    model, img = build_rae(VTPModel(VTP), "nano", 16), torch.randn(2, 3, 16, 16)
    pixels, terms = reconstruct_rae(model, img)
    assert terms == {} and not torch.equal(pixels, reconstruct_rae(model, img)[0])
    pixels.sum().backward()
    got = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert got == {"pixel_decoder"}


# ---------------------------------------------------------------- the command
def command(out, *flags):
    """python train.py, within this process -> its log"""
    assert train.command(["--out", str(out), *SMALL, *map(str, flags)]) == 0
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def run(tmp_path):
    VTPModel(VTP).save_pretrained(tmp_path / "vtp")
    return tmp_path / "vtp"


def flags_of(kind, run):
    flags = {"ldm": ["--patch", 4, "--latent-dim", 4],
             "vavae": ["--encoder", run, "--latent-dim", 4], "rae": ["--encoder", run]}
    return ["--baseline", kind, *flags[kind]]


@pytest.mark.parametrize("kind, terms", [("ldm", {"l1", "kl"}), ("vavae", {"l1", "kl", "align"}),
                                         ("rae", {"l1"})])
def test_each_baseline_trains_and_a_resumed_run_gives_equal_weights(tmp_path, run, kind, terms):
    flags = [*flags_of(kind, run), "--steps", 3, "--save-every", 2, "--warmup", 1,
             "--set", "ema_decoder=0"]
    whole = command(tmp_path / "whole", *flags)
    assert len(whole) == 3
    for line in whole:
        assert terms <= line.keys()
        assert abs(line["loss"] - sum(line[name] for name in terms)) < 1e-4
    (tmp_path / "halves").mkdir()
    # a run that was killed after the checkpoint of step 2
    for old, new in (("previous.pt", "last.pt"), ("log.jsonl",) * 2, ("run.json",) * 2):
        shutil.copy(tmp_path / "whole" / old, tmp_path / "halves" / new)
    command(tmp_path / "halves", *flags)
    a, b = load_model(tmp_path / "whole"), load_model(tmp_path / "halves")
    assert all(torch.equal(x, b.state_dict()[k]) for k, x in a.state_dict().items())
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert config["model_type"] == {"rae": "vtp"}.get(kind, kind)
    settings = json.loads((tmp_path / "whole" / "run.json").read_text())
    names = {"baseline", "encoder", "size", *baselines.FLAG_DEFAULTS, *baselines.RECIPE}
    assert names <= settings.keys()
    if kind == "rae":
        frozen = VTPModel.from_pretrained(run).trunk.state_dict()
        assert all(torch.equal(x, frozen[k]) for k, x in a.trunk.state_dict().items())


@pytest.mark.parametrize("kind, data_range", [("ldm", 2), ("vavae", 2), ("rae", 1)])
def test_l1_has_the_pixel_range_of_the_original(tmp_path, run, monkeypatch, kind, data_range):
    seen = {}
    decoder_gradients = gan.decoder_gradients

    def kept(img, *rest):
        pixels, losses, diagnostics = decoder_gradients(img, *rest)
        seen["error"] = (pixels - img).detach()
        return pixels, losses, diagnostics
    monkeypatch.setattr(gan, "decoder_gradients", kept)
    line = command(tmp_path / "out", *flags_of(kind, run), "--steps", 1)[0]
    expected = (data_range * STD * seen["error"]).abs().mean().item()
    assert line["l1"] == pytest.approx(expected, rel=1e-5)


def test_a_baseline_overfits_eight_images():
    torch.manual_seed(0)
    img, model = torch.rand(8, 3, 16, 16), LDM(replace(TINY, latent_dim=16))
    opt = torch.optim.Adam(model.parameters(), 2e-3)
    losses = []
    for _ in range(60):
        pixels, terms = reconstruct_ldm(model, img)
        losses.append((pixels - img).abs().mean())
        opt.zero_grad()
        (losses[-1] + terms["kl"]).backward()
        opt.step()
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("flags, complaint", [
    ("--baseline rae", "needs a frozen encoder: --encoder RUN"),
    ("--baseline vavae", "needs a frozen encoder: --encoder RUN"),
    ("--baseline ldm --encoder RUN", "leave --encoder out"),
    ("--baseline rae --encoder RUN --patch 8", "takes --patch and --latent-dim from the encoder"),
    ("--baseline vavae --encoder RUN --set light_decoder=true", "leave --set light_decoder out"),
    ("--baseline ldm --set w_koleo=1", "wanted name=value, where name is one of clip_grad"),
    ("--baseline ldm --latent-dim 0", "--latent-dim 0: must be 1 or more"),
    ("--baseline ldm --patch 12 --image 24", "halves the image several times"),
    ("--baseline ldm --image 18", "is not a multiple of the patch size 16")])
def test_impossible_settings_raise_an_error(tmp_path, run, flags, complaint):
    with pytest.raises(ValueError, match=re.escape(complaint)):
        command(tmp_path / "out", *flags.replace("RUN", str(run)).split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", ["--w-clip 1", "--stage 2", "--init RUN", "--micro 2"])
def test_flags_of_other_trainings_are_rejected(tmp_path, capsys, flags):
    with pytest.raises(SystemExit):
        command(tmp_path / "out", "--baseline", "ldm", *flags.split())
    assert f"unrecognized arguments: {flags}" in capsys.readouterr().err


def test_an_unknown_baseline_and_encoder_without_baseline_are_rejected(tmp_path, capsys):
    for flags, sentence in ((["--baseline", "vqgan"], "invalid choice: 'vqgan'"),
                            (["--encoder", "RUN"], "unrecognized arguments: --encoder RUN")):
        with pytest.raises(SystemExit):
            train.command(flags)
        assert sentence in capsys.readouterr().err


def test_help_shows_the_flags_of_baselines_and_the_settings_with_their_sources(capsys):
    with pytest.raises(SystemExit) as end:
        train.command(["--baseline", "ldm", "--help"])
    printed = capsys.readouterr().out
    assert not end.value.code and "--encoder" in printed and "--init" not in printed
    for name, (_, _, source) in baselines.RECIPE.items():
        assert f"  {name} " in printed and source in printed
    assert "--latent-dim LATENT_DIM" in printed and "paper: d64" in printed


def test_eval_py_reads_a_baseline_and_rejects_zero_shot_evaluation(tmp_path, monkeypatch):
    LDM(TINY).save_pretrained(tmp_path)
    (tmp_path / "run.json").write_text('{"data": "shapes"}')

    def ask(*words):
        monkeypatch.setattr(sys, "argv", ["eval.py", *words, str(tmp_path), "--device", "cpu"])
        runpy.run_path(str(ROOT / "eval.py"), run_name="__main__")
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["name"] for line in lines]

    assert {"PSNR", "SSIM"} <= set(ask("recon", "--perceptual", "none", "--limit", "4"))
    found = ask("probe", "--limit", "20", "--train-limit", "40")
    assert {"linear probe latent", "kNN latent"} <= set(found)
    assert not any("full" in name for name in found)
    with pytest.raises(SystemExit, match="without captions"):
        ask("zeroshot")
