"""Builds the operator library of mask2former; static metadata is in pyproject.toml.

One file, `mask2former/_C.abi3.so`, works with any torch from 2.11 on and any Python: it uses the
LibTorch stable ABI and no Python API, and `mask2former.ops` loads it by path. The build uses the
folder of the environment's torch without importing it, even under pip's build isolation. If the
environment has no torch, an isolated build downloads one.

Environment variables:
    CXX                   C++ compiler, also for nvcc (default: c++, g++ or clang++)
    CXXFLAGS, LDFLAGS     extra flags
    FORCE_CUDA            1: require CUDA kernels; 0: leave them out; unset: build if nvcc is found
    CUDA_HOME, CUDA_PATH  CUDA toolkit (default: that of nvcc on the PATH, or /usr/local/cuda)
    TORCH_CUDA_ARCH_LIST  compute capabilities such as "8.0;9.0a;12.0+PTX" (default: the main ones)
    MAX_JOBS              number of parallel compile jobs (default: one per CPU)
    MASK2FORMER_NO_OP     1: install without the library
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, SetupError

# setuptools runs this file from the folder it is in.
CSRC = Path("mask2former", "csrc")
LIBRARY = Path("mask2former", "_C.abi3.so")
OBJECTS = Path("build", "csrc")
# Copied into a wheel, so that its users need no checkout.
BUNDLE = ("mask2former", "_project")
BUNDLED_FOLDERS = ("configs", "tools")
BUNDLED_FILES = ("datasets/*.py", "requirements*.txt", "pyproject.toml", "README.md")
MIN_TORCH = (2, 11)
MIN_PYTHON = "cp310"

DEFINES = [f"-DTORCH_TARGET_VERSION=0x{MIN_TORCH[0]:02x}{MIN_TORCH[1]:02x}000000000000"]
CXX_FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC"]
CXX_FLAGS += ["-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wall", "-Wextra"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]

MIN_CUDA_MAJOR = 7
# Compute capability 11.0 is one embedded board; TORCH_CUDA_ARCH_LIST can name it.
SKIPPED_CUDA_MAJOR = 11

WITHOUT_OP = "MASK2FORMER_NO_OP=1 installs without the compiled operators"
WITHOUT_CUDA = "FORCE_CUDA=0 builds without CUDA kernels"


def say(text: str) -> None:
    print(f"mask2former: {text}", flush=True)


def read_switch(name: str) -> bool | None:
    """Read an environment variable that is 1, 0 or not set.

    Raises:
        SetupError: it has another value.
    """
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SetupError(f"{name} must be 0 or 1, got {value!r}")
    return None if value == "" else value == "1"


def read_flags(name: str) -> list[str]:
    return shlex.split(os.environ.get(name, ""))


def find_sources(*suffixes: str) -> list[Path]:
    return sorted(path for path in CSRC.rglob("*") if path.suffix in suffixes)


# ---------------------------------------------------------------- compilers and torch


def find_compiler() -> list[str] | None:
    """Return the command of the C++ compiler, or None without one.

    Raises:
        SetupError: CXX names a compiler that does not exist.
    """
    named = read_flags("CXX")
    if named:
        if shutil.which(named[0]) is None:
            raise SetupError(f"CXX={os.environ['CXX']}: compiler not found")
        return named
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def why_no_library() -> str | None:
    """Return why the library is not built, or None if it is."""
    if read_switch("MASK2FORMER_NO_OP"):
        return "MASK2FORMER_NO_OP=1"
    if os.name != "posix":
        return f"not supported on {sys.platform}"
    if find_compiler() is None:
        return "no C++ compiler found ($CXX, c++, g++, clang++)"
    return None


def find_torch() -> Path | None:
    """Return the folder of the torch package: the importable one, else the environment's.

    The latter is for isolated builds, which cannot import the packages of their target environment.
    """
    spec = importlib.util.find_spec("torch")
    folders = list(spec.submodule_search_locations or []) if spec else []
    folders += [os.path.join(sysconfig.get_path(name), "torch") for name in ("purelib", "platlib")]
    return next((Path(folder) for folder in folders if Path(folder, "version.py").is_file()), None)


def check_torch(folder: Path | None) -> Path:
    """Return the folder if its torch is usable.

    Raises:
        SetupError: torch is missing or too old.
    """
    needed = "torch>={}.{}".format(*MIN_TORCH)
    if folder is None:
        raise SetupError(f"{needed} is needed to build: install it first, or {WITHOUT_OP}")
    text = (folder / "version.py").read_text()
    version = re.search(r"^__version__ = ['\"]((\d+)\.(\d+)[^'\"]*)", text, re.M)
    if version is None:
        raise SetupError(f"{folder / 'version.py'} has no torch version")
    if (int(version[2]), int(version[3])) < MIN_TORCH:
        raise SetupError(f"{needed} is needed, {folder} is torch {version[1]}: upgrade it first")
    return folder


def find_nvcc() -> Path | None:
    """Return nvcc, or None if CUDA kernels are not built.

    Raises:
        SetupError: FORCE_CUDA=1, but nvcc is not found.
    """
    force_cuda = read_switch("FORCE_CUDA")
    if force_cuda is False:
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    on_path = shutil.which("nvcc")
    if home:
        nvcc = Path(home, "bin", "nvcc")
    elif on_path:
        # Resolve links: nvcc looks for its toolkit beside itself.
        nvcc = Path(on_path).resolve()
    else:
        nvcc = Path("/usr/local/cuda/bin/nvcc")
    if os.access(nvcc, os.X_OK):
        return nvcc
    if force_cuda:
        raise SetupError(f"FORCE_CUDA=1, but {nvcc} does not exist: set CUDA_HOME or PATH")
    return None


def ask_nvcc(nvcc: Path, *options: str) -> str:
    """Return the output of nvcc, part of which goes to stderr.

    Raises:
        CompileError: nvcc fails.
    """
    result = subprocess.run(
        [nvcc, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if result.returncode != 0:
        raise CompileError(f"{nvcc} {' '.join(options)} failed: {result.stdout}\n{WITHOUT_CUDA}.")
    return result.stdout


# ---------------------------------------------------------------- CUDA architectures


def choose_architectures(known: set[tuple[int, int]]) -> list[str]:
    """Return the compute capabilities to compile for, such as ["8.0", "9.0+PTX"].

    TORCH_CUDA_ARCH_LIST if set. Otherwise the lowest of each generation, whose code the rest of the
    generation can run, and PTX of the last one for later generations.

    Args:
        known: (major, minor) that nvcc can compile for.

    Raises:
        SetupError: TORCH_CUDA_ARCH_LIST is invalid or names something that nvcc does not support.
    """
    chosen = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip(" ;,"))
    if chosen == [""]:
        lowest: dict[int, int] = {}
        for major, minor in sorted(known):
            if major >= MIN_CUDA_MAJOR and major != SKIPPED_CUDA_MAJOR:
                lowest.setdefault(major, minor)
        return [f"{major}.{minor}" for major, minor in lowest.items()][:-1] + [
            "{}.{}+PTX".format(*max(lowest.items()))
        ]
    for text in chosen:
        match = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", text)
        if match is None:
            raise SetupError(
                f"TORCH_CUDA_ARCH_LIST: {text!r} is not a compute capability such as 9.0 or 9.0+PTX"
            )
        if (int(match[1]), int(match[2])) not in known:
            names = " ".join(f"{major}.{minor}" for major, minor in sorted(known))
            raise SetupError(f"TORCH_CUDA_ARCH_LIST: nvcc does not support {text}, only {names}")
    return chosen


def read_known_architectures(listing: str) -> set[tuple[int, int]]:
    """Parse `nvcc --list-gpu-arch`: compute_90 is (9, 0)."""
    matches = re.findall(r"^compute_(\d+)(\d)$", listing, re.M)
    return {(int(major), int(minor)) for major, minor in matches}


def architecture_flags(architectures: list[str]) -> list[str]:
    flags = []
    for text in architectures:
        number = text.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if text.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


# ---------------------------------------------------------------- compile and link


def run_compiler(target: Path, inputs: list[Path], command: list[str], hint: str) -> None:
    """Run a command that builds `target`, unless target is up to date with inputs and command.

    Raises:
        CompileError: the command failed and has printed its message.
    """
    # Written after the target: without it, the target may be incomplete.
    record = target.with_name(f"{target.name}.command")
    text = shlex.join(command)
    if target.exists() and record.exists() and record.read_text() == text:
        made = target.stat().st_mtime
        if all(path.stat().st_mtime <= made for path in inputs):
            return
    record.unlink(missing_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    # A single print, since several compilers run in parallel.
    print(f"{text}\n{result.stdout}", end="", flush=True)
    if result.returncode != 0:
        raise CompileError(f"{target.name} could not be built, see the message above.\n{hint}.")
    record.write_text(text)


def build_library(compiler: list[str], torch: Path, nvcc: Path | None) -> Path:
    """Compile and link what has changed; return the library."""
    include = ["-isystem", str(torch / "include")]
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    headers = find_sources(".h", ".cuh")
    sources = find_sources(".cpp")
    cxx = [*compiler, *CXX_FLAGS, *DEFINES, *include]
    link = [*compiler, "-shared"]
    libraries = [f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu"]
    hints = {".cpp": WITHOUT_OP}

    if nvcc is not None:
        known = read_known_architectures(ask_nvcc(nvcc, "--list-gpu-arch"))
        architectures = choose_architectures(known)
        say(f"building CUDA kernels with {nvcc} for {' '.join(architectures)}")
        # Start the longest jobs first.
        sources = find_sources(".cu") + sources
        cxx += ["-DUSE_CUDA", f'-DMASK2FORMER_CUDA_ARCHITECTURES="{" ".join(architectures)}"']
        nvcc_command = [str(nvcc), *NVCC_FLAGS, *DEFINES, "-DUSE_CUDA", *include]
        nvcc_command += [f"--threads={jobs}"]
        if not os.environ.get("NVCC_CCBIN"):  # nvcc's own name for the host compiler
            # Only the compiler itself: no ccache before it, no options after it.
            nvcc_command += ["-ccbin", [word for word in compiler if word[0] != "-"][-1]]
        nvcc_command += architecture_flags(architectures)
        libraries += cuda_runtime_flags(nvcc)
        hints[".cu"] = f"CXX names another host compiler, {WITHOUT_CUDA}, {WITHOUT_OP}"
    else:
        say("building without CUDA kernels (FORCE_CUDA=0, or nvcc not found)")

    commands = []
    for source in sources:
        target = OBJECTS / source.relative_to(CSRC).with_suffix(f"{source.suffix}.o")
        command = nvcc_command if source.suffix == ".cu" else [*cxx, *read_flags("CXXFLAGS")]
        command = [*command, "-c", str(source), "-o", str(target)]
        commands.append((target, [source, *headers], command, hints[source.suffix]))
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda arguments: run_compiler(*arguments), commands))

    objects = [target for target, *_ in commands]
    library = OBJECTS / LIBRARY.name
    if sys.platform == "linux":
        # Keep the dependency on libtorch, although none of its own symbols is used: it loads
        # libtorch_cpu and, in a CUDA build of torch, libtorch_cuda, which has a symbol we use.
        link += ["-Wl,--no-as-needed,--no-undefined,--exclude-libs,ALL"]
    command = [*link, *map(str, objects), "-o", str(library), *libraries, *read_flags("LDFLAGS")]
    run_compiler(library, objects, command, WITHOUT_OP)
    return library


def cuda_runtime_flags(nvcc: Path) -> list[str]:
    """Return flags to link CUDA statically: torch may use another CUDA version, or none."""
    report = ask_nvcc(nvcc, "--dryrun", "-c", str(find_sources(".cu")[0]))
    match = re.search(r"^#\$ LIBRARIES=(.*)$", report, re.M)
    folders = shlex.split(match[1]) if match else []
    return [*folders, "-lcudart_static", "-lrt", "-ldl", "-lpthread"]


# ---------------------------------------------------------------- setuptools commands


class BuildLibrary(build_ext):
    """Build the library where setuptools expects an extension module."""

    def get_ext_filename(self, fullname: str) -> str:
        # The same name for every Python.
        return str(Path(*fullname.split(".")[:-1], LIBRARY.name))

    def build_extension(self, ext: Extension) -> None:
        compiler = find_compiler()
        assert compiler is not None, "setup() got an extension without a compiler"
        if self.force:
            shutil.rmtree(OBJECTS, ignore_errors=True)
        library = build_library(compiler, check_torch(find_torch()), find_nvcc())
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # a process may have the old file open
        shutil.copy(library, target)


class BuildWithProject(build_py):
    """Add the project's other files to a wheel: utils/project_files.py looks for them."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return  # they lie beside the package
        bundle = Path(self.build_lib, *BUNDLE)
        shutil.rmtree(bundle, ignore_errors=True)
        ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
        for name in BUNDLED_FOLDERS:
            shutil.copytree(name, bundle / name, ignore=ignore)
        for pattern in BUNDLED_FILES:
            for path in sorted(Path().glob(pattern)):
                (bundle / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, bundle / path)


class BuildWithoutLibrary(BuildWithProject):
    """Print why the library is not built; remove one left by an editable install."""

    def run(self) -> None:
        say(f"no compiled operators, their PyTorch formulation will run: {why_no_library()}")
        if self.editable_mode:
            LIBRARY.unlink(missing_ok=True)
        super().run()


def main() -> None:
    try:
        with_library = why_no_library() is None
    except SetupError as error:
        raise SystemExit(f"error: {error}") from None
    if not with_library:
        setup(cmdclass={"build_py": BuildWithoutLibrary})
        return
    # A free-threaded Python has no limited API, so its wheel is tagged for that Python.
    has_limited_api = not sysconfig.get_config_var("Py_GIL_DISABLED")
    setup(
        ext_modules=[Extension("mask2former._C", sources=[], py_limited_api=has_limited_api)],
        cmdclass={"build_ext": BuildLibrary, "build_py": BuildWithProject},
        options={"bdist_wheel": {"py_limited_api": MIN_PYTHON}} if has_limited_api else {},
        # Only an isolated build without any torch installs this, in its own environment.
        setup_requires=[] if find_torch() else ["torch>={}.{}".format(*MIN_TORCH)],
    )


# setuptools runs this file as __main__ as well.
if __name__ == "__main__":
    main()
