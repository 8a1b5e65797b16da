"""Real data sets that ship inside well-kept packages, without a download: their sources, and their
labels.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ufm_fast.arguments import integers
from ufm_fast.errors import InputError

_DISTRIBUTIONS = {"sklearn": "scikit-learn"}


def need(module: str, what: str, extra: str) -> Any:
    """The module of an optional package. Errors: InputError naming the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = _DISTRIBUTIONS.get(module.split(".")[0], module.split(".")[0])
        raise InputError(f"{what} needs {package}: pip install 'ufm-fast[{extra}]'") from error


def digit_images() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits: images (1797, 8, 8) with entries 0 to 16, and labels (1797,)."""
    found = need("sklearn.datasets", "data 'digits'", "data").load_digits()
    return np.asarray(found.images), np.asarray(found.target, dtype=np.int64)


def glyph_fonts() -> list[tuple[Any, np.ndarray]]:
    """matplotlib's own fonts, each an FT2Font with the code points that it draws.

    The last-resort font, which maps every code point to a placeholder box, is left out.
    """
    matplotlib, ft2font = (
        need(name, "data 'glyphs'", "plot") for name in ("matplotlib", "matplotlib.ft2font")
    )
    paths = sorted(Path(matplotlib.get_data_path(), "fonts", "ttf").glob("*.ttf"))
    fonts = [ft2font.FT2Font(str(path)) for path in paths if "LastResort" not in path.name]
    return [(font, np.fromiter(font.get_charmap(), np.int64)) for font in fonts]


def digits() -> Tensor:
    """Labels of scikit-learn's 1,797 handwritten digits, K = 10, nearly balanced (174 to 183 a
    class).
    """
    return torch.from_numpy(digit_images()[1])


def glyphs() -> Tensor:
    """Labels of the glyphs in matplotlib's own fonts: a class for each character, a sample for each
    font that draws it.

    Several thousand classes, imbalanced as real data are (1 to some 30 samples a class), numbered
    by code point.
    """
    characters = [drawn for _, drawn in glyph_fonts()]
    _, labels = np.unique(np.concatenate(characters), return_inverse=True)
    return torch.from_numpy(labels.astype(np.int64))


#: Data sets by the name that ``labels=`` and ``--labels`` take.
DATASETS = {"digits": digits, "glyphs": glyphs}


def load_labels(source: str | Path) -> Tensor:
    """Labels from a named data set or from a .npy file of integers, int64 (N,).

    Errors: InputError for an unknown name, a missing, truncated or foreign file, or an array that
    is not a vector.
    """
    if str(source) in DATASETS:
        return DATASETS[str(source)]()
    array = load_npy(Path(source), "labels", f"a .npy file or one of {', '.join(DATASETS)}")
    if array.ndim != 1 or array.size == 0:
        raise InputError(
            f"labels in {source} must be a vector with at least one entry, got shape {array.shape}"
        )
    return integers(array, f"labels in {source}")


def load_npy(path: Path, name: str, allowed: str = "a .npy file") -> np.ndarray:
    """Read one array without pickle. Errors: InputError naming the argument and what is allowed."""
    try:
        found = path.is_file()
    except OSError as error:  # a name longer than a file system takes
        raise InputError(f"{name} must be {allowed}; {error.strerror}") from error
    if not found:
        raise InputError(f"{name} must be {allowed}; there is no file {path}")
    try:
        array = np.load(path, allow_pickle=False)
    except Exception as error:  # numpy's parser of a damaged header raises whatever it runs into
        raise InputError(
            f"{name}: {path} is not a readable .npy file ({error}); write it with numpy.save"
        ) from error
    if not isinstance(array, np.ndarray):
        raise InputError(
            f"{name}: {path} holds several arrays; save the one that is meant with numpy.save"
        )
    return array
