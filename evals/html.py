"""Parts of an HTML page that needs nothing but itself: tables, cards, pictures, marked answers."""

import base64
import io
import os
from html import escape
from pathlib import Path

from PIL import Image

from evals.official import read_picture
from hermesflow.files import InputError
from hermesflow.records import Question

# Right and wrong, win and lose, understanding and generation: a pair of colours each that also
# colour-blind eyes tell apart; the second of a pair has dashes, too.
COLORS = {"right": "#007f5f", "wrong": "#d9480f", "win": "#1565c0", "lose": "#e08600",
          "und": "#8e44ad", "gen": "#1f2937", "grey": "#6b7280", "rule": "#e5e7eb",
          "frame": "#d1d5db"}
SMALL = 128  # pixels: smaller pictures are kept exactly
LARGE = 512  # others are shrunk to this
SHOWN = 3  # lines of a list


def page(title: str, content: str) -> str:
    """A whole page; title and content are HTML."""
    colors = "".join(f"--{name}:{color};" for name, color in COLORS.items())
    style = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
    return ('<!doctype html><html lang="en"><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{title}</title><style>:root{{{colors}}}\n{style}</style>{content}</html>\n")


def html_table(markdown: str) -> str:
    """The Markdown tables of `table` as HTML."""
    rows = []
    for line in markdown.splitlines():
        if "---" not in line:
            rows.append([escape(cell.strip()) for cell in line.strip("|").split("|")])
    return table_of(rows)


def table_of(rows: list[list[str]]) -> str:
    """Rows of HTML, the first of which is the head. It scrolls inside itself."""
    head, *body = rows
    lines = ["".join(f"<th>{cell}</th>" for cell in head)]
    lines += ["".join(f"<td>{cell}</td>" for cell in row) for row in body]
    return ('<div class="wide"><table>' + "".join(f"<tr>{line}</tr>" for line in lines)
            + "</table></div>")


def facts(named: list[tuple[str, str]]) -> str:
    """Names and values, both of HTML: a table of two columns that does not scroll."""
    rows = "".join(f"<tr><td>{name}</td><td>{value}</td></tr>" for name, value in named)
    return f'<table class="facts">{rows}</table>'


def note(text: str) -> str:
    return f'<p class="small">{escape(text)}</p>'


def or_note(part, *arguments) -> str:
    """part(*arguments), or a short note where its files are missing or damaged."""
    try:
        return part(*arguments)
    except InputError as error:
        return note(str(error))


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
    """A picture inside the page that a click enlarges, or a note if there is none.

    kind: "right", "wrong", "win", "lose", "sheet" (as wide as the page), or "".
    """
    if not os.path.exists(path):
        return f"<figure><figcaption>{escape(caption)}: no picture</figcaption></figure>"
    try:
        picture = read_picture(path, upright=True)
    except InputError as error:
        return f"<figure><figcaption>{escape(f'{caption}: {error}')}</figcaption></figure>"
    largest = 2 * LARGE if kind == "sheet" else LARGE
    name = escape(f"enlarge {caption}")
    return (f'<figure class="{kind}"><label class="zoom"><input type="checkbox" '
            f'aria-label="{name}"><img src="{data_of(picture, largest)}" alt=""></label>'
            f"<figcaption>{escape(caption)}</figcaption></figure>")


def data_of(picture: Image.Image, largest: int) -> str:
    """A data URI: small pictures exactly, photographs in few bytes."""
    picture.thumbnail((largest, largest))
    kind = "png" if max(picture.size) <= SMALL else "jpeg"
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, quality=90)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def wrong_answers(title: str, questions: list[Question], answers: list[str],
                  matched: list[str | None]) -> str:
    """The questions answered wrong: the answer, the choice it was taken for, and what is right.

    matched: the choices; "" where an answer is none of them, None where that is not known.
    """
    lines = []
    for q, answer, choice in zip(questions, answers, matched):
        if choice == q.answer:
            continue
        said = f"<q>{escape(answer)}</q>" if answer.strip() else "no answer"
        taken = ""
        if choice == "" and answer.strip():
            taken = ", taken for no choice"
        elif choice and choice != answer:
            taken = f", taken for <q>{escape(choice)}</q>"
        lines.append(f'{escape(q.question)} <b class="wrong">✗ {said}</b>{taken}; right: '
                     f'<b class="right"><q>{escape(q.answer)}</q></b>')
    return folded_list(title, lines)


def folded_list(title: str, lines: list[str]) -> str:
    """A titled list of HTML; of a long one the first lines, and the others at a click."""
    if not lines:
        return ""
    more = len(lines) - SHOWN
    hidden = folded(f"{more} more", items(lines[SHOWN:])) if more > 0 else ""
    return f"<p>{title}</p>{items(lines[:SHOWN])}{hidden}"


def items(lines: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{line}</li>" for line in lines) + "</ul>"


def folded(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>{content}</details>"


def key(kind: str, text: str) -> str:
    """An entry of a legend: the frame of such pictures, and what it says."""
    return f'<span class="key"><i class="{kind}"></i>{escape(text)}</span>'


def card(content: str) -> str:
    return f'<div class="card">{content}</div>'


def card_grid(cards: list[str]) -> str:
    return f'<div class="cards">{"".join(cards)}</div>'


def figure_row(figures: list[str]) -> str:
    return f'<div class="row">{"".join(figures)}</div>'
