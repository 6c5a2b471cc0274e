"""The optimizer that the options ask for, and its learning rate at each step."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim import Optimizer

from contrastive_mm.training.config import TrainerConfig


def build_optimizer(method: nn.Module, config: TrainerConfig) -> Optimizer:
    """AdamW or SGD over the trainable parameters, without weight decay on biases and normalisation layers."""
    trainable = [parameter for parameter in method.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=0.9)
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)


def scheduled_rate(config: TrainerConfig, step: int, total: int) -> float:
    """Learning rate of step 0..total-1: a linear warm-up, then half a cosine down towards 0."""
    warmup = int(config.warmup_share * total)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return config.learning_rate * (1 + math.cos(math.pi * progress)) / 2
