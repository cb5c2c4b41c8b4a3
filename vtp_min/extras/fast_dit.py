"""Faster forms of functions of dit.py, which fast.install(dit) puts in their place.

B images    N tokens    D width    h channels of an attention head
"""
import torch

FORMS = ("rotate", "modulate", "add_gated")        # names of the functions that install() replaces


def rotate(x, cos, sin):
    """dit.rotate as a product of complex numbers: (a + bi) (cos + i sin)"""
    # both channels of a pair have the same angle, so every second entry is enough
    rotation = torch.complex(cos[:, ::2], sin[:, ::2])                     # (N, h/2)
    pairs = torch.view_as_complex(x.to(cos.dtype).unflatten(-1, (-1, 2)))  # (B, heads, N, h/2)
    return torch.view_as_real(pairs * rotation).flatten(-2)


def modulate(x, shift, scale):
    """dit.modulate with multiplication and addition in one kernel"""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


def add_gated(x, gate, branch):
    """dit.add_gated with multiplication and addition in one kernel"""
    return torch.addcmul(x, gate[:, None], branch)
