"""Exercise: attention with QKNorm.   Check it with: python study/exercise.py qknorm_attention"""
import torch  # noqa: F401
import torch.nn.functional as F  # noqa: F401


def qknorm_attention(q, k, v, q_weight, k_weight, rotate):
    """Attention whose queries and keys are normalised first (QKNorm), for stability.

    q, k, v             (B, H, L, c): B images, H heads, L tokens, c channels of a head
    q_weight, k_weight  (c,) learned weights of the two norms
    rotate              function (B, H, L, c) -> (B, H, L, c), the rotation of RoPE
    returns             (B, H, L, c)

    1. RMSNorm over the channels:    q <- q / sqrt(mean(q^2) + 0.00001) * q_weight;
                                     k <- the same with k_weight
    2. Position:                     q <- rotate(q), k <- rotate(k)
    3. Attention:                    softmax(q k^T / sqrt(c)) v
       The softmax is over the keys: the L weights of each query sum to 1.

    Source: VTP Sec. 4.1 (QKNorm), RMSNorm (Zhang & Sennrich 2019) Eq. 4, attention (Vaswani et al.
    2017) Eq. 1.

    Time: 25 minutes
    Question: Let all learned weights be 1 and c = 64. Between which two values does every attention
    logit lie? How can training still make attention sharper than these values allow?
    """
    raise NotImplementedError
