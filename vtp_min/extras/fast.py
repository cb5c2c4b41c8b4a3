"""Faster forms of some functions of the core, or forms that store less for the backward pass, with
the same results up to rounding.

    undo = install()        replaces the functions; undo() restores the textbook forms

The core contains the textbook forms. tests/test_fast.py checks that values and gradients of both
forms agree. train.py, eval.py and dit.py install the fast forms on CPUs, where they were measured
(study/forms.py), unless --set fast=0. The arguments are those of the textbook forms.

x (..., D) features    B images    V local crops    K prototypes
"""
import ctypes
import sys

import torch
import torch.nn.functional as F

from .. import augment, losses, vit
from ..device import to_fp32
from . import fast_dit, fast_views


def install(dit=None, free_memory=False):
    """Replace functions of vit, losses and augment -> a function that restores them

    dit          the module dit.py; its functions are replaced as well. None: they are not.
    free_memory  call set_malloc_threshold, which cannot be undone
    """
    replacements = [(vit, "rms_norm", rms_norm), (vit, "rotate", rotate),
                    (vit, "attention", attention), (vit.SwiGLU, "forward", swiglu_forward),
                    (losses, "cross_entropy", cross_entropy),
                    (augment, "ssl_views", fast_views.ssl_views)]
    if dit is not None:
        replacements += [(dit, name, getattr(fast_dit, name)) for name in fast_dit.FORMS]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in replacements]
    for owner, name, function in replacements:
        setattr(owner, name, function)
    if free_memory:
        set_malloc_threshold()

    def undo():
        for owner, name, function in originals:
            setattr(owner, name, function)
    return undo


def set_malloc_threshold(above=2 ** 20):
    """Linux: allocate each tensor of more than `above` bytes with mmap, so that its memory returns
    to the system as soon as it is freed.

    Otherwise large tensors fragment the heap of glibc: a training step of size S with 32 images of
    64 px then needs 3.7 GB in place of 3.1 GB, with 4 images of 256 px 5.3 GB in place of 4.9. But
    the system clears returned pages before they are used again, which costs about a quarter of the
    speed (study/speed.txt, where the textbook forms run without it). A small model saves nothing.
    """
    if sys.platform == "linux":
        M_MMAP_THRESHOLD = -3                            # its number in glibc's malloc.h
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, above)


# ---------------------------------------------------------------- vit.py
def rms_norm(x, weight, eps):
    """vit.rms_norm with a backward pass of its own"""
    return RMSNormFunction.apply(x, weight, eps)


class RMSNormFunction(torch.autograd.Function):
    """y = x_hat w, where x_hat = x / rms(x). For a gradient g with respect to y:

    dw = sum(g x_hat),   dx = (g w - x_hat mean(g w x_hat)) / rms(x)

    Only x_hat, 1 / rms(x) and w are stored for the backward pass. Autograd would store more
    intermediate results.
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
        # RMSNorm does not depend on the length of x, so its gradient has no component along x
        proj = (g_x_hat @ w)[..., None] / x_hat.shape[-1]
        dx = (g * w).addcmul_(x_hat, proj, value=-1).mul_(rstd).to(x_hat.dtype)
        return dx, g_x_hat.flatten(0, -2).sum(0), None


def rotate(x, sin, cos):
    """vit.rotate with fewer copies: x cos + (b, a) * (-sin, sin), where a and b are the halves of
    x = (a, b), and (b, a) is x rolled by half of its channels"""
    dtype = sin.dtype
    if dtype == torch.float32:
        dtype = torch.promote_types(dtype, x.dtype)
    half = sin.shape[-1] // 2
    signed_sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
    rotated = x.to(dtype) * cos
    rotated += x.to(dtype).roll(half, -1).mul_(signed_sin)
    return rotated.to(x.dtype)


def attention(q, k, v, causal=False):
    """vit.attention. On a CPU in bfloat16 it is computed by matrix products, which is 6 times as
    fast as PyTorch's kernel there."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if causal:
        future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)     # keys after the query
        logits = logits.masked_fill(future, -torch.inf)
    return logits.softmax(-1, dtype=v.dtype) @ v


def swiglu_forward(self, x):
    """vit.SwiGLU.forward. Under autocast x is cast once, not separately for w1 and for w2."""
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return self.w3(SiLUMulFunction.apply(self.w1(x), self.w2(x)))


class SiLUMulFunction(torch.autograd.Function):
    """silu(a) b. Only a and b are stored for the backward pass, where silu(a) is computed again.
    This saves a tenth of the memory of a transformer block."""
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
    """H(p, softmax(x / tau)) = logsumexp(x / tau) - p x / tau, for targets p that sum to 1

    x, p (..., K) -> (...). The gradient with respect to x is (softmax(x / tau) - p) / tau. The
    softmax (..., K) is not stored for the backward pass, it is computed again from x.
    """
    @staticmethod
    def forward(ctx, x, p, tau):
        y = to_fp32(x) / tau
        lse = y.logsumexp(-1)
        ctx.save_for_backward(x, p, lse)
        ctx.tau = tau
        return lse - torch.linalg.vecdot(p, y)

    @staticmethod
    def backward(ctx, g):
        x, p, lse = ctx.saved_tensors
        softmax = (to_fp32(x) / ctx.tau).sub_(lse[..., None]).exp_()
        dx = softmax.sub_(p).mul_(g[..., None] / ctx.tau)
        return dx.to(x.dtype), None, None


def cross_entropy(student, teacher, tau):
    """losses.cross_entropy; each row of teacher sums to 1"""
    return CrossEntropyFunction.apply(student, teacher, tau)
