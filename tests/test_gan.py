"""Stage 2: the equation of its step, what stands still, and the same run whatever interruptions and processes."""
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
from data import Steps, batches, clean_steps, open_data
from vtp_min import VTPConfig, VTPModel, gan
from vtp_min.gan import Discriminator, adaptive_weight, advice, discriminator_for, fit, follow, hinge_d, hinge_g
from vtp_min.losses import Perceptual
from vtp_min.run import STOPPED, TIMING
from vtp_min.views import STD, normalize

ROOT = Path(__file__).parents[1]
TINY = "--stage 2 --batch 4 --steps 4 --save-every 2 --gan-start 1 --perceptual none --precision fp32 --log-every 1 --device cpu --workers 0".split()


@pytest.fixture(autouse=True)
def as_it_was():
    """A run in this process sets signal handlers, the default dtype and draws: afterwards all is as before."""
    handlers, threads = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}, torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float32)
    for s, handler in handlers.items():
        signal.signal(s, handler)


@pytest.fixture(scope="module")
def stage1(tmp_path_factory):
    """A run of stage 1 as train.py would leave it, untrained"""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("stage1")
    VTPModel(VTPConfig(image_size=16, vision_patch_size=8, vision_embed_dim=32, vision_depth=1, vision_num_heads=2, vision_use_qk_norm=True, vision_feature_bottleneck=8,
                       text_embed_dim=16, text_num_heads=2, text_depth=1, decoder_embed_dim=32, decoder_num_heads=2, decoder_depth=1, decoder_use_qk_norm=True,
                       decoder_upscale=8, rope_dtype="float32")).save_pretrained(folder)
    (folder / "run.json").write_text(json.dumps({"data": "shapes:objects=1", "val_data": None, "seed": 3, "image": 16, "size": "nano"}))
    return folder


def train_decoder(args):
    return gan.train(args, clean_steps, batches)


def typed(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
    return train.arguments()


def go(monkeypatch, stage1, out, *words):
    """Stage 2 in this process -> its log"""
    assert train_decoder(typed(monkeypatch, *TINY, "--init", stage1, "--out", out, *words)) == 0
    return log(out)


def log(out):
    """Logged steps without what may differ between equal runs"""
    return [{k: v for k, v in json.loads(line).items() if k not in TIMING} for line in (Path(out) / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(stage1, tmp_path_factory):
    """Four steps, checkpoints at 2 and 4 -> folder. Read it, do not change it."""
    out = tmp_path_factory.mktemp("whole") / "gan"
    with pytest.MonkeyPatch.context() as patch:
        go(patch, stage1, out)
    return out


def weights(folder):
    return safetensors.torch.load_file(Path(folder) / "model.safetensors")


# ---------------------------------------------------------------- the game
def test_an_answer_of_zero_costs_one_and_beyond_the_margin_nothing_is_gained():
    zero = torch.zeros(2, 1, 3, 3)
    assert hinge_d(zero, zero) == 1 and hinge_d(zero + 1, zero - 1) == 0 == hinge_d(zero + 9, zero - 9) and hinge_d(zero - 1, zero + 1) == 2
    assert hinge_g(zero + 3) == -3


def test_the_adaptive_weight_makes_both_slopes_equally_long_and_is_bounded():
    rec, push = torch.randn(5, 7), 40 * torch.randn(5, 7)
    assert torch.isclose((adaptive_weight(rec, push) * push).norm(), rec.norm(), rtol=1e-4)
    assert torch.isclose(adaptive_weight(rec, 9 * push), adaptive_weight(rec, push) / 9, rtol=1e-4)         # however loud the discriminator is
    assert adaptive_weight(rec, 0 * push) == 1e4 and adaptive_weight(0 * rec, push) == 0


@pytest.mark.parametrize("layers, seen", [(2, 34), (3, 70)])
def test_one_answer_judges_a_square_of_so_many_pixels(layers, seen):
    """Norms left out: what they average over is the whole picture."""
    net = nn.Sequential(*(m for m in Discriminator(layers, channels=32).net if not isinstance(m, nn.GroupNorm)))
    img = torch.randn(1, 3, 192, 192, requires_grad=True)
    answers = net(img)
    answers[0, 0, answers.shape[2] // 2, answers.shape[3] // 2].backward()
    rows = img.grad.abs().sum((0, 1, 3)).nonzero()
    assert rows.max() - rows.min() + 1 == seen


def test_an_answer_depends_on_one_picture_alone():
    torch.manual_seed(0)
    disc, img = Discriminator(2).double(), torch.randn(3, 3, 16, 16).double()
    assert torch.allclose(disc(img)[1:2], disc(img[1:2]), atol=1e-12) and disc(img).shape == (3, 1, 2, 2)


def test_the_discriminator_has_vqgan_s_depth_and_start():
    torch.manual_seed(0)
    disc = discriminator_for(256)
    convs = [m for m in disc.net if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convs] == [64, 128, 256, 512, 1] and [m.stride[0] for m in convs] == [2, 2, 2, 1, 1]
    assert all(abs(m.weight.std() - 0.02) < 1e-3 for m in convs) and len([m for m in discriminator_for(64).net if isinstance(m, nn.Conv2d)]) == 4


@pytest.mark.parametrize("data_range, low", [(1, 0), (2, -1)])
def test_l1_is_that_of_pixels_in_the_source_s_range(data_range, low):
    """RAE takes L1 + LPIPS of pixels in [0, 1], LDM and VA-VAE of pixels in [-1, 1]"""
    a, b = torch.rand(2, 2, 3, 8, 8)
    expected = ((low + data_range * a) - (low + data_range * b)).abs().mean()
    ours = gan.pixel_losses(normalize(255 * a), normalize(255 * b), None, data_range)
    assert torch.isclose(ours[0], expected) and ours[1] == 0
    assert gan.pixel_losses(normalize(255 * a), normalize(255 * b), lambda x, y: (x - y).square().mean(), data_range)[1] > 0


def test_an_average_follows_from_a_copy_to_standing_still():
    ema, now = {"w": torch.tensor(1.0)}, {"w": torch.tensor(3.0)}
    for m, expected in ((1.0, 1.0), (0.75, 1.5), (0.0, 3.0)):
        follow(ema, now, m)
        assert ema["w"] == expected


def test_a_one_sided_game_is_said_once_a_kind_and_logged_while_it_lasts(capsys):
    warned = set()
    found = [advice(right, step, warned) for step, right in enumerate((0.8, 0.5, 0.5, 1.0, 0.8))]
    assert found == ["", "discriminator guesses", "discriminator guesses", "discriminator always right", ""]
    said = capsys.readouterr().out
    assert said.count("warning") == 2 and "step 2:" in said and "step 4:" in said and "--gan-start 0" in said


# ---------------------------------------------------------------- the step
def test_the_gradient_of_a_step_is_that_of_the_equation(stage1, tmp_path, monkeypatch):
    """Written out as VQGAN does, with a backward pass through everything for each loss: the decoder, then the discriminator. Ours goes by the slopes at the pixels."""
    grads, clip = [], gan.clip_grad_norm_

    def kept(parameters, top):
        parameters = list(parameters)
        grads.append([p.grad.clone() for p in parameters])
        return clip(parameters, top)
    monkeypatch.setattr(gan, "clip_grad_norm_", kept)
    line = go(monkeypatch, stage1, tmp_path / "gan", "--steps", 1, "--gan-start", 0, "--precision", "fp64", "--w-gan", 0.7, "--data", "shapes:objects=1")[0]

    torch.manual_seed(3)                                                                  # the seed is stage 1's, and so is the data
    disc, model = discriminator_for(16), VTPModel.from_pretrained(stage1)
    source = open_data("shapes:objects=1", "train", 3, side=16)
    img = normalize(Steps(source, None, 3, 4, 4, 4, clip=False, ssl=False, rec=True, image=16, local_image=16, n_local=0, patch=8)[0]["image"]).double()
    pixels = model.get_latents_decoded_images(model.get_reconstruction_latents(img))
    l1, fool = (STD * (pixels - img)).abs().mean(), -disc(pixels).mean()                   # L1 of pixels in [0, 1]
    last = model.pixel_decoder.proj_out.weight
    rec_slope, gan_slope = (torch.autograd.grad(loss, last, retain_graph=True)[0] for loss in (l1, fool))
    weight = rec_slope.norm() / (gan_slope.norm() + 1e-4)
    painter = torch.autograd.grad(l1 + 0.7 * weight * fool, list(model.pixel_decoder.parameters()), retain_graph=True)
    judge = (torch.relu(1 - disc(img)).mean() + torch.relu(1 + disc(pixels.detach())).mean()) / 2
    for ours, theirs in zip(grads, (painter, torch.autograd.grad(judge, list(disc.parameters()))), strict=True):
        assert all((a - b).abs().max() <= 1e-9 * b.abs().max() for a, b in zip(ours, theirs, strict=True))
    for name, value in (("l1", l1), ("gan", fool), ("adaptive", weight), ("disc", judge), ("loss", l1 + 0.7 * weight * fool)):
        assert math.isclose(line[name], value.item(), rel_tol=1e-5), name


def test_only_the_decoder_moves_and_what_is_saved_is_its_average(stage1, whole):
    before, after, state = weights(stage1), weights(whole), torch.load(whole / "last.pt")
    decoder = {k for k in before if k.startswith("pixel_decoder.") and not k.endswith("periods")}
    assert decoder and before.keys() == after.keys()
    for k in before:
        assert torch.equal(before[k], after[k]) == (k not in decoder), k                  # bit for bit
    assert all(torch.equal(after[k], state["ema"][k]) and not torch.equal(after[k], state["model"][k]) for k in decoder)
    assert state["ema"].keys() == decoder


def test_latents_are_those_of_stage_1_to_the_bit(stage1, whole):
    img = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    one, two = (VTPModel.from_pretrained(run).get_reconstruction_latents(img) for run in (stage1, whole))
    assert torch.equal(one, two)


def test_the_decoder_hears_the_discriminator_from_gan_start_on(stage1, whole, tmp_path, monkeypatch):
    lines = log(whole)                                                                    # --gan-start 1
    assert ["gan" in line for line in lines] == [False, True, True, True] and all("disc" in line for line in lines)
    late = go(monkeypatch, stage1, tmp_path / "late", "--steps", 8, "--gan-start", 3)     # the head start is an eighth of the run
    assert ["disc" in line for line in late] == [False] * 2 + [True] * 6 and ["gan" in line for line in late] == [False] * 3 + [True] * 5
    never = go(monkeypatch, stage1, tmp_path / "never", "--w-gan", 0)
    assert not {"gan", "disc", "adaptive"} & {k for line in never for k in line}
    assert never[0]["grad_norm"] == lines[0]["grad_norm"] and never[1]["grad_norm"] != lines[1]["grad_norm"]


def test_the_discriminator_starts_after_six_sixteenths_and_the_decoder_hears_it_after_half_of_the_run(stage1, tmp_path, monkeypatch):
    """RAE: disc_upd_start 6 and disc_start 8 of 16 epochs"""
    monkeypatch.setitem(globals(), "TINY", " ".join(TINY).replace("--gan-start 1 ", "").split())
    lines = go(monkeypatch, stage1, tmp_path / "gan", "--steps", 16, "--save-every", 16)
    assert ["disc" in line for line in lines] == [False] * 6 + [True] * 10
    assert ["gan" in line for line in lines] == [False] * 8 + [True] * 8


def test_the_learning_rate_falls_by_a_cosine_to_a_tenth(stage1, tmp_path, monkeypatch):
    """RAE: warm-up during one epoch of 16, then from 2e-4 to 2e-5; the discriminator's rate counts the discriminator's own steps"""
    def rate(step, warmup=2, steps=16):
        if step < warmup:
            return 2e-4 * (step + 1) / warmup
        return 2e-5 + 1.8e-4 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup - 1))) / 2

    lines = go(monkeypatch, stage1, tmp_path / "gan", "--steps", 16, "--save-every", 16, "--lr", 2e-4, "--warmup", 2, "--gan-start", 8)
    assert [line["lr"] for line in lines] == pytest.approx([rate(step) for step in range(16)], rel=1e-5)      # the log has 6 digits
    state = torch.load(tmp_path / "gan" / "last.pt")
    assert state["opt"]["param_groups"][0]["lr"] == pytest.approx(2e-5)
    assert state["opt_disc"]["param_groups"][0]["lr"] == pytest.approx(rate(15 - 6))


def test_gradients_are_not_clipped_unless_asked(stage1, tmp_path, monkeypatch):
    """RAE clips none; 0 is none, too"""
    tops, clip = [], gan.clip_grad_norm_

    def kept(parameters, top):
        tops.append(top)
        return clip(parameters, top)
    monkeypatch.setattr(gan, "clip_grad_norm_", kept)
    for number, words in enumerate(([], ["--clip-grad", 0], ["--clip-grad", 2.5])):
        go(monkeypatch, stage1, tmp_path / f"gan{number}", "--steps", 1, "--w-gan", 0, *words)
    assert tops == [math.inf, math.inf, 2.5]


def test_the_average_starts_with_two_elevenths_as_ldm_s_does(stage1, tmp_path, monkeypatch):
    """LDM's LitEma counts the step before it averages"""
    decays, step = [], gan.follow

    def kept(ema, trained, decay):
        decays.append(decay)
        step(ema, trained, decay)
    monkeypatch.setattr(gan, "follow", kept)
    go(monkeypatch, stage1, tmp_path / "gan", "--w-gan", 0, "--ema-decoder", 0.3)
    assert decays == pytest.approx([2 / 11, 3 / 12, 0.3, 0.3])


def test_a_resumed_run_is_the_same_run(stage1, whole, tmp_path, monkeypatch):
    """Bit for bit: the decoder, its average, the discriminator and both optimizers."""
    out = tmp_path / "killed"
    out.mkdir()
    for old, new in (("previous.pt", "last.pt"), ("log.jsonl", "log.jsonl"), ("run.json", "run.json")):       # a kill after step 2's checkpoint
        shutil.copy(whole / old, out / new)
    assert go(monkeypatch, stage1, out) == log(whole)
    one, two = (torch.load(run / "last.pt") for run in (whole, out))
    assert same(one, two) and (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def same(a, b):
    """Nested states, equal to the bit; folders may differ"""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k != "out")
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, (list, tuple)) else a == b


def test_two_processes_take_the_steps_of_one(stage1, tmp_path, monkeypatch):
    flags = ["--precision", "fp64", "--steps", 3]
    go(monkeypatch, stage1, tmp_path / "one", *flags)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port, ROOT / "train.py", *TINY, "--init", stage1, "--out", tmp_path / "two", *flags]
    run = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=180)
    assert run.returncode == 0, run.stderr
    one, two = (torch.load(tmp_path / n / "last.pt") for n in ("one", "two"))
    for part in ("model", "ema", "disc"):
        for k, x in one[part].items():
            assert (x - two[part][k]).abs().max() <= 1e-9 * x.abs().max().clamp_min(1e-9), (part, k)
    for a, b in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert a.keys() == b.keys() and all(a[k] == b[k] or math.isclose(a[k], b[k], rel_tol=1e-5) for k in a)


@pytest.mark.filterwarnings("ignore:.*pretrained:UserWarning", "ignore:Arguments other than a weight enum")      # what lpips makes torchvision say
def test_lpips_joins_the_sum(stage1, tmp_path, monkeypatch):
    """A random trunk: here it is only about the plumbing."""
    monkeypatch.setattr(gan, "Perceptual", lambda net: Perceptual(net, random_trunk=True))
    for line in go(monkeypatch, stage1, tmp_path / "gan", "--image", 32, "--perceptual", "squeeze", "--steps", 2):
        assert line["lpips"] > 0 and line["perceptual"] == "squeeze"
        assert math.isclose(line["loss"], line["l1"] + line["lpips"] + 0.5 * line.get("adaptive", 0) * line.get("gan", 0), rel_tol=1e-4)
    assert VTPModel.from_pretrained(tmp_path / "gan").config.image_size == 32              # what it was fine-tuned at is what it is measured at


class Blots(nn.Module):
    """The least that `fit` can train: each picture's mean colour, with a learned gain"""
    def __init__(self):
        super().__init__()
        self.gain, self.frozen = nn.Parameter(torch.ones(3, 1, 1)), nn.Parameter(torch.ones(3), requires_grad=False)

    def save_pretrained(self, folder):
        safetensors.torch.save_file(self.state_dict(), folder + "/model.safetensors")


def test_fit_trains_what_asks_for_gradients_on_terms_of_its_own_and_draws_alike_after_a_resume(tmp_path, monkeypatch):
    stop_in = []

    def paint(model, img):
        if stop_in and stop_in.pop(0) == 1:
            signal.raise_signal(signal.SIGTERM)
        noise = torch.randn(len(img), 3, 1, 1)                                            # as RAE and LDM draw
        return (img.mean((2, 3), keepdim=True) + noise) * model.gain + 0 * img, {"small": 0.5 * model.gain.square().sum()}

    def run(out, status=0):
        args = Namespace(out=str(tmp_path / out), fresh=False, data="shapes", seed=0, image=16, patch=8, steps=4, batch=4, lr=0.1, warmup=0, clip_grad=3.0, w_gan=0.5, gan_start=1,
                         ema_decoder=0.0, perceptual="none", workers=0, max_bad=0.1, log_every=1, save_every=100)
        model = Blots()
        assert fit(args, model, paint, torch.device("cpu"), "fp32", model.gain, clean_steps, batches) == status
        return log(args.out)

    whole = run("whole")
    stop_in[:] = [0, 1]                                                                   # a signal in the second step
    first = run("parts", STOPPED)
    assert run("parts") == whole and first == whole[:2]
    line, saved = whole[-1], weights(tmp_path / "whole")
    assert math.isclose(line["loss"], line["l1"] + line["small"] + 0.5 * line["adaptive"] * line["gan"], rel_tol=1e-4)
    assert (saved["gain"] < 1).all() and torch.equal(saved["frozen"], torch.ones(3))
    assert same(weights(tmp_path / "parts"), saved)


# ---------------------------------------------------------------- a run like any other
def test_what_was_not_typed_comes_from_stage_1_and_the_rest_from_a_table(stage1, tmp_path, monkeypatch):
    args = typed(monkeypatch, "--stage", 2, "--init", stage1, "--lr", 1e-3)
    assert args.out == f"{stage1}-gan" and args.data is None and args.lr == 1e-3
    gan.take_over(args, VTPConfig(image_size=16, vision_patch_size=8))
    assert (args.data, args.val_data, args.seed, args.image, args.patch) == ("shapes:objects=1", None, 3, 16, 8)
    assert (args.steps, args.batch, args.lr, args.ema_decoder) == (600, 64, 1e-3, 0.99)                    # nano
    assert args.clip_grad is None
    args = typed(monkeypatch, "--stage", 2, "--init", tmp_path, "--data", "shapes", "--image", 32, "--seed", 5)
    gan.take_over(args, VTPConfig())                                                      # released weights have no run.json
    assert (args.data, args.seed, args.image, args.steps, args.batch, args.w_gan) == ("shapes", 5, 32, 40_000, 512, 0.5)


def test_evaluation_reads_it(whole, monkeypatch, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for words in (["recon", run, "--limit", "8", "--perceptual", "none"], ["zeroshot", run, "--limit", "8"]):
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, words), "--device", "cpu"])
        eval.main()
    names = {json.loads(line)["name"] for line in (run / "metrics.jsonl").read_text().splitlines()}
    assert {"PSNR", "SSIM"} <= names and any(name.startswith("zero-shot") for name in names)


@pytest.mark.parametrize("words, sentence", [
    ([], "name its folder with --init RUN"),
    (["--init", "RUN", "--w-clip", "1"], "has no use for --w-clip; it knows --init"),
    (["--init", "RUN", "--micro", "2", "--recompute"], "has no use for --micro, --recompute"),
    (["--init", "RUN", "--out", "RUN"], "is the run of stage 1 itself"),
    (["--init", "RUN", "--ema-decoder", "1.5"], "--ema-decoder 1.5: wanted 0 or more, and at most 1"),
    (["--init", "RUN", "--w-gan", "-1"], "--w-gan -1.0: wanted 0 or more"),
    (["--init", "RUN", "--clip-grad", "-1"], "--clip-grad -1.0: wanted 0 or more"),
    (["--init", "RUN", "--steps", "0"], "--steps 0: wanted 1 or more"),
    (["--init", "EMPTY", "--data", "shapes"], "holds no config.json"),
    (["--init", "RUN", "--image", "8"], "--image 8 is too small for the discriminator: wanted 12 px or more"),
    (["--init", "RUN", "--image", "20"], "--image 20 is no multiple of the patch, 8"),
    (["--init", "RUN", "--perceptual", "vgg"], "python eval.py fetch vgg"),
], ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_a_mistake_is_answered_with_a_sentence(stage1, tmp_path, monkeypatch, words, sentence):
    monkeypatch.setenv("VTP_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    places = {"RUN": str(stage1), "EMPTY": str(tmp_path)}
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        train_decoder(typed(monkeypatch, "--stage", 2, "--out", tmp_path / "gan", "--perceptual", "none", "--device", "cpu", *(places.get(w, w) for w in words)))


def test_flags_of_stage_2_are_refused_in_stage_1(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        typed(monkeypatch, "--w-gan", 0.5)
    assert "--w-gan: for stage 2; add --stage 2" in capsys.readouterr().err


def test_a_run_without_a_decoder_or_without_data_is_refused(stage1, tmp_path, monkeypatch):
    VTPModel(VTPConfig(train_reconstruction=False, train_clip=False, vision_embed_dim=32, vision_depth=1, vision_num_heads=2)).save_pretrained(tmp_path / "blind")
    with pytest.raises(ValueError, match="trained without a decoder"):
        train_decoder(typed(monkeypatch, "--stage", 2, "--init", tmp_path / "blind", "--data", "shapes", "--device", "cpu"))
    shutil.copytree(stage1, tmp_path / "released")
    (tmp_path / "released" / "run.json").unlink()
    with pytest.raises(ValueError, match="does not say what it was trained on; give --data"):
        train_decoder(typed(monkeypatch, "--stage", 2, "--init", tmp_path / "released", "--device", "cpu"))
