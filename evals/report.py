"""RUN/report.html: one page about a run of run_selfplay.sh, with every picture inside.

What is missing or damaged in the run is said in its place.
"""

import subprocess
from html import escape
from pathlib import Path

from evals.charts import Line, chart
from evals.compare import (differences_to, other_settings, read_evaluations, read_settings,
                           summarize_all, take)
from evals.gallery import drawings, gallery
from evals.html import (card, card_grid, facts, folded, html_table, note, object_listing, or_note,
                        page)
from evals.metrics import Summary, metrics_of, table
from evals.official import get
from evals.rounds import acceptance, overview, previews, rounds_of, tally, training
from hermesflow.files import InputError, read_object, write_text

DRAWN_WITH = ("steps", "guidance", "guidance_interval", "temperature", "anneal", "seed")


# ------------------------------------------------------------------------------------ what was done


def what_was_done(run: Path, folders: dict[str, Path], rounds: list[str]) -> str:
    """What the numbers are about: judge, drawing, records, policies, code."""
    mark = read_settings(folders["base"])
    settings = mark["settings"]
    rows = {
        "judge of drawings": listed(settings, ("judge", "matcher", "caption_scorer")),
        "drawing": listed(settings, DRAWN_WITH),
        "held-out records": content_of(mark["inputs"], "records"),
        "base": content_of(mark["inputs"], "model"),
    }
    for name in rounds:
        rows[name] = (or_note(pairs_of, run / name / "pairs" / "settings.json") + ", "
                      + or_note(trained_with, run / name / "train" / "settings.json"))
    rows["code"] = f"revision {revision()}"
    return facts([*rows.items()])


def listed(settings: dict, names: tuple[str, ...]) -> str:
    return escape(", ".join(f"{n.replace('_', '-')} {settings[n]}" for n in names if n in settings))


def content_of(inputs: dict, name: str) -> str:
    """The fingerprint of an input, and how many items it has."""
    described = inputs.get(name) if isinstance(inputs.get(name), dict) else {}
    count = f"{described['items']}, " if "items" in described else ""
    return escape(f"{count}fingerprint {described.get('content', 'unknown')}")


def pairs_of(file: Path) -> str:
    previous = get(read_object(file), "derived", dict, str(file)).get("previous")
    return "fresh pairs" if previous is None else "self-play pairs (Eq. 9–10)"


def trained_with(file: Path) -> str:
    settings = get(read_object(file), "settings", dict, str(file))
    return "trained with " + listed(settings, tuple(settings))


def notes_on_settings(folders: dict[str, Path]) -> str:
    """In which settings, or code, the evaluations differ, if they do."""
    notes = []
    code = read_settings(folders["base"])["code"]
    for name, folder in folders.items():
        different = list(other_settings(folder, folders["base"]).values())
        if different:
            notes.append(note(f"{name} was evaluated with other settings: {'; '.join(different)}"))
        files = sorted(dict(read_settings(folder)["code"].items() - code.items()))
        if files:
            notes.append(note(f"{name} was evaluated by other code: {', '.join(files)}"))
    return "".join(notes)


def settings_of(run: Path) -> str:
    """The settings.json of every stage, folded."""
    parts = []
    for file in sorted(run.glob("**/settings.json")):
        name = escape(str(file.parent.relative_to(run)))
        content = or_note(lambda: object_listing(read_object(file)))
        parts.append(folded(name, content))
    return "".join(parts)


def revision() -> str:
    """The code's git revision, with "-dirty" if files were changed."""
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True,
                              text=True, cwd=Path(__file__).parent)
    except OSError:  # no git
        return "unknown"
    return escape(done.stdout.strip()) or "unknown"


# ----------------------------------------------------------------------------------------- results


def evaluation(summaries: dict[str, Summary]) -> str:
    """Charts and tables of all evaluations, and paired differences to the base."""
    metrics = {name: metrics_of(summary) for name, summary in summaries.items()}
    base, *_, last = [metrics["base"], *metrics.values()]

    def line(metric: str, kind: str) -> Line:
        values = [m[metric].values() for m in metrics.values()]
        return Line(metric, kind, [(i, *v) for i, v in enumerate(values)])

    both = [line("understanding", "und"), line("generation", "gen")]
    charts = [
        card(chart("understanding and generation", both, list(metrics), shade="gap")),
        card(chart("gap: understanding − generation", [line("gap", "")], list(metrics))),
        card(chart("drawings with everything right", [line("everything right", "right")],
                   list(metrics))),
    ]
    text = (f"{base['records']} held-out records, {base['different texts']} different texts; mean "
            "over records [95 % bootstrap interval]")
    parts = [card_grid(charts), note(text), html_table(table(metrics))]
    differences = differences_to("base", summaries)
    if differences:
        parts.append("<h3>Paired difference to the base</h3>" + html_table(table(differences, "+")))
    parts.append("<h3>By what the questions are about</h3>"
                 + element_table(base["by element"], last["by element"]))
    return "".join(parts)


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


# -------------------------------------------------------------------------------------------- page


def report(run: Path, show: int) -> None:
    """RUN/report.html, one self-contained page about a run of run_selfplay.sh."""
    rounds = rounds_of(run)
    folders = {name: run / "eval" / name for name in ("base", *rounds)}
    absent = [name for name, folder in folders.items() if not (folder / "answers.jsonl").exists()]
    if "base" in absent:
        message = "missing; --report wants a run of run_selfplay.sh"
        raise InputError(f"{run}/eval/base/answers.jsonl: {message}")
    take(run, "report.html")
    folders = {name: folder for name, folder in folders.items() if name not in absent}
    runs = read_evaluations(list(folders.values()))
    summaries = summarize_all(runs)

    tallies = {}
    missing = {}
    for name in rounds:
        try:
            tallies[name] = tally(run / name / "pairs")
        except InputError as error:
            missing[name] = note(str(error))

    title = f"HermesFlow: {escape(run.resolve().name)}"
    parts = [
        f"<h1>{title}</h1>",
        "<nav>" + "".join(f'<a href="#{name}">{name}</a>' for name in
                          ("evaluation", "drawings", *rounds, "settings")) + "</nav>",
        or_note(what_was_done, run, folders, rounds),
        or_note(notes_on_settings, folders),
        *(note(f"{name}: not evaluated (no eval/{name}/answers.jsonl)") for name in absent),
        '<h2 id="evaluation">Understanding, generation and the gap</h2>',
        evaluation(summaries),
        "<h3>Candidates and pairs</h3>" + overview(tallies) if tallies else "",
        '<h2 id="drawings">Held-out prompts</h2>',
        drawings(folders, runs, show),
    ]
    for i, name in enumerate(rounds):
        folder = run / name
        parts += [
            f'<h2 id="{name}">{name}: preference pairs</h2>',
            acceptance(tallies[name]) if name in tallies else missing[name],
            or_note(gallery, run, rounds[: i + 1]),
            f"<h2>{name}: training</h2>",
            or_note(training, folder / "train"),
            previews(folder / "train"),
        ]
    parts += ['<h2 id="settings">Settings</h2>', settings_of(run)]
    write_text(run / "report.html", page(title, "".join(parts)))
    print(run / "report.html")
