"""Put a checkpoint to use: server, gateway, chat."""
