"""Generated reasoning problems with worked solutions and checkable answers; no network, no files."""

from qwen3f.data.sources.reasoning.problem import DIFFICULTIES, FAMILIES, KINDS, PROCEDURES, Problem, problem
from qwen3f.data.sources.reasoning.source import NUM_PROBLEMS, ReasoningSource, chat_messages, question_answer

__all__ = [
    "DIFFICULTIES",
    "FAMILIES",
    "KINDS",
    "NUM_PROBLEMS",
    "PROCEDURES",
    "Problem",
    "ReasoningSource",
    "chat_messages",
    "problem",
    "question_answer",
]
