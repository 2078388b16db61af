"""What the programs of tools/gpu_check.py share: arguments, the result, paths."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

# Programs here use modules of the benchmark tool.
sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmark"))


def make_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("folder", type=Path, help="for the results")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    return parser


def write_result(folder: Path, numbers: dict[str, Any]) -> None:
    """Write what the summary shows."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(numbers, indent=1))
