"""The documentation matches the code: the scripts accept every command that README, docs/, Makefile
and study/ show, the Python code of docs/weights.md runs, and the README is short and lists every
file."""
import ast
import atexit
import re
import shlex
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image

import dit
import eval
import train
from vtp_min import VTPConfig, VTPModel
from vtp_min.extras import baselines, gan

ROOT = Path(__file__).parents[1]
# fields of a small VTPConfig, with the patch size of the released models
SMALL = dict(vision_embed_dim=48, vision_depth=5, vision_num_heads=2, vision_feature_bottleneck=6,
             text_embed_dim=32, text_num_heads=2, text_depth=1, decoder_embed_dim=32,
             decoder_num_heads=2, decoder_depth=1)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")),
         *sorted((ROOT / "study").glob("**/*.md"))]
sys.path.insert(0, str(ROOT / "study"))
import study                                                               # noqa: E402


def parse_train(words):
    if "--baseline" in words:
        return baselines.parse_arguments(words)
    if "--stage" in words:
        return gan.parse_arguments(words)
    if "--init" in words:                                  # its weights are read with the flags
        place = words.index("--init") + 1
        words = [*words[:place], small_weights(), *words[place + 1:]]
    return train.arguments(words)


@cache
def small_weights():
    """-> name of a folder with a small model, in place of the released weights"""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    VTPModel(VTPConfig(**SMALL)).save_pretrained(folder)
    return folder


def parse_eval(words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["eval.py", *words])
        return eval.arguments()


# script: parser of its flags, which exits or raises ValueError for an unknown flag
PARSERS = {"train.py": parse_train, "eval.py": parse_eval, "dit.py": dit.parse,
           "study/study.py": study.parser().parse_args}


def shell_blocks(path):
    """The shell code of a Markdown file: its sh blocks, and commands between backquotes (tables
    contain some)"""
    text = path.read_text()
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
    outside = re.sub(r"```.*?```", "", text, flags=re.S)
    inline = re.findall(r"`([^`\n]+)`", outside)
    blocks += [code for code in inline if re.match(r"(python|torchrun|train\.py) ?.*\.py \S", code)]
    return "\n".join(blocks)


def documented_code():
    """The shell code of README, docs/, Makefile and study/. A variable that contains several flags
    is replaced by these flags."""
    text = "\n".join(shell_blocks(page) for page in PAGES) + "\n"
    for path in [ROOT / "Makefile", *sorted((ROOT / "study").glob("*.sh"))]:
        code = path.read_text()
        for name, flags in re.findall(r'^(\w+)="(--.*)"$', code, re.M):
            code = code.replace(f"${name}", flags)
        text += code
    return text


def commands():
    """Yield (script, list of its arguments) for every command that calls one of our scripts. The
    other variables are replaced by their names: $RUN becomes RUN."""
    text = documented_code().replace("\\\n", " ")                # a backslash continues the line
    text = re.sub(r"\$[({]?(\w+)[)}]?", r"\1", text)
    for line in re.split(r"\n|&&", text):
        without_redirection = re.sub(r" \d?>.*", "", line)
        words = shlex.split(without_redirection, comments=True)
        for script in PARSERS:
            if script in words:
                arguments = words[words.index(script) + 1:]
                yield pytest.param(script, arguments, id=" ".join(words)[:80])


@pytest.mark.parametrize("script, words", list(commands()))
def test_a_documented_command_is_accepted_by_its_script(script, words):
    PARSERS[script](words)


def test_at_least_20_commands_are_found_in_the_documentation():
    assert len(list(commands())) >= 20


@pytest.mark.parametrize("script", [*PARSERS])
def test_an_unknown_flag_or_setting_is_an_error(script):
    required = {"train.py": [], "eval.py": ["zeroshot", "RUN"], "dit.py": ["latents", "RUN"],
                "study/study.py": ["race"]}
    words = required[script]
    PARSERS[script](words)
    with pytest.raises(SystemExit):
        PARSERS[script]([*words, "--unknown", "1"])
    with pytest.raises(SystemExit):
        PARSERS[script]([*words, "--set", "unknown=1"])


def listed_files():
    """Yield the files in the README's list, in its order. The entry vtp_min/extras/ is replaced by
    the files that are listed in vtp_min/extras/__init__.py."""
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"^([\w/]+(?:\.py|/))  +\S", text, re.M):
        if name == "vtp_min/extras/":
            yield from listed_extras()
        else:
            yield name


def listed_extras():
    text = (ROOT / "vtp_min/extras/__init__.py").read_text()
    return [f"vtp_min/extras/{name}" for name in re.findall(r"^    (\w+\.py)  +\S", text, re.M)]


def files_of(folder):
    """The Python files of a folder, as paths relative to the repository"""
    paths = (ROOT / folder).glob("*.py")
    return {path.relative_to(ROOT).as_posix() for path in paths if path.name != "__init__.py"}


def imported_files(file):
    """Yield the files that the statements "from ... import ..." of a file may refer to. They need
    not exist: "from a import b" may import a.py or a/b.py."""
    for node in ast.parse((ROOT / file).read_text()).body:
        if not isinstance(node, ast.ImportFrom):
            continue
        folders = ()
        if node.level:                                     # relative import with `level` dots
            folders = Path(file).parts[:-node.level]
        module = (node.module or "").split(".")
        base = "/".join([*folders, *module]).strip("/")
        yield f"{base}.py"
        for name in node.names:
            yield f"{base}/{name.name}.py"


def test_the_lists_of_files_are_complete():
    wanted = files_of("") | files_of("vtp_min") | files_of("vtp_min/extras")
    assert sorted(listed_files()) == sorted(wanted)


def test_a_file_imports_only_from_files_further_down_in_the_list():
    extras = set(listed_extras())
    order = [file for file in listed_files() if file not in extras]
    for k, file in enumerate(order):
        assert not set(order[:k + 1]) & set(imported_files(file)), file


def test_the_readme_has_at_most_10_kilobytes():
    assert (ROOT / "README.md").stat().st_size <= 10_000


def test_every_relative_link_in_the_documentation_leads_to_a_file():
    for page in PAGES:
        links = re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", page.read_text())
        for link in links:
            assert link.startswith("https://") or (page.parent / link).exists(), (page, link)


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")     # from autocast, without a GPU
def test_the_code_in_weights_md_runs_and_its_outputs_have_the_right_shapes(
        tmp_path, monkeypatch, capsys):
    """It runs in a folder with a small model and an image in place of the released weights."""
    monkeypatch.chdir(tmp_path)
    VTPModel(VTPConfig(**SMALL)).save_pretrained("VTP-Large-f16d64")
    Image.new("RGB", (300, 200), "orange").save("dog.png")
    text = (ROOT / "docs/weights.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    names = {}                                             # the variables of the code
    exec(code, names)

    shapes = {"latents": (1, 6, 16, 16), "recon": (1, 3, 256, 256), "image_features": (1, 32),
              "text_features": (4, 32), "text_probs": (1, 4), "cls_token": (1, 48),
              "patch_tokens": (1, 256, 48)}
    assert {name: tuple(names[name].shape) for name in shapes} == shapes
    assert Image.open("reconstructed.png").size == (256, 256)
    assert names["text_probs"].sum().isclose(torch.tensor(1.0))
    printed = capsys.readouterr().out
    assert printed.startswith("Vision Encoder: 0.2M\nPixel Decoder: 0.0M\nText Encoder: 0.0M\n"
                              "Label probs: ['0.")
    for i in range(1, 5):
        assert (f"Last {i} layers:\nPatch tokens shape: torch.Size([1, 256, 48])\n"
                f"Cls token shape: torch.Size([1, 48])\n") in printed
    # the last of the four is the last layer
    assert torch.equal(names["intermediate"][-1][1], names["cls_token"])


def test_the_three_lines_for_patch_features_in_weights_md_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    VTPModel(VTPConfig(**SMALL)).save_pretrained("runs/own")
    _, code = re.findall(r"```python\n(.*?)```", (ROOT / "docs/weights.md").read_text(), re.S)
    assert len(code.strip().split("\n")) == 3
    names = {"image": torch.randn(2, 3, 32, 64)}
    exec(code, names)
    assert names["patches"].shape == (2, 8, 48)
