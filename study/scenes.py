"""Small pictures of coloured shapes, and English that describes them.

    scene = random_scene(random.Random(0))     # what is in the picture
    image, owner = render(scene)               # 64 x 64 pixels, and which object each pixel belongs to
    caption(scene, rng)                        # one of very many sentences about it
    named("a crimson disc")                    # {("red", "circle")}: what a sentence claims

No caption says left or right, so mirroring a picture leaves its captions true.
"""

import math
import random
import re

import numpy as np
from PIL import Image, ImageDraw

SIZE, SUPERSAMPLE = 64, 3

# The first word is the usual one; the others are synonyms, drawn now and then. The first keys of both tables
# are drawn most often, the first shape twenty times as often as the last.
COLOURS = {
    "red": ["red", "crimson", "scarlet"],
    "blue": ["blue", "navy blue"],
    "green": ["green", "emerald"],
    "yellow": ["yellow", "golden"],
    "brown": ["brown", "chocolate"],
    "pink": ["pink", "rosy"],
    "orange": ["orange", "tangerine"],
    "purple": ["purple", "violet"],
    "cyan": ["cyan", "turquoise"],
    "beige": ["beige", "sandy"],
    "lime": ["lime"],
    "maroon": ["maroon", "burgundy"],
    "teal": ["teal"],
    "magenta": ["magenta", "fuchsia"],
    "olive": ["olive"],
}
SHAPES = {
    "circle": ["circle", "disc", "dot"],
    "square": ["square", "block", "box"],
    "house": ["house", "hut"],
    "star": ["star", "pointed star"],
    "tree": ["tree", "fir tree"],
    "triangle": ["triangle", "wedge"],
    "fish": ["fish"],
    "heart": ["heart", "love heart"],
    "arrow": ["arrow"],
    "ring": ["ring", "hoop", "donut"],
    "boat": ["boat", "ship"],
    "cross": ["cross", "plus sign"],
    "flower": ["flower", "blossom"],
    "cat": ["cat", "kitten"],
    "moon": ["moon", "crescent"],
    "leaf": ["leaf"],
    "bottle": ["bottle"],
    "sun": ["sun"],
    "diamond": ["diamond", "lozenge"],
    "crown": ["crown"],
    "drop": ["drop", "droplet"],
    "mushroom": ["mushroom", "toadstool"],
    "bolt": ["bolt", "flash"],
    "oval": ["oval", "ellipse"],
    "bar": ["bar", "plank"],
    "gear": ["gear", "cog"],
    "pie": ["pie", "cake"],
    "dome": ["dome"],
    "frame": ["frame"],
    "pentagon": ["pentagon"],
    "hourglass": ["hourglass"],
    "stairs": ["stairs", "steps"],
    "bow tie": ["bow tie"],
    "chevron": ["chevron"],
    "corner": ["corner"],
    "tee": ["tee"],
}
SIZES = {"big": ["big", "large"], "small": ["small", "little", "tiny"]}
BACKGROUNDS = {"white": ["white", "bright"], "black": ["black", "dark"], "gray": ["gray", "grey"]}

RGB = {
    "red": (215, 30, 35), "green": (35, 150, 60), "blue": (35, 65, 205), "yellow": (245, 220, 40),
    "orange": (245, 135, 20), "purple": (125, 45, 165), "pink": (245, 140, 190), "brown": (115, 70, 35),
    "cyan": (70, 215, 230), "beige": (225, 195, 150), "lime": (165, 230, 60), "maroon": (110, 10, 50),
    "teal": (15, 115, 125), "magenta": (225, 25, 165), "olive": (125, 125, 30),
    "white": (244, 244, 244), "black": (18, 18, 18), "gray": (150, 150, 150),
}


# ------------------------------------------------------------------------------------------ a scene


def draw_from(table, flat, rng):
    """A key of a table; the first ones are more frequent, as words in a language are (Zipf's law).

    Weights are 1 / (rank + flat)."""
    return rng.choices(list(table), [1 / (rank + flat) for rank in range(len(table))])[0]


def vary(colour, most, rng):
    """A colour near the given one: each channel moved by up to `most` of 255 levels."""
    return [max(0, min(255, round(channel + rng.uniform(-most, most)))) for channel in colour]


def draw_spots(arrangement, rng):
    """Where objects are, so that they do not overlap: [(size, radius, x, y)], lengths in pixels."""
    if arrangement == "alone":
        size = rng.choice(list(SIZES))
        radius = rng.uniform(19, 26) if size == "big" else rng.uniform(11, 14)
        return [(size, radius, rng.uniform(28, 36), rng.uniform(28, 36))]
    spots = []
    for along in (rng.uniform(15.5, 17.5), rng.uniform(46.5, 48.5)):
        size = rng.choice(list(SIZES))
        radius = rng.uniform(13, 15) if size == "big" else rng.uniform(8.5, 10)
        across = rng.uniform(26, 38)
        x, y = (across, along) if arrangement == "above" else (along, across)
        spots.append((size, radius, x, y))
    return spots


def random_scene(rng):
    """One or two objects: {"background", "shade", "arrangement", "objects": [{"colour", "shape", "x", ...}]}.

    Of two objects, the first is the upper one when the arrangement is "above". Lengths are in pixels."""
    background = rng.choice(list(BACKGROUNDS))
    arrangement = "alone" if rng.random() < 0.35 else rng.choice(["above", "beside"])
    objects = []
    for size, radius, x, y in draw_spots(arrangement, rng):
        colour = draw_from(COLOURS, 4, rng)
        shape = draw_from(SHAPES, 2, rng)
        shade = vary(RGB[colour], 14, rng)
        turn = rng.uniform(-12, 12)
        looks = dict(colour=colour, shape=shape, size=size)
        objects.append(looks | dict(x=x, y=y, radius=radius, turn=turn, shade=shade))
    shade = vary(RGB[background], 10, rng)
    return dict(background=background, shade=shade, arrangement=arrangement, objects=objects)


def truth(scene):
    """-> [[colour, shape], ...]"""
    return [[thing["colour"], thing["shape"]] for thing in scene["objects"]]


# ----------------------------------------------------------------------------------------- outlines
# Polygons around the origin, which fit a circle of radius 1; y points down. Written as in SVG: "x,y x,y".

OUTLINES = {
    "bolt": "0.25,-1 -0.6,0.1 -0.05,0.1 -0.25,1 0.6,-0.2 0.05,-0.2 0.5,-1",
    "boat": "-1,0.4 -0.08,0.4 -0.08,-1 0.8,0.2 0.08,0.2 0.08,0.4 1,0.4 0.6,0.9 -0.6,0.9",
    "corner": "-0.8,-0.9 -0.25,-0.9 -0.25,0.35 0.85,0.35 0.85,0.9 -0.8,0.9",
    "stairs": "-0.9,0.9 -0.9,0.3 -0.3,0.3 -0.3,-0.3 0.3,-0.3 0.3,-0.9 0.9,-0.9 0.9,0.9",
    "frame": "-0.85,-0.85 0.85,-0.85 0.85,0.85 -0.85,0.85 -0.85,-0.85 -0.45,-0.45"
             " -0.45,0.45 0.45,0.45 0.45,-0.45 -0.45,-0.45",
    "square": "-0.82,-0.82 0.82,-0.82 0.82,0.82 -0.82,0.82",
    "triangle": "0,-1 0.95,0.75 -0.95,0.75",
    "cross": "-0.32,-1 0.32,-1 0.32,-0.32 1,-0.32 1,0.32 0.32,0.32 0.32,1"
             " -0.32,1 -0.32,0.32 -1,0.32 -1,-0.32 -0.32,-0.32",
}
RIGHT_HALVES = {  # of what is symmetrical, from the top down
    "diamond": "0,-1 0.7,0 0,1",
    "arrow": "0,-1 0.8,-0.1 0.3,-0.1 0.3,1",
    "house": "0,-1 0.9,-0.1 0.65,-0.1 0.65,0.9",
    "tree": "0,-1 0.5,-0.3 0.25,-0.3 0.8,0.5 0.15,0.5 0.15,1",
    "crown": "0,-0.85 0.45,0.05 0.95,-0.6 0.85,0.75",
    "bottle": "0.18,-1 0.18,-0.45 0.48,-0.1 0.48,1",
    "bar": "1,-0.28 1,0.28",
    "hourglass": "0.75,-0.95 0.12,0 0.75,0.95",
    "bow tie": "0,-0.18 0.95,-0.7 0.95,0.7 0,0.18",
    "chevron": "0,-0.75 0.95,0.35 0.95,0.9 0,-0.1",
    "tee": "0.9,-0.9 0.9,-0.35 0.28,-0.35 0.28,0.95",
}


def points(text):
    """Written points -> [(x, y), ...]"""
    return [tuple(map(float, point.split(","))) for point in text.split()]


def mirrored(right):
    """A right half and its mirror image."""
    return right + [(-x, y) for x, y in reversed(right)]


def arc(begin, end, steps, radius=1.0):
    """Points on a circle between two angles, in degrees."""
    curve = []
    for i in range(steps + 1):
        angle = math.radians(begin + (end - begin) * i / steps)
        curve.append((radius * math.cos(angle), radius * math.sin(angle)))
    return curve


def around(steps):
    """Angles of one turn."""
    return [2 * math.pi * i / steps for i in range(steps)]


def polar(radius, steps):
    """A curve whose radius is a function of the angle."""
    return [(radius(t) * math.cos(t), radius(t) * math.sin(t)) for t in around(steps)]


def moved(curve, wide=1.0, high=1.0, right=0.0, down=0.0):
    """Points stretched, then shifted."""
    return [(wide * x + right, high * y + down) for x, y in curve]


def spiked(spikes, valley, peak_first=0):
    """(angle, radius) of peaks and valleys in turn, as those of a star."""
    for i in range(2 * spikes):
        yield i * math.pi / spikes, 1.05 if i % 2 == peak_first else valley


def heart():
    """The usual curve, https://mathworld.wolfram.com/HeartCurve.html, scaled down."""
    curve = []
    for t in around(48):
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        curve.append((math.sin(t) ** 3, -y / 16))
    return curve


def leaf():
    angles = [math.pi * i / 24 for i in range(25)]
    return mirrored([(0.5 * math.sin(t), -math.cos(t)) for t in angles])


def drop():
    return [(0.85 * math.sin(t) * math.sin(t / 2) ** 1.5, -math.cos(t)) for t in around(48)]


def sun():
    return [(radius * math.cos(t), radius * math.sin(t)) for t, radius in spiked(12, 0.66, 1)]


def star():
    return [(radius * math.sin(t), -radius * math.cos(t)) for t, radius in spiked(5, 0.42)]


def fish():
    body = moved(arc(22, 338, 40), 0.68, 0.5, -0.3)
    tail = points("1,-0.55 0.8,0 1,0.55")
    return body + tail


def mushroom():
    cap = moved(arc(180, 360, 30), down=0.1)
    stem = points("0.28,0.1 0.28,0.95 -0.28,0.95 -0.28,0.1")
    return cap + stem


def cat():
    ears = points("-0.85,-1 -0.3,-0.5 0.3,-0.5 0.85,-1")
    head = moved(arc(-15, 195, 30), 0.88, 0.75, down=0.15)
    return ears + head


def ring():
    """Out, and back along a slit without width."""
    return arc(0, 360, 48) + arc(360, 0, 48, 0.55)


def moon():
    """A disc without a disc at its side."""
    return arc(50, 310, 40) + moved(arc(289, 71, 40), 0.81, 0.81, 0.38)


CURVES = {
    "circle": lambda: arc(0, 360, 48, 0.95),
    "oval": lambda: moved(arc(0, 360, 48), high=0.55),
    "dome": lambda: moved(arc(180, 360, 30), down=0.45),
    "pie": lambda: [(0, 0), *arc(35, 325, 40)],
    "pentagon": lambda: arc(-90, 198, 4),
    "flower": lambda: polar(lambda t: 0.68 + 0.32 * math.cos(5 * t), 60),
    "gear": lambda: polar(lambda t: 1.0 if math.sin(8 * t) > 0 else 0.72, 96),
    "heart": heart, "leaf": leaf, "drop": drop, "sun": sun, "star": star, "fish": fish,
    "mushroom": mushroom, "cat": cat, "ring": ring, "moon": moon,
}


def outline(shape):
    """The polygon of a shape: [(x, y), ...]"""
    if shape in OUTLINES:
        return points(OUTLINES[shape])
    if shape in RIGHT_HALVES:
        return mirrored(points(RIGHT_HALVES[shape]))
    if shape in CURVES:
        return CURVES[shape]()
    raise ValueError(f"no outline for shape {shape!r}")


def place(thing):
    """The polygon of an object in its picture, at SUPERSAMPLE times the size."""
    turn = math.radians(thing["turn"])
    cos = math.cos(turn)
    sin = math.sin(turn)
    scale = thing["radius"] * SUPERSAMPLE
    left = thing["x"] * SUPERSAMPLE
    top = thing["y"] * SUPERSAMPLE
    corners = outline(thing["shape"])
    return [(left + scale * (cos * x - sin * y), top + scale * (sin * x + cos * y)) for x, y in corners]


def render(scene):
    """-> (image (64, 64, 3) uint8, owner (64, 64) uint8: 0 for background, 1 and 2 for the objects)"""
    large = SIZE * SUPERSAMPLE
    image = Image.new("RGB", (large, large), tuple(scene["shade"]))
    owner = Image.new("L", (large, large), 0)
    for number, thing in enumerate(scene["objects"], 1):
        polygon = place(thing)
        ImageDraw.Draw(image).polygon(polygon, fill=tuple(thing["shade"]))
        ImageDraw.Draw(owner).polygon(polygon, fill=number)
    return np.asarray(image.reduce(SUPERSAMPLE)), np.asarray(owner)[1::SUPERSAMPLE, 1::SUPERSAMPLE]


# ------------------------------------------------------------------------------------------ English

OPENINGS = ["{}", "there is {}", "a picture of {}", "this is {}", "a drawing of {}", "we see {}"]
GROUNDS = [" on a {} background", " on {}", " in front of a {} wall"]
ABOVE = ["{0} above {1}", "{0} over {1}", "{1} below {0}", "{1} under {0}"]
BESIDE = ["{0} next to {1}", "{0} beside {1}", "{0} near {1}"]


def pick(rng, words):
    """The usual word three times out of four, else a synonym."""
    return words[0] if len(words) == 1 or rng.random() < 0.75 else rng.choice(words[1:])


def article(phrase):
    """a or an, and the phrase"""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def describe(thing, rng):
    """One object as a noun phrase, with its colour and shape, and some of them with their size."""
    colour = pick(rng, COLOURS[thing["colour"]])
    shape = pick(rng, SHAPES[thing["shape"]])
    size = pick(rng, SIZES[thing["size"]])
    r = rng.random()
    if r < 0.58:
        return article(f"{colour} {shape}")
    if r < 0.88:
        return article(f"{size} {colour} {shape}")
    if r < 0.94:
        return article(f"{shape} that is {colour}")
    return article(f"{size} {shape} in {colour}")


def relate(scene, names, rng):
    """Two objects in one phrase."""
    above = scene["arrangement"] == "above"
    a, b = names if above or rng.random() < 0.5 else names[::-1]
    if rng.random() < 0.4:
        return f"{a} and {b}" if rng.random() < 0.6 else f"{b} and {a}"
    return rng.choice(ABOVE if above else BESIDE).format(a, b)


def caption(scene, rng):
    """One sentence about the scene: lower case, no punctuation."""
    names = [describe(thing, rng) for thing in scene["objects"]]
    body = names[0] if scene["arrangement"] == "alone" else relate(scene, names, rng)
    if rng.random() < 0.35:
        body += rng.choice(GROUNDS).format(pick(rng, BACKGROUNDS[scene["background"]]))
    return pick(rng, OPENINGS).format(body)


def tags(scene, rng):
    """Key words of the scene in any order, as people write them under pictures."""
    words = []
    for thing in scene["objects"]:
        both = [pick(rng, COLOURS[thing["colour"]]), pick(rng, SHAPES[thing["shape"]])]
        size = [rng.choice(SIZES[thing["size"]])] * (rng.random() < 0.4)
        words.append(size + (both if rng.random() < 0.7 else both[::-1]))
    if len(words) == 2 and rng.random() < 0.5:
        between = {"above": ["above", "over"], "beside": ["beside", "next to"]}
        words.insert(1, [rng.choice(between[scene["arrangement"]])])
    elif rng.random() < 0.5:
        rng.shuffle(words)
    if rng.random() < 0.4:
        words.insert(rng.choice([0, len(words)]), [pick(rng, BACKGROUNDS[scene["background"]])])
    return " ".join(word for group in words for word in group)


# ---------------------------------------------------------------------------------- reading English


def one_of(table):
    """A pattern for any word of a table, longer ones first: "navy blue" before "blue"."""
    return "|".join(sorted((word for words in table.values() for word in words), key=len, reverse=True))


CANONICAL = {word: key for table in (COLOURS, SHAPES) for key, words in table.items() for word in words}
COLOUR = one_of(COLOURS)
SHAPE = one_of(SHAPES)
CLAIMS = re.compile(rf"\b(?:({COLOUR}) ({SHAPE})|({SHAPE}) (?:that is|in) ({COLOUR}))\b")
WORDS = re.compile(rf"\b(?:{COLOUR}|{SHAPE})\b")


def mentioned(text):
    """The colours and shapes that a caption mentions: "a crimson disc" -> {"red", "circle"}"""
    return {CANONICAL[word] for word in WORDS.findall(text)}


def named(text):
    """The (colour, shape) pairs that a caption claims: "a crimson disc" -> {("red", "circle")}"""
    claims = CLAIMS.finditer(text)
    return {(CANONICAL[match[1] or match[4]], CANONICAL[match[2] or match[3]]) for match in claims}


def main():
    """A contact sheet to look at, scenes.png, and its captions, tags and truths."""
    rng = random.Random(0)
    sheet = Image.new("RGB", (8 * SIZE, 4 * SIZE))
    for i in range(32):
        scene = random_scene(rng)
        sheet.paste(Image.fromarray(render(scene)[0]), (i % 8 * SIZE, i // 8 * SIZE))
        print(caption(scene, rng), "|", tags(scene, rng), "|", *map(tuple, truth(scene)))
    sheet.save("scenes.png")


if __name__ == "__main__":
    main()
