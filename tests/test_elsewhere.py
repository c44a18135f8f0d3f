"""Both scripts on another device, and on two: the bits of the CPU, and nothing left behind
there."""

import pytest
from launched import ROOT, Launched
from masked import same
from runs import column, read_run
from safetensors.torch import load_file
from torch.utils import backend_registration

DEVICES = "cpu", "elsewhere", "both"
LINES = """
train.py --mask {w}/mask.safetensors --dataset {w}/text.jsonl --dataset_size 4 --batchsize 2 \
    --baseline online \
    --init scores --logits 2 --lr 200 --max_step 2 --logits_dtype float16
sparsify.py --after {w}/text.jsonl --steps 9 --batchsize 4 --microbatch 2 --lr 1 --logits 0.5 \
    --permute --gradient_checkpointing
""".strip().splitlines()


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices that are written in Python",
)
def test_nothing_is_left_behind_on_the_cpu(workshop, tmp_path):
    """elsewhere.py refuses operations on tensors of both devices. Masks and models are the same on
    each."""
    lines = [
        f"{line.format(w=workshop)} --model {workshop}/dense --dtype float32 --device {device} "
        f"--seqlen 16 --targets down_proj --out {tmp_path}/{device}_{line.partition('.')[0]}"
        for device in DEVICES
        for line in LINES
    ]
    launched = Launched(1, [ROOT / "tests/elsewhere.py", *lines], tmp_path / "said.txt")
    assert launched.wait() == 0, launched.said
    for script in ("train", "sparsify"):
        assert column(read_run(tmp_path / f"cpu_{script}"), "changed")[-1] > 0
        for name in ("mask.safetensors", "checkpoint/model.safetensors"):
            expected, *others = (
                load_file(tmp_path / f"{device}_{script}" / name) for device in DEVICES
            )
            assert all(same(found, expected) for found in others), (script, name)
