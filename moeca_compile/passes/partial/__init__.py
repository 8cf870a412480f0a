"""Rows that compute some tokens or expert branches only: what they find, and how they rewrite a region."""
