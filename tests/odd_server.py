"""A web server that answers as no server should: a table of behaviours, each tried on the readers of the shards."""
import gzip
import hashlib
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PIECE = 60_000  # bytes that a server sends of what it promises, where it does not send all


class Odd(ThreadingHTTPServer):
    """Answers every GET by the behaviour whose name its path begins with; `sent` counts the bytes of bodies, `asked` holds headers."""

    def __init__(self, content):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.sent, self.asked = content, 0, []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *arguments):
        pass

    def handle(self):
        with suppress(ConnectionError):
            super().handle()

    def do_GET(self):
        name = self.path.strip("/").partition("/")[0]
        self.server.asked.append(dict(self.headers))
        content = self.server.content
        start, _, last = self.headers.get("Range", "bytes=0-")[6:].partition("-")
        start, stop = int(start), min(len(content), int(last or len(content)) + 1)
        ranged = "Range" in self.headers
        if start >= len(content):
            return self.reply(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        BEHAVIOURS[name](self, content, start, stop, ranged)

    def reply(self, status, body=b"", headers=None, length=True, close=False):
        self.send_response(status)
        for key, value in ({"Content-Length": len(body)} if length is True else {"Content-Length": length} if length else {}).items():
            self.send_header(key, str(value))
        for key, value in ({"ETag": self.etag} | (headers or {})).items():
            if value is not None:
                self.send_header(key, value)
        self.end_headers()
        self.write(body)
        self.close_connection = close or not length

    def write(self, body):
        for at in range(0, len(body), 1 << 14):
            self.server.sent += len(body[at : at + (1 << 14)])
            self.wfile.write(body[at : at + (1 << 14)])

    @property
    def etag(self):
        return f'"{hashlib.md5(self.server.content).hexdigest()}"'

    def good(self, content, start, stop, ranged, **options):
        part = {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"} if ranged else {}
        headers = part | options.pop("headers", {})
        self.reply(206 if ranged else 200, content[start:stop], headers, **options)


def broken(self, content, start, stop, ranged, share=PIECE, headers=None, **options):
    """Promises all of it and closes after a part."""
    body = content[start : min(stop, start + share)]
    part = {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"} if ranged else {}
    self.reply(206 if ranged else 200, body, part | (headers or {}), length=stop - start, close=True, **options)


def eighths(self, content, start, stop, ranged):
    broken(self, content, start, stop, ranged, max(len(content) // 8, 4))


def stingy(self, content, start, stop, ranged):
    """Says honestly that it sends less than was asked for, of plain requests too."""
    self.good(content, start, min(stop, start + PIECE), True)


def anonymous(self, content, start, stop, ranged):
    """Breaks, and tells no version."""
    broken(self, content, start, stop, ranged, headers={"ETag": None})


def weak(self, content, start, stop, ranged):
    broken(self, content, start, stop, ranged, headers={"ETag": 'W/"1"'})


def dated(self, content, start, stop, ranged):
    known = self.headers.get("If-Range") in (None, "Fri, 01 Jan 2021 00:00:00 GMT")
    dates = {"ETag": None, "Last-Modified": "Fri, 01 Jan 2021 00:00:00 GMT"}
    broken(self, content, start if known else 0, stop, ranged and known, headers=dates)


def empty(self, content, start, stop, ranged):
    broken(self, content, start, stop, ranged, 0)


def nothing(self, content, start, stop, ranged):
    """A part of no bytes, honestly."""
    self.reply(206, b"", {"Content-Range": f"bytes {start}-{start - 1}/{len(content)}"})


def shifted(self, content, start, stop, ranged):
    """Another part than was asked for, after a first answer that broke."""
    if not ranged:
        return broken(self, content, start, stop, ranged) if not self.server.asked[1:] else self.good(content, 0, len(content), False)
    self.good(content, start + 7, stop + 7, True)


def earlier(self, content, start, stop, ranged):
    """More than was asked for, from a thousand bytes before to a thousand after, once a first answer has broken."""
    if not ranged:
        return broken(self, content, start, stop, ranged)
    self.good(content, max(0, start - 1000), min(len(content), stop + 1000), True)


def unclear(value):
    def behave(self, content, start, stop, ranged):
        if not ranged:
            return broken(self, content, start, stop, ranged) if not self.server.asked[1:] else self.good(content, 0, len(content), False)
        told = value and value.format(start=start, last=stop - 1, size=len(content), length=stop - start)
        self.reply(206, content[start:stop], {"Content-Range": told})

    return behave


def always_a_part(value):
    def behave(self, content, start, stop, ranged):
        told = value and value.format(start=start, last=stop - 1, size=len(content))
        self.reply(206, content[start:stop], {"Content-Range": told})

    return behave


def multipart(self, content, start, stop, ranged):
    if not ranged:
        return broken(self, content, start, stop, ranged) if not self.server.asked[1:] else self.good(content, 0, len(content), False)
    head = f"--x\r\nContent-Range: bytes {start}-{stop - 1}/{len(content)}\r\n\r\n".encode()
    self.reply(206, head + content[start:stop] + b"\r\n--x--", {"Content-Type": "multipart/byteranges; boundary=x"})


def no_length(self, content, start, stop, ranged):
    self.good(content, start, stop, ranged, length=None)


def chunked(self, content, start, stop, ranged, sent=None):
    part = {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"} if ranged else {}
    self.reply(206 if ranged else 200, b"", part | {"Transfer-Encoding": "chunked"}, length=None, close=sent is not None)
    self.close_connection = sent is not None
    body = content[start:stop][:sent]
    for at in range(0, len(body), 5000):
        piece = body[at : at + 5000]
        self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
    if sent is None:
        self.wfile.write(b"0\r\n\r\n")


def chunked_and_broken(self, content, start, stop, ranged):
    chunked(self, content, start, stop, ranged, PIECE)


def zipped(self, content, start, stop, ranged):
    body = gzip.compress(content)
    part = {"Content-Range": f"bytes {start}-{min(stop, len(body)) - 1}/{len(body)}"} if ranged else {}
    self.reply(206 if ranged else 200, body[start:stop], part | {"Content-Encoding": "gzip"})


def whole(self, content, start, stop, ranged):
    """Knows no ranges, and breaks the first time."""
    broken(self, content, 0, len(content), False) if len(self.server.asked) == 1 and not ranged else self.good(content, 0, len(content), False)


def whole_as_a_part(self, content, start, stop, ranged):
    self.reply(206, content, {"Content-Range": f"bytes 0-{len(content) - 1}/{len(content)}"})


def no_such_part(self, content, start, stop, ranged):
    if not ranged:
        return broken(self, content, start, stop, ranged) if not self.server.asked[1:] else self.good(content, 0, len(content), False)
    self.reply(416, b"", {"Content-Range": None})


def more_than_promised(self, content, start, stop, ranged):
    """Says it sends a thousand bytes more, sends none of them, and keeps the connection open."""
    part = {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"} if ranged else {}
    self.reply(206 if ranged else 200, content[start:stop], part, length=stop - start + (1000 if ranged else 0), close=not ranged)
    if ranged:
        time.sleep(0.3)


def failing(status, headers=None, size=1 << 26):
    def behave(self, content, start, stop, ranged):
        self.reply(status, bytes(size), headers)

    return behave


def page(status=200, start=b"<!DOCTYPE html><p>Please log in"):
    def behave(self, content, first, stop, ranged):
        part = {"Content-Range": f"bytes {first}-{stop - 1}/{len(content)}"} if status == 206 else {}
        body = (start + bytes(len(content)))[first:stop] if status == 206 else start * 1000
        self.reply(status, body, part | {"Content-Type": "text/html"})

    return behave


def circle(self, content, start, stop, ranged):
    self.reply(302, b"", {"Location": self.path})


def endless(self, content, start, stop, ranged):
    """Leads elsewhere, and never ends telling so."""
    if self.path.endswith("/there"):
        return self.good(content, start, stop, ranged)
    self.reply(302, b"", {"Location": f"{self.path}/there"}, length=None)
    for _ in range(4000):
        self.write(bytes(1 << 16))


def lost(location):
    def behave(self, content, start, stop, ranged):
        self.reply(302, b"", {"Location": location})

    return behave


def slow(self, content, start, stop, ranged):
    part = {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"} if ranged else {}
    self.reply(206 if ranged else 200, b"", part, length=stop - start)
    self.close_connection = False
    for at in range(start, stop, 3000):
        time.sleep(0.001)
        self.write(content[at : min(stop, at + 3000)])


def changing(self, content, start, stop, ranged):
    """Another version with every answer, each of which breaks."""
    version = len(self.server.asked)
    known = self.headers.get("If-Range") in (None, f'"{version}"')
    broken(self, content, start if known else 0, stop, ranged and known, headers={"ETag": f'"{version}"'})


def changing_size(self, content, start, stop, ranged):
    content = content + b"?" * len(self.server.asked)
    broken(self, content, start, stop, ranged, headers={"ETag": None})


BEHAVIOURS = {
    "good": Handler.good, "broken": broken, "eighths": eighths, "stingy": stingy, "anonymous": anonymous, "weak": weak, "dated": dated,
    "empty": empty, "nothing": nothing, "shifted": shifted, "earlier": earlier,
    "star": unclear("bytes {start}-{last}/*"), "no-range": unclear(None), "words": unclear("bytes some-more/all"),
    "units": unclear("rows {start}-{last}/{size}"), "backwards": unclear("bytes {last}-{start}/{size}"),
    "beyond": unclear("bytes {start}-{last}/3"), "digits": unclear("bytes " + "9" * 5000 + "-1/2"),
    "always-a-part": always_a_part("bytes {start}-{last}/{size}"), "always-unclear": always_a_part(None),
    "always-star": always_a_part("bytes {start}-{last}/*"),
    "multipart": multipart, "no-length": no_length, "chunked": chunked, "chunked-broken": chunked_and_broken, "zipped": zipped,
    "whole": whole, "whole-as-a-part": whole_as_a_part, "no-such-part": no_such_part, "more": more_than_promised,
    "busy": failing(503), "missing": failing(404), "forbidden": failing(403), "teapot": failing(418), "strange": failing(999),
    "page": page(), "page-part": page(206), "pointer": page(200, b"version https://git-lfs.github.com/spec/v1\noid sha256:4665a5ea\n"),
    "json": page(200, b'{"error": "no such file"}'), "circle": circle, "endless": endless, "ftp": lost("ftp://a/b"), "bracket": lost("http://[::1"),
    "nowhere": lost("http://127.0.0.1:9/?sig=s3cret"), "slow": slow, "changing": changing, "changing-size": changing_size,
}


@contextmanager
def oddly_serving(content):
    """A running server of one file; it stops at the end of the block."""
    server = Odd(content)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
