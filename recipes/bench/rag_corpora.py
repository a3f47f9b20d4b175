"""Real text to retrieve from, out of Debian packages: a dictionary, and three documentations.

    apt-get download dict-gcide wordnet-base linux-doc-6.1 python3.11-doc cppreference-doc-en-html
    python recipes/bench/rag_corpora.py FOLDER_OF_DEBS CORPORA

writes into CORPORA

    gcide.jsonl      GCIDE's entries (Webster 1913 and additions), without those tagged [WordNet]
    synsets.jsonl    WordNet's synsets: gloss, and the lemmas GCIDE may define them under
    linux/ python/ cpp/    the pages of the documentation, as HTML

The labelled task is retrieval across dictionaries: a synset's gloss is the query, GCIDE's entries
under one of its lemmas are relevant. Both texts were written by people, neither for the other. The
labels are coarse: an entry may give another sense of the word, and a right entry under a synonym
that WordNet lacks counts as wrong.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import shutil
import string
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

_DIGITS = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"
# The editors' marks of where a line comes from.
_SOURCE_TAG = re.compile(r"\[(?:1913 Webster|PJC|Webster[^\]]*|Century[^\]]*|RP|AS|Obs\.)[^\]]*\]")
_PAGES = {
    "linux-doc-6.1": ("linux", "usr/share/doc/linux-doc-6.1/html"),
    "python3.11-doc": ("python", "usr/share/doc/python3.11/html"),
    "cppreference-doc-en-html": ("cpp", "usr/share/cppreference/doc/html"),
}


def number(digits: str) -> int:
    """Return what dictd's base 64 stands for.

    >>> number("Ct")
    173
    """
    value = 0
    for digit in digits:
        value = 64 * value + _DIGITS.index(digit)
    return value


def gcide(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (headword, text) of each entry, in the order of the file."""
    index = (folder / "gcide.index").read_text(encoding="utf-8").splitlines()
    places = {tuple(map(number, row.split("\t")[1:3])) for row in index if row[:3] != "00-"}
    with gzip.open(folder / "gcide.dict.dz") as file:
        data = file.read()
    for offset, size in sorted(places):
        text = data[offset : offset + size].decode("utf-8", "replace")
        if "[WordNet" in text:
            continue
        headword = re.split(r"[\\\n,(\[]", text.strip(), maxsplit=1)[0].strip()
        clean = re.sub(r"\n\s*\n\s*\n+", "\n\n", _SOURCE_TAG.sub("", text)).strip()
        if headword and len(clean) > len(headword) + 8:
            yield headword, clean


def synsets(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield (definition, lemmas) of each of WordNet's synsets; examples are left out."""
    for kind in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{kind}").read_text(encoding="utf-8").splitlines():
            if line.startswith(" "):
                continue  # the licence
            fields, _, gloss = line.partition(" | ")
            parts = fields.split()
            count = int(parts[3], 16)
            lemmas = [parts[4 + 2 * i].replace("_", " ") for i in range(count)]
            lemmas = [re.sub(r"\([a-z]+\)$", "", lemma) for lemma in lemmas]
            definition = gloss.split('; "')[0].strip()
            if definition:
                yield definition, lemmas


def main() -> None:
    """Unpack, convert, and say how much there is."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("debs", type=Path)
    parser.add_argument("corpora", type=Path)
    options = parser.parse_args()
    options.corpora.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        for deb in options.debs.glob("*.deb"):
            subprocess.run(["dpkg", "-x", deb, root], check=True)
        headwords, entries = set(), 0
        with (options.corpora / "gcide.jsonl").open("w") as out:
            for title, text in gcide(root / "usr/share/dictd"):
                out.write(json.dumps({"title": title, "text": text}, ensure_ascii=False) + "\n")
                headwords.add(title.lower())
                entries += 1
        labelled = 0
        with (options.corpora / "synsets.jsonl").open("w") as out:
            for gloss, lemmas in synsets(root / "usr/share/wordnet"):
                known = sorted({lemma for lemma in lemmas if lemma.lower() in headwords})
                if known:
                    out.write(json.dumps({"query": gloss, "relevant": known}) + "\n")
                    labelled += 1
        print(f"gcide.jsonl: {entries} entries; synsets.jsonl: {labelled} with an entry in it")
        for name, place in _PAGES.values():
            shutil.rmtree(options.corpora / name, ignore_errors=True)
            pages = [page for page in (root / place).rglob("*.html") if page.is_file()]
            for page in pages:
                target = options.corpora / name / page.relative_to(root / place)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(page, target)
            print(f"{name}/: {len(pages)} pages")


if __name__ == "__main__":
    main()
