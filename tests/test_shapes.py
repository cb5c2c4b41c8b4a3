"""The built-in images: drawing, captions, and the frequency of each property."""
import math
import re

import numpy as np
import pytest

from vtp_min.shapes import (BACKGROUND_TEXTURES, CAPTIONS, CLASSES, COLORS, CONVERSE, KINDS, LARGE,
                            OUTLINES, P_MENTION, SMALL, TEXTURES, Background, Shape, coverage,
                            draw, draw_background, draw_shape, relation, scene)

SCENES = [scene(i) for i in range(3000)]
SINGLES = [scene(i, objects=(1, 1)) for i in range(2000)]


def independent(table):
    """Whether a table of counts (rows, columns) agrees with independent rows and columns: its
    chi-square is within five standard deviations of the mean"""
    table = np.asarray(table, float)
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
    freedom = (table.shape[0] - 1) * (table.shape[1] - 1)
    chi_square = ((table - expected) ** 2 / expected).sum()
    return abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom)


def count(pairs, rows, columns):
    table = np.zeros((len(rows), len(columns)))
    for a, b in pairs:
        table[rows.index(a), columns.index(b)] += 1
    return table


def centers(side):
    return (np.arange(side, dtype=np.float32) + 0.5) / side


def test_an_image_depends_only_on_its_arguments():
    image, words, label = draw(7, 48, seed=3)
    draw(8, 48, seed=3)
    again = draw(7, 48, seed=3)
    assert np.array_equal(image, again[0]) and (words, label) == again[1:]
    assert image.shape == (48, 48, 3) and image.dtype == np.uint8 and image.flags.c_contiguous


def test_another_index_or_another_seed_is_another_image():
    seen = set()
    for index in [*range(20), 2 ** 32, 2 ** 62]:
        for seed in (0, 1, 2 ** 32 - 1):
            seen.add(draw(index, 16, seed=seed)[0].tobytes())
    assert len(seen) == 22 * 3


def test_the_same_scene_is_drawn_at_every_resolution():
    for i in range(40):
        fine, words, label = draw(i, 256)
        coarse, *same = draw(i, 64)
        assert same == [words, label]
        boxes = fine.reshape(64, 4, 64, 4, 3).mean((1, 3))
        assert abs(boxes - coarse).mean() < 1, i                              # of 255 gray levels
        other = draw(i + 1, 64)[0]
        assert abs(boxes - other).mean() > 10, i


def test_odd_and_tiny_sides_are_drawn_too():
    for side in (8, 33, 224):
        assert draw(0, side)[0].shape == (side, side, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_an_outline_is_inside_the_unit_disc_and_has_gradient_norm_one_at_its_edge(kind):
    grid = np.linspace(-1.5, 1.5, 1201)
    step = grid[1] - grid[0]
    x, y = np.meshgrid(grid, -grid)
    d = OUTLINES[kind](x, y)
    assert (np.hypot(x, y)[d < 0] <= 1.001).all()
    area = (d < 0).sum() * step ** 2
    assert 0.15 < area / math.pi < 0.9
    slope = np.hypot(*np.gradient(d, step))[abs(d) < 0.02]
    assert np.median(slope) == pytest.approx(1, abs=0.01)
    assert (abs(slope - 1) < 0.1).mean() > 0.9


def test_edges_are_anti_aliased_so_the_drawn_area_is_the_exact_area():
    for side in (16, 32, 64):
        xy = centers(side)
        d = np.hypot(xy[None] - 0.51, xy[:, None] - 0.47) - 0.3
        share = coverage(d * side)
        assert share.mean() == pytest.approx(math.pi * 0.09, rel=0.01)
        assert ((share > 0) & (share < 1)).sum() > side           # some pixels are partly covered


def test_edges_are_one_pixel_wide_at_every_resolution():
    for side in (64, 256):
        background = Background("dark", "blue", "striped", 0.3, 0.4, 0.2, 0)
        row = draw_background(background, centers(side))[2, 0]
        between = (row > row.min() + 0.01) & (row < row.max() - 0.01)
        assert 1 <= between.sum() <= 2 * 10               # ten edges, at most two pixels each


def test_outlines_of_different_kinds_differ_at_48_pixels():
    x, y = (centers(48)[None] - 0.5) * 2, (0.5 - centers(48)[:, None]) * 2
    masks = [OUTLINES[kind](x, y) < 0 for kind in KINDS]
    overlap = [(a & b).sum() / (a | b).sum() for i, a in enumerate(masks) for b in masks[:i]]
    assert max(overlap) < 0.8                             # 0.78 for circle and heart


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"ring", "moon"}))       # empty in the center
def test_a_shape_has_the_color_of_its_name(kind):
    for color in COLORS:
        canvas = draw_background(Background("light", "red", "plain", 0, 0, 0.2, 0), centers(32))
        draw_shape(Shape(kind, color, "plain", 0.5, 0.5, 0.3, 0, 0), centers(32), canvas)
        distances = {c: np.square(canvas[:, 16, 16] - COLORS[c]).sum() for c in COLORS}
        assert min(distances, key=distances.get) == color


def test_shapes_stand_out_from_their_background():
    for background, shapes, _ in SCENES[:300]:
        bare = draw_background(background, centers(64))
        drawn = bare.copy()
        draw_shape(shapes[0]._replace(texture="plain"), centers(64), drawn)
        change = abs(drawn - bare).max(0)
        assert (change > 40).mean() > 0.15 * math.pi * shapes[0].r ** 2


def test_caption_and_label_name_the_main_shape_which_is_the_largest():
    for i in range(200):
        _, words, label = draw(i, 8)
        background, shapes, same = SCENES[i]
        largest = max(shapes, key=lambda shape: shape.r)
        assert words == same and KINDS[label] == shapes[0].kind == largest.kind
        assert re.search(rf"\b({'|'.join(KINDS)})\b", words)[1] == shapes[0].kind
        assert all(shape.kind in words for shape in shapes)
        tone_and_color = f"{background.tone} {background.color}"
        assert words.count("background") == words.count(tone_and_color) <= 1


def test_captions_name_the_color_and_the_background_with_probability_p_mention():
    colors = sum(f"{shape.color} {shape.kind}" in words for _, (shape,), words in SINGLES)
    backgrounds = sum("background" in words for _, _, words in SINGLES)
    assert abs(colors / len(SINGLES) - P_MENTION) < 0.05
    assert abs(backgrounds / len(SINGLES) - P_MENTION) < 0.05


def test_a_relation_in_a_caption_is_true():
    n = 0
    for _, (main, *others), words in SCENES:
        for other in others:
            where = relation(main, other)
            gap = {"left of": other.x - main.x, "right of": main.x - other.x,
                   "above": other.y - main.y, "below": main.y - other.y}[where]
            assert gap > 0.7 * (main.r + other.r)
            one_way = re.search(rf"\b{where} an? ([a-z]+ ){{0,3}}{other.kind}", words)
            assert one_way or f"{other.kind} {CONVERSE[where]}" in words, words
            n += 1
    assert n > 1000


def test_left_of_means_smaller_column_and_above_means_smaller_row():
    canvas = np.full((3, 64, 64), 128, np.float32)
    one = Shape("circle", "red", "plain", 0.2, 0.3, 0.15, 0, 0)
    other = one._replace(x=0.7, y=0.4)
    assert relation(one, other) == "left of"
    assert relation(one._replace(x=0.7, y=0.1), other) == "above"
    draw_shape(one, centers(64), canvas)
    rows, columns = np.nonzero(canvas[0] > 180)
    assert columns.mean() == pytest.approx(0.2 * 64, abs=1.5)
    assert rows.mean() == pytest.approx(0.3 * 64, abs=1.5)


def test_shapes_are_apart_from_each_other_and_inside_the_image():
    for size in ((0.3, 0.6), (0.7, 0.7), (0.1, 0.1)):
        for i in range(300):
            _, shapes, _ = scene(i, size=size)
            assert size[0] <= 2 * shapes[0].r <= size[1]
            for k, a in enumerate(shapes):
                assert a.r < min(a.x, a.y, 1 - a.x, 1 - a.y)
                assert k == 0 or a.r < 0.71 * shapes[0].r
                assert all(math.hypot(a.x - b.x, a.y - b.y) > a.r + b.r for b in shapes[:k])


def test_captions_are_grammatical():
    wrong = re.compile(r"\ba [aeiou]|\ban [^aeiou]|\ba an?\b|  |plain|[{}]| ,")
    for _, _, words in SCENES:
        assert not wrong.search(words), words
        assert words == words.strip().lower()
        assert len(re.findall(r"\b(large|small)\b", words)) <= 3
    captions = {words for *_, words in SCENES}
    assert any("an orange" in words for words in captions)
    assert len(captions) > 2000


def test_captions_call_only_large_shapes_large_and_only_small_shapes_small():
    for _, shapes, words in SCENES:
        for shape in shapes:
            size = re.search(rf"\b(large|small) ([a-z]+ ){{0,2}}{shape.kind}", words)
            if size and size[1] == "large":
                assert 2 * shape.r > LARGE, words
            elif size:
                assert 2 * shape.r < SMALL, words
    assert (SMALL, LARGE) == (0.33, 0.46)


def test_every_kind_is_equally_frequent_and_every_number_of_shapes_too():
    kinds = [sum(shapes[0].kind == kind for _, shapes, _ in SCENES) for kind in KINDS]
    numbers = [sum(len(shapes) == n for _, shapes, _ in SCENES) for n in (1, 2, 3)]
    for counts in (kinds, numbers):
        mean = sum(counts) / len(counts)
        assert all(abs(c - mean) < 5 * math.sqrt(mean) for c in counts), counts


@pytest.mark.parametrize("name, values, property_of", [
    ("color", list(COLORS), lambda background, shape: shape.color),
    ("background color", list(COLORS), lambda background, shape: background.color),
    ("background texture", BACKGROUND_TEXTURES, lambda background, shape: background.texture),
    ("texture", sorted(set(TEXTURES)), lambda background, shape: shape.texture),
    ("size", [False, True], lambda background, shape: shape.r > 0.225),
    ("position", [False, True], lambda background, shape: shape.x > 0.5)])
def test_only_the_outline_depends_on_the_kind(name, values, property_of):
    pairs = [(shapes[0].kind, property_of(background, shapes[0]))
             for background, shapes, _ in SCENES]
    assert independent(count(pairs, KINDS, values))


def test_one_large_shape_is_inside_the_image_but_not_always_in_the_center():
    scenes = [scene(i, objects=(1, 1), size=(0.6, 0.9))[1] for i in range(200)]
    assert all(len(shapes) == 1 for shapes in scenes)
    assert np.std([shapes[0].x for shapes in scenes]) > 0.03


@pytest.mark.parametrize("wrong, message", [
    (dict(index=-1), "index -1"), (dict(seed=-1), "seed -1"), (dict(seed=2 ** 32), "below"),
    (dict(side=4), "side of 4"), (dict(objects=(0, 2)), "objects"),
    (dict(objects=(3, 2)), "objects"), (dict(objects=(1, 9)), "objects"),
    (dict(size=(0.5, 0.4)), "size"), (dict(size=(0.3, 1.2)), "size"),
    (dict(size=(0, 0.5)), "size"), (dict(size=(0.6, 0.9)), "no space")])
def test_arguments_out_of_range_raise(wrong, message):
    with pytest.raises(ValueError, match=message):
        draw(**dict(index=0, side=32) | wrong)


# ---------------------------------------------------------------- labels and captions
def test_with_kind_and_color_as_label_the_80_classes_are_all_pairs():
    names = CLASSES["kind+color"]
    assert len(set(names)) == 80 == len(KINDS) * len(COLORS)
    for i in range(50):
        _, shapes, _ = scene(i, objects=(1, 1))
        label = draw(i, 16, objects=(1, 1), label="kind+color")[2]
        assert names[label] == f"{shapes[0].color} {shapes[0].kind}"


def test_captions_change_neither_image_nor_label():
    for i in range(20):
        image, _, label = draw(i, 16, objects=(1, 1))
        for captions in CAPTIONS:
            other, _, same = draw(i, 16, objects=(1, 1), captions=captions)
            assert np.array_equal(image, other) and label == same


def test_captions_name_kind_and_color_of_the_main_shape_as_requested():
    for i in range(100):
        _, (shape, *_), _ = scene(i, objects=(1, 1))
        texts = {c: draw(i, 16, objects=(1, 1), captions=c)[1] for c in CAPTIONS}
        assert f"{shape.color} {shape.kind}" in texts["both"]
        assert shape.kind in texts["some"]
        words = re.findall(r"\w+", texts["neither"])
        assert not set(words) & set(KINDS) and shape.color not in words and "shape" in words
        next_image = draw(i + 1, 16, objects=(1, 1), captions="both")[1]
        assert texts["shuffled"] == next_image


def test_an_unknown_label_or_caption_is_an_error_that_names_the_choices():
    with pytest.raises(ValueError, match=r"kind\+color.*some, both, neither, shuffled"):
        draw(0, 16, label="color")
    with pytest.raises(ValueError, match="captions=none"):
        draw(0, 16, captions="none")
