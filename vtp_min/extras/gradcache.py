"""Gradient caching: the gradient of a large batch with the memory of a small one.   Gao et al. 2021

    train.py --micro M      M images at a time on each process

CLIP and KoLeo compare all images of the batch, so the losses of micro-batches do not add up to the
loss of the batch. But the gradient of the batch can be computed from micro-batches if the gradient
with respect to each feature is known. One step has three parts:

    1. Compute the features of all micro-batches without a graph, and the teacher's embeddings.
    2. Compute CLIP and KoLeo from all features, and their gradients with respect to the features.
       These are the cached gradients: one vector per feature, so they need little memory.
    3. For each micro-batch, compute its features again, with a graph. Its loss is the sum of its
       own DINO, iBOT and reconstruction losses and of <feature, cached gradient>. By the chain
       rule, the gradient of this inner product is the micro-batch's part of the gradient of part 2.

The features of part 3 are equal to those of part 1, because stochastic depth is not drawn during
the forward pass: it comes with the batch (Batch.keep).

b images of a micro-batch for CLIP and reconstruction    bs images for self-supervision
E CLIP space    D width    K prototypes    m masked patches of a micro-batch    n micro-batches
"""
from dataclasses import replace

import torch

from .. import losses
from ..augment import mask_index_and_weight
from ..device import full_precision, move_to, to_fp32
from ..dist import all_reduce_max, all_reduce_sum, world_size
from ..model import head_input


def check_micro(args):
    """ValueError if --micro does not split the batch of a process into equal parts"""
    sizes = batch_sizes(args)
    valid = micro_sizes(args)
    if args.micro not in valid:
        # of two that are equally near, the larger one, which is faster
        nearest = min(reversed(valid), key=lambda micro: abs(micro - args.micro))
        raise ValueError(f"--micro {args.micro} does not split the batch of a process "
                         f"({' / '.join(map(str, sizes))}) into equal parts; try --micro {nearest}")


def batch_sizes(args):
    """-> numbers of images of this process: for CLIP, and for the other objectives that are on"""
    used = [(args.batch, 1), (args.batch_ssl, args.w_ssl), (args.batch_rec, args.w_rec)]
    return [n // world_size() for n, weight in used if weight]


def micro_sizes(args):
    """-> all values of --micro that split the batch of a process into equal parts, ascending"""
    sizes = batch_sizes(args)
    valid = []
    for parts in range(sizes[0], 0, -1):
        if all(size % parts == 0 for size in sizes):
            valid.append(sizes[0] // parts)
    return valid


def compute_gradients_cached(batch, temp, args, student, teacher, lpips, targets, amp, scaler,
                             device):
    """The same results as train.compute_gradients, up to rounding. Only the activations of
    args.micro images are in memory at once."""
    n = args.batch // world_size() // args.micro
    micro_batches = split_batch(batch, n, device)

    # 1. features of the student, without a graph; embeddings of the teacher
    features, embeddings = [], []
    with amp, torch.no_grad():
        for micro in micro_batches:
            micro = micro.to(device)                  # its images, one at a time to save memory
            features.append(pairwise_features(student, micro, args))
            if teacher:
                embeddings.append(teacher_embeddings(teacher, micro))
    centers = target_centers(teacher, embeddings, temp, targets, amp) if teacher else None

    # 2. CLIP and KoLeo, and their gradients with respect to the features
    leaves = {}                                       # features of the whole batch
    for name in features[0]:
        parts = [micro[name] for micro in features]
        leaves[name] = torch.cat(parts, image_dim(name)).requires_grad_()
    terms = pairwise_losses(leaves, args, student)
    if terms:
        # this adds the gradients of the logit scale and bias, too
        scaler.scale(losses.total_loss(terms, args)).backward()
    cached = {}
    for name, leaf in leaves.items():
        cached[name] = leaf.grad.chunk(n, image_dim(name))

    # 3. each micro-batch, with a graph
    all_terms, entropies, class_tokens = [], [], []
    for k, micro in enumerate(micro_batches):
        micro = micro.to(device)
        grads = {name: parts[k] for name, parts in cached.items()}
        micro_terms = {}
        if teacher:
            probabilities = teacher_targets(teacher, embeddings[k], centers, temp, amp)
            ssl, cls = backward_ssl(micro, probabilities, args, student, amp, scaler, n, grads)
            entropies.append(losses.entropy(probabilities["cls"]))
            class_tokens.append(cls)
            micro_terms |= ssl
        if args.w_clip or args.w_rec:
            micro_terms |= backward_joint(micro, args, student, lpips, amp, scaler, n, grads)
        all_terms.append(micro_terms)

    terms = {name: term.detach() for name, term in terms.items()}
    for name in all_terms[0]:
        # micro-batches have equal sizes, so the mean of their losses is the loss of the batch
        terms[name] = torch.stack([micro_terms[name] for micro_terms in all_terms]).mean()
    diagnostics = {}
    if teacher:
        diagnostics["teacher_entropy"] = torch.stack(entropies).mean()
        diagnostics["feature_std"] = losses.feature_std(torch.cat(class_tokens))
    if args.w_clip:
        diagnostics["logit_scale"] = student.model.logit_scale.detach().exp()
    return {"loss": losses.total_loss(terms, args)} | terms, diagnostics


# ---------------------------------------------------------------- parts 1 and 2
def pairwise_features(student, micro, args):
    """The features that CLIP and KoLeo compare -> {'img', 'txt': (b, E), 'koleo': (2, bs, D)}"""
    features = {}
    if args.w_clip:
        features["img"] = student.embed_image(*student.encode(micro.image, micro.keep["image"]))
        features["txt"] = student.embed_text(micro.text)
    if args.w_ssl and args.w_koleo:
        mask = micro.mask.flatten(0, 1)
        cls, _ = student.model.trunk(micro.crops.flatten(0, 1), mask, micro.keep["ssl"])
        features["koleo"] = cls.unflatten(0, (2, -1))
    return features


def image_dim(name):
    """The dimension of a feature that counts images: KoLeo's has the two global crops first"""
    return 1 if name == "koleo" else 0


def pairwise_losses(features, args, student):
    """The losses that compare images -> {'clip', 'koleo': ()}, those with a weight above 0

    features  as pairwise_features returns them, but of the whole batch of this process
    """
    terms = {}
    if args.w_clip:
        scale, bias = student.model.logit_scale.exp(), student.model.logit_bias
        img, txt = features["img"], features["txt"]
        terms["clip"] = losses.contrastive_loss(args.clip_loss, img, txt, scale, bias)
    if args.w_ssl and args.w_koleo:
        first, second = features["koleo"]
        terms["koleo"] = losses.koleo_loss(first) + losses.koleo_loss(second)
    return terms


# ---------------------------------------------------------------- part 3
def backward_ssl(micro, targets, args, student, amp, scaler, n, grads):
    """Backward pass of DINO, iBOT and KoLeo for one micro-batch. Gradients are added to the
    student's parameters.

    targets  probabilities, see teacher_targets      grads  cached gradients of the micro-batch
    -> {'dino', 'ibot': ()}, class tokens of the first global crop (bs, D)
    """
    with amp:
        s_cls, s_patch, features = student.views(
            micro.crops, micro.locals, micro.mask, micro.mask_index, micro.keep)
    terms = {"dino": losses.dino_loss(s_cls, targets["cls"]),
             "ibot": losses.ibot_loss(s_patch, targets["patch"], micro.mask_weight, micro.n_crops)}
    loss = scaler.scale(losses.total_loss(terms, args) / n)     # the batch has the mean over n
    if "koleo" in grads:
        loss = loss + inner_product(features, grads["koleo"])   # already scaled and weighted
    loss.backward()
    return {name: term.detach() for name, term in terms.items()}, features[0].detach()


def backward_joint(micro, args, student, lpips, amp, scaler, n, grads):
    """Backward pass of CLIP and reconstruction for one micro-batch. Gradients are added to the
    student's parameters.

    grads  cached gradients of the micro-batch
    -> {'rec': ()}, or {} if w_rec is 0
    """
    loss, terms = 0, {}
    with amp:
        cls, patches = student.encode(micro.image, micro.keep["image"])
        if args.w_clip:
            img, txt = student.embed_image(cls, patches), student.embed_text(micro.text)
        if args.w_rec:
            pixels = student.decode(student.rec_patches(micro, patches))
    if args.w_clip:
        loss = inner_product(img, grads["img"]) + inner_product(txt, grads["txt"])
    if args.w_rec:
        terms["rec"] = losses.rec_loss(pixels, micro.image[micro.rec], lpips)
        loss = loss + scaler.scale(losses.total_loss(terms, args) / n)
    loss.backward()
    return {name: term.detach() for name, term in terms.items()}


def inner_product(feature, grad):
    """-> (). Its gradient with respect to the feature is `grad`."""
    return (to_fp32(feature) * grad).sum()


# ---------------------------------------------------------------- targets of the teacher
def teacher_embeddings(teacher, micro):
    """The unit vectors from which the DINO head computes its logits. They are stored in place of
    the logits, which are much larger (K values each).

    -> {'cls': (2, bs, bottleneck), 'patch': (m, bottleneck)}
    """
    cls, patches = teacher.trunk(micro.crops.flatten(0, 1))
    masked = patches.flatten(0, 1)[micro.mask_index]
    embed = teacher.dino_head.embed
    return {"cls": embed(head_input(teacher.trunk, teacher.config, cls)).unflatten(0, (2, -1)),
            "patch": embed(head_input(teacher.trunk, teacher.config, masked))}


def teacher_logits(teacher, embeddings, amp):
    """(..., bottleneck) -> (..., K)"""
    with amp, torch.no_grad():
        return teacher.dino_head.prototype_logits(embeddings)


def teacher_targets(teacher, embeddings, centers, temp, amp):
    """Embeddings of a micro-batch -> probabilities {'cls': (2, bs, K), 'patch': (m, K)}"""
    targets = {}
    for name, x in embeddings.items():
        logits = teacher_logits(teacher, x, amp)
        targets[name] = losses.centered_softmax(logits, centers[name], temp)
    return targets


def target_centers(teacher, embeddings, temp, targets, amp):
    """Centers of this batch for teacher_targets -> {'cls': (K,), 'patch': (K,)}

    embeddings  of all micro-batches
    targets     losses.TeacherTargets; with its method "centering", targets.next_center is set

    The logits of the whole batch are never in memory at once. They are computed again whenever
    they are read.
    """
    centers = {}
    for name in ("cls", "patch"):
        def iterate_logits():
            for micro in embeddings:
                yield teacher_logits(teacher, micro[name].flatten(0, -2), amp)
        if targets.method == "sinkhorn":
            centers[name] = sinkhorn_center(iterate_logits, temp)
        else:
            centers[name] = targets.center[name]
            next_center = update_center(targets.center[name], iterate_logits)
            targets.next_center = targets.next_center | {name: next_center}
    return centers


@torch.no_grad()
@full_precision()
def sinkhorn_center(iterate_logits, temp, iterations=3):
    """-> center (K,) for which centered_softmax(logits, center, temp) equals sinkhorn(logits, temp)

    iterate_logits  function without arguments -> iterable of logits (rows, K), one for each
                    micro-batch. It is called several times.

    Sinkhorn multiplies the columns and the rows of q = exp(logits / temp) by factors, in turn. The
    row factors follow from the column factors, because each row must sum to 1. So only the column
    factors (K,) are kept. Since exp(logits / temp) * factor = exp((logits - center) / temp) with
    center = -temp * log(factor), they have the same effect as a center.
    """
    # the largest logit is subtracted, because exp overflows above 88; it cancels in the result
    maxima = []
    for logits in iterate_logits():
        # -inf is the maximum of a micro-batch without rows
        lowest = logits.new_full((1,), -torch.inf, dtype=to_fp32(logits).dtype)
        maxima.append(torch.cat([to_fp32(logits).flatten(), lowest]).max())
    largest = all_reduce_max(torch.stack(maxima).max())
    factor = None                                                # (K,)
    for _ in range(iterations):
        column_sum = 0
        for logits in iterate_logits():
            q = torch.exp((to_fp32(logits) - largest) / temp)    # (rows, K)
            if factor is None:
                column_sum = column_sum + q.sum(0)
            else:
                column_sum = column_sum + (1 / (q @ factor)) @ q     # 1 / (q @ factor): row factors
        column_sum = all_reduce_sum(column_sum)
        smallest = torch.finfo(column_sum.dtype).tiny            # the sum may underflow to 0
        # the mean is a common factor, which cancels; it keeps the numbers in range
        factor = column_sum.mean() / column_sum.clamp_min(smallest)
    return largest - temp * factor.log()


@torch.no_grad()
@full_precision()
def update_center(center, iterate_logits, momentum=0.9):
    """losses.update_center for the logits of several micro-batches -> (K,)

    center  (K,)      iterate_logits  see sinkhorn_center
    """
    total, rows = torch.zeros_like(center), torch.zeros_like(center[:1])
    for logits in iterate_logits():
        total = total + to_fp32(logits).sum(0)
        rows = rows + len(logits)
    total, rows = all_reduce_sum(total), all_reduce_sum(rows)
    new = momentum * center + (1 - momentum) * total / rows.clamp_min(1)
    return torch.where(rows > 0, new, center)


# ---------------------------------------------------------------- micro-batches
def split_batch(batch, n, device):
    """data.Batch -> list of n data.Batch. The images for self-supervision and reconstruction are
    evenly spaced in the batch, so each contiguous part contains an equal number of them.

    Images stay where they are. Everything else is copied to the device here, because both parts 1
    and 3 of a step read it.
    """
    keep = split_keep(batch, n, device)
    return [micro_batch(batch, n, k, keep[k], device) for k in range(n)]


def micro_batch(batch, n, k, keep, device):
    """Micro-batch k of n. Indices count the images and crops of the micro-batch."""
    part, small = {}, {}
    if batch.image is not None:
        part["image"] = batch.image.chunk(n)[k]
    if batch.text is not None:
        small["text"] = batch.text.chunk(n)[k]
    if batch.rec is not None:
        small["rec"] = batch.rec.chunk(n)[k] - k * len(part["image"])
    if batch.crops is not None:
        # dimension 0 counts crops, dimension 1 images
        part["crops"] = batch.crops.chunk(n, 1)[k]
        part["locals"] = batch.locals.chunk(n, 1)[k]
        part["n_crops"] = batch.n_crops // n
        small["mask"] = batch.mask.chunk(n, 1)[k]
        small["mask_index"], small["mask_weight"] = mask_index_and_weight(small["mask"])
    small = {name: move_to(value, device) for name, value in small.items()}
    return replace(batch, **part, **small, keep=keep)


# ---------------------------------------------------------------- stochastic depth
def split_keep(batch, n, device):
    """-> list of n dicts: Batch.keep of each micro-batch, on the device"""
    keep = [dict(batch.keep) for _ in range(n)]
    for name, blocks in batch.keep.items():
        if not blocks:                                           # rate 0
            continue
        branches = [branch for block in blocks for branch in block]
        parts = split_rows([rows for rows, _ in branches], keep_size(batch, name), n, device)
        for k in range(n):
            # attention and feed-forward of each block, as in augment.kept_rows
            pairs = [(rows, scale) for rows, (_, scale) in zip(parts[k], branches)]
            keep[k][name] = list(zip(pairs[0::2], pairs[1::2]))
    return keep


def keep_size(batch, name):
    """Number of images in each crop of the tensor that keep[name] indexes"""
    if name == "image":
        return len(batch.image)
    if name == "rec":
        return len(batch.rec)
    return batch.crops.shape[1]


def split_rows(branches, size, n, device):
    """Kept rows of the batch -> kept rows of n micro-batches, on the device

    branches  list of m tensors, ascending positions in a flattened (crops, size) array
    -> n lists of m tensors, ascending positions in a flattened (crops, size / n) array

    All of them are slices of one tensor, which is sorted and copied once: with 32 micro-batches,
    size L has 3072 slices.
    """
    m, part = len(branches), size // n
    rows = torch.cat(branches)
    branch = torch.arange(m).repeat_interleave(torch.tensor([len(x) for x in branches]))
    crop, image = rows // size, rows % size
    group = image // part * m + branch                           # which slice a row belongs to
    order = group.argsort(stable=True)                           # equal groups keep ascending rows
    lengths = group.bincount(minlength=n * m).tolist()
    rows = (crop * part + image % part)[order]
    slices = move_to(rows, device).split(lengths)
    return [slices[k * m:(k + 1) * m] for k in range(n)]
