"""Packed masks expand to the original masks; `TargetInstances` behave like `Instances`."""

import copy
import pickle

import pytest
import torch
from detectron2.structures import BitMasks, Boxes, ImageList, Instances, RotatedBoxes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from mask2former import MaskFormer
from mask2former.data.packed_masks import PackedMasks, TargetInstances, pin, upload

LABELS = torch.tensor([[[0, 1, 1], [255, 3, 1]]], dtype=torch.uint8)
LABEL_MASKS = [[[0, 1, 1], [0, 0, 1]], [[0, 0, 0], [0, 0, 0]], [[0, 0, 0], [0, 1, 0]]]
# Bits of the masks 0 to 7 in the first plane, of 8 and 9 in the second.
BITS = torch.tensor([[[0b10000001, 1]], [[0b11, 0b10]]], dtype=torch.uint8)


def labels() -> PackedMasks:
    return PackedMasks(LABELS.clone(), 3, overlapping=False)


def instances() -> TargetInstances:
    boxes = Boxes(torch.arange(12.0).reshape(3, 4))
    classes = torch.tensor([4, 5, 6])
    return TargetInstances((2, 3), gt_classes=classes, gt_masks=labels(), gt_boxes=boxes)


def packed_field(instances: TargetInstances) -> bool:
    return isinstance(instances._fields["gt_masks"], PackedMasks)


class TestPackedMasks:
    def test_labels(self):
        masks = labels().expand()
        assert masks.dtype == torch.bool and masks.is_contiguous()
        assert masks.int().tolist() == LABEL_MASKS

    def test_bits(self):
        masks = PackedMasks(BITS, 10, overlapping=True).expand()
        assert masks.dtype == torch.bool and masks.shape == (10, 1, 2)
        assert masks[:, 0, 0].nonzero().flatten().tolist() == [0, 7, 8, 9]
        assert masks[:, 0, 1].nonzero().flatten().tolist() == [0, 9]

    def test_several_planes_of_labels(self):
        planes = torch.tensor([1, 254, 255, 0, 1, 2], dtype=torch.uint8).reshape(2, 1, 3)
        masks = PackedMasks(planes, 256, overlapping=False).expand()
        assert masks.nonzero().tolist() == [[0, 0, 0], [253, 0, 1], [254, 0, 1], [255, 0, 2]]

    @pytest.mark.parametrize("overlapping", [False, True])
    @pytest.mark.parametrize("size", [(0, 0), (1, 1), (3, 5)])
    def test_no_masks(self, overlapping, size):
        packed = PackedMasks(torch.empty(0, *size, dtype=torch.uint8), 0, overlapping=overlapping)
        assert len(packed) == 0
        assert packed.shape == packed.expand().shape == (0, *size)

    def test_one_pixel(self):
        plane = torch.ones(1, 1, 1, dtype=torch.uint8)
        for overlapping in (False, True):
            packed = PackedMasks(plane, 1, overlapping=overlapping)
            assert packed.expand().tolist() == [[[True]]]

    def test_pad(self):
        padded = labels().pad([0, 2, 0, 1])
        assert padded.shape == (3, 3, 5)
        expected = torch.nn.functional.pad(labels().expand(), [0, 2, 0, 1])
        assert torch.equal(padded.expand(), expected)

    def test_to(self):
        moved = labels().to("meta")
        assert isinstance(moved, PackedMasks) and moved.planes.is_meta
        floats = labels().to(torch.float32)
        assert floats.dtype == torch.float32 and floats.tolist() == LABEL_MASKS

    def test_index(self):
        keep = torch.tensor([True, False, True])
        assert labels()[keep].int().tolist() == [LABEL_MASKS[0], LABEL_MASKS[2]]
        assert labels()[1:].int().tolist() == LABEL_MASKS[1:]


class TestTargetInstances:
    @pytest.mark.parametrize(
        "read",
        [lambda x: x.gt_masks, lambda x: x.get("gt_masks"), lambda x: x.get_fields()["gt_masks"]],
        ids=["attribute", "get", "get_fields"],
    )
    def test_reading_expands(self, read):
        targets = instances()
        assert isinstance(targets, Instances) and len(targets) == 3 and packed_field(targets)
        masks = read(targets)
        assert type(masks) is torch.Tensor and masks.int().tolist() == LABEL_MASKS
        assert targets.gt_masks is masks, "expanded twice"

    def test_writing(self):
        targets = instances()
        targets.gt_masks[0, 0, 0] = True
        assert targets.gt_masks[0, 0, 0]
        targets.gt_masks = targets.gt_masks.float()
        assert targets.gt_masks.dtype == torch.float32
        targets.remove("gt_masks")
        assert not targets.has("gt_masks")
        with pytest.raises(AttributeError, match="gt_masks"):
            _ = targets.gt_masks

    def test_to_keeps_masks_packed(self):
        moved = instances().to("meta")
        assert type(moved) is TargetInstances and packed_field(moved)
        assert moved.gt_masks.is_meta and moved.gt_masks.shape == (3, 2, 3)
        assert moved.gt_boxes.tensor.is_meta

    def test_index_and_cat(self):
        chosen = instances()[torch.tensor([2, 0])]
        assert chosen.gt_classes.tolist() == [6, 4]
        assert chosen.gt_masks.int().tolist() == [LABEL_MASKS[2], LABEL_MASKS[0]]
        assert instances()[1].gt_masks.shape == (1, 2, 3)
        both = Instances.cat([instances(), instances()])
        assert both.gt_masks.int().tolist() == LABEL_MASKS * 2

    @pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    def test_copies(self, clone):
        cloned = clone(instances())
        assert packed_field(cloned) and cloned.image_size == (2, 3)
        assert cloned.gt_masks.int().tolist() == LABEL_MASKS

    def test_transfer_from_a_loader_process(self):
        loader = DataLoader([instances()], batch_size=None, num_workers=1, collate_fn=as_list)
        (received,) = next(iter(loader))
        assert packed_field(received)
        assert received.gt_masks.int().tolist() == LABEL_MASKS


def as_list(sample):
    return [sample]


class TestPrepareTargets:
    """`MaskFormer.prepare_targets` gives the criterion the same targets as the original's."""

    @staticmethod
    def original(targets: list[Instances], images: ImageList) -> list[dict[str, torch.Tensor]]:
        prepared = []
        for instances in targets:
            masks = instances.gt_masks
            size = (masks.shape[0], *images.tensor.shape[-2:])
            padded = torch.zeros(size, dtype=masks.dtype, device=masks.device)
            padded[:, : masks.shape[1], : masks.shape[2]] = masks
            prepared.append({"labels": instances.gt_classes, "masks": padded})
        return prepared

    @pytest.mark.parametrize("size", [(2, 3), (4, 3), (5, 7)])
    def test_same(self, size):
        images = ImageList(torch.empty(1, 3, *size), [(2, 3)])
        expected = self.original([instances().to("cpu")], images)
        (actual,) = MaskFormer.prepare_targets(None, [instances().to("cpu")], images)
        assert actual.keys() == expected[0].keys()
        for key, tensor in expected[0].items():
            assert actual[key].dtype == tensor.dtype and torch.equal(actual[key], tensor)


class Copies(TorchDispatchMode):
    """Whether each copy to another device blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocking: list[bool] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default:
            self.blocking.append(not kwargs.get("non_blocking"))
        return function(*args, **kwargs)


class OnlyDevice:
    """A field as other projects have them."""

    device = torch.device("cpu")

    def to(self, device):
        moved = OnlyDevice()
        moved.device = device
        return moved

    def __len__(self):
        return 3


class TestUpload:
    device = torch.device("meta")

    def test_nothing_blocks(self):
        with Copies() as copies:
            moved = upload(instances(), self.device)
            image = upload(torch.zeros(3, 2, 2), self.device)
        assert copies.blocking == [False] * 4
        assert type(moved) is TargetInstances and packed_field(moved)
        assert image.device == moved.gt_classes.device == moved.gt_boxes.device == self.device
        assert moved._fields["gt_masks"].planes.device == self.device

    def test_plain_instances(self):
        plain = Instances((2, 3), gt_classes=torch.arange(3), note=["a", "b", "c"])
        plain.gt_masks = BitMasks(torch.zeros(3, 2, 3))
        plain.gt_boxes = Boxes(torch.zeros(3, 4))
        plain.other = OnlyDevice()
        with Copies() as copies:
            moved = upload(plain, self.device)
        assert copies.blocking == [False] * 3
        assert type(moved) is Instances and moved.image_size == (2, 3) and len(moved) == 3
        assert list(moved.get_fields()) == list(plain.get_fields())
        assert moved.note == ["a", "b", "c"]
        assert type(moved.gt_masks) is BitMasks and type(moved.gt_boxes) is Boxes
        for field in (moved.gt_classes, moved.gt_masks, moved.gt_boxes, moved.other):
            assert field.device == self.device

    def test_a_method_of_their_own(self):
        class Own(Instances):
            def to(self, device):
                return Own(self.image_size, moved_to=[device])

        moved = upload(Own((2, 3)), self.device)
        assert type(moved) is Own and moved.moved_to == [self.device]

    def test_to_the_cpu_blocks(self):
        """A device might not have written yet when the host reads."""
        tensor = torch.arange(3)
        with Copies() as copies:
            assert upload(tensor, torch.device("cpu")) is tensor
            moved = upload(instances(), torch.device("cpu"))
        assert copies.blocking == []
        assert moved.gt_masks.int().tolist() == LABEL_MASKS

    def test_pin_memory(self, monkeypatch):
        pinned = []

        def pin_memory(tensor):
            pinned.append(tensor.clone())
            return pinned[-1]

        monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
        result = instances().pin_memory()
        assert type(result) is TargetInstances and packed_field(result)
        tensors = result.gt_classes, result._fields["gt_masks"].planes, result.gt_boxes.tensor
        assert [id(x) for x in tensors] == [id(x) for x in pinned]
        assert result.gt_masks.int().tolist() == LABEL_MASKS
        assert result.gt_classes.tolist() == [4, 5, 6]
        plain = Instances((2, 3))
        assert pin(plain) is plain and pin("text") == "text"
        rotated = RotatedBoxes(torch.zeros(2, 5))
        assert pin(rotated) is rotated
        on_device = torch.zeros(2, device="meta")
        assert pin(on_device) is on_device
