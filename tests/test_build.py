"""The build of the operator library by setup.py, with fake compilers."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from load_script import load_script

from mask2former.ops import _library

ROOT = Path(__file__).resolve().parents[1]
VARIABLES = ["CXX", "CXXFLAGS", "LDFLAGS", "FORCE_CUDA", "CUDA_HOME", "CUDA_PATH", "NVCC_CCBIN"]
VARIABLES += ["TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "MASK2FORMER_NO_OP"]
LIBRARY = "mask2former/_C.abi3.so"
CUDA_13 = "75 80 86 87 88 89 90 100 110 103 120 121"


def write_program(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Load setup.py as a module, without its environment variables."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return load_script("setup.py")


# ---------------------------------------------------------------- decisions


@pytest.mark.parametrize(
    "known, expected",
    [
        ("50 52 60 61 70 72 75 80 86 87 89 90", "7.0 8.0 9.0+PTX"),
        (CUDA_13, "7.5 8.0 9.0 10.0 12.0+PTX"),
        ("80 90 100 120 130", "8.0 9.0 10.0 12.0 13.0+PTX"),
    ],
)
def test_default_architectures_are_one_per_generation(
    builder: ModuleType, known: str, expected: str
) -> None:
    listing = "".join(f"compute_{number}\n" for number in known.split())
    architectures = builder.choose_architectures(builder.read_known_architectures(listing))
    assert " ".join(architectures) == expected


@pytest.mark.parametrize("text", ["8.0;9.0a;12.0+PTX", " 8.0 9.0a 12.0+PTX ", "8.0,9.0a;12.0+PTX;"])
def test_user_architecture_list(
    builder: ModuleType, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", text)
    architectures = builder.choose_architectures({(8, 0), (9, 0), (12, 0)})
    assert architectures == ["8.0", "9.0a", "12.0+PTX"]
    assert builder.architecture_flags(architectures) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


@pytest.mark.parametrize(
    "text, message",
    [
        ("8.0;Hopper", "'Hopper' is not a compute capability"),
        ("sm_90", "'sm_90' is not a compute capability"),
        ("5.0;9.0", "nvcc does not support 5.0, only 8.0 9.0"),
    ],
)
def test_unsupported_architectures_are_an_error(
    builder: ModuleType, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", text)
    with pytest.raises(builder.SetupError, match=message):
        builder.choose_architectures({(8, 0), (9, 0)})


def test_nvcc_is_taken_from_the_toolkit_or_the_path(
    builder: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tmp_path = tmp_path.resolve()
    named = write_program(tmp_path / "named" / "bin" / "nvcc", "")
    toolkit = write_program(tmp_path / "toolkit" / "bin" / "nvcc", "")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "nvcc").symlink_to(toolkit)

    monkeypatch.setenv("PATH", str(tmp_path / "links"))
    assert builder.find_nvcc() == toolkit
    monkeypatch.setenv("CUDA_PATH", str(named.parents[1]))
    assert builder.find_nvcc() == named
    # A named toolkit is never replaced by another one.
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "none"))
    assert builder.find_nvcc() is None
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(builder.SetupError, match=f"but {tmp_path}/none/bin/nvcc does not exist"):
        builder.find_nvcc()
    monkeypatch.setenv("CUDA_HOME", str(named.parents[1]))
    assert builder.find_nvcc() == named
    monkeypatch.setenv("FORCE_CUDA", "0")
    assert builder.find_nvcc() is None
    monkeypatch.setenv("FORCE_CUDA", "yes")
    with pytest.raises(builder.SetupError, match="FORCE_CUDA must be 0 or 1, got 'yes'"):
        builder.find_nvcc()


def test_compiler_is_the_named_one_or_the_first_on_the_path(
    builder: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert builder.find_compiler() is None
    assert "no C++ compiler found" in builder.why_no_library()
    write_program(tmp_path / "clang++", "")
    assert builder.find_compiler() == ["clang++"]
    assert builder.why_no_library() is None
    write_program(tmp_path / "c++", "")
    assert builder.find_compiler() == ["c++"]
    write_program(tmp_path / "ccache", "")
    monkeypatch.setenv("CXX", "ccache c++")
    assert builder.find_compiler() == ["ccache", "c++"]
    monkeypatch.setenv("CXX", "g++-99")
    with pytest.raises(builder.SetupError, match=r"CXX=g\+\+-99: compiler not found"):
        builder.find_compiler()


def test_torch_of_the_environment_is_found_in_an_isolated_build(
    builder: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert builder.check_torch(builder.find_torch()).name == "torch"

    monkeypatch.setattr(builder.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(builder.sysconfig, "get_path", lambda name: str(tmp_path))
    assert builder.find_torch() is None
    with pytest.raises(builder.SetupError, match=r"torch>=2\.11 is needed to build"):
        builder.check_torch(None)

    (tmp_path / "torch").mkdir()
    version = tmp_path / "torch" / "version.py"
    version.write_text("from typing import Optional\n__version__ = '2.11.0a0+vendor'\n")
    assert builder.check_torch(builder.find_torch()) == tmp_path / "torch"
    version.write_text("__version__ = '2.4.1+cu124'\n")
    with pytest.raises(builder.SetupError, match=r"is torch 2\.4\.1\+cu124: upgrade it first"):
        builder.check_torch(builder.find_torch())


def test_only_a_build_without_any_torch_asks_for_one(
    builder: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = []
    monkeypatch.setattr(builder, "setup", lambda **arguments: calls.append(arguments))
    monkeypatch.setattr(builder, "find_compiler", lambda: ["c++"])
    builder.main()
    monkeypatch.setattr(builder, "find_torch", lambda: None)
    builder.main()
    monkeypatch.setenv("MASK2FORMER_NO_OP", "1")
    builder.main()
    assert [call.get("setup_requires") for call in calls] == [[], ["torch>=2.11"], None]


# ---------------------------------------------------------------- builds with fake compilers


class Checkout:
    """A copy of the sources, with compilers that log their command and write an empty file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "checkout"
        self.log = folder / "log"
        no_leftovers = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / "mask2former", self.folder / "mask2former", ignore=no_leftovers)
        for name in ["setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"]:
            shutil.copy(ROOT / name, self.folder)
        shutil.copy(ROOT / "mask2former_command.py", self.folder)
        for name in ["configs", "tools"]:
            (self.folder / name).mkdir()
        (self.folder / "mask2former" / "csrc" / "cuda").mkdir(exist_ok=True)
        (self.folder / "mask2former" / "csrc" / "cuda" / "fake.cu").write_text("")
        # PATH holds these programs and nothing else.
        compile_ = (
            f'echo "$0 $*" >> {self.log}\n'
            'while [ $# -gt 0 ]; do if [ "$1" = -o ]; then : > "$2"; fi; shift; done'
        )
        self.path = folder / "bin"
        write_program(self.path / "c++", compile_)
        listing = "".join(f"echo compute_{number}; " for number in CUDA_13.split())
        libraries = 'echo \'#$ LIBRARIES=  "-L/toolkit/lib/stubs" "-L/toolkit/lib"\' >&2'
        self.nvcc = write_program(
            folder / "cuda" / "bin" / "nvcc",
            f"case $1 in --list-gpu-arch) {listing} exit;; --dryrun) {libraries}; exit;; esac\n"
            + compile_,
        )
        self.environment = {k: v for k, v in os.environ.items() if k not in VARIABLES}
        self.environment |= {"PATH": str(self.path), "CUDA_HOME": str(folder / "cuda")}

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *command],
            cwd=self.folder,
            env=self.environment | environment,
            capture_output=True,
            text=True,
        )

    def build(self, **environment: str) -> list[str]:
        """Build in place and return the commands that ran."""
        self.log.write_text("")
        result = self.run("setup.py", "build_ext", "--inplace", **environment)
        assert result.returncode == 0, result.stdout + result.stderr
        return self.log.read_text().splitlines()

    def build_with_backend(self, hook: str, **environment: str) -> tuple[Path, str]:
        """Call a build hook as pip does; return the archive and the output."""
        code = f"import sys; from setuptools import build_meta; build_meta.{hook}(sys.argv[1])"
        target = self.folder / "dist"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        result = self.run("-c", code, str(target), **environment)
        assert result.returncode == 0, result.stdout + result.stderr
        (archive,) = target.iterdir()
        return archive, result.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_commands_of_a_build(checkout: Checkout) -> None:
    commands = checkout.build(CXXFLAGS="-g", LDFLAGS="-Wl,-z,now", TORCH_CUDA_ARCH_LIST="8.0;9.0")
    *compile_, link = commands
    assert (checkout.folder / LIBRARY).exists()

    (device,) = (command for command in compile_ if " -c mask2former/csrc/cuda/fake.cu" in command)
    host = [command for command in compile_ if ".cpp -o" in command]
    sources = len(list((ROOT / "mask2former" / "csrc").rglob("*.cpp")))
    assert len(host) == sources > 0
    assert device.startswith(f"{checkout.nvcc} ")
    assert "code=sm_80 " in device and "code=sm_90 " in device
    for command in [device, *host]:
        assert " -DTORCH_TARGET_VERSION=0x020b000000000000 " in command
        assert " -DUSE_CUDA " in command
        assert re.search(r" -isystem \S+/torch/include ", command)
    for command in host:
        assert ' -DMASK2FORMER_CUDA_ARCHITECTURES="8.0 9.0" ' in command
        assert " -fvisibility=hidden " in command and " -g " in command
    for command in commands:
        # One binary for every machine with the same numbers everywhere, without Python and OpenMP.
        assert not re.search(r"march=|fast-math|fopenmp|Python|include/python|rpath", command)
    # The CUDA runtime is static; torch's CUDA libraries come only through libtorch.
    assert "-L/toolkit/lib -lcudart_static -lrt -ldl -lpthread" in link
    assert set(re.findall(r" -l(torch\S*|c10\S*)", link)) == {"torch", "torch_cpu"}
    assert link.endswith(" -Wl,-z,now")


def test_only_changed_files_are_rebuilt(checkout: Checkout) -> None:
    def changed(**environment: str) -> list[str]:
        commands = checkout.build(**environment)
        return sorted({Path(command.split(" -o ")[1].split()[0]).name for command in commands})

    everything = changed()
    csrc = checkout.folder / "mask2former" / "csrc"
    assert "fake.cu.o" in everything and "_C.abi3.so" in everything
    assert changed() == []

    later = (checkout.folder / LIBRARY).stat().st_mtime + 10
    os.utime(csrc / "ms_deform_attn.cpp", (later, later))
    assert changed() == ["_C.abi3.so", "ms_deform_attn.cpp.o"]
    os.utime(csrc / "ms_deform_attn.cpp", (1, 1))
    assert changed() == []

    os.utime(csrc / "ms_deform_attn.h", (later, later))
    assert changed() == everything
    os.utime(csrc / "ms_deform_attn.h", (1, 1))

    # Changed flags and an interrupted compiler also cause a rebuild.
    assert changed(FORCE_CUDA="0") == [name for name in everything if ".cu." not in name]
    record = checkout.folder / "build" / "csrc" / "ms_deform_attn.cpp.o.command"
    record.unlink()
    assert changed(FORCE_CUDA="0") == ["_C.abi3.so", "ms_deform_attn.cpp.o"]


@pytest.mark.parametrize(
    "broken, hints",
    [("c++", ["MASK2FORMER_NO_OP=1"]), ("nvcc", ["CXX", "FORCE_CUDA=0", "MASK2FORMER_NO_OP=1"])],
)
def test_a_failing_compiler_fails_the_build(
    checkout: Checkout, broken: str, hints: list[str]
) -> None:
    program = checkout.nvcc if broken == "nvcc" else checkout.path / "c++"
    lines = program.read_text().splitlines()
    lines[-1] = "echo 'unsupported GNU version!' >&2; exit 1"
    write_program(program, "\n".join(lines[1:]))
    result = checkout.run("setup.py", "build_ext", "--inplace")
    assert result.returncode != 0
    assert "unsupported GNU version!" in result.stdout
    assert "Traceback" not in result.stderr
    assert re.search(r"error: \S+\.o could not be built", result.stderr)
    assert all(hint in result.stderr.splitlines()[-1] for hint in hints)
    assert not (checkout.folder / LIBRARY).exists()


def test_wheel_fits_every_python(checkout: Checkout) -> None:
    archive, _ = checkout.build_with_backend("build_wheel")
    assert re.search(r"-cp310-abi3-\w+\.whl$", archive.name)
    with zipfile.ZipFile(archive) as wheel:
        names = wheel.namelist()
    assert LIBRARY in names
    assert not [name for name in names if "csrc" in name]


def test_without_a_compiler_it_installs_and_says_so(checkout: Checkout) -> None:
    library = checkout.folder / LIBRARY
    checkout.build_with_backend("build_editable")
    assert library.exists()

    (checkout.path / "c++").unlink()
    archive, output = checkout.build_with_backend("build_editable")
    (line,) = (line for line in output.splitlines() if line.startswith("mask2former: "))
    assert "PyTorch formulation will run: no C++ compiler found" in line
    assert archive.name.endswith("-py3-none-any.whl")
    assert not library.exists()  # it would become out of date

    result = checkout.run("setup.py", "build", CXX="no-such-compiler")
    assert result.returncode != 0
    assert result.stderr == "error: CXX=no-such-compiler: compiler not found\n"


# ---------------------------------------------------------------- the set-up


# setup.py imports setuptools, tools/setup_env.py imports pip; nothing else imports both.
@pytest.mark.filterwarnings("ignore:Setuptools is replacing distutils:UserWarning")
def test_old_library_in_the_active_environment_is_rebuilt(
    monkeypatch: pytest.MonkeyPatch, checkout: Checkout
) -> None:
    setup_env = load_script("tools/setup_env.py")
    monkeypatch.setattr(setup_env, "ROOT", checkout.folder)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(checkout.path))

    assert not setup_env.library_is_current()
    library = checkout.folder / LIBRARY
    library.write_text("")
    assert setup_env.library_is_current()
    later = library.stat().st_mtime + 10
    os.utime(checkout.folder / "mask2former" / "csrc" / "ms_deform_attn.h", (later, later))
    assert not setup_env.library_is_current()

    # If it cannot be built, it counts as current.
    library.unlink()
    monkeypatch.setenv("MASK2FORMER_NO_OP", "1")
    assert setup_env.library_is_current()
    monkeypatch.delenv("MASK2FORMER_NO_OP")
    (checkout.path / "c++").unlink()
    assert setup_env.library_is_current()


def test_make_builds_a_missing_or_old_library(tmp_path: Path, checkout: Checkout) -> None:
    shutil.copy(ROOT / "Makefile", checkout.folder)
    venv = tmp_path / "env"
    library = checkout.folder / LIBRARY
    step = f"{venv}/bin/python tools/setup_env.py project"

    def is_repeated() -> bool:
        command = ["make", "-n", "quickstart", f"VENV={venv}"]
        inherited = {"MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "MAKELEVEL"}
        environment = {k: v for k, v in os.environ.items() if k not in inherited}
        result = subprocess.run(
            command, cwd=checkout.folder, env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        return step in result.stdout

    for name in ["requirements.txt", "requirements-detectron2.txt", "tools/setup_env.py"]:
        (checkout.folder / name).write_text("")
    venv.mkdir()
    for name in ["created", "runtime", "project"]:
        (venv / f".stamp-{name}").write_text("")
    assert not is_repeated()  # set up without a compiler
    (venv / ".stamp-project").write_text(f"{LIBRARY}\n")
    assert is_repeated()
    library.write_text("")
    assert not is_repeated()
    source = checkout.folder / "mask2former" / "csrc" / "cpu" / "ms_deform_attn.cpp"
    later = library.stat().st_mtime + 10
    os.utime(source, (later, later))
    assert is_repeated()


# ---------------------------------------------------------------- the library of this checkout

needs_library = pytest.mark.skipif(
    not _library.is_loaded(), reason=f"the operators were not built ({_library.REMEDY})"
)


def copy_of_loader(folder: Path) -> Path:
    path = folder / "mask2former" / "ops" / "_library.py"
    path.parent.mkdir(parents=True)
    shutil.copy(_library.__file__, path)
    return path


@needs_library
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm lists the symbols")
def test_library_needs_only_the_stable_abi() -> None:
    command = ["nm", "-D", "--undefined-only", _library.LIBRARY_PATH]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = {line.split()[-1].split("@")[0]: line.split()[-2] for line in listing.splitlines()}
    assert "torch_call_dispatcher" in needed
    for name, kind in needed.items():
        assert not re.match(r"_ZNK?(2at|3c10|5torch)|Py|_Py|GOMP|omp_|cuda|cu[A-Z]", name), name
        # Loading must not require symbols that only some builds of torch have.
        assert "cuda_stream" not in name or kind == "w", name


@needs_library
def test_library_is_loaded_once() -> None:
    _library.load()
    assert "CPU" in _library.describe()
    assert str(_library.LIBRARY_PATH) in _library.describe()
    again = load_script(Path(_library.__file__))
    assert again.is_loaded()


@needs_library
def test_a_second_copy_is_a_clear_error(tmp_path: Path) -> None:
    loader = copy_of_loader(tmp_path)
    shutil.copy(_library.LIBRARY_PATH, tmp_path / "mask2former")
    with pytest.raises(ImportError, match="another copy of mask2former") as error:
        load_script(loader)
    assert str(_library.LIBRARY_PATH) in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_unloadable_library_is_a_clear_error(tmp_path: Path) -> None:
    loader = copy_of_loader(tmp_path)
    assert "none were built" in load_script(loader).describe()
    library = tmp_path / LIBRARY
    library.write_text("not a library")
    code = "import runpy, sys; runpy.run_path(sys.argv[1])"
    result = subprocess.run(
        [sys.executable, "-c", code, str(loader)], capture_output=True, text=True
    )
    assert result.returncode != 0
    last = result.stderr.splitlines()[-1]
    assert last.startswith("ImportError: cannot load")
    assert str(library) in last and "with torch 2." in last and "reinstall mask2former" in last
