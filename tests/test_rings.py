"""The table of rings names tests that there are, and the commands run the rings."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.rings import RINGS, ring_of

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("entry", RINGS)
def test_an_entry_names_what_there_is(entry: str) -> None:
    path, _, test = entry.partition("::")
    assert (ROOT / path).exists(), "it has moved: name its new place in tests/rings.py"
    if test:
        nodes = ast.parse((ROOT / path).read_text()).body
        names = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
        assert test.split("[")[0] in names, "it has another name now: tests/rings.py must say it"


@pytest.mark.parametrize(
    ("node_id", "ring"),
    [
        ("tests/golden/test_golden.py::test_a_run_has_its_weights[mamba1]", "ci"),
        ("tests/golden/test_golden.py_", None),
        ("tests/integration/test_processes.py::test_any", "ci"),
        ("tests/integration/test_wrong_input.py::test_any[one]", "test"),
        ("tests/integration/test_killed_cache.py::test_killed_between_any_two_steps[a]", "slow"),
        ("tests/integration/test_killed_cache.py::test_killed_while_it_makes_views[True]", "slow"),
        ("tests/integration/test_killed_cache.py::test_killed_while_it_makes_views[False]", "ci"),
        ("tests/cache/test_lock.py::test_any", None),
    ],
)
def test_the_longest_entry_decides(node_id: str, ring: str | None) -> None:
    assert ring_of(node_id) == ring


def test_every_ring_has_its_command() -> None:
    makefile = (ROOT / "Makefile").read_text()
    recipes = dict(re.findall(r"^(test[a-z-]*): .*\n\t(.*)\n", makefile, re.MULTILINE))
    assert recipes["test"] == "$(PYTEST)"
    assert recipes["test-ci"] == "$(PYTEST) -m 'ci and not slow and not gpu'"
    assert recipes["test-all"] == "$(PYTEST) -m 'not gpu'"
    steps = re.findall(r"^step make (\S+)$", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert steps == ["setup", "assets", "check", "test", "test-ci"]
