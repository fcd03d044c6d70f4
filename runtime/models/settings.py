"""Settings of a model folder's components, read from its JSON files and type-checked, for every family."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from runtime.errors import named
from runtime.files.text import read_json


class Settings(BaseModel):
    """Base of a component's settings: fields as in diffusers, with its defaults; unknown ones are ignored."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the settings in a JSON file.

        Raises:
            FileNotFoundError, ValueError: the file is missing, or a field is missing, of the wrong type or
                out of bounds.
        """
        try:
            return cls.model_validate(read_json(path))
        except ValidationError as error:
            problems = list(_problems(error))
            more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise ValueError(f"{'/'.join(path.parts[-2:])}: {'; '.join(problems[:3])}{more}") from None


def _problems(error: ValidationError) -> Iterator[str]:
    for problem in error.errors(include_url=False):
        field = ".".join(str(part) for part in problem["loc"])
        said = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "missing":
            yield f"{field} is missing"
        elif field:
            yield f"{field}: {reprlib.repr(problem['input'])} given; {said[:1].lower()}{said[1:]}"
        else:
            yield said


class ModelIndex(Settings):
    """Contents of `model_index.json`: the class of the pipeline."""

    pipeline: str = Field(alias="_class_name")


def empty_model(make: Callable[[], Any], path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of a model that settings describe; nothing is allocated.

    Args:
        make: builds the model.
        path: file of the settings, for messages.

    Raises:
        ValueError: no model can be built from them.
    """
    import torch

    try:
        with torch.device("meta"):
            model = make()
    except Exception as error:  # whatever a model's class makes of settings that do not fit each other
        raise ValueError(f"{path} describes no model: {named(error)}") from None
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
