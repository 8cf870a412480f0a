"""Sizes that Dynamo's graph holds as symbols."""
