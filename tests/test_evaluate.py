"""What a run shows and how it is judged: figures while it goes on, fillings, evaluation at the end,
`musekit evaluate`."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

from musekit.cli import main
from musekit.models.text_encoders import ClassEncoder, TextEncoder
from musekit.recipes.clip import ClipTrainingConfig, build_clip, text_tower, train_clip_bpe
from musekit.data.digits import draw, test_prompts as held_out_prompts
from musekit.data.token_parquet import EncodedDataset, encoded_loader
from musekit.evaluation.features import collect_features
from musekit.data.masks import read_inpainting
from musekit.data.packing import write_shards
from musekit.evaluation.metrics import DigitFeatures
from musekit.models.paella_vq import PaellaVQModel
from musekit.models.transformer import MaskGitTransformer
from musekit.models.uvit import MaskGiTUViT
from musekit.inference.pipeline import Pipeline
from musekit.plots import run_figures
from musekit.recipes.text_to_image import drawn_by_all, inpainting_sheet
from musekit.training.callbacks import (
    Callback,
    diagnostic_callbacks,
    standard_callbacks,
    validation_loss,
)
from musekit.training.log import read_log
from toy_training import launch
from toy_training import tiny_trainer, write_data

DIAGNOSTICS = [
    "grad_norm",
    "pixel_entropy",
    "image_entropy",
    "cross_entropy",
    "token_probability_distributions",
]


def pipeline_of(captions, levels=2):
    "An untrained pipeline of 32 x 32 pixels, and its whole CLIP and tokenizer."
    torch.manual_seed(0)
    words = train_clip_bpe(captions, 600, 16)
    config = ClipTrainingConfig(hidden_size=32, layers=1, patch_size=8, projection_dim=16, max_seq_length=16)
    clip = build_clip(words, 32, config)
    side = 32 >> levels
    uvit = MaskGiTUViT(
        65,
        64,
        encoder_hidden_size=32,
        cond_embed_dim=16,
        default_shape=(side, side),
        hidden_size=32,
        in_channels=16,
        block_out_channels=(16,),
        block_num_heads=2,
        num_res_blocks=1,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        micro_cond_encode_dim=4,
        micro_cond_embed_dim=20,
    )
    tokenizer = PaellaVQModel(levels=levels, bottleneck_blocks=1, c_hidden=8, codebook_size=64)
    return Pipeline(uvit, tokenizer, TextEncoder(text_tower(clip), words, use_pooled=True)), clip, words


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A pipeline, a CLIP, a folder of captioned images, and the features of drawn digits."
    place = tmp_path_factory.mktemp("quality")
    prompts, rng = held_out_prompts(60), np.random.default_rng(0)
    images = [draw(rng.integers(0, 17, (8, 8)), prompt["ink"], prompt["paper"]) for prompt in prompts]
    pipeline, clip, words = pipeline_of([prompt["text"] for prompt in prompts])
    pipeline.save_pretrained(place / "pipeline")
    clip.save_pretrained(place / "clip")
    words.save_pretrained(place / "clip")
    (place / "photos").mkdir()
    for number, (image, prompt) in enumerate(zip(images, prompts)):
        image.resize((48, 40)).save(place / "photos" / f"{number}.png")
        (place / "photos" / f"{number}.txt").write_text(prompt["text"])
    pixels = torch.stack(
        [torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255 for image in images]
    )
    collect_features([pixels], DigitFeatures()).save(place / "real.safetensors")
    return place


def musekit(*words):
    return main([str(word) for word in words])


def test_evaluate_against_digits(place, capsys):
    common = ["evaluate", place / "pipeline", "data=digits", "--samples", 30, "--steps", 2]
    common += ["--statistics", place / "real.safetensors"]
    results = []
    for number, seed in enumerate((0, 0, 1)):
        out = place / f"{number}.json"
        assert musekit(*common, "--seed", seed, "--out", out) == 0
        results.append(json.loads(out.read_text()))
    assert results[0] == results[1] and results[0]["frechet_distance"] != results[2]["frechet_distance"]
    assert {
        "frechet_distance",
        "kernel_distance",
        "precision",
        "recall",
        "agreement",
        "inception_score",
    } <= set(results[0])
    assert (results[0]["samples"], results[0]["real"], results[0]["prompts"]) == (30, 60, 400)
    assert "Fréchet distance" in capsys.readouterr().out


def test_evaluate_against_a_folder_of_images(place, capsys):
    clip = f"clip={place / 'clip'}"
    out = place / "folder.json"
    common = ["evaluate", place / "pipeline", f"data={place / 'photos'}", "--samples", 24, "--steps", 2]
    statistics = place / "clip.safetensors"
    assert musekit(*common, "--features", clip, "--statistics", statistics, "--out", out) == 0
    first = json.loads(out.read_text())
    assert first["extractor"].startswith("clip-") and first["real"] == 60 and -1 <= first["agreement"] <= 1
    assert musekit(*common, "--features", clip, "--statistics", statistics, "--out", out) == 0
    assert json.loads(out.read_text()) == first, "read statistics give what was computed"
    assert musekit(*common) == 2 and "needs a feature extractor" in capsys.readouterr().err
    assert musekit(*common, "--features", "inception=nowhere.pth") == 2
    assert "no weights nowhere.pth" in capsys.readouterr().err


def test_classes_are_digits_only_where_the_data_are(place, tmp_path):
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=77,
        codebook_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    transformer = MaskGitTransformer(**sizes, num_classes=12, num_vq_tokens=64, max_position_embeddings=65)
    tokenizer = PaellaVQModel(levels=2, bottleneck_blocks=1, c_hidden=8, codebook_size=64)
    things = ClassEncoder(12, {number: f"thing {number}" for number in range(12)})
    Pipeline(transformer, tokenizer, things).save_pretrained(tmp_path / "things")
    write_shards(
        [dict(image=Image.new("RGB", (32, 32), (9 * n, 0, 0)), text="", class_id=n % 10) for n in range(24)],
        tmp_path / "data",
    )
    command = [
        "evaluate",
        tmp_path / "things",
        f"data={tmp_path / 'data'}",
        "--features",
        f"clip={place / 'clip'}",
        "--samples",
        20,
        "--steps",
        2,
    ]
    for judge, agrees in (([], True), (["--judge", "digits"], False)):
        assert musekit(*command, *judge, "--out", tmp_path / "out.json") == 0
        assert ("agreement" in json.loads((tmp_path / "out.json").read_text())) is agrees


class Look(Callback):
    "Draws the figures of the run that is going on."

    def on_step(self, trainer):
        if trainer.step in (3, 6):
            with open(trainer.output_dir / "log.jsonl") as log:
                half = log.read()[:-9]
            (trainer.output_dir / "half").mkdir(exist_ok=True)
            (trainer.output_dir / "half" / "log.jsonl").write_text(half)
            self.seen = list(run_figures(trainer.output_dir)), list(run_figures(trainer.output_dir / "half"))


def test_a_run_with_all_diagnostics_is_drawn_while_it_goes_on(tmp_path):
    data = write_data(tmp_path / "data.parquet")
    every = [f"experiment.log_{name}_every=2" for name in DIAGNOSTICS]
    options = [*every, "experiment.log_every=1", "experiment.eval_every=null", "training.max_train_steps=6"]
    trainer = tiny_trainer(tmp_path / "run", data, *options, callbacks=[])
    trainer.eval_batches = list(encoded_loader(EncodedDataset(data), 8, training=False))
    look = Look()
    run = trainer.config.experiment
    trainer.callbacks = [*standard_callbacks(run, diagnostics=diagnostic_callbacks(run)), look]
    trainer.fit()
    drawn = {"losses", "pace", "diagnostics", "gradients", "token_probabilities"}
    assert drawn <= set(look.seen[0]) and set(look.seen[1]) <= set(look.seen[0])
    finished = [line for line in read_log(tmp_path / "run") if "eval_loss" in line]
    assert [line["step"] for line in finished] == [6], "not on the way, but at the end"
    assert musekit("plot", tmp_path / "run", tmp_path / "run" / "half", "--out", tmp_path / "compared") == 0
    assert {path.stem for path in (tmp_path / "compared").iterdir()} == {
        "losses",
        "pace",
        "evaluation",
        "diagnostics",
    }


def test_the_last_evaluation_is_that_of_the_average(tmp_path):
    data = write_data(tmp_path / "data.parquet")
    trainer = tiny_trainer(
        tmp_path / "run", data, "training.max_train_steps=5", "experiment.eval_every=2", callbacks=[]
    )
    trainer.eval_batches = list(encoded_loader(EncodedDataset(data), 8, training=False))
    trainer.callbacks = standard_callbacks(trainer.config.experiment)
    trainer.fit()
    logged = [line["eval_loss"] for line in read_log(tmp_path / "run") if "eval_loss" in line]
    assert len(logged) == 3
    averaged, trainer.ema = validation_loss(trainer)["eval_loss"], None
    assert logged[-1] == averaged != validation_loss(trainer)["eval_loss"]


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize(
    "size, mask_size", [((64, 40), (64, 40)), ((40, 64), (10, 16)), ((33, 57), (99, 20))]
)
def test_fillings_at_any_size_and_factor(tmp_path, levels, size, mask_size):
    pipeline, *_ = pipeline_of(["a red three"], levels)
    folder = tmp_path / "holes" / "a red three"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(folder / "image.png")
    mask = Image.new("L", mask_size)
    mask.paste(255, (0, 0, mask_size[0], mask_size[1] // 2))  # the upper half, of all columns
    mask.save(folder / "mask.png")
    pipeline.generation = pipeline.generation.override(steps=2)
    examples = read_inpainting(tmp_path / "holes", 32)
    sheet = np.asarray(inpainting_sheet(lambda model: pipeline, examples, 42)(None, 0)).astype(int)
    shown, hidden, filled = (sheet[6:102, 6 + 102 * column : 102 + 102 * column] for column in range(3))
    assert (hidden[:42] == 128).all() and np.abs(hidden[:42] - filled[:42]).mean() > 1
    assert np.array_equal(shown[60:], hidden[60:]) and np.array_equal(shown[60:], filled[60:])


def draw_shares(folder, data, rank):
    trainer = tiny_trainer(folder, data, callbacks=[])
    mine = []
    draw = lambda items: mine.extend(items) or [item * 10 for item in items]
    all_five, one = drawn_by_all(draw, [1, 2, 3, 4, 5]), drawn_by_all(draw, [7])
    trainer.accelerator.wait_for_everyone()
    return {"all": all_five + one, "mine": mine}


def test_two_processes_share_the_drawing(tmp_path):
    first, second = launch(draw_shares, tmp_path, write_data(tmp_path / "data.parquet"))
    assert first["all"] == second["all"] == [10, 20, 30, 40, 50, 70]
    assert (first["mine"], second["mine"]) == ([1, 3, 5, 7], [2, 4])
