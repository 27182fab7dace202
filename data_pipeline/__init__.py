"""Encoding of captioned images as shards, for `ifvit encode` and `ifvit shards`."""
