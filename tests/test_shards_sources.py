"""Sources of every format, templates and chats, patterns that the hub expands, shuffles, mixes, nanochat's
layout: as typed."""
import gzip
import json
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moody_server import MoodyServer
from musekit.shards.catalog import Dataset, dataset_of
from musekit.shards.command import main
from musekit.shards.convert import Options, convert
from musekit.shards.download import Connection, list_files
from musekit.shards.plan import make_plan, run_plan, verify_shards
from musekit.shards.rechunk import Layout, Mix, layout_for, rechunk
from musekit.shards.sources import Stream, read_texts
from musekit.shards.shuffle import shuffle
from musekit.shards.selection import Selection
from musekit.shards.store import Cache, list_backups, read_manifest

SMALL = Layout(rows_per_shard=100, rows_per_group=32, num_shards=4)


def documents(count, seed=0):
    """Questions and answers of some length; some are missing."""
    chance = random.Random(seed)
    words = ["".join(chance.choices("etaoinshrdluéß漢🎼", k=chance.randint(2, 9))) for _ in range(500)]
    for row in range(count):
        text = " ".join(chance.choices(words, k=chance.randint(1, 80)))
        yield {
            "text": None if row % 50 == 7 else f"{seed} {row} {text}",
            "meta": {"title": f"Title {row}", "score": row % 5},
            "messages": [
                {"role": "user", "content": f"Question {row}?"},
                {"role": "assistant", "content": text},
            ],
        }


def write_as(path, rows):
    """Rows in the format that a file's name says."""
    table, lines = (
        pa.Table.from_pylist(rows),
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(),
    )
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=90)
    elif path.suffix in (".arrow", ".arrows"):
        kind = pa.ipc.new_file if path.suffix == ".arrow" else pa.ipc.new_stream
        with kind(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=90)
    elif path.suffix == ".jsonl":
        path.write_bytes(lines)
    else:
        path.write_bytes(
            gzip.compress(lines) if path.suffix == ".gz" else pa.compress(lines, "zstd", asbytes=True)
        )
    return path


FORMATS = ("parquet", "arrow", "arrows", "jsonl", "jsonl.gz", "jsonl.zst")


@pytest.fixture(scope="module")
def rows():
    return [list(documents(700, 1)), list(documents(500, 2))]


@pytest.fixture(scope="module")
def hub_files(rows, tmp_path_factory):
    """A repository with the same two files in every format, and the list that the hub would give of each
    folder."""
    folder, files = tmp_path_factory.mktemp("hub"), {}
    for kind in FORMATS:
        entries = [
            {"type": "directory", "path": f"{kind}/old"},
            {"type": "file", "path": f"{kind}/README.md", "size": 10},
        ]
        for index, part in enumerate(rows):
            content = write_as(folder / f"{index}.{kind}", part).read_bytes()
            files[f"datasets/me/words/resolve/main/{kind}/part-{index}.{kind}"] = content
            entries.append({"type": "file", "path": f"{kind}/part-{index}.{kind}", "size": len(content)})
        files[f"api/datasets/me/words/tree/main/{kind}?recursive=true&limit=1000"] = json.dumps(
            entries
        ).encode()
    return files


@pytest.fixture
def server(hub_files, monkeypatch):
    with MoodyServer(hub_files) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def shards_in(folder):
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.parquet")}


def texts_in(folder, names=None):
    names = names or sorted(path.name for path in Path(folder).glob("*.parquet"))
    return [text for name in names for text in pq.read_table(Path(folder) / name)["text"].to_pylist()]


def command(*arguments):
    process = subprocess.run(
        [sys.executable, "-m", "musekit.shards", *map(str, arguments)], capture_output=True, text=True
    )
    return process.returncode, process.stdout, process.stderr


# ---- formats ----

@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_by_every_way(server, rows, tmp_path, kind):
    expected = [
        row["text"] for part in rows for row in part if row["text"] is not None and len(row["text"]) >= 50
    ]
    ways = {"fetched": [], "read in place": ["--remote"]} | (
        {"two processes": ["--processes", "2"]} if kind == "jsonl" else {}
    )
    for name, options in ways.items():
        assert (
            main([
                "me/words",
                "--pattern",
                f"{kind}/*.{kind}",
                "--quiet",
                "--cache-dir",
                str(tmp_path / name),
                *options,
            ])
            == 0
        )
        data = tmp_path / name / "data"
        assert texts_in(data, ["shard_00000.parquet", "shard_06542.parquet"]) == expected
        manifest = read_manifest(data)
        assert [Path(source["from"]).name for source in manifest["sources"]] == [
            f"part-0.{kind}",
            f"part-1.{kind}",
        ]
        assert manifest["rows"] == 1200 and 0 < manifest["bytes_needed"] <= sum(
            source["bytes"] for source in manifest["sources"]
        )
    assert shards_in(tmp_path / "fetched" / "data") == shards_in(tmp_path / "read in place" / "data")


def test_a_line_that_two_blocks_share(tmp_path, monkeypatch):
    """The blocks of 32 MiB in which JSON Lines are read: at every place of their edge each line is read
    once."""
    import musekit.shards.json_lines as module

    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b"".join(b'{"text": "%d"}\r\n' % (10 ** (row % 7)) for row in range(60)) + b'\n{"text": "the last"}'
    )
    everything = Selection(min_characters=0)
    reference = [text for texts, *_ in read_texts(path, everything) for text in texts.to_pylist()]
    assert len(reference) == 61 and reference[-1] == "the last"
    for block in range(1, 120):
        monkeypatch.setattr(module, "BLOCK", block)
        parts = range(-(-path.stat().st_size // block))
        assert [
            text
            for part in parts
            for texts, *_ in read_texts(path, everything, [part])
            for text in texts.to_pylist()
        ] == reference
        if block % 20 == 0:
            plan = make_plan([path], everything, Layout(20, 5, num_shards=2), groups_per_task=2)
            assert run_plan(plan, tmp_path / f"{block}") == rechunk(
                [path], tmp_path / f"{block} stream", everything, Layout(20, 5, num_shards=2)
            )


def test_a_download_that_was_cut_is_set_aside_and_fetched_again(server, tmp_path, capsys):
    address, cache = "datasets/me/words/resolve/main/jsonl.gz/part-0.jsonl.gz", tmp_path / "cache"
    arguments = ["--from", f"{server.url}/{address}", "--cache-dir", str(cache), "--quiet", "words"]
    whole = server.files[address]
    server.files[address] = whole[:-3000]
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert (
        "part-0.jsonl.gz" in said
        and "It was set aside as part-0.jsonl.gz.bad" in said
        and said.count("\n") == 1
    )
    server.files[address] = whole
    assert main(arguments) == 0


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"text": "a"}\n{"text": ', "own.jsonl, line 2 is not JSON"),
        (b'{"text": "a"}\n"b"\n', "line 2 is not a JSON object"),
        (b'{"text": 5}\n', "line 1: column 'text' holds a number, not text"),
        (b'{"body": "a"}\n', "no column 'text'; it has body"),
        (
            b'{"text": "' + b"\xff" * 60 + b'"}\n',
            "line 1 has text that is not UTF8; if it is not damaged, skip_bad_utf8 (--skip-bad-utf8)",
        ),
        (b'[{"text": "a"}]', "nor Arrow or JSON Lines"),
        (b"", "it is empty"),
    ],
    ids=range(7),
)
def test_bad_lines_are_one_line(tmp_path, capsys, content, message):
    (tmp_path / "own.jsonl").write_bytes(content)
    assert (
        main(["--from", str(tmp_path / "own.jsonl"), "--cache-dir", str(tmp_path / "cache"), "--quiet"]) == 1
    )
    said = capsys.readouterr().err
    assert said.startswith("musekit-shards: ") and said.count("\n") == 1 and message in said, said


def test_rows_that_are_not_utf8_are_dropped_and_counted(tmp_path, capsys):
    good = [b'{"text": "%s"}' % (b"x" * (60 + row)) for row in range(40)]
    (tmp_path / "own.jsonl").write_bytes(
        b"\n".join([*good[:20], b'{"text": "' + b"\xe9" * 60 + b'"}', *good[20:]])
    )
    arguments = [
        "--from",
        str(tmp_path / "own.jsonl"),
        "--cache-dir",
        str(tmp_path / "cache"),
        "--max-characters",
        "90",
        "--skip-bad-utf8",
    ]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert (
        "41 read, 10 filtered (9 too long, 1 bad UTF-8), 31 kept" in said
        or "(1 bad UTF-8, 9 too long)" in said
    ), said
    assert "texts       at most 90 characters, without bad UTF-8" in said
    assert [len(text) for text in texts_in(tmp_path / "cache" / "data")] == list(range(60, 91))


# ---- columns, templates, chats ----


@pytest.mark.parametrize("kind", ["parquet", "arrow", "jsonl"])
@pytest.mark.parametrize(
    "options, made",
    [
        (["--text-column", "meta.title"], lambda row: row["meta"]["title"]),
        (
            ["--text-column", "messages"],
            lambda row: "\n\n".join(
                f"{message['role']}: {message['content']}" for message in row["messages"]
            ),
        ),
        (
            ["--text-template", r"# {meta.title}\n\n{text} ({meta.score})"],
            lambda row: row["text"] and f"# {row['meta']['title']}\n\n{row['text']} ({row['meta']['score']})",
        ),
        (
            ["--text-template", "{{{meta.title}}} {messages}"],
            lambda row: (
                f"{{{row['meta']['title']}}} user: {row['messages'][0]['content']}\n\nassistant:"
                f" {row['messages'][1]['content']}"
            ),
        ),
        (
            ["--text-column", "text", "--score-column", "meta.score", "--min-score", "3"],
            lambda row: row["text"] if row["meta"]["score"] >= 3 else None,
        ),
    ],
    ids=["nested", "chat", "template", "braces", "score"],
)
def test_what_the_text_of_a_row_is(rows, tmp_path, kind, options, made):
    path = write_as(tmp_path / f"own.{kind}", rows[0])
    assert (
        main([
            "--from",
            str(path),
            "--min-characters",
            "0",
            "--cache-dir",
            str(tmp_path / "cache"),
            "--quiet",
            *options,
        ])
        == 0
    )
    expected = [text for text in map(made, rows[0]) if text is not None]
    assert texts_in(tmp_path / "cache" / "data", ["shard_00000.parquet", "shard_06542.parquet"]) == expected


def test_of_a_file_on_a_server_only_the_nested_column_travels(server, rows, tmp_path, capsys):
    arguments = [
        "me/words",
        "--pattern",
        "parquet/*.parquet",
        "--min-characters",
        "0",
        "--remote",
        "--cache-dir",
        str(tmp_path / "cache"),
    ]
    needed = {}
    for column in ("meta.title", "messages", "text"):
        assert main([*arguments, "--text-column", column, "--quiet"]) == 0
        needed[column] = read_manifest(tmp_path / "cache" / "data")["bytes_needed"]
    assert texts_in(tmp_path / "cache" / "data")[0] == rows[0][0]["text"]
    assert needed["meta.title"] < needed["text"] / 5 and needed["messages"] > needed["text"]


def test_a_mix_of_files_on_a_server(server, tmp_path):
    (tmp_path / "mine.yaml").write_text("""
near: {repo: me/words, pattern: 'parquet/*.parquet'}
far: {repo: me/words, pattern: 'jsonl/*.jsonl', text_column: messages}
""")
    arguments = [
        "--mix",
        "near=3",
        "far=2",
        "--datasets",
        str(tmp_path / "mine.yaml"),
        "--quiet",
        "--shuffle",
        "1",
    ]
    for name, options in (("remote", ["--remote"]), ("fetched", ["--download-dir", str(tmp_path / "raw")])):
        assert main([*arguments, "--cache-dir", str(tmp_path / name), *options]) == 0
    assert shards_in(tmp_path / "remote" / "data") == shards_in(tmp_path / "fetched" / "data")
    assert sorted(path.name for path in (tmp_path / "raw").iterdir()) == ["far", "near"]
    texts = texts_in(tmp_path / "remote" / "data", ["shard_00000.parquet", "shard_06542.parquet"])
    assert [
        sum(text.startswith("user: ") for text in texts[at : at + 5]) for at in range(0, len(texts) - 4, 5)
    ] == [2] * (len(texts) // 5)


# ---- what the hub lists ----

def test_the_hub_lists_page_by_page_and_no_other_host_is_asked(server, tmp_path):
    first = "api/datasets/me/words/tree/main/jsonl?recursive=true&limit=1000"
    entries = json.loads(server.files[first])
    server.files[first], server.files["page2"] = (
        json.dumps(entries[:3]).encode(),
        json.dumps(entries[3:]).encode(),
    )
    server.extra[first] = {"Link": f'<{server.url}/page2>; rel="next"'}
    words = Dataset("words", "me/words", pattern="jsonl/part-*.jsonl")
    hub = Connection(server.url, token="secret", sleep=lambda seconds: None)
    server.moods[first] = [(503, {}), (429, {"Retry-After": "1"})]
    listed = list_files(words, hub)
    assert listed.paths == ["jsonl/part-0.jsonl", "jsonl/part-1.jsonl"] and listed.gigabytes > 0
    assert server.requests[-1] == ("page2", None, "Bearer secret")
    with MoodyServer({"page2": b"[]"}) as other:
        server.extra[first] = {"Link": f'<{other.url}/page2>; rel="next"'}
        with pytest.raises(ValueError, match="another host"):
            list_files(words, hub)
        assert other.requests == []


def test_what_the_hub_does_not_have_is_one_line(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for pattern, message in (
        (
            "jsonl/*.parquet",
            "no file of me/words matches 'jsonl/*.parquet'; in that folder there is jsonl/README.md",
        ),
        ("nothing/*.jsonl", "404"),
        ("jsonl/*.jsonl?x=1", "question mark"),
        ("jsonl/part-??.jsonl", "matches"),
    ):
        assert (
            main([
                "--repo",
                "me/words",
                "--pattern",
                pattern,
                "--cache-dir",
                str(tmp_path / "cache"),
                "--quiet",
            ])
            == 1
        )
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1, said


def test_a_question_mark_stands_for_one_letter_on_the_hub_as_it_does_here(server, tmp_path):
    hub = Connection(server.url, sleep=lambda seconds: None)
    names = list_files(Dataset("words", "me/words", pattern="jsonl/part-?.jsonl"), hub).paths
    for name in [*names, "jsonl/part-10.jsonl"]:
        (tmp_path / Path(name).name).touch()
    assert names == ["jsonl/part-0.jsonl", "jsonl/part-1.jsonl"]
    assert [f"jsonl/{Path(path).name}" for path in dataset_of(str(tmp_path / "part-?.jsonl")).files] == names


def test_a_dry_run_lists_what_stars_stand_for(server, tmp_path, capsys):
    arguments = [
        "me/words",
        "--pattern",
        "jsonl/**",
        "--num-source",
        "9",
        "--dry-run",
        "--cache-dir",
        str(tmp_path / "cache"),
    ]
    assert main([*arguments, "--text-column", "meta.title", "--shuffle", "3"]) == 0
    said = capsys.readouterr().out
    assert (
        "3 of 3 files" in said
        and "jsonl/part-1.jsonl" in said
        and "texts: column meta.title, shuffled with seed 3" in said
    )
    assert "shuffling: at most" in said and "on the disk until the shards are written" in said
    assert not (tmp_path / "cache").exists()


# ---- orders and mixes ----

@pytest.fixture
def local(rows, tmp_path):
    return [write_as(tmp_path / "a.parquet", rows[0]), write_as(tmp_path / "b.jsonl", rows[1])]


def streams_for(local):
    return [
        Stream((str(local[0]),), Selection(), 0.7),
        Stream((str(local[1]),), Selection(min_characters=200), 0.3),
    ]


LAYOUTS = [
    SMALL,
    replace(SMALL, num_shards=1),
    replace(SMALL, validation="first"),
    Layout(rows_per_group=32, num_shards=3, shard_characters=30_000),
    Layout(rows_per_group=32, num_shards=100, shard_characters=30_000, trainer="nanochat"),
    Layout(num_shards=2),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=range(len(LAYOUTS)))
def test_mixes_and_shuffles_change_no_byte_whatever_the_engine(local, tmp_path, layout):
    with ProcessPoolExecutor(2) as processes:
        shuffled = {
            name: shuffle(
                replace(streams_for(local)[0]), 5, tmp_path / f"runs {name}", executor, groups_per_task=size
            )
            for name, executor, size in (("one", None, 32), ("two", processes, 1))
        }
        for kind in ("mixed", "shuffled", "both"):
            made = []
            for name, executor in (("one", None), ("two", processes)):
                streams = (
                    [shuffled[name], streams_for(local)[1]]
                    if kind == "both"
                    else [shuffled[name]] if kind == "shuffled" else streams_for(local)
                )
                made.append(rechunk(streams, tmp_path / f"{kind} {name}", layout=layout))
                plan = make_plan(streams, layout=layout, executor=executor, groups_per_task=2)
                made.append(run_plan(plan, tmp_path / f"{kind} {name} plan", executor))
            assert made == [made[0]] * 4
            verify_shards(tmp_path / f"{kind} one", layout, made[0].shards)


def test_dask_changes_no_byte(local, tmp_path):
    distributed = pytest.importorskip("distributed")
    stream, lengthy = streams_for(local)
    near = rechunk([shuffle(stream, 5, tmp_path / "near"), lengthy], tmp_path / "streamed", layout=SMALL)
    options = {
        "n_workers": 2,
        "threads_per_worker": 1,
        "dashboard_address": None,
        "local_directory": str(tmp_path / "dask"),
    }
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as client:
        executor = client.get_executor()
        streams = [shuffle(stream, 5, tmp_path / "far", executor, groups_per_task=1), lengthy]
        assert (
            run_plan(
                make_plan(streams, layout=SMALL, executor=executor, groups_per_task=2),
                tmp_path / "dasked",
                executor,
            )
            == near
        )


def test_the_shares_of_a_mix_are_exact_in_every_stretch(local, rows, tmp_path):
    report = rechunk(streams_for(local), tmp_path / "mixed", layout=replace(SMALL, num_shards=100))
    kept = [
        [row["text"] for row in part if row["text"] is not None and len(row["text"]) >= least]
        for part, least in zip(rows, (50, 200))
    ]
    order = [
        (min(i for i, part in enumerate(kept) if text in part))
        for shard in report.shards
        for text in texts_in(tmp_path / "mixed", [shard.name])
    ]
    assert [order[at : at + 10].count(1) for at in range(0, len(order) - 9, 10)] == [3] * (len(order) // 10)
    assert len(order) == Mix([0.7, 0.3]).rows([len(part) for part in kept]) and not report.full
    assert (
        report.streams[Mix([0.7, 0.3]).stream_at(len(order))][1]
        == report.streams[Mix([0.7, 0.3]).stream_at(len(order))][3]
    )


def test_mix_and_shuffle_as_typed(local, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("""
first: {files: a.parquet, min_characters: 100}
second: {files: b.jsonl, text_template: '{meta.title}\\n{text}', max_characters: 300, shuffle: 1}
blend: {mix: {first: 0.75, second: 0.25}, shuffle: 2}
""")
    mix = ["--mix", "first=0.75", "second=0.25", "--datasets", str(tmp_path / "mine.yaml")]
    assert (
        main(["blend", "--datasets", str(tmp_path / "mine.yaml"), "--cache-dir", str(tmp_path / "one")]) == 0
    )
    said = capsys.readouterr().out
    assert (
        "mix         0.75 first: " in said
        and "shuffled with seed 2" in said
        and "the mix ends where first has no more rows" in said
    )
    assert (
        "mix         0.25 second: " in said
        and r"template '{meta.title}\n{text}', at most 300 characters, shuffled with seed 1" in said
    )
    assert (
        main([*mix, "--processes", "2", "--quiet", "--shuffle", "2", "--cache-dir", str(tmp_path / "two")])
        == 0
    )
    manifest = read_manifest(tmp_path / "two" / "data")
    assert [part["shuffle"] for part in manifest["mix"]] == [2, 2] and manifest[
        "dataset"
    ] == "mix--first--second"
    assert main([*mix, "--dry-run", "--cache-dir", str(tmp_path / "none")]) == 0
    said = capsys.readouterr().out
    assert (
        "mix mix--first--second: 0.75 first, 0.25 second; it ends where one of them has no more rows" in said
    )
    assert "texts: at least 100 characters" in said and not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        (["--mix", "a=0.7", "--text-column", "x"], 2, "--text-column is of one dataset"),
        (["--mix", "a=1", "a=2"], 2, "a is in --mix twice"),
        (["--mix", "a"], 2, "not a name and a weight"),
        (["--mix", "a=0"], 2, "not a name and a weight"),
        (["--mix", "a=x"], 2, "not a name and a weight"),
        (["--mix", "fineweb=1", "finweb-edu=2"], 1, "Did you mean 'fineweb-edu'"),
        (["--mix", "fineweb=1", "--from", "x"], 2, "--from is of one dataset"),
        (["fineweb", "--mix", "fineweb-edu=1"], 1, "of the catalogue"),
        (["--mix", "fineweb=0.123457", "fineweb-edu=0.876543"], 1, "round them"),
        (["fineweb", "--text-column", "a", "--text-template", "{b}"], 2, "give one of the two"),
        (["fineweb", "--text-template", "b"], 1, "names no column"),
        (["fineweb", "--max-characters", "10"], 1, "max_characters=10 is below min_characters=50"),
        (["fineweb", "--shuffle", "x"], 2, "'x'"),
        (["fineweb", "--layout", "gpt"], 2, "gpt"),
        (["fineweb", "--shard-characters", "0"], 2, "'0'"),
        (["--list-backups", "--shuffle", "1"], 2, "alone"),
        (["fineweb", "--text-template", "{a"], 1, "braces"),
        (["--restore", "--mix", "a=1"], 2, "behind --restore"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_contradictions_are_one_line(tmp_path, monkeypatch, capsys, arguments, status, message):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    try:
        assert main([*arguments, "--cache-dir", str(tmp_path / "cache")]) == status
    except SystemExit as end:
        assert end.code == status
    said = capsys.readouterr().err
    assert said.startswith("musekit-shards: ") and said.count("\n") == 1 and message in said, said
    assert not (tmp_path / "cache" / "data").exists()


@pytest.mark.parametrize("moment", ["shuffled/local/run-*", "shuffled/local/rows.shuffle", "data/.block-*"])
def test_a_shuffle_that_is_killed_leaves_the_old_data_and_is_done_again(tmp_path, moment):
    rows = [{"text": f"{row} " + random.Random(row).randbytes(3000).hex()} for row in range(12_000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=500)
    cache = Cache(tmp_path / "cache")
    convert(dataset_of(str(tmp_path / "a.parquet")), Options(cache.folder, quiet=True), Layout(num_shards=1))
    before = shards_in(cache.data)
    arguments = ["--from", tmp_path / "a.parquet", "--cache-dir", cache.folder, "--shuffle", "1", "--quiet"]
    child = subprocess.Popen([sys.executable, "-m", "musekit.shards", *map(str, arguments)])
    while child.poll() is None and not list((cache.folder / "partial-next").glob(moment)):
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, "it was over before it could be killed"
    assert shards_in(cache.data) == before
    assert command(*arguments)[0] == 0
    texts = texts_in(cache.data)
    assert sorted(texts) == sorted(row["text"] for row in rows) and texts != [row["text"] for row in rows]
    assert not list(cache.folder.glob("partial-*"))


# ---- nanochat ----

def test_nanochat_reads_its_layout(tmp_path, monkeypatch, capsys):
    """As its published loader does: all files but the last are for training, and each process takes every
    n-th row group."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "nanochat"))
    texts = [f"{row} " + "word " * (20 + row % 50) for row in range(40_000)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    arguments = [
        "--from",
        str(tmp_path / "a.parquet"),
        "--layout",
        "nanochat",
        "--num-shards",
        "3",
        "--shard-characters",
        "2000000",
    ]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert (
        "python -m scripts.tok_train" in said
        and "shard_00003.parquet for validation" in said
        and "prepare.py" not in said
    )
    folder = tmp_path / "nanochat" / "base_data"
    paths = sorted(path for path in folder.iterdir() if path.suffix == ".parquet")
    assert [path.name for path in paths] == [f"shard_0000{index}.parquet" for index in range(4)]
    seen = []
    for path in paths:
        file = pq.ParquetFile(path)
        assert {file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)} == {1024}
        assert file.metadata.row_group(0).column(0).compression == "ZSTD"
        groups = [file.read_row_group(group)["text"].to_pylist() for group in range(file.num_row_groups)]
        characters = [sum(map(len, group)) for group in groups]
        assert sum(characters) >= 2_000_000 > sum(characters[:-1])
        by_rank = [[group for group in groups[rank::8]] for rank in range(8)]
        assert all(by_rank)  # nobody waits for ever
        seen += [text for group in groups for text in group]
    assert seen == texts[: len(seen)]
    assert main([*arguments, "--shuffle", "1", "--quiet"]) == 0
    assert [backup.origin for backup in list_backups(tmp_path / "nanochat")] == ["local"]
    assert main(["--restore", "--layout", "nanochat"]) == 0
    assert texts_in(folder) == seen and "python -m scripts.base_train" in capsys.readouterr().out
    level_1 = rechunk(
        [tmp_path / "a.parquet"],
        tmp_path / "level 1",
        layout=replace(layout_for("nanochat", num_shards=3, shard_characters=2_000_000), level=1),
    )
    assert level_1.shards[0].bytes != paths[0].stat().st_size


# ---- memory ----

PEAK = """
import json, sys
from pathlib import Path
from musekit.shards.sources import Stream
from musekit.shards.shuffle import shuffle
from musekit.shards.selection import Selection
from musekit.shards.rechunk import Layout, rechunk
import musekit.shards.shuffle as module
module._RUN, module._BUCKET = 16 << 20, 4 << 20
source, folder, seed = sys.argv[1:]
streams = [Stream((source,))]
if seed != "none":
    streams = [shuffle(streams[0], int(seed), folder + "-runs")]
rechunk(streams, folder, layout=Layout(2000, 1024, num_shards=100))
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("kind, seed", [("jsonl", "none"), ("jsonl.gz", "none"), ("parquet", "1")])
def test_memory_does_not_grow_with_the_source(tmp_path, kind, seed):
    """60 and 180 MB of text; a run of the shuffle has 16 MB here."""
    chance = np.random.default_rng(0)
    words = np.array(
        ["".join(chance.choice(list("etaoinshrdlu"), chance.integers(2, 9))) for _ in range(2000)], object
    )
    part = [{"text": " ".join(chance.choice(words, 500))} for _ in range(2000)]
    peaks = []
    for times in (10, 30):
        path = write_as(tmp_path / f"{times}.{kind}", part * times)
        arguments = [sys.executable, "-c", PEAK, path, tmp_path / f"{times}", seed]
        peaks.append(
            int(subprocess.run(list(map(str, arguments)), capture_output=True, text=True, check=True).stdout)
        )
    assert peaks[1] < peaks[0] + 50, peaks


def outcome(path):
    """The exit status and the errors of a conversion in a process of its own, which damage must not end."""
    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "musekit.shards",
            "--cache-dir",
            str(path.parent / "cache"),
            "--from",
            str(path),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return ran.returncode, ran.stderr


def test_damaged_sizes_in_a_footer_do_not_end_the_process(tmp_path):
    path = tmp_path / "damaged.parquet"
    pq.write_table(pa.table({"text": [f"{row} " * 60 for row in range(100)]}), path)
    content = path.read_bytes()
    histogram = content.index(
        b"\x19\x06\x19", content.rindex(b"ARROW:schema") // 2
    )  # an empty list gets two numbers
    path.write_bytes(content[: histogram + 1] + b"\x26" + content[histogram + 2 :])
    status, errors = outcome(path)
    assert status == 1 and errors.count("\n") == 1 and "damaged.parquet" in errors, (status, errors)


@pytest.mark.parametrize("offset", [-5, 1 << 30])
@pytest.mark.parametrize("stream", [True, False])
def test_damaged_offsets_in_arrow_do_not_end_the_process(tmp_path, offset, stream):
    path = tmp_path / "damaged.arrow"
    table = pa.table({"text": [f"{row:03d} " * 30 for row in range(100)]})
    with pa.OSFile(str(path), "wb") as sink, (pa.ipc.new_stream if stream else pa.ipc.new_file)(
        sink, table.schema
    ) as writer:
        writer.write_table(table)
    content, offsets = path.read_bytes(), np.arange(0, 12120, 120, dtype=np.int32)
    wrong = np.where(offsets == 6000, offset, offsets).astype(np.int32)
    assert content.count(offsets.tobytes()) == 1
    path.write_bytes(content.replace(offsets.tobytes(), wrong.tobytes()))
    status, errors = outcome(path)
    assert status == 1 and errors.count("\n") == 1 and "cannot be read" in errors, (status, errors)


def test_entries_and_limits_that_make_no_sense_are_named(tmp_path, capsys):
    own = tmp_path / "own.yaml"
    own.write_text("mine: {repo: me/words, pattern: a.parquet, max_characters: 10}\n")
    assert main(["mine", "--datasets", str(own), "--cache-dir", str(tmp_path / "cache"), "--dry-run"]) == 1
    assert "max_characters=10 is below min_characters=50" in capsys.readouterr().err
    own.write_text("mine: 3\n")
    assert main(["mine", "--datasets", str(own), "--dry-run"]) == 1
    assert "mine is 3; give fields" in capsys.readouterr().err
