"""LightningDiT against the reference's numbers (tests/golden/dit.npz; the complete golden sets if
the environment variable VTP_GOLDEN names their folder), then properties that hold for any weights,
then the commands."""
import glob
import json
import os
import signal
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dit
from dit import (SIZES, LightningDiT, RotaryEmbedding, euler, flow_loss, lognorm_time,
                 time_grid)
from vtp_min import VTPConfig, VTPModel, optim, run
from vtp_min.extras import fast_dit, files, latents, previews
from vtp_min.extras.latents import LatentBatches, Latents, shards
from vtp_min.run import EXIT_RESUME, TIMING

TINY = dict(input_size=8, patch_size=1, in_channels=16, hidden_size=64, depth=3, num_heads=2,
            num_classes=10)
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
    names = [name for name in vectors.files if name.startswith("weights/")]
    weights = {name.removeprefix("weights/"): torch.from_numpy(vectors[name]) for name in names}
    return *golden(vectors, weights), vectors.files


def close(ours, theirs, tolerance):
    """Equal within tolerance times the largest magnitude"""
    theirs = torch.as_tensor(theirs)
    return (ours.detach() - theirs).abs().max() <= tolerance * theirs.abs().max()


def check_all(model, g, names):
    """Compare with all golden arrays in names, at the tolerances that the golden files state."""
    assert close(model(g("fwd/x"), g("fwd/t"), g("fwd/y")), g("fwd/out"), 1e-5)
    for case in cases(names, "cfg/case"):
        t = g(case + "/t").float().expand(4)
        scale, on = g(case + "/scale").item(), bool(g(case + "/interval_on"))
        start = g(case + "/interval_start").item()
        out = model.forward_with_cfg(g("cfg/x"), t, g("cfg/y"), scale, on, start)
        assert close(out, g(case + "/out"), 1e-5), case
    for case in cases(names, "loss/case"):
        check_loss(model, g, case, [n for n in names if n.startswith(case + "/grad/")])
    for case in cases(names, "ode/euler"):
        shift, points = case.removeprefix("ode/euler_shift").split("_points")
        grid, y, z = time_grid(int(points), float(shift)), g("ode/y"), g("ode/z")
        out = euler(lambda x, t: model(x, t, y), z, grid)
        assert close(out, g(case + "/final"), 5e-5), case
        pair = torch.cat([y, torch.full_like(y, 10)])
        out = euler(lambda x, t: model.forward_with_cfg(x, t, pair, 3.0, True, 0.125),
                    torch.cat([z, z]), grid)
        assert close(out, g(case + "/cfg3_interval0.125_final"), 5e-5), case


def cases(names, prefix):
    """The first two parts of the names that start with the prefix"""
    return sorted({"/".join(name.split("/")[:2]) for name in names if name.startswith(prefix)})


def check_loss(model, g, case, grads):
    model.zero_grad()
    if g(case + "/use_lognorm"):              # the reference draws z from NumPy's global generator
        z = np.random.RandomState(int(g(case + "/seed"))).standard_normal(6)
        t = lognorm_time(z, g(case + "/mu").item(), g(case + "/sigma").item())
        assert close(t, g(case + "/t"), 1e-6)
    mse, cos = flow_loss(model, g("loss/x1"), g(case + "/x0"), g(case + "/t"), g("loss/y"))
    assert close(mse, g(case + "/mse_per_sample"), 1e-5)
    if g(case + "/use_cosine_loss"):
        assert close(cos, g(case + "/cos_per_sample"), 1e-5)
        mse = mse + cos
    mse.mean().backward()
    assert close(mse.mean(), g(case + "/total"), 1e-5)
    trained = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norms = torch.stack([grad.norm() for grad in trained.values()])
    assert close(norms, g(case + "/grad_l2"), 1e-5)
    for name in grads:
        assert close(trained[name.split("/grad/")[1]], g(name), 1e-5), name


def test_model_guidance_loss_and_sampler_are_the_reference_s(tiny):
    check_all(*tiny)


def test_the_fast_forms_are_the_reference_s_too(tiny, monkeypatch):
    for name in fast_dit.FORMS:
        monkeypatch.setattr(dit, name, getattr(fast_dit, name))
    check_all(*tiny)


@pytest.mark.skipif(not FULL, reason="needs the complete golden sets in $VTP_GOLDEN")
@pytest.mark.parametrize("name", ["dit_tiny", "dit_tiny_qknorm"])
def test_all_golden_arrays_are_met(name):
    vectors = np.load(f"{FULL}/{name}_vectors.npz")
    fields = json.loads(Path(f"{FULL}/{name}.json").read_text())["config"]
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


@pytest.mark.parametrize("size, count", [
    ("B", 130_408_768), ("L", 457_956_384), ("XL", 675_035_584), ("1p0B", 1_029_106_240)])
def test_sizes_have_the_reference_s_parameter_counts(size, count):
    with torch.device("meta"):
        model = LightningDiT(**SIZES[size])
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


# ---------------------------------------------------------------- identities

def random_batch():
    """x1, x0, t, y for TINY; the second sample has no class"""
    x1, x0 = torch.randn(2, 16, 8, 8), torch.randn(2, 16, 8, 8)
    return x1, x0, torch.rand(2), torch.tensor([1, 10])


def test_an_untrained_model_returns_zero():
    x = torch.randn(2, 16, 8, 8)
    assert LightningDiT(**TINY)(x, torch.rand(2), torch.tensor([0, 10])).abs().max() == 0


def test_an_output_of_zero_has_no_cosine_so_the_first_gradient_is_that_of_the_squared_error():
    model, grads = LightningDiT(**TINY), []
    mse, cos = flow_loss(model, *random_batch())
    assert torch.equal(cos, torch.ones(2))
    for loss in (mse, mse + cos):
        weight = model.final_layer.linear.weight
        grads.append(torch.autograd.grad(loss.mean(), weight, retain_graph=True)[0])
    assert torch.equal(*grads) and grads[0].abs().max() > 0


def test_guidance_of_scale_1_changes_nothing_and_guidance_of_all_channels_is_an_extrapolation(tiny):
    model, g, _ = tiny
    x, t, y, null = g("ode/z"), torch.tensor([0.3, 0.6]), g("ode/y"), torch.tensor([10, 10])
    cond, uncond = model(x, t, y), model(x, t, null)

    def guided(scale, **how):
        pairs = (torch.cat(pair) for pair in ([x, x], [t, t], [y, null]))
        return model.forward_with_cfg(*pairs, scale, **how)[:2]

    assert torch.allclose(guided(1.0), cond, atol=1e-5)
    line = uncond + 3 * (cond - uncond)
    assert torch.allclose(guided(3.0, channels=None), line, atol=1e-5)
    assert torch.allclose(guided(3.0)[:, 3:], cond[:, 3:], atol=1e-5)   # LightningDiT: the first 3
    early = guided(3.0, channels=None, cfg_interval=True, cfg_interval_start=0.5)
    assert torch.allclose(early[0], cond[0], atol=1e-5)
    assert not torch.allclose(early[1], cond[1], atol=1e-3)


def test_before_cfg_start_the_half_without_class_is_not_computed_and_the_velocity_is_equal(tiny):
    model, g, _ = tiny
    x, y, args = g("ode/z"), g("ode/y"), Namespace(cfg=3.0, cfg_start=0.5, cfg_channels="all")
    pair, seen = torch.cat([y, torch.full_like(y, 10)]), []
    model.register_forward_pre_hook(lambda model, inputs: seen.append(len(inputs[0])))
    for t in (torch.full((2,), s) for s in (0.25, 0.5, 0.75)):
        whole = model.forward_with_cfg(torch.cat([x, x]), torch.cat([t, t]), pair, 3.0, True, 0.5,
                                       channels=None)[:2]
        assert torch.allclose(dit.velocity_fn(model, y, 10, args)(x, t), whole, atol=1e-5)
    assert seen == [4, 2, 4, 4, 4, 4]


def test_the_flops_of_sampling_are_one_forward_pass_per_step_and_two_if_it_is_guided(tiny):
    model, grid = tiny[0], torch.tensor([0, 0.25, 0.5, 0.75, 1])

    def flops(cfg, start):
        return dit.sampling_flops(model, grid, Namespace(cfg=cfg, cfg_start=start))
    once = dit.count_flops(model)
    assert once > 0 and flops(1.0, 0.0) == 4 * once
    assert flops(3.0, 0.5) == 6 * once and flops(3.0, 0.0) == 8 * once


@pytest.mark.parametrize("qknorm", [False, True])
def test_bf16_equals_fp32_up_to_rounding(tiny, qknorm):
    g, model = tiny[1], LightningDiT(**TINY | dict(use_qknorm=qknorm)).eval()
    model.load_state_dict(tiny[0].state_dict(), strict=not qknorm)
    wide = model(g("fwd/x"), g("fwd/t"), g("fwd/y"))
    with torch.autocast("cpu", torch.bfloat16):
        assert close(model(g("fwd/x"), g("fwd/t"), g("fwd/y")).float(), wide.detach(), 2e-2)


def test_rotary_attention_depends_only_on_the_distance_of_two_tokens():
    rope, (q, k) = RotaryEmbedding(32, 8), torch.randn(2, 32)
    q, k = (rope(x.expand(1, 1, 64, 32)) for x in (q, k))
    score = (q @ k.transpose(2, 3)).view(8, 8, 8, 8)                   # row, col, row, col
    assert torch.allclose(score[:-1, :-2, :-1, :-2], score[1:, 2:, 1:, 2:], atol=1e-4)
    assert not torch.allclose(score[0, 0, 0, 1], score[0, 0, 1, 0], atol=1e-4)


def test_the_fast_rotation_and_its_gradient_are_those_of_the_plain_one():
    rope, results = RotaryEmbedding(32, 4), []
    for form in (dit.rotate, fast_dit.rotate):
        torch.manual_seed(0)
        x = torch.randn(2, 3, 16, 32, requires_grad=True)
        out = form(x, rope.freqs_cos, rope.freqs_sin)
        (grad,) = torch.autograd.grad((out * torch.randn(2, 3, 16, 32)).sum(), x)
        results.append((out, grad))
    (out, grad), (fast_out, fast_grad) = results
    assert torch.allclose(out, fast_out, atol=1e-6) and torch.allclose(grad, fast_grad, atol=1e-6)


def test_patches_come_back_where_they_were_taken():
    model = LightningDiT(**TINY | dict(patch_size=2))
    x = torch.randn(2, 16, 8, 8)
    model.blocks, model.pos_embed.data = torch.nn.ModuleList(), torch.zeros(1, 16, 64)
    pixels = torch.eye(64).view(16, 2, 2, 64).permute(3, 0, 1, 2)              # (C p q, C, p, q)
    model.x_embedder.proj.weight.data = pixels.contiguous()
    order = torch.arange(64).view(16, 2, 2).permute(1, 2, 0).flatten()                # (p, q, C)
    model.final_layer.norm_final = torch.nn.Identity()
    model.final_layer.linear.weight.data = torch.eye(64)[order]
    assert torch.allclose(model(x, torch.zeros(2), torch.zeros(2, dtype=torch.long)), x, atol=1e-6)


def test_the_true_velocity_has_loss_zero_and_euler_integrates_it_exactly():
    x1, x0, t = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.rand(3)
    mse, cos = flow_loss(lambda x, t, y: x1 - x0, x1, x0, t, None)
    assert mse.abs().max() == 0 and cos.abs().max() < 1e-6
    mse, cos = flow_loss(lambda x, t, y: x0 - x1, x1, x0, t, None)       # opposite: cosine -1
    assert torch.allclose(cos, torch.full((3,), 2.0), atol=1e-6)
    assert torch.allclose(euler(lambda x, t: x1 - x0, x0, time_grid(7, 0.3)), x1, atol=1e-5)


def test_time_increases_from_0_to_1_and_a_small_shift_moves_it_towards_noise():
    for shift in (0, 0.075, 0.3, 1):
        grid = time_grid(50, shift)
        assert grid[0] == 0 and grid[-1] == pytest.approx(1) and (grid.diff() > 0).all()
    assert torch.equal(time_grid(50, 0), torch.linspace(0, 1, 50))
    assert torch.allclose(time_grid(50, 1), time_grid(50, 0))
    assert time_grid(3, 0.3)[1] == pytest.approx(0.3 * 0.5 / (1 - 0.7 * 0.5))
    assert lognorm_time(0.0, -0.5, 1.25) == pytest.approx(1 / (1 + np.exp(0.5)))      # the median


def test_the_ema_of_a_short_run_does_not_contain_its_initial_weights():
    a, b = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    start = a.weight.item()
    optim.update_ema(a.parameters(), b.parameters(), 0.9)
    assert a.weight.item() == pytest.approx(0.9 * start + 0.1 * b.weight.item(), abs=1e-6)
    initial_weight = np.prod([dit.ema_decay(s, None) for s in range(300)])
    assert initial_weight < 1e-9
    assert dit.ema_decay(200_000, None) == 0.9999 == dit.ema_decay(0, 0.9999)


def test_recomputed_activations_are_the_same_gradient():
    grads = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = LightningDiT(**TINY, use_checkpoint=recompute)
        torch.nn.init.normal_(model.final_layer.linear.weight)
        mse, cos = flow_loss(model, *random_batch())
        (mse + cos).mean().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(*pair) for pair in zip(*grads)) and grads[0][0].abs().max() > 0


# ---------------------------------------------------------------- the commands

class Folded(torch.nn.Module):
    """A substitute for the tokenizer that needs no training: it rearranges 2x2 pixels to 12
    channels, and back."""
    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(self.encoder.weight, 1.0)
        torch.nn.init.zeros_(self.encoder.bias)
        self.get_reconstruction_latents = lambda img: F.pixel_unshuffle(img, 2)
        self.get_latents_decoded_images = lambda z: F.pixel_shuffle(z, 2)


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch):
    """Replace transformer and tokenizer by tiny ones"""
    monkeypatch.setitem(SIZES, "nano", dict(hidden_size=32, depth=2, num_heads=2))
    monkeypatch.setattr(dit, "load_model", lambda folder: Folded())
    for module in (run, dit):
        monkeypatch.setattr(module, "peak_flops", lambda device, precision: 1e12)


@pytest.fixture
def folder(tmp_path):
    """A folder with RUN/latents: 24 built-in shapes of 16 px, encoded"""
    (tmp_path / "RUN").mkdir()
    (tmp_path / "RUN" / "run.json").write_text(json.dumps({"data": None, "image": 16, "seed": 0}))
    encode(tmp_path)
    return tmp_path


def encode(folder, *flags):
    dit.main(["latents", f"{folder}/RUN", "--n", "24", "--batch", "5", "--device", "cpu", *flags])


def run_train(folder, name, *flags):
    command = (f"train {folder}/RUN/latents --out {folder}/{name} --size nano --batch 4 "
               f"--log-every 1 --device cpu --precision fp32")
    dit.main(command.split() + list(flags))


def train(folder, name, *flags):
    """Run dit.py train -> its last checkpoint"""
    run_train(folder, name, *flags)
    return torch.load(folder / name / "last.pt", weights_only=True)


def run_sample(folder, run, out, *flags):
    command = f"sample {folder}/{run} --n 7 --points 4 --device cpu --out {folder}/{out}"
    dit.main(command.split() + list(flags))


def generate(folder, run, out, *flags):
    """Run dit.py sample -> its samples.npz"""
    run_sample(folder, run, out, *flags)
    return np.load(folder / out / "samples.npz")


def log_lines(folder, name):
    """The lines of log.jsonl without the measured times"""
    lines = (folder / name / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMING} for line in lines]


def bit_equal(a, b):
    """Bitwise equality of tensors, and of containers of tensors"""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(bit_equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(bit_equal, a, b))
    return a == b


def test_latents_are_in_the_reference_s_layout_with_their_mean_and_std(folder):
    (path,) = (folder / "RUN" / "latents").glob("*.safetensors")
    assert path.name == "latents_rank00_shard000.safetensors"
    with safe_open(path, "pt") as f:
        assert set(f.metadata()) == {"total_size", "dtype", "device"}
    shard = load_file(path)
    stats = torch.load(folder / "RUN" / "latents" / "latents_stats.pt", weights_only=True)
    z, z_flip = shard["latents"], shard["latents_flip"]
    assert z.shape == z_flip.shape == (24, 12, 8, 8) and shard["labels"].dtype == torch.int64
    assert torch.allclose(F.pixel_shuffle(z_flip, 2), F.pixel_shuffle(z, 2).flip(-1))
    assert torch.allclose(stats["mean"], z.mean((0, 2, 3), keepdim=True), atol=1e-5)
    std = z.transpose(0, 1).flatten(1).std(1)
    assert torch.allclose(stats["std"], std.view(1, 12, 1, 1), atol=1e-5)


def test_lightningdit_s_own_loader_would_read_them(folder):
    """What its ImgLatentDataset does, in our words: every *.safetensors of the folder by name; a
    running index over the rows of `labels`; one row of `latents` or `latents_flip` and its label by
    slices; latents_stats.pt beside them, broadcast over a row that is still (1, C, H, W)."""
    rows = []
    for path in sorted(glob.glob(f"{folder}/RUN/latents/*.safetensors")):
        with safe_open(path, framework="pt", device="cpu") as f:
            count = f.get_slice("labels").get_shape()[0]
            for name in ("latents", "latents_flip"):
                assert f.get_slice(name).get_shape() == [count, 12, 8, 8]
            assert f.metadata()["total_size"] == str(count)
            rows += [(path, i) for i in range(count)]
    stats = torch.load(f"{folder}/RUN/latents/latents_stats.pt", weights_only=True)
    ours = Latents(folder / "RUN" / "latents")
    assert len(rows) == len(ours) == 24 and stats.keys() == {"mean", "std"}
    assert all(x.shape == (1, 12, 1, 1) and x.dtype == torch.float32 for x in stats.values())
    seen = torch.stack([read_as_lightningdit(path, i, stats) for path, i in rows])
    read = torch.stack([ours.read(i) for i in range(24)])
    assert torch.equal(seen, (read - stats["mean"]) / stats["std"])
    assert seen.mean((0, 2, 3)).abs().max() < 1e-5
    assert (seen.transpose(0, 1).flatten(1).std(1) - 1).abs().max() < 1e-5


def read_as_lightningdit(path, i, stats):
    with safe_open(path, framework="pt", device="cpu") as f:
        z, label = f.get_slice("latents")[i:i + 1], f.get_slice("labels")[i:i + 1]
    assert label.dtype == torch.int64 and label.shape == (1,)
    return ((z - stats["mean"]) / stats["std"]).squeeze(0)


def test_an_incomplete_encoding_is_reported_and_made_again(folder, capsys):
    whole = load_file(shards(folder / "RUN" / "latents")[0])
    (folder / "RUN" / "latents" / "latents_stats.pt").unlink()
    with pytest.raises(SystemExit, match="the encoding is incomplete"):
        train(folder, "X", "--steps", "1")
    (folder / "RUN" / "latents" / "latents_rank03_shard000.safetensors").write_bytes(b"half")
    encode(folder)
    assert "2 files of an incomplete encoding" in capsys.readouterr().out
    assert bit_equal(load_file(*shards(folder / "RUN" / "latents")), whole)


def test_a_repeated_encoding_that_is_killed_does_not_count_as_complete(folder, monkeypatch):
    monkeypatch.setattr(latents, "encode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encode(folder, "--fresh")
    assert not (folder / "RUN" / "latents" / "latents_stats.pt").exists()


def test_two_processes_draw_one_process_s_batch_and_an_epoch_sees_each_latent_once(
        folder, monkeypatch):
    data = Latents(folder / "RUN" / "latents")
    stats = {"mean": torch.zeros(1, 12, 1, 1), "std": torch.ones(1, 12, 1, 1)}

    def batches(label_drop):
        return LatentBatches(data, stats, seed=3, batch=8, label_drop=label_drop, null=10)
    whole = batches(0.5)[5]
    epoch = torch.cat([batches(0)[step]["y"] for step in range(3)])
    assert torch.equal(epoch.sort().values, data.labels.sort().values)
    assert (batches(1)[0]["y"] == 10).all()
    halves = []
    for rows in (range(4), range(4, 8)):
        monkeypatch.setattr(latents, "rank_slice", lambda n: rows)
        halves.append(batches(0.5)[5])
    assert bit_equal(whole, {k: torch.cat([half[k] for half in halves]) for k in whole})
    assert whole["x1"].shape == (8, 12, 8, 8)


def test_data_workers_change_no_weight(folder):
    alone = train(folder, "A", "--steps", "3")
    assert bit_equal(alone["ema"], train(folder, "B", "--steps", "3", "--workers", "2")["ema"])


class FoldedGaussian(Folded):
    """A substitute for a KL autoencoder: its mean is the latent of Folded, its std is 0.5"""
    def sample_latents(self, image, rngs):
        mean = self.get_reconstruction_latents(image)
        noise = np.stack([rng.standard_normal(mean.shape[1:], dtype=np.float32) for rng in rngs])
        return mean + 0.5 * torch.from_numpy(noise)


def stored_latents(folder):
    """Both latents of every image, in order"""
    shard = [load_file(path) for path in shards(folder)]
    return [torch.cat([part[name] for part in shard]) for name in ("latents", "latents_flip")]


def test_latents_of_a_kl_autoencoder_are_samples(folder, monkeypatch, capsys):
    """LightningDiT's extraction stores mean + std * noise, with other noise for the mirrored copy;
    ours depends on seed and image alone"""
    means = stored_latents(folder / "RUN" / "latents")
    monkeypatch.setattr(dit, "load_model", lambda folder: FoldedGaussian())
    encode(folder, "--out", f"{folder}/five")
    said = capsys.readouterr().out
    noise = [(z - mean) / 0.5 for z, mean in zip(stored_latents(folder / "five"), means)]
    assert all(abs(x.mean()) < 0.02 and abs(x.std() - 1) < 0.02 for x in noise)
    assert abs((noise[0] * noise[1]).mean()) < 0.02                                   # independent
    assert abs((noise[0][1:] * noise[0][:-1]).mean()) < 0.02
    encode(folder, "--out", f"{folder}/seven", "--batch", "7")
    assert bit_equal(stored_latents(folder / "seven"), stored_latents(folder / "five"))
    encode(folder, "--out", f"{folder}/other", "--seed", "1")
    assert not torch.equal(stored_latents(folder / "other")[0], stored_latents(folder / "five")[0])
    monkeypatch.setattr(latents, "rank_slice", lambda n: range(12, 24))   # the second of two ranks
    encode(folder, "--out", f"{folder}/second")
    difference = (stored_latents(folder / "second")[0] - means[0])[:12]
    assert torch.allclose(difference, 0.5 * noise[0][12:], atol=1e-5)
    files = [folder / name / "latents.json" for name in ("RUN/latents", "five", "other")]
    written = [json.loads(path.read_text())["posterior"] for path in files]
    assert written == ["deterministic", "sampled with seed 0", "sampled with seed 1"]
    assert written[1] in said


# ---------------------------------------------------------------- resuming

def test_ten_steps_are_five_and_a_kill_and_five(folder):
    straight = train(folder, "A", "--steps", "10", "--save-every", "5")
    spawn = torch.multiprocessing.get_context("spawn")
    doomed = spawn.Process(target=killed_in_step_8, args=(folder,))
    doomed.start()
    doomed.join()
    assert doomed.exitcode == -signal.SIGKILL and log_lines(folder, "B")[-1]["step"] == 7
    assert torch.load(folder / "B" / "last.pt", weights_only=True)["step"] == 5
    resumed = train(folder, "B", "--steps", "10", "--save-every", "5")
    assert all(bit_equal(straight[part], resumed[part]) for part in ("step", "model", "ema", "opt"))
    assert log_lines(folder, "A") == log_lines(folder, "B") and len(log_lines(folder, "A")) == 10
    assert bit_equal(*(load_file(folder / name / "model.safetensors") for name in "AB"))
    with pytest.raises(SystemExit, match="seed: was 0, now 1"):
        train(folder, "B", "--steps", "11", "--seed", "1")


def killed_in_step_8(folder):
    torch.set_num_threads(1)
    SIZES["nano"] = dict(hidden_size=32, depth=2, num_heads=2)
    update_ema, calls = dit.update_ema, []

    def update_or_die(*args):
        update_ema(*args)
        calls.append(None)
        if len(calls) == 8:
            os.kill(os.getpid(), signal.SIGKILL)
    dit.update_ema = update_or_die
    run_train(folder, "B", "--steps", "10", "--save-every", "5")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_finishes_the_step_saves_and_leaves_with_status_75(folder, monkeypatch, number):
    flow = dit.flow_loss

    def signalled(*args):
        signal.raise_signal(number)                               # in the middle of the first step
        return flow(*args)
    monkeypatch.setattr(dit, "flow_loss", signalled)
    with pytest.raises(SystemExit) as left:
        train(folder, "B", "--steps", "3")
    assert left.value.code == EXIT_RESUME == 75
    assert torch.load(folder / "B" / "last.pt", weights_only=True)["step"] == 1
    monkeypatch.setattr(dit, "flow_loss", flow)
    resumed = train(folder, "B", "--steps", "3")
    assert bit_equal(resumed["opt"], train(folder, "A", "--steps", "3")["opt"])


def test_a_step_with_a_loss_that_is_not_finite_changes_nothing_and_is_counted(folder, monkeypatch):
    train(folder, "A", "--steps", "2")
    flow = dit.flow_loss
    broken = lambda *args: tuple(x * float("nan") for x in flow(*args))
    monkeypatch.setattr(dit, "flow_loss", broken)
    before = torch.load(folder / "A" / "last.pt", weights_only=True)
    after = train(folder, "A", "--steps", "3")
    assert bit_equal(before["model"], after["model"]) and bit_equal(before["ema"], after["ema"])
    assert bit_equal(before["opt"]["state"], after["opt"]["state"])
    assert after["skipped"] == 1 and log_lines(folder, "A")[-1]["skipped"] == 1


def test_settings_are_stored_with_the_flags_and_may_not_change(folder):
    train(folder, "A", "--steps", "1", "--set", "ema=0.5", "--set", "lognorm_mu=0")
    settings = json.loads((folder / "A" / "run.json").read_text())
    assert settings["ema"] == 0.5 and settings["lognorm_mu"] == 0 and settings["seed"] == 0
    assert settings["lognorm_sigma"] == 1.25 and settings["label_drop"] == 0.1
    with pytest.raises(SystemExit, match="ema: was 0.5, now None"):
        train(folder, "A", "--steps", "2", "--set", "lognorm_mu=0")


def test_the_log_counts_the_flops_of_three_forward_passes(folder):
    train(folder, "A", "--steps", "1")
    line = json.loads((folder / "A" / "log.jsonl").read_text())
    model, *_ = dit.load_dit(folder / "A", torch.device("cpu"))
    assert line["gflops"] == pytest.approx(3 * 4 * dit.count_flops(model) / 1e9)
    assert 0 < line["share_of_peak"] < 1


# ---------------------------------------------------------------- previews

@pytest.fixture
def with_previews(folder, monkeypatch):
    """`folder` with a tokenizer that is found; previews at steps 2, 4, 8, ..., and the last"""
    (folder / "RUN" / "config.json").write_text("{}")
    monkeypatch.setattr(previews, "FIRST_STEP", 2)
    return folder


def preview_steps(folder, name):
    return list(previews.preview_files(folder / name))


def test_previews_are_at_doubled_steps_and_at_the_last_and_show_at_most_10_classes():
    steps = [step for step in range(1, 751) if previews.is_preview_step(step, 750)]
    assert steps == [50, 100, 200, 400, 750]
    longer = [step for step in range(1, 3001) if previews.is_preview_step(step, 3000)]
    assert longer == [50, 100, 200, 400, 800, 1600, 3000]
    assert previews.preview_classes(3) == [0, 1, 2]
    assert previews.preview_classes(1000) == list(range(0, 1000, 100))


def test_a_training_with_previews_is_equal_to_one_without_in_every_bit(with_previews):
    def train_and_draw(name, *flags):
        found = train(with_previews, name, "--steps", "5", *flags)
        return found, torch.rand(3)
    (shown, after), (plain, after_plain) = (train_and_draw("A"), train_and_draw("B", "--set",
                                                                                "previews=0"))
    assert preview_steps(with_previews, "A") == [2, 4, 5]
    assert not (with_previews / "B" / "previews").exists()
    assert all(bit_equal(shown[part], plain[part]) for part in ("model", "ema", "opt"))
    assert torch.equal(after, after_plain)
    assert log_lines(with_previews, "A") == log_lines(with_previews, "B")


def test_a_preview_shows_the_ema_weights_of_its_step_from_the_noise_of_sample(with_previews):
    train(with_previews, "A", "--steps", "4")
    assert preview_steps(with_previews, "A") == [2, 4]
    rows = [previews.read_preview(path) for path in
            previews.preview_files(with_previews / "A").values()]
    assert rows[0].shape == (10, 3, 16, 16) and not torch.equal(*rows)
    samples = generate(with_previews, "A", "out", "--per-class", "1", "--points", "21")["arr_0"]
    difference = 255 * rows[1].permute(0, 2, 3, 1) - torch.from_numpy(samples).float()
    assert difference.abs().max() <= 1                           # rounding, before a truncation


def test_a_continued_run_needs_no_previews_keeps_those_it_has_and_fresh_deletes_them(with_previews):
    train(with_previews, "A", "--steps", "3", "--set", "previews=0")
    resumed = train(with_previews, "A", "--steps", "5")
    assert preview_steps(with_previews, "A") == [4, 5]
    assert bit_equal(resumed["ema"], train(with_previews, "B", "--steps", "5")["ema"])
    first = (with_previews / "B/previews/step-000004.png").read_bytes()
    assert (with_previews / "A/previews/step-000004.png").read_bytes() == first
    train(with_previews, "A", "--steps", "9")
    assert preview_steps(with_previews, "A") == [4, 5, 8, 9]
    users = with_previews / "A" / "previews" / "mine.png"
    users.write_bytes(b"an image of the user")
    train(with_previews, "A", "--steps", "1", "--fresh", "--set", "previews=0")
    assert preview_steps(with_previews, "A") == [] and users.exists()


@pytest.mark.parametrize("kind", ["generate", "decoder", "disk", "tokenizer"])
def test_a_preview_that_fails_is_reported_once_and_the_training_goes_on(
        with_previews, monkeypatch, capsys, kind):
    plain = train(with_previews, "A", "--steps", "4", "--set", "previews=0")
    told = "out of memory"
    if kind == "generate":
        def fail(*_, precision):
            raise torch.OutOfMemoryError("out of memory\nwith advice")
        monkeypatch.setattr(dit, "draft", fail)
    elif kind == "decoder":
        class WithoutDecoder(Folded):
            def __init__(self):
                super().__init__()
                del self.get_latents_decoded_images
        monkeypatch.setattr(dit, "load_model", lambda folder: WithoutDecoder())
        told = "get_latents_decoded_images"
    elif kind == "disk":
        (with_previews / "B").mkdir()
        (with_previews / "B" / "previews").write_text("")
        told = "File exists"
    else:
        old = latents.Latents._check_encoder
        other = Folded()
        torch.nn.init.constant_(other.encoder.weight, 2.0)

        def check(self, load_tokenizer):
            old(self, load_tokenizer)
            monkeypatch.setattr(dit, "load_model", lambda folder: other)    # from now on
        monkeypatch.setattr(latents.Latents, "_check_encoder", check)
        told = "has been trained on"
    capsys.readouterr()
    found = train(with_previews, "B", "--steps", "4")
    said = capsys.readouterr().out
    assert said.count("goes on without previews") == 1 and told in said and "of step 2" in said
    assert bit_equal(found["ema"], plain["ema"])


# ---------------------------------------------------------------- many processes

def one_of_many(rank, count, folder, commands):
    """Execute the commands in order, as one of `count` gloo processes"""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet{count}",
                                         rank=rank, world_size=count)
    sys.stdout = sys.stderr = open(folder / f"said{rank}of{count}", "w")
    SIZES["nano"] = dict(hidden_size=32, depth=2, num_heads=2)
    dit.load_model = lambda folder: Folded()
    dit.cleanup = lambda: None
    run.peak_flops = dit.peak_flops = lambda device, precision: 1e12
    functions = {"encode": encode, "run_train": run_train, "run_sample": run_sample}
    for name, *args in commands:
        functions[name](folder, *args)
    torch.distributed.destroy_process_group()


def relative_difference(a, b):
    """Norm of the difference of all weights, divided by the norm of the weights"""
    norm = lambda xs: torch.stack([x.double().norm() for x in xs]).norm()
    return norm([a[k].double() - b[k] for k in a]) / norm(a.values())


def test_any_number_of_processes_is_the_same_training_the_same_latents_and_the_same_images(folder):
    wide, narrow = ["--steps", "5", "--precision", "fp64"], ["--steps", "5"]
    one = {"fp64": train(folder, "one64", *wide), "fp32": train(folder, "one32", *narrow)}
    by_two = (("encode", "--out", f"{folder}/two"), ("run_train", "two64", *wide),
              ("run_train", "two32", *narrow), ("run_sample", "one32", "shot2"))
    torch.multiprocessing.spawn(one_of_many, (2, folder, by_two), nprocs=2)
    by_four = [("run_train", "four64", *wide)]
    torch.multiprocessing.spawn(one_of_many, (4, folder, by_four), nprocs=4)
    for name, base, tolerance in (("two64", "fp64", 1e-9), ("four64", "fp64", 1e-9),
                                  ("two32", "fp32", 1e-6)):
        found = torch.load(folder / name / "last.pt", weights_only=True)
        assert relative_difference(found["model"], one[base]["model"]) < tolerance, name
        assert relative_difference(found["ema"], one[base]["ema"]) < tolerance, name
        losses = [line["loss"] for line in log_lines(folder, name)]
        expected = [line["loss"] for line in log_lines(folder, "one" + base[2:])]
        assert losses == pytest.approx(expected, rel=max(tolerance, 2e-6))
    assert one["fp64"]["model"]["final_layer.linear.weight"].dtype == torch.float64

    ours, pooled = Latents(folder / "RUN" / "latents"), Latents(folder / "two")
    names = [f"latents_rank0{r}_shard000.safetensors" for r in range(2)]
    assert [path.name for path in pooled.paths] == names
    assert torch.equal(ours.labels, pooled.labels) and bit_equal(ours.stats, pooled.stats)
    for flip in (False, True):
        assert all(torch.equal(ours.read(i, flip), pooled.read(i, flip)) for i in range(24))

    alone, shared = generate(folder, "one32", "shot1"), np.load(folder / "shot2" / "samples.npz")
    assert np.array_equal(alone["labels"], shared["labels"])
    assert np.abs(alone["arr_0"].astype(int) - shared["arr_0"]).max() <= 1


# ---------------------------------------------------------------- sampling

def test_samples_do_not_depend_on_the_batch_they_were_made_in(folder):
    train(folder, "D", "--steps", "2")
    one, two = (generate(folder, "D", f"by{b}", "--batch", b)["arr_0"] for b in ("7", "3"))
    assert np.abs(one.astype(int) - two).max() <= 1              # rounding may cross a truncation


def test_labels_are_balanced_or_random_over_the_classes_asked_for(folder):
    train(folder, "D", "--steps", "2")
    assert generate(folder, "D", "one")["labels"].tolist() == list(range(7))
    assert (folder / "one" / "grid.png").exists()
    again = generate(folder, "D", "one", "--per-class", "2", "--classes", "1,4", "--cfg", "2",
                     "--set", "cfg_channels=all", "--fresh")
    assert again["labels"].tolist() == [1, 4, 1, 4]
    assert len(list((folder / "one" / "png").iterdir())) == 4
    drawn = []
    for n in ("20", "9"):
        made = generate(folder, "D", f"random{n}", "--set", "labels=random", "--classes", "1,4",
                        "--n", n)
        drawn.append(made["labels"].tolist())
    assert set(drawn[0]) == {1, 4} and drawn[0][:9] == drawn[1]


def test_samples_are_one_array_as_adm_s_evaluator_reads_it_and_the_same_images_as_png(
        folder, capsys):
    train(folder, "D", "--steps", "1")
    made = generate(folder, "D", "out")
    assert "images/s at" in capsys.readouterr().out
    assert made.files[0] == "arr_0" and made["arr_0"].dtype == np.uint8
    assert made["arr_0"].shape == (7, 16, 16, 3)
    png = folder / "out" / "png"
    images = [np.asarray(Image.open(png / f"{j:06d}.png")) for j in range(7)]
    assert np.array_equal(np.stack(images), made["arr_0"]) and len(list(png.iterdir())) == 7


@pytest.mark.parametrize("command, sentence", [
    ("latents {0}/RUN", "already holds latents"),
    ("latents {0}/RUN --n 0 --out {0}/new", "--n 0: wanted 1 or more"),
    ("train {0}/nothing --out {0}/X", "holds no latents_rank"),
    ("train {0}/RUN/latents --out {0}/X --batch 0", "--batch 0"),
    ("train {0}/RUN/latents --out {0}/X --log-every 0", "--log-every 0"),
    ("sample {0}/RUN", "lacks config.json"),
    ("sample {0}/C --classes 3,12", "--classes 12: the classes of this model are 0 .. 9"),
    ("sample {0}/C --classes circle", "--classes circle: the classes of this model are 0 .. 9"),
    ("sample {0}/C --classes -1", "--classes -1: "),
    ("sample {0}/C --classes 1.5,2", "--classes 1.5: "),
    ("sample {0}/C --n 0", "--n 0: wanted 1 or more"),
    ("sample {0}/C --per-class 0", "--per-class 0: wanted 1 or more"),
    ("sample {0}/C --seed -1", "--seed -1: wanted 0 or more"),
    ("sample {0}/C --cfg nan", "--cfg nan: wanted a finite number"),
    ("sample {0}/C --points 1", "--points 1"),
    ("sample {0}/C --set labels=some", "labels must be balanced or random"),
    ("sample {0}/C --set cfg_channels=4", "balanced or random, and cfg_channels 3 or all"),
    ("train {0}/RUN/latents --out {0}/X --set ema=1", "--set ema=1:"),
    ("train {0}/RUN/latents --out {0}/X --set ema=fast", "--set ema=fast:"),
    ("train {0}/RUN/latents --out {0}/X --set label_drop=2", "label_drop=2.0:")])
def test_a_request_that_cannot_work_is_refused_with_a_sentence(folder, command, sentence):
    if "/C" in command:
        train(folder, "C", "--steps", "1")
    with pytest.raises(SystemExit, match=sentence):
        dit.main(command.format(folder).split() + ["--device", "cpu"])


def test_a_batch_that_cannot_be_shared_equally_is_refused_with_the_nearest_that_can(
        folder, monkeypatch):
    monkeypatch.setattr(dit, "world_size", lambda: 3)
    sentence = "--batch 4 cannot be divided equally among 3 processes; try --batch 3"
    with pytest.raises(SystemExit, match=sentence):
        train(folder, "X", "--steps", "1")


def test_another_decoder_of_the_same_encoder_is_accepted_and_that_of_another_encoder_is_refused(
        folder, monkeypatch):
    train(folder, "E", "--steps", "1")
    other = Folded()
    other.decoder = torch.nn.Linear(1, 1)                           # as after stage 2
    monkeypatch.setattr(dit, "load_model", lambda folder: other)
    assert len(generate(folder, "E", "out", "--tokenizer", "STAGE2")["arr_0"]) == 7
    torch.nn.init.constant_(other.encoder.weight, 2.0)
    with pytest.raises(SystemExit, match="did not make the latents"):
        run_sample(folder, "E", "new")


# ---------------------------------------------------------------- files that exist, moved, or are
# damaged

def test_samples_of_an_earlier_run_are_replaced_only_with_fresh(folder, capsys):
    train(folder, "D", "--steps", "1")
    first = generate(folder, "D", "out")["arr_0"]
    users = folder / "out" / "png" / "0001-mine.png"
    users.write_bytes(b"an image of the user")
    for name in ("grid.png", "samples.npz", "labels.json", "png/000003.png"):
        with pytest.raises(SystemExit, match="already holds samples.*--out.*--fresh"):
            run_sample(folder, "D", "out", "--n", "2")
        assert (folder / "out" / name).exists()
        (folder / "out" / name).unlink()                     # one file of the samples is enough
    capsys.readouterr()
    again = generate(folder, "D", "out", "--n", "2", "--fresh")["arr_0"]
    assert "samples of an earlier run are deleted (6 images)" in capsys.readouterr().out
    assert np.array_equal(again, first[:2]) and users.read_bytes() == b"an image of the user"


def test_a_killed_repetition_does_not_leave_the_old_array_beside_new_images(folder, monkeypatch):
    train(folder, "D", "--steps", "1")
    generate(folder, "D", "out")
    monkeypatch.setattr(dit, "euler", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_sample(folder, "D", "out", "--fresh")
    assert [path.name for path in (folder / "out").iterdir()] == ["png"]


@pytest.fixture
def moved_on(folder, monkeypatch):
    """The tokenizer of `folder` has been trained on since the latents were encoded"""
    (folder / "RUN" / "config.json").write_text("{}")
    other = Folded()
    torch.nn.init.constant_(other.encoder.weight, 2.0)
    monkeypatch.setattr(dit, "load_model", lambda folder: other)
    return folder


def test_latents_of_an_older_encoder_are_refused_before_the_training(moved_on):
    sentence = "holds latents of an older encoder.*--fresh"
    with pytest.raises(SystemExit, match=sentence):
        encode(moved_on)
    with pytest.raises(SystemExit, match=sentence):
        run_train(moved_on, "X", "--steps", "1")
    assert not (moved_on / "X").exists()
    encode(moved_on, "--fresh")
    run_train(moved_on, "X", "--steps", "1")


def test_a_training_on_latents_is_not_continued_after_the_encoder_has_changed(folder, request):
    train(folder, "X", "--steps", "1")
    request.getfixturevalue("moved_on")
    with pytest.raises(SystemExit, match="holds latents of an older encoder"):
        run_train(folder, "X", "--steps", "2")


def test_latents_without_their_tokenizer_are_trained_on_with_a_note(folder, capsys):
    os.rename(folder / "RUN" / "latents", folder / "latents")
    dit.main(f"train {folder}/latents --out {folder}/X --size nano --batch 4 --steps 1 --device "
             f"cpu".split())
    said = capsys.readouterr().out
    assert "is not there; so it is not checked" in said and "there are no previews" in said
    assert (folder / "X" / "model.safetensors").exists() and not (folder / "X/previews").exists()


def in_three_shards(folder, ranks=(0, 0, 0)):
    """Divide the 24 latents into three shards of 8, written by these ranks -> paths"""
    (path,) = shards(folder / "RUN" / "latents")
    tensors = load_file(path)
    path.unlink()
    for k, r in enumerate(ranks):
        number = k - ranks.index(r)
        part = {name: x[8 * k:8 * k + 8].clone() for name, x in tensors.items()}
        save_file(part, path.with_name(f"latents_rank{r:02d}_shard{number:03d}.safetensors"))
    return shards(path.parent)


@pytest.mark.parametrize("stated", [True, False])            # older folders do not state the number
@pytest.mark.parametrize("ranks, lost, told", [
    ((0, 0, 0), 1, "1 did not arrive .shard 1 of rank 0"),
    ((0, 1, 2), 1, "1 did not arrive .shard 0 of rank 1"),
    ((0, 0, 1), 0, "1 did not arrive .shard 0 of rank 0")])
def test_a_shard_that_did_not_arrive_is_named(folder, ranks, lost, told, stated):
    paths = in_three_shards(folder, ranks)
    train(folder, "X", "--steps", "1")                       # complete
    paths[lost].unlink()
    if not stated:
        forget_the_number(folder)
    with pytest.raises(SystemExit, match=f"holds 16 latents in 2 shards, but {told}.*copy it"):
        train(folder, "Y", "--steps", "1")


def forget_the_number(folder):
    path = folder / "RUN" / "latents" / "latents.json"
    about = json.loads(path.read_text())
    assert about.pop("n") == 24
    path.write_text(json.dumps(about))


def test_missing_last_shards_and_shards_that_are_there_twice_are_counted(folder):
    paths = in_three_shards(folder)
    paths[2].unlink()
    with pytest.raises(SystemExit, match="16 latents in 2 shards, but latents.json counts 24"):
        train(folder, "X", "--steps", "1")
    forget_the_number(folder)
    copy = paths[0].with_stem(paths[0].stem + " (1)")
    copy.write_bytes(paths[0].read_bytes())
    with pytest.raises(SystemExit, match=r"shard000.safetensors is there twice, also as .* \(1\)"):
        train(folder, "X", "--steps", "1")


def test_an_encoding_on_disks_that_are_not_shared_is_refused(folder, monkeypatch):
    monkeypatch.setattr(latents, "all_reduce_sum", lambda n: n + 10)        # another rank's latents
    monkeypatch.setattr(files, "SECONDS_TO_WAIT", 0)
    with pytest.raises(SystemExit, match="holds 24 of the 34 latents .* that all machines share"):
        encode(folder, "--fresh")
    assert not (folder / "RUN" / "latents" / "latents_stats.pt").exists()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"
FILES_OF_LATENTS = ["latents_rank00_shard000.safetensors", "latents_stats.pt", "latents.json",
                    "classes.json"]
FILES_OF_A_DIT = ["config.json", "model.safetensors", "latents_stats.pt", "classes.json"]


def damaged(whole):
    return {"half": whole[:len(whole) // 2], "empty": b"", "zeros": bytes(300), "pointer": LFS,
            "other": b"7"}


@pytest.mark.parametrize("kind", damaged(b""))
def test_a_damaged_file_of_latents_or_of_a_transformer_is_named_with_what_to_do(folder, kind):
    train(folder, "D", "--steps", "1")
    for where, names in (("RUN/latents", FILES_OF_LATENTS), ("D", FILES_OF_A_DIT)):
        for name in names:
            path = folder / where / name
            whole = path.read_bytes()
            path.write_bytes(damaged(whole)[kind])
            with pytest.raises(SystemExit, match=f"{name} cannot be read .*; .*copy"):
                if where == "D":
                    run_sample(folder, "D", "out")
                else:
                    run_train(folder, "X", "--steps", "1")
            path.write_bytes(whole)
    assert not (folder / "X").exists() and not (folder / "out").exists()


@pytest.mark.parametrize("name, contents, told", [
    ("latents.json", {"image": 16}, "it lacks tokenizer, encoder, data, split"),
    ("classes.json", {"cat": 0}, "it holds a dict, not a list"),
    ("classes.json", [*range(10)], "it holds other values than names"),
    ("classes.json", ["cat"], "labels are between 0 and 9, but classes.json names 1"),
    ("latents_stats.pt", {"mu": 0}, "'mean' is missing"),
    ("latents_stats.pt", torch.zeros(3), "cannot be read"),
    ("latents_stats.pt", {"mean": torch.zeros(1, 12, 1, 1), "std": torch.zeros(1, 12, 1, 1)},
     "not above 0"),
    ("latents_stats.pt", {"mean": torch.zeros(12), "std": torch.ones(12)}, "wanted .1, C, 1, 1."),
    ("latents_rank00_shard000.safetensors", {"latents": torch.zeros(2, 3)}, "cannot be read"),
    ("latents_rank00_shard001.safetensors",
     {"latents": torch.zeros(2, 12, 4, 4), "latents_flip": torch.zeros(2, 12, 4, 4),
      "labels": torch.zeros(2, dtype=torch.long)}, "its latents are .12, 4, 4., those of"),
    ("latents_rank00_shard001.safetensors",
     {"latents": torch.zeros(2, 12, 8, 8), "latents_flip": torch.zeros(2, 12, 8, 8),
      "labels": torch.zeros(3, dtype=torch.long)}, "labels are torch.int64 .3,.")])
def test_files_of_another_program_are_refused_before_the_training(folder, name, contents, told):
    path = folder / "RUN" / "latents" / name
    if path.suffix == ".json":
        path.write_text(json.dumps(contents))
    elif path.suffix == ".pt":
        torch.save(contents, path)
    else:
        save_file(contents, path)
    with pytest.raises(SystemExit, match=told):
        train(folder, "X", "--steps", "1")
    assert not (folder / "X").exists()


def test_a_transformer_beside_the_class_names_or_the_statistics_of_another_is_refused(folder):
    train(folder, "D", "--steps", "1")
    (folder / "D" / "classes.json").write_text('["cat", "dog"]')
    with pytest.raises(SystemExit, match="12 channels and 10 classes; .* names 2 classes"):
        run_sample(folder, "D", "out")


def test_classes_without_latents_are_named_and_counted(folder, capsys):
    classes = folder / "RUN" / "latents" / "classes.json"
    classes.write_text(json.dumps([*json.loads(classes.read_text()), "lost+found"]))
    train(folder, "D", "--steps", "1")
    # there is no star among the 24 shapes
    assert "2 of 11 classes have no latents (star, ...)" in capsys.readouterr().out


def test_the_fingerprint_is_that_of_trunk_and_bottleneck_and_of_nothing_else(monkeypatch):
    model = VTPModel(VTPConfig.of_size("nano", 48, 12, 64, clip=False))
    monkeypatch.setattr(dit, "load_model", lambda folder: model)
    prints = [dit.load_tokenizer("RUN", torch.device("cpu"))[1]]
    for part in (model.pixel_decoder, model.trunk.feature_bottleneck, model.trunk.blocks[0]):
        next(part.parameters()).data.mul_(0.5)
        prints.append(dit.load_tokenizer("RUN", torch.device("cpu"))[1])
    assert prints[0] == prints[1] and len(set(prints)) == 3


def test_a_small_model_learns_which_class_is_which():
    torch.manual_seed(0)
    model = LightningDiT(input_size=2, in_channels=4, hidden_size=32, depth=2, num_heads=2,
                         num_classes=2)
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    target = torch.tensor([-1.0, 1.0])
    for _ in range(150):
        y = torch.randint(2, (64,))
        x1 = target[y].view(-1, 1, 1, 1).expand(-1, 4, 2, 2)      # class 0 is all -1, class 1 +1
        t = lognorm_time(torch.randn(64), 0.0, 1.0)
        mse, cos = flow_loss(model, x1, torch.randn(64, 4, 2, 2), t, y)
        opt.zero_grad()
        (mse + cos).mean().backward()
        opt.step()
    y = torch.tensor([0, 1]).repeat(8)
    out = euler(lambda x, t: model(x, t, y), torch.randn(16, 4, 2, 2), time_grid(20, 0))
    assert (out.mean((1, 2, 3)) - target[y]).abs().max() < 0.5
