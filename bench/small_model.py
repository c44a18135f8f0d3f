"""Make the small model of the learning benches: a byte-level Llama of 0.8 M weights, trained here on the demo's text.

    python bench/small_model.py [--quick] [--out demo/small]

So that hundreds of mask steps take a minute on a CPU. Needs the demo's text (`make demo DEMO_FLAGS=--quick`
leaves it in demo/). Prints the training and held-out loss; takes about four minutes on 2 cores.
"""
import json
from pathlib import Path

import common
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from files import refuse_existing, written_beside
from utils import UserError, batch_loss, run


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, 256 in all; no special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--out", default="demo/small", help="folder of the model, must be new")
    parser.add_argument("--steps", type=int, default=2500, help="training steps of 32 x 128 bytes")
    args = parser.parse_args()
    steps = 50 if args.quick else args.steps
    out = refuse_existing(args.out, "choose another --out or remove it")
    text, heldout = Path("demo/train.jsonl"), Path("demo/heldout.txt")
    if not text.exists():
        raise UserError("demo/train.jsonl is missing; run `make demo DEMO_FLAGS=--quick` first")
    torch.manual_seed(args.seed)
    tokenizer = byte_tokenizer()

    def tokens_of(string):
        return torch.tensor(tokenizer(string, verbose=False).input_ids)
    passages = [json.loads(line)["text"] for line in text.open()]
    train = torch.cat([tokens_of(passage) for passage in passages])
    test = tokens_of(heldout.read_text(encoding="utf-8")[:300_000])
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None)).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.05)
    progress = tqdm(range(steps), desc="training", unit="step", disable=None)
    for _ in progress:
        starts = torch.randint(len(train) - 128, (32,))
        batch = torch.stack([train[start:start + 128] for start in starts]).to(args.device)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    model.eval()
    windows = test[:512 * 128].view(-1, 128)  # no longer than it was trained on
    test_loss = sum(batch_loss(model, window[None]) for window in windows) / len(windows)
    with written_beside(out) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
    common.report([{"model": str(out), "weights": sum(p.numel() for p in model.parameters()), "steps": steps,
                    "last training loss (nats a byte)": loss.item(), "held-out loss": test_loss}], args)


if __name__ == "__main__":
    run(main)
