"""Tiny models, tokenizers and text, made on the spot: no network, under a second each, the same on
every run."""

import io
import json
import random
from pathlib import Path

import pytest
import sentencepiece
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

HIDDEN, LAYERS, HEADS, POSITIONS = 64, 2, 4, 256
SPREAD = 0.2  # standard deviation of the weights: large enough for a mask to move the loss visibly

DETERMINERS = ["the", "a", "every", "some"]
ADJECTIVES = ["small", "old", "quiet", "bright", "heavy", "green"]
ANIMALS = ["cat", "dog", "horse", "bird", "fox"]
PEOPLE = ["teacher", "farmer", "doctor", "sailor", "child"]
# learnable
VERBS = {"cat": "watches", "dog": "follows", "horse": "carries", "bird": "hears", "fox": "avoids"}
ENDINGS = ["in the morning", "near the river", "after the rain", "before winter", "without a sound"]


def sentence(generator: random.Random) -> str:
    """Eight or nine words; the animal decides the verb, so that there is something to learn."""
    animal = generator.choice(ANIMALS)
    words = [
        generator.choice(DETERMINERS),
        generator.choice(ADJECTIVES),
        animal,
        VERBS[animal],
        "the",
        generator.choice(PEOPLE),
        generator.choice(ENDINGS),
    ]
    return " ".join(words).capitalize() + "."


def document(generator: random.Random) -> str:
    """25 to 45 sentences: 200 words and more, at least a token each under every tokenizer here."""
    return " ".join(sentence(generator) for _ in range(generator.randint(25, 45)))


def write_corpus(path, documents: int = 64, seed: int = 0) -> str:
    """Write a .jsonl of {"text": ...} documents of 200 tokens or more under the tokenizers here;
    returns its path."""
    generator = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": document(generator)}) + "\n" for _ in range(documents))
    return str(path)


def training_text() -> list[str]:
    generator = random.Random(1)
    return [sentence(generator) for _ in range(500)]


def save_sentencepiece(folder) -> int:
    """A Llama-2 tokenizer in small: SentencePiece BPE with byte fallback, as tokenizer.model.
    Returns its size."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(training_text()),
        model_writer=model,
        model_type="bpe",
        vocab_size=352,
        byte_fallback=True,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "tokenizer.model").write_bytes(model.getvalue())
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": False,
        "model_max_length": POSITIONS,
    }
    Path(folder, "tokenizer_config.json").write_text(json.dumps(settings))
    return 352


def save_bytelevel(
    folder, special_tokens: list[str], start: str | None, end: str | None = None, **names
) -> int:
    """A GPT-2 tokenizer in small: byte-level BPE of the tokenizers library. Returns its size.

    start, end: special tokens put before and after every text, if any; names: which of them plays
    bos_token, ...
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        training_text(),
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=special_tokens,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    if added := [token for token in (start, end) if token]:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(filter(None, [start, "$A", end])),
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in added],
        )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=POSITIONS, **names
    )
    fast.save_pretrained(folder)
    return tokenizer.get_vocab_size()


def save_model(folder, config) -> str:
    """A model of this configuration with random weights, seed 0, float32. Returns the folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return str(folder)


def make_llama(folder) -> str:
    """Two-layer Llama (14 maskable Linears, untied lm_head) with a SentencePiece tokenizer."""
    return save_model(
        folder,
        transformers.LlamaConfig(
            vocab_size=save_sentencepiece(folder),
            hidden_size=HIDDEN,
            intermediate_size=2 * HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=2,
            max_position_embeddings=POSITIONS,
            initializer_range=SPREAD,
            bos_token_id=1,
            eos_token_id=2,
        ),
    )


def make_gpt2(folder) -> str:
    """Two-layer GPT-2 (8 maskable Conv1D, tied lm_head) with a byte-level tokenizer, no token added
    to texts."""
    end = "<|endoftext|>"
    return save_model(
        folder,
        transformers.GPT2Config(
            vocab_size=save_bytelevel(folder, [end], start=None, bos_token=end, eos_token=end),
            n_embd=HIDDEN,
            n_layer=LAYERS,
            n_head=HEADS,
            n_positions=POSITIONS,
            initializer_range=SPREAD,
            bos_token_id=0,
            eos_token_id=0,
        ),
    )


def make_opt(folder, embedding: int = HIDDEN) -> str:
    """Two-layer OPT (12 maskable Linears, tied lm_head) with a byte-level tokenizer that starts
    texts with </s>. An embedding of another size makes two Linears more, outside the layers."""
    vocabulary = save_bytelevel(
        folder,
        ["<s>", "<pad>", "</s>", "<unk>"],
        start="</s>",
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    save_model(
        folder,
        transformers.OPTConfig(
            vocab_size=vocabulary,
            hidden_size=HIDDEN,
            word_embed_proj_dim=embedding,
            ffn_dim=2 * HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=POSITIONS,
            init_std=SPREAD,
            bos_token_id=2,
            eos_token_id=2,
            pad_token_id=1,
        ),
    )
    # but no do_sample: as some
    Path(folder, "generation_config.json").write_text('{"eos_token_id": 2, "top_p": 0.9}')
    return str(folder)


def make_moe(folder) -> str:
    """Two-layer Mixtral of four experts, since transformers 5 fused into 3-D parameters."""
    return save_model(
        folder,
        transformers.MixtralConfig(
            vocab_size=save_sentencepiece(folder),
            hidden_size=HIDDEN,
            intermediate_size=2 * HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=POSITIONS,
            initializer_range=SPREAD,
            bos_token_id=1,
            eos_token_id=2,
        ),
    )


SIZES = dict(
    vocab_size=64,
    hidden_size=HIDDEN,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=SPREAD,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def random_model(kind: str, **sizes):
    """A frozen decoder of this kind and these sizes. The test is skipped where transformers has
    none."""
    if not hasattr(transformers, f"{kind}Config"):
        pytest.skip(f"this transformers has no {kind}")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes)
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


MODELS = {"llama": make_llama, "gpt2": make_gpt2, "opt": make_opt}
