"""The tables of the paper, and the page that shows a run of them beside it.

A part of tools/run_ablations.py.
"""

import io
import json
import re
import statistics
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml
from matplotlib.figure import Figure
from tabulate import tabulate

from mask2former.utils.files import atomic_write

# {name: (evaluator task, names of the metric)}, in the paper's order. The official evaluation of
# Cityscapes calls its mean over classes IoU.
METRICS = {"AP": ("segm", "AP"), "PQ": ("panoptic_seg", "PQ"), "mIoU": ("sem_seg", "mIoU", "IoU")}
_SCORES = (*METRICS, "AR")
_KINDS = ("ablation", "recipe", "proposals", "tasks", "speed")
# Numbers of a row that are no scores, with the name of the column.
_SIZES = {
    "params": "params (M)",
    "FLOPs": "multiply-adds (G)",
    "fps": "images/s",
    "queries": "queries left",
    "latency": "latency (ms)",
    "relative": "latency, relative",
}
_NUMBERS = {*_SCORES, *_SIZES, "memory"}
_NOTE = """\
Scores in percent, as mean ± standard deviation over seeds, with the rank among the rows in
parentheses. Parameters and multiply-adds are those of the row's own config, for the usual sizes of
COCO images resized to its test size, with the masks of every layer and without the sampling of
deformable attention, as the paper counts them.
Latency is that of one image, post-processing included: the mean over the first images of the test
set, each the fastest of several rounds in which the rows took turns; on a CPU, CPU time on one
thread.
Memory is the peak of the training process: of the GPU, or on a CPU all of its memory."""
_ABLATION_NOTE = """\
The paper's scores in tables 4 and 5 are AP of instance models and PQ of panoptic models on COCO,
and mIoU of semantic models on ADE20K. Only scores of these recipes can be compared with them."""


class Row(NamedTuple):
    """A row of the paper.

    Attributes:
        name: in this project's words.
        config: its file, relative to configs/; "" if the base recipe is unchanged.
        recipe: folder of the task whose recipe takes the place of the base; "" if none does.
        layer: the decoder layer whose proposals are evaluated.
        test: {config key: value} of inference, with which the trained model is evaluated.
        paper: its numbers: scores in percent, params, FLOPs, fps, memory.
    """

    name: str
    config: str
    recipe: str
    layer: int | None
    paper: dict[str, float]
    test: Mapping[str, Any] = MappingProxyType({})

    @property
    def size_key(self) -> str:
        """The key of its sizes: the config, unless settings of inference change them."""
        return f"{self.config} {self.slug}" if self.test else self.config

    @property
    def slug(self) -> str:
        """The name for files."""
        return re.sub(r"\W+", "_", self.name).strip("_").lower()


class Table(NamedTuple):
    """A table of the paper; kinds are explained in configs/ablations/paper.yaml."""

    key: str
    kind: str
    title: str
    rows: list[Row]


class Run(NamedTuple):
    """A training.

    Attributes:
        name: for progress.
        config: its config file.
        folder: its OUTPUT_DIR.
        opts: overrides.
    """

    name: str
    config: Path
    folder: Path
    opts: list[str]


class Result(NamedTuple):
    """A training of a row.

    Attributes:
        scores: in percent.
        memory: peak in bytes.
        seconds: from start to the end of evaluation, of the last attempt if it was resumed.
    """

    scores: dict[str, float]
    memory: float
    seconds: float


def read_tables(path: Path) -> dict[str, Table]:
    """Read configs/ablations/paper.yaml.

    Raises:
        ValueError: an unknown kind or number, or rows whose files would have one name.
    """
    tables = {}
    for key, content in yaml.safe_load(path.read_text()).items():
        if content["kind"] not in _KINDS:
            raise ValueError(f"{path}: kind of table {key} is not one of {_KINDS}")
        rows = []
        for entry in content["rows"]:
            numbers = {name: entry[name] for name in entry if name in _NUMBERS}
            unknown = entry.keys() - numbers.keys() - set(Row._fields)
            if unknown:
                raise ValueError(f"{path}: row {entry['name']!r} has {sorted(unknown)}")
            config, recipe = entry.get("config", ""), entry.get("recipe", "")
            layer, test = entry.get("layer"), entry.get("test", {})
            rows.append(Row(entry["name"], config, recipe, layer, numbers, test))
        slugs = [row.slug for row in rows]
        if len(set(slugs)) < len(slugs):
            raise ValueError(f"{path}: rows of table {key} have the same name in files: {slugs}")
        tables[key] = Table(key, content["kind"], content["title"], rows)
    return tables


def order_differences(paper: dict[str, float], here: dict[str, float]) -> list[tuple[str, str]]:
    """Pairs of rows in another order than in the paper.

    Args:
        paper: score of each row; equal scores have no order.
        here: score of each row.

    Returns:
        (better, worse) by the scores here, for each pair that the paper has the other way round.
    """
    pairs = []
    for a, b in combinations([name for name in paper if name in here], 2):
        if (paper[a] - paper[b]) * (here[a] - here[b]) < 0:
            pairs.append((a, b) if here[a] > here[b] else (b, a))
    return pairs


def _rank(scores: dict[str, float], name: str) -> int:
    return 1 + sum(score > scores[name] for score in scores.values())


def _scores_of(table: Table, results: dict[tuple[str, str], list[Result]], metric: str) -> dict:
    """{row: scores of its seeds}."""
    scores = {}
    for row in table.rows:
        values = [
            r.scores[metric] for r in results.get((table.key, row.name), ()) if metric in r.scores
        ]
        if values:
            scores[row.name] = values
    return scores


def _table_text(
    table: Table,
    results: dict[tuple[str, str], list[Result]],
    sizes: dict[str, dict[str, float]],
) -> str:
    rows: list[dict[str, str]] = [{"row": row.name} for row in table.rows]
    for metric in _SCORES:
        paper = {row.name: row.paper[metric] for row in table.rows if metric in row.paper}
        here = _scores_of(table, results, metric)
        means = {name: statistics.mean(values) for name, values in here.items()}
        if not paper and not here:
            continue
        for cells in rows:
            name = cells["row"]
            if paper:
                cells[f"{metric}, paper"] = (
                    _score([paper[name]], paper, name) if name in paper else ""
                )
            if here:
                cells[metric] = _score(here[name], means, name) if name in here else ""
    for key, title in _SIZES.items():
        in_paper = any(key in row.paper for row in table.rows)
        here = any(key in sizes.get(row.size_key, {}) for row in table.rows)
        for row, cells in zip(table.rows, rows, strict=True):
            if in_paper:
                cells[f"{title}, paper"] = f"{row.paper[key]:g}" if key in row.paper else ""
            if here:
                value = sizes.get(row.size_key, {}).get(key)
                digits = 2 if key == "relative" else 1
                cells[title] = "" if value is None else f"{value:.{digits}f}"
    if any("memory" in row.paper for row in table.rows):
        for row, cells in zip(table.rows, rows, strict=True):
            cells["memory (GB), paper"] = f"{row.paper['memory']:g}"
    runs_of = {row.name: results.get((table.key, row.name), []) for row in table.rows}
    if any(runs_of.values()):
        for cells in rows:
            runs = runs_of[cells["row"]]
            cells["memory (GB)"] = f"{max(r.memory for r in runs) / 2**30:.2f}" if runs else ""
            cells["minutes"] = (
                f"{statistics.mean(r.seconds for r in runs) / 60:.1f}" if runs else ""
            )
    if len({len(runs) for runs in runs_of.values() if runs}) > 1:  # some have failed
        for cells in rows:
            cells["seeds"] = str(len(runs_of[cells["row"]]))
    if table.kind == "recipe":
        for row, cells in zip(table.rows, rows, strict=True):
            cells["config"] = f"configs/{row.config}"
    return tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True)


def _score(values: list[float], means: dict[str, float], name: str) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    rank = f" ({_rank(means, name)})" if len(means) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}{rank}"


def _order_text(table: Table, results: dict[tuple[str, str], list[Result]]) -> list[str]:
    lines = []
    for metric in _SCORES:
        paper = {row.name: row.paper[metric] for row in table.rows if metric in row.paper}
        here = _scores_of(table, results, metric)
        means = {name: statistics.mean(values) for name, values in here.items()}
        if len(paper.keys() & means.keys()) < 2:
            continue
        pairs = order_differences(paper, means)
        if not pairs:
            lines.append(f"- {metric}: no two rows in the opposite order.")
            continue
        text = ", ".join(
            f"{a} > {b} ({means[a] - means[b]:+.1f} here, {paper[a] - paper[b]:+.1f} in the paper)"
            for a, b in pairs
        )
        lines.append(f"- {metric}: **the order differs from the paper's**: {text}.")
    return lines


def draw_table(table: Table, results: dict[tuple[str, str], list[Result]]) -> bytes | None:
    """Draw the scores of a table: the paper's above those measured here, a column per metric.

    Returns:
        The bytes of a PNG file; None without a result.
    """
    metrics = [metric for metric in _SCORES if _scores_of(table, results, metric)]
    if not metrics:
        return None
    names = [row.name for row in table.rows]
    figure = Figure(
        figsize=(2.2 + 2.8 * len(metrics), 1.6 + 0.5 * len(names)), layout="constrained"
    )
    axes = figure.subplots(2, len(metrics), sharey=True, squeeze=False)
    for column, metric in enumerate(metrics):
        paper = {row.name: [row.paper[metric]] for row in table.rows if metric in row.paper}
        for line, (source, scores) in enumerate(
            (("paper", paper), ("here", _scores_of(table, results, metric)))
        ):
            panel = axes[line][column]
            for position, name in enumerate(names):
                values = scores.get(name, [])
                if values:
                    panel.plot(statistics.mean(values), position, "o", color=f"C{line}")
                if len(values) > 1:
                    panel.plot(values, [position] * len(values), "|", color=f"C{line}")
            panel.set_title(f"{metric}, {source}", fontsize=9)
            panel.set_yticks(range(len(names)), names, fontsize=8)
            panel.set_ylim(len(names) - 0.5, -0.5)
            panel.grid(axis="x", alpha=0.3)
            panel.tick_params(axis="x", labelsize=8)
    figure.suptitle(_heading(table), fontsize=10)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def _heading(table: Table) -> str:
    if not any(character.isdigit() for character in table.key):  # no table of the paper's
        return table.title
    number = table.key.removeprefix("fig")
    return f"{'Table' if number == table.key else 'Figure'} {number}: {table.title}"


def write_page(
    output: Path,
    tables: list[Table],
    results: dict[tuple[str, str], list[Result]],
    sizes: dict[str, dict[str, float]],
    base: str,
) -> Path:
    """Write ablations.md, ablations.json and a PNG file per trained table.

    Args:
        output: created if missing.
        tables: what to show.
        results: {(table, row): a result per seed}.
        sizes: {`Row.size_key`: params, FLOPs, fps, latency, …}.
        base: name of the recipe that was trained.

    Returns:
        The path of ablations.md.
    """
    output.mkdir(parents=True, exist_ok=True)
    seeds = max((len(runs) for runs in results.values()), default=0)
    trained = f" Trained: {base}, {seeds} seed{'s' * (seeds != 1)}." if results else ""
    parts = [f"# The paper's tables\n\n{_NOTE}{trained}"]
    if results and any(table.kind == "ablation" for table in tables):
        parts.append(_ABLATION_NOTE)
    for table in tables:
        parts += [f"## {_heading(table)}", _table_text(table, results, sizes)]
        if lines := _order_text(table, results):
            parts.append("\n".join(lines))
        if drawing := draw_table(table, results):
            name = f"table_{table.key}.png"
            with atomic_write(str(output / name), "wb") as file:
                file.write(drawing)
            parts.append(f"![{_heading(table)}]({name})")
    path = output / "ablations.md"
    with atomic_write(str(path)) as file:
        file.write("\n\n".join(parts) + "\n")
    with atomic_write(str(output / "ablations.json")) as file:
        json.dump(_as_json(tables, results, sizes), file, indent=1)
    return path


def _as_json(
    tables: list[Table],
    results: dict[tuple[str, str], list[Result]],
    sizes: dict[str, dict[str, float]],
) -> list[dict[str, Any]]:
    return [
        {
            "table": table.key,
            "row": row.name,
            "config": row.config,
            "paper": row.paper,
            "size": sizes.get(row.size_key, {}),
            "runs": [result._asdict() for result in results.get((table.key, row.name), ())],
        }
        for table in tables
        for row in table.rows
    ]
