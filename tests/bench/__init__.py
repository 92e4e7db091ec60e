"""Speed, measured. Modules here are sections, each with one ``run(report)``; ``report`` and
``models`` are what they share."""
