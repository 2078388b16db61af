"""Puts what this project needs into the Python environment that runs this script.

    python tools/setup_env.py [--keep-installed] {runtime,dev,project} ...

runtime: the packages of requirements.txt, then Detectron2 and panopticapi where they are missing.
dev:     the packages of requirements-dev.txt (tests and lint), and of requirements-evaluation.txt.
project: this checkout as an editable install, with its compiled operators.

The Makefile calls it. An environment of the project's own gets exactly the pinned versions. With
`--keep-installed` (an environment somebody else manages) only what is missing is installed, and
nothing that is there changes version (but setuptools, where it is too old to build anything): the
ranges of pyproject.toml decide whether it will do.
Repeating a step does no harm, and neither does interrupting one.

Only the standard library and pip are used, since this runs before anything is installed.
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
# Distributions whose import name is not their own with "_" for "-".
MODULE_NAMES = {
    "hydra-core": "hydra",
    "opencv-python-headless": "cv2",
    "pillow": "PIL",
    "pyyaml": "yaml",
}
# One is built for the other: with one of them there, the pin of the other does not apply.
TORCH_PAIR = {"torch", "torchvision"}
# What may be brought up to date even where the rest is kept, since new virtual environments hold
# one that torch itself refuses. Below 82, which dropped a module that other packages still import.
BUILD_TOOL, BUILD_TOOL_LIMIT = "setuptools", "<82"
# Not in the registry under their own names: module -> its line in requirements-detectron2.txt.
UNLISTED = {"detectron2": "sal-detectron2", "panopticapi": "panopticapi-lite"}
# Parts of those wheels that must not be installed: scripts that would land as a top-level package
# `tools`, and extensions built for one Python and one torch.
UNWANTED_DIR, UNWANTED_SUFFIX = "tools", ".so"


class SetupError(Exception):
    """A reason why the environment cannot be set up, told to the user as it is."""


def say(text: str) -> None:
    print(f"[setup] {text}", flush=True)


def half_installed() -> set[Path]:
    """Metadata folders of interrupted installs: pip writes INSTALLER after all other files."""
    sites = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    folders = (folder for site in sites for folder in Path(site).glob("*.dist-info"))
    return {folder for folder in folders if not (folder / "INSTALLER").exists()}


def forget(folders: set[Path]) -> None:
    """Removes metadata folders, so that pip installs those packages again."""
    for folder in folders:
        shutil.rmtree(folder)


def run_pip(*args: str | Path, hint: str = "") -> None:
    """Runs pip, which stays silent unless it fails.

    A package whose metadata was written before it was interrupted would count as installed from
    then on, so that metadata is removed.

    Raises:
        SetupError: pip failed; its own message is already on the terminal, `hint` is added.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, args), "-qq"]
    not_ours = half_installed()
    try:
        status = subprocess.run(command, cwd=ROOT).returncode
    finally:
        forget(half_installed() - not_ours)
    if status != 0:
        raise SetupError(f"pip failed, see its message above.{' ' * bool(hint)}{hint}")


def read_requirements(path: Path) -> list[str]:
    """The requirement lines of a file: no comments, no options such as `-c`."""
    lines = (line.strip() for line in path.read_text().splitlines())
    return [line for line in lines if line and not line.startswith(("#", "-"))]


def applicable(lines: list[str]) -> dict[str, Requirement]:
    """Requirements whose environment marker holds here, by distribution name."""
    requirements = [Requirement(line) for line in lines]
    return {r.name: r for r in requirements if r.marker is None or r.marker.evaluate()}


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_importable(module: str) -> bool:
    importlib.invalidate_caches()
    return importlib.util.find_spec(module) is not None


def declared_ranges(group: str) -> list[str]:
    """What pyproject.toml declares for a group, `runtime` (with the build's own needs) or `dev`."""
    with open(ROOT / "pyproject.toml", "rb") as f:
        pyproject = tomllib.load(f)
    if group == "dev":
        return pyproject["project"]["optional-dependencies"]["dev"]
    return pyproject["project"]["dependencies"] + pyproject["build-system"]["requires"]


def find_missing(
    ranges: dict[str, Requirement], pins: dict[str, Requirement]
) -> tuple[list[str], list[str]]:
    """Compares what is installed with what is needed.

    Args:
        ranges: what the code works with, by distribution name.
        pins: the exact versions to take for what is not there; same names.

    Returns:
        Requirements to install, and sentences on installed versions that are out of range.
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
    """`name==version` of everything that must stay, without versions that pip cannot read."""
    pins = []
    names = {dist.metadata["Name"] for dist in importlib.metadata.distributions()}
    for name in names - {None, BUILD_TOOL}:
        try:
            pins.append(str(Requirement(f"{name}=={installed_version(name)}")))
        except InvalidRequirement:  # such as a system package with a version of its own kind
            continue
    return sorted(pins)


def install_missing(group: str, pin_file: Path) -> bool:
    """Installs what is not there and changes nothing that is.

    Args:
        group: as in `declared_ranges`.
        pin_file: requirements file with the versions to take.

    Returns:
        Whether there was anything to install.

    Raises:
        SetupError: an installed version is out of range, or pip finds no fitting set.
    """
    pins = applicable(read_requirements(pin_file))
    missing, unsuitable = find_missing(applicable(declared_ranges(group)), pins)
    if unsuitable:
        raise SetupError(
            f"{sys.executable}: {'; '.join(unsuitable)}. The active environment is left as it is: "
            "upgrade there yourself, or let make create its own (leave out VENV=)."
        )
    if not missing:
        return False
    say(f"installing what is missing ({', '.join(missing)}); this can take minutes")
    with tempfile.TemporaryDirectory() as tmp:
        frozen = Path(tmp, "installed.txt")
        frozen.write_text("\n".join(freeze()))
        hint = (
            "Nothing that is installed may change version in the active environment; "
            "if that is the conflict, let make create its own (leave out VENV=)."
        )
        run_pip("install", "--use-pep517", "-c", frozen, *missing, hint=hint)
    return True


def install_unlisted(module: str, site: Path) -> None:
    """Installs the wheel that provides `module`, for any Python and without its dependencies.

    Args:
        module: a key of UNLISTED.
        site: the site-packages folder to install into.

    Raises:
        SetupError: the wheel cannot be had with the pinned hash, or `site` cannot be written.
    """
    # Unpacked beside its final place and moved there whole, so that it can be interrupted.
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
        # The module last: where it can be imported, everything else is in place.
        for entry in sorted(unpacked.iterdir(), key=lambda entry: entry.name == module):
            target = site / entry.name
            if target.exists():  # left by an interrupted run; the module itself is not there
                shutil.rmtree(target)
            entry.rename(target)


def trim(unpacked: Path) -> None:
    """Removes scripts, extensions and the dependency list from an unpacked wheel.

    RECORD must forget the removed files, or uninstalling would delete others of the same names;
    the dependency list would have pip complain about NumPy 2 at every later install.
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
            kept.append(f"{path},,")  # its hash and size no longer hold; both may be left out
        else:
            kept.append(line)
    record.write_text("\n".join(kept) + "\n")
    shutil.rmtree(unpacked / UNWANTED_DIR, ignore_errors=True)


def check_imports() -> None:
    """Imports the large packages once and prints their versions.

    Raises:
        SetupError: one of them does not load; its traceback is on the terminal.
    """
    code = (
        "import sys, torch, torchvision, numpy, cv2, detectron2.modeling, panopticapi.evaluation\n"
        "print(f'[setup] Python {sys.version.split()[0]}, torch {torch.__version__}, '\n"
        "      f'torchvision {torchvision.__version__}, NumPy {numpy.__version__}, '\n"
        "      f'Detectron2 in {detectron2.__path__[0]}')"
    )
    say("checking that everything loads")
    command = [sys.executable, "-W", "ignore::FutureWarning", "-c", code]
    if subprocess.run(command).returncode != 0:
        raise SetupError("an installed package does not load, see the traceback above.")


def set_up_runtime(keep_installed: bool) -> None:
    if keep_installed:
        changed = install_missing("runtime", ROOT / "requirements.txt")
    else:
        say("installing PyTorch and the other pinned packages; at first this takes minutes")
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
    """Whether the compiled operators are there, no older than their sources, or cannot be had."""
    library = ROOT / "mask2former" / "_C.abi3.so"
    if not library.exists():
        # On its own, since setuptools changes what this process has imported.
        code = "import setup, sys; sys.exit(setup.why_no_library() is None)"
        return subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    built = library.stat().st_mtime
    sources = (path for path in (ROOT / "mask2former" / "csrc").rglob("*") if path.is_file())
    return all(path.stat().st_mtime <= built for path in sources)


def describe_library() -> None:
    """Loads the compiled operators and prints what they were built for, which pip keeps to itself.

    Raises:
        SetupError: they do not load; the traceback is on the terminal.
    """
    path = ROOT / "mask2former" / "ops" / "_library.py"
    code = "import runpy, sys; print('[setup]', runpy.run_path(sys.argv[1])['describe']())"
    if subprocess.run([sys.executable, "-c", code, str(path)]).returncode != 0:
        raise SetupError("the compiled operators do not load, see the traceback above.")


def set_up_project(keep_installed: bool) -> None:
    if keep_installed:
        spec = importlib.util.find_spec("mask2former")
        if spec is not None:
            found = Path(spec.origin or next(iter(spec.submodule_search_locations))).resolve()
            if ROOT not in found.parents:
                raise SetupError(
                    f"another mask2former is installed ({found}): uninstall it first, or let make "
                    "create its own environment (leave out VENV=)."
                )
            if library_is_current():
                return
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
            forget(half_installed())  # of a run that was killed
        for step in args.steps:
            STEPS[step](args.keep_installed)
    except SetupError as error:
        sys.exit(f"[setup] error: {error}")
    except KeyboardInterrupt:
        sys.exit("[setup] interrupted; repeat the command to go on")


if __name__ == "__main__":
    main()
