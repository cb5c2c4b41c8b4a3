"""tests/compare.py: our outputs are within the limits of all stored outputs in both forms, an error
in our code appears in the right row, and the documentation gives the counts of the full sets."""
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
def test_all_outputs_are_within_the_limits_of_the_stored_outputs_in_the_repository(
        use_fast, capsys):
    before = losses.cross_entropy
    assert compare.main(use_fast=use_fast) == 0
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith("rows, 0 above their limit")
    assert "ABOVE" not in printed
    assert losses.cross_entropy is before            # the textbook forms are restored


def linear_schedule(step, start, end, steps):
    """A straight line in place of the cosine"""
    return compare.linear(step, start, end, steps)


def shifted_crop(image, size):
    return np.roll(image.resize((size, size)), 1)


# Each case replaces the function `name` of a module by a wrong one; `title` is the row that must
# show the error.
@pytest.mark.parametrize("module, name, wrong, section, title", [
    (losses, "dino_loss", partial(losses.dino_loss, tau=0.1001), compare.self_distillation,
     "DINO: targets, loss, gradients, f64"),
    (compare, "cosine", linear_schedule, compare.schedules,
     "weight decay, momentum, teacher's temperature"),
    (compare, "adm_crop", shifted_crop, compare.components, "centre crop, 8-bit"),
    (losses, "koleo_loss", lambda x: x.sum() * torch.nan, compare.self_distillation,
     "KoLeo: loss, gradients, f64"),
], ids=["dino_loss", "cosine", "adm_crop", "koleo_loss"])
def test_an_error_in_our_code_appears_in_its_row_and_in_no_other(
        module, name, wrong, section, title, monkeypatch):
    monkeypatch.setattr(module, name, wrong)
    table = compare.make_table(compare.CUT, [section])
    assert [row[0] for row in compare.rows_above_limit(table)] == [title]


def test_the_fast_forms_are_compared_with_the_fast_flag_only(monkeypatch):
    """An error in a fast form appears with --fast and not without it."""
    monkeypatch.setattr(compare.fast, "rotate", lambda x, sin, cos: 2 * x)
    titles_above_limit = []                        # one list for each call of main
    real_make_table = compare.make_table

    def make_table(folder):
        table = real_make_table(folder, [compare.components])
        titles_above_limit.append([row[0] for row in compare.rows_above_limit(table)])
        return table

    monkeypatch.setattr(compare, "make_table", make_table)
    assert compare.main() == 0
    assert compare.main(use_fast=True) == 1
    assert titles_above_limit == [[], ["RoPE in bfloat16"]]


def test_the_table_in_the_documentation_has_the_counts_of_the_printed_output():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(page.read_text() for page in pages)
    # the section with this title, up to the next title of level 1 or 2
    section = re.search(r"^##? Equal to the reference\n.*?(\n##? |\Z)", text, re.S | re.M)[0]
    *lines, last = (ROOT / "study" / "golden.txt").read_text().splitlines()
    counts = re.match(r"(\d+) tensors in (\d+) rows, 0 above their limit", last)
    tensors, rows = map(int, counts.groups())
    assert len(lines) == rows + 1                  # one line is the head of the table
    assert f"{tensors} tensors" in section
    cells = [line.split("|") for line in section.splitlines() if line.startswith("|")]
    assert sum(int(row[3]) for row in cells if row[3].strip().isdigit()) == tensors
