"""The model: official outputs, interface and files; DINO head, teacher, student.

A test with the fixture `form` runs on the textbook forms and on those of extras/fast.py.

B images    V local crops    N patches    D width of the trunk    K prototypes    M masked patches
"""
import hashlib
import inspect
import itertools
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
from vtp_min.model import DINOHead, Student, Teacher, head_input

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
    """Yield (stored name, our output) for all methods of the model. The decoder reads the stored
    latents, so that only its own error is measured.

    io     inputs and outputs of the official code
    exact  True: the model has float32 RoPE; False: bfloat16 RoPE, as the released models
    """
    yield from image_outputs(model, io, "image", "", exact)
    yield from image_outputs(model, io, "image_nonsquare", "@nonsquare", exact)
    img = torch.from_numpy(io["image"])
    mask = torch.from_numpy(io["mask"])
    cls, patches = model.trunk(img, mask=mask)
    *_, prenorm = model.trunk.layers(img, mask=mask)           # the last block, before the norm
    yield "masked.x_norm_clstoken", cls
    yield "masked.x_norm_patchtokens", patches
    yield "masked.x_prenorm", prenorm
    latents = torch.from_numpy(io["latents_random_3x5"])
    yield "decoded_random_3x5", model.get_latents_decoded_images(latents)


def image_outputs(model, io, name, suffix, exact):
    """Yield (stored name, our output) for one input image.

    name    the input: 'image' or 'image_nonsquare'
    suffix  end of the stored names: '' or '@nonsquare'
    """
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


# Limits of the differences, by the beginning of the stored name; the first that matches is used.
# Three numbers: the largest and the mean difference with bfloat16 RoPE, where a difference in the
# last bit of float32 can change the rounding to bfloat16; the largest difference with float32 RoPE.
LIMITS = {
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
    io = np.load(golden / name / "io.npz")
    prefix = "rope_fp32." if exact else ""
    model = VTPModel.from_pretrained(golden / name, torch.float32 if exact else None)
    compared = set()
    for key, x in outputs(model, io, exact):
        if prefix + key not in io:
            continue
        difference = np.abs(io[prefix + key] - x.numpy())
        kind = next(kind for kind in LIMITS if key.startswith(kind))
        largest, mean, largest_exact = LIMITS[kind]
        limit = largest_exact if exact else largest
        assert difference.max() <= limit, (key, difference.max())
        assert difference.mean() <= mean, (key, difference.mean())
        compared.add(prefix + key)
    # every stored output was compared, except RoPE tables (test_vit.py) and activations in a block
    stored = {key for key in io.files if key.startswith("rope_fp32.") == exact}
    stored = {key for key in stored if "rope." not in key and not key.startswith("trace.")}
    inputs = {"image", "image_nonsquare", "text", "mask", "latents_random_3x5"}
    assert stored - compared <= inputs


@pytest.mark.parametrize("name", ["vtp_a", "vtp_b"])
@BOTH_ROPES
def test_forward_gives_the_official_outputs_for_each_forward_type(golden, name, exact):
    """forward only combines methods, so it is compared with the stored outputs of the methods."""
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
    """Load the training model of the released code.

    -> our Student with its weights; all weights {our name: tensor}, those of the teacher with the
    prefix teacher_
    """
    tensors = safetensors.torch.load_file(folder / "state.safetensors")
    state = {our_name(name): x for name, x in tensors.items()}
    config = VTPConfig(
        image_size=64, vision_embed_dim=64, vision_depth=2, vision_num_heads=2,
        vision_use_qk_norm=True, vision_feature_bottleneck=16, text_context_length=12,
        text_vocab_size=256, text_embed_dim=48, text_num_heads=3, text_depth=2,
        decoder_embed_dim=64, decoder_num_heads=2, decoder_depth=1, rope_dtype=rope_dtype,
        train_reconstruction=any("pixel_decoder" in name for name in state))
    student = Student(VTPModel(config), DINOHead(64, K=256, hidden=96, bottleneck=32)).eval()
    weights = {name: x for name, x in state.items() if not name.startswith("teacher_")}
    student.load_state_dict(weights)
    return student, state


def our_name(name):
    """Name of a tensor in the released training code -> its name in Student or Teacher"""
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
    """Yield (stored name, our output) for the student, without and with stochastic depth, and for
    the teacher. Stochastic depth keeps the images that the reference code has drawn."""
    crops = torch.from_numpy(io["global_crops"]).unflatten(0, (2, -1))
    locals = torch.from_numpy(io["local_crops"]).unflatten(0, (4, -1))
    mask = torch.from_numpy(io["masks"]).unflatten(0, (2, -1))
    index, _ = mask_index_and_weight(mask)

    def kept_by_the_reference(crop):
        """crop: 'global' or 'local' -> for each block, (kept rows, scale) of both branches"""
        keep = []
        for i in range(student.model.config.vision_depth):
            pairs = []
            for branch in ("attn", "ffn"):
                name = f"drop.block{i}.{branch}.{crop}"
                rows = torch.from_numpy(io[f"{name}.index"])
                pairs.append((rows, float(io[f"{name}.scale"])))
            keep.append(pairs)
        return keep

    no_drop = {"ssl": None, "local": None}
    drop = {"ssl": kept_by_the_reference("global"), "local": kept_by_the_reference("local")}
    for prefix, keep in (("student.student", no_drop), ("drop.student.student", drop)):
        cls, patch, features = student.views(crops, locals, mask, index, keep)
        yield f"{prefix}_global_cls_tokens_after_head", cls[:2].flatten(0, 1)
        yield f"{prefix}_local_cls_tokens_after_head", cls[2:].flatten(0, 1)
        yield f"{prefix}_global_masked_patch_tokens_after_head", patch
        yield f"{prefix}_global_cls_tokens", features.flatten(0, 1)
    cls, patch = ssl_teacher(student, state)(crops, index)
    # the reference returns the second crop first: crop i is then the target of the student's crop i
    yield "teacher.teacher_cls_tokens_after_head", cls.flip(0).flatten(0, 1)
    yield "teacher.masked_teacher_patch_tokens_after_head", patch


@pytest.mark.parametrize("rope_dtype", ["bfloat16", "float32"])
def test_student_and_teacher_give_the_outputs_of_the_released_training_code(
        golden, form, rope_dtype):
    student, state = ssl_student(golden / "vtp_ssl", rope_dtype)
    io = np.load(golden / "vtp_ssl" / "io.npz")
    prefix = "rope_fp32." if rope_dtype == "float32" else ""
    limit = 5e-6 if rope_dtype == "float32" else 2e-3
    compared = set()
    for key, x in ssl_outputs(student, state, io):
        difference = np.abs(io[prefix + key] - x.numpy())
        assert difference.max() < limit, (key, difference.max())
        assert difference.mean() < 1e-4, (key, difference.mean())
        compared.add(prefix + key)
    kinds = tuple(prefix + kind for kind in ("student.", "teacher.", "drop.student."))
    stored = {key for key in io.files if key.startswith(kinds)}
    assert stored and stored <= compared


def test_dino_head_and_clip_give_the_outputs_of_the_released_training_code(golden, form):
    student, _ = ssl_student(golden / "vtp_ssl", "bfloat16")
    io = {k: torch.from_numpy(v) for k, v in np.load(golden / "vtp_ssl" / "io.npz").items()}
    model = student.model
    image, text = io["clip.image"], io["clip.text"].long()
    found = {"head.output": (student.dino_head(io["head.input"]), 1e-6),
             "clip.text_features": (model.get_clip_text_feature(text), 1e-6),
             "clip.image_features": (model.get_clip_image_feature(image), 3e-4),
             "clip.logits": (model.get_clip_logits(image, text)[0], 2e-3)}
    for name, (x, limit) in found.items():
        assert torch.allclose(x, io[name], rtol=0, atol=limit), name


def test_the_teacher_after_an_update_equals_that_of_the_released_code_to_the_bit(golden):
    """The stored file has a hash of each averaged weight."""
    student, state = ssl_student(golden / "vtp_ssl", "bfloat16")
    teacher = ssl_teacher(student, state)
    wanted = json.loads((golden / "vtp_ssl" / "ema.json").read_text())
    teacher.update(student, wanted["momentum"])
    for name, p in teacher.named_parameters():
        found = hashlib.sha256(p.numpy().tobytes()).hexdigest()
        assert found == wanted["tensors"]["teacher_" + name]["sha256_f32le"], name


# ---------------------------------------------------------------- sizes
def millions(module, without=()):
    """Millions of parameters of a module

    without  tuple of endings; parameters whose names end with one of them are not counted
    """
    counted = [p for name, p in module.named_parameters() if not name.endswith(without)]
    return sum(p.numel() for p in counted) / 1e6


@pytest.mark.parametrize("size, trunk, decoder", [
    ("S", 21.612, 21.621), ("B", 85.690, 85.709), ("L", 303.543, 303.591)])
def test_the_sizes_S_B_and_L_have_the_numbers_of_parameters_of_the_paper(size, trunk, decoder):
    with torch.device("meta"):
        model = VTPModel(VTPConfig.of_size(size))
        light = VTPModel(VTPConfig.of_size(size, clip=False, light_decoder=True)).pixel_decoder
    norms = ("q_norm.weight", "k_norm.weight")             # not counted in the paper's table
    assert round(millions(model.trunk, norms), 3) == trunk
    assert round(millions(model.pixel_decoder, norms), 3) == decoder
    assert round(millions(light, norms), 2) == 51.31
    names = ("text", "token", "pos", "ln_final")
    text = [p for name, p in model.named_parameters() if name.startswith(names)]
    assert round(sum(p.numel() for p in text) / 1e6, 2) == 123.65


def test_every_size_has_patch_16_latent_64_qk_norm_and_widths_that_the_heads_divide():
    for size in SIZES:
        c = VTPConfig.of_size(size)
        assert c.vision_embed_dim % c.vision_num_heads == 0
        assert c.text_embed_dim % c.text_num_heads == 0
        assert (c.vision_patch_size, c.vision_feature_bottleneck) == (16, 64)
        assert c.vision_use_qk_norm and c.rope_dtype == "float32"


def test_an_unknown_size_raises_an_error_that_lists_the_known_sizes():
    with pytest.raises(ValueError, match="choose one of pico, nano, micro, S, B, L"):
        VTPConfig.of_size("XL")


# ---------------------------------------------------------------- the official interface
NO_DEFAULT = inspect.Parameter.empty
# method: {parameter: default}
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
    """-> {parameter: default} in the order of the parameters, without self"""
    parameters = inspect.signature(method).parameters
    return {name: p.default for name, p in parameters.items() if name != "self"}


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_public_method_has_the_official_parameters_and_defaults(name):
    assert list(signature(getattr(VTPModel, name)).items()) == list(SIGNATURES[name].items())


@pytest.mark.parametrize("name", ["get_reconstruction_latents", "get_latents_decoded_images"])
def test_the_cnn_baseline_has_the_same_parameter_names_as_the_tokenizer(name):
    assert signature(getattr(LDM, name)) == SIGNATURES[name]


def images_and_texts():
    """-> 2 images of 2 x 3 patches, and 5 texts of 10 tokens"""
    return torch.randn(2, 3, 16, 24), torch.randint(1, 64, (5, 10))


def test_public_methods_accept_keyword_arguments():
    model = tiny()
    image, text = images_and_texts()
    arguments = {"image": image, "text": text, "latents": torch.randn(2, 6, 2, 3)}
    for name, parameters in SIGNATURES.items():
        if not name.endswith("_pretrained"):
            chosen = {p: arguments.get(p, default) for p, default in parameters.items()}
            assert getattr(model, name)(**chosen) is not None


def test_clip_features_have_unit_length_unless_normalize_is_false():
    model = tiny()
    image, text = images_and_texts()
    for method, x in ((model.get_clip_image_feature, image), (model.get_clip_text_feature, text)):
        unit = method(x)
        raw = method(x, normalize=False)
        assert torch.allclose(unit.norm(dim=-1), torch.ones(len(x)), rtol=0, atol=1e-6)
        assert not torch.allclose(raw.norm(dim=-1), torch.ones(len(x)), rtol=0, atol=1e-2)
        assert torch.equal(unit, F.normalize(raw, dim=-1))


def test_forward_returns_the_outputs_of_the_methods():
    model = tiny(init_logit_bias=-10.0)
    image, text = images_and_texts()
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
    assert torch.equal(rec["reconstructed_image"], decoded)
    assert rec["target_image"] is image
    feature = model(image, forward_type="feature")
    wanted = model.get_last_layer_feature(image, use_bottleneck=True)
    assert list(feature) == ["cls_token", "patch_tokens"]
    assert all(torch.equal(feature[key], wanted[key]) for key in wanted)


def test_forward_omits_the_clip_features_of_absent_images_and_texts():
    model = tiny()
    image, text = images_and_texts()
    assert list(model(image=image)) == ["image_features", "logit_scale"]
    assert list(model(text=text)) == ["text_features", "logit_scale"]


def test_an_unknown_forward_type_a_missing_image_and_an_absent_part_raise_an_error():
    model = tiny()
    image = torch.randn(1, 3, 16, 16)
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
    model = tiny()
    img, text = images_and_texts()                             # 2 x 3 patches, d = 6, D = 32
    z = model.get_reconstruction_latents(img)
    assert z.shape == (2, 6, 2, 3)
    assert model.get_latents_decoded_images(z).shape == img.shape
    assert model.get_clip_image_feature(img, normalize=True).shape == (2, 24)
    assert model.get_clip_text_feature(text, normalize=False).shape == (5, 24)
    per_image, per_text = model.get_clip_logits(img, text)
    assert per_image.shape == (2, 5)
    assert torch.equal(per_text, per_image.T)
    last = model.get_last_layer_feature(img)
    assert last["cls_token"].shape == (2, 32)
    assert last["patch_tokens"].shape == (2, 6, 32)
    last = model.get_last_layer_feature(img, use_bottleneck=True)
    assert last["cls_token"].shape == (2, 6)
    assert last["patch_tokens"].shape == (2, 6, 6)
    layers = model.get_intermediate_layers_feature(img, 1, reshape=True, return_class_token=True)
    (patches, cls), = layers
    assert patches.shape == (2, 32, 2, 3)
    assert cls.shape == (2, 32)


def test_methods_agree_with_each_other():
    model = tiny()
    img = torch.randn(2, 3, 16, 24)
    after_bottleneck = model.get_last_layer_feature(img, use_bottleneck=True)["patch_tokens"]
    latents = model.get_reconstruction_latents(img)
    assert torch.equal(latents.flatten(2).transpose(1, 2), after_bottleneck)
    last = model.get_last_layer_feature(img)["patch_tokens"]
    assert torch.equal(model.get_intermediate_layers_feature(img)[0], last)
    both = model.get_intermediate_layers_feature(img, n=2)
    second = model.get_intermediate_layers_feature(img, n=[1])
    assert len(both) == 2
    assert torch.equal(both[1], second[0])


def test_intermediate_layers_are_in_the_order_of_the_blocks_and_unknown_blocks_are_an_error():
    model = tiny(vision_depth=3)
    img = torch.randn(1, 3, 16, 24)
    pairs = model.get_intermediate_layers_feature(img, n=[2, 0], return_class_token=True)
    alone = model.get_intermediate_layers_feature(img, n=(0, 2))
    assert torch.equal(pairs[0][0], alone[0])
    assert torch.equal(pairs[1][0], alone[1])
    assert torch.equal(pairs[1][1], model.get_last_layer_feature(img)["cls_token"])
    raw, = model.get_intermediate_layers_feature(img, norm=False)
    assert torch.equal(model.trunk.norm(raw), alone[1])
    assert not torch.equal(raw, alone[1])
    for n in (0, 4, -1, [3], [-1], []):
        with pytest.raises(ValueError, match="the trunk has 3 blocks; wanted a number from 1 to 3"):
            model.get_intermediate_layers_feature(img, n)


def test_two_models_can_be_built_from_one_config():
    """The constructor does not change the config. (The released training code removes fields from
    it, so a second model cannot be built.)"""
    config = VTPConfig(**TINY)
    first = VTPModel(config)
    second = VTPModel(config)
    assert first.state_dict().keys() == second.state_dict().keys()
    assert config == VTPConfig(**TINY)


def test_using_an_absent_part_raises_an_error_that_names_it():
    model = tiny(train_clip=False, train_reconstruction=False)
    img = torch.randn(1, 3, 16, 16)
    text = torch.ones(1, 10, dtype=torch.long)
    decoder = "no pixel decoder: it was made with train_reconstruction false"
    with pytest.raises(ValueError, match=decoder):
        model.get_latents_decoded_images(img)
    with pytest.raises(ValueError, match="no CLIP side: it was made with train_clip false"):
        model.get_clip_image_feature(img)
    with pytest.raises(ValueError, match="no text tower: it was made with train_clip false"):
        model.get_clip_text_feature(text)


def test_without_attention_each_latent_depends_on_the_patch_at_its_own_position_only():
    """So the rows and columns of the latents are those of the image."""
    model = tiny(vision_depth=1)
    img = torch.zeros(1, 3, 16, 24)
    model.trunk.blocks[0].attn.proj.weight.zero_()             # no attention between patches
    other = img.clone()
    other[..., 8:16, 16:24] = 1                                # patch (1, 2)
    change = model.get_reconstruction_latents(other) - model.get_reconstruction_latents(img)
    assert (change.abs().amax(1)[0] > 0).nonzero().tolist() == [[1, 2]]


def test_latents_as_wide_as_the_trunk_need_no_bottleneck():
    model = tiny(vision_feature_bottleneck=None)
    assert not any("bottleneck" in name for name in model.state_dict())
    assert model.get_reconstruction_latents(torch.randn(1, 3, 16, 16)).shape == (1, 32, 2, 2)


def test_clip_can_read_the_mean_of_the_patches_after_the_bottleneck():
    model = tiny(vision_bottleneck_ae_only=False, vision_clip_feat="pooled")
    img = torch.randn(2, 3, 16, 16)
    patches = model.get_last_layer_feature(img, use_bottleneck=True)["patch_tokens"]
    found = model.get_clip_image_feature(img, normalize=False)
    assert model.feature_dim == 6
    assert torch.allclose(found, model.visual_proj(patches.mean(1)), atol=1e-6)


def test_clip_starts_at_temperature_0_07():
    assert math.isclose(tiny().logit_scale.exp(), 1 / 0.07, rel_tol=1e-6)
    assert tiny().logit_bias is None
    assert tiny(init_logit_bias=-10.0, nonscalar_logit_scale=True).logit_bias.tolist() == [-10.0]


# ---------------------------------------------------------------- files
def test_saving_and_loading_a_model_changes_no_bit(tmp_path):
    model = tiny(init_logit_bias=-10.0)
    model.save_pretrained(tmp_path / "a" / "b")
    loaded = VTPModel.from_pretrained(tmp_path / "a" / "b")
    assert loaded.config == model.config
    assert not loaded.training
    before = model.state_dict()
    after = loaded.state_dict()
    assert before.keys() == after.keys()
    for name, x in before.items():
        assert torch.equal(x, after[name]) and x.dtype == after[name].dtype
    img = torch.randn(1, 3, 16, 16)
    latents = model.get_reconstruction_latents(img)
    assert torch.equal(loaded.get_reconstruction_latents(img), latents)


def test_rope_periods_are_stored_in_bfloat16_as_in_official_files(tmp_path):
    tiny().save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    periods = {name: x.dtype for name, x in tensors.items() if "periods" in name}
    assert periods == {"trunk.rope_embed.periods": torch.bfloat16,
                       "pixel_decoder.rope_embed.periods": torch.bfloat16}


@pytest.mark.parametrize("name", ["vtp_a", "vtp_b", "vtp_p8"])
def test_an_official_checkpoint_that_we_save_again_has_the_same_tensors_and_config(
        golden, name, tmp_path):
    """The tensors have the same keys, types and bits. (The official config.json also contains the
    version of the library that wrote it; ours adds decoder_upscale and rope_dtype.)"""
    skip_without(golden / name)
    VTPModel.from_pretrained(str(golden / name)).save_pretrained(str(tmp_path))
    theirs = safetensors.torch.load_file(golden / name / "model.safetensors")
    ours = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert theirs.keys() == ours.keys()
    for key, x in theirs.items():
        assert x.dtype == ours[key].dtype and torch.equal(x, ours[key])
    theirs = json.loads((golden / name / "config.json").read_text())
    ours = json.loads((tmp_path / "config.json").read_text())
    assert theirs.keys() - ours.keys() == {"transformers_version"}
    assert ours.keys() - theirs.keys() == {"decoder_upscale", "rope_dtype"}
    assert all(ours[key] == value for key, value in theirs.items() if key in ours)
    # the official class has no such fields and always behaves like these values
    assert (ours["decoder_upscale"], ours["rope_dtype"]) == (16, "bfloat16")


def test_unknown_fields_of_config_json_are_ignored_and_rope_dtype_can_be_overridden(tmp_path):
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
    """Two images and two texts -> list of the outputs of all methods that this model supports"""
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


# Fields in which a config differs from TINY. All names of layers, norms and poolings occur.
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
def test_every_config_field_works_and_saving_and_loading_changes_no_bit(fields, tmp_path):
    model = tiny(**fields)
    for p in model.parameters():           # initial zeros or ones could hide a missing tensor
        p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(tmp_path)
    loaded = VTPModel.from_pretrained(tmp_path)
    assert loaded.config == model.config
    for a, b in zip(all_outputs(model), all_outputs(loaded), strict=True):
        assert torch.equal(a, b) and a.isfinite().all()


@pytest.mark.parametrize("field, part", [("vision_init_values", "trunk"),
                                         ("decoder_init_values", "pixel_decoder"),
                                         ("text_ls_init_value", "text_transformer")])
def test_layer_scale_is_absent_for_an_initial_value_of_0_and_changes_nothing_for_1(field, part):
    off = tiny()
    zero = tiny(**{field: 0.0})
    one = tiny(**{field: 1.0})
    assert zero.state_dict().keys() == off.state_dict().keys()
    gammas = one.state_dict().keys() - off.state_dict().keys()
    assert gammas
    assert all(name.startswith(part) and name.endswith("gamma") for name in gammas)
    one.load_state_dict(off.state_dict(), strict=False)
    assert all(map(torch.equal, all_outputs(off), all_outputs(one)))


@pytest.mark.parametrize("fields, sentence", [
    ({"vision_ffn_layer": "geglu"},
     'vision_ffn_layer is "geglu", but it must be one of mlp, swiglu'),
    ({"decoder_ffn_layer": "none"}, "decoder_ffn_layer .* must be one of"),
    ({"vision_norm_layer": "batchnorm"}, "vision_norm_layer .* layernorm"),
    ({"decoder_norm_layer": None}, "decoder_norm_layer is null, but it must be a string"),
    ({"vision_num_heads": 3},
     "vision_num_heads is 3, but it must be a divisor of vision_embed_dim, which is 32"),
    ({"text_num_heads": 5}, "text_num_heads is 5"),
    ({"decoder_num_heads": 16}, "decoder_num_heads is 16, .* a multiple of 4 channels"),
    ({"vision_depth": 0}, "vision_depth is 0, but it must be an integer above 0"),
    ({"vision_depth": "12"}, 'vision_depth is "12", but it must be an integer'),
    ({"train_clip": "false"}, 'train_clip is "false", but it must be true or false'),
    ({"vision_depth": True}, "vision_depth is true, but it must be an integer"),
    ({"text_quick_gelu": 1}, "text_quick_gelu is 1, but it must be true or false"),
    ({"vision_feature_bottleneck": 0}, "vision_feature_bottleneck is 0, .* or null"),
    ({"vision_clip_feat": "avgpool"}, "must be cls or pooled"),
    ({"text_embed_cls": True}, "text_embed_cls is true, but it must be false"),
    ({"text_pool_type": "mean"}, "text_pool_type .* argmax, first, last, none"),
    ({"rope_dtype": "float16"}, 'rope_dtype is "float16", but it must be bfloat16'),
    ({"decoder_upscale": 0}, "decoder_upscale is 0"),
    ({"vision_mlp_ratio": 0.0}, "vision_mlp_ratio is 0.0, but it must be a number above 0"),
    ({"init_logit_scale": "log"}, "init_logit_scale .* a number or null"),
])
def test_an_invalid_config_field_raises_an_error_that_names_it(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        VTPConfig(**TINY | fields)


def test_fields_of_absent_parts_are_not_checked():
    assert VTPConfig(**TINY | {"train_clip": False, "text_num_heads": 5, "text_pool_type": "mean",
                               "vision_clip_feat": "avgpool"})
    assert VTPConfig(**TINY | {"train_reconstruction": False, "decoder_ffn_layer": "geglu",
                               "decoder_num_heads": 5})


def test_an_absent_config_field_has_the_official_default(tmp_path):
    tiny(train_clip=False).save_pretrained(tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    for name in ("model_type", "vision_ffn_layer", "text_depth", "vision_mlp_ratio"):
        del found[name]
    (tmp_path / "config.json").write_text(json.dumps(found))
    wanted = VTPConfig(**TINY | {"train_clip": False, "text_depth": 12})
    assert VTPModel.from_pretrained(tmp_path).config == wanted


def damage(tensors):
    """-> a copy of the tensors in which one is missing, two are unexpected and one is transposed"""
    tensors = dict(tensors, other_a=torch.zeros(1), other_b=torch.zeros(1))
    tensors["visual_proj.weight"] = tensors["visual_proj.weight"].T.contiguous()
    del tensors["trunk.cls_token"]
    return tensors


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 567\n"


def half(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


@pytest.mark.parametrize("file, content, sentence", [
    ("config.json", "{not json", "cannot be read .* wanted the config.json of a VTP model"),
    ("config.json", "[1, 2]", "holds a list.* wanted"),
    ("config.json", '{"model_type": "clip"}', "has model_type 'clip'; wanted .* 'vtp'"),
    ("config.json", '{"vision_depth": -1}', "config.json: .* vision_depth is -1"),
    ("config.json", '{"vision_depth": "four"}', "config.json: .* vision_depth is .four"),
    ("config.json", "", "config.json cannot be read .*empty"),
    ("config.json", "\0" * 500, "config.json cannot be read .*zeros, as after a power failure"),
    ("config.json", LFS_POINTER, "config.json cannot be read .*git lfs pull"),
    ("model.safetensors", "rubbish",
     "model.safetensors cannot be read .* copy or download it again"),
    ("model.safetensors", "", "model.safetensors cannot be read .*empty"),
    ("model.safetensors", "\0" * 500, "model.safetensors cannot be read .*zeros"),
    ("model.safetensors", LFS_POINTER, "model.safetensors cannot be read .*git lfs pull"),
    ("model.safetensors", half, "model.safetensors cannot be read"),
    ("model.safetensors", None, "model.safetensors is missing"),
    ("model.safetensors", damage,
     "does not match the config.json beside it; take both files from the same model.*"
     "Missing.*trunk.cls_token.*Unexpected.*other_a.*other_b.*size mismatch for "
     "visual_proj.weight"),
])
def test_a_damaged_file_or_the_file_of_another_model_raises_an_error_that_explains_it(
        file, content, sentence, tmp_path):
    tiny().save_pretrained(tmp_path)
    if content is damage:
        tensors = damage(safetensors.torch.load_file(tmp_path / file))
        safetensors.torch.save_file(tensors, tmp_path / file)
    elif content is half:
        half(tmp_path / file)
    elif content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content)
    error = FileNotFoundError if content is None else ValueError
    with pytest.raises(error, match=sentence):
        VTPModel.from_pretrained(tmp_path)


def test_a_folder_without_a_model_raises_an_error_that_lists_the_wanted_files(tmp_path):
    sentence = "wanted a folder with config.json and model.safetensors"
    with pytest.raises(FileNotFoundError, match=sentence):
        VTPModel.from_pretrained(tmp_path)


# ---------------------------------------------------------------- DINO head
def test_dino_logits_are_cosines_times_the_length_of_the_prototype():
    head = DINOHead(16, K=50, hidden=32, bottleneck=8)
    logits = head(100 * torch.randn(64, 16))
    assert logits.abs().max() <= 1 + 1e-6                      # lengths start at 1
    head.last_layer.weight_g.fill_(3.0)
    x = torch.ones(1, 16)
    cosines = F.linear(F.normalize(head.mlp(x), dim=-1),
                       F.normalize(head.last_layer.weight_v, dim=-1))
    assert torch.allclose(head(x) / 3, cosines, atol=1e-6)
    head.last_layer.weight_v.mul_(7)                           # only the direction has an effect
    assert head(100 * torch.randn(64, 16)).abs().max() <= 3 + 1e-5


def test_embeddings_of_the_dino_head_are_unit_vectors():
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
    """-> list of (parameter of the teacher, corresponding parameter of the student)"""
    student_module = {"trunk": "model.trunk", "proj": "model.visual_proj",
                      "dino_head": "dino_head"}
    named = dict(student.named_parameters())
    pairs = []
    for name, p in teacher.named_parameters():
        module, _, rest = name.partition(".")
        pairs.append((p, named[f"{student_module[module]}.{rest}"]))
    return pairs


@pytest.mark.parametrize("fields", [
    {}, {"vision_bottleneck_ae_only": False}, {"train_clip": False}])
def test_the_teacher_starts_as_a_copy_of_the_student(fields):
    student, teacher = student_and_teacher(**fields)
    for t, s in parameter_pairs(student, teacher):
        assert torch.equal(t, s)
        assert t.data_ptr() != s.data_ptr()                    # a copy, not the same memory
    assert student.training and not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("momentum", [1.0, 0.5, 0.0])
def test_an_update_sets_the_teacher_to_the_weighted_mean_of_teacher_and_student(momentum):
    """With momentum 1 it does not change, with momentum 0 it becomes equal to the student. The
    student does not change."""
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
NO_DROP = dict.fromkeys(("image", "ssl", "local"))              # None: no stochastic depth


def make_batch(Bs=2, V=3):
    """The fields of data.Batch that the student reads: 4 images, Bs of them with crops"""
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


def test_views_returns_the_dino_logits_of_all_class_tokens_and_of_masked_patches():
    """One call of the head for all tokens gives the same logits as a call for each crop."""
    student, _ = student_and_teacher()
    batch = make_batch()
    logits, patch_logits, features = views(student, batch)
    M = batch.mask.sum()
    assert logits.shape == (5, 2, 20)                          # (2+V, Bs, K)
    assert patch_logits.shape == (M, 20)
    assert features.shape == (2, 2, 32)                        # (2, Bs, D)
    trunk, head = student.model.trunk, student.dino_head
    masked = []
    for crop in range(2):
        cls, patches = trunk(batch.crops[crop], batch.mask[crop])
        assert torch.allclose(features[crop], cls, atol=1e-6)
        assert torch.allclose(logits[crop], head(cls), atol=1e-6)
        masked.append(patches[batch.mask[crop]])
    assert torch.allclose(patch_logits, head(torch.cat(masked)), atol=1e-6)
    for v in range(3):
        assert torch.allclose(logits[2 + v], head(trunk(batch.locals[v])[0]), atol=1e-6)


def test_the_dino_head_reads_the_full_width_or_the_latent_channels():
    x = torch.randn(5, 32)
    assert head_input(tiny().trunk, tiny().config, x) is x
    model = tiny(vision_bottleneck_ae_only=False)
    assert torch.equal(head_input(model.trunk, model.config, x), model.trunk.feature_bottleneck(x))
    student, teacher = student_and_teacher(vision_bottleneck_ae_only=False)
    batch = make_batch()
    assert views(student, batch)[0].shape == (5, 2, 20)
    assert teacher(batch.crops, batch.mask_index)[0].shape == (2, 2, 20)


def test_self_distillation_without_local_crops_has_logits_of_the_two_global_crops():
    student, _ = student_and_teacher()
    batch = make_batch()
    batch.locals = batch.locals[:0]
    assert views(student, batch)[0].shape == (2, 2, 20)


def test_student_and_teacher_agree_on_crops_without_a_mask():
    student, teacher = student_and_teacher()
    batch = make_batch()
    batch.mask = torch.zeros(2, 2, 16, dtype=torch.bool)
    all_patches = torch.arange(2 * 2 * 16)                     # logits of all patches
    logits, patch_logits, _ = student.views(batch.crops, batch.locals, batch.mask, all_patches,
                                            batch.keep)
    wanted, patch_wanted = teacher(batch.crops, all_patches)
    assert torch.allclose(logits[:2], wanted, atol=1e-6)
    assert torch.allclose(patch_logits, patch_wanted, atol=1e-6)


def test_the_teacher_sees_the_masked_patches_and_the_student_does_not():
    student, teacher = student_and_teacher()
    student.model.trunk.mask_token.normal_()
    batch = make_batch()
    _, patch_logits, _ = views(student, batch)
    _, patch_wanted = teacher(batch.crops, batch.mask_index)
    assert patch_wanted.shape == patch_logits.shape
    assert not torch.allclose(patch_logits, patch_wanted, atol=1e-3)
    # other pixels in the masked patches change the teacher's logits
    batch.crops = batch.crops.flip(-1)
    assert not torch.allclose(teacher(batch.crops, batch.mask_index)[1], patch_wanted, atol=1e-3)


def test_embeddings_and_pixels_in_training_equal_those_of_the_public_methods():
    student, _ = student_and_teacher()
    batch = make_batch()
    model = student.model
    cls, patches = student.encode(batch.image)
    img = student.embed_image(cls, patches)
    txt = student.embed_text(batch.text)
    pixels = student.decode(student.rec_patches(batch, patches))
    assert torch.allclose(img, model.get_clip_image_feature(batch.image), atol=1e-5)
    assert torch.allclose(txt, model.get_clip_text_feature(batch.text), atol=1e-5)
    latents = model.get_reconstruction_latents(batch.image[[0, 2]])
    assert torch.allclose(pixels, model.get_latents_decoded_images(latents), atol=1e-5)


def test_a_separate_stochastic_depth_for_reconstruction_needs_a_separate_forward_pass():
    student, _ = student_and_teacher()
    batch = make_batch()
    _, patches = student.encode(batch.image)
    assert torch.equal(student.rec_patches(batch, patches), patches[[0, 2]])
    kept = torch.tensor([1]), 2.0                              # the second of the two images
    batch.keep["rec"] = [(kept, kept)] * 2                     # in both branches of both blocks
    found = student.rec_patches(batch, patches)
    assert torch.equal(found, student.encode(batch.image[[0, 2]], batch.keep["rec"])[1])
    assert not torch.allclose(found, patches[[0, 2]], atol=1e-3)


def test_training_normalises_clip_features_in_float32_under_bfloat16_autocast():
    """In bfloat16, their lengths would be from 0.999 to 1.0015. The public methods return the type
    that autocast gives, as the official code does."""
    student, _ = student_and_teacher()
    image = torch.randn(64, 3, 32, 32)
    text = torch.randint(1, 64, (64, 7))
    with torch.autocast("cpu", torch.bfloat16):
        img = student.embed_image(*student.encode(image))
        txt = student.embed_text(text)
        public = student.model.get_clip_text_feature(text)
        raw = student.model.get_clip_text_feature(text, normalize=False)
    assert torch.equal(txt, F.normalize(raw.float(), dim=-1))  # normalised in float32
    for x in (img, txt):
        assert x.dtype == torch.float32
        assert (x.double().norm(dim=-1) - 1).abs().max() < 1e-6
    assert public.dtype == torch.bfloat16


def test_the_decoded_pixels_depend_on_the_image_only_through_the_latents():
    student, _ = student_and_teacher()
    student.model.trunk.feature_bottleneck.weight.zero_()
    cls, patches = student.encode(make_batch().image)
    pixels = student.decode(patches)
    img = student.embed_image(cls, patches)
    assert torch.equal(pixels[0], pixels[1])                   # all latents are zero
    assert not torch.equal(img[0], img[1])                     # CLIP reads the full width


def test_the_logarithm_of_the_logit_scale_is_clamped_to_values_from_0_to_ln_100():
    student, _ = student_and_teacher()
    for value, wanted in ((9.0, math.log(100)), (2.0, 2.0), (-1.0, 0.0)):
        student.model.logit_scale.fill_(value)
        student.clamp_logit_scale()
        assert math.isclose(student.model.logit_scale, wanted, rel_tol=1e-6)
    Student(tiny(train_clip=False)).clamp_logit_scale()        # without CLIP: no error


# all combinations of the three objectives, except that all are off
OBJECTIVES = list(itertools.product((0, 1), repeat=3))[1:]


@pytest.mark.parametrize("clip, ssl, rec", OBJECTIVES)
def test_exactly_the_parameters_that_the_objectives_use_have_gradients(clip, ssl, rec):
    """Only self-distillation uses the mask token; only reconstruction uses the bottleneck."""
    model = tiny(train_clip=bool(clip), train_reconstruction=bool(rec))
    head = DINOHead(32, K=20, hidden=16, bottleneck=8) if ssl else None
    student = Student(model, head)
    batch = make_batch()
    out = []
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
