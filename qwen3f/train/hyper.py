"""The optimizers' hyperparameters, checked. Imports no torch, so that a wrong value is refused at once."""

import dataclasses
import re

from qwen3f.errors import UserError

LEAST_EPS = 2.0**-126  # float32's smallest normal number; a smaller one may count as 0
MOST_ITERATIONS = 20  # of Newton–Schulz; singular values that are still small after 20 are noise


@dataclasses.dataclass(frozen=True)
class AdamW:
    """b1, b2, eps as in the paper; weight_decay is decoupled and scaled by the learning rate; clip_norm 0: no clipping.

    rates: (regular expression for whole paths, factor of the learning rate); the first match counts, 1 without a match.
    """

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    rates: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        for name in ("b1", "b2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(f"config.optimizer.{name} must be in [0, 1), got {getattr(self, name)}")
        if not LEAST_EPS <= self.eps < float("inf"):
            raise UserError(
                f"config.optimizer.eps must be at least {LEAST_EPS:.3g}, got {self.eps}: where gradients are 0, as in "
                "embedding rows of tokens that were in no batch, the update would be 0/0; write e.g. "
                "--config.optimizer.eps=1e-8"
            )
        for name in ("weight_decay", "clip_norm"):
            if not getattr(self, name) >= 0.0:
                raise UserError(f"config.optimizer.{name} must be at least 0, got {getattr(self, name)}")
        for pattern, factor in self.rates:
            if not 0.0 <= factor < float("inf"):
                raise UserError(
                    f"config.optimizer.rates: the factor of {pattern} must be finite and at least 0, got {factor}"
                )

    def rate(self, path: str) -> float:
        """The factor of this path's learning rate; 0: the parameter is frozen."""
        return next((factor for pattern, factor in self.rates if re.fullmatch(pattern, path)), 1.0)


@dataclasses.dataclass(frozen=True)
class Muon(AdamW):
    """Muon for parameters with weight decay (matrices and an untied head), AdamW with AdamW's fields for the others.

    momentum, iterations: see qwen3f.train.muon. update_rms: root mean square of a Muon update, relative to the learning
    rate; 0.2 is about AdamW's.
    """

    momentum: float = 0.95
    update_rms: float = 0.2
    iterations: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.momentum < 1.0:
            raise UserError(f"config.optimizer.momentum must be in [0, 1), got {self.momentum}")
        if not 0.0 < self.update_rms < float("inf"):
            raise UserError(f"config.optimizer.update_rms must be positive, got {self.update_rms}")
        if not 1 <= self.iterations <= MOST_ITERATIONS:
            raise UserError(f"config.optimizer.iterations must be 1 … {MOST_ITERATIONS}, got {self.iterations}")


ADAMW = AdamW()
KINDS: dict[str, type[AdamW]] = {"adamw": AdamW, "muon": Muon}


def make_hyper(kind: str, **fields: float | str) -> AdamW:
    """The hyperparameters of the optimizer `kind`; fields that only another optimizer has are ignored.

    rates: text, as parse_rates takes it.
    """
    if kind not in KINDS:
        raise UserError(f"config.optimizer.kind={kind!r} is unknown; use one of {', '.join(KINDS)}")
    own = {field.name for field in dataclasses.fields(KINDS[kind])}
    fields |= {"rates": parse_rates(fields["rates"])} if "rates" in fields else {}
    return KINDS[kind](**{name: value for name, value in fields.items() if name in own})


def parse_rates(text: str) -> tuple[tuple[str, float], ...]:
    """Parse `PATTERN=FACTOR,…` into AdamW.rates. UserError for another form or an invalid regular expression."""
    out = []
    for piece in filter(None, (part.strip() for part in text.split(","))):
        pattern, _, factor = piece.rpartition("=")
        if not pattern:
            raise UserError(f"--config.optimizer.rates: {piece!r} has no pattern; write PATTERN=FACTOR")
        try:
            re.compile(pattern)
            out.append((pattern, float(factor)))
        except (re.error, ValueError, OverflowError, RecursionError) as error:
            raise UserError(
                f"--config.optimizer.rates: {piece[:80]!r} is not PATTERN=FACTOR ({error}); write e.g. "
                r"--config.optimizer.rates='model\.embed_tokens\..*=0,.*norm.*=0.1'"
            ) from error
    return tuple(out)
