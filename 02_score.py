"""Stage 2, scoring: the policy judges its captions and images; best and worst become pairs.

reads   samples.jsonl of stage 1 with its shards, a checkpoint, the last round's pairs
writes  OUT/scores.jsonl   every score, every answer, and why a record gives no pair
        OUT/pairs.jsonl    (x, y, y_w, y_l, x_w, x_l) with scores, as flat JSON lines that
                           datasets.load_dataset("json", …) takes; the tokens to train on are in
        OUT/pairs-00000.safetensors, …
        OUT/pairs.png, OUT/images   the first pairs, for people

    python 02_score.py --samples runs/try/samples --out runs/try/pairs

The defaults need no download. The paper's are --caption-scorer google-bert/bert-large-uncased
--matcher sentence-transformers/all-mpnet-base-v2. Questions come with the samples: for records
without, hermesflow/questions.py writes them once, before stage 1.
"""

from pathlib import Path

from hermesflow.jsonl import lines_of
from hermesflow.options import (COUNT, add_dry_run, add_model_options, folder, integer,
                                model_inputs, number, stage_parser, unless_dry_run)
from hermesflow.outputs import Output, exit_if_complete, finish, run_main


def parse_args(argv=None):
    parser = stage_parser(__doc__)
    add = parser.add_argument_group("input and output").add_argument
    add("--samples", type=Path, required=True, help="output folder of 01_sample.py")
    add("--out", type=folder, required=True, help="output folder")
    add("--overwrite", action="store_true", help="empty OUT first")
    add("--show", type=integer(0), default=8, help="pairs in the gallery")
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
    add("--max-new-tokens", type=COUNT, default=20, help="per answer")
    add = parser.add_argument_group("pairs").add_argument
    add("--previous", type=Path, help="pairs.jsonl of the last round, for Eq. 9–10; joined by id")
    add("--min-image-score", type=number(-1, 1), default=0.6,
        help="the best image must be above it")
    add = parser.add_argument_group("run").add_argument
    add("--batch", type=COUNT, default=1, help="records at a time; does not change results")
    add_dry_run(parser)
    args = parser.parse_args(argv)
    return unless_dry_run(args, caption_scorer=args.caption_scorer, matcher=args.matcher,
                          **model_inputs(args))


def output_of(args) -> Output:
    """What decides the scores; pairs are made from them again in seconds."""
    inputs = {"samples": lambda: lines_of(args.samples / "samples.jsonl"),
              "caption_scorer": None if args.caption_scorer == "token-f1" else args.caption_scorer,
              "matcher": None if args.matcher == "text" else args.matcher}
    return Output(args.out, "02_score", "pairs.jsonl",
                  writes=("scores.jsonl", "pairs.jsonl", "pairs.png", "images"), args=vars(args),
                  inputs=inputs | model_inputs(args), made_from={"previous": args.previous},
                  derived=("show", "min_image_score"), free=("device", "batch"), code=(__file__,))


# before the heavy imports, so that --help, a mistake and a complete output are answered at once
if __name__ == "__main__":
    ARGS = parse_args()
    run_main(lambda: exit_if_complete(output_of(ARGS)))

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from itertools import islice
from typing import NamedTuple

import torch

from hermesflow.files import InputError
from hermesflow.jsonl import Lines, read_jsonl, require_among, write_jsonl
from hermesflow.pictures import save_pair_gallery
from hermesflow.records import Pair, Sample, Score, about, parse_record
from hermesflow.runs import Earlier, map_records, prepare_output, say
from hermesflow.scoring import (answer_matcher, answer_questions, are_right, caption_likelihood,
                                caption_scorer, meanings, reencode)
from hermesflow.tables import (check_pairs, check_samples, sample_tensors, tensors_of,
                               write_table)
from model import Model, load_from

# ------------------------------------------------------------------------------------------- scores


@torch.inference_mode()
def score_records(model: Model, samples: list[Sample], score_captions, match, by_likelihood: bool,
                  reencoded: bool, max_new_tokens: int) -> list[Score]:
    """The scores of some records; those without questions have none of images, but likelihoods."""
    images = [sample_tensors(s)["images"] for s in samples]  # (K, N) each
    counts = list(map(len, images))
    images = torch.cat(images).to(model.device)  # (S·K, N)
    if reencoded:
        images = reencode(model, images)
    if by_likelihood:
        captions = [s.caption for s, K in zip(samples, counts) for _ in range(K)]
        likelihoods = iter(caption_likelihood(model, images, captions))
    else:
        asked = [s.questions for s, K in zip(samples, counts) for _ in range(K)]
        answers = iter(answer_questions(model, images, asked, max_new_tokens))

    scores = []
    for s, K in zip(samples, counts):
        asked = s.questions
        score = Score(s.id, asked, [], [], [], [])
        with about(f"id {s.id!r}"):
            score.caption_scores = score_captions(s.captions, s.caption)
            if by_likelihood:
                score.image_scores = list(islice(likelihoods, K))
            else:
                score.answers = list(islice(answers, K))
                # Acc(x): the share of questions that are answered right
                score.matched = [meanings(a, asked, match) for a in score.answers if asked]
                for choices in score.matched:
                    score.image_scores.append(sum(are_right(choices, asked)) / len(asked))
            if not all(map(math.isfinite, [*score.caption_scores, *score.image_scores])):
                raise InputError("a score is NaN or infinite")
        scores.append(score)
    return scores


# ----------------------------------------------------------------------------------------- curation


class Candidate(NamedTuple):
    """A caption or an image of the policy, with its score."""

    score: float
    tokens: torch.Tensor  # caption token ids (L,), or image codes (N,)
    text: str = ""  # of a caption; of an image: the questions answered wrong, one a line
    ended: bool = True  # of a caption: with <|eot|>


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


def curate(sample: Sample, captions: list[Candidate], images: list[Candidate], previous,
           min_image_score: float) -> tuple[Pair, dict] | str:
    """The record's preference pair with the tokens to train on, or why it gives none.

    previous: (win, lose) captions and (win, lose) images of the last round, or None.
    """
    old_captions, old_images = previous or (None, None)
    win, lose = self_play(*best_and_worst(captions), old_captions)
    win_image, lose_image = self_play(*best_and_worst(images), old_images)

    # the filters: winners must be better, and a winning image mostly right
    if win.score <= lose.score:
        return "captions: best is not better than worst"
    if win_image.score <= min_image_score:
        return f"images: best score is not above {min_image_score}"
    if win_image.score <= lose_image.score:
        return "images: best is not better than worst"
    pair = Pair(sample.id, sample.image, sample.caption, sample.prompt, win.text, lose.text,
                win.score, lose.score, win_image.score, lose_image.score, win_image.text,
                lose_image.text, win.ended, lose.ended)
    return pair, {"win_caption": win.tokens, "lose_caption": lose.tokens,
                  "win_image": win_image.tokens, "lose_image": lose_image.tokens}


def candidates_of_pair(p: Pair) -> tuple[tuple[Candidate, Candidate], tuple[Candidate, Candidate]]:
    """(win, lose) captions and (win, lose) images of the last round."""
    tensors = tensors_of(p)
    captions = (
        Candidate(p.win_caption_score, tensors["win_caption"], p.win_caption, p.win_ended),
        Candidate(p.lose_caption_score, tensors["lose_caption"], p.lose_caption, p.lose_ended))
    images = (Candidate(p.win_image_score, tensors["win_image"], p.win_image_wrong),
              Candidate(p.lose_image_score, tensors["lose_image"], p.lose_image_wrong))
    return captions, images


def candidates_of_sample(sample: Sample, score: Score,
                         tensors: dict) -> tuple[list[Candidate], list[Candidate]]:
    """The n captions and the K images of a record."""
    captions = []
    for k, ids in enumerate(tensors["captions"]):  # (L,), padded with -1
        captions.append(Candidate(score.caption_scores[k], ids[ids >= 0], sample.captions[k],
                                  sample.ended[k]))
    images = []
    for k, codes in enumerate(tensors["images"]):  # (N,)
        wrong = []
        if score.matched:
            meant = zip(score.questions, score.matched[k])
            wrong = [q.question for q, choice in meant if choice != q.answer]
        images.append(Candidate(score.image_scores[k], codes, "\n".join(wrong)))
    return captions, images


def make_pairs(samples: Lines, scores: Iterable[Score], previous: Lines | None,
               min_image_score: float, dropped: dict[str, str]) -> Iterator[tuple[Pair, dict]]:
    """The pairs of all records that give one, with tensors; dropped[id]: why others do not."""
    places = {id: i for i, id in enumerate(previous.ids)} if previous else {}
    for sample, score in zip(samples, scores):
        if not score.image_scores:
            dropped[sample.id] = "no questions"
            continue
        tensors = sample_tensors(sample)
        captions, images = candidates_of_sample(sample, score, tensors)
        place = places.get(sample.id)
        old = None if place is None else candidates_of_pair(previous[place])
        curated = curate(sample, captions, images, old, min_image_score)
        if isinstance(curated, str):
            dropped[sample.id] = curated
        else:
            yield curated[0], {"image": tensors["image"], **curated[1]}


# --------------------------------------------------------------------------------------------- main


def main(args):
    samples = read_jsonl(args.samples / "samples.jsonl", Sample)
    previous = read_jsonl(args.previous, Pair) if args.previous else None
    if previous:
        require_among(previous, samples)
    by_likelihood = args.image_scorer == "likelihood"
    if not by_likelihood and not any(s.questions for s in samples):
        raise InputError(f"{args.samples}: no record has questions: `python -m "
                         "hermesflow.questions` writes them, 01_sample.py --questions adds them "
                         "to these samples, and --image-scorer likelihood needs none")
    output = output_of(args)
    if not prepare_output(output):
        return
    say(f"scoring {len(samples)} records of {args.samples} with {args.model}")
    model = load_from(args)
    check_samples(model, samples)
    if previous:
        check_pairs(model, previous)
    score_captions = caption_scorer(args.caption_scorer, model.device)
    match = answer_matcher(args.matcher, model.device)

    def score(chunk: list[Sample]) -> list[dict]:
        return list(map(asdict, score_records(
            model, chunk, score_captions, match, by_likelihood, args.reencode,
            args.max_new_tokens)))

    file = args.out / "scores.jsonl"
    results = map_records(score, samples, args.out, args.batch, "score",
                          earlier=Earlier(file, Score, asdict))
    if results is None:
        return  # the main process writes

    def scores() -> Iterator[Score]:
        for result in results:
            yield parse_record(Score, result, f"{args.out}: id {result['id']!r}")

    def pairs() -> Iterator[tuple[Pair, dict]]:
        return make_pairs(samples, scores(), previous, args.min_image_score, dropped)

    dropped = {}
    count = sum(1 for _ in pairs())
    write_jsonl(file, (replace(s, dropped=dropped.get(s.id, "")) for s in scores()))
    print(f"{len(samples)} records, {count} pairs: {args.out}")
    cut = sum(s.ended.count(False) for s in samples)
    if cut:
        print(f"  {cut} captions were cut at --max-new-tokens; they are trained on without <|eot|>")
    reasons = Counter(dropped.values()).most_common()
    for reason, records in reasons:
        print(f"  dropped {records:5d}  {reason}")
    if not count:
        message = f"no pairs to train on; most records: {reasons[0][0]} (all scores: scores.jsonl)"
        raise InputError(f"{args.out}: {message}")
    save_pair_gallery(model, islice(pairs(), args.show), args.out)
    write_table(args.out / "pairs.jsonl", pairs())  # last: the stage is complete
    finish(output)


if __name__ == "__main__":
    run_main(lambda: main(ARGS))
