"""What tests/compare.py counts: every cut set is met, a mistake shows, and the README tells what was counted on the full sets."""
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import compare

ROOT = Path(__file__).parents[1]


def test_every_set_in_the_repository_is_met(capsys):
    assert compare.main() == 0
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith("rows, 0 above their limit") and "ABOVE" not in printed


@pytest.mark.parametrize("name, wrong, section, row", [
    ("dino_loss", partial(compare.dino_loss, tau=0.1001), compare.self_distillation, "DINO: targets, loss, gradients, f64"),
    ("cosine", lambda step, a, b, steps: compare.ramp(step, a, b, steps), compare.schedules, "weight decay, momentum, teacher's temperature"),
    ("adm_crop", lambda image, size: np.roll(image.resize((size, size)), 1), compare.parts, "centre crop, 8-bit"),
    ("koleo_loss", lambda x: x.sum() * torch.nan, compare.self_distillation, "KoLeo: loss, gradients, f64")])
def test_a_mistake_shows_in_its_row_and_in_no_other(name, wrong, section, row, monkeypatch):
    monkeypatch.setattr(compare, name, wrong)
    assert [what for what, *_ in compare.above(compare.rows(compare.CUT, [section]))] == [row]


def test_the_readme_counts_what_the_printed_output_counts():
    table = re.search(r"## Equal to the reference\n.*?\n## ", (ROOT / "README.md").read_text(), re.S)[0]
    *lines, last = (ROOT / "study" / "golden.txt").read_text().splitlines()
    tensors, rows = map(int, re.match(r"(\d+) tensors in (\d+) rows, 0 above their limit", last).groups())
    assert len(lines) == rows + 1 and f"{tensors} tensors" in table
    assert sum(int(cells.split("|")[3]) for cells in table.splitlines() if re.match(r"\|.*\|.*\| *\d+ *\|", cells)) == tensors
