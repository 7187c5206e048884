"""Data for diffmvae.py: raw data sets to memory-mappable arrays; built-in toy faces and birds.

    python data_prep.py --dataset celeba --raw CelebAMask-HQ   # 128x128 pixels, paper Sec. 4.2
    python data_prep.py --dataset cub --raw FOLDER             # 64x64 pixels, paper Sec. 4.1

`--out` (data/<dataset>) gets:
    image.npy  (N, H, W, 3) uint8   RGB 0..255
    mask.npy   (N, H, W)    uint8   celeba, 0 or 1: the composite of all face parts but the skin
    attr.npy   (N, 18)      uint8   celeba, 0 or 1: the 18 attributes in the order of ATTRIBUTES
    text.json  N lists of 10        cub: the captions, as written but for blanks and U+FFFD
    meta.json                       "split": the rows of each; "attributes": their names;
                                    "mirror": true, mirrored pictures are as good; "names" of items

The toys have texture on purpose: backgrounds out of focus, strands in the hair, woven clothes,
barred wings. No attribute, mask or caption depends on it, so that no z of a few numbers can hold
it; on flat toys a feed-forward decoder could paint everything, which hides what a diffusion
decoder is for.
"""
import argparse
import functools
import json
import math
import multiprocessing
import re
import shutil
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

# The 18 of the 40 attributes that the paper keeps, in file order [Sec. 4.2].
ATTRIBUTES = ("Bald", "Bangs", "Black_Hair", "Blond_Hair", "Brown_Hair", "Bushy_Eyebrows",
              "Eyeglasses", "Gray_Hair", "Heavy_Makeup", "Male", "Mouth_Slightly_Open", "Mustache",
              "Pale_Skin", "Receding_Hairline", "Smiling", "Straight_Hair", "Wavy_Hair",
              "Wearing_Hat")


class UserError(Exception):
    """Something the user can correct; the scripts print it as one line and exit with 2."""


@contextmanager
def user_error(message):
    """Whatever goes wrong inside becomes a UserError: the message, and the error in one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"{message} ({reason})") from None


def exit_code(name, work, *errors):
    """Run work(): -> its result or 0, or 2 after one line on stderr for an error that the user can
    correct."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what cannot be printed ends no run; notebooks lack it
            stream.reconfigure(errors="backslashreplace")
    try:
        return work() or 0
    except (UserError, OSError, MemoryError, KeyboardInterrupt, *errors) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"{name}: {message}", file=sys.stderr)
        return 2


# === §1 Drawing ===

HAIR, CLOTH, PLUMAGE = 1, 2, 3                  # materials that have a texture


class Pen:
    """Draws the same shapes on three canvases, each four times too large: the picture; its mask,
    if `part` is 255 (in the mask) or 0 (skin, which hides what is there); and the material, which
    says where a texture shows. Coordinates are those of a 32x32 picture, moved by (dx, dy)."""

    def __init__(self, background, dx=0.0, dy=0.0):
        self.image = background
        self.mask = Image.new("L", background.size)
        self.material = Image.new("L", background.size)
        self.pens = [ImageDraw.Draw(canvas) for canvas in (self.image, self.mask, self.material)]
        self.unit = background.width / 32
        self.dx = dx
        self.dy = dy

    def draw(self, shape, points, colour, part, material, **options):
        """Draw a shape of ImageDraw on every canvas; None leaves the mask as it is."""
        points = [((x + self.dx) * self.unit, (y + self.dy) * self.unit) for x, y in points]
        for pen, fill in zip(self.pens, (colour, part, material)):
            if fill is not None:
                getattr(pen, shape)(points, fill=fill, **options)

    def ellipse(self, x0, y0, x1, y1, colour, part=None, material=0):
        self.draw("ellipse", [(x0, y0), (x1, y1)], colour, part, material)

    def polygon(self, points, colour, part=None, material=0):
        self.draw("polygon", points, colour, part, material)

    def line(self, points, colour, width, part=None, material=0):
        width = round(width * self.unit) or 1
        self.draw("line", points, colour, part, material, width=width, joint="curve")

    def add_texture(self, material, texture, *options):
        """Add texture(x, y, *options), in grey levels, wherever that material is."""
        y, x = np.nonzero(np.asarray(self.material) == material)  # (n,) each
        grey = texture(x / self.unit, y / self.unit, *options)   # (n,)
        pixels = np.array(self.image)
        pixels[y, x] = (pixels[y, x] + grey[:, None]).clip(0, 255)
        self.image = Image.fromarray(pixels)

    def result(self):
        """-> the picture (size, size, 3) and the mask (size, size) in {0, 1}, both uint8."""
        size = self.image.width // 4
        image = self.image.resize((size, size), Image.Resampling.BOX)
        mask = self.mask.resize((size, size), Image.Resampling.BOX)
        return np.asarray(image), (np.asarray(mask) > 127).astype(np.uint8)


def out_of_focus(rng, size, colour, deviation):
    """A background: 6x6 random colours around `colour`, enlarged to a canvas of sides 4 size."""
    coarse = np.array(colour) + rng.normal(0, deviation, (6, 6, 3))
    coarse = Image.fromarray(coarse.clip(0, 255).astype(np.uint8))
    return coarse.resize((4 * size, 4 * size), Image.Resampling.BICUBIC)


def strands(x, y, rng, wave):
    """Hair that falls from above the head, in waves of that amplitude: grey levels at (x, y)."""
    bent = x + wave * np.sin(1.1 * y)
    across = (bent - 16) * 24 / (y + 12)                         # strands spread as they fall
    knots = np.arange(-40, 41)
    return np.interp(across, 1.2 * knots, rng.normal(0, 17, len(knots)))


def fabric(x, y, rng):
    """Clothes with stripes, upright, level or slanting, or a weave: grey levels at (x, y)."""
    x, y = 2 * math.pi / rng.uniform(3.0, 4.5) * np.stack([x, y])  # a stripe has 3 to 4.5 pixels
    kind = rng.choice(["upright", "level", "slanting", "woven"])
    if kind == "woven":
        return 28 * np.sin(x) * np.sin(y)
    return 20 * np.sin({"upright": x, "level": y, "slanting": 0.7 * (x + y)}[kind])


def plumage(x, y, rng, mean):
    """Wings with bars across them, or with speckles, `mean` grey levels lighter on the whole."""
    along = x + 0.25 * y
    across = y - 0.25 * x
    if rng.random() < 0.5:
        return mean + 22 * np.sin(2 * math.pi * along / 3.4)
    row = np.round(across / 2)                                   # speckles alternate by rows
    spots = np.sin(2 * math.pi * along / 3 + math.pi * row)
    return mean + 26 * spots * np.cos(math.pi * across / 2) ** 2


# === §2 Toy faces: every attribute is visible and every mask is exact ===

HAIR_COLOURS = {"Black_Hair": (25, 22, 30), "Blond_Hair": (240, 208, 95),
                "Brown_Hair": (105, 62, 28), "Gray_Hair": (165, 165, 172)}
AUBURN = (190, 60, 25)                          # of hair that no attribute names
SKINS = ((224, 172, 125), (198, 134, 90), (150, 95, 60))
IRISES = ((40, 30, 25), (50, 110, 60), (40, 80, 170))


def draw_attributes(rng):
    """A random set that a picture can show in full, none of them rare: -> {name: bool}."""
    has = {name: False for name in ATTRIBUTES}
    has["Male"] = rng.random() < 0.45
    top = rng.choice(["plain", "Bangs", "Receding_Hairline", "Wearing_Hat", "Bald"],
                     p=[0.34, 0.22, 0.14, 0.17, 0.13])
    chosen = [top]
    if top != "Bald":
        chosen.append(rng.choice(["plain", *HAIR_COLOURS], p=[0.12, 0.25, 0.22, 0.23, 0.18]))
        chosen.append(rng.choice(["plain", "Straight_Hair", "Wavy_Hair"], p=[0.36, 0.30, 0.34]))
    for name in chosen:
        if name != "plain":
            has[str(name)] = True
    for name, rate in (("Bushy_Eyebrows", 0.25), ("Eyeglasses", 0.22), ("Pale_Skin", 0.22),
                       ("Mouth_Slightly_Open", 0.42), ("Smiling", 0.47)):
        has[name] = rng.random() < rate
    has["Heavy_Makeup"] = rng.random() < (0.08 if has["Male"] else 0.5)
    has["Mustache"] = rng.random() < (0.4 if has["Male"] else 0.0)
    return has


def random_colour(rng, low, high):
    """A colour whose three parts are at least `low` and below `high`."""
    return tuple(int(part) for part in rng.integers(low, high, 3))


def darker(colour, factor):
    """The colour, times a factor below one."""
    return tuple(int(factor * part) for part in colour)


def draw_face(has, rng, size=32):
    """Draw one face with the attributes `has`: -> image (size, size, 3), mask (size, size), uint8.
    What no attribute names is random: background, clothes, position, width of the head, eyes,
    and all texture. What is drawn later hides what was drawn before."""
    background = out_of_focus(rng, size, rng.integers(0, 256, 3), 30)
    pen = Pen(background, rng.uniform(-1, 1), rng.uniform(-0.8, 0.8))
    skin = (255, 236, 224) if has["Pale_Skin"] else SKINS[rng.integers(3)]
    hair = AUBURN
    for name, colour in HAIR_COLOURS.items():
        if has[name]:
            hair = colour
    half = rng.uniform(7.2, 8.2)  # half the width of the head
    draw_long_hair(pen, has, hair, half)
    draw_body(pen, has, skin, random_colour(rng, 30, 226))
    draw_head(pen, has, skin, half)
    draw_eyes(pen, has, hair, IRISES[rng.integers(3)])
    draw_mouth(pen, has, hair)
    draw_top(pen, has, hair, half, random_colour(rng, 40, 216))
    pen.add_texture(HAIR, strands, rng, 0.9 if has["Wavy_Hair"] else 0.0)
    pen.add_texture(CLOTH, fabric, rng)
    return pen.result()


def draw_long_hair(pen, has, hair, half):
    """Behind the head: straight curtains, or waves of locks; nothing when the hair is short."""
    left, right = 16 - half, 16 + half
    if has["Straight_Hair"]:
        curtain = [(left - 2, 9), (right + 2, 9), (right + 2, 27), (left - 2, 27)]
        pen.polygon(curtain, hair, 255, HAIR)
    if has["Wavy_Hair"]:
        for y, out in ((7.5, 1.4), (12, 3.2), (16.5, 1.4), (21, 3.2)):
            pen.ellipse(left - out, y, left + 4, y + 6, hair, 255, HAIR)
            pen.ellipse(right - 4, y, right + out, y + 6, hair, 255, HAIR)


def draw_body(pen, has, skin, cloth):
    """Neck and clothes: wide square shoulders for a man, narrow round ones otherwise."""
    neck = 4.6 if has["Male"] else 2.6
    pen.polygon([(16 - neck, 22), (16 + neck, 22), (16 + neck, 34), (16 - neck, 34)], skin, 255)
    if has["Male"]:
        shirt = [(1, 27.5), (11, 27.5), (16, 31.5), (21, 27.5), (31, 27.5), (31, 35), (1, 35)]
        pen.polygon(shirt, cloth, 255, CLOTH)
    else:
        pen.ellipse(7, 28.5, 25, 42, cloth, 255, CLOTH)


def draw_head(pen, has, skin, half):
    """Ears, which are in the mask, and the face's skin, which is not; a man's jaw is square."""
    left, right = 16 - half, 16 + half
    for x in (left, right):
        pen.ellipse(x - 1.4, 13.5, x + 1.4, 18.5, skin, 255)
    pen.ellipse(left, 4.5, right, 26.5, skin, 0)
    if has["Male"]:
        jaw = half - 1
        pen.polygon([(left, 16), (right, 16), (16 + jaw, 24), (13 + jaw, 27), (19 - jaw, 27),
                     (16 - jaw, 24)], skin, 0)
    if has["Heavy_Makeup"]:
        for x in (left + 2.4, right - 2.4):
            pen.ellipse(x - 1.9, 17.2, x + 1.9, 20.4, (240, 85, 125))


def draw_eyes(pen, has, hair, iris):
    """Nose, brows, eyes and glasses, all of them in the mask; eye shadow, which is not."""
    brow = (55, 35, 25) if has["Bald"] else darker(hair, 0.6)
    width, height = (2.4, 10.6) if has["Bushy_Eyebrows"] else (0.8, 11.2)
    black = (15, 15, 15)
    pen.polygon([(16, 15.5), (14.4, 19.6), (17.6, 19.6)], (170, 105, 80), 255)
    for x in (12.2, 19.8):
        if has["Heavy_Makeup"]:
            pen.ellipse(x - 2.4, 12.2, x + 2.4, 15.4, (150, 60, 170))
        if has["Eyeglasses"]:
            pen.ellipse(x - 3.3, 11.6, x + 3.3, 18.0, black, 255)
            pen.ellipse(x - 2.3, 12.6, x + 2.3, 17.0, (205, 230, 245), 255)
        pen.ellipse(x - 1.8, 13.4, x + 1.8, 16.2, (255, 255, 255), 255)
        pen.ellipse(x - 1.0, 13.8, x + 1.0, 16.0, iris, 255)
        arch = [(x - 2.6, height + 0.3), (x, height - 0.3), (x + 2.6, height + 0.3)]
        pen.line(arch, brow, width, 255)
    if has["Eyeglasses"]:
        pen.line([(15, 14.4), (17, 14.4)], black, 1.0, 255)


def draw_mouth(pen, has, hair):
    """Lips, in the mask, wide and curved up when smiling; a moustache, which is not."""
    lips = (205, 15, 60) if has["Heavy_Makeup"] else (165, 75, 70)
    wide, lift = (4.6, 2.0) if has["Smiling"] else (2.5, 0.0)
    u = np.linspace(-1, 1, 9)                                    # from one corner to the other
    x = 16 + wide * u
    lower = 23.6 - lift * u ** 2
    if has["Mouth_Slightly_Open"]:
        opening = 1 - u ** 2                                     # 0 at the corners
        above = list(zip(x, lower - 2.4 * opening))
        below = list(zip(x, lower + 1.2 * opening))
        outline = above + below[::-1]
        pen.polygon(outline, (45, 5, 10), 255)
        pen.line(outline + above[:1], lips, 0.8, 255)
    else:
        pen.line(list(zip(x, lower)), lips, 1.5, 255)
    if has["Mustache"]:
        colour = (45, 32, 25) if has["Bald"] else darker(hair, 0.45)
        pen.polygon([(11.4, 21.4), (13.2, 19.6), (18.8, 19.6), (20.6, 21.4), (16, 20.9)], colour)


def draw_top(pen, has, hair, half, felt):
    """Hair on the skull, fringe, bare temples, or a hat with sideburns: hair stays visible."""
    left, right = 16 - half, 16 + half
    if has["Wearing_Hat"]:
        for x in (left - 0.5, right - 1.7):
            sideburn = [(x, 9), (x + 2.2, 9), (x + 2.2, 13.5), (x, 13.5)]
            pen.polygon(sideburn, hair, 255, HAIR)
        crown = [(left - 0.3, 9), (left + 1.2, 1), (right - 1.2, 1), (right + 0.3, 9)]
        brim = [(left - 3.5, 7.6), (right + 3.5, 7.6), (right + 3.5, 9.6), (left - 3.5, 9.6)]
        pen.polygon(crown, felt, 255)
        pen.polygon(brim, darker(felt, 0.5), 255)
    elif not has["Bald"]:
        hairline = [(right - 1, 9.6), (20, 7.2), (16, 6.6), (12, 7.2), (left + 1, 9.6)]
        if has["Bangs"]:
            hairline = [(right - 1, 10.4), (left + 1, 10.4)]
        if has["Receding_Hairline"]:
            hairline = [(right - 1.6, 12), (right - 2.4, 6), (19, 4), (16, 5.4), (13, 4),
                        (left + 2.4, 6), (left + 1.6, 12)]
        angles = np.linspace(0, math.pi, 13)                     # from the left ear to the right
        skull = zip(16 - (half + 0.8) * np.cos(angles), 12.5 - 10.5 * np.sin(angles))
        pen.polygon([*skull, *hairline], hair, 255, HAIR)


def toy_faces(n, size=32, seed=0):
    """-> {"image" (n, size, size, 3), "mask" (n, size, size), "attr" (n, 18)}, uint8, the last two
    in {0, 1}. Face k depends on (seed, k) alone."""
    images, masks, attributes = [], [], []
    for k in range(n):
        rng = np.random.default_rng((seed, k))
        has = draw_attributes(rng)
        image, mask = draw_face(has, rng, size)
        images.append(image)
        masks.append(mask)
        attributes.append([has[name] for name in ATTRIBUTES])
    return {"image": np.stack(images), "mask": np.stack(masks), "attr": np.uint8(attributes)}


# === §3 Toy birds, with captions that name what is drawn ===

BIRD_COLOURS = {"red": (214, 36, 36), "yellow": (250, 214, 40), "blue": (45, 85, 220),
                "green": (45, 155, 65), "black": (22, 22, 28), "white": (246, 246, 246)}
BEAK_COLOURS = {"yellow": (255, 200, 0), "black": (15, 15, 20)}
BIRD_CHOICES = {"size": ("small", "large"),
                **dict.fromkeys(("bird", "wings", "head", "belly"), tuple(BIRD_COLOURS)),
                "shape": ("short", "long", "curved"), "beak": tuple(BEAK_COLOURS),
                "crown": ("pointed", "")}
FACT_NOUN = {"size": "bird", "shape": "beak"}  # the noun that a choice describes, if not itself
NOUNS = ("bird", "wings", "head", "belly", "beak", "crown")
# What a caption can say: "small bird", "red wings", "long beak", "pointed crown", ...
BIRD_FACTS = tuple(f"{value} {FACT_NOUN.get(name, name)}"
                   for name, values in BIRD_CHOICES.items() for value in values if value)
SYNONYMS = {"body": "bird", "wing": "wings", "breast": "belly", "bill": "beak", "crest": "crown",
            "tiny": "small", "big": "large"}


def facts_of(text):
    """The BIRD_FACTS that a caption states: adjectives go with their part's noun, or the last."""
    found = set()
    noun = None
    for part in re.split(r"[,.:]|\b(?:and|with|has)\b", text.lower()):
        terms = [SYNONYMS.get(word, word) for word in part.split()]
        nouns = [term for term in terms if term in NOUNS]
        if nouns:
            noun = nouns[0]
        found |= {f"{term} {noun}" for term in terms} & set(BIRD_FACTS)
    return found


STOPWORDS = set("a also an and are as at bird but by for from has have in is it its of on or that "
                "the there this to very which while with".split())


def content_words(text):
    """The words of a real caption, in lower case, without STOPWORDS: a set."""
    return set(re.findall("[a-z]{2,}", text.lower())) - STOPWORDS


def turned_ellipse(x, y, rx, ry, turn=0.0):
    """40 points on an ellipse around (x, y), of radii rx and ry, turned by an angle."""
    angles = np.linspace(0, 2 * math.pi, 41)[:-1]
    u = rx * np.cos(angles)
    v = ry * np.sin(angles)
    return list(zip(x + math.cos(turn) * u - math.sin(turn) * v,
                    y + math.sin(turn) * u + math.cos(turn) * v))


def scenery(rng, size):
    """Light sky, with or without leaves: a canvas of sides 4 size."""
    canvas = out_of_focus(rng, size, rng.integers(170, 240, 3), 14)
    if rng.random() < 0.5:
        pen = ImageDraw.Draw(canvas)
        for _ in range(14):
            x, y, turn = rng.uniform(0, (32, 32, math.pi))
            leaf = turned_ellipse(x, y, rng.uniform(3, 5), rng.uniform(1, 2), turn)
            green = np.array((185, 222, 165)) + rng.normal(0, 14, 3)
            pen.polygon([(u * size / 8, v * size / 8) for u, v in leaf],
                        tuple(int(part) for part in green))
    return canvas


BEAKS = {"short": [(10, -9.6), (13.4, -7), (10, -4.4)], "long": [(10, -9), (17, -7), (10, -5)],
         "curved": [(9.6, -10), (13.8, -9.4), (15.2, -6.6), (14.6, -1.6), (12.4, -4.6),
                    (10, -4.4)]}
LEGS = ([(-1.5, 5), (-1, 5), (-1, 9), (-1.5, 9)], [(1.5, 5), (2, 5), (2, 9), (1.5, 9)])
TAIL = [(-6, -1), (-12, 1.2), (-11.4, 4.6), (-5, 3.5)]
CROWN = [(3.4, -8), (1.6, -14), (5.6, -11), (6.6, -14.4), (9.2, -9)]


def draw_bird(bird, rng, size=32):
    """{name of BIRD_CHOICES: value} -> (size, size, 3) uint8. What no word names is random: the
    background, which is light, the position, and the pattern of the wings."""
    pen = Pen(scenery(rng, size))
    scale = 0.78 if bird["size"] == "small" else 1.05
    x0 = 13.2 + rng.uniform(-0.6, 0.6)
    y0 = 18 + rng.uniform(-0.6, 0.6)
    body, wings, head, belly = (BIRD_COLOURS[bird[name]]
                                for name in ("bird", "wings", "head", "belly"))

    def shape(points, fill, material=0):  # points around the body's centre
        points = [(x0 + x * scale, y0 + y * scale) for x, y in points]
        pen.polygon(points, fill, None, material)
        pen.line(points + points[:1], (70, 70, 70), 0.35)

    for leg in LEGS:
        shape(leg, (70, 60, 50))
    shape(TAIL, body)
    shape(turned_ellipse(0, 0, 8.4, 5.8), body)
    shape(turned_ellipse(1.4, 3.1, 5.9, 3.4), belly)
    shape(turned_ellipse(-2.0, -1.4, 5.8, 3.0, 0.25), wings, PLUMAGE)
    if bird["crown"]:
        shape(CROWN, head)
    shape(BEAKS[bird["shape"]], BEAK_COLOURS[bird["beak"]])
    shape(turned_ellipse(6.6, -6.8, 4.3, 4.2), head)
    shape(turned_ellipse(7.9, -7.5, 1.15, 1.15), (255, 255, 255))
    shape(turned_ellipse(8.1, -7.5, 0.5, 0.5), (0, 0, 0))
    lighter = 22 if np.mean(wings) < 125 else -22                # so that nothing is clipped
    pen.add_texture(PLUMAGE, plumage, rng, lighter)
    image, _ = pen.result()
    return image


def caption(bird, rng, everything):
    """One sentence about a bird: all parts, in one order, or one to three of them, in any."""
    def pick(*texts):
        return texts[rng.integers(len(texts))]

    opening = pick("a {size} {bird} bird with ", "this {size} {bird} bird has ",
                   "the bird is {size} and {bird} with ", "a {size} bird with ",
                   "this {size} bird has ")
    parts = []
    if "{bird}" not in opening:
        parts.append("a {bird} body")
    parts.append(pick("a {belly} belly", "a {belly} breast"))
    parts.append(pick("{wings} wings", "{wings} wings", "wings that are {wings}"))
    parts.append("a {head} head")
    if bird["crown"]:
        parts.append(pick("a pointed crown", "a pointed crest"))
    beak = pick("beak", "bill")
    if everything:
        parts.append("a {shape} {beak} " + beak)
    else:
        parts.append(pick("a {shape} ", "a {beak} ") + beak)
        rng.shuffle(parts)
        parts = parts[:rng.integers(1, 4)]
    listed = ", ".join(parts[:-1])
    if listed:
        listed += " and "
    size = pick(bird["size"], bird["size"], {"small": "tiny", "large": "big"}[bird["size"]])
    return (opening + listed + parts[-1] + ".").format(**{**bird, "size": size})


def toy_birds(n, size=32, seed=0):
    """-> {"image" (n, size, size, 3) uint8, "text": n lists of 10 captions}; bird k depends on
    (seed, k) alone."""
    images, texts = [], []
    for k in range(n):
        rng = np.random.default_rng((seed, k))
        bird = {name: values[rng.integers(len(values))] for name, values in BIRD_CHOICES.items()}
        images.append(draw_bird(bird, rng, size))
        captions = []
        while len(captions) < 10:
            sentence = caption(bird, rng, everything=len(captions) < 7)
            if sentence not in captions:
                captions.append(sentence)
        texts.append(captions)
    return {"image": np.stack(images), "text": texts}


# === §4 Files as people have them ===

BILINEAR = Image.Resampling.BILINEAR
PLAIN = str.maketrans("‘’`´“”«»‐‑‒–—―−", "''''" + '""""' + "-------")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def read_picture(path, size):
    """A picture as it looks -> (size, size, 3) uint8 RGB, nothing cut off: turned as its EXIF data
    say, on white where it is transparent. UserError for what is none."""
    with user_error(f"{path}: cannot be read as a picture"):
        image = Image.open(path)
        image.draft("RGB", (2 * size, 2 * size))  # the JPEG decoder halves, down to twice the size
        if image.mode[0] in "IF":
            raise ValueError("grey of 16 or 32 bits; save it with 8")
        image = ImageOps.exif_transpose(image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        return np.asarray(image.resize((size, size), BILINEAR))


def read_mask(paths, size):
    """The union of masks -> (size, size) uint8 in {0, 1}. A pixel belongs to a mask if it is
    brighter than half of the brightest one: in the alpha channel if that varies, else in any
    channel. A file that has no two levels, such as a photograph, is named on stderr."""
    union = False
    for path in paths:
        with user_error(f"{path}: cannot be read as a mask"):
            image = ImageOps.exif_transpose(Image.open(path))
            values = np.asarray(image if image.mode[0] in "IF" else image.convert("RGBA"))
            if values.ndim == 3:
                alpha = values[..., 3]                           # (H, W)
                values = alpha if alpha.min() < alpha.max() else values[..., :3].max(2)
            share = values / max(values.max(), 1)                # of the brightest
            union = union | (share > 0.5)
        between = np.mean((share > 0.25) & (share < 0.75))
        if between > 0.1:
            print(f"{path}: {100 * between:.0f} % of the pixels are grey; is it a mask?",
                  file=sys.stderr)
    if union.all() or not union.any():
        raise UserError(f"{paths[0]}: the mask is {'all on' if union.all() else 'empty'}")
    union = Image.fromarray(255 * union.astype(np.uint8)).resize((size, size), BILINEAR)
    return (np.asarray(union) > 127).astype(np.uint8)


def read_lines(path):
    """The lines of a text in utf-8 that are not blank, without whitespace at their ends. Captions
    of CUB have the sign for lost letters, U+FFFD, where blanks were."""
    with user_error(f"{path}: cannot be read as a text in utf-8"):
        text = path.read_bytes().decode("utf-8-sig").replace("\ufffd", " ")
        if "\0" in text:
            raise ValueError("it has NULs, as utf-16 has")
        return [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]


def tidy(caption):
    """What models see: lower case, plain quotes and dashes, single blanks, a full stop."""
    text = caption.encode(errors="replace").decode().translate(PLAIN).lower()
    return " ".join(text.split()).rstrip(" .!?") + "."


# === §5 Raw CelebAMask-HQ [Sec. 4.2] ===

PARTS = ("nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear", "mouth", "u_lip",
         "l_lip", "hair", "hat", "ear_r", "neck_l", "neck", "cloth")  # all but "skin"
IMAGES = "CelebA-HQ-img"
MASKS = "CelebAMask-HQ-mask-anno"
ATTRIBUTE_FILE = "CelebAMask-HQ-attribute-anno.txt"
MAPPING_FILE = "CelebA-HQ-to-CelebA-mapping.txt"


def read_attributes(path):
    """The attribute file: the count, the names, then lines of `k.jpg` and 40 times -1 (or 0) or 1.
    -> {k: (18,) uint8 in {0, 1}}, in the order of ATTRIBUTES."""
    rows = {}
    with user_error(f"{path}: not CelebAMask-HQ's attribute file, or not whole"):
        count, header, *lines = read_lines(path)
        names = header.split()
        columns = [names.index(name) for name in ATTRIBUTES]
        for line in lines:
            file, *values = line.split()
            if len(values) != len(names) or set(values) - {"-1", "0", "1"}:
                raise ValueError(f"'{line[:30]}' is not k.jpg and {len(names)} times -1 or 1")
            rows[int(Path(file).stem)] = np.uint8([values[column] == "1" for column in columns])
        if count != str(len(rows)):
            raise ValueError(f"line 1 says {count} images, {len(rows)} rows follow")
    return rows


def carve(items, parts, *names):
    """Sorted items -> {item: split}. Each of `names` gets one of `parts` equal parts, the last
    ones, and "train" gets the rest."""
    part = max(1, len(items) // parts)
    split = dict.fromkeys(items, "train")
    for k, name in enumerate(reversed(names)):
        for item in items[len(items) - part * (k + 1):len(items) - part * k]:
            split[item] = name
    return split


def split_faces(path, ids):
    """{face: split}: the split of CelebAMask-HQ's authors by the mapping file (lines of `idx
    orig_idx orig_file`), or without it the last tenth for testing, one for validation."""
    if not path.exists():
        print(f"no {path.name}: the last tenths are test and validation, not the official split")
        return carve(ids, 10, "val", "test")
    split = {}
    with user_error(f"{path}: a line is missing or not 'idx orig_idx orig_file'"):
        lines = [line.split() for line in read_lines(path)]
        origin = {int(line[0]): int(line[1]) for line in lines if line[0].isdecimal()}
        for k in ids:
            split[k] = "train"
            if origin[k] >= 162771:  # the borders are those of CelebA
                split[k] = "val"
            if origin[k] >= 182638:
                split[k] = "test"
    return split


class RawFaces:
    """Raw CelebAMask-HQ: `split` {face: split}, and read(face) -> image, mask, attributes."""
    files = ("image.npy", "mask.npy", "attr.npy")
    attributes = ATTRIBUTES

    def __init__(self, raw, size):
        self.raw = raw
        self.size = size
        self.values = read_attributes(raw / ATTRIBUTE_FILE)
        self.pictures = {}
        for path in sorted((raw / IMAGES).iterdir()):
            if path.stem.isdecimal() and path.suffix.lower() in SUFFIXES:
                self.pictures[int(path.stem)] = path
        self.masks = {}
        strange = []
        for path in sorted((raw / MASKS).rglob("*.*")):          # 0/00000_hair.png, or all in one
            k, _, part = path.stem.partition("_")
            if not k.isdecimal() or int(k) not in self.values or part not in (*PARTS, "skin"):
                strange.append(path.name)
            elif part != "skin":
                self.masks.setdefault(int(k), []).append(path)
        if strange:
            print(f"{raw / MASKS}: {len(strange)} files of no face and part, the first: "
                  f"{strange[0]}")
        self.split = split_faces(raw / MAPPING_FILE, sorted(self.values))

    def read(self, k):
        picture = self.pictures.get(k, self.raw / IMAGES / f"{k}.jpg")
        masks = self.masks.get(k, [self.raw / MASKS / f"{k // 2000}/{k:05d}_hair.png"])
        return read_picture(picture, self.size), read_mask(masks, self.size), self.values[k]


# === §6 Raw CUB: birds with ten captions each [Sec. 4.1] ===

def named_files(folder, *suffixes):
    """{"<class>/<name>": path} of folder/<class>/<name><suffix>, sorted by class, then file."""
    return {f"{path.parent.name}/{path.stem}": path for path in sorted(folder.glob("[!.]*/[!.]*"))
            if path.suffix.lower() in suffixes}


def find_named(raw, name):
    """The files or folders of that name in `raw` or in a folder of it."""
    return [*raw.glob(name), *sorted(raw.glob(f"*/{name}"))]


def class_of(name):
    """The class of "<class>/<name>"."""
    return name.split("/")[0]


class RawBirds:
    """Raw CUB: `split` {bird: split}, and read(bird) -> image, captions. Either `images` beside
    `text_c10`, one text a picture; or as the MMVAE code has it: folders train and test, and for
    each a text with ten lines for every picture, sorted by class, then file."""
    files = ("image.npy", "text.json")
    attributes = ()

    def __init__(self, raw, size):
        self.size = size
        self.pictures = {}
        self.captions = {}                                       # lines, or the path of a text
        texts = find_named(raw, "text_c10")
        merged = find_named(raw, "text_trainvalclasses.txt")
        # Reed's archive has a folder `images` too, which holds features
        images = [path for path in find_named(raw, "images") if named_files(path, *SUFFIXES)]
        test_classes = None
        if images and texts:
            self.images = images[0]
            self.pictures = named_files(images[0], *SUFFIXES)
            self.captions = named_files(texts[0], ".txt")
            lists = find_named(raw, "testclasses.txt")
            if lists:
                test_classes = set(read_lines(lists[0]))
        elif merged:
            self.images = merged[0].parent
            self.add_folder(merged[0], self.images / "train")
            test = self.images / "test"
            self.add_folder(self.images / "text_testclasses.txt", test)
            test_classes = set(map(class_of, named_files(test, *SUFFIXES)))
        else:
            raise UserError(f"{raw}: neither images and text_c10, nor text_trainvalclasses.txt")
        names = list({**self.pictures, **self.captions})
        split = self.split_classes(sorted(set(map(class_of, names))), test_classes)
        order = np.random.default_rng(0).permutation(len(names))  # so that neighbours differ
        self.split = {names[k]: split[class_of(names[k])] for k in order}

    def add_folder(self, file, folder):
        """The pictures of a folder, and the text with ten lines for each."""
        found = named_files(folder, *SUFFIXES)
        lines = read_lines(file)
        if len(lines) != 10 * len(found):
            raise UserError(f"{file}: {len(lines)} captions, not 10 for each of the {len(found)} "
                            f"images in {folder.name}; extract both again")
        self.pictures.update(found)
        for k, name in enumerate(found):
            self.captions[name] = lines[10 * k:10 * k + 10]

    def split_classes(self, classes, test_classes):
        """{class: split}; if nothing says which are for testing, the last tenth."""
        if test_classes is None:
            print("no testclasses.txt: the last tenths are test and validation, not the official "
                  "split")
            return carve(classes, 10, "val", "test")
        rest = [name for name in classes if name not in test_classes]
        return {**dict.fromkeys(classes, "test"), **carve(rest, 20, "val")}

    def read(self, name):
        lines = self.captions.get(name, [])
        if isinstance(lines, Path):
            lines = read_lines(lines)
        if len(lines) != 10:
            raise UserError(f"{name}: {len(lines)} captions, not 10")
        picture = self.pictures.get(name, self.images / f"{name}.jpg")
        return read_picture(picture, self.size), lines


# === §7 Writing prepared data ===

def attempt(raw, item):
    """raw.read(item) -> what it gives, or None; and what is wrong, or None."""
    try:
        return raw.read(item), None
    except (UserError, OSError) as error:
        return None, str(error)


def read_all(raw):
    """Read every item, on all cores: -> {item: what was read}, {item: what is wrong}."""
    found, faults = {}, {}
    with multiprocessing.Pool(None, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        results = pool.imap(functools.partial(attempt, raw), raw.split, chunksize=8)
        for item, (values, fault) in zip(raw.split, tqdm(results, total=len(raw.split))):
            if fault is None:
                found[item] = values
            else:
                faults[item] = fault
    return found, faults


def prepare(dataset, raw, out, size, partial=False):
    """Raw data -> the folder `out`, which is there when it is whole; UserError if it cannot be, or
    if something is missing or damaged, unless `partial` leaves that out."""
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: exists already; move it away to prepare it again")
    items = RawFaces(raw, size) if dataset == "celeba" else RawBirds(raw, size)
    temporary = out.with_name(out.name + ".partial")
    with user_error(f"{out}: not prepared, nothing is kept"):
        temporary.mkdir(parents=True)
        try:
            found, faults = read_all(items)
            if faults:
                report(raw, faults, len(items.split), partial)
            counts = write(items, found, temporary)
            temporary.rename(out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    print(f"{out}: {len(found)} at {size}x{size}: {counts}")


def report(raw, faults, total, partial):
    """Say how many of `total` items are missing or damaged, and the first five; UserError unless
    `partial`."""
    first = "; ".join(list(faults.values())[:5])
    text = f"{len(faults)} of {total} cannot be used: {first}"
    if not partial:
        raise UserError(f"{raw}: {text}; --partial goes on without them")
    print(text)


def write(items, found, folder):
    """Write the arrays and meta.json: -> the sizes of the splits, in words."""
    split = {"train": [], "val": [], "test": []}
    for row, name in enumerate(found):
        split[items.split[name]].append(row)
    counts = ", ".join(f"{len(rows)} {part}" for part, rows in split.items())
    if min(map(len, split.values())) < 2:
        raise UserError(f"{counts}: every split needs 2 at least")
    for file, values in zip(items.files, zip(*found.values())):
        if file.endswith(".npy"):
            np.save(folder / file, np.stack(values))
        else:
            (folder / file).write_text(json.dumps(values))
    meta = {"split": split, "attributes": items.attributes, "mirror": True, "names": list(found)}
    (folder / "meta.json").write_text(json.dumps(meta))
    return counts


# === §8 Command line ===

class Parser(argparse.ArgumentParser):
    """Errors take one line, without the usage."""
    def error(self, message):
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def parse_args(argv=None):
    """All flags, checked."""
    parser = Parser(prog="data_prep.py", description="Prepare a raw data set for diffmvae.py.")
    add = parser.add_argument
    add("--dataset", choices=["celeba", "cub"], required=True, help="CelebAMask-HQ or CUB")
    add("--raw", type=Path, required=True, help="the extracted download, read only")
    add("--out", type=Path, help="folder to write (default: data/<dataset>)")
    add("--size", type=int, help="pixels, a multiple of 8 (default: 128 for celeba, 64 for cub)")
    add("--partial", action="store_true", help="leave out what is missing or damaged, and say so")
    args = parser.parse_args(argv)
    if args.out is None:
        args.out = Path("data") / args.dataset
    if args.size is None:
        args.size = 128 if args.dataset == "celeba" else 64
    if not 8 <= args.size <= 1024 or args.size % 8:
        parser.error(f"--size {args.size}: must be a multiple of 8 up to 1024")
    return args


def main(argv=None):
    """The command line: -> exit code."""
    return exit_code("data_prep.py", lambda: prepare(**vars(parse_args(argv))))


if __name__ == "__main__":
    sys.exit(main())
