"""Losses of VTP: one function a term, tensors in, a scalar out (rec_loss: two). No model, no config.

    words      clip_loss, siglip_loss      a caption belongs to its picture                     VTP Sec. 3.4
    views      dino_loss                   two crops of one picture are one thing               VTP Sec. 3.3, self-distillation
    patches    ibot_loss                   a hidden patch follows from its surroundings         VTP Sec. 3.3, masked image modelling
    spread     koleo_loss                  no two pictures in one place (DINOv2)
    pixels     rec_loss, Perceptual        the picture comes back: L1 + LPIPS                   VTP Sec. 3.2
The teacher's targets are its `centered_softmax`, with a center by Sinkhorn (`sinkhorn_center`) or by DINO's running mean
(`moved_center`). What looks at the whole batch gathers over ranks: each
rank returns the loss of its own rows, and the mean over ranks (which is what DDP makes of the gradients) is the loss of
one process holding the whole batch. All compute in float32 whatever autocast surrounds them, or in float64 if given float64.

B rows on this rank, `all` those of every rank    E CLIP space    K prototypes    V local crops    M masked patches on this rank
"""
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from .dist import gather, highest, rank, total
from .weights import find


def to_fp32(x):
    """bfloat16 and float16 become float32; float32 and float64 stay."""
    return x if x.dtype == torch.float64 else x.float()


@contextmanager
def full_precision():
    """A decorator for losses: neither autocast nor TF32 rounds the inputs of their matrix products.

    KoLeo needs it most: with 512 features at distance 0.1 from a common direction, a bfloat16
    product finds the wrong nearest neighbour for 99 % of them. DINOv2 disables autocast there too.
    This covers the forward pass. The backward pass follows the settings in force when backward()
    is called: call it outside autocast, as PyTorch recommends.
    """
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    off = [torch.autocast(device, enabled=False) for device in ("cpu", "cuda", "mps")]
    try:
        with off[0], off[1], off[2]:
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32


# ---------------------------------------------------------------- words
@full_precision()
def clip_loss(img, txt, scale, bias=None):
    """Symmetric InfoNCE: caption i belongs to image i and to no other.   CLIP Fig. 3; OpenCLIP's --local-loss --gather-with-grad

    img, txt (B, E) unit length      scale () = exp(learned log-temperature)      bias () or None, added to all logits
    """
    img, txt = to_fp32(img), to_fp32(txt)
    here = torch.arange(len(img), device=img.device) + rank() * len(img)     # where my rows stand in the whole batch
    to_txt = scale * img @ gather(txt).T                                     # (B, all) my images against every caption
    to_img = scale * txt @ gather(img).T                                     # (B, all) my captions against every image
    if bias is not None:
        to_txt, to_img = to_txt + bias, to_img + bias
    return (F.cross_entropy(to_txt, here) + F.cross_entropy(to_img, here)) / 2


@full_precision()
def siglip_loss(img, txt, scale, bias):
    """Every pair asked on its own, belongs or not: no softmax over the batch.   SigLIP Eq. 1

    img, txt (B, E) unit length      scale, bias () learned; they start at 10 and -10
    """
    img, txt = to_fp32(img), to_fp32(txt)
    logits = scale * img @ gather(txt).T + bias                              # (B, all)
    here = torch.arange(len(img), device=img.device)
    sign = torch.full_like(logits, -1.0)
    sign[here, here + rank() * len(img)] = 1.0                               # +1 my own caption, -1 all others
    return F.softplus(-sign * logits).sum() / len(img)


# ---------------------------------------------------------------- views
class CrossEntropy(torch.autograd.Function):
    """H(p, softmax(x / tau)) = n logsumexp(x / tau) - p x / tau, for p of mass n; its slope in x is (n softmax(x / tau) - p) / tau

    x (..., K) logits, p (..., K) targets, without gradient -> (...,). Computed in float32 at least; no K-wide step between is kept.
    """
    @staticmethod
    def forward(ctx, x, p, n, tau):
        y = to_fp32(x) / tau
        lse = y.logsumexp(-1)
        ctx.save_for_backward(x, p, lse)
        ctx.n, ctx.tau = n, tau
        return n * lse - torch.linalg.vecdot(p, y)

    @staticmethod
    def backward(ctx, g):
        x, p, lse = ctx.saved_tensors
        slope = (to_fp32(x) / ctx.tau).sub_(lse[..., None]).exp_().mul_(ctx.n).sub_(p)
        return slope.mul_(g[..., None] / ctx.tau).to(x.dtype), None, None, None


@full_precision()
def dino_loss(student, teacher, tau=0.1):
    """Mean cross-entropy H(teacher, student) over pairs of different views.   DINO Eq. 3; pairs weigh alike as in DINOv2

    student (2+V, B, K) logits, the two global crops first      teacher (2, B, K) probabilities, no gradient
    """
    teacher = to_fp32(teacher)
    compared = [(teacher[1], 1), (teacher[0], 1)]                            # a global crop with the other one
    compared += (len(student) - 2) * [(teacher.sum(0), 2)]                   # a local one with both: H(p, s) + H(q, s) = H(p + q, s), of mass 2
    return sum(CrossEntropy.apply(x, p, n, tau).mean() for x, (p, n) in zip(student, compared)) / sum(n for _, n in compared)


# ---------------------------------------------------------------- patches
@full_precision()
def ibot_loss(student, teacher, weight, n_crops, tau=0.1):
    """Cross-entropy on hidden patches; each masked crop weighs alike, however much of it is hidden.   iBOT Eq. 2, DINOv2

    student (M, K) logits      teacher (M, K) probabilities      weight (M,) = 1 / (hidden patches of the same crop)
    n_crops  global crops on this rank, masked or not: DINOv2 divides by all of them
    """
    return (CrossEntropy.apply(student, to_fp32(teacher), 1, tau) * weight).sum() / n_crops


# ---------------------------------------------------------------- spread
@full_precision()
def koleo_loss(x):
    """-mean log distance to the nearest neighbour: class tokens of one crop push each other apart.   DINOv2 Sec. 4

    x (B, D) class tokens before the head. Neighbours are sought over all ranks (DINOv2 looks at one rank only).
    """
    x = F.normalize(to_fp32(x), dim=-1, eps=1e-8)
    everyone = gather(x)                                                     # (all, D)
    with torch.no_grad():
        alike = x @ everyone.T
        here = torch.arange(len(x), device=x.device)
        alike[here, here + rank() * len(x)] = -1                             # not my own neighbour
        nearest = alike.argmax(1)
    distance = (x - everyone[nearest] + 1e-8).norm(dim=-1)                   # 1e-8 inside and outside, as torch's PairwiseDistance
    return -(distance + 1e-8).log().mean()


# ---------------------------------------------------------------- the teacher's targets: softmax((logits - center) / temp), and two ways to a center
@torch.no_grad()
@full_precision()
def centered_softmax(logits, center, temp):
    """Sharpened and centred: no prototype may win everywhere.   DINO Eq. 1      logits (..., K), center (K,) -> probabilities"""
    return F.softmax((to_fp32(logits) - center) / temp, dim=-1)


@torch.no_grad()
@full_precision()
def moved_center(center, pieces, momentum=0.9):
    """center <- 0.9 center + 0.1 mean logit, used from the next batch on.   DINO Eq. 4; momentum from DINOv2

    pieces  () -> the batch's logits, (n, K) at a time. The mean is over the rows of all pieces and ranks together. (DINOv2's iBOT
    centre averages each rank's own mean instead, so that a rank with few masked patches counts as much as one with many.)
    """
    s, rows = torch.zeros_like(center), torch.zeros_like(center[:1])
    for logits in pieces():
        s, rows = s + to_fp32(logits).sum(0), rows + len(logits)
    s, rows = total(s), total(rows)
    return torch.where(rows > 0, momentum * center + (1 - momentum) * s / rows.clamp_min(1), center)     # nothing was hidden: it stays


@torch.no_grad()
@full_precision()
def sinkhorn_center(pieces, temp, iterations=3):
    """The center under which every prototype gets an equal share of the whole batch.   SwAV Sec. 3.1, DINOv2

    pieces  () -> the batch's logits, (n, K) at a time; asked for anew in each round, so that a large batch's never lie in memory together.
    Sinkhorn-Knopp scales the rows and columns of q = exp(logits / temp) in turn. Rows can be scaled one by one at any time: all that
    must be kept of it is the factor of each column, and exp(logits / temp) * factor is exp((logits - center) / temp).
    """
    top = highest(torch.stack([to_fp32(x).max() if len(x) else to_fp32(x).new_tensor(-torch.inf) for x in pieces()]).max())
    columns = None                                                           # (K,)
    for _ in range(iterations):
        shares = 0
        for logits in pieces():
            q = torch.exp((to_fp32(logits) - top) / temp)     # DINOv2 leaves `- top` out and overflows above 88; a common factor cancels
            shares = shares + (q.sum(0) if columns is None else (1 / (q @ columns)) @ q)      # each row a probability, each column its sum
        shares = total(shares)
        columns = shares.mean() / shares.clamp_min(torch.finfo(shares.dtype).tiny)          # a common factor again: it keeps their size at bay
    return top - temp * columns.log()


def sinkhorn(logits, temp, iterations=3):
    """Rows become probabilities while every prototype gets an equal share of the whole batch: logits (n, K), n may differ between ranks"""
    return centered_softmax(logits, sinkhorn_center(lambda: [logits], temp, iterations), temp)


# ---------------------------------------------------------------- pixels
@full_precision()
def rec_loss(pixels, target, perceptual=None):
    """L1 + LPIPS between a picture and its reconstruction, both (B, 3, H, W) ImageNet-normalised.   VTP Sec. 3.2

    -> L1, perceptual term (0 without one). The paper does not say how they weigh: ours weigh 1 and 1.
    """
    pixels, target = to_fp32(pixels), to_fp32(target)
    l1 = (pixels - target).abs().mean()
    return l1, perceptual(pixels, target) if perceptual else l1.new_zeros(())


class Perceptual(nn.Module):
    """LPIPS of the `lpips` package with frozen heads and trunk, fed in the scale it expects.   [35] in the paper

    net 'vgg', 'alex' or 'squeeze'. Raises FileNotFoundError, saying what to fetch, when the trunk's weights are missing;
    random_trunk=True takes random ones (for tests of the plumbing: no usable metric).
    """
    def __init__(self, net, random_trunk=False):
        super().__init__()
        try:
            path = None if random_trunk else find(net)
        except FileNotFoundError as problem:
            raise FileNotFoundError(f"{problem}; or do without LPIPS: --perceptual none") from None
        import lpips                                                          # slow to import, needed only here
        self.lpips = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)      # built without a download ...
        if path:                                                              # ... then given its trunk: slices of torchvision's net
            there = torch.load(path, map_location="cpu", weights_only=True)
            trunk = {k: there["features." + k.split(".", 1)[1]] for k in self.lpips.net.state_dict()}
            self.lpips.net.load_state_dict(trunk)
        self.requires_grad_(False)                                            # the heads ask for gradients otherwise
        self.train(False)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

    def train(self, mode=True):
        return super().train(False)                                           # the heads hold Dropout: never in train mode

    @full_precision()
    def forward(self, pixels, target):
        if min(pixels.shape[-2:]) < 32:
            raise ValueError(f"pictures of {pixels.shape[-1]}x{pixels.shape[-2]} are too small for LPIPS; take 32 pixels or more, or --perceptual none")
        a, b = ((x * self.std + self.mean) * 2 - 1 for x in (pixels, target)) # LPIPS wants [-1, 1]
        return self.lpips(a.to(self.mean.dtype), b.to(self.mean.dtype)).mean()      # float64 under --precision fp64
