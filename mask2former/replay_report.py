"""What a replay found, as data and as text: `narrow` → dict → `to_markdown`."""

import math
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from torch import nn

from .capture import Capture, versions
from .checkpoint_weights import non_finite
from .config_parts import MASKED_DECODERS
from .non_finite import sample_name
from .replay import (
    HALF_MAX,
    Gradients,
    ModuleCall,
    Outcome,
    TensorStats,
    Trace,
    find_gradients,
    restored_model,
    run_forward,
    suspicious_inputs,
)

# Names in a list of the report; the rest is counted.
_MAX_NAMES = 6


def narrow(capture: Capture, cfg: CfgNode, dtype: str) -> dict[str, Any]:
    """Replay an iteration and narrow its failure to image, layer and tensor.

    Args:
        capture: the iteration.
        cfg: of `replayed_config`.
        dtype: of autocast, see `run_forward`.

    Returns:
        The report, for JSON; `reproduced` is whether a loss, cost or gradient is not
        finite again.

    Raises:
        ValueError: the capture does not fit the config.
    """
    num_parts = cfg.SOLVER.get("NUM_ACCUMULATION_STEPS", 1)
    whole = (capture, capture.batch, dtype, num_parts)
    trained = run_forward(restored_model(capture, cfg, plain=False), *whole)
    trained = trained._replace(tensors={})  # with their graphs
    model = restored_model(capture, cfg, plain=True)
    bad_weights = non_finite({k: v for k, v in capture.weights.items() if hasattr(v, "dtype")})
    parameters = [name for name, _ in model.named_parameters() if name in bad_weights]
    buffers = [name for name, _ in model.named_buffers() if name in bad_weights]
    with Trace(model) as trace:
        plain = run_forward(model, *whole)
    plain = plain._replace(tensors={})
    is_finite = trained.is_finite and plain.is_finite
    scale = capture.loss_scale if dtype == "float16" else 1.0
    gradients = Gradients()
    if plain.is_finite:
        gradients = find_gradients(model, capture, capture.batch, dtype, scale, num_parts)
    images = []
    if not plain.is_finite or not gradients.is_finite:
        images = _images_alone(model, capture, dtype, scale)
    head = cfg.MODEL.SEM_SEG_HEAD
    report = {
        "iteration": capture.iteration,
        "rank": capture.rank,
        "world_size": capture.world_size,
        "seed": capture.seed,
        "reason": capture.reason,
        "weights_are": capture.weights_are,
        "captured": {"losses": capture.losses, "dtype": capture.dtype, **capture.versions},
        "replayed": {"dtype": dtype, "on": cfg.MODEL.DEVICE, **versions()},
        "reproduced": not is_finite or not gradients.is_finite,
        "as_trained": _outcome(trained),
        "as_written": _outcome(plain),
        "decoder": cfg.MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME,
        "files": [sample_name(sample, i) for i, sample in enumerate(capture.batch)],
        "images": images,
        "layer": _call(None if plain.is_finite else trace.culprit()),
        "weights": {"parameters": parameters, "buffers": buffers},
        "gradients": _gradients(gradients),
        "inputs": suspicious_inputs(capture.batch, head.get("NUM_CLASSES")),
        "beyond_float16": [
            {"module": name, "type": kind, "largest": peak} for name, kind, peak in trace.largest()
        ],
    }
    report["findings"] = _findings(report, capture, trained, plain)
    return _for_json(report)


def _images_alone(
    model: nn.Module, capture: Capture, dtype: str, scale: float
) -> list[dict[str, Any]]:
    """Each image as a batch of its own."""
    images = []
    for i, sample in enumerate(capture.batch):
        outcome = run_forward(model, capture, [sample], dtype)
        ends_finite = outcome.is_finite
        outcome = outcome._replace(tensors={})
        if ends_finite:
            ends_finite = find_gradients(model, capture, [sample], dtype, scale).is_finite
        image = {"index": i, "name": sample_name(sample, i), "finite": ends_finite}
        images.append(image | _outcome(outcome))
    return images


def _outcome(outcome: Outcome) -> dict[str, Any]:
    return {"losses": outcome.losses, "error": outcome.error, "not_finite": outcome.bad_losses()}


def _call(call: ModuleCall | None) -> dict[str, Any] | None:
    if call is None:
        return None
    return {
        "module": call.name,
        "type": call.kind,
        "inputs": [_stats(stats) for stats in call.inputs],
        "outputs": [_stats(stats) for stats in call.outputs or []],
        "returned": call.outputs is not None,
        "parameters": [_stats(stats) for stats in call.parameters],
    }


def _stats(stats: TensorStats) -> dict[str, Any]:
    return stats._asdict() | {"shape": list(stats.shape)}


def _gradients(gradients: Gradients) -> dict[str, Any]:
    found = gradients._asdict() | {"finite": gradients.is_finite}
    for key in ("first", "last_finite"):
        found[key] = None if found[key] is None else _stats(found[key])
    return found


def prediction_layer(loss: str, decoder: str) -> str:
    """Which prediction of the decoder a loss is of, in words.

    Args:
        loss: its name, such as "loss_mask_3".
        decoder: MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME.
    """
    _, _, suffix = loss.rpartition("_")
    if not suffix.isdigit():
        return "the last prediction"
    if decoder not in MASKED_DECODERS:
        return f"auxiliary prediction {suffix}, counted from 0"
    if suffix == "0":
        return "the first prediction, before decoder layer 1 (layers.0)"
    return f"the prediction after decoder layer {suffix} (layers.{int(suffix) - 1})"


def _names(names: Sequence[str]) -> str:
    more = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


def _losses(names: Sequence[str], decoder: str) -> str:
    shown = [f"{name}, {prediction_layer(name, decoder)}" for name in names[:_MAX_NAMES]]
    more = len(names) - _MAX_NAMES
    return "; ".join(shown) + (f"; and {more} more" if more > 0 else "")


def _findings(
    report: dict[str, Any], capture: Capture, trained: Outcome, plain: Outcome
) -> list[str]:
    """The report in sentences, the most important first."""
    findings = [] if report["reproduced"] else _why_finite(report, capture)
    if report["reproduced"] and trained.is_finite != plain.is_finite:
        which = "MODEL.FAST False" if trained.is_finite else "MODEL.FAST as trained"
        findings.append(f"Only the model with {which} is not finite; please report that.")
    parameters, buffers = report["weights"]["parameters"], report["weights"]["buffers"]
    if parameters:
        text = (
            f"Weights: {len(parameters)} parameters hold NaN or infinite values: "
            f"{_names(parameters)}."
        )
        if "after" not in capture.weights_are:
            text += (
                " So the cause is in an earlier iteration: its loss was finite here, but its "
                "gradients were not, or those of another rank. Look at the losses before it, and "
                "at a lower SOLVER.BASE_LR or SOLVER.CLIP_GRADIENTS."
            )
        findings.append(text)
    if buffers:
        findings.append(
            f"Buffers with NaN or infinite values: {_names(buffers)}. Statistics of BatchNorm may "
            "be those after the failed forward pass, which does not read them."
        )
    findings += _layer_findings(report["layer"])
    if bad := plain.bad_losses() or trained.bad_losses():
        findings.append(f"Losses that are not finite: {_losses(bad, report['decoder'])}.")
    elif plain.error or trained.error:
        findings.append(f"Matching failed: {plain.error or trained.error}")
    findings += _image_findings(report["images"])
    if not report["gradients"]["finite"]:
        findings += _gradient_findings(report)
    if report["inputs"]:
        findings.append("Unusual inputs: " + "; ".join(report["inputs"]) + ".")
    if beyond := report["beyond_float16"]:
        layers = "; ".join(f"{x['module']} up to {x['largest']:.3g}" for x in beyond)
        findings.append(
            f"Activations near or beyond the range of float16 ({HALF_MAX:g}): {layers}. If "
            "training was in float16, try SOLVER.AMP.DTYPE bfloat16."
        )
    return findings


def _why_finite(report: dict[str, Any], capture: Capture) -> list[str]:
    reasons = []
    for key in ("dtype", "device", "torch"):
        before, now = report["captured"].get(key), report["replayed"].get(key)
        if before != now:
            reasons.append(f"{key} was {before}, and is {now} here")
    if capture.world_size > 1:
        reasons.append(
            f"the run had {capture.world_size} processes, over which the number of masks and "
            "SyncBN are averaged"
        )
    if "after" in capture.weights_are:
        reasons.append("the captured weights are those after the update")
    reasons.append("sums on a GPU may be in another order")
    return [f"The losses are finite here. Possible reasons: {'; '.join(reasons)}."]


def _layer_findings(call: dict[str, Any] | None) -> list[str]:
    if call is None:
        return []
    bad_parameters = [x["name"] for x in call["parameters"] if x["num_bad"]]
    name = f"{call['module']} ({call['type']})" if call["module"] else f"the {call['type']} itself"
    if call["returned"]:
        bad = next(stats for stats in call["outputs"] if stats["num_bad"])
        where = f"output {bad['name']}".strip()
        text = (
            f"Layer: {name} is the first module whose output is not finite though its inputs are: "
            f"{where} has {bad['num_bad']} of {math.prod(bad['shape'])} elements, the first at "
            f"{list(bad['first_bad'])} of shape {bad['shape']}."
        )
    else:
        text = f"Layer: {name} is the innermost module with finite inputs that did not return."
    if bad_parameters:
        text += f" Its own {_names(bad_parameters)} is not finite."
    return [text]


def _image_findings(images: list[dict[str, Any]]) -> list[str]:
    bad = [image for image in images if not image["finite"]]
    if not images:
        return []
    if not bad:
        return [
            "Images: each image alone is finite. The failure needs the batch (batch statistics) or "
            "its random points, which differ for an image alone."
        ]
    if len(bad) == len(images) > 1:
        return ["Images: every image alone fails, so the cause is not one image."]
    names = [f"{image['name']} (number {image['index']} of the batch)" for image in bad]
    alone = f", alone of {len(images)}" if len(images) > 1 else ""
    return [f"Image: {_names(names)} fails{alone}."]


def _gradient_findings(report: dict[str, Any]) -> list[str]:
    gradients = report["gradients"]
    text = f"Gradients are not finite, of {len(gradients['parameters'])} parameters: "
    text += _names(gradients["parameters"])
    if gradients["losses"]:
        text += f". They come from {_losses(gradients['losses'], report['decoder'])}"
    if gradients["first"]:
        text += f". The first is the gradient of the output of {gradients['first']['name']}"
    if gradients["last_finite"]:
        text += f"; that of {gradients['last_finite']['name']} before it is finite"
    if gradients["function"]:
        text += f". torch: {gradients['function']}"
    if report["replayed"]["dtype"] == "float16":
        text += ". In float16 that is normal now and then: such an update is left out"
    return [text + "."]


def _for_json(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _for_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_for_json(item) for item in value]
    return value


def to_markdown(report: dict[str, Any], path: str) -> str:
    """The report as a page.

    Args:
        report: of `narrow`.
        path: the capture file.
    """
    verdict = "not finite again" if report["reproduced"] else "finite here"
    lines = [
        f"# Replay of iteration {report['iteration']}, rank {report['rank']}: {verdict}",
        "",
        f"Capture: `{path}`. Seed {report['seed']}, {report['world_size']} process(es), "
        f"{report['captured']['dtype']}; weights: {report['weights_are']}.",
        "",
        *(f"- {finding}" for finding in report["findings"]),
        "",
        "## Losses",
        "",
        "| loss | captured | as trained | as written |",
        "|---|---|---|---|",
    ]
    columns = [report["captured"]["losses"]]
    columns += [report[key]["losses"] for key in ("as_trained", "as_written")]
    for name in dict.fromkeys(name for column in columns for name in column):
        cells = " | ".join(_cell(column.get(name)) for column in columns)
        lines.append(f"| {name} | {cells} |")
    for key in ("as_trained", "as_written"):
        if report[key]["error"]:
            lines += ["", f"{key.replace('_', ' ')}: {report[key]['error']}"]
    if call := report["layer"]:
        lines += ["", f"## Layer: {call['module'] or 'the model itself'} ({call['type']})", ""]
        lines += [
            "| tensor | shape | type | low | high | not finite |",
            "|---|---|---|---|---|---|",
        ]
        for kind in ("inputs", "outputs", "parameters"):
            lines += [_row(f"{kind[:-1]} {stats['name']}".strip(), stats) for stats in call[kind]]
    if report["images"]:
        lines += ["", "## Each image alone", "", "| image | finite | not finite |", "|---|---|---|"]
        for image in report["images"]:
            what = image["error"] or ", ".join(image["not_finite"])
            lines.append(f"| {image['name']} | {'yes' if image['finite'] else 'no'} | {what} |")
    lines += ["", "## Batch", "", *(f"- {name}" for name in report["files"]), ""]
    return "\n".join(lines)


def _row(name: str, stats: dict[str, Any]) -> str:
    cells = [_cell(stats[key]) for key in ("low", "high")]
    shape, dtype, bad = stats["shape"], stats["dtype"], stats["num_bad"]
    return f"| {name} | {shape} | {dtype} | {' | '.join(cells)} | {bad} |"


def _cell(value: Any) -> str:
    return "–" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
