"""The build hook of the wheel: adds man pages and shell completions, made from the commands as they are."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).resolve().parents[1]


class CommandFiles(BuildHookInterface[Any]):
    """Adds files below ``share`` of the environment that the wheel is installed into."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Write the files, and name them with their places."""
        sys.path.insert(0, str(ROOT))
        from scripts.manual import command_files

        self._folder = tempfile.TemporaryDirectory()
        for place, text in command_files().items():
            path = Path(self._folder.name, place.replace("/", "-"))
            path.write_text(text)
            build_data["shared_data"][str(path)] = place

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the files."""
        self._folder.cleanup()
