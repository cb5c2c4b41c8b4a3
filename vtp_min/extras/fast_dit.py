"""Faster forms of functions of dit.py (see fast.py)."""
import torch

FORMS = ("rotate", "modulate", "add_gated")


def rotate(x, cos, sin):
    """As complex numbers: (a + bi) (cos + i sin)"""
    turn = torch.complex(cos[:, ::2], sin[:, ::2])                     # (N, h/2)
    pairs = torch.view_as_complex(x.to(cos.dtype).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2)


def modulate(x, shift, scale):
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


def add_gated(x, gate, branch):
    return torch.addcmul(x, gate[:, None], branch)
