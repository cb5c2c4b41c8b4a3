"""LightningDiT against the reference's numbers (tests/golden/dit.npz, all of them with VTP_GOLDEN), then what must hold whatever the weights are."""
import json
import os
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

import dit
from dit import LightningDiT, euler, flow_loss, lognorm_time, time_grid

TINY = dict(input_size=8, patch_size=1, in_channels=16, hidden_size=64, depth=3, num_heads=2, num_classes=10)
FULL = os.environ.get("VTP_GOLDEN")


def golden(vectors, weights, **fields):
    """-> the reference's tiny model with its weights, and a reader of its arrays"""
    model = LightningDiT(**TINY | fields)
    assert set(model.state_dict()) == set(weights)
    for name in ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"):
        assert torch.allclose(model.state_dict()[name], weights[name], atol=1e-6)
    model.load_state_dict(weights)
    return model.eval(), lambda name: torch.from_numpy(vectors[name])


@pytest.fixture
def tiny():
    vectors = np.load(Path(__file__).parent / "golden" / "dit.npz")
    return *golden(vectors, {k[8:]: torch.from_numpy(vectors[k]) for k in vectors.files if k.startswith("weights/")}), vectors.files


def close(ours, theirs, tolerance):
    """within tolerance of the largest magnitude"""
    theirs = torch.as_tensor(theirs)
    return (ours.detach() - theirs).abs().max() <= tolerance * theirs.abs().max()


def check_all(model, g, names):
    """Every golden array that is there, at the tolerances the golden files ask for."""
    assert close(model(g("fwd/x"), g("fwd/t"), g("fwd/y")), g("fwd/out"), 1e-5)
    for case in sorted({n.rsplit("/", 1)[0] for n in names if n.startswith("cfg/case")}):
        t = g(case + "/t").float().expand(4)
        how = g(case + "/scale").item(), bool(g(case + "/interval_on")), g(case + "/interval_start").item()
        out = model.forward_with_cfg(g("cfg/x"), t, g("cfg/y"), *how)
        assert close(out, g(case + "/out"), 1e-5), case
    for case in sorted({"/".join(n.split("/")[:2]) for n in names if n.startswith("loss/case")}):
        check_loss(model, g, case, [n for n in names if n.startswith(case + "/grad/")])
    for case in sorted({n.rsplit("/", 1)[0] for n in names if n.startswith("ode/euler")}):
        shift, points = case.removeprefix("ode/euler_shift").split("_points")
        grid, y, z = time_grid(int(points), float(shift)), g("ode/y"), g("ode/z")
        assert close(euler(lambda x, t: model(x, t, y), z, grid), g(case + "/final"), 5e-5), case
        pair = torch.cat([y, torch.full_like(y, 10)])
        out = euler(lambda x, t: model.forward_with_cfg(x, t, pair, 3.0, True, 0.125), torch.cat([z, z]), grid)
        assert close(out, g(case + "/cfg3_interval0.125_final"), 5e-5), case


def check_loss(model, g, case, grads):
    model.zero_grad()
    if g(case + "/use_lognorm"):                                    # the reference draws z from numpy's global generator
        z = np.random.RandomState(int(g(case + "/seed"))).standard_normal(6)
        assert close(lognorm_time(z, g(case + "/mu").item(), g(case + "/sigma").item()), g(case + "/t"), 1e-6)
    mse, cos = flow_loss(model, g("loss/x1"), g(case + "/x0"), g(case + "/t"), g("loss/y"))
    assert close(mse, g(case + "/mse_per_sample"), 1e-5)
    if g(case + "/use_cosine_loss"):
        assert close(cos, g(case + "/cos_per_sample"), 1e-5)
        mse = mse + cos
    mse.mean().backward()
    assert close(mse.mean(), g(case + "/total"), 1e-5)
    trained = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert close(torch.stack([grad.norm() for grad in trained.values()]), g(case + "/grad_l2"), 1e-5)
    for name in grads:
        assert close(trained[name.split("/grad/")[1]], g(name), 1e-5), name


def test_model_guidance_loss_and_sampler_are_the_reference_s(tiny):
    check_all(*tiny)


@pytest.mark.skipif(not FULL, reason="the full golden sets are looked for in $VTP_GOLDEN")
@pytest.mark.parametrize("name", ["dit_tiny", "dit_tiny_qknorm"])
def test_all_golden_arrays_are_met(name):
    vectors, fields = np.load(f"{FULL}/{name}_vectors.npz"), json.loads(Path(f"{FULL}/{name}.json").read_text())["config"]
    check_all(*golden(vectors, load_file(f"{FULL}/{name}.safetensors"), **fields), vectors.files)


def test_time_grids_and_time_draws_are_the_reference_s(tiny):
    _, g, names = tiny
    for name in names:
        if name.startswith("grid/"):
            points, shift = name.removeprefix("grid/points").split("_shift")
            assert close(time_grid(int(points), float(shift)), g(name), 1e-6)
        if name.startswith("time/"):
            mu, sigma = name.split("/")[1].removeprefix("mu").split("_sigma")
            z = np.random.RandomState(600).standard_normal(4096)[:256]
            assert close(lognorm_time(z, float(mu), float(sigma)), g(name), 1e-6)


@pytest.mark.parametrize("size, count", [("B", 130_408_768), ("L", 457_956_384), ("XL", 675_035_584), ("1p0B", 1_029_106_240)])
def test_sizes_have_the_reference_s_parameter_counts(size, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in LightningDiT(**dit.SIZES[size]).parameters() if p.requires_grad) == count


# ------------------------------------------------------------------------------------------------ identities

def test_an_untrained_model_stands_still():
    x = torch.randn(2, 16, 8, 8)
    assert LightningDiT(**TINY)(x, torch.rand(2), torch.tensor([0, 10])).abs().max() == 0


def test_guidance_of_scale_1_is_none_and_guiding_all_channels_is_a_line_through_both_answers(tiny):
    model, g, _ = tiny
    x, t, y, null = g("ode/z"), torch.tensor([0.3, 0.6]), g("ode/y"), torch.tensor([10, 10])
    cond, uncond = model(x, t, y), model(x, t, null)
    guided = lambda scale, **how: model.forward_with_cfg(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]), scale, **how)[:2]
    assert torch.allclose(guided(1.0), cond, atol=1e-5)
    assert torch.allclose(guided(3.0, channels=None), uncond + 3 * (cond - uncond), atol=1e-5)
    assert torch.allclose(guided(3.0)[:, 3:], cond[:, 3:], atol=1e-5)                                # the reference's first three only
    early = guided(3.0, channels=None, cfg_interval=True, cfg_interval_start=0.5)
    assert torch.allclose(early[0], cond[0], atol=1e-5) and not torch.allclose(early[1], cond[1], atol=1e-3)


def test_rotary_attention_sees_only_how_far_apart_two_tokens_are():
    rope, (q, k) = dit.Rotary(32, 8), torch.randn(2, 32)
    score = (rope(q.expand(1, 1, 64, 32)) @ rope(k.expand(1, 1, 64, 32)).transpose(2, 3))[0, 0].view(8, 8, 8, 8)      # row, col, row, col
    assert torch.allclose(score[:-1, :-2, :-1, :-2], score[1:, 2:, 1:, 2:], atol=1e-4)
    assert not torch.allclose(score[0, 0, 0, 1], score[0, 0, 1, 0], atol=1e-4)


def test_patches_come_back_where_they_were_taken():
    model = LightningDiT(**TINY | dict(patch_size=2))
    x = torch.randn(2, 16, 8, 8)
    model.blocks, model.pos_embed.data = torch.nn.ModuleList(), torch.zeros(1, 16, 64)
    model.x_embedder.proj.weight.data = torch.eye(64).view(16, 2, 2, 64).permute(3, 0, 1, 2).contiguous()      # token = its 64 numbers, as (C, p, q)
    order = torch.arange(64).view(16, 2, 2).permute(1, 2, 0).flatten()                                          # (p, q, C)
    model.final_layer.norm_final = torch.nn.Identity()
    model.final_layer.linear.weight.data = torch.eye(64)[order]
    assert torch.allclose(model(x, torch.zeros(2), torch.zeros(2, dtype=torch.long)), x, atol=1e-6)


def test_a_field_that_knows_the_way_has_no_loss_and_euler_follows_it_exactly():
    x1, x0, t = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.rand(3)
    mse, cos = flow_loss(lambda x, t, y: x1 - x0, x1, x0, t, None)
    assert mse.abs().max() == 0 and cos.abs().max() < 1e-6
    mse, cos = flow_loss(lambda x, t, y: x0 - x1, x1, x0, t, None)                                   # the wrong way: cosine -1
    assert torch.allclose(cos, torch.full((3,), 2.0), atol=1e-6)
    assert torch.allclose(euler(lambda x, t: x1 - x0, x0, time_grid(7, 0.3)), x1, atol=1e-5)


def test_time_runs_from_noise_to_data_and_a_small_shift_lingers_at_noise():
    for shift in (0, 0.075, 0.3, 1):
        grid = time_grid(50, shift)
        assert grid[0] == 0 and grid[-1] == pytest.approx(1) and (grid.diff() > 0).all()
    assert torch.equal(time_grid(50, 0), torch.linspace(0, 1, 50)) and torch.allclose(time_grid(50, 1), time_grid(50, 0))
    assert time_grid(3, 0.3)[1] == pytest.approx(0.3 * 0.5 / (1 - 0.7 * 0.5))
    assert lognorm_time(0.0, -0.5, 1.25) == pytest.approx(1 / (1 + np.exp(0.5)))                     # the median, on the noisy side


def test_the_average_forgets_its_start():
    a, b = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    start = a.weight.item()
    dit.ema_(a, b, 0.9)
    assert a.weight.item() == pytest.approx(0.9 * start + 0.1 * b.weight.item(), abs=1e-6)
    kept = np.prod([dit.ema_decay(s, None) for s in range(300)])
    assert kept < 1e-9 and dit.ema_decay(200_000, None) == 0.9999 and dit.ema_decay(0, 0.9999) == 0.9999


# ------------------------------------------------------------------------------------------------ the commands

class Folded(torch.nn.Module):
    """A stand-in tokenizer that needs no training: 2x2 pixels folded into 12 channels, and unfolded."""
    def __init__(self):
        super().__init__()
        self.trunk = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(self.trunk.weight, 1.0), torch.nn.init.zeros_(self.trunk.bias)
        self.get_reconstruction_latents = lambda img: F.pixel_unshuffle(img, 2)
        self.get_latents_decoded_images = lambda z: F.pixel_shuffle(z, 2)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """RUN/latents of 24 built-in shapes at 16 pixels"""
    monkeypatch.setattr(dit.VTPModel, "from_pretrained", lambda folder: Folded())
    (tmp_path / "RUN").mkdir()
    (tmp_path / "RUN" / "run.json").write_text(json.dumps({"data": None, "image": 16, "seed": 0}))
    dit.main(["latents", f"{tmp_path}/RUN", "--n", "24", "--batch", "5", "--device", "cpu"])
    return tmp_path


def train(folder, name, *flags):
    dit.main(f"train {folder}/RUN/latents --out {folder}/{name} --size nano --batch 4 --log-every 1 --device cpu".split() + list(flags))
    return torch.load(folder / name / "last.pt", weights_only=True)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(dit.SIZES, "nano", dict(hidden_size=32, depth=2, num_heads=2))


def test_latents_are_in_the_reference_s_layout_with_their_mean_and_std(folder):
    (path,) = (folder / "RUN" / "latents").glob("*.safetensors")
    assert path.name == "latents_rank00_shard000.safetensors"
    with safe_open(path, "pt") as f:
        assert set(f.metadata()) == {"total_size", "dtype", "device"}
    shard, stats = load_file(path), torch.load(folder / "RUN" / "latents" / "latents_stats.pt", weights_only=True)
    assert shard["latents"].shape == shard["latents_flip"].shape == (24, 12, 8, 8) and shard["labels"].dtype == torch.int64
    mirrored = F.pixel_shuffle(shard["latents"], 2).flip(-1)
    assert torch.allclose(F.pixel_shuffle(shard["latents_flip"], 2), mirrored)
    assert torch.allclose(stats["mean"], shard["latents"].mean((0, 2, 3), keepdim=True), atol=1e-5)
    assert torch.allclose(stats["std"], shard["latents"].transpose(0, 1).flatten(1).std(1).view(1, 12, 1, 1), atol=1e-5)


def test_two_processes_see_one_process_s_batch_and_an_epoch_sees_each_latent_once(folder, monkeypatch):
    data = dit.Latents(folder / "RUN" / "latents")
    args = Namespace(seed=3, batch=8, label_drop=0.5, lognorm_mu=0.0, lognorm_sigma=1.0)
    batches = dit.Batches(data, {"mean": torch.zeros(1, 12, 1, 1), "std": torch.ones(1, 12, 1, 1)}, args, null=10)
    whole = batches[5]
    monkeypatch.setattr(dit, "world", lambda: 2)
    halves = []
    for r in range(2):
        monkeypatch.setattr(dit, "rank", lambda: r)
        halves.append(batches[5])
    assert all(torch.equal(w, torch.cat(pair)) for w, pair in zip(whole, zip(*halves)))
    monkeypatch.undo()
    args.label_drop = 0.0
    assert sorted(torch.cat([batches[s][3] for s in range(3)]).tolist()) == sorted(data.labels.tolist())
    args.label_drop = 1.0
    assert (batches[0][3] == 10).all()


def test_a_resumed_run_is_the_same_run(folder):
    straight = train(folder, "A", "--steps", "4")
    train(folder, "B", "--steps", "2")
    resumed = train(folder, "B", "--steps", "4")
    for part in ("model", "ema"):
        assert all(torch.equal(straight[part][k], resumed[part][k]) for k in straight[part])
    logs = [[json.loads(line) | {"images_per_s": 0} for line in (folder / name / "log.jsonl").read_text().splitlines()] for name in "AB"]
    assert logs[0] == logs[1] and len(logs[0]) == 4
    with pytest.raises(SystemExit, match="seed: was 0, now 1"):
        train(folder, "B", "--steps", "5", "--seed", "1")


def test_samples_do_not_depend_on_the_batch_they_were_made_in(folder):
    train(folder, "D", "--steps", "2")
    shot = lambda out, *flags: dit.main(["sample", f"{folder}/D", "--n", "7", "--points", "4", "--device", "cpu", "--out", f"{folder}/{out}", *flags])
    shot("one", "--batch", "7")
    shot("two", "--batch", "3")
    one, two = np.load(folder / "one" / "samples.npz"), np.load(folder / "two" / "samples.npz")
    assert one["arr_0"].shape == (7, 16, 16, 3) and one["arr_0"].dtype == np.uint8 and one["labels"].tolist() == list(range(7))
    assert np.abs(one["arr_0"].astype(int) - two["arr_0"]).max() <= 1                     # float noise may cross a truncation
    assert sorted(p.name for p in (folder / "one" / "png").iterdir()) == [f"{j:06d}.png" for j in range(7)] and (folder / "one" / "grid.png").exists()
    shot("two", "--per-class", "2", "--classes", "1,4", "--cfg", "2", "--cfg-channels", "all")
    assert np.load(folder / "two" / "samples.npz")["labels"].tolist() == [1, 4, 1, 4] and len(list((folder / "two" / "png").iterdir())) == 4


@pytest.mark.parametrize("command, sentence", [
    ("latents {0}/RUN", "holds latents already"),
    ("latents {0}/RUN --n 0 --out {0}/new", "at least 1"),
    ("train {0}/nothing --out {0}/X", "holds no latents_rank"),
    ("train {0}/RUN/latents --out {0}/X --batch 0", "--batch 0"),
    ("sample {0}/RUN", "lacks config.json"),
    ("sample {0}/C --classes 3,12", "--classes 12: this model knows 0 .. 9"),
    ("sample {0}/C --n 0", "0 samples"),
    ("sample {0}/C --points 1", "--points 1"),
    ("train {0}/RUN/latents --out {0}/X --ema 1", "--ema 1.0")])
def test_what_cannot_work_is_refused_with_a_sentence(folder, command, sentence):
    if "/C" in command:
        train(folder, "C", "--steps", "1")
    with pytest.raises(SystemExit, match=sentence):
        dit.main(command.format(folder).split() + ["--device", "cpu"])


def test_a_decoder_that_never_met_these_latents_is_refused(folder, monkeypatch):
    train(folder, "E", "--steps", "1")
    other = Folded()
    torch.nn.init.constant_(other.trunk.weight, 2.0)
    monkeypatch.setattr(dit.VTPModel, "from_pretrained", lambda folder: other)
    with pytest.raises(SystemExit, match="another encoder"):
        dit.main(["sample", f"{folder}/E", "--device", "cpu"])


def test_a_small_model_learns_which_class_is_which():
    torch.manual_seed(0)
    model = LightningDiT(input_size=2, in_channels=4, hidden_size=32, depth=2, num_heads=2, num_classes=2)
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    target = torch.tensor([-1.0, 1.0])
    for _ in range(150):
        y = torch.randint(2, (64,))
        x1 = target[y].view(-1, 1, 1, 1).expand(-1, 4, 2, 2)                               # class 0 is all -1, class 1 all +1
        mse, cos = flow_loss(model, x1, torch.randn(64, 4, 2, 2), lognorm_time(torch.randn(64), 0.0, 1.0), y)
        opt.zero_grad()
        (mse + cos).mean().backward()
        opt.step()
    y = torch.tensor([0, 1]).repeat(8)
    out = euler(lambda x, t: model(x, t, y), torch.randn(16, 4, 2, 2), time_grid(20, 0))
    assert (out.mean((1, 2, 3)) - target[y]).abs().max() < 0.5
