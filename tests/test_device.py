"""Scripts on a device that is not the CPU: what a GPU would find on the wrong one, found without it."""
import json

import pytest
import tiny
import torch
from launched import ROOT, Launched
from safetensors.torch import load_file
from torch.utils import backend_registration

DEVICES = "cpu", "elsewhere"
LINES = """
prune.py --dataset {text} --nsamples 4 --seqlen 32 --swaps 1 --true_sequential --save_model {out}/pruned
inference_loss.py --mask {m0} {data} --save {out}/baseline.npz
train.py --mask {m0} {data} --baseline {out}/baseline.npz --init scores --val_fraction 0.5 --logits 2 --max_step 2 \
    --logits_dtype float16 --skip_checkpoint --out {out}/train
sparsify.py --steps 2 --batchsize 4 --seqlen 16 --microbatch 2 --after {text} --ppl {text} --targets layers.1. \
    --permute --gradient_checkpointing --out {out}/sparsify
eval.py --mask {out}/train --ppl {text} --seqlen 32 --nwindows 4 --save {out}/evaluation.json
""".strip().splitlines()


@pytest.mark.skipif(not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
                    reason="this torch has no devices that are written in Python")
def test_nothing_is_left_behind_on_the_cpu(models, text_and_masks, tmp_path):
    """tests/elsewhere.py refuses operations on tensors of both devices; what the scripts write is what they write on
    the CPU."""
    text, m0 = tiny.write_corpus(tmp_path / "text.jsonl", 6), text_and_masks / "2_4.safetensors"
    lines = [f"{line} --model {models['llama']} --dtype float32 --device {device}".format(
                 text=text, m0=m0, out=tmp_path / device,
                 data=f"--dataset {text} --dataset_size 4 --batchsize 2 --seqlen 16")
             for device in DEVICES for line in LINES]
    launched = Launched(1, [ROOT / "tests/elsewhere.py", *lines], tmp_path / "log")
    assert launched.wait() == 0, launched.said
    files = sorted(file.relative_to(tmp_path / "cpu") for name in ("mask", "model")
                   for file in (tmp_path / "cpu").rglob(f"{name}.safetensors"))
    assert len(files) == 4
    for file in files:
        expected, found = (load_file(tmp_path / device / file) for device in DEVICES)
        assert all(torch.equal(found[name], expected[name]) for name in expected), file
    expected, found = (json.loads((tmp_path / device / "evaluation.json").read_text())["nats"] for device in DEVICES)
    assert found == pytest.approx(expected, rel=1e-6)  # attention may round otherwise
