from dataclasses import dataclass


@dataclass(frozen=True)
class CodeTask:
    name: str = "code"
