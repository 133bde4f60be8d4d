"""Small random models against the passes: packed is what eager gives at tokens, or the graph is left unpacked."""
