"""Shapes: the built-in pictures. Endless, seeded, captioned, and drawn at any resolution.

in   (seed, index) and a side in pixels             out  uint8 picture (S, S, 3), English caption, class label
A scene is drawn by lot in unit coordinates (x to the right, y down, both in 0..1) and only then sampled on S x S pixels, so 32
and 256 pixels show the same picture. Everything visible is a signed distance d (negative inside), and a pixel is covered by
clip(1/2 - d in pixels, 0, 1): exact for edges along the grid, close enough for all others. The label is the kind of the largest
object, and nothing else (colour, size, texture, place, ground) tells it. All numbers here are ours.
"""
import math
import operator
from collections import namedtuple

import numpy as np

COLOURS = {"red": (222, 52, 48), "orange": (245, 140, 28), "yellow": (248, 211, 42), "green": (62, 166, 74),
           "turquoise": (40, 186, 184), "blue": (48, 98, 216), "purple": (136, 68, 188), "pink": (246, 120, 178)}
TONES = {"light": (244, 0.72), "dark": (34, 0.70)}     # a ground is its colour, mixed with that much of this grey: things stand out
TEXTURES = ["plain", "plain", "striped", "dotted", "checkered"]
GROUNDS = ["plain", "gradient", "cloudy", "striped", "dotted", "checkered"]
LARGE, SMALL = 0.46, 0.33                               # diameters beyond which a caption may say so
MARGIN = 0.02                                           # what things leave free between each other and before the border
TILT = 0.2                                              # radians; a square stays a square
MENTIONED = 0.25                                        # of what else there is to say, captions say this much: the kind matters most
ALONE = ["{things}", "a picture of {things}", "there is {things}", "a drawing of {things}"]
ON_GROUND = ["{things} on {ground}", "{things} against {ground}", "{things}, drawn on {ground}", "a picture of {things} on {ground}",
             "there is {things} on {ground}", "a drawing of {things} in front of {ground}", "on {ground} there is {things}"]
OTHER_IS = {"left of": "to its right", "right of": "to its left", "above": "below it", "below": "above it"}

Thing = namedtuple("Thing", "kind colour texture x y r tilt turn")        # centre and radius of its disc; angles of outline and texture
Ground = namedtuple("Ground", "tone colour texture x y period turn")      # anchor, period and angle of the texture


# --- outlines: points (x, y), y up, in units of the radius -> signed distance; all of them inside the unit disc

def norm(x, y): return np.sqrt(x * x + y * y)         # with np.hypot, which minds huge numbers, a picture takes a fifth longer
def circle(x, y): return norm(x, y) - 0.9
def ring(x, y): return abs(norm(x, y) - 0.7) - 0.22
def square(x, y): return np.maximum(abs(x), abs(y)) - 0.7
def cross(x, y): return np.maximum(np.maximum(abs(x), abs(y)) - 0.92, np.minimum(abs(x), abs(y)) - 0.3)
def triangle(x, y): return np.maximum(abs(x) * math.sqrt(0.75) + y / 2, -y) - 0.5
def diamond(x, y): return (abs(x) * 0.98 + abs(y) * 0.64 - 0.64 * 0.98) / math.hypot(0.98, 0.64)


def moon(x, y, R=0.94, r=0.78, c=0.45):
    y = abs(y)                                                                    # a disc of R at 0 without a disc of r at (c, 0)
    hx = (R * R - r * r + c * c) / (2 * c)                                        # where the two circles meet: the horn (hx, hy)
    hy = math.sqrt(R * R - hx * hx)
    beyond = x * hy - y * hx > c * np.maximum(hy - y, 0)                          # the horn is what is nearest
    return np.where(beyond, norm(x - hx, y - hy), np.maximum(norm(x, y) - R, r - norm(x - c, y)))


def heart(x, y):
    x, y = abs(x) / 1.56, y / 1.56 + 0.63                                         # a right angle standing on its tip, two discs on it
    disc = norm(x - 0.25, y - 0.75) - math.sqrt(1 / 8)
    return 1.56 * np.where(x + y > 1, disc, np.maximum((x - y) * math.sqrt(0.5), -norm(x, y - 1)))


def star(x, y, inner=0.46):
    x = abs(x)
    for angle in (0.3 * math.pi, -0.3 * math.pi):                                 # two mirrors fold five points into one
        mx, my = math.sin(angle), -abs(math.cos(angle))
        beyond = 2 * np.maximum(x * mx + y * my, 0)
        x, y = x - beyond * mx, y - beyond * my
    px, py = inner * math.sin(math.pi / 5), inner * math.cos(math.pi / 5)         # from the tip (0, 1) to the notch (px, py)
    return (abs(x) * (1 - py) + (y - 1) * px) / math.hypot(1 - py, px)


def arrow(x, y):
    x = abs(x)
    head = np.maximum((x * 0.93 + (y - 0.95) * 0.78) / math.hypot(0.93, 0.78), np.maximum(0.02 - y, x - 0.78))
    return np.minimum(head, np.maximum(x - 0.27, abs(y + 0.42) - 0.5))


OUTLINES = {f.__name__: f for f in (circle, square, triangle, star, heart, cross, ring, moon, diamond, arrow)}
KINDS = list(OUTLINES)


# --- textures: points (x, y) in periods -> how much of the second tone, 0..1

def cover(d): return np.clip(0.5 - d, 0, 1)            # signed distance in pixels -> share of the pixel that is inside
def fold(x): return x - np.rint(x)                     # signed distance to the nearest whole number: one period, again and again


def texture(name, x, y, pixels):
    """pixels  how many of them make a period      ->  (h, w), or a number for a plain one"""
    if name == "plain":
        return 0.0
    if name == "gradient":
        return np.clip(0.5 + x / 6, 0, 1)
    if name == "cloudy":
        return 0.5 + 0.5 * np.sin(2 * x + 1.5 * np.sin(1.3 * y)) * np.cos(1.7 * y - 0.6 * x)
    if name == "dotted":
        return cover((norm(fold(x), fold(y)) - 0.3) * pixels)
    d = abs(fold(x)) - 0.25
    if name == "checkered":
        e = abs(fold(y)) - 0.25
        d = np.maximum(np.minimum(d, e), -np.maximum(d, e))                       # inside one of the two, not both
    return cover(d * pixels)


# --- painting

def turned(x, y, angle): return math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x
def mix(a, b, share): return a + (b - a) * share
def rgb(name): return np.array(COLOURS[name], np.float32)[:, None, None]


def paint_ground(ground, at):
    """at (S,) pixel centres  ->  canvas (3, S, S) float32, 0..255"""
    x, y = turned((at[None] - ground.x) / ground.period, (at[:, None] - ground.y) / ground.period, ground.turn)
    grey, share = TONES[ground.tone]
    first = mix(rgb(ground.colour), grey, share)
    second = mix(first, 255 - grey, 0.14) if ground.tone == "dark" else first * 0.86
    canvas = np.empty((3, len(at), len(at)), np.float32)
    canvas[:] = mix(first, second, texture(ground.texture, x, y, ground.period * len(at)))
    return canvas


def paint_thing(thing, at, canvas):
    """Shadow, filling and rim of one thing, in place, inside the window that it can reach."""
    S, r, reach = len(at), thing.r, 1.3 * thing.r
    rows, cols = (slice(max(0, math.floor((c - reach) * S)), math.ceil((c + reach) * S)) for c in (thing.y, thing.x))
    x, y = (at[None, cols] - thing.x) / r, (thing.y - at[rows, None]) / r             # (1, w), (h, 1)   y now goes up
    d = OUTLINES[thing.kind](*turned(x, y, thing.tilt))                               # (h, w)           evaluated once
    far = np.maximum(d, 3 * norm(x, y) - 3)                                           # keeps the shadows of pointed corners short
    shadow = np.clip(1 - far / 0.28, 0, 1) ** 2 * np.clip(0.4 + 0.3 * (x - y), 0, 0.6)  # light comes from the upper left
    edge = d * (r * S)                                                                # the distance in pixels
    inner = cover(edge + 0.1 * r * S)                                                 # all but a rim, which is plain and darker
    period = 0.07 + 0.24 * r                                                         # coarse enough for 32 pixels, several to a thing
    tx, ty = turned(x * (r / period), y * (r / period), thing.turn)
    colour = rgb(thing.colour)
    ink = mix(colour, mix(colour, 255, 0.62), inner * texture(thing.texture, tx, ty, period * S))
    ink *= (0.62 + 0.38 * inner) * (1 + 0.11 * (y - x))                              # (3, h, w)
    window = canvas[:, rows, cols]
    window *= 1 - shadow
    window += (ink - window) * cover(edge)


# --- the lot

def pick(rng, items): return items[int(rng.random() * len(items))]


def place(rng, r, others):
    """A disc of radius r inside the picture and clear of the others -> x, y, r; it shrinks a little with every failure."""
    while True:
        x, y = (mix(r + MARGIN, 1 - r - MARGIN, rng.random()) for _ in "xy")
        if all(math.hypot(x - o.x, y - o.y) > r + o.r + MARGIN for o in others):
            return x, y, r
        r *= 0.97


def scene(index, seed=0, objects=(1, 3), size=(0.3, 0.6)):
    """The lot of one picture -> Ground, [Thing, ...] (the main one first), caption. Arguments as in `draw`."""
    rng = np.random.default_rng((seed, index))
    kinds, colours = rng.permutation(len(KINDS)), rng.permutation(len(COLOURS))      # no kind and no colour twice in a picture
    names = list(COLOURS)
    ground = Ground(pick(rng, list(TONES)), names[colours[-1]], pick(rng, GROUNDS), rng.random(), rng.random(),
                    mix(0.13, 0.26, rng.random()), mix(-math.pi, math.pi, rng.random()))
    things = []
    for i in range(objects[0] + int(rng.random() * (objects[1] - objects[0] + 1))):
        r = mix(0.5, 0.7, rng.random()) * things[0].r if things else mix(*size, rng.random()) / 2
        things.append(Thing(KINDS[kinds[i]], names[colours[i]], pick(rng, TEXTURES), *place(rng, r, things),
                            mix(-TILT, TILT, rng.random()), mix(0, math.pi, rng.random())))
    return ground, things, caption(rng, ground, things)


# --- words

def said(*words):
    """'large', 'plain', 'orange', 'star' -> 'a large orange star': an article in front, and what is plain goes without saying"""
    phrase = " ".join(w for w in words if w != "plain")
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def describe(rng, thing):
    """'a heart', 'a red heart', 'a large striped red heart': as people do, it names the kind and leaves out some of the rest"""
    size = "large" if 2 * thing.r > LARGE else "small" if 2 * thing.r < SMALL else "plain"
    return said(*(word if rng.random() < MENTIONED else "plain" for word in (size, thing.texture, thing.colour)), thing.kind)


def relation(one, other):
    """Where one stands, seen from the other, along the axis that parts them more."""
    dx, dy = one.x - other.x, one.y - other.y
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def caption(rng, ground, things):
    main, *others = things
    told = [(relation(main, o), describe(rng, o)) for o in others]
    if rng.random() < 0.5:
        tail = " and ".join(f"{where} {what}" for where, what in told)                            # above a star and left of a ring
    else:
        tail = " and ".join(f"{what} {OTHER_IS[where]}" for where, what in told)                  # with a star below it and a ring ...
        tail = tail and "with " + tail
    words = said(ground.tone, ground.colour, ground.texture, "background")
    templates = ON_GROUND if rng.random() < MENTIONED else ALONE
    return pick(rng, templates).format(things=f"{describe(rng, main)} {tail}".strip(), ground=words)


# --- the whole

def draw(index, side, seed=0, objects=(1, 3), size=(0.3, 0.6)):
    """Picture number `index` of an endless set -> image (side, side, 3) uint8, caption, label (an index into KINDS)

    side     pixels; the scene does not depend on it            objects  (fewest, most) things in it, within 1..3
    seed     another seed is another set, 0..2**32-1            size     (least, greatest) diameter of the main one, as a part of the side
    Raises ValueError for what cannot be drawn.
    """
    index, side, seed = (operator.index(n) for n in (index, side, seed))
    if index < 0 or not 0 <= seed < 2 ** 32:
        raise ValueError(f"index {index} and seed {seed} must be whole numbers from 0 on, the seed below 2**32")
    if side < 8:
        raise ValueError(f"a side of {side} pixels shows nothing; take 8 or more (32 to 256 look best)")
    if not 1 <= objects[0] <= objects[1] <= 3:
        raise ValueError(f"objects={objects} must be (fewest, most) within 1..3, for example (1, 3)")
    if not 0.1 <= size[0] <= size[1] <= 0.9:
        raise ValueError(f"size={size} must be (least, greatest) diameter within 0.1..0.9 of the side, for example (0.3, 0.6)")
    if objects[1] > 1 and size[1] > 0.7:
        raise ValueError(f"a thing of size {size[1]} leaves no room for others; take objects=(1, 1), or size up to 0.7")
    ground, things, words = scene(index, seed, objects, size)
    at = (np.arange(side, dtype=np.float32) + 0.5) / side
    canvas = paint_ground(ground, at)
    for thing in things:
        paint_thing(thing, at, canvas)
    image = np.clip(canvas.round(), 0, 255).astype(np.uint8)
    return np.stack(image, -1), words, KINDS.index(things[0].kind)
