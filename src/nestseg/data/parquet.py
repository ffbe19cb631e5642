"""Hugging Face parquet files of pictures and label maps, read by row. Needs the extra ``nestseg[parquet]``."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nestseg.core.errors import DataError


class ParquetRows:
    """The rows of some parquet files, by index.

    A file is read a row group at a time, and the last group stays in memory: in order this is fast, at random each row
    costs the reading of its group (100 to 1,000 pictures in most published files). For training, make a packed copy.

    Args:
        files: The files.
        columns: Names of the columns of encoded pictures: binary, or the structure {bytes, path} of ``datasets``.

    Raises:
        DataError: E-DATA-036 without pyarrow; E-DATA-037 for a file that is no parquet file or lacks a column.
    """

    def __init__(self, files: Sequence[Path], columns: Sequence[str]) -> None:
        self._columns = tuple(columns)
        self._groups: list[tuple[Path, int]] = []
        self._ends: list[int] = []
        self.names: list[str] = []
        """Name of the file and number of the row, by index."""
        for file in files:
            self._add(file)
        self._held: tuple[int, list[Any]] = (-1, [])

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> list[bytes]:
        """Read the columns of a row: encoded pictures.

        Raises:
            DataError: E-DATA-037 if the file cannot be read or has no picture there.
        """
        group = bisect_right(self._ends, index)
        file, number = self._groups[group]
        if self._held[0] != group:
            # freed first: two groups at a time would double the memory
            self._held = (-1, [])
            try:
                table = _open(file).read_row_group(number, columns=list(self._columns))
            except (OSError, ValueError, _arrow().lib.ArrowException) as error:
                raise _unreadable(file, f"row group {number} is damaged: {error}") from error
            self._held = (group, [table.column(name) for name in self._columns])
        row = index - (self._ends[group - 1] if group else 0)
        values = [column[row].as_py() for column in self._held[1]]
        contents: list[bytes] = []
        for name, value in zip(self._columns, values, strict=True):
            content = value.get("bytes") if isinstance(value, dict) else value
            if not isinstance(content, bytes):
                reason = f"column {name} of {self.names[index]} holds no encoded picture, but {type(content).__name__}"
                raise _unreadable(file, reason)
            contents.append(content)
        return contents

    def __getstate__(self) -> dict[str, Any]:
        # a loader worker gets the index, not the pictures
        return self.__dict__ | {"_held": (-1, [])}

    def _add(self, file: Path) -> None:
        # a pipe would block the reader for ever
        if not file.is_file():
            raise _unreadable(file, "not a regular file")
        try:
            parquet = _open(file)
        except (OSError, ValueError, _arrow().lib.ArrowException) as error:
            raise _unreadable(file, f"no parquet file: {error}") from error
        missing = [name for name in self._columns if name not in parquet.schema_arrow.names]
        if missing:
            raise _unreadable(
                file, f"no column {' and '.join(missing)}; there are: {', '.join(parquet.schema_arrow.names)}"
            )
        for number in range(parquet.num_row_groups):
            self._groups.append((file, number))
            num_rows = parquet.metadata.row_group(number).num_rows
            self._ends.append((self._ends[-1] if self._ends else 0) + num_rows)
        self.names += [f"{file.stem}-{row:06d}" for row in range(parquet.metadata.num_rows)]


def list_columns(file: Path) -> list[str]:
    """Return the columns of a parquet file that may hold encoded pictures.

    Raises:
        DataError: E-DATA-036 without pyarrow; E-DATA-037 if it is no parquet file.
    """
    arrow = _arrow()
    try:
        schema = _open(file).schema_arrow
    except (OSError, ValueError, arrow.lib.ArrowException) as error:
        raise _unreadable(file, f"no parquet file: {error}") from error
    types = arrow.types
    return [
        field.name
        for field in schema
        if types.is_binary(field.type)
        or types.is_large_binary(field.type)
        or (types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0)
    ]


def _open(file: Path) -> Any:
    from pyarrow import parquet  # type: ignore[import-untyped]

    return parquet.ParquetFile(file)


def _arrow() -> Any:
    try:
        import pyarrow.types  # type: ignore[import-untyped]
    except ImportError as error:
        raise DataError(
            "E-DATA-036", "parquet files need pyarrow, which is not here", fix="pip install 'nestseg[parquet]'"
        ) from error
    return pyarrow


def _unreadable(file: Path, reason: str) -> DataError:
    return DataError(
        "E-DATA-037",
        " ".join(reason.split()),
        fix="fetch the file again, or name other columns in the data set file",
        path=file,
    )
