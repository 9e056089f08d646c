"""Runs with every kind of condition and input: each trains, evaluates, saves a pipeline that draws, and
resumes exactly."""
import io
import json
import random
import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from conftest import ROOT
import musekit.recipes.networks
from musekit.recipes.memory import find_networks, memory_report, training_memory
from musekit.cli import main
from musekit.models.text_encoders import TextEncoder
from musekit.data.digits import test_prompts as held_out_prompts
from musekit.data.token_parquet import encode_dataset
from musekit.data.batch_encoder import BatchEncoder
from musekit.evaluation.features import FeatureTable, collect_features
from musekit.data.image_text import ImageTextConfig, make_loader
from musekit.data.packing import write_shards, write_tars
from musekit.data.tokens import open_encoded
from musekit.data.token_tars import member_name, token_members, write_unconditional
from musekit.evaluation.metrics import DigitFeatures
from musekit.models.paella_vq import PaellaVQModel
from musekit.inference.pipeline import Pipeline
from musekit.data.image_text import find_shards
from musekit.recipes.text_to_image import Recipe, _captions, make_batches, make_trainer, show_inputs, train
from musekit.recipes.configure import configure, validate
from musekit.recipes.image_tokenizer import find_images
from musekit.training.log import read_log
from musekit.utils.seeds import step_seed
from commands import some_digits
from small_models import save_frozen_networks

SETTINGS = [
    "model.transformer.hidden_size=32",
    "model.transformer.num_hidden_layers=1",
    "model.transformer.intermediate_size=64",
    "training.max_train_steps=4",
    "training.batch_size=8",
    "training.generation_timesteps=2",
    "lr_scheduler.params.warmup_steps=1",
    "training.encode_first=false",
    "training.cond_dropout_prob=0.5",
    "dataset.params.shuffle_buffer_size=20",
    "experiment.log_every=1",
    "experiment.eval_every=2",
    "experiment.generate_every=4",
    "experiment.save_every=2",
]
CLASSES, NO_TEXT = "dataset.type=classification", "model.text_encoder.type=none"
PLAIN, NO_POOLED = "model.architecture=transformer", "model.transformer.add_cond_embeds=false"


def digits(first, count):
    return list(some_digits(range(first, first + count)))


def sheet(sample, side=2):
    "Four pictures in one, of which the others are black."
    image = Image.new("RGB", (32 * side, 32 * side))
    image.paste(sample["image"], (0, 0))
    return {**sample, "image": image}


def candidates(sample):
    "Three pictures of one caption, the second of them the best."
    def png(image):
        data = io.BytesIO()
        image.save(data, "png")
        return data.getvalue()

    black = png(Image.new("RGB", (32, 32)))
    return {
        "0.png": black,
        "1.png": png(sample["image"]),
        "2.png": black,
        "clip_scores.txt": b"0.2,0.9,0.3",
        "txt": sample["text"].encode(),
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "Shards in every layout, and untrained frozen networks."
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("conditions")
    for split, first, count in (("train", 0, 40), ("test", 100, 10)):
        samples = digits(first, count)
        write_shards(samples, folder / "digits" / split)
        write_shards(map(sheet, samples), folder / "sheets" / split)
        write_tars(map(candidates, samples), folder / "scored" / split)
    pixels = torch.stack(
        [torch.from_numpy(np.array(sample["image"])).permute(2, 0, 1) / 255 for sample in digits(100, 40)]
    )
    collect_features([pixels], DigitFeatures()).save(folder / "real.safetensors")
    (folder / "names.json").write_text(json.dumps([f"the digit {number}" for number in range(10)]))
    captions = [sample["text"] for sample in digits(0, 40)]
    save_frozen_networks(folder, captions, max_seq_length=20, hidden_size=24)
    pieces = T5Tokenizer().train_new_from_iterator(captions, 150, show_progress=False)
    t5 = T5EncoderModel(
        T5Config(vocab_size=len(pieces), d_model=24, d_kv=8, d_ff=48, num_layers=2, num_heads=3)
    )
    TextEncoder(t5, pieces, max_seq_length=20).save_pretrained(folder / "t5")
    return folder


def settings_of(place, name, *settings, data="digits"):
    data = [f"data={place}/{data}/train", f"dataset.params.eval_shards_path_or_url={place}/{data}/test"]
    return [
        *data,
        f"model.vq_model.pretrained={place}/vq",
        f"experiment.output_dir={place}/runs/{name}",
        *SETTINGS,
        *settings,
    ]


def weights(folder):
    return sha256((Path(folder) / "model.safetensors").read_bytes()).hexdigest()


def run_and_resume(place, name, *settings, data="digits"):
    """Trains, then goes on from the middle as if it had been killed there; gives the run and the loaded
    pipeline."""
    config = lambda: configure(None, settings_of(place, name, *settings, data=data))
    run = train(config(), progress=False)
    log = read_log(run.folder)
    assert [line["step"] for line in log if "loss" in line] == [1, 2, 3, 4]
    assert sum("eval_loss" in line for line in log) == 2
    assert (run.folder / "samples" / "step-000004.png").is_file()
    before = weights(run.folder)
    shutil.rmtree(run.folder / "checkpoint-4"), shutil.rmtree(run.folder / "pipeline")
    (run.folder / "model.safetensors").unlink()
    assert train(config(), progress=False).trainer.step == 4
    assert weights(run.folder) == before
    return run, Pipeline.from_pretrained(run.folder)


def clip(place):
    return f"model.text_encoder.pretrained={place}/clip"


def t5(place):
    return "model.text_encoder.type=t5", f"model.text_encoder.pretrained={place}/t5"


def names(place):
    return f"dataset.params.imagenet_class_mapping_path={place}/names.json"


TEXTS = {
    "clip, pooled": lambda place: [clip(place)],
    "clip, not pooled": lambda place: [clip(place), NO_POOLED],
    "clip, plain transformer": lambda place: [clip(place), PLAIN],
    "t5, plain transformer": lambda place: [*t5(place), PLAIN],
    "t5, U-ViT": lambda place: [*t5(place), NO_POOLED],
    "names of classes": lambda place: [clip(place), CLASSES, names(place)],
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts(place, name):
    run, pipeline = run_and_resume(place, name, *TEXTS[name](place))
    assert pipeline.text_encoder.use_pooled == (name in ("clip, pooled", "names of classes"))
    assert len(pipeline(["a red one", "a blue two"], seed=0)) == 2
    if name == "names of classes":
        assert next(iter(run.batches.data.everything("test")))["text"][0].startswith("the digit ")


@pytest.mark.parametrize("encode_first", [False, True], ids=["images", "encoded"])
def test_classes(place, encode_first, capsys):
    run, pipeline = run_and_resume(
        place,
        f"classes {encode_first}",
        CLASSES,
        "model.transformer.num_classes=10",
        f"training.encode_first={str(encode_first).lower()}",
    )
    assert (
        pipeline.transformer.config.num_classes == 10
        and run.batches.unconditional["class_ids"].item() == 10
    )
    numbers, texts = pipeline([3, 7], seed=0), pipeline(["3", "7"], seed=0)
    assert [image.tobytes() for image in numbers] == [image.tobytes() for image in texts]
    ids = lambda prompts, **options: pipeline.ids(prompts, seed=0, **options)
    assert not torch.equal(ids(3, guidance_scale=8.0), ids(3, guidance_scale=1.0))
    assert torch.equal(ids(3, guidance_scale=0.0), ids("", guidance_scale=1.0))
    with pytest.raises(ValueError, match=r"has the classes 0 \.\. 9, and '10' is neither"):
        pipeline(10)
    real, out = FeatureTable.load(place / "real.safetensors"), run.folder / "quality.json"
    command = (
        "evaluate",
        run.folder,
        "data=digits",
        "--samples",
        40,
        "--steps",
        2,
        "--statistics",
        place / "real.safetensors",
        "--out",
        out,
    )
    assert main(list(map(str, command))) == 0 and "agreement" in capsys.readouterr().out
    labels = [prompt["digit"] for prompt in random.Random(0).sample(held_out_prompts(), 400)][:40]
    drawn = pipeline(labels, seed=step_seed(0, 0, "evaluate"), steps=2)
    read = DigitFeatures().judge(drawn)["digit"]
    report = json.loads(out.read_text())
    assert (
        report["agreement"] == pytest.approx(np.mean([one == other for one, other in zip(read, labels)]))
        and report["real"] == real.count
    )


def test_classes_with_names(place, capsys):
    run, pipeline = run_and_resume(place, "named classes", CLASSES, names(place), NO_TEXT)
    assert torch.equal(pipeline.ids("the digit 4", seed=0), pipeline.ids(4, seed=0))
    assert set(run.batches.networks.text_encoder.names) == set(range(10))
    draw = lambda *prompts: main([
        "generate",
        *prompts,
        "--model",
        str(run.folder),
        "--out",
        str(place / "named.png"),
        "--num-images",
        "1",
    ])
    assert draw("the digit 4", "7") == 0
    assert (
        draw() == 2
        and "name a class to generate: a number, 0 to 9, or the name of one, such as the digit 0"
        in capsys.readouterr().err
    )


def test_dropped_classes_are_the_mask_token(place):
    "What the trainer puts in front of half the rows is what an unknown class is when drawing."
    run = train(
        configure(None, settings_of(place, "dropped", CLASSES, "model.transformer.num_classes=10")),
        progress=False,
    )
    batch = next(iter(run.batches.train(0)))
    labels, dropped = batch["class_ids"], []
    for step in range(50):
        class_ids = run.trainer.make_micro_batch(batch, step, 0).conditions["class_ids"]
        assert ((class_ids == labels) | (class_ids == 10)).all()
        dropped.append(class_ids == 10)
    assert 0.35 < torch.cat(dropped).float().mean() < 0.65  # 400 coins of one half
    model = run.trainer.network.eval()
    ids = torch.zeros(1, 64, dtype=torch.long)
    in_front = torch.cat([torch.tensor([[model.config.mask_token_id]]), ids], 1)
    assert torch.equal(model(ids, class_ids=torch.tensor([10])), model(in_front)[:, 1:])


def test_a_class_that_is_none_is_an_unusable_sample(place):
    config = configure(None, settings_of(place, "few", CLASSES, "model.transformer.num_classes=5"))
    with pytest.raises(ValueError, match=r"class \d is none of the 5 classes"):
        train(config, progress=False)


def test_nothing(place):
    run, pipeline = run_and_resume(place, "nothing", NO_TEXT)
    assert len(pipeline(num_images_per_prompt=3, seed=0)) == 3
    assert run.batches.unconditional == {} and pipeline.generation.guidance_scale == 1
    with pytest.raises(ValueError, match="is unconditional and cannot use the prompt 'a cat'"):
        pipeline("a cat")
    assert (
        main(
            ["generate", "--model", str(run.folder), "--out", str(place / "any.png"), "--num-images", "3"]
        )
        == 0
    )
    assert Image.open(place / "any.png").width > 300


def test_pictures_without_captions(place):
    album = place / "album"
    album.mkdir()
    for number, sample in enumerate(digits(0, 20)):
        sample["image"].save(album / f"{number}.png")
    alone = [f"data={album}", "dataset.params.eval_shards_path_or_url=null", NO_TEXT]
    run = train(configure(None, [*settings_of(place, "bare"), *alone]), progress=False)
    assert len(Pipeline.from_pretrained(run.folder)(num_images_per_prompt=2)) == 2
    with pytest.raises(ValueError, match="20 without a caption"):
        train(configure(None, [*settings_of(place, "bare text"), *alone[:2], clip(place)]), progress=False)


@pytest.mark.parametrize(
    "key, data, size",
    [
        ("is_sdxl_synthetic_dataset", "scored", (1024, 1024)),
        ("is_ds_clean", "sheets", (32, 32)),
        ("is_ds_clean_upscaled", "sheets", (64, 64)),
    ],
)
def test_layouts(place, key, data, size):
    run, pipeline = run_and_resume(place, key, f"dataset.params.{key}=true", clip(place), data=data)
    batch = next(iter(run.batches.data.everything("test")))
    assert batch["micro_conds"][0].tolist() == [*size, 0, 0, 5]
    picture = digits(100, 1)[0]["image"]
    if key != "is_ds_clean_upscaled":  # the one picture that counts is the digit, pixel by pixel
        close = torch.tensor(list(picture.tobytes())).view(32, 32, 3).permute(2, 0, 1) / 255
        assert (batch["pixel_values"][0] - close).abs().max() < 1e-6
    assert len(pipeline("a red one")) == 1


def encoded(place, form, text):
    "The digits as codes of the given networks, written without a training run."
    folder = place / "encoded" / f"{form}-{text}"
    if folder.is_dir():
        return folder
    encoder = TextEncoder.from_pretrained(place / "clip", use_pooled=True) if text else None
    layout = {} if text else {"layout": "classification"}
    for split in ("train", "test"):
        loader = make_loader(
            [str(place / "digits" / split / "shard-000000.tar")],
            ImageTextConfig(32, batch_size=8, **layout),
            training=False,
        )
        networks = BatchEncoder(PaellaVQModel.from_pretrained(place / "vq").eval(), encoder)
        if form == "parquet":
            encode_dataset(loader, networks, folder / split / "digits.parquet")
        else:
            members = member_name(f"{place}/vq"), member_name(f"{place}/clip")
            rows = (row for batch in loader for row in token_members(batch, networks(batch), members))
            write_tars(rows, folder / split, prefix="tokens")
            write_unconditional(folder / split, networks.unconditional())
    return folder


def pre_encoded(folder):
    return [
        f"data={folder}/train",
        f"dataset.params.eval_shards_path_or_url={folder}/test",
        "training.pre_encode=true",
    ]


@pytest.mark.parametrize("form", ["parquet", "tar"])
def test_pre_encoded_texts(place, form):
    run, pipeline = run_and_resume(
        place, f"pre {form}", clip(place), *pre_encoded(encoded(place, form, True))
    )
    assert run.batches.prepare is None and len(pipeline("a red one")) == 1


def test_pre_encoded_classes(place):
    of_classes = CLASSES, "model.transformer.num_classes=10", *pre_encoded(encoded(place, "parquet", False))
    run, pipeline = run_and_resume(place, "pre classes", *of_classes)
    batch = next(iter(run.batches.train(0)))
    assert batch["class_ids"].dtype == torch.long and len(pipeline([1, 2])) == 2
    few = configure(None, [*settings_of(place, "few codes"), *of_classes, "model.transformer.num_classes=5"])
    with pytest.raises(ValueError, match=r"holds class \d, which is none of the 5 classes"):
        train(few, progress=False)


def test_pre_encoded_is_what_encoding_first_gives(place):
    "The same data, the same order, the same weights, whoever encoded."
    first = train(
        configure(None, settings_of(place, "first", clip(place), "training.encode_first=true")),
        progress=False,
    )
    shared = (
        f"data={first.folder}/encoded/train",
        f"dataset.params.eval_shards_path_or_url={first.folder}/encoded/test",
    )
    later = train(
        configure(None, [*settings_of(place, "later", clip(place)), *shared, "training.pre_encode=true"]),
        progress=False,
    )
    assert weights(first.folder) == weights(later.folder)


def test_encoded_data_needs_networks_only_to_draw(place, tmp_path, capsys):
    """Missing ones are fine where nothing is drawn; the last line says what is not there, and the first
    inputs are squares."""
    names = [
        f"model.vq_model.pretrained={tmp_path}/gone/vq",
        f"model.text_encoder.pretrained={tmp_path}/gone/clip",
    ]
    options = [
        *settings_of(place, "alone", *names),
        *pre_encoded(encoded(place, "parquet", True)),
        "model.transformer.codebook_size=32",
    ]
    run = train(configure(None, [*options, "experiment.generate_every=null"]), progress=False)
    assert (
        "no pipeline, only the transformer in" in capsys.readouterr().out
        and not (run.folder / "pipeline").exists()
    )
    assert [line["step"] for line in read_log(run.folder) if "loss" in line] == [1, 2, 3, 4]
    assert [path.name for path in (run.folder / "samples").iterdir()] == ["first-inputs.png"]
    with pytest.raises(FileNotFoundError, match="gone/vq is no folder here"):
        validate(configure(None, [*options, "experiment.generate_every=2"]))
    with pytest.raises(ValueError, match="set model.transformer.codebook_size to the number of its codes"):
        train(
            configure(
                None,
                [
                    *options,
                    "experiment.generate_every=null",
                    "model.transformer.codebook_size=null",
                    f"experiment.output_dir={tmp_path}/x",
                ],
            ),
            progress=False,
        )


def test_encoded_data_frees_what_it_loads_to_draw(place, monkeypatch):
    loaded = []
    for name in ("load_vq_model", "load_text_encoder"):
        load = getattr(musekit.recipes.networks, name)
        monkeypatch.setattr(
            musekit.recipes.networks,
            name,
            lambda *arguments, load=load, name=name: (loaded.append(name), load(*arguments))[1],
        )
    codes = pre_encoded(encoded(place, "parquet", True))
    recipe, batches, trainer = before_training(
        place, "frees", clip(place), *codes, "experiment.generate_every=4"
    )
    assert not loaded and not in_memory(batches.networks), "the data has the sizes and the empty prompt"
    trainer.fit()
    assert loaded.count("load_vq_model") == 2 and not in_memory(
        batches.networks
    ), "for the inputs and the samples"
    networks = find_networks(recipe.config)
    assert "frozen networks" not in training_memory(networks, recipe.config)
    recipe.config.training.pre_encode = False
    assert "frozen networks" in training_memory(networks, recipe.config)


def before_training(place, name, *settings):
    "A run, its batches and its trainer, which has not started."
    recipe = Recipe(configure(None, settings_of(place, name, *settings)), progress=False)
    batches = make_batches(recipe)
    return recipe, batches, make_trainer(recipe, batches)


def in_memory(networks):
    return {"vq_model", "text_encoder"} & set(vars(networks))


def test_the_first_inputs_are_shown(place):
    "Pictures and captions, or what codes decode to, whoever encoded."
    for more in (
        ["training.encode_first=true"],
        ["training.encode_first=false"],
        pre_encoded(encoded(place, "parquet", True)),
    ):
        folder = f"experiment.output_dir={place}/runs/inputs{len(more)}{more[0][-5:]}"
        recipe, batches, trainer = before_training(place, "inputs", clip(place), *more, folder)
        trainer.train_step()
        shown = show_inputs(recipe.config, batches, trainer)
        captions = _captions(batches, trainer.last_batch)
        assert (
            shown.width > 8 * 90
            and len(captions) >= 4
            and all(" on " in caption or len(caption) > 5 for caption in captions)
        )


@pytest.mark.parametrize("form", ["parquet", "tar"])
def test_codes_and_images_are_not_confused(place, form):
    "Before a sample is read, in a sentence with the setting to change."
    codes, networks = encoded(place, form, True), clip(place)
    options = [*settings_of(place, "bad", networks), *pre_encoded(codes)]
    for name in ("", "/digits.parquet" if form == "parquet" else "/tokens-000000.tar"):
        of_images = configure(None, [*options, "training.pre_encode=false", f"data={codes}/train{name}"])
        with pytest.raises(
            ValueError, match="holds tokens and no images; to train on them set training.pre_encode=true"
        ):
            train(of_images, progress=False)
    for name in ("", "/shard-000000.tar"):
        with pytest.raises(ValueError, match="holds images and no tokens; set training.pre_encode=false"):
            train(configure(None, [*options, f"data={place}/digits/train{name}"]), progress=False)


def test_pictures_beside_a_table_of_metadata(place, tmp_path):
    "As the hub keeps them: to be trained on, and no codes."
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(2):
        Image.new("RGB", (32, 32)).save(photos / f"{number}.png")
        (photos / f"{number}.txt").write_text("a black square")
    pq.write_table(pa.table({"file_name": ["0.png", "1.png"]}), photos / "metadata.parquet")
    assert len(find_shards(str(photos), tmp_path / "work")) == 1
    assert len(find_images("photos", tmp_path / "work", base_dir=tmp_path)) == 2
    with pytest.raises(ValueError, match="holds images and no tokens"):
        open_encoded(photos)


def test_classes_of_columns_are_read_once(place, monkeypatch):
    source = open_encoded(encoded(place, "parquet", False) / "train")
    config = ImageTextConfig(batch_size=4, class_names={number: str(number) for number in range(10)})
    source.loader(config, training=False)
    monkeypatch.setattr(source.dataset, "paths", [])  # whoever reads again finds no class
    with pytest.raises(ValueError, match="holds class 5, which is none of the 5 classes"):
        source.loader(replace(config, class_names=dict(list(config.class_names.items())[:5])), training=False)


def test_pre_encoded_refusals(place):
    ready = pre_encoded(encoded(place, "parquet", True))
    with pytest.raises(
        ValueError, match="set model.text_encoder.pretrained to the one that encoded the data"
    ):
        validate(configure(None, [*settings_of(place, "bad"), *ready]))
    with pytest.raises(ValueError, match="needs the images in every step"):
        flipped = [*ready, "dataset.preprocessing.random_flip=true"]
        validate(configure(None, [*settings_of(place, "bad", clip(place)), *flipped]))
    larger = configure(
        None, [*settings_of(place, "bad", clip(place)), *ready, "dataset.preprocessing.resolution=64"]
    )
    with pytest.raises(
        ValueError, match="holds images of 32 x 32 pixels, and dataset.preprocessing.resolution is 64"
    ):
        train(larger, progress=False)


def test_another_kind_is_another_run(place):
    train(configure(None, settings_of(place, "kind", NO_TEXT)), progress=False)
    with pytest.raises(ValueError, match="holds another model .model.transformer.num_classes: null -> 10"):
        train(
            configure(None, settings_of(place, "kind", CLASSES, "model.transformer.num_classes=10")),
            progress=False,
        )


def test_going_on_with_a_trained_class_model(place):
    "A pipeline of classes brings its networks and the number of classes along."
    first = train(
        configure(None, settings_of(place, "taught", CLASSES, "model.transformer.num_classes=10")),
        progress=False,
    )
    alone = [
        s for s in settings_of(place, "more", CLASSES) if "model.transformer" not in s and "vq_model" not in s
    ]
    config = configure(None, [*alone, f"model.pretrained_model_path={first.folder}"])
    assert (config.model.text_encoder.type, config.model.architecture) == ("none", "transformer")
    assert Pipeline.from_pretrained(train(config, progress=False).folder).transformer.config.num_classes == 10


def test_check_tells_of_no_text_encoder():
    report = memory_report(configure(None, ["data=digits", CLASSES]))
    assert "text encoder" not in report and "MaskGitTransformer" in report


@pytest.mark.parametrize(
    "settings, message",
    [
        ([CLASSES, "data=a.tar"], "num_classes=None must be the number of classes"),
        (
            ["dataset.params.is_ds_clean=true", "dataset.params.is_sdxl_synthetic_dataset=true"],
            "are different layouts",
        ),
        ([CLASSES, "dataset.params.is_ds_clean=true"], "are different layouts"),
        (["dataset.params.imagenet_class_mapping_path=names.json"], "needs dataset.type=classification"),
        ([CLASSES, "dataset.params.imagenet_class_mapping_path=names.json"], "names.json does not exist"),
        (
            [
                "model.text_encoder.type=t5",
                "model.text_encoder.pretrained=t5",
                "model.transformer.add_cond_embeds=true",
            ],
            "has no pooled text",
        ),
    ],
)
def test_contradictions(settings, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        validate(configure(None, ["data=digits", *settings]))


def test_a_published_class_file_loads(tmp_path):
    "Without a section for a text encoder, and with the null condition's keys left as they are."
    sizes = dict(
        vocab_size=2025,
        codebook_size=1024,
        hidden_size=768,
        num_classes=1000,
        num_vq_tokens=256,
        max_position_embeddings=257,
    )
    text = (ROOT / "tests" / "published" / "text_transformer.yaml").read_text()
    before, after = text.split("  text_encoder:")[0], text[text.index("  gradient_checkpointing"):]
    lines = "\n".join(f"    {name}: {value}" for name, value in sizes.items())
    (tmp_path / "classes.yaml").write_text(
        f"{before}  architecture: transformer\n  transformer:\n{lines}\n{after}".replace(
            "dataset:", "dataset:\n  type: classification"
        )
    )
    networks = find_networks(configure(tmp_path / "classes.yaml"))
    assert networks.transformer.config.num_classes == 1000 and networks.text_encoder is None
