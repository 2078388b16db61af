"""Run steps, each a process with a time limit, and write a summary after each.

Needs nothing beyond Python: whatever is broken shows up in a step, not here.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# A step is not started with less time left than this.
MIN_SECONDS = 4.0
# Between the request to end and the end of a process.
GRACE_SECONDS = 1.0

Headline = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What all steps of a run share.

    Args:
        output: the folder for the results.
        dry: whether this is a dry run, on the CPU.
    """

    output: Path
    dry: bool

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def folder(self, name: str) -> Path:
        return self.output / name


@dataclass(frozen=True)
class Step:
    """A program with a time limit.

    Args:
        name: of the step, its log and its folder.
        limit: in seconds.
        command: the arguments of the process.
        why_not: why it cannot run; empty if it can.
        headline: numbers for the summary, from its folder and its log; also called if it failed.
        result: file in its folder that the headline reads; one of an earlier run is removed.
        skip_pattern: a failure with a match in its log is a skip for that reason.
        environment: further variables.
    """

    name: str
    limit: float
    command: Callable[[Run], Sequence[str | Path]]
    why_not: Callable[[Run], str] = lambda run: ""
    headline: Callable[[Path, str], Headline] = lambda folder, log: {}
    result: str = ""
    skip_pattern: str = ""
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Result:
    """A row of the summary; status: ok, failed, timed out, skipped or not run."""

    step: str
    status: str = "not run"
    reason: str = ""
    seconds: float = 0.0
    limit: float = 0.0
    command: str = ""
    headline: Headline = field(default_factory=dict)


@contextlib.contextmanager
def process_group(command: Sequence[str], log: Path, environment: dict[str, str]) -> Iterator:
    """Run a command; at the end it and its children are killed, however the end comes."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            for number, seconds in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, None)):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(seconds)


def run_step(step: Step, run: Run, left: float) -> Result:
    """Run one step with `left` seconds of the whole budget left."""
    # A dry run checks the programs, on a machine that may be slow.
    limit = min(step.limit * (5 if run.dry else 1), left)
    command = [str(part) for part in step.command(run)]
    result = Result(step.name, limit=round(limit, 1), command=shlex.join(command))
    if reason := step.why_not(run):
        result.status, result.reason = "skipped", reason
        return result
    if left < MIN_SECONDS:
        result.reason = f"{max(left, 0):.0f} s were left"
        return result
    folder, log = run.folder(step.name), run.output / f"{step.name}.log"
    folder.mkdir(exist_ok=True)
    if step.result:
        (folder / step.result).unlink(missing_ok=True)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    start = time.monotonic()
    try:
        with process_group(command, log, environment | step.environment) as process:
            status = process.wait(limit)
        result.status = "failed" if status else "ok"
        result.reason = f"exit status {status}" if status else ""
    except subprocess.TimeoutExpired:
        result.status = "timed out"
        result.reason = f"after {limit:.0f} s" + (
            ", all that was left" if left < step.limit else ""
        )
    except OSError as error:
        result.status, result.reason = "failed", str(error)
    result.seconds = round(time.monotonic() - start, 1)
    text = log.read_text(errors="replace") if log.exists() else ""
    refused = step.skip_pattern and re.search(step.skip_pattern, text)
    if result.status == "failed" and refused:
        result.status, result.reason = "skipped", refused[0]
    try:
        result.headline = step.headline(folder, text)
    # A step that did not finish may have written anything.
    except Exception as error:
        if result.status == "ok":
            result.status, result.reason = "failed", f"no result: {type(error).__name__}: {error}"
    if not any(folder.iterdir()):
        folder.rmdir()
    return result


def table(results: Sequence[Result]) -> str:
    lines = ["| step | status | s | limit | reason |", "|---|---|---|---|---|"]
    for x in results:
        lines.append(f"| {x.step} | {x.status} | {x.seconds:.1f} | {x.limit:.0f} | {x.reason} |")
    return "\n".join(lines)


def details(results: Sequence[Result]) -> str:
    """The numbers of each step, or the command of one that did not run."""
    blocks = []
    for x in results:
        if x.headline:
            lines = [f"- {key}: {value}" for key, value in x.headline.items()]
            blocks.append("\n".join([f"{x.step}:", "", *lines]))
        elif x.command and x.status in ("skipped", "not run"):
            blocks.append(f"{x.step}: `{x.command}`")
    return "\n\n".join(blocks)


def write(path: Path, text: str) -> None:
    """Write a file that appears complete or not at all. Needs nothing of the project."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def run_all(steps: Sequence[Step], run: Run, seconds: float, note: str) -> list[Result]:
    """Run the steps one after the other and write the summary after each."""
    run.output.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    results = [Result(step.name, limit=step.limit) for step in steps]
    for index, step in enumerate(steps):
        left = seconds - (time.monotonic() - start)
        print(f"{step.name} ... ({left:.0f} s left)", flush=True)
        result = results[index] = run_step(step, run, left)
        print(f"{step.name}: {result.status} {result.seconds:.1f} s {result.reason}", flush=True)
        if result.status == "skipped":
            print(f"  {result.command}", flush=True)
        text = "\n\n".join([note, table(results), details(results)])
        write(run.output / "summary.md", f"{text}\n")
        rows = [asdict(x) for x in results]
        write(run.output / "summary.json", json.dumps({"note": note, "steps": rows}, indent=1))
    return results
