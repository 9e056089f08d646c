"""Every odd answer of a web server, to downloads and to reading in place: the file is right, or there is
an error of one line."""
import os
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from odd_server import BEHAVIOURS, OddServer
from musekit.shards.download import Connection, fetch
from musekit.shards.remote import RemoteFile
from musekit.shards.sources import read_texts
from musekit.shards.selection import Selection


def parquet_bytes(rows=6000):
    """About 500 kB of Parquet in a few row groups, with a column that is not wanted."""
    random = np.random.default_rng(0)
    texts = [random.bytes(32).hex() for _ in range(rows)]
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.table({"other": range(rows), "text": texts}),
        sink,
        compression="none",
        row_group_size=1000,
        use_dictionary=False,
    )
    return sink.getvalue().to_pybytes()


CONTENT = parquet_bytes()
TEXTS = pq.read_table(pa.BufferReader(CONTENT))["text"].to_pylist()

# What comes of a download, and of reading in place: "" for the right file, else the error and words of it.
RIGHT = ""
BUSY = (ConnectionError, "attempt 5 of 5")
UNCLEAR = (ValueError, "sent another range than was requested")
EXPECTED = {
    "good": (RIGHT, RIGHT),
    "broken": (RIGHT, RIGHT),
    "eighths": (RIGHT, RIGHT),
    "stingy": (RIGHT, RIGHT),
    "anonymous": (RIGHT, RIGHT),
    "weak": (RIGHT, RIGHT),
    "dated": (RIGHT, RIGHT),
    "empty": (BUSY, BUSY),
    "nothing": ((ValueError, "does not send the requested file"), UNCLEAR),
    "shifted": (RIGHT, UNCLEAR),
    "earlier": (RIGHT, RIGHT),
    "star": (RIGHT, (ValueError, "does not say how long the file is")),
    "no-range": (RIGHT, UNCLEAR),
    "words": (RIGHT, UNCLEAR),
    "units": (RIGHT, UNCLEAR),
    "backwards": (RIGHT, UNCLEAR),
    "beyond": (RIGHT, UNCLEAR),
    "digits": (RIGHT, UNCLEAR),
    "always-a-part": (RIGHT, RIGHT),
    "always-unclear": ((ValueError, "which one is unclear"), UNCLEAR),
    "always-star": (RIGHT, (ValueError, "does not say how long")),
    "multipart": (RIGHT, UNCLEAR),
    "no-length": (RIGHT, RIGHT),
    "chunked": (RIGHT, RIGHT),
    "chunked-broken": (RIGHT, RIGHT),
    "zipped": (RIGHT, (ValueError, "compresses")),
    "whole": (RIGHT, (ValueError, "does not support range requests")),
    "whole-as-a-part": (RIGHT, UNCLEAR),
    "no-such-part": (RIGHT, (ValueError, "no byte 0")),
    "more": (RIGHT, RIGHT),
    "busy": (BUSY, BUSY),
    "missing": ((FileNotFoundError, "404"), (FileNotFoundError, "404")),
    "forbidden": ((ValueError, "403"), (ValueError, "403")),
    "teapot": ((ValueError, "418"), (ValueError, "418")),
    "strange": ((ValueError, "999"), (ValueError, "999")),
    "page": ((ValueError, "a web page"), (ValueError, "a web page")),
    "page-part": ((ValueError, "a web page"), (ValueError, "a web page")),
    "pointer": ((ValueError, "Git LFS"), (ValueError, "Git LFS")),
    "json": ((ValueError, "begins with"), (ValueError, "begins with")),
    "circle": ((ValueError, "never end"), (ValueError, "never end")),
    "ftp": ((ValueError, "InvalidSchema"), (ValueError, "InvalidSchema")),
    "endless": (RIGHT, RIGHT),
    "bracket": ((ValueError, "cannot be requested"), (ValueError, "cannot be requested")),
    "nowhere": ((ConnectionError, "refused"), (ConnectionError, "refused")),
    "slow": (RIGHT, RIGHT),
    "changing": ((ConnectionError, "attempt 5 of 5"), (ValueError, "was changed")),
    "changing-size": ((ConnectionError, "another version"), (ValueError, "was changed")),
}


@pytest.fixture(scope="module", autouse=True)
def quick():
    RemoteFile.pause, pause = 0.001, RemoteFile.pause
    yield
    RemoteFile.pause = pause


@pytest.fixture
def server():
    with OddServer(CONTENT) as server:
        yield server


def test_no_behaviour_is_forgotten():
    assert EXPECTED.keys() == BEHAVIOURS.keys()


def check(expected, result, url):
    """Calls a reader: what it gives is right, or its error is one short line that names the address."""
    if expected == RIGHT:
        return result()
    kind, words = expected
    with pytest.raises(kind, match=words) as caught:
        result()
    line = str(caught.value)
    assert "\n" not in line and len(line) < 600 and url in line and "s3cret" not in line, line


@pytest.mark.parametrize("name", EXPECTED)
def test_downloads(server, tmp_path, name):
    url, path, waits = f"{server.url}/{name}/a.parquet", tmp_path / "a.parquet", []
    connection = Connection(endpoint="http://hub.example", sleep=waits.append, timeout=5)
    expected = EXPECTED[name][0]
    check(expected, lambda: fetch(url, path, connection), url)
    assert path.exists() == (expected == RIGHT)
    if expected == RIGHT:
        assert path.read_bytes() == CONTENT and sum(waits) <= 12
        buffers = 64e6 if name == "endless" else 0  # what the system takes of a body that nobody reads
        assert server.sent < 2.5 * len(CONTENT) + 9 * 70_000 + buffers
    assert server.sent < 1 << 25 and len(server.requests) < 45  # what is on its way is not called back
    assert all(headers["Accept-Encoding"] == "identity" for headers in server.requests)


@pytest.mark.parametrize("name", EXPECTED)
def test_reading_in_place(server, name):
    url = f"{server.url}/{name}/a.parquet"

    def read():
        assert [text for texts, *_ in read_texts(url, Selection()) for text in texts.to_pylist()] == TEXTS

    started = time.perf_counter()
    check(EXPECTED[name][1], read, url)
    assert time.perf_counter() - started < 20
    assert server.sent < 1 << 25 and len(server.requests) < 45  # what is on its way is not called back
    assert all(headers["Accept-Encoding"] == "identity" for headers in server.requests)


@pytest.mark.parametrize("name", ["broken", "eighths", "anonymous", "weak", "dated"])
def test_no_byte_that_came_is_thrown_away(server, tmp_path, name):
    fetch(f"{server.url}/{name}/a.parquet", tmp_path / "a.parquet", Connection(sleep=lambda seconds: None))
    overlaps = (1 << 16) * (len(server.requests) - 1) if name in ("anonymous", "weak") else 0
    assert server.sent <= len(CONTENT) + overlaps


def test_no_byte_is_thrown_away_in_place(server):
    with RemoteFile(f"{server.url}/broken/a.parquet") as file:
        file.expect([(0, len(CONTENT))])
        assert file.read() == CONTENT
        assert file.fetched == server.sent == len(CONTENT) + 4


def test_a_file_without_a_version_that_another_run_began_is_compared(server, tmp_path):
    path, connection = tmp_path / "a.parquet", Connection(
        sleep=lambda seconds: None, attempts=1, longest_wait=0
    )
    url = f"{server.url}/anonymous/a.parquet"
    with pytest.raises(ConnectionError, match="what has arrived is kept"):
        fetch(url, path, connection)
    before = (tmp_path / "a.parquet.part").read_bytes()
    assert before and CONTENT.startswith(before)
    server.content = other = CONTENT[:4] + b"?" + CONTENT[5:]  # as long, and different
    fetch(url, path, Connection(sleep=lambda seconds: None))
    assert path.read_bytes() == other


def test_closing_does_not_wait_for_a_pause(server):
    RemoteFile.pause = 30.0
    try:
        file = RemoteFile(f"{server.url}/good/a.parquet")
        file.url = file.location = f"{server.url}/busy/a.parquet"
        file.expect([(0, 1000)])
        future = file.pool.submit(file._fetch, 0, 1000)
        while len(server.requests) < 2:
            time.sleep(0.01)
        started = time.perf_counter()
        file.close()
        assert time.perf_counter() - started < 10 and isinstance(future.exception(), ConnectionError)
    finally:
        RemoteFile.pause = 0.001


@pytest.mark.parametrize("more", [[], ["--remote"]], ids=str)
@pytest.mark.parametrize("name", ["page", "no-range", "whole", "zipped", "missing", "circle"])
def test_the_command_says_it_in_one_line(server, tmp_path, name, more):
    if EXPECTED[name][bool(more)] == RIGHT:
        pytest.skip("it works")
    url = f"{server.url}/{name}/a.parquet"
    command = [sys.executable, "-m", "musekit.shards", "--from", url, "--cache-dir", tmp_path, *more]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and url in done.stderr, done.stderr
