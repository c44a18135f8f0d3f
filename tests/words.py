"""Texts and a tokenizer whose counts are plain to see, for the tests of what text becomes."""

import json
import random

import torch
import transformers


def read(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


class Words:
    """A tokenizer whose counts are plain to see: a token a word, its length in letters, between 0
    and 1."""

    bos_token_id = None  # 0 comes first and yet is no beginning-of-text token

    def __call__(self, text, verbose=True, add_special_tokens=True):
        return transformers.BatchEncoding({"input_ids": [0, *map(len, text.split()), 1]})


def get_c4(tokenizer, texts, nsamples, seqlen, seed):
    """As published with SparseGPT and Wanda, on the global random module."""
    random.seed(seed)
    samples = []
    for _ in range(nsamples):
        while True:
            i = random.randint(0, len(texts) - 1)
            ids = torch.tensor([tokenizer(texts[i]).input_ids])
            if ids.shape[1] > seqlen:
                break
        i = random.randint(0, ids.shape[1] - seqlen - 1)
        samples.append(ids[:, i : i + seqlen])
    return torch.cat(samples)
