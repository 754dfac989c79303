"""HTML pages about a model: one file each, readable in light and dark, without anything from the network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from llmctl.pipeline.charts import line_chart
from llmctl.train.lengths import Curve

STYLE = """
:root { --bg:#fbfbfa; --card:#fff; --ink:#1d2126; --soft:#667080; --line:#e3e5e8;
  --c0:#2563c9; --c1:#d9622b; --c2:#1f8a4c; --c3:#8b49c4; --c4:#b8860b; --c5:#0d8f96; --mark:#2563c922; }
@media (prefers-color-scheme: dark) {
  :root { --bg:#14171a; --card:#1c2024; --ink:#e7e9ec; --soft:#97a1ae; --line:#30363d;
    --c0:#6ea8fe; --c1:#ff9a62; --c2:#4cc27f; --c3:#c79bf2; --c4:#e3b341; --c5:#4fd0d6; --mark:#6ea8fe33; } }
* { box-sizing:border-box; }
body { margin:0; background:var(--bg); color:var(--ink); font:16px/1.5 system-ui,sans-serif; }
main { max-width:1080px; margin:0 auto; padding:24px 16px 64px; }
h1 { font-size:1.6rem; line-height:1.2; margin:4px 0 4px; overflow-wrap:anywhere; }
h2 { font-size:1.15rem; margin:0 0 8px; }
h3 { font-size:.95rem; margin:14px 0 6px; } p { margin:0 0 8px; } .soft { color:var(--soft); font-size:.92rem; }
section { background:var(--card); border:1px solid var(--line); border-radius:12px; padding:18px; margin-top:18px; }
.scroll { overflow-x:auto; }
table { border-collapse:collapse; font-size:.92rem; font-variant-numeric:tabular-nums; }
th { text-align:left; font-weight:600; color:var(--soft); font-size:.8rem; }
th, td { padding:4px 16px 4px 0; border-bottom:1px solid var(--line); white-space:pre; }
th.n, td.n { text-align:right; } code { font:.9em ui-monospace,Menlo,Consolas,monospace; }
svg { display:block; width:100%; max-width:720px; height:auto; }
.grid { stroke:var(--line); } .tick { fill:var(--soft); font-size:11px; }
.line { fill:none; stroke-width:1.8; stroke-linejoin:round; } .dot { stroke:none; }
.line.s0{stroke:var(--c0)} .line.s1{stroke:var(--c1)} .line.s2{stroke:var(--c2)} .line.s3{stroke:var(--c3)}
.line.s4{stroke:var(--c4)} .line.s5{stroke:var(--c5)}
.legend { font-size:.82rem; color:var(--soft); display:flex; flex-wrap:wrap; gap:4px 16px; padding-left:52px; }
.key::before { content:""; display:inline-block; width:14px; height:3px; margin-right:6px; vertical-align:middle;
  background:var(--c0); }
.key.s1::before{background:var(--c1)} .key.s2::before{background:var(--c2)} .key.s3::before{background:var(--c3)}
.key.s4::before{background:var(--c4)} .key.s5::before{background:var(--c5)}
"""


def page(title: str, body: str, style: str = "", script: str = "") -> str:
    """A whole page around `body`, which is HTML already; `title` is text."""
    code = f"<script>{script}</script>\n" if script else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)} · llmctl</title>\n<style>{STYLE}{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n{code}</body>\n</html>\n"
    )


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """A table of texts; all but the first `text_columns` columns are numbers and stand on the right."""

    def cell(tag: str, column: int, text: str) -> str:
        kind = ' class="n"' if column >= text_columns else ""
        return f"<{tag}{kind}>{escape(text)}</{tag}>"

    lines = [("th", headers), *(("td", row) for row in rows)]
    made = "".join(
        f"<tr>{''.join(cell(tag, column, text) for column, text in enumerate(row))}</tr>\n" for tag, row in lines
    )
    return f'<div class="scroll"><table>\n{made}</table></div>'


def curve_page(model: str, curves: Sequence[Curve]) -> str:
    """Perplexity by position: a chart with a line per curve, and the numbers."""
    context, reach = curves[0].context, curves[0].stretches[-1].last + 1
    series = {
        curve.name: [((part.first + part.last) / 2, part.perplexity) for part in curve.stretches] for curve in curves
    }
    headers = ("positions", *(curve.name for curve in curves))
    rows = [
        (f"{part.first} – {part.last}", *(f"{curve.stretches[i].perplexity:.4g}" for curve in curves))
        for i, part in enumerate(curves[0].stretches)
    ]
    beyond = f" Positions from {context} on are beyond what it was trained with." if reach > context else ""
    return page(
        f"{model}: loss by position",
        f'<p class="soft">llmctl · perplexity by position</p><h1>{escape(model)}</h1>'
        f'<p class="soft">Context {context} tokens, measured on sequences of {reach}.{beyond}</p>'
        f"<section><h2>Perplexity by position</h2>{line_chart('perplexity by position', series, 'position')}</section>"
        f"<section><h2>Numbers</h2>{table(headers, rows)}</section>",
    )
