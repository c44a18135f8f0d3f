"""Have a model generate the text to learn its mask from (models/generation.py). sparsify.py does
this by itself.

    python generate_text.py --model MODEL --tokens 100000 --out generated.jsonl
    python generate_text.py --model MODEL --tokens 100000 --after PASSAGES --out alike.jsonl

No data is needed, except for --after: a few passages of the kind of text that the model will be
used on. Each document then continues one of them.

The output has one JSON object per line, {"text": ..., "tokens": ...}, for --dataset of the other
scripts. sparsify.py cannot tell that a model wrote it: give it --distill 1. The others need a lower
--seqlen than given here. After an interruption, the same command resumes.
"""

import argparse

from utils import (
    UserError,
    add_model_arguments,
    begin_script,
    positive_int,
    run_script,
    script_parser,
    sequence_length,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    add_model_arguments(parser)
    parser.add_argument(
        "--tokens", type=positive_int, default=100_000, help="minimum number of tokens to generate"
    )
    parser.add_argument(
        "--seqlen", type=sequence_length, default=128, help="maximum tokens per document"
    )
    parser.add_argument(
        "--batchsize", type=positive_int, default=256, help="documents generated at once"
    )
    parser.add_argument(
        "--after",
        metavar="DATASET",
        help="passages, in the forms of train.py --dataset: each document continues the first "
        "--seqlen tokens of one of them, which are left out",
    )
    parser.add_argument("--out", default="generated_text.jsonl", help="file to write, must be new")
    return parser.parse_args(argv)


if __name__ == "__main__":
    begin_script(parse_args)  # refuses a wrong flag before torch is imported, which takes seconds

from files.atomic import refuse_existing
from files.documents import check_paths
from models import generation
from models.loading import check_length, load_model


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    out = refuse_existing(args.out, "choose another --out or remove it")
    if out.suffix != ".jsonl":
        raise UserError(
            f"--out {out} must end in .jsonl: --dataset tells by the suffix how to read a file"
        )
    check_paths([], [args.after])
    model, tokenizer = load_model(args.model, args.dtype, args.device, args.trust_remote_code)
    check_length(model, args.seqlen)
    passages = (
        generation.read_passages(args.after, model, tokenizer, args.seqlen) if args.after else []
    )
    documents, tokens = generation.write_text(
        out, model, tokenizer, args.tokens, args.seqlen, args.batchsize, passages, args.seed
    )
    print(f"{documents} documents, {tokens} tokens -> {out}")


if __name__ == "__main__":
    run_script(main)
