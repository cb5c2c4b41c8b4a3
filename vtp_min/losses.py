"""The losses of VTP, one function per term, and the teacher's targets. No model here.

    total_loss                their weighted sum                                      VTP Sec. 3.5
    clip_loss, siglip_loss    CLIP: match images with their captions                  VTP Sec. 3.4
    dino_loss                 self-distillation: two crops of an image should agree   VTP Sec. 3.3
    ibot_loss                 masked image modelling in the teacher's feature space   VTP Sec. 3.3
    koleo_loss                features of different images are pushed apart           DINOv2
    rec_loss                  reconstruction: L1 + LPIPS                              VTP Sec. 3.2
    TeacherTargets            the teacher's logits -> targets, by sinkhorn or centered_softmax
    entropy, feature_std      diagnostics of collapse

Collapse: self-distillation has trivial solutions, in which every image gets the same prototype, or
every image gets the uniform distribution. Sinkhorn-Knopp targets (sinkhorn) and centering
(centered_softmax) work against both; entropy and feature_std show whether they succeed.

Several processes: losses that compare images gather features from all ranks (dist.gather passes
gradients back to the rank of each row). Each rank returns the loss of its own rows. The mean of
these losses over ranks is the loss of one process with the whole batch, and average_gradients
averages the gradients accordingly. B must be equal on all ranks; M may differ.

Precision: every loss is computed in float32 (in float64 if given float64), even inside autocast.
to_fp32 casts the arguments, full_precision switches autocast and TF32 off.

On a CPU, train.py replaces cross_entropy with the form of extras/fast.py, which needs less memory
and is equal up to rounding (--set fast=0 switches this off).

B rows on this rank    B_all rows of all ranks    E CLIP space    K prototypes    V local crops
M masked patches on this rank
"""
import torch
import torch.nn.functional as F

from .device import full_precision, to_fp32
from .dist import all_reduce_max, all_reduce_mean, all_reduce_sum, gather, rank


# ---------------------------------------------------------------- the sum
def total_loss(terms, args):
    """The weighted sum of the given terms {name: scalar}.   VTP Sec. 3.5; koleo as in DINOv2"""
    weights = {"clip": args.w_clip, "dino": args.w_ssl, "ibot": args.w_ssl,
               "koleo": args.w_ssl * args.w_koleo, "rec": args.w_rec}
    return sum(weights[name] * term for name, term in terms.items())


# ---------------------------------------------------------------- CLIP
def contrastive_loss(kind, image_emb, text_emb, scale, bias):
    """clip_loss (kind "clip", as in the paper) or siglip_loss (kind "siglip")"""
    loss = siglip_loss if kind == "siglip" else clip_loss
    return loss(image_emb, text_emb, scale, bias)


@full_precision()
def clip_loss(img, txt, scale, bias=None):
    """Symmetric InfoNCE.   CLIP Fig. 3; OpenCLIP's --local-loss --gather-with-grad

    img, txt  (B, E) embeddings of unit length; row i of img and row i of txt are a pair
    scale     () learned, 1 / temperature
    bias      () or None. OpenCLIP adds it to all logits, which does not change the softmax.
    """
    img, txt = to_fp32(img), to_fp32(txt)
    # this rank's images against the captions of all ranks, and vice versa
    logits_per_image = scale * img @ gather(txt).T               # (B, B_all)
    logits_per_text = scale * txt @ gather(img).T                # (B, B_all)
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
    """Each image-caption pair is classified independently as matching or not, without a softmax
    over the batch.   SigLIP Sec. 3.2

    img, txt (B, E), unit length      scale, bias () learned; at first 10 and -10
    """
    img, txt = to_fp32(img), to_fp32(txt)
    logits = scale * img @ gather(txt).T + bias                  # (B, B_all)
    row = torch.arange(len(img), device=img.device)
    sign = torch.full_like(logits, -1.0)
    sign[row, row + rank() * len(img)] = 1.0                     # 1 for the image's own caption
    # -log sigmoid(sign * logit), summed over captions and averaged over images
    return F.softplus(-sign * logits).sum() / len(img)


# ---------------------------------------------------------------- self-distillation
# The arguments `student` are logits, the arguments `teacher` are probabilities (TeacherTargets).
# tau is the temperature of the student: 0.1 in DINO, iBOT and DINOv2. The teacher's temperature is
# lower, so that its targets are sharper than the student's predictions.

@full_precision()
def dino_loss(student, teacher, tau=0.1):
    """Mean cross-entropy over pairs of different crops of an image.   DINO Eq. 3 and its code

    student  (2+V, B, K) logits, global crops first
    teacher  (2, B, K) probabilities of the global crops
    """
    teacher = to_fp32(teacher)
    log_p = F.log_softmax(to_fp32(student) / tau, dim=-1)        # (2+V, B, K)
    # all pairs of a global crop for the teacher and another crop for the student
    pairs = [(t, s) for t in range(2) for s in range(len(student)) if s != t]
    return -sum((teacher[t] * log_p[s]).sum(-1).mean() for t, s in pairs) / len(pairs)


def cross_entropy(student, teacher, tau):
    """H(teacher, softmax(student / tau)) of each row: (..., K) logits, (..., K) -> (...)"""
    return -(teacher * F.log_softmax(to_fp32(student) / tau, dim=-1)).sum(-1)


@full_precision()
def ibot_loss(student, teacher, weight, n_crops, tau=0.1):
    """Cross-entropy on masked patches: the mean over the masked patches of a crop, averaged over
    crops.   iBOT Sec. 3.1, DINOv2

    student  (M, K) logits                 teacher  (M, K) probabilities
    weight   (M,) 1 / number of masked patches of the same crop
    n_crops  number of global crops on this rank. As in DINOv2, it includes the crops without a
             mask (half of them), whose term is 0.
    """
    return (cross_entropy(student, to_fp32(teacher), tau) * weight).sum() / n_crops


@full_precision()
def koleo_loss(x):
    """-mean log distance to the nearest neighbour, which pushes features of different images apart.
    Named after the entropy estimator of Kozachenko and Leonenko: points that are far from their
    neighbours are spread out.   DINOv2 Sec. 4

    x (B, D) class tokens of one crop, before the head. Neighbours are searched among the features
    of all ranks, so that the loss does not depend on the number of processes (DINOv2: of one rank).
    """
    x = F.normalize(to_fp32(x), dim=-1, eps=1e-8)
    all_features = gather(x)                                     # (B_all, D)
    with torch.no_grad():                                        # the index has no gradient
        similarity = x @ all_features.T                          # (B, B_all) cosines
        row = torch.arange(len(x), device=x.device)
        similarity[row, row + rank() * len(x)] = -1              # not its own neighbour
        nearest = similarity.argmax(1)
    # Equal features must not give log(0). 1e-8 twice: as in torch's PairwiseDistance, and as in
    # DINOv2's logarithm.
    distance = (x - all_features[nearest] + 1e-8).norm(dim=-1)
    return -(distance + 1e-8).log().mean()


# ---------------------------------------------------------------- targets of the teacher
@torch.no_grad()
@full_precision()
def sinkhorn(logits, temp, iterations=3):
    """Sinkhorn-Knopp: probabilities for each row, such that all prototypes are used about equally
    often over the rows of all ranks.   SwAV Sec. 3.1, DINOv2

    Rows (tokens) and columns (prototypes) of q are normalised alternately, three times as in SwAV.
    With more iterations all prototypes would be used equally often.

    logits (..., K) -> the same shape. All leading dimensions are rows; their number may differ
    between ranks.
    """
    x = to_fp32(logits).flatten(0, -2)                           # (n, K)
    # exp overflows above 88 in float32, so the largest logit of all ranks is subtracted. This
    # multiplies q by a constant, which the first normalisation removes.
    largest = x.max() if len(x) else x.new_full((), -torch.inf)    # a rank may have no masked patch
    q = torch.exp((x - all_reduce_max(largest)) / temp)
    smallest = torch.finfo(q.dtype).tiny                         # 0 / tiny = 0, where 0 / 0 = nan
    for _ in range(iterations):
        q = q / all_reduce_sum(q.sum(0)).clamp_min(smallest)     # columns: each prototype sums to 1
        q = q / q.sum(-1, keepdim=True)                          # rows last: probabilities
    return q.view(logits.shape)


@torch.no_grad()
@full_precision()
def centered_softmax(logits, center, temp):
    """softmax((logits - center) / temp), DINO's alternative to sinkhorn.   DINO Sec. 3.1

    The low temperature sharpens the probabilities, against the uniform output. The center, a moving
    average of the logits, prevents that one prototype wins for every image.

    logits (..., K), center (K,)
    """
    return F.softmax((to_fp32(logits) - center) / temp, dim=-1)


@torch.no_grad()
@full_precision()
def update_center(center, logits, momentum=0.9):
    """momentum * center + (1 - momentum) * mean logits.   DINO Eq. 4; momentum from DINOv2

    center (K,), logits (..., K). The mean is over the rows of all ranks together. (DINOv2's iBOT
    averages the ranks' means, so a rank with few masked patches counts as much as the others.)
    """
    x = to_fp32(logits).flatten(0, -2)
    total = all_reduce_sum(x.sum(0))
    rows = all_reduce_sum(x.new_full((1,), len(x)))
    new = momentum * center + (1 - momentum) * total / rows.clamp_min(1)
    return torch.where(rows > 0, new, center)                    # unchanged if nothing was masked


class TeacherTargets:
    """Teacher logits -> probabilities, by "sinkhorn" (DINOv2, DINOv3) or "centering" (DINO).

    Centering has a state: a call uses the current centers and computes the next ones, and step(),
    after an optimizer step, makes these current. With sinkhorn the centers stay zero.
    """

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
    """L1 + LPIPS, both with weight 1.   VTP Sec. 3.2

    The paper gives no weights. 1 for LPIPS is borrowed from VQGAN, LDM and RAE, whose L1 has other
    ranges of pixels; for --perceptual efficientnet it is the same 1, unchanged (ours).

    pixels, target  (B, 3, H, W), ImageNet-normalised; L1 is taken on this scale
    lpips           a loss of extras.perceptual, or None
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
    """Mean entropy of probabilities (..., K), in nats

    ln K    all prototypes are equally likely: collapse to the uniform output
    0       each row has one prototype: collapse, if it is the same one for every image
    """
    p = to_fp32(p)
    return -(p * p.clamp_min(1e-30).log()).sum(-1).mean()


@torch.no_grad()
@full_precision()
def feature_std(x):
    """Root-mean-square distance of the normalised class tokens (B, D) of all ranks from their mean

    near 1  the features point in random directions
    0       all are equal: collapse
    """
    mean = all_reduce_mean(F.normalize(to_fp32(x), dim=-1).mean(0))
    # for unit vectors, mean |x - mean|^2 = 1 - |mean|^2
    return (1 - mean.square().sum()).clamp_min(0).sqrt()
