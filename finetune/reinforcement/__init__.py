"""Learning from rewards of sampled answers: GRPO and PPO."""
