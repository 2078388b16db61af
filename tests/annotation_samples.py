"""Writes the same small data set in the layout of each labelling tool.

Images a.jpg and b.jpg have 12 x 8 pixels. Image a has a cup of 4 x 8 pixels in its left third and a
plate of 4 x 4 pixels at the top of the middle third; image b has no object.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from dataset_trees import HEIGHT, WIDTH, photograph, save, write_json
from PIL import Image

CLASSES = ["cup", "plate"]
CUP = [[0, 0], [4, 0], [4, 8], [0, 8]]
PLATE = [[4, 0], [8, 0], [8, 4], [4, 4]]
AREAS = {"cup": 32, "plate": 16}


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def images(folder: Path, *names: str) -> None:
    for name in names or ("a.jpg", "b.jpg"):
        photograph(folder / name)


def yolo(root: Path) -> None:
    """As Ultralytics documents it."""
    images(root / "images" / "train")
    write_text(
        root / "data.yaml",
        "path: .\ntrain: images/train\nval:\n\nnames:\n  0: cup\n  1: plate\n",
    )
    lines = [
        f"{label} " + " ".join(f"{x / WIDTH:.6f} {y / HEIGHT:.6f}" for x, y in points)
        for label, points in enumerate((CUP, PLATE))
    ]
    write_text(root / "labels" / "train" / "a.txt", "\n".join(lines) + "\n")
    write_text(root / "labels" / "train" / "b.txt", "")


def labelme_shape(label: str, points: list, kind: str = "polygon", **keys) -> dict:
    shape = {"label": label, "points": points, "group_id": None, "description": ""}
    return shape | {"shape_type": kind, "flags": {}, "mask": None} | keys


def labelme_json(path: Path, shapes: list[dict], **keys) -> None:
    content = {
        "version": "5.4.1",
        "flags": {},
        "shapes": shapes,
        "imagePath": path.with_suffix(".jpg").name,
        "imageData": None,
        "imageHeight": HEIGHT,
        "imageWidth": WIDTH,
    }
    write_json(path, content | keys)


def labelme(root: Path) -> None:
    images(root)
    shapes = [labelme_shape("cup", CUP), labelme_shape("plate", PLATE)]
    labelme_json(root / "a.json", shapes)
    labelme_json(root / "b.json", [])


def via_region(class_name: str | None, shape: list | dict, **attributes) -> dict:
    if isinstance(shape, list):
        xs, ys = (list(values) for values in zip(*shape, strict=True))
        shape = {"name": "polygon", "all_points_x": xs, "all_points_y": ys}
    attributes |= {} if class_name is None else {"kind": class_name}
    return {"shape_attributes": shape, "region_attributes": attributes}


def via_image(name: str, regions: list | dict) -> dict:
    return {"filename": name, "size": 9, "regions": regions, "file_attributes": {}}


def via_project(entries: list[dict]) -> dict:
    option = {"type": "dropdown", "options": {"cup": "", "plate": ""}, "default_options": {}}
    return {
        "_via_settings": {"core": {"default_filepath": ""}, "project": {"name": "p"}},
        "_via_img_metadata": {f"{item['filename']}9": item for item in entries},
        "_via_attributes": {"region": {"kind": option}, "file": {}},
        "_via_data_format_version": "2.0.10",
        "_via_image_id_list": [f"{item['filename']}9" for item in entries],
    }


def via(root: Path) -> None:
    images(root)
    regions = [via_region("cup", CUP), via_region("plate", PLATE)]
    write_json(
        root / "via_project.json",
        via_project([via_image("a.jpg", regions), via_image("b.jpg", [])]),
    )


def cvat_xml(*entries: str, labels: tuple[str, ...] = ("cup", "plate")) -> str:
    named = "".join(
        f"<label><name>{label}</name><color>#ff0000</color><type>any</type>"
        "<attributes></attributes></label>"
        for label in labels
    )
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<version>1.1</version>\n'
        f"<meta><job><id>1</id><size>2</size><mode>annotation</mode><labels>{named}</labels></job>"
        f"<dumped>2024-01-01</dumped></meta>\n{''.join(entries)}</annotations>\n"
    )


def cvat_image(name: str, shapes: str = "", **attributes) -> str:
    more = "".join(f' {key}="{value}"' for key, value in attributes.items())
    return (
        f'<image id="0" name="{name}" width="{WIDTH}" height="{HEIGHT}"{more}>\n{shapes}</image>\n'
    )


def cvat_shape(kind: str, label: str, **attributes) -> str:
    attributes = {"label": label, "source": "manual", "occluded": "0", **attributes}
    listed = " ".join(f'{key}="{value}"' for key, value in attributes.items())
    return f"<{kind} {listed}>\n</{kind}>\n"


def cvat_polygon(label: str, points: list, **attributes) -> str:
    text = ";".join(f"{x:.2f},{y:.2f}" for x, y in points)
    return cvat_shape("polygon", label, points=text, **{"z_order": "0"} | attributes)


def cvat(root: Path) -> None:
    images(root / "images")
    shapes = cvat_polygon("cup", CUP) + cvat_polygon("plate", PLATE)
    text = cvat_xml(cvat_image("a.jpg", shapes), cvat_image("b.jpg"))
    write_text(root / "annotations.xml", text)


def array(cup: int, plate: int) -> np.ndarray:
    values = np.zeros((HEIGHT, WIDTH), np.uint8)
    values[:, :4], values[:4, 4:8] = cup, plate
    return values


def save_palette(path: Path, values: np.ndarray, colours: list[tuple[int, int, int]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values, mode="L").convert("P")
    image.putdata(values.ravel().tolist())
    listed = [value for colour in colours for value in colour]
    image.putpalette(listed + [7] * (768 - len(listed)))  # fewer entries would be fewer bits
    image.save(path)


def voc(root: Path) -> None:
    """As CVAT exports it; with images and two lists."""
    images(root / "JPEGImages")
    colours = {"cup": (250, 50, 83), "plate": (51, 221, 255)}
    lines = [f"{name}:{','.join(map(str, colour))}::" for name, colour in colours.items()]
    text = "\n".join(("# label:color_rgb:parts:actions", "background:0,0,0::", *lines))
    write_text(root / "labelmap.txt", text)
    classes = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    classes[:, :4], classes[:4, 4:8] = colours["cup"], colours["plate"]
    objects = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    objects[:, :4], objects[:4, 4:8] = (128, 0, 0), (0, 128, 0)
    for folder, pixels in (("SegmentationClass", classes), ("SegmentationObject", objects)):
        save(root / folder / "a.png", pixels)
        save(root / folder / "b.png", np.zeros_like(pixels))
    write_text(root / "ImageSets" / "Segmentation" / "default.txt", "a\nb\n")


def mask_files(root: Path) -> None:
    images(root / "images")
    save(root / "masks" / "a" / "cup" / "1.png", array(255, 0))
    save(root / "masks" / "a" / "plate" / "1.png", array(0, 255))


def coco_content(annotations: list[dict], *, names: tuple[str, ...] = ("a.jpg", "b.jpg")) -> dict:
    """A COCO JSON as CVAT and Datumaro write it."""
    keys = {"license": 0, "flickr_url": "", "coco_url": "", "date_captured": 0}
    return {
        "licenses": [{"name": "", "id": 0, "url": ""}],
        "info": dict.fromkeys(
            ("contributor", "date_created", "description", "url", "version", "year"), ""
        ),
        "categories": [
            {"id": i, "name": name, "supercategory": ""} for i, name in enumerate(CLASSES, 1)
        ],
        "images": [
            {"id": i, "width": WIDTH, "height": HEIGHT, "file_name": name} | keys
            for i, name in enumerate(names, 1)
        ],
        "annotations": annotations,
    }


def coco_annotation(number: int, category: int, segmentation: list | dict, **keys) -> dict:
    annotation = {"id": number, "image_id": 1, "category_id": category, "iscrowd": 0}
    annotation |= {"segmentation": segmentation, "bbox": [0, 0, 4, 8], "area": 32.0}
    return annotation | {"attributes": {"occluded": False}} | keys


def flat(points: list) -> list:
    return [value for point in points for value in point]


def coco(root: Path) -> None:
    images(root / "images" / "default")
    annotations = [
        coco_annotation(1, 1, [flat(CUP)]),
        coco_annotation(2, 2, [flat(PLATE)]),
    ]
    write_json(root / "annotations" / "instances_default.json", coco_content(annotations))


SAMPLES: dict[str, Callable[[Path], None]] = {
    "yolo": yolo,
    "labelme": labelme,
    "via": via,
    "cvat": cvat,
    "voc": voc,
    "mask_files": mask_files,
    "coco": coco,
}


def change_json(path: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
