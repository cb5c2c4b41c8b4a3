import math
import re

import numpy as np
import pytest

from vtp_min.shapes import COLOURS, GROUNDS, KINDS, MENTIONED, OTHER_IS, OUTLINES, TEXTURES, Ground, Thing
from vtp_min.shapes import cover, draw, paint_ground, paint_thing, relation, scene

SCENES = [scene(i) for i in range(3000)]
ONES = [scene(i, objects=(1, 1)) for i in range(2000)]


def fits(table):
    """Is a table of counts (rows, columns) what independent rows and columns give? Chi-square within five sigmas of its mean."""
    table = np.asarray(table, float)
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
    freedom = (table.shape[0] - 1) * (table.shape[1] - 1)
    return abs(((table - expected) ** 2 / expected).sum() - freedom) < 5 * math.sqrt(2 * freedom)


def count(pairs, rows, columns):
    table = np.zeros((len(rows), len(columns)))
    for a, b in pairs:
        table[rows.index(a), columns.index(b)] += 1
    return table


def at(side): return (np.arange(side, dtype=np.float32) + 0.5) / side


def test_a_picture_follows_from_its_arguments_alone():
    image, words, label = draw(7, 48, seed=3)
    draw(8, 48, seed=3)
    again = draw(7, 48, seed=3)
    assert np.array_equal(image, again[0]) and (words, label) == again[1:]
    assert image.shape == (48, 48, 3) and image.dtype == np.uint8 and image.flags.c_contiguous


def test_another_index_or_another_seed_is_another_picture():
    seen = {draw(i, 16, seed=s)[0].tobytes() for i in [*range(20), 2 ** 32, 2 ** 62] for s in (0, 1, 2 ** 32 - 1)}
    assert len(seen) == 22 * 3


def test_the_same_scene_is_drawn_at_every_resolution():
    for i in range(40):
        fine, words, label = draw(i, 256)
        coarse, *same = draw(i, 64)
        assert same == [words, label]
        boxes = fine.reshape(64, 4, 64, 4, 3).mean((1, 3))
        assert abs(boxes - coarse).mean() < 1, i                                 # of 255 grey levels
        other = draw(i + 1, 64)[0]
        assert abs(boxes - other).mean() > 10, i


def test_odd_and_tiny_sides_are_drawn_too():
    assert [draw(0, side)[0].shape for side in (8, 33, 224)] == [(8, 8, 3), (33, 33, 3), (224, 224, 3)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_outline_stays_inside_its_disc_and_has_slope_one_at_its_edge(kind):
    grid = np.linspace(-1.5, 1.5, 1201)
    x, y = np.meshgrid(grid, -grid)
    d = OUTLINES[kind](x, y)
    assert (np.hypot(x, y)[d < 0] <= 1.001).all()
    assert 0.15 < (d < 0).sum() * (grid[1] - grid[0]) ** 2 / math.pi < 0.9       # neither a speck nor the whole disc
    slope = np.hypot(*np.gradient(d, grid[1] - grid[0]))[abs(d) < 0.02]
    assert np.median(slope) == pytest.approx(1, abs=0.01) and (abs(slope - 1) < 0.1).mean() > 0.9


def test_edges_are_anti_aliased_so_that_a_painted_area_is_the_true_area():
    d = lambda side: np.hypot(at(side)[None] - 0.51, at(side)[:, None] - 0.47) - 0.3
    for side in (16, 32, 64):
        share = cover(d(side) * side)
        assert share.mean() == pytest.approx(math.pi * 0.09, rel=0.01)
        assert ((share > 0) & (share < 1)).sum() > side                          # some pixels are neither in nor out


def test_edges_are_one_pixel_wide_at_every_resolution():
    for side in (64, 256):
        canvas = paint_ground(Ground("dark", "blue", "striped", 0.3, 0.4, 0.2, 0), at(side))[2, 0]
        between = (canvas > canvas.min() + 0.01) & (canvas < canvas.max() - 0.01)
        assert 1 <= between.sum() <= 2 * 10                                      # ten edges in a row, two pixels each at most


def test_silhouettes_of_different_kinds_differ_at_48_pixels():
    x, y = (at(48)[None] - 0.5) * 2, (0.5 - at(48)[:, None]) * 2
    masks = [OUTLINES[k](x, y) < 0 for k in KINDS]
    overlap = [(a & b).sum() / (a | b).sum() for i, a in enumerate(masks) for b in masks[:i]]
    assert max(overlap) < 0.8                                                    # circle and heart come closest: 0.78


def test_a_thing_is_the_colour_it_is_said_to_be():
    for kind in set(KINDS) - {"ring", "moon"}:                                   # these two are empty in the middle
        for colour in COLOURS:
            canvas = paint_ground(Ground("light", "red", "plain", 0, 0, 0.2, 0), at(32))
            paint_thing(Thing(kind, colour, "plain", 0.5, 0.5, 0.3, 0, 0), at(32), canvas)
            nearest = min(COLOURS, key=lambda c: np.square(canvas[:, 16, 16] - COLOURS[c]).sum())
            assert nearest == colour, (kind, colour)


def test_things_stand_out_from_their_ground():
    for ground, things, _ in SCENES[:300]:
        bare = paint_ground(ground, at(64))
        painted = bare.copy()
        paint_thing(things[0]._replace(texture="plain"), at(64), painted)
        change = abs(painted - bare).max(0)
        assert (change > 40).mean() > 0.15 * math.pi * things[0].r ** 2


def test_caption_and_label_name_the_main_thing_which_is_the_largest():
    for i in range(200):
        _, words, label = draw(i, 8)
        ground, things, same = SCENES[i]
        assert words == same and KINDS[label] == things[0].kind == max(things, key=lambda t: t.r).kind
        assert re.search(rf"\b({'|'.join(KINDS)})\b", words)[1] == things[0].kind
        assert all(t.kind in words for t in things)
        assert words.count("background") == words.count(f"{ground.tone} {ground.colour}") <= 1


def test_every_caption_names_the_kind_and_a_known_share_of_them_the_colour_and_the_ground():
    words = [w for _, _, w in ONES]
    named = [sum(f"{t.colour} {t.kind}" in w for (_, (t,), w) in ONES), sum("background" in w for w in words)]
    assert all(abs(n / len(ONES) - MENTIONED) < 0.05 for n in named), named


def test_a_relation_that_is_told_is_true():
    told = 0
    for _, (main, *others), words in SCENES:
        for o in others:
            where = relation(main, o)
            gap = {"left of": o.x - main.x, "right of": main.x - o.x, "above": o.y - main.y, "below": main.y - o.y}[where]
            assert gap > 0.7 * (main.r + o.r)
            name = o.kind
            assert re.search(rf"\b{where} an? ([a-z]+ ){{0,3}}{name}", words) or f"{name} {OTHER_IS[where]}" in words, words
            told += 1
    assert told > 1000


def test_left_of_means_smaller_column_and_above_means_smaller_row():
    canvas = np.full((3, 64, 64), 128, np.float32)
    one, other = (Thing("circle", "red", "plain", x, y, 0.15, 0, 0) for x, y in ((0.2, 0.3), (0.7, 0.4)))
    assert relation(one, other) == "left of" and relation(one._replace(x=0.7, y=0.1), other) == "above"
    paint_thing(one, at(64), canvas)
    rows, cols = np.nonzero(canvas[0] > 180)
    assert cols.mean() == pytest.approx(0.2 * 64, abs=1.5) and rows.mean() == pytest.approx(0.3 * 64, abs=1.5)


def test_things_keep_clear_of_each_other_and_inside_the_picture():
    for size in ((0.3, 0.6), (0.7, 0.7), (0.1, 0.1)):
        for i in range(300):
            _, things, _ = scene(i, size=size)
            assert size[0] <= 2 * things[0].r <= size[1] and all(t.r < 0.71 * things[0].r for t in things[1:])
            assert all(t.r < min(t.x, t.y, 1 - t.x, 1 - t.y) for t in things)
            assert all(math.hypot(a.x - b.x, a.y - b.y) > a.r + b.r for k, a in enumerate(things) for b in things[:k])


def test_captions_are_grammatical():
    for _, _, words in SCENES:
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|\ba an?\b|  |plain|[{}]| ,", words), words
        assert words == words.strip().lower() and len(re.findall(r"\b(large|small)\b", words)) <= 3
    assert any("an orange" in words for *_, words in SCENES)
    assert len({words for *_, words in SCENES}) > 2000


def test_large_and_small_are_said_only_of_large_and_small_things():
    for _, things, words in SCENES:
        for t in things:
            size = re.search(rf"\b(large|small) ([a-z]+ ){{0,2}}{t.kind}", words)
            assert not size or (2 * t.r > 0.46 if size[1] == "large" else 2 * t.r < 0.33), words


def test_every_kind_is_equally_frequent_and_every_number_of_things_too():
    kinds = [sum(things[0].kind == k for _, things, _ in SCENES) for k in KINDS]
    numbers = [sum(len(things) == n for _, things, _ in SCENES) for n in (1, 2, 3)]
    for counts in (kinds, numbers):
        mean = sum(counts) / len(counts)
        assert all(abs(c - mean) < 5 * math.sqrt(mean) for c in counts), counts


def test_nothing_but_the_outline_tells_the_kind():
    def main(f): return [(things[0].kind, f(ground, things[0])) for ground, things, _ in SCENES]
    assert fits(count(main(lambda g, t: t.colour), KINDS, list(COLOURS)))
    assert fits(count(main(lambda g, t: g.colour), KINDS, list(COLOURS)))
    assert fits(count(main(lambda g, t: g.texture), KINDS, GROUNDS))
    assert fits(count(main(lambda g, t: t.texture), KINDS, sorted(set(TEXTURES))))
    assert fits(count(main(lambda g, t: t.r > 0.225), KINDS, [False, True]))
    assert fits(count(main(lambda g, t: t.x > 0.5), KINDS, [False, True]))


def test_one_large_thing_stays_inside_but_not_always_in_the_middle():
    places = [scene(i, objects=(1, 1), size=(0.6, 0.9))[1] for i in range(200)]
    assert all(len(things) == 1 for things in places)
    assert np.std([things[0].x for things in places]) > 0.03


@pytest.mark.parametrize("wrong, told", [
    (dict(index=-1), "index -1"), (dict(seed=-1), "seed -1"), (dict(seed=2 ** 32), "below"), (dict(side=4), "side of 4"),
    (dict(objects=(0, 2)), "objects"), (dict(objects=(3, 2)), "objects"), (dict(objects=(1, 9)), "objects"),
    (dict(size=(0.5, 0.4)), "size"), (dict(size=(0.3, 1.2)), "size"), (dict(size=(0, 0.5)), "size"), (dict(size=(0.6, 0.9)), "no room")])
def test_what_cannot_be_drawn_is_refused_in_words(wrong, told):
    with pytest.raises(ValueError, match=told):
        draw(**dict(index=0, side=32) | wrong)
