"""The losses and the targets of the teacher: limits, symmetries, and equality with the reference.

Losses on two processes are tested in test_dist.py, LPIPS in test_perceptual.py. A test with the
fixture `form` runs on the textbook forms and on those of extras/fast.py.

B images    V local crops    K prototypes    M masked patches
"""
import math
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vtp_min import losses
from vtp_min.device import to_fp32
from vtp_min.losses import (TeacherTargets, centered_softmax, clip_loss, entropy, feature_std,
                            ibot_loss, koleo_loss, rec_loss, siglip_loss, sinkhorn, update_center)

TEN = torch.tensor(10.0)                           # scale of the logits; SigLIP's bias is -TEN


def unit(*shape, seed=0):
    """Random vectors of unit length"""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return F.normalize(x, dim=-1)


def leaf(array):
    """An array -> float64 tensor with a gradient"""
    return torch.tensor(array, dtype=torch.float64, requires_grad=True)


def agree(a, b, tolerance=1e-8):
    """True if a and b differ by at most `tolerance` times the largest magnitude of b"""
    a = torch.as_tensor(a).detach().double().reshape(-1)
    b = torch.as_tensor(b).detach().double().reshape(-1)
    return (a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-12)


# ---------------------------------------------------------------- CLIP
def test_clip_loss_is_log_B_if_all_embeddings_are_equal():
    same = F.normalize(torch.ones(8, 16), dim=-1)  # all B = 8 captions are equally probable
    assert torch.isclose(clip_loss(same, same, TEN), torch.tensor(8.0).log())


def test_clip_loss_vanishes_if_each_image_is_similar_to_its_own_caption_only():
    assert clip_loss(torch.eye(8), torch.eye(8), torch.tensor(100.0)) < 1e-6


def test_clip_loss_is_invariant_to_swapping_images_and_captions_to_their_order_and_to_a_bias():
    img, txt = unit(8, 4), unit(8, 4, seed=1)
    order = torch.randperm(8)
    loss = clip_loss(img, txt, TEN)
    assert torch.isclose(loss, clip_loss(txt, img, TEN))
    assert torch.isclose(loss, clip_loss(img[order], txt[order], TEN))
    assert torch.isclose(loss, clip_loss(img, txt, TEN, bias=torch.tensor(-3.0)))


def test_siglip_loss_is_a_sum_of_logistic_losses_over_all_pairs_of_image_and_caption():
    img, txt = unit(4, 8), unit(4, 8, seed=1)
    total = 0
    for i in range(4):
        for j in range(4):
            sign = 1 if i == j else -1             # 1: caption j belongs to image i
            total = total + F.softplus(-sign * (10 * img[i] @ txt[j] - 10))
    assert torch.isclose(siglip_loss(img, txt, TEN, -TEN), total / 4)


def test_clip_and_siglip_losses_and_gradients_equal_the_reference(golden):
    g = np.load(golden / "clip_single.npz")
    for key in g.files:                                    # f64/scale0/clip_bias/loss, ...
        if not (key.startswith("f64/") and key.endswith("/loss")):
            continue
        name = key.removesuffix("/loss")
        _, scale, kind = name.split("/")
        raw_img = leaf(g["raw_image"])
        raw_txt = leaf(g["raw_text"])
        log_scale = leaf(g[f"{scale}/logit_scale_log"])
        bias = leaf(g[f"{scale}/logit_bias"])
        img = F.normalize(raw_img, dim=-1)
        txt = F.normalize(raw_txt, dim=-1)
        if kind == "siglip":
            loss = siglip_loss(img, txt, log_scale.exp(), bias)
        else:
            loss = clip_loss(img, txt, log_scale.exp(), bias if kind == "clip_bias" else None)
        loss.backward()
        found = {"loss": loss, "grad_raw_image": raw_img.grad, "grad_raw_text": raw_txt.grad,
                 "grad_logit_scale_log": log_scale.grad}
        for output, value in found.items():
            wanted = g[f"{name}/{output}"]
            # below 1e-9, the stored value itself is rounding noise
            assert agree(value, wanted) or abs(wanted).max() < 1e-9, (name, output)
        if kind == "siglip":
            assert agree(bias.grad, g[f"{name}/grad_logit_bias"])


def test_contrastive_loss_selects_clip_or_siglip_by_name():
    img, txt = unit(4, 8), unit(4, 8, seed=1)
    clip = losses.contrastive_loss("clip", img, txt, TEN, None)
    siglip = losses.contrastive_loss("siglip", img, txt, TEN, -TEN)
    assert clip == clip_loss(img, txt, TEN)
    assert siglip == siglip_loss(img, txt, TEN, -TEN)


# ---------------------------------------------------------------- the sum
def test_total_loss_is_the_weighted_sum_of_the_terms_that_are_given():
    args = Namespace(w_clip=2.0, w_ssl=3.0, w_koleo=0.1, w_rec=0.5)
    terms = {"clip": torch.tensor(1.0), "dino": torch.tensor(10.0), "ibot": torch.tensor(100.0),
             "koleo": torch.tensor(1000.0), "rec": torch.tensor(10000.0)}
    assert losses.total_loss(terms, args) == 2 + 30 + 300 + 0.3 * 1000 + 5000
    assert losses.total_loss({"rec": terms["rec"]}, args) == 5000


# ---------------------------------------------------------------- DINO
def test_dino_loss_is_log_K_for_a_student_with_equal_logits(form):
    teacher = torch.randn(2, 5, 32).softmax(-1)
    loss = losses.dino_loss(torch.zeros(4, 5, 32), teacher)
    assert torch.isclose(loss, torch.tensor(32.0).log())


def test_dino_loss_is_at_least_the_entropy_of_the_teacher_and_equal_if_all_crops_agree(form):
    p = (3 * torch.randn(1, 5, 32)).softmax(-1).expand(2, -1, -1)
    # the student's probabilities are softmax(logits / 0.1), so these logits give p
    agreeing = 0.1 * p.log()[:1].expand(6, -1, -1)
    assert torch.isclose(losses.dino_loss(agreeing, p), entropy(p))
    assert losses.dino_loss(agreeing + 0.1 * torch.randn_like(agreeing), p) > entropy(p)


def test_student_and_teacher_are_never_compared_on_the_same_crop(form):
    teacher = torch.eye(2)[:, None]                # prototype 0 for crop 0, prototype 1 for crop 1
    swapped = torch.tensor([[[-9.0, 9.0]], [[9.0, -9.0]]])      # the student gives the opposite
    assert losses.dino_loss(swapped, teacher) < 1e-6
    assert losses.dino_loss(-swapped, teacher) > 1e-6


def test_all_pairs_of_different_crops_have_the_same_weight_in_dino_loss(form):
    student = torch.randn(2 + 3, 4, 8)
    teacher = torch.randn(2, 4, 8).softmax(-1)

    def pair(t, s):
        return -(teacher[t] * F.log_softmax(student[s] / 0.1, -1)).sum(-1).mean()

    pairs = [pair(0, 1), pair(1, 0)]
    for s in (2, 3, 4):                            # the local crops
        pairs += [pair(0, s), pair(1, s)]
    assert torch.isclose(losses.dino_loss(student, teacher), sum(pairs) / 8)


# ---------------------------------------------------------------- iBOT
def test_all_masked_crops_have_the_same_weight_in_ibot_loss_for_any_number_of_masked_patches(form):
    teacher = torch.eye(4)[[0, 0, 0, 0, 0, 0]]
    weight = torch.tensor([1.0] + [1 / 5] * 5)     # one crop with 1 masked patch, one with 5
    loss = ibot_loss(torch.zeros(6, 4), teacher, weight, n_crops=2)
    assert torch.isclose(loss, torch.tensor(4.0).log())


def test_ibot_loss_is_divided_by_the_number_of_all_crops_including_those_without_a_mask(form):
    student = torch.randn(3, 8)
    teacher = torch.randn(3, 8).softmax(-1)
    two = ibot_loss(student, teacher, torch.ones(3) / 3, n_crops=2)
    four = ibot_loss(student, teacher, torch.ones(3) / 3, n_crops=4)
    assert torch.isclose(2 * four, two)


def test_ibot_loss_without_masked_patches_is_zero(form):
    assert ibot_loss(torch.zeros(0, 8), torch.zeros(0, 8), torch.zeros(0), n_crops=2) == 0


# ---------------------------------------------------------------- DINO, iBOT, against the reference
def teacher_probabilities(mode, logits, center, temp):
    if mode == "centering":
        return centered_softmax(logits, center, temp)
    return sinkhorn(logits, temp)


@pytest.mark.parametrize("mode", ["centering", "sinkhorn"])
def test_dino_targets_losses_gradients_and_centers_equal_the_reference(golden, form, mode):
    g = np.load(golden / "dino_cls_loss.npz")
    center = torch.zeros(int(g["K"]), dtype=torch.float64)
    for step, temp in enumerate(g["teacher_temps"]):
        logits = torch.tensor(g[f"step{step}/teacher_logits"])          # (2, B, K)
        name = f"f64/{mode}/step{step}/"
        if name + "teacher_probs" in g:
            p = teacher_probabilities(mode, logits, center, temp)
            assert agree(p, g[name + "teacher_probs"])
        if name + "loss_total" in g:
            global_crops = leaf(g[f"step{step}/student_global"])
            local_crops = leaf(g[f"step{step}/student_local"])
            loss = losses.dino_loss(torch.cat([global_crops, local_crops]), p)
            loss.backward()
            found = {"loss_total": loss, "grad_student_global": global_crops.grad,
                     "grad_student_local": local_crops.grad}
            for key, value in found.items():
                assert agree(value, g[name + key]), (step, key)
        center = update_center(center, logits)
    assert agree(center, g["f64/centering/center_after_last_update"])


@pytest.mark.parametrize("mode", ["centering", "sinkhorn"])
def test_ibot_targets_losses_and_gradients_equal_the_reference(golden, form, mode):
    g = np.load(golden / "ibot_patch_loss.npz")
    center = torch.zeros(48, dtype=torch.float64)
    for step, temp in enumerate(g["teacher_temps"]):
        name = f"f64/{mode}/step{step}/"
        if name + "loss" not in g:
            continue
        logits = torch.tensor(g[f"step{step}/teacher_logits_masked"])   # (M, K)
        student = leaf(g[f"step{step}/student_logits_masked"])
        weight = torch.tensor(g[f"step{step}/masks_weight"])
        p = teacher_probabilities(mode, logits, center, temp)
        loss = ibot_loss(student, p, weight, n_crops=len(g[f"step{step}/masks"]))
        loss.backward()
        found = {"teacher_probs": p, "loss": loss, "grad_student": student.grad}
        for key, value in found.items():
            # 1e-7, because the reference stores the weights of masked patches in float32
            assert agree(value, g[name + key], 1e-7), (step, key)
        center = update_center(center, logits)


# ---------------------------------------------------------------- KoLeo
def test_koleo_is_minus_the_mean_log_distance_to_the_nearest_neighbour():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])     # neighbours at distance sqrt 2
    # the factor 5 has no effect, because the points are normalised first
    assert torch.isclose(koleo_loss(5 * x), -torch.tensor(2.0).sqrt().log())


def test_koleo_decreases_as_points_move_apart():
    close = unit(8, 16) * 0.05 + torch.ones(16)
    far = unit(8, 16)
    assert koleo_loss(close) > koleo_loss(far)
    x = close.requires_grad_()
    koleo_loss(x).backward()
    assert koleo_loss(x - 0.01 * x.grad / x.grad.norm()) < koleo_loss(x)


def test_koleo_losses_and_gradients_equal_the_reference_also_for_duplicate_points(golden):
    g = np.load(golden / "koleo.npz")
    for name in {key.split("/")[0] for key in g.files}:
        x = leaf(g[f"{name}/x"])
        if name == "two_crops":
            loss = 0.1 * sum(map(koleo_loss, x))            # 0.1: DINOv2's weight
            wanted = g[f"{name}/f64/weighted_loss"]
        else:
            loss = koleo_loss(x)
            wanted = g[f"{name}/f64/loss"]
        assert agree(loss, wanted)
        if f"{name}/f64/grad" in g:                         # not for duplicates
            loss.backward()
            assert agree(x.grad, g[f"{name}/f64/grad"])


# ---------------------------------------------------------------- targets of the teacher
def test_rows_of_sinkhorn_are_probabilities_and_all_prototypes_are_used_equally_often():
    p = sinkhorn(torch.randn(64, 8), temp=0.5, iterations=50)
    assert torch.allclose(p.sum(1), torch.ones(64))
    assert torch.allclose(p.sum(0), torch.full((8,), 8.0), atol=1e-3)


def test_rows_of_sinkhorn_sum_to_one_after_any_number_of_iterations():
    for n in (1, 2, 3):
        assert torch.allclose(sinkhorn(torch.randn(10, 32), 0.05, n).sum(1), torch.ones(10))


def test_sinkhorn_treats_all_leading_dimensions_as_rows():
    logits = torch.randn(2, 3, 5, 8)
    assert torch.equal(sinkhorn(logits, 0.1), sinkhorn(logits.view(30, 8), 0.1).view(2, 3, 5, 8))


def test_sinkhorn_is_invariant_to_a_constant_added_to_all_logits_to_a_row_or_to_a_column():
    """For a row or a column, only in the limit of many iterations"""
    logits = torch.randn(16, 8, dtype=torch.float64)
    for shift in (3.0, torch.randn(8), torch.randn(16, 1)):
        shifted = sinkhorn(logits + shift, 0.5, 200)
        limit = sinkhorn(logits, 0.5, 200)
        assert torch.allclose(shifted, limit, atol=1e-6)
    assert torch.allclose(sinkhorn(logits + 3.0, 0.5), sinkhorn(logits, 0.5), atol=1e-12)


def test_sinkhorn_does_not_overflow_for_large_logits_unlike_the_reference():
    p = sinkhorn(50 + torch.randn(16, 8), temp=0.04)            # exp(50 / 0.04) is infinite
    assert p.isfinite().all()
    assert torch.allclose(p.sum(1), torch.ones(16))


def test_a_prototype_with_zero_probability_in_all_rows_causes_no_division_by_zero():
    logits = torch.cat([torch.randn(16, 7), torch.full((16, 1), -100.0)], 1)
    p = sinkhorn(logits, temp=0.04)                             # exp(-100 / 0.04) is 0
    assert p.isfinite().all()
    assert torch.allclose(p.sum(1), torch.ones(16))


def test_sinkhorn_of_no_rows_returns_no_rows():
    assert sinkhorn(torch.zeros(0, 8), 0.04).shape == (0, 8)


def test_centering_lowers_the_probability_of_a_prototype_that_has_high_logits_in_all_rows():
    logits = torch.randn(64, 8) + torch.tensor([5.0] + [0.0] * 7)
    center = torch.zeros(8)
    for _ in range(200):
        center = update_center(center, logits)
    assert torch.allclose(center, logits.mean(0), atol=1e-4)
    before = centered_softmax(logits, torch.zeros(8), 0.1)[:, 0].mean()
    after = centered_softmax(logits, center, 0.1)[:, 0].mean()
    assert before > 0.95
    assert after < 0.3


def test_the_center_moves_a_tenth_of_the_way_to_the_mean_of_all_rows():
    center = torch.randn(8)
    logits = torch.randn(2, 5, 8)
    wanted = 0.9 * center + 0.1 * logits.mean((0, 1))
    assert torch.allclose(update_center(center, logits), wanted)


def test_the_center_does_not_change_if_there_are_no_rows():
    center = torch.randn(8)
    assert torch.equal(update_center(center, torch.zeros(0, 8)), center)


def test_targets_have_no_gradient():
    logits = torch.randn(4, 8, requires_grad=True)
    center = torch.zeros(8)
    assert not sinkhorn(logits, 0.1).requires_grad
    assert not centered_softmax(logits, center, 0.1).requires_grad
    assert not update_center(center, logits).requires_grad


def test_a_low_temperature_assigns_all_probability_to_the_largest_logit():
    logits = torch.randn(4, 8)
    p = centered_softmax(logits, torch.zeros(8), 1e-4)
    assert torch.equal(p.argmax(1), logits.argmax(1))
    assert p.max(1).values.min() > 0.999


def teacher_logits(seed):
    """-> random logits of class tokens (2, B, K) and of masked patches (M, K)"""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, 5, 8, generator=g), torch.randn(7, 8, generator=g)


def test_teacher_targets_by_sinkhorn_depend_on_the_present_batch_only():
    targets = TeacherTargets("sinkhorn", 8, "cpu")
    cls, patch = teacher_logits(0)
    for _ in range(2):
        p, q = targets(cls, patch, 0.1)
        assert torch.equal(p, sinkhorn(cls, 0.1))
        assert torch.equal(q, sinkhorn(patch, 0.1))
        targets.step()
    assert all(center.abs().max() == 0 for center in targets.state_dict().values())


def test_teacher_targets_by_centering_use_the_centers_of_the_earlier_batches():
    """Class tokens and patches have separate centers."""
    targets = TeacherTargets("centering", 8, "cpu")
    centers = [torch.zeros(8), torch.zeros(8)]
    for step in range(3):
        logits = teacher_logits(step)
        for i, p in enumerate(targets(*logits, 0.1)):
            assert torch.equal(p, centered_softmax(logits[i], centers[i], 0.1))
            centers[i] = update_center(centers[i], logits[i])
        targets.step()
    assert torch.equal(targets.state_dict()["cls"], centers[0])
    assert torch.equal(targets.state_dict()["patch"], centers[1])


def test_the_centers_change_only_when_step_is_called():
    """train.py does not call it if the optimizer step is skipped, so a batch with nan does not
    change the centers."""
    targets = TeacherTargets("centering", 8, "cpu")
    targets(*teacher_logits(0), 0.1)
    targets.step()
    before = {name: x.clone() for name, x in targets.state_dict().items()}
    assert all(x.abs().max() > 0 for x in before.values())
    cls, patch = teacher_logits(1)
    targets(cls * torch.nan, patch, 0.1)                        # step is not called
    assert all(torch.equal(x, before[name]) for name, x in targets.state_dict().items())
    cls, patch = teacher_logits(2)
    targets(cls, patch, 0.1)
    targets.step()
    wanted = update_center(before["cls"], cls)
    assert torch.equal(targets.state_dict()["cls"], wanted)


def test_teacher_targets_continue_from_their_saved_state(tmp_path):
    one = TeacherTargets("centering", 8, "cpu")
    two = TeacherTargets("centering", 8, "cpu")
    one(*teacher_logits(0), 0.1)
    one.step()
    torch.save(one.state_dict(), tmp_path / "targets.pt")
    two(*teacher_logits(5), 0.1)                   # load_state_dict discards this update
    two.load_state_dict(torch.load(tmp_path / "targets.pt"))
    two.step()
    cls, patch = teacher_logits(1)
    for targets in (one, two):
        found = targets(cls, patch, 0.1)
        targets.step()
    for name, x in one.state_dict().items():
        assert torch.equal(x, two.state_dict()[name])
    center = torch.load(tmp_path / "targets.pt")["cls"]
    assert torch.equal(found[0], centered_softmax(cls, center, 0.1))


# ---------------------------------------------------------------- precision
def bf16(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def direction(*shape, seed):
    return F.normalize(bf16(*shape, seed=seed).float(), dim=-1).bfloat16()


def probabilities(*shape, seed):
    return bf16(*shape, seed=seed).float().softmax(-1).bfloat16()


BIAS = torch.tensor(-10.0)
CENTER = torch.randn(64)
WEIGHT = torch.full((12,), 1 / 3)                  # 12 masked patches, 3 in each of 4 crops
IMG = direction(16, 32, seed=0)
TXT = direction(16, 32, seed=1)
# name: (function, bfloat16 inputs with gradients, bfloat16 inputs without)
COMPUTED = {
    "clip": (lambda img, txt: clip_loss(img, txt, TEN), [IMG, TXT], []),
    "siglip": (lambda img, txt: siglip_loss(img, txt, TEN, BIAS), [IMG, TXT], []),
    "dino": (lambda s, t: losses.dino_loss(s, t),
             [bf16(4, 8, 64, seed=0)], [probabilities(2, 8, 64, seed=1)]),
    "ibot": (lambda s, t: ibot_loss(s, t, WEIGHT, 4),
             [bf16(12, 64, seed=0)], [probabilities(12, 64, seed=1)]),
    "koleo": (koleo_loss, [1 + 0.1 * bf16(64, 32, seed=0)], []),
    "rec": (rec_loss, [bf16(2, 3, 8, 8, seed=0)], [bf16(2, 3, 8, 8, seed=1)]),
    "centered_softmax": (lambda x: centered_softmax(x, CENTER, 0.1), [], [bf16(16, 64, seed=0)]),
    "update_center": (lambda x: update_center(CENTER, x), [], [bf16(16, 64, seed=0)]),
    "sinkhorn": (lambda x: sinkhorn(x, 0.1), [], [bf16(16, 64, seed=0)]),
    "entropy": (entropy, [], [probabilities(2, 8, 64, seed=0)]),
    "feature_std": (feature_std, [], [1 + 0.1 * bf16(16, 32, seed=0)]),
}


def computed(name, dtype, autocast):
    """Call a function of COMPUTED with its inputs in `dtype` -> its value, and the gradients of its
    inputs, cast to float32"""
    function, with_grad, without = COMPUTED[name]
    with_grad = [x.to(dtype).requires_grad_() for x in with_grad]
    without = [x.to(dtype) for x in without]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = function(*with_grad, *without)
    if not with_grad:
        return value, []
    return value, [g.float() for g in torch.autograd.grad(value, with_grad)]


@pytest.mark.parametrize("name", COMPUTED)
def test_losses_targets_and_diagnostics_are_the_same_inside_and_outside_autocast(name, form):
    """Values are float32 and agree to 1e-6, also for bfloat16 inputs. So do the gradients; those of
    bfloat16 inputs are rounded to bfloat16 once, at the end, by at most 2^-8."""
    value, grads = computed(name, torch.float32, autocast=False)
    for dtype, rounding in ((torch.float32, 1e-6), (torch.bfloat16, 2 ** -8)):
        inside, grads_inside = computed(name, dtype, autocast=True)
        assert inside.dtype == torch.float32 and agree(inside, value, 1e-6), dtype
        for a, b in zip(grads_inside, grads, strict=True):
            assert agree(a, b, rounding), dtype


@pytest.mark.parametrize("name", COMPUTED)
def test_losses_targets_and_diagnostics_of_float64_are_float64(name, form):
    assert computed(name, torch.float64, autocast=False)[0].dtype == torch.float64


def test_losses_of_bfloat16_logits_are_computed_in_float32(form):
    student = torch.randn(4, 2, 16).bfloat16()
    teacher = torch.randn(2, 2, 16).softmax(-1)
    wanted = losses.dino_loss(student.float(), teacher)
    assert torch.equal(losses.dino_loss(student, teacher), wanted)
    assert sinkhorn(student[0], 0.1).dtype == torch.float32


def test_to_fp32_converts_half_precision_and_keeps_float64():
    converted = {torch.bfloat16: torch.float32, torch.float16: torch.float32,
                 torch.float32: torch.float32, torch.float64: torch.float64}
    for given, wanted in converted.items():
        assert to_fp32(torch.ones(1, dtype=given)).dtype == wanted


@pytest.mark.parametrize("width", [192, 1024])
@pytest.mark.parametrize("distance", [0.1, 0.3, 1.0])
def test_koleo_finds_the_true_nearest_neighbours_under_autocast(distance, width):
    """512 class tokens at a small distance from a common direction. At 0.1, a matrix product in
    bfloat16 would find a wrong neighbour for 99 % of them."""
    x = unit(1, width, seed=0) + distance * unit(512, width, seed=1)
    double = x.double().requires_grad_()
    single = x.clone().requires_grad_()
    koleo_loss(double).backward()
    with torch.autocast("cpu", torch.bfloat16):
        loss = koleo_loss(single)
        loss.backward()
    points = F.normalize(x.double(), dim=-1)
    # 9 on the diagonal: a point is not its own neighbour
    nearest = (torch.cdist(points, points) + 9 * torch.eye(512)).min(1).values
    # a wrong neighbour is further away, so the loss would be lower
    assert agree(loss, -nearest.log().mean(), 1e-6)
    single_grad = single.grad.double().flatten()
    assert F.cosine_similarity(single_grad, double.grad.flatten(), dim=0) > 0.999


def test_losses_switch_tf32_off_and_restore_it_even_after_an_error(monkeypatch):
    x = unit(4, 8)
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    normalize = losses.F.normalize                 # a function that koleo_loss calls
    tf32_inside = []

    def recording_normalize(*args, **more):
        tf32_inside.append(matmul.allow_tf32)
        return normalize(*args, **more)

    monkeypatch.setattr(losses.F, "normalize", recording_normalize)
    try:
        matmul.allow_tf32 = True
        koleo_loss(x)
        with pytest.raises(IndexError):
            koleo_loss(x[0])                       # (D,) in place of (B, D)
        assert tf32_inside == [False, False]
        assert matmul.allow_tf32
    finally:
        matmul.allow_tf32 = before


# ---------------------------------------------------------------- reconstruction
def test_rec_loss_is_zero_for_equal_images_and_the_constant_if_they_differ_by_a_constant():
    img = torch.randn(2, 3, 8, 8)
    assert rec_loss(img, img) == 0
    assert torch.isclose(rec_loss(img + 0.25, img), torch.tensor(0.25))


def test_rec_loss_adds_the_perceptual_loss_with_weight_one():
    img = torch.randn(2, 3, 8, 8)
    loss = rec_loss(img + 0.25, img, lambda pixels, target: torch.tensor(3.0))
    assert torch.isclose(loss, torch.tensor(3.25))


# ---------------------------------------------------------------- diagnostics
def test_entropy_is_log_K_for_uniform_probabilities_and_zero_for_one_hot_ones():
    K = 16
    assert math.isclose(entropy(torch.full((2, 8, K), 1 / K)), math.log(K), rel_tol=1e-6)
    assert entropy(torch.eye(K)) == 0


def test_feature_std_is_zero_for_equal_features_and_one_for_opposite_ones():
    same = torch.ones(8, 4)
    assert feature_std(same) == 0
    assert math.isclose(feature_std(torch.cat([same, -same])), 1.0)
