"""How fast, and in how much memory, text is cut into shards: the kit beside a plain loop, DuckDB, Polars and the codecs alone.

    python benchmarks/shards.py            # 280,000 documents, 5 rounds; the made sources stay in --folder
    python benchmarks/shards.py --quick    # half of them, 1 round

Every run is a process of its own. In each round all contenders run once, in turn, so that whatever else the machine is doing
meets all of them; shares are of the plain loop in the same round, and the medians of the rounds are printed.
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
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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
        drawn, ends = words[np.searchsorted(chances / chances[-1], random.random(lengths.sum()))], np.cumsum(lengths)
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
    """The path of a source; made if need be, by another process, since a child starts with its parent's peak of memory."""
    path = folder / f"{documents}{'-giant' if giant else ''}.parquet"
    if not path.exists():
        print(f"making {path} ...", flush=True)
        subprocess.run([sys.executable, __file__, "--make", str(path), str(documents), str(int(giant))], check=True)
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
    pq.write_table(table, f"{out}/shard_{shards:05d}.parquet", row_group_size=GROUP, compression="snappy", use_dictionary=False)


def musekit(source, out, codec="zstd"):
    """The kit's stream: a reader and a writer."""
    from musekit.shards.rechunk import Layout, rechunk
    from musekit.shards.sources import Selection

    rechunk([source], out, Selection("text", "int_score", 3), Layout(codec=codec))


def musekit_snappy(source, out):
    """The same with snappy."""
    musekit(source, out, "snappy")


def musekit_polars(source, out):
    """The kit's writer behind Polars' reader."""
    import itertools

    import polars as pl

    from musekit.shards.rechunk import Layout, read_ahead, regroup, shard_name, write_texts

    kept = pl.scan_parquet(source).filter((pl.col("int_score") >= 3) & (pl.col("text").str.len_chars() >= 50)).select("text")
    frames = kept.collect_batches(chunk_size=GROUP, maintain_order=True)
    texts = (frame["text"].to_arrow(compat_level=pl.CompatLevel.oldest()).cast(pa.string()) for frame in frames)
    groups = read_ahead(regroup(texts, Layout()))
    for index in itertools.count():
        if (first := next(groups, None)) is None:
            return
        write_texts(Path(out) / shard_name(index), itertools.chain([first], itertools.islice(groups, ROWS // GROUP - 1)), Layout())


def musekit_plan(source, out, workers=2):
    """The kit's plan on two processes: counted, then written."""
    from concurrent.futures import ProcessPoolExecutor

    from musekit.shards.plan import make_plan, run_plan
    from musekit.shards.sources import Selection

    with ProcessPoolExecutor(workers) as executor:
        run_plan(make_plan([source], Selection("text", "int_score", 3), executor=executor), out, executor)


def duckdb(source, out):
    """DuckDB's COPY: row groups of 2,048, its smallest, 42 of them a file."""
    import duckdb

    duckdb.sql(f"""COPY (SELECT text FROM '{source}' WHERE int_score >= 3 AND length(text) >= 50) TO '{out}/shards'
        (FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 1, ROW_GROUP_SIZE 2048, ROW_GROUPS_PER_FILE 42)""")


def polars(source, out):
    """Polars' partitioned sink: the same row groups and shards."""
    import polars as pl

    kept = pl.scan_parquet(source).filter((pl.col("int_score") >= 3) & (pl.col("text").str.len_chars() >= 50)).select("text")
    kept.sink_parquet(pl.PartitionBy(out, max_rows_per_file=ROWS, approximate_bytes_per_file=2**62), compression="zstd",
                      compression_level=1, row_group_size=GROUP, statistics=False)


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


CONTENDERS = (plain, musekit, musekit_snappy, musekit_polars, musekit_plan, duckdb, polars, only_read, only_write)


# ---- measuring ----

def run_here(name, source, out):
    """Runs one contender in this process; what it took."""
    contender = {each.__name__: each for each in CONTENDERS}[name]
    more = {"kept": kept_rows(source)} if contender is only_write else {}
    if contender.__name__.startswith("musekit"):
        import musekit.shards.plan  # noqa: F401  imports are not measured
    before, start = cpu_seconds(), time.perf_counter()
    contender(source, out, **more)
    wall, cpu = time.perf_counter() - start, cpu_seconds() - before
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024
    size = sum(path.stat().st_size for path in Path(out).rglob("*.parquet")) / 1e6
    return {"wall": wall, "cpu": cpu, "peak": peak, "size": size}


def cpu_seconds():
    """CPU time of this process and its ended children."""
    return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def measure(name, source, folder):
    """Runs one contender in a process of its own."""
    out = tempfile.mkdtemp(dir=folder)
    try:
        command = [sys.executable, __file__, "--run", name, str(source), out]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stderr}")
        return json.loads(done.stdout.splitlines()[-1])
    finally:
        shutil.rmtree(out)


def compare(names, source, folder, rounds):
    """Medians over the rounds, and medians of the shares of the first contender."""
    subprocess.run(["cat", str(source)], stdout=subprocess.DEVNULL, check=True)  # into the page cache
    taken = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            taken[name].append(measure(name, source, folder))
    base, table = taken[names[0]], {}
    for name, runs in taken.items():
        median = {what: statistics.median(run[what] for run in runs) for what in runs[0]}
        share = {what: statistics.median(run[what] / first[what] for run, first in zip(runs, base)) for what in runs[0]}
        table[name] = {"median": median, "share": share}
    return table


def show(table):
    """The table as text."""
    print(f"\n{'':16}{'wall s':>8}{'CPU s':>8}{'peak MB':>9}{'MB':>8}   {'wall':>6}{'CPU':>6}{'peak':>6}{'size':>6}")
    for name, row in table.items():
        median, share = row["median"], row["share"]
        print(f"{name:16}{median['wall']:8.2f}{median['cpu']:8.2f}{median['peak']:9.0f}{median['size']:8.0f}   "
              f"{share['wall']:6.2f}{share['cpu']:6.2f}{share['peak']:6.2f}{share['size']:6.2f}")


def far(source, folder, num_shards):
    """Cuts a source that stays on a web server; what travelled, as a share of what the rows need and of the file."""
    from musekit.shards.catalog import chunk_ranges
    from musekit.shards.rechunk import Layout, rechunk
    from musekit.shards.sources import Selection

    server = ThreadingHTTPServer(("localhost", 0), RangeHandler)
    server.source, server.sent = source, 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory(dir=folder) as out:
        address = f"http://localhost:{server.server_port}/source.parquet"
        report = rechunk([address], out, Selection("text", "int_score", 3), Layout(num_shards=num_shards))
    server.shutdown()
    metadata = pq.read_metadata(source)
    ranges = chunk_ranges(metadata, COLUMNS, range(-(-report.rows // 1000)))
    needed = sum(stop - start for start, stop in ranges)
    print(f"  {num_shards} shards asked for: {report.rows:,} rows read, {server.sent / 1e6:.1f} MB fetched, "
          f"{server.sent / needed:.3f} of what the rows need, {server.sent / source.stat().st_size:.3f} of the file")


class RangeHandler(BaseHTTPRequestHandler):
    """Gives parts of one file and counts their bytes."""

    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

    def do_GET(self):
        start, stop = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        with open(self.server.source, "rb") as file:
            file.seek(start)
            part = file.read(stop + 1 - start)
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{self.server.source.stat().st_size}")
        self.end_headers()
        self.server.sent += len(part)
        self.wfile.write(part)

    def log_message(self, *_):
        pass


def main():
    """The whole comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="half the documents, 1 round")
    parser.add_argument("--documents", type=int, default=280_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=[each.__name__ for each in CONTENDERS], help="beside the plain loop")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "musekit-benchmark")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--make", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        return print(json.dumps(run_here(*options.run)))
    if options.make:
        return make_source(Path(options.make[0]), int(options.make[1]), options.make[2] == "1")
    if options.quick:
        options.documents, options.rounds = options.documents // 2, 1
    options.folder.mkdir(parents=True, exist_ok=True)
    names = ["plain", *(options.only or [each.__name__ for each in CONTENDERS if each is not plain])]
    load = os.getloadavg()[0]
    print(f"{os.cpu_count()} cores, load {load:.1f}, {options.documents:,} documents, {options.rounds} rounds")
    show(compare(names, source_of(options.folder, options.documents), options.folder, options.rounds))
    print("\none giant row group:")
    show(compare(["plain", "musekit"], source_of(options.folder, options.documents, giant=True), options.folder, 1))
    print("\na tenth of the source:")
    show(compare(["plain", "musekit"], source_of(options.folder, options.documents // 10), options.folder, 1))
    print("\nstraight from a web server:")
    for num_shards in (10, 1):
        far(source_of(options.folder, options.documents), options.folder, num_shards)
    print(f"\nload at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
