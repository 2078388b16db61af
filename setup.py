"""Builds mask2former: the library of its operators; what is only declared is in pyproject.toml.

One file, `mask2former/_C.abi3.so`, serves every torch from 2.11 on and every Python: it uses the
LibTorch stable ABI and nothing of Python, and `mask2former.ops` loads it by path. torch is not
imported, only its folder is used: the environment's own, also under pip's build isolation; where
there is none, an isolated build fetches one.

Environment variables:
    CXX                   the C++ compiler (also of nvcc), instead of c++, g++ or clang++
    CXXFLAGS, LDFLAGS     are added
    FORCE_CUDA            1: CUDA kernels are needed; 0: leave them out; else: where nvcc is found
    CUDA_HOME, CUDA_PATH  the CUDA toolkit, instead of that of nvcc on the PATH or /usr/local/cuda
    TORCH_CUDA_ARCH_LIST  compute capabilities such as "8.0;9.0a;12.0+PTX", instead of the main ones
    MAX_JOBS              how many files to compile at a time, instead of one for every CPU
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

# setuptools runs this file in its own folder.
CSRC = Path("mask2former", "csrc")
LIBRARY = Path("mask2former", "_C.abi3.so")
OBJECTS = Path("build", "csrc")
MIN_TORCH = (2, 11)
MIN_PYTHON = "cp310"

DEFINES = [f"-DTORCH_TARGET_VERSION=0x{MIN_TORCH[0]:02x}{MIN_TORCH[1]:02x}000000000000"]
CXX_FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC"]
CXX_FLAGS += ["-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wall", "-Wextra"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]

MIN_CUDA_MAJOR = 7
# Compute capability 11.0 is one embedded board; TORCH_CUDA_ARCH_LIST can name it.
LEFT_OUT_CUDA_MAJOR = 11

WITHOUT_OP = "MASK2FORMER_NO_OP=1 installs without the compiled operators"
WITHOUT_CUDA = "FORCE_CUDA=0 builds without CUDA kernels"


def say(text: str) -> None:
    print(f"mask2former: {text}", flush=True)


def read_switch(name: str) -> bool | None:
    """The value of an environment variable that is 1, 0 or not set.

    Raises:
        SetupError: it is something else.
    """
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SetupError(f"{name} must be 0 or 1, got {value!r}")
    return None if value == "" else value == "1"


def read_flags(name: str) -> list[str]:
    return shlex.split(os.environ.get(name, ""))


def find_sources(*suffixes: str) -> list[Path]:
    return sorted(path for path in CSRC.rglob("*") if path.suffix in suffixes)


# ---------------------------------------------------------------- what there is to build with


def find_compiler() -> list[str] | None:
    """The command of the C++ compiler, or None where there is none.

    Raises:
        SetupError: CXX names one that is not there.
    """
    named = read_flags("CXX")
    if named:
        if shutil.which(named[0]) is None:
            raise SetupError(f"CXX={os.environ['CXX']}: there is no such compiler")
        return named
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def why_no_library() -> str | None:
    """The reason why the library is not built, None if it is."""
    if read_switch("MASK2FORMER_NO_OP"):
        return "MASK2FORMER_NO_OP=1"
    if os.name != "posix":
        return f"not supported on {sys.platform}"
    if find_compiler() is None:
        return "no C++ compiler was found ($CXX, c++, g++, clang++)"
    return None


def find_torch() -> Path | None:
    """The folder of the torch package: one that can be imported, else the environment's own.

    The second is for isolated builds, which hide the packages of the environment that they are for.
    """
    spec = importlib.util.find_spec("torch")
    folders = list(spec.submodule_search_locations or []) if spec else []
    folders += [os.path.join(sysconfig.get_path(name), "torch") for name in ("purelib", "platlib")]
    return next((Path(folder) for folder in folders if Path(folder, "version.py").is_file()), None)


def check_torch(folder: Path | None) -> Path:
    """Returns the folder, if it holds a torch to build with.

    Raises:
        SetupError: there is none, or it is too old.
    """
    needed = "torch>={}.{}".format(*MIN_TORCH)
    if folder is None:
        raise SetupError(f"{needed} is needed to build: install it first, or {WITHOUT_OP}")
    text = (folder / "version.py").read_text()
    version = re.search(r"^__version__ = ['\"]((\d+)\.(\d+)[^'\"]*)", text, re.M)
    if version is None:
        raise SetupError(f"{folder / 'version.py'} does not say which torch it is")
    if (int(version[2]), int(version[3])) < MIN_TORCH:
        raise SetupError(f"{needed} is needed, {folder} is torch {version[1]}: upgrade it first")
    return folder


def find_nvcc() -> Path | None:
    """nvcc, or None where CUDA kernels are not to be built.

    Raises:
        SetupError: FORCE_CUDA=1 asks for them and nvcc is not found.
    """
    wanted = read_switch("FORCE_CUDA")
    if wanted is False:
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    on_path = shutil.which("nvcc")
    if home:
        nvcc = Path(home, "bin", "nvcc")
    elif on_path:
        # nvcc looks for its toolkit beside itself, which a link on the PATH is not.
        nvcc = Path(on_path).resolve()
    else:
        nvcc = Path("/usr/local/cuda/bin/nvcc")
    if os.access(nvcc, os.X_OK):
        return nvcc
    if wanted:
        raise SetupError(f"FORCE_CUDA=1, but there is no {nvcc}: set CUDA_HOME or the PATH")
    return None


def ask_nvcc(nvcc: Path, *options: str) -> str:
    """What nvcc prints; some of it goes to stderr.

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
    """The compute capabilities to compile for, such as ["8.0", "9.0+PTX"].

    Those of TORCH_CUDA_ARCH_LIST, else the lowest of each generation, whose code the others of the
    generation run too, and PTX for what comes after the last.

    Args:
        known: major and minor number of what nvcc can compile for.

    Raises:
        SetupError: TORCH_CUDA_ARCH_LIST cannot be read or has something that nvcc does not know.
    """
    chosen = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip(" ;,"))
    if chosen == [""]:
        lowest: dict[int, int] = {}
        for major, minor in sorted(known):
            if major >= MIN_CUDA_MAJOR and major != LEFT_OUT_CUDA_MAJOR:
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
            raise SetupError(f"TORCH_CUDA_ARCH_LIST: {text} is not among those of nvcc: {names}")
    return chosen


def read_known_architectures(listing: str) -> set[tuple[int, int]]:
    """Reads `nvcc --list-gpu-arch`: compute_90 is (9, 0)."""
    found = re.findall(r"^compute_(\d+)(\d)$", listing, re.M)
    return {(int(major), int(minor)) for major, minor in found}


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
    """Runs a command that makes `target`, unless it has been made so from the same inputs.

    Raises:
        CompileError: the command fails; its own message is printed before.
    """
    # Written only after the target: without it the target may be half a file.
    record = target.with_name(f"{target.name}.command")
    text = shlex.join(command)
    if target.exists() and record.exists() and record.read_text() == text:
        made = target.stat().st_mtime
        if all(path.stat().st_mtime <= made for path in inputs):
            return
    record.unlink(missing_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    # In one piece, since several compilers run at a time.
    print(f"{text}\n{result.stdout}", end="", flush=True)
    if result.returncode != 0:
        raise CompileError(f"{target.name} could not be built, see the message above.\n{hint}.")
    record.write_text(text)


def build_library(compiler: list[str], torch: Path, nvcc: Path | None) -> Path:
    """Compiles and links what has changed and returns the library."""
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
        say(f"CUDA kernels with {nvcc} for {' '.join(architectures)}")
        # The longest jobs first.
        sources = find_sources(".cu") + sources
        cxx += ["-DUSE_CUDA", f'-DMASK2FORMER_CUDA_ARCHITECTURES="{" ".join(architectures)}"']
        nvcc_command = [str(nvcc), *NVCC_FLAGS, *DEFINES, "-DUSE_CUDA", *include]
        nvcc_command += [f"--threads={jobs}"]
        if not os.environ.get("NVCC_CCBIN"):  # nvcc's own name for the host compiler
            # Neither ccache before it nor options after it.
            nvcc_command += ["-ccbin", [word for word in compiler if word[0] != "-"][-1]]
        nvcc_command += architecture_flags(architectures)
        libraries += cuda_runtime_flags(nvcc)
        hints[".cu"] = f"CXX names another host compiler, {WITHOUT_CUDA}, {WITHOUT_OP}"
    else:
        say("without CUDA kernels (FORCE_CUDA=0, or nvcc was not found)")

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
        # libtorch brings libtorch_cpu and, in a CUDA build of torch, libtorch_cuda with the one
        # symbol of it that is used; nothing here names it, so it has to be kept on purpose.
        link += ["-Wl,--no-as-needed,--no-undefined,--exclude-libs,ALL"]
    command = [*link, *map(str, objects), "-o", str(library), *libraries, *read_flags("LDFLAGS")]
    run_compiler(library, objects, command, WITHOUT_OP)
    return library


def cuda_runtime_flags(nvcc: Path) -> list[str]:
    """Links the CUDA runtime into the library: the CUDA of torch may be another one, or none."""
    report = ask_nvcc(nvcc, "--dryrun", "-c", str(find_sources(".cu")[0]))
    folders = re.search(r"^#\$ LIBRARIES=(.*)$", report, re.M)
    folders = shlex.split(folders[1]) if folders else []
    return [*folders, "-lcudart_static", "-lrt", "-ldl", "-lpthread"]


# ---------------------------------------------------------------- commands of setuptools


class BuildLibrary(build_ext):
    """Puts the library where setuptools expects an extension module."""

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


class BuildWithoutLibrary(build_py):
    """Says why there is no library, and removes one that an editable install left."""

    def run(self) -> None:
        say(f"without compiled operators, their PyTorch formulation will run: {why_no_library()}")
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
    # A free-threaded Python has no limited API; its wheel gets that Python's tag.
    has_limited_api = not sysconfig.get_config_var("Py_GIL_DISABLED")
    setup(
        ext_modules=[Extension("mask2former._C", sources=[], py_limited_api=has_limited_api)],
        cmdclass={"build_ext": BuildLibrary},
        options={"bdist_wheel": {"py_limited_api": MIN_PYTHON}} if has_limited_api else {},
        # Only an isolated build without any torch installs this, for itself alone.
        setup_requires=[] if find_torch() else ["torch>={}.{}".format(*MIN_TORCH)],
    )


# setuptools runs this file as __main__ as well.
if __name__ == "__main__":
    main()
