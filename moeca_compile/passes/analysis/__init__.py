"""Graph -> facts: nothing is changed."""
