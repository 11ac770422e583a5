"""What the user asked last, found in the text of a chat."""

_OPENING, _END = "<|im_start|>user\n", "<|im_end|>"


def last_query(prompt: str) -> str:
    """What the last user's turn says; the whole prompt if there is none. In one pass, however many turns are begun."""
    turns = [turn.partition(_OPENING)[2] for turn in prompt.split(_END)[:-1] if _OPENING in turn]
    return turns[-1] if turns else prompt
