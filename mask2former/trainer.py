"""The trainer: Detectron2's `DefaultTrainer` with Mask2Former's parts and repeatable resuming.

    build_train_loader → build_model → build_optimizer, build_lr_scheduler → hooks → test

A run that is killed and resumed continues with the samples and random numbers of one that never
stopped, because no random state is carried from one iteration to the next: the order and
augmentation of samples depend on the run's seed and their position (`data/loader.py`), and the
model's random numbers on the seed, the iteration and the rank. On a CPU the losses are then the
same; on a GPU only with DETERMINISTIC, since gradients are otherwise added in any order.
"""

import logging
import os
import sys
import weakref
from collections import OrderedDict
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, TrainerBase, hooks
from detectron2.engine.defaults import create_ddp_model
from detectron2.engine.train_loop import HookBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.projects.deeplab import build_lr_scheduler
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from detectron2.utils.logger import setup_logger
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from .best_checkpoint import BestModel, EarlyStop, StopsEarly
from .data.dataset_mappers import build_mapper
from .data.formats.windows import more_pixels
from .data.loader import (
    ResumableBatchSampler,
    build_test_loader,
    build_train_loader,
    evaluates_tiles,
    has_fixed_size,
)
from .earlier_files import EarlierFiles, check_earlier_files, find_earlier_files
from .ema import WeightAverage
from .evaluation import build_evaluator, write_results
from .evaluation.expected_results import check_expected_results
from .experiment_trackers import build_trackers
from .fast.setup import apply_config
from .hooks import (
    READING_PERIODS,
    AmpleMemory,
    IterationSeed,
    MetricWindow,
    StartReport,
    UnwrittenMetrics,
    finish_iteration,
)
from .inference.tiled_model import TiledModel
from .maskformer_model import MaskFormer
from .model_folder_checkpoint import ModelFolderCheckpointer
from .modeling.accumulation import check_accumulation, warn_of_batch_statistics
from .non_finite import NonFiniteWatch, max_skipped
from .optimizer import build_optimizer, scale_learning_rate
from .pictures import HardExamples
from .preflight import check_precision, check_run
from .test_time_augmentation import SemanticSegmentorWithTTA
from .train_step import DelayedMetrics, MixedPrecisionStep, Step
from .trainer_state import Configured, check_trainer_state, solver_settings
from .training_evaluation import with_evaluation_hooks
from .training_log import configure_step, with_logging_hooks
from .utils.chosen_keys import is_unset
from .utils.determinism import use_deterministic_algorithms
from .utils.files import WriteError, make_folder
from .utils.interrupts import Progress, reports_progress
from .utils.output_lock import lock_output
from .writers import build_writers

_logger = logging.getLogger(__name__)


# Methods of a trainer that may read the losses if a subclass overrides them.
_STEPS = ("run_step", "before_step", "after_step", "after_backward")


class Trainer(DefaultTrainer, StopsEarly):
    """Trains and evaluates what a config describes.

    Attributes:
        seed: of the run: the config's SEED, or drawn once, logged and saved in checkpoints.
        evaluated_iter: `iter` at the last evaluation in this process, if SOLVER.EMA or
            TEST.BEST_METRIC is on; -1: none yet.
        earlier_files: what this run has found in OUTPUT_DIR and must not take for its own.
    """

    evaluated_iter = -1
    earlier_files: EarlierFiles = {}

    def __init__(self, cfg: CfgNode, *, delay_metrics: bool | None = None) -> None:
        """
        Args:
            cfg: the config, see `mask2former.config.load_config`. Checks that it has not passed yet
                run here.
            delay_metrics: write losses one iteration late if nothing reads them earlier, see
                `train_step.py`; default: if MODEL.DEVICE is a GPU.

        Raises:
            ValueError: the config does not fit the data sets, the device or the number of
                processes.
        """
        # DefaultTrainer's constructor passes device ids to a distributed model on the CPU, requires
        # a GPU for mixed precision, and loads checkpoints that may run code.
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
            setup_logger(name="mask2former")
        check_run(cfg, "train", own_evaluators=has_own_evaluators(type(self)))
        if cfg.get("DETERMINISTIC", False):
            use_deterministic_algorithms()
        check_precision(cfg)
        cfg = scale_learning_rate(self.auto_scale_workers(cfg, comm.get_world_size())).clone()
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        self._has_own_seed = cfg.SEED >= 0
        cfg.defrost()
        cfg.SEED = self.seed
        cfg.freeze()
        self._log_schedule(cfg)

        model = self.build_model(cfg)
        criterion = getattr(model, "criterion", None)
        check_accumulation(num_accumulation_steps(cfg), type(model), criterion and type(criterion))
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        on_gpu = torch.device(cfg.MODEL.DEVICE).type == "cuda"
        self._delays_metrics = on_gpu if delay_metrics is None else delay_metrics
        if comm.get_world_size() > 1:
            model = create_ddp_model(
                model,
                broadcast_buffers=False,
                device_ids=[comm.get_local_rank()] if on_gpu and needs_uploads(model) else None,
                gradient_as_bucket_view=True,
            )
        self._trainer = self._build_step(cfg, model, data_loader, optimizer)
        configure_step(cfg, self._trainer, getattr(model, "module", model))
        self._trainer.cudnn_benchmark = on_gpu and chooses_cudnn_benchmark(cfg, data_loader)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = ModelFolderCheckpointer(
            model, cfg.OUTPUT_DIR, cfg, "_final", partial_init=True, trainer=weakref.proxy(self)
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def _log_schedule(self, cfg: CfgNode) -> None:
        total, num_workers = cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size()
        num_steps = num_accumulation_steps(cfg)
        steps = f"{num_steps} micro-batches x " if num_steps > 1 else ""
        _logger.info(
            f"Effective batch size {total} = {num_workers} process(es) x {steps}"
            f"{total // num_workers // num_steps} images, base learning rate "
            f"{cfg.SOLVER.BASE_LR:g}, {cfg.SOLVER.MAX_ITER} iterations, seed {self.seed}"
        )

    @staticmethod
    def _build_step(
        cfg: CfgNode, model: nn.Module, data_loader: DataLoader, optimizer: Optimizer
    ) -> DelayedMetrics:
        on_gpu = torch.device(cfg.MODEL.DEVICE).type == "cuda"
        if cfg.SOLVER.AMP.ENABLED and on_gpu:
            # Configs made by another project's copy of `add_maskformer2_config` lack the key.
            dtype = getattr(torch, cfg.SOLVER.AMP.get("DTYPE", "float16"))
            step: DelayedMetrics = MixedPrecisionStep(model, data_loader, optimizer, dtype=dtype)
        else:
            step = Step(model, data_loader, optimizer)
        step.num_accumulation_steps = num_accumulation_steps(cfg)
        if step.num_accumulation_steps > 1:
            num_parts = comm.get_world_size() * step.num_accumulation_steps
            warn_of_batch_statistics(model, cfg.SOLVER.IMS_PER_BATCH // num_parts)
        if cfg.SOLVER.AMP.ENABLED and not on_gpu:
            _logger.warning(
                f"SOLVER.AMP.ENABLED is ignored on MODEL.DEVICE {cfg.MODEL.DEVICE}: mixed "
                "precision training needs a CUDA GPU. Training in float32."
            )
        return step

    def build_hooks(self) -> list[HookBase | None]:
        on_gpu = torch.device(self.cfg.MODEL.DEVICE).type == "cuda"
        chooses = on_gpu and self.cfg.MODEL.get("CHECKPOINTING") == "auto"
        return [
            *with_logging_hooks(self.cfg, with_evaluation_hooks(self, super().build_hooks())),
            IterationSeed(),
            MetricWindow(),
            UnwrittenMetrics(),
            AmpleMemory() if chooses else None,
            NonFiniteWatch(max_skipped(self.cfg)),
            StartReport(),
        ]

    def build_writers(self) -> list[EventWriter]:
        trainer = weakref.proxy(self)
        # Before the writer of TensorBoard, which takes the pictures.
        trackers = build_trackers(self.cfg, lambda: trainer.start_iter > 0)
        return [*trackers, *build_writers(self.cfg.OUTPUT_DIR, self.max_iter)]

    def resume_or_load(self, resume: bool = True) -> None:
        """Load the last checkpoint if `resume` and there is one, else MODEL.WEIGHTS.

        A last checkpoint that holds weights only starts a training from iteration 0.
        """
        # The start is the iteration after this one, which the state of training sets.
        self.iter = -1
        super().resume_or_load(resume)
        self._end_if_stopped()
        if resume and not self.checkpointer.has_checkpoint():
            self._warn_of_unnamed_checkpoints()
        elif self.iter == -1 and resume:
            _logger.warning(
                f"{self.checkpointer.get_checkpoint_file()} holds no state of training, only "
                "weights: training starts at iteration 0, with a new optimiser and schedule."
            )
        self.iter = max(self.iter, 0)

    def _end_if_stopped(self) -> None:
        """Leave nothing to train if early stopping has ended the run to resume."""
        for hook in self._hooks:
            if isinstance(hook, EarlyStop) and hook.is_over() and self.start_iter < self.max_iter:
                _logger.info(
                    f"Early stopping has ended this training after iteration {self.start_iter - 1}:"
                    f" it is finished. With a larger TEST.EARLY_STOPPING_PATIENCE, or 0, it "
                    "continues."
                )
                self.max_iter = self.start_iter

    def _warn_of_unnamed_checkpoints(self) -> None:
        unnamed = sorted(Path(self.cfg.OUTPUT_DIR).glob("model_*.pth"))
        if unnamed:
            _logger.warning(
                f"{self.cfg.OUTPUT_DIR} has checkpoints ({unnamed[-1].name}), but no "
                "last_checkpoint, which would name the one to resume from: training starts at "
                "iteration 0 and will replace them."
            )

    def _warn_of_an_earlier_best_model(self) -> None:
        folder = Path(self.cfg.OUTPUT_DIR) / "model_best"
        if self.cfg.OUTPUT_DIR and folder.is_dir():
            _logger.warning(
                f"{folder} is the best model of an earlier run. Until this run writes its own, "
                "which needs TEST.BEST_METRIC, Predictor.from_pretrained and --model take that one "
                f"when they are given {self.cfg.OUTPUT_DIR}: remove it, or name model_final."
            )

    def before_train(self) -> None:
        if self.start_iter == 0:
            self.earlier_files = find_earlier_files(self.cfg.OUTPUT_DIR)
            self._warn_of_an_earlier_best_model()
        super().before_train()
        if 0 < self.max_iter <= self.start_iter:
            self._save_final()
        if 0 < self.start_iter <= self.max_iter:
            finish_iteration(self)
        # A subclass may make its own step.
        delays = getattr(self, "_delays_metrics", False) and not max_skipped(self.cfg)
        if delays and isinstance(self._trainer, DelayedMetrics):
            readers, periods = self._readers_of_losses()
            if readers:
                _logger.info(f"Losses are written at once, because they may be read by {readers}")
            else:
                max_iter = self.max_iter
                # The last but one too: an error in the last iteration does not keep the hooks of
                # evaluation from running after training.
                self._trainer.delay_metrics(
                    lambda iteration: (
                        iteration + 2 >= max_iter
                        or any((iteration + 1) % period == 0 for period in periods)
                    )
                )

    def _readers_of_losses(self) -> tuple[list[str], set[int]]:
        """What may read the losses in every iteration, and periods in which losses are read.

        The same on all ranks, though only the first has a writer and a checkpointer.
        """
        readers = {
            type(hook).__qualname__ for hook in self._hooks if type(hook) not in READING_PERIODS
        }
        for name in _STEPS:
            overridden = getattr(type(self), name) is not getattr(Trainer, name)
            if overridden or name in self.__dict__:
                readers.add(f"{type(self).__qualname__}.{name}")
        attributes = ((hook, READING_PERIODS.get(type(hook))) for hook in self._hooks)
        periods = {getattr(hook, name) for hook, name in attributes if name is not None}
        ranks = comm.all_gather((readers, periods))
        all_readers = set().union(*(readers for readers, _ in ranks))
        all_periods = set().union(*(periods for _, periods in ranks))
        return sorted(all_readers), {period for period in all_periods if period > 0}

    def _flush(self) -> None:
        """Write delayed losses where the other ranks need not take part."""
        # They may be anywhere after an error, and only the first rank saves checkpoints.
        if comm.get_world_size() == 1 and isinstance(self._trainer, DelayedMetrics):
            self._trainer.flush()

    def _save_final(self) -> None:
        """Write the final checkpoint of a run that was killed between its last one and this.

        The final evaluation, which may have been cut off as well, follows in any case.
        """
        done = self.start_iter - 1
        _logger.info(f"Nothing is left to train: the checkpoint is of iteration {done}")
        if self.start_iter > self.max_iter:
            _logger.warning(
                f"The checkpoint has been trained for {self.start_iter} iterations, more than "
                f"SOLVER.MAX_ITER, {self.max_iter}"
            )
        for hook in self._hooks:
            if isinstance(hook, hooks.PeriodicCheckpointer):
                name = f"{hook.file_prefix}_final"
                last = os.path.basename(hook.checkpointer.get_checkpoint_file())
                if last != f"{name}.pth":
                    # As if saved after that iteration.
                    self.iter = self.storage.iter = done
                    hook.checkpointer.save(name, iteration=done)
                    self.iter = self.storage.iter = self.start_iter

    def after_train(self) -> None:
        if self.start_iter >= self.max_iter:
            # The base class has counted one on, though there was no iteration.
            self.iter = min(self.iter, self.start_iter)
        try:
            self._flush()
        finally:
            if isinstance(sys.exc_info()[1], KeyboardInterrupt):
                # The hooks of evaluation would run after an interrupt in the last iteration.
                evaluating = (hooks.EvalHook, hooks.BestCheckpointer)
                self._hooks[:] = [hook for hook in self._hooks if not isinstance(hook, evaluating)]
            super().after_train()
        # Before Detectron2 compares them, if training has come to its end.
        if self.iter >= self.max_iter and comm.is_main_process():
            results = getattr(self, "_last_eval_results", None)
            if results is not None:
                check_expected_results(self.cfg, results)

    def train(self) -> OrderedDict | None:
        """Train from the iteration that `resume_or_load` set. Returns what DefaultTrainer does.

        Raises:
            RuntimeError: another training writes to OUTPUT_DIR.
            ValueError: the last evaluation lacks what TEST.EXPECTED_RESULTS names.
            WriteError: a file cannot be written, such as on a full disk.
        """
        batch_sampler = getattr(self.data_loader, "batch_sampler", None)
        if isinstance(batch_sampler, ResumableBatchSampler):
            batch_sampler.seek(self.seed, self.start_iter)
        elif self.start_iter > 0:
            _logger.warning(
                "The training loader is not from mask2former.data.loader: after resuming, samples "
                "come in another order than in an uninterrupted run."
            )
        written = self._checkpoint_written()

        def progress() -> Progress:
            # An earlier run may have left checkpoints in the folder.
            is_ours = self.start_iter > 0 or self._checkpoint_written() != written
            done = self.iter >= self.max_iter
            return Progress(
                "the evaluation after training"
                if done
                else f"iteration {self.iter} of {self.max_iter}",
                self.checkpointer.get_checkpoint_file() or None if is_ours else None,
            )

        with lock_output(self.cfg.OUTPUT_DIR), reports_progress(progress):
            try:
                return super().train()
            except WriteError as error:
                raise WriteError(
                    f"{error} Then --resume continues from the last checkpoint in OUTPUT_DIR."
                ) from error

    def _checkpoint_written(self) -> int | None:
        """When the last checkpoint was written, in nanoseconds."""
        try:
            return os.stat(os.path.join(self.cfg.OUTPUT_DIR, "last_checkpoint")).st_mtime_ns
        except OSError:
            return None

    def state_dict(self) -> dict[str, Any]:
        self._flush()
        own = {"seed": self.seed, "solver": solver_settings(self.cfg)}
        return super().state_dict() | own | {"earlier_files": self.earlier_files}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_trainer_state(self, state_dict)
        state_dict = self._without_unused(state_dict)
        configured = Configured(self.cfg, self._trainer.optimizer, self.scheduler)
        super().load_state_dict(state_dict)
        # Checkpoints of other trainers have no settings.
        configured.use(state_dict.get("solver"))
        self.earlier_files = check_earlier_files(state_dict.get("earlier_files", {}))
        if hasattr(self.scheduler, "max_iters"):
            # WarmupPolyLR restores its end as well, and fails beyond it.
            self.scheduler.max_iters = self.max_iter
        # Checkpoints of other trainers do not have it.
        seed = state_dict.get("seed", self.seed)
        if seed != self.seed and self._has_own_seed:
            _logger.warning(
                f"The run to resume had seed {seed}, but SEED is {self.seed}: it continues with "
                "other random numbers."
            )
        elif seed != self.seed:
            _logger.info(f"Continuing with the seed of the run to resume, {seed}")
            self.seed = seed

    def _without_unused(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """State of training without that of hooks that the config has turned off since."""
        states = dict(state_dict.get("hooks", {}))
        keys: dict[type[HookBase], str] = {
            WeightAverage: "SOLVER.EMA.ENABLED",
            BestModel: "TEST.BEST_METRIC",
            HardExamples: "LOGGING.HARD_EXAMPLES",
        }
        for hook, key in keys.items():
            name = hook.__qualname__
            if name in states and not any(type(own) is hook for own in self._hooks):
                del states[name]
                _logger.info(f"The checkpoint has state for {key}, which is off: it is not used.")
        return state_dict | {"hooks": states}

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = super().build_model(cfg)
        # `MaskFormer` has done this; a meta-architecture of another project may not.
        apply_config(cfg, model)
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: Optimizer) -> LRScheduler:
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> DataLoader:
        return build_train_loader(cfg, build_mapper(cfg, is_train=True))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader:
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        return build_evaluator(cfg, dataset_name, output_folder)

    @classmethod
    def test(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        evaluators: DatasetEvaluator | list[DatasetEvaluator] | None = None,
    ) -> dict:
        """Evaluate on DATASETS.TEST; the results also go to OUTPUT_DIR/evaluation.{json,md}.

        Args:
            cfg: the config.
            model: with the weights to evaluate.
            evaluators: one per data set; default: those of `build_evaluator`.

        Returns:
            {data set: {task: {metric: value}}}, without the outer level for a single data set.
        """
        in_tiles = evaluates_tiles(cfg)
        if in_tiles:
            model = TiledModel(model, cfg)
        # Evaluators read ground truth as large as the images.
        with torch.inference_mode(), more_pixels() if in_tiles else nullcontext():
            results = super().test(cfg, model, evaluators)
        if comm.is_main_process() and cfg.OUTPUT_DIR and cfg.DATASETS.TEST:
            names = cfg.DATASETS.TEST
            write_results(cfg.OUTPUT_DIR, {names[0]: results} if len(names) == 1 else results)
        return results

    @classmethod
    def test_with_TTA(cls, cfg: CfgNode, model: nn.Module) -> OrderedDict:
        """Evaluate semantic segmentation on DATASETS.TEST with the augmentations of TEST.AUG.

        All files go to OUTPUT_DIR/inference_TTA, `evaluation.json` too.

        Args:
            cfg: the config.
            model: with the weights to evaluate.

        Returns:
            What `test` returns, with "_TTA" appended to the keys of its outer level.

        Raises:
            ValueError: semantic inference is off, or a data set has no semantic ground truth.
        """
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON = False
        cfg.MODEL.MASK_FORMER.TEST.INSTANCE_ON = False
        cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        cfg.freeze()
        make_folder(cfg.OUTPUT_DIR)
        _logger.info("Evaluating with test-time augmentation")
        model = SemanticSegmentorWithTTA(cfg, model)
        try:
            evaluators = [
                cls.build_evaluator(cfg, name, output_folder=cfg.OUTPUT_DIR)
                for name in cfg.DATASETS.TEST
            ]
        except ValueError as error:
            raise ValueError(
                f"Test-time augmentation is for semantic segmentation. {error}"
            ) from error
        results = cls.test(cfg, model, evaluators)
        return OrderedDict((f"{name}_TTA", value) for name, value in results.items())


def num_accumulation_steps(cfg: CfgNode) -> int:
    """Micro-batches of each process in a training step."""
    # Configs made by another project's copy of `add_maskformer2_config` lack the key.
    return cfg.SOLVER.get("NUM_ACCUMULATION_STEPS", 1)


def needs_uploads(model: nn.Module) -> bool:
    """Whether a model may rely on DDP to move its inputs to the GPU.

    DDP then copies all tensors of a sample, and waits for them. `MaskFormer.forward` uploads what
    it needs, without waiting; that of another project may not.
    """
    is_ours = type(model).forward is MaskFormer.forward and "forward" not in model.__dict__
    return not is_ours or bool(model._forward_pre_hooks)


def chooses_cudnn_benchmark(cfg: CfgNode, data_loader: Any) -> bool:
    """Whether cuDNN should time its algorithms in training though nobody has set CUDNN_BENCHMARK.

    It does so for each new size of images, which pays if there is one only; and what it chooses may
    differ between runs.
    """
    return (
        is_unset(cfg, "CUDNN_BENCHMARK")
        and not torch.are_deterministic_algorithms_enabled()
        and has_fixed_size(cfg, data_loader)
    )


_OWN_METHODS = {name: getattr(Trainer, name).__func__ for name in ("build_evaluator", "test")}


def has_own_evaluators(trainer_type: type[Trainer]) -> bool:
    """Whether a trainer builds evaluators in another way than `evaluation.build_evaluator`."""
    return any(
        getattr(getattr(trainer_type, name), "__func__", None) is not method
        for name, method in _OWN_METHODS.items()
    )
