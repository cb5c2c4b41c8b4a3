"""The package stands alone: it imports neither the scripts nor data.py nor tokenizer.py, and works from any folder."""
import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vtp_min

PACKAGE = Path(vtp_min.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
SCRIPTS = {"train", "eval", "dit", "data", "tokenizer"}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_of_the_package_imports_no_script(module):
    imported = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported.add(node.module)
    assert not imported & SCRIPTS


def test_every_module_is_imported_from_another_folder_with_the_package_alone_on_the_path(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "vtp_min").symlink_to(PACKAGE, target_is_directory=True)
    code = "import vtp_min; " + "; ".join(f"import vtp_min.{module}" for module in MODULES) + "; print('all imported')"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                           env=os.environ | {"PYTHONPATH": str(tmp_path / "site")})
    assert found.stdout == "all imported\n", found.stderr
