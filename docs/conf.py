"""Settings of the documentation site, which ``make docs`` builds from the pages beside this file.

The pages are Markdown that reads as well where the repository is hosted. Nothing is downloaded:
names of other libraries in signatures stay without a link.
"""

from __future__ import annotations

import sys
from pathlib import Path

import gsalign

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "GSAlign"
author = "the GSAlign developers"
project_copyright = author
version = release = gsalign.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "command_line",
    "internal_names",
    "repository_links",
    "signatures",
]
exclude_patterns = ["_ext"]

myst_heading_anchors = 4  # links to headings as on a code host
smartquotes_action = "D"  # dashes between a name and what is said of it, quotes as they are
highlight_language = "none"  # a block without a language is a command or its output

autodoc_default_options = {"exclude-members": "model_config"}  # of pydantic, not of ours
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_type_aliases = {"Array": "Tensor | ndarray", "ArrayLike": "ArrayLike"}
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 88

# Every name of ours must lead somewhere; other libraries are not at hand to be linked to.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(accelerate|collections|np|numpy|os|pathlib|pydantic|rich|torch)\..*"),
    ("py:.*", r"ArrayLike|NDArray|Tensor|ndarray|(dict|tuple)\[.*"),
]

html_theme = "furo"
html_title = "GSAlign"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
