"""Texts and a tokenizer whose counts are plain to see, for the tests of what text becomes."""
import json

import transformers


def read(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


class Words:
    """A tokenizer whose counts are plain to see: a token a word, its length in letters, between 0 and 1."""
    bos_token_id = None  # 0 comes first and yet is no beginning-of-text token

    def __call__(self, text, verbose=True):
        return transformers.BatchEncoding({"input_ids": [0, *map(len, text.split()), 1]})
