"""Downloads from a server that misbehaves on demand, by processes that are killed, to disks that are full."""
import hashlib
import json
import subprocess
import sys
import time
import traceback
from base64 import b64encode
from dataclasses import replace
from email.utils import formatdate

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moody_server import MoodyServer
from musekit.shards.download import Connection, download_all, fetch


def parquet_bytes(seed, rows=6_000):
    """About 800 kB of Parquet that does not compress."""
    sink = pa.BufferOutputStream()
    rows = [hashlib.sha512(f"{seed}/{row}".encode()).hexdigest() for row in range(rows)]
    pq.write_table(pa.table({"text": rows}), sink, compression="none")
    return sink.getvalue().to_pybytes()


FILES = {f"{name}.parquet": parquet_bytes(name) for name in "abcd"}
NEWER = parquet_bytes("newer", 5_000)


@pytest.fixture
def server():
    with MoodyServer(FILES) as server:
        server.newer = {name: NEWER for name in FILES}
        yield server


@pytest.fixture
def waits():
    return []


@pytest.fixture
def connection(server, waits):
    return Connection(endpoint=server.url, sleep=waits.append, timeout=5)


def ranges(server):
    return [requested for _, requested, _ in server.requests]


@pytest.mark.parametrize(
    "moods, expected",
    [
        ([(500, {})], [1]),
        ([(502, {}), (503, {})], [1, 2]),
        ([(429, {"Retry-After": "7"})], [7]),
        ([(429, {"RateLimit": '"api";r=0;t=55'})], [55]),
        (["cut"], [1]),
        (["cut"] * 4, [1] * 4),
        ([(503, {}), (503, {}), "cut", (503, {}), (503, {})], [1, 2, 1, 1, 2]),
        (["promise more"], [1]),
        (["no ranges"], []),
        (["cut", "no ranges"], [1]),
        (["truncated"], [1]),
        (["slow"], []),
        (["cut", (416, {})], [1, 1]),
        ([(408, {}), "cut", (520, {})], [1, 1, 1]),
    ],
    ids=str,
)
def test_troubles_that_pass(server, connection, waits, tmp_path, moods, expected):
    server.moods["a.parquet"] = list(moods)
    source = fetch(f"{server.url}/a.parquet", tmp_path / "a.parquet", connection)
    assert source.path.read_bytes() == FILES["a.parquet"] and source.size == len(FILES["a.parquet"])
    assert not server.moods["a.parquet"] and waits == expected
    assert not (tmp_path / "a.parquet.part").exists()


def test_what_is_no_file_is_not_asked_for_again_and_loses_nothing(server, connection, waits, tmp_path):
    server.moods["a.parquet"] = ["cut", "page"]
    with pytest.raises(ValueError, match="a.parquet: it is not Parquet but a web page") as caught:
        fetch(f"{server.url}/a.parquet", tmp_path / "a.parquet", connection)
    assert (len(server.requests), waits) == (2, [1]) and "\n" not in str(caught.value)
    assert FILES["a.parquet"].startswith((tmp_path / "a.parquet.part").read_bytes())
    fetch(f"{server.url}/a.parquet", tmp_path / "a.parquet", connection)
    assert (
        ranges(server)[2].startswith("bytes=") and (tmp_path / "a.parquet").read_bytes() == FILES["a.parquet"]
    )


def test_a_cut_is_resumed_and_the_rest_alone_travels(server, connection, tmp_path):
    server.moods["a.parquet"] = ["cut", "cut"]
    fetch(f"{server.url}/a.parquet", tmp_path / "a.parquet", connection)
    places = [int(requested[6:-1]) for requested in ranges(server)[1:]]
    assert ranges(server)[0] is None and 0 < places[0] < places[1] < len(FILES["a.parquet"])


@pytest.mark.parametrize("ignores_if_range", [False, True])
def test_a_newer_version_is_not_glued_to_the_older(server, connection, tmp_path, ignores_if_range):
    server.moods["a.parquet"] = ["cut", "newer"]
    if ignores_if_range:  # the server that sends ranges of whatever it has now
        server.extra["a.parquet"] = {}
        original = FILES["a.parquet"]
        (tmp_path / "a.parquet.part").write_bytes(original[:300_000])
        url = f"{server.url}/a.parquet"
        facts = {
            "url": url,
            "address": hashlib.sha256(url.encode()).hexdigest(),
            "size": len(original),
            "sha256": hashlib.sha256(original).hexdigest(),
            "md5": None,
        }
        (tmp_path / "a.parquet.json").write_text(json.dumps(facts | {"etag": facts["sha256"]}))
        server.files["a.parquet"], server.moods["a.parquet"] = NEWER, []
    assert fetch(f"{server.url}/a.parquet", tmp_path / "a.parquet", connection).path.read_bytes() == NEWER


def test_retry_after_as_a_date(server, connection, waits, tmp_path):
    server.moods["a.parquet"] = [(429, {"Retry-After": formatdate(time.time() + 30, usegmt=True)})]
    fetch(f"{server.url}/a.parquet", tmp_path / "a.parquet", connection)
    assert 27 < waits[0] <= 30


@pytest.mark.parametrize(
    "status, kind, message",
    [
        (404, FileNotFoundError, "check the repository"),
        (410, FileNotFoundError, "410"),
        (401, ValueError, "HF_TOKEN"),
        (403, ValueError, "accept its terms"),
        (400, ValueError, "400"),
    ],
)
def test_answers_that_stay_fail_at_once(server, connection, waits, tmp_path, status, kind, message):
    server.moods["a.parquet"] = [(status, {})]
    with pytest.raises(kind, match=message) as caught:
        fetch(f"{server.url}/a.parquet", tmp_path / "a.parquet", connection)
    assert (len(server.requests), waits, list(tmp_path.iterdir())) == (1, [], []) and "\n" not in str(
        caught.value
    )


@pytest.mark.parametrize("mood", ["truncated", (503, {})], ids=str)
def test_five_attempts_and_never_taken_for_data(server, connection, waits, tmp_path, mood):
    server.moods["a.parquet"] = [mood] * 9
    with pytest.raises(ConnectionError, match="attempt 5 of 5") as caught:
        fetch(f"{server.url}/a.parquet", tmp_path / "a.parquet", connection)
    assert (len(server.requests), waits) == (5, [1, 2, 4, 8]) and not (tmp_path / "a.parquet").exists()
    assert (tmp_path / "a.parquet.bad").exists() == (mood == "truncated")
    assert ("is kept" in str(caught.value)) == (tmp_path / "a.parquet.part").exists()
    fetch(f"{server.url}/a.parquet", tmp_path / "a.parquet", replace(connection, attempts=9))
    assert {path.name for path in tmp_path.iterdir()} == {"a.parquet", "a.parquet.json"}


@pytest.mark.parametrize("kind", ["sha256", "md5"])
def test_checksums(server, connection, tmp_path, kind):
    content = FILES["a.parquet"]
    headers = {
        "sha256": {
            "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Linked-Size": len(content),
        },
        "md5": {"Content-MD5": b64encode(hashlib.md5(content).digest()).decode()},
    }[kind]
    server.extra["a.parquet"], server.moods["a.parquet"] = headers, ["garbled"]
    assert fetch(f"{server.url}/a.parquet", tmp_path / "a.parquet", connection).path.read_bytes() == content
    assert not (tmp_path / "a.parquet.bad").exists() and len(server.requests) == 2
    server.moods["b.parquet"], server.extra["b.parquet"] = [], headers
    with pytest.raises(
        ConnectionError, match=f"{kind} is not" if kind == "md5" else "bytes instead of|sha256 is not"
    ):
        fetch(f"{server.url}/b.parquet", tmp_path / "b.parquet", connection)


def test_the_checksum_of_a_resumed_file(server, connection, tmp_path):
    content = FILES["a.parquet"]
    server.extra["a.parquet"] = {"X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"'}
    server.moods["a.parquet"] = ["cut", "garbled", "cut"]
    assert fetch(f"{server.url}/a.parquet", tmp_path / "a.parquet", connection).path.read_bytes() == content
    assert len(server.requests) == 4


def test_complete_files_need_no_server(server, connection, tmp_path):
    urls = [f"{server.url}/{name}" for name in FILES]
    first = download_all(urls, tmp_path, connection, quiet=True)
    server.shutdown()
    assert download_all(urls, tmp_path, Connection(attempts=1), quiet=True) == first


def test_files_without_a_note_are_compared_with_the_server(server, connection, tmp_path):
    (tmp_path / "a.parquet").write_bytes(FILES["a.parquet"])
    (tmp_path / "b.parquet").write_bytes(FILES["b.parquet"][:-1])
    sources = download_all(
        [f"{server.url}/{name}.parquet" for name in "ab"], tmp_path, connection, quiet=True
    )
    assert all(source.path.read_bytes() == FILES[source.path.name] for source in sources)
    assert (tmp_path / "b.parquet.old").exists() and not (tmp_path / "a.parquet.old").exists()


def test_a_file_of_another_address_is_set_aside(server, connection, tmp_path):
    fetch(f"{server.url}/a.parquet", tmp_path / "a.parquet", connection)
    server.files["other/a.parquet"] = FILES["b.parquet"]
    fetch(f"{server.url}/other/a.parquet", tmp_path / "a.parquet", connection)
    assert (tmp_path / "a.parquet").read_bytes() == FILES["b.parquet"]
    assert (tmp_path / "a.parquet.old").read_bytes() == FILES["a.parquet"]


@pytest.mark.parametrize(
    "change, kept",
    [("nothing", True), ("content", False), ("size", False), ("weak", False), ("damaged", False)],
)
def test_a_renewed_signature_fetches_nothing_that_is_here(server, connection, tmp_path, change, kept):
    path, content = tmp_path / "a.parquet", FILES["a.parquet"]
    etags = ['W/"1"'] * 2 if change == "weak" else ['"1"', '"2"' if change == "content" else '"1"']
    for number, etag in enumerate(etags):
        name = f"a.parquet?sig={number}"
        server.files[name], server.extra[name] = NEWER if number and change == "size" else content, {
            "ETag": etag
        }
    fetch(f"{server.url}/a.parquet?sig=0", path, connection)
    if change == "damaged":
        path.write_bytes(content[:-9] + b"?" + content[-8:])
    before = path.stat().st_ino
    source = fetch(f"{server.url}/a.parquet?sig=1", path, connection)
    assert path.read_bytes() == (NEWER if change == "size" else content) and source.url.endswith("sig=1")
    assert (path.stat().st_ino == before) == kept != (tmp_path / "a.parquet.old").exists()
    server.requests.clear()
    assert fetch(f"{server.url}/a.parquet?sig=1", path, connection) == source and not server.requests


def test_what_a_note_and_an_error_hold_of_an_address(server, tmp_path):
    server.files["a.parquet?sig=s3cret"] = FILES["a.parquet"]
    hasty = Connection(endpoint=server.url, sleep=lambda seconds: None)
    fetch(f"{server.url}/a.parquet?sig=s3cret", tmp_path / "a.parquet", hasty)
    assert all("s3cret" not in path.read_text(errors="replace") for path in tmp_path.iterdir())
    server.moods["b.parquet?sig=s3cret"] = [(302, {"Location": "http://127.0.0.1:9/b?sig=s3cret"})] * 9
    with pytest.raises(ConnectionError, match="refused") as caught:
        fetch(f"{server.url}/b.parquet?sig=s3cret", tmp_path / "b.parquet", hasty)
    assert "s3cret" not in "".join(traceback.format_exception(caught.type, caught.value, None))


def test_the_token_is_sent_to_the_hub_alone(server, tmp_path):
    connection = Connection(endpoint=server.url, token="hf_secret", sleep=lambda seconds: None)
    with MoodyServer(FILES) as store:
        elsewhere = store.url.replace("127.0.0.1", "localhost")
        sha256 = hashlib.sha256(FILES["a.parquet"]).hexdigest()
        headers = {
            "Location": f"{elsewhere}/a.parquet",
            "X-Linked-Etag": f'"{sha256}"',
            "X-Linked-Size": len(FILES["a.parquet"]),
        }
        server.moods["a.parquet"] = [(302, headers), (302, headers)]
        store.moods["a.parquet"] = ["cut"]
        fetch(f"{server.url}/a.parquet", tmp_path / "a.parquet", connection)
        fetch(f"{elsewhere}/b.parquet", tmp_path / "b.parquet", connection)
        assert {token for *_, token in server.requests} == {"Bearer hf_secret"}
        assert {token for *_, token in store.requests} == {None}
        assert store.requests[1][1].startswith("bytes=")  # resumed through the redirect
        assert json.loads((tmp_path / "a.parquet.json").read_text())["sha256"] == sha256


def test_the_first_failure_stops_the_others(server, connection, tmp_path):
    server.pause = 0.02
    urls = [f"{server.url}/{name}" for name in ("a.parquet", "missing.parquet", "b.parquet", "c.parquet")]
    with pytest.raises(FileNotFoundError, match="missing.parquet"):
        download_all(urls, tmp_path, connection, workers=2, quiet=True)
    assert len(server.requests) <= 3


def test_no_server_at_all(waits, tmp_path):
    connection = Connection(sleep=waits.append)
    with pytest.raises(ConnectionError, match="refused") as caught:
        fetch("http://127.0.0.1:9/a.parquet", tmp_path / "a.parquet", connection)
    assert len(waits) == 4 and len(str(caught.value)) < 200


PROGRAM = """
import sys
from musekit.shards.download import Connection, download_all
download_all(sys.argv[2:], sys.argv[1], Connection(), workers=2, quiet=True)
"""


def test_killed_downloads_go_on(server, tmp_path):
    server.pause = 0.02
    urls = [f"{server.url}/{name}" for name in FILES]
    for kill in range(4):
        with subprocess.Popen([sys.executable, "-c", PROGRAM, tmp_path, *urls]) as process:
            before = len(server.requests)
            while len(server.requests) == before and process.poll() is None:
                time.sleep(0.01)
            time.sleep(0.15 + 0.1 * kill)
            process.kill()
        for path in tmp_path.glob("*.parquet"):
            assert path.read_bytes() == FILES[path.name]
    server.pause = 0
    download_all(urls, tmp_path, Connection(), quiet=True)
    assert all((tmp_path / name).read_bytes() == content for name, content in FILES.items())
    assert any(requested for requested in ranges(server)), "no part was used"


def test_a_full_disk_keeps_the_part(server, tmp_path):
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))"
    command = [sys.executable, "-c", limited + PROGRAM, tmp_path, f"{server.url}/a.parquet"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 1 and "File too large" in process.stderr.splitlines()[-1], process.stderr
    assert 400_000 < (tmp_path / "a.parquet.part").stat().st_size <= 500_000
    assert not (tmp_path / "a.parquet").exists()
    download_all([f"{server.url}/a.parquet"], tmp_path, Connection(), quiet=True)
    assert (tmp_path / "a.parquet").read_bytes() == FILES["a.parquet"]
