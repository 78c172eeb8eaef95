"""Answers for training: `finetune.reinforcement.rollout.Rollouts` on the continuous engine."""
