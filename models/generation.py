"""Text that a model generates itself, to learn its mask from: what it was trained on, as far as it
remembers it.

Documents begin as the tokenizer begins a text, follow the model's own probabilities, neither
sharpened nor cut, and end where the model ends them or after so many tokens. With passages each
goes on from one of them, which is left out.
"""

import json
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path

from files.atomic import atomic_write, sync
from files.documents import documents
from files.records import read_lines, short_hash
from models import processes
from models.loading import Tokenizer, check_length, input_device, model_fingerprint, positions
from models.machine import set_seed
from utils import UserError, is_out_of_memory, progress_bar

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList

MOST_PASSAGES = 1000
APART = 1_000_003  # between the seeds of two texts: more documents than a text has
MOST_EMPTY = 64  # documents in a row, before a model is said to write none


def start_of_text(tokenizer: Tokenizer) -> int:
    """The token that a document of this tokenizer begins with or, where it has none, the one that
    ends the last."""
    first = tokenizer("").input_ids[:1]
    if first and first == tokenizer("a").input_ids[:1]:  # else it is put behind a text
        return first[0]
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise UserError(
        "this tokenizer has no token that begins or ends a text, so the model cannot begin one: "
        "give sparsify.py text by --dataset"
    )


def read_passages(
    dataset: str, model: nn.Module, tokenizer: Tokenizer, length: int
) -> list[list[int]]:
    """Token ids of the first MOST_PASSAGES documents of a dataset, each of up to `length` tokens,
    without special ones. UserError where there are none, where model has no positions for a
    document behind one, and those of `documents`."""
    texts = [text for text in islice(documents(dataset), MOST_PASSAGES) if text.strip()]
    if not texts:
        raise UserError(
            f"--after {dataset} holds no passages: give a text of each kind that is wanted"
        )
    passages = tokenizer(
        texts, add_special_tokens=False, truncation=True, max_length=length
    ).input_ids
    lengths = set(map(len, passages))
    check_length(model, length, before=max(lengths))
    if len(lengths) > 1 and any(isinstance(module, nn.Conv1d) for module in model.modules()):
        raise UserError(
            "the padding before shorter passages leaks through this model's convolutions (Mamba): "
            f"give --after passages of at least {length} tokens each, which are cut to that length"
        )
    return passages


class Draw(LogitsProcessor):
    """Draws the next token and leaves no other: one uniform number a document, where generate's own
    sampling makes one for each word of the vocabulary, which takes a CPU half of the time.
    UserError for predictions that are not finite, of which it would draw the last word."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        reached = scores.float().softmax(-1).cumsum(-1)
        if not reached[:, -1].isfinite().all():
            raise UserError(
                "the model's predictions are not finite; its dtype may overflow: try --dtype "
                "bfloat16 or float32"
            )
        wanted = torch.rand(len(scores), 1, device=scores.device) * reached[:, -1:]
        chosen = torch.searchsorted(reached, wanted, right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -math.inf).scatter_(1, chosen, 0.0)


@contextmanager
def plain_settings(model: nn.Module) -> Iterator[None]:
    """Inside, of the model's own settings of generation only its ends of a text count: others may
    sample, or penalise what repeats."""
    settings = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=settings.eos_token_id)
    try:
        yield
    finally:
        model.generation_config = settings


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    count: int,
    length: int,
    passages: list[list[int]] | None = None,
) -> list[list[int]]:
    """Token ids of so many documents, each of up to `length` tokens, without the first token and
    the end of text. With passages each document continues one of them, drawn at random, which is
    left out."""
    start = start_of_text(tokenizer)
    own = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    pad = start if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=length, eos_token_id=sorted(ends) or None, pad_token_id=pad
    )
    begun = passages or [[]]
    used, chosen = torch.tensor(random.choices(range(len(begun)), k=count)).unique(
        return_inverse=True
    )
    begun = [torch.tensor([start, *begun[number]]) for number in used]
    # so all go on at one place
    in_front = partial(nn.utils.rnn.pad_sequence, batch_first=True, padding_side="left")
    tokens = in_front(begun, padding_value=pad).to(input_device(model))
    is_text = in_front([torch.ones_like(row) for row in begun]).to(tokens.device)
    # of the slice that the last tokens of passages are, PyTorch's product would copy the head's
    # weight for each
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, inputs: (inputs[0].contiguous(),)
    )
    try:
        with plain_settings(model):
            cache = _read(model, tokens[:, :-1], is_text[:, :-1], pad, chosen) if passages else {}
            written = model.generate(
                tokens[chosen],
                attention_mask=is_text[chosen],
                generation_config=greedy,
                **cache,
                logits_processor=LogitsProcessorList([Draw()]),
            )[:, tokens.shape[1] :].tolist()
    finally:
        hook.remove()
    return [
        row[: next((i for i, token in enumerate(row) if token in ends), length)] for row in written
    ]


def _read(
    model: nn.Module, tokens: Tensor, is_text: Tensor, pad: int, chosen: Tensor
) -> dict[str, object]:
    """The keys and values of these tokens, `[passages, length]`, as generate takes them, of the
    `chosen` row for each document: a passage is read once, however many documents go on from it.
    Empty for a model with a cache of its own.
    """
    once = GenerationConfig(
        do_sample=False,
        max_new_tokens=1,
        pad_token_id=pad,
        return_dict_in_generate=True,
        return_legacy_cache=False,
    )
    found = model.generate(tokens, attention_mask=is_text, generation_config=once)
    name = "cache" if hasattr(found, "cache") else "past_key_values"  # older transformers
    cache = getattr(found, name)
    if not isinstance(cache, DynamicCache):
        return {}
    cache.reorder_cache(chosen.to(tokens.device))
    return {name: cache}


@torch.no_grad()
def continuation(model: nn.Module, tokenizer: Tokenizer, prompt: Tensor, length: int) -> str:
    """What the model finds most likely to follow, on one line, of up to `length` tokens, as far as
    it has positions. prompt: int64 `[tokens]`."""
    length = int(min(length, positions(model) - len(prompt)))
    if length < 1:
        return ""
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=length,
        eos_token_id=tokenizer.eos_token_id,
        # of one text nothing is padded
        pad_token_id=tokenizer.eos_token_id or 0,
    )
    tokens = prompt[None].to(input_device(model))
    with plain_settings(model):
        written = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), generation_config=greedy
        )
    return " ".join(tokenizer.decode(written[0, len(prompt) :], skip_special_tokens=True).split())


def write_text(
    path: str | Path,
    model: nn.Module,
    tokenizer: Tokenizer,
    tokens: int,
    length: int,
    batchsize: int,
    passages: list[list[int]] | None = None,
    seed: int = 0,
) -> tuple[int, int]:
    """Generate documents until there are so many tokens, into a new .jsonl file, {"text": ...,
    "tokens": ...} a line. Returns the numbers of documents and of tokens. batchsize: documents at a
    time, fewer where a GPU's memory is full. After each of these all are in a file part_of_...,
    whose name has a hash of what decides the text; from there it goes on, to the same text.
    """
    path = Path(path)
    decides = dict(length=length, batchsize=batchsize, passages=passages, seed=seed)
    decides = {"model": model_fingerprint(model), "dtype": str(model.dtype), **decides}
    part = path.with_name(f"part_of_{path.stem}_{short_hash(decides)}{path.suffix}")
    rows = read_lines(part) if part.exists() else []
    found = sum(row["tokens"] for row in rows)
    empty = 0
    if rows:
        processes.log(
            f"going on from the {len(rows)} documents of {part}; to begin anew, remove it"
        )
    with progress_bar(total=tokens, initial=found, desc="generating", unit="token") as bar:
        while found < tokens:
            # what was empty is drawn anew
            set_seed((APART * (seed + 1000 * empty) + len(rows)) % 2**63)
            count = max(1, min(batchsize, math.ceil((tokens - found) / (length - 1))))
            try:
                written = generate(model, tokenizer, count, length - 1, passages)
            except Exception as error:
                # of keys and values of so many documents
                if count == 1 or not is_out_of_memory(error):
                    raise
                batchsize = count // 2
                continue
            torch.cuda.empty_cache()  # keys and values of every length were in it
            written = [row for row in written if row]
            empty = 0 if written else empty + count
            if empty >= MOST_EMPTY:
                raise UserError("the model ends every text at once, so it writes none")
            # as they were written
            texts = tokenizer.batch_decode(written, clean_up_tokenization_spaces=False)
            rows += [{"text": text, "tokens": len(row)} for text, row in zip(texts, written)]
            found += sum(map(len, written))
            bar.update(sum(map(len, written)))
            with atomic_write(part) as tmp:
                tmp.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    part.replace(path)
    sync(path.parent)
    return len(rows), found
