"""An independent implementation of the same mathematics, as a reference for study/bench.py.

It computes what our code computes, in the way of the published implementations:

training step   like VTP's official training code: one forward pass for CLIP, one for
                reconstruction, one for each size of crop; captions padded to 77 tokens; masked
                patches padded to a fixed number of rows; rotary embedding, norms and losses as
                sequences of elementary operations; AdamW and EMA tensor by tensor
views           DINOv2's recipe with torchvision's transforms on PIL images
DiT step        like LightningDiT: latents read and normalised one by one; norms, modulation and
                rotation as sequences of elementary operations; AdamW and EMA tensor by tensor
Inception       like pytorch-fid: batch norm as a separate layer, channels first, the whole batch at
                once

Shapes are those of train.py, vit.py and dit.py.
"""
import math
import types
from copy import deepcopy

import torch
import torch.nn.functional as F
import torchvision.transforms as V
from PIL import Image
from safetensors import safe_open

from dit import timestep_embedding
from vtp_min.augment import MEAN, STD, VIEWS
from vtp_min.device import to_fp32
from vtp_min.fid import Conv
from vtp_min.losses import clip_loss, koleo_loss, sinkhorn
from vtp_min.text import CausalAttention
from vtp_min.vit import Attention, RMSNorm


# ---------------------------------------------------------------- the training step
def rearrange(model):
    """Replace the forward methods of attention and norms in a model by the ones below."""
    forwards = {Attention: attention, CausalAttention: causal_attention, RMSNorm: rms_norm}
    for module in model.modules():
        if type(module) in forwards:
            module.forward = types.MethodType(forwards[type(module)], module)
    return model


def rms_norm(self, x):
    """Forward method of RMSNorm"""
    y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
    return y.type_as(x) * self.weight


def attention(self, x, rope):
    """Forward method of Attention"""
    B, N, D = x.shape
    qkv = self.qkv(x).reshape(B, N, 3, self.heads, D // self.heads)
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))               # each (B, H, N, c)
    sin, cos = (table[1:] for table in rope)                           # without the class token
    q = rotate(self.q_norm(q), sin, cos)
    k = rotate(self.k_norm(k), sin, cos)
    x = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
    return self.proj(x.transpose(1, 2).reshape(B, N, D))


def rotate(x, sin, cos):
    """Apply the rotary embedding to all tokens except the class token."""
    cls, patches = x[:, :, :1], x[:, :, 1:]
    a, b = patches.to(sin.dtype).chunk(2, -1)
    rotated = patches * cos + torch.cat([-b, a], -1) * sin
    return torch.cat([cls, rotated.to(x.dtype)], 2)


def causal_attention(self, x):
    """Forward method of CausalAttention"""
    B, T, W = x.shape
    qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).view(B, T, 3, self.heads, -1)
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    mask = torch.full((T, T), -torch.inf, dtype=q.dtype).triu(1)
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return self.out_proj(x.transpose(1, 2).reshape(B, T, W))


def masked_rows(batch):
    """-> number of rows of the buffer for masked patches

    DINOv2 masks half of the crops. Their mask ratios are from equal intervals of [0.1, 0.5], and
    the buffer has room for the upper bound of each interval.
    """
    n_crops, n_patches = batch.mask.flatten(0, 1).shape
    ratios = torch.linspace(0.1, 0.5, n_crops // 2 + 1)[1:].tolist()
    return sum(int(n_patches * ratio) for ratio in ratios)


def padded(x, rows):
    """x (M, D) -> (rows, D), filled with zeros"""
    return torch.cat([x, x.new_zeros(rows - len(x), x.shape[1])])


def forward(student, batch):
    """-> {name: tensor}: the inputs of the losses, from four forward passes of the trunk"""
    model, head = student.model, student.dino_head
    out = {"scale": model.logit_scale.exp()}

    cls, patches = model.trunk(batch.image)                            # CLIP
    out["img"] = F.normalize(to_fp32(model.project(cls, patches)), dim=-1)
    text = F.pad(batch.text, (0, 77 - batch.text.shape[1]))
    out["txt"] = F.normalize(to_fp32(model.get_clip_text_feature(text, normalize=False)), dim=-1)

    _, patches = model.trunk(batch.image[batch.rec])                   # reconstruction
    side = math.isqrt(patches.shape[1])
    out["pixels"] = model.pixel_decoder(model.to_latents(patches, side, side))

    mask = batch.mask.flatten(0, 1)                                    # self-distillation
    cls, patches = model.trunk(batch.crops.flatten(0, 1), mask=mask)
    local_cls, _ = model.trunk(batch.locals.flatten(0, 1))
    out["features"] = cls.unflatten(0, (2, -1))
    logits = torch.cat([head(cls), head(local_cls)])
    out["cls"] = logits.unflatten(0, (2 + len(batch.locals), -1))
    masked = patches[mask]
    out["patch"] = head(padded(masked, masked_rows(batch)))[:len(masked)]
    return out


@torch.no_grad()
def teacher_targets(teacher, batch, temp):
    """-> {"cls": (2, B, K), "patch": (M, K)}: probabilities from Sinkhorn"""
    cls, patches = teacher.trunk(batch.crops.flatten(0, 1))
    masked = patches[batch.mask.flatten(0, 1)]
    cls_logits = teacher.dino_head(cls)
    patch_logits = teacher.dino_head(padded(masked, masked_rows(batch)))[:len(masked)]
    return {"cls": sinkhorn(cls_logits, temp).unflatten(0, (2, -1)),
            "patch": sinkhorn(patch_logits, temp)}


def losses(out, targets, batch, tau=0.1):
    """out of `forward`, targets of `teacher_targets` -> {name: loss}"""
    dino = F.log_softmax(to_fp32(out["cls"]) / tau, -1)
    ibot = F.log_softmax(to_fp32(out["patch"]) / tau, -1)
    pairs = [(t, s) for t in range(2) for s in range(len(dino)) if s != t]
    cross_entropies = [-(targets["cls"][t] * dino[s]).sum(-1).mean() for t, s in pairs]
    per_patch = (targets["patch"] * ibot).sum(-1) * batch.mask_weight
    first, second = (koleo_loss(to_fp32(crop)) for crop in out["features"])
    error = to_fp32(out["pixels"]) - batch.image[batch.rec]
    return {"clip": clip_loss(out["img"], out["txt"], out["scale"]),
            "koleo": first + second,
            "dino": sum(cross_entropies) / len(pairs),
            "ibot": -per_patch.sum() / len(batch.mask.flatten(0, 1)),
            "rec": error.abs().mean()}


def adamw(groups, betas, eps):
    return torch.optim.AdamW(groups, betas=betas, eps=eps, foreach=False, fused=False)


@torch.no_grad()
def update_teacher(teacher, student, momentum):
    pairs = [(teacher.trunk, student.model.trunk), (teacher.dino_head, student.dino_head),
             (teacher.proj, student.model.visual_proj)]
    for target, source in pairs:
        for t, s in zip(target.parameters(), source.parameters()):
            t.data = t.data * momentum + s.data * (1 - momentum)


# ---------------------------------------------------------------- views
def view(side, area, blur, solarize, floats):
    """-> one entry of augment.VIEWS, composed of torchvision's transforms

    The result maps a PIL image to (3, side, side): normalised floats, or uint8 if not `floats`.
    """
    cubic = V.InterpolationMode.BICUBIC
    steps = [V.RandomResizedCrop(side, scale=area, interpolation=cubic),
             V.RandomHorizontalFlip(),
             V.RandomApply([V.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
             V.RandomGrayscale(0.2),
             V.RandomApply([V.GaussianBlur(9, (0.1, 2.0))], p=blur),
             V.RandomSolarize(128, p=solarize)]
    if floats:
        steps += [V.ToTensor(), V.Normalize(MEAN.flatten().tolist(), STD.flatten().tolist())]
    else:
        steps.append(V.PILToTensor())
    return V.Compose(steps)


def views(path, image, local_image, n_local, floats=True):
    """Image file -> list of 2 global and n_local local crops; the file is decoded once"""
    with Image.open(path) as file:
        img = file.convert("RGB")
    first = view(image, *VIEWS["global 1"], floats)
    second = view(image, *VIEWS["global 2"], floats)
    local = view(local_image, *VIEWS["local"], floats)
    return [first(img), second(img)] + [local(img) for _ in range(n_local)]


# ---------------------------------------------------------------- the DiT step
def velocity(model, x, t, y):
    """The forward pass of LightningDiT, with the modules and parameters of dit.LightningDiT"""
    side = model.input_size
    x = model.x_embedder["proj"](x).flatten(2).transpose(1, 2) + model.pos_embed
    c = model.t_embedder["mlp"](timestep_embedding(t))
    c = c + model.y_embedder["embedding_table"](y)
    for block in model.blocks:
        parts = block.adaLN_modulation(c).chunk(6, dim=1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        branch = dit_attention(modulate(dit_norm(x, block.norm1), shift1, scale1), block.attn,
                               model.feat_rope)
        x = x + gate1.unsqueeze(1) * branch
        branch = dit_mlp(modulate(dit_norm(x, block.norm2), shift2, scale2), block.mlp)
        x = x + gate2.unsqueeze(1) * branch
    last = model.final_layer
    shift, scale = last.adaLN_modulation(c).chunk(2, dim=1)
    x = last.linear(modulate(dit_norm(x, last.norm_final), shift, scale))
    return torch.einsum("nhwc->nchw", x.reshape(len(x), side, side, -1))


def dit_norm(x, norm):
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + norm.eps)
    return y.type_as(x) * norm.weight


def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def dit_rotate(x, rope):
    a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return x * rope.freqs_cos + torch.stack((-b, a), -1).reshape(x.shape) * rope.freqs_sin


def dit_attention(x, attn, rope):
    B, N, D = x.shape
    qkv = attn.qkv(x).reshape(B, N, 3, attn.heads, D // attn.heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    q = dit_rotate(attn.q_norm(q), rope).to(v.dtype)
    k = dit_rotate(attn.k_norm(k), rope).to(v.dtype)
    x = F.scaled_dot_product_attention(q, k, v)
    return attn.proj(x.transpose(1, 2).reshape(B, N, D))


def dit_mlp(x, mlp):
    gate, value = mlp.w12(x).chunk(2, dim=-1)
    return mlp.w3(F.silu(gate) * value)


def flow_loss(model, x1, x0, t, y):
    """Flow-matching loss and cosine loss -> scalar"""
    s, v = t.view(-1, 1, 1, 1), x1 - x0
    pred = velocity(model, s * x1 + (1 - s) * x0, t, y)
    return ((pred - v) ** 2).mean() + (1 - F.cosine_similarity(pred, v, dim=1)).mean()


def read_latent(path, i, flip, stats):
    """-> one normalised latent (C, h, w); the file is opened again for each latent"""
    with safe_open(path, "pt") as f:
        z = f.get_slice("latents_flip" if flip else "latents")[i:i + 1]
    return ((z - stats["mean"]) / stats["std"]).squeeze(0)


@torch.no_grad()
def update_ema(target, source, decay):
    for t, s in zip(target.parameters(), source.parameters()):
        t.mul_(decay).add_(s.data, alpha=1 - decay)


# ---------------------------------------------------------------- Inception
def inception(ours):
    """Inception of vtp_min.fid -> function uint8 (B, 3, H, W) -> (B, 2048)"""
    net = deepcopy(ours).to(memory_format=torch.contiguous_format)
    for module in net.modules():
        if isinstance(module, Conv):
            module.forward = types.MethodType(conv_norm_relu, module)
    return net.features


def conv_norm_relu(self, x):
    """Forward method of Conv"""
    return F.relu(self.bn(self.conv(x)), inplace=True)
