"""Graphs of ai.onnx operators alone, for TensorRT's parser and any other conformant runtime."""
