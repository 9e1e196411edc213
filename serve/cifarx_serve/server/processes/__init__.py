"""The processes of a server: the supervisor and its workers."""
