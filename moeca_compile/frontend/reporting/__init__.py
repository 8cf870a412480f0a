"""What `explain` adds to a report: the calls that ran, and the graphs of the passes."""
