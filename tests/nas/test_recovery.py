import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from export.quantize import QuantizedWeight, dequantize
from nas.evaluate import Evaluator
from nas.extraction import extract, rounded_matrices
from nas.families import LoadedModel
from nas.own_weights import load_own
from nas.recovery import tune
from nas.sequential import fit_in_sequence
from nas.space import SearchSpace
from nas.subnet import SKIPPED, LayerChoice, Subnet
from nas.supernet import Supernet
from nas.training import Loss, TrainingSettings, last_checkpoint
from nas.tuned import TUNED_FILE, Tuned, TuneSettings, adopt_tuned
from tests.nas.supernets import active_logits

TRAINING = TrainingSettings(steps=12, batch=4, learning_rate=5e-3)
SETTINGS = {
    "lora": TuneSettings("lora", (4,), 8.0, training=TRAINING),
    "nls": TuneSettings("nls", (8, 4, 2), 16.0, rank_evaluations=5, training=replace(TRAINING, sampling="random")),
    "full": TuneSettings("full", training=replace(TRAINING, learning_rate=1e-3)),
}
Make = Callable[..., tuple[Supernet, Evaluator]]


@pytest.fixture
def make(tiny: Callable[..., LoadedModel], windows: torch.Tensor) -> Make:
    """A prepared supernet as a new process would have it, and what evaluates its subnets."""

    def made(model_type: str = "llama") -> tuple[Supernet, Evaluator]:
        loaded = tiny(model_type)
        supernet = Supernet(loaded, SearchSpace.from_config(loaded.config, mixed_bits=True))
        supernet.prepare(windows)
        return supernet, Evaluator(supernet, windows[:4])

    return made


def _subnet(bits: int) -> Subnet:
    """With a layer without attention, one without MLP and a narrow one."""
    return Subnet((LayerChoice(2, 64), LayerChoice(0, 96), LayerChoice(3, 0)), bits)


@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("method", ["lora", "nls", "full"])
def test_tuning_wins_back_quality_that_a_folder_keeps(
    make: Make, windows: torch.Tensor, tmp_path: Path, method: str, bits: int
) -> None:
    supernet, evaluator = make()
    subnet = _subnet(bits)
    before = evaluator.evaluate(subnet)
    tuned = tune(supernet, subnet, windows, evaluator, SETTINGS[method], tmp_path / "tuned")
    assert tuned.before.kl == before.kl
    assert tuned.after.kl < 0.95 * before.kl
    assert tuned.after.kl == evaluator.evaluate(subnet).kl
    assert (tuned.steps, tuned.tokens) == (12, 12 * 4 * 32)
    assert not (tmp_path / "tuned" / "checkpoints").exists()
    others, _ = make()
    read = adopt_tuned(others, tmp_path / "tuned")
    assert read == tuned
    assert torch.equal(active_logits(others, windows, subnet), active_logits(supernet, windows, subnet))


def test_ranks_may_evolve(make: Make, windows: torch.Tensor, tmp_path: Path) -> None:
    """To no more parameters, and no more KL, than the middle rank everywhere has, from which they begin."""
    found, subnet = {}, _subnet(32)
    for evaluations in (1, 16):
        supernet, evaluator = make()
        settings = replace(SETTINGS["nls"], rank_search="evolution", rank_evaluations=evaluations)
        tuned = tune(supernet, subnet, windows, evaluator, settings, tmp_path / str(evaluations))
        shapes = {name: tensor.shape for name, tensor in extract(supernet, subnet).state_dict().items()}
        size = sum(rank * sum(shapes[f"{path}.weight"]) for path, rank in tuned.ranks.items())
        found[evaluations] = tuned.after.kl, size, set(tuned.ranks.values())
    (middle_kl, middle_size, ranks), (kl, size, _) = found[1], found[16]
    assert ranks == {4}
    assert kl <= middle_kl
    assert size <= middle_size


def test_the_same_seed_draws_the_same_adapter(make: Make, windows: torch.Tensor, tmp_path: Path) -> None:
    found = []
    for run, seed in enumerate((0, 0, 1)):
        supernet, evaluator = make()
        torch.manual_seed(run)
        settings = replace(SETTINGS["lora"], training=replace(TRAINING, seed=seed))
        found.append(tune(supernet, _subnet(32), windows, evaluator, settings, tmp_path / str(run)).after.kl)
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("head_bits", [0, 4])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gemma3_text", "gpt2", "gpt_neox"])
def test_all_families_are_tuned_and_extracted(
    make: Make, windows: torch.Tensor, tmp_path: Path, model_type: str, head_bits: int
) -> None:
    """Norms behind parts, windows shorter than the texts, learned positions, parallel parts and narrow heads: in
    training, too."""
    supernet, evaluator = make(model_type)
    subnet = replace(_subnet(4), head_bits=head_bits)
    before = evaluator.evaluate(subnet)
    tuned = tune(supernet, subnet, windows, evaluator, SETTINGS["lora"], tmp_path / "tuned")
    assert tuned.after.kl < 0.95 * before.kl
    extracted = extract(supernet, subnet)
    for name, packed in rounded_matrices(supernet, subnet).items():
        extracted.get_parameter(name).copy_(dequantize(packed))
    with torch.no_grad():
        found = extracted(windows).logits
    torch.testing.assert_close(found, active_logits(supernet, windows, subnet), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_is_trained_is_what_is_extracted_and_shipped(
    make: Make, windows: torch.Tensor, tmp_path: Path, method: str
) -> None:
    supernet, evaluator = make()
    subnet = _subnet(4)
    tune(supernet, subnet, windows, evaluator, SETTINGS[method], tmp_path)
    model = extract(supernet, subnet)
    state = model.state_dict()
    quantized = rounded_matrices(supernet, subnet)
    for name, integers in quantized.items():
        # within half a step of what was trained, or at the end of the grid
        step = integers.scales.float().abs().repeat_interleave(32, 1)
        off = (dequantize(integers) - state[name]).abs() / step
        inside = (integers.integers > -8) & (integers.integers < 7)
        assert float(off[inside & (step > 0)].max()) <= 0.51 or name.startswith("model.embed")
        state[name] = dequantize(integers)
    model.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=windows).logits, active_logits(supernet, windows, subnet), atol=1e-4, rtol=1e-4
        )


def test_the_adapter_fits_the_untuned_model_in_stock_peft(make: Make, windows: torch.Tensor, tmp_path: Path) -> None:
    supernet, evaluator = make()
    subnet = _subnet(32)
    untuned = extract(supernet, subnet)
    tuned = tune(supernet, subnet, windows, evaluator, SETTINGS["nls"], tmp_path)
    stock = PeftModel.from_pretrained(untuned, str(tmp_path / "adapter"))
    with torch.no_grad():
        found = stock(input_ids=windows).logits
    assert (found - active_logits(supernet, windows, subnet)).abs().max() < 1e-4
    assert set(tuned.ranks.values()) <= {8, 4, 2}


def test_the_loss_may_look_behind_each_layer(make: Make, windows: torch.Tensor, tmp_path: Path) -> None:
    """Where layers are skipped whole the student has fewer: its first is followed by what the model's second gives."""
    subnet = Subnet((SKIPPED, LayerChoice(2, 64), LayerChoice(2, 64)), 32)
    distances = {}
    for weight in (0.0, 20.0):
        supernet, evaluator = make()
        settings = TuneSettings("full", training=replace(TRAINING, block_weight=weight, steps=40))
        tune(supernet, subnet, windows, evaluator, settings, tmp_path / str(weight))
        with torch.no_grad():
            found = extract(supernet, subnet)(windows, output_hidden_states=True).hidden_states[1]
            supernet.activate_full_model()
            states = supernet.model(windows, output_hidden_states=True).hidden_states[1:3]
        cosines = [torch.nn.functional.cosine_similarity(found, wanted, dim=-1).mean() for wanted in states]
        distances[weight] = [1 - float(cosine) for cosine in cosines]
    assert distances[20.0][1] < min(0.8 * distances[0.0][1], distances[20.0][0])
    with pytest.raises(ValueError, match="block weight"):
        replace(TRAINING, block_weight=1.0, loss="text")


def test_the_full_model_may_be_tuned_beside_itself(make: Make, windows: torch.Tensor, tmp_path: Path) -> None:
    supernet, evaluator = make()
    full = supernet.space.full(32)
    wanted = active_logits(supernet, windows, full)
    text = replace(SETTINGS["lora"], training=replace(TRAINING, loss="text"))
    tuned = tune(supernet, full, windows, evaluator, text, tmp_path)
    assert tuned.before.kl == 0
    assert tuned.after.kl > 0
    assert not torch.equal(active_logits(supernet, windows, full), wanted)
    assert evaluator.evaluate_full_model().kl == 0


def test_the_mean_of_both_losses_lies_between_them(make: Make, windows: torch.Tensor, tmp_path: Path) -> None:
    after = {}
    losses: list[Loss] = ["kl", "both", "text"]
    for loss in losses:
        supernet, evaluator = make()
        settings = replace(SETTINGS["full"], training=replace(SETTINGS["full"].training, loss=loss))
        after[loss] = tune(supernet, _subnet(32), windows, evaluator, settings, tmp_path / loss).after
    assert after["kl"].kl < after["both"].kl < after["text"].kl
    assert after["kl"].perplexity > after["both"].perplexity > after["text"].perplexity


class _StopError(Exception):
    pass


@pytest.mark.parametrize("method", ["lora", "nls", "full"])
def test_an_interrupted_run_goes_on_and_ends_the_same(
    make: Make, windows: torch.Tensor, tmp_path: Path, method: str
) -> None:
    def run(folder: Path, stop_at: int | None) -> Tuned:
        supernet, evaluator = make()

        def progress(done: int, total: int, what: str) -> None:
            seen.append(done)
            if done == stop_at:
                raise _StopError

        often = replace(SETTINGS[method], training=replace(SETTINGS[method].training, checkpoint_s=0))
        return tune(supernet, _subnet(4), windows, evaluator, often, folder, progress)

    seen: list[int] = []
    whole = run(tmp_path / "whole", None)
    with pytest.raises(_StopError):
        run(tmp_path / "stopped", 7)
    assert last_checkpoint(tmp_path / "stopped" / "checkpoints") is not None
    torn = tmp_path / "stopped" / "checkpoints" / "checkpoint-9"  # kill -9 while it was written
    torn.mkdir()
    seen.clear()
    resumed = run(tmp_path / "stopped", None)
    assert seen[0] in (7, 8)
    assert resumed.after.kl == whole.after.kl
    assert resumed.ranks == whole.ranks
    again = run(tmp_path / "stopped", None)
    assert again == resumed


def test_a_run_goes_on_with_the_weights_that_it_began_with(make: Make, windows: torch.Tensor, tmp_path: Path) -> None:
    def stop(done: int, total: int, what: str) -> None:
        raise _StopError

    supernet, evaluator = make()
    with pytest.raises(_StopError):
        tune(supernet, _subnet(32), windows, evaluator, SETTINGS["lora"], tmp_path, stop)
    fit_in_sequence(supernet, _subnet(32), windows)
    with pytest.raises(ValueError, match="began with other weights"):
        tune(supernet, _subnet(32), windows, evaluator, SETTINGS["lora"], tmp_path)


@pytest.mark.parametrize(
    "training",
    [
        replace(TRAINING, sampling="sandwich"),
        replace(TRAINING, sampling="random", accumulation=2, batch=2),
        replace(TRAINING, loss="text", learning_rate=1e-3),
    ],
)
def test_ways_to_train(make: Make, windows: torch.Tensor, tmp_path: Path, training: TrainingSettings) -> None:
    supernet, evaluator = make()
    tuned = tune(supernet, _subnet(32), windows, evaluator, replace(SETTINGS["nls"], training=training), tmp_path)
    assert tuned.tokens == 12 * 4 * 32
    if training.loss == "kl":
        assert tuned.after.kl < 0.95 * tuned.before.kl
    else:
        assert tuned.after.perplexity < 0.95 * tuned.before.perplexity


def test_products_in_bf16_train_alike(
    make: Make, windows: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(folder: Path) -> Tuned:
        supernet, evaluator = make()
        return tune(supernet, _subnet(4), windows, evaluator, SPARSE["lora"], folder)

    monkeypatch.setattr("nas.training._dtype", lambda: torch.float32)
    exact = run(tmp_path / "exact")
    monkeypatch.setattr("nas.training._dtype", lambda: torch.bfloat16)
    rough = run(tmp_path / "rough")
    assert rough.after.kl != exact.after.kl
    assert rough.after.kl == pytest.approx(exact.after.kl, rel=0.1)


def test_no_step_is_lost_to_the_schedule(make: Make, windows: torch.Tensor, tmp_path: Path) -> None:
    supernet, evaluator = make()
    one = replace(SETTINGS["full"], training=replace(TRAINING, steps=1))
    tuned = tune(supernet, _subnet(32), windows, evaluator, one, tmp_path)
    assert tuned.after.kl < tuned.before.kl


def test_batches_of_a_step_draw_the_same_whenever_they_are_drawn(
    make: Make, windows: torch.Tensor, tmp_path: Path
) -> None:
    """Twelve windows in batches of four, two of them a step: every second step has one alone."""
    often = replace(
        SETTINGS["nls"],
        training=replace(SETTINGS["nls"].training, steps=6, accumulation=2, checkpoint_s=0),
    )

    def run(folder: Path, stop_at: int | None) -> Tuned:
        def progress(done: int, total: int, what: str) -> None:
            if done == stop_at:
                raise _StopError

        supernet, evaluator = make()
        return tune(supernet, _subnet(32), windows[:12], evaluator, often, folder, progress)

    whole = run(tmp_path / "whole", None)
    with pytest.raises(_StopError):
        run(tmp_path / "stopped", 4)
    assert run(tmp_path / "stopped", None).after.kl == whole.after.kl


def test_dropout_needs_weights_that_are_not_rounded(make: Make, windows: torch.Tensor, tmp_path: Path) -> None:
    supernet, evaluator = make()
    with pytest.raises(ValueError, match="dropout goes with weights that are not rounded, got int8"):
        tune(supernet, _subnet(8), windows, evaluator, replace(SETTINGS["lora"], dropout=0.1), tmp_path)
    assert not list(tmp_path.iterdir())


def test_time_ends_a_run(make: Make, windows: torch.Tensor, tmp_path: Path) -> None:
    supernet, evaluator = make()
    training = replace(TRAINING, steps=10**6, max_minutes=1 / 60)
    tuned = tune(supernet, _subnet(32), windows, evaluator, replace(SETTINGS["lora"], training=training), tmp_path)
    assert 1 <= tuned.steps < 10**6
    assert tuned.seconds < 30


def test_a_folder_of_something_else_is_refused(
    make: Make, tiny: Callable[..., LoadedModel], windows: torch.Tensor, tmp_path: Path
) -> None:
    supernet, evaluator = make()
    folder = tmp_path / "tuned"
    tune(supernet, _subnet(32), windows, evaluator, SETTINGS["lora"], folder)
    with pytest.raises(ValueError, match="another subnet, text or settings"):
        tune(supernet, _subnet(8), windows, evaluator, SETTINGS["lora"], folder)
    with pytest.raises(ValueError, match="another subnet, text or settings"):
        tune(supernet, _subnet(32), windows[:8], evaluator, SETTINGS["lora"], folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="with other files"):
        tune(supernet, _subnet(32), windows, evaluator, SETTINGS["lora"], tmp_path / "mine")
    with pytest.raises(ValueError, match="wrote whole"):
        adopt_tuned(supernet, tmp_path / "mine")
    loaded = tiny(seed=1)
    other = Supernet(loaded, SearchSpace.from_config(loaded.config))
    with pytest.raises(ValueError, match="another model"):
        adopt_tuned(other, folder)


def test_hostile_folders_are_refused(make: Make, windows: torch.Tensor, tmp_path: Path) -> None:
    supernet, evaluator = make()
    tune(supernet, _subnet(32), windows, evaluator, SETTINGS["lora"], tmp_path)
    said = json.loads((tmp_path / TUNED_FILE).read_text())
    said["subnet"]["layers"][0] = [1, 64]
    (tmp_path / TUNED_FILE).write_text(json.dumps(said))
    with pytest.raises(ValueError, match="sizes of subnet"):
        adopt_tuned(supernet, tmp_path)
    for text in ("{}", "[]", "nothing", json.dumps({**said, "version": 2}), json.dumps({**said, "subnet": 3})):
        (tmp_path / TUNED_FILE).write_text(text)
        with pytest.raises(ValueError, match="wrote whole"):
            adopt_tuned(supernet, tmp_path)


@pytest.mark.parametrize(
    "options",
    [{"method": "lora", "ranks": (8, 4)}, {"method": "nls", "ranks": (8,)}, {"method": "magic"}, {"alpha": 0}],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="got"):
        TuneSettings(**options)  # type: ignore[arg-type]


SPARSE = {
    "lora": replace(SETTINGS["lora"], sparsity=0.5),
    "nls": replace(SETTINGS["nls"], sparsity=0.5, pruning="sparsegpt"),
    "2:4": replace(SETTINGS["lora"], sparsity=0.5, pattern="2:4"),
    "prune": TuneSettings("prune", sparsity=0.5),
    "losa": TuneSettings("losa", (), 16.0, sparsity=0.5, rounds=3, training=replace(TRAINING, steps=15)),
}


@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("name", SPARSE)
def test_sparsity_survives_the_merge_exactly(
    make: Make, windows: torch.Tensor, tmp_path: Path, name: str, bits: int
) -> None:
    supernet, evaluator = make()
    subnet = _subnet(bits)
    tuned = tune(supernet, subnet, windows, evaluator, SPARSE[name], tmp_path)
    own = [own for parts in load_own(tmp_path, subnet) for own in parts.values()]
    matrices = [(n, w) for weights in own for n, w in weights.rounded.items() if not n.endswith("bias")]
    shipped = [w.integers if isinstance(w, QuantizedWeight) else w for _, w in matrices]
    zeros = sum(int((w == 0).sum()) for w in shipped)
    assert tuned.sparsity == zeros / sum(w.numel() for w in shipped)
    exact = [weights.exact[n] for weights in own for n in weights.exact if not n.endswith("bias")]
    if bits == 32:
        assert tuned.sparsity == pytest.approx(0.5, abs=0.01)
    else:  # rounding makes a few more
        assert 0.49 < tuned.sparsity < 0.75
    if name == "2:4":
        assert all(int((w.reshape(-1, 4) != 0).sum(1).max()) <= 2 for w in [*shipped, *exact])
    if name != "losa":
        assert tuned.pruned is not None
        assert tuned.before.kl < tuned.pruned.kl
        assert tuned.after.kl < tuned.pruned.kl or (name == "prune" and tuned.after.kl == tuned.pruned.kl)
    assert not (tmp_path / "adapter").exists()  # stock PEFT has no masks


@pytest.mark.parametrize("bits", [32, 4])
def test_a_separate_adapter_leaves_the_base_sparse(
    make: Make, windows: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int
) -> None:
    monkeypatch.setattr("nas.evaluate.fast_dtype", lambda: torch.float32)  # as stock PEFT computes
    supernet, evaluator = make()
    subnet = _subnet(bits)
    tuned = tune(supernet, subnet, windows, evaluator, replace(SPARSE["nls"], separate=True), tmp_path)
    assert tuned.sparsity >= 0.49
    assert tuned.pruned is not None
    base = evaluator.evaluate(subnet)
    assert base.kl == tuned.pruned.kl
    assert tuned.after.kl < base.kl
    model = extract(supernet, subnet)
    if bits == 4:
        model.load_state_dict({n: dequantize(q) for n, q in rounded_matrices(supernet, subnet).items()}, strict=False)
    stock = PeftModel.from_pretrained(model, str(tmp_path / "adapter"))
    teacher = make()[0].loaded.model
    with torch.no_grad():
        p, q = (m(input_ids=windows[:4]).logits.log_softmax(-1) for m in (teacher, stock))
    assert float((p.exp() * (p - q)).sum(-1).mean()) == pytest.approx(tuned.after.kl, rel=1e-3)


def test_rounds_of_losa_go_on_where_they_stopped(make: Make, windows: torch.Tensor, tmp_path: Path) -> None:
    def run(folder: Path, stop_at: int | None) -> Tuned:
        supernet, evaluator = make()

        def progress(done: int, total: int, what: str) -> None:
            if done == stop_at and what.startswith("round 2"):
                raise _StopError

        often = replace(SPARSE["losa"], training=replace(SPARSE["losa"].training, checkpoint_s=0))
        return tune(supernet, _subnet(32), windows, evaluator, often, folder, progress)

    whole = run(tmp_path / "whole", None)
    with pytest.raises(_StopError):
        run(tmp_path / "stopped", 7)
    resumed = run(tmp_path / "stopped", None)
    assert (resumed.after.kl, resumed.ranks, resumed.sparsity) == (whole.after.kl, whole.ranks, whole.sparsity)
    assert resumed.steps == 15
    by_layer = {path.split(".")[2]: rank for path, rank in whole.ranks.items()}
    assert all(rank == by_layer[path.split(".")[2]] for path, rank in whole.ranks.items())
    assert sum(by_layer.values()) == 10 * 3


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 1.0},
        {"sparsity": 0.5, "pruning": "magic"},
        {"method": "losa"},
        {"method": "prune"},
        {"method": "losa", "sparsity": 0.5, "pattern": "2:4"},
        {"method": "full", "sparsity": 0.5},
        {"method": "full", "separate": True},
        {"method": "losa", "sparsity": 0.5, "separate": True},
        {"pattern": "4:2"},
        {"pattern": "2:4"},
        {"sparsity": 0.3, "pattern": "2:4"},
        {"method": "nls", "ranks": (8, 16)},
        {"ranks": (0,)},
        {"rank_search": "evolution"},
        {"method": "nls", "ranks": (8, 4), "rank_search": "luck"},
        {"training": TrainingSettings(sampling="sandwich")},
    ],
)
def test_settings_that_do_not_fit_each_other_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"got|take lora"):
        TuneSettings(**options)  # type: ignore[arg-type]
