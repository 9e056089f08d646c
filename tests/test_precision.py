"""Half precision: what is computed in it, what is kept in full, and what happens when it overflows."""
import pytest
import torch

from children import CHILDREN
from toy_training import tiny_trainer, write_data


def run(folder, data, precision, pipe):
    trainer = tiny_trainer(folder, data, f"training.mixed_precision={precision}", callbacks=[])
    kinds, losses = set(), []
    for module in trainer.network.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, inputs, answer: kinds.add(str(answer.dtype)))
    for _ in range(4):
        trainer.train_step()
        losses.append(trainer.metrics["loss"].item())
    weights = {str(tensor.dtype) for tensor in [*trainer.network.parameters(), *trainer.ema.shadow]}
    pipe.send((sorted(kinds), losses, sorted(weights), trainer.accelerator.scaler is not None))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("precision")
    data = write_data(folder / "train.parquet")

    def run_in_a_child(precision):
        ours, theirs = CHILDREN.Pipe()
        child = CHILDREN.Process(target=run, args=(str(folder / precision), str(data), precision, theirs))
        child.start()
        child.join(120)
        assert child.exitcode == 0
        return ours.recv()

    return run_in_a_child


def test_half_precision(runs):
    kinds, full, weights, _ = runs("no")
    assert kinds == weights == ["torch.float32"]
    kinds, half, weights, scaled = runs("bf16")
    assert "torch.bfloat16" in kinds and weights == ["torch.float32"] and not scaled
    assert half == pytest.approx(full, abs=0.1) and half != full


def test_fp16(runs):
    if not torch.cuda.is_available():
        pytest.skip(
            "accelerate trains in fp16 on GPUs alone; nbs/04_training/10_callbacks.ipynb shows on a CPU how"
            " an overflowing step is skipped"
        )
    kinds, half, weights, scaled = runs("fp16")
    assert "torch.float16" in kinds and weights == ["torch.float32"] and scaled
