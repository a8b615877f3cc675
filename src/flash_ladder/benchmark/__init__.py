"""The benchmark of attention beside its peers: speed, memory, error, masks, tables and pictures. Also the tuning of tiles."""
