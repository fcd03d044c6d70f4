"""The tokenizer of UMT5 beside weights in another layout: in a folder, or within the text encoder's file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.errors import reason
from runtime.files.cache import CachedFile
from runtime.files.text import read_json
from runtime.models.layouts.given import Given, WeightSet
from runtime.models.layouts.stored import TensorReader

_FILES = (
    "tokenizer.json",
    "spiece.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_VOCABULARIES = _FILES[:2]
_EMBEDDED = "spiece_model"  # bytes of spiece.model, as ComfyUI's files of UMT5 have them
_DEPTH = 3
_SETTINGS = {  # of umt5-xxl
    "tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>",
    "extra_ids": 0, "model_max_length": 512,
}  # fmt: skip


def tokenizer_files(given: Given, text_encoder: WeightSet) -> dict[str, Path | bytes]:
    """Find the files of the tokenizer: named by the user, in the folder, or within the text encoder's file.

    Returns:
        Path in diffusers layout → file, or its content.

    Raises:
        OSError, ValueError: there is none, or several.
    """
    if given.tokenizer is not None:
        return _in(given.tokenizer)
    folders = [] if given.folder is None else list(_folders(given.folder))
    if len(folders) > 1:
        raise ValueError(f"it holds several tokenizers: {', '.join(map(str, folders))}")
    if folders:
        return _in(folders[0])
    embedded = text_encoder.tensors.get(_EMBEDDED)
    if embedded is None:
        raise ValueError(
            "it holds no tokenizer (the folder google/umt5-xxl of Wan's repositories); name one with "
            "`tokenizer:`, as docs/models.md says"
        )
    with TensorReader() as reader:
        content = reader.read(embedded).numpy().tobytes()
    return _of_sentencepiece(content) | {"tokenizer/tokenizer_config.json": _settings()}


def _of_sentencepiece(model: bytes) -> dict[str, Path | bytes]:
    """Make `tokenizer.json` of `spiece.model`, which transformers reads only with sentencepiece installed.

    Raises:
        ValueError: it is damaged.
    """
    kept = CachedFile(f"tokenizers/{hashlib.sha256(model).hexdigest()[:32]}.json")
    text = kept.read()
    if text is None:
        from transformers import T5Tokenizer
        from transformers.convert_slow_tokenizer import import_protobuf

        content: Any = import_protobuf().ModelProto()
        try:
            content.ParseFromString(model)
        except Exception as error:  # protobuf's own
            raise ValueError(f"its tokenizer is damaged: {reason(error)}") from None
        if not content.pieces:
            raise ValueError("its tokenizer is empty")
        made = T5Tokenizer(
            vocab=[(piece.piece, piece.score) for piece in content.pieces],
            _spm_precompiled_charsmap=content.normalizer_spec.precompiled_charsmap or None,
            extra_ids=0,
        )
        text = made.backend_tokenizer.to_str()
        kept.write(text)
    return {"tokenizer/tokenizer.json": text.encode()}


def _settings() -> bytes:
    return json.dumps(_SETTINGS).encode()


def _in(place: Path) -> dict[str, Path | bytes]:
    """Files of the tokenizer in a folder, or the one file that holds it."""
    folder = place if place.is_dir() else place.parent
    files: dict[str, Path | bytes] = {
        f"tokenizer/{name}": folder / name for name in _FILES if (folder / name).is_file()
    }
    if not any(f"tokenizer/{name}" in files for name in _VOCABULARIES):
        raise FileNotFoundError(f"tokenizer: {place} holds neither {' nor '.join(_VOCABULARIES)}")
    files.setdefault("tokenizer/tokenizer_config.json", _settings())
    if "tokenizer/tokenizer.json" not in files:
        files |= _of_sentencepiece((folder / "spiece.model").read_bytes())
    return files


def _folders(folder: Path, depth: int = _DEPTH) -> Iterator[Path]:
    """Folders that hold a tokenizer of T5; Wan's I2V brings one of CLIP's texts, too, which is not used."""
    if any((folder / name).is_file() for name in _VOCABULARIES) and _is_t5(folder):
        yield folder
    if depth > 1:
        for entry in sorted(folder.iterdir()):
            if entry.is_dir() and not entry.name.startswith("."):
                yield from _folders(entry, depth - 1)


def _is_t5(folder: Path) -> bool:
    try:
        stated = read_json(folder / "tokenizer_config.json")
    except (OSError, ValueError):
        return (folder / "spiece.model").is_file()
    return str(stated.get("tokenizer_class", "")).startswith("T5")
