"""Training examples from documents that are read as they are used, with a small state to go on from exactly.

`parts` reads a source from any place, `order` mixes sources and shuffles in blocks, `tokens` tokenises on worker
processes, `windows` and `rows` pack, `dataset` joins them.
"""
