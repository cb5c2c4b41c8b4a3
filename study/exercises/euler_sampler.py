"""Exercise: Euler's method.   Check it with: python study/exercise.py euler_sampler"""
import torch  # noqa: F401


def euler_sampler(velocity, x, grid):
    """Generate samples: integrate dx/dt = velocity(x, t) from noise to data by Euler's method.

    velocity  function (x (B, C, H, W), t (B,)) -> velocity (B, C, H, W)
    x         (B, C, H, W) the noise at time grid[0]; it must not be changed in place
    grid      (P,) increasing times, not equally spaced; usually from 0 (noise) to 1 (data)
    returns   (B, C, H, W) the samples at time grid[-1]. No gradient is recorded.

        for i = 0, ..., P-2:     x  <-  x + (grid[i+1] - grid[i]) * velocity(x, grid[i])

    All B samples have the same time, but velocity takes one time per sample.

    Source: the sampler of LightningDiT, which VTP uses for generation (Sec. 4.1); rectified flow
    (Liu et al. 2023), Sec. 2.1.

    Time: 15 minutes
    Question: A perfect model was trained on a single image. How many Euler steps does it need to
    generate this image exactly, and why does it need more for a data set of many images?
    """
    raise NotImplementedError
