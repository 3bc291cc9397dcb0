"""A supernet's embedding and head: as they were loaded, or rounded as exported files hold them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from export.quantize import QuantizedWeight, dequantize, fake_quantize, quantize
from hw_profiles.shapes import HEAD_BITS, NARROW_HEAD_BITS, Precision
from nas.calibration import Statistics
from nas.families import LoadedModel
from nas.rounding import round_with_feedback

#: Of a head that is rounded with feedback, whose rows do not meet.
_WEIGHTS_AT_ONCE = 2**24


class Ends:
    """Swaps the weights of a loaded model's embedding and head, which are one tensor where they are `tied`."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.tied: bool = loaded.config.tie_word_embeddings
        self._family = loaded.family
        self._embedding: Any = loaded.model.get_input_embeddings()
        self._head: Any = loaded.head
        self._loaded = {module: module.weight.detach() for module in (self._embedding, self._head)}
        self._active: tuple[Precision, int] = ("fp32", 0)
        self._rounded: dict[Precision, dict[nn.Module, torch.Tensor]] = {}
        self._statistics: Statistics | None = None
        self._narrow_head: QuantizedWeight | None = None

    def prepare(self, statistics: Statistics) -> None:
        """Round a narrow head by what it reads there from now on."""
        self._statistics, self._narrow_head = statistics, None

    def over(self, loaded: LoadedModel) -> Ends:
        """Those of a copy of the model; what was rounded by statistics is shared."""
        other = Ends(loaded)
        other._statistics, other._narrow_head = self._statistics, self._narrow_head
        return other

    def activate(self, precision: Precision, head_bits: int = 0) -> None:
        """Round both as a model of that precision has them, or take them as they are at fp32.

        The head may have bits of its own.
        """
        own: Precision = "int8" if HEAD_BITS[precision] == 8 else precision
        if (own, head_bits) == self._active:
            return
        weights = dict(self._loaded if own == "fp32" else self._rounded_to(own))
        if head_bits:
            weights[self._head] = dequantize(self.narrow_head())
        parameters = {id(t): nn.Parameter(t, requires_grad=False) for t in weights.values()}
        for module, tensor in weights.items():
            module.weight = parameters[id(tensor)]
        self._active = own, head_bits

    def _rounded_to(self, precision: Precision) -> dict[nn.Module, torch.Tensor]:
        if precision not in self._rounded:
            embedding, head = self.exact()
            rounded = fake_quantize(embedding, precision)
            self._rounded[precision] = {
                self._embedding: rounded,
                self._head: rounded if self.tied else fake_quantize(head, precision),
            }
        return self._rounded[precision]

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Embedding and head as loaded, in fp32, each [vocabulary, hidden]."""
        embedding = self._loaded[self._embedding].float()
        return embedding, embedding if self.tied else self._loaded[self._head].float()

    def quantized(self, precision: Precision, head_bits: int = 0) -> dict[str, QuantizedWeight]:
        """The integers and scales of a model of that precision, int8 or int4; of a head only where it has its own."""
        bits = HEAD_BITS[precision]
        quantized = {f"{self._family.embedding}.weight": quantize(self._loaded[self._embedding], bits)}
        if head_bits:
            quantized[f"{self._family.head}.weight"] = self.narrow_head()
        elif not self.tied:
            quantized[f"{self._family.head}.weight"] = quantize(self._loaded[self._head], bits)
        return quantized

    def narrow_head(self) -> QuantizedWeight:
        """The head at NARROW_HEAD_BITS: with error feedback, before `prepare` to the nearest."""
        if self._narrow_head is None:
            head = self._loaded[self._head]
            if self._statistics is None:
                self._narrow_head = quantize(head.float(), NARROW_HEAD_BITS)
            else:
                H = self._statistics.head_input
                rows = max(1, _WEIGHTS_AT_ONCE // head.shape[1])
                rounded = [round_with_feedback(part.float(), H, NARROW_HEAD_BITS) for part in head.split(rows)]
                self._narrow_head = QuantizedWeight(
                    torch.cat([part.integers for part in rounded]),
                    torch.cat([part.scales for part in rounded]),
                    NARROW_HEAD_BITS,
                )
        return self._narrow_head
