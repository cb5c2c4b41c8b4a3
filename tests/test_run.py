"""A run folder: what is saved is whole, what goes on is the same run, and anything else is refused by name."""
import json
import math
import os
import resource
import runpy
import signal
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from vtp_min import config
from vtp_min import device as devices
from vtp_min import run as runs
from vtp_min.config import atomic_write
from vtp_min.device import autocast, move_to, peak_flops, set_tf32, tf32_of
from vtp_min.run import MUTABLE_FLAGS, Run, parse_settings, record_metric, to_json

SETTINGS = {"size": "nano", "lr": 1e-3, "betas": (0.9, 0.98), "steps": 10, "workers": 0, "device": "cpu"}


class Part:
    """Stands for a model or an optimizer"""
    def __init__(self, n):
        self.w = torch.full((3,), float(n))

    def state_dict(self):
        return {"w": self.w}

    def load_state_dict(self, state):
        self.w = state["w"]


def weights(n):
    return {"part": Part(n)}


def holds(checkpoint, n):
    return torch.equal(checkpoint["part"]["w"], weights(n)["part"].w)


def three_checkpoints(folder):
    run = Run(folder, SETTINGS)
    for step in (1, 2, 3):
        run.log(step, loss=1 / step)
        run.save(step, weights(step))
    return run


def steps_of(folder):
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- saving
def test_a_new_folder_holds_no_state_and_states_its_settings(tmp_path):
    run = Run(tmp_path / "a" / "b", SETTINGS)
    assert run.checkpoint is None and json.loads((tmp_path / "a" / "b" / "run.json").read_text()) == SETTINGS | {"betas": [0.9, 0.98]}


def test_what_was_saved_comes_back_bit_for_bit(tmp_path):
    three_checkpoints(tmp_path)
    state = Run(tmp_path, SETTINGS).checkpoint
    assert state["step"] == 3 and holds(state, 3)


def test_the_last_two_checkpoints_are_kept_and_no_scrap_lies_around(tmp_path):
    three_checkpoints(tmp_path)
    assert [torch.load(tmp_path / name)["step"] for name in ("last.pt", "previous.pt")] == [3, 2]
    assert {p.name for p in tmp_path.iterdir()} == {"last.pt", "previous.pt", "log.jsonl", "run.json"}


def test_a_file_is_the_old_one_or_the_new_one_never_half(tmp_path):
    path = tmp_path / "file"
    atomic_write(path, lambda aside: aside.write_text("old"))
    def die(aside):
        aside.write_text("half of the ne")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, die)
    assert path.read_text() == "old"


def test_a_kill_at_any_moment_of_saving_leaves_a_checkpoint_to_go_on_from(tmp_path, monkeypatch):
    """Saving renames twice; whichever call is the last one, a whole checkpoint of step 3 or 4 is found."""
    class Killed(BaseException):
        pass
    replace = os.replace
    for fatal in range(4):
        folder = tmp_path / str(fatal)
        run, calls = three_checkpoints(folder), iter(range(9))
        def counted(a, b):
            if next(calls) == fatal:
                raise Killed
            replace(a, b)
        monkeypatch.setattr(config.os, "replace", counted)
        if fatal < 2:
            with pytest.raises(Killed):
                run.save(4, weights(4))
        else:
            run.save(4, weights(4))
        monkeypatch.undo()
        state = Run(folder, SETTINGS).checkpoint
        assert state["step"] == (3 if fatal < 2 else 4) and holds(state, state["step"])


# ---------------------------------------------------------------- going on
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_serves(tmp_path, capsys):
    three_checkpoints(tmp_path)
    whole = (tmp_path / "last.pt").read_bytes()
    at = whole.index(torch.full((3,), 3.0).numpy().tobytes())
    flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:]                      # one bit of a weight: torch.load alone would not see it
    for damaged in (b"", b"nonsense", whole[:len(whole) // 2], flipped):
        (tmp_path / "last.pt").write_bytes(damaged)
        run = Run(tmp_path, SETTINGS)
        assert run.checkpoint["step"] == 2 and holds(run.checkpoint, 2)
        said = capsys.readouterr().out
        assert "last.pt is damaged" in said and "step 2" in said


def test_when_no_checkpoint_can_be_read_nothing_is_thrown_away(tmp_path):
    three_checkpoints(tmp_path)
    for name in ("last.pt", "previous.pt"):
        (tmp_path / name).write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="no checkpoint.*--fresh"):
        Run(tmp_path, SETTINGS)
    assert steps_of(tmp_path) == [1, 2, 3]


def test_log_lines_beyond_the_checkpoint_and_half_written_ones_are_dropped(tmp_path):
    run = three_checkpoints(tmp_path)
    run.log(4, loss=0.25)
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"step": 5, "lo')                                                     # the kill came here
    assert Run(tmp_path, SETTINGS).checkpoint["step"] == 3 and steps_of(tmp_path) == [1, 2, 3]


def test_a_log_without_a_checkpoint_starts_over(tmp_path):
    Run(tmp_path, SETTINGS).log(1, loss=1.0)
    Run(tmp_path, SETTINGS)
    assert steps_of(tmp_path) == []


def test_other_settings_are_refused_by_name_with_both_values(tmp_path):
    three_checkpoints(tmp_path)
    with pytest.raises(ValueError, match=r"lr: was 0\.001, now 0\.002.*--fresh"):
        Run(tmp_path, SETTINGS | {"lr": 2e-3})
    with pytest.raises(ValueError, match="size: was 'nano', now 'S'"):
        Run(tmp_path, SETTINGS | {"size": "S"})
    with pytest.raises(ValueError, match="new: was None, now 1"):
        Run(tmp_path, SETTINGS | {"new": 1})


def test_what_does_not_touch_the_mathematics_may_change(tmp_path):
    three_checkpoints(tmp_path)
    other = SETTINGS | {name: "other" for name in MUTABLE_FLAGS}
    assert Run(tmp_path, other).checkpoint["step"] == 3
    assert {"steps", "workers", "device", "save_every", "log_every"} <= MUTABLE_FLAGS


def test_fresh_forgets_checkpoints_and_log_even_with_other_settings(tmp_path):
    three_checkpoints(tmp_path)
    (tmp_path / "mine.txt").write_text("not ours to delete")
    assert Run(tmp_path, SETTINGS | {"size": "S"}, fresh=True).checkpoint is None
    assert {p.name for p in tmp_path.iterdir()} == {"run.json", "mine.txt"}


# ---------------------------------------------------------------- log, metrics, signals
def test_the_log_is_plain_json_with_a_name_for_what_is_not_finite(tmp_path):
    Run(tmp_path, SETTINGS).log(7, loss=torch.tensor(0.123456789), clip=math.nan, rec=math.inf, perceptual="none", bad=0)
    line, = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 7, "loss": 0.123457, "clip": "nan", "rec": "inf", "perceptual": "none", "bad": 0}


def test_plain_rounds_to_six_digits_and_leaves_whole_numbers_alone():
    assert to_json(1234567.89) == 1234570.0 and to_json(12345678) == 12345678 and to_json(torch.tensor(3)) == 3


def test_a_metric_is_printed_and_kept_with_its_protocol(tmp_path, capsys):
    record_metric("nobody/some-model", "psnr", 31.25, "a Hub id is no folder")
    assert "not kept: nobody/some-model" in capsys.readouterr().out and not Path("nobody").exists()
    (tmp_path / "new").mkdir()
    record_metric(tmp_path / "new", "psnr", 31.25, "adm crop, 64 images", step=7)
    record_metric(tmp_path / "new", "fid", torch.tensor(12.5), "2048 samples")
    rows = [json.loads(line) for line in (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"name": "psnr", "value": 31.25, "protocol": "adm crop, 64 images", "step": 7}, {"name": "fid", "value": 12.5, "protocol": "2048 samples"}]
    assert "31.25" in capsys.readouterr().out


def test_a_signal_asks_the_loop_to_stop_and_kills_nothing(tmp_path):
    run, before = Run(tmp_path, SETTINGS), {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        run._catch_signals()
        for s in before:
            run.stop_requested = False
            os.kill(os.getpid(), s)
            assert run.stop_requested
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


@pytest.fixture
def listening(tmp_path, monkeypatch):
    """A run that listens to signals; Python's handlers come back afterwards"""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    run, before = Run(tmp_path, SETTINGS), {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    run._catch_signals()
    yield run
    for s, handler in before.items():
        signal.signal(s, handler)


def test_the_first_ctrl_c_says_what_happens_and_the_second_ends_at_once(listening, capsys):
    os.kill(os.getpid(), signal.SIGINT)
    assert listening.stop_requested and capsys.readouterr().out == "\nstopping after this step; press Ctrl-C again to end at once\n"
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert capsys.readouterr().out == ""


def test_sigterm_before_or_after_ctrl_c_still_lets_the_step_finish(listening, capsys):
    for s in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(os.getpid(), s)
    assert listening.stop_requested and capsys.readouterr().out.count("stopping") == 1


def test_a_ctrl_c_that_torchrun_delivers_twice_lets_the_step_finish_and_is_said_once(listening, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for s in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), s)
    assert listening.stop_requested and capsys.readouterr().out == "\nstopping after this step\n"


# ---------------------------------------------------------------- the loop
CPU = torch.device("cpu")
FLAGS = Namespace(steps=6, batch=4, log_every=2, save_every=3, max_bad=0.1)
SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1


def loop(folder, do=lambda run, step: None, batches=None, args=FLAGS, exported=None):
    """A training loop without a model; `do` is called in each step -> the run"""
    run, before = Run(folder, SETTINGS), {s: signal.getsignal(s) for s in SIGNALS}
    try:
        export = (lambda step: exported.append(step)) if exported is not None else lambda step: None
        run.start(args, args.batch, CPU, "fp32", export)
        given = batches or [Namespace(bad=[])] * (args.steps - run.step)
        given = run.watch(iter(given))
        for step in range(run.step, args.steps):
            next(given)
            do(run, step)
            losses = {"loss": torch.tensor(float(step))}
            finite, stop = run.agree(losses, torch.tensor(1.0))
            assert finite
            run.after_step(step, losses, {}, torch.tensor(1.0), 0.1, weights(step))
            if stop:
                break
        run.status = run.finish()
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
    return run


def test_a_loop_logs_and_saves_at_the_stated_steps_and_continues_where_it_stopped(tmp_path):
    seen = []
    loop(tmp_path, lambda run, step: seen.append(step))
    assert seen == list(range(6)) and steps_of(tmp_path) == [1, 2, 4, 6]    # the first is logged
    saved = [torch.load(tmp_path / name)["step"] for name in ("last.pt", "previous.pt")]
    assert saved == [6, 3]
    longer = Namespace(**vars(FLAGS) | {"steps": 8})
    loop(tmp_path, lambda run, step: seen.append(step), args=longer)
    assert seen[6:] == [6, 7] and steps_of(tmp_path) == [1, 2, 4, 6, 8]


def test_restore_gives_each_part_what_was_saved_of_it(tmp_path):
    three_checkpoints(tmp_path)
    run, part = Run(tmp_path, SETTINGS), Part(0)
    run.restore({"part": part})
    assert run.step == 3 and torch.equal(part.w, Part(3).w) and run.checkpoint is None


def test_a_run_that_ended_without_its_weights_writes_them_when_it_is_called_again(tmp_path):
    """The last checkpoint was saved, but a kill or a full disk came before the export."""
    loop(tmp_path)
    exported = []
    loop(tmp_path, exported=exported)
    assert exported == [6]


def test_what_a_kill_left_half_written_is_swept_away(tmp_path):
    three_checkpoints(tmp_path)
    (tmp_path / "last.pt.part").write_bytes(b"half")
    assert Run(tmp_path, SETTINGS).checkpoint["step"] == 3 and not list(tmp_path.glob("*.part"))


def test_a_damaged_checkpoint_never_takes_the_place_of_a_good_one(tmp_path):
    three_checkpoints(tmp_path)
    (tmp_path / "last.pt").write_bytes(b"nonsense")
    Run(tmp_path, SETTINGS).save(4, weights(4))
    assert [torch.load(tmp_path / name)["step"] for name in ("last.pt", "previous.pt")] == [4, 2]


def test_a_signal_ends_the_loop_after_its_step_with_a_checkpoint(tmp_path):
    def send(run, step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
    run = loop(tmp_path, send)
    assert run.status == runs.EXIT_RESUME and torch.load(tmp_path / "last.pt")["step"] == 4


def test_a_loss_or_gradient_that_is_not_finite_skips_the_step_and_many_end_the_run(tmp_path, capsys):
    run, one, nan = Run(tmp_path, SETTINGS), torch.tensor(1.0), torch.tensor(math.nan)

    def finite(loss, norm):
        return run.agree({"clip": one, "rec": loss}, norm)[0]
    infinite = torch.tensor(math.inf)
    assert finite(one, one) and not finite(nan, one) and not finite(infinite, one)
    assert not finite(one, nan) and finite(one, one)
    assert run.skipped == 3 and run.bad_steps == 0
    assert "step skipped: clip 1, rec nan, gradient norm 1" in capsys.readouterr().out
    with pytest.raises(ValueError, match=f"{runs.MAX_BAD_STEPS} steps in a row.*--lr"):
        for _ in range(runs.MAX_BAD_STEPS):
            assert not finite(nan, nan)


def test_unreadable_samples_are_reported_once_counted_and_too_many_end_the_run(tmp_path, capsys):
    few = [Namespace(bad=["a.jpg (OSError)"] * (step == 2)) for step in range(6)]
    loop(tmp_path / "few", batches=few)
    lines = (tmp_path / "few" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["bad"] for line in lines] == [0, 0, 1, 1]
    many = []
    for step in range(6):
        many.append(Namespace(bad=[f"{step}{k}.jpg (OSError)" for k in range(4)] * 2))
    with pytest.raises(ValueError, match="16 of 24 samples could not be read, more than max_bad 0.1"):
        loop(tmp_path / "many", batches=many)
    said = capsys.readouterr().err
    assert said.count("skipped a.jpg") == 1 and said.count("skipped 01.jpg") == 1


def test_a_full_disk_is_a_sentence_and_the_checkpoint_before_it_stays_whole(tmp_path):
    three_checkpoints(tmp_path)
    run, limits = Run(tmp_path, SETTINGS), resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))                   # no file may grow beyond 20 kB
        with pytest.raises(ValueError, match=r"last.pt could not be written .*the old file is unchanged.*free some space: the same command"):
            large = Part(0)
            large.w = torch.zeros(100_000)
            run.save(4, {"part": large})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert Run(tmp_path, SETTINGS).checkpoint["step"] == 3 and not list(tmp_path.glob("*.part"))


def test_torchrun_s_restart_goes_on_though_the_first_start_was_fresh(tmp_path, monkeypatch):
    three_checkpoints(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert Run(tmp_path, SETTINGS, fresh=True).checkpoint["step"] == 3


# ---------------------------------------------------------------- the machine
def test_autocast_narrows_matrix_products_alone():
    a = torch.randn(4, 4)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with autocast(torch.device("cpu"), precision):
            assert (a @ a).dtype == dtype and (a + a).dtype == torch.float32


def test_the_machine_s_peak_is_measured_not_assumed():
    assert 1e7 < peak_flops(torch.device("cpu"), "fp32", seconds=0.02) < 1e15


@pytest.mark.parametrize("device, asynchronous", [("cuda", True), ("mps", False), ("cpu", False)])
def test_only_cuda_is_sent_tensors_asynchronously(device, asynchronous):
    """On MPS the values may be read before they have arrived."""
    class Recorder:
        def to(self, device, non_blocking=False):
            return device.type, non_blocking
    assert move_to(Recorder(), torch.device(device)) == (device, asynchronous)


def test_non_blocking_stands_in_one_place():
    found = [path.name for path in sources() if "non_blocking" in path.read_text()]
    assert found == ["device.py"]


def sources():
    root = Path(runs.__file__).parents[1]
    return [*root.glob("*.py"), *root.glob("vtp_min/**/*.py"), *root.glob("study/**/*.py")]


def test_tf32_is_set_and_named_on_cuda_alone():
    matmul, cuda = torch.backends.cuda.matmul, torch.device("cuda")
    before = matmul.allow_tf32
    try:
        for on in (True, False):
            set_tf32(cuda, on)
            assert matmul.allow_tf32 == on and tf32_of(cuda) == (", tf32 on" if on else ", tf32 off")
            set_tf32(CPU, not on)
            assert matmul.allow_tf32 == on and tf32_of(CPU) == "" == tf32_of(torch.device("mps"))
    finally:
        matmul.allow_tf32 = before


@pytest.mark.parametrize("words, on", [(("train.py",), True), (("dit.py", "latents"), True), (("dit.py", "train"), False),
                                       (("dit.py", "sample"), True), (("eval.py", "recon"), False)],
                         ids=str)
def test_each_script_sets_tf32_as_its_reference_does(words, on, monkeypatch, tmp_path):
    """Asked of the script itself, on a machine that pretends to have CUDA and stops there."""
    class Enough(Exception):
        pass

    def seen(device, allowed):
        raise Enough(device.type, allowed)
    def pretend(device):
        return torch.device("cuda")
    monkeypatch.setattr(devices, "set_tf32", seen)
    monkeypatch.setattr(devices, "init_distributed", pretend)
    monkeypatch.setattr("vtp_min.dist.init_distributed", pretend)
    folders = ["--out", str(tmp_path)] + [str(tmp_path)] * (len(words) - 1)
    monkeypatch.setattr("sys.argv", [*words, *folders])
    with pytest.raises(Enough) as stopped:
        runpy.run_path(str(Path(runs.__file__).parents[1] / words[0]), run_name="__main__")
    assert stopped.value.args == ("cuda", on)


# ---------------------------------------------------------------- --set name=value
DEFAULTS = {"ema": 0.99, "locals": 2, "teacher": "sinkhorn", "light_decoder": False, "decoder": None}


def test_set_takes_the_type_of_the_default():
    pairs = ["ema=1", "locals=8", "teacher=centering", "light_decoder=true", "decoder=B"]
    found = parse_settings(pairs, DEFAULTS)
    assert found == {"ema": 1.0, "locals": 8, "teacher": "centering", "light_decoder": True,
                     "decoder": "B"}
    assert isinstance(found["ema"], float) and parse_settings(["decoder=none"], DEFAULTS) == {"decoder": None}


@pytest.mark.parametrize("pair", ["emma=0.9", "ema", "ema=fast", "locals=1.5", "light_decoder=3"])
def test_a_setting_that_does_not_exist_or_fit_is_refused_with_what_was_wanted(pair):
    with pytest.raises(ValueError, match=f"--set {pair}: wanted"):
        parse_settings([pair], DEFAULTS)


def test_an_unknown_setting_lists_the_known_ones():
    with pytest.raises(ValueError, match="ema, locals, teacher, light_decoder, decoder"):
        parse_settings(["x=1"], DEFAULTS)
