"""Where captioned or labelled images come from: each source is cut into units of work."""
