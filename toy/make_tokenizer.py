"""Write toy/tokenizer: one token per word of the toy world, in the files AutoTokenizer reads.

The ten special tokens of Show-o are not in it: model.py puts them behind the last word, as it does with Phi-1.5's.

    python toy/make_tokenizer.py
"""
import argparse
import os

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from world import vocabulary


def build():
    """Word-level tokenizer: lower case, words only, no punctuation; decoding joins words with one space."""
    words = ["<|endoftext|>", "<|unk|>", *vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|unk|>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+"), behavior="removed", invert=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>",
                                   unk_token="<|unk|>", clean_up_tokenization_spaces=False)


if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=os.path.join(here, "tokenizer"))
    args = parser.parse_args()
    made = build()
    made.save_pretrained(args.out)
    print(f"{len(made)} tokens -> {args.out}")
