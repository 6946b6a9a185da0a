"""A small transformer encoder that classifies sequences of tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SequenceClassifier(nn.Module):
    """Token and position embeddings, encoder layers with the norm first, the mean over positions, a linear layer.

    Args:
        tokens: number of different tokens.
        length: of a sequence.
        classes: number of classes of sequences.
        width: of the embeddings; the feed-forward layers are twice as wide.
        heads: number in each attention.
        layers: number of encoder layers.
    """

    def __init__(
        self,
        tokens: int = 17,
        length: int = 64,
        classes: int = 10,
        *,
        width: int = 48,
        heads: int = 4,
        layers: int = 2,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(tokens, width)
        self.positions = nn.Embedding(length, width)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)  # with torch's std of 1.0, training overfits
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
                )
                for _ in range(layers)
            )
        )
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (N, length) -> logits (N, classes)."""
        positions = torch.arange(x.shape[1], device=x.device).expand_as(x)
        embedded = self.tokens(x) + self.positions(positions)
        logits: Tensor = self.linear(self.norm(self.layers(embedded)).mean(1))
        return logits
