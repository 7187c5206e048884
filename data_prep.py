"""Data for diffmvae.py: raw data sets to memory-mappable arrays; built-in toy faces and birds.

    python data_prep.py --dataset celeba --raw CelebAMask-HQ   # 128x128 pixels, paper Sec. 4.2
    python data_prep.py --dataset cub --raw FOLDER             # 64x64 pixels, paper Sec. 4.1

FOLDER has CUB_200_2011/images and Reed's text_c10, or the MMVAE download: train, test and a text
file for each. Splits of CUB share no class. `--out` (data/<dataset>) gets:

    image.npy  (N, H, W, 3) uint8   RGB 0..255
    mask.npy   (N, H, W)    uint8   celeba, 0 or 1: the composite of all face parts but the skin
    attr.npy   (N, 18)      uint8   celeba, 0 or 1: the 18 attributes in the order of ATTRIBUTES
    text.json  N lists of 10        cub: the captions, as written but for whitespace at the ends
    meta.json                       dataset, size, count, names, rows of each split
"""
import argparse
import json
import math
import os
import re
import shutil
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

# The 18 of the 40 attributes that the paper keeps, in file order [Sec. 4.2].
ATTRIBUTES = ("Bald", "Bangs", "Black_Hair", "Blond_Hair", "Brown_Hair", "Bushy_Eyebrows",
              "Eyeglasses", "Gray_Hair", "Heavy_Makeup", "Male", "Mouth_Slightly_Open", "Mustache",
              "Pale_Skin", "Receding_Hairline", "Smiling", "Straight_Hair", "Wavy_Hair",
              "Wearing_Hat")


class UserError(Exception):
    """Something the user can mend; the scripts print it as one line and exit with 2."""


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


def exit_code(name, work, *args, errors=()):
    """work(*args) -> its result or 0, or 2 after one line on stderr for what a user can mend."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # what cannot be printed ends no run
        stream.reconfigure(errors="backslashreplace")
    try:
        return work(*args) or 0
    except (UserError, OSError, MemoryError, KeyboardInterrupt, *errors) as error:
        print(f"{name}:", *(str(error) or type(error).__name__).split(), file=sys.stderr)
        return 2


# === §1 Toy faces: drawn, so that every attribute is visible and every mask exact ===

HAIR_COLOURS = {"Black_Hair": (25, 22, 30), "Blond_Hair": (240, 208, 95),
                "Brown_Hair": (105, 62, 28), "Gray_Hair": (165, 165, 172)}


def draw_attributes(rng):
    """A random set that a picture can show in full, none of them rare: -> {name: bool}."""
    has = {name: False for name in ATTRIBUTES}
    has["Male"] = rng.random() < 0.45
    top = rng.choice(["plain", "Bangs", "Receding_Hairline", "Wearing_Hat", "Bald"],
                     p=[0.34, 0.22, 0.14, 0.17, 0.13])
    chosen = [top] if top == "Bald" else [
        top, rng.choice(["plain", *HAIR_COLOURS], p=[0.12, 0.25, 0.22, 0.23, 0.18]),
        rng.choice(["plain", "Straight_Hair", "Wavy_Hair"], p=[0.36, 0.30, 0.34])]
    has.update((str(name), True) for name in chosen if name != "plain")
    for name, rate in (("Bushy_Eyebrows", 0.25), ("Eyeglasses", 0.22), ("Pale_Skin", 0.22),
                       ("Mouth_Slightly_Open", 0.42), ("Smiling", 0.47)):
        has[name] = rng.random() < rate
    has["Heavy_Makeup"] = rng.random() < (0.08 if has["Male"] else 0.5)
    has["Mustache"] = rng.random() < (0.4 if has["Male"] else 0.0)
    return has


class Pen:
    """Draws the same shapes on a picture and, if `part` is 255 (in the mask) or 0 (skin, that hides
    what is there), on its mask, both four times too large. Coordinates are those of a 32x32
    picture, moved by (dx, dy)."""

    def __init__(self, size, background, dx=0, dy=0):
        self.image = Image.new("RGB", (4 * size, 4 * size), background)
        self.mask = Image.new("L", (4 * size, 4 * size))
        self.pens = ImageDraw.Draw(self.image), ImageDraw.Draw(self.mask)
        self.unit, self.dx, self.dy = size / 8, dx, dy

    def draw(self, shape, points, colour, part, **options):
        points = [((x + self.dx) * self.unit, (y + self.dy) * self.unit) for x, y in points]
        for pen, fill in zip(self.pens, (colour, part)):
            if fill is not None:
                getattr(pen, shape)(points, fill=fill, **options)

    def ellipse(self, x0, y0, x1, y1, colour, part=None):
        self.draw("ellipse", [(x0, y0), (x1, y1)], colour, part)

    def polygon(self, points, colour, part=None):
        self.draw("polygon", points, colour, part)

    def line(self, points, colour, width, part=None):
        width = max(1, round(width * self.unit))
        self.draw("line", points, colour, part, width=width, joint="curve")

    def result(self, size):
        """-> (size, size, 3) uint8 picture, (size, size) uint8 mask in {0, 1}."""
        image, mask = (np.asarray(canvas.resize((size, size), Image.Resampling.BOX))
                       for canvas in (self.image, self.mask))
        return image, (mask > 127).astype(np.uint8)


def draw_face(has, rng, size=32):
    """Draw one face with the attributes `has`: -> image (size, size, 3), mask (size, size), uint8.
    What no attribute names is random: background, clothes, position, width of the head, eyes."""
    background = tuple(int(c) for c in rng.integers(0, 256, 3))
    pen = Pen(size, background, rng.uniform(-1, 1), rng.uniform(-0.8, 0.8))
    skin = (255, 236, 224) if has["Pale_Skin"] else [(224, 172, 125), (198, 134, 90),
                                                     (150, 95, 60)][rng.integers(3)]
    hair = next((c for n, c in HAIR_COLOURS.items() if has[n]), (190, 60, 25))  # else auburn
    half = rng.uniform(7.2, 8.2)  # half the width of the head
    left, right = 16 - half, 16 + half
    # Long hair behind the head: straight curtains, or waves of locks; nothing when short
    if has["Straight_Hair"]:
        pen.polygon([(left - 2, 9), (right + 2, 9), (right + 2, 27), (left - 2, 27)], hair, 255)
    if has["Wavy_Hair"]:
        for k, y in enumerate((7.5, 12, 16.5, 21)):
            out = 3.2 if k % 2 else 1.4
            pen.ellipse(left - out, y, left + 4, y + 6, hair, 255)
            pen.ellipse(right - 4, y, right + out, y + 6, hair, 255)
    # Neck and clothes: wide square shoulders for a man, narrow round ones otherwise
    cloth = tuple(int(c) for c in rng.integers(30, 226, 3))
    neck = 4.6 if has["Male"] else 2.6
    pen.polygon([(16 - neck, 22), (16 + neck, 22), (16 + neck, 34), (16 - neck, 34)], skin, 255)
    if has["Male"]:
        pen.polygon([(1, 27.5), (11, 27.5), (16, 31.5), (21, 27.5), (31, 27.5), (31, 35), (1, 35)],
                    cloth, 255)
    else:
        pen.ellipse(7, 28.5, 25, 42, cloth, 255)
    # Ears (part of the mask) and the skin, which is not; a man's jaw is square
    for x in (left, right):
        pen.ellipse(x - 1.4, 13.5, x + 1.4, 18.5, skin, 255)
    pen.ellipse(left, 4.5, right, 26.5, skin, 0)
    if has["Male"]:
        jaw = half - 1
        pen.polygon([(left, 16), (right, 16), (16 + jaw, 24), (16 + jaw - 3, 27),
                     (16 - jaw + 3, 27), (16 - jaw, 24)], skin, 0)
    if has["Heavy_Makeup"]:
        for x in (left + 2.4, right - 2.4):
            pen.ellipse(x - 1.9, 17.2, x + 1.9, 20.4, (240, 85, 125))
    # Brows, eyes, nose and glasses, all parts of the mask
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
    # Lips (part of the mask) and moustache (not a part): wide and curved up when smiling
    lips = (205, 15, 60) if has["Heavy_Makeup"] else (165, 75, 70)
    wide, lift = (4.6, 2.0) if has["Smiling"] else (2.5, 0.0)
    xs = [16 - wide + 2 * wide * k / 8 for k in range(9)]
    bend = [((x - 16) / wide) ** 2 for x in xs]  # 1 at the corners, 0 in the middle
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
    # Hair on the skull, fringe, bare temples, or a hat with sideburns: hair stays visible
    if has["Wearing_Hat"]:
        felt = tuple(int(c) for c in rng.integers(40, 216, 3))
        for x in (left - 0.5, right - 1.7):
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
        plain = [(right - 1, 9.6), (20, 7.2), (16, 6.6), (12, 7.2), (left + 1, 9.6)]
        pen.polygon(arc + next((line[name] for name in line if has[name]), plain), hair, 255)
    return pen.result(size)


def toy_faces(n, size=32, seed=0):
    """-> {"image" (n, size, size, 3), "mask" (n, size, size), "attr" (n, 18)}, uint8, the last two
    in {0, 1}. Face k depends on (seed, k) alone."""
    x = {name: np.empty((n, *shape), np.uint8) for name, shape in (
        ("image", (size, size, 3)), ("mask", (size, size)), ("attr", (len(ATTRIBUTES),)))}
    for k in range(n):
        rng = np.random.default_rng((seed, k))
        has = draw_attributes(rng)
        x["image"][k], x["mask"][k] = draw_face(has, rng, size)
        x["attr"][k] = [has[name] for name in ATTRIBUTES]
    return x


# === §2 Toy birds: drawn, with captions that name what is drawn ===

BIRD_COLOURS = {"red": (214, 36, 36), "yellow": (250, 214, 40), "blue": (45, 85, 220),
                "green": (45, 155, 65), "black": (22, 22, 28), "white": (246, 246, 246)}
BEAK_COLOURS = {"yellow": (255, 200, 0), "black": (15, 15, 20)}
BIRD_CHOICES = {"size": ("small", "large"),
                **dict.fromkeys(("bird", "wings", "head", "belly"), tuple(BIRD_COLOURS)),
                "shape": ("short", "long", "curved"), "beak": tuple(BEAK_COLOURS),
                "crown": ("pointed", "")}
FACT_NOUN = {"size": "bird", "shape": "beak"}  # the noun that a choice describes, if not itself
# What a caption can say: "small bird", "red wings", "long beak", "pointed crown", ...
BIRD_FACTS = tuple(f"{value} {FACT_NOUN.get(name, name)}"
                   for name, values in BIRD_CHOICES.items() for value in values if value)
SYNONYMS = {"body": "bird", "wing": "wings", "breast": "belly", "bill": "beak", "crest": "crown",
            "tiny": "small", "big": "large"}


def facts_of(text):
    """The BIRD_FACTS that a caption states: adjectives go with their part's noun, or the last."""
    found, noun = set(), None
    for part in re.split(r"[,.:]|\b(?:and|with|has)\b", text.lower()):
        terms = [SYNONYMS.get(word, word) for word in part.split()]
        noun = next((t for t in terms if t in ("bird", "wings", "head", "belly", "beak", "crown")),
                    noun)
        found |= {f"{term} {noun}" for term in terms} & set(BIRD_FACTS)
    return found


STOPWORDS = set("a also an and are as at bird but by for from has have in is it its of on or that "
                "the there this to very which while with".split())


def content_words(text):
    """The words of a real caption, in lower case, without STOPWORDS: a set."""
    return set(re.findall("[a-z]{2,}", text.lower())) - STOPWORDS


def frequent_words(captions, n=50):
    """The n content words that are in the most captions."""
    counts = Counter(word for text in captions for word in content_words(text))
    return tuple(sorted(counts, key=lambda word: (-counts[word], word))[:n])


def draw_bird(bird, rng, size=32):
    """{name of BIRD_CHOICES: value} -> (size, size, 3) uint8. What no word names is random: the
    background, which is light, and the position."""
    pen = Pen(size, tuple(int(c) for c in rng.integers(140, 256, 3)))
    scale = {"small": 0.78, "large": 1.05}[bird["size"]]
    x0, y0 = 13.2 + rng.uniform(-0.6, 0.6), 18 + rng.uniform(-0.6, 0.6)
    colour = {name: BIRD_COLOURS[bird[name]] for name in ("bird", "wings", "head", "belly")}
    def outline(points, fill):  # points around the body's centre
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
    beak = {"short": [(10, -9.6), (13.4, -7), (10, -4.4)], "long": [(10, -9), (17, -7), (10, -5)],
            "curved": [(9.6, -10), (13.8, -9.4), (15.2, -6.6), (14.6, -1.6), (12.4, -4.6),
                       (10, -4.4)]}
    outline(beak[bird["shape"]], BEAK_COLOURS[bird["beak"]])
    ellipse(6.6, -6.8, 4.3, 4.2, colour["head"])
    ellipse(7.9, -7.5, 1.15, 1.15, (255, 255, 255))
    ellipse(8.1, -7.5, 0.5, 0.5, (0, 0, 0))
    return pen.result(size)[0]


def caption(bird, rng, everything):
    """One sentence about a bird, or without `everything` about some parts, always in one order:
    small networks do not learn within minutes whose colour is whose if it is free."""
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
    """-> {"image" (n, size, size, 3) uint8, "text": n lists of 10 captions}, as toy_faces."""
    image, text = np.empty((n, size, size, 3), np.uint8), []
    for k in range(n):
        rng = np.random.default_rng((seed, k))
        bird = {name: values[rng.integers(len(values))] for name, values in BIRD_CHOICES.items()}
        image[k] = draw_bird(bird, rng, size)
        text.append([])
        while len(text[k]) < 10:
            one = caption(bird, rng, everything=len(text[k]) < 8)
            text[k] += [one] * (one not in text[k])
    return {"image": image, "text": text}


# === §3 Raw CelebAMask-HQ [Sec. 4.2] ===

PARTS = ("nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear", "mouth", "u_lip",
         "l_lip", "hair", "hat", "ear_r", "neck_l", "neck", "cloth")  # all but "skin"
IMAGES, MASKS = "CelebA-HQ-img", "CelebAMask-HQ-mask-anno"
ATTRIBUTE_FILE, MAPPING_FILE = "CelebAMask-HQ-attribute-anno.txt", "CelebA-HQ-to-CelebA-mapping.txt"


def read_attributes(path):
    """The attribute file: the count, the names, then lines of `k.jpg` and 40 times -1 or 1.
    -> {k: (18,) uint8 in {0, 1}}, in the order of ATTRIBUTES."""
    lines = path.read_text(errors="replace").splitlines()
    names = lines[1].split() if len(lines) > 1 else []
    if missing := [name for name in ATTRIBUTES if name not in names]:
        raise UserError(f"{path}: line 2 names no {', '.join(missing)}; is it the attribute file?")
    columns, rows = [names.index(name) for name in ATTRIBUTES], {}
    for number, line in enumerate(lines[2:], start=3):
        file, *values = line.split() or [""]
        if len(values) != len(names) or set(values) - {"-1", "1"} or not file[:-4].isdecimal():
            raise UserError(f"{path}: line {number} is not 'k.jpg' and {len(names)} times -1 or 1")
        rows[int(file[:-4])] = np.array([values[c] == "1" for c in columns], np.uint8)
    if not rows or lines[0].strip() != str(len(rows)):
        raise UserError(f"{path}: line 1 says {lines[0].strip()} images, {len(rows)} rows follow")
    return rows


def carve(items, share, *names):
    """Sorted items -> {item: split}: the last of them, 1 / share each, for `names`."""
    labels = [name for name in names for _ in range(max(1, len(items) // share))]
    return dict(zip(items, ["train"] * (len(items) - len(labels)) + labels))


def split_faces(path, ids):
    """{split: rows}: the split of CelebAMask-HQ's authors by the mapping file (a header, then lines
    of `idx orig_idx orig_file`), or without it the last tenth for testing, one for validation."""
    split = carve(ids, 10, "val", "test")
    if path.exists():
        with user_error(f"{path}: a line is missing or not 'idx orig_idx orig_file'"):
            lines = [line.split() for line in path.read_text().splitlines()[1:]]
            origin = {int(line[0]): int(line[1]) for line in lines if line}
            split = {k: "test" if origin[k] >= 182638 else "val" if origin[k] >= 162771 else "train"
                     for k in ids}
    else:
        print(f"no {path.name}: the last tenths are test and validation, not the official split")
    return {name: [row for row, k in enumerate(ids) if split[k] == name]
            for name in ("train", "val", "test")}


def shrink(path, size):
    """A picture of any mode and shape -> (size, size, 3) uint8 RGB, nothing cut off."""
    with user_error(f"{path}: cannot be read; extract it again"):
        image = Image.open(path)
        image.draft("RGB", (2 * size, 2 * size))  # the JPEG decoder halves, down to twice the size
        return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))


def read_face(raw, k, size):
    """Face k: -> (size, size, 3) image, (size, size) mask, the union of PARTS cut at one half."""
    image, union = shrink(raw / IMAGES / f"{k}.jpg", size), None
    for part in PARTS:
        path = raw / MASKS / str(k // 2000) / f"{k:05d}_{part}.png"
        if path.exists():
            with user_error(f"{path}: cannot be read; extract it again"):
                pixels = np.asarray(Image.open(path).convert("RGB").getchannel(0)) != 0
                union = pixels if union is None else union | pixels
    if union is None:
        raise UserError(f"{raw / MASKS}: no mask of face {k} ({k:05d}_*.png); extract it again")
    mask = Image.fromarray(union.astype(np.uint8) * 255)
    mask = np.asarray(mask.resize((size, size), Image.Resampling.BILINEAR)) > 127
    return image, mask.astype(np.uint8)


def read_celeba(raw, size):
    """Raw CelebAMask-HQ -> numbers, {split: rows}, {"attr": array}, number -> image and mask."""
    if missing := [name for name in (IMAGES, MASKS, ATTRIBUTE_FILE) if not (raw / name).exists()]:
        raise UserError(f"{raw}: no {', '.join(missing)}; --raw takes the extracted CelebAMask-HQ")
    rows = read_attributes(raw / ATTRIBUTE_FILE)
    ids = sorted(rows)
    split = split_faces(raw / MAPPING_FILE, ids)
    return ids, split, {"attr": np.stack([rows[k] for k in ids])}, lambda k: read_face(raw, k, size)


# === §4 Raw CUB: birds with ten captions each [Sec. 4.1] ===

def named_files(folder, suffix):
    """{"<class>/<name>": path} of folder/<class>/<name><suffix>, sorted by class, then file."""
    paths = sorted(folder.glob(f"[!.]*/[!.]*{suffix}"))
    return {f"{path.parent.name}/{path.stem}": path for path in paths}


def read_lines(path):
    """The lines of a text file that are not blank, without whitespace at their ends."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return [line.strip() for line in lines if line.strip()]


def split_classes(classes, files):
    """Sorted classes, {part: file that lists classes} -> {class: split}; without files the last
    tenths, without a val file the last twentieth of trainval or train."""
    if not files:
        print("no testclasses.txt: the last tenths are test and validation, not the official split")
        return carve(classes, 10, "val", "test")
    rest = "trainval" if "trainval" in files else "train"
    parts = ("train", "val", "test") if {"train", "val"} <= files.keys() else (rest, "test")
    listed = {part: read_lines(files[part]) for part in parts if part in files}
    split = {name: [part for part in listed if name in listed[part]] for name in classes}
    if wrong := [name for name in classes if len(split[name]) != 1]:
        raise UserError(f"{', '.join(map(str, files.values()))}: class {wrong[0]} has to be in one "
                        f"of them, not in {split[wrong[0]]}")
    whole = [name for name in classes if split[name] == [rest] and "val" not in parts]
    return {name: part for name, (part,) in split.items()} | carve(whole, 20, "val")


def read_reed(images, text, folders):
    """Pictures and captions joined by name, one text file a picture, and files of class names in
    one of the folders: -> {bird: path of its picture}, {bird: captions}, {class: split}."""
    paths, texts = named_files(images, ".jpg"), named_files(text, ".txt")
    if lone := sorted(paths.keys() ^ texts):
        raise UserError(f"{images}, {text}: {len(lone)} images or captions without the other, the "
                        f"first is {lone[0]}; extract both again")
    captions = {name: read_lines(texts[name]) for name in paths}
    for name, lines in captions.items():
        if len(lines) != 10:
            raise UserError(f"{texts[name]}: {len(lines)} captions, not 10; extract it again")
    files = {part: folder / f"{part}classes.txt" for part in ("train", "val", "trainval", "test")
             for folder in folders if (folder / f"{part}classes.txt").exists()}
    return paths, captions, split_classes(sorted({name.split("/")[0] for name in paths}), files)


def read_mmvae(raw):
    """Two folders with a text file each, of which caption i belongs to image i // 10 of the folder,
    sorted by class, then file: -> as read_reed."""
    paths, captions, classes = {}, {}, {}
    for part, file in (("train", "text_trainvalclasses.txt"), ("test", "text_testclasses.txt")):
        found, lines = named_files(raw / part, ".jpg"), read_lines(raw / file)
        if len(lines) != 10 * len(found):
            raise UserError(f"{raw / file}: {len(lines)} captions, not 10 for each of the "
                            f"{len(found)} images in {raw / part}; extract both again")
        paths |= found
        captions |= {name: lines[10 * k:10 * k + 10] for k, name in enumerate(found)}
        classes[part] = sorted({name.split("/")[0] for name in found})
    split = carve(classes["train"], 20, "val") | dict.fromkeys(classes["test"], "test")
    return paths, captions, split


def read_cub(raw, size):
    """Raw CUB in either layout -> names, {split: rows}, {"text": captions}, name -> image."""
    places = [raw, raw / "CUB_200_2011", raw / "cub"]
    mmvae = ("train", "test", "text_trainvalclasses.txt", "text_testclasses.txt")
    images, text, both = ([p for p in places if all((p / name).exists() for name in names)]
                          for names in (["images"], ["text_c10"], mmvae))
    if images and text:
        text = text[0] / "text_c10"
        paths, captions, kinds = read_reed(images[0] / "images", text, [text, *places])
    elif both:
        paths, captions, kinds = read_mmvae(both[0])
    else:
        raise UserError(f"{raw}: neither CUB_200_2011/images and text_c10, nor {', '.join(mmvae)}")
    names, split = list(paths), {"train": [], "val": [], "test": []}
    for row in np.random.default_rng(0).permutation(len(names)).tolist():
        split[kinds[names[row].split("/")[0]]].append(row)       # shuffled: neighbours differ
    return names, split, {"text": [captions[n] for n in names]}, lambda n: (shrink(paths[n], size),)


# === §5 Writing and reading prepared data ===

def in_parallel(read, tasks):
    """read(task) -> uint8 arrays: one array of all for each, in memory (CelebAMask-HQ: 2 GB)."""
    pool, columns = ThreadPoolExecutor(os.cpu_count()), None  # Pillow decodes outside Python's lock
    try:
        for row, parts in enumerate(tqdm(pool.map(read, tasks), total=len(tasks), unit="img")):
            columns = columns or [np.empty((len(tasks), *part.shape), np.uint8) for part in parts]
            for column, part in zip(columns, parts):
                column[row] = part
    finally:
        pool.shutdown(cancel_futures=True)
    return columns


def prepare(dataset, raw, out, size):
    """Raw data -> the folder `out`, which is there when it is whole; UserError if it cannot be."""
    if os.path.lexists(out):
        raise UserError(f"{out}: exists already; move it away to prepare it again")
    names, split, arrays, read = READ[dataset][0](raw, size)
    counts = ", ".join(f"{len(rows)} {name}" for name, rows in split.items())
    if min(map(len, split.values())) < 2:
        raise UserError(f"{raw}: {counts}: every split needs 2 at least; extract more of the data")
    meta = {"dataset": dataset, "size": size, "count": len(names), "names": names, "split": split}
    temporary = out.with_name(out.name + ".partial")
    with user_error(f"{out}: cannot be written, nothing is kept"):
        temporary.mkdir(parents=True)
        try:
            arrays |= zip(("image", "mask"), in_parallel(read, names))
            for name, value in {**arrays, "meta": meta}.items():
                if isinstance(value, np.ndarray):
                    np.save(temporary / f"{name}.npy", value)
                else:
                    (temporary / f"{name}.json").write_text(json.dumps(value))
            os.replace(temporary, out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    print(f"{out}: {len(names)} at {size}x{size}: {counts}")


def read_prepared(folder, dataset):
    """What prepare() wrote: -> arrays by name, {split: rows}. UserError if it does not fit."""
    with user_error(f"{folder}: not a complete data set of data_prep.py"):
        meta = json.loads((folder / "meta.json").read_text())
        if meta["dataset"] != dataset:
            raise ValueError(f"it was prepared with --dataset {meta['dataset']}")
        n, size = meta["count"], meta["size"]
        shapes = {"image": (n, size, size, 3), "mask": (n, size, size), "attr": (n, 18)}
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r")
                  for name in (shapes if dataset == "celeba" else ["image"])}
        for name, a in arrays.items():
            if (a.shape, a.dtype) != (shapes[name], np.uint8):
                raise ValueError(f"{name}.npy has {a.dtype} {a.shape}, not uint8 {shapes[name]}")
        if dataset == "cub":
            arrays["text"] = json.loads((folder / "text.json").read_text())
        rows = [meta["split"][name] for name in ("train", "val", "test")]
        if not all(len(part) > 1 and {*part} <= {*range(n)} for part in rows):
            raise ValueError(f"a split has under two rows, or not of 0 to {n - 1}")
    return arrays, meta["split"]


# === §6 Command line ===

READ = {"celeba": (read_celeba, 128), "cub": (read_cub, 64)}     # and the default --size


class Parser(argparse.ArgumentParser):
    """Errors take one line, without the usage."""
    def error(self, message):
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def parse_args(argv=None):
    """All flags, checked."""
    parser = Parser(prog="data_prep.py", description="Prepare a raw data set for diffmvae.py.")
    add = parser.add_argument
    add("--dataset", choices=list(READ), required=True, help="CelebAMask-HQ, or birds and captions")
    add("--raw", type=Path, required=True, help="the extracted download, read only")
    add("--out", type=Path, help="folder to write (default: data/<dataset>)")
    add("--size", type=int, help="pixels, a multiple of 8 (default: 128 for celeba, 64 for cub)")
    args = parser.parse_args(argv)
    args.size = READ[args.dataset][1] if args.size is None else args.size
    if not 8 <= args.size <= 1024 or args.size % 8:
        parser.error(f"--size {args.size}: must be a multiple of 8 up to 1024")
    return args


def main(argv=None):
    """The command line: -> exit code."""
    args = parse_args(argv)
    out = args.out or Path("data") / args.dataset
    return exit_code("data_prep.py", prepare, args.dataset, args.raw, out, args.size)


if __name__ == "__main__":
    sys.exit(main())
