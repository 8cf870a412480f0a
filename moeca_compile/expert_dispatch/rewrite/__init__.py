"""Ways to rewrite a dispatch, which families share: the whole method, one loop in it, or one result behind it."""
