"""The site made of the pages in this folder: `make docs`. Nothing in it comes from another host."""

import importlib.metadata
import sys
from pathlib import Path

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent))
from generated import fill_in

project = "depthmup"
release = importlib.metadata.version("depthmup")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_click"]
myst_heading_anchors = 4  # links name headings as they do on GitHub
exclude_patterns = ["_build"]
html_show_copyright = False
html_theme = "furo"
html_title = f"depthmup {release}"
html_show_sourcelink = False
html_copy_source = False
autodoc_typehints = "description"
pygments_style, pygments_dark_style = "a11y-high-contrast-light", "a11y-high-contrast-dark"


def setup(app: Sphinx) -> None:
    app.connect("source-read", lambda app, name, source: source.__setitem__(0, fill_in(source[0])))
