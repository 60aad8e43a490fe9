"""The calls of `bench/` in the documents: each names a program that there is, with options that it has."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_calls_of_benchmarks_in_the_documents_have_options_that_the_programs_know() -> None:
    calls = [
        (document.name, *call)
        for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "bench" / "README.md"]
        for call in re.findall(r"`[^`\n]*\bbench/([a-z_]+)((?: [^`\n]*)?)`", document.read_text())
    ]
    assert len(calls) > 20
    for document, name, words in calls:
        known = set(re.findall(r'"(--[a-z-]+)"', (ROOT / "bench" / name).read_text()))
        assert set(re.findall(r"--[a-z-]+", words)) <= known, f"{document}: bench/{name}{words}"
