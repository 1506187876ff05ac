"""tianshou: DQN of its README, checkpoints by its ``save_checkpoint_fn`` as in its examples, and its ``Collector``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import tiny
import torch
from tianshou.algorithm import DQN
from tianshou.algorithm.modelfree.dqn import DiscreteQLearningPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory
from tianshou.data import Collector, CollectStats, VectorReplayBuffer
from tianshou.env import DummyVectorEnv
from tianshou.trainer import OffPolicyTrainerParams
from tianshou.utils import TensorboardLogger
from tianshou.utils.net.common import Net
from torch import nn
from torch.utils.tensorboard import SummaryWriter

ENVIRONMENT = "CartPole-v1"
EPISODES = 20
EPOCHS = 16


def environments(count: int) -> DummyVectorEnv:
    """So many, side by side."""
    return DummyVectorEnv([lambda: gymnasium.make(ENVIRONMENT) for _ in range(count)])


def build() -> DQN[Any]:
    """The algorithm, with its network and the older one that it learns towards."""
    environment = gymnasium.make(ENVIRONMENT)
    network = Net(state_shape=(4,), action_shape=2, hidden_sizes=[64, 64])
    policy = DiscreteQLearningPolicy(
        model=network, action_space=environment.action_space, eps_training=0.1, eps_inference=0.0
    )
    return DQN(
        policy=policy,
        optim=AdamOptimizerFactory(lr=1e-3),
        gamma=0.9,
        n_step_return_horizon=3,
        target_update_freq=320,
    )


def train() -> None:
    """A checkpoint each epoch of 1,000 steps."""
    Path("runs").mkdir()
    algorithm = build()
    parts = environments(10)
    parts.seed(0)
    collector = Collector[CollectStats](algorithm, parts, VectorReplayBuffer(20_000, 10), exploration_noise=True)

    def save(epoch: int, _env_step: int, _gradient_step: int) -> str:
        path = f"runs/checkpoint_{epoch}.pth"
        torch.save({"algorithm": algorithm.state_dict()}, path)
        return path

    algorithm.run_training(
        OffPolicyTrainerParams(
            training_collector=collector,
            test_collector=None,
            max_epochs=EPOCHS,
            epoch_num_steps=1000,
            collection_step_num_env_steps=10,
            batch_size=64,
            update_step_num_gradient_steps_per_sample=0.1,
            logger=TensorboardLogger(SummaryWriter("log"), save_interval=1),
            save_checkpoint_fn=save,
        )
    )


def rewards(algorithm: Any, seed: int) -> list[float]:
    """What it gets in each episode."""
    parts = environments(10)
    collector = Collector[CollectStats](algorithm, parts, exploration_noise=False)
    collector.reset(reset_buffer=True, gym_reset_kwargs={"seed": seed})
    stats = collector.collect(n_episode=EPISODES)
    return [float(reward) for reward in stats.returns]


def reward(algorithm: nn.Module, draw: Any) -> list[float]:
    """The same of the merged algorithm."""
    return rewards(algorithm, draw.seed % 2**31)


def evaluate(path: str) -> list[float]:
    """The mean reward of what ``load_state_dict`` takes, on other episodes each time."""
    algorithm = build()
    algorithm.load_state_dict(torch.load(path, weights_only=False)["algorithm"])
    means = []
    for seed in range(tiny.EVALUATIONS):
        per_episode = rewards(algorithm, 1000 * seed)
        means.append(sum(per_episode) / len(per_episode))
    return means


if __name__ == "__main__":
    tiny.main(train, evaluate)
