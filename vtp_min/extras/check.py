"""A quick test of weights, released or our own, on a few images.

    images -> latents -> images: PSNR, and check.png with originals above reconstructions
    images -> the five most probable of some names

Works without a decoder, without CLIP, and with an official decoder, which outputs 16 pixels for
each latent whatever the patch size; it prints what it leaves out.
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from ..augment import ASSETS, adm_crop, denormalize, normalize, to_chw
from ..dist import print0
from ..fid import psnr
from ..probes import text_encoder, zero_shot_classifier
from ..run import record_metric
from .images import is_image, read_image

MAX_IMAGES = 16
CLIP_VOCABULARY = 49408


@torch.no_grad()
def try_out(model, paths, names, side, out, device, open_data, get_tokenizer):
    """paths  files and folders; None: built-in shapes
    names  what the images may show; None: ImageNet's 1000 classes
    side   of the crop, rounded down to a multiple of the patch size
    out    folder of check.png and metrics.jsonl
    """
    c = model.config
    crop = max(side // c.vision_patch_size, 1) * c.vision_patch_size
    images, labels = load_images(paths, crop, open_data)
    rounded = "" if crop == side else f", because {side} is no multiple of the patch size"
    source = "" if paths else ": built-in shapes, because --images is not given"
    print0(f"{len(labels)} images, ADM crop to {crop} px{rounded}{source}")
    target = normalize(images.to(device))                          # (n, 3, S, S)
    z = model.get_reconstruction_latents(target)                   # (n, d, h, w)
    print0(f"latents {tuple(z.shape[1:])}, mean {z.mean():.3f}, standard deviation {z.std():.3f}")
    if c.train_reconstruction:
        compare(target, model.get_latents_decoded_images(z), labels, out)
    if c.train_clip and c.text_vocab_size < CLIP_VOCABULARY:
        print0(f"no classification: the text tower has {c.text_vocab_size} ids, CLIP's tokenizer "
               f"has {CLIP_VOCABULARY}")
    elif c.train_clip:
        print_top5(model, target, names, labels, out, device, get_tokenizer)


def compare(target, reconstruction, labels, out):
    """PSNR of each image, and check.png"""
    a = denormalize(target).clamp(0, 1)                            # (n, 3, S, S)
    b = denormalize(reconstruction).clamp(0, 1)                    # (n, 3, S', S')
    side = a.shape[-1]
    decoded = b.shape[-1]
    if decoded != side:
        print0(f"the decoder outputs {decoded} px from {side} px (16 per latent, as in the "
               f"official models): averaged to {side} px for the PSNR")
    values = psnr(a, F.interpolate(b, side, mode="area")).tolist()
    for label, value in zip(labels, values):
        record_metric(out, "PSNR", value, f"{label}, ADM crop {side} px, fp32")
    rows = [torch.cat(list(F.interpolate(a, decoded)), dim=-1),    # (3, S', n S')
            torch.cat(list(b), dim=-1)]
    sheet = (255 * torch.cat(rows, dim=-2)).byte().permute(1, 2, 0).cpu().numpy()
    Image.fromarray(sheet).save(Path(out, "check.png"))
    print0(f"wrote {Path(out, 'check.png')}: originals above reconstructions")


def print_top5(model, target, names, labels, out, device, get_tokenizer):
    """The five most probable names of each image. One prompt for each name, because it is fast;
    eval.py zeroshot uses 80."""
    classes = names or (ASSETS / "imagenet_classnames.txt").read_text("utf-8").splitlines()
    encode = text_encoder(model, device, get_tokenizer)
    W = zero_shot_classifier(encode, classes, ["a photo of a {}."])         # (E, C)
    features = model.get_clip_image_feature(target, normalize=True)         # (n, E)
    best = (100 * features @ W).softmax(1).topk(min(5, len(classes)))
    source = "" if names else " of ImageNet"
    for label, values, indices in zip(labels, best.values.tolist(), best.indices.tolist()):
        answers = [f"{classes[j]} {p:.3f}" for p, j in zip(values, indices)]
        record_metric(out, "best name", values[0],
                      f"{label}: {', '.join(answers)}; of {len(classes)} names{source}, "
                      f"'a photo of a {{}}.', softmax of 100 x cosine, fp32")


def load_images(paths, side, open_data):
    """-> uint8 (n, 3, side, side), and a label for each: its file name, or the caption of a shape

    ValueError, with the name, if a file cannot be read.
    """
    images = []
    labels = []
    if not paths:
        source = open_data("shapes", "val", 0, side)
        for index in range(8):
            image, caption, _ = source.load(index)
            images.append(adm_crop(image, side))
            labels.append(caption)
    for file in find_files(paths or ()):
        try:
            images.append(adm_crop(read_image(file), side))
        except Exception as problem:           # a damaged file can raise any exception
            raise ValueError(f"--images: {file} cannot be read ({problem})") from None
        labels.append(file.name)
    return torch.stack([torch.tensor(to_chw(image)) for image in images]), labels


def find_files(paths):
    """Files and folders -> at most MAX_IMAGES image files"""
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            files += sorted(file for file in path.iterdir() if is_image(file.name))
        else:
            files.append(path)
    if paths and not files:
        raise ValueError(f"--images {' '.join(map(str, paths))}: there are no images")
    if len(files) > MAX_IMAGES:
        print0(f"{len(files)} images: only the first {MAX_IMAGES} are used")
    return files[:MAX_IMAGES]
