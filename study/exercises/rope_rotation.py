"""Exercise: the rotation of RoPE.   Check it with: python study/exercise.py rope_rotation"""
import torch  # noqa: F401


def rope_rotation(x, sin, cos):
    """Rotate pairs of channels by given angles (rotary position embedding, RoPE).

    x         (B, H, L, c) queries or keys: B images, H heads, L tokens, c channels (c is even)
    sin, cos  (L, c) sine and cosine of the angles. Columns i and i + c/2 are equal.
    returns   (B, H, L, c)

    Channels i and i + c/2 of a token are a pair (a, b). It is rotated by its angle theta, which
    depends on the position of the token:

        (a, b)  ->  (a cos theta - b sin theta,  b cos theta + a sin theta)

    Source: RoFormer (Su et al. 2021), Sec. 3.2.2 and 3.4.2. RoFormer pairs the neighbours 2i and
    2i + 1. The trunk of VTP (Sec. 4.1) follows DINOv3, which pairs i and i + c/2: the first half
    of the pairs encodes the row of a patch, the second half its column (axial RoPE).

    Time: 20 minutes
    Question: RoPE rotates queries and keys, but not values. What would the output of attention
    depend on if the values were rotated, too?
    """
    raise NotImplementedError
