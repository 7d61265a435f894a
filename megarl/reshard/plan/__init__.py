"""Which rank sends which part of which tensor: arithmetic only, no process group and no tensor."""
