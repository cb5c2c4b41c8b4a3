"""The package imports neither the scripts nor data.py nor tokenizer.py, so it can be imported from
any folder. Importing its core imports no extra."""
import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vtp_min

PACKAGE = Path(vtp_min.__file__).parent
CORE = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
EXTRAS = sorted(path.stem for path in (PACKAGE / "extras").glob("*.py") if path.stem != "__init__")
MODULES = CORE + [f"extras.{name}" for name in EXTRAS]
SCRIPTS = {"train", "eval", "dit", "data", "tokenizer"}


def tree(module):
    """Syntax tree of a module.   module  name below vtp_min; '' and 'extras' are the packages"""
    path = PACKAGE.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text())


def imported(node, package):
    """Absolute names that an import statement may import, since `from a import b` can mean a.b

    package  package of the file with the statement: 'vtp_min' or 'vtp_min.extras'
    """
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if not isinstance(node, ast.ImportFrom):
        return set()
    base = node.module or ""
    if node.level:
        parents = package.split(".")
        above = parents[:len(parents) - node.level + 1]
        base = ".".join(above + base.split(".")) if base else ".".join(above)
    return {base} | {f"{base}.{alias.name}" for alias in node.names}


def module_level(node):
    """Yield the nodes that run on import: all except the bodies of functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield child
            yield from module_level(child)


def package_of(module):
    return "vtp_min.extras" if module.startswith("extras") else "vtp_min"


@pytest.mark.parametrize("module", ["", "extras", *MODULES])
def test_a_module_of_the_package_imports_no_script(module):
    names = set()
    for node in ast.walk(tree(module)):
        names |= imported(node, package_of(module))
    assert not {name.split(".")[0] for name in names} & SCRIPTS


@pytest.mark.parametrize("module", ["", *CORE])
def test_a_core_module_imports_no_extra_at_module_level(module):
    names = set()
    for node in module_level(tree(module)):
        names |= imported(node, "vtp_min")
    assert not {name for name in names if name.startswith("vtp_min.extras")}


def test_the_two_tests_above_detect_every_form_of_import():
    code = ("import data\nfrom . import extras\nfrom .extras import fast\nimport vtp_min.extras.a\n"
            "if True:\n    from .extras.b import f\ndef g():\n    from .extras import late\n"
            "class C:\n    from vtp_min.extras import c\n")
    names = set()
    for node in module_level(ast.parse(code)):
        names |= imported(node, "vtp_min")
    extras = {name for name in names if name.startswith("vtp_min.extras")}
    assert "data" in names and "vtp_min.extras.late" not in names
    assert {f"vtp_min.extras.{name}" for name in ("fast", "a", "b.f", "c")} < extras
    node = ast.parse("from ..losses import sinkhorn").body[0]
    assert "vtp_min.losses.sinkhorn" in imported(node, "vtp_min.extras")


def run_elsewhere(tmp_path, code):
    """Run code in another folder, with only the package on the path -> its output"""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "vtp_min").symlink_to(PACKAGE, target_is_directory=True)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment,
                         capture_output=True, text=True)
    assert not run.stderr, run.stderr
    return run.stdout


def test_every_module_can_be_imported_from_another_folder_without_the_scripts(tmp_path):
    lines = ["import vtp_min"]
    lines += [f"import vtp_min.{module}" for module in MODULES]
    lines.append("print('all imported')")
    assert run_elsewhere(tmp_path, "\n".join(lines)) == "all imported\n"


def test_importing_the_core_loads_no_extra(tmp_path):
    lines = ["import sys", "import vtp_min"]
    lines += [f"import vtp_min.{module}" for module in CORE]
    lines.append("print([name for name in sys.modules if name.startswith('vtp_min.extras')])")
    assert run_elsewhere(tmp_path, "\n".join(lines)) == "[]\n"
