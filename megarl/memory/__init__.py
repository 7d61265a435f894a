"""The memory of a run, stated before it starts: arithmetic only, no process group and no tensor."""
