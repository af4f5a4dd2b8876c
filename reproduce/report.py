"""Self-contained HTML page with all figures and claims."""

from __future__ import annotations

import base64
import json
from html import escape
from pathlib import Path
from typing import Any

from reproduce.claims import Claim, claims_table, read_claim
from reproduce.options import data_name
from stepwise_lightning.files import atomic_write_text

_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem; }
section { border-top: 1px solid #8886; margin-top: 2.5rem; }
img { max-width: 100%; height: auto; background: white; border-radius: 4px; vertical-align: top; }
.picture { display: block; overflow-x: auto; margin: 1rem 0; cursor: zoom-in; }
.picture:has(input:checked) { margin-inline: calc(50% - 50vw + 1rem); }
.picture input { position: absolute; opacity: 0; }
.picture input:checked + img { max-width: none; cursor: zoom-out; }
.picture input:focus-visible + img { outline: 2px solid #0969da; }
.table { overflow-x: auto; }
table { border-collapse: collapse; margin: .8rem 0; }
td, th { border-bottom: 1px solid #8884; padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
.holds { color: #1a7f37; font-weight: 600; } .fails { color: #cf222e; font-weight: 600; }
code { overflow-wrap: anywhere; } summary { cursor: pointer; } pre { overflow-x: auto; font-size: .8rem; }
@media (max-width: 40rem) {
  h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.2rem; line-height: 1.3; }
  table, tbody { display: block; } th { display: none; }
  tr { display: flex; flex-wrap: wrap; gap: 0 .8rem; border-bottom: 1px solid #8884; padding: .5rem 0; }
  td { border: 0; padding: 0; } td:empty { display: none; } td.wide { flex-basis: 100%; }
  td[data-label]::before { content: attr(data-label) " "; opacity: .7; }
}
"""


def write_report(out: str | Path, names: list[str]) -> Path:
    """Write ``<out>/report.html`` from the outputs of the named figures, and return its path.

    Raises:
        CannotWriteError: the page cannot be written.

    """
    entries = [_entry(Path(out) / name) for name in names]
    lines, sections = ("".join(parts) for parts in zip(*entries, strict=True)) if entries else ("", "")
    page = (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>stepwise_lightning: figures and verdicts</title><style>{STYLE}</style></head><body>"
        "<h1>On the stepwise nature of self-supervised learning: figures and verdicts</h1>"
        "<p>Reproduced figures of <a href='https://arxiv.org/abs/2303.15438'>Simon et al., ICML 2023</a>, with their "
        "claims. A claim holds if the measured number satisfies its bound and the control violates it. Claims that "
        "were confirmed with new seeds are judged by the interval in which a new run is expected.</p>"
        "<div class='table'><table><tr><th>figure</th><th>claims</th><th>data</th><th>time</th></tr>"
        f"{lines}</table></div>"
        f"{sections}</body></html>\n"
    )
    path = Path(out) / "report.html"
    atomic_write_text(path, page)
    return path


def verdict_table(out: str | Path, names: list[str]) -> str:
    """Return a table of all claims of the named figures: see :func:`reproduce.claims.claims_table`."""
    claims = []
    for name in names:
        try:
            document = json.loads((Path(out) / name / "claims.json").read_text(encoding="utf-8"))
            claims += [(name, read_claim(saved)) for saved in document["claims"]]
        except _UNREADABLE:  # the report lists the figure as unreadable
            continue
    return claims_table(claims)


def _entry(directory: Path) -> tuple[str, str]:
    """Return a figure's row in the overview table, and its section."""
    state = "missing"
    try:
        document = json.loads((directory / "claims.json").read_text(encoding="utf-8"))
        return _line(directory.name, document), _section(directory, document)
    except FileNotFoundError:
        pass
    except _UNREADABLE:
        state = "claims.json cannot be read"
    return f"<tr><td>{escape(directory.name)}</td><td class='fails'>{state}</td><td></td><td></td></tr>", ""


def _line(name: str, document: dict[str, Any]) -> str:
    return (
        f"<tr><td><a href='#{name}'>{escape(name)}</a></td><td>{_verdict(document)}</td>"
        f"<td class='wide'>{escape(data_name(document['data_set']))}</td>"
        f"<td class='number'>{document['seconds']:.0f} s</td></tr>"
    )


def _verdict(document: dict[str, Any]) -> str:
    claims = [read_claim(saved) for saved in document["claims"]]
    kind = "holds" if all(claim.holds for claim in claims) else "fails"
    return f"<span class='{kind}'>{sum(claim.holds for claim in claims)} of {len(claims)} hold</span>"


def _section(directory: Path, document: dict[str, Any]) -> str:
    pictures = [_picture(path) for path in (directory / "figure.png", directory / "animation.gif") if path.exists()]
    rows = "".join(
        f"<tr><td class='{'holds' if claim.holds else 'fails'}'>{'holds' if claim.holds else 'fails'}</td>"
        f"<td class='wide'>{escape(claim.description)}</td>"
        f"<td class='number' data-label='measured'>{claim.measured:.4g}</td>"
        f"<td class='number'>{claim.criterion.replace('<=', '≤').replace('>=', '≥')}</td>"
        f"<td class='wide'>{_control(claim)}</td></tr>"
        for claim in map(read_claim, document["claims"])
    )
    seeds = " ".join(map(str, document["seeds"]))
    command = (
        f"python -m reproduce {directory.name} --profile {document['options']['profile']} "
        f"--data {document['data_set']} --seeds {seeds}"
    )
    keys = ("options", "settings", "versions", "commit", "machine", "date")
    details = json.dumps({key: document[key] for key in keys}, indent=1, ensure_ascii=False)
    return (
        f"<section id='{directory.name}'><h2>{escape(document['title'])}</h2>"
        f"<p><b>Paper.</b> {escape(document['paper'])}</p>"
        f"<p><b>Reproduction.</b> {escape(data_name(document['data_set']))}, seeds {seeds}, "
        f"{document['seconds']:.0f} s. {_verdict(document)}</p>{''.join(pictures)}"
        f"<div class='table'><table><tr><th></th><th>claim</th><th>measured</th><th>bound</th>"
        f"<th>control</th></tr>{rows}</table></div>"
        f"<p>Command: <code>{escape(command)}</code></p>"
        f"<details><summary>settings, versions, machine</summary><pre>{escape(details)}</pre></details></section>"
    )


def _control(claim: Claim) -> str:
    return "" if claim.control_value is None else f"{escape(claim.control)}: {claim.control_value:.4g}"


def _picture(path: Path) -> str:
    kind = path.suffix[1:]
    data = base64.b64encode(path.read_bytes()).decode()
    # A checkbox toggles the full size without a script.
    return (
        "<label class='picture' title='click for full size'><input type='checkbox' aria-label='full size'>"
        f"<img alt='{path.parent.name}, {path.stem}' src='data:image/{kind};base64,{data}'></label>"
    )
