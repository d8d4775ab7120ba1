"""The run file: its schema, and the one loader that reads it."""
