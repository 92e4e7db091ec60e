"""Scores of videos: functions of plain arrays, and metrics that gather over ranks."""

from evaluation.metrics.alignment import Alignment, ShapeAlignment, align, parse_prompt
from evaluation.metrics.clip_score import ClipScore
from evaluation.metrics.frechet import frechet_distance, frechet_distance_of_moments
from evaluation.metrics.fvd import (
    FrechetDistanceOfMoments,
    FrechetFrameDistance,
    FrechetVideoDistance,
    FrechetVideoDistanceAtInfinity,
    KernelFrameDistance,
    KernelVideoDistance,
)
from evaluation.metrics.kernel import kernel_distance, kernel_distance_of_subsets
from evaluation.metrics.moments import Moments
from evaluation.metrics.motion import Motion, TemporalConsistency
from evaluation.metrics.neighbours import Diversity, Nearest, NearestNeighbour, diversity, nearest
from evaluation.metrics.reconstruction import Reconstruction
from evaluation.metrics.shapes import FoundShape, find_shapes

__all__ = [
    "Alignment",
    "ClipScore",
    "Diversity",
    "FoundShape",
    "FrechetDistanceOfMoments",
    "FrechetFrameDistance",
    "FrechetVideoDistance",
    "FrechetVideoDistanceAtInfinity",
    "KernelFrameDistance",
    "KernelVideoDistance",
    "Moments",
    "Motion",
    "Nearest",
    "NearestNeighbour",
    "Reconstruction",
    "ShapeAlignment",
    "TemporalConsistency",
    "align",
    "diversity",
    "find_shapes",
    "frechet_distance",
    "frechet_distance_of_moments",
    "kernel_distance",
    "kernel_distance_of_subsets",
    "nearest",
    "parse_prompt",
]
