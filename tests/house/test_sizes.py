"""Files are nouns of the domain, read in one sitting."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("toolkit", "recipes")
MOST_LINES = 400
NO_NOUNS = {"utils", "util", "common", "helpers", "helper", "misc"}


def files():
    found = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(found) > 20, "the sources were not found"
    return found


def test_no_file_is_too_long_to_read_in_one_sitting():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in files()
    }
    assert {name: length for name, length in lengths.items() if length > MOST_LINES} == {}


def test_files_and_folders_are_named_after_what_they_hold():
    named = {part for path in files() for part in (*path.relative_to(ROOT).parts[:-1], path.stem)}
    assert not named & NO_NOUNS


def test_every_file_says_what_it_is():
    silent = [
        str(path.relative_to(ROOT))
        for path in files()
        if (text := path.read_text("utf-8")).strip() and not ast.get_docstring(ast.parse(text))
    ]
    assert silent == []
