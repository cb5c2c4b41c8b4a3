"""A model card: README.md beside config.json and model.safetensors, as the Hugging Face Hub shows
it.   https://huggingface.co/docs/hub/model-cards

    write(folder)    write the card, or write it anew; a README.md of the user is never replaced
    update(folder)   the same if the folder holds a card of ours: after each new number

What the card says is read from run.json, log.jsonl and metrics.jsonl in the same folder.
"""
import json
import textwrap
from pathlib import Path

from ..config import atomic_write
from ..dist import print0
from .files import read_json, read_json_lines

# A card with this line is ours, and is written anew. Without it the file belongs to the user.
MARK = "<!-- Written by vtp_min. Delete this line if you edit the text: then it stays as it is. -->"
PAPER = "https://arxiv.org/abs/2512.13687"
# settings without meaning for others: paths on this machine, speed
LEFT_OUT = {"out", "fresh", "data", "val_data", "init", "encoder", "steps", "workers", "device",
            "machine", "save_every", "log_every", "recompute", "compile", "free_memory", "fast",
            "memory_check"}
# values of a log line that are not losses
NOT_LOSSES = {"step", "lr", "grad_norm", "images_per_s", "gflops", "share_of_peak", "data_wait",
              "bad", "skipped", "weight_decay", "warning", "perceptual"}


def update(folder):
    if is_ours(Path(folder, "README.md")):
        write(folder)


def write(folder):
    """Write FOLDER/README.md, unless a file without our mark has this name. If that fails, training
    or evaluation goes on: the weights do not depend on the card."""
    path = Path(folder, "README.md")
    if path.exists() and not is_ours(path):
        return
    try:
        text = card(Path(folder))
        atomic_write(path, lambda temporary: temporary.write_text(text, "utf-8"))
    except (OSError, ValueError) as problem:
        print0(f"(no model card: {problem})")


def is_ours(path):
    return path.is_file() and MARK in path.read_text("utf-8", "replace")


def card(folder):
    """-> the text of the card"""
    config = read_json(folder / "config.json", "")
    settings = {}
    if (folder / "run.json").exists():
        settings = read_json(folder / "run.json", "")
    log = read_json_lines(folder / "log.jsonl", lambda line: isinstance(line.get("step"), int))
    metrics = read_json_lines(folder / "metrics.jsonl", lambda line: "protocol" in line)
    parts = [front_matter(config), MARK, f"# {folder.resolve().name}", model(config),
             "## Training", training(settings, log), "## Numbers", numbers(metrics),
             "## Use", usage(config)]
    return "\n\n".join(parts) + "\n"


def front_matter(config):
    """The metadata of the Hub, in YAML. The licence of the weights is the user's decision."""
    tags = ["vtp", "visual-tokenizer"]
    if config.get("train_clip"):
        tags.append("clip")
    lines = ["# license: choose one, for example mit, and delete the first two signs of this line",
             "library_name: vtp_min"]
    if config.get("model_type") == "vtp":
        lines.append("pipeline_tag: image-feature-extraction")
    return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def model(config):
    if config.get("model_type") != "vtp":
        return (f"A convolutional auto-encoder ({config.get('model_type')}), a baseline of VTP "
                f"([paper]({PAPER})), trained with vtp_min, an unofficial implementation.")
    latents = config.get("vision_feature_bottleneck") or config["vision_embed_dim"]
    text = "with a text tower" if config.get("train_clip") else "without a text tower"
    decoder = "with" if config.get("train_reconstruction") else "without"
    return (f"A visual tokenizer of the kind of VTP ([paper]({PAPER})), trained with vtp_min, an "
            f"unofficial implementation. Its vision transformer has width "
            f"{config['vision_embed_dim']}, {config['vision_depth']} blocks and patches of "
            f"{config['vision_patch_size']} px. A patch has {latents} latent channels. It was made "
            f"for images of {config['image_size']} px, {decoder} a pixel decoder, {text}.")


def training(settings, log):
    if not settings:
        return "The folder holds no `run.json`, so nothing is known about the training."
    lines = [f"- Data: {name_of(settings.get('data'))}"]
    start = settings.get("init") or settings.get("encoder")
    if start:
        lines.append(f"- Start: the weights of {name_of(start)}")
    if log:
        losses = {name: value for name, value in log[-1].items() if name not in NOT_LOSSES}
        lines.append(f"- Steps: {log[-1]['step']} of {settings.get('steps')}")
        lines.append("- Losses and diagnostics of the last logged step: "
                     + ", ".join(f"{name} {value}" for name, value in losses.items()))
    others = {name: value for name, value in settings.items() if name not in LEFT_OUT}
    text = ", ".join(f"{name} {json.dumps(value)}" for name, value in others.items())
    return "\n".join([*lines, "- Settings:", "", "```", textwrap.fill(text, 98), "```"])


def name_of(data):
    """The built-in data, or the last part of a path: the rest says nothing to others"""
    return data if str(data).startswith("shapes") else Path(str(data)).name


def numbers(metrics):
    """A table of the newest value of each measure, with its protocol"""
    if not metrics:
        return ("Nothing has been measured. `python eval.py probe`, `zeroshot` and `recon` with "
                "this folder add their numbers here.")
    newest = {(m.get("name"), m["protocol"]): m.get("value") for m in metrics}
    rows = [f"| {name} | {value} | {protocol.replace('|', '/')} |"
            for (name, protocol), value in newest.items()]
    return "\n".join(["| measure | value | protocol |", "|---|---|---|", *rows])


def usage(config):
    if config.get("model_type") != "vtp":
        code = ["from vtp_min.model import load_model", 'model = load_model("FOLDER")']
    else:
        code = ["from vtp_min import VTPModel",
                'model = VTPModel.from_pretrained("FOLDER")       # or OWNER/NAME on the Hub',
                'patches = model.get_last_layer_feature(image)["patch_tokens"]    # (B, N, D)']
    return "\n".join(["In the folder of vtp_min, with images (B, 3, H, W) that are normalised with "
                      "ImageNet's mean and standard deviation:", "", "```python", *code, "```"])
