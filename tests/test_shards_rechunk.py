"""Shards: the same rows and the same bytes by every way, from sources of every kind, near and far, whole
and damaged."""
import itertools
import json
import multiprocessing
import subprocess
import sys
import sysconfig
import tempfile
import threading
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moody_server import MoodyServer
from musekit.shards.catalog import read_number
from musekit.shards.plan import make_plan, run_plan, tasks_of, write_shard
from musekit.shards.rechunk import VALIDATION_SHARD, Layout, rechunk, shard_bounds
from musekit.utils.hashing import file_hash
from musekit.shards.remote import chunk_ranges
from musekit.shards.sources import check_source, read_texts
from musekit.shards.selection import Selection

GOOD = Selection(score_column="int_score", min_score=3)
SMALL = Layout(rows_per_shard=700, rows_per_group=128, num_shards=4)
needs_polars = pytest.mark.skipif(find_spec("polars") is None, reason="needs Polars")
engines = pytest.mark.parametrize("engine", ["arrow", pytest.param("polars", marks=needs_polars)])


def make_table(rows: int, seed: int = 0) -> pa.Table:
    """Texts of log-normal length in several alphabets, some missing, some short, with scores, some
    missing."""
    random = np.random.default_rng(seed)
    alphabets = ["etaoin shrdlu", "äöü éè", "漢字 かな", "🎼🎻 a"]
    lengths = np.minimum(random.lognormal(4.6, 1.2, rows).astype(int), 4000)
    texts = ["".join(random.choice(list(alphabets[random.integers(4)]), length)) for length in lengths]
    texts = [None if drawn < 0.03 else text for text, drawn in zip(texts, random.random(rows))]
    scores = [None if drawn < 0.03 else int(drawn * 6) for drawn in random.random(rows)]
    return pa.table(
        {
            "id": pa.array(range(rows)),
            "text": texts,
            "url": [f"http://example.org/{row}" for row in range(rows)],
            "int_score": pa.array(scores, pa.int64()),
        }
    )


def obvious(sources, selection=GOOD, layout=SMALL) -> dict[str, list[str]]:
    """The definition: a loop over rows, and the shards' bounds."""
    kept = []
    for source in sources:
        for row in pq.read_table(source).to_pylist():
            text = row[selection.text_column]
            score = row[selection.score_column] if selection.score_column else None
            if text is None or len(text) < selection.min_characters:
                continue
            if selection.score_column and (score is None or not score >= selection.min_score):
                continue
            kept.append(text)
    kept = kept[: layout.rows]
    return {name: kept[start:stop] for name, start, stop in shard_bounds(len(kept), layout)}


def contents(folder) -> dict[str, list[str]]:
    """What lies in a folder of shards."""
    return {path.name: pq.read_table(path)["text"].to_pylist() for path in Path(folder).iterdir()}


@pytest.fixture(scope="module")
def table():
    return make_table(9000)


@pytest.fixture
def sources(table, tmp_path):
    pq.write_table(table[:4000], tmp_path / "a.parquet", row_group_size=1000)
    pq.write_table(table[4000:], tmp_path / "b.parquet", row_group_size=333, compression="zstd")
    return [tmp_path / "a.parquet", tmp_path / "b.parquet"]


# ---- the rows, whatever the way ----


@pytest.mark.parametrize(
    "layout",
    [
        SMALL,
        Layout(700, 128, "snappy", 4),
        Layout(700, 128, num_shards=4, validation="first"),
        Layout(500, 500, num_shards=1),
        Layout(1000, 300, num_shards=100),
        Layout(86_016, 1024),
        Layout(86_016, 1024, validation="first"),
        Layout(7, 3, num_shards=20),
    ],
)
@engines
def test_rows_are_those_of_the_loop_over_rows(sources, tmp_path, layout, engine):
    layout = replace(layout, engine=engine)
    report = rechunk(sources, tmp_path / "out", GOOD, layout)
    assert contents(tmp_path / "out") == obvious(sources, GOOD, layout)
    assert (
        report.kept
        == sum(shard.rows for shard in report.shards)
        == report.rows - sum(report.dropped.values())
    )
    for shard in report.shards:
        metadata = pq.read_metadata(tmp_path / "out" / shard.name)
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        assert set(sizes[:-1]) <= {layout.rows_per_group} and sizes[-1] <= layout.rows_per_group
        chunk = metadata.row_group(0).column(0)
        assert chunk.compression == layout.codec.upper() and not chunk.is_stats_set
        assert engine == "polars" or "RLE_DICTIONARY" not in chunk.encodings
        assert metadata.schema.to_arrow_schema().equals(pa.schema([("text", pa.string())]))
        assert (shard.rows, shard.bytes) == (
            metadata.num_rows,
            (tmp_path / "out" / shard.name).stat().st_size,
        )
        assert shard.sha256 == file_hash(tmp_path / "out" / shard.name)
    assert run_plan(make_plan(sources, GOOD, layout), tmp_path / "planned") == report


@engines
def test_reasons_are_counted(tmp_path, engine):
    texts = [None, "short", "x" * 60, "y" * 60, "z" * 60, "é" * 49, "é" * 50, None]
    scores = [5.0, 5.0, None, float("nan"), 2.9, 3.0, 3.0, None]
    pq.write_table(pa.table({"text": texts * 2, "int_score": scores * 2}), tmp_path / "a.parquet")
    report = rechunk([tmp_path / "a.parquet"], tmp_path / "out", GOOD, Layout(1000, engine=engine))
    assert (
        report.dropped == {"no text": 4, "no score": 4, "low score": 2, "too short": 4} and report.kept == 2
    )


@engines
def test_executors_change_no_byte(sources, tmp_path, engine):
    layout = replace(SMALL, engine=engine)
    streamed = rechunk(sources, tmp_path / "streamed", GOOD, layout)
    assert len({shard.sha256 for shard in streamed.shards}) == 5
    for workers in (1, 2, 4) if engine == "arrow" else (2,):
        start = multiprocessing.get_context("spawn" if engine == "polars" else None)
        with ProcessPoolExecutor(workers, start) as executor:
            plan = make_plan(sources, GOOD, layout, executor, groups_per_task=2)
            assert run_plan(plan, tmp_path / f"{workers}", executor) == streamed
    for shard, task in reversed(list(zip(streamed.shards, tasks_of(plan)))):
        assert write_shard(task, tmp_path) == write_shard(task, tmp_path) == shard


@needs_polars
def test_engines_cut_the_same_rows(sources, tmp_path):
    """The same report and texts, other bytes; the plan resumes shards of its own engine alone."""
    layouts = [SMALL, replace(SMALL, engine="polars")]
    arrow, polars = (rechunk(sources, tmp_path / layout.engine, GOOD, layout) for layout in layouts)
    assert contents(tmp_path / "arrow") == contents(tmp_path / "polars")
    assert replace(arrow, shards=()) == replace(polars, shards=()) and arrow.last == polars.last
    assert not {shard.sha256 for shard in arrow.shards} & {shard.sha256 for shard in polars.shards}


@needs_polars
def test_a_forked_process_is_refused(sources, tmp_path):
    layout = replace(SMALL, engine="polars")
    rechunk(sources, tmp_path / "out", GOOD, layout)
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as executor:
        with pytest.raises(ValueError, match="does not work in a forked process"):
            run_plan(make_plan(sources, GOOD, layout, executor), tmp_path / "forked", executor)


@needs_polars
def test_what_polars_cannot_scan_is_written_by_it_all_the_same(table, tmp_path):
    """Chats, other formats and addresses are read by the kit; equal texts make equal bytes."""
    part, layout = (
        table[:1500].filter(table["text"][:1500].is_valid()),
        Layout(400, 100, num_shards=2, engine="polars"),
    )
    pq.write_table(part, tmp_path / "a.parquet", row_group_size=200)
    scanned = rechunk([tmp_path / "a.parquet"], tmp_path / "scanned", GOOD, layout)
    template = replace(GOOD, text_template="{text}")
    assert rechunk([tmp_path / "a.parquet"], tmp_path / "template", template, layout) == scanned
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part.to_pylist()))
    assert rechunk([tmp_path / "a.jsonl"], tmp_path / "lines", GOOD, layout).shards == scanned.shards
    with MoodyServer({"a.parquet": (tmp_path / "a.parquet").read_bytes()}) as server:
        assert rechunk([f"{server.url}/a.parquet"], tmp_path / "far", GOOD, layout) == scanned


@engines
def test_a_dask_cluster_changes_no_byte(sources, tmp_path, engine):
    distributed, layout = pytest.importorskip("distributed"), replace(SMALL, engine=engine)
    streamed = rechunk(sources, tmp_path / "streamed", GOOD, layout)
    options = {
        "n_workers": 2,
        "threads_per_worker": 1,
        "dashboard_address": None,
        "local_directory": str(tmp_path / "dask"),
    }
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as client:
        executor = client.get_executor()
        assert (
            run_plan(
                make_plan(sources, GOOD, layout, executor, groups_per_task=2), tmp_path / "dasked", executor
            )
            == streamed
        )
    assert contents(tmp_path / "dasked") == obvious(sources)


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
    ids=str,
)
@pytest.mark.parametrize("group", [13, 57, 10**6])
@engines
def test_the_layout_of_the_source_changes_no_byte(table, tmp_path, kind, group, engine):
    part = table[:600]
    pq.write_table(part, tmp_path / "plain.parquet")
    other = part.set_column(1, "text", part["text"].combine_chunks().cast(kind))
    pq.write_table(
        other, tmp_path / "other.parquet", row_group_size=group, compression="zstd", data_page_size=2000
    )
    layout = Layout(100, 30, num_shards=2, engine=engine)
    reports = [
        rechunk([tmp_path / f"{name}.parquet"], tmp_path / name, GOOD, layout) for name in ("plain", "other")
    ]
    assert reports[0] == reports[1] and len(reports[0].shards) == 3


@pytest.mark.parametrize("score", [pa.int8(), pa.uint16(), pa.float32(), pa.decimal128(21, 2)], ids=str)
@engines
def test_scores_of_every_number_type(table, tmp_path, score, engine):
    pq.write_table(table, tmp_path / "a.parquet")
    pq.write_table(table.set_column(3, "int_score", table["int_score"].cast(score)), tmp_path / "b.parquet")
    layout = replace(SMALL, engine=engine)
    assert rechunk([tmp_path / "a.parquet"], tmp_path / "a", GOOD, layout) == rechunk(
        [tmp_path / "b.parquet"], tmp_path / "b", GOOD, layout
    )


def rechunked(folder, selection):
    """A source cut by both engines, whatever is left of it; the reports."""
    for engine in ("arrow", "polars"):
        with tempfile.TemporaryDirectory(dir=folder) as out:
            yield rechunk(
                [folder / "a.parquet", folder / "more.parquet"], out, selection, Layout(engine=engine)
            )


@pytest.mark.parametrize(
    "kind", [pa.float32(), pa.float64(), pa.decimal128(12, 3), pa.int64(), pa.uint64(), pa.int8()], ids=str
)
def test_a_score_is_compared_as_polars_and_duckdb_compare_it(tmp_path, kind):
    """Thresholds as a person writes them, against columns of every type, around the number itself."""
    if pa.types.is_integer(kind):
        scores = [*range(5), None] if kind == pa.int8() else [2**53 - 1, 2**53, 2**53 + 1, 2**53 + 2, 3, None]
        thresholds = ["2", "3"] if kind == pa.int8() else [str(2**53 + 1), "3"]
    else:
        scores = [0.0, 0.1, 0.3, 0.69, 0.7, 0.701, 1.1, 2.5, None]
        thresholds = ["0.1", "0.3", "0.7", "1.1", "2.5"]
    scores = pa.array(scores, kind) if pa.types.is_integer(kind) else pa.array(scores).cast(kind)
    pq.write_table(
        pa.table({"text": [f"{row:060}" for row in range(len(scores))], "score": scores}),
        tmp_path / "a.parquet",
    )
    pq.write_table(
        pa.table({"text": ["x" * 60] * 2, "score": pa.array([100.0, 100.0]).cast(kind)}),
        tmp_path / "more.parquet",
    )
    for text in thresholds:
        selection = Selection(score_column="score", min_score=read_number(text))
        if find_spec("polars") and not pa.types.is_decimal(kind):
            counts = [each.kept for each in rechunked(tmp_path, selection)]
            assert counts[0] == counts[1], text
        kept = [
            int(text)
            for texts, *_ in read_texts(tmp_path / "a.parquet", selection)
            for text in texts.to_pylist()
        ]
        by_duckdb = duckdb.sql(f"select text from '{tmp_path}/a.parquet' where score >= {text}").fetchall()
        polars = pytest.importorskip("polars")
        by_polars = polars.read_parquet(tmp_path / "a.parquet").filter(
            polars.col("score") >= read_number(text)
        )["text"]
        assert kept == [int(text) for (text,) in by_duckdb] == [int(text) for text in by_polars], text


def test_scores_of_sixteen_bits(tmp_path):
    scores = np.array([0.5, 0.69, 0.7, 0.71, np.nan], np.float16)
    pq.write_table(
        pa.table({"text": [f"{row:060}" for row in range(5)], "score": scores}), tmp_path / "a.parquet"
    )
    report = rechunk(
        [tmp_path / "a.parquet"], tmp_path / "out", Selection(score_column="score", min_score=0.7), SMALL
    )
    assert (report.kept, report.dropped) == (2, {"no score": 1, "low score": 2})


@pytest.mark.parametrize("text", ["'a'::ENUM ('a', 'b')", "'[1, 2]'::JSON", "'a' || range"])
def test_text_that_duckdb_wrote_under_another_name(tmp_path, text):
    duckdb.sql(f"copy (select {text} as text from range(20)) to '{tmp_path}/a.parquet'")
    assert rechunk([tmp_path / "a.parquet"], tmp_path / "out", Selection(min_characters=0), SMALL).kept == 20


@pytest.mark.parametrize("rows", [2, 3, 99, 100, 101, 199, 200, 201, 300, 301])
@pytest.mark.parametrize("validation", ["last", "first"])
@engines
def test_there_is_always_a_training_and_a_validation_shard(tmp_path, rows, validation, engine):
    pq.write_table(
        pa.table({"text": [f"row {row} " * 20 for row in range(rows)]}),
        tmp_path / "a.parquet",
        row_group_size=13,
    )
    layout = Layout(100, 30, num_shards=2, validation=validation, engine=engine)
    report = rechunk([tmp_path / "a.parquet"], tmp_path / "out", Selection(), layout)
    assert contents(tmp_path / "out") == obvious([tmp_path / "a.parquet"], Selection(), layout)
    names = [shard.name for shard in report.shards]
    assert len(names) >= 2 and names.index(VALIDATION_SHARD) == (
        0 if validation == "first" else len(names) - 1
    )
    assert sum(shard.rows for shard in report.shards) == min(rows, 300)
    assert run_plan(make_plan([tmp_path / "a.parquet"], Selection(), layout), tmp_path / "planned") == report


@pytest.mark.parametrize("rows", [0, 1])
@engines
def test_too_few_rows_is_an_error(tmp_path, rows, engine):
    layout = Layout(engine=engine)
    pq.write_table(pa.table({"text": ["x" * 60] * rows + ["short", None]}), tmp_path / "a.parquet")
    for way in (
        lambda: rechunk([tmp_path / "a.parquet"], tmp_path / "out", layout=layout),
        lambda: run_plan(make_plan([tmp_path / "a.parquet"], layout=layout), tmp_path / "out"),
    ):
        with pytest.raises(
            ValueError, match=f"{rows} kept.*1 no text, 1 too short|{rows} kept.*1 too short, 1 no text"
        ):
            way()
    assert list((tmp_path / "out").iterdir()) == []


# ---- damage ----


def damage(path, group, column="text"):
    """Overwrites the middle of a column in a row group."""
    ((start, stop),) = chunk_ranges(pq.read_metadata(path), [column], [group])
    data = bytearray(path.read_bytes())
    data[(start + stop) // 2 : (start + stop) // 2 + 300] = bytes(300)
    path.write_bytes(data)


@pytest.mark.parametrize("group", [0, 7, 15])
@engines
def test_a_damaged_page_is_reported_with_file_and_row_group(sources, tmp_path, group, engine):
    layout = Layout(1000, engine=engine)
    damage(sources[1], group)
    for way in (
        lambda: rechunk(sources, tmp_path / "out", GOOD, layout),
        lambda: make_plan(sources, GOOD, layout),
    ):
        with pytest.raises(ValueError, match=f"b.parquet, row group {group} "):
            way()
    assert list((tmp_path / "out").iterdir()) == []


@engines
def test_damage_beyond_the_rows_that_are_needed_does_no_harm(sources, tmp_path, engine):
    damage(sources[1], 5)
    layout = Layout(100, 64, num_shards=2, engine=engine)
    report = rechunk(sources, tmp_path / "out", GOOD, layout)
    assert contents(tmp_path / "out") == obvious(sources[:1], GOOD, layout)
    assert report.rows < 1000 and list((tmp_path / "out").glob(".*")) == []


@engines
def test_bytes_that_are_no_text_are_reported_with_file_and_row_group(tmp_path, engine):
    texts = [b"a text that is long enough to be kept, as all the others are"] * 300
    texts[250] = b"\xff\xfe" * 100
    pq.write_table(
        pa.table({"text": pa.array(texts, pa.binary()).view(pa.string())}),
        tmp_path / "a.parquet",
        row_group_size=100,
    )
    with pytest.raises(ValueError, match="a.parquet, row group 2 .*UTF8"):
        rechunk([tmp_path / "a.parquet"], tmp_path / "out", layout=Layout(engine=engine))


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"body": ["x"], "int_score": [1]}, "no column 'text'; it has body, int_score"),
        ({"text": ["x"]}, "no column 'int_score'"),
        ({"text": [b"x"], "int_score": [1]}, "'text' holds binary"),
        ({"text": [["x"]], "int_score": [1]}, "'text' holds list"),
        ({"text": ["x"], "int_score": ["1"]}, "'int_score' holds string"),
        ({"text": ["x"], "int_score": [True]}, "'int_score' holds bool"),
    ],
)
def test_columns_are_checked_before_anything_is_read(sources, tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "c.parquet")
    for way in (
        lambda: check_source(tmp_path / "c.parquet", GOOD),
        lambda: rechunk([*sources, tmp_path / "c.parquet"], tmp_path / "out", GOOD, SMALL),
    ):
        with pytest.raises(ValueError, match=f"c.parquet.*{message}"):
            way()


@pytest.mark.parametrize("content", [b"", b"PAR1", b"<html>log in</html>" * 100, b"PAR1" + b"x" * 5000, None])
def test_what_is_no_parquet_is_reported(sources, tmp_path, content):
    path = tmp_path / "c.parquet"
    path.write_bytes(sources[0].read_bytes()[:-1000] if content is None else content)
    with pytest.raises(
        ValueError, match="c.parquet is not a whole Parquet file|c.parquet: it is (empty|not Parquet)"
    ):
        check_source(path, GOOD)
    with pytest.raises(FileNotFoundError):
        check_source(tmp_path / "absent.parquet", GOOD)


@engines
def test_a_failing_writer_lets_its_reader_go(sources, tmp_path, engine):
    def full(read, written):
        if written > 1000:
            raise OSError(28, "No space left on device")

    layout = replace(SMALL, engine=engine)
    before = threading.active_count()
    for _ in range(5):
        with pytest.raises(OSError, match="No space left"):
            rechunk(sources, tmp_path / "out", GOOD, layout, progress=full)
    assert threading.active_count() == before and list((tmp_path / "out").iterdir()) == []


def test_a_disk_that_is_full_leaves_nothing_half_made(sources, tmp_path, monkeypatch):
    folder, calls, real = tmp_path / "out", itertools.count(), pq.ParquetWriter.write_batch

    def write_batch(*arguments, **options):
        if next(calls) == 9:
            raise OSError(28, "No space left on device")
        return real(*arguments, **options)

    monkeypatch.setattr(pq.ParquetWriter, "write_batch", write_batch)
    with pytest.raises(OSError, match="No space left"):
        rechunk(sources, folder, GOOD, SMALL)
    assert list(folder.iterdir()) == []
    rechunk(sources, folder, GOOD, SMALL)
    assert contents(folder) == obvious(sources)


def test_shards_are_not_mixed_with_what_is_there(sources, tmp_path):
    rechunk(sources, tmp_path / "out", GOOD, SMALL)
    for way in (
        lambda: rechunk(sources, tmp_path / "out", GOOD, SMALL),
        lambda: run_plan(make_plan(sources, GOOD, SMALL), tmp_path / "out"),
    ):
        with pytest.raises(ValueError, match="already holds shard_00000.parquet"):
            way()


# ---- memory, imports ----


def peak_of(path, folder, engine) -> int:
    """Peak memory in MB of a process that cuts one source."""
    code = """
import sys
from musekit.shards.rechunk import Layout, rechunk
from musekit.shards.selection import Selection
rechunk(sys.argv[1:2], sys.argv[2], Selection(), Layout(2000, 1024, num_shards=100, engine=sys.argv[3]))
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) // 1024)
"""
    return int(
        subprocess.run(
            [sys.executable, "-c", code, path, folder, engine], capture_output=True, text=True, check=True
        ).stdout
    )


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@engines
def test_memory_grows_neither_with_the_source_nor_with_its_row_groups(tmp_path, engine):
    random = np.random.default_rng(0)
    words = np.array(
        ["".join(random.choice(list("etaoinshrdlu"), random.integers(2, 9))) for _ in range(2000)], object
    )
    part = pa.table({"text": [" ".join(random.choice(words, 500)) for _ in range(2000)]})
    scale = 1 if engine == "arrow" else 3  # Polars decodes many row groups ahead
    sizes = {"small": (6 * scale, 1000), "large": (24 * scale, 1000), "giant": (24 * scale, 10**9)}
    for name, (times, group) in sizes.items():
        pq.write_table(pa.concat_tables([part] * times), tmp_path / f"{name}.parquet", row_group_size=group)
    peaks = {name: peak_of(tmp_path / f"{name}.parquet", tmp_path / name, engine) for name in sizes}
    most = 50 if engine == "arrow" else 110  # MB, of 110 or 330 that the source has grown by
    assert max(peaks["large"], peaks["giant"]) < peaks["small"] + most, peaks
    large, giant = (
        {path.name: file_hash(path) for path in (tmp_path / name).iterdir()} for name in ("large", "giant")
    )
    assert large == giant


def test_no_torch_is_imported():
    code = "import sys, musekit.shards.plan; print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "False False\n"
    )


# ---- far away ----


def test_from_a_web_server_only_what_the_rows_need_travels(tmp_path):
    random = np.random.default_rng(0)
    rows, selection, layout = (
        12_000,
        Selection(score_column="int_score", min_score=3),
        Layout(2000, 1000, num_shards=2),
    )
    noise = {name: random.bytes(rows * 500).hex() for name in ("text", "other")}
    pq.write_table(
        pa.table(
            {
                "text": [noise["text"][row * 1000 : row * 1000 + 1000] for row in range(rows)],
                "other": [noise["other"][row * 1000 : row * 1000 + 1000] for row in range(rows)],
                "int_score": [2 + row % 4 for row in range(rows)],
            }
        ),
        tmp_path / "a.parquet",
        row_group_size=100,
        write_statistics=False,
    )
    near = rechunk([tmp_path / "a.parquet"], tmp_path / "near", selection, layout)
    with MoodyServer({"a.parquet": (tmp_path / "a.parquet").read_bytes()}) as server:
        assert rechunk([f"{server.url}/a.parquet"], tmp_path / "far", selection, layout) == near
        fetched = server.sent
        assert (
            run_plan(make_plan([f"{server.url}/a.parquet"], selection, layout), tmp_path / "planned") == near
        )
    metadata = pq.read_metadata(tmp_path / "a.parquet")
    groups = range(-(-near.rows // 100))
    needed = sum(stop - start for start, stop in chunk_ranges(metadata, ["text", "int_score"], groups))
    whole = (tmp_path / "a.parquet").stat().st_size
    assert fetched <= 1.05 * needed < 0.5 * whole, (fetched / needed, fetched / whole)


# ---- the consumer ----


def test_a_tokenizer_is_trained_on_the_shards(tmp_path):
    rustbpe, tiktoken = pytest.importorskip("rustbpe"), pytest.importorskip("tiktoken")
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(library.glob("*.py"))]
    pq.write_table(
        pa.table({"text": [part for text in texts for part in text.split("\n\n")]}), tmp_path / "a.parquet"
    )
    report = rechunk([tmp_path / "a.parquet"], tmp_path / "data", layout=Layout(1000, 128, num_shards=3))
    shards = sorted(path for path in (tmp_path / "data").iterdir() if path.suffix == ".parquet")
    assert [path.name for path in shards] == [
        "shard_00000.parquet",
        "shard_00001.parquet",
        "shard_00002.parquet",
        VALIDATION_SHARD,
    ]

    def training_texts():
        for path in shards:
            if path.name != VALIDATION_SHARD:
                parquet = pq.ParquetFile(path)
                for group in range(parquet.num_row_groups):
                    yield from parquet.read_row_group(group).column("text").to_pylist()

    tokenizer = rustbpe.Tokenizer()
    pattern = (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
        r"|\s*[\r\n]|\s+(?!\S)|\s+"
    )
    tokenizer.train_from_iterator(training_texts(), 512, pattern=pattern)
    ranks = {bytes(token): rank for token, rank in tokenizer.get_mergeable_ranks()}
    encoding = tiktoken.Encoding(
        "shards", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|bos|>": len(ranks)}
    )
    held_out = pq.read_table(tmp_path / "data" / VALIDATION_SHARD)["text"].to_pylist()
    tokens = [encoding.encode_ordinary(text) for text in held_out]
    assert len(ranks) == 512 and [encoding.decode(ids) for ids in tokens] == held_out
    assert sum(map(len, tokens)) < 0.6 * sum(len(text.encode()) for text in held_out)
    assert sum(1 for _ in training_texts()) == sum(shard.rows for shard in report.shards[:-1]) == 3000
