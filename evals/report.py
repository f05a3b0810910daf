"""RUN/report.html: one page about a run of run_selfplay.sh, with every picture inside."""

import subprocess
from html import escape
from pathlib import Path

from evals.compare import differences_to, read_evaluations
from evals.html import STYLE, card, card_grid, chart, figure, figure_row, html_table
from evals.metrics import EvalRecord, evaluate, table
from hermesflow.files import InputError, parse_json, read_text, write_text
from hermesflow.records import Pair, read_jsonl

CHART_METRICS = ("understanding", "generation", "gap", "everything right")
TRAINING_CHARTS = {
    "losses": ("loss_und", "loss_gen", "nll_und", "nll_gen"),
    "accuracy": ("accuracy_und", "accuracy_gen"),
    "log-prob changes": ("win_change_und", "lose_change_und", "win_change_gen", "lose_change_gen"),
}


def drawings(folders: dict[str, Path], runs: dict[str, list[EvalRecord]], show: int) -> str:
    """Held-out prompts: the real image and every round's drawing, with the judge's verdict."""
    cards = []
    for i, record in enumerate(next(iter(runs.values()))[:show]):
        figures = [figure(Path(record.image), "real")]
        for name, records in runs.items():
            correct = records[i].gen_right
            figures.append(figure(folders[name] / "images" / f"{record.id}.png",
                                  f"{name}: {sum(correct)}/{len(correct)}",
                                  "right" if records[i].all_right else "wrong"))
        cards.append(card(escape(record.text) + figure_row(figures)))
    return card_grid(cards)


def gallery(folder: Path) -> str:
    """The pairs that have pictures: winner and loser with scores, captions and wrong answers."""
    cards = []
    for pair in read_jsonl(folder / "pairs.jsonl", Pair):
        if (folder / "images" / f"{pair.id}-real.png").is_file():
            cards.append(pair_card(pair, folder / "images"))
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
        f"<b>win got wrong</b>: {escape('; '.join(p.win_image_wrong) or 'nothing')}<br>",
        f"<b>lose got wrong</b>: {escape('; '.join(p.lose_image_wrong) or 'nothing')}<br>",
    ]
    return card(f'{escape(p.caption)}{figures}<div class="small">{"".join(lines)}</div>')


def training(folder: Path) -> str:
    """The training curves of one round."""
    file = folder / "train.jsonl"
    log = [parse_json(line, str(file)) for line in read_text(file).splitlines()]
    cards = []
    for title, keys in TRAINING_CHARTS.items():
        series = {}
        for key in keys:
            series[key] = [(r["step"], r[key]) for r in log]
        cards.append(card(title + chart(series)))
    return card_grid(cards)


def element_table(base: dict, last: dict) -> str:
    """Accuracies by what the questions are about, of the first and the last evaluation."""
    lines = ["| | questions | understanding: base | last round | generation: base | last round |"]
    for element, b in base["by element"].items():
        e = last["by element"][element]
        lines.append(f"| {element} | {b['questions']} | {b['understanding']:.3f} | "
                     f"{e['understanding']:.3f} | {b['generation']:.3f} | {e['generation']:.3f} |")
    return html_table("\n".join(lines))


def settings_of(run: Path) -> str:
    """The settings.json of every stage, folded."""
    parts = []
    for file in sorted(run.glob("**/settings.json")):
        name = str(file.parent.relative_to(run))
        parts.append(f"<details><summary>{escape(name)}</summary>"
                     f"<pre>{escape(read_text(file))}</pre></details>")
    return "".join(parts)


def revision() -> str:
    """The code's git revision, with "-dirty" if files were changed."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True,
                          text=True, cwd=Path(__file__).parent)
    return escape(done.stdout.strip()) or "unknown"


def report(run: Path, show: int) -> None:
    """RUN/report.html, one self-contained page about a run of run_selfplay.sh."""
    rounds = sorted(run.glob("round*/train/train.jsonl"), key=round_number)
    names = ["base", *(round_folder(log).name for log in rounds)]
    folders = {n: run / "eval" / n for n in names if (run / "eval" / n / "answers.jsonl").exists()}
    if "base" not in folders:
        message = "missing; --report wants a run of run_selfplay.sh"
        raise InputError(f"{run}/eval/base/answers.jsonl: {message}")
    runs = read_evaluations(list(folders.values()))
    metrics = {name: evaluate(records) for name, records in runs.items()}
    base = metrics["base"]
    last = list(metrics.values())[-1]
    lines = {}
    for metric in CHART_METRICS:
        lines[metric] = [(i, *m[metric].values()) for i, m in enumerate(metrics.values())]
    differences = differences_to("base", runs)

    parts = [
        f"<h1>HermesFlow: {escape(run.name)}</h1>",
        f"<p class=small>{base['records']} held-out records, {base['different texts']} different "
        f"texts; mean over records, 95 % bootstrap intervals; code {revision()}</p>",
        "<h2>Understanding, generation and the gap</h2>",
        chart(lines, list(metrics)),
        html_table(table(metrics)),
    ]
    if differences:
        parts.append("<p>Paired difference to the base:</p>" + html_table(table(differences, "+")))
    parts += [
        "<h2>By what the questions are about</h2>",
        element_table(base, last),
        "<h2>Held-out prompts</h2><p class=small>Green: everything right. Numbers: questions that "
        "the judge answers right about the drawing.</p>",
        drawings(folders, runs, show),
    ]
    for log in rounds:
        folder = round_folder(log)
        parts += [f"<h2>{folder.name}: preference pairs</h2>", gallery(folder / "pairs"),
                  f"<h2>{folder.name}: training</h2>", training(folder / "train")]
    parts += ["<h2>Settings</h2>", settings_of(run)]
    head = ('<!doctype html><html lang="en"><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>HermesFlow: {escape(run.name)}</title><style>{STYLE}</style>")
    write_text(run / "report.html", head + "".join(parts) + "</html>\n")
    print(run / "report.html")


def round_folder(log: Path) -> Path:
    """roundN of roundN/train/train.jsonl."""
    return log.parents[1]


def round_number(log: Path) -> int:
    return int(round_folder(log).name.removeprefix("round"))
