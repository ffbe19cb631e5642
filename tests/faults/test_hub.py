"""The Hub that is away, refuses, moves, lies or hands out half a file (W2, W7, W11), played by a stand-in on loopback.

The real huggingface_hub talks to it. It reads its settings when it is imported, so each call runs in a process of its
own: a worker that has torch imported forks for each.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
import yaml

from nestseg.core.errors import WeightsError
from nestseg.core.taxonomy import Taxonomy
from nestseg.models.segmenter import create_model
from nestseg.store.files import read_model_file
from nestseg.store.hub import check_config, fetch_pretrained, upload_pretrained, write_pretrained
from nestseg.store.metadata import ModelMetadata

WORKER = """
import json, os, sys, warnings
import torch
from nestseg.core.errors import WeightsError
from nestseg.models import segmenter
from nestseg.store import files, hub
assert "huggingface_hub" not in sys.modules
# huggingface_hub 2.4 uploads to Git LFS with a word that httpx2 has given up
warnings.filterwarnings("ignore", "Use 'content=", DeprecationWarning)

def run(command):
    if command["do"] == "fetch":
        path, revision = hub.fetch_pretrained(command["spec"])
        return {"path": str(path), "revision": revision}
    if command["do"] == "push":
        import nestseg
        model = segmenter.create_model("fcn", "resnest14", num_classes=2, output_stride=32, head_channels=8)
        taxonomy = nestseg.Taxonomy(name="two", classes=("road", "sky"), palette=((1, 2, 3), (4, 5, 6)))
        spec = model.push_to_hub(command["repository"], taxonomy=taxonomy, licence="mit")
        loaded = nestseg.load_model(spec)
        ours, theirs = model.state_dict(), loaded.state_dict()
        same = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        return {"spec": spec, "same": same, "licence": loaded.metadata.licence}
    state, metadata = files.read_model_file(hub.Path(command["file"]))
    return {"spec": hub.upload_pretrained(command["repository"], state, metadata)}

for line in sys.stdin:
    command = json.loads(line)
    if os.fork() == 0:
        os.environ.update(command["environment"])
        os.dup2(os.open(command["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        try:
            answer = run(command)
        except WeightsError as error:
            answer = {"code": error.code, "text": str(error)}
        except BaseException as error:
            answer = {"code": None, "text": repr(error)}
        print(json.dumps(answer), flush=True)
        os._exit(0)
    os.wait()
"""


@dataclass(kw_only=True)
class Hub:
    """A few endpoints of the Hub, and what is wrong with it."""

    commits: dict[str, list[tuple[str, dict[str, bytes]]]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    status: int | None = None
    """Answers everything."""
    fault: str | None = None
    """What happens to the body of a model file: short, cut, flip."""
    given_sha: str | None = None
    """What is told in place of the commit that was asked for."""
    use_lfs: bool = True
    port: int = 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def commit(self, repository: str, files: dict[str, bytes]) -> str:
        commits = self.commits.setdefault(repository, [])
        whole = {**(commits[-1][1] if commits else {}), **files}
        sha = hashlib.sha1(repr((repository, len(commits), sorted(whole.items()))).encode()).hexdigest()
        commits.append((sha, whole))
        return sha

    def is_lfs(self, name: str) -> bool:
        return self.use_lfs and name.endswith((".safetensors", ".bin"))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, status: int, body: bytes | object = b"", *, length: int | None = None, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self) -> None:
        body, path = self.read_body(), unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.status is not None:
            codes = {404: "RepoNotFound", 403: "GatedRepo"}
            extra = {"X_Error_Code": codes[self.hub.status]} if self.hub.status in codes else {}
            self.reply(self.hub.status, {"error": "no"}, **extra)
        elif path.startswith("/lfs/"):
            self.serve_object(path.removeprefix("/lfs/"), body)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.serve_file(*match.groups())
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/revision/(.+))?", path):
            self.serve_info(*match.groups())
        else:
            self.take_upload(path, body)

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    def find_commit(self, repository: str, revision: str | None) -> tuple[str, dict[str, bytes]] | None:
        commits = self.hub.commits.get(repository)
        if commits is None:
            self.reply(401, {"error": "Invalid username or password."})
        elif revision in (None, "main"):
            return commits[-1]
        elif found := [commit for commit in commits if commit[0] == revision]:
            return found[0]
        else:
            self.reply(404, {"error": "no such revision"}, X_Error_Code="RevisionNotFound")
        return None

    def serve_info(self, repository: str, revision: str | None) -> None:
        commit = self.find_commit(repository, revision)
        if commit is None:
            return
        siblings = []
        for name, data in commit[1].items():
            entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": git_hash(data)}
            if self.hub.is_lfs(name):
                entry["lfs"] = {"sha256": sha256(data), "size": len(data), "pointerSize": 130}
            siblings.append(entry)
        self.reply(200, {"id": repository, "sha": self.hub.given_sha or commit[0], "siblings": siblings})

    def serve_file(self, repository: str, revision: str, name: str) -> None:
        commit = self.find_commit(repository, revision)
        if commit is None:
            return
        data = commit[1][name]
        if not self.hub.is_lfs(name):
            self.reply(200, data, ETag=f'"{git_hash(data)}"', X_Repo_Commit=commit[0])
            return
        # as at the real Hub, large files lie on another host
        self.hub.objects[sha256(data)] = data
        self.reply(
            302,
            Location=f"http://localhost:{self.hub.port}/lfs/{sha256(data)}",
            X_Linked_Etag=f'"{sha256(data)}"',
            X_Linked_Size=str(len(data)),
            X_Repo_Commit=commit[0],
        )

    def serve_object(self, oid: str, body: bytes) -> None:
        if self.command == "PUT":
            assert sha256(body) == oid
            self.hub.objects[oid] = body
            self.reply(200)
            return
        data, fault = self.hub.objects[oid], self.hub.fault
        if fault == "short":
            self.reply(200, data[: len(data) // 2])
        elif fault == "cut":
            self.hub.fault = None
            self.close_connection = True
            self.reply(200, data[: len(data) // 2], length=len(data))
        elif fault == "flip":
            self.reply(200, data[:-1] + bytes([data[-1] ^ 1]))
        else:
            self.reply(200, data)

    def take_upload(self, path: str, body: bytes) -> None:
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            known = name in self.hub.commits
            if not known:
                self.hub.commit(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
            self.reply(409 if known else 200, {"url": f"{self.hub.endpoint}/{name}"})
        elif path == "/api/validate-yaml":
            front = yaml.safe_load(json.loads(body)["content"].split("\n---\n")[0].removeprefix("---\n"))
            assert front["library_name"] == "nestseg"
            self.reply(200, {"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [
                {"path": name, "uploadMode": "lfs" if self.hub.is_lfs(name) else "regular", "shouldIgnore": False}
                for name in (file["path"] for file in json.loads(body)["files"])
            ]
            self.reply(200, {"files": files})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**wanted, "actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}"}}}
                for wanted in json.loads(body)["objects"]
            ]
            self.reply(200, {"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            files = {}
            for entry in map(json.loads, body.splitlines()):
                if entry["key"] == "file":
                    files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                elif entry["key"] == "lfsFile":
                    files[entry["value"]["path"]] = self.hub.objects[entry["value"]["oid"]]
            sha = self.hub.commit(match[1], files)
            self.reply(200, {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.endpoint}/{match[1]}"})
        else:
            self.reply(501, {"error": f"the stand-in has no {path}"})


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass(kw_only=True)
class Machine:
    """One user's machine: its caches, its settings, and a worker to run calls in."""

    worker: subprocess.Popen[str]
    folder: Path
    environment: dict[str, str]

    def call(self, do: str, *, quiet: bool = True, **arguments: str) -> dict[str, str]:
        stderr = self.folder / "stderr"
        command = {"do": do, **arguments, "environment": self.environment, "stderr": str(stderr)}
        assert self.worker.stdin is not None
        assert self.worker.stdout is not None
        self.worker.stdin.write(json.dumps(command) + "\n")
        self.worker.stdin.flush()
        answer = json.loads(self.worker.stdout.readline())
        assert not quiet or stderr.read_text() == "", "a progress bar, or a warning"
        return answer

    def fetch(self, spec: str, **arguments: Any) -> dict[str, str]:
        return self.call("fetch", spec=spec, **arguments)


@pytest.fixture(scope="module")
def worker() -> Iterator[subprocess.Popen[str]]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "NESTSEG_"))}
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", WORKER],
        env={**environment, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def machine(worker, hub, tmp_path) -> Machine:
    return Machine(
        worker=worker,
        folder=tmp_path,
        environment={
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(tmp_path / "huggingface"),
            "HF_TOKEN": "hf_test",
            "HF_HUB_DISABLE_XET": "1",
            "NESTSEG_CACHE": str(tmp_path / "nestseg"),
        },
    )


def cut_off(machine: Machine) -> None:
    """Leave the machine without a network: nobody listens on port 9 of loopback."""
    machine.environment["HF_ENDPOINT"] = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def metadata() -> ModelMetadata:
    with torch.device("meta"):
        model = create_model("fcn", "resnest14", num_classes=2, output_stride=32, head_channels=8, auxiliary=False)
    taxonomy = Taxonomy(name="two", classes=("road", "sky"), palette=((1, 2, 3), (4, 5, 6)))
    return model.describe(taxonomy, licence="apache-2.0").model_copy(update={"recipe": {"crop": [1, 2]}})


@pytest.fixture(scope="module")
def local(tmp_path_factory, metadata) -> Path:
    """A folder of a model that is small enough to send around; its metadata is real, its weights are few."""
    folder = tmp_path_factory.mktemp("local")
    write_pretrained(folder, {"weight": torch.arange(1000.0)}, metadata)
    return folder


@pytest.fixture
def published(local, hub) -> str:
    """The commit of ``me/net`` that holds the model, and things that nobody should ask for."""
    files = {path.name: path.read_bytes() for path in local.iterdir()}
    return hub.commit("me/net", {**files, "pytorch_model.bin": b"\x80\x04", "modeling.py": b"raise SystemExit"})


def test_what_is_uploaded_comes_back_by_its_commit_and_is_one_commit(hub, machine, local):
    answer = machine.call("upload", repository="me/new", file=str(local / "model.safetensors"))
    assert "spec" in answer, answer
    assert len(hub.commits["me/new"]) == 2, "one that makes the repository, one with all files"
    sha, files = hub.commits["me/new"][-1]
    assert answer == {"spec": f"hf:me/new@{sha}"}
    assert set(files) == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    assert b'load_predictor("hf:me/new")' in files["README.md"]
    fetched = machine.fetch(answer["spec"])
    assert fetched["revision"] == sha
    assert Path(fetched["path"]).read_bytes() == (local / "model.safetensors").read_bytes()
    state, metadata = read_model_file(Path(fetched["path"]))
    check_config(Path(fetched["path"]), metadata)
    assert torch.equal(state["weight"], torch.arange(1000.0))


def test_an_upload_to_a_repository_that_exists_adds_a_commit(hub, machine, local, published):
    file = str(local / "model.safetensors")
    revisions = [machine.call("upload", repository="me/net", file=file)["spec"].split("@")[1] for _ in range(2)]
    assert [sha for sha, _ in hub.commits["me/net"]] == [published, *revisions]


def test_only_weights_and_config_are_asked_for(hub, machine, published):
    machine.fetch(f"hf:me/net@{published}")
    files = {request.split("/")[-1] for request in hub.requests if "/resolve/" in request}
    assert files == {"config.json", "model.safetensors"}
    assert {request.split(" ")[0] for request in hub.requests} == {"GET", "HEAD"}
    assert all("/me/net" in request or "/lfs/" in request for request in hub.requests), "something calls home"


def test_a_commit_in_the_cache_takes_no_request_and_no_network(hub, machine, published):
    """W7: pinned and offline."""
    first = machine.fetch(f"hf:me/net@{published}")
    hub.requests.clear()
    assert machine.fetch(f"hf:me/net@{published}") == first
    assert hub.requests == []
    cut_off(machine)
    assert machine.fetch(f"hf:me/net@{published}") == first
    machine.environment["HF_HUB_OFFLINE"] = "1"
    assert machine.fetch(f"hf:me/net@{published}") == first


@pytest.mark.parametrize("offline", [True, False])
def test_a_commit_that_is_not_in_the_cache_is_said_to_need_the_network(machine, published, offline):
    """W7: offline and not cached."""
    cut_off(machine)
    machine.environment |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    answer = machine.fetch(f"hf:me/net@{published}")
    assert answer["code"] == "E-WEIGHTS-042"
    assert "fix: connect to the network, or copy the caches" in answer["text"]


def test_a_branch_without_the_network_is_refused_with_the_commit_that_was_loaded_last(machine, published):
    """W7: what main is now cannot be known offline, and an old answer would be a silent one."""
    first = machine.fetch("hf:me/net")
    cut_off(machine)
    answer = machine.fetch("hf:me/net")
    assert answer["code"] == "E-WEIGHTS-042"
    (spec,) = re.findall(r"hf:me/net@\w+", answer["text"])
    assert machine.fetch(spec) == first


def test_a_branch_that_moved_is_followed_and_a_commit_is_not(hub, machine, published):
    """W7: revision moved."""
    assert machine.fetch("hf:me/net")["revision"] == published
    moved = hub.commit("me/net", {"README.md": b"new"})
    assert machine.fetch("hf:me/net")["revision"] == moved
    assert machine.fetch("hf:me/net@main")["revision"] == moved
    assert machine.fetch(f"hf:me/net@{published}")["revision"] == published


@pytest.mark.parametrize(
    ("status", "code", "advice"),
    [
        (401, "E-WEIGHTS-043", "hf auth login"),
        (403, "E-WEIGHTS-043", "hf auth login"),
        (404, "E-WEIGHTS-044", "check the name"),
        (429, "E-WEIGHTS-045", "wait"),
        (500, "E-WEIGHTS-049", "try again"),
    ],
)
@pytest.mark.parametrize("do", ["fetch", "upload"])
def test_a_refusal_is_worded_with_what_to_do(hub, machine, local, do, status, code, advice):
    """W7: 401, 404, 429."""
    hub.status = status
    answer = machine.call(do, spec="hf:me/private", repository="me/private", file=str(local / "model.safetensors"))
    assert answer["code"] == code
    assert advice in answer["text"].split("fix: ")[1]
    assert "me/private" in answer["text"]
    assert "\n" not in answer["text"]


def test_repositories_and_revisions_that_do_not_exist_are_told_apart_from_files(hub, machine, published):
    assert machine.fetch("hf:me/other")["code"] == "E-WEIGHTS-043", "the Hub does not tell strangers what exists"
    assert machine.fetch("hf:me/net@v9")["code"] == "E-WEIGHTS-044"
    hub.commit("me/pickle", {"pytorch_model.bin": b"\x80\x04"})
    hub.requests.clear()
    answer = machine.fetch("hf:me/pickle")
    assert answer["code"] == "E-WEIGHTS-044"
    assert "no model.safetensors" in answer["text"]
    assert not any("/resolve/" in request for request in hub.requests)


def test_a_file_without_a_published_sha256_is_refused(hub, machine, published):
    hub.use_lfs = False
    answer = machine.fetch("hf:me/net")
    assert answer["code"] == "E-WEIGHTS-044"
    assert "Git LFS" in answer["text"]


@pytest.mark.parametrize("given", ["0" * 40, "../../../../evil", "main"])
def test_a_hub_that_answers_with_another_commit_is_not_believed(hub, machine, published, given):
    hub.given_sha = given
    assert machine.fetch(f"hf:me/net@{published}")["code"] == "E-WEIGHTS-044"
    assert not any("/resolve/" in request for request in hub.requests)


def test_a_body_that_ends_early_is_an_error_and_the_next_call_gets_it_whole(hub, machine, published):
    """W4, W7: truncated."""
    hub.fault = "short"
    assert machine.fetch(f"hf:me/net@{published}")["code"] == "E-WEIGHTS-049"
    hub.fault = None
    assert machine.fetch(f"hf:me/net@{published}")["revision"] == published


def test_a_connection_that_breaks_once_is_tried_again(hub, machine, local, published):
    hub.fault = "cut"
    answer = machine.fetch(f"hf:me/net@{published}", quiet=False)
    assert Path(answer["path"]).read_bytes() == (local / "model.safetensors").read_bytes()


def test_a_body_of_the_right_size_with_one_wrong_bit_is_found(hub, machine, published):
    """W2: huggingface_hub compares sizes only."""
    hub.fault = "flip"
    answer = machine.fetch(f"hf:me/net@{published}")
    assert answer["code"] == "E-WEIGHTS-047"
    assert machine.fetch(f"hf:me/net@{published}")["code"] == "E-WEIGHTS-047", "it is in the cache now"


@pytest.mark.parametrize("known_by", ["our record", "the name of the file"])
def test_a_cached_file_that_changed_is_found_and_mended_as_told(machine, local, published, known_by):
    """W2: tampered later; either of the two places that know the sha256 is enough, without the network."""
    spec = f"hf:me/net@{published}"
    if known_by == "our record":
        machine.environment["HF_HUB_DISABLE_SYMLINKS"] = "1"
    path = Path(machine.fetch(spec)["path"])
    assert path.is_symlink() == (known_by != "our record")
    if known_by == "the name of the file":
        (record,) = (machine.folder / "nestseg").rglob("*.sha256")
        record.unlink()
    endpoint = machine.environment["HF_ENDPOINT"]
    cut_off(machine)
    assert machine.fetch(spec) == {"path": str(path), "revision": published}
    path.resolve().write_bytes(path.read_bytes()[:-4] + b"\1\2\3\4")
    answer = machine.fetch(spec)
    assert answer["code"] == "E-WEIGHTS-047"
    machine.environment["HF_ENDPOINT"] = endpoint
    (told,) = re.findall(r"fix: delete (\S+) and load it again", answer["text"])
    Path(told).unlink()
    assert Path(machine.fetch(spec)["path"]).read_bytes() == (local / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "spec",
    [
        "hf:",
        "hf:net",
        "hf:me/net/model.safetensors",
        "hf:me/net@",
        "hf:../net",
        "hf:me/..",
        "hf:me/net@../../main",
        "hf:me/net@v1/../../../x",
        "hf:me/net@a b",
        "hf:mé/net",
        "me/net",
        "hf:me/net\n",
    ],
)
def test_a_malformed_name_is_refused_with_the_right_form(spec):
    with pytest.raises(WeightsError, match="hf:owner/name") as caught:
        fetch_pretrained(spec)
    assert caught.value.code == "E-WEIGHTS-040"


@pytest.mark.parametrize("repository", ["net", "hf:me/net", "me/net@main", ""])
def test_an_upload_to_a_malformed_name_is_refused(repository, metadata):
    with pytest.raises(WeightsError, match="owner/name") as caught:
        upload_pretrained(repository, {}, metadata)
    assert caught.value.code == "E-WEIGHTS-040"


def test_without_huggingface_hub_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub.utils", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(WeightsError, match=r'pip install "nestseg\[hub\]"') as caught:
        fetch_pretrained("hf:me/net")
    assert caught.value.code == "E-WEIGHTS-041"


def test_a_cache_that_cannot_be_written_is_named(machine, published, tmp_path):
    (tmp_path / "nestseg").write_text("a file where the folder should be")
    answer = machine.fetch(f"hf:me/net@{published}")
    assert answer["code"] == "E-WEIGHTS-046"
    assert "NESTSEG_CACHE" in answer["text"]


def test_a_config_that_agrees_or_is_absent_is_fine(local, metadata, tmp_path):
    check_config(local / "model.safetensors", metadata)
    check_config(tmp_path / "model.safetensors", metadata)
    config = json.loads((local / "config.json").read_text(encoding="utf-8"))
    assert (config["library_name"], config["format"], config["classes"]) == ("nestseg", 1, ["road", "sky"])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"auto_map": {"AutoModel": "modeling.Net"}}, "auto_map"),
        ({"_target_": "os.system"}, "_target_"),
        ({"architecture": {"_target_": "os.system"}}, "_target_"),
        ({"classes": ["sky", "road"]}, "something else than model.safetensors in classes"),
        ({"recipe": {"crop": [2, 1]}}, "something else than model.safetensors in recipe"),
        ({"format": 2}, "format"),
    ],
)
def test_a_config_that_says_more_or_other_than_the_weights_is_refused(local, metadata, tmp_path, change, told):
    """W11: what it names is never imported, and never ignored."""
    config = json.loads((local / "config.json").read_text(encoding="utf-8"))
    merged = {name: {**config[name], **value} if name == "architecture" else value for name, value in change.items()}
    (tmp_path / "config.json").write_text(json.dumps({**config, **merged}), encoding="utf-8")
    with pytest.raises(WeightsError, match=re.escape(told)) as caught:
        check_config(tmp_path / "model.safetensors", metadata)
    assert caught.value.code == "E-WEIGHTS-048"
    assert caught.value.path == tmp_path / "config.json"


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"{", b"\xff\xfe", b"[" * 100_000, b"version https://git-lfs"]
)
def test_a_config_that_is_none_is_named(metadata, tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(WeightsError) as caught:
        check_config(tmp_path / "model.safetensors", metadata)
    assert caught.value.code == "E-WEIGHTS-048"
    assert len(str(caught.value)) < 700


def test_a_folder_that_cannot_be_made_is_named(metadata, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError) as caught:
        write_pretrained(tmp_path / "file" / "folder", {}, metadata)
    assert caught.value.code == "E-WEIGHTS-046"


def test_writing_again_leaves_no_other_file_and_the_same_texts(local, metadata, tmp_path):
    for _ in range(2):
        write_pretrained(tmp_path, {"weight": torch.arange(1000.0)}, metadata)
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    for path, other in itertools.product(tmp_path.iterdir(), local.iterdir()):
        assert path.name != other.name or path.read_bytes() == other.read_bytes()


def test_a_network_pushed_to_the_hub_loads_again_by_the_name_it_returned(hub, machine):
    answer = machine.call("push", repository="me/whole")
    assert answer == {"spec": f"hf:me/whole@{hub.commits['me/whole'][-1][0]}", "same": True, "licence": "mit"}
