"""Token shards in, a trained language model out. The loop is train/loop.py; read it from top to bottom."""
