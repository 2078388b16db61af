"""Draws the images of Shapes, which `prepare_shapes.py` annotates and writes.

H W image size in pixels. Colours are RGB in [0, 255].
"""

from dataclasses import dataclass, field

import cv2
import numpy as np

SPLITS = {"train": 1, "val": 100_001}  # name → id of the first image
VOID = -1
MIN_STUFF_AREA = 24  # px; smaller stuff segments become unlabelled
CROWD_PROBABILITY = 0.05
SUPERSAMPLING = 4

# Typical hue (degrees) and pattern of a thing class. Both are noisy; only the outline defines it.
THING_LOOKS = {
    "circle": (0, "shaded"),
    "square": (225, "checker"),
    "triangle": (45, "stripes"),
    "star": (275, "shaded"),
    "ring": (320, "stripes"),
    "cross": (170, "dots"),
}
PATTERNS = ("shaded", "checker", "stripes", "dots")


@dataclass
class Scene:
    """An image under construction.

    Attributes:
        image: float32 RGB in [0, 255], (H, W, 3).
        segment_map: int32 index into `segments` for each pixel, or VOID, (H, W).
        segments: (contiguous class, iscrowd) of each segment, in drawing order.
    """

    image: np.ndarray
    segment_map: np.ndarray
    segments: list[tuple[int, int]] = field(default_factory=list)


# Textures


def smooth_noise(
    rng: np.random.Generator, shape: tuple[int, int], cell: tuple[int, int]
) -> np.ndarray:
    """Returns smooth noise (H, W) of about unit variance with grain `cell` (rows, columns) px."""
    grid = (shape[0] // cell[0] + 2, shape[1] // cell[1] + 2)
    coarse = rng.standard_normal(grid).astype(np.float32)
    return cv2.resize(coarse, shape[::-1], interpolation=cv2.INTER_CUBIC)


def stuff_texture(rng: np.random.Generator, name: str, shape: tuple[int, int]) -> np.ndarray:
    """Returns a float32 RGB texture (H, W, 3) of a stuff class."""
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    if name == "sky":
        color = np.array([140, 185, 240], np.float32)
        clouds = np.clip(smooth_noise(rng, shape, (14, 28)), 0, 1.2)[..., None]
        texture = color + 60 * clouds + (25 * y / shape[0])[..., None]
    elif name == "grass":
        color = np.array([85, 150, 55], np.float32)
        blades = smooth_noise(rng, shape, (5, 1)) + smooth_noise(rng, shape, (20, 20))
        texture = color * (1 + 0.16 * blades)[..., None]
    elif name == "water":
        color = np.array([25, 80, 130], np.float32)
        bend = 2.5 * smooth_noise(rng, shape, (12, 16))
        waves = np.sin((y + bend) * 2 * np.pi / rng.uniform(6, 10))
        texture = color + 22 * waves[..., None]
    else:
        assert name == "brick", name
        color = np.array([165, 85, 60], np.float32)
        height = rng.uniform(7, 10)
        row = np.floor(y / height)
        column_position = x / (2 * height) + 0.5 * (row % 2)
        mortar = ((y / height) % 1 < 0.2) | (column_position % 1 < 0.1)
        shade = 1 + 0.1 * smooth_noise(rng, shape, (8, 16))
        texture = np.where(mortar[..., None], np.float32([190, 180, 170]), color * shade[..., None])
    gain = rng.uniform(0.88, 1.12)
    return (gain * texture + rng.normal(0, 7, 3)).astype(np.float32)


def thing_texture(
    rng: np.random.Generator, name: str, shape: tuple[int, int], center: np.ndarray, radius: float
) -> np.ndarray:
    """Returns a float32 RGB texture (H, W, 3) for one object."""
    hue, pattern = THING_LOOKS[name]
    hue = (hue + rng.normal(0, 14)) % 360
    if rng.random() < 0.15:
        pattern = PATTERNS[rng.integers(len(PATTERNS))]
    hsv = np.float32([[[hue, rng.uniform(0.65, 0.95), rng.uniform(0.75, 1.0)]]])
    color = 255 * cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0]

    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    angle, period = rng.uniform(0, np.pi), rng.uniform(4, 7)
    u = ((x - center[0]) * np.cos(angle) + (y - center[1]) * np.sin(angle)) / period
    v = ((y - center[1]) * np.cos(angle) - (x - center[0]) * np.sin(angle)) / period
    if pattern == "shaded":
        light = 1 - 0.3 * np.hypot(x - center[0] + radius / 3, y - center[1] + radius / 3) / radius
    elif pattern == "checker":
        light = np.where((np.floor(u) + np.floor(v)) % 2 == 0, 1.0, 0.7)
    elif pattern == "stripes":
        light = 0.85 + 0.15 * np.sign(np.sin(2 * np.pi * u))
    else:
        light = np.where(np.hypot(u % 1 - 0.5, v % 1 - 0.5) < 0.3, 0.6, 1.0)
    return (color * light[..., None]).astype(np.float32)


# Outlines


def outline(name: str, angle: float) -> list[np.ndarray]:
    """Returns the rings (N, 2) of a shape in the unit circle, to be filled even-odd."""

    def spokes(radii: list[float], start: float = 0.0) -> np.ndarray:
        directions = start + angle + np.arange(len(radii)) * 2 * np.pi / len(radii)
        return np.stack([np.cos(directions), np.sin(directions)], 1) * np.array(radii)[:, None]

    if name == "circle":
        return [spokes([0.9] * 48)]
    if name == "square":
        return [spokes([1.0] * 4, np.pi / 4)]
    if name == "triangle":
        return [spokes([1.0] * 3, -np.pi / 2)]
    if name == "star":
        return [spokes([1.05, 0.45] * 5, -np.pi / 2)]
    if name == "ring":
        return [spokes([1.0] * 48), spokes([0.5] * 48)]
    assert name == "cross", name
    # Two outer corners of an arm and the inner corner after it, rotated by four quarter turns.
    corners = np.array([1 - 0.3j, 1 + 0.3j, 0.3 + 0.3j])
    corners = np.concatenate([corners * 1j**k for k in range(4)]) * np.exp(1j * angle)
    return [np.stack([corners.real, corners.imag], 1)]


def render_alpha(
    rings: list[np.ndarray], center: np.ndarray, radius: float, shape: tuple[int, int]
) -> np.ndarray:
    """Returns the coverage (H, W) of each pixel by the shape, in [0, 1]."""
    canvas = np.zeros((shape[0] * SUPERSAMPLING, shape[1] * SUPERSAMPLING), np.uint8)
    points = [np.round((center + radius * r) * SUPERSAMPLING).astype(np.int32) for r in rings]
    cv2.fillPoly(canvas, points, 255)
    return cv2.resize(canvas, shape[::-1], interpolation=cv2.INTER_AREA).astype(np.float32) / 255


# Scenes


def paint_background(rng: np.random.Generator, scene: Scene, categories: list[dict]) -> None:
    """Fills the scene with one to three stuff regions, separated by wavy lines."""
    shape = scene.segment_map.shape
    stuff = [i for i, c in enumerate(categories) if not c["isthing"]]
    num_regions = rng.choice([1, 2, 3], p=[0.1, 0.5, 0.4])
    # Sorted in the order of the class table, so that sky is at the top.
    chosen = np.sort(rng.choice(stuff, num_regions, replace=False))

    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    phase, length = rng.uniform(0, 2 * np.pi), rng.uniform(0.6, 1.5) * max(shape)
    wave = 0.05 * max(shape) * np.sin(2 * np.pi * (x + y) / length + phase)
    region = np.zeros(shape, np.int32)
    if len(chosen) > 1:
        slope = rng.uniform(-0.2, 0.2)
        region[y + slope * (x - shape[1] / 2) + wave > rng.uniform(0.3, 0.6) * shape[0]] = 1
    if len(chosen) > 2:
        if rng.random() < 0.5:
            beyond = x + wave > rng.uniform(0.35, 0.65) * shape[1]
        else:
            beyond = y + 1.5 * wave > rng.uniform(0.7, 0.8) * shape[0]
        region[beyond & (region == 1)] = 2

    for index, contiguous_id in enumerate(chosen):
        texture = stuff_texture(rng, categories[contiguous_id]["name"], shape)
        scene.image[region == index] = texture[region == index]
        scene.segments.append((int(contiguous_id), 0))
    scene.segment_map[:] = region
    if rng.random() < 0.3:  # unlabelled gap between neighbours, as annotators leave it
        kernel = np.ones((3, 3), np.uint8)
        labels = region.astype(np.uint8)
        scene.segment_map[cv2.erode(labels, kernel) != cv2.dilate(labels, kernel)] = VOID


def paint_unknown(rng: np.random.Generator, scene: Scene, whole: bool = False) -> None:
    """Draws an unlabelled grey blob, or fills the `whole` image."""
    shape = scene.segment_map.shape
    if whole:
        alpha = np.ones(shape, np.float32)
    else:
        center = rng.uniform(0.1, 0.9, 2) * shape[::-1]
        radii = rng.uniform(0.06, 0.1) * min(shape) * (1 + 0.2 * rng.standard_normal(16))
        directions = np.arange(16) * np.pi / 8
        ring = np.stack([np.cos(directions), np.sin(directions)], 1) * radii[:, None]
        alpha = render_alpha([ring], center, 1.0, shape)
    grey = rng.uniform(70, 150) + 20 * smooth_noise(rng, shape, (4, 4))
    scene.image += alpha[..., None] * (grey[..., None] - scene.image)
    scene.segment_map[alpha >= 0.5] = VOID


def paint_thing(
    rng: np.random.Generator, scene: Scene, name: str, alpha: np.ndarray, center, radius: float
) -> None:
    """Draws one object with a dark rim, which separates overlapping objects of a class."""
    texture = thing_texture(rng, name, alpha.shape, center, radius)
    inner = cv2.erode(alpha, np.ones((3, 3), np.uint8), borderValue=1.0)
    texture *= (0.5 + 0.5 * inner)[..., None]
    scene.image += alpha[..., None] * (texture - scene.image)


def add_crowd(rng: np.random.Generator, scene: Scene, categories: list[dict]) -> None:
    """Adds a cluster of tiny objects of one class, annotated as one crowd segment."""
    shape = scene.segment_map.shape
    things = [i for i, c in enumerate(categories) if c["isthing"]]
    contiguous_id = int(rng.choice(things))
    name = categories[contiguous_id]["name"]
    middle = rng.uniform(0.25, 0.75, 2) * shape[::-1]
    index = len(scene.segments)
    scene.segments.append((contiguous_id, 1))
    for _ in range(rng.integers(8, 14)):
        center = middle + rng.normal(0, 0.07, 2) * shape[::-1]
        radius = rng.uniform(0.025, 0.04) * max(shape)
        alpha = render_alpha(outline(name, rng.uniform(0, 2 * np.pi)), center, radius, shape)
        paint_thing(rng, scene, name, alpha, center, radius)
        scene.segment_map[alpha >= 0.5] = index


def add_things(rng: np.random.Generator, scene: Scene, categories: list[dict]) -> None:
    """Adds two to six objects; at least 45 % of each stays visible under later ones."""
    shape = scene.segment_map.shape
    side = (shape[0] * shape[1]) ** 0.5
    things = [i for i, c in enumerate(categories) if c["isthing"]]
    full_areas: dict[int, int] = {}
    num_things = rng.integers(2, 7)
    for _ in range(8 * num_things):
        if len(full_areas) == num_things:
            break
        contiguous_id = int(rng.choice(things))
        name = categories[contiguous_id]["name"]
        is_small = rng.random() < 0.15
        radius = side * (rng.uniform(0.045, 0.065) if is_small else rng.uniform(0.09, 0.2))
        center = rng.uniform(0.05, 0.95, 2) * shape[::-1]
        angle = rng.uniform(-0.35, 0.35) if name == "square" else rng.uniform(0, 2 * np.pi)
        rings = outline(name, angle)
        alpha = render_alpha(rings, center, radius, shape)
        mask = alpha >= 0.5
        whole_area = radius**2 * abs(sum(_signed_area(r) * (-1) ** i for i, r in enumerate(rings)))
        if mask.sum() < 0.6 * whole_area:
            continue  # mostly outside the image
        remaining = scene.segment_map[~mask]
        if any(np.sum(remaining == i) < 0.45 * area for i, area in full_areas.items()):
            continue  # it would hide another object
        index = len(scene.segments)
        scene.segments.append((contiguous_id, 0))
        full_areas[index] = int(mask.sum())
        paint_thing(rng, scene, name, alpha, center, radius)
        scene.segment_map[mask] = index


def _signed_area(ring: np.ndarray) -> float:
    x, y = ring.T
    return 0.5 * float(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1)))


def make_scene(seed: int, split: str, index: int, size: int, categories: list[dict]) -> Scene:
    """Draws image `index` of `split`; sides are `size` ± 25 % pixels."""
    rng = np.random.default_rng([seed, list(SPLITS).index(split), index])
    height, width = (int(s) for s in rng.integers(round(0.75 * size), round(1.25 * size) + 1, 2))
    scene = Scene(
        image=np.zeros((height, width, 3), np.float32),
        segment_map=np.full((height, width), VOID, np.int32),
    )
    if split == "train" and index == 2:
        paint_unknown(rng, scene, whole=True)
    else:
        paint_background(rng, scene, categories)
        if rng.random() < 0.12:
            paint_unknown(rng, scene)
        if index % 100 != 1:
            if index % 100 == 3 or rng.random() < CROWD_PROBABILITY:
                add_crowd(rng, scene, categories)
            add_things(rng, scene, categories)
    scene.image = scene.image * rng.uniform(0.9, 1.1) + rng.normal(0, 5, scene.image.shape)
    for index, (contiguous_id, _) in enumerate(scene.segments):
        if not categories[contiguous_id]["isthing"]:
            mask = scene.segment_map == index
            if mask.sum() < MIN_STUFF_AREA:
                scene.segment_map[mask] = VOID
    return scene
