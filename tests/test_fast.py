"""extras/fast.py: each fast form has the same values and gradients as the textbook form."""
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import dit
from vtp_min import VTPConfig, VTPModel, augment, losses, vit
from vtp_min.augment import VIEWS
from vtp_min.extras import fast, fast_dit, fast_views
from vtp_min.rng import Stream, make_rng

LIMITS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2 ** -6}
DTYPES = list(LIMITS)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def agree(a, b, limit):
    """True if a and b agree, relative to the largest magnitude; shape and dtype must be equal"""
    assert a.dtype == b.dtype and a.shape == b.shape
    a, b = a.detach().double(), b.detach().double()
    return (a - b).abs().max() <= limit * b.abs().max().clamp_min(1e-12)


def value_and_gradients(function, inputs):
    """-> value, gradients of a random linear function of the value with respect to each input"""
    inputs = [x.clone().requires_grad_() for x in inputs]
    value = function(*inputs)
    weight = normal(*value.shape, seed=9, dtype=value.dtype)
    return [value, *torch.autograd.grad((value * weight).sum(), inputs)]


def check(fast_form, plain, inputs, limit):
    found = value_and_gradients(fast_form, inputs)
    wanted = value_and_gradients(plain, inputs)
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert agree(a, b, limit), "value" if i == 0 else f"gradient {i}"


# ---------------------------------------------------------------- vit.py
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1e-3])             # at 1e-3 eps is larger than mean(x^2)
def test_rms_norm(dtype, scale):
    x, weight = scale * normal(2, 5, 24), normal(24, seed=1)
    check(lambda x, w: fast.rms_norm(x, w, 1e-5), lambda x, w: vit.rms_norm(x, w, 1e-5),
          [x.to(dtype), weight.to(dtype)], LIMITS[dtype])


def test_rms_norm_of_bfloat16_with_a_weight_in_float32():
    """This happens under autocast"""
    x, weight = normal(2, 5, 24, dtype=torch.bfloat16), normal(24, seed=1, dtype=torch.float32)
    assert torch.equal(fast.rms_norm(x, weight, 1e-5), vit.rms_norm(x, weight, 1e-5))
    check(lambda x, w: fast.rms_norm(x, w, 1e-5), lambda x, w: vit.rms_norm(x, w, 1e-5),
          [x, weight], LIMITS[torch.bfloat16])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("table", DTYPES)
def test_rotate(dtype, table):
    sin, cos = vit.RoPE(16, table)(3, 4, prefix=1)
    limit = max(LIMITS[dtype], LIMITS[table])
    check(lambda x: fast.rotate(x, sin, cos), lambda x: vit.rotate(x, sin, cos),
          [normal(2, 3, 13, 16, dtype=dtype)], limit)


def test_rotate_does_not_change_its_inputs():
    sin, cos = vit.RoPE(16)(3, 4)
    x = normal(2, 3, 12, 16, dtype=torch.float32)
    before = [y.clone() for y in (x, sin, cos)]
    fast.rotate(x, sin, cos)
    assert all(map(torch.equal, (x, sin, cos), before))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_attention(dtype, causal):
    q, k, v = normal(3, 2, 3, 7, 16, dtype=dtype)
    check(lambda q, k, v: fast.attention(q, k, v, causal),
          lambda q, k, v: vit.attention(q, k, v, causal), [q, k, v], LIMITS[dtype])


@pytest.mark.parametrize("dtype, autocast", [
    (torch.float64, False), (torch.float32, False), (torch.bfloat16, False),
    (torch.float32, True), (torch.bfloat16, True)])
def test_swiglu(dtype, autocast):
    torch.manual_seed(0)
    ffn = vit.SwiGLU(16, 4.0, 8).to(dtype)

    def run(forward):
        """-> value, gradients of the input and of the weights"""
        x = normal(2, 5, 16, dtype=dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = forward(ffn, x)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *ffn.parameters()])]

    limit = LIMITS[torch.bfloat16] if autocast else LIMITS[dtype]
    for a, b in zip(run(fast.swiglu_forward), run(vit.SwiGLU.forward), strict=True):
        assert agree(a, b, limit)


# ---------------------------------------------------------------- losses.py
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_cross_entropy(dtype, tau):
    teacher = (2 * normal(3, 5, 32, seed=1)).softmax(-1)
    if dtype != torch.float64:
        teacher = teacher.float()
    check(lambda s: fast.cross_entropy(s, teacher, tau),
          lambda s: losses.cross_entropy(s, teacher, tau),
          [normal(3, 5, 32, dtype=dtype)], LIMITS[dtype])


def test_cross_entropy_of_a_confident_student_is_finite():
    student = torch.tensor([[1000.0, 0.0], [-1000.0, 0.0]])
    teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    check(lambda s: fast.cross_entropy(s, teacher, 0.1),
          lambda s: losses.cross_entropy(s, teacher, 0.1), [student], 1e-6)
    assert fast.cross_entropy(student, teacher, 0.1).tolist() == [0, 10000]


# ---------------------------------------------------------------- augment.py
def test_views_are_equal_in_every_bit():
    """For images of several sizes, and so many crops that they are computed in several groups"""
    pixels = np.random.default_rng(0)
    images = []
    for height, width in ((40, 40), (33, 71), (120, 50)):
        image = pixels.integers(0, 256, (height, width, 3), dtype=np.uint8)
        images.append(np.asarray(Image.fromarray(image).resize((width, height), Image.BOX)))
    found = []
    for form in (fast_views.ssl_views, augment.ssl_views):
        jobs = []
        for i in range(12):
            rng = make_rng(Stream.CROPS, 0, i)             # one generator for the views of an image
            image = images[i % 3]
            jobs += [(rng, image, 32, VIEWS["global 1"]), (rng, image, 32, VIEWS["global 2"])]
            jobs += 3 * [(rng, image, 16, VIEWS["local"])]
        found.append(form(jobs))
    assert len(found[0]) == len(found[1]) == 60
    for a, b in zip(*found):
        assert a.dtype == b.dtype == np.uint8 and np.array_equal(a, b)


# ---------------------------------------------------------------- a whole model
def model_outputs(dtype, autocast):
    """-> outputs of the model, and gradients of all parameters"""
    torch.manual_seed(0)
    model = VTPModel(VTPConfig(
        vision_patch_size=4, vision_embed_dim=32, vision_depth=2, vision_num_heads=2,
        vision_use_qk_norm=True, vision_feature_bottleneck=6, text_context_length=6,
        text_vocab_size=32, text_embed_dim=16, text_num_heads=2, text_depth=1,
        decoder_embed_dim=16, decoder_num_heads=1, decoder_depth=1, decoder_norm_layer="rmsnorm",
        decoder_upscale=4, rope_dtype="float32")).to(dtype)
    image, text = normal(2, 3, 16, 16, dtype=dtype), torch.randint(1, 32, (2, 5))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = [model.get_clip_image_feature(image), model.get_clip_text_feature(text),
               model(image, forward_type="rec")["reconstructed_image"]]
    weights = [normal(*x.shape, seed=i, dtype=x.dtype) for i, x in enumerate(out)]
    sum((x * weight).sum() for x, weight in zip(out, weights)).backward()
    return out + [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("dtype, autocast, limit", [
    (torch.float64, False, 1e-12), (torch.float32, False, 2e-6), (torch.float32, True, 0.05)])
def test_a_whole_model_has_the_same_outputs_and_gradients(dtype, autocast, limit):
    """Under autocast both forms round to bfloat16 at different places, hence the larger limit."""
    plain = model_outputs(dtype, autocast)
    fast.install()
    found = model_outputs(dtype, autocast)
    for a, b in zip(found, plain, strict=True):
        assert (a - b).norm() <= limit * b.norm().clamp_min(1e-12)


# ---------------------------------------------------------------- install
REPLACED = [(vit, "rms_norm", fast.rms_norm), (vit, "rotate", fast.rotate),
            (vit, "attention", fast.attention), (vit.SwiGLU, "forward", fast.swiglu_forward),
            (losses, "cross_entropy", fast.cross_entropy),
            (augment, "ssl_views", fast_views.ssl_views)]
REPLACED_IN_DIT = [(dit, name, getattr(fast_dit, name)) for name in fast_dit.FORMS]


def forms(places):
    return [getattr(place, name) for place, name, _ in places]


def test_install_replaces_the_functions_and_undo_restores_them():
    before, before_dit = forms(REPLACED), forms(REPLACED_IN_DIT)
    fast_forms = [function for _, _, function in REPLACED]
    assert not set(before) & set(fast_forms)
    undo = fast.install()
    assert forms(REPLACED) == fast_forms and forms(REPLACED_IN_DIT) == before_dit
    undo()
    assert forms(REPLACED) == before
    undo()                                                 # a second call changes nothing
    assert forms(REPLACED) == before


def test_install_replaces_the_functions_of_dit_if_the_module_is_given():
    before, before_dit = forms(REPLACED), forms(REPLACED_IN_DIT)
    undo = fast.install(dit)
    assert forms(REPLACED_IN_DIT) == [function for _, _, function in REPLACED_IN_DIT]
    assert before_dit and not set(before_dit) & set(forms(REPLACED_IN_DIT))
    undo()
    assert forms(REPLACED_IN_DIT) == before_dit and forms(REPLACED) == before


def calls(run):
    """-> names of the functions of extras/fast.py that are called during run()"""
    seen = set()

    def profile(frame, event, _):
        if event == "call" and frame.f_code.co_filename == fast.__file__:
            seen.add(frame.f_code.co_name)

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return seen


def test_models_and_losses_call_the_installed_forms():
    student, teacher = normal(2, 3, 8), normal(2, 3, 8).softmax(-1)

    def run():
        model_outputs(torch.float32, autocast=False)
        losses.ibot_loss(student[0], teacher[0], torch.ones(3), 2)

    assert not calls(run)
    fast.install()
    wanted = {"rms_norm", "rotate", "attention", "swiglu_forward", "cross_entropy"}
    assert wanted <= calls(run)
