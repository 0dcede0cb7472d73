"""CLIP in plain torch, with the parameter names and the arithmetic of the original code's model.

Written from the paper (arXiv 2103.00020) and the published names, as an independent reference: torch's
own MultiheadAttention with one in-projection, projections applied from the right.
"""

from __future__ import annotations

import torch
from torch import nn


class QuickGelu(nn.Module):
    """x * sigmoid(1.702 x)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, width // 64, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)}
        )
        self.gelu = QuickGelu()

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp["c_proj"](self.gelu(self.mlp["c_fc"](self.ln_2(x))))


class Blocks(nn.Module):
    """Blocks one after the other."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList([Block(width) for _ in range(layers)])

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    """The vision transformer."""

    def __init__(self, side: int, patch: int, width: int, layers: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((side // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Blocks(width, layers)
        self.proj = nn.Parameter(torch.zeros(width, out))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        rows = self.conv1(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(rows), 1, -1)
        x = torch.cat([first, rows], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenaiClip(nn.Module):
    """Both halves."""

    def __init__(
        self,
        vocabulary: int,
        context: int,
        side: int,
        patch: int,
        embeds: int,
        vision: tuple[int, int] = (128, 2),
        text: tuple[int, int] = (64, 3),
    ) -> None:
        """`vision` and `text`: width and layers."""
        super().__init__()
        self.visual = Visual(side, patch, *vision, embeds)
        self.transformer = Blocks(*text)
        self.token_embedding = nn.Embedding(vocabulary, text[0])
        self.positional_embedding = nn.Parameter(torch.zeros(context, text[0]))
        self.ln_final = nn.LayerNorm(text[0])
        self.text_projection = nn.Parameter(torch.zeros(text[0], embeds))
        self.logit_scale = nn.Parameter(torch.tensor(1.0))

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """``[images, embeds]``."""
        return self.visual(pixels)

    def encode_text(self, ids: torch.Tensor) -> torch.Tensor:
        """``[texts, embeds]`` of ids padded to the whole context with zeros; the highest id ends a text."""
        length = ids.shape[1]
        mask = torch.full((length, length), float("-inf")).triu(1)
        x = self.token_embedding(ids) + self.positional_embedding
        x = self.ln_final(self.transformer(x, mask))
        return x[torch.arange(len(x)), ids.argmax(-1)] @ self.text_projection


def random_openai_clip(
    vocabulary: int, context: int, side: int, patch: int, embeds: int, seed: int
) -> OpenaiClip:
    """A random model in evaluation mode, whose values float16 holds exactly."""
    from tests.support.tiny_clip import random_values

    model = OpenaiClip(vocabulary, context, side, patch, embeds).eval()
    values = random_values(model, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name].half().float())
    return model
