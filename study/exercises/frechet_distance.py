"""Exercise: Frechet distance.   Check it with: python study/exercise.py frechet_distance"""
import torch  # noqa: F401


def frechet_distance(mu1, cov1, mu2, cov2):
    """The distance of two Gaussian distributions. FID is this distance for Inception features.

    mu1, mu2    (F,) means, float64
    cov1, cov2  (F, F) covariances S1 and S2, symmetric, without negative eigenvalues, float64
    returns     a number (float, or tensor of shape ())

        |mu1 - mu2|^2  +  trace( S1 + S2 - 2 (S1 S2)^(1/2) )

    (S1 S2)^(1/2) is the matrix square root, not the root of each entry. The eigenvalues of S1 S2
    are real and not negative, and the trace of its root is the sum of their square roots. Rounding
    can make eigenvalues slightly negative if S1 or S2 does not have full rank, as with fewer images
    than features.

    Source: FID (Heusel et al. 2017) Eq. 6; rFID and gFID of VTP, Sec. 4.1.

    Time: 30 minutes
    Question: Split a set of real images at random into two halves and compute the distance between
    them. Why is it above 0? Is the FID of a generator with few samples too large or too small?
    """
    raise NotImplementedError
