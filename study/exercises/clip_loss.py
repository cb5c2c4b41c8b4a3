"""Exercise: the loss of CLIP.   Check it with: python study/exercise.py clip_loss"""
import torch  # noqa: F401
import torch.nn.functional as F  # noqa: F401


def clip_loss(img, txt, scale):
    """Symmetric InfoNCE loss: find the caption of each image, and the image of each caption.

    img, txt  (B, E) embeddings of unit length; row i of img and row i of txt are a pair
    scale     () learned number, 1 / temperature
    returns   () the loss

        logits_ij  =  scale * <img_i, txt_j>
        image loss =  mean over i of  -log softmax_j(logits_ij)  at j = i     (over captions)
        text loss  =  mean over j of  -log softmax_i(logits_ij)  at i = j     (over images)
        loss       =  (image loss + text loss) / 2

    Source: VTP Sec. 3.4 (L_clip), CLIP (Radford et al. 2021) Fig. 3.

    Time: 15 minutes
    Question: In a batch of B pairs, each caption occurs exactly twice. What is the smallest value
    that the loss can have, and what does the loss do to the embeddings of two images with the same
    caption?
    """
    raise NotImplementedError
