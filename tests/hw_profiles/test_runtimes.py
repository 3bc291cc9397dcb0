"""One contract for every runtime, and what is particular to each."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime as ort
import openvino as ov
import pytest
from onnx import TensorProto, helper

from hw_profiles.runtimes import CPU, RUNTIMES, Runtime, Session, engine_of, is_runtime_name, names, runtime
from hw_profiles.runtimes.fake import FakeModel, FakeRuntime
from hw_profiles.runtimes.onnxruntime import PROVIDERS, OnnxRuntime, Provider

from . import tiny_graphs

MAX_TOKENS = 32
Write = Callable[[Path], Path]

WRITERS: dict[str, Write] = {
    **tiny_graphs.WRITERS,
    "onnxruntime:OpenVINO": tiny_graphs.write_onnx_without_fused_attention,  # the provider has no GroupQueryAttention
}
LISTED_HERE = [name for engine in RUNTIMES for name in names(runtime(engine))]
#: Which of these is here, the contract runs on.
RARE = ["openvino:GPU", "openvino:NPU", *(f"onnxruntime:{device}" for device in PROVIDERS if device != CPU)]
CASES: dict[str, tuple[Callable[[], Runtime], Write]] = {
    **{name: (partial(runtime, name), WRITERS.get(name, WRITERS[engine_of(name)])) for name in LISTED_HERE},
    "onnxruntime, Concat": (RUNTIMES["onnxruntime"], tiny_graphs.write_onnx_without_fused_attention),
    "fake": (FakeRuntime, FakeModel(base_ms=0.0, vocab_size=tiny_graphs.VOCAB_SIZE).write),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Runtime, Write]:
    """Every device that an installed engine lists."""
    make, write = CASES[request.param]
    return make(), write


@pytest.fixture
def session(case: tuple[Runtime, Write], tmp_path: Path) -> Session:
    engine, write = case
    write(tmp_path)
    return engine.load(tmp_path, threads=1, max_tokens=MAX_TOKENS)


def tokens(batch_size: int, length: int, seed: int = 0) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    return np.random.default_rng(seed).integers(0, tiny_graphs.VOCAB_SIZE, (batch_size, length), np.int64)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_step_by_step_equals_all_at_once(session: Session, batch_size: int) -> None:
    ids = tokens(batch_size, 9)
    at_once = session.step(ids).copy()
    assert at_once.shape == (batch_size, tiny_graphs.VOCAB_SIZE)
    session.reset()
    session.step(ids[:, :5])
    for i in range(5, 9):
        last = session.step(ids[:, i : i + 1])
    np.testing.assert_allclose(last, at_once, rtol=1e-4, atol=1e-5)


def test_the_cache_counts_and_reset_forgets_it(session: Session) -> None:
    ids = tokens(1, 4)
    fresh = session.step(ids).copy()
    session.reset()
    session.step(tokens(1, 4, seed=1))
    assert not np.allclose(session.step(ids), fresh, rtol=1e-3, atol=1e-3)
    session.reset()
    np.testing.assert_allclose(session.step(ids), fresh, rtol=1e-5, atol=1e-6)


def test_reset_allows_another_batch_size(session: Session) -> None:
    ids = tokens(2, 4)
    single = session.step(ids[:1]).copy()
    session.reset()
    np.testing.assert_allclose(session.step(ids)[:1], single, rtol=1e-4, atol=1e-5)


def test_a_cache_can_be_made_instead_of_fed(session: Session) -> None:
    """It holds as many positions as asked for, with the same values each time, and the next step attends to them."""
    ids = tokens(2, 1)
    session.reset()
    alone = session.step(ids).copy()
    session.reset(2, 7)
    first = session.step(ids).copy()
    assert np.isfinite(first).all()
    assert not np.allclose(alone, first, rtol=1e-3, atol=1e-3)
    session.reset(2, 7)
    np.testing.assert_allclose(session.step(ids), first, rtol=1e-5, atol=1e-6)
    session.reset(2, MAX_TOKENS - 1, new_tokens=1)
    session.step(ids)
    with pytest.raises(ValueError, match=r"got 32 and 1 more"):
        session.step(ids)
    with pytest.raises(ValueError, match=r"got 30 and 3 more"):
        session.reset(2, 30, new_tokens=3)
    session.reset(new_tokens=1)
    np.testing.assert_allclose(session.step(ids), alone, rtol=1e-4, atol=1e-5)


def test_caches_of_several_sizes_take_turns(case: tuple[Runtime, Write], tmp_path: Path) -> None:
    """As in a profile: each holds what it would hold in a session of its own."""
    engine, write = case
    write(tmp_path)
    session = engine.load(tmp_path, 1, 640)
    for batch_size, past_tokens in ((1, 600), (1, 100), (3, 100), (1, 100), (3, 600), (1, 30)):
        ids, alone = tokens(batch_size, 1), engine.load(tmp_path, 1, 640)
        for each in (session, alone):
            each.reset(batch_size, past_tokens, new_tokens=1)
        np.testing.assert_allclose(session.step(ids), alone.step(ids), rtol=1e-4, atol=1e-5)


def test_logits_stay_after_the_next_step(session: Session) -> None:
    first = session.step(tokens(1, 4))
    kept = first.copy()
    session.step(tokens(1, 1, seed=1))
    np.testing.assert_array_equal(first, kept)


def test_a_full_cache_is_refused(session: Session) -> None:
    session.step(tokens(1, MAX_TOKENS))
    with pytest.raises(ValueError, match=r"at most 32 tokens.*got 32 and 1 more"):
        session.step(tokens(1, 1))


def test_file_and_folder_load_the_same(case: tuple[Runtime, Write], tmp_path: Path) -> None:
    engine, write = case
    path, ids = write(tmp_path), tokens(1, 4)
    by_file, by_folder = (engine.load(p, 1, MAX_TOKENS).step(ids) for p in (path, tmp_path))
    np.testing.assert_array_equal(by_file, by_folder)


def test_a_missing_file_is_named(case: tuple[Runtime, Write], tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FileNotFoundError, match=r"wanted a model file.*export"):
            case[0].load(path, 1, MAX_TOKENS)


@pytest.mark.parametrize("content", [b"", b"not a model", None])
def test_a_corrupt_file_is_named(case: tuple[Runtime, Write], tmp_path: Path, content: bytes | None) -> None:
    engine, write = case
    path = write(tmp_path)
    path.write_bytes(path.read_bytes()[:-40] if content is None else content)  # None: cut short
    with pytest.raises(ValueError, match=rf"wanted .*{path.name}"):
        engine.load(path, 1, MAX_TOKENS)


def test_version_and_devices(case: tuple[Runtime, Write]) -> None:
    engine, _ = case
    assert engine.version()[0].isdigit()
    assert engine.devices()[0] == CPU
    assert engine.name in names(engine)
    assert {"fp32", "int8", "int4"} <= set(engine.precisions)


def test_unknown_runtime_lists_the_known() -> None:
    with pytest.raises(ValueError, match="one of onnxruntime, openvino, llamacpp, got 'tvm'"):
        runtime("tvm")
    assert [runtime(name).name for name in RUNTIMES] == list(RUNTIMES)


def test_importing_the_package_loads_no_runtime_and_no_database() -> None:
    heavy = "{'onnxruntime', 'openvino', 'llama_cpp', 'torch', 'transformers', 'sqlalchemy'}"
    code = f"import sys, hw_profiles.__main__; sys.exit(', '.join({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.strip() == ""


def test_onnxruntime_shares_the_cache_where_the_graph_can(tmp_path: Path) -> None:
    from hw_profiles.runtimes.onnxruntime import OnnxRuntime

    fused = OnnxRuntime().load(tiny_graphs.write_onnx(tmp_path), 1, MAX_TOKENS)
    assert fused.shares_cache
    ids = tokens(2, 12)
    shared = [fused.step(ids[:, :6])] + [fused.step(ids[:, i : i + 1]) for i in range(6, 12)]
    fused.shares_cache = False
    fused.reset()
    separate = [fused.step(ids[:, :6])] + [fused.step(ids[:, i : i + 1]) for i in range(6, 12)]
    np.testing.assert_allclose(shared, separate, rtol=1e-5, atol=1e-6)

    plain = OnnxRuntime().load(tiny_graphs.write_onnx_without_fused_attention(tmp_path), 1, MAX_TOKENS)
    assert not plain.shares_cache


def test_openvino_head_sees_only_the_last_token() -> None:
    from hw_profiles.runtimes.openvino import OpenVinoSession, compile_properties, slice_before_head

    whole, sliced = tiny_graphs.openvino_model(), tiny_graphs.openvino_model()
    assert slice_before_head(sliced)
    head = sliced.output("logits").get_node().input_value(0).get_node()
    assert head.input_value(0).get_node().get_type_name() == "Slice"
    compiled = [ov.Core().compile_model(model, "CPU", compile_properties(1)) for model in (whole, sliced)]
    of_whole, of_sliced = (OpenVinoSession(model, MAX_TOKENS).step(tokens(2, 5)) for model in compiled)
    np.testing.assert_allclose(of_sliced, of_whole, rtol=1e-4, atol=1e-5)


def test_openvino_without_its_weights_is_refused(tmp_path: Path) -> None:
    path = tiny_graphs.write_openvino(tmp_path)
    path.with_suffix(".bin").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"wanted .*openvino_model.xml"):
        RUNTIMES["openvino"]().load(path, 1, MAX_TOKENS)


def test_openvino_computes_in_fp32_with_the_threads_asked_for() -> None:
    from hw_profiles.runtimes.openvino import compile_properties

    compiled = ov.Core().compile_model(tiny_graphs.openvino_model(), "CPU", compile_properties(threads=1))
    assert compiled.get_property("INFERENCE_PRECISION_HINT") == ov.Type.f32
    assert compiled.get_property("KV_CACHE_PRECISION") == ov.Type.f32
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1


def test_fake_takes_the_time_it_was_given(tmp_path: Path) -> None:
    waited_s: list[float] = []
    path = FakeModel(base_ms=3, token_ms=2, context_ms=1).write(tmp_path)
    session = FakeRuntime(wait=waited_s.append).load(path, 1, MAX_TOKENS)
    session.step(tokens(2, 4))
    session.step(tokens(2, 1))
    np.testing.assert_allclose(waited_s, [(3 + 2 * 4 * 2) / 1e3, (3 + 2 * (2 + 4)) / 1e3])


@pytest.mark.parametrize("name", ["openvino:XPU", "openvino:CPU", "onnxruntime:", "onnxruntime:openvino", *RARE])
def test_a_device_that_is_not_here_is_named(name: str) -> None:
    if name not in LISTED_HERE:
        engine = engine_of(name)
        here = ", ".join(names(runtime(engine)))
        with pytest.raises(
            ValueError, match=rf"that {engine} \S+ lists here \({here}\), got {name}; take one of these"
        ):
            runtime(name)
        if name in RARE:
            pytest.skip(f"{name} is not here: the contract did not run on it")


def test_names_that_some_machine_may_have() -> None:
    possible = ("openvino", "openvino:GPU.1", "onnxruntime:TensorRT")
    impossible = ("", "tvm", "tvm:GPU", "openvino:", "openvino:CPU", "openvino:GPU:0", "openvino:../GPU", ":GPU")
    assert all(map(is_runtime_name, possible))
    assert not any(map(is_runtime_name, impossible))


def test_onnxruntime_refuses_a_provider_that_leaves_the_work_to_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Azure's runs no operator of ours: the session is made all the same, on the CPU, and computes the right logits."""
    monkeypatch.setitem(PROVIDERS, "Azure", Provider("AzureExecutionProvider"))
    if "Azure" not in OnnxRuntime().devices():
        pytest.skip("this build of onnxruntime has no AzureExecutionProvider")
    path = tiny_graphs.write_onnx(tmp_path)
    with pytest.raises(ValueError, match=r"Azure\w+ leaves GroupQueryAttention, MatMul to the CPU"):
        runtime("onnxruntime:Azure").load(path, 1, MAX_TOKENS)


def test_onnxruntimes_cpu_multiplies_no_bf16_matrices() -> None:
    """Why its `precisions` lack bf16; once this fails, they need not."""
    a, b, c = (helper.make_tensor_value_info(name, TensorProto.BFLOAT16, [4, 4]) for name in "abc")
    graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["c"])], "bf16", [a, b], [c])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    with pytest.raises(ort.capi.onnxruntime_pybind11_state.NotImplemented, match="MatMul"):
        ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def test_openvinos_auto_hands_the_properties_on(tmp_path: Path) -> None:
    request = runtime("openvino:AUTO").load(tiny_graphs.write_openvino(tmp_path), 1, MAX_TOKENS)._request
    (chosen,) = request.get_compiled_model().get_property("EXECUTION_DEVICES")
    properties = request.get_compiled_model().get_property("DEVICE_PROPERTIES")[chosen]
    assert properties["INFERENCE_PRECISION_HINT"] == ov.Type.f32
    if chosen == "CPU":
        assert properties["KV_CACHE_PRECISION"] == ov.Type.f32
        assert properties["INFERENCE_NUM_THREADS"] == 1
