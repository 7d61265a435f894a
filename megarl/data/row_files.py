"""The rows of a file as JSON objects, each with its place: JSON lines, a JSON array, CSV, TSV or Parquet, also gzipped.

Whatever is wrong with a file is a DataError that names the line or row and says what to do.
"""

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from megarl.errors import DataError, quoted

Objects = Iterator[tuple[str, dict[str, Any]]]

_GZIP = b"\x1f\x8b"
_PARQUET = b"PAR1"
_OTHER_COMPRESSION = {b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip"}
_LARGEST_CELL = 1 << 30  # characters; the csv module's own limit is 131,072
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_objects(path: Path) -> Objects:
    """Yield the objects of a file, each with its place: ``file:line``, ``file row 3`` (from 0) where it has no lines.

    Raises:
        DataError: the file cannot be read or has no rows, or one of them is not an object.
    """
    is_empty = True
    try:
        with path.open("rb") as file:
            head = file.read(6)
        for begin, name in _OTHER_COMPRESSION.items():
            if head.startswith(begin):
                raise DataError(f"{path} is compressed with {name}; unpack it, or compress it with gzip")
        for item in _parquet_rows(path) if head.startswith(_PARQUET) else _text_rows(path, is_gzipped=head.startswith(_GZIP)):
            is_empty = False
            yield item
    except IsADirectoryError:
        raise DataError(f"{path} is a folder; name a file in it, or set type: datasets to read a folder of a dataset") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a whole gzip file ({error}); copy or compress it again") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}; give the path of a file with rows") from error
    if is_empty:
        raise DataError(f"{path} has no rows; write one JSON object a line")


def _text_rows(path: Path, *, is_gzipped: bool) -> Objects:
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it takes for line ends.
    with gzip.open(path, "rb") if is_gzipped else path.open("rb") as file:
        begin = file.read(4)
        if begin.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in begin:
            raise DataError(
                f"{path} is not UTF-8 text but UTF-16; save it as UTF-8: iconv -f utf-16 -t utf-8 {path.name} > utf8-{path.name}"
            )
        file.seek(len(codecs.BOM_UTF8) if begin.startswith(codecs.BOM_UTF8) else 0)
        names = [suffix.lower() for suffix in path.suffixes]
        if ".csv" in names or ".tsv" in names:
            yield from _csv_rows(path, file, "\t" if ".tsv" in names else ",")
            return
        position = file.tell()
        first = file.read(4096).lstrip()
        file.seek(position)
        # an array in a .jsonl may also be a line of its own, which is an error of that line
        yield from _array_rows(path, file) if first.startswith(b"[") and ".jsonl" not in names else _json_lines(path, file)


def _json_lines(path: Path, file: Any) -> Objects:
    number = 0
    for line in file:
        # where \n ends no line, \r may; in JSON it stands nowhere else, as strings hold it escaped
        for part in line.rstrip(b"\r\n").split(b"\r"):
            number += 1
            if part.strip():
                location = f"{path}:{number}"
                yield location, parse_object(_decoded(part, path, location), location)


def _array_rows(path: Path, file: Any) -> Objects:
    values = _parse(_decoded(file.read(), path, str(path)), str(path), "write an array of objects, or one JSON object a line")
    for index, value in enumerate(values if isinstance(values, list) else [values]):
        location = f"{path} row {index}"
        _refuse_surrogates(value, location)
        yield location, _checked(value, location)


def _csv_rows(path: Path, file: Any, delimiter: str) -> Objects:
    csv.field_size_limit(_LARGEST_CELL)
    location = f"{path}:1"
    reader = csv.reader(io.StringIO(_decoded(file.read(), path, str(path)), newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        if repeated := {name for name in header if header.count(name) > 1}:
            raise DataError(f"{location}: two columns are called {quoted(min(repeated))}; rename one")
        line = reader.line_num
        for cells in reader:
            location, line = f"{path}:{line + 1}", reader.line_num
            if not cells:
                continue
            if len(cells) != len(header):
                raise DataError(f"{location}: {len(cells)} cells under {len(header)} column names; put cells with commas in quotes")
            yield location, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not CSV ({error}); write it again with quotes around cells") from error


def _parquet_rows(path: Path) -> Objects:
    import pyarrow  # here, because it takes a while and other files do without
    import pyarrow.parquet

    index = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                yield f"{path} row {index}", row
                index += 1
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:100]
        raise DataError(f"{path} cannot be read as Parquet near row {index} ({reason}); write it again") from error


def parse_object(line: str, location: str) -> dict[str, Any]:
    """Return the JSON object of a line; DataError with its place when it is none, or one that is ambiguous."""
    value = _parse(line, location, "write one JSON object a line")
    if _ESCAPED_SURROGATE.search(line):
        _refuse_surrogates(value, location)
    return _checked(value, location)


def _parse(text: str, location: str, advice: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _object(pairs, location))
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise DataError(f"{location}: not JSON ({error.msg.removesuffix(' at')} at {where}); {advice}") from error
    except RecursionError:
        raise DataError(f"{location}: its brackets are nested too deeply to be read; flatten the row or leave it out") from None
    except ValueError:  # Python's limit of 4300 digits
        raise DataError(f"{location}: a number has thousands of digits; write it as a string or leave the row out") from None


def _object(pairs: list[tuple[str, object]], location: str) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{location}: the key {quoted(repeated)} stands twice in one object; leave one")
    return value


def _checked(value: object, location: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{location}: a {type(value).__name__}, not a JSON object; write one object a line")
    return value


def _refuse_surrogates(value: object, location: str, path: str = "") -> None:
    """Refuse a row with half of a character in a string, which no file and no tokenizer could hold."""
    if isinstance(value, str):
        refuse_surrogate(value, f"{location}: field '{path}'")
    elif isinstance(value, dict):
        for name, item in value.items():
            refuse_surrogate(name, f"{location}: a field's name")
            _refuse_surrogates(item, location, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _refuse_surrogates(item, location, f"{path}.{index}" if path else str(index))


def refuse_surrogate(text: str, where: str) -> None:
    """Raise DataError when a text holds half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise DataError(f"{where} has {half} at character {error.start}, half of a surrogate pair; repair or remove it") from None


def _decoded(data: bytes, path: Path, location: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        _refuse_encoding(path, location, error)


def _refuse_encoding(path: Path, location: str, error: UnicodeDecodeError) -> NoReturn:
    byte = error.object[error.start]
    raise DataError(
        f"{location}: not UTF-8 text (byte 0x{byte:02x} at {error.start}); save it as UTF-8, e.g. for Latin-1: "
        f"iconv -f latin1 -t utf-8 {path.name} > utf8-{path.name}"
    ) from error
