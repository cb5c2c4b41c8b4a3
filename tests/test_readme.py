"""Every command that README, Makefile and study/ show is one that its script understands; its Python code runs."""
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

ROOT = Path(__file__).parents[1]
PARSERS = {"train.py": train.arguments, "eval.py": eval.arguments, "dit.py": lambda: dit.parse(sys.argv[1:])}


def commands():
    """-> (script, its words) of every line of code that calls one of our scripts; $NAMES become plain words"""
    text = "".join(re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S))
    text += "".join(path.read_text() for path in [ROOT / "Makefile", *sorted((ROOT / "study").glob("*.sh"))])
    text = re.sub(r"\$[({]?(\w+)[)}]?", r"\1", text.replace("\\\n", " "))
    for line in re.split(r"\n|&&", text):
        words = shlex.split(re.sub(r" \d?>.*", "", line), comments=True)
        for script in PARSERS:
            if script in words:
                yield pytest.param(script, words[words.index(script) + 1:], id=" ".join(words)[:80])


@pytest.mark.parametrize("script, words", list(commands()))
def test_a_command_that_we_show_is_understood(script, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script, *words])
    PARSERS[script]()


def test_no_command_hides_from_this_test():
    assert len(list(commands())) >= 20


def test_a_file_imports_only_from_files_further_down_in_the_table():
    order = re.findall(r"^\|[^|]*\| `([\w/]+\.py)` \|", (ROOT / "README.md").read_text(), re.M)
    there = {str(path.relative_to(ROOT)) for folder in (ROOT, ROOT / "vtp_min") for path in folder.glob("*.py")} - {"vtp_min/__init__.py"}
    assert sorted(order) == sorted(there)

    def imported(file):
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if isinstance(node, ast.ImportFrom):
                module = ("vtp_min." * bool(node.level) + (node.module or "")).strip(".")
                yield from [f"{module}/{name.name}.py" for name in node.names] if module == "vtp_min" else [module.replace(".", "/") + ".py"]
    for k, file in enumerate(order):
        assert not set(order[:k + 1]) & set(imported(file)), file


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")                       # what autocast says without CUDA
def test_the_quick_start_runs_and_gives_its_shapes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    VTPModel(VTPConfig(vision_embed_dim=48, vision_depth=5, vision_num_heads=2, vision_feature_bottleneck=6, text_embed_dim=32, text_num_heads=2, text_depth=1,
                       decoder_embed_dim=32, decoder_num_heads=2, decoder_depth=1)).save_pretrained("VTP-Large-f16d64")
    Image.new("RGB", (300, 200), "orange").save("dog.png")
    code, names = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1], {}
    exec(code, names)
    shapes = {name: tuple(names[name].shape) for name in ("latents", "recon", "image_features", "text_features", "text_probs", "cls_token", "patch_tokens")}
    assert shapes == {"latents": (1, 6, 16, 16), "recon": (1, 3, 256, 256), "image_features": (1, 32), "text_features": (4, 32), "text_probs": (1, 4),
                      "cls_token": (1, 48), "patch_tokens": (1, 256, 48)}
    assert Image.open("reconstructed.png").size == (256, 256) and names["text_probs"].sum().isclose(torch.tensor(1.0))
    printed = capsys.readouterr().out
    assert printed.startswith("Vision Encoder: 0.2M\nPixel Decoder: 0.0M\nText Encoder: 0.0M\nLabel probs: ['0.")
    for i in range(1, 5):
        assert f"Last {i} layers:\nPatch tokens shape: torch.Size([1, 256, 48])\nCls token shape: torch.Size([1, 48])\n" in printed
    assert torch.equal(names["intermediate"][-1][1], names["cls_token"])                   # the last of the four is the last layer
