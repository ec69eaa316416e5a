"""Room: what the file system, quotas and the experiment itself leave, and what is said where it is too little."""

from pathlib import Path

import pytest

from lorasweep.planning.disk_space import Room, explain_shortage, find_room, parse_lfs_quota, parse_quota
from lorasweep.util.files import get_size

LFS = "/lustre/home 1048576*  0 2097152 - 12 0 0 -"  # lfs-quota(1), -q: one line, in KiB
LONG_LFS = ["/lustre/a_very_long_name", "  3145728 4194304 5242880 - 12 0 0 -"]
QUOTA = """Disk quotas for user me (uid 1000):
     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace
      /dev/sda1     100    1000    1200       0       5       0       0       0
nfs:/export/home    900*    800    1000  7days      50       0       0       0
       /dev/sdb     500       0       0       0       1       0       0       0"""


def test_quotas_are_read_as_the_commands_print_them() -> None:
    assert parse_lfs_quota([LFS]) == 1048576 * 1024
    assert parse_lfs_quota(LONG_LFS) == 1048576 * 1024
    assert parse_lfs_quota([]) is None
    assert parse_quota(QUOTA.splitlines()) == {"/dev/sda1": 900 * 1024, "nfs:/export/home": -100 * 1024}


def test_the_file_system_and_the_experiments_own_limit_hold(tmp_path: Path) -> None:
    (tmp_path / "e").mkdir()
    (tmp_path / "e/file").write_bytes(b"x" * 1000)
    rooms = {room.limit: room.free_bytes for room in find_room(tmp_path / "e", 0.001)}
    assert rooms["plan.storage_limit_gb: 0.001"] == 999_000
    assert len(rooms) >= 2
    assert find_room(tmp_path / "not/there/yet", None)[0].free_bytes > 0
    assert get_size(tmp_path / "none") == 0


def test_a_quota_command_that_answers_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "lfs"
    command.write_text(f"#!/bin/sh\necho '{LFS}'\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert Room(1048576 * 1024, f"the user's quota on {tmp_path} (lfs quota)") in find_room(tmp_path, None)


def test_what_is_short_is_said_with_what_would_fit() -> None:
    rooms = [Room(50_000_000_000, "the file system of /x"), Room(10_000_000_000, "plan.storage_limit_gb: 10")]
    said = explain_shortage(
        rooms, 60_000_000_000, 4, {"max_merged_models: 1": 16_000_000_000, "mode B2": 1_000_000_000}
    )
    assert said is not None
    assert "needs 60 GB at its peak with 4 jobs at a time (plan.parallel_jobs)" in said
    assert "and 10 GB are free (plan.storage_limit_gb: 10)" in said
    assert "what would fit: mode B2 (1 GB)" in said
    assert "--config force_plan=true" in said
    assert explain_shortage(rooms, 9_000_000_000, 4, {}) is None
