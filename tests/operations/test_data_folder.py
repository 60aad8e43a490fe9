"""The data folder is made by processes that start at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from config import Settings
from operations.data_folder import make_folders


def test_processes_that_start_at_once_do_not_take_away_what_the_others_try_the_disk_with(tmp_path: Path) -> None:
    settings = Settings.from_env({"PORTAL_DATA_DIR": str(tmp_path / "data")})
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(lambda _: make_folders(settings), range(400)):
            pass
    assert not (tmp_path / "data" / ".writable").exists()
