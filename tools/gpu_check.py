#!/usr/bin/env python
"""Check everything that needs a GPU, in at most ten minutes: numbers, memory errors, times.

    python tools/gpu_check.py OUTPUT_FOLDER [--steps op,train] [--seconds 580] [--dry-run]

Runs on any machine with CUDA on which the project can be imported; compute-sanitizer and ncu are
used where they are found. Each step is a process with a time limit of its own: a step that fails or
hangs does not stop the others, and the steps come in the order in which they decide most.

The folder receives summary.md and summary.json, written again after every step, NAME.log with the
output of each step, and a folder NAME with its tables, charts and traces. Exits with status 0 if
every step passed or was skipped for the reason that the summary states.

--dry-run runs the steps on the CPU with tiny sizes. Steps that need a GPU only print their command.
"""

import argparse
import contextlib
import csv
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MAX_SECONDS = 580
# A step is not started with less time left than this.
MIN_SECONDS = 4.0
# Between the request to end and the end of a process.
GRACE_SECONDS = 1.0

PYTHON = (sys.executable, "-W", "ignore")
STEPS_FOLDER = ROOT / "tools/gpu_steps"
LIBRARY = ROOT / "mask2former/_C.abi3.so"
# The R50 recipe with parts as small as they can be, for dry runs.
TINY_MODEL = """_BASE_: {recipe}
MODEL:
  RESNETS: {{STEM_OUT_CHANNELS: 16, RES2_OUT_CHANNELS: 32, WIDTH_PER_GROUP: 8}}
  SEM_SEG_HEAD: {{CONVS_DIM: 64, MASK_DIM: 32, TRANSFORMER_ENC_LAYERS: 1}}
  MASK_FORMER:
    HIDDEN_DIM: 64
    NUM_OBJECT_QUERIES: 10
    NHEADS: 4
    DIM_FEEDFORWARD: 64
    DEC_LAYERS: 2
    TRAIN_NUM_POINTS: 64
"""
RECIPE = ROOT / "configs/coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml"

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

    def config(self) -> list[str]:
        """The option for programs that build a model."""
        return ["--config", str(self.output / "tiny.yaml")] if self.dry else []


@dataclass(frozen=True)
class Step:
    """A program with a time limit.

    Args:
        name: of the step, its log and its folder.
        limit: in seconds.
        command: the arguments of the process.
        why_not: why it cannot run; empty if it can.
        headline: numbers for the summary, from its folder and its log; also called if it failed.
        skip_pattern: a failure with a match in its log is a skip for that reason.
        environment: further variables.
    """

    name: str
    limit: float
    command: Callable[[Run], Sequence[str | Path]]
    why_not: Callable[[Run], str] = lambda run: ""
    headline: Callable[[Path, str], Headline] = lambda folder, log: {}
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


# ---- headlines ----


def read_result(folder: Path, log: str) -> Headline:
    """What a program of gpu_steps wrote."""
    return json.loads((folder / "result.json").read_text())


def read_self_test(folder: Path, log: str) -> Headline:
    lines = [line for line in log.splitlines() if line.startswith("self-test on ")]
    return {
        "passed": sum(": passed" in line for line in lines),
        "failed": sum(": FAILED" in line for line in lines),
    }


def read_pytest(folder: Path, log: str) -> Headline:
    """The last line of pytest, and the first tests that failed."""
    counts = re.findall(r"(\d+) (passed|failed|errors?|skipped)\b", log.strip().splitlines()[-1])
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", log, re.MULTILINE)
    return {word: int(number) for number, word in counts} | (
        {"first": " ".join(failed[:3])} if failed else {}
    )


def read_sanitizer(folder: Path, log: str) -> Headline:
    summaries = re.findall(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)$", log, re.MULTILINE)
    return {"summary": summaries[-1] if summaries else "none"}


def read_benchmark(name: str, is_main: Callable[[dict[str, Any]], bool]) -> Callable:
    """Times in ms, ratios and peak memory of the rows that matter, from NAME.json."""

    def read(folder: Path, log: str) -> Headline:
        numbers: Headline = {}
        for row in json.loads((folder / f"{name}.json").read_text())["results"]:
            who = row.get("contender", row.get("backend"))
            size = row.get("size", f"{row.get('height')}x{row.get('width')}")
            case = (row.get("precision", row.get("dtype")), size, f"batch {row['batch']}")
            label = " ".join([*case, row.get("part", row.get("pass")), who])
            if "error" in row:
                numbers[label] = row["error"]
            elif is_main(row):
                seconds = row.get("device_seconds", row["wall_seconds"])["median"]
                numbers[label] = f"{seconds * 1e3:.3g} ms"
                for other, ratio in row.get("ratios", {}).items():
                    if other != who:
                        numbers[label] += f", {ratio['median']:.2f}x {other}"
                if row.get("peak_bytes"):
                    numbers[label] += f", {row['peak_bytes'] / 2**30:.2f} GiB"
                if "operator_calls" in row:
                    numbers[label] += f", {row['operator_calls']} calls, {row['host_syncs']} syncs"
        return numbers

    return read


def read_ncu(folder: Path, log: str) -> Headline:
    """The metrics of each launch; ncu prints lines of its own before the table."""
    lines = [x for x in (folder / "ncu.csv").read_text().splitlines() if x.startswith('"')]
    launches: Headline = {}
    for row in csv.DictReader(lines):
        label = f"{row['ID']} {row['Kernel Name'].split('(')[0]}"
        metric = re.sub(r"\.(sum|avg)\b|_sustained_\w+|pct_of_", "", row["Metric Name"])
        value = f"{metric} {row['Metric Value']} {row['Metric Unit']}".strip()
        launches[label] = ", ".join(filter(None, [launches.get(label), value]))
    return launches or {"launches": 0}


# ---- steps ----


def needs_gpu(run: Run) -> str:
    return "needs a GPU" if run.dry else ""


def needs_tool(name: str) -> Callable[[Run], str]:
    """A GPU and a program of the CUDA toolkit."""
    return lambda run: needs_gpu(run) or ("" if find_tool(name) else f"no {name} on this machine")


def find_tool(name: str) -> str | None:
    homes = [os.environ[key] for key in ("CUDA_HOME", "CUDA_PATH") if key in os.environ]
    folders = [f"{home}/bin" for home in (*homes, "/usr/local/cuda")]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


def program(name: str, run: Run, *arguments: str | Path) -> list[str | Path]:
    """A command of gpu_steps: NAME.py FOLDER --device DEVICE ..."""
    path = STEPS_FOLDER / f"{name}.py"
    return [*PYTHON, path, run.folder(name), "--device", run.device, *arguments]


def pytest(*arguments: str | Path) -> list[str | Path]:
    return [*PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", *arguments]


def sanitizer(tool: str) -> list[str | Path]:
    exercise = [ROOT / "tests/ops/exercise_kernels.py", LIBRARY, "cuda", "6"]
    executable = find_tool("compute-sanitizer") or "compute-sanitizer"
    return [executable, "--tool", tool, "--error-exitcode", "9", *PYTHON, *exercise]


def benchmark(name: str, run: Run, folder: str, full: str, tiny: str) -> list[str | Path]:
    arguments = shlex.split(tiny if run.dry else full)
    common = ["--devices", run.device, "--output", str(run.folder(folder))]
    return [*PYTHON, ROOT / "tools/benchmark", name, *common, *arguments]


def has_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def op_command(run: Run) -> list[str | Path]:
    """Against the original kernels if they are installed."""
    baseline = "original" if has_module("MultiScaleDeformableAttention") else "pytorch"
    rivals = "fused,classic,original,deformops-cuda,deformops-triton-fp32acc"
    backends = rivals if baseline == "original" else f"{rivals},pytorch"
    return benchmark(
        "op",
        run,
        "op",
        "--sizes 1024x1024,800x1216 --batches 1,8 --dtypes fp32,bf16,fp16 --rounds 5 "
        f"--passes forward,backward --max-seconds 3 --backends {backends} --baseline {baseline}",
        "--sizes 64x64 --batches 1 --dtypes fp32,fp16 --rounds 1 --passes forward,backward "
        "--threads 1 --backends fused,classic,original,pytorch",
    )


def model_command(run: Run) -> list[str | Path]:
    command = benchmark(
        "model",
        run,
        "model",
        "--sizes 800x1216 --batches 1 --precisions fp32,bf16,fp16 --rounds 4 --max-seconds 3 "
        "--contenders mask2former,upstream",
        "--quick --sizes 64x64 --precisions fp32,fp16 --rounds 1 --threads 1 "
        "--stages forward --contenders mask2former",
    )
    return [*command, *run.config()]


def train_command(name: str, full: str, tiny: str) -> Callable[[Run], list[str | Path]]:
    tiny = f"--quick --sizes 64x64 --rounds 1 --threads 1 --targets 2 --points 50 {tiny}"
    return lambda run: [*benchmark("train", run, name, full, tiny), *run.config()]


def ncu_command(run: Run) -> list[str | Path]:
    metrics = (
        "gpu__time_duration.sum",
        "sm__throughput.avg.pct_of_peak_sustained_elapsed",
        "sm__warps_active.avg.pct_of_peak_sustained_active",
        "smsp__inst_executed.sum",
        "l1tex__throughput.avg.pct_of_peak_sustained_active",
        "lts__throughput.avg.pct_of_peak_sustained_elapsed",
        "dram__throughput.avg.pct_of_peak_sustained_elapsed",
        "dram__bytes.sum",
        "launch__registers_per_thread",
    )
    # The clocks are the machine's: ncu must not set them.
    options = ["--clock-control", "none", "--csv", "--log-file", str(run.folder("ncu") / "ncu.csv")]
    names = "regex:^(forward|backward|deterministic)"
    return [
        find_tool("ncu") or "ncu",
        *(*options, "--kernel-name", names, "--metrics", ",".join(metrics)),
        *(*PYTHON, STEPS_FOLDER / "kernels.py", "--device", run.device),
    ]


STEPS = (
    Step("versions", 60, lambda run: program("versions", run), headline=read_result),
    Step(
        "self-test",
        60,
        lambda run: [*PYTHON, "-m", "mask2former.ops"],
        headline=read_self_test,
    ),
    Step(
        "cases",
        100,
        lambda run: pytest(
            "tests/ops/test_device.py",
            *("-k", "mask2former and cpu") if run.dry else ("-m", "gpu"),
        ),
        headline=read_pytest,
    ),
    *(
        Step(
            tool,
            75,
            lambda run, tool=tool: sanitizer(tool),
            needs_tool("compute-sanitizer"),
            read_sanitizer,
            skip_pattern="Device not supported",
            # Otherwise freed blocks stay valid, and accesses between blocks pass.
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
        for tool in ("memcheck", "racecheck")
    ),
    Step(
        "tests",
        120,
        lambda run: pytest("-m", "gpu", "--ignore", "tests/ops/test_device.py"),
        needs_gpu,
        read_pytest,
    ),
    Step(
        "op",
        120,
        op_command,
        headline=read_benchmark("op", lambda row: row["backend"] in ("fused", "classic")),
    ),
    Step(
        "ncu",
        60,
        ncu_command,
        needs_tool("ncu"),
        read_ncu,
        # No permission to read the hardware counters, or no access to them at all.
        skip_pattern="ERR_NVGPUCTRPERM|LibraryNotLoaded",
    ),
    Step(
        "model",
        80,
        model_command,
        headline=read_benchmark("model", lambda row: row["part"] in ("forward", "end to end")),
    ),
    *(
        Step(
            name,
            limit,
            train_command(name, full, tiny),
            headline=read_benchmark("train", lambda row: row["part"] == "step"),
        )
        for name, limit, full, tiny in (
            (
                "train",
                90,
                "--sizes 1024x1024 --batches 2 --precisions fp32,bf16,fp16 --rounds 4 "
                "--max-seconds 5",
                "--batches 2 --precisions fp32,fp16 --contenders mask2former",
            ),
            # The most telling precision first: this may run out of time.
            (
                "train-16",
                90,
                "--sizes 1024x1024 --batches 16 --precisions bf16,fp16,fp32 --rounds 2 "
                "--max-seconds 2",
                "--batches 3 --precisions bf16 --contenders mask2former",
            ),
        )
    ),
    Step(
        "trainer",
        100,
        lambda run: program(
            "trainer",
            run,
            *(("--iterations", "2", "--size", "64", *run.config()) if run.dry else ()),
        ),
        headline=read_result,
    ),
    Step(
        "attention",
        60,
        lambda run: program(
            "attention", run, *(("--lengths", "70", "--dtypes", "fp32") if run.dry else ())
        ),
        headline=read_result,
    ),
)


# ---- running ----


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
    limit = min(step.limit, left)
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


def markdown(results: Sequence[Result], note: str) -> str:
    lines = [note, "", "| step | status | s | limit | reason |", "|---|---|---|---|---|"]
    for x in results:
        lines.append(f"| {x.step} | {x.status} | {x.seconds:.1f} | {x.limit:.0f} | {x.reason} |")
    for x in results:
        if x.headline:
            lines += ["", f"{x.step}:", ""]
            lines += [f"- {key}: {value}" for key, value in x.headline.items()]
        elif x.status in ("skipped", "not run"):
            lines += ["", f"{x.step}: `{x.command}`"]
    return "\n".join(lines) + "\n"


def write(path: Path, text: str) -> None:
    """Write a file that appears complete or not at all. Needs nothing of the project."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def run_all(steps: Sequence[Step], run: Run, seconds: float, note: str) -> list[Result]:
    """Run the steps one after the other and write the summary after each."""
    run.output.mkdir(parents=True, exist_ok=True)
    if run.dry:
        write(run.output / "tiny.yaml", TINY_MODEL.format(recipe=RECIPE))
    start = time.monotonic()
    results = [Result(step.name, limit=step.limit) for step in steps]
    for index, step in enumerate(steps):
        left = seconds - (time.monotonic() - start)
        print(f"{step.name} ... ({left:.0f} s left)", flush=True)
        result = results[index] = run_step(step, run, left)
        print(f"{step.name}: {result.status} {result.seconds:.1f} s {result.reason}", flush=True)
        if result.status == "skipped":
            print(f"  {result.command}", flush=True)
        write(run.output / "summary.md", markdown(results, note))
        rows = [asdict(x) for x in results]
        write(run.output / "summary.json", json.dumps({"note": note, "steps": rows}, indent=1))
    return results


def main(argv: list[str] | None = None, steps: Sequence[Step] = STEPS) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [step.name for step in steps]
    parser.add_argument("output", type=Path, help="folder for logs and tables")
    parser.add_argument("--steps", help=f"comma-separated, of {','.join(names)} [all]")
    parser.add_argument(
        "--seconds", type=float, default=MAX_SECONDS, help=f"of all steps [{MAX_SECONDS}]"
    )
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with tiny sizes")
    options = parser.parse_args(argv)
    chosen = names if options.steps is None else options.steps.split(",")
    if unknown := [name for name in chosen if name not in names]:
        parser.error(f"unknown step {unknown[0]!r}, known are {', '.join(names)}")
    # The last step's process ends with the run, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    command = shlex.join(
        ["python", "tools/gpu_check.py", *(sys.argv[1:] if argv is None else argv)]
    )
    run = Run(options.output.resolve(), options.dry_run)
    selected = [step for step in steps if step.name in chosen]
    results = run_all(selected, run, options.seconds, f"`{command}`, {date}")
    print((run.output / "summary.md").read_text(), end="")
    return int(any(x.status not in ("ok", "skipped") for x in results))


if __name__ == "__main__":
    sys.exit(main())
