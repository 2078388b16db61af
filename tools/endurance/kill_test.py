"""The subcommand kill: a training that is killed again and again ends like an undisturbed one."""

import argparse
import random
import signal
import statistics
import sys
import time
from typing import NamedTuple

from same_bits import differences
from tabulate import tabulate
from tqdm import tqdm
from training_runs import Event, Run, Training

# Evaluations and checkpoints within training, alone and in the same iteration.
TOY = {"SOLVER.MAX_ITER": 120, "SOLVER.CHECKPOINT_PERIOD": 4, "TEST.EVAL_PERIOD": 14}
MOMENTS = {
    "start": "during start-up",
    "train": "in training",
    "save": "while saving",
    "evaluate": "in evaluation",
}
_POLL_SECONDS = 0.004


class Kill(NamedTuple):
    """When to kill.

    Attributes:
        moment: a key of MOMENTS.
        iteration: wait until as many are done, then for the moment.
        share: of the moment's usual duration to wait further.
    """

    moment: str
    iteration: int
    share: float


class _Failed(Exception):
    """A run did not get on or ended with an error."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kills", type=int, default=30, help="how many SIGKILLs [30]")
    parser.add_argument("--seed", type=int, default=0, help="of their moments [0]")
    parser.add_argument(
        "--max-seconds",
        type=float,
        help="a run between two kills that takes longer has failed [ten times the undisturbed "
        "run, at least 60]",
    )


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.kills < 1:
        parser.error(f"--kills must be at least 1, got {options.kills}")


def plan(
    seed: int, count: int, max_iter: int, period: int, eval_period: int, *, evaluates: bool
) -> list[Kill]:
    """Random moments, in the order of the iterations they wait for.

    Args:
        seed: of the moments.
        count: how many.
        max_iter, period: iterations of the training, and between its checkpoints.
        eval_period: of the training; 0: it evaluates at its end only.
        evaluates: whether it evaluates at all.
    """
    rng = random.Random(seed)
    moments = [moment for moment in MOMENTS if evaluates or moment != "evaluate"]
    kills = []
    for i in range(count):
        # Each moment has its turn.
        moment = moments[i % len(moments)]
        if moment != "evaluate":
            # The last checkpoint of training is still to come.
            iteration = rng.randrange(max(max_iter - period, 1))
        elif 0 < eval_period < max_iter:
            iteration = rng.randrange(max_iter)
        else:
            iteration = max_iter - 1
        kills.append(Kill(moment, iteration, rng.random()))
    return sorted(kills, key=lambda kill: kill.iteration)


def durations(run: Run, ended: float) -> dict[str, float]:
    """Seconds that each of MOMENTS takes in an undisturbed run."""
    times: dict[str, list[float]] = {moment: [] for moment in MOMENTS}
    train = [event.time for event in run.events if event.kind == "train"]
    saves = [event.time for event in run.events if event.kind == "save"]
    times["start"] = [train[0] - run.started]
    times["train"] = [b - a for a, b in zip([train[0], *saves], saves, strict=False)]
    # Renaming keeps the time of the last write.
    final = run.folder / "model_final.pth"
    times["save"] = [final.stat().st_mtime - saves[-1]]
    evaluations = [event.time for event in run.events if event.kind == "evaluate"]
    times["evaluate"] = [ended - time for time in evaluations[-1:]]
    return {moment: max(statistics.median(all_ or [0]), 0.0) for moment, all_ in times.items()}


def _wait(run: Run, kill: Kill | None, usual: dict[str, float], max_seconds: float) -> int | None:
    """Wait for the moment of a kill, or without one for the end of the run.

    Returns:
        the exit status if the run ended before.

    Raises:
        _Failed: the run ended with an error or took too long.
    """
    due = None
    if kill is not None and kill.moment == "start":
        due = run.started + kill.share * usual["start"]
    num_read = 0
    while True:
        status = run.poll()
        if status is not None:
            if status != 0:
                raise _Failed(f"a run ended with status {status}:\n{run.last_lines()}")
            return status
        new, num_read = run.events[num_read:], len(run.events)
        if due is None and kill is not None and (event := _first(new, kill)):
            due = event.time + kill.share * usual[kill.moment]
        now = time.time()
        if due is not None and now >= due:
            return None
        if now > run.started + max_seconds:
            raise _Failed(
                f"a run has not got on from iteration {run.iteration} in {max_seconds:.0f} s:\n"
                f"{run.last_lines()}"
            )
        time.sleep(_POLL_SECONDS)


def _first(events: list[Event], kill: Kill) -> Event | None:
    """The first event that begins the moment of a kill."""
    # Training goes on behind a checkpoint.
    kinds = ("train", "save") if kill.moment == "train" else (kill.moment,)
    return next((e for e in events if e.kind in kinds and e.iteration >= kill.iteration), None)


def run_killed(
    training: Training, name: str, kills: list[Kill], usual: dict[str, float], max_seconds: float
) -> list[dict[str, object]]:
    """Run a training that is killed at each of the moments and resumed, and lastly to its end.

    A run that ends before its kill is followed by another one, which is killed earlier.

    Returns:
        for each run but the last the columns of a table; those that were killed have a number.

    Raises:
        _Failed: a run ended with an error or took too long, or half of the runs ended before their
            kills.
    """
    rows: list[dict[str, object]] = []
    todo = list(kills)
    num_killed = 0
    with tqdm(total=len(kills), desc=name, unit="kill", file=sys.stderr) as progress:
        while True:
            kill = todo.pop(0) if todo else None
            with training.start(name, resume=bool(rows)) as run:
                _wait(run, kill, usual, max_seconds)
                seconds = time.time() - run.started
            run.poll()
            starts = [event.iteration for event in run.events if event.kind == "train"]
            if rows:
                rows[-1]["resumed at"] = starts[0] if starts else ""
            if kill is None:
                return rows
            # It may have ended between the last look at it and the signal.
            is_killed = run.process.returncode == -signal.SIGKILL
            cut = sorted(path.name for path in run.folder.rglob("*.tmp"))
            if is_killed:
                num_killed += 1
                progress.update()
            elif len(rows) - num_killed >= len(kills):
                raise _Failed(f"{len(rows) + 1 - num_killed} runs ended before they were killed")
            else:
                todo.insert(0, earlier(kill))
            rows.append(
                {
                    "kill": num_killed if is_killed else "",
                    "moment": MOMENTS[kill.moment],
                    "after s": f"{seconds:.2f}",
                    "iteration": run.iteration,
                    "what happened": "ended before"
                    if not is_killed
                    else f"killed, {', '.join(cut)} half written"
                    if cut
                    else "killed",
                    "resumed at": "",
                }
            )


def earlier(kill: Kill) -> Kill:
    """A kill in place of one that came too late, at a moment that a finished training has too."""
    moment = kill.moment if kill.moment == "evaluate" else "start"
    return Kill(moment, kill.iteration, kill.share / 2)


def run(options: argparse.Namespace) -> int:
    """Run the test and print its table.

    Returns:
        the exit status: 1 if anything differs.
    """
    training = Training(options, TOY)
    cfg = training.cfg
    kills = plan(
        options.seed,
        options.kills,
        cfg.SOLVER.MAX_ITER,
        cfg.SOLVER.CHECKPOINT_PERIOD,
        cfg.TEST.EVAL_PERIOD,
        evaluates=bool(cfg.DATASETS.TEST),
    )
    try:
        with training.start("undisturbed") as undisturbed:
            _wait(undisturbed, None, {}, float("inf"))
            ended = time.time()
        usual = durations(undisturbed, ended)
        seconds = ended - undisturbed.started
        times = ", ".join(f"{moment} {value:.2f} s" for moment, value in usual.items())
        print(f"undisturbed: {seconds:.1f} s ({times})", flush=True)
        max_seconds = options.max_seconds or max(60.0, 10 * seconds)
        rows = run_killed(training, "killed", kills, usual, max_seconds)
    except _Failed as error:
        print(f"FAILED: {error}")
        return 1
    finally:
        training.close()
    found = differences(training.folder / "undisturbed", training.folder / "killed")
    table = tabulate(rows, headers="keys", tablefmt="pipe")
    verdict = "\n".join(f"DIFFERENT: {line}" for line in found)
    if not found:
        verdict = f"SAME: {len(kills)} kills changed no bit of checkpoints, metrics and evaluation"
    print(f"\n{table}\n\n{verdict}")
    return int(bool(found))
