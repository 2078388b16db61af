"""Small files of other tools given as COCO JSON: each error names the format and the way out."""

import json

import own_data
import pytest

from mask2former.data.formats.coco_instances import read_instances
from mask2former.data.formats.coco_panoptic import read_panoptic
from mask2former.data.formats.findings import Findings

VIA_IMAGE = {
    "filename": "a.jpg",
    "size": 9,
    "regions": [{"shape_attributes": {"name": "rect", "x": 1}, "region_attributes": {}}],
    "file_attributes": {},
}
LABELME = {"version": "5.0", "flags": {}, "shapes": [], "imagePath": "a.jpg", "imageHeight": 8}
CVAT = """<?xml version="1.0" encoding="utf-8"?>
<annotations><version>1.1</version><image id="0" name="a.jpg"/></annotations>"""
VOC = "<annotation><folder>images</folder><filename>a.jpg</filename></annotation>"
YAML = "train: ../train/images\nval: ../val/images\n\nnc: 2\nnames: ['cup', 'plate']\n"
SAMPLES = {
    "VIA project": (
        {"_via_settings": {}, "_via_img_metadata": {}},
        r"is .* \(VIA\), not COCO JSON; read it with TYPE: via in DATASETS\.CUSTOM\.$",
    ),
    "VIA export": ({"a.jpg9": VIA_IMAGE}, r"is .* \(VIA\), not COCO JSON; read it with TYPE: via"),
    "VIA 3": (
        {"project": {}, "config": {}, "file": {}, "metadata": {}, "view": {}},
        r"is .* \(VIA\), version 3, not COCO JSON; export",
    ),
    "VIA CSV": ("#filename,file_size,file_attributes\na.jpg,9,{}\n", "is a CSV table; export or"),
    "LabelMe": (LABELME, "is .*, not COCO JSON; read its folder with TYPE: labelme in DATASETS"),
    "list of LabelMe": ([LABELME], "is a list of LabelMe files; export or"),
    "YOLO boxes": ("0 0.5 0.5 0.25 0.25\n1 0.1 0.2 0.3 0.4\n", "is a label file of YOLO, which"),
    "YOLO polygons": ("2 0.1 0.1 0.5 0.1 0.5 0.5\n", "is a label file of YOLO, which has one"),
    "YOLO data.yaml": (YAML, r"is a data\.yaml of YOLO, .* files; read it with TYPE: yolo in"),
    "CVAT": (CVAT, r"is XML of CVAT; read it with TYPE: cvat in DATASETS\.CUSTOM\.$"),
    "Pascal VOC": (VOC, "is XML of Pascal VOC, which holds the boxes of one image; read the fo"),
    "Supervisely": (
        {"description": "", "tags": [], "size": {"height": 8, "width": 12}, "objects": []},
        "is a file of Supervisely, which holds one image",
    ),
    "Supervisely meta": (
        {"classes": [], "tags": []},
        r"is the meta\.json of a Supervisely project",
    ),
    "Label Studio": ([{"id": 1, "data": {}, "annotations": []}], "is an export of Label Studio"),
    "BDD100K": ([{"name": "a.jpg", "labels": []}], "is a file of Scalabel or BDD100K"),
    "Datumaro": ({"info": {}, "categories": {}, "items": []}, "is a file of Datumaro"),
    "Cityscapes": ({"imgHeight": 8, "imgWidth": 12, "objects": []}, "is a file of Cityscapes"),
    "JSON lines": ('{"image": 1}\n{"image": 2}\n', "is a list of JSON lines"),
    "zip": ("PK\x03\x04...", "is a zip archive; unpack it and name the JSON in it"),
    "GeoJSON": ({"type": "FeatureCollection", "features": []}, "is GeoJSON, not COCO JSON"),
    "COCO results": (
        [{"image_id": 1, "category_id": 1, "segmentation": {}, "score": 0.5}],
        "is a list of predictions",
    ),
    "captions": (
        {
            "images": [{"id": 1, "file_name": "a.jpg", "height": 8, "width": 12}],
            "annotations": [{"id": 1, "image_id": 1, "caption": "A cup."}],
        },
        "is COCO captions JSON, which has no masks",
    ),
}


@pytest.mark.parametrize("sample", SAMPLES)
def test_named_formats(tmp_path, sample):
    content, message = SAMPLES[sample]
    file = tmp_path / "given"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    findings = Findings()
    assert read_instances(str(file), str(tmp_path), findings) is None
    with pytest.raises(ValueError, match=rf"^{file} {message}"):
        findings.raise_first()
    findings = Findings()
    read_panoptic(str(file), findings)
    with pytest.raises(ValueError, match=rf"^{file} "):
        findings.raise_first()


def test_the_other_task(tmp_path):
    own_data.instances(tmp_path)
    own_data.panoptic(tmp_path)
    findings = Findings()
    assert read_instances(str(tmp_path / "panoptic.json"), str(tmp_path), findings) is None
    assert (
        "is COCO panoptic JSON, not instance JSON; register it as pan" in findings.problems[0].why
    )
    findings = Findings()
    assert read_panoptic(str(tmp_path / "instances.json"), findings) is None
    assert (
        "is COCO instance JSON, not panoptic JSON; register it as inst" in findings.problems[0].why
    )


def test_folder(tmp_path):
    """As Roboflow exports it: images and JSON in one folder."""
    (tmp_path / "_annotations.coco.json").write_text("{}")
    findings = Findings()
    assert read_instances(str(tmp_path), str(tmp_path), findings) is None
    with pytest.raises(
        ValueError, match=r"is a folder; name the JSON in it, such as _annotations\."
    ):
        findings.raise_first()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(categories=[]), "lists no categories; for masks without classes list"),
        (lambda c: c.pop("categories"), "has no list 'categories'"),
        (
            lambda c: c["categories"][1].update(name=c["categories"][0]["name"]),
            "categories: name 'cup' occurs more than once; each class needs its own",
        ),
        (
            lambda c: [a.update(category_id=0) for a in c["annotations"]],
            "has category_id 0, which is not one of the categories",
        ),
        (
            lambda c: [a.pop("segmentation") for a in c["annotations"]],
            "no annotation has a segmentation: .* boxes or keypoints only",
        ),
        (
            lambda c: [a.update(segmentation=[]) for a in c["annotations"]],
            "no annotation has a segmentation: .* boxes or keypoints only",
        ),
    ],
)
def test_coco_without_classes_or_masks(tmp_path, change, message):
    content = own_data.instances(tmp_path)
    change(content)
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(content))
    findings = Findings()
    read_instances(str(file), str(tmp_path / "images"), findings)
    with pytest.raises(ValueError, match=message):
        findings.raise_first()
