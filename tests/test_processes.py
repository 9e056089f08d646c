"""Two processes: they mask differently, average correctly, keep equal weights, and stop and fail together."""
import os
import signal

import pytest
import torch

from musekit.data.token_parquet import EncodedDataset, encoded_loader
from musekit.core.diagnostics import bucket_sums, image_entropy, mask_bucket, token_probability_histogram
from musekit.core.masking import MaskedTokens
from musekit.recipes.clip import ClipRun, Pairs
from musekit.training.callbacks import Callback, Checkpoint, Evaluate, Log, token_diagnostics
from musekit.training.checkpoint import checkpoints, latest_checkpoint
from musekit.training.distributed import new_accelerator
from musekit.training.log import read_log
from musekit.training.loop import Loop
from musekit.training.schema import Run, Steps
from musekit.utils.seeds import step_seed
from musekit.training.trainer import MicroBatch
from toy_training import STEPS, all_weights, launch, tiny_trainer, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "train.parquet")


def one_step(folder, data, rank):
    trainer = tiny_trainer(folder, data, "training.max_grad_norm=null", callbacks=[])
    for module in trainer.network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    seen = []
    make = trainer.make_micro_batch
    trainer.make_micro_batch = lambda *args, **kwargs: seen.append(make(*args, **kwargs)) or seen[-1]
    trainer.train_step()
    return {
        "gradient": torch.cat([p.grad.flatten() for p in trainer.network.parameters()]),
        "weights": all_weights(trainer),
        "masks": torch.cat([m.tokens.mask for m in seen]),
        "input_ids": torch.cat([m.tokens.input_ids for m in seen]),
        "labels": torch.cat([m.tokens.labels for m in seen]),
        "conditions": {name: torch.cat([m.conditions[name] for m in seen]) for name in seen[0].conditions},
        "loss": trainer.metrics["loss"],
        "ids": torch.cat([m.tokens.labels.where(m.tokens.mask, m.tokens.input_ids) for m in seen]),
    }


def test_gradient_is_that_of_one_large_batch(data, tmp_path):
    first, second = launch(one_step, tmp_path / "two", data)
    assert not torch.equal(first["masks"], second["masks"])
    assert not torch.equal(first["ids"], second["ids"])
    assert torch.equal(first["weights"], second["weights"])
    assert torch.equal(first["gradient"], second["gradient"])

    trainer = tiny_trainer(tmp_path / "one", data, callbacks=[])
    both = lambda name: torch.cat([first[name], second[name]])
    tokens = MaskedTokens(both("input_ids"), both("labels"), both("masks"), torch.zeros(12), None)
    conditions = {
        name: torch.cat([first["conditions"][name], second["conditions"][name]])
        for name in first["conditions"]
    }
    loss = trainer.loss(trainer.network.eval(), MicroBatch(tokens, conditions))
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in trainer.network.parameters()])
    assert torch.allclose(gradient, first["gradient"], atol=1e-6)
    assert abs((first["loss"] + second["loss"]) / 2 - loss) < 1e-6


class StopOne(Callback):
    "SIGTERM reaches one process only."

    def on_step(self, trainer):
        if trainer.step == 4 and trainer.accelerator.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def stopped(folder, data, rank):
    trainer = tiny_trainer(folder, data, callbacks=[Log(2), StopOne(), Checkpoint(100)]).fit()
    return {"step": trainer.step, "weights": all_weights(trainer)}


def whole(folder, data, rank):
    trainer = tiny_trainer(folder, data, callbacks=[Log(2), Evaluate(5), Checkpoint(100)])
    batches = [
        batch for _, batch in zip(range(3 - rank), trainer.data(0))
    ]  # processes with different numbers of batches
    trainer.eval_batches = batches
    trainer.fit()
    return {"step": trainer.step, "weights": all_weights(trainer)}


def test_processes_stop_and_resume_together(data, tmp_path):
    first, second = launch(stopped, tmp_path / "run", data)
    assert first["step"] == second["step"] < 12
    assert latest_checkpoint(tmp_path / "run").name == f"checkpoint-{first['step']}"
    resumed = launch(whole, tmp_path / "run", data)
    calm = launch(whole, tmp_path / "calm", data)
    assert torch.equal(resumed[0]["weights"], resumed[1]["weights"])
    assert torch.equal(resumed[0]["weights"], calm[0]["weights"])
    assert checkpoints(tmp_path / "calm")[-1].name == "checkpoint-12"
    assert [line["eval_examples"] for line in read_log(tmp_path / "calm") if "eval_loss" in line] == [
        15,
        15,
        15,
    ]


class Slope(Loop):
    "A loop of its own, which neither knows nor asks about signals."

    def __init__(self, folder, callbacks):
        settings = Steps(batch_size=1, max_train_steps=STEPS, seed=0, max_grad_norm=None)
        config = ClipRun(Run(output_dir=str(folder)), settings)
        accelerator = new_accelerator(False, mixed_precision="no")
        super().__init__([{"x": 1.0}, {"x": 2.0}], config, accelerator, callbacks)
        network = torch.nn.Linear(1, 1)
        optimizer = torch.optim.SGD(network.parameters(), 0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        prepared = self.accelerator.prepare(network, optimizer, schedule)
        self.model, self.optimizer, self.scheduler = prepared

    def make_micro_batch(self, batch, step, number):
        return Pairs(torch.tensor([[batch["x"]]]), torch.tensor([[0]]))

    def forward(self, micro_batch):
        return {"loss": self.model(micro_batch.pixel_values).square().mean()}


def sloping(folder, data, rank):
    loop = Slope(folder, [StopOne()]).fit()
    return {"step": loop.step, "stop": loop.stop}


def test_any_loop_stops_in_all_processes(tmp_path):
    first, second = launch(sloping, tmp_path / "run", None)
    assert first == second and first["stop"] and 4 <= first["step"] < STEPS


def broken_at_four(folder, data, rank):
    trainer = tiny_trainer(folder, data, callbacks=[])
    loss = trainer.loss
    if rank == 1:
        trainer.loss = lambda *arguments: loss(*arguments) * (float("nan") if trainer.step == 3 else 1)
    try:
        trainer.fit()
    except ValueError as error:
        return {"step": trainer.step, "weights": all_weights(trainer), "error": str(error)}
    return {"step": trainer.step, "weights": all_weights(trainer), "error": ""}


def test_a_loss_that_is_no_number_ends_all_processes(data, tmp_path):
    fine, broken = launch(broken_at_four, tmp_path / "run", data)
    assert fine["step"] == broken["step"] == 3
    assert torch.equal(fine["weights"], broken["weights"]) and fine["weights"].isfinite().all()
    assert "step 4 is not finite" in broken["error"] and "another process" not in broken["error"]
    assert "step 4 is not finite" in fine["error"] and "in another process" in fine["error"]


def diagnosed(folder, data, rank):
    trainer = tiny_trainer(folder, data, callbacks=[])
    trainer.train_step()
    values = token_diagnostics(trainer, "image_entropy", "token_probabilities")
    micro = trainer.last_micro
    mask = micro.tokens.mask
    with torch.no_grad():
        logits = trainer.network.eval()(micro.tokens.input_ids, **micro.conditions, token_mask=mask)
    return {
        "values": values,
        "sums": bucket_sums(image_entropy(logits, mask), mask_bucket(mask)),
        "histogram": token_probability_histogram(logits, mask),
        "hidden": bucket_sums(mask.sum(-1), mask_bucket(mask))[0],
    }


def test_diagnostics_cover_all_processes(data, tmp_path):
    first, second = launch(diagnosed, tmp_path / "run", data)
    assert first["values"] == second["values"]
    assert not torch.equal(first["sums"], second["sums"])
    sums, counts = first["sums"] + second["sums"]
    table = torch.tensor(first["values"].pop("token_probabilities"))
    expected = {
        f"image_entropy/{tenth / 10:.1f}": mean
        for tenth, mean in enumerate((sums / counts).tolist())
        if counts[tenth]
    }
    assert first["values"] == pytest.approx(expected)
    weighted = [rank["histogram"].nan_to_num(0.0) * rank["hidden"][:, None] for rank in (first, second)]
    expected = sum(weighted) / (first["hidden"] + second["hidden"])[:, None]
    assert torch.allclose(table, expected.nan_to_num(0.0), atol=1e-6)


def curve(folder, data, rank):
    "The losses of a run of two processes, and the mean of a gradient's length, without dropout."
    trainer = calm_trainer(folder, data)
    return follow(trainer)


def calm_trainer(folder, data):
    trainer = tiny_trainer(folder, data, callbacks=[])
    for module in trainer.network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return trainer


def follow(trainer):
    losses, lengths = [], []
    for _ in range(STEPS):
        trainer.train_step()
        losses.append(trainer.reduce(trainer.metrics["loss"], "mean"))
        lengths.append(trainer.metrics["grad_norm"])
    return {"losses": torch.stack(losses), "lengths": torch.stack(lengths), "weights": all_weights(trainer)}


def joined(one, two):
    "The micro-batches of two processes as one of twice the size."
    tensors = {
        name: torch.cat([getattr(one.tokens, name), getattr(two.tokens, name)])
        for name in ("input_ids", "labels", "mask", "ratio")
    }
    conditions = {name: torch.cat([one.conditions[name], two.conditions[name]]) for name in one.conditions}
    return MicroBatch(MaskedTokens(**tensors, loss_weight=None), conditions)


def test_the_curve_is_that_of_one_process_with_twice_the_batch(data, tmp_path):
    first, second = launch(curve, tmp_path / "two", data)
    assert torch.equal(first["losses"], second["losses"]) and torch.equal(first["weights"], second["weights"])

    alone = calm_trainer(tmp_path / "one", data)
    make, dataset, rank = alone.make_micro_batch, EncodedDataset(data), [0]
    reads = [
        encoded_loader(dataset, 3, training=True, seed=alone.config.training.seed, rank=r, world_size=2)
        for r in range(2)
    ]
    alone.data = lambda start: zip(*reads)
    alone._seed = lambda *place: step_seed(alone.config.training.seed, rank[0], *place)

    def make_both(pair, *place):
        parts = []
        for rank[0], batch in enumerate(pair):  # each half masked and dropped as its process would
            parts.append(make(batch, *place))
        rank[0] = 0
        return joined(*parts)

    alone.make_micro_batch = make_both
    large = follow(alone)
    assert torch.allclose(large["losses"], first["losses"], rtol=0, atol=1e-5)
    assert torch.allclose(large["lengths"], first["lengths"], rtol=1e-4)
    assert torch.allclose(large["weights"], first["weights"], rtol=0, atol=1e-4)
