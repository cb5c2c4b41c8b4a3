"""data.py: sources, views, masks and batches."""
import io
import json
import math
import multiprocessing
import os
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from PIL import Image

import data
from data import Steps, batches, eval_batches, open_data
from vtp_min import tars, views
from vtp_min.views import adm_crop, batch_masks, block_mask, denormalize, mask_indices_and_weights, normalize

GOLDEN = np.load(Path(__file__).parent / "golden" / "data.npz")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Indices of tars go to a folder of the test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("VTP_CACHE", str(folder))
    return folder


def words(captions):
    """A tokenizer of two lines: one id a letter, 0 pads."""
    rows = [torch.tensor([ord(c) for c in caption][:77]) for caption in captions]
    return torch.stack([torch.nn.functional.pad(row, (0, 77 - len(row))) for row in rows])


def noise(side=40, seed=0, width=None):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, width or side, 3), dtype=np.uint8))


def folder(root, classes=("n01443537", "red_fox"), n=6):
    for split in ("train", "val"):
        for k, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                noise(40, 100 * k + i).save(root / split / name / f"{i}.{'JPEG' if i % 2 else 'png'}")
    return root


def shard(path, members):
    """members  {file name: bytes}"""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def steps(source=None, **changes):
    defaults = dict(tokenizer=words, seed=3, batch=8, batch_ssl=4, batch_rec=2, clip=True, ssl=True, rec=True, image=32, local_image=16, n_local=3, patch=8)
    return Steps(source or open_data("shapes", side=32), **defaults | changes)


def same(a, b):
    assert a.keys() == b.keys()
    for k in a:
        assert torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k], k


# ---- sources

def test_training_and_validation_shapes_are_different_pictures_and_every_seed_is_validated_on_the_same():
    train, val, other = open_data("shapes", side=32), open_data("shapes", "val", side=32), open_data("shapes", "val", seed=7, side=32)
    assert train.endless and not val.endless and len(val) == 10_000
    assert train.load(0)[1] != val.load(0)[1] and val.load(5)[1] == other.load(5)[1]
    assert train.load(10 ** 9)[0].size == (37, 37) and val.load(0)[0].size == (32, 32)
    assert val.classes[val.load(0)[2]] in val.load(0)[1]


def test_shapes_take_settings_and_name_those_they_do_not_know():
    alone = open_data("shapes:objects=1,size=0.6-0.8", side=32)
    assert alone.settings == {"objects": (1, 1), "size": (0.6, 0.8)}
    for spec in ("shapes:colour=red", "shapes:objects=many", "shapes:objects=9", "shapes:size=0.6-0.2"):
        with pytest.raises(ValueError):
            open_data(spec)


def test_a_class_is_named_by_classnames_txt_else_by_imagenet_else_by_its_folder(tmp_path):
    root = folder(tmp_path, ("n01440764", "n01443537", "red_fox"))
    (root / "classnames.txt").write_text("n01440764\ta fish I named\n")
    source = open_data(root)
    assert source.classes == ["a fish I named", "goldfish", "red fox"] and len(source) == 18
    image, caption, label = source.load(17, np.random.default_rng(0))
    assert image.mode == "RGB" and "red fox" in caption and label == 2 and source.name(17).endswith("red_fox/5.JPEG")
    assert open_data(root / "val", "val", whole=True).classes == source.classes


def test_labels_agree_between_splits_even_if_a_class_is_missing_in_one(tmp_path):
    root = folder(tmp_path, ("ant", "bee"))
    for file in (root / "val" / "ant").iterdir():
        file.unlink()
    (root / "val" / "ant").rmdir()
    assert open_data(root, "val").load(0, np.random.default_rng(0))[2] == 1


def test_a_folder_without_the_asked_split_says_what_to_type(tmp_path):
    folder(tmp_path)
    with pytest.raises(ValueError, match="--val-data"):
        open_data(tmp_path / "train", "val")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no class folders with pictures"):
        open_data(tmp_path / "empty")
    with pytest.raises(ValueError, match="no folder"):
        open_data(tmp_path / "nowhere")


def test_shards_give_each_picture_its_own_caption_and_count_what_is_incomplete(tmp_path, capsys):
    pictures = [noise(20, i) for i in range(5)]
    shard(tmp_path / "x-00.tar", {f"{i}.{e}": c for i in range(3) for e, c in (("png", png(pictures[i])), ("txt", f"number {i}\n".encode()))})
    shard(tmp_path / "x-01.tar", {"a/3.json": json.dumps({"caption": "number 3"}).encode(), "a/3.png": png(pictures[3]),
                                  "4.png": png(pictures[4]), "5.txt": b"lonely"})
    source = open_data(str(tmp_path / "x-{00..01}.tar"))
    assert len(source) == 4 and source.classes is None and "2 of 6 samples are left out" in capsys.readouterr().out
    for i in range(4):
        image, caption, label = source.load(i)
        assert caption == f"number {i}" and label == -1 and np.array_equal(image, pictures[i])
    assert len(open_data(str(tmp_path / "x-*.tar"))) == 4 and source.name(3).endswith("x-01.tar:a/3.png")


def test_patterns_without_a_file_and_tars_that_are_none_are_refused(tmp_path):
    shard(tmp_path / "x-0.tar", {"1.png": png(noise()), "1.txt": b"one"})
    for spec, reason in ((tmp_path / "y-*.tar", "No such file"), (tmp_path / "x-{1..2}.tar", "x-1.tar"), (tmp_path / "z.tar", "z.tar")):
        with pytest.raises(ValueError, match=reason):
            open_data(str(spec))
    (tmp_path / "bad.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(ValueError, match="cannot be read"):
        open_data(str(tmp_path / "bad.tar"))
    with pytest.raises(ValueError, match="holds no pairs"):
        open_data(shard(tmp_path / "w.tar", {"1.png": png(noise())}))
    with pytest.raises(ValueError, match="--val-data"):
        open_data(str(tmp_path / "x-0.tar"), "val")
    assert len(open_data(str(tmp_path / "x-0.tar"), "val", whole=True)) == 1


def test_every_colour_mode_becomes_rgb_and_transparency_becomes_white(tmp_path):
    def read(image, name="x.png", **kw):
        image.save(tmp_path / name, **kw)
        return data.read_image(tmp_path / name).getpixel((0, 0))
    assert read(Image.new("L", (4, 4), 77)) == (77, 77, 77)
    assert read(Image.new("RGBA", (4, 4), (0, 0, 0, 0))) == (255, 255, 255)
    assert read(Image.new("RGBA", (4, 4), (255, 0, 0, 128))) == (255, 127, 127)
    assert read(Image.new("RGB", (4, 4), (9, 8, 7)).convert("P", palette=Image.ADAPTIVE)) == (9, 8, 7)
    assert read(Image.fromarray(np.full((4, 4), 128 * 257, np.uint16))) == (128, 128, 128)
    white = read(Image.new("CMYK", (4, 4), (0, 0, 0, 0)), "x.jpg")
    assert min(white) > 250


def test_a_picture_held_sideways_is_turned_upright(tmp_path):
    image, exif = noise(8, width=12), Image.Exif()
    exif[0x0112] = 6                                                      # stored turned by a quarter
    image.save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(data.read_image(tmp_path / "x.png"), image.transpose(Image.ROTATE_270))


def test_a_tar_is_walked_once_and_again_only_when_it_has_changed(tmp_path, cache, monkeypatch, capsys):
    tar = shard(tmp_path / "x.tar", {"1.png": png(noise()), "1.txt": b"one"})
    walked = []
    walk = tars.index_tar
    monkeypatch.setattr(tars, "index_tar", lambda path: walked.append(path) or walk(path))
    assert open_data(tar).load(0)[1] == open_data(tar).load(0)[1] == "one" and walked == [tar]
    assert capsys.readouterr().out.count("walked 1 of 1 tars") == 1 and [f.suffix for f in cache.iterdir()] == [".index"]
    shard(tmp_path / "x.tar", {"1.png": png(noise()), "1.txt": b"uno", "2.png": png(noise()), "2.txt": b"due"})
    assert [open_data(tar).load(i)[1] for i in range(2)] == ["uno", "due"] and len(walked) == 2
    assert sorted(f.name for f in tmp_path.iterdir()) == ["x.tar"]                            # nothing is written beside the data


def test_many_tars_are_walked_by_several_processes_and_each_rank_starts_elsewhere_but_all_find_the_same(tmp_path, monkeypatch):
    for n in range(9):
        shard(tmp_path / f"x-{n}.tar", {f"{i}.{e}": c for i in range(n + 1) for e, c in (("png", png(noise(8, i))), ("txt", f"{n} {i}".encode()))})
    monkeypatch.setattr(data, "world", lambda: 3)
    found = []
    for r in range(3):
        monkeypatch.setattr(data, "rank", lambda: r)
        source = open_data(str(tmp_path / "x-{0..8}.tar"))
        found.append([source.load(i)[1] for i in range(len(source))])
    assert found[0] == found[1] == found[2] == [f"{n} {i}" for n in range(9) for i in range(n + 1)]


# ---- views

def test_adm_crop_is_exact():
    for c in (0, 2):
        crop = adm_crop(Image.fromarray(GOLDEN[f"crop{c}.in"]), int(GOLDEN[f"crop{c}.size"]))
        assert np.array_equal(crop, GOLDEN[f"crop{c}.out"])


@pytest.mark.skipif("VTP_GOLDEN" not in os.environ, reason="set VTP_GOLDEN to the folder with units.npz to check every stored crop")
def test_adm_crop_is_exact_on_the_full_set():
    units = np.load(Path(os.environ["VTP_GOLDEN"]) / "units.npz")
    for c in range(4):
        assert np.array_equal(adm_crop(Image.fromarray(units[f"crop{c}.in"]), int(units[f"crop{c}.size"])), units[f"crop{c}.out"])


def test_random_crops_cover_the_promised_area_and_aspect_and_reach_every_corner(monkeypatch):
    y, x = np.mgrid[:300, :400]
    atlas = np.stack([x % 256, y % 256, x // 256 + 2 * (y // 256)], -1).astype(np.uint8)      # each pixel says where it is
    corners, rng = [], np.random.default_rng(0)
    monkeypatch.setattr(views, "interpolate", lambda crop, *_, **__: corners.append(crop[0, :, [0, -1], [0, -1]].int()) or crop)
    for _ in range(2000):
        views.random_crop(rng, atlas, 32, (0.05, 0.32))
    r, g, b = torch.stack(corners, 1).numpy()                                                 # (2000, 2) each: first pixel, last pixel
    (x0, x1), (y0, y1) = (r + 256 * (b % 2)).T, (g + 256 * (b // 2)).T
    share, aspect = (x1 + 1 - x0) * (y1 + 1 - y0) / (400 * 300), (x1 + 1 - x0) / (y1 + 1 - y0)
    assert share.min() > 0.048 and share.max() < 0.325 and abs(share.mean() - 0.185) < 0.01
    assert aspect.min() > 0.73 and aspect.max() < 1.37 and abs(np.log(aspect).mean()) < 0.01
    assert x0.min() < 5 and y0.min() < 5 and x1.max() > 394 and y1.max() > 294


@pytest.mark.parametrize("side", [24, 64, 150])
def test_a_crop_is_pillows_bicubic_to_the_rounding_of_its_two_passes(side, monkeypatch):
    image, resize = noise(70, width=90).point(lambda v: 80 + v * 3 // 8), torch.nn.functional.interpolate
    cut = []
    monkeypatch.setattr(views, "interpolate", lambda crop, *a, **k: cut.append(crop) or resize(crop, *a, **k))
    for i in range(20):
        ours = views.random_crop(np.random.default_rng(i), image, side, (0.05, 1))
        theirs = Image.fromarray(cut[i][0].permute(1, 2, 0).numpy()).resize((side, side), Image.BICUBIC)
        off = np.abs(ours - np.asarray(theirs).transpose(2, 0, 1).astype(int))
        assert off.max() <= 2 and off.mean() < 0.5


def colours(n=6, side=20):
    """Random pictures in float32, and among them the awkward: one of greys, one of few and full colours"""
    x = np.random.default_rng(1).integers(0, 256, (n, 3, side, side)).astype(np.float32)
    x[0], x[1] = x[0, :1], np.where(x[1] > 100, 255, 0)
    return x


def one_each(amounts):
    return np.array(amounts, np.float32)[:, None, None, None]


def torchvisions(change, x, *amount):
    """torchvision's functional, on the scale 0..255 all the same"""
    return change(torch.from_numpy(x) / 255, *amount).numpy() * 255


@pytest.mark.parametrize("ours, theirs, amounts", [
    (views.brightness, F.adjust_brightness, [0.6, 0.8, 1, 1.1, 1.3, 1.4]), (views.contrast, F.adjust_contrast, [0.6, 0.8, 1, 1.1, 1.3, 1.4]),
    (views.saturation, F.adjust_saturation, [0.8, 0.9, 1, 1.1, 1.2, 0]), (views.hue, F.adjust_hue, [-0.1, 0.1, 0.05, 0.5, -0.3, 0]),
    (views.grey, lambda x, _: F.rgb_to_grayscale(x, 3), [1] * 6), (views.gaussian_blur, lambda x, s: F.gaussian_blur(x, [9, 9], [s, s]), [0.1, 0.4, 0.7, 1, 1.5, 2]),
    (views.solarize, lambda x, t: F.solarize(x, t / 255), [128] * 6)])
def test_a_change_of_colour_is_torchvisions_whatever_the_amount(ours, theirs, amounts):
    x = colours()
    wanted = np.stack([torchvisions(theirs, view, amount) for view, amount in zip(x, amounts)])
    assert np.abs(ours(x, one_each(amounts)) - wanted).max() < 0.05                           # of 255; torchvision's weight for red is 0.2989


def test_a_view_is_torchvisions_recipe_with_one_rounding_at_the_end():
    theirs = {views.brightness: F.adjust_brightness, views.contrast: F.adjust_contrast, views.saturation: F.adjust_saturation, views.hue: F.adjust_hue,
              views.grey: lambda x, _: F.rgb_to_grayscale(x, 3), views.gaussian_blur: lambda x, s: F.gaussian_blur(x, [9, 9], [s, s]),
              views.solarize: lambda x, t: F.solarize(x, (t - 0.5) / 255)}
    for i in range(60):
        view, changes = views.ssl_crop(np.random.default_rng(i), noise(40, i), 24, (0.32, 1), 0.5, 0.2)
        ours = views.ssl_view(np.random.default_rng(i), noise(40, i), 24, (0.32, 1), 0.5, 0.2)
        x = torch.from_numpy(view.copy()) / 255
        for change, amount in filter(None, changes):
            x = theirs[change](x, amount)
        off = np.abs(ours - 255 * x.numpy())
        assert (off > 0.6).mean() < 0.002 and len(changes) == 7           # half a level; solarize may take a pixel at its threshold for the other side


def test_a_third_of_a_turn_passes_the_channels_on_and_greys_have_no_hue():
    x = colours()
    assert np.abs(views.hue(x, one_each([1 / 3] * 6)) - x[:, [2, 0, 1]]).max() < 1e-3
    assert np.abs(views.hue(x, one_each([0.1] * 6))[0] - x[0]).max() == 0


def test_a_view_comes_out_to_the_bit_as_it_would_alone_whatever_is_changed_with_it():
    for side, recipe in ((24, "local"), (90, "global 2")):                # 90: more than one portion of recolour's
        crops, changes = zip(*(views.ssl_crop(np.random.default_rng(i), noise(40, i), side, *views.VIEWS[recipe]) for i in range(23)))
        whole = views.recolour(np.stack(crops), changes)
        assert np.array_equal(whole, np.concatenate([views.recolour(np.stack(crops[k:k + 5]), changes[k:k + 5]) for k in range(0, 23, 5)]))
        for i in range(23):
            assert np.array_equal(whole[i], views.ssl_view(np.random.default_rng(i), noise(40, i), side, *views.VIEWS[recipe]))


def test_lots_fall_as_often_as_the_recipe_says_and_global_1_is_never_blurred():
    for name, (area, blur, solarise) in views.VIEWS.items():
        changes = [views.ssl_crop(np.random.default_rng(i), noise(16), 16, area, blur, solarise)[1] for i in range(400)]
        for place, share in ((0, 0.8), (3, 0.8), (4, 0.2), (5, blur), (6, solarise)):
            drawn = np.mean([c[place] is not None for c in changes])
            assert abs(drawn - share) <= 4 * math.sqrt(share * (1 - share) / 400), (name, place)
        for change, (low, high) in views.JITTER:
            found = [(place, c[place][1]) for c in changes for place in range(4) if c[place] and c[place][0] is change]
            assert all(low <= amount <= high for _, amount in found) and abs(np.mean([place for place, _ in found]) - 1.5) < 0.3


def test_normalize_and_denormalize_are_inverse():
    x = torch.randint(0, 256, (2, 5, 3, 4, 4), dtype=torch.uint8)
    assert torch.allclose(denormalize(normalize(x)) * 255, x.float(), atol=1e-4)
    grey = views.MEAN * 255
    assert normalize(grey.round().to(torch.uint8).expand(3, 2, 2)).abs().max() < 0.01


# ---- masks

def test_mask_bookkeeping_is_dinov2s():
    for case in ("masks", "fixed"):
        index, weight = mask_indices_and_weights(torch.from_numpy(GOLDEN[f"{case}.collated_masks"]))
        assert np.array_equal(index, GOLDEN[f"{case}.mask_indices_list"]) and np.array_equal(weight, GOLDEN[f"{case}.masks_weight"])


def test_every_masked_crop_weighs_one():
    mask = torch.from_numpy(batch_masks(0, 0, 16, 8, 8))
    assert math.isclose(mask_indices_and_weights(mask)[1].sum(), 8, rel_tol=1e-6)


@pytest.mark.parametrize("grid, target, mean, exact", [(14, 19, 18.896, 0.896), (14, 98, 97.922, 0.925), (16, 76, 75.937, 0.939)])
def test_block_masks_reach_their_target_as_often_as_dinov2s(grid, target, mean, exact):
    counts = np.array([block_mask(np.random.default_rng(i), grid, grid, target).sum() for i in range(600)])
    assert counts.max() == target and counts.min() >= target - 6
    assert abs(counts.mean() - mean) < 0.06 and abs((counts == target).mean() - exact) < 0.05      # four standard errors


def test_half_of_the_crops_are_masked_by_evenly_spread_ratios():
    ratios = batch_masks(0, 5, 64, 16, 16).mean(1)
    masked = np.sort(ratios[ratios > 0])
    assert len(masked) == 32 and np.abs(masked - np.linspace(0.1, 0.5, 65)[1::2]).max() < 0.03
    assert (ratios[:32] > 0).sum() not in (0, 32)                         # shuffled over both crops of an image


def test_a_rank_draws_its_own_rows_of_the_whole_batchs_masks():
    assert np.array_equal(batch_masks(1, 2, 12, 6, 6)[[3, 9]], batch_masks(1, 2, 12, 6, 6, rows=[3, 9]))


def test_small_grids_are_masked_too():
    assert block_mask(np.random.default_rng(0), 4, 4, 8).sum() > 0 and not block_mask(np.random.default_rng(0), 4, 4, 0).any()


# ---- batches

def test_a_batch_has_the_promised_shapes():
    out = steps()[0]
    assert out["image"].shape == (8, 3, 32, 32) and out["crops"].shape == (2, 4, 3, 32, 32) and out["locals"].shape == (3, 4, 3, 16, 16)
    assert out["mask"].shape == (2, 4, 16) and out["mask"].dtype == torch.bool and out["image"].dtype == torch.uint8
    assert out["rec"].tolist() == [0, 4] and out["rows_image"].tolist() == list(range(8)) and out["rows_ssl"].tolist() == [0, 2, 4, 6]
    assert out["text"].shape == (8, min(77, max(map(len, out["captions"])))) and out["bad"] == []


def test_two_ranks_see_exactly_one_processs_batch():
    whole, halves = steps()[4], [steps(rank=r, world=2)[4] for r in range(2)]
    for k, axis in dict(image=0, rows_image=0, crops=1, locals=1, mask=1, rows_ssl=0).items():
        assert torch.equal(whole[k], torch.cat([h[k] for h in halves], axis)), k
    assert whole["captions"] == halves[0]["captions"] + halves[1]["captions"]
    assert [h["rec"].tolist() for h in halves] == [[0], [0]]              # the batch's rows 0 and 4, counted from each rank's first


def test_workers_change_nothing_and_the_callers_random_state_is_untouched():
    before = torch.get_rng_state()
    alone, helped = list(batches(steps(), 2, 5)), list(batches(steps(), 2, 5, workers=2))
    assert len(alone) == len(helped) == 3 and torch.equal(before, torch.get_rng_state())
    for a, b in zip(alone, helped):
        same(a, b)
    assert not torch.equal(alone[0]["image"], alone[1]["image"])


def test_a_worker_that_hears_the_groups_signals_still_serves_the_step_that_is_under_way():
    stream = batches(steps(), 0, 12, workers=1)
    first, (worker,) = next(stream), multiprocessing.active_children()
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        os.kill(worker.pid, number)
    assert len(list(stream)) == 11 and first["bad"] == []


def test_turning_a_loss_off_changes_nothing_for_the_others_and_loads_only_what_is_used():
    full, rec, ssl = steps()[1], steps(clip=False, ssl=False)[1], steps(clip=False, rec=False)[1]
    assert torch.equal(rec["image"], full["image"][full["rec"]]) and rec["rec"].tolist() == [0, 1] and rec["rows_image"].tolist() == [0, 4]
    assert torch.equal(ssl["crops"], full["crops"]) and torch.equal(ssl["mask"], full["mask"])
    assert "text" not in rec and "crops" not in rec and "image" not in ssl and "rec" not in ssl


def test_an_epoch_shows_every_picture_once(tmp_path):
    source = open_data(folder(tmp_path))
    seen = []
    class Listener:
        endless, spec, load, name = False, "", lambda self, i, rng: seen.append(i) or source.load(i, rng), source.name
        def __len__(self): return len(source)
    data = steps(Listener(), ssl=False, batch=4)
    for step in range(6):
        data[step]
    assert sorted(seen[:12]) == sorted(seen[12:]) == list(range(12)) and seen[:12] != seen[12:] != list(range(12))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 64, 65, 1000, 4097])
def test_an_order_that_is_computed_is_a_permutation_and_another_in_each_epoch(n):
    first, second = ([data.scrambled(3, epoch, n, k) for k in range(n)] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(n)) and (n < 16 or first != second)


def test_each_seed_and_each_epoch_has_a_computed_order_of_its_own():
    first = {data.scrambled(seed, epoch, 10 ** 9, 7) for seed in range(20) for epoch in range(20)}
    assert len(first) >= 399                                              # 400 draws of a billion agree once in 12,000 times


def test_a_computed_order_is_as_random_as_a_listed_one():
    n, m = 3 * data.LISTED, 4000
    for scale in (1, n // m):                                             # neighbours, and places far apart
        x = np.array([data.shuffled(5, 2, n, scale * k) for k in range(m)])
        y = np.array([data.shuffled(5, 3, n, scale * k) for k in range(m)])
        limit = 4 / math.sqrt(m)                                          # four standard errors of a correlation of independent numbers
        for a, b in ((x, np.arange(m)), (x[1:], x[:-1]), (x % 2, np.arange(m) % 2), (x, y)):
            assert abs(np.corrcoef(a, b)[0, 1]) < limit
        counts = np.bincount(x * 20 // n, minlength=20)
        assert ((counts - m / 20) ** 2 / (m / 20)).sum() < 50             # chi-square of 19 degrees: 50 once in 7,000 draws
        assert len(set(x.tolist())) == m and len(set((x % 7).tolist())) == 7


def test_small_sources_are_listed_and_large_ones_computed():
    assert [data.shuffled(1, 0, 10, k) for k in range(10)] == data.permutation(1, 0, 10).tolist()
    assert data.shuffled(1, 0, 277_000_000, 5) == data.scrambled(1, 0, 277_000_000, 5) < 277_000_000


def test_a_damaged_picture_is_replaced_named_and_the_same_on_every_machine(tmp_path):
    root = folder(tmp_path)
    victim = root / "train" / "red_fox" / "3.JPEG"
    victim.write_bytes(victim.read_bytes()[:300])
    whole = [steps(open_data(root))[s] for s in range(3)]
    named = [name for out in whole for name in out["bad"]]
    assert named and all(name.startswith(str(victim)) for name in named) and all(len(out["image"]) == 8 for out in whole)
    parts = [steps(open_data(root), rank=r, world=2)[0]["image"] for r in range(2)]
    assert torch.equal(whole[0]["image"], torch.cat(parts))


def test_a_source_that_has_gone_stops_training_with_a_sentence(tmp_path):
    source = open_data(folder(tmp_path))
    source.root = tmp_path / "gone"
    with pytest.raises(ValueError, match="a hundred samples in a row"):
        steps(source)[0]


@pytest.mark.parametrize("changes, advice", [
    (dict(image=36), "--image 32"), (dict(local_image=12), "--local-image 16"), (dict(batch=1), "--batch 2"), (dict(batch=10), "--batch 8"),
    (dict(batch_ssl=3, batch=9, world=2), "--batch-ssl 4"), (dict(batch_rec=16), "--batch 16"), (dict(batch=6, batch_ssl=4, batch_rec=4, world=4), "--batch 8")])
def test_sizes_that_do_not_fit_are_refused_with_the_nearest_that_do(changes, advice):
    with pytest.raises(ValueError, match=f"try {advice}$"):
        steps(**changes)


def test_evaluation_sees_every_picture_once_in_order_and_a_limit_still_sees_every_class(tmp_path, capsys):
    source = open_data(folder(tmp_path, ("ant", "bee", "cow")), "val")
    labels = torch.cat([labels for _, labels, _ in eval_batches(source, 16, 4)])
    assert labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    (images, labels, captions), = eval_batches(source, 16, 4, limit=3, crop="squash")
    assert images.shape == (3, 3, 16, 16) and images.dtype == torch.uint8 and labels.tolist() == [0, 1, 2] and "cow" in captions[2]
    (tmp_path / "val" / "bee" / "2.png").write_bytes(b"not a picture")
    found = [list(eval_batches(source, 16, 4, workers=w)) for w in (0, 1)]
    assert sum(len(x) for x, _, _ in found[0]) == 17 and all(torch.equal(a[0], b[0]) for a, b in zip(*found))
    assert "1 of 18 pictures" in capsys.readouterr().out


def test_ranks_share_an_evaluation_in_order_and_each_counts_what_it_lost(tmp_path, monkeypatch, capsys):
    source = open_data(folder(tmp_path, ("ant", "bee", "cow")), "val")
    whole = torch.cat([x for x, _, _ in eval_batches(source, 16, 4)])
    (tmp_path / "val" / "cow" / "5.JPEG").write_bytes(b"")
    monkeypatch.setattr(data, "world", lambda: 4)
    parts = []
    for r in range(4):
        monkeypatch.setattr(data, "rank", lambda: r)
        parts += [x for x, _, _ in eval_batches(source, 16, 4)]
        assert len(data.my_share(18)) in (4, 5)
    assert torch.equal(torch.cat(parts), whole[:17]) and "1 of 5 pictures" in (out := capsys.readouterr().out) and "on rank 3" in out


def test_an_evaluation_of_which_more_than_half_is_lost_stops_with_a_sentence(tmp_path):
    source = open_data(folder(tmp_path), "val")
    for file in (tmp_path / "val" / "red_fox").iterdir():
        file.write_bytes(b"gone")
    assert sum(len(x) for x, _, _ in eval_batches(source, 16, 4)) == 6                        # half
    (tmp_path / "val" / "n01443537" / "0.png").write_bytes(b"gone")
    with pytest.raises(ValueError, match="more than half of the 12 pictures"):
        list(eval_batches(source, 16, 4))


def test_the_sheet_shows_a_row_a_sample(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["data.py", "--rows", "2", "--image", "32", "--local-image", "16", "--patch", "8", "--out", str(tmp_path / "sheet.png")])
    data.main()
    page = Image.open(tmp_path / "sheet.png")
    assert page.width > page.height and "ms a sample" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["data.py", "--data", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="no folder"):
        data.main()
