"""The table of sparse_inference.py, on a CPU: dense parameters stand in for the compressed ones."""

import pytest
import sparse_inference
import torch
from torch import nn


@pytest.mark.parametrize("searches", [True, False])
def test_each_shape_and_number_of_tokens_has_a_row_with_the_fastest(monkeypatch, searches):
    def stand_in(weight):
        parameter = nn.Parameter(weight, requires_grad=False)
        parameter.packed = weight
        return parameter

    monkeypatch.setattr(sparse_inference, "sparse_parameter", stand_in)
    searched = []
    monkeypatch.setattr(
        torch,
        "_cslt_sparse_mm_search",
        lambda packed, x, transpose_result: searched.append((*packed.shape, x.shape[1])) or 3,
    )
    rows = sparse_inference.compare("tiny", torch.float32, [1, 9], "cpu", 0, 1, 1, searches)
    shapes = {row["what"] for row in rows if row["what"].startswith("Linear")}
    assert len(rows) == 2 * (len(shapes) + 1)  # and the model
    assert all(row["max difference / max output"] == 0 for row in rows)
    choices = ("dense", "2:4", "searched")[: 3 if searches else 2]
    assert all(row["fastest"] in choices for row in rows)
    # once per shape and number of tokens, which is padded to a multiple of 8
    wanted = [tuple(map(int, shape[7:].split("x"))) for shape in shapes] if searches else []
    assert sorted(searched) == sorted((*shape, count) for shape in wanted for count in (8, 16))
