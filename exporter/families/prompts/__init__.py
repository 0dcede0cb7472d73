"""The text side without torch: templates, tokenizers, image tokens."""
