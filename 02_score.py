"""Stage 2, scoring: the policy judges its captions and images; best and worst become pairs.

reads   samples.jsonl and samples.safetensors of stage 1, a checkpoint, the last round's pairs
writes  OUT/scores.jsonl   every score, every answer, and why a record gives no pair
        OUT/pairs.jsonl    (x, y, y_w, y_l, x_w, x_l) with scores, token ids and image codes, as
                           flat JSON lines that datasets.load_dataset("json", …) takes
        OUT/pairs.png, OUT/images   the first pairs, for people

    python 02_score.py --samples runs/try/samples --out runs/try/pairs

The defaults need no download. The paper's are --caption-scorer google-bert/bert-large-uncased
--matcher sentence-transformers/all-mpnet-base-v2, and for records without questions
--question-model tifa-benchmark/llama2_tifa_question_generation --qa-model
allenai/unifiedqa-v2-t5-large-1363200.
"""

from pathlib import Path

from hermesflow.options import add_model_options, model_inputs, require_positive, stage_parser


def parse_args(argv=None):
    parser = stage_parser(__doc__)
    add = parser.add_argument_group("input and output").add_argument
    add("--samples", type=Path, required=True, help="output folder of 01_sample.py")
    add("--out", type=Path, required=True, help="output folder")
    add("--overwrite", action="store_true", help="empty OUT first")
    add("--show", type=int, default=8, help="pairs in the gallery")
    add_model_options(parser)
    add = parser.add_argument_group("scores").add_argument
    add("--caption-scorer", default="token-f1",
        help="token-f1 (of words and word pairs), or an encoder: cosine of its [CLS] vectors")
    add("--matcher", default="text",
        help="text, or a sentence encoder: matches an answer to the nearest choice")
    add("--image-scorer", choices=["questions", "likelihood"], default="questions",
        help="share of questions answered right, or mean probability of the caption's tokens given "
             "the image, which is lower: with --min-image-score 0.3")
    add("--reencode", action="store_true", help="judge images after decoding and encoding again")
    add("--max-new-tokens", type=int, default=20, help="per answer")
    add("--question-model", help="writes questions for records that have none")
    add("--qa-model", help="filters the written questions")
    add = parser.add_argument_group("pairs").add_argument
    add("--previous", type=Path, help="pairs.jsonl of the last round, for Eq. 9–10; joined by id")
    add("--min-image-score", type=float, default=0.6, help="the best image must be above it")
    add = parser.add_argument_group("run").add_argument
    add("--batch", type=int, default=1, help="records at a time; does not change results")
    args = parser.parse_args(argv)
    if bool(args.question_model) != bool(args.qa_model):
        parser.error("--question-model and --qa-model go together")
    require_positive(parser, args, "batch", "max_new_tokens")
    return args


if __name__ == "__main__":
    ARGS = parse_args()  # before the heavy imports, so that --help answers at once

import shutil
from collections import Counter
from typing import NamedTuple

import torch

from hermesflow.files import InputError
from hermesflow.pictures import image_grid, save_picture, to_pil
from hermesflow.records import (Pair, Question, Sample, Score, check_samples, parse_record,
                                read_jsonl, read_samples, write_jsonl)
from hermesflow.runs import map_records, prepare_output, run_main, say
from hermesflow.scoring import (QuestionWriter, answer_matcher, answer_questions,
                                caption_likelihood, caption_scorer, is_correct)
from model import Model, load_from

# ------------------------------------------------------------------------------------------- scores


def accuracy(answers: list[str], questions: list[Question], match) -> float:
    """Acc(x): the share of questions that are answered right."""
    return sum(is_correct(answers, questions, match)) / len(questions)


def score_by_questions(model: Model, questions: list[list[Question]], images: list[torch.Tensor],
                       match, max_new_tokens: int) -> list[tuple[list[float], list[list[str]]]]:
    """Per record its K accuracies, and the K lists of answers that they come from.

    images: (K, N) codes per record. A record without questions has no scores.
    """
    about_each_image = []
    for asked, codes in zip(questions, images):
        about_each_image += [asked] * len(codes)
    answers = answer_questions(model, torch.cat(images), about_each_image, max_new_tokens)
    answers = iter(answers)
    results = []
    for asked, codes in zip(questions, images):
        own = [next(answers) for _ in codes]
        scores = [accuracy(a, asked, match) for a in own] if asked else []
        results.append((scores, own))
    return results


def reencode(model: Model, codes: torch.Tensor) -> torch.Tensor:
    """(B, N) codes decoded to 8-bit pixels and encoded again: what a viewer of them knows."""
    pixels = model.decode_image(codes).clamp(-1, 1)
    return model.encode_image((pixels + 1).mul(127.5).round() / 127.5 - 1)


@torch.inference_mode()
def score_records(model: Model, samples: list[Sample], tensors: dict, score_captions, match,
                  write_questions, by_likelihood: bool, reencoded: bool,
                  max_new_tokens: int) -> list[dict]:
    """The fields of `Score` for some records.

    score_captions, match: as in hermesflow/scoring.py; write_questions: caption -> questions, or
    None, for records without any.
    """
    questions = [s.questions for s in samples]
    if write_questions:
        questions = [s.questions or write_questions(s.caption) for s in samples]
    images = [tensors[f"{s.id}/images"].long().to(model.device) for s in samples]  # (K, N) each
    if reencoded:
        images = [reencode(model, codes) for codes in images]
    if by_likelihood:
        judged = [(caption_likelihood(model, codes, [s.caption] * len(codes)), [])
                  for s, codes in zip(samples, images)]
    else:
        judged = score_by_questions(model, questions, images, match, max_new_tokens)
    results = []
    for s, asked, (scores, answers) in zip(samples, questions, judged):
        caption_scores = score_captions(s.captions, s.caption)
        results.append({"id": s.id, "questions": [vars(q) for q in asked], "answers": answers,
                        "image_scores": scores, "caption_scores": caption_scores})
    return results


# ----------------------------------------------------------------------------------------- curation


class Candidate(NamedTuple):
    """A caption or an image of the policy, with its score."""

    score: float
    tokens: list[int]  # caption token ids, or image codes
    text: str = ""  # of a caption
    wrong: list[str] = []  # of an image: the questions answered wrong


def best_and_worst(candidates: list[Candidate]) -> tuple[Candidate, Candidate]:
    best = max(candidates, key=lambda c: c.score)
    worst = min(candidates, key=lambda c: c.score)
    return best, worst


def self_play(best: Candidate, worst: Candidate, old: tuple[Candidate, Candidate] | None):
    """Eq. 9–10: the new best meets the old winner if it beats it, otherwise the old loser.

    Without an old pair, it meets the round's own worst.
    """
    if old is None:
        return best, worst
    old_win, old_lose = old
    return (best, old_win) if best.score > old_win.score else (best, old_lose)


def curate(sample: Sample, image_codes: list[int], captions: list[Candidate],
           images: list[Candidate], previous: Pair | None, min_image_score: float) -> Pair | str:
    """The record's preference pair (x, y, y_w, y_l, x_w, x_l), or the reason why it gives none."""
    old_captions = old_images = None
    if previous is not None:
        old_captions, old_images = candidates_of_pair(previous)
    win, lose = self_play(*best_and_worst(captions), old_captions)
    win_image, lose_image = self_play(*best_and_worst(images), old_images)

    # the filters: winners must be better, and a winning image mostly right
    if win.score <= lose.score:
        return "captions: best is not better than worst"
    if win_image.score <= min_image_score:
        return f"images: best score is not above {min_image_score}"
    if win_image.score <= lose_image.score:
        return "images: best is not better than worst"
    return Pair(
        sample.id, sample.image, sample.caption, sample.prompt, image_codes,
        win.text, lose.text, win.tokens, lose.tokens, win.score, lose.score,
        win_image.tokens, lose_image.tokens, win_image.score, lose_image.score,
        win_image.wrong, lose_image.wrong)


def candidates_of_pair(p: Pair) -> tuple[tuple[Candidate, Candidate], tuple[Candidate, Candidate]]:
    """(win, lose) captions and (win, lose) images of the last round."""
    captions = (Candidate(p.win_caption_score, p.win_caption_ids, p.win_caption),
                Candidate(p.lose_caption_score, p.lose_caption_ids, p.lose_caption))
    images = (Candidate(p.win_image_score, p.win_image_codes, wrong=p.win_image_wrong),
              Candidate(p.lose_image_score, p.lose_image_codes, wrong=p.lose_image_wrong))
    return captions, images


def make_pairs(samples: list[Sample], scores: list[Score], tensors: dict, previous: dict[str, Pair],
               match, min_image_score: float) -> list[Pair]:
    """The pairs of all records that give one; the others get the reason in their score."""
    pairs = []
    for s, score in zip(samples, scores):
        if not score.image_scores:
            score.dropped = "no questions"
            continue
        captions, images = candidates_of_sample(s, score, tensors, match)
        image_codes = tensors[f"{s.id}/image"].tolist()
        pair = curate(s, image_codes, captions, images, previous.get(s.id), min_image_score)
        if isinstance(pair, Pair):
            pairs.append(pair)
        else:
            score.dropped = pair
    return pairs


def candidates_of_sample(sample: Sample, score: Score, tensors: dict,
                         match) -> tuple[list[Candidate], list[Candidate]]:
    """The n captions and the K images of a record."""
    captions = []
    for k, row in enumerate(tensors[f"{sample.id}/captions"].tolist()):
        ids = [i for i in row if i >= 0]  # padded with -1
        captions.append(Candidate(score.caption_scores[k], ids, sample.captions[k]))
    images = []
    for k, codes in enumerate(tensors[f"{sample.id}/images"].tolist()):
        wrong = []
        if score.answers:
            correct = is_correct(score.answers[k], score.questions, match)
            wrong = [q.question for q, ok in zip(score.questions, correct) if not ok]
        images.append(Candidate(score.image_scores[k], codes, wrong=wrong))
    return captions, images


# --------------------------------------------------------------------------------- input and output


def read_previous(file: Path | None, samples: list[Sample], folder: Path) -> dict[str, Pair]:
    """The last round's pairs by id; all of them must be among the samples."""
    previous = {p.id: p for p in read_jsonl(file, Pair)} if file else {}
    absent = sorted(previous.keys() - {s.id for s in samples})
    if absent:
        raise InputError(f"{file}: field 'id': {absent[0]!r} is not among the samples in {folder}")
    return previous


def save_gallery(model: Model, pairs: list[Pair], out: Path) -> None:
    """Real image, winner, loser, with captions and scores: one sheet, and files for the report."""
    rows = []
    labels = []
    for p in pairs:
        codes = torch.tensor([p.image_codes, p.win_image_codes, p.lose_image_codes])
        pictures = to_pil(model.decode_image(codes))
        for name, picture in zip(("real", "win", "lose"), pictures):
            save_picture(picture, out / "images" / f"{p.id}-{name}.png")
        rows.append(pictures)
        labels.append(f"{p.caption}\nwin {p.win_caption_score:.2f}: {p.win_caption}\n"
                      f"lose {p.lose_caption_score:.2f}: {p.lose_caption}\n"
                      f"images: real, win {p.win_image_score:.2f}, lose {p.lose_image_score:.2f}")
    if rows:  # not with --show 0
        save_picture(image_grid(rows, labels, columns=2), out / "pairs.png")


# --------------------------------------------------------------------------------------------- main


def main(args):
    samples, tensors = read_samples(args.samples)
    previous = read_previous(args.previous, samples, args.samples)
    files = [args.samples / "samples.jsonl", args.samples / "samples.safetensors"]
    inputs = {"samples": files, "previous": args.previous, **model_inputs(args)}
    if not prepare_output(args.out, vars(args), "pairs.jsonl", inputs):
        return say(f"{args.out / 'pairs.jsonl'} is complete")
    say(f"scoring {len(samples)} records of {args.samples} with {args.model}")
    model = load_from(args)
    check_samples(model, samples, tensors, args.samples)
    write_questions = None
    if args.question_model:
        write_questions = QuestionWriter(args.question_model, args.qa_model, model.device)
    score_captions = caption_scorer(args.caption_scorer, model.device)
    match = answer_matcher(args.matcher, model.device)

    def score(chunk: list[Sample]) -> list[dict]:
        return score_records(model, chunk, tensors, score_captions, match, write_questions,
                             args.image_scorer == "likelihood", args.reencode, args.max_new_tokens)

    results = map_records(score, samples, args.out, args.batch, "score")
    if results is None:
        return  # the main process writes
    scores = [parse_record(Score, r, f"{args.out}: id {r['id']!r}") for r in results]
    pairs = make_pairs(samples, scores, tensors, previous, match, args.min_image_score)
    write_jsonl(args.out / "scores.jsonl", scores)
    print(f"{len(samples)} records, {len(pairs)} pairs: {args.out}")
    reasons = Counter(s.dropped for s in scores if s.dropped).most_common()
    for reason, count in reasons:
        print(f"  dropped {count:5d}  {reason}")
    if not pairs:
        message = f"no pairs to train on; most records: {reasons[0][0]} (all scores: scores.jsonl)"
        raise InputError(f"{args.out}: {message}")
    save_gallery(model, pairs[: args.show], args.out)
    write_jsonl(args.out / "pairs.jsonl", pairs)  # last: the stage is complete
    shutil.rmtree(args.out / "parts")


if __name__ == "__main__":
    run_main(lambda: main(ARGS))
