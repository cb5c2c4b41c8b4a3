"""eval.py as its user meets it: a tiny run, then every number, each with its protocol; and sentences for what cannot be measured."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


def python(*args):
    return subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, capture_output=True, text=True)


def ok(*args):
    done = python(*args)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A nano run of three steps on 16-pixel shapes: every part is there, nothing is learned."""
    folder = tmp_path_factory.mktemp("run")
    ok("train.py", "--out", folder, "--image", 16, "--patch", 8, "--batch", 8, "--batch-ssl", 4, "--batch-rec", 4, "--locals", 1, "--prototypes", 32,
       "--head-hidden", 32, "--perceptual", "none", "--steps", 3)
    return folder


def metrics(run):
    return {m["name"]: m for m in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}


def test_each_number_is_printed_with_its_protocol_and_kept(run):
    said = ok("eval.py", "zeroshot", run, "--limit", 40) + ok("eval.py", "probe", run, "--limit", 40, "--train-limit", 60)
    said += ok("eval.py", "recon", run, "--limit", 20, "--perceptual", "none")
    found = metrics(run)
    assert {"zero-shot top1", "linear probe latent", "linear probe full", "kNN latent", "kNN full", "PSNR", "SSIM"} <= found.keys()
    for m in found.values():
        assert m["name"] in said and m["protocol"] in said
    assert all(0 <= found[k]["value"] <= 1 for k in found if k not in ("PSNR", "SSIM"))
    assert "40 pictures" in found["zero-shot top1"]["protocol"] and "chance 0.100" in found["zero-shot top1"]["protocol"]


def test_the_batch_size_changes_no_number(run):
    for batch in (7, 20):
        ok("eval.py", "recon", run, "--limit", 20, "--perceptual", "none", "--batch", batch)
    values = [m["value"] for m in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if m["name"] == "PSNR"]
    assert values[-1] == pytest.approx(values[-2], rel=1e-5)


def test_samples_are_judged_by_a_classifier_whose_distance_is_not_called_fid(run, tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "samples.npz", arr_0=rng.integers(0, 256, (60, 16, 16, 3), dtype=np.uint8), labels=np.arange(60) % 10)
    command = ["eval.py", "fid", tmp_path, "--run", run, "--features", "classifier", "--limit", 60, "--train-limit", 200, "--judge-steps", 20]
    refused = python(*command)
    assert refused.returncode and "below 2048" in refused.stderr and "Traceback" not in refused.stderr
    ok(*command, "--few")
    found = metrics(run)
    assert {"FD-classifier", "FD-classifier of real", "samples recognised", "classifier accuracy"} <= found.keys() and "FID" not in found
    assert "ONLY 60 SAMPLES" in found["FD-classifier"]["protocol"]
    assert found["FD-classifier"]["value"] > found["FD-classifier of real"]["value"]                  # noise is further from pictures than pictures
    again = ok(*command, "--few")
    assert "judge:" not in again and metrics(run)["FD-classifier"]["value"] == pytest.approx(found["FD-classifier"]["value"], rel=1e-4)   # kept, not retrained


@pytest.mark.parametrize("command, told", [
    (["zeroshot", "nowhere"], "holds no config.json"),
    (["recon", "RUN", "--limit", "4"], "eval.py fetch"),
    (["fid", "RUN/nothing", "--run", "RUN"], "no samples.npz and no pictures"),
    (["probe", "RUN", "--data", "nowhere"], "no folder nowhere")])
def test_what_cannot_be_measured_is_said_in_a_sentence(run, command, told, monkeypatch, tmp_path):
    monkeypatch.setenv("VTP_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    done = python("eval.py", *(c.replace("RUN", str(run)) for c in command))
    assert done.returncode and told in done.stderr and "Traceback" not in done.stderr
