"""The training program: arguments → checked config → processes → training or evaluation.

Processes are one, several spawned by Detectron2's launcher, or those torchrun made. A script of
your own registers its data sets and calls `run`.
"""

import argparse
import contextlib
import datetime
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import detectron2.engine
import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch.distributed.elastic.multiprocessing.errors import record

from .checkpoint import Mask2FormerCheckpointer
from .config import (
    ExtendConfig,
    load_config,
    register_custom_datasets,
    without_added_defaults,
)
from .env import describe
from .evaluation.expected_results import check_expected_results
from .preflight import Purpose, check_run, load_and_check
from .smoke_test import empty_smoke_folder, run_smoke_test, smoke_folder
from .trainer import Trainer, has_own_evaluators
from .utils.determinism import use_deterministic_algorithms
from .utils.files import explained_write_errors, require_writable
from .utils.interrupts import (
    interrupt_message,
    interruptible,
    own_command,
    torchrun_command,
    unblock_signals,
    wait_for_spawned,
)
from .utils.log_file import checked_log_file, kept_warnings, write_to_log_file
from .utils.memory import keep_freed_memory
from .utils.output_lock import lock_output
from .utils.ranks import Peers, explained_failures, set_timeout

_TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
# Before anything slow: it may be gone later. Without torchrun itself the ranks cannot connect.
_STARTED_BY = os.getppid()
_logger = logging.getLogger(__name__)
_DEFAULT_TIMEOUT = 30.0  # minutes, Detectron2's


class _Checked(NamedTuple):
    """What `launch` hands to the processes it starts, as `args.checked`.

    Attributes:
        config_file, opts, extend_config: what `cfg` was loaded from.
        cfg: the checked config.
        warnings: of the checks, for the log file.
    """

    config_file: str
    opts: list[str]
    extend_config: ExtendConfig | None
    cfg: CfgNode
    warnings: list[logging.LogRecord]

    def __repr__(self) -> str:
        # Programs log their arguments.
        return "<checked config>"


def setup(args: argparse.Namespace, extend_config: ExtendConfig | None = None) -> CfgNode:
    """Get the checked config that the arguments name, and set up logging and seeds.

    Args:
        args: of Detectron2's `default_argument_parser`. In processes started by `launch` they carry
            the checked config, which is used unless `config_file` or `opts` have changed since.
        extend_config: see `load_config`; default: that of `launch`.

    Returns:
        The config, frozen. It is also written to OUTPUT_DIR/config.yaml.

    Raises:
        ValueError: the config has a mistake, or OUTPUT_DIR is empty.
        WriteError: OUTPUT_DIR cannot be written.
    """
    checked: _Checked | None = getattr(args, "checked", None)
    if checked is not None and extend_config is None:
        extend_config = checked.extend_config
    if checked is not None and checked[:3] == (args.config_file, list(args.opts), extend_config):
        cfg, warnings = checked.cfg, checked.warnings
        # A spawned process lacks what its parent registered.
        register_custom_datasets(cfg)
    else:
        # The caller may still register data sets; `main` and `Trainer` check the rest.
        with kept_warnings() as warnings:
            cfg = load_and_check(
                args.config_file, args.opts, "unknown", extend_config=extend_config
            )
    cfg.freeze()
    if not cfg.OUTPUT_DIR:
        raise ValueError("OUTPUT_DIR is empty: name the folder of the log and the results.")
    # Before a full disk leaves a part of config.yaml.
    if comm.is_main_process():
        require_writable(cfg.OUTPUT_DIR)
    # Writes config.yaml, which programs of the original release should be able to read.
    with checked_log_file(), explained_write_errors(os.path.join(cfg.OUTPUT_DIR, "config.yaml")):
        default_setup(without_added_defaults(cfg), _loggable(args))
        setup_logger(output=cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="mask2former")
    if comm.is_main_process():
        lines, problems = describe(self_test=True)
        _logger.info("Environment:\n  " + "\n  ".join(lines))
        for problem in problems:
            _logger.warning(problem)
        write_to_log_file(warnings)
    if cfg.get("DETERMINISTIC", False):
        use_deterministic_algorithms()
    return cfg


def _loggable(args: argparse.Namespace) -> argparse.Namespace:
    """Leave out a config file that Detectron2 cannot log: it expects the locale's encoding."""
    try:
        with open(args.config_file) as file:
            file.read()
    except (OSError, UnicodeError):
        return argparse.Namespace(**(vars(args) | {"config_file": ""}))
    return args


def main(args: argparse.Namespace) -> dict | None:
    """Train, or with `--eval-only` evaluate, in this process.

    Args:
        args: of Detectron2's `default_argument_parser`; an additional `compile` is a mode of
            `torch.compile` for evaluation, `smoke` asks for a smoke test (`smoke_test.py`), which
            `launch` has prepared.

    Returns:
        The evaluation results, on the main process: {task: {metric: value}}, per data set if
        DATASETS.TEST names several.
    """
    # Other parsers do not have this argument.
    compile_mode = getattr(args, "compile", None)
    if compile_mode and not args.eval_only:
        raise ValueError("--compile is for inference: give it together with --eval-only")
    if getattr(args, "model", None) and (not args.eval_only or compile_mode or args.resume):
        raise ValueError(
            "--model is an exported file, which is only evaluated: give it with --eval-only, and "
            "without --compile and --resume"
        )
    checked: _Checked | None = getattr(args, "checked", None)
    # A second training must not replace config.yaml, and read no checkpoint being written.
    lock: Any = contextlib.nullcontext()
    if checked is not None and not args.eval_only:
        lock = lock_output(checked.cfg.OUTPUT_DIR)
    with lock:
        return _train_or_evaluate(args, compile_mode)


def _train_or_evaluate(args: argparse.Namespace, compile_mode: str | None) -> dict | None:
    cfg = setup(args)
    if torch.device(cfg.MODEL.DEVICE).type == "cpu":
        keep_freed_memory()
    if args.eval_only:
        check_run(cfg, "evaluate", own_evaluators=has_own_evaluators(Trainer))
        model = _model_to_evaluate(args, cfg, compile_mode)
        results = Trainer.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results.update(Trainer.test_with_TTA(cfg, model))
        if comm.is_main_process():
            check_expected_results(cfg, results)
            verify_results(cfg, results)
        return results

    if getattr(args, "smoke", False):
        return run_smoke_test(cfg)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def _model_to_evaluate(args: argparse.Namespace, cfg: CfgNode, compile_mode: str | None) -> Any:
    """The model of the config with its checkpoint, or the exported file that `--model` names."""
    exported = getattr(args, "model", None)
    if exported is not None:
        from .export import build_exported_model

        return build_exported_model(exported, cfg)
    model: Any = Trainer.build_model(cfg)
    if compile_mode:
        model.compile_inference(mode=compile_mode)
    checkpointer = Mask2FormerCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
    return model


# `run` and `launch` have an argument of this name.
_OWN_MAIN = main


def run(
    main: Callable[[argparse.Namespace], Any] = main,
    *,
    extend_config: ExtendConfig | None = None,
) -> None:
    """Read the command line and run `main` in every process of the job.

    Args:
        main: what each process runs; calls `setup`.
        extend_config: called with the default config to add keys of your own to it, in place. Like
            `main` it must be a function at the top level of a module if processes are spawned.
    """
    parser = default_argument_parser()
    parser.add_argument(
        "--compile",
        choices=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
        help="with --eval-only: compile the model with torch.compile in this mode; recompiles for "
        "every padded image size, so a larger MODEL.MASK_FORMER.SIZE_DIVISIBILITY may help",
    )
    parser.add_argument(
        "--model",
        metavar="FILE",
        help="with --eval-only: evaluate this file of tools/export.py instead of MODEL.WEIGHTS",
    )
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="is everything in place? Two iterations, a checkpoint, an evaluation of a few images "
        "and a drawing, in OUTPUT_DIR/smoke; a checklist, and status 1 if a step fails",
    )
    args = parser.parse_args()
    print("Command Line Args:", args)
    launch(main, args, extend_config)


def started_by_torchrun(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun started this process."""
    return all(name in environment for name in _TORCHRUN_VARIABLES)


def launch(
    main: Callable[[argparse.Namespace], Any],
    args: argparse.Namespace,
    extend_config: ExtendConfig | None = None,
) -> None:
    """Check the config, then run `main(args)` in every process of the job.

    Under torchrun the processes exist, on one machine or several; otherwise Detectron2's launcher
    starts `--num-gpus` on this one. They communicate through NCCL on GPUs, through gloo on CPUs.
    The checked config travels in `args`, where `setup` finds it, so that a mistake is reported
    once, before processes start.

    Ctrl-C and SIGTERM end the job with one line, which has the command to resume. A rank that does
    not answer for DISTRIBUTED_TIMEOUT minutes ends it with an error. Ranks whose launcher is gone
    end by themselves.

    Args:
        main: what each process runs.
        args: of Detectron2's `default_argument_parser`.
        extend_config: see `run`.

    Raises:
        ValueError: a bad config, processes that would be started twice, or more processes than
            GPUs.
        SystemExit: after Ctrl-C (status 130) or SIGTERM (143).
    """
    by_torchrun = started_by_torchrun()
    num_spawned = max(args.num_gpus * args.num_machines, 1)
    if by_torchrun and num_spawned > 1:
        raise ValueError(
            f"torchrun started this process, so --num-gpus {args.num_gpus} --num-machines "
            f"{args.num_machines} would start processes twice: leave them out, and tell "
            "torchrun --nproc-per-node and --nnodes."
        )
    is_smoke = getattr(args, "smoke", False)
    if is_smoke and (args.resume or args.eval_only or main is not _OWN_MAIN):
        raise ValueError(
            "--smoke tries the training of tools/train_net.py from its start: leave out --resume "
            "and --eval-only. A program with a main function of its own is not known to it."
        )
    purpose: Purpose = "unknown"
    if main is _OWN_MAIN:
        purpose = "evaluate" if args.eval_only else "train"
    # Reading the annotations of a large data set takes a while.
    with (
        interruptible(lambda signum: _message_before_start(signum, args.opts)),
        kept_warnings() as warnings,
    ):
        options: Any = {
            "num_workers": int(os.environ["WORLD_SIZE"]) if by_torchrun else num_spawned,
            "own_evaluators": has_own_evaluators(Trainer),
        }
        if is_smoke:
            cfg = load_config(args.config_file, args.opts, extend_config)
            # Before the checks, which would have to run again.
            cfg.OUTPUT_DIR = smoke_folder(cfg)
            if int(os.environ["RANK"] if by_torchrun else args.machine_rank) == 0:
                empty_smoke_folder(cfg.OUTPUT_DIR)
            check_run(cfg, purpose, **options)
        else:
            cfg = load_and_check(
                args.config_file, args.opts, purpose, extend_config=extend_config, **options
            )
    on_gpu = torch.device(cfg.MODEL.DEVICE).type == "cuda"
    if num_spawned > 1 and not on_gpu and torch.cuda.is_available():
        # Detectron2's launcher uses NCCL if there is a GPU, and NCCL cannot send CPU tensors.
        raise ValueError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r} with --num-gpus {args.num_gpus} on a machine "
            "with GPUs: start the processes with torchrun instead."
        )
    args.checked = _Checked(args.config_file, list(args.opts), extend_config, cfg, warnings)
    try:
        if by_torchrun:
            run_rank = record(_run_rank)
            run_rank(main, args, torchrun_command(), _STARTED_BY, joins=True)
        elif num_spawned > 1:
            _spawn(main, args, own_command())
        else:
            with interruptible(lambda signum: interrupt_message(signum, own_command(), args.opts)):
                detectron2.engine.launch(main, 1, args=(args,))
    finally:
        del args.checked


def _message_before_start(signum: int, opts: list[str]) -> str | None:
    """What to say if the signal comes while the config is checked."""
    if not started_by_torchrun():
        return interrupt_message(signum, own_command(), opts)
    # One line per machine; and torchrun sends SIGTERM when another rank has found a mistake.
    if signum == signal.SIGTERM or os.environ["LOCAL_RANK"] != "0":
        return None
    return interrupt_message(signum, torchrun_command(), opts)


def _spawn(
    main: Callable[[argparse.Namespace], Any], args: argparse.Namespace, command: list[str]
) -> None:
    """Run `main` in processes that Detectron2's launcher starts."""

    def start() -> None:
        detectron2.engine.launch(
            _run_spawned,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(main, args, command, multiprocessing.get_start_method()),
            timeout=datetime.timedelta(minutes=_timeout(args)),
        )

    wait_for_spawned(start, lambda signum: interrupt_message(signum, command, args.opts))


def _run_spawned(
    main: Callable[[argparse.Namespace], Any],
    args: argparse.Namespace,
    command: list[str],
    start_method: str,
) -> None:
    # As under torchrun. Otherwise each process of a data loader is spawned too: it imports all
    # modules, and prints a traceback if Ctrl-C comes meanwhile.
    multiprocessing.set_start_method(start_method, force=True)
    parent = multiprocessing.parent_process()
    assert parent is not None
    _run_rank(main, args, command, parent.pid, joins=False)


def _run_rank(
    main: Callable[[argparse.Namespace], Any],
    args: argparse.Namespace,
    command: list[str],
    parent: int | None,
    *,
    joins: bool,
) -> None:
    """Run `main` in this process of a job of several.

    Args:
        main, args: see `launch`.
        command: what started the job, for the message after an interrupt.
        parent: process that starts and ends the ranks of this machine.
        joins: whether to join the group that torchrun describes; otherwise this has been done.
    """
    peers: Peers | None = None
    local_rank = int(os.environ["LOCAL_RANK"]) if joins else comm.get_local_rank()

    def message(signum: int) -> str | None:
        # One line per machine; and none if the launcher ends the ranks because one has failed,
        # whose error it reports.
        is_clean_up = signum == signal.SIGTERM and (peers is None or peers.ended())
        if is_clean_up or local_rank != 0:
            return None
        return interrupt_message(signum, command, args.opts)

    minutes = _timeout(args)
    with interruptible(message, parent=parent, at_once=True):
        unblock_signals()
        if joins:
            join_torchrun(torch.device(args.checked.cfg.MODEL.DEVICE).type == "cuda", minutes)
        set_timeout(minutes)
        peers = Peers()
        try:
            with explained_failures(peers, minutes):
                main(args)
        finally:
            # After an interrupt it could wait for the other ranks.
            if joins and not isinstance(sys.exc_info()[1], KeyboardInterrupt):
                dist.destroy_process_group()


def _timeout(args: argparse.Namespace) -> float:
    # Configs made by another project's copy of `add_maskformer2_config` lack the key.
    return args.checked.cfg.get("DISTRIBUTED_TIMEOUT", _DEFAULT_TIMEOUT)


def join_torchrun(on_gpu: bool, minutes: float = _DEFAULT_TIMEOUT) -> None:
    """Join the process group that torchrun describes in the environment.

    Args:
        on_gpu: whether the ranks communicate through NCCL.
        minutes: that a rank waits for the others.
    """
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if on_gpu:
        num_gpus = torch.cuda.device_count()
        if local_size > num_gpus:
            raise ValueError(
                f"torchrun started {local_size} processes on this machine, which has {num_gpus} "
                "GPUs: --nproc-per-node must be at most that."
            )
        torch.cuda.set_device(local_rank)
    timeout = datetime.timedelta(minutes=minutes)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timeout)
    comm.create_local_process_group(local_size)
    comm.synchronize()
