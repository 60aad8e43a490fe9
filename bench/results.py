"""The file of results: a line of JSON for each run of ``bench/compare --record``, with the version it measured."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results.jsonl"
Commit = Annotated[str, Field(pattern="^[0-9a-f]{40}$")]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(gt=0)]


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Python(_Form):
    """The interpreter: how it was built changes rates."""

    version: str
    build: str
    compiler: str


class Machine(_Form):
    """The machine; ``load`` is the mean number of processes that were ready to run, at the beginning and at the end."""

    processor: str
    processors: Count
    memory_mb: Count
    system: str
    sync_ms: Positive
    load: tuple[float, float]


class Spread(_Form):
    """The ratios of the rounds."""

    median: Positive
    least: Positive
    most: Positive


class Record(_Form):
    """One run: what was measured on what, the medians of the figures of the rounds, and the ratios within a round.

    ``changed`` says that files differed from those of the commit. ``figures`` are by part and by contender.
    """

    commit: Commit
    changed: bool
    before: Commit | None
    date: AwareDatetime
    python: Python
    machine: Machine
    slower_sync_ms: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0  # by which each sync was made longer
    cfssl: str | None
    settings: dict[str, str]
    options: dict[str, Count]
    figures: dict[str, dict[str, dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]]]
    ratios: dict[str, Spread]


def read(path: Path = RESULTS) -> list[Record]:
    """Return the records of a file, oldest first; raise ``pydantic.ValidationError`` for a line that is none."""
    return [Record.model_validate_json(line) for line in path.read_text().splitlines()]


def append(record: Record, path: Path = RESULTS) -> None:
    """Add a record at the end of a file, which is made if there is none."""
    with path.open("a") as file:
        file.write(record.model_dump_json() + "\n")


# --- What a record says of where it was made ----------------------------------------------------------------------


def commit_of(name: str = "HEAD") -> str:
    """Return the full hash of a commit; end the program where there is none of that name."""
    done = _git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    if done.returncode:
        sys.exit(f"There is no commit {name} in {ROOT}; name one that `git log` shows.")
    return done.stdout.strip()


def has_changes() -> bool:
    """Tell whether files that git follows differ from those of the commit, besides the results of earlier runs."""
    others = f":(exclude){RESULTS.relative_to(ROOT)}"
    return bool(_git("status", "--porcelain", "--untracked-files=no", "--", ".", others).stdout)


def _git(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)


def now() -> datetime:
    """Return the time, to the second."""
    return datetime.now(UTC).replace(microsecond=0)


def this_python() -> Python:
    """Return what is to be known of the interpreter, which runs the portals, too."""
    return Python(
        version=platform.python_version(),
        build=" ".join(platform.python_build()),
        compiler=platform.python_compiler(),
    )


def this_machine(sync_ms: float, load: tuple[float, float]) -> Machine:
    """Return what is to be known of the machine, without its name."""
    return Machine(
        processor=_processor(),
        processors=os.cpu_count() or 1,
        memory_mb=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        sync_ms=sync_ms,
        load=load,
    )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def rounded(value: Any) -> float:
    """Return a figure with four significant digits."""
    return float(f"{value:.4g}")
