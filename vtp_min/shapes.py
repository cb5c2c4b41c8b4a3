"""Shapes: the built-in data set. Endless, seeded, captioned, drawn at any resolution.

    draw(index, side, seed) -> image (side, side, 3) uint8, English caption, class label

A scene is drawn at random in unit coordinates, x to the right and y down, both in 0..1, and only
then sampled at side x side pixels: 32 and 256 pixels show the same scene. Outlines and textures are
signed distances d, negative inside. A pixel is covered by clip(1/2 - d in pixels, 0, 1): exact for
edges along the pixel grid, close for all others. The label is the kind of the largest shape, which
no other property tells: color, size, texture, position, background. All numbers here are ours.
"""
import math
import operator
from collections import namedtuple

import numpy as np

COLORS = {"red": (222, 52, 48), "orange": (245, 140, 28), "yellow": (248, 211, 42),
          "green": (62, 166, 74), "turquoise": (40, 186, 184), "blue": (48, 98, 216),
          "purple": (136, 68, 188), "pink": (246, 120, 178)}
# a background is its color mixed with this share of a gray level, so that shapes stand out
TONES = {"light": (244, 0.72), "dark": (34, 0.70)}
TEXTURES = ["plain", "plain", "striped", "dotted", "checkered"]
BACKGROUND_TEXTURES = ["plain", "gradient", "cloudy", "striped", "dotted", "checkered"]
SMALL, LARGE = 0.33, 0.46              # diameters below and above which captions may say so
MARGIN = 0.02                          # least distance between shapes, and to the border
MAX_TILT = 0.2                         # radians: a square stays a square, not a diamond
P_MENTION = 0.25                       # of each property in a caption; the kind is always named

TEMPLATES = ["{shapes}", "a picture of {shapes}", "there is {shapes}", "a drawing of {shapes}"]
BACKGROUND_TEMPLATES = [
    "{shapes} on {background}", "{shapes} against {background}", "{shapes}, drawn on {background}",
    "a picture of {shapes} on {background}", "there is {shapes} on {background}",
    "a drawing of {shapes} in front of {background}", "on {background} there is {shapes}"]
CONVERSE = {"left of": "to its right", "right of": "to its left",
            "above": "below it", "below": "above it"}

# center and radius of the enclosing disc; the angles of outline and texture
Shape = namedtuple("Shape", "kind color texture x y r angle texture_angle")
# the texture's origin, period and angle
Background = namedtuple("Background", "tone color texture x y period angle")


# ---------------------------------------------------------------- outlines
# points (x, y), y up, in units of the radius -> signed distance; all lie inside the unit disc

def length(x, y):
    return np.sqrt(x * x + y * y)      # np.hypot is slower: it avoids the overflow of huge numbers


def circle(x, y):
    return length(x, y) - 0.9


def ring(x, y):
    return abs(length(x, y) - 0.7) - 0.22


def square(x, y):
    return np.maximum(abs(x), abs(y)) - 0.7


def cross(x, y):
    x, y = abs(x), abs(y)
    return np.maximum(np.maximum(x, y) - 0.92, np.minimum(x, y) - 0.3)


def triangle(x, y):
    return np.maximum(abs(x) * math.sqrt(0.75) + y / 2, -y) - 0.5


def diamond(x, y):
    return (abs(x) * 0.98 + abs(y) * 0.64 - 0.64 * 0.98) / math.hypot(0.98, 0.64)


def moon(x, y, R=0.94, r=0.78, c=0.45):
    """A disc of radius R at the origin without a disc of radius r at (c, 0)"""
    y = abs(y)
    horn_x = (R * R - r * r + c * c) / (2 * c)                    # where the two circles meet
    horn_y = math.sqrt(R * R - horn_x * horn_x)
    horn_is_nearest = x * horn_y - y * horn_x > c * np.maximum(horn_y - y, 0)
    inside = np.maximum(length(x, y) - R, r - length(x - c, y))
    return np.where(horn_is_nearest, length(x - horn_x, y - horn_y), inside)


def heart(x, y):
    """A right angle that stands on its tip, and two discs on it"""
    x, y = abs(x) / 1.56, y / 1.56 + 0.63
    disc = length(x - 0.25, y - 0.75) - math.sqrt(1 / 8)
    angle = np.maximum((x - y) * math.sqrt(0.5), -length(x, y - 1))
    return 1.56 * np.where(x + y > 1, disc, angle)


def star(x, y, inner=0.46):
    x = abs(x)
    for angle in (0.3 * math.pi, -0.3 * math.pi):                 # two mirrors make one tip of five
        mirror_x, mirror_y = math.sin(angle), -abs(math.cos(angle))
        beyond = 2 * np.maximum(x * mirror_x + y * mirror_y, 0)
        x, y = x - beyond * mirror_x, y - beyond * mirror_y
    notch_x, notch_y = inner * math.sin(math.pi / 5), inner * math.cos(math.pi / 5)
    # the edge leads from the tip (0, 1) to the notch
    return (abs(x) * (1 - notch_y) + (y - 1) * notch_x) / math.hypot(1 - notch_y, notch_x)


def arrow(x, y):
    x = abs(x)
    slope = (x * 0.93 + (y - 0.95) * 0.78) / math.hypot(0.93, 0.78)
    head = np.maximum(slope, np.maximum(0.02 - y, x - 0.78))
    shaft = np.maximum(x - 0.27, abs(y + 0.42) - 0.5)
    return np.minimum(head, shaft)


OUTLINES = {"circle": circle, "square": square, "triangle": triangle, "star": star, "heart": heart,
            "cross": cross, "ring": ring, "moon": moon, "diamond": diamond, "arrow": arrow}
KINDS = list(OUTLINES)


# ---------------------------------------------------------------- textures
def coverage(distance):
    """Signed distance in pixels -> share of the pixel that lies inside"""
    return np.clip(0.5 - distance, 0, 1)


def from_nearest_integer(x):
    return x - np.rint(x)


def texture(name, x, y, pixels):
    """Points (x, y) in periods of `pixels` pixels -> share of the second tone, 0..1: (h, w)"""
    if name == "plain":
        return 0.0
    if name == "gradient":
        return np.clip(0.5 + x / 6, 0, 1)
    if name == "cloudy":
        return 0.5 + 0.5 * np.sin(2 * x + 1.5 * np.sin(1.3 * y)) * np.cos(1.7 * y - 0.6 * x)
    x = from_nearest_integer(x)
    if name == "striped":
        return coverage((abs(x) - 0.25) * pixels)
    y = from_nearest_integer(y)
    if name == "dotted":
        return coverage((length(x, y) - 0.3) * pixels)
    column, row = abs(x) - 0.25, abs(y) - 0.25
    exclusive_or = np.maximum(np.minimum(column, row), -np.maximum(column, row))
    return coverage(exclusive_or * pixels)                        # checkered


# ---------------------------------------------------------------- drawing
def rotate(x, y, angle):
    cos, sin = math.cos(angle), math.sin(angle)
    return cos * x + sin * y, cos * y - sin * x


def lerp(a, b, weight):
    return a + (b - a) * weight


def rgb(color):
    return np.array(COLORS[color], np.float32)[:, None, None]     # (3, 1, 1)


def draw_background(background, centers):
    """centers (S,) of the pixels, in 0..1 -> canvas (3, S, S) float32 in 0..255"""
    x = (centers[None] - background.x) / background.period        # (1, S)
    y = (centers[:, None] - background.y) / background.period     # (S, 1)
    x, y = rotate(x, y, background.angle)
    pixels = background.period * len(centers)
    gray, share = TONES[background.tone]
    first = lerp(rgb(background.color), gray, share)
    second = lerp(first, 255 - gray, 0.14) if background.tone == "dark" else first * 0.86
    canvas = np.empty((3, len(centers), len(centers)), np.float32)
    canvas[:] = lerp(first, second, texture(background.texture, x, y, pixels))
    return canvas


def draw_shape(shape, centers, canvas):
    """Draw shadow, filling and rim onto the canvas, in place"""
    S, r = len(centers), shape.r
    rows, columns = window(shape.y, r, S), window(shape.x, r, S)
    x = (centers[None, columns] - shape.x) / r                    # (1, w)
    y = (shape.y - centers[rows, None]) / r                       # (h, 1)   up from here on
    d = OUTLINES[shape.kind](*rotate(x, y, shape.angle))          # (h, w)   in radii
    edge = d * (r * S)                                            # in pixels
    inner = coverage(edge + 0.1 * r * S)                          # all but the rim

    # light comes from the upper left; the second term keeps shadows of pointed corners short
    away = np.maximum(d, 3 * length(x, y) - 3)
    shadow = np.clip(1 - away / 0.28, 0, 1) ** 2 * np.clip(0.4 + 0.3 * (x - y), 0, 0.6)

    period = 0.07 + 0.24 * r           # visible at 32 pixels, and several periods in a shape
    texture_x, texture_y = rotate(x * (r / period), y * (r / period), shape.texture_angle)
    pattern = texture(shape.texture, texture_x, texture_y, period * S)
    color = rgb(shape.color)
    ink = lerp(color, lerp(color, 255, 0.62), inner * pattern)    # (3, h, w)   the rim is plain
    ink *= (0.62 + 0.38 * inner) * (1 + 0.11 * (y - x))           # and darker

    view = canvas[:, rows, columns]
    view *= 1 - shadow
    view += (ink - view) * coverage(edge)


def window(center, r, S):
    """Pixels that a shape and its shadow can reach along one axis -> slice"""
    reach = 1.3 * r
    return slice(max(0, math.floor((center - reach) * S)), math.ceil((center + reach) * S))


# ---------------------------------------------------------------- random scenes
def pick(rng, items):
    return items[int(rng.random() * len(items))]


def place(rng, r, others):
    """A disc inside the image, apart from the others -> x, y, r. r shrinks with every failure."""
    while True:
        x = lerp(r + MARGIN, 1 - r - MARGIN, rng.random())
        y = lerp(r + MARGIN, 1 - r - MARGIN, rng.random())
        if all(math.hypot(x - o.x, y - o.y) > r + o.r + MARGIN for o in others):
            return x, y, r
        r *= 0.97


def scene(index, seed=0, objects=(1, 3), size=(0.3, 0.6)):
    """-> Background, [Shape, ...] with the main one first, caption. Arguments as in `draw`."""
    rng = np.random.default_rng((seed, index))
    kinds = rng.permutation(len(KINDS))                           # no kind and no color twice
    names = list(COLORS)
    colors = [names[i] for i in rng.permutation(len(names))]
    background = Background(
        pick(rng, list(TONES)), colors[-1], pick(rng, BACKGROUND_TEXTURES), rng.random(),
        rng.random(), lerp(0.13, 0.26, rng.random()), lerp(-math.pi, math.pi, rng.random()))
    shapes = []
    for i in range(objects[0] + int(rng.random() * (objects[1] - objects[0] + 1))):
        if shapes:
            r = lerp(0.5, 0.7, rng.random()) * shapes[0].r
        else:
            r = lerp(*size, rng.random()) / 2
        shapes.append(Shape(
            KINDS[kinds[i]], colors[i], pick(rng, TEXTURES), *place(rng, r, shapes),
            lerp(-MAX_TILT, MAX_TILT, rng.random()), lerp(0, math.pi, rng.random())))
    return background, shapes, caption(rng, background, shapes)


# ---------------------------------------------------------------- captions
def noun_phrase(*words):
    """'large', 'plain', 'orange', 'star' -> 'a large orange star'"""
    phrase = " ".join(word for word in words if word != "plain")
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def describe(rng, shape):
    """'a heart', 'a red heart', 'a large striped red heart': the kind and some of the rest"""
    size = "plain"
    if 2 * shape.r > LARGE:
        size = "large"
    elif 2 * shape.r < SMALL:
        size = "small"
    words = []
    for word in (size, shape.texture, shape.color):
        if rng.random() < P_MENTION:
            words.append(word)
    return noun_phrase(*words, shape.kind)


def relation(one, other):
    """Where `one` is, seen from `other`, along the axis on which they are farther apart"""
    dx, dy = one.x - other.x, one.y - other.y
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def caption(rng, background, shapes):
    main, *others = shapes
    found = [(relation(main, other), describe(rng, other)) for other in others]
    if rng.random() < 0.5:             # a circle above a star and left of a ring
        parts = [f"{where} {other}" for where, other in found]
        rest = ""
    else:                              # a circle with a star below it and a ring to its right
        parts = [f"{other} {CONVERSE[where]}" for where, other in found]
        rest = "with " if parts else ""
    rest += " and ".join(parts)
    templates = BACKGROUND_TEMPLATES if rng.random() < P_MENTION else TEMPLATES
    template = pick(rng, templates)
    words = noun_phrase(background.tone, background.color, background.texture, "background")
    return template.format(shapes=f"{describe(rng, main)} {rest}".strip(), background=words)


# ---------------------------------------------------------------- an image
def draw(index, side, seed=0, objects=(1, 3), size=(0.3, 0.6)):
    """Image number `index` -> image (side, side, 3) uint8, caption, label (an index into KINDS)

    side     pixels; the scene does not depend on it     seed     0..2**32-1, one data set each
    objects  (fewest, most) shapes, within 1..3
    size     (least, greatest) diameter of the main shape, as a share of the side
    ValueError for what cannot be drawn.
    """
    index, side, seed = (operator.index(n) for n in (index, side, seed))
    if index < 0 or not 0 <= seed < 2 ** 32:
        raise ValueError(f"index {index} and seed {seed} must not be negative, and the seed must "
                         f"be below 2**32")
    if side < 8:
        raise ValueError(f"a side of {side} pixels is too small; take 8 or more (32 to 256 look "
                         f"best)")
    if not 1 <= objects[0] <= objects[1] <= 3:
        raise ValueError(f"objects={objects} must be (fewest, most) within 1..3, for example "
                         f"(1, 3)")
    if not 0.1 <= size[0] <= size[1] <= 0.9:
        raise ValueError(f"size={size} must be (least, greatest) diameter within 0.1..0.9 of the "
                         f"side, for example (0.3, 0.6)")
    if objects[1] > 1 and size[1] > 0.7:
        raise ValueError(f"a shape of size {size[1]} leaves no space for others; take "
                         f"objects=(1, 1), or size up to 0.7")
    background, shapes, words = scene(index, seed, objects, size)
    centers = (np.arange(side, dtype=np.float32) + 0.5) / side
    canvas = draw_background(background, centers)
    for shape in shapes:
        draw_shape(shape, centers, canvas)
    image = np.clip(canvas.round(), 0, 255).astype(np.uint8)
    return np.stack(image, -1), words, KINDS.index(shapes[0].kind)
