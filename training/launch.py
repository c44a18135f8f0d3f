"""Start a run of train.py or sparsify.py: processes, folder, signals."""

from argparse import Namespace
from collections.abc import Callable

from masking import compiler
from models import processes
from models.machine import checked_device, dtype_name
from training.run_folder import RunFolder, is_finished, remove_state
from training.signals import StopSignals


def launch(script: str, args: Namespace, work: Callable) -> None:
    """Call `work(args, device, folder, signals)` in all processes of the run, in the run's own
    folder."""
    if args.resume and is_finished(args.resume):
        remove_state(args.resume)  # it may have been killed before it removed this
        print(f"{args.resume} is finished: its mask is in {args.resume}/mask.safetensors")
        return
    with processes.joined(args.device) as device:
        # the dtype is recorded, and kept if the run is resumed on another device
        args.dtype = dtype_name(args.dtype, checked_device(device))
        with (
            RunFolder(args.out, vars(args), script, bool(args.resume)) as folder,
            StopSignals() as signals,
        ):
            if processes.world_size() > 1:
                compiler.agree(device)
            work(args, device, folder, signals)
