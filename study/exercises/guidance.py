"""Exercise: classifier-free guidance.   Check it with: python study/exercise.py guidance"""
import torch  # noqa: F401


def guidance(cond, uncond, scale, t, start, channels):
    """Combine the velocity for a class and the velocity for "no class".

    cond      (B, C, H, W) velocity for the wanted class
    uncond    (B, C, H, W) velocity for "no class"
    scale     number; 1 gives the conditional velocity, larger values exaggerate the class
    t         (B,) times, one per sample
    start     number; samples with t < start are not guided: they get cond
    channels  number of guided channels; the others get cond. None: all channels are guided
    returns   (B, C, H, W) the velocity for the sampler

        guided  =  uncond + scale * (cond - uncond)

    Source: Ho & Salimans 2022, Eq. 6. They write (1 + w) cond - w uncond, so scale = 1 + w. The
    interval is from Kynkaanniemi et al. 2024, the guided channels from LightningDiT (3 by
    default), which VTP uses for generation (Sec. 4.1).

    Time: 15 minutes
    Question: With a larger scale the samples look more typical of their class. What happens to
    their diversity, and can FID become worse although each single sample looks better?
    """
    raise NotImplementedError
