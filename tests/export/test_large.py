"""Decoders of more than 2 GiB, which neither protobuf nor a signed 32-bit offset can hold."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from export import BUILDERS, FORMAT_OF_RUNTIME
from hw_profiles.runtimes import runtime
from hw_profiles.runtimes.llamacpp import LlamaCppRuntime
from hw_profiles.shapes import BlockShape, ModelShape

pytestmark = pytest.mark.slow

SHAPE = ModelShape(2048, 64, 32_000, True, (*[BlockShape(32, 8, 8192)] * 9, BlockShape(16, 4, 8192)))
#: What writing may take beside the decoder: its largest tensors as they are laid out, and the file's pages.
WRITING_BYTES = 2**30
WRITE = """
import resource, sys
from pathlib import Path
from export.decoder import random_decoder
from export.gguf import write_gguf
from export.onnx import write_onnx
from export.openvino import write_openvino
from hw_profiles.shapes import ModelShape

decoder = random_decoder(ModelShape.from_json(sys.argv[1]), "fp32")
before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
{"gguf": write_gguf, "onnx": write_onnx, "openvino": write_openvino}[sys.argv[2]](decoder, Path(sys.argv[3]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted in the unit of Linux")
def test_files_beyond_two_gigabytes_are_written_piece_by_piece_and_run_alike(tmp_path: Path) -> None:
    assert SHAPE.weight_bytes("fp32") > 2**31
    token_ids = np.random.default_rng(0).integers(0, SHAPE.vocab_size, (1, 12))
    logits = {}
    for name in BUILDERS:
        folder = tmp_path / name
        folder.mkdir()
        command = [sys.executable, "-c", WRITE, SHAPE.to_json(), FORMAT_OF_RUNTIME[name], str(folder)]
        written = subprocess.run(command, check=True, capture_output=True, text=True)
        assert int(written.stdout) * 1024 < WRITING_BYTES
        assert max(file.stat().st_size for file in folder.iterdir()) > 2**31
        engine = runtime(name)
        load = engine.load_exact if isinstance(engine, LlamaCppRuntime) else engine.load
        session = load(folder, threads=2, max_tokens=16)
        session.reset()
        logits[name] = session.step(token_ids)
        del session
        shutil.rmtree(folder)
    for name in BUILDERS:
        np.testing.assert_allclose(logits[name], logits["openvino"], atol=1e-3, err_msg=name)
