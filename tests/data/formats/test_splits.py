"""Names of splits, and finding images by what annotations state."""

import pytest
from dataset_trees import photograph

from mask2former.data.formats.splits import (
    ImageFinder,
    choose_split,
    files_below,
    images_below,
    same_split,
    split_folder,
)


def test_same_split():
    assert same_split("val", "valid")
    assert same_split("Validation", "val")
    assert same_split("fold1", "Fold1")
    assert not same_split("train", "val")
    assert not same_split("fold1", "fold2")


def test_choose_split():
    assert choose_split({"only": 1}, None, "x") == 1
    assert choose_split({"valid": 1, "val": 2}, "val", "x") == 2
    assert choose_split({"train": 1, "valid": 2}, "val", "x") == 2
    with pytest.raises(ValueError, match="x has the splits a, b; state which to read"):
        choose_split({"a": 1, "b": 2}, None, "x")
    with pytest.raises(ValueError, match="x has no split 'test', only a"):
        choose_split({"a": 1}, "test", "x")


def test_split_folder(tmp_path):
    (tmp_path / "train").mkdir()
    assert split_folder(tmp_path, None) == tmp_path  # one such folder may mean anything
    (tmp_path / "valid").mkdir()
    assert split_folder(tmp_path, "val") == tmp_path / "valid"
    with pytest.raises(ValueError, match="has the splits train, valid; state"):
        split_folder(tmp_path, None)
    with pytest.raises(ValueError, match="no folder of the split 'test'; its folders are train,"):
        split_folder(tmp_path, "test")
    with pytest.raises(ValueError, match="it has no folders"):
        split_folder(tmp_path / "train", "test")


def test_hidden_files_are_left_out(tmp_path):
    for name in ("b.JPG", "a.png", "c.txt", "._a.png", ".x/a.png", "__MACOSX/a.png", "x/a.webp"):
        photograph(tmp_path / "a.png")
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((tmp_path / "a.png").read_bytes())
    names = [path.relative_to(tmp_path).as_posix() for path in images_below(tmp_path)]
    assert names == ["a.png", "b.JPG", "x/a.webp"]
    assert files_below(tmp_path, ".txt") == [tmp_path / "c.txt"]


def test_finder(tmp_path):
    for name in ("one/a.jpg", "two/a.jpg", "two/b.jpg", "two/sub/c.jpg", "v.1.png"):
        photograph(tmp_path / name)
    finder = ImageFinder([None, tmp_path / "one", tmp_path / "two"], tmp_path)
    for stated, expected in (
        ("a.jpg", "one/a.jpg"),
        ("b.jpg", "two/b.jpg"),
        ("../x/b.jpg", "two/b.jpg"),
        ("D:\\x\\b.jpg", "two/b.jpg"),
        ("sub\\c.jpg", "two/sub/c.jpg"),
        ("c.jpg", "two/sub/c.jpg"),
        ("two/a.jpg", "two/a.jpg"),
        ("b", "two/b.jpg"),
    ):
        assert finder.find(stated) == tmp_path / expected, stated
    assert finder.find("a.jpg", [tmp_path / "two"]) == tmp_path / "two" / "a.jpg"
    assert ImageFinder([tmp_path]).find("v.1") == tmp_path / "v.1.png"
    with pytest.raises(FileNotFoundError, match=r"the image 'x/b\.jpg' does not exist; looked in"):
        finder.find("x/b.jpg")
    with pytest.raises(ValueError, match=r"the image 'a\.jpg' is not unique: .*one/a\.jpg, .*two"):
        ImageFinder([], tmp_path).find("a.jpg")
    with pytest.raises(ValueError, match="the name of the image is '/'"):
        finder.find("/")
