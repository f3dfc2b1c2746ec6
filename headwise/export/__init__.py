"""Model -> ONNX -> precision -> engine, and a runner for each of them."""
