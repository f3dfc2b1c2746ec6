"""What runs on the device: numpy, click and the runtime of the artifact, and never torch, transformers or onnx."""
