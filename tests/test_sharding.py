"""A model in pieces (FSDP) trains, saves, resumes, evaluates and draws like whole ones."""
import importlib.util
import os

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from PIL import Image
from safetensors.torch import load_file

from musekit.models.uvit import MaskGiTUViT
from musekit.training.callbacks import (
    Checkpoint,
    Evaluate,
    Log,
    SampleImages,
    gradient_norms,
    token_diagnostics,
)
from musekit.training.ema import evaluating
from musekit.training.distributed import gathered
from musekit.training.checkpoint import checkpoints
from musekit.training.log import read_log
from toy_training import STEPS, launch, tiny_trainer, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "train.parquet")


def in_pieces(precision="no", **options):
    "Accelerate with FSDP, which it would set up on GPUs alone, on CPUs."
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **options)
    accelerator = Accelerator(cpu=True, mixed_precision=precision, step_scheduler_with_optimizer=False)
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    if precision != "no":
        plugin.set_mixed_precision(precision)
    accelerator.state.fsdp_plugin = plugin
    return accelerator


def run(folder, data, rank, accelerator, *overrides):
    drawn = []

    def sample(network, step):  # the processes call the network differently often
        with torch.no_grad():
            for _ in range(1 + rank):
                network(torch.full((1, 16), 64), torch.zeros(1, 5, 16), torch.zeros(1, 16), torch.zeros(1, 5))
        drawn.append(step)
        return Image.new("RGB", (4, 4))

    usual = [Log(1), Evaluate(4), SampleImages(sample, 5), Checkpoint(3, limit=2)]
    trainer = tiny_trainer(folder, data, *overrides, callbacks=usual, accelerator=accelerator)
    trainer.eval_batches = [batch for _, batch in zip(range(3 - rank), trainer.data(0))]
    trainer.fit()
    network = trainer.network
    with evaluating(network, trainer.ema) as averaged:
        average = torch.cat([p.flatten() for p in averaged.parameters()])
    held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in network.parameters())
    weights = gathered(network)
    return {
        "weights": weights,
        "average": average,
        "held": held,
        "all": sum(w.numel() for w in weights.values()),
        "drawn": drawn,
        "lengths": list(gradient_norms(trainer).values()),
        "entropy": token_diagnostics(trainer, "image_entropy"),
        "step": trainer.step,
    }


def pieces(folder, data, rank):
    return run(folder, data, rank, in_pieces())


def one_step(folder, data, rank):
    trainer = tiny_trainer(
        folder,
        data,
        callbacks=[],
        accelerator=in_pieces(cpu_ram_efficient_loading=bool(os.environ.get("LOADED_BY_ONE"))),
    )
    trainer.train_step()
    return gathered(trainer.network)


def whole_models(folder, data, rank):
    return run(folder, data, rank, None)


def half_way(folder, data, rank):
    return run(
        folder,
        data,
        rank,
        in_pieces(),
        "training.max_train_steps=12",
        "experiment.resume_from_checkpoint=checkpoint-9",
    )


@pytest.fixture(scope="module")
def both(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return folder, launch(pieces, folder / "pieces", data), launch(whole_models, folder / "whole", data)


def test_pieces_train_like_whole_models(both):
    folder, cut, whole = both
    curve = lambda name: torch.tensor([line["loss"] for line in read_log(folder / name) if "loss" in line])
    assert (
        torch.allclose(curve("pieces"), curve("whole"), rtol=0, atol=1e-5) and len(curve("pieces")) == STEPS
    )
    for name, weight in whole[0]["weights"].items():
        assert torch.allclose(cut[0]["weights"][name], weight, rtol=0, atol=1e-4), name
    assert torch.allclose(cut[0]["average"], whole[0]["average"], rtol=0, atol=1e-4)
    assert cut[0]["lengths"] == pytest.approx(whole[0]["lengths"], abs=1e-4)
    assert cut[0]["entropy"] == pytest.approx(whole[0]["entropy"], abs=1e-4)


def test_each_process_holds_a_piece(both):
    _, cut, whole = both
    assert whole[0]["held"] == whole[0]["all"]
    assert cut[0]["held"] + cut[1]["held"] == cut[0]["all"] and 0.3 < cut[0]["held"] / cut[0]["all"] < 0.7


def test_evaluation_and_drawing_wait_for_nobody(both):
    folder, cut, whole = both
    assert cut[0]["drawn"] == cut[1]["drawn"] == whole[0]["drawn"] == [5, 10, 12]
    evaluations = lambda name: [
        (line["step"], line["eval_examples"]) for line in read_log(folder / name) if "eval_loss" in line
    ]
    assert evaluations("pieces") == evaluations("whole") == [(4, 15), (8, 15), (12, 15)]


def test_checkpoints_hold_the_whole_model(both):
    folder, cut, _ = both
    assert [path.name for path in checkpoints(folder / "pieces")] == ["checkpoint-9", "checkpoint-12"]
    last = folder / "pieces" / "checkpoint-12"
    stored = MaskGiTUViT.from_pretrained(last / "unwrapped_model").state_dict()
    assert all(torch.equal(stored[name], weight) for name, weight in cut[0]["weights"].items())
    average = MaskGiTUViT.from_pretrained(last / "ema_model")
    assert torch.equal(torch.cat([p.flatten() for p in average.parameters()]), cut[0]["average"])
    final = load_file(folder / "pieces" / "model.safetensors")
    assert all(torch.equal(final[name], weight) for name, weight in average.state_dict().items())


def test_a_resumed_run_in_pieces_has_the_same_bits(both, data):
    folder, cut, _ = both
    again = launch(half_way, folder / "pieces", data)
    for rank in (0, 1):
        assert again[rank]["step"] == 12 and torch.equal(again[rank]["average"], cut[rank]["average"])
        assert all(
            torch.equal(again[rank]["weights"][name], weight) for name, weight in cut[rank]["weights"].items()
        )


def test_weights_that_one_process_loads_reach_all(data, tmp_path):
    usual = launch(one_step, tmp_path / "usual", data)
    for weights in launch(one_step, tmp_path / "by_one", data, environment={"LOADED_BY_ONE": "1"}):
        assert all(torch.equal(weights[name], weight) for name, weight in usual[0].items())


def half_precision(folder, data, rank):
    cut = os.environ.get("IN_PIECES")
    trainer = tiny_trainer(
        folder,
        data,
        "training.mixed_precision=bf16",
        callbacks=[],
        accelerator=in_pieces("bf16") if cut else None,
    )
    losses = []
    for _ in range(4):
        trainer.train_step()
        losses.append(trainer.metrics["loss"])
    kinds = {p.dtype for p in trainer.network.parameters()} | {s.dtype for s in trainer.ema.shadow}
    return {"losses": torch.stack(losses), "kinds": [str(kind) for kind in kinds]}


def test_half_precision_keeps_full_weights(data, tmp_path):
    cut = launch(half_precision, tmp_path / "cut", data, environment={"IN_PIECES": "1"})
    whole = launch(half_precision, tmp_path / "whole", data)
    assert cut[0]["kinds"] == whole[0]["kinds"] == ["torch.float32"]
    assert torch.allclose(cut[0]["losses"], whole[0]["losses"], atol=0.1)


def with_deepspeed():
    "Accelerate with DeepSpeed, which it would set up on GPUs alone, on CPUs."
    from accelerate.utils import DeepSpeedPlugin

    plugin = DeepSpeedPlugin(zero_stage=2)
    accelerator = Accelerator(cpu=True, step_scheduler_with_optimizer=False)
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.DEEPSPEED
    plugin.set_mixed_precision("no")
    plugin.select(_from_accelerator_state=True)
    AcceleratorState._shared_state["deepspeed_plugins"] = {"default": plugin}
    accelerator.deepspeed_engine_wrapped = None
    return accelerator


@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed, and a compiler for its operators"
)
def test_deepspeed_trains_like_whole_models(both, data, tmp_path):
    folder, _, whole = both
    launch(deepspeed, tmp_path, data, environment={"DS_ACCELERATOR": "cpu"})
    curve = lambda folder: torch.tensor([line["loss"] for line in read_log(folder) if "loss" in line])
    assert (
        torch.allclose(curve(tmp_path), curve(folder / "whole"), rtol=0, atol=1e-4)
        and len(curve(tmp_path)) == STEPS
    )
    stored = MaskGiTUViT.from_pretrained(tmp_path / "checkpoint-12" / "ema_model")
    assert torch.allclose(
        torch.cat([p.flatten() for p in stored.parameters()]), whole[0]["average"], rtol=0, atol=1e-3
    )
    before = load_file(tmp_path / "model.safetensors")
    launch(deepspeed_again, tmp_path, data, environment={"DS_ACCELERATOR": "cpu"})
    assert all(
        torch.equal(weight, before[name])
        for name, weight in load_file(tmp_path / "model.safetensors").items()
    )


def deepspeed(folder, data, rank, *overrides):
    trainer = tiny_trainer(
        folder, data, *overrides, callbacks=[Log(1), Checkpoint(3)], accelerator=with_deepspeed()
    )
    trainer.fit()
    return {"step": trainer.step}


def deepspeed_again(folder, data, rank):
    return deepspeed(folder, data, rank, "experiment.resume_from_checkpoint=checkpoint-9")
