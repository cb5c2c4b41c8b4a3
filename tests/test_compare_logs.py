"""eval.py compare: its verdicts on logs whose relation is known, and the reference logs and the
tables that are stored. (test_compare.py tests tests/compare.py.)"""
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import eval
from vtp_min.extras import compare as module
from vtp_min.extras.compare import compare, judge, scatter

ROOT = Path(__file__).parents[1]
LOGS, DEMO, FIRST = ROOT / "study/logs", ROOT / "study/demo", ROOT / "study/first/logs"
sys.path.insert(0, str(ROOT / "study"))
import curves                                                              # noqa: E402


def write_log(path, lines, settings=None):
    """Write a run folder with a log -> the folder"""
    path.mkdir(parents=True, exist_ok=True)
    (path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if settings is not None:
        (path / "run.json").write_text(json.dumps(settings))
    return path


def noisy(seed, steps=range(10, 510, 10), more=lambda step: 0.0):
    """Lines of a log whose loss falls from 3 to about 1, with noise of std 0.02"""
    rng = np.random.default_rng(seed)
    return [{"step": step, "loss": 1 + 2 * np.exp(-step / 100) + 0.02 * rng.standard_normal()
             + more(step), "lr": 1e-3, "images_per_s": rng.random()} for step in steps]


@pytest.fixture
def figures():
    """Tests that use it draw the figure, which takes seconds"""


@pytest.fixture(autouse=True)
def empty_figures(request, monkeypatch):
    if "figures" not in request.fixturenames:
        monkeypatch.setattr(module, "plot", lambda *_: Figure())


@pytest.fixture
def reference(tmp_path):
    return write_log(tmp_path / "reference", noisy(0))


def words(capsys):
    """The printed text, with single spaces"""
    return " ".join(capsys.readouterr().out.split())


# ---------------------------------------------------------------- real logs

@pytest.mark.parametrize("name", ["nano-shapes", "pico-dit-shapes"])
@pytest.mark.parametrize("run", ["bf16", "again", "fp32"])
def test_each_run_of_the_demo_is_on_the_curve_of_the_other_two(tmp_path, capsys, name, run):
    others = [LOGS / name / other for other in ("bf16", "again", "fp32") if other != run]
    assert compare(LOGS / name / run, others, tmp_path)
    assert "On the curve: all" in words(capsys)


CIFAR10 = sorted((LOGS / "nano-cifar10").glob("seed*"))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_each_seed_of_cifar10_is_on_the_curve_of_the_others_together_and_one_by_one(tmp_path, seed):
    assert [run.name for run in CIFAR10] == ["seed0", "seed1", "seed2"]
    others = CIFAR10[:seed] + CIFAR10[seed + 1:]
    for references in (others, others[:1], others[1:]):
        assert compare(CIFAR10[seed], references, tmp_path)


def test_two_windows_at_the_beginning_are_named_although_they_are_on_the_curve(tmp_path, capsys):
    assert compare(CIFAR10[1], CIFAR10[:1], tmp_path)
    assert "on the curve; above in two windows, steps 1 to 90" in words(capsys)


def test_on_a_fifth_of_the_images_of_cifar10_the_clip_loss_is_below_the_curve(tmp_path, capsys):
    assert not compare(LOGS / "example-few-images", CIFAR10, tmp_path)
    said = words(capsys)
    assert "data: yours 'cifar10-1k', reference 'cifar10-5k'" in said
    assert "clip (below from step 100 on)" in said


def first_study(tmp_path, name):
    """-> run folder with the tokenizer's log of a cell of the first study"""
    lines = map(json.loads, (FIRST / f"imagenet64-{name}.jsonl").read_text().splitlines())
    return write_log(tmp_path / name, [line for line in lines if line["stage"] == "tokenizer"])


@pytest.mark.parametrize("cell", ["AE-900", "ALL-900", "AE-3000", "ALL-3000"])
def test_another_seed_is_on_the_curve_of_a_single_reference(tmp_path, cell):
    assert compare(first_study(tmp_path, f"{cell}-seed1"), [first_study(tmp_path, cell)])


@pytest.mark.parametrize("cell", ["n100", "n1000", "micro-decoder_nano"])
def test_fewer_images_or_a_larger_trunk_are_off_the_curve(tmp_path, cell):
    run, reference = first_study(tmp_path, f"ALL-900-{cell}"), first_study(tmp_path, "ALL-900")
    assert not compare(run, [reference])


def test_the_demo_s_dit_with_the_default_lr_is_above_the_curve_and_the_settings_say_why(
        tmp_path, capsys):
    references = sorted((LOGS / "pico-dit-shapes").iterdir())
    assert not compare(LOGS / "example-off-curve", references, tmp_path)
    said = words(capsys)
    assert "differ: lr: yours 0.0002, reference 0.008 warmup: yours 0, reference 50" in said
    assert "loss (above from step 1 on)" in said and "ends at step 450" in said


# ---------------------------------------------------------------- the rule

def test_a_log_is_on_its_own_curve_and_all_differences_are_zero(reference, tmp_path, capsys):
    assert compare(reference, [reference, reference], tmp_path)
    assert "difference +0 +0 +0 +0" in words(capsys)


def test_the_verdict_does_not_depend_on_the_unit(tmp_path):
    for factor in (1, 1e-4, 1e4):
        logs = []
        for seed, more in ((0, 0), (1, 0), (2, 0.2)):
            lines = [line | {"loss": factor * (line["loss"] + more)} for line in noisy(seed)]
            logs.append(write_log(tmp_path / str(seed), lines))
        assert compare(logs[1], [logs[0]]) and not compare(logs[2], [logs[0]])


def test_noise_is_measured_in_the_presence_of_a_drift_and_of_outliers():
    rng = np.random.default_rng(0)
    noise = 0.3 * rng.standard_normal(2000) + np.linspace(0, 5, 2000)
    noise[::50] += 100
    assert scatter(noise) == pytest.approx(0.3, rel=0.1)
    assert scatter(np.array([1.0])) == 0


@pytest.mark.parametrize("sides, verdict, on_curve", [
    ([0, 0, 0, 0], "on the curve", True),
    ([0, 2, 0, -2], "on the curve; above in one window, steps 3 to 4; below in one window, "
     "steps 7 to 8", True),
    ([0, 2, 2, 2], "above from step 3 on", False),
    ([-2, -2, -2, 0], "below from step 1 to 6", False),
    ([-2, -2, 0, 0], "on the curve; below in two windows, steps 1 to 4", True),
    ([2, -2, 2, -2], "on the curve; above in one window, steps 1 to 2; below in one window, steps "
     "3 to 4; above in one window, steps 5 to 6; below in one window, steps 7 to 8", True)])
def test_three_windows_in_a_row_on_one_side_are_off_the_curve(sides, verdict, on_curve):
    windows = np.array_split(np.arange(8), 4)
    found = judge(np.array(sides), np.ones(4), list(range(1, 9)), windows)
    assert found == (verdict, on_curve)


def test_a_run_that_leaves_the_curve_is_told_from_which_step_on(
        reference, tmp_path, capsys, figures):
    lines = noisy(1, more=lambda step: 0.3 * (step > 300))
    assert not compare(write_log(tmp_path / "run", lines), [reference])
    said = words(capsys)
    assert "above from step 310 on" in said and "Off the curve: 1 of 1 quantities, loss" in said
    assert Image.open(tmp_path / "run" / "compare.png").size[0] > 1000


def test_the_range_of_several_references_is_their_tolerance(tmp_path):
    references = [write_log(tmp_path / str(shift), noisy(0, more=lambda step: shift))
                  for shift in (-0.2, 0.2)]
    run = write_log(tmp_path / "run", noisy(1, more=lambda step: 0.3))
    assert compare(run, references) and not compare(run, references[:1])


# ---------------------------------------------------------------- logs that do not fit

def test_the_exit_status_is_0_on_the_curve_1_off_it_and_2_if_nothing_can_be_compared(
        reference, tmp_path, monkeypatch, capsys):
    run = write_log(tmp_path / "run", noisy(1))
    off = write_log(tmp_path / "off", noisy(1, more=lambda step: 1))

    def status(*words):
        monkeypatch.setattr(sys, "argv", ["eval.py", "compare", *map(str, words)])
        try:
            eval.main()
        except SystemExit as end:
            return end.code
        return 0
    assert status(run, reference / "log.jsonl", "--out", tmp_path / "new" / "folder") == 0
    assert (tmp_path / "new" / "folder" / "compare.png").exists()
    assert status(off / "log.jsonl", reference, run) == 1
    assert status(run, tmp_path / "absent") == 2
    assert "absent does not exist; give a run folder" in capsys.readouterr().err


def test_damaged_lines_are_left_out_and_counted(reference, tmp_path, capsys):
    run = write_log(tmp_path / "run", noisy(1))
    with open(run / "log.jsonl", "ab") as file:
        file.write(bytes(99) + b'\n{"step": 510, "lo')
    assert compare(run, [reference])
    assert "2 of 52 lines are damaged" in words(capsys)
    (run / "log.jsonl").write_bytes(bytes(99))
    with pytest.raises(ValueError, match="holds no readable line"):
        compare(run, [reference])


def test_a_shorter_run_and_another_spacing_are_compared_where_both_have_lines(
        reference, tmp_path, capsys):
    run = write_log(tmp_path / "run", noisy(1, steps=range(15, 301, 15)))
    assert compare(run, [reference])
    said = words(capsys)
    assert "Your log ends at step 300, the shortest reference at 500: steps up to 300" in said
    assert "20 lines up to step 300; the 10 steps that all logs have" in said
    write_log(run, noisy(1, steps=range(7, 220, 7)))
    sentence = "have 3 steps in common, but at least 6 are needed .*run.*: 31 lines from step 7 to"
    with pytest.raises(ValueError, match=sentence):
        compare(run, [reference])


def test_logs_without_a_common_quantity_are_refused(reference, tmp_path):
    lines = [{"step": line["step"], "mse": 1.0} for line in noisy(0)]
    with pytest.raises(ValueError, match="no loss or diagnostic in common"):
        compare(write_log(tmp_path / "run", lines), [reference])


def test_quantities_of_one_side_are_named_and_the_others_are_compared(
        reference, tmp_path, capsys):
    lines = [line | {"clip": 1.0} for line in noisy(1)]
    theirs = [line | {"dino": 1.0, "clip": 1.0 if line["step"] > 99 else "nan"}
              for line in noisy(2)]
    run, other = write_log(tmp_path / "run", lines), write_log(tmp_path / "other", theirs)
    assert compare(run, [reference, other])
    said = words(capsys)
    assert "only in references: dino." in said
    assert "not finite in a reference: clip." in said


def test_a_loss_that_is_not_finite_is_off_the_curve(reference, tmp_path, capsys, figures):
    lines = [line | ({"loss": "nan"} if line["step"] > 250 else {}) for line in noisy(1)]
    assert not compare(write_log(tmp_path / "run", lines), [reference])
    assert "loss (not finite at step 260)" in words(capsys)


def test_only_settings_that_change_the_curve_are_compared(reference, tmp_path, capsys):
    base = {"lr": 1e-3, "seed": 0, "data": "/a/cifar", "workers": 0, "out": "x", "steps": 500}
    write_log(reference, noisy(0), base)
    again = write_log(tmp_path / "again", noisy(2), base | {"seed": 1})
    settings = base | {"lr": 2e-3, "seed": 1, "data": "/b/cifar", "workers": 4, "new": 7}
    lines = [line | {"lr": 2e-3 if line["step"] > 100 else 1e-3} for line in noisy(1)]
    run = write_log(tmp_path / "run", lines, settings)
    compare(run, [reference, again])
    said = words(capsys)
    assert "differ: lr: yours 0.002, reference 0.001 The learning rate differs from step 110" \
        in said
    compare(again, [reference])
    assert "differ: seed: yours 1, reference 0" in words(capsys)
    compare(reference, [again, reference])
    assert "All settings that change the curve are those of a reference" in words(capsys)


def test_the_settings_beside_a_log_of_another_name_are_not_used(reference, tmp_path, capsys):
    write_log(reference, noisy(0), {"lr": 1})
    run = write_log(tmp_path / "run", noisy(1), {"lr": 2})
    shutil.move(run / "log.jsonl", run / "dit.log.jsonl")
    assert compare(run / "dit.log.jsonl", [reference])
    said = words(capsys)
    assert "run.json is missing beside" in said and "dit.log.jsonl" in said


# ---------------------------------------------------------------- stored logs and tables

@pytest.mark.parametrize("run", ["", "again", "fp32"])
def test_the_reference_logs_of_the_demo_are_the_demo_s(run):
    for name, file in (("nano-shapes", "train.log.jsonl"), ("pico-dit-shapes", "dit.log.jsonl")):
        text = (DEMO / run / file).read_text().replace('"spread"', '"feature_std"')
        assert (LOGS / name / (run or "bf16") / "log.jsonl").read_text() == text


@pytest.mark.parametrize("name", curves.TABLES)
def test_the_tables_of_curves_md_are_computed_from_the_logs(name):
    assert curves.table(name) in (ROOT / "docs/curves.md").read_text()
