"""Runs sparsify.py with the learner of a rival method from bench/rival_methods.py in place of its
own; all else is as in sparsify.py.

    python reproduce/rival.py scores_ste --like results/RUN --lr 0.01 --out results/RIVAL
    python reproduce/rival.py scores_ste --resume results/RIVAL

The rival takes over RUN's arguments, text, order of the channels and m0; RUN need not be finished,
but must have its text and m0. --lr is Adam's learning rate. Rivals start from m0 without swaps.
They run in one process, learn all layers, and support only nn.Linear.
"""

import shutil
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import utils

utils.use_short_spins()

import sparsify
from files.records import GENERATED, read_record
from masking.masked_model import MaskedModel
from models import processes
from models.layers import is_transposed
from models.loading import input_device
from pruning.calibration import input_norms
from training.faster_model import speed_up
from training.initialize import SEQUENCES
from training.launch import launch
from training.learner import Learner
from training.loop import StepResult
from training.run_folder import RunFolder
from training.signals import StopSignals
from utils import UserError, number, run_script, script_parser

import torch
from rival_methods import RIVALS, Rival
from torch import Tensor


class RivalLearner(Learner):
    """Adapts a rival to be sparsify.py's learner in a run of `steps` steps. make: makes the rival
    from (model, masks, norms, n, m, weights)."""

    def __init__(self, make: Callable[..., Rival], steps: int):  # `of` sets the masked model
        self.make = make
        self.steps = steps

    def of(self, masked: MaskedModel, tokens: int, *_: object) -> "RivalLearner":
        """Stand in for StraightThrough(masked, ...): set the masked model and return self."""
        if any(is_transposed(layer.dense) for layer in masked.layers.values()):
            raise UserError("rivals are written for nn.Linear, and this model has Conv1D layers")
        super().__init__(masked)
        masked.undo.append(self.remove)
        self.undo = speed_up(masked.model, masked.kernels, tokens)  # as for our learner
        return self

    def start(
        self, _masked: MaskedModel, _magnitude: float, sequences: Tensor, _sweeps: int
    ) -> None:
        """Stand in for swaps: start the rival from m0."""
        modules = {name: layer.module for name, layer in self.masked.layers.items()}
        with self.masked.use_dense():
            self.begin(input_norms(self.masked.model, modules, sequences[:SEQUENCES]))

    def begin(self, norms: dict[str, Tensor]) -> None:
        """Make the rival from m0. norms: those of the layers' inputs in the dense model."""
        masked = self.masked
        space = self.masked.space
        self.rival = self.make(
            masked.model,
            masked.masks_of(masked.bits()),
            norms,
            space.n,
            space.m,
            weights={name: layer.weight for name, layer in masked.layers.items()},
        )
        for parameter in self.rival.parameters.values():
            self.rival.optimizer.state[parameter] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def step(self, batch: Tensor, _size: float, distill: list[float], *_: object) -> StepResult:
        """Take a step, as StraightThrough does; Adam decides its size."""
        batch = batch.to(input_device(self.masked.model))
        teacher = None
        progress = self.masked.steps / self.steps
        self.masked.steps += 1
        with self.masked.use_dense():  # the rival makes its own masked weights
            if any(distill):
                with torch.no_grad():
                    teacher = self.masked.model(input_ids=batch, use_cache=False).logits
            return StepResult(self.rival.move(batch, teacher, distill, progress))

    def proposal(self) -> dict[str, Tensor]:
        """Return the rival's mask."""
        return {
            name: self.masked.layers[name].bits_of(mask)
            for name, mask in self.rival.masks().items()
        }

    def changed(self) -> float:
        """Return the share of blocks whose mask differs from m0."""
        m0 = self.masked.bits()  # m0 still, as the masked model itself does not learn
        return (
            sum(int((bits != m0[name]).sum()) for name, bits in self.proposal().items())
            / self.masked.blocks
        )

    def state(self) -> tuple[dict, dict[str, Tensor]]:
        """Return the rival's parameters, Adam's moments, the norms, and the state of the random
        generator."""
        rival = self.rival
        tensors = {"random": self.rival.generator.get_state()}
        for name, parameter in rival.parameters.items():
            of_adam = {
                f"{key}.{name}": tensor for key, tensor in rival.optimizer.state[parameter].items()
            }
            tensors |= {
                f"norms.{name}": rival.norms[name],
                f"parameter.{name}": parameter.detach(),
                **of_adam,
            }
        return {}, tensors

    def restore(self, _scalars: dict, read: Callable) -> None:
        """Restore what `state` returned."""
        self.begin(
            {
                name: read(f"norms.{name}", torch.empty(layer.shape[1])).to(layer.weight.device)
                for name, layer in self.masked.layers.items()
            }
        )
        self.rival.generator.set_state(read("random", self.rival.generator.get_state()))
        for name, parameter in self.rival.parameters.items():
            parameter.data.copy_(read(f"parameter.{name}", parameter).view_as(parameter))
            for key, tensor in self.rival.optimizer.state[parameter].items():
                tensor.copy_(read(f"{key}.{name}", tensor.view(-1)).view_as(tensor))

    def remove(self) -> None:
        """Restore the modules' own forward."""
        for module in self.rival.layers.values():
            del module.forward
        self.undo()


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script_parser(__doc__)
    parser.add_argument("method", choices=RIVALS)
    parser.add_argument("--like", metavar="RUN", help="run of sparsify.py to take over")
    parser.add_argument("--lr", type=number(float, 0), help="Adam's learning rate")
    parser.add_argument("--out", help="run folder, must be new")
    parser.add_argument("--resume", metavar="RIVAL", help="resume a rival's run that was stopped")
    args = parser.parse_args(argv)
    if [args.like, args.lr, args.out].count(None) != (3 if args.resume else 0):
        parser.error("give --like, --lr and --out, or --resume alone")
    return args


def settings_of(given: Namespace) -> Namespace:
    """Return the arguments of the rival's run. Raises UserError if the run of sparsify.py lacks its
    text and m0, or has --targets."""
    args = sparsify.parse_args(["--resume", given.resume or given.like])
    if given.resume:
        return args
    if not read_record(given.like).get("fingerprints") or args.targets:
        raise UserError(
            f"{given.like} must have its text and m0, without --targets: a rival learns all layers"
        )
    skips = not args.permute  # a mask of reordered channels does not fit the original model
    return Namespace(
        **{
            **vars(args),
            "step_size": given.lr,
            "out": given.out,
            "resume": None,
            "skip_checkpoint": skips,
        }
    )


def compete(
    method: str,
    like: str | None,
    args: Namespace,
    device: str | None,
    folder: RunFolder,
    signals: StopSignals,
) -> None:
    """Run the rival, as `sparsify.learn` does."""
    if processes.world_size() > 1:
        raise UserError("rivals learn in one process")
    if like:
        lent = read_record(like)
        for name in (GENERATED, "order.permutation.safetensors", "initial_mask.safetensors"):
            if Path(like, name).exists():
                shutil.copy(Path(like, name), folder.path)
        # from here on a stopped run can resume; the fingerprints stop it if this version would read
        # other text than RUN's version did
        folder.note(rival=method, fingerprints=lent["fingerprints"], plan=lent["plan"])
    steps = folder.record["plan"]["steps"]
    learner = RivalLearner(partial(RIVALS[method], lr=args.step_size, seed=args.seed), steps)
    sparsify.learn(args, device, folder, signals, learner.of, learner.start)


def main(argv: list[str] | None = None) -> None:
    given = parse_args(argv)
    launch(
        f"reproduce/rival.py {given.method}",
        settings_of(given),
        partial(compete, given.method, given.like),
    )


if __name__ == "__main__":
    # MaskLLM's soft masks become denormal numbers, which are slow on a CPU
    torch.set_flush_denormal(True)
    run_script(main)
