"""Data for diffmvae.py: raw data sets to memory-mappable arrays; built-in toy faces and birds.

    python data_prep.py --dataset celeba --raw CelebAMask-HQ            # 128x128, paper Sec. 4.2
    python data_prep.py --dataset celeba --raw CelebAMask-HQ --size 64  # for a laptop
    python data_prep.py --dataset cub --raw FOLDER                      # 64x64, paper Sec. 4.1

FOLDER has either CUB_200_2011/images and Reed's text_c10, or what the MMVAE download holds: train,
test, text_trainvalclasses.txt and text_testclasses.txt. The splits of CUB share no class; where
the raw data divide the classes only in two, the last twentieth of those to train on is validation.

What a prepared folder holds (`--out`, default data/<dataset>):

    image.npy  (N, H, W, 3) uint8   RGB 0..255
    mask.npy   (N, H, W)    uint8   celeba, 0 or 1: the composite of all face parts but the skin
    attr.npy   (N, 18)      uint8   celeba, 0 or 1: the 18 attributes in the order of ATTRIBUTES
    text.json  N lists of 10        cub: the captions, as written but for whitespace at the ends
    meta.json                       counts, rows of each split, names, size, SHA-256 of the sources

The script needs numpy, pillow and tqdm, and nothing of diffmvae.py.
"""
import argparse
import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing, contextmanager, suppress
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

# The 18 of the 40 attributes that the paper keeps, in file order [Sec. 4.2].
ATTRIBUTES = ("Bald", "Bangs", "Black_Hair", "Blond_Hair", "Brown_Hair", "Bushy_Eyebrows",
              "Eyeglasses", "Gray_Hair", "Heavy_Makeup", "Male", "Mouth_Slightly_Open", "Mustache",
              "Pale_Skin", "Receding_Hairline", "Smiling", "Straight_Hair", "Wavy_Hair",
              "Wearing_Hat")


# === §1 Toy faces: drawn, so that every attribute is visible and every mask exact ===

HAIR_COLOURS = {"Black_Hair": (25, 22, 30), "Blond_Hair": (240, 208, 95),
                "Brown_Hair": (105, 62, 28), "Gray_Hair": (165, 165, 172)}
AUBURN = (190, 60, 25)  # hair of none of the four named colours, as many real faces have
SUPERSAMPLE = 4


def draw_attributes(rng):
    """One random attribute set that a picture can show in full: -> {name: bool}, all 18 names.

    A bald head has no hair colour, fringe or hair shape, a hat hides the forehead, only men have
    moustaches and make-up is mostly women's. No rate is below one in ten, so that none is rare.
    """
    has = {name: False for name in ATTRIBUTES}
    has["Male"] = rng.random() < 0.45
    top = rng.choice(["plain", "Bangs", "Receding_Hairline", "Wearing_Hat", "Bald"],
                     p=[0.34, 0.22, 0.14, 0.17, 0.13])
    if top != "plain":
        has[str(top)] = True
    if top != "Bald":
        colour = rng.choice(["none", *HAIR_COLOURS], p=[0.12, 0.25, 0.22, 0.23, 0.18])
        shape = rng.choice(["none", "Straight_Hair", "Wavy_Hair"], p=[0.36, 0.30, 0.34])
        for name in (str(colour), str(shape)):
            if name != "none":
                has[name] = True
    for name, rate in (("Bushy_Eyebrows", 0.25), ("Eyeglasses", 0.22), ("Pale_Skin", 0.22),
                       ("Mouth_Slightly_Open", 0.42), ("Smiling", 0.47)):
        has[name] = rng.random() < rate
    has["Heavy_Makeup"] = rng.random() < (0.08 if has["Male"] else 0.5)
    has["Mustache"] = rng.random() < (0.4 if has["Male"] else 0.0)
    return has


class Pen:
    """Draws the same shapes on a picture and, for the parts that count, on its mask.

    Coordinates are in units of a 32x32 picture, moved by (dx, dy); both canvases are
    SUPERSAMPLE times larger than the result.
    """

    def __init__(self, size, background, dx, dy):
        side = size * SUPERSAMPLE
        self.image = Image.new("RGB", (side, side), background)
        self.mask = Image.new("L", (side, side))
        self.pens = ImageDraw.Draw(self.image), ImageDraw.Draw(self.mask)
        self.unit, self.dx, self.dy = side / 32, dx, dy

    def _draw(self, shape, points, colour, part, **options):
        points = [((x + self.dx) * self.unit, (y + self.dy) * self.unit) for x, y in points]
        if "width" in options:
            options["width"] = max(1, round(options["width"] * self.unit))
        getattr(self.pens[0], shape)(points, fill=colour, **options)
        if part is not None:  # 255: part of the mask; 0: skin drawn over a part hides it
            getattr(self.pens[1], shape)(points, fill=part, **options)

    def ellipse(self, x0, y0, x1, y1, colour, part=None):
        self._draw("ellipse", [(x0, y0), (x1, y1)], colour, part)

    def polygon(self, points, colour, part=None):
        self._draw("polygon", points, colour, part)

    def line(self, points, colour, width, part=None):
        self._draw("line", points, colour, part, width=width, joint="curve")

    def result(self, size):
        """-> (size, size, 3) uint8 picture, (size, size) uint8 mask in {0, 1}."""
        image = self.image.resize((size, size), Image.Resampling.BOX)
        mask = self.mask.resize((size, size), Image.Resampling.BOX)
        return np.asarray(image), (np.asarray(mask) > 127).astype(np.uint8)


def draw_face(has, rng, size=32):
    """Draw one face with the attributes `has`: -> image (size, size, 3), mask (size, size), uint8.

    What no attribute names is random: background, clothes, position, width of the head, eyes.
    """
    background = tuple(int(c) for c in rng.integers(0, 256, 3))
    pen = Pen(size, background, rng.uniform(-1, 1), rng.uniform(-0.8, 0.8))
    skin = (255, 236, 224) if has["Pale_Skin"] else [(224, 172, 125), (198, 134, 90),
                                                     (150, 95, 60)][rng.integers(3)]
    hair = next((c for n, c in HAIR_COLOURS.items() if has[n]), AUBURN)
    half = rng.uniform(7.2, 8.2)  # half the width of the head
    draw_back_hair(pen, has, hair, half)
    draw_body(pen, has, rng, skin)
    draw_head(pen, has, skin, half)
    draw_eyes(pen, has, rng, hair)
    draw_mouth(pen, has, hair)
    draw_top(pen, has, rng, hair, half)
    return pen.result(size)


def draw_back_hair(pen, has, hair, half):
    """Long hair behind the head: straight curtains, or waves of locks; nothing when short."""
    left, right = 16 - half, 16 + half
    if has["Straight_Hair"]:
        pen.polygon([(left - 2, 9), (right + 2, 9), (right + 2, 27), (left - 2, 27)], hair, 255)
    if has["Wavy_Hair"]:
        for k, y in enumerate((7.5, 12, 16.5, 21)):
            out = 3.2 if k % 2 else 1.4
            pen.ellipse(left - out, y, left + 4, y + 6, hair, 255)
            pen.ellipse(right - 4, y, right + out, y + 6, hair, 255)


def draw_body(pen, has, rng, skin):
    """Neck and clothes: wide square shoulders for a man, narrow round ones otherwise."""
    cloth = tuple(int(c) for c in rng.integers(30, 226, 3))
    neck = 4.6 if has["Male"] else 2.6
    pen.polygon([(16 - neck, 22), (16 + neck, 22), (16 + neck, 34), (16 - neck, 34)], skin, 255)
    if has["Male"]:
        pen.polygon([(1, 27.5), (11, 27.5), (16, 31.5), (21, 27.5), (31, 27.5), (31, 35), (1, 35)],
                    cloth, 255)
    else:
        pen.ellipse(7, 28.5, 25, 42, cloth, 255)


def draw_head(pen, has, skin, half):
    """Ears (part of the mask) and the skin, which is not; a man's jaw is square."""
    for x in (16 - half, 16 + half):
        pen.ellipse(x - 1.4, 13.5, x + 1.4, 18.5, skin, 255)
    pen.ellipse(16 - half, 4.5, 16 + half, 26.5, skin, 0)
    if has["Male"]:
        jaw = half - 1
        pen.polygon([(16 - half, 16), (16 + half, 16), (16 + jaw, 24), (16 + jaw - 3, 27),
                     (16 - jaw + 3, 27), (16 - jaw, 24)], skin, 0)
    if has["Heavy_Makeup"]:
        for x in (16 - half + 2.4, 16 + half - 2.4):
            pen.ellipse(x - 1.9, 17.2, x + 1.9, 20.4, (240, 85, 125))


def draw_eyes(pen, has, rng, hair):
    """Brows, eyes, nose and glasses, all parts of the mask."""
    brow = (55, 35, 25) if has["Bald"] else tuple(int(0.6 * c) for c in hair)
    iris = [(40, 30, 25), (50, 110, 60), (40, 80, 170)][rng.integers(3)]
    pen.polygon([(16, 15.5), (14.4, 19.6), (17.6, 19.6)], (170, 105, 80), 255)
    for x in (12.2, 19.8):
        if has["Heavy_Makeup"]:
            pen.ellipse(x - 2.4, 12.2, x + 2.4, 15.4, (150, 60, 170))
        if has["Eyeglasses"]:
            pen.ellipse(x - 3.3, 11.6, x + 3.3, 18.0, (15, 15, 15), 255)
            pen.ellipse(x - 2.3, 12.6, x + 2.3, 17.0, (205, 230, 245), 255)
        pen.ellipse(x - 1.8, 13.4, x + 1.8, 16.2, (255, 255, 255), 255)
        pen.ellipse(x - 1.0, 13.8, x + 1.0, 16.0, iris, 255)
        width, y = (2.4, 10.6) if has["Bushy_Eyebrows"] else (0.8, 11.2)
        pen.line([(x - 2.6, y + 0.3), (x, y - 0.3), (x + 2.6, y + 0.3)], brow, width, 255)
    if has["Eyeglasses"]:
        pen.line([(15, 14.4), (17, 14.4)], (15, 15, 15), 1.0, 255)


def draw_mouth(pen, has, hair):
    """Lips (part of the mask) and moustache (not a part): wide and curved up when smiling."""
    lips = (205, 15, 60) if has["Heavy_Makeup"] else (165, 75, 70)
    half = 4.6 if has["Smiling"] else 2.5
    xs = [16 - half + 2 * half * k / 8 for k in range(9)]
    bend = [((x - 16) / half) ** 2 for x in xs]  # 1 at the corners, 0 in the middle
    lift = 2.0 if has["Smiling"] else 0.0
    lower = [(x, 23.6 - lift * b) for x, b in zip(xs, bend)]
    if has["Mouth_Slightly_Open"]:
        upper = [(x, y - 2.4 * (1 - b)) for (x, y), b in zip(lower, bend)]
        lower = [(x, y + 1.2 * (1 - b)) for (x, y), b in zip(lower, bend)]
        pen.polygon(upper + lower[::-1], (45, 5, 10), 255)
        pen.line(upper + lower[::-1] + upper[:1], lips, 0.8, 255)
    else:
        pen.line(lower, lips, 1.5, 255)
    if has["Mustache"]:
        colour = (45, 32, 25) if has["Bald"] else tuple(int(0.45 * c) for c in hair)
        pen.polygon([(11.4, 21.4), (13.2, 19.6), (18.8, 19.6), (20.6, 21.4), (16, 20.9)], colour)


def draw_top(pen, has, rng, hair, half):
    """Hair on the skull, fringe, bare temples, or a hat."""
    left, right = 16 - half, 16 + half
    if has["Wearing_Hat"]:
        felt = tuple(int(c) for c in rng.integers(40, 216, 3))
        for x in (left - 0.5, right - 1.7):  # sideburns: the hair colour stays visible
            pen.polygon([(x, 9), (x + 2.2, 9), (x + 2.2, 13.5), (x, 13.5)], hair, 255)
        crown = [(left - 0.3, 9), (left + 1.2, 1), (right - 1.2, 1), (right + 0.3, 9)]
        pen.polygon(crown, felt, 255)
        pen.polygon([(left - 3.5, 7.6), (right + 3.5, 7.6), (right + 3.5, 9.6), (left - 3.5, 9.6)],
                    tuple(c // 2 for c in felt), 255)
    elif not has["Bald"]:
        angles = [math.pi * k / 12 for k in range(13)]  # from the left ear to the right
        arc = [(16 - (half + 0.8) * math.cos(a), 12.5 - 10.5 * math.sin(a)) for a in angles]
        line = {"Bangs": [(right - 1, 10.4), (left + 1, 10.4)],
                "Receding_Hairline": [(right - 1.6, 12), (right - 2.4, 6), (19, 4), (16, 5.4),
                                      (13, 4), (left + 2.4, 6), (left + 1.6, 12)]}
        name = next((n for n in line if has[n]), None)
        plain = [(right - 1, 9.6), (20, 7.2), (16, 6.6), (12, 7.2), (left + 1, 9.6)]
        pen.polygon(arc + line.get(name, plain), hair, 255)


def toy_faces(n, size=32, seed=0):
    """`n` drawn faces: -> {"image" (n, size, size, 3), "mask" (n, size, size), "attr" (n, 18)}.

    All uint8; mask and attr in {0, 1}. Face k depends on (seed, k) alone.
    """
    image = np.empty((n, size, size, 3), np.uint8)
    mask, attr = np.empty((n, size, size), np.uint8), np.empty((n, len(ATTRIBUTES)), np.uint8)
    for k in range(n):
        rng = np.random.default_rng((seed, k))
        has = draw_attributes(rng)
        image[k], mask[k] = draw_face(has, rng, size)
        attr[k] = [has[name] for name in ATTRIBUTES]
    return {"image": image, "mask": mask, "attr": attr}


# === §2 Toy birds: drawn, with captions that name what is drawn ===

BIRD_COLOURS = {"red": (214, 36, 36), "yellow": (250, 214, 40), "blue": (45, 85, 220),
                "green": (45, 155, 65), "black": (22, 22, 28), "white": (246, 246, 246)}
BEAK_COLOURS = {"yellow": (255, 200, 0), "black": (15, 15, 20)}
BIRD_CHOICES = {"size": ("small", "large"), "bird": tuple(BIRD_COLOURS),
                "wings": tuple(BIRD_COLOURS), "head": tuple(BIRD_COLOURS),
                "belly": tuple(BIRD_COLOURS), "shape": ("short", "long", "curved"),
                "beak": tuple(BEAK_COLOURS), "crown": ("pointed", "")}
FACT_NOUN = {"size": "bird", "shape": "beak"}  # the noun that a choice describes, if not itself
# What a caption can say: "small bird", "red wings", "long beak", "pointed crown", ...
BIRD_FACTS = tuple(f"{value} {FACT_NOUN.get(name, name)}"
                   for name, values in BIRD_CHOICES.items() for value in values if value)
SYNONYMS = {"body": "bird", "wing": "wings", "breast": "belly", "bill": "beak", "crest": "crown",
            "tiny": "small", "big": "large"}


def draw_choices(rng):
    """One random bird as words: -> {name of BIRD_CHOICES: value}."""
    return {name: values[rng.integers(len(values))] for name, values in BIRD_CHOICES.items()}


def facts_of(text):
    """The BIRD_FACTS that a caption states, as a set.

    Adjectives belong to the noun of their part of the sentence, or to the last noun before.
    """
    found, noun = set(), None
    for part in re.split(r"[,.:]|\b(?:and|with|has)\b", text.lower()):
        terms = [SYNONYMS.get(word, word) for word in part.split()]
        noun = next((t for t in terms if t in ("bird", "wings", "head", "belly", "beak", "crown")),
                    noun)
        found |= {f"{term} {noun}" for term in terms} & set(BIRD_FACTS)
    return found


def draw_bird(bird, rng, size=32):
    """Draw one bird, looking right: -> (size, size, 3) uint8. What no word names is random: the
    background, which is light, and the position.
    """
    pen = Pen(size, tuple(int(c) for c in rng.integers(140, 256, 3)), 0, 0)
    scale = {"small": 0.78, "large": 1.05}[bird["size"]]
    x0, y0 = 13.2 + rng.uniform(-0.6, 0.6), 18 + rng.uniform(-0.6, 0.6)
    colour = {name: BIRD_COLOURS[bird[name]] for name in ("bird", "wings", "head", "belly")}

    def outline(points, fill):
        """Points around the body's centre, on the canvas."""
        points = [(x0 + x * scale, y0 + y * scale) for x, y in points]
        pen.polygon(points, fill)
        pen.line(points + points[:1], (70, 70, 70), 0.35)

    def ellipse(x, y, rx, ry, fill, turn=0.0):
        angles = [2 * math.pi * k / 40 for k in range(40)]
        pairs = [(rx * math.cos(a), ry * math.sin(a)) for a in angles]
        c, s = math.cos(turn), math.sin(turn)
        outline([(x + c * u - s * v, y + s * u + c * v) for u, v in pairs], fill)

    for x in (-1.5, 1.5):
        outline([(x, 5), (x + 0.5, 5), (x + 0.5, 9), (x, 9)], (70, 60, 50))
    outline([(-6, -1), (-12, 1.2), (-11.4, 4.6), (-5, 3.5)], colour["bird"])  # tail
    ellipse(0, 0, 8.4, 5.8, colour["bird"])
    ellipse(1.4, 3.1, 5.9, 3.4, colour["belly"])
    ellipse(-2.0, -1.4, 5.8, 3.0, colour["wings"], 0.25)
    if bird["crown"]:
        outline([(3.4, -8), (1.6, -14), (5.6, -11), (6.6, -14.4), (9.2, -9)], colour["head"])
    beak = {"short": [(10, -9.6), (13.4, -7), (10, -4.4)],
            "long": [(10, -9), (17, -7), (10, -5)],
            "curved": [(9.6, -10), (13.8, -9.4), (15.2, -6.6), (14.6, -1.6), (12.4, -4.6),
                       (10, -4.4)]}
    outline(beak[bird["shape"]], BEAK_COLOURS[bird["beak"]])
    ellipse(6.6, -6.8, 4.3, 4.2, colour["head"])
    ellipse(7.9, -7.5, 1.15, 1.15, (255, 255, 255))
    ellipse(8.1, -7.5, 0.5, 0.5, (0, 0, 0))
    return pen.result(size)[0]


def caption(bird, rng, everything):
    """One sentence about a bird; without `everything` it leaves out most of the parts.

    The parts come in one order: two small layers of attention that start from nothing do not
    learn within minutes which colour belongs to which part if the order is free.
    """
    pick = lambda *texts: texts[rng.integers(len(texts))]
    parts = [pick("a {belly} belly", "a {belly} breast"),
             pick("{wings} wings", "{wings} wings", "wings that are {wings}"), "a {head} head",
             *[pick("a pointed crown", "a pointed crest")] * bool(bird["crown"]),
             "a {shape} {beak} " + pick("beak", "bill")]
    if not everything:
        parts[-1] = pick(parts[-1], parts[-1].replace("{shape} ", ""),
                         parts[-1].replace("{beak} ", ""))
        start = rng.integers(len(parts))
        parts = (parts[start:] + parts[:start])[:rng.integers(1, 3)]
    opening = pick("a {size} {bird} bird with ", "this {size} {bird} bird has ",
                   "the bird is {size} and {bird} with ", "a {size} bird with ",
                   "this {size} bird has ")
    *most, last = ["a {bird} body"] * ("{bird}" not in opening) + parts
    listed = ", ".join(most) + " and " * bool(most) + last
    size = {"small": pick("small", "small", "tiny"), "large": pick("large", "large", "big")}
    return (opening + listed + ".").format(**{**bird, "size": size[bird["size"]]})


def toy_birds(n, size=32, seed=0):
    """`n` drawn birds: -> {"image" (n, size, size, 3) uint8, "text": n lists of 10 captions}.

    Eight of the ten captions name everything that is drawn, two of them less. Bird k depends on
    (seed, k) alone.
    """
    image, text = np.empty((n, size, size, 3), np.uint8), []
    for k in range(n):
        rng = np.random.default_rng((seed, k))
        bird = draw_choices(rng)
        image[k] = draw_bird(bird, rng, size)
        ten = []
        while len(ten) < 10:
            one = caption(bird, rng, everything=len(ten) < 8)
            if one not in ten:
                ten.append(one)
        text.append(ten)
    return {"image": image, "text": text}


# === §3 Raw CelebAMask-HQ [Sec. 4.2] ===

PARTS = ("nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear", "mouth", "u_lip",
         "l_lip", "hair", "hat", "ear_r", "neck_l", "neck", "cloth")  # all but "skin"
IMAGES, MASKS = "CelebA-HQ-img", "CelebAMask-HQ-mask-anno"
ATTRIBUTE_FILE, MAPPING_FILE = "CelebAMask-HQ-attribute-anno.txt", "CelebA-HQ-to-CelebA-mapping.txt"


# What Pillow raises on damaged files
DAMAGED = OSError, SyntaxError, ValueError, Image.DecompressionBombError


class DataError(Exception):
    """Something wrong with the raw data; the message says where and what to do."""


def read_attributes(path):
    """The attribute file: line 1 the count, line 2 the names, then `k.jpg` and 40 times -1 or 1.

    -> {k: (18,) uint8 in {0, 1}}, in the order of ATTRIBUTES. Raises DataError naming the line.
    """
    lines = path.read_text(errors="replace").splitlines()
    names = lines[1].split() if len(lines) > 1 else []
    missing = [name for name in ATTRIBUTES if name not in names]
    if missing:
        raise DataError(f"{path}: line 2 names no {', '.join(missing)}; is it the attribute file?")
    columns, rows = [names.index(name) for name in ATTRIBUTES], {}
    for number, line in enumerate(lines[2:], start=3):
        file, *values = line.split() or [""]
        if len(values) != len(names) or set(values) - {"-1", "1"} or not file[:-4].isdecimal():
            raise DataError(f"{path}: line {number} is not 'k.jpg' and {len(names)} times -1 or 1")
        rows[int(file[:-4])] = np.array([values[c] == "1" for c in columns], np.uint8)
    if not rows or lines[0].strip() != str(len(rows)):
        raise DataError(f"{path}: line 1 says {lines[0].strip()} images, {len(rows)} rows follow; "
                        "the file is cut short or edited")
    return rows


def read_mapping(path):
    """CelebA-HQ number -> original CelebA number, from the mapping file (one header line)."""
    try:
        rows = [line.split() for line in path.read_text().splitlines()[1:] if line.strip()]
        return {int(row[0]): int(row[1]) for row in rows}
    except (ValueError, IndexError):
        raise DataError(f"{path}: a line is not 'idx orig_idx orig_file'") from None


def split_of(ids, mapping):
    """Row numbers of each split: the official CelebA split, or the last 10 % + 10 % without it."""
    split = {"train": [], "val": [], "test": []}
    for row, k in enumerate(ids):
        if mapping is None:
            tenth = max(1, len(ids) // 10)
            name = "test" if row >= len(ids) - tenth else \
                "val" if row >= len(ids) - 2 * tenth else "train"
        else:
            name = "test" if mapping[k] >= 182638 else "val" if mapping[k] >= 162771 else "train"
        split[name].append(row)
    return split


def shrink(image, size):
    """An opened picture of any mode and shape -> (size, size, 3) uint8 RGB, nothing cut off."""
    image.draft("RGB", (2 * size, 2 * size))  # the JPEG decoder halves, down to twice the size
    return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))


def read_face(raw, k, size):
    """Face k: -> (size, size, 3) image, (size, size) mask in {0, 1}, SHA-256 of the files read.

    The mask is the union of PARTS, resized and cut at one half. Raises DataError.
    """
    digest = hashlib.sha256()

    def open_image(path):
        digest.update(path.read_bytes())
        return Image.open(path)

    path = raw / IMAGES / f"{k}.jpg"
    try:
        image, union = shrink(open_image(path), size), None
        for part in PARTS:
            path = raw / MASKS / str(k // 2000) / f"{k:05d}_{part}.png"
            if path.exists():
                part_image = open_image(path)
                if union is not None and part_image.size != union.shape[::-1]:
                    raise DataError(f"{path}: {'x'.join(map(str, part_image.size))} pixels, "
                                    "another part of this face has another size")
                pixels = np.asarray(part_image.convert("RGB").getchannel(0)) != 0
                union = pixels if union is None else union | pixels
    except DAMAGED as error:
        raise DataError(f"{path}: cannot be read ({error}); extract it again") from None
    if union is None:
        raise DataError(f"{raw / MASKS}: no mask of face {k} ({k:05d}_*.png); extract it again")
    mask = Image.fromarray(union.astype(np.uint8) * 255)
    mask = np.asarray(mask.resize((size, size), Image.Resampling.BILINEAR)) > 127
    return image, mask.astype(np.uint8), digest.hexdigest()


def check_layout(raw, skip_bad):
    """The raw folder's parts, or DataError that lists what is missing: -> rows, mapping, ids.
    With skip_bad, images and masks may be missing."""
    missing = [name for name in (IMAGES, MASKS, ATTRIBUTE_FILE) if not (raw / name).exists()]
    if missing:
        raise DataError(f"{raw}: no {', '.join(missing)}; --raw takes the extracted CelebAMask-HQ")
    rows = read_attributes(raw / ATTRIBUTE_FILE)
    found = {int(path.stem) for path in (raw / IMAGES).glob("*.jpg") if path.stem.isdecimal()}
    absent = sorted(rows.keys() - found)
    if absent and not skip_bad:
        raise DataError(f"{raw / IMAGES}: {len(absent)} of {len(rows)} images are missing, the "
                        f"first is {absent[0]}.jpg; extract the archive again")
    folders = [folder for folder in (raw / MASKS).iterdir() if folder.is_dir()]
    masked = {name[:5] for folder in folders for name in os.listdir(folder)}
    bare = [k for k in sorted(rows) if f"{k:05d}" not in masked]
    if bare and not skip_bad:
        raise DataError(f"{raw / MASKS}: {len(bare)} of {len(rows)} faces have no mask, the first "
                        f"is {bare[0]} ({bare[0]:05d}_*.png); extract the archive again")
    path = raw / MAPPING_FILE
    mapping = read_mapping(path) if path.exists() else None
    unmapped = sorted(rows.keys() - (rows if mapping is None else mapping).keys())
    if unmapped:
        raise DataError(f"{path}: no line for {len(unmapped)} images, the first is {unmapped[0]}")
    return rows, mapping, sorted(rows)


# === §4 Raw CUB: birds with ten captions each [Sec. 4.1] ===

CUB, CAPTIONS = "CUB_200_2011", 10
REED = "images", "text_c10"
MMVAE = "train", "text_trainvalclasses.txt", "test", "text_testclasses.txt"


class Birds(NamedTuple):
    """What a raw folder says of its birds, each named "<class>/<name>", in row order."""

    paths: dict      # bird -> its JPEG
    captions: dict   # bird -> its 10 captions
    split: dict      # class -> "train", "val" or "test"
    official: bool   # the raw data say which classes are for testing
    sources: dict    # text file or folder -> SHA-256


def find(names, *folders):
    """{name: the path in the first of the folders that has it}, without what none has."""
    return {name: folder / name for name in names for folder in reversed(folders)
            if (folder / name).exists()}


def sha256(*paths):
    """SHA-256 of the files, one after the other, in hexadecimal."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def named_files(folder, suffix):
    """{"<class>/<name>": path} of folder/<class>/<name><suffix>, sorted by class, then file."""
    paths = folder.glob(f"[!.]*/[!.]*{suffix}")
    return {f"{path.parent.name}/{path.stem}": path
            for path in sorted(paths, key=lambda path: (path.parent.name, path.name))}


def read_lines(path):
    """The lines of a text file that are not blank, without whitespace at their ends."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return [line.strip() for line in lines if line.strip()]


def class_of(bird):
    """"<class>/<name>" -> "<class>"."""
    return bird.split("/")[0]


def carve_val(classes):
    """Sorted classes without a test split: -> {class: split}, the last twentieth validation."""
    first = len(classes) - max(1, len(classes) // 20)
    return {name: "val" if k >= first else "train" for k, name in enumerate(classes)}


def split_by_files(classes, files):
    """The sorted classes by the split files {name: path}: -> {class: split}. Raises DataError.

    Without files the last tenth is test, the tenth before it validation. Classes that the files
    name and the folder lacks do not matter: it may be a part of the data set.
    """
    if not files:
        tenth = max(1, len(classes) // 10)
        names = ["train"] * (len(classes) - 2 * tenth) + ["val"] * tenth + ["test"] * tenth
        return dict(zip(classes, names))
    both = "trainclasses.txt" in files and "valclasses.txt" in files
    omit = ("trainval",) if both or "trainvalclasses.txt" not in files else ("train", "val")
    split = {}
    for name, path in files.items():
        name = name.removesuffix("classes.txt")
        for line in read_lines(path) if name not in omit else []:
            if split.setdefault(line, name) != name:
                raise DataError(f"{path}: class {line} is in {split[line]}classes.txt too; keep "
                                "it in one of them")
    absent = [name for name in classes if name not in split]
    if absent:
        raise DataError(f"{', '.join(map(str, files.values()))}: {len(absent)} classes are in none "
                        f"of them, the first is {absent[0]}; add it or remove its folder")
    split = {name: split[name] for name in classes}
    return split | carve_val([name for name in classes if split[name] == "trainval"])


def read_reed(images, text, folders):
    """Pictures and captions joined by name, one text file a picture: -> Birds. Raises DataError."""
    paths, texts = named_files(images, ".jpg"), named_files(text, ".txt")
    for lone, what in (([name for name in paths if name not in texts], "images without captions"),
                       ([name for name in texts if name not in paths], "captions without image")):
        if lone:
            raise DataError(f"{images}, {text}: {len(lone)} {what}, the first is {lone[0]}; "
                            "extract both again")
    captions = {name: read_lines(texts[name]) for name in paths}
    for name, lines in captions.items():
        if len(lines) != CAPTIONS:
            raise DataError(f"{texts[name]}: {len(lines)} captions, not {CAPTIONS}; extract it "
                            "again")
    names = [f"{name}classes.txt" for name in ("train", "val", "trainval", "test")]
    files = find(names, *folders, text)
    split = split_by_files(sorted({class_of(name) for name in paths}), files)
    sources = {"text_c10": sha256(*texts.values()),
               **{name: sha256(path) for name, path in files.items()}}
    return Birds(paths, captions, split, bool(files), sources)


def read_mmvae(train, train_text, test, test_text):
    """Two folders with a text file each: -> Birds. Raises DataError.

    Caption i of a file belongs to image i // 10 of its folder, sorted by class, then file.
    """
    paths, captions, parts = {}, {}, []
    for folder, text in ((train, train_text), (test, test_text)):
        found, lines = named_files(folder, ".jpg"), read_lines(text)
        if len(lines) != CAPTIONS * len(found):
            raise DataError(f"{text}: {len(lines)} captions, not {CAPTIONS} for each of the "
                            f"{len(found)} images in {folder}; extract both again")
        paths |= found
        captions |= {name: lines[CAPTIONS * k:CAPTIONS * (k + 1)] for k, name in enumerate(found)}
        parts.append(sorted({class_of(name) for name in found}))
    shared = sorted(set(parts[0]) & set(parts[1]))
    if shared:
        raise DataError(f"{test}: class {shared[0]} is in {train} too; a class must be in one")
    split = carve_val(parts[0]) | dict.fromkeys(parts[1], "test")
    sources = {path.name: sha256(path) for path in (train_text, test_text)}
    return Birds(paths, captions, split, True, sources)


def read_cub(raw):
    """The raw folder in either layout: -> Birds. DataError that lists what is missing."""
    folders = raw / CUB, raw
    reed, mmvae = find(REED, *folders), find(MMVAE, raw, raw / "cub")
    if len(reed) == len(REED):
        birds = read_reed(*reed.values(), folders)
    elif len(mmvae) == len(MMVAE):
        birds = read_mmvae(*mmvae.values())
    else:
        lacks = [", ".join(name for name in layout if name not in found)
                 for layout, found in ((REED, reed), (MMVAE, mmvae))]
        raise DataError(f"{raw}: for {CUB} with Reed's captions, no {lacks[0]}; for the MMVAE "
                        f"download, no {lacks[1]}; --raw takes the folder of one of them")
    empty = [name for name in ("train", "val", "test") if name not in birds.split.values()]
    if empty:
        raise DataError(f"{raw}: {len(birds.split)} classes, none of them for {', '.join(empty)}; "
                        "extract more, at least one for each of train, val and test")
    return birds


def read_bird(path, size):
    """-> (size, size, 3) uint8 image, SHA-256 of the file. Raises DataError."""
    try:
        return shrink(Image.open(path), size), sha256(path)
    except DAMAGED as error:
        raise DataError(f"{path}: cannot be read ({error}); extract it again") from None


# === §5 Writing ===

class ArrayWriter:
    """Appends rows to a .npy file of uint8 without holding them; the header is set on leaving."""

    def __init__(self, path, row_shape):
        self.file, self.row_shape, self.count = open(path, "wb"), row_shape, 0
        self._header()

    def _header(self):
        self.file.seek(0)
        np.lib.format.write_array_header_1_0(self.file, {
            "descr": "|u1", "fortran_order": False, "shape": (self.count, *self.row_shape)})

    def append(self, row):
        assert row.shape == self.row_shape and row.dtype == np.uint8, (row.shape, row.dtype)
        self.file.write(row.tobytes())
        self.count += 1

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        try:
            if error is None:
                self._header()  # NumPy leaves room for the longer count
                self.file.flush()
                os.fsync(self.file.fileno())
        finally:
            with suppress(OSError if error else ()):  # what the disk has no room for
                self.file.close()


def attempt(read, task):
    """read(*task) in a worker process: an error comes back as its message."""
    try:
        return read(*task)
    except DataError as error:
        return str(error)


def start_worker():
    """Leaves Ctrl-C to the parent process, and ends when that ends, even by kill -9."""
    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=follow, daemon=True).start()


def in_parallel(read, tasks):
    """Yields read(*task), or the message of its DataError, for each task in order."""
    pool = ProcessPoolExecutor(os.cpu_count(), initializer=start_worker)
    try:
        yield from pool.map(attempt, repeat(read), tasks, chunksize=8)
    except BrokenProcessPool:
        raise DataError("a worker process was killed; is the memory full? Run it again") from None
    finally:
        pool.shutdown(cancel_futures=True)


def write_rows(folder, shapes, read, tasks, skip_bad):
    """Read the tasks in worker processes and append what they give to <folder>/<name>.npy.

    read(*task) gives one uint8 array for each of `shapes` {name: shape of a row}, then the SHA-256
    of what it read. -> the numbers of the rows kept, the messages of those left out, the SHA-256
    of all. Raises DataError at the first task that fails, unless skip_bad.
    """
    kept, bad, digest = [], [], hashlib.sha256()
    with ExitStack() as stack:
        writers = [stack.enter_context(ArrayWriter(folder / f"{name}.npy", shape))
                   for name, shape in shapes.items()]
        results = stack.enter_context(closing(in_parallel(read, tasks)))
        bar = stack.enter_context(tqdm(results, total=len(tasks), unit="img"))
        for number, result in enumerate(bar):
            if isinstance(result, str):
                bad.append(result)
                if not skip_bad:
                    raise DataError(result + " (or leave it out with --skip-bad)")
                continue
            for writer, row in zip(writers, result):
                writer.append(row)
            digest.update(result[-1].encode())
            kept.append(number)
        if not kept:
            raise DataError(f"none of the {len(bad)} pictures can be read; the first: {bad[0]}")
    return kept, bad, digest.hexdigest()


@contextmanager
def complete_or_nothing(out, need):
    """A folder <out>.partial for `need` bytes of arrays; it becomes `out` if all goes well.

    Else it is removed, and kill -9 leaves it to the next run. DataError if it cannot be written.
    """
    folder = out.with_name(out.name + ".partial")
    place, made = f"{folder}: {need / 1e6:.2f} MB", [p for p in out.parents if not p.exists()]
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
        free = shutil.disk_usage(folder).free
        if free < need:
            raise DataError(f"{place} needed, {free / 1e6:.2f} MB free; make room or take another "
                            "--out")
        yield folder
        os.replace(folder, out)
    except OSError as error:
        raise DataError(f"{place} needed, but it cannot be written ({error.strerror or error}); "
                        "nothing is kept") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # not empty: it has `out`
                parent.rmdir()


def prepare_celeba(raw, out, size=128, skip_bad=False):
    """Raw CelebAMask-HQ -> the arrays of `out`; see the head of this file. Raises DataError."""
    rows, mapping, ids = check_layout(raw, skip_bad)
    sources = {name: sha256(raw / name)
               for name in (ATTRIBUTE_FILE, MAPPING_FILE) if (raw / name).exists()}
    with complete_or_nothing(out, len(ids) * (4 * size ** 2 + len(ATTRIBUTES))) as folder:
        kept, bad, digest = write_rows(
            folder, {"image": (size, size, 3), "mask": (size, size)}, read_face,
            [(raw, k, size) for k in ids], skip_bad)
        ids = [ids[number] for number in kept]
        with ArrayWriter(folder / "attr.npy", (len(ATTRIBUTES),)) as attr:
            for k in ids:
                attr.append(rows[k])
        write_meta(folder, split_of(ids, mapping), {
            "dataset": "celeba", "size": size, "attributes": ATTRIBUTES, "ids": ids,
            "official_split": mapping is not None, "skipped": bad,
            "sha256": {**sources, "images and masks": digest}})
    report(out)


def prepare_cub(raw, out, size=64, skip_bad=False):
    """Raw CUB in either layout -> the files of `out`, as prepare_celeba does. Raises DataError."""
    birds, split = read_cub(raw), {"train": [], "val": [], "test": []}
    with complete_or_nothing(out, len(birds.paths) * 3 * size ** 2) as folder:
        kept, bad, digest = write_rows(folder, {"image": (size, size, 3)}, read_bird,
                                       [(path, size) for path in birds.paths.values()], skip_bad)
        every = list(birds.paths)
        names = [every[number] for number in kept]
        write_json(folder / "text.json", [birds.captions[name] for name in names])
        for row in np.random.default_rng(0).permutation(len(names)).tolist():
            split[birds.split[class_of(names[row])]].append(row)  # shuffled: neighbours differ
        write_meta(folder, split, {
            "dataset": "cub", "size": size, "classes": sorted(birds.split), "names": names,
            "official_split": birds.official, "skipped": bad,
            "sha256": {**birds.sources, "images": digest}})
    report(out)


def write_json(path, value):
    """A JSON file, on the disk before its folder gets its final name."""
    with open(path, "w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())


def write_meta(folder, split, meta):
    """meta.json, with the split and its counts. DataError if one is too small to be of use."""
    counts = {name: len(rows) for name, rows in split.items()}
    if min(counts.values()) < 2:
        few = ", ".join(f"{n} {name}" for name, n in counts.items())
        raise DataError(f"{few}: every split needs 2 at least; extract more of the data")
    write_json(folder / "meta.json",
               {**meta, "count": sum(counts.values()), "counts": counts, "split": split})


# What a row is, and what to say where the raw data do not tell the split.
REPORT = {
    "celeba": ("faces", f"no {MAPPING_FILE}: not the official split; the last 10 % are test, the "
                        "10 % before them validation"),
    "cub": ("birds", "no trainclasses.txt, valclasses.txt, testclasses.txt: not the official "
                     "split; the last 10 % of the classes are test, the 10 % before them "
                     "validation")}


def report(out):
    """Say what was written, read back from `out`."""
    meta = json.loads((out / "meta.json").read_text())
    what, unofficial = REPORT[meta["dataset"]]
    counts = ", ".join(f"{n} {name}" for name, n in meta["counts"].items())
    print(f"{out}: {meta['count']} {what} at {meta['size']}x{meta['size']}: {counts}")
    if not meta["official_split"]:
        print(unofficial)
    for line in meta["skipped"]:
        print("left out:", line)


# === §6 Command line ===

PREPARE = {"celeba": (prepare_celeba, 128), "cub": (prepare_cub, 64)}  # and the default --size


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def parse_args(argv=None):
    """The flags of this script."""
    parser = Parser(prog="data_prep.py", description="Prepare a raw data set for diffmvae.py.")
    parser.add_argument("--dataset", choices=list(PREPARE), required=True,
                        help="what --raw holds: CelebAMask-HQ, or CUB birds with their captions")
    parser.add_argument("--raw", type=Path, required=True, help="the extracted download, read only")
    parser.add_argument("--out", type=Path, help="folder to write (default: data/<dataset>)")
    parser.add_argument("--size", type=int, help="side of the pictures in pixels, a multiple of 8 "
                        "(default: 128 for celeba, 64 for cub)")
    parser.add_argument("--skip-bad", action="store_true",
                        help="leave out pictures with files that are missing or damaged, and list "
                        "them")
    args = parser.parse_args(argv)
    if args.size is None:
        args.size = PREPARE[args.dataset][1]
    if args.size < 8 or args.size % 8:
        parser.error(f"--size {args.size}: must be a positive multiple of 8")
    return args


def main(argv=None):
    """Command line: -> exit code 0, or 2 after one line on stderr."""
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so the workers end too
    out = args.out or Path("data") / args.dataset
    try:
        if os.path.lexists(out):
            raise DataError(f"{out}: exists already; move it away to prepare it again")
        PREPARE[args.dataset][0](args.raw, out, args.size, args.skip_bad)
    except (DataError, OSError) as error:
        print(f"data_prep.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("data_prep.py: interrupted; run it again to start over", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
