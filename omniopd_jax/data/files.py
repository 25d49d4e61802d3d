"""Rows of a prompts file in the form it has: .jsonl, .jsonl.gz, .json, .csv, .parquet; each with its place, within
bounds."""

import csv
import gzip
import io
import pathlib
import zlib
from collections.abc import Iterator

from omniopd_jax import config
from omniopd_jax.errors import UserError
from omniopd_jax.hf import bounded

LINE_BYTES = 16_000_000  # of one line: a prompt of 4 million tokens
WHOLE_BYTES = 512_000_000  # of a file that is read at once (.json, and a parquet file's row group, unpacked)
BLANK_LINES = 100_000  # in a row
UNPACKED = 200  # times its size that a .gz may become, beyond LINE_BYTES: text packs about 5 times, one letter 1,000
BOM = b"\xef\xbb\xbf"  # what some editors put in front of UTF-8
FORMS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")


def rows(path: str, setting: str) -> Iterator[tuple[str, int, dict]]:
    """(where, number, row) of every row of a file, one after the other; `where` names the file and the line, for
    errors.

    Args:
      path: of the file; any other ending than `FORMS` is read as JSON Lines.
      setting: the config key that errors name.

    Raises:
      UserError: one line: no such file, or a row that is none.
    """
    file = config.existing(path)
    if file is None or not file.is_file():
        raise UserError(f"{setting} = {path[:300]!r} is not a file")
    name = file.name.lower().removesuffix(".gz")
    try:
        if name.endswith(".parquet"):
            yield from _parquet(file)
        elif name.endswith(".csv"):
            yield from _csv(file)
        elif name.endswith(".json") and _is_array(file):
            yield from _array(file)
        else:
            yield from _json_lines(file)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{setting} = {path!r} cannot be read: {bounded.line(error)}") from error


def _open(file: pathlib.Path):
    return gzip.open(file) if file.name.lower().endswith(".gz") else file.open("rb")


def _lines(file: pathlib.Path) -> Iterator[tuple[int, bytes]]:
    """(number, line) of a file, unpacked where it is packed; no byte order mark."""
    packed = file.name.lower().endswith(".gz")
    most = LINE_BYTES + UNPACKED * file.stat().st_size
    read = blank = 0
    with _open(file) as stream:
        for number in range(1, 2**62):
            line = stream.readline(LINE_BYTES + 1)
            if not line:
                return
            read += len(line)
            if len(line) > LINE_BYTES:
                raise UserError(f"{file}, line {number}: longer than {LINE_BYTES:,} bytes, the most that is read")
            if packed and read > most:
                raise UserError(f"{file}, line {number}: unpacks to more than {UNPACKED} times its size: not text")
            blank = 0 if line.strip() else blank + 1
            if blank > BLANK_LINES:
                raise UserError(f"{file}, line {number}: more than {BLANK_LINES:,} blank lines in a row: not text")
            yield number, line.removeprefix(BOM) if number == 1 else line


def _text(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        hint = "; save it as UTF-8" if line[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in line else ""
        raise UserError(f"{where}: not UTF-8 text, so no JSON object ({error.reason}){hint}") from error


def _json_lines(file: pathlib.Path) -> Iterator[tuple[str, int, dict]]:
    for number, line in _lines(file):
        where = f"{file}, line {number}"
        if line.strip():
            yield where, number, _object(bounded.parse(_text(line, where), where), where)


def _is_array(file: pathlib.Path) -> bool:
    with _open(file) as stream:
        return stream.read(1 << 16).removeprefix(BOM).lstrip().startswith(b"[")


def _array(file: pathlib.Path) -> Iterator[tuple[str, int, dict]]:
    with _open(file) as stream:
        raw = stream.read(WHOLE_BYTES + 1)
    if len(raw) > WHOLE_BYTES:
        raise UserError(f"{file} is larger than {WHOLE_BYTES:,} bytes: save it as JSON Lines, one object per line")
    found = bounded.parse(_text(raw.removeprefix(BOM), str(file)), str(file))
    if not isinstance(found, list):
        raise UserError(f"{file} holds no list of objects")
    for number, row in enumerate(found, 1):
        yield f"{file}, row {number}", number, _object(row, f"{file}, row {number}")


def _csv(file: pathlib.Path) -> Iterator[tuple[str, int, dict]]:
    before, last = csv.field_size_limit(LINE_BYTES), 0  # the line on which the last good row ended
    try:
        lines = (_text(line, f"{file}, line {number}") for number, line in _lines(file))
        reader = csv.DictReader(lines, strict=True)  # else a quote that is not closed takes in all rows behind it
        names = list(reader.fieldnames or ())
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise UserError(
                f"{file}, line {reader.line_num}: the header names {', '.join(map(repr, twice))} more than once"
            )
        last = reader.line_num
        for row in reader:
            last = reader.line_num
            where = f"{file}, line {reader.line_num}"
            if None in row or None in row.values():
                raise UserError(f"{where}: not as many fields as the header names ({len(names)})")
            yield where, reader.line_num, row
    except csv.Error as error:
        raise UserError(
            f"{file}: the row that begins in line {last + 1} is not CSV ({bounded.line(error)}): a text with a quote "
            'is written in quotes, each of its own doubled: "is ""x""?"'
        ) from error
    finally:
        csv.field_size_limit(before)


def _parquet(file: pathlib.Path) -> Iterator[tuple[str, int, dict]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{file}: a parquet file needs the package pyarrow (requirements.txt)") from error
    if file.name.lower().endswith(".gz"):
        raise UserError(f"{file}: a parquet file packs itself; unpack the .gz")
    try:
        found = parquet.ParquetFile(io.BytesIO(b"") if not file.stat().st_size else file)
        groups = [found.metadata.row_group(i).total_byte_size for i in range(found.metadata.num_row_groups)]
        if max(groups, default=0) > WHOLE_BYTES:
            raise UserError(f"{file}: a row group of {max(groups):,} bytes; at most {WHOLE_BYTES:,} are read at once")
        number = 0
        for batch in found.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield f"{file}, row {number}", number, row
    except (pyarrow.ArrowException, ValueError) as error:
        raise UserError(f"{file}: not a parquet file that can be read ({bounded.line(error)})") from error


def _object(found, where: str) -> dict:
    if not isinstance(found, dict):
        raise UserError(f"{where}: expected an object with `prompt`, found {type(found).__name__}")
    return found
