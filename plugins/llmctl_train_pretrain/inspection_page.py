"""An inspection as one HTML page: tokens to click on, attention maps as images, lengths as charts. No network."""

from __future__ import annotations

import base64
import json
import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

import numpy as np

from llmctl.pipeline.charts import line_chart
from llmctl.train.pages import page, table
from llmctl_train_pretrain.inspection import Inspection, Prediction, Stack, Token, looks

MOST_CELLS = 8_000_000
"""Attention weights on a page; of a larger inspection some layers, evenly spread, are shown."""
INK = (37, 99, 201)


def inspection_page(found: Inspection) -> str:
    """The whole page."""
    body = [
        f'<p class="soft">llmctl inspect · {escape(found.backend)}</p><h1>{escape(found.model)}</h1>',
        f'<p class="soft">{escape(found.kind)}, {len(found.tokens)} tokens'
        f"{f' for {len(found.source)} of the source' if found.source else ''}</p>",
        _tokens_section(found),
        *(section for stack in found.stacks for section in (_maps_section(stack, found), *_lengths_section(stack))),
    ]
    if found.closed:
        body.append(f"<section><h2>Attention</h2><p>{escape(found.closed)}</p></section>")
    texts = {"tokens": _labels(found.tokens), "source": _labels(found.source)}
    values = {"texts": texts, "predictions": [_prediction(p) for p in found.predictions], "first": _first(found)}
    # No `</script>` of a text may end the block.
    data = json.dumps(values, ensure_ascii=False).replace("<", "\\u003c")
    body.append(f'<script type="application/json" id="data">{data}</script>')
    style, script = (
        Path(__file__).with_name(f"inspection.{kind}").read_text(encoding="utf-8") for kind in ("css", "js")
    )
    return page(f"{found.model}: inspection", "\n".join(body), style, script)


def visible(text: str) -> str:
    """A token's text with its spaces and line ends to be seen."""
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") or "∅"


def _labels(tokens: Sequence[Token]) -> list[str]:
    return [visible(token.text) for token in tokens]


def _first(found: Inspection) -> int | None:
    """The place whose distribution is shown at first: the last one of a decoder, the first masked one."""
    places = [p.at for p in found.predictions if p.at is not None]
    return None if not places else places[0] if found.kind == "encoder" else places[-1]


# -- distributions ----------------------------------------------------------------------------------------------------

WHAT = {
    "next": "After token {at}",
    "masked": "At token {at}",
    "label": "Label of {at}",
    "start": "Where the answer starts",
    "end": "Where the answer ends",
}


def _prediction(p: Prediction) -> dict[str, object]:
    """As the script reads it."""

    def rows(choices: Sequence[object]) -> list[list[object]]:
        return [[visible(c.text), round(c.probability, 6), f"{c.logprob:.3f}"] for c in choices]  # type: ignore[attr-defined]

    parts = [{"title": f"The model's distribution, entropy {p.entropy:.2f} nats", "rows": rows(p.choices)}]
    if p.sampled is not None:
        parts.append({"title": "After temperature, top-k and top-p", "rows": rows(p.sampled)})
    title = WHAT[p.what].format(at="the text" if p.at is None else p.at)
    if p.actual is not None:
        title += f" (there stands {visible(p.actual.text)}, rank {p.rank}, probability {p.actual.probability:.4f})"
    return {"at": p.at, "title": title, "parts": parts}


def _tokens_section(found: Inspection) -> str:
    said = {p.at: p for p in found.predictions if p.at is not None}
    # Shaded by how much a token surprised the model: its nats, 8 and more in full.
    surprise = {p.at + (p.what == "next"): -p.actual.logprob for p in said.values() if p.at is not None and p.actual}
    buttons = "".join(
        f'<button class="token{" said" if at in said else ""}" data-at="{at}" title="{_title(token, surprise.get(at))}"'
        f"{_shade(surprise.get(at))}>{escape(visible(token.text))}</button>"
        for at, token in enumerate(found.tokens)
    )
    source = "".join(f'<span class="token">{escape(visible(token.text))}</span>' for token in found.source)
    whole = "".join(
        f"<h3>{escape(WHAT[p.what].format(at='the text'))}</h3>"
        + table(("", "probability", "log p"), [(c.text, f"{c.probability:.4f}", f"{c.logprob:.3f}") for c in p.choices])
        for p in found.predictions
        if p.at is None
    )
    words = "Click on a token to see what the model expects. Darker tokens surprised it more." if said else ""
    return (
        "<section><h2>Tokens</h2>"
        + (f'<h3>Source</h3><div class="tokens">{source}</div><h3>Target</h3>' if source else "")
        + f'<div class="tokens">{buttons}</div><p class="soft">{words}</p>'
        + f'<div id="distribution" aria-live="polite"></div>{whole}</section>'
    )


def _title(token: Token, nats: float | None) -> str:
    return f"id {token.id}" + ("" if nats is None else f", {nats:.2f} nats")


def _shade(nats: float | None) -> str:
    share = 0 if nats is None else min(nats / 8, 1)
    return f' style="background:color-mix(in srgb, var(--c0) {35 * share:.0f}%, transparent)"' if share > 0.02 else ""


# -- attention --------------------------------------------------------------------------------------------------------


def _maps_section(stack: Stack, found: Inspection) -> str:
    keys = "source" if stack.name == "encoder" and found.source else "tokens"
    parts = [f"<section><h2>Attention of the {stack.name}</h2>", '<p class="soft">Rows look, columns are looked at. ']
    parts.append("Click on a map to read its weights.</p>")
    parts += list(_grids(stack.maps, "", keys, keys))
    if stack.cross:
        parts += ["<h2>Attention to the source</h2>", *_grids(stack.cross, "cross-attention, ", "source", "tokens")]
    parts.append('<div id="large" aria-live="polite"></div></section>' if stack is found.stacks[-1] else "</section>")
    return "\n".join(parts)


def _grids(layers: Sequence[np.ndarray], word: str, keys: str, queries: str) -> Iterator[str]:
    """A row of images per layer, as many layers as fit on a page."""
    shown = chosen_layers(len(layers), layers[0].size)
    if len(shown) < len(layers):
        yield f'<p class="soft">{len(shown)} of {len(layers)} layers, evenly spread, to keep the page small.</p>'
    for layer in shown:
        yield f'<h3>Layer {layer}</h3><div class="maps">'
        where = looks(layers[layer]) if keys == queries else None
        for head, weights in enumerate(layers[layer]):
            note = (
                "" if where is None else f" · previous {where[head]['previous']:.2f}, first {where[head]['first']:.2f}"
            )
            alt = f"{word}layer {layer}, head {head}"
            yield (
                f'<figure class="map"><img loading="lazy" src="{image(weights)}" alt="{alt}" data-keys="{keys}" '
                f'data-queries="{queries}"><figcaption>head {head}{note}</figcaption></figure>'
            )
        yield "</div>"


def chosen_layers(count: int, cells: int) -> list[int]:
    """Layers whose maps together stay below MOST_CELLS, the first and the last among them."""
    fit = max(2, MOST_CELLS // max(cells, 1))
    if fit >= count:
        return list(range(count))
    return sorted({round(i * (count - 1) / (fit - 1)) for i in range(fit)})


def image(weights: np.ndarray) -> str:
    """`weights (T, S)` in [0, 1] as a data URI: a PNG of one colour whose opacity is the weight, for light and dark."""
    shades = np.clip(np.rint(weights * 255), 0, 255).astype(np.uint8)
    height, width = shades.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), shades], axis=1).tobytes()  # each row's filter is "none"
    parts = [
        _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        _chunk(b"PLTE", bytes(INK) * 256),
        _chunk(b"tRNS", bytes(range(256))),
        _chunk(b"IDAT", zlib.compress(rows, 9)),
        _chunk(b"IEND", b""),
    ]
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(parts)).decode()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


# -- lengths ----------------------------------------------------------------------------------------------------------


def _lengths_section(stack: Stack) -> Iterator[str]:
    if not stack.residual:  # a graph that was exported tells of attention alone
        return
    named = {
        "residual stream": stack.residual[1:],
        "attention adds": stack.attention,
        "cross-attention adds": stack.cross_added,
        "feed-forward adds": stack.feed_forward,
    }
    series = {
        name: [(layer, float(values.mean())) for layer, values in enumerate(layers)]
        for name, layers in named.items()
        if layers
    }
    rows = [
        (str(layer), *(f"{points[layer][1]:.3g}" for points in series.values()))
        for layer in range(len(stack.feed_forward))
    ]
    entering = float(stack.residual[0].mean())
    chart = line_chart("lengths by layer", series, "layer") if all(map(_finite, series.values())) else ""
    yield (
        f"<section><h2>Lengths of vectors in the {stack.name}</h2>"
        f'<p class="soft">Means over the tokens; what enters the first layer has a length of {entering:.3g}.</p>'
        f"{chart}{table(('layer', *series), rows)}</section>"
    )


def _finite(points: Sequence[tuple[float, float]]) -> bool:
    return all(math.isfinite(y) for _, y in points)
