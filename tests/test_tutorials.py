"""Notebooks in docs/ run without warnings and write their runs to ``runs/``."""

import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

DOCS = Path(__file__).parent.parent / "docs"
CELL = re.compile(r"^```\{code-cell\}[^\n]*\n((?::[^\n]*\n)*)(.*?)^```", re.MULTILINE | re.DOTALL)
NOTEBOOKS = [page for page in sorted(DOCS.rglob("*.md")) if CELL.search(page.read_text(encoding="utf-8"))]


def cells(page: Path) -> list[str]:
    """Return the code of a notebook's cells without their options."""
    return [match[2] for match in CELL.finditer(page.read_text(encoding="utf-8"))]


@pytest.mark.slow
@pytest.mark.parametrize("page", NOTEBOOKS, ids=lambda page: page.stem)
def test_notebook(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with plt.rc_context():
        plt.switch_backend("agg")
        names: dict[str, object] = {"__name__": page.stem}
        for number, code in enumerate(cells(page), 1):
            exec(compile(code, f"{page.name}, cell {number}", "exec"), names)
        plt.close("all")
    assert [path.name for path in tmp_path.iterdir()] in ([], ["runs"])


@pytest.mark.slow
def test_downloaded_notebook_runs_in_an_empty_folder(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    nbformat, reader = pytest.importorskip("nbformat"), pytest.importorskip("myst_nb.core.read")
    monkeypatch.syspath_prepend(str(DOCS))
    from notebooks import standalone

    page = reader.read_myst_markdown_notebook((DOCS / "tutorials/own_loss.md").read_text(encoding="utf-8"))
    (tmp_path / "own_loss.ipynb").write_text(json.dumps(standalone(page, Path("docs/tutorials"))), encoding="utf-8")
    notebook = nbformat.read(tmp_path / "own_loss.ipynb", as_version=4)
    assert notebook.cells[0].cell_type == "code" and not notebook.cells[1].get("outputs")
    nbclient.execute(notebook, cwd=tmp_path, timeout=300)
    assert sum(bool(cell.outputs) for cell in notebook.cells if cell.cell_type == "code") > 2


def test_code_cells_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```{code-cell} ipython3\n:tags: [hide-input]\n\na = 1\n```\n```python\nb = 1\n```\n")
    assert cells(page) == ["\na = 1\n"]
    assert [page.stem for page in NOTEBOOKS] == [
        "read_a_run",
        "own_loss",
        "own_module",
        "predict_train_overlay",
        "word_vectors",
    ]


def test_python_code_in_pages_compiles():
    for page in sorted(DOCS.rglob("*.md")):
        for code in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            compile(code, page.name, "exec")
