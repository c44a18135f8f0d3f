"""sparsify.py with a rival's learner, of bench/rival_methods.py: the same text, m0, steps, selection and records.

    python reproduce/rival.py scores_ste --model demo/model --steps 280 --lr 0.01 --mask MASK --dataset TEXT --distill 1
    python reproduce/rival.py maskllm --resume results/RUN

The method is maskllm, susi, scores_ste or proxsparse. The flags are sparsify.py's. --lr is Adam's rate; nothing comes
in place of the swaps; the flags of our own method do nothing.
"""
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import sparsify
from masking.masked_model import MaskedModel
from models.loading import input_device
from pruning.calibration import input_norms
from training import args as arguments
from training import initialize
from training.loop import StepResult
from training.run_folder import RunFolder
from training.signals import StopSignals
from training.validation import Validation
from utils import UserError, run_script, script_parser

import torch
from rival_methods import RIVALS, Rival
from torch import Tensor


class Learner:
    """A rival in the place of StraightThrough; make: the rival, from (model, masks, norms, n, m, weights)."""

    def __init__(self, masked: MaskedModel, make: Callable[..., Rival]):
        self.masked, self.make, masked.learner = masked, make, self
        masked.mode_bits, masked.changed = self.mode_bits, self.changed

    def begin(self, norms: dict[str, Tensor]) -> None:
        """From m0; norms: of the layers' inputs in the dense model."""
        masked, space = self.masked, self.masked.space
        self.rival = self.make(masked.model, masked.masks_of(masked.bits()), norms, space.n, space.m,
                               weights={name: layer.weight for name, layer in masked.layers.items()})
        for parameter in self.rival.parameters.values():
            self.rival.optimizer.state[parameter] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(parameter),
                                                     "exp_avg_sq": torch.zeros_like(parameter)}

    def step(self, batch: Tensor, _size: float, progress: float, distill: list[float]) -> StepResult:
        """As StraightThrough's; the size of the step is Adam's own."""
        batch, teacher = batch.to(input_device(self.masked.model)), None
        if any(distill):
            with torch.no_grad(), self.masked.use_dense():
                teacher = self.masked.model(input_ids=batch, use_cache=False).logits
        return StepResult([self.rival.move(batch, teacher, distill, progress)])

    def mode_bits(self) -> dict[str, Tensor]:
        """The rival's mask."""
        return {name: self.masked.layers[name].bits_of(mask) for name, mask in self.rival.masks().items()}

    def changed(self) -> float:
        """The share of blocks whose mask is not m0's."""
        m0 = self.masked.bits()  # no logits of its own move
        return sum(int((bits != m0[name]).sum()) for name, bits in self.mode_bits().items()) / self.masked.blocks

    def state(self) -> tuple[dict, dict[str, Tensor]]:
        """Parameters, Adam's moments, the norms, the state of the random numbers."""
        rival, tensors = self.rival, {"random": self.rival.generator.get_state()}
        for name, parameter in rival.parameters.items():
            of_adam = {f"{key}.{name}": tensor for key, tensor in rival.optimizer.state[parameter].items()}
            tensors |= {f"norms.{name}": rival.norms[name], f"parameter.{name}": parameter.detach(), **of_adam}
        return {}, tensors

    def restore(self, _scalars: dict, read: Callable) -> None:
        """From `state`."""
        layers = self.masked.layers
        self.begin({name: read(f"norms.{name}", torch.empty(layer.shape[1])) for name, layer in layers.items()})
        self.rival.generator.set_state(read("random", self.rival.generator.get_state()))
        for name, parameter in self.rival.parameters.items():
            parameter.data.copy_(read(f"parameter.{name}", parameter).view_as(parameter))
            for key, tensor in self.rival.optimizer.state[parameter].items():
                tensor.copy_(read(f"{key}.{name}", tensor.view(-1)).view_as(tensor))

    def remove(self) -> None:
        """Give the modules their own forward back."""
        for module in self.rival.layers.values():
            del module.forward


def start(masked: MaskedModel, _how: str, _magnitude: float, sequences: Tensor, _seed: int,
          validation: Validation) -> None:
    """In place of initialize.start: m0 is evaluated and stays."""
    validation.evaluate(0)
    modules = {name: layer.module for name, layer in masked.layers.items()}
    with masked.use_dense():
        norms = input_norms(masked.model, modules, sequences[:initialize.SEQUENCES])
    masked.learner.begin(norms)


def parse_args(argv: list[str]) -> Namespace:
    """sparsify.py's, behind a method."""
    parser = script_parser(__doc__)
    parser.add_argument("method", choices=list(RIVALS), help="then flags of sparsify.py")
    return sparsify.parse_args(parser.parse_known_args(argv)[1])


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args, method = parse_args(argv), argv[0]

    def work(_args: Namespace, device: str | None, folder: RunFolder, signals: StopSignals) -> None:
        further = {"strength": 200.0, "steps": args.steps} if method == "proxsparse" else {}
        if folder.record.setdefault("rival", method) != method:
            raise UserError(f"{args.resume} is a run of {folder.record['rival']}")

        def learner(masked: MaskedModel, *_: object) -> Learner:
            made = Learner(masked, lambda *given, **weights: RIVALS[method](
                *given, lr=args.lr, seed=args.seed, **weights, **further))
            masked.handles.append(made)
            return made
        sparsify.StraightThrough, initialize.start = learner, start
        sparsify.sparsify(args, device, folder, signals)
    arguments.run("rival.py", args, work)


if __name__ == "__main__":
    run_script(main)
