"""Compiled operators only: registration, threads, instruction sets, 64-bit indices.

test_ms_deform_attn.py checks their numbers.
"""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths

from mask2former.ops import MSDeformAttn, backend, ms_deform_attn, ms_deform_attn_fused

ROOT = Path(__file__).resolve().parents[2]
SHAPES = [(6, 9), (3, 5), (1, 1)]
FLAT = [size for shape in SHAPES for size in shape]
POSITIONS = 54 + 15 + 1

pytestmark = pytest.mark.skipif(
    backend("cpu") != "compiled", reason="the library was not built here: no C++ compiler"
)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


def classic_inputs(device="cpu", dtype=torch.float32, queries=11) -> tuple[Tensor, ...]:
    """Value, locations and weights in Mask2Former's shapes: 8 heads of 32 channels, 4 points."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    size = (2, queries, 8, len(SHAPES), 4)
    value = torch.randn(2, POSITIONS, 8, 32, generator=generator).to(device, dtype)
    locations = (torch.rand(*size, 2, generator=generator) * 1.6 - 0.3).to(device, exact)
    weights = torch.rand(size, generator=generator).flatten(3).softmax(-1).view(size)
    return value, locations, weights.to(device, exact)


def fused_inputs(device="cpu", dtype=torch.float32, queries=11) -> tuple[Tensor, ...]:
    """Value, reference points, offsets and logits."""
    generator = torch.Generator().manual_seed(1)
    value, locations, weights = classic_inputs(device, dtype, queries)
    exact = locations.dtype
    reference = torch.rand(1, queries, len(SHAPES), 2, generator=generator).to(device, exact)
    offsets = torch.randn(locations.shape, generator=generator).to(device, exact) * 2
    return value, reference, offsets, weights.flatten(3).log()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_opcheck(device, dtype):
    ops = torch.ops.mask2former
    value, *points = (x.requires_grad_() for x in classic_inputs(device, dtype))
    torch.library.opcheck(ops.ms_deform_attn.default, (value, FLAT, *points))
    value, reference, *points = fused_inputs(device, dtype)
    inputs = [x.requires_grad_() for x in (value, *points)]
    args = (inputs[0], FLAT, reference, *inputs[1:])
    torch.library.opcheck(ops.ms_deform_attn_fused.default, args)
    detached = [x.detach() if isinstance(x, Tensor) else x for x in args]
    grad = torch.randn(2, 11, 256).to(device, dtype)
    torch.library.opcheck(
        ops.ms_deform_attn_fused_backward.default,
        (grad, *detached, False),
        test_utils=("test_schema", "test_faketensor"),
    )


def gradients(function, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The output and the gradients of all inputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(inputs[0], SHAPES, *inputs[1:])
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.device, out.dtype))]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_equals_cpu(dtype):
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    for on_cpu, on_cuda in zip(
        gradients(ms_deform_attn, classic_inputs("cpu", dtype)),
        gradients(ms_deform_attn, classic_inputs("cuda", dtype)),
        strict=True,
    ):
        torch.testing.assert_close(on_cuda.cpu(), on_cpu, **tolerance)


@pytest.mark.gpu
def test_deterministic_on_cuda():
    torch.use_deterministic_algorithms(True)
    try:
        runs = [gradients(ms_deform_attn, classic_inputs("cuda", queries=999)) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_results_do_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            runs.append(gradients(ms_deform_attn, classic_inputs(queries=999)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_no_second_derivative():
    value, locations, weights = (x.requires_grad_() for x in classic_inputs())
    out = ms_deform_attn(value, SHAPES, locations, weights)
    (grad,) = torch.autograd.grad(out.square().sum(), locations, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


def test_reference_points_that_need_a_gradient_get_it():
    value, reference, offsets, logits = fused_inputs(dtype=torch.float64, queries=2)
    inputs = (value[..., :2, :1], reference.requires_grad_(), offsets[:, :, :2], logits[:, :, :2])
    assert torch.autograd.gradcheck(
        lambda r: ms_deform_attn_fused(inputs[0], SHAPES, r, *inputs[2:]), reference
    )
    args = (value, FLAT, reference, offsets.requires_grad_(), logits)
    with pytest.raises(NotImplementedError, match="no gradient for its reference points"):
        torch.ops.mask2former.ms_deform_attn_fused(*args).sum().backward()


@pytest.mark.parametrize(
    "change",
    [
        {"value": torch.zeros(2, POSITIONS - 1, 8, 32)},
        {"value": torch.zeros(2, POSITIONS, 4, 32)},
        {"value": torch.zeros(2, POSITIONS, 8)},
        {"value": torch.zeros(2, POSITIONS, 8, 32, dtype=torch.float64)},
        {"shapes": FLAT[:-1]},
        {"shapes": [-6, -9, 3, 5, 1, 1]},
        {"shapes": [2**31, 1, 3, 5, 1, 1]},
        {"locations": torch.zeros(2, 11, 8, 3, 4, 3)},
        {"locations": torch.zeros(1, 11, 8, 3, 4, 2)},
        {"weights": torch.zeros(2, 11, 8, 3, 3)},
        {"weights": torch.zeros(2, 10, 8, 3, 4)},
        {"weights": torch.zeros(2, 11, 8, 3, 4, dtype=torch.int64)},
        {"grad": torch.zeros(2, 11, 255)},
        {"grad": torch.zeros(2, 10, 256)},
    ],
)
def test_operators_reject_arguments_that_would_read_out_of_bounds(change):
    value, locations, weights = classic_inputs()
    inputs = {"value": value, "shapes": FLAT, "locations": locations, "weights": weights, **change}
    args = [inputs[name] for name in ("value", "shapes", "locations", "weights")]
    if "grad" not in change:
        with pytest.raises(RuntimeError):
            torch.ops.mask2former.ms_deform_attn(*args)
    with pytest.raises(RuntimeError):
        torch.ops.mask2former.ms_deform_attn_backward(
            inputs.get("grad", torch.zeros(2, 11, 256)), *args, False
        )


def test_more_than_two_to_the_31_elements():
    """Needs little memory, because pages that are never touched are never allocated."""
    height, width = 2**12, 2**11 + 1
    shapes = [(1, 1), (height, width)]  # just over 2^31 numbers with 256 channels
    value = torch.empty(1, 1 + height * width, 8, 32)
    assert value.numel() > 2**31
    value[0, -1] = 1.0  # the last pixel
    locations = torch.full((1, 1, 8, 2, 1, 2), -9.0)
    locations[..., 1, 0, :] = torch.tensor([(width - 0.5) / width, (height - 0.5) / height])
    out = ms_deform_attn(value, shapes, locations, torch.ones(1, 1, 8, 2, 1))
    torch.testing.assert_close(out, torch.ones(1, 1, 256), rtol=0, atol=2e-3)


def module_and_inputs(device="cpu") -> tuple[MSDeformAttn, tuple[Tensor, Tensor, Tensor]]:
    torch.manual_seed(0)
    module = MSDeformAttn(d_model=64, n_levels=3, n_heads=4, n_points=2).to(device)
    for parameter in module.parameters():  # including those initialised to zero
        torch.nn.init.normal_(parameter, std=0.2)
    query, memory = torch.randn(2, 7, 64), torch.randn(2, POSITIONS, 64)
    return module, tuple(x.to(device) for x in (query, torch.rand(1, 7, 3, 2), memory))


def test_compile_without_a_graph_break(device):
    module, inputs = module_and_inputs(device)
    # Compiling C++ takes long, and the operators have no kernels of Inductor.
    backend = "aot_eager" if device == "cpu" else "inductor"
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    results = []
    for function in (module, compiled):
        module.zero_grad()
        out = function(*inputs, SHAPES)
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad.clone() for p in module.parameters())])
    for eager, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)


def test_inductor_calls_the_operator():
    """With the strides that it reads, between two operations that Inductor compiles as one."""
    # Precompiled headers and a test of the vector instructions take longer than this kernel.
    options = {"cpp.vec_isa_ok": False, "cpp_cache_precompile_headers": False}
    value, *points = fused_inputs()

    def function(value):
        transposed = (value * 2).transpose(1, 3).contiguous().transpose(1, 3)
        return ms_deform_attn_fused(transposed, SHAPES, *points)

    compiled = torch.compile(function, fullgraph=True, options=options)
    torch.testing.assert_close(compiled(value), function(value), rtol=1e-5, atol=1e-5)


def test_exported_module_needs_no_custom_operator():
    module, inputs = module_and_inputs()
    program = torch.export.export(module, (*inputs, SHAPES))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("grid_sample" in name for name in called)
    assert not any("mask2former" in name for name in called)
    torch.testing.assert_close(program.module()(*inputs, SHAPES), module(*inputs, SHAPES))


def test_autocast_keeps_locations_and_weights_exact():
    module, (query, reference, memory) = module_and_inputs()
    seen = {}
    hook = torch.ops.mask2former.ms_deform_attn_fused

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is hook.default:
                seen["dtypes"] = [x.dtype for x in args if isinstance(x, Tensor)]
                seen["offsets"] = args[3]
            return func(*args, **(kwargs or {}))

    with torch.autocast("cpu", torch.bfloat16), Record():
        out = module(query, reference, memory, SHAPES)
    assert seen["dtypes"] == [torch.bfloat16, *[torch.float32] * 3]
    torch.testing.assert_close(seen["offsets"].flatten(2), module.sampling_offsets(query))
    expected = module(query, reference, memory, SHAPES)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.03, atol=0.03 * expected.std().item())


@pytest.mark.parametrize("capability", ["default", "avx2", None])
def test_instruction_sets(capability):
    """PyTorch's environment variable limits our kernels too; each set passes the self-test."""
    env = {k: v for k, v in os.environ.items() if k != "ATEN_CPU_CAPABILITY"}
    if capability is not None:
        env["ATEN_CPU_CAPABILITY"] = capability
    result = forked.run([sys.executable, "-m", "mask2former.ops"], env=env, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    line = next(line for line in result.stdout.splitlines() if line.startswith("cpu: compiled"))
    if capability == "default":
        assert "AVX" not in line
    if capability == "avx2":
        assert "AVX512" not in line
    assert result.stdout.count("self-test on cpu") == result.stdout.count("passed") >= 3


@pytest.mark.parametrize("function", ["ms_deform_attn", "ms_deform_attn_fused"])
def test_self_test_can_fail(function, monkeypatch, capsys):
    program = importlib.import_module("mask2former.ops.__main__")
    original = getattr(program, function)
    monkeypatch.setattr(program, function, lambda *args: original(*args) * 1.02)
    assert program.main() == 1
    lines = capsys.readouterr().out.splitlines()
    failed = "fused" if function.endswith("fused") else "classic"
    for line in lines:
        if line.startswith("self-test on cpu"):
            assert ("FAILED" in line) == (f" {failed}, " in line)


def test_address_sanitizer(tmp_path):
    """No read or write out of bounds, on a build with the address sanitizer."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs g++ on Linux")
    runtimes = [
        subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True)
        for name in ("libasan.so", "libubsan.so")
    ]
    preload = " ".join(run.stdout.strip() for run in runtimes)
    if not all(Path(path).is_absolute() for path in preload.split()):
        pytest.skip("the compiler has no address sanitizer")
    sources = ROOT / "mask2former" / "csrc"
    library = tmp_path / "sanitized.so"
    # Optimising takes far longer than what runs.
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-g", "-O0", "-std=c++17", "-fsanitize=address,undefined"]
        + ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
        + [f"-isystem{path}" for path in include_paths()]
        + [sources / "ms_deform_attn.cpp", sources / "cpu" / "ms_deform_attn.cpp", "-o", library]
        + [f"-L{path}" for path in library_paths()]
        + ["-ltorch_cpu"],
        check=True,
    )
    env = dict(os.environ, LD_PRELOAD=preload, ASAN_OPTIONS="detect_leaks=0")
    env["UBSAN_OPTIONS"] = "halt_on_error=1"
    script = Path(__file__).with_name("exercise_kernels.py")
    result = subprocess.run(
        [sys.executable, script, library], env=env, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.strip() == "clean"
