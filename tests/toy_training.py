"""A tiny U-ViT on a small pre-encoded file: what the tests of the training floor train."""
import os
import signal
import socket

import torch

from children import CHILDREN
from musekit.data.token_parquet import EncodedDataset, encode_dataset, encoded_loader
from musekit.models.uvit import MaskGiTUViT
from musekit.training.callbacks import Callback, Checkpoint, Log
from musekit.training.config import load_config
from musekit.training.trainer import Trainer

STEPS, SAVE_EVERY = 12, 3


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class DieAt(Callback):
    def __init__(self, step):
        super().__init__()
        self.step = step

    def on_step(self, trainer):
        if trainer.step == self.step:
            die()


class RandomEncoder:
    "Stands in for the image tokenizer and the text encoder."

    def __call__(self, batch):
        rows = len(batch["pixel_values"])
        generator = torch.Generator().manual_seed(batch["number"])
        start = torch.randint(64, (rows, 1), generator=generator)
        return {
            "image_ids": (start + torch.arange(16)) % 64,
            "encoder_hidden_states": torch.randn(rows, 5, 16, generator=generator),
            "cond_embeds": torch.randn(rows, 16, generator=generator),
            "micro_conds": torch.tensor([[32.0, 32, 0, 0, 6]]).repeat(rows, 1),
        }

    def unconditional(self):
        return {"encoder_hidden_states": torch.zeros(5, 16), "cond_embeds": torch.zeros(16)}


def write_data(path):
    batches = [{"pixel_values": torch.zeros(8, 3, 32, 32), "text": ["x"] * 8, "number": i} for i in range(5)]
    encode_dataset(batches, RandomEncoder(), path)
    return path


def tiny_model():
    torch.manual_seed(0)
    return MaskGiTUViT(
        vocab_size=65,
        codebook_size=64,
        hidden_size=32,
        in_channels=16,
        block_out_channels=(16,),
        num_res_blocks=1,
        block_num_heads=2,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        encoder_hidden_size=16,
        cond_embed_dim=16,
        micro_cond_encode_dim=8,
        micro_cond_embed_dim=40,
        hidden_dropout=0.1,
    )


def tiny_trainer(folder, data, *overrides, callbacks=None, accelerator=None):
    torch.set_num_threads(1)
    config = load_config(
        None,
        [
            f"experiment.output_dir={folder}",
            f"data={data}",
            "model.architecture=uvit",
            "experiment.log_every=2",
            "training.batch_size=3",
            "training.gradient_accumulation_steps=2",
            "training.use_ema=true",
            "training.max_grad_norm=1",
            "training.ema_decay=0.9",
            f"training.max_train_steps={STEPS}",
            "optimizer.params.learning_rate=1e-2",
            "lr_scheduler.scheduler=cosine",
            "lr_scheduler.params.warmup_steps=2",
            "training.mask_contiguous_region_prob=0.3",
            "experiment.resume_from_checkpoint=latest",
            *overrides,
        ],
    )
    dataset, world = EncodedDataset(data), {}

    def batches(start):
        return encoded_loader(
            dataset,
            config.training.batch_size,
            training=True,
            seed=config.training.seed,
            start_batch=start,
            **world,
        )

    if callbacks is None:
        callbacks = [Log(config.experiment.log_every), Checkpoint(SAVE_EVERY, limit=2)]
    trainer = Trainer(
        tiny_model(),
        batches,
        config,
        unconditional=dataset.unconditional,
        callbacks=callbacks,
        accelerator=accelerator,
    )
    world |= {"rank": trainer.accelerator.process_index, "world_size": trainer.accelerator.num_processes}
    return trainer


def all_weights(trainer):
    return torch.cat([p.detach().flatten() for p in [*trainer.network.parameters(), *trainer.ema.shadow]])


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(function, folder, data, processes=2, environment=()):
    "Runs `function(folder, data, rank)` in each process; gives what they returned."
    arguments = function, str(folder), str(data), processes, free_port(), dict(environment)
    started = [CHILDREN.Process(target=_enter, args=(rank, *arguments)) for rank in range(processes)]
    for child in started:
        child.start()
    for child in started:
        child.join(120)
    assert [child.exitcode for child in started] == [0] * processes
    return [torch.load(f"{folder}/rank{rank}.pt", weights_only=True) for rank in range(processes)]


def _enter(rank, function, folder, data, processes, port, environment):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
        **environment,
    }
    os.makedirs(folder, exist_ok=True)
    torch.save(function(folder, data, rank), f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()
