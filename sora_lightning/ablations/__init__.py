"""Ablations: one YAML of arms and seeds, run as trainings, scored, and compared with intervals."""
