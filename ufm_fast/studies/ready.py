"""Studies that ship with the package: a TOML file each in ``ready/``, run by its name."""

from __future__ import annotations

import difflib
from pathlib import Path

from ufm_fast.errors import InputError
from ufm_fast.studies.spec import Study, make_study, parse

_FOLDER = Path(__file__).parent / "ready"


def names() -> list[str]:
    """The names of all ready studies."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def title(name: str) -> str:
    """The first line of its file, a comment that says what it shows."""
    return _FOLDER.joinpath(f"{name}.toml").read_text("utf-8").splitlines()[0].lstrip("# ")


def load(source: str) -> tuple[Study, str]:
    """The study in the file ``source``, or the ready one of that name, and its text.

    Errors: InputError for neither, or a file that is no study.
    """
    path = Path(source)
    if not path.is_file() and path.suffix != ".toml":
        if source not in names():
            near = difflib.get_close_matches(source, names(), 2, 0.4)
            hint = (
                f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names())}"
            )
            raise InputError(f"study: {source!r} is neither a file nor a ready study; {hint}")
        path = _FOLDER / f"{source}.toml"
    try:
        text = path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise InputError(
            f"study: can't read {path} ({getattr(error, 'strerror', None) or error}); give a TOML "
            f"file"
        ) from error
    return make_study(parse(text, str(path)), path.stem), text
