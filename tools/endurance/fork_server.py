"""Starts a program many times without importing its packages each time; also a program.

    python fork_server.py PROGRAM

It imports what PROGRAM needs, then forks a process for each request. Such a process is as real as
one that was started: it runs PROGRAM from its first line, and a signal ends it alone.
"""

import json
import os
import runpy
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

# Imports nearly all that tools/train_net.py needs.
_PRELOADED = "mask2former.launch"


class ForkServer:
    """A running server. Its processes take turns: one at a time.

    Args:
        program: path of the program to start.
        environment: of all processes.
    """

    def __init__(self, program: Path, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(program)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def start(self, arguments: list[str], log: Path) -> "Forked":
        """Start the program; its output is appended to `log`."""
        print(json.dumps({"arguments": arguments, "log": str(log)}), file=self._process.stdin)
        return Forked(self.reply(), self)

    def reply(self) -> int:
        """Wait for the next number.

        Raises:
            RuntimeError: the server failed; its own message is in the output.
        """
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the fork server ended with status {self._process.wait()}")
        return int(line)

    def has_reply(self) -> bool:
        return bool(select.select([self._process.stdout], [], [], 0)[0])

    def close(self) -> None:
        """End the server, which waits for its process."""
        self._process.communicate()


class Forked:
    """A process of the server, leader of its group; the part of `Popen` that is needed."""

    def __init__(self, pid: int, server: ForkServer) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._server = server

    def poll(self) -> int | None:
        if self.returncode is None and self._server.has_reply():
            self.wait()
        return self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = self._server.reply()
        return self.returncode


def _become(request: dict[str, Any], program: str) -> None:
    """Make this forked process the one that was requested."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(null)
    os.close(log)
    sys.argv = [program, *request["arguments"]]
    sys.path[0] = os.path.dirname(program)
    runpy.run_path(program, run_name="__main__")


def main() -> None:
    program = sys.argv[1]
    __import__(_PRELOADED)
    while line := sys.stdin.readline():
        pid = os.fork()
        # On both sides, so that the group exists when the number is told.
        os.setpgid(pid, pid or os.getpid())
        if pid == 0:
            # Returns, so that the process ends as any other does.
            return _become(json.loads(line), program)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return None


if __name__ == "__main__":
    main()
