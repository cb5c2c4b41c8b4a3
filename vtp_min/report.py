"""A run folder -> one page to look at and to project: what was asked, how it went, and what the model now sees.

    RUN/report.html    complete in itself: pictures inside, no scripts, no links        RUN/report/*.png    the same pictures, for slides
Its words and looks stand in report.html beside it; here is what they are about, one function a chapter. Everything is read
from the run folder or computed now, on validation pictures. A chapter that this run cannot have says why.

n pictures    N = h*w patches    D width    H heads of c channels    d latent channels    E CLIP space
"""
import base64
import html
import io
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from string import Template

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image

from .model import VTPModel
from .probes import zero_shot_classifier
from .views import denormalize, normalize
from .vit import rotate

PAGE = Path(__file__).parent / "report.html"
GALLERY = 256                                                                # pictures among which neighbours and captions are sought
BLUE, ORANGE, GREEN = "#2f5fd0", "#d9772b", "#2c9a58"
NO_CURVE = {"step", "seconds", "weight_decay", "bad", "images_per_s", "gflops", "share_of_peak", "data_wait"}
esc = html.escape


@dataclass
class Seen:
    """Validation pictures, and what the model makes of them"""
    model: VTPModel
    source: object             # from data.open_data
    images: torch.Tensor       # (n, 3, S, S) uint8, centre crops
    labels: torch.Tensor       # (n,) -1 where unknown
    captions: list
    summary: torch.Tensor      # (n, D) unit length: class token, or mean patch where no loss reads the class token
    latent: torch.Tensor       # (n, d) mean latent
    by_class_token: bool       # which of the two `summary` is
    order: list                # the numbers 0..n-1 as they are shown: classes take turns

    def pictures(self, small, large):
        """The first so many in order, fewer if they are large -> (k, 3, S, S) in 0..1 to look at, and normalised on the model's device"""
        picked = self.images[self.order[:small if self.images.shape[-1] <= 128 else large]]
        return picked / 255, normalize(picked.to(device_of(self.model)))


@torch.no_grad()
def write_report(run, open_data, eval_batches, get_tokenizer, data=None, val_data=None, device=None, dit=None, seed=0):
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
    seen, log, save = look(model, settings, eval_batches, source, seed), lines(run / "log.jsonl"), album(run / "report")
    metrics = [row for folder in (run, dit, dit / "samples") for row in lines(folder / "metrics.jsonl")]
    page = Template(PAGE.read_text()).substitute(
        title=esc(title(settings, model)), folder=esc(str(run)), head=facts(seen, settings, log) + numbers(metrics), curves=curves(save, settings, log),
        reconstructions=reconstructions(save, seen), colours=colours(save, seen), attention=attention(save, seen), answers=answers(save, seen, get_tokenizer),
        neighbours=neighbours(save, seen), samples=samples(save, dit))
    (run / "report.html").write_text(page, encoding="utf-8")
    return run / "report.html"


def look(model, settings, eval_batches, source, seed):
    """Up to GALLERY validation pictures through the trunk -> Seen"""
    c, images, labels, captions, summary, latent = model.config, [], [], [], [], []
    by_class_token = settings.get("w_ssl", 0) > 0 or c.train_clip and c.vision_clip_feat == "cls"
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
    drawn, met, turn = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist(), Counter(), {}
    for i in drawn:
        turn[i] = met[int(labels[i])]                                        # how many of its class came before
        met[int(labels[i])] += 1
    return Seen(model, source, images, labels, captions, summary, latent, by_class_token, order=sorted(drawn, key=turn.get))


# ---------------------------------------------------------------- what is computed
def pca_rgb(x):
    """(n, h, w, C) -> (n, 3, h, w) in 0..1, and the share of variance: the first three principal components over all n pictures.

    Each is stretched so that 2 % of the patches lie beyond either end; its largest coordinate is positive, which fixes the sign.
    """
    flat = x.cpu().double().flatten(0, 2)
    flat = flat - flat.mean(0)                                               # (n*h*w, C)
    values, axes = torch.linalg.eigh(flat.T @ flat)                          # ascending
    axes = axes[:, -3:].flip(1)                                              # (C, 3)
    y = flat @ (axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign())
    low, high = y.quantile(torch.tensor([0.02, 0.98]).to(y), dim=0)
    y = ((y - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return y.float().view(*x.shape[:3], 3).permute(0, 3, 1, 2).cpu(), (values[-3:].sum() / values.sum().clamp_min(1e-12)).item()


def class_attention(trunk, img):
    """img (n, 3, S, S) -> (n, H, 1+N): what the class token looks at in the last block, itself first. Rows sum to 1.

    The trunk's own attention never writes its weights down, so they are computed again from what enters the last block.
    """
    *_, x, _ = trunk.layers(img)                                             # (n, 1+N, D)
    h, w = trunk.patch_embed(img).shape[-2:]
    attn, rope = trunk.blocks[-1].attn, trunk.rope_embed(h, w, prefix=1)
    q, k, _ = attn.qkv(trunk.blocks[-1].norm1(x)).unflatten(-1, (3, attn.heads, -1)).permute(2, 0, 3, 1, 4)      # (n, H, 1+N, c)
    q, k = rotate(attn.q_norm(q), *rope), rotate(attn.k_norm(k), *rope)
    return (q[:, :, :1] @ k.mT / math.sqrt(q.shape[-1])).softmax(-1).squeeze(2)


def nearest(x, k=5):
    """(n, C) -> (n, k): the numbers of the k nearest others, by Euclidean distance (of unit vectors: by cosine)"""
    return torch.cdist(x, x).fill_diagonal_(math.inf).topk(min(k, len(x) - 1), largest=False).indices


# ---------------------------------------------------------------- the chapters
def title(settings, model):
    on = [name for name, weight in (("CLIP", "w_clip"), ("SSL", "w_ssl"), ("AE", "w_rec")) if settings.get(weight, 0) > 0]
    return f"{' + '.join(on)}, size {settings['size']}" if on else f"VTP, {model.config.vision_depth} blocks of {model.config.vision_embed_dim}"


def facts(seen, settings, log):
    """What was asked, as pairs of words"""
    m, c, s = seen.model, seen.model.config, settings
    def millions(*starts): return sum(p.numel() for k, p in m.named_parameters() if k.startswith(starts)) / 1e6
    parts = {"trunk": millions("trunk"), "decoder": millions("pixel_decoder"), "text tower": millions("text", "token", "pos", "ln_final")}
    side, grid, d = c.image_size, c.image_size // c.vision_patch_size, seen.latent.shape[1]
    pairs = {"parameters": ", ".join(f"{name} {n:.2f} M" for name, n in parts.items() if n),
             "pictures": f"{side} x {side} pixels, patches of {c.vision_patch_size} x {c.vision_patch_size}",
             "latents": f"{d} x {grid} x {grid}: {3 * side ** 2 / (d * grid ** 2):.3g} times fewer numbers",
             "shown here": f"{len(seen.images)} validation pictures of {seen.source.spec}"}
    if s:
        on = {name: (s[w], s[b]) for name, w, b in (("CLIP", "w_clip", "batch"), ("SSL", "w_ssl", "batch_ssl"), ("AE", "w_rec", "batch_rec")) if s.get(w, 0) > 0}
        speed = [line["images_per_s"] for line in log if "images_per_s" in line]
        pairs |= {"trained on": s["data"], "steps": f"{log[-1]['step'] if log else 0:,} of {s['steps']:,}",
                  "weights of the losses": ", ".join(f"{name} {w:g}" for name, (w, _) in on.items()),
                  "images a step": ", ".join(f"{name} {n:,}" for name, (_, n) in on.items()),
                  "machine": s["machine"] + (f", {np.median(speed):,.0f} images a second" if speed else ""),
                  "learning rate, seed": f"{s['lr']:g}, {s['seed']}"}
    return "<dl>" + "".join(f"<div><dt>{name}<dd>{esc(value)}</div>" for name, value in pairs.items()) + "</dl>"


def numbers(metrics):
    """Every number measured so far; of equal names the latest"""
    if not metrics:
        return "<p>Nothing measured yet: eval.py zeroshot, probe, recon and fid do that.</p>"
    rows = sorted({row["name"]: row for row in metrics}.values(), key=lambda row: row["name"].lower())
    return "<table><tr><th>number<th>value<th>how it was measured" + "".join(
        f"<tr><td>{esc(r['name'])}<td>{rounded(r['value'])}<td>{esc(r['protocol'])}" for r in rows) + "</table>"


def rounded(v):
    """Four digits, or whole thousands with their comma; what is not finite was logged by its name"""
    return esc(v) if isinstance(v, str) else f"{v:,.0f}" if abs(v) >= 1e4 else f"{v:.4g}"


def curves(save, settings, log):
    if not log:
        return none("There is no log.jsonl here: these weights came without their history.")
    lnB, lnK = (math.log(settings[k]) if k in settings else None for k in ("batch", "prototypes"))
    about = {"clip": ("clip: words", lnB if settings.get("clip_loss") == "clip" else None, "ln B"),        # key: title, dashed line, its name
             "dino": ("dino: views", lnK, "ln K"),
             "ibot": ("ibot: patches", lnK and lnK / 2, "½ ln K"),
             "rec": ("rec: L1" if settings.get("perceptual") == "none" else "rec: L1 + LPIPS", None, ""),
             "koleo": ("koleo: crowding", None, ""),
             "teacher_entropy": ("teacher's entropy", lnK, "ln K"),
             "spread": ("spread", 0, "all in one place"),
             "loss": ("weighted sum", None, ""),
             "lr": ("learning rate", None, ""),
             "grad_norm": ("gradient norm", settings.get("clip_grad"), "clipped above"),
             "logit_scale": ("scale of clip", None, "")}
    logged = {k for line in log for k, v in line.items() if not isinstance(v, str) or v in ("nan", "inf", "-inf")} - NO_CURVE
    keys = [k for k in about if k in logged] + sorted(logged - set(about))
    style = {"font.size": 13, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#9aa1ad", "axes.grid": True,
             "grid.color": "#eceef2", "xtick.color": "#5b6372", "ytick.color": "#5b6372", "axes.titlesize": 14, "figure.constrained_layout.h_pad": 0.1}
    with matplotlib.rc_context(style):
        fig = Figure(figsize=(13, 2.6 * -(-len(keys) // 4)), layout="constrained")
        for place, key in enumerate(keys, start=1):
            ax = fig.add_subplot(-(-len(keys) // 4), 4, place)
            x, y = np.array([(line["step"], float(line[key])) for line in log if key in line]).T
            name, line, word = about.get(key, (key, None, ""))
            window = max(1, len(y) // 10)
            ax.plot(x, y, color=BLUE, alpha=0.3, lw=1.2)
            ax.plot(x[window // 2:][:len(y) - window + 1], np.convolve(y, np.ones(window) / window, "valid"), color=BLUE, lw=2.2)
            if line is not None:
                ax.axhline(line, color=ORANGE, ls="--", lw=1.6)
                ax.annotate(word, (1, line), (0, 3), ("axes fraction", "data"), "offset points", color=ORANGE, ha="right")
            ax.set_title(name, loc="left", fontweight="bold")
            ax.set_title(f"{y[-1]:.3g}", loc="right", color=BLUE)
            ax.margins(0.02, 0.15)
        file = io.BytesIO()
        fig.savefig(file, dpi=115)
    return save("curves", Image.open(file).convert("RGB"), "loss curves") + "<figcaption>B images a step, K prototypes. Half of the crops hide no patches, " \
        "which is why ibot starts at half of ln K. At the upper right the last value.</figcaption>"


def reconstructions(save, seen):
    m = seen.model
    if not m.config.train_reconstruction:
        return none("This run has no reconstruction loss (--w-rec 0), hence no decoder.")
    img, x = seen.pictures(8, 3)
    out = denormalize(m.get_latents_decoded_images(m.get_reconstruction_latents(x))).clamp(0, 1).cpu()
    psnr = -10 * (img - out).square().mean((1, 2, 3)).clamp_min(1e-10).log10()
    rows = {"picture": img, "painted again": out, "difference x 4": (4 * (img - out).abs()).clamp(0, 1)}
    return sheet(save, "reconstructions", rows, f"Mean PSNR of these {len(img)} pictures: {psnr.mean():.1f} dB.", most=max(128, m.config.image_size))


def colours(save, seen):
    (img, x), side = seen.pictures(8, 6), seen.model.config.image_size
    patches = seen.model.trunk(x)[1].unflatten(1, (side // seen.model.config.vision_patch_size, -1))       # (n, h, w, D)
    maps, share = pca_rgb(patches)
    rows, told = {"picture": img, f"features, {patches.shape[-1]} wide": fit(maps, side)}, f"The colours carry {share:.0%} of the features' variance"
    if not seen.model.config.train_reconstruction:
        return sheet(save, "features", rows, told + "; latents are untrained here (--w-rec 0) and left out.")
    maps, share = pca_rgb(seen.model.trunk.feature_bottleneck(patches))
    rows[f"latents, {seen.latent.shape[1]} wide"] = fit(maps, side)
    return sheet(save, "features", rows, told + f", and {share:.0%} of the latents'.")


def attention(save, seen):
    (img, x), side = seen.pictures(8, 6), seen.model.config.image_size
    weights = class_attention(seen.model.trunk, x)[:, :, 1:].cpu()           # (n, H, N): on the patches
    weights = torch.cat([weights.mean(1, keepdim=True), weights[:, :4]], 1)
    weights = (weights / weights.amax(-1, keepdim=True)).unflatten(2, (side // seen.model.config.vision_patch_size, -1))
    rows, grey = {"picture": img}, img.mean(1, keepdim=True)
    for i, heat in enumerate(fit(weights, side).unbind(1)):                  # (n, S, S)
        heat = torch.from_numpy(matplotlib.colormaps["inferno"](heat.numpy())[..., :3]).permute(0, 3, 1, 2)
        rows[f"head {i}" if i else "mean of all heads"] = (0.35 * grey + 0.65 * heat).float()
    return sheet(save, "attention", rows, "" if seen.by_class_token else "No loss reads the class token in this run: expect nothing of it.")


def answers(save, seen, get_tokenizer):
    m, names = seen.model, seen.source.classes
    if not m.config.train_clip:
        return none("This run never saw words (--w-clip 0), so it cannot be asked.")
    if names:
        truth, templates = [names[i] if i >= 0 else "" for i in seen.labels], seen.source.templates[::max(1, len(seen.source.templates) // 8)]
        told = f"{len(names)} class names in {len(templates)} prompts each, such as “{templates[0].replace('{}', names[0])}”."
    else:
        names, truth, templates = sorted(set(seen.captions)), seen.captions, ["{}"]
        told = f"There are no classes here, so the {len(names)} captions of these validation pictures stand for answer."
    tokenizer = get_tokenizer("ViT-B-32", m.config.text_context_length)

    def encode(texts):
        ids = tokenizer(texts).to(device_of(m))
        ids = ids[:, :ids.argmax(-1).max() + 1]      # tokens after the end token change nothing
        return m.get_clip_text_feature(ids, normalize=False)

    W = zero_shot_classifier(encode, names, templates)                       # (E, C)
    img, x = seen.pictures(6, 6)
    p, right, cards = (100 * m.get_clip_image_feature(x, normalize=True) @ W).softmax(-1).cpu(), 0, ""
    for i, picture in enumerate(fit(img, 128)):
        own, best = truth[seen.order[i]], p[i].topk(min(5 if seen.source.classes else 3, len(names)))
        right += names[best.indices[0]] == own
        bars = "".join(f"<li{' class=own' * (names[j] == own)}><i style='width:{v:.1%}'></i><span>{esc(names[j])}</span><span>{v:.0%}</span>" for v, j in zip(*map(torch.Tensor.tolist, best)))
        cards += f"<div class=card>{save(f'asked-{i + 1}', to_image(picture), own)}<div><b>{esc(own)}</b><ol>{bars}</ol></div></div>"
    return f"<div class=cards>{cards}</div><figcaption>{right} of {len(img)} right. {esc(told)}</figcaption>"


def neighbours(save, seen):
    known, rec = seen.source.classes and bool((seen.labels >= 0).all()), seen.model.config.train_reconstruction
    spaces = {"by class token" if seen.by_class_token else "by mean patch": nearest(seen.summary)} | ({"by mean latent": nearest(seen.latent)} if rec else {})
    tiles, same = fit(seen.images / 255, 128 if seen.images.shape[-1] <= 128 else 96), seen.labels[:, None] == seen.labels
    rows, gap = [], torch.ones_like(tiles[0, :, :, ::4])
    for i in seen.order[:4]:
        rows.append(tiles[i:i + 1].unbind())
        for near in spaces.values():
            rows[-1] += (gap, *(framed(tiles[j]) if known and same[i, j] else tiles[j] for j in near[i]))
    told = f"Sought among {len(tiles)} pictures; cosine for features, Euclidean distance for latents."
    if known:
        hits = ", ".join(f"{name} {same.gather(1, near).float().mean():.0%}" for name, near in spaces.items())
        told += f" Framed in green: the same class. Share of such neighbours over all pictures: {hits}, by chance {(same.sum() - len(same)) / (len(same) ** 2 - len(same)):.0%}."
    columns = "1fr" + f" .25fr {near.shape[1]}fr" * len(spaces)
    top = f"<div class=top style='grid-template-columns:{columns}'><span>picture</span>" + "".join(f"<span></span><span>{name}</span>" for name in spaces) + "</div>"
    labels = [seen.source.classes[seen.labels[i]] if known else "" for i in seen.order[:4]]
    return sheet(save, "neighbours", rows, told, labels=labels, top=top)


def samples(save, dit):
    folder = dit / "samples"
    if not (folder / "labels.json").exists():
        return none(f"No samples in {folder} yet. They come from dit.py latents, train and sample, in this order.")
    about, rows = json.loads((folder / "labels.json").read_text()), {}
    for c in sorted(set(about["labels"]))[:8]:
        files = [folder / "png" / f"{j:06d}.png" for j, label in enumerate(about["labels"]) if label == c][:6]
        rows[about["classes"][c]] = torch.stack([torch.from_numpy(np.array(Image.open(f).convert("RGB"))) for f in files]).permute(0, 3, 1, 2) / 255
    return sheet(save, "samples", rows, about["protocol"])


def none(why):
    return f"<p class=none>{esc(why)}</p>"


# ---------------------------------------------------------------- pictures
def album(folder):
    """-> save(name, picture, what it shows): writes folder/name.png and gives an <img> that holds it"""
    folder.mkdir(parents=True, exist_ok=True)

    def save(name, picture, alt):
        picture.save(folder / f"{name}.png", optimize=True)
        code = base64.b64encode((folder / f"{name}.png").read_bytes()).decode()
        return f'<img alt="{esc(alt)}" src="data:image/png;base64,{code}">'
    return save


def to_image(x):
    """(3, h, w) in 0..1 -> PIL"""
    return Image.fromarray((x * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def fit(x, most):
    """(n, C, S, S) in 0..1 -> as large as `most` allows: small ones by a whole number, in flat squares; large ones shrunk smoothly"""
    if x.shape[-1] > most:
        return F.interpolate(x, size=(most, most), mode="bicubic", antialias=True).clamp(0, 1)
    return F.interpolate(x, scale_factor=most // x.shape[-1], mode="nearest")


def framed(x):
    """(3, h, w) with a green rim"""
    edge, green = max(2, x.shape[-1] // 32), torch.tensor([int(GREEN[i:i + 2], 16) / 255 for i in (1, 3, 5)])
    out = green[:, None, None].expand_as(x).clone()
    out[:, edge:-edge, edge:-edge] = x[:, edge:-edge, edge:-edge]
    return out


def sheet(save, name, rows, told="", most=None, labels=None, top=""):
    """{label: pictures (n, 3, S, S)}, or ready rows of (3, h, w) -> one picture with its labels beside it and `told` below"""
    if labels is None:
        labels, side = list(rows), max(x.shape[-1] for x in rows.values())
        rows = [fit(x, most or (128 if side <= 128 else 96)) for x in rows.values()]
    strips = [torch.cat([F.pad(x, (3, 3, 3, 3), value=1.0) for x in row], -1) for row in rows]
    wide = max(s.shape[-1] for s in strips)
    picture = save(name, to_image(torch.cat([F.pad(s, (0, wide - s.shape[-1]), value=1.0) for s in strips], -2)), name)
    return (f"<figure><div class=sheet>{top}<div class=labels>" + "".join(f"<span>{esc(label)}</span>" for label in labels)
            + f"</div>{picture}</div><figcaption>{esc(told)}</figcaption></figure>")


def device_of(model):
    return next(model.parameters()).device


def lines(path):
    """A .jsonl file, or none -> list of dicts"""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
