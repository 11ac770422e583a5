"""tmp"""

from qwen3f.rl.policy import GRPO, policy_loss

__all__ = ["GRPO", "policy_loss"]
