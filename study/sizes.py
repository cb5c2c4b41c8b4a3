"""Print the code size of one or more versions of this repository, one version per column.

    git archive COMMIT | tar -x -C OLD
    python study/sizes.py OLD .

lines        wrapped at 100 columns, with blank lines, as `fold -w 100 FILE | wc -l` counts them
closure      a script and all modules that it imports at module level, directly or indirectly
core         the scripts in the top folder and vtp_min/*.py
extras       vtp_min/extras/*.py
comments     comment tokens of Python's tokenizer, without section rules (# -----) and docstrings
code lines   physical lines with anything other than comments and docstrings
flags        distinct options of a script and its subcommands, as added to its parsers
loop         the loop over steps in train.py, and the body of compute_gradients if it exists; these
             lines are not wrapped, and lines that hold a comment only are not counted
"""
import argparse
import ast
import subprocess
import sys
import tokenize
from pathlib import Path

COLUMNS = 100
SCRIPTS = ["train.py", "eval.py", "dit.py"]
FOUR_FILES = ["train.py", "vtp_min/model.py", "vtp_min/losses.py", "vtp_min/vit.py"]

# program that runs in the folder of a version and prints the options of a script, one per line
LIST_FLAGS = """
import argparse, contextlib, io, runpy, sys
found, add = set(), argparse._ActionsContainer.add_argument
def record(self, *names, **more):
    found.update(name for name in names if name.startswith("--"))
    return add(self, *names, **more)
argparse._ActionsContainer.add_argument = record
sys.path.insert(0, ".")
sys.argv = [sys.argv[1], "--help"]
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    runpy.run_path(sys.argv[0], run_name="__main__")
print(*sorted(found - {"--help"}), sep="\\n")
"""


# ---------------------------------------------------------------- files and lines
def product_files(tree):
    """-> {path relative to the tree: 'core' or 'extras'}"""
    files = {}
    for path in sorted([*tree.glob("*.py"), *tree.glob("vtp_min/**/*.py")]):
        name = path.relative_to(tree).as_posix()
        files[name] = "extras" if name.startswith("vtp_min/extras/") else "core"
    return files


def count_lines(path, first=1, last=None):
    """-> number of lines from `first` to `last` of a file, wrapped at 100 columns"""
    lines = path.read_text().splitlines()[first - 1:last]
    return sum(wrapped(line) for line in lines)


def wrapped(line):
    """-> number of lines of 100 columns that a line occupies"""
    return max(1, -(-len(line) // COLUMNS))


def total_lines(tree, names):
    return sum(count_lines(tree / name) for name in names)


def files_and_lines(tree, names):
    return f"{len(names)} files, {total_lines(tree, names)} lines"


# ---------------------------------------------------------------- imports
def module_level(node):
    """Yield the statements that run on import: at the top level and inside if, try and with."""
    for statement in getattr(node, "body", []):
        yield statement
        if isinstance(statement, (ast.If, ast.Try, ast.With)):
            yield from module_level(statement)


def imported_names(name, source):
    """Yield dotted names of the modules that a file may import at module level."""
    package = Path(name).parent.parts
    for statement in module_level(ast.parse(source)):
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
        if not isinstance(statement, ast.ImportFrom):
            continue
        above = package[:len(package) - statement.level + 1] if statement.level else ()
        base = ".".join([*above, *filter(None, [statement.module])])
        yield base
        # `from a import b`: b may be a module or a name within a
        yield from (f"{base}.{alias.name}" for alias in statement.names)


def closure(tree, script):
    """-> paths of the files that `import script` reads, in alphabetical order"""
    found = set()
    queue = [script]
    while queue:
        name = queue.pop()
        if name in found:
            continue
        found.add(name)
        for module in imported_names(name, (tree / name).read_text()):
            path = module.replace(".", "/")
            files = [f"{path}.py", f"{path}/__init__.py"]
            files += [f"{folder}/__init__.py" for folder in Path(path).parents]
            queue += [file for file in files if (tree / file).is_file()]
    return sorted(found)


# ---------------------------------------------------------------- comments and functions
def docstring_lines(source):
    """-> set of the numbers of the lines that docstrings occupy"""
    numbers = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            continue
        first = node.body[0] if node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            if isinstance(first.value.value, str):
                numbers |= {*range(first.lineno, first.end_lineno + 1)}
    return numbers


def comments_and_code(path):
    """-> number of comments, number of code lines"""
    empty = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
             tokenize.ENCODING, tokenize.ENDMARKER}
    comments, code = 0, set()
    with open(path, "rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type == tokenize.COMMENT:
                comments += not token.string.startswith("# ---")
            elif token.type not in empty:
                code |= {*range(token.start[0], token.end[0] + 1)}
    return comments, len(code - docstring_lines(path.read_text()))


def comment_rate(tree, names):
    """-> comments per 100 code lines of some files, as text"""
    pairs = [comments_and_code(tree / name) for name in names]
    comments, code = (sum(column) for column in zip(*pairs))
    return f"{100 * comments / code:.1f}"


def functions(tree, names):
    """-> list of (lines, 'file:name') of all functions, the longest first"""
    found = []
    for name in names:
        for node in ast.walk(ast.parse((tree / name).read_text())):
            if isinstance(node, ast.FunctionDef):
                size = count_lines(tree / name, node.lineno, node.end_lineno)
                found.append((size, f"{name}:{node.name}"))
    return sorted(found, reverse=True)


# ---------------------------------------------------------------- flags, loop
def flags(tree, script):
    """-> sorted list of the distinct options of a script"""
    command = [sys.executable, "-c", LIST_FLAGS, script]
    found = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=True)
    return found.stdout.split()


def loop_statements(tree):
    """-> statements of compute_gradients, and the loop over steps in train.py"""
    statements = []
    for node in ast.walk(ast.parse((tree / "train.py").read_text())):
        if isinstance(node, ast.FunctionDef) and node.name == "compute_gradients":
            statements += [x for x in node.body if not is_docstring(x)]
        if isinstance(node, ast.For):
            targets = {x.id for x in ast.walk(node.target) if isinstance(x, ast.Name)}
            iterable = ast.unparse(node.iter)
            # older versions iterate over run.walk(...), newer ones over range(...)
            if "step" in targets and ("run.walk" in iterable or "range(" in iterable):
                statements.append(node)
    return statements


def loop_size(tree):
    """-> numbers of lines, of distinct calls, and of names that are assigned"""
    source = (tree / "train.py").read_text().splitlines()
    lines, calls, assigned = set(), set(), set()
    for statement in loop_statements(tree):
        numbers = range(statement.lineno, statement.end_lineno + 1)
        lines |= {n for n in numbers if not source[n - 1].lstrip().startswith("#")}
        for node in ast.walk(statement):
            if isinstance(node, ast.Call):
                calls.add(ast.unparse(node.func))
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                assigned.add(node.id)
    return len(lines), len(calls), len(assigned)


def is_docstring(statement):
    """True for a statement that is a string; in a function body, this is its docstring."""
    constant = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return constant and isinstance(statement.value.value, str)


# ---------------------------------------------------------------- the table
def measure(tree):
    """Folder of a version -> {name of a row: text}"""
    groups = product_files(tree)
    files = [*groups]
    core = [name for name in files if groups[name] == "core"]
    extras = [name for name in files if groups[name] == "extras"]
    rows = {f"closure of {script}": files_and_lines(tree, closure(tree, script))
            for script in SCRIPTS}
    rows["train, model, losses, vit"] = files_and_lines(tree, FOUR_FILES)
    rows["core"] = files_and_lines(tree, core)
    rows["extras"] = files_and_lines(tree, extras)
    rows["all"] = files_and_lines(tree, files)
    for name, group in (("core", core), ("all", files)):
        lines = [line for file in group for line in (tree / file).read_text().splitlines()]
        wide = sum(len(line) > COLUMNS for line in lines)
        rows[f"lines over {COLUMNS} columns, {name}"] = f"{wide} of {len(lines)}"
    rows["comments per 100 code lines, four files"] = comment_rate(tree, FOUR_FILES)
    rows["comments per 100 code lines, core"] = comment_rate(tree, core)
    rows["comments per 100 code lines, all"] = comment_rate(tree, files)
    for script in SCRIPTS:
        rows[f"flags of {script}"] = str(len(flags(tree, script)))
    longest = functions(tree, files)
    rows["longest function"] = "{} lines, {}".format(*longest[0])
    others = [pair for pair in longest if not pair[1].endswith(":main")]
    rows["longest function except main"] = "{} lines, {}".format(*others[0])
    rows["functions over 40 lines"] = str(sum(size > 40 for size, _ in longest))
    rows["training loop"] = "{} lines, {} calls, {} names".format(*loop_size(tree))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", nargs="+", type=Path, help="folder of a version of the repository")
    trees = parser.parse_args().tree
    columns = [measure(tree) for tree in trees]
    width = max(len(text) for rows in columns for text in rows.values()) + 2
    print(" " * 40 + "".join(f"{tree.resolve().name:>{width}}" for tree in trees))
    for name in columns[0]:
        cells = [f"{rows[name]:>{width}}" for rows in columns]
        print(f"{name:40s}" + "".join(cells))


if __name__ == "__main__":
    main()
