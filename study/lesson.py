"""Display functions of the lesson, study/lesson.ipynb, and a command that executes it.

    python study/lesson.py --execute              run all cells and store their outputs in the file
    python study/lesson.py --execute --out FILE   the same, stored in another notebook

The notebook calls show, show_rows, show_answers and run_command. In Jupyter and similar services
they display images below the cell. Without IPython they print the size of an image instead, and
--execute stores the image in the notebook. Neither Jupyter nor nbformat is needed.

The environment variable VTP_LESSON_STEPS, which the notebook reads, sets a small number of training
steps for tests.
"""
import argparse
import base64
import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from vtp_min.config import atomic_write                                    # noqa: E402
from vtp_min.extras.files import read_json_lines, read_settings            # noqa: E402
from vtp_min.extras.grid import image_grid                                 # noqa: E402
from vtp_min.extras.report import (BLUE, GREEN, curve_titles, plot_curves,  # noqa: E402
                                   to_uint8)

try:
    from IPython import display, get_ipython
except ImportError:
    def get_ipython():
        return None                              # as IPython's own function outside of a notebook

NOTEBOOK = ROOT / "study/lesson.ipynb"
CURVES_WIDTH = 900                               # of a figure with curves, in pixels
SECONDS = 4                                      # between two drawings of the curves

recorder = None                                  # a Recorder while --execute runs, else None


# ---------------------------------------------------------------- display
def show(image):
    """Display a PIL image below the cell."""
    png = to_png(image)
    if recorder:
        recorder.add_image(png)
    elif get_ipython():
        display.display(display.Image(data=png))
    else:
        print(f"(an image of {image.width} x {image.height} pixels)")


def to_png(image):
    """PIL image -> bytes of a PNG file with 128 colours, a third of the size of one with all"""
    file = io.BytesIO()
    image.convert("RGB").quantize(128).save(file, "PNG", optimize=True)
    return file.getvalue()


def clear():
    """Remove what this cell has displayed so far, before a newer figure replaces it."""
    if recorder:
        recorder.outputs.clear()
    elif get_ipython():
        display.clear_output(wait=True)          # wait: until the next output, without flicker


def show_rows(rows, scale=2):
    """Display images in rows, with a label at the left of each row.

    rows   {label: images (n, 3, h, w) in [0, 1]}
    scale  integer factor by which the images are enlarged
    """
    arrays = []
    for images in rows.values():
        arrays.append([to_uint8(image) for image in images.cpu()])
    show(image_grid(arrays, list(rows), scale))


def show_answers(images, names, probabilities, labels=None, k=3):
    """Display images, and below each one its k most probable names as bars.

    images         (n, 3, h, w) in [0, 1]
    probabilities  (n, C) for the C names
    labels         (n,) correct classes, whose bars are green; None: they are not known
    """
    n = len(images)
    figure = Figure(figsize=(1.5 * n, 2.6), layout="constrained")
    for i in range(n):
        ax = figure.add_subplot(2, n, 1 + i)
        ax.imshow(to_uint8(images[i]))
        ax.axis("off")
        ax = figure.add_subplot(2, n, 1 + n + i)
        best = probabilities[i].topk(min(k, len(names)))
        for place, (j, p) in enumerate(zip(best.indices.tolist(), best.values.tolist())):
            is_correct = labels is not None and j == labels[i]
            ax.barh(-place, p, color=GREEN if is_correct else BLUE, alpha=0.5)
            ax.text(0.02, -place, f"{names[j]} {p:.0%}", va="center", fontsize=9)
        ax.set_xlim(0, 1)
        ax.axis("off")
    show(draw(figure))


def draw(figure):
    """matplotlib Figure -> PIL image"""
    file = io.BytesIO()
    figure.savefig(file, dpi=100)
    return Image.open(file)


# ---------------------------------------------------------------- commands
def run_command(command, run=None, names=()):
    """Run a command of this repository, and display training curves until it ends.

    command  such as "train.py --out runs/lesson", without python
    run      its run folder; None: the command has no log
    names    names of the logged quantities to plot
    -> the lines of RUN/log.jsonl, as dicts. RuntimeError if the command fails.
    If the cell is interrupted, a training saves a checkpoint, and the same command continues it.
    """
    print(f"python {command}", flush=True)
    words = [sys.executable, *shlex.split(command)]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(words, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            while is_running(process):
                if run and get_ipython():
                    show_log(command, run, names)
        finally:
            process.terminate()                  # does nothing if the process has ended
            process.wait()
        output.seek(0)
        lines = output.read().replace("\r", "\n").splitlines()    # progress bars contain \r
    if process.returncode:
        last_lines = "\n".join(lines[-15:])
        raise RuntimeError(f"this command has failed: python {command}\n{last_lines}")
    return show_log(command, run, names) if run else []


def is_running(process):
    """Wait for SECONDS, or until the process ends -> True if it still runs"""
    try:
        process.wait(SECONDS)
        return False
    except subprocess.TimeoutExpired:
        return True


def show_log(command, run, names):
    """Replace the output of the cell by the curves of the log -> the lines of the log"""
    log = read_json_lines(Path(run) / "log.jsonl", lambda line: "step" in line)
    if not log:
        return log
    settings = read_settings(run)
    clear()
    print(f"python {command}\nstep {log[-1]['step']} of {settings['steps']}")
    logged = [name for name in names if name in log[-1]]
    curves = plot_curves(log, logged, curve_titles(settings))
    show(curves.resize((CURVES_WIDTH, curves.height * CURVES_WIDTH // curves.width)))
    return log


# ---------------------------------------------------------------- execution without Jupyter
class Recorder(io.TextIOBase):
    """The outputs of one cell in the form of nbformat 4: printed text and images. It replaces
    sys.stdout while the cell runs."""

    def __init__(self):
        self.outputs = []

    def write(self, text):
        if not self.outputs or self.outputs[-1]["output_type"] != "stream":
            self.outputs.append({"name": "stdout", "output_type": "stream", "text": []})
        lines = self.outputs[-1]["text"]         # the format of nbformat: one string per line
        lines[:] = ("".join(lines) + text).splitlines(keepends=True)
        return len(text)

    def add_image(self, png):
        data = {"image/png": base64.b64encode(png).decode()}
        self.outputs.append({"data": data, "metadata": {}, "output_type": "display_data"})


def execute(notebook):
    """Run the code cells in order, in one namespace, and store their outputs -> the namespace

    notebook  the contents of an .ipynb file, changed in place. An error in a cell is raised.
    """
    global recorder
    os.chdir(ROOT)                               # the first cell looks for the repository here
    namespace = {"__name__": "__main__"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells, start=1):
        start = time.perf_counter()
        recorder = Recorder()
        code = compile("".join(cell["source"]), f"<code cell {number}>", "exec")
        try:
            with contextlib.redirect_stdout(recorder):
                exec(code, namespace)
            cell["execution_count"], cell["outputs"] = number, recorder.outputs
        finally:
            recorder = None
        seconds = time.perf_counter() - start
        print(f"code cell {number} of {len(cells)}: {seconds:.1f} s", flush=True)
    return namespace


def write_notebook(notebook, path):
    text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    atomic_write(path, lambda part: part.write_text(text, encoding="utf-8"))


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--execute", action="store_true", required=True, help="run all code cells")
    p.add_argument("--out", type=Path, default=NOTEBOOK, help="notebook to write (default: the "
                   "lesson itself)")
    args = p.parse_args()
    out = args.out.resolve()                     # relative to the folder of the call
    notebook = json.loads(NOTEBOOK.read_text("utf-8"))
    start = time.perf_counter()
    execute(notebook)
    write_notebook(notebook, out)
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes; wrote {out}")


if __name__ == "__main__":
    # The cells import this file as the module `lesson`. Both must be the same module, because
    # `recorder` is a variable of the module.
    import lesson
    lesson.main()
