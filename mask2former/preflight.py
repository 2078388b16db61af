"""Load a config and check it against data, device and batch size, before a run.

    config file → values (`config_checks.py`) → device → data sets → evaluators → ground truth
                → batch → classes

Each program calls `load_and_check` or `check_run` once. A config object remembers the checks it
passed, also in spawned processes, so `Trainer` checks only configs that no program has checked.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.utils import comm

from .best_checkpoint import check_best_metric
from .config import ExtendConfig, load_config
from .config_checks import check_config, check_once, check_parts, check_training
from .data.class_counts import check_class_counts
from .data.evaluator_types import builders_of
from .data.loader import check_batch_size, check_dataset_names
from .evaluation.expected_results import check_expected_tasks
from .evaluation.ground_truth import check_ground_truth
from .experiment_trackers import check_trackers

Purpose = Literal["train", "evaluate", "predict", "unknown"]


def load_and_check(
    config_file: str,
    opts: Sequence[Any] = (),
    purpose: Purpose = "train",
    *,
    num_workers: int | None = None,
    extend_config: ExtendConfig | None = None,
    own_evaluators: bool = False,
) -> CfgNode:
    """Load a config and run every check of it.

    Args:
        config_file, opts, extend_config: see `load_config`.
        purpose, num_workers, own_evaluators: see `check_run`.

    Returns:
        The config, not frozen.

    Raises:
        FileNotFoundError, ValueError: as `load_config` and `check_run`.
    """
    cfg = load_config(config_file, opts, extend_config)
    check_run(cfg, purpose, num_workers=num_workers, own_evaluators=own_evaluators)
    return cfg


def check_run(
    cfg: CfgNode,
    purpose: Purpose = "train",
    *,
    num_workers: int | None = None,
    own_evaluators: bool = False,
) -> None:
    """Run every check that the config has not passed yet.

    Args:
        cfg: the config.
        purpose: what the program does. "train" checks everything, evaluation at the end of training
            included; "evaluate" leaves out the training data and the batch size; "predict" needs
            only the first of DATASETS.TEST, for its class names; "unknown" leaves out what depends
            on the purpose, because the program may still register data sets.
        num_workers: processes that share a training batch; default: those of this run.
        own_evaluators: the trainer builds evaluators itself, so that any evaluator type will do.

    Raises:
        ValueError: naming the key or data set, its value, and what to do.
    """
    if num_workers is None:
        num_workers = comm.get_world_size()
    check_once(cfg, "config", check_config)
    check_once(cfg, "device", check_device)
    if purpose != "unknown":  # the program may still register parts
        check_once(cfg, "parts", check_parts)
    if purpose == "train":
        name = f"training {num_workers}"
        check_once(cfg, name, lambda cfg: check_training(cfg, num_workers))
        check_once(cfg, "trackers", check_trackers)
    needed = {
        # Test sets too: otherwise a wrong name would be noticed when training has ended.
        "train": (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST),
        "evaluate": cfg.DATASETS.TEST,
        "predict": cfg.DATASETS.TEST[:1],
        "unknown": (),
    }[purpose]
    if needed:
        check_once(cfg, f"data sets {needed}", lambda _: check_dataset_names(needed))
    if purpose in ("train", "evaluate") and not own_evaluators:
        check_once(cfg, "evaluator types", check_evaluator_types)
        # Training does not evaluate with augmentation.
        check_tasks = partial(check_expected_tasks, with_tta=purpose == "evaluate")
        check_once(cfg, f"expected results {purpose}", check_tasks)
        if purpose == "train":
            check_once(cfg, "best metric", check_best_metric)
        for name in cfg.DATASETS.TEST:
            check_once(cfg, f"ground truth {name}", partial(check_ground_truth, dataset_name=name))
    if purpose == "train":
        # If set, SOLVER.IMS_PER_BATCH is for this number of workers and scaled to the actual one.
        num_workers = cfg.SOLVER.REFERENCE_WORLD_SIZE or num_workers
        check_once(cfg, f"batch {num_workers}", lambda cfg: check_batch_size(cfg, num_workers))
    # Data sets that are registered later are compared later.
    names = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    known = [name for name in names if name in DatasetCatalog]
    check_once(cfg, f"classes {known}", check_class_counts)


def check_device(cfg: CfgNode) -> None:
    """Check that the device exists on this machine.

    Raises:
        ValueError: MODEL.DEVICE asks for a device that the machine does not have.
    """
    device = torch.device(cfg.MODEL.DEVICE)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, but this machine has no usable CUDA GPU; add "
            "`MODEL.DEVICE cpu` to the command to run on the CPU."
        )
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if device.index is not None and device.index >= count:
            raise ValueError(
                f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, but this machine has {count} CUDA GPU(s), "
                "numbered from 0."
            )
        return
    if device.type == "meta":
        raise ValueError("MODEL.DEVICE is 'meta', on which a model can be built but not run.")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, which this machine does not have: {error}"
        ) from error


def check_precision(cfg: CfgNode) -> None:
    """Check that the GPU computes in the precision of training.

    Not part of `check_run`: it takes memory of the GPU, in the process that trains only.

    Raises:
        ValueError: SOLVER.AMP asks for bfloat16, which the GPU only emulates.
    """
    amp = cfg.SOLVER.AMP
    on_gpu = torch.device(cfg.MODEL.DEVICE).type == "cuda"
    if not (amp.ENABLED and on_gpu and amp.get("DTYPE") == "bfloat16"):
        return
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(
            f"SOLVER.AMP.DTYPE is 'bfloat16', which {torch.cuda.get_device_name()} does not "
            "compute in; set it to 'float16'."
        )


def check_evaluator_types(cfg: CfgNode) -> None:
    """Check that something can be evaluated on each of DATASETS.TEST.

    Raises:
        ValueError: a data set has an unknown evaluator type, or its tasks are all turned off.
    """
    for name in cfg.DATASETS.TEST:
        builders_of(cfg, name)
