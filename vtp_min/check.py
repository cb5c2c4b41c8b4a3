"""The bridge to released weights: what a model makes of a few pictures of yours, at a glance.

    pictures -> latents -> pictures (PSNR, check.png: originals over reconstructions)        pictures -> the five likeliest of some names
Works without a decoder, without CLIP, and with an official decoder that paints 16 pixels a latent whatever the patch; says what is left out.
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from .dist import say
from .fid import psnr
from .probes import text_encoder, zero_shot_classifier
from .run import metric
from .views import ASSETS, adm_crop, denormalize, is_picture, normalize, pixels, read_image


@torch.no_grad()
def try_out(model, paths, names, side, out, device, open_data, get_tokenizer):
    """paths  files and folders, None: built-in shapes      names  what the pictures may show, None: ImageNet's 1000 classes      side  to cut them to"""
    c, wanted = model.config, side
    side = max(wanted // c.vision_patch_size, 1) * c.vision_patch_size
    images, files = own_pictures(paths, side, open_data)
    say(f"{len(files)} pictures, ADM crop to {side} px{f', as {wanted} is no multiple of the patch' if side != wanted else ''}"
        f"{'' if paths else ': built-in shapes, since --images names none'}")
    target = normalize(images.to(device))                                            # (n, 3, side, side)
    z = model.get_reconstruction_latents(target)
    say(f"latents {tuple(z.shape[1:])}, mean {z.mean():.3f}, deviation {z.std():.3f}")
    if c.train_reconstruction:
        paint(target, model.get_latents_decoded_images(z), files, out)
    if c.train_clip and c.text_vocab_size < 49408:
        say(f"nothing is named: the text tower knows {c.text_vocab_size} ids, CLIP's tokenizer has 49408")
    elif c.train_clip:
        say_names(model, target, names, files, out, device, get_tokenizer)


def paint(target, back, files, out):
    """PSNR of each picture, and check.png"""
    a, b = (denormalize(x).clamp(0, 1) for x in (target, back))
    side, painted = a.shape[-1], b.shape[-1]
    if painted != side:
        say(f"the decoder paints {painted} px from {side} px, as the official one always does (16 a latent): averaged to {side} px for PSNR")
    for name, value in zip(files, psnr(a, F.interpolate(b, side, mode="area")).tolist()):
        metric(out, "PSNR", value, f"{name}, ADM crop {side} px, fp32")
    page = torch.cat([torch.cat([*x], 2) for x in (F.interpolate(a, painted), b)], 1)                # (3, 2 painted, n painted)
    page = (255 * page).byte().permute(1, 2, 0).cpu().numpy()                                         # (2 painted, n painted, 3)
    Image.fromarray(page).save(Path(out, "check.png"))
    say(f"wrote {Path(out, 'check.png')}: originals over reconstructions")


def say_names(model, target, names, files, out, device, get_tokenizer):
    """The five likeliest names of each picture. One prompt a name, for speed: eval.py zeroshot takes 80"""
    classes = names or (ASSETS / "imagenet_classnames.txt").read_text("utf-8").splitlines()
    W = zero_shot_classifier(text_encoder(model, device, get_tokenizer), classes, ["a photo of a {}."])
    best = (100 * model.get_clip_image_feature(target, normalize=True) @ W).softmax(1).topk(min(5, len(classes)))
    for name, p, k in zip(files, best.values.tolist(), best.indices.tolist()):
        answers = ", ".join(f"{classes[j]} {q:.3f}" for q, j in zip(p, k))
        metric(out, "best name", p[0], f"{name}: {answers}; of {len(classes)} names{'' if names else ' of ImageNet'}, 'a photo of a {{}}.', "
                                       "softmax of 100 x cosine, fp32")


def own_pictures(paths, side, open_data, most=16):
    """Files and folders -> uint8 (n, 3, side, side), their names; without any, eight built-in shapes and their captions"""
    if not paths:
        source = open_data("shapes", "val", 0, side)
        found = [source.load(k)[:2] for k in range(8)]
        return torch.stack([torch.tensor(pixels(adm_crop(image, side))) for image, _ in found]), [caption for _, caption in found]
    files = [f for p in map(Path, paths) for f in (sorted(f for f in p.iterdir() if is_picture(f.name)) if p.is_dir() else [p])]
    if not files:
        raise ValueError(f"--images {' '.join(paths)}: no pictures there")
    if len(files) > most:
        say(f"{len(files)} pictures: the first {most} are looked at")
    images = []
    for f in files[:most]:
        try:
            images.append(torch.tensor(pixels(adm_crop(read_image(f), side))))
        except Exception as problem:                                      # a damaged file makes decoders raise whatever they like
            raise ValueError(f"--images: {f} cannot be read ({problem})") from None
    return torch.stack(images), [f.name for f in files[:most]]
