"""Which images a split has, and what becomes of classes."""

import pytest

from mask2former.data.datasets.selection import Selection, hash_of, make_selection, map_classes

NAMES = [f"{folder}/{i:03}.jpg" for folder in "ab" for i in range(100)]


@pytest.mark.parametrize("cuts", [(0.0, 0.8, 1.0), (0.0, 0.5, 0.7, 1.0)])
@pytest.mark.parametrize("seed", [0, 7])
def test_shares_are_disjoint_and_together_whole(cuts, seed):
    parts = [
        make_selection("d", [low, high], seed, None).choose(NAMES, "d")
        for low, high in zip(cuts, cuts[1:], strict=False)
    ]
    assert sum(map(len, parts)) == len(NAMES)
    assert set().union(*parts) == set(NAMES)
    assert abs(len(parts[0]) / len(NAMES) - cuts[1]) < 0.1


def test_hashes_depend_on_name_and_seed_only():
    assert hash_of("a/000.jpg", 0) == hash_of("a/000.jpg", 0) != hash_of("a/000.jpg", 1)
    assert all(0 <= hash_of(name, 3) < 1 for name in NAMES)
    # Frozen: another function would move images between training and validation.
    assert hash_of("a.jpg", 0) == pytest.approx(0.17619180501331777, abs=1e-12)
    whole = Selection((0.0, 0.5)).choose(NAMES, "d")
    assert Selection((0.0, 0.5)).choose([*NAMES, "new.jpg"], "d") - {"new.jpg"} == whole


@pytest.mark.parametrize(
    "share", [[0.5, 0.5], [0.8, 0.2], [-0.1, 0.5], [0, 1.1], [0.5], [0, 0.5, 1], [0, float("nan")]]
)
def test_wrong_shares(share):
    with pytest.raises(ValueError, match=r"'d': SHARE is .* 0 <= low < high <= 1"):
        make_selection("d", share, 0, None)


def test_share_without_image():
    low = hash_of("a.jpg", 0) + 1e-9
    with pytest.raises(ValueError, match="holds none of the 1 images.*SHARE_SEED"):
        Selection((low, low + 1e-9)).choose(["a.jpg"], "d")


def listed(tmp_path, text, images):
    file = tmp_path / "list.txt"
    file.write_text(text)
    return make_selection("d", None, 0, str(file)).choose(images, "Data set 'd'")


@pytest.mark.parametrize(
    "line", ["a/000.jpg", "a/000", "./a/000.jpg", "../data/a/000.jpg", "/x/y/a/000", "a\\000.jpg"]
)
def test_names_in_a_list(tmp_path, line):
    assert listed(tmp_path, f"\n{line}\n{line}\n", NAMES) == {"a/000.jpg"}


def test_a_name_is_the_end_of_a_path(tmp_path):
    assert listed(tmp_path, "c.jpg\nd", ["a/c.jpg", "a/b/d.png"]) == {"a/c.jpg", "a/b/d.png"}
    # A whole path counts before the end of another.
    assert listed(tmp_path, "c.jpg", ["c.jpg", "a/c.jpg"]) == {"c.jpg"}
    assert listed(tmp_path, "c", ["c.jpg", "a/c.jpg"]) == {"c.jpg"}


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("000.jpg", ValueError, "'000.jpg' may be a/000.jpg or b/000.jpg"),
        ("c/000.jpg", FileNotFoundError, r"names 'c/000.jpg'.*\(1 of 1 names are not\)\. Close"),
        ("a/000.jpg\nzzz\nyyy", FileNotFoundError, r"names 'zzz'.*\(2 of 3 .* example, a/000"),
        ("\n \n", ValueError, "names no image"),
    ],
)
def test_wrong_lists(tmp_path, text, error, message):
    with pytest.raises(error, match=message):
        listed(tmp_path, text, NAMES)


def test_lists_with_more_columns(tmp_path):
    """As of Oxford-IIIT Pet (classes) and CamVid (labels); a name with a space stays whole."""
    file = tmp_path / "list.txt"
    file.write_text("a/000 1 1 1\n/set/b/001.jpg /set/labels/001.png\nmy photo.jpg\n")
    selection = make_selection("d", None, 0, str(file))
    chosen = selection.choose([*NAMES, "my photo.jpg", "my.jpg"], "d")
    assert chosen == {"a/000.jpg", "b/001.jpg", "my photo.jpg"}
    with pytest.raises(FileNotFoundError, match="names 'c/000 1 1 1', which is no image"):
        Selection(list_file="list.txt", names=("c/000 1 1 1",)).choose(NAMES, "d")


def test_list_of_the_other_split(tmp_path):
    """A file of the same name in another folder is another image."""
    with pytest.raises(FileNotFoundError, match=r"'val/a\.jpg'"):
        listed(tmp_path, "val/a.jpg", ["train/a.jpg"])


def test_lists_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"IMAGE_LIST no\.txt does not exist"):
        make_selection("d", None, 0, "no.txt")
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not a text file in UTF-8"):
        make_selection("d", None, 0, str(tmp_path / "list.txt"))


# ---- classes ----

PRESENT = ["cat", "dog", "bird", "fish"]


@pytest.mark.parametrize(
    ("classes", "rename", "names", "mapping"),
    [
        (None, None, PRESENT, {}),
        (None, {"dog": "pet"}, ["cat", "pet", "bird", "fish"], {"dog": "pet"}),
        # Two to one: at the place of the first.
        (None, {"dog": "cat", "fish": None}, ["cat", "bird"], {"dog": "cat", "fish": None}),
        (["fish", "bird", "dog", "cat", "cow"], None, ["fish", "bird", "dog", "cat", "cow"], {}),
        # CLASSES under the new names and under the old.
        (["bird", "pet"], {"cat": "pet", "dog": "pet", "fish": None}, ["bird", "pet"], None),
        (PRESENT, {"cat": "pet", "dog": "pet"}, ["pet", "bird", "fish"], None),
        (None, {"dog": "dog", "*": None}, ["dog"], {"cat": None, "bird": None, "fish": None}),
        (["dog"], {"*": None}, ["dog"], {"cat": None, "bird": None, "fish": None}),
        (None, {"dog": "dog", "*": "other"}, ["dog", "other"], None),
        # Not one after the other.
        (None, {"cat": "dog", "dog": "cat"}, ["dog", "cat", "bird", "fish"], None),
    ],
)
def test_classes(classes, rename, names, mapping):
    result, renamed = map_classes("d", PRESENT, classes, rename)
    assert result == names
    assert list(renamed) == PRESENT and {*renamed.values()} - {None} <= {*names}
    if mapping is not None:
        assert renamed == {name: name for name in PRESENT} | mapping


@pytest.mark.parametrize(
    ("classes", "rename", "message"),
    [
        (None, {"dgo": "pet"}, "names the class 'dgo'.*Did you mean 'dog'.*It has cat, dog, bird"),
        (["cat", "dog", "bird"], None, r"the class 'fish', which CLASSES does not list \(1 such"),
        (None, {"*": None}, "leaves none of the classes"),
    ],
)
def test_wrong_classes(classes, rename, message):
    with pytest.raises(ValueError, match=message):
        map_classes("d", PRESENT, classes, rename)


def test_a_class_that_only_another_split_has():
    """The same entry serves both, if CLASSES says what there is."""
    rename = {"cow": "animal"}
    names, _ = map_classes("d", PRESENT, [*PRESENT, "animal"], rename)
    assert names == [*PRESENT, "animal"]
