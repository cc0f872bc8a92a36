"""Token shards in, a trained language model out. The loop is train/loop.py; read it from top to bottom."""

import os

# torch's threads spin while they wait for each other, for 300,000 turns. Where another program has taken a core, what
# they wait for does not run: a step on two cores took seven times as long. With 3,000 turns it does not, and where
# nothing else runs it costs little (3 % in five pairs of runs, 12 % in the worst; Nov 2026). Read when torch loads.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
