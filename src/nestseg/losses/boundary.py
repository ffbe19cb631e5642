"""Boundary loss: wrong probability costs the more, the farther it lies from the true boundary."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nestseg.core.types import IGNORE_INDEX
from nestseg.ops.pixel_scores import average_pixels, mark_classes, upsample_scores

MAX_DISTANCE = 1024
"""Pixels; what is farther counts as so far. Squares up to here are exact in float32."""


def boundary_loss(
    logits: Tensor, target: Tensor, *, ignore_index: int = IGNORE_INDEX, align_corners: bool = False
) -> Tensor:
    """Average, over the labelled pixels, probability on the wrong side of class boundaries times the distance to them.

    Meant beside a loss of regions, with a small weight: the authors start at 0.01. A pixel of a class adds what is
    missing from its probability, times its distance to the nearest pixel of another class; any other pixel adds its
    probability of the class, times its distance to the class. Both are summed over the classes that the image shows.
    Class weights have no place in it.

    Args:
        logits: Class scores at any stride.
        target: Train ids in [0, K), or ``ignore_index`` where a pixel does not count, nor ends a class.
        ignore_index: The value of target pixels that do not count.
        align_corners: Grid rule by which logits are upsampled.

    Returns:
        The mean in pixels, at least 0; 0 where nothing is labelled, or all of it is of one class.

    Shape:
        - logits: (N, K, h, w) float
        - target: (N, H, W) uint8 or int64
        - returns: () float

    Raises:
        RuntimeError: See `mark_classes`.

    Reference:
        Kervadec, Bouchtiba, Desrosiers, Granger, Dolz, Ben Ayed, "Boundary Loss for Highly Unbalanced Segmentation",
        MIDL 2019, section 2: the distance between two boundaries as an integral over the signed distance to one.

    Deviations:
        The term of the ground truth alone, which is constant and which they drop, is kept: a perfect prediction costs
        0, and gradients are the same. Theirs is for one class and background; here it is summed over classes. The
        boundary runs half-way between pixels of two classes, so that both sides of it count alike; the authors' code
        has it in the outermost pixels of the class. A class that an image does not show has no distance there and adds
        nothing, and distances above 1024 count as 1024. The weight is constant; theirs grows with the epochs. A batch
        in parts (devices, accumulation) gives the loss of the whole batch, unless class weights of another term decide
        what a part counts.

        Distances are computed on CPU by OpenCV, exactly: about 8 ms a class that an image of 512 x 512 shows. On an
        accelerator each step waits for the target to get there and the distances to get back.

    Example:
        >>> target = torch.tensor([[[0, 0, 1, 1]]])
        >>> boundary_loss(torch.zeros(1, 2, 1, 4), target).item()  # distances 1.5, 0.5, 0.5, 1.5; twice half of each
        1.0
    """
    scores, classes = upsample_scores(logits, target, align_corners=align_corners)
    marks = mark_classes(classes, num_classes=scores.shape[1], ignore_index=ignore_index)
    probabilities = scores.softmax(1)
    images = target.cpu().numpy()
    distances = np.stack([measure_distances(one, scores.shape[1], ignore_index=ignore_index) for one in images])
    costs = torch.from_numpy(distances).to(scores).reshape(scores.shape)
    errors = torch.where(marks, 1 - probabilities, probabilities)
    return average_pixels((errors * costs).sum(1), classes != ignore_index)


def measure_distances(
    target: NDArray[np.integer], num_classes: int, *, ignore_index: int = IGNORE_INDEX
) -> NDArray[np.float32]:
    """Measure how far each pixel is from the boundary of each class.

    Args:
        target: Train ids of one image in [0, K), or ``ignore_index``.
        num_classes: K.
        ignore_index: The value of pixels that are of no class.

    Returns:
        Euclidean distances in pixels up to `MAX_DISTANCE`, half a pixel less than between centres; 0 for classes that
        do not occur, in ignored pixels, and if only one class is labelled.

    Shape:
        - target: (H, W) integers
        - returns: (H, W, K) float32

    Raises:
        IndexError: If a value is outside [0, K) and not ``ignore_index``.

    Example:
        >>> measure_distances(np.array([[0, 255, 1]]), 3)[0].tolist()
        [[1.5, 1.5, 0.0], [0.0, 0.0, 0.0], [1.5, 1.5, 0.0]]
    """
    distances = np.zeros((*target.shape, num_classes), np.float32)
    present = [int(value) for value in np.unique(target) if value != ignore_index]
    if len(present) < 2:
        return distances
    labelled = target != ignore_index
    nearest_other = np.full(target.shape, np.inf, np.float32)
    for value in present:
        inside = target == value
        # to the nearest pixel of the class, from everywhere
        outside = cv2.distanceTransform((~inside).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        # OpenCV's roots differ in the last bit, by where the array lies in memory; what they are roots of are integers
        outside = np.sqrt(np.rint(np.square(np.minimum(outside, MAX_DISTANCE))))
        distances[..., value] = np.where(labelled, outside, 0)
        nearest_other = np.where(inside, nearest_other, np.minimum(nearest_other, outside))
    rows, columns = np.nonzero(labelled)
    distances[rows, columns, target[labelled]] = nearest_other[labelled]
    return np.maximum(distances - 0.5, 0, out=distances)
