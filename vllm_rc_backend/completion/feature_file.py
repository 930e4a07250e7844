"""The file of learned feature maps, one for a whole model, refused with the reason if it does not fit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vllm_rc_backend.completion import LEARNED, Completion, make_completion
from vllm_rc_backend.completion.features import Features

FORMAT, VERSION = "rc-topk feature maps", "1"
PARTS = ("key_weight", "key_bias", "query_weight", "query_bias")

FINGERPRINT_KEYS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
)


class FeatureFileError(ValueError):
    """The file cannot be used; the message names it and says why."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"{path}: {reason}. Make one with: rc-topk calibrate --model DIR --data FILE --out {path}"
        )


def fingerprint(config: Mapping[str, Any]) -> str:
    """What identifies a model, from the facts of its ``config.json`` that every loader keeps: 16 hexadecimal digits."""
    heads = config.get("num_key_value_heads") or config.get("num_attention_heads")
    facts = json.dumps([config.get(key) for key in FINGERPRINT_KEYS] + [heads])
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class FeatureFile:
    """Maps of every layer.

    Attributes:
        layers: one ``Features`` per layer of the model, all KV heads.
        model: fingerprint of the model.
        notes: how the maps were made.
    """

    layers: list[Features]
    model: str
    notes: str = ""

    def save(self, path: Path) -> None:
        """Write the file."""
        tensors = {
            f"layers.{i}.{part}": getattr(layer, part).contiguous().cpu()
            for i, layer in enumerate(self.layers)
            for part in PARTS
        }
        heads, features, head_size = self.layers[0].key_weight.shape
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "layers": str(len(self.layers)),
            "heads": str(heads),
            "head_size": str(head_size),
            "features": str(features),
            "notes": self.notes,
        }
        save_file(tensors, path, metadata)

    @classmethod
    def load(cls, path: Path, model: str) -> FeatureFile:
        """Read a file and hold it against the model it is to be used with.

        Raises:
            FeatureFileError: with the reason.
        """
        if not path.is_file():
            raise FeatureFileError(path, "there is no such file")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError) as error:
            raise FeatureFileError(path, f"it is damaged or no safetensors file ({error})") from error
        if metadata.get("format") != FORMAT:
            raise FeatureFileError(path, "it holds no feature maps")
        if metadata.get("version") != VERSION:
            raise FeatureFileError(
                path, f"it is of version {metadata.get('version')}, this release reads {VERSION}"
            )
        if metadata.get("model") != model:
            raise FeatureFileError(
                path, f"it was made for another model (fingerprint {metadata.get('model')}, here {model})"
            )
        layout = [int(metadata.get(key, 0)) for key in ("layers", "heads", "features", "head_size")]
        return cls(_layers(path, tensors, *layout), model, metadata.get("notes", ""))

    def layer(self, index: int, first_head: int, heads: int) -> Features:
        """The maps of some KV heads of one layer: those of a tensor-parallel rank."""
        layer, rank = self.layers[index], slice(first_head, first_head + heads)
        return Features(*(getattr(layer, part)[rank] for part in PARTS))


def layer_completion(
    name: str, features_file: str | None, model: Mapping[str, Any], layer: int, rank: int, ranks: int
) -> Completion:
    """The completion of one layer on one tensor-parallel rank.

    Args:
        name: of ``completion.KINDS``.
        features_file: the path, if the completion is learned.
        model: the facts of its ``config.json``, see ``fingerprint``.
        layer: index in the model.
        rank, ranks: of the tensor-parallel group; each holds its share of the KV heads, at least one.
    """
    if name != LEARNED:
        return make_completion(name)
    file = _load(Path(str(features_file)), fingerprint(model))
    total = len(file.layers[layer].key_bias)
    return file.layer(layer, rank * total // ranks, max(total // ranks, 1))


@cache
def _load(path: Path, model: str) -> FeatureFile:
    return FeatureFile.load(path, model)


def _layers(
    path: Path, tensors: dict[str, Tensor], layers: int, heads: int, features: int, head_size: int
) -> list[Features]:
    shapes = dict.fromkeys(PARTS, (heads, features)) | dict.fromkeys(PARTS[::2], (heads, features, head_size))
    found = []
    for i in range(layers):
        parts = []
        for part in PARTS:
            tensor = tensors.get(f"layers.{i}.{part}")
            if tensor is None or tuple(tensor.shape) != shapes[part] or not tensor.isfinite().all():
                raise FeatureFileError(path, f"layer {i} has no usable {part} of shape {shapes[part]}")
            parts.append(tensor.float())
        found.append(Features(*parts))
    return found
