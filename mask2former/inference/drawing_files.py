"""Names the files that a program draws: one for each image or video and task."""

from pathlib import Path

from .image_files import IMAGE_SUFFIXES, ImageFile
from .video import CODECS, require_container


def plan_drawings(
    images: list[ImageFile], stems: list[Path], tasks: list[str], output: Path
) -> dict[tuple[Path, str], Path]:
    """Returns the file to write for each (image, task).

    Raises:
        ValueError: a file would be written twice, or over an input.
    """
    if output.suffix.lower() == ".png" and not output.is_dir():
        if len(images) * len(tasks) > 1:
            raise ValueError(
                f"--output {output} is one file, but there are {len(images) * len(tasks)} "
                "drawings: name a folder"
            )
        planned = {(images[0].path, tasks[0]): output}
    else:
        if output.exists() and not output.is_dir():
            raise ValueError(f"--output {output} is a file, but neither a folder nor a .png")
        if output.suffix.lower() in IMAGE_SUFFIXES and not output.is_dir():
            raise ValueError(f"--output {output}: drawings are PNG, name a folder or a .png")
        planned = {
            (image.path, task): output / f"{stem}{_ending(task, tasks)}.png"
            for image, stem in zip(images, stems, strict=True)
            for task in tasks
        }
    _require_apart(planned, [image.path for image in images])
    return planned


def plan_videos(videos: list[Path], tasks: list[str], output: Path) -> dict[tuple[Path, str], Path]:
    """Returns the file to write for each (video, task); see `plan_drawings`."""
    if output.suffix and not output.is_dir() and (len(videos), len(tasks)) == (1, 1):
        require_container(output)
        planned = {(videos[0], tasks[0]): output}
    elif output.suffix.lower() in CODECS and not output.is_dir():
        raise ValueError(
            f"--output {output} is one file, but there are {len(videos) * len(tasks)} videos to "
            "write: name a folder"
        )
    else:
        planned = {
            (video, task): output / f"{video.stem}{_ending(task, tasks)}{_container(video)}"
            for video in videos
            for task in tasks
        }
    _require_apart(planned, videos)
    return planned


def _ending(task: str, tasks: list[str]) -> str:
    return f"_{task}" if len(tasks) > 1 else ""


def _container(video: Path) -> str:
    return video.suffix if video.suffix.lower() in CODECS else ".mp4"


def _require_apart(planned: dict[tuple[Path, str], Path], inputs: list[Path]) -> None:
    """
    Raises:
        ValueError: a planned file is an input, or planned twice, or in the place of a folder.
    """
    read = {path.resolve() for path in inputs}
    sources: dict[Path, Path] = {}
    for (source, _), path in planned.items():
        if path.resolve() in read:
            raise ValueError(f"{path} would be overwritten, but it is an input: change --output")
        if path in sources:
            raise ValueError(f"{sources[path]} and {source} would both be drawn to {path}")
        sources[path] = source
    for path, source in sources.items():
        for folder in path.parents:
            if folder in sources:
                raise ValueError(
                    f"{sources[folder]} would be drawn to {folder}, but that is the folder of the "
                    f"drawing of {source}: start twice with two outputs"
                )
