"""A byte-level Llama with 0.13 M weights for against_authors.py."""

import itertools
from pathlib import Path

from files.documents import documents
from utils import progress_bar

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

STEPS = 400  # training steps


def make_model(dataset: str, out: Path) -> Path:
    """Train a byte-level Llama on STEPS minibatches of 32 x 128 bytes of the text; save it to
    `out` and return `out`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens = torch.tensor(tokenizer.encode("".join(itertools.islice(documents(dataset), 2000))).ids)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=176,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=STEPS)
    for _ in progress_bar(range(STEPS), desc="training a model", unit="step"):
        batch = torch.stack(
            [tokens[start : start + 128] for start in torch.randint(len(tokens) - 128, (32,))]
        )
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(out)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(out)
    return out
