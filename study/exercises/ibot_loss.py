"""Exercise: the loss of iBOT.   Check it with: python study/exercise.py ibot_loss"""
import torch  # noqa: F401
import torch.nn.functional as F  # noqa: F401


def ibot_loss(student, teacher, weight, n_crops, tau):
    """Masked image modelling: the student, which sees a mask token, predicts the teacher's output
    for the patch that is hidden behind it.

    student  (M, K) logits of the M masked patches of all crops together; K prototypes
    teacher  (M, K) probabilities of the same patches
    weight   (M,) 1 / number of masked patches of the same crop
    n_crops  number of global crops, also counting those without a masked patch
    tau      temperature of the student, a number such as 0.1
    returns  () the loss; 0 if no patch is masked (M = 0)

        loss  =  1 / n_crops * sum over m of  weight_m * H_m
        H_m   =  - sum over k of  teacher_mk * log softmax_k(student_m / tau)

    So the loss is the mean over the masked patches of a crop, averaged over all global crops. A
    crop without masked patches counts as 0.

    Source: VTP Sec. 3.3 (L_mim), iBOT (Zhou et al. 2022) Sec. 3.1, DINOv2.

    Time: 15 minutes
    Question: Masks differ in size. Which crops would count more, and would training be different,
    if the loss were the plain mean over all masked patches of the batch?
    """
    raise NotImplementedError
