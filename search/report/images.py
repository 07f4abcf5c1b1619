"""Small pictures on the page: images with what the model says of them, filters, activations.

A picture is a PNG inside the page, of its own few pixels; the browser enlarges it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from search.report.page import Html, text

MOST_MAPS = 16  # of one image

Pictures = Mapping[str, np.ndarray]


def png(image: np.ndarray) -> str:
    """A data URI.

    Args:
        image: (height, width, channels) uint8; of other than 1 or 3 channels the first is shown.
    """
    shown = image if image.shape[2] == 3 else image[:, :, 0]
    content = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(shown)).save(content, "png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def judged(pictures: Pictures, which: str, class_names: Sequence[str]) -> Html:
    """Images with the predicted class, its confidence, and the true class where it is another.

    Args:
        which: "misclassified" or "samples" (search/winners/pictures.py).
    """
    images, labels, predicted, confidence = (
        pictures[f"{which}_{part}"] for part in ("images", "labels", "predicted", "confidence")
    )
    shown = []
    for image, true, said, share in zip(images, labels, predicted, confidence, strict=True):
        is_right = true == said
        words = Html(
            f'<b class="{"right" if is_right else "wrong"}">{"✓" if is_right else "✗"} '
            f"{text(class_names[said])}</b> {share:.0%}"
            + ("" if is_right else f"<span>is {text(class_names[true])}</span>")
        )
        alternative = f"{class_names[true]}, predicted {class_names[said]} with {share:.0%}"
        shown.append(_figure(image, words, alternative))
    return _gallery(shown)


def of_classes(pictures: Pictures, class_names: Sequence[str]) -> Html:
    """Training images, class after class."""
    return _gallery(
        [
            _figure(image, text(class_names[label]), class_names[label])
            for image, label in zip(pictures["train_images"], pictures["train_labels"], strict=True)
        ]
    )


def filters(pictures: Pictures) -> Html:
    """The kernels of the first convolution, each stretched to its own range; those of three
    channels in colour, of other numbers the mean over the channels."""
    kernels = np.asarray(pictures["filters"], np.float32)
    if kernels.shape[2] not in (1, 3):
        kernels = kernels.mean(axis=2, keepdims=True)
    return _gallery(
        [
            _figure(stretched(kernels[..., index]), Html(""), f"filter {index + 1}")
            for index in range(kernels.shape[-1])
        ],
        small=True,
    )


def maps(pictures: Pictures) -> Html:
    """What the first convolution makes of a few images: each image, then its maps."""
    rows = []
    for number, found in enumerate(np.asarray(pictures["maps"], np.float32)):
        row = [
            _figure(
                stretched(found[:, :, [index]]), Html(""), f"image {number + 1}, map {index + 1}"
            )
            for index in range(min(MOST_MAPS, found.shape[2]))
        ]
        image = _figure(pictures["samples_images"][number], Html(""), f"image {number + 1}")
        rows.append(f'<div class="maps">{_gallery([image])}{_gallery(row, small=True)}</div>')
    return Html("".join(rows))


def stretched(values: np.ndarray) -> np.ndarray:
    """Any finite numbers as uint8, from the smallest (0) to the largest (255); equal ones: 128."""
    low, high = float(values.min()), float(values.max())
    if not high > low:
        return np.full(values.shape, 128, np.uint8)
    return np.round(255 * (values - low) / (high - low)).astype(np.uint8)


def _figure(image: np.ndarray, words: Html, alternative: str) -> str:
    caption = f"<figcaption>{words}</figcaption>" if words else ""
    return f'<figure><img src="{png(image)}" alt="{text(alternative)}">{caption}</figure>'


def _gallery(figures: Sequence[str], *, small: bool = False) -> Html:
    return Html(f'<div class="gallery{" small" if small else ""}">{"".join(figures)}</div>')
