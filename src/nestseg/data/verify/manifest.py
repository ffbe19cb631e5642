"""The manifest that `nestseg data prepare` leaves beside a layout: size and sha256 of every file."""

from __future__ import annotations

import json
import os
from pathlib import Path

from nestseg.data.verify import problems as kinds
from nestseg.data.verify.files import Expected
from nestseg.data.verify.problems import Problem, make_problem


def find_manifest(dataset: str, root: Path) -> Path | None:
    """Find ``NAME-manifest.json`` in a folder, or in the two above it, where VOC may be pointed at from inside."""
    folder = Path(os.path.abspath(root))  # noqa: PTH100 -- resolve() would follow links, and paths would not match
    candidates = [place / f"{dataset}-manifest.json" for place in (folder, *folder.parents[:2])]
    return next((path for path in candidates if path.is_file()), None)


def read_expected(path: Path) -> tuple[dict[str, Expected], tuple[Problem, ...]]:
    """Read what a manifest says about files.

    Args:
        path: An absolute path.

    Returns:
        What is expected, by absolute path; and what is wrong with the manifest itself.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["files"]
        expected = {
            str(path.parent / entry["path"]): Expected(int(entry["size"]), bytes.fromhex(entry["sha256"]))
            for entry in entries
        }
        if any(len(entry.sha256) != 32 for entry in expected.values()):
            raise ValueError("a sha256 that has not 64 hex digits")
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        reason = f"no list of path, size and sha256 ({type(error).__name__}: {kinds.printable(str(error))})"
        return {}, (make_problem(kinds.MANIFEST, str(path), reason, fix="prepare the data set again, or delete it"),)
    return expected, ()
