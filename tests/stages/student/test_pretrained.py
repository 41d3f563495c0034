from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerBase,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.models.pretrained import num_positions
from teacher_cache.stages.student.pretrained import (
    classifier_config,
    identity,
    own_tokenizer,
    pretrained_classifier,
    refuse_too_long,
)

NAMES = {0: "neg", 1: "pos"}
OTHERS = {0: "rotten", 1: "fresh"}
THREE = {0: "a", 1: "b", 2: "c"}
SMALL: dict[str, Any] = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 8,
}


@pytest.fixture
def own(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy to change."""
    return lambda folder: shutil.copytree(folder, tmp_path / "own")


def classifier(
    folder: Path, tokenizer: PreTrainedTokenizerBase, names: dict[int, str] = NAMES, seed: int = 0
) -> Any:
    return pretrained_classifier(str(folder), tokenizer=tokenizer, id2label=names, seed=seed)


def states(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def differing(one: torch.nn.Module, other: torch.nn.Module) -> set[str]:
    ours, theirs = states(one), states(other)
    assert ours.keys() == theirs.keys()
    return {name for name in ours if not torch.equal(ours[name], theirs[name])}


HEAD = {"classifier.weight", "classifier.bias"}


def test_a_head_of_the_same_classes_is_kept(
    tiny_bert: Path, bert_tokenizer: PreTrainedTokenizerBase
) -> None:
    trained = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    model = classifier(tiny_bert, bert_tokenizer)
    assert not differing(model, trained)
    assert model.dtype == torch.float32
    assert model.config.problem_type == "single_label_classification"


@pytest.mark.parametrize("names", [OTHERS, {0: "LABEL_0", 1: "LABEL_1"}])
def test_a_head_of_other_classes_gives_way(
    names: dict[int, str], tiny_bert: Path, bert_tokenizer: PreTrainedTokenizerBase, caplog: Any
) -> None:
    caplog.set_level(logging.INFO)
    trained = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    model = classifier(tiny_bert, bert_tokenizer, names)
    # A fresh bias is 0, and so was the tiny model's.
    assert differing(model, trained) == {"classifier.weight"}
    assert (model.config.id2label, model.config.label2id) == (
        names,
        {name: class_id for class_id, name in names.items()},
    )
    assert "fresh, from the seed: classifier.bias, classifier.weight" in caplog.text


def test_placeholder_names_say_nothing_of_a_head(
    tiny_gpt2: Path, gpt2_tokenizer: PreTrainedTokenizerBase
) -> None:
    trained = AutoModelForSequenceClassification.from_pretrained(tiny_gpt2)
    model = classifier(tiny_gpt2, gpt2_tokenizer, {0: "LABEL_0", 1: "LABEL_1"})
    assert differing(model, trained) == {"score.weight"}


def test_a_head_of_more_classes(tiny_bert: Path, bert_tokenizer: PreTrainedTokenizerBase) -> None:
    trained: Any = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    model = classifier(tiny_bert, bert_tokenizer, THREE)
    assert model.classifier.weight.shape == (3, 32)
    assert not differing(model.bert, trained.bert)
    assert model.num_labels == 3


def test_what_is_fresh_depends_on_the_seed_alone(
    minilm_dir: Path, bert_tokenizer: PreTrainedTokenizerBase
) -> None:
    torch.manual_seed(5)
    one = classifier(minilm_dir, bert_tokenizer, seed=1)
    before = torch.get_rng_state()
    torch.rand(3)
    again = classifier(minilm_dir, bert_tokenizer, seed=1)
    other = classifier(minilm_dir, bert_tokenizer, seed=2)
    assert not differing(one, again)
    assert differing(one, other) == {"classifier.weight"}
    torch.manual_seed(5)
    assert torch.equal(before, torch.get_rng_state())
    assert identity(one) == identity(again)
    found = identity(one).keys() - {
        name for name, value in identity(one).items() if value == identity(other)[name]
    }
    assert found == {"weights_sha256"}


def test_a_configuration_alone_is_all_fresh_and_said(
    tmp_path: Path, bert_tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    BertConfig(vocab_size=len(bert_tokenizer), dtype="bfloat16", **SMALL).save_pretrained(tmp_path)
    model = classifier(tmp_path, bert_tokenizer, THREE, seed=3)
    assert "has no weights: all start fresh, from the seed" in caplog.text
    assert not differing(model, classifier(tmp_path, bert_tokenizer, THREE, seed=3))
    assert len(differing(model, classifier(tmp_path, bert_tokenizer, THREE, seed=4))) > 5
    assert {one.dtype for one in model.parameters()} == {torch.float32}
    assert model.num_labels == 3


def test_weights_of_something_else_are_refused(
    own: Callable[[Path], Path], tiny_bert: Path, tiny_gpt2: Path, bert_tokenizer: Any
) -> None:
    folder = own(tiny_bert)
    shutil.copy(tiny_gpt2 / "model.safetensors", folder)
    with pytest.raises(UserError, match=r"hold none of a BertForSequenceClassification: give"):
        classifier(folder, bert_tokenizer)


def test_truncated_weights(
    own: Callable[[Path], Path], tiny_bert: Path, bert_tokenizer: Any
) -> None:
    folder = own(tiny_bert)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"could not be loaded \(.*with --arch hf:DIR, or make"):
        classifier(folder, bert_tokenizer)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./no/such", r"--arch hf:\./no/such is no folder: give a folder with a model, or a hub"),
        (
            "somebody/model",
            r"'somebody/model' could not be loaded .*--arch hf:DIR, or make the hub",
        ),
    ],
)
def test_what_is_not_there(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        classifier_config(name)


def test_what_is_no_classifier(tmp_path: Path, bert_tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(UserError, match="is a clip, of which transformers has no sequence class"):
        classifier(tmp_path, bert_tokenizer)


def test_too_few_and_more_embeddings(tmp_path: Path, bert_tokenizer: Any) -> None:
    BertConfig(vocab_size=30521, **SMALL).save_pretrained(tmp_path / "fewer")
    with pytest.raises(UserError, match=r"has embeddings for 30,521 tokens.*ids up to 30,521: ch"):
        classifier(tmp_path / "fewer", bert_tokenizer)
    BertConfig(vocab_size=30528, **SMALL).save_pretrained(tmp_path / "padded")
    assert (
        len(classifier(tmp_path / "padded", bert_tokenizer).get_input_embeddings().weight) == 30528
    )


def test_padding_that_is_text_is_refused(tmp_path: Path, gpt2_tokenizer: Any) -> None:
    # 0 is BERT's padding, and GPT-2's "!".
    BertConfig(vocab_size=50257, pad_token_id=0, **SMALL).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"pads with the id 0, which.*is the token '!': set pad_"):
        classifier(tmp_path, gpt2_tokenizer)


def test_a_decoder_without_padding_pools_at_the_last_token(
    tiny_gpt2: Path, gpt2_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = classifier(tiny_gpt2, gpt2_tokenizer, OTHERS).eval()
    pad_id = model.config.pad_token_id
    assert pad_id == gpt2_tokenizer.eos_token_id
    texts = ["a joy", "a dreadful film from its first scene to its last"]
    ids = [gpt2_tokenizer(text)["input_ids"] for text in texts]
    width = max(len(one) for one in ids)
    padded = torch.tensor([one + [pad_id] * (width - len(one)) for one in ids])
    mask = torch.tensor([[1] * len(one) + [0] * (width - len(one)) for one in ids])
    with torch.no_grad():
        batch = model(input_ids=padded, attention_mask=mask).logits
        alone = torch.cat([model(input_ids=torch.tensor([one])).logits for one in ids])
    torch.testing.assert_close(batch, alone, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["pad_token_id"] == pad_id


def test_its_own_tokenizer_where_it_has_one(
    tiny_bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert own_tokenizer(str(tiny_bert)) == str(tiny_bert)
    BertModel(BertConfig(vocab_size=9, **SMALL)).save_pretrained(tmp_path)
    assert own_tokenizer(str(tmp_path)) is None
    assert "no tokenizer of its own here: it gets the cache's" in caplog.text
    # This is why files are looked for: what AutoTokenizer makes of nothing is no tokenizer.
    assert len(AutoTokenizer.from_pretrained(tmp_path)) < 9


def test_the_longest_sample() -> None:
    model = BertForSequenceClassification(
        BertConfig(vocab_size=9, max_position_embeddings=16, **SMALL)
    )
    refuse_too_long("it", model, longest_sample=16, max_length=16)
    with pytest.raises(UserError, match=r"hf:it reads 16 tokens.*has 17: .*--max-length 16$"):
        refuse_too_long("it", model, longest_sample=17, max_length=17)
    with pytest.raises(UserError, match=r"new texts of up to 32: give --max-length 16"):
        refuse_too_long("it", model, longest_sample=9, max_length=32)


def test_positions_are_those_that_a_forward_pass_has() -> None:
    roberta = RobertaForSequenceClassification(
        RobertaConfig(vocab_size=9, max_position_embeddings=18, **SMALL)  # 2 of them unused
    )
    gpt2 = GPT2ForSequenceClassification(
        GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1, n_positions=16, pad_token_id=0)
    )
    for model in (roberta, gpt2):
        assert num_positions(model) == 16
        model(input_ids=torch.full((1, 16), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, 17), 5))
