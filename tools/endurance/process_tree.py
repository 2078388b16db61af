"""What a process and its descendants hold, read from Linux's /proc."""

import os
from contextlib import suppress
from pathlib import Path

_PROC = Path("/proc")
# A process may end, or exec another user's program, while it is read.
_GONE = (FileNotFoundError, ProcessLookupError, PermissionError)
# Of memory in /dev/shm, whose file may be deleted while it is in use.
_SHARED = ("/dev/shm/", "/torch_")


def has_proc() -> bool:
    return (_PROC / "self/stat").is_file()


def _stat(pid: int) -> tuple[str, int, int]:
    """State, parent and process group."""
    # The name before them is in brackets and may hold anything.
    fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[1]), int(fields[2])


def _living() -> dict[int, tuple[int, int]]:
    """{process: (parent, group)} without zombies."""
    living = {}
    for name in os.listdir(_PROC):
        if name.isdecimal():
            with suppress(*_GONE):
                state, parent, group = _stat(int(name))
                if state not in "ZX":
                    living[int(name)] = parent, group
    return living


def group_members(group: int) -> list[int]:
    """Living processes of a group."""
    return [pid for pid, (_, other) in _living().items() if other == group]


def tree(root: int) -> list[int]:
    """Living processes: `root` and its descendants."""
    living = _living()
    members = [root] if root in living else []
    for pid in members:
        members += [child for child, (parent, _) in living.items() if parent == pid]
    return members


def measure(root: int) -> dict[str, float]:
    """Sums over the tree of a process.

    Returns:
        "rss" and "pss" in MiB (shared pages count once for each process in the first, once in all
        in the second), and numbers of "descriptors", "threads", "processes" and "shared_segments"
        (mappings of /dev/shm).
    """
    total = dict.fromkeys(
        ("rss", "pss", "descriptors", "threads", "processes", "shared_segments"), 0.0
    )
    for pid in tree(root):
        with suppress(*_GONE):
            folder = _PROC / str(pid)
            memory = _kibibytes((folder / "smaps_rollup").read_text())
            segments = {
                line.split(maxsplit=5)[5]
                for line in (folder / "maps").read_text().splitlines()
                if any(part in line for part in _SHARED)
            }
            total["descriptors"] += len(os.listdir(folder / "fd"))
            total["threads"] += len(os.listdir(folder / "task"))
            total["processes"] += 1
            total["rss"] += memory["Rss"] / 1024
            total["pss"] += memory["Pss"] / 1024
            total["shared_segments"] += len(segments)
    return total


def _kibibytes(text: str) -> dict[str, int]:
    rows = (line.split() for line in text.splitlines())
    return {row[0].rstrip(":"): int(row[1]) for row in rows if len(row) == 3 and row[2] == "kB"}
