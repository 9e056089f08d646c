"""Samplers, guidance and truncation on the demo's model: alignment, cleanness and variety of the images.

    musekit demo --out runs/demo
    python tests/benchmarks/samplers.py runs/demo/pipeline tests/benchmarks/samplers.json

Generates 400 held-out prompts for each setting and seed. About fifteen minutes on one core with two seeds.
`--only adaptive` measures adaptive samplers alone, and keeps the other measurements in the file.
"""
import argparse
import json
from pathlib import Path

from musekit.core.decoding import model_calls
from musekit.data.digits import test_prompts
from musekit.evaluation.digits import DigitJudge, distinctness, score
from musekit.inference.pipeline import Pipeline

SAMPLERS = {
    "confidence": {}, "entropy": {}, "random": {}, "halton": {}, "first_hitting": {},
    "remasking": {"sampler_params": {"eta": 0.1}},
}
STEPS = (1, 2, 4, 8, 16)
ADAPTIVE = {  # beside entropy order with a fixed number of steps
    "entropy": ("steps", (2, 4, 8)),
    "entropy_bounded": ("gamma", (30.0, 10.0, 3.0)),
    "confidence_threshold": ("threshold", (0.3, 0.5, 0.7)),
}
MAX_STEPS = 64  # of adaptive samplers: all tokens
PLAIN = {"sampling_temperature": 1.0, "min_p": 0.0, "corrections": 0}
GUIDANCE = {
    "none": {"guidance_scale": 1.0},
    "constant": {},
    "linear": {"guidance_schedule": "linear"},
    "cosine": {"guidance_schedule": "cosine"},
    "power-cosine": {"guidance_schedule": "power-cosine"},
    "first half": {"guidance_interval": (0.0, 0.5)},
    "second half": {"guidance_interval": (0.5, 1.0)},
}
TRUNCATION = {
    "plain": {},
    "min_p": {"min_p": 0.1},
    "correction": {"min_p": 0.1, "corrections": 1},
    "temperature 4": {"min_p": 0.1, "corrections": 1, "sampling_temperature": 4.0},
}
SCALES = (1.0, 1.5, 3.0)


def measure(pipeline, judge, prompts, seed, **options):
    "Prompt alignment, cleanness and variety of one image for each prompt."
    passes, records = [], []
    hook = pipeline.transformer.register_forward_pre_hook(lambda module, args: passes.append(len(args[0])))
    texts = [prompt["text"] for prompt in prompts]
    images = pipeline(
        texts, seed=seed, batch_size=100, callback=lambda step, record: records.append(record), **options
    )
    hook.remove()
    right = score(judge, images, prompts)["overall"]
    varied = distinctness(judge, images, [prompt["digit"] for prompt in prompts])["mean"]
    shares = {name: right[name] for name in ("joint", "digit", "clean")}
    cost = {"passes": sum(passes) / len(prompts), "calls": float(model_calls(records).double().mean())}
    return {**shares, "distinctness": varied, "seed": seed, **cost}


def settings():
    "What is compared, cheap ones first."
    for steps in STEPS:
        for name, options in SAMPLERS.items():
            yield {"comparison": "samplers", "name": name, "steps": steps}, {
                "sampler": name,
                "steps": steps,
                **options,
            }
    for name, (parameter, values) in ADAPTIVE.items():
        for value in values:
            if parameter == "steps":
                options = {"steps": value}
            else:
                options = {"steps": MAX_STEPS, "sampler_params": {parameter: value}}
            yield {"comparison": "adaptive", "name": name, parameter: value}, {"sampler": name, **options}
    for name, options in GUIDANCE.items():
        yield {"comparison": "guidance", "name": name, "steps": 16}, {
            "steps": 16,
            "guidance_scale": 3.0,
            **PLAIN,
            **options,
        }
    for scale in SCALES:
        for name, options in TRUNCATION.items():
            yield {"comparison": "truncation", "name": name, "steps": 16, "scale": scale}, {
                "steps": 16,
                "guidance_scale": scale,
                **PLAIN,
                **options,
            }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pipeline")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--only", metavar="COMPARISON")
    options = parser.parse_args()
    pipeline, judge, prompts = (
        Pipeline.from_pretrained(options.pipeline),
        DigitJudge(),
        test_prompts(options.prompts),
    )
    chosen = [(label, how) for label, how in settings() if options.only in (None, label["comparison"])]
    rows = json.loads(options.out.read_text()) if options.only and options.out.exists() else []
    rows = [row for row in rows if row["comparison"] != options.only]
    for seed in range(options.seeds):
        for label, how in chosen:
            measured = measure(pipeline, judge, prompts, seed, **how)
            rows.append({**label, **measured, "prompts": len(prompts)})
            print(rows[-1], flush=True)
            options.out.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


if __name__ == "__main__":
    main()
