"""Exercise: Sinkhorn-Knopp targets.   Check it with: python study/exercise.py sinkhorn"""
import torch  # noqa: F401


def sinkhorn(logits, temp, iterations):
    """Turn the teacher's logits into probabilities such that all prototypes are used about equally
    often over the batch.

    logits      (..., K): all leading dimensions together are n rows (images or patches);
                K prototypes
    temp        temperature of the teacher, a number such as 0.07
    iterations  number of normalisations of columns and rows, a number such as 3
    returns     the same shape; each row sums to 1. It carries no gradient: it is a target.

        Q  =  exp(logits / temp)                 (n, K)
        repeat `iterations` times:
            divide each column by its sum        all prototypes get the same total
            divide each row by its sum           each row is a probability distribution

    exp overflows above 88 in float32. Q may be multiplied by any constant, since the first
    normalisation removes it.

    Source: VTP Sec. 3.3 follows DINOv2 (Oquab et al. 2023), Sec. 4, which takes this from SwAV
    (Caron et al. 2020), Sec. 3.1.

    Time: 25 minutes
    Question: A teacher sees 8 images per process and has 1000 prototypes. What do the targets look
    like if each process runs Sinkhorn-Knopp alone, and why do the processes sum over all images
    instead?
    """
    raise NotImplementedError
