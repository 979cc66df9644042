"""Rows: read, rendered, tokenized, held out, ordered, packed."""
