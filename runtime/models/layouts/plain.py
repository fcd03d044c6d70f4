"""Weights as single files hold them, for ComfyUI and others: under a prefix, and with scales beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from runtime.models.layouts.stored import Stored
from runtime.models.layouts.weights import EIGHT_BITS, FLOATS, Weight, whole

SCALES = ("scale_weight", "weight_scale")
_OF_ACTIVATIONS = ("scale_input", "input_scale", "comfy_quant")  # and a note on the format, which dtypes tell
_USE = "use the model in bfloat16, float16 or, as a single file, fp8_scaled"
NOT_READ = f"a kind of quantisation that is not read; {_USE}"
_MARKS = ("scaled_fp8", "spiece_model")  # that there are scales; and a tokenizer


def prefix_of(tensors: Mapping[str, Stored], prefixes: Iterable[str], key: str) -> str | None:
    """Find the prefix under which a file holds a tensor; None if it does not."""
    return next((prefix for prefix in prefixes if prefix + key in tensors), None)


def plain(tensors: Mapping[str, Stored], prefix: str = "") -> dict[str, Weight]:
    """Take the weights under a prefix out of a file, without it, and join each with its scale.

    Raises:
        ValueError: one is of a kind of quantisation that is not read.
    """
    own = {key.removeprefix(prefix): one for key, one in tensors.items() if key.startswith(prefix)}
    scales: dict[str, Stored] = {}
    kept: dict[str, Stored] = {}
    for key, stored in own.items():
        module, _, leaf = key.rpartition(".")
        if leaf in SCALES:
            scales[f"{module}.weight"] = stored
        elif leaf not in _OF_ACTIVATIONS and key not in _MARKS:
            kept[key] = stored
    if strange := sorted(scales.keys() - kept.keys()):
        raise ValueError(f"{scales[strange[0]].key} is the scale of no weight")
    if lacking := sorted(key for key in kept.keys() - scales.keys() if scales and _is_matrix(kept[key])):
        raise ValueError(
            f"{kept[lacking[0]].key} is stored as {kept[lacking[0]].dtype} and lacks its scale, which "
            f"{len(scales)} other weights have"
        )
    return {key: _scaled(stored, scales.get(key)) for key, stored in kept.items()}


def _is_matrix(stored: Stored) -> bool:
    """Return whether a tensor is a matrix of float8, which has a scale if others of its file have."""
    return stored.dtype in EIGHT_BITS and len(stored.shape) == 2


def rename_all(
    weights: Mapping[str, Weight], rename: Callable[[str], str | None], prefix: str, part: str, model: str
) -> dict[str, Weight]:
    """Rename all weights of a component.

    Args:
        weights: the weights, without their prefix.
        rename: returns the new name of one; None if it has none.
        prefix: what stands before their names in the file, for the message.
        part: what the component is, for the message.
        model: what knows the names, with its verb, for the message: `UMT5 does`.

    Raises:
        ValueError: some have no new name.
    """
    names = {key: rename(key) for key in weights}
    if strangers := [key for key, name in names.items() if name is None]:
        raise ValueError(
            f"its {part} has {len(strangers)} weights that {model} not have, the first is "
            f"{prefix}{strangers[0]}"
        )
    return {name: weights[key] for key, name in names.items() if name is not None}


def _scaled(stored: Stored, scale: Stored | None) -> Weight:
    if stored.dtype not in (*FLOATS, *EIGHT_BITS):
        raise ValueError(f"{stored.key} is stored as {stored.dtype}, {NOT_READ}")
    if scale is not None:
        count = 1
        for extent in scale.shape:
            count *= extent
        if stored.dtype not in EIGHT_BITS or count not in (1, *stored.shape[:1]):
            raise ValueError(
                f"{scale.key} has shape {list(scale.shape)} for {stored.dtype} weights of shape "
                f"{list(stored.shape)}; one scale, or one for each row, of float8 weights is read"
            )
    return whole(stored, scale)
