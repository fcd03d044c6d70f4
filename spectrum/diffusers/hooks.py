"""Hooks of diffusers that compute or forecast: one on the transformer, and for features one on each block."""

from __future__ import annotations

import threading
from abc import abstractmethod
from typing import Any

import torch
from diffusers.hooks import ModelHook
from diffusers.hooks.hooks import BaseState, StateManager

from spectrum.diffusers.blocks import Block
from spectrum.diffusers.generation import Turn
from spectrum.diffusers.outputs import pack
from spectrum.diffusers.session import Session

NAME = "spectrum"


class _Contexts(StateManager):  # type: ignore[misc]
    """The context of the call under way in each thread, as `cache_context` tells it."""

    def __init__(self) -> None:
        super().__init__(BaseState)
        self._threads = threading.local()

    @property
    def context(self) -> Any:
        """The context; None if the pipeline gives none."""
        return getattr(self._threads, "context", None)

    def set_context(self, context: Any) -> None:
        """Take note of the context that diffusers tells."""
        self._threads.context = context


class _Hook(ModelHook):  # type: ignore[misc]  # diffusers has no types
    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse copies: diffusers' registry would have a copied module run the weights of the original."""
        raise TypeError(
            "a transformer on which Spectrum is enabled can neither be copied nor pickled; call "
            "spectrum.diffusers.disable(...) before, and enable(...) afterwards"
        )


class TransformerHook(_Hook):
    """Hook of a transformer: asks the session what to do in each call, and does it.

    Args:
        session: decides.
    """

    _is_stateful = True

    def __init__(self, session: Session):
        super().__init__()
        self.session = session
        self.contexts = _Contexts()

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Compute or forecast one call."""
        if getattr(module, "is_cache_enabled", False):
            raise RuntimeError(
                f"{type(module).__name__}: enable_cache() was called while Spectrum is enabled; call "
                f"disable_cache() on it, or spectrum.diffusers.disable(...)"
            )
        with self.session.lock:  # threads that share the transformer take turns
            turn = self._turn(module, args, kwargs)
            try:
                return self._output(turn, args, kwargs)
            except BaseException:
                self.session.forget()  # whatever comes next does not continue this generation
                raise

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        """Forget the generation under way; pipelines ask for it when they end."""
        with self.session.lock:
            self.session.forget()
        self.contexts.set_context(None)
        return module

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _turn(self, module: torch.nn.Module, args: Any, kwargs: Any) -> Turn | None:
        return self.session.turn(module, args, kwargs, self.contexts.context)

    @abstractmethod
    def _output(self, turn: Turn | None, args: Any, kwargs: Any) -> Any:
        """Return the output of a call."""


class VelocityHook(TransformerHook):
    """Hook that forecasts the transformer's output; a forecast runs no part of it."""

    def _output(self, turn: Turn | None, args: Any, kwargs: Any) -> Any:
        if turn is not None and turn.forecasts:
            return self._forecast(turn)
        output = self.fn_ref.original_forward(*args, **kwargs)
        if turn is not None and turn.records:
            self._record(turn, output)
        return output

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _forecast(self, turn: Turn) -> Any:
        assert turn.branch is not None and turn.branch.layout is not None
        return turn.branch.layout.output(turn.value())

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _record(self, turn: Turn, output: Any) -> None:
        assert turn.branch is not None
        packed, turn.branch.layout = pack(output)
        turn.record(packed)


class FeatureHook(TransformerHook):
    """Hook that forecasts the output of the last block; embeddings and the head always run.

    Attributes:
        turn: what is to be done in the call under way.
        value: its feature, once it was forecast, or computed by the last block.
    """

    def __init__(self, session: Session):
        super().__init__(session)
        self.turn: Turn | None = None
        self.value: torch.Tensor | None = None

    def _output(self, turn: Turn | None, args: Any, kwargs: Any) -> Any:
        self.turn = turn
        if turn is not None and turn.forecasts:
            self.value = self._forecast(turn)
        try:
            output = self.fn_ref.original_forward(*args, **kwargs)
            value = self.value
        finally:
            self.turn = self.value = None
        if turn is not None and turn.records:
            if value is None:
                raise RuntimeError("the transformer did not run its last block, whose output was to be kept")
            self._record(turn, value)
        return output

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _forecast(self, turn: Turn) -> torch.Tensor:
        return turn.value()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _record(self, turn: Turn, value: torch.Tensor) -> None:
        turn.record(value)


class BlockHook(_Hook):
    """Hook of one block: lets its inputs through at a forecast; after the last block comes the forecast.

    It can be compiled with the block: nothing in it needs Python while the compiled code runs.
    """

    def __init__(self, transformer: FeatureHook, block: Block):
        super().__init__()
        self._transformer, self._block, self._places = transformer, block, block.places()

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the block, or skip it."""
        turn = self._transformer.turn
        if turn is None or not turn.forecasts:
            output = self.fn_ref.original_forward(*args, **kwargs)
            if self._block.last and turn is not None and turn.records:
                is_several = isinstance(output, tuple)
                self._transformer.value = output[self._block.image] if is_several else output
            return output
        values = [
            kwargs[name] if name in kwargs else args[place]
            for name, place in zip(self._block.returns, self._places, strict=True)
        ]
        if self._block.last:
            values[self._block.image] = self._transformer.value
        return values[0] if len(values) == 1 else tuple(values)
