"""The number of classes follows from your own data and is compared with that of every data set."""

import re
from pathlib import Path

import own_data
import pytest
import yaml
from dataset_trees import write_json
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import default_argument_parser
from detectron2.modeling import META_ARCH_REGISTRY

from mask2former.config import load_config
from mask2former.data.class_counts import check_class_counts, class_names
from mask2former.launch import launch
from mask2former.maskformer_model import MaskFormer

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
DATA = ROOT.parent / "shared" / "data"
BASE = CONFIGS / "shapes/panoptic-segmentation/maskformer2_R18_quickstart.yaml"


@pytest.fixture(autouse=True)
def catalogs(monkeypatch):
    """Names that a test registers are gone afterwards."""
    for catalog in (DatasetCatalog, MetadataCatalog):
        monkeypatch.setattr(catalog, "data", dict(catalog.data))


def write_config(folder, entries, train, test, base=BASE, **others):
    content = {
        "_BASE_": str(base),
        "DATASETS": {"CUSTOM": entries, "TRAIN": train, "TEST": test},
        "MODEL": {"DEVICE": "cpu"},
        **others,
    }
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.fixture
def panoptic_config(tmp_path):
    own_data.panoptic(tmp_path)
    own_data.instances(tmp_path)
    entries = [
        own_data.entry("panoptic", tmp_path),
        own_data.entry("panoptic", tmp_path, "own_val"),
        own_data.entry("instance", tmp_path, "own_instances"),
    ]
    return write_config(tmp_path, entries, ["own_train"], ["own_val"])


def test_class_count_follows_the_data(panoptic_config):
    cfg = load_config(panoptic_config)
    assert load_config(str(BASE)).MODEL.SEM_SEG_HEAD.NUM_CLASSES == 10
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 3
    check_class_counts(cfg)
    cfg = load_config(
        panoptic_config, ["DATASETS.TRAIN", "('own_instances',)", "DATASETS.TEST", "()"]
    )
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 2
    check_class_counts(cfg)


def test_ignore_label_follows_too(tmp_path):
    own_data.semantic(tmp_path)
    entries = [own_data.entry("semantic", tmp_path, IGNORE_LABEL=11)]
    path = write_config(tmp_path, entries, ["own_train"], [])
    cfg = load_config(path)
    assert (cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE) == (3, 11)
    cfg = load_config(path, ["MODEL.SEM_SEG_HEAD.IGNORE_VALUE", "255"])
    with pytest.raises(ValueError, match="IGNORE_VALUE is 255, but .*'own_train' has .* label 11"):
        check_class_counts(cfg)


def test_a_list_on_the_command_line(tmp_path):
    own_data.instances(tmp_path)
    entries = [own_data.entry("instance", tmp_path)]
    options = ["DATASETS.CUSTOM", repr(entries), "DATASETS.TRAIN", "('own_train',)"]
    cfg = load_config(str(BASE), options)
    assert cfg.DATASETS.CUSTOM == entries
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 2


def test_the_saved_config_repeats_the_run(panoptic_config, tmp_path):
    cfg = load_config(panoptic_config)
    saved = tmp_path / "config.yaml"
    saved.write_text(cfg.dump())
    for name in ("own_train", "own_val", "own_instances"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    again = load_config(str(saved))
    assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump())
    assert len(DatasetCatalog.get("own_train")) == 3


def test_the_key_exists_only_if_it_was_set():
    cfg = load_config(str(BASE))
    assert "CUSTOM" not in cfg.DATASETS
    assert "CUSTOM" not in load_config(str(BASE), ["DATASETS.CUSTOM", "[]"]).DATASETS


@pytest.mark.parametrize("where", ["options", "file", "merged"])
def test_explicit_and_different(panoptic_config, tmp_path, where):
    options = []
    if where == "options":
        options = ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "5"]
    elif where == "file":
        content = yaml.safe_load(Path(panoptic_config).read_text())
        content["MODEL"]["SEM_SEG_HEAD"] = {"NUM_CLASSES": 5}
        Path(panoptic_config).write_text(yaml.safe_dump(content))
    else:
        text = Path(panoptic_config).read_text()
        merged = "MODEL:\n  <<: {SEM_SEG_HEAD: {NUM_CLASSES: 5}}"
        Path(panoptic_config).write_text(text.replace("MODEL:", merged))
    cfg = load_config(panoptic_config, options)
    expected = (
        r"NUM_CLASSES is 5, but data set 'own_train' of DATASETS\.TRAIN has 3 classes \(cup, "
    )
    with pytest.raises(ValueError, match=expected):
        check_class_counts(cfg)


def test_launch_checks_before_processes_start(panoptic_config):
    arguments = ["--config-file", panoptic_config, "--num-gpus", "2"]
    arguments += ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "5"]
    with pytest.raises(ValueError, match="NUM_CLASSES is 5, but data set 'own_train'"):
        launch(print, default_argument_parser().parse_args(arguments))


def test_splits_with_other_classes(tmp_path):
    content = own_data.panoptic(tmp_path)
    content["categories"][0] = {"id": 3, "name": "mug", "isthing": 1}
    write_json(tmp_path / "mugs.json", content)
    content["categories"] = [*content["categories"], {"id": 11, "name": "fork", "isthing": 1}]
    write_json(tmp_path / "forks.json", content)
    entries = [
        own_data.entry("panoptic", tmp_path),
        own_data.entry("panoptic", tmp_path, "mugs", PANOPTIC_JSON=str(tmp_path / "mugs.json")),
        own_data.entry("panoptic", tmp_path, "forks", PANOPTIC_JSON=str(tmp_path / "forks.json")),
    ]
    cfg = load_config(write_config(tmp_path, entries, ["own_train"], ["mugs"]))
    with pytest.raises(ValueError, match="'own_train' and 'mugs' have different classes: number 0"):
        check_class_counts(cfg)
    cfg = load_config(write_config(tmp_path, entries, ["own_train"], ["forks"]))
    with pytest.raises(
        ValueError, match="'forks' of DATASETS.TEST has 4 .* 'own_train' has 3: all"
    ):
        check_class_counts(cfg)


def test_classes_that_only_one_split_has(tmp_path):
    content = own_data.instances(tmp_path)
    content["categories"] = content["categories"][:1]
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] == 3]
    write_json(tmp_path / "cups.json", content)
    cups = {"INSTANCES_JSON": str(tmp_path / "cups.json")}
    entries = [
        own_data.entry("instance", tmp_path),
        own_data.entry("instance", tmp_path, "v", **cups),
    ]
    base = CONFIGS / "shapes/instance-segmentation/maskformer2_R18_quickstart.yaml"
    cfg = load_config(write_config(tmp_path, entries, ["own_train"], ["v"], base))
    with pytest.raises(ValueError, match="only 'own_train' has 'plate'. CLASSES in each entry of"):
        check_class_counts(cfg)
    for entry in entries:
        entry |= {"NAME": f"{entry['NAME']}2", "CLASSES": ["cup", "plate"]}
    cfg = load_config(write_config(tmp_path, entries, ["own_train2"], ["v2"], base))
    check_class_counts(cfg)
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 2


def test_every_key_is_saved(tmp_path):
    own_data.semantic(tmp_path)
    keys = {"VALUE_MAP": {0: "a", 1: "b", 2: None}, "IGNORE_LABELS": [7], "SHARE": [0.0, 1.0]}
    keys |= {"RENAME": {"b": None}, "SHARE_SEED": 3, "IMAGE_EXT": ["jpg", "png"]}
    entry = own_data.entry("semantic", tmp_path, **keys)
    del entry["CLASSES"]
    cfg = load_config(write_config(tmp_path, [entry], ["own_train"], []))
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 1
    (tmp_path / "saved.yaml").write_text(cfg.dump())
    again = load_config(str(tmp_path / "saved.yaml"))
    assert again.DATASETS.CUSTOM == [entry]


def test_instances_of_the_things_of_a_panoptic_model(panoptic_config):
    """AP on the instance data set of the same things is defined: their ids come first."""
    cfg = load_config(panoptic_config, ["DATASETS.TEST", "('own_val', 'own_instances')"])
    check_class_counts(cfg)
    cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON = False
    with pytest.raises(ValueError, match="'own_instances' of DATASETS.TEST has 2 classes"):
        check_class_counts(cfg)
    coco = load_config(str(CONFIGS / "coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml"))
    coco.DATASETS.TEST = ("coco_2017_val",)
    check_class_counts(coco)


RECIPES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("maskformer*.yaml"))


@pytest.mark.parametrize("path", RECIPES)
def test_recipes_fit_their_data_sets(path):
    cfg = load_config(str(CONFIGS / path))
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        assert len(class_names(name)) == cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, name
    check_class_counts(cfg)


def test_built_in_data_set_and_another_number():
    cfg = load_config(str(BASE), ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "133"])
    with pytest.raises(
        ValueError, match="is 133, but data set 'shapes_train_panoptic'.* 10 classes"
    ):
        check_class_counts(cfg)
    cfg.MODEL.META_ARCHITECTURE = "PanopticFPN"
    check_class_counts(cfg)


def test_data_sets_without_known_classes_pass():
    DatasetCatalog.register("lazy", list)
    MetadataCatalog.get("lazy").evaluator_type = "coco"
    cfg: CfgNode = load_config(str(BASE), ["DATASETS.TRAIN", "('lazy', 'absent')"])
    assert class_names("lazy") is class_names("absent") is None
    check_class_counts(cfg)


def test_unknown_evaluator_types_are_said(caplog):
    DatasetCatalog.register("depth_train", list)
    MetadataCatalog.get("depth_train").evaluator_type = "depth"
    check_class_counts(load_config(str(BASE), ["DATASETS.TRAIN", "('depth_train', 'absent')"]))
    assert "classes of data set 'depth_train' are not compared" in caplog.text
    assert "evaluator_type 'depth', which is unknown" in caplog.text
    assert "absent" not in MetadataCatalog.list()


def test_subclasses_of_the_model_are_checked(monkeypatch):
    monkeypatch.setattr(META_ARCH_REGISTRY, "_obj_map", dict(META_ARCH_REGISTRY._obj_map))

    @META_ARCH_REGISTRY.register()
    class MyFormer(MaskFormer):
        pass

    cfg = load_config(str(BASE), ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "133"])
    cfg.MODEL.META_ARCHITECTURE = "MyFormer"
    with pytest.raises(ValueError, match="NUM_CLASSES is 133, but data set 'shapes_train_pan"):
        check_class_counts(cfg)


@pytest.mark.skipif(not DATA.is_dir(), reason="no real data beside the repository")
def test_configs_of_the_readme(tmp_path, monkeypatch):
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(DATA)
    own_data.yolo(tmp_path / "pets")
    expected = {"pets_train": (3, 2, 255), "nuts_train": (4, 14, 255), "camvid_train": (11, 60, 11)}
    actual = {}
    for i, block in enumerate(blocks):
        path = tmp_path / f"{i}.yaml"
        block = block.replace("ROOT: pets", f"ROOT: {tmp_path}/pets")
        path.write_text(block.replace("_BASE_: configs", f"_BASE_: {CONFIGS}"))
        cfg = load_config(str(path))
        check_class_counts(cfg)
        head, name = cfg.MODEL.SEM_SEG_HEAD, cfg.DATASETS.TRAIN[0]
        actual[name] = (head.NUM_CLASSES, len(DatasetCatalog.get(name)), head.IGNORE_VALUE)
    assert actual == expected
