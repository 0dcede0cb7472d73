"""CRIS written out from its published code, over a state dictionary: no modules of ours.

Places are computed as there (height first, halves of the channels by axis), attention by torch's own
function with the separate or joined matrices, the mask by the grouped convolution.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

Feed = Mapping[str, NDArray[Any]]


class PlainCris:
    """`image`, `text` and `mask` are the three graphs; `whole` is the published forward."""

    def __init__(self, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        self.state, self.config = state, config

    def _bn(self, name: str, x: Tensor) -> Tensor:
        s = self.state
        mean, var = s[f"{name}.running_mean"], s[f"{name}.running_var"]
        return functional.batch_norm(x, mean, var, s[f"{name}.weight"], s[f"{name}.bias"])

    def _cbr(self, name: str, x: Tensor) -> Tensor:
        weight = self.state[f"{name}.0.weight"]
        return functional.relu(
            self._bn(f"{name}.1", functional.conv2d(x, weight, padding=weight.shape[-1] // 2))
        )

    def _ln(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return functional.layer_norm(x, weight.shape, weight, bias)

    def _fc(self, name: str, x: Tensor) -> Tensor:
        return functional.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def _mha(self, name: str, q: Tensor, k: Tensor, v: Tensor, heads: int, **masks: Any) -> Tensor:
        """Sequence first, as the published code calls it."""
        s = self.state
        found, _ = functional.multi_head_attention_forward(
            q,
            k,
            v,
            q.shape[-1],
            heads,
            s[f"{name}.in_proj_weight"],
            s[f"{name}.in_proj_bias"],
            None,
            None,
            False,
            0.0,
            s[f"{name}.out_proj.weight"],
            s[f"{name}.out_proj.bias"],
            training=False,
            need_weights=False,
            **masks,
        )
        return found

    def _visual(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        at, s = "backbone.visual.", self.state
        for i, stride in ((1, 2), (2, 1), (3, 1)):
            x = functional.conv2d(x, s[f"{at}conv{i}.weight"], stride=stride, padding=1)
            x = functional.relu(self._bn(f"{at}bn{i}", x))
        x = functional.avg_pool2d(x, 2)
        maps = []
        for stage, depth in enumerate(self.config["vision_layers"], 1):
            for i in range(depth):
                x = self._bottleneck(f"{at}layer{stage}.{i}.", x, 2 if stage > 1 and i == 0 else 1)
            maps.append(x)
        return maps[1], maps[2], self._attnpool(f"{at}attnpool.", maps[3])

    def _bottleneck(self, at: str, x: Tensor, stride: int) -> Tensor:
        s = self.state
        out = functional.relu(self._bn(f"{at}bn1", functional.conv2d(x, s[f"{at}conv1.weight"])))
        out = functional.relu(
            self._bn(f"{at}bn2", functional.conv2d(out, s[f"{at}conv2.weight"], padding=1))
        )
        if stride > 1:
            out = functional.avg_pool2d(out, stride)
        out = self._bn(f"{at}bn3", functional.conv2d(out, s[f"{at}conv3.weight"]))
        if f"{at}downsample.0.weight" in s:
            x = functional.conv2d(functional.avg_pool2d(x, stride), s[f"{at}downsample.0.weight"])
            x = self._bn(f"{at}downsample.1", x)
        return functional.relu(out + x)

    def _attnpool(self, at: str, x: Tensor) -> Tensor:
        s = self.state
        batch, channels, height, width = x.shape
        beside = self._bn(f"{at}connect.1", functional.conv2d(x, s[f"{at}connect.0.weight"]))
        table = s[f"{at}positional_embedding"][None]
        side = math.isqrt(table.shape[1] - 1)
        grid = table[:, -side * side :].reshape(1, side, side, channels).permute(0, 3, 1, 2)
        grid = functional.interpolate(
            grid, size=(height, width), align_corners=False, mode="bicubic"
        )
        rows = (x.reshape(batch, channels, -1) + grid.flatten(2)).permute(2, 0, 1)
        parts = "qkv"
        bias = torch.cat([s[f"{at}{p}_proj.bias"] for p in parts])
        found, _ = functional.multi_head_attention_forward(
            rows,
            rows,
            rows,
            channels,
            self.config["vision_width"] * 32 // 64,
            None,
            bias,
            None,
            None,
            False,
            0.0,
            s[f"{at}c_proj.weight"],
            s[f"{at}c_proj.bias"],
            training=False,
            need_weights=False,
            use_separate_proj_weight=True,
            **{f"{p}_proj_weight": s[f"{at}{p}_proj.weight"] for p in parts},
        )
        return functional.relu(found.permute(1, 2, 0).reshape(batch, -1, height, width) + beside)

    def image(self, pixels: Tensor) -> dict[str, Tensor]:
        """What the pyramid makes of the maps without a text."""
        v3, v4, v5 = self._visual(pixels)
        return {
            "level_3": functional.avg_pool2d(self._cbr("neck.f3_v_proj", v3), 2, 2),
            "level_4": self._cbr("neck.f2_v_proj", v4),
            "level_5": self._cbr("neck.f1_v_proj", v5),
        }

    def text(self, ids: Tensor) -> dict[str, Tensor]:
        """Vectors, words and which of them are no padding."""
        s, at, heads = self.state, "backbone.", self.config["text_heads"]
        x = s[f"{at}token_embedding.weight"][ids] + s[f"{at}positional_embedding"][: ids.shape[1]]
        x = x.permute(1, 0, 2)
        later = torch.full((len(x), len(x)), float("-inf")).triu_(1)
        for i in range(self.config["text_layers"]):
            block = f"{at}transformer.resblocks.{i}."
            n = self._ln(f"{block}ln_1", x)
            x = x + self._mha(f"{block}attn", n, n, n, heads, attn_mask=later)
            wide = self._fc(f"{block}mlp.c_fc", self._ln(f"{block}ln_2", x))
            x = x + self._fc(f"{block}mlp.c_proj", wide * torch.sigmoid(1.702 * wide))
        words = self._ln(f"{at}ln_final", x.permute(1, 0, 2))
        state = words[torch.arange(len(ids)), ids.argmax(-1)] @ s[f"{at}text_projection"]
        return {"text_embeds": state, "words": words, "word_mask": (ids != 0).float()}

    def _neck(self, levels: Mapping[str, Tensor], state: Tensor) -> Tensor:
        texts = len(state)
        f3, f4, f5 = (levels[f"level_{i}"].repeat(texts, 1, 1, 1) for i in (3, 4, 5))
        weight = self.state["neck.txt_proj.0.weight"]
        asked = functional.relu(self._bn("neck.txt_proj.1", functional.linear(state, weight)))
        f5 = functional.relu(self._bn("neck.norm_layer.0", f5 * asked.unsqueeze(-1).unsqueeze(-1)))
        f5_ = functional.interpolate(f5, scale_factor=2, mode="bilinear")
        f4 = self._cbr("neck.f2_cat", torch.cat([f4, f5_], dim=1))
        f3 = self._cbr("neck.f3_cat", torch.cat([f3, f4], dim=1))
        fq5 = functional.interpolate(
            self._cbr("neck.f4_proj5", f5), scale_factor=2, mode="bilinear"
        )
        fq = [self._cbr("neck.f4_proj3", f3), self._cbr("neck.f4_proj4", f4), fq5]
        x = self._cbr("neck.aggr", torch.cat(fq, dim=1))
        batch, _, height, width = x.shape
        ys, xs = torch.meshgrid(
            torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij"
        )
        both = [axis.expand([batch, 1, -1, -1]) for axis in (xs, ys)]
        x = self._cbr("neck.coordconv.0.conv1", torch.cat([x, *both], dim=1))
        return self._cbr("neck.coordconv.1", x)

    def mask(
        self, levels: Mapping[str, Tensor], state: Tensor, words: Tensor, seen: Tensor
    ) -> Tensor:
        """Logits of the text-made kernels, ``[texts, height, width]``."""
        grid = self._neck(levels, state)
        batch, dim, height, width = grid.shape
        heads = self.config["num_head"]
        x, txt = grid.reshape(batch, dim, -1).permute(2, 0, 1), words.permute(1, 0, 2)
        cells, places = _pos2d(dim, height, width), _pos1d(dim, words.shape[1])
        for i in range(self.config["num_layers"]):
            at = f"decoder.layers.{i}."
            n = self._ln(f"{at}norm1", x)
            n = self._mha(f"{at}self_attn", n + cells, n + cells, n, heads)
            x = x + self._ln(f"{at}self_attn_norm", n)
            n = self._ln(f"{at}norm2", x) + cells
            padding = seen == 0
            name = f"{at}multihead_attn"
            n = self._mha(name, n, txt + places, txt, heads, key_padding_mask=padding)
            x = x + self._ln(f"{at}cross_attn_norm", n)
            n = functional.relu(self._fc(f"{at}ffn.0", self._ln(f"{at}norm3", x)))
            x = x + self._fc(f"{at}ffn.4", self._ln(f"{at}ffn.3", n))
        grid = self._ln("decoder.norm", x).permute(1, 2, 0).reshape(batch, dim, height, width)
        return self._project(grid, state)

    def _project(self, grid: Tensor, state: Tensor) -> Tensor:
        x = self._cbr("proj.vis.1", functional.interpolate(grid, scale_factor=2, mode="bilinear"))
        x = self._cbr("proj.vis.3", functional.interpolate(x, scale_factor=2, mode="bilinear"))
        x = functional.conv2d(x, self.state["proj.vis.4.weight"], self.state["proj.vis.4.bias"])
        batch, channels, height, width = x.shape
        made = self._fc("proj.txt", state)
        kernel = made[:, :-1].reshape(batch, channels, 3, 3)
        flat = x.reshape(1, batch * channels, height, width)
        return functional.conv2d(flat, kernel, made[:, -1], padding=1, groups=batch).transpose(
            0, 1
        )[:, 0]


def _pos1d(dim: int, length: int) -> Tensor:
    table = torch.zeros(length, dim)
    steps = torch.exp(torch.arange(0, dim, 2, dtype=torch.float) * -(math.log(10000.0) / dim))
    places = torch.arange(0, length).unsqueeze(1).float()
    table[:, 0::2], table[:, 1::2] = torch.sin(places * steps), torch.cos(places * steps)
    return table.unsqueeze(1)


def _pos2d(dim: int, height: int, width: int) -> Tensor:
    table, half = torch.zeros(dim, height, width), dim // 2
    steps = torch.exp(torch.arange(0.0, half, 2) * -(math.log(10000.0) / half))
    across = torch.arange(0.0, width).unsqueeze(1) * steps
    down = torch.arange(0.0, height).unsqueeze(1) * steps
    for offset, wave in ((0, torch.sin), (1, torch.cos)):
        columns = wave(across).T[:, None, :]
        table[offset:half:2] = columns.repeat(1, height, 1)
        table[half + offset :: 2] = wave(down).T[:, :, None].repeat(1, 1, width)
    return table.reshape(-1, 1, height * width).permute(2, 1, 0)


def plain_cris(folder: Path) -> PlainCris:
    """The reference of a published folder."""
    from safetensors.torch import load_file

    state = load_file(folder / "model.safetensors").items()
    config = json.loads((folder / "config.json").read_text())
    return PlainCris({n.removeprefix("module."): v.float() for n, v in state}, config)


def plain_cris_outputs(folder: Path) -> Callable[[str, Feed], Mapping[str, NDArray[Any]]]:
    """The reference's outputs by graph."""
    model = plain_cris(folder)

    def outputs(graph: str, feed: Feed) -> Mapping[str, NDArray[Any]]:
        given = {name: torch.from_numpy(np.asarray(array)) for name, array in feed.items()}
        with torch.inference_mode():
            if graph == "vision_model":
                found = model.image(given["pixel_values"])
            elif graph == "text_model":
                found = model.text(given["input_ids"])
            else:
                texts = [given.pop(n) for n in ("text_embeds", "words", "word_mask")]
                found = {"logits": model.mask(given, *texts)}
        return {name: value.numpy() for name, value in found.items()}

    return outputs
