"""The scores of the Cityscapes benchmark: of classes, of categories, and both with instances weighed alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self, final

import numpy as np
from numpy.typing import NDArray

from nestseg.core.errors import DataError
from nestseg.metrics.confusion import ConfusionMatrix

# Every label id in order, by category; those in brackets are ignored where they are the ground truth.
_LABELS: Mapping[str, str] = {
    "void": "(unlabeled), (ego vehicle), (rectification border), (out of roi), (static), (dynamic), (ground)",
    "flat": "road, sidewalk, (parking), (rail track)",
    "construction": "building, wall, fence, (guard rail), (bridge), (tunnel)",
    "object": "pole, (polegroup), traffic light, traffic sign",
    "nature": "vegetation, terrain",
    "sky": "sky",
    "human": "person, rider",
    "vehicle": "car, truck, bus, (caravan), (trailer), train, motorcycle, bicycle",
}
_NAMES = tuple(name for names in _LABELS.values() for name in names.split(", "))
_CATEGORY_OF = tuple(category for category, names in _LABELS.items() for _ in names.split(", "))
_NUM_IDS = len(_NAMES)
_EVALUATED = tuple(label for label, name in enumerate(_NAMES) if not name.startswith("("))

CLASSES = tuple(_NAMES[label] for label in _EVALUATED)
"""Names of the 19 classes in train-id order."""

CATEGORIES = tuple(category for category in _LABELS if category != "void")
"""Names of the seven categories."""

# The mean number of pixels of an instance in the training set, as the benchmark fixed it.
_INSTANCE_SIZES: Mapping[str, float] = {
    "person": 3462.4756337644,
    "rider": 3930.4788056518,
    "car": 12794.0202738185,
    "truck": 27855.1264367816,
    "bus": 35732.1511111111,
    "train": 67583.7075812274,
    "motorcycle": 6298.7200839748,
    "bicycle": 4672.3249222261,
}

INSTANCE_CLASSES = tuple(_INSTANCE_SIZES)
"""Names of the classes whose instances are told apart, in train-id order."""

INSTANCE_CATEGORIES = ("human", "vehicle")
"""Names of the categories all of whose classes have instances."""

_INSTANCE_IDS = tuple(_NAMES.index(name) for name in INSTANCE_CLASSES)
_INSTANCE_CATEGORY = np.zeros(256, np.uint8)
"""(256,) uint8: by label id, 1 and up for the categories of instances, ignored classes included; 0 for the others."""
_INSTANCE_CATEGORY[:_NUM_IDS] = [
    1 + INSTANCE_CATEGORIES.index(category) if category in INSTANCE_CATEGORIES else 0 for category in _CATEGORY_OF
]

# An instance's share of right pixels is counted in steps of 2^-40, so that sums are exact in any order. An iIoU is off
# by at most half a step, about 5e-13, and 2^23 instances of a class fit into 63 bits.
_WHOLE = 1 << 40

_SHAPES = ((_NUM_IDS, _NUM_IDS + 1), (len(INSTANCE_CLASSES), 3), (2,))
_ENDS = tuple(np.cumsum([int(np.prod(shape)) for shape in _SHAPES]).tolist())


@final
class CityscapesCounts:
    """What the scores of Cityscapes are computed from, in whole numbers that add up over any split of the pictures.

    Ids are the label ids of the benchmark, 0 to 33, not train ids. A map of train ids, mapped back with everything
    ignored as id 0, gives the same scores: ground truth that is ignored never counts, whichever id it has.

    Shape:
        - confusion.counts: (34, 35) int64, see `ConfusionMatrix`
        - instances: (8, 3) int64, for each of `INSTANCE_CLASSES` the number of instances, and the sums of their shares
          of pixels predicted as their class and as their category, in steps of 2^-40

    Reference:
        Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding", CVPR 2016, section 3.1;
        cityscapesScripts, evalPixelLevelSemanticLabeling.

    Deviations:
        The official script stops at a prediction above 33; here it is a miss, as any other void prediction. It stops at
        255 (license plate, id -1) in the ground truth; here that is ignored. It sums instance weights in floats, in the
        order of the pictures; here sums are exact, and an iIoU differs by less than 1e-12.

    Example:
        >>> counts = CityscapesCounts()
        >>> counts.update(np.array([[7, 7, 24]], np.uint8), np.array([[7, 8, 24]], np.uint8))
        >>> scores = compute_cityscapes_scores(counts)
        >>> scores.class_iou["road"], scores.category_iou["flat"], scores.class_iiou["person"]
        (0.5, 1.0, None)
    """

    def __init__(self) -> None:
        self.confusion = ConfusionMatrix(_NUM_IDS)
        self.instances: NDArray[np.int64] = np.zeros(_SHAPES[1], np.int64)
        self.num_images = 0
        self.num_images_with_instances = 0

    @property
    def counts(self) -> NDArray[np.int64]:
        """All counts as one array, for sums over processes: pixels, instances, pictures, pictures with instances.

        Shape:
            - returns: (1216,) int64, a copy
        """
        pictures = np.array([self.num_images, self.num_images_with_instances], np.int64)
        return np.concatenate([self.confusion.counts.ravel(), self.instances.ravel(), pictures])

    @classmethod
    def from_counts(cls, counts: NDArray[np.int64]) -> Self:
        """Rebuild from what `counts` held, for example after summing it over processes.

        Raises:
            ValueError: If the counts have another shape, are negative or are not int64.

        Shape:
            - counts: (1216,) int64
        """
        if counts.shape != (_ENDS[-1],) or counts.dtype != np.int64 or (counts < 0).any():
            raise ValueError(
                f"counts {counts.shape} of dtype {counts.dtype}; expected ({_ENDS[-1]},) int64, none of them negative"
            )
        pixels, instances, pictures = np.split(counts, _ENDS[:-1])
        rebuilt = cls()
        rebuilt.confusion = ConfusionMatrix.from_counts(pixels.reshape(_SHAPES[0]))
        rebuilt.instances += instances.reshape(_SHAPES[1])
        rebuilt.num_images, rebuilt.num_images_with_instances = pictures.tolist()
        return rebuilt

    def update(
        self,
        prediction_ids: NDArray[np.uint8],
        label_ids: NDArray[np.uint8],
        instance_ids: NDArray[np.uint16] | None = None,
    ) -> None:
        """Count one picture.

        Args:
            prediction_ids: Predicted label ids; what is above 33 is void.
            label_ids: Label ids of the ground truth, 0 to 33, or 255 for id -1, which is ignored.
            instance_ids: The ground truth's instances as stored: label id * 1000 + number, below 1000 no instance.
                None where there are none; then scores of instances are not computed.

        Raises:
            TypeError: If a map has another dtype.
            ValueError: If prediction and ground truth differ in shape.
            DataError: E-DATA-014 for other values in the ground truth, E-DATA-114 for an instance map of another size
                or with instances of a class that has none. Nothing is counted then.

        Shape:
            - prediction_ids, label_ids: (H, W) uint8
            - instance_ids: (H, W) uint16
        """
        found = None if instance_ids is None else _count_instances(prediction_ids, label_ids, instance_ids)
        self.confusion.update(prediction_ids, label_ids)
        self.num_images += 1
        if found is not None:
            self.instances += found
            self.num_images_with_instances += 1

    def __add__(self, other: CityscapesCounts) -> CityscapesCounts:
        """Merge the counts of two parts of a data set into new ones."""
        return CityscapesCounts.from_counts(self.counts + other.counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class CityscapesScores:
    """The scores of the benchmark in [0, 1], by name; None where the official script says NaN.

    Args:
        class_iou: IoU of the 19 classes.
        category_iou: IoU of the seven categories.
        class_iiou: IoU of the classes that have instances, each instance weighed by the mean size of its class over its
            own size.
        category_iiou: The same for the categories of such classes.
        mean_class_iou: Mean of ``class_iou`` over the classes that have one; None where none has.
        mean_category_iou: Mean of ``category_iou``, likewise.
        mean_class_iiou: Mean of ``class_iiou``, likewise.
        mean_category_iiou: Mean of ``category_iiou``, likewise.
        num_images: Pictures counted.
        num_images_with_instances: Pictures whose instances were counted. Unless these are all, no iIoU is computed.
    """

    class_iou: Mapping[str, float | None]
    category_iou: Mapping[str, float | None]
    class_iiou: Mapping[str, float | None]
    category_iiou: Mapping[str, float | None]
    mean_class_iou: float | None
    mean_category_iou: float | None
    mean_class_iiou: float | None
    mean_category_iiou: float | None
    num_images: int
    num_images_with_instances: int


def compute_cityscapes_scores(counts: CityscapesCounts) -> CityscapesScores:
    """Compute what the benchmark's server reports.

    Args:
        counts: Counts of the whole data set.

    Returns:
        The scores, unrounded.

    Reference:
        Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding", CVPR 2016, section 3.1;
        cityscapesScripts, evalPixelLevelSemanticLabeling.

    Deviations:
        See `CityscapesCounts`.
    """
    pixels = counts.confusion.counts
    class_iou: dict[str, float | None] = {}
    for label in _EVALUATED:
        actual = int(pixels[label].sum())
        class_iou[_NAMES[label]] = _iou(pixels[label, label], actual=actual, others=_mistaken_for(pixels, [label]))
    category_iou: dict[str, float | None] = {}
    for category in CATEGORIES:
        members = [label for label in _EVALUATED if _CATEGORY_OF[label] == category]
        right = pixels[np.ix_(members, members)].sum()
        actual = int(pixels[members].sum())
        category_iou[category] = _iou(right, actual=actual, others=_mistaken_for(pixels, members))

    class_iiou: dict[str, float | None] = dict.fromkeys(INSTANCE_CLASSES)
    category_iiou: dict[str, float | None] = dict.fromkeys(INSTANCE_CATEGORIES)
    if counts.num_images_with_instances == counts.num_images:
        sizes = _INSTANCE_SIZES.values()
        actual_by_class = [size * int(number) for size, number in zip(sizes, counts.instances[:, 0], strict=True)]
        as_class, as_category = (
            [size * int(share) / _WHOLE for size, share in zip(sizes, counts.instances[:, column], strict=True)]
            for column in (1, 2)
        )
        for place, label in enumerate(_INSTANCE_IDS):
            others = _mistaken_for(pixels, [label])
            class_iiou[_NAMES[label]] = _iou(as_class[place], actual=actual_by_class[place], others=others)
        for category in INSTANCE_CATEGORIES:
            places = [place for place, label in enumerate(_INSTANCE_IDS) if _CATEGORY_OF[label] == category]
            # all ids of the category, ignored ones included: a car predicted as a caravan is a vehicle
            members = [label for label in range(_NUM_IDS) if _CATEGORY_OF[label] == category]
            category_iiou[category] = _iou(
                sum(as_category[place] for place in places),
                actual=sum(actual_by_class[place] for place in places),
                others=_mistaken_for(pixels, members),
            )
    return CityscapesScores(
        class_iou=class_iou,
        category_iou=category_iou,
        class_iiou=class_iiou,
        category_iiou=category_iiou,
        mean_class_iou=_mean(class_iou.values()),
        mean_category_iou=_mean(category_iou.values()),
        mean_class_iiou=_mean(class_iiou.values()),
        mean_category_iiou=_mean(category_iiou.values()),
        num_images=counts.num_images,
        num_images_with_instances=counts.num_images_with_instances,
    )


def _count_instances(
    prediction_ids: NDArray[np.uint8], label_ids: NDArray[np.uint8], instance_ids: NDArray[np.uint16]
) -> NDArray[np.int64]:
    """Count a picture's instances and their shares of right pixels, see `CityscapesCounts.instances`.

    Shape:
        - prediction_ids, label_ids: (H, W) uint8
        - instance_ids: (H, W) uint16
        - returns: (8, 3) int64
    """
    if instance_ids.dtype != np.uint16:
        raise TypeError(f"instance_ids are {instance_ids.dtype}; expected uint16")
    if instance_ids.shape != label_ids.shape:
        given, wanted = ("x".join(map(str, array.shape)) for array in (instance_ids, label_ids))
        raise DataError(
            "E-DATA-114",
            f"instance map of {given}, but a label map of {wanted}",
            fix="restore the instance map as published",
        )
    counts = np.zeros(_SHAPES[1], np.int64)
    inside = instance_ids > 1000
    instances, predicted = instance_ids[inside].astype(np.intp), prediction_ids[inside]
    owners = instances // 1000
    sizes = np.bincount(instances)
    as_class = np.bincount(instances[predicted == owners], minlength=sizes.size)
    in_category = _INSTANCE_CATEGORY[predicted] == _INSTANCE_CATEGORY[owners]
    as_category = np.bincount(instances[in_category], minlength=sizes.size)
    for instance in np.flatnonzero(sizes).tolist():
        owner = instance // 1000
        if owner not in _INSTANCE_IDS:
            if owner >= _NUM_IDS or owner in _EVALUATED:
                what = _NAMES[owner] if owner < _NUM_IDS else f"label id {owner}"
                raise DataError(
                    "E-DATA-114",
                    f"instance {instance} of {what}, which has no instances; have: {', '.join(INSTANCE_CLASSES)}",
                    fix="use the instance map as published: label id * 1000 + number",
                )
            continue
        size = int(sizes[instance])
        # whole numbers of any length: a share of a large instance would not fit into 64 bits before it is divided
        shares = [(2 * _WHOLE * int(right[instance]) + size) // (2 * size) for right in (as_class, as_category)]
        counts[_INSTANCE_IDS.index(owner)] += [1, *shares]
    return counts


def _mistaken_for(pixels: NDArray[np.int64], members: list[int]) -> int:
    """Count the pixels of the other classes that are predicted as one of ``members``.

    Shape:
        - pixels: (34, 35) int64
    """
    rows = [label for label in _EVALUATED if label not in members]
    return int(pixels[np.ix_(rows, members)].sum())


def _iou(right: float | np.int64, *, actual: float, others: int) -> float | None:
    """Divide right by right, missed and mistaken pixels; None where there are none."""
    return float(right) / (actual + others) if actual + others else None


def _mean(values: Iterable[float | None]) -> float | None:
    """Average over those that have a value."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None
