"""ONNX graphs, constructed from specs and streamed weights; nothing is traced."""
