"""tests/compare.py: every cut set agrees in both forms, an error appears in its row, and the
documents give the numbers that were counted on the full sets."""
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import compare
from vtp_min import losses

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("use_fast", [False, True], ids=["plain", "fast"])
def test_every_set_in_the_repository_agrees(use_fast, capsys):
    before = losses.dino_loss
    assert compare.main(use_fast=use_fast) == 0
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith("rows, 0 above their limit") and "ABOVE" not in printed
    assert losses.dino_loss is before


def not_a_cosine(step, start, end, steps):
    return compare.linear(step, start, end, steps)


def shifted_crop(image, size):
    return np.roll(image.resize((size, size)), 1)


@pytest.mark.parametrize("place, name, wrong, section, row", [
    (losses, "dino_loss", partial(losses.dino_loss, tau=0.1001), compare.self_distillation,
     "DINO: targets, loss, gradients, f64"),
    (compare, "cosine", not_a_cosine, compare.schedules,
     "weight decay, momentum, teacher's temperature"),
    (compare, "adm_crop", shifted_crop, compare.parts, "centre crop, 8-bit"),
    (losses, "koleo_loss", lambda x: x.sum() * torch.nan, compare.self_distillation,
     "KoLeo: loss, gradients, f64"),
], ids=["dino_loss", "cosine", "adm_crop", "koleo_loss"])
def test_an_error_appears_in_its_row_and_in_no_other(
        place, name, wrong, section, row, monkeypatch):
    monkeypatch.setattr(place, name, wrong)
    table = compare.rows(compare.CUT, [section])
    assert [what for what, *_ in compare.above(table)] == [row]


def test_the_fast_forms_are_those_that_are_compared(monkeypatch):
    """An error in a fast form appears with --fast and not without."""
    monkeypatch.setattr(compare.fast, "rotate", lambda x, sin, cos: 2 * x)
    found = []

    def rows(folder):
        table = real_rows(folder, [compare.parts])
        found.append([what for what, *_ in compare.above(table)])
        return table

    real_rows = compare.rows
    monkeypatch.setattr(compare, "rows", rows)
    assert compare.main() == 0 and compare.main(use_fast=True) == 1
    assert found == [[], ["RoPE in bfloat16"]]


def test_the_documented_table_has_the_counts_of_the_printed_output():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(page.read_text() for page in pages)
    table = re.search(r"^##? Equal to the reference\n.*?(\n##? |\Z)", text, re.S | re.M)[0]
    *lines, last = (ROOT / "study" / "golden.txt").read_text().splitlines()
    found = re.match(r"(\d+) tensors in (\d+) rows, 0 above their limit", last)
    tensors, rows = map(int, found.groups())
    assert len(lines) == rows + 1 and f"{tensors} tensors" in table
    cells = [line.split("|") for line in table.splitlines() if line.startswith("|")]
    assert sum(int(row[3]) for row in cells if row[3].strip().isdigit()) == tensors
