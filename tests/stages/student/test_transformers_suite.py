"""The tests that transformers runs over each of its models, over the students.

They come from the sdist of the release that is installed (`make test-all` fetches them), which
holds the mixins for models, training and configurations, and not those for generation and
exporters: empty classes stand in for these.
"""

from __future__ import annotations

import importlib
import sys
import unittest
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto import modeling_auto

from teacher_cache.stages.student import (
    MambaStudentConfig,
    MambaStudentForCausalLM,
    MambaStudentForSequenceClassification,
    MambaStudentModel,
)

SUITE = Path(__file__).parents[3] / "assets" / "transformers-tests" / transformers.__version__
if not SUITE.is_dir():
    pytest.skip("scripts/transformers-tests fetches the suite", allow_module_level=True)
pytest.importorskip("parameterized", reason="the suite needs it")

ABSENT = {  # of the sdist, and what the suite takes from there
    "exporters.test_export": {"ExportTesterMixin": object},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {"config_common_kwargs": {}},
    "distributed_testing_utils": {},
}
# The suite's assumption that does not apply, by test.
NOT_OF_CLASSIFIERS = {
    "test_training_overfit": "every model learns a label a token, and generates",
}
NOT_BOTH_WAYS = {
    "test_bc_cache_name_forward": "what takes a state has one, and is asked for it (from 5.24 on)",
}


class Absent(ModuleType):
    """A module of which tests that need several devices import functions."""

    __path__: list[str] = []  # noqa: RUF012  (as of any package)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def suite_module(name: str) -> ModuleType:
    """A module of the suite, as one of a package of its own."""
    package = "transformers_suite"
    if package not in sys.modules:
        top = ModuleType(package)
        top.__path__ = [str(SUITE)]
        sys.modules[package] = top
        for absent, names in ABSENT.items():
            for parent in (absent.split(".")[0], absent):
                if not (SUITE / parent.replace(".", "/")).is_dir():
                    stand_in = sys.modules.setdefault(f"{package}.{parent}", Absent(parent))
            vars(stand_in).update(names)  # pyright: ignore[reportPossiblyUnboundVariable]
    return importlib.import_module(f"{package}.{name}")


with pytest.MonkeyPatch.context() as patch:  # the suite's marks are none of ours to declare
    patch.setattr(pytest.mark, "_config", None)
    models: Any = suite_module("test_modeling_common")
    training: Any = suite_module("test_training_mixin")
    configurations: Any = suite_module("test_configuration_common")
generation: Any = sys.modules["transformers_suite.generation.test_utils"]


class StudentTester:
    """What the suite asks for a small model and its inputs."""

    is_training = True
    batch_size, seq_length = 3, 7
    vocab_size, hidden_size, num_hidden_layers, type_sequence_label_size = 99, 32, 2, 3

    def __init__(self, arch: str, *, bidirectional: bool, causal_lm_class: type | None) -> None:
        self.arch, self.bidirectional = arch, bidirectional
        self.causal_lm_class = causal_lm_class

    def get_config(self) -> MambaStudentConfig:
        shape: dict[str, Any] = {
            "d_model": self.hidden_size,
            "num_layers": self.num_hidden_layers,
            "expand": 2,
        }
        shape |= {"d_state": 8, "head_dim": 16, "chunk_size": 4, "vocab_size": self.vocab_size}
        ids: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        settings: dict[str, Any] = {"arch": self.arch, "bidirectional": self.bidirectional}
        settings |= {"num_labels": self.type_sequence_label_size, "dropout": 0.0}
        return MambaStudentConfig(**settings, **shape, **ids)

    def prepare_config_and_inputs_for_common(self) -> tuple[MambaStudentConfig, dict[str, Any]]:
        ids = models.ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture(autouse=True)
def known_by_name(monkeypatch) -> None:
    """The suite finds what a class is for by its name, in tables that no registration enters."""
    for table, kind in (
        (modeling_auto.MODEL_MAPPING_NAMES, MambaStudentModel),
        (
            modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
            MambaStudentForSequenceClassification,
        ),
    ):
        monkeypatch.setitem(table, MambaStudentConfig.model_type, kind.__name__)


def suite_of(arch: str, *, classifies: bool, bidirectional: bool = False) -> type:
    """The suite over one kind of student."""
    head = MambaStudentForSequenceClassification if classifies else MambaStudentForCausalLM

    def set_up(self: Any) -> None:
        self.model_tester = StudentTester(
            arch, bidirectional=bidirectional, causal_lm_class=None if classifies else head
        )
        self.config_tester = configurations.ConfigTester(
            self,
            config_class=MambaStudentConfig,
            has_text_modality=False,
            common_properties=["hidden_size", "num_hidden_layers", "vocab_size"],
        )

    def have_equal_states(self: Any, one: Any, other: Any) -> None:
        """What a model whose layers are no attention brings for the suite to compare by."""
        for ours, theirs in zip(one.layers, other.layers, strict=True):
            for name in ("conv_states", "recurrent_states"):
                torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))

    attributes: dict[str, Any] = {
        "_check_caches_are_equal": have_equal_states,
        "all_model_classes": (MambaStudentModel, head),
        "has_attentions": False,
        "setUp": set_up,
        "test_config": lambda self: self.config_tester.run_common_tests(),
    }
    apart = (NOT_OF_CLASSIFIERS if classifies else {}) | (NOT_BOTH_WAYS if bidirectional else {})
    for name, reason in apart.items():
        attributes[name] = unittest.skip(f"assumes that {reason}")(lambda _: None)
    bases = [models.ModelTesterMixin, training.TrainingTesterMixin, unittest.TestCase]
    if not classifies:
        bases.insert(0, generation.GenerationTesterMixin)
    return type("Suite", tuple(bases), attributes)


class TestMambaLanguageModel(suite_of("mamba", classifies=False)):
    pass


class TestMambaClassifier(suite_of("mamba", classifies=True)):
    pass


class TestMambaBothWays(suite_of("mamba", classifies=True, bidirectional=True)):
    pass


class TestMamba2LanguageModel(suite_of("mamba2", classifies=False)):
    pass


class TestMamba2Classifier(suite_of("mamba2", classifies=True)):
    pass


class TestMamba2BothWays(suite_of("mamba2", classifies=True, bidirectional=True)):
    pass
