import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import event, inspect, text

from hw_profiles import Device, Measurement, Store, Target, Workload
from nas.fitted import fitted_predictor, priors
from nas.latency import TRAINING_ROLES, LatencyModel
from predictors import LatencyPredictor, mape
from tests.nas.synthetic import VERSION, fill_profile, measurement, shape_ms, tiny_space

DEVICE = Device("Some CPU", 2, 8 * 2**30, ("avx2",), "Linux", "x86_64")
ANOTHER = Device("Another CPU", 4, 16 * 2**30, ("sve",), "Linux", "aarch64")
SPACE = tiny_space(4)
DECODE = Workload("decode", 16)
TARGET = Target(DEVICE.id, "openvino", "int8", 1)


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    with Store(database_url) as opened:
        fill_profile(opened, SPACE, DEVICE, "openvino", [DECODE], ["int8"], scatter=0.02)
        yield opened


def training(store: Store, target: Target = TARGET) -> list[Measurement]:
    return store.measurements(target, roles=TRAINING_ROLES)


def predictor(store: Store, target: Target = TARGET) -> LatencyPredictor:
    return fitted_predictor(store, training(store, target), TRAINING_ROLES)


def rows(store: Store) -> list[tuple[str, ...]]:
    """(name, digest, created_at) of all that is kept."""
    with store.transaction() as session:
        found = session.execute(text("SELECT name, digest, created_at FROM fitted_predictors ORDER BY name"))
        return [tuple(row) for row in found]


def change(store: Store, column: str, value: str) -> None:
    with store.transaction() as session:
        session.execute(text(f"UPDATE fitted_predictors SET {column} = :value"), {"value": value})


def latencies(fitted: LatencyPredictor) -> Sequence[float]:
    rng = np.random.default_rng(5)
    shapes = [SPACE.model_shape(SPACE.sample(rng)) for _ in range(20)]
    values: Sequence[float] = fitted.predict(shapes, DECODE).high_ms.tolist()
    return values


def test_a_predictor_is_fitted_once(store: Store) -> None:
    fitted = predictor(store)
    kept = rows(store)
    again = predictor(store)
    assert rows(store) == kept
    assert again.provenance == fitted.provenance
    assert latencies(again) == latencies(fitted)
    assert [digest for _, digest, _ in kept] == [fitted.provenance.digest]


def test_a_changed_profile_is_fitted_again(store: Store) -> None:
    before = predictor(store)
    shape = SPACE.model_shape(SPACE.smallest)
    store.add_measurements([measurement(TARGET, SPACE.base, shape, DECODE, "anchor", 9.0)])
    after = predictor(store)
    assert after.provenance.samples == before.provenance.samples + 1
    assert [digest for _, digest, _ in rows(store)] == [after.provenance.digest]  # in place of the other
    assert latencies(after) != latencies(before)


@pytest.mark.parametrize("damage", ["checksum", "digest", "one digit", "another format", "no JSON"])
def test_what_is_damaged_is_fitted_again(store: Store, damage: str) -> None:
    fitted = predictor(store)
    content = fitted.to_json()
    if damage in ("checksum", "digest"):
        change(store, damage, "0" * 64)
    elif damage == "one digit":
        constant = f'"constant": {float(fitted.costs.per_unit[0])}'
        assert constant in content
        change(store, "content", content.replace(constant, constant.replace(".", "1.")))
    else:
        other = '{"format": 0}' if damage == "another format" else content[:100]
        change(store, "content", other)
        with store.transaction() as session:  # a checksum that holds
            session.execute(text("UPDATE fitted_predictors SET checksum = :c"), {"c": checksum(other)})
    assert latencies(predictor(store)) == latencies(fitted)
    kept = rows(store)
    assert latencies(predictor(store)) == latencies(fitted)
    assert rows(store) == kept  # sound again


def checksum(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


def test_a_database_that_must_not_be_written_to_is_no_obstacle(tmp_path: Path) -> None:
    path = str(tmp_path / "profiles.db")
    with Store(path) as store:
        fill_profile(store, SPACE, DEVICE, "openvino", [DECODE], ["int8"], scatter=0.02)
    with Store(path) as store:
        event.listen(store.engine, "connect", lambda connection, _: connection.execute("PRAGMA query_only=ON"))
        store.engine.dispose()
        before = latencies(predictor(store))
        assert "fitted_predictors" not in inspect(store.engine).get_table_names()
    with Store(path) as store:
        assert latencies(predictor(store)) == before
        assert len(rows(store)) == 1


def few_anchors(store: Store, device: Device, factor: float, count: int = 9, version: str = VERSION) -> Target:
    """The full model and random graphs on a device that takes `factor` times as long, within 2 %."""
    target = Target(device.id, "openvino", "int8", 1)
    rng = np.random.default_rng(11)
    shapes = [SPACE.model_shape(SPACE.sample(rng)) for _ in range(count)]
    store.add_device(device)
    full = measurement(target, SPACE.base, SPACE.base, DECODE, "reference", shape_ms(SPACE.base, "int8", DECODE))
    graphs = [
        measurement(
            target, SPACE.base, s, DECODE, "anchor", shape_ms(s, "int8", DECODE) * (1 + 0.02 * rng.standard_normal())
        )
        for s in shapes
    ]
    # stored are ratios to the full model, so its milliseconds make the whole device slower
    store.add_measurements(
        [
            replace(
                m, references_ms={name: ms * factor for name, ms in m.references_ms.items()}, runtime_version=version
            )
            for m in (full, *graphs)
        ]
    )
    return target


def test_few_anchors_lean_on_another_devices_profile(store: Store) -> None:
    target = few_anchors(store, ANOTHER, factor=1.6, count=4)
    fitted = predictor(store, target)
    assert fitted.prior is not None
    assert fitted.prior.provenance.target == f"{DEVICE.id}/{TARGET.key}"
    rng = np.random.default_rng(5)
    shapes = [SPACE.model_shape(SPACE.sample(rng)) for _ in range(40)]
    actual = [1.6 * shape_ms(shape, "int8", DECODE) for shape in shapes]
    assert mape(fitted.predict(shapes, DECODE).value_ms, actual) < 0.03
    kept = rows(store)
    assert len(kept) == 2  # the prior and the one that leans on it
    assert latencies(predictor(store, target)) == latencies(fitted)
    assert rows(store) == kept
    # and by way of a query's model
    model = LatencyModel.fit(store, ANOTHER.id, "openvino", 1, SPACE, DECODE)
    assert model.predictors["int8"].prior is not None


def test_a_leaning_predictor_follows_its_prior(store: Store) -> None:
    target = few_anchors(store, ANOTHER, factor=1.6, count=4)
    before = predictor(store, target)
    shape = SPACE.model_shape(SPACE.smallest)
    store.add_measurements([measurement(TARGET, SPACE.base, shape, DECODE, "anchor", 9.0)])
    assert predictor(store, target).provenance.digest != before.provenance.digest


def test_priors_are_whole_profiles_of_the_same_runtime_and_precision(store: Store) -> None:
    few_anchors(store, ANOTHER, factor=1.6)
    fill_profile(store, SPACE, DEVICE, "openvino", [DECODE], ["int4"])
    fill_profile(store, SPACE, DEVICE, "onnxruntime", [DECODE], ["int8"])
    fill_profile(store, tiny_space(3), ANOTHER, "openvino", [DECODE], ["int8"])
    fill_profile(store, SPACE, DEVICE, "openvino", [DECODE], ["int8"], version="older")

    def offered(target: Target, version: str) -> list[tuple[str, str]]:
        found = priors(store, target, version, SPACE.base.id, "decode", TRAINING_ROLES)
        return sorted((p.provenance.target, p.provenance.runtime_version) for p in found)

    this = f"{DEVICE.id}/{TARGET.key}"
    assert offered(replace(TARGET, device_id=ANOTHER.id), VERSION) == [(this, VERSION), (this, "older")]
    assert offered(TARGET, VERSION) == [(this, "older")]  # before the upgrade
    assert offered(replace(TARGET, threads=2), VERSION) == [(this, VERSION), (this, "older")]
    assert offered(replace(TARGET, precision="fp32"), VERSION) == []


def test_a_new_version_may_lean_on_the_old_profile(store: Store) -> None:
    """Its full model and anchors are there, its table is not: that is not half a profile."""
    few_anchors(store, DEVICE, factor=0.8, count=4, version="newer")
    model = LatencyModel.fit(store, DEVICE.id, "openvino", 1, SPACE, DECODE)
    fitted = model.predictors["int8"]
    assert fitted.provenance.runtime_version == "newer"
    assert fitted.prior is not None
    assert fitted.prior.provenance.runtime_version == VERSION
    shape = SPACE.model_shape(SPACE.smallest)
    assert fitted.predict([shape], DECODE).value_ms[0] == pytest.approx(0.8 * shape_ms(shape, "int8", DECODE), rel=0.1)
