"""torch.compile as the kernels use it: many shapes, any thread, and what happens without a working compiler."""
import subprocess
import threading

from masking.compiler import compiled
from training.loss import summed_loss
from training.straight_through import weight_gradient

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


def must_compile(*_):
    pytest.fail("ran eagerly")


def test_more_shapes_than_torch_allows_by_itself_compile_in_any_thread(compiler, monkeypatch):
    """torch's limit is 8 and, from 2.13 on, a thread's own. What it refuses has the eager form."""
    results, run = [], compiled(lambda x: x * 2, lambda x: x * 3)
    thread = threading.Thread(target=lambda: results.extend(run(torch.ones(size)) for size in range(2, 14)))
    thread.start()
    thread.join()
    assert [len(result) for result in results] == list(range(2, 14)) and all((result == 2).all() for result in results)
    monkeypatch.setattr("masking.compiler._allow_shapes", lambda: None)
    with torch._dynamo.config.patch(cache_size_limit=2):
        assert float(run(torch.ones(14))[0]) == 3


@pytest.mark.parametrize("error", [RuntimeError("no compiler"), subprocess.CalledProcessError(1, "gcc")])
def test_without_a_working_compiler_the_step_runs_eagerly_and_says_so_once(compiler, monkeypatch, capsys, error):
    def broken(*_, **__):
        raise error
    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    run = compiled(lambda x: x * 3, lambda x: x * 2)
    assert [float(run(torch.tensor(1.0))) for _ in range(3)] == [2.0] * 3
    said = capsys.readouterr().err
    assert said.count("note: torch.compile failed") == 1 and "Traceback" not in said


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


class Waits(TorchDispatchMode):
    """Counts how often a number is fetched from the device, which on a GPU makes the host wait."""
    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += operator is torch.ops.aten._local_scalar_dense.default
        return operator(*args, **kwargs or {})


def test_a_minibatch_of_many_sequences_waits_no_more_than_one_of_two():
    logits, tokens, counts = torch.randn(16, 8, 32), torch.arange(128).view(16, 8) % 32, []
    for sequences in (2, 16):
        with Waits() as waits:
            summed_loss(logits[:sequences], tokens[:sequences])
        counts.append(waits.count)
    assert counts[0] == counts[1]


def test_float16_gradients_that_a_sum_over_tokens_overflows_are_finite():
    upstream, x = torch.full((64, 3), 200.0, dtype=torch.float16), torch.full((64, 5), 60.0, dtype=torch.float16)
    assert (upstream.T @ x).isinf().all()  # 64 * 200 * 60
    assert torch.equal(weight_gradient(upstream, x), torch.full((3, 5), 768000.0))
