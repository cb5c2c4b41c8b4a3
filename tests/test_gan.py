"""Stage 2: losses and gradients of a step, frozen parameters, resuming, two processes, flags."""
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import eval
import train
from data import TrainBatches, clean_batches, open_data, prefetch
from vtp_min import VTPConfig, VTPModel
from vtp_min.augment import STD, normalize
from vtp_min.extras import fast, gan
from vtp_min.extras.gan import (EMA, Discriminator, adaptive_weight, build_discriminator,
                                discriminator_warnings, hinge_d_loss, hinge_g_loss, train_with_gan)
from vtp_min.extras.perceptual import Perceptual
from vtp_min.run import EXIT_RESUME, TIMING

ROOT = Path(__file__).parents[1]
TINY = ("--stage 2 --batch 4 --steps 4 --save-every 2 --perceptual none --precision fp32 "
        "--log-every 1 --device cpu --workers 0").split()
START = ["--set", "gan_start=1"]
MODEL = VTPConfig(image_size=16, vision_patch_size=8, vision_embed_dim=32, vision_depth=1,
                  vision_num_heads=2, vision_use_qk_norm=True, vision_feature_bottleneck=8,
                  text_embed_dim=16, text_num_heads=2, text_depth=1, decoder_embed_dim=32,
                  decoder_num_heads=2, decoder_depth=1, decoder_use_qk_norm=True,
                  decoder_upscale=8, rope_dtype="float32")


@pytest.fixture(scope="module")
def stage1(tmp_path_factory):
    """The files that train.py writes for a run of stage 1, with untrained weights"""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("stage1")
    VTPModel(MODEL).save_pretrained(folder)
    settings = {"data": "shapes:objects=1", "val_data": None, "seed": 3, "image": 16,
                "size": "nano"}
    (folder / "run.json").write_text(json.dumps(settings))
    return folder


def stage2(*words):
    """python train.py --stage 2 in this process -> exit status"""
    return gan.main([*map(str, words)], clean_batches, prefetch)


def go(stage1, out, *words):
    """A short run of stage 2 -> its log"""
    start = [] if "--set" in words else START
    assert stage2(*TINY, "--init", stage1, "--out", out, *start, *words) == 0
    return log(out)


def log(out):
    """Lines of log.jsonl without the fields that may differ between equal runs"""
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMING} for line in lines]


@pytest.fixture(scope="module")
def whole(stage1, tmp_path_factory):
    """Four steps, with checkpoints at steps 2 and 4 -> folder, which tests must not change"""
    out = tmp_path_factory.mktemp("whole") / "gan"
    undo = fast.install()
    go(stage1, out)
    undo()
    return out


def weights(folder):
    return safetensors.torch.load_file(Path(folder) / "model.safetensors")


# ---------------------------------------------------------------- the losses
def test_the_hinge_loss_is_1_for_zero_logits_and_0_beyond_the_margin():
    zero = torch.zeros(2, 1, 3, 3)
    assert hinge_d_loss(zero, zero) == 1
    assert hinge_d_loss(zero + 1, zero - 1) == 0 == hinge_d_loss(zero + 9, zero - 9)
    assert hinge_d_loss(zero - 1, zero + 1) == 2
    assert hinge_g_loss(zero + 3) == -3


def test_the_adaptive_weight_gives_both_gradients_the_same_norm_and_is_bounded():
    last = nn.Parameter(torch.randn(5, 7))
    a, b = torch.randn(5, 7), 40 * torch.randn(5, 7)
    rec, g = (last * a).sum(), (last * b).sum()               # their gradients are a and b
    weight = adaptive_weight(rec, g, last)
    assert not weight.requires_grad
    assert torch.isclose((weight * b).norm(), a.norm(), rtol=1e-4)
    assert torch.isclose(adaptive_weight(rec, 9 * g, last), weight / 9, rtol=1e-4)
    assert torch.isclose(adaptive_weight(rec, g, last, scale=1024.0), weight)
    assert adaptive_weight(rec, 0 * g, last) == 1e4 and adaptive_weight(0 * rec, g, last) == 0
    assert adaptive_weight(rec, 0 * g, last, largest=1e8) == a.norm() / 1e-4


@pytest.mark.parametrize("layers, side", [(2, 34), (3, 70)])
def test_the_receptive_field_of_a_logit(layers, side):
    """Without the norms, whose statistics cover the whole image"""
    net = Discriminator(layers, channels=32).net
    net = nn.Sequential(*(m for m in net if not isinstance(m, nn.GroupNorm)))
    img = torch.randn(1, 3, 192, 192, requires_grad=True)
    logits = net(img)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    rows = img.grad.abs().sum((0, 1, 3)).nonzero()
    assert rows.max() - rows.min() + 1 == side


def test_a_logit_depends_on_one_image_only():
    torch.manual_seed(0)
    disc, img = Discriminator(2).double(), torch.randn(3, 3, 16, 16).double()
    assert torch.allclose(disc(img)[1:2], disc(img[1:2]), atol=1e-12)
    assert disc(img).shape == (3, 1, 2, 2)


def test_the_discriminator_has_the_layers_and_initialisation_of_vqgan():
    torch.manual_seed(0)
    convs = [m for m in build_discriminator(256).net if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convs] == [64, 128, 256, 512, 1]
    assert [m.stride[0] for m in convs] == [2, 2, 2, 1, 1]
    assert all(abs(m.weight.std() - 0.02) < 1e-3 for m in convs)
    assert len([m for m in build_discriminator(64).net if isinstance(m, nn.Conv2d)]) == 4


@pytest.mark.parametrize("data_range, low", [(1, 0), (2, -1)])
def test_l1_is_computed_in_the_pixel_range_of_the_source(data_range, low):
    """RAE: pixels in [0, 1]. LDM and VA-VAE: pixels in [-1, 1]."""
    a, b = torch.rand(2, 2, 3, 8, 8)
    expected = ((low + data_range * a) - (low + data_range * b)).abs().mean()
    pixels, target = normalize(255 * a), normalize(255 * b)
    l1, lpips = gan.pixel_losses(pixels, target, None, data_range)
    assert torch.isclose(l1, expected) and lpips == 0

    def squared(x, y):
        return (x - y).square().mean()
    assert gan.pixel_losses(pixels, target, squared, data_range)[1] > 0


def test_ema_update_load_and_swap():
    p = nn.Parameter(torch.tensor(1.0))
    ema = EMA({"w": p})
    p.data.fill_(3.0)
    for decay, expected in ((1.0, 1.0), (0.75, 1.5), (0.0, 3.0)):
        ema.update(decay)
        assert ema.state_dict()["w"] == expected
    ema.load_state_dict({"w": torch.tensor(7.0)})
    ema.swap()
    assert p == 7 and ema.state_dict()["w"] == 3


def test_a_warning_is_logged_at_each_step_and_each_kind_is_explained_once(capsys):
    check = discriminator_warnings()
    found = [check(step, {"gan": 0.1, "right": right})
             for step, right in enumerate((0.8, 0.5, 0.5, 1.0, 0.8))]
    assert found == ["", "discriminator guesses", "discriminator guesses",
                     "discriminator always right", ""]
    printed = capsys.readouterr().out
    assert printed.count("warning") == 2 and "step 2:" in printed and "step 4:" in printed
    assert "--set gan_start=0" in printed
    assert check(9, {"right": 1.0}) == ""                     # the GAN loss has not started


# ---------------------------------------------------------------- the step
def test_the_gradients_of_a_step_follow_from_the_equations(stage1, tmp_path, monkeypatch):
    """The equations are written out again here, for the decoder and for the discriminator."""
    grads, clip = [], gan.clip_grad_norm_

    def kept(parameters, top):
        parameters = list(parameters)
        grads.append([p.grad.clone() for p in parameters])
        return clip(parameters, top)
    monkeypatch.setattr(gan, "clip_grad_norm_", kept)
    line = go(stage1, tmp_path / "gan", "--steps", 1, "--set", "gan_start=0",
              "--precision", "fp64", "--w-gan", 0.7, "--data", "shapes:objects=1")[0]

    torch.manual_seed(3)                                      # seed and data of stage 1
    disc, model = build_discriminator(16), VTPModel.from_pretrained(stage1)
    source = open_data("shapes:objects=1", "train", 3, side=16)
    batches = TrainBatches(source, None, 3, 4, 4, 4, clip=False, ssl=False, rec=True, image=16,
                           local_image=16, n_local=0, patch=8)
    img = normalize(batches[0].image).double()
    pixels = model.get_latents_decoded_images(model.get_reconstruction_latents(img))
    l1, g = (STD * (pixels - img)).abs().mean(), -disc(pixels).mean()       # pixels in [0, 1]
    last = model.pixel_decoder.proj_out.weight
    grad_rec = torch.autograd.grad(l1, last, retain_graph=True)[0]
    grad_gan = torch.autograd.grad(g, last, retain_graph=True)[0]
    weight = grad_rec.norm() / (grad_gan.norm() + 1e-4)
    loss = l1 + 0.7 * weight * g
    fake = disc(pixels.detach())
    loss_disc = (torch.relu(1 - disc(img)).mean() + torch.relu(1 + fake).mean()) / 2
    decoder = list(model.pixel_decoder.parameters())
    expected = (torch.autograd.grad(loss, decoder, retain_graph=True),
                torch.autograd.grad(loss_disc, list(disc.parameters())))
    for ours, theirs in zip(grads, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert (a - b).abs().max() <= 1e-9 * b.abs().max()
    logged = {"l1": l1, "gan": g, "adaptive": weight, "disc": loss_disc, "loss": loss}
    for name, value in logged.items():
        assert math.isclose(line[name], value.item(), rel_tol=1e-5), name


def one_step(stage1, scaler):
    """-> model and discriminator with the gradients of one step"""
    torch.manual_seed(0)
    model, disc = VTPModel.from_pretrained(stage1), build_discriminator(16)
    model.requires_grad_(False).pixel_decoder.requires_grad_(True)
    args, img = Namespace(perceptual="none", w_gan=0.5), torch.randn(2, 3, 16, 16)
    amp = torch.autocast("cpu", enabled=False)

    def pixel_loss(pixels, target):
        return gan.pixel_losses(pixels, target, None, 1)
    pixels, _, _ = gan.decoder_gradients(img, model, gan.reconstruct, disc,
                                         model.pixel_decoder.proj_out.weight, args, pixel_loss,
                                         amp, scaler)
    # the loss of the decoder gives the discriminator no gradient
    assert all(p.grad is None and p.requires_grad for p in disc.parameters())
    gan.discriminator_gradients(img, pixels, disc, amp, scaler)
    return model, disc


def test_the_loss_scale_of_fp16_does_not_change_the_gradients(stage1):
    plain = one_step(stage1, torch.amp.GradScaler("cpu", enabled=False))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled = one_step(stage1, scaler)
    plain, scaled = ([p for module in modules for p in module.parameters() if p.requires_grad]
                     for modules in (plain, scaled))
    scaler.unscale_(torch.optim.SGD(scaled, 0.1))
    for a, b in zip(scaled, plain, strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-5, atol=1e-7)


def test_only_the_decoder_is_trained_and_its_average_is_saved(stage1, whole):
    before, after, state = weights(stage1), weights(whole), torch.load(whole / "last.pt")
    decoder = {k for k in before if k.startswith("pixel_decoder.") and not k.endswith("periods")}
    assert decoder and before.keys() == after.keys()
    for k in before:
        assert torch.equal(before[k], after[k]) == (k not in decoder), k
    assert state["ema"].keys() == decoder
    for k in decoder:
        assert torch.equal(after[k], state["ema"][k])
        assert not torch.equal(after[k], state["model"][k])


def test_latents_are_equal_to_those_of_stage_1_in_every_bit(stage1, whole):
    img = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    one, two = (VTPModel.from_pretrained(run).get_reconstruction_latents(img)
                for run in (stage1, whole))
    assert torch.equal(one, two)


def test_the_gan_loss_of_the_decoder_starts_at_gan_start(stage1, whole, tmp_path):
    lines = log(whole)                                        # gan_start=1
    assert ["gan" in line for line in lines] == [False, True, True, True]
    assert all("disc" in line for line in lines)
    # the discriminator starts an eighth of the run earlier
    late = go(stage1, tmp_path / "late", "--steps", 8, "--set", "gan_start=3")
    assert ["disc" in line for line in late] == [False] * 2 + [True] * 6
    assert ["gan" in line for line in late] == [False] * 3 + [True] * 5
    never = go(stage1, tmp_path / "never", "--w-gan", 0)
    assert not {"gan", "disc", "adaptive"} & {k for line in never for k in line}
    assert never[0]["grad_norm"] == lines[0]["grad_norm"]
    assert never[1]["grad_norm"] != lines[1]["grad_norm"]


def test_by_default_the_discriminator_starts_at_6_16_and_the_gan_loss_at_8_16(stage1, tmp_path):
    """RAE: disc_upd_start 6 and disc_start 8 of 16 epochs"""
    lines = go(stage1, tmp_path / "gan", "--steps", 16, "--save-every", 16, "--set", "max_bad=0.1")
    assert ["disc" in line for line in lines] == [False] * 6 + [True] * 10
    assert ["gan" in line for line in lines] == [False] * 8 + [True] * 8


def test_the_learning_rate_falls_by_a_cosine_to_a_tenth(stage1, tmp_path):
    """RAE: warm-up during 1 epoch of 16, then from 2e-4 to 2e-5. The schedule of the discriminator
    begins at the first step of the discriminator."""
    def rate(step, warmup=2, steps=16):
        if step < warmup:
            return 2e-4 * (step + 1) / warmup
        progress = (step - warmup) / (steps - warmup - 1)
        return 2e-5 + 1.8e-4 * (1 + math.cos(math.pi * progress)) / 2

    lines = go(stage1, tmp_path / "gan", "--steps", 16, "--save-every", 16, "--lr", 2e-4,
               "--warmup", 2, "--set", "gan_start=8")
    expected = [rate(step) for step in range(16)]
    assert [line["lr"] for line in lines] == pytest.approx(expected, rel=1e-5)     # 6 digits
    state = torch.load(tmp_path / "gan" / "last.pt")
    assert state["optimizer"]["param_groups"][0]["lr"] == pytest.approx(2e-5)
    assert state["optimizer_disc"]["param_groups"][0]["lr"] == pytest.approx(rate(15 - 6))


def test_gradients_are_not_clipped_by_default(stage1, tmp_path, monkeypatch):
    """As in RAE. clip_grad=0 also disables clipping."""
    tops, clip = [], gan.clip_grad_norm_

    def kept(parameters, top):
        tops.append(top)
        return clip(parameters, top)
    monkeypatch.setattr(gan, "clip_grad_norm_", kept)
    for number, words in enumerate(([], ["--set", "clip_grad=0"], ["--set", "clip_grad=2.5"])):
        go(stage1, tmp_path / f"gan{number}", "--steps", 1, "--w-gan", 0, *words)
    assert tops == [math.inf, math.inf, 2.5]


def test_the_first_ema_decay_is_2_11_as_in_ldm(stage1, tmp_path, monkeypatch):
    """LDM's LitEma counts a step before it averages"""
    decays, update = [], gan.update_ema

    def kept(target, source, decay):
        decays.append(decay)
        update(target, source, decay)
    monkeypatch.setattr(gan, "update_ema", kept)
    go(stage1, tmp_path / "gan", "--w-gan", 0, "--set", "ema_decoder=0.3")
    assert decays == pytest.approx([2 / 11, 3 / 12, 0.3, 0.3])


def killed_after_step_2(whole, out):
    """-> the folder of a run that was killed after the checkpoint of step 2"""
    out.mkdir()
    for old, new in (("previous.pt", "last.pt"), ("log.jsonl",) * 2, ("run.json",) * 2):
        shutil.copy(whole / old, out / new)
    return out


def test_a_resumed_run_is_equal_to_an_uninterrupted_one(stage1, whole, tmp_path):
    """In every bit: the decoder, its average, the discriminator and both optimizers"""
    out = killed_after_step_2(whole, tmp_path / "killed")
    assert go(stage1, out) == log(whole)
    one, two = (torch.load(run / "last.pt") for run in (whole, out))
    assert same(one, two)
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def same(a, b):
    """True if nested states are equal in every bit; the entry "out" may differ"""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k != "out")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_two_processes_give_the_result_of_one(stage1, tmp_path):
    flags = ["--precision", "fp64", "--steps", 3]
    go(stage1, tmp_path / "one", *flags)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port,
             ROOT / "train.py", *TINY, *START, "--init", stage1, "--out", tmp_path / "two", *flags]
    run = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True,
                         cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=180)
    assert run.returncode == 0, run.stderr
    one, two = (torch.load(tmp_path / n / "last.pt") for n in ("one", "two"))
    for part in ("model", "ema", "disc"):
        for k, x in one[part].items():
            difference = (x - two[part][k]).abs().max()
            assert difference <= 1e-9 * x.abs().max().clamp_min(1e-9), (part, k)
    for a, b in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert a.keys() == b.keys()
        assert all(a[k] == b[k] or math.isclose(a[k], b[k], rel_tol=1e-5) for k in a)


@pytest.mark.filterwarnings("ignore:.*pretrained:UserWarning",          # lpips calls torchvision
                            "ignore:Arguments other than a weight enum")
@pytest.mark.parametrize("kind, name", [("squeeze", "lpips"), ("efficientnet", "efficientnet")])
def test_the_perceptual_loss_is_added_to_the_loss_under_its_name(
        stage1, tmp_path, monkeypatch, kind, name):
    """With random weights of LPIPS, because only the sum and its name are tested"""
    monkeypatch.setattr(gan, "build", lambda kind: Perceptual("squeeze", random_trunk=True))
    out = tmp_path / "gan"
    for line in go(stage1, out, "--image", 32, "--perceptual", kind, "--steps", 2):
        assert line[name] > 0 and line["perceptual"] == kind
        assert ("lpips" in line) == (kind == "squeeze")
        expected = line["l1"] + line[name] + 0.5 * line.get("adaptive", 0) * line.get("gan", 0)
        assert math.isclose(line["loss"], expected, rel_tol=1e-4)
    # evaluation uses the image size of stage 2
    assert VTPModel.from_pretrained(out).config.image_size == 32


class MeanColour(nn.Module):
    """A minimal model: the mean colour of each image, multiplied by a learned gain"""
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3, 1, 1))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def save_pretrained(self, folder):
        safetensors.torch.save_file(self.state_dict(), folder + "/model.safetensors")


def test_further_losses_are_added_and_noise_is_the_same_after_resuming(tmp_path):
    stop_in = []

    def reconstruct(model, img):
        if stop_in and stop_in.pop(0) == 1:
            signal.raise_signal(signal.SIGTERM)
        noise = torch.randn(len(img), 3, 1, 1)                # as in RAE and LDM
        pixels = (img.mean((2, 3), keepdim=True) + noise) * model.gain + 0 * img
        return pixels, {"small": 0.5 * model.gain.square().sum()}

    def run(out, status=0):
        args = Namespace(out=str(tmp_path / out), fresh=False, data="shapes", seed=0, image=16,
                         patch=8, steps=4, batch=4, lr=0.1, warmup=0, clip_grad=3.0, w_gan=0.5,
                         gan_start=1, ema_decoder=0.0, perceptual="none", workers=0, max_bad=0.1,
                         log_every=1, save_every=100)
        model = MeanColour()
        assert train_with_gan(args, model, reconstruct, model.gain, torch.device("cpu"), "fp32",
                              clean_batches, prefetch) == status
        return log(args.out)

    whole = run("whole")
    stop_in[:] = [0, 1]                                       # a signal in the second step
    first = run("parts", EXIT_RESUME)
    assert run("parts") == whole and first == whole[:2]
    line, saved = whole[-1], weights(tmp_path / "whole")
    expected = line["l1"] + line["small"] + 0.5 * line["adaptive"] * line["gan"]
    assert math.isclose(line["loss"], expected, rel_tol=1e-4)
    assert (saved["gain"] < 1).all() and torch.equal(saved["frozen"], torch.ones(3))
    assert same(weights(tmp_path / "parts"), saved)


# ---------------------------------------------------------------- flags and run folder
def arguments(*words):
    return gan.parse_arguments(["--stage", "2", *map(str, words)])


def test_flags_not_given_come_from_stage_1_and_the_others_from_the_tables(stage1, tmp_path):
    args = arguments("--init", stage1, "--lr", 1e-3)
    assert args.out == f"{stage1}-gan" and args.data is None and args.lr == 1e-3
    gan.inherit_settings(args, VTPConfig(image_size=16, vision_patch_size=8))
    assert (args.data, args.val_data, args.seed) == ("shapes:objects=1", None, 3)
    assert (args.image, args.patch) == (16, 8)
    assert (args.steps, args.batch, args.lr, args.ema_decoder) == (600, 64, 1e-3, 0.99)     # nano
    assert args.clip_grad == 0 and args.gan_start is None
    # released weights have no run.json
    args = arguments("--init", tmp_path, "--data", "shapes", "--image", 32, "--seed", 5,
                     "--set", "ema_decoder=0.5", "--set", "clip_grad=2")
    gan.inherit_settings(args, VTPConfig())
    assert (args.data, args.seed, args.image) == ("shapes", 5, 32)
    assert (args.steps, args.batch, args.w_gan) == (40_000, 512, 0.5)
    assert (args.ema_decoder, args.clip_grad, args.max_bad) == (0.5, 2.0, 0.1)


def test_run_json_holds_every_setting_under_its_name(whole):
    settings = json.loads((whole / "run.json").read_text())
    assert {"init", "stage", "data", "seed", "image", "patch", "precision", "machine",
            *gan.FLAG_DEFAULTS, *gan.RECIPE} <= settings.keys()
    assert "set" not in settings and settings["gan_start"] == 1 and settings["stage"] == 2


def test_help_shows_the_flags_of_stage_2_and_the_settings_with_their_sources(capsys):
    with pytest.raises(SystemExit) as end:
        train.command(["--stage", "2", "--help"])
    printed = capsys.readouterr().out
    assert not end.value.code and "--w-gan" in printed and "--w-clip" not in printed
    for name, (_, _, source) in gan.RECIPE.items():
        assert f"  {name} " in printed and source in printed
    assert "--w-gan W_GAN" in printed and "VQGAN 0.8" in printed


def test_eval_py_reads_a_run_of_stage_2(whole, monkeypatch, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    recon = ["recon", run, "--limit", "8", "--perceptual", "none"]
    for words in (recon, ["zeroshot", run, "--limit", "8"]):
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, words), "--device", "cpu"])
        eval.main()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    names = {json.loads(line)["name"] for line in lines}
    assert {"PSNR", "SSIM"} <= names and any(name.startswith("zero-shot") for name in names)


@pytest.mark.parametrize("words, sentence", [
    ("", "name the folder with --init RUN"),
    ("--init RUN --out RUN", "is the run of stage 1 itself"),
    ("--init RUN --set ema_decoder=1.5", "ema_decoder=1.5: must be a number from 0 to 1"),
    ("--init RUN --set ema=0.5", "ema=0.5: wanted name=value, where name is one of clip_grad"),
    ("--init RUN --set gan_start=half", "gan_start=half: must be the number of a step, 0 or more"),
    ("--init RUN --set clip_grad=-1", "clip_grad=-1.0: must be 0 or more"),
    ("--init RUN --w-gan -1", "--w-gan -1.0: must be 0 or more"),
    ("--init RUN --steps 0", "--steps 0: must be 1 or more"),
    ("--init EMPTY --data shapes", "holds no config.json"),
    ("--init RUN --image 8",
     "--image 8 is too small for the discriminator; use at least 12 pixels"),
    ("--init RUN --image 20", "--image 20 is not a multiple of the patch size 8; try --image 16"),
    ("--init RUN --perceptual vgg", "python eval.py fetch vgg"),
])
def test_a_wrong_flag_raises_an_error_that_explains_it(stage1, tmp_path, monkeypatch, words,
                                                       sentence):
    monkeypatch.setenv("VTP_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    places = {"RUN": str(stage1), "EMPTY": str(tmp_path)}
    words = [places.get(word, word) for word in words.split()]
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        stage2("--stage", 2, "--out", tmp_path / "gan", "--perceptual", "none", "--device", "cpu",
               *words)
    assert not (tmp_path / "gan").exists()


@pytest.mark.parametrize("words", ["--w-clip 1", "--micro 2", "--recompute"])
def test_stage_2_rejects_flags_of_stage_1(stage1, capsys, words):
    with pytest.raises(SystemExit):
        arguments("--init", stage1, *words.split())
    assert f"unrecognized arguments: {words}" in capsys.readouterr().err


def test_stage_1_rejects_flags_of_stage_2(capsys):
    with pytest.raises(SystemExit):
        train.arguments(["--w-gan", "0.5"])
    assert "unrecognized arguments: --w-gan" in capsys.readouterr().err


def test_a_run_without_a_decoder_or_without_data_raises_an_error(stage1, tmp_path):
    config = VTPConfig(train_reconstruction=False, train_clip=False, vision_embed_dim=32,
                       vision_depth=1, vision_num_heads=2)
    VTPModel(config).save_pretrained(tmp_path / "blind")
    with pytest.raises(ValueError, match="trained without a decoder"):
        stage2("--stage", 2, "--init", tmp_path / "blind", "--data", "shapes", "--device", "cpu")
    shutil.copytree(stage1, tmp_path / "released")
    (tmp_path / "released" / "run.json").unlink()
    with pytest.raises(ValueError, match="no run.json that names its training data; give --data"):
        stage2("--stage", 2, "--init", tmp_path / "released", "--device", "cpu")
