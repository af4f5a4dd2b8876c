"""Sphinx configuration of ``make docs``. The source directory is the root of the repository, as for links on GitHub."""

import importlib
import os
import re
import sys
from pathlib import Path
from typing import Any

from sphinx.util.logging import getLogger

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]
os.environ["PYTHONPATH"] = str(ROOT)  # for the processes that execute the tutorials

project = "stepwise_lightning"
author = "The stepwise_lightning developers"
copyright = author
release = os.environ.get("DOCS_VERSION", "main")

root_doc = "docs/index"
include_patterns = [
    "docs/**.md",
    "README.md",
    "reproduce/README.md",
    "reproduce/gpu_configurations.md",
    "CHANGELOG.md",
    "CODE_OF_CONDUCT.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
]
exclude_patterns = [".*", "runs", "results", "data", "build", "tests", "stepwise_lightning"]
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "notebooks",
]

html_theme = "furo"
html_title = "stepwise_lightning"
html_additional_pages = {"index": "to_start.html"}
templates_path = ["templates"]
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_sidebars = {
    "**": ["sidebar/brand.html", "sidebar/search.html", "sidebar/scroll-start.html", "sidebar/navigation.html"]
    + ["versions.html", "sidebar/scroll-end.html"]
}
linkcheck_anchors = False
linkcheck_timeout = 20
linkcheck_ignore = [r"http://localhost", r"https://colab\."]

autodoc_type_aliases = {"TensorLike": "TensorLike"}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [
    ("Attributes after fit", "params_style"),
    ("Attributes after setup", "params_style"),
    ("Raises in setup where it depends on the data or the number of processes", "Raises"),
    ("Raises in setup if not for steps_per_epoch or seed", "Raises"),
]
add_module_names = False
toc_object_entries_show_parents = "hide"

myst_heading_anchors = 4
myst_enable_extensions = ["attrs_inline", "colon_fence"]
nb_execution_mode = "cache"
nb_execution_cache_path = str(ROOT / "build" / "tutorials")
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_execution_timeout = 300
nb_output_stderr = "remove"  # Lightning's messages about missing GPUs


def _with_targets(app: Any, docname: str, source: list[str]) -> None:
    """Convert anchors for GitHub, ``<a id="name"></a>**Word.**``, into MyST targets."""
    source[0] = re.sub(r'<a id="([^"]+)"></a>(\*\*[^*]+\*\*)', r"[\2]{#\1}", source[0])


def _as_plain_text(app: Any, kind: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Escape docstrings for reStructuredText: legends, |x|, names that end with an underscore."""
    for index, line in enumerate(lines):
        if line.strip() == "Legend":
            lines[index] = f"{line}::\n"
        elif re.match(r" *(Attributes|Raises) \(.*\):$", line):  # napoleon accepts only words as section titles
            lines[index] = re.sub(r"[^\w\s:]", "", line)
        else:
            words = re.split(r"(``[^`]*``)", re.sub(r"^( +\w+)_: ", r"\1\\_: ", line))
            lines[index] = "".join(word if word.startswith("``") else word.replace("|", "\\|") for word in words)


def _check_api(app: Any, env: Any) -> None:
    """Warn of exported names without an entry in the API reference; ``make docs`` then fails."""
    documented = {name.rpartition(".")[2] for name in env.get_domain("py").objects}
    for module in ("", ".data", ".modes", ".plots", ".runs", ".spectrum", ".theory"):
        exported = importlib.import_module(f"stepwise_lightning{module}").__all__
        for name in sorted(set(exported) - documented - {"__version__"}):
            getLogger(__name__).warning("docs/api has no entry for stepwise_lightning%s.%s", module, name)


def setup(app: Any) -> None:
    """Connect the event handlers."""
    app.connect("env-check-consistency", _check_api)
    app.connect("source-read", _with_targets)
    app.connect("autodoc-process-docstring", _as_plain_text, priority=400)  # before napoleon
