"""A collapse is reported with its value, its limit and remedies; normal values are not."""
import math
from argparse import Namespace

import pytest

from vtp_min.extras.collapse import collapse_warnings

ARGS = Namespace(prototypes=256, batch=64, warmup=10, clip_loss="clip")
NORMAL = {"teacher_entropy": 4.4, "feature_std": 0.9, "clip": 1.0}


def test_normal_values_and_objectives_that_are_off_give_no_warning(capsys):
    check = collapse_warnings(ARGS)
    assert check(50, NORMAL) == "" == check(50, {"rec": 1.0})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("kind, values, remedy", [
    ("uniform teacher", {"teacher_entropy": math.log(256)}, "--set teacher_temp=..."),
    ("constant teacher", {"teacher_entropy": 0.01}, "--set teacher=sinkhorn"),
    ("collapsed features", {"feature_std": 0.01}, "--set w_koleo=0.1"),
    ("CLIP at chance", {"clip": math.log(64)}, "captions"),
])
def test_a_collapse_is_reported_after_the_warm_up_once_with_a_remedy(kind, values, remedy, capsys):
    check = collapse_warnings(ARGS)
    assert check(5, NORMAL | values) == ""                  # during the warm-up
    assert check(50, NORMAL | values) == kind
    assert remedy in capsys.readouterr().out
    assert check(60, NORMAL | values) == kind               # logged while it lasts
    assert capsys.readouterr().out == ""                     # but printed once


def test_a_second_kind_is_printed_although_the_first_has_been(capsys):
    check = collapse_warnings(ARGS)
    values = NORMAL | {"feature_std": 0.01}
    check(50, values)
    capsys.readouterr()
    assert check(60, values | {"clip": 9.0}) == "collapsed features, CLIP at chance"
    printed = capsys.readouterr().out
    assert "clip 9.00" in printed and "feature_std" not in printed


@pytest.mark.parametrize("values, sentence", [
    ({"clip": 4.5}, "clip 4.50 is at or above ln B = 4.16, the value of random guessing"),
    ({"clip": math.log(64)}, "clip 4.16 is at or above ln B = 4.16, the value of random guessing"),
    ({"clip": 4.1}, "clip 4.10 is less than 2 % below ln B = 4.16, the value of random guessing"),
    ({"teacher_entropy": 5.54},
     "the teacher's entropy 5.54 is within 1 % of its maximum, ln K = 5.55"),
    ({"teacher_entropy": 0.05},
     "the teacher's entropy 0.050 is below 2 % of its maximum, ln K = 5.55"),
    ({"feature_std": 0.01}, "feature_std is 0.010; random directions have 1"),
], ids=str)
def test_a_warning_states_the_value_and_the_limit_that_it_passed(values, sentence, capsys):
    assert collapse_warnings(ARGS)(50, values)
    printed = capsys.readouterr().out
    assert sentence in printed
    assert printed.startswith("\nwarning, step 51: ") and printed.endswith(".\n")


def test_siglip_has_no_value_of_random_guessing():
    args = Namespace(**vars(ARGS) | {"clip_loss": "siglip"})
    assert collapse_warnings(args)(50, {"clip": 9.0}) == ""
