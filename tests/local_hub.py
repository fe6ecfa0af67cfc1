"""A model hub on this machine: folders served as huggingface_hub's client asks for them, and a list of the requests."""

import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def local_hub(models: dict[str, Path], gated=(), port: int = 0):
    """Serve `models` ({"someone/name": folder}) and yield (the endpoint's address, the list of paths asked for, a list
    with the commit that all of them are at, which may be changed)."""
    asked, commit = [], [COMMIT]

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            asked.append(f"{self.command} {self.path}")
            words = self.path.split("?")[0].strip("/").split("/")
            if words[:2] == ["api", "models"]:
                words = words[2:]
            name = "/".join(words[:2])
            if name not in models:
                return self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
            folder = models[name]
            files = sorted(path.name for path in folder.iterdir() if path.is_file())
            if words[2:3] == ["revision"] and words[3] not in ("main", commit[0]):
                return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            if words[2:3] == ["resolve"] and name in gated:
                return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
            if words[2:3] == ["resolve"]:
                path = folder / "/".join(words[4:])
                if not path.is_file():
                    return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit[0]})
                content = path.read_bytes()
                tag = hashlib.sha256(content).hexdigest()
                return self.answer(200, content, {"ETag": f'"{tag}"', "X-Repo-Commit": commit[0]})
            if words[2:3] == ["tree"]:
                tree = [
                    {"type": "file", "path": file, "size": (folder / file).stat().st_size, "oid": "0"} for file in files
                ]
                return self.answer(200, json.dumps(tree).encode(), {"X-Repo-Commit": commit[0]})
            found = {"id": name, "modelId": name, "sha": commit[0], "siblings": [{"rfilename": file} for file in files]}
            return self.answer(200, json.dumps(found).encode())

        def answer(self, status: int, content: bytes, headers=None):
            self.send_response(status)
            for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked, commit
    finally:
        server.shutdown()
        server.server_close()
