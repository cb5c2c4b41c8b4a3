"""What frozen features know, measured three ways: features in, accuracy (0..1) out. Which features were probed is the caller's to say.

zero_shot_classifier, zero_shot   class names as captions, no training                    CLIP, Sec. 3.1; templates and 100x as in OpenCLIP
linear_probe                      one linear layer on cached features                     VTP's "linear probing", as a convex problem
knn                               votes of the nearest training images, no parameters     DINO, Sec. 4.1

Features are (n, E) float tensors in memory, labels (n,) int64; everything runs on the features' device.
"""
import torch
from torch.nn import functional as F
from tqdm import tqdm

from .dist import rank


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
