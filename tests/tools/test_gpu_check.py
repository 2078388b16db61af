"""tools/gpu_check.py: limits, budget and summary with steps of a second; a dry run of its own."""

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import toy_training as toy
from load_script import ROOT, load_script

tool = load_script("tools/gpu_check.py")
runner, headlines = sys.modules["runner"], sys.modules["headlines"]
benchmark = load_script("tools/benchmark")

STEPS = (
    *("versions", "self-test", "cases", "memcheck", "racecheck", "racecheck-shared", "tests", "op"),
    *("cases-shared", "op-shared", "ncu", "model", "train", "train-16", "trainer", "attention"),
    *("loss_memory", "fps"),
)


def python(code: str, name: str = "step", limit: float = 60, **options) -> "runner.Step":
    return runner.Step(name, limit, lambda run: [sys.executable, "-c", code], **options)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Function (steps, *arguments) → exit status, rows of summary.json and printed text."""
    monkeypatch.setattr(runner, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(runner, "MIN_SECONDS", 0.3)

    def run_steps(steps, *arguments: str) -> tuple[int, list[dict], str]:
        status = tool.main([str(tmp_path / "out"), *arguments], steps)
        rows = json.loads((tmp_path / "out/summary.json").read_text())["steps"]
        return status, rows, capsys.readouterr().out

    return run_steps


def is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


# Starts a child, writes its id, and hangs. The child ignores the request to end.
HANGS = """
import subprocess, sys, time
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
process = subprocess.Popen([sys.executable, "-c", child])
print(process.pid, flush=True)
time.sleep(60)
"""


def test_step_that_hangs_is_killed_with_its_children(run, tmp_path):
    status, rows, text = run([python(HANGS, "hangs", limit=1.5), python("print(1)", "next")])
    assert status == 1
    assert [(x["step"], x["status"]) for x in rows] == [("hangs", "timed out"), ("next", "ok")]
    assert rows[0]["reason"] == "after 2 s" and 1.4 < rows[0]["seconds"]
    child = int((tmp_path / "out/hangs.log").read_text())
    for _ in range(50):
        if not is_alive(child):
            break
        time.sleep(0.1)
    assert not is_alive(child)


def test_step_that_fails_is_reported_and_stops_no_other(run, tmp_path):
    steps = [
        python("print('about to fail'); raise SystemExit(3)", "fails"),
        python("print(1)", "passes"),
        runner.Step("absent", 5, lambda run: ["/no/such/program"]),
    ]
    status, rows, text = run(steps)
    assert status == 1
    assert [x["status"] for x in rows] == ["failed", "ok", "failed"]
    assert rows[0]["reason"] == "exit status 3" and "/no/such/program" in rows[2]["reason"]
    assert (tmp_path / "out/fails.log").read_text() == "about to fail\n"
    lines = text.splitlines()
    assert lines[-3].startswith("| fails | failed | ") and lines[-3].endswith("| exit status 3 |")
    assert "fails: failed" in text and "passes: ok" in text


def test_budget_caps_limits_and_stops(run):
    steps = [python("import time; time.sleep(60)", name) for name in ("a", "b")]
    start = time.monotonic()
    status, rows, _ = run(steps, "--seconds", "1.2")
    assert time.monotonic() - start < 10
    assert status == 1
    assert [x["status"] for x in rows] == ["timed out", "not run"]
    assert rows[0]["reason"] == "after 1 s, all that was left" and rows[0]["limit"] == 1.2
    assert rows[1]["reason"] == "0 s were left"
    assert "time.sleep" in rows[1]["command"]


def test_skipped_for_a_reason_is_no_failure(run):
    refuses = "print('tool says: ERR_NO_PERMISSION here'); raise SystemExit(1)"
    steps = [
        python("", "absent", why_not=lambda run: "no such tool"),
        python(refuses, "refused", skip_pattern="ERR_NO_\\w+"),
        python("print(1)", "fine", skip_pattern="1"),
    ]
    status, rows, text = run(steps)
    assert status == 0
    assert [(x["status"], x["reason"]) for x in rows] == [
        ("skipped", "no such tool"),
        ("skipped", "ERR_NO_PERMISSION"),
        ("ok", ""),
    ]
    assert f"  {shlex.join([sys.executable, '-c', ''])}\n" in text


def test_summary_is_written_after_every_step(run, tmp_path):
    summary = tmp_path / "out/summary.json"
    shows = f"import json; print([x['status'] for x in json.load(open({str(summary)!r}))['steps']])"
    read = {"headline": lambda folder, log: {"log": log.strip()}}
    status, rows, text = run([python("print(7)", "a", **read), python(shows, "b", **read)])
    assert status == 0
    assert rows[0]["headline"] == {"log": "7"}
    assert rows[1]["headline"] == {"log": "['ok', 'not run']"}
    markdown = (tmp_path / "out/summary.md").read_text()
    assert "| a | ok | " in markdown and "a:\n\n- log: 7\n" in markdown
    assert not list(tmp_path.glob("out/*.tmp"))


def test_result_without_its_numbers_has_failed(run):
    steps = [python("", headline=lambda folder, log: json.loads((folder / "no.json").read_text()))]
    status, rows, _ = run(steps)
    assert status == 1
    assert rows[0]["reason"].startswith("no result: FileNotFoundError: ")


def test_environment_is_inherited(run, monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", "/somewhere/else")
    code = "import os; print(os.environ['PYTHONPATH'], os.environ['EXTRA'])"
    run([python(code, environment={"EXTRA": "more"})])
    assert (tmp_path / "out/step.log").read_text() == f"{ROOT}:/somewhere/else more\n"


def test_interrupted_run_ends_its_step_and_keeps_its_summary(tmp_path):
    code = f"""
import signal, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from load_script import load_script
tool = load_script({str(ROOT / "tools/gpu_check.py")!r})
runner = sys.modules["runner"]
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
hangs = {HANGS!r}
steps = [
    runner.Step(name, 50, lambda run, code=code: [sys.executable, "-c", code])
    for name, code in (("first", "print(1)"), ("hangs", hangs))
]
tool.main([{str(tmp_path)!r}], steps)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    log = tmp_path / "hangs.log"
    for _ in range(300):
        if log.exists() and log.read_text().strip():
            break
        time.sleep(0.1)
    child = int(log.read_text())
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    rows = json.loads((tmp_path / "summary.json").read_text())["steps"]
    assert [x["status"] for x in rows] == ["ok", "not run"]
    assert not is_alive(child)


def test_selected_steps(run, capsys):
    steps = [python("", name) for name in ("a", "b", "c")]
    _, rows, _ = run(steps, "--steps", "c,a")
    assert [x["step"] for x in rows] == ["a", "c"]
    with pytest.raises(SystemExit):
        run(steps, "--steps", "a,d")
    assert "unknown step 'd', known are a, b, c" in capsys.readouterr().err


# ---- the table of steps ----


def test_table_of_steps():
    assert tuple(step.name for step in tool.STEPS) == STEPS
    assert tool.MAX_SECONDS <= 580


@pytest.mark.parametrize("is_dry", [True, False])
def test_options_of_the_programs(is_dry, tmp_path, monkeypatch):
    """Programs and files exist, and the benchmark takes its options."""
    run = runner.Run(tmp_path, is_dry)
    for step in tool.STEPS:
        command = [str(part) for part in step.command(run)]
        assert all(Path(x).exists() for x in command if x.startswith(str(ROOT)) and "_C." not in x)
        assert ("cuda" in command) <= (not is_dry)
        if str(ROOT / "tools/benchmark") in command:
            arguments = command[command.index(str(ROOT / "tools/benchmark")) + 1 :]
            options = benchmark.make_parser().parse_args(arguments)
            assert options.output == tmp_path / step.name
            assert options.devices == [run.device]
    if not is_dry:
        sanitizers = {"memcheck", "racecheck", "racecheck-shared"}
        for tools, missing in (({"ncu"}, sanitizers), (set(), {"ncu"})):
            monkeypatch.setattr(tool, "find_tool", lambda name, tools=tools: name in tools)
            reasons = {step.name for step in tool.STEPS if step.why_not(run)}
            assert missing <= reasons <= {*sanitizers, "ncu"}


# One step of each kind. Tests of their own run the programs of the others.
DRY = ("memcheck", "tests", "ncu", "train-16", "trainer", "attention", "loss_memory", "fps")


def test_dry_run(tmp_path, monkeypatch, capsys):
    programs = SimpleNamespace(**vars(subprocess) | {"Popen": forked.Popen})
    monkeypatch.setattr(runner, "subprocess", programs)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = ["--dry-run", "--seconds", "1500", "--steps", ",".join(DRY)]
    status = tool.main([str(tmp_path), *arguments])
    rows = {x["step"]: x for x in json.loads((tmp_path / "summary.json").read_text())["steps"]}
    logs = "\n".join(path.read_text()[-2000:] for path in tmp_path.glob("*.log"))
    assert status == 0, capsys.readouterr().out + logs
    assert tuple(rows) == DRY
    for name, row in rows.items():
        expected = ("skipped", "needs a GPU") if name == "tests" else ("ok", "")
        assert (row["status"], row["reason"]) == expected
    assert "-m pytest" in rows["tests"]["command"]
    (step,) = rows["train-16"]["headline"].items()
    assert step[0] == "bf16 64x64 batch 3 step" and "calls, 1 syncs" in step[1]
    assert "s/it" in rows["trainer"]["headline"] and (tmp_path / "trainer/trace.json.gz").exists()
    assert "| boolean | our layer |" in (tmp_path / "attention/attention.md").read_text()
    assert rows["loss_memory"]["headline"]["match masks, train masks"].endswith("(paper: 18 GB)")
    assert len(rows["loss_memory"]["headline"]) == 4  # rows of Table 5
    assert re.fullmatch(r"\d+\.\d images/s", rows["fps"]["headline"]["tiny"])


def test_output_that_is_no_folder(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        tool.main([str(tmp_path / "file/out")], [])
    assert "the output folder cannot be made" in capsys.readouterr().err


def test_measured_training_writes_its_losses_late(tmp_path):
    """As training does without the hook that measures."""
    measure = load_script("tools/gpu_steps/trainer.py").Measure
    trainer = toy.ToyTrainer(toy.toy_config(tmp_path))
    trainer.register_hooks([measure(tmp_path, 40, on_gpu=False)])
    readers, _ = trainer._readers_of_losses()
    assert readers == ["WriteLosses"]  # of the toy trainer


# ---- headlines ----


def test_results_of_an_earlier_run_are_not_reported(run, tmp_path):
    code = "import pathlib; pathlib.Path(r'{}').write_text('{{\"a\": 1}}')"
    code = code.format(tmp_path / "out/step/result.json")
    options = {"headline": headlines.read_result, "result": "result.json"}
    assert run([python(code, **options)])[1][0]["headline"] == {"a": 1}
    for other in ("raise SystemExit(1)", ""):
        _, rows, _ = run([python(other, **options)])
        assert rows[0]["headline"] == {} and rows[0]["status"] == "failed"


def test_headlines_of_logs(tmp_path):
    log = (
        "FAILED tests/a.py::test[x] - no\nERROR tests/b.py\n== 1 failed, 2 passed, 3 skipped in 4s"
    )
    assert headlines.read_pytest(tmp_path, log) == {
        **{"failed": 1, "passed": 2, "skipped": 3},
        "first": "tests/a.py::test[x] tests/b.py",
    }
    log = "self-test on cuda, fused, float32: passed, 1e-6\nself-test on cpu: FAILED, 1\nx: passed"
    assert headlines.read_self_test(tmp_path, log) == {"passed": 1, "failed": 1}
    log = "clean\n========= ERROR SUMMARY: 0 errors\n"
    assert headlines.read_sanitizer(tmp_path, log) == {"summary": "ERROR SUMMARY: 0 errors"}
    (tmp_path / "ncu.csv").write_text(
        '==PROF== Connected\n"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","void forward_kernel<float, 8>(Problem)","gpu__time_duration.sum","us","81.5"\n'
        '"0","void forward_kernel<float, 8>(Problem)","launch__registers_per_thread","","64"\n'
    )
    assert headlines.read_ncu(tmp_path, "") == {
        "0 void forward_kernel<float, 8>": "gpu__time_duration 81.5 us, "
        "launch__registers_per_thread 64"
    }


def test_headline_of_a_benchmark(tmp_path):
    case = {"dtype": "bf16", "height": 64, "width": 32, "batch": 1, "pass": "forward"}
    rows = [
        {**case, "backend": "fused", "device_seconds": {"median": 1e-3}, "peak_bytes": 2**29},
        {**case, "backend": "other", "device_seconds": {"median": 3e-3}, "peak_bytes": None},
        {**case, "backend": "wrong", "error": "WrongNumbers: 1"},
    ]
    report = {"results": rows, "absent": {"cuda": {"original": "no ms-deform-attn"}, "cpu": {}}}
    (tmp_path / "op.json").write_text(json.dumps(report))
    assert headlines.read_benchmark("op", "fused", ("forward",))(tmp_path, "") == {
        "bf16 64x32 batch 1 forward": "1 ms, 3.00x other, 0.50 GiB",
        "bf16 64x32 batch 1 forward wrong": "WrongNumbers: 1",
        "absent": '{"cuda": {"original": "no ms-deform-attn"}}',
    }
