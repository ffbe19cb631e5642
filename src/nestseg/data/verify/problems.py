"""The kinds of problems that verification finds, and one problem of such a kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of problem.

    Args:
        code: Stable identifier.
        title: What such problems have in common.
        level: An error makes the data set unfit for training; a warning is something to know.
    """

    code: str
    title: str
    level: Literal["error", "warning"] = "error"


UNREADABLE = Kind(code="E-VERIFY-001", title="file that cannot be read")
NOT_REGULAR = Kind(code="E-VERIFY-002", title="not a regular file")
EMPTY = Kind(code="E-VERIFY-003", title="empty file")
WEB_PAGE = Kind(code="E-VERIFY-004", title="web page instead of a picture")
LFS_POINTER = Kind(code="E-VERIFY-005", title="git-lfs pointer instead of the file")
ZEROS = Kind(code="E-VERIFY-006", title="file of zero bytes alone")
NOT_A_PICTURE = Kind(code="E-VERIFY-007", title="not a picture")
DAMAGED = Kind(code="E-VERIFY-008", title="damaged picture")
CUT = Kind(code="E-VERIFY-009", title="picture without its end")
CHECKSUM = Kind(code="E-VERIFY-010", title="PNG part that differs from its checksum")
TRAILING = Kind(code="E-VERIFY-011", title="PNG with bytes after its end")
TOO_LARGE = Kind(code="E-VERIFY-012", title="picture above the size limit")
SAMPLE_DEPTH = Kind(code="E-VERIFY-013", title="picture whose samples are not read")
CRASHED = Kind(code="E-VERIFY-014", title="file that ends the process that decodes it")
HASH = Kind(code="E-VERIFY-015", title="file that differs from the manifest")
NOT_THERE = Kind(code="E-VERIFY-016", title="file of the manifest that is not there")
MANIFEST = Kind(code="E-VERIFY-017", title="manifest that cannot be read")
OTHER_TYPE = Kind(code="E-VERIFY-018", title="picture of another type than the data set file says")

NO_LABEL = Kind(code="E-VERIFY-020", title="image without label map")
NO_IMAGE = Kind(code="E-VERIFY-021", title="label map without image")
NO_FILES = Kind(code="E-VERIFY-022", title="name in a list that no file has")
NAMES_DIFFER = Kind(code="E-VERIFY-023", title="image and label map whose names differ in case or Unicode form")
REPEATED = Kind(code="E-VERIFY-024", title="two files of one stem")
SIZES = Kind(code="E-VERIFY-025", title="image and label map of different sizes")
LAYOUT = Kind(code="E-VERIFY-026", title="split that does not open")
LIST = Kind(code="E-VERIFY-027", title="list of a split")

LABEL_FORMAT = Kind(code="E-VERIFY-030", title="label map in a format that is not PNG")
LABEL_COLOURS = Kind(code="E-VERIFY-031", title="label map of colours instead of class ids")
LABEL_DEPTH = Kind(code="E-VERIFY-032", title="label map of another bit depth")
LABEL_VALUES = Kind(code="E-VERIFY-033", title="label value that the data set does not define")
LABEL_BLENDED = Kind(code="E-VERIFY-034", title="label map with in-between ids along its edges")
LABEL_COLOUR = Kind(code="E-VERIFY-035", title="label colour that the data set does not define")
LABELS_LOOK = Kind(code="E-VERIFY-036", title="what the labels look like, all together")
LABEL_IDS = Kind(code="E-VERIFY-037", title="label map of class ids instead of colours")

ABSENT_SPLIT = Kind(code="E-VERIFY-050", title="split that is not there", level="warning")
NO_FILES_AT_ALL = Kind(code="E-VERIFY-051", title="data set without files", level="warning")
IN_TWO_SPLITS = Kind(code="E-VERIFY-052", title="image of training and evaluation both", level="warning")
ODD_NAME = Kind(code="E-VERIFY-053", title="name that other tools stumble over", level="warning")
CLASHING_NAMES = Kind(code="E-VERIFY-054", title="names that are one name on other file systems", level="warning")
ALL_IGNORED = Kind(code="E-VERIFY-055", title="label map that is ignored as a whole", level="warning")
ABSENT_CLASS = Kind(code="E-VERIFY-056", title="class that never occurs", level="warning")
DOMINANT_CLASS = Kind(code="E-VERIFY-057", title="class that covers nearly everything", level="warning")
IMAGE_KIND = Kind(code="E-VERIFY-058", title="images that are not 8-bit RGB", level="warning")
ORIENTATION = Kind(code="E-VERIFY-059", title="images with an EXIF orientation", level="warning")
TINY = Kind(code="E-VERIFY-060", title="tiny images", level="warning")
DOUBTFUL = Kind(code="E-VERIFY-061", title="JPEG that a strict decoder refuses", level="warning")

KINDS: dict[str, Kind] = {kind.code: kind for kind in list(globals().values()) if isinstance(kind, Kind)}
"""Every kind by its code."""


class Problem(NamedTuple):
    """One thing that is wrong, where, and what to do.

    Example:
        >>> print(Problem(EMPTY.code, "train/7.png", "empty file", "fetch the file again"))
        E-VERIFY-003 | train/7.png | empty file | fix: fetch the file again
    """

    code: str
    path: str
    """The file or folder; control characters in it are escaped when it is shown."""
    reason: str
    fix: str
    split: str = ""

    def __str__(self) -> str:
        return f"{self.code} | {printable(self.path)} | {self.reason} | fix: {self.fix}"


def make_problem(kind: Kind, path: str, reason: str, *, fix: str) -> Problem:
    """Make a problem of a kind; the split is filled in where it is known."""
    return Problem(kind.code, path, reason, fix)


def printable(text: str) -> str:
    r"""Escape what would break a line or a terminal.

    Example:
        >>> printable("a\nb")
        'a\\nb'
    """
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def enumerate_names(names: list[str]) -> str:
    """Word a list of any length by its first ten.

    Example:
        >>> enumerate_names([str(number) for number in range(12)])
        '0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more'
    """
    more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
    return ", ".join(printable(name) for name in names[:10]) + more
