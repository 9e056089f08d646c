"""Micro-batches, however they are cut and whatever their labels count, give the gradient of the whole."""
import pytest
import torch

from musekit.core.masking import MaskedTokens
from musekit.training.trainer import MicroBatch
from toy_training import tiny_trainer, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "train.parquet")


def gradient(trainer):
    return torch.cat([p.grad.flatten() for p in trainer.network.parameters()])


def without_dropout(trainer):
    for module in trainer.network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return trainer


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["training.label_smoothing=0.1"],
        ["training.predict_all_tokens=true"],
        ["training.noise_type=random_replace"],
    ],
)
@pytest.mark.parametrize("parts", [2, 4])
def test_gradient_of_parts_is_that_of_the_whole(data, tmp_path, parts, options):
    cut = [f"training.gradient_accumulation_steps={parts}", "training.max_grad_norm=null", *options]
    trainer = without_dropout(tiny_trainer(tmp_path, data, *cut, callbacks=[]))
    seen, make = [], trainer.make_micro_batch
    trainer.make_micro_batch = lambda *args, **kwargs: seen.append(make(*args, **kwargs)) or seen[-1]
    before = {name: p.detach().clone() for name, p in trainer.network.named_parameters()}
    trainer.train_step()
    accumulated, logged = gradient(trainer).clone(), trainer.metrics["loss"]

    trainer.network.load_state_dict(before)
    trainer.network.zero_grad()
    fields = ("input_ids", "labels", "mask", "ratio", "loss_weight")
    joined = [
        torch.cat([getattr(m.tokens, f) for m in seen]) if getattr(seen[0].tokens, f) is not None else None
        for f in fields
    ]
    conditions = {name: torch.cat([m.conditions[name] for m in seen]) for name in seen[0].conditions}
    loss = trainer.loss(
        trainer.network,
        MicroBatch(MaskedTokens(*joined), conditions),
        trainer.config.training.label_smoothing,
    )
    loss.backward()
    assert len({int(m.weight) for m in seen}) > 1 or "predict_all_tokens" in str(options)
    assert abs(logged - loss.detach()) < 1e-6
    assert torch.allclose(accumulated, gradient(trainer), atol=1e-6)
