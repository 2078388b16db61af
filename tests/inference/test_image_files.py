"""Finding images, and naming what is written for them."""

import os
from itertools import permutations
from pathlib import Path

import pytest

from mask2former.inference.drawing_files import plan_drawings, plan_videos
from mask2former.inference.image_files import ImageFile, find_images, stems_of


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    names = ["b.png", "a.JPG", "notes.txt", ".hidden.png", "sub/a.jpg", "sub/deep/[1] ü.tif"]
    for name in (*names, ".git/a.png", "out/a.png", "empty/notes.txt"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("not read")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "in"


def found(*patterns: str, **options) -> list[str]:
    return [str(image.name) for image in find_images(patterns, **options)]


def test_folders_are_searched_with_their_subfolders(tree):
    assert found("in") == ["a.JPG", "b.png", "out/a.png", "sub/a.jpg", "sub/deep/[1] ü.tif"]
    assert found("in", leave_out=[tree / "out"]) == [
        "a.JPG",
        "b.png",
        "sub/a.jpg",
        "sub/deep/[1] ü.tif",
    ]
    assert found("in", recursive=False) == ["a.JPG", "b.png"]
    assert found("in", "in/b.png", recursive=False, leave_out=[tree]) == ["a.JPG", "b.png"]


def test_links_are_followed_once(tree):
    (tree / "sub/deep/up").symlink_to(tree)
    (tree / "linked").symlink_to(tree / "sub", target_is_directory=True)
    (tree / "nowhere.png").symlink_to(tree / "missing.png")
    names = found("in", leave_out=[tree / "out"])
    assert names == ["a.JPG", "b.png", "linked/a.jpg", "linked/deep/[1] ü.tif"]


def test_files_and_patterns(tree):
    assert found("in/sub/deep/[1] ü.tif", "in/b.png") == ["[1] ü.tif", "b.png"]
    assert found("in/*.png") == ["b.png"]
    assert found("in/**/*.jpg") == ["a.jpg"]
    # Of several folders, names are relative to what they share.
    assert found("in/**/a.*") == ["a.JPG", "out/a.png", "sub/a.jpg"]


@pytest.mark.parametrize("pattern", ["in/empty", "in/*.gif", "missing.png"])
def test_nothing_there(tree, pattern):
    with pytest.raises(FileNotFoundError, match="--input .*: no image file there"):
        find_images([pattern])


def images(*names: str) -> list[ImageFile]:
    return [ImageFile(Path("in", name), Path(name)) for name in names]


def test_stems_tell_images_apart():
    stems = stems_of(images("a.png", "sub/a.png", "b.jpg", "b.png"))
    assert [str(stem) for stem in stems] == ["a", "sub/a", "b.jpg", "b.png"]
    same = [ImageFile(Path(folder, "a.png"), Path("a.png")) for folder in ("x", "y")]
    with pytest.raises(ValueError, match=r"x/a.png and y/a.png would both be written as a.png"):
        stems_of(same)


# Names whose outputs could be taken for those of others: by suffix, case, folder or number.
NASTY = ["a.jpg", "a.jpeg", "a.png", "a.jpg.png", "a.png.jpg", "a_png.jpg", "a.jpg_2.png", "A.jpg"]
NASTY += ["A.png", "a.png/c.jpg", "a.jpg.png/c.jpg", "a.b/c.jpg", "a.b.jpg", "a_semantic.jpg"]


@pytest.mark.parametrize("tasks", [["panoptic"], ["panoptic", "semantic"]])
def test_no_output_takes_the_place_of_another(tasks):
    for names in permutations(NASTY, 3):
        inputs = images(*names)
        outputs = plan_drawings(inputs, stems_of(inputs), tasks, Path("out"))
        # As a file system that does not tell upper and lower case apart has them.
        files = {str(path).casefold() for path in outputs.values()}
        assert len(outputs) == len(files) == 3 * len(tasks), names
        folders = {str(folder).casefold() for path in outputs.values() for folder in path.parents}
        assert not files & folders, names


def test_all_nasty_names_at_once():
    for names in (NASTY, NASTY[::-1]):
        stems = {
            name: str(stem) for name, stem in zip(names, stems_of(images(*names)), strict=True)
        }
        assert len({stem.casefold() for stem in stems.values()}) == len(NASTY)
        assert stems["a_png.jpg"] == "a_png" and stems["a.b/c.jpg"] == "a.b/c"
        assert stems["a.jpeg"] == "a.jpeg" and stems["a.png.jpg"] == "a.png.jpg"
    # Numbered in the order of the images, where suffixes do not tell them apart.
    assert [str(stem) for stem in stems_of(images("a.jpg", "A.jpg", "a.jpg_2.png"))] == [
        "a.jpg",
        "A.jpg_3",
        "a.jpg_2",
    ]


def test_a_drawing_in_the_place_of_a_folder():
    inputs = images("a.jpg", "a_semantic.png/c.jpg")
    assert planned(plan_drawings(inputs, stems_of(inputs), ["panoptic"], Path("out")))
    with pytest.raises(ValueError, match=r"in/a.jpg would be drawn to out/a_semantic.png, but"):
        plan_drawings(inputs, stems_of(inputs), ["panoptic", "semantic"], Path("out"))


def planned(plan: dict) -> list[str]:
    return [str(path) for path in plan.values()]


def test_drawings(tmp_path):
    two = images("a.jpg", "sub/a.jpg")
    names = planned(plan_drawings(two, stems_of(two), ["panoptic"], Path("out")))
    assert names == ["out/a.png", "out/sub/a.png"]
    one = two[:1]
    both = planned(plan_drawings(one, stems_of(one), ["panoptic", "semantic"], Path("out")))
    assert both == ["out/a_panoptic.png", "out/a_semantic.png"]
    assert planned(plan_drawings(one, stems_of(one), ["panoptic"], Path("x.png"))) == ["x.png"]
    with pytest.raises(ValueError, match="x.png is one file, but there are 2 drawings"):
        plan_drawings(two, stems_of(two), ["panoptic"], Path("x.png"))


def test_videos(tmp_path):
    clip, other = Path("clip.mp4"), Path("sub/film.wmv")
    assert planned(plan_videos([clip], ["panoptic"], Path("drawn.webm"))) == ["drawn.webm"]
    names = planned(plan_videos([clip, other], ["panoptic"], Path("out")))
    assert names == ["out/clip.mp4", "out/film.mp4"]
    assert planned(plan_videos([clip], ["panoptic"], tmp_path)) == [f"{tmp_path}{os.sep}clip.mp4"]
    for arguments, message in (
        (([clip], ["panoptic"], Path("a.wmv")), "a.wmv: a video is written as one of"),
        (([clip, other], ["panoptic"], Path("a.mp4")), "one file, but there are 2 videos"),
        (([clip], ["panoptic"], Path()), "clip.mp4 would be overwritten"),
        (([clip, Path("x/clip.mp4")], ["panoptic"], Path("out")), "would both be drawn to"),
    ):
        with pytest.raises(ValueError, match=message):
            plan_videos(*arguments)
