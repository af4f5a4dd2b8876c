"""Sphinx extension: executed tutorials as notebooks to download, with a link that opens them in Colab.

``DOCS_VERSION`` is the folder of the site on the branch ``gh-pages``, ``main`` by default.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

VERSION = os.environ.get("DOCS_VERSION", "main")
REPOSITORY = "https://github.com/stepwise-lightning/stepwise_lightning"
COLAB = "https://colab.research.google.com/github/stepwise-lightning/stepwise_lightning/blob/gh-pages"
LINKS = re.compile(r'<p class="notebook">.*?</p>\n*')
INSTALL = """import importlib.util

if importlib.util.find_spec("stepwise_lightning") is None:
    %pip install -q stepwise_lightning"""


def _add_links(app: Any, docname: str, source: list[str]) -> None:
    """Insert both links below the title of a tutorial."""
    if not source[0].startswith("---\nfile_format: mystnb"):
        return
    name, up = docname.rpartition("/")[2], "../" * docname.count("/")
    colab = f"{COLAB}/{VERSION}/notebooks/{name}.ipynb"
    download = f'<a href="{up}notebooks/{name}.ipynb" download>Download as a notebook</a>'
    links = f'<p class="notebook">{download} · <a href="{colab}">open in Colab</a></p>'
    source[0] = re.sub(r"^(# .*\n)", rf"\1\n{links}\n", source[0], count=1, flags=re.MULTILINE)


def standalone(notebook: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a notebook of a page in a folder of the repository that works elsewhere.

    Its first cell installs the package if necessary, and its relative links are links to the repository.
    """
    cells = [
        {
            "cell_type": "code",
            "id": "install",
            "metadata": {},
            "execution_count": None,
            "outputs": [],
            "source": INSTALL,
        }
    ]
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            text = LINKS.sub("", "".join(cell["source"]))
            text = re.sub(r"(?<=\]\()(?!https?:|#)[^)\s]+", lambda link: _absolute(folder, link[0]), text)
            cell = {**cell, "source": text}
        cells.append(cell)
    return {**notebook, "cells": cells}


def _absolute(folder: Path, link: str) -> str:
    branch = VERSION if VERSION == "main" else f"v{VERSION}"
    return f"{REPOSITORY}/blob/{branch}/{os.path.normpath(folder / link)}"


def _write(app: Any, exception: Exception | None) -> None:
    """Write ``notebooks/<page>.ipynb`` to the site."""
    executed = Path(app.outdir).parent / "jupyter_execute"
    if exception is not None or app.builder.name != "html":
        return
    (Path(app.outdir) / "notebooks").mkdir(exist_ok=True)
    for path in sorted(executed.rglob("*.ipynb")):
        notebook = standalone(json.loads(path.read_text(encoding="utf-8")), path.parent.relative_to(executed))
        text = json.dumps(notebook, ensure_ascii=False, indent=1)
        (Path(app.outdir) / "notebooks" / path.name).write_text(text + "\n", encoding="utf-8")


def setup(app: Any) -> dict[str, bool]:
    """Connect the event handlers."""
    app.connect("source-read", _add_links)
    app.connect("build-finished", _write)
    return {"parallel_read_safe": True}
