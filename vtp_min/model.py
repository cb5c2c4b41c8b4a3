"""VTP: one ViT encoder with a CLIP head, a DINO head and a pixel decoder.   VTP Sec. 3, Fig. 3

                    .-- visual_proj --> img (B, E)    <- clip ->    txt (B, E) -- text tower -- text
    pixels -- trunk +-- DINO head ----> logits (., K) <- dino, ibot -> logits of the EMA teacher
                    '-- bottleneck --> z (B, d, h, w) -- pixel decoder --> pixels   <- rec

By default both heads read the D channels before the bottleneck (released code); only the decoder
reads the d latent channels.

VTPModel            what is published: the parameters and methods of the released checkpoints
Student, Teacher    what training adds: the DINO head; the moving average that gives the targets

B images    V local crops    N = h*w patches    D width    d latent channels    E CLIP space
K prototypes    T text tokens    M masked patches of all crops
"""
import copy
import math
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .config import SIZES, SMALL, VTPConfig  # noqa: F401     part of this module's interface
from .config import from_hub, load_weights, read_config, read_json, write_model
from .decoder import PixelDecoder
from .device import to_fp32
from .optim import update_ema
from .text import TextTransformer, pool
from .vit import VisionTransformer, init_linear


class VTPModel(nn.Module):
    """The tokenizer. Images are (B, 3, H, W), ImageNet-normalised, sides multiples of the patch."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        rope = getattr(torch, c.rope_dtype)
        D = c.vision_embed_dim
        d = D if c.vision_feature_bottleneck is None else c.vision_feature_bottleneck
        self.trunk = VisionTransformer(
            D, c.vision_depth, c.vision_num_heads, c.vision_patch_size, c.vision_mlp_ratio,
            c.vision_ffn_layer, c.vision_norm_layer, c.vision_use_qk_norm, c.vision_init_values,
            latent_dim=d, rope_dtype=rope)
        self.feature_dim = D if c.vision_bottleneck_ae_only else d     # input of both heads
        # the parts that a config leaves out have no parameters in the files
        if c.train_reconstruction:
            self.pixel_decoder = PixelDecoder(
                d, c.decoder_embed_dim, c.decoder_depth, c.decoder_num_heads, c.decoder_ffn_layer,
                c.decoder_norm_layer, c.decoder_use_qk_norm, c.decoder_init_values,
                c.decoder_upscale, rope)
        if c.train_clip:
            self.add_clip()

    def add_clip(self):
        """The text tower, both projections and the logit scale, under their official names"""
        c = self.config
        W = c.text_embed_dim
        # PyTorch's default initialisation, as in the released training code
        self.visual_proj = nn.Linear(self.feature_dim, W, bias=False)
        self.token_embedding = nn.Embedding(c.text_vocab_size, W)
        positions = torch.empty(c.text_context_length, W).normal_(std=0.01)
        self.positional_embedding = nn.Parameter(positions)
        self.text_transformer = TextTransformer(
            W, c.text_depth, c.text_num_heads, c.text_mlp_ratio, not c.text_no_causal_mask,
            c.text_quick_gelu, c.text_ls_init_value)
        self.ln_final = nn.LayerNorm(W)
        if c.text_proj_type != "none":           # any other name means "linear" (released code)
            if c.text_proj_bias:
                self.text_projection = nn.Linear(W, W)
                nn.init.normal_(self.text_projection.weight, std=W ** -0.5)
            else:
                self.text_projection = nn.Parameter(torch.empty(W, W))
                nn.init.normal_(self.text_projection, std=W ** -0.5)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        shape = [1] if c.nonscalar_logit_scale else []
        # CLIP starts at 1 / 0.07 = 14.3; the official code takes 0.0 for null
        scale = math.log(1 / 0.07) if c.init_logit_scale is None else c.init_logit_scale
        self.logit_scale = nn.Parameter(torch.full(shape, scale))
        self.logit_bias = None
        if c.init_logit_bias is not None:
            self.logit_bias = nn.Parameter(torch.full(shape, float(c.init_logit_bias)))

    def require(self, field, part):
        if not getattr(self.config, field):
            raise ValueError(f"this model has no {part}: it was made with {field} false")

    # ------------------------------------------------------------ the official forward pass
    def forward(self, image=None, text=None, forward_type="clip"):
        """image (B, 3, H, W), text (n, T) token ids -> a dict; its keys depend on forward_type.

        "clip"     image_features (B, E) if there is an image, text_features (n, E) if there is a
                   text, both normalised; logit_scale, already exponentiated; logit_bias if there
                   is one
        "rec"      latents (B, d, h, w), reconstructed_image, and target_image, the input image
        "feature"  cls_token (B, d) and patch_tokens (B, N, d), both after the bottleneck
        """
        if forward_type not in ("clip", "rec", "feature"):
            raise ValueError(f"forward_type is {forward_type!r}, but it must be 'clip', 'rec' or "
                             "'feature'; for example model(image, text, forward_type='clip')")
        if forward_type == "clip":
            return self.clip_outputs(image, text)
        if image is None:
            raise ValueError(f"image is None, but forward_type {forward_type!r} needs an image; "
                             f"call model(image, forward_type={forward_type!r})")
        if forward_type == "feature":
            return self.get_last_layer_feature(image, use_bottleneck=True)
        latents = self.get_reconstruction_latents(image)
        reconstructed = self.get_latents_decoded_images(latents)
        return {"latents": latents, "reconstructed_image": reconstructed, "target_image": image}

    def clip_outputs(self, image, text):
        """The outputs of forward_type "clip". Features of an absent image or text are left out."""
        self.require("train_clip", "CLIP side")
        out = {}
        if image is not None:
            out["image_features"] = self.get_clip_image_feature(image, normalize=True)
        if text is not None:
            out["text_features"] = self.get_clip_text_feature(text, normalize=True)
        out["logit_scale"] = self.logit_scale.exp()
        if self.logit_bias is not None:
            out["logit_bias"] = self.logit_bias
        return out

    # ------------------------------------------------------------ auto-encoder
    def get_reconstruction_latents(self, image):
        """image (B, 3, H, W) -> latents (B, d, h, w): all that the decoder and the DiT see"""
        h, w = (side // self.config.vision_patch_size for side in image.shape[-2:])
        _, patches = self.trunk(image)
        return self.to_latents(patches, h, w)

    def to_latents(self, patches, h, w):
        """patches (B, N, D) -> (B, d, h, w)"""
        z = self.trunk.feature_bottleneck(patches)                       # (B, N, d)
        return z.transpose(1, 2).unflatten(2, (h, w))

    def get_latents_decoded_images(self, latents):
        """latents (B, d, h, w) -> images (B, 3, h*u, w*u), ImageNet-normalised, not clamped"""
        self.require("train_reconstruction", "pixel decoder")
        return self.pixel_decoder(latents)

    # ------------------------------------------------------------ CLIP
    def project(self, cls, patches):
        """cls (B, D), patches (B, N, D) -> image embedding (B, E), not normalised"""
        self.require("train_clip", "CLIP side")
        x = cls if self.config.vision_clip_feat == "cls" else patches.mean(1)
        if not self.config.vision_bottleneck_ae_only:
            x = self.trunk.feature_bottleneck(x)
        return self.visual_proj(x)

    def get_clip_image_feature(self, image, normalize=True):
        """image (B, 3, H, W) -> (B, E), of unit length unless normalize is False"""
        cls, patches = self.trunk(image)
        x = self.project(cls, patches)
        return F.normalize(x, dim=-1) if normalize else x

    def get_clip_text_feature(self, text, normalize=True):
        """text (B, T) token ids -> (B, E), of unit length unless normalize is False

        With text_pool_type "none": (B, T, E).
        """
        self.require("train_clip", "text tower")
        T, longest = text.shape[1], len(self.positional_embedding)
        if T > longest:
            raise ValueError(f"texts are {T} tokens long, wanted at most {longest}; "
                             f"get_tokenizer(context_length={longest}) cuts them")
        # a text may be shorter than the context: the tower is causal
        x = self.token_embedding(text) + self.positional_embedding[:T]   # (B, T, W)
        x = self.ln_final(self.text_transformer(x))
        x = pool(x, text, self.config.text_pool_type)                    # (B, W)
        if self.config.text_proj_type != "none":
            linear = self.config.text_proj_bias
            x = self.text_projection(x) if linear else x @ self.text_projection
        return F.normalize(x, dim=-1) if normalize else x

    def get_clip_logits(self, image, text):
        """image (B, 3, H, W), text (n, T) -> logits per image (B, n) and per text (n, B)"""
        image_features = self.get_clip_image_feature(image, normalize=True)
        text_features = self.get_clip_text_feature(text, normalize=True)
        logits = self.logit_scale.exp() * image_features @ text_features.T
        if self.logit_bias is not None:
            logits = logits + self.logit_bias
        return logits, logits.T

    # ------------------------------------------------------------ feature extractor
    def get_last_layer_feature(self, image, use_bottleneck=False):
        """-> {'cls_token': (B, D), 'patch_tokens': (B, N, D)}; width d after the bottleneck"""
        cls, patches = self.trunk(image)
        if use_bottleneck:
            cls = self.trunk.feature_bottleneck(cls)
            patches = self.trunk.feature_bottleneck(patches)
        return {"cls_token": cls, "patch_tokens": patches}

    def get_intermediate_layers_feature(self, image, n=1, reshape=False, return_class_token=False,
                                        norm=True):
        """-> for each block, in order: (patches, cls) if return_class_token, else patches

        n        number of last blocks, or a list of block numbers
        patches  (B, N, D), or (B, D, h, w) if reshape      cls  (B, D)
        norm     apply the final norm to the output of every block
        """
        depth = len(self.trunk.blocks)
        wanted = range(depth - n, depth) if isinstance(n, int) else n
        if not wanted or not set(wanted) <= set(range(depth)):
            raise ValueError(f"n is {n}, but the trunk has {depth} blocks; wanted a number from 1 "
                             f"to {depth}, or a list of block numbers from 0 to {depth - 1}")
        h, w = (side // self.config.vision_patch_size for side in image.shape[-2:])
        out = []
        for i, x in enumerate(self.trunk.layers(image)):                 # (B, 1+N, D)
            if i not in wanted:
                continue
            if norm:
                x = self.trunk.norm(x)
            cls, patches = x[:, 0], x[:, 1:]
            if reshape:
                patches = patches.transpose(1, 2).unflatten(2, (h, w))
            out.append((patches, cls) if return_class_token else patches)
        return tuple(out)

    # ------------------------------------------------------------ files
    def save_pretrained(self, folder):
        """Write config.json and model.safetensors in the official layout"""
        dtype = str(self.trunk.cls_token.dtype).removeprefix("torch.")
        config = {"model_type": "vtp", "architectures": ["VTPModel"], "dtype": dtype}
        tensors = self.state_dict()
        for name in tensors:
            if name.endswith("periods"):         # RoPE's buffer, bfloat16 in official files
                tensors[name] = tensors[name].bfloat16()
        write_model(folder, config | asdict(self.config), tensors)

    @classmethod
    def from_pretrained(cls, folder, rope_dtype=None):
        """A folder with config.json and model.safetensors (ours or official), or a Hub id if
        huggingface_hub is installed.

        rope_dtype  None takes that of the file ("float32" in ours), or else bfloat16, as the
                    official models were trained
        """
        if not Path(folder, "config.json").exists():
            folder = from_hub(folder)
        settings = read_config(Path(folder, "config.json"))
        if rope_dtype is not None:
            settings["rope_dtype"] = str(rope_dtype).removeprefix("torch.")
        model = cls(VTPConfig(**settings))
        load_weights(model, Path(folder, "model.safetensors"))
        return model.eval()


def load_model(folder):
    """A run folder or released weights -> VTPModel; for the baselines ldm and vavae an LDM"""
    path = Path(folder, "config.json")
    if path.exists():
        found = read_json(path)
        if found.get("model_type") in ("ldm", "vavae"):
            from .extras.baselines import load_ldm
            return load_ldm(folder, found)
    return VTPModel.from_pretrained(folder)


# ---------------------------------------------------------------- training
class DINOHead(nn.Module):
    """Token -> logits of K prototypes.   DINO

    An MLP, then the cosine to each prototype times the gain of the prototype.
    One head serves class tokens (DINO) and patches (iBOT), as in the released code. The defaults
    are DINOv2's.
    """
    def __init__(self, dim, K=65536, hidden=2048, bottleneck=256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden),
                                 nn.GELU(), nn.Linear(hidden, bottleneck))
        self.mlp.apply(init_linear)
        # Weight normalisation, with the names and the initialisation that nn.utils.weight_norm
        # gives in DINOv2: a direction and a gain for each prototype.
        directions = nn.Linear(bottleneck, K, bias=False).weight         # PyTorch's init, as DINOv2
        self.last_layer = nn.Module()
        self.last_layer.weight_v = nn.Parameter(directions.detach().clone())
        self.last_layer.weight_g = nn.Parameter(torch.ones(K, 1))        # trainable (released code)

    def embed(self, x):
        """(n, D) -> unit vectors (n, bottleneck)"""
        return F.normalize(self.mlp(x), dim=-1)

    def prototype_logits(self, x):
        """unit vectors (n, bottleneck) -> (n, K)"""
        prototypes = F.normalize(self.last_layer.weight_v, dim=-1) * self.last_layer.weight_g
        return F.linear(x, prototypes)

    def forward(self, x):
        """(n, D) -> logits (n, K)"""
        return self.prototype_logits(self.embed(x))


class Student(nn.Module):
    """What receives gradients: the model, and the DINO head if self-distillation is on"""

    def __init__(self, model, dino_head=None):
        super().__init__()
        self.model, self.dino_head = model, dino_head

    # CLIP and reconstruction share one view of the image
    def encode(self, image, keep=None):
        """image (B, 3, H, W) -> class token (B, D), patches (B, N, D)"""
        return self.model.trunk(image, keep=keep)

    def embed_image(self, cls, patches):
        """-> (B, E), unit length, float32"""
        return F.normalize(to_fp32(self.model.project(cls, patches)), dim=-1)

    def embed_text(self, text):
        """text (B, T) -> (B, E), unit length, float32"""
        x = self.model.get_clip_text_feature(text, normalize=False)
        # in bfloat16 the lengths would differ from 1 by up to 0.0015
        return F.normalize(to_fp32(x), dim=-1)

    def decode(self, patches):
        """patches (B, N, D) of square images -> pixels (B, 3, H, W)"""
        side = math.isqrt(patches.shape[1])
        return self.model.pixel_decoder(self.model.to_latents(patches, side, side))

    def clamp_logit_scale(self):
        """Keep it between 0 and ln 100, as OpenCLIP"""
        if self.model.config.train_clip:
            with torch.no_grad():
                self.model.logit_scale.clamp_(0, math.log(100))

    # self-distillation
    def views(self, crops, locals, mask, mask_index, keep):
        """What the student predicts of the crops for the DINO, iBOT and KoLeo losses

        crops   (2, B, 3, H, W)      mask  (2, B, N) bool, True: hidden from the student
        locals  (V, B, 3, h, w)      mask_index  (M,) positions of the masked patches in mask
        keep    {'ssl', 'local': stochastic depth}
        -> logits of class tokens (2+V, B, K), logits of masked patches (M, K),
           features: class tokens of the global crops before the head (2, B, D)
        """
        trunk, V = self.model.trunk, len(locals)
        # both global crops of all images are one batch: first all first crops, then all second
        cls, patches = trunk(crops.flatten(0, 1), mask.flatten(0, 1), keep["ssl"])
        masked = patches.flatten(0, 1)[mask_index]                       # (M, D)
        features = cls.unflatten(0, (2, -1))                             # (2, B, D)
        if V:
            # local crops are smaller, so they need a forward pass of their own; no mask
            local_cls, _ = trunk(locals.flatten(0, 1), keep=keep["local"])
            cls = torch.cat([cls, local_cls])                            # ((2+V) B, D)
        # one call of the head, because normalising K prototypes takes time
        logits = self.dino_head(head_input(trunk, self.model.config, torch.cat([cls, masked])))
        cls_logits, patch_logits = logits.split([len(cls), len(masked)])
        return cls_logits.unflatten(0, (2 + V, -1)), patch_logits, features


def rec_patches(batch, patches, student):
    """patches (B, N, D) of the whole batch -> those of the images to reconstruct (Br, N, D). If
    reconstruction has a stochastic depth of its own, they come from a second forward pass."""
    if "rec" not in batch.keep:
        return patches[batch.rec]
    return student.encode(batch.image[batch.rec], batch.keep["rec"])[1]


class Teacher(nn.Module):
    """Moving average of the student: trunk, CLIP projection, DINO head.   DINO

    It sees the global crops without a mask. It starts as a copy. (In the released code its head and
    projection start with other random weights, and nothing there makes them equal: DINOv2 copies
    them, and so do we.)
    """
    def __init__(self, student):
        super().__init__()
        model = student.model
        self.trunk = copy.deepcopy(model.trunk)
        self.dino_head = copy.deepcopy(student.dino_head)
        # no loss reads the projection; the released code averages it too
        self.proj = copy.deepcopy(model.visual_proj) if model.config.train_clip else None
        self.config = model.config
        # it learns by the moving average alone
        self.requires_grad_(False)
        self.eval()

    def train(self, mode=True):
        return super().train(False)

    @torch.no_grad()
    def forward(self, crops, mask_index):
        """crops (2, B, 3, H, W), mask_index (M,) -> logits of class tokens (2, B, K), of masked
        patches (M, K)"""
        cls, patches = self.trunk(crops.flatten(0, 1))
        masked = patches.flatten(0, 1)[mask_index]                       # (M, D)
        logits = self.dino_head(head_input(self.trunk, self.config, torch.cat([cls, masked])))
        cls_logits, patch_logits = logits.split([len(cls), len(masked)])
        return cls_logits.unflatten(0, (2, -1)), patch_logits

    def update(self, student, momentum):
        """teacher <- momentum * teacher + (1 - momentum) * student"""
        model = student.model
        update_ema(self.trunk.parameters(), model.trunk.parameters(), momentum)
        update_ema(self.dino_head.parameters(), student.dino_head.parameters(), momentum)
        if self.proj is not None:
            update_ema(self.proj.parameters(), model.visual_proj.parameters(), momentum)


def head_input(trunk, config, tokens):
    """Tokens (n, D) as the DINO head reads them: of full width (released code), or (n, d)"""
    if config.vision_bottleneck_ae_only:
        return tokens
    return trunk.feature_bottleneck(tokens)
