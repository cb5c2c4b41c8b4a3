"""study/yardstick.py is an independent implementation: our plain and fast forms agree with it."""
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "study"))
import bench                                                               # noqa: E402


def relative_distance(a, b):
    """Relative distance of two modules: of all their parameters as one vector"""
    pairs = list(zip(a.parameters(), b.parameters(), strict=True))
    apart = sum((x - y).double().square().sum() for x, y in pairs)
    return (apart / sum(x.double().square().sum() for x, _ in pairs)).sqrt()


@pytest.mark.parametrize("form", ["plain", "fast"])
def test_the_training_step_has_the_same_losses_and_weights_as_the_yardstick(form):
    ours = bench.Joint("nano", "fp32", form, side=32)
    yardstick = bench.Joint("nano", "fp32", "yardstick", side=32)
    for batch in bench.first_batches(2, "nano", 16, side=32):
        a, b = ours.step(batch), yardstick.step(batch)
        assert a == pytest.approx(b, rel=1e-4)
    assert relative_distance(ours.student, yardstick.student) < 1e-4
    assert relative_distance(ours.teacher, yardstick.teacher) < 1e-4


@pytest.mark.parametrize("form", ["plain", "fast"])
@pytest.mark.parametrize("side", [2, 4])
def test_the_dit_step_has_the_same_loss_as_the_yardstick(tmp_path, side, form):
    ours, yardstick = (bench.Diffusion("nano", side, 4, "fp32", f, tmp_path)
                       for f in (form, "yardstick"))
    for number in range(3):
        assert ours.step(number) == pytest.approx(yardstick.step(number), rel=1e-5)


def test_inception_has_the_same_features_as_the_yardstick():
    row, = bench.fid(1, n=2)
    assert row["features_apart"] < 2e-5


def test_a_form_is_active_only_inside_its_context_manager():
    before = bench.losses.cross_entropy
    with bench.use_form("fast"):
        assert bench.losses.cross_entropy is not before
    assert bench.losses.cross_entropy is before
    with bench.use_form("plain"):
        assert bench.losses.cross_entropy is before
