"""The losses of VTP, one function per term, and the teacher's targets. No model here.

    total_loss                their weighted sum                               VTP Sec. 3.5
    clip_loss, siglip_loss    CLIP: a caption belongs to its image             VTP Sec. 3.4
    dino_loss                 self-distillation: two crops of an image agree   VTP Sec. 3.3
    ibot_loss                 masked image modelling                           VTP Sec. 3.3
    koleo_loss                features of different images are apart           DINOv2
    rec_loss                  reconstruction: L1 + LPIPS                       VTP Sec. 3.2
    TeacherTargets            the teacher's logits -> targets, by sinkhorn or centered_softmax
    entropy, feature_std      diagnostics of collapse

Losses that compare images gather features from all ranks. Each rank returns the loss of its own
rows; the mean over ranks, which average_gradients takes, is the loss of one process that holds the
whole batch. All are computed in float32 (float64 if given float64) whatever autocast surrounds
them: to_fp32 casts what a loss is given, full_precision keeps its matrix products from being
rounded. On a CPU, extras/fast.py replaces cross_entropy and dino_loss by faster forms at run time.

B rows on this rank    (all) rows of all ranks    E CLIP space    K prototypes    V local crops
M masked patches on this rank
"""
import torch
import torch.nn.functional as F

from .device import full_precision, to_fp32
from .dist import all_reduce_max, all_reduce_mean, all_reduce_sum, gather, rank


# ---------------------------------------------------------------- the sum
def total_loss(terms, args):
    """The weighted sum of VTP Sec. 3.5, over the terms that are there. terms {name: ()}"""
    weights = {"clip": args.w_clip, "dino": args.w_ssl, "ibot": args.w_ssl,
               "koleo": args.w_ssl * args.w_koleo, "rec": args.w_rec}
    return sum(weights[name] * term for name, term in terms.items())


# ---------------------------------------------------------------- CLIP
def contrastive_loss(kind, img, txt, scale, bias):
    """kind  'clip' (paper) or 'siglip'; the rest as below"""
    loss = siglip_loss if kind == "siglip" else clip_loss
    return loss(img, txt, scale, bias)


@full_precision()
def clip_loss(img, txt, scale, bias=None):
    """Symmetric InfoNCE.   CLIP Fig. 3; OpenCLIP's --local-loss --gather-with-grad

    img, txt  (B, E), unit length; row i of both belongs together
    scale     () exp of the learned log-temperature      bias  () added to all logits, or None
    """
    img, txt = to_fp32(img), to_fp32(txt)
    # this rank's images against the captions of all ranks, and the other way round
    logits_per_image = scale * img @ gather(txt).T               # (B, all)
    logits_per_text = scale * txt @ gather(img).T                # (B, all)
    if bias is not None:
        logits_per_image = logits_per_image + bias
        logits_per_text = logits_per_text + bias
    # the caption of image i is row rank * B + i of the gathered captions
    labels = torch.arange(len(img), device=img.device) + rank() * len(img)
    image_loss = F.cross_entropy(logits_per_image, labels)
    text_loss = F.cross_entropy(logits_per_text, labels)
    return (image_loss + text_loss) / 2


@full_precision()
def siglip_loss(img, txt, scale, bias):
    """Each pair is classified by itself, without a softmax over the batch.   SigLIP Eq. 1

    img, txt (B, E), unit length      scale, bias () learned; they start at 10 and -10
    """
    img, txt = to_fp32(img), to_fp32(txt)
    logits = scale * img @ gather(txt).T + bias                  # (B, all)
    row = torch.arange(len(img), device=img.device)
    sign = torch.full_like(logits, -1.0)
    sign[row, row + rank() * len(img)] = 1.0                     # 1 for the image's own caption
    # -log sigmoid(sign * logit), summed over captions and averaged over images
    return F.softplus(-sign * logits).sum() / len(img)


# ---------------------------------------------------------------- self-distillation
def cross_entropy(student, teacher, tau):
    """H(teacher, softmax(student / tau)): student (..., K) logits, teacher (..., K) -> (...)"""
    return -(teacher * F.log_softmax(to_fp32(student) / tau, dim=-1)).sum(-1)


@full_precision()
def dino_loss(student, teacher, tau=0.1):
    """Mean cross-entropy over pairs of different crops.   DINO Eq. 3; equal weights as in DINOv2

    student  (2+V, B, K) logits, global crops first
    teacher  (2, B, K) probabilities of the global crops
    """
    teacher = to_fp32(teacher)
    # a crop is never compared with itself, which would be trivial
    pairs = [(t, s) for t in range(2) for s in range(len(student)) if s != t]
    return sum(cross_entropy(student[s], teacher[t], tau).mean() for t, s in pairs) / len(pairs)


@full_precision()
def ibot_loss(student, teacher, weight, n_crops, tau=0.1):
    """Cross-entropy on masked patches. Each masked crop has the same weight.   iBOT Eq. 2, DINOv2

    student  (M, K) logits                 teacher  (M, K) probabilities
    weight   (M,) 1 / number of masked patches of the same crop
    n_crops  global crops on this rank, masked or not: DINOv2 divides by all of them
    """
    return (cross_entropy(student, to_fp32(teacher), tau) * weight).sum() / n_crops


@full_precision()
def koleo_loss(x):
    """-mean log distance to the nearest neighbour, so that features spread.   DINOv2 Sec. 4

    x (B, D) class tokens of one crop, before the head. The neighbour is sought on all ranks
    (DINOv2: on one rank).
    """
    x = F.normalize(to_fp32(x), dim=-1, eps=1e-8)
    all_features = gather(x)                                     # (all, D)
    with torch.no_grad():                                        # the choice has no gradient
        similarity = x @ all_features.T                          # (B, all)
        row = torch.arange(len(x), device=x.device)
        similarity[row, row + rank() * len(x)] = -1              # not its own neighbour
        nearest = similarity.argmax(1)
    # 1e-8 twice: once as in torch's PairwiseDistance, once in DINOv2's logarithm
    distance = (x - all_features[nearest] + 1e-8).norm(dim=-1)
    return -(distance + 1e-8).log().mean()


# ---------------------------------------------------------------- targets of the teacher
@torch.no_grad()
@full_precision()
def sinkhorn(logits, temp, iterations=3):
    """Rows become probabilities, and prototypes get equal shares.   SwAV Sec. 3.1, DINOv2

    logits (..., K), all leading dimensions are rows; their number may differ between ranks
    """
    x = to_fp32(logits).flatten(0, -2)                           # (n, K)
    # without the maximum exp overflows above 88; a common factor of q cancels
    lowest = x.new_full((1,), -torch.inf)
    largest = all_reduce_max(torch.cat([x.flatten(), lowest]).max())
    q = torch.exp((x - largest) / temp)
    smallest = torch.finfo(q.dtype).tiny                         # for prototypes that no row likes
    for _ in range(iterations):
        q = q / all_reduce_sum(q.sum(0)).clamp_min(smallest)     # equal shares
        q = q / q.sum(-1, keepdim=True)                          # probabilities
    return q.view(logits.shape)


@torch.no_grad()
@full_precision()
def centered_softmax(logits, center, temp):
    """softmax((logits - center) / temp).   DINO Eq. 1

    The low temperature sharpens; the center stops one prototype from winning for all images.

    logits (..., K), center (K,)
    """
    return F.softmax((to_fp32(logits) - center) / temp, dim=-1)


@torch.no_grad()
@full_precision()
def update_center(center, logits, momentum=0.9):
    """momentum * center + (1 - momentum) * mean logits.   DINO Eq. 4; momentum from DINOv2

    center (K,), logits (..., K). The mean is over the rows of all ranks together. (DINOv2's iBOT
    averages the means of the ranks, so that a rank with few masked patches counts like the others.)
    """
    x = to_fp32(logits).flatten(0, -2)
    total = all_reduce_sum(x.sum(0))
    rows = all_reduce_sum(torch.full_like(total[:1], len(x)))
    new = momentum * center + (1 - momentum) * total / rows.clamp_min(1)
    return torch.where(rows > 0, new, center)                    # no masked patch at all: unchanged


class TeacherTargets:
    """Teacher logits -> probabilities, by "sinkhorn" (DINOv2, DINOv3) or "centering" (DINO)"""

    def __init__(self, method, K, device):
        self.method = method
        self.center = {"cls": torch.zeros(K, device=device), "patch": torch.zeros(K, device=device)}
        self.next_center = self.center

    def __call__(self, cls, patch, temp):
        """cls (2, B, K), patch (M, K) logits -> probabilities of the same shapes"""
        if self.method == "sinkhorn":
            return sinkhorn(cls, temp), sinkhorn(patch, temp)
        self.next_center = {"cls": update_center(self.center["cls"], cls),
                            "patch": update_center(self.center["patch"], patch)}
        return (centered_softmax(cls, self.center["cls"], temp),
                centered_softmax(patch, self.center["patch"], temp))

    def step(self):
        """After an optimizer step: a skipped step does not move the centers"""
        self.center = self.next_center

    def state_dict(self):
        return self.center

    def load_state_dict(self, state):
        for name, center in state.items():
            self.center[name].copy_(center)
        self.next_center = self.center


# ---------------------------------------------------------------- reconstruction
@full_precision()
def rec_loss(pixels, target, lpips=None):
    """L1 + LPIPS, both with weight 1 (ours: the paper gives no weights).   VTP Sec. 3.2

    pixels, target  (B, 3, H, W), ImageNet-normalised
    lpips           extras.perceptual.Perceptual, or None
    """
    pixels, target = to_fp32(pixels), to_fp32(target)
    loss = (pixels - target).abs().mean()
    if lpips is not None:
        loss = loss + lpips(pixels, target)
    return loss


# ---------------------------------------------------------------- diagnostics of collapse
@torch.no_grad()
@full_precision()
def entropy(p):
    """Mean entropy of probabilities (..., K), in nats.

    ln K: all prototypes are equally likely. This is a collapse. 0: each row has one prototype,
    which is a collapse if it is the same one for every image.
    """
    p = to_fp32(p)
    return -(p * p.clamp_min(1e-30).log()).sum(-1).mean()


@torch.no_grad()
@full_precision()
def feature_std(x):
    """Root-mean-square distance of the normalised class tokens (B, D) of all ranks from their mean.

    1: random directions. 0: all are equal, which is a collapse.
    """
    mean = all_reduce_mean(F.normalize(to_fp32(x), dim=-1).mean(0))
    return (1 - mean.square().sum()).clamp_min(0).sqrt()
