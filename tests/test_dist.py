"""One process against two: what looks at the whole batch gives the same numbers and the same gradients."""
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from conftest import CUT, FULL
from train import stochastic_depth
from vtp_min import VTPConfig, VTPModel
from vtp_min.dist import gather, highest, on, rank, say, start, total, under_torchrun, world
from vtp_min.losses import centered_softmax, clip_loss, dino_loss, ibot_loss, koleo_loss, moved_center, siglip_loss, sinkhorn
from vtp_min.model import DINOHead, Student


def agree(a, b, tolerance):
    """Relative to the largest magnitude"""
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    return (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Two gloo processes are started once and do all that is asked below -> what each returned"""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(one_of_two, (folder,), nprocs=2)
    return [torch.load(folder / f"{r}.pt") for r in range(2)]


def one_of_two(rank_, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank_, world_size=2)
    sets = [str(g) for g in (CUT, FULL) if g]
    torch.save({"helpers": helpers(rank_), "contrast": {g: contrast(rank_, g) for g in sets}, "targets": {g: targets(rank_, g) for g in sets},
                "step": step(rank_)}, folder / f"{rank_}.pt")
    torch.distributed.destroy_process_group()


# ---------------------------------------------------------------- helpers
def test_one_process_needs_no_group(capsys):
    x = torch.randn(3, requires_grad=True)
    assert not on() and (rank(), world()) == (0, 1)
    assert gather(x) is x and total(x) is x and highest(x) is x
    say("a", 1)
    assert capsys.readouterr().out == "a 1\n"
    assert start("cpu") == torch.device("cpu") and not on() and not under_torchrun()


def helpers(rank_):
    x = torch.full((2, 3), float(rank_), requires_grad=True)
    y = gather(x)
    (y * torch.arange(4.0)[:, None] * (rank_ + 1)).sum().backward()                 # rank 0 weighs row i by i, rank 1 by 2i
    return {"rank": rank(), "world": world(), "rows": y.detach(), "grad": x.grad, "total": total(torch.tensor(rank_ + 1.0)),
            "highest": highest(torch.tensor(-1.0 - rank_)), "empty": gather(torch.zeros(2, 0)).shape}


def test_gather_stacks_ranks_in_order_and_sends_each_the_sum_of_what_all_asked_of_it(ranks):
    for r, found in enumerate(rank["helpers"] for rank in ranks):
        assert (found["rank"], found["world"], found["total"], found["highest"], found["empty"]) == (r, 2, 3.0, -1.0, (4, 0))
        assert found["rows"][:, 0].tolist() == [0, 0, 1, 1]
        assert found["grad"][:, 0].tolist() == [3 * (2 * r), 3 * (2 * r + 1)]


# ---------------------------------------------------------------- the contrastive losses against the reference's two processes
class Encoders(torch.nn.Module):
    def __init__(self, g):
        super().__init__()
        self.Wi, self.Wt, self.logit_scale, self.logit_bias = (torch.nn.Parameter(torch.tensor(g[k])) for k in ("Wi", "Wt", "logit_scale_log", "logit_bias"))

    def forward(self, x, y):
        return F.normalize(x @ self.Wi, dim=-1), F.normalize(y @ self.Wt, dim=-1), self.logit_scale.exp(), self.logit_bias + 0


def contrast(rank_, folder):
    g, found = np.load(f"{folder}/clip_two_process.npz"), {}
    mine = slice(4 * rank_, 4 * rank_ + 4)
    for name, loss in (("clip", clip_loss), ("siglip", siglip_loss)):
        ddp = DistributedDataParallel(Encoders(g))
        value = loss(*ddp(torch.tensor(g["x_image"][mine]), torch.tensor(g["x_text"][mine])))
        value.backward()
        found[name] = {"loss": value.detach()} | {k: p.grad for k, p in ddp.module.named_parameters()}
    return found


def test_contrastive_losses_and_gradients_after_ddp_are_the_reference_s_and_one_process_s(ranks, golden):
    g = np.load(golden / "clip_two_process.npz")
    ranks = [rank["contrast"][str(golden)] for rank in ranks]
    for name, theirs in (("clip", "clip_local1_grad1"), ("siglip", "siglip_gather")):
        for r, found in enumerate(ranks):
            assert agree(found[name]["loss"], g[f"f64/{theirs}/rank{r}/loss"], 1e-10)
            for p in ("Wi", "Wt", "logit_scale", *["logit_bias"] * (name == "siglip")):          # CLIP's softmax is blind to a bias
                assert agree(found[name][p], g[f"f64/{theirs}/ddp/grad_{p}"], 1e-8) and agree(found[name][p], g[f"f64/global_{name}/grad_{p}"], 1e-8)
        mean = (ranks[0][name]["loss"] + ranks[1][name]["loss"]) / 2
        assert agree(mean, g[f"f64/global_{name}/loss"], 1e-10)


def restated(g, local, with_grad):
    """OpenCLIP's four ways to spread CLIP's loss over two ranks, on one process -> gradients after DDP's average

    local      a rank compares its own rows with all (local_loss), or all rows with all
    with_grad  the gathered rows carry gradient (gather_with_grad); without it only the rank's own do, and with `local` none of them
    """
    encoders, loss = Encoders(g), 0
    img, txt, scale, _ = encoders(torch.tensor(g["x_image"]), torch.tensor(g["x_text"]))
    for r in range(2):
        mine = torch.arange(8) // 4 == r
        alive = torch.full((8, 1), with_grad) | (mine & (not local))[:, None]
        all_img, all_txt = (torch.where(alive, x, x.detach()) for x in (img, txt))
        my_img, my_txt = (img[mine], txt[mine]) if local else (all_img, all_txt)
        here = torch.arange(8)[mine] if local else torch.arange(8)
        loss = loss + (F.cross_entropy(scale * my_img @ all_txt.T, here) + F.cross_entropy(scale * my_txt @ all_img.T, here)) / 2
    (loss / 2).backward()
    return {k: p.grad for k, p in encoders.named_parameters()}


def test_the_other_ways_to_spread_clip_over_ranks_are_half_as_strong_or_point_elsewhere(ranks, golden):
    g = np.load(golden / "clip_two_process.npz")
    ways = {(local, with_grad): restated(g, local, with_grad) for local in (True, False) for with_grad in (True, False)}
    for (local, with_grad), grads in ways.items():
        for p in ("Wi", "Wt", "logit_scale"):
            assert agree(grads[p], g[f"f64/clip_local{local:d}_grad{with_grad:d}/ddp/grad_{p}"], 1e-8), (local, with_grad, p)
            assert p != "logit_scale" or agree(grads[p], g["f64/global_clip/grad_logit_scale"], 1e-8)     # every way is right here
    for p in ("Wi", "Wt"):
        whole, ours = torch.tensor(g[f"f64/global_clip/grad_{p}"]), ranks[0]["contrast"][str(golden)]["clip"][p]
        assert agree(ours, whole, 1e-8) and agree(ways[True, True][p], whole, 1e-8) and agree(ways[False, True][p], whole, 1e-8)
        assert agree(2 * ways[False, False][p], whole, 1e-8)                                              # exactly 1 / world of it
        assert F.cosine_similarity(ways[True, False][p].flatten(), whole.flatten(), dim=0) < 0.99         # another direction


# ---------------------------------------------------------------- the teacher's targets
def targets(rank_, folder):
    g = {k.split("/")[1]: torch.from_numpy(v) for k, v in np.load(f"{folder}/dino_two_process.npz").items() if k.startswith(f"rank{rank_}/")}
    out = {}
    for kind in ("cls", "patch"):
        logits, center = g[f"{kind}_logits"], torch.zeros(40)
        out[f"{kind}_sinkhorn"] = sinkhorn(logits, 0.05)
        for n in (1, 2):
            center = out[f"{kind}_center_{n}"] = moved_center(center, lambda: [logits])
    out["none here"] = sinkhorn(g["patch_logits"][:0] if rank_ else g["patch_logits"], 0.05)
    return out


def test_sinkhorn_and_centres_are_those_of_the_pooled_batch(ranks, golden):
    """Ranks hold 17 and 29 masked patches. The reference's iBOT centre averages the ranks' own means; ours, all rows: what one process would find."""
    g = {k: torch.from_numpy(v) for k, v in np.load(golden / "dino_two_process.npz").items()}
    ranks = [rank["targets"][str(golden)] for rank in ranks]
    for kind in ("cls", "patch"):
        pooled = torch.cat([g[f"rank{r}/{kind}_logits"] for r in range(2)])
        assert agree(torch.cat([r[f"{kind}_sinkhorn"] for r in ranks]), sinkhorn(pooled, 0.05), 2e-6)
        center = torch.zeros(40)
        for n in (1, 2):
            center = moved_center(center, lambda: [pooled])
            for r in range(2):
                assert agree(ranks[r][f"{kind}_center_{n}"], center, 2e-6)
                assert kind == "patch" or agree(center, g[f"rank{r}/cls_center_{n}"], 2e-5)
        for r in range(2):
            assert agree(ranks[r][f"{kind}_sinkhorn"], g[f"rank{r}/{kind}_sinkhorn"], 2e-5)
    assert agree(ranks[0]["none here"], sinkhorn(g["rank0/patch_logits"], 0.05), 2e-6) and len(ranks[1]["none here"]) == 0


# ---------------------------------------------------------------- a whole step
B, V, K = 4, 2, 24
FLAGS = Namespace(batch=B, batch_ssl=B, batch_rec=2, w_clip=1.0, locals=V, seed=3, drop_clip=0.3, drop_rec=0.5, drop_ssl=0.4)


def step(rank_, world_=2):
    """Forward, all losses, backward, of this rank's share of one batch -> mean loss, gradients"""
    torch.manual_seed(0)
    model = VTPModel(VTPConfig(vision_patch_size=4, vision_embed_dim=32, vision_depth=2, vision_num_heads=2, vision_use_qk_norm=True, vision_feature_bottleneck=6,
                               text_context_length=6, text_vocab_size=32, text_embed_dim=16, text_num_heads=2, text_depth=1, decoder_embed_dim=16,
                               decoder_num_heads=1, decoder_depth=1, decoder_upscale=4, rope_dtype="float32"))
    student = Student(model, DINOHead(32, K, hidden=16, bottleneck=8)).double()
    n = B // world_
    rows, rec = torch.arange(rank_ * n, (rank_ + 1) * n), torch.arange(0, n, 2)                        # every other row is decoded
    image, text = torch.randn(B, 3, 16, 16).double()[rows], torch.randint(1, 32, (B, 5))[rows]
    crops, local = torch.randn(2, B, 3, 16, 16).double()[:, rows], torch.randn(V, B, 3, 8, 8).double()[:, rows]
    mask = (torch.rand(2, B, 16) < torch.tensor([0.0, 0.2, 0.4, 0.5])[:, None])[:, rows]               # unequal counts; one crop has none
    weight = (1 / mask.flatten(0, 1).sum(1, keepdim=True).clamp_min(1)).expand(-1, 16)[mask.flatten(0, 1)]
    batch = dict(image=image, text=text, rec=rec, crops=crops, locals=local, mask=mask, rows_image=rows, rows_ssl=rows)
    ddp = DistributedDataParallel(student) if world_ > 1 else student                                  # kept until backward is through
    out = ddp(batch, stochastic_depth(FLAGS, 7, batch))
    target = sinkhorn(out["cls"][:2].detach().flatten(0, 1), 0.05).view(2, n, K)
    hidden = centered_softmax(out["patch"].detach(), moved_center(torch.zeros(K).double(), lambda: [out["patch"].detach()]), 0.05)
    loss = (clip_loss(out["img"], out["txt"], out["scale"]) + dino_loss(out["cls"], target) + ibot_loss(out["patch"], hidden, weight, 2 * n)
            + sum(map(koleo_loss, out["tokens"])) + (out["pixels"] - image[rec]).abs().mean())
    loss.backward()
    return {"loss": total(loss.detach().clone()) / world_, "grads": {k: p.grad for k, p in student.named_parameters()}}


def test_two_processes_take_the_step_of_one(ranks):
    """All objectives at once, with stochastic depth at three rates, iBOT masks of unequal size, and losses that look at the whole batch."""
    one = step(0, world_=1)
    for found in (rank["step"] for rank in ranks):
        assert agree(found["loss"], one["loss"], 1e-6)
        for name, grad in one["grads"].items():
            assert agree(found["grads"][name], grad, 1e-6), name
