"""A run folder -> one page to look at and to project: what was asked, how it went, and what the model now sees.

    RUN/report.html     complete in itself: pictures inside, no scripts, no links        RUN/report/*.png     the same pictures, for slides
Eight sections, each with what one sees, what good looks like and what failing looks like. A section that this run cannot
have says why. Everything is read from the run folder or computed here, on at most GALLERY validation pictures.

B images    N = h*w patches    D width    H heads of c channels    d latent channels
"""
import base64
import html
import io
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image

from data import denormalize, eval_batches, normalize, open_data
from tokenizer import get_tokenizer

from .model import VTPModel
from .probes import zero_shot_classifier
from .vit import rotate

GALLERY = 256                                                                # pictures among which neighbours and captions are sought
TEMPLATES = ["a photo of a {}.", "a picture of a {}."]                       # CLIP's plainest, and the shapes' word for it
NO_CURVE = {"step", "seconds", "weight_decay", "bad", "images_per_s", "share_of_peak", "data_wait", "perceptual"}
INK, BLUE, ORANGE, GREEN = "#1d2433", "#2f5fd0", "#d9772b", "#2c9a58"
esc = html.escape


@dataclass
class Seen:
    """What the model makes of the validation pictures."""
    model: VTPModel
    settings: dict             # run.json; empty for weights without a run
    source: object             # of the pictures, from data.open_data
    images: torch.Tensor       # (n, 3, H, W) uint8, centre crops
    labels: torch.Tensor       # (n,) -1 where unknown
    captions: list
    summary: torch.Tensor      # (n, D) unit length: class token, or mean patch where no loss reads the class token
    latent: torch.Tensor       # (n, d) mean latent
    shown: list                # numbers of the pictures that are shown, classes in turn
    by_class_token: bool       # some loss reads the class token; without one it means nothing

    def pictures(self, count):
        """The first `count` shown pictures -> (count, 3, H, W) in 0..1 to look at, and normalised on the model's device"""
        picked = self.images[self.shown[:count]]
        return picked / 255, normalize(picked.to(device_of(self.model)))


@torch.no_grad()
def write_report(run, data=None, val_data=None, device=None, dit=None, seed=0):
    """run folder -> Path of its report.html

    data, val_data  as in train.py; None: the run's own       device  None: cpu       dit  folder of dit.py train; None: RUN/dit, if there
    seed            which validation pictures are shown
    Raises ValueError when there are no weights, or no validation pictures to show them.
    """
    run, dit = Path(run), Path(dit or Path(run) / "dit")
    if not (run / "model.safetensors").exists():
        raise ValueError(f"{run} holds no model.safetensors; wanted the folder of: python train.py --out {run}")
    settings = json.loads((run / "run.json").read_text()) if (run / "run.json").exists() else {}
    data, val_data = data or settings.get("data"), val_data or settings.get("val_data")
    if not (data or val_data):
        raise ValueError(f"{run} has no run.json that names its data; say which pictures to show: --val-data DIR")
    model = VTPModel.from_pretrained(run).to(device or "cpu")
    source = open_data(val_data or data, "val", side=model.config.image_size, whole=bool(val_data))
    seen, log, save = look(model, settings, source, seed), lines(run / "log.jsonl"), Album(run / "report")
    metrics = [m for folder in (run, dit, dit / "samples") for m in lines(folder / "metrics.jsonl")]
    parts = [curves(save, settings, log), reconstructions(save, seen), colours(save, seen), attention(save, seen), answers(save, seen),
             neighbours(save, seen), samples(save, dit)]
    page = PAGE.replace("TITLE", esc(title(settings, model))).replace("BODY", head(run, seen, log, metrics) + "".join(parts))
    (run / "report.html").write_text(page, encoding="utf-8")
    return run / "report.html"


def look(model, settings, source, seed):
    """Up to GALLERY validation pictures through the trunk -> Seen"""
    c = model.config
    by_class_token = settings.get("w_ssl", 0) > 0 or c.train_clip and c.vision_clip_feat == "cls"
    images, labels, captions, summary, latent = [], [], [], [], []
    for img, label, caption in eval_batches(source, c.image_size, 16, limit=GALLERY):
        cls, patches = model.trunk(normalize(img.to(device_of(model))))
        images.append(img)
        labels.append(label)
        captions += caption
        summary.append(F.normalize(cls if by_class_token else patches.mean(1), dim=-1).cpu())
        latent.append(model.trunk.feature_bottleneck(patches).mean(1).cpu())
    if len(captions) < 2:
        raise ValueError(f"{source.spec} has {len(captions)} readable validation pictures, wanted at least 2; name others with --val-data")
    images, labels, summary, latent = map(torch.cat, (images, labels, summary, latent))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    met = Counter()
    turn = {i: met.update([int(labels[i])]) or met[int(labels[i])] for i in order}
    shown = sorted(order, key=turn.get)                                      # the first of each class, then the second of each, ...
    return Seen(model, settings, source, images, labels, captions, summary, latent, shown, by_class_token)


def device_of(model):
    return next(model.parameters()).device


def lines(path):
    """A .jsonl file, or none -> list of dicts"""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ---------------------------------------------------------------- what is computed
def pca_rgb(x):
    """(n, h, w, C) -> (n, 3, h, w) in 0..1, and the share of variance: the first three principal components over all n pictures.

    Each is stretched so that 2 % of the patches lie at either end; its sign is such that its largest coordinate is positive.
    """
    flat = x.double().flatten(0, 2)
    flat = flat - flat.mean(0)                                               # (n*h*w, C)
    values, axes = torch.linalg.eigh(flat.T @ flat)                          # ascending
    axes = axes[:, -3:].flip(1)                                              # (C, 3)
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    y = flat @ axes
    low, high = y.quantile(torch.tensor([0.02, 0.98], dtype=y.dtype, device=y.device), dim=0)
    y = ((y - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return y.float().view(*x.shape[:3], 3).permute(0, 3, 1, 2).cpu(), (values[-3:].sum() / values.sum().clamp_min(1e-12)).item()


def class_attention(trunk, img):
    """img (B, 3, H, W) -> (B, heads, 1+N): what the class token looks at in the last block, itself first. Rows sum to 1.

    The trunk's own attention never writes its weights down, so they are computed again from what enters the last block.
    """
    *_, x, _ = trunk.layers(img)                                             # (B, 1+N, D)
    block, (h, w) = trunk.blocks[-1], trunk.patch_embed(img).shape[-2:]
    attn, rope = block.attn, trunk.rope_embed(h, w, prefix=1)
    q, k, _ = attn.qkv(block.norm1(x)).unflatten(-1, (3, attn.heads, -1)).permute(2, 0, 3, 1, 4)        # each (B, H, 1+N, c)
    q, k = rotate(attn.q_norm(q), *rope), rotate(attn.k_norm(k), *rope)
    return (q[:, :, :1] @ k.mT / math.sqrt(q.shape[-1])).softmax(-1).squeeze(2)


def nearest(x, k=5):
    """(n, C) -> (n, k): the numbers of the k nearest others, by Euclidean distance"""
    return torch.cdist(x, x).fill_diagonal_(math.inf).topk(min(k, len(x) - 1), largest=False).indices


# ---------------------------------------------------------------- the sections
def title(settings, model):
    on = [name for name, weight in (("CLIP", "w_clip"), ("SSL", "w_ssl"), ("AE", "w_rec")) if settings.get(weight, 0) > 0]
    return f"{' + '.join(on)}, size {settings['size']}" if on else f"VTP, {model.config.vision_depth} blocks of {model.config.vision_embed_dim}"


def head(run, seen, log, metrics):
    """What was asked, and every number measured so far: the latest line of each name."""
    m, c, s = seen.model, seen.model.config, seen.settings
    millions = lambda *starts: sum(p.numel() for k, p in m.named_parameters() if k.startswith(starts)) / 1e6      # noqa: E731
    side, grid, d = c.image_size, c.image_size // c.vision_patch_size, m.trunk.feature_bottleneck(torch.zeros(1, c.vision_embed_dim, device=device_of(m))).shape[-1]
    parts = {"trunk": millions("trunk"), "decoder": millions("pixel_decoder"), "text tower": millions("text", "token", "pos", "ln_final")}
    facts = {"parameters": ", ".join(f"{name} {n:.2f} M" for name, n in parts.items() if n),
             "pictures": f"{side} x {side} pixels in patches of {c.vision_patch_size}",
             "latents": f"{d} x {grid} x {grid}: {3 * side ** 2 / (d * grid ** 2):.3g} times fewer numbers than pixels have",
             "shown here": f"{len(seen.images)} validation pictures of {seen.source.spec}"}
    if s:
        losses = {"w_clip": ("CLIP", "batch"), "w_ssl": ("SSL", "batch_ssl"), "w_rec": ("AE", "batch_rec")}
        on = {name: (s[w], s.get(batch)) for w, (name, batch) in losses.items() if s.get(w, 0) > 0}
        speed = [line["images_per_s"] for line in log if "images_per_s" in line]
        facts |= {"trained on": s.get("data"), "loss weights": ", ".join(f"{name} {w:g}" for name, (w, _) in on.items()),
                  "images a step": ", ".join(f"{name} {n:,}" for name, (_, n) in on.items() if n),
                  "steps": f"{log[-1]['step']:,} of {s['steps']:,}" if log else f"0 logged of {s['steps']:,}",
                  "machine": f"{s['device']}, {s['precision']}" + (f", {np.median(speed):,.0f} images/s" if speed else ""),
                  "peak rate, seed": f"{s['lr']:g}, {s['seed']}"}
    rows = {row["name"]: row for row in metrics}                             # a later line replaces an earlier one
    table = "".join(f"<tr><td>{esc(name)}<td class=n>{rounded(rows[name]['value'])}<td>{esc(rows[name]['protocol'])}" for name in sorted(rows))
    table = f"<table><tr><th>number<th class=n>value<th>how it was measured{table}</table>" if rows else \
        f"<p class=none>Nothing measured yet. Try <code>python eval.py zeroshot {esc(str(run))}</code>, or recon, probe, fid.</p>"
    return (f"<header><small>{esc(str(run))}</small><h1>{esc(title(s, m))}</h1><p>One vision transformer, trained as a visual tokenizer: it gives pictures "
            f"meaning, and latents from which they can be painted again.</p></header><dl>"
            + "".join(f"<div><dt>{name}<dd>{esc(str(value))}</div>" for name, value in facts.items()) + f"</dl>{table}")


def rounded(v):
    """Four digits, and whole thousands with their comma. What is not finite was logged by its name."""
    return esc(v) if isinstance(v, str) else f"{v:,.0f}" if abs(v) >= 1e4 else f"{v:.4g}"


def curves(save, settings, log):
    heading = "How the losses went", "Pale: what was logged. Dark: its running mean. Dashed: the value of a model that has learned nothing, or the bound named beside it."
    if not log:
        return section(*heading, none="There is no log.jsonl here: these weights came without their history.")
    K, ln = settings.get("prototypes"), lambda n: math.log(n) if n else None
    about = {"clip": ("clip: words", ln(settings.get("batch")) if settings.get("clip_loss") == "clip" else None, "ln B"),       # key: title, line, its name
             "dino": ("dino: views", ln(K), "ln K"), "ibot": ("ibot: hidden patches", ln(K) and ln(K) / 2, "½ ln K"),           # half of the crops hide nothing
             "koleo": ("koleo: apart from each other", None, ""),
             "rec": (f"rec: L1 + LPIPS ({settings.get('perceptual')})" if settings.get("perceptual") != "none" else "rec: L1", None, ""),
             "teacher_entropy": ("entropy of the teacher", ln(K), "ln K"), "spread": ("spread of class tokens", 0, "one point"),
             "grad_norm": ("gradient norm", settings.get("clip_grad"), "clipped above"), "lr": ("learning rate", None, ""),
             "logit_scale": ("logit scale of clip", 100, "bound"), "loss": ("weighted sum", None, "")}
    logged = {k for line in log for k in line}
    keys = [k for k in about if k in logged] + sorted(logged - set(about) - NO_CURVE)
    with matplotlib.rc_context({"font.size": 13, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#9aa1ad", "text.color": INK,
                         "xtick.color": "#5b6372", "ytick.color": "#5b6372", "axes.grid": True, "grid.color": "#eceef2"}):
        rows = -(-len(keys) // 4)
        fig = Figure(figsize=(15, 2.9 * rows), layout="constrained")
        axes = fig.subplots(rows, 4, squeeze=False)
        for ax, key in zip(axes.flat, keys):
            points = np.array([(line["step"], float(line[key])) for line in log if key in line])
            name, bound, word = about.get(key, (key.replace("_", " "), None, ""))
            ax.plot(*points.T, color=BLUE, alpha=0.28, lw=1.2)
            ax.plot(points[:, 0], running_mean(points[:, 1]), color=BLUE, lw=2.2)
            if bound is not None and (word != "bound" or points[:, 1].max() > bound / 2):
                ax.axhline(bound, color=ORANGE, ls="--", lw=1.6)
                ax.annotate(word, (1, bound), xycoords=("axes fraction", "data"), ha="right", va="bottom", xytext=(0, 2), textcoords="offset points", color=ORANGE)
            ax.set_title(name, loc="left", fontsize=13.5, fontweight="bold")
            ax.set_title(f"{points[-1, 1]:.3g}", loc="right", fontsize=13, color=BLUE)
            ax.margins(x=0.02, y=0.15)
        for ax in axes.flat[len(keys):]:
            ax.axis("off")
        file = io.BytesIO()
        fig.savefig(file, dpi=100)
    picture = save("curves", Image.open(file).convert("RGB"), "loss curves over the steps")
    return section(*heading, "clip, dino, ibot and rec fall below their dashed lines and keep falling; the spread stays well above 0.",
                   "dino flat at ln K, the teacher's entropy at ln K and a spread near 0 mean collapse: all pictures look alike. Gradient norms that climb announce divergence.",
                   f"<figure>{picture}<figcaption>B images a step, K prototypes. Only half of the crops hide patches, so ibot starts near half of ln K.</figcaption></figure>")


def running_mean(y, share=0.05):
    """Mean over the last 5 % of the log (at least 1 line) at every line; what is not finite is left out."""
    window = max(1, round(share * len(y)))
    return np.array([np.nanmean(np.append(part[np.isfinite(part)], np.nan)) if np.isfinite(part).any() else np.nan
                     for part in (y[max(0, i + 1 - window):i + 1] for i in range(len(y)))])


def reconstructions(save, seen):
    heading = "Through the latents and back", "Validation pictures, what the decoder paints from their latents, and how far the two are apart, four times amplified."
    if not seen.model.config.train_reconstruction:
        return section(*heading, none="This run has no reconstruction loss (--w-rec 0), hence no decoder.")
    img, x = seen.pictures(8 if seen.images.shape[-1] <= 128 else 4)
    out = denormalize(seen.model.get_latents_decoded_images(seen.model.get_reconstruction_latents(x))).clamp(0, 1).cpu()
    psnr = -10 * (img - out).square().mean((1, 2, 3)).clamp_min(1e-10).log10()
    body = sheet(save, "reconstructions", {"picture": img, "painted again": out, "difference x 4": (4 * (img - out).abs()).clamp(0, 1)}, most=max(128, img.shape[-1]))
    return section(*heading, "edges and textures come back; the difference is dark, with faint outlines only.",
                   "grey fog or a visible grid of patches. Blur without a grid: L1 alone, or too few steps.", body,
                   f"Mean PSNR of these {len(img)} pictures: {psnr.mean():.1f} dB.")


def colours(save, seen):
    rec = seen.model.config.train_reconstruction
    img, x = seen.pictures(8)
    h = x.shape[-1] // seen.model.config.vision_patch_size
    patches = seen.model.trunk(x)[1].unflatten(1, (h, h))                    # (n, h, w, D)
    maps, share = pca_rgb(patches)
    rows = {"picture": img, f"features, {patches.shape[-1]} wide": enlarge(maps, x.shape[-1])}
    told = f"The three colours carry {100 * share:.0f} % of the variance of the features"
    if rec:
        maps, share = pca_rgb(seen.model.trunk.feature_bottleneck(patches))
        rows["latents"] = enlarge(maps, x.shape[-1])
        told += f", {100 * share:.0f} % of that of the latents"
    return section("What a patch knows", "The three strongest directions of the patch features as red, green and blue, one square a patch: alike in colour means alike to the model.",
                   "things stand out from the ground in one colour, the same kind of thing in the same colour in every picture; latents show layout and shading as well.",
                   "speckle without any relation to the picture, or the same bands of colour everywhere: position and nothing else.",
                   sheet(save, "features", rows), told + ("." if rec else "; the latents are untrained here (--w-rec 0) and left out."))


def attention(save, seen):
    img, x = seen.pictures(8)
    weights = class_attention(seen.model.trunk, x)[:, :, 1:]                 # (n, H, N) on the patches
    weights = torch.cat([weights.mean(1, keepdim=True), weights[:, :4]], 1)
    weights = (weights / weights.amax(-1, keepdim=True)).unflatten(2, (int(weights.shape[2] ** 0.5), -1)).cpu()
    grey = img.mean(1)[..., None].numpy()                            # (n, H, W, 1)
    rows = {"picture": img}
    for i, heat in enumerate(weights.unbind(1)):                             # (n, h, w)
        heat = matplotlib.colormaps["inferno"](enlarge(heat[:, None], x.shape[-1])[:, 0].numpy())[..., :3]
        rows["mean of heads" if i == 0 else f"head {i}"] = torch.from_numpy(0.35 * grey + 0.65 * heat).permute(0, 3, 1, 2).float()
    untrained = "" if seen.by_class_token else " No loss reads the class token in this run: expect nothing of it."
    return section("Where the class token looks", "Attention of the class token in the last block, laid over the picture; bright is much, and each map is stretched to its own maximum." + untrained,
                   "the bright patches lie on the things, and heads differ.", "the same patches in every picture, or an even glow: the class token does not look.",
                   sheet(save, "attention", rows))


def answers(save, seen):
    names, what = seen.source.classes, "class names"
    heading = "Asked in words", "How well captions fit a picture: 100 x cosine, then softmax over all of them."
    if not seen.model.config.train_clip:
        return section(*heading, none="This run never saw words (--w-clip 0), so it cannot be asked.")
    m, truth, templates = seen.model, [names[i] if names and i >= 0 else None for i in seen.labels], TEMPLATES
    if not names:
        names, truth, templates, what = sorted(set(seen.captions)), seen.captions, ["{}"], "captions of the pictures seen here"
    tokenizer = get_tokenizer("ViT-B-32", m.config.text_context_length)

    def encode(texts):
        ids = tokenizer(texts).to(device_of(m))
        return m.get_clip_text_feature(ids[:, :ids.argmax(-1).max() + 1])    # what stands behind the end token is never read

    W = zero_shot_classifier(encode, names, templates)                       # (E, C)
    img, x = seen.pictures(6)
    p = (100 * m.get_clip_image_feature(x, normalize=True).float() @ W).softmax(-1).cpu()
    cards, right = [], 0
    for i, (picture, row) in enumerate(zip(fit(img, 160), p)):
        own = truth[seen.shown[i]]
        best = [(names[j], row[j].item()) for j in row.topk(min(5 if seen.source.classes else 3, len(names))).indices]
        right += best[0][0] == own
        bars = "".join(f"<li{' class=own' * (name == own)}><i style='width:{100 * value:.1f}%'></i><span>{esc(name)}</span><b>{100 * value:.0f} %</b>" for name, value in best)
        cards.append(f"<div class=card>{save(f'asked-{i + 1}', to_image(picture), own or 'a picture')}<div><em>{esc(own or '')}</em><ol>{bars}</ol></div></div>")
    return section(*heading, "the true one (green, and above the bars) leads by far; what comes second is a reasonable mistake.",
                   "the same answer whatever the picture, or bars of equal length: chance.", f"<div class=cards>{''.join(cards)}</div>",
                   f"{right} of {len(img)} right, of {len(names)} {what}. Prompts: {' · '.join(templates)}" if seen.source.classes else f"{right} of {len(img)} right, of {len(names)} {what}.")


def neighbours(save, seen):
    k, known = 5, bool((seen.labels >= 0).all() and seen.source.classes)
    spaces = {"by class token" if seen.by_class_token else "by mean patch": nearest(seen.summary, k)} | ({"by mean latent": nearest(seen.latent, k)} if seen.model.config.train_reconstruction else {})
    tiles = fit(seen.images / 255, 128 if seen.images.shape[-1] <= 128 else 96)
    edge, blank = max(2, tiles.shape[-1] // 32), torch.ones_like(tiles[0])[..., ::4]
    rows = {}
    for i in seen.shown[:4]:
        row = [tiles[i]]
        for near in spaces.values():
            row += [blank] + [framed(tiles[j], edge) if known and seen.labels[j] == seen.labels[i] else tiles[j] for j in near[i]]
        rows[seen.source.classes[seen.labels[i]] if known else ""] = row
    told = "Cosine for features, Euclidean distance for latents."
    if known:
        same = seen.labels[:, None] == seen.labels
        chance = (same.sum(1) - 1).float().mean() / (len(same) - 1)
        hits = ", ".join(f"{name} {100 * same.gather(1, near).float().mean():.0f} %" for name, near in spaces.items())
        told += f" Framed in green: the same class. Over all {len(same)} pictures such neighbours are {hits}; chance {100 * chance:.0f} %."
    columns = "1fr" + f" .25fr {min(k, len(seen.images) - 1)}fr" * len(spaces)
    top = f"<div class=top style='grid-template-columns:{columns}'><span>picture</span>" + "".join(f"<span></span><span>{name}</span>" for name in spaces) + "</div>"
    return section("Who is like whom", f"A picture and the five nearest of {len(seen.images)} others.",
                   "features gather the same kind of thing in other colours and places; latents gather the same colours and layout: meaning on one side, appearance on the other.",
                   "the same few pictures are everybody's neighbours.", sheet(save, "neighbours", rows, top=top), told)


def samples(save, dit):
    heading = "New pictures", "What the diffusion transformer draws in the latent space of this tokenizer, painted by its decoder: a row a class, noise and name its only start."
    folder = dit / "samples"
    if not (folder / "labels.json").exists():
        return section(*heading, none=f"No samples in {folder} yet. They come from dit.py latents, train and sample, in this order.")
    about = json.loads((folder / "labels.json").read_text())
    rows = {}
    for c in sorted(set(about["labels"]))[:8]:
        files = [folder / "png" / f"{j:06d}.png" for j, label in enumerate(about["labels"]) if label == c][:8]
        pictures = torch.stack([torch.from_numpy(np.array(Image.open(f).convert("RGB"))) for f in files]).permute(0, 3, 1, 2) / 255
        rows[about["classes"][c]] = pictures
    return section(*heading, "every row shows its class, and no two pictures are alike.", "texture without things: too few steps. Rows that look the same: the class is not heard.",
                   sheet(save, "samples", rows), about["protocol"])


# ---------------------------------------------------------------- pictures and page
class Album:
    """save(name, picture, what it shows) -> an <img> that holds the picture, which also becomes RUN/report/name.png"""
    def __init__(self, folder):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, name, picture, alt):
        picture.save(self.folder / f"{name}.png", optimize=True)
        code = base64.b64encode((self.folder / f"{name}.png").read_bytes()).decode()
        return f'<img alt="{esc(alt)}" src="data:image/png;base64,{code}">'


def to_image(x):
    """(3, H, W) in 0..1 -> PIL"""
    return Image.fromarray((x * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy())


def enlarge(x, side):
    """(n, C, h, w) -> (n, C, side, side), one flat square a patch"""
    return F.interpolate(x, size=(side, side), mode="nearest")


def fit(x, most):
    """(n, 3, H, H) in 0..1 -> as large as `most` allows: small pictures by a whole number, large ones shrunk smoothly"""
    side = x.shape[-1]
    if side > most:
        return F.interpolate(x, size=(most, most), mode="bicubic", antialias=True).clamp(0, 1)
    return enlarge(x, most // side * side)


def framed(x, edge):
    """(3, H, W) with a green rim"""
    x, colour = x.clone(), torch.tensor([int(GREEN[i:i + 2], 16) / 255 for i in (1, 3, 5)]).view(3, 1, 1)
    inside = torch.zeros_like(x[:1], dtype=torch.bool)
    inside[:, edge:-edge, edge:-edge] = True
    return torch.where(inside, x, colour)


def sheet(save, name, rows, most=None, top=""):
    """{label: pictures (n, 3, H, H), or a list of (3, H, w)} -> one picture, a row a label; labels stand beside it as text"""
    most = most or (128 if max(x[0].shape[-1] for x in rows.values()) <= 128 else 96)
    strips = [torch.cat([F.pad(x, (3, 3, 3, 3), value=1.0) for x in (fit(row, most) if torch.is_tensor(row) else row)], -1) for row in rows.values()]
    wide = max(strip.shape[-1] for strip in strips)
    picture = save(name, to_image(torch.cat([F.pad(strip, (0, wide - strip.shape[-1]), value=1.0) for strip in strips], -2)), f"{name}: {', '.join(rows)}")
    labels = "".join(f"<span>{esc(label)}</span>" for label in rows)
    return f"<figure class=sheet><div class=labels>{labels}</div><div>{top}{picture}</div></figure>"


def section(heading, sees, good="", bad="", body="", note="", none=""):
    """One chapter of the page. `none` says why there is nothing to show."""
    if none:
        return f"<section><h2>{esc(heading)}</h2><p>{esc(sees)}</p><p class=none>{esc(none)}</p></section>"
    return (f"<section><h2>{esc(heading)}</h2><p>{esc(sees)}</p>{body}" + (f"<p class=note>{esc(note)}</p>" if note else "")
            + f"<div class=judge><p class=good><b>Good:</b> {esc(good)}</p><p class=bad><b>Failing:</b> {esc(bad)}</p></div></section>")


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>TITLE</title><style>
*{box-sizing:border-box;margin:0}
body{background:#f4f5f8;color:#1d2433;font:17px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}
main{max-width:1100px;margin:0 auto;padding:40px 24px 80px;counter-reset:part}
h1{font-size:44px;line-height:1.15;letter-spacing:-.02em;margin:6px 0 10px}h2{font-size:27px;letter-spacing:-.01em;margin-bottom:6px}
header p{font-size:19px;color:#4a5264;max-width:720px}small,code,.note,figcaption,dt,.top,.labels,th{color:#667085}small,code{font-family:ui-monospace,Menlo,Consolas,monospace;font-size:14px}
dl{display:grid;grid-template-columns:1fr 1fr;gap:1px;background:#e3e6ec;border:1px solid #e3e6ec;border-radius:12px;overflow:hidden;margin:28px 0}
dl div{background:#fff;padding:10px 18px}dt{font-size:13px}dd{font-weight:600;font-size:16px}
table{width:100%;border-collapse:collapse;background:#fff;border-radius:12px;overflow:hidden;font-size:15px}
td,th{padding:9px 18px;text-align:left;border-top:1px solid #eceef2;vertical-align:top;overflow-wrap:anywhere}th{font-weight:500;font-size:13px;border:0}
.n{text-align:right;font-variant-numeric:tabular-nums;overflow-wrap:normal}td.n{font-weight:700;font-size:17px}td:last-child{color:#667085}
section{background:#fff;border-radius:16px;padding:30px 34px;margin-top:28px;box-shadow:0 1px 3px #1d24331a}
h2:before{counter-increment:part;content:counter(part);color:#2f5fd0;margin-right:14px}section>p:nth-of-type(1){max-width:860px;margin-bottom:18px}
img{display:block;width:100%}.sheet{display:flex;gap:14px}.sheet>div:last-child{flex:1;min-width:0}
.labels{flex:0 0 118px;display:flex;flex-direction:column}.labels span{flex:1;display:flex;align-items:center;justify-content:flex-end;text-align:right;line-height:1.25;font-size:15px}
.top{display:grid;font-size:15px;text-align:center;padding-bottom:2px}.top:has(*)~img{margin:0}.note,figcaption{font-size:15px;margin-top:10px}
.judge{display:grid;grid-template-columns:1fr 1fr;gap:14px;margin-top:18px;font-size:16px}.judge p{padding:10px 16px;border-left:4px solid;border-radius:4px}
.good{border-color:#2c9a58;background:#eef7f1}.bad{border-color:#d9772b;background:#fdf3ea}.none{color:#667085;font-style:italic}
.cards{display:grid;grid-template-columns:1fr 1fr;gap:22px 30px}.card{display:flex;gap:16px;align-items:flex-start}.card img{width:136px;border-radius:8px}.card div{flex:1;min-width:0}
em{font-style:normal;font-weight:600;font-size:15px;line-height:1.3;display:block;margin-bottom:4px}ol{padding:0;list-style:none}
li{position:relative;display:flex;justify-content:space-between;gap:10px;padding:1px 8px;margin-top:3px;font-size:14px;line-height:1.35;background:#f4f5f8;border-radius:4px;overflow:hidden}
li i{position:absolute;inset:0 auto 0 0;background:#c9d6f5}.own i{background:#b5e0c4}li span,li b{position:relative}li b{font-weight:500;font-variant-numeric:tabular-nums;white-space:nowrap}
</style><body><main>BODY</main></body></html>
"""
