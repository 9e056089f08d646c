"""The frame of the test servers: a web server of files in a thread of its own, whose subclasses decide how
it misbehaves."""
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FileServer(ThreadingHTTPServer):
    """A running server; it stops at the end of a `with` block. `requests` lists what was requested, `sent`
    counts the bytes of bodies."""

    def __init__(self, handler):
        super().__init__(("127.0.0.1", 0), handler)
        self.requests, self.sent = [], 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        self.shutdown()
        self.server_close()
        self.thread.join()


class FileHandler(BaseHTTPRequestHandler):
    "Answers GET requests by `respond`, which subclasses define."

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def handle(self):
        with suppress(ConnectionError):  # the client may leave
            super().handle()

    def do_GET(self):
        self.respond()

    def byte_range(self, size):
        "(start, stop) that the Range header names in a file of `size` bytes."
        start, _, last = self.headers.get("Range", "bytes=0-")[6:].partition("-")
        return int(start), min(int(last or size) + 1, size)

    def reply(self, status, body=b"", headers=None, length=None, close=False, pause=0.0, piece=1 << 14):
        "Sends a response; `headers` may replace those that are set here, and None leaves one out."
        self.send_response(status)
        for name, value in (
            {"Content-Length": len(body) if length is None else length} | (headers or {})
        ).items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        self.write(body, pause, piece)
        self.close_connection |= close

    def write(self, body, pause=0.0, piece=1 << 14):
        for start in range(0, len(body), piece):
            if pause:
                time.sleep(pause)
            self.server.sent += len(body[start : start + piece])
            self.wfile.write(body[start : start + piece])


def content_range(start, stop, size):
    "The header of a part of a file."
    return {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}
