"""Reads and writes tables: JSONL, CSV, Parquet, Arrow, or a folder of media with captions beside
them.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from sora_lightning.checks import import_optional
from sora_lightning.data.decoding.images import IMAGES
from sora_lightning.data.manifest.roots import HOLDERS, Roots, is_address, local_path

SUFFIXES = (".jsonl", ".csv", ".parquet", ".arrow")
ARROW_ROWS = 2**14
VIDEOS = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg"),
    *(".wmv", ".flv", ".3gp", ".ogv", ".gif"),
)
MEDIA = VIDEOS + IMAGES
# Cells of these columns are text, whatever they look like.
_TEXT = (
    *("path", "source", "shard", "litdata", "content", "look", "decoder_reason", "duplicate_of"),
)

Row = dict[str, Any]


def is_caption(column: str) -> bool:
    """Return True for columns of captions, whose cells are text or lists of wordings."""
    return column in ("text", "prompt") or column.startswith("caption")


def read_rows(source: Path, root: str | None = None) -> Iterator[tuple[str, Row]]:
    """Yield the rows of ``parse_rows``. Raises ``ValueError`` for one that names a file outside of
    the manifest's folder and of ``root``.
    """
    source = Path(source)
    return parse_rows(source, Roots(source, root))


def parse_rows(source: Path, roots: Roots | None = None) -> Iterator[tuple[str, Row]]:
    """Yield each row with its place for messages: ``file:line``, or the file's path in a folder.

    Without ``roots`` rows may name any file: for readers that open none of them.

    Text is UTF-8, with or without a byte order mark. CSV cells are separated by commas; numbers are
    parsed, empty cells are absent, and a caption may be a JSON list. Folders are searched to any
    depth, links included, except hidden files. The caption of a video or image is the text file of
    the same name, and its path is relative to the folder. Files of other suffixes are counted in a
    warning. Raises ``ValueError`` for anything else.
    """
    source = Path(source)
    for place, row in _folder(source, roots) if source.is_dir() else _table(source):
        if roots is not None:
            roots.require(place, row)
        yield place, row


def _table(source: Path) -> Iterator[tuple[str, Row]]:
    if not source.is_file():
        raise ValueError(f"{source}: no such manifest")
    suffix = source.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(
            f"{source}: a manifest must be a folder, or end in one of {', '.join(SUFFIXES)}"
        )
    try:
        if suffix == ".csv":
            yield from _csv(source)
        elif suffix == ".parquet":
            yield from _parquet(source)
        elif suffix == ".arrow":
            rows = itertools.chain.from_iterable(arrow_batches(source, ARROW_ROWS))
            for number, row in enumerate(rows, start=1):
                yield f"{source}:{number}", {k: v for k, v in row.items() if v is not None}
        else:
            yield from _jsonl(source)
    except UnicodeDecodeError as error:
        kind = suffix.lstrip(".").upper()
        raise ValueError(f"{source}: not a {kind} manifest in UTF-8: {error}") from error


def _folder(folder: Path, roots: Roots | None) -> Iterator[tuple[str, Row]]:
    passed_over: Counter[str] = Counter()
    for path in sorted(_files(folder)):
        if path.suffix.lower() not in MEDIA:
            passed_over[path.suffix.lower() or path.name] += path.suffix.lower() != ".txt"
            continue
        row: Row = {"path": path.relative_to(folder).as_posix()}
        text = _text_beside(path)
        if text is not None:
            if roots is not None:
                roots.require(str(text), {"path": text.relative_to(folder).as_posix()})
            try:
                row["caption"] = text.read_text(encoding="utf-8-sig").strip()
            except UnicodeDecodeError as error:
                raise ValueError(f"{text}: not text in UTF-8: {error}") from error
        yield str(path), row
    if passed_over := +passed_over:
        endings = ", ".join(f"{count} {ending}" for ending, count in passed_over.most_common())
        warnings.warn(f"{folder}: files of other kinds are left out: {endings}", stacklevel=2)


def _files(folder: Path) -> Iterator[Path]:
    """Return the files of a folder to any depth, except hidden ones; targets of links come once."""
    waiting, linked, seen = [folder], list[Path](), set[str]()
    while waiting or linked:
        inside = waiting.pop() if waiting else linked.pop(0)
        if (real := os.path.realpath(inside)) in seen:
            continue
        seen.add(real)
        for entry in sorted(os.scandir(inside), key=lambda entry: entry.name):
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            if entry.is_dir():
                (linked if entry.is_symlink() else waiting).append(Path(entry.path))
            elif entry.is_file():
                yield Path(entry.path)


def _text_beside(medium: Path) -> Path | None:
    """Return the text file of the same name, with its suffix in lower or upper case."""
    texts = (medium.with_suffix(suffix) for suffix in (".txt", ".TXT"))
    return next((text for text in texts if text.is_file()), None)


def _jsonl(source: Path) -> Iterator[tuple[str, Row]]:
    with source.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{source}:{number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{place}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(
                    f"{place}: {line.strip()[:60]} is not a JSON object with path and caption"
                )
            yield place, row


def _csv(source: Path) -> Iterator[tuple[str, Row]]:
    with source.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        try:
            _check_header(source, reader.fieldnames or ())
            for cells in reader:
                place = f"{source}:{reader.line_num}"
                if None in cells or None in cells.values():
                    columns = len(reader.fieldnames or ())
                    raise ValueError(f"{place}: does not have the {columns} cells of the header")
                yield (
                    place,
                    {key: _cell(key, value) for key, value in cells.items() if value != ""},
                )
        except csv.Error as error:
            raise ValueError(f"{source}:{reader.line_num}: not CSV: {error}") from error


def _check_header(source: Path, names: Sequence[str]) -> None:
    found = [separator for separator in ";\t|" if len(names) == 1 and separator in names[0]]
    if found:
        raise ValueError(
            f"{source}:1: {names[0][:60]!r}: cells must be separated by commas, not by {found[0]!r}"
        )
    for index, name in enumerate(names):
        if name != name.strip():
            raise ValueError(
                f"{source}:1: {name!r}: a column's name must not begin or end in space"
            )
        if name and name in names[:index]:
            raise ValueError(f"{source}:1: the column {name!r} stands twice")


def _cell(column: str, text: str) -> Any:
    if is_caption(column) and text.startswith("["):
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return text
    if is_caption(column) or column in _TEXT:
        return text
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _parquet(source: Path) -> Iterator[tuple[str, Row]]:
    parquet = _pyarrow(source).parquet
    try:
        file = parquet.ParquetFile(source, memory_map=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source}: not a Parquet file: {error}") from error
    with file:
        number = 0
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{source}:{number}", {k: v for k, v in row.items() if v is not None}


def arrow_table(source: Path) -> Any:
    """Return a memory-mapped Arrow file (IPC, uncompressed). Raises ``ValueError``."""
    pyarrow = _pyarrow(source)
    try:
        return pyarrow.ipc.open_file(pyarrow.memory_map(str(source))).read_all()
    except (OSError, ValueError) as error:
        raise ValueError(f"{source}: not an Arrow file: {error}") from error


def arrow_batches(source: Path, num_rows: int) -> Iterator[list[Row]]:
    """Yield the rows of an Arrow file, so many at a time; absent cells are ``None``."""
    for batch in arrow_table(source).to_batches(max_chunksize=num_rows):
        yield batch.to_pylist()


def _pyarrow(path: Path) -> Any:
    pyarrow = import_optional("pyarrow", f"{path}: a table in Parquet or Arrow", "parquet")
    for module in ("pyarrow.ipc", "pyarrow.parquet"):
        import_module(module)
    return pyarrow


def check_target(target: Path) -> None:
    """Raise ``ValueError`` unless rows can be written in the format that the suffix names."""
    if target.suffix not in SUFFIXES:
        raise ValueError(f"{target}: must end in one of {', '.join(SUFFIXES)}")
    if target.suffix in (".parquet", ".arrow"):
        _pyarrow(target)


def write_rows(target: Path, rows: Iterable[Row]) -> None:
    """Write rows in the format of the suffix, to a temporary file that is then renamed.

    Formats of fixed columns iterate over the rows twice, and hold few of them at a time.
    """
    check_target(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    if isinstance(rows, Iterator):
        rows = list(rows)
    if target.suffix in (".parquet", ".arrow"):
        _write_arrow(target, partial, rows)
    elif target.suffix == ".csv":
        columns = list(dict.fromkeys(key for row in rows for key in row))
        with partial.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows({key: _text(value) for key, value in row.items()} for row in rows)
    else:
        write_lines(partial, rows)
    partial.replace(target)


def _write_arrow(target: Path, partial: Path, rows: Iterable[Row]) -> None:
    pyarrow = _pyarrow(target)
    schema = _schema(pyarrow, rows)
    listed = [
        field.name
        for field in schema
        if is_caption(field.name) and pyarrow.types.is_list(field.type)
    ]
    if target.suffix == ".parquet":
        file = pyarrow.parquet.ParquetWriter(partial, schema)
    else:
        file = pyarrow.ipc.new_file(str(partial), schema)
    with file:
        for part in _parts(rows):
            part = [_listed(row, listed) for row in part]
            file.write_batch(pyarrow.RecordBatch.from_pylist(part, schema=schema))


def _schema(pyarrow: Any, rows: Iterable[Row]) -> Any:
    """Return the columns of all rows, each with a type that holds every value."""
    schema, listed = pyarrow.schema([]), set[str]()
    for part in _parts(rows):
        names = dict.fromkeys(key for row in part for key in row)
        part = [{name: row.get(name) for name in names} for row in part]
        for row in part:
            wordings = {name for name in row if is_caption(name) and isinstance(row[name], list)}
            row.update(dict.fromkeys(wordings))
            listed |= wordings
        of_part = pyarrow.RecordBatch.from_pylist(part).schema
        schema = pyarrow.unify_schemas([schema, of_part], promote_options="permissive")
    wording = [("text", pyarrow.string()), ("weight", pyarrow.float64())]
    for name in listed:
        caption = pyarrow.field(name, pyarrow.list_(pyarrow.struct(wording)))
        schema = schema.set(schema.names.index(name), caption)
    return schema


def _parts(rows: Iterable[Row]) -> Iterator[list[Row]]:
    coming = iter(rows)
    while part := list(itertools.islice(coming, ARROW_ROWS)):
        yield part


def write_lines(target: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSON, one a line."""
    with target.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _listed(row: Row, names: Sequence[str]) -> Row:
    """Return the row with captions as lists of objects, as columns of one type need."""
    given = {name: row[name] for name in names if row.get(name) is not None}
    for name, caption in given.items():
        wordings = caption if isinstance(caption, list) else [caption]
        given[name] = [w if isinstance(w, dict) else {"text": w} for w in wordings]
    return {**row, **given}


def _text(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else value


def file_identity(path: Path) -> tuple[object, ...]:
    """Return a value that all spellings, links and hard links of one file share."""
    try:
        stat = path.stat()
    except OSError:
        return (os.path.realpath(path),)
    return stat.st_dev, stat.st_ino


def has_source(row: Row, folder: Path) -> bool:
    """Return True if the column ``source`` names a file in this folder instead of a provenance."""
    source = row.get("source")
    return isinstance(source, str) and bool(source) and (folder / source).is_file()


def with_moved_source(row: Row, folder: Path, output: Path) -> Row:
    """Return the row with its ``source`` relative to another folder."""
    if not has_source(row, folder) or Path(row["source"]).is_absolute():
        return row
    moved = os.path.relpath((folder / row["source"]).absolute(), output.absolute())
    return {**row, "source": moved}


def moved_row(row: Row, folder: Path, output: Path) -> Row:
    """Return the row with its paths relative to another folder.

    The ``path`` of a clip in a shard is a name, by which its latents are found, and stays.
    """
    row = with_moved_source(row, folder, output)
    for key in [key for key in HOLDERS if row.get(key) is not None] or ["path"]:
        place = str(row[key])
        path = Path(local_path(place))
        if not is_address(place) and not path.is_absolute():
            row = {**row, key: os.path.relpath((folder / path).absolute(), output.absolute())}
    return row
