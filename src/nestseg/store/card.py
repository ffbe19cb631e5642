"""Model cards: what a person who finds the weights must know, and what the Hub indexes. No torch in here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from nestseg.core.types import Segmentor
from nestseg.store.metadata import ModelMetadata

NOT_STATED = "not stated"

_SEGMENTORS: dict[Segmentor, str] = {
    "fcn": "FCN",
    "pspnet": "PSPNet",
    "deeplabv3": "DeepLabV3",
    "deeplabv3plus": "DeepLabV3+",
}

_VARIANTS = {
    "plain": "every dilated block alike",
    "official": "dilated as in the authors' own code",
    "timm": "dilated as in timm",
}

# The Hub refuses a card with an identifier that is not in its list. These are of it; any other licence goes under
# `license: other`, with its name beside it.
_HUB_LICENCE = re.compile(
    r"apache-2\.0|mit|bsd(-[23]-clause)?|cc0-1\.0|cc-by-(nc-)?(sa-)?[34]\.0|cc-by-nc-nd-[34]\.0|a?gpl-3\.0|lgpl-3\.0|"
    r"mpl-2\.0|openrail|unlicense|unknown|other"
)


def model_card(metadata: ModelMetadata, *, repository: str | None) -> str:
    """Write the model card of a network.

    Nothing in the metadata can become markup: names of classes, sources and licences are somebody's free text, and are
    shown as the characters that they are.

    Args:
        metadata: What the weights mean.
        repository: ``owner/name`` on the Hub; None for a folder on this machine.

    Returns:
        Markdown with YAML front matter; the same for the same arguments.

    Reference:
        The Hub's model card specification, https://github.com/huggingface/hub-docs/blob/main/modelcard.md
    """
    front = yaml.safe_dump(_front_matter(metadata), sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{front}---\n\n" + "\n".join(_body(metadata, repository)) + "\n"


def escape_markdown(text: str) -> str:
    r"""Turn any text into one line of Markdown that shows exactly it.

    Args:
        text: Anything; white space becomes single blanks, and characters that cannot be seen are dropped.

    Example:
        >>> print(escape_markdown("a|b\n<script>"))
        a\|b \<script\>
    """
    # the dot is for addresses, which are links without any markup
    return re.sub(r"([!-+:-@\[-`{-~]|(?<=[wW]{3})\.)", r"\\\1", _plain(text))


def _plain(text: object) -> str:
    return " ".join("".join(letter for letter in str(text) if letter.isprintable() or letter.isspace()).split())


def _slug(text: object) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", _plain(text).lower()).strip("-.") or "unnamed"


def _model_name(metadata: ModelMetadata) -> str:
    net = metadata.architecture
    named = f"{net.segmentor}_{net.backbone}-d{net.output_stride}_{metadata.dataset}"
    return _plain((metadata.recipe or {}).get("name", named))


def _front_matter(metadata: ModelMetadata) -> dict[str, Any]:
    front: dict[str, Any] = {}
    if metadata.licence is not None:
        licence = _slug(metadata.licence)
        known = _HUB_LICENCE.fullmatch(licence)
        front |= {"license": licence} if known else {"license": "other", "license_name": licence}
    front["library_name"] = "nestseg"
    front["pipeline_tag"] = "image-segmentation"
    net = metadata.architecture
    front["tags"] = list(dict.fromkeys(["semantic-segmentation", "pytorch", net.segmentor, _slug(net.backbone)]))
    front["datasets"] = [_slug(metadata.dataset)]
    if metadata.scores:
        front["model-index"] = [
            {
                "name": _model_name(metadata),
                "results": [
                    {
                        "task": {"type": "image-segmentation", "name": "Semantic segmentation"},
                        "dataset": {
                            "type": _slug(score.dataset),
                            "name": _plain(score.dataset),
                            "split": _plain(score.split),
                        },
                        "metrics": [
                            {
                                "type": "mean_iou",
                                "name": f"mean IoU ({_plain(score.protocol)})",
                                "value": score.mean_iou,
                            }
                        ],
                    }
                    for score in metadata.scores
                ],
            }
        ]
    return front


def _body(metadata: ModelMetadata, repository: str | None) -> Iterator[str]:
    net, text = metadata.architecture, escape_markdown
    yield f"# {text(_model_name(metadata))}\n"
    yield (
        f"Semantic segmentation with nestseg: {_SEGMENTORS[net.segmentor]} on "
        f"{text(net.backbone)}, output stride {net.output_stride} ({_VARIANTS[net.dilation_variant]}), "
        f"{net.num_classes} classes of {text(metadata.dataset)}.\n"
    )
    yield "## Use\n"
    where = "In the folder of this file:\n" if repository is None else 'After `pip install "nestseg[hub]"`:\n'
    spec = "." if repository is None else f"hf:{repository}"
    yield where
    yield "```python\nimport nestseg\n"
    yield f'predictor = nestseg.load_predictor("{spec}")'
    yield 'prediction = predictor.predict("image.jpg")  # a path, a PIL image or a (H, W, 3) uint8 array'
    yield 'prediction.to_png("labels.png")  # class ids, with the palette below'
    yield "print(prediction.class_areas())\n```\n"
    yield "## Input\n"
    if len(net.mean) == 3:
        yield "- RGB images of any size, values 0 to 255; mean and standard deviation are in the network:"
    else:
        yield f"- Images of {len(net.mean)} channels and any size; mean and standard deviation are in the network:"
    yield f"  {', '.join(f'{value:g}' for value in net.mean)} and {', '.join(f'{value:g}' for value in net.std)}"
    if metadata.base_size is None:
        yield "- Images are not resized.\n"
    else:
        short, long = metadata.base_size
        yield f"- Images are resized, keeping their ratio, to fit a short side of {short} and a long side of {long}.\n"
    yield "## Scores\n"
    if metadata.scores:
        yield "| data | split | images | mean IoU | measured |\n|---|---|---|---|---|"
        for score in metadata.scores:
            cells = (score.dataset, score.split, NOT_STATED if score.num_images is None else score.num_images)
            told = " | ".join(text(str(cell)) for cell in cells)
            yield f"| {told} | {100 * score.mean_iou:.2f} % | {text(score.protocol)} |"
        yield ""
    else:
        yield "None were measured.\n"
    yield "## Training\n"
    if metadata.recipe is not None:
        yield f"- Recipe: {text(_model_name(metadata))}; every number of it is in `config.json`"
    yield f"- Steps: {metadata.step if metadata.step or metadata.recipe is not None else NOT_STATED}"
    versions = ", ".join(f"{text(name)} {text(version)}" for name, version in sorted(metadata.versions.items()))
    yield f"- Versions: {versions or NOT_STATED}"
    yield f"- Source: {text(metadata.source or ('trained with nestseg' if metadata.recipe else NOT_STATED))}\n"
    yield "## Licence\n"
    yield f"- Licence of the weights: {text(metadata.licence or NOT_STATED)}"
    yield f"- Terms of the training data: {text(metadata.data_licence or NOT_STATED)}\n"
    yield "## Classes\n"
    yield "| id | class | colour |\n|---|---|---|"
    for index, (name, (red, green, blue)) in enumerate(zip(metadata.classes, metadata.palette, strict=True)):
        yield f"| {index} | {text(name)} | `#{red:02x}{green:02x}{blue:02x}` |"
