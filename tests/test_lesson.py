"""The lesson: its notebook runs from the first cell to the last, and it is a plain, small file."""
import base64
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import dit
import train

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "study"))
import lesson                                                              # noqa: E402

NOTEBOOK = json.loads(lesson.NOTEBOOK.read_text("utf-8"))
STEPS = 2                                        # of each training, in place of 480 and 750
MAX_LINES = 14                                   # of a code cell, without empty lines
MAX_BYTES = 60_000                               # of a figure

# Executes the notebook in a copy of the repository, and writes the numbers of its Section 2.
CHILD = """
import json, sys
sys.path.insert(0, "study")
import lesson
notebook = json.loads(lesson.NOTEBOOK.read_text("utf-8"))
names = lesson.execute(notebook)
lesson.write_notebook(notebook, lesson.NOTEBOOK)
results = {"by hand": names["terms"], "step": names["step_terms"]}
results = {key: {k: float(x) for k, x in terms.items()} for key, terms in results.items()}
results["snapshots"] = list(names["snapshots"])
with open("results.json", "w") as f:
    json.dump(results, f)
"""


def cells(notebook, kind):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def figures(notebook):
    """-> list of (number of the code cell, PNG file as bytes)"""
    found = []
    for number, cell in enumerate(cells(notebook, "code"), start=1):
        for output in cell["outputs"]:
            if "data" in output:
                found.append((number, base64.b64decode(output["data"]["image/png"])))
    return found


def printed_text(notebook):
    lines = []
    for cell in cells(notebook, "code"):
        for output in cell["outputs"]:
            lines += output.get("text", [])
    return "".join(lines)


# ---------------------------------------------------------------- the file
def check_format(notebook):
    """AssertionError if it is not a notebook of nbformat 4.4, which has no cell ids"""
    assert notebook.keys() == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 4)
    for cell in notebook["cells"]:
        keys = {"cell_type", "metadata", "source"}
        if cell["cell_type"] == "code":
            keys |= {"execution_count", "outputs"}
        assert cell.keys() == keys and cell["cell_type"] in ("code", "markdown")
        assert cell["metadata"] == {} and all(isinstance(line, str) for line in cell["source"])
        for output in cell.get("outputs", []):
            kind = output["output_type"]
            keys = {"stream": {"name", "text"}, "display_data": {"data", "metadata"}}[kind]
            assert output.keys() == keys | {"output_type"}


def check_outputs(notebook):
    """AssertionError if an output names this machine or a folder of it"""
    text = printed_text(notebook)
    for found in (socket.gethostname(), str(Path.home()), str(ROOT), "/tmp/", "/home/", "/root"):
        assert found not in text, found


def test_the_notebook_is_a_small_file_of_nbformat_4_and_names_no_machine():
    check_format(NOTEBOOK)
    check_outputs(NOTEBOOK)
    assert lesson.NOTEBOOK.stat().st_size < 1_500_000
    for number, png in figures(NOTEBOOK):
        assert len(png) < MAX_BYTES, (number, len(png))
    assert NOTEBOOK["metadata"].keys() == {"kernelspec", "language_info"}
    assert NOTEBOOK["metadata"]["kernelspec"]["name"] == "python3"


def test_the_stored_outputs_are_those_of_one_complete_run_or_there_are_none():
    counts = [cell["execution_count"] for cell in cells(NOTEBOOK, "code")]
    assert counts in ([None] * len(counts), list(range(1, len(counts) + 1)))
    if counts[0] is None:
        assert not figures(NOTEBOOK) and not printed_text(NOTEBOOK)
    else:
        assert f"step {STEPS} of" not in printed_text(NOTEBOOK)          # not those of a test


def test_cells_are_short_and_contain_only_python_and_plain_markdown():
    for cell in NOTEBOOK["cells"]:
        lines = source(cell).split("\n")
        assert max(map(len, lines)) <= 100, lines[0]
        if cell["cell_type"] == "code":
            assert sum(bool(line.strip()) for line in lines) <= MAX_LINES, lines[0]
            assert not re.search(r"^\s*[%!?]|#@|google", source(cell), re.M), lines[0]
        else:
            assert not re.search(r"<\w|\$|colab", source(cell)), lines[0]


def test_every_code_cell_follows_an_explanation():
    kinds = [cell["cell_type"] for cell in NOTEBOOK["cells"]]
    pairs = list(zip(kinds, kinds[1:]))
    assert kinds[0] == "markdown" and pairs.count(("code", "code")) == 1         # the imports
    assert sum("**Question" in source(cell) for cell in NOTEBOOK["cells"]) == 3


# ---------------------------------------------------------------- the settings
def settings(monkeypatch, steps=None):
    """-> the variables of the settings cell"""
    monkeypatch.delenv("VTP_LESSON_STEPS", raising=False)
    if steps:
        monkeypatch.setenv("VTP_LESSON_STEPS", str(steps))
    code, = [source(cell) for cell in cells(NOTEBOOK, "code") if "TRAIN = " in source(cell)]
    names = {"os": os, "Path": Path}
    exec(code, names)
    return names


def makefile_flags(start):
    """-> the arguments of the command of the Makefile that starts with `start`"""
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    shapes = re.search(r"^SHAPES = (.*)$", text, re.M)[1]
    line, = re.findall(rf"^\t\$\(PY\) {re.escape(start)} (.*)$", text, re.M)
    return shlex.split(line.replace("$(SHAPES)", shapes).replace("$(RUN)", "runs/lesson"))


def test_the_tokenizer_is_trained_like_that_of_the_demo(monkeypatch):
    names = settings(monkeypatch)
    script, *flags = shlex.split(names["TRAIN"])
    assert script == "train.py"
    assert train.arguments(flags) == train.arguments(makefile_flags("train.py"))
    assert dit.parse(["latents", *makefile_flags("dit.py latents")]).n == names["N_LATENTS"]


def test_a_test_run_is_short_and_has_a_folder_of_its_own(monkeypatch):
    full, short = settings(monkeypatch), settings(monkeypatch, STEPS)
    assert full["RUN"] != short["RUN"]
    assert short["DIT_STEPS"][-1] == STEPS and f"--steps {STEPS}" in short["TRAIN"]


# ---------------------------------------------------------------- the execution
@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """Execute the notebook in a copy of the repository -> the folder of the copy"""
    copy = tmp_path_factory.mktemp("lesson")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, copy)
    shutil.copytree(ROOT / "vtp_min", copy / "vtp_min",
                    ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "study").mkdir()
    for name in ("lesson.py", "lesson.ipynb"):
        shutil.copy(ROOT / "study" / name, copy / "study")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "VTP_LESSON_STEPS": str(STEPS)}
    try:
        done = subprocess.run([sys.executable, "-c", CHILD], cwd=copy, env=environment,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        yield copy
    finally:
        shutil.rmtree(copy / "runs", ignore_errors=True)         # 200 MB


def read_notebook(folder):
    return json.loads((folder / "study/lesson.ipynb").read_text("utf-8"))


def test_all_code_cells_run_in_order(executed):
    notebook = read_notebook(executed)
    check_format(notebook)
    check_outputs(notebook)
    counts = [cell["execution_count"] for cell in cells(notebook, "code")]
    assert counts == list(range(1, len(counts) + 1))
    assert [source(cell) for cell in notebook["cells"]] == [
        source(cell) for cell in NOTEBOOK["cells"]]
    assert str(executed) not in printed_text(notebook)


def test_every_section_from_the_images_to_the_samples_shows_figures(executed):
    notebook = read_notebook(executed)
    shown = figures(notebook)
    assert len(shown) == 12
    assert len({number for number, _ in shown}) == 12            # a live curve leaves one figure
    for _, png in shown:
        assert min(Image.open(io.BytesIO(png)).size) > 100
    assert (executed / "study/lesson.ipynb").stat().st_size < 1_500_000


def test_the_sum_of_the_losses_computed_by_hand_is_that_of_the_training_step(executed):
    results = json.loads((executed / "results.json").read_text())
    by_hand, step = results["by hand"], results["step"]
    assert by_hand.keys() == step.keys() == {"loss", "clip", "dino", "ibot", "koleo", "rec"}
    assert by_hand == pytest.approx(step, rel=1e-4)
    total = by_hand["clip"] + by_hand["dino"] + by_hand["ibot"]
    total += 0.1 * by_hand["koleo"] + 0.1 * by_hand["rec"]
    assert step["loss"] == pytest.approx(total, rel=1e-4)


def test_the_first_step_of_the_training_command_has_these_losses(executed):
    """up to rounding, because the command may train in bfloat16"""
    by_hand = json.loads((executed / "results.json").read_text())["by hand"]
    first, *_ = (executed / "runs/lesson-test/log.jsonl").read_text().splitlines()
    first = {name: json.loads(first)[name] for name in by_hand}
    assert first == pytest.approx(by_hand, rel=0.02)


def test_the_dit_is_trained_like_that_of_the_demo_and_kept_at_several_steps(executed):
    results = json.loads((executed / "results.json").read_text())
    assert results["snapshots"] == [1, STEPS]
    command, = re.findall(r"^python dit.py train (.*)$", printed_text(read_notebook(executed)),
                          re.M)                  # that of the last training
    lesson_args = vars(dit.parse(["train", *shlex.split(command)]))
    demo_args = vars(dit.parse(["train", *makefile_flags("dit.py train")]))
    different = {name for name in demo_args if demo_args[name] != lesson_args[name]}
    assert different == {"latents", "out", "steps", "log_every"}


def test_a_cell_that_fails_ends_the_execution():
    notebook = {"cells": [{"cell_type": "code", "source": [f"{code}\n"], "outputs": []}
                          for code in ("x = 1; print(x)", "x / 0", "print(2)")]}
    with pytest.raises(ZeroDivisionError):
        lesson.execute(notebook)
    assert lesson.recorder is None
    assert [cell["outputs"] for cell in notebook["cells"]] == [
        [{"name": "stdout", "output_type": "stream", "text": ["1\n"]}], [], []]


# ---------------------------------------------------------------- display
@pytest.fixture
def jupyter(monkeypatch):
    """Pretend to run in Jupyter -> list of what is displayed: PNG files, and None for a removal"""
    shown = []

    class FakeDisplay:
        display = staticmethod(shown.append)

        @staticmethod
        def Image(data):
            return data

        @staticmethod
        def clear_output(wait):
            shown.append(None)

    monkeypatch.setattr(lesson, "get_ipython", lambda: True)
    monkeypatch.setattr(lesson, "display", FakeDisplay, raising=False)
    return shown


def run_folder(folder):
    (folder / "run.json").write_text('{"steps": 2}')
    lines = [json.dumps({"step": k, "loss": 1 / k}) + "\n" for k in (1, 2)]
    (folder / "log.jsonl").write_text("".join(lines))
    return folder


def test_without_ipython_an_image_is_described_in_words(capsys):
    lesson.show(Image.new("RGB", (40, 30)))
    assert capsys.readouterr().out == "(an image of 40 x 30 pixels)\n"


def test_in_jupyter_the_curves_are_drawn_again_while_the_command_runs(
        tmp_path, monkeypatch, jupyter):
    monkeypatch.setattr(lesson, "SECONDS", 0.01)
    command = '-c "import time; time.sleep(1)"'
    log = lesson.run_command(command, run_folder(tmp_path), ["loss", "unknown"])
    assert [line["loss"] for line in log] == [1, 0.5]
    removed, drawn = jupyter[::2], jupyter[1::2]
    assert len(drawn) >= 2 and removed == [None] * len(drawn)
    assert all(png.startswith(b"\x89PNG") for png in drawn)


def test_a_command_that_fails_raises_an_error_with_its_last_lines():
    with pytest.raises(RuntimeError, match=r"python study/sizes.py --unknown(.|\n)*error: "):
        lesson.run_command("study/sizes.py --unknown")


def test_an_interrupted_cell_ends_its_command(tmp_path, monkeypatch):
    """The command gets SIGTERM, after which a training saves a checkpoint."""
    code = ("import pathlib, signal, sys, time; "
            "stop = lambda *_: sys.exit(pathlib.Path(sys.argv[1]).touch()); "
            "signal.signal(signal.SIGTERM, stop); pathlib.Path(sys.argv[2]).touch(); "
            "time.sleep(60)")
    saved, begun = tmp_path / "saved", tmp_path / "begun"

    def interrupt(process):
        while not begun.exists():
            pass
        raise KeyboardInterrupt

    monkeypatch.setattr(lesson, "is_running", interrupt)
    with pytest.raises(KeyboardInterrupt):
        lesson.run_command(shlex.join(["-c", code, str(saved), str(begun)]))
    assert saved.exists()
