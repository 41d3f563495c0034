"""Which ring of the suite a test is in: `make test`, what `.ci/run` adds, or `make test-all`.

A test is in the inner ring unless it is named here or marked where it stands. An entry is a folder,
a file or a test, with or without its parameters, and the longest one that fits decides; so a test
of a file that is further out can be kept in the inner ring.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import pytest

Ring = Literal["test", "ci", "slow"]

RINGS: dict[str, Ring] = {
    # What is on disk, all of it made anew; opening the old is in the inner ring.
    "tests/golden/test_golden.py": "ci",
    # Whole stages in processes of their own.
    "tests/integration/": "ci",
    "tests/integration/test_wrong_input.py": "test",
    "tests/integration/test_other_tokens.py": "slow",  # a vocabulary of 262,145 ids, read whole
    # Kills: one drill of each kind, and at every step only further out.
    "tests/integration/test_killed_cache.py::test_killed_between_any_two_steps": "slow",
    "tests/integration/test_killed_cache.py::test_killed_while_it_makes_views[True]": "slow",
    "tests/integration/test_killed_training.py"
    "::test_killed_at_every_step[language_models_config]": "slow",
    "tests/test_examples.py": "ci",
    "tests/integration/test_slices.py"
    "::test_slices_at_once_killed_at_random[classifier-zarr]": "slow",
    "tests/integration/test_slices.py"
    "::test_slices_at_once_killed_at_random[language_model-arrow]": "slow",
    "tests/integration/test_killed_training.py::test_killed_at_every_step[numbers_config]": "slow",
    # Vocabularies of tens of thousands of tokens.
    "tests/pipeline/test_aligned_caches.py": "ci",
    "tests/stages/join/test_alignment.py": "ci",
    "tests/stages/teacher/test_aligned_caches.py": "ci",
    "tests/stages/join/test_teacher_folder.py::test_the_tokenizer_comes_back_the_same": "ci",
    "tests/stages/teacher/test_language_modeling.py"
    "::test_a_lost_shard_is_made_again_bit_for_bit": "slow",
    "tests/stages/teacher/test_language_modeling.py"
    "::test_a_lost_shard_is_made_again_bit_for_bit[nucleus]": "ci",
    "tests/pipeline/test_aligned_caches.py::test_its_own_student_learns_from_it[sampled]": "slow",
    "tests/stages/teacher/test_aligned_caches.py"
    "::test_a_cut_cache_is_the_teachers_among_the_students_ids": "slow",
    "tests/stages/teacher/test_aligned_caches.py"
    "::test_a_cut_cache_is_the_teachers_among_the_students_ids[topk]": "ci",
    "tests/stages/teacher/test_language_modeling.py::test_other_settings_are_not_mixed": "ci",
    "tests/stages/teacher/test_language_modeling.py"
    "::test_what_is_cached_is_what_the_model_says_of_each_document_alone": "ci",
    "tests/stages/teacher/test_language_modeling.py"
    "::test_what_is_cached_is_what_the_model_says_of_each_document_alone[topk]": "test",
    "tests/stages/test_train_aligned.py": "ci",
    # Several caches or trainings compared.
    "tests/pipeline/test_transfer.py::test_a_language_model_on_packed_text": "ci",
    "tests/pipeline/test_transfer.py::test_pooled_rows_of_a_causal_teacher": "ci",
    "tests/stages/teacher/test_language_modeling.py::test_bytes_and_manifest": "ci",
    "tests/stages/teacher/test_language_modeling.py::test_bytes_and_manifest[topk]": "test",
    "tests/stages/test_conversations.py"
    "::test_only_counted_positions_are_stored_and_they_are_those_of_the_whole": "ci",
    "tests/stages/test_conversations.py"
    "::test_only_counted_positions_are_stored_and_they_are_those_of_the_whole[topk-arrow]": "test",
    "tests/stages/test_conversations.py"
    "::test_only_counted_positions_are_stored_and_they_are_those_of_the_whole"
    "[sampled-zarr]": "test",
    "tests/stages/test_conversations.py::test_the_teacher_says_again_what_is_stored": "ci",
    "tests/stages/test_conversations.py::test_the_teacher_says_again_what_is_stored[topk]": "test",
    "tests/stages/test_conversations.py::test_a_conversion_is_what_capture_makes": "ci",
    "tests/pipeline/test_conversations.py"
    "::test_students_of_other_tokens_and_of_texts_are_refused": "ci",
    "tests/stages/test_another_task.py": "ci",
    "tests/stages/test_cache_teacher.py::test_a_cache_gains_views_and_computes_nothing_else": "ci",
    "tests/stages/test_layer_cache.py::test_a_grown_cache_is_the_one_made_at_once": "ci",
    "tests/stages/test_layer_cache.py"
    "::test_a_student_that_asks_for_no_maps_trains_as_if_there_were_none": "ci",
    "tests/stages/test_layer_cache.py::test_the_estimate_is_what_the_shards_take": "ci",
    "tests/stages/test_layers_in_both_stores.py"
    "::test_a_student_that_matches_them_learns_the_same_bits": "ci",
    "tests/stages/test_train_pretrained_language_model.py"
    "::test_goes_on_bit_for_bit_after_a_kill": "ci",
    "tests/stages/test_two_stores.py": "ci",
    "tests/stages/training/test_projected_student.py"
    "::test_however_a_step_is_cut_student_and_projection_are_the_same": "ci",
    "tests/stages/training/transfer/test_training.py"
    "::test_an_interrupted_run_goes_on_alike_and_exports_the_student_alone": "ci",
    "tests/stages/training/transfer/test_training.py"
    "::test_however_a_step_is_cut_all_weights_are_the_same": "ci",
    "tests/stages/training/transfer/test_training.py"
    "::test_last_states_are_matched_as_the_layer_that_they_are": "ci",
    "tests/pipeline/test_labels.py"
    "::test_a_teacher_whose_ids_mean_the_classes_in_another_order": "ci",
    "tests/pipeline/test_labels.py::test_documents_without_a_label": "ci",
    "tests/pipeline/test_labels.py::test_integers_beside_a_teacher_of_more_classes": "ci",
    "tests/pipeline/test_labels.py::test_text_without_labels_is_enough": "ci",
    # Pages and pictures.
    "tests/pipeline/pictures/": "ci",
    "tests/pipeline/report/test_report.py": "ci",
    "tests/pipeline/report/test_looked_at.py": "slow",
    "tests/stages/student/test_transformers_suite.py": "slow",
    # Compiled graphs, built packages, fresh interpreters.
    "tests/stages/student/test_tracing.py": "ci",
    "tests/stages/student/interchange/test_folders.py": "ci",
    "tests/stages/student/interchange/test_folders.py"
    "::test_what_cannot_be_expressed_is_refused_by_name": "test",
    "tests/stages/student/scans/test_kernels.py"
    "::test_without_cuda_nothing_of_the_libraries_is_imported": "ci",
    "tests/test_house.py::test_a_wheel_of_the_sdist_is_the_same": "ci",
    "tests/test_house.py::test_an_editable_install_adds_the_package_and_no_other_name": "ci",
    "tests/test_house.py::test_public_names_are_there_and_load_nothing_before": "ci",
    "tests/test_house.py::test_wheel_contains_everything": "ci",
    # The benchmarks' own: what they compute, and further out that they run.
    "tests/benchmarks/": "ci",
    "tests/benchmarks/codec_table/": "slow",
    "tests/benchmarks/distillation/test_inside.py": "slow",
    "tests/benchmarks/distillation/test_jobs.py": "slow",
    "tests/benchmarks/distillation/test_models.py": "slow",
    "tests/benchmarks/test_timing.py::test_a_tiny_run": "slow",
}
LONG_TIMEOUT_S = 1800  # of tests that are meant to take minutes; pyproject.toml has the others'


def ring_of(node_id: str) -> Ring | None:
    """The ring that the table names for a test."""
    fitting = [entry for entry in RINGS if _holds(entry, node_id)]
    return RINGS[max(fitting, key=len)] if fitting else None


def mark(items: Iterable[pytest.Item]) -> None:
    """Mark tests with their ring, and those that take minutes with a longer limit."""
    for item in items:
        ring = ring_of(item.nodeid)
        if ring in ("ci", "slow"):
            item.add_marker(ring)
        if any(item.get_closest_marker(name) for name in ("slow", "gpu")):
            item.add_marker(pytest.mark.timeout(LONG_TIMEOUT_S))


def _holds(entry: str, node_id: str) -> bool:
    return node_id == entry or (
        node_id.startswith(entry) and (entry.endswith("/") or node_id[len(entry)] in ":[")
    )
