"""VTP: one ViT encoder with a CLIP head, a DINO head and a pixel decoder.   VTP Sec. 3, Fig. 3

                    .-- visual_proj --> image embedding (B, E)            | clip:  text embedding
    image -- trunk -+-- DINO head ----> logits of K prototypes            | dino, ibot:  teacher
                    '-- bottleneck ---> latents (B, d, h, w) -> decoder   | rec:  image

Right of the bars: the loss, and what the output is compared with. By default the CLIP projection
and the DINO head read the D channels before the bottleneck (released code); only the decoder reads
the d latent channels. The bottleneck is linear, so what the trunk knows can reach the latents.

VTPModel            the published model. Parameters, methods get_* and forward have the names and
                    defaults of the released code, even where these are odd.
DINOHead            token -> logits of prototypes
Student, Teacher    what training adds: forward passes for each loss; the moving average of the
                    student, which gives the targets of self-distillation

B images    Bs images with crops    Br images to reconstruct    V local crops, s pixels wide
P patch side in pixels    N = h*w patches    D width of the trunk    d latent channels
E width of the text transformer and of the CLIP space    T text tokens    K prototypes
M masked patches
"""
import copy
import math
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .config import SIZES, SMALL, VTPConfig  # noqa: F401     imported from here by scripts
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
        rope_dtype = getattr(torch, c.rope_dtype)
        D = c.vision_embed_dim
        # None: no bottleneck, the latents have the width of the trunk
        d = D if c.vision_feature_bottleneck is None else c.vision_feature_bottleneck
        self.trunk = VisionTransformer(
            D, c.vision_depth, c.vision_num_heads, c.vision_patch_size, ratio=c.vision_mlp_ratio,
            ffn=c.vision_ffn_layer, norm=c.vision_norm_layer, qk_norm=c.vision_use_qk_norm,
            layer_scale=c.vision_init_values, latent_dim=d, rope_dtype=rope_dtype)
        self.feature_dim = D if c.vision_bottleneck_ae_only else d     # input of both heads
        # parts that the config switches off are not built, and checkpoints hold no weights for them
        if c.train_reconstruction:
            self.pixel_decoder = PixelDecoder(
                d, c.decoder_embed_dim, c.decoder_depth, c.decoder_num_heads,
                ffn=c.decoder_ffn_layer, norm=c.decoder_norm_layer, qk_norm=c.decoder_use_qk_norm,
                layer_scale=c.decoder_init_values, upscale=c.decoder_upscale,
                rope_dtype=rope_dtype)
        if c.train_clip:
            self.add_clip()

    def add_clip(self):
        """The text transformer, both projections and the logit scale, as in CLIP and OpenCLIP"""
        c = self.config
        E = c.text_embed_dim
        # PyTorch's default initialisation, as in the released training code
        self.visual_proj = nn.Linear(self.feature_dim, E, bias=False)

        self.token_embedding = nn.Embedding(c.text_vocab_size, E)
        positions = torch.empty(c.text_context_length, E).normal_(std=0.01)
        self.positional_embedding = nn.Parameter(positions)
        self.text_transformer = TextTransformer(
            E, c.text_depth, c.text_num_heads, c.text_mlp_ratio,
            causal=not c.text_no_causal_mask, use_quick_gelu=c.text_quick_gelu,
            layer_scale=c.text_ls_init_value)
        self.ln_final = nn.LayerNorm(E)
        if c.text_proj_type != "none":           # any other name means a projection (released code)
            if c.text_proj_bias:
                self.text_projection = nn.Linear(E, E)
                nn.init.normal_(self.text_projection.weight, std=E ** -0.5)
            else:
                self.text_projection = nn.Parameter(torch.empty(E, E))
                nn.init.normal_(self.text_projection, std=E ** -0.5)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

        # The logits of CLIP are scale * cosine; the logarithm of the scale is learned. Without a
        # value in the config it starts at ln(1 / 0.07), as in CLIP. (For the released code, 0.0 is
        # no value either.)
        shape = [1] if c.nonscalar_logit_scale else []
        log_scale = math.log(1 / 0.07) if c.init_logit_scale is None else c.init_logit_scale
        self.logit_scale = nn.Parameter(torch.full(shape, float(log_scale)))
        self.logit_bias = None                   # SigLIP only
        if c.init_logit_bias is not None:
            self.logit_bias = nn.Parameter(torch.full(shape, float(c.init_logit_bias)))

    def require(self, field, part):
        """ValueError if the config has switched this part off"""
        if not getattr(self.config, field):
            raise ValueError(f"this model has no {part}: it was made with {field} false")

    # ------------------------------------------------------------ the official forward pass
    def forward(self, image=None, text=None, forward_type="clip"):
        """image (B, 3, H, W), text (n, T) token ids -> a dict; its keys depend on forward_type.

        "clip"     image_features (B, E) if an image is given, text_features (n, E) if a text is
                   given, both normalised; logit_scale, already exponentiated; logit_bias if the
                   model has one
        "rec"      latents (B, d, h, w), reconstructed_image, and target_image, which is the input
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
        """latents (B, d, h, w) -> images (B, 3, u*h, u*w), ImageNet-normalised, not clamped

        u is config.decoder_upscale, normally equal to the patch side.
        """
        self.require("train_reconstruction", "pixel decoder")
        return self.pixel_decoder(latents)

    # ------------------------------------------------------------ CLIP
    def project(self, cls, patches):
        """Into the CLIP space, not normalised: cls (B, D), patches (B, N, D) -> (B, E)"""
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
        # A text may be shorter than the context. With a causal mask and the end token read (the
        # defaults), padding after the end token would change nothing.
        x = self.token_embedding(text) + self.positional_embedding[:T]   # (B, T, E)
        x = self.ln_final(self.text_transformer(x))
        x = pool(x, text, self.config.text_pool_type)                    # (B, E), or (B, T, E)
        if self.config.text_proj_type != "none":
            if self.config.text_proj_bias:
                x = self.text_projection(x)
            else:
                x = x @ self.text_projection
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
        """-> {'cls_token': (B, D), 'patch_tokens': (B, N, D)}; with use_bottleneck of width d"""
        cls, patches = self.trunk(image)
        if use_bottleneck:
            cls = self.trunk.feature_bottleneck(cls)
            patches = self.trunk.feature_bottleneck(patches)
        return {"cls_token": cls, "patch_tokens": patches}

    def get_intermediate_layers_feature(self, image, n=1, reshape=False, return_class_token=False,
                                        norm=True):
        """-> a tuple, sorted by depth: (patches, cls) if return_class_token, else patches

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
            if name.endswith("periods"):         # always bfloat16 in official files
                tensors[name] = tensors[name].bfloat16()
        write_model(folder, config | asdict(self.config), tensors)

    @classmethod
    def from_pretrained(cls, folder, rope_dtype=None):
        """A folder with config.json and model.safetensors (ours or official), or a Hub id if
        huggingface_hub is installed.

        rope_dtype  precision of the rotary position embedding. None: as config.json says ("float32"
                    in our files); official files do not say it and were trained with bfloat16.
        """
        if not Path(folder, "config.json").exists():
            folder = from_hub(folder)
        settings = read_config(Path(folder, "config.json"))
        if rope_dtype is not None:
            settings["rope_dtype"] = str(rope_dtype).removeprefix("torch.")
        try:
            config = VTPConfig(**settings)
        except ValueError as error:
            raise ValueError(f"{folder}/config.json: {error}") from None
        model = cls(config)
        load_weights(model, Path(folder, "model.safetensors"))
        return model.eval()


def load_model(folder):
    """A run folder or released weights -> VTPModel; a run of --baseline ldm or vavae -> LDM, their
    convolutional auto-encoder"""
    path = Path(folder, "config.json")
    if path.exists():
        found = read_json(path)
        if found.get("model_type") in ("ldm", "vavae"):
            from .extras.baselines import load_ldm
            return load_ldm(folder, found)
    return VTPModel.from_pretrained(folder)


# ---------------------------------------------------------------- training
class DINOHead(nn.Module):
    """Token -> logits of K prototypes.   DINO Sec. 3.1, "Network architecture"

    The prototypes are learned classes without names: self-distillation trains the student to choose
    the same prototypes as the teacher. logit_k = g_k * cos(mlp(x), v_k), where v_k is the direction
    and g_k the length of prototype k. One head serves class tokens (DINO) and patches (iBOT), as in
    the released code. The defaults are DINOv2's; `bottleneck` is the head's own, not VTP's.
    """
    def __init__(self, dim, K=65536, hidden=2048, bottleneck=256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden),
                                 nn.GELU(), nn.Linear(hidden, bottleneck))
        self.mlp.apply(init_linear)
        # weight_v and weight_g are the parameters that nn.utils.weight_norm, now deprecated, makes
        # in DINOv2; with these names its heads load. The lengths start at 1. They are trainable, as
        # in the released code (DINO keeps them at 1).
        directions = nn.Linear(bottleneck, K, bias=False).weight         # initialised by PyTorch
        self.last_layer = nn.Module()
        self.last_layer.weight_v = nn.Parameter(directions.detach().clone())
        self.last_layer.weight_g = nn.Parameter(torch.ones(K, 1))

    def forward(self, x):
        """tokens (n, D) -> logits (n, K)"""
        return self.prototype_logits(self.embed(x))

    # The two parts of forward. Gradient caching (--micro) stores the unit vectors between them.
    def embed(self, x):
        """tokens (n, D) -> unit vectors (n, bottleneck)"""
        return F.normalize(self.mlp(x), dim=-1)

    def prototype_logits(self, x):
        """unit vectors (n, bottleneck) -> logits (n, K)"""
        prototypes = F.normalize(self.last_layer.weight_v, dim=-1) * self.last_layer.weight_g
        return F.linear(x, prototypes)


def head_input(trunk, config, tokens):
    """tokens (n, D) -> input of the DINO head: the same tokens (released code), or (n, d) with
    --set heads_after_bottleneck=true"""
    if config.vision_bottleneck_ae_only:
        return tokens
    return trunk.feature_bottleneck(tokens)


class Student(nn.Module):
    """What is trained by gradients: the model, and the DINO head if self-distillation is on"""

    def __init__(self, model, dino_head=None):
        super().__init__()
        self.model, self.dino_head = model, dino_head

    # ------------------------------------------------------------ CLIP and reconstruction
    # Both use one view of the image, so that one forward pass of the trunk serves them.
    def encode(self, image, keep=None):
        """image (B, 3, H, W) -> class token (B, D), patches (B, N, D)

        keep  stochastic depth of each block (augment.kept_rows); None: no stochastic depth
        """
        return self.model.trunk(image, keep=keep)

    def embed_image(self, cls, patches):
        """-> (B, E), unit length, float32"""
        # normalised in bfloat16, lengths would differ from 1 by up to 0.0015 (tests/test_model.py)
        return F.normalize(to_fp32(self.model.project(cls, patches)), dim=-1)

    def embed_text(self, text):
        """text (B, T) -> (B, E), unit length, float32"""
        x = self.model.get_clip_text_feature(text, normalize=False)
        return F.normalize(to_fp32(x), dim=-1)

    def logit_scale_and_bias(self):
        """-> the factor of the CLIP logits, and SigLIP's bias or None"""
        return self.model.logit_scale.exp(), self.model.logit_bias

    def clamp_logit_scale(self):
        """After an optimizer step: keep the scale between 1 and 100, as OpenCLIP does"""
        if self.model.config.train_clip:
            with torch.no_grad():
                self.model.logit_scale.clamp_(0, math.log(100))

    def rec_patches(self, batch, patches):
        """patches (B, N, D) of all images -> (Br, N, D) of the images to reconstruct

        If reconstruction has its own rate of stochastic depth (--set drop_rec), these images pass
        through the trunk a second time.
        """
        if "rec" not in batch.keep:
            return patches.index_select(0, batch.rec)
        _, own_patches = self.encode(batch.image[batch.rec], batch.keep["rec"])
        return own_patches

    def decode(self, patches):
        """patches (Br, N, D) of square images -> pixels (Br, 3, H, W)"""
        side = math.isqrt(patches.shape[1])
        return self.model.pixel_decoder(self.model.to_latents(patches, side, side))

    # ------------------------------------------------------------ self-distillation
    def views(self, crops, locals, mask, mask_index, keep):
        """The student's outputs for DINO, iBOT and KoLeo, for Bs images with 2 + V crops each

        crops       (2, Bs, 3, H, W) global crops
        locals      (V, Bs, 3, s, s) local crops
        mask        (2, Bs, N) True: this patch is replaced by the mask token
        mask_index  (M,) positions of these patches in mask.flatten()
        keep        stochastic depth as in `encode`: keep["ssl"] for global, keep["local"] for local
                    crops
        -> class-token logits (2+V, Bs, K), global crops first
           logits of masked patches (M, K)
           class tokens of the global crops, before the head (2, Bs, D)
        """
        trunk, V = self.model.trunk, len(locals)
        # (2, Bs) -> 2 Bs: the first crop of every image, then the second crop of every image
        cls, patches = trunk(crops.flatten(0, 1), mask.flatten(0, 1), keep["ssl"])
        masked = patches.flatten(0, 1).index_select(0, mask_index)       # (M, D)
        class_tokens = cls.unflatten(0, (2, -1))                         # (2, Bs, D)
        if V:
            # local crops are smaller, so they need a forward pass of their own; they have no mask
            local_cls, _ = trunk(locals.flatten(0, 1), keep=keep["local"])
            cls = torch.cat([cls, local_cls])                            # ((2+V) Bs, D)
        # one call of the head for all tokens, because normalising K prototypes takes time
        tokens = torch.cat([cls, masked])
        logits = self.dino_head(head_input(trunk, self.model.config, tokens))
        cls_logits, patch_logits = logits.split([len(cls), len(masked)])
        return cls_logits.unflatten(0, (2 + V, -1)), patch_logits, class_tokens


class Teacher(nn.Module):
    """Exponential moving average (EMA) of the student: trunk, CLIP projection, DINO head.   DINO

    All of it starts as a copy of the student, as in DINOv2. (In the released code the teacher's
    head and projection start from random weights of their own.)
    """
    def __init__(self, student):
        super().__init__()
        model = student.model
        self.trunk = copy.deepcopy(model.trunk)
        self.dino_head = copy.deepcopy(student.dino_head)
        # No loss uses the teacher's projection; it is here because the released teacher has it.
        self.proj = copy.deepcopy(model.visual_proj) if model.config.train_clip else None
        self.config = model.config
        self.requires_grad_(False)               # it changes by the moving average only
        self.eval()

    @torch.no_grad()
    def forward(self, crops, mask_index):
        """Global crops (2, Bs, 3, H, W), without a mask -> class-token logits (2, Bs, K), logits
        (M, K) of the patches at mask_index (M,), which are masked for the student"""
        cls, patches = self.trunk(crops.flatten(0, 1))
        masked = patches.flatten(0, 1)[mask_index]                       # (M, D)
        tokens = torch.cat([cls, masked])
        logits = self.dino_head(head_input(self.trunk, self.config, tokens))
        cls_logits, patch_logits = logits.split([len(cls), len(masked)])
        return cls_logits.unflatten(0, (2, -1)), patch_logits

    def update(self, student, momentum):
        """teacher <- momentum * teacher + (1 - momentum) * student"""
        model = student.model
        update_ema(self.trunk.parameters(), model.trunk.parameters(), momentum)
        update_ema(self.dino_head.parameters(), student.dino_head.parameters(), momentum)
        if self.proj is not None:
            update_ema(self.proj.parameters(), model.visual_proj.parameters(), momentum)
