"""torch.compile as the kernels use it: many shapes, any thread, and what happens without a working
compiler."""

import subprocess
import threading

from masking.compiler import compiled, on_gpu
from masking.slicing import FEW, one_block_a_thread
from training.distillation import summed_loss
from training.straight_through import weight_gradient
from utils import UserError

import pytest
import torch
from masked import Launches
from torch._subclasses.fake_tensor import FakeTensorMode


def must_compile(*_):
    pytest.fail("ran eagerly")


def test_more_shapes_than_torch_allows_by_itself_compile_in_any_thread(compiler, monkeypatch):
    """torch's limit is 8 and, from 2.13 on, a thread's own. What it refuses has the eager form."""
    results, run = [], compiled(lambda x: x * 2, lambda x: x * 3)
    thread = threading.Thread(
        target=lambda: results.extend(run(torch.ones(size)) for size in range(2, 14))
    )
    thread.start()
    thread.join()
    assert [len(result) for result in results] == list(range(2, 14)) and all(
        (result == 2).all() for result in results
    )
    monkeypatch.setattr("masking.compiler._allow_shapes", lambda: None)
    with torch._dynamo.config.patch(cache_size_limit=2):
        assert float(run(torch.ones(14))[0]) == 3


@pytest.mark.parametrize(
    "error", [RuntimeError("no compiler"), subprocess.CalledProcessError(1, "gcc")]
)
def test_without_a_working_compiler_the_step_runs_eagerly_and_says_so_once(
    compiler, monkeypatch, capsys, error
):
    def broken(*_, **__):
        raise error

    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    run = compiled(lambda x: x * 3, lambda x: x * 2)
    assert [float(run(torch.tensor(1.0))) for _ in range(3)] == [2.0] * 3
    said = capsys.readouterr().err
    assert said.count("note: torch.compile failed") == 1 and "Traceback" not in said


def test_a_compiler_that_fails_on_a_gpu_is_an_error_with_its_remedy(compiler, monkeypatch):
    """Eager passes take a GPU 25 times as long."""

    def broken(*_, **__):
        raise RuntimeError("fatal error: Python.h: No such file")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    monkeypatch.setattr("masking.compiler.on_gpu", lambda _: True)
    with pytest.raises(
        UserError, match=r"Python\.h: No such file.*install gcc.*TORCH_COMPILE_DISABLE=1"
    ):
        compiled(torch.neg, must_compile)(torch.ones(2))


def test_tensors_on_a_gpu_are_found_in_lists():
    assert (
        on_gpu((1, [torch.ones(2), FakeTensorMode().from_tensor(torch.ones(2)), "cuda"])) is False
    )
    with FakeTensorMode():
        assert on_gpu((1, [torch.ones(2), (torch.empty(2, device="cuda"),)]))


def test_a_pass_of_one_block_a_thread_is_compiled_once_for_all_sizes(compiler, monkeypatch):
    """By a first call with few blocks, of which nothing is kept; see `one_block_a_thread`."""

    def work(logits, bits, saliency, dtype, scale, start=0):
        logits[0].add_(saliency[0] * scale[0])
        bits.add_(1)
        return logits[0] + start

    sizes, compile_function = [], torch.compile

    def backend(graph_module, inputs):
        sizes.append(
            {
                int(size)
                for tensor in inputs
                if isinstance(tensor, torch.Tensor)
                for size in tensor.shape
            }
        )
        return graph_module.forward

    monkeypatch.setattr(
        torch,
        "compile",
        lambda function, dynamic, fullgraph, options: compile_function(
            function, dynamic=dynamic, fullgraph=fullgraph, backend=backend
        ),
    )
    run = one_block_a_thread(work, must_compile)
    scales = torch.arange(12.0).view(3, 4)
    for row, (blocks, start) in enumerate([(300, 0), (5000, 7), (700, 0)]):
        logits, saliency = [torch.ones(blocks)], [torch.full((blocks,), 2.0)]
        bits = torch.zeros(blocks, dtype=torch.uint8)
        moved = run(logits, bits, saliency, torch.float32, scales[row], start=start)
        assert (bits == 1).all() and (logits[0] == 1 + 2 * scales[row, 0]).all()
        assert torch.equal(moved, logits[0] + start)
    assert sizes == [{FEW, 4}]


def test_mistakes_and_a_lack_of_memory_keep_their_traceback(compiler, monkeypatch):
    def mistaken(x):
        return x + torch.ones(3)

    def too_large(*_):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(torch, "compile", lambda *_, **__: too_large)
        compiled(too_large, must_compile)(torch.ones(2))
    with pytest.raises(RuntimeError, match="size"):
        compiled(mistaken, mistaken)(torch.ones(2))


def test_a_minibatch_of_many_sequences_waits_no_more_than_one_of_two():
    logits, tokens, counts = torch.randn(16, 8, 32), torch.arange(128).view(16, 8) % 32, []
    for sequences in (2, 16):
        with Launches() as launches:
            summed_loss(logits[:sequences], tokens[:sequences])
        counts.append(launches.waits)
    assert counts[0] == counts[1]


def test_float16_gradients_that_a_sum_over_tokens_overflows_are_finite():
    upstream, x = (
        torch.full((64, 3), 200.0, dtype=torch.float16),
        torch.full((64, 5), 60.0, dtype=torch.float16),
    )
    assert (upstream.T @ x).isinf().all()  # 64 * 200 * 60
    assert torch.equal(weight_gradient(upstream, x), torch.full((3, 5), 768000.0))
