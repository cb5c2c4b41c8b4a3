"""eval.py as its user meets it: a tiny run, then every number, each with its protocol; and sentences for what cannot be measured."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval
from vtp_min import VTPConfig, VTPModel
from vtp_min.fid import save_statistics
from vtp_min.losses import Perceptual

ROOT = Path(__file__).parent.parent


def python(*args):
    return subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, capture_output=True, text=True)


def ok(*args):
    done = python(*args)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def here(monkeypatch):
    """eval.py in this process: quicker, and its parts can be replaced"""
    def go(*args):
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, args)])
        eval.main()
    return go


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A nano run of three steps on 16-pixel shapes: every part is there, nothing is learned."""
    folder = tmp_path_factory.mktemp("run")
    ok("train.py", "--out", folder, "--image", 16, "--patch", 8, "--batch", 8, "--batch-ssl", 4, "--batch-rec", 4, "--locals", 1, "--prototypes", 32,
       "--head-hidden", 32, "--perceptual", "none", "--steps", 3)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Released weights, as far as eval.py can tell: config.json and model.safetensors, 32 px, nothing about data"""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    VTPModel(VTPConfig.of_size("nano", image=32)).save_pretrained(folder)
    return folder


def metrics(run):
    return {m["name"]: m for m in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}


def test_each_number_is_printed_with_its_protocol_and_kept(run, here, capsys):
    here("zeroshot", run, "--limit", 40)
    here("probe", run, "--limit", 40, "--train-limit", 60)
    here("recon", run, "--limit", 20, "--perceptual", "none")
    said, found = capsys.readouterr().out, metrics(run)
    assert {"zero-shot top1", "linear probe latent", "linear probe full", "kNN latent", "kNN full", "PSNR", "SSIM"} <= found.keys()
    for m in found.values():
        assert m["name"] in said and m["protocol"] in said
    assert all(0 <= found[k]["value"] <= 1 for k in found if k not in ("PSNR", "SSIM"))
    assert "40 pictures" in found["zero-shot top1"]["protocol"] and "chance 0.100" in found["zero-shot top1"]["protocol"]


def test_the_batch_size_changes_no_number(run, here):
    for batch in (7, 20):
        here("recon", run, "--limit", 20, "--perceptual", "none", "--batch", batch)
    values = [m["value"] for m in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if m["name"] == "PSNR"]
    assert values[-1] == pytest.approx(values[-2], rel=1e-5)


def test_samples_are_judged_by_a_classifier_whose_distance_is_not_called_fid(run, here, tmp_path, capsys):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "samples.npz", arr_0=rng.integers(0, 256, (60, 16, 16, 3), dtype=np.uint8), labels=np.arange(60) % 10)
    command = ["fid", tmp_path, "--run", run, "--features", "classifier", "--limit", 60, "--train-limit", 200, "--judge-steps", 20]
    with pytest.raises(SystemExit, match="below 2048"):
        here(*command)
    here(*command, "--few")
    assert "training the judge" in capsys.readouterr().out
    found = metrics(run)
    assert {"FD-classifier", "FD-classifier of real", "samples recognised", "classifier accuracy"} <= found.keys() and "FID" not in found
    assert "ONLY 60 SAMPLES" in found["FD-classifier"]["protocol"]
    assert found["FD-classifier"]["value"] > found["FD-classifier of real"]["value"]                  # noise is further from pictures than pictures
    here(*command, "--few")
    assert "training the judge" not in capsys.readouterr().out and metrics(run)["FD-classifier"]["value"] == pytest.approx(found["FD-classifier"]["value"], rel=1e-4)   # kept, not retrained


def test_as_a_script_it_ends_with_a_sentence_and_no_traceback():
    done = python("eval.py", "zeroshot", "nowhere")
    assert done.returncode and "eval.py zeroshot: nowhere holds no config.json" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("command, told", [
    (["zeroshot", "nowhere"], "holds no config.json"),
    (["fid", "RUN/nothing.npz", "--run", "RUN"], "there is no"),
    (["recon", "RUN", "--limit", "4", "--perceptual", "none", "--few", "--features", "inception"], "fetch inception.*--features classifier"),
    (["recon", "RUN", "--limit", "4"], "eval.py fetch"),
    (["recon", "RUN", "--limit", "4", "--perceptual", "none", "--few", "--features", "squeezenet"], "squeezenet_v10.npz is missing.*Deep-Compression.*Put that file, sha256"),
    (["recon", "RUN", "--limit", "4", "--perceptual", "none", "--features", "squeezenet"], "4 samples: below 2048"),
    (["fetch", "squeezenet"], "cannot be fetched.*songhan/SqueezeNet-Deep-Compression.*BSD"),
    (["fid", "RUN/nothing", "--run", "RUN"], "no samples.npz and no pictures"),
    (["probe", "RUN", "--data", "nowhere"], "no folder nowhere")])
def test_what_cannot_be_measured_is_said_in_a_sentence(run, here, command, told, monkeypatch, tmp_path):
    monkeypatch.setenv("VTP_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(SystemExit, match=told):
        here(*(c.replace("RUN", str(run)) for c in command))


# ---------------------------------------------------------------- the released code's protocols
def test_the_official_probe_names_the_best_on_validation_and_the_honest_choice(run, here, tmp_path):
    here("probe", run, "--limit", 30, "--train-limit", 60, "--protocol", "official", "--epochs", 2, "--epoch-length", 2, "--train-batch", 16, "--out", tmp_path)
    found = metrics(tmp_path)
    for name in ("linear probe official", "linear probe latent official"):
        assert found[name]["value"] >= found[f"{name}, held-out choice"]["value"]               # the maximum is at least any one of them
        assert "on the validation set ITSELF" in found[name]["protocol"] and "chosen on the held-out pictures" in found[f"{name}, held-out choice"]["protocol"]
    protocol = found["linear probe official"]["protocol"]
    for part in ("last 1 or 4 layers", "best of 52", "54 train", "6 held out", "30 val", "13 rates", "centre 16 of 18 px", "fp32 trunk", "seed 0"):
        assert part in protocol


def test_names_that_occur_twice_are_counted_in_the_protocol(run, here, tmp_path):
    for k, name in enumerate(("a", "b", "c")):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (20, 20), (80 * k, 0, 0)).save(tmp_path / "val" / name / "x.png")
    (tmp_path / "classnames.txt").write_text("a\tmissile\nb\tsunglasses\nc\tmissile\n")
    here("zeroshot", run, "--val-data", tmp_path, "--out", tmp_path)
    assert "3 classes (2 distinct names) x 80 templates" in metrics(tmp_path)["zero-shot top1"]["protocol"]


def test_lpips_is_a_mean_over_pictures_whatever_the_batch(weights, here, tmp_path, monkeypatch):
    def random_trunk(net):
        torch.manual_seed(0)
        return Perceptual(net, random_trunk=True)
    monkeypatch.setattr(eval, "Perceptual", random_trunk)
    values = []
    for batch in (2, 5):
        here("recon", weights, "--data", "shapes", "--limit", 5, "--perceptual", "squeeze", "--batch", batch, "--out", tmp_path)
        values.append(metrics(tmp_path)["LPIPS"]["value"])
    assert values[0] == pytest.approx(values[1], rel=1e-5) and values[0] > 0
    assert "squeeze" in metrics(tmp_path)["LPIPS"]["protocol"] and "encoder and decoder fp32 (official: encoder bf16)" in metrics(tmp_path)["PSNR"]["protocol"]


def test_rfid_compares_reconstructions_with_the_crops_themselves_and_is_left_out_aloud(weights, here, tmp_path, monkeypatch, capsys):
    seen = []
    def features(x):
        seen.append(x)
        return x.float().mean((2, 3))
    monkeypatch.setattr(eval, "load_inception", lambda device: features)
    here("recon", weights, "--data", "shapes", "--limit", 6, "--perceptual", "none", "--out", tmp_path)
    assert "rFID is not measured: 6 samples: below 2048" in capsys.readouterr().out and "rFID" not in metrics(tmp_path)
    here("recon", weights, "--data", "shapes", "--limit", 6, "--perceptual", "none", "--few", "--precision", "bf16", "--out", tmp_path)
    found = metrics(tmp_path)["rFID"]
    assert "ONLY 6 SAMPLES" in found["protocol"] and "encoder bf16, decoder fp32 (official)" in found["protocol"] and found["value"] > 0
    original = torch.stack([torch.from_numpy(np.array(eval.open_data("shapes", "val", 0, 32).load(10_000 * k // 6)[0])) for k in range(6)]).permute(0, 3, 1, 2)
    off = original.int() - seen[0].int()                                                        # cut off after a round trip through floats: the same, or one below
    assert seen[0].dtype == torch.uint8 and off.min() >= 0 and off.max() <= 1


def test_fid_is_the_same_from_a_folder_an_npz_and_saved_statistics(here, tmp_path, monkeypatch):
    monkeypatch.setattr(eval, "load_inception", lambda device: lambda x: torch.nn.functional.pad(x.float().flatten(1), (0, 2048 - 12)))
    monkeypatch.setattr(eval, "frechet_distance", lambda m1, c1, m2, c2: ((m1 - m2).square().sum() + (c1 - c2).abs().sum()).item())      # quicker, as telling here
    a, b = (np.random.default_rng(seed).integers(0, 256, (n, 2, 2, 3), dtype=np.uint8) for seed, n in ((0, 7), (1, 9)))
    np.savez(tmp_path / "a.npz", arr_0=a)
    (tmp_path / "b").mkdir()
    for k, image in enumerate(b):
        Image.fromarray(image).save(tmp_path / "b" / f"{k}.png")
    here("fid", tmp_path / "b", "--few", "--save-stats", tmp_path / "b.npz")
    values = []
    for reference, batch in ((tmp_path / "b", 2), (tmp_path / "b.npz", 5)):
        here("fid", tmp_path / "a.npz", "--few", "--reference", reference, "--batch", batch, "--out", tmp_path / "kept")
        values.append(metrics(tmp_path / "kept")["FID"])
    assert values[0]["value"] == pytest.approx(values[1]["value"], rel=1e-6) and values[0]["value"] > 1
    assert all("7 samples, ONLY 7 SAMPLES" in v["protocol"] and "9 pictures of" in v["protocol"] and "ONLY 9 SAMPLES" in v["protocol"] for v in values)
    save_statistics(tmp_path / "other.npz", torch.zeros(5), torch.eye(5), 4000, "five")
    for command, told in ((["a.npz", "--few", "--reference", "other.npz"], "5 numbers, but features of inception are 2048"), (["a.npz", "--few"], "against which real pictures"),
                          (["a.npz", "--few", "--reference", "b", "--features", "classifier"], "learns from the run's own pictures"), (["b.npz", "--reference", "b"], "below 2048")):
        with pytest.raises(SystemExit, match=told):
            here("fid", *(tmp_path / c if not c.startswith("--") and c != "classifier" else c for c in command))


def test_the_distance_on_squeezenets_features_says_that_it_is_no_fid_and_what_it_saw(run, here, tmp_path, monkeypatch):
    """Training pictures whose statistics are kept once stand for themselves afterwards"""
    monkeypatch.setattr(eval, "load_squeezenet", lambda device: lambda x: torch.nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1).repeat(1, 43)[:, :512])
    samples = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "samples.npz", arr_0=samples)
    command = ["fid", tmp_path / "samples.npz", "--features", "squeezenet", "--out", tmp_path / "kept"]
    with pytest.raises(SystemExit, match="below 2048"):
        here(*command, "--run", run)
    here(*command, "--run", run, "--few", "--limit", 20, "--train-limit", 30, "--save-real", tmp_path / "real.npz")
    first = metrics(tmp_path / "kept")
    assert first.keys() == {"FD-squeezenet (no FID)", "FD-squeezenet (no FID) of real"}
    first = first["FD-squeezenet (no FID)"]
    for part in ("12 samples, ONLY 12 SAMPLES", "30 training pictures of shapes", "ADM crop 16 px", "512-d average of fire9 of SqueezeNet v1.0", "squashed to 227 px"):
        assert part in first["protocol"]
    here(*command, "--few", "--reference", tmp_path / "real.npz")
    again = metrics(tmp_path / "kept")["FD-squeezenet (no FID)"]
    assert again["value"] == pytest.approx(first["value"], rel=1e-6) and "real.npz, saved statistics of 30 training pictures of shapes" in again["protocol"]
    with pytest.raises(SystemExit, match="--save-real keeps the statistics of the training pictures"):
        here(*command, "--few", "--reference", tmp_path / "real.npz", "--save-real", tmp_path / "x.npz")
    here("recon", run, "--perceptual", "none", "--few", "--limit", 12, "--features", "squeezenet", "--out", tmp_path / "kept")
    assert "fire9" in metrics(tmp_path / "kept")["rFD-squeezenet (no FID)"]["protocol"]


def test_at_half_size_a_checkerboard_is_its_grey_and_statistics_of_full_size_are_refused(run, here, tmp_path, monkeypatch):
    monkeypatch.setattr(eval, "load_squeezenet", lambda device: lambda x: torch.nn.functional.adaptive_avg_pool2d(x.float(), 8).flatten(1).repeat(1, 3)[:, :512])
    light = np.random.default_rng(0).integers(50, 200, (12, 8, 8, 3)).repeat(2, 1).repeat(2, 2)
    checks = 40 * (1 - 2 * (np.indices((16, 16)).sum(0) % 2))[:, :, None]
    for name, pictures in (("plain", light), ("checked", light + checks)):
        np.savez(tmp_path / f"{name}.npz", arr_0=pictures.astype(np.uint8))
    command = ["fid", tmp_path / "plain.npz", "--few", "--features", "squeezenet", "--halve", "--out", tmp_path / "kept", "--reference"]
    here(*command, tmp_path / "checked.npz")
    found = metrics(tmp_path / "kept")["FD-squeezenet, halved (no FID)"]
    assert found["value"] == pytest.approx(0, abs=1e-6) and "halved to 8 px" in found["protocol"]
    here("fid", tmp_path / "checked.npz", "--few", "--features", "squeezenet", "--save-stats", tmp_path / "full.npz")
    with pytest.raises(SystemExit, match="statistics of 512-d average.*wanted: 512-d average.*halved to 8 px"):
        here(*command, tmp_path / "full.npz")
    save_statistics(tmp_path / "unsaid.npz", torch.zeros(512), torch.eye(512), 4000, "pictures")
    with pytest.raises(SystemExit, match="do not say that the pictures were halved; save them anew"):
        here(*command, tmp_path / "unsaid.npz")
    np.savez(tmp_path / "odd.npz", arr_0=np.zeros((12, 15, 16, 3), np.uint8))
    with pytest.raises(SystemExit, match="16x15 have no half"):
        here("fid", tmp_path / "odd.npz", "--few", "--features", "squeezenet", "--halve", "--reference", tmp_path / "odd.npz")
    with pytest.raises(SystemExit, match="--halve goes with --features squeezenet or inception"):
        here("recon", run, "--perceptual", "none", "--few", "--limit", 12, "--features", "classifier", "--halve")
    here("recon", run, "--perceptual", "none", "--few", "--limit", 12, "--features", "squeezenet", "--halve", "--out", tmp_path / "kept")
    assert "rFD-squeezenet, halved (no FID)" in metrics(tmp_path / "kept")


# ---------------------------------------------------------------- check, cost
def test_check_paints_and_names_pictures_of_the_users(weights, here, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    for k, size in enumerate(((50, 33), (31, 90))):
        Image.new("RGB", size, (0, 90, 90 * k)).save(tmp_path / "mine" / f"{k}.jpg")
    here("check", weights, "--images", tmp_path / "mine", "--names", "dog", "cat", "tree", "--image", 40, "--out", tmp_path / "out")
    said = capsys.readouterr().out
    assert "2 pictures, ADM crop to 32 px, as 40 is no multiple of the patch" in said and "none to compare with" in said and "of 3 names" in said
    assert Image.open(tmp_path / "out" / "check.png").size == (64, 64) and "1.jpg" in metrics(tmp_path / "out")["PSNR"]["protocol"]
    (tmp_path / "mine" / "bad.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit, match="bad.png cannot be read"):
        here("check", weights, "--images", tmp_path / "mine" / "bad.png", "--out", tmp_path / "out")


def test_check_of_weights_that_the_official_code_wrote(golden, here, tmp_path, capsys):
    """vtp_p8: no CLIP, and an official decoder that paints 16 pixels a latent though its patch is 8. vtp_a: words, but a vocabulary of its own"""
    here("check", golden / "vtp_p8", "--out", tmp_path / "p8")
    said = capsys.readouterr().out
    assert "the decoder paints 64 px from 32 px" in said and "no CLIP: nothing can be named" in said and "8 pictures, ADM crop to 32 px: built-in shapes" in said
    assert Image.open(tmp_path / "p8" / "check.png").size == (8 * 64, 2 * 64) and np.isfinite(metrics(tmp_path / "p8")["PSNR"]["value"])
    if (golden / "vtp_a").exists():
        here("check", golden / "vtp_a", "--out", tmp_path / "a")
        assert "knows 1024 ids, CLIP's tokenizer has 49408" in capsys.readouterr().out and (tmp_path / "a" / "check.png").exists()


def test_check_without_a_decoder_leaves_painting_out(here, tmp_path, capsys):
    VTPModel(VTPConfig.of_size("nano", image=32, rec=False)).save_pretrained(tmp_path)
    here("check", tmp_path, "--names", "dog", "cat", "--out", tmp_path / "out")
    said = capsys.readouterr().out
    assert "no decoder: nothing can be painted" in said and "of 2 names" in said and not (tmp_path / "out" / "check.png").exists()


def test_cost_counts_a_size_or_a_run_and_keeps_what_it_counted_of_the_run(run, here, tmp_path, capsys):
    here("cost", "--size", "L")
    said = capsys.readouterr().out
    assert "607.14" in said and "311.12" in said and "324.05" in said and "607.2M parameters, 311.1 GFLOPs" in said and "2 FLOPs a multiply-add" in said
    here("cost", run, "--image", 24, "--out", tmp_path)
    assert metrics(tmp_path)["GFLOPs encoder"]["parameters"] == sum(p.numel() for p in VTPModel.from_pretrained(run).trunk.parameters())
    assert "DINO head" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no multiple of the patch, 8; try --image 24"):
        here("cost", run, "--image", 30)


# ---------------------------------------------------------------- several processes
def test_two_processes_find_what_one_finds(run, tmp_path):
    commands = (["probe", run, "--limit", 31, "--train-limit", 61, "--protocol", "official", "--epochs", 1, "--epoch-length", 3, "--train-batch", 15],
                ["recon", run, "--limit", 31, "--perceptual", "none", "--few", "--features", "classifier", "--train-limit", 41, "--judge-steps", 3])
    for n, start in ((1, []), (2, ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"])):
        for command in commands:
            ok(*start, "eval.py", *command, "--out", tmp_path / str(n))
    one, two = (list(map(json.loads, (tmp_path / str(n) / "metrics.jsonl").read_text().splitlines())) for n in (1, 2))
    assert [(m["name"], m["protocol"]) for m in one] == [(m["name"], m["protocol"]) for m in two] and len(one) == 7
    for a, b in zip(one, two):
        assert a["value"] == pytest.approx(b["value"], rel=1e-4), a["name"]
