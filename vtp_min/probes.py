"""What frozen features know, measured four ways: features in, accuracy (0..1) out.

last_layer, last_layers           which features: the latents and the full width; the released code's choice of layers
zero_shot_classifier, zero_shot   class names as captions, no training                    CLIP, Sec. 3.1; templates and 100x as in OpenCLIP
linear_probe                      one linear layer on cached features                     VTP's "linear probing", as a convex problem
sgd_probe                         many linear layers on augmented pictures, one a rate    the released code's linear probing, as DINOv2's
Part, augmented                   which pictures it trains on, and how they are cut
knn                               votes of the nearest training images, no parameters     DINO, Sec. 4.1

Features are (n, E) float tensors in memory, labels (n,) int64; everything runs on the features' device.
"""
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from .dist import rank
from .views import EVAL, lots, random_crop


# ---- what is probed

def last_layer(model, x):
    """-> (B, .) 'latent' mean latent; if there is a trunk 'full' class token ++ mean patch, and 'clip' CLIP feature if there is one"""
    if not hasattr(model, "trunk"):
        return {"latent": model.get_reconstruction_latents(x).mean((2, 3))}
    cls, patches = model.trunk(x)
    clip = {"clip": model.project(cls, patches)} if model.config.train_clip else {}
    return {"latent": model.trunk.feature_bottleneck(patches).mean(1), "full": torch.cat([cls, patches.mean(1)], 1)} | clip


def last_layers(model, x):
    """-> what the released code probes: 'n1', 'n4' class tokens of the last n blocks ++ mean patch of the last, after the final norm (B, (n + 1) D); and 'latent'"""
    if not hasattr(model, "trunk"):
        return last_layer(model, x)
    layers = model.get_intermediate_layers_feature(x, min(4, model.config.vision_depth), return_class_token=True)      # pairs (patches, cls)
    mean, tokens = layers[-1][0].mean(1), [cls for _, cls in layers]
    return {"latent": model.trunk.feature_bottleneck(mean), "n1": torch.cat([tokens[-1], mean], 1), f"n{len(tokens)}": torch.cat([*tokens, mean], 1)}


# ---- words

def text_encoder(model, device, get_tokenizer):
    """-> a function, captions -> (n, E). Behind the end token a causal tower reads nothing: ids are cut to the longest caption"""
    c = model.config
    tokenize = get_tokenizer("ViT-B-32", c.text_context_length)
    if c.text_vocab_size < 49408:
        raise ValueError(f"the text tower knows {c.text_vocab_size} ids and CLIP's tokenizer has 49408: words cannot be asked")

    def captions(texts):
        ids = tokenize(texts)
        if not c.text_no_causal_mask and c.text_pool_type == "argmax":
            ids = ids[:, :int((ids != 0).any(0).nonzero().max()) + 1]
        return model.get_clip_text_feature(ids.to(device), normalize=False)
    return captions


@torch.no_grad()
def zero_shot_classifier(encode, names, templates):
    """Captions -> classifier. Each prompt's feature is normalised, averaged over templates, normalised again.

    encode  list of n strings -> (n, E), any length        names  C class names        templates  strings with {} for the name
    -> (E, C), unit columns
    """
    columns = []
    for name in tqdm(names, desc="class names", leave=False, disable=rank() > 0):
        prompts = F.normalize(encode([t.replace("{}", name) for t in templates]).float(), dim=-1)     # (templates, E)
        columns.append(F.normalize(prompts.mean(0), dim=0))                                           # (E,)
    return torch.stack(columns, 1)


def zero_shot(img, W, labels, topk=(1, 5)):
    """Share of images whose class is among the k best captions.   img (n, E), any length; W (E, C) from zero_shot_classifier

    -> {"top1": ..., "top5": ...}; a k that is not below C would always give 1 and is left out
    """
    logits = 100 * F.normalize(img.float(), dim=-1) @ W                   # (n, C); 100 is the protocol's, not the learned scale
    ranks = logits.topk(min(max(topk), W.shape[1])).indices               # (n, k) best first
    return {f"top{k}": (ranks[:, :k] == labels[:, None]).any(1).float().mean().item() for k in topk if k < W.shape[1]}


# ---- linear probes

def linear_probe(train_x, train_y, test_x, test_y, n_classes, strengths=(1, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5), seed=0):
    """Multinomial logistic regression on cached features -> dict(accuracy, l2, held_out)

    A protocol of ours for small data, not the paper's SGD on augmented ImageNet: features are standardised by the train set; the
    strength of the L2 penalty is the one of `strengths` that is best on a held-out tenth of the TRAIN set (ties: the stronger);
    then the layer is fitted anew on all of train and reads the test set once. L-BFGS, from zero: a convex problem, so neither
    batch order nor learning rate has a say. held_out is the accuracy that chose.
    """
    if len(train_x) < 20:
        raise ValueError(f"a linear probe holds out a tenth of its training images, and {len(train_x)} are too few; give at least 20")
    mean, std = train_x.float().mean(0), train_x.float().std(0).clamp(min=1e-6)
    train_x, test_x = ((x.float() - mean) / std for x in (train_x, test_x))
    order = torch.randperm(len(train_x), generator=torch.Generator().manual_seed(seed)).to(train_x.device)
    held, kept = order[: len(order) // 10], order[len(order) // 10:]
    score = {}
    start = None                                                          # from strong to weak, each starts where the last one ended
    for l2 in sorted(strengths, reverse=True):
        start = fit(train_x[kept], train_y[kept], n_classes, l2, start)
        score[l2] = share_right(start, train_x[held], train_y[held])
    l2 = max(score, key=score.get)
    return dict(accuracy=share_right(fit(train_x, train_y, n_classes, l2), test_x, test_y), l2=l2, held_out=score[l2])


def fit(x, y, n_classes, l2, start=None, steps=200):
    """Minimise mean cross-entropy + l2/2 |W|^2.   x (n, E)  ->  (E + 1, C): weights, and the bias as the last row (not penalised)"""
    W = (x.new_zeros(x.shape[1] + 1, n_classes) if start is None else start.clone()).requires_grad_()
    solver = torch.optim.LBFGS([W], max_iter=steps, tolerance_grad=1e-5, tolerance_change=1e-10, line_search_fn="strong_wolfe")

    def loss():
        solver.zero_grad()
        value = F.cross_entropy(x @ W[:-1] + W[-1], y) + l2 / 2 * W[:-1].square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    return W.detach()


def share_right(W, x, y):
    return ((x @ W[:-1] + W[-1]).argmax(1) == y).float().mean().item()


RATES = tuple(m * 10.0 ** e for e in (-5, -4, -3, -2) for m in (1, 2, 5)) + (0.1,)        # released code: 13, each times batch / 256


@torch.no_grad()
def sgd_probe(batches, iterations, n_classes, sets, every, rates=RATES, seed=0):
    """Linear heads on features that change with each batch's augmentation, one a feature set and rate, all trained in one pass.   DINOv2, VTP's released code

    batches     iterations x ({kind: (B, F)}, labels (B,)): frozen features of the whole batch (over all processes)
    sets        {name: ({kind: (n, F)}, labels (n,))}, where accuracy is read after each `every` iterations
    -> {name: {kind: (readings, len(rates))}} accuracies

    Released code: SGD with momentum 0.9, no weight decay, cosine to 0, weights from a normal of 0.01, biases 0. Heads do not see each other: the sum
    of their losses has each one's own gradient. A feature set's heads are one (F + 1, R*C) matrix, last row the biases.
    """
    rates, heads, speed = torch.tensor(rates), {}, {}
    found = {name: {kind: [] for kind in x} for name, (x, _) in sets.items()}
    for t, (x, y) in enumerate(batches):
        if t == 0:
            draw = torch.Generator().manual_seed(seed)
            for kind in sorted(x):
                W = 0.01 * torch.randn(x[kind].shape[1] + 1, len(rates) * n_classes, generator=draw)
                W[-1] = 0
                heads[kind], speed[kind] = W.to(y.device), torch.zeros_like(W).to(y.device)
        rate = rates * len(y) / 256 * (1 + math.cos(math.pi * t / iterations)) / 2
        rate = rate.repeat_interleave(n_classes).to(y.device)                                        # (R*C,)
        for kind, W in heads.items():
            logits = (x[kind] @ W[:-1] + W[-1]).unflatten(1, (-1, n_classes))                          # (B, R, C)
            error = (logits.softmax(-1) - F.one_hot(y, n_classes)[:, None]).flatten(1) / len(y)        # d mean cross-entropy / d logits, each head its own
            speed[kind].mul_(0.9).add_(torch.cat([x[kind].T @ error, error.sum(0, keepdim=True)]))
            W -= rate * speed[kind]
        if (t + 1) % every == 0:
            for name, (features, labels) in sets.items():
                for kind, W in heads.items():
                    found[name][kind].append(shares_right(W, features[kind], labels, n_classes))
    return {name: {kind: torch.stack(rows) for kind, rows in kinds.items()} for name, kinds in found.items()}


def shares_right(W, x, y, n_classes, chunk=1024):
    """(F + 1, R*C) heads -> (R,) accuracies"""
    right = sum(((a @ W[:-1] + W[-1]).unflatten(1, (-1, n_classes)).argmax(-1) == b[:, None]).sum(0) for a, b in zip(x.split(chunk), y.split(chunk)))
    return right.cpu().double() / len(y)


@dataclass
class Part:
    """Some pictures of a source, as a source"""
    source: Any
    indices: Any

    def __len__(self): return len(self.indices)
    def load(self, index, rng=None): return self.source.load(int(self.indices[index]), rng)
    def name(self, index): return self.source.name(int(self.indices[index]))

    @property
    def spec(self): return self.source.spec


def augmented(source, side, batch, seed, rows, step):
    """These rows of one SGD step -> images uint8 (b, 3, side, side), labels (b,), of (seed, step, row) alone. An epoch walks all pictures in a drawn order.

    torchvision's RandomResizedCrop with its default area, bicubic, then a flip in half of the cases: the released code's. What cannot be read is replaced, aloud.
    """
    images, labels = [], []
    for row in rows:
        rng, (epoch, k) = lots(EVAL, seed, step, row), divmod(step * batch + row, len(source))
        index = order(seed, epoch, len(source))[k]
        for attempt in range(10):
            try:
                picture, _, label = source.load(index, rng)
                break
            except Exception as problem:                                  # a damaged file makes decoders raise whatever they like
                print(f"skipped {source.name(index)} ({problem}): another picture takes its place", flush=True)
                index = rng.integers(len(source))
        else:
            raise ValueError(f"ten pictures of {source.spec} in a row could not be read")
        crop = random_crop(rng, picture, side, (0.08, 1))
        images.append(crop[..., ::-1].copy() if rng.random() < 0.5 else crop)
        labels.append(label)
    return torch.from_numpy(np.stack(images)), torch.tensor(labels)


@lru_cache(maxsize=2)
def order(seed, epoch, n):
    return lots(EVAL, seed, epoch, 0, n).permutation(n)


# ---- neighbours

@torch.no_grad()
def knn(train_x, train_y, test_x, test_y, n_classes, k=20, temperature=0.07, chunk=1024):
    """Accuracy of a weighted vote: the k nearest training images by cosine, each with weight exp(cosine / temperature).

    k = 20 and temperature 0.07 are DINO's; `chunk` test rows at a time, which only bounds memory
    """
    if k > len(train_x):
        raise ValueError(f"kNN asks {k} neighbours, but there are {len(train_x)} training images; give a smaller k")
    train_x, test_x = F.normalize(train_x.float(), dim=-1), F.normalize(test_x.float(), dim=-1)
    right = 0
    for x, y in zip(test_x.split(chunk), test_y.split(chunk)):
        cosine, near = (x @ train_x.T).topk(k)                                                        # (chunk, k)
        votes = x.new_zeros(len(x), n_classes).scatter_add_(1, train_y[near], (cosine / temperature).exp())
        right += (votes.argmax(1) == y).sum().item()
    return right / len(test_x)
