"""Has a benchmark run with a Python that has what it needs, whichever it was started with."""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("requirements.txt", "requirements-dev.txt")


def require() -> None:
    """Continue with the Python of the virtual environment if this one lacks packages.

    Ends the program with a sentence if that lacks some, too, or is not there. Called before anything else is imported.
    """
    if not (missing := _missing()):
        return
    environment = Path(os.environ.get("PORTAL_VENV") or ROOT / ".venv")
    python = environment / "bin" / "python"
    if python.exists() and Path(sys.prefix).resolve() != environment.resolve():
        os.execv(python, [str(python), *sys.argv])  # noqa: S606 - ours
    sys.exit(
        f"bench/{Path(sys.argv[0]).name} needs packages that this Python lacks ({missing[0]}, for one);"
        " scripts/test --setup installs them, and runs no test."
    )


def _missing() -> list[str]:
    """Return the packages that the files of requirements name and this Python has not."""
    text = "\n".join((ROOT / name).read_text() for name in NEEDED)
    missing = []
    for name in re.findall(r"^([\w.-]+)(?:\[[\w,-]+\])?==", text, re.MULTILINE):
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    return missing
