"""RLSF, reinforcement learning from synthetic feedback: PPO of our own, RLOO and GRPO by TRL. `ppo` is the arithmetic
alone. Start with `run`.
"""
