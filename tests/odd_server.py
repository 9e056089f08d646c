"""A web server that answers as no server should: a table of behaviours, each tried on the readers of the
shards."""
import gzip
import hashlib
import time

from file_server import FileHandler, FileServer, content_range

PIECE = 60_000  # bytes that a server sends of what it promises, where it does not send all


class OddServer(FileServer):
    """Answers every GET of one file by the behaviour whose name its path begins with; `requests` holds
    headers."""

    def __init__(self, content):
        self.content = content
        super().__init__(OddHandler)


class OddHandler(FileHandler):
    def respond(self):
        name = self.path.strip("/").partition("/")[0]
        self.server.requests.append(dict(self.headers))
        content = self.server.content
        start, stop = self.byte_range(len(content))
        if start >= len(content):
            return self.reply(416, headers={"Content-Range": f"bytes */{len(content)}"})
        BEHAVIOURS[name](self, content, start, stop, "Range" in self.headers)

    def reply(self, status, body=b"", headers=None, **options):
        etag = f'"{hashlib.md5(self.server.content).hexdigest()}"'
        super().reply(status, body, {"ETag": etag} | (headers or {}), **options)

    def send(self, content, start, stop, ranged, headers=None, sent=None, **options):
        "Sends a part of the file, or of that only the first `sent` bytes."
        part = content_range(start, stop, len(content)) if ranged else {}
        self.reply(206 if ranged else 200, content[start:stop][:sent], part | (headers or {}), **options)


def good(self, content, start, stop, ranged):
    self.send(content, start, stop, ranged)


def broken_once(self, content):
    "Breaks the first time, and then sends all of the file, as one who does not support ranges."
    if len(self.server.requests) == 1:
        broken(self, content, 0, len(content), False)
    else:
        self.send(content, 0, len(content), False)


def broken(self, content, start, stop, ranged, share=PIECE, headers=None):
    """Promises all of it and closes after a part."""
    self.send(content, start, stop, ranged, headers, share, length=stop - start, close=True)


def eighths(self, content, start, stop, ranged):
    broken(self, content, start, stop, ranged, max(len(content) // 8, 4))


def stingy(self, content, start, stop, ranged):
    """Says honestly that it sends less than was asked for, of plain requests too."""
    self.send(content, start, min(stop, start + PIECE), True)


def anonymous(self, content, start, stop, ranged):
    """Breaks, and tells no version."""
    broken(self, content, start, stop, ranged, headers={"ETag": None})


def weak(self, content, start, stop, ranged):
    broken(self, content, start, stop, ranged, headers={"ETag": 'W/"1"'})


def dated(self, content, start, stop, ranged):
    same = self.headers.get("If-Range") in (None, "Fri, 01 Jan 2021 00:00:00 GMT")
    dates = {"ETag": None, "Last-Modified": "Fri, 01 Jan 2021 00:00:00 GMT"}
    broken(self, content, start if same else 0, stop, ranged and same, headers=dates)


def empty(self, content, start, stop, ranged):
    broken(self, content, start, stop, ranged, 0)


def nothing(self, content, start, stop, ranged):
    """A part of no bytes, honestly."""
    self.reply(206, b"", {"Content-Range": f"bytes {start}-{start - 1}/{len(content)}"})


def shifted(self, content, start, stop, ranged):
    """Another part than was asked for, after a first answer that broke."""
    if not ranged:
        return broken_once(self, content)
    self.send(content, start + 7, stop + 7, True)


def earlier(self, content, start, stop, ranged):
    """More than was asked for, from a thousand bytes before to a thousand after, once a first answer has
    broken."""
    if not ranged:
        return broken(self, content, start, stop, ranged)
    self.send(content, max(0, start - 1000), min(len(content), stop + 1000), True)


def unclear(value):
    def behave(self, content, start, stop, ranged):
        if not ranged:
            return broken_once(self, content)
        part = value and value.format(start=start, last=stop - 1, size=len(content), length=stop - start)
        self.reply(206, content[start:stop], {"Content-Range": part})

    return behave


def always_a_part(value):
    def behave(self, content, start, stop, ranged):
        part = value and value.format(start=start, last=stop - 1, size=len(content))
        self.reply(206, content[start:stop], {"Content-Range": part})

    return behave


def multipart(self, content, start, stop, ranged):
    if not ranged:
        return broken_once(self, content)
    head = f"--x\r\nContent-Range: bytes {start}-{stop - 1}/{len(content)}\r\n\r\n".encode()
    self.reply(
        206, head + content[start:stop] + b"\r\n--x--", {"Content-Type": "multipart/byteranges; boundary=x"}
    )


def no_length(self, content, start, stop, ranged):
    self.send(content, start, stop, ranged, {"Content-Length": None}, close=True)


def chunked(self, content, start, stop, ranged, sent=None):
    headers = {"Content-Length": None, "Transfer-Encoding": "chunked"}
    self.send(content, start, stop, ranged, headers, sent=0, close=sent is not None)
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
    self.send(body, start, min(stop, len(body)), ranged, {"Content-Encoding": "gzip"})


def whole(self, content, start, stop, ranged):
    """Supports no ranges, and breaks the first time."""
    (
        broken(self, content, 0, len(content), False)
        if len(self.server.requests) == 1 and not ranged
        else self.send(content, 0, len(content), False)
    )


def whole_as_a_part(self, content, start, stop, ranged):
    self.send(content, 0, len(content), True)


def no_such_part(self, content, start, stop, ranged):
    if not ranged:
        return broken_once(self, content)
    self.reply(416, b"", {"Content-Range": None})


def more_than_promised(self, content, start, stop, ranged):
    """Says it sends a thousand bytes more, sends none of them, and keeps the connection open."""
    self.send(content, start, stop, ranged, length=stop - start + (1000 if ranged else 0), close=not ranged)
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
        return self.send(content, start, stop, ranged)
    self.reply(302, b"", {"Location": f"{self.path}/there", "Content-Length": None}, close=True)
    for _ in range(4000):
        self.write(bytes(1 << 16))


def lost(location):
    def behave(self, content, start, stop, ranged):
        self.reply(302, b"", {"Location": location})

    return behave


def slow(self, content, start, stop, ranged):
    self.send(content, start, stop, ranged, pause=0.001, piece=3000)


def changing(self, content, start, stop, ranged):
    """Another version with every answer, each of which breaks."""
    version = len(self.server.requests)
    same = self.headers.get("If-Range") in (None, f'"{version}"')
    broken(self, content, start if same else 0, stop, ranged and same, headers={"ETag": f'"{version}"'})


def changing_size(self, content, start, stop, ranged):
    content = content + b"?" * len(self.server.requests)
    broken(self, content, start, stop, ranged, headers={"ETag": None})


BEHAVIOURS = {
    "good": good,
    "broken": broken,
    "eighths": eighths,
    "stingy": stingy,
    "anonymous": anonymous,
    "weak": weak,
    "dated": dated,
    "empty": empty,
    "nothing": nothing,
    "shifted": shifted,
    "earlier": earlier,
    "star": unclear("bytes {start}-{last}/*"),
    "no-range": unclear(None),
    "words": unclear("bytes some-more/all"),
    "units": unclear("rows {start}-{last}/{size}"),
    "backwards": unclear("bytes {last}-{start}/{size}"),
    "beyond": unclear("bytes {start}-{last}/3"),
    "digits": unclear("bytes " + "9" * 5000 + "-1/2"),
    "always-a-part": always_a_part("bytes {start}-{last}/{size}"),
    "always-unclear": always_a_part(None),
    "always-star": always_a_part("bytes {start}-{last}/*"),
    "multipart": multipart,
    "no-length": no_length,
    "chunked": chunked,
    "chunked-broken": chunked_and_broken,
    "zipped": zipped,
    "whole": whole,
    "whole-as-a-part": whole_as_a_part,
    "no-such-part": no_such_part,
    "more": more_than_promised,
    "busy": failing(503),
    "missing": failing(404),
    "forbidden": failing(403),
    "teapot": failing(418),
    "strange": failing(999),
    "page": page(),
    "page-part": page(206),
    "pointer": page(200, b"version https://git-lfs.github.com/spec/v1\noid sha256:4665a5ea\n"),
    "json": page(200, b'{"error": "no such file"}'),
    "circle": circle,
    "endless": endless,
    "ftp": lost("ftp://a/b"),
    "bracket": lost("http://[::1"),
    "nowhere": lost("http://127.0.0.1:9/?sig=s3cret"),
    "slow": slow,
    "changing": changing,
    "changing-size": changing_size,
}
