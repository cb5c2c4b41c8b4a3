"""Check a model, released or trained here, on a few images: `python eval.py check`.

    reconstruction    PSNR of each image, and check.png with the originals above the reconstructions
    classification    the five most probable class names of each image

Models without a decoder or without a text tower are accepted; the corresponding part is omitted. An
official decoder outputs 16 x 16 pixels per latent for any patch size, so its output can be larger
than the image; it is then averaged to the size of the image before the PSNR is computed.

n images    S side of the crop    d latent channels    E width of the CLIP space    C class names
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

MAX_IMAGES = 16                # all images are encoded in one batch, and shown in one row
CLIP_VOCABULARY = 49408        # ids of CLIP's tokenizer


@torch.no_grad()
def check_model(model, paths, names, side, out, device, open_data, get_tokenizer):
    """Reconstruct and classify a few images, and print the results.

    model  VTPModel on `device`
    paths  image files and folders; None: eight images of the built-in shapes
    names  class names to choose from; None: ImageNet's 1000 classes
    side   side of the square crop in pixels, rounded down to a multiple of the patch size
    out    existing folder for check.png and metrics.jsonl
    open_data, get_tokenizer  functions of data.py and tokenizer.py
    ValueError if there are no images or one cannot be read.
    """
    c = model.config
    crop = max(side // c.vision_patch_size, 1) * c.vision_patch_size
    images, labels = load_images(paths, crop, open_data)
    rounded = "" if crop == side else f", because {side} is not a multiple of the patch size"
    source = "" if paths else ": built-in shapes, because --images is not given"
    print0(f"{len(labels)} images, ADM crop to {crop} px{rounded}{source}")
    target = normalize(images.to(device))                          # (n, 3, S, S)
    z = model.get_reconstruction_latents(target)                   # (n, d, h, w)
    print0(f"latents {tuple(z.shape[1:])}, mean {z.mean():.3f}, standard deviation {z.std():.3f}")
    if c.train_reconstruction:
        compare(target, model.get_latents_decoded_images(z), labels, out)
    if c.train_clip and c.text_vocab_size < CLIP_VOCABULARY:
        # an id of the tokenizer could be outside of the embedding table
        print0(f"no classification: the text tower has {c.text_vocab_size} ids, CLIP's tokenizer "
               f"has {CLIP_VOCABULARY}")
    elif c.train_clip:
        print_top5(model, target, names, labels, out, device, get_tokenizer)


def compare(target, reconstruction, labels, out):
    """Record the PSNR of each image, and write OUT/check.png.

    target          (n, 3, S, S), ImageNet-normalised
    reconstruction  (n, 3, S', S'), ImageNet-normalised; S' differs from S if the decoder does not
                    output one patch of pixels per latent
    """
    original = denormalize(target).clamp(0, 1)                     # (n, 3, S, S)
    output = denormalize(reconstruction).clamp(0, 1)               # (n, 3, S', S')
    side = original.shape[-1]
    decoded = output.shape[-1]
    if decoded != side:
        print0(f"the decoder outputs {decoded} px from {side} px (16 px per latent, as in the "
               f"official models); averaged to {side} px for the PSNR")
    values = psnr(original, F.interpolate(output, side, mode="area")).tolist()
    for label, value in zip(labels, values):
        record_metric(out, "PSNR", value, f"{label}, ADM crop {side} px, fp32")
    rows = [torch.cat(list(F.interpolate(original, decoded)), dim=-1),     # (3, S', n S')
            torch.cat(list(output), dim=-1)]
    grid = (255 * torch.cat(rows, dim=-2)).byte().permute(1, 2, 0).cpu().numpy()
    Image.fromarray(grid).save(Path(out, "check.png"))
    print0(f"wrote {Path(out, 'check.png')}: originals above reconstructions")


def print_top5(model, target, names, labels, out, device, get_tokenizer):
    """Record the five most probable class names of each image.

    target  (n, 3, S, S), ImageNet-normalised
    Each class has one prompt, so that this takes seconds; eval.py zeroshot uses 80 prompts.
    """
    classes = names or (ASSETS / "imagenet_classnames.txt").read_text("utf-8").splitlines()
    encode = text_encoder(model, device, get_tokenizer)
    W = zero_shot_classifier(encode, classes, ["a photo of a {}."])         # (E, C)
    features = model.get_clip_image_feature(target, normalize=True)         # (n, E)
    best = (100 * features @ W).softmax(1).topk(min(5, len(classes)))       # both (n, 5)
    source = "" if names else " of ImageNet"
    for label, values, indices in zip(labels, best.values.tolist(), best.indices.tolist()):
        answers = [f"{classes[j]} {p:.3f}" for p, j in zip(values, indices)]
        record_metric(out, "best name", values[0],
                      f"{label}: {', '.join(answers)}; of {len(classes)} names{source}, "
                      f"'a photo of a {{}}.', softmax of 100 x cosine, fp32")


def load_images(paths, side, open_data):
    """-> images uint8 (n, 3, side, side), list of labels: file names, or the captions of shapes

    ValueError, which names the file, if an image cannot be read.
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
        except Exception as problem:           # decoders raise exceptions of many types
            raise ValueError(f"--images: {file} cannot be read as an image ({problem})") from None
        labels.append(file.name)
    return torch.stack([torch.tensor(to_chw(image)) for image in images]), labels


def find_files(paths):
    """List of files and folders -> list of at most MAX_IMAGES image files. Folders inside a
    folder are not searched."""
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            files += sorted(file for file in path.iterdir() if is_image(file.name))
        else:
            files.append(path)
    if paths and not files:
        raise ValueError(f"--images {' '.join(map(str, paths))}: found no image files")
    if len(files) > MAX_IMAGES:
        print0(f"{len(files)} images found; only the first {MAX_IMAGES} are used")
    return files[:MAX_IMAGES]
