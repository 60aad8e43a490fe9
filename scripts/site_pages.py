"""Copy the documentation, and each file that it links to, into a folder, as they are in the tree, for scripts/site."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("*.md", "docs/**/*.md", "deploy/*.md", "mosquitto/**/*.md", "rabbitmq/*.md", "bench/*.md")


def documents() -> list[Path]:
    """Return every page of the documentation."""
    return sorted({page for pattern in PAGES for page in ROOT.glob(pattern)})


def linked(page: Path) -> set[Path]:
    """Return the files of the tree that a page links to."""
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    return {(page.parent / target).resolve() for target in targets if ":" not in target}


def copy_to(folder: Path) -> None:
    """Fill the folder, which is emptied before."""
    shutil.rmtree(folder, ignore_errors=True)
    pages = documents()
    for path in {*pages, *(path for page in pages for path in linked(page))}:
        copied = folder / path.relative_to(ROOT)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copied)


if __name__ == "__main__":
    copy_to(Path(sys.argv[1]))
