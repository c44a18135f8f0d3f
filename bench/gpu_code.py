"""Inspects the code that torch.compile generates for a GPU, without a GPU: kernels, registers,
spilled bytes, compile time.

    python bench/gpu_code.py --json gpu_code.json       # as for an H100
    python bench/gpu_code.py --capability 80 --rows 2:4,loss

It needs the CUDA build of torch, which brings Triton, but no card: the passes of the scripts run on
fake tensors, which have shapes but no values, and each kernel that they would launch is assembled
for the given compute capability.

A thread has at most 255 registers and spills the rest to memory, which is slow: a thousand spilled
bytes per thread cost more than all the rest of a pass. Inductor tries several configurations of a
kernel on the card, without those that spill more than SKIPPED bytes, unless all do. `spilled` is
the maximum over the configurations that may run. A row is WRONG if it exceeds MOST, or if a pass at
2:4 in 16 bits takes more than one kernel.
"""

import argparse
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

import common
from files.records import write_json
from masking.compiler import compiled
from masking.kernels import Kernels
from masking.spaces import LinearSpace
from training.distillation import sequence_loss
from utils import UserError, run_script

import torch
from gpu_layer import Layer
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import compile_fx, config, scheduler
from torch._inductor.codecache import PyCodeCache
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode

PATTERNS = [(2, 4), (1, 4), (2, 8), (4, 8), (8, 16)]
SHAPE = 4096, 11008  # shape of the layer
LOGITS = 127, 32000  # shape of the loss's logits: tokens, vocabulary
# bytes per thread
SKIPPED = 64
MOST = 256
KERNEL = re.compile(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str", re.DOTALL)


class Configuration(NamedTuple):
    """A configuration of a kernel: elements, registers and spilled bytes per thread."""

    elements: float
    registers: int
    spilled: int


def card(capability: int) -> SimpleNamespace:
    """Return the properties that Inductor reads from a card: an H100's, with this compute
    capability (90 is 9.0)."""
    return SimpleNamespace(
        major=capability // 10,
        minor=capability % 10,
        multi_processor_count=132,
        warp_size=32,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
    )


@contextmanager
def pretended(capability: int) -> Iterator[None]:
    """Have Inductor and Triton generate code as if there were such a card, inside the block."""
    properties = card(capability)
    answers = [
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "get_device_capability", lambda *_: (properties.major, properties.minor)),
        (CudaInterface, "is_available", staticmethod(lambda: True)),
        (CudaInterface, "get_device_properties", staticmethod(lambda *_: properties)),
        (CudaInterface, "get_compute_capability", staticmethod(lambda *_: capability)),
        (CudaInterface.Worker, "get_device_properties", staticmethod(lambda *_: properties)),
        (scheduler, "has_triton", lambda *_: True),
        (torch.utils._triton, "triton_hash_with_backend", lambda: "none"),
        (triton_helpers, "set_driver_to_gpu", lambda: None),
    ]
    with ExitStack() as stack:
        for owner, name, answer in answers:
            stack.enter_context(patch.object(owner, name, answer))
        yield


class Generator:
    """A backend of torch.compile that generates code for a GPU, stores it in `codes`, and runs the
    graph uncompiled."""

    def __init__(self, capability: int):
        self.capability = capability
        self.codes: list[str] = []

    def __call__(self, graph_module: torch.fx.GraphModule, inputs: list) -> Callable:
        return compile_fx.compile_fx(graph_module, inputs, inner_compile=self._generate)

    def _generate(self, graph_module: torch.fx.GraphModule, inputs: list, **_: object) -> Callable:
        compile_fx.record_original_output_strides(graph_module)
        with pretended(self.capability):
            graph = GraphLowering(
                graph_module,
                example_inputs=inputs,
                is_inference=True,
                shape_env=compile_fx.shape_env_from_inputs(inputs),
            )
            with DebugContext(), V.set_graph_handler(graph), V.set_extern_kernel_nodes([]):
                graph.freeze_runtime_asserts()
                graph.run(*inputs)
                self.codes.append(graph.codegen()[0].value)
        return graph_module.forward


def generated(work: Callable[[], object], capability: int) -> list[str]:
    """Return the code of each function that `work` compiles, in the order of their first calls."""
    generator = Generator(capability)
    compile_function = torch.compile

    def with_generator(
        function: Callable, dynamic: bool, fullgraph: bool, options: dict
    ) -> Callable:
        inner = compile_function(function, backend=generator, dynamic=dynamic, fullgraph=fullgraph)

        def run(*args: object, **names: object) -> object:
            # folding constants would compute on the device
            with config.patch(**options, joint_graph_constant_folding=False):
                return inner(*args, **names)

        return run

    compiled.cache_clear()
    torch._dynamo.reset()
    with patch.object(torch, "compile", with_generator), FakeTensorMode(allow_non_fake_inputs=True):
        work()
    return generator.codes


def assembled(code: str, capability: int) -> list[list[Configuration]]:
    """Assemble the kernels of a generated function; return the configurations of each."""
    kernels = []
    for name, source in KERNEL.findall(code):
        with pretended(capability), config.patch(use_static_triton_launcher=False):
            kernel = getattr(PyCodeCache.load(source), name)
            binaries = [
                kernel._precompile_config(choice).kernel.asm["cubin"] for choice in kernel.configs
            ]
        kernels.append(
            [
                Configuration(elements_a_thread(choice), *resources(binary))
                for choice, binary in zip(kernel.configs, binaries)
            ]
        )
    return kernels


def elements_a_thread(choice: object) -> float:
    """Return how many elements each thread computes at a time."""
    blocks = [size for name, size in choice.kwargs.items() if name.endswith("BLOCK")]
    return math.prod(blocks) / (32 * choice.num_warps)


def resources(binary: bytes) -> tuple[int, int]:
    """Return the registers and the bytes of stack per thread of an assembled kernel."""
    from triton.backends import nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        said = subprocess.run(
            [Path(nvidia.__file__).parent / "bin" / "cuobjdump", "-res-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", said).groups()
    return int(registers), int(stack)


def that_may_run(configurations: list[Configuration]) -> list[Configuration]:
    """Return the configurations among which Inductor chooses by time: those that do not spill too
    much, or all if every one does."""
    return [one for one in configurations if one.spilled <= SKIPPED] or configurations


def passes(
    n: int, m: int, weights: torch.dtype, logits: torch.dtype
) -> dict[str, Callable[[], None]]:
    """Return the passes of the scripts over a layer, by name; call them on fake tensors."""

    def layer() -> Layer:
        return Layer(SHAPE, n, m, weights, logits, "cuda")

    def write() -> None:
        one = layer()
        one.kernels.write(one.weight.view(-1), one.bits, one.out)

    found = {
        "update": lambda: layer().update(),
        "vjp": lambda: layer().vjp(),
        "write": write,
        "write soft": lambda: layer().write_soft(),
    }
    if not Kernels(LinearSpace(n, m)).is_fused:
        del found["update"]  # it runs eagerly
    return found


def loss() -> None:
    """Compute the loss of a sequence with a teacher."""
    logits = torch.empty(*LOGITS, dtype=torch.bfloat16, device="cuda")
    tokens = torch.empty(LOGITS[0], 1, dtype=torch.int64, device="cuda")
    compiled(sequence_loss, sequence_loss)(logits, tokens, logits.clone(), 0.5)


def cases() -> dict[str, Callable[[], None]]:
    """Return the functions that are compiled, by the names of their rows."""
    found = {}
    dtypes = [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.float16)]
    for n, m in PATTERNS:
        for weights, logits in dtypes if (n, m) == (2, 4) else dtypes[:1]:
            for name, work in passes(n, m, weights, logits).items():
                row = f"{n}:{m} {name}, weights {weights}, logits {logits}".replace("torch.", "")
                found[row] = work
    return {**found, "loss, bfloat16": loss}


def row_of(name: str, work: Callable[[], None], capability: int) -> dict:
    """Generate and assemble the code of `work`; return its row, column -> cell."""
    began = time.perf_counter()
    codes = generated(work, capability)
    generated_s = time.perf_counter() - began
    kernels = [kernel for code in codes for kernel in assembled(code, capability)]
    runs = [one for kernel in kernels for one in that_may_run(kernel)]
    spilled = max((one.spilled for one in runs), default=0)
    is_one_pass = name.startswith("2:4") and len(kernels) != 1
    return {
        "what": name,
        "kernels": len(kernels),
        "elements a thread": " or ".join(f"{one.elements:g}" for one in runs),
        "registers": max((one.registers for one in runs), default=0),
        "spilled (bytes)": spilled,
        "Inductor (s)": generated_s,
        "Triton and ptxas (s)": time.perf_counter() - began - generated_s,
        "verdict": "WRONG" if spilled > MOST or is_one_pass or not kernels else "right",
    }


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument(
        "--capability",
        type=int,
        default=90,
        help="compute capability times ten: 80 is an A100, 90 an H100",
    )
    parser.add_argument(
        "--rows", default="", help="only rows whose names contain one of these, comma-separated"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if torch.version.cuda is None:
        raise UserError(
            "this torch is a CPU build, which has no Triton: install the CUDA build, for which no "
            "card is needed"
        )
    works = cases()
    rows = []
    conditions = common.conditions_of(args)
    for name in common.chosen(works, args.rows):
        rows.append(row_of(name, works[name], args.capability))
        print(f"{name}: {rows[-1]['verdict']}", file=sys.stderr)
        if args.json:
            write_json(args.json, [{**row, **conditions} for row in rows])
    common.report(rows, args)
    raise SystemExit(any(row["verdict"] == "WRONG" for row in rows))


if __name__ == "__main__":
    run_script(main)
