"""The site: ``make docs`` builds it into docs/_build/html."""

import re
from typing import Any

from lcsc_opt import __version__

project = "lcsc_opt"
author = "the authors of lcsc_opt"
version = release = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 4
myst_links_external_new_tab = False
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_timeout = 900  # a cell; machines of CI are busy
nb_output_stderr = "remove"  # the searches' progress
nb_execution_raise_on_error = True
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"lcsc_opt {release}"
html_favicon = "images/icon.svg"
html_copy_source = False
pygments_dark_style = "monokai"


def _for_the_site(text: str) -> str:
    """A page whose links work in the repository → the same with links to pages of the site and to downloads."""
    text = re.sub(r"\]\(\.\./(CONTRIBUTING|CHANGELOG)\.md", lambda found: f"]({found[1].lower()}.md", text)
    text = re.sub(r"\]\(((?:\.\./)+[\w/]+\.md)\)", r"](path:\1)", text)
    return re.sub(r"\[\w+\.md\]\((?=\w+\.md)", "[](", text)  # a file's name becomes the title of what it links to


def setup(app: Any) -> None:
    """Read every page through it; what is included lies one folder above."""

    def read(_app: Any, _name: str, source: list[str]) -> None:
        source[0] = _for_the_site(source[0])

    def include(_app: Any, _path: Any, _parent: str, source: list[str]) -> None:
        from_docs = re.sub(r"\]\(docs/", "](", source[0])
        source[0] = _for_the_site(re.sub(r"\]\((?=benchmarks/)", "](../", from_docs))

    app.connect("source-read", read)
    app.connect("include-read", include)
