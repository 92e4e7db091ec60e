"""Tables as other programs and other people write them."""

from __future__ import annotations

import codecs
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from sora_lightning.data.manifest import read_manifest, read_table
from sora_lightning.data.manifest.split import split


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).touch()
    return tmp_path


def captions(source: Path) -> list[str]:
    return [record.captions[0] for record in read_manifest(source)]


LINES = {
    ".csv": "path,caption\r\na.mp4,ein grüner Kreis\r\n",
    ".jsonl": json.dumps({"path": "a.mp4", "caption": "ein grüner Kreis"}) + "\r\n",
}


@pytest.mark.parametrize("suffix", LINES)
def test_a_byte_order_mark_is_no_part_of_the_first_word(suffix: str, folder: Path) -> None:
    path = folder / f"bom{suffix}"
    path.write_bytes(codecs.BOM_UTF8 + LINES[suffix].encode())
    assert captions(path) == ["ein grüner Kreis"]


def test_a_byte_order_mark_is_no_part_of_a_caption(folder: Path) -> None:
    (folder / "a.txt").write_bytes(codecs.BOM_UTF8 + b"a red circle")
    (folder / "b.TXT").write_text("a blue square")
    assert captions(folder) == ["a red circle", "a blue square"]


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1", "cp1252"])
@pytest.mark.parametrize("name", ["clips.csv", "clips.jsonl", "texts/a.txt"])
def test_another_encoding_is_named_with_its_file(name: str, encoding: str, folder: Path) -> None:
    (folder / "texts").mkdir()
    (folder / "texts" / "a.mp4").touch()
    row = {"path": "a.mp4", "caption": "grün"}
    text = {".csv": "path,caption\na.mp4,grün\n", ".txt": "ein grüner Kreis"}
    content = text.get(Path(name).suffix, json.dumps(row, ensure_ascii=False))
    (folder / name).write_bytes(content.encode(encoding))
    with pytest.raises(ValueError, match=rf"{name}.* in UTF-8: "):
        read_manifest(folder / name if name.startswith("clips") else folder / "texts")


@pytest.mark.parametrize("letter", ["\u2028", "\u2029", "\u0085", "\x0b", "\x1e"])
def test_a_line_ends_at_a_newline_alone(letter: str, folder: Path) -> None:
    row = {"path": "a.mp4", "caption": f"two{letter}parts"}
    (folder / "clips.jsonl").write_text(json.dumps(row, ensure_ascii=ord(letter) < 32) + "\n")
    assert captions(folder / "clips.jsonl") == [f"two{letter}parts"]


@pytest.mark.parametrize("suffix", LINES)
def test_an_ending_may_be_in_upper_case(suffix: str, folder: Path) -> None:
    path = folder / f"clips{suffix.upper()}"
    path.write_text(LINES[suffix])
    assert captions(path) == ["ein grüner Kreis"]


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_another_separator_is_named(separator: str, folder: Path) -> None:
    (folder / "clips.csv").write_text(f"path{separator}caption\na.mp4{separator}x\n")
    with pytest.raises(ValueError, match=r"clips.csv:1: .*separated by commas, not by"):
        read_manifest(folder / "clips.csv")


@pytest.mark.parametrize("name", ["clips.json", "clips.txt", "clips"])
def test_a_file_of_another_ending_is_no_manifest(name: str, folder: Path) -> None:
    (folder / name).write_text(json.dumps({"path": "a.mp4", "caption": "x"}, indent=1))
    with pytest.raises(ValueError, match=rf"{name}: a manifest must be a folder, or end in"):
        read_manifest(folder / name)


def test_names_that_read_as_numbers_stay_names(folder: Path) -> None:
    (folder / "007").write_bytes(b"")
    (folder / "clips.csv").write_text("path,prompt,shard,offset,size\n1,12,007,0,9\n")
    (row,) = read_table(folder / "clips.csv")
    assert row.path() == "1"
    assert row.captions()[0] == ("12",)
    assert row.columns["shard"] == "007"


def test_hidden_files_are_passed_over(folder: Path) -> None:
    for name in ("._a.mp4", "._a.txt", ".hidden/c.mp4", "__MACOSX/._b.mp4", "__MACOSX/b.mp4"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\x00\x05\x16\x07\xff")
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text("x")
    assert [r.path.name for r in read_manifest(folder)] == ["a.mp4", "b.mp4"]


def test_links_are_followed_once(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for name in ("c.mp4", "d.mp4", "e.mp4"):
        (elsewhere / name).touch()
    (folder / "folder").symlink_to(elsewhere)
    (folder / "again").symlink_to(elsewhere)
    (folder / "loop").symlink_to(folder)
    (folder / "broken.mp4").symlink_to(folder / "nothing")
    (folder / "file.mp4").symlink_to(elsewhere / "c.mp4")
    with pytest.raises(ValueError, match=r"again/c\.mp4: path = .* outside of the manifest's"):
        list(read_table(folder))
    paths = [row.path() for row in read_table(folder, str(elsewhere))]
    assert paths == ["a.mp4", "again/c.mp4", "again/d.mp4", "again/e.mp4", "b.mp4", "file.mp4"]


def test_other_endings_are_read_or_counted(folder: Path) -> None:
    for name in ("c.WMV", "d.flv", "e.bmp", "notes.pdf", "more.pdf", "model.ckpt", "README"):
        (folder / name).touch()
    with pytest.warns(UserWarning, match=r"left out: 2 \.pdf, 1 README, 1 \.ckpt"):
        paths = [row.path() for row in read_table(folder)]
    assert paths == ["a.mp4", "b.mp4", "c.WMV", "d.flv", "e.bmp"]
    for name in ("notes.pdf", "more.pdf", "model.ckpt", "README"):
        (folder / name).unlink()
    (folder / "a.txt").touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(read_table(folder))) == 5


def test_the_text_file_that_lacks_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.mp4: caption: must be .*, in a\.txt beside it"):
        read_manifest(folder)


def held_out(output: Path) -> set[Path]:
    return {(output / row.path()).resolve() for row in read_table(output / "test.jsonl", "/")}


def test_one_name_in_many_folders_is_split_the_same_each_time(tmp_path: Path) -> None:
    for number in range(8):
        (tmp_path / "clips" / f"v{number}").mkdir(parents=True)
        (tmp_path / "clips" / f"v{number}" / "clip.mp4").touch()
        (tmp_path / "clips" / f"v{number}" / "clip.txt").write_text("x")
    drawn = []
    for seed in ("1", "2"):
        command = (
            "from pathlib import Path; from sora_lightning.data.manifest.split import split;"
            f"split(Path({str(tmp_path / 'clips')!r}), Path({str(tmp_path / seed)!r}), 2)"
        )
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", command], check=True, env=environment)
        drawn.append(held_out(tmp_path / seed))
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 2


@pytest.mark.parametrize("num_held_out", [1, 2, 3, 4])
def test_one_file_under_many_spellings_is_on_one_side(num_held_out: int, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    rows = []
    for number in range(6):
        (tmp_path / f"{number}.mp4").write_bytes(b"x" * number)
        (tmp_path / f"link{number}.mp4").symlink_to(tmp_path / f"{number}.mp4")
        (tmp_path / f"copy{number}.MP4").hardlink_to(tmp_path / f"{number}.mp4")
        spellings = ("", "./", "sub/../", f"{tmp_path}/", "link")
        rows.append({"path": f"copy{number}.MP4", "caption": "a"})
        rows += [{"path": f"{one}{number}.mp4", "caption": "a"} for one in spellings]
        copy = {"path": f"copy{number}.mp4", "content": f"{number:064x}"}
        rows += [{"path": f"{number}.mp4", "content": f"{number:064x}"}, copy]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    split(tmp_path / "all.jsonl", tmp_path / "out", num_held_out)
    sides = []
    for part in ("train", "test"):
        paths = [row.path() for row in read_table(tmp_path / "out" / f"{part}.jsonl", "/")]
        numbers = {(tmp_path / "out" / path).resolve().stem.removeprefix("copy") for path in paths}
        sides.append(numbers)
    assert not sides[0] & sides[1]
    assert len(sides[1]) == num_held_out
