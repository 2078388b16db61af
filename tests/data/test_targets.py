"""Targets from polygons, RLE, panoptic colours and label maps, small enough to check by eye."""

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, polygons_to_bitmask
from panopticapi.utils import id2rgb

from mask2former.data.label_maps import (
    layers_to_boxes,
    pack_layers,
    present_values,
    transform_layers,
)
from mask2former.data.packed_masks import PackedMasks
from mask2former.data.targets import (
    annotation_boxes,
    build_instances,
    check_sem_seg,
    convert_coco_poly_to_mask,
    pack_shapes,
    rasterise,
    read_annotations,
    segment_layers,
    semantic_targets,
    transform_annotations,
)

NO_TRANSFORM = T.TransformList([])
SIZE = (4, 6)

# Columns 1 to 3 of rows 1 and 2.
RECTANGLE = [1, 1, 4, 1, 4, 3, 1, 3]
RECTANGLE_MASK = np.zeros(SIZE, dtype=np.uint8)
RECTANGLE_MASK[1:3, 1:4] = 1


def rle(mask: np.ndarray) -> dict:
    return mask_util.encode(np.asfortranarray(mask))


def uncompressed_rle(mask: np.ndarray) -> dict:
    column_major = mask.T.reshape(-1)
    changes = np.flatnonzero(np.diff(column_major, prepend=0))
    counts = np.diff(changes, prepend=0, append=column_major.size)
    return {"size": list(mask.shape), "counts": counts.tolist()}


def annotation(segmentation, category_id: int = 0, **extra) -> dict:
    return {"category_id": category_id, "segmentation": segmentation, **extra}


def read(segmentation) -> list:
    return read_annotations([annotation(segmentation)], SIZE, "a.jpg")[1]


class TestPresentValues:
    @pytest.mark.parametrize(
        "labels, expected",
        [
            ([[3, 3, 0], [0, 7, 3]], [0, 3, 7]),
            ([[5]], [5]),
            ([[-1.0, 255.0]], [-1.0, 255.0]),
            (np.zeros((0, 3)), []),
        ],
    )
    def test_values(self, labels, expected):
        assert present_values(np.array(labels)).tolist() == expected

    def test_flipped_view(self):
        labels = np.array([[1, 2, 2], [9, 9, 1]])[:, ::-1]
        assert present_values(labels).tolist() == [1, 2, 9]


class TestSemantic:
    SEM_SEG = np.array([[4, 4, 255], [1, 255, 4]])

    def test_one_target_per_class(self):
        classes, masks = semantic_targets(self.SEM_SEG, ignore_label=255)
        assert classes.tolist() == [1, 4]
        assert classes.dtype == torch.int64
        assert masks.expand().int().tolist() == [[[0, 0, 0], [1, 0, 0]], [[1, 1, 0], [0, 0, 1]]]

    def test_all_ignored(self):
        classes, masks = semantic_targets(np.full(SIZE, 255), ignore_label=255)
        assert classes.shape == (0,) and classes.dtype == torch.int64
        assert masks.expand().shape == (0, 4, 6)

    def test_known_labels_pass(self):
        check_sem_seg(self.SEM_SEG.astype(np.uint8), 5, 255, "a.png")

    def test_unknown_labels(self):
        with pytest.raises(ValueError, match=r"a\.png .*\[0, 4\) .*label 255: 4\. .*NUM_CLASSES"):
            check_sem_seg(self.SEM_SEG, 4, 255, "a.png")
        with pytest.raises(ValueError, match=r"label 0: -2, 255\."):
            check_sem_seg(np.array([[-2, 255, 0]]), 9, 0, "a.png")
        with pytest.raises(ValueError, match=r": 10, 11, 12, 13, 14, \.\.\."):
            check_sem_seg(np.arange(10, 20)[None], 9, 255, "a.png")


class TestPanoptic:
    # 300 needs a second byte, 70000 a third one.
    IDS = np.array([[0, 0, 300, 300, 300, 9], [70000, 70000, 300, 300, 9, 9]])
    SEGMENTS = [
        {"id": 70000, "category_id": 2, "iscrowd": 0},
        {"id": 9, "category_id": 5, "iscrowd": 1},
        {"id": 300, "category_id": 0, "iscrowd": 0},
    ]

    def test_json_order_without_crowd(self):
        classes, layers = segment_layers(id2rgb(self.IDS), self.SEGMENTS, "a.png", num_classes=3)
        masks = pack_layers(layers, 2, (2, 6)).expand()
        assert classes.tolist() == [2, 0]
        assert masks.dtype == torch.bool
        assert (masks.numpy() == np.stack([self.IDS == 70000, self.IDS == 300])).all()
        assert layers_to_boxes(layers, 2).tensor.tolist() == [[0, 1, 2, 2], [2, 0, 5, 2]]

    def test_no_segments(self):
        classes, layers = segment_layers(np.zeros((4, 6, 3), np.uint8), [], "a.png", num_classes=3)
        assert classes.shape == (0,) and classes.dtype == torch.int64
        masks = pack_layers(layers, 0, SIZE).expand()
        assert masks.shape == (0, 4, 6) and masks.dtype == torch.bool
        assert layers_to_boxes(layers, 0).tensor.shape == (0, 4)

    def test_several_layers(self):
        ids = np.random.default_rng(0).permutation(np.arange(1, 601) * 1000).reshape(20, 30)
        segments = [{"id": int(i), "category_id": 1} for i in ids.reshape(-1)[::-1]]
        classes, layers = segment_layers(id2rgb(ids), segments, "a.png")
        masks = pack_layers(layers, 600, ids.shape).expand()
        assert len(layers) == 3 and len(classes) == 600
        expected = BitMasks(np.stack([ids == s["id"] for s in segments]))
        assert (masks == expected.tensor).all()
        boxes = layers_to_boxes(layers, 600)
        assert (boxes.tensor == expected.get_bounding_boxes().tensor).all()

    def test_padding_is_not_a_segment(self):
        segments = [{"id": i, "category_id": 0} for i in range(1, 255)]
        ids = np.arange(1, 255).reshape(2, 127)
        _, layers = segment_layers(id2rgb(ids), segments, "a.png")
        for value in (0, 255):
            pad = T.PadTransform(0, 0, 3, 1, seg_pad_value=value)
            padded = transform_layers(layers, T.TransformList([pad]))
            masks = pack_layers(padded, 254, (3, 130)).expand()
            assert (masks.sum(dim=(1, 2)) == 1).all()
        pad = T.PadTransform(0, 0, 3, 1, seg_pad_value=7)
        with pytest.raises(ValueError, match="pads segmentations with 7"):
            transform_layers(layers, T.TransformList([pad]))

    def test_segment_outside_the_crop_is_empty(self):
        _, layers = segment_layers(id2rgb(self.IDS), self.SEGMENTS, "a.png")
        layers = transform_layers(layers, T.TransformList([T.CropTransform(2, 0, 4, 2)]))
        masks = pack_layers(layers, 2, (2, 4)).expand()
        assert masks.sum(dim=(1, 2)).tolist() == [0, 5]
        assert layers_to_boxes(layers, 2).tensor.tolist() == [[0, 0, 0, 0], [0, 0, 3, 2]]

    def test_segment_missing_in_json(self):
        with pytest.raises(ValueError, match=r"a\.png contains the segment id 300 .*JSON"):
            segment_layers(id2rgb(self.IDS), self.SEGMENTS[:2], "a.png")

    def test_segment_without_pixels(self):
        segments = [*self.SEGMENTS, {"id": 12, "category_id": 0, "iscrowd": 0}]
        with pytest.raises(ValueError, match=r"a\.png has no pixel of the segment id 12 "):
            segment_layers(id2rgb(self.IDS), segments, "a.png")

    def test_repeated_id(self):
        with pytest.raises(ValueError, match=r"a\.png: segments_info repeats the ids \[9\]"):
            segment_layers(id2rgb(self.IDS), [*self.SEGMENTS, self.SEGMENTS[1]], "a.png")

    @pytest.mark.parametrize("category_id", [-1, 3])
    def test_category_out_of_range(self, category_id):
        segments = [self.SEGMENTS[0] | {"category_id": category_id}, *self.SEGMENTS[1:]]
        match = rf"a\.png: segment 70000 has category_id {category_id}, .*\[0, 3\).*NUM_CLASSES"
        with pytest.raises(ValueError, match=match):
            segment_layers(id2rgb(self.IDS), segments, "a.png", num_classes=3)


class TestInstances:
    @pytest.mark.parametrize(
        "segmentation",
        [
            [RECTANGLE],
            [[1, 1, 3, 1, 3, 3, 1, 3], [3.0, 1.0, 4.0, 1.0, 4.0, 3.0, 3.0, 3.0]],
            rle(RECTANGLE_MASK),
            uncompressed_rle(RECTANGLE_MASK),
            RECTANGLE_MASK,
            RECTANGLE_MASK.astype(bool),
            RECTANGLE_MASK * 255,
        ],
        ids=["polygon", "polygons", "rle", "uncompressed", "uint8", "bool", "0-255"],
    )
    def test_all_formats_give_the_same_target(self, segmentation):
        flip_and_pad = T.TransformList(
            [T.HFlipTransform(6), T.PadTransform(0, 0, 2, 1, 6, 4, 0, 255)]
        )
        for transforms, columns, size in (
            (NO_TRANSFORM, slice(1, 4), SIZE),
            (flip_and_pad, slice(2, 5), (5, 8)),
        ):
            shapes = transform_annotations(read(segmentation), transforms)
            expected = torch.zeros(1, *size, dtype=torch.bool)
            expected[0, 1:3, columns] = True
            masks = rasterise(shapes, size)
            assert masks.dtype == torch.bool and masks.is_contiguous()
            assert torch.equal(masks, expected)
            boxes = annotation_boxes(shapes).tensor
            assert boxes.tolist() == [[columns.start, 1, columns.stop, 3]]

    def test_integer_coordinates_are_not_truncated(self):
        # Scaled by 1.5, the corners of this triangle are between pixels.
        polygon = [1, 1, 4, 1, 1, 3]
        shapes = transform_annotations(
            read([polygon]), T.TransformList([T.ResizeTransform(4, 6, 6, 9)])
        )
        assert shapes[0][0].tolist() == [1.5, 1.5, 6, 1.5, 1.5, 4.5]

    def test_annotations_are_not_modified(self):
        polygon, mask = np.array(RECTANGLE, dtype=np.float64), RECTANGLE_MASK.copy()
        for segmentation, original in ([[polygon], polygon], [mask, mask]):
            kept = original.copy()
            transform_annotations(
                read(segmentation), T.TransformList([T.ResizeTransform(4, 6, 8, 12)])
            )
            assert (original == kept).all()

    def test_object_outside_the_crop(self):
        crop = T.TransformList([T.CropTransform(4, 0, 2, 4)])
        shapes = [shape for s in ([RECTANGLE], rle(RECTANGLE_MASK)) for shape in read(s)]
        shapes = transform_annotations(shapes, crop)
        assert not rasterise(shapes, (4, 2)).any()
        assert annotation_boxes(shapes).nonempty(1e-5).tolist() == [False, False]

    def test_crowd_is_dropped_and_order_kept(self):
        annotations = [
            annotation([RECTANGLE], 3),
            annotation(rle(RECTANGLE_MASK), 9, iscrowd=1),
            annotation(RECTANGLE_MASK, 1, iscrowd=0),
        ]
        classes, shapes = read_annotations(annotations, SIZE, "a.jpg", num_classes=4)
        assert classes.tolist() == [3, 1] and classes.dtype == torch.int64
        assert [type(shape) for shape in shapes] == [list, np.ndarray]

    def test_no_objects(self):
        classes, shapes = read_annotations([], SIZE, "a.jpg")
        assert classes.shape == (0,) and classes.dtype == torch.int64
        masks = rasterise(transform_annotations(shapes, NO_TRANSFORM), SIZE)
        assert masks.shape == (0, 4, 6) and masks.dtype == torch.bool
        assert annotation_boxes([]).tensor.shape == (0, 4)

    def test_overlapping_objects_of_all_formats(self):
        """Twenty masks need three planes of bits."""
        rng = np.random.default_rng(0)
        masks = rng.random((20, *SIZE)) < 0.5
        masks[3], masks[17] = True, False
        segmentations = [mask.astype(np.uint8) for mask in masks]
        segmentations[5] = [RECTANGLE]
        masks[5] = RECTANGLE_MASK
        shapes = [shape for segmentation in segmentations for shape in read(segmentation)]
        packed = pack_shapes(shapes, SIZE)
        assert packed.planes.shape == (3, *SIZE) and packed.overlapping
        assert (packed.expand().numpy() == masks).all()
        boxes = BitMasks(masks).get_bounding_boxes().tensor
        assert torch.equal(annotation_boxes(shapes).tensor, boxes)

    @pytest.mark.parametrize("step", [0.05, 0.1, 0.25, 1 / 3, 1e-3])
    def test_polygon_window_is_exact(self, step):
        """Same as pycocotools on the full image, at coordinates where rounding ties."""
        rng = np.random.default_rng(int(1 / step))
        size = (40, 60)
        for _ in range(300):
            low = rng.uniform(-8, 50, 2)
            points = low + rng.uniform(0, rng.uniform(0.1, 40), (rng.integers(3, 9), 2))
            polygons = [np.round(points / step).reshape(-1) * step]
            if rng.random() < 0.5:
                polygons.append(polygons[0] + np.round(rng.uniform(-9, 9) / step) * step)
            expected = polygons_to_bitmask(polygons, *size)
            assert (pack_shapes([polygons], size).expand()[0].numpy() == expected).all()

    @pytest.mark.parametrize(
        "segmentation, message",
        [
            ([[1, 1, 4, 1]], "polygon of 4 coordinates"),
            ([RECTANGLE, [1, 1, 4, 1, 4, 3, 1]], "polygon of 7 coordinates"),
            ([[1, 1, 4, float("nan"), 4, 3]], "not finite"),
            (RECTANGLE, "polygon of 1 coordinates"),
            ([], r"segmentation '\[\]'"),
            (None, "segmentation 'None'"),
            ("1 1 4 1", "list of polygons"),
            ({"counts": b"1"}, "COCO RLE"),
            (rle(np.zeros((5, 6), np.uint8)), r"an RLE, has \(height, width\) \(5, 6\).*\(4, 6\)"),
            (np.zeros((4, 5)), r"a mask, has \(height, width\) \(4, 5\).*\(4, 6\)"),
            ({"size": [4, 6], "counts": 3.5}, "RLE that cannot be decoded"),
            ({"size": [4, 6], "counts": b"0P[2"}, "RLE that cannot be decoded"),
            ({"size": [4, 6], "counts": [0, 4]}, "RLE .*counts 4 of 24 pixels"),
            ({"size": [4, 6], "counts": [-3, 27]}, "RLE that cannot be decoded"),
        ],
    )
    def test_bad_segmentation(self, segmentation, message):
        annotations = [annotation([RECTANGLE]), annotation(segmentation, id=17)]
        with pytest.raises(ValueError, match=rf"a\.jpg: annotation id 17.*{message}"):
            read_annotations(annotations, SIZE, "a.jpg")

    @pytest.mark.parametrize("category_id", [-1, 3])
    def test_category_out_of_range(self, category_id):
        match = rf"a\.jpg: annotation number 1 .*category_id {category_id}, .*\[0, 3\)"
        annotations = [annotation([RECTANGLE], 2), annotation([RECTANGLE], category_id)]
        with pytest.raises(ValueError, match=match):
            read_annotations(annotations, SIZE, "a.jpg", num_classes=3)
        assert len(read_annotations(annotations, SIZE, "a.jpg")[1]) == 2


def test_convert_coco_poly_to_mask():
    polygons = [[np.array(RECTANGLE, dtype=float)], [np.array([0.0, 0, 1, 0, 1, 1, 0, 1])]]
    masks = convert_coco_poly_to_mask(polygons, *SIZE)
    assert masks.dtype == torch.bool
    assert (masks[0].numpy() == RECTANGLE_MASK).all()
    assert masks[1].nonzero().tolist() == [[0, 0]]
    assert convert_coco_poly_to_mask([], *SIZE).shape == (0, 4, 6)


def test_build_instances_without_boxes():
    masks = PackedMasks(torch.ones(1, 4, 6, dtype=torch.uint8), 1, overlapping=False)
    instances = build_instances(torch.tensor([1]), masks)
    assert instances.image_size == (4, 6)
    assert not instances.has("gt_boxes")
