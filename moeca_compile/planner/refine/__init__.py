"""What is tried with a plan that the search found: fitted weights, thinning, handing over. Rollouts decide."""
