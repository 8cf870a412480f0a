"""A variant -> something that runs. One file a target; its compiler is imported when it is used."""
