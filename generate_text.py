"""Have a model generate the text to learn its mask from: what it was trained on, as far as it remembers it.

    python generate_text.py --model MODEL --dtype auto --tokens 100000 --out generated.jsonl
    python train.py --model MODEL --dtype auto --preset fast --dataset generated.jsonl

    python generate_text.py --model MODEL --dtype auto --tokens 100000 --after PASSAGES --out alike.jsonl

Self-generated calibration text: no data is needed. Only --after needs some, a few passages of the kind of text that the
model will meet: each document then goes on from one of them.

Documents begin as the tokenizer begins a text, follow the model's own probabilities, neither sharpened nor cut, and end
where the model ends them or after --sqlen tokens. Writes one JSON object a line, {"text": ...}, as every --dataset is.
"""
import argparse
import json
import math
import random
import sys
import time
from functools import partial
from itertools import islice

from utils import (
    UserError,
    add_model_arguments,
    arguments_of,
    positive_int,
    progress_bar,
    run_script,
    script_parser,
    set_seed,
)

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers import PreTrainedTokenizerBase as Tokenizer

from files.atomic import atomic_write, check_disk, refuse_existing
from files.documents import documents
from models.loading import check_length, input_device, load_model

ATTENTION, TRIED_TOKENS = ("eager", "sdpa"), 8
MOST_PASSAGES = 1000


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    add_model_arguments(parser)
    parser.add_argument("--tokens", type=positive_int, default=100_000, help="to generate, at least")
    parser.add_argument("--sqlen", type=positive_int, default=128, help="tokens in a document, at most")
    parser.add_argument("--batchsize", type=positive_int, default=256, help="documents generated at a time")
    parser.add_argument("--after", metavar="DATASET",
                        help=f"passages, as for train.py --dataset, the first {MOST_PASSAGES}: each document goes on "
                             "from the first --sqlen tokens of one of them, which are left out")
    parser.add_argument("--attention", choices=["auto", *ATTENTION], default="auto",
                        help="auto: what is faster here, tried for a few tokens; another one writes other text")
    parser.add_argument("--out", default="generated_text.jsonl", help="file to write, must be new")
    return parser.parse_args(argv)


def start_of_text(tokenizer: Tokenizer) -> int:
    """The token that a document of this tokenizer begins with or, where it has none, the one that ends the last."""
    first = tokenizer("").input_ids[:1] or [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id)
                                            if token is not None][:1]
    if not first:
        raise UserError("this tokenizer has no token that begins or ends a text, so the model cannot begin one")
    return first[0]


def read_passages(dataset: str, tokenizer: Tokenizer, length: int) -> list[list[int]]:
    """Token ids of the first documents of a dataset, each of up to `length` tokens, without special ones. UserError
    where there are none, and those of `documents`."""
    texts = [text for text in islice(documents(dataset), MOST_PASSAGES) if text]
    if not texts:
        raise UserError(f"--after {dataset} holds no passages: give a text of each kind that is wanted")
    return tokenizer(texts, add_special_tokens=False, truncation=True, max_length=length).input_ids


def contiguous(_head: nn.Module, inputs: tuple) -> tuple:
    """A hook: of the slice that the last tokens of the passages are, PyTorch's product would copy the head's weight for
    each document, which takes gigabytes."""
    return (inputs[0].contiguous(),)


class Draw(LogitsProcessor):
    """Draws the next token and leaves no other: one uniform number a document, where generate's own sampling makes one
    for each word of the vocabulary, which takes a CPU half of the time."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        reached = scores.float().softmax(-1).cumsum(-1)
        wanted = torch.rand(len(scores), 1, device=scores.device) * reached[:, -1:]
        chosen = torch.searchsorted(reached, wanted, right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -math.inf).scatter_(1, chosen, 0.0)


@torch.no_grad()
def generate(model: nn.Module, tokenizer: Tokenizer, count: int, length: int,
             passages: list[list[int]] | None = None) -> list[list[int]]:
    """Token ids of so many documents, each of up to `length` tokens, the first one and the end of text left out; and
    the passage, where each goes on from one of these, drawn for it."""
    start, own = start_of_text(tokenizer), model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    pad = start if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    greedy = GenerationConfig(do_sample=False, max_new_tokens=length, eos_token_id=sorted(ends) or None,
                              pad_token_id=pad)
    chosen = random.choices(passages, k=count) if passages else [[]] * count
    begun = [torch.tensor([start, *passage]) for passage in chosen]
    in_front = partial(nn.utils.rnn.pad_sequence, batch_first=True, padding_side="left")  # so all go on at one place
    tokens = in_front(begun, padding_value=pad).to(input_device(model))
    is_text = in_front([torch.ones_like(row) for row in begun]).to(tokens.device)
    model.generation_config = GenerationConfig(eos_token_id=own)  # the rest of its own may penalise what repeats
    written = model.generate(tokens, attention_mask=is_text, generation_config=greedy,
                             logits_processor=LogitsProcessorList([Draw()]))[:, tokens.shape[1]:].tolist()
    return [row[:next((i for i, token in enumerate(row) if token in ends), length)] for row in written]


def choose_attention(model: nn.Module, tokenizer: Tokenizer, count: int) -> str:
    """Have the model use the attention that is faster here, for one query at a time: on some processors that is not the
    fused kernel. Its name; the random numbers to come are as if nothing had been tried."""
    if not hasattr(model, "set_attn_implementation"):  # transformers before 4.56
        return "the model's"
    seconds = {}
    with torch.random.fork_rng():
        for name in (*ATTENTION, *ATTENTION):  # the first round only warms up
            model.set_attn_implementation(name)
            started = time.perf_counter()
            generate(model, tokenizer, count, TRIED_TOKENS)
            seconds[name] = time.perf_counter() - started
    best = min(seconds, key=seconds.get)
    model.set_attn_implementation(best)
    return best


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.sqlen < 2:
        raise UserError(f"--sqlen is {args.sqlen}: it must be at least 2 tokens, the first one is given")
    out = refuse_existing(args.out, "choose another --out or remove it")
    check_disk(out.parent, 8 * args.tokens)
    set_seed(args.seed)
    model, tokenizer = load_model(**arguments_of(load_model, args))
    model.get_output_embeddings().register_forward_pre_hook(contiguous)
    passages = read_passages(args.after, tokenizer, args.sqlen) if args.after else []
    check_length(model, args.sqlen, "--sqlen", before=max(map(len, passages), default=0))
    if args.attention == "auto":
        args.attention = choose_attention(model, tokenizer, args.batchsize)
        print(f"attention: {args.attention}", file=sys.stderr)
    elif hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation(args.attention)
    else:
        raise UserError("--attention needs transformers 4.56 or later; install it, or leave --attention out")
    texts, found = [], 0
    with progress_bar(total=args.tokens, desc="generating", unit="token") as progress:
        while found < args.tokens:
            written = [row for row in generate(model, tokenizer, args.batchsize, args.sqlen - 1, passages) if row]
            if not written:
                raise UserError("the model ends every text at once, so it writes none")
            texts += tokenizer.batch_decode(written)
            found += sum(map(len, written))
            progress.update(sum(map(len, written)))
    with atomic_write(out) as beside:
        beside.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    print(f"{len(texts)} documents, {found} tokens -> {out}")


if __name__ == "__main__":
    run_script(main)
