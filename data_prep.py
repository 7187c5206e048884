"""Data for diffmvae.py: raw data sets to memory-mappable arrays; built-in toy faces and birds.

    python data_prep.py --dataset celeba --raw CelebAMask-HQ   # 128x128 pixels, paper Sec. 4.2
    python data_prep.py --dataset cub --raw FOLDER             # 64x64 pixels, paper Sec. 4.1

`--out` (data/<dataset>) gets:
    image.npy  (N, H, W, 3) uint8   RGB 0..255
    mask.npy   (N, H, W)    uint8   celeba, 0 or 1: the composite of all face parts but the skin
    attr.npy   (N, 18)      uint8   celeba, 0 or 1: the 18 attributes in the order of ATTRIBUTES
    text.json  N lists of 10        cub: the captions, as written but for blanks and U+FFFD
    meta.json                       dataset, size, count, names, rows of each split
"""
import argparse
import json
import math
import re
import shutil
import sys
from contextlib import contextmanager
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

# The 18 of the 40 attributes that the paper keeps, in file order [Sec. 4.2].
ATTRIBUTES = ("Bald", "Bangs", "Black_Hair", "Blond_Hair", "Brown_Hair", "Bushy_Eyebrows",
              "Eyeglasses", "Gray_Hair", "Heavy_Makeup", "Male", "Mouth_Slightly_Open", "Mustache",
              "Pale_Skin", "Receding_Hairline", "Smiling", "Straight_Hair", "Wavy_Hair",
              "Wearing_Hat")
FILES = {"celeba": ("image", "mask", "attr"), "cub": ("image", "text")}


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


def exit_code(name, work, *errors):
    """work() -> its result or 0, or 2 after one line on stderr for what a user can mend."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # what cannot be printed ends no run
        getattr(stream, "reconfigure", dict)(errors="backslashreplace")  # a notebook's has none
    try:
        return work() or 0
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
        self.draw("line", points, colour, part, width=round(width * self.unit) or 1, joint="curve")

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
    rows = []
    for k in range(n):
        rng = np.random.default_rng((seed, k))
        has = draw_attributes(rng)
        rows.append((*draw_face(has, rng, size), np.uint8([has[name] for name in ATTRIBUTES])))
    return {name: np.stack(values) for name, values in zip(FILES["celeba"], zip(*rows))}


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
    """One sentence about a bird: all parts, in one order, or one to three of them, in any."""
    pick = lambda *texts: texts[rng.integers(len(texts))]
    opening = pick("a {size} {bird} bird with ", "this {size} {bird} bird has ",
                   "the bird is {size} and {bird} with ", "a {size} bird with ",
                   "this {size} bird has ")
    parts = [*["a {bird} body"] * ("{bird}" not in opening),
             pick("a {belly} belly", "a {belly} breast"),
             pick("{wings} wings", "{wings} wings", "wings that are {wings}"), "a {head} head",
             *[pick("a pointed crown", "a pointed crest")] * bool(bird["crown"]),
             "a {shape} {beak} " + pick("beak", "bill")]
    if not everything:
        parts[-1] = pick(parts[-1].replace("{shape} ", ""), parts[-1].replace("{beak} ", ""))
        rng.shuffle(parts)
        parts = parts[:rng.integers(1, 4)]
    *most, last = parts
    listed = ", ".join(most) + " and " * bool(most) + last
    size = {"small": pick("small", "small", "tiny"), "large": pick("large", "large", "big")}
    return (opening + listed + ".").format(**{**bird, "size": size[bird["size"]]})


def toy_birds(n, size=32, seed=0):
    """-> {"image" (n, size, size, 3) uint8, "text": n lists of 10 captions}, as toy_faces."""
    image, text = np.empty((n, size, size, 3), np.uint8), [[] for _ in range(n)]
    for k in range(n):
        rng = np.random.default_rng((seed, k))
        bird = {name: values[rng.integers(len(values))] for name, values in BIRD_CHOICES.items()}
        image[k] = draw_bird(bird, rng, size)
        while len(text[k]) < 10:
            one = caption(bird, rng, everything=len(text[k]) < 7)
            text[k] += [one] * (one not in text[k])
    return {"image": image, "text": text}


# === §3 Files as people have them ===

BILINEAR = Image.Resampling.BILINEAR
PLAIN = dict(zip(map(ord, "‘’`´“”«»‐‑‒–—―−"), 4 * "'" + 4 * '"' + 7 * "-"))
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
    """The union of masks -> (size, size) uint8 in {0, 1}. On is what is above half of the largest
    value in its file: of the alpha channel if that varies, else of any channel."""
    union = False
    for path in paths:
        with user_error(f"{path}: cannot be read as a mask"):
            image = ImageOps.exif_transpose(Image.open(path))
            values = np.asarray(image if image.mode[0] in "IF" else image.convert("RGBA"))
            if values.ndim == 3:
                alpha = values[..., 3]                           # (H, W)
                values = alpha if alpha.min() < alpha.max() else values[..., :3].max(2)
            union = union | (values > values.max() / 2)
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


# === §4 Raw CelebAMask-HQ [Sec. 4.2] ===

PARTS = ("nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear", "mouth", "u_lip",
         "l_lip", "hair", "hat", "ear_r", "neck_l", "neck", "cloth")  # all but "skin"
IMAGES, MASKS = "CelebA-HQ-img", "CelebAMask-HQ-mask-anno"
ATTRIBUTE_FILE, MAPPING_FILE = "CelebAMask-HQ-attribute-anno.txt", "CelebA-HQ-to-CelebA-mapping.txt"


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
            rows[int(Path(file).stem)] = np.uint8([values[c] == "1" for c in columns])
        if count != str(len(rows)):
            raise ValueError(f"line 1 says {count} images, {len(rows)} rows follow")
    return rows


def carve(items, share, *names):
    """Sorted items -> {item: split}: the last of them, 1 / share each, for `names`."""
    labels = [name for name in names for _ in range(max(1, len(items) // share))]
    return dict(zip(items, ["train"] * (len(items) - len(labels)) + labels))


def split_faces(path, ids):
    """{face: split}: the split of CelebAMask-HQ's authors by the mapping file (lines of `idx
    orig_idx orig_file`), or without it the last tenth for testing, one for validation."""
    if not path.exists():
        print(f"no {path.name}: the last tenths are test and validation, not the official split")
        return carve(ids, 10, "val", "test")
    with user_error(f"{path}: a line is missing or not 'idx orig_idx orig_file'"):
        lines = [line.split() for line in read_lines(path)]
        origin = {int(line[0]): int(line[1]) for line in lines if line[0].isdecimal()}
        return {k: "test" if origin[k] >= 182638 else "val" if origin[k] >= 162771 else "train"
                for k in ids}


def read_celeba(raw, size):
    """Raw CelebAMask-HQ -> {face: split}, and a function of a face -> image, mask (the union of
    PARTS), attributes."""
    attributes, strange, masks = read_attributes(raw / ATTRIBUTE_FILE), [], {}
    pictures = {int(path.stem): path for path in sorted((raw / IMAGES).iterdir())
                if path.stem.isdecimal() and path.suffix.lower() in SUFFIXES}
    for path in sorted((raw / MASKS).rglob("*.*")):              # 0/00000_hair.png, or all in one
        k, _, part = path.stem.partition("_")
        if not k.isdecimal() or int(k) not in attributes or part not in (*PARTS, "skin"):
            strange.append(path.name)
        elif part != "skin":
            masks.setdefault(int(k), []).append(path)
    if strange:
        print(f"{raw / MASKS}: {len(strange)} files of no face and part, the first: {strange[0]}")

    def read(k):
        return (read_picture(pictures.get(k, raw / IMAGES / f"{k}.jpg"), size),
                read_mask(masks.get(k, [raw / MASKS / f"{k // 2000}/{k:05d}_hair.png"]), size),
                attributes[k])
    return split_faces(raw / MAPPING_FILE, sorted(attributes)), read


# === §5 Raw CUB: birds with ten captions each [Sec. 4.1] ===

def named_files(folder, *suffixes):
    """{"<class>/<name>": path} of folder/<class>/<name><suffix>, sorted by class, then file."""
    return {f"{path.parent.name}/{path.stem}": path for path in sorted(folder.glob("[!.]*/[!.]*"))
            if path.suffix.lower() in suffixes}


def read_cub(raw, size):
    """Raw CUB -> {bird: split}, and a function of a bird -> image, captions. Either `images` beside
    `text_c10`, one text a picture, or as the MMVAE code has it: folders train and test, each with a
    text of ten lines for every picture, sorted by class, then file."""
    find = lambda name: [*raw.glob(name), *sorted(raw.glob(f"*/{name}")), None]
    texts, whole, test = (find(name)[0] for name in (
        "text_c10", "text_trainvalclasses.txt", "testclasses.txt"))
    images = next(path for path in find("images")                # Reed's own holds features
                  if path is None or named_files(path, *SUFFIXES))
    test = test and {*read_lines(test)}                          # names of classes
    paths, captions = {}, {}
    if images and texts:
        paths, captions = named_files(images, *SUFFIXES), named_files(texts, ".txt")
    elif not whole:
        raise UserError(f"{raw}: neither images and text_c10, nor text_trainvalclasses.txt")
    for part, kind in () if images and texts else (("train", "trainval"), ("test", "test")):
        file = whole.with_name(f"text_{kind}classes.txt")
        found, lines = named_files(whole.with_name(part), *SUFFIXES), read_lines(file)
        if len(lines) != 10 * len(found):
            raise UserError(f"{file}: {len(lines)} captions, not 10 for each of the {len(found)} "
                            f"images in {part}; extract both again")
        paths |= found
        captions |= {name: lines[10 * k:10 * k + 10] for k, name in enumerate(found)}
        test = {name.split("/")[0] for name in found}            # of the last folder
    names = [*{**paths, **captions}]
    classes = sorted({name.split("/")[0] for name in names})
    if test is None:
        print("no testclasses.txt: the last tenths are test and validation, not the official split")
        split = carve(classes, 10, "val", "test")
    else:
        split = carve([name for name in classes if name not in test], 20, "val")

    def read(name):
        lines = captions.get(name, [])
        lines = read_lines(lines) if isinstance(lines, Path) else lines
        if len(lines) != 10:
            raise UserError(f"{name}: {len(lines)} captions, not 10")
        return read_picture(paths.get(name) or images / f"{name}.jpg", size), lines

    order = np.random.default_rng(0).permutation(len(names))     # so that neighbours differ
    return {names[k]: split.get(names[k].split("/")[0], "test") for k in order}, read


# === §6 Writing and reading prepared data ===

def prepare(dataset, raw, out, size, partial=False):
    """Raw data -> the folder `out`, which is there when it is whole; UserError if it cannot be, or
    if something is missing or damaged, unless `partial` leaves that out."""
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: exists already; move it away to prepare it again")
    kinds, read = {"celeba": read_celeba, "cub": read_cub}[dataset](raw, size)
    temporary, found, faults = out.with_name(out.name + ".partial"), {}, {}

    def attempt(name):
        try:
            found[name] = read(name)
        except (UserError, OSError) as error:
            faults[name] = str(error)

    with user_error(f"{out}: cannot be written, nothing is kept"):
        temporary.mkdir(parents=True)
        try:
            with ThreadPool() as pool:  # Pillow decodes outside Python's lock
                list(tqdm(pool.imap(attempt, kinds), total=len(kinds), unit="img"))
            if faults:
                first = "; ".join([faults[name] for name in kinds if name in faults][:5])
                text = f"{len(faults)} of {len(kinds)} cannot be used: {first}"
                if not partial:
                    raise UserError(f"{raw}: {text}; --partial goes on without them")
                print(text)
            names = [name for name in kinds if name in found]
            split = {part: [row for row, name in enumerate(names) if kinds[name] == part]
                     for part in ("train", "val", "test")}
            counts = ", ".join(f"{len(rows)} {part}" for part, rows in split.items())
            if min(map(len, split.values())) < 2:
                raise UserError(f"{raw}: {counts}: every split needs 2 at least")
            for file, values in zip(FILES[dataset], zip(*map(found.get, names))):
                if isinstance(values[0], np.ndarray):
                    np.save(temporary / f"{file}.npy", np.stack(values))
                else:
                    (temporary / f"{file}.json").write_text(json.dumps(values))
            meta = dict(dataset=dataset, size=size, count=len(names), names=names, split=split)
            (temporary / "meta.json").write_text(json.dumps(meta))
            temporary.rename(out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    print(f"{out}: {len(names)} at {size}x{size}: {counts}")


def read_prepared(folder, dataset):
    """What prepare() wrote: -> arrays by name, {split: rows}. UserError if it does not fit."""
    with user_error(f"{folder}: not a complete data set of data_prep.py"):
        meta = json.loads((folder / "meta.json").read_text())
        n, size = meta["count"], meta["size"]
        shapes = {"image": (n, size, size, 3), "mask": (n, size, size), "attr": (n, 18)}
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r")
                  for name in FILES[dataset] if name in shapes}
        for name, a in arrays.items():
            if (a.shape, a.dtype) != (shapes[name], np.uint8):
                raise ValueError(f"{name}.npy has {a.dtype} {a.shape}, not uint8 {shapes[name]}")
            if name != "image" and a.max() > 1:
                raise ValueError(f"{name}.npy has values up to {a.max()}, not 0 and 1")
        if dataset == "cub":
            arrays["text"] = json.loads((folder / "text.json").read_text())
            if [*map(len, arrays["text"])] != n * [10]:
                raise ValueError(f"text.json has not {n} lists of ten captions")
        rows = [meta["split"][name] for name in ("train", "val", "test")]
        if min(map(len, rows)) < 2 or len({*sum(rows, [])} & {*range(n)}) < sum(map(len, rows)):
            raise ValueError(f"a split has under two rows, a row twice, or one not of 0 to {n - 1}")
    return arrays, meta["split"]


# === §7 Command line ===

class Parser(argparse.ArgumentParser):
    """Errors take one line, without the usage."""
    def error(self, message):
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def parse_args(argv=None):
    """All flags, checked."""
    parser = Parser(prog="data_prep.py", description="Prepare a raw data set for diffmvae.py.")
    add = parser.add_argument
    add("--dataset", choices=list(FILES), required=True, help="CelebAMask-HQ or CUB")
    add("--raw", type=Path, required=True, help="the extracted download, read only")
    add("--out", type=Path, help="folder to write (default: data/<dataset>)")
    add("--size", type=int, help="pixels, a multiple of 8 (default: 128 for celeba, 64 for cub)")
    add("--partial", action="store_true", help="leave out what is missing or damaged, and say so")
    args = parser.parse_args(argv)
    args.out = args.out or Path("data") / args.dataset
    args.size = args.size if args.size is not None else {"celeba": 128, "cub": 64}[args.dataset]
    if not 8 <= args.size <= 1024 or args.size % 8:
        parser.error(f"--size {args.size}: must be a multiple of 8 up to 1024")
    return args


def main(argv=None):
    """The command line: -> exit code."""
    return exit_code("data_prep.py", lambda: prepare(**vars(parse_args(argv))))


if __name__ == "__main__":
    sys.exit(main())
