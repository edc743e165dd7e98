"""Models of other programs: detectron2's checkpoints, ONNX files."""
