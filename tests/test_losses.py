"""The losses: limits, symmetries, and the reference's numbers.   Two processes stand in test_dist.py."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from vtp_min import losses, weights
from vtp_min.gauges import entropy, spread
from vtp_min.losses import (Perceptual, centered_softmax, clip_loss, dino_loss, ibot_loss, koleo_loss, moved_center, rec_loss, siglip_loss, sinkhorn,
                            sinkhorn_center, to_fp32)

TEN = torch.tensor(10.0)


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def leaf(a):
    return torch.tensor(a, dtype=torch.float64, requires_grad=True)


def agree(a, b, tolerance=1e-8):
    """Relative to the largest magnitude"""
    a, b = (torch.as_tensor(x).detach().double().reshape(-1) for x in (a, b))
    return (a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-12)


# ---------------------------------------------------------------- words
def test_clip_loss_is_log_B_when_everything_looks_alike():
    same = F.normalize(torch.ones(8, 16), dim=-1)
    assert torch.isclose(clip_loss(same, same, TEN), torch.tensor(8.0).log())


def test_clip_loss_vanishes_when_every_caption_points_at_its_own_picture():
    assert clip_loss(torch.eye(8), torch.eye(8), torch.tensor(100.0)) < 1e-6


def test_clip_loss_is_symmetric_and_blind_to_the_order_of_pairs_and_to_a_bias():
    img, txt, order = unit(8, 4), unit(8, 4, seed=1), torch.randperm(8)
    loss = clip_loss(img, txt, TEN)
    for other in (clip_loss(txt, img, TEN), clip_loss(img[order], txt[order], TEN), clip_loss(img, txt, TEN, bias=torch.tensor(-3.0))):
        assert torch.isclose(loss, other)


def test_siglip_loss_is_a_sum_of_logistic_regressions():
    img, txt = unit(4, 8), unit(4, 8, seed=1)
    pairs = [F.softplus(-(1 if i == j else -1) * (10 * img[i] @ txt[j] - 10)) for i in range(4) for j in range(4)]
    assert torch.isclose(siglip_loss(img, txt, TEN, -TEN), sum(pairs) / 4)


def test_clip_and_siglip_losses_and_gradients_are_the_reference_s(golden):
    g = np.load(golden / "clip_single.npz")
    for name in {k.rsplit("/", 1)[0] for k in g.files if k.startswith("f64/") and k.endswith("/loss")}:      # f64/scale0/clip_bias, ...
        _, scale, kind = name.split("/")
        raw_img, raw_txt, log, bias = (leaf(g[k]) for k in ("raw_image", "raw_text", f"{scale}/logit_scale_log", f"{scale}/logit_bias"))
        img, txt = F.normalize(raw_img, dim=-1), F.normalize(raw_txt, dim=-1)
        loss = siglip_loss(img, txt, log.exp(), bias) if kind == "siglip" else clip_loss(img, txt, log.exp(), bias if kind == "clip_bias" else None)
        loss.backward()
        for value, key in ((loss, "loss"), (raw_img.grad, "grad_raw_image"), (raw_txt.grad, "grad_raw_text"), (log.grad, "grad_logit_scale_log")):
            assert agree(value, g[f"{name}/{key}"]) or abs(g[f"{name}/{key}"]).max() < 1e-9, (name, key)
        if kind == "siglip":
            assert agree(bias.grad, g[f"{name}/grad_logit_bias"])


# ---------------------------------------------------------------- views
def test_dino_loss_is_log_K_for_a_student_without_opinion():
    teacher = torch.randn(2, 5, 32).softmax(-1)
    assert torch.isclose(dino_loss(torch.zeros(4, 5, 32), teacher), torch.tensor(32.0).log())


def test_dino_loss_is_never_below_the_teacher_s_entropy_and_touches_it_when_all_agree():
    p = (3 * torch.randn(1, 5, 32)).softmax(-1).expand(2, -1, -1)
    entropy = -(p * p.log()).sum(-1).mean()
    agreeing = 0.1 * p.log()[:1].expand(6, -1, -1)
    assert torch.isclose(dino_loss(agreeing, p), entropy)
    assert dino_loss(agreeing + 0.1 * torch.randn_like(agreeing), p) > entropy


def test_a_student_crop_is_never_compared_with_itself():
    teacher = torch.eye(2)[:, None]                                                # crop 0 is prototype 0, crop 1 prototype 1
    swapped = torch.tensor([[[-9.0, 9.0]], [[9.0, -9.0]]])                         # each answers as the other does
    assert dino_loss(swapped, teacher) < 1e-6 < dino_loss(-swapped, teacher)


def test_every_pair_of_views_weighs_alike():
    student, teacher = torch.randn(2 + 3, 4, 8), torch.randn(2, 4, 8).softmax(-1)
    ce = lambda t, s: -(teacher[t] * F.log_softmax(student[s] / 0.1, -1)).sum(-1).mean()
    assert torch.isclose(dino_loss(student, teacher), (ce(0, 1) + ce(1, 0) + sum(ce(t, s) for t in (0, 1) for s in (2, 3, 4))) / 8)


# ---------------------------------------------------------------- patches
def test_a_masked_crop_weighs_the_same_however_much_of_it_is_hidden():
    teacher = torch.eye(4)[[0, 0, 0, 0, 0, 0]]
    logits = torch.zeros(6, 4)
    assert torch.isclose(ibot_loss(logits, teacher, torch.tensor([1.0] + [1 / 5] * 5), n_crops=2), torch.tensor(4.0).log())


def test_ibot_loss_divides_by_crops_without_a_mask_too():
    student, teacher = torch.randn(3, 8), torch.randn(3, 8).softmax(-1)
    assert torch.isclose(2 * ibot_loss(student, teacher, torch.ones(3) / 3, n_crops=4), ibot_loss(student, teacher, torch.ones(3) / 3, n_crops=2))


def test_ibot_loss_of_nothing_hidden_is_zero():
    assert ibot_loss(torch.zeros(0, 8), torch.zeros(0, 8), torch.zeros(0), n_crops=2) == 0


# ---------------------------------------------------------------- dino and ibot against the reference
@pytest.mark.parametrize("mode", ["centering", "sinkhorn"])
def test_dino_targets_losses_gradients_and_centres_are_the_reference_s(golden, mode):
    g = np.load(golden / "dino_cls_loss.npz")
    center = torch.zeros(int(g["K"]), dtype=torch.float64)
    for step, temp in enumerate(g["teacher_temps"]):
        logits, name = torch.tensor(g[f"step{step}/teacher_logits"]), f"f64/{mode}/step{step}/"
        if name + "teacher_probs" in g:
            p = centered_softmax(logits, center, temp) if mode == "centering" else sinkhorn(logits.flatten(0, 1), temp).view_as(logits)
            assert agree(p, g[name + "teacher_probs"])
        if name + "loss_total" in g:
            crops, local = leaf(g[f"step{step}/student_global"]), leaf(g[f"step{step}/student_local"])
            loss = dino_loss(torch.cat([crops, local]), p)
            loss.backward()
            for value, key in ((loss, "loss_total"), (crops.grad, "grad_student_global"), (local.grad, "grad_student_local")):
                assert agree(value, g[name + key]), (step, key)
        center = moved_center(center, lambda: [logits.flatten(0, 1)])
    assert agree(center, g["f64/centering/center_after_last_update"])


@pytest.mark.parametrize("mode", ["centering", "sinkhorn"])
def test_ibot_targets_losses_and_gradients_are_the_reference_s(golden, mode):
    g = np.load(golden / "ibot_patch_loss.npz")
    center = torch.zeros(48, dtype=torch.float64)
    for step, temp in enumerate(g["teacher_temps"]):
        name = f"f64/{mode}/step{step}/"
        if name + "loss" in g:
            logits, student = torch.tensor(g[f"step{step}/teacher_logits_masked"]), leaf(g[f"step{step}/student_logits_masked"])
            p = centered_softmax(logits, center, temp) if mode == "centering" else sinkhorn(logits, temp)
            loss = ibot_loss(student, p, torch.tensor(g[f"step{step}/masks_weight"]), n_crops=len(g[f"step{step}/masks"]))
            loss.backward()
            for value, key in ((p, "teacher_probs"), (loss, "loss"), (student.grad, "grad_student")):
                assert agree(value, g[name + key], 1e-7), (step, key)                # the reference's weights were float32
            center = moved_center(center, lambda: [logits])


# ---------------------------------------------------------------- spread
def test_koleo_is_minus_the_mean_log_distance_to_the_nearest_neighbour():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])                          # on the circle; nearest neighbours are sqrt 2 away
    assert torch.isclose(koleo_loss(5 * x), -torch.tensor(2.0).sqrt().log())


def test_koleo_falls_when_points_spread():
    close, far = unit(8, 16) * 0.05 + torch.ones(16), unit(8, 16)
    assert koleo_loss(close) > koleo_loss(far)
    x = close.requires_grad_()
    koleo_loss(x).backward()
    assert koleo_loss(x - 0.01 * x.grad / x.grad.norm()) < koleo_loss(x)


def test_koleo_values_and_gradients_are_the_reference_s_and_twins_are_finite(golden):
    g = np.load(golden / "koleo.npz")
    for name in {k.split("/")[0] for k in g.files}:
        x = leaf(g[f"{name}/x"])
        loss = 0.1 * sum(map(koleo_loss, x)) if name == "two_crops" else koleo_loss(x)
        assert agree(loss, g[f"{name}/f64/{'weighted_loss' if name == 'two_crops' else 'loss'}"])
        if f"{name}/f64/grad" in g:
            loss.backward()
            assert agree(x.grad, g[f"{name}/f64/grad"])


# ---------------------------------------------------------------- the teacher's targets
def test_sinkhorn_gives_probabilities_and_equal_shares_of_the_batch_to_all_prototypes():
    p = sinkhorn(torch.randn(64, 8), temp=0.5, iterations=50)
    assert torch.allclose(p.sum(1), torch.ones(64)) and torch.allclose(p.sum(0), torch.full((8,), 8.0), atol=1e-3)


def test_rows_of_sinkhorn_sum_to_one_after_any_number_of_rounds():
    for n in (1, 2, 3):
        assert torch.allclose(sinkhorn(torch.randn(10, 32), 0.05, n).sum(1), torch.ones(10))


def test_sinkhorn_ignores_what_all_logits_and_what_a_prototype_s_logits_have_in_common():
    logits = torch.randn(16, 8, dtype=torch.float64)
    for shift in (3.0, torch.randn(8), torch.randn(16, 1)):                           # any row or column shift is balanced away in the limit
        assert torch.allclose(sinkhorn(logits + shift, 0.5, 200), sinkhorn(logits, 0.5, 200), atol=1e-6)
    assert torch.allclose(sinkhorn(logits + 3.0, 0.5), sinkhorn(logits, 0.5), atol=1e-12)


def test_sinkhorn_survives_logits_that_overflow_the_reference():
    p = sinkhorn(50 + torch.randn(16, 8), temp=0.04)                                  # exp(50 / 0.04) is infinite
    assert p.isfinite().all() and torch.allclose(p.sum(1), torch.ones(16))


def test_sinkhorn_of_no_rows_is_no_rows():
    assert sinkhorn(torch.zeros(0, 8), 0.04).shape == (0, 8)


def test_centering_takes_the_favourite_away_from_everyone():
    logits = torch.randn(64, 8) + torch.tensor([5.0] + [0.0] * 7)
    center = torch.zeros(8)
    for _ in range(200):
        center = moved_center(center, lambda: [logits])
    assert torch.allclose(center, logits.mean(0), atol=1e-4)
    assert centered_softmax(logits, torch.zeros(8), 0.1)[:, 0].mean() > 0.95 > 0.3 > centered_softmax(logits, center, 0.1)[:, 0].mean()


def test_a_centre_that_sees_nothing_stays_where_it_is():
    center = torch.randn(8)
    assert torch.equal(moved_center(center, lambda: [torch.zeros(0, 8)]), center)


def test_targets_carry_no_gradient():
    logits = torch.randn(4, 8, requires_grad=True)
    assert not any(t.requires_grad for t in (sinkhorn(logits, 0.1), centered_softmax(logits, torch.zeros(8), 0.1), moved_center(torch.zeros(8), lambda: [logits])))


def test_low_temperature_sharpens_to_the_winner():
    logits = torch.randn(4, 8)
    p = centered_softmax(logits, torch.zeros(8), 1e-4)
    assert torch.equal(p.argmax(1), logits.argmax(1)) and p.max(1).values.min() > 0.999


def test_losses_of_bfloat16_logits_are_taken_in_float32():
    student, teacher = torch.randn(4, 2, 16).bfloat16(), torch.randn(2, 2, 16).softmax(-1)
    assert torch.equal(dino_loss(student, teacher), dino_loss(student.float(), teacher)) and sinkhorn(student[0], 0.1).dtype == torch.float32


# ---------------------------------------------------------------- precision
def bf16(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def direction(*shape, seed):
    return F.normalize(bf16(*shape, seed=seed).float(), dim=-1).bfloat16()


def probabilities(*shape, seed):
    return bf16(*shape, seed=seed).float().softmax(-1).bfloat16()


BIAS, CENTER, WEIGHT = torch.tensor(-10.0), torch.randn(64), torch.full((12,), 1 / 3)
COMPUTED = {   # name: (function, its inputs in bfloat16). Those that no gradient reaches come second
    "clip": (lambda img, txt: clip_loss(img, txt, TEN), [direction(16, 32, seed=0), direction(16, 32, seed=1)], []),
    "siglip": (lambda img, txt: siglip_loss(img, txt, TEN, BIAS), [direction(16, 32, seed=0), direction(16, 32, seed=1)], []),
    "dino": (dino_loss, [bf16(4, 8, 64, seed=0)], [probabilities(2, 8, 64, seed=1)]),
    "ibot": (lambda s, t: ibot_loss(s, t, WEIGHT, 4), [bf16(12, 64, seed=0)], [probabilities(12, 64, seed=1)]),
    "koleo": (koleo_loss, [1 + 0.1 * bf16(64, 32, seed=0)], []),
    "rec": (lambda a, b: rec_loss(a, b)[0], [bf16(2, 3, 8, 8, seed=0)], [bf16(2, 3, 8, 8, seed=1)]),
    "centered_softmax": (lambda x: centered_softmax(x, CENTER, 0.1), [], [bf16(16, 64, seed=0)]),
    "moved_center": (lambda x: moved_center(CENTER, lambda: [x]), [], [bf16(16, 64, seed=0)]),
    "sinkhorn": (lambda x: sinkhorn(x, 0.1), [], [bf16(16, 64, seed=0)]),
    "sinkhorn_center": (lambda x: sinkhorn_center(lambda: [x[:5], x[5:]], 0.1), [], [bf16(16, 64, seed=0)]),
    "entropy": (entropy, [], [probabilities(2, 8, 64, seed=0)]),
    "spread": (spread, [], [1 + 0.1 * bf16(16, 32, seed=0)]),
}


def computed(name, dtype, autocast):
    """-> the value, and its gradients in float32"""
    function, moving, fixed = COMPUTED[name]
    moving = [x.to(dtype).requires_grad_() for x in moving]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = function(*moving, *(x.to(dtype) for x in fixed))
    return value, [g.float() for g in torch.autograd.grad(value, moving)] if moving else []


@pytest.mark.parametrize("name", COMPUTED)
def test_losses_targets_and_gauges_are_the_same_inside_and_outside_autocast(name):
    """In float32, to 1e-6, and so are gradients; for bfloat16 inputs too, whose gradients are rounded to bfloat16 once, at the end."""
    value, grads = computed(name, torch.float32, autocast=False)
    for dtype, rounded in ((torch.float32, 1e-6), (torch.bfloat16, 2 ** -8)):
        inside, grads_inside = computed(name, dtype, autocast=True)
        assert inside.dtype == torch.float32 and agree(inside, value, 1e-6), dtype
        assert all(agree(a, b, rounded) for a, b in zip(grads_inside, grads, strict=True)), dtype


def test_lpips_is_the_same_inside_and_outside_autocast():
    torch.manual_seed(0)
    lpips, target = Perceptual("squeeze", random_trunk=True), torch.randn(1, 3, 32, 32)
    found = []
    for enabled in (False, True):
        pixels = (target + 0.1 * torch.ones_like(target)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            value = lpips(pixels, target)
        found.append((value, torch.autograd.grad(value, pixels)[0]))
    assert found[1][0].dtype == torch.float32 and all(agree(a, b, 1e-6) for a, b in zip(*found))


def test_to_fp32_lifts_half_precision_and_keeps_float64():
    dtypes = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64}
    assert all(to_fp32(torch.ones(1, dtype=given)).dtype == wanted for given, wanted in dtypes.items())


@pytest.mark.parametrize("width", [192, 1024])
@pytest.mark.parametrize("distance", [0.1, 0.3, 1.0])
def test_koleo_pushes_true_neighbours_apart_under_autocast(distance, width):
    """512 class tokens at this distance from a common direction. A bfloat16 product finds a wrong neighbour for 99 % of them at 0.1."""
    x = unit(1, width, seed=0) + distance * unit(512, width, seed=1)
    double, single = x.double().requires_grad_(), x.clone().requires_grad_()
    koleo_loss(double).backward()
    with torch.autocast("cpu", torch.bfloat16):
        loss = koleo_loss(single)
        loss.backward()
    points = F.normalize(x.double(), dim=-1)
    nearest = (torch.cdist(points, points) + 9 * torch.eye(512)).min(1).values
    assert agree(loss, -nearest.log().mean(), 1e-6)                                    # a wrong neighbour is further away: the loss would be lower
    assert F.cosine_similarity(single.grad.double().flatten(), double.grad.flatten(), dim=0) > 0.999


def test_losses_forbid_tf32_and_bring_it_back_even_after_an_error(monkeypatch):
    x, seen, matmul = unit(4, 8), [], torch.backends.cuda.matmul
    before, normalize = matmul.allow_tf32, losses.F.normalize
    monkeypatch.setattr(losses.F, "normalize", lambda *a, **k: seen.append(matmul.allow_tf32) or normalize(*a, **k))
    try:
        matmul.allow_tf32 = True
        koleo_loss(x)
        with pytest.raises(IndexError):
            koleo_loss(x[0])
        assert seen == [False, False] and matmul.allow_tf32
    finally:
        matmul.allow_tf32 = before


# ---------------------------------------------------------------- pixels
def test_rec_loss_of_the_same_picture_is_zero_and_of_a_shifted_one_the_shift():
    img = torch.randn(2, 3, 8, 8)
    assert [x.item() for x in rec_loss(img, img)] == [0, 0]
    assert torch.isclose(rec_loss(img + 0.25, img)[0], torch.tensor(0.25))


@pytest.fixture(scope="module")
def squeeze():
    torch.manual_seed(0)
    return Perceptual("squeeze", random_trunk=True)


def test_lpips_of_equal_pictures_is_zero_and_grows_with_the_difference(squeeze):
    img, noise = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32)
    none, some, more = (squeeze(img + a * noise, img).item() for a in (0, 0.1, 1.0))
    assert none == 0 < some < more


def test_lpips_sends_its_gradient_to_the_pixels_and_not_to_its_weights(squeeze):
    pixels, target = torch.randn(1, 3, 32, 32, requires_grad=True), torch.randn(1, 3, 32, 32)
    squeeze(pixels, target).backward()
    assert pixels.grad.abs().max() > 0 and all(not p.requires_grad and p.grad is None for p in squeeze.parameters())


def test_lpips_stays_in_eval_mode_whatever_its_parent_does(squeeze):
    parent = nn.ModuleList([squeeze]).train()
    assert parent.training and not any(m.training for m in squeeze.modules())
    a, b = torch.randn(2, 1, 3, 32, 32)
    assert squeeze(a, b) == squeeze(a, b)                                              # dropout would differ


def test_lpips_undoes_imagenet_s_normalisation():
    class Brightness(nn.Module):
        def forward(self, a, b):
            return a
    seen = Perceptual("squeeze", random_trunk=True)
    seen.lpips = Brightness()
    white = (torch.ones(1, 3, 32, 32) - seen.mean) / seen.std
    black = -seen.mean / seen.std * torch.ones(1, 3, 32, 32)
    assert torch.isclose(seen(white, black), torch.tensor(1.0)) and torch.isclose(seen(black, white), torch.tensor(-1.0))


def test_the_trunk_of_lpips_is_torchvision_s_network(tmp_path, monkeypatch):
    """The names match: what torchvision's first layers make of a picture is what LPIPS compares."""
    torch.manual_seed(3)
    net = torchvision.models.squeezenet1_1(weights=None).eval()
    torch.save(net.state_dict(), tmp_path / "squeeze.pth")
    monkeypatch.setattr(losses, "find", lambda name: tmp_path / f"{name}.pth")
    ours, img = Perceptual("squeeze"), torch.randn(1, 3, 32, 32)
    assert torch.allclose(ours.lpips.net(img)[-1], net.features(img), atol=1e-6)


@pytest.mark.parametrize("net", ["vgg", "alex", "squeeze"])
def test_missing_weights_are_named_with_the_command_that_fetches_them(net, tmp_path, monkeypatch):
    monkeypatch.setenv("VTP_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(FileNotFoundError, match=f"is missing.*eval.py fetch {net}"):
        Perceptual(net)
