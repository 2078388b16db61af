"""Export to a file, and the file as a model: the same numbers, or an error in words."""

import json

import numpy as np
import pytest
import torch
from load_script import load_script
from PIL import Image
from torch import nn

from mask2former.export import ExportOptions, build_exported_model, export_model, load_exported
from mask2former.export.exporter import ParityError
from mask2former.export.metadata import SizeRule, read_description
from mask2former.export.parity import Difference, measure, parity_shapes
from mask2former.export.programs import save_onnx
from mask2former.modeling.backbone.swin_layers import WindowAttention


def traced(predictor, tmp_path, size=(64, 96), **options):
    path = str(tmp_path / "model.ts")
    export_model(predictor, path, ExportOptions(format="torchscript", size=size, **options))
    return path


def test_traced_file(predictor, traced_file, assert_same_predictions):
    path = traced_file
    assert_same_predictions(path, sizes=((64, 96), (64, 90)))
    with pytest.raises(ValueError, match="traced for 64 x 96: lower INPUT.MIN_SIZE_TEST"):
        load_exported(path)(np.zeros((96, 64, 3), np.uint8))


def test_image_sizes_of_a_traced_file(traced_file, monkeypatch):
    """Traced for 64 x 96 pixels: smaller images are padded, larger ones do not fit."""
    smaller = ("INPUT.MIN_SIZE_TEST", "32", "INPUT.MAX_SIZE_TEST", "64")
    exported = load_exported(traced_file, opts=smaller)
    network, seen = exported.model.forward_network, []
    monkeypatch.setattr(
        exported.model, "forward_network", lambda x: seen.append(x.shape[2:]) or network(x)
    )
    results = exported.predict([np.zeros((96, 64, 3), np.uint8), np.zeros((64, 128, 3), np.uint8)])
    assert seen == [(64, 32), (32, 64)]  # 48 x 32 and 32 x 64, in multiples of 32
    assert [result.image_size for result in results] == [(96, 64), (64, 128)]
    for key, value, limit in (("MIN", "65", 64), ("MAX", "97", 96)):
        what = rf"{key}_SIZE_TEST is {value}, but \S*model.ts was traced for 64 x 96 pixels only: "
        with pytest.raises(ValueError, match=f"{what}choose {limit} or less, or export"):
            load_exported(traced_file, opts=[f"INPUT.{key}_SIZE_TEST", value])


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["INPUT.MIN_SIZE_TEST"], "Overrides come in pairs"),
        (["INPUT.MIN_SIZE_TEST", "-1"], "INPUT.MIN_SIZE_TEST is -1"),
        (["INPUT.MIN_SIZE_TEST", "small"], "INPUT.MIN_SIZE_TEST='small'"),
        (["MODEL.MASK_FORMER.HIDDEN_DIM", "8"], "can be changed, but not MODEL.MASK_FORMER.HIDDEN"),
        (["INPUT.MIN_SIZE_TEST", "800"], "INPUT.MIN_SIZE_TEST is 800, .* for 64 x 96 pixels only"),
    ],
)
def test_options_of_demo_that_a_file_does_not_take(traced_file, tmp_path, opts, message):
    (tmp_path / "a.png").touch()
    demo = load_script("tools/demo.py")
    arguments = ["--model", traced_file, "--input", tmp_path / "a.png"]
    arguments += ["--output", tmp_path / "out"]
    with pytest.raises(SystemExit, match=message):
        demo.main([*map(str, arguments), "--opts", *opts])
    assert not (tmp_path / "out").exists()


def test_options_of_demo_with_a_file(traced_file, tmp_path):
    """A portrait image, which would not fit with the sizes of the config."""
    Image.new("RGB", (64, 96)).save(tmp_path / "a.png")
    demo = load_script("tools/demo.py")
    arguments = ["--model", traced_file, "--input", tmp_path / "a.png"]
    arguments += ["--output", tmp_path / "out", "--task", "panoptic", "--opts"]
    with pytest.raises(SystemExit, match="traced for 64 x 96: lower INPUT.MIN_SIZE_TEST"):
        demo.main([*map(str, arguments), "MODEL.DEVICE", "cpu"])
    demo.main([*map(str, arguments), "INPUT.MIN_SIZE_TEST", "40", "INPUT.MAX_SIZE_TEST", "64"])
    assert Image.open(tmp_path / "out/a.png").size == (64, 96)


@pytest.mark.parametrize("task", ["instance", "panoptic", "semantic"])
def test_postprocessing_in_the_file(predictor, tmp_path, task):
    path = traced(predictor, tmp_path, postprocess=task)
    content = json.loads((tmp_path / "model.ts.json").read_text())
    assert content["parity"]["within"]
    assert content["inputs"][0]["shape"] == [1, 3, 64, 96]
    with pytest.raises(ValueError, match="--postprocess none to predict and evaluate"):
        load_exported(path)


def test_reduced_precision(predictor, tmp_path):
    path = traced(predictor, tmp_path, precision="fp16")
    rows = read_description(path).parity["rows"]
    assert 0 < max(row["difference"] for row in rows) < 0.5
    # The model itself is as it was.
    assert all(x.dtype == torch.float32 for x in predictor.model.parameters())


def test_too_large_a_difference_is_an_error(predictor, tmp_path):
    with pytest.raises(ParityError, match="NOT 1e-09"):
        traced(predictor, tmp_path, precision="bf16", tolerance=1e-9)
    rows = read_description(str(tmp_path / "model.ts")).parity["rows"]
    assert max(row["difference"] for row in rows) < 0.5


def test_description_is_enough(predictor, traced_file, tmp_path):
    path = traced_file
    content = json.loads((tmp_path / "model.ts.json").read_text())
    assert content["class_names"] == ["a", "b", "c"]
    assert content["pixel_mean"] == predictor.cfg.MODEL.PIXEL_MEAN
    assert [output["name"] for output in content["outputs"]] == ["pred_logits", "pred_masks"]
    (tmp_path / "model.ts.json").write_text("{}")
    with pytest.raises(ValueError, match=r"model.ts.json cannot be read"):
        load_exported(path)
    (tmp_path / "model.ts.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"model.ts.json does not exist"):
        load_exported(path)


def test_damaged_file(predictor, traced_file, tmp_path):
    path = traced_file
    (tmp_path / "model.ts").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="cannot be loaded as torchscript"):
        load_exported(path)


def test_model_for_evaluation(predictor, traced_file, tmp_path):
    path = traced_file
    cfg = predictor.cfg.clone()
    image = torch.randint(0, 256, (3, 64, 96)).float()
    exported = build_exported_model(path, cfg)
    with torch.no_grad():
        own, live = exported([{"image": image}])[0], predictor.model([{"image": image}])[0]
    assert torch.equal(own["panoptic_seg"][0], live["panoptic_seg"][0])
    with pytest.raises(ValueError, match="cannot be trained"):
        exported.train()
    cfg.INPUT.FORMAT = "BGR"
    with pytest.raises(ValueError, match="INPUT.FORMAT RGB, but the config has BGR"):
        build_exported_model(path, cfg)
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 4
    with pytest.raises(ValueError, match="predicts 3 classes, but"):
        build_exported_model(path, cfg)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"format": "tflite"}, "format is 'tflite'; allowed: torch, aoti, onnx, torchscript"),
        ({"format": "onnx", "op": "custom"}, "do not have this project's op"),
        ({"format": "onnx", "opset": 16}, "opset is 16; it must be at least 17"),
        ({"format": "onnx", "precision": "bf16"}, "onnxruntime lacks"),
        ({"format": "torch", "precision": "int8"}, "int8 is for format onnx"),
        ({"format": "torchscript"}, "traced for one image size: give a size"),
        ({"batch": 0}, "batch is 0"),
    ],
)
def test_options_are_checked(options, text):
    with pytest.raises(ValueError, match=text):
        ExportOptions(**options)


def test_what_cannot_be_exported(predictor, tmp_path):
    options = ExportOptions(format="torchscript", size=(64, 100))
    with pytest.raises(ValueError, match=r"size is 64x100, but .* multiples of 32"):
        export_model(predictor, tmp_path / "model.ts", options)
    with pytest.raises(ValueError, match=r"does not end in .onnx"):
        export_model(predictor, tmp_path / "model.ts", ExportOptions(format="onnx"))
    predictor.model = torch.nn.Identity()
    with pytest.raises(ValueError, match="a Identity cannot be exported: only"):
        export_model(predictor, tmp_path / "model.pt2", ExportOptions())


def test_size_rule():
    rule = SizeRule(divisor=32, smallest=64, largest=256)
    rule.check((7, 3, 64, 256))
    with pytest.raises(ValueError, match="height is 65, but .* multiples of 32 from 64 to 256"):
        rule.check((1, 3, 65, 64))
    with pytest.raises(ValueError, match="width is 288"):
        rule.check((1, 3, 64, 288))
    fixed = SizeRule(32, 32, 256, (64, 96), 2)
    with pytest.raises(ValueError, match="traced for batches of 2 and 64 x 96 pixels only"):
        fixed.check((1, 3, 64, 96))


def test_differences_of_large_logits_are_relative():
    assert Difference((1, 64, 64), "pred_masks", 9e-5, 0.5).is_within(1e-4)
    assert not Difference((1, 64, 64), "pred_masks", 2e-4, 0.5).is_within(1e-4)
    assert Difference((1, 64, 64), "pred_masks", 2e-4, 50.0).is_within(1e-4)


def test_parity_sizes_are_smaller_and_larger_than_the_example():
    assert parity_shapes(SizeRule(32, 64, 4096), (128, 192)) == [
        (1, 128, 192),
        (2, 224, 160),
        (3, 64, 128),
    ]
    assert parity_shapes(SizeRule(32, 64, 160), (128, 160))[1] == (2, 160, 128)
    assert parity_shapes(SizeRule(32, 32, 256, (64, 96), 2), (64, 96)) == [(2, 64, 96)]


def test_a_file_that_does_not_run_for_a_size_is_named():
    def exported(images):
        if images.shape[-1] > 64:
            raise RuntimeError("view size is not compatible\nmore")
        return {"pred_masks": images}

    def model(images):
        return [images]

    measure(model, exported, [(1, 64, 64)], 3, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"not run for 2 images of 64 x 96 pixels: view size is"):
        measure(model, exported, [(2, 64, 96)], 3, torch.device("cpu"))


def test_fused_attention_as_onnx(tmp_path):
    """Its outputs are laid out otherwise than those of the products that take its place."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    attention = nn.Sequential(nn.Flatten(1, 2), WindowAttention(24, (3, 3), num_heads=3)).eval()
    windows, others = torch.randn(5, 1, 9, 24), torch.randn(12, 1, 9, 24)
    free = ({0: torch.export.Dim("windows", min=1, max=64)},)
    with torch.no_grad():
        program = torch.export.export(attention, (windows,), dynamic_shapes=free)
        expected = attention(others)
    path = str(tmp_path / "attention.onnx")
    save_onnx(program, path, ("attended",), ExportOptions(format="onnx"))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (attended,) = session.run(None, {"images": others.numpy()})
    torch.testing.assert_close(torch.from_numpy(attended), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cause", [AssertionError(), AssertionError("no view\nof that")])
def test_translation_fails(monkeypatch, tmp_path, cause):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    def fail(*args, **options):
        raise torch.onnx.errors.OnnxExporterError("step 2/3") from cause

    monkeypatch.setattr(torch.onnx, "export", fail)
    message = f"cannot translate this program: {'no view' if str(cause) else 'step 2/3'}$"
    with pytest.raises(ValueError, match=message):
        save_onnx(None, str(tmp_path / "a.onnx"), ("x",), ExportOptions(format="onnx"))
    assert not list(tmp_path.iterdir())
