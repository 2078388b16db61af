"""GPU tests carry the marker, so that `pytest -m gpu` runs all of them."""

import ast
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent


def unmarked(source: str) -> list[str]:
    """Names of test functions and fixtures that skip without CUDA, but lack the marker."""
    names = []
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef):
            marks = " ".join(ast.unparse(x) for x in function.decorator_list)
            if "not torch.cuda.is_available()" in ast.unparse(function) and "mark.gpu" not in marks:
                names.append(function.name)
    return names


def test_tests_that_skip_without_cuda_are_marked():
    """conftest.py skips marked tests; a test without the marker must not skip by itself."""
    found = {
        str(path.relative_to(TESTS)): names
        for path in TESTS.rglob("test_*.py")
        if path.name != Path(__file__).name and (names := unmarked(path.read_text()))
    }
    assert found == {}


@pytest.mark.parametrize(
    "decorator, names",
    [
        ("", ["test"]),
        ("@pytest.mark.skipif(not torch.cuda.is_available(), reason='x')", ["test"]),
        ("@pytest.mark.gpu", []),
    ],
)
def test_unmarked(decorator, names):
    body = "if not torch.cuda.is_available():\n        pytest.skip('no GPU')"
    assert unmarked(f"{decorator}\ndef test():\n    {body}\n") == names


@pytest.mark.gpu
def test_marked_tests_run_with_a_gpu_only():
    assert torch.cuda.is_available()
