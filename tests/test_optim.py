"""Schedules, parameter groups of AdamW, and the exponential moving average of weights."""
import json
import math

import numpy as np
import pytest
import torch

from vtp_min import VTPConfig, VTPModel
from vtp_min.model import DINOHead, Student
from vtp_min.optim import cosine, linear, param_groups, set_lr, update_ema, warmup_cosine


# ---------------------------------------------------------------- schedules
def test_cosine_goes_from_start_to_end_and_is_constant_afterwards():
    assert cosine(0, 3.0, 1.0, 10) == 3.0
    assert cosine(9, 3.0, 1.0, 10) == 1.0 == cosine(50, 3.0, 1.0, 10)
    assert math.isclose(cosine(5, 3.0, 1.0, 11), 2.0)


def test_linear_goes_from_start_to_end_and_is_constant_afterwards():
    assert linear(0, 0.04, 0.07, 30) == 0.04
    assert math.isclose(linear(15, 0.04, 0.07, 30), 0.055)
    assert math.isclose(linear(30, 0.04, 0.07, 30), 0.07)
    assert linear(99, 0.04, 0.07, 30) == linear(30, 0.04, 0.07, 30)


def test_the_learning_rate_rises_to_its_peak_then_falls_to_its_end():
    lrs = [warmup_cosine(step, 1.0, 5, 20) for step in range(20)]
    assert lrs[0] == 0.2                       # the first step has a rate above 0
    assert lrs[4] == lrs[5] == max(lrs) == 1.0
    assert sorted(lrs[5:], reverse=True) == lrs[5:]
    assert math.isclose(lrs[-1], 1e-6)
    assert math.isclose(warmup_cosine(19, 1.0, 5, 20, end=0.1), 0.1)


def test_a_schedule_of_a_single_step_has_its_start_value():
    assert warmup_cosine(0, 1.0, 0, 1) == 1.0 and cosine(0, 1.0, 0.0, 1) == 1.0


def test_the_warm_up_equals_openclip(golden):
    g = np.load(golden / "clip_schedule.npz")
    lr, warmup, steps = float(g["base_lr"]), int(g["warmup"]), int(g["steps"])
    ours = [warmup_cosine(step, lr, warmup, steps) for step in range(warmup + 1)]
    assert np.allclose(ours, g["cosine"][:warmup + 1], rtol=1e-12)


def test_schedules_equal_dinov2_and_the_learning_rate_equals_dinov3(golden):
    """DINOv2's cosines reach their end one step later than ours (steps + 1); DINOv3's do not."""
    g = np.load(golden / "dino_schedules.npz")
    c = {key.removeprefix("a/cfg/"): float(g[key]) for key in g.files if key.startswith("a/cfg/")}
    per_epoch = int(g["epoch_length"])
    steps = int(c["epochs"]) * per_epoch
    warmup, temp_warmup = (int(c[k]) * per_epoch for k in ("warmup_epochs", "ttemp_warmup_epochs"))

    def close(schedule, name, start=0):
        ours = [schedule(step) for step in range(start, steps)]
        return np.allclose(ours, g[f"a/{name}"][start:steps], atol=1e-12)

    assert close(lambda s: cosine(s, c["wd"], c["wd_end"], steps + 1), "wd")
    assert close(lambda s: cosine(s, c["mom"], 1.0, steps + 1), "momentum")
    assert close(lambda s: linear(s, c["ttemp_start"], c["ttemp"], temp_warmup - 1), "teacher_temp")
    assert close(lambda s: warmup_cosine(s, c["lr"], warmup, steps, c["min_lr"]),
                 "v3_linear_warmup_cosine_lr", start=warmup)


# ---------------------------------------------------------------- parameter groups
@pytest.fixture(scope="module")
def student():
    return Student(VTPModel(VTPConfig.of_size("nano", 16, 8, 16)), DINOHead(192, 32, 32, 16))


def groups_by_name(student, *factors):
    """-> {name of a parameter: its group}. Fails if a parameter is in two groups."""
    names, found = {id(p): name for name, p in student.named_parameters()}, {}
    for group in param_groups(student, *factors):
        for p in group["params"]:
            assert names[id(p)] not in found
            found[names[id(p)]] = group
    return found


def test_each_parameter_is_in_one_group_and_vectors_and_positions_have_no_weight_decay(student):
    groups = groups_by_name(student)
    assert groups.keys() == dict(student.named_parameters()).keys()
    for name, p in student.named_parameters():
        wanted = p.ndim > 1 and name != "model.positional_embedding"
        assert groups[name]["decay"] == wanted, name


def test_the_last_layer_of_the_dino_head_has_its_own_group(student):
    last = {name for name, group in groups_by_name(student).items() if group["last"]}
    assert last == {"dino_head.last_layer.weight_g", "dino_head.last_layer.weight_v"}


def test_weight_decay_is_split_as_in_openclip(golden, student):
    """For the parameters that exist in both: the text tower, the logit scale, the image projection
    and the patch embedding."""
    theirs = json.loads((golden / "clip_weight_decay_split.json").read_text())["params"]
    groups, compared = groups_by_name(student), 0
    renamed = {"visual.conv1.weight": "trunk.patch_embed.proj.weight",
               "visual.proj": "visual_proj.weight"}
    for name, rule in theirs.items():
        ours = renamed.get(name, name)
        if name.startswith("transformer."):
            ours = "text_" + name
        if "model." + ours in groups:
            assert groups["model." + ours]["decay"] != rule["no_decay"], name
            compared += 1
    assert compared > 10


def test_layer_decay_is_applied_once_for_each_layer_after_a_parameter(student):
    groups = groups_by_name(student, 0.5, 0.1)                  # nano has 4 blocks
    factors = {name: group["factor"] for name, group in groups.items()}
    for block in range(4):
        assert factors[f"model.trunk.blocks.{block}.attn.qkv.weight"] == 0.5 ** (4 - block)
    assert factors["model.trunk.cls_token"] == factors["model.trunk.mask_token"] == 0.5 ** 5
    assert factors["model.trunk.patch_embed.proj.weight"] == 0.5 ** 5 * 0.1
    assert factors["model.trunk.norm.weight"] == factors["model.visual_proj.weight"] == 1
    assert factors["dino_head.mlp.0.weight"] == factors["model.token_embedding.weight"] == 1


def test_set_lr_can_freeze_only_the_last_layer(student):
    optimizer = torch.optim.AdamW(param_groups(student))
    set_lr(optimizer, 0.1, 0.0, 0.04)
    groups = optimizer.param_groups
    assert {(g["last"], g["lr"]) for g in groups} == {(True, 0.0), (False, 0.1)}
    assert {(g["decay"], g["weight_decay"]) for g in groups} == {(True, 0.04), (False, 0.0)}
    set_lr(optimizer, 0.1, 0.1, 0.04)
    assert {g["lr"] for g in groups} == {0.1}


def test_set_lr_multiplies_by_the_factor_of_the_group(student):
    optimizer = torch.optim.AdamW(param_groups(student, layer_decay=0.5))
    set_lr(optimizer, 0.1, 0.1, 0.04)
    for group in optimizer.param_groups:
        assert group["lr"] == 0.1 * group["factor"]
    assert {g["factor"] for g in optimizer.param_groups} == {1, *(0.5 ** n for n in range(1, 6))}


# ---------------------------------------------------------------- moving average
def test_update_ema_is_a_weighted_mean_in_place_and_does_not_change_the_source():
    target, source = [torch.randn(3, 2), torch.randn(4)], [torch.randn(3, 2), torch.randn(4)]
    wanted = [0.9 * t + (1 - 0.9) * s for t, s in zip(target, source)]
    addresses, before = [t.data_ptr() for t in target], [s.clone() for s in source]
    update_ema(target, source, 0.9)
    for t, mean, address in zip(target, wanted, addresses):
        assert torch.equal(t, mean) and t.data_ptr() == address
    assert all(map(torch.equal, source, before))


def test_update_ema_with_decay_one_changes_nothing_and_with_decay_zero_copies():
    for decay in (1.0, 0.0):
        target, source = [torch.randn(5)], [torch.randn(5)]
        wanted = target[0].clone() if decay else source[0].clone()
        update_ema(target, source, decay)
        assert torch.equal(target[0], wanted)


def test_update_ema_with_a_constant_source_converges_to_it_at_the_rate_of_the_decay():
    target, source = [torch.zeros(3)], [torch.ones(3)]
    for _ in range(20):
        update_ema(target, source, 0.8)
    assert torch.allclose(target[0], torch.full((3,), 1 - 0.8 ** 20))


def test_update_ema_accepts_generators_of_parameters_and_records_no_gradient():
    target, source = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    wanted = 0.5 * target.weight.detach() + 0.5 * source.weight.detach()
    update_ema(target.parameters(), source.parameters(), 0.5)
    assert torch.equal(target.weight, wanted)
    assert target.weight.requires_grad and target.weight.grad_fn is None
