"""The HTTP API: routes, schemas, the Open Inference Protocol and the pages."""
