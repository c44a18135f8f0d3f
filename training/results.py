"""Write the results of a run: mask, sparse model, logits, curve, summary."""

import math

from files import mask_files
from files.atomic import atomic_write
from files.mask_files import MaskFile
from masking.layers import apply_mask
from models import processes
from models.loading import Tokenizer, read_model
from models.machine import peak_memory_bytes
from pruning.channels import apply_permutation
from training import figures, report
from training.loop import Run
from training.run_folder import ORDER, RunFolder

from safetensors.torch import save_file
from torch import nn


def deliver(
    run: Run, m0: MaskFile, tokenizer: Tokenizer, saves_logits: bool, skips_checkpoint: bool
) -> dict:
    """Write the best mask (or the last) and the model under it; return the run's summary for
    `RunFolder.finish`. Layers that are not learned keep m0. All processes must call this
    together."""
    masked = run.validation.masked
    validation = run.validation
    folder = run.folder
    logits = masked.whole_logits() if saves_logits else {}
    final = masked.finish(validation.bits)
    masks = {name: final.get(name, m0.masks[name]) for name in m0.masks}
    base = m0.model or folder.arguments["model"]
    if processes.is_main():  # write the mask first: it is the result of all steps
        file = folder.path / "mask.safetensors"
        fingerprint = folder.record["fingerprints"]["model"]
        mask_files.save(file, masks, m0.n, m0.m, base, fingerprint)
    processes.wait_for_main()
    if not processes.is_main():
        return {}
    if not skips_checkpoint:
        write_checkpoint(folder, tokenizer, base, len(masks))
    if logits:
        with atomic_write(folder.path / "logits.safetensors") as tmp:
            save_file(logits, tmp)
    draw_curve(run, f"{mask_files.public_name(base)}, {m0.n}:{m0.m}")
    changes = [mask != m0.masks[name] for name, mask in final.items()]
    return {
        **_summary(run),
        "blocks": masked.blocks,
        "blocks_changed": sum(int(change.reshape(-1, m0.m).any(1).sum()) for change in changes),
        "mask_fingerprint": mask_files.fingerprint(masks),
    }


def write_checkpoint(folder: RunFolder, tokenizer: Tokenizer, base: str, layers: int) -> None:
    """Write the sparse model as a plain Hugging Face folder, with a model card."""
    model = sparse_model(folder)
    nats = folder.record.get("nats")
    pattern = "{}:{}".format(*folder.arguments["sparsity_type"])
    card = report.model_card(base, folder.arguments, layers, pattern, str(model.dtype), nats)
    with atomic_write(folder.path / "checkpoint") as tmp:
        model.save_pretrained(tmp)
        tokenizer.save_pretrained(tmp)
        (tmp / "README.md").write_text(card, encoding="utf-8")


def draw_curve(run: Run, title: str) -> None:
    """Draw the losses of the steps, with horizontal lines for the masks evaluated on held-out
    text."""
    validation = run.validation
    levels = {
        "dense model": validation.dense_loss,
        "m0": validation.m0_loss,
        f"delivered mask, of step {validation.step}": validation.loss,
    }
    levels = {name: loss for name, loss in levels.items() if math.isfinite(loss)}
    curves = {"learned mask": run.log.lines}
    figures.learning_curve(curves, run.folder.path / "curve.png", levels, title)


def sparse_model(folder: RunFolder) -> nn.Module:
    """Return the base model under the run's mask, on the CPU, in the dtype that its weights are
    stored in, which may differ from the dtype that the run computed in."""
    arguments = folder.arguments
    model, _ = read_model(arguments["model"], "checkpoint", "cpu", arguments["trust_remote_code"])
    if arguments.get("permute"):
        apply_permutation(model, folder.path / ORDER)
    return apply_mask(model, folder.path / "mask.safetensors")


def _summary(run: Run) -> dict:
    progress = run.progress
    validation = run.validation
    # in steps, each of which takes a minibatch per process
    epoch = math.ceil(run.epoch_minibatches / processes.world_size())
    last_epoch = [line["loss"] for line in run.log.lines[-epoch:]]
    stages = run.folder.record.get("stages", {})
    # each stage resets the peak
    peaks = [peak_memory_bytes(), *(stage["peak_memory_bytes"] for stage in stages.values())]
    summary = {
        "steps": progress.step,
        "seconds": run.log.lines[-1]["seconds"],  # spent in the loop
        "seconds_saving": round(progress.seconds_saving, 2),
        "peak_memory_bytes": max(peaks),
        "processes": processes.world_size(),
        "mask_of_step": progress.step,
        "mean_loss_last_epoch": sum(last_epoch) / len(last_epoch),
        "steps_skipped": progress.skipped,
    }
    if validation.bits:
        summary |= {
            "mask_of_step": validation.step,
            "heldout_loss": validation.loss,
            "heldout_loss_of_m0": validation.m0_loss,
        }
    if validation.prior is not None:
        summary["prior"] = validation.prior
    return summary
