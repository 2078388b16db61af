#!/usr/bin/env python
"""Check everything that needs a GPU, in at most ten minutes: numbers, memory errors, times.

    python tools/gpu_check.py OUTPUT_FOLDER [--steps op,train] [--seconds 580] [--dry-run]

Runs on any machine with CUDA on which the project can be imported; compute-sanitizer and ncu are
used where they are found. Each step is a process with a time limit of its own: a step that fails or
hangs does not stop the others, and the steps come in the order in which they decide most.

The folder receives summary.md and summary.json, written again after every step, NAME.log with the
output of each step, and a folder NAME with its tables, charts and traces. Exits with status 0 if
every step passed or was skipped for the reason that the summary states.

--dry-run runs the programs of the steps on the CPU, with tiny sizes and without the tools of CUDA.
What makes no sense there only prints its command.
"""

import argparse
import importlib.util
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent / "gpu_steps"))
from headlines import (
    read_benchmark,
    read_ncu,
    read_pytest,
    read_result,
    read_sanitizer,
    read_self_test,
)
from runner import ROOT, Run, Step, details, run_all, table

MAX_SECONDS = 580
PYTHON = (sys.executable, "-W", "ignore")
STEPS_FOLDER = ROOT / "tools/gpu_steps"
LIBRARY = ROOT / "mask2former/_C.abi3.so"
# The other variant of the op's backward, see backward.cuh; compare with the steps without it.
SHARED_BACKWARD = {"MASK2FORMER_BACKWARD": "shared"}
# Our contender in whole models.
OURS = "mask2former"


def needs_gpu(run: Run) -> str:
    return "needs a GPU" if run.dry else ""


def needs_tool(name: str) -> Callable[[Run], str]:
    """A program of the CUDA toolkit; a dry run takes the step's own program only."""
    return lambda run: "" if run.dry or find_tool(name) else f"no {name} on this machine"


def find_tool(name: str) -> str | None:
    homes = [os.environ[key] for key in ("CUDA_HOME", "CUDA_PATH") if key in os.environ]
    folders = [f"{home}/bin" for home in (*homes, "/usr/local/cuda")]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


def program(name: str, run: Run, *arguments: str | Path) -> list[str | Path]:
    """A command of gpu_steps: NAME.py FOLDER --device DEVICE ..."""
    path = STEPS_FOLDER / f"{name}.py"
    return [*PYTHON, path, run.folder(name), "--device", run.device, *arguments]


def cases(run: Run) -> list[str | Path]:
    chosen = ("-k", "mask2former and cpu") if run.dry else ("-m", "gpu")
    return pytest("tests/ops/test_device.py", *chosen)


def pytest(*arguments: str | Path) -> list[str | Path]:
    return [*PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", *arguments]


def sanitizer(tool: str, run: Run) -> list[str | Path]:
    program = ROOT / "tests/ops/exercise_kernels.py"
    # Steps that 2 and 3 do not divide take cases of every kind.
    command = [*PYTHON, program, LIBRARY, run.device, "41" if run.dry else "7"]
    if run.dry:
        return command
    executable = find_tool("compute-sanitizer") or "compute-sanitizer"
    return [executable, "--tool", tool, "--error-exitcode", "9", *command]


def benchmark(name: str, run: Run, folder: str, full: str, tiny: str) -> list[str | Path]:
    arguments = shlex.split(tiny if run.dry else full)
    common = ["--devices", run.device, "--output", str(run.folder(folder))]
    return [*PYTHON, ROOT / "tools/benchmark", name, *common, *arguments]


def config(run: Run) -> list[str | Path]:
    """The option for programs that build a model: the R50 recipe, or a tiny one."""
    return ["--config", STEPS_FOLDER / "tiny.yaml"] if run.dry else []


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
    return [*command, *config(run)]


def train_command(name: str, full: str, tiny: str) -> Callable[[Run], list[str | Path]]:
    tiny = f"--quick --sizes 64x64 --rounds 1 --threads 1 --targets 2 --points 50 {tiny}"
    return lambda run: [*benchmark("train", run, name, full, tiny), *config(run)]


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
    command = [*PYTHON, STEPS_FOLDER / "kernels.py", "--device", run.device]
    if run.dry:
        return [*command, "--size", "64"]
    # The clocks are the machine's: ncu must not set them.
    options = ["--clock-control", "none", "--csv", "--log-file", str(run.folder("ncu") / "ncu.csv")]
    names = "regex:^(forward|backward|deterministic)"
    return [
        find_tool("ncu") or "ncu",
        *(*options, "--kernel-name", names, "--metrics", ",".join(metrics)),
        *command,
    ]


STEPS = (
    Step(
        "versions",
        60,
        lambda run: program("versions", run),
        headline=read_result,
        result="result.json",
    ),
    Step(
        "self-test",
        60,
        lambda run: [*PYTHON, "-m", "mask2former.ops"],
        headline=read_self_test,
    ),
    Step("cases", 100, cases, headline=read_pytest),
    *(
        Step(
            name,
            75,
            lambda run, name=name: sanitizer(name.partition("-")[0], run),
            needs_tool("compute-sanitizer"),
            read_sanitizer,
            skip_pattern="Device not supported",
            # Otherwise freed blocks stay valid, and accesses between blocks pass.
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} | environment,
        )
        for name, environment in (
            ("memcheck", {}),
            ("racecheck", {}),
            ("racecheck-shared", SHARED_BACKWARD),
        )
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
        headline=read_benchmark("op", "fused", ("forward", "backward")),
        result="op.json",
    ),
    Step("cases-shared", 60, cases, headline=read_pytest, environment=SHARED_BACKWARD),
    Step(
        "op-shared",
        40,
        lambda run: benchmark(
            "op",
            run,
            "op-shared",
            "--sizes 1024x1024 --batches 1,8 --dtypes fp32,bf16 --rounds 5 --passes backward "
            "--max-seconds 3 --backends fused,classic --baseline classic",
            "--sizes 64x64 --batches 1 --dtypes fp32 --rounds 1 --passes backward --threads 1 "
            "--backends fused,classic --baseline classic",
        ),
        headline=read_benchmark("op", "fused", ("backward",)),
        environment=SHARED_BACKWARD,
    ),
    Step(
        "ncu",
        60,
        ncu_command,
        needs_tool("ncu"),
        read_ncu,
        "ncu.csv",
        # No permission to read the hardware counters, or no access to them at all.
        skip_pattern="ERR_NVGPUCTRPERM|LibraryNotLoaded",
    ),
    Step(
        "model",
        80,
        model_command,
        headline=read_benchmark("model", OURS, ("forward", "end to end")),
        result="model.json",
    ),
    *(
        Step(
            name,
            limit,
            train_command(name, full, tiny),
            headline=read_benchmark("train", OURS, ("step",)),
            result="train.json",
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
            *(("--iterations", "2", "--size", "64", *config(run)) if run.dry else ()),
        ),
        headline=read_result,
        result="result.json",
    ),
    Step(
        "attention",
        60,
        lambda run: program(
            "attention", run, *(("--lengths", "70", "--dtypes", "fp32") if run.dry else ())
        ),
        headline=read_result,
        result="result.json",
    ),
    Step(
        "loss_memory",
        60,
        lambda run: program(
            "loss_memory",
            run,
            *(("--size", "64", "--targets", "2", *config(run)) if run.dry else ()),
        ),
        headline=read_result,
        result="result.json",
    ),
    Step(
        "fps",
        90,
        lambda run: program("fps", run, *(("--size", "64", *config(run)) if run.dry else ())),
        headline=read_result,
        result="result.json",
    ),
)


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
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    command = shlex.join(
        ["python", "tools/gpu_check.py", *(sys.argv[1:] if argv is None else argv)]
    )
    run = Run(options.output.resolve(), options.dry_run)
    try:
        run.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"the output folder cannot be made: {error}")
    selected = [step for step in steps if step.name in chosen]
    results = run_all(selected, run, options.seconds, f"`{command}`, {date}")
    # The table last: whoever keeps the end of the output only has it.
    print(f"\n{details(results)}\n\n{table(results)}", flush=True)
    return int(any(x.status not in ("ok", "skipped") for x in results))


if __name__ == "__main__":
    # So that the process of the current step ends too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
