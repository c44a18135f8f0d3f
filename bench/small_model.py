"""Trains the small model of the benches: a byte-level Llama with 0.87 M weights, trained on the
demo's text.

    python bench/small_model.py [--quick] [--out demo/small]

The repository has it already, in reproduce/small_model, so that all machines use the same weights;
this script documents how it was made. Rounding differs between machines and numbers of threads, and
so do the weights. It needs the demo's text, which `make demo DEMO_FLAGS=--quick` leaves in demo/.
It saves bfloat16 weights, and made.json with the command and the losses next to them. It takes a
few minutes on 2 cores.
"""

import argparse
import hashlib
import json
from pathlib import Path

import common
from files.atomic import atomic_write, refuse_existing
from models.loss import batch_loss
from utils import UserError, progress_bar, run_script

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

# the text for training, pruning and learning masks, and the text for evaluation
TEXT = "demo/train.jsonl"
HELDOUT = "demo/heldout.txt"
MODEL = "reproduce/small_model"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--out", default="demo/small", help="folder of the model, must be new")
    parser.add_argument("--steps", type=int, default=1200, help="training steps of 32 x 128 bytes")
    return parser.parse_args(argv)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte, 256 in all, and no special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def read_text(tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Return the tokens of the demo's text, int64 `[tokens]`: the training text, and 300,000
    characters of held-out text."""
    if not Path(TEXT).exists():
        raise UserError(f"{TEXT} is missing; run `make demo DEMO_FLAGS=--quick` first")

    def tokens_of(string: str) -> Tensor:
        return torch.tensor(tokenizer(string, verbose=False).input_ids)

    with open(TEXT, encoding="utf-8") as file:
        passages = [json.loads(line)["text"] for line in file]
    train = torch.cat([tokens_of(passage) for passage in passages])
    return train, tokens_of(Path(HELDOUT).read_text(encoding="utf-8")[:300_000])


def train(tokens: Tensor, steps: int, seed: int, device: str) -> tuple[LlamaForCausalLM, float]:
    """Train a model on windows of these tokens, int64 `[tokens]`; return it and the last
    minibatch's loss, in nats per byte."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 3e-3, total_steps=steps, pct_start=0.05
    )
    progress = progress_bar(range(steps), desc="training", unit="step")
    for _ in progress:
        starts = torch.randint(len(tokens) - 128, (32,))
        batch = torch.stack([tokens[start : start + 128] for start in starts]).to(device)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    return model.eval(), loss.item()


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    steps = 50 if args.quick else args.steps
    out = refuse_existing(args.out, "choose another --out or remove it")
    tokenizer = byte_tokenizer()
    tokens, heldout = read_text(tokenizer)
    model, loss = train(tokens, steps, args.seed, args.device)
    for parameter in model.parameters():  # round as saved, but compute the loss in float32
        parameter.data = parameter.bfloat16().float()
    windows = heldout[: 512 * 128].view(-1, 128)  # as long as in training
    heldout_loss = sum(batch_loss(model, window[None]) for window in windows) / len(windows)
    with atomic_write(out) as tmp:
        model.to(torch.bfloat16).save_pretrained(tmp)
        tokenizer.save_pretrained(tmp)
        # transformers 4 knows only the class's old name, 5 knows both
        config = tmp / "tokenizer_config.json"
        config.write_text(
            config.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast")
        )
    args.json = args.json or out / "made.json"
    digest = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    common.report(
        [
            {
                "model": str(out),
                "weights": sum(p.numel() for p in model.parameters()),
                "steps": steps,
                "last training loss (nats a byte)": loss,
                "held-out loss": heldout_loss,
                "sha256": digest,
            }
        ],
        args,
    )


if __name__ == "__main__":
    run_script(main)
