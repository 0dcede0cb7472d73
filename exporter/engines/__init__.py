"""TensorRT engines: build on the target, record, preflight, self-test. Not run on hardware so far."""
