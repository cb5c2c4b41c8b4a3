"""docs/slurm.sh, run without Slurm: the commands of fake_slurm.py are on its PATH. The two machines
of the job are two torchruns on this one, with one process each."""
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from test_many import SINKHORN, TINY, assert_same_result, log, train

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    "--signals-to-handle" not in Path(torch.__file__).with_name("distributed").joinpath(
        "run.py").read_text(), reason="this torchrun does not forward USR1")
FAULTS = str(ROOT / "tests" / "faults.py")


@pytest.fixture
def with_slurm(tmp_path):
    """Environment variables with which sbatch, srun and scontrol are those of fake_slurm.py"""
    programs = tmp_path / "programs"
    programs.mkdir()
    fake = ROOT / "tests" / "fake_slurm.py"
    commands = {name: f'exec {sys.executable} {fake} {name} "$@"'
                for name in ("sbatch", "srun", "scontrol")}
    commands["torchrun"] = f'exec {sys.executable} -m torch.distributed.run "$@"'
    for name, command in commands.items():
        (programs / name).write_text(f"#!/bin/sh\n{command}\n")
        (programs / name).chmod(0o755)
    return {"FAKE_SLURM": str(tmp_path), "PATH": f"{programs}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1"}


def documented_command():
    """-> words of the command that docs/scale.md shows, up to the flags of train.py"""
    text = (ROOT / "docs" / "scale.md").read_text().replace("\\\n", " ")
    command = re.search(r"^(sbatch .*) train\.py .*$", text, re.M)[1]
    return shlex.split(command)


def test_a_job_with_a_killed_process_and_a_time_limit_has_the_result_of_one_process(
        tmp_path, with_slurm):
    """Rank 0 is late in step 2. Rank 1 is killed in step 3, so torchrun starts both again from the
    checkpoint of step 2. In step 4 the time limit comes, so Slurm starts the job again. --fresh
    must not delete the run then."""
    flags = ["--precision", "fp64", "--save-every", "2", *SINKHORN]
    train(tmp_path / "uninterrupted", *flags)
    faults = [{"after": 0, "step": 2, "rank": 0, "do": "sleep"},
              {"after": 0, "step": 3, "rank": 1, "do": "kill"},
              {"after": 2, "step": 4, "rank": 1, "do": "wait",
               "file": str(tmp_path / "time-is-up")}]
    command = [*documented_command(), FAULTS, "--out", str(tmp_path / "run"), "--fresh", *TINY,
               *flags]
    command = [str(ROOT / word) if word == "docs/slurm.sh" else word for word in command]
    environment = os.environ | with_slurm | {"FAULTS": json.dumps(faults)}
    job = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True,
                         timeout=1800)
    first, second = [path.read_text() for path in sorted(tmp_path.glob("train.*.out"))]
    assert job.returncode == 0, job.stderr[-2000:] + second[-2000:]
    assert "holds a checkpoint of step 2" in first
    assert "stopped by a signal and saved" in first
    assert "holds a checkpoint of step 4" in second and "run: done" in second
    assert [line["step"] for line in log(tmp_path / "run")] == [1, 2, 3, 4, 5]
    assert_same_result(tmp_path / "run", tmp_path / "uninterrupted", 1e-9)
