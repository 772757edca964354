"""The image network."""

from __future__ import annotations

import torch
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn


class NatureCNN(BaseFeaturesExtractor):
    """Three convolutions and a linear layer, ReLU throughout (Mnih et al. 2015).

    Images are [batch, channels, height, width]; Stable-Baselines3 has scaled them to [0, 1] already.

    Args:
        observation_space: A Box of channels-first images of at least 36 × 36.
        last_channels: Channels of the third convolution. DQN has 64; ACKTR's paper takes 32, which halves
            the large factor of the linear layer's curvature.
        features_dim: Width of the linear layer.
    """

    def __init__(self, observation_space: spaces.Box, last_channels: int = 32, features_dim: int = 512) -> None:
        super().__init__(observation_space, features_dim)
        self.convolutions = nn.Sequential(
            nn.Conv2d(observation_space.shape[0], 32, kernel_size=8, stride=4),
            nn.ReLU(),
            nn.Conv2d(32, 64, kernel_size=4, stride=2),
            nn.ReLU(),
            nn.Conv2d(64, last_channels, kernel_size=3, stride=1),
            nn.ReLU(),
            nn.Flatten(),
        )
        with torch.no_grad():
            width = self.convolutions(torch.zeros(1, *observation_space.shape)).shape[1]
        self.linear = nn.Sequential(nn.Linear(width, features_dim), nn.ReLU())

    def forward(self, observations: Tensor) -> Tensor:
        """Compute the features.

        Args:
            observations: Images, [batch, channels, height, width].

        Returns:
            Features, [batch, features_dim].
        """
        features: Tensor = self.linear(self.convolutions(observations))
        return features
