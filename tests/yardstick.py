"""The same mathematics, plainly arranged: what tests/bench.py measures ours against. Nothing else uses this file.

joint step   as VTP's official meta-architecture is composed: a forward pass for words, one for pixels, one for each size of crop; captions padded to 77;
             the rows of hidden patches padded to a fixed number; rotary embedding, norms and losses operation by operation; AdamW and EMA tensor by tensor
views        DINOv2's recipe in torchvision's own transforms on PIL pictures
DiT step     LightningDiT's way: latents read and normalised one by one, norms, modulation and rotation operation by operation, AdamW and EMA tensor by tensor
Inception    pytorch-fid's way: batch norm on its own, channels first, the whole batch at once
"""
import math
import types
from copy import deepcopy

import torch
import torch.nn.functional as F
import torchvision.transforms as V
from PIL import Image
from safetensors import safe_open

from vtp_min.fid import Conv
from vtp_min.lightning import waves
from vtp_min.losses import clip_loss, koleo_loss, sinkhorn, to_fp32
from vtp_min.text import CausalAttention
from vtp_min.views import VIEWS
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
    out = {"img": F.normalize(to_fp32(m.project(cls, patches)), dim=-1), "scale": m.logit_scale.exp()}
    text = F.pad(batch["text"], (0, 77 - batch["text"].shape[1]))
    out["txt"] = F.normalize(to_fp32(m.get_clip_text_feature(text, normalize=False)), dim=-1)
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
    dino, patch = F.log_softmax(to_fp32(out["cls"]) / tau, -1), F.log_softmax(to_fp32(out["patch"]) / tau, -1)
    pairs = [-(targets["cls"][t] * dino[s]).sum(-1).mean() for t in range(2) for s in range(len(dino)) if s != t]
    return {"clip": clip_loss(out["img"], out["txt"], out["scale"]),
            "koleo": sum(koleo_loss(to_fp32(crop)) for crop in out["tokens"]),
            "dino": sum(pairs) / len(pairs),
            "ibot": -((targets["patch"] * patch).sum(-1) * batch["mask_weight"]).sum() / batch["mask"].flatten(0, 1).shape[0],
            "rec": (to_fp32(out["pixels"]) - batch["image"][batch["rec"]]).abs().mean()}


def optimizer(groups, betas, eps):
    return torch.optim.AdamW(groups, betas=betas, eps=eps, foreach=False, fused=False)


@torch.no_grad()
def follow(teacher, student, m):
    for mine, theirs in ((teacher.trunk, student.model.trunk), (teacher.dino_head, student.dino_head), (teacher.proj, student.model.visual_proj)):
        for t, s in zip(mine.parameters(), theirs.parameters()):
            t.data = t.data * m + s.data * (1 - m)


# ---------------------------------------------------------------- views
def view(side, area, blur, solarise, floats):
    """One line of views.VIEWS in torchvision's words: PIL -> normalised float (3, side, side), or uint8"""
    return V.Compose([
        V.RandomResizedCrop(side, scale=area, interpolation=V.InterpolationMode.BICUBIC),
        V.RandomHorizontalFlip(),
        V.RandomApply([V.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
        V.RandomGrayscale(0.2),
        V.RandomApply([V.GaussianBlur(9, (0.1, 2.0))], p=blur),
        V.RandomSolarize(128, p=solarise)]
        + ([V.ToTensor(), V.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))] if floats else [V.PILToTensor()]))


def views(path, image, local, n_local, floats=True):
    """A file -> [two global views, n_local local ones], decoded once"""
    with Image.open(path) as file:
        picture = file.convert("RGB")
    one, two, small = (view(side, *VIEWS[name], floats) for name, side in (("global 1", image), ("global 2", image), ("local", local)))
    return [one(picture), two(picture)] + [small(picture) for _ in range(n_local)]


# ---------------------------------------------------------------- the DiT step
def velocity(m, x, t, y):
    """What LightningDiT's forward returns, with the modules of ours"""
    def norm(x, n):
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + n.eps)).type_as(x) * n.weight

    def modulate(x, shift, scale):
        return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)

    def rotate(x):
        a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
        return x * m.feat_rope.freqs_cos + torch.stack((-b, a), -1).reshape(x.shape) * m.feat_rope.freqs_sin

    def attend(x, attn):
        B, N, D = x.shape
        q, k, v = attn.qkv(x).reshape(B, N, 3, attn.heads, D // attn.heads).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = rotate(attn.q_norm(q)).to(v.dtype), rotate(attn.k_norm(k)).to(v.dtype)
        return attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D))

    def feed(x, mlp):
        gate, value = mlp.w12(x).chunk(2, dim=-1)
        return mlp.w3(F.silu(gate) * value)
    side = m.input_size
    x = m.x_embedder["proj"](x).flatten(2).transpose(1, 2) + m.pos_embed
    c = m.t_embedder["mlp"](waves(t)) + m.y_embedder["embedding_table"](y)
    for block in m.blocks:
        shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * attend(modulate(norm(x, block.norm1), shift1, scale1), block.attn)
        x = x + gate2.unsqueeze(1) * feed(modulate(norm(x, block.norm2), shift2, scale2), block.mlp)
    shift, scale = m.final_layer.adaLN_modulation(c).chunk(2, dim=1)
    x = m.final_layer.linear(modulate(norm(x, m.final_layer.norm_final), shift, scale))
    return torch.einsum("nhwc->nchw", x.reshape(len(x), side, side, -1))


def flow_loss(model, x1, x0, t, y):
    s, v = t.view(-1, 1, 1, 1), x1 - x0
    pred = velocity(model, s * x1 + (1 - s) * x0, t, y)
    return ((pred - v) ** 2).mean() + (1 - F.cosine_similarity(pred, v, dim=1)).mean()


def latent(path, i, flip, stats):
    """One latent, from a file opened for it, standardised (C, H, W)"""
    with safe_open(path, "pt") as f:
        z = f.get_slice("latents_flip" if flip else "latents")[i:i + 1]
    return ((z - stats["mean"]) / stats["std"]).squeeze(0)


@torch.no_grad()
def ema(average, model, decay):
    for a, p in zip(average.parameters(), model.parameters()):
        a.mul_(decay).add_(p.data, alpha=1 - decay)


# ---------------------------------------------------------------- Inception
def inception(ours):
    """-> uint8 (B, 3, H, W) -> (B, 2048)"""
    net = deepcopy(ours).to(memory_format=torch.contiguous_format)
    for conv in (m for m in net.modules() if isinstance(m, Conv)):
        conv.forward = lambda x, conv=conv: F.relu(conv.bn(conv.conv(x)), inplace=True)
    return net.pool
