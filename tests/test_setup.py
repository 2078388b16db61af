"""Set-up and packaging: pins, the wheel, the Makefile and .ci/run."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import forked
import pytest
import yaml
from load_script import load_script
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]


@pytest.fixture
def setup_env() -> ModuleType:
    """Load tools/setup_env.py as a fresh module."""
    return load_script("tools/setup_env.py")


def package_version() -> str:
    """Read `__version__` without importing the package."""
    tree = ast.parse((ROOT / "mask2former" / "__init__.py").read_text())
    (value,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "__version__"
    )
    return ast.literal_eval(value)


# ---------------------------------------------------------------- pins


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("group", ["runtime", "dev"])
def test_each_declared_package_has_one_pin_in_its_range(
    setup_env: ModuleType, group: str, python: str
) -> None:
    pin_file = {"runtime": "requirements.txt", "dev": "requirements-dev.txt"}[group]
    pins = [Requirement(line) for line in setup_env.read_requirements(ROOT / pin_file)]
    pins = [p for p in pins if p.marker is None or p.marker.evaluate({"python_version": python})]
    ranges = {r.name: r for r in map(Requirement, setup_env.declared_ranges(group))}

    assert sorted(pin.name for pin in pins) == sorted(ranges)
    for pin in pins:
        (specifier,) = pin.specifier
        assert specifier.operator == "==" and "*" not in specifier.version, str(pin)
        assert ranges[pin.name].specifier.contains(specifier.version), str(pin)


def test_torch_is_pinned_in_one_place() -> None:
    files = [*ROOT.glob("requirements*.txt"), ROOT / "pyproject.toml", ROOT / "Makefile"]
    pinning = [p.name for p in files if re.search(r"torch(vision)?==", p.read_text())]
    assert pinning == ["requirements.txt"]


def test_unlisted_packages_are_pinned_by_hash(setup_env: ModuleType) -> None:
    lines = setup_env.read_requirements(ROOT / "requirements-detectron2.txt")
    names = [re.fullmatch(r"([\w-]+)==\S+ --hash=sha256:[0-9a-f]{64}", line)[1] for line in lines]
    assert sorted(names) == sorted(setup_env.UNLISTED.values())


# ---------------------------------------------------------------- tools/setup_env.py


def test_nothing_is_installed_if_nothing_is_missing(
    setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"pip was called: {args}")

    monkeypatch.setattr(setup_env, "run_pip", fail)
    setup_env.set_up_runtime(keep_installed=True)
    setup_env.set_up_dev(keep_installed=True)


def test_find_missing_keeps_what_is_installed(
    setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranges = ["torch>=2.11", "torchvision", "numpy>=1.26,<3", "pillow>=9.1", "scipy>=1.10"]
    ranges += ["opencv-python-headless>=4.8", "setuptools>=77"]
    pins = ["torch==2.14.1", "torchvision==0.29.2", "numpy==2.4.6", "pillow==13.0.0"]
    pins += ["scipy==1.17.1", "opencv-python-headless==5.0.0.93", "setuptools==84.2.1"]
    installed = {"torch": "2.12.0a0+vendor", "numpy": "1.24.4", "setuptools": "65.5.0"}
    monkeypatch.setattr(setup_env, "installed_version", installed.get)
    # cv2 is installed under another distribution name.
    monkeypatch.setattr(setup_env, "is_importable", lambda module: module == "cv2")

    missing, unsuitable = setup_env.find_missing(
        setup_env.applicable(ranges), setup_env.applicable(pins)
    )

    # torchvision must match the installed torch, so its pin is not used.
    assert [Requirement(text) for text in missing] == [
        Requirement("torchvision"),
        Requirement("pillow==13.0.0"),
        Requirement("scipy==1.17.1"),
        Requirement("setuptools>=77,<82"),
    ]
    assert len(unsuitable) == 1
    assert "1.24.4 is installed" in unsuitable[0]


def test_version_out_of_range_is_an_error_not_an_upgrade(
    setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = setup_env.installed_version
    monkeypatch.setattr(
        setup_env, "installed_version", lambda name: "2.4.0" if name == "torch" else real(name)
    )
    monkeypatch.setattr(setup_env, "run_pip", lambda *a, **k: pytest.fail("pip was called"))
    with pytest.raises(setup_env.SetupError, match=r"torch>=2\.11 is needed, 2\.4\.0 is installed"):
        setup_env.set_up_runtime(keep_installed=True)


@pytest.mark.parametrize("summary", ["Another project", None])
def test_another_mask2former_is_an_error(
    setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, summary: str | None
) -> None:
    monkeypatch.setattr(setup_env, "ROOT", tmp_path)
    monkeypatch.setattr(setup_env, "installed_summary", lambda name: summary)
    (tmp_path / "pyproject.toml").write_text('[project]\ndescription = "This project"\n')
    monkeypatch.setattr(setup_env, "run_pip", lambda *a, **k: pytest.fail("pip was called"))
    with pytest.raises(setup_env.SetupError, match="another mask2former is installed"):
        setup_env.set_up_project(keep_installed=True)


def test_plain_install_of_this_project_is_completed(
    setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
) -> None:
    """`pip install .` and then `make env VENV=`."""
    calls = []
    monkeypatch.setattr(setup_env, "ROOT", tmp_path)
    (tmp_path / "pyproject.toml").write_text('[project]\ndescription = "This project"\n')
    monkeypatch.setattr(setup_env, "installed_summary", lambda name: "This project")
    monkeypatch.setattr(setup_env, "run_pip", lambda *args, **kwargs: calls.append(args))
    monkeypatch.setattr(setup_env, "describe_library", lambda: None)
    setup_env.set_up_project(keep_installed=True)
    assert calls == [("install", "--no-build-isolation", "--no-deps", "-e", ".")]
    assert "replacing the copy in" in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["failure", "interruption"])
def test_interrupted_package_does_not_count_as_installed(
    setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ending: str
) -> None:
    """pip may have written the metadata of a package, but not all of its files."""
    for name in ["complete", "older"]:
        (tmp_path / f"{name}-1.dist-info").mkdir()
    (tmp_path / "complete-1.dist-info" / "INSTALLER").write_text("pip\n")

    def fake_run(command: list[str], **kwargs: object) -> subprocess.CompletedProcess:
        (tmp_path / "new-1.dist-info").mkdir()
        if ending == "interruption":
            raise KeyboardInterrupt
        return subprocess.CompletedProcess(command, returncode=1)

    monkeypatch.setattr(setup_env.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(setup_env.subprocess, "run", fake_run)

    expected = setup_env.SetupError if ending == "failure" else KeyboardInterrupt
    with pytest.raises(expected):
        setup_env.run_pip("install", "new")
    assert sorted(p.name for p in tmp_path.glob("*.dist-info")) == [
        "complete-1.dist-info",
        "older-1.dist-info",
    ]

    # The project's own environment is repaired after a run that could not clean up.
    monkeypatch.setitem(setup_env.STEPS, "dev", lambda keep_installed: None)
    monkeypatch.setattr(sys, "argv", ["setup_env.py", "--keep-installed", "dev"])
    setup_env.main()
    assert (tmp_path / "older-1.dist-info").exists()
    monkeypatch.setattr(sys, "argv", ["setup_env.py", "dev"])
    setup_env.main()
    assert [p.name for p in tmp_path.glob("*.dist-info")] == ["complete-1.dist-info"]


def write_fake_wheel(unpacked: Path) -> None:
    """Write a small version of what pip unpacks from sal-detectron2."""
    info = "sal_detectron2-0.7.2.dist-info"
    metadata = "Name: sal-detectron2\nRequires-Dist: numpy<2\nVersion: 0.7.2\n\nText\n"
    texts = {
        "detectron2/__init__.py": "",
        "detectron2/_C.cpython-310-x86_64-linux-gnu.so": "",
        "detectron2/tools/kept.py": "",
        "tools/__init__.py": "",
        "tools/train_net.py": "",
        f"{info}/METADATA": metadata,
    }
    for name, text in texts.items():
        (unpacked / name).parent.mkdir(parents=True, exist_ok=True)
        (unpacked / name).write_text(text)
    record = "".join(f"{name},sha256=x,1\n" for name in texts) + f"{info}/RECORD,,\n"
    (unpacked / info / "RECORD").write_text(record)


@pytest.mark.parametrize("interrupted", [False, True])
def test_detectron2_is_installed_without_scripts_and_extension(
    setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, interrupted: bool
) -> None:
    calls = []

    def fake_pip(*args: str | Path, hint: str = "") -> None:
        calls.append([str(arg) for arg in args])
        write_fake_wheel(Path(args[args.index("--target") + 1]))

    monkeypatch.setattr(setup_env, "run_pip", fake_pip)
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "mine.py").write_text("")  # a package of the user
    info = tmp_path / "sal_detectron2-0.7.2.dist-info"
    if interrupted:
        info.mkdir()

    setup_env.install_unlisted("detectron2", tmp_path)

    assert sorted(p.name for p in tmp_path.iterdir()) == ["detectron2", info.name, "tools"]
    assert [p.name for p in (tmp_path / "tools").iterdir()] == ["mine.py"]
    assert not list(tmp_path.rglob("*.so"))
    assert (info / "METADATA").read_text() == "Name: sal-detectron2\nVersion: 0.7.2\n\nText\n"
    assert (info / "RECORD").read_text().splitlines() == [
        "detectron2/__init__.py,sha256=x,1",
        "detectron2/tools/kept.py,sha256=x,1",
        f"{info.name}/METADATA,,",
        f"{info.name}/RECORD,,",
    ]
    (call,) = calls
    assert {"--require-hashes", "--no-deps", "--only-binary=:all:"} <= set(call)


# ---------------------------------------------------------------- wheel and source archive


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project files, so that builds write nothing to the checkout."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ["setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"]:
        shutil.copy(ROOT / name, copy)
    for path in [ROOT / "mask2former_command.py", *ROOT.glob("requirements*.txt")]:
        shutil.copy(path, copy)
    no_leftovers = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in ["mask2former", "tools", "configs", "tests"]:
        shutil.copytree(ROOT / name, copy / name, ignore=no_leftovers)
    (copy / "datasets").mkdir()
    for script in (ROOT / "datasets").glob("*.py"):
        shutil.copy(script, copy / "datasets")
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation"]
    environ = os.environ | {"MASK2FORMER_NO_OP": "1"}  # test_build.py tests the compiled one
    result = subprocess.run(
        [*command, "-w", folder], cwd=checkout, env=environ, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_wheel_holds_the_package_and_its_files(checkout: Path, wheel: Path) -> None:
    version = package_version()
    info = f"mask2former-{version}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"{info}/METADATA").decode()

    tops = {name.split("/")[0] for name in names}
    assert tops == {"mask2former", "mask2former_command.py", info}
    expected = {str(p.relative_to(checkout)) for p in (checkout / "mask2former").rglob("*.py")}
    expected |= {
        str(p.relative_to(checkout))
        for p in (checkout / "mask2former/data/datasets/categories").glob("*.json")
    }
    assert any(name.endswith(".json") for name in expected)
    expected.add("mask2former/py.typed")
    page = {"page.html", "page.css", "page.js"}
    expected |= {f"mask2former/inference/html/{name}" for name in page}
    for pattern in ("configs/**/*.yaml", "tools/**/*.py", "datasets/*.py", "requirements*.txt"):
        files = {f"mask2former/_project/{p.relative_to(checkout)}" for p in checkout.glob(pattern)}
        assert files
        expected |= files
    assert expected <= names
    assert not [name for name in names if "__pycache__" in name or "/tests/" in name]
    assert not [name for name in names if "csrc" in name or name.endswith(".so")]
    assert f"{info}/licenses/LICENSE" in names
    assert f"\nVersion: {version}\n" in metadata
    assert "\nRequires-Dist: torch>=2.11\n" in metadata
    assert not re.search(r"Requires-Dist:.*(detectron2|panopticapi)", metadata)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the wheel unpacked."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run_installed(folder: Path, *arguments: str, **changes: str) -> subprocess.CompletedProcess:
    """Run the console command of an unpacked wheel, in a folder without the project's files."""
    code = "import sys; sys.argv[0] = 'mask2former'; import mask2former_command as c; c.main()"
    empty = folder / "empty"
    empty.mkdir(exist_ok=True)
    environ = os.environ | {"PYTHONPATH": str(folder)} | changes
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=empty, env=environ, capture_output=True, text=True)


def test_installed_command_needs_no_checkout(installed: Path, monkeypatch) -> None:
    listed = run_installed(installed, "configs").stdout.split()
    assert sorted(listed) == sorted(
        path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml")
    )
    recipe = "configs/shapes/panoptic-segmentation/maskformer2_R18_quickstart.yaml"
    assert run_installed(installed, "configs", recipe).stdout == (ROOT / recipe).read_text()
    monkeypatch.chdir(installed)
    project = installed / "mask2former/_project"
    command = load_script(installed / "mask2former_command.py")
    arguments = command.with_own_configs(["--config-file", recipe], project)
    assert arguments == ["--config-file", str(project / recipe)] and Path(arguments[1]).is_file()
    # A config of the user's own that builds on one of the project's.
    own = installed / "own.yaml"
    own.write_text(f"_BASE_: mask2former://{recipe}\nMODEL: {{DEVICE: cpu}}\n")
    result = run_installed(
        installed, "analyze", "--config-file", str(own), "--tasks", "parameter",
        PYTHONWARNINGS="ignore",
    )  # fmt: skip
    assert result.returncode == 0 and "Parameters: " in result.stdout, result.stderr


def test_command_names_what_it_does_not_know(installed: Path) -> None:
    result = run_installed(installed, "trian")
    assert result.returncode == 1 and "'trian' is not a program" in result.stderr
    assert "train " in result.stderr
    result = run_installed(installed, "configs", "configs/nothing.yaml")
    assert result.returncode == 1 and "no config 'configs/nothing.yaml'" in result.stderr
    assert "usage: mask2former PROGRAM" in run_installed(installed).stdout


def test_programs_of_the_command_exist() -> None:
    command = load_script("mask2former_command.py")
    for name, (arguments, _) in command.PROGRAMS.items():
        if arguments[0] == "-m":
            assert (ROOT / f"{arguments[1].replace('.', '/')}.py").exists() or (
                ROOT / arguments[1].replace(".", "/") / "__main__.py"
            ).exists(), name
        else:
            assert Path(arguments[0].format(tools=ROOT / "tools")).is_file(), name


def test_other_name_of_a_program(monkeypatch) -> None:
    command = load_script("mask2former_command.py")
    calls = []
    monkeypatch.setattr(command.os, "execv", lambda program, arguments: calls.append(arguments))
    for name in ("evaluate", "eval"):
        monkeypatch.setattr(sys, "argv", ["mask2former", name, "--model", "model.onnx"])
        command.main()
    assert calls[0] == calls[1]
    assert calls[0][2:] == ["--eval-only", "--model", "model.onnx"]


def test_every_program_has_a_command() -> None:
    programs = load_script("mask2former_command.py").PROGRAMS.values()
    named = {Path(arguments[0]).name for arguments, _ in programs}
    # Of the development of this project, what `env` runs, parts of programs, and what the original
    # release has.
    others = {"ablation_page.py", "ablation_speed.py", "gpu_check.py", "setup_env.py"}
    others |= {"demo_options.py", "evaluate_pq_for_semantic_segmentation.py"}
    assert {path.name for path in (ROOT / "tools").glob("*.py")} - named == others


def test_configs_are_found_wherever_the_command_runs(tmp_path: Path, monkeypatch) -> None:
    command = load_script("mask2former_command.py")
    monkeypatch.chdir(tmp_path)
    name = "configs/shapes/Base-Shapes.yaml"
    found = str(ROOT / name)
    assert command.with_own_configs(["--config-file", name, "A", name], ROOT) == [
        "--config-file", found, "A", name,
    ]  # fmt: skip
    assert command.with_own_configs([f"--base={name}"], ROOT) == [f"--base={found}"]
    # A file here comes first, and other names are left to the program.
    unchanged = ["--config-file", "configs/none.yaml", "--config-file"]
    assert command.with_own_configs(unchanged, ROOT) == unchanged
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).touch()
    assert command.with_own_configs(["--config-file", name], ROOT) == ["--config-file", name]


@pytest.mark.parametrize("missing", ["detectron2", "msgspec"])
def test_missing_package_is_named_with_the_remedy(
    installed: Path, tmp_path: Path, missing: str
) -> None:
    """As after `pip install .` without Detectron2: any command says what is missing."""
    hook = tmp_path / "sitecustomize.py"
    hook.write_text(f"import sys\nsys.modules[{missing!r}] = None\n")
    path = f"{tmp_path}{os.pathsep}{installed}"
    # Quick without Detectron2 only: the others are imported after PyTorch.
    if missing == "detectron2":
        report = run_installed(installed, "env", PYTHONPATH=path)
        assert report.returncode == 1, report.stderr
        assert f"problem: missing: {missing}. Install: python -m mask2former.env" in report.stdout
    result = run_installed(installed, "train", PYTHONPATH=path)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert f"Mask2Former needs {missing}, not installed in" in last
    assert "python -m mask2former.env --install" in last


def test_required_modules_are_those_declared(setup_env: ModuleType) -> None:
    required = load_script("mask2former/utils/required_modules.py").REQUIRED
    declared = {Requirement(line).name for line in setup_env.declared_ranges("runtime")}
    declared |= set(setup_env.UNLISTED.values())
    assert set(required.values()) == declared - {"setuptools"}
    for module, name in required.items():
        usual = setup_env.MODULE_NAMES.get(name, name.replace("-", "_"))
        assert module == {v: k for k, v in setup_env.UNLISTED.items()}.get(name, usual)


def test_environment_report() -> None:
    result = forked.run([sys.executable, "-m", "mask2former.env"], cwd=ROOT)
    for text in ("Python 3.", "torch 2.", "detectron2 ", "CPU: ", "compiled operators: "):
        assert text in result.stdout
    problems = [line for line in result.stdout.splitlines() if line.startswith("problem: ")]
    assert result.returncode == bool(problems)
    assert bool(problems) != ("nothing is missing" in result.stdout)


def test_source_archive_is_complete(checkout: Path, tmp_path: Path) -> None:
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    command = [sys.executable, "-c", code, str(tmp_path)]
    result = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    top = f"mask2former-{package_version()}"
    with tarfile.open(tmp_path / f"{top}.tar.gz") as archive:
        names = set(archive.getnames())
    parts = ["setup.py", "pyproject.toml", "README.md", "LICENSE", "mask2former/config.py"]
    csrc = checkout / "mask2former" / "csrc"
    parts += [str(p.relative_to(checkout)) for p in csrc.rglob("*.*")]
    parts += ["mask2former_command.py", "tools/train_net.py", "requirements-detectron2.txt"]
    parts += [str(p.relative_to(checkout)) for p in (checkout / "configs").rglob("*.yaml")]
    assert {f"{top}/{part}" for part in parts} <= names


def test_citation_names_the_paper_and_its_authors() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["license"] == "MIT"
    paper = citation["preferred-citation"]
    assert paper["title"] == "Masked-attention Mask Transformer for Universal Image Segmentation"
    assert paper["year"] == 2022
    names = [author["family-names"] for author in paper["authors"]]
    assert names == ["Cheng", "Misra", "Schwing", "Kirillov", "Girdhar"]


# ---------------------------------------------------------------- Makefile and .ci/run


def run_make(*args: object, **env: str) -> subprocess.CompletedProcess:
    """Run make in the checkout as from a fresh shell, even if make runs the tests."""
    inherited = {"MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "VENV", "PYTHON"}
    environ = {key: value for key, value in os.environ.items() if key not in inherited}
    return subprocess.run(
        ["make", *map(str, args)], cwd=ROOT, env=environ | env, capture_output=True, text=True
    )


def write_interpreter(path: Path, body: str) -> Path:
    """Write a shell script that acts as a Python interpreter."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_make_alone_lists_the_commands() -> None:
    result = run_make()
    assert result.returncode == 0
    for target in ["quickstart", "test", "lint", "env"]:
        assert f"make {target} " in result.stdout


@pytest.mark.parametrize(
    "target, steps, last",
    [
        ("env", ["runtime", "dev", "project"], None),
        ("test", ["runtime", "dev", "project"], "-m pytest -n 2 --dist loadfile"),
        ("lint", ["runtime", "dev"], "-m mypy"),
        ("quickstart", ["runtime", "project"], "tools/quickstart.py"),
    ],
)
def test_targets_set_up_what_they_need(
    tmp_path: Path, target: str, steps: list[str], last: str | None
) -> None:
    venv = tmp_path / "env"
    own = run_make("-n", target, f"VENV={venv}")
    assert own.returncode == 0, own.stderr
    assert re.findall(rf"^{venv}/bin/python tools/setup_env\.py (.*)$", own.stdout, re.M) == steps
    assert f"python3 -m venv {venv}" in own.stdout

    active = run_make("-n", target, "VENV=")
    assert active.returncode == 0, active.stderr
    keep = r"^python3 tools/setup_env\.py --keep-installed (.*)$"
    assert re.findall(keep, active.stdout, re.M) == steps
    assert "-m venv" not in active.stdout
    assert ".stamp" not in active.stdout

    if last is not None:
        assert own.stdout.splitlines()[-1].endswith(f"{venv}/bin/python {last}")
        assert active.stdout.splitlines()[-1].endswith(f"python3 {last}")


def test_failed_steps_are_repeated_and_finished_ones_are_not(tmp_path: Path) -> None:
    log, venv = tmp_path / "log", tmp_path / "env"
    body = f'echo "$*" >> {log}; case "$*" in *setup_env.py*) exit ${{FAKE_STATUS:-0}};; esac'
    write_interpreter(venv / "bin" / "python", body)

    def setups(**env: str) -> tuple[int, list[str]]:
        log.write_text("")
        status = run_make("lint", f"VENV={venv}", **env).returncode
        return status, [line for line in log.read_text().splitlines() if "setup_env" in line]

    steps = ["tools/setup_env.py runtime", "tools/setup_env.py dev"]
    status, calls = setups(FAKE_STATUS="1")
    assert status != 0 and calls == steps[:1]
    assert setups() == (0, steps)
    assert setups() == (0, [])


def test_too_old_python_is_one_clear_error(tmp_path: Path) -> None:
    body = 'case "$*" in *version_info*) exit 1;; *python_version*) echo 3.8.18;; esac'
    old = write_interpreter(tmp_path / "python3.8", body)
    for venv in [tmp_path / "env", ""]:
        result = run_make("lint", f"VENV={venv}", f"PYTHON={old}")
        assert result.returncode != 0
        first, *rest = result.stderr.splitlines()
        assert f"Python 3.10 or newer is needed, but '{old}' is 3.8.18" in first
        assert all(line.startswith("make") for line in rest)
        assert result.stdout == ""


def test_missing_python_is_one_clear_error(tmp_path: Path) -> None:
    result = run_make("lint", f"VENV={tmp_path / 'env'}", "PYTHON=no-such-python")
    assert result.returncode != 0
    assert "'no-such-python' is missing or broken" in result.stderr.splitlines()[0]


def test_python_without_ensurepip_is_one_clear_error(tmp_path: Path) -> None:
    python = write_interpreter(tmp_path / "python3", 'case "$*" in *ensurepip*) exit 1;; esac')
    result = run_make("lint", f"VENV={tmp_path / 'env'}", f"PYTHON={python}")
    assert result.returncode != 0
    assert "lacks ensurepip" in result.stderr.splitlines()[0]
    assert "python3-venv" in result.stderr.splitlines()[0]


@pytest.mark.parametrize(
    "closing, status",
    [
        ("======= 3 passed, 1 skipped in 75.21s (0:01:15) =======", 0),
        ("======= 1 failed, 2 passed in 0.10s =======", 2),
        ("======= 2 errors in 0.10s =======", 2),
    ],
)
def test_ci_ends_with_the_closing_line_of_pytest(tmp_path: Path, closing: str, status: int) -> None:
    # A fake make, which reports a failure after the output of its command.
    write_interpreter(
        tmp_path / "make",
        f'[ "$1" = test ] || exit 0\necho "{closing}"\n'
        f'[ {status} = 0 ] || echo "make: *** [test] Error 1" >&2\nexit {status}',
    )
    environ = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    result = subprocess.run([ROOT / ".ci" / "run"], env=environ, capture_output=True, text=True)
    assert result.returncode == status
    assert result.stdout.splitlines()[-1] == closing
