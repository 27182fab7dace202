"""Where captioned or labelled images come from; each kind of source is one file."""
