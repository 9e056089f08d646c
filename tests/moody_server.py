"""A web server of Parquet files that misbehaves on demand."""
import hashlib

from file_server import FileHandler, FileServer, content_range


class MoodyServer(FileServer):
    """Serves `files` {path: bytes}. Each GET of a path uses up the next of its `moods`; with none left it
    behaves.

    A mood is a status with headers, as (503, {}), or one of: cut, eighth (broken off after a half, an
    eighth), page, no ranges, newer, garbled, truncated, promise more, slow. `requests` holds (path, Range,
    Authorization).
    """

    def __init__(self, files):
        self.files, self.moods, self.newer, self.pause, self.extra = dict(files), {}, {}, 0.0, {}
        super().__init__(MoodyHandler)


class MoodyHandler(FileHandler):
    def respond(self):
        server, path = self.server, self.path.lstrip("/")
        moods = server.moods.get(path)
        mood = moods.pop(0) if moods else "good"
        server.requests.append((path, self.headers.get("Range"), self.headers.get("Authorization")))
        if mood == "newer":
            server.files[path] = server.newer[path]
        content = server.files.get(path)
        if isinstance(mood, tuple):
            return self.reply(mood[0], headers=mood[1])
        if content is None:
            return self.reply(404)
        if mood == "page":
            return self.reply(200, b"<!DOCTYPE html><p>Please log in.", {"Content-Type": "text/html"})
        etag = (  # large files are requested often
            f'"{hashlib.md5(content[:4096] + content[-4096:]).hexdigest()}"'
        )
        ranged = (
            "Range" in self.headers and mood != "no ranges" and self.headers.get("If-Range") in (None, etag)
        )
        start, stop = self.byte_range(len(content)) if ranged else (0, len(content))
        if ranged and start >= len(content):
            return self.reply(416, headers={"Content-Range": f"bytes */{len(content)}"})
        headers = {"ETag": etag, **server.extra.get(path, {})}
        headers |= content_range(start, stop, len(content)) if ranged else {}
        self.send(206 if ranged else 200, content[start:stop], headers, mood)

    def send(self, status, body, headers, mood):
        if mood == "garbled":
            body = body[: len(body) // 2] + b"?" + body[len(body) // 2 + 1 :]
        if mood == "truncated":
            body = body[:-100]
        length = len(body) + (1000 if mood == "promise more" else 0)
        if mood in ("cut", "eighth"):
            body = body[: len(body) // (2 if mood == "cut" else 8)]
        pause, piece = (0.002, 4000) if mood == "slow" else (self.server.pause, 1 << 15)
        self.reply(status, body, headers, length, mood in ("cut", "eighth", "promise more"), pause, piece)
