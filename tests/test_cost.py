"""Parameter and FLOP counts agree with the released code, with Table 1 and with formulas."""
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data import TrainBatches, open_data
from tokenizer import get_tokenizer
from vtp_min import VTPConfig, VTPModel
from vtp_min.extras.baselines import LDM, LDMConfig
from vtp_min.extras.cost import (RELEASED_L_TENSORS, RELEASED_PARAMETERS, compare_with_table_1,
                                 costs, describe, flops, head_on_meta, on_meta,
                                 parameters_by_part, released_parameters, step_flops,
                                 tensors_by_part)
from vtp_min.model import DINOHead, Student, Teacher

# GFLOPs of encoder, decoder, and of both with the products inside attention
RELEASED_GFLOPS = {"S": (11.078, 11.035, 24.538), "B": (43.984, 43.814, 92.648),
                   "L": (155.861, 155.256, 324.053)}


def of_size(size, **changes):
    """Like the default configuration of the released code: no QKNorm"""
    no_qk_norm = {"vision_use_qk_norm": False, "decoder_use_qk_norm": False}
    return on_meta(VTPModel, replace(VTPConfig.of_size(size), **no_qk_norm, **changes))


# ---- one image

@pytest.mark.parametrize("size", "SBL")
def test_parameters_and_flops_are_those_of_the_released_code(size):
    model = of_size(size)
    n, released = parameters_by_part(model), released_parameters(model.config)
    assert released.keys() == n.keys() - {"image projection"}
    for part, millions in released.items():
        rounding = 0.006 if part.startswith("text") else 0.0011
        assert n[part] / 1e6 == pytest.approx(millions, abs=rounding)
    rows = {name: (work / 1e9, whole / 1e9) for name, _, work, whole in costs(model, 256)}
    encoder, decoder, whole = RELEASED_GFLOPS[size]
    assert rows["encoder"][0] == pytest.approx(encoder, abs=6e-4)
    assert rows["decoder"][0] == pytest.approx(decoder, abs=6e-4)
    assert rows["encoder + decoder"][1] == pytest.approx(whole, abs=2e-3)


def test_table_1_s_vit_l_is_ours_to_the_last_digit_with_layer_norm_in_the_trunk():
    rows = costs(of_size("L", vision_norm_layer="layernorm"), 256)
    name, n, work, _ = rows[2]
    assert name == "encoder + decoder"
    assert f"{n / 1e6:.1f}" == "607.2" and f"{work / 1e9:.1f}" == "311.1"
    ours = on_meta(VTPModel, VTPConfig.of_size("L"))
    text = " ".join(compare_with_table_1(ours, 256, costs(ours, 256)))
    assert "607.2M parameters, 311.1 GFLOPs" in text and "LayerNorm" in text
    assert "it has 607.19M" in text


def test_table_1_s_vit_b_differs_by_a_thousandth_and_the_text_states_it():
    model = on_meta(VTPModel, VTPConfig.of_size("B"))
    rows = costs(model, 256)
    assert 1 < rows[2][1] / 171.2e6 < 1.0015 and 1 < rows[2][2] / 87.7e9 < 1.0015
    assert "0.1% more in both" in compare_with_table_1(model, 256, rows)[0]
    assert compare_with_table_1(model, 224, costs(model, 224)) == []
    assert compare_with_table_1(of_size("S"), 256, costs(of_size("S"), 256)) == []


def trunk_matrices(c):
    """Number of weights in one block: qkv and output projection; w1, w2, w3"""
    D = c.vision_embed_dim
    hidden = -(-int(4 * D * 2 / 3) // 8) * 8                                     # SwiGLU
    return 4 * D * D + 3 * D * hidden


@pytest.mark.parametrize("size, side", [("nano", 96), ("S", 256), ("L", 224)])
def test_the_counter_agrees_with_the_formula(size, side):
    """2 x tokens x weights of each matrix, and 4 N^2 D per layer for the two products inside
    attention"""
    c = VTPConfig.of_size(size)
    found = costs(on_meta(VTPModel, c), side)
    rows = {name: (work, whole) for name, _, work, whole in found}
    D, N, d = c.vision_embed_dim, (side // 16) ** 2, c.vision_feature_bottleneck
    # patches; blocks, with a class token; bottleneck
    encoder = 2 * (N * 3 * 256 * D + (N + 1) * c.vision_depth * trunk_matrices(c) + N * D * d)
    decoder = 2 * N * (d * D + c.decoder_depth * trunk_matrices(c) + D * 3 * 256)
    assert rows["encoder"] == (encoder, encoder + 4 * (N + 1) ** 2 * D * c.vision_depth)
    assert rows["decoder"] == (decoder, decoder + 4 * N ** 2 * D * c.decoder_depth)
    W, T = c.text_embed_dim, c.text_context_length
    assert rows["text tower"][0] == 2 * (T * c.text_depth * 12 * W * W + W * W)


def test_the_dino_head_costs_its_matrices_and_meta_tensors_cost_nothing():
    model = on_meta(VTPModel, VTPConfig.of_size("S"))
    head = head_on_meta(model, (65536, 2048, 256))
    row = costs(model, 256, head)[-1]
    matrices = 384 * 2048 + 2048 * 2048 + 2048 * 256 + 256 * 65536
    assert row[0] == "DINO head" and row[2] == 2 * matrices
    assert all(p.device.type == "meta" for p in [*model.parameters(), *head.parameters()])


def test_real_tensors_are_counted_as_meta_ones():
    config = VTPConfig.of_size("nano", image=24, patch=12)
    assert costs(VTPModel(config), 24) == costs(on_meta(VTPModel, config), 24)
    a = torch.randn(3, 4)
    assert flops(lambda: a @ a.T) == (2 * 3 * 4 * 3,) * 2


# ---- a training step

def make_batch(image=32, patch=8, **changes):
    settings = dict(seed=0, batch=8, batch_ssl=4, batch_rec=2, clip=True, ssl=True, rec=True,
                    image=image, local_image=16, n_local=2, patch=patch, depth=4)
    source = open_data("shapes", "train", 0, image)
    return TrainBatches(source, get_tokenizer("ViT-B-32"), **settings | changes)[0]


def counted(forward):
    """FLOPs with real tensors; attention is computed by matrix products

    PyTorch 2.5 does not count the FLOPs of its default attention on a CPU.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        forward()
    return counter.get_total_flops()


@pytest.mark.parametrize("drop", [0.0, 0.4])
def test_a_step_costs_what_the_forward_passes_of_a_real_student_cost(drop):
    """Also with stochastic depth, and with a different rate for reconstruction"""
    config, sizes = VTPConfig.of_size("nano", image=32, patch=8), (48, 32, 16)
    batch = make_batch(drop_ssl=drop, drop_clip=drop, drop_rec=drop / 2)
    student = Student(VTPModel(config), DINOHead(192, *sizes))
    teacher = Teacher(student)
    real = batch.to(torch.device("cpu"))

    def clip_and_rec():
        cls, patches = student.encode(real.image, real.keep["image"])
        student.embed_image(cls, patches)
        student.embed_text(real.text)
        patches = patches[real.rec]
        if drop:
            patches = student.encode(real.image[real.rec], real.keep["rec"])[1]
        student.decode(patches)

    ssl = counted(lambda: teacher(real.crops, real.mask_index)) + 3 * counted(
        lambda: student.views(real.crops, real.locals, real.mask, real.mask_index, real.keep))
    rest = 3 * counted(clip_and_rec)
    assert step_flops(config, batch, 1, 1, 0.1, sizes) == pytest.approx(ssl + rest, rel=0.01)
    assert step_flops(config, batch, 0, 1, 0, sizes) == pytest.approx(ssl, rel=0.01)
    assert step_flops(config, batch, 1, 0, 0.1) == pytest.approx(rest, rel=0.01)


def test_a_step_of_self_supervision_costs_what_the_formula_says():
    """Including attention: 4 N^2 D per layer"""
    config, (K, hidden, bottleneck) = VTPConfig.of_size("nano", image=32, patch=8), (48, 32, 16)
    batch = make_batch(clip=False, rec=False, n_local=3)
    D, depth = config.vision_embed_dim, config.vision_depth

    def trunk(images, N):
        tokens = N + 1
        products = 2 * (N * 3 * 64 * D + tokens * depth * trunk_matrices(config))
        return images * (products + 4 * tokens ** 2 * D * depth)

    def head(tokens):
        return 2 * tokens * (D * hidden + hidden * hidden + hidden * bottleneck + bottleneck * K)

    Bs, V, M = 4, 3, len(batch.mask_index)
    student = trunk(2 * Bs, 16) + trunk(V * Bs, 4) + head((2 + V) * Bs + M)
    teacher = trunk(2 * Bs, 16) + head(2 * Bs + M)
    assert step_flops(config, batch, 0, 1, 0, (K, hidden, bottleneck)) == 3 * student + teacher


# ---- printed text

def test_parts_without_a_reference_are_marked():
    config = VTPConfig(vision_embed_dim=64, vision_depth=2, vision_num_heads=2, train_clip=False,
                       decoder_embed_dim=1024, decoder_depth=4, decoder_num_heads=16)
    lines = "\n".join(describe(on_meta(VTPModel, config)))
    assert "none to compare with" in lines
    assert f"{RELEASED_PARAMETERS['decoder'][1024, 4]:.3f}" in lines
    assert "no CLIP" in lines and "text tower" not in lines


# The defaults of the released configuration class with L's widths and depths: SwiGLU, no QKNorm, no
# LayerScale, RMSNorm in the trunk, LayerNorm in the decoder, 12 layers in the text tower.
L_SHAPE = dict(vision_embed_dim=1024, vision_depth=24, vision_num_heads=16,
               decoder_embed_dim=1024, decoder_depth=24, decoder_num_heads=16)


def test_the_default_configuration_at_l_s_shape_has_the_tensors_of_the_released_l():
    assert tensors_by_part(on_meta(VTPModel, VTPConfig(**L_SHAPE))) == RELEASED_L_TENSORS
    assert RELEASED_L_TENSORS == {"trunk": 295, "decoder": 343, "text and CLIP": 151, "all": 789}


def test_of_the_choices_in_a_swiglu_model_only_one_has_the_tensors_of_the_released_l():
    """mlp has two tensors per block fewer than SwiGLU; QKNorm and LayerScale add two each. The
    counts alone cannot distinguish mlp with one of these from SwiGLU, but Table 1's 607.2M
    parameters can."""
    found = {"trunk": set(), "decoder": set()}
    for norm in ("layernorm", "rmsnorm"):
        for qk_norm in (False, True):
            for init in (None, 0.1):
                choice = {"norm_layer": norm, "use_qk_norm": qk_norm, "init_values": init}
                fields = {f"vision_{k}": v for k, v in choice.items()}
                fields |= {f"decoder_{k}": v for k, v in choice.items()}
                n = tensors_by_part(on_meta(VTPModel, VTPConfig(**L_SHAPE, **fields)))
                for part in found:
                    if n[part] == RELEASED_L_TENSORS[part]:
                        found[part].add((norm, qk_norm, init))
    assert found == {"trunk": {("rmsnorm", False, None)}, "decoder": {("layernorm", False, None)}}


def test_check_shows_the_tensors_of_the_released_l_next_to_those_of_a_model_with_l_s_trunk():
    lines = [line.split() for line in describe(on_meta(VTPModel, VTPConfig(**L_SHAPE)))]
    assert ["tensors", "here", *"a public port of the released L".split()] in lines
    assert ["trunk", "295", "295"] in lines and ["decoder", "343", "343"] in lines
    assert ["text", "and", "CLIP", "151", "151"] in lines and ["all", "789", "789"] in lines
    ours = [line.split() for line in describe(on_meta(VTPModel, VTPConfig.of_size("L")))]
    assert ["trunk", "343", "295"] in ours                   # QKNorm: two tensors per block
    assert "port" not in "".join(describe(on_meta(VTPModel, VTPConfig.of_size("B"))))


def test_our_ldm_has_the_cost_of_the_cnn_in_table_1():
    model = on_meta(LDM, LDMConfig())
    rows = costs(model, 256)
    assert f"{rows[2][1] / 1e6:.1f}" == "70.3" and f"{rows[2][2] / 1e9:.1f}" == "389.4"
    assert "70.3M" in compare_with_table_1(model, 256, rows)[0]
    assert "none to compare with" in "".join(describe(model))
