"""VTP: one vision transformer that understands, remembers and paints.   VTP Sec. 3, Fig. 3

                    .-- visual_proj ----------> img (B, E)  <- clip ->  txt (B, E) -- text tower -- captions
    pixels -- trunk +-- DINO head ------------> logits (., K)  <- dino, ibot ->  the same from the EMA teacher
                    '-- bottleneck z (B, d, h, w) -- pixel decoder --> pixels

VTPConfig, VTPModel   what is published, saved and loaded: the released checkpoints' fields, keys and methods
Student, Teacher      what training adds: a forward pass for whichever objectives; a slow copy that sets the targets

B images    Bs images of the self-supervised subset    V local crops    N = h*w patches    D width    d latent channels
E CLIP space    K prototypes    T text tokens    M masked patches
"""
import copy
import json
import math
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from .decoder import PixelDecoder
from .dist import rank, wait
from .losses import to_fp32
from .run import write_aside
from .text import POOLS, TextTransformer, pool
from .vit import FFNS, NORMS, VisionTransformer, init_linear

SIZES = {   # ViT-S/B/L (paper) at their usual widths; the paper's text tower, with OpenCLIP's 12 heads
    "pico": dict(D=96, depth=4, heads=3, text=128, text_depth=2, text_heads=4),       # pico, nano, micro are ours, for a CPU: one text tower, three trunks
    "nano": dict(D=192, depth=4, heads=3, text=128, text_depth=2, text_heads=4),
    "micro": dict(D=384, depth=4, heads=6, text=128, text_depth=2, text_heads=4),
    "S":    dict(D=384, depth=12, heads=6, text=768, text_depth=12, text_heads=12),
    "B":    dict(D=768, depth=12, heads=12, text=768, text_depth=12, text_heads=12),
    "L":    dict(D=1024, depth=24, heads=16, text=768, text_depth=12, text_heads=12),
}


SMALL = "pico", "nano", "micro"            # whose settings are made for a CPU


KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a name",
         int | None: "a whole number or null", float | None: "a number or null"}


@dataclass
class VTPConfig:
    """The fields of the official config.json, with its defaults; the last two are ours. What cannot be built is refused by name.

    image_size, text_pad_id and text_output_tokens change nothing (as in the official model). An init value of null or 0 means no
    LayerScale. A feature_bottleneck of null, or as wide as the trunk, is none.
    """
    image_size: int = 256
    train_clip: bool = True
    train_reconstruction: bool = True
    vision_patch_size: int = 16
    vision_embed_dim: int = 768
    vision_depth: int = 12
    vision_num_heads: int = 12
    vision_mlp_ratio: float = 4.0
    vision_ffn_layer: str = "swiglu"
    vision_norm_layer: str = "rmsnorm"
    vision_init_values: float | None = None
    vision_use_qk_norm: bool = False
    vision_feature_bottleneck: int | None = 64
    vision_bottleneck_ae_only: bool = True
    vision_clip_feat: str = "cls"
    text_context_length: int = 77
    text_vocab_size: int = 49408
    text_embed_dim: int = 768
    text_num_heads: int = 12
    text_depth: int = 12
    text_mlp_ratio: float = 4.0
    text_ls_init_value: float | None = None
    text_embed_cls: bool = False
    text_pad_id: int = 0
    text_no_causal_mask: bool = False
    text_pool_type: str = "argmax"
    text_proj_type: str = "linear"
    text_proj_bias: bool = False
    text_output_tokens: bool = False
    text_quick_gelu: bool = False
    decoder_embed_dim: int = 768
    decoder_num_heads: int = 12
    decoder_depth: int = 12
    decoder_ffn_layer: str = "swiglu"
    decoder_norm_layer: str = "layernorm"
    decoder_init_values: float | None = None
    decoder_use_qk_norm: bool = False
    init_logit_scale: float | None = None
    init_logit_bias: float | None = None
    nonscalar_logit_scale: bool = False
    decoder_upscale: int = 16                # ours: pixels a latent becomes on each side; the official decoder always has 16
    rope_dtype: str = "bfloat16"             # ours: the official models were trained with bfloat16 RoPE

    def __post_init__(self):
        def want(field, fine, wanted):
            if not fine:
                raise ValueError(f"config field {field} is {json.dumps(getattr(self, field), default=str)}, wanted {wanted}")

        for f in fields(self):
            value = getattr(self, f.name)
            fits = isinstance(value, f.type) or type(value) is int and isinstance(0.0, f.type)
            want(f.name, fits and (type(value) is bool) == (f.type is bool), KINDS[f.type])                # Python takes true for 1
        parts = ["vision"] + ["text"] * self.train_clip + ["decoder"] * self.train_reconstruction        # fields of absent parts are not read
        for field in [f"{part}_{what}" for part in parts for what in ("embed_dim", "num_heads", "depth")] + ["vision_patch_size", "decoder_upscale"]:
            want(field, getattr(self, field) > 0, "a whole number above 0")
        for part in parts:
            width, heads = getattr(self, f"{part}_embed_dim"), getattr(self, f"{part}_num_heads")
            want(f"{part}_num_heads", width % heads == 0, f"a divisor of {part}_embed_dim, which is {width}")
            if part != "text":
                want(f"{part}_num_heads", width // heads % 4 == 0, f"heads of 4, 8, 12, ... channels: axial RoPE; {part}_embed_dim is {width}")
                want(f"{part}_ffn_layer", getattr(self, f"{part}_ffn_layer") in FFNS, "one of " + ", ".join(FFNS))
                want(f"{part}_norm_layer", getattr(self, f"{part}_norm_layer") in NORMS, "one of " + ", ".join(NORMS))
        d = self.vision_feature_bottleneck
        want("vision_feature_bottleneck", d is None or d > 0, "a whole number above 0, or null for none")
        want("vision_mlp_ratio", self.vision_mlp_ratio > 0, "a number above 0")
        want("rope_dtype", self.rope_dtype in ("bfloat16", "float32"), "bfloat16 (the official models) or float32 (ours)")
        if self.train_clip:
            want("vision_clip_feat", self.vision_clip_feat in ("cls", "pooled"), "cls or pooled")
            want("text_context_length", self.text_context_length > 0, "a whole number above 0")
            want("text_vocab_size", self.text_vocab_size > 0, "a whole number above 0")
            want("text_mlp_ratio", self.text_mlp_ratio > 0, "a number above 0")
            want("text_pool_type", self.text_pool_type in POOLS, "one of " + ", ".join(POOLS))
            want("text_embed_cls", not self.text_embed_cls, "false: with true the official text tower crashes on every text")

    @classmethod
    def of_size(cls, size, image=256, patch=16, latent_dim=64, clip=True, rec=True, light_decoder=False, decoder=None):
        """The paper's models, and nano: QKNorm on (Sec. 4.1), decoder symmetric, of another size, or the paper's light one: 4 ViT-L layers."""
        if size not in SIZES:
            raise ValueError(f"size {size!r} is unknown; choose one of {', '.join(SIZES)}")
        s = SIZES[size]
        decoder = dict(D=1024, depth=4, heads=16) if light_decoder else SIZES[decoder or size]
        return cls(image_size=image, train_clip=clip, train_reconstruction=rec, vision_patch_size=patch, vision_embed_dim=s["D"],
                   vision_depth=s["depth"], vision_num_heads=s["heads"], vision_use_qk_norm=True, vision_feature_bottleneck=latent_dim,
                   text_embed_dim=s["text"], text_depth=s["text_depth"], text_num_heads=s["text_heads"],
                   decoder_embed_dim=decoder["D"], decoder_depth=decoder["depth"], decoder_num_heads=decoder["heads"],
                   decoder_use_qk_norm=True, decoder_upscale=patch, rope_dtype="float32")


class VTPModel(nn.Module):
    """config -> the tokenizer. Images are (B, 3, H, W), ImageNet-normalised, sides multiples of the patch."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        rope = getattr(torch, c.rope_dtype)
        D, W = c.vision_embed_dim, c.text_embed_dim
        d = D if c.vision_feature_bottleneck is None else c.vision_feature_bottleneck
        self.trunk = VisionTransformer(D, c.vision_depth, c.vision_num_heads, c.vision_patch_size, c.vision_mlp_ratio, c.vision_ffn_layer,
                                       c.vision_norm_layer, c.vision_use_qk_norm, c.vision_init_values, d, rope)
        self.feature_dim = D if c.vision_bottleneck_ae_only else d           # what the CLIP and DINO heads read
        if c.train_reconstruction:
            self.pixel_decoder = PixelDecoder(d, c.decoder_embed_dim, c.decoder_depth, c.decoder_num_heads, c.decoder_ffn_layer,
                                              c.decoder_norm_layer, c.decoder_use_qk_norm, c.decoder_init_values, c.decoder_upscale, rope)
        if c.train_clip:
            self.visual_proj = nn.Linear(self.feature_dim, W, bias=False)    # torch's default init, as the released training code
            self.token_embedding = nn.Embedding(c.text_vocab_size, W)
            self.positional_embedding = nn.Parameter(torch.empty(c.text_context_length, W).normal_(std=0.01))
            self.text_transformer = TextTransformer(W, c.text_depth, c.text_num_heads, c.text_mlp_ratio, not c.text_no_causal_mask,
                                                    c.text_quick_gelu, c.text_ls_init_value)
            self.ln_final = nn.LayerNorm(W)
            if c.text_proj_type != "none":                                   # any other name is "linear" (released code)
                self.text_projection = nn.Linear(W, W) if c.text_proj_bias else nn.Parameter(torch.empty(W, W))
                nn.init.normal_(self.text_projection.weight if c.text_proj_bias else self.text_projection, std=W ** -0.5)
            nn.init.normal_(self.token_embedding.weight, std=0.02)
            shape = [1] if c.nonscalar_logit_scale else []
            scale = math.log(1 / 0.07) if c.init_logit_scale is None else c.init_logit_scale      # CLIP: 14.3; the official code takes 0.0 for null
            self.logit_scale = nn.Parameter(torch.full(shape, scale))
            self.logit_bias = None if c.init_logit_bias is None else nn.Parameter(torch.full(shape, float(c.init_logit_bias)))

    def want(self, field, part):
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
        """The outputs of forward_type "clip". If image or text is None, its features are not in the dict."""
        self.want("train_clip", "CLIP side")
        out = {}
        if image is not None:
            out["image_features"] = self.get_clip_image_feature(image, normalize=True)
        if text is not None:
            out["text_features"] = self.get_clip_text_feature(text, normalize=True)
        out["logit_scale"] = self.logit_scale.exp()
        if self.logit_bias is not None:
            out["logit_bias"] = self.logit_bias
        return out

    # ------------------------------------------------------------ as an auto-encoder
    def get_reconstruction_latents(self, image):
        """image (B, 3, H, W) -> latents (B, d, h, w): all that the decoder and the DiT see"""
        h, w = (side // self.config.vision_patch_size for side in image.shape[-2:])
        return self.latents(self.trunk(image)[1], h, w)

    def latents(self, patches, h, w):
        """(B, N, D) -> (B, d, h, w)"""
        return self.trunk.feature_bottleneck(patches).transpose(1, 2).unflatten(2, (h, w))

    def get_latents_decoded_images(self, latents):
        """latents (B, d, h, w) -> images (B, 3, h*u, w*u), ImageNet-normalised, not clamped"""
        self.want("train_reconstruction", "pixel decoder")
        return self.pixel_decoder(latents)

    # ------------------------------------------------------------ as CLIP
    def project(self, cls, patches):
        """What CLIP reads of an image: the class token, or the mean patch -> (B, E), not normalised"""
        self.want("train_clip", "CLIP side")
        x = cls if self.config.vision_clip_feat == "cls" else patches.mean(1)
        return self.visual_proj(x if self.config.vision_bottleneck_ae_only else self.trunk.feature_bottleneck(x))

    def get_clip_image_feature(self, image, normalize=True):
        """image (B, 3, H, W) -> (B, E), of length 1 unless normalize is False"""
        x = self.project(*self.trunk(image))
        return F.normalize(x, dim=-1) if normalize else x

    def get_clip_text_feature(self, text, normalize=True):
        """text (B, T) token ids -> (B, E), or (B, T, E) with pool type "none"

        T is at most the context length (the official model crashes unless it is equal). Features
        have length 1 unless normalize is False.
        """
        self.want("train_clip", "text tower")
        if text.shape[1] > len(self.positional_embedding):
            raise ValueError(f"texts are {text.shape[1]} tokens long, wanted at most {len(self.positional_embedding)}; "
                             f"get_tokenizer(context_length={len(self.positional_embedding)}) cuts them")
        x = self.token_embedding(text) + self.positional_embedding[:text.shape[1]]       # (B, T, W)
        x = self.ln_final(self.text_transformer(x))
        x = pool(x, text, self.config.text_pool_type)                                    # (B, W)
        if self.config.text_proj_type != "none":
            x = self.text_projection(x) if self.config.text_proj_bias else x @ self.text_projection
        return F.normalize(x, dim=-1) if normalize else x

    def get_clip_logits(self, image, text):
        """image (B, 3, H, W), text (n, T) -> logits per image (B, n) and per text (n, B)"""
        image_features = self.get_clip_image_feature(image, normalize=True)
        text_features = self.get_clip_text_feature(text, normalize=True)
        logits = self.logit_scale.exp() * image_features @ text_features.T
        logits = logits if self.logit_bias is None else logits + self.logit_bias
        return logits, logits.T

    # ------------------------------------------------------------ as a feature extractor
    def get_last_layer_feature(self, image, use_bottleneck=False):
        """-> {'cls_token': (B, D), 'patch_tokens': (B, N, D)}; width d after the bottleneck"""
        cls, patches = self.trunk(image)
        squeeze = self.trunk.feature_bottleneck if use_bottleneck else nn.Identity()
        return {"cls_token": squeeze(cls), "patch_tokens": squeeze(patches)}

    def get_intermediate_layers_feature(self, image, n=1, reshape=False, return_class_token=False,
                                        norm=True):
        """n  how many of the last blocks, or a list of block numbers -> one (patches, cls) pair a block, or patches alone, in the blocks' order

        patches (B, N, D), or (B, D, h, w) with reshape; norm applies the final norm to every block's output
        """
        depth = len(self.trunk.blocks)
        wanted = range(depth - n, depth) if isinstance(n, int) else n
        if not wanted or not set(wanted) <= set(range(depth)):
            raise ValueError(f"n is {n}, but the trunk has {depth} blocks; wanted 1 to {depth} of the last ones, or a list of numbers from 0 to {depth - 1}")
        h, w = (side // self.config.vision_patch_size for side in image.shape[-2:])
        out = []
        for i, x in enumerate(self.trunk.layers(image)):
            if i not in wanted:
                continue
            x = self.trunk.norm(x) if norm else x
            patches = x[:, 1:].transpose(1, 2).unflatten(2, (h, w)) if reshape else x[:, 1:]
            out.append((patches, x[:, 0]) if return_class_token else patches)
        return tuple(out)

    # ------------------------------------------------------------ to disk and back
    def save_pretrained(self, folder):
        """config.json + model.safetensors, in the official layout. Each file is written aside and renamed."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        dtype = str(self.trunk.cls_token.dtype).removeprefix("torch.")
        text = json.dumps({"model_type": "vtp", "architectures": ["VTPModel"], "dtype": dtype, **asdict(self.config)}, indent=2)
        tensors = {k: v.bfloat16() if k.endswith("periods") else v.contiguous() for k, v in self.state_dict().items()}
        write_aside(folder / "config.json", lambda path: path.write_text(text + "\n"))
        write_aside(folder / "model.safetensors", lambda path: safetensors.torch.save_file(tensors, path, {"format": "pt"}))

    @classmethod
    def from_pretrained(cls, folder, rope_dtype=None):
        """A folder with config.json + model.safetensors (ours or official), or a Hub id when huggingface_hub is installed.

        rope_dtype  None takes the file's own ("float32" in ours), else bfloat16, as the official models were trained
        """
        if not Path(folder, "config.json").exists():
            folder = from_hub(folder)
        found = read_config(Path(folder, "config.json"))
        if rope_dtype is not None:
            found["rope_dtype"] = str(rope_dtype).removeprefix("torch.")
        model = cls(VTPConfig(**found))
        load_weights(model, Path(folder, "model.safetensors"))
        return model.eval()


def read_config(path):
    """-> the fields we know; those that Hugging Face adds are passed over, those that are absent keep their defaults"""
    try:
        found = json.loads(path.read_text())
    except ValueError as problem:
        raise ValueError(f"{path} is no JSON ({problem}); wanted the config.json of a VTP model") from None
    if not isinstance(found, dict) or found.get("model_type", "vtp") != "vtp":
        kind = f"model_type {found.get('model_type')!r}" if isinstance(found, dict) else f"a {type(found).__name__}"
        raise ValueError(f"{path} holds {kind}, wanted the config.json of a VTP model: model_type 'vtp'")
    return {k: v for k, v in found.items() if k in {f.name for f in fields(VTPConfig)}}


def load_weights(model, path):
    """Strict: every tensor of the file finds its place and none stays unfilled. (transformers 4.45 loses LayerScale's `gamma` unsaid.)"""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; wanted the weights beside config.json")
    try:
        tensors = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as problem:
        raise ValueError(f"{path} is damaged ({problem}); copy or download it again") from None
    there, wanted = ({k: list(v.shape) for k, v in state.items()} for state in (tensors, model.state_dict()))
    wrong = {"missing": [k for k in wanted if k not in there], "not of this model": [k for k in there if k not in wanted],
             "of another shape": [f"{k} {there[k]}, wanted {shape}" for k, shape in wanted.items() if there.get(k, shape) != shape]}
    if any(wrong.values()):
        faults = "; ".join(f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' * (len(keys) > 3)})" for what, keys in wrong.items() if keys)
        raise ValueError(f"{path} does not fit the config.json beside it. Tensors {faults}. Take both files from one model.")
    model.load_state_dict(tensors)


def from_hub(name):
    wanted = f"{name} holds no config.json; wanted a folder with config.json and model.safetensors (a run of train.py, or released weights)"
    if str(name).count("/") != 1 or Path(name).exists():
        raise FileNotFoundError(wanted)
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(f"{wanted}. If it is a Hub id: pip install huggingface_hub") from None
    fetch = partial(snapshot_download, name, allow_patterns=["config.json", "model.safetensors"])
    if rank() == 0:
        fetch()
    wait()                                                                # the others find it in the cache
    return fetch()


# ---------------------------------------------------------------- what training adds
class DINOHead(nn.Module):
    """Token -> K prototypes: an MLP onto a small unit sphere, then cosine similarities with learned directions.   DINO

    One head serves class tokens (DINO) and patches (iBOT), as in the released code. Defaults are DINOv2's.
    """
    def __init__(self, dim, K=65536, hidden=2048, bottleneck=256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck))
        self.mlp.apply(init_linear)
        directions = nn.Linear(bottleneck, K, bias=False).weight              # torch's default init, as in DINOv2
        self.last_layer = nn.Module()
        self.last_layer.weight_g = nn.Parameter(torch.ones(K, 1))             # lengths: start at 1, trainable (released code)
        self.last_layer.weight_v = nn.Parameter(directions.detach().clone())

    def point(self, x):
        """(n, D) -> points of the unit sphere (n, bottleneck)"""
        return F.normalize(self.mlp(x), dim=-1)

    def compare(self, point):
        """(n, bottleneck) -> logits (n, K)"""
        return F.linear(point, F.normalize(self.last_layer.weight_v, dim=-1) * self.last_layer.weight_g)

    def forward(self, x):
        """(n, D) -> logits (n, K)"""
        return self.compare(self.point(x))


class Student(nn.Module):
    """Everything that receives gradients: what DistributedDataParallel wraps. Its forward pass serves the objectives that the batch holds."""

    def __init__(self, model, head=None):
        super().__init__()
        self.model, self.dino_head = model, head

    def forward(self, batch, drop, heads=True):
        """batch: data.Steps' dict, images as normalised floats      drop: {'clip', 'rec', 'ssl', 'local': StochasticDepth or None}

        -> dict with, for the objectives that are on:
           img, txt (B, E) unit length, scale (), bias () or None      tokens (2, Bs, D) class tokens of the global crops, before the head
           cls (2+V, Bs, K) logits, patch (M, K) logits                pixels (Br, 3, H, W)
        heads  False: the first line alone, which is all that losses over the whole batch read
        """
        out = self.words_and_pixels(batch, drop, heads) if "image" in batch else {}
        return out | (self.views(batch, drop, heads) if "crops" in batch else {})       # the two share nothing but weights

    def words_and_pixels(self, batch, drop, heads):
        """One clean view serves both"""
        m, out = self.model, {}
        B, h, w = len(batch["image"]), *(side // m.config.vision_patch_size for side in batch["image"].shape[-2:])
        paints, alike, pooled = "rec" in batch and heads, drop["rec"] is drop["clip"], m.config.vision_clip_feat == "pooled"
        read = torch.zeros(B, h * w, dtype=torch.bool, device=batch["image"].device)
        if pooled:                                                               # CLIP reads all patches
            read[:] = True
        elif paints and alike:
            read[batch["rec"]] = True
        cls, patches = m.trunk(batch["image"], drop=drop["clip"], read=read)
        patches = patches.unflatten(0, (-1, h * w))                              # of the images that are read, in order
        if "text" in batch:
            out["img"] = F.normalize(to_fp32(m.project(cls, patches)), dim=-1)
            text = m.get_clip_text_feature(batch["text"], normalize=False)
            out["txt"] = F.normalize(to_fp32(text), dim=-1)     # in bfloat16: lengths of 0.999 to 1.0015
            out["scale"] = m.logit_scale.exp()
            out["bias"] = None if m.logit_bias is None else m.logit_bias.clone()  # a bare parameter would seem unused to DDP
        if paints:
            if not alike:                                                        # another rate of stochastic depth: a forward pass of its own
                patches = m.trunk(batch["image"][batch["rec"]], drop=drop["rec"])[1]
            elif pooled:
                patches = patches[batch["rec"]]
            out["pixels"] = m.pixel_decoder(m.latents(patches, h, w))            # batch["rec"] ascends, as what is read does
        return out

    def views(self, batch, drop, heads):
        """Global crops with patches hidden, and local crops"""
        m, mask, V = self.model, batch["mask"].flatten(0, 1), len(batch["locals"])
        cls, hidden = m.trunk(batch["crops"].flatten(0, 1), mask=mask, drop=drop["ssl"], read=mask)      # hidden (M, D): what it could not see
        out = {"tokens": cls.unflatten(0, (2, -1))}                              # (2, Bs, D)
        if heads:
            if V:
                small = batch["locals"].flatten(0, 1)
                none = mask.new_zeros(len(small), small.shape[-2] * small.shape[-1] // m.config.vision_patch_size ** 2)
                cls = torch.cat([cls, m.trunk(small, drop=drop["local"], read=none)[0]])
            squeeze = nn.Identity() if m.config.vision_bottleneck_ae_only else m.trunk.feature_bottleneck
            logits = self.dino_head(squeeze(torch.cat([cls, hidden])))           # at once: its K directions are normalised once
            cls, out["patch"] = logits.split([len(cls), len(hidden)])            # (M, K)
            out["cls"] = cls.unflatten(0, (2 + V, -1))                           # (2+V, Bs, K)
        return out


class Teacher(nn.Module):
    """A slow average of the student (trunk, CLIP projection, head), which sees the global crops, nothing hidden, and sets the targets.   DINO

    It starts as a copy. (In the released code its head and projection start with other random weights, and nothing there
    makes them equal: DINOv2 copies them, and so do we.)
    """
    def __init__(self, student):
        super().__init__()
        c = student.model.config
        self.trunk, self.dino_head = copy.deepcopy(student.model.trunk), copy.deepcopy(student.dino_head)
        self.proj = copy.deepcopy(student.model.visual_proj) if c.train_clip else None       # no loss reads it; the released code averages it too
        self.ae_only = c.vision_bottleneck_ae_only
        self.requires_grad_(False)
        self.eval()

    def train(self, mode=True):
        return super().train(False)

    @torch.no_grad()
    def points(self, crops, mask):
        """crops (2, Bs, 3, H, W), nothing hidden; mask (2, Bs, N) -> points of the head's sphere {'cls': class tokens (2, Bs, .), 'patch': hidden (M, .)}"""
        cls, hidden = self.trunk(crops.flatten(0, 1), read=mask.flatten(0, 1))
        squeeze = nn.Identity() if self.ae_only else self.trunk.feature_bottleneck
        return {"cls": self.dino_head.point(squeeze(cls)).unflatten(0, (2, -1)), "patch": self.dino_head.point(squeeze(hidden))}

    @torch.no_grad()
    def forward(self, crops, mask):
        """The same crops and mask -> logits {'cls': of class tokens (2, Bs, K), 'patch': of hidden patches (M, K)}"""
        p = self.points(crops, mask)
        logits = self.dino_head.compare(torch.cat([p["cls"].flatten(0, 1), p["patch"]]))
        cls, patch = logits.split([2 * p["cls"].shape[1], len(p["patch"])])
        return {"cls": cls.unflatten(0, (2, -1)), "patch": patch}

    @torch.no_grad()
    def follow(self, student, m):
        """teacher <- m teacher + (1 - m) student, parameter by parameter"""
        pairs = [(self.trunk, student.model.trunk), (self.dino_head, student.dino_head)]
        pairs += [(self.proj, student.model.visual_proj)] if self.proj else []
        for mine, theirs in pairs:
            for t, s in zip(mine.parameters(), theirs.parameters()):
                t.mul_(m).add_(s * (1 - m))                                       # not alpha=: it would round otherwise than the released code
