"""A small hub on this machine: the part of the Hugging Face Hub's protocol that downloads and uploads use."""
import base64
import hashlib
import json
import re
from urllib.parse import parse_qs, unquote, urlsplit

from file_server import FileHandler, FileServer, content_range


class Hub(FileServer):
    "Repositories of models or of datasets as {id: {revision: {path: bytes}}}."

    def __init__(self, repositories, kind="models", handler=None):
        self.repositories, self.kind = repositories, kind
        super().__init__(handler or Handler)


class Handler(FileHandler):
    protocol_version = "HTTP/1.0"

    def log_message(self, *_):
        self.server.requests.append(f"{self.command} {unquote(self.path)}")

    def do_HEAD(self):
        self.respond()

    def respond(self):
        path = unquote(urlsplit(self.path).path)
        listed = re.fullmatch(
            rf"/api/{self.server.kind}/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/(.*))?)?", path
        )
        wanted = re.fullmatch(r"/(?:datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if listed:
            files = self.find(listed[1], listed[3] or "main")
            if files is not None:
                whole = listed[2] != "tree"
                deep = "recursive=true" in urlsplit(self.path).query.lower()
                self.answer(
                    describe(listed[1], files) if whole else list(describe_tree(files, listed[4] or "", deep))
                )
        elif wanted:
            self.send_file(wanted[1], wanted[2], wanted[3])
        else:
            self.fail("EntryNotFound")

    def do_POST(self):
        path, body = unquote(self.path), self.rfile.read(int(self.headers["Content-Length"]))
        paths_info = re.fullmatch(
            rf"/api/{self.server.kind}/([^/]+/[^/]+)/paths-info/([^/]+)", urlsplit(path).path
        )
        upload = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/([^/?]+)", urlsplit(path).path)
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            if name.startswith("locked/"):
                return self.answer({"error": "you may not create this"}, 403)
            self.server.repositories.setdefault(name, {"main": {}})
            self.answer({"name": name, "url": f"{self.server.url}/{name}"})
        elif paths_info:
            files = self.find(paths_info[1], paths_info[2])
            if files is not None:
                self.answer(
                    [each for name in parse_qs(body.decode())["paths"] for each in describe_path(name, files)]
                )
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif upload and upload[2] == "preupload":
            modes = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": modes})
        elif upload:
            files = self.server.repositories[upload[1]].setdefault(upload[3], {})
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commit = sha(files)
            self.answer({
                "success": True,
                "commitOid": commit,
                "commitUrl": f"{self.server.url}/{upload[1]}/commit/{commit}",
            })
        else:
            self.fail("EntryNotFound")

    def find(self, repository, revision):
        revisions = self.server.repositories.get(repository)
        if revisions is None:
            return self.fail("RepoNotFound")
        commits = revisions | {sha(files): files for files in revisions.values()}
        return commits[revision] if revision in commits else self.fail("RevisionNotFound")

    def send_file(self, repository, revision, name):
        files = self.find(repository, revision)
        if files is None:
            return
        if name not in files:
            return self.fail("EntryNotFound", sha(files))
        headers = {"X-Repo-Commit": sha(files), "ETag": f'"{hashlib.sha1(files[name]).hexdigest()}"'}
        self.send_bytes(files[name], headers)

    def send_bytes(self, content, headers):
        start, stop = self.byte_range(len(content))
        ranged = "Range" in self.headers
        headers = headers | content_range(start, stop, len(content)) if ranged else headers
        self.answer(content[start:stop], 206 if ranged else 200, **headers)

    def answer(self, content, status=200, **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        body = b"" if self.command == "HEAD" else content
        self.reply(status, body, headers, len(content))

    def fail(self, code, commit=None):
        self.answer(
            {"error": code}, 404, **{"X-Error-Code": code} | ({"X-Repo-Commit": commit} if commit else {})
        )


def sha(files):
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


def describe_file(name, content):
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


def describe_tree(files, folder, deep):
    "Files and folders in a folder, with `deep` those in its folders, too."
    inside = [name for name in files if name.startswith(f"{folder}/" if folder else "")]
    folders = {name.rsplit("/", depth)[0] for name in inside for depth in range(1, name.count("/") + 1)}
    for name in sorted({*inside, *folders} - {folder}):
        rest = name[len(folder) + 1 :] if folder else name
        if name.startswith(f"{folder}/" if folder else "") and (deep or "/" not in rest):
            yield from describe_path(name, files)


def describe_path(name, files):
    "A file, or a folder of files, or nothing."
    if name in files:
        yield describe_file(name, files[name])
    elif any(file.startswith(f"{name}/") for file in files):
        yield {"type": "directory", "path": name, "size": 0, "oid": "0" * 40}


def describe(name, files):
    return {
        "id": name,
        "modelId": name,
        "sha": sha(files),
        "private": False,
        "tags": [],
        "downloads": 0,
        "likes": 0,
        "siblings": [{"rfilename": file} for file in files],
    }
