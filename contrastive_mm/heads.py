"""Small modules between an encoder and a loss. They are trained, and thrown away afterwards."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from contrastive_mm.errors import UserError


class ProjectionHead(nn.Sequential):
    """The multi-layer perceptron between features and contrastive loss (SimCLR, section 4.2).

    Layers of ``hidden_dim`` with ReLU between them, then ``output_dim`` with no activation. The paper compares
    three of them: the identity, one linear layer, and a perceptron.

    Args:
        input_dim: the encoder's ``feature_dim``.
        hidden_dim: width of the hidden layers.
        output_dim: dimensions of the output.
        num_layers: linear layers in all: 0 leaves features as they are, 1 is a linear head, 2 the perceptron of
            SimCLR v1 and MoCo v2.
        batch_norm: BatchNorm after each hidden layer; SimCLR's released code has it, MoCo v2 does not.

    Shapes:
        (B, input_dim) -> (B, output_dim).

    Raises:
        UserError: fewer than 0 layers.
    """

    def __init__(
        self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int = 2, batch_norm: bool = True
    ) -> None:
        if num_layers < 0:
            raise UserError(f"A projection head has 0 layers or more; got num_layers={num_layers}.")
        layers: list[nn.Module] = []
        for index in range(num_layers - 1):
            # A bias before BatchNorm would be subtracted again by its mean.
            layers.append(nn.Linear(input_dim if index == 0 else hidden_dim, hidden_dim, bias=not batch_norm))
            if batch_norm:
                layers.append(nn.BatchNorm1d(hidden_dim))
            layers.append(nn.ReLU(inplace=True))
        if num_layers > 0:
            layers.append(nn.Linear(input_dim if num_layers == 1 else hidden_dim, output_dim))
        super().__init__(*layers)
        self.output_dim = output_dim if num_layers > 0 else input_dim


class LayerNormHead(nn.Sequential):
    """Linear, then LayerNorm: the 50-dimensional latent of CURL (Laskin et al. 2020, section 4.2).

    The LayerNorm bounds the features; without it the bilinear similarity grows without limit.

    Args:
        input_dim: the encoder's ``feature_dim``.
        output_dim: dimensions of the latent.

    Shapes:
        (B, input_dim) -> (B, output_dim).
    """

    def __init__(self, input_dim: int, output_dim: int) -> None:
        super().__init__(nn.Linear(input_dim, output_dim), nn.LayerNorm(output_dim))


class BilinearSimilarity(nn.Module):
    """Maps queries so that a dot product with a key is the bilinear similarity ``q W k`` (CURL, section 4.3).

    Keeping W on the query's side lets every dot-product loss serve as its bilinear form.

    Args:
        dim: dimensions of query and key.

    Shapes:
        (B, dim) -> (B, dim).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        # CURL's code draws W from U(0, 1), which starts far from an inner product; a scaled identity starts at it.
        self.weight = nn.Parameter(torch.eye(dim) / dim**0.5)

    def forward(self, query: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """Return ``q W``."""
        # A loss widens half-precision features: W, of the model's type, goes along.
        wide = torch.promote_types(query.dtype, self.weight.dtype)
        return query.to(wide) @ self.weight.to(wide)
