"""HTTP: connections, requests, responses, forms, API keys and the access log."""
