"""The training program: arguments → processes → training or evaluation.

Processes are one, several spawned by Detectron2's launcher, or those torchrun made. A script of
your own registers its data sets and calls `run`.
"""

import argparse
import os
from collections.abc import Callable, Mapping
from typing import Any

import detectron2.engine
import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from .checkpoint import Mask2FormerCheckpointer
from .config import load_config
from .data.class_counts import check_class_counts
from .trainer import Trainer, check_device

_TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")


def setup(args: argparse.Namespace) -> CfgNode:
    """Read and check the config that the arguments name, and set up logging and seeds.

    Args:
        args: of Detectron2's `default_argument_parser`.

    Returns:
        The config, frozen. It is also written to OUTPUT_DIR/config.yaml.
    """
    cfg = load_config(args.config_file, args.opts)
    check_device(cfg)
    check_class_counts(cfg)
    cfg.freeze()
    default_setup(cfg, args)
    setup_logger(output=cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="mask2former")
    return cfg


def main(args: argparse.Namespace) -> dict | None:
    """Train, or with `--eval-only` evaluate, in this process.

    Args:
        args: of Detectron2's `default_argument_parser`; `compile`, if there, is a mode of
            `torch.compile` for evaluation.

    Returns:
        The evaluation results, on the main process: {task: {metric: value}}, by data set if there
        are several.
    """
    # Arguments of another parser have no such thing.
    compile_mode = getattr(args, "compile", None)
    if compile_mode and not args.eval_only:
        raise ValueError("--compile is for inference: give it together with --eval-only")
    cfg = setup(args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        if compile_mode:
            model.compile_inference(mode=compile_mode)
        checkpointer = Mask2FormerCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = Trainer.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results.update(Trainer.test_with_TTA(cfg, model))
        if comm.is_main_process():
            verify_results(cfg, results)
        return results

    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def run(main: Callable[[argparse.Namespace], Any] = main) -> None:
    """Read the command line and run `main` in every process of the job."""
    parser = default_argument_parser()
    parser.add_argument(
        "--compile",
        choices=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
        help="with --eval-only: compile the model by torch.compile in this mode; for every size of "
        "padded images anew, so MODEL.MASK_FORMER.SIZE_DIVISIBILITY may help",
    )
    args = parser.parse_args()
    print("Command Line Args:", args)
    launch(main, args)


def started_by_torchrun(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun started this process."""
    return all(name in environment for name in _TORCHRUN_VARIABLES)


def launch(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    """Run `main(args)` in every process of the job.

    Under torchrun the processes exist, on one machine or several; otherwise Detectron2's launcher
    starts `--num-gpus` on this one. They talk through NCCL on GPUs, through gloo on CPUs.

    Args:
        main: what each process runs.
        args: of Detectron2's `default_argument_parser`.

    Raises:
        ValueError: a bad config, both ways to start processes at once, or more than there are GPUs.
    """
    # Also read in each process; here, so that a mistake is reported once.
    cfg = load_config(args.config_file, args.opts)
    check_device(cfg)
    check_class_counts(cfg)
    on_gpu = torch.device(cfg.MODEL.DEVICE).type == "cuda"
    spawns = args.num_gpus * args.num_machines > 1
    if started_by_torchrun():
        if spawns:
            raise ValueError(
                f"torchrun started this process, so --num-gpus {args.num_gpus} --num-machines "
                f"{args.num_machines} would start processes twice: leave them out, and tell "
                "torchrun --nproc-per-node and --nnodes."
            )
        join_torchrun(on_gpu)
        try:
            main(args)
        finally:
            dist.destroy_process_group()
        return
    if spawns and not on_gpu and torch.cuda.is_available():
        # Detectron2's launcher takes NCCL wherever there is a GPU, which cannot send CPU tensors.
        raise ValueError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r} with --num-gpus {args.num_gpus} on a machine "
            "with GPUs: start the processes with torchrun instead."
        )
    detectron2.engine.launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


def join_torchrun(on_gpu: bool) -> None:
    """Make this process a member of the group that torchrun described in the environment."""
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if on_gpu:
        num_gpus = torch.cuda.device_count()
        if local_size > num_gpus:
            raise ValueError(
                f"torchrun started {local_size} processes on this machine, which has {num_gpus} "
                "GPUs: --nproc-per-node must be at most that."
            )
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    comm.create_local_process_group(local_size)
    comm.synchronize()
