"""The policy losses written a second time, as in the papers: float64, sequence by sequence. And TRL's own, on stubs."""

import math
from types import SimpleNamespace

import torch
from trl import GRPOTrainer


def tensors(rows=6, length=9, spread=0.3, seed=0):
    """Log-probabilities of the policy now, of the policy that sampled and of the reference; a mask with holes, one row
    of which is all 0; advantages and entropies."""
    g = torch.Generator().manual_seed(seed)
    logp = -torch.rand(rows, length, generator=g, dtype=torch.float64) * 3 - 0.1
    mask = (torch.rand(rows, length, generator=g) < 0.8).double()
    mask[1, length // 2 :] = 0
    mask[3] = 0  # a truncated completion that is masked
    mask[4] = torch.eye(length)[0].double()  # one token
    return {
        "logp": logp,
        "old": logp + spread * torch.randn(rows, length, generator=g, dtype=torch.float64),
        "ref": logp + 0.5 * torch.randn(rows, length, generator=g, dtype=torch.float64),
        "mask": mask,
        "advantages": torch.randn(rows, generator=g, dtype=torch.float64),
        "entropy": torch.rand(rows, length, generator=g, dtype=torch.float64) * 3,
    }


def batch_of(x):
    """The batch that the stage would give to the loss. Each row is one document."""
    return {
        "old_logprobs": x["old"],
        "ref_logprobs": x["ref"],
        "advantages": x["advantages"][:, None].expand_as(x["logp"]),
        "loss_weights": x["mask"],
    }


def by_hand(x, hyper):
    """The loss of rows of one document each, token by token."""
    totals = []
    rows, length = x["logp"].shape
    for b in range(rows):
        places = [t for t in range(length) if x["mask"][b, t]]
        a = x["advantages"][b]
        ratios = [(x["logp"][b, t] - x["old"][b, t]).exp() for t in places]
        logs = [x["logp"][b, t] - x["old"][b, t] for t in places]
        if hyper.loss in ("gspo", "luspo") and places:
            ratios = [(sum(logs) / len(places)).exp()] * len(places)
        costs = []
        for t, r in zip(places, ratios):
            if hyper.loss == "cispo":
                cost = -min(r.item(), hyper.cispo_cap) * a * x["logp"][b, t]
            elif hyper.loss == "sapo":
                tau = hyper.sapo_temperatures[0] if a > 0 else hyper.sapo_temperatures[1]
                cost = -4 / tau / (1 + (-tau * (r - 1)).exp()) * a
            elif hyper.loss == "vespo":
                k, lam = (2, 3) if a >= 0 else (3, 2)
                w = math.exp(min(20, max(math.log(1e-8), sum(logs).item())))
                cost = -math.exp(lam) * w**k * math.exp(-lam * w) * a * x["logp"][b, t]
            else:
                bounded = r if 1 - hyper.clip_low <= r <= 1 + hyper.clip_high else torch.tensor(
                    1 - hyper.clip_low if r < 1 else 1 + hyper.clip_high, dtype=torch.float64
                )  # fmt: skip
                cost = -min(r * a, bounded * a)
                if hyper.dual_clip and a < 0:
                    cost = min(cost, -hyper.dual_clip * a)
            if hyper.kl_coef:
                d = x["logp"][b, t] - x["ref"][b, t]
                kl = {"k1": d, "k2": d * d / 2, "k3": (-d).exp() + d - 1}[hyper.kl]
                whole = (sum(logs) / len(places)).exp() if hyper.loss == "vespo" else r
                cost = cost + hyper.kl_coef * kl * (whole if hyper.kl_ratio else 1)
            costs.append(cost)
        totals.append(costs)
    zero = torch.zeros((), dtype=torch.float64)
    if hyper.loss in ("grpo", "gspo", "sapo"):
        return sum((sum(c) / len(c) if c else zero) for c in totals) / rows
    if hyper.loss == "luspo":
        return sum((sum(c) if c else zero) for c in totals) / rows
    total = sum(sum(c) if c else zero for c in totals)
    if hyper.loss == "dr_grpo":
        return total / (rows * (hyper.longest or length))
    return total / sum(map(len, totals))


class Alone:
    """A stub of TRL's accelerator, for one process."""

    num_processes, is_main_process, sync_gradients = 1, True, True

    def gather(self, x):
        return x

    def reduce(self, x, reduction):
        return x

    def pad_across_processes(self, x, **_):
        return x


def trl_loss(x, hyper, logp, *, num_items=None, accumulation=1, top_entropy=1.0, longest=None):
    """(loss, metrics) of TRL 1.16's `GRPOTrainer._compute_loss` for the log-probabilities `logp`, on a stub trainer."""
    loss = {"gspo": "grpo"}.get(hyper.loss, hyper.loss)
    sequence = hyper.loss in ("gspo", "luspo", "vespo")
    args = SimpleNamespace(
        use_bias_correction_kl=hyper.kl_ratio,
        delta=hyper.dual_clip or None,
        sapo_temperature_pos=hyper.sapo_temperatures[0],
        sapo_temperature_neg=hyper.sapo_temperatures[1],
        steps_per_generation=accumulation,
        vespo_k_pos=2.0,
        vespo_lambda_pos=3.0,
        vespo_k_neg=3.0,
        vespo_lambda_neg=2.0,
    )
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logp, x["entropy"], None),
        aux_loss_enabled=False,
        top_entropy_quantile=top_entropy,
        off_policy_mask_threshold=None,
        importance_sampling_level="sequence" if sequence else "token",
        beta=hyper.kl_coef,
        args=args,
        loss_type=loss,
        epsilon_low=hyper.clip_low,
        epsilon_high=hyper.cispo_cap if loss == "cispo" else hyper.clip_high,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=accumulation,
        max_completion_length=longest or hyper.longest or logp.shape[1],
        accelerator=Alone(),
        _entropy_bonus_enabled=False,
        _metrics={"train": __import__("collections").defaultdict(list)},
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
    )
    trainer.get_high_entropy_mask = lambda *a: GRPOTrainer.get_high_entropy_mask(trainer, *a)
    ids = torch.zeros(logp.shape, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1] + 1,
        "completion_ids": ids,
        "completion_mask": x["mask"],
        "advantages": x["advantages"],
        "old_per_token_logps": x["old"],
        "ref_per_token_logps": x["ref"],
        "num_items_in_batch": x["mask"].sum() if num_items is None else num_items,
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs), trainer._metrics["train"]
