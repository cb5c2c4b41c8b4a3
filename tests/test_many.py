"""One process or many, whole or in pieces, killed or left alone: the same training.   Tiny pictures, all three objectives."""
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vtp_min.run import EXIT_RESUME, TIMING

ROOT = Path(__file__).parents[1]
TINY = ("--image 16 --patch 8 --batch 8 --batch-ssl 4 --batch-rec 4 --set locals=1 --set prototypes=32 "
        "--set head_hidden=32 --perceptual none --log-every 1 --device cpu --workers 0 --steps 5 "
        "--set clip_grad=1 --set drop_ssl=0.3").split()
SINKHORN = ["--set", "w_koleo=0.1"]
CENTRED = ("--set teacher=centering --set clip_loss=siglip --set drop_rec=0.2 "
           "--set heads_after_bottleneck=true --set layer_decay=0.9").split()


def start(out, *flags, processes=1, torchrun=(), **env):
    """train.py in processes of its own -> Popen"""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(port), *torchrun] if processes > 1 or torchrun else []
    return subprocess.Popen([sys.executable, *launch, str(ROOT / "train.py"), "--out", str(out), *TINY, *map(str, flags)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"} | env)


def train(out, *flags, expect=0, **how):
    run = start(out, *flags, **how)
    said, problems = run.communicate(timeout=300)
    assert run.returncode == expect, problems[-3000:]
    return said + problems


def log(out):
    return [{k: v for k, v in json.loads(line).items() if k not in TIMING} for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def apart(a, b, part):
    """Norm of the difference of all weights over the norm of all weights"""
    a, b = (torch.load(Path(folder) / "last.pt")[part] for folder in (a, b))
    difference = sum((a[k].double() - b[k].double()).square().sum() for k in a)
    return (difference / sum(x.double().square().sum() for x in a.values())).sqrt().item()


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The runs of one process that the others are held against: {(precision, recipe): folder}"""
    made, folder = {}, tmp_path_factory.mktemp("one")

    def run(precision, recipe):
        key = precision, *recipe
        if key not in made:
            made[key] = folder / str(len(made))
            train(made[key], "--precision", precision, *recipe)
            last = made[key] / "last.pt"
            torch.save({part: weights for part, weights in torch.load(last).items() if part in ("student", "teacher")}, last)      # without Adam's moments: a third
        return made[key]
    return run


def same(out, reference, limit):
    for part in ("student", "teacher"):
        assert apart(reference, out, part) < limit, part
    for mine, theirs in zip(log(out), log(reference), strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            assert mine[name] == value or abs(mine[name] - value) <= max(1e-5, 10 * limit) * abs(value), (theirs["step"], name)


def kill(run, out, moment, seconds):
    """SIGKILL some seconds after the start, or as soon as the half-written file `moment` stands there -> was it still running?"""
    for scrap in out.glob("*.part"):                                  # of the kill before: only what this run writes counts
        scrap.unlink()
    until = time.time() + seconds
    while run.poll() is None and (not (out / moment).exists() if moment else time.time() < until):
        time.sleep(0.001)
    alive = run.poll() is None
    run.kill()
    run.communicate()
    return alive


# ---------------------------------------------------------------- one process or many
@pytest.mark.parametrize("recipe", [SINKHORN, CENTRED], ids=["sinkhorn clip", "centring siglip"])
@pytest.mark.parametrize("precision, processes, limit", [("fp64", 2, 1e-9), ("fp64", 4, 1e-9), ("fp32", 2, 1e-4)])
def test_many_processes_train_as_one(one, tmp_path, precision, processes, limit, recipe):
    """Five steps of all objectives: losses, weights and the teacher's weights. Hidden patches differ in number between ranks."""
    train(tmp_path / "many", "--precision", precision, *recipe, processes=processes)
    same(tmp_path / "many", one(precision, recipe), limit)


def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_that_does(tmp_path):
    said = train(tmp_path / "run", "--batch", 9, "--batch-rec", 2, expect=1, processes=2)
    assert "--batch 9 is no multiple of 4" in said and "try --batch 8" in said and not (tmp_path / "run" / "log.jsonl").exists()


# ---------------------------------------------------------------- whole or in pieces
@pytest.mark.parametrize("recipe", [SINKHORN, CENTRED], ids=["sinkhorn clip", "centring siglip"])
@pytest.mark.parametrize("micro, processes", [(2, 1), (4, 1), (2, 2)])
def test_pieces_of_a_batch_give_the_gradient_of_the_whole(one, tmp_path, micro, processes, recipe):
    train(tmp_path / "run", "--precision", "fp64", "--micro", micro, *recipe, processes=processes)
    same(tmp_path / "run", one("fp64", recipe), 1e-9)


def test_pieces_see_the_same_targets_in_bfloat16(one, tmp_path):
    """The teacher's balance is computed in float32 whatever autocast does: before any weight has moved, nothing but matrix products of other shapes differs."""
    train(tmp_path / "run", "--precision", "bf16", "--micro", 2, *SINKHORN)
    mine, theirs = log(tmp_path / "run")[0], log(one("bf16", SINKHORN))[0]
    for name in ("teacher_entropy", "dino", "ibot", "clip", "koleo", "rec"):
        assert abs(mine[name] - theirs[name]) <= 1e-3 * abs(theirs[name]), (name, mine[name], theirs[name])


def test_pieces_must_be_equal(tmp_path):
    assert "--micro 3 does not split the batch of a process (8 / 4 / 4) into equal parts; try --micro 4" in train(tmp_path / "run", "--micro", 3, expect=1)


@pytest.mark.parametrize("flags", [["--w-clip", "0"], ["--w-ssl", "0"], ["--w-rec", "0"], ["--w-clip", "0", "--w-ssl", "0"]], ids=" ".join)
def test_pieces_serve_every_set_of_objectives(one, tmp_path, flags):
    train(tmp_path / "run", "--precision", "fp64", "--micro", 2, "--steps", 2, *flags)
    assert apart(one("fp64", ["--steps", "2", *flags]), tmp_path / "run", "student") < 1e-9


def test_blocks_that_compute_themselves_again_change_no_bit(one, tmp_path):
    train(tmp_path / "run", "--precision", "fp32", "--recompute", *SINKHORN)
    assert apart(one("fp32", SINKHORN), tmp_path / "run", "student") == 0 and log(tmp_path / "run") == log(one("fp32", SINKHORN))


# ---------------------------------------------------------------- killed or left alone
def test_a_run_killed_again_and_again_ends_as_an_undisturbed_one(tmp_path):
    """Twice in the middle of a save; `python study/kill.py` does it twenty times, at all sorts of moments."""
    flags = ["--precision", "fp32", "--steps", 40, "--save-every", 1]
    train(tmp_path / "left alone", *flags)
    for moment in ("model.safetensors.part", "last.pt.part"):
        assert kill(start(tmp_path / "killed", *flags), tmp_path / "killed", moment, 0)
    train(tmp_path / "killed", *flags)
    assert log(tmp_path / "killed") == log(tmp_path / "left alone")
    assert (tmp_path / "killed" / "model.safetensors").read_bytes() == (tmp_path / "left alone" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda s: s.name)
def test_a_signal_finishes_the_step_saves_and_exits_with_the_stated_status(tmp_path, how):
    run = start(tmp_path, "--steps", 5000, "--w-clip", 0, "--w-ssl", 0)
    while run.poll() is None and not (tmp_path / "log.jsonl").exists():
        time.sleep(0.1)
    run.send_signal(how)
    said, _ = run.communicate(timeout=60)
    assert run.returncode == EXIT_RESUME == 75 and "saved; the same command continues" in said
    assert said.count("stopping after this step; press Ctrl-C again to end at once") == (how == signal.SIGINT)
    assert torch.load(tmp_path / "last.pt")["step"] == log(tmp_path)[-1]["step"]


def test_torchrun_starts_a_broken_run_again_and_it_goes_on(tmp_path):
    """One of two workers is killed; torchrun starts both anew, and they go on from the last checkpoint."""
    run = start(tmp_path / "run", "--precision", "fp32", "--steps", 12, "--save-every", 1, *SINKHORN, processes=2, torchrun=["--max-restarts", "2"])
    while run.poll() is None and not (tmp_path / "run" / "previous.pt").exists():
        time.sleep(0.05)
    worker = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout.split()[-1]
    os.kill(int(worker), signal.SIGKILL)
    said, problems = run.communicate(timeout=300)
    assert run.returncode == 0, problems[-3000:]
    assert "holds a checkpoint of step" in said and [line["step"] for line in log(tmp_path / "run")] == list(range(1, 13))


def test_workers_of_torchrun_save_after_any_number_of_signals(tmp_path):
    """Ctrl-C may reach a worker twice, from the terminal and from torchrun, and SIGTERM may follow."""
    run = start(tmp_path, "--steps", 5000, "--w-clip", 0, "--w-ssl", 0, processes=2)
    while run.poll() is None and not (tmp_path / "log.jsonl").exists():
        time.sleep(0.1)
    workers = [int(pid) for pid in subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout.split()]
    for how in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
        for pid in workers:
            os.kill(pid, how)
    said, problems = run.communicate(timeout=120)
    assert said.count("stopping after this step") == 1 and "KeyboardInterrupt" not in problems
    assert "saved; the same command continues" in said and torch.load(tmp_path / "last.pt")["step"] == log(tmp_path)[-1]["step"]


def test_two_nodes_train_as_one_process(one, tmp_path):
    """Two agents that meet at a rendezvous on this machine stand for two machines."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    meet = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test", "--local-addr", "127.0.0.1"]
    nodes = [start(tmp_path / "run", "--precision", "fp64", *SINKHORN, torchrun=meet) for _ in range(2)]
    for node in nodes:
        _, problems = node.communicate(timeout=300)
        assert node.returncode == 0, problems[-3000:]
    same(tmp_path / "run", one("fp64", SINKHORN), 1e-9)
