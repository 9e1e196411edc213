"""HTTP: connections, requests, multipart forms, API keys and the access log."""
