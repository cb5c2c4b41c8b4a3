"""The model: official layout and outputs, public methods, DINO head, teacher, student.

With the fixture `form`, a test runs on the textbook forms and on those of extras/fast.py.
"""
import hashlib
import inspect
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from vtp_min import SIZES, VTPConfig, VTPModel
from vtp_min.augment import mask_index_and_weight
from vtp_min.extras.baselines import LDM
from vtp_min.model import DINOHead, Student, Teacher, head_input, rec_patches

TINY = dict(image_size=32, vision_patch_size=8, vision_embed_dim=32, vision_depth=2,
            vision_num_heads=2, vision_use_qk_norm=True, vision_feature_bottleneck=6,
            text_context_length=10, text_vocab_size=64, text_embed_dim=24, text_num_heads=3,
            text_depth=1, decoder_embed_dim=32, decoder_num_heads=2, decoder_depth=1,
            decoder_upscale=8, rope_dtype="float32")


def tiny(**fields):
    torch.manual_seed(0)
    return VTPModel(VTPConfig(**TINY | fields)).eval()


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def skip_without(folder):
    if not folder.exists():
        pytest.skip(f"{folder.name} is one of the full golden sets only")


# ---------------------------------------------------------------- the official outputs
def outputs(model, io, exact):
    """Yields (stored name, our output). The decoder reads the stored latents, so that its own
    error is measured.

    io  the arrays of the official code      exact  float32 RoPE instead of bfloat16
    """
    yield from image_outputs(model, io, "image", "", exact)
    yield from image_outputs(model, io, "image_nonsquare", "@nonsquare", exact)
    img, mask = torch.from_numpy(io["image"]), torch.from_numpy(io["mask"])
    cls, patches = model.trunk(img, mask=mask)
    *_, prenorm = model.trunk.layers(img, mask=mask)
    yield "masked.x_norm_clstoken", cls
    yield "masked.x_norm_patchtokens", patches
    yield "masked.x_prenorm", prenorm
    latents = torch.from_numpy(io["latents_random_3x5"])
    yield "decoded_random_3x5", model.get_latents_decoded_images(latents)


def image_outputs(model, io, name, suffix, exact):
    """name  'image' or 'image_nonsquare'      suffix  '' or '@nonsquare', of the stored names"""
    img = torch.from_numpy(io[name])
    for key, use_bottleneck in (("last", False), ("last_bottleneck", True)):
        features = model.get_last_layer_feature(img, use_bottleneck=use_bottleneck)
        for token, x in features.items():
            yield f"{key}.{token}{suffix}", x
    pairs = model.get_intermediate_layers_feature(img, n=2, return_class_token=True)
    for i, (patches, cls) in enumerate(pairs):
        yield f"inter_n2.{i}.patch_tokens{suffix}", patches
        yield f"inter_n2.{i}.cls_token{suffix}", cls
    blocks = [0, model.config.vision_depth - 1]
    layers = model.get_intermediate_layers_feature(img, blocks, reshape=True, norm=False)
    for i, x in enumerate(layers):
        yield f"inter_list_reshape_nonorm.{i}{suffix}", x
    yield f"latents{suffix}", model.get_reconstruction_latents(img)
    stored = "rope_fp32.latents" if exact and not suffix else f"latents{suffix}"
    yield f"decoded{suffix}", model.get_latents_decoded_images(torch.from_numpy(io[stored]))
    if model.config.train_clip:
        yield from clip_outputs(model, img, torch.from_numpy(io["text"]).long(), suffix)


def clip_outputs(model, img, text, suffix):
    per_image, per_text = model.get_clip_logits(img, text)
    image_feature = model.get_clip_image_feature(img, normalize=True)
    yield f"clip_image_feature{suffix}", image_feature
    yield f"clip_logits_image{suffix}", per_image
    yield f"clip_logits_text{suffix}", per_text
    image_feature = model.get_clip_image_feature(img, normalize=False)
    yield f"clip_image_feature_unnormalized{suffix}", image_feature
    yield "clip_text_feature", model.get_clip_text_feature(text, normalize=True)
    yield "clip_text_feature_unnormalized", model.get_clip_text_feature(text, normalize=False)


LIMITS = {
    # beginning of the stored name: (largest, mean difference with bfloat16 RoPE, where a rounding
    # may differ; largest difference with float32 RoPE). The first that fits counts.
    "clip_text_feature_unnormalized": (5e-6, 5e-6, 5e-6),
    "clip_text_feature": (1e-6, 1e-6, 1e-6),
    "clip_image_feature_unnormalized": (5e-3, 1e-3, 1e-5),
    "clip_image_feature": (3e-4, 3e-4, 2e-6),
    "clip_logits": (2e-3, 2e-3, 1e-5),
    "decoded": (3e-3, 1e-4, 8e-6),
    "": (1e-2, 3e-4, 1e-5),
}
BOTH_ROPES = pytest.mark.parametrize("exact", [False, True], ids=["bfloat16 RoPE", "float32 RoPE"])


@pytest.mark.parametrize("name", ["vtp_a", "vtp_b", "vtp_p8"])
@BOTH_ROPES
def test_an_official_checkpoint_gives_the_official_outputs(golden, form, name, exact):
    skip_without(golden / name)
    io, prefix = np.load(golden / name / "io.npz"), "rope_fp32." if exact else ""
    model = VTPModel.from_pretrained(golden / name, torch.float32 if exact else None)
    compared = set()
    for key, x in outputs(model, io, exact):
        if prefix + key not in io:
            continue
        off = np.abs(io[prefix + key] - x.numpy())
        kind = next(kind for kind in LIMITS if key.startswith(kind))
        largest, mean, largest_exact = LIMITS[kind]
        assert off.max() <= (largest_exact if exact else largest), (key, off.max())
        assert off.mean() <= mean, (key, off.mean())
        compared.add(prefix + key)
    stored = {key for key in io.files if key.startswith("rope_fp32.") == exact}
    stored = {key for key in stored if "rope." not in key and not key.startswith("trace.")}
    inputs = {"image", "image_nonsquare", "text", "mask", "latents_random_3x5"}
    assert stored - compared <= inputs


@pytest.mark.parametrize("name", ["vtp_a", "vtp_b"])
@BOTH_ROPES
def test_forward_gives_the_official_outputs_of_each_type(golden, name, exact):
    """forward only combines the methods, so the arrays stored for the methods are its outputs."""
    skip_without(golden / name)
    io = {key: torch.from_numpy(x) for key, x in np.load(golden / name / "io.npz").items()}
    rope_dtype = torch.float32 if exact else None
    model = VTPModel.from_pretrained(golden / name, rope_dtype=rope_dtype)
    image, text = io["image"], io["text"].long()
    prefix = "rope_fp32." if exact else ""
    clip = model(image=image, text=text)
    rec = model(image=image, forward_type="rec")
    feature = model(image=image, forward_type="feature")
    limits = {"last_bottleneck.cls_token": (feature["cls_token"], 1e-2, 1e-5),
              "last_bottleneck.patch_tokens": (feature["patch_tokens"], 1e-2, 1e-5),
              "latents": (rec["latents"], 1e-2, 1e-5),
              "decoded": (rec["reconstructed_image"], 1.5e-2, 1.5e-5),
              "clip_image_feature": (clip["image_features"], 3e-4, 2e-6)}
    for key, (x, limit, exact_limit) in limits.items():
        assert (x - io[prefix + key]).abs().max() <= (exact_limit if exact else limit), key
    assert (clip["text_features"] - io["clip_text_feature"]).abs().max() <= 1e-6
    logits = clip["logit_scale"] * clip["image_features"] @ clip["text_features"].T
    logits = logits + clip.get("logit_bias", 0)
    limit = 1e-5 if exact else 2e-3
    assert (logits - io[prefix + "clip_logits_image"]).abs().max() <= limit
    assert ("logit_bias" in clip) == (name == "vtp_b")


# ---------------------------------------------------------------- the released training code
def ssl_student(folder, rope_dtype):
    """The training model of the released code -> our Student with its weights; all of the weights
    under our names, those of the teacher begin with teacher_"""
    tensors = safetensors.torch.load_file(folder / "state.safetensors")
    state = {our_name(name): x for name, x in tensors.items()}
    config = VTPConfig(
        image_size=64, vision_embed_dim=64, vision_depth=2, vision_num_heads=2,
        vision_use_qk_norm=True, vision_feature_bottleneck=16, text_context_length=12,
        text_vocab_size=256, text_embed_dim=48, text_num_heads=3, text_depth=2,
        decoder_embed_dim=64, decoder_num_heads=2, decoder_depth=1, rope_dtype=rope_dtype,
        train_reconstruction=any("pixel_decoder" in name for name in state))
    student = Student(VTPModel(config), DINOHead(64, K=256, hidden=96, bottleneck=32)).eval()
    own = {name: x for name, x in state.items() if not name.startswith("teacher_")}
    student.load_state_dict(own)
    return student, state


def our_name(name):
    """Name of a tensor in the released training code -> in Student and Teacher"""
    if name.startswith(("dino_head.", "teacher_")):
        return name
    for theirs, ours in (("transformer.", "text_transformer."), ("proj.", "visual_proj.")):
        if name.startswith(theirs):
            return "model." + ours + name.removeprefix(theirs)
    return "model." + name


def ssl_teacher(student, state):
    teacher = Teacher(student)
    weights = {name.removeprefix("teacher_"): x for name, x in state.items()
               if name.startswith("teacher_")}
    teacher.load_state_dict(weights)
    return teacher


def ssl_outputs(student, state, io):
    """Yields (stored name, our output): of the student without and with stochastic depth, for the
    rows that the reference drew, and of the teacher"""
    crops = torch.from_numpy(io["global_crops"]).unflatten(0, (2, -1))
    locals = torch.from_numpy(io["local_crops"]).unflatten(0, (4, -1))
    mask = torch.from_numpy(io["masks"]).unflatten(0, (2, -1))
    index, _ = mask_index_and_weight(mask)

    def drawn(which):
        """which  'global' or 'local' -> what the reference's blocks kept"""
        depth, keep = student.model.config.vision_depth, []
        for i in range(depth):
            pairs = []
            for branch in ("attn", "ffn"):
                name = f"drop.block{i}.{branch}.{which}"
                rows = torch.from_numpy(io[f"{name}.index"])
                pairs.append((rows, float(io[f"{name}.scale"])))
            keep.append(pairs)
        return keep

    no_drop, drop = {"ssl": None, "local": None}, {"ssl": drawn("global"), "local": drawn("local")}
    for prefix, keep in (("student.student", no_drop), ("drop.student.student", drop)):
        cls, patch, features = student.views(crops, locals, mask, index, keep)
        yield f"{prefix}_global_cls_tokens_after_head", cls[:2].flatten(0, 1)
        yield f"{prefix}_local_cls_tokens_after_head", cls[2:].flatten(0, 1)
        yield f"{prefix}_global_masked_patch_tokens_after_head", patch
        yield f"{prefix}_global_cls_tokens", features.flatten(0, 1)
    cls, patch = ssl_teacher(student, state)(crops, index)
    # the reference exchanges the two crops
    yield "teacher.teacher_cls_tokens_after_head", cls.flip(0).flatten(0, 1)
    yield "teacher.masked_teacher_patch_tokens_after_head", patch


@pytest.mark.parametrize("rope_dtype", ["bfloat16", "float32"])
def test_student_and_teacher_give_the_outputs_of_the_released_training_code(
        golden, form, rope_dtype):
    student, state = ssl_student(golden / "vtp_ssl", rope_dtype)
    io, compared = np.load(golden / "vtp_ssl" / "io.npz"), set()
    prefix, limit = ("rope_fp32.", 5e-6) if rope_dtype == "float32" else ("", 2e-3)
    for key, x in ssl_outputs(student, state, io):
        off = np.abs(io[prefix + key] - x.numpy())
        assert off.max() < limit and off.mean() < 1e-4, (key, off.max())
        compared.add(prefix + key)
    kinds = tuple(prefix + kind for kind in ("student.", "teacher.", "drop.student."))
    stored = {key for key in io.files if key.startswith(kinds)}
    assert stored and stored <= compared


def test_dino_head_and_clip_are_those_of_the_released_training_code(golden, form):
    student, _ = ssl_student(golden / "vtp_ssl", "bfloat16")
    io = {k: torch.from_numpy(v) for k, v in np.load(golden / "vtp_ssl" / "io.npz").items()}
    model, image, text = student.model, io["clip.image"], io["clip.text"].long()
    found = {"head.output": (student.dino_head(io["head.input"]), 1e-6),
             "clip.text_features": (model.get_clip_text_feature(text), 1e-6),
             "clip.image_features": (model.get_clip_image_feature(image), 3e-4),
             "clip.logits": (model.get_clip_logits(image, text)[0], 2e-3)}
    for name, (x, limit) in found.items():
        assert torch.allclose(x, io[name], rtol=0, atol=limit), name


def test_the_moving_average_is_that_of_the_released_code_to_the_bit(golden):
    student, state = ssl_student(golden / "vtp_ssl", "bfloat16")
    teacher = ssl_teacher(student, state)
    wanted = json.loads((golden / "vtp_ssl" / "ema.json").read_text())
    teacher.update(student, wanted["momentum"])
    for name, p in teacher.named_parameters():
        found = hashlib.sha256(p.numpy().tobytes()).hexdigest()
        assert found == wanted["tensors"]["teacher_" + name]["sha256_f32le"], name


# ---------------------------------------------------------------- sizes
def millions(module, without=()):
    """Parameters of a module, except those whose names end like this"""
    counted = [p for name, p in module.named_parameters() if not name.endswith(without)]
    return sum(p.numel() for p in counted) / 1e6


@pytest.mark.parametrize("size, trunk, decoder", [
    ("S", 21.612, 21.621), ("B", 85.690, 85.709), ("L", 303.543, 303.591)])
def test_the_paper_s_sizes_have_their_numbers_of_parameters(size, trunk, decoder):
    with torch.device("meta"):
        model = VTPModel(VTPConfig.of_size(size))
        light = VTPModel(VTPConfig.of_size(size, clip=False, light_decoder=True)).pixel_decoder
    norms = ("q_norm.weight", "k_norm.weight")             # the paper's table is without them
    assert round(millions(model.trunk, norms), 3) == trunk
    assert round(millions(model.pixel_decoder, norms), 3) == decoder
    assert round(millions(light, norms), 2) == 51.31
    names = ("text", "token", "pos", "ln_final")
    text = [p for name, p in model.named_parameters() if name.startswith(names)]
    assert round(sum(p.numel() for p in text) / 1e6, 2) == 123.65


def test_every_size_has_whole_heads_and_the_paper_s_defaults():
    for size in SIZES:
        c = VTPConfig.of_size(size)
        assert c.vision_embed_dim % c.vision_num_heads == 0
        assert c.text_embed_dim % c.text_num_heads == 0
        assert (c.vision_patch_size, c.vision_feature_bottleneck) == (16, 64)
        assert c.vision_use_qk_norm and c.rope_dtype == "float32"


def test_an_unknown_size_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="choose one of pico, nano, micro, S, B, L"):
        VTPConfig.of_size("XL")


# ---------------------------------------------------------------- the official interface
NO_DEFAULT = inspect.Parameter.empty
SIGNATURES = {
    "get_clip_image_feature": {"image": NO_DEFAULT, "normalize": True},
    "get_clip_text_feature": {"text": NO_DEFAULT, "normalize": True},
    "get_last_layer_feature": {"image": NO_DEFAULT, "use_bottleneck": False},
    "get_intermediate_layers_feature": {"image": NO_DEFAULT, "n": 1, "reshape": False,
                                        "return_class_token": False, "norm": True},
    "get_clip_logits": {"image": NO_DEFAULT, "text": NO_DEFAULT},
    "get_reconstruction_latents": {"image": NO_DEFAULT},
    "get_latents_decoded_images": {"latents": NO_DEFAULT},
    "forward": {"image": None, "text": None, "forward_type": "clip"},
    # The official model inherits the last two from transformers; these are our signatures.
    "from_pretrained": {"folder": NO_DEFAULT, "rope_dtype": None},
    "save_pretrained": {"folder": NO_DEFAULT},
}


def signature(method):
    """-> {parameter: default}, in order, without self"""
    parameters = inspect.signature(method).parameters
    return {name: p.default for name, p in parameters.items() if name != "self"}


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_public_method_has_the_official_parameters_and_defaults(name):
    assert list(signature(getattr(VTPModel, name)).items()) == list(SIGNATURES[name].items())


@pytest.mark.parametrize("name", ["get_reconstruction_latents", "get_latents_decoded_images"])
def test_the_paper_s_cnn_names_its_parameters_as_the_tokenizer_does(name):
    assert signature(getattr(LDM, name)) == SIGNATURES[name]


def test_methods_take_their_arguments_by_name():
    model, image, text = tiny(), torch.randn(2, 3, 16, 24), torch.randint(1, 64, (5, 10))
    arguments = {"image": image, "text": text, "latents": torch.randn(2, 6, 2, 3)}
    for name, parameters in SIGNATURES.items():
        if not name.endswith("_pretrained"):
            chosen = {p: arguments.get(p, default) for p, default in parameters.items()}
            assert getattr(model, name)(**chosen) is not None


def test_clip_features_have_length_one_unless_told_otherwise():
    model, image, text = tiny(), torch.randn(2, 3, 16, 24), torch.randint(1, 64, (5, 10))
    for method, x in ((model.get_clip_image_feature, image), (model.get_clip_text_feature, text)):
        unit, raw = method(x), method(x, normalize=False)
        assert torch.allclose(unit.norm(dim=-1), torch.ones(len(x)), rtol=0, atol=1e-6)
        assert not torch.allclose(raw.norm(dim=-1), torch.ones(len(x)), rtol=0, atol=1e-2)
        assert torch.equal(unit, F.normalize(raw, dim=-1))


def test_forward_returns_what_the_methods_return():
    model, image = tiny(init_logit_bias=-10.0), torch.randn(2, 3, 16, 24)
    text = torch.randint(1, 64, (5, 10))
    clip = model(image, text)
    assert list(clip) == ["image_features", "text_features", "logit_scale", "logit_bias"]
    assert torch.equal(clip["image_features"], model.get_clip_image_feature(image))
    assert torch.equal(clip["text_features"], model.get_clip_text_feature(text))
    assert clip["logit_scale"] == model.logit_scale.exp()
    assert clip["logit_bias"] is model.logit_bias
    rec = model(image, forward_type="rec")
    assert list(rec) == ["latents", "reconstructed_image", "target_image"]
    assert torch.equal(rec["latents"], model.get_reconstruction_latents(image))
    decoded = model.get_latents_decoded_images(rec["latents"])
    assert torch.equal(rec["reconstructed_image"], decoded) and rec["target_image"] is image
    feature = model(image, forward_type="feature")
    wanted = model.get_last_layer_feature(image, use_bottleneck=True)
    assert list(feature) == ["cls_token", "patch_tokens"]
    assert all(torch.equal(feature[key], wanted[key]) for key in wanted)


def test_forward_leaves_out_the_clip_features_of_absent_inputs():
    model, image, text = tiny(), torch.randn(2, 3, 16, 24), torch.randint(1, 64, (5, 10))
    assert list(model(image=image)) == ["image_features", "logit_scale"]
    assert list(model(text=text)) == ["text_features", "logit_scale"]


def test_forward_refuses_an_unknown_type_and_a_missing_image_in_a_sentence():
    model, image = tiny(), torch.randn(1, 3, 16, 16)
    known = "forward_type is 'reconstruction', but it must be 'clip', 'rec' or 'feature'"
    with pytest.raises(ValueError, match=known):
        model(image, forward_type="reconstruction")
    for kind in ("rec", "feature"):
        with pytest.raises(ValueError, match=f"image is None, but forward_type '{kind}' needs an"):
            model(text=torch.ones(1, 10, dtype=torch.long), forward_type=kind)
    with pytest.raises(ValueError, match="it was made with train_clip false"):
        tiny(train_clip=False)(image)
    with pytest.raises(ValueError, match="it was made with train_reconstruction false"):
        tiny(train_reconstruction=False)(image, forward_type="rec")


# ---------------------------------------------------------------- the public methods
def test_methods_return_the_documented_shapes():
    model, img, text = tiny(), torch.randn(2, 3, 16, 24), torch.randint(1, 64, (5, 10))
    z = model.get_reconstruction_latents(img)                  # 2 x 3 patches
    assert z.shape == (2, 6, 2, 3) and model.get_latents_decoded_images(z).shape == img.shape
    assert model.get_clip_image_feature(img, normalize=True).shape == (2, 24)
    assert model.get_clip_text_feature(text, normalize=False).shape == (5, 24)
    per_image, per_text = model.get_clip_logits(img, text)
    assert per_image.shape == (2, 5) and torch.equal(per_text, per_image.T)
    last = model.get_last_layer_feature(img)
    assert last["cls_token"].shape == (2, 32) and last["patch_tokens"].shape == (2, 6, 32)
    last = model.get_last_layer_feature(img, use_bottleneck=True)
    assert last["cls_token"].shape == (2, 6) and last["patch_tokens"].shape == (2, 6, 6)
    layers = model.get_intermediate_layers_feature(img, 1, reshape=True, return_class_token=True)
    (patches, cls), = layers
    assert patches.shape == (2, 32, 2, 3) and cls.shape == (2, 32)


def test_methods_agree_with_each_other():
    model, img = tiny(), torch.randn(2, 3, 16, 24)
    after_bottleneck = model.get_last_layer_feature(img, use_bottleneck=True)["patch_tokens"]
    latents = model.get_reconstruction_latents(img)
    assert torch.equal(latents.flatten(2).transpose(1, 2), after_bottleneck)
    last = model.get_last_layer_feature(img)["patch_tokens"]
    assert torch.equal(model.get_intermediate_layers_feature(img)[0], last)
    both = model.get_intermediate_layers_feature(img, n=2)
    second = model.get_intermediate_layers_feature(img, n=[1])
    assert len(both) == 2 and torch.equal(both[1], second[0])


def test_intermediate_layers_have_the_order_of_the_blocks_and_must_exist():
    model, img = tiny(vision_depth=3), torch.randn(1, 3, 16, 24)
    pairs = model.get_intermediate_layers_feature(img, n=[2, 0], return_class_token=True)
    alone = model.get_intermediate_layers_feature(img, n=(0, 2))
    assert torch.equal(pairs[0][0], alone[0]) and torch.equal(pairs[1][0], alone[1])
    assert torch.equal(pairs[1][1], model.get_last_layer_feature(img)["cls_token"])
    raw, = model.get_intermediate_layers_feature(img, norm=False)
    assert torch.equal(model.trunk.norm(raw), alone[1]) and not torch.equal(raw, alone[1])
    for n in (0, 4, -1, [3], [-1], []):
        with pytest.raises(ValueError, match="the trunk has 3 blocks; wanted a number from 1 to 3"):
            model.get_intermediate_layers_feature(img, n)


def test_two_models_can_be_built_from_one_config():
    """(The released training code removes fields from the config: its second model fails.)"""
    config = VTPConfig(**TINY)
    first, second = VTPModel(config), VTPModel(config)
    assert first.state_dict().keys() == second.state_dict().keys() and config == VTPConfig(**TINY)


def test_an_absent_part_is_named():
    model, img = tiny(train_clip=False, train_reconstruction=False), torch.randn(1, 3, 16, 16)
    text = torch.ones(1, 10, dtype=torch.long)
    decoder = "no pixel decoder: it was made with train_reconstruction false"
    with pytest.raises(ValueError, match=decoder):
        model.get_latents_decoded_images(img)
    with pytest.raises(ValueError, match="no CLIP side: it was made with train_clip false"):
        model.get_clip_image_feature(img)
    with pytest.raises(ValueError, match="no text tower: it was made with train_clip false"):
        model.get_clip_text_feature(text)


def test_latents_have_the_layout_of_the_image():
    model, img = tiny(vision_depth=1), torch.zeros(1, 3, 16, 24)
    model.trunk.blocks[0].attn.proj.weight.zero_()             # no patch sees another one
    other = img.clone()
    other[..., 8:16, 16:24] = 1
    change = model.get_reconstruction_latents(other) - model.get_reconstruction_latents(img)
    assert (change.abs().amax(1)[0] > 0).nonzero().tolist() == [[1, 2]]


def test_a_latent_as_wide_as_the_trunk_needs_no_bottleneck():
    model = tiny(vision_feature_bottleneck=None)
    assert not any("bottleneck" in name for name in model.state_dict())
    assert model.get_reconstruction_latents(torch.randn(1, 3, 16, 16)).shape == (1, 32, 2, 2)


def test_clip_may_read_after_the_bottleneck_and_the_mean_of_the_patches():
    model = tiny(vision_bottleneck_ae_only=False, vision_clip_feat="pooled")
    img = torch.randn(2, 3, 16, 16)
    patches = model.get_last_layer_feature(img, use_bottleneck=True)["patch_tokens"]
    found = model.get_clip_image_feature(img, normalize=False)
    assert model.feature_dim == 6
    assert torch.allclose(found, model.visual_proj(patches.mean(1)), atol=1e-6)


def test_clip_starts_at_a_temperature_of_seven_hundredths():
    assert math.isclose(tiny().logit_scale.exp(), 1 / 0.07, rel_tol=1e-6)
    assert tiny().logit_bias is None
    assert tiny(init_logit_bias=-10.0, nonscalar_logit_scale=True).logit_bias.tolist() == [-10.0]


# ---------------------------------------------------------------- files
def test_a_round_trip_over_the_disk_changes_no_bit(tmp_path):
    model = tiny(init_logit_bias=-10.0)
    model.save_pretrained(tmp_path / "a" / "b")
    back = VTPModel.from_pretrained(tmp_path / "a" / "b")
    assert back.config == model.config and not back.training
    before, after = model.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    for name, x in before.items():
        assert torch.equal(x, after[name]) and x.dtype == after[name].dtype
    img = torch.randn(1, 3, 16, 16)
    latents = model.get_reconstruction_latents(img)
    assert torch.equal(back.get_reconstruction_latents(img), latents)


def test_periods_are_stored_in_bfloat16_as_in_official_files(tmp_path):
    tiny().save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    periods = {name: x.dtype for name, x in tensors.items() if "periods" in name}
    assert periods == {"trunk.rope_embed.periods": torch.bfloat16,
                       "pixel_decoder.rope_embed.periods": torch.bfloat16}


@pytest.mark.parametrize("name", ["vtp_a", "vtp_b", "vtp_p8"])
def test_an_official_file_saved_by_us_is_the_same_file(golden, name, tmp_path):
    """Same keys, types, bits. (Their config.json says more about the library that wrote it; ours
    adds decoder_upscale and rope_dtype.)"""
    skip_without(golden / name)
    VTPModel.from_pretrained(str(golden / name)).save_pretrained(str(tmp_path))
    folders = golden / name, tmp_path
    theirs, ours = (safetensors.torch.load_file(f / "model.safetensors") for f in folders)
    assert theirs.keys() == ours.keys()
    for key, x in theirs.items():
        assert x.dtype == ours[key].dtype and torch.equal(x, ours[key])
    theirs, ours = (json.loads((f / "config.json").read_text()) for f in folders)
    assert theirs.keys() - ours.keys() == {"transformers_version"}
    assert ours.keys() - theirs.keys() == {"decoder_upscale", "rope_dtype"}
    assert all(ours[key] == value for key, value in theirs.items() if key in ours)
    # the values that the official class always has
    assert (ours["decoder_upscale"], ours["rope_dtype"]) == (16, "bfloat16")


def test_unknown_fields_of_config_json_are_ignored_and_rope_can_be_chosen(tmp_path):
    tiny().save_pretrained(tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    found |= {"transformers_version": "9.9", "torch_dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(found))
    assert VTPModel.from_pretrained(tmp_path).trunk.rope_embed.dtype == torch.float32
    chosen = VTPModel.from_pretrained(tmp_path, rope_dtype=torch.bfloat16)
    assert chosen.pixel_decoder.rope_embed.dtype == torch.bfloat16
    chosen = VTPModel.from_pretrained(tmp_path, rope_dtype="bfloat16")
    assert chosen.config.rope_dtype == "bfloat16"


def all_outputs(model):
    """The outputs of all methods for two images and two texts, as far as the model has the parts"""
    g = torch.Generator().manual_seed(1)
    img = torch.randn(2, 3, 16, 24, generator=g)
    text = torch.randint(1, 64, (2, 10), generator=g)
    z = model.get_reconstruction_latents(img)
    out = [*model.get_last_layer_feature(img).values(),
           *model.get_intermediate_layers_feature(img, n=2), z]
    if model.config.train_reconstruction:
        out.append(model.get_latents_decoded_images(z))
    if model.config.train_clip:
        out.append(model.get_clip_image_feature(img, normalize=False))
        out.append(model.get_clip_text_feature(text, normalize=False))
        if model.config.text_pool_type != "none":
            out.append(model.get_clip_logits(img, text)[0])
    return out


FIELDS = [
    {"text_ls_init_value": 0.1}, {"text_quick_gelu": True}, {"text_no_causal_mask": True},
    {"text_output_tokens": True, "text_pad_id": 3, "image_size": 7},
    {"text_mlp_ratio": 2, "vision_mlp_ratio": 3}, {"decoder_upscale": 16},
    {"rope_dtype": "bfloat16"},
    {"init_logit_bias": -10.0}, {"init_logit_bias": 0, "init_logit_scale": 0.0},
    {"nonscalar_logit_scale": True, "init_logit_bias": -10.0, "init_logit_scale": 1.5},
    {"train_clip": False}, {"train_reconstruction": False},
    {"train_clip": False, "train_reconstruction": False},
]
for part in ("vision", "decoder"):
    for ffn in ("mlp", "swiglu", "swiglu32", "swiglu64", "swiglu128"):
        FIELDS.append({f"{part}_ffn_layer": ffn})
    for norm in ("layernorm", "layernormbf16", "rmsnorm"):
        FIELDS.append({f"{part}_norm_layer": norm})
    for init in (0.1, 1):
        FIELDS.append({f"{part}_init_values": init})
for vision in (False, True):
    for decoder in (False, True):
        FIELDS.append({"vision_use_qk_norm": vision, "decoder_use_qk_norm": decoder})
for ae_only in (False, True):
    for feature in ("cls", "pooled"):
        for width in (6, 32, None):
            FIELDS.append({"vision_bottleneck_ae_only": ae_only, "vision_clip_feat": feature,
                           "vision_feature_bottleneck": width})
for pooling in ("argmax", "first", "last", "none"):
    for kind, bias in (("none", True), ("mlp", False), ("linear", True)):
        FIELDS.append({"text_pool_type": pooling, "text_proj_type": kind, "text_proj_bias": bias})


def id_of(fields):
    return "-".join(f"{name}={value}" for name, value in fields.items())


@pytest.mark.parametrize("fields", FIELDS, ids=id_of)
def test_every_field_works_and_a_round_trip_over_the_disk_changes_no_bit(fields, tmp_path):
    model = tiny(**fields)
    for p in model.parameters():           # no zeros or ones that could hide a missing tensor
        p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(tmp_path)
    back = VTPModel.from_pretrained(tmp_path)
    assert back.config == model.config
    for a, b in zip(all_outputs(model), all_outputs(back), strict=True):
        assert torch.equal(a, b) and a.isfinite().all()


@pytest.mark.parametrize("field, part", [("vision_init_values", "trunk"),
                                         ("decoder_init_values", "pixel_decoder"),
                                         ("text_ls_init_value", "text_transformer")])
def test_layer_scale_of_zero_is_none_and_of_one_changes_nothing(field, part):
    off, zero, one = tiny(), tiny(**{field: 0.0}), tiny(**{field: 1.0})
    assert zero.state_dict().keys() == off.state_dict().keys()
    gammas = one.state_dict().keys() - off.state_dict().keys()
    assert gammas
    assert all(name.startswith(part) and name.endswith("gamma") for name in gammas)
    one.load_state_dict(off.state_dict(), strict=False)
    assert all(map(torch.equal, all_outputs(off), all_outputs(one)))


@pytest.mark.parametrize("fields, sentence", [
    ({"vision_ffn_layer": "geglu"}, 'vision_ffn_layer is "geglu", wanted one of mlp, swiglu'),
    ({"decoder_ffn_layer": "none"}, "decoder_ffn_layer .* wanted one of"),
    ({"vision_norm_layer": "batchnorm"}, "vision_norm_layer .* layernorm"),
    ({"decoder_norm_layer": None}, "decoder_norm_layer is null, wanted a string"),
    ({"vision_num_heads": 3},
     "vision_num_heads is 3, wanted a divisor of vision_embed_dim, which is 32"),
    ({"text_num_heads": 5}, "text_num_heads is 5"),
    ({"decoder_num_heads": 16}, "decoder_num_heads is 16, wanted heads of 4, 8, 12"),
    ({"vision_depth": 0}, "vision_depth is 0, wanted a whole number above 0"),
    ({"vision_depth": "12"}, 'vision_depth is "12", wanted a whole number'),
    ({"train_clip": "false"}, 'train_clip is "false", wanted true or false'),
    ({"vision_depth": True}, "vision_depth is true, wanted a whole number"),
    ({"text_quick_gelu": 1}, "text_quick_gelu is 1, wanted true or false"),
    ({"vision_feature_bottleneck": 0}, "vision_feature_bottleneck is 0, wanted .* or null"),
    ({"vision_clip_feat": "avgpool"}, "wanted cls or pooled"),
    ({"text_embed_cls": True}, "text_embed_cls is true, wanted false"),
    ({"text_pool_type": "mean"}, "text_pool_type .* argmax, first, last, none"),
    ({"rope_dtype": "float16"}, 'rope_dtype is "float16", wanted bfloat16'),
    ({"decoder_upscale": 0}, "decoder_upscale is 0"),
    ({"vision_mlp_ratio": 0.0}, "vision_mlp_ratio is 0.0, wanted a number above 0"),
    ({"init_logit_scale": "log"}, "init_logit_scale .* a number or null"),
])
def test_a_field_that_cannot_be_built_is_refused_by_name(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        VTPConfig(**TINY | fields)


def test_fields_of_absent_parts_are_not_checked():
    assert VTPConfig(**TINY | {"train_clip": False, "text_num_heads": 5, "text_pool_type": "mean",
                               "vision_clip_feat": "avgpool"})
    assert VTPConfig(**TINY | {"train_reconstruction": False, "decoder_ffn_layer": "geglu",
                               "decoder_num_heads": 5})


def test_an_absent_field_takes_the_official_default(tmp_path):
    tiny(train_clip=False).save_pretrained(tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    for name in ("model_type", "vision_ffn_layer", "text_depth", "vision_mlp_ratio"):
        del found[name]
    (tmp_path / "config.json").write_text(json.dumps(found))
    wanted = VTPConfig(**TINY | {"train_clip": False, "text_depth": 12})
    assert VTPModel.from_pretrained(tmp_path).config == wanted


def damage(tensors):
    """-> the tensors without one, with two of another model, and with one transposed"""
    tensors = dict(tensors, other_a=torch.zeros(1), other_b=torch.zeros(1))
    tensors["visual_proj.weight"] = tensors["visual_proj.weight"].T.contiguous()
    del tensors["trunk.cls_token"]
    return tensors


@pytest.mark.parametrize("file, content, sentence", [
    ("config.json", "{not json", "is no JSON .* wanted the config.json of a VTP model"),
    ("config.json", "[1, 2]", "holds a list, wanted"),
    ("config.json", '{"model_type": "clip"}', "holds model_type 'clip', wanted .* 'vtp'"),
    ("config.json", '{"vision_depth": -1}', "vision_depth is -1"),
    ("model.safetensors", "rubbish",
     "model.safetensors is damaged .* copy or download it again"),
    ("model.safetensors", None, "model.safetensors is missing"),
    ("model.safetensors", damage,
     "does not fit the config.json beside it; take both files from one model.*"
     "Missing.*trunk.cls_token.*Unexpected.*other_a.*other_b.*size mismatch for "
     "visual_proj.weight"),
])
def test_a_folder_that_holds_something_else_is_refused_with_a_sentence(
        file, content, sentence, tmp_path):
    tiny().save_pretrained(tmp_path)
    if callable(content):
        tensors = content(safetensors.torch.load_file(tmp_path / file))
        safetensors.torch.save_file(tensors, tmp_path / file)
    elif content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content)
    error = FileNotFoundError if content is None else ValueError
    with pytest.raises(error, match=sentence):
        VTPModel.from_pretrained(tmp_path)


def test_a_folder_without_a_model_is_refused_with_the_files_that_were_wanted(tmp_path):
    sentence = "wanted a folder with config.json and model.safetensors"
    with pytest.raises(FileNotFoundError, match=sentence):
        VTPModel.from_pretrained(tmp_path)


# ---------------------------------------------------------------- DINO head
def test_logits_of_the_head_are_cosines_times_the_prototype_s_length():
    head = DINOHead(16, K=50, hidden=32, bottleneck=8)
    logits = head(100 * torch.randn(64, 16))
    assert logits.abs().max() <= 1 + 1e-6                      # lengths start at 1
    head.last_layer.weight_g.fill_(3.0)
    x = torch.ones(1, 16)
    cosines = F.linear(F.normalize(head.mlp(x), dim=-1),
                       F.normalize(head.last_layer.weight_v, dim=-1))
    assert torch.allclose(head(x) / 3, cosines)
    head.last_layer.weight_v.mul_(7)                           # only its direction matters
    assert head(100 * torch.randn(64, 16)).abs().max() <= 3 + 1e-5


def test_embeddings_of_the_head_are_unit_vectors():
    head = DINOHead(16, K=50, hidden=32, bottleneck=8)
    embedding = head.embed(100 * torch.randn(64, 16))
    assert torch.allclose(embedding.norm(dim=-1), torch.ones(64), atol=1e-6)


# ---------------------------------------------------------------- teacher
def student_and_teacher(**fields):
    torch.manual_seed(0)
    model = VTPModel(VTPConfig(**TINY | fields))
    student = Student(model, DINOHead(model.feature_dim, K=20, hidden=16, bottleneck=8))
    return student, Teacher(student)


def parameter_pairs(student, teacher):
    """-> (parameter of the teacher, the student's) for each parameter of the teacher"""
    places = {"trunk": "model.trunk", "proj": "model.visual_proj", "dino_head": "dino_head"}
    named, pairs = dict(student.named_parameters()), []
    for name, p in teacher.named_parameters():
        module, _, rest = name.partition(".")
        pairs.append((p, named[f"{places[module]}.{rest}"]))
    return pairs


@pytest.mark.parametrize("fields", [
    {}, {"vision_bottleneck_ae_only": False}, {"train_clip": False}])
def test_the_teacher_starts_as_a_copy_of_the_student(fields):
    student, teacher = student_and_teacher(**fields)
    for t, s in parameter_pairs(student, teacher):
        assert torch.equal(t, s) and t.data_ptr() != s.data_ptr()
    assert student.training and not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.train().training                        # it never leaves eval mode


@pytest.mark.parametrize("momentum", [1.0, 0.5, 0.0])
def test_the_teacher_moves_to_the_weighted_mean_with_the_student(momentum):
    """Momentum 1: it stays; 0: it becomes the student."""
    student, teacher = student_and_teacher()
    for p in student.parameters():
        p.add_(torch.randn_like(p))
    pairs = parameter_pairs(student, teacher)
    wanted = [momentum * t + (1 - momentum) * s for t, s in pairs]
    before = [s.clone() for _, s in pairs]
    teacher.update(student, momentum)
    for (t, s), mean, old in zip(pairs, wanted, before):
        assert torch.equal(t, mean) and torch.equal(s, old)


# ---------------------------------------------------------------- student
NO_DROP = dict.fromkeys(("clip", "ssl", "local"))              # no stochastic depth


def make_batch(Bs=2, V=3):
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(2, Bs, 16, generator=g) < 0.4
    batch = SimpleNamespace(
        image=torch.randn(4, 3, 32, 32, generator=g), rec=torch.tensor([0, 2]),
        text=torch.randint(1, 64, (4, 7), generator=g),
        crops=torch.randn(2, Bs, 3, 32, 32, generator=g), mask=mask,
        locals=torch.randn(V, Bs, 3, 16, 16, generator=g), keep=dict(NO_DROP))
    batch.mask_index, _ = mask_index_and_weight(mask)
    return batch


def views(student, batch):
    return student.views(batch.crops, batch.locals, batch.mask, batch.mask_index, batch.keep)


def test_views_are_the_head_s_logits_of_class_tokens_and_masked_patches():
    student, _ = student_and_teacher()
    batch = make_batch()
    logits, patch_logits, features = views(student, batch)
    M = batch.mask.sum()
    assert logits.shape == (5, 2, 20) and patch_logits.shape == (M, 20)
    assert features.shape == (2, 2, 32)
    trunk, head, masked = student.model.trunk, student.dino_head, []
    for crop in range(2):
        cls, patches = trunk(batch.crops[crop], batch.mask[crop])
        assert torch.allclose(features[crop], cls, atol=1e-6)
        assert torch.allclose(logits[crop], head(cls), atol=1e-6)
        masked.append(patches[batch.mask[crop]])
    assert torch.allclose(patch_logits, head(torch.cat(masked)), atol=1e-6)
    for v in range(3):
        assert torch.allclose(logits[2 + v], head(trunk(batch.locals[v])[0]), atol=1e-6)


def test_the_head_reads_the_full_width_or_after_the_bottleneck():
    x = torch.randn(5, 32)
    assert head_input(tiny().trunk, tiny().config, x) is x
    model = tiny(vision_bottleneck_ae_only=False)
    assert torch.equal(head_input(model.trunk, model.config, x), model.trunk.feature_bottleneck(x))
    student, teacher = student_and_teacher(vision_bottleneck_ae_only=False)
    batch = make_batch()
    assert views(student, batch)[0].shape == (5, 2, 20)
    assert teacher(batch.crops, batch.mask_index)[0].shape == (2, 2, 20)


def test_self_distillation_without_local_crops_compares_the_two_global_ones():
    student, _ = student_and_teacher()
    batch = make_batch()
    batch.locals = batch.locals[:0]
    assert views(student, batch)[0].shape == (2, 2, 20)


def test_student_and_teacher_agree_on_crops_without_a_mask():
    student, teacher = student_and_teacher()
    batch = make_batch()
    batch.mask = torch.zeros(2, 2, 16, dtype=torch.bool)
    all_patches = torch.arange(2 * 2 * 16)                     # compare them all
    logits, patch_logits, _ = student.views(batch.crops, batch.locals, batch.mask, all_patches,
                                            batch.keep)
    wanted, patch_wanted = teacher(batch.crops, all_patches)
    assert torch.allclose(logits[:2], wanted, atol=1e-6)
    assert torch.allclose(patch_logits, patch_wanted, atol=1e-6)


def test_the_teacher_sees_masked_patches_and_the_student_does_not():
    student, teacher = student_and_teacher()
    student.model.trunk.mask_token.normal_()
    batch = make_batch()
    _, patch_logits, _ = views(student, batch)
    _, patch_wanted = teacher(batch.crops, batch.mask_index)
    assert patch_wanted.shape == patch_logits.shape
    assert not torch.allclose(patch_logits, patch_wanted, atol=1e-3)
    batch.crops = batch.crops.flip(-1)
    assert not torch.allclose(teacher(batch.crops, batch.mask_index)[1], patch_wanted, atol=1e-3)


def test_embeddings_and_pixels_of_training_are_those_of_the_public_methods():
    student, _ = student_and_teacher()
    batch, model = make_batch(), student.model
    cls, patches = student.encode(batch.image)
    img, txt = student.embed_image(cls, patches), student.embed_text(batch.text)
    pixels = student.decode(rec_patches(batch, patches, student))
    assert torch.allclose(img, model.get_clip_image_feature(batch.image), atol=1e-5)
    assert torch.allclose(txt, model.get_clip_text_feature(batch.text), atol=1e-5)
    latents = model.get_reconstruction_latents(batch.image[[0, 2]])
    assert torch.allclose(pixels, model.get_latents_decoded_images(latents), atol=1e-5)


def test_reconstruction_has_a_forward_pass_of_its_own_if_it_has_a_stochastic_depth_of_its_own():
    student, _ = student_and_teacher()
    batch = make_batch()
    _, patches = student.encode(batch.image)
    assert torch.equal(rec_patches(batch, patches, student), patches[[0, 2]])
    second = torch.tensor([1]), 2.0                            # of the two images, the second
    batch.keep["rec"] = [(second, second)] * 2
    found = rec_patches(batch, patches, student)
    assert torch.equal(found, student.encode(batch.image[[0, 2]], batch.keep["rec"])[1])
    assert not torch.allclose(found, patches[[0, 2]], atol=1e-3)


def test_training_normalises_clip_features_in_float32_under_bfloat16_autocast():
    """In bfloat16, lengths would be 0.999 to 1.0015.

    The public methods keep the type that autocast gives, as the official code does.
    """
    student, _ = student_and_teacher()
    image, text = torch.randn(64, 3, 32, 32), torch.randint(1, 64, (64, 7))
    with torch.autocast("cpu", torch.bfloat16):
        img, txt = student.embed_image(*student.encode(image)), student.embed_text(text)
        public = student.model.get_clip_text_feature(text)
        raw = student.model.get_clip_text_feature(text, normalize=False)
    assert torch.equal(txt, F.normalize(raw.float(), dim=-1))  # once, and in float32
    for x in (img, txt):
        assert x.dtype == torch.float32
        assert (x.double().norm(dim=-1) - 1).abs().max() < 1e-6
    assert public.dtype == torch.bfloat16


def test_the_latent_is_the_only_way_from_the_image_to_the_pixels():
    student, _ = student_and_teacher()
    student.model.trunk.feature_bottleneck.weight.zero_()
    cls, patches = student.encode(make_batch().image)
    pixels, img = student.decode(patches), student.embed_image(cls, patches)
    assert torch.equal(pixels[0], pixels[1])                   # equal for all images
    assert not torch.equal(img[0], img[1])                     # CLIP reads the full width


def test_the_logit_scale_is_at_most_ln_100():
    student, _ = student_and_teacher()
    for value, wanted in ((9.0, math.log(100)), (2.0, 2.0), (-1.0, 0.0)):
        student.model.logit_scale.fill_(value)
        student.clamp_logit_scale()
        assert math.isclose(student.model.logit_scale, wanted, rel_tol=1e-6)
    Student(tiny(train_clip=False)).clamp_logit_scale()        # nothing to do


OBJECTIVES = [(clip, ssl, rec) for clip in (0, 1) for ssl in (0, 1) for rec in (0, 1)][1:]


@pytest.mark.parametrize("clip, ssl, rec", OBJECTIVES)
def test_every_parameter_that_an_objective_uses_has_a_gradient_and_no_other(clip, ssl, rec):
    """Only self-distillation uses the mask token, only reconstruction the bottleneck."""
    model = tiny(train_clip=bool(clip), train_reconstruction=bool(rec))
    student = Student(model, DINOHead(32, K=20, hidden=16, bottleneck=8) if ssl else None)
    batch, out = make_batch(), []
    with torch.enable_grad():
        if ssl:
            out += views(student, batch)
        if clip or rec:
            cls, patches = student.encode(batch.image)
        if clip:
            out += [student.embed_image(cls, patches), student.embed_text(batch.text),
                    model.logit_scale.exp()]
        if rec:
            out.append(student.decode(patches[batch.rec]))
        sum(x.square().sum() for x in out).backward()
    unused = set()
    if not ssl:
        unused.add("model.trunk.mask_token")
    if not rec:
        unused.add("model.trunk.feature_bottleneck.weight")
    assert {name for name, p in student.named_parameters() if p.grad is None} == unused
