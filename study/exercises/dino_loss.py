"""Exercise: the loss of DINO.   Check it with: python study/exercise.py dino_loss"""
import torch  # noqa: F401
import torch.nn.functional as F  # noqa: F401


def dino_loss(student, teacher, tau):
    """Self-distillation: the student's prediction for one crop should match the teacher's for
    another crop of the same image.

    student  (2+V, B, K) logits of 2 global crops, then V local crops, of B images; K prototypes
    teacher  (2, B, K) probabilities of the two global crops, in the same order
    tau      temperature of the student, a number such as 0.1
    returns  () the loss

    The cross-entropy of the teacher's crop t and the student's crop s is

        H(t, s)  =  - sum over k of  teacher_tk * log softmax_k(student_s / tau)

    The loss is the mean of H(t, s) over the images and over all pairs of t in {0, 1} and s in
    {0, ..., 1+V} with s != t. There are 2 (1+V) pairs.

    Source: VTP Sec. 3.3 (L_dino), DINO (Caron et al. 2021) Eq. 3. The equation is a sum over pairs;
    the code of DINO divides it by the number of pairs.

    Time: 25 minutes
    Question: Suppose that teacher and student may output anything. Describe an output that makes
    the loss 0 although it says nothing about the images. Why does the loss alone not prevent it?
    """
    raise NotImplementedError
