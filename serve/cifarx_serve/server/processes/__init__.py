"""The processes of a server: a supervisor and its workers."""
