"""Gradient caching: micro-batches give the targets, losses and gradients of the whole batch."""
from contextlib import nullcontext

import pytest
import torch

import train
from vtp_min import losses
from vtp_min.extras import gradcache
from vtp_min.extras.gradcache import sinkhorn_center, update_center
from vtp_min.losses import centered_softmax, sinkhorn
from vtp_min.model import Student, Teacher

CPU = torch.device("cpu")
# sizes of the micro-batches, 16 rows together
PARTS = {"whole": [16], "halves": [8, 8], "unequal": [3, 1, 12], "with zero rows": [0, 7, 0, 9, 0]}
WITH_PARTS = pytest.mark.parametrize("sizes", PARTS.values(), ids=PARTS)


def random_logits(dtype=torch.float64, scale=1.0):
    g = torch.Generator().manual_seed(0)
    return (scale * torch.randn(16, 24, generator=g)).to(dtype)


def in_parts(logits, sizes):
    """-> a function that yields micro-batches; sinkhorn_center calls it in each iteration"""
    return lambda: iter(logits.split(sizes))


# ---------------------------------------------------------------- Sinkhorn
@WITH_PARTS
@pytest.mark.parametrize("temp", [1.0, 0.1, 0.04])
@pytest.mark.parametrize("iterations", [1, 2, 3, 10])
def test_softmax_with_the_sinkhorn_center_equals_sinkhorn(sizes, temp, iterations):
    logits = random_logits()
    center = sinkhorn_center(in_parts(logits, sizes), temp, iterations)
    assert center.shape == (24,)
    found = centered_softmax(logits, center, temp)
    assert torch.allclose(found, sinkhorn(logits, temp, iterations), rtol=0, atol=1e-12)


@WITH_PARTS
def test_softmax_with_the_sinkhorn_center_equals_sinkhorn_in_float32(sizes):
    """With logits in the range of the DINO head: cosines, multiplied by a gain that starts at 1"""
    logits = random_logits(torch.float32, scale=0.5)
    found = centered_softmax(logits, sinkhorn_center(in_parts(logits, sizes), 0.04), 0.04)
    assert torch.allclose(found, sinkhorn(logits, 0.04), rtol=0, atol=2e-6)


def test_the_default_number_of_iterations_is_the_same_as_in_sinkhorn():
    logits = random_logits()
    found = centered_softmax(logits, sinkhorn_center(lambda: [logits], 0.1), 0.1)
    assert torch.allclose(found, sinkhorn(logits, 0.1), rtol=0, atol=1e-12)


def test_the_center_is_finite_if_exp_overflows_or_a_prototype_has_probability_zero():
    logits = torch.cat([50 + torch.randn(16, 7), torch.full((16, 1), -100.0)], 1)
    center = sinkhorn_center(in_parts(logits, [0, 10, 6]), 0.04)
    p = centered_softmax(logits, center, 0.04)
    assert center.isfinite().all() and torch.allclose(p.sum(1), torch.ones(16))


def test_the_center_has_no_gradient_and_is_the_same_inside_autocast():
    logits = random_logits(torch.float32).requires_grad_()
    outside = sinkhorn_center(in_parts(logits, [5, 11]), 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        inside = sinkhorn_center(in_parts(logits, [5, 11]), 0.1)
    assert not outside.requires_grad and torch.equal(inside, outside)
    half = logits.detach().bfloat16()
    center = sinkhorn_center(in_parts(half, [5, 11]), 0.1)
    assert center.dtype == torch.float32
    assert torch.equal(center, sinkhorn_center(in_parts(half.float(), [5, 11]), 0.1))


# ---------------------------------------------------------------- DINO's center
@WITH_PARTS
def test_the_center_of_micro_batches_is_the_center_of_the_batch(sizes):
    logits, center = random_logits(), torch.randn(24, dtype=torch.float64)
    found = update_center(center, in_parts(logits, sizes))
    wanted = losses.update_center(center, logits)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-14)


def test_a_center_without_rows_is_unchanged():
    center = torch.randn(24)
    assert torch.equal(update_center(center, lambda: [torch.zeros(0, 24)]), center)


# ---------------------------------------------------------------- micro-batches
def test_the_gradient_of_the_inner_product_is_the_cached_gradient():
    feature, grad = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    gradcache.inner_product(feature, grad).backward()
    assert torch.equal(feature.grad, grad)


def old_split(rows, size, n, k):
    """The kept rows of micro-batch k, selected by a mask and renumbered"""
    part = size // n
    crop, image = rows // size, rows % size
    inside = (image >= k * part) & (image < (k + 1) * part)
    return (crop * part + image - k * part)[inside]


def test_kept_rows_are_renumbered_in_each_micro_batch_and_none_is_lost():
    """Two crops of 6 images, in 3 micro-batches. Row r is crop r // 6 of image r % 6."""
    rows = torch.tensor([0, 1, 4, 5, 7, 8, 11])
    found = []
    for k, (part,) in enumerate(gradcache.split_rows([rows], 6, 3, CPU)):
        crop, image = part // 2, part % 2                  # 2 images in each micro-batch
        found += (6 * crop + 2 * k + image).tolist()
    assert sorted(found) == rows.tolist()


@pytest.mark.parametrize("n", [1, 2, 8])
def test_kept_rows_of_all_branches_and_micro_batches_are_split_at_once(n):
    """Three crops of 8 images; a branch without rows, too"""
    g = torch.Generator().manual_seed(0)
    branches = [torch.randperm(24, generator=g)[:m].sort().values for m in (17, 0, 5, 24)]
    found = gradcache.split_rows(branches, 8, n, CPU)
    assert len(found) == n
    for k in range(n):
        for part, rows in zip(found[k], branches, strict=True):
            assert torch.equal(part, old_split(rows, 8, n, k))


def test_the_indices_of_all_micro_batches_are_slices_of_one_copy():
    branches = [torch.arange(12), torch.arange(0, 12, 2)]
    parts = gradcache.split_rows(branches, 12, 3, torch.device("meta"))
    assert all(part.is_meta for micro in parts for part in micro)
    assert len({part._base for micro in parts for part in micro}) == 1


# ---------------------------------------------------------------- the gradient
FLAGS = ("--image 16 --patch 8 --batch 8 --batch-ssl 4 --batch-rec 4 --perceptual none --size pico "
         "--set locals=2 --set prototypes=32 --set head_hidden=32 --set w_koleo=1 "
         "--set drop_ssl=0.4 --set drop_clip=0.3 --set drop_rec=0.5").split()


@pytest.fixture
def float64():
    """--precision fp64"""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def gradients_of_a_step(micro, *flags):
    """-> loss terms and diagnostics, gradients, state of the teacher's targets"""
    args = train.arguments([*FLAGS, "--micro", str(micro), *flags])
    torch.manual_seed(0)
    student = Student(*train.build_model(args))
    teacher = Teacher(student) if args.w_ssl else None
    targets = losses.TeacherTargets(args.teacher, 32, "cpu")
    batch = train.train_batches(args, depth=len(student.model.trunk.blocks))[0]
    compute = gradcache.compute_gradients_cached if micro else train.compute_gradients
    terms, diagnostics = compute(batch, 0.07, args, student, teacher, None, targets, nullcontext(),
                                 torch.amp.GradScaler("cpu", enabled=False), torch.device("cpu"))
    targets.step()
    grads = {name: p.grad for name, p in student.named_parameters()}
    return terms | diagnostics, grads, targets.state_dict()


@pytest.mark.parametrize("flags", [
    [], ["--set", "teacher=centering", "--set", "clip_loss=siglip"], ["--w-clip", "0"],
    ["--w-ssl", "0"], ["--w-rec", "0"], ["--set", "w_koleo=0"]], ids=" ".join)
def test_micro_batches_give_the_losses_and_gradients_of_the_whole_batch(float64, flags):
    whole = gradients_of_a_step(0, *flags)
    found = gradients_of_a_step(2, *flags)
    for a, b in zip(found, whole):
        assert a.keys() == b.keys()
        for name, wanted in b.items():
            if wanted is None:
                assert a[name] is None
            else:
                limit = 1e-9 * max(wanted.abs().max(), 1e-3)
                assert (a[name] - wanted).abs().max() <= limit, name
