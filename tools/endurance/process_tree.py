"""What a process and its descendants hold, read from Linux's /proc."""

import os
from contextlib import suppress
from pathlib import Path

_PROC = Path("/proc")
# A process may end, or exec another user's program, while it is read.
_GONE = (FileNotFoundError, ProcessLookupError, PermissionError)
# Of memory in /dev/shm, whose file may be deleted while it is in use.
_SHARED = ("/dev/shm/", "/torch_")
# Pages of several processes count in parts. Those of files, such as libraries, are left out: the
# part of a process changes when others map the same file, and the kernel may drop and read them
# again at any time.
_PRIVATE = frozenset({"Pss_Anon", "Pss_Shmem"})


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
        "private", memory in MiB without files such as libraries, or "rss" where the kernel does
        not tell that; and numbers of "descriptors", "threads", "processes" and "shared_segments"
        (mappings of /dev/shm).
    """
    memory = "private" if _PRIVATE <= _rollup("self").keys() else "rss"
    total = dict.fromkeys((memory, "descriptors", "threads", "processes", "shared_segments"), 0.0)
    for pid in tree(root):
        with suppress(*_GONE):
            folder = _PROC / str(pid)
            if memory == "rss":
                pages = int((folder / "statm").read_text().split()[1])
                mebibytes = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
            else:
                rollup = _rollup(str(pid))
                # The last reading of a process that ends may be empty.
                mebibytes = sum(rollup.get(name, 0) for name in _PRIVATE) / 1024
            segments = {
                line.split(maxsplit=5)[5]
                for line in (folder / "maps").read_text().splitlines()
                if any(part in line for part in _SHARED)
            }
            total["descriptors"] += len(os.listdir(folder / "fd"))
            total["threads"] += len(os.listdir(folder / "task"))
            total["processes"] += 1
            total["shared_segments"] += len(segments)
            total[memory] += mebibytes
    return total


def _rollup(process: str) -> dict[str, int]:
    """Kinds of memory of a process in KiB; empty if the kernel does not tell."""
    try:
        text = (_PROC / process / "smaps_rollup").read_text()
    except _GONE:
        return {}
    rows = (line.split() for line in text.splitlines())
    return {row[0].rstrip(":"): int(row[1]) for row in rows if len(row) == 3 and row[2] == "kB"}
