"""Encoding a data set: killed at any moment, by one process or several, in either form, the codes are
those of the networks."""
import json
import multiprocessing
import os
import pickle
import signal
import tarfile
import time
from dataclasses import replace
from io import BytesIO
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from PIL import Image
from transformers.utils import logging

from children import CHILDREN
from musekit.utils import files
from musekit.models.text_encoders import TextEncoder
from musekit.recipes.clip import ClipTrainingConfig, build_clip, text_tower, train_clip_bpe
from musekit.data.digits import train_samples
from musekit.data.batch_encoder import BatchEncoder
from musekit.data.image_text import ImageTextConfig, make_loader
from musekit.data.packing import write_shards, write_tars
from musekit.data.tokens import open_encoded
from musekit.data.token_manifest import TOKEN_MANIFEST
from musekit.recipes.encode import EncodeOptions, Totals, configure_encoding, encode_shards, load_networks
from musekit.recipes.settings import image_text_config
from musekit.recipes.networks import VQ_MODELS

logging.disable_progress_bar()
SHARDS, TENSORS = 3, ("image_ids", "encoder_hidden_states", "cond_embeds", "micro_conds")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "Three shards of digits, one of them with two broken samples, and two networks that were never trained."
    folder = tmp_path_factory.mktemp("encode")
    torch.manual_seed(0)
    tokenizer = train_clip_bpe(["a red three on blue paper", "a green seven"], 600, 12)
    sizes = ClipTrainingConfig(hidden_size=16, layers=1, projection_dim=16, max_seq_length=12)
    TextEncoder(text_tower(build_clip(tokenizer, 32, sizes)), tokenizer, use_pooled=True).save_pretrained(
        folder / "clip"
    )
    params = dict(levels=2, c_hidden=16, c_latent=4, bottleneck_blocks=1, codebook_size=64, scale_factor=1.0)
    VQ_MODELS["paella_vq"].from_config(params).save_pretrained(folder / "vq")
    rows = [
        dict(image=row["image"], text=row["text"], metadata=row["metadata"])
        for row in islice(train_samples(1), 50)
    ]
    urls = write_shards(rows, folder / "shards", samples_per_shard=20)
    with webdataset.TarWriter(urls[-1]) as writer:  # the last one again, with damage
        for number, sample in enumerate(
            webdataset.WebDataset(write_shards(rows[40:], folder / "good"), shardshuffle=False)
        ):
            damaged = {**sample, "png": sample["png"][:60]} if number == 4 else sample
            writer.write(
                {name: data for name, data in damaged.items() if not (number == 6 and name == "txt")}
            )
    return folder


def settings(place, *more):
    return [
        f"data={place}/shards",
        f"model.vq_model.pretrained={place}/vq",
        f"model.text_encoder.pretrained={place}/clip",
        "training.batch_size=8",
        "dataset.preprocessing.max_seq_length=12",
        *more,
    ]


def encode(place, out, *more, **options):
    return encode_shards(
        configure_encoding("small", settings(place, *more)), EncodeOptions(out, **options), progress=False
    )


def content(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture(scope="module")
def whole(place):
    "What an uninterrupted run writes, by form."
    for form in ("parquet", "tar"):
        totals = encode(place, place / form, form=form)
        assert (totals.shards, totals.samples, totals.skipped, totals.filtered) == (SHARDS, 48, 2, 0)
    return {form: content(place / form) for form in ("parquet", "tar")}


# ---- killed ----

def die_at(place, out, form, event, number):
    "Encodes, and dies at the `number`-th event of a kind."
    seen = {"count": 0}

    def dying(function, after=False):
        def wrapped(*arguments, **options):
            seen["count"] += 1
            if seen["count"] == number and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*arguments, **options)
            if seen["count"] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return wrapped

    if event == "batch":
        BatchEncoder.__call__ = dying(BatchEncoder.__call__)
    else:
        files.os.replace = dying(os.replace, after=event == "renamed")
    encode(place, out, form=form)


def killed(*arguments):
    child = CHILDREN.Process(target=die_at, args=arguments)
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL


# the manifest is renamed first (in tars then the empty prompt), then for each shard its file and its record
MOMENTS = [
    (form, event, number)
    for form, event, last in (
        ("parquet", "rename", 7),
        ("parquet", "renamed", 2),
        ("parquet", "batch", 7),
        ("tar", "rename", 8),
        ("tar", "batch", 2),
    )
    for number in range(1, last + 1)
]


@pytest.mark.parametrize("group", range(5))
def test_killed_at_any_moment_and_run_again_gives_the_same_bytes(place, whole, tmp_path, group):
    for moment in MOMENTS[group::5]:
        out = tmp_path / "-".join(map(str, moment))
        killed(place, out, *moment)
        left = content(out)
        assert left != whole[moment[0]]
        finished = {
            name: data for name, data in left.items() if not name.endswith(".part") and name != TOKEN_MANIFEST
        }
        assert all(
            whole[moment[0]][name] == data for name, data in finished.items()
        ), "a half file under a finished name"
        encode(place, out, form=moment[0])
        assert content(out) == whole[moment[0]], moment


def test_killed_again_and_again(place, whole, tmp_path):
    for number in (3, 2, 2, 3):  # of the renames of each life
        killed(place, tmp_path / "out", "parquet", "rename", number)
    assert (tmp_path / "out" / TOKEN_MANIFEST).read_bytes() == whole["parquet"][TOKEN_MANIFEST]
    encode(place, tmp_path / "out")
    assert content(tmp_path / "out") == whole["parquet"]


def test_a_finished_folder_is_left_alone_and_a_changed_shard_is_made_anew(place, whole, tmp_path):
    encode(place, tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("shard-*")}
    assert encode(place, tmp_path / "out").already == SHARDS
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("shard-*")}
    (tmp_path / "out" / "shard-000001.parquet").write_bytes(b"cut off")
    assert encode(place, tmp_path / "out").already == SHARDS - 1
    assert content(tmp_path / "out") == whole["parquet"]


# ---- several processes ----

def as_rank(place, out, rank, world):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    encode(place, out)


def test_two_ranks_write_what_one_writes(place, whole, tmp_path):
    children = [
        CHILDREN.Process(target=as_rank, args=(place, tmp_path / "out", rank, 2)) for rank in range(2)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0, 0]
    assert content(tmp_path / "out") == whole["parquet"]


@pytest.mark.parametrize("world", [1, 2])
def test_codes_are_not_encoded_again(place, whole, tmp_path, monkeypatch, world):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    write_tars([{"vq.pth": b"ids", "txt": b"a cat"}], tmp_path / "codes")
    with pytest.raises(ValueError, match="holds tokens and no images"):
        encode(place, tmp_path / "out", f"data={tmp_path}/codes")


def test_a_folder_of_pictures_is_packed_by_one_process_alone(place, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "photos" / "a.png")
    with pytest.raises(
        ValueError, match="there are no shards in .*photos, and images in a folder are packed by one process"
    ):
        encode(place, tmp_path / "out", f"data={tmp_path}/photos")


def dies_with_workers(place, out, pids):
    "Dies when the first shard is finished, while its workers are busy with others."
    def die(totals, record):
        pids.write_text(" ".join(str(child.pid) for child in multiprocessing.active_children()))
        os.kill(os.getpid(), signal.SIGKILL)

    Totals.add = die
    torch.set_num_threads(2)
    encode(place, out, workers=2)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_workers_write_the_same_and_end_with_their_parent(place, whole, tmp_path):
    pids, out = tmp_path / "pids", tmp_path / "out"
    child = CHILDREN.Process(target=dies_with_workers, args=(place, out, pids))
    child.start()
    child.join(300)
    assert child.exitcode == -signal.SIGKILL
    workers, until = list(map(int, pids.read_text().split())), time.time() + 60
    while any(map(alive, workers)) and time.time() < until:
        time.sleep(0.1)
    assert len(workers) == 2 and not any(map(alive, workers))
    finished = [name for name in content(out) if name.endswith(".parquet")]
    assert finished and all(content(out)[name] == whole["parquet"][name] for name in finished)
    encode(place, out)
    assert content(out) == whole["parquet"]


# ---- what is written ----

def test_both_forms_are_what_the_networks_say_on_the_fly(place, whole):
    config = configure_encoding("small", settings(place, "dataset.params.max_bad_share=0.5"))
    networks, reading = load_networks(config), image_text_config(config)
    now = [
        BatchEncoder(*networks)(batch)
        for batch in make_loader(sorted(map(str, (place / "shards").glob("*.tar"))), reading, training=False)
    ]
    now = {name: torch.cat([batch[name] for batch in now]) for name in TENSORS}
    for form in ("parquet", "tar"):
        source = open_encoded(place / form)
        source.check(*networks)
        read = list(source.loader(reading, training=False))
        read = {name: torch.cat([batch[name] for batch in read]) for name in TENSORS}
        assert torch.equal(read["image_ids"], now["image_ids"]) and torch.equal(
            read["micro_conds"], now["micro_conds"]
        )
        for name in ("encoder_hidden_states", "cond_embeds"):
            exact = now[name].half().float()
            assert torch.allclose(
                read[name], exact, atol=1e-3, rtol=1e-3
            )  # a batch of another size rounds otherwise


def test_counts_and_keys_are_kept(place, whole):
    record = json.loads(whole["parquet"]["shard-000002.json"])
    assert (record["samples"], record["skipped"]) == (8, 2) and record["last_problem"]
    assert pq.read_table(place / "parquet" / "shard-000002.parquet")["key"].to_pylist() == [
        f"{n:09d}" for n in range(10) if n not in (4, 6)
    ]
    manifest = json.loads(whole["parquet"][TOKEN_MANIFEST])
    assert (
        manifest["vq_model"]["codebook_size"] == 64
        and manifest["resolution"] == 32
        and manifest["filter"] is None
    )


def test_filter_counts_and_an_empty_shard(place, tmp_path):
    strict = "dataset.params.use_filtered_dataset=true"
    totals = encode(place, tmp_path / "out", strict)
    assert totals.samples == 0 and totals.filtered == 49  # one has no caption and is not asked
    assert not list((tmp_path / "out").glob("*.parquet"))
    with pytest.raises(ValueError, match="holds no sample"):
        open_encoded(tmp_path / "out")


def test_codes_of_another_tokenizer_are_refused(place, whole, tmp_path):
    config = configure_encoding("small", settings(place))
    torch.manual_seed(1)
    vq_model, text_encoder = load_networks(config)
    stranger = VQ_MODELS["paella_vq"].from_config(vq_model.config)
    with pytest.raises(ValueError, match="tokens of the tokenizer"):
        open_encoded(place / "parquet").check(stranger, text_encoder)
    with pytest.raises(ValueError, match="text states of the text encoder"):
        open_encoded(place / "tar").check(vq_model, None)
    half = TextEncoder.from_pretrained(
        place / "clip", max_seq_length=12, dtype=torch.bfloat16, use_pooled=True
    )
    open_encoded(place / "parquet").check(vq_model, half)
    longer = TextEncoder.from_pretrained(place / "clip", max_seq_length=11, use_pooled=True)
    with pytest.raises(ValueError, match="length, padding, pooling"):
        open_encoded(place / "parquet").check(vq_model, longer)
    stranger.save_pretrained(tmp_path / "vq")
    with pytest.raises(ValueError, match="tokens encoded with other settings .*vq_model.digest"):
        encode(place, place / "parquet", f"model.vq_model.pretrained={tmp_path}/vq")


@pytest.mark.parametrize("form", ["parquet", "tar"])
@pytest.mark.parametrize("condition", ["class", "nothing"])
def test_classes_and_pictures_without_text(place, tmp_path, form, condition):
    rows = list(islice(train_samples(1), 12))
    members = [
        {"png": save(row["image"])} | ({"cls": str(row["class_id"]).encode()} if condition == "class" else {})
        for row in rows
    ]
    write_tars(members, tmp_path / "data")
    more = ["dataset.type=classification"] if condition == "class" else ["model.text_encoder.type=none"]
    without_text = [setting for setting in settings(place) if "text_encoder" not in setting]
    config = configure_encoding("small", [*without_text, f"data={tmp_path}/data", *more])
    assert encode_shards(config, EncodeOptions(tmp_path / "codes", form=form), progress=False).samples == 12
    source, networks = open_encoded(tmp_path / "codes"), load_networks(config)
    source.check(*networks)
    assert networks[1] is None and source.unconditional == {}
    batch = next(iter(source.loader(ImageTextConfig(batch_size=12), training=False)))
    assert batch["image_ids"].shape == (12, 64) and "encoder_hidden_states" not in batch
    assert (
        batch["class_ids"].tolist() == [row["class_id"] for row in rows]
        if condition == "class"
        else "class_ids" not in batch
    )


def save(image):
    data = BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


# ---- what is read ----

class Trap:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    "damage", ["hostile pickle", "hostile torch", "cut off", "noise", "other shape", "huge id"]
)
def test_a_bad_member_is_skipped_and_counted_and_not_run(place, whole, tmp_path, damage):
    proof, data = tmp_path / "ran", BytesIO()
    torch.save(Trap(proof), data)
    other, huge = BytesIO(), BytesIO()
    torch.save(torch.zeros(5, dtype=torch.long), other)
    torch.save(torch.full((64,), 64), huge)
    (tmp_path / "codes").mkdir()
    for name, raw in whole["tar"].items():
        (tmp_path / "codes" / name).write_bytes(raw)
    target, number = tmp_path / "codes" / "shard-000000.tar", 0
    with tarfile.open(place / "tar" / "shard-000000.tar") as old, tarfile.open(target, "w") as new:
        for member in old:
            raw = old.extractfile(member).read()
            if member.name.endswith("vq.pth") and (number := number + 1) == 3:
                raw = {
                    "hostile pickle": pickle.dumps(Trap(proof), protocol=2),
                    "hostile torch": data.getvalue(),
                    "cut off": raw[:-100],
                    "noise": bytes(range(256)),
                    "other shape": other.getvalue(),
                    "huge id": huge.getvalue(),
                }[damage]
                member.size = len(raw)
            new.addfile(member, BytesIO(raw))
    loader = open_encoded(tmp_path / "codes").loader(
        ImageTextConfig(batch_size=8, shuffle_buffer_size=8), training=False
    )
    read = list(loader)
    assert sum(len(batch["keys"]) for batch in read) == 47 and read[-1]["skipped"] == 1 and not proof.exists()
    endless = open_encoded(tmp_path / "codes").loader(
        ImageTextConfig(batch_size=8, shuffle_buffer_size=8), training=True
    )
    assert max(batch["skipped"] for batch in islice(endless, 30)) >= 1 and not proof.exists()


def test_columnar_epochs_are_exact_over_files_ranks_and_resumes(place, whole):
    source, reading = open_encoded(place / "parquet"), ImageTextConfig(batch_size=6)
    rank = lambda number, start=0: source.loader(
        reading, training=True, rank=number, world_size=2, start_batch=start
    )
    batches = [list(islice(rank(number), 8)) for number in range(2)]
    epochs = [key for step in zip(*batches) for batch in step for key in batch["keys"]]
    assert len(set(epochs[:48])) == len(set(epochs[48:])) == 48 and epochs[:48] != epochs[48:]
    resumed = next(iter(rank(1, 5)))
    assert resumed["keys"] == batches[1][5]["keys"] and all(
        torch.equal(resumed[name], batches[1][5][name]) for name in TENSORS
    )
    ahead = source.loader(replace(reading, num_workers=2), training=True, rank=1, world_size=2, start_batch=5)
    assert [batch["keys"] for batch in islice(ahead, 3)] == [batch["keys"] for batch in batches[1][5:]]
