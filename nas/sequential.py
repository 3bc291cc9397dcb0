"""Weights of one subnet, fitted in sequence: each part makes up for what those before it got wrong.

`nas.reformation` fits all sizes of a part at once, to what the part reads in the full model. In a subnet it reads
something else, since the layers before it have changed. Here calibration text runs through the full model and the
subnet side by side, layer after layer, and the output map of each part, o_proj or down_proj, is fitted to what the
subnet feeds it. Below 16 bits maps are rounded with the subnet's own inputs, and later parts make up for that, too.

For each part
1. which groups or channels stay is found anew, from what the whole part's output map would read in the subnet;
2. the input maps W become W (I + mended C): C [hidden, hidden] takes what they read in the subnet to what it lacks of
   the full model's, so that they hear half of what went wrong before them as if it had not;
3. the output map is fitted, to half of what the subnet's residual stream lacks behind the part.

Shapes: X [tokens, in] what a map reads in the subnet, W [out, in] its weights so far, E [tokens, out] what is lacking.
W + D minimises |X D^T - E|^2 + damping |D scale|^2, scale_j = |X_:j|: with nothing to lack W stays.

Why half: asking a part only for what the whole part would add to the subnet's stream lets errors add up, asking for all
that the stream lacks of the full model's asks for what the part cannot know.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from export.quantize import QuantizedWeight, dequantize, fake_quantize, quantize
from hw_profiles.profile import Progress
from hw_profiles.shapes import Precision
from nas.arithmetic import computing, fast_dtype
from nas.calibration import add_second_moments, moments, sizes, statistics_key
from nas.importance import normalise
from nas.own_weights import OwnLayers, OwnWeights, has_own, load_own, load_own_layer, save_own_layer
from nas.rounded_parts import RoundedWeights
from nas.rounding import round_inputs, round_with_feedback
from nas.stream_checkpoint import StreamCheckpoint
from nas.subnet import PARTS, Part, Subnet
from nas.supernet import Supernet

#: Ridge relative to each input's own energy.
DAMPING = 0.1
#: Of what the subnet's residual stream lacks before a part, the share that the part is to make up for.
MENDED = 0.5
#: Of its mean gain, the gain below which a norm behind an output map silences a channel.
_AUDIBLE = 0.05
#: Part of every cache key: raise it when what is stored changes its meaning.
_VERSION = 2
_TOKENS_AT_ONCE = 4096


@torch.no_grad()
def fit_in_sequence(
    supernet: Supernet,
    subnet: Subnet,
    windows: torch.Tensor,
    *,
    damping: float = DAMPING,
    mended: float = MENDED,
    cache_dir: Path | None = None,
    progress: Progress = lambda done, total, what: None,
) -> None:
    """Give `subnet` weights of its own in a prepared supernet, from token windows [N, T] or from `cache_dir`.

    A fit that was killed goes on from what `cache_dir` has of it. The unrounded full model keeps those that it has.
    """
    if subnet == supernet.space.full(32):
        return
    folder = None
    if cache_dir is not None:
        fitted_on = statistics_key(supernet.loaded, windows)
        text = f"{_VERSION} {supernet.prepared_from} {fitted_on} {subnet.to_json()} {damping} {mended}"
        folder = cache_dir / f"sequential-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        if has_own(folder, supernet.space.depth):
            supernet.adopt(subnet, load_own(folder, subnet))
            return
    streams = _Streams(supernet, subnet, windows)
    checkpoint = StreamCheckpoint(folder)
    own = [] if folder is None else streams.go_on(checkpoint, folder)
    for index, layer in list(enumerate(subnet.layers))[len(own) :]:
        own.append({})
        for part in PARTS:
            progress(2 * index + PARTS.index(part), 2 * len(subnet.layers), f"fitting layer {index} {part}")
            if layer.size(part):
                whole = streams.enter(index, part, mended, damping)
                own[index][part] = _fit_part(streams, index, part, whole, damping)
            else:
                streams.skip(index, part)
        if folder is not None:
            save_own_layer(folder, index, own[index])
            if supernet.lean:  # mapped from its file, which takes no memory
                own[index] = load_own_layer(folder, index, subnet)
                for part, weights in own[index].items():
                    supernet.install(index, part, weights)
        checkpoint.save_if_due(index + 1, streams.full, streams.own)
    checkpoint.remove()
    supernet.adopt(subnet, own)


@dataclass(frozen=True)
class _Whole:
    """What the whole part makes of the subnet's residual stream.

    `wanted` is the stream that the subnet should have behind it, `correction` the change [hidden, hidden] of what the
    input maps read, `H_in` of what they read in the subnet, `H` of what the output map reads, None where the subnet
    keeps the part whole.
    """

    wanted: list[torch.Tensor]
    correction: torch.Tensor
    H_in: torch.Tensor
    H: torch.Tensor | None


class _Streams:
    """Residual streams of calibration text before one part, as batches [n, T, hidden]: the full model's, the subnet's.

    Parts are run one at a time, with the layer's other part left out.
    """

    def __init__(self, supernet: Supernet, subnet: Subnet, windows: torch.Tensor) -> None:
        self.supernet, self.subnet = supernet, subnet
        batches = torch.split(windows, max(1, _TOKENS_AT_ONCE // windows.shape[1]))
        supernet.activate_full_model()
        self.full = [self._kept(supernet.loaded.embed(batch)) for batch in batches]
        supernet.ends.activate(subnet.precision)  # of which the embedding is read
        self.own = [self._kept(supernet.loaded.embed(batch)) for batch in batches]
        #: What the part reads: the stream before it, or before its layer where attention and MLP read the same.
        self._full_read, self._own_read = self.full, self.own

    def go_on(self, checkpoint: StreamCheckpoint, folder: Path) -> OwnLayers:
        """Layers that an interrupted fit has left in `folder`, the streams moved on behind them; or none."""
        known = checkpoint.load(streams=2)
        if known is None:
            return []
        layers, (full, own) = known
        try:
            fitted = [load_own_layer(folder, index, self.subnet) for index in range(layers)]
        except ValueError:
            return []
        self.full, self.own = ([self._kept(batch) for batch in stream] for stream in (full, own))
        return fitted

    def enter(self, layer: int, part: Part, mended: float, damping: float) -> _Whole:
        """Move the full model's stream on, and see what the subnet's would become behind the whole part."""
        self._begin(layer, part)
        shrinks = self.subnet.layers[layer].size(part) != self.supernet.full_size(part)
        whole = self.supernet.output_weight(layer, part)
        H = torch.zeros(whole.shape[1], whole.shape[1]) if shrinks else None
        H_in, G_in = torch.zeros(2, whole.shape[0], whole.shape[0])
        wanted: list[torch.Tensor] = []
        for index, (full, own) in enumerate(zip(self._full_read, self._own_read, strict=True)):
            normed = self.normed(layer, part, own)
            add_second_moments(H_in, normed)
            G_in += moments(normed, self.normed(layer, part, full) - normed)
            self.full[index] = self._kept(self._run(layer, part, full, self.full[index]))
            behind, heard = self._listen(layer, part, own, self.own[index])
            if H is not None:
                add_second_moments(H, self.counted(layer, part, heard, whole))
            wanted.append(self._kept(mended * self.full[index] + (1 - mended) * behind))
        return _Whole(wanted, mended * _step(H_in, G_in, damping), H_in, H)

    def skip(self, layer: int, part: Part) -> None:
        """Move the full model's stream on alone."""
        self._begin(layer, part)
        for index, read in enumerate(self._full_read):
            self.full[index] = self._kept(self._run(layer, part, read, self.full[index]))

    def _begin(self, layer: int, part: Part) -> None:
        """With the whole part in the model."""
        self.supernet.activate_part(layer, part, self.supernet.full_size(part), "fp32")
        if part == "attention" or not self.supernet.space.base.parallel_residual:
            self._full_read, self._own_read = list(self.full), list(self.own)

    def normed(self, layer: int, part: Part, batch: torch.Tensor) -> torch.Tensor:
        """What the part's input maps make of what it reads, [tokens, hidden]."""
        name = self.supernet.loaded.family.norms(part)[0]
        return _rows(self.supernet.loaded.layers[layer].get_submodule(name)(batch))

    def step(self, layer: int, part: Part) -> list[torch.Tensor]:
        """Move the subnet's stream on; returns what the output map read, [tokens, in] for each batch."""
        heard = []
        for index, read in enumerate(self._own_read):
            behind, read_by_output = self._listen(layer, part, read, self.own[index])
            self.own[index] = self._kept(behind)
            heard.append(self._kept(read_by_output))
        return heard

    def mend(
        self, layer: int, part: Part, heard: Sequence[torch.Tensor], before: torch.Tensor, change: torch.Tensor
    ) -> None:
        """After the output map `before` [out, in], which read `heard`, was changed by `change`."""
        norm = self.post_norm(layer, part)
        for index, x in enumerate(heard):
            with computing(fast_dtype()):
                added = nn.functional.linear(x, change)
                if norm is not None:
                    given = nn.functional.linear(x, before)
                    added = norm(given + added) - norm(given)
            self.own[index] = self._kept(self.own[index] + added.view_as(self.own[index]))

    def post_norm(self, layer: int, part: Part) -> nn.Module | None:
        """Of what the part adds to the stream."""
        _, *behind = self.supernet.loaded.family.norms(part)
        return self.supernet.loaded.layers[layer].get_submodule(behind[0]) if behind else None

    def counted(self, layer: int, part: Part, heard: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Rows [tokens, in] that the output map `weight` reads, each divided by what a norm behind it divides it by."""
        if self.post_norm(layer, part) is None:
            return heard
        return heard / sizes(nn.functional.linear(heard, weight))

    def asked(self, layer: int, part: Part, lacking: torch.Tensor) -> torch.Tensor:
        """Of rows [tokens, out] that the stream lacks, what the output map is to add for a norm behind it to add them.

        As if each token kept its size; of channels that the norm nearly silences nothing is asked.
        """
        norm = self.post_norm(layer, part)
        if norm is None:
            return lacking
        gain = norm(torch.ones_like(lacking[:1]))
        audible = gain.abs() > _AUDIBLE * gain.abs().mean()
        return torch.where(audible, lacking / gain.where(audible, torch.ones(())), 0.0)

    def _kept(self, batch: torch.Tensor) -> torch.Tensor:
        """To be read again: all batches of a large model's calibration text take gigabytes."""
        return _mapped(batch, self.supernet.cache_dir) if self.supernet.lean else batch

    def _listen(
        self, layer: int, part: Part, read: torch.Tensor, batch: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The stream behind the part, and what its output map read."""
        heard: list[torch.Tensor] = []
        module = self.supernet.loaded.layers[layer].get_submodule(self.supernet.output_name(part))
        hook = module.register_forward_pre_hook(lambda _, inputs: heard.append(_rows(inputs[0])))
        try:
            return self._run(layer, part, read, batch), heard[0]
        finally:
            hook.remove()

    def _run(self, layer: int, part: Part, read: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        """The stream `batch` with what the part adds when it reads `read`."""
        self.supernet.activate_part(layer, "mlp" if part == "attention" else "attention", 0, "fp32")
        with computing(fast_dtype()):
            behind = self.supernet.loaded.run_layer(layer, read)
        return behind if read is batch else batch + (behind - read)


def _fit_part(streams: _Streams, layer: int, part: Part, whole: _Whole, damping: float) -> OwnWeights:
    supernet, precision = streams.supernet, streams.subnet.part_precision(layer, part)
    if whole.H is None:
        exact = supernet.part_weights(layer, part, supernet.full_size(part))
    else:
        exact = supernet.part_weights_for(layer, part, streams.subnet.layers[layer].size(part), whole.H)
    output = f"{supernet.output_name(part)}.weight"
    inputs = {n: t + t @ whole.correction for n, t in exact.items() if t.dim() == 2 and n != output}
    exact |= inputs
    rounded: RoundedWeights = dict(exact)
    if precision == "int4":
        rounded |= round_inputs(inputs, whole.H_in, 4, supernet.rounded_to_nearest)
    else:
        rounded |= {name: _nearest(tensor, precision) for name, tensor in inputs.items()}
    supernet.install(layer, part, OwnWeights(exact, rounded))
    heard = streams.step(layer, part)
    before = exact[output]
    H, G = torch.zeros(before.shape[1], before.shape[1]), torch.zeros(before.shape[1], before.shape[0])
    for x, target, batch in zip(heard, whole.wanted, streams.own, strict=True):
        X = streams.counted(layer, part, x, before)
        add_second_moments(H, X)
        G += moments(X, streams.asked(layer, part, _rows(target - batch)))
    exact[output] = before + _step(H, G, damping)
    now = round_with_feedback(exact[output], H, 4) if precision == "int4" else _nearest(exact[output], precision)
    rounded[output] = now
    change = (dequantize(now) if isinstance(now, QuantizedWeight) else now) - before
    streams.mend(layer, part, heard, before, change)
    return OwnWeights(exact, rounded)


def _nearest(weight: torch.Tensor, precision: Precision) -> QuantizedWeight | torch.Tensor:
    return quantize(weight, 8) if precision == "int8" else fake_quantize(weight, precision)


def _step(H: torch.Tensor, G: torch.Tensor, damping: float) -> torch.Tensor:
    """D [out, in] from H = X^T X and G = X^T E."""
    C, scale = normalise(H, damping)
    L = torch.linalg.cholesky(C)
    del C  # such matrices are what memory goes to
    D = torch.cholesky_solve(G.double().div_(scale.unsqueeze(1)), L).div_(scale.unsqueeze(1))
    return D.T.float()


def _mapped(tensor: torch.Tensor, folder: Path | None) -> torch.Tensor:
    """A copy in a file that no name leads to: the system may write it out, and it goes when the tensor goes."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.truncate(tensor.nbytes)
        mapped = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    return mapped.view(tensor.shape).copy_(tensor)


def _rows(batch: torch.Tensor) -> torch.Tensor:
    return batch.flatten(0, -2).float()
