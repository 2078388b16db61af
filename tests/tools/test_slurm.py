"""tools/slurm.sbatch with stand-ins for Slurm's commands."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "slurm.sbatch"


def submit(tmp_path: Path, *arguments: str, **changes: str | None) -> subprocess.CompletedProcess:
    """Run the script as Slurm would on the first node."""
    for name, body in {
        "srun": 'printf "%s\\n" "$@"',
        # More than a pipe holds: who reads one line of it ends the writer.
        "scontrol": "for i in $(seq 7 20000); do echo node$i; done",
    }.items():
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
    environ = os.environ | {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_ID": "123456",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "PYTHON": "python3",
        **changes,
    }
    environ = {name: value for name, value in environ.items() if value is not None}
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, env=environ, capture_output=True, text=True)


def test_one_torchrun_per_node(tmp_path):
    result = submit(tmp_path, "--config-file", "a b.yaml", "SOLVER.BASE_LR", "1e-4")
    assert result.returncode == 0, result.stderr
    first, *arguments = result.stdout.splitlines()
    assert first == "[slurm] job 123456: 2 node(s) x 8 GPU(s), node7:23456"
    assert arguments == [
        *("--kill-on-bad-exit=1", "python3", "-m", "torch.distributed.run"),
        *("--nnodes", "2", "--nproc-per-node", "8"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "node7:23456", "--rdzv-id", "123456"),
        *("tools/train_net.py", "--resume", "--config-file", "a b.yaml"),
        *("SOLVER.BASE_LR", "1e-4"),
    ]


def test_node_without_gpus_and_another_port(tmp_path):
    arguments = submit(tmp_path, SLURM_GPUS_ON_NODE=None, PORT="29501").stdout.splitlines()
    assert arguments[arguments.index("--nproc-per-node") + 1] == "1"
    assert arguments[arguments.index("--rdzv-endpoint") + 1] == "node7:29501"


def test_outside_of_slurm_and_outside_of_the_project(tmp_path):
    result = submit(tmp_path, SLURM_JOB_ID=None)
    assert result.returncode and "submit this file with sbatch" in result.stderr
    result = submit(tmp_path, SLURM_SUBMIT_DIR=str(tmp_path))
    assert result.returncode == 1 and "run sbatch in the project's folder" in result.stderr
