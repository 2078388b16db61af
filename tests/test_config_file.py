"""Config files are data: accepted ones read as by Detectron2, others give a named error."""

import codecs
import os
import resource
import sys
from pathlib import Path

import forked
import pytest
import yaml
from detectron2.config import CfgNode

from mask2former.config import load_config
from mask2former.config_file import evaluate_arithmetic, read_config_file

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
BASE = CONFIGS / "shapes/semantic-segmentation/maskformer2_R18_quickstart.yaml"
TAG = "!!python/object/apply:eval"


@pytest.mark.parametrize(
    "path", sorted(str(p.relative_to(CONFIGS)) for p in CONFIGS.rglob("*.yaml"))
)
def test_files_of_the_repository_read_as_by_detectron2(path):
    expected = CfgNode.load_yaml_with_base(str(CONFIGS / path), allow_unsafe=True)
    values, own_keys, places = read_config_file(str(CONFIGS / path))
    assert repr(values) == repr(expected)
    assert own_keys <= places.keys()


@pytest.mark.parametrize(
    "text",
    [
        "A: 1e-4\nB: 1.0e-4\nC: 0x1F\nD: 1_000\nE: .inf\nF: ~\nG: yes\nH: 'yes'\nI: 010\nJ: 1:30",
        "A: &a {X: 1, Y: [1, {Z: 2}]}\nB: *a\nC:\n  <<: *a\n  X: 3\nD:\n  <<: [{X: 5}, *a]",
        "<<: {A: 1}\nB: !!str 1\nC: !!int '3'\nD: |\n  two\n  lines\nE: [1, (2, 3)]\n? F\n: 1",
        "A: {}\nB: []\nC: ''\nD: [{1: a, null: b}]\nE: (1, 2)",
        f'A: {TAG} ["[int(x * 0.1 * 512) for x in range(5, 21)]"]\nB: {TAG}\n- "-7 // 2 + 1.5"',
    ],
)
def test_yaml_reads_as_by_detectron2(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    expected = CfgNode.load_yaml_with_base(str(path), allow_unsafe=True)
    assert repr(read_config_file(str(path)).values) == repr(expected)


def test_files_that_build_on_others(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "sub").mkdir()
    files = {
        "home.yaml": "A: 1\nS: {X: 1, Y: 1}\nT: {X: 1}",
        "sub/middle.yaml": "_BASE_: ~/home.yaml\nB: 2\nS: {X: 2}\nT: 3",
        "other.yaml": "A: 5\nS: {Z: 5}",
        "top.yaml": "_BASE_: [sub/middle.yaml, other.yaml]\nS: {X: 6}",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    path = str(tmp_path / "top.yaml")
    values, own_keys, places = read_config_file(path)
    expected = {"A": 5, "S": {"X": 6, "Y": 1, "Z": 5}, "T": 3, "B": 2}
    assert values == expected == CfgNode.load_yaml_with_base(path)
    assert own_keys == {"S", "S.X"}
    assert places["S.Z"] == f"Config file {str(tmp_path / 'other.yaml')!r}, line 2"


def test_a_section_used_twice_is_overridden_once(tmp_path):
    (tmp_path / "base.yaml").write_text("A: &a {X: 1}\nB: *a")
    (tmp_path / "top.yaml").write_text("_BASE_: base.yaml\nA: {X: 2}")
    assert read_config_file(str(tmp_path / "top.yaml")).values == {"A": {"X": 2}, "B": {"X": 1}}


@pytest.mark.parametrize("mark", ["utf-8-sig", "utf-16"])
def test_files_with_a_byte_order_mark(tmp_path, mark):
    text = "A: größe\r\nB: 2\r\n"
    (tmp_path / "config.yaml").write_bytes(text.encode(mark))
    assert read_config_file(str(tmp_path / "config.yaml")).values == {"A": "größe", "B": 2}


def test_other_versions_of_the_format(tmp_path):
    (tmp_path / "old.yaml").write_text("VERSION: 1\nMODEL: {WEIGHT: w.pkl}")
    with pytest.raises(ValueError, match=r"old\.yaml', line 2 sets 'MODEL.WEIGHT', which is not a"):
        load_config(str(tmp_path / "old.yaml"))
    for version in ("3", "'2'"):
        (tmp_path / "old.yaml").write_text(f"_BASE_: {BASE}\nVERSION: {version}")
        with pytest.raises(ValueError, match=rf"old\.yaml.*VERSION is {version}; allowed: 1 to 2"):
            load_config(str(tmp_path / "old.yaml"))
    (tmp_path / "old.yaml").write_text("VERSION: 1\nSOLVER: {MAX_ITER: 7}")
    assert load_config(str(tmp_path / "old.yaml")).SOLVER.MAX_ITER == 7
    with pytest.raises(ValueError, match="The command line sets VERSION to 1; allowed: 2"):
        load_config(str(BASE), ["VERSION", "1"])


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        ("SOLVER", "5", "SOLVER.AMP"),
        ("SOLVER", "{'MAX_ITER': 5}", "SOLVER.AMP"),
        ("MODEL.SWIN", "None", "MODEL.SWIN.APE"),
    ],
)
def test_section_on_the_command_line(key, value, name):
    with pytest.raises(ValueError) as error:
        load_config(str(BASE), [key, value])
    assert str(error.value) == (
        f"The command line sets {key} to {value!r}, but that is a section with keys of its own. "
        f"Set them one by one, such as {name}."
    )


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("[int(x * 0.1 * 640) for x in range(5, 8)]", [320, 384, 448]),
        ("[x for x in range(3)]", [0, 1, 2]),
        ("[-x // 2 for x in range(8, 1, -3)]", [-4, -3, -1]),
        ("2 * (3 + 4) - 1", 13),
        ("int(7 / 2)", 3),
    ],
)
def test_arithmetic(expression, value):
    assert evaluate_arithmetic(expression) == value == eval(expression)


@pytest.mark.parametrize(
    "expression",
    [
        *("9**9**9", "2 << 9", "1 if 1 else 2", "x", "int", "'a' * 9", "True", "1j", "1 < 2", "~1"),
        *("[x for x in range(9) if x]", "[x for x in range(3) for y in range(3)]", "{1}", "[1, 2]"),
        *("[x for x in [1]]", "[x for x in range(10**9)]", "[x for x in range(2000)]", "abs(-1)"),
        *("[x async for x in range(3)]", "[x for x.y in range(3)]", "[x for x in range(0.5)]"),
        *("__import__('os').getpid()", "().__class__", "open('x')", "print(1)", "lambda: 1"),
        *("int('3')", "int(1, 2)", "int(x=1)", "range(3)", "[[x] for x in range(3)]", "1 / 0"),
        *("[range(3) for x in range(3)]", "1e999", "9" * 150, "1e308 * 10", "(" * 199, "-" * 199),
        *("", "1;2", "a = 1", "1" + "+1" * 99 + "+", "[x for x in range(1, 2, 0)]", "(x := 3)"),
        *("int(1e999)", "[x for x in range(9999999999999999)]", "f'{1}'", "1\0", "await x"),
    ],
)
def test_everything_else_is_not_computed(expression):
    with pytest.raises(ValueError, match="expression|cannot compute"):
        evaluate_arithmetic(expression)


LAUGHS = "a0: &a0 [1]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 20)
)
MERGES = "a0: &a0 {k: 1}\n" + "".join(
    f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 20)
)
# Content → what the error says, after the file's name.
BAD = {
    "tag: !!python/object/apply:os.mkdir [TRACE]": "line 1, tag.*apply:os.mkdir is not accepted",
    'A: 1\ntag: !!python/object/apply:eval [\'__import__("os").mkdir("TRACE")\']': "line 2, tag",
    "tag: !!python/object/apply:eval ['1', '2']": "line 1, tag",
    "tag: !!python/object/apply:eval {args: ['1']}": "line 1, tag",
    "tag: !!python/object/apply:eval '1'": "line 1, tag",
    "tag: !!python/object/new:os.mkdir [TRACE]": "line 1, tag",
    "tag: !!python/object:os.mkdir {}": "line 1, tag",
    "tag: !!python/name:os.mkdir": "line 1, tag",
    "tag: !!python/module:os": "line 1, tag",
    "tag: !!python/tuple [1, 2]": "line 1, tag.*write the value itself",
    "A:\n  - {tag: !own 1}": "line 2, A.tag.*!own",
    "!!python/object/apply:os.mkdir [TRACE]": "has no KEY: VALUE",
    "? !!python/object/apply:os.mkdir [TRACE]\n: 1": "line 1, .*a key must be text",
    "A: {!!python/name:os.mkdir '': 1}": "line 1, A",
    "S: !!python/object/apply:os.mkdir {X: 1}": "line 1, S",
    "A: 2020-01-01": "line 1, A: the tag !!timestamp",
    "A: !!binary aGFsbG8=": "line 1, A",
    "A: !!set {a, b}": "line 1, A",
    "A: !!int text": "line 1, A: 'text' is not of type !!int",
    "A: !!float text": "line 1, A",
    "A: !!bool text": "line 1, A",
    "A: !!str [1]": "line 1, A",
    "A: !!map 1": "line 1, A",
    f"A: {'9' * 5000}": "line 1, A: a number has more than 100 digits",
    "_BASE_:": "line 1: _BASE_ is None; allowed: the path",
    "_BASE_: ''": "line 1: _BASE_ is ''",
    "_BASE_: []": r"line 1: _BASE_ is \[\]",
    "_BASE_: [a, 3]": "line 1: _BASE_ is",
    "_BASE_: {a: 1}": "line 1: _BASE_ is",
    "_BASE_: 3": "line 1: _BASE_ is 3",
    '_BASE_: "a\\0b"': "line 1: _BASE_ is",
    "_BASE_: .": "line 1: _BASE_ '.'.* is a folder",
    "_BASE_: /dev/zero": "line 1: _BASE_ '/dev/zero'.* is a pipe or a device",
    "_BASE_: pipe": "is a pipe",
    "_BASE_: bad.yaml": "builds on itself",
    "_BASE_: cycle.yaml": "builds on itself",
    "_BASE_: nowhere.yaml": "nowhere.yaml.*line 1: _BASE_ 'nowhere.yaml'.*does not exist",
    "_BASE_: bad.yaml/x.yaml": "does not exist",
    "_BASE_: empty.yaml": "empty.yaml' has no KEY: VALUE",
    f"_BASE_: {'x' * 5000}": "cannot be read: File name too long",
    "_BASE_: plain.yaml\nA: {X: 1}": "line 2: A has keys of its own",
    "_BASE_: chain0.yaml": "is one of over 50",
    "A: 1\nB: 2\nA: 3": "line 3, A: the key is already set in line 1",
    "A:\n  X: 1\n  X: 1": "line 3, A.X",
    "A: [{X: 1, X: 2}]": "line 1, A.X",
    "A: {<<: {X: 1, X: 2}}": "line 1, A.X",
    "1: a": "line 1, 1: the key is read as 1, but must be text",
    "A: {on: a}": "line 1, A.on: the key is read as True",
    "null: a": "line 1",
    "[a, b]: 1": "line 1",
    "A: {<<: 3}": "line 1, A.<<: only a section can be merged",
    "A: {<<: [3]}": "line 1, A.<<",
    "<<: null": "line 1, <<",
    "A: *unknown": "line 1 cannot be read as YAML",
    "A: [1": "cannot be read as YAML",
    "A: 1\n B: 2": "line 2 cannot be read as YAML",
    "A: '": "cannot be read as YAML",
    "A: 1\n---\nB: 2": "line 2 cannot be read as YAML",
    "A: 1\n\tB: 2": "line 2 cannot be read as YAML",
    "%YAML 9.0\n---\nA: 1": "cannot be read as YAML",
    "A: \0": "cannot be read as YAML",
    "": "has no KEY: VALUE",
    "{}": "has no KEY: VALUE",
    "text": "has no KEY: VALUE",
    "&a {A: *a}": "nested more than 50 deep",
    "A: &a [*a]": "nested more than 50 deep",
    "A: &a {<<: *a}": "nested more than 50 deep",
    "A: " + "[" * 100_000: "nested more than 50 deep",
    "A:\n " + "- " * 100_000: "nested more than 50 deep",
    "A: " + "{a: " * 1000: "nested more than 50 deep",
    "A: [" + "1," * 60_000 + "]": "more than 50000 values",
    LAUGHS: "more than 50000 values",
    MERGES: "more than 50000 values",
    "A: " + "x" * 2**20: "larger than",
}
BYTES = {
    b"\x00\x01\x02\xff\xfe": "not a text file in UTF-8",
    b"A: gr\xf6\xdfe": "not a text file in UTF-8",
    codecs.BOM_UTF16_LE + b"A": "not a text file in UTF-8",
    "A: 1".encode("utf-32"): "cannot be read as YAML",
    b"\x89PNG\r\n\x1a\n\x00": "not a text file in UTF-8",
}


def run_bad_files(folder):
    """Read every bad file and print what does not end in the expected error."""
    resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
    folder = Path(folder)
    os.mkfifo(folder / "pipe")
    path, trace = folder / "bad.yaml", folder / "trace"
    (folder / "cycle.yaml").write_text("_BASE_: [plain.yaml, bad.yaml]")
    (folder / "plain.yaml").write_text("A: 1")
    (folder / "empty.yaml").write_text("# nothing")
    for i in range(60):
        (folder / f"chain{i}.yaml").write_text(f"_BASE_: chain{i + 1}.yaml")
    contents = [(text.replace("TRACE", str(trace)).encode(), m) for text, m in BAD.items()]
    for content, message in [*contents, *BYTES.items()]:
        path.write_bytes(content)
        try:
            with pytest.raises(
                (ValueError, FileNotFoundError), match=rf"(?s)Config file.*{message}"
            ):
                read_config_file(str(path))
        except BaseException as error:
            print(content[:80], type(error).__name__, str(error)[:300])
        if trace.exists():
            print(content[:80], "ran code")
            trace.rmdir()
    for name, kind in (("pipe", "a pipe"), (".", "a folder")):
        with pytest.raises(ValueError, match=kind):
            read_config_file(str(folder / name))


def test_bad_files_end_in_named_errors(tmp_path):
    """In a process of its own, which may be killed or never end."""
    program = f"import test_config_file; test_config_file.run_bad_files({str(tmp_path)!r})"
    result = forked.run(
        [sys.executable, "-c", program],
        timeout=300,
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))},
    )
    assert (result.returncode, result.stdout) == (0, ""), result.stderr[-3000:]


@pytest.mark.parametrize("value", ["-" * 100_000, "[" * 10_000, "1" + "+1" * 20_000, "{1:" * 90])
def test_text_that_python_cannot_parse(tmp_path, value):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"VERSION": 2, "SOLVER": {"MAX_ITER": value}}))
    with pytest.raises(ValueError, match=r"config\.yaml"):
        load_config(str(path))
    with pytest.raises(ValueError, match=r"SOLVER\.MAX_ITER"):
        load_config(str(BASE), ["SOLVER.MAX_ITER", value])


@pytest.mark.parametrize("in_base", [False, True])
def test_a_config_never_runs_code(tmp_path, in_base):
    trace = tmp_path / "trace"
    (tmp_path / "bad.yaml").write_text(
        f"_BASE_: {BASE}\nOUTPUT_DIR: !!python/object/apply:os.mkdir ['{trace}']\n"
    )
    (tmp_path / "top.yaml").write_text("_BASE_: bad.yaml\n")
    with pytest.raises(ValueError, match=r"bad\.yaml', line 2, OUTPUT_DIR: the tag"):
        load_config(str(tmp_path / ("top.yaml" if in_base else "bad.yaml")))
    assert not trace.exists()


def test_each_file_is_read_once(tmp_path, monkeypatch):
    (tmp_path / "a.yaml").write_text(f"_BASE_: [b.yaml, b.yaml]\nOUTPUT_DIR: {tmp_path}")
    (tmp_path / "b.yaml").write_text(f"_BASE_: {BASE}")
    opened = []

    def counted_open(path, *args, **kwargs):
        opened.append(os.path.basename(path))
        return open(path, *args, **kwargs)

    monkeypatch.setattr("mask2former.config_file.open", counted_open, raising=False)
    load_config(str(tmp_path / "a.yaml"))
    assert len(opened) == len(set(opened)) > 3
