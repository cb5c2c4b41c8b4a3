"""Write one HTML page about a run: settings, training curves, and outputs on validation images.

    RUN/report.html     self-contained: the images are embedded; no scripts, no external files
    RUN/report/*.png    the same images as files, for slides

The template report.html next to this file contains the text and the style of the page. Each section
has one function here, which returns HTML. The content is read from the run folder or computed from
validation images. If a run has no content for a section (no decoder, no text tower, no samples),
the section states the reason.

n images    S side of an image    N = h*w patches    D width    H attention heads of c channels
d latent channels    E width of the CLIP space    C class names, or channels
"""
import base64
import html
import io
import math
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from string import Template

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image

from .. import vit
from ..augment import denormalize, normalize
from ..config import atomic_write
from ..fid import MAX_PSNR, psnr
from ..model import VTPModel
from ..probes import text_encoder, zero_shot_classifier
from .files import check_writable, read_json_lines, read_names, read_settings, reading
from .grid import GAP, image_grid
from .images import read_image
from .previews import preview_classes, preview_files, read_preview
from .sample_folder import image_path, read_summary

PAGE = Path(__file__).parent / "report.html"
GALLERY = 256          # maximum number of images; nearest neighbours are searched among them
BLUE, ORANGE, GREEN = "#2f5fd0", "#d9772b", "#2c9a58"
# logged quantities that are not plotted
NOT_PLOTTED = {"step", "seconds", "weight_decay", "bad", "images_per_s", "gflops", "share_of_peak",
               "data_wait"}
# {objective: (setting of its loss weight, setting of its batch size)}
OBJECTIVES = {"CLIP": ("w_clip", "batch"), "SSL": ("w_ssl", "batch_ssl"),
              "AE": ("w_rec", "batch_rec")}
esc = html.escape


@dataclass
class EvalBatch:
    """Validation images with their features"""
    model: VTPModel
    source: object               # data source of data.open_data
    images: torch.Tensor         # (n, 3, S, S) uint8, center crops
    labels: torch.Tensor         # (n,); -1: unknown
    captions: list               # n strings
    features: torch.Tensor       # (n, D), unit length: class tokens or mean patches
    latents: torch.Tensor        # (n, d): mean latent of each image
    uses_class_token: bool       # True: `features` are class tokens
    order: list                  # random order of 0..n-1 in which the classes alternate

    def first(self, count, count_if_large):
        """Select the first k images of `order`.

        k is `count`, or `count_if_large` if the sides of the images exceed 128 pixels.
        -> images (k, 3, S, S) in [0, 1], and the same ImageNet-normalised on the model's device
        """
        k = count if self.images.shape[-1] <= 128 else count_if_large
        chosen = self.images[self.order[:k]]
        return chosen / 255, normalize(chosen.to(device_of(self.model)))


@torch.no_grad()
def write_report(run, open_data, eval_batches, get_tokenizer, data=None, val_data=None,
                 device=None, dit=None, seed=0):
    """Write the report of a run folder -> Path of report.html

    open_data, eval_batches, get_tokenizer
                    functions of data.py and tokenizer.py
    data, val_data  as in train.py; None: the data of the run
    device          device of the model; None: cpu
    dit             output folder of dit.py train; None: RUN/dit
    seed            random seed for the choice of the images that are shown
    ValueError if the weights or the validation images are missing.
    """
    run = Path(run)
    dit = Path(dit or run / "dit")
    if not (run / "model.safetensors").exists():
        raise ValueError(f"{run} contains no model.safetensors; give the output folder of a "
                         f"training: python train.py --out {run}")
    settings = read_settings(run)
    data = data or settings.get("data")
    val_data = val_data or settings.get("val_data")
    if not (data or val_data):
        raise ValueError(f"{run} has no run.json that names its training data; give the "
                         f"validation images: --val-data DIR")
    save = image_saver(run / "report")
    model = VTPModel.from_pretrained(run).to(device or "cpu")
    source = open_data(val_data or data, "val", side=model.config.image_size, whole=bool(val_data))
    batch = encode_images(model, settings, eval_batches, source, seed)
    log = read_json_lines(run / "log.jsonl", lambda line: isinstance(line.get("step"), int))
    page = Template(PAGE.read_text("utf-8")).substitute(
        title=esc(title_of(settings, model)),
        folder=esc(str(run)),
        settings=settings_table(batch, settings, log),
        metrics=metrics_table(run, dit),
        curves=curves(save, settings, log),
        previews=previews(save, dit),
        samples=samples(save, dit),
        **model_sections(save, batch, get_tokenizer))
    atomic_write(run / "report.html", lambda path: path.write_text(page, encoding="utf-8"))
    return run / "report.html"


def model_sections(save, batch, get_tokenizer):
    """-> {placeholder in the template: HTML} of the sections that show outputs of the model"""
    sections = {"reconstructions": reconstructions, "patch_features": patch_features,
                "attention": attention_maps, "neighbours": neighbours,
                "zero_shot": partial(zero_shot, get_tokenizer=get_tokenizer)}
    if batch.features.isfinite().all() and batch.latents.isfinite().all():
        return {name: section(save, batch) for name, section in sections.items()}
    return dict.fromkeys(sections, missing("The features of this model are not finite (nan or "
                                           "inf), so they cannot be shown."))


def encode_images(model, settings, eval_batches, source, seed):
    """Encode up to GALLERY validation images with the trunk -> EvalBatch"""
    c = model.config
    # A class token that no loss reads is untrained: use the mean patch as the feature instead.
    clip_reads_class_token = c.train_clip and c.vision_clip_feat == "cls"
    uses_class_token = settings.get("w_ssl", 0) > 0 or clip_reads_class_token
    images, labels, captions, features, latents = [], [], [], [], []
    for img, label, caption in eval_batches(source, c.image_size, 16, limit=GALLERY):
        cls, patches = model.trunk(normalize(img.to(device_of(model))))     # (b, D), (b, N, D)
        feature = cls if uses_class_token else patches.mean(1)
        images.append(img)
        labels.append(label)
        captions += caption
        features.append(F.normalize(feature, dim=-1).cpu())
        latents.append(model.trunk.feature_bottleneck(patches).mean(1).cpu())
    if len(captions) < 2:
        raise ValueError(f"{source.spec} has {len(captions)} readable validation images, but at "
                         f"least 2 are needed; give other images with --val-data")
    labels = torch.cat(labels)
    return EvalBatch(model, source, torch.cat(images), labels, captions, torch.cat(features),
                     torch.cat(latents), uses_class_token, alternating_order(labels, seed))


def alternating_order(labels, seed):
    """labels (n,) -> a random order of 0..n-1: one image of each class first, then a second one of
    each class, and so on"""
    rng = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=rng).tolist()
    counts = Counter()
    position = {}                              # number of earlier images of the same class
    for i in shuffled:
        label = int(labels[i])
        position[i] = counts[label]
        counts[label] += 1
    return sorted(shuffled, key=position.get)  # a stable sort: within a position, still random


# ---------------------------------------------------------------- computations
def pca_rgb(x):
    """Map features to colours: their first three principal components as red, green and blue.

    x (n, h, w, C) -> colours (n, 3, h, w) in [0, 1], fraction of the variance that they explain
    Each component is scaled so that 2 % of the patches are clipped at either end. The sign of a
    principal component is arbitrary; here, its largest coordinate is positive.
    """
    flat = x.cpu().double().flatten(0, 2)                               # (n*h*w, C)
    flat = flat - flat.mean(0)
    variances, axes = torch.linalg.eigh(flat.T @ flat)                  # ascending
    axes = axes[:, -3:].flip(1)                                         # (C, 3)
    largest = axes.abs().argmax(0, keepdim=True)                        # (1, 3)
    y = flat @ (axes * axes.gather(0, largest).sign())                  # (n*h*w, 3)
    low, high = y.quantile(torch.tensor([0.02, 0.98]).to(y), dim=0)
    y = ((y - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)         # 1e-12: equal features
    rgb = y.float().view(*x.shape[:3], 3).permute(0, 3, 1, 2)           # (n, 3, h, w)
    explained = variances[-3:].sum() / variances.sum().clamp_min(1e-12)
    return rgb.cpu(), explained.item()


def class_attention(trunk, img):
    """Attention weights of the class token in the last block

    img (n, 3, S, S), ImageNet-normalised -> (n, H, 1+N); the first weight is that of the class
    token on itself, and the weights of each head sum to 1
    The fused attention function does not return its weights, so they are computed again from the
    input of the block.
    """
    *_, x, _ = trunk.layers(img)                                        # input of the last block
    h, w = trunk.patch_embed(img).shape[-2:]
    block = trunk.blocks[-1]
    qkv = block.attn.qkv(block.norm1(x))                                # (n, 1+N, 3D)
    qkv = qkv.unflatten(-1, (3, block.attn.heads, -1))                  # (n, 1+N, 3, H, c)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)                                # each (n, H, 1+N, c)
    rope = trunk.rope_embed(h, w, prefix=1)
    q = vit.rotate(block.attn.q_norm(q), *rope)
    k = vit.rotate(block.attn.k_norm(k), *rope)
    logits = q[:, :, :1] @ k.mT / math.sqrt(q.shape[-1])                # (n, H, 1, 1+N)
    return logits.softmax(-1).squeeze(2)


def nearest_neighbours(x, k=5):
    """x (n, C) -> (n, k): indices of the k nearest other rows

    Euclidean distance; for vectors of unit length this is the same order as by cosine similarity.
    """
    distance = torch.cdist(x, x).fill_diagonal_(math.inf)
    return distance.topk(min(k, len(x) - 1), largest=False).indices


# ---------------------------------------------------------------- settings and numbers
def title_of(settings, model):
    """-> title of the page, for example 'CLIP + SSL + AE, size nano'"""
    names = [name for name, (weight, _) in OBJECTIVES.items() if settings.get(weight, 0) > 0]
    if names:
        return f"{' + '.join(names)}, size {setting_text(settings, 'size')}"
    return f"VTP, {model.config.vision_depth} blocks of width {model.config.vision_embed_dim}"


def settings_table(batch, settings, log):
    """-> HTML: model, images and, if run.json exists, the settings of the training"""
    c = batch.model.config
    grid = c.image_size // c.vision_patch_size
    d = batch.latents.shape[1]
    compression = 3 * c.image_size ** 2 / (d * grid ** 2)
    rows = {
        "parameters": parameter_counts(batch.model),
        "images": f"{c.image_size} x {c.image_size} pixels, "
                  f"patches of {c.vision_patch_size} x {c.vision_patch_size}",
        "latents": f"{d} x {grid} x {grid}: {compression:.3g} times fewer values than the image",
        "validation data": f"{len(batch.images)} images of {batch.source.spec}",
    }
    if settings:
        rows |= training_rows(settings, log)
    cells = [f"<div><dt>{name}<dd>{esc(value)}</div>" for name, value in rows.items()]
    return "<dl>" + "".join(cells) + "</dl>"


def parameter_counts(model):
    """-> text, for example 'trunk 1.50 M, text tower 6.99 M'"""
    # {part: start of the names of its parameters}
    parts = {"trunk": "trunk", "decoder": "pixel_decoder",
             "text tower": ("text", "token", "pos", "ln_final")}
    counts = []
    for part, prefixes in parts.items():
        n = sum(p.numel() for name, p in model.named_parameters() if name.startswith(prefixes))
        if n:
            counts.append(f"{part} {n / 1e6:.2f} M")
    return ", ".join(counts)


def training_rows(settings, log):
    """-> {name: text} for the settings table"""
    weights = []
    batch_sizes = []
    for name, (weight, batch_size) in OBJECTIVES.items():
        if settings.get(weight, 0) > 0:
            weights.append(f"{name} {settings[weight]:g}")
            batch_sizes.append(f"{name} {setting_text(settings, batch_size, ',')}")
    machine = setting_text(settings, "machine")
    speed = values_of(log, "images_per_s")
    if speed:
        machine += f", {np.median(speed):,.0f} images per second"
    step = log[-1]["step"] if log else 0
    return {
        "training data": setting_text(settings, "data"),
        "steps": f"{step:,} of {setting_text(settings, 'steps', ',')}",
        "loss weights": ", ".join(weights),
        "images per step": ", ".join(batch_sizes),
        "machine": machine,
        "learning rate, seed": f"{setting_text(settings, 'lr', 'g')}, "
                               f"{setting_text(settings, 'seed')}",
    }


def setting_text(settings, name, form=""):
    """-> a setting as text. form: as in format(). run.json of another version may lack it."""
    return format(settings[name], form) if name in settings else "unknown"


def metrics_table(run, dit):
    """-> HTML: the latest value of each metric of the run, its DiT and its samples"""
    latest = latest_metrics([run, dit, dit / "samples"])
    if not latest:
        return missing("There are no metrics yet; eval.py zeroshot, probe, recon and fid compute "
                       "them.")
    rows = []
    for name in sorted(latest, key=str.lower):
        value = format_number(latest[name]["value"])
        rows.append(f"<tr><td>{esc(name)}<td>{value}<td>{esc(latest[name]['protocol'])}")
    return "<table><tr><th>metric<th>value<th>protocol" + "".join(rows) + "</table>"


def latest_metrics(folders):
    """-> {name: last line with this name} of the files metrics.jsonl in these folders"""
    latest = {}
    for folder in folders:
        for line in read_json_lines(Path(folder, "metrics.jsonl"), is_metric):
            latest[line["name"]] = line
    return latest


def is_metric(line):
    """True for a line of record_metric: a name, a number and a protocol"""
    texts = isinstance(line.get("name"), str) and isinstance(line.get("protocol"), str)
    return texts and is_number(line.get("value"))


def format_number(value):
    """-> text with four digits, or an integer with commas from 10,000 on"""
    if isinstance(value, str):                 # JSON has no nan and inf: they are stored as strings
        return esc(value)
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


# ---------------------------------------------------------------- training curves
def curves(save, settings, log):
    """-> HTML: one plot for each logged quantity"""
    if not log:
        return missing("There is no log.jsonl with readable lines in this folder.")
    titles = curve_titles(settings)
    logged = set()
    for line in log:
        logged |= {name for name, value in line.items() if is_number(value)}
    logged -= NOT_PLOTTED
    names = [name for name in titles if name in logged]
    names += sorted(logged - set(titles))      # other quantities; their title is their name
    image = save("curves", plot_curves(log, names, titles), "training curves")
    return (f"{image}<figcaption>B: images per step. K: prototypes. Half of the crops have no "
            f"masked patches, so ibot starts at half of ln K. The number at the right is the last "
            f"value.</figcaption>")


def is_number(value):
    """True for numbers and for the strings that stand for nan and inf"""
    return isinstance(value, (int, float)) or value in ("nan", "inf", "-inf")


def values_of(log, name):
    """-> list of the finite values of a logged quantity"""
    values = [float(line[name]) for line in log if is_number(line.get(name))]
    return [value for value in values if math.isfinite(value)]


def curve_titles(settings):
    """-> {name in the log: (title, value of the dashed line or None, label of the line)}

    ln B and ln K are the losses of a model that assigns equal probabilities to all B captions or
    all K prototypes.
    """
    lnB = math.log(settings["batch"]) if "batch" in settings else None
    lnK = math.log(settings["prototypes"]) if "prototypes" in settings else None
    has_lnB = settings.get("clip_loss") == "clip"             # SigLIP has no such value
    perceptual = {"none": "", "efficientnet": " + EfficientNet's distance, not LPIPS"}
    rec = "rec: L1" + perceptual.get(settings.get("perceptual"), " + LPIPS")
    return {
        "clip": ("clip", lnB if has_lnB else None, "ln B"),
        "dino": ("dino", lnK, "ln K"),
        "ibot": ("ibot", lnK and lnK / 2, "½ ln K"),
        "rec": (rec, None, ""),
        "koleo": ("koleo", None, ""),
        "teacher_entropy": ("teacher entropy", lnK, "ln K"),
        "feature_std": ("feature std", 0, "all equal"),
        "loss": ("total loss", None, ""),
        "lr": ("learning rate", None, ""),
        "grad_norm": ("gradient norm", settings.get("clip_grad"), "clipped above"),
        "logit_scale": ("logit scale of clip", None, ""),
    }


STYLE = {"font.size": 13, "axes.titlesize": 14, "axes.spines.top": False,
         "axes.spines.right": False, "axes.edgecolor": "#9aa1ad", "axes.grid": True,
         "grid.color": "#eceef2", "xtick.color": "#5b6372", "ytick.color": "#5b6372",
         "figure.constrained_layout.h_pad": 0.1}


def plot_curves(log, names, titles):
    """Plot the curve of each name, four in a row -> PIL.Image

    log     list of dicts; a value may be missing in some lines
    titles  see curve_titles
    """
    rows = math.ceil(len(names) / 4)
    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=(13, 2.6 * rows), layout="constrained")
        for number, name in enumerate(names, start=1):
            points = [(line["step"], float(line[name])) for line in log
                      if is_number(line.get(name))]
            title = titles.get(name, (name, None, ""))
            plot_curve(fig.add_subplot(rows, 4, number), points, *title)
        file = io.BytesIO()
        fig.savefig(file, dpi=115)
    return Image.open(file).convert("RGB")


def plot_curve(ax, points, title, level, level_label):
    """Plot values as a pale line, their running mean as a dark line, and `level` as a dashed line.

    points  list of (step, value)
    level   a reference value, or None
    """
    x, y = np.array(points).T
    window = max(1, len(y) // 10)              # of the running mean: a tenth of the points
    mean = np.convolve(y, np.ones(window) / window, "valid")
    ax.plot(x, y, color=BLUE, alpha=0.3, lw=1.2)
    ax.plot(x[window // 2:][:len(mean)], mean, color=BLUE, lw=2.2)
    if level is not None:
        ax.axhline(level, color=ORANGE, ls="--", lw=1.6)
        ax.annotate(level_label, (1, level), (0, 3), ("axes fraction", "data"), "offset points",
                    color=ORANGE, ha="right")
    ax.set_title(title, loc="left", fontweight="bold")
    ax.set_title(f"{y[-1]:.3g}", loc="right", color=BLUE)
    ax.margins(0.02, 0.15)


# ---------------------------------------------------------------- reconstruction and feature maps
def reconstructions(save, batch):
    """-> HTML: images, their reconstructions and the difference, in three rows"""
    model = batch.model
    if not model.config.train_reconstruction:
        return missing("This run was trained without reconstruction loss (--w-rec 0), so it has no "
                       "decoder.")
    img, x = batch.first(8, 3)
    z = model.get_reconstruction_latents(x)                              # (k, d, h, w)
    out = denormalize(model.get_latents_decoded_images(z)).clamp(0, 1).cpu()
    difference = (4 * (img - out).abs()).clamp(0, 1)
    rows = {"image": img, "reconstruction": out, "difference x 4": difference}
    mean = psnr(img, out).clamp(max=MAX_PSNR).mean()
    caption = (f"Mean PSNR of these {len(img)} images: {mean:.1f} dB (exact images count as "
               f"{MAX_PSNR}).")
    return figure(save, "reconstructions", rows, caption, side=max(128, model.config.image_size))


def patch_features(save, batch):
    """-> HTML: images, and the principal components of their patch features and latents"""
    model = batch.model
    c = model.config
    img, x = batch.first(8, 6)
    h = c.image_size // c.vision_patch_size
    patches = model.trunk(x)[1].unflatten(1, (h, -1))                    # (k, h, w, D)
    colours, explained = pca_rgb(patches)
    rows = {"image": img, f"features, {patches.shape[-1]}-d": resize(colours, c.image_size)}
    caption = f"The colours explain {explained:.0%} of the variance of the features"
    if not c.train_reconstruction:
        caption += "; the latents of this run are untrained (--w-rec 0) and are not shown."
        return figure(save, "features", rows, caption)
    latents = model.trunk.feature_bottleneck(patches)                    # (k, h, w, d)
    colours, explained = pca_rgb(latents)
    rows[f"latents, {batch.latents.shape[1]}-d"] = resize(colours, c.image_size)
    return figure(save, "features", rows,
                  f"{caption}, and {explained:.0%} of the variance of the latents.")


def attention_maps(save, batch):
    """-> HTML: images, and the attention of the class token: mean of all heads, first four heads"""
    c = batch.model.config
    img, x = batch.first(8, 6)
    heads = class_attention(batch.model.trunk, x)[:, :, 1:].cpu()        # (k, H, N): to patches
    maps = torch.cat([heads.mean(1, keepdim=True), heads[:, :4]], 1)     # (k, 1 + 4, N)
    maps = maps / maps.amax(-1, keepdim=True)
    maps = maps.unflatten(2, (c.image_size // c.vision_patch_size, -1))  # (k, 1 + 4, h, w)
    maps = resize(maps, c.image_size)
    gray = img.mean(1, keepdim=True)
    rows = {"image": img}
    for i in range(maps.shape[1]):
        heat = matplotlib.colormaps["inferno"](maps[:, i].numpy())[..., :3]      # (k, S, S, 3)
        heat = torch.from_numpy(heat).permute(0, 3, 1, 2)
        name = f"head {i}" if i else "mean of all heads"
        rows[name] = (0.35 * gray + 0.65 * heat).float()
    caption = ""
    if not batch.uses_class_token:
        caption = "No loss reads the class token of this run, so its attention is untrained."
    return figure(save, "attention", rows, caption)


# ---------------------------------------------------------------- zero-shot classification
def zero_shot(save, batch, get_tokenizer):
    """-> HTML: images with the most probable texts and their probabilities"""
    model = batch.model
    if not model.config.train_clip:
        return missing("This run was trained without CLIP loss (--w-clip 0), so it has no text "
                       "tower.")
    names, true_names, templates, caption = candidates(batch)
    if len(set(names)) < 2:
        return missing("There is only one class name, so the model has nothing to tell apart.")
    encode = text_encoder(model, device_of(model), get_tokenizer)
    W = zero_shot_classifier(encode, names, templates)                   # (E, C)
    img, x = batch.first(6, 6)
    features = model.get_clip_image_feature(x, normalize=True)           # (k, E)
    probabilities = (100 * features @ W).softmax(-1).cpu()               # (k, C)
    n_answers = 5 if batch.source.classes else 3                         # captions are long
    n_correct = 0
    cards = []
    for i, tile in enumerate(resize(img, 128)):
        true_name = true_names[batch.order[i]]
        best = probabilities[i].topk(min(n_answers, len(names)))
        answers = [names[j] for j in best.indices]
        n_correct += answers[0] == true_name
        image = save(f"zero-shot-{i + 1}", Image.fromarray(to_uint8(tile)), true_name)
        cards.append(f"<div class=card>{image}<div><b>{esc(true_name)}</b>"
                     f"{bars(answers, best.values.tolist(), true_name)}</div></div>")
    return (f"<div class=cards>{''.join(cards)}</div><figcaption>{n_correct} of {len(img)} first "
            f"answers are correct. {esc(caption)}</figcaption>")


def candidates(batch):
    """-> texts to choose from, true text of each image, prompt templates, caption of the section

    The texts are the class names, or the captions if the data has no classes.
    """
    names = batch.source.classes
    if not names:
        names = sorted(set(batch.captions))
        caption = (f"These images have no classes, so the model chooses among the {len(names)} "
                   f"captions of the validation images.")
        return names, batch.captions, ["{}"], caption
    true_names = [names[i] if i >= 0 else "" for i in batch.labels]
    templates = batch.source.templates
    templates = templates[::max(1, len(templates) // 8)]     # about 8, to save time
    prompt = templates[0].replace("{}", names[0])
    caption = f"{len(names)} class names in {len(templates)} prompts each, such as “{prompt}”."
    return names, true_names, templates, caption


def bars(answers, probabilities, true_name):
    """-> HTML: a bar for each answer; the correct answer has a different colour"""
    rows = []
    for answer, p in zip(answers, probabilities):
        mark = " class=correct" if answer == true_name else ""
        rows.append(f"<li{mark}><i style='width:{p:.1%}'></i>"
                    f"<span>{esc(answer)}</span><span>{p:.0%}</span>")
    return f"<ol>{''.join(rows)}</ol>"


# ---------------------------------------------------------------- nearest neighbours, samples
def neighbours(save, batch):
    """-> HTML: four images, each with its nearest neighbours by features and by latents"""
    feature = "class token" if batch.uses_class_token else "mean patch"
    spaces = {f"by {feature}": nearest_neighbours(batch.features)}
    if batch.model.config.train_reconstruction:
        spaces["by mean latent"] = nearest_neighbours(batch.latents)
    has_classes = batch.source.classes and bool((batch.labels >= 0).all())
    same_class = batch.labels[:, None] == batch.labels                   # (n, n)
    tiles = resize(batch.images / 255, default_side(batch.images))
    gap = torch.ones_like(tiles[0, :, :, ::4])                           # white, a quarter as wide
    queries = batch.order[:4]
    rows = []
    for i in queries:
        row = [tiles[i]]
        for neighbour_index in spaces.values():                          # (n, 5)
            row.append(gap)
            for j in neighbour_index[i]:
                in_class = has_classes and same_class[i, j]
                row.append(add_frame(tiles[j]) if in_class else tiles[j])
        rows.append(row)
    caption = f"Searched among {len(tiles)} images; cosine for features, Euclidean for latents."
    labels = [""] * len(queries)
    if has_classes:
        caption += neighbour_accuracy(same_class, spaces)
        labels = [batch.source.classes[batch.labels[i]] for i in queries]
    header = ["image"]
    for name in spaces:
        header += ["", name]
    k = min(5, len(tiles) - 1)
    widths = "1fr" + f" .25fr {k}fr" * len(spaces)
    return image_figure(save, "neighbours", rows, labels, caption, header, widths)


def neighbour_accuracy(same_class, spaces):
    """same_class (n, n) bool, spaces {name: (n, k) indices of neighbours} -> text of the caption"""
    n = len(same_class)
    chance = (same_class.sum() - n) / (n ** 2 - n)           # without the n images themselves
    accuracies = []
    for name, neighbour_index in spaces.items():
        accuracy = same_class.gather(1, neighbour_index).float().mean()
        accuracies.append(f"{name} {accuracy:.0%}")
    return (f" A green frame marks a neighbour of the same class. Fraction of such neighbours over "
            f"all images: {', '.join(accuracies)}; by chance {chance:.0%}.")


def previews(save, dit):
    """-> HTML: samples at up to eight training steps, one column per step, one row per class"""
    files = preview_files(dit)
    if not files:
        return missing(f"There are no images in {dit / 'previews'}. dit.py train writes them at "
                       f"steps 50, 100, 200, 400, ... and at the last one, if it finds the "
                       f"tokenizer, and without --set previews=0.")
    steps = list(files)
    if len(steps) > 8:
        steps = [steps[round(i * (len(steps) - 1) / 7)] for i in range(8)]
    rows = {}
    try:
        names = read_names(dit / "classes.json", f"repeat the command dit.py train --out {dit}")
        # (n, steps, 3, S, S)
        images = torch.stack([read_preview(files[step]) for step in steps], dim=1)
        for label, strip in zip(preview_classes(len(names)), images):
            rows[names[label]] = list(resize(strip, 96))
    except (ValueError, RuntimeError) as problem:            # RuntimeError: images of two sizes
        return missing(f"The previews cannot be shown: {problem}")
    # columns of the header are as wide as the images
    width = next(iter(rows.values()))[0].shape[-1] + GAP
    caption = (f"EMA weights of {dit} after {', '.join(map(str, steps))} steps, 20 Euler steps "
               f"without guidance, the same noise in each column.")
    header = [f"step {step}" for step in steps]
    return image_figure(save, "previews", list(rows.values()), list(rows), caption, header,
                        f"{width}px " * len(steps))


def samples(save, dit):
    """-> HTML: generated images, one row for each of the first eight classes"""
    folder = dit / "samples"
    if not (folder / "labels.json").exists():
        return missing(f"There are no samples in {folder} yet; to generate them, run dit.py "
                       f"latents, dit.py train and dit.py sample, in this order.")
    rows = {}
    try:
        info = read_summary(folder)
        for label in sorted(set(info["labels"]))[:8]:
            indices = [j for j, other in enumerate(info["labels"]) if other == label]
            images = [read_sample(folder, j) for j in indices[:6]]
            rows[info["classes"][label]] = torch.stack(images)
    except (ValueError, RuntimeError) as problem:            # RuntimeError: images of two sizes
        return missing(f"The samples cannot be shown: {problem}")
    return figure(save, "samples", rows, info["protocol"])


def read_sample(folder, j):
    """-> image j of dit.py sample, (3, H, W) in [0, 1]"""
    path = image_path(folder, j)
    with reading(path, "generate the samples again: dit.py sample --fresh"):
        pixels = np.array(read_image(path))
    return torch.from_numpy(pixels).permute(2, 0, 1) / 255


# ---------------------------------------------------------------- figures
def missing(reason):
    """-> HTML of a section that this run cannot have"""
    return f"<p class=missing>{esc(reason)}</p>"


def image_saver(folder):
    """-> function save(name, image, alt)

    It writes a PIL image to folder/NAME.png and returns an <img> element with the same image
    embedded; `alt` is its alternative text.
    """
    check_writable(folder, "copy the run to a folder that can be written")

    def save(name, image, alt):
        path = folder / f"{name}.png"
        atomic_write(path, lambda part: image.save(part, "PNG", optimize=True))
        data = base64.b64encode(path.read_bytes()).decode()
        return f'<img alt="{esc(alt)}" src="data:image/png;base64,{data}">'

    return save


def figure(save, name, rows, caption="", side=None):
    """-> HTML: one grid of images, with a label next to each row and a caption below

    rows  {label: images (n, 3, S, S) in [0, 1]}; S may differ between rows
    side  side of each image on the page in pixels; None: default_side
    """
    largest = max(rows.values(), key=lambda images: images.shape[-1])
    side = side or default_side(largest)
    tiles = [list(resize(images, side)) for images in rows.values()]
    return image_figure(save, name, tiles, list(rows), caption)


def image_figure(save, name, rows, labels, caption, header=(), widths=""):
    """-> HTML: as `figure`, for tiles of any size

    rows    list of rows; a row is a list of tiles (3, h, w) in [0, 1]
    labels  one for each row
    header  texts above the columns; widths: the widths of these columns, in CSS
    """
    arrays = []
    for row in rows:
        arrays.append([to_uint8(tile) for tile in row])
    image = save(name, image_grid(arrays), name)
    top = ""
    if header:
        columns = "".join(f"<span>{text}</span>" for text in header)
        top = f"<div class=header style='grid-template-columns:{widths}'>{columns}</div>"
    left = "".join(f"<span>{esc(label)}</span>" for label in labels)
    return (f"<figure><div class=rows>{top}<div class=labels>{left}</div>{image}</div>"
            f"<figcaption>{esc(caption)}</figcaption></figure>")


def default_side(images):
    """-> side of an image on the page, in pixels: small images are enlarged"""
    return 128 if images.shape[-1] <= 128 else 96


def resize(x, side):
    """Resize images to at most side x side pixels.

    x (n, C, S, S) in [0, 1] -> (n, C, S', S') in [0, 1]
    Larger images are reduced to S' = side. Smaller images are enlarged without interpolation by the
    largest integer factor for which S' <= side.
    """
    if x.shape[-1] > side:
        x = F.interpolate(x, size=(side, side), mode="bicubic", antialias=True)
        return x.clamp(0, 1)
    return F.interpolate(x, scale_factor=side // x.shape[-1], mode="nearest")


def add_frame(x):
    """(3, h, w) in [0, 1] -> the same image with a green frame over its border"""
    edge = max(2, x.shape[-1] // 32)
    green = torch.tensor(matplotlib.colors.to_rgb(GREEN))
    framed = green[:, None, None].expand_as(x).clone()
    framed[:, edge:-edge, edge:-edge] = x[:, edge:-edge, edge:-edge]
    return framed


def to_uint8(x):
    """(3, h, w) in [0, 1] -> NumPy array (h, w, 3), uint8"""
    return (x * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def device_of(model):
    return next(model.parameters()).device
