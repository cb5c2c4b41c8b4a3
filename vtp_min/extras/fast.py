"""Faster forms of functions of the core, with the same results up to rounding.

    undo = install()        rebinds them; undo() brings the textbook forms back

The core holds the textbook form; tests/test_fast.py shows that both agree. train.py, eval.py and
dit.py install them on CPUs, where they were measured (study/fast.txt), unless --set fast=0.
"""
import ctypes
import sys

import torch
import torch.nn.functional as F

from .. import augment, losses, vit
from ..device import full_precision, to_fp32
from . import fast_dit, fast_views


def install(dit=None, free_memory=False):
    """Rebind the functions of vit, losses and augment, and those of the module `dit` if given

    free_memory  see set_malloc_threshold      -> a function that undoes it
    """
    replacements = [(vit, "rms_norm", rms_norm), (vit, "rotate", rotate),
                    (vit, "attention", attention), (vit.SwiGLU, "forward", swiglu_forward),
                    (losses, "cross_entropy", cross_entropy), (losses, "dino_loss", dino_loss),
                    (augment, "ssl_views", fast_views.ssl_views)]
    if dit is not None:
        replacements += [(dit, name, getattr(fast_dit, name)) for name in fast_dit.FORMS]
    old = [(place, name, getattr(place, name)) for place, name, _ in replacements]
    for place, name, function in replacements:
        setattr(place, name, function)
    if free_memory:
        set_malloc_threshold()

    def undo():
        for place, name, function in old:
            setattr(place, name, function)
    return undo


def set_malloc_threshold(above=2 ** 20):
    """Linux: freed tensors of more than `above` bytes return to the system at once, instead of
    fragmenting glibc's heap: a step of S with 32 images needs 3.1 GB, not 3.7. A small model would
    save nothing and lose a fifth of its speed, because returned pages are cleared before reuse."""
    if sys.platform == "linux":
        M_MMAP_THRESHOLD = -3
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, above)


# ---------------------------------------------------------------- vit.py
def rms_norm(x, weight, eps):
    return RMSNormFunction.apply(x, weight, eps)


class RMSNormFunction(torch.autograd.Function):
    """y = x_hat w with x_hat = x / rms(x). Autograd would store every intermediate result.

    dw = sum(g x_hat),   dx = (g w - x_hat mean(g w x_hat)) / rms(x)
    """
    @staticmethod
    def forward(ctx, x, w, eps):
        y = to_fp32(x)
        rstd = torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
        x_hat = (y * rstd).to(x.dtype)
        ctx.save_for_backward(x_hat, rstd, w)
        return x_hat * w

    @staticmethod
    def backward(ctx, g):
        x_hat, rstd, w = ctx.saved_tensors
        g_x_hat = g * x_hat
        # component of the gradient along x, which RMSNorm removes: it ignores the length of x
        proj = (g_x_hat @ w)[..., None] / x_hat.shape[-1]
        dx = (g * w).addcmul_(x_hat, proj, value=-1).mul_(rstd).to(x_hat.dtype)
        return dx, g_x_hat.flatten(0, -2).sum(0), None


def rotate(x, sin, cos):
    """In place where possible: x cos + (b, a) * (-sin, sin), where (b, a) is x rolled by c/2"""
    dtype = sin.dtype
    if dtype == torch.float32:
        dtype = torch.promote_types(dtype, x.dtype)
    half = sin.shape[-1] // 2
    signed_sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
    rotated = x.to(dtype) * cos
    rotated += x.to(dtype).roll(half, -1).mul_(signed_sin)
    return rotated.to(x.dtype)


def attention(q, k, v, causal=False):
    """On a CPU in bfloat16, written out: 6 times as fast there as PyTorch's kernel"""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if causal:
        hidden = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
        logits = logits.masked_fill(hidden, -torch.inf)
    return logits.softmax(-1, dtype=v.dtype) @ v


def swiglu_forward(self, x):
    """Casts x once under autocast, not once for w1 and once for w2"""
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return self.w3(SiLUMulFunction.apply(self.w1(x), self.w2(x)))


class SiLUMulFunction(torch.autograd.Function):
    """silu(a) b, storing a and b only: a tenth less memory in a block"""
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return F.silu(a) * b

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        return torch.ops.aten.silu_backward(g * b, a), g * F.silu(a)


# ---------------------------------------------------------------- losses.py
class CrossEntropyFunction(torch.autograd.Function):
    """H(p, softmax(x / tau)) = n logsumexp(x / tau) - p x / tau for targets p that sum to n

    The gradient with respect to x is (n softmax(x / tau) - p) / tau. Neither the softmax nor its
    logarithm, of width K, is stored.
    """
    @staticmethod
    def forward(ctx, x, p, n, tau):
        y = to_fp32(x) / tau
        lse = y.logsumexp(-1)
        ctx.save_for_backward(x, p, lse)
        ctx.n, ctx.tau = n, tau
        return n * lse - torch.linalg.vecdot(p, y)

    @staticmethod
    def backward(ctx, g):
        x, p, lse = ctx.saved_tensors
        softmax = (to_fp32(x) / ctx.tau).sub_(lse[..., None]).exp_()
        dx = softmax.mul_(ctx.n).sub_(p).mul_(g[..., None] / ctx.tau)
        return dx.to(x.dtype), None, None, None


def cross_entropy(student, teacher, tau):
    return CrossEntropyFunction.apply(student, teacher, 1, tau)


@full_precision()
def dino_loss(student, teacher, tau=0.1):
    """A local crop is compared with both global crops. Cross-entropy is linear in its target, so
    the two targets are added: H(p, s) + H(q, s) = H(p + q, s)."""
    teacher = to_fp32(teacher)
    local_target = teacher.sum(0)
    total = CrossEntropyFunction.apply(student[0], teacher[1], 1, tau).mean()
    total = total + CrossEntropyFunction.apply(student[1], teacher[0], 1, tau).mean()
    for s in student[2:]:
        total = total + CrossEntropyFunction.apply(s, local_target, 2, tau).mean()
    pairs = 2 + 2 * (len(student) - 2)
    return total / pairs
