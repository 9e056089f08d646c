"""What each of the demo's settings gains: seconds, memory and scores with it and without it.

    python tests/benchmarks/demo.py tests/benchmarks/demo.json --threads 1

Trains the demo with three seeds, and with seed 0 without one setting at a time; about half an hour on two
cores. Runs that the file already holds are not repeated.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

WITHOUT = {
    "": [],
    "200 steps": ["steps=1000"],
    "bf16": ["training.mixed_precision=no"],
    "linear schedule": ["lr_scheduler.scheduler=cosine"],
    "small tokenizer batches": [
        "model.vq_model.train.batch_size=32", "model.vq_model.train.steps=900",
        "model.vq_model.train.learning_rate=0.015",
    ],
    "short text encoder training": ["model.text_encoder.train.steps=600"],
    "short captions": ["dataset.preprocessing.max_seq_length=20"],
    "Muon": ["optimizer.name=fused_adamw"],
}


def processor_seconds():
    "The processor time of finished child processes."
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(seed, overrides, threads):
    "Trains and scores a demo in a process of its own."
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    before = processor_seconds()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "musekit", "demo", "--out", folder, "--seed", str(seed), *overrides]
        subprocess.run(command, check=True, env=environment)
        results = json.loads((Path(folder) / "results.json").read_text())
    return {
        "joint": results["overall"]["joint"], "clean": results["overall"]["clean"],
        "distinctness": results["distinctness"], "psnr": results["tokenizer"]["psnr"],
        "peak_memory_gb": results["peak_memory_gb"],
        "seconds": {name: round(seconds, 1) for name, seconds in results["seconds"].items()},
        "processor_seconds": round(processor_seconds() - before, 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="JSON file, continued if it exists")
    parser.add_argument("--threads", type=int, help="of each run; all cores by default")
    parser.add_argument("--only", nargs="*", default=list(WITHOUT), help="settings to leave out")
    options = parser.parse_args()
    rows = json.loads(options.out.read_text()) if options.out.exists() else []
    for name in options.only:
        for seed in (0, 1, 2) if not name else (0,):
            place = {"without": name, "seed": seed, "threads": options.threads}
            if any(place.items() <= row.items() for row in rows):
                continue
            rows.append(place | run(seed, WITHOUT[name], options.threads))
            lines = ",\n".join(json.dumps(row) for row in rows)
            options.out.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
