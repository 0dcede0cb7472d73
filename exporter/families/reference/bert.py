"""The torch classes of encoders without a head, for the build side.

Like transformers' classes with heads they keep the encoder under its prefix, so that names are the same
whatever the head; and BERT's has no pooler, which not every checkpoint has.
"""

from __future__ import annotations

from typing import Any

import transformers


class BertModel(transformers.BertPreTrainedModel):  # type: ignore[misc]
    """BERT, whose summary of the first token is not used."""

    def __init__(self, config: transformers.BertConfig) -> None:
        super().__init__(config)
        self.bert = transformers.BertModel(config, add_pooling_layer=False)
        self.post_init()

    def forward(self, **inputs: Any) -> Any:
        """What the encoder gives."""
        return self.bert(**inputs)


class DistilBertModel(transformers.DistilBertPreTrainedModel):  # type: ignore[misc]
    """DistilBERT."""

    def __init__(self, config: transformers.DistilBertConfig) -> None:
        super().__init__(config)
        self.distilbert = transformers.DistilBertModel(config)
        self.post_init()

    def forward(self, **inputs: Any) -> Any:
        """What the encoder gives."""
        return self.distilbert(**inputs)
