"""Parts of an HTML page that needs nothing but itself: charts as SVG, tables, pictures, cards."""

import base64
import io
import math
import os
from html import escape
from pathlib import Path

from evals.official import read_picture
from hermesflow.files import InputError

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1f2937;max-width:1080px;margin:0 auto;padding:16px}
h1{font-size:1.6em}h2{font-size:1.2em;margin-top:2em;border-bottom:1px solid #e5e7eb}
svg{width:100%;max-width:600px;height:auto}\
.wide{overflow-x:auto}.small{color:#6b7280;font-size:.87em}
table{border-collapse:collapse;font-size:.87em}\
td,th{padding:4px 10px;border-bottom:1px solid #e5e7eb;text-align:left;
white-space:nowrap}\
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(320px,1fr));gap:14px}
.card{border:1px solid #e5e7eb;border-radius:8px;padding:10px;min-width:0;overflow-wrap:anywhere}
.row{display:flex;flex-wrap:wrap;gap:6px}\
figure{margin:0;flex:1 1 62px;max-width:120px;font-size:.72em}
figure img{width:100%;aspect-ratio:1;object-fit:cover;\
box-sizing:border-box;border:3px solid #d1d5db}
.right img{border-color:#16a34a}.wrong img{border-color:#dc2626}pre{overflow-x:auto;font-size:.8em}
@media(max-width:480px){.grid{grid-template-columns:1fr}}
"""
COLORS = ("#2563eb", "#ea580c", "#6b7280", "#16a34a", "#9333ea", "#0891b2")


def chart(series: dict[str, list[tuple]], ticks: list[str] | None = None) -> str:
    """Lines as SVG. series: name -> [(x, y) or (x, y, low, high)]; ticks: names of x = 0, 1, …"""
    points = [p for line in series.values() for p in line]
    ys = [0.0]
    for p in points:
        ys += p[1:]
    right = max(p[0] for p in points) or 1
    grid = grid_step(max(max(ys) - min(ys), 1e-6) / 5)
    bottom = math.floor(min(ys) / grid) * grid
    top = max(math.ceil(max(ys) / grid) * grid, bottom + grid)  # a flat line has a height, too

    def place(x, y):
        return 40 + 370 * x / right, 216 - 200 * (y - bottom) / (top - bottom)

    parts = ['<svg viewBox="0 0 440 276" role="img">']
    for i in range(round((top - bottom) / grid) + 1):
        value = bottom + i * grid
        _, y = place(0, value)
        parts.append(f'<path d="M40 {y:.1f}H410" stroke="#e5e7eb"/>'
                     f'<text x="34" y="{y + 4:.1f}" font-size="11" '
                     f'text-anchor="end">{value:.3g}</text>')
    for x, text in enumerate(ticks) if ticks else [(0, "0"), (right, f"step {right:g}")]:
        parts.append(f'<text x="{place(x, 0)[0]:.1f}" y="234" font-size="11" '
                     f'text-anchor="middle">{escape(text)}</text>')
    for i, (name, line) in enumerate(series.items()):
        color = COLORS[i % len(COLORS)]
        parts.append(polyline([place(*p[:2]) for p in line], color))
        for p in line:
            if len(p) == 4:
                low, high = place(p[0], p[2]), place(p[0], p[3])
                parts.append(dot(place(*p[:2]), low[1], high[1], color))
        parts.append(f'<text x="{50 + 190 * (i % 2)}" y="{254 + 15 * (i // 2)}" font-size="12" '
                     f'fill="{color}">● {escape(name)}</text>')
    return "".join(parts) + "</svg>"


def grid_step(least: float) -> float:
    """The smallest of 1, 2, 5, 10 times a power of ten that is not below `least`."""
    power = 10 ** math.floor(math.log10(least))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= least)


def polyline(points: list[tuple], color: str) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>'


def dot(point: tuple, low: float, high: float, color: str) -> str:
    """A point with its interval."""
    x, y = point
    return (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{color}"/>'
            f'<path d="M{x:.1f} {low:.1f}V{high:.1f}" stroke="{color}" stroke-width="1.5"/>')


def html_table(markdown: str) -> str:
    """The Markdown tables of `table` as HTML."""
    rows = []
    for line in markdown.splitlines():
        if "---" not in line:
            cells = [escape(cell.strip()) for cell in line.strip("|").split("|")]
            tag = "td" if rows else "th"
            rows.append("".join(f"<{tag}>{cell}</{tag}>" for cell in cells))
    return ('<div class="wide"><table>' + "".join(f"<tr>{row}</tr>" for row in rows)
            + "</table></div>")


def object_listing(values: dict) -> str:
    """A JSON object of objects, such as settings.json: a section each, a line per value."""
    lines = []
    for section, value in values.items():
        if not isinstance(value, dict):
            lines.append(f"{section}: {value}")
            continue
        lines.append(f"\n{section}")
        for name, inner in value.items():
            if isinstance(inner, dict):
                inner = ", ".join(f"{key} {v}" for key, v in inner.items())
            lines.append(f"  {name:24} {inner}")
    text = "\n".join(lines)
    return f"<pre>{escape(text)}</pre>"


def figure(path: Path, caption: str, kind: str = "") -> str:
    """A picture inside the page, or a note if there is none; kind: "right", "wrong" or ""."""
    if not os.path.exists(path):
        return f"<figure><figcaption>{escape(caption)}: no picture</figcaption></figure>"
    try:
        picture = read_picture(path, upright=True)
    except InputError as error:
        return f"<figure><figcaption>{escape(f'{caption}: {error}')}</figcaption></figure>"
    picture.thumbnail((256, 256))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return (f'<figure class="{kind}"><img src="data:image/png;base64,{data}" alt="">'
            f"<figcaption>{escape(caption)}</figcaption></figure>")


def card(content: str) -> str:
    return f'<div class="card">{content}</div>'


def card_grid(cards: list[str]) -> str:
    return f'<div class="grid">{"".join(cards)}</div>'


def figure_row(figures: list[str]) -> str:
    return f'<div class="row">{"".join(figures)}</div>'
