"""Cards of pictures with what is wrong in them: held-out drawings, and the pairs of a round."""

from html import escape
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from evals.html import (card, card_grid, figure, figure_row, folded, folded_list, key, note,
                        wrong_answers)
from evals.official import get
from hermesflow.files import InputError, read_object
from hermesflow.jsonl import Lines, read_jsonl
from hermesflow.records import Pair, Score

# ----------------------------------------------------------------------------------------- held out


def drawings(folders: dict[str, Path], runs: dict[str, Lines], show: int) -> str:
    """Held-out prompts: the real image, every policy's drawing, and the wrong answers."""
    cards = []
    for records in islice(zip(*runs.values()), show):
        figures = [figure(Path(records[0].image), "real")]
        wrong = []
        real_wrong = []
        real_right = []
        for name, r in zip(runs, records):
            mark = "✓" if r.all_right else "✗"
            figures.append(figure(folders[name] / "images" / f"{r.id}.png",
                                  f"{name} {mark} {share(r.gen_right)}",
                                  "right" if r.all_right else "wrong"))
            wrong.append(wrong_answers(f"{name}’s drawing", r.questions, r.gen_answers,
                                       r.gen_matched))
            if all(r.gen_right) and not r.all_right:
                wrong.append(f"<p>{name}’s drawing: every answer is right, yet it is not exactly "
                             "what the text says</p>")
            real_right.append(f"{name} {share(r.und_right)}")
            real_wrong.append(wrong_answers(f"{name} about the real image", r.questions,
                                            r.und_answers, r.und_matched))
        wrong.append(folded(f"answers about the real image: {', '.join(real_right)}",
                            "".join(real_wrong) or "<p>all right</p>"))
        cards.append(card(escape(records[0].text) + figure_row(figures) + "".join(wrong)))
    legend = (key("right", "✓ everything right (solid frame)")
              + key("wrong", "✗ something is wrong (dashed frame)"))
    return (f'<p class="keys">{legend} The numbers are questions that the judge answers right '
            f"about the drawing.</p>{card_grid(cards)}")


def share(right: list[bool]) -> str:
    return f"{sum(right)}/{len(right)}"


# ------------------------------------------------------------------------------------------- pairs


class Judged(NamedTuple):
    """A round's pairs and scores, if they can be read."""

    pairs: Lines | None = None
    scores: Lines | None = None
    self_play: bool = False  # its pairs go on from the last round's


def judged(folder: Path) -> Judged:
    try:
        settings = read_object(folder / "settings.json")
        previous = get(settings, "derived", dict, "").get("previous")
        return Judged(read_jsonl(folder / "pairs.jsonl", Pair),
                      read_jsonl(folder / "scores.jsonl", Score), previous is not None)
    except InputError:
        return Judged()


def find(lines: Lines | None, id: str):
    return lines[lines.ids.index(id)] if lines and id in lines.ids else None


def candidate(history: list[Judged], p: Pair, side: str) -> tuple[Score, int] | None:
    """The scored image that became p's winner or loser: Eq. 9–10 backwards.

    history: the rounds up to the pair's. None: its scores are not there.
    """
    *earlier, now = history
    score, wrong = image_of(p, side)
    if now.self_play and side == "lose":
        if not earlier or earlier[-1].pairs is None:
            return None
        old = find(earlier[-1].pairs, p.id)
        if old:  # the loser is the last round's winner or loser
            won = image_of(old, "win") == (score, wrong)
            return candidate(earlier, old, "win" if won else "lose")
    scored = find(now.scores, p.id)
    if scored is None or not scored.matched or score not in scored.image_scores:
        return None
    k = scored.image_scores.index(score)  # best and worst are the first of their score
    meant = zip(scored.questions, scored.matched[k])
    asked = "\n".join(q.question for q, choice in meant if choice != q.answer)
    return (scored, k) if asked == wrong else None


def image_of(p: Pair, side: str) -> tuple[float, str]:
    """Score of a pair's image, and the questions answered wrong about it, one a line."""
    if side == "win":
        return p.win_image_score, p.win_image_wrong
    return p.lose_image_score, p.lose_image_wrong


def gallery(run: Path, rounds: list[str]) -> str:
    """The pairs of the last of the rounds that have pictures."""
    folders = [run / name / "pairs" for name in rounds]
    images = folders[-1] / "images"
    pairs = read_jsonl(folders[-1] / "pairs.jsonl", Pair)
    history = [judged(folder) for folder in folders]
    cards = []
    for i, id in enumerate(pairs.ids):
        if (images / f"{id}-real.png").is_file():
            cards.append(pair_card(pairs[i], images, history))
    if not cards:
        return note(f"{images}: no pictures of pairs")
    legend = key("win", "win (solid frame)") + key("lose", "lose (dashed frame)")
    return (f'<p class="keys">{legend} The policy itself answers about its images.</p>'
            + card_grid(cards))


def pair_card(p: Pair, images: Path, history: list[Judged]) -> str:
    """Winner and loser with scores, captions and wrong answers."""
    figures = [figure(images / f"{p.id}-real.png", "real")]
    captions = []
    answers = []
    for side, caption, caption_score in (("win", p.win_caption, p.win_caption_score),
                                         ("lose", p.lose_caption, p.lose_caption_score)):
        score, wrong = image_of(p, side)
        figures.append(figure(images / f"{p.id}-{side}.png", f"{side} {score:.2f}", side))
        captions.append(f"<li><b>{side} {caption_score:.2f}</b> {escape(caption)}</li>")
        found = candidate(history, p, side)
        title = f"{side} image"
        if found:
            scored, k = found
            answers.append(wrong_answers(title, scored.questions, scored.answers[k],
                                         scored.matched[k]))
        else:  # the answers are not there
            questions = [escape(question) for question in wrong.splitlines()]
            answers.append(folded_list(f"{title}: answered wrong", questions))
    return card(f"{escape(p.drawing_text)}{figure_row(figures)}<p>captions</p>"
                f"<ul>{''.join(captions)}</ul>{''.join(answers)}")
