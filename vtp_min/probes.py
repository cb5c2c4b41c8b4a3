"""Accuracy of frozen features: zero-shot, linear probe, nearest neighbours.

    probe_features                    model, images -> mean latent; class token and mean patch
    zero_shot_classifier, zero_shot   class names as captions, no training           CLIP, Sec. 3.1
    linear_probe                      one linear layer on cached features
    knn                               votes of the nearest training images      DINO, Sec. 4.1

Features are (n, F) float tensors in memory, labels (n,) int64. The released code's linear probe, on
augmented crops, is in extras/probe_official.py.

B images    n pictures of a set    D width    d latent channels    E CLIP space    C classes
"""
import torch
from torch.nn import functional as F
from tqdm import tqdm

from .dist import rank

L2_STRENGTHS = (1, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)


def probe_features(model, image):
    """image (B, 3, H, W), normalised -> {name: (B, F)}

    latent  mean of the patch latents, d numbers. A model without a trunk (LDM) has only this one.
    full    class token and mean patch of the last layer, 2 D numbers
    clip    feature of the CLIP head, E numbers, if there is one
    """
    if not hasattr(model, "trunk"):
        return {"latent": model.get_reconstruction_latents(image).mean((2, 3))}
    cls, patches = model.trunk(image)                      # (B, D), (B, N, D)
    features = {"latent": model.trunk.feature_bottleneck(patches).mean(1),
                "full": torch.cat([cls, patches.mean(1)], 1)}
    if model.config.train_clip:
        features["clip"] = model.project(cls, patches)
    return features


# ---------------------------------------------------------------- zero-shot
def text_encoder(model, device, get_tokenizer):
    """-> a function, list of n captions -> (n, E)"""
    c = model.config
    tokenize = get_tokenizer("ViT-B-32", c.text_context_length)
    if c.text_vocab_size < 49408:
        raise ValueError(f"the text tower knows {c.text_vocab_size} ids and CLIP's tokenizer has "
                         f"49408: zero-shot classification is not possible")

    def encode(captions):
        ids = tokenize(captions)
        if not c.text_no_causal_mask and c.text_pool_type == "argmax":
            # causal attention does not read what follows the end token: drop the padding
            longest = int((ids != 0).any(0).nonzero().max()) + 1
            ids = ids[:, :longest]
        return model.get_clip_text_feature(ids.to(device), normalize=False)
    return encode


@torch.no_grad()
def zero_shot_classifier(encode, names, templates):
    """Mean text feature of each class, as in CLIP and OpenCLIP -> (E, C), columns of length 1

    encode  list of n captions -> (n, E), any length      names      C class names
    templates  captions with {} for the name. Features are normalised, averaged, normalised again.
    """
    columns = []
    for name in tqdm(names, desc="class names", leave=False, disable=rank() > 0):
        prompts = [template.replace("{}", name) for template in templates]
        features = F.normalize(encode(prompts).float(), dim=-1)         # (templates, E)
        columns.append(F.normalize(features.mean(0), dim=0))            # (E,)
    return torch.stack(columns, 1)


def zero_shot(features, classifier, labels, topk=(1, 5)):
    """features (n, E), any length; classifier (E, C) -> {"top1": accuracy, "top5": accuracy}

    A k that is not below C would always give 1 and is left out.
    """
    # the scale of 100 is the protocol's, not the learned one
    logits = 100 * F.normalize(features.float(), dim=-1) @ classifier   # (n, C)
    C = classifier.shape[1]
    best = logits.topk(min(max(topk), C)).indices                       # (n, k)
    right = best == labels[:, None]
    return {f"top{k}": right[:, :k].any(1).float().mean().item() for k in topk if k < C}


# ---------------------------------------------------------------- linear probe
def linear_probe(train_x, train_y, test_x, test_y, n_classes, strengths=L2_STRENGTHS, seed=0):
    """Multinomial logistic regression on cached features -> dict(accuracy, l2, held_out)

    Our protocol for small data, not the paper's SGD on augmented ImageNet. Features are
    standardised with the training set. The L2 strength is the one with the best accuracy
    (`held_out`) on a held-out tenth of the training set, the stronger one if equal. Then the layer
    is fitted to the whole training set and evaluated once. L-BFGS on a convex problem: neither
    batch order nor learning rate matters.
    """
    if len(train_x) < 20:
        raise ValueError(f"a linear probe holds out a tenth of its training images, and "
                         f"{len(train_x)} are too few; give at least 20")
    mean, std = train_x.float().mean(0), train_x.float().std(0).clamp(min=1e-6)
    train_x, test_x = (train_x.float() - mean) / std, (test_x.float() - mean) / std
    rng = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(train_x), generator=rng).to(train_x.device)
    held_out, kept = order[:len(order) // 10], order[len(order) // 10:]
    score, start = {}, None
    for l2 in sorted(strengths, reverse=True):             # each fit starts from the one before
        start = fit(train_x[kept], train_y[kept], n_classes, l2, start)
        score[l2] = accuracy(start, train_x[held_out], train_y[held_out])
    l2 = max(score, key=score.get)
    W = fit(train_x, train_y, n_classes, l2)
    return dict(accuracy=accuracy(W, test_x, test_y), l2=l2, held_out=score[l2])


def fit(x, y, n_classes, l2, start=None, steps=200):
    """Minimise mean cross-entropy + l2/2 |W|^2.   x (n, F), y (n,) -> (F + 1, C)

    The last row is the bias, which is not penalised. Starts from zero, or from `start`.
    """
    W = x.new_zeros(x.shape[1] + 1, n_classes) if start is None else start.clone()
    W.requires_grad_()
    optimizer = torch.optim.LBFGS([W], max_iter=steps, tolerance_grad=1e-5,
                                  tolerance_change=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ W[:-1] + W[-1], y) + l2 / 2 * W[:-1].square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return W.detach()


def accuracy(W, x, y):
    return ((x @ W[:-1] + W[-1]).argmax(1) == y).float().mean().item()


# ---------------------------------------------------------------- nearest neighbours
@torch.no_grad()
def knn(train_x, train_y, test_x, test_y, n_classes, k=20, temperature=0.07, chunk=1024):
    """Accuracy of a vote of the k nearest training images, weighted by exp(cosine / temperature).

    k = 20 and temperature 0.07 are DINO's; `chunk` test rows at a time only bound the memory.
    """
    if k > len(train_x):
        raise ValueError(f"kNN needs {k} neighbours, but there are {len(train_x)} training images; "
                         f"give a smaller k")
    train_x = F.normalize(train_x.float(), dim=-1)
    test_x = F.normalize(test_x.float(), dim=-1)
    n_right = 0
    for x, y in zip(test_x.split(chunk), test_y.split(chunk)):
        cosine, nearest = (x @ train_x.T).topk(k)                       # (chunk, k)
        weight = (cosine / temperature).exp()
        votes = x.new_zeros(len(x), n_classes).scatter_add_(1, train_y[nearest], weight)
        n_right += (votes.argmax(1) == y).sum().item()
    return n_right / len(test_x)
