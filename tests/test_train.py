"""train.py end to end on tiny pictures: the same run whatever workers, processes or interruptions; and its schedules."""
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
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import train
from vtp_min import VTPConfig, VTPModel, vit
from vtp_min.extras.collapse import collapse_warnings
from vtp_min.losses import entropy, feature_std
from vtp_min.run import TIMING

ROOT = Path(__file__).parents[1]
TINY = ("--image 16 --patch 8 --batch 8 --batch-ssl 4 --batch-rec 4 --set locals=1 --set prototypes=32 "
        "--set head_hidden=32 --perceptual none --precision fp32 --log-every 1 --device cpu "
        "--workers 0").split()


def settings(**values):
    """{name: value} -> the flags that set them"""
    return [word for name, value in values.items() for word in ("--set", f"{name}={value}")]


def here(out, *flags):
    """python train.py, within this process -> its log. Much faster: torch is imported already."""
    before, argv = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}, sys.argv
    sys.argv = ["train.py", "--out", str(out), *TINY, *map(str, flags)]
    try:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.argv = argv
        for s, handler in before.items():
            signal.signal(s, handler)
    return log(out)


def there(command, out, *flags, **env):
    """The same in processes of its own -> Popen"""
    return subprocess.Popen([sys.executable, *command, str(ROOT / "train.py"), "--out", str(out), *TINY, *map(str, flags)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"} | env)


def log(out):
    """Logged steps without what may differ between equal runs"""
    return [{k: v for k, v in json.loads(line).items() if k not in TIMING} for line in (Path(out) / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def out(tmp_path):
    yield tmp_path / "run"
    shutil.rmtree(tmp_path / "run", ignore_errors=True)                              # a checkpoint is 130 MB: the vocabulary


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All objectives, 4 steps, checkpoints at 2 and 4 -> folder. Read it, do not change it."""
    folder = tmp_path_factory.mktemp("whole")
    here(folder, "--steps", 4, "--save-every", 2)
    yield folder
    shutil.rmtree(folder)


# ---------------------------------------------------------------- a run
def test_the_log_names_every_term_of_the_loss_and_all_are_finite(whole):
    lines = log(whole)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        for name in ("loss", "clip", "dino", "ibot", "koleo", "rec", "lr", "weight_decay", "grad_norm", "logit_scale", "teacher_entropy", "feature_std"):
            assert math.isfinite(line[name]), name
        assert line["bad"] == 0
        terms = line["clip"] + line["dino"] + line["ibot"] + 0.1 * line["koleo"] + 0.1 * line["rec"]
        assert math.isclose(line["loss"], terms, rel_tol=1e-4)                         # the sum of the docstring
    timed = json.loads((whole / "log.jsonl").read_text().splitlines()[0])
    assert TIMING <= timed.keys() and timed["images_per_s"] > 0 and 0 < timed["share_of_peak"] < 2


def test_losses_start_where_ignorance_puts_them(whole):
    first = log(whole)[0]
    assert abs(first["clip"] - math.log(8)) < 1 and abs(first["dino"] - math.log(32)) < 1 and 0 < first["feature_std"] <= 1


def test_the_run_folder_holds_the_student_in_the_official_layout(whole):
    state, saved = torch.load(whole / "last.pt"), safetensors.torch.load_file(whole / "model.safetensors")
    assert state["step"] == 4 and torch.load(whole / "previous.pt")["step"] == 2
    assert all(torch.equal(v, state["student"]["model." + k]) for k, v in saved.items())
    model = VTPModel.from_pretrained(whole)
    assert model.get_reconstruction_latents(torch.zeros(1, 3, 16, 16)).shape == (1, 64, 2, 2)
    assert not torch.equal(state["teacher"]["trunk.cls_token"], state["student"]["model.trunk.cls_token"])      # the teacher lags behind


def interrupted(whole, out):
    """The folder as a kill after step 2's checkpoint would have left it, with log lines beyond it"""
    out.mkdir()
    for old, new in (("previous.pt", "last.pt"), ("log.jsonl", "log.jsonl"), ("run.json", "run.json")):
        shutil.copy(whole / old, out / new)
    return out


def test_a_resumed_run_is_the_same_run(whole, out):
    """Bit for bit: the batches, the draws, the optimizer and the order of sums."""
    assert here(interrupted(whole, out), "--steps", 4, "--save-every", 2) == log(whole)
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def same(a, b):
    """Nested states, to the bit"""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.mark.parametrize("flags", [[], [*settings(teacher="centering", clip_loss="siglip"), "--micro", 4]], ids=["", "centring siglip micro"])
def test_all_that_a_checkpoint_holds_goes_on_as_it_was(out, tmp_path, flags):
    """Weights, teacher, its center, optimizer, scaler, counts: 4 steps = 2 + a kill + 2."""
    here(out, "--steps", 4, "--save-every", 2, *flags)
    here(interrupted(out, tmp_path / "killed"), "--steps", 4, "--save-every", 2, *flags)
    one, two = (torch.load(folder / "last.pt") for folder in (out, tmp_path / "killed"))
    one["settings"].pop("out"), two["settings"].pop("out")
    assert one.keys() == {"step", "settings", "skipped", "bad", "student", "teacher", "optimizer", "scaler", "targets"} and same(one, two)


@pytest.mark.parametrize("flags", [[], ["--micro", 4, *settings(teacher="centering")]], ids=["whole", "micro-batches"])
def test_a_step_with_a_loss_that_is_not_finite_is_skipped_and_changes_nothing(out, flags, monkeypatch):
    from vtp_min import losses
    whole, calls = losses.dino_loss, []

    def sick(*args):
        calls.append(1)
        return whole(*args) * (math.nan if len(calls) > 2 * (2 if flags else 1) else 1)                # pieces ask twice a step
    monkeypatch.setattr(losses, "dino_loss", sick)
    lines = here(out, "--steps", 3, "--save-every", 1, *settings(fast=0), *flags)
    assert [line.get("skipped", 0) for line in lines] == [0, 0, 1] and lines[2]["dino"] == "nan"
    one, two = (torch.load(out / name) for name in ("previous.pt", "last.pt"))
    assert (one["step"], two["step"]) == (2, 3) and all(same(one[k], two[k]) for k in ("student", "teacher", "targets"))
    assert same(one["optimizer"]["state"], two["optimizer"]["state"])


# ---------------------------------------------------------------- compiled, and in pieces
@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
def test_gradients_of_compiled_blocks_are_those_of_plain_ones(recompute, monkeypatch):
    torch.manual_seed(0)
    model, grads, counter = VTPModel(VTPConfig.of_size("pico", 16, 8, 16)), [], CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    torch._dynamo.reset()
    image, text = torch.randn(2, 3, 16, 16), torch.randint(1, 99, (2, 8))
    for compiled in (False, True):
        if compiled:
            train.wrap_blocks(Namespace(compile=True, recompute=recompute), model, None)
        model.zero_grad()
        outputs = [*model.trunk(image), model.get_clip_text_feature(text)]
        sum(x.square().sum() for x in outputs).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert counter.frame_count > 1 and grads[0].keys() == grads[1].keys()              # a block of the trunk and one of the text tower
    for name, grad in grads[0].items():
        assert torch.allclose(grads[1][name], grad, rtol=1e-4, atol=1e-5 * grad.abs().max().item()), name


def test_a_run_with_compile_and_recompute_compiles_its_blocks(out, monkeypatch):
    """Once, torch.compile skipped each checkpointed block without a message."""
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    torch._dynamo.reset()
    here(out, "--steps", 2, "--compile", "--recompute", "--size", "pico", "--w-clip", 0, "--w-ssl", 0)
    assert counter.frame_count > 0


def passes(out, monkeypatch, *flags):
    """-> how often a step in two pieces runs the student's trunk: (images, with gradients), (images, without), (crops, with), (crops, without)"""
    counts, forward = dict.fromkeys([(x, g) for x in ("images", "crops") for g in (True, False)], 0), vit.VisionTransformer.forward

    def counted(trunk, img, mask=None, keep=None):
        if trunk.training and not img.is_meta:                                                             # the teacher's never is
            counts["images" if mask is None else "crops", torch.is_grad_enabled()] += 1
        return forward(trunk, img, mask, keep)
    monkeypatch.setattr(vit.VisionTransformer, "forward", counted)
    lines = here(out, "--steps", 1, "--micro", 4, *settings(locals=0), *flags)
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
def test_the_first_pass_over_pieces_runs_for_what_clip_and_koleo_compare_and_nothing_else(out, monkeypatch, flags, expected):
    """CLIP compares images, KoLeo crops: what the flags turn off costs no forward pass."""
    line, found = passes(out, monkeypatch, *flags)
    assert found == expected
    assert ("koleo" in line) == (found[3] > 0) and ("feature_std" in line) == (found[2] > 0)


def first_gradient(out, monkeypatch, *flags):
    """-> the first step's gradient as one vector, its line of the log"""
    found, clip = [], torch.nn.utils.clip_grad_norm_

    def kept(parameters, top):
        parameters = [*parameters]
        found.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
        return clip(parameters, top)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", kept)       # train.py imports it anew
        line, = here(out, "--fresh", "--steps", 1, *flags)
    return found[0], line


def test_pieces_give_the_gradient_of_the_whole_in_bfloat16(out, monkeypatch):
    """Losses are computed in float32 in both, so the same features give the same terms. Sums of bfloat16 gradients are taken in another order."""
    flags = ["--precision", "bf16", "--size", "pico", "--batch", 16, "--batch-ssl", 16, "--batch-rec", 16, *settings(locals=0, w_koleo=1)]
    (one, line), (many, other) = (first_gradient(out, monkeypatch, *flags, "--micro", micro) for micro in (0, 4))
    assert (one - many).norm() < 3e-3 * one.norm()
    for name in ("clip", "dino", "ibot", "koleo", "rec", "teacher_entropy", "feature_std"):
        assert math.isclose(line[name], other[name], rel_tol=2e-5), name


def test_micro_batches_log_the_feature_std_of_the_whole_batch_with_and_without_koleo(whole, out):
    """It is that of the features, whatever losses read them."""
    line = here(out, "--steps", 1, "--micro", 4, *settings(w_koleo=0))[0]
    assert math.isclose(line["feature_std"], log(whole)[0]["feature_std"], rel_tol=1e-4)


# ---------------------------------------------------------------- what is said
RECIPE = Namespace(prototypes=256, batch=64, warmup=10, clip_loss="clip")


def test_collapse_is_named_with_the_setting_that_helps_and_health_is_left_alone(capsys):
    health = {"teacher_entropy": 4.4, "feature_std": 0.9, "clip": 1.0}
    sick = {"uniform teacher": ({"teacher_entropy": math.log(256)}, "teacher_temp"),
            "constant teacher": ({"teacher_entropy": 0.01}, "teacher=sinkhorn"),
            "collapsed features": ({"feature_std": 0.01}, "w_koleo"),
            "blind contrast": ({"clip": math.log(64)}, "captions")}
    assert collapse_warnings(RECIPE)(50, health) == ""
    for kind, (values, setting) in sick.items():
        check = collapse_warnings(RECIPE)
        assert check(5, health | values) == "" and check(50, health | values) == kind
        assert setting in capsys.readouterr().out
        assert check(60, health | values) == kind                        # logged while it lasts
        assert capsys.readouterr().out == ""                             # but printed once


@pytest.mark.parametrize("values, sentence", [
    ({"clip": 4.5}, "clip 4.50 is at or above ln B = 4.16, the value of random guessing"),
    ({"clip": math.log(64)}, "clip 4.16 is at or above ln B = 4.16, the value of random guessing"),
    ({"clip": 4.1}, "clip 4.10 is less than 2 % below ln B = 4.16, the value of random guessing"),
    ({"teacher_entropy": 5.54}, "entropy 5.54 is within 1 % of its maximum, ln K = 5.55"),
    ({"teacher_entropy": 0.05}, "entropy 0.050 is below 2 % of its maximum, ln K = 5.55"),
    ({"feature_std": 0.01}, "0.010"),
], ids=str)
def test_a_warning_states_the_value_and_the_limit_that_it_passed(values, sentence, capsys):
    assert collapse_warnings(RECIPE)(50, values)
    said = capsys.readouterr().out
    assert sentence in said and said.startswith("\nwarning, step 51: ") and said.endswith(".\n")


def test_siglip_has_no_value_of_random_guessing():
    siglip = Namespace(**vars(RECIPE) | {"clip_loss": "siglip"})
    assert collapse_warnings(siglip)(50, {"clip": 9.0}) == ""


def test_small_batches_are_remarked_upon_with_the_reason(out, capsys):
    here(out, "--steps", 1)
    said = capsys.readouterr().out
    assert "--batch-ssl 4 is small" in said and "--batch 8 is small" in said


def test_a_longer_run_may_go_on_from_a_shorter_one(whole, out):
    """The default warm-up is a tenth of --steps; it may move with it."""
    lines = here(interrupted(whole, out), "--steps", 22, "--log-every", 22)
    assert [line["step"] for line in lines] == [1, 2, 22]


def test_other_settings_are_refused_by_name(whole, capsys):
    with pytest.raises(SystemExit, match=r"train.py: .*lr: was 0.0005, now 0.5.*--fresh"):
        here(whole, "--steps", 4, "--lr", 0.5)


def test_the_same_seed_gives_the_same_log_in_another_process_with_two_workers(whole, out):
    run = there([], out, "--steps", 4, "--workers", 2)
    said, problems = run.communicate(timeout=120)
    assert run.returncode == 0, problems
    assert log(out) == log(whole) and "clip 1, ssl 1, rec 0.1" in said and "Next: python eval.py report" in said


def test_two_processes_give_the_losses_of_one(whole, out):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    run = there(["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)], out, "--steps", 4)
    _, problems = run.communicate(timeout=180)
    assert run.returncode == 0, problems
    for one, two in zip(log(whole), log(out), strict=True):
        assert one.keys() == two.keys()
        for name in one:
            assert one[name] == two[name] or math.isclose(one[name], two[name], rel_tol=1e-4, abs_tol=1e-4), (one["step"], name)


def test_a_polite_kill_saves_the_step_it_is_in_and_says_so(out):
    run = there([], out, "--steps", 5000, "--w-clip", 0, "--w-ssl", 0)
    while run.poll() is None and not (out / "log.jsonl").exists():
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    said, problems = run.communicate(timeout=60)
    assert run.returncode == 75, problems
    assert "stopped by a signal and saved" in said and torch.load(out / "last.pt")["step"] == log(out)[-1]["step"]


# ---------------------------------------------------------------- objectives
@pytest.mark.parametrize("off", [("clip", "ssl"), ("ssl",), ("clip",), ("rec",)], ids=["AE", "CLIP+AE", "SSL+AE", "CLIP+SSL"])
def test_objectives_are_turned_off_by_weight_alone_and_the_others_start_where_they_started(whole, out, off):
    lines = here(out, "--steps", 2, *(word for name in off for word in (f"--w-{name}", 0)))
    terms = {"clip": ["clip"], "ssl": ["dino", "ibot", "koleo"], "rec": ["rec"]}
    assert not {t for name in off for t in terms[name]} & lines[0].keys() and math.isfinite(lines[1]["loss"])
    for name in {"clip", "rec"} - set(off) if "rec" not in off else ():                  # without a decoder the text tower draws other first weights
        assert math.isclose(lines[0][name], log(whole)[0][name], rel_tol=1e-4)


def test_an_autoencoder_learns_to_paint(out):
    lines = here(out, "--steps", 60, "--w-clip", 0, "--w-ssl", 0, "--w-rec", 1, "--batch-rec", 8, "--warmup", 5)
    assert lines[-1]["rec"] < 0.7 * lines[0]["rec"]


def test_siglip_centring_and_stochastic_depth_run_and_stay_finite(out):
    lines = here(out, "--steps", 3, *settings(clip_loss="siglip", teacher="centering", drop_ssl=0.3, drop_rec=0.2, locals=0))
    assert all(math.isfinite(line[k]) for line in lines for k in ("clip", "dino", "ibot", "rec", "grad_norm")) and lines[0]["logit_scale"] > 9


# ---------------------------------------------------------------- what the user may get wrong
@pytest.mark.parametrize("flags, sentence", [
    (["--size", "XL"], "--size XL is unknown; choose one of pico, nano, micro, S, B, L"),
    (["--image", 20], "--image 20 is no multiple of --patch 8; try --image 16"),
    (["--image", 4], "--image 4 is no multiple of --patch 8; try --image 8"),
    (["--patch", 0], "--patch 0: wanted 1 or more"),
    (["--log-every", 0], "--log-every 0: wanted 1 or more"),
    (settings(local_image=9), "local_image=9 is no multiple"),
    (settings(emma=0.9), "emma=0.9: wanted name=value, where name is one of clip_loss"),
    (settings(teacher="mean"), "teacher=mean: wanted one of sinkhorn, centering"),
    (["--init", "x"], "--init is for stage 2; add --stage 2"),
    (["--w-clip", 0, "--w-ssl", 0, "--w-rec", 0], "nothing would be learned"),
    (["--batch", 1], "--batch 1: "),
    (["--batch-rec", 3], "--batch 8 is no multiple of 12"),
    (["--data", "EMPTY"], "holds no class folders with images"),
    (["--data", "nowhere"], "no folder nowhere"),
    (["--perceptual", "vgg"], "vgg16-397923af.pth is missing.*python eval.py fetch vgg"),
], ids=lambda x: x[0].strip("-") + str(x[1]) if isinstance(x, list) else "")
def test_a_mistake_is_answered_with_a_sentence_before_anything_is_computed(out, flags, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VTP_WEIGHTS", str(tmp_path / "none"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as refused:
        here(out, "--steps", 1, *(str(tmp_path / "empty") if f == "EMPTY" else f for f in flags))
    said = capsys.readouterr().err if refused.value.code == 2 else refused.value.code              # argparse prints, then exits with 2
    assert re.search(sentence, " ".join(said.split())) and "train.py: " in said
    assert not (out / "log.jsonl").exists()


def test_no_traceback_hides_the_sentence(out, tmp_path):
    run = there([], out, "--perceptual", "squeeze", VTP_WEIGHTS=str(tmp_path), TORCH_HOME=str(tmp_path))
    _, problems = run.communicate(timeout=60)
    assert run.returncode == 1 and "Traceback" not in problems and problems.strip().startswith("train.py: squeezenet1_1-b8a52dc0.pth is missing")


# ---------------------------------------------------------------- diagnostics
def test_diagnostics_tell_collapse_from_health():
    K, same = 16, torch.ones(8, 4)
    uniform = torch.full((2, 8, K), 1 / K)
    assert math.isclose(entropy(uniform), math.log(K), rel_tol=1e-6) and entropy(torch.eye(K)) == 0
    assert feature_std(same) == 0 and math.isclose(feature_std(torch.cat([same, -same])), 1.0)


# ---------------------------------------------------------------- flags
def test_train_py_has_the_31_flags_and_help_prints_the_recipe_with_its_sources(capsys):
    flags = [a for a in train.parser()._actions if a.option_strings and a.dest != "help"]
    assert len(flags) == 31
    with pytest.raises(SystemExit):
        train.arguments(["--help"])
    said = capsys.readouterr().out
    for name, (small, large, source) in train.RECIPE.items():
        assert name in said and source.split(";")[0] in said, name


def test_values_of_a_size_come_from_the_tables_and_flags_go_before_them():
    args = train.arguments(["--size", "L", "--lr", "1e-3", "--set", "ema=0.9"])
    assert (args.batch, args.prototypes, args.drop_ssl) == (16_384, 65_536, 0.3)
    assert (args.lr, args.ema, args.local_image) == (1e-3, 0.9, 112)
    nano = train.arguments([])
    assert (nano.batch, nano.prototypes, nano.drop_ssl, nano.local_image) == (48, 256, 0.0, 18)
