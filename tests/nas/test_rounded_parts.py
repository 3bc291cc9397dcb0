from pathlib import Path

import pytest
import torch

from export.quantize import QuantizedWeight, quantize
from nas.rounded_parts import RoundedParts, RoundedWeights


def _weights(seed: int) -> RoundedWeights:
    generator = torch.Generator().manual_seed(seed)
    return {
        "down.weight": quantize(torch.randn(8, 64, generator=generator), 4),
        "down.bias": torch.randn(8, generator=generator),
    }


@pytest.mark.parametrize("in_files", [False, True])
def test_each_is_made_once(tmp_path: Path, in_files: bool) -> None:
    folder = tmp_path / "rounded" if in_files else None
    parts, made = RoundedParts(folder), []
    for name, bits in (("a", 4), ("a", 8), ("b", 4), ("a", 4)):
        parts.get(name, bits, lambda name=name, bits=bits: made.append((name, bits)) or _weights(len(made)))
    assert made == [("a", 4), ("a", 8), ("b", 4)]
    found = parts.get("b", 4, lambda: pytest.fail("it is there"))
    wanted = _weights(3)
    assert found.keys() == wanted.keys()
    assert torch.equal(found["down.bias"], wanted["down.bias"])
    got, expected = found["down.weight"], wanted["down.weight"]
    assert isinstance(got, QuantizedWeight)
    assert (got.bits, expected.bits) == (4, 4)
    assert torch.equal(got.integers, expected.integers)
    assert torch.equal(got.scales, expected.scales)


def test_files_serve_the_next_process_and_damage_is_named(tmp_path: Path) -> None:
    RoundedParts(tmp_path).get("a", 4, lambda: _weights(0))
    assert RoundedParts(tmp_path).get("a", 4, lambda: pytest.fail("it is there"))
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ValueError, match="delete it"):
        RoundedParts(tmp_path).get("a", 4, lambda: _weights(0))
