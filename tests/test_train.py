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

import numpy as np
import pytest
import safetensors.torch
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from train import (advice, compile_blocks, cosine, entropy, forget_activations, param_groups, ramp, set_lr_and_decay, spread,
                   stochastic_depth, warmup_cosine)
from vtp_min import VTPConfig, VTPModel, vit
from vtp_min.model import DINOHead, Student
from vtp_min.run import TIMING

ROOT = Path(__file__).parents[1]
TINY = ("--image 16 --patch 8 --batch 8 --batch-ssl 4 --batch-rec 4 --locals 1 --prototypes 32 --head-hidden 32 --perceptual none --precision fp32 "
        "--log-every 1 --device cpu --workers 0").split()


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
        for name in ("loss", "clip", "dino", "ibot", "koleo", "rec", "lr", "weight_decay", "grad_norm", "logit_scale", "teacher_entropy", "spread"):
            assert math.isfinite(line[name]), name
        assert line["perceptual"] == "none" and line["bad"] == 0
        terms = line["clip"] + line["dino"] + line["ibot"] + 0.1 * line["koleo"] + 0.1 * line["rec"]
        assert math.isclose(line["loss"], terms, rel_tol=1e-4)                         # the sum of the docstring
    timed = json.loads((whole / "log.jsonl").read_text().splitlines()[0])
    assert TIMING - {"seconds"} <= timed.keys() and timed["images_per_s"] > 0 and 0 < timed["share_of_peak"] < 2


def test_losses_start_where_ignorance_puts_them(whole):
    first = log(whole)[0]
    assert abs(first["clip"] - math.log(8)) < 1 and abs(first["dino"] - math.log(32)) < 1 and 0 < first["spread"] <= 1


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


@pytest.mark.parametrize("flags", [[], ["--teacher", "centering", "--clip-loss", "siglip", "--micro", 4]], ids=["", "centring siglip micro"])
def test_all_that_a_checkpoint_holds_goes_on_as_it_was(out, tmp_path, flags):
    """Weights, teacher, its center, optimizer, scaler, counts: 4 steps = 2 + a kill + 2."""
    here(out, "--steps", 4, "--save-every", 2, *flags)
    here(interrupted(out, tmp_path / "killed"), "--steps", 4, "--save-every", 2, *flags)
    one, two = (torch.load(folder / "last.pt") for folder in (out, tmp_path / "killed"))
    one["settings"].pop("out"), two["settings"].pop("out")
    assert one.keys() == {"step", "settings", "skipped", "bad", "student", "teacher", "opt", "scaler", "center"} and same(one, two)


@pytest.mark.parametrize("flags", [[], ["--micro", 4, "--teacher", "centering"]], ids=["whole", "in pieces"])
def test_a_step_with_a_loss_that_is_not_finite_is_skipped_and_changes_nothing(out, flags, monkeypatch):
    import vtp_min.losses
    whole, calls = vtp_min.losses.dino_loss, []

    def sick(*args):
        calls.append(1)
        return whole(*args) * (math.nan if len(calls) > 2 * (2 if flags else 1) else 1)                # pieces ask twice a step
    monkeypatch.setattr(vtp_min.losses, "dino_loss", sick)
    lines = here(out, "--steps", 3, "--save-every", 1, *flags)
    assert [line.get("skipped", 0) for line in lines] == [0, 0, 1] and lines[2]["dino"] == "nan"
    one, two = (torch.load(out / name) for name in ("previous.pt", "last.pt"))
    assert (one["step"], two["step"]) == (2, 3) and all(same(one[k], two[k]) for k in ("student", "teacher", "center"))
    assert same(one["opt"]["state"], two["opt"]["state"])


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
            if recompute:
                forget_activations(model)
            compile_blocks(model)
        model.zero_grad()
        outputs = [*model.trunk(image), model.get_clip_text_feature(text)]
        sum(x.square().sum() for x in outputs).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert counter.frame_count > 1 and grads[0].keys() == grads[1].keys()              # a block of the trunk and one of the text tower
    for name, grad in grads[0].items():
        assert torch.allclose(grads[1][name], grad, rtol=1e-4, atol=1e-5 * grad.abs().max().item()), name


def test_a_run_with_compile_and_recompute_compiles_its_blocks(out, monkeypatch):
    """From the second step on. Once, torch.compile skipped each checkpointed block without a word."""
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    torch._dynamo.reset()
    here(out, "--steps", 2, "--compile", "--recompute", "--size", "pico", "--w-clip", 0, "--w-ssl", 0)
    assert counter.frame_count > 0


def passes(out, monkeypatch, *flags):
    """-> how often a step in two pieces runs the student's trunk: (images, with gradients), (images, without), (crops, with), (crops, without)"""
    counts, forward = dict.fromkeys([(x, g) for x in ("images", "crops") for g in (True, False)], 0), vit.VisionTransformer.forward

    def counted(trunk, img, mask=None, **more):
        if trunk.training:                                                             # the teacher's never is
            counts["images" if mask is None else "crops", torch.is_grad_enabled()] += 1
        return forward(trunk, img, mask=mask, **more)
    monkeypatch.setattr(vit.VisionTransformer, "forward", counted)
    lines = here(out, "--steps", 1, "--micro", 4, "--locals", 0, *flags)
    return lines[0], tuple(counts.values())


@pytest.mark.parametrize("flags, expected", [
    ([], (2, 2, 2, 2)),
    (["--w-koleo", 0], (2, 2, 2, 0)),
    (["--w-clip", 0], (2, 0, 2, 2)),
    (["--w-clip", 0, "--w-koleo", 0], (2, 0, 2, 0)),
    (["--w-clip", 0, "--w-rec", 0], (0, 0, 2, 2)),
    (["--w-ssl", 0], (2, 2, 0, 0)),
    (["--w-ssl", 0, "--w-clip", 0], (2, 0, 0, 0)),
], ids=lambda x: " ".join(map(str, x)) if isinstance(x, list) else "")
def test_the_first_pass_over_pieces_runs_for_what_clip_and_koleo_compare_and_nothing_else(out, monkeypatch, flags, expected):
    """CLIP compares images, KoLeo crops: what the flags turn off costs no forward pass."""
    line, found = passes(out, monkeypatch, *flags)
    assert found == expected
    assert ("koleo" in line) == (found[3] > 0) and ("spread" in line) == (found[2] > 0)


def first_gradient(out, monkeypatch, *flags):
    """-> the first step's gradient as one vector, its line of the log"""
    found, clip = [], torch.nn.utils.clip_grad_norm_

    def kept(parameters, top):
        parameters = [*parameters]
        found.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
        return clip(parameters, top)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", kept)
        line, = here(out, "--fresh", "--steps", 1, *flags)
    return found[0], line


def test_pieces_give_the_gradient_of_the_whole_in_bfloat16(out, monkeypatch):
    """Losses are computed in float32 in both, so the same features give the same terms. Sums of bfloat16 gradients are taken in another order."""
    flags = ["--precision", "bf16", "--size", "pico", "--batch", 16, "--batch-ssl", 16, "--batch-rec", 16, "--locals", 0, "--w-koleo", 1]
    (one, line), (many, other) = (first_gradient(out, monkeypatch, *flags, "--micro", micro) for micro in (0, 4))
    assert (one - many).norm() < 3e-3 * one.norm()
    for name in ("clip", "dino", "ibot", "koleo", "rec", "teacher_entropy", "spread"):
        assert math.isclose(line[name], other[name], rel_tol=2e-5), name


def test_pieces_log_the_spread_of_the_whole_batch_with_and_without_koleo(whole, out):
    """It is that of the features, whatever losses read them."""
    line = here(out, "--steps", 1, "--micro", 4, "--w-koleo", 0)[0]
    assert math.isclose(line["spread"], log(whole)[0]["spread"], rel_tol=1e-4)


# ---------------------------------------------------------------- what is said
def test_collapse_is_named_with_the_knob_that_helps_and_health_is_left_alone(capsys):
    args = Namespace(prototypes=256, batch=64, warmup=10, clip_loss="clip")
    health = {"teacher_entropy": 4.4, "spread": 0.9, "clip": 1.0}
    sick = {"uniform teacher": ({"teacher_entropy": math.log(256)}, "--teacher-temp"), "constant teacher": ({"teacher_entropy": 0.01}, "--teacher sinkhorn"),
            "collapsed features": ({"spread": 0.01}, "--w-koleo"), "blind contrast": ({"clip": math.log(64)}, "captions")}
    assert advice(args, health, 50, set()) == ""
    for kind, (values, knob) in sick.items():
        warned = set()
        assert advice(args, health | values, 5, warned) == "" and advice(args, health | values, 50, warned) == kind
        assert knob in capsys.readouterr().out
        assert advice(args, health | values, 60, warned) == kind and capsys.readouterr().out == ""      # said once, logged while it lasts


@pytest.mark.parametrize("values, sentence", [
    ({"clip": 4.5}, "clip 4.50 is at or above ln B = 4.16, the value of random guessing"),
    ({"clip": math.log(64)}, "clip 4.16 is at or above ln B = 4.16, the value of random guessing"),
    ({"clip": 4.1}, "clip 4.10 is less than 2 % below ln B = 4.16, the value of random guessing"),
    ({"teacher_entropy": 5.54}, "the teacher's entropy 5.54 is within 1 % of its maximum, ln K = 5.55"),
    ({"teacher_entropy": 0.05}, "the teacher's entropy 0.050 is below 2 % of its maximum, ln K = 5.55"),
    ({"spread": 0.01}, "their spread is 0.010, that of random directions is 1"),
], ids=str)
def test_a_warning_states_the_value_and_the_limit_that_it_passed(values, sentence, capsys):
    args = Namespace(prototypes=256, batch=64, warmup=10, clip_loss="clip")
    assert advice(args, values, 50, set())
    said = capsys.readouterr().out
    assert sentence in said and said.startswith("\nwarning, step 51: ") and said.endswith(".\n")


def test_siglip_has_no_value_of_random_guessing():
    args = Namespace(prototypes=256, batch=64, warmup=10, clip_loss="siglip")
    assert advice(args, {"clip": 9.0}, 50, set()) == ""


def test_small_batches_are_remarked_upon_with_the_reason(out, capsys):
    here(out, "--steps", 1)
    said = capsys.readouterr().out
    assert "4 images are few: Sinkhorn shares 32 prototypes" in said and "7 wrong captions" in said


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
    assert log(out) == log(whole) and "objectives   CLIP + SSL + AE" in said and "Next: python eval.py report" in said


def test_two_processes_give_the_losses_of_one(whole, out):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    run = there(["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)], out, "--steps", 4)
    _, problems = run.communicate(timeout=180)
    assert run.returncode == 0, problems
    for one, two in zip(log(whole), log(out), strict=True):
        assert one.keys() == two.keys()
        for name in one.keys() - {"spread"}:                                            # a gauge: the mean over ranks of each one's own
            assert one[name] == two[name] or math.isclose(one[name], two[name], rel_tol=1e-4, abs_tol=1e-4), (one["step"], name)


def test_a_polite_kill_saves_the_step_it_is_in_and_says_so(out):
    run = there([], out, "--steps", 5000, "--w-clip", 0, "--w-ssl", 0)
    while run.poll() is None and not (out / "log.jsonl").exists():
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    said, problems = run.communicate(timeout=60)
    assert run.returncode == 75, problems
    assert "stopped on a signal, saved" in said and torch.load(out / "last.pt")["step"] == log(out)[-1]["step"]


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
    lines = here(out, "--steps", 3, "--clip-loss", "siglip", "--teacher", "centering", "--drop-ssl", 0.3, "--drop-rec", 0.2, "--locals", 0)
    assert all(math.isfinite(line[k]) for line in lines for k in ("clip", "dino", "ibot", "rec", "grad_norm")) and lines[0]["logit_scale"] > 9


# ---------------------------------------------------------------- what the user may get wrong
@pytest.mark.parametrize("flags, sentence", [
    (["--size", "XL"], "--size XL is unknown; choose one of pico, nano, micro, S, B, L"),
    (["--image", 20], "--image 20 is no multiple of --patch 8; try --image 16"),
    (["--image", 4], "--image 4 is no multiple of --patch 8; try --image 8"),
    (["--patch", 0], "--patch 0: wanted 1 or more"),
    (["--log-every", 0], "--log-every 0: wanted 1 or more"),
    (["--local-image", 9], "--local-image 9 is no multiple"),
    (["--w-clip", 0, "--w-ssl", 0, "--w-rec", 0], "nothing would be learned"),
    (["--batch", 1], "--batch 1: contrast needs at least two"),
    (["--batch-rec", 3], "--batch 8 is no multiple of 12"),
    (["--data", "EMPTY"], "holds no class folders with pictures"),
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


# ---------------------------------------------------------------- schedules
def test_schedules_meet_their_ends():
    assert cosine(0, 3.0, 1.0, 10) == 3.0 and cosine(9, 3.0, 1.0, 10) == 1.0 == cosine(50, 3.0, 1.0, 10) and math.isclose(cosine(5, 3.0, 1.0, 11), 2.0)
    assert ramp(0, 0.04, 0.07, 30) == 0.04 and math.isclose(ramp(30, 0.04, 0.07, 30), 0.07) and ramp(99, 0.04, 0.07, 30) == ramp(30, 0.04, 0.07, 30)
    lrs = [warmup_cosine(step, 1.0, 5, 20) for step in range(20)]
    assert lrs[0] == 0.2 and lrs[4] == lrs[5] == max(lrs) == 1.0 and math.isclose(lrs[-1], 1e-6)     # the first step moves already
    assert sorted(lrs[5:], reverse=True) == lrs[5:]
    assert warmup_cosine(0, 1.0, 0, 1) == 1.0 and cosine(0, 1.0, 0.0, 1) == 1.0                        # a run of one step


def test_schedules_are_those_of_the_sources(golden):
    g = np.load(golden / "clip_schedule.npz")
    lr, warmup, steps = float(g["base_lr"]), int(g["warmup"]), int(g["steps"])
    assert np.allclose([warmup_cosine(s, lr, warmup, steps) for s in range(warmup + 1)], g["cosine"][:warmup + 1], rtol=1e-12)
    g = np.load(golden / "dino_schedules.npz")
    epoch, c = int(g["epoch_length"]), {k.removeprefix("a/cfg/"): float(g[k]) for k in g.files if k.startswith("a/cfg/")}
    n = int(c["epochs"]) * epoch                                    # DINOv2's cosines stop one step short of their end (n + 1), DINOv3's and ours reach it
    assert np.allclose([cosine(s, c["wd"], c["wd_end"], n + 1) for s in range(n)], g["a/wd"][:n], atol=1e-12)
    assert np.allclose([cosine(s, c["mom"], 1.0, n + 1) for s in range(n)], g["a/momentum"][:n], atol=1e-12)
    warm = int(c["ttemp_warmup_epochs"]) * epoch
    assert np.allclose([ramp(s, c["ttemp_start"], c["ttemp"], warm - 1) for s in range(n)], g["a/teacher_temp"][:n], atol=1e-12)
    warm = int(c["warmup_epochs"]) * epoch
    assert np.allclose([warmup_cosine(s, c["lr"], warm, n, c["min_lr"]) for s in range(warm, n)], g["a/v3_linear_warmup_cosine_lr"][warm:], atol=1e-12)


def named_groups(student):
    groups, names = param_groups(student), {id(p): name for name, p in student.named_parameters()}
    return [(g, [names[id(p)] for p in g["params"]]) for g in groups]


@pytest.fixture(scope="module")
def student():
    return Student(VTPModel(VTPConfig.of_size("nano", 16, 8, 16)), DINOHead(192, 32, 32, 16))


def test_vectors_and_positions_do_not_decay_and_the_last_layer_stands_apart(student):
    decayed = {name for g, names in named_groups(student) for name in names if g["decay"]}
    all_names = [name for _, names in named_groups(student) for name in names]
    assert sorted(all_names) == sorted(name for name, _ in student.named_parameters())      # each exactly once
    for name, p in student.named_parameters():
        assert (name in decayed) == (p.ndim > 1 and name != "model.positional_embedding"), name
    assert [set(names) for g, names in named_groups(student) if g["last"]] == [{"dino_head.last_layer.weight_g", "dino_head.last_layer.weight_v"}]


def test_weight_decay_is_split_as_openclip_splits_it(golden, student):
    """Parameters that both have: the whole text tower, logit scale, the image projection and the patch embedding."""
    theirs = json.loads((golden / "clip_weight_decay_split.json").read_text())["params"]
    decayed = {name for g, names in named_groups(student) for name in names if g["decay"]}
    alike = {"visual.conv1.weight": "trunk.patch_embed.proj.weight", "visual.proj": "visual_proj.weight"}
    met = 0
    for name, rule in theirs.items():
        ours = "model." + alike.get(name, name.replace("transformer.", "text_transformer.") if name.startswith("transformer.") else name)
        if ours in dict(student.named_parameters()):
            assert (ours in decayed) != rule["no_decay"], name
            met += 1
    assert met > 10


def test_the_last_layer_rests_while_all_else_learns(student):
    opt = torch.optim.AdamW(param_groups(student))
    set_lr_and_decay(opt, lr=0.1, wd=0.04, head_rests=True)
    assert {(g["last"], g["lr"]) for g in opt.param_groups} == {(True, 0.0), (False, 0.1)}
    assert {(g["decay"], g["weight_decay"]) for g in opt.param_groups} == {(True, 0.04), (False, 0.0)}
    set_lr_and_decay(opt, lr=0.1, wd=0.04, head_rests=False)
    assert {g["lr"] for g in opt.param_groups} == {0.1}


# ---------------------------------------------------------------- gauges and draws
def test_gauges_read_collapse_and_health():
    K, same = 16, torch.ones(8, 4)
    assert math.isclose(entropy(torch.full((2, 8, K), 1 / K)), math.log(K), rel_tol=1e-6) and entropy(torch.eye(K)) == 0
    assert spread(same) == 0 and math.isclose(spread(torch.cat([same, -same])), 1.0)


def test_ranks_draw_stochastic_depth_over_one_batch_and_objectives_draw_apart():
    args = Namespace(batch=8, batch_ssl=4, batch_rec=2, w_clip=1.0, locals=3, seed=0, drop_clip=0.5, drop_rec=0.5, drop_ssl=0.5)

    def kept(rows_image, rows_ssl, rec, step=5):
        drop = stochastic_depth(args, step, {"image": 0, "crops": 0, "rows_image": rows_image, "rows_ssl": rows_ssl, "rec": rec})
        return {k: (d.rows, d.total, [d.rows[i] for i in d(0)[0][0]]) for k, d in drop.items()}

    one = kept(torch.arange(8), torch.arange(0, 8, 2), torch.tensor([0, 4]))
    two = [kept(torch.arange(4) + 4 * r, torch.arange(0, 4, 2) + 4 * r, torch.tensor([0])) for r in range(2)]
    for name, (rows, total, chosen) in one.items():
        assert sorted(rows) == list(range(total)) and len(chosen) == total // 2
        assert sorted([i for part in two for i in part[name][2]]) == sorted(chosen), name
    assert (one["clip"][1], one["ssl"][1], one["local"][1]) == (8, 8, 12) and one["clip"][2] != one["ssl"][2]
    assert kept(torch.arange(8), torch.arange(0, 8, 2), torch.tensor([0, 4]), step=6)["local"][2] != one["local"][2]      # drawn anew each step
    assert stochastic_depth(Namespace(**vars(args) | {"drop_ssl": 0.0}), 5, {"crops": 0, "rows_ssl": torch.arange(4)})["ssl"] is None
