"""RUN/report.html: one page about a run of run_selfplay.sh, with every picture inside.

What is missing or damaged in the run is said in its place.
"""

import re
import subprocess
from html import escape
from itertools import islice
from pathlib import Path

from evals.compare import differences_to, other_settings, read_evaluations, summarize_all, take
from evals.html import (STYLE, card, card_grid, chart, figure, figure_row, html_table,
                        object_listing)
from evals.metrics import metrics_of, table
from evals.official import get
from hermesflow.files import InputError, parse_json, read_object, read_text, write_text
from hermesflow.jsonl import Lines, read_jsonl
from hermesflow.records import Pair

CHART_METRICS = ("understanding", "generation", "gap", "everything right")
TRAINING_CHARTS = {
    "losses": ("loss_und", "loss_gen", "nll_und", "nll_gen"),
    "accuracy": ("accuracy_und", "accuracy_gen"),
    "log-prob changes": ("win_change_und", "lose_change_und", "win_change_gen", "lose_change_gen"),
}


def or_note(part, *arguments) -> str:
    """part(*arguments), or a short note where its files are missing or damaged."""
    try:
        return part(*arguments)
    except InputError as error:
        return f"<p class=small>{escape(str(error))}</p>"


def drawings(folders: dict[str, Path], runs: dict[str, Lines], show: int) -> str:
    """Held-out prompts: the real image and every round's drawing, with the judge's verdict."""
    cards = []
    for records in islice(zip(*runs.values()), show):
        first = records[0]
        figures = [figure(Path(first.image), "real")]
        for folder, (name, record) in zip(folders.values(), zip(runs, records)):
            figures.append(figure(folder / "images" / f"{record.id}.png",
                                  f"{name}: {sum(record.gen_right)}/{len(record.gen_right)}",
                                  "right" if record.all_right else "wrong"))
        cards.append(card(escape(first.text) + figure_row(figures)))
    return card_grid(cards)


def gallery(folder: Path) -> str:
    """The pairs that have pictures: winner and loser with scores, captions and wrong answers."""
    cards = []
    pairs = read_jsonl(folder / "pairs.jsonl", Pair)
    for i, id in enumerate(pairs.ids):
        if (folder / "images" / f"{id}-real.png").is_file():
            cards.append(pair_card(pairs[i], folder / "images"))
    return card_grid(cards)


def pair_card(p: Pair, images: Path) -> str:
    figures = figure_row([
        figure(images / f"{p.id}-real.png", "real"),
        figure(images / f"{p.id}-win.png", f"win {p.win_image_score:.2f}", "right"),
        figure(images / f"{p.id}-lose.png", f"lose {p.lose_image_score:.2f}", "wrong"),
    ])
    lines = [
        f"<b>win {p.win_caption_score:.2f}</b>: {escape(p.win_caption)}<br>",
        f"<b>lose {p.lose_caption_score:.2f}</b>: {escape(p.lose_caption)}<br>",
        f"<b>win got wrong</b>: {escape(in_one_line(p.win_image_wrong))}<br>",
        f"<b>lose got wrong</b>: {escape(in_one_line(p.lose_image_wrong))}<br>",
    ]
    return card(f'{escape(p.caption)}{figures}<div class="small">{"".join(lines)}</div>')


def in_one_line(questions: str) -> str:
    return "; ".join(questions.splitlines()) or "nothing"


def training(folder: Path) -> str:
    """The training curves of one round."""
    file = folder / "train.jsonl"
    log = []
    for number, line in enumerate(read_text(file).splitlines(), 1):
        where = f"{file}: line {number}"
        log.append((where, parse_json(line, where)))
    if not log:
        raise InputError(f"{file}: empty; no step was finished")
    cards = []
    for title, keys in TRAINING_CHARTS.items():
        series = {}
        for key in keys:
            series[key] = [(get(r, "step", int, where), get(r, key, float, where))
                           for where, r in log]
        cards.append(card(title + chart(series)))
    return card_grid(cards)


def element_table(base: dict, last: dict) -> str:
    """Accuracies by what the questions are about, of the first and the last evaluation."""
    lines = ["| | questions | understanding: base | last round | generation: base | last round |"]
    for element in sorted({**base, **last}):
        cells = []
        for metric in ("understanding", "generation"):
            for elements in (base, last):
                known = element in elements  # an evaluation may have asked other questions
                cells.append(f"{elements[element][metric]:.3f}" if known else "–")
        questions = base.get(element, last.get(element))["questions"]
        lines.append(f"| {element} | {questions} | {' | '.join(cells)} |")
    return html_table("\n".join(lines))


def settings_of(run: Path) -> str:
    """The settings.json of every stage, folded."""
    parts = []
    for file in sorted(run.glob("**/settings.json")):
        name = escape(str(file.parent.relative_to(run)))
        content = or_note(lambda: object_listing(read_object(file)))
        parts.append(f"<details><summary>{name}</summary>{content}</details>")
    return "".join(parts)


def notes_on_settings(folders: dict[str, Path]) -> str:
    """In which settings the evaluations differ, if they do."""
    notes = []
    for name, folder in folders.items():
        different = other_settings(folder, folders["base"])
        if different:
            changes = escape("; ".join(different.values()))
            notes.append(f"{escape(name)} was evaluated with other settings: {changes}")
    return f"<p>{'<br>'.join(notes)}</p>" if notes else ""


def revision() -> str:
    """The code's git revision, with "-dirty" if files were changed."""
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True,
                              text=True, cwd=Path(__file__).parent)
    except OSError:  # no git
        return "unknown"
    return escape(done.stdout.strip()) or "unknown"


def report(run: Path, show: int) -> None:
    """RUN/report.html, one self-contained page about a run of run_selfplay.sh."""
    rounds = rounds_of(run)
    folders = {name: run / "eval" / name for name in ("base", *rounds)}
    folders = {n: folder for n, folder in folders.items() if (folder / "answers.jsonl").exists()}
    if "base" not in folders:
        message = "missing; --report wants a run of run_selfplay.sh"
        raise InputError(f"{run}/eval/base/answers.jsonl: {message}")
    take(run, "report.html")
    runs = read_evaluations(list(folders.values()))
    summaries = summarize_all(runs)
    metrics = {name: metrics_of(summary) for name, summary in summaries.items()}
    base = metrics["base"]
    last = list(metrics.values())[-1]
    lines = {}
    for metric in CHART_METRICS:
        lines[metric] = [(i, *m[metric].values()) for i, m in enumerate(metrics.values())]
    differences = differences_to("base", summaries)

    parts = [
        f"<h1>HermesFlow: {escape(run.resolve().name)}</h1>",
        f"<p class=small>{base['records']} held-out records, {base['different texts']} different "
        f"texts; mean over records, 95 % bootstrap intervals; code {revision()}</p>",
        "<h2>Understanding, generation and the gap</h2>",
        chart(lines, list(metrics)),
        html_table(table(metrics)),
        or_note(notes_on_settings, folders),
    ]
    if differences:
        parts.append("<p>Paired difference to the base:</p>" + html_table(table(differences, "+")))
    parts += [
        "<h2>By what the questions are about</h2>",
        element_table(base["by element"], last["by element"]),
        "<h2>Held-out prompts</h2><p class=small>Green: everything right. Numbers: questions that "
        "the judge answers right about the drawing.</p>",
        drawings(folders, runs, show),
    ]
    for name in rounds:
        parts += [f"<h2>{name}: preference pairs</h2>", or_note(gallery, run / name / "pairs"),
                  f"<h2>{name}: training</h2>", or_note(training, run / name / "train")]
    parts += ["<h2>Settings</h2>", settings_of(run)]
    head = ('<!doctype html><html lang="en"><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>HermesFlow: {escape(run.resolve().name)}</title><style>{STYLE}</style>")
    write_text(run / "report.html", head + "".join(parts) + "</html>\n")
    print(run / "report.html")


def rounds_of(run: Path) -> list[str]:
    """The rounds that have trained, in order; other folders, such as copies, are left out."""
    trained = [log.parents[1].name for log in run.glob("round*/train/train.jsonl")]
    rounds = [name for name in trained if re.fullmatch(r"round[1-9]\d*", name, re.ASCII)]
    return sorted(rounds, key=lambda name: int(name.removeprefix("round")))
