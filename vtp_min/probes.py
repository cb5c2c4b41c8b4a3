"""Accuracy of frozen features: zero-shot, linear probe, nearest neighbours.

    probe_features                    model, images -> latents, full features, CLIP features
    zero_shot_classifier, zero_shot   class names as captions, without training      CLIP Sec. 3.1
    linear_probe                      one linear layer on frozen features            VTP Sec. 4.1
    knn                               vote of the nearest training images            DINO Sec. 4.1

The model is not trained here, so features are computed once and kept: (n, F) float tensors with
labels (n,) int64. The linear probe of the released code, which uses augmented crops, is in
extras/probe_official.py.

B images of a batch    n images of a data set    F width of a feature    C classes
D width of the trunk   d latent channels         E width of the CLIP space
"""
import torch
from torch.nn import functional as F
from tqdm import tqdm

from .dist import rank

# candidates of the linear probe; one range suits all models, because features are standardised
L2_STRENGTHS = (1, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)


def probe_features(model, image):
    """image (B, 3, H, W), normalised -> {name: (B, F)}

    latent  mean of the latents of all patches, d numbers: the feature that the paper's figures
            probe (VTP Sec. 4.1). A model without a trunk (baseline LDM) has only this one.
    full    class token and mean patch token of the last layer, 2 D numbers
    clip    image feature of the CLIP head, E numbers, if the model was trained with CLIP
    """
    if not hasattr(model, "trunk"):
        return {"latent": model.get_reconstruction_latents(image).mean((2, 3))}
    cls, patches = model.trunk(image)                      # (B, D), (B, N, D)
    features = {"latent": model.trunk.feature_bottleneck(patches).mean(1),        # (B, d)
                "full": torch.cat([cls, patches.mean(1)], 1)}                     # (B, 2 D)
    if model.config.train_clip:
        features["clip"] = model.project(cls, patches)     # (B, E)
    return features


# ---------------------------------------------------------------- zero-shot
def text_encoder(model, device, get_tokenizer):
    """-> a function: list of n captions -> text features (n, E), not normalised

    ValueError if the model's vocabulary is smaller than CLIP's.
    """
    c = model.config
    tokenize = get_tokenizer("ViT-B-32", c.text_context_length)
    if c.text_vocab_size < 49408:
        raise ValueError(f"the text tower has {c.text_vocab_size} token ids, but CLIP's tokenizer "
                         f"needs 49408; zero-shot classification is not possible with this model")

    def encode(captions):
        ids = tokenize(captions)                           # (n, text_context_length)
        if not c.text_no_causal_mask and c.text_pool_type == "argmax":
            # With causal attention, tokens after the end token do not change the output there, so
            # columns that hold only padding are left out.
            longest = int((ids != 0).any(0).nonzero().max()) + 1
            ids = ids[:, :longest]
        return model.get_clip_text_feature(ids.to(device), normalize=False)
    return encode


@torch.no_grad()
def zero_shot_classifier(encode, names, templates):
    """Mean text feature of each class, as in CLIP and OpenCLIP -> (E, C), columns of length 1

    encode     function: list of n captions -> (n, E), of any length
    names      C class names
    templates  captions in which {} stands for the class name
    """
    columns = []
    for name in tqdm(names, desc="class names", leave=False, disable=rank() > 0):
        prompts = [template.replace("{}", name) for template in templates]
        # normalised before the mean, so that all templates count equally, and again after it
        features = F.normalize(encode(prompts).float(), dim=-1)         # (templates, E)
        columns.append(F.normalize(features.mean(0), dim=0))            # (E,)
    return torch.stack(columns, 1)


def zero_shot(features, classifier, labels, topk=(1, 5)):
    """Top-k accuracy of the class whose text feature is most similar to the image feature

    features (n, E), of any length; classifier (E, C); labels (n,) -> {"top1": ..., "top5": ...},
    accuracies in 0..1. If k is not below C, the top-k accuracy is always 1 and is left out.
    """
    if classifier.shape[1] < 2:
        raise ValueError("there is only one class, so zero-shot classification is always right")
    # 100 is part of the protocol of OpenCLIP and VTP, whatever scale the model has learned
    logits = 100 * F.normalize(features.float(), dim=-1) @ classifier   # (n, C)
    C = classifier.shape[1]
    top = logits.topk(min(max(topk), C)).indices                        # (n, k)  best class first
    correct = top == labels[:, None]
    return {f"top{k}": correct[:, :k].any(1).float().mean().item() for k in topk if k < C}


# ---------------------------------------------------------------- linear probe
def linear_probe(train_x, train_y, test_x, test_y, n_classes, strengths=L2_STRENGTHS, seed=0):
    """Multinomial logistic regression on frozen features -> dict(accuracy, l2, held_out)

    train_x, test_x  (n, F) features      train_y, test_y  (n,) labels
    strengths        L2 penalties to choose from
    accuracy         on the test set      l2  the chosen penalty
    held_out         accuracy on a held-out tenth of the training set, by which l2 was chosen

    This protocol for small data is ours; the released code trains with SGD on augmented images.
    ValueError for fewer than 20 training images.
    """
    if len(train_x) < 20:
        raise ValueError(f"found {len(train_x)} training images, but a linear probe holds out a "
                         f"tenth of them and needs at least 20")
    # Standardised: the penalty would otherwise depend on the scale of the features. A feature that
    # is constant has std 0 and becomes 0.
    mean, std = train_x.float().mean(0), train_x.float().std(0).clamp(min=1e-6)
    train_x, test_x = (train_x.float() - mean) / std, (test_x.float() - mean) / std
    # the test set must not choose the penalty, so a part of the training set is held out for it
    rng = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(train_x), generator=rng).to(train_x.device)
    held_out, kept = order[:len(order) // 10], order[len(order) // 10:]
    scores, W = {}, None
    for l2 in sorted(strengths, reverse=True):
        # starts from the previous solution, which needs fewer iterations than starting from zero
        W = logistic_regression(train_x[kept], train_y[kept], n_classes, l2, W)
        scores[l2] = accuracy(W, train_x[held_out], train_y[held_out])
    l2 = max(scores, key=scores.get)                       # the stronger penalty if two are equal
    W = logistic_regression(train_x, train_y, n_classes, l2)
    return dict(accuracy=accuracy(W, test_x, test_y), l2=l2, held_out=scores[l2])


def logistic_regression(x, y, n_classes, l2, start=None, steps=200):
    """Minimise mean cross-entropy + l2/2 |W|^2.   x (n, F), y (n,) -> W (F + 1, C)

    The last row of W is the bias, which is not penalised. start  initial W, or None for zeros

    The problem is convex, so L-BFGS on the whole set finds its minimum without a choice of
    learning rate, batch size or order.
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

    with torch.enable_grad():                              # the caller may be under no_grad
        optimizer.step(closure)
    return W.detach()


def accuracy(W, x, y):
    """Accuracy of a linear classifier W (F + 1, C) on x (n, F), y (n,) -> float in 0..1"""
    return ((x @ W[:-1] + W[-1]).argmax(1) == y).float().mean().item()


# ---------------------------------------------------------------- nearest neighbours
@torch.no_grad()
def knn(train_x, train_y, test_x, test_y, n_classes, k=20, temperature=0.07, chunk=1024):
    """Accuracy of a vote of the k nearest training images -> float in 0..1.   DINO Sec. 4.1

    train_x, test_x  (n, F)      train_y, test_y  (n,)
    A neighbour votes for its class with weight exp(cosine similarity / temperature). k = 20 and
    temperature 0.07 are DINO's. ValueError if there are fewer than k training images.
    """
    if k > len(train_x):
        raise ValueError(f"found {len(train_x)} training images, but kNN needs {k} neighbours; "
                         f"give a smaller k")
    train_x = F.normalize(train_x.float(), dim=-1)
    test_x = F.normalize(test_x.float(), dim=-1)
    n_correct = 0
    # the matrix of all similarities may not fit in memory; `chunk` rows of it do
    for x, y in zip(test_x.split(chunk), test_y.split(chunk)):
        cosine, nearest = (x @ train_x.T).topk(k)                       # (chunk, k)
        weight = (cosine / temperature).exp()
        votes = x.new_zeros(len(x), n_classes).scatter_add_(1, train_y[nearest], weight)
        n_correct += (votes.argmax(1) == y).sum().item()
    return n_correct / len(test_x)
