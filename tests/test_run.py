"""A run folder: files are always complete, a resumed run equals an uninterrupted one, and a folder
with other settings is rejected with a message."""
import contextlib
import io
import json
import math
import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import open_data
from vtp_min import config
from vtp_min import device as devices
from vtp_min import run as runs
from vtp_min.config import atomic_write
from vtp_min.device import autocast, move_to, peak_flops, set_tf32, tf32_of
from vtp_min.extras.output import protect_output
from vtp_min.extras.run_folder import append_line
from vtp_min.run import MUTABLE_FLAGS, Run, parse_settings, record_metric, to_json

SETTINGS = {"size": "nano", "lr": 1e-3, "betas": (0.9, 0.98), "steps": 10, "workers": 0,
            "device": "cpu"}
SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP


class Part:
    """In place of a model or an optimizer"""
    def __init__(self, n):
        self.w = torch.full((3,), float(n))

    def state_dict(self):
        return {"w": self.w}

    def load_state_dict(self, state):
        self.w = state["w"]


def weights(n):
    return {"part": Part(n)}


def contains_weights(checkpoint, n):
    return torch.equal(checkpoint["part"]["w"], weights(n)["part"].w)


def save_three_checkpoints(folder):
    run = Run(folder, SETTINGS)
    for step in (1, 2, 3):
        run.log(step, loss=1 / step)
        run.save(step, weights(step))
    return run


def logged_steps(folder):
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


def saved_steps(folder):
    """Steps of the newest checkpoint and of the one before it"""
    return [torch.load(folder / name)["step"] for name in ("last.pt", "previous.pt")]


def handlers():
    return {s: signal.getsignal(s) for s in SIGNALS}


def restore_handlers(before):
    for s, handler in before.items():
        signal.signal(s, handler)


# ---------------------------------------------------------------- saving
def test_a_new_folder_has_no_checkpoint_and_contains_its_settings(tmp_path):
    run = Run(tmp_path / "a" / "b", SETTINGS)
    found = json.loads((tmp_path / "a" / "b" / "run.json").read_text())
    assert run.checkpoint is None and found == SETTINGS | {"betas": [0.9, 0.98]}


def test_a_saved_state_is_loaded_bit_for_bit(tmp_path):
    save_three_checkpoints(tmp_path)
    checkpoint = Run(tmp_path, SETTINGS).checkpoint
    assert checkpoint["step"] == 3 and contains_weights(checkpoint, 3)


def test_the_last_two_checkpoints_are_kept_and_no_temporary_file_remains(tmp_path):
    save_three_checkpoints(tmp_path)
    assert saved_steps(tmp_path) == [3, 2]
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"last.pt", "previous.pt", "log.jsonl", "run.json", ".lock"}


def test_an_interrupted_write_leaves_the_old_file_complete(tmp_path):
    path = tmp_path / "file"
    atomic_write(path, lambda temporary: temporary.write_text("old"))

    def interrupted(temporary):
        temporary.write_text("half of the ne")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, interrupted)
    assert path.read_text() == "old"


def test_after_a_kill_at_any_moment_of_saving_a_complete_checkpoint_is_found(tmp_path, monkeypatch):
    """Saving renames two files. A kill before either rename leaves the checkpoint of step 3."""
    class Killed(BaseException):
        pass
    replace = os.replace
    for fatal_call in range(4):
        folder = tmp_path / str(fatal_call)
        run, calls = save_three_checkpoints(folder), iter(range(9))

        def replace_until_killed(a, b):
            if next(calls) == fatal_call:
                raise Killed
            replace(a, b)
        monkeypatch.setattr(config.os, "replace", replace_until_killed)
        if fatal_call < 2:
            with pytest.raises(Killed):
                run.save(4, weights(4))
        else:
            run.save(4, weights(4))
        monkeypatch.undo()
        checkpoint = Run(folder, SETTINGS).checkpoint
        assert checkpoint["step"] == (3 if fatal_call < 2 else 4)
        assert contains_weights(checkpoint, checkpoint["step"])


# ---------------------------------------------------------------- resuming
def test_a_damaged_last_checkpoint_is_reported_and_the_previous_one_is_used(tmp_path, capsys):
    save_three_checkpoints(tmp_path)
    complete = (tmp_path / "last.pt").read_bytes()
    start = complete.index(torch.full((3,), 3.0).numpy().tobytes())
    # one bit of a weight: torch.load by itself would not detect it
    flipped = complete[:start] + bytes([complete[start] ^ 1]) + complete[start + 1:]
    for damaged in (b"", b"nonsense", complete[:len(complete) // 2], flipped):
        (tmp_path / "last.pt").write_bytes(damaged)
        run = Run(tmp_path, SETTINGS)
        assert run.checkpoint["step"] == 2 and contains_weights(run.checkpoint, 2)
        printed = capsys.readouterr().out
        assert "last.pt is damaged" in printed and "step 2" in printed


def test_if_no_checkpoint_can_be_read_nothing_is_deleted(tmp_path):
    save_three_checkpoints(tmp_path)
    for name in ("last.pt", "previous.pt"):
        (tmp_path / name).write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="no checkpoint.*--fresh"):
        Run(tmp_path, SETTINGS)
    assert logged_steps(tmp_path) == [1, 2, 3]


def test_log_lines_after_the_checkpoint_and_incomplete_lines_are_removed(tmp_path):
    run = save_three_checkpoints(tmp_path)
    run.log(4, loss=0.25)
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"step": 5, "lo')                              # as if the process was killed here
    assert Run(tmp_path, SETTINGS).checkpoint["step"] == 3
    assert logged_steps(tmp_path) == [1, 2, 3]


def test_a_log_without_a_checkpoint_starts_over(tmp_path):
    Run(tmp_path, SETTINGS).log(1, loss=1.0)
    Run(tmp_path, SETTINGS)
    assert logged_steps(tmp_path) == []


def test_other_settings_raise_an_error_with_their_names_and_both_values(tmp_path):
    save_three_checkpoints(tmp_path)
    with pytest.raises(ValueError, match=r"lr: was 0\.001, now 0\.002.*--fresh"):
        Run(tmp_path, SETTINGS | {"lr": 2e-3})
    with pytest.raises(ValueError, match="size: was 'nano', now 'S'"):
        Run(tmp_path, SETTINGS | {"size": "S"})
    with pytest.raises(ValueError, match="new: was None, now 1"):
        Run(tmp_path, SETTINGS | {"new": 1})


def test_mutable_flags_may_change(tmp_path):
    save_three_checkpoints(tmp_path)
    other = SETTINGS | {name: "other" for name in MUTABLE_FLAGS}
    assert Run(tmp_path, other).checkpoint["step"] == 3
    assert {"steps", "workers", "device", "save_every", "log_every"} <= MUTABLE_FLAGS


def test_fresh_deletes_checkpoints_and_log_even_with_other_settings(tmp_path):
    save_three_checkpoints(tmp_path)
    (tmp_path / "mine.txt").write_text("a file of the user")
    assert Run(tmp_path, SETTINGS | {"size": "S"}, fresh=True).checkpoint is None
    assert {p.name for p in tmp_path.iterdir()} == {"run.json", "mine.txt", ".lock"}


# ---------------------------------------------------------------- files of others
def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("names", [["config.json", "model.safetensors"], ["model.safetensors"],
                                   ["config.json"], ["last.pt", "model.safetensors"]], ids=str)
def test_a_folder_with_weights_of_others_is_refused_and_stays_as_it_is(tmp_path, names, fresh):
    for name in names:
        (tmp_path / name).write_bytes(b"weights of somebody else")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="--out"):
        Run(tmp_path, SETTINGS, fresh)
    after = contents(tmp_path)
    assert {name: after[name] for name in names} == before
    assert "run.json" not in after


def test_a_run_without_checkpoints_is_not_overwritten_unless_fresh_is_given(tmp_path):
    save_three_checkpoints(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"trained for days")
    for name in ("last.pt", "previous.pt"):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="model.safetensors of a run, but no checkpoint.*--fresh"):
        Run(tmp_path, SETTINGS)
    assert (tmp_path / "model.safetensors").exists()
    Run(tmp_path, SETTINGS, fresh=True)
    assert not (tmp_path / "model.safetensors").exists()


def test_fresh_does_not_delete_the_run_of_another_command(tmp_path):
    """dit.py train RUN/latents --out RUN --fresh would delete the tokenizer."""
    save_three_checkpoints(tmp_path)
    with pytest.raises(ValueError, match="run of another command"):
        Run(tmp_path, SETTINGS | {"latents": "90 of 64x4x4"}, fresh=True)
    assert saved_steps(tmp_path) == [3, 2]


def test_a_checkpoint_of_another_program_is_named_and_not_overwritten(tmp_path, capsys):
    torch.save({"model": {"w": torch.zeros(3)}, "epoch": 7}, tmp_path / "last.pt")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="no checkpoint in .* can be read"):
        Run(tmp_path, SETTINGS)
    assert "last.pt is damaged (it is not the checkpoint of a run)" in capsys.readouterr().out
    assert contents(tmp_path)["last.pt"] == before["last.pt"]


def in_another_process(function):
    """-> message of the ValueError that function raises in a new process, or "" """
    def call(connection):
        message = ""
        try:
            function()
        except ValueError as error:
            message = str(error)
        connection.send(message)

    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=call, args=(theirs,))
    process.start()
    message = ours.recv()
    process.join()
    return message


def test_a_folder_is_used_by_one_process_at_a_time(tmp_path):
    run = Run(tmp_path, SETTINGS)
    run.log(1, loss=1.0)
    for fresh in (False, True):
        message = in_another_process(lambda: Run(tmp_path, SETTINGS, fresh))
        assert f"is in use by process {os.getpid()}" in message and "--out" in message
    assert logged_steps(tmp_path) == [1]
    assert in_another_process(lambda: Run(tmp_path / "other", SETTINGS)) == ""
    # the other process has ended, so its folder is free
    Run(tmp_path / "other", SETTINGS)


def test_a_killed_process_leaves_no_lock_even_if_its_workers_still_live(tmp_path):
    def hold(connection):
        Run(tmp_path, SETTINGS)
        worker = os.fork()
        if worker == 0:
            time.sleep(60)
        connection.send(worker)
        time.sleep(60)

    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=hold, args=(theirs,))
    process.start()
    worker = ours.recv()
    process.kill()
    process.join()
    try:
        os.kill(worker, 0)                                        # it lives
        Run(tmp_path, SETTINGS)
    finally:
        os.kill(worker, signal.SIGKILL)


# ---------------------------------------------------------------- data that moved
@pytest.fixture
def images(tmp_path):
    """A folder of 6 images in 2 classes"""
    for c in ("cat", "dog"):
        (tmp_path / "a" / c).mkdir(parents=True)
        for i in range(3):
            pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "a" / c / f"{i}.png")
    return tmp_path / "a"


def run_on(out, data, **settings):
    """A run on a data set, as train.py opens it"""
    data = str(data)
    return Run(out, SETTINGS | {"data": data} | settings, files={"data": open_data(data)})


@pytest.fixture
def trained(images, tmp_path):
    """A run folder with a checkpoint of step 1, trained on these images"""
    run_on(tmp_path / "run", images).save(1, weights(1))
    return tmp_path / "run"


def test_the_same_images_under_another_path_continue_the_run(images, trained, capsys):
    moved = images.rename(images.with_name("b"))
    capsys.readouterr()
    assert run_on(trained, moved).step == 1
    printed = capsys.readouterr().out
    assert f"data is now {str(moved)!r}; it was {str(images)!r}. The files are the same" in printed
    assert json.loads((trained / "run.json").read_text())["data"] == str(moved)


def test_relative_and_absolute_paths_and_links_name_the_same_data(images, trained, monkeypatch):
    monkeypatch.chdir(images.parent)
    images.with_name("link").symlink_to(images)
    for path in ("a", "./a", "../" + images.parent.name + "/a/", "link"):
        assert run_on(trained, path).step == 1


def test_old_checkpoints_continue_with_another_spelling_of_the_same_path(images, trained,
                                                                         monkeypatch):
    checkpoint = torch.load(trained / "last.pt")
    del checkpoint["files"]
    torch.save(checkpoint, trained / "last.pt")
    monkeypatch.chdir(images.parent)
    assert run_on(trained, "./a").step == 1


@pytest.mark.parametrize("change", ["one less", "another name", "another size"])
def test_other_images_under_another_path_are_other_settings(images, trained, change):
    moved = images.rename(images.with_name("b"))
    if change == "one less":
        (moved / "cat" / "1.png").unlink()
    elif change == "another name":
        (moved / "cat" / "1.png").rename(moved / "cat" / "3.png")
    else:
        Image.new("RGB", (9, 9)).save(moved / "cat" / "1.png")
    with pytest.raises(ValueError, match=r"data: was '.*/a', now '.*/b' \(6 samples .*, now [56]"):
        run_on(trained, moved)


def test_images_that_changed_under_the_same_path_are_reported(images, trained, capsys):
    (images / "cat" / "1.png").unlink()
    assert run_on(trained, images).step == 1
    assert "have changed since the last checkpoint: they were 6 samples" in capsys.readouterr().out


def test_the_same_weights_under_another_path_continue_the_run(tmp_path):
    def open_run(init):
        return Run(tmp_path / "run", SETTINGS | {"init": str(init)}, files={"init": str(init)})
    (tmp_path / "stage1").mkdir()
    (tmp_path / "stage1" / "model.safetensors").write_bytes(b"weights")
    open_run(tmp_path / "stage1").save(1, weights(1))
    shutil.copytree(tmp_path / "stage1", tmp_path / "copy")
    assert open_run(tmp_path / "copy").step == 1
    (tmp_path / "copy" / "model.safetensors").write_bytes(b"others!")
    with pytest.raises(ValueError, match="init: was .*stage1.*, now .*copy"):
        open_run(tmp_path / "copy")


# ---------------------------------------------------------------- damaged logs, full disks
LINES = [json.dumps({"step": n, "loss": 1 / n}).encode() for n in (1, 2, 3)]


@pytest.mark.parametrize("log, steps", [
    (LINES[0] + b"\n" + bytes(300) + LINES[1] + b"\n" + LINES[2] + b"\n", [1, 2, 3]),
    (LINES[0] + b"\n" + bytes(300) + b"\n" + LINES[2] + b"\n", [1, 3]),
    (LINES[0] + b"\n" + LINES[1][:9] + LINES[2] + b"\n", [1, 3]),
    (LINES[0] + b"\n\xff\xfe\x80}\n[2]\n{}\n" + LINES[2], [1, 3]),
    (bytes(4096), []), (b"version https://git-lfs.github.com/spec/v1\n", [])
], ids=["zeros before a line", "a line of zeros", "half a line before the next", "no objects",
        "only zeros", "Git LFS pointer"])
def test_damaged_lines_of_the_log_are_reported_and_the_run_continues(tmp_path, log, steps, capsys):
    save_three_checkpoints(tmp_path)
    (tmp_path / "log.jsonl").write_bytes(log)
    capsys.readouterr()
    assert Run(tmp_path, SETTINGS).step == 3
    assert logged_steps(tmp_path) == steps
    if steps != [1, 2, 3]:
        printed = capsys.readouterr().out
        assert "log.jsonl" in printed and "damaged" in printed
        assert (tmp_path / "log.jsonl.damaged").read_bytes() == log


@contextlib.contextmanager
def limited_file_size(size):
    """Files of at most `size` bytes, as on a full disk. The limit ends before the test does: pytest
    then writes its result, perhaps to a file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def test_on_a_full_disk_all_metrics_are_printed_and_no_half_line_stays(tmp_path, capsys):
    record_metric(tmp_path, "psnr", 31.25, "adm crop")
    complete = (tmp_path / "metrics.jsonl").read_bytes()
    with limited_file_size(len(complete) + 10):
        for name, value in (("ssim", 0.875), ("lpips", 0.125)):
            record_metric(tmp_path, name, value, "adm crop")
    printed = capsys.readouterr().out
    assert "0.875" in printed and "0.125" in printed and printed.count("(not saved: ") == 2
    assert (tmp_path / "metrics.jsonl").read_bytes() == complete
    record_metric(tmp_path, "fid", 12.5, "2048 samples")
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines] == ["psnr", "fid"]


def test_a_new_line_does_not_continue_an_incomplete_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for half in (b'{"name": "psnr", "va', bytes(50), b'{"name": "psnr"}'):
        path.write_bytes(half)
        append_line(path, {"name": "fid"})
        assert path.read_bytes() == half + b'\n{"name": "fid"}\n'


def test_a_log_line_that_a_full_disk_cuts_off_is_removed(tmp_path):
    run = save_three_checkpoints(tmp_path)
    complete = (tmp_path / "log.jsonl").read_bytes()
    with (limited_file_size(len(complete) + 10),
          pytest.raises(ValueError, match="log.jsonl cannot be written .*free some space")):
        run.log(4, loss=0.25)
    assert (tmp_path / "log.jsonl").read_bytes() == complete


def test_metrics_of_a_folder_that_cannot_be_written_are_printed(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").mkdir()                          # root may write in any folder
    for name, value in (("psnr", 31.25), ("ssim", 0.875)):
        record_metric(tmp_path, name, value, "adm crop")
    printed = capsys.readouterr().out
    assert "31.25" in printed and "0.875" in printed
    assert "cannot be written, Is a directory; --out names another folder" in printed


def test_a_run_folder_that_cannot_be_written_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file/run cannot be written .*--out"):
        Run(tmp_path / "file" / "run", SETTINGS)


# ---------------------------------------------------------------- output
def close_output(monkeypatch):
    """Make sys.stdout and sys.stderr pipes that nobody reads. (A fixture could not: pytest replaces
    both again when the test begins.)"""
    for name in ("stdout", "stderr"):
        reader, writer = os.pipe()
        os.close(reader)
        monkeypatch.setattr(sys, name, io.TextIOWrapper(os.fdopen(writer, "wb", 0),
                                                        write_through=True))


def test_output_to_a_closed_pipe_raises_no_error(monkeypatch):
    close_output(monkeypatch)
    with pytest.raises(BrokenPipeError):
        print("lost", flush=True)
    protect_output()
    protect_output()                                              # a second call changes nothing
    for stream in (sys.stdout, sys.stderr):
        print("lost", file=stream, flush=True)
        stream.flush()
        os.write(stream.fileno(), b"also from libraries")         # it is /dev/null now


def test_a_run_whose_output_nobody_reads_continues_and_saves(monkeypatch, tmp_path):
    close_output(monkeypatch)
    protect_output()

    def send(run, step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
    run = loop(tmp_path, send)
    assert run.status == runs.EXIT_RESUME and torch.load(tmp_path / "last.pt")["step"] == 4


def test_the_other_stream_says_that_output_is_lost(tmp_path, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    monkeypatch.setattr(sys, "stderr", open(tmp_path / "errors", "w"))
    protect_output()
    for _ in range(3):
        print("lost", flush=True)
    sys.stderr.flush()
    text = (tmp_path / "errors").read_text()
    assert text.count("can no longer be written (Broken pipe); the program continues") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_output_to_a_full_disk_and_a_stream_that_is_closed_raise_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))
    monkeypatch.setattr(sys, "stderr", None)
    protect_output()
    for stream in (sys.stdout, sys.stderr):
        print("lost", file=stream, flush=True)


def test_sighup_stops_a_run_except_under_nohup(tmp_path):
    run, before = Run(tmp_path, SETTINGS), handlers()
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)              # nohup
        run._catch_signals()
        os.kill(os.getpid(), signal.SIGHUP)
        assert not run.stop_requested
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        run._catch_signals()
        os.kill(os.getpid(), signal.SIGHUP)
        assert run.stop_requested
    finally:
        restore_handlers(before)


# ---------------------------------------------------------------- log, metrics, signals
def test_the_log_is_valid_json_with_strings_for_numbers_that_are_not_finite(tmp_path):
    Run(tmp_path, SETTINGS).log(7, loss=torch.tensor(0.123456789), clip=math.nan, rec=math.inf,
                                perceptual="none", bad=0)
    line, = (tmp_path / "log.jsonl").read_text().splitlines()
    # json.loads calls parse_constant for NaN and Infinity, which JSON does not allow
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 7, "loss": 0.123457, "clip": "nan", "rec": "inf", "perceptual": "none", "bad": 0}


def test_to_json_rounds_floats_to_six_digits_and_does_not_change_integers():
    assert to_json(1234567.89) == 1234570.0
    assert to_json(12345678) == 12345678
    assert to_json(torch.tensor(3)) == 3


def test_a_metric_is_printed_and_saved_with_its_protocol(tmp_path, capsys):
    record_metric("nobody/some-model", "psnr", 31.25, "a Hub id is not a folder")
    assert "not saved: nobody/some-model" in capsys.readouterr().out
    assert not Path("nobody").exists()
    (tmp_path / "new").mkdir()
    record_metric(tmp_path / "new", "psnr", 31.25, "adm crop, 64 images", step=7)
    record_metric(tmp_path / "new", "fid", torch.tensor(12.5), "2048 samples")
    lines = (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"name": "psnr", "value": 31.25, "protocol": "adm crop, 64 images", "step": 7},
        {"name": "fid", "value": 12.5, "protocol": "2048 samples"}]
    assert "31.25" in capsys.readouterr().out


def test_a_signal_requests_a_stop_and_does_not_end_the_process(tmp_path):
    run, before = Run(tmp_path, SETTINGS), handlers()
    try:
        run._catch_signals()
        for s in before:
            run.stop_requested = False
            os.kill(os.getpid(), s)
            assert run.stop_requested
    finally:
        restore_handlers(before)


@pytest.fixture
def catching_run(tmp_path, monkeypatch):
    """A run that catches signals. Python's handlers are restored after the test."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    run, before = Run(tmp_path, SETTINGS), handlers()
    run._catch_signals()
    yield run
    restore_handlers(before)


def test_the_first_ctrl_c_prints_a_message_and_the_second_stops_immediately(catching_run, capsys):
    message = "\nstopping after this step; press Ctrl-C again to stop immediately\n"
    os.kill(os.getpid(), signal.SIGINT)
    assert catching_run.stop_requested and capsys.readouterr().out == message
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert capsys.readouterr().out == ""


def test_after_sigterm_and_ctrl_c_in_any_order_the_step_still_finishes(catching_run, capsys):
    for s in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(os.getpid(), s)
    assert catching_run.stop_requested
    assert capsys.readouterr().out.count("stopping") == 1


def test_a_ctrl_c_that_torchrun_delivers_twice_is_reported_once(catching_run, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for s in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), s)
    assert catching_run.stop_requested
    assert capsys.readouterr().out == "\nstopping after this step\n"


# ---------------------------------------------------------------- the loop
CPU = torch.device("cpu")
FLAGS = Namespace(steps=6, batch=4, log_every=2, save_every=3, max_bad=0.1)


def loop(folder, in_step=lambda run, step: None, batches=None, args=FLAGS, exported=None):
    """Run a training loop without a model -> the run

    in_step   called as in_step(run, step) in each step
    exported  list to which the steps of all exports are appended
    """
    run, before = Run(folder, SETTINGS), handlers()

    def export(step):
        if exported is not None:
            exported.append(step)
    try:
        run.start(args, args.batch, CPU, "fp32", export)
        batches = batches or [Namespace(bad=[])] * (args.steps - run.step)
        batches = run.watch(iter(batches))
        for step in range(run.step, args.steps):
            next(batches)
            in_step(run, step)
            losses = {"loss": torch.tensor(float(step))}
            finite, stop = run.agree(losses, torch.tensor(1.0))
            assert finite
            run.after_step(step, losses, {}, torch.tensor(1.0), 0.1, weights(step))
            if stop:
                break
        run.status = run.finish()
    finally:
        restore_handlers(before)
    return run


def test_a_loop_logs_and_saves_at_the_given_intervals_and_continues_at_its_last_step(tmp_path):
    steps = []
    loop(tmp_path, lambda run, step: steps.append(step))
    assert steps == list(range(6))
    assert logged_steps(tmp_path) == [1, 2, 4, 6]               # the first step is always logged
    assert saved_steps(tmp_path) == [6, 3]
    longer = Namespace(**vars(FLAGS) | {"steps": 8})
    loop(tmp_path, lambda run, step: steps.append(step), args=longer)
    assert steps[6:] == [6, 7] and logged_steps(tmp_path) == [1, 2, 4, 6, 8]


def test_restore_loads_the_saved_state_of_each_part(tmp_path):
    save_three_checkpoints(tmp_path)
    run, part = Run(tmp_path, SETTINGS), Part(0)
    run.restore({"part": part})
    assert run.step == 3 and torch.equal(part.w, Part(3).w) and run.checkpoint is None


def test_a_complete_run_without_exported_weights_exports_them_when_it_is_started_again(tmp_path):
    """The last checkpoint was saved, but a kill or a full disk prevented the export."""
    loop(tmp_path)
    exported = []
    loop(tmp_path, exported=exported)
    assert exported == [6]


def test_incomplete_files_of_a_killed_process_are_deleted(tmp_path):
    save_three_checkpoints(tmp_path)
    (tmp_path / "last.pt.part").write_bytes(b"half")
    assert Run(tmp_path, SETTINGS).checkpoint["step"] == 3
    assert not list(tmp_path.glob("*.part"))


def test_a_damaged_checkpoint_never_replaces_a_readable_one(tmp_path):
    save_three_checkpoints(tmp_path)
    (tmp_path / "last.pt").write_bytes(b"nonsense")
    Run(tmp_path, SETTINGS).save(4, weights(4))
    assert saved_steps(tmp_path) == [4, 2]


def test_a_signal_ends_the_loop_after_the_current_step_with_a_checkpoint(tmp_path):
    def send(run, step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
    run = loop(tmp_path, send)
    assert run.status == runs.EXIT_RESUME and torch.load(tmp_path / "last.pt")["step"] == 4


def test_a_loss_or_gradient_that_is_not_finite_skips_the_step_and_many_end_the_run(tmp_path,
                                                                                   capsys):
    run, one = Run(tmp_path, SETTINGS), torch.tensor(1.0)
    nan, infinite = torch.tensor(math.nan), torch.tensor(math.inf)

    def finite(loss, norm):
        return run.agree({"clip": one, "rec": loss}, norm)[0]
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
    message = "16 of 24 samples could not be read, more than the fraction max_bad = 0.1"
    with pytest.raises(ValueError, match=message):
        loop(tmp_path / "many", batches=many)
    printed = capsys.readouterr().err
    assert printed.count("skipped a.jpg") == 1 and printed.count("skipped 01.jpg") == 1


def test_a_full_disk_raises_an_error_and_the_previous_checkpoint_stays_complete(tmp_path):
    save_three_checkpoints(tmp_path)
    run = Run(tmp_path, SETTINGS)
    message = (r"last.pt could not be written .*the old file is unchanged.*free some space: "
               r"the same command")
    large = Part(0)
    large.w = torch.zeros(100_000)
    with limited_file_size(20_000), pytest.raises(ValueError, match=message):
        run.save(4, {"part": large})
    assert Run(tmp_path, SETTINGS).checkpoint["step"] == 3
    assert not list(tmp_path.glob("*.part"))


def test_a_restart_by_torchrun_continues_the_run_also_with_fresh(tmp_path, monkeypatch):
    save_three_checkpoints(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert Run(tmp_path, SETTINGS, fresh=True).checkpoint["step"] == 3


# ---------------------------------------------------------------- device and precision
def test_autocast_changes_the_precision_of_matrix_products_only():
    a = torch.randn(4, 4)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with autocast(torch.device("cpu"), precision):
            assert (a @ a).dtype == dtype and (a + a).dtype == torch.float32


def test_the_peak_is_a_plausible_number_of_flops_per_second():
    assert 1e7 < peak_flops(torch.device("cpu"), "fp32", seconds=0.02) < 1e15


@pytest.mark.parametrize("device, asynchronous", [("cuda", True), ("mps", False), ("cpu", False)])
def test_tensors_are_copied_asynchronously_to_cuda_only(device, asynchronous):
    """On MPS and on the CPU the values could be read before the copy is complete. A copy to CUDA
    starts from pinned memory."""
    class Recorder:
        device, is_pinned = torch.device("cpu"), False

        def contiguous(self):
            return self

        def pin_memory(self):
            self.is_pinned = True
            return self

        def to(self, device, non_blocking=False):
            assert self.is_pinned == (device.type == "cuda")
            return device.type, non_blocking
    assert move_to(Recorder(), torch.device(device)) == (device, asynchronous)


def test_only_device_py_contains_non_blocking():
    found = [path.name for path in sources() if "non_blocking=" in path.read_text()]
    assert found == ["device.py"]


def sources():
    root = Path(runs.__file__).parents[1]
    return [*root.glob("*.py"), *root.glob("vtp_min/**/*.py"), *root.glob("study/**/*.py")]


def test_tf32_is_set_and_printed_on_cuda_only():
    matmul, cuda = torch.backends.cuda.matmul, torch.device("cuda")
    before = matmul.allow_tf32
    try:
        for on, suffix in ((True, ", tf32 on"), (False, ", tf32 off")):
            set_tf32(cuda, on)
            assert matmul.allow_tf32 == on and tf32_of(cuda) == suffix
            set_tf32(CPU, not on)
            assert matmul.allow_tf32 == on and tf32_of(CPU) == "" == tf32_of(torch.device("mps"))
    finally:
        matmul.allow_tf32 = before


@pytest.mark.parametrize("command, on", [
    (("train.py",), True), (("dit.py", "latents"), True), (("dit.py", "train"), False),
    (("dit.py", "sample"), True), (("eval.py", "recon"), False)], ids=str)
def test_each_script_sets_tf32_as_its_reference_does(command, on, monkeypatch, tmp_path):
    """The scripts run with a replaced init_distributed that returns a CUDA device, and stop when
    they set TF32."""
    class Stop(Exception):
        pass

    def record(device, allowed):
        raise Stop(device.type, allowed)

    def cuda_device(device):
        return torch.device("cuda")
    monkeypatch.setattr(devices, "set_tf32", record)
    monkeypatch.setattr(devices, "init_distributed", cuda_device)
    monkeypatch.setattr("vtp_min.dist.init_distributed", cuda_device)
    folders = ["--out", str(tmp_path)] + [str(tmp_path)] * (len(command) - 1)
    monkeypatch.setattr("sys.argv", [*command, *folders])
    with pytest.raises(Stop) as stopped:
        runpy.run_path(str(Path(runs.__file__).parents[1] / command[0]), run_name="__main__")
    assert stopped.value.args == ("cuda", on)


# ---------------------------------------------------------------- --set name=value
DEFAULTS = {"ema": 0.99, "locals": 2, "teacher": "sinkhorn", "light_decoder": False,
            "decoder": None}


def test_a_setting_gets_the_type_of_its_default():
    pairs = ["ema=1", "locals=8", "teacher=centering", "light_decoder=true", "decoder=B"]
    found = parse_settings(pairs, DEFAULTS)
    assert found == {"ema": 1.0, "locals": 8, "teacher": "centering", "light_decoder": True,
                     "decoder": "B"}
    assert isinstance(found["ema"], float)
    assert parse_settings(["decoder=none"], DEFAULTS) == {"decoder": None}


@pytest.mark.parametrize("pair", ["emma=0.9", "ema", "ema=fast", "locals=1.5", "light_decoder=3"])
def test_a_setting_with_an_unknown_name_or_a_wrong_type_raises_an_error(pair):
    with pytest.raises(ValueError, match=f"--set {pair}: wanted"):
        parse_settings([pair], DEFAULTS)


def test_the_error_for_an_unknown_setting_lists_the_known_names():
    with pytest.raises(ValueError, match="ema, locals, teacher, light_decoder, decoder"):
        parse_settings(["x=1"], DEFAULTS)
