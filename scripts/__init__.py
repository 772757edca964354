"""The programs: each parses its command line, wires the parts together and calls them."""
