"""The shard converter as a whole: killed, short of room, run twice, given bad files and bad options."""
import base64
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as encryption
import pytest

from children import CHILDREN
from moody_server import MoodyServer
from musekit.shards import polars_engine
from musekit.shards.catalog import Dataset, dataset_of
from musekit.shards.command import backups_table, main
from musekit.shards.convert import Options, convert
from musekit.shards.download import Connection
from musekit.shards.rechunk import VALIDATION_SHARD, Layout
from musekit.shards.plan import list_shards, verify_shards
from musekit.shards.store import Cache, list_backups, new_set, read_manifest

SMALL = Layout(rows_per_shard=200, rows_per_group=50, num_shards=4)


def texts(seed, count):
    """Documents of some hundred characters that do not compress well."""
    chance = random.Random(seed)
    return [f"{seed} {row} " + chance.randbytes(chance.randint(20, 500)).hex() for row in range(count)]


def write_source(path, rows, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": rows, **columns}), path, row_group_size=100, compression="zstd")
    return path


@pytest.fixture(scope="module")
def hub_files(tmp_path_factory):
    """Three files of 420 rows under the address of a dataset on the hub."""
    folder = tmp_path_factory.mktemp("hub")
    paths = {
        f"datasets/me/words/resolve/main/part-{i}.parquet": write_source(folder / str(i), texts(i, 420))
        for i in range(3)
    }
    return {address: path.read_bytes() for address, path in paths.items()}


@pytest.fixture
def server(hub_files):
    with MoodyServer(hub_files) as server:
        yield server


WORDS = Dataset("words", "me/words", pattern="part-{0..2}.parquet")


@pytest.fixture(scope="module")
def first_set(tmp_path_factory):
    """A cache folder with the data and the tokenizer of the original, as the trainer's preparation leaves
    them."""
    folder = tmp_path_factory.mktemp("first")
    source = write_source(folder / "source.parquet", texts("original", 1_050))
    convert(dataset_of(str(source)), Options(folder / "cache", quiet=True), SMALL)
    (folder / "cache" / "data" / "manifest.json").unlink()
    return folder / "cache" / "data"


def new_cache(first_set, folder):
    """A cache whose shards are copies, so that no test changes another's."""
    cache = Cache(folder)
    shutil.copytree(first_set, cache.data)
    cache.tokenizer.mkdir()
    (cache.tokenizer / "tokenizer.pkl").write_text("of the original")
    return cache


@pytest.fixture
def cache(first_set, tmp_path):
    return new_cache(first_set, tmp_path / "cache")


def digests(folder):
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in list_shards(folder)}


def run_convert(url, folder, layout, result=None, limit=None):
    """What a child process does."""
    if limit:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    options = Options(folder, quiet=True, connection=Connection(endpoint=url))
    try:
        convert(WORDS, options, layout)
    except (ValueError, OSError) as error:
        result.send(str(error))
        sys.exit(1)


def finish(server, cache, **options):
    """Runs a conversion to its end in a child; gives its error, None if it succeeded."""
    here, there = CHILDREN.Pipe()
    child = CHILDREN.Process(
        target=run_convert, args=(server.url, str(cache.folder), SMALL, there), kwargs=options
    )
    child.start()
    child.join(60)
    assert child.exitcode is not None
    return here.recv() if here.poll() else None


MILESTONES = {  # how far a run has come, in this order
    "beginning": lambda folder: True,
    "downloading": lambda folder: list(folder.glob("raw_words/*.part")),
    "cutting": lambda folder: (folder / "partial-next" / "data").exists() or (folder / "next").exists(),
    "verifying": lambda folder: list_shards(folder / "partial-next" / "data") or (folder / "next").exists(),
    "exchanging": (
        lambda folder: (folder / "partial-next" / "data" / "manifest.json").exists()
        or (folder / "next").exists()
    ),
}


def times_of(child, folder):
    """When a run passes each milestone and when it ends, in seconds."""
    times, start = {}, time.perf_counter()
    for name, reached in MILESTONES.items():
        while child.is_alive() and not reached(folder):
            time.sleep(0.0005)
        times[name] = time.perf_counter() - start
    child.join()
    return [*times.values(), time.perf_counter() - start]


def start(server, cache, layout=SMALL):
    child = CHILDREN.Process(target=run_convert, args=(server.url, str(cache.folder), layout))
    child.start()
    return child


def test_killed_at_thirty_moments(server, first_set, tmp_path):
    """Six kills in each of five stretches of a run, at random, so that short stretches are met as well as
    long ones."""
    old, chance, server.pause = digests(first_set), random.Random(0), 0.01
    for attempt in ("warm", "whole"):
        cache = new_cache(first_set, tmp_path / attempt)
        times = times_of(start(server, cache), cache.folder)
    new, counts, stretches = digests(cache.data), {"old": 0, "new": 0}, {name: 0 for name in MILESTONES}
    for trial in range(30):
        cache, which = new_cache(first_set, tmp_path / str(trial)), trial % len(MILESTONES)
        child, name = start(server, cache), list(MILESTONES)[which]
        while child.is_alive() and not MILESTONES[name](cache.folder):
            time.sleep(0.0005)
        time.sleep(chance.uniform(0, times[which + 1] - times[which]))
        stretches[name] += child.is_alive()
        child.kill()
        child.join()
        now = digests(cache.data)
        assert now in (old, new), f"trial {trial}: neither the old set nor the new one is whole"
        verify_shards(cache.data, SMALL)
        counts["old" if now == old else "new"] += 1
        assert now == old or not cache.tokenizer.exists(), "the old tokenizer stands beside the new data"
        for backup in list_backups(cache.folder):
            assert not backup.problem and digests(backup.path / "data") == old
        server.pause = 0
        assert finish(server, cache) is None
        server.pause = 0.01
        assert digests(cache.data) == new and not cache.tokenizer.exists()
        assert not [path.name for path in cache.folder.iterdir() if path.name.startswith(("partial", "next"))]
        assert digests(cache.backup("climbmix") / "data") == old
        assert (cache.backup("climbmix") / "tokenizer" / "tokenizer.pkl").read_text() == "of the original"
        shutil.rmtree(cache.folder)
    print(
        f"whole run {times[-1]:.2f} s; 30 kills, alive when killed while {stretches}; found {counts}; every"
        " next run finished"
    )
    assert sum(stretches.values()) >= 10 and counts["old"] > 0


def test_workers_end_with_a_killed_parent(cache, tmp_path):
    old, source = digests(cache.data), write_source(tmp_path / "source.parquet", texts("many", 3_000))
    command = [
        sys.executable,
        "-m",
        "musekit.shards",
        "--from",
        source,
        "--cache-dir",
        cache.folder,
        "--processes",
        "2",
        "--quiet",
    ]
    with subprocess.Popen(command) as process:
        while process.poll() is None and len(workers := workers_of(process.pid)) < 2:
            time.sleep(0.01)
        process.kill()
    deadline = time.monotonic() + 60
    while any(os.path.exists(f"/proc/{worker}") for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(workers) == 2 and not [worker for worker in workers if os.path.exists(f"/proc/{worker}")]
    assert digests(cache.data) == old
    assert subprocess.run(command).returncode == 0 and read_manifest(cache.data)["rows"] == 3_000


def workers_of(pid):
    """Process numbers of a pool's workers, not of multiprocessing's own tracker."""
    with suppress(FileNotFoundError):
        children = open(f"/proc/{pid}/task/{pid}/children").read().split()
        return [child for child in children if "spawn_main" in open(f"/proc/{child}/cmdline").read()]
    return []


@pytest.mark.parametrize("validation", ["last", "first"])
def test_the_result_is_what_was_asked_for(server, cache, hub_files, validation):
    layout = Layout(rows_per_shard=200, rows_per_group=50, num_shards=4, validation=validation)
    manifest = convert(
        WORDS, Options(cache.folder, quiet=True, connection=Connection(endpoint=server.url)), layout
    )
    kept = [text for part in range(3) for text in texts(part, 420) if len(text) >= 50][:1_000]
    names = list_shards(cache.data)[:-1]
    order = [VALIDATION_SHARD, *names] if validation == "first" else [*names, VALIDATION_SHARD]
    assert [
        text for name in order for text in pq.read_table(cache.data / name).column("text").to_pylist()
    ] == kept
    assert manifest == read_manifest(cache.data) and manifest["kept"] == 1_000
    assert {shard["name"]: shard["sha256"] for shard in manifest["shards"]} == digests(cache.data)
    assert [source["bytes"] for source in manifest["sources"]] == [
        len(content) for content in hub_files.values()
    ]


def test_only_what_was_asked_for_is_converted(server, cache):
    raw = cache.folder / "raw_words"
    write_source(raw / "another.parquet", texts("another", 500))
    options = Options(cache.folder, num_source=1, quiet=True, connection=Connection(endpoint=server.url))
    manifest = convert(WORDS, options, SMALL)
    assert manifest["kept"] == 420 - manifest["dropped"].get("too short", 0) and len(server.requests) == 1


@pytest.mark.parametrize("engine", ["arrow", "polars"])
def test_executors_give_the_same_bytes(server, cache, engine):
    pytest.importorskip("polars") if engine == "polars" else None
    layout, shards = replace(SMALL, engine=engine), []
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        for changes in ({}, {"remote": True}, {"executor": pool}):
            options = Options(cache.folder, quiet=True, connection=Connection(endpoint=server.url), **changes)
            shards.append(convert(WORDS, options, layout)["shards"])
    assert shards[0] == shards[1] == shards[2]
    assert read_manifest(cache.data)["layout"]["engine"] == engine


def test_polars_is_missed_before_anything_is_fetched(server, cache, monkeypatch, capsys):
    polars_engine._import.cache_clear()
    monkeypatch.setitem(sys.modules, "polars", None)
    arguments = ["--from", f"{server.url}/a.parquet", "--engine", "polars", "--cache-dir", str(cache.folder)]
    assert main(arguments) == 1
    assert "pip install 'musekit[polars]'" in capsys.readouterr().err and not server.requests
    with pytest.raises(SystemExit):
        main(["climbmix", "--engine", "duckdb"])
    assert "'duckdb'" in capsys.readouterr().err


def test_the_second_of_two_runs_is_refused(server, cache):
    server.pause = 0.05
    child = CHILDREN.Process(target=run_convert, args=(server.url, str(cache.folder), SMALL))
    child.start()
    while not server.requests:
        time.sleep(0.01)
    with pytest.raises(ValueError, match=f"in use by process {child.pid}"):
        convert(WORDS, Options(cache.folder, quiet=True, connection=Connection(endpoint=server.url)), SMALL)
    child.join(30)
    assert child.exitcode == 0 and read_manifest(cache.data)["dataset"] == "words"


@contextmanager
def small_disk(folder, size, options=""):
    """A file system of so many bytes; the test is skipped where nobody may mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}{options}", "tmpfs", folder], capture_output=True
    )
    if done.returncode:
        pytest.skip("no right to mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_anywhere_loses_nothing(server, first_set, tmp_path):
    old, failures = digests(first_set), {"asked beforehand": 0, "new set": 0, "none": 0}
    on_disk = lambda files: sum(-(-size // 4096) * 4096 for size in files)
    here, sources = on_disk(path.stat().st_size for path in first_set.iterdir()), on_disk(
        map(len, server.files.values())
    )
    sizes = [here + sources // 3, here + sources - 50_000]
    sizes += [
        here + sources + extra for extra in (50_000, *range(int(0.75 * sources), int(1.2 * sources), 16_384))
    ]
    for size in sizes:
        with small_disk(tmp_path / "disk", size) as disk:
            cache = new_cache(first_set, disk / "cache")
            error = finish(server, cache)
            if error:
                assert digests(cache.data) == old and (cache.tokenizer / "tokenizer.pkl").exists(), size
                assert "No space left" in error or "GB are free" in error, error
                assert not (cache.folder / "next").exists()
            else:
                assert read_manifest(cache.data)["dataset"] == "words"
            verify_shards(cache.data, SMALL)
            assert {backup.name for backup in list_backups(cache.folder) if not backup.problem} <= {
                "climbmix"
            }
            failures["none" if not error else "asked beforehand" if "are free" in error else "new set"] += 1
    print(f"disk full: {failures}")
    assert all(failures.values()), failures


def fill(disk):
    """Takes all that is free on a disk."""
    with suppress(OSError), open(disk / "filler", "wb", buffering=0) as filler:
        while filler.write(bytes(4096)):
            pass


def test_a_disk_that_fills_up_while_downloading(server, first_set, tmp_path):
    old, server.pause = digests(first_set), 0.05
    with small_disk(tmp_path / "disk", 20_000_000) as disk:
        cache = new_cache(first_set, disk / "cache")
        here, there = CHILDREN.Pipe()
        child = CHILDREN.Process(target=run_convert, args=(server.url, str(cache.folder), SMALL, there))
        child.start()
        while not list(cache.folder.glob("raw_words/*.part")):
            time.sleep(0.001)
        fill(disk)
        child.join(60)
        error = here.recv()
        assert ("No space left" in error or "are free" in error) and str(
            cache.folder / "raw_words"
        ) in error, error
        assert digests(cache.data) == old and (cache.tokenizer / "tokenizer.pkl").exists()
        (disk / "filler").unlink()
        server.pause = 0
        assert finish(server, cache) is None and digests(cache.backup("climbmix") / "data") == old


def test_a_disk_that_fills_up_just_before_the_exchange(server, first_set, tmp_path, capsys):
    old = digests(first_set)
    with small_disk(tmp_path / "disk", 20_000_000) as disk:
        cache = new_cache(first_set, disk / "cache")
        with pytest.raises(OSError, match="No space left"), new_set(cache) as aside:
            shutil.copytree(first_set, aside / "data", dirs_exist_ok=True)
            fill(disk)
        assert digests(cache.data) == old and (cache.tokenizer / "tokenizer.pkl").exists()
        assert main(["--from", str(disk / "filler"), "--cache-dir", str(cache.folder)]) == 1
        assert_one_line(capsys)
        (disk / "filler").unlink()
        assert finish(server, cache) is None and digests(cache.backup("climbmix") / "data") == old


@pytest.mark.parametrize("options", [{}, {"remote": True}], ids=str)
def test_what_does_not_fit_is_refused_before_it_is_fetched(server, first_set, tmp_path, monkeypatch, options):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    here = sum(-(-path.stat().st_size // 4096) * 4096 for path in first_set.iterdir())
    with small_disk(tmp_path / "disk", here + 100_000) as disk:
        cache = new_cache(first_set, disk / "cache")
        with pytest.raises(OSError, match="GB are free") as caught:
            convert(WORDS, Options(cache.folder, quiet=True, **options), SMALL)
        assert str(disk) in str(caught.value) and shutil.disk_usage(disk).free > 50_000


@pytest.mark.parametrize("limit, message", [(90_000, "too large"), (20_000, "too large")])
def test_files_that_may_not_grow(server, cache, limit, message):
    old = digests(cache.data)
    error = finish(server, cache, limit=limit)
    assert message in error and digests(cache.data) == old and cache.tokenizer.exists()


def test_a_quota_while_cutting(server, cache):
    old = digests(cache.data)
    assert finish(server, cache) is None
    shutil.rmtree(cache.data)
    shutil.copytree(cache.backup("climbmix") / "data", cache.data)
    assert "too large" in finish(server, cache, limit=20_000)
    assert digests(cache.data) == old and not (cache.folder / "partial-next").exists()
    assert finish(server, cache) is None and len(list_shards(cache.data)) == 5


def test_a_cache_that_cannot_be_written(server, first_set, tmp_path, capsys):
    with small_disk(tmp_path / "disk", 10_000_000) as disk:
        cache = new_cache(first_set, disk / "cache")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        old = digests(cache.data)
        assert main(["fineweb-edu", "--cache-dir", str(cache.folder)]) == 1
        assert_one_line(capsys, "Read-only file system")
        assert main(["--list-backups", "--cache-dir", str(cache.folder)]) == 0
        assert digests(cache.data) == old


def assert_one_line(capsys, *parts):
    said = capsys.readouterr().err
    assert (
        said.startswith("musekit-shards: ") and said.count("\n") == 1 and all(part in said for part in parts)
    ), said


def corrupt_page(path):
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2000] = bytes(2000)
    path.write_bytes(content)


LONG = "a text of more than fifty characters, as every text should be that is kept"


@pytest.mark.parametrize(
    "make, arguments, message",
    [
        (lambda path: pq.write_table(pa.table({"body": [LONG] * 9}), path), [], "no column 'text'"),
        (lambda path: pq.write_table(pa.table({"text": [1, 2, 3]}), path), [], "not text"),
        (lambda path: pq.write_table(pa.table({"text": [b"bytes"]}), path), [], "not text"),
        (
            lambda path: pq.write_table(pa.table({"text": pa.array([None] * 5, pa.string())}), path),
            [],
            "5 no text",
        ),
        (lambda path: pq.write_table(pa.table({"text": ["short"] * 5}), path), [], "5 too short"),
        (lambda path: pq.write_table(pa.table({"text": pa.array([], pa.string())}), path), [], "0 read"),
        (
            lambda path: write_source(path, [LONG] * 9, score=["high"] * 9),
            ["--score-column", "score", "--min-score", "1"],
            "number",
        ),
        (
            lambda path: write_source(path, [LONG] * 9, score=[1] * 9),
            ["--score-column", "score", "--min-score", "3"],
            "9 low score",
        ),
        (
            lambda path: write_source(path, [LONG] * 9),
            ["--score-column", "score", "--min-score", "3"],
            "no column 'score'",
        ),
        (lambda path: corrupt_page(write_source(path, texts("corrupt", 900))), [], "source.parquet"),
        (
            lambda path: path.write_bytes(write_source(path, [LONG] * 9).read_bytes()[:-20]),
            [],
            "source.parquet",
        ),
        (lambda path: path.write_text("<!DOCTYPE html>"), [], "source.parquet"),
        (lambda path: path.write_bytes(b""), [], "source.parquet"),
    ],
)
def test_bad_sources(cache, tmp_path, capsys, make, arguments, message):
    source, old = tmp_path / "source.parquet", digests(cache.data)
    make(source)
    assert main(["--from", str(source), "--cache-dir", str(cache.folder), "--quiet", *arguments]) == 1
    assert_one_line(capsys, message)
    assert digests(cache.data) == old and (cache.tokenizer / "tokenizer.pkl").exists()
    assert {path.name for path in cache.folder.iterdir()} == {".lock", "data", "tokenizer", "backup_climbmix"}


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        (["fineweb-edo"], 1, "Did you mean 'fineweb-edu'"),
        (["--num-shards", "-1"], 2, "'-1'"),
        (["x", "--num-source", "0"], 2, "'0'"),
        (["x", "--workers", "many"], 2, "'many'"),
        (["x", "--min-characters", "-5"], 2, "'-5'"),
        (["x", "--codec", "gzip"], 2, "gzip"),
        (["x", "--min-score", "-1"], 2, "'-1'"),
        (["x", "--validation", "middle"], 2, "middle"),
        (["x", "--no-such"], 2, "no-such"),
        (["--from", "nothing/*.parquet"], 1, "nothing/*.parquet"),
        (["--repo", "me/words"], 1, "pattern"),
        (["x", "--datasets", "nothing.yaml"], 1, "nothing.yaml"),
        (["fineweb", "--score-column", "s"], 1, "min_score"),
        (["--restore", "--cache-dir", "nowhere"], 1, "does not exist"),
        (["a/b", "--from", __file__], 1, "a/b"),
        (["fineweb", "--num-shards", "7000"], 1, "7000"),
        (["--pattern", "a.parquet"], 2, "--repo"),
        (["--restore", "--dry-run"], 2, "not allowed"),
        (["--repo", "a/b", "--pattern", "0.parquet", "1.parquet", "2.parquet"], 2, "quotes"),
        (["--datasets", "own.yaml"], 2, "own.yaml"),
        (["--repo", "a/b", "--pattern", "0.parquet", "data/1.parquet", "--dry-run"], 1, "quotes"),
        (["x", "--datasets", "broken.yaml"], 1, "broken.yaml"),
        (["x", "--datasets", "number.yaml"], 1, "files=[5]"),
        (["x", "--datasets", "count.yaml"], 1, "count.yaml: x"),
        (["fineweb", "--num-shards", "6543"], 1, "at most 6542"),
        (["--repo", "https://a/b", "--pattern", "0.parquet"], 1, "owner/name"),
        (["--repo", "a/b", "--pattern", "*.parquet?x=1"], 1, "question mark"),
        (["fineweb", "--cache-dir", "broken.yaml"], 1, "no folder"),
        (["--from", "https://a/*.parquet"], 1, "braces"),
        (["--from", "a.parquet", "--repo", "a/b"], 2, "not allowed"),
        (["fineweb", "--pattern", "a.parquet"], 2, "--repo"),
        (["words", "--restore"], 2, "behind --restore"),
        (["--restore", "--text-column", "body"], 2, "behind --restore"),
        (["--list-backups", "--quiet"], 2, "--cache-dir and --layout alone"),
        (["--restore", "--processes", "2"], 2, "behind --restore"),
        (["--from", __file__, "--revision", "v2"], 1, "revision"),
        (["x", "--datasets", "revision.yaml"], 1, "revision"),
        (["--from", "https://a/b.parquet", "--num-source", "0"], 2, "'0'"),
        (["--from", "https://a/b/%2e%2e"], 1, "ends in a folder"),
        (["--from", "HTTPS://a/*.parquet"], 1, "braces"),
        (["own.parquet"], 1, "--from"),
        (["me/words"], 1, "--repo"),
        (["https://a/b.parquet"], 1, "--from"),
        (["fineweb", "--cache-dir", ""], 1, "no folder"),
        (["fineweb", "--cache-dir", "s3://a/b"], 1, "no folder"),
        (["x", "--min-score", "inf"], 2, "'inf'"),
        (["--list-backups", "--cache-dir", "broken.yaml"], 1, "no folder"),
        (["--restore", "--cache-dir", "broken.yaml"], 1, "no folder"),
        (["fineweb", "--remote", "--processes", "2"], 2, "everything twice"),
        (["--repo", "a/b", "--pattern", "{0..3.parquet"], 1, "a--b': pattern="),
        (["2024", "--datasets", "files.yaml"], 1, "files.yaml: 2024: no file matches 'gone/*.parquet'"),
        (["x", "--datasets", "files.yaml"], 1, "2024"),
        (["fineweb", "--download-dir", "cache/backup_a/raw"], 1, "trainer's"),
        (["fineweb", "--download-dir", "s3://a/b"], 1, "no folder"),
        (["--from", "https://"], 1, "https://"),
        (["--from", "http://["], 1, "http://["),
        (["--from", "s3://a/b.parquet"], 1, "s3://a/b.parquet"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, arguments, status, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.yaml").write_text("x: [1")
    (tmp_path / "number.yaml").write_text("x: {files: [5]}")
    (tmp_path / "files.yaml").write_text("2024: {files: gone/*.parquet}")
    (tmp_path / "count.yaml").write_text("x: {files: 5}")
    (tmp_path / "revision.yaml").write_text(f"x: {{files: {__file__}, revision: v2}}")
    arguments = arguments if "--cache-dir" in arguments else [*arguments, "--cache-dir", "cache"]
    try:
        assert main(arguments) == status
    except SystemExit as end:
        assert end.code == status
    assert_one_line(capsys, message)


@pytest.mark.parametrize(
    "more, message",
    [
        (["--remote"], "note        --remote has no effect: all files are on this machine"),
        (["--workers", "8"], "note        --workers has no effect: all files are on this machine"),
        (
            ["--workers", "8", "--download-dir", "raw"],
            "note        --workers and --download-dir have no effect: all files are on this machine",
        ),
        ([], ""),
    ],
    ids=str,
)
@pytest.mark.parametrize("way", [[], ["--dry-run"], ["--quiet"]], ids=str)
def test_options_for_servers_say_so_where_all_files_are_here(
    cache, tmp_path, monkeypatch, capsys, more, message, way
):
    monkeypatch.chdir(tmp_path)
    source = write_source(tmp_path / "source.parquet", texts("here", 900))
    assert main(["--from", str(source), "--cache-dir", str(cache.folder), *more, *way]) == 0
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if "no effect" in line] == (
        [message] if message and way != ["--quiet"] else []
    )
    assert not (tmp_path / "raw").exists()
    assert not list(cache.folder.glob("raw_*"))


def test_options_for_servers_are_not_called_useless_where_one_file_is_on_a_server(tmp_path, capsys):
    source = write_source(tmp_path / "source.parquet", texts("here", 900))
    files = ["--from", str(source), "https://a/b.parquet", "--workers", "8"]
    for which in (files, ["fineweb", "--remote"]):
        assert main([*which, "--dry-run", "--cache-dir", str(tmp_path / "cache")]) == 0
        assert "no effect" not in capsys.readouterr().out


def test_no_name_is_help_and_exit_2(capsys):
    assert main([]) == 2
    said = capsys.readouterr().out
    for option in (
        "--num-shards",
        "--num-source",
        "--download-dir",
        "--dry-run",
        "--restore",
        "--list-backups",
        "--skip-backup",
        "--workers",
        "--cache-dir",
    ):
        assert option in said
    assert "fineweb-edu-high" in said and "--from" in said


@pytest.mark.parametrize("name", ["fineweb-edu-high", "climbmix"])
def test_a_dry_run_needs_no_network_and_writes_nothing(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert main([name, "--dry-run", "--num-source", "2", "--cache-dir", str(tmp_path / "cache")]) == 0
    said = capsys.readouterr().out
    assert said.count("http://127.0.0.1:9/datasets/") == 2 and "GB" in said and "10 + 1 shards" in said
    assert list(tmp_path.iterdir()) == []


def test_there_and_back_on_the_command_line(server, cache, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    old, place = digests(cache.data), ["--cache-dir", str(cache.folder)]
    own = cache.folder.parent / "own.yaml"
    own.write_text("words: {repo: me/words, pattern: 'part-{0..2}.parquet'}\n")
    assert main(["words", "--datasets", str(own), "--codec", "snappy", *place]) == 0
    said = capsys.readouterr().out
    assert "uv run prepare.py --num-shards 1" in said and "warning" in said and "1,260 read" in said
    assert pq.read_metadata(cache.data / VALIDATION_SHARD).row_group(0).column(0).compression == "SNAPPY"
    assert main(["--repo", "me/words", "--pattern", "part-{0..1}.parquet", "--quiet", *place]) == 0
    assert capsys.readouterr().out == "" and read_manifest(cache.data)["rows"] == 840
    assert main(["--list-backups", *place]) == 0
    assert re.search(r"climbmix +climbmix +5 .*\nwords +words +2 ", capsys.readouterr().out)
    assert main(["--restore", *place]) == 0
    assert digests(cache.data) == old and (cache.tokenizer / "tokenizer.pkl").read_text() == "of the original"
    assert main(["--restore", "words", *place]) == 0
    assert read_manifest(cache.data)["dataset"] == "words" and not cache.tokenizer.exists()
    assert main(["--restore", "wrods", *place]) == 1
    assert_one_line(capsys, "Did you mean 'words'")


def test_no_cache_folder_is_an_empty_list(tmp_path, capsys):
    assert main(["--list-backups", "--cache-dir", str(tmp_path / "none")]) == 0
    assert (
        capsys.readouterr().out == f"no backups in {tmp_path / 'none'}\n" and not (tmp_path / "none").exists()
    )


def test_skip_backup_and_a_missing_file(server, cache, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    old, place = digests(cache.data), ["--cache-dir", str(cache.folder), "--skip-backup", "--quiet"]
    assert main(["--repo", "me/words", "--pattern", "part-{7..8}.parquet", *place]) == 1
    assert_one_line(capsys, "404", "check the repository")
    assert digests(cache.data) == old
    assert main(["--repo", "me/words", "--pattern", "part-{0..1}.parquet", *place]) == 0
    assert list_backups(cache.folder) == []


@pytest.mark.parametrize("shared", [[], ["--download-dir", "one"], ["texts"]], ids=str)
def test_two_repositories_with_one_last_name_are_kept_apart(server, cache, monkeypatch, capsys, shared):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.chdir(cache.folder.parent)
    place, made = [
        "--pattern",
        "part-{0..1}.parquet",
        "--quiet",
        "--cache-dir",
        str(cache.folder),
        *shared,
    ], {}
    for number, owner in enumerate(("alice", "bob")):
        for part in range(2):
            source = server.files[f"datasets/me/words/resolve/main/part-{part + number}.parquet"]
            server.files[f"datasets/{owner}/texts/resolve/main/part-{part}.parquet"] = source
    for owner in ("alice", "bob", "alice"):
        assert main(["--repo", f"{owner}/texts", *place]) == 0
        manifest = read_manifest(cache.data)
        assert all(f"/{owner}/texts/" in source["from"] for source in manifest["sources"])
        assert made.setdefault(owner, manifest["shards"]) == manifest["shards"]
    assert made["alice"] != made["bob"]
    names = ["texts", "texts-2"] if "texts" in shared else ["alice--texts", "bob--texts"]
    assert [backup.name for backup in list_backups(cache.folder)] == ["climbmix", *names]
    if not shared:
        assert not list(cache.folder.rglob("*.bad")) and len(server.requests) == 4
    for name, owner in zip(names, made):
        assert main(["--restore", name, "--quiet", "--cache-dir", str(cache.folder)]) == 0
        assert read_manifest(cache.data)["shards"] == made[owner]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--from", "own.parquet"],
        ["--repo", "me/words", "--pattern", "part-0.parquet"],
        ["--datasets", "own.yaml"],
    ],
    ids=" ".join,
)
def test_nothing_of_ones_own_passes_for_the_catalogue(cache, monkeypatch, capsys, arguments):
    monkeypatch.chdir(cache.folder.parent)
    write_source(cache.folder.parent / "own.parquet", [LONG] * 9)
    (cache.folder.parent / "own.yaml").write_text("climbmix: {repo: me/words, pattern: part-0.parquet}")
    assert main(["climbmix", *arguments, "--cache-dir", str(cache.folder)]) == 1
    assert_one_line(capsys, "another name")


@pytest.mark.parametrize("more", [[], ["--remote"], ["--processes", "2"]], ids=str)
def test_addresses_beside_local_files(server, cache, tmp_path, capsys, more):
    own, folder = (
        write_source(tmp_path / "own.parquet", texts("own", 300)),
        f"{server.url}/datasets/me/words/resolve/main",
    )
    files = [f"{folder}/part-0.parquet", str(own), f"{folder}/part-{{1..2}}.parquet"]
    server.moods["datasets/me/words/resolve/main/part-1.parquet"] = [(503, {})]
    place = ["--cache-dir", str(cache.folder), "--quiet", *more]
    assert main(["--from", *files, *place]) == 0
    rows = [
        text
        for seed, count in ((0, 420), ("own", 300), (1, 420), (2, 420))
        for text in texts(seed, count)
        if len(text) >= 50
    ]
    kept = [
        text
        for name in list_shards(cache.data)
        for text in pq.read_table(cache.data / name).column("text").to_pylist()
    ]
    assert kept == rows and len(server.requests) > 3
    manifest, host = read_manifest(cache.data), server.url.removeprefix("http://").replace(":", "--")
    assert [source["from"] for source in manifest["sources"]] == [
        f"{folder}/part-0.parquet",
        str(own),
        f"{folder}/part-1.parquet",
        f"{folder}/part-2.parquet",
    ]
    assert manifest["dataset"] == f"{host}--datasets--me--words--resolve--main"
    server.requests.clear()
    assert main(["--from", *files, *place]) == 0 and bool(server.requests) == ("--remote" in more)
    assert bool(list(cache.folder.glob("raw_*"))) == ("--remote" not in more)


SECRET = "s3cret/s3cret"
BUSY = (503, {"Retry-After": "7000"})


def assert_never_shown(folder, said):
    """No file, no name of a file and no line that was printed holds a part of the secret."""
    leaks = [
        path
        for path in folder.rglob("*")
        if "s3cret" in path.name or path.is_file() and b"s3cret" in path.read_bytes()
    ]
    assert not leaks and "s3cret" not in said, (leaks, said)


@pytest.mark.parametrize("more", [[], ["--remote"], ["--processes", "2"], ["--dry-run"]], ids=" ".join)
def test_a_signature_is_never_written_down_or_printed(server, cache, capsys, more):
    for number, content in enumerate(list(server.files.values())):
        server.files[f"texts/part-{number}.parquet?sig={SECRET}"] = content
    signed = f"{server.url}/texts/part-{{0..2}}.parquet?sig={SECRET}"
    for _ in range(2):  # the second set is made of what was fetched, and the first becomes a backup
        assert main(["--from", signed, "--num-shards", "1", "--cache-dir", str(cache.folder), *more]) == 0
    assert_never_shown(cache.folder, "".join(capsys.readouterr()))
    assert (
        "--dry-run" in more
        or read_manifest(cache.data)["sources"][0]["from"] == f"{server.url}/texts/part-0.parquet"
    )


@pytest.mark.parametrize(
    "mood",
    [
        "good",
        (404, {}),
        (403, {}),
        BUSY,
        "page",
        "no ranges",
        (302, {"Location": f"ftp://a/b?sig={SECRET}"}),
        (302, {"Location": f"http://127.0.0.1:9/b?sig={SECRET}"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("remote", [False, True])
def test_a_failure_does_not_show_a_signature(server, cache, capsys, monkeypatch, mood, remote):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    path = f"texts/part-0.parquet?sig={SECRET}"
    server.files[path], server.moods[path] = b"PAR1 and no more", [mood] * 9
    options = Options(cache.folder, remote=remote, connection=Connection(sleep=lambda seconds: None))
    with pytest.raises((OSError, ValueError), match="texts/part-0.parquet|127.0.0.1:9/b") as caught:
        convert(dataset_of(f"{server.url}/{path}"), options, SMALL)
    assert_never_shown(cache.folder, str(caught.value) + "".join(capsys.readouterr()))


@pytest.mark.parametrize(
    "columns",
    [["--text-column", "body"], ["--text-column", "number"], ["--score-column", "text", "--min-score", "1"]],
    ids=str,
)
def test_an_error_about_a_file_does_not_show_a_signature(server, cache, capsys, columns):
    path = write_source(cache.folder.parent / "source.parquet", [LONG] * 9, number=[1] * 9)
    server.files[f"texts/part-0.parquet?sig={SECRET}"] = path.read_bytes()
    assert (
        main([
            "--from",
            f"{server.url}/texts/part-0.parquet?sig={SECRET}",
            "--remote",
            "--quiet",
            "--cache-dir",
            str(cache.folder),
            *columns,
        ])
        == 1
    )
    said = capsys.readouterr().err
    assert f"{server.url}/texts/part-0.parquet" in said
    assert_never_shown(cache.folder, said)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--from", f"https://a/{{0..2.parquet?sig={SECRET}"],
        ["--from", f"https://a/*.parquet?sig={SECRET}"],
        [f"https://a/b.parquet?sig={SECRET}"],
        ["--from", "https://me:s3cret@a/b.parquet"],
        ["x", "--datasets", "own.yaml"],
        ["x", "--datasets", "broken.yaml"],
        ["--repo", "a/b", "--pattern", "a.parquet", "x", f"https://a/b.parquet?sig={SECRET}"],
        ["--from", f"s3://a/b.parquet?sig={SECRET}"],
        ["--from", f"ftp://u:s3cret@a/b.parquet?sig={SECRET}"],
        ["--from", f"http:/a/b.parquet?sig={SECRET}"],
        ["--from", f"https:a/b.parquet?sig={SECRET}"],
        ["y", "--datasets", "own.yaml"],
        ["x", "--datasets", f"https://a/own.yaml?sig={SECRET}"],
        ["--repo", "https://u:s3cret@a/o/n", "--pattern", "x"],
        ["--repo", f"a/b?sig={SECRET}", "--pattern", "x"],
        ["--repo", "a/b", "--pattern", f"x*.parquet?sig={SECRET}"],
        ["--repo", "a/b", "--pattern", f"{{0..3.parquet?sig={SECRET}"],
        ["--restore", f"https://a/x?sig={SECRET}"],
        ["fineweb", "--num-shards", f"https://u:s3cret@a?sig={SECRET}"],
        ["fineweb", "--download-dir", f"s3://u:s3cret@a/b?sig={SECRET}"],
    ],
    ids=" ".join,
)
def test_a_mistake_in_a_secret_address_is_one_line_without_it(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cache").mkdir()
    (tmp_path / "own.yaml").write_text(
        f"x: {{files: 'https://me:s3cret@a/b.parquet'}}\ny: {{files: 'htp://a/b.parquet?sig={SECRET}'}}"
    )
    (tmp_path / "broken.yaml").write_text(f"x: {{files: https://a/b?sig={SECRET}]}}")
    try:
        assert main([*arguments, "--cache-dir", "cache"]) == 1
    except SystemExit as end:
        assert end.code == 2
    said = capsys.readouterr().err
    assert said.startswith("musekit-shards: ") and said.count("\n") == 1 and "s3cret" not in said, said
    assert ("leave out" in said) == ("me:" in str(arguments) or arguments == ["x", "--datasets", "own.yaml"])
    assert ("only local files, http://" in said) == any(
        scheme in str(arguments) for scheme in ("s3://a", "ftp:", "http:/a", "'y'")
    )


def test_one_entry_of_a_file_of_datasets_needs_no_other(cache, tmp_path, monkeypatch):
    write_source(tmp_path / "mine" / "tiny.parquet", texts("tiny", 90))
    (tmp_path / "mine" / "own.yaml").write_text(
        "gone: {files: gone/*.parquet}\n2024: {files: [tiny.parquet, '*y.parquet']}"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["2024", "--datasets", "mine/own.yaml", "--quiet", "--cache-dir", str(cache.folder)]) == 0
    assert (
        (manifest := read_manifest(cache.data))["dataset"] == "2024"
        and manifest["rows"] == 90
        and len(manifest["sources"]) == 1
    )


def test_the_report_of_the_bytes_received(server, cache, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    arguments = ["--repo", "me/words", "--pattern", "part-{0..2}.parquet", "--cache-dir", str(cache.folder)]
    for more in (["--remote"], []):
        server.sent = 0
        assert main([*arguments, *more]) == 0
        came = read_manifest(cache.data)["bytes_fetched"]
        assert came == (server.sent if more else None)
        assert ("came over the network" in capsys.readouterr().out) == bool(more)


def test_a_validation_shard_of_a_few_rows_is_reported(cache, tmp_path, capsys):
    rows = 2 * Layout.rows_per_shard + 1
    pq.write_table(pa.table({"text": [LONG] * rows}), tmp_path / "many.parquet", row_group_size=8192)
    for more, held_out in (([], 1), (["--validation", "first"], Layout.rows_per_shard)):
        assert (
            main([
                "--from",
                str(tmp_path / "many.parquet"),
                "--cache-dir",
                str(cache.folder),
                "--skip-backup",
                *more,
            ])
            == 0
        )
        assert pq.read_metadata(cache.data / VALIDATION_SHARD).num_rows == held_out
        note = "only 1 row held out: there were no more rows; --validation first holds out a whole shard"
        assert (note in (said := capsys.readouterr().out)) == (held_out == 1) and ("held out" in said) == (
            held_out == 1
        )


@pytest.mark.parametrize("count, total", [([], 5), (["--num-source", "2"], 2)], ids=str)
def test_the_first_files_or_all_of_them(server, cache, count, total):
    files = [
        f"{server.url}/datasets/me/words/resolve/main/part-{{0..2}}.parquet",
        *[f"{server.url}/x/part-{part}.parquet" for part in (3, 4)],
    ]
    for part, content in zip((3, 4), list(server.files.values())):
        server.files[f"x/part-{part}.parquet"] = content
    assert main(["--from", *files, *count, "--quiet", "--cache-dir", str(cache.folder)]) == 0
    assert len(read_manifest(cache.data)["sources"]) == total == len(server.requests)
    options = Options(cache.folder, quiet=True, **({"num_source": 2} if count else {}))
    assert len(convert(dataset_of(files), options, SMALL)["sources"]) == total


@pytest.mark.parametrize("more", [[], ["--remote"]], ids=str)
@pytest.mark.parametrize("hub", [True, False])
def test_the_token_is_advised_for_the_hub_alone(server, cache, monkeypatch, capsys, more, hub):
    monkeypatch.setenv("HF_ENDPOINT", server.url if hub else "http://127.0.0.1:9")
    server.moods["a.parquet"] = [(401, {})]
    assert (
        main(["--from", f"{server.url}/a.parquet", "--quiet", "--cache-dir", str(cache.folder), *more]) == 1
    )
    said = capsys.readouterr().err
    assert ("HF_TOKEN" in said) == hub and ("signature" in said) != hub and said.count("\n") == 1
    monkeypatch.setenv("HF_TOKEN", "hf_s3cret")
    server.moods["a.parquet"] = [(403, {})]
    assert (
        main(["--from", f"{server.url}/a.parquet", "--quiet", "--cache-dir", str(cache.folder), *more]) == 1
    )
    said = capsys.readouterr().err
    assert ("was refused" in said) == hub and "s3cret" not in said


@pytest.mark.parametrize("more", [[], ["--remote"]], ids=str)
def test_the_token_of_a_login_goes_to_the_hub_alone(server, hub_files, tmp_path, more):
    (tmp_path / "token").write_text("hf_s3cret\n")
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_TOKEN_PATH": str(tmp_path / "token"),
        "HF_TOKEN": "",
    }
    with MoodyServer(hub_files) as store:
        path = "datasets/me/words/resolve/main/part-0.parquet"
        elsewhere = store.url.replace("127.0.0.1", "localhost")
        server.moods[path] = [(302, {"Location": f"{elsewhere}/{path}"})] * 99
        command = [
            sys.executable,
            "-m",
            "musekit.shards",
            "--from",
            f"{server.url}/{path}",
            f"{elsewhere}/{path[:-9]}1.parquet",
            "--cache-dir",
            tmp_path,
            *more,
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert {token for *_, token in server.requests} == {"Bearer hf_s3cret"} and {
            token for *_, token in store.requests
        } == {None}
    manifest = (tmp_path / "data" / "manifest.json").read_text()
    assert "s3cret" not in done.stdout + done.stderr + manifest


@pytest.mark.parametrize("more", [[], ["--remote"]], ids=str)
def test_advice_is_that_of_the_hub(server, cache, monkeypatch, capsys, more):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    path = "datasets/me/words/resolve/main/part-0.parquet"
    arguments = [
        "--repo",
        "me/words",
        "--pattern",
        "part-0.parquet",
        "--quiet",
        "--cache-dir",
        str(cache.folder),
        *more,
    ]
    for headers, parts in (
        (
            {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"},
            ["401", "(Repository not found)", "check the repository for a mistake"],
        ),
        (
            {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to me/words is restricted."},
            ["(Access to me/words is restricted)", "accept its terms"],
        ),
        ({}, ["the name may be mistyped", "hf auth login"]),
    ):
        server.moods[path] = [(401, headers)]
        assert main(arguments) == 1
        assert_one_line(capsys, *parts)
    with MoodyServer({}) as store:
        store.moods["a"] = [(403, {})] * 9
        server.moods[path] = [(302, {"Location": store.url.replace("127.0.0.1", "localhost") + "/a"})] * 9
        assert main(arguments) == 1
        assert_one_line(capsys, "the answer is from localhost", "not about the dataset's terms")


@pytest.mark.parametrize("more", [[], ["--remote"]], ids=str)
@pytest.mark.parametrize(
    "path, content, message",
    [
        ("datasets/me/words/blob/main/0.parquet", b"<!doctype html>", "write /resolve/ for /blob/"),
        (
            "datasets/me/words/raw/main/0.parquet",
            b"version https://git-lfs.github.com/spec/v1\n",
            "a pointer of Git LFS",
        ),
        ("datasets/me/words/resolve/main/0.parquet", b"PARE" + bytes(99), "is encrypted; only"),
    ],
)
def test_what_stands_for_a_file_is_asked_for_once(server, cache, capsys, more, path, content, message):
    server.files[path] = content
    assert main(["--from", f"{server.url}/{path}", "--quiet", "--cache-dir", str(cache.folder), *more]) == 1
    assert_one_line(capsys, path, message)
    assert len(server.requests) <= 3


@pytest.mark.parametrize("more", [[], ["--remote"], ["--dry-run"]], ids=str)
def test_an_encrypted_column_is_one_line(server, tmp_path, more):
    """In a process of its own, which Arrow's reader would end."""
    options = encryption.EncryptionConfiguration(
        "footer", column_keys={"column": ["text"]}, plaintext_footer=True
    )
    keys = encryption.CryptoFactory(Keys).file_encryption_properties(
        encryption.KmsConnectionConfig(), options
    )
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"text": texts("a", 500), "body": texts("a", 500)}), path, encryption_properties=keys
    )
    server.files["a.parquet"] = path.read_bytes()
    source = f"{server.url}/a.parquet" if more == ["--remote"] else str(path)
    command = [
        sys.executable,
        "-m",
        "musekit.shards",
        "--from",
        source,
        "--cache-dir",
        tmp_path / "cache",
        *more,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        1,
        f"musekit-shards: {source}: column 'text' is encrypted; only files without encryption are read.\n",
    )
    done = subprocess.run([*command, "--text-column", "body"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Keys(encryption.KmsClient):
    """Keys that are wrapped in nothing."""

    def __init__(self, config):
        super().__init__()

    def wrap_key(self, key, name):
        return base64.b64encode(name.encode() + key)

    def unwrap_key(self, wrapped, name):
        return base64.b64decode(wrapped)[len(name):]


def test_too_few_row_groups_for_eight_processes(cache, tmp_path, capsys):
    write_source(tmp_path / "a.parquet", texts("a", 12_000))
    arguments = [
        "--from",
        str(tmp_path / "a.parquet"),
        "--min-characters",
        "0",
        "--cache-dir",
        str(cache.folder),
    ]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert (
        "warning     2 row groups in the largest validation shard" in said and "training shard:" not in said
    )


def test_a_file_whose_name_is_a_pattern(cache, tmp_path):
    write_source(tmp_path / "data[1].parquet", texts("a", 500))
    write_source(tmp_path / "data1.parquet", texts("b", 500))
    assert (
        main(["--from", str(tmp_path / "data[1].parquet"), "--quiet", "--cache-dir", str(cache.folder)]) == 0
    )
    assert [Path(source["from"]).name for source in read_manifest(cache.data)["sources"]] == [
        "data[1].parquet"
    ]


def test_addresses_in_capitals_and_numbers(tmp_path, capsys):
    strange = ["HTTP://127.0.0.1:9/a.parquet", "https://[::1]:8000/b.parquet", "https://h/c.parquet?sig=a*b"]
    assert main(["--from", *strange, "--dry-run", "--cache-dir", str(tmp_path / "cache")]) == 0
    said = capsys.readouterr().out
    assert "3 of 3 files" in said and "HTTP://127.0.0.1:9/a.parquet" in said and "[::1]:8000" in said


@pytest.mark.parametrize(
    "mood, message",
    [
        ("page", "not Parquet"),
        ((404, {}), "404"),
        ("truncated", "bytes instead of|not whole"),
        ((503, {}), "503"),
    ],
    ids=str,
)
def test_what_an_address_gives_is_never_taken_for_data(server, cache, mood, message):
    old, address = digests(cache.data), "datasets/me/words/resolve/main/part-0.parquet"
    server.moods[address] = [mood] * 9
    options = Options(cache.folder, quiet=True, connection=Connection(sleep=lambda seconds: None))
    with pytest.raises((OSError, ValueError), match=message):
        convert(dataset_of(f"{server.url}/{address}"), options, SMALL)
    assert digests(cache.data) == old and not list(cache.folder.rglob("part-0.parquet"))


def test_a_dry_run_of_addresses_and_local_files(tmp_path, capsys):
    own = write_source(tmp_path / "own.parquet", [LONG] * 9)
    assert (
        main([
            "--from",
            "http://127.0.0.1:9/a.parquet",
            str(own),
            "--dry-run",
            "--cache-dir",
            str(tmp_path / "cache"),
        ])
        == 0
    )
    assert (
        "download of unknown size, " in (said := capsys.readouterr().out)
        and "are read here" in said
        and "127.0.0.1:9/a.parquet" in said
    )
    assert "at most 10 + 1 shards of 86,016 rows, 946,176 rows in all, about 627 MB" in said
    assert main(["--from", str(own), "--dry-run", "--cache-dir", str(tmp_path / "cache")]) == 0
    assert "at most 1 + 1 shards of 86,016 rows, 9 rows in all, about 5.97 kB" in capsys.readouterr().out
    assert (
        main(
            ["--from", str(own), "--text-column", "body", "--dry-run", "--cache-dir", str(tmp_path / "cache")]
        )
        == 1
    )
    assert_one_line(capsys, "no column 'body'")


DAMAGED_MANIFESTS = [
    "{",
    "[]",
    "null",
    "\udcff",
    '{"shards": 1}',
    '{"dataset": "mine", "shards": [{}]}',
    '{"shards": [{"name": 3, "sha256": ""}]}',
    '{"dataset": 5}',
    '{"dataset": ["a"]}',
    '{"dataset": "a/b"}',
    '{"dataset": "../../up"}',
    '{"shards": [{"name": "../a", "sha256": ""}]}',
]


@pytest.mark.parametrize("damage", DAMAGED_MANIFESTS)
def test_a_damaged_manifest_stops_nothing(server, cache, damage):
    old = digests(cache.data)
    (cache.data / "manifest.json").write_bytes(damage.encode(errors="surrogateescape"))
    assert finish(server, cache) is None
    assert [backup.name for backup in list_backups(cache.folder) if not backup.problem] == ["unknown"]
    assert "unknown" in backups_table(cache.folder)
    assert (
        main(["--restore", "unknown", "--quiet", "--cache-dir", str(cache.folder)]) == 0
        and digests(cache.data) == old
    )


def test_what_is_not_ours_is_left_alone(server, cache):
    (cache.folder / "partial-work").mkdir()
    (cache.data / "notes.txt").write_text("precious")
    options = Options(cache.folder, quiet=True, connection=Connection(endpoint=server.url))
    with pytest.raises(ValueError, match="notes.txt is not a shard"):
        convert(WORDS, replace(options, skip_backup=True), SMALL)
    convert(WORDS, options, SMALL)
    assert (cache.backup("climbmix") / "data" / "notes.txt").read_text() == "precious" and (
        cache.folder / "partial-work"
    ).is_dir()
    cache.next.mkdir()
    with pytest.raises(ValueError, match="not ours"):
        convert(WORDS, options, SMALL)
    assert cache.next.is_dir()


def test_again_and_again_keeps_one_backup(server, cache):
    for _ in range(3):
        assert finish(server, cache) is None
    assert sorted(backup.name for backup in list_backups(cache.folder)) == ["climbmix", "words"]


@pytest.mark.parametrize(
    "trouble, message",
    [
        ((404, {}), "check the repository"),
        ((401, {}), "HF_TOKEN"),
        ("no ranges", "download it instead"),
        ("page", "not Parquet but a web page"),
        ((429, {"Retry-After": "7000"}), "7,000 s"),
    ],
    ids=str,
)
def test_troubles_of_reading_in_place_are_one_line(server, cache, monkeypatch, capsys, trouble, message):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    old, server.moods["datasets/me/words/resolve/main/part-0.parquet"] = digests(cache.data), [trouble] * 9
    place = ["--cache-dir", str(cache.folder), "--remote", "--quiet"]
    assert main(["--repo", "me/words", "--pattern", "part-{0..1}.parquet", *place]) == 1
    assert_one_line(capsys, message)
    assert digests(cache.data) == old


def test_a_broken_table_of_contents_is_set_aside_and_fetched_again(server, cache):
    address = "datasets/me/words/resolve/main/part-0.parquet"
    whole = server.files[address]
    server.files[address] = whole[:-300] + b"?" * 250 + whole[-50:]
    options = Options(
        cache.folder, quiet=True, connection=Connection(endpoint=server.url, sleep=lambda seconds: None)
    )
    with pytest.raises(ConnectionError, match="not whole Parquet"):
        convert(WORDS, options, SMALL)
    server.files[address] = whole
    assert convert(WORDS, options, SMALL)["kept"] == 1_000


@pytest.mark.parametrize("more", [[], ["--processes", "2"]], ids=str)
def test_a_damaged_download_is_set_aside_and_fetched_again(server, cache, monkeypatch, capsys, more):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    arguments = [
        "--repo",
        "me/words",
        "--pattern",
        "part-{0..2}.parquet",
        "--quiet",
        "--cache-dir",
        str(cache.folder),
        *more,
    ]
    address = "datasets/me/words/resolve/main/part-1.parquet"
    whole = server.files[address]
    server.files[address] = whole[:2000] + bytes(2000) + whole[4000:]
    assert main(arguments) == 1
    assert_one_line(capsys, "part-1.parquet, row group 0", "set aside as part-1.parquet.bad")
    server.files[address] = whole
    assert main(arguments) == 0 and read_manifest(cache.data)["rows"] == 1_260


def test_a_token_is_never_shown(cache, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_secret 1")
    for way in ([], ["--remote"]):
        assert main(["fineweb", "--quiet", "--cache-dir", str(cache.folder), *way]) == 1
        assert "hf_secret" not in (said := capsys.readouterr().err) and "HF_TOKEN" in said


@pytest.mark.parametrize("more", [[], ["--processes", "2"]], ids=str)
def test_ctrl_c_is_one_line(server, cache, more):
    server.pause, old = 0.3, digests(cache.data)
    command = [
        sys.executable,
        "-m",
        "musekit.shards",
        "--repo",
        "me/words",
        "--pattern",
        "part-{0..2}.parquet",
        "--cache-dir",
        cache.folder,
        *more,
    ]
    listen = partial(
        signal.signal, signal.SIGINT, signal.SIG_DFL
    )  # in the background of a script Ctrl-C is ignored
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "preexec_fn": listen}
    with subprocess.Popen(command, env=os.environ | {"HF_ENDPOINT": server.url}, **options) as process:
        while not server.requests:
            time.sleep(0.02)
        time.sleep(0.7)  # something has come, and not all
        stopped = time.perf_counter()
        process.send_signal(signal.SIGINT)
        said = process.communicate()[1]
        assert time.perf_counter() - stopped < 5
    assert process.returncode == 130 and said.count("\n") == 1 and "stopped" in said, said
    assert digests(cache.data) == old and list((cache.folder / "raw_me--words").glob("*.part"))


def test_the_download_folder_may_not_be_the_trainers(server, cache):
    for place in (
        cache.data,
        cache.data / "raw",
        cache.folder,
        cache.tokenizer,
        cache.next,
        cache.folder / "partial-x" / "raw",
        cache.backup("climbmix"),
    ):
        with pytest.raises(ValueError, match="choose another"):
            options = Options(
                cache.folder, download_dir=place, quiet=True, connection=Connection(endpoint=server.url)
            )
            convert(WORDS, options, SMALL)


def test_a_damaged_file_of_a_server_is_not_to_be_deleted(server, cache, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    address = "datasets/me/words/resolve/main/part-1.parquet"
    server.files[address] = server.files[address][:2000] + bytes(2000) + server.files[address][4000:]
    assert (
        main([
            "--repo",
            "me/words",
            "--pattern",
            "part-{0..1}.parquet",
            "--remote",
            "--quiet",
            "--cache-dir",
            str(cache.folder),
        ])
        == 1
    )
    assert_one_line(capsys, "part-1.parquet, row group 0", "tell its publisher")


def test_ctrl_c_before_the_command_is_loaded(monkeypatch, capsys):
    def stop():
        raise KeyboardInterrupt

    monkeypatch.setattr("musekit.shards.command.main", stop)
    assert importlib.import_module("musekit.shards.__main__").main() == 130
    assert_one_line(capsys, "stopped")


@pytest.mark.parametrize("arguments", [["--list-backups"], ["fineweb", "--dry-run"]], ids=str)
def test_nobody_reads_on(cache, arguments):
    command = (
        f"{sys.executable} -m musekit.shards {' '.join(arguments)} --cache-dir {cache.folder} | true; exit"
        " ${PIPESTATUS[0]}"
    )
    done = subprocess.run(["bash", "-c", f"sleep 0.1; {command}"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_import_is_light_and_quick():
    code = (
        "import time; start = time.process_time(); import musekit.shards.command, sys;"
        " print(time.process_time() - start, 'torch' in sys.modules)"
    )
    times = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(3)
    ]
    assert min(float(seconds) for seconds, _ in times) < 0.5 and {torch for _, torch in times} == {"False"}


def test_a_manifest_can_be_read_by_anyone(server, cache):
    convert(WORDS, Options(cache.folder, quiet=True, connection=Connection(endpoint=server.url)), SMALL)
    manifest = json.loads((cache.data / "manifest.json").read_text())
    assert manifest["dataset"] == "words" and manifest["backup"] == "backup_climbmix"
    assert {
        "sources",
        "selection",
        "layout",
        "rows",
        "kept",
        "dropped",
        "shards",
        "made_by",
        "date",
    } <= manifest.keys()
