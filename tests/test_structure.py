"""Limits on the size of the code, so that it stays readable: files that a reader must open for
train.py, lines of code, and imports that go down only.

Sizes are measured by study/sizes.py. Comments and docstrings are not counted as code.
"""
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "study"))
import sizes                                                               # noqa: E402

GROUPS = sizes.product_files(ROOT)
CORE = [name for name, group in GROUPS.items() if group == "core"]
SCRIPTS = ["train.py", "eval.py", "dit.py"]
MODULES_OF_SCRIPTS = ["data.py", "tokenizer.py"]
LOWEST = ["dist", "rng", "device", "shapes"]               # they import nothing but each other


def code_lines(names):
    return sum(sizes.comments_and_code(ROOT / name)[1] for name in names)


def direct_imports(name):
    """Files of this repository that a file imports at module level"""
    found = set()
    for module in sizes.imported_names(name, (ROOT / name).read_text()):
        path = module.replace(".", "/") + ".py"
        if path in GROUPS:
            found.add(path)
    return found


def test_train_py_needs_few_files():
    files = sizes.closure(ROOT, "train.py")
    assert len(files) <= 17
    assert code_lines(files) <= 2700


def test_the_four_files_of_the_paper_are_short():
    assert code_lines(sizes.FOUR_FILES) <= 940


def test_the_core_and_the_whole_stay_small():
    assert code_lines(CORE) <= 3800
    assert code_lines(GROUPS) <= 9460


def test_the_training_step_fits_on_a_screen():
    lines, calls, names = sizes.loop_size(ROOT)
    assert lines <= 62 and calls <= 42 and names <= 32


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_imports_another_script(script):
    for name in GROUPS:
        assert script not in direct_imports(name), name


@pytest.mark.parametrize("module", MODULES_OF_SCRIPTS)
def test_only_scripts_import_data_and_tokenizer(module):
    users = {name for name in GROUPS if module in direct_imports(name)}
    assert users <= {*SCRIPTS, *MODULES_OF_SCRIPTS}


def test_the_lowest_modules_import_only_each_other():
    lowest = {f"vtp_min/{name}.py" for name in LOWEST}
    for name in lowest:
        assert direct_imports(name) <= lowest, name


def test_no_core_file_imports_an_extra_at_module_level():
    for name in CORE:
        extras = {path for path in direct_imports(name) if GROUPS[path] == "extras"}
        assert not extras, name
