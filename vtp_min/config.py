"""VTPConfig: the fields of the official config.json. And the files of a model on disk.

    atomic_write                       a file is either the old one or the new one, never half
    read_config, load_weights          config.json, model.safetensors -> fields, weights
    write_model                        the same two files, written
"""
import json
import os
from dataclasses import dataclass, fields
from pathlib import Path

import safetensors.torch

from .dist import barrier, rank
from .text import POOLS
from .vit import FFNS, NORMS

SIZES = {
    # ours, for a CPU: three trunks with one small text tower
    "pico": dict(D=96, depth=4, heads=3, text=128, text_depth=2, text_heads=4),
    "nano": dict(D=192, depth=4, heads=3, text=128, text_depth=2, text_heads=4),
    "micro": dict(D=384, depth=4, heads=6, text=128, text_depth=2, text_heads=4),
    # ViT-S/B/L at their usual widths; the paper's text tower of width 768, with OpenCLIP's 12 heads
    "S": dict(D=384, depth=12, heads=6, text=768, text_depth=12, text_heads=12),
    "B": dict(D=768, depth=12, heads=12, text=768, text_depth=12, text_heads=12),
    "L": dict(D=1024, depth=24, heads=16, text=768, text_depth=12, text_heads=12),
}
SMALL = "pico", "nano", "micro"            # sizes whose defaults are made for a CPU

TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "a string",
         int | None: "a whole number or null", float | None: "a number or null"}


@dataclass
class VTPConfig:
    """The fields of the official config.json, with its defaults; the last two are ours.

    image_size, text_pad_id and text_output_tokens change nothing (as in the official model). An
    init value of null or 0 means no LayerScale. A feature_bottleneck of null, or as wide as the
    trunk, means no bottleneck. ValueError, with the name of the field, for what cannot be built.
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
    decoder_upscale: int = 16                # ours: pixels per latent on each side; official: 16
    rope_dtype: str = "bfloat16"             # ours: precision of RoPE; official: bfloat16

    def __post_init__(self):
        for field in fields(self):
            self.check_type(field)
        self.check_part("vision")
        if self.train_reconstruction:
            self.check_part("decoder")
        if self.train_clip:
            self.check_part("text")
        self.check("vision_patch_size", self.vision_patch_size > 0, "a whole number above 0")
        self.check("decoder_upscale", self.decoder_upscale > 0, "a whole number above 0")
        d = self.vision_feature_bottleneck
        self.check("vision_feature_bottleneck", d is None or d > 0,
                   "a whole number above 0, or null for none")
        self.check("vision_mlp_ratio", self.vision_mlp_ratio > 0, "a number above 0")
        self.check("rope_dtype", self.rope_dtype in ("bfloat16", "float32"),
                   "bfloat16 (the official models) or float32 (ours)")

    def check(self, field, valid, wanted):
        if not valid:
            value = json.dumps(getattr(self, field), default=str)
            raise ValueError(f"config field {field} is {value}, wanted {wanted}")

    def check_type(self, field):
        value = getattr(self, field.name)
        valid = isinstance(value, field.type)
        if isinstance(value, bool):
            valid = field.type is bool                        # in Python, True is an int too
        elif isinstance(value, int) and field.type in (float, float | None):
            valid = True
        self.check(field.name, valid, TYPES[field.type])

    def check_part(self, part):
        """part  'vision', 'decoder' or 'text'. The fields of absent parts are not read."""
        for name in ("embed_dim", "num_heads", "depth"):
            value = getattr(self, f"{part}_{name}")
            self.check(f"{part}_{name}", value > 0, "a whole number above 0")
        width, heads = getattr(self, f"{part}_embed_dim"), getattr(self, f"{part}_num_heads")
        self.check(f"{part}_num_heads", width % heads == 0,
                   f"a divisor of {part}_embed_dim, which is {width}")
        if part == "text":
            self.check_text()
            return
        self.check(f"{part}_num_heads", width // heads % 4 == 0,
                   f"heads of 4, 8, 12, ... channels: axial RoPE; {part}_embed_dim is {width}")
        for name, known in ((f"{part}_ffn_layer", FFNS), (f"{part}_norm_layer", NORMS)):
            self.check(name, getattr(self, name) in known, "one of " + ", ".join(known))

    def check_text(self):
        self.check("vision_clip_feat", self.vision_clip_feat in ("cls", "pooled"), "cls or pooled")
        self.check("text_context_length", self.text_context_length > 0, "a whole number above 0")
        self.check("text_vocab_size", self.text_vocab_size > 0, "a whole number above 0")
        self.check("text_mlp_ratio", self.text_mlp_ratio > 0, "a number above 0")
        self.check("text_pool_type", self.text_pool_type in POOLS, "one of " + ", ".join(POOLS))
        self.check("text_embed_cls", not self.text_embed_cls,
                   "false: with true the official text tower crashes on every text")

    @classmethod
    def of_size(cls, size, image=256, patch=16, latent_dim=64, clip=True, rec=True,
                light_decoder=False, decoder=None):
        """The paper's models, and nano: QKNorm on (Sec. 4.1), the decoder symmetric to the trunk

        decoder        another size for the decoder
        light_decoder  the paper's decoder for fast experiments: 4 ViT-L layers (Sec. 4.1)
        """
        if size not in SIZES:
            raise ValueError(f"size {size!r} is unknown; choose one of {', '.join(SIZES)}")
        s, dec = SIZES[size], SIZES[decoder or size]
        if light_decoder:
            dec = dict(D=1024, depth=4, heads=16)
        return cls(image_size=image, train_clip=clip, train_reconstruction=rec,
                   vision_patch_size=patch, vision_embed_dim=s["D"], vision_depth=s["depth"],
                   vision_num_heads=s["heads"], vision_use_qk_norm=True,
                   vision_feature_bottleneck=latent_dim, text_embed_dim=s["text"],
                   text_depth=s["text_depth"], text_num_heads=s["text_heads"],
                   decoder_embed_dim=dec["D"], decoder_depth=dec["depth"],
                   decoder_num_heads=dec["heads"], decoder_use_qk_norm=True,
                   decoder_upscale=patch, rope_dtype="float32")


# ---------------------------------------------------------------- files
def atomic_write(path, write, keep=None):
    """Call write(temporary path), flush it to disk, rename it to `path`

    keep  a new name for the old file, or None
    Raises ValueError if the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        write(temporary)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
    except Exception as problem:       # torch and safetensors have their own errors for a full disk
        temporary.unlink(missing_ok=True)
        raise ValueError(f"{path} could not be written ({problem}); the old file is unchanged. If "
                         f"the disk is full, free some space: the same command continues from the "
                         f"last checkpoint") from problem
    if keep and path.exists():
        os.replace(path, keep)
    os.replace(temporary, path)


def write_model(folder, config, tensors):
    """config (a dict), tensors {name: tensor} -> config.json and model.safetensors in `folder`"""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2) + "\n"
    tensors = {name: x.contiguous() for name, x in tensors.items()}
    atomic_write(folder / "config.json", lambda path: path.write_text(text))
    atomic_write(folder / "model.safetensors",
                 lambda path: safetensors.torch.save_file(tensors, path, {"format": "pt"}))


def read_json(path):
    """path of a config.json -> its dict. ValueError if it is no JSON object"""
    try:
        found = json.loads(Path(path).read_text())
    except ValueError as problem:
        raise ValueError(f"{path} is no JSON ({problem}); wanted the config.json of a VTP "
                         f"model") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, wanted the config.json of a VTP "
                         f"model: model_type 'vtp'")
    return found


def read_config(path):
    """-> the fields of VTPConfig that the file has; absent ones keep their defaults. Fields that
    Hugging Face adds are ignored."""
    found = read_json(path)
    kind = found.get("model_type", "vtp")
    if kind != "vtp":
        raise ValueError(f"{path} holds model_type {kind!r}, wanted the config.json of a VTP "
                         f"model: model_type 'vtp' (or ldm, vavae: the baselines)")
    known = {field.name for field in fields(VTPConfig)}
    return {name: value for name, value in found.items() if name in known}


def load_weights(model, path):
    """Strict: every tensor of the file must have its parameter, and every parameter its tensor.

    (transformers 4.45 loses LayerScale's `gamma` without a message.)
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; wanted the weights beside config.json")
    try:
        model.load_state_dict(safetensors.torch.load_file(path))
    except safetensors.SafetensorError as problem:
        raise ValueError(f"{path} is damaged ({problem}); copy or download it again") from None
    except RuntimeError as problem:
        found = " ".join(str(problem).split())
        raise ValueError(f"{path} does not fit the config.json beside it; take both files from one "
                         f"model. {found[:1000]}") from None


def from_hub(name):
    """A Hub id 'owner/name' -> its local folder. The optional huggingface_hub downloads it once."""
    wanted = (f"{name} holds no config.json; wanted a folder with config.json and "
              f"model.safetensors (a run of train.py, or released weights)")
    if str(name).count("/") != 1 or Path(name).exists():
        raise FileNotFoundError(wanted)
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(f"{wanted}. If it is a Hub id: pip install "
                                f"huggingface_hub") from None
    files = ["config.json", "model.safetensors"]
    if rank() == 0:
        snapshot_download(name, allow_patterns=files)
    barrier()                                                 # the other ranks find it in the cache
    return snapshot_download(name, allow_patterns=files)
