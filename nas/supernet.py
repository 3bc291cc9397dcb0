"""One model that computes any subnet of its space: prefixes of keep-orders, with least-squares weights made beforehand.

Nothing is masked and nothing is trained. RoPE frequencies, the attention scale and norms never change.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from export.decoder import decoder_shape
from export.quantize import QuantizedWeight, dequantize, fake_quantize, quantize
from hw_profiles.profile import Progress
from hw_profiles.shapes import BLOCK_BITS, Precision
from nas.calibration import Statistics, collect
from nas.ends import Ends
from nas.families import LoadedModel, fills_memory
from nas.layer_modules import SkippedAttention, SkippedMlp, call_around, put_tensor
from nas.own_weights import OwnLayers, OwnWeights
from nas.part_plans import PartPlan, cache_folder, kept_rows, load_plans, part_order, part_outputs, read_by_output
from nas.rounded_parts import RoundedParts, RoundedWeights
from nas.rounding import round_inputs, round_with_feedback
from nas.space import SearchSpace
from nas.subnet import PARTS, Part, Size, Subnet

#: Of what is rounded, in files: raise it when they change their meaning.
_ROUNDING_VERSION = 1
#: What computes one part of one layer: a size and a precision, weights of a subnet's own, or None, the loaded ones.
_Active = tuple[Size, Precision] | OwnWeights | None


class Supernet:
    """Wraps `loaded.model`, whose weights `activate` swaps: `model(input_ids)` gives the active subnet's logits.

    Feed whole sequences: generating with a KV cache is for extracted models. Sizes short of full need `prepare`.

    A model that would fill the memory is run `lean`: a layer has the active subnet's weights, and those that were
    stored in half precision as fp32, only while it runs, and what was rounded is kept in files. Beside the loaded
    weights one layer is then in memory.
    """

    def __init__(self, loaded: LoadedModel, space: SearchSpace, *, lean: bool | None = None) -> None:
        if space.base != loaded.shape:
            raise ValueError(f"wanted a space made from {loaded.name}'s config, got one for another model; rebuild it")
        if decoder_shape(loaded.model) != space.base:
            raise ValueError(f"wanted {loaded.name} whole, got it with a subnet active; activate the full subnet first")
        self.loaded = loaded
        self.space = space
        self.model = loaded.model
        self._layers = loaded.layers
        self._modules = [{p: layer.get_submodule(self.part_name(p)) for p in PARTS} for layer in self._layers]
        self._loaded = [
            {name: tensor.detach() for name, tensor in layer.state_dict().items()} for layer in self._layers
        ]
        #: Of the full subnet: as loaded, or shifted.
        self._original = self._loaded
        self.ends = Ends(loaded)
        self._reform = True
        self._plans: list[dict[Part, PartPlan]] = []
        self._statistics: Statistics | None = None
        #: Names model, text and kind of the weights that `prepare` made.
        self.prepared_from = ""
        #: What is made is kept there, in a folder of its own that goes with it where `prepare` is given none.
        self.cache_dir: Path | None = None
        self._rounded_parts = RoundedParts()
        self._own: dict[Subnet, OwnLayers] = {}
        self._active: dict[tuple[int, Part], _Active] = {(i, p): None for i in range(space.depth) for p in PARTS}
        self._halved = any(tensor.dtype != torch.float32 for tensor in self.model.parameters())
        self.lean = self._halved or (fills_memory(space.base) if lean is None else lean)
        if self.lean:
            for index, layer in enumerate(self._layers):
                before, after = (partial(f, layer=index) for f in (Supernet._before_layer, Supernet._after_layer))
                call_around(layer, weakref.ref(self), before, after)

    def prepare(
        self,
        windows: torch.Tensor,
        *,
        reform: bool = True,
        cache_dir: Path | None = None,
        progress: Progress = lambda done, total, what: None,
    ) -> None:
        """Orders and least-squares weights of every choice from token windows [N, T], or what `cache_dir` has of them.

        With `reform` off subnets inherit their weights unchanged (same orders), to show what reformation is worth.
        """
        self.activate_full_model()
        self._original = self._loaded
        self._reform = reform
        if cache_dir is None:
            cache_dir = Path(tempfile.mkdtemp(prefix="supernet-"))
            weakref.finalize(self, shutil.rmtree, cache_dir, ignore_errors=True)
        self.cache_dir = cache_dir
        depth = self.space.depth
        self._statistics = collect(
            self.loaded, windows, cache_dir, lambda done, _, what: progress(done, 2 * depth, what)
        )
        self.ends.prepare(self._statistics)
        self.prepared_from = f"{self._statistics.key} {'reformed' if reform else 'inherited'}"
        if self.space.head_choices:  # in another order within their groups
            self.prepared_from += f" by {self.space.heads_per_group} heads"
        self._forget()
        self._plans = load_plans(
            self._statistics,
            cache_dir,
            depth,
            {part: [size for size in self.space.sizes(part)[:-1] if size] for part in PARTS},
            {part: self.space.order_shape(part) for part in PARTS},
            self.output_weight,
            lambda done, _, what: progress(depth + done, 2 * depth, what),
        )

    def plan(self, layer: int, part: Part) -> PartPlan:
        """What `prepare` made for one part; ValueError before it ran."""
        if not self._plans:
            raise ValueError(
                "wanted a prepared supernet for sizes short of full, got none; call prepare(windows) first"
            )
        return self._plans[layer][part]

    def activate(self, subnet: Subnet) -> None:
        """Make `model` compute `subnet` with weights rounded to its bits; only what differs from before is touched."""
        self.space.validate(subnet)
        for index, layer in enumerate(subnet.layers):
            for part in PARTS:
                if (own := self._own_weights(subnet, index, part)) is None:
                    self.activate_part(index, part, layer.size(part), subnet.part_precision(index, part))
                else:
                    self.install(index, part, own)
        self.ends.activate(subnet.precision, subnet.head_bits)

    def activate_full_model(self) -> None:
        """The model as it was loaded, even where the full subnet has weights of its own, or was shifted."""
        for (layer, part), active in self._active.items():
            if active is not None:
                self._activate(layer, part, None)
        self.ends.activate("fp32")

    def shift(self, deltas: Sequence[Mapping[str, torch.Tensor]], name: str) -> None:
        """Add fp32 deltas to the full maps, by layer and name within it; what a subnet keeps of a map is shifted alike.

        `name` joins `prepared_from`. The full model that others are compared with stays as it was loaded.
        """
        self.activate_full_model()
        self._original = [
            {name: tensor + delta[name] if name in delta else tensor for name, tensor in layer.items()}
            for layer, delta in zip(self._original, deltas, strict=True)
        ]
        for index, plans in enumerate(self._plans):
            for part, plan in plans.items():
                output = self.output_name(part)
                delta = deltas[index][f"{output}.weight"]
                outputs = {
                    k: weight + delta[:, self.kept_indices(index, part, k, output)]
                    for k, weight in plan.outputs.items()
                }
                plans[part] = replace(plan, outputs=outputs)
        self.prepared_from += f" shifted by {name}"
        self._forget()

    @contextmanager
    def shifted(self, deltas: Sequence[Mapping[str, torch.Tensor]], name: str) -> Iterator[None]:
        """Within, shifted as by `shift`; what subnets have of their own is gone afterwards all the same."""
        before = (self._original, [dict(plans) for plans in self._plans], self.prepared_from)
        self.shift(deltas, name)
        self._rounded_parts = RoundedParts()  # not in files, where another trial may have the same name
        try:
            yield
        finally:
            self.activate_full_model()
            self._original, self._plans, self.prepared_from = before
            self._forget()

    def over(self, model: Any) -> Supernet:
        """The same over a copy of the model as it was loaded; what was prepared is shared."""
        other = Supernet(replace(self.loaded, model=model), self.space, lean=False)  # training holds on to weights
        other._original, other._reform, other._statistics = self._original, self._reform, self._statistics
        other._plans = [dict(plans) for plans in self._plans]
        other.prepared_from, other.cache_dir = self.prepared_from, self.cache_dir
        other.ends = self.ends.over(other.loaded)
        other._forget()
        return other

    def _forget(self) -> None:
        """What was made from weights that are others now."""
        folder = None
        if self.lean and self.cache_dir is not None:
            folder = cache_folder(self.cache_dir, "rounded", f"{_ROUNDING_VERSION} {self.prepared_from}")
        self._rounded_parts = RoundedParts(folder)
        self._own.clear()

    def activate_part(self, layer: int, part: Part, choice: Size, precision: Precision) -> None:
        """Change one part of one layer and leave the rest of `model` as it is."""
        if self._active[layer, part] != (choice, precision):
            self._activate(layer, part, (choice, precision))

    def install(self, layer: int, part: Part, own: OwnWeights) -> None:
        """The same with weights of no size of the supernet's: those of `own`, as rounded."""
        if self._active[layer, part] is not own:
            self._activate(layer, part, own)

    def adopt(self, subnet: Subnet, own: OwnLayers) -> None:
        """From now on `subnet` has these weights of its own."""
        self._own[subnet] = own

    def _own_weights(self, subnet: Subnet, layer: int, part: Part) -> OwnWeights | None:
        return self._own[subnet][layer].get(part) if subnet in self._own else None

    def _activate(self, layer: int, part: Part, active: _Active) -> None:
        if not self.lean:
            self._put(layer, part, active)
        self._active[layer, part] = active

    def _before_layer(self, layer: int) -> None:
        """Where it is `lean`, put what is active into a layer that is about to run."""
        for part in PARTS:
            if self._halved or self._active[layer, part] is not None:
                self._put(layer, part, self._active[layer, part])

    def _after_layer(self, layer: int) -> None:
        """Give the layer its loaded weights back."""
        for part in PARTS:
            if self._halved or self._active[layer, part] is not None:
                self._compute_with(layer, part, self._of_part(self._loaded[layer], part))

    def _put(self, layer: int, part: Part, active: _Active) -> None:
        """Let the model compute a part so, in fp32."""
        if active is None:
            weights = {name: tensor.float() for name, tensor in self._of_part(self._loaded[layer], part).items()}
        elif isinstance(active, OwnWeights):
            weights = _dequantized(active.rounded)
        elif active[0]:
            weights = self._rounded(layer, part, *active)
        else:
            skipped = SkippedAttention() if part == "attention" else SkippedMlp()
            setattr(self._layers[layer], self.part_name(part), skipped)
            return
        self._compute_with(layer, part, weights)

    def _compute_with(self, layer: int, part: Part, weights: Mapping[str, torch.Tensor]) -> None:
        setattr(self._layers[layer], self.part_name(part), self._modules[layer][part])
        for name, tensor in weights.items():
            put_tensor(self._layers[layer], name, tensor)
        if part == "attention" and self.space.head_choices:
            queries, keys = (weights[f"{name}.weight"] for name in (self.loaded.family.query, self.loaded.family.key))
            attention: Any = self._modules[layer][part]
            attention.num_key_value_groups = len(queries) // len(keys)  # what transformers calls heads per KV group

    def _of_part(self, layer: Mapping[str, torch.Tensor], part: Part) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in layer.items() if name.startswith(f"{self.part_name(part)}.")}

    def layer_weights(self, subnet: Subnet, layer: int) -> dict[str, torch.Tensor]:
        """Reformed slices of one layer in fp32, not yet rounded, by name within the layer; skipped parts are absent."""
        choice = subnet.layers[layer]
        weights: dict[str, torch.Tensor] = {}
        for part in PARTS:
            if kept := choice.size(part):
                own = self._own_weights(subnet, layer, part)
                weights |= self.part_weights(layer, part, kept) if own is None else own.exact
                for norm in self.loaded.family.norms(part):
                    weights |= {n: t.float() for n, t in self._original[layer].items() if n.startswith(f"{norm}.")}
        return weights

    def _rounded(self, layer: int, part: Part, choice: Size, precision: Precision) -> dict[str, torch.Tensor]:
        """Part weights as runtimes compute with them; integers are cached, a quarter of the memory of floats."""
        bits = BLOCK_BITS[precision]
        if bits >= 16:
            weights = self.part_weights(layer, part, choice)
            return {name: fake_quantize(t, precision) if t.dim() == 2 else t for name, t in weights.items()}
        return _dequantized(self._quantized(layer, part, choice, bits))

    def _quantized(self, layer: int, part: Part, choice: Size, bits: int) -> RoundedWeights:
        """With integers for matrices."""
        name = f"{layer}-{part}-{choice}"
        return self._rounded_parts.get(name, bits, lambda: self._quantize_part(layer, part, choice, bits))

    def _quantize_part(self, layer: int, part: Part, choice: Size, bits: int) -> RoundedWeights:
        """To the nearest at 8 bits, and before `prepare`; with error feedback at 4."""
        weights = self.part_weights(layer, part, choice)
        matrices = {name for name, tensor in weights.items() if tensor.dim() == 2}
        if bits == 8 or self._statistics is None:
            return {name: quantize(t, bits) if name in matrices else t for name, t in weights.items()}
        moments = self._statistics.layer(layer)
        H_in = moments.attention_input if part == "attention" else moments.mlp_input
        H_out = read_by_output(moments, part)
        output = self.output_name(part)

        def of_full_part() -> RoundedWeights:
            full = self.part_weights(layer, part, self.full_size(part))
            inputs = {name: full[name] for name in sorted(matrices - {f"{output}.weight"})}
            return dict(round_inputs(inputs, H_in, bits, self.rounded_to_nearest))

        # rows do not depend on each other, so a subnet's are those of the full part
        rounded: RoundedWeights = dict(weights)
        for name, quantized in self._rounded_parts.get(f"{layer}-{part}-inputs", bits, of_full_part).items():
            assert isinstance(quantized, QuantizedWeight)
            rows = self.kept_indices(layer, part, choice, name.removesuffix(".weight"))
            rounded[name] = QuantizedWeight(quantized.integers[rows], quantized.scales[rows], bits)
        columns = self.kept_indices(layer, part, choice, output)
        rounded[f"{output}.weight"] = round_with_feedback(weights[f"{output}.weight"], H_out[columns][:, columns], bits)
        return rounded

    def kept_indices(
        self, layer: int, part: Part, choice: Size, projection: str, order: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Rows of an input map that a choice keeps, or columns of the output map: all, or those of the keep-order."""
        shape = self._original[layer][f"{projection}.weight"].shape
        whole = shape[1 if projection == self.output_name(part) else 0]
        if choice == self.full_size(part):
            return torch.arange(whole)
        by_group = projection in (self.loaded.family.key, self.loaded.family.value)
        order = self.plan(layer, part).order if order is None else order
        return kept_rows(order, choice, whole, by_group=by_group)

    def rounded_part(self, subnet: Subnet, layer: int, part: Part) -> RoundedWeights:
        """Of a part that `subnet` keeps at bits below 16, by name within the layer, with integers for matrices."""
        if (own := self._own_weights(subnet, layer, part)) is not None:
            return own.rounded
        bits = BLOCK_BITS[subnet.part_precision(layer, part)]
        return self._quantized(layer, part, subnet.layers[layer].size(part), bits)

    def part_weights(self, layer: int, part: Part, choice: Size) -> dict[str, torch.Tensor]:
        """What every subnet with `choice` there shares, fp32, by name within the layer."""
        if choice == self.full_size(part):
            return {name: tensor.float() for name, tensor in self._of_part(self._original[layer], part).items()}
        plan = self.plan(layer, part)
        return self._sliced(layer, part, plan.order, choice, plan.outputs[choice])

    def part_weights_for(self, layer: int, part: Part, choice: Size, H: torch.Tensor) -> dict[str, torch.Tensor]:
        """The same for a choice short of full where the whole part's output map reads inputs of moments H [in, in]."""
        weight = self.output_weight(layer, part)
        order = part_order(part, weight, H, self.space.order_shape(part))
        return self._sliced(layer, part, order, choice, part_outputs(weight, H, order, [choice])[choice].weight)

    def _sliced(
        self, layer: int, part: Part, order: torch.Tensor, choice: Size, reformed: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The part with what `choice` keeps of `order` alone."""
        output = self.output_name(part)
        weights = {}
        for name, tensor in self.part_weights(layer, part, self.full_size(part)).items():
            projection = name.rpartition(".")[0]
            if name == f"{output}.weight":
                kept = self.kept_indices(layer, part, choice, output, order)
                weights[name] = reformed if self._reform else tensor[:, kept]
            elif projection in self._input_names(part):
                weights[name] = tensor[self.kept_indices(layer, part, choice, projection, order)]
            else:  # the output's bias, and norms over each head, serve whatever is kept
                weights[name] = tensor
        return weights

    def full_maps(self, layer: int) -> dict[str, torch.Tensor]:
        """Weights of all projections of the full layer, by name within it."""
        names = [f"{name}.weight" for part in PARTS for name in self.projections(part)]
        return {name: self._original[layer][name].float() for name in names}

    def projections(self, part: Part) -> tuple[str, ...]:
        """Within a layer; the last writes to the residual stream."""
        return (*self._input_names(part), self.output_name(part))

    def _input_names(self, part: Part) -> tuple[str, ...]:
        """The maps that read the residual stream."""
        family = self.loaded.family
        return (family.query, family.key, family.value) if part == "attention" else family.mlp_inputs

    @property
    def rounded_to_nearest(self) -> tuple[str, ...]:
        """Keys and values, see `nas.rounding.round_inputs`."""
        return tuple(f"{name}.weight" for name in (self.loaded.family.key, self.loaded.family.value))

    def full_size(self, part: Part) -> int:
        return (self.space.group_choices if part == "attention" else self.space.width_choices)[-1]

    def output_weight(self, layer: int, part: Part) -> torch.Tensor:
        """Of the whole part, [hidden, inputs]."""
        weight: torch.Tensor = self._original[layer][f"{self.output_name(part)}.weight"].float()
        return weight

    def part_name(self, part: Part) -> str:
        """Of the module within its layer."""
        return self.loaded.family.attention if part == "attention" else self.loaded.family.mlp

    def output_name(self, part: Part) -> str:
        """The map behind the part, which writes to the residual stream."""
        return self.loaded.family.output if part == "attention" else self.loaded.family.down


def _dequantized(weights: RoundedWeights) -> dict[str, torch.Tensor]:
    return {name: dequantize(t) if isinstance(t, QuantizedWeight) else t for name, t in weights.items()}
