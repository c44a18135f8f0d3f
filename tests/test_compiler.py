"""torch.compile as the kernels use it: many shapes, any thread, and what happens without a working compiler."""
import subprocess
import threading
from importlib import import_module

import pytest
import torch
from masked import magnitude_masks
from torch.utils._python_dispatch import TorchDispatchMode

from masking import compiler, exact_kernels
from masking.kernels import Kernels
from masking.masked_model import MaskedModel
from masking.spaces import LinearSpace
from models.layers import find_layers
from training.loss import summed_loss
from training.straight_through import weight_gradient


@pytest.fixture(autouse=True)
def nothing_compiled():
    compiler.compiled.cache_clear()
    torch._dynamo.reset()
    yield
    compiler.compiled.cache_clear()
    torch._dynamo.reset()


def test_more_shapes_than_torch_allows_by_itself_compile_in_any_thread():
    """torch's limit is 8 and, from 2.13 on, a thread's own; what it refuses runs eagerly, and calls `seen` again."""
    calls = []

    def double(x):
        calls.append(torch.compiler.is_compiling())
        return x * 2
    run = compiler.compiled(double, lambda x: pytest.fail("ran eagerly"))
    results = []
    thread = threading.Thread(target=lambda: results.extend(run(torch.ones(size)) for size in range(2, 14)))
    thread.start()
    thread.join()
    assert [len(result) for result in results] == list(range(2, 14)) and all((result == 2).all() for result in results)
    assert calls and all(calls)  # traced, never run as plain Python


def failures():
    """Each exception that this torch raises where no compiler works, constructed."""
    found = [subprocess.CalledProcessError(1, "gcc")]
    for place in ("torch._dynamo.exc", "torch._inductor.exc"):
        for name in ("BackendCompilerFailed", "CppCompileError", "InvalidCxxCompiler", "InductorError", "TritonMissing",
                     "GPUTooOldForTriton"):
            kind = getattr(import_module(place), name, None)
            if kind and kind not in map(type, found):
                error = kind.__new__(kind)
                RuntimeError.__init__(error, "no compiler here")
                found.append(error)
    return found


@pytest.mark.parametrize("error", failures(), ids=lambda error: type(error).__name__)
def test_without_a_working_compiler_the_step_runs_eagerly_and_says_so_once(monkeypatch, capsys, error):
    def broken(*_, **__):
        def run(*_, **__):
            raise error
        return run
    monkeypatch.setattr(torch, "compile", broken)
    run = compiler.compiled(lambda x: x * 3, lambda x: x * 2)
    assert [float(run(torch.tensor(1.0))) for _ in range(3)] == [2.0] * 3
    said = capsys.readouterr().err
    assert said.count("note: no working compiler") == 1 and "Traceback" not in said


def test_other_mistakes_keep_their_traceback():
    def mistaken(x):
        return x + torch.ones(3)
    run = compiler.compiled(mistaken, lambda x: pytest.fail("ran eagerly"))
    with pytest.raises(Exception, match=r"(?i)size|shape|broadcast"):
        run(torch.ones(2))


def test_chunks_are_larger_where_launches_are_dear():
    class OnGpu:
        device = torch.device("cuda")
    assert exact_kernels.chunk_of(torch.ones(1)) == 2**18
    assert exact_kernels.chunk_of(OnGpu()) == 2**22


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_are_read_as_words_to_the_bit(dtype):
    """Weights and gradients of 16 bits at M = 4 are unpacked inside the pass: the same logits as from planes."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(16, 32, generator=generator).to(dtype)
    gradient = torch.cat([torch.randn(500, generator=generator).to(dtype), torch.tensor(
        [0.0, -0.0, 1e-7, -6e-8, 65504.0, -65504.0, 1e-5, 2e-38, 3.0, -1.0, 0.5, 7.0], dtype=torch.float64).to(dtype)])
    gradient = gradient.view(16, 32)
    results = []
    for words in (True, False):
        logits = [torch.linspace(-2, 2, 128) * (i + 1) for i in range(4)]
        bits, key = torch.zeros(128, dtype=torch.uint8), torch.tensor([5, 6, 0, 0], dtype=torch.int32)
        scale = torch.tensor([0.3, 0.1, 1.0, 0.0])
        kernels = Kernels(LinearSpace(2, 4), "eager")
        given = (weight, gradient) if words else (weight.float(), gradient.float())
        squares = kernels.vjp(logits, bits, *given, None, scale, key)
        results.append((*logits, bits, squares))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_a_block_whose_gradient_is_not_finite_is_told():
    for dtype, mode in ((torch.float16, "eager"), (torch.float32, "eager"), (torch.float32, "exact")):
        weight, gradient = torch.ones(2, 8, dtype=dtype), torch.ones(2, 8, dtype=dtype)
        gradient[1, 5] = torch.inf
        logits, bits = [torch.zeros(4) for _ in range(4)], torch.zeros(4, dtype=torch.uint8)
        squares = Kernels(LinearSpace(2, 4), mode).vjp(logits, bits, weight, gradient, None, torch.ones(4),
                                                       torch.zeros(4, dtype=torch.int32))
        assert squares.isnan().tolist() == [False, False, False, True]
        assert all(plane.isfinite().all() for plane in logits)


class Waits(TorchDispatchMode):
    """Counts how often a number is fetched from the device, which on a GPU makes the host wait."""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **kwargs or {})


def test_a_minibatch_of_many_sequences_waits_no_more_than_one_of_two():
    logits = torch.randn(16, 8, 32, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(128).view(16, 8) % 32
    counts = []
    for sequences in (2, 16):
        with Waits() as waits:
            summed_loss(logits[:sequences], tokens[:sequences])
        counts.append(waits.count)
    assert counts[0] == counts[1]


def test_logits_start_where_they_are_kept(load):
    """No plane is made on the host and copied: 25,000 copies for 7B on a GPU."""
    made = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            if isinstance(result, torch.Tensor) and result.device.type == "cpu" and result.is_floating_point():
                made.append(result.numel())
            return result
    model, masks = load(), magnitude_masks(find_layers(load()))
    blocks = sum(mask.numel() for mask in masks.values()) // 4
    with torch.device("meta"):
        model = model.to("meta")
    with Copies():
        MaskedModel(model, masks, LinearSpace(2, 4), mode="eager")
    assert sum(made) < blocks


def test_float16_gradients_that_a_sum_over_tokens_overflows_are_finite():
    upstream, x = torch.full((64, 3), 200.0, dtype=torch.float16), torch.full((64, 5), 60.0, dtype=torch.float16)
    assert (upstream.T @ x).isinf().all()  # 64 * 200 * 60
    assert torch.equal(weight_gradient(upstream, x), torch.full((3, 5), 768000.0))


def test_float32_weights_at_m_2_are_a_word_too():
    """8 bytes as well: the words hold two float32 numbers, not four of 16 bits."""
    generator = torch.Generator().manual_seed(4)
    weight, gradient = (torch.randn(4, 6, generator=generator) for _ in range(2))
    moved = []
    for mode in ("eager", "exact"):
        logits = [torch.zeros(12) for _ in range(2)]
        Kernels(LinearSpace(1, 2), mode).vjp(logits, None, weight, gradient, None, torch.ones(4),
                                             torch.zeros(4, dtype=torch.int32))
        moved.append(torch.stack(logits))
    assert torch.allclose(*moved, atol=1e-5) and moved[0].abs().max() > 0.1
