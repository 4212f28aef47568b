"""RLSF, reinforcement learning from synthetic feedback: PPO in a loop of our own, RLOO and GRPO by TRL.

May use `common` and all of `almost_eval`. Start with `run`; `job` holds the settings and the registry of algorithms,
`ppo` the arithmetic.
"""
