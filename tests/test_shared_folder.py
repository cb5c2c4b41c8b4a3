"""Processes on several machines meet, and use one folder on a network file system, which may show
old contents for a while, may have no locks, or no fsync."""
import errno
import fcntl
import multiprocessing
import os
import shutil
import socket
import sys
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from vtp_min.config import atomic_write
from vtp_min.extras import checkpoints, files, rendezvous, run_folder, sample_folder
from vtp_min.run import Run

SETTINGS = {"size": "nano"}
OLD_TORCH = torch.torch_version.TorchVersion(torch.__version__) < "2.6"


class Part:
    """In place of a model"""
    def state_dict(self):
        return {}


def save(folder, *steps):
    """Write checkpoints of these steps. This process locks another folder, of which `folder` is a
    copy, so that other processes can use it."""
    original = folder.with_name("original")
    run = Run(original, SETTINGS)
    for step in steps:
        run.save(step, {"part": Part()})
    shutil.copytree(original, folder)


# ---------------------------------------------------------------- two ranks, two views of a folder
def on_two_ranks(function, folder):
    """Call function() in two gloo processes -> [what rank 0 returned, what rank 1 returned]; of an
    error, its text"""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def process(rank):
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank,
                                world_size=2)
        try:
            result = function()
        except Exception as error:
            result = str(error)
        results.put((rank, result))
        dist.destroy_process_group()

    processes = [context.Process(target=process, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    found = dict(results.get() for _ in processes)
    for process in processes:
        process.join(60)
        process.kill()        # a process of PyTorch 2.5.1 once hung when it left the group
    return [found[0], found[1]]


def see_instead(monkeypatch, rank, replacement, times):
    """On this rank, the first `times` readings of last.pt read the file `replacement`"""
    map_file, readings = checkpoints.map_file, []

    def stale(path):
        if path.name == "last.pt" and dist.get_rank() == rank and len(readings) < times:
            readings.append(path)
            path = replacement
        return map_file(path)
    monkeypatch.setattr(checkpoints, "map_file", stale)


@pytest.mark.parametrize("rank, replacement", [(0, "missing.pt"), (1, "previous.pt")])
def test_a_rank_that_sees_an_old_listing_of_the_folder_waits_for_the_newest_checkpoint(
        tmp_path, monkeypatch, rank, replacement):
    """In the old listing, last.pt does not exist, or is the file that is now previous.pt. Rank 0 of
    a job that was started again can be on another machine."""
    save(tmp_path / "run", 1, 2)
    see_instead(monkeypatch, rank, tmp_path / "run" / replacement, times=1)
    assert on_two_ranks(lambda: Run(tmp_path / "run", SETTINGS).step, tmp_path) == [2, 2]


@pytest.mark.parametrize("rank, steps, seen", [(0, [1, 2], "one of step 1"), (1, [2], "none")])
def test_a_folder_that_machines_do_not_share_is_an_error(
        tmp_path, monkeypatch, rank, steps, seen):
    save(tmp_path / "run", *steps)
    see_instead(monkeypatch, rank, tmp_path / "missing.pt", times=1000)
    monkeypatch.setattr(files, "SECONDS_TO_WAIT", 0)
    for message in on_two_ranks(lambda: Run(tmp_path / "run", SETTINGS).step, tmp_path):
        assert "another process found a checkpoint of step 2, but rank" in message
        assert f"rank {rank} on {socket.gethostname()} found {seen}; --out must be" in message


def open_with(folder, n_samples):
    run_folder.open_on_all(folder, SETTINGS, False, {"data": f"{n_samples} samples"})
    return "open"


def test_machines_with_different_data_are_an_error(tmp_path):
    """One machine has an incomplete copy of the data."""
    run = tmp_path / "run"
    assert on_two_ranks(lambda: open_with(run, 1000), tmp_path) == ["open"] * 2
    for message in on_two_ranks(lambda: open_with(run, 1000 - dist.get_rank()), tmp_path):
        assert "rank 1 on " in message and "999 samples" in message and "1000 samples" in message


def test_a_folder_in_use_ends_all_ranks_at_once(tmp_path):
    """Only rank 0 tries to lock it."""
    Run(tmp_path / "run", SETTINGS)                           # this process has the lock
    for message in on_two_ranks(lambda: open_with(tmp_path / "run", 3), tmp_path):
        assert f"is in use by process {os.getpid()}" in message


# ---------------------------------------------------------------- one machine, a network drive
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_used_with_a_note(tmp_path, monkeypatch, capsys, number):
    def no_locks(*_):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(fcntl, "lockf", no_locks)
    for _ in range(2):
        Run(tmp_path, SETTINGS)
        assert f"cannot be locked ({os.strerror(number)})" in capsys.readouterr().out


@pytest.mark.parametrize("machine, waits", [("another", True), (socket.gethostname(), False)])
def test_the_lock_of_a_machine_that_crashed_is_waited_for_and_no_other(
        tmp_path, monkeypatch, capsys, machine, waits):
    """The server releases the lock after the second attempt."""
    (tmp_path / ".lock").write_text(f"process 7 on {machine}")
    attempts = []

    def held_at_first(*_):
        attempts.append(1)
        if len(attempts) < 3:
            raise OSError(errno.EAGAIN, "locked")
    monkeypatch.setattr(fcntl, "lockf", held_at_first)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    if waits:
        Run(tmp_path, SETTINGS)
        assert f"in use by process 7 on {machine}; waiting" in capsys.readouterr().out
        owner = (tmp_path / ".lock").read_text()
        assert owner == f"process {os.getpid()} on {socket.gethostname()}"
    else:
        with pytest.raises(ValueError, match="in use by process 7 on .*--out"):
            Run(tmp_path, SETTINGS)


def test_a_file_system_without_fsync_is_used_with_a_note_and_other_errors_are_raised(
        tmp_path, monkeypatch, capsys):
    number = errno.EINVAL

    def fail(file):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(os, "fsync", fail)
    for text in ("old", "new"):                               # the second is renamed over the first
        atomic_write(tmp_path / "file", lambda path: path.write_text(text))
    assert (tmp_path / "file").read_text() == "new"
    assert capsys.readouterr().out.count("has no fsync") == 1
    number = errno.EIO
    with pytest.raises(ValueError, match="could not be written"):
        atomic_write(tmp_path / "file", lambda path: path.write_text("newer"))
    assert (tmp_path / "file").read_text() == "new"


def test_images_of_another_machine_that_are_seen_late_are_waited_for(tmp_path, monkeypatch):
    (tmp_path / "png").mkdir()
    pixels = torch.zeros(2, 8, 8, 3, dtype=torch.uint8).numpy()
    sample_folder.write_images(tmp_path, [0], pixels)
    monkeypatch.setattr(files, "SECONDS_TO_WAIT", 0)
    with pytest.raises(ValueError, match="lacks 1 of the 2 images .* all machines share"):
        sample_folder.write_summary(tmp_path, "a test", ["cat"], [0, 0])
    monkeypatch.setattr(files, "SECONDS_TO_WAIT", 100)
    # time.sleep is called when the first look has not found all images
    monkeypatch.setattr(time, "sleep",
                        lambda seconds: sample_folder.write_images(tmp_path, [1], pixels))
    sample_folder.write_summary(tmp_path, "a test", ["cat"], [0, 0])
    assert len(sample_folder.read_summary(tmp_path)["labels"]) == 2


# ---------------------------------------------------------------- meeting, and losing each other
def meet(store, world_size):
    """-> prefix and number of attempts of each rank. Threads represent the ranks."""
    found = {}

    def one(rank):
        own = dist.TCPStore("127.0.0.1", store.port, is_master=False)
        found[rank] = rendezvous.agree_on_prefix(own, rank, world_size)
    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world_size)]
    for thread in reversed(threads):                          # rank 0 comes last
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(world_size)]


@pytest.fixture
def store():
    """torchrun's store. It stays when the processes are started again."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True)


def test_all_ranks_agree_on_a_new_prefix_in_each_attempt_of_torchrun(store, monkeypatch):
    """Also if torchrun does not count the restart, as on a machine whose processes were healthy."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    first = meet(store, 3)
    second = meet(store, 3)
    assert first == [first[0]] * 3 and second == [second[0]] * 3
    assert first[0] != second[0]
    assert [attempts for _, attempts in first + second] == [1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("name", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_restart_by_torchrun_or_slurm_does_not_delete_the_run(tmp_path, monkeypatch, name):
    save(tmp_path / "run", 3)
    monkeypatch.setenv(name, "1")
    assert Run(tmp_path / "run", SETTINGS, fresh=True).step == 3
    monkeypatch.setenv(name, "0")
    assert Run(tmp_path / "run", SETTINGS, fresh=True).step == 0


def test_rank_0_names_a_rank_that_does_not_come(store, monkeypatch, capsys):
    monkeypatch.setattr(rendezvous, "SECONDS_TO_NOTE", 0)
    monkeypatch.setattr(rendezvous, "TIMEOUT", timedelta(seconds=0.2))
    with pytest.raises(ValueError, match=r"2 of 3 processes did not start .*\(rank 1, 2\)"):
        rendezvous.fresh_store(store, 0, 3)
    assert capsys.readouterr().out == "rank 0 waits for rank 1, 2\n"


@pytest.mark.parametrize("loss, message", [
    pytest.param("hang", "another process did not answer for 0:30:00, so it hangs",
                 marks=pytest.mark.skipif(OLD_TORCH, reason="PyTorch 2.5 keeps its time limit")),
    ("end", "another process has ended; its own error says why")])
def test_a_rank_that_loses_another_one_says_so_below_the_error(tmp_path, loss, message):
    """gloo's errors name neither the rank nor what to do."""
    printed, done = tmp_path / "printed", tmp_path / "done"

    def lose():
        dist.barrier()
        if dist.get_rank() == 1:
            while loss == "hang" and not done.exists():
                time.sleep(0.05)
            return
        gloo = dist.group.WORLD._get_backend(torch.device("cpu"))
        if loss == "hang":
            gloo._set_default_timeout(timedelta(seconds=0.5))
        sys.stderr = open(printed, "w")
        rendezvous.explain_lost_process()
        try:
            dist.all_reduce(torch.ones(1))
        except RuntimeError:
            sys.excepthook(*sys.exc_info())
        done.touch()

    on_two_ranks(lose, tmp_path)
    traceback, _, sentence = printed.read_text().strip().rpartition("\n")
    assert "RuntimeError" in traceback
    assert f"rank 0 on {socket.gethostname()}: {message}" in sentence
