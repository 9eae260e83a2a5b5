"""Hugging Face on loopback that speaks the upload calls: /api/validate-yaml, repos/create, preupload, Git LFS' batch,
commit.

Enters: the requests of huggingface_hub's HfApi. Leaves: `repos` with what a clone would hold, and every request as it
came. It believes no one: no token but TOKEN may write, an object must have the hash it goes by, a card's front matter
must be YAML.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

TOKEN = "hf_of_this_test_alone"


@dataclass
class Hub:
    # name: {"private": bool, "files": {path: bytes}, "message": str}
    repos: dict[str, dict] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    full: bool = False  # no more room: every object is refused

    def __enter__(self) -> Hub:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = (
                    self.chunks()
                    if self.headers.get("Transfer-Encoding")
                    else self.rfile.read(int(self.headers.get("Content-Length") or 0))
                )
                hub.asked.append(f"{self.command} {self.path}")
                signed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
                status, reply = hub.reply(self.command, self.path.partition("?")[0], body, signed)
                data = json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                if status >= 400:
                    self.send_header("X-Error-Message", reply["error"])
                self.end_headers()
                self.wfile.write(data)

            def chunks(self) -> bytes:
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return body

            do_GET = do_POST = do_PUT = answer

            def log_message(self, *_) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def reply(self, method: str, path: str, body: bytes, signed: bool) -> tuple[int, dict]:
        if method == "PUT" and path.startswith("/objects/"):  # its address is the permission, as at the real hub
            return self.store(path.removeprefix("/objects/"), body)
        if not signed:
            return 401, {"error": "Invalid username or password."}
        if path == "/api/validate-yaml":
            return self.validate(json.loads(body)["content"])
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            return 200, {
                "objects": [o | {"actions": {"upload": {"href": f"{self.url}/objects/{o['oid']}"}}} for o in objects]
            }
        name = "/".join(path.split("/")[3:5])
        if name not in self.repos:
            return 404, {"error": "Repository not found"}
        if "/preupload/" in path:
            mode = lambda file: "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular"  # noqa: E731
            return 200, {
                "files": [
                    {"path": f["path"], "uploadMode": mode(f), "shouldIgnore": False, "oid": None}
                    for f in json.loads(body)["files"]
                ]
            }
        return self.commit(name, [json.loads(line) for line in body.splitlines()])

    def validate(self, content: str) -> tuple[int, dict]:
        if not content.startswith("---\n"):
            return 400, {"error": "no metadata", "errors": [{"message": "no metadata"}], "warnings": []}
        yaml.safe_load(content.split("---\n")[1])
        return 200, {"errors": [], "warnings": []}

    def create(self, wanted: dict) -> tuple[int, dict]:
        name = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] == "somebody-else":
            return 403, {"error": "You don't have the rights to create a model under the namespace somebody-else"}
        if name in self.repos:
            return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
        self.repos[name] = {
            "private": wanted.get("visibility") == "private" or wanted.get("private", False),
            "files": {},
            "message": "",
        }
        return 200, {"url": f"{self.url}/{name}"}

    def store(self, oid: str, body: bytes) -> tuple[int, dict]:
        if self.full or hashlib.sha256(body).hexdigest() != oid:
            return 400, {"error": "no room" if self.full else "another hash"}
        self.objects[oid] = body
        return 200, {}

    def commit(self, name: str, lines: list[dict]) -> tuple[int, dict]:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.repos[name]["message"] = value["summary"]
            elif line["key"] == "lfsFile":
                self.repos[name]["files"][value["path"]] = self.objects[value["oid"]]
            else:
                self.repos[name]["files"][value["path"]] = base64.b64decode(value["content"])
        return 200, {"commitUrl": f"{self.url}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True}
