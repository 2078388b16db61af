"""Set up the Python environment that runs this script.

    python tools/setup_env.py [--keep-installed] {runtime,dev,project} ...

runtime: the packages of requirements.txt; Detectron2 and panopticapi if missing.
dev:     the packages of requirements-dev.txt (tests and lint) and requirements-evaluation.txt.
project: this checkout as an editable install, with its compiled operators.

The Makefile calls it. The project's own environment gets exactly the pinned versions. With
`--keep-installed`, for an environment managed by someone else, only missing packages are installed
and no installed package changes version, except a setuptools too old to build anything. Installed
versions must be in the ranges of pyproject.toml.
Steps can be repeated and interrupted safely.

Uses only the standard library and pip, since it runs before anything is installed.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from pip._vendor.packaging.requirements import InvalidRequirement, Requirement

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
# Distributions whose import name is not their own name with "_" for "-".
MODULE_NAMES = {
    "hydra-core": "hydra",
    "opencv-python-headless": "cv2",
    "pillow": "PIL",
    "pyyaml": "yaml",
}
# Builds must match each other: if one is installed, the pin of the other does not apply.
TORCH_PAIR = {"torch", "torchvision"}
# May be upgraded even with --keep-installed: new virtual environments have a version that torch
# refuses. Below 82, which dropped a module that other packages still import.
BUILD_TOOL, BUILD_TOOL_LIMIT = "setuptools", "<82"
# Not in the registry under their own names: {module: name in requirements-detectron2.txt}.
UNLISTED = {"detectron2": "sal-detectron2", "panopticapi": "panopticapi-lite"}
# Parts of those wheels to leave out: scripts, which would become a top-level package `tools`, and
# extensions built for one Python and one torch.
UNWANTED_DIR, UNWANTED_SUFFIX = "tools", ".so"


class SetupError(Exception):
    """An error whose message is shown to the user without a traceback."""


def say(text: str) -> None:
    print(f"[setup] {text}", flush=True)


def half_installed() -> set[Path]:
    """Return metadata folders of interrupted installs: pip writes INSTALLER last."""
    sites = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    folders = (folder for site in sites for folder in Path(site).glob("*.dist-info"))
    return {folder for folder in folders if not (folder / "INSTALLER").exists()}


def forget(folders: set[Path]) -> None:
    """Remove metadata folders, so that pip installs those packages again."""
    for folder in folders:
        shutil.rmtree(folder)


def run_pip(*args: str | Path, hint: str = "") -> None:
    """Run pip, silently unless it fails.

    If pip is interrupted, a package may have metadata without all of its files and would count as
    installed from then on. So such metadata is removed.

    Raises:
        SetupError: pip failed and has printed its message; `hint` is added.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, args), "-qq"]
    before = half_installed()
    try:
        status = subprocess.run(command, cwd=ROOT).returncode
    finally:
        forget(half_installed() - before)
    if status != 0:
        raise SetupError(f"pip failed, see the message above.{' ' * bool(hint)}{hint}")


def read_requirements(path: Path) -> list[str]:
    """Return the requirement lines of a file, without comments and options such as `-c`."""
    lines = (line.strip() for line in path.read_text().splitlines())
    return [line for line in lines if line and not line.startswith(("#", "-"))]


def applicable(lines: list[str]) -> dict[str, Requirement]:
    """Return requirements whose environment marker applies, by distribution name."""
    requirements = [Requirement(line) for line in lines]
    return {r.name: r for r in requirements if r.marker is None or r.marker.evaluate()}


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed_summary(name: str) -> str | None:
    """Return the one-line description of an installed distribution."""
    try:
        return importlib.metadata.metadata(name)["Summary"]
    except importlib.metadata.PackageNotFoundError:
        return None


def is_importable(module: str) -> bool:
    importlib.invalidate_caches()
    return importlib.util.find_spec(module) is not None


def read_pyproject() -> dict:
    with open(ROOT / "pyproject.toml", "rb") as f:
        return tomllib.load(f)


def declared_summary() -> str:
    return read_pyproject()["project"]["description"]


def declared_ranges(group: str) -> list[str]:
    """Return the requirements in pyproject.toml: `runtime` (with those of the build) or `dev`."""
    pyproject = read_pyproject()
    if group == "dev":
        return pyproject["project"]["optional-dependencies"]["dev"]
    return pyproject["project"]["dependencies"] + pyproject["build-system"]["requires"]


def find_missing(
    ranges: dict[str, Requirement], pins: dict[str, Requirement]
) -> tuple[list[str], list[str]]:
    """Compare installed versions with the declared ranges.

    Args:
        ranges: declared ranges by distribution name.
        pins: exact versions to install for missing packages; same names.

    Returns:
        Requirements to install, and a sentence for each installed version out of range.
    """
    versions = {name: installed_version(name) for name in ranges}
    has_own_torch = any(versions.get(name) for name in TORCH_PAIR)
    missing, unsuitable = [], []
    for name, requirement in ranges.items():
        version = versions[name]
        if version is not None:
            if requirement.specifier.contains(version, prereleases=True):
                continue
            if name == BUILD_TOOL:
                missing.append(f"{name}{requirement.specifier},{BUILD_TOOL_LIMIT}")
            else:
                unsuitable.append(f"{requirement} is needed, {version} is installed")
        elif not is_importable(MODULE_NAMES.get(name, name.replace("-", "_"))):
            chosen = requirement if has_own_torch and name in TORCH_PAIR else pins[name]
            missing.append(f"{chosen.name}{chosen.specifier}")
    return missing, unsuitable


def freeze() -> list[str]:
    """Return `name==version` of installed packages, without versions that pip cannot parse."""
    pins = []
    names = {dist.metadata["Name"] for dist in importlib.metadata.distributions()}
    for name in names - {None, BUILD_TOOL}:
        try:
            pins.append(str(Requirement(f"{name}=={installed_version(name)}")))
        except InvalidRequirement:  # such as a system package with a nonstandard version
            continue
    return sorted(pins)


def install_missing(group: str, pin_file: Path) -> bool:
    """Install missing packages without changing installed ones.

    Args:
        group: see `declared_ranges`.
        pin_file: requirements file with the versions to install.

    Returns:
        Whether anything was installed.

    Raises:
        SetupError: an installed version is out of range, or pip finds no compatible set.
    """
    pins = applicable(read_requirements(pin_file))
    missing, unsuitable = find_missing(applicable(declared_ranges(group)), pins)
    if unsuitable:
        raise SetupError(
            f"{sys.executable}: {'; '.join(unsuitable)}. The active environment is not changed: "
            "upgrade it yourself, or let make create its own (leave out VENV=)."
        )
    if not missing:
        return False
    say(f"installing missing packages ({', '.join(missing)}); this can take minutes")
    with tempfile.TemporaryDirectory() as tmp:
        frozen = Path(tmp, "installed.txt")
        frozen.write_text("\n".join(freeze()))
        hint = (
            "Packages of the active environment must not change version; if that is the "
            "conflict, let make create its own environment (leave out VENV=)."
        )
        run_pip("install", "--use-pep517", "-c", frozen, *missing, hint=hint)
    return True


def install_unlisted(module: str, site: Path) -> None:
    """Install the wheel that provides `module`, on any Python and without dependencies.

    Args:
        module: a key of UNLISTED.
        site: the site-packages folder to install into.

    Raises:
        SetupError: no wheel with the pinned hash can be downloaded, or `site` is not writable.
    """
    # Unpack beside the destination and move, so that an interruption does no harm.
    name = UNLISTED[module]
    lines = read_requirements(ROOT / "requirements-detectron2.txt")
    line = next(line for line in lines if line.startswith(f"{name}=="))
    say(f"installing {module} ({line.split()[0]})")
    if not os.access(site, os.W_OK):
        raise SetupError(f"{site} is not writable: use a virtual environment, or sudo.")
    with tempfile.TemporaryDirectory(dir=site, prefix=".mask2former-") as tmp:
        pinned, unpacked = Path(tmp, "pinned.txt"), Path(tmp, "site")
        pinned.write_text(f"{line}\n")
        options = ["--require-hashes", "--no-deps", "--no-compile", "--only-binary=:all:"]
        options += ["--python-version", "3.10", "--implementation", "cp"]
        options += ["--abi", "none", "--platform", "any"]
        run_pip("install", *options, "--target", unpacked, "-r", pinned)
        trim(unpacked)
        # Move the module last: if it can be imported, everything else is in place.
        for entry in sorted(unpacked.iterdir(), key=lambda entry: entry.name == module):
            target = site / entry.name
            if target.exists():  # left by an interrupted run
                shutil.rmtree(target)
            entry.rename(target)


def trim(unpacked: Path) -> None:
    """Remove scripts, extensions and the dependency list from an unpacked wheel.

    RECORD must not list the removed files, or uninstalling would delete other files of the same
    names. With the dependency list, pip would complain about NumPy 2 at every later install.
    """
    (record,) = unpacked.glob("*.dist-info/RECORD")
    kept = []
    for line in record.read_text().splitlines():
        path = line.rsplit(",", 2)[0]
        if path.split("/")[0] == UNWANTED_DIR or path.endswith(UNWANTED_SUFFIX):
            (unpacked / path).unlink(missing_ok=True)
        elif path == f"{record.parent.name}/METADATA":
            metadata = (unpacked / path).read_text(encoding="utf-8").splitlines(keepends=True)
            listed = [text for text in metadata if not text.startswith("Requires-Dist:")]
            (unpacked / path).write_text("".join(listed), encoding="utf-8")
            kept.append(f"{path},,")  # hash and size have changed; both are optional
        else:
            kept.append(line)
    record.write_text("\n".join(kept) + "\n")
    shutil.rmtree(unpacked / UNWANTED_DIR, ignore_errors=True)


def check_imports() -> None:
    """Import the large packages once and print their versions.

    Raises:
        SetupError: an import failed and has printed its traceback.
    """
    code = (
        "import sys, torch, torchvision, numpy, cv2, detectron2.modeling, panopticapi.evaluation\n"
        "print(f'[setup] Python {sys.version.split()[0]}, torch {torch.__version__}, '\n"
        "      f'torchvision {torchvision.__version__}, NumPy {numpy.__version__}, '\n"
        "      f'Detectron2 in {detectron2.__path__[0]}')"
    )
    say("checking that the packages load")
    command = [sys.executable, "-W", "ignore::FutureWarning", "-c", code]
    if subprocess.run(command).returncode != 0:
        raise SetupError("an installed package does not load, see the traceback above.")


def set_up_runtime(keep_installed: bool) -> None:
    if keep_installed:
        changed = install_missing("runtime", ROOT / "requirements.txt")
    else:
        say("installing PyTorch and the other pinned packages; the first time takes minutes")
        run_pip("install", "--use-pep517", "-r", "requirements.txt")
        changed = True
    for module in UNLISTED:
        if not is_importable(module):
            install_unlisted(module, Path(sysconfig.get_path("purelib")))
            changed = True
    if changed:
        check_imports()


def set_up_dev(keep_installed: bool) -> None:
    if keep_installed:
        install_missing("dev", ROOT / "requirements-dev.txt")
    else:
        say("installing the packages for tests and lint")
        run_pip("install", "--use-pep517", "-r", "requirements-dev.txt")
        run_pip("install", "--no-deps", "-r", "requirements-evaluation.txt")


def library_is_current() -> bool:
    """Return whether the compiled operators are up to date, or cannot be built."""
    library = ROOT / "mask2former" / "_C.abi3.so"
    if not library.exists():
        # In a separate process, since importing setuptools modifies the importing one.
        code = "import setup, sys; sys.exit(setup.why_no_library() is None)"
        return subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    built = library.stat().st_mtime
    sources = (path for path in (ROOT / "mask2former" / "csrc").rglob("*") if path.is_file())
    return all(path.stat().st_mtime <= built for path in sources)


def describe_library() -> None:
    """Load the compiled operators and print what they were built for, which pip does not show.

    Raises:
        SetupError: they do not load; the traceback has been printed.
    """
    path = ROOT / "mask2former" / "ops" / "_library.py"
    code = "import runpy, sys; print('[setup]', runpy.run_path(sys.argv[1])['describe']())"
    if subprocess.run([sys.executable, "-c", code, str(path)]).returncode != 0:
        raise SetupError("the compiled operators do not load, see the traceback above.")


def set_up_project(keep_installed: bool) -> None:
    if keep_installed:
        spec = importlib.util.find_spec("mask2former")
        if spec is not None:
            location = Path(spec.origin or next(iter(spec.submodule_search_locations))).resolve()
            if ROOT in location.parents:
                if library_is_current():
                    return
            elif installed_summary("mask2former") == declared_summary():
                # As left by `pip install .`: the same project.
                say(f"replacing the copy in {location.parent} by this checkout")
            else:
                raise SetupError(
                    f"another mask2former is installed ({location}): uninstall it first, or let "
                    "make create its own environment (leave out VENV=)."
                )
    say("installing mask2former from this checkout (editable); compiling can take minutes")
    run_pip("install", "--no-build-isolation", "--no-deps", "-e", ".")
    describe_library()


STEPS = {"runtime": set_up_runtime, "dev": set_up_dev, "project": set_up_project}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep-installed", action="store_true")
    parser.add_argument("steps", nargs="+", choices=STEPS)
    args = parser.parse_args()
    try:
        if not args.keep_installed:
            forget(half_installed())  # left by a killed run
        for step in args.steps:
            STEPS[step](args.keep_installed)
    except SetupError as error:
        sys.exit(f"[setup] error: {error}")
    except KeyboardInterrupt:
        sys.exit("[setup] interrupted; repeat the command to continue")


if __name__ == "__main__":
    main()
