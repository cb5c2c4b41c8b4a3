"""Every command that README, Makefile and study/ show is one that its script understands."""
import re
import shlex
import sys
from pathlib import Path

import pytest

import dit
import eval
import train

ROOT = Path(__file__).parents[1]
PARSERS = {"train.py": train.arguments, "eval.py": eval.arguments, "dit.py": lambda: dit.parse(sys.argv[1:])}


def commands():
    """-> (script, its words) of every line of code that calls one of our scripts; $NAMES become plain words"""
    text = "".join(re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S))
    text += "".join(path.read_text() for path in [ROOT / "Makefile", *sorted((ROOT / "study").glob("*.sh"))])
    text = re.sub(r"\$[({]?(\w+)[)}]?", r"\1", text.replace("\\\n", " "))
    for line in re.split(r"\n|&&", text):
        words = shlex.split(line, comments=True)
        for script in PARSERS:
            if script in words:
                yield pytest.param(script, words[words.index(script) + 1:], id=" ".join(words)[:80])


@pytest.mark.parametrize("script, words", list(commands()))
def test_a_command_that_we_show_is_understood(script, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script, *words])
    PARSERS[script]()


def test_no_command_hides_from_this_test():
    assert len(list(commands())) >= 20
