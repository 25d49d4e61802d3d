"""A local stand-in for Google Cloud Storage: the part of its JSON API that gcsfs, TensorStore and its own SDK speak.

All three take the server's address from their own variables (`Bucket.env`), so a run goes the whole way that it goes to
a real bucket, but for credentials and TLS. Objects are held in memory, each with the generation that its write got.
"""

import contextlib
import dataclasses
import datetime
import email.parser
import http.server
import json
import re
import threading
import urllib.parse


@dataclasses.dataclass(frozen=True)
class Object:
    """An object's bytes; `generation` counts the writes of the whole server."""

    data: bytes
    generation: int
    updated: str


class Bucket:
    """The server. `objects`: {name: Object} of its one bucket; `requests`: (method, path) of each; `refuse`: a regular
    expression of "METHOD path" that is answered with 403."""

    name = "bucket"

    def __init__(self):
        self.objects: dict[str, Object] = {}
        self.requests: list[tuple[str, str]] = []
        self.refuse = ""
        self.uploads: dict[str, str] = {}  # id of a resumable upload -> object
        self.parts: dict[str, bytes] = {}
        self.writes = 0
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"bucket": self})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # a reader that hangs up early
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    @property
    def env(self) -> dict[str, str]:
        """Variables that send gcsfs, TensorStore and Google's SDK here."""
        return {
            "STORAGE_EMULATOR_HOST": self.url, "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none", "NO_GCE_CHECK": "true",
            "FSSPEC_GS": '{"token": "anon"}',
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it would ask Google itself what kind of bucket it is
        }  # fmt: skip

    def text(self, name: str) -> str:
        """An object's text."""
        return self.objects[name].data.decode()

    def put(self, name: str, data: bytes, match: str | None = None) -> Object | None:
        """Writes an object; `match`: the generation that it must have now (0: it must not be there), else None comes
        back."""
        with self.lock:
            now = self.objects.get(name)
            if match is not None and int(match) != (now.generation if now else 0):
                return None
            self.writes += 1
            updated = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
            self.objects[name] = Object(data, self.writes, updated)
            return self.objects[name]


@contextlib.contextmanager
def serving():
    """A `Bucket` that answers until the end of the block."""
    bucket = Bucket()
    thread = threading.Thread(target=bucket.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield bucket
    finally:
        bucket.server.shutdown()
        bucket.server.server_close()
        thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    bucket: Bucket

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.bucket.requests.append((self.command, self.path))
        if self.bucket.refuse and re.search(self.bucket.refuse, f"{self.command} {urllib.parse.unquote(self.path)}"):
            return self.send(403, {"error": {"code": 403, "message": "no permission"}})
        if self.path.startswith("/batch/"):
            return self.batch(body)
        status, value, headers = self.one(self.command, self.path, self.headers, body)
        return self.send(status, value, headers)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = answer

    def one(self, method, target, headers, body):
        """(status, JSON or bytes, headers) of one request."""
        path, _, query = target.partition("?")
        query = {k: v[-1] for k, v in urllib.parse.parse_qs(query, keep_blank_values=True).items()}
        with self.bucket.lock:
            if path.startswith("/upload/"):
                return self.upload(method, query, headers, body)
            found = re.fullmatch(r"(?:/download)?/storage/v1/b/[^/]+(/o(?:/(.+))?)?/?", path)
            if not found:
                return 404, {"error": {"code": 404, "message": f"no such path {path}"}}, {}
            if not found[1]:
                return 200, {"kind": "storage#bucket", "name": self.bucket.name, "storageClass": "STANDARD"}, {}
            if not found[2]:
                return 200, self.listing(query), {}
                copy = re.fullmatch(r"([^/]+)/(rewriteTo|copyTo|moveTo)(?:/b/[^/]+)?/o/([^/]+)", found[2])
            copy = re.fullmatch(r"([^/]+)/(rewriteTo|copyTo|moveTo)(?:/b/[^/]+)?/o/([^/]+)", found[2])
            if copy:
                source, target = urllib.parse.unquote(copy[1]), urllib.parse.unquote(copy[3])
                if source not in self.bucket.objects:
                    return 404, {"error": {"code": 404, "message": source}}, {}
                self.bucket.put(target, self.bucket.objects[source].data)
                if copy[2] == "moveTo":
                    del self.bucket.objects[source]
                    return 200, self.resource(target), {}
                return 200, {"done": True, "resource": self.resource(target)}, {}
            return self.of_object(method, urllib.parse.unquote(found[2]), query, headers)

    def of_object(self, method, name, query, headers):
        have = self.bucket.objects.get(name)
        if have is None:
            return 404, {"error": {"code": 404, "message": f"No such object: {name}"}}, {}
        if query.get("ifGenerationMatch", str(have.generation)) != str(have.generation):
            return 412, {"error": {"code": 412, "message": "conditionNotMet"}}, {}
        if method == "DELETE":
            del self.bucket.objects[name]
            return 204, b"", {}
        if query.get("alt") != "media":
            return 200, self.resource(name), {}
        told = {"x-goog-generation": str(have.generation), "ETag": f'"{have.generation}"'}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("Range", ""))
        if not wanted:
            return 200, have.data, told
        first, last = int(wanted[1]), min(int(wanted[2] or len(have.data)), len(have.data) - 1)
        if first > last:
            return 416, b"", told
        told["Content-Range"] = f"bytes {first}-{last}/{len(have.data)}"
        return 206, have.data[first : last + 1], told

    def upload(self, method, query, headers, body):
        name, kind, match = query.get("name", ""), query.get("uploadType"), query.get("ifGenerationMatch")
        if "upload_id" in query:
            return self.resumable(query["upload_id"], headers, body)
        if kind == "resumable":
            key = f"{len(self.bucket.uploads)}"
            name = name or json.loads(body)["name"]
            if match is not None and int(match) != getattr(self.bucket.objects.get(name), "generation", 0):
                return 412, {"error": {"code": 412, "message": "conditionNotMet"}}, {}
            self.bucket.uploads[key], self.bucket.parts[key] = name, b""
            return 200, {}, {"Location": f"{self.bucket.url}/upload/storage/v1/b/x/o?upload_id={key}"}
        if kind == "multipart":
            mark = re.search(r"boundary=['\"]?([^'\";]+)", headers["Content-Type"])[1].encode()
            about, data = body.split(b"--" + mark)[1:3]
            name = (
                name or json.loads(about.strip().split(b"\n\n" if b"\r\n\r\n" not in about else b"\r\n\r\n")[1])["name"]
            )
            body = re.split(rb"\r?\n\r?\n", data, maxsplit=1)[1]
            body = body[:-2] if body.endswith(b"\r\n") else body[:-1]
        if self.bucket.put(name, body, match) is None:
            return 412, {"error": {"code": 412, "message": "conditionNotMet"}}, {}
        return 200, self.resource(name), {}

    def resumable(self, key, headers, body):
        """A part of an upload: "bytes 0-9/20", "bytes 0-9/*", or "bytes */20" to ask or to end it."""
        parts = self.bucket.parts
        parts[key] += body
        total = headers.get("Content-Range", f"bytes */{len(body)}").rpartition("/")[2]
        if total == "*" or int(total) > len(parts[key]):
            return 308, b"", {"Range": f"bytes=0-{len(parts[key]) - 1}"} if parts[key] else {}
        name = self.bucket.uploads.pop(key)
        self.bucket.put(name, parts.pop(key))
        return 200, self.resource(name), {}

    def listing(self, query):
        prefix, mark = query.get("prefix", ""), query.get("delimiter", "")
        items, prefixes = [], set()
        for name in sorted(self.bucket.objects):
            if not name.startswith(prefix) or name < query.get("startOffset", ""):
                continue
            if query.get("endOffset") and name >= query["endOffset"]:
                continue
            rest = name[len(prefix) :]
            if mark and mark in rest:
                prefixes.add(prefix + rest.split(mark)[0] + mark)
            else:
                items.append(self.resource(name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}

    def resource(self, name):
        o = self.bucket.objects[name]
        return {
            "kind": "storage#object", "name": name, "bucket": self.bucket.name, "size": str(len(o.data)),
            "generation": str(o.generation), "metageneration": "1", "updated": o.updated, "timeCreated": o.updated,
            "storageClass": "STANDARD", "contentType": "application/octet-stream",
        }  # fmt: skip

    def batch(self, body):
        """Several requests in one, as gcsfs deletes."""
        mark = re.search(r"boundary=['\"]?([^'\";]+)", self.headers["Content-Type"])[1].encode()
        answers = []
        for part in body.split(b"--" + mark)[1:-1]:
            inner = re.split(rb"\r?\n\r?\n", part.strip(), maxsplit=1)[1].decode()
            line, _, rest = inner.partition("\n")
            method, target = line.split()[:2]
            headers = email.parser.Parser().parsestr(rest, headersonly=True)
            status, value, _ = self.one(method, target, headers, b"")
            text = value if isinstance(value, bytes) else json.dumps(value).encode()
            head = f"Content-Type: application/http\r\n\r\nHTTP/1.1 {status} X\r\nContent-Type: application/json\r\n"
            answers.append(f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text + b"\r\n")
        joined = b"".join(b"--batch_x\r\n" + a for a in answers) + b"--batch_x--\r\n"
        return self.send(200, joined, {"Content-Type": "multipart/mixed; boundary=batch_x"})

    def send(self, status, value, headers=None):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(value, bytes) else "application/json"
        for key, text in {"Content-Type": kind, **(headers or {})}.items():
            self.send_header(key, text)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if status not in (204, 304):
            self.wfile.write(data)

    def log_message(self, *args):
        """Nothing at the terminal."""
