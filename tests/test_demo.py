"""`make demo` on any machine: the hardware determines the precision, finished stages are skipped,
and expected durations are printed."""
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import dit
from vtp_min import device, run
from vtp_min.device import choose_precision, multiplies_bf16, warn_if_emulated
from vtp_min.run import ProgressBar

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
STAGES = ["tokenizer", "zeroshot", "probe", "recon", "latents", "dit", "samples", "fid", "report"]


def set_cpu(monkeypatch, hardware=(), capability="AVX512", onednn=None):
    """Simulate a CPU with these instructions, for which PyTorch reports this capability, and an
    environment in which ONEDNN_MAX_CPU_ISA has this value."""
    monkeypatch.setattr(device, "cpu_flags", lambda: list(hardware))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    if onednn is None:
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    else:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", onednn)


# ---------------------------------------------------------------- precision

@pytest.mark.parametrize("hardware", [("avx512_bf16",), ("amx_bf16",), ("avx512_bf16", "amx_bf16")])
def test_a_cpu_with_bf16_instructions_trains_in_bf16(monkeypatch, hardware):
    set_cpu(monkeypatch, hardware)
    assert choose_precision(CPU) == "bf16"


def test_a_cpu_without_bf16_instructions_trains_in_fp32(monkeypatch):
    set_cpu(monkeypatch, ("avx2", "avx512_f"))
    assert choose_precision(CPU) == "fp32"


@pytest.mark.parametrize("capability, onednn", [
    ("AVX2", None), ("DEFAULT", None), ("AVX512", "AVX2"), ("AVX512", "avx512_core"),
    ("AVX512", "AVX512_CORE_VNNI"), ("AVX2", "AVX2")])
def test_a_variable_that_disables_bf16_instructions_gives_fp32(monkeypatch, capability, onednn):
    set_cpu(monkeypatch, ("avx512_bf16",), capability, onednn)
    assert not multiplies_bf16(CPU) and choose_precision(CPU) == "fp32"


@pytest.mark.parametrize("onednn", ["ALL", "DEFAULT", "AVX512_CORE_BF16", "avx512_core_amx"])
def test_a_variable_that_allows_bf16_instructions_changes_nothing(monkeypatch, onednn):
    set_cpu(monkeypatch, ("avx512_bf16",), "AVX512", onednn)
    assert choose_precision(CPU) == "bf16"


def test_pytorch_reports_the_capability_that_the_variable_requests():
    """multiplies_bf16 relies on it: get_cpu_capability() follows ATEN_CPU_CAPABILITY."""
    code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                           env=os.environ | {"ATEN_CPU_CAPABILITY": "default"})
    assert found.stdout.strip() in ("DEFAULT", "NO AVX")          # NO AVX: older versions


def test_an_emulated_precision_given_explicitly_prints_its_cost(monkeypatch, capsys):
    set_cpu(monkeypatch, ("avx2",), "AVX2")
    peaks = {"fp32": 120e9, "bf16": 6e9}
    monkeypatch.setattr(device, "peak_flops", lambda device, precision: peaks[precision])
    warn_if_emulated(CPU, "bf16")
    printed = capsys.readouterr().out
    for part in ("only emulated", "20.0 times as long as in fp32", "The default here is fp32"):
        assert part in printed


def test_a_precision_that_the_hardware_supports_prints_nothing(monkeypatch, capsys):
    set_cpu(monkeypatch, ("avx512_bf16",))
    for precision in ("fp32", "bf16", "fp64"):
        warn_if_emulated(CPU, precision)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("command", ["latents RUN", "train LATENTS --out OUT", "sample RUN"])
def test_the_diffusion_commands_choose_the_precision_by_hardware(monkeypatch, command):
    args = dit.parse(command.split())
    set_cpu(monkeypatch, ("avx512_bf16",))
    assert dit.precision_of(args, CPU) == "bf16"
    set_cpu(monkeypatch, ("avx512_bf16",), "AVX2")
    assert dit.precision_of(args, CPU) == "fp32"
    assert dit.precision_of(Namespace(precision="fp32"), CPU) == "fp32"


def test_neither_makefile_nor_scripts_set_a_precision():
    files = [ROOT / "Makefile", *(ROOT / "study").glob("*.sh"), *(ROOT / "study").glob("*.py")]
    assert len(files) > 5
    pattern = r"--precision (bf16|fp16|fp32|fp64)"
    assert [path.name for path in files if re.search(pattern, path.read_text())] == []


# ---------------------------------------------------------------- durations

def test_a_progress_bar_announces_the_duration_after_one_measured_second(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(run.time, "perf_counter", lambda: now[0])
    for _ in ProgressBar(range(100), desc="latents", unit="batch"):
        now[0] += 10 if now[0] == 0 else 0.4       # the first step is slow and is not counted
    printed = capsys.readouterr().out
    assert printed.count("latents: about") == 1
    assert "about 00:38 left" in printed           # 96 of 100 remain at 0.4 s
    assert "measured over 3 of 100" in printed


def test_short_work_is_not_announced(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(run.time, "perf_counter", lambda: now[0])
    for _ in ProgressBar(range(8), desc="latents"):
        now[0] += 0.4
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------- stages

def commands_left(folder):
    """-> names of the stages that `make demo` would run, according to make -n"""
    command = ["make", "-n", "demo", f"RUN={folder}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return re.findall(rf"touch {folder}/done-(\w+)", done.stdout)


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_the_demo_skips_finished_stages(tmp_path):
    assert commands_left(tmp_path) == STAGES
    for k, stage in enumerate(STAGES):
        (tmp_path / f"done-{stage}").touch()
        assert commands_left(tmp_path) == STAGES[k + 1:]


def load_expected():
    """Import study/expected.py -> module"""
    spec = importlib.util.spec_from_file_location("expected", ROOT / "study/expected.py")
    expected = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(expected)
    return expected


def test_every_stage_has_an_expected_duration(capsys, monkeypatch):
    known = json.loads((ROOT / "study/demo/times.json").read_text())
    assert list(known["stages"]) == STAGES
    expected = load_expected()
    monkeypatch.setattr(expected, "step_seconds", lambda precision: 2 * known["step_seconds"])
    monkeypatch.setattr(sys, "argv", ["expected.py"])
    expected.main()
    printed = capsys.readouterr().out
    twice = expected.minutes(2 * known["stages"]["tokenizer"])
    assert f"tokenizer: expected to take about {twice} on this machine" in printed
    assert "takes 2.00 times as long" in printed


def test_durations_are_printed_in_minutes_and_seconds():
    expected = load_expected()
    assert [expected.minutes(x) for x in (8.4, 60, 93)] == ["8 s", "1 min 0 s", "1 min 33 s"]
