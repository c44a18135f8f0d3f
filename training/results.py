"""What a run delivers: mask, sparse model, logits, curve, summary."""

import math

from files import mask_files
from files.atomic import atomic_write
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
    run: Run,
    initial: mask_files.MaskFile,
    tokenizer: Tokenizer,
    saves_logits: bool,
    skips_checkpoint: bool,
    nats: dict[str, dict[str, float]] | None = None,
) -> dict:
    """Write the best mask, or the last, and the model under it; returns the run's summary, which
    `RunFolder.finish` takes. initial: m0, of which the layers that are not learned keep theirs;
    nats: mask -> text -> loss, for the model card. All processes have to ask at once."""
    masked, validation, folder = run.validation.masked, run.validation, run.folder.path
    logits = masked.whole_logits() if saves_logits else {}
    final, base = masked.finish(validation.bits), initial.model or run.folder.arguments["model"]
    if processes.is_main():  # first what all the steps were for
        masks = {
            name: final[name] if name in final else initial.masks[name] for name in initial.masks
        }
        mask_files.save(
            folder / "mask.safetensors",
            masks,
            initial.n,
            initial.m,
            base,
            run.folder.record["fingerprints"]["model"],
        )
    processes.wait_for_main()
    if not processes.is_main():
        return {}
    if not skips_checkpoint:
        sparse = sparse_model(run.folder)
        card = report.model_card(
            base,
            run.folder.arguments,
            len(initial.masks),
            f"{initial.n}:{initial.m}",
            str(sparse.dtype),
            nats,
        )
        with atomic_write(folder / "checkpoint") as tmp:
            sparse.save_pretrained(tmp)
            tokenizer.save_pretrained(tmp)
            (tmp / "README.md").write_text(card, encoding="utf-8")
    if logits:
        with atomic_write(folder / "logits.safetensors") as tmp:
            save_file(logits, tmp)
    levels = {
        "dense model": validation.dense_loss,
        "m0": validation.m0_loss,
        f"delivered mask, of step {validation.step}": validation.loss,
    }
    levels = {name: loss for name, loss in levels.items() if math.isfinite(loss)}
    title = f"{mask_files.public_name(base)}, {initial.n}:{initial.m}"
    figures.learning_curve({"learned mask": run.log.lines}, folder / "curve.png", levels, title)
    changed = sum(
        int((mask != initial.masks[name]).reshape(-1, initial.m).any(1).sum())
        for name, mask in final.items()
    )
    return {
        **_summary(run),
        "blocks": masked.blocks,
        "blocks_changed": changed,
        "mask_fingerprint": mask_files.fingerprint(masks),
    }


def sparse_model(folder: RunFolder) -> nn.Module:
    """The base model's stored weights under the run's mask, in the dtype that they are stored in:
    the dtype that the run computed in is its own affair. On the CPU."""
    given = folder.arguments
    model, _ = read_model(given["model"], "checkpoint", "cpu", given["trust_remote_code"])
    if given.get("permute"):
        apply_permutation(model, folder.path / ORDER)
    return apply_mask(model, folder.path / "mask.safetensors")


def _summary(run: Run) -> dict:
    progress, validation = run.progress, run.validation
    # steps, each with a minibatch of every process
    epoch = math.ceil(run.epoch_minibatches / processes.world_size())
    tail, stages = (
        [line["loss"] for line in run.log.lines[-epoch:]],
        run.folder.record.get("stages", {}),
    )
    # counted anew
    peaks = [peak_memory_bytes(), *(stage["peak_memory_bytes"] for stage in stages.values())]
    summary = {
        "steps": progress.step,
        "seconds": run.log.lines[-1]["seconds"],  # of the loop
        "seconds_saving": round(progress.seconds_saving, 2),
        "peak_memory_bytes": max(peaks),
        "processes": processes.world_size(),
        "mask_of_step": progress.step,
        "mean_loss_last_epoch": sum(tail) / len(tail),
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
