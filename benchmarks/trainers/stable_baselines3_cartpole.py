"""stable-baselines3: PPO, the zip files of its ``CheckpointCallback``, and its ``evaluate_policy``."""

from __future__ import annotations

from typing import Any

import tiny
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import CheckpointCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from torch import nn

ENVIRONMENT = "CartPole-v1"
EPISODES = 20
COPIES = 10  # of the environment, side by side


def learner() -> PPO:
    """PPO with its usual network."""
    return PPO("MlpPolicy", make_vec_env(ENVIRONMENT, n_envs=4, seed=0), n_steps=64, seed=0, device="cpu")


def train() -> None:
    """A checkpoint every 1,000 steps."""
    learner().learn(16_000, callback=CheckpointCallback(save_freq=250, save_path="runs"))


def build() -> nn.Module:
    """The policy."""
    policy: nn.Module = learner().policy
    return policy


def rewards(policy: Any, seed: int) -> list[float]:
    """What a policy, or a model with one, gets in each episode."""
    environments = make_vec_env(ENVIRONMENT, n_envs=COPIES, seed=seed)
    per_episode, _ = evaluate_policy(policy, environments, n_eval_episodes=EPISODES, return_episode_rewards=True)
    return [float(reward) for reward in per_episode]


def reward(policy: nn.Module, draw: Any) -> list[float]:
    """The same of the merged policy."""
    return rewards(policy, draw.seed % 2**31)


def evaluate(path: str) -> list[float]:
    """The mean reward of what ``PPO.load`` reads, on other episodes each time."""
    model = PPO.load(path, device="cpu")
    means = []
    for seed in range(tiny.EVALUATIONS):
        per_episode = rewards(model, 1000 * seed)
        means.append(sum(per_episode) / len(per_episode))
    return means


if __name__ == "__main__":
    tiny.main(train, evaluate)
