"""One run over several devices and processes: the mesh and its sharding rules, replicas of the vocabulary, packed
rows."""
