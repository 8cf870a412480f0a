"""What this machine is, what of the package works on it, and what to install for the rest."""
