"""The linear probe of the released code (DINOv2's): linear heads trained by SGD on augmented crops.

There is one head for each of 13 learning rates and each kind of features: last layer, last 4
layers, latents. All heads are trained at the same time, on the same batches of frozen features. The
released code reports the best accuracy of all heads and epochs on the validation set itself, which
overestimates the accuracy on new images. It is reported here next to the validation accuracy of the
head that is chosen on a held-out part of the training set.

B images    F features    R learning rates    C classes    D width
"""
import math
import time
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from ..augment import normalize, random_crop
from ..device import autocast, tf32_of
from ..dist import all_gather_ragged, print0, rank, rank_slice, world_size
from ..probes import probe_features
from ..rng import Stream, make_rng
from ..run import ProgressBar, record_metric
from .workers import cores_per_process

# the 13 learning rates of the released code; they are multiplied by batch / 256
RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1)


def official_features(model, image):
    """image (B, 3, H, W), ImageNet-normalised -> {name: (B, F)}

    n1, n4   class tokens of the last 1 and 4 blocks, concatenated with the mean patch of the last
             block, after the final norm: F = (n + 1) D
    latent   mean of the patch latents: F = d
    """
    if not hasattr(model, "trunk"):                        # a CNN baseline has only latents
        return probe_features(model, image)
    n = min(4, model.config.vision_depth)
    layers = model.get_intermediate_layers_feature(image, n, return_class_token=True)
    mean = layers[-1][0].mean(1)                           # (B, D)
    cls = [cls_token for _, cls_token in layers]           # n tensors (B, D)
    # the bottleneck is linear, so the mean of the latents is the latent of the mean patch
    return {"latent": model.trunk.feature_bottleneck(mean),
            "n1": torch.cat([cls[-1], mean], 1),
            f"n{n}": torch.cat([*cls, mean], 1)}


# ---------------------------------------------------------------- data
@dataclass
class Subset:
    """A data source that contains the images `indices` of another one"""
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
    """The given rows of the batch of one SGD step -> images uint8 (b, 3, side, side), labels (b,)

    source  data source with labels
    side    side of the crops in pixels
    batch   images per step, over all ranks
    rows    numbers within 0..batch-1: the part of this rank
    Each image depends only on (seed, step, row), not on the number of ranks. An epoch visits all
    images in random order. Augmentation as in the released code: torchvision's RandomResizedCrop
    with its default area, bicubic, then a horizontal flip with probability 1/2. Unreadable images
    are reported and replaced by others.
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
    """-> image, label

    An image that cannot be read is replaced by a random one. ValueError if this fails ten times.
    """
    for _ in range(10):
        try:
            image, _, label = source.load(index, rng)
            return image, label
        except Exception as problem:           # decoders raise exceptions of many types
            print(f"skipped {source.name(index)} ({problem}): it is replaced by another image",
                  flush=True)
            index = rng.integers(len(source))
    raise ValueError(f"ten images of {source.spec} in a row could not be read; check --data")


@lru_cache(maxsize=2)
def epoch_order(seed, epoch, n):
    """-> random permutation of 0..n-1; cached, because every row of a batch needs it"""
    return make_rng(Stream.EVAL, seed, epoch, 0, n).permutation(n)


def print_time_to_decode(source, side, n_images, args, measured=8):
    """Print how long it takes to decode n_images training images, and what makes it faster, if it
    is more than a minute. A few images are measured."""
    if rank() > 0:
        return
    augmented_batch(source, side, measured, args.seed, range(1), 0)            # warm-up
    start = time.perf_counter()
    augmented_batch(source, side, measured, args.seed, range(measured), 0)
    seconds = (time.perf_counter() - start) / measured
    decoding = world_size() * max(1, args.workers)                             # processes
    if seconds * n_images / decoding < 60:
        return

    def duration(processes):
        return ProgressBar.format_interval(seconds * n_images / processes)
    print0(f"probe: {n_images:,} training images have to be decoded, at {1000 * seconds:.1f} ms "
           f"each ({measured} measured): about {duration(decoding)} (h:min:s) in {decoding} "
           f"process(es), if the model is not slower.")
    workers = cores_per_process() - 1
    if workers > max(1, args.workers):
        print0(f"With all cores of this machine: about {duration(workers * world_size())}; type: "
               f"eval.py probe {args.run} --protocol official --workers {workers}")
    print0(f"With 8 GPUs: torchrun --nproc-per-node 8 eval.py probe {args.run} --protocol official "
           f"--workers W, where W is the number of cores per GPU. A shorter probe: --set epochs=1")


# ---------------------------------------------------------------- SGD
@torch.no_grad()
def sgd_probe(batches, iterations, n_classes, sets, every, rates=RATES, seed=0):
    """Train one linear head for each kind of features and each learning rate.

    batches     iterable of pairs ({kind: (B, F)}, labels (B,)), gathered from all ranks
    iterations  number of pairs, one for each SGD step
    n_classes   C
    sets        {name: ({kind: (n, F)}, labels (n,))}: data on which the accuracy is measured
    every       number of iterations between two measurements
    rates       R learning rates for a batch of 256
    -> {name: {kind: (measurements, R)}} accuracies

    As in the released code: SGD with momentum 0.9, no weight decay, cosine schedule to 0, weights
    from a normal distribution with standard deviation 0.01, biases 0. The R heads of one kind form
    one matrix (F + 1, R*C), whose last row is the biases. The gradient of the cross-entropy is
    written out, so that one matrix product computes it for all heads.
    """
    rates = torch.tensor(rates)
    heads, velocity = {}, {}                   # {kind: (F + 1, R*C)}; velocity: SGD with momentum
    accuracies = {name: {kind: [] for kind in x} for name, (x, _) in sets.items()}
    for t, (x, y) in enumerate(batches):
        if t == 0:
            heads = initial_heads(x, len(rates) * n_classes, seed)
            velocity = {kind: torch.zeros_like(W) for kind, W in heads.items()}
        lr = rates * len(y) / 256 * (1 + math.cos(math.pi * t / iterations)) / 2
        lr = lr.repeat_interleave(n_classes).to(y.device)                      # (R*C,)
        for kind, W in heads.items():
            logits = (x[kind] @ W[:-1] + W[-1]).unflatten(1, (-1, n_classes))  # (B, R, C)
            # gradient of the mean cross-entropy of each head with respect to its logits:
            # (softmax - one_hot) / B
            error = logits.softmax(-1) - F.one_hot(y, n_classes)[:, None]
            error = error.flatten(1) / len(y)                                  # (B, R*C)
            grad = torch.cat([x[kind].T @ error, error.sum(0, keepdim=True)])
            velocity[kind].mul_(0.9).add_(grad)
            W -= lr * velocity[kind]
        if (t + 1) % every == 0:
            for name, (features, labels) in sets.items():
                for kind, W in heads.items():
                    values = head_accuracies(W, features[kind], labels, n_classes)
                    accuracies[name][kind].append(values)
    for kinds in accuracies.values():
        for kind, values in kinds.items():
            kinds[kind] = torch.stack(values)
    return accuracies


def initial_heads(x, columns, seed):
    """x {kind: (B, F)} -> {kind: (F + 1, columns)}"""
    rng = torch.Generator().manual_seed(seed)
    heads = {}
    for kind in sorted(x):                     # sorted, so that the random numbers are reproducible
        W = 0.01 * torch.randn(x[kind].shape[1] + 1, columns, generator=rng)
        W[-1] = 0                              # biases
        heads[kind] = W.to(x[kind].device)
    return heads


def head_accuracies(W, x, y, n_classes, chunk=1024):
    """W (F + 1, R*C), features x (n, F), labels y (n,) -> accuracies (R,)"""
    n_correct = 0
    for rows, labels in zip(x.split(chunk), y.split(chunk)):
        logits = (rows @ W[:-1] + W[-1]).unflatten(1, (-1, n_classes))         # (b, R, C)
        n_correct = n_correct + (logits.argmax(-1) == labels[:, None]).sum(0)
    return n_correct.cpu().double() / len(y)


# ---------------------------------------------------------------- the whole evaluation
def run_probe(args, model, train, val, device, encode, map_in_workers):
    """Train the heads on a model's features and record their accuracies: `eval.py probe --protocol
    official`.

    args            flags and settings of eval.py probe
    train, val      data sources with the same classes
    encode          function (source, side, limit, crop, features) -> {kind: (n, F), "labels": (n,)}
    map_in_workers  function of data.py
    ValueError if there are too few images or iterations.
    """
    c = model.config
    C = len(val.classes)
    B = args.train_batch
    # the released code crops 224 px from images of 256 px: the same ratio for other sizes
    side = max(round(c.image_size * 224 / 256 / c.vision_patch_size), 1) * c.vision_patch_size
    kept, held_out = split_train(train, args.train_limit)
    iterations = args.epochs * args.epoch_length
    if min(B, len(held_out)) < world_size() or not len(kept) or iterations < 1:
        n = len(kept) + len(held_out)
        raise ValueError(f"{args.epochs} epochs of {args.epoch_length} batches of {B} from {n} "
                         f"training images are too few for {world_size()} processes; increase "
                         f"--train-limit, or --set train_batch=..., epochs=... or epoch_length=...")
    print_time_to_decode(kept, side, iterations * B, args)
    sets = {}
    for name, source, limit in (("val", val, args.limit), ("held-out", held_out, None)):
        features = encode(source, side, limit, "centre", official_features)
        labels = features.pop("labels")
        sets[name] = features, labels
    make_batch = partial(augmented_batch, kept, side, B, args.seed, rank_slice(B))

    def batches():
        loader = map_in_workers(make_batch, range(iterations), args.workers)
        for images, labels in ProgressBar(loader, "probe", iterations, leave=False,
                                          disable=rank() > 0):
            with torch.no_grad(), autocast(device, args.precision):
                x = official_features(model, normalize(images.to(device)))
            # the heads are replicated: every rank makes the same update with the whole batch
            x = {kind: all_gather_ragged(v.float()) for kind, v in x.items()}
            yield x, all_gather_ragged(labels.to(device))

    accuracies = sgd_probe(batches(), iterations, C, sets, args.epoch_length, seed=args.seed)
    protocol = (f"{len(kept)} train (RandomResizedCrop {side} bicubic + flip), {len(held_out)} "
                f"held out, {len(sets['val'][1])} val images of {val.spec} (centre {side} of "
                f"{round(side * 8 / 7)} px), SGD, {args.epochs} epochs of {args.epoch_length} x "
                f"{B}, 13 rates, {args.precision}{tf32_of(device)} trunk, seed {args.seed}, "
                f"chance {1 / C:.3f}")
    layers = sorted(accuracies["val"].keys() - {"latent"})                     # ["n1", "n4"]
    if layers:                                             # a CNN baseline has only latents
        numbers = " or ".join(kind[1:] for kind in layers)
        record("official", layers, accuracies, B, args.out, protocol,
               f"class tokens of the last {numbers} layers ++ mean patch, full width")
    d = sets["val"][0]["latent"].shape[1]
    record("latent official", ["latent"], accuracies, B, args.out, protocol,
           f"mean of the {d}-d patch latents (as in the paper's figures)")


def split_train(train, limit):
    """-> Subset for training, Subset that is held out

    limit  maximum number of images in both; None: all
    One tenth of the images is held out, but at most about 10,000.
    """
    n = min(limit or len(train), len(train))
    indices = [k * len(train) // n for k in range(n)]      # evenly spaced, so from all classes
    every = max(n // 10_000, 10)
    kept = np.delete(indices, np.s_[::every])
    return Subset(train, kept), Subset(train, indices[::every])


def record(name, kinds, accuracies, batch, out, protocol, features):
    """Record the best validation accuracy over kinds, epochs and rates, as the released code, and
    the validation accuracy of the head with the best held-out accuracy.

    kinds       kinds of features to choose from
    accuracies  {"val" and "held-out": {kind: (epochs, R)}}
    features    description of the features
    """
    val = torch.stack([accuracies["val"][kind] for kind in kinds])             # (kinds, epochs, R)
    held_out = torch.stack([accuracies["held-out"][kind] for kind in kinds])
    record_metric(out, f"linear probe {name}", val.max().item(),
                  f"{features}; best of {val.numel()} on the validation set ITSELF, as the "
                  f"released code; {protocol}")
    k, epoch, r = np.unravel_index(int(held_out.argmax()), held_out.shape)
    record_metric(out, f"linear probe {name}, held-out choice", val[k, epoch, r].item(),
                  f"{features}; {kinds[k]}, epoch {epoch + 1}, rate {RATES[r]:g} x {batch}/256 "
                  f"chosen on the held-out images; {protocol}")
