"""Stand-ins for data sets that only the hub has: real reviews in IMDb's layouts, small WikiText."""

from __future__ import annotations

from pathlib import Path

import datasets

from teacher_cache.stages.data.corpus import CorpusConfig, Document, load_corpus

CLASS_NAMES = ("neg", "pos")
# Title and paragraphs of each article, by split.
WIKITEXT = {
    "train": {
        f"{name} ( novel )": [
            f"{name} is a novel about {what} , which was written in England .",
            f"It has many chapters . {name} goes on for {length} pages .",
        ]
        for name, what, length in (
            ("Emma", "a matchmaker", 400),
            ("Persuasion", "second chances", 250),
            ("Pride and Prejudice", "five sisters", 350),
            ("Mansfield Park", "a poor relation", 450),
            ("Northanger Abbey", "an imagination", 240),
            ("Sense and Sensibility", "two sisters", 330),
        )
    },
    "validation": {"Lady Susan": ["Lady Susan is a short novel in letters ."]},
    "test": {
        "Sanditon": ["Sanditon is a novel that was not finished .", "It breaks off ."],
        "The Watsons": ["The Watsons was not finished either ."],
    },
}


def write_acl_imdb(
    folder: Path, *, num_train: int = 60, num_test: int = 40, num_unsupervised: int = 30
) -> Path:
    """Write reviews as `folder/{train,test}/{neg,pos}/*.txt` and `folder/train/unsup/*.txt`.

    The files that the real archive has beside them are there too. Returns `folder`.
    """
    for split, num_documents in (("train", num_train), ("test", num_test)):
        for document in _reviews(split, num_documents):
            _write_text(folder / split / CLASS_NAMES[document.label or 0], document)
        (folder / split / "urls_neg.txt").write_text("(one address a line)\n")
        (folder / split / "labeledBow.feat").write_text("9 0:9 1:1\n")
    for document in _reviews("unlabeled", num_unsupervised):
        _write_text(folder / "train" / "unsup", document)
    (folder / "imdb.vocab").write_text("the\nand\n")
    (folder / "README").write_text("Large Movie Review Dataset\n")
    return folder


def write_hub_parquet(
    folder: Path, *, num_train: int = 60, num_test: int = 40, num_unsupervised: int = 30
) -> Path:
    """Write reviews as the hub's `folder/plain_text/<split>-00000-of-00001.parquet`.

    As there, the labelled splits are sorted by label and the unlabelled one has -1 for a label.
    Returns `folder`.
    """
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(CLASS_NAMES))}
    )
    (folder / "plain_text").mkdir(parents=True)
    for split, source_split, num_documents in (
        ("train", "train", num_train),
        ("test", "test", num_test),
        ("unsupervised", "unlabeled", num_unsupervised),
    ):
        documents = _reviews(source_split, num_documents)
        labels = [-1 if document.label is None else document.label for document in documents]
        rows = sorted(zip(labels, [document.text for document in documents], strict=True))
        columns = {"text": [text for _, text in rows], "label": [label for label, _ in rows]}
        table = datasets.Dataset.from_dict(columns, features=features)
        table.to_parquet(folder / "plain_text" / f"{split}-00000-of-00001.parquet")
    return folder


def _reviews(split: str, num_documents: int) -> list[Document]:
    labeled = split != "unlabeled"
    config = CorpusConfig(source="reviews", split=split, labeled=labeled, max_samples=num_documents)
    return load_corpus(config).documents(0, num_documents)


def _write_text(folder: Path, document: Document) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{document.position}_{7 if document.label else 2}.txt").write_text(document.text)


def write_wikitext(folder: Path) -> Path:
    """Write small articles as the hub's `folder/<split>-00000-of-00001.parquet`: a row a line.

    Returns `folder`.
    """
    folder.mkdir(parents=True)
    for split, articles in WIKITEXT.items():
        lines: list[str] = []
        for title, (first, *more) in articles.items():
            lines += ["", f" = {title} = \n", "", f" {first} \n"]
            lines += ["", " = = Text = = \n", "", *(f" {one} \n" for one in more)]
        table = datasets.Dataset.from_dict({"text": lines})
        table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


# Columns, splits and class features of the GLUE data sets on the hub (nyu-mll/glue); their test
# splits have no labels.
GLUE = {
    "mnli": (
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        ("validation_matched", "validation_mismatched", "test_matched", "test_mismatched"),
    ),
    "qnli": (
        ("question", "sentence"),
        ("entailment", "not_entailment"),
        ("validation", "test"),
    ),
}


def write_glue(folder: Path, name: str, *, num_train: int = 48, num_held_out: int = 24) -> Path:
    """Write pairs of real review sentences as the hub's `folder/<split>-00000-of-00001.parquet`.

    A pair's label says how alike the reviews' own labels are, not what GLUE's would. Returns
    `folder`.
    """
    columns, classes, others = GLUE[name]
    features = datasets.Features(
        {
            **{column: datasets.Value("string") for column in columns},
            "label": datasets.ClassLabel(names=list(classes)),
            "idx": datasets.Value("int32"),
        }
    )
    folder.mkdir(parents=True)
    for split in ("train", *others):
        num = num_train if split == "train" else num_held_out
        read = _reviews("train" if split == "train" else "test", 2 * num)
        first, second = read[:num], read[num:]
        labels = [
            -1
            if split.startswith("test")
            else (2 * (one.label or 0) + (other.label or 0)) % len(classes)
            for one, other in zip(first, second, strict=True)
        ]
        table = datasets.Dataset.from_dict(
            {
                columns[0]: [one.text for one in first],
                columns[1]: [one.text for one in second],
                "label": labels,
                "idx": list(range(num)),
            },
            features=features,
        )
        table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder
