"""Moving KV blocks between workers: protocol, transports, sender and receiver."""
