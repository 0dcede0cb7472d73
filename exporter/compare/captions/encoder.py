"""Text models from a local folder, without trust: safetensors and known classes only, no network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.core.errors import InputRefused, require
from exporter.core.modelfiles import read_config
from exporter.core.tensors import Checkpoint

if TYPE_CHECKING:
    import torch
    from tokenizers import Encoding, Tokenizer

# The classes a metric's folder may name: nothing is looked up by a string of the folder itself.
ENCODERS = {
    "bert": "BertModel",
    "deberta": "DebertaModel",
    "deberta-v2": "DebertaV2Model",
    "distilbert": "DistilBertModel",
    "rembert": "RemBertModel",
    "roberta": "RobertaModel",
    "xlm-roberta": "XLMRobertaModel",
}
BATCH = 32
# A folder without its own limit; also what "no limit" in a tokenizer_config.json is cut to.
LONGEST = 512


@dataclass(frozen=True)
class TextEncoder:
    """A tokenizer and a torch model in evaluation mode; `limit` is its longest input in tokens."""

    tokenizer: Tokenizer
    model: Any
    config: Mapping[str, Any]
    limit: int

    def tokenize(self, texts: Sequence[str]) -> list[Encoding]:
        """Each text with its special tokens, cut to `limit`."""
        self.tokenizer.enable_truncation(self.limit)
        return list(self.tokenizer.encode_batch(list(texts)))

    def tokenize_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Encoding]:
        """Two texts per input, cut to `limit` from the end of whichever is longer, token by token.

        Of two equally long ones the second loses (BERT's rule, which BLEURT keeps).
        """
        rows = []
        for first, second, room in self._parts(pairs):
            left, right = len(first.ids), len(second.ids)
            while left + right > room:
                left, right = (left - 1, right) if left > right else (left, right - 1)
            rows.append(self._joined(first, second, left, right))
        return rows

    def tokenize_context(self, pairs: Sequence[tuple[str, str]]) -> list[Encoding]:
        """Two texts per input, cut to `limit` from the end of the first.

        Where the second leaves no room for the first, the longer one is cut, as by the tokenizer.
        """
        rows = []
        for (context, claim), (first, second, room) in zip(pairs, self._parts(pairs), strict=True):
            left = min(len(first.ids), room - len(second.ids))
            if left > 0 or not first.ids:
                rows.append(self._joined(first, second, max(left, 0), len(second.ids)))
                continue
            self.tokenizer.enable_truncation(self.limit)
            rows.append(self.tokenizer.encode(context, claim))
        return rows

    def _parts(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[Encoding, Encoding, int]]:
        """Both texts without special tokens, and how many tokens they may have together."""
        self.tokenizer.no_truncation()
        room = self.limit - self.tokenizer.num_special_tokens_to_add(is_pair=True)
        columns = [
            self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
            for texts in zip(*pairs, strict=True)
        ]
        return [(first, second, room) for first, second in zip(*columns, strict=True)]

    def _joined(self, first: Encoding, second: Encoding, left: int, right: int) -> Encoding:
        first.truncate(left)
        second.truncate(right)
        joined: Encoding = self.tokenizer.post_process(first, second)
        return joined

    def batches(self, rows: Sequence[Encoding]) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """Places in `rows` and the model's inputs, in batches of like length."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
        for start in range(0, len(order), BATCH):
            places = order[start : start + BATCH]
            yield places, self._inputs([rows[i] for i in places])

    def _inputs(self, rows: Sequence[Encoding]) -> dict[str, torch.Tensor]:
        import torch

        longest = max(len(row.ids) for row in rows)
        pad = int(self.config.get("pad_token_id") or 0)

        def padded(values: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
            return torch.tensor([[*v, *[fill] * (longest - len(v))] for v in values])

        made = {
            "input_ids": padded([row.ids for row in rows], pad),
            "attention_mask": padded([[1] * len(row.ids) for row in rows], 0),
        }
        if int(self.config.get("type_vocab_size") or 0) > 1:
            made["token_type_ids"] = padded([row.type_ids for row in rows], 0)
        return made


def open_encoder(
    folder: Path, tensors: Mapping[str, Any] | None = None, *, pooler: bool = True
) -> TextEncoder:
    """Open the model folder `folder` (config.json, tokenizer, safetensors).

    `tensors` replaces the folder's own (renamed ones of a checkpoint with another layout). Without
    `pooler` a missing pooling layer is no error. Raises `InputRefused` on an unknown architecture, on
    missing weights, on pickled weights and on keys that could run code; `EnvironmentLacks` without
    torch or transformers.
    """
    require_torch()
    config = read_config(folder / "config.json")
    kind = ENCODERS.get(str(config.get("model_type")))
    if kind is None:
        raise InputRefused(
            f"{folder / 'config.json'}: model_type is {config.get('model_type')!r}; expected one of "
            f"{', '.join(sorted(ENCODERS))}"
        )
    weights = folder_tensors(folder) if tensors is None else tensors
    model = load_module(kind, config, weights, folder, optional=() if pooler else ("pooler.",))
    tokenizer = open_tokenizer(folder, embedding_rows(model))
    return TextEncoder(tokenizer, model, config, _limit(folder, config))


def embedding_rows(model: Any) -> int:
    """Rows of a model's word embedding."""
    return int(model.get_input_embeddings().weight.shape[0])


def require_torch() -> None:
    """Raise `EnvironmentLacks` without torch or transformers."""
    for module in ("torch", "transformers"):
        require(module, "build")


def folder_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All float tensors of a folder in float32, by name. Raises `InputRefused`."""
    import torch

    checkpoint = Checkpoint.open(folder)
    floats = {n for n in checkpoint.tensors if checkpoint.info(n).dtype in ("F32", "F16", "BF16")}
    return {name: torch.from_numpy(checkpoint.float32(name)) for name in sorted(floats)}


def load_module(
    kind: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Any],
    folder: Path,
    optional: Sequence[str] = (),
) -> Any:
    """The transformers class `kind` with `tensors`, float32, in evaluation mode.

    Tensors that the class does not have (heads of other tasks) are left out; a missing one is refused
    unless its name begins with one of `optional`.
    """
    import torch
    import transformers

    from exporter.runtimes.quiet import quiet_transformers

    made = getattr(transformers, kind)
    unused = ("torch_dtype", "dtype", "quantization_config", "attn_implementation")
    parsed = made.config_class.from_dict({k: v for k, v in config.items() if k not in unused})
    with quiet_transformers():
        model, found = made.from_pretrained(
            None,
            config=parsed,
            state_dict=dict(tensors),
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            # Given, not read from the config, where it may name a kernel to download.
            attn_implementation="eager",
        )
    lost = [n for n in sorted(found["missing_keys"]) if not n.startswith(tuple(optional))]
    wrong = sorted(map(str, found["mismatched_keys"]))
    for what, names in (("missing", lost), ("of another shape", wrong)):
        if names:
            raise InputRefused(
                f"{folder}: {len(names)} tensors of {kind} are {what}, first {names[0]}; expected the "
                "weights that belong to config.json"
            )
    return model.eval()


def open_tokenizer(folder: Path, rows: int) -> Tokenizer:
    """The tokenizer of a folder: tokenizer.json, else made by transformers from its vocabulary files.

    `rows` are those of the model's word embedding. Raises `InputRefused` when there is no tokenizer, when
    it cannot belong to the model, or when a config could make a loader run code.
    """
    from tokenizers import Tokenizer

    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        read_config(settings)
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:
            raise InputRefused(f"{path}: not a tokenizer ({error}); save it again") from error
    else:
        tokenizer = _converted(folder)
    # Embeddings may be padded, but not to twice the size; transformers makes an empty tokenizer,
    # for which every word is unknown, out of a folder without vocabulary.
    if not rows / 2 <= tokenizer.get_vocab_size() <= rows:
        raise InputRefused(
            f"{folder}: the tokenizer has {tokenizer.get_vocab_size()} tokens and the model {rows}; "
            "expected the tokenizer.json that belongs to the model"
        )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _converted(folder: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        said = str(error).strip().splitlines() or ["no reason given"]
        raise InputRefused(
            f"{folder}: no tokenizer.json, and its vocabulary files could not be read ({said[0]}); "
            "save the tokenizer as tokenizer.json"
        ) from error
    backend: Tokenizer | None = getattr(found, "backend_tokenizer", None)
    if backend is None:
        raise InputRefused(f"{folder}: no tokenizer.json; expected one")
    return backend


def _limit(folder: Path, config: Mapping[str, Any]) -> int:
    path = folder / "tokenizer_config.json"
    said = read_config(path).get("model_max_length") if path.is_file() else None
    # RoBERTa numbers positions from pad + 1.
    offset = int(config.get("pad_token_id") or 0) + 1 if "roberta" in config["model_type"] else 0
    places = int(config.get("max_position_embeddings") or LONGEST) - offset
    own = int(said) if isinstance(said, int | float) and said < LONGEST * 64 else LONGEST
    return max(1, min(own, places))
