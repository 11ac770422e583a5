"""A stream of examples. Its state is a few numbers, from which it resumes exactly.

Every process reads the whole stream and builds the examples it needs, so the order depends neither on the number of
ranks nor on that of workers. Each rank therefore tokenises everything: at some 20 MB/s a core, enough for several
million tokens a second over all ranks. Beyond that, use a token cache.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from qwen3f.data.packing.best_fit import LongDocuments
from qwen3f.data.sources.documents import stable_hash
from qwen3f.data.stream.order import Mark, ordered_documents
from qwen3f.data.stream.parts import StreamPart
from qwen3f.data.stream.rows import best_fit_rows
from qwen3f.data.stream.tokens import tokenised
from qwen3f.data.stream.windows import MakeExample, windows
from qwen3f.data.tokenizers.tokenizer import Tokenizer
from qwen3f.errors import UserError

_FORMAT = 1  # raise it when the same settings and files would give other examples

State = dict[str, Any]


@dataclass(frozen=True)
class StreamDataset:
    """What is read and how it is packed.

    Attributes:
        parts: the sources.
        weights: positive, one for each part: the ratio of their characters.
        max_epochs: how often each part is read at most, None for no limit.
        tokenizer: text to ids.
        seq_len: length T of the examples.
        packing: "concat" (see `windows`) or "best_fit" (see `rows`).
        long_documents: of best_fit; see `best_fit`.
        reset_positions, cross_documents: as for `PackedDataset`; the second with concat only.
        buffer: how many documents are shuffled together; 0: no shuffle.
        counts: how many documents or rows this process left out, by reason.
    """

    parts: tuple[StreamPart, ...]
    weights: tuple[float, ...]
    max_epochs: tuple[int | None, ...]
    tokenizer: Tokenizer
    seq_len: int
    packing: Literal["concat", "best_fit"] = "concat"
    long_documents: LongDocuments = "cut"
    reset_positions: bool = True
    cross_documents: bool = False
    buffer: int = 0
    counts: Counter[str] = field(default_factory=Counter, compare=False)

    def fingerprint(self, seed: int) -> str:
        """A digest of files and settings. A state is valid only for the fingerprint it was made with."""
        parts = [[part.name, part.fingerprint()] for part in self.parts]
        packing = [self.packing, self.seq_len, self.long_documents] if self.packing == "best_fit" else [self.packing]
        order = [self.weights, self.max_epochs, self.buffer, seed, self.tokenizer.fingerprint]
        return f"{stable_hash(json.dumps([_FORMAT, parts, order, packing]).encode()):016x}"

    def examples(self, seed: int, workers: int = 0, state: State | None = None) -> Iterator[tuple[MakeExample, State]]:
        """For each example in order: (a function that makes it, the state after it, from which the next one comes).

        A state's "examples" is the number of examples before it.

        Args:
            seed: the seed of the shuffle.
            workers: processes that tokenise; any number gives the same examples.
            state: one that came with an earlier example, perhaps through JSON; None: begin at the first example.

        Raises:
            UserError: the state is of other files or settings; or as `ordered_documents` and the packing.
        """
        own = self.fingerprint(seed)
        if state and state["fingerprint"] != own:
            raise UserError(
                "The checkpoint's place in the data is of other files or settings (data.*, seed, tokenizer) than this "
                "run's: set them back, or begin another --workdir with --config.init_from."
            )
        documents = ordered_documents(
            self.parts,
            self.weights,
            seed=seed,
            buffer=self.buffer,
            max_epochs=self.max_epochs,
            counts=self.counts,
            start=Mark(state["block"], state["taken"]) if state else None,
        )
        encoded = tokenised(documents, self.tokenizer, workers)
        options = {
            "reset_positions": self.reset_positions,
            "pad_id": self.tokenizer.pad_id,
            "skip": state["skip"] if state else 0,
        }
        if self.packing == "best_fit":
            policy = {"long_documents": self.long_documents, "counts": self.counts}
            packed = best_fit_rows(encoded, self.seq_len, **policy, **options)
        else:
            packed = windows(encoded, self.seq_len, cross_documents=self.cross_documents, **options)
        for number, (make, (mark, skip)) in enumerate(packed, start=state["examples"] + 1 if state else 1):
            place = {"block": mark.block, "taken": mark.taken, "skip": skip}
            yield make, {"fingerprint": own, "examples": number, **place}
