"""Text that a model generates itself, to learn its mask from. It stands in for the training text,
as far as the model remembers it.

A document begins with the tokenizer's first token and is sampled from the model's probabilities at
temperature 1, without top-k or top-p. It ends at an end-of-text token or at the maximum length. If
passages are given, each document continues one of them; the passage itself is left out.
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
APART = 1_000_003  # distance between the seeds of two texts; a text has fewer documents
MOST_EMPTY = 64  # empty documents in a row before generation gives up


def start_of_text(tokenizer: Tokenizer) -> int:
    """Return the token that documents begin with: the tokenizer's own, or else its end-of-text
    token, which ends the document before. Raises UserError if it has neither."""
    first = tokenizer("").input_ids[:1]
    if first and first == tokenizer("a").input_ids[:1]:  # otherwise the token ends texts
        return first[0]
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise UserError(
        "this tokenizer has no token that begins or ends a text, so the model cannot start one: "
        "give sparsify.py text with --dataset"
    )


def read_passages(
    dataset: str, model: nn.Module, tokenizer: Tokenizer, length: int
) -> list[list[int]]:
    """Return the token ids of a dataset's first MOST_PASSAGES documents, each cut to `length`
    tokens, without special tokens. Raises UserError if there are none or if a passage and its
    document exceed the model's positions, and the errors of `documents`."""
    texts = [text for text in islice(documents(dataset), MOST_PASSAGES) if text.strip()]
    if not texts:
        raise UserError(
            f"--after {dataset} holds no passages: give texts of the kinds that you want"
        )
    passages = tokenizer(
        texts, add_special_tokens=False, truncation=True, max_length=length
    ).input_ids
    lengths = set(map(len, passages))
    check_length(model, length, before=max(lengths))
    if len(lengths) > 1 and any(isinstance(module, nn.Conv1d) for module in model.modules()):
        raise UserError(
            "the padding before shorter passages leaks through this model's convolutions (Mamba): "
            f"give --after passages of at least {length} tokens each; they are cut to that length"
        )
    return passages


class Draw(LogitsProcessor):
    """Draws the next token and rules out all others, so that greedy search picks it.

    It takes one uniform number per document. The sampling of `generate` takes one per vocabulary
    entry, which is half of the time on a CPU. Raises UserError if predictions are not finite; it
    would otherwise draw the last vocabulary entry.
    """

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cumulative = scores.float().softmax(-1).cumsum(-1)
        if not cumulative[:, -1].isfinite().all():
            raise UserError(
                "the model's predictions are not finite; its dtype may overflow: try --dtype "
                "bfloat16 or float32"
            )
        thresholds = torch.rand(len(scores), 1, device=scores.device) * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, thresholds, right=True)
        drawn = drawn.clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -math.inf).scatter_(1, drawn, 0.0)


@contextmanager
def plain_settings(model: nn.Module) -> Iterator[None]:
    """Keep only the end-of-text tokens of the model's generation settings inside the block. Its
    other settings may turn on sampling or penalise repetition."""
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
    """Return the token ids of `count` documents, each of up to `length` tokens, without the first
    token and the end-of-text token. With passages, each document continues one drawn at random,
    which is left out."""
    first_token = start_of_text(tokenizer)
    eos = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    pad = first_token if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=length, eos_token_id=sorted(ends) or None, pad_token_id=pad
    )
    prompts = passages or [[]]
    distinct, chosen = torch.tensor(random.choices(range(len(prompts)), k=count)).unique(
        return_inverse=True
    )
    prompts = [torch.tensor([first_token, *prompts[number]]) for number in distinct]
    # left padding, so that all documents continue at the same position
    pad_left = partial(nn.utils.rnn.pad_sequence, batch_first=True, padding_side="left")
    tokens = pad_left(prompts, padding_value=pad).to(input_device(model))
    is_text = pad_left([torch.ones_like(row) for row in prompts]).to(tokens.device)
    # the head's input is a slice, the last token of each passage; unless it is contiguous, PyTorch
    # copies the head's weight for each
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, inputs: (inputs[0].contiguous(),)
    )
    try:
        with plain_settings(model):
            cache = _read(model, tokens[:, :-1], is_text[:, :-1], pad, chosen) if passages else {}
            generated = model.generate(
                tokens[chosen],
                attention_mask=is_text[chosen],
                generation_config=greedy,
                **cache,
                logits_processor=LogitsProcessorList([Draw()]),
            )[:, tokens.shape[1] :].tolist()
    finally:
        hook.remove()
    return [
        row[: next((i for i, token in enumerate(row) if token in ends), length)]
        for row in generated
    ]


def _read(
    model: nn.Module, tokens: Tensor, is_text: Tensor, pad: int, chosen: Tensor
) -> dict[str, object]:
    """Return the keys and values of the passages `tokens`, `[passages, length]`, as keyword
    arguments of `generate`, with row `chosen[i]` for document i. So each passage is read once,
    however many documents continue it. Returns {} if the model has its own kind of cache.
    """
    prefill = GenerationConfig(
        do_sample=False,
        max_new_tokens=1,
        pad_token_id=pad,
        return_dict_in_generate=True,
        return_legacy_cache=False,
    )
    output = model.generate(tokens, attention_mask=is_text, generation_config=prefill)
    name = "cache" if hasattr(output, "cache") else "past_key_values"  # older transformers
    cache = getattr(output, name)
    if not isinstance(cache, DynamicCache):
        return {}
    cache.reorder_cache(chosen.to(tokens.device))
    return {name: cache}


@torch.no_grad()
def continuation(model: nn.Module, tokenizer: Tokenizer, prompt: Tensor, length: int) -> str:
    """Return the model's greedy continuation of a prompt, on one line: up to `length` tokens, fewer
    if its positions run out. prompt: int64 `[tokens]`."""
    length = int(min(length, positions(model) - len(prompt)))
    if length < 1:
        return ""
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=length,
        eos_token_id=tokenizer.eos_token_id,
        # unused: a single text needs no padding
        pad_token_id=tokenizer.eos_token_id or 0,
    )
    tokens = prompt[None].to(input_device(model))
    with plain_settings(model):
        generated = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), generation_config=greedy
        )
    return " ".join(tokenizer.decode(generated[0, len(prompt) :], skip_special_tokens=True).split())


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
    """Generate documents of at least `tokens` tokens in all into a new .jsonl file, one
    {"text": ..., "tokens": ...} per line. Return the numbers of documents and tokens.

    batchsize: documents generated at once, halved when memory is full. Every batch is saved to a
    file part_of_..., whose name has a hash of all that decides the text. A call after an
    interruption resumes from this file and writes the same text.
    """
    path = Path(path)
    settings = dict(length=length, batchsize=batchsize, passages=passages, seed=seed)
    settings = {"model": model_fingerprint(model), "dtype": str(model.dtype), **settings}
    part = path.with_name(f"part_of_{path.stem}_{short_hash(settings)}{path.suffix}")
    rows = read_lines(part) if part.exists() else []
    tokens_done = sum(row["tokens"] for row in rows)
    empty_documents = 0
    if rows:
        processes.log(
            f"resuming from the {len(rows)} documents of {part}; remove it to start again"
        )
    with progress_bar(total=tokens, initial=tokens_done, desc="generating", unit="token") as bar:
        while tokens_done < tokens:
            # a batch of empty documents is drawn again with another seed
            set_seed((APART * (seed + 1000 * empty_documents) + len(rows)) % 2**63)
            count = max(1, min(batchsize, math.ceil((tokens - tokens_done) / (length - 1))))
            try:
                generated = generate(model, tokenizer, count, length - 1, passages)
            except Exception as error:
                # memory may be full of the keys and values of so many documents
                if count == 1 or not is_out_of_memory(error):
                    raise
                batchsize = count // 2
                continue
            torch.cuda.empty_cache()  # it holds keys and values of every length
            generated = [row for row in generated if row]
            empty_documents = 0 if generated else empty_documents + count
            if empty_documents >= MOST_EMPTY:
                raise UserError("the model ends every text at once, so it generates none")
            # spaces are kept as generated
            texts = tokenizer.batch_decode(generated, clean_up_tokenization_spaces=False)
            rows += [{"text": text, "tokens": len(row)} for text, row in zip(texts, generated)]
            tokens_done += sum(map(len, generated))
            bar.update(sum(map(len, generated)))
            with atomic_write(part) as tmp:
                tmp.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    part.replace(path)
    sync(path.parent)
    return len(rows), tokens_done
