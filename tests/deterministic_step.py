"""A training step in deterministic mode as a GPU would run it; a program.

    python deterministic_step.py CONFIG.yaml ...

The device of `counted_device.py` computes on the CPU but takes the branches of a GPU. Prints JSON:
for each config the names of the operators that ran, and of those that torch refuses on CUDA in
deterministic mode; the refused ones of known code.
"""

import json
import sys

import torch
import torch.nn.functional as F
from counted_device import NAME, CountedTensor, Counter, _Backend, make_inputs
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.projects.deeplab import add_deeplab_config
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from mask2former import add_maskformer2_config
from mask2former.ops import _kernels
from mask2former.optimizer import build_optimizer
from mask2former.utils.determinism import use_deterministic_algorithms

# From the documentation of torch.use_deterministic_algorithms.
REFUSED = {
    "_adaptive_avg_pool2d_backward",
    "_adaptive_avg_pool3d_backward",
    "adaptive_max_pool2d_backward",
    "avg_pool3d_backward",
    "fractional_max_pool2d_backward",
    "grid_sampler_2d_backward",
    "grid_sampler_3d_backward",
    "histc",
    "max_pool3d_with_indices_backward",
    "max_unpool2d",
    "put_",
    "reflection_pad2d_backward",
    "replication_pad2d_backward",
    "upsample_bicubic2d_backward",
    "upsample_bilinear2d_backward",
    "upsample_linear1d_backward",
    "upsample_trilinear3d_backward",
}


def is_refused(name: str, args: tuple) -> bool:
    """Whether torch 2.11 or a newer one refuses the operator on a GPU in deterministic mode."""
    if name == "nll_loss2d_forward":
        return args[3] != 0  # reduction
    if name in ("cumsum", "cumprod"):
        return args[0].is_floating_point()
    return name in REFUSED


class Operators(TorchDispatchMode):
    """Lists the operators on the device.

    Attributes:
        names: of all.
        refused: of those that torch would refuse. An error would end the process, because the
            backward of this device runs in a thread of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.refused: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(isinstance(x, CountedTensor) for x in tree_iter((args, kwargs))):
            name = function.overloadpacket.__name__
            self.names.add(name)
            if is_refused(name, args):
                self.refused.add(name)
        return function(*args, **kwargs)


def known_code() -> list[str]:
    """What is refused of code with two such operators."""
    with Counter(), Operators() as operators:
        maps = torch.ones(1, 1, 2, 2, device=NAME).requires_grad_()
        grid = torch.ones(1, 2, 1, 2, device=NAME)
        samples = F.grid_sample(maps, grid, align_corners=False)  # (1, 1, 2, 1)
        F.cross_entropy(samples, grid[..., 0].long() - 1).backward()
    return sorted(operators.refused)


def step(cfg: CfgNode) -> dict[str, list[str]]:
    """The operators of forward, backward and optimiser."""
    model = build_model(cfg)
    with Counter(), Operators() as operators:
        model.to(NAME)
        optimizer = build_optimizer(cfg, model)
        sum(model(make_inputs(model.sem_seg_head.num_classes)).values()).backward()
        optimizer.step()
    return {"names": sorted(operators.names), "refused": sorted(operators.refused)}


def main() -> None:
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Backend())
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    # As on a GPU, its kernels run and not its formulation with grid_sample.
    _kernels.COMPILED_DEVICES |= {NAME}
    use_deterministic_algorithms()
    steps = []
    for path in sys.argv[1:]:
        cfg = get_cfg()
        add_deeplab_config(cfg)
        add_maskformer2_config(cfg)
        cfg.merge_from_file(path)
        steps.append(step(cfg))
    print(json.dumps({"known": known_code(), "steps": steps}))


if __name__ == "__main__":
    main()
