"""Memory that may still be taken: the machine's, or what a container leaves of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pocketsize.measurement.memory import available_bytes, total_bytes


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


MEMINFO = "MemTotal: 8000 kB\nMemFree: 100 kB\nMemAvailable: 4000 kB\n"


@pytest.mark.parametrize(
    ("groups", "files", "available"),
    [
        ("0::/\n", {}, 4_096_000),
        ("0::/\n", {"memory.max": "max", "memory.current": "5"}, 4_096_000),
        ("0::/a/b\n", {"a/memory.max": "3000", "a/memory.current": "1000"}, 2000),
        (
            "0::/a/b\n",
            {
                "a/memory.max": "3000",
                "a/memory.current": "1000",
                "a/memory.stat": "anon 5\ninactive_file 400\n",
                "a/b/memory.max": "9000",
                "a/b/memory.current": "0",
            },
            2400,
        ),
        (
            "9:cpu:/x\n4:memory:/host/path\n",
            {"memory/memory.limit_in_bytes": "700", "memory/memory.usage_in_bytes": "800"},
            0,
        ),
    ],
)
def test_the_least_of_machine_and_containers(
    tmp_path: Path, groups: str, files: dict[str, str], available: int
) -> None:
    write(tmp_path / "proc", {"meminfo": MEMINFO, "self/cgroup": groups})
    write(tmp_path / "cgroup", files)
    assert available_bytes(tmp_path / "proc", tmp_path / "cgroup") == available


def test_nobody_says(tmp_path: Path) -> None:
    assert available_bytes(tmp_path, tmp_path) is None


def test_this_machine_has_more_than_it_has_left() -> None:
    left = available_bytes()
    assert left is None or 0 < left <= total_bytes()
