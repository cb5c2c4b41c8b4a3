"""The model card, README.md beside the weights: its metadata has the form that the Hub reads, it
says what is known about the training, and it never replaces a file of the user."""
import json

import pytest

from vtp_min import VTPConfig, VTPModel
from vtp_min.extras import model_card
from vtp_min.extras.baselines import LDM, LDMConfig
from vtp_min.run import record_metric

SETTINGS = {"out": "/home/me/runs/x", "data": "/home/me/photos", "size": "pico", "w_clip": 0.0,
            "init": "/home/me/VTP-Large-f16d64", "lr": 1e-4, "perceptual": "vgg", "workers": 4,
            "steps": 20}


def tiny(**fields):
    fields = dict(image_size=16, vision_patch_size=8, vision_embed_dim=16, vision_depth=1,
                  vision_num_heads=2, vision_feature_bottleneck=4, decoder_embed_dim=16,
                  decoder_num_heads=2, decoder_depth=1, decoder_upscale=8,
                  train_clip=False) | fields
    return VTPModel(VTPConfig(**fields))


@pytest.fixture
def run(tmp_path):
    """The files of a run that has been logged at step 10 of 20"""
    (tmp_path / "run.json").write_text(json.dumps(SETTINGS))
    lines = [{"step": 5, "loss": 2.0}, {"step": 10, "loss": 1.5, "rec": 0.25, "images_per_s": 7.0}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def front_matter(text):
    """The lines between the first two lines ---, parsed as the part of YAML that we write
    (comments, `name: value`, lists) -> dict"""
    first, *lines = text.split("\n")
    assert first == "---"
    found, name = {}, None
    for line in lines[:lines.index("---")]:
        if line.startswith("#"):
            continue
        if line.startswith("- "):
            found[name].append(line[2:])
            continue
        name, colon, value = line.partition(":")
        assert colon and name.replace("_", "").isalpha(), line
        assert ": " not in value and "#" not in value, line        # YAML would need quotes
        found[name] = value.strip() or []
    return found


def test_the_front_matter_has_the_fields_of_the_hub_and_leaves_the_licence_to_the_user(tmp_path):
    tiny().save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert front_matter(text) == {"library_name": "vtp_min",
                                  "pipeline_tag": "image-feature-extraction",
                                  "tags": ["vtp", "visual-tokenizer"]}
    assert text.split("\n")[1].startswith("# license: choose one")
    with_text = tiny(train_clip=True, text_embed_dim=8, text_num_heads=1, text_depth=1)
    with_text.save_pretrained(tmp_path)
    assert front_matter((tmp_path / "README.md").read_text())["tags"][-1] == "clip"


def test_the_card_says_what_was_trained_on_what_with_steps_losses_and_settings(run):
    tiny().save_pretrained(run)
    text = (run / "README.md").read_text()
    for part in ("https://arxiv.org/abs/2512.13687", "has width 16, 1 blocks and patches of 8 px",
                 "4 latent channels", "16 px, with a pixel decoder, without a text tower",
                 "- Data: photos\n", "- Start: the weights of VTP-Large-f16d64\n",
                 "- Steps: 10 of 20\n", "loss 1.5, rec 0.25\n", "w_clip 0.0", 'perceptual "vgg"',
                 'VTPModel.from_pretrained("FOLDER")'):
        assert part in text, part
    for word in ("/home/me", "workers", "images_per_s"):           # of this machine only
        assert word not in text, word


def test_a_run_without_metrics_says_so_and_new_numbers_appear_with_their_protocol(run, capsys):
    tiny().save_pretrained(run)
    assert "Nothing has been measured." in (run / "README.md").read_text()
    record_metric(run, "PSNR", 20.0, "10 images")
    record_metric(run, "PSNR", 21.5, "10 images")                  # measured again
    record_metric(run, "PSNR", 19.0, "all images | 16 px")
    text = (run / "README.md").read_text()
    assert "Nothing has been measured." not in text
    assert "| PSNR | 21.5 | 10 images |\n| PSNR | 19.0 | all images / 16 px |\n" in text
    assert "20.0" not in text
    assert front_matter(text)["library_name"] == "vtp_min"


def test_without_run_json_the_card_says_that_nothing_is_known(tmp_path):
    tiny(train_reconstruction=False, vision_feature_bottleneck=None).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "holds no `run.json`, so nothing is known about the training" in text
    assert "16 latent channels" in text and "without a pixel decoder" in text


@pytest.mark.parametrize("content", ["# My model\n", "", "---\nlicense: mit\n---\n"])
def test_a_readme_of_the_user_is_never_replaced(run, content):
    (run / "README.md").write_text(content)
    tiny().save_pretrained(run)
    record_metric(run, "PSNR", 20.0, "10 images")
    assert (run / "README.md").read_text() == content


def test_a_card_without_our_mark_belongs_to_the_user(run):
    tiny().save_pretrained(run)
    edited = (run / "README.md").read_text().replace(model_card.MARK, "My words.")
    (run / "README.md").write_text(edited)
    tiny().save_pretrained(run)
    assert (run / "README.md").read_text() == edited


def test_metrics_of_a_folder_without_weights_make_no_card(tmp_path):
    record_metric(tmp_path, "FID", 2.0, "samples")
    assert not (tmp_path / "README.md").exists()


def test_a_card_that_cannot_be_written_loses_no_weights_and_no_number(run, capsys):
    tiny().save_pretrained(run)
    (run / "run.json").write_text("{half")
    record_metric(run, "PSNR", 20.0, "10 images")
    tiny().save_pretrained(run)
    assert capsys.readouterr().out.count("(no model card: ") == 2
    assert "PSNR" in (run / "metrics.jsonl").read_text()
    VTPModel.from_pretrained(run)


def test_the_auto_encoder_of_a_baseline_has_a_card_with_its_own_way_to_load_it(tmp_path):
    config = LDMConfig(image_size=16, latent_dim=4, widths=[32, 32, 64], depth=1)
    LDM(config).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "load_model(\"FOLDER\")" in text and "VTPModel" not in text
    assert "pipeline_tag" not in front_matter(text)
