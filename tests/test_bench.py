"""tests/yardstick.py arranges plainly what ours arranges well: both are the same mathematics."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import bench                                                               # noqa: E402


def test_the_plain_joint_step_has_the_same_losses_and_leads_to_the_same_weights():
    ours, plain = (bench.Joint("nano", "fp32", how, side=32) for how in ("ours", "plain"))
    for batch in bench.batches_of(2, "nano", 16, side=32):
        a, b = ours.step(batch), plain.step(batch)
        assert a.keys() == b.keys() and all(abs(a[k] - b[k]) <= 1e-4 * abs(a[k]) for k in a), (a, b)
    for mine, theirs in ((ours.student, plain.student), (ours.teacher, plain.teacher)):
        apart, whole = (sum(x.double().square().sum() for x in xs) for xs in zip(*((a - b, a) for a, b in zip(mine.parameters(), theirs.parameters()))))
        assert apart < 1e-8 * whole


@pytest.mark.parametrize("side", [2, 4])
def test_the_plain_dit_step_has_the_same_loss(tmp_path, side):
    ours, plain = (bench.Diffusion("nano", side, 4, "fp32", how, tmp_path) for how in ("ours", "plain"))
    for r in range(3):
        a, b = ours.step(r), plain.step(r)
        assert abs(a - b) < 1e-5 * abs(a)


def test_the_plain_inception_has_the_same_features():
    row = next(iter(bench.fid(1, n=2)))
    assert row["features_apart"] < 2e-5
