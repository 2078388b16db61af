"""The console command `mask2former`: the programs of tools/, from a checkout or an installed wheel.

    mask2former                       lists the programs
    mask2former train --config-file configs/coco/... --num-gpus 8 [KEY VALUE ...]

A program gets the arguments as they are; `configs/...` that is no file here is the project's own.
Only the standard library is used, so that it starts at once and works before anything is installed.
"""

import importlib.util
import os
import signal
import sys
from pathlib import Path

# Name → arguments of Python, `{tools}` is the folder of the programs; and what it does.
PROGRAMS = {
    "train": (["{tools}/train_net.py"], "train, also on several GPUs; --resume continues"),
    "eval": (
        ["{tools}/train_net.py", "--eval-only"],
        "evaluate a checkpoint or an exported file (also: evaluate)",
    ),
    "predict": (["{tools}/demo.py"], "predict images and videos: drawings, results, a report"),
    "check": (["{tools}/check_dataset.py"], "read data sets and report broken annotations"),
    "convert": (["{tools}/convert_dataset.py"], "convert annotations to COCO or label images"),
    "convert-weights": (
        ["{tools}/convert_weights.py"],
        "convert weights, also of and for transformers",
    ),
    "export": (["{tools}/export.py"], "export to torch.export, ONNX or TorchScript"),
    "find-batch-size": (["{tools}/find_batch_size.py"], "the largest batch that fits"),
    "analyze": (["{tools}/analyze_model.py"], "parameters, multiply-adds, structure, speed"),
    "replay": (["{tools}/replay.py"], "run an iteration that was not finite again, find the cause"),
    "ablations": (["{tools}/run_ablations.py"], "run the tables of the paper"),
    "proposals": (["{tools}/evaluate_proposals.py"], "recall of class-agnostic masks"),
    "boundary-ap": (["{tools}/evaluate_coco_boundary_ap.py"], "Boundary AP of a result file"),
    "compare": (["{tools}/compare_runs.py"], "whether two evaluated runs differ, with intervals"),
    "errors": (["{tools}/analyze_errors.py"], "kinds of errors and label-error candidates"),
    "env": (["-m", "mask2former.env"], "versions, devices, compiled op, what is missing"),
    "ops": (["-m", "mask2former.ops"], "the compiled op and its self-test"),
    "quickstart": (["{tools}/quickstart.py"], "train, evaluate and draw on the Shapes data"),
}
# Other names of programs.
ALIASES = {"evaluate": "eval"}
# Options whose value is a config file.
_CONFIG_OPTIONS = ("--config-file", "--base")


def find_root() -> Path:
    """The folder of configs/ and tools/, see `mask2former.utils.project_files`.

    Does not import the package, which takes seconds and needs everything installed.
    """
    spec = importlib.util.find_spec("mask2former")
    if spec is None or spec.origin is None:
        sys.exit("error: the package mask2former cannot be found; install it again.")
    package = Path(spec.origin).resolve().parent
    bundle = package / "_project"
    return bundle if bundle.is_dir() else package.parent


def usage() -> str:
    width = max(map(len, PROGRAMS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in PROGRAMS.items()]
    return "\n".join(
        [
            "usage: mask2former PROGRAM [ARGUMENTS]",
            "",
            *lines,
            f"  {'configs':<{width}}  list the project's configs; with a name, print the file",
            "",
            "mask2former PROGRAM --help shows its arguments.",
        ]
    )


def with_own_configs(arguments: list[str], root: Path) -> list[str]:
    """Replace configs that are no files here by the project's of that name."""
    result = list(arguments)
    for i, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        is_pair = argument in _CONFIG_OPTIONS and i + 1 < len(arguments)
        if is_pair:
            value = arguments[i + 1]
        elif option not in _CONFIG_OPTIONS or not equals:
            continue
        path = root / value
        if value.startswith("configs/") and not os.path.exists(value) and path.is_file():
            result[i + 1 if is_pair else i] = str(path) if is_pair else f"{option}={path}"
    return result


def show_configs(names: list[str], root: Path) -> None:
    """List the configs, or print those named."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly under `| head`
    if not names:
        files = sorted((root / "configs").rglob("*.yaml"))
        print("\n".join(path.relative_to(root).as_posix() for path in files))
    for name in names:
        path = root / name
        if not name.startswith("configs/") or not path.is_file():
            sys.exit(f"error: no config {name!r}; `mask2former configs` lists them.")
        print(path.read_text(encoding="utf-8"), end="")


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return
    name, *rest = arguments
    name = ALIASES.get(name, name)
    root = find_root()
    if name == "configs":
        show_configs(rest, root)
        return
    if name not in PROGRAMS:
        sys.exit(f"error: {name!r} is not a program of mask2former.\n\n{usage()}")
    program = [part.format(tools=root / "tools") for part in PROGRAMS[name][0]]
    command = [sys.executable, *program, *with_own_configs(rest, root)]
    sys.stdout.flush()
    # In place of this process: signals, exit status and spawned workers are those of the program.
    os.execv(sys.executable, command)


if __name__ == "__main__":
    main()
