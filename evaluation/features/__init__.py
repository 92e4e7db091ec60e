"""Networks whose features and embeddings the scores are made of."""

from evaluation.features.tiny import SavedJudge, TinyJudge, load_judge

__all__ = ["SavedJudge", "TinyJudge", "load_judge"]
