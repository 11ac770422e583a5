"""Compares the training step of a mixture of experts with transformers':
python -m qwen3f.bench.moe [--preset=qwen3-30b-a3b] [--layers=4]

The whole step on random tokens, one document per row: forward, backward, clipping, AdamW. There are two precisions.
"pure": bfloat16 weights and moments. "master": float32 weights and moments, bfloat16 passes.

transformers gets its fastest settings: grouped_mm experts, each layer compiled, head and loss compiled together,
cuDNN's attention, fused AdamW, no balancing loss (ours has one). Its "master" is a bfloat16 module with float32 copies
of the weights, which AdamW updates. Autocast is not used: compiled experts would then fall back to a loop, since
grouped_mm only takes bfloat16. With few layers the head has over half of the FLOPs.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3f import presets
from qwen3f.bench.report import Report, clock, compute_dtype, cudnn_first, device_of, peak_gib, reset_peak
from qwen3f.bench.step_time import step_time
from qwen3f.config import ModelConfig
from qwen3f.interop.config import to_hf
from qwen3f.train.metrics import flops_per_token, peak_flops
from qwen3f.train.objective import NEXT_TOKEN, Batch


def random_rows(cfg: ModelConfig, rows: int, length: int, device: torch.device) -> Batch:
    ids = torch.randint(0, cfg.vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(0)).to(device)
    ones = torch.ones(rows, length, device=device)
    return {
        "tokens": ids[:, :-1].contiguous(),
        "targets": ids[:, 1:].contiguous(),
        "loss_weights": ones,
        "segments": ones.to(torch.int32),
        "positions": torch.arange(length, device=device).expand(rows, length).contiguous(),
    }


def figures(cfg: ModelConfig, batch: Batch, seconds: float, peak: float | None) -> dict[str, Any]:
    tokens, length = batch["tokens"].numel(), batch["tokens"].shape[1]
    mfu = tokens / seconds * flops_per_token(cfg, length) / peak_flops(batch["tokens"].device)
    return {"step_ms": seconds * 1e3, "tokens_s": tokens / seconds, "mfu": mfu, "peak_gib": peak}


def measure_transformers(cfg: ModelConfig, batch: Batch, pure: bool) -> dict[str, Any]:
    import transformers

    device = batch["tokens"].device
    compute, compiled = compute_dtype(device), device.type == "cuda"
    reset_peak(device)
    config = transformers.AutoConfig.for_model(**to_hf(cfg, compute))
    config._experts_implementation = "grouped_mm"
    with torch.device(device):
        module = transformers.AutoModelForCausalLM.from_config(config, dtype=compute, attn_implementation="sdpa")
    loss_of = head_loss
    if compiled:
        for layer in module.model.layers:
            layer.compile(dynamic=False)
        loss_of = torch.compile(head_loss, dynamic=False)
    update = make_update(list(module.parameters()), pure)

    def run() -> None:
        with cudnn_first(device):
            hidden = module.model(input_ids=batch["tokens"], use_cache=False).last_hidden_state
            loss = loss_of(hidden.flatten(0, 1), module.lm_head.weight, batch["targets"].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        update()

    seconds = clock(run, device, 10 if compiled else 2, warm=3)
    return figures(cfg, batch, seconds, peak_gib(device))


def make_update(parameters: list[torch.nn.Parameter], pure: bool) -> Callable[[], None]:
    """A function that updates the parameters by AdamW and frees their gradients.

    Not pure: it updates float32 copies, one parameter at a time, so that only one float32 gradient exists at a time.
    """
    options = {"lr": 1e-5, "betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True}
    if pure:
        optimizer = torch.optim.AdamW(parameters, **options)

        def update() -> None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return update
    masters = [leaf.detach().float().requires_grad_() for leaf in parameters]
    optimizers = [torch.optim.AdamW([master], **options) for master in masters]

    def update_masters() -> None:
        for leaf, master, optimizer in zip(parameters, masters, optimizers):
            master.grad, leaf.grad = leaf.grad.float(), None
            optimizer.step()
            master.grad = None
            leaf.data.copy_(master.detach())

    return update_masters


def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="ours,transformers", help="some of ours, transformers")
    parser.add_argument("--precisions", default="pure,master", help="some of pure, master")
    parser.add_argument("--preset", default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, default=4, help="cut the model to this many; 0: all")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seq_len", type=int, default=4096)
    parser.add_argument("--device", default="auto")
    asked = parser.parse_args(arguments)
    device, cfg = device_of(asked.device), presets.get(asked.preset)
    cfg = cfg.replace(num_hidden_layers=asked.layers) if asked.layers else cfg
    report = Report("mixture", device)
    batch = random_rows(cfg, asked.rows, asked.seq_len, device)
    for precision in asked.precisions.split(","):
        pure = precision == "pure"
        case = {"case": f"{asked.preset}, {cfg.num_hidden_layers} layers, {asked.rows} × {asked.seq_len}, {precision}"}
        if "ours" in asked.cases.split(","):
            master = compute_dtype(device) if pure else torch.float32
            found = step_time(cfg, NEXT_TOKEN, batch, master=master, cross_documents=True)
            report.add(**case, who="qwen3f", **figures(cfg, batch, *found))
        if "transformers" in asked.cases.split(","):
            names = {**case, "who": "transformers"}
            report.peer(names, "transformers", lambda pure=pure: measure_transformers(cfg, batch, pure))
        reset_peak(device)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
