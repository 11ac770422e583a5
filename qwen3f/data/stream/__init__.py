"""Training examples from documents that are read as they are used; a small state is enough to resume exactly.

`parts` reads a source from any place, `order` mixes sources and shuffles in blocks, `tokens` tokenises on worker
processes, `windows` and `rows` pack, `dataset` joins them.
"""
