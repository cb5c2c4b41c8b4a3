"""The same mathematics, plainly arranged: what tests/bench.py measures ours against. Nothing else uses this file.

joint step   as VTP's official meta-architecture is composed: a forward pass for words, one for pixels, one for each size of crop; captions padded to 77;
             the rows of hidden patches padded to a fixed number; rotary embedding, norms and losses operation by operation; AdamW and EMA tensor by tensor
"""
import math
import types

import torch
import torch.nn.functional as F

from vtp_min.losses import clip_loss, koleo_loss, sinkhorn, wide
from vtp_min.text import CausalAttention
from vtp_min.vit import Attention, RMSNorm


# ---------------------------------------------------------------- the joint step
def plainly(model):
    """The model itself, its attention and norms computed as the released code writes them"""
    how = {Attention: attention, CausalAttention: causal_attention, RMSNorm: rms_norm}
    for m in model.modules():
        if type(m) in how:
            m.forward = types.MethodType(how[type(m)], m)
    return model


def rms_norm(self, x):
    return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


def attention(self, x, rope):
    B, N, D = x.shape
    q, k, v = (t.transpose(1, 2) for t in self.qkv(x).reshape(B, N, 3, self.heads, D // self.heads).unbind(2))
    sin, cos = (table[1:] for table in rope)                                   # the class token is cut off, and put back

    def turn(t):
        a, b = t[:, :, 1:].to(sin.dtype).chunk(2, -1)
        return torch.cat([t[:, :, :1], (t[:, :, 1:] * cos + torch.cat([-b, a], -1) * sin).to(t.dtype)], 2)
    q, k = turn(self.q_norm(q)), turn(self.k_norm(k))
    x = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
    return self.proj(x.transpose(1, 2).reshape(B, N, D))


def causal_attention(self, x):
    B, T, W = x.shape
    q, k, v = (t.transpose(1, 2) for t in F.linear(x, self.in_proj_weight, self.in_proj_bias).view(B, T, 3, self.heads, -1).unbind(2))
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=torch.full((T, T), -torch.inf, dtype=q.dtype).triu(1))
    return self.out_proj(x.transpose(1, 2).reshape(B, T, W))


def forward(student, batch, rows):
    """-> as Student.forward, in three passes and one more for the local crops. rows: of the buffer for hidden patches"""
    m = student.model
    cls, patches = m.trunk(batch["image"])                                     # words
    out = {"img": F.normalize(wide(m.project(cls, patches)), dim=-1), "scale": m.logit_scale.exp()}
    text = F.pad(batch["text"], (0, 77 - batch["text"].shape[1]))
    out["txt"] = F.normalize(wide(m.get_clip_text_feature(text)), dim=-1)
    patches = m.trunk(batch["image"][batch["rec"]])[1]                         # pixels
    side = math.isqrt(patches.shape[1])
    out["pixels"] = m.pixel_decoder(m.latents(patches, side, side))
    cls, patches = m.trunk(batch["crops"].flatten(0, 1), mask=batch["mask"].flatten(0, 1))      # views
    small = m.trunk(batch["locals"].flatten(0, 1))[0]
    out["tokens"] = cls.unflatten(0, (2, -1))
    out["cls"] = torch.cat([student.dino_head(cls), student.dino_head(small)]).unflatten(0, (2 + len(batch["locals"]), -1))
    hidden = patches[batch["mask"].flatten(0, 1)]
    out["patch"] = student.dino_head(padded(hidden, rows))[:len(hidden)]
    return out


def padded(x, rows):
    return torch.cat([x, x.new_zeros(rows - len(x), x.shape[1])])


@torch.no_grad()
def teach(teacher, batch, rows, temp):
    cls, patches = teacher.trunk(batch["crops"].flatten(0, 1))
    hidden = patches[batch["mask"].flatten(0, 1)]
    return {"cls": sinkhorn(teacher.dino_head(cls), temp).unflatten(0, (2, -1)),
            "patch": sinkhorn(teacher.dino_head(padded(hidden, rows))[:len(hidden)], temp)}


def losses(out, targets, batch, tau=0.1):
    dino, patch = F.log_softmax(wide(out["cls"]) / tau, -1), F.log_softmax(wide(out["patch"]) / tau, -1)
    pairs = [-(targets["cls"][t] * dino[s]).sum(-1).mean() for t in range(2) for s in range(len(dino)) if s != t]
    return {"clip": clip_loss(out["img"], out["txt"], out["scale"]),
            "koleo": sum(koleo_loss(wide(crop)) for crop in out["tokens"]),
            "dino": sum(pairs) / len(pairs),
            "ibot": -((targets["patch"] * patch).sum(-1) * batch["mask_weight"]).sum() / batch["mask"].flatten(0, 1).shape[0],
            "rec": (wide(out["pixels"]) - batch["image"][batch["rec"]]).abs().mean()}


def optimizer(groups, betas, eps):
    return torch.optim.AdamW(groups, betas=betas, eps=eps, foreach=False, fused=False)


@torch.no_grad()
def follow(teacher, student, m):
    for mine, theirs in ((teacher.trunk, student.model.trunk), (teacher.dino_head, student.dino_head), (teacher.proj, student.model.visual_proj)):
        for t, s in zip(mine.parameters(), theirs.parameters()):
            t.data = t.data * m + s.data * (1 - m)
