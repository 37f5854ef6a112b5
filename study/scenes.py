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

# The first word is the usual one; the others are synonyms, drawn now and then. Both tables stand in the order of how often
# random_scene draws them: the first shape is twenty times as frequent as the last.
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
    "cyan": (70, 215, 230), "beige": (225, 195, 150), "lime": (165, 230, 60), "maroon": (110, 10, 50), "teal": (15, 115, 125),
    "magenta": (225, 25, 165), "olive": (125, 125, 30),
    "white": (244, 244, 244), "black": (18, 18, 18), "gray": (150, 150, 150),
}


def draw_from(table, flat, rng):
    """A key of a table, the first ones more often, as words in a language (Zipf's law): weights 1 / (rank + flat)."""
    return rng.choices(list(table), [1 / (rank + flat) for rank in range(len(table))])[0]


def random_scene(rng):
    """One or two objects that do not overlap: {"background", "arrangement", "objects": [{colour, shape, size, x, y, ...}]}.

    Of two objects, the first is the upper one when the arrangement is "above". Lengths are in pixels.
    """
    background = rng.choice(list(BACKGROUNDS))
    if rng.random() < 0.35:
        size = rng.choice(list(SIZES))
        radius = rng.uniform(19, 26) if size == "big" else rng.uniform(11, 14)
        spots, arrangement = [(size, radius, rng.uniform(28, 36), rng.uniform(28, 36))], "alone"
    else:
        arrangement = rng.choice(["above", "beside"])
        spots = []
        for along in (rng.uniform(15.5, 17.5), rng.uniform(46.5, 48.5)):
            size = rng.choice(list(SIZES))
            radius = rng.uniform(13, 15) if size == "big" else rng.uniform(8.5, 10)
            across = rng.uniform(26, 38)
            spots.append((size, radius, *((across, along) if arrangement == "above" else (along, across))))
    objects = []
    for size, radius, x, y in spots:
        colour, shape = draw_from(COLOURS, 4, rng), draw_from(SHAPES, 2, rng)
        shade = [max(0, min(255, round(c + rng.uniform(-14, 14)))) for c in RGB[colour]]
        objects.append(dict(colour=colour, shape=shape, size=size, x=x, y=y, radius=radius, turn=rng.uniform(-12, 12), shade=shade))
    shade = [max(0, min(255, round(c + rng.uniform(-10, 10)))) for c in RGB[background]]
    return dict(background=background, shade=shade, arrangement=arrangement, objects=objects)


OUTLINES = {
    "bolt": [(0.25, -1), (-0.6, 0.1), (-0.05, 0.1), (-0.25, 1), (0.6, -0.2), (0.05, -0.2), (0.5, -1)],
    "boat": [(-1, 0.4), (-0.08, 0.4), (-0.08, -1), (0.8, 0.2), (0.08, 0.2), (0.08, 0.4), (1, 0.4), (0.6, 0.9), (-0.6, 0.9)],
    "corner": [(-0.8, -0.9), (-0.25, -0.9), (-0.25, 0.35), (0.85, 0.35), (0.85, 0.9), (-0.8, 0.9)],
    "stairs": [(-0.9, 0.9), (-0.9, 0.3), (-0.3, 0.3), (-0.3, -0.3), (0.3, -0.3), (0.3, -0.9), (0.9, -0.9), (0.9, 0.9)],
}
RIGHT_HALVES = {  # from the top down
    "diamond": [(0, -1), (0.7, 0), (0, 1)],
    "arrow": [(0, -1), (0.8, -0.1), (0.3, -0.1), (0.3, 1)],
    "house": [(0, -1), (0.9, -0.1), (0.65, -0.1), (0.65, 0.9)],
    "tree": [(0, -1), (0.5, -0.3), (0.25, -0.3), (0.8, 0.5), (0.15, 0.5), (0.15, 1)],
    "crown": [(0, -0.85), (0.45, 0.05), (0.95, -0.6), (0.85, 0.75)],
    "bottle": [(0.18, -1), (0.18, -0.45), (0.48, -0.1), (0.48, 1)],
    "bar": [(1, -0.28), (1, 0.28)],
    "hourglass": [(0.75, -0.95), (0.12, 0), (0.75, 0.95)],
    "bow tie": [(0, -0.18), (0.95, -0.7), (0.95, 0.7), (0, 0.18)],
    "chevron": [(0, -0.75), (0.95, 0.35), (0.95, 0.9), (0, -0.1)],
    "tee": [(0.9, -0.9), (0.9, -0.35), (0.28, -0.35), (0.28, 0.95)],
}


def outline(shape):
    """The shape as a polygon around the origin that fits a circle of radius 1; y points down."""
    arc = lambda a, b, n, r=1.0: [(r * math.cos(math.radians(a + (b - a) * i / n)), r * math.sin(math.radians(a + (b - a) * i / n)))
                                  for i in range(n + 1)]
    polar = lambda radius, n: [(radius(t) * math.cos(t), radius(t) * math.sin(t)) for t in (2 * math.pi * i / n for i in range(n))]
    mirrored = lambda right: right + [(-x, y) for x, y in reversed(right)]
    if shape in OUTLINES:
        return OUTLINES[shape]
    if shape in RIGHT_HALVES:
        return mirrored(RIGHT_HALVES[shape])
    if shape == "oval":
        return [(x, 0.55 * y) for x, y in arc(0, 360, 48)]
    if shape == "dome":
        return [(x, y + 0.45) for x, y in arc(180, 360, 30)]
    if shape == "pie":
        return [(0, 0), *arc(35, 325, 40)]
    if shape == "pentagon":
        return arc(-90, 198, 4)
    if shape == "drop":
        return [(0.85 * math.sin(t) * math.sin(t / 2) ** 1.5, -math.cos(t)) for t in (2 * math.pi * i / 48 for i in range(48))]
    if shape == "leaf":
        return mirrored([(0.5 * math.sin(math.pi * i / 24), -math.cos(math.pi * i / 24)) for i in range(25)])
    if shape == "flower":
        return polar(lambda t: 0.68 + 0.32 * math.cos(5 * t), 60)
    if shape == "gear":
        return polar(lambda t: 1.0 if math.sin(8 * t) > 0 else 0.72, 96)
    if shape == "sun":
        return [((1.05 if i % 2 else 0.66) * math.cos(i * math.pi / 12), (1.05 if i % 2 else 0.66) * math.sin(i * math.pi / 12)) for i in range(24)]
    if shape == "fish":                                                  # a body, and the tail
        return [(0.68 * x - 0.3, 0.5 * y) for x, y in arc(22, 338, 40)] + [(1, -0.55), (0.8, 0), (1, 0.55)]
    if shape == "mushroom":
        return [(x, y + 0.1) for x, y in arc(180, 360, 30)] + [(0.28, 0.1), (0.28, 0.95), (-0.28, 0.95), (-0.28, 0.1)]
    if shape == "cat":                                                   # a head with ears
        return [(-0.85, -1), (-0.3, -0.5), (0.3, -0.5), (0.85, -1)] + [(0.88 * x, 0.75 * y + 0.15) for x, y in arc(-15, 195, 30)]
    if shape == "frame":
        return [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85), (-0.85, -0.85),
                (-0.45, -0.45), (-0.45, 0.45), (0.45, 0.45), (0.45, -0.45), (-0.45, -0.45)]
    if shape == "circle":
        return arc(0, 360, 48, 0.95)
    if shape == "square":
        return [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)]
    if shape == "triangle":
        return [(0, -1), (0.95, 0.75), (-0.95, 0.75)]
    if shape == "star":
        return [((1.05 if i % 2 == 0 else 0.42) * math.sin(i * math.pi / 5), -(1.05 if i % 2 == 0 else 0.42) * math.cos(i * math.pi / 5))
                for i in range(10)]
    if shape == "heart":
        ts = [2 * math.pi * i / 48 for i in range(48)]
        return [(math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16) for t in ts]
    if shape == "cross":
        a, b = 1.0, 0.32
        return [(-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b), (b, a), (-b, a), (-b, b), (-a, b), (-a, -b), (-b, -b)]
    if shape == "ring":                                                  # out and back along a slit without width
        return arc(0, 360, 48) + arc(360, 0, 48, 0.55)
    if shape == "moon":                                                  # a disc less a disc that is moved to its side
        return arc(50, 310, 40) + [(0.38 + x * 0.81, y * 0.81) for x, y in arc(289, 71, 40)]
    raise ValueError(f"no outline for shape {shape!r}")


def render(scene):
    """-> (image (64, 64, 3) uint8, owner (64, 64) uint8: 0 for background, 1 for the first object, 2 for the second)"""
    large = SIZE * SUPERSAMPLE
    image, owner = Image.new("RGB", (large, large), tuple(scene["shade"])), Image.new("L", (large, large), 0)
    for number, o in enumerate(scene["objects"], 1):
        turn = math.radians(o["turn"])
        c, s, scale = math.cos(turn), math.sin(turn), o["radius"] * SUPERSAMPLE
        points = [(o["x"] * SUPERSAMPLE + scale * (c * x - s * y), o["y"] * SUPERSAMPLE + scale * (s * x + c * y))
                  for x, y in outline(o["shape"])]
        ImageDraw.Draw(image).polygon(points, fill=tuple(o["shade"]))
        ImageDraw.Draw(owner).polygon(points, fill=number)
    return np.asarray(image.reduce(SUPERSAMPLE)), np.asarray(owner)[1::SUPERSAMPLE, 1::SUPERSAMPLE]


def truth(scene):
    """-> [[colour, shape], ...]"""
    return [[o["colour"], o["shape"]] for o in scene["objects"]]


# ---------------------------------------------------------------- English

def pick(rng, words):
    """The usual word three times out of four, else a synonym."""
    return words[0] if len(words) == 1 or rng.random() < 0.75 else rng.choice(words[1:])


def article(phrase):
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def describe(o, rng):
    """One object as a noun phrase; colour and shape are nearly always named."""
    colour, shape, size = pick(rng, COLOURS[o["colour"]]), pick(rng, SHAPES[o["shape"]]), pick(rng, SIZES[o["size"]])
    r = rng.random()
    if r < 0.58:
        return article(f"{colour} {shape}")
    if r < 0.88:
        return article(f"{size} {colour} {shape}")
    if r < 0.94:
        return article(f"{shape} that is {colour}")
    return article(f"{size} {shape} in {colour}")


def caption(scene, rng):
    """One sentence about the scene: lower case, no punctuation."""
    names = [describe(o, rng) for o in scene["objects"]]
    if scene["arrangement"] == "alone":
        body = names[0]
    else:
        a, b = names if scene["arrangement"] == "above" or rng.random() < 0.5 else names[::-1]
        if rng.random() < 0.4:
            body = f"{a} and {b}" if rng.random() < 0.6 else f"{b} and {a}"
        elif scene["arrangement"] == "above":
            body = rng.choice([f"{a} above {b}", f"{a} over {b}", f"{b} below {a}", f"{b} under {a}"])
        else:
            body = rng.choice([f"{a} next to {b}", f"{a} beside {b}", f"{a} near {b}"])
    if rng.random() < 0.35:
        body += rng.choice([" on a {} background", " on {}", " in front of a {} wall"]).format(pick(rng, BACKGROUNDS[scene["background"]]))
    return pick(rng, ["{}", "there is {}", "a picture of {}", "this is {}", "a drawing of {}", "we see {}"]).format(body)


def tags(scene, rng):
    """Key words of the scene in any order, as people write them under pictures."""
    words = []
    for o in scene["objects"]:
        both = [pick(rng, COLOURS[o["colour"]]), pick(rng, SHAPES[o["shape"]])]
        words.append([rng.choice(SIZES[o["size"]])] * (rng.random() < 0.4) + (both if rng.random() < 0.7 else both[::-1]))
    if len(words) == 2 and rng.random() < 0.5:
        words.insert(1, [rng.choice({"above": ["above", "over"], "beside": ["beside", "next to"]}[scene["arrangement"]])])
    elif rng.random() < 0.5:
        rng.shuffle(words)
    if rng.random() < 0.4:
        words.insert(rng.choice([0, len(words)]), [pick(rng, BACKGROUNDS[scene["background"]])])
    return " ".join(w for group in words for w in group)


CANONICAL = {word: key for table in (COLOURS, SHAPES) for key, words in table.items() for word in words}
_colour, _shape = ("|".join(sorted((w for ws in t.values() for w in ws), key=len, reverse=True)) for t in (COLOURS, SHAPES))
_claims = re.compile(rf"\b(?:({_colour}) ({_shape})|({_shape}) (?:that is|in) ({_colour}))\b")


_words = re.compile(rf"\b(?:{_colour}|{_shape})\b")


def mentioned(text):
    """The colours and shapes that a caption mentions, synonyms resolved: "a crimson disc" -> {"red", "circle"}"""
    return {CANONICAL[word] for word in _words.findall(text)}


def named(text):
    """The (colour, shape) pairs that a caption claims, synonyms resolved: "a crimson disc" -> {("red", "circle")}"""
    return {(CANONICAL[m[1] or m[4]], CANONICAL[m[2] or m[3]]) for m in _claims.finditer(text)}


if __name__ == "__main__":                                               # a contact sheet to look at
    rng = random.Random(0)
    sheet = Image.new("RGB", (8 * SIZE, 4 * SIZE))
    for i in range(32):
        scene = random_scene(rng)
        sheet.paste(Image.fromarray(render(scene)[0]), (i % 8 * SIZE, i // 8 * SIZE))
        print(caption(scene, rng), "|", tags(scene, rng), "|", *map(tuple, truth(scene)))
    sheet.save("scenes.png")
