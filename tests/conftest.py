import os
from pathlib import Path

# Tests run in as many processes as there are cores, and what they start inherits this: with more threads than cores
# all of them would wait for each other. torch reads it when it is first imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from jaxtyping import install_import_hook

# Before the package is imported: shapes and types of every annotated function are checked as it runs.
install_import_hook("contrastive_mm", "typecheck.check")
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
# Triton's kernels are interpreted where there is no GPU; it looks here when it is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# torch says some warnings once a process; they are errors here, and must not depend on which test comes first.
torch.set_warn_always(True)

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


class LinearEncoder(torch.nn.Module):
    """The smallest encoder: one linear layer over flattened inputs."""

    def __init__(self, inputs: int = 6, feature_dim: int = 8) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.layer = torch.nn.Linear(inputs, feature_dim)

    def forward(self, inputs):
        return self.layer(inputs.flatten(1))


@pytest.fixture
def encoder():
    return LinearEncoder()
