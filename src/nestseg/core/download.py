"""Files from the network: whole and compared with their hash, or not there at all.

A cut connection leaves ``NAME.part`` and a note of where it came from, ``NAME.part.json``; the next attempt goes on
from there if the server still has the same file. The final name appears last, after the hash was compared and the
bytes were flushed. https is never given up for http.
"""

from __future__ import annotations

import errno
import json
import re
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import IO, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, HTTPSHandler, OpenerDirector, Request, build_opener

from filelock import FileLock

from nestseg.core.disk import replaced_file, sha256_of, sync_file
from nestseg.core.errors import DownloadError

BLOCK = 1 << 16

_REFUSALS = {
    401: "the site wants a login",
    403: "the site refuses it; its terms may have to be accepted first",
    404: "there is no such file at this address",
    410: "the file is gone from this address",
    429: "the site has had too many requests",
}

_OTHER_STARTS = {
    b"<!doctype html": "text/html",
    b"<html": "text/html",
    b"version https://git-lfs": "a git-lfs pointer",
}


class Download(NamedTuple):
    """A file that is there, and what is known of it."""

    path: Path
    url: str
    """The address that gave it; empty if it was there already."""
    sha256: str
    """Of the file as it lies there, 64 hex digits."""
    digits_checked: int
    """How many leading digits were compared: 64 is verified in full, 0 not at all."""
    failures: tuple[str, ...]
    """What went wrong with the addresses before this one, a message each."""


class _Origin(NamedTuple):
    """Where a part file comes from; it is only continued with a file of the same validator."""

    url: str
    validator: str
    total: int | None


class _Job(NamedTuple):
    """What every address is asked for, and how."""

    part: Path
    wanted: str
    size: int | None
    expected: str
    by_hand: str
    on_progress: Callable[[int, int | None], None]
    backoff: Sequence[float]
    timeout: float
    opener: OpenerDirector


class _CutError(Exception):
    """The file did not come whole; another attempt may help."""


class _Redirects(HTTPRedirectHandler):
    """Follows redirects, but never from https to anything else."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        """Refuse a target that is less safe than where we came from."""
        if urlsplit(newurl).scheme not in ("https", req.type):
            fp.close()
            reason = f"redirects from {req.type} to {newurl}; an address is never given up for a less safe one"
            raise DownloadError("E-DOWNLOAD-006", reason, fix="use another address of the file", path=req.full_url)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(
    urls: Sequence[str],
    path: Path,
    *,
    sha256: str | None,
    size: int | None = None,
    expected: str = "weights",
    by_hand: str | None = None,
    on_progress: Callable[[int, int | None], None] | None = None,
    backoff: Sequence[float] = (0.5, 2.0, 8.0),
    timeout: float = 30.0,
    context: ssl.SSLContext | None = None,
) -> Download:
    """Fetch a file from the first address that gives it.

    Of several processes that ask for the same path, one downloads and the others wait; where the hash is known, they
    take what it left.

    Args:
        urls: Addresses of the same file, tried in this order: ``https:``, ``http:``, ``file:``, or a path.
        path: Where the file goes; its folder is made. A file that is there and has the hash is not fetched again.
        sha256: 64 hex digits, or the first 8 or more of them; None to take any file.
        size: Bytes that the file must have; None if unknown.
        expected: What the file is, in a word, for messages.
        by_hand: What to do when no address works, one line.
        on_progress: Called with the bytes so far and in total (None if unknown).
        backoff: Seconds to wait before each further attempt at an address; a gain of bytes starts them anew.
        timeout: Seconds without a byte after which a connection counts as cut.
        context: Certificates to trust; None for those of the system.

    Returns:
        What lies at ``path`` now.

    Raises:
        DownloadError: E-DOWNLOAD-001 to E-DOWNLOAD-012; what was at ``path`` before is still there.

    Example:
        >>> from tempfile import mkdtemp
        >>> folder = Path(mkdtemp())
        >>> _ = (folder / "here").write_bytes(b"abc")
        >>> download([str(folder / "here")], folder / "there", sha256="ba7816bf").digits_checked
        8
    """
    if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{8,64}", sha256):
        reason = f"{sha256!r} is no sha256"
        raise DownloadError("E-DOWNLOAD-001", reason, fix="give all 64 hex digits or the first 8 or more", path=path)
    job = _Job(
        part=path.with_name(f"{path.name}.part"),
        wanted=(sha256 or "").lower(),
        size=size,
        expected=expected,
        by_hand=by_hand or f"get the file by hand and put it at {path}",
        on_progress=on_progress or (lambda done, total: None),
        backoff=backoff,
        timeout=timeout,
        opener=build_opener(HTTPSHandler(context=context), _Redirects),
    )
    failures: list[DownloadError] = []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f"{path.name}.lock")):
            if job.wanted and path.is_file() and (digest := sha256_of(path)).startswith(job.wanted):
                return Download(path, "", digest, len(job.wanted), ())
            for url in urls:
                try:
                    _receive(url, job)
                    digest = _compare(url, job)
                except DownloadError as error:
                    failures.append(error)
                    continue
                sync_file(job.part)
                job.part.replace(path)
                sync_file(path.parent)
                _origin_file(job.part).unlink(missing_ok=True)
                return Download(path, url, digest, len(job.wanted), tuple(map(str, failures)))
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        fix = "free some space and fetch again" if full else "check the folder's permissions"
        reason = f"cannot be written: {error.strerror or error}"
        raise DownloadError("E-DOWNLOAD-012", reason, fix=fix, path=path) from error
    if len(failures) == 1:
        raise failures[0]
    reasons = "; ".join(f"{failure.path}: {failure.reason}" for failure in failures) or "none is known"
    raise DownloadError("E-DOWNLOAD-002", f"no address gave the file: {reasons}", fix=job.by_hand, path=path)


def _receive(url: str, job: _Job) -> None:
    """Fill the part file from one address, in as many attempts as bring something new."""
    address = url if urlsplit(url).scheme else Path(url).absolute().as_uri()
    scheme = urlsplit(address).scheme
    if scheme not in ("https", "http", "file"):
        raise DownloadError(
            "E-DOWNLOAD-003", f"{scheme}: is not supported", fix="use https:, file: or a path", path=url
        )
    backoff = () if scheme == "file" else job.backoff
    most, waits = 0, iter(backoff)
    while True:
        try:
            return _attempt(address, job)
        except _CutError as error:
            have = _size_of(job.part)
            if have > most:
                most, waits = have, iter(backoff)
            wait = next(waits, None)
            if wait is None:
                continues = have and _read_origin(job.part).validator
                kept = f"; {have} bytes are kept, the next attempt goes on from there" if continues else ""
                fix = f"check the address and the connection, or {job.by_hand}"
                raise DownloadError("E-DOWNLOAD-007", f"{error}{kept}", fix=fix, path=url) from error
        time.sleep(wait)


def _attempt(url: str, job: _Job) -> None:
    """Connect once and append what comes to the part file."""
    origin = _read_origin(job.part)
    have = _size_of(job.part) if origin.url == url and origin.validator else 0
    if have and have == origin.total:
        return
    request = Request(url, headers={"User-Agent": "nestseg"})  # noqa: S310  # the scheme was checked
    if have:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", origin.validator)
    with _on_network(url, job):
        response = job.opener.open(request, timeout=job.timeout)
    with response:
        start, told = _span(response.headers, is_part=response.status == 206)
        total = job.size if told is None else told
        _check_headers(url, job, headers=response.headers, total=total)
        if response.status != 206:
            have = 0  # the server knows no ranges, or its file is another one by now
        elif start != have or total != origin.total:
            job.part.unlink(missing_ok=True)
            raise _CutError("the file changed on the server")

        def read() -> bytes:
            with _on_network(url, job):
                return bytes(response.read(BLOCK))

        block = read()
        if not have:
            begin = block.lstrip().lower()
            _check_kind(
                url, job, kind=next((kind for mark, kind in _OTHER_STARTS.items() if begin.startswith(mark)), "")
            )
            job.part.unlink(missing_ok=True)
            with replaced_file(_origin_file(job.part)) as note:
                note.write_text(json.dumps([url, _validator(response.headers), total]), encoding="utf-8")
        # unbuffered, so that an error of the disk comes with the block that it is about
        with job.part.open("ab", buffering=0) as file:
            while block and (total is None or have <= total):
                rest = memoryview(block)
                while rest:
                    rest = rest[file.write(rest) :]
                have += len(block)
                job.on_progress(have, total)
                block = read()
    if total is not None and have < total:
        raise _CutError(f"the connection was cut after {have} of {total} bytes")


@contextmanager
def _on_network(url: str, job: _Job) -> Iterator[None]:
    """Tell what another attempt may mend from what it cannot. Errors of the disk pass elsewhere and are neither."""
    try:
        yield
    except HTTPError as error:
        error.close()
        if error.code == 416:  # what we have is no part of what the server has now
            job.part.unlink(missing_ok=True)
        elif error.code < 500:
            reason = f"HTTP {error.code}: {_REFUSALS.get(error.code, error.reason)}"
            wait = f"wait {error.headers.get('Retry-After', 'some')} seconds and fetch again"
            fix = wait if error.code == 429 else job.by_hand
            raise DownloadError("E-DOWNLOAD-005", reason, fix=fix, path=url) from error
        raise _CutError(f"HTTP {error.code}: {error.reason}") from error
    except (OSError, HTTPException) as error:
        cause = error.reason if isinstance(error, URLError) else error
        if isinstance(cause, ssl.SSLCertVerificationError):
            fix = "check the clock and the CA certificates of this machine (SSL_CERT_FILE)"
            reason = f"its certificate is not trusted: {cause.verify_message}"
            raise DownloadError("E-DOWNLOAD-008", reason, fix=fix, path=url) from error
        raise _CutError(getattr(cause, "strerror", None) or str(cause) or type(cause).__name__) from error


def _check_headers(url: str, job: _Job, *, headers: HTTPMessage, total: int | None) -> None:
    """Refuse what cannot be the file before a byte of it is kept."""
    _check_kind(url, job, kind="text/html" if headers.get_content_type() == "text/html" else "")
    if job.size not in (None, total):
        reason = f"the file has {total} bytes, expected {job.size}"
        raise DownloadError("E-DOWNLOAD-009", reason, fix=job.by_hand, path=url)
    if total is None and not job.wanted and headers.get("Transfer-Encoding") != "chunked":
        reason = "the server does not tell the length and no hash is known: half of it would look whole"
        raise DownloadError("E-DOWNLOAD-010", reason, fix=job.by_hand, path=url)


def _check_kind(url: str, job: _Job, *, kind: str) -> None:
    if kind:
        raise DownloadError("E-DOWNLOAD-004", f"got {kind}, expected {job.expected}", fix=job.by_hand, path=url)


def _compare(url: str, job: _Job) -> str:
    """Return the hash of the part file; a download that is not what was meant is put aside, a copy is deleted."""
    digest, size = sha256_of(job.part), _size_of(job.part)
    if digest.startswith(job.wanted) and job.size in (None, size):
        return digest
    bad = job.part.with_name(f"{job.part.stem}.bad-{digest[:8]}")
    is_copy = urlsplit(url).scheme in ("", "file")
    if is_copy:
        job.part.unlink()
    else:
        job.part.replace(bad)
    _origin_file(job.part).unlink(missing_ok=True)
    meant = [f"sha256 {job.wanted}{'' if len(job.wanted) == 64 else '...'}"] if job.wanted else []
    meant += [] if job.size is None else [f"{job.size} bytes"]
    reason = f"got sha256 {digest}, {size} bytes; expected {', '.join(meant)}"
    reason += "" if is_copy else f"; moved to {bad}"
    raise DownloadError("E-DOWNLOAD-011", reason, fix=f"do not use that file; {job.by_hand}", path=url)


def _size_of(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def _origin_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _read_origin(part: Path) -> _Origin:
    """Read the note beside a part file; one that is damaged counts as none, and the download starts anew."""
    try:
        url, validator, total = json.loads(_origin_file(part).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, TypeError):
        return _Origin("", "", None)
    return _Origin(url, validator, total)


def _validator(headers: HTTPMessage) -> str:
    """Return what If-Range may be given: a strong ETag, else the date; a weak ETag does not promise equal bytes."""
    etag = headers.get("ETag", "")
    return etag if etag.startswith('"') else headers.get("Last-Modified", "")


def _span(headers: HTTPMessage, *, is_part: bool) -> tuple[int, int | None]:
    """Return the first byte that a reply holds, and the length of the whole file if it is told."""
    if is_part:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", headers.get("Content-Range", ""))
        return (int(match[1]), int(match[2])) if match else (-1, None)
    length = headers.get("Content-Length", "")
    return 0, int(length) if length.isdecimal() else None
