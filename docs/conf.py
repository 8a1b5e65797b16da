"""Settings of the site: ``python -m sphinx -W docs build/site`` builds it, with warnings as
errors.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "kernels")]

import generated  # noqa: E402

from ufm_fast.version import __version__  # noqa: E402

generated.write(HERE)

project, author, release = "ufm-fast", "the authors of ufm-fast", __version__
extensions = ["myst_parser"]
exclude_patterns = ["figures"]
html_theme, html_title = "furo", f"ufm-fast {__version__}"
html_static_path, html_css_files = ["_static"], ["site.css"]
html_copy_source = html_show_copyright = False
myst_heading_anchors = 3
suppress_warnings = ["misc.highlighting_failure"]  # signatures hold defaults that are no Python
