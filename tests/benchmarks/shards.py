"""How fast, and in how much memory, text is cut into shards: the kit beside a plain loop, DuckDB, Polars and
the codecs alone.

    python tests/benchmarks/shards.py            # 280,000 documents, 5 rounds; sources stay in --folder
    python tests/benchmarks/shards.py --short    # half of them, 3 rounds: about eight minutes on two cores
    python tests/benchmarks/shards.py --quick    # a tenth of them, 1 round: does it still run?

Every run is a process of its own, and begins when the disk has nothing left to write. In each round all
contenders run once, in turn, so that whatever else the machine is doing meets all of them; shares are of the
plain loop in the same round. Medians of the rounds are printed, and of the shares the least and the greatest
as well. Ours alone waits until its shards are on the disk (fsync).
"""
import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from mmap import ACCESS_READ, mmap
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

COLUMNS, ROWS, GROUP = ["text", "int_score"], 86_016, 1_024


# ---- a source like FineWeb-Edu ----

def vocabulary(random, size=50_000):
    """Words of made-up letters; frequent ones are short."""
    import numpy as np

    letters, weights = list("etaoinshrdlucmfwypvbgkjqxz"), 1 / np.arange(1.0, 27) ** 0.7
    lengths = np.maximum(1, random.normal(2 + 0.55 * np.log1p(np.arange(size)), 1.5)).astype(int)
    return np.array(["".join(random.choice(letters, n, p=weights / weights.sum())) for n in lengths], object)


def tables(documents, size=1000, seed=0):
    """Tables of `size` documents: Zipf-distributed words, log-normal lengths around 3 KB, ten columns."""
    import numpy as np

    random = np.random.default_rng(seed)
    words = vocabulary(random)
    chances = np.cumsum(1 / (np.arange(len(words)) + 2.7))
    for start in range(0, documents, size):
        lengths = np.maximum(3, random.lognormal(np.log(345), 0.9, size)).astype(int)
        drawn, ends = words[np.searchsorted(chances / chances[-1], random.random(lengths.sum()))], np.cumsum(
            lengths
        )
        score = np.clip(random.normal(2.8, 0.6, size), 0, 5)
        names = [f"{number:032x}" for number in random.integers(2**62, size=size)]
        yield pa.table({
            "text": [" ".join(drawn[end - length:end]) for end, length in zip(ends, lengths)],
            "id": [f"<urn:uuid:{name}>" for name in names],
            "dump": ["CC-MAIN-2013-20"] * size,
            "url": [f"http://www.example.org/{name[:12]}/{name[12:]}.html" for name in names],
            "file_path": [f"s3://crawl-data/segments/{start}/warc/{name[:2]}.warc.gz" for name in names],
            "language": ["en"] * size,
            "language_score": random.uniform(0.65, 1, size),
            "token_count": lengths * 4 // 3,
            "score": score,
            "int_score": np.round(score).astype(np.int64),
        })


def make_source(path, documents, giant):
    """Writes a source: row groups of 1,000, or one of all rows."""
    made = pa.concat_tables(tables(documents)) if giant else None
    part = path.with_suffix(".part")
    with pq.ParquetWriter(part, (made or next(tables(1000))).schema, compression="snappy") as writer:
        for table in [made] if giant else tables(documents):
            writer.write_table(table, row_group_size=documents if giant else 1000)
    part.rename(path)


def source_of(folder, documents, giant=False):
    """The path of a source; made if need be, by another process, since a child starts with its parent's
    peak of memory."""
    path = folder / f"{documents}{'-giant' if giant else ''}.parquet"
    if not path.exists():
        print(f"making {path} ...", flush=True)
        subprocess.run(
            [sys.executable, __file__, "--make", str(path), str(documents), str(int(giant))], check=True
        )
    return path


# ---- the contenders: each cuts `source` into `out` ----

def plain(source, out):
    """As people write it: a row group at a time, Python's strings in a list, a loop over rows, snappy."""
    texts, shards, parquet = [], 0, pq.ParquetFile(source)
    for group in range(parquet.num_row_groups):
        for row in parquet.read_row_group(group, columns=COLUMNS).to_pylist():
            text, score = row["text"], row["int_score"]
            if text is not None and score is not None and score >= 3 and len(text) >= 50:
                texts.append(text)
            if len(texts) == ROWS:
                write_list(texts, out, shards)
                texts, shards = [], shards + 1
    write_list(texts, out, shards)


def write_list(texts, out, shards):
    """Writes a list of strings as one shard."""
    table = pa.table({"text": texts})
    pq.write_table(
        table,
        f"{out}/shard_{shards:05d}.parquet",
        row_group_size=GROUP,
        compression="snappy",
        use_dictionary=False,
    )


def musekit(source, out, codec="zstd"):
    """The kit's stream: a reader and a writer."""
    from musekit.shards.rechunk import Layout, rechunk
    from musekit.shards.selection import Selection

    rechunk([source], out, Selection("text", "int_score", 3), Layout(codec=codec))


def bare(source, out):
    """The kit's two threads and its cutting, and nothing else: no reasons, no UTF-8 check, no SHA-256, no
    waiting for the disk."""
    from itertools import chain, islice

    from musekit.shards.rechunk import CODECS, SCHEMA, Layout, regroup
    from musekit.utils.workers import read_ahead

    def kept():
        parquet = pq.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False)
        for batch in parquet.iter_batches(GROUP, columns=COLUMNS, use_threads=False):
            long_enough = pc.greater_equal(pc.utf8_length(batch["text"]), 50)
            yield batch["text"].filter(pc.and_(pc.greater_equal(batch["int_score"], 3), long_enough))

    groups, shards = read_ahead(regroup(kept(), Layout())), 0
    while (first := next(groups, None)) is not None:
        with pq.ParquetWriter(
            f"{out}/shard_{shards:05d}.parquet",
            SCHEMA,
            compression="zstd",
            compression_level=CODECS["zstd"],
            use_dictionary=False,
            write_statistics=False,
        ) as writer:
            for group in chain([first], islice(groups, ROWS // GROUP - 1)):
                writer.write_batch(pa.record_batch([group], schema=SCHEMA))
        shards += 1


def musekit_snappy(source, out):
    """The same with snappy."""
    musekit(source, out, "snappy")


def musekit_polars(source, out):
    """The kit on Polars' engine."""
    from musekit.shards.rechunk import Layout, rechunk
    from musekit.shards.selection import Selection

    rechunk([source], out, Selection("text", "int_score", 3), Layout(engine="polars"))


def musekit_plan(source, out, workers=2):
    """The kit's plan on two processes: counted, then written."""
    from concurrent.futures import ProcessPoolExecutor

    from musekit.shards.plan import make_plan, run_plan
    from musekit.shards.selection import Selection

    with ProcessPoolExecutor(workers) as executor:
        run_plan(make_plan([source], Selection("text", "int_score", 3), executor=executor), out, executor)


def duckdb(source, out):
    """DuckDB's COPY: row groups of 2,048, its smallest, 42 of them a file."""
    import duckdb

    duckdb.sql(
        f"""COPY (SELECT text FROM '{source}' WHERE int_score >= 3 AND length(text) >= 50) TO '{out}/shards'
        (FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 1,
        ROW_GROUP_SIZE 2048, ROW_GROUPS_PER_FILE 42)"""
    )


def polars(source, out):
    """Polars' partitioned sink: the same row groups and shards."""
    import polars as pl

    kept = (
        pl.scan_parquet(source)
        .filter((pl.col("int_score") >= 3) & (pl.col("text").str.len_chars() >= 50))
        .select("text")
    )
    kept.sink_parquet(
        pl.PartitionBy(out, max_rows_per_file=ROWS, approximate_bytes_per_file=2**62),
        compression="zstd",
        compression_level=1,
        row_group_size=GROUP,
        statistics=False,
    )


def only_read(source, out):
    """The floor of reading: the two columns, decoded by one thread."""
    parquet = pq.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False)
    for _ in parquet.iter_batches(GROUP, columns=COLUMNS, use_threads=False):
        pass


def only_write(source, out, kept=None):
    """The floor of writing: the kept rows, already in memory, by one thread."""
    with pq.ParquetWriter(f"{out}/all.parquet", kept[0].schema, compression="zstd", compression_level=1,
                          use_dictionary=False, write_statistics=False) as writer:
        for table in kept:
            writer.write_table(table)


def kept_rows(source):
    """The kept rows in groups, for `only_write`."""
    table = pq.read_table(source, columns=COLUMNS)
    table = table.filter(pc.greater_equal(table["int_score"], 3)).select(["text"])
    return [table.slice(start, GROUP).combine_chunks() for start in range(0, len(table), GROUP)]


CONTENDERS = (
    plain,
    musekit,
    bare,
    musekit_snappy,
    musekit_polars,
    musekit_plan,
    duckdb,
    polars,
    only_read,
    only_write,
)


# ---- measuring ----

def run_here(name, source, out):
    """Runs one contender in this process; what it took."""
    contender = {each.__name__: each for each in CONTENDERS}[name]
    more = {"kept": kept_rows(source)} if contender is only_write else {}
    if contender is bare or contender.__name__.startswith("musekit"):
        import musekit.shards.plan  # noqa: F401  imports are not measured
    before, start = cpu_seconds(), time.perf_counter()
    contender(source, out, **more)
    wall, cpu = time.perf_counter() - start, cpu_seconds() - before
    peak = (
        max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        / 1024
    )
    size = sum(path.stat().st_size for path in Path(out).rglob("*.parquet")) / 1e6
    return {"wall": wall, "cpu": cpu, "peak": peak, "size": size}


def cpu_seconds():
    """CPU time of this process and its ended children."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def measure(name, source, folder):
    """Runs one contender in a process of its own."""
    out = tempfile.mkdtemp(dir=folder)
    os.sync()
    try:
        command = [sys.executable, __file__, "--run", name, str(source), out]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stderr}")
        return json.loads(done.stdout.splitlines()[-1])
    finally:
        shutil.rmtree(out)


def compare(names, source, folder, rounds):
    """Medians over the rounds, and (least, median, greatest) of the shares of the first contender."""
    subprocess.run(["cat", str(source)], stdout=subprocess.DEVNULL, check=True)  # into the page cache
    taken = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            taken[name].append(measure(name, source, folder))
    base, table = taken[names[0]], {}
    for name, runs in taken.items():
        median = {what: statistics.median(run[what] for run in runs) for what in runs[0]}
        shares = {what: sorted(run[what] / first[what] for run, first in zip(runs, base)) for what in runs[0]}
        share = {what: (values[0], statistics.median(values), values[-1]) for what, values in shares.items()}
        table[name] = {"median": median, "share": share}
    return table


def show(table):
    """The table as text: medians, and shares of the first contender with their spread."""
    print(
        f"\n{'':16}{'wall s':>8}{'CPU s':>8}{'peak MB':>9}{'MB':>8}  "
        f" {'wall':>6}{'':12}{'CPU':>6}{'':12}{'peak':>6}{'size':>6}"
    )
    for name, row in table.items():
        median, share = row["median"], row["share"]
        print(
            f"{name:16}{median['wall']:8.2f}{median['cpu']:8.2f}{median['peak']:9.0f}{median['size']:8.0f}   "
            f"{spread(share['wall'])}{spread(share['cpu'])}{share['peak'][1]:6.2f}{share['size'][1]:6.2f}",
            flush=True,
        )


def spread(share):
    """A median and, in brackets, the least and the greatest."""
    least, median, greatest = share
    return f"{median:6.2f} ({least:.2f}-{greatest:.2f})"


def far(source, folder, num_shards, rows_per_shard=ROWS):
    """Cuts a source that stays on a web server; what travelled, as a share of what the rows need and of
    the file."""
    from musekit.shards.remote import chunk_ranges
    from musekit.shards.rechunk import Layout, rechunk
    from musekit.shards.selection import Selection

    sys.path.insert(0, str(Path(__file__).parent.parent))
    from moody_server import MoodyServer

    layout = Layout(rows_per_shard, GROUP, num_shards=num_shards)
    with open(source, "rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        with MoodyServer({"source.parquet": content}) as server, tempfile.TemporaryDirectory(
            dir=folder
        ) as out:
            report = rechunk([f"{server.url}/source.parquet"], out, Selection("text", "int_score", 3), layout)
            sent = server.sent
    metadata = pq.read_metadata(source)
    ranges = chunk_ranges(metadata, COLUMNS, range(-(-report.rows // 1000)))
    needed = sum(stop - start for start, stop in ranges)
    print(
        f"  {num_shards} + 1 shards of {rows_per_shard:,} rows: {report.rows:,} rows read, {sent / 1e6:.1f}"
        f" MB fetched, {sent / needed:.3f} of what the rows need, {sent / source.stat().st_size:.3f} of the"
        " file"
    )


def main():
    """The whole comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="half the documents, 3 rounds")
    parser.add_argument("--quick", action="store_true", help="a tenth of the documents, 1 round")
    parser.add_argument("--documents", type=int, default=280_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--only", nargs="+", choices=[each.__name__ for each in CONTENDERS], help="beside the plain loop"
    )
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "musekit-benchmark")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--make", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        return print(json.dumps(run_here(*options.run)))
    if options.make:
        return make_source(Path(options.make[0]), int(options.make[1]), options.make[2] == "1")
    if options.short or options.quick:
        options.documents //= 10 if options.quick else 2
        options.rounds = 1 if options.quick else 3
    options.folder.mkdir(parents=True, exist_ok=True)
    names = ["plain", *(options.only or [each.__name__ for each in CONTENDERS if each is not plain])]
    load = os.getloadavg()[0]
    print(
        f"{os.cpu_count()} cores, load {load:.1f}, {options.documents:,} documents, {options.rounds} rounds"
    )
    show(compare(names, source_of(options.folder, options.documents), options.folder, options.rounds))
    print("\none giant row group:")
    show(
        compare(
            ["plain", "musekit"],
            source_of(options.folder, options.documents, giant=True),
            options.folder,
            min(3, options.rounds),
        )
    )
    print("\na tenth of the source, whose peak of memory should be the same:")
    show(
        compare(
            ["plain", "musekit"],
            source_of(options.folder, options.documents // 10),
            options.folder,
            min(3, options.rounds),
        )
    )
    print("\nstraight from a web server:")
    source = source_of(options.folder, options.documents)
    far(source, options.folder, 10)
    far(
        source, options.folder, 1, options.documents // 10 // GROUP * GROUP
    )  # full long before the source ends
    print(f"\nload at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
