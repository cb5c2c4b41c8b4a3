"""Every command that README, Makefile and study/ show is one that its script understands; the
Python code of the README runs."""
import ast
import re
import shlex
import sys
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


def parse_train(words):
    if "--baseline" in words:
        return baselines.parse_arguments(words)
    if "--stage" in words:
        return gan.parse_arguments(words)
    return train.arguments(words)


def parse_eval(words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["eval.py", *words])
        return eval.arguments()


# each exits, or raises ValueError, if it does not know a flag
PARSERS = {"train.py": parse_train, "eval.py": parse_eval, "dit.py": dit.parse}


def code_that_we_show():
    """The shell code of README, Makefile and study/, with the variables that hold several flags
    replaced by their flags"""
    text = "".join(re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S))
    for path in [ROOT / "Makefile", *sorted((ROOT / "study").glob("*.sh"))]:
        code = path.read_text()
        for name, flags in re.findall(r'^(\w+)="(--.*)"$', code, re.M):
            code = code.replace(f"${name}", flags)
        text += code
    return text


def commands():
    """-> (script, its words) of every line of code that calls one of our scripts; the remaining
    $NAMES become plain words"""
    text = code_that_we_show().replace("\\\n", " ")
    text = re.sub(r"\$[({]?(\w+)[)}]?", r"\1", text)
    for line in re.split(r"\n|&&", text):
        words = shlex.split(re.sub(r" \d?>.*", "", line), comments=True)
        for script in PARSERS:
            if script in words:
                own = words[words.index(script) + 1:]
                yield pytest.param(script, own, id=" ".join(words)[:80])


@pytest.mark.parametrize("script, words", list(commands()))
def test_a_command_that_we_show_is_understood(script, words):
    PARSERS[script](words)


def test_no_command_hides_from_this_test():
    assert len(list(commands())) >= 20


@pytest.mark.parametrize("script", [*PARSERS])
def test_an_unknown_flag_is_refused(script):
    words = {"train.py": [], "eval.py": ["zeroshot", "RUN"], "dit.py": ["latents", "RUN"]}[script]
    PARSERS[script](words)
    with pytest.raises(SystemExit):
        PARSERS[script]([*words, "--unknown", "1"])
    with pytest.raises(SystemExit):
        PARSERS[script]([*words, "--set", "unknown=1"])


def table_of_files():
    """The files of the README's table, in its order"""
    text = (ROOT / "README.md").read_text()
    return re.findall(r"^\|[^|]*\| `([\w/]+\.py)` \|", text, re.M)


def files_of(folder):
    """Its Python files, relative to the repository"""
    paths = (ROOT / folder).glob("*.py")
    return {path.relative_to(ROOT).as_posix() for path in paths if path.name != "__init__.py"}


def imported_files(file):
    """Files that may be imported when this file is imported"""
    for node in ast.parse((ROOT / file).read_text()).body:
        if not isinstance(node, ast.ImportFrom):
            continue
        above = Path(file).parts[:-node.level] if node.level else ()
        base = "/".join([*above, *(node.module or "").split(".")]).strip("/")
        yield f"{base}.py"
        yield from (f"{base}/{name.name}.py" for name in node.names)


def test_the_table_names_every_file():
    wanted = files_of("") | files_of("vtp_min") | files_of("vtp_min/extras")
    assert sorted(table_of_files()) == sorted(wanted)


def test_a_file_imports_only_from_files_further_down_in_the_table():
    order = table_of_files()
    for k, file in enumerate(order):
        assert not set(order[:k + 1]) & set(imported_files(file)), file


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")      # what autocast says without CUDA
def test_the_quick_start_runs_and_gives_its_shapes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = VTPConfig(vision_embed_dim=48, vision_depth=5, vision_num_heads=2,
                       vision_feature_bottleneck=6, text_embed_dim=32, text_num_heads=2,
                       text_depth=1, decoder_embed_dim=32, decoder_num_heads=2, decoder_depth=1)
    VTPModel(config).save_pretrained("VTP-Large-f16d64")
    Image.new("RGB", (300, 200), "orange").save("dog.png")
    text = (ROOT / "README.md").read_text()
    code, names = re.search(r"```python\n(.*?)```", text, re.S)[1], {}
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
