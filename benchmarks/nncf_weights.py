"""nncf's weight compression of an OpenVINO IR, run in the environment of its own that export_speed.py makes.

python nncf_weights.py model.xml int4_sym out.xml --tokens calibration.npy --awq --scale-estimation
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import nncf
import numpy as np
import openvino as ov

GROUP_SIZE = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("mode", choices=[mode.value for mode in nncf.CompressWeightsMode])
    parser.add_argument("output", type=Path)
    parser.add_argument("--tokens", type=Path, help="token ids [N, T], which the methods below calibrate on")
    for method in ("awq", "scale-estimation", "gptq"):
        parser.add_argument(f"--{method}", action="store_true")
    arguments = parser.parse_args()
    core = ov.Core()
    core.set_property("CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    options = {}
    if arguments.mode.startswith("int4"):
        options = {"group_size": GROUP_SIZE, "ratio": 1.0, "awq": arguments.awq, "gptq": arguments.gptq,
                   "scale_estimation": arguments.scale_estimation}  # fmt: skip
        if arguments.tokens:
            windows = np.load(arguments.tokens)
            options |= {"dataset": nncf.Dataset(list(inputs(windows))), "subset_size": len(windows)}
    mode = nncf.CompressWeightsMode(arguments.mode)
    ov.save_model(nncf.compress_weights(core.read_model(arguments.model), mode=mode, **options), arguments.output,
                  compress_to_fp16=False)  # fmt: skip


def inputs(windows: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    for window in windows:
        yield {
            "input_ids": window[None],
            "attention_mask": np.ones((1, len(window)), np.int64),
            "position_ids": np.arange(len(window))[None],
            "beam_idx": np.zeros(1, np.int32),
        }


if __name__ == "__main__":
    main()
