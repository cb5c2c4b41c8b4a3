"""Runs of train.py that must have the same result: on one process or on many, with whole batches or
with micro-batches, uninterrupted or killed and continued. Tiny images, all three objectives."""
import contextlib
import io
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

import train as train_py
from vtp_min.run import EXIT_RESUME, TIMING

ROOT = Path(__file__).parents[1]
TINY = ("--image 16 --patch 8 --batch 8 --batch-ssl 4 --batch-rec 4 --set locals=1 "
        "--set prototypes=32 --set head_hidden=32 --perceptual none --log-every 1 --device cpu "
        "--workers 0 --steps 5 --set clip_grad=1 --set drop_ssl=0.3").split()
# Two recipes, which together use both kinds of targets and both contrastive losses. The second has
# a separate stochastic depth for reconstruction, too, which needs a second forward pass.
SINKHORN = ["--set", "w_koleo=0.1"]
CENTRED = ("--set teacher=centering --set clip_loss=siglip --set drop_rec=0.2 "
           "--set heads_after_bottleneck=true --set layer_decay=0.9").split()
BOTH_RECIPES = pytest.mark.parametrize("recipe", [SINKHORN, CENTRED],
                                       ids=["sinkhorn clip", "centring siglip"])


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(out, *flags, processes=1, torchrun=(), **env):
    """Start train.py in new processes -> Popen

    out        run folder                         flags  flags of train.py, added to TINY
    processes  above 1: torchrun starts them      torchrun  further flags of torchrun
    env        environment variables
    """
    launcher = []
    if processes > 1 or torchrun:
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes),
                    "--master-port", str(free_port()), *torchrun]
    command = [sys.executable, *launcher, str(ROOT / "train.py"), "--out", str(out), *TINY,
               *map(str, flags)]
    # one thread per process: the order of sums, and so the last bits, depend on their number
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | {"OMP_NUM_THREADS": "1"} | env)


def train(out, *flags, expect=0, processes=1, **options):
    """Run train.py to its end -> everything that it printed

    expect  exit status that it must have      processes, options  see start

    One process without options is this one, because a new one loads PyTorch for several seconds.
    """
    if processes == 1 and not options and not expect:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            assert train_py.command(["--out", str(out), *TINY, *map(str, flags)]) == 0
        return printed.getvalue()
    run = start(out, *flags, processes=processes, **options)
    output, errors = run.communicate(timeout=300)
    assert run.returncode == expect, errors[-3000:]
    return output + errors


def wait_for(run, path, interval=0.1):
    """Return as soon as a file exists, or the run has ended"""
    while run.poll() is None and not path.exists():
        time.sleep(interval)


def kill(run, out, moment, seconds):
    """Kill a run with SIGKILL -> was it still running at that time?

    moment   name of a temporary file: the run is killed as soon as it has begun to write this file
    seconds  if moment is None, the run is killed after this time
    """
    for leftover in out.glob("*.part"):            # of an earlier kill
        leftover.unlink()
    deadline = time.time() + seconds
    while run.poll() is None:
        due = (out / moment).exists() if moment else time.time() >= deadline
        if due:
            break
        time.sleep(0.001)
    alive = run.poll() is None
    run.kill()
    run.communicate()
    return alive


def child_processes(run):
    """-> list of process ids; those of torchrun are its workers"""
    pgrep = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True)
    return [int(pid) for pid in pgrep.stdout.split()]


# ---------------------------------------------------------------- comparing two runs
def log(out):
    """Lines of log.jsonl as dicts, without the values that depend on the speed of the machine"""
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMING} for line in lines]


def apart(a, b, part):
    """Relative distance of the weights of two runs: the norm of their difference over the norm of
    those of a.   part: 'student' or 'teacher'"""
    a = torch.load(Path(a) / "last.pt")[part]
    b = torch.load(Path(b) / "last.pt")[part]
    difference = sum((a[k].double() - b[k].double()).square().sum() for k in a)
    return (difference / sum(x.double().square().sum() for x in a.values())).sqrt().item()


def assert_same_result(out, reference, limit):
    """Weights of student and teacher agree within `limit`; so do all values of the log, within
    10 * limit, or 1e-5 because log.jsonl has six digits."""
    for part in ("student", "teacher"):
        assert apart(reference, out, part) < limit, part
    tolerance = max(1e-5, 10 * limit)
    for line, wanted in zip(log(out), log(reference), strict=True):
        assert line.keys() == wanted.keys()
        for name, value in wanted.items():
            if line[name] != value:
                assert abs(line[name] - value) <= tolerance * abs(value), (wanted["step"], name)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """A function (precision, recipe) -> folder of a run on one process with whole batches. Each run
    is computed once, for all tests."""
    folder = tmp_path_factory.mktemp("one")
    runs = {}

    def run(precision, recipe):
        key = precision, *recipe
        if key not in runs:
            runs[key] = folder / str(len(runs))
            train(runs[key], "--precision", precision, *recipe)
            # without the moments of AdamW, a third of the size
            last = runs[key] / "last.pt"
            checkpoint = torch.load(last)
            torch.save({part: checkpoint[part] for part in ("student", "teacher")
                        if part in checkpoint}, last)
        return runs[key]
    return run


# ---------------------------------------------------------------- one process or many
@pytest.mark.parametrize("precision, processes, limit, recipe", [
    ("fp64", 4, 1e-9, SINKHORN), ("fp64", 2, 1e-9, CENTRED), ("fp32", 2, 1e-4, SINKHORN)],
    ids=["fp64-4-sinkhorn clip", "fp64-2-centring siglip", "fp32-2-sinkhorn clip"])
def test_many_processes_have_the_result_of_one_process(
        one_process, tmp_path, precision, processes, limit, recipe):
    """Five steps of all objectives: losses, weights, and the weights of the teacher. The ranks have
    different numbers of masked patches."""
    train(tmp_path / "many", "--precision", precision, *recipe, processes=processes)
    assert_same_result(tmp_path / "many", one_process(precision, recipe), limit)


def test_a_batch_that_processes_cannot_share_equally_is_an_error_that_suggests_the_nearest(
        tmp_path):
    printed = train(tmp_path / "run", "--batch", 9, "--batch-rec", 2, expect=1, processes=2)
    assert "--batch 9 is not a multiple of 4" in printed
    assert "try --batch 8" in printed
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_two_nodes_have_the_result_of_one_process(one_process, tmp_path):
    """Two torchrun agents that meet at a rendezvous on this machine represent two machines."""
    rendezvous = ["--nnodes", "2", "--rdzv-backend", "c10d",
                  "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "test",
                  "--local-addr", "127.0.0.1"]
    nodes = []
    for _ in range(2):
        node = start(tmp_path / "run", "--precision", "fp64", *SINKHORN, torchrun=rendezvous)
        nodes.append(node)
    for node in nodes:
        _, errors = node.communicate(timeout=300)
        assert node.returncode == 0, errors[-3000:]
    assert_same_result(tmp_path / "run", one_process("fp64", SINKHORN), 1e-9)


# ---------------------------------------------------------------- whole batches or micro-batches
@BOTH_RECIPES
@pytest.mark.parametrize("micro, processes", [(2, 1), (2, 2)])
def test_micro_batches_have_the_result_of_whole_batches(
        one_process, tmp_path, micro, processes, recipe):
    flags = ["--precision", "fp64", "--micro", micro, *recipe]
    train(tmp_path / "run", *flags, processes=processes)
    assert_same_result(tmp_path / "run", one_process("fp64", recipe), 1e-9)


def test_micro_batches_in_bfloat16_have_the_targets_and_losses_of_whole_batches(
        one_process, tmp_path):
    """Targets and losses are computed in float32 under autocast. In the first step the weights are
    equal, so the only difference is that matrix products of other shapes round differently."""
    recipe = [*SINKHORN, "--steps", "1"]
    train(tmp_path / "run", "--precision", "bf16", "--micro", 2, *recipe)
    line, wanted = log(tmp_path / "run")[0], log(one_process("bf16", recipe))[0]
    for name in ("teacher_entropy", "dino", "ibot", "clip", "koleo", "rec"):
        difference = abs(line[name] - wanted[name])
        assert difference <= 1e-3 * abs(wanted[name]), (name, line[name], wanted[name])


def test_a_micro_batch_size_that_gives_unequal_parts_is_an_error(tmp_path):
    printed = train(tmp_path / "run", "--micro", 3, expect=1)
    assert ("--micro 3 does not split the batch of a process (8 / 4 / 4) into equal parts; "
            "try --micro 4") in printed


@pytest.mark.parametrize("flags", [
    ["--w-clip", "0"], ["--w-ssl", "0"], ["--w-rec", "0"], ["--w-clip", "0", "--w-ssl", "0"],
], ids=" ".join)
def test_micro_batches_have_the_result_of_whole_batches_if_objectives_are_off(
        one_process, tmp_path, flags):
    train(tmp_path / "run", "--precision", "fp64", "--micro", 2, "--steps", 2, *flags)
    whole = one_process("fp64", ["--steps", "2", *flags])
    assert apart(whole, tmp_path / "run", "student") < 1e-9


def test_activation_checkpointing_changes_no_bit(one_process, tmp_path):
    train(tmp_path / "run", "--precision", "fp32", "--recompute", *SINKHORN)
    whole = one_process("fp32", SINKHORN)
    assert apart(whole, tmp_path / "run", "student") == 0
    assert log(tmp_path / "run") == log(whole)


# ---------------------------------------------------------------- uninterrupted or killed
def test_a_run_that_is_killed_while_it_saves_and_continued_ends_as_an_uninterrupted_run(tmp_path):
    """It is killed twice. study/kill.py kills a run twenty times, at other moments, too."""
    flags = ["--precision", "fp32", "--steps", 8, "--save-every", 1]
    uninterrupted = tmp_path / "uninterrupted"
    killed = tmp_path / "killed"
    train(uninterrupted, *flags)
    for moment in ("model.safetensors.part", "last.pt.part"):
        assert kill(start(killed, *flags), killed, moment, 0)
    train(killed, *flags)
    assert log(killed) == log(uninterrupted)
    weights = (killed / "model.safetensors").read_bytes()
    assert weights == (uninterrupted / "model.safetensors").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT],
                         ids=lambda number: number.name)
def test_after_a_signal_a_run_finishes_its_step_saves_and_exits_with_status_75(tmp_path, number):
    run = start(tmp_path, "--steps", 5000, "--w-clip", 0, "--w-ssl", 0)
    wait_for(run, tmp_path / "log.jsonl")
    run.send_signal(number)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == EXIT_RESUME == 75
    assert "saved; the same command continues" in output
    hint = "stopping after this step; press Ctrl-C again to stop immediately"
    assert output.count(hint) == (number == signal.SIGINT)
    assert torch.load(tmp_path / "last.pt")["step"] == log(tmp_path)[-1]["step"]


def test_a_run_continues_when_torchrun_restarts_it_after_a_worker_was_killed(tmp_path):
    """torchrun restarts both workers, and they continue from the last checkpoint."""
    flags = ["--precision", "fp32", "--steps", 6, "--save-every", 1, *SINKHORN]
    run = start(tmp_path / "run", *flags, processes=2, torchrun=["--max-restarts", "2"])
    wait_for(run, tmp_path / "run" / "previous.pt", interval=0.05)
    os.kill(child_processes(run)[-1], signal.SIGKILL)
    output, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors[-3000:]
    assert "holds a checkpoint of step" in output
    assert [line["step"] for line in log(tmp_path / "run")] == list(range(1, 7))


def test_workers_of_torchrun_save_after_any_number_of_signals(tmp_path):
    """A worker may receive one Ctrl-C twice, from the terminal and from torchrun, and then SIGTERM
    from torchrun."""
    run = start(tmp_path, "--steps", 5000, "--w-clip", 0, "--w-ssl", 0, processes=2)
    wait_for(run, tmp_path / "log.jsonl")
    workers = child_processes(run)
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
        for pid in workers:
            os.kill(pid, number)
    output, errors = run.communicate(timeout=120)
    assert output.count("stopping after this step") == 1
    assert "KeyboardInterrupt" not in errors
    assert "saved; the same command continues" in output
    assert torch.load(tmp_path / "last.pt")["step"] == log(tmp_path)[-1]["step"]
