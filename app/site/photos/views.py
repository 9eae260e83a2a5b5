"""Which parts of a photo are trained on, and in which shape: its views.

Enters: a run's config, a base model's family and sizes of photos. Leaves: `View`s, and a view's pixels and frame.
The usual view is the square from the photo's centre. `aspect-buckets`: a shape of about resolution² pixels, nearest
to the photo's own (shapes and nearest: diffusers.training_utils). `random-crops`: as many boxes as that, where the
photo is longer than the shape; where a box lies follows from the photo's hash and the box's number, so that every run,
and one that is taken up again, has the same ones. `flip`: each view mirrored too, as a view of its own. A mirrored
photo is another picture: what is written in it is no writing any more, and a heart beats on the right; so it is off
unless a run asks for it, and a site may forbid it (SITE_LIMITS: no-flip). Photos that are held out are always shown
from their centre, as they are, and in the shape nearest to their own. `resolutions`: a view at each of several sides;
of the larger ones only where the photo need not be enlarged, which would teach what enlarging looks like. Held-out
photos are shown at `resolution` alone.
Source: the sizes and crops that SDXL is told: Podell et al. 2023, arXiv:2307.01952, section 2.2.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from PIL import Image, ImageOps

from app.site.photos.images import scaled

if TYPE_CHECKING:
    from torch import Tensor

    from app.config import RunConfig

Size = tuple[int, int]  # (width, height), as Pillow has it
Shape = tuple[int, int]  # (height, width), as tensors have it


@dataclass(frozen=True)
class View:
    """A box of a photo, as large as the photo has one in the shape of height to width, scaled to these.

    crop: 0 is the centre, another number a place drawn by it; mirrored: of the photo's mirror image.
    """

    height: int
    width: int
    crop: int = 0
    mirrored: bool = False

    def box(self, size: Size, key: str) -> tuple[int, int, int, int]:
        """(left, top, width, height) in a picture of `size`, which is mirrored already."""
        across, down = size
        if across * self.height > down * self.width:
            across = max(1, round(down * self.width / self.height))
        else:
            down = max(1, round(across * self.height / self.width))
        left, top = (whole - part for whole, part in zip(size, (across, down), strict=True))  # at most
        if not self.crop:
            return left // 2, top // 2, across, down
        place = hashlib.sha256(f"{key} {self.crop} {self.mirrored}".encode()).digest()
        where = int.from_bytes(place[:6], "big")
        return where % (left + 1), where % (top + 1), across, down

    def pixels(self, image: Image.Image, key: str) -> Tensor:
        """float32 (3, height, width) in [-1, 1], of an upright RGB picture."""
        image = ImageOps.mirror(image) if self.mirrored else image
        return scaled(image, self.box(image.size, key), self.height, self.width)

    def frame(self, size: Size, key: str) -> tuple[int, int, int, int, int, int]:
        """As SDXL is told it: (the photo's height and width, top and left of the crop once the photo is scaled, height
        and width of what is trained on).
        """
        left, top, across, down = self.box(size, key)
        return size[1], size[0], round(top * self.height / down), round(left * self.width / across), *self.shape

    @property
    def shape(self) -> Shape:
        return self.height, self.width


def buckets(resolution: int, multiple: int) -> list[Shape]:
    """Shapes of about resolution² pixels from 1:2 to 2:1, their sides multiples of `multiple`; the square first."""
    from diffusers.training_utils import generate_aspect_ratio_buckets

    found: list[Shape] = generate_aspect_ratio_buckets(resolution, multiple)
    return found


def nearest(size: Size, shapes: list[Shape]) -> Shape:
    """The shape whose sides relate most as a picture's do; the first of several."""
    if len(shapes) == 1:
        return shapes[0]
    from diffusers.training_utils import find_nearest_bucket  # slow to import

    turned = shapes[::-1]  # of several it takes the last
    index: int = find_nearest_bucket(size[1], size[0], turned)
    return turned[index]


def largest(config: RunConfig, multiple: int) -> Shape:
    """The shape of most pixels that a run may train in."""
    side = config.sides[-1]
    return max(_shapes(side, config.aspect_buckets, multiple), key=lambda s: s[0] * s[1])


def _shapes(side: int, several: bool, multiple: int) -> tuple[Shape, ...]:
    return tuple(buckets(side, multiple)) if several else ((side, side),)


def is_small(size: Size, shape: Shape) -> bool:
    """Whether a picture has to be enlarged for that shape."""
    return size[0] < shape[1] or size[1] < shape[0]


@dataclass(frozen=True)
class Plan:
    """Which views each photo has.

    shapes: the buckets, or the one square; sides: those of each resolution, the smallest first, where there are several
    (`shapes` is of held-out photos then); trained: photos to train on, which alone are cropped and mirrored;
    least: how many of them a bucket must have, else they go to the nearest that has as many.
    """

    shapes: tuple[Shape, ...]
    crops: int = 0
    flip: bool = False
    trained: frozenset[str] = field(default=frozenset(), repr=False)
    least: int = 1
    sides: tuple[tuple[Shape, ...], ...] = ()

    @classmethod
    def square(cls, resolution: int) -> Plan:
        return cls(((resolution, resolution),))

    @classmethod
    def of(cls, config: RunConfig, multiple: int, trained: frozenset[str] = frozenset(), least: int = 1) -> Plan:
        shapes = {side: _shapes(side, config.aspect_buckets, multiple) for side in (config.resolution, *config.sides)}
        sides = tuple(shapes[side] for side in config.sides) if config.resolutions else ()
        return cls(shapes[config.resolution], config.random_crops, config.flip, trained, least, sides)

    @property
    def smallest(self) -> tuple[Shape, ...]:
        """The shapes that every trained photo has one of."""
        return self.sides[0] if self.sides else self.shapes

    @property
    def name(self) -> str:
        """Of its file in the cache: the square's side, and what else is asked for."""
        others = {"crops": self.crops, "flip": int(self.flip)}
        if len(self.shapes) > 1:
            others["buckets"] = int(hashlib.sha256(repr(self.shapes).encode()).hexdigest()[:6], 16)
        if self.sides:
            others["sides"] = int(hashlib.sha256(repr(self.sides).encode()).hexdigest()[:6], 16)
        return "".join([str(self.shapes[0][0]), *(f"-{name}{number}" for name, number in others.items() if number)])

    def views(self, keys: list[str], size: Callable[[str], Size]) -> dict[str, tuple[View, ...]]:
        """Each photo's views, those of a shape together, the smallest first, and of these the usual one where there is
        one; `size` is asked only where it matters.
        """
        if len(self.shapes) == 1 and not self.crops and not self.sides:
            plain = View(*self.shapes[0])
            both = (plain, View(*self.shapes[0], mirrored=True)) if self.flip else (plain,)
            return {key: both if key in self.trained else (plain,) for key in keys}
        sizes = {key: size(key) for key in keys}
        shapes: dict[str, tuple[Shape, ...]] = {key: (nearest(sizes[key], list(self.shapes)),) for key in keys}
        shapes |= self._trained({key: sizes[key] for key in keys if key in self.trained})
        return {key: tuple(v for shape in shapes[key] for v in self._of(key, shape, sizes[key])) for key in keys}

    def _trained(self, sizes: Mapping[str, Size]) -> dict[str, tuple[Shape, ...]]:
        """The shapes of each photo that is trained on: one of the smallest resolution, and one of each other that shows
        as many photos as a shape must have at least without enlarging them.
        """
        found = dict.fromkeys(sizes, tuple[Shape, ...]())
        for shapes in self.sides or (self.shapes,):
            near = {key: nearest(size, list(shapes)) for key, size in sizes.items()}
            if shapes != self.smallest:
                near = {key: shape for key, shape in near.items() if not is_small(sizes[key], shape)}
                near = near if len(near) >= self.least else {}
            for key, shape in self._gathered(near, sizes, shapes).items():
                found[key] = tuple(dict.fromkeys((*found[key], shape)))
        return found

    def _of(self, key: str, shape: Shape, size: Size) -> tuple[View, ...]:
        plain = View(*shape)
        if key not in self.trained:
            return (plain,)
        has_room = plain.box(size, key)[2:] != size
        crops = range(1, self.crops + 1) if self.crops and has_room else (0,)
        return tuple(View(*shape, crop, side) for crop in crops for side in ((False, True) if self.flip else (False,)))

    def _gathered(
        self, near: Mapping[str, Shape], sizes: Mapping[str, Size], shapes: tuple[Shape, ...]
    ) -> dict[str, Shape]:
        """The photos' shapes among those of a resolution, of which each has `least` photos; all are squares where none
        has.
        """
        counts = Counter(near.values())
        enough = [shape for shape in shapes if counts[shape] >= self.least] or [shapes[0]]
        return {key: shape if shape in enough else nearest(sizes[key], enough) for key, shape in near.items()}
