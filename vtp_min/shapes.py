"""Shapes: the built-in data set. It is endless, seeded, captioned and drawn at any resolution.

    draw(index, side, seed) -> image (side, side, 3) uint8, English caption, class label

A random scene is described in unit coordinates, x to the right and y down, both in 0..1, and then
sampled at side x side pixels, so 32 and 256 pixels show the same scene. Outlines and textures are
signed distances d, negative inside. The fraction of a pixel that is covered is
clip(1/2 - d in pixels, 0, 1), which is exact for edges along the pixel grid and close for others.
The label is the kind of the largest shape. Color, size, texture, position and background are
independent of it, so a classifier has to recognise the outline. With label="kind+color" the label
is the kind and the color: 80 classes. All numbers here are our choice.
"""
import math
import operator
from collections import namedtuple

import numpy as np

COLORS = {"red": (222, 52, 48), "orange": (245, 140, 28), "yellow": (248, 211, 42),
          "green": (62, 166, 74), "turquoise": (40, 186, 184), "blue": (48, 98, 216),
          "purple": (136, 68, 188), "pink": (246, 120, 178)}
# Gray level and its weight. A background is its color mixed with gray, so that it differs from the
# pure colors of the shapes.
TONES = {"light": (244, 0.72), "dark": (34, 0.70)}
TEXTURES = ["plain", "plain", "striped", "dotted", "checkered"]       # plain is twice as likely
BACKGROUND_TEXTURES = ["plain", "gradient", "cloudy", "striped", "dotted", "checkered"]
SMALL, LARGE = 0.33, 0.46              # captions say small below, large above these diameters
MARGIN = 0.02                          # minimum distance between shapes, and to the border
MAX_TILT = 0.2                         # radians; a larger tilt would turn a square into a diamond
P_MENTION = 0.25                       # probability that a caption names a property

TEMPLATES = ["{shapes}", "a picture of {shapes}", "there is {shapes}", "a drawing of {shapes}"]
BACKGROUND_TEMPLATES = [
    "{shapes} on {background}", "{shapes} against {background}", "{shapes}, drawn on {background}",
    "a picture of {shapes} on {background}", "there is {shapes} on {background}",
    "a drawing of {shapes} in front of {background}", "on {background} there is {shapes}"]
# the same relation, expressed for the other shape
CONVERSE = {"left of": "to its right", "right of": "to its left",
            "above": "below it", "below": "above it"}

# x, y, r: center and radius of the enclosing disc; angle: of the outline
Shape = namedtuple("Shape", "kind color texture x y r angle texture_angle")
# x, y, period, angle: origin, period and angle of the texture
Background = namedtuple("Background", "tone color texture x y period angle")


# ---------------------------------------------------------------- outlines
# Points (x, y), y up, in units of the radius -> signed distance to the outline, negative inside.
# All outlines lie inside the unit disc. abs(x) makes an outline symmetric about the y axis.

def length(x, y):
    return np.sqrt(x * x + y * y)      # np.hypot is slower, because it avoids overflow


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
    """Equilateral: all three sides have distance 1/2 from the center"""
    return np.maximum(abs(x) * math.sqrt(0.75) + y / 2, -y) - 0.5


def diamond(x, y):
    """Corners at (0.64, 0) and (0, 0.98)"""
    return (abs(x) * 0.98 + abs(y) * 0.64 - 0.64 * 0.98) / math.hypot(0.98, 0.64)


def moon(x, y, R=0.94, r=0.78, c=0.45):
    """A disc of radius R around the origin minus a disc of radius r around (c, 0)"""
    y = abs(y)
    cusp_x = (R * R - r * r + c * c) / (2 * c)                    # where the two circles intersect
    cusp_y = math.sqrt(R * R - cusp_x * cusp_x)
    cusp_is_nearest = x * cusp_y - y * cusp_x > c * np.maximum(cusp_y - y, 0)
    distance = np.maximum(length(x, y) - R, r - length(x - c, y))
    return np.where(cusp_is_nearest, length(x - cusp_x, y - cusp_y), distance)


def heart(x, y):
    """A square that stands on a corner, and a half disc on each of its two upper sides"""
    x, y = abs(x) / 1.56, y / 1.56 + 0.63          # now the lowest point is (0, 0)
    disc = length(x - 0.25, y - 0.75) - math.sqrt(1 / 8)
    # the lower sides, and the point (0, 1) where the discs meet
    below = np.maximum((x - y) * math.sqrt(0.5), -length(x, y - 1))
    return 1.56 * np.where(x + y > 1, disc, below)


def star(x, y, inner=0.46):
    """Five tips at distance 1 from the center, five inner corners at distance `inner`"""
    x = abs(x)
    # after two reflections all points lie in the sector of the top tip
    for angle in (0.3 * math.pi, -0.3 * math.pi):
        mirror_x, mirror_y = math.sin(angle), -abs(math.cos(angle))
        beyond = 2 * np.maximum(x * mirror_x + y * mirror_y, 0)
        x, y = x - beyond * mirror_x, y - beyond * mirror_y
    corner_x, corner_y = inner * math.sin(math.pi / 5), inner * math.cos(math.pi / 5)
    # distance to the edge from the tip (0, 1) to the inner corner
    return (abs(x) * (1 - corner_y) + (y - 1) * corner_x) / math.hypot(1 - corner_y, corner_x)


def arrow(x, y):
    x = abs(x)
    slope = (x * 0.93 + (y - 0.95) * 0.78) / math.hypot(0.93, 0.78)
    head = np.maximum(slope, np.maximum(0.02 - y, x - 0.78))
    shaft = np.maximum(x - 0.27, abs(y + 0.42) - 0.5)
    return np.minimum(head, shaft)


OUTLINES = {"circle": circle, "square": square, "triangle": triangle, "star": star, "heart": heart,
            "cross": cross, "ring": ring, "moon": moon, "diamond": diamond, "arrow": arrow}
KINDS = list(OUTLINES)

# {label: class names}; a label is a position in the list
CLASSES = {"kind": KINDS,
           "kind+color": [f"{color} {kind}" for kind in KINDS for color in COLORS]}
CAPTIONS = ["some", "both", "neither", "shuffled"]         # explained in `draw`


# ---------------------------------------------------------------- textures
def coverage(distance):
    """Signed distance in pixels -> fraction of the pixel that is inside (anti-aliasing)"""
    return np.clip(0.5 - distance, 0, 1)


def wrap(x):
    """-> x minus the nearest integer: the position within a period, in -1/2..1/2"""
    return x - np.rint(x)


def texture(name, x, y, pixels):
    """Weight of the second color at the points (x, y), in 0..1 -> (h, w)

    x, y are in units of the period of the texture; `pixels` is the period in pixels.
    """
    if name == "plain":
        return 0.0
    if name == "gradient":
        return np.clip(0.5 + x / 6, 0, 1)
    if name == "cloudy":
        return 0.5 + 0.5 * np.sin(2 * x + 1.5 * np.sin(1.3 * y)) * np.cos(1.7 * y - 0.6 * x)
    x = wrap(x)
    if name == "striped":
        return coverage((abs(x) - 0.25) * pixels)
    y = wrap(y)
    if name == "dotted":
        return coverage((length(x, y) - 0.3) * pixels)
    # checkered: inside a stripe along one axis, but not along both
    column, row = abs(x) - 0.25, abs(y) - 0.25
    exclusive_or = np.maximum(np.minimum(column, row), -np.maximum(column, row))
    return coverage(exclusive_or * pixels)


# ---------------------------------------------------------------- drawing
def rotate(x, y, angle):
    """-> coordinates of the points in axes that are rotated by `angle`"""
    cos, sin = math.cos(angle), math.sin(angle)
    return cos * x + sin * y, cos * y - sin * x


def lerp(a, b, weight):
    """Linear interpolation: a at weight 0, b at weight 1"""
    return a + (b - a) * weight


def rgb(color):
    return np.array(COLORS[color], np.float32)[:, None, None]     # (3, 1, 1)


def draw_background(background, centers):
    """centers (S,) of the pixels, in 0..1 -> canvas (3, S, S) float32 in 0..255"""
    x = (centers[None] - background.x) / background.period        # (1, S)
    y = (centers[:, None] - background.y) / background.period     # (S, 1)
    x, y = rotate(x, y, background.angle)                         # (S, S)
    pixels = background.period * len(centers)
    gray, weight = TONES[background.tone]
    first = lerp(rgb(background.color), gray, weight)             # (3, 1, 1)
    # the second color of the texture: lighter on dark backgrounds, darker on light ones
    second = lerp(first, 255 - gray, 0.14) if background.tone == "dark" else first * 0.86
    canvas = np.empty((3, len(centers), len(centers)), np.float32)
    canvas[:] = lerp(first, second, texture(background.texture, x, y, pixels))
    return canvas


def draw_shape(shape, centers, canvas):
    """Draw the shadow, the textured inner part and the rim of a shape onto the canvas, in place"""
    S, r = len(centers), shape.r
    rows, columns = pixel_range(shape.y, r, S), pixel_range(shape.x, r, S)
    x = (centers[None, columns] - shape.x) / r                    # (1, w)   in radii
    y = (shape.y - centers[rows, None]) / r                       # (h, 1)   up from here on
    d = OUTLINES[shape.kind](*rotate(x, y, shape.angle))          # (h, w)   in radii
    edge = d * (r * S)                                            # in pixels
    inner = coverage(edge + 0.1 * r * S)                          # without a rim of 0.1 radii

    # The light comes from the upper left, so the shadow is on the lower right. The second term
    # shortens the shadow near pointed corners.
    outside = np.maximum(d, 3 * length(x, y) - 3)
    shadow = np.clip(1 - outside / 0.28, 0, 1) ** 2 * np.clip(0.4 + 0.3 * (x - y), 0, 0.6)

    period = 0.07 + 0.24 * r           # visible at 32 pixels, and several periods in a shape
    texture_x, texture_y = rotate(x * (r / period), y * (r / period), shape.texture_angle)
    pattern = texture(shape.texture, texture_x, texture_y, period * S)
    color = rgb(shape.color)
    # the texture is on the inner part only; its second color is nearly white
    fill = lerp(color, lerp(color, 255, 0.62), inner * pattern)   # (3, h, w)
    fill *= (0.62 + 0.38 * inner) * (1 + 0.11 * (y - x))          # dark rim, bright upper left

    view = canvas[:, rows, columns]    # a view: writing changes the canvas
    view *= 1 - shadow
    view += (fill - view) * coverage(edge)


def pixel_range(center, r, S):
    """-> slice of the pixels along one axis that a shape and its shadow can reach"""
    reach = 1.3 * r                    # the shadow ends 0.28 radii outside the outline
    return slice(max(0, math.floor((center - reach) * S)), math.ceil((center + reach) * S))


# ---------------------------------------------------------------- random scenes
def choose(rng, items):
    """-> one of the items, all with the same probability"""
    return items[int(rng.random() * len(items))]


def place_disc(rng, r, others):
    """A random disc inside the image that does not touch the others -> x, y, r

    The radius shrinks with every failed attempt, so the loop always ends.
    """
    while True:
        x = lerp(r + MARGIN, 1 - r - MARGIN, rng.random())
        y = lerp(r + MARGIN, 1 - r - MARGIN, rng.random())
        if all(math.hypot(x - o.x, y - o.y) > r + o.r + MARGIN for o in others):
            return x, y, r
        r *= 0.97


def scene(index, seed=0, objects=(1, 3), size=(0.3, 0.6), captions="some"):
    """-> Background, [Shape, ...] with the main shape first, caption. Arguments as in `draw`."""
    rng = np.random.default_rng((seed, index))
    # permutations: all shapes and the background differ in color, and the shapes in kind
    kinds = rng.permutation(len(KINDS))
    names = list(COLORS)
    colors = [names[i] for i in rng.permutation(len(names))]
    background = Background(
        choose(rng, list(TONES)), colors[-1], choose(rng, BACKGROUND_TEXTURES), rng.random(),
        rng.random(), lerp(0.13, 0.26, rng.random()), lerp(-math.pi, math.pi, rng.random()))
    shapes = []
    for i in range(objects[0] + int(rng.random() * (objects[1] - objects[0] + 1))):
        if shapes:
            r = lerp(0.5, 0.7, rng.random()) * shapes[0].r        # the main shape is the largest
        else:
            r = lerp(*size, rng.random()) / 2
        shapes.append(Shape(
            KINDS[kinds[i]], colors[i], choose(rng, TEXTURES), *place_disc(rng, r, shapes),
            lerp(-MAX_TILT, MAX_TILT, rng.random()), lerp(0, math.pi, rng.random())))
    return background, shapes, caption(rng, background, shapes, captions)


# ---------------------------------------------------------------- captions
def noun_phrase(*words):
    """'large', 'plain', 'orange', 'star' -> 'a large orange star'"""
    phrase = " ".join(word for word in words if word != "plain")
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def describe(rng, shape, captions):
    """'a heart', 'a red heart', 'a large striped red heart': the kind, and some properties

    captions  as in `draw`
    """
    size = "plain"                     # noun_phrase leaves out this word
    if 2 * shape.r > LARGE:
        size = "large"
    elif 2 * shape.r < SMALL:
        size = "small"
    words = [word for word in (size, shape.texture) if rng.random() < P_MENTION]
    mentions_color = rng.random() < P_MENTION          # drawn in any case: same images for all
    if captions == "neither":
        return noun_phrase(*words, "shape")
    if mentions_color or captions == "both":
        words.append(shape.color)
    return noun_phrase(*words, shape.kind)


def relation(one, other):
    """Position of `one` relative to `other`, along the axis on which they are farther apart"""
    dx, dy = one.x - other.x, one.y - other.y
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def caption(rng, background, shapes, captions):
    """An English caption. It names the main shape first, and says where it is from the others."""
    main, *others = shapes
    relations = [(relation(main, other), describe(rng, other, captions)) for other in others]
    if rng.random() < 0.5:             # a circle above a star and left of a ring
        parts = [f"{where} {other}" for where, other in relations]
        rest = ""
    else:                              # a circle with a star below it and a ring to its right
        parts = [f"{other} {CONVERSE[where]}" for where, other in relations]
        rest = "with " if parts else ""
    rest += " and ".join(parts)
    templates = BACKGROUND_TEMPLATES if rng.random() < P_MENTION else TEMPLATES
    template = choose(rng, templates)
    words = noun_phrase(background.tone, background.color, background.texture, "background")
    shapes = f"{describe(rng, main, captions)} {rest}".strip()
    return template.format(shapes=shapes, background=words)


# ---------------------------------------------------------------- an image
def draw(index, side, seed=0, objects=(1, 3), size=(0.3, 0.6), label="kind", captions="some"):
    """Image number `index` -> image (side, side, 3) uint8, caption, label (index into CLASSES)

    side      in pixels; the scene does not depend on it
    seed      0..2**32-1; each seed is another data set
    objects   (smallest, largest) number of shapes, within 1..3
    size      (smallest, largest) diameter of the main shape, as a fraction of the side
    label     'kind': 10 classes; 'kind+color': 80 classes
    captions  some: always the kind, at times the color ("a red heart"); both: always the kind and
              the color; neither: never ("a striped shape"); shuffled: as both, but of image
              index + 1. The images do not depend on it. A background may be described with its
              own color, which differs from that of the shape.
    ValueError if an argument is out of range.
    """
    # numpy integers are accepted, floats are not
    index, side, seed = (operator.index(n) for n in (index, side, seed))
    if index < 0 or not 0 <= seed < 2 ** 32:
        raise ValueError(f"found index {index} and seed {seed}; the index must be 0 or more, and "
                         f"the seed must be 0 or more and below 2**32")
    if side < 8:
        raise ValueError(f"a side of {side} pixels is too small; give 8 or more (32 to 256 are "
                         f"recommended)")
    if not 1 <= objects[0] <= objects[1] <= 3:
        raise ValueError(f"objects={objects} must be (smallest, largest) number of shapes within "
                         f"1..3, for example (1, 3)")
    if not 0.1 <= size[0] <= size[1] <= 0.9:
        raise ValueError(f"size={size} must be (smallest, largest) diameter within 0.1..0.9 of the "
                         f"side, for example (0.3, 0.6)")
    if objects[1] > 1 and size[1] > 0.7:
        raise ValueError(f"a main shape of size {size[1]} leaves no space for other shapes; give "
                         f"objects=(1, 1), or a size of at most 0.7")
    if label not in CLASSES or captions not in CAPTIONS:
        raise ValueError(f"label={label}, captions={captions}: label must be one of "
                         f"{', '.join(CLASSES)}, and captions one of {', '.join(CAPTIONS)}")
    mentioned = "both" if captions == "shuffled" else captions
    background, shapes, text = scene(index, seed, objects, size, mentioned)
    if captions == "shuffled":
        text = scene(index + 1, seed, objects, size, mentioned)[2]
    centers = (np.arange(side, dtype=np.float32) + 0.5) / side    # of the pixels, in 0..1
    canvas = draw_background(background, centers)
    for shape in shapes:
        draw_shape(shape, centers, canvas)
    image = np.clip(canvas.round(), 0, 255).astype(np.uint8)      # (3, side, side)
    name = shapes[0].kind if label == "kind" else f"{shapes[0].color} {shapes[0].kind}"
    return np.stack(image, -1), text, CLASSES[label].index(name)
