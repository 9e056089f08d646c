"""A web server of Parquet files that misbehaves on demand."""
import hashlib
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Moody(ThreadingHTTPServer):
    """Serves `files` {path: bytes}. Each GET of a path uses up the next of its `moods`; with none left it behaves.

    A mood is a status with headers, as (503, {}), or one of: cut, page, no ranges, newer, garbled, truncated, promise more,
    (redirect, address), slow. `asked` holds (path, Range, Authorization) of every request, `sent` the bytes of every body.
    """

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.moods, self.asked, self.newer, self.pause, self.extra = dict(files), {}, [], {}, 0.0, {}
        self.sent = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *told):
        pass

    def handle(self):
        with suppress(ConnectionError):
            super().handle()

    def do_GET(self):
        server, path = self.server, self.path.lstrip("/")
        moods = server.moods.get(path) or ["good"]
        mood = moods.pop(0)
        server.asked.append((path, self.headers.get("Range"), self.headers.get("Authorization")))
        if mood == "newer":
            server.files[path] = server.newer[path]
        content = server.files.get(path)
        if isinstance(mood, tuple):
            return self.reply(mood[0], mood[1])
        if content is None:
            return self.reply(404, {})
        if mood == "page":
            return self.reply(200, {"Content-Type": "text/html"}, b"<!DOCTYPE html><p>Please log in.")
        etag = f'"{hashlib.md5(content[:4096] + content[-4096:]).hexdigest()}"'  # large files are asked for often
        asked = self.headers.get("Range") if mood != "no ranges" else None
        if asked and self.headers.get("If-Range") not in (None, etag):
            asked = None
        start, _, stop = (asked or "bytes=0-")[6:].partition("-")
        start, stop = int(start), min(int(stop or len(content)) + 1, len(content))
        if asked and start >= len(content):
            return self.reply(416, {"Content-Range": f"bytes */{len(content)}"})
        headers = {"ETag": etag, **server.extra.get(path, {})}
        headers |= {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"} if asked else {}
        body = content[start:stop]
        if mood == "garbled":
            body = body[: len(body) // 2] + b"?" + body[len(body) // 2 + 1 :]
        if mood == "truncated":
            body = body[:-100]
        self.reply(206 if asked else 200, headers, body, mood)

    def reply(self, status, headers, body=b"", mood="good"):
        self.send_response(status)
        length = len(body) + (1000 if mood == "promise more" else 0)
        for name, value in ({"Content-Length": length} | headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.server.sent.append(len(body))
        pause, piece = (0.002, 4000) if mood == "slow" else (self.server.pause, 1 << 15)
        for start in range(0, len(body) // 2 if mood == "cut" else len(body), piece):
            if pause:
                time.sleep(pause)
            self.wfile.write(body[start : start + piece])
        self.close_connection = mood in ("cut", "promise more")


@contextmanager
def serving(files):
    """A running server; it stops at the end of the block."""
    server = Moody(files)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
