"""Scores, settings and videos of one evaluation: as JSON, as a page, to TensorBoard, compared."""
