"""The released code's linear probe (DINOv2's): linear heads trained by SGD on augmented crops.

13 learning rates x {last layer, last 4 layers}, and the same on latents; all heads are trained in
one pass over the frozen features. The released code reports the best of all on the validation set
itself, which is optimistic. It is reported here beside the accuracy of the head whose rate, layers
and epoch were chosen on a held-out part of the training set.

F numbers of a feature    R learning rates    C classes
"""
import math
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from ..augment import normalize, random_crop
from ..device import autocast, tf32_of
from ..dist import all_gather_ragged, rank, rank_slice, world_size
from ..probes import probe_features
from ..rng import Stream, make_rng
from ..run import ProgressBar, record_metric

# the released code's 13 learning rates, to be multiplied by batch / 256
RATES = tuple(m * 10.0 ** e for e in (-5, -4, -3, -2) for m in (1, 2, 5)) + (0.1,)


def official_features(model, image):
    """image (B, 3, H, W), normalised -> {name: (B, F)}

    n1, n4   class tokens of the last 1 and 4 blocks ++ mean patch of the last one, after the final
             norm: (n + 1) D numbers
    latent   mean of the patch latents
    """
    if not hasattr(model, "trunk"):                        # LDM
        return probe_features(model, image)
    n = min(4, model.config.vision_depth)
    layers = model.get_intermediate_layers_feature(image, n, return_class_token=True)
    mean = layers[-1][0].mean(1)                           # (B, D)
    cls = [cls_token for _, cls_token in layers]           # n of (B, D)
    return {"latent": model.trunk.feature_bottleneck(mean),
            "n1": torch.cat([cls[-1], mean], 1),
            f"n{n}": torch.cat([*cls, mean], 1)}


# ---------------------------------------------------------------- data
@dataclass
class Subset:
    """Some images of a source, as a source"""
    source: Any
    indices: Any

    def __len__(self):
        return len(self.indices)

    def load(self, index, rng=None):
        return self.source.load(int(self.indices[index]), rng)

    def name(self, index):
        return self.source.name(int(self.indices[index]))

    @property
    def spec(self):
        return self.source.spec


def augmented_batch(source, side, batch, seed, rows, step):
    """These rows of one SGD step -> images uint8 (b, 3, side, side), labels (b,)

    They depend on (seed, step, row) alone. An epoch visits all images in a random order. Augmented
    as in the released code: torchvision's RandomResizedCrop with its default area, bicubic, then a
    horizontal flip with probability 1/2. Unreadable images are reported and replaced.
    """
    images, labels = [], []
    for row in rows:
        rng = make_rng(Stream.EVAL, seed, step, row)
        epoch, k = divmod(step * batch + row, len(source))
        image, label = load_readable(source, epoch_order(seed, epoch, len(source))[k], rng)
        crop = random_crop(rng, image, side, (0.08, 1))
        if rng.random() < 0.5:
            crop = crop[..., ::-1].copy()
        images.append(crop)
        labels.append(label)
    return torch.from_numpy(np.stack(images)), torch.tensor(labels)


def load_readable(source, index, rng):
    """-> image, label; another image if this one cannot be read, ValueError after ten of them"""
    for _ in range(10):
        try:
            image, _, label = source.load(index, rng)
            return image, label
        except Exception as problem:                       # decoders raise errors of many types
            print(f"skipped {source.name(index)} ({problem}): another image takes its place",
                  flush=True)
            index = rng.integers(len(source))
    raise ValueError(f"ten images of {source.spec} in a row could not be read")


@lru_cache(maxsize=2)
def epoch_order(seed, epoch, n):
    return make_rng(Stream.EVAL, seed, epoch, 0, n).permutation(n)


# ---------------------------------------------------------------- SGD
@torch.no_grad()
def sgd_probe(batches, iterations, n_classes, sets, every, rates=RATES, seed=0):
    """Train one linear head for each kind of features and learning rate.

    batches     iterations x ({kind: (B, F)}, labels (B,)): features of the whole batch, over ranks
    sets        {name: ({kind: (n, F)}, labels (n,))}: accuracy is measured every `every` iterations
    -> {name: {kind: (measurements, R)}} accuracies

    As in the released code: SGD with momentum 0.9, no weight decay, cosine schedule to 0, weights
    from a normal distribution with std 0.01, biases 0. The heads of one kind are one matrix
    (F + 1, R*C), whose last row is the biases, and the gradient is written out: one matrix product
    updates all of them.
    """
    rates, heads, velocity = torch.tensor(rates), {}, {}
    found = {name: {kind: [] for kind in x} for name, (x, _) in sets.items()}
    for t, (x, y) in enumerate(batches):
        if t == 0:
            heads = initial_heads(x, len(rates) * n_classes, seed)
            velocity = {kind: torch.zeros_like(W) for kind, W in heads.items()}
        lr = rates * len(y) / 256 * (1 + math.cos(math.pi * t / iterations)) / 2
        lr = lr.repeat_interleave(n_classes).to(y.device)                      # (R*C,)
        for kind, W in heads.items():
            logits = (x[kind] @ W[:-1] + W[-1]).unflatten(1, (-1, n_classes))  # (B, R, C)
            # gradient of each head's mean cross-entropy with respect to its logits
            error = logits.softmax(-1) - F.one_hot(y, n_classes)[:, None]
            error = error.flatten(1) / len(y)                                  # (B, R*C)
            grad = torch.cat([x[kind].T @ error, error.sum(0, keepdim=True)])
            velocity[kind].mul_(0.9).add_(grad)
            W -= lr * velocity[kind]
        if (t + 1) % every == 0:
            for name, (features, labels) in sets.items():
                for kind, W in heads.items():
                    values = head_accuracies(W, features[kind], labels, n_classes)
                    found[name][kind].append(values)
    return {name: {kind: torch.stack(values) for kind, values in kinds.items()}
            for name, kinds in found.items()}


def initial_heads(x, columns, seed):
    """x  {kind: (B, F)} -> {kind: (F + 1, columns)}"""
    rng, heads = torch.Generator().manual_seed(seed), {}
    for kind in sorted(x):
        W = 0.01 * torch.randn(x[kind].shape[1] + 1, columns, generator=rng)
        W[-1] = 0
        heads[kind] = W.to(x[kind].device)
    return heads


def head_accuracies(W, x, y, n_classes, chunk=1024):
    """W (F + 1, R*C), x (n, F), y (n,) -> (R,)"""
    n_right = 0
    for rows, labels in zip(x.split(chunk), y.split(chunk)):
        logits = (rows @ W[:-1] + W[-1]).unflatten(1, (-1, n_classes))         # (b, R, C)
        n_right = n_right + (logits.argmax(-1) == labels[:, None]).sum(0)
    return n_right.cpu().double() / len(y)


# ---------------------------------------------------------------- the probe of a model
def run_probe(args, model, train, val, device, encode, map_in_workers):
    """Train and record.   train, val  sources with the same classes

    encode          (source, limit, crop, features) -> {kind: (n, F), "labels": (n,)}
    map_in_workers  function of data.py
    """
    c, C, B = model.config, len(val.classes), args.train_batch
    # crops of 224 for images of 256, at any size
    side = max(round(c.image_size * 224 / 256 / c.vision_patch_size), 1) * c.vision_patch_size
    kept, held_out = split_train(train, args.train_limit)
    iterations = args.epochs * args.epoch_length
    if min(B, len(held_out)) < world_size() or not len(kept) or iterations < 1:
        n = len(kept) + len(held_out)
        raise ValueError(f"{args.epochs} epochs of {args.epoch_length} x {B} over {n} training "
                         f"images are too few for {world_size()} processes")
    sets = {}
    for name, source, limit in (("val", val, args.limit), ("held-out", held_out, None)):
        features = encode(source, side, limit, "centre", official_features)
        sets[name] = features, features.pop("labels")
    make_batch = partial(augmented_batch, kept, side, B, args.seed, rank_slice(B))

    def batches():
        loader = map_in_workers(make_batch, range(iterations), args.workers)
        for images, labels in ProgressBar(loader, "probe", iterations, leave=False,
                                          disable=rank() > 0):
            with torch.no_grad(), autocast(device, args.precision):
                x = official_features(model, normalize(images.to(device)))
            x = {kind: all_gather_ragged(v.float()) for kind, v in x.items()}
            yield x, all_gather_ragged(labels.to(device))

    found = sgd_probe(batches(), iterations, C, sets, args.epoch_length, seed=args.seed)
    protocol = (f"{len(kept)} train (RandomResizedCrop {side} bicubic + flip), {len(held_out)} "
                f"held out, {len(sets['val'][1])} val pictures of {val.spec} (centre {side} of "
                f"{round(side * 8 / 7)} px), SGD, {args.epochs} epochs of {args.epoch_length} x "
                f"{B}, 13 rates, {args.precision}{tf32_of(device)} trunk, seed {args.seed}, "
                f"chance {1 / C:.3f}")
    layers = sorted(found["val"].keys() - {"latent"})
    if layers:                                             # LDM has only latents
        numbers = " or ".join(kind[1:] for kind in layers)
        record("official", layers, found, B, args.out, protocol,
               f"class tokens of the last {numbers} layers ++ mean patch, full width")
    d = sets["val"][0]["latent"].shape[1]
    record("latent official", ["latent"], found, B, args.out, protocol,
           f"mean of the {d}-d patch latents (the figures' features)")


def split_train(train, limit):
    """-> Subset to train on, Subset held out: a tenth of the images; of ImageNet, 10,000"""
    n = min(limit or len(train), len(train))
    indices = [k * len(train) // n for k in range(n)]      # evenly spread over the classes
    every = max(n // 10_000, 10)
    return Subset(train, np.delete(indices, np.s_[::every])), Subset(train, indices[::every])


def record(name, kinds, found, batch, out, protocol, features):
    """The best accuracy over kinds, epochs and rates, and the one chosen on held-out images"""
    val = torch.stack([found["val"][kind] for kind in kinds])                  # (kinds, epochs, R)
    held_out = torch.stack([found["held-out"][kind] for kind in kinds])
    record_metric(out, f"linear probe {name}", val.max().item(),
                  f"{features}; best of {val.numel()} on the validation set ITSELF, as the "
                  f"released code; {protocol}")
    k, epoch, r = np.unravel_index(int(held_out.argmax()), held_out.shape)
    record_metric(out, f"linear probe {name}, held-out choice", val[k, epoch, r].item(),
                  f"{features}; {kinds[k]}, epoch {epoch + 1}, rate {RATES[r]:g} x {batch}/256 "
                  f"chosen on the held-out pictures; {protocol}")
