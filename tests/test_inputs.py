"""Data as other people keep them: each layout trains, resumes exactly, is encoded, and trains a tokenizer."""
import csv
import io
import json
import os
import subprocess
import sys
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from hub_server import Hub
from musekit.recipes.survey import data_report
from musekit.data.image_text import make_loader
from musekit.data.packing import left_out
from musekit.data.tokens import open_encoded
from musekit.recipes.encode import EncodeOptions, configure_encoding, encode_shards
from musekit.recipes.settings import image_text_config, packing_options
from musekit.data.image_text import find_shards
from musekit.recipes.text_to_image import make_pipeline, train
from musekit.recipes.configure import configure, validate
from musekit.recipes.image_tokenizer import configure_tokenizer, train_tokenizer
from commands import ENVIRONMENT, assert_refused, musekit
from test_conditions import (
    CLASSES,
    clip,
    digits,
    place,
    run_and_resume,
    settings_of,
)  # noqa: F401 (a fixture)

def encoded(image, name="PNG"):
    data = io.BytesIO()
    image.save(data, name)
    return data.getvalue()


def write_table(path, samples, labels=False):
    "A Parquet file as the hub keeps images."
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        "image": [
            {"bytes": encoded(sample["image"]), "path": f"{number}.png"}
            for number, sample in enumerate(samples)
        ],
        "text": [sample["text"] for sample in samples],
    }
    features = {"image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}
    if labels:
        columns["label"] = [sample["class_id"] % 3 for sample in samples]
        features["label"] = {"names": ["ant", "bee", "cat"], "_type": "ClassLabel"}
    described = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(pa.table(columns).replace_schema_metadata(described), path, row_group_size=8)


def write_album(folder, samples):
    "Pictures of many kinds beside what is no data."
    for number, sample in enumerate(samples):
        kind = ("PNG", "GIF", "BMP", "TIFF", "AVIF", "JPEG", "WEBP")[number % 7]
        name = f"{number:02d}.{ {'TIFF': 'tif', 'JPEG': 'jfif'}.get(kind, kind.lower()) }"
        (folder / name).write_bytes(encoded(sample["image"], kind))
        (folder / f"{number:02d}.TXT").write_bytes(b"\xef\xbb\xbf" * (number % 2) + sample["text"].encode())
    for name in ("._00.png", ".ipynb_checkpoints/00-checkpoint.png", "__MACOSX/00.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"a system's own")
    (folder / "99.heic").write_bytes(b"of a phone")


def write_jsonl(folder, samples):
    rows = []
    for number, sample in enumerate(samples):
        sample["image"].save(folder / f"{number}.png")
        rows.append(json.dumps({"file_name": f"{number}.png", "text": sample["text"]}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))


def write_csv(folder, samples):
    (folder / "deep").mkdir()
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8-sig") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "text"])
        for number, sample in enumerate(samples):
            sample["image"].save(folder / "deep" / f"{number}.png")
            table.writerow([f"deep/{number}.png", sample["text"]])


def write_json(folder, samples):
    for number, sample in enumerate(samples):
        sample["image"].save(folder / f"{number}.png")
        (folder / f"{number}.json").write_text(json.dumps({"meta": {"said": sample["text"]}}))


def write_zipped(folder, samples):
    for part in range(2):
        with tarfile.open(folder / f"{part}.tar.gz", "w:gz") as tar:
            for number, sample in enumerate(samples[part::2]):
                for end, data in (
                    ("png", encoded(sample["image"])),
                    ("json", json.dumps({"meta": {"said": sample["text"]}}).encode()),
                ):
                    described = tarfile.TarInfo(f"./{number:03d}.{end}")
                    described.size = len(data)
                    tar.addfile(described, io.BytesIO(data))


def write_clone(folder, samples):
    write_table(folder / "data" / "train-00000-of-00002.parquet", samples[::2])
    write_table(folder / "data" / "train-00001-of-00002.parquet", samples[1::2])
    write_table(folder / "data" / "test-00000-of-00001.parquet", samples[:3])


LAYOUTS = {  # how it is written, and what names it
    "album": (write_album, []), "jsonl": (write_jsonl, []), "csv": (write_csv, []),
    "json": (write_json, ["dataset.params.caption_field=meta.said"]),
    "zipped": (write_zipped, ["dataset.params.caption_field=meta.said"]), "clone": (write_clone, []),
}


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    for name, (write, _) in LAYOUTS.items():
        for split, first, count in (("train", 0, 40), ("test", 100, 10)):
            (folder / name / split).mkdir(parents=True)
            write(folder / name / split, digits(first, count))
    return folder


def texts_of(run):
    return sorted(text for batch in run.batches.data.everything() for text in batch["text"])


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_and_goes_on(place, layouts, name):  # noqa: F811
    data = [f"data={layouts}/{name}/train", f"dataset.params.eval_shards_path_or_url={layouts}/{name}/test"]
    run, pipeline = run_and_resume(place, f"input {name}", clip(place), *data, *LAYOUTS[name][1])
    assert texts_of(run) == sorted(sample["text"] for sample in digits(0, 40))
    assert len(pipeline("a red one", seed=0)) == 1
    if name == "album":
        report = left_out(run.batches.data.sources["train"].urls)
        assert report == ["3 in hidden files or system folders", "1 file of other kinds: 1 .heic"]


@pytest.mark.parametrize("name", ["json", "zipped", "clone"])
def test_workers_and_ranks_share_every_layout(layouts, place, name):  # noqa: F811
    data, expected = f"{layouts}/{name}/train", sorted(sample["text"] for sample in digits(0, 40))
    config = configure(
        None,
        settings_of(
            place, "shared", clip(place), f"data={data}", *LAYOUTS[name][1], "dataset.params.num_workers=2"
        ),
    )
    urls = train_urls(config, place / "shared" / name)
    reading = image_text_config(config)
    shares = [make_loader(urls, reading, training=False, rank=rank, world_size=2) for rank in range(2)]
    assert sorted(text for share in shares for batch in share for text in batch["text"]) == expected
    for rank in range(2):
        stream = iter(make_loader(urls, reading, training=True, rank=rank, world_size=2))
        batches = [next(stream) for _ in range(5)]
        resumed = iter(make_loader(urls, reading, training=True, rank=rank, world_size=2, start_batch=3))
        for batch in batches[3:]:
            again = next(resumed)
            assert batch["text"] == again["text"] and torch.equal(
                batch["pixel_values"], again["pixel_values"]
            )


def train_urls(config, work):
    from musekit.recipes.settings import packing_options
    from musekit.data.image_text import find_shards

    return find_shards(config.dataset.params.train_shards_path_or_url, work, **packing_options(config))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_encoded(place, layouts, name, tmp_path):  # noqa: F811
    settings = [f"data={layouts}/{name}/train", *LAYOUTS[name][1], clip(place)]
    config = configure_encoding(None, settings_of(place, "encoded", *settings))
    totals = encode_shards(config, EncodeOptions(tmp_path / "codes"), progress=False)
    assert (totals.samples, totals.skipped) == (40, 0)
    assert sorted(open_encoded(tmp_path / "codes").dataset.captions()) == sorted(
        sample["text"] for sample in digits(0, 40)
    )
    assert encode_shards(config, EncodeOptions(tmp_path / "codes"), progress=False).already == totals.shards


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_a_tokenizer(layouts, name, tmp_path):
    config = configure_tokenizer(
        None,
        [
            f"data={layouts}/{name}/train",
            f"dataset.eval_path={layouts}/{name}/test",
            "model.type=paella_vq",
            "model.params.c_hidden=16",
            "model.params.bottleneck_blocks=1",
            "model.params.codebook_size=32",
            "dataset.resolution=32",
            "training.max_train_steps=2",
            "training.batch_size=4",
            f"experiment.output_dir={tmp_path}/run",
            "dataset.num_workers=1",
        ],
    )
    trainer = train_tokenizer(config, progress=False)
    assert trainer.step == 2 and (tmp_path / "run" / "report.json").is_file()


def write_zoo(folder, samples):
    for number, sample in enumerate(samples):
        kind = ("ant", "bee", "cat")[sample["class_id"] % 3]
        (folder / kind / "deep").mkdir(parents=True, exist_ok=True)
        sample["image"].save(folder / kind / "deep" / f"{number}.png")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    "Pictures of three classes in folders, in a table, and in Parquet files."
    folder = tmp_path_factory.mktemp("zoo")
    for split, first, count in (("train", 0, 40), ("test", 100, 10)):
        samples = [{**sample, "class_id": sample["class_id"]} for sample in digits(first, count)]
        write_zoo(folder / "folders" / split, samples)
        write_table(folder / "parquet" / split / "0.parquet", samples, labels=True)
        (folder / "table" / split).mkdir(parents=True)
        rows = []
        for number, sample in enumerate(samples):
            sample["image"].save(folder / "table" / split / f"{number}.png")
            rows.append(
                json.dumps(
                    {"file_name": f"{number}.png", "label": ("ant", "bee", "cat")[sample["class_id"] % 3]}
                )
            )
        (folder / "table" / split / "metadata.jsonl").write_text("\n".join(rows))
    return folder


@pytest.mark.parametrize("kind", ["folders", "parquet", "table"])
def test_class_folders(place, zoo, kind, tmp_path):  # noqa: F811
    "The number of classes and their names are found out, and drawn by."
    data = [f"data={zoo}/{kind}/train", f"dataset.params.eval_shards_path_or_url={zoo}/{kind}/test"]
    run, pipeline = run_and_resume(place, f"zoo {kind}", CLASSES, *data)
    assert (
        run.recipe.config.dataset.params.class_names == ["ant", "bee", "cat"]
        and pipeline.transformer.config.num_classes == 3
    )
    assert pipeline(["bee"], seed=0)[0].tobytes() == pipeline([1], seed=0)[0].tobytes()
    batch = next(iter(run.batches.data.everything()))
    assert [("ant", "bee", "cat")[number] for number in batch["class_ids"].tolist()] == batch["text"]
    config = configure_encoding(None, settings_of(place, "x", CLASSES, *data))
    assert encode_shards(config, EncodeOptions(tmp_path / "codes"), progress=False).samples == 40
    again = configure(
        None,
        settings_of(
            place,
            f"zoo codes {kind}",
            CLASSES,
            f"data={tmp_path}/codes",
            "training.pre_encode=true",
            "dataset.params.eval_shards_path_or_url=null",
        ),
    )
    assert again.dataset.params.class_names == ["ant", "bee", "cat"]
    assert train(again, progress=False).trainer.step == 4
    chosen = configure(
        None, settings_of(place, "y", CLASSES, *data, "dataset.params.class_names=[cat,bee,ant]")
    )
    if kind != "parquet":  # whose numbers are what they are
        assert {path.name for path in (zoo / kind).iterdir()} and chosen.dataset.params.class_names == [
            "cat",
            "bee",
            "ant",
        ]


def test_class_folders_by_command(zoo, place, tmp_path):  # noqa: F811
    without = "data=", "dataset.params.eval", "experiment.output", "experiment.eval_every"
    settings = [each for each in settings_of(place, "z", CLASSES) if not each.startswith(without)]
    process = musekit(tmp_path, "train", f"data={zoo}/folders/train", *settings)
    assert process.returncode == 0, process.stderr
    drawn = musekit(tmp_path, "generate", "cat", "--model", "runs/small/pipeline")
    assert drawn.returncode == 0 and (tmp_path / "generated.png").is_file()
    assert_refused(
        musekit(tmp_path, "train", f"data={zoo}/folders", *settings), "are splits of the data and no classes"
    )
    assert_refused(
        musekit(
            tmp_path,
            "train",
            f"data={zoo}/folders/train",
            "experiment.output_dir=runs/two",
            *settings,
            "model.transformer.num_classes=2",
        ),
        "The model has 2 classes and the data 3",
    )


def test_named_columns_and_keys(place, tmp_path):  # noqa: F811
    """dataset.params.image_field, caption_field and class_field, in a Parquet file, a table, and the JSON
    of tars."""
    samples = digits(0, 20)
    columns = {
        "small": [b"no image"] * 20,
        "scan": [encoded(sample["image"]) for sample in samples],
        "text": ["not this"] * 20,
        "words": [sample["text"] for sample in samples],
        "kind": ["fox" if number % 2 else "owl" for number in range(20)],
    }
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    fields = [
        f"dataset.params.{name}" for name in ("image_field=scan", "caption_field=words", "class_field=kind")
    ]
    config = configure(
        None, settings_of(place, "fields", clip(place), f"data={tmp_path}/x.parquet", *fields[:2])
    )
    read = lambda config, url: next(iter(make_loader([str(url)], image_text_config(config), training=False)))
    assert read(config, tmp_path / "x.parquet")["text"] == [sample["text"] for sample in samples[:8]]
    config = configure(
        None, settings_of(place, "fields", CLASSES, f"data={tmp_path}/x.parquet", fields[0], fields[2])
    )
    assert config.dataset.params.class_names == ["fox", "owl"]
    assert read(config, tmp_path / "x.parquet")["text"][:2] == ["owl", "fox"]
    with pytest.raises(ValueError, match="no column 'scans'; it has small, scan"):
        read(
            configure(
                None,
                settings_of(
                    place,
                    "fields",
                    clip(place),
                    f"data={tmp_path}/x.parquet",
                    "dataset.params.image_field=scans",
                ),
            ),
            tmp_path / "x.parquet",
        )
    with pytest.raises(ValueError, match="class_field needs dataset.type=classification"):
        validate(configure(None, settings_of(place, "fields", clip(place), fields[2])))


def test_a_named_column_of_files(place, tmp_path):  # noqa: F811
    "dataset.params.image_field names a table's column of files, in training and in musekit check."
    samples, rows = digits(0, 8), []
    for number, sample in enumerate(samples):
        sample["image"].save(tmp_path / f"{number}.png")
        rows.append({"photo": f"{number}.png", "words": sample["text"]})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    fields = [
        "dataset.params.image_field=photo",
        "dataset.params.caption_field=words",
        "dataset.params.eval_shards_path_or_url=null",
    ]
    config = configure(None, settings_of(place, "files", clip(place), f"data={tmp_path}", *fields))
    reading, urls = image_text_config(config), find_shards(
        str(tmp_path), place / "files of a table", **packing_options(config)
    )
    batch = next(iter(make_loader(urls, reading, training=False)))
    assert batch["text"] == [sample["text"] for sample in samples]
    assert "a batch of 8" in data_report(config)[0].first


def test_what_lies_under_transparency(place, tmp_path):  # noqa: F811
    "dataset.preprocessing.background, in training, encoding and the training of tokenizers."
    for number in range(4):
        Image.new("RGBA", (40, 40), (255, 0, 0, 0)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("nothing")
    for settings, level in (([], 255), (["dataset.preprocessing.background=black"], 0)):
        config = configure(None, settings_of(place, "clear", clip(place), f"data={tmp_path}", *settings))
        urls = train_urls(config, tmp_path / "work" / str(level))
        assert (
            next(iter(make_loader(urls, image_text_config(config), training=True)))["pixel_values"]
            == level / 255
        ).all()
    with pytest.raises(ValueError, match="dataset.preprocessing.background='wite' is no opaque colour"):
        configure(None, settings_of(place, "clear", clip(place), "dataset.preprocessing.background=wite"))
    with pytest.raises(ValueError, match="dataset.background='wite' is no opaque colour"):
        configure_tokenizer(None, ["data=digits", "dataset.background=wite"])


def files_under(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_dataset_of_the_hub(place, layouts, tmp_path):  # noqa: F811
    "hf://datasets/owner/name trains, is encoded and trains a tokenizer; what is not there is one line."
    repositories = {
        "some/digits": {"main": files_under(layouts / "clone" / "train")},
        "some/tars": {"main": files_under(layouts / "zipped" / "train")},
        "some/words": {"main": {"README.md": b"nothing"}},
    }
    with Hub(repositories, kind="datasets") as hub:
        environment = {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "hf"),
            "HF_TOKEN": "hf_none",
        }
        command = lambda *arguments: musekit(tmp_path, *arguments, **environment)
        settings = [
            each
            for each in settings_of(place, "hub", clip(place))
            if not each.startswith(("data=", "dataset.params.eval", "experiment.output"))
        ]
        process = command(
            "train",
            "data=hf://datasets/some/digits",
            "experiment.output_dir=runs/a",
            "dataset.params.num_workers=1",
            "dataset.params.eval_shards_path_or_url=hf://datasets/some/digits/data/test-*.parquet",
            *settings,
        )
        assert process.returncode == 0, process.stderr
        process = command("encode", "small", "data=hf://datasets/some/digits", *settings, "--out", "codes")
        assert process.returncode == 0 and "40 samples of 2 shards" in process.stdout, process
        process = command(
            "encode",
            "small",
            "data=hf://datasets/some/tars",
            *settings,
            "dataset.params.caption_field=meta.said",
            "--out",
            "more",
        )
        assert process.returncode == 0 and "40 samples of 2 shards" in process.stdout, process
        process = command(
            "train-tokenizer",
            "data=hf://datasets/some/digits",
            "training.max_train_steps=1",
            "training.batch_size=4",
            "dataset.resolution=32",
            "model.type=paella_vq",
            "model.params.c_hidden=16",
            "model.params.codebook_size=32",
        )
        assert process.returncode == 0, process.stderr
        without_data = [each for each in settings if not each.startswith("experiment.eval_every")]
        for name, reason in (
            ("some/words", "no *.parquet and no *.tar at"),
            ("some/nothing", "hf://datasets/some/nothing"),
        ):
            command_line = [
                "train",
                f"data=hf://datasets/{name}",
                "experiment.output_dir=runs/b",
                *without_data,
            ]
            assert_refused(command(*command_line), reason)


STRIP = """
import resource, sys, time
from musekit.recipes.text_to_image import make_pipeline, train
from musekit.recipes.configure import configure
start = time.perf_counter()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run = train(configure(None, sys.argv[1:]), progress=False)
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(run.trainer.step, memory, time.perf_counter() - start)
"""


def test_strips_and_bombs(place, tmp_path):  # noqa: F811
    "Pictures far longer than wide cost neither memory nor time; one that asks for gigabytes is named."
    for number in range(12):
        Image.new("1", (1, 20_000) if number % 2 else (20_000, 1)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("a strip")
    (tmp_path / "bomb.png").write_bytes(encoded(Image.new("1", (20_000, 20_000))))
    (tmp_path / "bomb.txt").write_text("a bomb")
    settings = [
        *settings_of(place, "strips", clip(place)),
        f"data={tmp_path}",
        "dataset.params.eval_shards_path_or_url=null",
        f"experiment.output_dir={tmp_path}/run",
    ]
    done = subprocess.run(
        [sys.executable, "-c", STRIP, *settings], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert (
        "1 unreadable: bomb.png (an image that cannot be read: Image size (400000000 pixels) exceeds limit"
        in done.stderr
    )
    done = subprocess.run(
        [sys.executable, "-c", STRIP, *settings, "dataset.params.skip_bad=true"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    steps, kilobytes, seconds = done.stdout.splitlines()[-1].split()
    assert int(steps) == 4 and int(kilobytes) < 800_000 and float(seconds) < 60
    assert "left out of" in done.stdout and "bomb.png" in done.stdout


def test_prompts_that_are_not_utf8(place, tmp_path, here):  # noqa: F811
    run = train(configure(None, settings_of(place, "prompts", clip(place))), progress=False)
    model = run.folder / "pipeline"
    assert_refused(
        here(tmp_path, "generate", os.fsdecode(b"caf\xe9"), "--model", model),
        "the prompt 'caf\\udce9' is not UTF-8",
    )
    (tmp_path / "prompts.txt").write_bytes(b"caf\xe9")
    refused = here(
        tmp_path,
        "train",
        *settings_of(place, "p2", clip(place)),
        f"dataset.params.validation_prompts_file={tmp_path}/prompts.txt",
    )
    assert_refused(refused, "prompts.txt is not UTF-8")


def test_captions_that_are_cut(place, tmp_path, capsys):  # noqa: F811
    "Reported once, with the count: of captions encoded first, on the way, beforehand, and of prompts."
    settings = [clip(place), "dataset.preprocessing.max_seq_length=6"]
    for first in ("true", "false"):
        run = train(
            configure(None, settings_of(place, f"cut {first}", *settings, f"training.encode_first={first}")),
            progress=False,
        )
        said = [line for line in capsys.readouterr().out.splitlines() if "and are cut" in line]
        wanted = ["train shards: ", "test shards: "] if first == "true" else [""]
        assert len(said) == len(wanted) and all(
            line.startswith(start) for line, start in zip(said, wanted)
        ), said
        assert "longer than the 6 tokens that the text encoder reads" in said[0]
    config = configure_encoding(None, settings_of(place, "cut", *settings))
    totals = encode_shards(config, EncodeOptions(tmp_path / "codes"), progress=False)
    assert (
        0 < totals.cut <= 40
        and f"{totals.cut} captions are longer than the text encoder reads, and are cut" in str(totals)
    )
    assert encode_shards(config, EncodeOptions(tmp_path / "codes"), progress=False).cut == totals.cut
    pipeline = make_pipeline(run.recipe, run.batches, run.trainer.network)
    with pytest.warns(UserWarning, match="1 of 2 prompts are longer than the 6 tokens"):
        pipeline(["one", "a very long prompt about nothing at all"], seed=0)


def test_numbers_that_are_not_finite(place, tmp_path):  # noqa: F811
    for value in (".nan", ".inf", "1e999"):
        for key in (
            "optimizer.params.learning_rate",
            "training.max_grad_norm",
            "model.lora.alpha",
            "mask_schedule.params.tau",
            "model.vq_model.train.learning_rate",
            "training.eval_mask_ratios.0",
        ):
            setting = f"training.eval_mask_ratios=[{value}]" if key.endswith(".0") else f"{key}={value}"
            with pytest.raises(ValueError, match="finite number|needs a number"):
                validate(configure(None, settings_of(place, "x", clip(place), setting)))


def test_evaluation_of_every_layout(place, zoo, layouts, tmp_path):  # noqa: F811
    from musekit.evaluation.evaluate import QualityConfig, read_real

    features = lambda pixels: pixels.mean((2, 3))
    features.name = "means"
    config = QualityConfig("none", f"{layouts}/json/test", "clip=none", fields=[None, "meta.said", None])
    assert sorted(read_real(config, features, 32, progress=False)[1]) == sorted(
        sample["text"] for sample in digits(100, 10)
    )
    for kind in ("folders", "parquet", "table"):
        config = QualityConfig("none", f"{zoo}/{kind}/test", "clip=none")
        texts = read_real(config, features, 32, "class", False, ["ant", "bee", "cat"])[1]
        assert sorted(texts) == sorted(str(sample["class_id"] % 3) for sample in digits(100, 10))


def test_shards_that_are_no_good_as_a_whole(place, tmp_path, here):  # noqa: F811
    "One line that says what is wrong with the tar, and nothing else; so is a warning of the command line."
    samples = digits(0, 30)
    parts = [
        (f"{number:02d}", encoded(sample["image"]), sample["text"].encode())
        for number, sample in enumerate(samples)
    ]
    files = {
        "apart.tar": [
            *((f"{key}.png", image) for key, image, _ in parts),
            *((f"{key}.txt", text) for key, _, text in parts),
        ],
        "dots.tar": [
            each
            for key, image, text in parts
            for each in ((f"img.{key}.png", image), (f"img.{key}.txt", text))
        ],
    }
    messages = {
        "apart.tar": "the files of a sample are not next to each other, such as 00.png and 00.txt",
        "dots.tar": "dots in the names of files",
    }
    for name, members in files.items():
        with tarfile.open(tmp_path / name, "w") as tar:
            for file, data in members:
                described = tarfile.TarInfo(file)
                described.size = len(data)
                tar.addfile(described, io.BytesIO(data))
        refused = here(tmp_path, "train", *settings_of(place, name, clip(place))[2:], f"data={name}")
        assert_refused(refused, f"musekit: {name}: {messages[name]}")
        assert len(refused.stderr) < 220
    warned = musekit(
        tmp_path,
        "check",
        "data=digits",
        "lr_scheduler.params.warmup_steps=6",
        "training.max_train_steps=5",
        "wandb.mode=offline",
    )
    assert (
        warned.returncode == 0
        and all(line.startswith("musekit: warning: ") for line in warned.stderr.splitlines())
        and warned.stderr
    )
