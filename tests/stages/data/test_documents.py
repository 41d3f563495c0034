from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from teacher_cache.stages.data.corpus import SAMPLE_ID_BYTES, Document

_TEXTS = st.text(st.characters(codec="utf-8"), max_size=8)
_DOCUMENTS = st.builds(
    Document, text=_TEXTS, source=_TEXTS, split=_TEXTS, position=st.integers(0, 1000)
)


def test_sample_id_is_the_start_of_a_length_prefixed_sha256():
    document = Document(text="héllo", source="s", split="train", position=12, label=1)
    encoded = b"".join(
        len(part).to_bytes(8, "little") + part for part in (b"s", b"train", b"12", "héllo".encode())
    )
    assert document.sample_id == hashlib.sha256(encoded).digest()[:SAMPLE_ID_BYTES]
    assert document.sample_id.hex() == "a9167e24e0b7dd78ebe01083338341be"


@given(_DOCUMENTS, _DOCUMENTS)
def test_different_documents_have_different_ids(first, second):
    assert (first == second) == (first.sample_id == second.sample_id)


def test_the_label_is_no_part_of_the_id():
    first, second = (Document("text", "source", "train", 0, label) for label in (None, 1))
    assert first.sample_id == second.sample_id


def test_parts_do_not_run_into_each_other():
    first = Document(text="b", source="a", split="train1", position=2)
    second = Document(text="b", source="a", split="train", position=12)
    assert first.sample_id != second.sample_id
