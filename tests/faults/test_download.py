"""Downloads over connections that break, servers that lie, and disks that fill: whole or not at all."""

from __future__ import annotations

import hashlib
import http.server
import random
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field

import pytest

from nestseg.core.disk import sha256_of
from nestseg.core.download import BLOCK, download
from nestseg.core.errors import DownloadError

CONTENT = random.Random(0).randbytes(5 * BLOCK + 4321)
OTHER = random.Random(1).randbytes(4 * BLOCK + 99)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
OTHER_SHA256 = hashlib.sha256(OTHER).hexdigest()


@dataclass
class Site:
    """What a server on this machine does next, and what it was asked."""

    content: bytes = CONTENT
    etag: str | None = '"one"'
    kind: str = "application/octet-stream"
    cuts: list[int] = field(default_factory=list)  # a reply each is cut after so many bytes of its body
    reset: bool = False  # cut by a reset instead of an orderly end
    statuses: list[int] = field(default_factory=list)  # a reply each is this refusal
    headers: dict[str, str] = field(default_factory=dict)  # of a refusal or redirect
    knows_ranges: bool = True
    checks_if_range: bool = True
    length: str = "told"  # or "chunked" or "untold"
    pause: float = 0.0  # seconds before a cut, or between the halves of a body
    url: str = ""
    requests: list[dict[str, str]] = field(default_factory=list)

    @property
    def ranges(self) -> list[str | None]:
        return [request.get("Range") for request in self.requests]


def make_handler(site: Site) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def do_GET(self):
            site.requests.append(dict(self.headers))
            if site.statuses:
                self.send_response(site.statuses.pop(0))
                for name, value in {"Content-Length": "0", **site.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                return
            body, wanted = site.content, self.headers.get("Range")
            valid = not site.checks_if_range or self.headers.get("If-Range") == site.etag
            if wanted and site.knows_ranges and valid:
                start = int(wanted.removeprefix("bytes=").removesuffix("-"))
                if start >= len(body):
                    self.send_error(416)
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
                body = body[start:]
            else:
                self.send_response(200)
            if site.etag:
                self.send_header("ETag", site.etag)
            self.send_header("Content-Type", site.kind)
            if site.length == "told":
                self.send_header("Content-Length", str(len(body)))
            elif site.length == "chunked":
                self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            cut = site.cuts.pop(0) if site.cuts else None
            self.send_body(body if cut is None else body[:cut], whole=cut is None)

        def send_body(self, body, *, whole):
            half = len(body) // 2
            for piece in (body[:half], body[half:]):
                if site.length == "chunked" and piece:
                    piece = b"%x\r\n%s\r\n" % (len(piece), piece)
                self.wfile.write(piece)
                self.wfile.flush()
                time.sleep(site.pause)
            if whole and site.length == "chunked":
                self.wfile.write(b"0\r\n\r\n")
            if not whole and site.reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()

    Handler.protocol_version = "HTTP/1.1" if site.length == "chunked" else "HTTP/1.0"
    return Handler


class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        pass  # clients are meant to leave in the middle


@pytest.fixture
def serve():
    """Return a function that starts a server for a `Site` and writes its address into it."""
    servers = []

    def start(site: Site, *, context: ssl.SSLContext | None = None) -> Site:
        server = Server(("127.0.0.1", 0), make_handler(site))
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        scheme, port = "http" if context is None else "https", server.server_address[1]
        site.url = f"{scheme}://127.0.0.1:{port}/weights.pth"
        return site

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def target(tmp_path):
    return tmp_path / "cache" / "weights.pth"


def part_of(target):
    return target.with_name(f"{target.name}.part")


def names_beside(target):
    """List what a download left, without the lock."""
    return sorted(path.name for path in target.parent.iterdir() if path.suffix != ".lock")


def fetch(url, target, **options):
    return download([url], target, **{"sha256": SHA256, "backoff": (0.0, 0.0), "timeout": 5.0, **options})


def test_file_arrives_with_its_hash_and_leaves_nothing_else(serve, target):
    site, seen = serve(Site()), []
    got = fetch(site.url, target, on_progress=lambda done, total: seen.append((done, total)))
    assert got == (target, site.url, SHA256, 64, ())
    assert target.read_bytes() == CONTENT
    assert names_beside(target) == ["weights.pth"]
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_file_that_is_there_with_the_right_hash_is_not_fetched_again(serve, target):
    site = serve(Site())
    fetch(site.url, target)
    assert fetch(site.url, target).url == ""
    assert len(site.requests) == 1
    target.write_bytes(b"something else")
    fetch(site.url, target)
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("seed", range(20))
def test_p1_connection_cut_at_random_bytes_is_resumed_and_never_seen_as_complete(serve, target, seed):
    draw = random.Random(seed)
    cuts = [draw.randrange(len(CONTENT) // 3) for _ in range(draw.randint(1, 3))]
    site = serve(Site(cuts=cuts.copy(), reset=bool(seed % 2)))

    def look(done, total):
        assert not target.exists()

    fetch(site.url, target, on_progress=look, sha256=SHA256 if seed % 3 else None, backoff=(0.0,) * 3)
    assert target.read_bytes() == CONTENT
    assert names_beside(target) == ["weights.pth"]
    assert len(site.requests) == len(cuts) + 1
    if not site.reset:  # a reset may take what was under way with it
        assert site.ranges[-1] == (f"bytes={sum(cuts)}-" if sum(cuts) else None)


def test_p1_when_attempts_run_out_the_part_is_kept_and_the_next_call_goes_on_from_there(serve, target):
    site = serve(Site(cuts=[3 * BLOCK]))
    with pytest.raises(DownloadError, match=rf"E-DOWNLOAD-007 .*{3 * BLOCK} bytes are kept.* \| fix: "):
        fetch(site.url, target, backoff=())
    assert names_beside(target) == ["weights.pth.part", "weights.pth.part.json"]
    assert part_of(target).read_bytes() == CONTENT[: 3 * BLOCK]
    fetch(site.url, target)
    assert target.read_bytes() == CONTENT
    assert site.requests[-1]["Range"] == f"bytes={3 * BLOCK}-"
    assert site.requests[-1]["If-Range"] == '"one"'


def test_p1_a_gain_of_bytes_starts_the_attempts_anew_and_a_loss_does_not(serve, target):
    site = serve(Site(cuts=[BLOCK] * 4))
    fetch(site.url, target, backoff=(0.0,))
    assert len(site.requests) == 5
    stuck = serve(Site(cuts=[BLOCK] * 50, etag=None, content=OTHER))
    with pytest.raises(DownloadError, match="E-DOWNLOAD-007") as raised:
        fetch(stuck.url, target, sha256=OTHER_SHA256, backoff=(0.0, 0.0))
    assert len(stuck.requests) == 3
    assert "kept" not in str(raised.value)  # without a validator it would not be continued


def test_p6_interrupted_after_the_last_byte_nothing_is_asked_again(serve, target):
    site = serve(Site())

    def interrupt(done, total):
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(site.url, target, on_progress=interrupt)
    assert not target.exists()
    fetch(site.url, target)
    assert target.read_bytes() == CONTENT
    assert len(site.requests) == 1


def test_p1_server_that_falls_silent_counts_as_cut(serve, target):
    site = serve(Site(pause=1.0))
    with pytest.raises(DownloadError, match=r"E-DOWNLOAD-007 .*timed out"):
        fetch(site.url, target, timeout=0.1, backoff=())
    site.pause = 0.0
    fetch(site.url, target)
    assert site.ranges[-1] is not None
    assert target.read_bytes() == CONTENT


def test_p1_chunked_reply_that_is_cut_is_no_whole_file(serve, target):
    site = serve(Site(length="chunked", cuts=[2 * BLOCK]))
    with pytest.raises(DownloadError, match="E-DOWNLOAD-007"):
        fetch(site.url, target, sha256=None, backoff=())
    assert not target.exists()
    fetch(site.url, target, sha256=None)
    assert target.read_bytes() == CONTENT


def test_p1_without_length_and_hash_half_a_file_would_look_whole_and_is_refused(serve, target):
    site = serve(Site(length="untold"))
    with pytest.raises(DownloadError, match=r"E-DOWNLOAD-010 .*half of it would look whole"):
        fetch(site.url, target, sha256=None)
    assert fetch(site.url, target).digits_checked == 64


@pytest.mark.parametrize(
    "change",
    [
        {"knows_ranges": False},
        {"etag": '"two"', "content": OTHER},
        {"etag": '"two"', "content": OTHER, "checks_if_range": False},
        {"content": OTHER[:10]},
    ],
    ids=["ignores Range", "new ETag", "new ETag, If-Range ignored", "shorter than the part"],
)
def test_p2_server_without_ranges_or_with_another_file_by_now_makes_it_start_anew(serve, target, change):
    site = serve(Site(cuts=[2 * BLOCK + 5]))
    with pytest.raises(DownloadError):
        fetch(site.url, target, backoff=())
    for name, value in change.items():
        setattr(site, name, value)
    fetch(site.url, target, sha256=hashlib.sha256(site.content).hexdigest())
    assert target.read_bytes() == site.content


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_p2_without_a_strong_validator_nothing_is_continued(serve, target, etag):
    site = serve(Site(cuts=[2 * BLOCK], etag=etag))
    fetch(site.url, target)
    assert site.ranges == [None, None]
    assert target.read_bytes() == CONTENT


def test_p2_part_of_another_address_or_with_a_damaged_note_is_not_continued(serve, target):
    first, second = serve(Site(cuts=[2 * BLOCK] * 2)), serve(Site())
    for spoil in (lambda: None, lambda: part_of(target).with_name("weights.pth.part.json").write_text('{"url": ')):
        with pytest.raises(DownloadError):
            fetch(first.url, target, backoff=())
        spoil()
        fetch(second.url, target)
        assert target.read_bytes() == CONTENT
        target.unlink()
    assert second.ranges == [None, None]


@pytest.mark.parametrize(
    ("content", "kind", "word"),
    [
        (b"anything", "text/html; charset=utf-8", "text/html"),
        (b"\n<!DOCTYPE html><title>Log in", "application/octet-stream", "text/html"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "text/plain", "a git-lfs pointer"),
    ],
)
def test_p3_w4_page_or_pointer_instead_of_the_file_is_named_with_the_way_by_hand(serve, target, content, kind, word):
    site = serve(Site(content=content, kind=kind))
    with pytest.raises(DownloadError) as raised:
        fetch(site.url, target, sha256=None, expected="a checkpoint")
    message = f"E-DOWNLOAD-004 | {site.url} | got {word}, expected a checkpoint | fix: get the file by hand"
    assert str(raised.value).startswith(message)
    assert str(target) in raised.value.fix
    assert names_beside(target) == []
    assert len(site.requests) == 1


def test_p3_login_page_of_a_network_does_not_cost_what_was_received(serve, target):
    site = serve(Site(cuts=[4 * BLOCK]))
    with pytest.raises(DownloadError):
        fetch(site.url, target, backoff=())
    site.kind, site.knows_ranges = "text/html", False
    with pytest.raises(DownloadError, match="text/html"):
        fetch(site.url, target)
    site.kind, site.knows_ranges = "application/octet-stream", True
    fetch(site.url, target)
    assert site.ranges[-1] == f"bytes={4 * BLOCK}-"


@pytest.mark.parametrize("digits", [8, 20, 64])
def test_p4_wrong_hash_is_put_aside_with_both_hashes_named(serve, target, digits):
    site = serve(Site(content=OTHER))
    target.parent.mkdir()
    target.write_bytes(b"what was there before")
    with pytest.raises(DownloadError, match="E-DOWNLOAD-011") as raised:
        fetch(site.url, target, sha256=SHA256[:digits])
    assert OTHER_SHA256 in str(raised.value)
    assert SHA256[:digits] in str(raised.value)
    bad = f"weights.pth.bad-{OTHER_SHA256[:8]}"
    assert bad in str(raised.value)
    assert names_beside(target) == ["weights.pth", bad]
    assert target.read_bytes() == b"what was there before"


def test_p4_record_says_how_many_digits_were_compared(serve, target):
    site = serve(Site())
    assert fetch(site.url, target, sha256=SHA256[:8].upper()).digits_checked == 8
    assert fetch(site.url, target, sha256=None).digits_checked == 0
    assert sha256_of(target) == SHA256


@pytest.mark.parametrize("sha256", ["", "abc", "x" * 64, SHA256 + "0"])
def test_p4_what_is_no_hash_is_refused_before_anything_is_fetched(target, sha256):
    with pytest.raises(DownloadError, match="E-DOWNLOAD-001"):
        fetch("http://127.0.0.1:9/", target, sha256=sha256)


def test_p4_wrong_size_is_refused_before_it_is_fetched(serve, target):
    site = serve(Site())
    with pytest.raises(DownloadError, match=rf"E-DOWNLOAD-009 .*{len(CONTENT)} bytes, expected 7"):
        fetch(site.url, target, sha256=None, size=7)
    site.length = "untold"
    with pytest.raises(DownloadError, match="E-DOWNLOAD-011"):
        fetch(site.url, target, sha256=None, size=7)
    (bad,) = target.parent.glob("*.bad-*")
    assert bad.stat().st_size < len(CONTENT)  # a server that never ends does not fill the disk
    assert not target.exists()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A key and a certificate for 127.0.0.1 that nobody but these tests trusts."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl program here to make a certificate with")
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=nestseg"
    options = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", file, "-out", file.with_suffix(".crt")]
    subprocess.run(["openssl", *words.split(), *options], check=True, capture_output=True)
    file.write_text(file.read_text() + file.with_suffix(".crt").read_text())
    return file


@pytest.fixture
def serve_tls(serve, certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return lambda site: serve(site, context=context)


@pytest.fixture
def trusting(certificate):
    return ssl.create_default_context(cafile=str(certificate))


def test_p5_https_is_never_given_up_for_http(serve, serve_tls, target, trusting):
    plain = serve(Site())
    safe = serve_tls(Site(statuses=[302, 301, 307], headers={"Location": plain.url}))
    for _ in range(3):
        with pytest.raises(DownloadError, match=r"E-DOWNLOAD-006 .* redirects from https to http://.* \| fix: "):
            fetch(safe.url, target, context=trusting)
    assert plain.requests == []
    assert fetch(safe.url, target, context=trusting).url == safe.url


def test_p5_redirects_that_are_as_safe_are_followed_and_keep_the_range(serve, serve_tls, target, trusting):
    safe = serve_tls(Site(cuts=[BLOCK]))
    door = serve_tls(Site(statuses=[302] * 2, headers={"Location": safe.url}))
    fetch(door.url, target, context=trusting)
    assert safe.ranges == [None, f"bytes={BLOCK}-"]
    target.unlink()
    plain = serve(Site(statuses=[302], headers={"Location": safe.url}))
    fetch(plain.url, target, context=trusting)
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("location", ["ftp://127.0.0.1/weights.pth", "file:///etc/hostname"])
def test_p5_redirects_to_other_schemes_are_refused(serve, target, location):
    site = serve(Site(statuses=[302], headers={"Location": location}))
    with pytest.raises(DownloadError, match=r"E-DOWNLOAD-00[56]"):
        fetch(site.url, target, sha256=None)
    assert names_beside(target) == []


def test_p5_untrusted_certificate_is_named_and_not_tried_again(serve_tls, target):
    site = serve_tls(Site())
    with pytest.raises(DownloadError, match=r"E-DOWNLOAD-008 .*certificate is not trusted.* \| fix: "):
        fetch(site.url, target)
    assert site.requests == []


def test_other_schemes_are_refused(target):
    with pytest.raises(DownloadError, match="E-DOWNLOAD-003"):
        fetch("ftp://127.0.0.1/weights.pth", target)


@pytest.mark.parametrize(
    ("status", "word"), [(401, "login"), (403, "terms"), (404, "no such file"), (410, "gone"), (429, "too many")]
)
def test_w7_refusals_are_named_with_what_to_do_and_not_repeated(serve, target, status, word):
    site = serve(Site(statuses=[status], headers={"Retry-After": "17"}))
    with pytest.raises(DownloadError, match=rf"E-DOWNLOAD-005 .*HTTP {status}: .*{word}") as raised:
        fetch(site.url, target)
    assert ("wait 17 seconds" if status == 429 else "by hand") in raised.value.fix
    assert len(site.requests) == 1


def test_servers_that_are_busy_are_asked_again(serve, target):
    site = serve(Site(statuses=[503, 500]))
    fetch(site.url, target)
    assert len(site.requests) == 3


def test_machine_without_network_is_told_so(target):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/weights.pth"
        with pytest.raises(DownloadError, match=r"E-DOWNLOAD-007 .*[Rr]efused"):
            fetch(url, target)


def test_w9_mirrors_are_tried_in_order_and_the_hash_decides(serve, target):
    dead, wrong = serve(Site(statuses=[404])), serve(Site(content=OTHER))
    good, unused = serve(Site()), serve(Site())
    got = download([dead.url, wrong.url, good.url, unused.url], target, sha256=SHA256[:8], backoff=())
    assert got.url == good.url
    assert [message[:14] for message in got.failures] == ["E-DOWNLOAD-005", "E-DOWNLOAD-011"]
    assert unused.requests == []
    assert target.read_bytes() == CONTENT


def test_w9_when_no_mirror_works_every_reason_is_given(serve, target):
    dead, wrong = serve(Site(statuses=[404])), serve(Site(content=OTHER))
    with pytest.raises(DownloadError, match=r"E-DOWNLOAD-002 .*HTTP 404.*sha256.* \| fix: get the file by hand"):
        download([dead.url, wrong.url], target, sha256=SHA256, backoff=())
    with pytest.raises(DownloadError, match=r"E-DOWNLOAD-002 .*none is known"):
        download([], target, sha256=SHA256)


def test_file_at_hand_is_copied_and_compared_the_same_way(tmp_path, target):
    at_hand = tmp_path / "with space.pth"
    at_hand.write_bytes(CONTENT)
    for url in (str(at_hand), at_hand.as_uri()):
        assert fetch(url, target).digits_checked == 64
        assert target.read_bytes() == CONTENT
        target.unlink()
    at_hand.write_bytes(OTHER)
    with pytest.raises(DownloadError, match="E-DOWNLOAD-011"):
        fetch(str(at_hand), target)
    assert at_hand.read_bytes() == OTHER
    with pytest.raises(DownloadError, match=r"E-DOWNLOAD-007 .*No such file"):
        fetch(str(tmp_path / "absent.pth"), target)
    assert not target.exists()


CHILD = """
import sys
from pathlib import Path
{before}
from nestseg.core.disk import sha256_of
from nestseg.core.download import download
from nestseg.core.errors import DownloadError
try:
    print(download([sys.argv[1]], Path(sys.argv[2]), sha256=sys.argv[3], backoff=()).sha256)
except DownloadError as error:
    sys.exit(str(error))
"""


def start_child(site, target, *, before=""):
    command = [sys.executable, "-c", CHILD.format(before=before), site.url, str(target), SHA256]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_w8_of_two_processes_one_downloads(serve, target):
    site = serve(Site(pause=0.5))
    children = [start_child(site, target) for _ in range(2)]
    outputs = [child.communicate(timeout=60) for child in children]
    assert outputs == [(f"{SHA256}\n", "")] * 2
    assert len(site.requests) == 1


def test_p6_killed_download_is_finished_by_the_next(serve, target):
    site = serve(Site(pause=30.0))
    child = start_child(site, target)
    half = len(CONTENT) // 2 // BLOCK * BLOCK
    deadline = time.monotonic() + 30
    while not (part_of(target).is_file() and part_of(target).stat().st_size >= half):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert not target.exists()
    site.pause = 0.0
    fetch(site.url, target)
    assert site.ranges[-1] == f"bytes={half}-"
    assert target.read_bytes() == CONTENT


def test_p7_full_disk_is_named_and_the_next_call_goes_on_from_there(serve, target):
    limit = 2 * BLOCK + 777
    site = serve(Site())
    child = start_child(
        site, target, before=f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit},) * 2)"
    )
    _, message = child.communicate(timeout=60)
    assert message.startswith(f"E-DOWNLOAD-012 | {target} | cannot be written: File too large | fix: free some space")
    assert names_beside(target) == ["weights.pth.part", "weights.pth.part.json"]
    fetch(site.url, target)
    assert site.ranges[-1] == f"bytes={limit}-"
    assert target.read_bytes() == CONTENT


def test_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DownloadError, match=r"E-DOWNLOAD-012 .* \| fix: "):
        fetch("http://127.0.0.1:9/", tmp_path / "file" / "weights.pth")
