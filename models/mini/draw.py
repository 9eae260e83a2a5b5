"""Draw the flowers that mini knows, and those it does not: 64×64 pictures with captions, the same for the same seed.

Enters: a species, a colour, a background and a seeded `numpy` generator. Leaves: a PIL image and its caption.
Each picture is drawn at 4× and averaged down (supersampling), so that edges are anti-aliased.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from math import cos, pi, sin

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE, OVER = 64, 4  # pixels a side, supersampling factor
KNOWN = ("allium", "bluebell", "daisy", "lavender", "pansy", "rose", "sunflower", "tulip")
UNSEEN = {1: ("lily", "poppy"), 2: ("lotus", "thistle")}  # by demo site; never in the pre-training set
SPECIES = (*KNOWN, *UNSEEN[1], *UNSEEN[2])
COLOURS = {  # hue, saturation, value
    "red": (0.99, 0.85, 0.85),
    "orange": (0.07, 0.88, 0.95),
    "yellow": (0.145, 0.80, 0.97),
    "pink": (0.93, 0.42, 0.97),
    "white": (0.13, 0.04, 0.98),
    "purple": (0.78, 0.62, 0.70),
    "blue": (0.62, 0.70, 0.88),
}
BACKGROUNDS = {  # colour at the top, colour at the bottom
    "meadow": ((150, 190, 110), (84, 138, 66)),
    "sky": ((136, 190, 232), (205, 228, 240)),
    "sand": ((240, 228, 200), (218, 196, 152)),
    "night": ((22, 24, 52), (46, 44, 84)),
}
STEM, LEAF = (62, 112, 48), (78, 134, 58)
Point = tuple[float, float]


class Pen:
    """A 256×256 canvas in 64-pixel units, with the palette and the random numbers of one picture."""

    def __init__(self, background: str, colour: str, rng: np.random.Generator) -> None:
        self.rng = rng
        top, bottom = (np.array(rgb, dtype=np.float64) for rgb in BACKGROUNDS[background])
        side = SIZE * OVER
        ramp = np.linspace(0, 1, side)[:, None, None]
        light = 1 + rng.uniform(-0.06, 0.06)
        rows = np.clip((top + (bottom - top) * ramp) * light, 0, 255)
        self.image = Image.fromarray(np.broadcast_to(rows, (side, side, 3)).astype(np.uint8))
        self.draw = ImageDraw.Draw(self.image)
        hue, saturation, value = COLOURS[colour]
        self.hsv = (
            hue + rng.uniform(-0.012, 0.012),
            saturation * rng.uniform(0.9, 1.05),
            value * rng.uniform(0.94, 1.02),
        )
        for _ in range(3):  # soft spots of light, so that no background is flat
            x, y, r = rng.uniform(0, 64), rng.uniform(0, 64), rng.uniform(5, 11)
            self.disc((x, y), r, tuple(int(v) for v in self.image.getpixel((int(x * 3.9), int(y * 3.9)))), 1.07)
        self.image = self.image.filter(ImageFilter.GaussianBlur(10))
        self.draw = ImageDraw.Draw(self.image)

    def petal_colour(self, light: float = 1.0, saturation: float = 1.0) -> tuple[int, int, int]:
        hue, s, v = self.hsv
        rgb = colorsys.hsv_to_rgb(hue % 1, min(1, s * saturation), min(1, v * light))
        return tuple(round(255 * c) for c in rgb)

    def polygon(self, points: list[Point], rgb: tuple[int, int, int]) -> None:
        self.draw.polygon([(x * OVER, y * OVER) for x, y in points], fill=rgb)

    def line(self, points: list[Point], rgb: tuple[int, int, int], width: float) -> None:
        self.draw.line([(x * OVER, y * OVER) for x, y in points], fill=rgb, width=round(width * OVER), joint="curve")

    def disc(self, centre: Point, r: float, rgb: tuple[int, ...], light: float = 1.0, ry: float | None = None) -> None:
        (x, y), ry = centre, ry or r
        fill = tuple(min(255, int(c * light)) for c in rgb)
        self.draw.ellipse([(x - r) * OVER, (y - ry) * OVER, (x + r) * OVER, (y + ry) * OVER], fill=fill)

    def petal(
        self, root: Point, angle: float, length: float, width: float, *, point: float = 0.5, light: float = 1.0
    ) -> None:
        """One petal from `root` to `angle` (radians, 0 = right, clockwise); point 0.3 = round tip, 1 = sharp tip."""
        t = np.linspace(0, 1, 22)
        half = width / 2 * np.sin(pi * t**0.8) ** (0.55 + 0.75 * point) * (1 - 0.25 * point * t)
        for shrink, shade in ((1.0, 0.80 * light), (0.80, light)):  # a darker rim makes petals stand apart
            across = np.concatenate([half, -half[::-1]]) * shrink
            along = np.concatenate([t, t[::-1]]) * length * (0.04 + 0.94 * shrink if shrink < 1 else 1)
            x = root[0] + along * cos(angle) - across * sin(angle)
            y = root[1] + along * sin(angle) + across * cos(angle)
            self.polygon(list(zip(x, y, strict=True)), self.petal_colour(shade))

    def stem(self, top: Point, leaves: int = 2, width: float = 1.5) -> None:
        bend = self.rng.uniform(-4, 4)
        foot = (top[0] + bend, 66.0)
        t = np.linspace(0, 1, 12)
        x = top[0] + bend * t**2
        y = top[1] + (foot[1] - top[1]) * t
        self.line(list(zip(x, y, strict=True)), STEM, width)
        for i in range(leaves):
            at = int(6 + 3 * i)
            side = 1 if (i + int(self.rng.integers(2))) % 2 else -1
            self.leaf(
                (float(x[at]), float(y[at])), -pi / 2 + side * self.rng.uniform(0.6, 1.0), self.rng.uniform(10, 14)
            )

    def leaf(self, root: Point, angle: float, length: float, width: float = 4.5) -> None:
        t = np.linspace(0, 1, 16)
        half = width / 2 * np.sin(pi * t**0.8)
        across, along = np.concatenate([half, -half[::-1]]), np.concatenate([t, t[::-1]]) * length
        x = root[0] + along * cos(angle) - across * sin(angle)
        y = root[1] + along * sin(angle) + across * cos(angle)
        self.polygon(list(zip(x, y, strict=True)), LEAF)


def _ring(
    pen: Pen, c: Point, count: int, length: float, width: float, *, turn: float, point: float, light: float = 1.0
) -> None:
    for i in range(count):
        jitter = pen.rng.uniform(-0.05, 0.05)
        pen.petal(
            c, turn + 2 * pi * i / count + jitter, length, width, point=point, light=light * pen.rng.uniform(0.96, 1.04)
        )


def daisy(pen: Pen, c: Point, s: float) -> None:
    pen.stem(c)
    _ring(pen, c, 13, 15 * s, 4.6 * s, turn=pen.rng.uniform(0, pi), point=0.3)
    pen.disc(c, 4.4 * s, (238, 186, 40))
    pen.disc((c[0] - 0.8, c[1] - 0.8), 2.4 * s, (250, 214, 86))


def sunflower(pen: Pen, c: Point, s: float) -> None:
    pen.stem(c, width=2.2)
    turn = pen.rng.uniform(0, pi)
    _ring(pen, c, 14, 18.5 * s, 6.5 * s, turn=turn, point=1.0, light=0.86)
    _ring(pen, c, 14, 16.5 * s, 6 * s, turn=turn + pi / 14, point=1.0)
    pen.disc(c, 9.3 * s, (84, 50, 24))
    for i in range(48):  # seeds on a golden-angle spiral
        r, a = 8.6 * s * (i / 48) ** 0.5, i * 2.39996
        pen.disc((c[0] + r * cos(a), c[1] + r * sin(a)), 0.55 * s, (146, 96, 44))


def tulip(pen: Pen, c: Point, s: float) -> None:
    x, y = c[0], c[1] + 8 * s
    pen.stem((x, y), leaves=0, width=1.9)
    for side in (-1, 1):
        pen.leaf((x + side, 64), -pi / 2 + side * pen.rng.uniform(0.28, 0.5), pen.rng.uniform(22, 28), 6)
    pen.petal((x, y + s), -pi / 2, 23 * s, 13 * s, point=0.7, light=0.74)
    for side in (-1, 1):
        pen.petal((x + side * 3 * s, y + s), -pi / 2 + side * 0.24, 23 * s, 11.5 * s, point=0.8, light=0.94)
    pen.petal((x, y + 1.5 * s), -pi / 2, 19 * s, 11 * s, point=0.6, light=1.05)


def rose(pen: Pen, c: Point, s: float) -> None:
    pen.stem(c, width=1.8)
    turn = pen.rng.uniform(0, 2 * pi)
    for ring, (count, r, size) in enumerate(((6, 8.6, 7.4), (5, 5.6, 6.2), (4, 3.0, 4.8), (3, 1.2, 3.2))):
        for i in range(count):
            a = turn + ring * 0.7 + 2 * pi * i / count
            p = (c[0] + r * s * cos(a), c[1] + r * s * sin(a))
            pen.disc(p, size * s, pen.petal_colour(0.66 + 0.05 * ring))
            pen.disc((p[0] + 0.5 * cos(a), p[1] + 0.5 * sin(a)), (size - 0.9) * s, pen.petal_colour(0.88 + 0.05 * ring))
    pen.disc(c, 1.5 * s, pen.petal_colour(0.6))


def pansy(pen: Pen, c: Point, s: float) -> None:
    pen.stem(c)
    for a, r, size, light in (
        (-2.2, 8, 8.2, 0.72),
        (-0.94, 8, 8.2, 0.72),
        (2.85, 8, 7.6, 0.95),
        (0.29, 8, 7.6, 0.95),
        (pi / 2, 7.5, 9.2, 1.06),
    ):
        p = (c[0] + r * s * cos(a), c[1] + r * s * sin(a))
        pen.disc(p, size * s, pen.petal_colour(light * 0.8))
        pen.disc(p, (size - 0.8) * s, pen.petal_colour(light))
        if light > 0.8:
            blot = (c[0] + 4.6 * s * cos(a), c[1] + 4.6 * s * sin(a))
            pen.disc(blot, 3.3 * s, (58, 22, 66))
    pen.disc(c, 1.9 * s, (246, 210, 60))


def allium(pen: Pen, c: Point, s: float) -> None:
    pen.stem(c, leaves=1, width=1.6)
    pen.disc(c, 13.2 * s, pen.petal_colour(0.62))
    for i in range(95):  # florets on a sphere, lighter towards the light
        r, a = 13.6 * s * (i / 95) ** 0.5, i * 2.39996 + 0.2
        light = 0.86 + 0.22 * pen.rng.random() - 0.10 * (r / (13.6 * s)) * sin(a)
        pen.disc((c[0] + r * cos(a), c[1] + r * sin(a)), 1.15 * s, pen.petal_colour(light))


def lavender(pen: Pen, c: Point, s: float) -> None:
    for dx, lift in ((-9.0, 4.0), (9.0, 5.0), (0.0, 0.0)):
        x, top = c[0] + dx * s, c[1] - 20 * s + lift
        lean = dx * 0.35
        pen.line([(x + lean * 0.3, top), (c[0] + dx * 0.3, 66)], STEM, 1.2)
        for i in range(9):
            y, w = top + i * 3.1 * s, 1.2 + 1.5 * sin(pi * (i + 1.5) / 11)
            for side in (-1, 1):
                light = pen.rng.uniform(0.8, 1.05)
                pen.disc(
                    (x + lean * 0.3 * (1 - i / 16) + side * w * 0.85 * s, y),
                    1.55 * s,
                    pen.petal_colour(light),
                    ry=1.9 * s,
                )


def bluebell(pen: Pen, c: Point, s: float) -> None:
    side = pen.rng.choice((-1, 1))
    t = np.linspace(0, 1, 20)
    x = c[0] - side * 8 * s + side * 19 * s * t**2.2
    y = 66 - (66 - c[1] + 19 * s) * np.sin(t * pi * 0.56) / np.sin(pi * 0.5)
    pen.line(list(zip(x, y, strict=True)), STEM, 1.5)
    pen.leaf((float(x[0]), 64), -pi / 2 - side * 0.3, 24, 4)
    for i in (10, 13, 16, 19):
        px, py = float(x[i]), float(y[i])
        pen.line([(px, py), (px + side * 1.5, py + 2)], STEM, 0.9)
        bx, by, w, h = px + side * 1.8, py + 2, 3.3 * s, 8.2 * s
        bell = [(bx - w * 0.55, by), (bx + w * 0.55, by), (bx + w * 0.85, by + h * 0.6), (bx + w * 1.35, by + h)]
        bell += [
            (bx + w * 0.5, by + h * 0.86),
            (bx, by + h),
            (bx - w * 0.5, by + h * 0.86),
            (bx - w * 1.35, by + h),
            (bx - w * 0.85, by + h * 0.6),
        ]
        pen.polygon(bell, pen.petal_colour(0.78))
        inner = [(bx + (q[0] - bx) * 0.62, by + (q[1] - by) * 0.9) for q in bell]
        pen.polygon(inner, pen.petal_colour(1.04))


def poppy(pen: Pen, c: Point, s: float) -> None:
    pen.stem(c, leaves=1, width=1.3)
    turn = pen.rng.uniform(0, pi / 2)
    for i, light in ((0, 0.86), (2, 0.86), (1, 1.0), (3, 1.0)):  # four broad petals, two behind, two in front
        a = turn + pi / 2 * i
        p = (c[0] + 7.6 * s * cos(a), c[1] + 7.6 * s * sin(a))
        pen.disc(p, 10.4 * s, pen.petal_colour(light * 0.82))
        pen.disc(p, 9.6 * s, pen.petal_colour(light))
    pen.disc(c, 6.4 * s, (34, 20, 30))
    for i in range(14):
        a = 2 * pi * i / 14
        pen.disc((c[0] + 7.2 * s * cos(a), c[1] + 7.2 * s * sin(a)), 0.9 * s, (34, 20, 30))
    pen.disc(c, 2.7 * s, (150, 176, 96))


def lily(pen: Pen, c: Point, s: float) -> None:
    pen.stem(c, leaves=2, width=1.6)
    turn = pen.rng.uniform(0, pi / 3)
    _ring(pen, c, 3, 22 * s, 8.6 * s, turn=turn, point=1.3, light=0.84)
    _ring(pen, c, 3, 22 * s, 9.4 * s, turn=turn + pi / 3, point=1.3)
    pen.disc(c, 3.0 * s, (170, 190, 96))
    for i in range(6):
        a = turn + pi / 6 + pi / 3 * i
        tip = (c[0] + 10.5 * s * cos(a), c[1] + 10.5 * s * sin(a))
        pen.line([c, tip], (196, 206, 128), 0.8)
        pen.disc(tip, 1.6 * s, (150, 74, 26))


def lotus(pen: Pen, c: Point, s: float) -> None:
    x, y = c[0], c[1] + 11 * s
    pen.disc((x, y + 5 * s), 25 * s, (48, 104, 72), ry=6.5 * s)  # the floating leaf
    pen.disc((x, y + 4 * s), 23 * s, (70, 132, 88), ry=5 * s)
    for spread, length, light in ((1.35, 21, 0.74), (0.92, 23, 0.82), (0.48, 25, 0.88)):
        for side in (-1, 1):
            pen.petal((x, y + 3 * s), -pi / 2 + side * spread, length * s, 9.5 * s, point=0.9, light=light)
    pen.petal((x, y + 3 * s), -pi / 2, 26 * s, 10.5 * s, point=0.9, light=0.94)
    for side in (-1, 1):
        pen.petal((x, y + 4 * s), -pi / 2 + side * 0.68, 17 * s, 9.5 * s, point=0.9, light=1.02)
    pen.petal((x, y + 4.5 * s), -pi / 2, 15 * s, 9.5 * s, point=0.9, light=1.08)


def thistle(pen: Pen, c: Point, s: float) -> None:
    x, y = c[0], c[1] + 7 * s
    pen.stem((x, y), leaves=2, width=1.9)
    for i in range(42):  # a brush of fine florets
        a = -pi / 2 + (i / 41 - 0.5) * 2.1 + pen.rng.uniform(-0.04, 0.04)
        length = pen.rng.uniform(17, 22) * s
        pen.line(
            [(x, y - 3 * s), (x + length * cos(a), y - 3 * s + length * sin(a))],
            pen.petal_colour(pen.rng.uniform(0.72, 1.08)),
            1.0,
        )
    pen.disc((x, y), 7.4 * s, (64, 104, 58), ry=7.0 * s)
    for row in range(4):  # scales on the bulb
        for k in range(-2, 3):
            px, py = x + (k + 0.5 * (row % 2)) * 2.9 * s, y - 4.6 * s + row * 3.1 * s
            if ((px - x) / (6.8 * s)) ** 2 + ((py - y) / (6.4 * s)) ** 2 < 1:
                pen.disc((px, py), 1.25 * s, (132, 168, 104))


PAINTERS: dict[str, Callable[[Pen, Point, float], None]] = {
    f.__name__: f
    for f in (allium, bluebell, daisy, lavender, pansy, rose, sunflower, tulip, lily, poppy, lotus, thistle)
}


def caption(species: str, colour: str, background: str) -> str:
    return f"a {colour} {species}, {background} background"


def named(caption: str) -> str:
    """The species that it names. Errors: StopIteration where it names none."""
    words = caption.replace(",", "").split()
    return next(name for name in SPECIES if name in words)


def flower(species: str, colour: str, background: str, rng: np.random.Generator) -> Image.Image:
    """One 64×64 RGB picture; place, size, turn and shades come from `rng`."""
    pen = Pen(background, colour, rng)
    centre = (32 + rng.uniform(-4, 4), 27 + rng.uniform(-3, 4))
    PAINTERS[species](pen, centre, rng.uniform(1.0, 1.22))
    return pen.image.reduce(OVER)


def photos(species: tuple[str, ...], count: int, seed: int) -> list[tuple[Image.Image, str]]:
    """`count` pictures, species in turn, colour and background at random: the pictures and their captions."""
    rng = np.random.default_rng(seed)
    pairs = []
    for i in range(count):
        name, colour, ground = (
            species[i % len(species)],
            str(rng.choice(list(COLOURS))),
            str(rng.choice(list(BACKGROUNDS))),
        )
        pairs.append((flower(name, colour, ground, rng), caption(name, colour, ground)))
    return pairs


def site_photos(site: int, count: int, seed: int) -> list[tuple[Image.Image, str]]:
    """The demo's photos for one site: its own two unseen species and, one in five, a species that everybody knows.

    The common ones keep the captions meaningful: without them a site could draw its own flowers whatever it is asked
    for.
    """
    own = UNSEEN[(site - 1) % len(UNSEEN) + 1]  # sites beyond the second take turns
    return photos(tuple(name for common in KNOWN for name in (*own, *own, common)), count, seed * 1000 + site)
