"""Experiment trackers, each optional: a run's numbers to TensorBoard or Weights & Biases besides metrics.jsonl.

Each goes on where `step` steps are done: what a killed run had told of later ones is taken back or said again.
"""
from importlib import import_module
from pathlib import Path
from statistics import mean

from utils import UserError


class TensorBoard:
    """Writes event files to RUN/tensorboard."""

    def __init__(self, folder: Path, arguments: dict, name: str, step: int):
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)
        self.writer.add_text("arguments", "\n".join(f"    {name}: {value}" for name, value in arguments.items()))

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run of the project `maskpro`, named as its folder; `name` is the one by which it is found again."""

    def __init__(self, folder: Path, arguments: dict, name: str, step: int):
        import wandb
        self.run = wandb.init(project="maskpro", name=folder.name, dir=str(folder), config=arguments, id=name,
                              resume="allow")

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def flush(self) -> None:
        pass  # its own process has the numbers and outlives this one

    def close(self) -> None:
        self.run.finish()


def chosen(tensorboard: bool, wandb: bool) -> list[type]:
    """The wanted trackers' classes; UserError for one whose library is missing, before anything has run."""
    wanted = [(TensorBoard, "tensorboard")] * tensorboard + [(WandB, "wandb")] * wandb
    for _, library in wanted:
        try:
            import_module(library)
        except ImportError:
            raise UserError(f"{library} is missing; install it with: pip install {library}")
    return [tracker for tracker, _ in wanted]


def scalars(line: dict, stats: dict | None) -> dict[str, float]:
    """What a tracker is told of a step: the numbers of its line of metrics.jsonl, and the layers' means if there."""
    values = {name: value for name, value in line.items() if name != "step" and value is not None}
    for name in ("changed", "entropy") if stats else ():
        values[name] = mean(stats[name].values())
    return values
