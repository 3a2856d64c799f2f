"""Text files as they are written, and as they get broken."""

import os

import pytest

from union_igrot.errors import DataError
from union_igrot.storage.text import read_csv, read_json, read_json_lines, read_lines, refuse_repeated


def write(folder, content):
    file = folder / "file"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def test_lines(tmp_path):
    file = write(tmp_path, b"\xef\xbb\xbf a \r\n \n\nb\xe2\x80\xa8c")
    assert list(read_lines(file)) == [(f"{file}, line 1", " a "), (f"{file}, line 4", "b\u2028c")]
    assert next(read_lines(write(tmp_path, b"\xff.jpg"), "surrogateescape"))[1] == "\udcff.jpg"


def test_json(tmp_path):
    assert read_json(write(tmp_path, '\ufeff{"a": 1}')) == {"a": 1}
    for between in ("", "\n", " , "):
        assert read_json(write(tmp_path, f" 1{between or ' '}[2]\n"), concatenated=True) == [1, [2]]
    file = write(tmp_path, '{"a": 1}\n\n[2]\n')
    assert list(read_json_lines(file)) == [(f"{file}, line 1", {"a": 1}), (f"{file}, line 3", [2])]


def test_csv(tmp_path):
    file = write(tmp_path, 'a,"b\nc"\n\nd,e\n')
    assert list(read_csv(file)) == [(f"{file}, line 1", ["a", "b\nc"]), (f"{file}, line 4", ["d", "e"])]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_files_of_windows(tmp_path, encoding):
    def encoded(text):
        return write(tmp_path, f"\ufeff{text}".encode(encoding))

    assert [line for _, line in read_lines(encoded("é\r\n\r\nb"))] == ["é", "b"]
    assert read_json(encoded('{"ü": 1}')) == {"ü": 1}
    assert [cells for _, cells in read_csv(encoded('a;b\r\n"1;2";é,è\r\n'))] == [["a", "b"], ["1;2", "é,è"]]


@pytest.mark.parametrize(
    ("header", "separator"), [("path", ","), ("a,b;c", ","), ("a;b;c,d", ";"), ("a\tb;c\td", "\t")]
)
def test_the_first_line_decides_what_separates_cells(tmp_path, header, separator):
    rows = [cells for _, cells in read_csv(write(tmp_path, f"{header}\n1{separator}2\n"))]
    assert rows == [header.split(separator), ["1", "2"]]


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (read_lines, b"a\n\xff\n", "line 2: not UTF-8"),
        (read_csv, b"a\n\xff\n", "line 2: not UTF-8"),
        (read_lines, b"\xff\xfea\0\n", "line 1: not UTF-8"),
        (read_csv, 'a\n"b\n', "line 2: not CSV"),
        (read_json, '[1,\n"a', "line 2: not JSON"),
        (read_json, '{"a": 1, "a": 2}', "duplicate key 'a'"),
        (read_json_lines, '1\n{"a": 1, "a": 2}', "line 2: .*duplicate key 'a'"),
        (read_json_lines, "1\n[", "line 2: not JSON"),
        (read_json_lines, "9" * 5000, "line 1: not usable JSON"),
    ],
)
def test_an_error_names_file_and_line(tmp_path, read, content, message):
    file = write(tmp_path, content)
    with pytest.raises(DataError, match=message) as error:
        list(read(file))
    assert str(file) in str(error.value)


@pytest.mark.parametrize("read", [read_lines, read_csv, read_json_lines, read_json])
def test_a_file_that_cannot_be_read(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "none", tmp_path, f"{tmp_path}/\0", tmp_path / "pipe"):
        with pytest.raises(DataError, match="cannot be read"):
            list(read(path))


def test_a_repeated_value_names_both_places():
    seen = {}
    refuse_repeated("a", "line 1", seen)
    with pytest.raises(DataError, match="line 2: 'a' repeats line 1"):
        refuse_repeated("a", "line 2", seen)
