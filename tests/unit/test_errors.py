"""The one shape of an error: a line, and a table under it where there is one."""

from __future__ import annotations

import pickle

import pytest

from nestseg.core.errors import DataError, WeightsError

TABLE = ("missing  layer1.weight", "missing  layer2.weight")


def test_an_error_is_one_line_with_code_path_reason_and_fix():
    error = DataError("E-DATA-999", "label value 37; allowed 0-18", fix="map it", path="a/7.png")
    assert str(error) == "E-DATA-999 | a/7.png | label value 37; allowed 0-18 | fix: map it"
    assert error.table == ()


def test_a_table_stands_under_the_line():
    error = WeightsError("E-WEIGHTS-999", "does not fit", fix="take another", path="a.pth", table=list(TABLE))
    assert str(error).splitlines() == ["E-WEIGHTS-999 | a.pth | does not fit | fix: take another", *TABLE]


@pytest.mark.parametrize("path", [None, "a.pth"])
def test_a_table_outlives_pickling_and_a_path_that_comes_later(path):
    error = WeightsError("E-WEIGHTS-999", "does not fit", fix="take another", path=path, table=TABLE)
    for copy in (pickle.loads(pickle.dumps(error)), error.at("b.pth")):
        assert type(copy) is WeightsError
        assert copy.table == TABLE
        assert str(copy).endswith("\n".join(["", *TABLE]))
    assert error.at("b.pth").path == (path or "b.pth")
