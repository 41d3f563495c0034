"""A classifier that matches maps and states of its teacher: steps, stages, checkpoints."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from teacher_cache.cache.codecs.attention import attention_from
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.reader import CacheReader
from teacher_cache.stages import train_student
from teacher_cache.stages.losses.config import LAST_STATES, ObjectiveConfig
from teacher_cache.stages.losses.objective import StepTotals
from teacher_cache.stages.processes import share_of
from teacher_cache.stages.student import MambaStudentForSequenceClassification
from teacher_cache.stages.student.mixing_matrices import mixing_matrices
from teacher_cache.stages.student.position_map import PositionMap
from teacher_cache.stages.training.arguments import training_arguments
from teacher_cache.stages.training.auxiliaries import PooledProjection, WithAuxiliaries
from teacher_cache.stages.training.batches import BothKinds, CachedSamples, SampleCollator
from teacher_cache.stages.training.cached_layers import CachedLayers
from teacher_cache.stages.training.classification import ClassificationStudents
from teacher_cache.stages.training.config import OptimizationConfig
from teacher_cache.stages.training.held_out import HeldOutSamples
from teacher_cache.stages.training.layers import Schedule
from teacher_cache.stages.training.lesson import Lesson
from teacher_cache.stages.training.run_folder import CHECKPOINTS, read_run
from teacher_cache.stages.training.terms import Heard, Share
from teacher_cache.stages.training.trainer import StudentTrainer
from teacher_cache.stages.training.views import SamplesView
from tests import reference_losses as reference
from tests.lessons import samples_lesson
from tests.stages.losses.transfer.test_attention import row_distance
from tests.stages.training.test_projected_student import (
    CUTS,
    NUM_LABELED,
    WIDTH,
    FixedBatches,
    Order,
)
from tests.stages.training.transfer.test_teacher_maps import slow
from tests.tiny_runs import cache_reviews, student_config
from tests.tiny_students import small_student

pytestmark = pytest.mark.usefixtures("tokenizers_read_once")

MATCHED: dict[str, Any] = {"attention_weight": 0.7, "hidden_weight": 0.4, "num_layers": 2}
OBJECTIVE = ObjectiveConfig(unlabeled_alpha=0.3, pooled_weight=1.5, lm_weight=0.1)


@pytest.fixture(scope="module")
def data(transfer_cache: Path) -> BothKinds:
    labeled, unlabeled = (CacheReader(transfer_cache, one) for one in ("labeled", "unlabeled"))
    return BothKinds(
        CachedSamples(labeled, np.arange(NUM_LABELED), labeled=True),
        CachedSamples(unlabeled, np.arange(12), labeled=False),
    )


def layers_of(cache: Path, **changes: Any) -> CachedLayers:
    config = student_config(cache, cache, **(MATCHED | changes))
    layers = CachedLayers.of(config.transfer, config.student, CacheReader(cache, "labeled"))
    assert layers is not None
    return layers


def make_student(**changes: Any) -> MambaStudentForSequenceClassification:
    move = {"position_map": {"mode": "move_first_to_last"}}
    return small_student(vocab_size=30522, dropout=0.0, **(move | changes))


def make_module(layers: CachedLayers, **changes: Any) -> torch.nn.Module:
    student = make_student(**changes)
    width = student.config.d_model
    pooled = PooledProjection(width, teacher_width=WIDTH, seed=1)
    return WithAuxiliaries(student, pooled, *layers.projections(width, seed=0)).double()


def trained(
    folder: Path,
    data: BothKinds,
    layers: CachedLayers,
    order: Order,
    accumulation: int,
    **changes: Any,
) -> StudentTrainer:
    num_steps = len(order) // accumulation
    config = OptimizationConfig(
        device="cpu", gradient_accumulation=accumulation, log_steps=1, lr=0.01, warmup=0.0
    )
    module: Any = make_module(layers, **changes)
    position_map = module.student.position_map
    trainer = StudentTrainer(
        model=module,
        args=training_arguments(
            config,
            folder,
            num_steps=num_steps,
            steps_per_epoch=num_steps,
            evaluates=False,
            keeps_best=False,
            label_names=["labels", "teacher_logits"],
        ),
        lesson=samples_lesson(OBJECTIVE, *layers.terms(position_map)),
        held_out=HeldOutSamples(),
        batches=FixedBatches(order),
        train_dataset=data,
        data_collator=SampleCollator(0, layers),
    )
    trainer.train()
    return trainer


def test_however_a_step_is_cut_all_weights_are_the_same(
    tmp_path: Path, data: BothKinds, transfer_cache: Path
) -> None:
    layers = layers_of(transfer_cache)
    found = {
        name: trained(tmp_path / name, data, layers, order, n) for name, (n, order) in CUTS.items()
    }
    start = make_module(layers).state_dict()
    whole: Any = found["whole"].model
    expected = whole.state_dict()
    for part in ("projections.0.weight", "projections.1.weight"):
        assert not torch.equal(expected[part], start[part]), part
    for trainer in found.values():
        model: Any = trainer.model
        for name, values in model.state_dict().items():
            torch.testing.assert_close(values, expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("loss", ["kl", "frobenius", "cosine"])
@pytest.mark.parametrize(
    ("arch", "bidirectional", "lm_weight"), [("mamba2", False, 0.1), ("mamba", True, 0.0)]
)
def test_the_log_is_what_a_slow_loop_finds(
    tmp_path: Path,
    data: BothKinds,
    transfer_cache: Path,
    loss: str,
    arch: str,
    bidirectional: bool,
    lm_weight: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    objective = OBJECTIVE.model_copy(update={"lm_weight": lm_weight})
    monkeypatch.setattr(f"{__name__}.OBJECTIVE", objective)
    options: dict[str, Any] = {"arch": arch, "bidirectional": bidirectional}
    channels = {"attention_channels": 5} if arch == "mamba" else {}
    without_heads = {"head_dim": 12} if arch == "mamba2" else {}
    accumulation, order = CUTS["unequal"]
    config_options = options | channels | {"attention_loss": loss}
    layers = layers_of_arch(transfer_cache, config_options)
    trainer = trained(tmp_path, data, layers, order, accumulation, **options, **without_heads)
    module: Any = make_module(layers, **options, **without_heads).eval()
    codec = attention_from(CacheReader(transfer_cache, "labeled").manifest.settings)
    assert codec is not None
    rows: list[float] = []
    states: list[float] = []
    for position in [*range(8), *range(20, 24)]:  # the first step's, one at a time
        sample = data[position]
        ids = torch.from_numpy(sample["input_ids"].astype(np.int64))[None]
        with torch.no_grad():
            outputs = module(input_ids=ids, attention_mask=torch.ones_like(ids), output_mixers=True)
        position_map = module.student.position_map
        source = position_map.source_positions(len(ids[0]))
        for layer in (0, 1):
            exact = codec.decode(sample[f"attention_{layer}"], len(ids[0]))
            teacher = slow(exact, position_map, is_causal=not bidirectional)
            matrices = mixing_matrices(outputs.mixers[layer])[0].detach()
            units = range(len(matrices)) if arch == "mamba2" else [4, 14, 24, 33, 43]
            student = matrices[list(units)].abs().sum(0).tolist()
            for i in range(len(source)):
                allowed = [j <= i or bidirectional for j in range(len(source))]
                rows.append(row_distance(student[i], list(teacher[i]), allowed, loss))
                cached = sample[f"hidden_{layer}"][source[i]].astype(np.float64).tolist()
                projected = outputs.projected_hidden[layer][0, i].tolist()
                states.append(1 - reference.cosine(projected, cached))
    line = next(one for one in trainer.state.log_history if "loss" in one)
    assert line["attention"] == pytest.approx(sum(rows) / len(rows), rel=1e-4)
    assert line["hidden"] == pytest.approx(sum(states) / len(states), rel=1e-5)


def layers_of_arch(cache: Path, options: dict[str, Any]) -> CachedLayers:
    """`layers_of`, for a Mamba-1 too, which has no heads."""
    settings = student_config(cache, cache).model_dump(exclude_unset=True) | MATCHED | options
    if options["arch"] == "mamba":
        del settings["head_dim"]
    config = train_student.TrainStudentConfig.of(**settings)
    layers = CachedLayers.of(config.transfer, config.student, CacheReader(cache, "labeled"))
    assert layers is not None
    return layers


def test_every_option_reaches_what_is_trained(transfer_cache: Path) -> None:
    options = {
        **{"attention_loss": "cosine", "attention_channels": 3, "attention_layer_map": ((1, 0),)},
        **{"hidden_layer_map": ((0, 1),), "transfer_schedule": "staged"},
        "transfer_shares": (0.3, 0.1),
    }
    layers = layers_of_arch(transfer_cache, {"arch": "mamba", "bidirectional": True, **options})
    transfer = layers.transfer(PositionMap())
    assert transfer.maps is not None and transfer.hidden is not None
    assert (transfer.maps.loss, transfer.maps.num_channels) == ("cosine", 3)
    assert (transfer.maps.pairs, transfer.maps.fields) == (((1, 0),), ("attention_0",))
    assert (transfer.hidden.pairs, transfer.hidden.fields) == (((0, 1),), ("hidden_1",))
    schedule = Schedule.of(layers.config, 10)
    assert (schedule.attention_until, schedule.hidden_until) == (3, 4)
    assert not transfer.is_causal and layers.hidden_widths == {0: WIDTH}
    assert [loss_of(layers, step) for step in (0, 3, 4)] == pytest.approx([0.7, 0.4, 9.0])
    assert loss_of(layers_of(transfer_cache), 0) == pytest.approx(10.1)


def loss_of(layers: CachedLayers, step: int) -> float:
    """A step's loss where what is matched comes to 1 each, and all else to 9."""
    terms = layers.terms(PositionMap())
    lesson = Lesson(
        view=SamplesView(),
        objective=OBJECTIVE,
        terms=terms,
        schedule=Schedule.of(layers.config, 10),
    )
    weights = (layers.config.attention_weight, layers.config.hidden_weight)
    shares = [
        Share(name=term.stage, kind="all", weight=weight, value=torch.ones(()))
        for term, weight in zip(terms, weights, strict=True)
    ]
    core: Any = SimpleNamespace(loss=torch.tensor(9.0))
    return lesson.loss(core, shares, terms, step=step).item()


class Interruption(Exception):
    """Stands for a kill."""


RUN: dict[str, Any] = {
    **MATCHED, "pooled_weight": 1.0, "unlabeled_alpha": 0.3, "dropout": 0.2,
    "embedding_lr_scale": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("schedule", ["together", "staged"])
def test_an_interrupted_run_goes_on_alike_and_exports_the_student_alone(
    schedule: str, transfer_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = RUN | {"transfer_schedule": schedule}
    whole, run = tmp_path / "whole", tmp_path / "run"
    train_student.run(student_config(transfer_cache, whole, **options))
    config = student_config(transfer_cache, run, **options)
    with monkeypatch.context() as patch:

        def interrupt(*_: Any) -> None:
            raise Interruption

        patch.setattr(train_student, "_saved", interrupt)
        with pytest.raises(Interruption):
            train_student.run(config)
    torch.save({}, run / CHECKPOINTS / "checkpoint-6" / "optimizer.pt")  # so that 4 is the newest
    train_student.run(config)
    for name in ("model.safetensors", f"{CHECKPOINTS}/checkpoint-6/model.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    checkpoint = load_file(run / CHECKPOINTS / "checkpoint-6" / "model.safetensors")
    assert checkpoint["projections.0.weight"].shape == (WIDTH, 8)
    exported = load_file(run / "model.safetensors")
    student = MambaStudentForSequenceClassification.from_pretrained(run)
    assert exported.keys() == student.state_dict().keys()
    assert all(torch.equal(exported[name], checkpoint[f"student.{name}"]) for name in exported)


def test_stages_train_their_terms_alone(transfer_cache: Path, tmp_path: Path) -> None:
    options = RUN | {"transfer_schedule": "staged", "transfer_shares": (0.34, 0.34)}
    train_student.run(student_config(transfer_cache, tmp_path, **options))
    at = [
        load_file(tmp_path / CHECKPOINTS / f"checkpoint-{step}" / "model.safetensors")
        for step in (4, 6)
    ]
    start = train_student_start(transfer_cache, tmp_path, options).state_dict()
    names = {
        "head": "student.head.1.weight",
        "pooled": "projection.weight",
        "hidden": "projections.1.weight",
        "decay": "student.backbone.layers.1.mixer.A_log",
    }
    assert names.items() <= {k: v for k, v in names.items() if v in start}.items()
    # Four steps of maps and states: the head and the pooled projection wait for the last two.
    for part in ("head", "pooled"):
        assert torch.equal(at[0][names[part]], start[names[part]]), part
        assert not torch.equal(at[1][names[part]], at[0][names[part]]), part
    assert not torch.equal(at[0][names["hidden"]], start[names["hidden"]])
    assert torch.equal(at[1][names["hidden"]], at[0][names["hidden"]])
    assert not torch.equal(at[0][names["decay"]], start[names["decay"]])
    log = [one for one in (read_run(tmp_path).result or {})["log"] if "loss" in one]
    trained = ["attention"] * 2 + ["hidden"] * 2
    weights = {"attention": 0.7, "hidden": 0.4}
    for line, name in zip(log, trained, strict=False):
        assert line["loss"] == pytest.approx(weights[name] * line[name], rel=1e-3), name


def test_stages_in_several_processes_are_refused(
    transfer_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match="staged trains in one process, and torchrun started 2"):
        layers_of(transfer_cache, transfer_schedule="staged")


def train_student_start(cache: Path, out: Path, options: dict[str, Any]) -> Any:
    """What is trained, before its first step."""
    config = student_config(cache, out, **options)
    readers = train_student.open_splits(cache, 0.3)
    task = ClassificationStudents(config, readers)
    return task.course(train_student.join(cache, config.join, longest_sample=24)).trained


def test_last_states_are_matched_as_the_layer_that_they_are(
    tiny_bert: Path, acl_imdb: Path, tmp_path: Path
) -> None:
    """BERT has no norm behind its last layer, so both caches hold the same states."""
    last, numbered = (
        cache_reviews(tmp_path / hidden, tiny_bert, acl_imdb, hidden=hidden)
        for hidden in ("last", "1")
    )
    maps = {last: ((0, LAST_STATES),), numbered: ((0, 1),)}
    weights = [
        train_student.run(
            student_config(
                cache, tmp_path / f"run-{i}", hidden_weight=0.5, hidden_layer_map=layer_map
            )
        ).run
        / "model.safetensors"
        for i, (cache, layer_map) in enumerate(maps.items())
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    by_proportion = layers_of(last, attention_weight=0.0).hidden
    assert by_proportion is not None
    assert (by_proportion.pairs, by_proportion.fields) == (((1, LAST_STATES),), ("hidden",))
    assert by_proportion.widths == (WIDTH,)


def test_weights_of_0_are_off(
    transfer_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Maps and states in the cache change no bit, and no setting is recorded."""
    whole, without = tmp_path / "whole", tmp_path / "without"
    train_student.run(student_config(transfer_cache, whole, unlabeled_alpha=0.3))
    read = CachedSamples.__getitem__

    def drop(self: CachedSamples, position: int) -> dict[str, np.ndarray]:
        fields = read(self, position)
        assert "attention_0" in fields and "hidden_1" in fields
        return {k: v for k, v in fields.items() if not k.startswith(("attention_", "hidden_"))}

    monkeypatch.setattr(CachedSamples, "__getitem__", drop)
    train_student.run(student_config(transfer_cache, without, unlabeled_alpha=0.3))
    name = "model.safetensors"
    assert (whole / name).read_bytes() == (without / name).read_bytes()
    settings = read_run(whole).settings
    assert not [one for one in settings if one.startswith(("attention", "hidden", "transfer"))]
    assert "projections.0.weight" not in load_file(whole / CHECKPOINTS / "checkpoint-6" / name)


@pytest.mark.parametrize("num_samples", [1, 3])
def test_shares_of_a_batch_add_up_to_it(
    num_samples: int, data: BothKinds, transfer_cache: Path
) -> None:
    """Two processes share it; of one sample, the second process has none."""
    layers = layers_of(transfer_cache)
    module: Any = make_module(layers).eval()
    terms = layers.terms(module.student.position_map)
    batch = SampleCollator(0, layers)([data[i] for i in range(num_samples)])
    totals = sum((term.counted(None, batch) for term in terms), StepTotals())
    asked = {name: True for term in terms for name in term.requests}

    def found(part: dict[str, torch.Tensor]) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        inputs = {name: part[name] for name in ("input_ids", "attention_mask")}
        outputs = module(**inputs, **asked)
        heard = Heard(student=module, outputs=outputs, batch=part, positions=None, step=0)
        shares = [term.share(heard, totals) for term in terms]
        loss = sum((one.weight * one.value for one in shares), torch.zeros(()))
        weights = [p for n, p in module.named_parameters() if "projections" in n or "A_log" in n]
        return loss, torch.autograd.grad(loss, weights)

    whole, gradients = found(batch)
    shares = [found(share_of(batch, rank=rank, num_processes=2)) for rank in (0, 1)]
    torch.testing.assert_close(shares[0][0] + shares[1][0], whole)
    for parts in zip(gradients, shares[0][1], shares[1][1], strict=True):
        torch.testing.assert_close(parts[1] + parts[2], parts[0])
    if num_samples == 1:
        assert shares[1][0] == 0 and all((one == 0).all() for one in shares[1][1])
