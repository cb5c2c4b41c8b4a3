"""Exercise: flow matching.   Check it with: python study/exercise.py flow_matching_loss"""
import torch  # noqa: F401


def flow_matching_loss(model, x1, x0, t, y):
    """Train a diffusion transformer to predict the velocity from noise to data.

    model    function (xt (B, C, H, W), t (B,), y (B,)) -> predicted velocity (B, C, H, W)
    x1       (B, C, H, W) data: the latents of images
    x0       (B, C, H, W) noise
    t        (B,) times between 0 (noise) and 1 (data), one per sample
    y        (B,) classes, passed on to the model
    returns  (B,) squared error of the velocity, averaged over C, H, W, one value per sample

        xt       =  t x1 + (1 - t) x0            a point on the straight line from noise to data
        v        =  x1 - x0                      its velocity, the derivative of xt by t
        loss_b   =  mean over C, H, W of  (model(xt, t, y) - v)^2

    Source: rectified flow (Liu et al. 2023) Eq. 1; LightningDiT, which VTP uses for generation
    (Sec. 4.1). Some papers exchange the roles of t = 0 and t = 1.

    Time: 15 minutes
    Question: The best possible prediction is the average of x1 - x0 over all pairs that lead to the
    same xt. What is it at t = 0, and why can the loss not reach 0 on more than one image?
    """
    raise NotImplementedError
