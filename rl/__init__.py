"""Reinforcement learning: frames, random crops, observation encoders."""

from contrastive_mm.rl.crops import RandomCrops, centre_crop
from contrastive_mm.rl.encoders import PixelEncoder
from contrastive_mm.rl.frames import FrameStore, collect_frames

__all__ = ["FrameStore", "PixelEncoder", "RandomCrops", "centre_crop", "collect_frames"]
