"""VTPConfig, the fields of the official config.json; and the files of a model on disk.

    atomic_write                       write a file so that a crash never leaves half of it
    read_config, load_weights          read config.json and model.safetensors
    write_model                        write both files
"""
import json
import os
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

import safetensors.torch

from .dist import barrier, rank
from .text import POOL_TYPES
from .vit import FFNS, NORMS

SIZES = {
    # ours, for a CPU: three trunks with the same small text tower
    "pico": dict(D=96, depth=4, heads=3, text=128, text_depth=2, text_heads=4),
    "nano": dict(D=192, depth=4, heads=3, text=128, text_depth=2, text_heads=4),
    "micro": dict(D=384, depth=4, heads=6, text=128, text_depth=2, text_heads=4),
    # ViT-S/B/L at their usual sizes; the paper's text tower of width 768 and depth 12 (Sec. 4.1).
    # The paper does not state its number of heads: 12 is OpenCLIP's.
    "S": dict(D=384, depth=12, heads=6, text=768, text_depth=12, text_heads=12),
    "B": dict(D=768, depth=12, heads=12, text=768, text_depth=12, text_heads=12),
    "L": dict(D=1024, depth=24, heads=16, text=768, text_depth=12, text_heads=12),
}
SMALL = "pico", "nano", "micro"            # sizes whose default flags are made for a CPU

# types of the fields of VTPConfig, as error messages name them
TYPE_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a string",
              int | None: "an integer or null", float | None: "a number or null"}


@dataclass
class VTPConfig:
    """The fields of the official config.json with its defaults; the last two fields are ours.

    Null in the file is None here. Raises ValueError, with the name of the field, for a value of a
    wrong type and for a model that cannot be built.
    """
    image_size: int = 256                    # for evaluation; the trunk accepts any size
    train_clip: bool = True                  # with a text tower and the projections to CLIP space
    train_reconstruction: bool = True        # with a pixel decoder
    # trunk
    vision_patch_size: int = 16
    vision_embed_dim: int = 768
    vision_depth: int = 12
    vision_num_heads: int = 12
    vision_mlp_ratio: float = 4.0
    vision_ffn_layer: str = "swiglu"         # a key of vit.FFNS
    vision_norm_layer: str = "rmsnorm"       # a key of vit.NORMS
    vision_init_values: float | None = None  # initial value of LayerScale; None or 0: no LayerScale
    vision_use_qk_norm: bool = False
    vision_feature_bottleneck: int | None = 64   # latent channels; None or embed_dim: no bottleneck
    vision_bottleneck_ae_only: bool = True   # False: CLIP and DINO heads read the bottleneck too
    vision_clip_feat: str = "cls"            # input of the CLIP projection; pooled: mean of patches
    # text tower
    text_context_length: int = 77
    text_vocab_size: int = 49408             # of CLIP's tokenizer
    text_embed_dim: int = 768                # also the dimension of the CLIP space
    text_num_heads: int = 12
    text_depth: int = 12
    text_mlp_ratio: float = 4.0
    text_ls_init_value: float | None = None  # as vision_init_values
    text_embed_cls: bool = False             # True is not supported, see check_text
    text_pad_id: int = 0                     # not used, as in the official model
    text_no_causal_mask: bool = False
    text_pool_type: str = "argmax"           # see text.pool
    text_proj_type: str = "linear"           # "none": no projection of the text features
    text_proj_bias: bool = False
    text_output_tokens: bool = False         # not used, as in the official model
    text_quick_gelu: bool = False
    # pixel decoder; the ratio of its feed-forward layers is always 4
    decoder_embed_dim: int = 768
    decoder_num_heads: int = 12
    decoder_depth: int = 12
    decoder_ffn_layer: str = "swiglu"
    decoder_norm_layer: str = "layernorm"
    decoder_init_values: float | None = None
    decoder_use_qk_norm: bool = False
    # contrastive logits: exp(logit_scale) * cosine + logit_bias
    init_logit_scale: float | None = None    # None: ln(1 / 0.07), as CLIP
    init_logit_bias: float | None = None     # None: no bias
    nonscalar_logit_scale: bool = False      # True: both have the shape (1,) in place of ()
    # ours
    decoder_upscale: int = 16                # pixels per latent on each side; official: always 16
    rope_dtype: str = "bfloat16"             # precision of RoPE; official: always bfloat16

    def __post_init__(self):
        for field in fields(self):
            self.check_type(field)
        self.check_transformer("vision")
        if self.train_reconstruction:
            self.check_transformer("decoder")
        if self.train_clip:
            self.check_transformer("text")
            self.check_text()
        self.check("vision_patch_size", self.vision_patch_size > 0, "an integer above 0")
        self.check("decoder_upscale", self.decoder_upscale > 0, "an integer above 0")
        d = self.vision_feature_bottleneck
        self.check("vision_feature_bottleneck", d is None or d > 0,
                   "an integer above 0, or null for no bottleneck")
        self.check("vision_mlp_ratio", self.vision_mlp_ratio > 0, "a number above 0")
        self.check("rope_dtype", self.rope_dtype in ("bfloat16", "float32"),
                   "bfloat16 (official models) or float32 (ours)")

    def check(self, field, valid, requirement):
        """Raise ValueError unless `valid`. field: its name; requirement: what the field must be"""
        if not valid:
            # as in the file: null and true, not None and True
            value = json.dumps(getattr(self, field), default=str)
            raise ValueError(f"config field {field} is {value}, but it must be {requirement}")

    def check_type(self, field):
        value = getattr(self, field.name)
        valid = isinstance(value, field.type)
        if isinstance(value, bool):
            valid = field.type is bool                        # in Python, True is also an int
        elif isinstance(value, int) and field.type in (float, float | None):
            valid = True                                      # a file may contain 4 in place of 4.0
        self.check(field.name, valid, TYPE_NAMES[field.type])

    def check_transformer(self, part):
        """part  'vision', 'decoder' or 'text'. Fields of absent parts are not checked."""
        for name in ("embed_dim", "num_heads", "depth"):
            value = getattr(self, f"{part}_{name}")
            self.check(f"{part}_{name}", value > 0, "an integer above 0")
        width = getattr(self, f"{part}_embed_dim")
        heads = getattr(self, f"{part}_num_heads")
        self.check(f"{part}_num_heads", width % heads == 0,
                   f"a divisor of {part}_embed_dim, which is {width}")
        if part == "text":
            return                                            # no RoPE, one norm, one feed-forward
        # axial RoPE rotates pairs of channels, half of the pairs by y and half by x
        self.check(f"{part}_num_heads", width // heads % 4 == 0,
                   f"such that each head has a multiple of 4 channels, as axial RoPE requires; "
                   f"{part}_embed_dim is {width}")
        for name, known in ((f"{part}_ffn_layer", FFNS), (f"{part}_norm_layer", NORMS)):
            self.check(name, getattr(self, name) in known, "one of " + ", ".join(known))

    def check_text(self):
        self.check("vision_clip_feat", self.vision_clip_feat in ("cls", "pooled"), "cls or pooled")
        self.check("text_context_length", self.text_context_length > 0, "an integer above 0")
        self.check("text_vocab_size", self.text_vocab_size > 0, "an integer above 0")
        self.check("text_mlp_ratio", self.text_mlp_ratio > 0, "a number above 0")
        self.check("text_pool_type", self.text_pool_type in POOL_TYPES,
                   "one of " + ", ".join(POOL_TYPES))
        self.check("text_embed_cls", not self.text_embed_cls,
                   "false: with true, the official text tower fails for every text")

    @classmethod
    def of_size(cls, size, image=256, patch=16, latent_dim=64, clip=True, rec=True,
                light_decoder=False, decoder=None):
        """The paper's models and ours: QKNorm (Sec. 4.1), decoder symmetric to the trunk (Sec. 4.2)

        size           a key of SIZES; ValueError for any other
        clip, rec      with the CLIP parts, with the pixel decoder
        decoder        size of the decoder, if it differs from that of the trunk
        light_decoder  the paper's decoder for fast experiments: 4 ViT-L layers (Sec. 4.1)
        """
        if size not in SIZES:
            raise ValueError(f"size {size!r} is unknown; choose one of {', '.join(SIZES)}")
        trunk = SIZES[size]
        decoder_size = SIZES[decoder or size]
        if light_decoder:
            decoder_size = dict(D=1024, depth=4, heads=16)
        return cls(image_size=image, train_clip=clip, train_reconstruction=rec,
                   vision_patch_size=patch, vision_embed_dim=trunk["D"],
                   vision_depth=trunk["depth"], vision_num_heads=trunk["heads"],
                   vision_use_qk_norm=True, vision_feature_bottleneck=latent_dim,
                   text_embed_dim=trunk["text"], text_depth=trunk["text_depth"],
                   text_num_heads=trunk["text_heads"], decoder_embed_dim=decoder_size["D"],
                   decoder_depth=decoder_size["depth"], decoder_num_heads=decoder_size["heads"],
                   decoder_use_qk_norm=True, decoder_upscale=patch, rope_dtype="float32")


# ---------------------------------------------------------------- files
def atomic_write(path, write, keep=None):
    """Write a file so that `path` is always complete: the old file or the new one.

    path   pathlib.Path
    write  function of a temporary path; writes the new file there
    keep   path to which the old file is renamed, or None to replace it
    Raises ValueError if the file cannot be written, for example because the disk is full.
    """
    from .extras.files import flush_to_disk
    temporary = path.with_name(path.name + ".part")
    try:
        write(temporary)
        # Flush to disk before the rename. Otherwise, after a power failure, the new name could
        # belong to a file whose data was never written.
        flush_to_disk(temporary)
    except Exception as error:         # torch and safetensors have their own errors for a full disk
        with suppress(OSError):                               # a read-only file system
            temporary.unlink()
        raise ValueError(f"{path} could not be written ({error}); the old file is unchanged. If "
                         f"the disk is full, free some space: the same command then goes on; a "
                         f"training continues from its last checkpoint") from error
    if keep and path.exists():
        os.replace(path, keep)
    os.replace(temporary, path)                               # atomic on the same file system


def write_model(folder, config, tensors):
    """config (dict) -> config.json, tensors {name: tensor} -> model.safetensors, in `folder`;
    README.md is a model card, unless the user has put a file of this name there"""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2) + "\n"
    tensors = {name: x.contiguous() for name, x in tensors.items()}   # safetensors requires it
    atomic_write(folder / "config.json", lambda path: path.write_text(text))
    # the metadata is that of files that transformers writes
    atomic_write(folder / "model.safetensors",
                 lambda path: safetensors.torch.save_file(tensors, path, {"format": "pt"}))
    from .extras import model_card
    model_card.write(folder)


def read_json(path):
    """Path of a config.json -> dict. Raises ValueError if the file is not a JSON object."""
    from .extras import files
    return files.read_json(path, "wanted the config.json of a VTP model; copy or download it "
                                 "again, or repeat the command that trained the model")


def read_config(path):
    """Path of a config.json -> {field of VTPConfig: value}, for the fields that the file has.

    Absent fields keep their defaults; fields that Hugging Face adds are ignored. Raises ValueError
    if the file belongs to another type of model.
    """
    found = read_json(path)
    model_type = found.get("model_type", "vtp")
    if model_type != "vtp":
        raise ValueError(f"{path} has model_type {model_type!r}; wanted the config.json of a VTP "
                         f"model: model_type 'vtp' (or the baselines: 'ldm', 'vavae')")
    known = {field.name for field in fields(VTPConfig)}
    return {name: value for name, value in found.items() if name in known}


def load_weights(model, path):
    """Load model.safetensors (a pathlib.Path) into the model.

    Every tensor of the file must have its parameter, and every parameter its tensor, because a
    missing one would stay at its random initialisation. (transformers 4.45 loses LayerScale's
    `gamma` without a message.) Raises FileNotFoundError, or ValueError if the file is damaged or
    belongs to another config.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; wanted the weights beside config.json")
    from .extras.files import reading
    with reading(path, "wanted the weights beside config.json; copy or download it again, or "
                       "repeat the command that trained the model"):
        tensors = safetensors.torch.load_file(path)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        differences = " ".join(str(error).split())            # PyTorch's message has many lines
        raise ValueError(f"{path} does not match the config.json beside it; take both files from "
                         f"the same model. {differences[:1000]}") from None


def from_hub(name):
    """Hub id 'owner/name' -> local folder with the two files, downloaded on the first use.

    Needs the optional package huggingface_hub. Raises FileNotFoundError if it is not installed, or
    if `name` is an existing path or not a Hub id.
    """
    message = (f"{name} holds no config.json; wanted a folder with config.json and "
               f"model.safetensors (a run of train.py, or released weights)")
    if str(name).count("/") != 1 or Path(name).exists():
        raise FileNotFoundError(message)
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(f"{message}. If it is a Hub id: pip install "
                                f"huggingface_hub") from None
    files = ["config.json", "model.safetensors"]
    if rank() == 0:
        snapshot_download(name, allow_patterns=files)
    barrier()                                                 # the other ranks then use the cache
    return snapshot_download(name, allow_patterns=files)
