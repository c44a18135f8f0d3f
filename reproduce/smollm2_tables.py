"""The tables of masks of SmolLM2-135M, from their records.

Each function returns Markdown; tables.py puts it into the docs.
"""

import math

from evaluation.comparison import markdown_table

from record import cell, recovered, row_cells
from rows import AFTER, ONE_SHOT, RESULTS, SUMMARY, record

GAPS = ["perplexity", "gap closed (%)", "accuracy (%)", "gap closed (%)"]
# the records of SmolLM2-135M by the text that they were evaluated on; the first with a row counts
RECORDS = {
    "WikiText-2": ("smollm2_real", "smollm2", "smollm2_float32"),
    "Brown": ("smollm2_brown",),
}


def smollm2(name: str, text: str = "WikiText-2") -> dict[str, list[dict]]:
    """Return the rows of the record of SmolLM2-135M, evaluated on `text`, that has this row, or {}
    if none has it. Each record has its own rows dense and Wanda."""
    found = [record(file)["rows"] for file in RECORDS[text]]
    return next((rows for rows in found if name in rows), {})


def of_perplexity(name: str, text: str = "WikiText-2") -> list[float]:
    """Return the share of Wanda's gap in log perplexity that a row on SmolLM2-135M closes, in
    percent, for each seed."""
    rows = smollm2(name, text)
    return [recovered(rows, name, seed["nats"]) for seed in rows.get(name, [])]


def of_accuracy(name: str) -> list[float]:
    """Return the share of Wanda's gap in accuracy that a row on SmolLM2-135M closes, in percent,
    for each seed with an accuracy."""
    rows = smollm2(name)
    if not rows:
        return []
    dense, m0 = (rows[name][0].get("mean_acc", math.nan) for name in ("dense", "2of4/wanda"))
    return [
        100 * (seed["mean_acc"] - m0) / (dense - m0) for seed in rows[name] if "mean_acc" in seed
    ]


def perplexity(name: str, text: str = "WikiText-2") -> list[str]:
    """Return the cells of a row on SmolLM2-135M: perplexity, and the share of Wanda's gap to dense
    that is closed. They are empty if the row was not evaluated on this text."""
    rows = smollm2(name, text)
    if not rows:
        return ["", ""]
    return [cell([seed["ppl"] for seed in rows[name]], 2), row_cells(rows, name)[2]]


def gaps(name: str) -> list[str]:
    """Return the cells of `perplexity` on WikiText-2, and the same two of the accuracy."""
    accuracies = [100 * seed["mean_acc"] for seed in smollm2(name)[name] if "mean_acc" in seed]
    shares = [] if name in ("dense", "2of4/wanda") else of_accuracy(name)
    return [
        *perplexity(name),
        cell(accuracies, 1) if accuracies else "not run",
        cell(shares, 0) if shares else "",
    ]


def results() -> str:
    """Return the table of runs on SmolLM2-135M with text in the manner of the benchmarks."""
    return markdown_table(["method", *GAPS], [[what, *gaps(name)] for what, name in RESULTS])


def summary() -> str:
    """Return the README's table."""
    lines = []
    for *described, name in SUMMARY:
        wikitext, _, accuracy, _ = gaps(name)
        lines.append([*described, wikitext, perplexity(name, "Brown")[0], accuracy])
    columns = ["method", "learns by", "state (bytes per weight)"]
    return markdown_table([*columns, "WikiText-2", "Brown", "accuracy (%)"], lines)


def rivals() -> str:
    """Return the README's methods with the shares of Wanda's gap that they close."""
    lines = []
    for method, learns, _, name in SUMMARY:
        _, wikitext, _, accuracy = gaps(name)
        if wikitext:
            lines.append([method, learns, wikitext, perplexity(name, "Brown")[1], accuracy])
    return markdown_table(["method", "learns by", "WikiText-2", "Brown", "accuracy"], lines)


def one_shot() -> str:
    """Return the table of masks made in one shot."""
    return markdown_table(["method", *GAPS], [[what, *gaps(name)] for what, name in ONE_SHOT])


def after_the_mask() -> str:
    """Return the table of fine-tuning and int8 weights, perplexities on two texts."""
    records = {"WikiText-2": record("after"), "Brown": record("after_brown")}
    lines = [
        [what, *(f"{found['rows'][name][0]['ppl']:.2f}" for found in records.values())]
        for what, name in AFTER
    ]
    (sparse,) = record("after")["rows"]["2of4/sparsify-steps20"]
    here = sparse["environment"]
    return (
        markdown_table(["model", *records], lines)
        + f"\n\n{sparse['windows']} windows of {sparse['seqlen']} tokens, {here['hardware']}, seed "
        f"{sparse['seed']}, commit {here['commit']}."
    )
