"""The whole model: official layout and numbers, the Quick Start's methods, DINO head, teacher, student."""
import hashlib
import inspect
import json
import math

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from vtp_min import SIZES, VTPConfig, VTPModel
from vtp_min.baselines import LDM
from vtp_min.model import DINOHead, Student, Teacher

TINY = dict(image_size=32, vision_patch_size=8, vision_embed_dim=32, vision_depth=2, vision_num_heads=2, vision_use_qk_norm=True, vision_feature_bottleneck=6,
            text_context_length=10, text_vocab_size=64, text_embed_dim=24, text_num_heads=3, text_depth=1, decoder_embed_dim=32, decoder_num_heads=2,
            decoder_depth=1, decoder_upscale=8, rope_dtype="float32")


def tiny(**fields):
    torch.manual_seed(0)
    return VTPModel(VTPConfig(**TINY | fields)).eval()


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


# ---------------------------------------------------------------- against the official code
def outputs(model, io, exact):
    """Every stored name -> ours. The decoder is given the stored latents, so that its own error shows."""
    for image, at in (("image", ""), ("image_nonsquare", "@nonsquare")):
        img = torch.from_numpy(io[image])
        for name, squeezed in (("last", False), ("last_bottleneck", True)):
            for token, x in model.get_last_layer_feature(img, use_bottleneck=squeezed).items():
                yield f"{name}.{token}{at}", x
        for i, (patches, cls) in enumerate(model.get_intermediate_layers_feature(img, n=2, return_class_token=True)):
            yield f"inter_n2.{i}.patch_tokens{at}", patches
            yield f"inter_n2.{i}.cls_token{at}", cls
        for i, x in enumerate(model.get_intermediate_layers_feature(img, [0, model.config.vision_depth - 1], reshape=True, norm=False)):
            yield f"inter_list_reshape_nonorm.{i}{at}", x
        yield f"latents{at}", model.get_reconstruction_latents(img)
        stored = "rope_fp32.latents" if exact and not at else f"latents{at}"
        yield f"decoded{at}", model.get_latents_decoded_images(torch.from_numpy(io[stored]))
        if model.config.train_clip:
            text = torch.from_numpy(io["text"]).long()
            to_txt, to_img = model.get_clip_logits(img, text)
            yield from {f"clip_image_feature{at}": model.get_clip_image_feature(img, normalize=True), f"clip_logits_image{at}": to_txt,
                        f"clip_image_feature_unnormalized{at}": model.get_clip_image_feature(img, normalize=False), f"clip_logits_text{at}": to_img,
                        "clip_text_feature": model.get_clip_text_feature(text, normalize=True),
                        "clip_text_feature_unnormalized": model.get_clip_text_feature(text, normalize=False)}.items()
    img, mask = torch.from_numpy(io["image"]), torch.from_numpy(io["mask"])
    cls, patches = model.trunk(img, mask=mask)
    *_, prenorm = model.trunk.layers(img, mask=mask)
    yield from {"masked.x_norm_clstoken": cls, "masked.x_norm_patchtokens": patches, "masked.x_prenorm": prenorm}.items()
    yield "decoded_random_3x5", model.get_latents_decoded_images(torch.from_numpy(io["latents_random_3x5"]))


#            largest and mean difference with bfloat16 RoPE, where one rounding may flip; largest with float32 RoPE
LIMITS = {"clip_text_feature_unnormalized": (5e-6,) * 3, "clip_text_feature": (1e-6,) * 3, "clip_image_feature_unnormalized": (5e-3, 1e-3, 1e-5),
          "clip_image_feature": (3e-4, 3e-4, 2e-6), "clip_logits": (2e-3, 2e-3, 1e-5), "decoded": (3e-3, 1e-4, 8e-6), "": (1e-2, 3e-4, 1e-5)}


@pytest.mark.parametrize("name", ["vtp_a", "vtp_b", "vtp_p8"])
@pytest.mark.parametrize("exact", [False, True], ids=["bfloat16 RoPE", "float32 RoPE"])
def test_an_official_checkpoint_gives_the_official_outputs(golden, name, exact):
    if not (golden / name).exists():
        pytest.skip(f"{name} is one of the full golden sets only")
    io, met = np.load(golden / name / "io.npz"), set()
    prefix = "rope_fp32." if exact else ""
    for key, x in outputs(VTPModel.from_pretrained(golden / name, rope_dtype=torch.float32 if exact else None), io, exact):
        if prefix + key in io:
            off = np.abs(io[prefix + key] - x.numpy())
            largest, mean, largest_exact = next(v for k, v in LIMITS.items() if key.startswith(k))
            assert off.max() <= (largest_exact if exact else largest) and off.mean() <= mean, (key, off.max(), off.mean())
            met.add(prefix + key)
    stored = {k for k in io.files if k.startswith("rope_fp32.") == exact and "rope." not in k and not k.startswith("trace.")}
    assert stored - met <= {"image", "image_nonsquare", "text", "mask", "latents_random_3x5"}


@pytest.mark.parametrize("name", ["vtp_a", "vtp_b"])
@pytest.mark.parametrize("exact", [False, True], ids=["bfloat16 RoPE", "float32 RoPE"])
def test_forward_gives_the_official_outputs_of_each_type(golden, name, exact):
    """forward only combines the methods, so the arrays stored for the methods are its outputs."""
    if not (golden / name).exists():
        pytest.skip(f"{name} is one of the full golden sets only")
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


def ssl_student(folder, rope_dtype):
    """The training model of the released code -> our Student with its weights, and all of them under our names"""
    def ours(key):
        names = {"transformer.": "text_transformer.", "proj.": "visual_proj."}
        key = next((new + key.removeprefix(old) for old, new in names.items() if key.startswith(old)), key)
        return key if key.startswith(("dino_head.", "teacher_")) else "model." + key
    state = {ours(k): v for k, v in safetensors.torch.load_file(folder / "state.safetensors").items()}
    config = VTPConfig(image_size=64, vision_embed_dim=64, vision_depth=2, vision_num_heads=2, vision_use_qk_norm=True, vision_feature_bottleneck=16,
                       text_context_length=12, text_vocab_size=256, text_embed_dim=48, text_num_heads=3, text_depth=2, decoder_embed_dim=64, decoder_num_heads=2,
                       decoder_depth=1, rope_dtype=rope_dtype, train_reconstruction=any("pixel_decoder" in k for k in state))
    student = Student(VTPModel(config), DINOHead(64, K=256, hidden=96, bottleneck=32)).eval()
    student.load_state_dict({k: v for k, v in state.items() if not k.startswith("teacher_")})
    return student, state


def ssl_teacher(student, state):
    teacher = Teacher(student)
    teacher.load_state_dict({k.removeprefix("teacher_"): v for k, v in state.items() if k.startswith("teacher_")})
    return teacher


def ssl_outputs(student, state, io):
    """Every stored name -> ours: the student's outputs, without and with stochastic depth (the reference's draws), and the teacher's"""
    def named(kind, out):
        yield from {f"{kind}_global_cls_tokens_after_head": out["cls"][:2].flatten(0, 1), f"{kind}_local_cls_tokens_after_head": out["cls"][2:].flatten(0, 1),
                    f"{kind}_global_masked_patch_tokens_after_head": out["patch"], f"{kind}_global_cls_tokens": out["tokens"].flatten(0, 1)}.items()

    def drawn(which):                                                                      # handed to our blocks
        return lambda i: [(torch.from_numpy(io[f"drop.block{i}.{branch}.{which}.index"]), float(io[f"drop.block{i}.{branch}.{which}.scale"]))
                          for branch in ("attn", "ffn")]

    crops, locals, mask = (torch.from_numpy(io[k]) for k in ("global_crops", "local_crops", "masks"))
    batch = {"crops": crops.unflatten(0, (2, -1)), "locals": locals.unflatten(0, (4, -1)), "mask": mask.unflatten(0, (2, -1))}
    yield from named("student.student", student(batch, {"ssl": None, "local": None}))
    yield from named("drop.student.student", student(batch, {"ssl": drawn("global"), "local": drawn("local")}))
    out = ssl_teacher(student, state)(batch["crops"], batch["mask"])
    yield "teacher.teacher_cls_tokens_after_head", out["cls"].flip(0).flatten(0, 1)        # theirs are swapped
    yield "teacher.masked_teacher_patch_tokens_after_head", out["patch"]


@pytest.mark.parametrize("rope_dtype", ["bfloat16", "float32"])
def test_student_and_teacher_give_the_released_training_code_s_outputs(golden, rope_dtype):
    student, state = ssl_student(golden / "vtp_ssl", rope_dtype)
    io, met, prefix = np.load(golden / "vtp_ssl" / "io.npz"), set(), "rope_fp32." if rope_dtype == "float32" else ""
    for key, x in ssl_outputs(student, state, io):
        off = np.abs(io[prefix + key] - x.numpy())
        assert off.max() < (5e-6 if prefix else 2e-3) and off.mean() < 1e-4, (key, off.max())
        met.add(prefix + key)
    stored = {k for k in io.files if k.startswith((f"{prefix}student.", f"{prefix}teacher.", f"{prefix}drop.student."))}
    assert stored and stored <= met


def test_head_and_clip_of_the_released_training_code_are_met(golden):
    student, _ = ssl_student(golden / "vtp_ssl", "bfloat16")
    io = {k: torch.from_numpy(v) for k, v in np.load(golden / "vtp_ssl" / "io.npz").items()}
    assert torch.allclose(student.dino_head(io["head.input"]), io["head.output"], rtol=0, atol=1e-6)
    assert torch.allclose(student.model.get_clip_text_feature(io["clip.text"].long(), normalize=True), io["clip.text_features"], rtol=0, atol=1e-6)
    assert torch.allclose(student.model.get_clip_image_feature(io["clip.image"], normalize=True), io["clip.image_features"], rtol=0, atol=3e-4)
    assert torch.allclose(student.model.get_clip_logits(io["clip.image"], io["clip.text"].long())[0], io["clip.logits"], rtol=0, atol=2e-3)


def test_the_moving_average_is_the_released_code_s_bit_for_bit(golden):
    student, state = ssl_student(golden / "vtp_ssl", "bfloat16")
    teacher, wanted = ssl_teacher(student, state), json.loads((golden / "vtp_ssl" / "ema.json").read_text())
    teacher.follow(student, wanted["momentum"])
    for name, p in teacher.named_parameters():
        assert hashlib.sha256(p.numpy().tobytes()).hexdigest() == wanted["tensors"]["teacher_" + name]["sha256_f32le"], name


# ---------------------------------------------------------------- sizes
@pytest.mark.parametrize("size, trunk, decoder", [("S", 21.612, 21.621), ("B", 85.690, 85.709), ("L", 303.543, 303.591)])
def test_the_paper_s_sizes_have_their_parameters(size, trunk, decoder):
    with torch.device("meta"):
        model = VTPModel(VTPConfig.of_size(size))
        light = VTPModel(VTPConfig.of_size(size, clip=False, light_decoder=True)).pixel_decoder
    def count(m, but=()):
        return sum(p.numel() for k, p in m.named_parameters() if not k.endswith(but)) / 1e6
    norms = ("q_norm.weight", "k_norm.weight")                                             # counted apart: the table is without them
    assert round(count(model.trunk, norms), 3) == trunk and round(count(model.pixel_decoder, norms), 3) == decoder
    assert round(count(light, norms), 2) == 51.31
    text = sum(p.numel() for k, p in model.named_parameters() if k.startswith(("text", "token", "pos", "ln_final"))) / 1e6
    assert round(text, 2) == 123.65


def test_every_size_has_whole_heads_and_the_paper_s_defaults():
    for size in SIZES:
        c = VTPConfig.of_size(size)
        assert c.vision_embed_dim % c.vision_num_heads == c.text_embed_dim % c.text_num_heads == 0
        assert (c.vision_patch_size, c.vision_feature_bottleneck, c.vision_use_qk_norm, c.rope_dtype) == (16, 64, True, "float32")


def test_an_unknown_size_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="pico, nano, micro, S, B, L"):
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
    assert clip["logit_scale"] == model.logit_scale.exp() and clip["logit_bias"] is model.logit_bias
    rec = model(image, forward_type="rec")
    assert list(rec) == ["latents", "reconstructed_image", "target_image"]
    assert torch.equal(rec["latents"], model.get_reconstruction_latents(image))
    decoded = model.get_latents_decoded_images(rec["latents"])
    assert torch.equal(rec["reconstructed_image"], decoded) and rec["target_image"] is image
    feature = model(image, forward_type="feature")
    wanted = model.get_last_layer_feature(image, use_bottleneck=True)
    assert list(feature) == ["cls_token", "patch_tokens"]
    assert all(torch.equal(feature[key], wanted[key]) for key in wanted)


def test_forward_leaves_out_the_clip_features_of_what_it_is_not_given():
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


# ---------------------------------------------------------------- the Quick Start's methods
def test_methods_have_the_quick_start_s_shapes():
    model, img, text = tiny(), torch.randn(2, 3, 16, 24), torch.randint(1, 64, (5, 10))     # 2 x 3 patches
    z = model.get_reconstruction_latents(img)
    assert z.shape == (2, 6, 2, 3) and model.get_latents_decoded_images(z).shape == img.shape
    assert model.get_clip_image_feature(img, normalize=True).shape == (2, 24) and model.get_clip_text_feature(text, normalize=False).shape == (5, 24)
    to_txt, to_img = model.get_clip_logits(img, text)
    assert to_txt.shape == (2, 5) and torch.equal(to_img, to_txt.T)
    last, squeezed = model.get_last_layer_feature(img), model.get_last_layer_feature(img, use_bottleneck=True)
    assert last["cls_token"].shape == (2, 32) and last["patch_tokens"].shape == (2, 6, 32) and squeezed["patch_tokens"].shape == (2, 6, 6)
    (patches, cls), = model.get_intermediate_layers_feature(img, n=1, reshape=True, return_class_token=True)
    assert patches.shape == (2, 32, 2, 3) and cls.shape == (2, 32)


def test_methods_that_should_agree_agree():
    model, img = tiny(), torch.randn(2, 3, 16, 24)
    last = model.get_last_layer_feature(img, use_bottleneck=True)["patch_tokens"]
    assert torch.equal(model.get_reconstruction_latents(img).flatten(2).transpose(1, 2), last)
    assert torch.equal(model.get_intermediate_layers_feature(img)[0], model.get_last_layer_feature(img)["patch_tokens"])
    both, second = model.get_intermediate_layers_feature(img, n=2), model.get_intermediate_layers_feature(img, n=[1])
    assert len(both) == 2 and torch.equal(both[1], second[0])


def test_intermediate_layers_come_in_the_order_of_the_blocks_and_must_exist():
    model, img = tiny(vision_depth=3), torch.randn(1, 3, 16, 24)
    pairs = model.get_intermediate_layers_feature(img, n=[2, 0], return_class_token=True)
    alone = model.get_intermediate_layers_feature(img, n=(0, 2))
    assert torch.equal(pairs[0][0], alone[0]) and torch.equal(pairs[1][0], alone[1]) and torch.equal(pairs[1][1], model.get_last_layer_feature(img)["cls_token"])
    raw, = model.get_intermediate_layers_feature(img, norm=False)
    assert torch.equal(model.trunk.norm(raw), alone[1]) and not torch.equal(raw, alone[1])
    for n in (0, 4, -1, [3], [-1], []):
        with pytest.raises(ValueError, match="the trunk has 3 blocks; wanted 1 to 3"):
            model.get_intermediate_layers_feature(img, n)


def test_two_models_can_be_built_from_one_config():
    """(The released training code takes fields out of the config that it is given: its second model fails.)"""
    config = VTPConfig(**TINY)
    assert VTPModel(config).state_dict().keys() == VTPModel(config).state_dict().keys() and config == VTPConfig(**TINY)


def test_a_model_says_which_part_it_has_not():
    model, img = tiny(train_clip=False, train_reconstruction=False), torch.randn(1, 3, 16, 16)
    for ask, sentence in ((lambda: model.get_latents_decoded_images(img), "no pixel decoder: it was made with train_reconstruction false"),
                          (lambda: model.get_clip_image_feature(img), "no CLIP side: it was made with train_clip false"),
                          (lambda: model.get_clip_text_feature(torch.ones(1, 10, dtype=torch.long)), "no text tower")):
        with pytest.raises(ValueError, match=sentence):
            ask()


def test_latents_are_laid_out_as_the_picture():
    model, img = tiny(vision_depth=1), torch.zeros(1, 3, 16, 24)
    model.trunk.blocks[0].attn.proj.weight.zero_()                                          # patches do not look at each other
    other = img.clone()
    other[..., 8:16, 16:24] = 1
    change = (model.get_reconstruction_latents(other) - model.get_reconstruction_latents(img)).abs().amax(1)[0]
    assert (change > 0).nonzero().tolist() == [[1, 2]]


def test_a_latent_as_wide_as_the_trunk_needs_no_bottleneck():
    model = tiny(vision_feature_bottleneck=None)
    assert not any("bottleneck" in k for k in model.state_dict()) and model.get_reconstruction_latents(torch.randn(1, 3, 16, 16)).shape == (1, 32, 2, 2)


def test_clip_may_read_through_the_bottleneck_and_from_the_mean_patch():
    model, img = tiny(vision_bottleneck_ae_only=False, vision_clip_feat="pooled"), torch.randn(2, 3, 16, 16)
    patches = model.get_last_layer_feature(img, use_bottleneck=True)["patch_tokens"]
    assert model.feature_dim == 6 and torch.allclose(model.get_clip_image_feature(img, normalize=False), model.visual_proj(patches.mean(1)), atol=1e-6)


def test_clip_starts_at_a_temperature_of_seven_hundredths():
    assert math.isclose(tiny().logit_scale.exp(), 1 / 0.07, rel_tol=1e-6) and tiny().logit_bias is None
    assert tiny(init_logit_bias=-10.0, nonscalar_logit_scale=True).logit_bias.tolist() == [-10.0]


# ---------------------------------------------------------------- to disk and back
def test_a_round_trip_over_the_disk_changes_no_bit(tmp_path):
    model = tiny(init_logit_bias=-10.0)
    model.save_pretrained(tmp_path / "a" / "b")
    back = VTPModel.from_pretrained(tmp_path / "a" / "b")
    assert back.config == model.config and not back.training
    assert back.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(v, back.state_dict()[k]) and v.dtype == back.state_dict()[k].dtype for k, v in model.state_dict().items())
    img = torch.randn(1, 3, 16, 16)
    assert torch.equal(back.get_reconstruction_latents(img), model.get_reconstruction_latents(img))


def test_periods_lie_on_disk_in_bfloat16_as_in_official_files(tmp_path):
    tiny().save_pretrained(tmp_path)
    periods = {k: v.dtype for k, v in safetensors.torch.load_file(tmp_path / "model.safetensors").items() if "periods" in k}
    assert periods == {"trunk.rope_embed.periods": torch.bfloat16, "pixel_decoder.rope_embed.periods": torch.bfloat16}


@pytest.mark.parametrize("name", ["vtp_a", "vtp_b", "vtp_p8"])
def test_an_official_file_saved_by_us_is_the_same_file(golden, name, tmp_path):
    """Same keys, types, bits. (Their config.json says more about the library that wrote it; ours adds upscale and rope_dtype.)"""
    if not (golden / name).exists():
        pytest.skip(f"{name} is one of the full golden sets only")
    VTPModel.from_pretrained(str(golden / name)).save_pretrained(str(tmp_path))
    theirs, ours = (safetensors.torch.load_file(folder / "model.safetensors") for folder in (golden / name, tmp_path))
    assert theirs.keys() == ours.keys() and all(v.dtype == ours[k].dtype and torch.equal(v, ours[k]) for k, v in theirs.items())
    theirs, ours = (json.loads((folder / "config.json").read_text()) for folder in (golden / name, tmp_path))
    assert theirs.keys() - ours.keys() == {"transformers_version"} and ours.keys() - theirs.keys() == {"decoder_upscale", "rope_dtype"}
    assert all(ours[k] == v for k, v in theirs.items() if k in ours)
    assert (ours["decoder_upscale"], ours["rope_dtype"]) == (16, "bfloat16")                # what the official class always does


def test_unknown_fields_of_config_json_are_ignored_and_rope_can_be_chosen(tmp_path):
    tiny().save_pretrained(tmp_path)
    found = json.loads((tmp_path / "config.json").read_text()) | {"transformers_version": "9.9", "torch_dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(found))
    assert VTPModel.from_pretrained(tmp_path).trunk.rope_embed.dtype == torch.float32
    assert VTPModel.from_pretrained(tmp_path, rope_dtype=torch.bfloat16).pixel_decoder.rope_embed.dtype == torch.bfloat16
    assert VTPModel.from_pretrained(tmp_path, rope_dtype="bfloat16").config.rope_dtype == "bfloat16"


def everything(model):
    """All that a model can say of two pictures and two texts, as far as it has the parts"""
    g = torch.Generator().manual_seed(1)
    img, text = torch.randn(2, 3, 16, 24, generator=g), torch.randint(1, 64, (2, 10), generator=g)
    out = [*model.get_last_layer_feature(img).values(), *model.get_intermediate_layers_feature(img, n=2), z := model.get_reconstruction_latents(img)]
    out += [model.get_latents_decoded_images(z)] if model.config.train_reconstruction else []
    out += [model.get_clip_image_feature(img, normalize=False), model.get_clip_text_feature(text, normalize=False)] if model.config.train_clip else []
    return out + ([model.get_clip_logits(img, text)[0]] if model.config.train_clip and model.config.text_pool_type != "none" else [])


FIELDS = [{f"{part}_ffn_layer": ffn} for part in ("vision", "decoder") for ffn in ("mlp", "swiglu", "swiglu32", "swiglu64", "swiglu128")]
FIELDS += [{f"{part}_norm_layer": norm} for part in ("vision", "decoder") for norm in ("layernorm", "layernormbf16", "rmsnorm")]
FIELDS += [{f"{part}_init_values": value} for part in ("vision", "decoder") for value in (0.1, 1)] + [{"text_ls_init_value": 0.1}]
FIELDS += [{"vision_use_qk_norm": v, "decoder_use_qk_norm": d} for v in (False, True) for d in (False, True)]
FIELDS += [{"vision_bottleneck_ae_only": a, "vision_clip_feat": f, "vision_feature_bottleneck": d}
           for a in (False, True) for f in ("cls", "pooled") for d in (6, 32, None)]
FIELDS += [{"text_pool_type": p, "text_proj_type": t, "text_proj_bias": b}
           for p in ("argmax", "first", "last", "none") for t, b in (("none", True), ("mlp", False), ("linear", True))]
FIELDS += [{"text_quick_gelu": True}, {"text_no_causal_mask": True}, {"text_output_tokens": True, "text_pad_id": 3, "image_size": 7},
           {"text_mlp_ratio": 2, "vision_mlp_ratio": 3}, {"decoder_upscale": 16}, {"rope_dtype": "bfloat16"}]
FIELDS += [{"init_logit_bias": -10.0}, {"init_logit_bias": 0, "init_logit_scale": 0.0},
           {"nonscalar_logit_scale": True, "init_logit_bias": -10.0, "init_logit_scale": 1.5}]
FIELDS += [{"train_clip": False}, {"train_reconstruction": False}, {"train_clip": False, "train_reconstruction": False}]


@pytest.mark.parametrize("fields", FIELDS, ids=lambda fields: "-".join(f"{k}={v}" for k, v in fields.items()))
def test_every_field_works_and_survives_the_disk_to_the_bit(fields, tmp_path):
    model = tiny(**fields)
    for p in model.parameters():
        p.add_(0.1 * torch.randn_like(p))                                                   # no zeros or ones that could hide a missing tensor
    model.save_pretrained(tmp_path)
    back = VTPModel.from_pretrained(tmp_path)
    before, after = everything(model), everything(back)
    assert back.config == model.config and len(before) == len(after) and all(map(torch.equal, before, after)) and all(x.isfinite().all() for x in before)


@pytest.mark.parametrize("part, names", [("vision_init_values", "trunk"), ("decoder_init_values", "pixel_decoder"), ("text_ls_init_value", "text_transformer")])
def test_layer_scale_of_zero_is_none_and_one_changes_nothing(part, names):
    off, zero, one = tiny(), tiny(**{part: 0.0}), tiny(**{part: 1.0})
    gammas = one.state_dict().keys() - off.state_dict().keys()
    assert zero.state_dict().keys() == off.state_dict().keys() and gammas and all(k.startswith(names) and k.endswith("gamma") for k in gammas)
    one.load_state_dict(off.state_dict(), strict=False)
    assert all(map(torch.equal, everything(off), everything(one)))


@pytest.mark.parametrize("fields, sentence", [
    ({"vision_ffn_layer": "geglu"}, 'vision_ffn_layer is "geglu", wanted one of mlp, swiglu'), ({"decoder_ffn_layer": "none"}, "decoder_ffn_layer .* wanted one of"),
    ({"vision_norm_layer": "batchnorm"}, "vision_norm_layer .* layernorm"), ({"decoder_norm_layer": None}, "decoder_norm_layer is null, wanted a name"),
    ({"vision_num_heads": 3}, "vision_num_heads is 3, wanted a divisor of vision_embed_dim, which is 32"), ({"text_num_heads": 5}, "text_num_heads is 5"),
    ({"decoder_num_heads": 16}, "decoder_num_heads is 16, wanted heads of 4, 8, 12"), ({"vision_depth": 0}, "vision_depth is 0, wanted a whole number above 0"),
    ({"vision_depth": "12"}, 'vision_depth is "12", wanted a whole number'), ({"train_clip": "false"}, 'train_clip is "false", wanted true or false'),
    ({"vision_depth": True}, "vision_depth is true, wanted a whole number"), ({"text_quick_gelu": 1}, "text_quick_gelu is 1, wanted true or false"),
    ({"vision_feature_bottleneck": 0}, "vision_feature_bottleneck is 0, wanted .* or null"), ({"vision_clip_feat": "avgpool"}, "wanted cls or pooled"),
    ({"text_embed_cls": True}, "text_embed_cls is true, wanted false"), ({"text_pool_type": "mean"}, "text_pool_type .* argmax, first, last, none"),
    ({"rope_dtype": "float16"}, 'rope_dtype is "float16", wanted bfloat16'), ({"decoder_upscale": 0}, "decoder_upscale is 0"),
    ({"vision_mlp_ratio": 0.0}, "vision_mlp_ratio is 0.0, wanted a number above 0"), ({"init_logit_scale": "log"}, "init_logit_scale .* a number or null")])
def test_a_field_that_cannot_be_built_is_refused_by_name(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        VTPConfig(**TINY | fields)


def test_fields_of_absent_parts_are_not_judged():
    assert VTPConfig(**TINY | {"train_clip": False, "text_num_heads": 5, "text_pool_type": "mean", "vision_clip_feat": "avgpool"})
    assert VTPConfig(**TINY | {"train_reconstruction": False, "decoder_ffn_layer": "geglu", "decoder_num_heads": 5})


def test_an_absent_field_takes_the_official_default(tmp_path):
    tiny(train_clip=False).save_pretrained(tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    for name in ("model_type", "vision_ffn_layer", "text_depth", "vision_mlp_ratio"):
        del found[name]
    (tmp_path / "config.json").write_text(json.dumps(found))
    assert VTPModel.from_pretrained(tmp_path).config == VTPConfig(**TINY | {"train_clip": False, "text_depth": 12})


def change(tensors):
    """-> tensors with one taken away, two foreign ones, and one transposed"""
    tensors = dict(tensors, stranger=torch.zeros(1), guest=torch.zeros(1)) | {"visual_proj.weight": tensors["visual_proj.weight"].T.contiguous()}
    del tensors["trunk.cls_token"]
    return tensors


@pytest.mark.parametrize("file, content, sentence", [
    ("config.json", "{not json", "is no JSON .* wanted the config.json of a VTP model"), ("config.json", "[1, 2]", "holds a list, wanted"),
    ("config.json", '{"model_type": "clip"}', "holds model_type 'clip', wanted .* 'vtp'"), ("config.json", '{"vision_depth": -1}', "vision_depth is -1"),
    ("model.safetensors", "rubbish", "model.safetensors is damaged .* copy or download it again"), ("model.safetensors", None, "model.safetensors is missing"),
    ("model.safetensors", change, r"1 missing \(trunk.cls_token\); 2 not of this model \(.*(stranger|guest).*\); "
                                  r"1 of another shape \(visual_proj.weight \[32, 24\], wanted \[24, 32\]\). Take both files from one model")])
def test_a_folder_that_holds_something_else_is_refused_with_a_sentence(file, content, sentence, tmp_path):
    tiny().save_pretrained(tmp_path)
    if callable(content):
        safetensors.torch.save_file(content(safetensors.torch.load_file(tmp_path / file)), tmp_path / file)
    elif content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content)
    with pytest.raises(FileNotFoundError if content is None else ValueError, match=sentence):
        VTPModel.from_pretrained(tmp_path)


def test_a_folder_without_a_model_is_refused_with_what_was_wanted(tmp_path):
    with pytest.raises(FileNotFoundError, match="wanted a folder with config.json and model.safetensors"):
        VTPModel.from_pretrained(tmp_path)


# ---------------------------------------------------------------- head, teacher, student
def test_head_logits_are_cosines_times_the_prototype_s_length():
    head = DINOHead(16, K=50, hidden=32, bottleneck=8)
    logits = head(100 * torch.randn(64, 16))
    assert logits.abs().max() <= 1 + 1e-6                                                   # lengths start at 1
    head.last_layer.weight_g.fill_(3.0)
    assert torch.allclose(head(torch.ones(1, 16)) / 3, F.linear(F.normalize(head.mlp(torch.ones(1, 16)), dim=-1), F.normalize(head.last_layer.weight_v, dim=-1)))
    head.last_layer.weight_v.mul_(7)
    assert head(100 * torch.randn(64, 16)).abs().max() <= 3 + 1e-5                          # the stored direction's own length does not count


def pair(**fields):
    torch.manual_seed(0)
    model = VTPModel(VTPConfig(**TINY | fields))
    student = Student(model, DINOHead(model.feature_dim, K=20, hidden=16, bottleneck=8))
    return student, Teacher(student)


def pairs(student, teacher):
    named = dict(student.named_parameters())
    for name, t in teacher.named_parameters():
        yield t, named[{"trunk": "model.trunk", "proj": "model.visual_proj", "dino_head": "dino_head"}[name.split(".")[0]] + "." + name.split(".", 1)[1]]


@pytest.mark.parametrize("fields", [{}, {"vision_bottleneck_ae_only": False}, {"train_clip": False}])
def test_the_teacher_starts_as_the_student(fields):
    student, teacher = pair(**fields)
    assert all(torch.equal(t, s) and t.data_ptr() != s.data_ptr() for t, s in pairs(student, teacher))
    assert student.training and not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.train().training                                                      # and stays so


def test_momentum_one_stays_zero_copies_and_a_half_meets_in_the_middle():
    for m, wanted in ((1.0, lambda t, s: t), (0.0, lambda t, s: s), (0.5, lambda t, s: (t + s) / 2)):
        student, teacher = pair()
        for p in student.parameters():
            p.add_(torch.randn_like(p))
        before = [(t.clone(), s.clone()) for t, s in pairs(student, teacher)]
        teacher.follow(student, m)
        assert all(torch.allclose(t, wanted(*old)) for (t, _), old in zip(pairs(student, teacher), before))


def batch(Bs=2, V=3):
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(2, Bs, 16, generator=g) < 0.4
    return {"image": torch.randn(4, 3, 32, 32, generator=g), "text": torch.randint(1, 64, (4, 7), generator=g), "rec": torch.tensor([0, 2]), "mask": mask,
            "crops": torch.randn(2, Bs, 3, 32, 32, generator=g), "locals": torch.randn(V, Bs, 3, 16, 16, generator=g)}


NO_DROP = dict.fromkeys(("clip", "rec", "ssl", "local"))


def test_one_forward_of_the_student_serves_all_objectives():
    student, teacher = pair()
    b = batch()
    out, M = student(b, NO_DROP), b["mask"].sum()
    shapes = {"img": (4, 24), "txt": (4, 24), "scale": (), "pixels": (2, 3, 32, 32), "cls": (5, 2, 20), "patch": (M, 20), "tokens": (2, 2, 32)}
    assert {k: out[k].shape for k in shapes} == shapes and out["bias"] is None
    assert torch.allclose(out["pixels"], student.model.get_latents_decoded_images(student.model.get_reconstruction_latents(b["image"][[0, 2]])), atol=1e-5)
    assert torch.allclose(out["img"], student.model.get_clip_image_feature(b["image"], normalize=True), atol=1e-5)
    cls, patch = teacher(b["crops"], b["mask"]).values()
    assert cls.shape == (2, 2, 20) and patch.shape == (M, 20)


def test_training_normalises_clip_features_in_float32_under_bfloat16_autocast():
    """In bfloat16, lengths would be 0.999 to 1.0015.

    The public methods keep the type that autocast gives, as the official code does.
    """
    student, b = pair()[0], batch()
    b |= {"image": torch.randn(64, 3, 32, 32), "text": torch.randint(1, 64, (64, 7))}
    with torch.autocast("cpu", torch.bfloat16):
        out = student({k: b[k] for k in ("image", "text")}, NO_DROP)
        public = student.model.get_clip_text_feature(b["text"])
        raw = student.model.get_clip_text_feature(b["text"], normalize=False)
    assert torch.equal(out["txt"], F.normalize(raw.float(), dim=-1))     # once, and in float32
    for name in ("img", "txt"):
        assert out[name].dtype == torch.float32
        assert (out[name].double().norm(dim=-1) - 1).abs().max() < 1e-6
    assert public.dtype == torch.bfloat16


def test_student_and_teacher_agree_on_a_picture_of_which_nothing_is_hidden():
    student, teacher = pair()
    b = batch() | {"mask": torch.zeros(2, 2, 16, dtype=torch.bool)}
    assert torch.allclose(student(b, NO_DROP)["cls"][:2], teacher(b["crops"], b["mask"])["cls"], atol=1e-6)


def test_turning_objectives_off_changes_nothing_for_the_others():
    student, b = pair()[0], batch()
    whole = student(b, NO_DROP)
    for keys in (("image", "text"), ("image", "rec"), ("crops", "locals", "mask")):
        part = student({k: b[k] for k in keys}, NO_DROP)
        assert part and all(v is None or torch.equal(v, whole[k]) for k, v in part.items())


def test_the_latent_is_the_only_way_from_the_picture_to_the_pixels():
    student, b = pair()[0], batch()
    student.model.trunk.feature_bottleneck.weight.zero_()
    out = student(b, NO_DROP)
    assert torch.equal(out["pixels"][0], out["pixels"][1])                                   # every picture looks alike
    assert not torch.equal(out["img"][0], out["img"][1])                                     # but the words still tell them apart


@pytest.mark.parametrize("clip, ssl, rec", [(c, s, r) for c in (0, 1) for s in (0, 1) for r in (0, 1) if c + s + r])
def test_whatever_is_trained_every_parameter_gets_a_gradient_but_what_nothing_reads(clip, ssl, rec):
    """Without views nothing is hidden, and without pixels nobody reads latents."""
    model = tiny(train_clip=bool(clip), train_reconstruction=bool(rec))
    student = Student(model, DINOHead(32, K=20, hidden=16, bottleneck=8) if ssl else None)
    keys = ["image"] * (clip or rec) + ["text"] * clip + ["rec"] * rec + ["crops", "locals", "mask"] * ssl
    with torch.enable_grad():
        out = student({k: v for k, v in batch().items() if k in keys}, NO_DROP)
        sum(v.square().sum() for v in out.values() if v is not None).backward()
    deaf = {name for name, p in student.named_parameters() if p.grad is None}
    assert deaf == {"model.trunk." + name for name, read in (("mask_token", ssl), ("feature_bottleneck.weight", rec)) if not read}


def test_self_supervision_without_local_crops_compares_the_two_global_ones():
    student, b = pair()[0], batch()
    assert student(b | {"locals": b["locals"][:0]}, NO_DROP)["cls"].shape == (2, 2, 20)
