"""Compares DPO with cached reference log-probs, SFT on the same rows, and TRL's DPO: python -m qwen3f.bench.dpo

Rows hold random pairs, as in stages/dpo.py: neighbouring documents with a shared prompt, of which only the answers
count. SFT counts the same tokens. Both run the step of launch.py: float32 master weights, bfloat16 passes, compiled
blocks, donated update. "reference" is the pass that computes the cached log-probs, once for all epochs.

The peer is TRL's DPOTrainer on the same pairs in one micro-batch. All have the same length, so it needs no padding. It
has precomputed reference log-probs (no second model), float32 weights under bfloat16 autocast, and no recomputation.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from qwen3f import model, presets
from qwen3f import params as P
from qwen3f.bench.report import Report, clock, compute_dtype, device_of, peak_gib, reset_peak, synchronize
from qwen3f.bench.step_time import step_time
from qwen3f.bench.transformers_model import copied
from qwen3f.bench.vocabulary import transformers_tokenizer, write_tokenizer
from qwen3f.config import ModelConfig
from qwen3f.stages.dpo import DPO, make_objective
from qwen3f.train.choices import find_compile_mode
from qwen3f.train.metrics import flops_per_token, peak_flops
from qwen3f.train.objective import NEXT_TOKEN, Batch, Objective
from qwen3f.train.outputs import make_outputs


def pair_rows(rows: int, length: int, document: int, prompt: int, vocabulary: int) -> Batch:
    """Rows full of pairs of random documents, on the CPU. A document has `document` tokens; the first `prompt` tokens
    are the same in both documents of a pair."""
    chance = torch.Generator().manual_seed(0)
    pairs = length // (2 * document)
    ids = torch.randint(0, vocabulary, (rows, pairs, 2, document + 1), generator=chance)
    ids[:, :, 1, :prompt] = ids[:, :, 0, :prompt]
    used = pairs * 2 * document
    batch = {
        "tokens": torch.zeros(rows, length, dtype=torch.int64),
        "targets": torch.full((rows, length), -100),
        "loss_weights": torch.zeros(rows, length),
        "positions": torch.zeros(rows, length, dtype=torch.int64),
        "segments": torch.zeros(rows, length, dtype=torch.int32),
    }
    place = torch.arange(used)
    batch["tokens"][:, :used] = ids[..., :-1].flatten(1)
    batch["targets"][:, :used] = ids[..., 1:].flatten(1)
    batch["positions"][:, :used] = place % document
    batch["segments"][:, :used] = 1 + place // document
    batch["loss_weights"][:, :used] = (place % document >= prompt - 1).float()
    return batch


def pairs_of(batch: Batch, document: int, prompt: int) -> list[dict[str, list[int]]]:
    """The same pairs in TRL's form."""
    out = []
    for tokens, targets, segments in zip(batch["tokens"], batch["targets"], batch["segments"]):
        count = int(segments.max())
        inputs, next_ids = (x[: count * document].view(count, -1) for x in (tokens, targets))
        ids = torch.cat((inputs, next_ids[:, -1:]), 1)
        for chosen, rejected in ids.view(-1, 2, document + 1).tolist():
            out.append(
                {"prompt_ids": chosen[:prompt], "chosen_ids": chosen[prompt:], "rejected_ids": rejected[prompt:]}
            )
    return out


def measure_ours(cfg: ModelConfig, batch: Batch, objective: Objective) -> dict[str, Any]:
    return _figures(cfg, batch, *step_time(cfg, objective, batch))


def measure_reference(cfg: ModelConfig, batch: Batch, device: torch.device) -> dict[str, Any]:
    execution = model.Execution(find_compile_mode("auto", device))
    outputs = make_outputs(cfg, execution, compute_dtype=compute_dtype(device))
    reset_peak(device)
    params = P.init_params(cfg, 0, device=device, dtype=compute_dtype(device))
    seconds = clock(lambda: outputs(params, batch), device, 10 if device.type == "cuda" else 2, warm=2)
    return _figures(cfg, batch, seconds, peak_gib(device), 1 / 3)


def _figures(cfg: ModelConfig, batch: Batch, seconds: float, peak: float | None, share: float = 1.0) -> dict[str, Any]:
    """Figures of a row. share: of a training step's FLOPs. MFU counts attention only within documents."""
    tokens = int((batch["segments"] > 0).sum())
    document = int(batch["positions"].max()) + 1
    work = share * flops_per_token(cfg, document) * tokens
    return {
        "step_ms": seconds * 1e3,
        "tokens_s": tokens / seconds,
        "mfu": work / seconds / peak_flops(batch["tokens"].device),
        "peak_gib": peak,
    }


def measure_trl(cfg: ModelConfig, batch: Batch, asked: argparse.Namespace, place: Path) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    device = batch["tokens"].device
    on_gpu = device.type == "cuda"
    pairs = pairs_of({key: x.cpu() for key, x in batch.items()}, asked.document, asked.prompt)
    reset_peak(device)
    module = copied(cfg, P.init_params(cfg, 0, device=device))
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            synchronize(device)
            ends.append(time.perf_counter())

    class Given(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset  # it has token ids already

    args = DPOConfig(
        output_dir=str(place / "trl"), per_device_train_batch_size=len(pairs), gradient_accumulation_steps=1,
        max_steps=asked.trl_steps + 2, max_length=None, bf16=on_gpu, use_cpu=not on_gpu, gradient_checkpointing=False,
        precompute_ref_log_probs=True, report_to="none", save_strategy="no", logging_steps=100, learning_rate=1e-6,
        optim="adamw_torch_fused",
    )  # fmt: skip
    trainer = Given(
        model=module,
        args=args,
        train_dataset=Dataset.from_list(pairs * (asked.trl_steps + 2)),
        processing_class=transformers_tokenizer(place / "tokenizer"),
        callbacks=[Clock()],
    )
    trainer.train()
    return _figures(cfg, batch, (ends[-1] - ends[1]) / (len(ends) - 2), peak_gib(device))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="sft,dpo,reference,trl", help="some of sft, dpo, reference, trl")
    parser.add_argument("--preset", default="qwen3-0.6b")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seq_len", type=int, default=4096)
    parser.add_argument("--document", type=int, default=512, help="tokens of an answer with its prompt")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt, part of --document")
    parser.add_argument("--trl_steps", type=int, default=5, help="timed steps of TRL")
    parser.add_argument("--device", default="auto")
    asked = parser.parse_args(arguments)
    device, cfg = device_of(asked.device), presets.get(asked.preset)
    report = Report("DPO", device)
    batch = pair_rows(asked.rows, asked.seq_len, asked.document, asked.prompt, min(cfg.vocab_size, 100_000))
    batch = {key: x.to(device) for key, x in batch.items()}
    with_reference = {**batch, "ref_logprobs": torch.full_like(batch["loss_weights"], -10.0)}
    case = f"{asked.preset}, {asked.rows} × {asked.seq_len}, documents of {asked.document}"
    rates = {}
    for name in asked.cases.split(","):
        who = {"sft": "qwen3f SFT", "dpo": "qwen3f DPO", "reference": "qwen3f reference pass", "trl": "TRL DPO"}[name]
        if name == "sft":
            found = report.add(case=case, who=who, **measure_ours(cfg, batch, NEXT_TOKEN))
        elif name == "dpo":
            found = report.add(case=case, who=who, **measure_ours(cfg, with_reference, make_objective(DPO())))
        elif name == "reference":
            found = report.add(case=case, who=who, **measure_reference(cfg, batch, device))
        else:
            with tempfile.TemporaryDirectory() as directory:
                place = Path(directory)
                write_tokenizer(place / "tokenizer", cfg.vocab_size)
                found = report.peer(
                    {"case": case, "who": who}, "trl", lambda place=place: measure_trl(cfg, batch, asked, place)
                )
        rates[name] = found
        reset_peak(device)
    code = report.finish()
    print("\n" + "\n".join(_compared(rates)), flush=True)
    return code


def _compared(found: dict[str, dict[str, Any]]) -> list[str]:
    """Ratios between the rows."""
    out = []
    if "tokens_s" in found.get("sft", {}) and "tokens_s" in found.get("dpo", {}):
        out.append(f"DPO over SFT, tokens/s: {found['dpo']['tokens_s'] / found['sft']['tokens_s']:.3f}")
    ours, theirs = found.get("dpo", {}), found.get("trl", {})
    for key, what in (("tokens_s", "tokens/s"), ("peak_gib", "peak memory")):
        if key in ours and key in theirs:
            out.append(f"qwen3f over TRL, {what}: {ours[key] / theirs[key]:.3f}")
    return out


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
