"""Multiple-choice questions by letter: how they are asked, and which letter an answer means.

MMBench and SEED-Bench share this. MMMU has a rule of its own (mmmu.py): there the last of several
letters counts, and a random one where there is none.
"""

# LLaVA's wording, for MMBench and SEED-Bench
LETTER_ANSWER = "\nAnswer with the option's letter from the given choices directly."

PUNCTUATION = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
NEAR_THE_END = 5  # words
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def letter_prompt(question: str, options: dict[str, str]) -> str:
    """The question, one line an option, and the wording."""
    lines = [question] + [f"{letter}. {text}" for letter, text in options.items()]
    return "\n".join(lines) + LETTER_ANSWER


def parse_letter(answer: str, options: dict[str, str]) -> str | None:
    """VLMEvalKit's exact matching (matching_util.py): the letter that an answer means, or None.

    A letter is a word by itself, punctuation aside. It counts if no other option's letter is there
    and it is among the last words; else the only option whose text is in the answer, unless the
    answer is more than twice as long as all options together. "Z" and refusals choose nothing.
    """
    if any(refusal in answer for refusal in REFUSALS):
        return None
    words = answer.translate(PUNCTUATION).split()
    letters = [letter for letter in options if letter in words]
    if not letters and "Z" in words:
        return None
    if len(letters) == 1 and words.index(letters[0]) > len(words) - NEAR_THE_END:
        return letters[0]
    if len(answer) > 2 * sum(map(len, options.values())):
        return None
    named = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return named[0] if len(named) == 1 else None
