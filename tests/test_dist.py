"""Two processes against one: losses, targets and gradients of the whole batch are equal."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from conftest import CUT, FULL
from vtp_min import VTPConfig, VTPModel, losses
from vtp_min.augment import kept_rows, mask_index_and_weight
from vtp_min.dist import (all_gather_ragged, all_reduce_max, all_reduce_mean, all_reduce_sum,
                          average_gradients, broadcast_parameters, gather, init_distributed,
                          is_distributed, print0, rank, rank_slice, under_torchrun, world_size)
from vtp_min.extras import gradcache
from vtp_min.losses import clip_loss, siglip_loss, sinkhorn, update_center
from vtp_min.model import DINOHead, Student


def agree(a, b, tolerance):
    """True if a and b differ by at most `tolerance` times the largest magnitude of b"""
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    return (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Two gloo processes, started once for all tests below -> [results of rank 0, of rank 1]"""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(one_of_two, (folder,), nprocs=2)
    return [torch.load(folder / f"{r}.pt") for r in range(2)]


def one_of_two(r, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet",
                                         rank=r, world_size=2)
    found = {"helpers": helpers(r), "broadcast": broadcast(r), "average": average(r),
             "bf16": average_in_bf16(r),
             "step": step(r, 2, "average_gradients"), "ddp": step(r, 2, "ddp")}
    sets = [str(golden) for golden in (CUT, FULL) if golden]
    found["contrast"] = {golden: contrast(r, golden) for golden in sets}
    found["targets"] = {golden: targets(r, golden) for golden in sets}
    found["streamed"] = {golden: streamed_targets(r, golden) for golden in sets}
    torch.save(found, folder / f"{r}.pt")
    torch.distributed.destroy_process_group()


# ---------------------------------------------------------------- helpers
def test_a_single_process_needs_no_process_group(capsys):
    x = torch.randn(3, requires_grad=True)
    assert not is_distributed() and (rank(), world_size()) == (0, 1)
    for helper in (gather, all_reduce_sum, all_reduce_max, all_reduce_mean, all_gather_ragged):
        assert helper(x) is x
    assert rank_slice(5) == range(5)
    print0("a", 1)
    assert capsys.readouterr().out == "a 1\n"
    assert init_distributed("cpu") == torch.device("cpu")
    assert not is_distributed() and not under_torchrun()


def test_on_a_single_process_gradients_and_parameters_do_not_change():
    module = nn.Linear(3, 2)
    module(torch.ones(1, 3)).sum().backward()
    before = {name: (p.detach().clone(), p.grad.clone()) for name, p in module.named_parameters()}
    broadcast_parameters(module)
    average_gradients(module)
    for name, p in module.named_parameters():
        assert torch.equal(p, before[name][0]) and torch.equal(p.grad, before[name][1])


def helpers(r):
    x = torch.full((2, 3), float(r), requires_grad=True)
    y = gather(x)
    # rank 0 weights row i by i, rank 1 by 2i
    (y * torch.arange(4.0)[:, None] * (r + 1)).sum().backward()
    return {"rank": rank(), "world_size": world_size(), "slice": list(rank_slice(5)),
            "gathered": y.detach(), "grad": x.grad,
            "empty": gather(torch.zeros(2, 0)).shape,
            "sum": all_reduce_sum(torch.tensor(r + 1.0)),
            "max": all_reduce_max(torch.tensor(-1.0 - r)),
            "mean": all_reduce_mean(torch.tensor(r + 1.0)),
            "ragged": all_gather_ragged(torch.full((3 * r, 2), float(r))),
            "ragged none": all_gather_ragged(torch.zeros(0, 2)).shape}


def test_helpers_reduce_over_ranks_and_divide_the_rows_among_them(ranks):
    for r in range(2):
        found = ranks[r]["helpers"]
        assert (found["rank"], found["world_size"]) == (r, 2)
        assert (found["sum"], found["max"], found["mean"]) == (3.0, -1.0, 1.5)
        assert found["slice"] == ([0, 1], [2, 3, 4])[r]
        assert torch.equal(found["ragged"], torch.ones(3, 2))           # rank 0 has no rows
        assert found["ragged none"] == (0, 2)


def test_gather_concatenates_ranks_in_order_and_its_gradient_is_the_sum_over_ranks(ranks):
    for r in range(2):
        found = ranks[r]["helpers"]
        assert found["gathered"][:, 0].tolist() == [0, 0, 1, 1] and found["empty"] == (4, 0)
        assert found["grad"][:, 0].tolist() == [3 * (2 * r), 3 * (2 * r + 1)]


# ---------------------------------------------------------------- parameters and gradients
def broadcast(r):
    torch.manual_seed(r)
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))          # with buffers
    module[1].running_mean.fill_(r + 5.0)
    module[1].num_batches_tracked.fill_(r + 7)
    broadcast_parameters(module)
    return module.state_dict()


def test_all_ranks_receive_the_parameters_and_buffers_of_rank_0(ranks):
    torch.manual_seed(0)
    weight = nn.Linear(3, 2).weight
    for found in (one_rank["broadcast"] for one_rank in ranks):
        assert torch.equal(found["0.weight"], weight)
        assert found["1.running_mean"].tolist() == [5, 5] and found["1.num_batches_tracked"] == 7


BUCKETS = 1, 7, 12, 2 ** 24            # the tensors have 6, 4, 20 and 1 numbers


def average(r):
    """-> for each bucket size: the gradients after average_gradients"""
    found = {}
    for bucket_size in BUCKETS:
        module = nn.ParameterDict({"a": torch.zeros(2, 3), "unused": torch.zeros(5),
                                   "b": torch.zeros(4), "c": torch.zeros(4, 5),
                                   "d": torch.zeros(())})
        for i, name in enumerate("abcd"):
            p = module[name]
            grad = torch.arange(float(p.numel())).view_as(p)
            p.grad = (i + 1) * (r + 1) * grad
        module["c"].grad = module["c"].grad.T.contiguous().T            # not contiguous
        average_gradients(module, bucket_size)
        found[bucket_size] = {name: p.grad for name, p in module.items()}
    return found


@pytest.mark.parametrize("bucket_size", BUCKETS)
def test_gradients_become_their_mean_over_ranks_for_any_bucket_size(ranks, bucket_size):
    """A tensor larger than the bucket size is a bucket alone. A gradient that is None stays None:
    if it became zero, AdamW would apply weight decay."""
    shapes = {"a": (2, 3), "b": (4,), "c": (4, 5), "d": ()}
    for found in (one_rank["average"][bucket_size] for one_rank in ranks):
        assert found["unused"] is None
        for i, (name, shape) in enumerate(shapes.items()):
            wanted = 1.5 * (i + 1) * torch.arange(float(np.prod(shape))).view(shape)
            assert torch.equal(found[name], wanted), name


def average_in_bf16(r):
    """-> gradient after average_gradients in bfloat16; that of rank r is r + 1 times a third"""
    module = nn.ParameterDict({"a": torch.zeros(1000)})
    module["a"].grad = (r + 1) / 3 * torch.arange(1.0, 1001)
    average_gradients(module, dtype="bf16")
    return module["a"].grad


def test_gradients_averaged_in_bfloat16_are_those_of_float32_rounded_to_eight_bits(ranks):
    """Each rank rounds its gradient, then the sum is rounded, each time by a factor of at most
    1 + 2^-8."""
    wanted = 0.5 * torch.arange(1.0, 1001)
    found = [one_rank["bf16"] for one_rank in ranks]
    assert torch.equal(*found) and found[0].dtype == torch.float32
    error = ((found[0] - wanted) / wanted).abs()
    assert 2 ** -12 < error.max() <= 2 * 2 ** -8 + 2 ** -16


# ---------------------------------------------------------------- CLIP, against the reference
class Encoders(nn.Module):
    def __init__(self, g):
        super().__init__()
        self.Wi, self.Wt = nn.Parameter(torch.tensor(g["Wi"])), nn.Parameter(torch.tensor(g["Wt"]))
        self.logit_scale = nn.Parameter(torch.tensor(g["logit_scale_log"]))
        self.logit_bias = nn.Parameter(torch.tensor(g["logit_bias"]))

    def forward(self, x, y):
        """-> image and text features, scale, bias"""
        img, txt = F.normalize(x @ self.Wi, dim=-1), F.normalize(y @ self.Wt, dim=-1)
        return img, txt, self.logit_scale.exp(), self.logit_bias + 0


def contrast(r, folder):
    """-> {"clip", "siglip"}: loss of this rank, and gradients after DistributedDataParallel"""
    g, found = np.load(f"{folder}/clip_two_process.npz"), {}
    rows = slice(4 * r, 4 * r + 4)
    x, y = torch.tensor(g["x_image"][rows]), torch.tensor(g["x_text"][rows])
    for name, loss in (("clip", clip_loss), ("siglip", siglip_loss)):
        ddp = DistributedDataParallel(Encoders(g))
        value = loss(*ddp(x, y))
        value.backward()
        grads = {name: p.grad for name, p in ddp.module.named_parameters()}
        found[name] = {"loss": value.detach()} | grads
    return found


@pytest.mark.parametrize("name, theirs", [("clip", "clip_local1_grad1"),
                                          ("siglip", "siglip_gather")])
def test_contrastive_losses_and_gradients_equal_the_reference_and_a_single_process(
        ranks, golden, name, theirs):
    g = np.load(golden / "clip_two_process.npz")
    ranks = [one_rank["contrast"][str(golden)][name] for one_rank in ranks]
    parameters = ["Wi", "Wt", "logit_scale"]
    if name == "siglip":                       # a bias does not change CLIP's softmax
        parameters.append("logit_bias")
    for r, found in enumerate(ranks):
        assert agree(found["loss"], g[f"f64/{theirs}/rank{r}/loss"], 1e-10)
        for p in parameters:
            assert agree(found[p], g[f"f64/{theirs}/ddp/grad_{p}"], 1e-8)
            assert agree(found[p], g[f"f64/global_{name}/grad_{p}"], 1e-8)
    mean = (ranks[0]["loss"] + ranks[1]["loss"]) / 2
    assert agree(mean, g[f"f64/global_{name}/loss"], 1e-10)


def gradients_of_variant(g, local, with_grad):
    """OpenCLIP's four ways to compute CLIP's loss on two ranks, imitated on one process ->
    gradients, averaged over ranks

    local      True: a rank compares its own rows with all rows (local_loss). False: all with all.
    with_grad  True: the gathered rows have gradients (gather_with_grad). False: only the rank's own
               rows among them have gradients; if `local`, none of them has.
    """
    encoders, loss = Encoders(g), 0
    img, txt, scale, _ = encoders(torch.tensor(g["x_image"]), torch.tensor(g["x_text"]))
    for r in range(2):
        rows = torch.arange(4 * r, 4 * r + 4)
        has_grad = torch.full((8, 1), with_grad)
        if not local:
            has_grad[rows] = True
        all_img = torch.where(has_grad, img, img.detach())
        all_txt = torch.where(has_grad, txt, txt.detach())
        own_img, own_txt, labels = all_img, all_txt, torch.arange(8)
        if local:
            own_img, own_txt, labels = img[rows], txt[rows], rows
        loss = loss + F.cross_entropy(scale * own_img @ all_txt.T, labels) / 2
        loss = loss + F.cross_entropy(scale * own_txt @ all_img.T, labels) / 2
    (loss / 2).backward()
    return {name: p.grad for name, p in encoders.named_parameters()}


def test_other_ways_to_compute_clip_on_ranks_give_half_the_gradient_or_another_direction(
        ranks, golden):
    g, variants = np.load(golden / "clip_two_process.npz"), {}
    for local in (True, False):
        for with_grad in (True, False):
            grads = variants[local, with_grad] = gradients_of_variant(g, local, with_grad)
            name = f"f64/clip_local{local:d}_grad{with_grad:d}/ddp/grad_"
            for p in ("Wi", "Wt", "logit_scale"):
                assert agree(grads[p], g[name + p], 1e-8), (name, p)
            # all four give the correct gradient of the scale
            assert agree(grads["logit_scale"], g["f64/global_clip/grad_logit_scale"], 1e-8)
    for p in ("Wi", "Wt"):
        whole = torch.tensor(g[f"f64/global_clip/grad_{p}"])
        assert agree(ranks[0]["contrast"][str(golden)]["clip"][p], whole, 1e-8)
        assert agree(variants[True, True][p], whole, 1e-8)
        assert agree(variants[False, True][p], whole, 1e-8)
        assert agree(2 * variants[False, False][p], whole, 1e-8)        # 1 / world_size
        direction = variants[True, False][p].flatten()
        assert F.cosine_similarity(direction, whole.flatten(), dim=0) < 0.99


# ---------------------------------------------------------------- the teacher's targets
def rank_logits(r, folder):
    """-> {"cls", "patch"}: the reference's logits of this rank; 17 and 29 masked patches"""
    g = np.load(f"{folder}/dino_two_process.npz")
    return {kind: torch.from_numpy(g[f"rank{r}/{kind}_logits"]) for kind in ("cls", "patch")}


def targets(r, folder):
    found, all_logits = {}, rank_logits(r, folder)
    for kind, logits in all_logits.items():
        found[f"{kind}_sinkhorn"] = sinkhorn(logits, 0.05)
        center = torch.zeros(40)
        for n in (1, 2):
            center = update_center(center, logits)
            found[f"{kind}_center_{n}"] = center
    patch = all_logits["patch"]
    found["no rows on rank 1"] = sinkhorn(patch[:0] if r == 1 else patch, 0.05)
    return found


def test_sinkhorn_and_centers_are_computed_over_the_rows_of_all_ranks(ranks, golden):
    """The iBOT center of the reference is the mean of the means of the ranks. Ours is the mean of
    all rows, as on one process."""
    g = np.load(golden / "dino_two_process.npz")
    logits = [rank_logits(r, golden) for r in range(2)]
    ranks = [one_rank["targets"][str(golden)] for one_rank in ranks]
    for kind in ("cls", "patch"):
        pooled = torch.cat([logits[r][kind] for r in range(2)])
        both = torch.cat([ranks[r][f"{kind}_sinkhorn"] for r in range(2)])
        assert agree(both, sinkhorn(pooled, 0.05), 2e-6)
        for r in range(2):
            wanted = g[f"rank{r}/{kind}_sinkhorn"]
            assert agree(ranks[r][f"{kind}_sinkhorn"], wanted, 2e-5)
        center = torch.zeros(40)
        for n in (1, 2):
            center = update_center(center, pooled)
            for r in range(2):
                assert agree(ranks[r][f"{kind}_center_{n}"], center, 2e-6)
                if kind == "cls":
                    assert agree(center, g[f"rank{r}/cls_center_{n}"], 2e-5)
    alone = sinkhorn(logits[0]["patch"], 0.05)
    assert agree(ranks[0]["no rows on rank 1"], alone, 2e-6)
    assert len(ranks[1]["no rows on rank 1"]) == 0


def streamed_targets(r, folder):
    """The same by extras.gradcache: the logits are split into parts, different on each rank"""
    found = {}
    for kind, logits in rank_logits(r, folder).items():
        parts = logits.split([2, 0, len(logits) - 2] if r == 0 else [len(logits) - 5, 5])
        center = gradcache.sinkhorn_center(lambda: parts, 0.05)
        found[f"{kind}_sinkhorn"] = losses.centered_softmax(logits, center, 0.05)
        found[f"{kind}_center_1"] = gradcache.update_center(torch.zeros(40), lambda: parts)
    return found


def test_gradient_caching_computes_the_same_targets_on_two_ranks(ranks, golden):
    for found in ranks:
        streamed, whole = found["streamed"][str(golden)], found["targets"][str(golden)]
        for name, x in streamed.items():
            assert agree(x, whole[name], 2e-6), name


# ---------------------------------------------------------------- a whole step
B, V, K, SEED, STEP = 4, 2, 24, 3, 7


class Outputs(nn.Module):
    """All inputs of the losses in one forward pass, as DistributedDataParallel requires"""
    def __init__(self, student):
        super().__init__()
        self.student = student

    def forward(self, batch):
        student = self.student
        logits, patch_logits, features = student.views(
            batch.crops, batch.locals, batch.mask, batch.mask_index, batch.keep)
        cls, patches = student.encode(batch.image, batch.keep["image"])
        img, txt = student.embed_image(cls, patches), student.embed_text(batch.text)
        pixels = student.decode(student.rec_patches(batch, patches))
        scale = student.model.logit_scale.exp()
        return logits, patch_logits, features, img, txt, pixels, scale


def step_student():
    torch.manual_seed(0)
    model = VTPModel(VTPConfig(
        vision_patch_size=4, vision_embed_dim=32, vision_depth=2, vision_num_heads=2,
        vision_use_qk_norm=True, vision_feature_bottleneck=6, text_context_length=6,
        text_vocab_size=32, text_embed_dim=16, text_num_heads=2, text_depth=1,
        decoder_embed_dim=16, decoder_num_heads=1, decoder_depth=1, decoder_upscale=4,
        rope_dtype="float32"))
    return Student(model, DINOHead(32, K, hidden=16, bottleneck=8)).double()


def step_batch(r, n_ranks):
    """Rows of rank r of one batch. The masks of its crops differ in size, and one crop has no mask.
    CLIP, reconstruction and self-distillation have different rates of stochastic depth."""
    g = torch.Generator().manual_seed(1)
    n = B // n_ranks
    rows = torch.arange(r * n, (r + 1) * n)
    image = torch.randn(B, 3, 16, 16, generator=g).double()[rows]
    text = torch.randint(1, 32, (B, 5), generator=g)[rows]
    crops = torch.randn(2, B, 3, 16, 16, generator=g).double()[:, rows]
    locals = torch.randn(V, B, 3, 8, 8, generator=g).double()[:, rows]
    share = torch.tensor([0.0, 0.2, 0.4, 0.5])[:, None]
    mask = (torch.rand(2, B, 16, generator=g) < share)[:, rows]
    index, weight = mask_index_and_weight(mask)

    def draw(rate, numbers, total, objective):
        return kept_rows(rate, 2, numbers, total, SEED, STEP, objective)

    def crop_numbers(count):
        return (rows + B * torch.arange(count)[:, None]).flatten()

    rec = torch.arange(0, n, 2)                                 # every other image
    keep = {"image": draw(0.3, rows, B, 0), "rec": draw(0.5, rows[rec] // 2, B // 2, 1),
            "ssl": draw(0.4, crop_numbers(2), 2 * B, 2),
            "local": draw(0.4, crop_numbers(V), V * B, 3)}
    return SimpleNamespace(image=image, text=text, rec=rec, crops=crops, locals=locals, mask=mask,
                           mask_index=index, mask_weight=weight, n_crops=2 * n, keep=keep)


def step(r, n_ranks, how):
    """Forward, all losses and backward of this rank's rows -> mean loss, gradients

    how  average of the gradients: "average_gradients", "ddp" (the independent reference) or None
    """
    student, batch = step_student(), step_batch(r, n_ranks)
    outputs = Outputs(student)
    if how == "ddp":
        outputs = DistributedDataParallel(outputs)
    logits, patch_logits, features, img, txt, pixels, scale = outputs(batch)
    target = sinkhorn(logits[:2].detach(), 0.05)
    center = update_center(torch.zeros(K).double(), patch_logits.detach())
    patch_target = losses.centered_softmax(patch_logits.detach(), center, 0.05)
    loss = (clip_loss(img, txt, scale) + losses.dino_loss(logits, target)
            + losses.ibot_loss(patch_logits, patch_target, batch.mask_weight, batch.n_crops)
            + losses.koleo_loss(features[0]) + losses.koleo_loss(features[1])
            + losses.rec_loss(pixels, batch.image[batch.rec]))
    loss.backward()
    if how == "average_gradients":
        average_gradients(student, bucket_size=1000)            # several buckets
    return {"loss": all_reduce_mean(loss.detach().clone()),
            "feature_std": losses.feature_std(features[0].detach()),
            "grads": {name: p.grad for name, p in student.named_parameters()}}


@pytest.mark.parametrize("how", ["step", "ddp"])
def test_a_step_on_two_processes_equals_a_step_on_one(ranks, how):
    """All objectives together, with three rates of stochastic depth, masks of unequal sizes and
    losses over the whole batch. DistributedDataParallel is an independent reference."""
    one = step(0, 1, None)
    for found in (one_rank[how] for one_rank in ranks):
        assert agree(found["loss"], one["loss"], 1e-6)
        assert agree(found["feature_std"], one["feature_std"], 1e-6)
        for name, grad in one["grads"].items():
            assert agree(found["grads"][name], grad, 1e-6), name
