"""Speed, measured: every module here but ``report`` is a section with one ``run(report)``."""
