"""The forms in which models write an expert dispatch: one file a family."""
