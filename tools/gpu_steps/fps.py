"""Images per second of the rows of the paper's Table 1, as `analyze_model.py --tasks fps` has them.

    python tools/gpu_steps/fps.py FOLDER [--device cpu] [--config FILE] [--size 64]

Random weights and images of COCO's sizes, batch 1, fp32, post-processing included. The paper
measured on a V100: only the order and the ratios can be compared.
"""

import sys
from pathlib import Path

from step_result import make_parser, write_result

sys.path.append(str(Path(__file__).resolve().parents[1]))
from ablation_page import read_tables
from analyze_model import COCO_SIZES, frames_per_second
from detectron2.modeling import build_model
from run_ablations import CONFIGS

from mask2former.config import load_config
from mask2former.utils.seeding import seed_all


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--config", type=Path, metavar="FILE", help="only this one")
    parser.add_argument("--size", type=int, help="of square images, not resized [COCO's sizes]")
    options = parser.parse_args()
    rows = read_tables(CONFIGS / "ablations/paper.yaml")["1"].rows
    configs = {row.name: (CONFIGS / row.config, row.paper["fps"]) for row in rows}
    if options.config is not None:
        configs = {options.config.stem: (options.config, None)}
    sizes = COCO_SIZES if options.size is None else {(options.size, options.size): 1}
    numbers: dict[str, str] = {}
    for name, (config, paper) in configs.items():
        cfg = load_config(str(config), ["MODEL.DEVICE", options.device, "MODEL.WEIGHTS", ""])
        seed_all(1)
        model = build_model(cfg).eval()
        speed = frames_per_second(cfg, model, sizes, resize=options.size is None)
        numbers[name] = f"{speed:.1f} images/s" + (f" (paper: {paper:g})" if paper else "")
        # After every row, since the step may run out of time.
        write_result(options.folder, numbers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
