"""Reports at the end of a run: a model card and, for sparsify.py, whether its model is good, and
why."""

import shlex
from contextlib import suppress
from pathlib import Path

from evaluation.comparison import markdown_table
from evaluation.perplexity import perplexity
from files import mask_files
from files.records import write_json
from utils import C4, VERSION

from huggingface_hub import EvalResult, ModelCard, ModelCardData

FEW = 1e-4  # share of changed blocks below which the mask counts as m0
ROWS = ("dense", "m0", "learned")
FILES = ("model", "mask", "dataset", "after", "ppl", "baseline", "out", "resume")  # flags
# highest perplexity, relative to the dense model's, for each verdict
CLOSE = 1.3
USABLE = 2.0
FEW_STEPS = 10
LITTLE = 0.2  # of the text planned for one pass


def perplexity_table(nats: dict[str, dict[str, float]]) -> str:
    """Return a Markdown table of perplexities. nats: row -> text -> loss in nats. The gap is the
    difference in loss between m0 and the dense model."""
    heading = ["mask"]
    lines = [[row] for row in ROWS]
    for text in nats["dense"]:
        heading += [f"perplexity, {text}", "gap closed (%)"]
        dense = nats["dense"][text]
        m0 = nats["m0"][text]
        for line, row in zip(lines, ROWS):
            closed = (
                f"{100 * (m0 - nats[row][text]) / (m0 - dense):.1f}"
                if row == "learned" and m0 > dense
                else ""
            )
            line += [f"{perplexity(nats[row][text]):.3f}", closed]
    return markdown_table(heading, lines)


def command(arguments: dict) -> str:
    """Return the command of a run with all flags but those that name files, which a published card
    must not tell."""
    script = "train.py" if "estimator" in arguments else "sparsify.py"
    flags = ["--sparsity_type {}:{}".format(*arguments["sparsity_type"])]
    for name, value in arguments.items():
        if name in (*FILES, "sparsity_type") or value is None or value is False:
            continue
        if isinstance(value, list):  # --targets
            value = shlex.join(value)
        flags.append(f"--{name}" if value is True else f"--{name} {value}")
    return f"python {script} {' '.join(flags)}"


def licence_of(model: str) -> str | None:
    """Return the licence in the card of a model's folder or hub id; None if there is no such card,
    or no network."""
    folder = Path(model).expanduser()
    with suppress(Exception):  # cards are written by hand, so anything may be wrong with one
        return ModelCard.load(folder / "README.md" if folder.is_dir() else model).data.license


def evaluations(nats: dict[str, float]) -> list[EvalResult]:
    """Return a mask's losses, text -> nats, as the Hub's index of models reads them."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=text,  # results of one type are merged
            dataset_name=text,
            metric_type="perplexity",
            metric_value=round(perplexity(loss), 3),
        )
        for text, loss in nats.items()
    ]


def model_card(
    base: str,
    arguments: dict,
    layers: int,
    pattern: str,
    dtype: str,
    nats: dict[str, dict[str, float]] | None,
) -> str:
    """Return the model card (README.md) of a sparse model's folder. arguments: of the run; layers:
    number of masked layers; pattern: 'N:M'."""
    table = f"Perplexity by token:\n\n{perplexity_table(nats)}" if nats else ""
    card = Path(__file__).with_name("model_card.md").read_text(encoding="utf-8")
    # a link to a local folder would be dead
    is_hub_id = "/" in base and not Path(base).expanduser().exists()
    name = mask_files.public_name(base)
    results = evaluations((nats or {}).get("learned", {}))
    metadata = ModelCardData(
        model_name=f"{name}, {pattern} sparse" if results else None,
        eval_results=results or None,
        base_model=base if is_hub_id else None,
        license=licence_of(arguments["model"]),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["maskpro", "sparse", pattern],
    )
    return card.format(
        metadata=metadata.to_yaml(),
        base=name,
        layers=layers,
        pattern=pattern,
        version=VERSION,
        command=command(arguments),
        dtype=dtype.removeprefix("torch."),
        table=table,
        order=", but for the order of the channels" if arguments.get("permute") else "",
    )


def note_unchanged(summary: dict) -> str:
    """Return advice if the mask is still almost m0; else an empty string."""
    if summary["blocks_changed"] >= FEW * summary["blocks"]:
        return ""
    hold_out = "" if "heldout_loss" in summary else "hold text out with --val_fraction, "
    return (
        f"note: almost no block differs from m0: {hold_out}take more or larger steps (--lr, "
        "--step_size), or lower --logits\n"
    )


def in_words(summary: dict, folder: object, model: str, dataset: str, positions: float) -> str:
    """Return a summary of a finished run in a few lines, with the command that evaluates its mask.
    positions: longest sequence that the model takes, in tokens."""
    ppl = "wikitext2" if dataset == C4 else "TEXT"
    comment = (
        "" if dataset == C4 else f"     # TEXT: of the same kind as {dataset}, but not learned from"
    )
    seqlen = f" --seqlen {positions}" if positions < 2048 else ""  # the default of eval.py
    prior = f" with {summary['prior']:.1%} of the prior C * m0" if "prior" in summary else ""
    heldout = (
        ""
        if "heldout_loss" not in summary
        else (
            f"held-out loss of the delivered mask (step {summary['mask_of_step']}{prior}): "
            f"{summary['heldout_loss']:.4f} nats; of m0: {summary['heldout_loss_of_m0']:.4f} nats\n"
        )
    )
    skipped = (
        f", {summary['steps_skipped']} skipped because the loss was not finite"
        if summary["steps_skipped"]
        else ""
    )
    return (
        f"{heldout}{summary['steps']} steps in {summary['seconds']:.0f} s{skipped}, last epoch's "
        f"mean loss {summary['mean_loss_last_epoch']:.4f} nats, "
        f"{summary['blocks_changed'] / summary['blocks']:.2%} of {summary['blocks']} blocks "
        f"changed, peak {summary['peak_memory_bytes'] / 2**30:.2f} GiB -> "
        f"{folder}\n{note_unchanged(summary)}python eval.py --model {shlex.quote(model)} --mask "
        f"{shlex.quote(str(folder))} --ppl {ppl}{seqlen}{comment}"
    )


def verdict(nats: dict[str, dict[str, float]]) -> str:
    """Say whether the sparse model is good, by the first text of the table, and why a gap is blank
    or above 100 %."""
    dense, m0, learned = (nats[row].values() for row in ROWS)
    ratio = perplexity(next(iter(learned)) - next(iter(dense)))
    if ratio <= 1:
        assessment = (
            "no worse than the dense model on text of the kind that it learned from; try others "
            "with eval.py --ppl"
        )
    elif ratio <= CLOSE:
        assessment = "close to the dense model"
    elif ratio <= USABLE:
        assessment = "usable with care; more steps or real text bring it closer"
    else:
        assessment = "not usable yet; take more steps, or give more real text with --dataset"
    lines = [f"{ratio:.2f} times the dense perplexity: {assessment}."]
    if any(loss <= of_dense for loss, of_dense in zip(m0, dense)):
        lines.append(
            "A gap is blank if m0 is no worse than the dense model on that text: there is no gap "
            "to close."
        )
    if any(
        of_dense > loss and start > of_dense for loss, start, of_dense in zip(learned, m0, dense)
    ):
        lines.append(
            "More than 100 % of a gap is closed if the mask has also learned the style of that "
            "text."
        )
    return "\n".join(lines)


def shortage(plan: dict) -> str:
    """Return a line if the run had very few steps or little text to learn from; else an empty
    string. plan: the plan in the run's record."""
    if plan["steps"] < FEW_STEPS:
        return f"\n{plan['steps']} steps are very few: raise --steps or --minutes."
    if plan["learned_tokens"] < LITTLE * plan["tokens"]:
        return (
            f"\nThere were only {plan['learned_tokens']:,} tokens to learn from, and one pass "
            f"takes {plan['tokens']:,}: raise --minutes, or give more text with --dataset."
        )
    return ""


def sparsified(record: dict, summary: dict) -> str:
    """Return the report of a run of sparsify.py: table, verdict, sample. record: its run.json."""
    sample = "".join(f"\n{name + ':':<9}{text}" for name, text in record.get("sample", {}).items())
    return (
        f"{perplexity_table(record['nats'])}\n\n{verdict(record['nats'])}\nThe mask of step "
        f"{summary['mask_of_step']} of {summary['steps']} is delivered: "
        f"{summary['blocks_changed']:,} of {summary['blocks']:,} blocks differ from m0.\n{sample}"
    )


def write(folder: Path, record: dict, summary: dict) -> str:
    """Write report.json (the run's record and summary) and return the text to print."""
    write_json(folder / "report.json", {**record, "summary": summary})
    return (
        f"\n{sparsified(record, summary)}\n\n{note_unchanged(summary)}-> "
        f"{folder}{shortage(record['plan'])}"
    )
