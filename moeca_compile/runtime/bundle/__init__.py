"""A bundle on disk: its manifest, and what checks, describes and times it. No torch."""
