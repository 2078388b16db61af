"""The same data in every format: recognised, read alike, and trained like COCO instance JSON."""

import annotation_samples as samples
import pycocotools.mask as mask_utils
import pytest
from dataset_trees import photograph, write_json
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.projects.deeplab import add_deeplab_config
from PIL import Image

from mask2former import add_maskformer2_config
from mask2former.data.dataset_mappers import build_mapper
from mask2former.data.datasets.register_custom import register_instances
from mask2former.data.formats.annotated_images import coco_instances, image_folder
from mask2former.data.formats.annotation_formats import FORMATS, ReadOptions, recognise_format

NO_OPTIONS = ReadOptions()
every_format = pytest.mark.parametrize("name", list(FORMATS))


@pytest.fixture(autouse=True)
def catalogs(monkeypatch):
    for catalog in (DatasetCatalog, MetadataCatalog):
        monkeypatch.setattr(catalog, "data", dict(catalog.data))


def read(name, root, **options):
    samples.SAMPLES[name](root)
    return FORMATS[name].read(root, ReadOptions(**options))


def test_names():
    assert all(item.name == name for name, item in FORMATS.items())
    assert FORMATS.keys() == samples.SAMPLES.keys()


@every_format
def test_the_same_content(tmp_path, name):
    content = read(name, tmp_path)
    assert content.classes == samples.CLASSES
    first, second = content.images
    assert [image.path.stem for image in content.images] == ["a", "b"]
    assert (first.height, first.width) == (8, 12)
    assert second.objects == []
    coco = coco_instances(content, image_folder(content))
    assert [(a["category_id"], a["area"]) for a in coco["annotations"]] == [(1, 32), (2, 16)]
    assert [a["bbox"] for a in coco["annotations"]] == [[0, 0, 4, 8], [4, 0, 4, 4]]
    assert [c["name"] for c in coco["categories"]] == samples.CLASSES
    assert [image["file_name"] for image in coco["images"]] == ["a.jpg", "b.jpg"]


@every_format
def test_trains(tmp_path, name):
    """The COCO JSON of each format goes through registration and mapper."""
    content = read(name, tmp_path / "data")
    root = image_folder(content)
    write_json(tmp_path / "instances.json", coco_instances(content, root))
    register_instances(f"own_{name}", str(root), str(tmp_path / "instances.json"))
    first, second = DatasetCatalog.get(f"own_{name}")
    assert second["annotations"] == []
    cfg = get_cfg()
    add_deeplab_config(cfg)
    add_maskformer2_config(cfg)
    cfg.DATASETS.TRAIN = (f"own_{name}",)
    cfg.INPUT.DATASET_MAPPER_NAME = "mask_former_instance"
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (8,), 12
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.INPUT.SIZE_DIVISIBILITY = -1
    cfg.INPUT.CROP.ENABLED = False
    cfg.INPUT.COLOR_AUG_SSD = False
    instances = build_mapper(cfg)(first)["instances"]
    assert instances.gt_classes.tolist() == [0, 1]
    assert instances.gt_masks.sum((1, 2)).tolist() == [32, 16]


@every_format
def test_recognised(tmp_path, name):
    """Also beside files of other kinds."""
    samples.SAMPLES[name](tmp_path)
    for extra in ("README.md", "notes.json", "broken.json", "other.yaml", "empty.xml", ".x.json"):
        (tmp_path / extra).write_text('{"a": 1}' if extra == "notes.json" else "text: [")
    found, what = recognise_format(tmp_path)
    assert found is FORMATS[name]
    assert what


FILES = {
    "yolo": "data.yaml",
    "labelme": "a.json",
    "via": "via_project.json",
    "cvat": "annotations.xml",
    "coco": "annotations/instances_default.json",
}


@pytest.mark.parametrize("name", FILES)
def test_a_file(tmp_path, name):
    samples.SAMPLES[name](tmp_path)
    assert recognise_format(tmp_path / FILES[name])[0] is FORMATS[name]
    content = FORMATS[name].read(tmp_path / FILES[name], NO_OPTIONS)
    assert len(content.images[0].objects) == 2


def test_nothing_is_recognised(tmp_path):
    photograph(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"holds no annotations of a known format\. Known: yolo"):
        recognise_format(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        recognise_format(tmp_path / "absent")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "train.csv",
            "ImageId,EncodedPixels\na.jpg,1 2\n",
            "train.csv seems to be a CSV table",
        ),
        ("meta.json", '{"classes": [], "tags": []}', "meta.json of a Supervisely project"),
        ("tasks.json", '[{"data": {}, "annotations": []}]', "an export of Label Studio"),
        ("a.xml", "<annotation></annotation>", "XML of Pascal VOC, which holds the boxes"),
        ("a.json", "{broken", "known format. Known: yolo"),
        ("a.json", "3", "known format. Known: yolo"),
    ],
)
def test_other_formats_are_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    for root in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match=message):
            recognise_format(root)


def test_two_formats(tmp_path):
    samples.labelme(tmp_path)
    samples.cvat(tmp_path)
    with pytest.raises(ValueError, match="more than one format .labelme: .*; cvat: .*State its"):
        recognise_format(tmp_path)


@every_format
def test_missing_image(tmp_path, name):
    samples.SAMPLES[name](tmp_path)
    for path in tmp_path.rglob("a.jpg"):
        path.unlink()
    message = r"\ba\b.* not exist|masks of an image|has no image of its"
    with pytest.raises(FileNotFoundError, match=message):
        FORMATS[name].read(tmp_path, NO_OPTIONS)


@every_format
def test_damaged_image(tmp_path, name):
    samples.SAMPLES[name](tmp_path)
    for path in tmp_path.rglob("a.jpg"):
        path.write_text("no image")
    with pytest.raises(ValueError, match=r"a\.jpg cannot be read as an image"):
        FORMATS[name].read(tmp_path, NO_OPTIONS)


@pytest.mark.parametrize("name", ["labelme", "cvat", "voc", "mask_files", "coco"])
def test_other_size(tmp_path, name):
    """The annotation states or has another size than the image."""
    samples.SAMPLES[name](tmp_path)
    for path in tmp_path.rglob("a.jpg"):
        photograph(path, 20, 10)
    with pytest.raises(ValueError, match=r"12 x 8 pixels, but .*a\.jpg has 20 x 10"):
        FORMATS[name].read(tmp_path, NO_OPTIONS)


@every_format
def test_orientation(tmp_path, name):
    """Annotations belong to the image as shown, as in the tools."""
    samples.SAMPLES[name](tmp_path)
    for path in tmp_path.rglob("*.jpg"):
        image = Image.open(path).transpose(Image.Transpose.ROTATE_90)
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(path, exif=exif)
    content = FORMATS[name].read(tmp_path, NO_OPTIONS)
    assert [(image.height, image.width) for image in content.images] == [(8, 12)] * 2
    areas = [
        int(mask_utils.area(mask_utils.merge(mask_utils.frPyObjects(item.segmentation, 8, 12))))
        if isinstance(item.segmentation, list)
        else int(mask_utils.area(item.segmentation))
        for item in content.images[0].objects
    ]
    assert areas == [32, 16]
