"""A teacher of one's own: counts of bigrams, which no library knows, become a cache.

    python examples/own_teacher.py TOKENIZER TEXT OUT

Anything that gives log-probs of next tokens can teach: write what it says of each document, and
`cache_log_probs` checks it and makes a cache, of which
`pipe train-student --cache OUT --temperature 1` makes a student.
"""

import json
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from teacher_cache import Engine, LogProbFile, cache_log_probs

TOP_K = 16  # log-probs that are kept of each position


def main(tokenizer_folder: str, text_file: str, out: str) -> None:
    """Count, answer, cache."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    texts = [one.strip() for one in Path(text_file).read_text().split("\n\n") if one.strip()]
    documents = [[*tokenizer(one)["input_ids"], tokenizer.eos_token_id] for one in texts]

    counts = np.full((len(tokenizer),), 0.01)  # of each token, so that none is impossible
    pairs: dict[int, dict[int, int]] = {}
    for ids in documents:
        for here, following in pairwise(ids):
            counts[following] += 1
            pairs.setdefault(here, {}).setdefault(following, 0)
            pairs[here][following] += 1
    shares = counts / counts.sum()

    def log_probs(here: int) -> np.ndarray:
        """Half of what followed this token, half of what comes anywhere."""
        after = np.zeros(len(tokenizer))
        for following, num in pairs.get(here, {}).items():
            after[following] = num
        return np.log(0.5 * after / max(1.0, after.sum()) + (1 - 0.5 * bool(after.any())) * shares)

    answers = Path(f"{out}.answers.jsonl")
    answers.parent.mkdir(parents=True, exist_ok=True)
    with answers.open("w") as file:
        for text, ids in zip(texts, documents, strict=True):
            said: list[dict[int, float] | None] = [None]  # of the first token nothing was said
            for here, real in pairwise(ids):
                found = log_probs(here)
                kept = {*np.argsort(-found)[:TOP_K].tolist(), real}
                said.append({i: float(found[i]) for i in kept})
            line = {"text": text, "prompt_token_ids": ids, "prompt_logprobs": said}
            file.write(json.dumps(line) + "\n")

    manifest = cache_log_probs(
        Path(out),
        LogProbFile(answers),
        tokenizer=tokenizer,
        engine=Engine(name="bigrams", model=Path(text_file).name, dtype="float64"),
        top_k=TOP_K,
        max_length=max(map(len, documents)),
    )
    print(f"{out}: {manifest.splits['labeled'].num_tokens:,} tokens of {len(texts)} documents")


if __name__ == "__main__":
    main(*sys.argv[1:])
