"""The README and the examples of every --help, typed in their order into a fresh folder, by bash, with
short runs and a hub on this machine."""
import gzip
import importlib
import json
import os
import re
import shutil
import subprocess
import time
from itertools import islice
from urllib.request import urlopen

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from PIL import Image, ImageDraw
from transformers import T5Config, T5EncoderModel, T5Tokenizer

import hub_server
from conftest import ROOT
from musekit.models.text_encoders import TextEncoder
from musekit.evaluation.features import InceptionFeatures
from musekit.models.uvit import MaskGiTUViT
from musekit.models.vqgan import VQGANModel
from musekit.inference.pipeline import Pipeline
from musekit.shards.catalog import CATALOG
from musekit.training.reconstruction import VGGFeatures
from commands import make_photos, some_digits
from test_evaluate import pipeline_of
from toy_training import free_port
from typing_room import make_environment, typing_room

COMMANDS = [
    "",
    "demo",
    "train",
    "check",
    "train-tokenizer",
    "encode",
    "generate",
    "inpaint",
    "evaluate",
    "plot",
    "push",
]
UNTYPED = {  # what is not typed here, and why; each is looked at by `make -n` or is used by other tests
    "make test": "runs these tests",
    "make test-lab": "installs a browser by apt-get",
    "make readme": "is what tests/in_sync.py compares with",
    "make lab": "serves until it is stopped; see test_the_laboratory_starts",
    "source .venv/bin/activate": "the commands of .venv come first here",
    "pip install -e .": "installs; make test has done it",
    "nbdev_install_hooks": "changes the settings of git",
    "musekit train small mine.yaml": "is typed as an example of musekit train --help",
}


def readme_blocks():
    "The (language, text) of every block of code, in order."
    return re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def examples(help_text):
    "The lines of a help that are meant to be typed: indented, below `examples:` and its like, as they stand."
    kept, inside = [], False
    for line in help_text.splitlines():
        if line in ("examples:", "first steps:", "  and your own:"):
            inside = True
        elif inside and not line.startswith("  "):
            inside = False
        elif inside:
            kept.append(line)
    return "\n".join(kept)


class Handler(hub_server.Handler):
    "The hub, with a list of the files of one dataset, and files below /datasets/ and /texts/ in ranges."

    def respond(self):
        if self.path.startswith("/api/datasets/owner/name/tree/"):
            name, content = "questions.jsonl.gz", self.server.texts["questions.jsonl.gz"]
            return self.answer([{"type": "file", "path": f"data/{name}", "size": len(content)}])
        if not self.path.startswith(("/datasets/", "/texts/")):
            return super().respond()
        content = self.server.texts.get(self.path.rpartition("/")[2])
        if content is None:
            return self.fail("EntryNotFound")
        self.send_bytes(content, {"ETag": '"1"'})


def parquet(column):
    "The bytes of a file of forty texts; those of the catalogue have a score, too."
    texts = [
        f"Text {number} about the {column} of small things, which is long enough to be kept."
        for number in range(40)
    ]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({column: texts, "int_score": [3 + number % 2 for number in range(40)]}), sink)
    return sink.getvalue().to_pybytes()


def questions():
    "The bytes of a compressed file of JSON Lines with forty questions."
    rows = (
        {
            "question": f"What is {number} and {number}, in words?",
            "answer": f"It is {2 * number}, as you can count.",
        }
        for number in range(40)
    )
    return gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())


def files_below(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A hub with a small aMUSEd, a T5, a CLIP, and Parquet files under the names of the catalogue and of
    the examples."""
    place = tmp_path_factory.mktemp("hub")
    captions = [sample["text"] for sample in some_digits(range(40))]
    made, clip, words = pipeline_of(captions)
    settings = {
        name: value
        for name, value in made.transformer.config.items()
        if name not in MaskGiTUViT.ignored_config
    }
    transformer = MaskGiTUViT.from_config(
        {**settings, "use_bias": True, "vocab_size": 40, "codebook_size": 32}
    )
    vq_model = VQGANModel(16, 3, 32, (1, 1), 2, (8,), z_channels=8, quantized_embed_dim=8, num_embeddings=32)
    Pipeline(transformer, vq_model, made.text_encoder).save_diffusers(place / "amused")
    clip.save_pretrained(place / "clip")
    words.save_pretrained(place / "clip")
    pieces = T5Tokenizer().train_new_from_iterator(captions, 150, show_progress=False)
    t5 = T5EncoderModel(
        T5Config(vocab_size=len(pieces), d_model=24, d_kv=8, d_ff=48, num_layers=2, num_heads=3)
    )
    TextEncoder(t5, pieces, max_seq_length=20).save_pretrained(place / "t5")
    names = {
        "amused/amused-256": "amused",
        "openai/clip-vit-base-patch32": "clip",
        "google/t5-v1_1-small": "t5",
    }
    server = hub_server.Hub(
        {name: {"main": files_below(place / folder)} for name, folder in names.items()}, handler=Handler
    )
    catalogue = [path.rpartition("/")[2] for path in CATALOG["fineweb-edu-high"].paths[:3]]
    server.texts = {name: parquet("text") for name in catalogue}
    server.texts |= {f"{number}.parquet": parquet("body" if number == 4 else "text") for number in range(4)}
    server.texts |= {f"train-{number:05d}.parquet": parquet("text") for number in range(4)}
    server.texts["questions.jsonl.gz"] = questions()
    with server:
        yield server


def make_shards(folder, count, each, width):
    "Tars of digits, named by their number in so many figures."
    folder.mkdir()
    samples = iter(some_digits(range(count * each)))
    for number in range(count):
        with webdataset.TarWriter(str(folder / f"{number:0{width}d}.tar")) as tar:
            for sample in islice(samples, each):
                tar.write({
                    "__key__": sample["text"].replace(" ", "-"),
                    "png": sample["image"],
                    "txt": sample["text"],
                    "json": {},
                })


def make_files(folder):
    "What a reader of the README has: pictures, shards, texts, weights."
    make_photos(folder / "photos", 60)
    make_photos(folder / "ten_photos", 10)
    make_photos(folder / "held-out", 24)
    (folder / "documents").mkdir()
    texts = [f"{number} and {number + 1} make {2 * number + 1}." * 20 for number in range(200)]
    pq.write_table(pa.table({"text": texts}), folder / "documents" / "all.parquet")
    for name in ("cat", "dog"):
        make_photos(folder / "animals" / name, 20)
    make_shards(folder / "shards", count=100, each=1, width=5)
    make_shards(folder / "test", count=10, each=3, width=3)
    mask = Image.new("L", (32, 32))
    ImageDraw.Draw(mask).rectangle((8, 8, 24, 24), fill=255)
    mask.save(folder / "mask.png")
    for name, column in {"mine/a": "body", "mine/b": "body", "texts/a": "body", "more": "text"}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.parquet").write_bytes(parquet(column))
    (folder / "mine.yaml").write_text(
        "data: photos/\nexperiment: {output_dir: runs/mine}\ntraining: {batch_size: 4}\n"
    )
    (folder / "tokenizer.yaml").write_text("data: photos/\nexperiment: {output_dir: runs/tokenizer-file}\n")
    (folder / "texts.yaml").write_text(
        "mine: {repo: owner/name, pattern: 'data/{0..3}.parquet', text_column: text}\n"
        "blend: {mix: {fineweb-edu: 0.7, mine: 0.3}, shuffle: 1}\n"
    )
    torch.save(VGGFeatures([[8, 8], [16, 16]]).state_dict(), folder / "vgg16.pth")
    weights = InceptionFeatures().state_dict() | {
        "fc.weight": torch.zeros(1008, 2048),
        "fc.bias": torch.zeros(1008),
    }
    torch.save(weights, folder / "pt_inception-2015-12-05-6726825d.pth")
    for name in ("Makefile", "constraints.txt", "settings.ini", "setup.py"):
        shutil.copy(ROOT / name, folder)


@pytest.fixture
def room(tmp_path, hub):
    "A function that types lines in a fresh folder, and fails with what they printed where one of them fails."
    make_files(tmp_path)
    with typing_room(tmp_path, HF_ENDPOINT=hub.url, HF_TOKEN="hf_test", MUSEKIT_REHEARSAL="1") as type_in:
        def checked(lines):
            done = type_in(lines.replace("https://example.org", hub.url))  # which no machine here answers for
            assert done.returncode == 0, f"{lines}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            assert "Traceback" not in done.stderr, done.stderr
            return done.stdout
        checked.folder = tmp_path
        yield checked


def hints(printed):
    "The commands that other commands printed, as the next thing to do."
    commands = re.findall(r": (musekit(?:-shards)? .+)$", printed, re.MULTILINE)
    return list(dict.fromkeys(commands))


def test_the_readme(room):
    printed = ""
    for number, (language, text) in enumerate(readme_blocks()):
        if text.strip() in UNTYPED:
            continue
        if language == "py":
            (room.folder / f"block{number}.py").write_text(text)
            text = f"python block{number}.py"
        printed += room(text)
    for name in (
        "runs/demo/samples.png",
        "generated.png",
        "three.png",
        "again.png",
        "drawn",
        "codes",
        "my-transformer",
        "runs/tuned/pipeline",
    ):
        assert (room.folder / name).exists(), name
    suggested = hints(printed)
    for start in (
        "musekit generate 0 ",
        "musekit generate --model runs/unconditional",
        'musekit generate "a prompt"',
        "musekit train run.yaml data=codes/",
        "musekit train data=photos/ model.vq_model.type=vqgan",
        "musekit-shards --restore",
    ):
        assert any(hint.startswith(start) for hint in suggested), (start, suggested)
    for hint in suggested:
        room(hint)


def test_the_examples_of_every_help(room):
    free = shutil.disk_usage(room.folder).free / 1e9
    if free < 8:
        pytest.skip(
            "an example fetches from FineWeb-Edu, whose three files need 6.45 GB of free space before"
            f" anything is fetched; {free:.1f} GB are free"
        )
    block, = (text for _, text in readme_blocks() if "cat > run.yaml" in text)
    room(block[: block.index("END\n", block.index("<<'END'") + 8) + 4])
    typed = ""
    for command in COMMANDS:
        text = room(f"musekit {command} --help")
        lines = examples(text)
        assert lines or command in ("demo", "generate", "inpaint"), f"musekit {command} --help has no example"
        typed += lines + "\n"
        room(lines)
    lines = examples(room("musekit-shards --help"))
    room(lines)
    assert "musekit train small mine.yaml" in typed and "musekit-shards" in lines
    for name in (
        "runs/mine/pipeline",
        "runs/two/pipeline",
        "evaluation.json",
        "comparison/losses.png",
        "small-codes",
        "more-codes",
    ):
        assert (room.folder / name).exists(), name


def test_commands_in_the_prose_are_typed_or_listed():
    """A command between backquotes stands in a block, too, or in the list of those that are not typed,
    with the reason."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = "\n".join(block for _, block in readme_blocks())
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for command in re.findall(
        r"`((?:make|musekit|musekit-shards|pip|source|nbdev_install_hooks|accelerate|torchrun)(?: [^`]+)?)`",
        prose,
    ):
        typed = command in blocks or command in UNTYPED or command in ("make", "musekit", "musekit/")
        assert typed or "COMMAND" in command or command.endswith("--help"), command


def test_names_in_the_readme_exist():
    "musekit.room.module.name, or with the method of a class."
    names = re.findall(r"`(musekit(?:\.\w+){3,4})`", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(names) >= 6
    for name in names:
        _, room, module, *rest = name.split(".")
        value = importlib.import_module(f"musekit.{room}.{module}")
        for part in rest:
            value = getattr(value, part)


@pytest.mark.parametrize(
    "target, expected",
    [
        ("test", "pytest"),
        ("lab", "jupyter lab nbs"),
        ("readme", "tests/readme.py --write"),
        ("test-lab", "tests/lab.py --install"),
        ("demo", "musekit demo"),
    ],
)
def test_targets_of_make_that_are_not_typed(target, expected):
    done = subprocess.run(
        ["make", "-n", target, "ARGS=--some-option"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and expected in done.stdout
    assert ("--some-option" in done.stdout) == (target in ("lab", "test-lab", "demo"))
    if target == "lab":
        assert ("--allow-root" in done.stdout) == (os.geteuid() == 0)


def test_the_laboratory_starts(tmp_path):
    "JupyterLab refuses root, which one is in a container, unless an option says that this is meant."
    pytest.importorskip("jupyterlab")
    for name in ("Makefile", "constraints.txt", "settings.ini", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "nbs").mkdir()
    make_environment(tmp_path / ".venv")
    port = free_port()
    options = f"ARGS=--no-browser --port {port} --IdentityProvider.token= --ServerApp.port_retries=0"
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(
            ["make", "lab", options], cwd=tmp_path, stdout=log, stderr=log, start_new_session=True
        )
    try:
        for _ in range(600):
            assert server.poll() is None, (tmp_path / "log").read_text()
            try:
                assert urlopen(f"http://127.0.0.1:{port}/api", timeout=5).status == 200
                break
            except OSError:
                time.sleep(0.1)
        else:
            pytest.fail((tmp_path / "log").read_text())
    finally:
        if server.poll() is None:
            os.killpg(server.pid, 15)
            server.wait(30)
