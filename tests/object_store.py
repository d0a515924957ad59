"""Google Cloud Storage on loopback: as much of its JSON API as gcsfs, array_record and TensorStore use, in memory."""

from __future__ import annotations

import base64
import json
import re
import sys
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


class ObjectStore:
    """Attributes:
    objects: content by "bucket/name"
    address: http://127.0.0.1:port
    """

    def __init__(self):
        self.objects: dict[str, bytes] = {}
        self.generations: dict[str, int] = {}
        self.uploads: dict[str, tuple[str, bytes]] = {}
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"store": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def environment(self) -> dict[str, str]:
        """What sends each client here instead of to Google."""
        return {
            "STORAGE_EMULATOR_HOST": self.address,  # gcsfs
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": self.address,  # array_record
            "TENSORSTORE_GCS_HTTP_URL": self.address,  # Orbax's TensorStore
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # would ask for the kind of bucket over gRPC
        }

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def put(self, key: str, content: bytes) -> dict:
        with self.lock:
            self.objects[key] = content
            self.generations[key] = self.generations.get(key, 0) + 1
            return self.describe(key)

    def describe(self, key: str) -> dict:
        bucket, _, name = key.partition("/")
        generation, content = str(self.generations[key]), self.objects[key]
        moment = f"2026-01-01T00:{self.generations[key] // 60 % 60:02d}:{self.generations[key] % 60:02d}.000Z"
        return {"kind": "storage#object", "id": key, "bucket": bucket, "name": name, "size": str(len(content)),
                "generation": generation, "metageneration": "1", "timeCreated": moment, "updated": moment,
                "crc32c": base64.b64encode(zlib.crc32(content).to_bytes(4, "big")).decode(),
                "etag": generation}  # fmt: skip


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """Clients hang up when they have what they need; anything else is a mistake here."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: ObjectStore

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        bucket, name, query = self._target()
        if bucket is None:
            return self._fail(404)
        key = f"{bucket}/{name}"
        with self.store.lock:
            if name is None:
                return self._answer(self._list(bucket, query) if query is not None else {"name": bucket})
            if key not in self.store.objects:
                return self._fail(404)
            if query.get("alt") == ["media"]:
                return self._media(self.store.objects[key], self.store.generations[key])
            return self._answer(self.store.describe(key))

    def do_POST(self):
        if re.match(r"/upload/u\d", self.path):
            return self.do_PUT()
        body = self._body()
        path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        if path == "/batch/storage/v1":
            return self._batch(body)
        object_path = r"/storage/v1/b/([^/]+)/o/([^/]+)"
        copied = re.fullmatch(object_path + r"/(?:(rewriteTo|copyTo)/b/([^/]+)|(moveTo))/o/([^/]+)", path)
        if copied:
            bucket, name, copy, to, move, new = (part and unquote(part) for part in copied.groups())
            with self.store.lock:
                if f"{bucket}/{name}" not in self.store.objects:
                    return self._fail(404)
                resource = self.store.put(f"{to or bucket}/{new}", self.store.objects[f"{bucket}/{name}"])
                if move:
                    del self.store.objects[f"{bucket}/{name}"]
            return self._answer({"done": True, "resource": resource} if copy == "rewriteTo" else resource)
        bucket = unquote(re.fullmatch(r"/upload/storage/v1/b/([^/]+)/o", path)[1])
        kind = query["uploadType"][0]
        if kind == "media":
            return self._put(bucket, query["name"][0], body, query)
        if kind == "multipart":
            boundary = re.search(r"boundary=['\"]?([^'\";]+)", self.headers["Content-Type"])[1].encode()
            parts = [part.partition(b"\n\n" if b"\r\n\r\n" not in part else b"\r\n\r\n")[2]
                     for part in body.split(b"--" + boundary)[1:-1]]  # fmt: skip
            described, content = json.loads(parts[0]), re.sub(rb"\r?\n\Z", b"", parts[1])
            return self._put(bucket, described["name"], content, query)
        name = json.loads(body)["name"] if body else query["name"][0]
        upload = f"u{len(self.store.uploads)}"
        self.store.uploads[upload] = (f"{bucket}/{name}", b"")
        self._answer({}, {"Location": f"{self.store.address}/upload/{upload}", "X-GUploader-UploadID": upload})

    def do_PUT(self):
        """A piece of a resumable upload; the last one says how long the whole is."""
        upload = re.match(r"/upload/(u\d+)", self.path)[1]
        key, before = self.store.uploads[upload]
        content = before + self._body()
        self.store.uploads[upload] = (key, content)
        if self.headers.get("Content-Range", "").endswith("/*"):
            return self._answer({}, {"Range": f"bytes=0-{len(content) - 1}"}, 308)
        self._answer(self.store.put(key, content))

    def do_DELETE(self):
        bucket, name, _ = self._target()
        with self.store.lock:
            if self.store.objects.pop(f"{bucket}/{name}", None) is None:
                return self._fail(404)
        self._answer(None, status=204)

    def _target(self):
        parts = urlsplit(self.path)
        found = re.fullmatch(r"(?:/download)?/storage/v1/b/([^/]+)(/o(?:/([^/]+))?)?", parts.path)
        if not found:
            return None, None, None
        query = parse_qs(parts.query) if found[2] else None
        return unquote(found[1]), found[3] and unquote(found[3]), query

    def _list(self, bucket: str, query: dict) -> dict:
        prefix, delimiter = (query.get(name, [""])[0] for name in ("prefix", "delimiter"))
        items, prefixes = [], set()
        for key in sorted(self.store.objects):
            name = key.removeprefix(f"{bucket}/")
            if name == key or not name.startswith(prefix):
                continue
            start = query.get("startOffset", query.get("startAfter", [""]))[0]
            end = query.get("endOffset", [""])[0]
            if name < start or (end and name >= end):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.partition(delimiter)[0] + delimiter)
            else:
                items.append(self.store.describe(key))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}

    def _put(self, bucket: str, name: str, content: bytes, query: dict) -> None:
        key = f"{bucket}/{name}"
        with self.store.lock:
            wanted = query.get("ifGenerationMatch")
            there = self.store.generations[key] if key in self.store.objects else 0
            if wanted and int(wanted[0]) != there:
                return self._fail(412)
            self._answer(self.store.put(key, content))

    def _media(self, content: bytes, generation: int) -> None:
        total, start, end, status = len(content), 0, len(content), 200
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if asked and total:
            first, last = asked.groups()
            start = int(first) if first else max(total - int(last), 0)
            end = min(int(last) + 1, total) if first and last else total
            status = 206
            if start >= total:
                return self._fail(416)
        headers = {"x-goog-generation": str(generation), "x-goog-stored-content-length": str(total)}
        if status == 206:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{total}"
        self._answer(content[start:end], headers, status)

    def _batch(self, body: bytes) -> None:
        """gcsfs deletes in batches: each part is a DELETE of one object."""
        boundary = re.search(r"boundary=['\"]?([^'\";]+)", self.headers["Content-Type"])[1].encode()
        replies = []
        with self.store.lock:
            for part in body.split(b"--" + boundary)[1:-1]:
                bucket, name = re.search(rb"DELETE \S*/storage/v1/b/([^/]+)/o/(\S+) HTTP", part).groups()
                key = f"{unquote(bucket.decode())}/{unquote(name.decode().partition('?')[0])}"
                code = "204 No Content" if self.store.objects.pop(key, None) is not None else "404 Not Found"
                number = re.search(rb"(?i)content-id: <([^>]+)>", part)
                answer = f"Content-ID: <response-{number[1].decode() if number else ''}>\r\n\r\nHTTP/1.1 {code}\r\n"
                replies.append(f"--reply\r\nContent-Type: application/http\r\n{answer}Content-Length: 0\r\n\r\n\r\n")
        kind = {"Content-Type": "multipart/mixed; boundary=reply"}
        self._answer(("".join(replies) + "--reply--\r\n").encode(), kind)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, content, headers: dict[str, str] | None = None, status: int = 200) -> None:
        raw = content if isinstance(content, bytes) else b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        own = {"Content-Type": "application/octet-stream" if isinstance(content, bytes) else "application/json"}
        for name, value in (own | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def _fail(self, status: int) -> None:
        self._answer({"error": {"code": status, "message": f"status {status}"}}, status=status)
