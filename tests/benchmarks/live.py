"""How much slower training is while it is watched live in a notebook.

    python tests/benchmarks/live.py [--blocks 10] [--seconds 10] [--share 0.01]

Starts a notebook kernel and trains in it, in blocks of some seconds that are watched and not watched by
turns, so that whatever else the machine does meets both alike. Reports the ratio of a step's time and of its
processor time, watched to not watched, of neighbouring blocks: the median and the quartiles; and the share
that the callback itself measured. On a busy machine only the processor time tells. Watched training runs in a
thread, so that the notebook stays usable; unwatched training runs as in any cell, in the main thread. So the
ratio holds all that watching costs: the drawing, the counting and the second thread.
"""
import argparse
import json
import statistics

from jupyter_client.manager import start_new_kernel

WORK = """
import itertools, json, tempfile, time
import torch
from musekit.lab.live import LiveTraining
from musekit.models.uvit import MaskGiTUViT
from musekit.training.config import load_config
from musekit.training.trainer import Trainer

blocks, seconds, share = {blocks}, {seconds}, {share}

def batches(start_batch=0):
    words = torch.rand(32, 1, 20)
    for number in itertools.count(start_batch):
        ids = torch.randint(512, (32, 64), generator=torch.Generator().manual_seed(number))
        states = dict(cond_embeds=words[:, 0], encoder_hidden_states=words)
        yield dict(image_ids=ids, micro_conds=torch.ones(32, 5), **states)

class Block:
    "Counts the steps of a block, and stops it."
    def on_start(self, trainer):
        self.began, self.cpu = time.perf_counter(), time.process_time()
        self.steps = 0
    def on_step(self, trainer):
        self.steps += 1
        self.took, self.used = time.perf_counter() - self.began, time.process_time() - self.cpu
        trainer.stop = trainer.stop or self.took > seconds
    def on_end(self, trainer): pass

sizes = dict(hidden_size=64, in_channels=32, block_out_channels=(32,), block_num_heads=2,
             num_res_blocks=1, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
             micro_cond_encode_dim=4, micro_cond_embed_dim=20)
model = MaskGiTUViT(513, 512, encoder_hidden_size=20, cond_embed_dim=20, default_shape=(8, 8), **sizes)
settings = ["data=digits", "model.architecture=uvit", "training.cond_dropout_prob=0",
            "training.max_train_steps=100000000"]
config = load_config(None, ["experiment.output_dir=" + tempfile.mkdtemp(), *settings])
trainer = Trainer(model, batches, config)
panel = LiveTraining(trainer, share)
display(panel)
watching, block = panel.live, Block()

def run(watched):
    # the block is counted last, so that what is drawn in its last step counts too
    trainer.callbacks[:] = [watching, block] if watched else [block]
    trainer.stop, before = False, watching.spent
    if watched:
        panel.resume()
        panel.wait()
    else:
        trainer.fit()
    return dict(watched=watched, step=block.took / block.steps, cpu=block.used / block.steps,
                share=(watching.spent - before) / block.took)

run(True), run(False)
turns = [turn for number in range(blocks) for turn in ((True, False) if number % 2 else (False, True))]
results = [run(watched) for watched in turns]
facts = dict(points=len(watching.curve.means), device=str(trainer.accelerator.device))
print("RESULTS " + json.dumps(dict(blocks=results, **facts)))
"""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=10, help="pairs of blocks (default: %(default)s)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=10.0,
        help="length of a block; a new thread starts slowly (default: %(default)s)",
    )
    parser.add_argument("--share", type=float, default=0.01, help="as in LiveTraining (default: %(default)s)")
    options = parser.parse_args()
    manager, client = start_new_kernel()
    said = []

    def hear(message):
        content = message["content"]
        if message["msg_type"] == "stream" and content["name"] == "stdout":
            said.append(content["text"])
        elif message["msg_type"] == "error":
            raise RuntimeError("\n".join(content["traceback"]))

    try:
        client.execute_interactive(WORK.format(**vars(options)), output_hook=hear, timeout=None)
    finally:
        client.stop_channels()
        manager.shutdown_kernel()
    results = json.loads("".join(said).split("RESULTS ")[1])
    blocks = results["blocks"]
    pairs = [sorted(blocks[i : i + 2], key=lambda block: block["watched"]) for i in range(0, len(blocks), 2)]
    quartiles = lambda kind: statistics.quantiles(
        [watched[kind] / alone[kind] for alone, watched in pairs], n=4
    )
    share = statistics.mean(watched["share"] for _, watched in pairs)
    alone = statistics.median(one["step"] for one, _ in pairs)
    print(
        f"on {results['device']}, {len(pairs)} pairs of {options.seconds:g} s, a step takes"
        f" {1000 * alone:.1f} ms unwatched"
    )
    for kind, name in (("step", "time"), ("cpu", "processor time of the process")):
        low, middle, high = quartiles(kind)
        print(f"watched to unwatched, {name}: {middle:.3f} (quartiles {low:.3f} and {high:.3f})")
    print(f"drawing took {share:.2%} of the time")


if __name__ == "__main__":
    main()
