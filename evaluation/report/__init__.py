"""Report of an evaluation: as JSON, as a page, in TensorBoard, and comparisons of reports."""
