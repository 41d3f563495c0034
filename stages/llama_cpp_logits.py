"""What llama.cpp saves of a text: `llama-perplexity --save-all-logits FILE`.

The file (llama.cpp's `tools/perplexity`, little endian, no padding) is `_logits_`, n_ctx, n_vocab
and n_chunk (int32), the tokens of n_chunk windows end to end (int32), and for each window
`n_ctx - 1 - n_ctx / 2` rows of log-probs: scale and minimum (float32) and n_vocab codes (uint16),
an odd number padded with one. A log-prob is `scale * code + minimum`; what lies more than 16 nats
below the largest has code 0, the floor, whatever it was.

Row r of a window is what follows its token `n_ctx / 2 + r`: the first half of each is read and not
scored. Windows start afresh; where the model begins texts with a token, each window's first token
is read as that one, and written as it was.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.fingerprint import file_sha256
from teacher_cache.stages.engine_answers import Answer, AnswerFile, TopLogProbs

MAGIC = b"_logits_"
HEADER = struct.Struct("<8s3i")
SPAN = 16.0  # nats below the largest that codes tell apart
LARGEST_CODE = 65535
_ROW_START = 8  # bytes of scale and minimum


@dataclass(frozen=True, kw_only=True)
class GgufModel:
    """What a GGUF says of the model that spoke.

    Attributes:
        sha256: of its bytes.
        tokens: as it spells them, by id.
        begin_id: of the token that it puts before a text; None where it puts none.
        file_type: llama.cpp's number of its quantisation (0 is F32, 1 F16, 7 Q8_0, 3 Q4_1).
    """

    sha256: str
    tokens: list[str]
    begin_id: int | None
    file_type: int | None

    @classmethod
    def of(cls, path: Path) -> GgufModel:
        """Read one.

        Raises:
            UserError: if it is not there, is no GGUF with a tokenizer, or `gguf` is missing.
        """
        if not path.is_file():
            raise UserError(f"{path} is no file: give the GGUF whose logits were saved")
        try:
            from gguf import GGUFReader
        except ModuleNotFoundError as error:
            raise UserError(
                f"a GGUF is read by the package gguf ({error}): install it with `pip install -c "
                'constraints.txt -e ".[gguf]"`'
            ) from error
        try:
            reader = GGUFReader(path)
        except (ValueError, IndexError, KeyError, OSError) as error:
            raise UserError(f"{path} is no GGUF ({error}): give the model's own file") from error

        def value(key: str) -> Any:
            found = reader.get_field(key)
            return None if found is None else found.contents()

        tokens = value("tokenizer.ggml.tokens")
        if tokens is None:
            raise UserError(f"{path} has no tokenizer: give a GGUF that llama.cpp reads text with")
        begins = value("tokenizer.ggml.add_bos_token")
        if begins is None:  # llama.cpp's own default, of SentencePiece's models alone
            begins = value("tokenizer.ggml.model") == "llama"
        return cls(
            sha256=file_sha256(path),
            tokens=list(tokens),
            begin_id=value("tokenizer.ggml.bos_token_id") if begins else None,
            file_type=value("general.file_type"),
        )


class SavedLogits(AnswerFile):
    """The windows of one saved file, or of two: the second pass scores what the first left out.

    Args:
        path: of the file.
        model: that spoke.
        num_listed: the most probable tokens to keep of a row.
        second_pass: another file of the same model and window, of the text without its first half
            window; its windows stand behind the first file's.

    Raises:
        UserError: if a file is not there, is another kind, is cut, or does not belong to the model.
    """

    scores_some: ClassVar[bool] = True

    def __init__(
        self, path: Path, model: GgufModel, *, num_listed: int, second_pass: Path | None = None
    ):
        super().__init__(path)
        self._model, self._num_listed = model, num_listed
        self._passes = [_Windows.of(path, model)]
        if second_pass is not None:
            second = _Windows.of(second_pass, model)
            if second.window != self._passes[0].window:
                raise UserError(
                    f"{second_pass} has windows of {second.window} tokens and {path} of "
                    f"{self._passes[0].window}: save both with the same -c"
                )
            self._passes.append(second)
        hashes = [file_sha256(one.path) for one in self._passes] + [model.sha256]
        self.sha256 = hashlib.sha256("\n".join(hashes).encode()).hexdigest()

    @property
    def window(self) -> int:
        """Tokens of a window."""
        return self._passes[0].window

    def __len__(self) -> int:
        """The number of windows."""
        return sum(one.number for one in self._passes)

    def answers(self, start: int, stop: int) -> list[Answer]:
        """Windows `start` to `stop` (not included)."""
        return [self._answer(*self._place(idx)) for idx in range(start, stop)]

    def name_of(self, idx: int) -> str:
        """What a message calls a window."""
        windows, number = self._place(idx)
        return f"{windows.path}, window {number + 1}"

    def _place(self, idx: int) -> tuple[_Windows, int]:
        first = self._passes[0]
        return (first, idx) if idx < first.number else (self._passes[1], idx - first.number)

    def _answer(self, windows: _Windows, number: int) -> Answer:
        tokens = windows.tokens(number)
        if tokens.min() < 0 or tokens.max() >= windows.num_ids:
            raise UserError(
                f"{windows.path}, window {number + 1} has ids beyond the {windows.num_ids:,} of a "
                "row: it was written over, so save it again"
            )
        if self._model.begin_id is not None:
            tokens[0] = self._model.begin_id
        first = windows.window - windows.num_rows
        lists: list[TopLogProbs | None] = [None] * len(tokens)
        is_scored = np.zeros(len(tokens), bool)
        for place, row in enumerate(windows.rows(number), first):
            listed = _listed(row, int(tokens[place]), self._num_listed)
            lists[place], is_scored[place] = listed, listed is not None
        return Answer(
            text=None,
            token_ids=tokens.tolist(),
            lists=lists,
            is_scored=is_scored,
            num_left_out=windows.num_rows - int(is_scored.sum()),
        )


def _listed(row: np.ndarray, real: int, num_listed: int) -> TopLogProbs | None:
    """The largest of a row and the real token; None where that lies at the floor, as unknown.

    Nothing at the floor is listed: of it is known that it is less. A row that spans less than the
    16 nats has no floor, and its least is a value.
    """
    codes = row[_ROW_START // 2 :].astype(np.int64)
    scale, least = (float(one) for one in np.frombuffer(row[: _ROW_START // 2].tobytes(), "<f4"))
    has_floor = scale * LARGEST_CODE > SPAN * (1 - 1e-5)
    if has_floor and not codes[real]:
        return None
    # Of equal codes the lower ids: keys that no two share.
    keys = codes * len(codes) - np.arange(len(codes))
    top = np.argpartition(keys, -num_listed)[-num_listed:]
    listed = {*top[codes[top] >= has_floor].tolist(), real}
    return {one: min(0.0, scale * int(codes[one]) + least) for one in listed}


@dataclass(frozen=True, kw_only=True)
class _Windows:
    """Where the windows of one file lie.

    Attributes:
        path: of the file.
        window: tokens of a window.
        num_ids: of a row.
        number: of windows.
    """

    path: Path
    window: int
    num_ids: int
    number: int

    @classmethod
    def of(cls, path: Path, model: GgufModel) -> _Windows:
        """Read a file's header, and check that all is there."""
        with open(path, "rb") as file:
            header = file.read(HEADER.size)
        if header[: len(MAGIC)] != MAGIC:
            raise UserError(
                f"{path} was not saved by llama-perplexity (it begins with {header[:8]!r}, "
                f"expected {MAGIC!r}): give what --save-all-logits wrote"
            )
        if len(header) < HEADER.size:
            raise UserError(
                f"{path} has {len(header)} bytes and holds no window: the text was shorter than "
                "two windows, so give more text or a smaller -c"
            )
        _, window, num_ids, number = HEADER.unpack(header)
        if num_ids < len(model.tokens):
            raise UserError(
                f"{path} has rows of {num_ids:,} ids and the GGUF {len(model.tokens):,} tokens: "
                "give the GGUF whose logits these are"
            )
        found = cls(path=path, window=window, num_ids=num_ids, number=number)
        size = path.stat().st_size
        if window < 4 or number < 1 or size != found.num_bytes:
            raise UserError(
                f"{path} has {size:,} bytes, expected {found.num_bytes:,} of {number:,} windows of "
                f"{window:,} tokens: it was cut or written over, so save it again"
            )
        return found

    @property
    def num_rows(self) -> int:
        """Of a window."""
        return self.window - 1 - self.window // 2

    @property
    def row_units(self) -> int:
        """Of two bytes in a row."""
        return _ROW_START // 2 + self.num_ids + self.num_ids % 2

    @property
    def num_bytes(self) -> int:
        """Of the whole file."""
        rows = 2 * self.row_units * self.num_rows
        return HEADER.size + self.number * (4 * self.window + rows)

    def tokens(self, number: int) -> np.ndarray:
        """A window's, as they were in the text."""
        start = HEADER.size + 4 * self.window * number
        return np.fromfile(self.path, "<i4", self.window, offset=start)

    def rows(self, number: int) -> np.ndarray:
        """A window's rows, uint16 [rows, 4 + ids]: scale and minimum in the first four."""
        start = HEADER.size + 4 * self.window * self.number
        count = self.num_rows * self.row_units
        flat = np.fromfile(self.path, "<u2", count, offset=start + 2 * count * number)
        return flat.reshape(self.num_rows, -1)[:, : _ROW_START // 2 + self.num_ids]
