"""Gradient caching: the gradient of a large batch with the memory of a small one.   Gao et al. 2021

    train.py --micro M      M images at a time on each process

CLIP and KoLeo compare all images of the batch, so the gradients of micro-batches cannot simply be
added. They can if the gradient with respect to each image's features is computed first:

    1. Compute the features of all micro-batches, without a graph, and the teacher's targets.
    2. Compute the losses that compare images, and their gradients with respect to the features.
    3. For each micro-batch, with a graph: its own losses, plus <feature, cached gradient>, which
       gives it its part of the gradient of step 2.
"""
from dataclasses import replace

import torch

from .. import losses
from ..augment import mask_index_and_weight
from ..device import full_precision, to_fp32
from ..dist import all_reduce_max, all_reduce_sum, world_size
from ..model import head_input, rec_patches


def check_micro(args):
    """ValueError if --micro does not split the batch of a process into equal parts"""
    used = [(args.batch, 1), (args.batch_ssl, args.w_ssl), (args.batch_rec, args.w_rec)]
    sizes = [n // world_size() for n, weight in used if weight]
    valid = []
    for parts in range(1, sizes[0] + 1):
        if all(size % parts == 0 for size in sizes):
            valid.append(sizes[0] // parts)
    if args.micro not in valid:
        nearest = min(valid, key=lambda micro: abs(micro - args.micro))
        raise ValueError(f"--micro {args.micro} does not split the batch of a process "
                         f"({' / '.join(map(str, sizes))}) into equal parts; try --micro {nearest}")


def compute_gradients_cached(batch, temp, args, student, teacher, lpips, targets, amp, scaler,
                             device):
    """The same as train.compute_gradients, up to rounding"""
    n = args.batch // world_size() // args.micro
    micro_batches = split_batch(batch, n)

    # 1. features of the student, without a graph; embeddings of the teacher
    features, embeddings = [], []
    with amp, torch.no_grad():
        for micro in micro_batches:
            micro = micro.to(device)
            features.append(compared_features(student, micro, args))
            if teacher:
                embeddings.append(teacher_embeddings(teacher, micro))
    centers = target_centers(teacher, embeddings, temp, targets, amp) if teacher else None

    # 2. losses that compare images, and their gradients with respect to the features
    leaves = {}
    for name in features[0]:
        dim = 1 if name == "koleo" else 0
        leaves[name] = torch.cat([micro[name] for micro in features], dim).requires_grad_()
    terms = comparing_losses(leaves, args, student)
    if terms:
        scaler.scale(losses.total_loss(terms, args)).backward()    # logit scale and bias too
    cached = {}
    for name, leaf in leaves.items():
        cached[name] = leaf.grad.chunk(n, 1 if name == "koleo" else 0)

    # 3. each micro-batch, with a graph
    own, entropies, class_tokens = [], [], []
    for k, micro in enumerate(micro_batches):
        micro = micro.to(device)
        grads = {name: parts[k] for name, parts in cached.items()}
        part = {}
        if teacher:
            probabilities = teacher_targets(teacher, embeddings[k], centers, temp, amp)
            ssl, cls = backward_ssl(micro, probabilities, args, student, amp, scaler, n, grads)
            entropies.append(losses.entropy(probabilities["cls"]))
            class_tokens.append(cls)
            part |= ssl
        if args.w_clip or args.w_rec:
            part |= backward_joint(micro, args, student, lpips, amp, scaler, n, grads)
        own.append(part)

    terms = {name: term.detach() for name, term in terms.items()}
    for name in own[0]:
        terms[name] = torch.stack([part[name] for part in own]).mean()
    diagnostics = {}
    if teacher:
        diagnostics["teacher_entropy"] = torch.stack(entropies).mean()
        diagnostics["feature_std"] = losses.feature_std(torch.cat(class_tokens))
    if args.w_clip:
        diagnostics["logit_scale"] = student.model.logit_scale.detach().exp()
    return {"loss": losses.total_loss(terms, args)} | terms, diagnostics


# ---------------------------------------------------------------- steps 1 and 2
def compared_features(student, micro, args):
    """What CLIP and KoLeo compare -> {'img', 'txt' (b, E), 'koleo' (2, bs, D)}"""
    found = {}
    if args.w_clip:
        found["img"] = student.embed_image(*student.encode(micro.image, micro.keep["clip"]))
        found["txt"] = student.embed_text(micro.text)
    if args.w_ssl and args.w_koleo:
        mask = micro.mask.flatten(0, 1)
        cls, _ = student.model.trunk(micro.crops.flatten(0, 1), mask, micro.keep["ssl"])
        found["koleo"] = cls.unflatten(0, (2, -1))
    return found


def comparing_losses(features, args, student):
    terms = {}
    if args.w_clip:
        scale, bias = student.model.logit_scale.exp(), student.model.logit_bias
        img, txt = features["img"], features["txt"]
        terms["clip"] = losses.contrastive_loss(args.clip_loss, img, txt, scale, bias)
    if args.w_ssl and args.w_koleo:
        first, second = features["koleo"]
        terms["koleo"] = losses.koleo_loss(first) + losses.koleo_loss(second)
    return terms


# ---------------------------------------------------------------- step 3
def backward_ssl(micro, targets, args, student, amp, scaler, n, grads):
    """-> {'dino', 'ibot'}, class tokens of the first global crop (bs, D)"""
    with amp:
        s_cls, s_patch, features = student.views(
            micro.crops, micro.locals, micro.mask, micro.mask_index, micro.keep)
    terms = {"dino": losses.dino_loss(s_cls, targets["cls"]),
             "ibot": losses.ibot_loss(s_patch, targets["patch"], micro.mask_weight, micro.n_crops)}
    loss = scaler.scale(losses.total_loss(terms, args) / n)
    if "koleo" in grads:
        loss = loss + inner_product(features, grads["koleo"])
    loss.backward()
    return {name: term.detach() for name, term in terms.items()}, features[0].detach()


def backward_joint(micro, args, student, lpips, amp, scaler, n, grads):
    """-> {'rec'}, or {}"""
    loss, terms = 0, {}
    with amp:
        cls, patches = student.encode(micro.image, micro.keep["clip"])
        if args.w_clip:
            img, txt = student.embed_image(cls, patches), student.embed_text(micro.text)
        if args.w_rec:
            pixels = student.decode(rec_patches(micro, patches, student))
    if args.w_clip:
        loss = inner_product(img, grads["img"]) + inner_product(txt, grads["txt"])
    if args.w_rec:
        terms["rec"] = losses.rec_loss(pixels, micro.image[micro.rec], lpips)
        loss = loss + scaler.scale(losses.total_loss(terms, args) / n)
    loss.backward()
    return {name: term.detach() for name, term in terms.items()}


def inner_product(feature, grad):
    """Its gradient with respect to the feature is the cached gradient"""
    return (to_fp32(feature) * grad).sum()


# ---------------------------------------------------------------- targets of the teacher
def teacher_embeddings(teacher, micro):
    """Unit vectors of the DINO head, which are much smaller than logits
    -> {'cls' (2, bs, .), 'patch' (m, .)}"""
    cls, patches = teacher.trunk(micro.crops.flatten(0, 1))
    masked = patches.flatten(0, 1)[micro.mask_index]
    embed = teacher.dino_head.embed
    return {"cls": embed(head_input(teacher.trunk, teacher.config, cls)).unflatten(0, (2, -1)),
            "patch": embed(head_input(teacher.trunk, teacher.config, masked))}


def teacher_logits(teacher, embeddings, amp):
    with amp, torch.no_grad():
        return teacher.dino_head.prototype_logits(embeddings)


def teacher_targets(teacher, embeddings, centers, temp, amp):
    targets = {}
    for name, x in embeddings.items():
        logits = teacher_logits(teacher, x, amp)
        targets[name] = losses.centered_softmax(logits, centers[name], temp)
    return targets


def target_centers(teacher, embeddings, temp, targets, amp):
    """The centers (K,) of this batch, for class tokens and for patches. The logits of the whole
    batch never lie in memory: they are computed anew in each pass."""
    centers = {}
    for name in ("cls", "patch"):
        def batches():
            for micro in embeddings:
                yield teacher_logits(teacher, micro[name].flatten(0, -2), amp)
        if targets.method == "sinkhorn":
            centers[name] = sinkhorn_center(batches, temp)
        else:
            centers[name] = targets.center[name]
            next_center = update_center(targets.center[name], batches)
            targets.next_center = targets.next_center | {name: next_center}
    return centers


@torch.no_grad()
@full_precision()
def sinkhorn_center(batches, temp, iterations=3):
    """The center (K,) with which centered_softmax(logits, center, temp) is sinkhorn(logits, temp)

    batches  function without arguments -> iterable of logits (n, K); called in each iteration

    Sinkhorn scales the columns and rows of q = exp(logits / temp) in turn. The factors of the rows
    follow from those of the columns, and exp(logits / temp) * factor is
    exp((logits - center) / temp). So only the column factors must be kept.
    """
    maxima = []
    for logits in batches():
        lowest = logits.new_full((1,), -torch.inf, dtype=to_fp32(logits).dtype)
        maxima.append(torch.cat([to_fp32(logits).flatten(), lowest]).max())
    largest = all_reduce_max(torch.stack(maxima).max())
    factor = None                                                # (K,)
    for _ in range(iterations):
        column_sum = 0
        for logits in batches():
            q = torch.exp((to_fp32(logits) - largest) / temp)    # (n, K)
            if factor is None:
                column_sum = column_sum + q.sum(0)
            else:
                column_sum = column_sum + (1 / (q @ factor)) @ q
        column_sum = all_reduce_sum(column_sum)
        smallest = torch.finfo(column_sum.dtype).tiny
        # the mean is a common factor, which cancels; it keeps the numbers in range
        factor = column_sum.mean() / column_sum.clamp_min(smallest)
    return largest - temp * factor.log()


@torch.no_grad()
@full_precision()
def update_center(center, batches, momentum=0.9):
    """losses.update_center for logits that come in parts"""
    total, rows = torch.zeros_like(center), torch.zeros_like(center[:1])
    for logits in batches():
        total = total + to_fp32(logits).sum(0)
        rows = rows + len(logits)
    total, rows = all_reduce_sum(total), all_reduce_sum(rows)
    new = momentum * center + (1 - momentum) * total / rows.clamp_min(1)
    return torch.where(rows > 0, new, center)


# ---------------------------------------------------------------- micro-batches
def split_batch(batch, n):
    """data.Batch -> n of them. Subsets are evenly spaced in the batch, so a contiguous part of it
    contains an equal part of each subset."""
    return [micro_batch(batch, n, k) for k in range(n)]


def micro_batch(batch, n, k):
    part = {}
    if batch.image is not None:
        part["image"] = batch.image.chunk(n)[k]
    if batch.text is not None:
        part["text"] = batch.text.chunk(n)[k]
    if batch.rec is not None:
        part["rec"] = batch.rec.chunk(n)[k] - k * len(part["image"])
    if batch.crops is not None:
        part["crops"] = batch.crops.chunk(n, 1)[k]
        part["locals"] = batch.locals.chunk(n, 1)[k]
        part["mask"] = batch.mask.chunk(n, 1)[k]
        part["mask_index"], part["mask_weight"] = mask_index_and_weight(part["mask"])
        part["n_crops"] = batch.n_crops // n
    keep = {}
    for name, blocks in batch.keep.items():
        rows = keep_size(batch, name)
        keep[name] = None
        if blocks is not None:
            keep[name] = [split_block(block, rows, n, k) for block in blocks]
    return replace(batch, **part, keep=keep)


def split_block(block, size, n, k):
    return tuple(split_keep(rows, scale, size, n, k) for rows, scale in block)


def keep_size(batch, name):
    """Number of images per crop in the batch that keep[name] indexes"""
    if name == "clip":
        return len(batch.image) if batch.image is not None else 0
    if name == "rec":
        return len(batch.rec)
    return batch.crops.shape[1] if batch.crops is not None else 0


def split_keep(rows, scale, size, n, k):
    """Kept rows of a batch of crops (c, size), flattened -> those of micro-batch k of n, in its
    own numbering"""
    part = size // n
    crop, row = rows // size, rows % size
    inside = (row >= k * part) & (row < (k + 1) * part)
    return (crop * part + row - k * part)[inside], scale
