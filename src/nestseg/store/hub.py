"""The Hugging Face Hub: model folders out, model files in.

Only ``model.safetensors`` and ``config.json`` are ever asked for, and the former is hashed on every load.
`huggingface_hub` keeps the files in its own cache and compares no more than sizes, so the sha256 that the Hub gave for
a commit is recorded apart, in the cache folder of nestseg.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from pydantic import ValidationError
from torch import Tensor

from nestseg.core.disk import cache_folder, replaced_file, sha256_of
from nestseg.core.errors import WeightsError
from nestseg.store.card import model_card
from nestseg.store.files import write_model_file
from nestseg.store.metadata import ModelMetadata

MODEL_FILE = "model.safetensors"
CONFIG_FILE, CARD_FILE = "config.json", "README.md"

_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_SPEC = re.compile(rf"hf:({_REPOSITORY.pattern})(?:@(\w[\w./-]*))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


class PretrainedFile(NamedTuple):
    """A model file from the Hub, and its commit: ``hf:owner/name@revision`` means this very file for ever."""

    path: Path
    revision: str


def write_pretrained(
    folder: Path, state: Mapping[str, Tensor], metadata: ModelMetadata, *, repository: str | None = None
) -> None:
    """Write a folder that `nestseg.load_model` and the Hub take: weights, config and model card.

    Args:
        folder: Made if absent; each file is replaced whole or not at all.
        state: See `write_model_file`.
        metadata: What the weights mean.
        repository: The ``owner/name`` that the card tells people to load; None for this folder.

    Raises:
        WeightsError: If something cannot be written.
    """
    config = {"library_name": "nestseg", **metadata.model_dump(mode="json")}
    _write_text(folder / CONFIG_FILE, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    _write_text(folder / CARD_FILE, model_card(metadata, repository=repository))
    write_model_file(folder / MODEL_FILE, state, metadata)


def check_config(file: Path, metadata: ModelMetadata) -> None:
    """Check that the ``config.json`` beside a model file, if there is one, says what the model file says.

    It is for people and for the Hub: what is in it builds no network and is never imported.

    Raises:
        WeightsError: If it cannot be read, says something else, or has fields of others, such as ``auto_map``.
    """
    path = file.with_name(CONFIG_FILE)
    if not path.exists():
        return
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(config, dict):
            config.pop("library_name", None)
        told = ModelMetadata.model_validate(config).model_dump(mode="json")
        differing = [name for name, value in metadata.model_dump(mode="json").items() if told[name] != value]
        problem = f"says something else than {file.name} in {', '.join(differing)}" if differing else None
    except ValidationError as error:
        found = [f"{'.'.join(map(str, each['loc']))!r} {each['msg'].lower()}" for each in error.errors()]
        problem = "; ".join(found[:3])[:300]
    except (OSError, ValueError, RecursionError) as error:
        problem = f"cannot be read: {_one_line(error)}"
    if problem is not None:
        fix = f"{file.name} is what counts: delete this file, or write both with save_pretrained"
        raise WeightsError("E-WEIGHTS-048", problem, fix=fix, path=path)


def upload_pretrained(
    repository: str, state: Mapping[str, Tensor], metadata: ModelMetadata, *, private: bool = False
) -> str:
    """Upload a model folder in one commit.

    Args:
        repository: ``owner/name``; made if absent.
        state: A state dict.
        metadata: What the weights mean.
        private: Whether a new repository is private; False leaves it to the owner's default, mostly public.

    Returns:
        What loads exactly this upload, ``hf:owner/name@revision``.

    Raises:
        WeightsError: If the name is malformed, huggingface_hub is not installed, or the Hub is away or refuses.
    """
    _match(_REPOSITORY, repository, form="owner/name")
    with TemporaryDirectory() as folder:
        write_pretrained(Path(folder), state, metadata, repository=repository)
        with _hub_errors(repository, repository=repository):
            from huggingface_hub import CommitOperationAdd, HfApi

            HfApi().create_repo(repository, private=private or None, exist_ok=True)
            # upload_folder may split what it uploads into several commits, and half a model is none
            files = [CommitOperationAdd(name, Path(folder, name)) for name in (MODEL_FILE, CONFIG_FILE, CARD_FILE)]
            commit = HfApi().create_commit(repository, files, commit_message="Upload model with nestseg")
    return f"hf:{repository}@{commit.oid}"


def fetch_pretrained(spec: str) -> PretrainedFile:
    """Bring a model file from the Hub into the cache, and check its sha256 on every call.

    A commit that is in the cache takes no request. Any other revision is looked up on every call.

    Args:
        spec: ``hf:owner/name`` for the branch ``main``, or ``hf:owner/name@revision`` with a branch, a tag, or a commit
            of 40 hex digits, which is what a recipe should name.

    Raises:
        WeightsError: As `upload_pretrained`; if the Hub has no such model, or the file is not what was published.
    """
    repository, revision = _match(_SPEC, spec, form="hf:owner/name or hf:owner/name@revision").groups()
    with _hub_errors(spec, repository=repository):
        from huggingface_hub import HfApi, hf_hub_download

        pinned = _COMMIT.fullmatch(revision or "")
        if pinned and (cached := _find_cached(repository, revision)) is not None:
            return cached
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
        files = {file.rfilename: file for file in info.siblings or ()}
        commit = info.sha or ""
        if not _COMMIT.fullmatch(commit) or (pinned and commit != revision):
            raise _not_there(spec, f"the Hub answered with commit {commit!r}")
        if MODEL_FILE not in files or (lfs := files[MODEL_FILE].lfs) is None:
            raise _not_there(spec, f"holds no {MODEL_FILE} in Git LFS, and nothing else is loaded from the Hub")
        if CONFIG_FILE in files:
            hf_hub_download(repository, CONFIG_FILE, revision=commit)
        pretrained = _check_file(Path(hf_hub_download(repository, MODEL_FILE, revision=commit)), commit, lfs.sha256)
    _write_text(_record_folder(repository) / f"{commit}.sha256", lfs.sha256 + "\n")
    return pretrained


def _match(pattern: re.Pattern[str], name: str, *, form: str) -> re.Match[str]:
    match = pattern.fullmatch(name)
    if match is None or ".." in name:
        raise WeightsError("E-WEIGHTS-040", "is no name on the Hub", fix=f"write it as {form}", path=name)
    return match


def _record_folder(repository: str) -> Path:
    return cache_folder() / "hub" / repository.replace("/", "--")


def _find_cached(repository: str, commit: str) -> PretrainedFile | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, MODEL_FILE, revision=commit)
    if not isinstance(found, str):
        return None
    path, record = Path(found), _record_folder(repository) / f"{commit}.sha256"
    if record.exists():
        return _check_file(path, commit, record.read_text(encoding="utf-8").strip())
    # fetched by another program: huggingface_hub names the file behind its link by the sha256 that the Hub gave
    name = path.readlink().name if path.is_symlink() else ""
    return _check_file(path, commit, name) if re.fullmatch(r"[0-9a-f]{64}", name) else None


def _check_file(path: Path, commit: str, sha256: str) -> PretrainedFile:
    found = sha256_of(path)
    if found != sha256:
        reason = f"sha256 is {found[:12]}..., published was {sha256[:12]}...: damaged, or changed since"
        raise WeightsError("E-WEIGHTS-047", reason, fix=f"delete {path.resolve()} and load it again", path=path)
    return PretrainedFile(path=path, revision=commit)


@contextmanager
def _hub_errors(spec: str, *, repository: str) -> Iterator[None]:
    """Word what goes wrong at the Hub; its progress bars show on a terminal only."""
    try:
        from httpx2 import HTTPError
        from huggingface_hub import constants
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]
    except ImportError as error:
        fix = 'pip install "nestseg[hub]"'
        raise WeightsError("E-WEIGHTS-041", "huggingface_hub is not installed", fix=fix, path=spec) from error
    # or it first fetches a list of programs, to tell the Hub which of them is at work
    constants.HF_HUB_DISABLE_TELEMETRY = True
    hidden = not sys.stderr.isatty() and "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ
    try:
        with disable_progress_bars() if hidden else nullcontext():
            yield
    except WeightsError:
        raise
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise _explain(error, spec, repository) from error


def _explain(error: BaseException, spec: str, repository: str) -> WeightsError:
    from httpx2 import TransportError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HfHubHTTPError | TransportError | OfflineModeIsEnabled):
        cause = cause.__cause__
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
    if status in (401, 403):
        reason = f"the Hub refuses ({status}): no such repository, or it needs a login, or its terms accepted"
        fix = "check the name; log in: hf auth login; accept the terms on the page of the model"
        return WeightsError("E-WEIGHTS-043", reason, fix=fix, path=spec)
    if status == 404:
        return _not_there(spec, "the Hub has no such repository or revision")
    if status == 429:
        fix = "wait some minutes, log in (hf auth login), or name a commit: one in the cache takes no request"
        return WeightsError("E-WEIGHTS-045", "the Hub refuses for now: too many requests (429)", fix=fix, path=spec)
    if status is None and cause is not None:
        records = sorted(_record_folder(repository).glob("*.sha256"), key=lambda record: record.stat().st_mtime_ns)
        known = f"name the commit that was loaded last, hf:{repository}@{records[-1].stem}" if records else None
        fix = f"connect to the network, or {known or 'copy the caches of a machine that has loaded it'}"
        return WeightsError("E-WEIGHTS-042", f"the Hub cannot be reached: {_one_line(cause)}", fix=fix, path=spec)
    told = ": ".join(_one_line(each) for each in (error, error.__cause__) if each is not None)
    fix = "try again; look at https://status.huggingface.co and at the space on your disk"
    return WeightsError("E-WEIGHTS-049", f"exchange with the Hub failed: {told}", fix=fix, path=spec)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _not_there(spec: str, reason: str) -> WeightsError:
    return WeightsError("E-WEIGHTS-044", reason, fix="check the name on the page of the model", path=spec)


def _write_text(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        fix = "free space on the disk, or choose a folder that is writable (NESTSEG_CACHE for the cache)"
        raise WeightsError("E-WEIGHTS-046", f"cannot be written: {_one_line(error)}", fix=fix, path=path) from error
