"""A device that counts host syncs; also a program.

Tensors on it compute on the CPU, but as with a GPU, the host must copy values before it can read
them. A process can register one such device and never removes it; hence the program.

    python counted_device.py CONFIG.yaml

It prints JSON: the number of operator calls, and the syncs and uploads, each with its operator and
calling functions, in a training forward of the config's model, in a whole training step, in one
accumulated image by image, and in inference; and the counts for known code.
"""

import itertools
import json
import sys
import traceback
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.projects.deeplab import add_deeplab_config
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_iter, tree_map_only

from mask2former import add_maskformer2_config
from mask2former.optimizer import build_optimizer
from mask2former.train_step import Step

NAME = "counted"
# Operators whose results are values or sizes that the host needs.
READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class CountedTensor(Tensor):
    """A tensor that claims to be on the device; its values are in a CPU tensor."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> "CountedTensor":
        return Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} outside of a Counter")

    def tolist(self) -> list:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()


class Counter(TorchDispatchMode):
    """Runs the device's operators on the CPU, and records where a GPU would sync the host.

    Copies that are `non_blocking` count neither as syncs nor as uploads.

    Attributes:
        operators: number of operators called, views included.
        syncs: reads of values by the host.
        uploads: blocking copies to the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0
        self.syncs: list[str] = []
        self.uploads: list[str] = []

    def __enter__(self) -> "Counter":
        # torch.tensor fills the device's memory without calling the mode.
        self._tensor = torch.tensor
        torch.tensor = self._make_tensor
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.tensor = self._tensor
        super().__exit__(*error)

    def _make_tensor(self, data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
        on_host = self._tensor(data, **kwargs)
        return on_host if device is None else on_host.to(device)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        on_device = any(isinstance(x, CountedTensor) for x in tensors)
        # Scalars are kernel arguments, not copies.
        from_host = any(not isinstance(x, CountedTensor) and x.dim() > 0 for x in tensors)
        target = kwargs.get("device")
        to_device = target is not None and torch.device(target).type == NAME
        if not (on_device or to_device):
            return function(*args, **kwargs)
        self.operators += 1
        to_host = target is not None and not to_device
        blocking = not kwargs.get("non_blocking")
        name = function.overloadpacket.__name__
        mask = name in INDEXING and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        if (to_host and blocking) or name in READS or mask:
            self.syncs.append(self._place(name))
        elif from_host and blocking:
            self.uploads.append(self._place(name))

        if to_device:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        inner_args, inner_kwargs = tree_map_only(CountedTensor, lambda x: x.inner, (args, kwargs))
        out = function(*inner_args, **inner_kwargs)
        if to_host:
            return out
        out = tree_map_only(Tensor, CountedTensor, out)
        is_view = any(x.alias_info is not None for x in function._schema.arguments)
        if name == "detach" or not (is_view or function._schema.is_mutable):
            return out
        return return_and_correct_aliasing(function, args, kwargs, out)

    @staticmethod
    def _place(name: str) -> str:
        ours = [x for x in traceback.extract_stack() if "mask2former/" in x.filename]
        return f"{name}: " + " < ".join(f"{x.name}:{x.lineno}" for x in reversed(ours[-3:]))


class _Event:
    """Stands for `torch.cuda.Event`; everything queued has already happened."""

    def record(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass


class _Backend(backend_registration._DummyBackendModule):
    Event = _Event

    def current_stream(self, device: Any = None) -> None:
        return None

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def known_code() -> dict[str, int]:
    """Counts for code with four known syncs and one known upload."""
    with Counter() as counter:
        x = torch.ones(3, device=NAME)
        x.sum().item()
        x.cpu()
        x[x > 0]
        bool((x > 0).any())
        (x + 1).view(-1)[1:].mul_(2)
        x[torch.tensor([0, 2])]
        torch.ones(3).to(NAME, non_blocking=True)
        x.to("cpu", non_blocking=True)
    return {"syncs": len(counter.syncs), "uploads": len(counter.uploads)}


def make_inputs(num_classes: int) -> list[dict[str, Any]]:
    """Three images of different sizes on the host, one without objects, one with boxes."""
    inputs = []
    for size, count in (((64, 96), 3), ((50, 70), 1), ((64, 64), 0)):
        instances = Instances(size)
        instances.gt_classes = torch.arange(count) % num_classes
        instances.gt_masks = torch.rand(count, *size) > 0.5
        if count == 3:
            instances.gt_boxes = Boxes(torch.rand(count, 4))
        image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
        inputs.append({"image": image, "instances": instances})
    return inputs


def count(cfg: CfgNode) -> dict[str, dict[str, Any]]:
    """Counts of the second training forward, the third training step and the second inference.

    The first ones fill caches, and a step writes the losses of the one before it.
    """
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    model = build_model(cfg)
    model.metadata.thing_dataset_id_to_contiguous_id = {1: 0}
    inputs = make_inputs(model.sem_seg_head.num_classes)
    with Counter():
        model.to(NAME)
        model(inputs)
    with Counter() as training:
        losses = model(inputs)
    assert all(x.device.type == NAME and torch.isfinite(x.inner) for x in losses.values())
    counters = {
        "training": training,
        "step": count_step(cfg, model, inputs),
        "accumulated": count_step(cfg, model, inputs, num_accumulation_steps=len(inputs)),
    }
    model.eval()
    with torch.no_grad():
        with Counter():
            model(inputs)
        with Counter() as counters["inference"]:
            outputs = model(inputs)
    for output in outputs:
        tensors = output["sem_seg"], output["panoptic_seg"][0], output["instances"].pred_masks
        assert all(x.device.type == NAME for x in tensors)
    return {
        name: {"operators": x.operators, "syncs": x.syncs, "uploads": x.uploads}
        for name, x in counters.items()
    }


def count_step(
    cfg: CfgNode,
    model: torch.nn.Module,
    inputs: list[dict[str, Any]],
    num_accumulation_steps: int = 1,
) -> Counter:
    """Counts of a training step: forward, backward, clipping, optimiser, logging."""
    with Counter():
        optimizer = build_optimizer(cfg, model)
    step = Step(model, itertools.repeat(inputs), optimizer)
    step.num_accumulation_steps = num_accumulation_steps
    step.delay_metrics(lambda iteration: False)
    with EventStorage() as storage:
        for step.iter in range(3):
            storage.iter = step.iter
            with Counter() as counter:
                step.run_step()
        assert storage.latest()["total_loss"][1] == 1
    return counter


def main() -> None:
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Backend())
    # In a process group the number of masks is averaged.
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    cfg = get_cfg()
    add_deeplab_config(cfg)
    add_maskformer2_config(cfg)
    cfg.merge_from_file(sys.argv[1])
    print(json.dumps({"known": known_code(), **count(cfg)}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
