"""Schedules, parameter groups of AdamW, and the exponential moving average (EMA) of weights.

The schedules are functions of the step number only, so they need no state in a checkpoint.
"""
import math

import torch

LR_END = 1e-6                             # learning rate at the end of the cosine: DINOv2


# ---------------------------------------------------------------- schedules
def cosine(step, start, end, steps):
    """Half a cosine from `start` at step 0 to `end` at step `steps` - 1, constant afterwards.

    DINOv3's form. DINOv2's cosine stops one step before its final value.
    """
    progress = min(step / max(steps - 1, 1), 1)           # max: no division by 0 if steps is 1
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def linear(step, start, end, steps):
    """A straight line from `start` at step 0 to `end` at step `steps`, constant afterwards"""
    return start + (end - start) * min(step / max(steps, 1), 1)


def warmup_cosine(step, lr, warmup, steps, end=LR_END):
    """Linear warm-up to `lr` over `warmup` steps as in OpenCLIP, then half a cosine to `end`"""
    if step < warmup:
        # step + 1: with a learning rate of 0, the first step would change nothing
        return lr * (step + 1) / warmup
    # min: a learning rate below `end` stays constant, it does not rise
    return cosine(step - warmup, lr, min(end, lr), steps - warmup)


# ---------------------------------------------------------------- parameter groups
def param_groups(student, layer_decay=1.0, patch_lr=1.0):
    """Student -> list of parameter groups for torch.optim.AdamW

    No weight decay for vectors (biases, norms, LayerScale, logit scale) and position tables, as in
    OpenCLIP and DINOv2. The class token, the mask token and the gains of the DINO head do decay, as
    in DINOv2. The last layer of the DINO head can be frozen at the start of training, so it has its
    own group.

    layer_decay  learning rate of a trunk block relative to that of the block after it (DINOv2: 0.9)
    patch_lr     factor on the learning rate of the patch embedding (DINOv2: 0.2)

    Each group has three keys that set_lr reads: decay (bool), last (bool, the last layer of the
    DINO head) and factor (float, on the learning rate).
    """
    groups = {}
    for name, p in student.named_parameters():
        # The tokens have the shapes (1, 1, D) and (1, D), and the gains (K, 1): they decay.
        decay = p.ndim > 1 and "positional" not in name
        is_last_layer = "last_layer" in name
        exponent = layer_decay_exponent(name, len(student.model.trunk.blocks))
        factor = layer_decay ** exponent
        if "patch_embed" in name:
            factor *= patch_lr
        # AdamW has one learning rate and one weight decay per group.
        groups.setdefault((decay, is_last_layer, factor), []).append(p)
    return [{"params": params, "decay": decay, "last": is_last_layer, "factor": factor}
            for (decay, is_last_layer, factor), params in groups.items()]


def layer_decay_exponent(name, depth):
    """Exponent of layer_decay for a parameter of the student, with the layer numbers of DINOv2.

    depth + 1 for the patch embedding, the class token and the mask token; depth for the first block
    of the trunk, down to 1 for the last block; 0 for the final norm and all other modules.
    """
    part, *rest = name.removeprefix("model.trunk.").split(".")
    if part == "blocks":
        return depth - int(rest[0])                       # rest[0] is the number of the block
    return depth + 1 if part in ("cls_token", "mask_token", "patch_embed") else 0


def set_lr(optimizer, lr, last_layer_lr, weight_decay):
    """Set the values of the current step in the groups of `param_groups`.

    last_layer_lr  for the last layer of the DINO head; 0 freezes it (DINOv2)
    """
    for group in optimizer.param_groups:
        group["lr"] = (last_layer_lr if group["last"] else lr) * group["factor"]
        group["weight_decay"] = weight_decay if group["decay"] else 0.0


# ---------------------------------------------------------------- moving average
@torch.no_grad()
def update_ema(target, source, decay):
    """target <- decay * target + (1 - decay) * source, in place, for two iterables of tensors

    Two products and a sum, because the released code rounds in this way; torch.lerp would differ
    in the last bit.
    """
    # _foreach operations process a list of tensors in few kernel launches. They need lists, and
    # Module.parameters() returns a generator.
    target, source = list(target), list(source)
    torch._foreach_mul_(target, decay)
    torch._foreach_add_(target, torch._foreach_mul(source, 1 - decay))
