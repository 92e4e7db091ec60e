"""Scores of videos: functions of plain arrays, and metrics that gather over ranks."""

from evaluation.metrics.alignment import Alignment, ShapeAlignment, align, parse_prompt
from evaluation.metrics.clip_score import ClipScore
from evaluation.metrics.frechet import Moments, frechet_distance, frechet_distance_of_moments
from evaluation.metrics.fvd import FrechetVideoDistance
from evaluation.metrics.reconstruction import Reconstruction
from evaluation.metrics.shapes import FoundShape, find_shapes

__all__ = [
    "Alignment",
    "ClipScore",
    "FoundShape",
    "FrechetVideoDistance",
    "Moments",
    "Reconstruction",
    "ShapeAlignment",
    "align",
    "find_shapes",
    "frechet_distance",
    "frechet_distance_of_moments",
    "parse_prompt",
]
