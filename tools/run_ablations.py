#!/usr/bin/env python
"""Run the tables of the paper: train each row, and print it beside the paper's numbers.

    python tools/run_ablations.py 4a 4c                     # on Shapes, also on a CPU
    python tools/run_ablations.py 4e --seeds 1 2 3 --jobs 2
    python tools/run_ablations.py 4a --base configs/coco/panoptic-segmentation/... --num-gpus 8
    python tools/run_ablations.py architectures-panoptic architectures-semantic
    python tools/run_ablations.py 7b --base configs/ade20k/panoptic-segmentation/... --num-gpus 8
    python tools/run_ablations.py 1 2 3 6 [--fps]           # parameters and multiply-adds
    python tools/run_ablations.py speed                     # lighter decoders, pruned queries
    python tools/run_ablations.py --list

Tables 4a to 4e and 5 apply the differences of each row in configs/ablations to one recipe, --base.
Tables 7a to 7c (COCO, ADE20K, Cityscapes) train the recipes of the three tasks beside it,
architectures-semantic the semantic one. fig3 evaluates the proposals of the base model by decoder
layer; a base with fewer layers is trained with as many as the rows ask for. Table speed trains
recipes of Shapes, whatever the base is, evaluates them also with settings of inference, and times
them. A finished run is reused and an interrupted one resumed, so the same command goes on where it
stopped. The page is OUTPUT/ablations.md, with a plot per table.
"""

import argparse
import hashlib
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml
from ablation_page import METRICS, Result, Row, Run, Table, read_tables, write_page
from ablation_speed import evaluate, measure, test_opts
from analyze_model import COCO_SIZES, count_all, frames_per_second
from detectron2.modeling import build_model
from quickstart import check_same_config, prepare_data

from mask2former.config import load_config
from mask2former.config_file import read_config_file
from mask2former.utils.files import atomic_write
from mask2former.utils.interrupts import run_program

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
SHAPES = CONFIGS / "shapes/panoptic-segmentation/maskformer2_R18_quickstart.yaml"
_BASE_KEY = "_BASE_"
_RECORD = "run.json"
# The recipes of a data set for each task lie in folders beside each other.
_TASK_FOLDER = re.compile(r"(panoptic|instance|semantic)-segmentation")
# In Detectron2's log.
_GPU_MEMORY = re.compile(r"max_mem: (\d+)M")


def own_values(path: Path) -> dict[str, Any]:
    """What a row's config file sets itself, without the recipe it builds on.

    Args:
        path: a file of configs/ablations.

    Returns:
        Nested dict of config values.
    """
    values, own_keys, _ = read_config_file(str(path))

    def own(node: dict[str, Any], prefix: str) -> dict[str, Any]:
        result = {}
        for key, value in node.items():
            dotted = f"{prefix}{key}"
            if dotted in own_keys:
                result[key] = own(value, f"{dotted}.") if isinstance(value, dict) else value
        return result

    return own(values, "")


def write_row_config(row: Row, base: Path, path: Path, num_layers: int = 0) -> None:
    """Write a config: the recipe `base` with the differences of a row.

    Args:
        row: of a table.
        base: a config file.
        path: of the new file.
        num_layers: the least number of decoder layers; a smaller model gets as many.
    """
    values = own_values(CONFIGS / row.config) if row.config else {}
    # DEC_LAYERS counts the prediction of the learned queries too.
    if num_layers and num_layers >= load_config(str(base)).MODEL.MASK_FORMER.DEC_LAYERS:
        values = {"MODEL": {"MASK_FORMER": {"DEC_LAYERS": num_layers + 1}}}
    model = values.get("MODEL", {})
    if model.get("SEM_SEG_HEAD", {}).get("NAME") == "PerPixelBaselinePlusHead":
        # One query per class: the row's file has the number of its own data set.
        num_classes = load_config(str(base)).MODEL.SEM_SEG_HEAD.NUM_CLASSES
        model["MASK_FORMER"]["NUM_OBJECT_QUERIES"] = num_classes
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(str(path)) as file:
        yaml.safe_dump({_BASE_KEY: str(base.resolve())} | values, file, sort_keys=False)


def task_recipe(base: Path, folder: str) -> Path:
    """The recipe of another task beside a recipe.

    Args:
        base: in a folder named after its task, such as panoptic-segmentation.
        folder: the other task's.

    Raises:
        FileNotFoundError: there is none.
    """
    parts = [folder if _TASK_FOLDER.fullmatch(part) else part for part in base.parts]
    path = Path(*parts)
    if folder not in parts or not path.is_file():
        raise FileNotFoundError(
            f"this table needs a recipe per task, but {path} does not exist beside {base}"
        )
    return path


def plan(tables: list[Table], args: argparse.Namespace) -> dict[tuple[str, str, int], Run]:
    """The trainings of the chosen tables: {(table, row, seed): run}.

    Rows with the same config share a run. All configs are loaded, so that a mistake is found before
    the first training.

    Raises:
        ValueError: a config has several test sets, or a folder holds a run of another config.
    """
    runs: dict[tuple[str, str, int], Run] = {}
    shared: dict[str, Run] = {}
    for table in tables:
        if table.kind == "recipe":
            continue
        num_layers = max((row.layer or 0 for row in table.rows), default=0)
        for row in table.rows:
            base = task_recipe(args.base, row.recipe) if row.recipe else args.base
            name = f"{table.key}_{row.slug}"
            config = args.output / "configs" / f"{name}.yaml"
            if table.kind == "speed":
                # The file itself, and one training for all settings of inference.
                write_row_config(row._replace(config=""), CONFIGS / row.config, config)
            else:
                write_row_config(row, base, config, num_layers)
            # Rows of the same config, such as those without differences, share a run.
            digest = hashlib.sha256(config.read_bytes()).hexdigest()[:8]
            for seed in args.seeds:
                key = f"{digest}_seed{seed}"
                earlier = sorted((args.output / "runs").glob(f"*_{key}"))
                folder = earlier[0] if earlier else args.output / "runs" / f"{name}_{key}"
                opts = [*args.device, *args.opts, "SEED", str(seed), "OUTPUT_DIR", str(folder)]
                if key not in shared:
                    cfg = load_config(str(config), opts)
                    if len(cfg.DATASETS.TEST) != 1:
                        raise ValueError(
                            f"DATASETS.TEST is {list(cfg.DATASETS.TEST)}, but a table shows the "
                            "scores of one data set: name it after --opts DATASETS.TEST"
                        )
                    check_same_config(folder, cfg, "delete that folder")
                    shared[key] = Run(f"{name} seed {seed}", config, folder, opts)
                load_config(str(config), test_opts(row, shared[key]))
                runs[table.key, row.name, seed] = shared[key]
                check_num_layers(table, shared[key], num_layers)
    return runs


def check_num_layers(table: Table, run: Run, num_layers: int) -> None:
    """Check that the model of a run has the decoder layers of a table, if that has any.

    Raises:
        ValueError: an override makes it too small.
    """
    if num_layers == 0:
        return
    number = load_config(str(run.config), run.opts).MODEL.MASK_FORMER.DEC_LAYERS - 1
    if number < num_layers:
        raise ValueError(
            f"table {table.key} needs {num_layers} decoder layers, but --opts "
            f"MODEL.MASK_FORMER.DEC_LAYERS {number + 1} makes {number}: leave it out, or name "
            "rows of earlier layers after --rows"
        )


def devices_of_jobs(num_gpus: int, jobs: int) -> list[str | None]:
    """The CUDA_VISIBLE_DEVICES of each job, so that no two share a GPU; None without GPUs.

    Raises:
        ValueError: the machine has fewer GPUs.
    """
    if num_gpus == 0:
        return [None] * jobs
    number = torch.cuda.device_count()
    if jobs * num_gpus > number:
        raise ValueError(
            f"--jobs {jobs} with --num-gpus {num_gpus} needs {jobs * num_gpus} GPUs, but this "
            f"machine has {number}"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = visible.split(",") if visible else [str(i) for i in range(number)]
    return [",".join(names[i * num_gpus : (i + 1) * num_gpus]) for i in range(jobs)]


def train(run: Run, num_gpus: int, environment: dict[str, str]) -> None:
    """Train and evaluate, or resume, unless the run is finished.

    Args:
        run: the training.
        num_gpus: 0 on a CPU.
        environment: variables in addition to those of this process.

    Raises:
        subprocess.CalledProcessError: it failed; its output is in OUTPUT_DIR/output.txt.
    """
    if (run.folder / _RECORD).is_file():
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "tools/train_net.py"), "--config-file", str(run.config)]
    command += ["--num-gpus", str(num_gpus), "--resume", *run.opts]
    start = time.perf_counter()
    with open(run.folder / "output.txt", "ab") as output:
        process = subprocess.Popen(
            command, env=os.environ | environment, stdout=output, stderr=output
        )
        # The peak of this process, not of all that have ended.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    memory = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if num_gpus:
        log = (run.folder / "log.txt").read_text()
        memory = max((int(match[1]) for match in _GPU_MEMORY.finditer(log)), default=0) * 2**20
    record = {"seconds": time.perf_counter() - start, "memory": memory}
    with atomic_write(str(run.folder / _RECORD)) as file:
        json.dump(record, file)


def train_all(runs: list[Run], args: argparse.Namespace) -> dict[str, str]:
    """Train all runs, `args.jobs` at a time. Returns {name: error} of those that failed."""
    errors: dict[str, str] = {}
    lock = threading.Lock()
    done = 0
    common = {}
    if args.jobs > 1:
        common["OMP_NUM_THREADS"] = str(max((os.cpu_count() or 1) // args.jobs, 1))
    free: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    for devices in devices_of_jobs(args.num_gpus, args.jobs):
        free.put(devices)

    def work(run: Run) -> None:
        nonlocal done
        start = time.perf_counter()
        devices = free.get()
        own = {} if devices is None else {"CUDA_VISIBLE_DEVICES": devices}
        try:
            train(run, args.num_gpus, common | own)
            text = f"{time.perf_counter() - start:.0f} s"
        except subprocess.CalledProcessError as error:
            text = f"failed with status {error.returncode}, see {run.folder / 'output.txt'}"
            errors[run.name] = text
        finally:
            free.put(devices)
        with lock:
            done += 1
            print(f"[{done}/{len(runs)}] {run.name}: {text}", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            for future in [pool.submit(work, run) for run in runs]:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return errors


def layer_recall(run: Run, layers: list[int], num_gpus: int) -> dict[int, float]:
    """AR@100 of decoder layers, by tools/evaluate_proposals.py.

    Args:
        run: a finished one.
        layers: their numbers.
        num_gpus: 0 on a CPU.
    """
    folder = run.folder / "proposals"
    file = folder / "proposals.json"
    names = {f"layer {layer}" for layer in layers}
    if not file.is_file() or names - next(iter(json.loads(file.read_text()).values())).keys():
        command = [sys.executable, str(ROOT / "tools/evaluate_proposals.py")]
        command += ["--config-file", str(run.config), "--layer", ",".join(map(str, layers))]
        weights = str(run.folder / "model_final.pth")
        command += ["--num-gpus", str(num_gpus), *run.opts]
        subprocess.run([*command, "OUTPUT_DIR", str(folder), "MODEL.WEIGHTS", weights], check=True)
    metrics = next(iter(json.loads(file.read_text()).values()))
    return {layer: metrics[f"layer {layer}"]["AR@100"] for layer in layers}


def read_result(run: Run, folder: Path | None = None) -> Result:
    """Metrics, memory and time of a finished run.

    Args:
        run: the training.
        folder: of another evaluation of its model.
    """
    results = json.loads(((folder or run.folder) / "evaluation.json").read_text())
    tasks = next(iter(results.values()))
    scores = {
        name: tasks[task][metric]
        for name, (task, *metrics) in METRICS.items()
        for metric in metrics
        if task in tasks and tasks[task].get(metric) is not None
    }
    record = json.loads((run.folder / _RECORD).read_text())
    return Result(scores, record["memory"], record["seconds"])


def model_size(config: Path, fps: bool) -> dict[str, float]:
    """Parameters in millions and multiply-adds in G of a config, as `analyze_model` counts them."""
    cfg = load_config(str(config), ["MODEL.DEVICE", "cpu"])
    model = build_model(cfg).eval()
    size = {"params": sum(parameter.numel() for parameter in model.parameters()) / 1e6}
    images = count_all(cfg, model, COCO_SIZES, resize=True)
    size["FLOPs"] = sum(image.as_in_the_paper() for image in images) / len(images) / 1e9
    if fps:
        size["fps"] = frames_per_second(cfg, model.to("cuda"), COCO_SIZES, resize=True)
    return size


def sizes_of(tables: list[Table], fps: bool) -> dict[str, dict[str, float]]:
    """`model_size` of all rows with a config of their own: {config: sizes}."""
    configs = {row.config for table in tables for row in table.rows if row.config and not row.test}
    sizes = {}
    for number, config in enumerate(sorted(configs), 1):
        print(f"counting {config} ({number}/{len(configs)})", flush=True)
        sizes[config] = model_size(CONFIGS / config, fps)
    return sizes


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run the tables of the paper.")
    parser.add_argument("tables", nargs="*", metavar="TABLE", help="such as 4a; see --list")
    parser.add_argument("--list", action="store_true", help="list tables and rows")
    parser.add_argument("--base", type=Path, default=SHAPES, help="recipe (default: Shapes)")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="names of rows (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="one training for each")
    parser.add_argument("--output", type=Path, default=Path("output/ablations"))
    parser.add_argument("--num-gpus", type=int, help="per training (default: 1, 0 without a GPU)")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time (default: 1)")
    parser.add_argument("--count-only", action="store_true", help="count, do not train")
    parser.add_argument("--fps", action="store_true", help="also time the rows on the GPU")
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="overrides")
    args = parser.parse_intermixed_args(argv)
    if not args.tables and not args.list:
        parser.error("name at least one table, or --list")
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    if len(set(args.seeds)) < len(args.seeds) or min(args.seeds) < 0:
        parser.error(f"--seeds must be different numbers of at least 0, got {args.seeds}")
    if args.fps and not torch.cuda.is_available():
        parser.error("--fps times on a GPU, and this machine has none")
    if args.num_gpus is None:
        args.num_gpus = int(torch.cuda.is_available())
    args.device = [] if args.num_gpus else ["MODEL.DEVICE", "cpu"]
    return args


def choose(tables: dict[str, Table], keys: list[str], rows: list[str] | None) -> list[Table]:
    """The tables of the given names, with the given rows only.

    Raises:
        ValueError: an unknown name.
    """
    unknown = [key for key in keys if key not in tables]
    if unknown:
        raise ValueError(f"table {unknown[0]!r} is not one of {', '.join(tables)}")
    chosen = [tables[key] for key in dict.fromkeys(keys)]
    if rows is None:
        return chosen
    names = [row.name for table in chosen for row in table.rows]
    unknown = [row for row in rows if row not in names]
    if unknown:
        raise ValueError(f"row {unknown[0]!r} is not one of {', '.join(names)}")
    kept = [t._replace(rows=[row for row in t.rows if row.name in rows]) for t in chosen]
    return [table for table in kept if table.rows]


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    all_tables = read_tables(CONFIGS / "ablations/paper.yaml")
    if args.list:
        for table in all_tables.values():
            print(f"{table.key}: {table.title} ({table.kind})")
            for row in table.rows:
                print(f"    {row.name}" + (f"  configs/{row.config}" if row.config else ""))
        return
    try:
        tables = choose(all_tables, args.tables, args.rows)
        results: dict[tuple[str, str], list[Result]] = {}
        errors: dict[str, str] = {}
        sizes: dict[str, dict[str, float]] = {}
        if not args.count_only:
            if args.base.resolve() == SHAPES:
                prepare_data()
            results, errors, sizes = run_tables(tables, args)
        for key, numbers in sizes_of(tables, args.fps).items():
            sizes[key] = sizes.get(key, {}) | numbers
        path = write_page(args.output, tables, results, sizes, args.base.name)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: {' '.join(error.cmd[:4])} exited with status {error.returncode}")
    print(f"\n{path.read_text()}\n{path}")
    if errors:
        sys.exit("error: " + "; ".join(f"{name} {text}" for name, text in errors.items()))


def run_tables(
    tables: list[Table], args: argparse.Namespace
) -> tuple[dict[tuple[str, str], list[Result]], dict[str, str], dict[str, dict[str, float]]]:
    """Train the rows of tables.

    Returns:
        {(table, row): a result per seed that succeeded}, {run: error} of the others, and for tables
        of speed {`Row.size_key`: latency} of the first seed.
    """
    runs = plan(tables, args)
    errors = train_all(list({run.folder: run for run in runs.values()}.values()), args)
    results: dict[tuple[str, str], list[Result]] = {}
    latencies: dict[str, dict[str, float]] = {}
    for table in tables:
        if table.kind == "speed":
            trained = [(row, runs[table.key, row.name, args.seeds[0]]) for row in table.rows]
            trained = [(row, run) for row, run in trained if run.name not in errors]
            keys = [row.size_key for row, _ in trained]
            latencies |= dict(zip(keys, measure(trained), strict=True))
        recalls: dict[Path, dict[int, float]] = {}
        for row in table.rows:
            for seed in args.seeds if table.kind != "recipe" else ():
                run = runs[table.key, row.name, seed]
                if run.name in errors:
                    continue
                result = read_result(run, evaluate(row, run, args.num_gpus) if row.test else None)
                if row.layer is not None:
                    if run.folder not in recalls:
                        layers = [row.layer for row in table.rows if row.layer is not None]
                        recalls[run.folder] = layer_recall(run, layers, args.num_gpus)
                    recall = recalls[run.folder].get(row.layer)
                    if recall is None:  # no object in the data set
                        continue
                    result = result._replace(scores={"AR": recall})
                results.setdefault((table.key, row.name), []).append(result)
    return results, errors, latencies


if __name__ == "__main__":
    run_program(main)
