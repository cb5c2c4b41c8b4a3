"""The plan that train.py prints: what is counted without values is what a real step does."""
import sys
from argparse import Namespace
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train
from vtp_min import losses
from vtp_min.device import autocast
from vtp_min.extras import gradcache, plan
from vtp_min.model import DINOHead, Student, Teacher, VTPModel

CPU = torch.device("cpu")
FLAGS = ("--size pico --image 32 --patch 8 --batch 16 --batch-ssl 8 --batch-rec 4 "
         "--perceptual none --set prototypes=512 --set drop_ssl=0.5").split()
# pico with one block of each kind; each test counts a step within a second
SCRIPT = Namespace(**vars(train))


@pytest.fixture(autouse=True)
def length_of_captions(monkeypatch):
    monkeypatch.setattr(plan, "TOKENS", 21)      # in the first batch of the built-in shapes


def shallow_config(args):
    return replace(train.model_config(args), vision_depth=1, decoder_depth=1, text_depth=1)


SCRIPT.model_config = shallow_config


@cache                                           # several tests need the same counts
def count(*flags, n_processes=1, precision="fp32"):
    return plan.count(SCRIPT, train.arguments([*FLAGS, *flags]), n_processes, precision)


# ---- the meter

def test_a_tensor_counts_while_it_exists_and_a_view_of_it_does_not_count_again():
    with plan.Meter() as meter:
        a = torch.zeros(1000)
        b = a.view(10, 100).T
        assert meter.live == 4000
        c = b + 1
        assert (meter.live, meter.peak) == (8000, 8000)
        del a, b
        assert meter.live == 4000
        d = c.add_(1).half()
        assert (meter.live, meter.peak) == (6000, 8000)
    assert d.dtype == torch.float16


def test_what_autograd_stores_counts_until_the_backward_pass():
    w = torch.ones(1000, requires_grad=True)
    with plan.Meter() as meter:
        loss = w.exp().exp().sum()               # both results of exp are stored
        assert meter.live == 8000 + 4
        loss.backward()
        del loss
        assert meter.live == 4000                # the gradient
    assert meter.peak >= 12000


# ---- a counted step against a real one

def real_step(*flags):
    """A step with values -> FLOPs, bytes that were in use at the same time"""
    args = train.arguments([*FLAGS, *flags])
    model = VTPModel(shallow_config(args))
    head = DINOHead(model.feature_dim, args.prototypes, args.head_hidden, args.head_bottleneck)
    student = Student(model, head)
    teacher = Teacher(student)
    train.wrap_blocks(args, student, teacher)
    for p in student.parameters():
        p.grad = torch.zeros_like(p)
    gradients = gradcache.compute_gradients_cached if args.micro else train.compute_gradients
    batch = train.train_batches(args, depth=1)[0]
    targets = losses.TeacherTargets(args.teacher, args.prototypes, CPU)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    counter = FlopCounterMode(display=False)
    meter = plan.Meter(plan.tensors_of(student, teacher))
    for mode in (counter, meter):                # the first one would keep tensors alive
        with mode:
            gradients(batch, 0.07, args, student, teacher, None, targets, autocast(CPU, "fp32"),
                      scaler, CPU)
    return counter.get_total_flops(), meter.peak


@pytest.mark.parametrize("flags", [[], ["--recompute"], ["--micro", "8"],
                                   ["--micro", "8", "--recompute"]], ids=" ".join)
def test_a_step_without_values_costs_what_a_real_step_costs(flags):
    """Also with stochastic depth. The counted number of masked patches is an average."""
    cost = count(*flags)
    flops, peak = real_step(*flags)
    assert cost.flops == pytest.approx(flops, rel=0.03)
    # with --micro, a real step also holds the whole batch and lists of its micro-batches
    tolerance = 0.15 if "--micro" in flags else 0.05
    assert cost.activations == pytest.approx(peak, rel=tolerance)


def test_recomputing_costs_a_forward_pass_and_micro_batches_another_one():
    plain, recompute = count(), count("--recompute")
    micro, both = count("--micro", "8"), count("--micro", "8", "--recompute")
    assert 1.1 < recompute.flops / plain.flops < 1.34
    assert 1.1 < micro.flops / plain.flops < 1.34
    # recomputed blocks are not recomputed in part 1 of --micro, which stores nothing
    assert both.flops - micro.flops == pytest.approx(recompute.flops - plain.flops, rel=0.02)
    assert max(recompute.activations, micro.activations) < plain.activations


def test_weights_are_counted_with_gradients_moments_and_the_teacher():
    args = train.arguments(FLAGS)
    student, teacher = plan.student_and_teacher(args, shallow_config(args))
    n, m = (sum(p.numel() for p in module.parameters()) for module in (student, teacher))
    cost = count()
    assert (cost.parameters, cost.weights) == (n, 16 * n + 4 * m)


def test_with_micro_batches_memory_does_not_grow_with_the_batch():
    four_times = "--batch", "64", "--batch-ssl", "32", "--batch-rec", "16"
    small, large = count("--micro", "8"), count("--micro", "8", *four_times)
    assert large.flops == pytest.approx(4 * small.flops, rel=0.01)
    for part in plan.PARTS:
        assert large.parts[part] == small.parts[part]
    name = "self-distillation"
    assert 3 < count(*four_times).parts[name] / count().parts[name] < 4.5


def test_processes_share_the_batch_but_each_compares_its_rows_with_all():
    one, two = count("--w-ssl", "0", "--w-rec", "0"), count("--w-ssl", "0", "--w-rec", "0",
                                                            n_processes=2)
    E, B = 128, 16
    # two products of (B / n, E) with (E, B), forward and backward
    pairs = 2 * 3 * 2 * B * B * E
    assert one.flops - pairs == pytest.approx(2 * (two.flops - pairs / 2), rel=0.001)


@pytest.mark.parametrize("flags", [
    "--w-clip 0 --micro 8", "--set teacher=centering --set clip_loss=siglip --micro 8",
    "--set drop_rec=0.3 --set heads_after_bottleneck=true", "--w-ssl 0 --perceptual alex"])
def test_other_recipes_can_be_counted(flags):
    assert count(*flags.split(), precision="bf16").flops > 0


def test_counting_leaves_no_trace():
    before = losses.gather, gradcache.split_batch, torch.get_rng_state()
    count("--micro", "8")
    assert (losses.gather, gradcache.split_batch) == before[:2]
    assert torch.empty(1).device == CPU and type(torch.empty(1)) is torch.Tensor


# ---- the machine

def test_free_memory_is_a_part_of_all_memory_and_processes_share_it(monkeypatch):
    assert 0 < plan.free_ram() <= plan.os.sysconf("SC_PHYS_PAGES") * plan.os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(plan, "free_ram", lambda: 12e9)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert plan.available_memory(CPU) == 3e9


def test_a_control_group_with_a_limit_has_less_free_memory(tmp_path):
    """Of 1000 bytes 700 are used, but 500 of these by cached files."""
    own = tmp_path / "own"
    own.write_text("0::/job/step\n")
    job = tmp_path / "job"
    (job / "step").mkdir(parents=True)
    (job / "step/memory.max").write_text("max\n")
    (job / "memory.max").write_text("1000\n")
    (job / "memory.current").write_text("700\n")
    (job / "memory.stat").write_text("anon 200\ninactive_file 400\nactive_file 100\nfile 9\n")
    assert list(plan.free_in_groups(tmp_path, own)) == [800]
    assert list(plan.free_in_groups(tmp_path, tmp_path / "absent")) == []


# ---- what is printed

def check(monkeypatch, free, *flags):
    """plan.check on a machine with `free` bytes, if each image of a step needs 1 GB, and a quarter
    of it with --recompute. The batch has 64 images."""
    def count(script, args, n_processes, precision):
        image = 1e9 / (4 if args.recompute else 1)
        return plan.Cost(0, 0, {"step": image * (args.micro or args.batch)}, flops=4e11)

    flags = ["--size", "S", "--batch", "64", "--batch-ssl", "32", "--batch-rec", "16",
             "--perceptual", "none", *flags]
    monkeypatch.setattr(plan, "count", count)
    monkeypatch.setattr(plan, "available_memory", lambda device: plan.RESERVED + free)
    monkeypatch.setattr(plan, "peak_flops", lambda device, precision: 1e12)
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    plan.check(train, train.arguments(flags), CPU, "fp32")


def test_a_small_run_prints_one_line_and_counts_nothing(monkeypatch, capsys):
    monkeypatch.setattr(plan, "count", None)
    plan.check(SCRIPT, train.arguments(FLAGS), CPU, "fp32")
    assert capsys.readouterr().out.count("\n") == 1


def test_only_small_runs_of_small_models_are_not_counted():
    for flags in (["--size", "L", "--batch", "32", "--batch-ssl", "8", "--batch-rec", "4"],
                  ["--size", "nano", "--batch", "4096", "--batch-ssl", "1024", "--image", "72"],
                  ["--size", "nano", "--steps", "100000"]):
        assert not is_small(flags), flags
    assert is_small(["--size", "nano"])


def is_small(flags):
    """True if plan.check does not count a step"""
    class Counted(BaseException):
        pass

    def count(*args):
        raise Counted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "count", count)
        try:
            plan.check(train, train.arguments(flags), CPU, "fp32")
        except Counted:
            return False
    return True


def test_the_rough_cost_is_that_of_the_count_within_a_factor_of_three():
    args = train.arguments(["--size", "nano", "--image", "64", "--patch", "8", "--perceptual",
                            "none", "--steps", "1"])
    flops, step = plan.rough_cost(args, train.model_config(args), 1)
    cost = plan.count(train, args, 1, "fp32")
    assert 1 / 3 < flops / cost.flops < 3
    assert 1 / 3 < step / cost.activations < 3


def test_a_run_that_fits_is_planned_and_starts(monkeypatch, capsys):
    check(monkeypatch, 64e9)
    printed = capsys.readouterr().out
    assert "65.5 GB in each process, 65.5 GB are free" in printed
    # at 40 % of 1e12 FLOP/s
    assert "1.0 seconds a step, 19 hours for 67000 steps" in printed
    assert "missing      a GPU" in printed and "--set" not in printed


@pytest.mark.parametrize("free, typed, added", [
    (40e9, [], ["--micro", "32"]),               # rather than --recompute
    (63e9, ["--micro", "64"], ["--micro", "32"]),
    (20e9, [], ["--micro", "0", "--recompute"]),        # the whole batch
    (10e9, [], ["--micro", "32", "--recompute"]),
    (2e9, ["--recompute"], ["--micro", "8"])])
def test_a_run_that_does_not_fit_is_refused_with_a_command_that_fits(monkeypatch, capsys, free,
                                                                     typed, added):
    with pytest.raises(ValueError, match="needs about .* GB of memory in each process"):
        check(monkeypatch, free, *typed)
    printed = capsys.readouterr().out
    command = printed.split("This fits:\n")[1].split("\n")[0].split()
    assert command[:2] == ["python", "train.py"] and command[2:] == sys.argv[1:] + added
    assert "--set memory_check=0" in printed
    check(monkeypatch, free, *typed, *added)


def test_a_run_that_nothing_makes_fit_is_refused_too_but_can_be_started(monkeypatch, capsys):
    with pytest.raises(ValueError, match="1.6 GB are free"):
        check(monkeypatch, 1e8)
    # the smallest micro-batch has 4 images
    assert "with the smallest --micro and --recompute it needs 2.5 GB" in capsys.readouterr().out
    check(monkeypatch, 1e8, "--set", "memory_check=0")
    assert "1.6 GB are free" in capsys.readouterr().out


def test_a_suggested_micro_batch_fits_because_memory_lies_below_the_line(monkeypatch):
    """Between two counted sizes the line is above the largest of several linear functions."""
    args = train.arguments(["--size", "S", "--perceptual", "none"])

    def count(script, args, n_processes, precision):
        return plan.Cost(0, 0, {"a": 5e9 + 1e6 * args.micro, "b": 1e9 * args.micro})

    monkeypatch.setattr(plan, "count", count)
    flags, _ = plan.settings_that_fit(train, args, 1, "fp32", plan.RESERVED + 1000e9)
    assert flags == "--micro 512"


def test_missing_files_are_named_with_the_command_that_brings_them(monkeypatch, tmp_path):
    monkeypatch.setenv("VTP_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    args = train.arguments(["--size", "S", "--data", str(tmp_path)])
    gpu, weights, data = plan.missing(args, CPU)
    assert "eval.py fetch vgg" in weights and "--val-data" in data
    Path(tmp_path, "val").mkdir()
    args.perceptual = "none"
    assert list(plan.missing(args, torch.device("cuda"))) == []


@pytest.mark.parametrize("seconds, text", [(0.52, "0.5 seconds"), (119, "119 seconds"),
                                           (7000, "117 minutes"), (7500, "2.1 hours"),
                                           (1e12, "31,710 years")])
def test_durations_have_a_unit_that_fits(seconds, text):
    assert plan.duration(seconds) == text
