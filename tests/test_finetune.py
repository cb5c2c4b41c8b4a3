"""--init of stage 1: a training that starts from the weights of a run, or from released weights.
What is loaded has the same outputs to the bit, new parts are initialised as in a training from
scratch, and every decision is printed."""
import json
import math
import shutil
import socket
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image
from test_train import TINY, equal, interrupted_copy, log, run_here, settings, start_process

import eval
import train
from vtp_min import VTPConfig, VTPModel
from vtp_min.extras import finetune, run_folder
from vtp_min.model import DINOHead

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "study"))
import finetune as study                                                   # noqa: E402

# TINY without --image and --patch, which follow from the weights
SHORT = TINY[4:]
# as the released code writes them: patch 16, RoPE in bfloat16, none of our fields; a small trunk
OFFICIAL = dict(image_size=32, vision_embed_dim=48, vision_depth=2, vision_num_heads=2,
                vision_feature_bottleneck=8, text_embed_dim=32, text_num_heads=2, text_depth=1,
                decoder_embed_dim=32, decoder_num_heads=2, decoder_depth=1)


def save_official(folder, **fields):
    """Weights in the official layout, random but none of them zero -> folder"""
    torch.manual_seed(1)
    model = VTPModel(VTPConfig(**OFFICIAL | fields))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for name in ("decoder_upscale", "rope_dtype"):
        if name not in fields:
            del config[name]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    return save_official(tmp_path_factory.mktemp("weights") / "official")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a short run of train.py with 16 px"""
    folder = tmp_path_factory.mktemp("run")
    run_here(folder, "--size", "pico", "--steps", 2)
    yield folder
    shutil.rmtree(folder)


def start(init, *flags, out="none"):
    """-> the flags, the model and the DINO head with which a training with --init starts"""
    args = train.arguments([*SHORT, "--out", str(out), "--init", str(init), *map(str, flags)])
    args.warmup = max(args.steps // 10, 1)                     # as train.main does
    torch.manual_seed(args.seed)
    model, head = train.build_model(args)
    return args, model.eval(), head


def outputs(model, side):
    """All outputs that the parts of the model have"""
    torch.manual_seed(0)
    image = torch.randn(2, 3, side, side)
    text = torch.randint(1, 200, (2, 9))
    found = model.get_last_layer_feature(image)
    found["latents"] = model.get_reconstruction_latents(image)
    if model.config.train_reconstruction:
        found["pixels"] = model.get_latents_decoded_images(found["latents"])
    if model.config.train_clip:
        found["image"] = model.get_clip_image_feature(image)
        found["text"] = model.get_clip_text_feature(text)
        found["logits"], _ = model.get_clip_logits(image, text)
    return found


# ---------------------------------------------------------------- what is loaded
@pytest.mark.parametrize("kind", ["official", "run"])
def test_before_its_first_step_a_training_has_the_outputs_of_its_weights_to_the_bit(kind, request):
    folder = request.getfixturevalue(kind)
    source = VTPModel.from_pretrained(folder)
    args, model, _ = start(folder)
    side = source.config.image_size
    assert (args.image, args.patch) == (side, source.config.vision_patch_size)
    assert model.config == source.config
    found, wanted = outputs(model, side), outputs(source, side)
    assert found.keys() == wanted.keys() >= {"latents", "pixels", "text"}
    for name, x in wanted.items():
        assert torch.equal(found[name], x), name


@pytest.mark.parametrize("image", [None, 48])
@pytest.mark.parametrize("name", ["vtp_a", "vtp_b", "vtp_p8"])
def test_so_it_is_with_weights_that_the_official_code_wrote(golden, name, image):
    """The text towers of these sets have tiny vocabularies, and the decoder of vtp_p8 enlarges
    images, so these parts are left out; all others are compared."""
    if not (golden / name).exists():
        pytest.skip(f"{golden} has no {name}")
    source = VTPModel.from_pretrained(golden / name)
    flags = ["--w-clip", 0]
    if name == "vtp_p8":
        flags += ["--w-rec", 0]
    if image:
        flags += ["--image", image]
    args, model, _ = start(golden / name, *flags)
    assert args.image == (image or source.config.image_size)
    assert model.config.rope_dtype == "bfloat16"
    found, wanted = outputs(model, args.image), outputs(source, args.image)
    assert found.keys() >= {"cls_token", "patch_tokens", "latents"}
    assert ("pixels" in found) == (name != "vtp_p8")
    for key in found:
        assert torch.equal(found[key], wanted[key]), key


def test_the_golden_text_towers_are_loaded_to_the_bit_too(golden, monkeypatch):
    """Without the check of the vocabulary, which is that of our tokenizer"""
    if not (golden / "vtp_b").exists():
        pytest.skip(f"{golden} has no vtp_b")
    monkeypatch.setattr(finetune, "check_text", lambda args, config: None)
    for name in ("vtp_a", "vtp_b"):
        source = VTPModel.from_pretrained(golden / name)
        _, model, _ = start(golden / name)
        assert equal(outputs(model, 32), outputs(source, 32))


def test_without_init_nothing_is_different(capsys):
    args = train.arguments(TINY)
    assert args.init is None and args.size == "nano" and args.lr == 5e-4
    train.build_model(args)
    assert capsys.readouterr().out == ""


def test_a_run_with_learning_rate_0_saves_the_weights_that_it_began_with(run, tmp_path):
    """So nothing between the loading and the first step changes them."""
    run_here(tmp_path / "out", "--init", run, "--steps", 1, "--lr", 0)
    saved, wanted = (safetensors.torch.load_file(folder / "model.safetensors")
                     for folder in (tmp_path / "out", run))
    assert equal(saved, wanted)


# ---------------------------------------------------------------- what is new or left out
def fresh_model(args, config):
    """The model and the head of a training from scratch with this config and seed"""
    torch.manual_seed(args.seed)
    model = VTPModel(config)
    return model, DINOHead(model.feature_dim, args.prototypes, args.head_hidden,
                           args.head_bottleneck)


def compare_parts(model, source, fresh, new):
    """Tensors whose names begin with `new` equal those of a fresh model, the others the weights"""
    source, fresh = source.state_dict(), fresh.state_dict()
    for name, x in model.state_dict().items():
        wanted = fresh if name.startswith(new) else source
        assert torch.equal(x, wanted[name]), name


def test_another_latent_dim_makes_bottleneck_and_input_of_the_decoder_new(official, capsys):
    args, model, head = start(official, "--latent-dim", 4)
    printed = capsys.readouterr().out
    assert model.config.vision_feature_bottleneck == 4
    fresh, fresh_head = fresh_model(args, model.config)
    new = ("trunk.feature_bottleneck", "pixel_decoder.proj_in")
    compare_parts(model, VTPModel.from_pretrained(official), fresh, new)
    assert equal(head.state_dict(), fresh_head.state_dict())
    assert ("Initialised at random, because --latent-dim is 4 and the weights have 8 latent "
            "channels: bottleneck (192 parameters), input projection of the decoder (160 "
            "parameters).") in printed


def test_without_w_clip_the_text_tower_is_left_out_and_named(official, capsys):
    _, model, _ = start(official, "--w-clip", 0)
    printed = capsys.readouterr().out
    assert not hasattr(model, "text_transformer") and not model.config.train_clip
    assert "Not trained and not saved, because --w-clip is 0: image projection of CLIP (1,536 " \
           "parameters), text tower (" in printed
    assert "Initialised" not in printed
    _, model, _ = start(official, "--w-clip", 0, "--w-rec", 0)
    assert "because --w-clip is 0 and --w-rec is 0: " in capsys.readouterr().out
    assert not hasattr(model, "pixel_decoder")


@pytest.mark.parametrize("absent, new, reason", [
    ("train_clip", ("visual_proj", "token_embedding", "positional", "text_", "ln_final", "logit_"),
     "--w-clip is 1 and the weights have no text tower: image projection of CLIP (1,536 "),
    ("train_reconstruction", ("pixel_decoder",),
     "--w-rec is 0.1 and the weights have no decoder: input projection of the decoder (288 ")])
def test_a_part_that_the_weights_lack_is_new_and_named(tmp_path, absent, new, reason, capsys):
    save_official(tmp_path, **{absent: False})
    args, model, _ = start(tmp_path)
    assert getattr(model.config, absent)
    fresh, _ = fresh_model(args, model.config)
    compare_parts(model, VTPModel.from_pretrained(tmp_path), fresh, new)
    assert f"Initialised at random, because {reason}" in capsys.readouterr().out


def test_the_dino_head_is_new_and_the_teacher_is_a_copy_of_the_student(run, tmp_path, capsys):
    """--lr 0 keeps the first weights, and ema=1 those of the teacher."""
    out = tmp_path / "out"
    run_here(out, "--init", run, "--steps", 1, "--lr", 0, *settings(ema=1))
    printed = capsys.readouterr().out
    assert ("The DINO head (8,352 parameters) is initialised at random: released weights have "
            "none, and the prototypes of a run belong to its own images. The teacher starts as a "
            "copy of the student.") in printed
    state = torch.load(out / "last.pt")
    old = torch.load(run / "last.pt")
    for name, x in state["teacher"].items():
        own = name.replace("proj.", "visual_proj.") if name.startswith("proj.") else name
        prefix = "" if name.startswith("dino_head") else "model."
        assert torch.equal(x, state["student"][prefix + own]), name
    head = "dino_head.last_layer.weight_v"
    assert not torch.equal(state["student"][head], old["student"][head])


def test_a_siglip_run_goes_on_with_siglip_and_with_its_heads(tmp_path):
    save_official(tmp_path, init_logit_scale=math.log(10), init_logit_bias=-10.0,
                  vision_bottleneck_ae_only=False)
    args, model, head = start(tmp_path, "--latent-dim", 4)
    assert args.clip_loss == "siglip" and args.heads_after_bottleneck
    same = settings(clip_loss="siglip", heads_after_bottleneck=1)
    assert vars(start(tmp_path, "--latent-dim", 4, *same)[0]) == vars(args)
    assert model.feature_dim == 4 and head.mlp[0].in_features == 4
    source = VTPModel.from_pretrained(tmp_path)
    assert torch.equal(model.logit_bias, source.logit_bias)
    fresh, _ = fresh_model(args, model.config)
    # the projection of CLIP reads the bottleneck here, so it is new as well
    new = ("trunk.feature_bottleneck", "pixel_decoder.proj_in", "visual_proj")
    compare_parts(model, source, fresh, new)


# ---------------------------------------------------------------- defaults and sentences
def test_learning_rate_and_warm_up_for_fine_tuning_are_defaults_and_are_printed(
        run, tmp_path, capsys):
    args, _, _ = start(run, "--steps", 50)
    assert (args.size, args.lr, args.layer_decay) == ("pico", 1e-4, 1.0)
    assert ("The learning rate is 0.0001 (the default with --init: ours, a fifth of the rate from "
            "scratch). The warm-up ends with step 5 (a tenth of --steps, as in MAE's "
            "fine-tuning).") in capsys.readouterr().out
    save_official(tmp_path)
    args, _, _ = start(tmp_path)
    assert (args.size, args.lr, args.teacher_temp) == ("48x2", 1e-5, 0.07)
    assert "1e-05 (the default with --init: OpenCLIP and FLYP" in capsys.readouterr().out
    args, _, _ = start(tmp_path, "--lr", 3e-4)
    assert args.lr == 3e-4
    assert "is 0.0003 (the default with --init is 1e-05)." in capsys.readouterr().out


def test_the_size_of_the_paper_is_recognised_by_its_trunk():
    for size in ("S", "B", "L", "micro"):
        assert finetune.name_of(VTPConfig.of_size(size)) == size


def test_loaded_parts_and_another_image_size_are_named(run, capsys):
    start(run, "--image", 24)
    printed = capsys.readouterr().out
    assert f"The weights of {run} (trunk pico, patch 8) are loaded: bottleneck (6,144 " in printed
    for part in ("trunk (", "pixel decoder (", "image projection of CLIP (", "text tower ("):
        assert part in printed
    assert "Images have 24 px, and the weights are for 16 px." in printed


@pytest.mark.parametrize("flags, sentence", [
    (["--patch", 8], "--patch 8: the patches of WEIGHTS have 16 pixels, which its weights fix; "
                     "leave --patch out"),
    (["--size", "S"], "--size S: the trunk of WEIGHTS is 48x2 (width 48, 2 blocks, 2 heads) and "
                      "keeps its size; leave --size out, or leave --init out to train S from "
                      "scratch"),
    (settings(decoder="pico"), "--set decoder=pico: with --init this follows from the weights"),
    (settings(clip_loss="siglip"), "--set clip_loss=siglip: with --init this follows from"),
    (settings(heads_after_bottleneck=1), "leave --set heads_after_bottleneck out"),
    (["--image", 40], "--image 40 is not a multiple of --patch 16; try --image 32"),
    (["--out", "WEIGHTS"], "is the folder in --init, whose weights would be overwritten; give"),
    (["--init", "nowhere"], "nowhere holds no config.json; wanted a folder with config.json and"),
])
def test_a_flag_that_contradicts_the_weights_is_refused_with_a_sentence(
        official, flags, sentence, tmp_path, capsys):
    flags = [str(official) if flag == "WEIGHTS" else str(flag) for flag in flags]
    with pytest.raises((SystemExit, FileNotFoundError)) as stopped:
        train.arguments(["--out", str(tmp_path), "--init", str(official), *flags])
    message = f"{stopped.value} {capsys.readouterr().err}"
    assert sentence.replace("WEIGHTS", str(official)) in " ".join(message.split())


@pytest.mark.parametrize("fields, sentence", [
    (dict(text_context_length=16, text_vocab_size=1024),
     "reads 16 tokens of a vocabulary of 1024, but our tokenizer makes up to 77 of 49408; type "
     "--w-clip 0 to leave it out"),
    (dict(nonscalar_logit_scale=True), "which the training does not support; type --w-clip 0"),
    (dict(vision_patch_size=8),
     "makes 16 pixels per latent and side, but its patches have 8, so it cannot reconstruct its "
     "input; type --w-rec 0 to leave it out"),
], ids=["tokenizer", "logit scale", "decoder"])
def test_weights_that_cannot_be_trained_as_they_are_are_refused(tmp_path, fields, sentence, capsys):
    save_official(tmp_path / "x", **fields)
    with pytest.raises(SystemExit):
        train.arguments(["--init", str(tmp_path / "x"), "--out", str(tmp_path / "y")])
    assert sentence in " ".join(capsys.readouterr().err.split())
    train.arguments(["--init", str(tmp_path / "x"), "--w-clip", "0", "--w-rec", "0"])


@pytest.mark.parametrize("change", ["missing", "unknown", "cut", "other model", "damaged config"])
def test_damaged_weights_are_refused_with_a_sentence(official, tmp_path, change, capsys):
    folder = shutil.copytree(official, tmp_path / "copy")
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    sentence = "does not match the config.json beside it"
    if change == "missing":
        del tensors["trunk.cls_token"]
    elif change == "unknown":
        tensors["trunk.extra"] = torch.zeros(1)
    safetensors.torch.save_file(tensors, path)
    if change == "cut":
        path.write_bytes(path.read_bytes()[:1000])
        sentence = "cannot be read"
    elif change == "other model":
        (folder / "config.json").write_text('{"model_type": "clip"}')
        sentence = "model_type 'clip'; wanted the config.json of a VTP model"
    elif change == "damaged config":
        (folder / "config.json").write_text('{"vision_depth": 0}')
        sentence = "config field vision_depth is 0"
    with pytest.raises((ValueError, SystemExit)) as stopped:
        start(folder)
    # errors in config.json are found with the flags: argparse prints them
    message = f"{stopped.value} {capsys.readouterr().err}"
    assert sentence in " ".join(message.split())


# ---------------------------------------------------------------- whole runs
@pytest.fixture(scope="module")
def continued(run, tmp_path_factory):
    """-> folder of a run that continues `run` at another image size, and its flags. The folder in
    --init no longer exists."""
    folder = tmp_path_factory.mktemp("continued")
    init = shutil.copytree(run, folder / "init")
    flags = ["--init", init, "--steps", 4, "--save-every", 2, "--image", 24]
    run_here(folder / "out", *flags)
    shutil.rmtree(init)
    yield folder / "out", flags
    shutil.rmtree(folder)


def test_a_resumed_run_loads_no_weights_and_equals_an_uninterrupted_one(
        continued, tmp_path, capsys):
    whole, flags = continued
    killed = interrupted_copy(whole, tmp_path / "killed")
    shutil.copy(whole / "config.json", killed)
    assert run_here(killed, *flags) == log(whole)
    printed = capsys.readouterr().out
    assert "training continues from it" in printed and "are loaded" not in printed
    one, two = (torch.load(folder / "last.pt") for folder in (whole, killed))
    for part in ("student", "teacher", "optimizer"):
        assert equal(one[part], two[part]), part
    assert VTPModel.from_pretrained(killed).config.image_size == 24


def test_other_weights_in_the_same_out_are_other_settings(continued, official):
    out, _ = continued
    with pytest.raises(SystemExit, match=r"settings \(init: was '.*init', now '.*official' \(w"):
        run_here(out, "--init", official, "--image", 24, "--steps", 4)
    with pytest.raises(SystemExit, match="with other settings .*init: was '.*', now None"):
        run_here(out, "--size", "pico", "--image", 24, "--steps", 4)


def test_fresh_replaces_a_run_from_scratch_by_a_continued_one_but_not_by_one_of_stage_2(continued):
    out, _ = continued
    settings = json.loads((out / "run.json").read_text())
    run_folder.check_owner(out, settings | {"init": None}, fresh=True)
    with pytest.raises(ValueError, match="run of another command"):
        run_folder.check_owner(out, settings | {"stage": 2}, fresh=True)


def test_official_weights_with_a_new_bottleneck_are_trained_and_saved(official, tmp_path):
    flags = ["--init", official, "--image", 32, "--patch", 16, "--latent-dim", 4]
    lines = run_here(tmp_path / "out", *flags, "--steps", 2)
    assert all(math.isfinite(line["loss"]) for line in lines)
    config = VTPModel.from_pretrained(tmp_path / "out").config
    assert config.rope_dtype == "bfloat16" and config.vision_feature_bottleneck == 4
    assert "weights of official" in (tmp_path / "out" / "README.md").read_text()


def test_micro_batches_and_recompute_have_the_losses_of_the_whole_batch(run, tmp_path):
    flags = ["--init", run, "--steps", 2, "--lr", 1e-3]
    whole = run_here(tmp_path / "whole", *flags)
    micro = run_here(tmp_path / "micro", *flags, "--micro", 4, "--recompute")
    for one, two in zip(whole, micro, strict=True):
        for name in ("clip", "dino", "ibot", "koleo", "rec"):
            assert math.isclose(one[name], two[name], rel_tol=1e-3), name


def test_two_processes_continue_a_run_as_one_does(run, tmp_path):
    flags = ["--init", run, "--steps", 2]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    process = start_process(launcher, tmp_path / "two", *flags)
    one = run_here(tmp_path / "one", *flags)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    assert printed.count("are loaded") == 1
    for a, b in zip(one, log(tmp_path / "two"), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if a[name] != b[name]:
                assert math.isclose(a[name], b[name], rel_tol=1e-4, abs_tol=1e-4), name


@pytest.mark.parametrize("captions", ["class names", "none"])
def test_a_run_continues_on_own_images_with_or_without_captions(
        run, tmp_path, captions, own_images):
    flags = [] if captions == "class names" else ["--w-clip", 0]
    lines = run_here(tmp_path / "out", "--init", run, "--data", own_images, "--steps", 2, *flags)
    assert ("clip" in lines[0]) == (captions == "class names")
    assert all(math.isfinite(line["loss"]) for line in lines)


@pytest.fixture
def own_images(tmp_path):
    """Class folders with eight images of two classes"""
    for i in range(8):
        path = tmp_path / "data" / "train" / f"class {i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (30 * i, 100, 200 - 20 * i)).save(path)
    return Path(tmp_path / "data")


# ---------------------------------------------------------------- study/finetune.py
def test_the_commands_of_the_study_are_accepted_by_their_scripts(run, monkeypatch):
    args = Namespace(precision="fp32", limit=10, probe=20, first_steps=4, steps=2)
    cells = study.all_cells()
    assert len(cells) == len({cell.name for cell in cells}) == 27
    for cell in cells[:11]:
        for command in study.stages(cell, args).values():
            script, *words = command.replace("--init FIRST", f"--init {run}").split()
            if script == "train.py":
                found = train.arguments(words)
                assert found.steps == (4 if cell.kind == "first" else 2)
                assert found.lr == (1e-4 if cell.kind == "init" else 5e-4)
            else:
                monkeypatch.setattr(sys, "argv", [script, *words])
                eval.arguments()


def test_the_study_refuses_to_mix_constants_and_lists_its_cells(tmp_path, capsys):
    for name in ("all", "ten", "cifar"):
        for split in ("train", "val"):
            (tmp_path / name / split).mkdir(parents=True)
    flags = ["--list", "--out", str(tmp_path / "out")]
    for name in ("all", "ten", "cifar"):
        flags += [f"--{name}", str(tmp_path / name)]
    assert study.main(study.parser().parse_args(flags)) == 0
    assert "27 of 27 cells left" in capsys.readouterr().out
    (tmp_path / "out").mkdir()
    line = {"cell": "init-ten-seed0", "constants": {"steps": 1}}
    (tmp_path / "out" / "results.jsonl").write_text(json.dumps(line))
    with pytest.raises(ValueError, match="cells with other constants .init-ten-seed0."):
        study.main(study.parser().parse_args(flags))


ROWS = study.read_lines(Path(study.ROOT, "study/finetune/results.jsonl"))
NAMES = {"ten": "ImageNet", "cifar": "CIFAR-10", "unchanged": "unchanged", "scratch": "scratch",
         "init": "continued"}


def value(kind, target, seed, name, where="metrics"):
    row, = [r for r in ROWS if (r["kind"], r["target"], r["seed"]) == (kind, target, seed)]
    return row[where][name]


@pytest.mark.parametrize("target", study.TARGETS)
@pytest.mark.parametrize("seed", study.SEEDS)
@pytest.mark.parametrize("name", ["PSNR", "linear probe latent", "linear probe full"])
def test_200_continued_steps_are_better_than_200_steps_from_scratch(target, seed, name):
    assert value("init", target, seed, name) > value("scratch", target, seed, name)


def test_the_table_of_weights_md_is_computed_from_the_results():
    page = (Path(study.ROOT) / "docs/weights.md").read_text().splitlines()
    before = study.mean_and_range([100 * value("first", "ninety", seed, "zero-shot top1")
                                   for seed in study.SEEDS])
    lines = [line for line in study.table(ROWS)[2:] if line.split("|")[2].strip() in NAMES]
    assert len(lines) == 6
    for line in lines:
        _, target, kind, *cells, _ = [cell.strip() for cell in line.split("|")]
        if kind == "unchanged":
            cells[4] = before
        wanted = ["", NAMES[target], NAMES[kind], *cells, ""]
        assert wanted in [[cell.strip() for cell in text.split("|")] for text in page]


def test_the_points_lost_on_the_first_classes_are_those_of_the_text():
    page = (Path(study.ROOT) / "docs/weights.md").read_text()
    lost = {}
    for target in study.TARGETS:
        lost[target] = sum(
            100 * value("first", "ninety", seed, "zero-shot top1")
            - 100 * value("init", target, seed, "zero-shot top1", "first_data")
            for seed in study.SEEDS) / 3
    assert f"{lost['ten']:.1f} (ImageNet) and {lost['cifar']:.1f} points (CIFAR-10)" in page
