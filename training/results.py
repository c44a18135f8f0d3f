"""What a run delivers: mask, sparse model, logits, curve, summary."""
from utils import peak_memory

import torch
from safetensors.torch import save_file
from torch import Tensor

from files import mask_files
from files.atomic import atomic_write
from masking.masked_model import MaskedModel
from models.loading import devices_of
from models.processes import ProcessGroup
from models.sharded_files import save_sharded
from training import figures
from training.progress import Run
from training.run_folder import RunFolder
from training.setup import Inputs
from training.validation import Validation


def most_bytes(masked: MaskedModel, steps: int, *, save: bool, skip_checkpoint: bool, num_evals: int) -> int:
    """What the run will write beside its states, at most: masks at a bit a weight, logits, the model, a line a step."""
    weights = sum(layer.shape.numel() for layer in masked.layers.values())
    logits = sum(layer.shard(plane).nbytes for layer in masked.layers.values() for plane in layer.logits)
    model = sum(parameter.nbytes for parameter in masked.model.parameters())
    lines = 200 * steps + 150 * num_evals * len(masked.layers)
    return weights // 8 + save * logits + (not skip_checkpoint) * model + lines


def deliver(inputs: Inputs, masked: MaskedModel, validation: Validation, run: Run, folder: RunFolder,
            group: ProcessGroup, *, model: str, sparsity_type: tuple[int, int], save: bool,
            skip_checkpoint: bool) -> None:
    """Write the best mask, or the last, and the model under it; print what came of the run."""
    logits, devices = masked.whole_logits() if save else None, devices_of(masked.model)
    final = masked.finish(validation.bits)
    if not group.is_main:
        if masked.is_sharded and not skip_checkpoint:
            group.wait_for_main()
            save_sharded(inputs.model, folder.path, is_main=False)  # give this process's rows
        return
    if logits:
        with atomic_write(folder.path / "logits.safetensors") as beside:
            save_file(logits, beside)
    masks = {**inputs.mask_file.masks, **final}
    mask_files.save(folder.path / "mask.safetensors", masks, *sparsity_type, model, inputs.fingerprints["model"])
    if not skip_checkpoint:
        with atomic_write(folder.path / "checkpoint") as sparse_model:
            if masked.is_sharded:
                group.wait_for_main()
                save_sharded(inputs.model, sparse_model, is_main=True)
            else:
                inputs.model.save_pretrained(sparse_model)
            inputs.tokenizer.save_pretrained(sparse_model)
    figures.learning_curve({folder.path.name: folder.metrics}, folder.path / "curve.png")
    summary = {**_summary(run, folder, group, validation, devices, masked.gathered_bytes),
               **_changes(inputs.mask_file.masks, final, sparsity_type[1]),
               "mask_fingerprint": mask_files.fingerprint(masks)}
    folder.finish(summary)
    if validation.bits:
        print(f"held-out loss of the mask delivered, that of step {validation.step}, {validation.loss:.4f} nats, of m0 "
              f"{validation.m0_loss:.4f}")
    skipped = f", {run.position.skipped} skipped for a loss that was not finite" if run.position.skipped else ""
    print(f"{run.step} steps in {summary['seconds']:.0f} s{skipped}, last epoch's mean loss "
          f"{summary['mean_loss_last_epoch']:.4f} nats, {summary['blocks_changed'] / summary['blocks']:.2%} of "
          f"{summary['blocks']} blocks changed, peak {summary['peak_memory_bytes'] / 2**30:.2f} GiB -> {folder.path}")


def _summary(run: Run, folder: RunFolder, group: ProcessGroup, validation: Validation,
             devices: set[torch.device], gathered_bytes: int) -> dict:
    position = run.position
    tail = [line["loss"] for line in folder.metrics[-run.minibatches:]]  # of the last epoch
    summary = {"steps": position.step, "seconds": round(run.elapsed_s(), 1),
               "seconds_swapping": round(position.seconds_swapping, 1),
               "seconds_saving": round(position.seconds_saving, 2), **peak_memory(devices),
               "processes": group.size, "sent_bytes": group.sent_bytes + gathered_bytes,
               "mean_loss_last_epoch": sum(tail) / len(tail), "steps_skipped": position.skipped,
               "diverged_at_step": position.diverged, "mask_of_step": position.step}
    if validation.bits:
        summary |= {"mask_of_step": validation.step, "heldout_loss": validation.loss,
                    "heldout_loss_of_m0": validation.m0_loss}
    return summary


def _changes(initial: dict[str, Tensor], final: dict[str, Tensor], m: int) -> dict[str, int]:
    """Blocks of the learned layers, and how many of them are not as in m0."""
    changed = sum(int((mask != initial[name]).reshape(-1, m).any(1).sum()) for name, mask in final.items())
    return {"blocks": sum(mask.numel() // m for mask in final.values()), "blocks_changed": changed}
