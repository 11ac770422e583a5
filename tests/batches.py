"""Random packed batches in the form of the batch contract."""

import torch


def random_batch(rows, length, vocab, seed=0):
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab, (rows, length), generator=g)
    targets = torch.randint(0, vocab, (rows, length), generator=g)
    keep = torch.rand(rows, length, generator=g) < 0.7
    segments = (torch.rand(rows, length, generator=g) < 0.1).int().cumsum(1, dtype=torch.int32) + 1
    starts = torch.cat([torch.ones(rows, 1), (segments[:, 1:] != segments[:, :-1]).float()], 1)
    place = torch.arange(length).expand(rows, length)
    begin = torch.where(starts.bool(), place, 0).cummax(1).values
    return {
        "tokens": tokens,
        "targets": torch.where(keep, targets, -100),
        "loss_weights": keep.float() * torch.rand(rows, length, generator=g),
        "positions": place - begin,
        "segments": segments,
    }
