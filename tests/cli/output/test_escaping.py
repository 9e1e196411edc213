import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifarx.output.escaping import csv_cell, markdown_text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lzh_9.onnx", "lzh_9.onnx"),
        ("<img src=x onerror=alert(1)>", "&lt;img src=x onerror=alert(1)&gt;"),
        ("a|b", r"a\|b"),
        ("a\\|b", r"a\\\|b"),
        ("![x](http://example.org)", r"!\[x\](http://example.org)"),
        ("`code`", r"\`code\`"),
        ("two\nlines", "two�lines"),
        ("&amp;", "&amp;amp;"),
    ],
)
def test_markdown_shows_a_name_as_text(name: str, expected: str) -> None:
    assert markdown_text(name) == expected


@pytest.mark.parametrize("name", ['=HYPERLINK("http://example.org","x")', "+1", "-1+2", "@SUM(A1)", "  =1"])
def test_a_spreadsheet_computes_no_cell(name: str) -> None:
    assert csv_cell(name).startswith("'")


@pytest.mark.parametrize("name", ["cat", "a=b", "3-4", "", "é", "'quoted'"])
def test_other_cells_stay_the_same(name: str) -> None:
    assert csv_cell(name) == name


@given(st.lists(st.text(), min_size=1, max_size=3))
def test_a_row_stays_one_line(names: list[str]) -> None:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerow([csv_cell(name) for name in names])
    assert file.getvalue().count("\n") == 1
    assert len(next(csv.reader([file.getvalue()]))) == len(names)
