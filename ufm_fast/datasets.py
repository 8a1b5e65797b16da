"""Labels of real data sets that ship inside well-kept packages: no download."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ufm_fast.arguments import integers
from ufm_fast.errors import InputError


def digits() -> Tensor:
    """Labels of scikit-learn's 1,797 handwritten digits, K = 10, nearly balanced (174 to 183 a class)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError("labels 'digits' needs scikit-learn: pip install 'ufm-fast[data]'") from error
    return torch.from_numpy(np.asarray(load_digits().target, dtype=np.int64))


def glyphs() -> Tensor:
    """Labels of the glyphs in matplotlib's own fonts: a class for each character, a sample for each font that draws it.

    Several thousand classes, imbalanced as real data are (1 to some 30 samples a class). The last-resort font, which maps
    every code point to a placeholder box, is left out. Classes are numbered by code point.
    """
    try:
        import matplotlib
        from matplotlib.ft2font import FT2Font
    except ImportError as error:
        raise InputError("labels 'glyphs' needs matplotlib: pip install 'ufm-fast[plot]'") from error
    fonts = sorted(Path(matplotlib.get_data_path(), "fonts", "ttf").glob("*.ttf"))
    characters = [np.fromiter(FT2Font(str(f)).get_charmap(), np.int64) for f in fonts if "LastResort" not in f.name]
    _, labels = np.unique(np.concatenate(characters), return_inverse=True)
    return torch.from_numpy(labels.astype(np.int64))


#: Data sets by the name that ``labels=`` and ``--labels`` take.
DATASETS = {"digits": digits, "glyphs": glyphs}


def load_labels(source: str | Path) -> Tensor:
    """Labels from a named data set or from a .npy file of integers, int64 (N,).

    Errors: InputError for an unknown name, a missing, truncated or foreign file, or an array that is not a vector.
    """
    if str(source) in DATASETS:
        return DATASETS[str(source)]()
    array = load_npy(Path(source), "labels", f"a .npy file or one of {', '.join(DATASETS)}")
    if array.ndim != 1 or array.size == 0:
        raise InputError(f"labels in {source} must be a vector with at least one entry, got shape {array.shape}")
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
        raise InputError(f"{name}: {path} is not a readable .npy file ({error}); write it with numpy.save") from error
    if not isinstance(array, np.ndarray):
        raise InputError(f"{name}: {path} holds several arrays; save the one that is meant with numpy.save")
    return array
